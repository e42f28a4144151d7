"""Converts a third-party checkpoint, once, into one that evaluate.py and train.py --init_from read.

    python -m lab.convert ViT-B-16-EuCLIP.pt euclip.pt --geometry euclidean
    python -m lab.convert ViT-B-32.pt clip.pt --geometry clip --quick_gelu

It reads checkpoints of open_clip and of the paper's authors, and OpenAI's state dicts. The shapes
of the weights determine the sizes. What a file does not store has to be given: the geometry (unless
it is hyperbolic), and the number of heads where width / 64 is not known to be right.
"""

import argparse
import math
import os
import re
import warnings
from contextlib import suppress
from dataclasses import asdict

import numpy as np
import torch

import data
import evaluate
from model import CLIP, Config, describe_error

# What a file may contain beside tensors: argparse's flags, and numpy's numbers with their types
DTYPES = [type(np.dtype(code)) for code in "?bBhHiIlLefd"]  # bool, integers, floats
UNPICKLE_NUMBER = np.float64(0).__reduce__()[0]
PLAIN_VALUES = [argparse.Namespace, np.dtype, UNPICKLE_NUMBER, *DTYPES]
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # in OpenAI's files
NOT_OURS = {  # the beginning of a parameter's name: what such a file is
    "visual.layer1": "a ResNet; only Vision Transformers can be converted",
    "vision_model": "in the layout of Hugging Face; convert it to that of open_clip",
    "model.": "wrapped by Lightning; remove 'model.' from the names of its parameters",
}
CLIP_VOCAB_SIZE = 49408  # known here, so that converting does not fetch the vocabulary
HEADS_64 = (64, 128, 192, 256, 384, 512, 640, 768, 896, 1024)  # widths with 64 channels per head


def load_weights(path):
    """Path -> {name: tensor} under open_clip's names. Cannot execute code. Raises ValueError."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}")
    try:
        with torch.serialization.safe_globals(PLAIN_VALUES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TorchScript, which is refused below
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise almost any exception
        raise ValueError(f"{path} {describe_unreadable(path, error)}") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} contains a {type(checkpoint).__name__}, not a dict of weights")
    if {"config", "train_config"} <= checkpoint.keys():
        raise ValueError(f"{path} is a checkpoint of this project: there is nothing to convert")
    weights = checkpoint.get("state_dict")
    weights = weights if isinstance(weights, dict) else checkpoint
    if isinstance(weights.get("model"), dict):
        raise ValueError(f"{path} stores its weights under 'model'; store them under 'state_dict'")
    names = {name: re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)) for name in weights}
    for beginning, what in NOT_OURS.items():
        if any(name.startswith(beginning) for name in names.values()):
            raise ValueError(f"{path} is {what}")
    if len(set(names.values())) < len(names):
        raise ValueError(f"{path} contains a parameter twice, with and without a prefix")
    return {new: weights[old] for old, new in names.items()}


def describe_unreadable(path, error):
    """What a file is that torch.load has refused, after the words "The file"."""
    if "TorchScript" in str(error):
        return ("is a TorchScript archive, which is a program. If you trust it, convert it:\n"
                f"    model = torch.jit.load({str(path)!r}, map_location='cpu')\n"
                "    torch.save(model.state_dict(), 'weights.pt')")
    objects = re.search(r"GLOBAL (\S+)", str(error))
    if objects:
        kind = "numpy arrays" if "multiarray" in objects[1] else f"objects ({objects[1]:.60})"
        return f"contains {kind}, not only tensors and plain values; save its state_dict() alone"
    with open(path, "rb") as file:
        if file.read(9)[8:] == b"{":  # after the length of its JSON header
            return "is a safetensors file; load it with safetensors and torch.save its weights"
    return (f"({os.path.getsize(path):,} bytes) is not a file of tensors and plain values "
            f"({describe_error(error)})")


def infer_config(weights, geometry=None, logit=None, tokenizer="clip", quick_gelu=False,
                 vision_heads=None, text_heads=None):
    """Weights under open_clip's names -> Config. Raises ValueError if they do not determine it."""
    for name, value in weights.items():
        if not (torch.is_tensor(value) and value.is_floating_point()):
            kind = value.dtype if torch.is_tensor(value) else type(value).__name__
            raise ValueError(f"its entry {name!r:.60} has the type {kind}, not float")
    try:
        vision_width = len(weights["visual.transformer.resblocks.0.ln_1.weight"])
        text_width = len(weights["transformer.resblocks.0.ln_1.weight"])
        patch_size = weights["visual.conv1.weight"].shape[3]
        grid = math.isqrt(len(weights["visual.positional_embedding"]) - 1)
        vocab_size = len(weights["token_embedding.weight"])
        context_length = len(weights["positional_embedding"])
        embed_dim = weights["visual.proj"].shape[1]
    except (LookupError, ValueError, TypeError):
        found = ", ".join(f"{name!r:.60}" for name in list(weights)[:4])
        raise ValueError(f"it has no ViT CLIP in open_clip's layout, but {found}") from None
    stored = "hyperbolic" if "curvature" in weights else None
    if not (geometry or stored):
        raise ValueError("it does not store its geometry; add --geometry clip or euclidean")
    if (geometry == "hyperbolic") != (stored == "hyperbolic") and geometry:
        raise ValueError(f"it is {'' if stored else 'not '}hyperbolic; change --geometry")
    for tower, width, heads in (("vision", vision_width, vision_heads),
                                ("text", text_width, text_heads)):
        if heads is None and width not in HEADS_64:
            raise ValueError(f"width {width} has an unknown number of heads; add --{tower}_heads")
        if heads is not None and (heads < 1 or width % heads):
            raise ValueError(f"{heads} heads do not divide width {width}; change --{tower}_heads")
    expected = CLIP_VOCAB_SIZE if tokenizer == "clip" else data.vocab_size(tokenizer)
    if vocab_size != expected:
        raise ValueError(f"its vocabulary has {vocab_size} tokens, but that of tokenizer "
                         f"{tokenizer} has {expected}; change --tokenizer")
    blocks = [name for name in weights if name.endswith(".ln_1.weight")]
    vision_layers = sum(name.startswith("visual.") for name in blocks)
    return Config(
        grid * patch_size, patch_size, vision_width, vision_layers, text_width,
        len(blocks) - vision_layers, embed_dim, vocab_size, tokenizer, context_length,
        vision_heads, text_heads, geometry or stored, logit,
        final_ln="ln_final.weight" in weights, quick_gelu=quick_gelu,
    )


def convert(source, target, geometry=None, logit=None, tokenizer="clip", quick_gelu=False,
            vision_heads=None, text_heads=None):
    """Write the model of the file `source` to the file `target` -> its Config. Raises ValueError
    if the target exists, or if the source is not a ViT CLIP in open_clip's layout."""
    if os.path.lexists(target):
        raise ValueError(f"{target} already exists")
    weights = load_weights(source)
    if "input_resolution" in weights and not quick_gelu:
        print("The file has OpenAI's layout. OpenAI's own weights need --quick_gelu.")
    weights = {name: value for name, value in weights.items() if name not in NOT_WEIGHTS}
    try:
        settings = geometry, logit, tokenizer, quick_gelu, vision_heads, text_heads
        model = CLIP(infer_config(weights, *settings))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # missing, additional and misshapen parameters
        raise ValueError(f"{source}: {describe_error(error)}") from None
    model.clamp_scalars()  # the authors clamp the curvature only where they use it
    checkpoint = {"state_dict": model.state_dict(), "config": asdict(model.config)}
    checkpoint["train_config"] = {}
    temporary = f"{target}.{os.getpid()}.tmp"
    try:
        with open(temporary, "xb") as file:
            torch.save(checkpoint, file)
        os.replace(temporary, target)
    except (RuntimeError, OSError) as error:  # torch raises RuntimeError if the disk is full
        with suppress(OSError):
            os.remove(temporary)
        raise OSError(f"cannot write {target}: {describe_error(error)}") from None
    return model.config


def main():
    parser = evaluate.Parser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("source", metavar="IN", help="a third-party checkpoint")
    parser.add_argument("target", metavar="OUT", help="the checkpoint to write")
    parser.add_argument("--geometry", help="clip, euclidean or hyperbolic")
    parser.add_argument("--logit", help="default: the geometry's first")
    parser.add_argument("--tokenizer", default="clip", help="default: clip")
    parser.add_argument("--quick_gelu", action="store_true", help="for OpenAI's own weights")
    parser.add_argument("--vision_heads", type=int, help="default: width / 64")
    parser.add_argument("--text_heads", type=int, help="default: width / 64")
    args = parser.parse_args()
    try:
        c = convert(**vars(args))
    except (ValueError, OSError) as error:
        printable = (c for c in str(error) if c.isprintable() or c == "\n")
        evaluate.end(f"convert.py: {''.join(printable)}")
    data.say(f"{args.target}: {c.geometry}/{c.logit}, ViT {c.vision_width} x {c.vision_layers} "
             f"on {c.image_size} px / {c.patch_size}, text {c.text_width} x {c.text_layers}, "
             f"embeddings {c.embed_dim}, tokenizer {c.tokenizer}. Next: python evaluate.py "
             f"{args.target} --val_data SOURCE")


if __name__ == "__main__":
    main()
