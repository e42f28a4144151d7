"""model.py: the authors' numbers, unpadded text, initial values, several processes, compiling,
checkpoints, and inputs that are refused."""

import math
import os
import pickle
import re
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from common import Malicious, ROOT, data, save_ours, small, small_batch, train, two_processes

from geometry import GEOMETRIES
from model import CLIP, PRESETS, Config, load_model, pack_tokens


def same_embeddings(a, b):
    """Whether two models return the same embeddings, bit for bit."""
    images, tokens = small_batch()
    images_agree = torch.equal(a.encode_image(images), b.encode_image(images))
    return images_agree and torch.equal(a.encode_text(tokens), b.encode_text(tokens))


# the authors' code


def golden_model(weights, geometry, final_ln=True):
    """Weights of a golden model -> CLIP."""
    sizes = {"image_size": 32, "patch_size": 8, "vision_width": 48, "vision_layers": 2}
    sizes |= {"text_width": 32, "text_layers": 2, "embed_dim": 32, "vocab_size": 300}
    sizes |= {"context_length": 16, "vision_heads": 3, "text_heads": 2}
    model = CLIP(Config(**sizes, geometry=geometry, final_ln=final_ln))
    model.load_state_dict(weights)
    return model


def check_golden(model, golden, dtype, tolerance):
    """Compare embeddings, losses and gradients. The tolerance is relative to an array's maximum."""
    model = model.to(dtype)
    images, tokens = torch.tensor(golden["images"]).to(dtype), torch.tensor(golden["tokens"])
    checked = set()

    def check(key, found):
        if key in golden.files:
            value = torch.tensor(golden[key])
            size = value.abs().max() if value.ndim else 1 + value.abs()
            assert (found.double() - value).abs().max() <= tolerance * size, key
            checked.add(key)

    image, text, scalars = model(images, tokens.long())
    check("f64/image_features", image)
    check("f64/text_features", text)
    weights = {"": 0.0, "_total": 0.2} if model.geometry.cones else {"": 0.0}
    for suffix, weight in weights.items():
        model.zero_grad()
        losses = model.loss(*model(images, tokens.long()), entailment_weight=weight)
        check(f"f64/loss{suffix}", losses["loss"])
        losses["loss"].backward()
        for name, parameter in model.named_parameters():
            check(f"f64/grad{suffix}/{name}", parameter.grad)
    return checked


PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


@pytest.mark.parametrize("dtype,tolerance", PRECISIONS)
def test_embeddings_loss_and_gradients_are_those_of_the_authors_code(dtype, tolerance):
    golden = np.load(ROOT / "tests" / "golden_model.npz")
    keys = [key for key in golden.files if key.startswith("weights/")]
    weights = {key.removeprefix("weights/"): torch.tensor(golden[key]) for key in keys}
    checked = check_golden(golden_model(weights, "hyperbolic"), golden, dtype, tolerance)
    assert checked == {key for key in golden.files if key.startswith("f64/")}


FULL_SET = Path(os.environ.get("GOLDEN_DIR", "-")) / "model_public"
FULL_NAMES = ["clip_ln", "clip_noln", "euclidean-squared_ln", "euclidean-squared_noln",
              "hyperbolic_ln", "hyperbolic_noln"]


@pytest.mark.skipif(not FULL_SET.exists(), reason="GOLDEN_DIR is no folder with golden models")
@pytest.mark.parametrize("dtype,tolerance", PRECISIONS)
@pytest.mark.parametrize("name", FULL_NAMES)
def test_all_golden_models(name, dtype, tolerance):
    weights = torch.load(FULL_SET / f"{name}.pt", weights_only=True)
    model = golden_model(weights, re.split("[-_]", name)[0], name.endswith("_ln"))
    checked = check_golden(model, np.load(FULL_SET / f"{name}.npz"), dtype, tolerance)
    assert {"f64/image_features", "f64/text_features", "f64/loss"} < checked


# text: the tower computes only the tokens up to the end token


def test_unpadded_text_equals_padded_text():
    """Embeddings and gradients. For the padded text, the tower computes every position: first those
    that are packed, then the others."""
    model, (_, tokens) = small("clip"), small_batch()
    packed = pack_tokens(tokens, 258)
    rest = set(range(tokens.numel())) - set(packed.tolist())
    assert len(rest) > 50
    embeddings, gradients = [], []
    for index in (packed, torch.cat([packed, torch.tensor(sorted(rest))])):
        model.zero_grad()
        text = model.encode_text(tokens, index)
        text[:, 0].sum().backward()
        embeddings.append(text.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*embeddings, rtol=1e-6, atol=1e-6)
    assert len(gradients[0]) > 20
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_packed_tokens_are_all_real_tokens_in_order_and_a_little_padding():
    sizes = set()
    for seed in range(50):
        torch.manual_seed(seed)
        N, T = 8, 24
        lengths = torch.randint(2, T + 1, (N,)).tolist()
        tokens = torch.randint(0, 256, (N, T))  # any token may follow the end token
        for row, length in enumerate(lengths):
            tokens[row, length - 1] = 257
        real = [row * T + t for row in range(N) for t in range(lengths[row])]
        index = pack_tokens(tokens, 258).tolist()
        assert index[: len(real)] == real
        assert len(set(index)) == len(index) < len(real) + 4 * N
        assert len(index) % N == 0
        sizes.add(len(index))
    assert len(sizes) <= T


def test_token_zero_can_be_a_word_and_the_first_end_token_ends_a_text():
    tokens = torch.tensor([[8, 0, 5, 9, 0, 0], [8, 9, 9, 3, 9, 0], [8, 1, 2, 3, 4, 9]])
    expected = [0, 1, 2, 3, 6, 7, 12, 13, 14, 15, 16, 17]
    assert pack_tokens(tokens, vocab_size=10).tolist() == expected


def test_tokens_after_the_end_token_have_no_effect():
    model, (_, tokens) = small(), small_batch()
    after = (tokens == 257).cumsum(1) - (tokens == 257).int() > 0
    dirty = torch.where(after, torch.randint_like(tokens, 258), tokens)
    assert not torch.equal(tokens, dirty)
    assert torch.equal(model.encode_text(tokens), model.encode_text(dirty))


def test_a_shorter_context_gives_the_same_embeddings():
    model, (_, tokens) = small(), small_batch()
    longest = 1 + (tokens == 257).nonzero()[:, 1].max()
    torch.testing.assert_close(model.encode_text(tokens[:, :longest]), model.encode_text(tokens))


# embeddings and losses


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_embeddings_are_unit_vectors_scaled_features_or_tangent_vectors(geometry):
    model, (images, _) = small(geometry), small_batch()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # CLIP's
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    normalised = (images / 255 - mean) / std
    features = model.visual(normalised)
    length = features.norm(dim=1, keepdim=True) if geometry == "clip" else math.sqrt(32)
    torch.testing.assert_close(model.encode_image(images), features / length)
    torch.testing.assert_close(model.encode_image(normalised), model.encode_image(images))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_under_autocast_embeddings_and_losses_stay_float32(geometry):
    model, (images, tokens) = small(geometry), small_batch()
    weight = 0.2 if model.geometry.cones else 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.visual(images / 255).dtype == torch.bfloat16
        outputs = model(images, tokens)
        losses = model.loss(*outputs, entailment_weight=weight)
        similarity = model.similarity(*outputs[:2])
    values = (*outputs, *losses.values(), similarity)
    assert {value.dtype for value in values} == {torch.float32}
    assert all(map(torch.equal, losses.values(), model.loss(*outputs, weight).values()))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_double_model_computes_in_float64(geometry):
    model, (images, tokens) = small(geometry), small_batch()
    single = model.encode_image(images)
    model = model.double()
    outputs = model(images, tokens)
    assert {value.dtype for value in outputs} == {torch.float64}
    assert model.loss(*outputs)["loss"].dtype == torch.float64
    torch.testing.assert_close(outputs[0].float(), single)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_loss_of_a_new_model_is_at_chance_level(geometry):
    model = small(geometry, init_logit_scale=-5.0)
    loss = model.loss(*model(*small_batch()))["loss"].item()
    assert loss == pytest.approx(math.log(8), abs=0.02)


def test_the_loss_by_hand():
    """Each image is at distance 0 from its own text and at distance 5 from the other one."""
    model = small("euclidean", logit="distance")
    x = torch.tensor([[3.0, 0], [0, 4.0]])
    losses = model.loss(x, x, torch.tensor([0.2, 1.0]), 0.5, min_radius=0.1)
    assert losses["loss"].item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert losses["entailment"] == 0 and losses["in_cone"] == 1
    assert losses["text_radius"] == losses["image_radius"] == 3.5
    shrunk = model.loss(x / 2, x, torch.tensor([0.2, 1.0]), 0.5)  # images nearer than texts
    outside = math.pi - (math.asin(0.1 / 3) + math.asin(0.1 / 4)) / 2
    assert shrunk["entailment"].item() == pytest.approx(outside)
    assert shrunk["in_cone"] == 0 and shrunk["image_radius"] == 1.75
    total = shrunk["contrastive"].item() + 0.5 * outside
    assert shrunk["loss"].item() == pytest.approx(total)


# initial values


def test_initial_values_are_open_clips():
    """Standard deviations. w, t: widths of vision and text; L: text layers; P: patch size."""
    w, t, L, P = 256, 192, 3, 16
    sizes = {"image_size": 64, "patch_size": P, "vision_width": w, "vision_layers": 2}
    sizes |= {"text_width": t, "text_layers": L, "vocab_size": 5000, "context_length": 77}
    model = small(embed_dim=128, final_ln=True, **sizes)
    table = {
        "visual.class_embedding": w**-0.5,
        "visual.positional_embedding": w**-0.5,
        "visual.proj": w**-0.5,
        "visual.conv1.weight": (9 * P * P) ** -0.5,
        "visual.transformer.resblocks.1.attn.in_proj_weight": (2 * w) ** -0.5,
        "visual.transformer.resblocks.1.attn.out_proj.weight": (3 * w) ** -0.5,
        "visual.transformer.resblocks.0.mlp.c_fc.weight": (3 * w) ** -0.5,
        "visual.transformer.resblocks.0.mlp.c_fc.bias": (3 * w) ** -0.5,
        "visual.transformer.resblocks.0.mlp.c_proj.weight": (12 * w) ** -0.5,
        "visual.transformer.resblocks.0.mlp.c_proj.bias": (12 * w) ** -0.5,
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "transformer.resblocks.2.attn.in_proj_weight": t**-0.5,
        "transformer.resblocks.2.attn.out_proj.weight": (2 * t * L) ** -0.5,
        "transformer.resblocks.2.mlp.c_fc.weight": (2 * t) ** -0.5,
        "transformer.resblocks.2.mlp.c_fc.bias": (3 * t) ** -0.5,
        "transformer.resblocks.2.mlp.c_proj.weight": (2 * t * L) ** -0.5,
        "transformer.resblocks.2.mlp.c_proj.bias": (12 * t) ** -0.5,
        "text_projection": t**-0.5,
    }
    parameters = dict(model.named_parameters())
    for name, std in table.items():
        assert parameters[name].std().item() == pytest.approx(std, rel=0.15), name
    constants = [name for name in parameters if re.search(r"ln_|in_proj_b|out_proj.b", name)]
    assert len(constants) == 5 * (4 + 2) + 2 * 3
    for name in constants:
        assert (parameters[name] == (1 if name.endswith("weight") else 0)).all(), name


def test_scalars_start_with_the_values_of_the_paper():
    for geometry, scale in (("clip", 1 / 0.07), ("euclidean", 1), ("hyperbolic", 1 / 0.07)):
        assert small(geometry).scalars().tolist() == pytest.approx([scale, 1])
    model = small("hyperbolic")
    alphas = model.alpha_img.item(), model.alpha_txt.item()
    assert alphas == pytest.approx([-math.log(32) / 2] * 2)


def test_scalars_stay_in_range_and_the_logit_scale_has_no_lower_bound():
    model = small("hyperbolic")
    for value, scale, curv in ((9.0, 100, 10), (-9.0, math.exp(-9), 0.1)):
        model.logit_scale.data.fill_(value)
        model.curvature.data.fill_(value)
        model.clamp_scalars()
        assert model.scalars().tolist() == pytest.approx([scale, curv])
    model = small("clip", max_logit_scale=20.0)
    model.logit_scale.data.fill_(9.0)
    model.clamp_scalars()
    assert model.scalars()[0].item() == pytest.approx(20)


def test_presets_have_as_many_parameters_as_the_released_models():
    def count(name, geometry):
        config = Config(**PRESETS[name], vocab_size=49408, geometry=geometry)
        return sum(p.numel() for p in CLIP(config).parameters())

    with torch.device("meta"):
        assert count("ViT-B-32", "clip") == 151_277_313  # OpenAI's
        assert count("ViT-B-32", "euclidean") == 151_277_313 - 2 * (768 + 512)  # two LayerNorms
        assert count("ViT-B-32", "hyperbolic") == 151_277_313 + 3
        assert count("ViT-B-16", "clip") == 149_620_737
        assert count("ViT-L-14", "clip") == 427_616_513


# two processes and GradCache, compared with one process that has the whole batch

WORKER = """
sys.path.insert(0, {tests!r})
import torch
import torch.distributed as dist
from test_model import BACKWARDS, gradients_of
from geometry import GEOMETRIES

dist.init_process_group("gloo")
results = {{}}
for geometry in GEOMETRIES:
    for micro_batch in BACKWARDS:
        results[geometry, micro_batch] = gradients_of(geometry, micro_batch)
if dist.get_rank() == 0:
    torch.save(results, {out!r})
dist.barrier()
dist.destroy_process_group()
"""
BACKWARDS = (0, 2)  # micro_batch; 0: the whole batch


def gradients_of(geometry, micro_batch):
    """-> losses, averaged over processes, and gradients of a batch of 16, in float64."""
    model, (images, tokens) = small(geometry).double(), small_batch(16)
    net, several = model, train.world_size() > 1
    local = 16 // train.world_size()
    mine = slice(train.rank() * local, (train.rank() + 1) * local)
    if several:
        net = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    weight = 0.2 if model.geometry.cones else 0.0
    parts = train.split_batch(images[mine], tokens[mine], micro_batch, 258, torch.device("cpu"))
    if micro_batch == 0:
        losses = model.loss(*net(*parts[0]), weight, 0.1)
        losses["loss"].backward()
    else:
        losses = train.gradcache_backward(net, model, parts, nullcontext(), weight, 0.1)
    values = torch.stack([value.detach().double() for value in losses.values()])
    if several:
        torch.distributed.all_reduce(values)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return dict(zip(losses, (values / train.world_size()).tolist())), gradients


def test_two_processes_equal_one_and_gradcache_equals_the_whole_batch(tmp_path):
    """All losses and gradients agree to 1e-6, with entailment, in all geometries."""
    code = WORKER.format(tests=str(ROOT / "tests"), out=str(tmp_path / "result.pt"))
    (status, _, error), (second_status, _, _) = two_processes(code=code)
    assert (status, second_status) == (0, 0), error
    results = torch.load(tmp_path / "result.pt")
    whole = {geometry: gradients_of(geometry, 0) for geometry in GEOMETRIES}
    for geometry, micro_batch in results:
        expected_losses, expected = whole[geometry]
        alone = gradients_of(geometry, micro_batch)
        for losses, gradients in (results[geometry, micro_batch], alone):
            assert losses == pytest.approx(expected_losses, rel=1e-6), (geometry, micro_batch)
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                error = (gradient - expected[name]).abs().max() / expected[name].abs().max()
                assert error < 1e-6, (geometry, micro_batch, name)


@pytest.mark.parametrize("geometry", ["clip", "hyperbolic"])
def test_torch_compile_makes_no_new_graph_for_another_number_of_tokens(geometry):
    graphs, counts = [], []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = small(geometry, context_length=77)
    model.compile(backend=count)
    loss = torch.compile(model.loss, backend=count)
    images, weight = small_batch()[0], 0.2 if model.geometry.cones else 0.0
    for step, words in enumerate((1, 3, 2, 8, 4)):
        captions = ["very " * (words + i % 3) + "red" for i in range(8)]
        tokens = data.tokenize(captions, "bytes", 77)
        parts = train.split_batch(images, tokens, 0, 258, torch.device("cpu"))
        outputs = model(*parts[0])
        loss(*outputs, weight, torch.tensor(0.1 + step))["loss"].backward()
        counts.append(len(graphs))
    assert counts[1] == counts[-1] > 0, counts  # the second size makes the number a variable


# checkpoints

BLOCK = """ln_1.weight ln_1.bias attn.in_proj_weight attn.in_proj_bias attn.out_proj.weight
attn.out_proj.bias ln_2.weight ln_2.bias mlp.c_fc.weight mlp.c_fc.bias mlp.c_proj.weight
mlp.c_proj.bias""".split()
OPEN_CLIP = """positional_embedding text_projection logit_scale token_embedding.weight
visual.class_embedding visual.positional_embedding visual.proj visual.conv1.weight
visual.ln_pre.weight visual.ln_pre.bias""".split()
FINAL_LN = "visual.ln_post.weight visual.ln_post.bias ln_final.weight ln_final.bias".split()
FURTHER = {"clip": FINAL_LN, "euclidean": [],
           "hyperbolic": [*FINAL_LN, "alpha_img", "alpha_txt", "curvature"]}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_state_dict_has_open_clips_names_to_the_letter(geometry):
    names = [*OPEN_CLIP, *FURTHER[geometry]]
    for tower in ("transformer", "visual.transformer"):
        names += [f"{tower}.resblocks.0.{name}" for name in BLOCK]
    model = small(geometry, vision_layers=1, text_layers=1)
    assert sorted(model.state_dict()) == sorted(names)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_checkpoint_loads_as_the_same_model_in_eval_mode_with_its_flags(tmp_path, geometry):
    model = small(geometry, seed=3)
    save_ours(tmp_path / "ckpt.pt", model, lr=0.5)
    loaded = load_model(tmp_path / "ckpt.pt")
    assert not loaded.training and loaded.config == model.config
    assert loaded.train_config == {"data": "shapes", "lr": 0.5}
    assert same_embeddings(loaded, model)


def test_quick_gelu_is_stored_in_the_checkpoint(tmp_path):
    quick = small("clip", quick_gelu=True)
    gelu = quick.transformer.resblocks[0].mlp.gelu
    assert gelu(torch.tensor(1.0)).item() == pytest.approx(1 / (1 + math.exp(-1.702)))
    save_ours(tmp_path / "ckpt.pt", quick)
    assert same_embeddings(load_model(tmp_path / "ckpt.pt"), quick)
    assert not same_embeddings(small("clip"), quick)


@pytest.mark.parametrize("heads,width", [(5, 64), (-1, 64), (None, 48)])
def test_heads_that_do_not_divide_the_width_are_refused(heads, width):
    for tower in ("vision", "text"):
        with pytest.raises(ValueError, match=f"{tower}_heads"):
            small(**{f"{tower}_heads": heads, f"{tower}_width": width})


def refusal(path, content=None):
    """-> the one line with which load_model refuses the file, whose content is saved first."""
    if content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError) as error:
        load_model(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and "\x1b" not in message
    assert len(message) < 800 + len(str(path))
    return message


def test_files_that_are_no_checkpoints_are_refused_with_name_and_size(tmp_path):
    save_ours(tmp_path / "whole.pt", small())
    whole = (tmp_path / "whole.pt").read_bytes()
    contents = [b"", whole[: len(whole) // 2], whole[:-1], b"<html>404</html>" * 99]
    contents.append(pickle.dumps({"state_dict": {}}, protocol=2))
    for content in contents:
        (tmp_path / "bad.pt").write_bytes(content)
        assert f"({len(content):,} bytes)" in refusal(tmp_path / "bad.pt")
    refusal(tmp_path / "nowhere.pt")
    refusal(tmp_path)


FOREIGN = {
    "open_clip": {"epoch": 3, "state_dict": small("clip").state_dict(), "optimizer": {}},
    "OpenAI": small("clip").state_dict(),
    "another trainer": {"state_dict": small("clip").state_dict(), "config": {"lr": 0.1}},
    "list": [torch.zeros(3)],
    "tensor": torch.zeros(3),
    "module": nn.Linear(2, 2),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_third_party_checkpoints_are_refused_with_the_command_that_converts_them(tmp_path, kind):
    assert "python -m lab.convert" in refusal(tmp_path / "theirs.pt", FOREIGN[kind])


def ours(**changes):
    """A checkpoint of `small`, with changes."""
    model = small("clip")
    checkpoint = {"state_dict": model.state_dict(), "config": asdict(model.config)}
    return checkpoint | {"train_config": {"data": "shapes"}} | changes


CHANGES = {
    "missing": ("visual.ln_pre.bias", None),
    "additional": ("logit_bias", torch.tensor(-10.0)),
    "of another shape": ("visual.class_embedding", torch.ones(3)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_weights_that_do_not_fit_the_model_are_refused_by_name(tmp_path, kind):
    name, value = CHANGES[kind]
    weights = small("clip").state_dict() | {name: value}
    weights = {name: value for name, value in weights.items() if value is not None}
    assert name in refusal(tmp_path / "bad.pt", ours(state_dict=weights))


def test_a_checkpoint_of_a_newer_version_is_refused_by_the_field_it_does_not_know(tmp_path):
    config = ours()["config"]
    message = refusal(tmp_path / "newer.pt", ours(config=config | {"patch_dropout": 0.5}))
    assert "patch_dropout" in message
    message = refusal(tmp_path / "newer.pt", ours(config=config | {"geometry": "spherical"}))
    assert "spherical" in message


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_never_executed(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, "evil.pt", _use_new_zipfile_serialization=zipped)
    refusal(Path("evil.pt"))
    assert not Path("executed").exists()
    torch.load("evil.pt", weights_only=False)
    assert Path("executed").exists()  # so load_model has prevented it


# inputs


def test_no_images_and_no_texts_have_no_embeddings():
    model, (images, tokens) = small("hyperbolic"), small_batch()
    assert model.encode_image(images[:0]).shape == (0, 32)
    assert model.encode_text(tokens[:0]).shape == (0, 32)


IMAGES, TOKENS = small_batch()
NO_END = torch.where(TOKENS == 257, 0, TOKENS)
NOT_IMAGES = {
    "floats from 0 to 255": IMAGES.float(), "integers of another type": IMAGES.long(),
    "NaN": IMAGES / 255 * math.nan, "one image": IMAGES[0], "channels last": IMAGES.movedim(1, 3),
    "one channel": IMAGES[:, :1], "another size": IMAGES[:, :, :8], "path": "photo.png",
}
NOT_TOKENS = {
    "string": "a red circle", "strings": ["a red circle"], "one text": TOKENS[0],
    "no end token": NO_END, "too long": torch.cat([TOKENS, TOKENS], dim=1),
    "one text without end token": torch.cat([TOKENS[:3], NO_END[3:]]),
    "another vocabulary": torch.where(TOKENS >= 256, TOKENS + 49150, TOKENS),
}


@pytest.mark.parametrize("kind", NOT_IMAGES)
def test_images_that_are_not_uint8_or_normalised_are_refused(kind):
    with pytest.raises(ValueError, match="images"):
        small().encode_image(NOT_IMAGES[kind])


@pytest.mark.parametrize("kind", NOT_TOKENS)
def test_texts_that_are_not_rows_of_tokens_with_an_end_token_are_refused(kind):
    with pytest.raises(ValueError, match="tokenize"):
        small().encode_text(NOT_TOKENS[kind])
