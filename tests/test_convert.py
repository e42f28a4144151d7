"""lab/convert.py: third-party checkpoints become ours, or are refused by what they are."""

import argparse
import os
import pickle
import re
import struct
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from common import Malicious, ROOT, data, small, small_batch, status_of
from lab.convert import convert, main

from geometry import GEOMETRIES
from model import load_model

HEADS = {"vision_heads": 2, "text_heads": 2}  # of `small`; third-party checkpoints lack them
GIVEN = HEADS | {"geometry": "clip", "tokenizer": "bytes"}


def same_embeddings(a, b):
    """Bit for bit."""
    images, tokens = small_batch()
    images_agree = torch.equal(a.encode_image(images), b.encode_image(images))
    return images_agree and torch.equal(a.encode_text(tokens), b.encode_text(tokens))


def converted(folder, content, **settings):
    """-> what load_model makes of the converted file, whose content is saved first."""
    torch.save(content, folder / "theirs.pt")
    (folder / "ours.pt").unlink(missing_ok=True)
    convert(folder / "theirs.pt", folder / "ours.pt", **(GIVEN | settings))
    return load_model(folder / "ours.pt")


def refusal(path, content=None, **settings):
    """-> the message with which convert refuses the file, whose content is saved first."""
    if content is not None:
        torch.save(content, path)
    target = path.parent / "ours.pt"
    with pytest.raises(ValueError) as error:
        convert(path, target, **(GIVEN | settings))
    message = str(error.value)
    assert str(path) in message and "\x1b" not in message
    assert len(message) < 700 + len(str(path))
    assert not list(path.parent.glob("ours.pt*"))
    return message


# checkpoints that are converted


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_weights_with_and_without_prefixes_convert_to_the_same_model(tmp_path, geometry):
    model = small(geometry)
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
        weights = {prefix + name: value for name, value in model.state_dict().items()}
        for content in ({"epoch": 3, "optimizer": {}, "state_dict": weights}, weights):
            ours = converted(tmp_path, content, geometry=geometry)
            assert not ours.training and ours.train_config == {}
            assert ours.config == model.config
            assert same_embeddings(ours, model)


def test_a_file_with_a_curvature_is_hyperbolic(tmp_path):
    weights = small("hyperbolic").state_dict()
    assert converted(tmp_path, weights, geometry=None).config.geometry == "hyperbolic"


@pytest.mark.parametrize("logit", GEOMETRIES["euclidean"].logits)
def test_the_logit_is_stored(tmp_path, logit):
    weights = small("euclidean").state_dict()
    ours = converted(tmp_path, weights, geometry="euclidean", logit=logit)
    assert ours.config.logit == logit


def theirs_with(**more):
    """A file's content in open_clip's layout, and more beside or among the weights."""
    weights = OrderedDict(small("clip").state_dict())
    extra = more.pop("weights", {})
    return {"state_dict": weights | extra} | more


OPENAIS = {"input_resolution": torch.tensor(16), "context_length": torch.tensor(24),
           "vocab_size": torch.tensor(258)}
FINE = {
    "OpenAI's three sizes": theirs_with(weights=OPENAIS)["state_dict"],
    "causal mask": theirs_with(weights={"attn_mask": torch.zeros(24, 24)}),
    "numpy scalars": theirs_with(best=np.float64(0.5), epoch=np.int64(3), on=np.bool_(True)),
    "argparse": theirs_with(args=argparse.Namespace(lr=0.1, name="run")),
    "moving average": theirs_with(state_dict_ema=small("clip", seed=1).state_dict()),
    "logit scale (1,)": theirs_with(weights={"logit_scale": small("clip").logit_scale[None]}),
    "another trainer's config": theirs_with(config={"lr": 0.1}),
}


@pytest.mark.parametrize("kind", FINE)
def test_what_other_trainers_store_beside_the_weights_does_no_harm(tmp_path, kind):
    assert same_embeddings(converted(tmp_path, FINE[kind]), small("clip"))


def test_half_precision_and_pytorchs_old_file_format_become_float32(tmp_path):
    weights = {name: value.half() for name, value in small("clip").state_dict().items()}
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    convert(tmp_path / "old.pt", tmp_path / "ours.pt", **GIVEN)
    model = load_model(tmp_path / "ours.pt")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.visual.proj, weights["visual.proj"].float())


def test_quick_gelu_has_to_be_given(tmp_path):
    quick = small("clip", quick_gelu=True)
    weights = quick.state_dict()
    assert same_embeddings(converted(tmp_path, weights, quick_gelu=True), quick)
    assert not same_embeddings(converted(tmp_path, weights), quick)


def test_a_curvature_out_of_range_is_clamped(tmp_path):
    for log_curvature, curvature in ((5.0, 10), (-5.0, 0.1)):
        model = small("hyperbolic")
        model.curvature.data.fill_(log_curvature)
        ours = converted(tmp_path, model.state_dict(), geometry="hyperbolic")
        assert ours.scalars()[1].item() == pytest.approx(curvature)


# the authors' code


def golden_error(folder, weights, golden, precision, **settings):
    """-> largest difference between embeddings of the converted weights and the authors'."""
    model = converted(folder, weights, vision_heads=3, text_heads=2, **settings)
    images, tokens = torch.tensor(golden["images"]).float(), torch.tensor(golden["tokens"]).long()
    image = model.encode_image(images) - torch.tensor(golden[f"{precision}/image_features"])
    text = model.encode_text(tokens) - torch.tensor(golden[f"{precision}/text_features"])
    return max(image.abs().max().item(), text.abs().max().item())


def test_embeddings_of_converted_weights_are_those_of_the_authors_code(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "vocab_size", lambda tokenizer: 300)  # no tokenizer has 300
    golden = np.load(ROOT / "tests" / "golden_model.npz")
    keys = [key for key in golden.files if key.startswith("weights/")]
    weights = {key.removeprefix("weights/"): torch.tensor(golden[key]) for key in keys}
    assert golden_error(tmp_path, weights, golden, "f64", geometry=None) < 1e-5
    c = load_model(tmp_path / "ours.pt").config
    assert (c.geometry, c.final_ln, c.image_size, c.patch_size) == ("hyperbolic", True, 32, 8)


FULL_SET = Path(os.environ.get("GOLDEN_DIR", "-")) / "model_public"
FULL_NAMES = ["clip_ln", "clip_noln", "euclidean-squared_ln", "euclidean-squared_noln",
              "hyperbolic_ln", "hyperbolic_noln"]


@pytest.mark.skipif(not FULL_SET.exists(), reason="GOLDEN_DIR names no folder of golden models")
@pytest.mark.parametrize("layout", ["bare", "state_dict", "module."])
@pytest.mark.parametrize("name", FULL_NAMES)
def test_all_golden_models_convert_from_all_layouts(tmp_path, monkeypatch, name, layout):
    monkeypatch.setattr(data, "vocab_size", lambda tokenizer: 300)
    weights = torch.load(FULL_SET / f"{name}.pt", weights_only=True)
    if layout == "module.":
        weights = {f"module.{name}": value for name, value in weights.items()}
    content = weights if layout == "bare" else {"state_dict": weights}
    golden, geometry = np.load(FULL_SET / f"{name}.npz"), re.split("[-_]", name)[0]
    error = golden_error(tmp_path, content, golden, "f32", geometry=geometry)
    print(f"{name} {layout}: {error:.1e}")
    assert error < 1e-5
    assert load_model(tmp_path / "ours.pt").config.final_ln == name.endswith("_ln")


# what has to be given


def skeleton(vision_width=64, text_width=64, blocks=True):
    """The weights that determine the sizes, and no others."""
    w, t = vision_width, text_width
    shapes = {
        "visual.conv1.weight": (w, 3, 8, 8), "visual.positional_embedding": (5, w),
        "visual.proj": (w, 32), "token_embedding.weight": (258, t),
        "positional_embedding": (24, t), "ln_final.weight": (t,),
        "visual.transformer.resblocks.0.ln_1.weight": (w,),
        "transformer.resblocks.0.ln_1.weight": (t,),
    }
    return {n: torch.zeros(shape) for n, shape in shapes.items() if blocks or "blocks" not in n}


@pytest.mark.parametrize("width", [1280, 1408, 1664, 320, 48])
def test_heads_have_to_be_given_where_width_by_64_is_not_known_to_be_right(tmp_path, width):
    for tower in ("vision", "text"):
        weights, heads = skeleton(**{f"{tower}_width": width}), f"{tower}_heads"
        assert f"--{heads}" in refusal(tmp_path / "theirs.pt", weights, **{heads: None})
        message = refusal(tmp_path / "theirs.pt", weights)
        assert "ln_pre" in message and "--" not in message  # only weights are missing


def test_heads_of_common_widths_are_known(tmp_path):
    path, weights = tmp_path / "theirs.pt", skeleton(768, 512)
    message = refusal(path, weights, vision_heads=None, text_heads=None)
    assert "ln_pre" in message and "--" not in message


@pytest.mark.parametrize("heads", [5, 0, -1])
def test_heads_that_do_not_divide_the_width_are_refused(tmp_path, heads):
    for tower in ("vision", "text"):
        message = refusal(tmp_path / "theirs.pt", skeleton(), **{f"{tower}_heads": heads})
        assert f"--{tower}_heads" in message


def test_a_file_that_does_not_store_its_geometry_asks_for_it(tmp_path):
    weights = small("clip").state_dict()
    assert "--geometry" in refusal(tmp_path / "theirs.pt", weights, geometry=None)


def test_a_geometry_that_contradicts_the_file_is_refused(tmp_path):
    for stored, given in (("clip", "hyperbolic"), ("hyperbolic", "clip"),
                          ("hyperbolic", "euclidean"), ("clip", "spherical")):
        message = refusal(tmp_path / "theirs.pt", small(stored).state_dict(), geometry=given)
        assert given in message or "--geometry" in message


def test_a_tokenizer_with_another_vocabulary_is_refused_without_fetching_it(tmp_path, monkeypatch):
    weights = small("clip").state_dict()
    monkeypatch.setattr(data, "clip_tokenizer", None)  # fetching would raise TypeError
    message = refusal(tmp_path / "theirs.pt", weights, tokenizer="clip")
    assert "258" in message and "49408" in message and "--tokenizer" in message
    assert "bytez" in refusal(tmp_path / "theirs.pt", weights, tokenizer="bytez")
    weights["token_embedding.weight"] = torch.zeros(49408, 64)
    assert converted(tmp_path, weights, tokenizer="clip").config.tokenizer == "clip"


# files that are refused


def under(prefix):
    return {prefix + name: value for name, value in small("clip").state_dict().items()}


RESNET = {"visual.conv1.weight": torch.zeros(32, 3, 3, 3),
          "visual.layer1.0.conv1.weight": torch.zeros(8, 8, 1, 1)}
HUGGING_FACE = {"text_model.embeddings.token_embedding.weight": torch.zeros(258, 64),
                "vision_model.embeddings.patch_embedding.weight": torch.zeros(64, 3, 8, 8)}
NUMPY = {name: value.numpy() for name, value in small("clip").state_dict().items()}
OURS = {"state_dict": under(""), "config": asdict(small("clip").config), "train_config": {}}
OTHERS = {
    "ResNet": ("ResNet", {"state_dict": under("") | RESNET}),
    "Lightning": ("Lightning", {"state_dict": under("model.")}),
    "Hugging Face": ("Hugging Face", HUGGING_FACE),
    "under model": ("'model'", {"model": under(""), "optimizer": {}}),
    "numpy arrays": ("numpy arrays", {"state_dict": NUMPY}),
    "ours": ("nothing to convert", OURS),
    "both prefixes": ("twice", under("") | under("module.")),
    "integers": ("int8", {"state_dict": {name: w.char() for name, w in under("").items()}}),
    "no weights": ("open_clip's layout", {"state_dict": {"fc.weight": torch.zeros(3, 3)}}),
    "no names": ("open_clip's layout", {0: torch.zeros(3)}),
    "nothing": ("open_clip's layout", {}),
    "no blocks": ("open_clip's layout", skeleton(blocks=False)),
    "a list": ("list", [torch.zeros(3)]),
    "a tensor": ("Tensor", torch.zeros(3)),
    "a list of weights": ("state_dict", {"state_dict": [torch.zeros(3)], 7: 7}),
    "a whole module": ("torch.nn", nn.Linear(2, 2)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_refused_by_what_they_are_in_one_line(tmp_path, kind):
    key_words, content = OTHERS[kind]
    message = refusal(tmp_path / "theirs.pt", content)
    assert key_words in message and "\n" not in message


CHANGES = {
    "missing": ("visual.ln_pre.bias", None),
    "additional": ("logit_bias", torch.tensor(-10.0)),
    "of another shape": ("visual.class_embedding", torch.ones(3)),
    "not a number": ("logit_scale", "4.6"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, kind):
    name, value = CHANGES[kind]
    weights = small("clip").state_dict() | {name: value}
    weights = {name: value for name, value in weights.items() if value is not None}
    assert name in refusal(tmp_path / "bad.pt", weights)


def safetensors():
    header = b'{"visual.proj": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    return struct.pack("<Q", len(header)) + header + bytes(4)


def test_files_that_are_no_checkpoints_are_refused_with_name_and_size(tmp_path):
    torch.save(under(""), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    contents = [b"", whole[: len(whole) // 2], whole[:-1], b"<html>404</html>" * 99]
    contents.append(pickle.dumps({"state_dict": {}}, protocol=4))
    for content in contents:
        (tmp_path / "bad.pt").write_bytes(content)
        message = refusal(tmp_path / "bad.pt")
        assert f"({len(content):,} bytes)" in message and "\n" not in message
    (tmp_path / "bad.pt").write_bytes(safetensors())
    assert "safetensors" in refusal(tmp_path / "bad.pt")
    assert "no file" in refusal(tmp_path / "nowhere.pt")
    assert "no file" in refusal(tmp_path / "." / tmp_path.name)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_never_executed(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, "evil.pt", _use_new_zipfile_serialization=zipped)
    refusal(Path("evil.pt"))
    assert not Path("executed").exists()
    torch.load("evil.pt", weights_only=False)
    assert Path("executed").exists()  # so convert has prevented it


def as_module(weights):
    """A module tree with these weights and no code."""
    root = nn.Module()
    for name, value in weights.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if not hasattr(node, part):
                node.add_module(part, nn.Module())
            node = getattr(node, part)
        node.register_buffer(last, value)
    return root


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_two_lines_that_convert_a_torchscript_archive_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.script(as_module(FINE["OpenAI's three sizes"])), "archive.pt")
    first, *lines = refusal(Path("archive.pt")).splitlines()
    assert "TorchScript" in first and len(lines) == 2
    exec("\n".join(line.strip() for line in lines), {"torch": torch})
    convert("weights.pt", "ours.pt", **GIVEN)
    assert same_embeddings(load_model("ours.pt"), small("clip"))


# the target


def test_an_existing_target_is_not_overwritten(tmp_path):
    torch.save(under(""), tmp_path / "theirs.pt")
    (tmp_path / "ours.pt").write_text("precious")
    with pytest.raises(ValueError, match="ours.pt already exists"):
        convert(tmp_path / "theirs.pt", tmp_path / "ours.pt", **GIVEN)
    assert (tmp_path / "ours.pt").read_text() == "precious"


def test_a_full_disk_leaves_no_part_of_the_target(tmp_path, monkeypatch):
    def full(checkpoint, file):
        file.write(b"a part of it")
        raise RuntimeError("No space left on device")

    torch.save(under(""), tmp_path / "theirs.pt")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot write .*ours.pt.*No space left"):
        convert(tmp_path / "theirs.pt", tmp_path / "ours.pt", **GIVEN)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.pt"]


# the command


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*args):
        return status_of(main, monkeypatch, *args), *capsys.readouterr()

    return run


def test_the_command_says_what_it_made_in_one_line_and_how_to_evaluate_it(tmp_path, command):
    torch.save(under(""), tmp_path / "theirs.pt")
    flags = "--geometry clip --tokenizer bytes --vision_heads 2 --text-heads 2".split()
    status, out, error = command(tmp_path / "theirs.pt", tmp_path / "ours.pt", *flags)
    assert (status, error) == (0, "")
    line, = out.splitlines()
    for part in ("clip/cosine", "64 x 2 on 16 px / 8", "bytes", "python evaluate.py"):
        assert part in line
    assert same_embeddings(load_model(tmp_path / "ours.pt"), small("clip"))


def test_a_refused_command_ends_with_status_2_and_one_printable_line(tmp_path, command):
    torch.save(under("") | {"\x1b[2Jbias": torch.zeros(1)}, tmp_path / "theirs.pt")
    flags = "--geometry clip --tokenizer bytes --vision_heads 2 --text_heads 2".split()
    for target, words in (("ours.pt", "bias"), ("theirs.pt", "exists")):
        status, out, error = command(tmp_path / "theirs.pt", tmp_path / target, *flags)
        line, = error.splitlines()
        assert status == 2 and out == ""
        assert words in line and line.isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.pt"]


def test_openais_layout_names_the_flag_that_openais_weights_need(tmp_path, capsys):
    converted(tmp_path, FINE["OpenAI's three sizes"])
    assert "--quick_gelu" in capsys.readouterr().out
    converted(tmp_path, FINE["OpenAI's three sizes"], quick_gelu=True)
    assert capsys.readouterr().out == ""
