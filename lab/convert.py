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
from dataclasses import asdict

import numpy as np
import torch

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
        if "TorchScript" in str(error):
            load = f"torch.save(torch.jit.load({str(path)!r}, 'cpu').state_dict(), 'weights.pt')"
            raise ValueError(f"{path} is a TorchScript archive, which is a program. If you trust "
                             f"it, extract its weights: import torch; {load}") from None
        raise ValueError(f"{path} ({os.path.getsize(path):,} bytes) is not a file of tensors and "
                         f"plain values ({describe_error(error)})") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} contains a {type(checkpoint).__name__}, not a dict of weights")
    if "train_config" in checkpoint:
        raise ValueError(f"{path} is already a checkpoint of this project")
    weights = checkpoint.get("state_dict")
    weights = weights if isinstance(weights, dict) else checkpoint
    names = {name: re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)) for name in weights}
    for beginning, what in NOT_OURS.items():
        if any(name.startswith(beginning) for name in names.values()):
            raise ValueError(f"{path} is {what}")
    return {new: weights[old] for old, new in names.items() if new not in NOT_WEIGHTS}


def infer_config(weights, geometry=None, logit=None, tokenizer="clip", quick_gelu=False,
                 vision_heads=None, text_heads=None):
    """Weights under open_clip's names -> Config. Raises ValueError if they do not determine it."""
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
    if os.path.exists(target):
        raise ValueError(f"{target} already exists")
    weights = load_weights(source)
    try:
        settings = geometry, logit, tokenizer, quick_gelu, vision_heads, text_heads
        model = CLIP(infer_config(weights, *settings))
        model.load_state_dict(weights)
    except Exception as error:  # a file may contain anything under any name
        raise ValueError(f"{source}: {' '.join(str(error).split()):.600}") from None
    model.clamp_scalars()  # the authors clamp the curvature only where they use it
    checkpoint = {"state_dict": model.state_dict(), "config": asdict(model.config)}
    temporary = f"{target}.tmp"
    torch.save(checkpoint | {"train_config": {}}, temporary)
    os.replace(temporary, target)
    return model.config


def main():
    parser = evaluate.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
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
        evaluate.end(f"convert.py: {error}")
    print(f"{args.target}: {c.geometry}/{c.logit}, images of {c.image_size}, embeddings of "
          f"{c.embed_dim}, tokenizer {c.tokenizer}; evaluate it with evaluate.py")


if __name__ == "__main__":
    main()
