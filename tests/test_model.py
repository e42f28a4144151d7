"""model.py: the towers against the authors' code, initial values, unpadded text, two processes against one, checkpoints."""

import math
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import data
from geometry import GEOMETRIES
from model import CLIP, FOREIGN_NAMES, PRESETS, Config, any_length, export, load_model, real_tokens
from train import backward, split

ROOT = Path(__file__).resolve().parents[1]
SMALL = Config(image_size=16, patch_size=8, vision_width=64, vision_layers=2, text_width=64, text_layers=2, embed_dim=32, vocab_size=258,
               tokenizer="bytes", context_length=24, vision_heads=2, text_heads=2)


def small(geometry="euclidean", seed=0, **changes):
    torch.manual_seed(seed)
    return CLIP(replace(SMALL, geometry=geometry, **changes))


def small_batch(n=8, seed=0):
    torch.manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8)
    tokens = data.tokenize([f"{'very ' * (i % 4)}red {i}" for i in range(n)], "bytes", 24)
    return images, tokens


# the authors' code

def check_golden(model, golden, dtype, tolerance):
    """Embeddings, losses and gradients from the given weights, relative to each array's largest value."""
    model = model.to(dtype)
    images, tokens = torch.tensor(golden["images"]).to(dtype), torch.tensor(golden["tokens"]).long()
    prefix = "f64/" if "f64/loss" in golden.files else "f32/"
    theirs = {ours: name for name, ours in FOREIGN_NAMES.items()}

    def check(found, key):
        if prefix + key in golden.files:
            value = torch.tensor(golden[prefix + key]).double()
            size = value.abs().max() if value.ndim else 1 + value.abs()   # arrays: of the largest value; scalars: of (1 + size)
            assert (found.double() - value).abs().max() <= tolerance * size, key

    check(model.encode_image(images), "image_features")
    check(model.encode_text(tokens), "text_features")
    for weight, suffix, loss in ((0.0, "", "loss"), (0.2, "_total", "loss_total")):
        if weight and not model.row.cone:
            continue
        model.zero_grad()
        out = model(images, tokens, entailment_weight=weight)
        check(out["loss"], loss)
        out["loss"].backward()
        for name, p in model.named_parameters():
            check(p.grad, f"grad{suffix}/{theirs.get(name, name.removeprefix('text.'))}")


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_embeddings_loss_and_gradients_are_those_of_the_authors_code(tmp_path, dtype, tolerance):
    golden = np.load(ROOT / "tests" / "golden_model.npz")
    weights = {k.removeprefix("weights/"): torch.tensor(golden[k]) for k in golden.files if k.startswith("weights/")}
    torch.save(weights, tmp_path / "theirs.pt")
    model = load_model(tmp_path / "theirs.pt", vision_heads=3, text_heads=2)
    assert (model.config.geometry, model.config.final_ln, model.config.image_size) == ("hyperbolic", True, 32)
    check_golden(model, golden, dtype, tolerance)


ALL_GOLDEN = Path(os.environ.get("GOLDEN_DIR", "-")) / "model_public"


@pytest.mark.skipif(not ALL_GOLDEN.exists(), reason="set GOLDEN_DIR to the folder of the full set of golden models; one of them is always tested")
@pytest.mark.parametrize("name", ["clip_ln", "clip_noln", "euclidean-squared_ln", "euclidean-squared_noln", "hyperbolic_ln", "hyperbolic_noln"])
def test_all_golden_models_through_their_files(name):
    golden = np.load(ALL_GOLDEN / f"{name}.npz")
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = load_model(ALL_GOLDEN / f"{name}.pt", geometry=name.split("_")[0].split("-")[0], vision_heads=3, text_heads=2)
        check_golden(model, golden, dtype, tolerance)


# text

def test_unpadded_text_equals_padded_text():
    """The same tower over every position of (N, T) gives the same embeddings and gradients: what follows the end token plays no part."""
    model, (_, tokens) = small("clip"), small_batch()
    embeddings, gradients = [], []
    for index in (None, torch.arange(tokens.numel())):
        model.zero_grad()
        text = model.encode_text(tokens, index)
        text.square().mean(0)[0].backward()
        embeddings.append(text.detach())
        gradients.append({n: p.grad.clone() for n, p in model.text.named_parameters()})
    torch.testing.assert_close(*embeddings, rtol=1e-6, atol=1e-6)
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-5, atol=1e-6)


def test_zero_is_a_word_and_the_first_end_token_is_the_end():
    tokens = torch.tensor([[8, 0, 5, 9, 0, 0], [8, 9, 9, 3, 9, 0], [8, 1, 2, 3, 4, 9]])
    assert real_tokens(tokens, end=9).sum(1).tolist() == [4, 2, 6]


def test_what_follows_the_end_token_is_never_looked_at():
    model, (_, tokens) = small(), small_batch()
    dirty = torch.where(real_tokens(tokens, 257), tokens, torch.randint(0, 256, tokens.shape))
    assert torch.equal(model.encode_text(tokens), model.encode_text(dirty))


# embeddings

def test_embeddings_are_unit_vectors_scaled_features_or_tangent_vectors():
    images, tokens = small_batch()
    for geometry in ("clip", "euclidean", "hyperbolic"):
        model = small(geometry)
        embedding, features = model.encode_image(images), model.visual((images / 255 - model.image_mean) / model.image_std)
        expected = features / features.norm(dim=1, keepdim=True) if geometry == "clip" else features / math.sqrt(32)
        torch.testing.assert_close(embedding, expected)
        assert embedding.dtype == torch.float32 and model.double().encode_text(tokens).dtype == torch.float64


def test_autocast_leaves_embeddings_and_losses_in_float32():
    model, (images, tokens) = small("hyperbolic"), small_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.visual(images.float()).dtype == torch.bfloat16
        assert model.encode_image(images).dtype == torch.float32
        assert model(images, tokens, entailment_weight=0.2)["loss"].dtype == torch.float32


def test_a_new_model_knows_nothing():
    images, tokens = small_batch()
    for geometry in GEOMETRIES:
        loss = small(geometry, init_logit_scale=-5.0)(images, tokens)["loss"].item()
        assert loss == pytest.approx(math.log(8), abs=0.02)


# initial values: open_clip's, std by parameter; w vision width, t text width, L text layers, P patch

def test_initial_values_follow_the_table():
    w, t, L, P = 256, 192, 3, 16
    torch.manual_seed(0)
    model = CLIP(replace(SMALL, image_size=64, patch_size=P, vision_width=w, text_width=t, text_layers=L, embed_dim=128, vocab_size=5000, context_length=77))
    table = {"visual.class_embedding": w**-0.5, "visual.positional_embedding": w**-0.5, "visual.proj": w**-0.5, "visual.conv1.weight": (9 * P * P) ** -0.5,
             "visual.transformer.resblocks.1.attn.in_proj_weight": (2 * w) ** -0.5, "visual.transformer.resblocks.1.attn.out_proj.weight": (3 * w) ** -0.5,
             "visual.transformer.resblocks.0.mlp.c_fc.weight": (3 * w) ** -0.5, "visual.transformer.resblocks.0.mlp.c_proj.weight": (12 * w) ** -0.5,
             "visual.transformer.resblocks.0.mlp.c_fc.bias": (3 * w) ** -0.5, "text.token_embedding.weight": 0.02, "text.positional_embedding": 0.01,
             "text.transformer.resblocks.2.attn.in_proj_weight": t**-0.5, "text.transformer.resblocks.2.attn.out_proj.weight": t**-0.5 * (2 * L) ** -0.5,
             "text.transformer.resblocks.2.mlp.c_fc.weight": (2 * t) ** -0.5, "text.transformer.resblocks.2.mlp.c_proj.weight": t**-0.5 * (2 * L) ** -0.5,
             "text.transformer.resblocks.2.mlp.c_proj.bias": (12 * t) ** -0.5, "text.text_projection": t**-0.5}
    parameters = dict(model.named_parameters())
    for name, std in table.items():
        assert parameters[name].std().item() == pytest.approx(std, rel=0.15), name
    for name, p in parameters.items():
        if re.search(r"ln_\w+\.weight$", name):
            assert (p == 1).all(), name
        if re.search(r"ln_\w+\.bias$|in_proj_bias$|out_proj\.bias$", name):
            assert (p == 0).all(), name


def test_scalars_start_where_the_paper_starts_them_and_stay_in_range():
    for geometry, logit, scale in (("clip", "cosine", math.log(1 / 0.07)), ("euclidean", "squared", 0), ("hyperbolic", "distance", math.log(1 / 0.07))):
        assert small(geometry, logit=logit).logit_scale.item() == pytest.approx(scale)
    model = small("hyperbolic")
    assert model.alpha_image.item() == model.alpha_text.item() == pytest.approx(-math.log(32) / 2) and model.log_curv.item() == 0
    model.logit_scale.data.fill_(9), model.log_curv.data.fill_(-9)
    model.clamp_scalars()
    assert model.logit_scale.exp().item() == pytest.approx(100) and model.curvature().item() == pytest.approx(0.1)
    model.logit_scale.data.fill_(-1)
    model.clamp_scalars()
    assert model.logit_scale.item() == -1   # no lower bound


def test_presets_have_the_sizes_of_the_released_models():
    count = lambda name, **more: sum(p.numel() for p in torch.nn.Module.parameters(CLIP(Config(**PRESETS[name], vocab_size=49408, tokenizer="clip", **more))))
    with torch.device("meta"):
        clip, euclip = count("ViT-B-32", geometry="clip"), count("ViT-B-32")
    assert clip == 151_277_313 and clip - euclip == 2 * 768 + 2 * 512   # OpenAI's ViT-B/32; EuCLIP lacks the two final LayerNorms


# two processes against one

WORKER = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{root!r}, {tests!r}]
from test_model import in_parts, small, small_batch
from model import rank, world_size
from train import backward
from contextlib import nullcontext
from geometry import GEOMETRIES

def main():
    images, tokens = small_batch(16)
    mine = slice(rank() * 16 // world_size(), (rank() + 1) * 16 // world_size())
    result = {{}}
    for parts in (1, 4, 8):
        for geometry, row in GEOMETRIES.items():
            model = small(geometry).double()
            net = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
            out = backward(net, model, in_parts(images[mine], tokens[mine], parts), nullcontext(), entailment_weight=0.2 if row.cone else 0.0, min_radius=0.1)
            loss = out["loss"].detach()
            dist.all_reduce(loss)
            result[geometry, parts] = (loss / world_size(), {{n: p.grad for n, p in model.named_parameters()}})
    if rank() == 0:
        torch.save(result, {out!r})

dist.init_process_group("gloo")
main()
dist.barrier()
dist.destroy_process_group()
"""


def torchrun(processes, script, *args, timeout=100, cwd=None):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"})


def in_parts(images, tokens, parts):
    index = real_tokens(tokens, 257).flatten().nonzero().squeeze(1)
    return split(dict(images=images, tokens=tokens, index=index), len(images) // parts)


def test_two_processes_equal_one_and_parts_equal_the_whole(tmp_path):
    """Loss and every parameter's gradient to 1e-6 relative: with entailment, with --micro_batch making 4 and 8 parts, in all geometries."""
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(tmp_path / "result.pt")))
    done = torchrun(2, tmp_path / "worker.py")
    assert done.returncode == 0, done.stderr
    two = torch.load(tmp_path / "result.pt")
    for geometry, row in GEOMETRIES.items():
        entailment = dict(entailment_weight=0.2 if row.cone else 0.0, min_radius=0.1)
        whole, (images, tokens) = small(geometry).double(), small_batch(16)
        expected = whole(images, tokens, **entailment)["loss"]
        expected.backward()
        results = {("two processes", parts): two[geometry, parts] for parts in (1, 4, 8)}
        for parts in (4, 8):
            model = small(geometry).double()
            loss = backward(model, model, in_parts(images, tokens, parts), nullcontext(), **entailment)["loss"]
            results["one process", parts] = loss, {n: p.grad for n, p in model.named_parameters()}
        for case, (loss, gradients) in results.items():
            assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
            for name, p in whole.named_parameters():
                difference, size = (gradients[name] - p.grad).abs().max(), p.grad.abs().max()
                assert difference <= 1e-6 * size, f"{geometry}, {case}, {name}: {difference / size:.1e}"


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_model_is_compiled_once_for_any_number_of_tokens(geometry):
    torch._dynamo.reset()
    counter, model, counts = CompileCounter(), small(geometry, context_length=77), []
    model.compile(backend=counter)
    for words in range(1, 6):
        captions = ["very " * (words + i % 3) + "red" for i in range(8)]
        batch, = in_parts(small_batch()[0], data.tokenize(captions, "bytes")[:, :15 + 5 * words], 1)
        any_length(batch["tokens"], batch["index"])
        model(**batch, entailment_weight=0.0 if geometry == "clip" else 0.2, min_radius=torch.tensor(0.1))["loss"].backward()
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1] > 0, counts


# files

def save_ours(path, model, **recipe):
    torch.save(dict(format=1, model=model.state_dict(), model_config=asdict(model.config), train_config=dict(data="shapes") | recipe), path)


def in_open_clips_layout(model):
    theirs = {ours: name for name, ours in FOREIGN_NAMES.items()}
    return {theirs.get(k, k.removeprefix("text.")): v for k, v in model.state_dict().items()}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_fault_25_our_file_and_open_clips_layout_with_prefixes_load_the_same_model(tmp_path, geometry):
    model, (images, tokens) = small(geometry), small_batch()
    save_ours(tmp_path / "ours.pt", model)
    torch.save(dict(epoch=3, name="run", optimizer={}, state_dict={f"module.{k}": v for k, v in in_open_clips_layout(model).items()}), tmp_path / "theirs.pt")
    torch.save({f"_orig_mod.{k}": v for k, v in in_open_clips_layout(model).items()}, tmp_path / "bare.pt")
    for name in ("theirs.pt", "bare.pt", "ours.pt"):
        told = {} if name == "ours.pt" else dict(geometry=geometry, vision_heads=2, text_heads=2, tokenizer="bytes")
        loaded = load_model(tmp_path / name, **told)
        assert not loaded.training
        assert torch.equal(loaded.encode_image(images), model.encode_image(images)) and torch.equal(loaded.encode_text(tokens), model.encode_text(tokens))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_export_and_reimport_give_the_same_embeddings_to_the_bit(tmp_path, geometry):
    model, (images, tokens) = small(geometry), small_batch()
    save_ours(tmp_path / "ours.pt", model)
    if geometry == "euclidean":   # once as a user would
        subprocess.run([sys.executable, ROOT / "model.py", tmp_path / "ours.pt", tmp_path / "theirs.pt"], check=True, timeout=60)
    else:
        export(tmp_path / "ours.pt", tmp_path / "theirs.pt")
    assert torch.load(tmp_path / "theirs.pt", weights_only=True)["state_dict"].keys() == in_open_clips_layout(model).keys()
    again = load_model(tmp_path / "theirs.pt", geometry=geometry, vision_heads=2, text_heads=2, tokenizer="bytes")
    assert torch.equal(again.encode_image(images), model.encode_image(images)) and torch.equal(again.encode_text(tokens), model.encode_text(tokens))


def test_quick_gelu_is_told_for_foreign_files_and_stored_in_ours(tmp_path):
    model, (images, _) = small("clip", quick_gelu=True), small_batch()
    torch.save(in_open_clips_layout(model), tmp_path / "theirs.pt")
    told = load_model(tmp_path / "theirs.pt", geometry="clip", quick_gelu=True, vision_heads=2, text_heads=2)
    assert torch.equal(told.encode_image(images), model.encode_image(images))
    save_ours(tmp_path / "ours.pt", told)
    assert torch.equal(load_model(tmp_path / "ours.pt").encode_image(images), model.encode_image(images))
    assert not torch.equal(load_model(tmp_path / "theirs.pt", geometry="clip", vision_heads=2, text_heads=2).encode_image(images), model.encode_image(images))


def test_a_foreign_file_that_cannot_say_its_geometry_asks_for_it(tmp_path):
    torch.save(in_open_clips_layout(small("clip")), tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="--geometry"):
        load_model(tmp_path / "bare.pt")


def test_fault_25_keys_that_are_missing_left_over_or_misshapen_are_refused_by_name(tmp_path):
    whole = in_open_clips_layout(small("clip"))
    for change, message in ((dict(extra=torch.ones(1)), "left over extra"), ({"visual.class_embedding": torch.ones(3)}, "class_embedding has shape"),
                            ({"visual.ln_pre.bias": None}, "missing visual.ln_pre.bias")):
        torch.save({k: v for k, v in (whole | change).items() if v is not None}, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / "bad.pt", geometry="clip", vision_heads=2, text_heads=2)


def test_fault_24_files_that_are_no_checkpoints_are_refused_with_path_and_size(tmp_path):
    save_ours(tmp_path / "whole.pt", small())
    whole = (tmp_path / "whole.pt").read_bytes()
    for name, content in (("empty.pt", b""), ("cut.pt", whole[:len(whole) // 2]), ("page.pt", b"<html>404</html>")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} \({len(content):,} bytes\)"):
            load_model(tmp_path / name)
    with pytest.raises(ValueError, match="nowhere.pt"):
        load_model(tmp_path / "nowhere.pt")


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_fault_27_a_malicious_pickle_is_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict=Malicious()), "evil.pt")
    with pytest.raises(ValueError, match="evil.pt"):
        load_model("evil.pt")
    assert not Path("executed").exists()
