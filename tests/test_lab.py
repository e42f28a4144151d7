"""lab/: figures, the study's tables, benchmarks, the hierarchy of captions, converted checkpoints.

test_photos.py tests lab/photos.py and lab/cifar10.py."""

import json
import math
import random
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import ROOT, encoded, photo, save_ours, small, small_batch
from PIL import Image

import data
from geometry import GEOMETRIES
from lab import bench, convert, figures, hierarchy, study
from model import load_model

# ------------------------------------------------------------------------------------------------
# figures


def test_disc_and_tangent_plane_are_inverse():
    v = np.array([[0.0, 0.0], [0.3, -0.4], [2.0, 1.0]])
    assert np.allclose(figures.from_disc(figures.to_disc(v)), v)
    half = figures.to_disc(np.array([math.log(3), 0.0]))  # tanh(ln 3 / 2) = 1 / 2
    assert np.allclose(half, [0.5, 0])


def test_the_hyperbolic_path_in_the_figure_is_the_shortest():
    """Its small steps add up to the distance; those of the straight tangent line exceed it."""
    x, y = np.array([1.7, 0.6]), np.array([-0.2, 1.4])

    def length(points):
        steps = zip(points, points[1:])
        return sum(figures.distance(a, b, "hyperbolic", "distance") for a, b in steps)

    shortest = figures.distance(x, y, "hyperbolic", "distance")
    path = figures.from_disc(figures.hyperbolic_path(x, y))
    assert np.allclose(path[[0, -1]], [x, y])
    assert length(path) == pytest.approx(shortest, rel=1e-6)
    assert length(np.linspace(x, y, 60)) > 1.01 * shortest


def test_ticks_by_hand():
    assert figures.ticks(1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert figures.ticks(90).tolist() == [0, 20, 40, 60, 80]


def test_axes_place_points_by_hand():
    """A box of 200 x 100 at (10, 20): the origin is its lower left corner."""
    place = figures.axes(figures.Sheet(300, 200), (10, 20, 200, 100), right=4, top=0.5)
    assert place([0, 4, 2], [0, 0.5, 0.25]).tolist() == [[10, 120], [210, 20], [110, 70]]


def test_wrapped_text_fits_and_says_where_it_is_cut():
    font = figures.ImageFont.load_default(20)
    for words in ("a red circle", "WIDE " * 40, "unbroken" * 30):
        text = figures.wrap(words, 10, 148, lines=2)
        lines = text.splitlines()
        assert len(lines) <= 2 and max(map(font.getlength, lines)) <= 296
        assert text.endswith("...") == (len(words) > 100)


def test_zero_loss_has_the_colour_of_paper_and_pi_is_dark_red():
    none, pi, more = figures.heat(np.array([[0.0, math.pi, 9.0]]), math.pi)[0].tolist()
    assert tuple(none) == figures.mixed(figures.PAPER, 1) and pi == more == [110, 20, 40]


def test_cones_are_drawn_where_they_are(tmp_path):
    figures.cones(tmp_path / "cones.png")
    image, blue = Image.open(tmp_path / "cones.png"), figures.mixed(figures.IMAGE, 0.3)
    assert image.size == (1680, 1280)  # two pixels for each pixel of the coordinates

    def in_cone(x, y):
        """In the first panel: 230 pixels from (20, 44) on, for -1.6 to 1.6."""
        pixel = (2 * round(20 + 115 + 115 * x / 1.6), 2 * round(44 + 115 - 115 * y / 1.6))
        return image.getpixel(pixel) == blue

    # the cone of the apex (K, K) is the quadrant to its upper right
    assert in_cone(1.2, 0.4) and in_cone(0.4, 1.2)
    assert not (in_cone(0.1, 1.2) or in_cone(1.2, 0.1) or in_cone(-1, -1))


def test_the_plane_and_the_disc_have_a_root_and_the_sphere_has_none(tmp_path):
    figures.three_geometries(tmp_path / "three.png")
    image, dot = Image.open(tmp_path / "three.png"), figures.mixed(figures.FAINT, 1)
    centres = [image.getpixel((2 * x + 1, 2 * 170 - 3)) for x in (140, 420, 700)]
    assert [colour == dot for colour in centres] == [False, True, True]


def test_balanced_captions_are_those_of_images_that_share_only_general_ones():
    chains = [[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 5, 6], [0, 7, 5, 8], [0, 7, 9, 10]]
    captions, images = figures.balanced(chains)
    assert images == [0, 2, 4] and captions == [0, 1, 2, 3, 5, 6, 7, 9, 10]


def drawn_by(checkpoint, folder, monkeypatch, *flags):
    """Draw a checkpoint -> {name: grey values}."""
    argv = ["figures", str(checkpoint), str(folder), *map(str, flags)]
    monkeypatch.setattr(figures.sys, "argv", argv)
    figures.main()
    return {path.stem: np.asarray(Image.open(path).convert("L")) for path in folder.iterdir()}


@pytest.mark.parametrize("geometry, weight", [("clip", 0.0), ("hyperbolic", 0.2)])
def test_a_checkpoint_is_drawn(geometry, weight, tmp_path, monkeypatch, few_held_out):
    path = tmp_path / "ckpt.pt"
    save_ours(path, small(geometry, context_length=77), entailment_weight=weight, batch_size=64)
    log = [{"step": 1, "loss": 4.2}, {"step": 9, "loss": 1.5}, {"step": 9, "val_mean_r1": 0.25}]
    lines = [json.dumps(line) + "\n" for line in log] + ["a note that is not JSON\n"]
    (tmp_path / "log.jsonl").write_text("".join(lines))
    drawn = drawn_by(path, tmp_path / "drawn", monkeypatch)
    assert set(drawn) == {"distances", "traversal", "contact", "loss"}
    for name, pixels in drawn.items():  # something is drawn, and nothing touches the edge
        edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
        assert pixels.std() > 5 and min(edge.min() for edge in edges) > 240, name


def save_with_pairs(folder):
    """A checkpoint whose held-out data are four photos of two captions each -> its path."""
    pairs = folder / "pairs"
    pairs.mkdir()
    for i in range(4):
        (pairs / f"{i}.png").write_bytes(encoded(photo(40, 30, seed=i)))
        (pairs / f"{i}.txt").write_text(f"photo {i % 3}\nanother caption of it\n")
    save_ours(folder / "ckpt.pt", small(), data=str(pairs), val_data=str(pairs))
    return folder / "ckpt.pt"


def test_a_checkpoint_of_other_data_is_drawn_without_traversal(tmp_path, monkeypatch, capsys):
    save_with_pairs(tmp_path)
    subject = figures.Subject(tmp_path / "ckpt.pt")
    own = [subject.captions[i] for i in subject.own]
    assert own == ["photo 0", "photo 1", "photo 2", "photo 0"]
    drawn = drawn_by(tmp_path / "ckpt.pt", tmp_path / "drawn", monkeypatch)
    assert set(drawn) == {"distances", "contact"}
    assert "traversal.png needs captions of several levels" in capsys.readouterr().out


def test_the_traversal_of_other_data_needs_a_file_of_captions(tmp_path, monkeypatch):
    path, captions = save_with_pairs(tmp_path), tmp_path / "captions.txt"
    captions.write_text("a photo\na photo\na photo of the sea\n")
    drawn = drawn_by(path, tmp_path / "drawn", monkeypatch, "--captions", captions)
    assert set(drawn) == {"distances", "contact", "traversal"}
    assert len(drawn["traversal"]) == 2 * (108 + 4 * 92)  # a strip for each of the four photos
    captions.write_text("\n")
    with pytest.raises(SystemExit, match="captions.txt: NoCaption: there is no text"):
        drawn_by(path, tmp_path / "none", monkeypatch, "--captions", captions)
    with pytest.raises(SystemExit):
        drawn_by("geometry", tmp_path / "none", monkeypatch, "--captions", captions)
    assert not (tmp_path / "none").exists()


def test_the_traversal_says_how_many_paths_meet_no_caption(tmp_path, monkeypatch):
    """Two images coincide with the only caption; the third is on the other side of the root."""
    written, model = [], small("euclidean")
    model.train_config = {}
    subject = SimpleNamespace(
        model=model, name="three images", chains=[[0]] * 3, captions=["a photo"],
        images=torch.tensor([[4.0, 0.0], [4.0, 0.0], [-4.0, 0.0]]),
        texts=torch.tensor([[4.0, 0.0]]), draw=lambda *place: None,
    )

    def text(sheet, x, y, words, *style, **more):
        written.append(words)

    monkeypatch.setattr(figures.Sheet, "text", text)
    figures.traversal(subject, tmp_path / "traversal.png")
    assert any("1 of all 3 paths meet no caption." in words for words in written)


def test_a_checkpoint_without_held_out_data_is_refused_in_one_line(tmp_path, monkeypatch):
    save_ours(tmp_path / "ckpt.pt", small(), data=str(tmp_path))
    with pytest.raises(SystemExit, match="names no held-out data") as end:
        drawn_by(tmp_path / "ckpt.pt", tmp_path / "drawn", monkeypatch)
    assert "\n" not in end.value.code and not (tmp_path / "drawn").exists()


# ------------------------------------------------------------------------------------------------
# the study


def test_the_study_has_every_logit_and_the_entailment_loss_of_both_defaults():
    runs = study.runs()
    logits = {f"{name}-{logit}" for name, g in GEOMETRIES.items() for logit in g.logits}
    assert logits < set(runs)
    cones = {name for name, (_, flags) in runs.items() if "--entailment_weight" in flags}
    assert {name.split("-0.2")[0] for name in cones} == {study.DEFAULT[g] for g in study.WITH_CONES}
    assert len(runs) == len(logits) + len(cones) + 3  # the other choice of final LayerNorms
    assert set().union(*study.comparisons()) == set(runs)


def test_main_runs_have_more_seeds_than_variants():
    seeds = {name: most for name, (most, _) in study.runs().items()}
    main = {name for name, most in seeds.items() if most == 10}
    assert len(main) == 8 and {*study.DEFAULT.values(), *study.WITH_CONES.values()} < main
    assert set(seeds.values()) == {4, 10} and len(study.STUDENT) == 10 - 1


def test_a_difference_has_the_interval_of_student():
    """The differences are 3 and 5, on average 4. Their deviation is sqrt(2) and the t quantile of
    one degree of freedom 12.706, so the half interval is 12.706. Unpaired seeds do not count."""
    a = {seed: {"x": {"y": value}} for seed, value in ((0, 0.53), (1, 0.57), (2, 0.99))}
    b = {seed: {"x": {"y": value}} for seed, value in ((0, 0.50), (1, 0.52), (3, 0.01))}
    assert study.difference(a, b, "x.y", 100, 1) == "+4.0 ± 12.7"
    assert study.difference(a, {0: b[0]}, "x.y", 100, 1) == ""


def write_result(out, name, seed, r1):
    folder = out / f"{name}-s{seed}"
    folder.mkdir()
    result = {
        "zero_shot": {"top1": 1.0},
        "retrieval": {"mean_r1": r1},
        "hierarchy": {"text_radius": [5, 4, 3, 2, 0.1], "image_radius": 0.2,
                      "general_nearer": 0.5, "own_in_cone": None, "other_in_cone": None},
        "traversal": {"captions": 1.0, "transitions": 0, "to_general": None, "to_specific": None},
    }
    (folder / "result.json").write_text(json.dumps(result))
    log = [{"step": 1, "loss": 9, "text_radius": 9, "image_radius": 9},
           {"step": 2, "loss": 3, "text_radius": 1, "image_radius": 2},
           {"step": 2, "val_mean_r1": r1}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def test_the_tables_of_a_study_by_hand(tmp_path):
    """The mean of 50 and 52 % is 51.0 ± 1.4. A metric that the sphere does not have is empty."""
    for seed, clip, arc in ((0, 0.50, 0.53), (1, 0.52, 0.57)):
        write_result(tmp_path, "clip-cosine", seed, clip)
        write_result(tmp_path, "clip-arc", seed, arc)
    lines = study.report(study.finished(tmp_path, seeds=10), 1000).splitlines()
    accuracy, radii, cones, *each = (line for line in lines if line.startswith("| clip-cosine |"))
    assert len(each) == 2 and each[0].startswith("| clip-cosine | 0 | 100.0 | 50.0 |")
    means = "100.0 ± 0.0 | 51.0 ± 1.4 | 50.0 ± 0.0 | 1.00 ± 0.00 | 2.00 ± 0.00 | 0.10 ± 0.00"
    assert accuracy == f"| clip-cosine | 2 | {means} | 0.20 ± 0.00 |"
    means = " | ".join(f"{radius} ± 0.00" for radius in ("5.00", "4.00", "3.00", "2.00", "0.10"))
    assert radii == f"| clip-cosine | 2 | {means} |"
    assert cones == "| clip-cosine | 2 |  |  |  | 1.00 ± 0.00 | 0 ± 0 |  |  |  |  |  |  |"
    difference = "+4.0 ± 12.7 | +0.0 ± 0.0 | +0.0 ± 0.0 |"
    assert f"| clip-arc minus clip-cosine | 2 | {difference}" in lines


def test_results_have_the_titles_and_columns_that_the_study_writes(tmp_path):
    write_result(tmp_path, "clip-cosine", 0, 0.5)
    written = study.report(study.finished(tmp_path, seeds=1), 90_000).splitlines()
    stored = (ROOT / "lab" / "results.md").read_text().splitlines()
    assert stored[0].split("torch")[0] == written[0].split("torch")[0]

    def heads(lines):
        return [line for line in lines if line.startswith(("## ", "| run |", "| difference |"))]

    assert heads(stored) == heads(written)


def test_transitions_are_counted_by_level():
    """On the path of the first image from 4 to 0 there are captions at 2 (specific) and 0.5
    (general); on that of the second, in the opposite direction, there is one at 1."""
    texts = torch.tensor([[0.5, 0.0], [2.0, 0.0], [-1.0, 0.0]])
    images, model = torch.tensor([[4.0, 0.0], [-4.0, 0.0]]), small("euclidean")

    def metrics_of(images, chains):
        subject = SimpleNamespace(model=model, images=images, texts=texts, chains=chains)
        return study.traversal_metrics(subject)

    m = metrics_of(images, [[0, 1], [0, 2]])
    assert m == {"captions": 1.5, "transitions": 1, "to_general": 1.0, "to_specific": 0.0}
    m = metrics_of(images, [[1, 0], [1, 2]])
    assert (m["to_general"], m["to_specific"]) == (0.0, 1.0)
    m = metrics_of(images[1:], [[0, 2]])
    assert m == {"captions": 1.0, "transitions": 0, "to_general": None, "to_specific": None}


def test_a_run_is_trained_when_its_checkpoint_has_the_last_step(tmp_path):
    assert not study.is_trained(tmp_path, 64)
    for step, trained in ((7, False), (8, True)):
        torch.save({"step": step, "train_config": {"batch_size": 8}}, tmp_path / "ckpt.pt")
        assert study.is_trained(tmp_path, 64) == trained


def test_runs_of_other_code_or_flags_are_not_mixed(tmp_path, monkeypatch):
    study.refuse_to_mix(tmp_path, 1000)
    study.refuse_to_mix(tmp_path, 1000)
    with pytest.raises(SystemExit, match="other code or flags"):
        study.refuse_to_mix(tmp_path, 2000)
    assert {"lab/shapes.py", "lab/hierarchy.py"} < set(study.CODE)
    for name in study.CODE:  # every file counts
        rest = tuple(other for other in study.CODE if other != name)
        monkeypatch.setattr(study, "CODE", rest)
        with pytest.raises(SystemExit, match="other code or flags"):
            study.refuse_to_mix(tmp_path, 1000)
        monkeypatch.undo()


# ------------------------------------------------------------------------------------------------
# benchmarks


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_textbook_similarities_equal_ours(geometry):
    torch.manual_seed(0)
    g, curv = GEOMETRIES[geometry], torch.tensor(1.7, dtype=torch.float64)
    x, y = (g.project(torch.randn(5, 8, dtype=torch.float64)) for _ in range(2))
    for logit in g.logits:
        expected = bench.textbook(geometry, logit, x, y, curv)
        assert torch.allclose(g.similarity(x, y, logit, curv), expected, rtol=1e-6), logit


def test_a_photo_like_jpeg_is_about_as_large_as_a_photo():
    """Photographs take about 1 to 3 bits per pixel at quality 90."""
    jpeg = bench.photo_like(640, 480, seed=0)
    assert 1 < 8 * len(jpeg) / (640 * 480) < 3


def test_the_shards_of_the_benchmark_are_a_data_source(tmp_path):
    jpeg = bench.photo_like(64, 48, seed=0)
    path = bench.write_shard(tmp_path / "0.tar", [(jpeg, "a photo 0"), (jpeg, "a photo 1")])
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["0.jpg", "0.txt", "1.jpg", "1.txt"]
    source = data.open_source(path)
    assert [source[i][1] for i in range(len(source))] == [["a photo 0"], ["a photo 1"]]
    assert not source.skipped
    assert data.load_training_crop(source[1][0], 16, 0.9, random.Random(0)).any()


def test_operations_of_a_small_model_by_hand():
    """A product of (a, b) and (b, c) has 2abc operations. The backward pass has twice as many as
    the forward pass, except that pixels need no gradient. In the last block only one token goes
    through the MLP and the last projection."""
    def tower(n, C=64, layers=2, embed_dim=32):
        every_token = layers * n * (3 + 1 + 8) * C * C - (n - 1) * 8 * C * C
        return 2 * (every_token + layers * 2 * n * n * C + C * embed_dim)

    model, captions = small().to(bench.DEVICE), ["red cat"] * 4  # 9 tokens with start and end
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    batch = images.to(bench.DEVICE), data.tokenize(captions, "bytes", 9).to(bench.DEVICE)
    patches = 2 * 4 * 3 * 8 * 8 * 64  # 4 patches of 8 x 8 pixels
    logits = 3 * 2 * 4 * 4 * 32
    by_hand = 4 * (3 * tower(n=5) + 3 * tower(n=9) + 2 * patches) + logits
    assert bench.count_flops(model, batch) == pytest.approx(by_hand, rel=0.01)


def test_twice_as_many_pairs_need_about_twice_the_operations():
    """Only the N x N logits grow faster."""
    model, counts = small().to(bench.DEVICE), []
    for n in (8, 16):
        images, tokens = small_batch(n)
        batch = images.to(bench.DEVICE), tokens.to(bench.DEVICE)
        counts.append(bench.count_flops(model, batch))
    assert 2 <= counts[1] / counts[0] < 2.1


# ------------------------------------------------------------------------------------------------
# the hierarchy of captions, and third-party checkpoints


def test_hierarchy_metrics_by_hand():
    """All points are on the x axis, those of the first image at the right of the root and those of
    the second at the left. Only for the first image is the general caption nearer to the root."""
    model = small("euclidean")
    model.train_config = {"entailment_weight": 0.2, "min_radius": 0.1}
    images = torch.tensor([[4.0, 0.0], [-4.0, 0.0]])
    texts = torch.tensor([[[1.0, 0.0], [-3.0, 0.0]], [[2.0, 0.0], [-2.0, 0.0]]])
    metrics = hierarchy.hierarchy_metrics(model, images, texts)
    assert metrics["text_radius"] == [2, 2] and metrics["image_radius"] == 4
    assert metrics["general_nearer"] == 0.5
    assert metrics["own_in_cone"] == [1, 1] and metrics["other_in_cone"] == [0, 0]


def test_the_hierarchy_has_five_levels_of_captions_per_image(few_held_out):
    images, texts = hierarchy.embed_hierarchy(small(context_length=77).eval())
    assert images.shape == (48, 32) and texts.shape == (5, 48, 32)
    assert torch.equal(texts[0], texts[0, :1].expand(48, -1))  # "a shape" for all


def test_a_converted_checkpoint_gives_the_same_embeddings(tmp_path):
    model, (images, tokens) = small("hyperbolic", quick_gelu=True).eval(), small_batch()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "theirs.pt")
    settings = {"tokenizer": "bytes", "quick_gelu": True, "vision_heads": 2, "text_heads": 2}
    convert.convert(tmp_path / "theirs.pt", tmp_path / "ours.pt", "hyperbolic", **settings)
    ours = load_model(tmp_path / "ours.pt")
    assert ours.config.geometry == "hyperbolic" and ours.train_config == {}
    assert torch.equal(ours.encode_image(images), model.encode_image(images))
    assert torch.equal(ours.encode_text(tokens), model.encode_text(tokens))


def test_a_conversion_never_overwrites_a_file(tmp_path):
    torch.save(small("clip").state_dict(), tmp_path / "theirs.pt")
    (tmp_path / "ours.pt").write_text("precious")
    with pytest.raises(ValueError, match="already exists"):
        convert.convert(tmp_path / "theirs.pt", tmp_path / "ours.pt", "clip")
    assert (tmp_path / "ours.pt").read_text() == "precious"


def test_a_checkpoint_of_this_project_needs_no_conversion(tmp_path):
    save_ours(tmp_path / "ckpt.pt", small())
    with pytest.raises(ValueError, match="checkpoint of this project"):
        convert.convert(tmp_path / "ckpt.pt", tmp_path / "other.pt", "euclidean")
