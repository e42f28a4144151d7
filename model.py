"""Two towers and a loss: the Vision Transformer, the text transformer, and CLIP, which holds them together.

    model = CLIP(Config(**PRESETS["tiny"], geometry="euclidean"))
    image = model.encode_image(images)      # uint8 (N, 3, H, W)  -> embeddings (N, D)
    text = model.encode_text(tokens)        # int64 (N, T)        -> embeddings (N, D)
    model(images, tokens)["loss"].backward()
    model = load_model("out/ckpt.pt")       # ours, or one that open_clip trained

    python model.py out/ckpt.pt open_clip.pt    # our checkpoint in open_clip's layout

The towers give *features*; the geometry projects them to *embeddings*, which the loss, the evaluation and every file mean. The towers
may run in bfloat16; from the geometry's projection on everything is float32 (float64 after `.double()`).

Architecture, names and initial values are open_clip's, so its weights load: what a parameter is called here is what open_clip calls it,
but for the prefix `text.` and three scalars (`FOREIGN_NAMES`).

Axes: N, M samples, T tokens, C tower width, H heads, D embedding width, R real (unpadded) tokens of a batch.
"""

import math
import re
import sys
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import geometry as geo


@dataclass
class Config:
    """All that a model is, beside its weights: plain values, saved in every checkpoint."""
    image_size: int                          # pictures are squares of this many pixels
    patch_size: int
    vision_width: int
    vision_layers: int
    text_width: int
    text_layers: int
    embed_dim: int                           # D
    vocab_size: int                          # start token V - 2, end token V - 1, padding 0 after the end
    tokenizer: str                           # which one made the vocabulary; see data.tokenize
    context_length: int = 77
    vision_heads: Optional[int] = None       # None: width / 64
    text_heads: Optional[int] = None
    geometry: str = "euclidean"
    logit: Optional[str] = None              # None: the geometry's default, like the next two
    final_ln: Optional[bool] = None
    init_logit_scale: Optional[float] = None # log space
    max_logit_scale: float = 100.0           # the factor itself. CLIP: beyond 100 training became unstable
    quick_gelu: bool = False                 # OpenAI's own weights


PRESETS = {   # rows of a table: what --model chooses. An embedding is as wide as the text tower, as in CLIP
    "tiny":     dict(image_size=64,  patch_size=8,  vision_width=64,   vision_layers=3,  text_width=64,  text_layers=2,  embed_dim=128),
    "ViT-S-16": dict(image_size=224, patch_size=16, vision_width=384,  vision_layers=12, text_width=384, text_layers=12, embed_dim=384),
    "ViT-B-32": dict(image_size=224, patch_size=32, vision_width=768,  vision_layers=12, text_width=512, text_layers=12, embed_dim=512),
    "ViT-B-16": dict(image_size=224, patch_size=16, vision_width=768,  vision_layers=12, text_width=512, text_layers=12, embed_dim=512),
    "ViT-L-14": dict(image_size=224, patch_size=14, vision_width=1024, vision_layers=24, text_width=768, text_layers=12, embed_dim=768),
}
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)   # CLIP's
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


# ---------------------------------------------------------------------------------------------------------------------------------
# distribution: three words that mean nothing on one process

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


class Gather(torch.autograd.Function):
    """(N, D) of every process -> (world N, D) on every process. Each process computes its own loss from the gathered rows, so the
    gradient of a row is the sum of what all processes ask of it."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)   # autograd's own tensor must not be summed in place
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


@torch.compiler.disable   # a collective is a border between compiled graphs
def gather(x):
    return Gather.apply(x) if world_size() > 1 else x


# ---------------------------------------------------------------------------------------------------------------------------------
# the transformer that both towers share

class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Packing(NamedTuple):
    """Captions average a dozen tokens of 77. Dense layers see the real tokens only, as (R, C); attention alone needs rows and columns
    of captions, (N, T, C). Exact: attention is causal, so what stands after the end token is never looked at."""
    real: torch.Tensor    # bool (N, T): up to and including each end token, which is also what that looks at
    index: torch.Tensor   # (R,) flat positions in (N, T) of the tokens that are computed

    def pad(self, x):     # (R, C) -> (N, T, C)
        return x.new_zeros(self.real.numel(), x.shape[1]).index_copy(0, self.index, x).view(*self.real.shape, -1)

    def pack(self, x):    # (N, T, C) -> (R, C)
        return x.flatten(0, 1).index_select(0, self.index)


def pick(x, rows):
    """Rows (N,) of x (..., C), flattened -> (N, C)."""
    return x.flatten(0, -2).index_select(0, rows)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))   # q, k, v
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, packing=None, rows=None):
        """x (N, T, C), or (R, C) with a packing -> the same shape; with `rows` (N,), one row of flattened x per sample -> those, (N, C)."""
        w, b, C = self.in_proj_weight, self.in_proj_bias, x.shape[-1]
        if rows is not None:
            q = F.linear(pick(x, rows), w[:C], b[:C]).unflatten(1, (self.heads, 1, -1))   # (N, H, 1, C/H)
            kv = F.linear(x, w[C:], b[C:])
            kv = packing.pad(kv) if packing else kv                                  # (N, T, 2C)
            k, v = kv.unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)       # (N, H, T, C/H) each
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=packing.real[:, None, None] if packing else None)
            return self.out_proj(y.flatten(1))
        qkv = F.linear(x, w, b)
        qkv = packing.pad(qkv) if packing else qkv                                   # (N, T, 3C)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)       # (N, H, T, C/H) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=packing is not None)   # text looks back only
        y = y.transpose(1, 2).flatten(2)                                             # (N, T, C)
        return self.out_proj(packing.pack(y) if packing else y)


class Block(nn.Module):
    def __init__(self, width, heads, quick_gelu):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU() if quick_gelu else nn.GELU(),
                                      c_proj=nn.Linear(4 * width, width)))

    def forward(self, x, packing=None, rows=None):
        y = self.attn(self.ln_1(x), packing, rows)
        x = y + (x if rows is None else pick(x, rows))
        return x + self.mlp.c_proj(self.mlp.gelu(self.mlp.c_fc(self.ln_2(x))))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, quick_gelu):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, quick_gelu) for _ in range(layers))

    def forward(self, x, rows, packing=None):
        """Only one row per sample, `rows` (N,) of flattened x, is read in the end: the last block computes no other -> (N, C)."""
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x, packing)
        return last(x, packing, rows)


class VisionTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.vision_width
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + (config.image_size // config.patch_size) ** 2, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, config.vision_heads or width // 64, config.quick_gelu)
        self.ln_post = nn.LayerNorm(width) if config.final_ln else nn.Identity()
        self.proj = nn.Parameter(torch.empty(width, config.embed_dim))

    def forward(self, images):                                                       # (N, 3, H, W), normalised
        x = self.conv1(images).flatten(2).transpose(1, 2)                            # (N, patches, C), row by row
        x = torch.cat([self.class_embedding.to(x).expand(len(x), 1, -1), x], dim=1)  # (N, T, C)
        rows = torch.arange(len(x), device=x.device) * x.shape[1]                    # of the class tokens
        x = self.transformer(self.ln_pre(x + self.positional_embedding), rows)       # (N, C)
        return self.ln_post(x) @ self.proj                                           # (N, D)


class TextTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.text_width
        self.end = config.vocab_size - 1
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.transformer = Transformer(width, config.text_layers, config.text_heads or width // 64, config.quick_gelu)
        self.ln_final = nn.LayerNorm(width) if config.final_ln else nn.Identity()
        self.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))

    def forward(self, tokens, index=None):                                           # (N, T)
        N, T = tokens.shape
        real = real_tokens(tokens, self.end)                                         # (N, T)
        index = real.flatten().nonzero().squeeze(1) if index is None else index      # nonzero makes a GPU wait; the loop passes index
        # F.embedding for both tables: the backward of table[index] is not reproducible with two threads
        x = self.token_embedding(tokens.flatten().index_select(0, index)) + F.embedding(index % T, self.positional_embedding)
        ends = torch.arange(N, device=tokens.device) * T + real.sum(1) - 1           # flat position of each end token
        x = self.transformer(x, torch.searchsorted(index, ends), Packing(real, index))   # (N, C)
        return self.ln_final(x) @ self.text_projection                               # (N, D)


def any_length(tokens, index):
    """Tell torch.compile that the number of tokens changes from batch to batch; or it would compile anew for each."""
    torch._dynamo.mark_dynamic(tokens, 1)
    torch._dynamo.mark_dynamic(index, 0)


def real_tokens(tokens, end):
    """(N, T) -> bool (N, T): true up to and including the first end token. Not `tokens != 0`: 0 is a word too."""
    is_end = tokens == end
    return is_end.cumsum(1) == is_end


# ---------------------------------------------------------------------------------------------------------------------------------
# initial values: open_clip's, all in one place. None: what PyTorch gives a Linear or Conv2d, U(+-1/sqrt(fan_in)).

def normal(std):
    return lambda p: nn.init.normal_(p, std=std)


def initial_values(config):
    """(pattern, initialiser) in order; the first pattern that matches a parameter's whole name counts. Only the text tower follows
    OpenAI's rule: open_clip leaves the vision tower's layers at PyTorch's defaults."""
    w, t, L = config.vision_width, config.text_width, config.text_layers
    return [
        (r".*ln_\w+\.weight", nn.init.ones_),
        (r".*ln_\w+\.bias|.*(in_proj_|out_proj\.)bias", nn.init.zeros_),
        (r"visual\.(class_embedding|positional_embedding|proj)", normal(w ** -0.5)),
        (r"visual\..*in_proj_weight", nn.init.xavier_uniform_),
        (r"text\.token_embedding\.weight", normal(0.02)),
        (r"text\.positional_embedding", normal(0.01)),
        (r"text\..*in_proj_weight|text\.text_projection", normal(t ** -0.5)),
        (r"text\..*(out_proj|c_proj)\.weight", normal(t ** -0.5 * (2 * L) ** -0.5)),
        (r"text\..*c_fc\.weight", normal((2 * t) ** -0.5)),
        (r".*(conv1|c_fc|c_proj|out_proj)\.(weight|bias)", None),
    ]


# ---------------------------------------------------------------------------------------------------------------------------------
# CLIP

class CrossEntropy(torch.autograd.Function):
    """logits (N, M), row i matching column first + i -> mean over the rows of log-sum-exp minus the matching logit. The derivative is
    softmax minus one-hot, made here when it is needed, in place: F.cross_entropy keeps a matrix of probabilities from the forward pass."""

    @staticmethod
    def forward(ctx, logits, first):
        lse = logits.logsumexp(1, keepdim=True)
        ctx.save_for_backward(logits, lse)
        ctx.first = first
        return lse.mean() - logits.diagonal(first).mean()

    @staticmethod
    def backward(ctx, grad):
        logits, lse = ctx.saved_tensors
        p = (logits - lse).exp_()
        p.diagonal(ctx.first).sub_(1)
        return p.mul_(grad / len(p)), None


def contrastive_loss(image_logits, text_logits, first=0):
    """Cross entropy of N images among M texts and of N texts among M images, (N, M) each, averaged; row i matches column first + i."""
    return (CrossEntropy.apply(image_logits, first) + CrossEntropy.apply(text_logits, first)) / 2


class CLIP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.row, self.logit = geo.find(config.geometry, config.logit)
        final_ln = self.row.final_ln if config.final_ln is None else config.final_ln
        self.config, self.recipe = replace(config, logit=self.logit, final_ln=final_ln), {}   # no default is left open
        self.visual = VisionTower(self.config)
        self.text = TextTower(self.config)
        table = initial_values(config)
        for name, p in self.named_parameters():
            fill = next(fill for pattern, fill in table if re.fullmatch(pattern, name))
            if fill:
                fill(p)
        start = self.row.logits[self.logit].scale if config.init_logit_scale is None else config.init_logit_scale
        self.logit_scale = nn.Parameter(torch.tensor(float(start)))   # log space
        for name, scalar in self.row.scalars.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(scalar.start(config.embed_dim))))
        self.register_buffer("image_mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)

    def encode_image(self, images):
        """images (N, 3, H, W): uint8, normalised here, or float, normalised already -> embeddings (N, D)."""
        if images.dtype == torch.uint8:
            images = (images.to(self.image_mean) / 255 - self.image_mean) / self.image_std
        return geo.project(self.visual(images), self.config.geometry, getattr(self, "alpha_image", None))

    def encode_text(self, tokens, index=None):
        """tokens (N, T) int64, T <= context_length, padded after the end token -> embeddings (N, D). `index` (R,): flat positions of
        the real tokens in (N, T) where the caller knows them (data.Batches)."""
        return geo.project(self.text(tokens, index), self.config.geometry, getattr(self, "alpha_text", None))

    def curvature(self):
        return self.log_curv.exp() if hasattr(self, "log_curv") else 1.0

    def similarity(self, x, y):
        """embeddings x (N, D), y (M, D) -> (N, M) by this model's geometry and logit, before the logit scale: larger = closer."""
        return geo.similarity(x, y, self.config.geometry, self.logit, self.curvature())

    def forward(self, images, tokens, index=None, entailment_weight=0.0, min_radius=0.1, cached=None):
        """images (N, 3, H, W), tokens (N, T): this process's share of the batch -> what `losses` returns.

        cached: gradients of the loss with respect to both embeddings, (N, D) each, from a pass over a larger batch -> a stand-in for the
        loss, whose backward pass hands them on to the towers (train.py, --micro_batch).
        """
        image, text = self.encode_image(images), self.encode_text(tokens, index)
        if cached is None:
            return self.losses(image, text, entailment_weight, min_radius)
        scalars = [self.logit_scale, *(getattr(self, name) for name in self.row.scalars)]   # all take part, as DistributedDataParallel expects
        return (image * cached[0]).sum() + (text * cached[1]).sum() + 0 * sum(scalars)

    def losses(self, image, text, entailment_weight=0.0, min_radius=0.1):
        """Matching embeddings image, text (N, D) -> dict of 0-d tensors, means over this process's rows:

        loss        contrastive + entailment_weight * entailment
        contrastive cross entropy of each image among all texts and of each text among all images of all processes, averaged
        entailment  mean angle (rad) by which images are outside the cones of their texts, before its weight; without cones: absent
        inside      share of images inside the cone of their text; without cones: absent
        text_radius, image_radius   mean distance from the root (clip: from the mean embedding of the batch)

        The mean over processes of `loss`, and of every gradient (as DDP takes it), is that of one process with the whole batch.
        """
        all_image, all_text = gather(image), gather(text)                            # (M, D), M = N * processes
        scale = self.logit_scale.exp()
        image_logits = scale * self.similarity(image, all_text)                      # (N, M)
        text_logits = image_logits.T if all_text is text else scale * self.similarity(text, all_image)
        contrastive = contrastive_loss(image_logits, text_logits, rank() * len(image))
        out = dict(loss=contrastive, contrastive=contrastive.detach())
        if self.row.cone or entailment_weight > 0:   # which the sphere refuses
            with torch.set_grad_enabled(torch.is_grad_enabled() and entailment_weight > 0):
                outside = geo.entailment_loss(text, image, self.config.geometry, min_radius, self.curvature())
            if entailment_weight > 0:
                out["loss"] = contrastive + entailment_weight * outside.mean()
            out.update(entailment=outside.detach().mean(), inside=(outside.detach() == 0).to(outside.dtype).mean())
        with torch.no_grad():
            root = self.row.root(torch.cat([all_image, all_text]))
            for name, x in ("text_radius", text), ("image_radius", image):
                out[name] = geo.distance_to_root(x, self.config.geometry, root).mean()
        return out

    @torch.no_grad()
    def clamp_scalars(self):
        """Bring the learned scalars back into their ranges; called after every optimizer step. logit_scale has no lower bound: the
        authors clamp at 0, which turns their start of -1 (squared logits with entailment) into 0 after one step."""
        self.logit_scale.clamp_(max=math.log(self.config.max_logit_scale))
        for name, scalar in self.row.scalars.items():
            getattr(self, name).clamp_(scalar.low, scalar.high)

    def pinned_scalars(self):
        """Names of the learned scalars that stand at a bound of their range."""
        bounds = dict(logit_scale=(-math.inf, math.log(self.config.max_logit_scale)), **{k: (s.low, s.high) for k, s in self.row.scalars.items()})
        return [name for name, ends in bounds.items() if any(math.isclose(getattr(self, name).item(), end, abs_tol=1e-6) for end in ends)]


# ---------------------------------------------------------------------------------------------------------------------------------
# checkpoints: ours, and open_clip's

FOREIGN_NAMES = {"alpha_img": "alpha_image", "alpha_txt": "alpha_text", "curvature": "log_curv"}   # theirs -> ours


def read_checkpoint(path):
    """A file -> what was saved in it. Never runs code from the file. Raises ValueError with path, size and what was expected."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read checkpoint {path}: {error.strerror or error}") from None
    except Exception as error:   # torch.load has no base class for what a broken file can raise
        raise ValueError(f"{path} ({size:,} bytes) is no checkpoint of tensors and plain values as train.py or open_clip save it: "
                         f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} ({size:,} bytes) holds a {type(checkpoint).__name__}; expected a checkpoint or a state dict")
    return checkpoint


def load_model(path, **overrides):
    """A checkpoint file -> CLIP in eval mode, on the CPU.

    Our own need no override. open_clip's ({"state_dict": ...} or a bare state dict, prefixes `module.` and `_orig_mod.` accepted) give
    all sizes by their shapes; `geometry` has to be told where the file cannot (clip or euclidean), head counts are width / 64 unless
    told. Overrides: geometry, logit, quick_gelu, vision_heads, text_heads, tokenizer. Raises ValueError naming the key or file at fault.
    """
    checkpoint = read_checkpoint(path)
    overrides = {k: v for k, v in overrides.items() if v is not None}
    if "model_config" in checkpoint:
        known = {f.name for f in fields(Config)}
        config, weights = Config(**{k: v for k, v in checkpoint["model_config"].items() if k in known}), checkpoint["model"]
    else:
        weights = native_names(checkpoint.get("state_dict", checkpoint))
        config = infer_config(weights, path, **overrides)
    model = CLIP(config)
    for key, value in overrides.items():   # of a foreign file they are what the model was just built with
        if getattr(model.config, key) != value:
            raise ValueError(f"{path} was trained with {key} {getattr(model.config, key)!r}, not {value!r}")
    check_keys(model, weights, path)
    model.load_state_dict(weights)
    model.clamp_scalars()   # the authors clamp the curvature as they read it
    model.recipe = checkpoint.get("train_config", {})   # the flags it was trained with; a foreign file has none
    return model.eval()


def native_names(weights):
    """open_clip's parameter names -> ours; names that are ours already stay."""
    renamed = {}
    for key, value in weights.items():
        key = re.sub(r"^(module\.|_orig_mod\.)+", "", str(key))
        if re.match(r"(positional_embedding|text_projection|token_embedding|transformer|ln_final)\b", key):
            key = "text." + key
        renamed[FOREIGN_NAMES.get(key, key)] = value
    return renamed


def infer_config(weights, path, geometry=None, tokenizer="clip", **overrides):
    """Read every size off the shapes of a state dict in our names."""
    try:
        shape = {k: tuple(v.shape) for k, v in weights.items()}
        layers = {t: 1 + max(int(k.split(".")[3]) for k in shape if k.startswith(f"{t}.transformer.resblocks.")) for t in ("visual", "text")}
        width, _, patch, _ = shape["visual.conv1.weight"]
        vocab, text_width = shape["text.token_embedding.weight"]
        grid = math.isqrt(shape["visual.positional_embedding"][0] - 1)
        sizes = dict(image_size=grid * patch, patch_size=patch, vision_width=width, vision_layers=layers["visual"], text_width=text_width,
                     text_layers=layers["text"], embed_dim=shape["visual.proj"][1], vocab_size=vocab,
                     context_length=shape["text.positional_embedding"][0])
    except (KeyError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is not a CLIP with a ViT and a text transformer in open_clip's layout: cannot read {error}") from None
    if geometry is None and "log_curv" in weights:
        geometry = "hyperbolic"
    if geometry is None:
        raise ValueError(f"{path} does not say which geometry it was trained in; give --geometry clip or --geometry euclidean")
    return Config(**sizes, geometry=geometry, tokenizer=tokenizer, final_ln="visual.ln_post.weight" in weights, **overrides)


def check_keys(model, weights, path):
    """Refuse missing keys, left-over keys and wrong shapes by name."""
    ours, theirs = ({k: tuple(v.shape) for k, v in d.items()} for d in (model.state_dict(), weights))
    faults = [f"missing {k}" for k in ours if k not in theirs] + [f"left over {k}" for k in theirs if k not in ours]
    faults += [f"{k} has shape {theirs[k]}, not {ours[k]}" for k in ours if k in theirs and ours[k] != theirs[k]]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{path} does not fit a {model.config.geometry} model of its size: {'; '.join(faults[:5])}{more}")


def export(source, target):
    """Write a checkpoint in open_clip's layout, so that its tools can read what was trained here."""
    model = load_model(source)
    theirs = {ours: name for name, ours in FOREIGN_NAMES.items()}
    weights = {theirs.get(key, key.removeprefix("text.")): value for key, value in model.state_dict().items()}
    torch.save(dict(epoch=0, name="nanoEuCLIP", state_dict=weights), target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("python model.py out/ckpt.pt open_clip.pt: write our checkpoint in open_clip's layout")
    try:
        export(*sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"model.py: {error}", file=sys.stderr)
        sys.exit(2)
