"""The model: a Vision Transformer, a text transformer, and the loss that joins them.

    model = CLIP(Config(**PRESETS["tiny"], geometry="euclidean"))
    image, text, scalars = model(images, tokens)  # embeddings (N, D), and what the loss needs
    model.loss(image, text, scalars)["loss"].backward()
    model = load_model("out/ckpt.pt")             # ours, or one that open_clip trained

A tower turns its input into *features*, the geometry turns features into *embeddings*. The towers
may run in bfloat16; embeddings and loss are float32, or float64 after `.double()`. Architecture,
parameter names and initial values are open_clip's: it loads our checkpoints, and we load its.

Axes: N images or texts, T tokens, R computed tokens of all N texts, C width of a tower, H heads,
D width of the embeddings.
"""

import argparse
import math
import os
import re
import warnings
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from geometry import find_geometry

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, per colour
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Config:
    """All that a model is, beside its weights. None: the default of the geometry or the width."""

    image_size: int  # images are squares of this many pixels
    patch_size: int
    vision_width: int
    vision_layers: int
    text_width: int
    text_layers: int
    embed_dim: int  # D
    vocab_size: int = 258  # V: start token V - 2, end token V - 1, padding 0 after the end
    tokenizer: str = "bytes"  # see data.tokenize
    context_length: int = 77
    vision_heads: int | None = None  # None: width / 64
    text_heads: int | None = None
    geometry: str = "euclidean"
    logit: str | None = None
    final_ln: bool | None = None  # LayerNorm at the end of both towers
    init_logit_scale: float | None = None  # in log space
    max_logit_scale: float = 100.0  # the factor itself. CLIP: above it training became unstable
    quick_gelu: bool = False  # True for OpenAI's own weights

    def __post_init__(self):
        geometry = find_geometry(self.geometry)
        self.logit = geometry.find_logit(self.logit)
        if self.final_ln is None:
            self.final_ln = geometry.final_ln
        if self.init_logit_scale is None:
            self.init_logit_scale = geometry.init_logit_scale(self.logit)
        self.vision_heads = self.vision_heads or self.vision_width // 64
        self.text_heads = self.text_heads or self.text_width // 64


def sizes(image_size, patch_size, vision_width, vision_layers, text_width, text_layers, embed_dim):
    return locals()


PRESETS = {
    "tiny": sizes(64, 8, 64, 3, 64, 2, 128),
    "ViT-S-16": sizes(224, 16, 384, 12, 384, 12, 384),
    "ViT-B-32": sizes(224, 32, 768, 12, 512, 12, 512),
    "ViT-B-16": sizes(224, 16, 768, 12, 512, 12, 512),
    "ViT-L-14": sizes(224, 14, 1024, 24, 768, 12, 768),
}

# ------------------------------------------------------------------------------------------------
# several processes: each has N pairs of a batch of N * world_size()


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


class AllGather(torch.autograd.Function):
    """Rows of all processes. Every process uses my rows in its own loss, so their gradient is the
    sum of the gradients that all processes have for them."""

    @staticmethod
    def forward(ctx, x):  # (N, D)
        rows = x.new_empty(world_size(), *x.shape)
        dist.all_gather(list(rows.unbind()), x.contiguous())
        return rows.flatten(0, 1)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        mine = torch.empty_like(grad)
        dist.all_to_all_single(mine, grad)  # gloo's reduce_scatter sends twice as much
        return mine.unflatten(0, (world_size(), -1)).sum(0)


@torch.compiler.disable  # torch.compile takes what is before and after it
def all_gather(x):
    """(N, D) -> (N * world_size(), D), rows of all processes, with gradient."""
    return AllGather.apply(x) if world_size() > 1 else x


# ------------------------------------------------------------------------------------------------
# the transformer that both towers share


class Attention(nn.Module):
    def __init__(self, width, heads, causal):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"{heads} heads and width {width}? See vision_heads, text_heads")
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))  # queries, keys, values
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, packing=None):
        """x (N, T, C), or packed (R, C) with packing = index (R,), N, T: see `pack_tokens`."""
        x = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        if packing:
            index, N, T = packing
            x = x.new_zeros(N * T, x.shape[1]).index_copy(0, index, x)
            x = x.unflatten(0, (N, T))  # (N, T, 3C)
        heads = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in x.chunk(3, dim=2))
        q, k, v = heads  # (N, H, T, C/H) each
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x.transpose(1, 2).flatten(2)  # (N, T, C)
        if packing:
            x = x.flatten(0, 1).index_select(0, index)  # (R, C)
        return self.out_proj(x)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width, heads, quick_gelu, causal):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        c_fc, c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        gelu = QuickGELU() if quick_gelu else nn.GELU()
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=gelu, c_proj=c_proj))

    def forward(self, x, pool_index=None, packing=None):
        x = x + self.attn(self.ln_1(x), packing)
        if pool_index is not None:
            x = x.flatten(0, -2).index_select(0, pool_index)  # (N, C)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, quick_gelu, causal):
        super().__init__()
        blocks = (Block(width, heads, quick_gelu, causal) for _ in range(layers))
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x, pool_index, packing=None):
        """x (N, T, C), or packed (R, C) -> (N, C): one token of each sample, whose row among all
        tokens is in `pool_index` (N,). Only these need the last MLP."""
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x, packing=packing)
        return last(x, pool_index, packing)


class VisionTransformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        C, T = c.vision_width, 1 + (c.image_size // c.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, C, c.patch_size, c.patch_size, bias=False)
        self.class_embedding = nn.Parameter(C**-0.5 * torch.randn(C))
        self.positional_embedding = nn.Parameter(C**-0.5 * torch.randn(T, C))
        self.ln_pre = nn.LayerNorm(C)
        self.transformer = Transformer(C, c.vision_layers, c.vision_heads, c.quick_gelu, False)
        self.ln_post = nn.LayerNorm(C) if c.final_ln else nn.Identity()
        self.proj = nn.Parameter(C**-0.5 * torch.randn(C, c.embed_dim))

    def forward(self, images):  # (N, 3, H, W), normalised
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (N, patches, C)
        class_token = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([class_token, x], dim=1) + self.positional_embedding  # (N, T, C)
        class_tokens = torch.arange(len(x), device=x.device) * x.shape[1]
        x = self.transformer(self.ln_pre(x), class_tokens)  # (N, C)
        return self.ln_post(x) @ self.proj  # (N, D)


def caption_lengths(tokens, vocab_size):
    """tokens (N, T) -> (N,), up to and with the first end token. (In CLIP's vocabulary 0 is a word,
    so counting what is not 0 would be wrong.)"""
    return (tokens == vocab_size - 1).int().argmax(1) + 1


def pack_tokens(tokens, vocab_size):
    """tokens (N, T) -> int64 (R,): which of all N * T tokens the text tower computes.

    Captions are padded to the longest of the batch; of 77 tokens 12 to 20 are real. Linear layers
    see these alone, *packed* one below the other (R, C). Attention has to know which belong
    together and sees them *padded* (N, T, C), with zeros for the rest. The result is exact: no
    token looks at what comes after it.
    Some padding fills R up to a multiple of N, so that memory of the same size is needed again and
    again. Best called on CPU tokens: to count those of a GPU the CPU would have to wait."""
    N, T = tokens.shape
    lengths = caption_lengths(tokens, vocab_size)
    real = (torch.arange(T, device=tokens.device) < lengths[:, None]).flatten()
    R = N * math.ceil(int(real.sum()) / N)
    return (~real).int().argsort(stable=True)[:R]  # real tokens in their order, then some padding


# ------------------------------------------------------------------------------------------------


class CLIP(nn.Module):
    """Both towers. As in open_clip, the text tower's parameters are parameters of this class."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        C = c.text_width
        self.geometry = find_geometry(c.geometry)
        self.visual = VisionTransformer(c)
        self.token_embedding = nn.Embedding(c.vocab_size, C)
        self.positional_embedding = nn.Parameter(torch.empty(c.context_length, C))
        self.transformer = Transformer(C, c.text_layers, c.text_heads, c.quick_gelu, True)
        self.ln_final = nn.LayerNorm(C) if c.final_ln else nn.Identity()
        self.text_projection = nn.Parameter(torch.empty(C, c.embed_dim))
        self.init_text_weights(C, c.text_layers)
        self.logit_scale = nn.Parameter(torch.tensor(float(c.init_logit_scale)))  # log space
        for name, (start, _, _) in self.geometry.learned_scalars(c.embed_dim).items():
            self.register_parameter(name, nn.Parameter(torch.tensor(start)))
        mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
        self.register_buffer("image_mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", std.view(3, 1, 1), persistent=False)

    def init_text_weights(self, C, layers):
        """OpenAI's rule. The vision tower's layers keep PyTorch's defaults, as in open_clip."""
        out_std = C**-0.5 * (2 * layers) ** -0.5
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=C**-0.5)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=C**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=out_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * C) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=out_std)

    def embed(self, features, alpha):
        """Features of a tower, the learned scale or None -> embeddings, float32 at least."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            return self.geometry.embed(features, alpha)

    def encode_image(self, images):
        """images (N, 3, H, W): uint8, or float and already normalised -> embeddings (N, D)."""
        if images.dtype == torch.uint8:
            images = (images.to(self.image_mean) / 255 - self.image_mean) / self.image_std
        return self.embed(self.visual(images), getattr(self, "alpha_img", None))

    def encode_text(self, tokens, index=None):
        """tokens (N, T) int64, T <= context_length, padded after the end token; index: what
        `pack_tokens` gives for them, if that is known -> embeddings (N, D)."""
        N, T = tokens.shape
        if index is None:
            index = pack_tokens(tokens, self.config.vocab_size)
        # F.embedding, because the gradient of table[i] is not reproducible with two CPU threads
        x = self.token_embedding(tokens.flatten().index_select(0, index))  # (R, C)
        x = x + F.embedding(index % T, self.positional_embedding)
        # captions lie one below the other: running sums of their lengths give their last rows
        end_tokens = caption_lengths(tokens, self.config.vocab_size).cumsum(0) - 1
        x = self.transformer(x, end_tokens, (index, N, T))  # (N, C)
        features = self.ln_final(x) @ self.text_projection  # (N, D)
        return self.embed(features, getattr(self, "alpha_txt", None))

    def scalars(self):
        """The learned scalars that the loss needs: logit scale and curvature (2,)."""
        log_curv = getattr(self, "curvature", torch.zeros_like(self.logit_scale))
        return torch.stack([self.logit_scale, log_curv]).exp()

    def forward(self, images, tokens, index=None):
        """-> image and text embeddings (N, D), scalars (2,). All parameters take part in them, as
        DistributedDataParallel wants it."""
        return self.encode_image(images), self.encode_text(tokens, index), self.scalars()

    def similarity(self, x, y):
        """Embeddings x (N, D), y (M, D) -> (N, M) before the logit scale: larger is closer."""
        with torch.autocast(x.device.type, enabled=False):
            return self.geometry.similarity(x, y, self.config.logit, self.scalars()[1])

    def loss(self, image, text, scalars, entailment_weight=0.0, min_radius=0.1):
        """What `forward` returns for the N pairs of this process -> dict of 0-d tensors:

        loss                       contrastive + entailment_weight * entailment
        contrastive                cross entropy: each image among the texts of all processes, and
                                   each text among the images
        entailment, in_cone        mean angle (rad) by which images are outside the cones of their
                                   texts; fraction of images inside. Only where there are cones
        logit_scale, curvature     the scalars
        text_radius, image_radius  mean distance from the root

        Averaged over the processes, loss and gradients are those of one process with all pairs.
        """
        geometry, logit, N = self.geometry, self.config.logit, len(image)
        scale, curv = scalars.unbind()
        with torch.autocast(image.device.type, enabled=False):
            all_image, all_text = all_gather(image), all_gather(text)  # (M, D)
            image_logits = scale * geometry.similarity(image, all_text, logit, curv)  # (N, M)
            text_logits = image_logits.T
            if world_size() > 1:
                text_logits = scale * geometry.similarity(text, all_image, logit, curv)
            match = rank() * N + torch.arange(N, device=image.device)
            image_loss = F.cross_entropy(image_logits, match)
            text_loss = F.cross_entropy(text_logits, match)
            loss = contrastive = (image_loss + text_loss) / 2
            log = {"contrastive": contrastive, "logit_scale": scale, "curvature": curv}
            if geometry.cones or entailment_weight > 0:  # without cones this raises ValueError
                outside = geometry.entailment_loss(text, image, min_radius, curv)  # (N,)
                log["entailment"] = outside.mean()
                log["in_cone"] = (outside == 0).float().mean()
                if entailment_weight > 0:
                    loss = contrastive + entailment_weight * log["entailment"]
            with torch.no_grad():
                root = geometry.root(torch.cat([all_image, all_text]))
                log["text_radius"] = geometry.distance_to_root(text, root).mean()
                log["image_radius"] = geometry.distance_to_root(image, root).mean()
        return {"loss": loss} | {name: value.detach() for name, value in log.items()}

    def bounds(self):
        """Learned scalars -> (lowest, highest). The logit scale has no lowest value."""
        learned = self.geometry.learned_scalars(self.config.embed_dim)
        bounds = {name: (low, high) for name, (_, low, high) in learned.items()}
        return bounds | {"logit_scale": (-math.inf, math.log(self.config.max_logit_scale))}

    @torch.no_grad()
    def clamp_scalars(self):
        """After every optimizer step. A clamp in the forward pass would have no gradient outside
        the bounds: a value that got there would never come back."""
        for name, (low, high) in self.bounds().items():
            getattr(self, name).clamp_(low, high)


# ------------------------------------------------------------------------------------------------
# checkpoints: {"state_dict": weights in open_clip's names, "config": ..., and more}

# What a file may hold beside tensors: argparse's flags, and numpy's numbers with their types
DTYPES = [type(np.dtype(code)) for code in "?bBhHiIlLefd"]  # bool, integers, floats
UNPICKLE_NUMBER = np.float64(0).__reduce__()[0]
PLAIN_VALUES = [argparse.Namespace, np.dtype, UNPICKLE_NUMBER, *DTYPES]
NOT_OURS = {  # the beginning of a parameter's name -> what such a file is
    "visual.layer1": "a ResNet; only Vision Transformers are read",
    "vision_model": "in Hugging Face's layout; convert it to open_clip's",
    "model.": "wrapped by Lightning; remove 'model.' from its parameter names",
}
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # in OpenAI's files
HEADS_64 = (64, 128, 192, 256, 384, 512, 640, 768, 896, 1024)  # widths with 64 channels per head


def load_checkpoint(path):
    """A file of tensors and plain values -> dict. Its code is never run. Raises ValueError."""
    try:
        with torch.serialization.safe_globals(PLAIN_VALUES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TorchScript, which is refused below
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read checkpoint {path}: {error.strerror}") from None
    except Exception as error:  # damaged files raise nearly anything
        message = (f"{path} ({os.path.getsize(path):,} bytes) is no checkpoint of tensors and "
                   "plain values, as train.py and open_clip write them")  # fmt: skip
        if "TorchScript" in str(error):
            message = (f"{path} is a TorchScript archive, which is a program. Convert it once:\n"
                       f"    model = torch.jit.load({str(path)!r}, map_location='cpu')\n"
                       "    torch.save(model.state_dict(), 'weights.pt')")  # fmt: skip
        raise ValueError(message) from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


def load_model(path, **overrides):
    """Checkpoint -> CLIP in eval mode, on the CPU, and its train_config. Raises ValueError.

    Our files say all that the model is. In open_clip's the shapes of the weights give the sizes;
    these can be given: geometry, logit, tokenizer, quick_gelu, vision_heads, text_heads."""
    checkpoint = load_checkpoint(path)
    weights = checkpoint.get("state_dict")
    weights = weights if isinstance(weights, dict) else checkpoint
    names = {name: re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)) for name in weights}
    weights = {new: weights[old] for old, new in names.items() if new not in NOT_WEIGHTS}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    ours = {"config", "train_config"} <= checkpoint.keys()
    config = Config(**checkpoint["config"]) if ours else infer_config(path, weights, **overrides)
    for name, value in overrides.items():
        if getattr(config, name) != value:
            raise ValueError(f"{path} has {name} {getattr(config, name)!r}, not {value!r}")
    model = CLIP(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # it lists missing, unexpected and misshapen parameters
        raise ValueError(f"{path}: {' '.join(str(error).split())[:600]}") from None
    model.clamp_scalars()  # the authors clamp the curvature when they read it
    model.train_config = checkpoint["train_config"] if ours else {}
    return model.eval()


def infer_config(path, weights, geometry=None, tokenizer="clip", **overrides):
    """Weights in open_clip's names -> Config."""
    for beginning, what in NOT_OURS.items():
        if any(name.startswith(beginning) for name in weights):
            raise ValueError(f"{path} is {what}")
    try:
        vision_width = len(weights["visual.transformer.resblocks.0.ln_1.weight"])
        text_width = len(weights["transformer.resblocks.0.ln_1.weight"])
        patch_size = weights["visual.conv1.weight"].shape[3]
        grid = math.isqrt(len(weights["visual.positional_embedding"]) - 1)
        vocab_size = len(weights["token_embedding.weight"])
        context_length = len(weights["positional_embedding"])
        embed_dim = weights["visual.proj"].shape[1]
    except (LookupError, ValueError, TypeError, AttributeError):
        found = ", ".join(list(weights)[:4])
        raise ValueError(f"{path} has no ViT CLIP in open_clip's layout, but {found}") from None
    blocks = [name for name in weights if name.endswith(".ln_1.weight")]
    vision_layers = sum(name.startswith("visual.") for name in blocks)
    text_layers = len(blocks) - vision_layers
    geometry = geometry or ("hyperbolic" if "curvature" in weights else None)
    if geometry is None:
        raise ValueError(f"{path} does not say its geometry; give --geometry clip or euclidean")
    for tower, width in (("vision", vision_width), ("text", text_width)):
        if f"{tower}_heads" not in overrides and width not in HEADS_64:
            raise ValueError(f"{path}: how many heads has width {width}? Give --{tower}_heads")
    return Config(
        grid * patch_size, patch_size, vision_width, vision_layers, text_width, text_layers,
        embed_dim, vocab_size=vocab_size, context_length=context_length, geometry=geometry,
        tokenizer=tokenizer, final_ln="ln_final.weight" in weights, **overrides,
    )  # fmt: skip
