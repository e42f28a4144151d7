"""The model: a Vision Transformer, a text transformer, and the loss that joins them.

    model = CLIP(Config(**PRESETS["tiny"], geometry="euclidean"))
    image, text, scalars = model(images, tokens)  # embeddings (N, D) and learned scalars (2,)
    model.loss(image, text, scalars)["loss"].backward()
    model = load_model("out/ckpt.pt")             # from train.py or lab/convert.py

A tower turns its input into *features*, and the geometry turns features into *embeddings*. Towers
may run in bfloat16. Embeddings and loss are float32, or float64 after `.double()`. Architecture,
parameter names and initial values are open_clip's. open_clip 3.3.0 loads our `clip` checkpoints;
those of EuCLIP and MERU need the EuCLIP authors' fork of it. The parameters `logit_scale`,
`alpha_img`, `alpha_txt` and `curvature` are logarithms; `scalars` and the log contain their exp.

Axes: N images or texts, T tokens, R packed tokens of all N texts, C width of a tower, H heads,
D width of the embeddings.
"""

import math
import os
import re
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from geometry import GEOMETRIES

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, per RGB channel
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

@dataclass
class Config:
    """Everything that defines a model except its weights. Where a field is None,
    the geometry or the width determines its value."""

    image_size: int  # side of the square images in pixels
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
    final_ln: bool | None = None  # whether both towers end with a LayerNorm
    init_logit_scale: float | None = None  # in log space
    max_logit_scale: float = 100.0  # not in log space; CLIP's training was unstable above 100
    quick_gelu: bool = False  # True for OpenAI's own weights

    def __post_init__(self):
        if self.geometry not in GEOMETRIES:
            raise ValueError(f"geometry {self.geometry!r} is none of {', '.join(GEOMETRIES)}")
        geometry = GEOMETRIES[self.geometry]
        self.logit = geometry.find_logit(self.logit)
        if self.final_ln is None:
            self.final_ln = geometry.final_ln
        if self.init_logit_scale is None:
            self.init_logit_scale = geometry.init_logit_scale(self.logit)
        self.vision_heads = self.vision_heads or self.vision_width // 64
        self.text_heads = self.text_heads or self.text_width // 64

SIZES = ("image_size", "patch_size", "vision_width", "vision_layers", "text_width", "text_layers",
         "embed_dim")
PRESETS = {
    "tiny": dict(zip(SIZES, (64, 8, 64, 3, 64, 2, 128))),
    "ViT-S-16": dict(zip(SIZES, (224, 16, 384, 12, 384, 12, 384))),
    "ViT-B-32": dict(zip(SIZES, (224, 32, 768, 12, 512, 12, 512))),
    "ViT-B-16": dict(zip(SIZES, (224, 16, 768, 12, 512, 12, 512))),
    "ViT-L-14": dict(zip(SIZES, (224, 14, 1024, 24, 768, 12, 768))),
}

# ---- the transformer that both towers share ----------------------------------------------------

class Attention(nn.Module):
    def __init__(self, width, heads, causal):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"{heads} heads do not divide width {width}; "
                             "set vision_heads or text_heads")
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))  # queries, keys, values
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, packing=None):
        """x (N, T, C), or packed x (R, C) with packing = (index (R,), N, T) -> the same shape.
        Projections take packed rows; only the attention itself needs padding: see `pack_tokens`."""
        x = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        if packing:
            index, N, T = packing
            x = x.new_zeros(N * T, x.shape[1]).index_copy(0, index, x)  # each row in its place
            x = x.unflatten(0, (N, T))  # (N, T, 3C)
        q, k, v = x.chunk(3, dim=2)  # (N, T, C) each
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
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
            x = x.flatten(0, -2).index_select(0, pool_index)  # (N * T or R, C) -> (N, C)
        return x + self.mlp(self.ln_2(x))

class Transformer(nn.Module):
    def __init__(self, width, layers, heads, quick_gelu, causal):
        super().__init__()
        blocks = (Block(width, heads, quick_gelu, causal) for _ in range(layers))
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x, pool_index, packing=None):
        """x (N, T, C), or packed (R, C) -> (N, C), one token per sample: pool_index[n] is the row
        of sample n's token among all N * T or R rows. The last MLP computes only these rows."""
        *blocks, last = self.resblocks  # a slice would make a new module at every step
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
    """tokens (N, T) -> lengths (N,), up to and including the first end token; 1 if there is none.
    Counting the nonzero tokens would be wrong: 0 is the padding, but in CLIP's vocabulary it is
    also a real token."""
    return (tokens == vocab_size - 1).int().argmax(1) + 1

def pack_tokens(tokens, vocab_size):
    """tokens (N, T) -> int64 (R,): which of the N * T tokens the text tower computes.

    Captions are padded to the longest of the batch, but most have only 12 to 20 of 77 tokens. Most
    layers treat each token on its own, so they process only the real tokens, *packed* as the rows
    of one matrix (R, C). Attention mixes the tokens of a caption, but must not mix captions, so it
    processes tokens *padded* to (N, T, C), with zeros in place of the padding. The result is exact:
    attention is causal and padding comes last, so no real token attends to padding.
    A few padding tokens round R up to a multiple of N, so tensor sizes recur and their memory is
    reused. Call this with CPU tokens, because counting tokens on the GPU would stall the CPU.
    Raises ValueError if a text has no end token."""
    N, T = tokens.shape
    if not (tokens == vocab_size - 1).any(1).all():
        raise ValueError(f"a text has no end token {vocab_size - 1}; use data.tokenize")
    lengths = caption_lengths(tokens, vocab_size)
    real = (torch.arange(T, device=tokens.device) < lengths[:, None]).flatten()
    R = N * math.ceil(int(real.sum()) / max(1, N))
    return (~real).int().argsort(stable=True)[:R]  # False first: real tokens, then padding

# ------------------------------------------------------------------------------------------------

class CLIP(nn.Module):
    """Both towers. As in open_clip, the parameters of the text tower belong to this class."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        C = c.text_width
        self.geometry = GEOMETRIES[c.geometry]
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

    def init_text_weights(self, C, layers):
        """OpenAI's initial values. The vision layers keep PyTorch's defaults, as in open_clip."""
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
        """Features (N, D), learned scale or None -> embeddings (N, D) in float32 or float64."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            return self.geometry.embed(features, alpha)

    def encode_image(self, images):
        """images (N, 3, H, W), uint8 or already normalised floats -> embeddings (N, D). Raises
        ValueError for other sizes, and for floats that cannot have been normalised."""
        size = self.config.image_size
        if not torch.is_tensor(images) or images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be a tensor (N, 3, {size}, {size}), see data.load_image")
        if images.dtype == torch.uint8:
            mean = self.logit_scale.new_tensor(IMAGE_MEAN).view(3, 1, 1)
            std = self.logit_scale.new_tensor(IMAGE_STD).view(3, 1, 1)
            images = (images.to(mean.dtype) / 255 - mean) / std
        elif images.numel() and not images.abs().max() < 20:  # normalised pixels are -1.8 to 2.2
            raise ValueError("images must be uint8, or floats normalised by CLIP's mean and std")
        return self.embed(self.visual(images), getattr(self, "alpha_img", None))

    def encode_text(self, tokens, index=None):
        """tokens (N, T) int64, T <= context_length, padded after the end token; index (R,): their
        `pack_tokens` if the caller has computed it -> embeddings (N, D). Raises ValueError."""
        most = self.config.context_length
        if not torch.is_tensor(tokens) or tokens.ndim != 2 or tokens.shape[1] > most:
            raise ValueError(f"tokens must be int64 (N, T <= {most}), see data.tokenize")
        N, T = tokens.shape
        if index is None:
            index = pack_tokens(tokens, self.config.vocab_size)
        # The gradient of table[i] is not reproducible with two CPU threads; F.embedding's is.
        x = self.token_embedding(tokens.flatten().index_select(0, index))  # (R, C)
        x = x + F.embedding(index % T, self.positional_embedding)
        # Packed captions follow each other, so the cumulative lengths give their last rows.
        end_tokens = caption_lengths(tokens, self.config.vocab_size).cumsum(0) - 1
        x = self.transformer(x, end_tokens, (index, N, T))  # (N, C)
        features = self.ln_final(x) @ self.text_projection  # (N, D)
        return self.embed(features, getattr(self, "alpha_txt", None))

    def scalars(self):
        """-> (2,): logit scale and curvature c > 0. All learned scalars that the loss needs must be
        here, so that DistributedDataParallel and `gradcache_backward` see them."""
        log_curv = getattr(self, "curvature", torch.zeros_like(self.logit_scale))
        return torch.stack([self.logit_scale, log_curv]).exp()

    def forward(self, images, tokens, index=None):
        """-> image and text embeddings (N, D), scalars (2,). All parameters contribute to them, as
        DistributedDataParallel requires."""
        return self.encode_image(images), self.encode_text(tokens, index), self.scalars()

    def similarity(self, x, y):
        """Embeddings x (N, D), y (M, D) -> (N, M), larger for closer ones, without logit scale."""
        with torch.autocast(x.device.type, enabled=False):
            return self.geometry.similarity(x, y, self.config.logit, self.scalars()[1])

    def loss(self, image, text, scalars, entailment_weight=0.0, min_radius=0.1):
        """The loss of the N pairs of this process, from the three results of `forward`. Returns a
        dict of 0-d tensors:

        loss                       contrastive + entailment_weight * entailment
        contrastive                mean cross entropy of classifying each image among the texts of
                                   all processes, and each text among their images
        entailment, in_cone        mean angle (rad) by which images are outside the cones of their
                                   texts; fraction of images inside (geometries with cones only)
        logit_scale, curvature     the scalars
        text_radius, image_radius  mean distance from the root, see `distance_to_root`

        Averaged over all processes, loss and gradients equal those of one process with all pairs.
        """
        geometry, logit, N = self.geometry, self.config.logit, len(image)
        scale, curv = scalars.unbind()
        with torch.autocast(image.device.type, enabled=False):
            all_image, all_text = image, text  # (M, D)
            if world_size() > 1:
                all_image, all_text = all_gather(image), all_gather(text)
            image_logits = scale * geometry.similarity(image, all_text, logit, curv)  # (N, M)
            text_logits = image_logits.T  # on one process, where both have the same pairs
            if world_size() > 1:
                text_logits = scale * geometry.similarity(text, all_image, logit, curv)
            match = rank() * N + torch.arange(N, device=image.device)
            image_loss = F.cross_entropy(image_logits, match)
            text_loss = F.cross_entropy(text_logits, match)
            loss = contrastive = (image_loss + text_loss) / 2
            metrics = {"contrastive": contrastive, "logit_scale": scale, "curvature": curv}
            if geometry.cones or entailment_weight > 0:  # raises ValueError without cones
                outside = geometry.entailment_loss(text, image, min_radius, curv)  # (N,)
                metrics["entailment"] = outside.mean()  # for the log even if its weight is 0
                metrics["in_cone"] = (outside == 0).float().mean()
                if entailment_weight > 0:
                    loss = contrastive + entailment_weight * metrics["entailment"]
            with torch.no_grad():
                root = geometry.root(torch.cat([all_image, all_text]))
                metrics["text_radius"] = geometry.distance_to_root(text, root).mean()
                metrics["image_radius"] = geometry.distance_to_root(image, root).mean()
        return {"loss": loss} | {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def clamp_scalars(self):
        """Call this after every optimizer step. A clamp in the forward pass would have gradient 0
        outside the bounds, so a scalar that left them could never return."""
        self.logit_scale.clamp_(max=math.log(self.config.max_logit_scale))
        for name, (_, low, high) in self.geometry.learned_scalars(self.config.embed_dim).items():
            getattr(self, name).clamp_(low, high)

# ---- below: several processes, and checkpoints -------------------------------------------------

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

class AllGather(torch.autograd.Function):
    """x (N, D) of this process -> rows of all processes (N * world_size(), D). Every process uses x
    in its loss, so the gradient of x is the sum of its gradients from all processes."""

    @staticmethod
    def forward(ctx, x):
        rows = x.new_empty(world_size(), *x.shape)
        dist.all_gather(list(rows.unbind()), x.contiguous())
        return rows.flatten(0, 1)

    @staticmethod
    def backward(ctx, grad):
        received = torch.empty_like(grad)
        # With the sum below this is a reduce_scatter; gloo's own would send twice as much.
        dist.all_to_all_single(received, grad.contiguous())
        return received.unflatten(0, (world_size(), -1)).sum(0)

@torch.compiler.disable  # torch.compile cannot trace it and compiles the code around it
def all_gather(x):
    return AllGather.apply(x)

def load_checkpoint(path):
    """Path -> dict of tensors and plain values. Loading uses `weights_only=True`, so a checkpoint
    cannot execute code, and maps the file, so tensors use memory only when they are read. Raises
    ValueError for files that neither train.py nor lab/convert.py has written."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}")
    try:
        checkpoint = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        missing = {"state_dict", "config", "train_config"} - checkpoint.keys()
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except Exception as error:  # damaged files raise almost any exception
        raise ValueError(
            f"{path} ({os.path.getsize(path):,} bytes) is not a checkpoint of train.py. If another "
            f"program wrote it, convert it: python -m lab.convert {path} ckpt.pt --geometry ... "
            f"({describe_error(error)})") from None
    return checkpoint

def load_model(path):
    """Path of a checkpoint by train.py or lab/convert.py -> CLIP on the CPU, in eval mode, with the
    flags of its training as `train_config`. Raises ValueError."""
    checkpoint = load_checkpoint(path)
    try:
        model = CLIP(Config(**checkpoint["config"]))  # a newer version may have more fields
        model.load_state_dict(checkpoint["state_dict"])
    except Exception as error:  # a file may contain anything under these names
        raise ValueError(f"{path}: {describe_error(error)}") from None
    model.train_config = checkpoint["train_config"]
    return model.eval()

def describe_error(error):
    text = " ".join(re.sub(r"\x1b\[\d+m", "", str(error)).split())  # without torch's bold print
    return f"{type(error).__name__}: {text.partition('. ')[0]:.300}"  # without torch's advice
