"""evaluate.py: metrics by hand, ties, folders and JSON files, the way to the root, the command."""

import csv
import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from common import ROOT, data, encoded, photo, save_ours, small
from PIL import Image

import evaluate
from geometry import GEOMETRIES

# ------------------------------------------------------------------------------------------------
# metrics


def inner(x, y):
    return x @ y.T


def test_recall_by_hand():
    """Three pictures, four captions: 0 and 1 are of picture 0, 2 of picture 1, 3 of picture 2."""
    images = torch.eye(3)
    texts = torch.tensor([[0.9, 0, 0], [0.1, 0.5, 0], [0, 0.4, 0.6], [0, 0.7, 0.3]])
    m = evaluate.retrieval_metrics(inner, images, texts, torch.tensor([0, 0, 1, 2]))
    # the nearest captions of the pictures are 0 (right), 3 and 2
    assert m["i2t_r1"] == pytest.approx(1 / 3)
    # the nearest pictures of the captions are 0 (right), 1, 2 and 1
    assert m["t2i_r1"] == pytest.approx(1 / 4)
    assert m["mean_r1"] == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert m["i2t_r5"] is None and m["t2i_r5"] is None  # there are no five to choose from
    assert m["chance"]["t2i_r1"] == pytest.approx(1 / 3)
    assert m["chance"]["i2t_r1"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)


def test_recall_equals_a_sorted_list_on_ragged_captions():
    """Pictures with 0, 1, 5 and 7 captions. One without a caption is a candidate, but no query."""
    torch.manual_seed(0)
    counts = torch.tensor([0, 1, 5, 7] * 5)
    owner = torch.arange(20).repeat_interleave(counts)
    images, texts = torch.randn(20, 6), torch.randn(len(owner), 6)
    m = evaluate.retrieval_metrics(inner, images, texts, owner)
    texts_of = (images @ texts.T).argsort(1, descending=True)
    images_of = (texts @ images.T).argsort(1, descending=True)
    for k in (1, 5, 10):
        i2t = [bool((owner[texts_of[i, :k]] == i).any()) for i in range(20) if counts[i]]
        t2i = [bool((images_of[j, :k] == owner[j]).any()) for j in range(len(owner))]
        assert m[f"i2t_r{k}"] == pytest.approx(sum(i2t) / 15)
        assert m[f"t2i_r{k}"] == pytest.approx(sum(t2i) / 65)


def test_chance_is_the_mean_over_all_draws():
    owner = torch.tensor([0, 1, 1, 1, 2, 2])
    chance = evaluate.retrieval_metrics(inner, torch.eye(3), torch.ones(6, 3), owner)["chance"]
    for k in (1, 5):
        draws = [owner[list(draw)] for draw in itertools.combinations(range(6), k)]
        found = [len(draw.unique()) / 3 for draw in draws]  # the part of the pictures in a draw
        assert chance[f"i2t_r{k}"] == pytest.approx(sum(found) / len(draws))


def test_blocks_of_rows_count_what_one_block_counts():
    torch.manual_seed(0)
    queries, candidates = torch.randn(50, 4), torch.randn(150, 4)

    def is_match(i, j):
        return j % 50 == i

    counts = [
        evaluate.wrong_before_right(inner, queries, candidates, is_match, block)
        for block in (1, 7, 50, 1024)
    ]
    assert all(torch.equal(c, counts[0]) for c in counts[1:])


def test_ties_count_against_the_model():
    same, each = torch.ones(6, 3), torch.arange(6)
    m = evaluate.retrieval_metrics(inner, same, same, each)
    assert m["i2t_r1"] == m["i2t_r5"] == m["t2i_r1"] == m["t2i_r5"] == 0
    assert evaluate.zero_shot_metrics(inner, same, same, each)["top1"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_not_finite_are_refused(value):
    model = small()
    with torch.no_grad():
        model.visual.proj[0, 0] = model.text_projection[0, 0] = value
    with pytest.raises(ValueError, match="2 of 2 image embeddings are not finite"):
        evaluate.embed_images(model, range(2))
    with pytest.raises(ValueError, match="1 of 1 text embeddings are not finite"):
        evaluate.embed_texts(model, ["a red circle"])


def test_zero_shot_by_hand_and_no_top5_below_five_classes():
    images = torch.eye(3)[[0, 0, 1, 2]]
    m = evaluate.zero_shot_metrics(inner, images, torch.eye(3), torch.tensor([0, 1, 1, 2]))
    assert (m["top1"], m["top5"], m["classes"]) == (0.75, None, 3)
    assert m["mean_per_class_recall"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert m["chance"] == {"top1": 1 / 3, "top5": None, "mean_per_class_recall": 1 / 3}


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range_are_refused(label):
    with pytest.raises(ValueError, match="3 classes"):
        evaluate.zero_shot_metrics(inner, torch.eye(3), torch.eye(3), torch.tensor([0, 1, label]))


# ------------------------------------------------------------------------------------------------
# embeddings


def test_embeddings_do_not_depend_on_batches_or_workers_and_the_model_stays_as_it_was():
    model = small("hyperbolic").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ways = [{"batch_size": 1}, {"batch_size": 7}, {"batch_size": 64, "workers": 2}]
    images = [evaluate.embed_images(model, range(20), **way)[0] for way in ways]
    strings = ["a", "some longer text", ""] * 5
    texts = [evaluate.embed_texts(model, strings, way["batch_size"]) for way in ways]
    assert evaluate.embed_texts(model, []).shape == (0, model.config.embed_dim)
    for x in (images, texts):
        torch.testing.assert_close(x[1], x[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(x[2], x[0], rtol=1e-5, atol=1e-6)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_class_embeddings_are_means_of_their_prompts(geometry):
    model = small(geometry)
    classes = evaluate.embed_classes(model, ["red", "blue"], ["a {}", "the {}!"])
    mean = evaluate.embed_texts(model, ["a blue", "the blue!"]).mean(0)
    torch.testing.assert_close(classes[1], mean / mean.norm() if geometry == "clip" else mean)


# ------------------------------------------------------------------------------------------------
# folders and JSON files


def run(path, *flags):
    """evaluate.py with these flags -> what it writes as JSON."""
    out = path.with_suffix(".json")
    flags = [*map(str, flags), "--json", str(out), "--workers", "0", "--device", "cpu"]
    evaluate.run(evaluate.parse_args([str(path), *flags]))
    return json.loads(out.read_text())


def metrics(result):
    return {name: value for name, value in result.items() if name != "protocol"}


@pytest.fixture
def checkpoint(tmp_path):
    save_ours(tmp_path / "ckpt.pt", small("hyperbolic"))
    return tmp_path / "ckpt.pt"


@pytest.fixture
def classes(tmp_path):
    """Three pictures in each of two class folders."""
    folder = tmp_path / "classes"
    for name, colour in (("b_red", "red"), ("a_blue", "blue")):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40 + i, 40), colour).save(folder / name / f"{i}.png")
    return folder


def test_class_folders_are_sorted_and_the_first_and_last_names_are_printed(classes, capsys):
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        (classes / hidden).mkdir()
        photo(20, 20).save(classes / hidden / "0.png")
    items, labels, names, templates = evaluate.class_folders(classes)
    assert names == ["a blue", "b red"] and labels == [0, 0, 0, 1, 1, 1]
    assert ["a_blue" in item for item in items] == [True] * 3 + [False] * 3
    assert templates == evaluate.PROMPTS
    (classes.parent / "names.txt").write_text("sea\nrose\n")
    evaluate.class_folders(classes, classes.parent / "names.txt")
    printed = capsys.readouterr().out
    assert "a_blue is 'sea'" in printed and "b_red is 'rose'" in printed


def test_names_templates_and_folders_that_do_not_fit_are_refused(classes, tmp_path):
    (tmp_path / "list.txt").write_text("one\n")
    with pytest.raises(ValueError, match="1 names .* 2 folders"):
        evaluate.class_folders(classes, tmp_path / "list.txt")
    for content in ("a photo\n", "a {}\na photo\n", ""):
        (tmp_path / "list.txt").write_text(content)
        with pytest.raises(ValueError, match="template"):
            evaluate.class_folders(classes, templates=tmp_path / "list.txt")
    (classes / "c_empty").mkdir()
    with pytest.raises(ValueError, match="c_empty"):
        evaluate.class_folders(classes)
    with pytest.raises(ValueError, match="no class folders"):
        evaluate.class_folders(classes / "c_empty")


def write_karpathy(path, *entries, **more):
    """(filename, split, *captions) each -> a file as Karpathy's."""
    images = []
    for filename, split, *captions in entries:
        sentences = [{"raw": caption} for caption in captions]
        images.append({"filename": filename, "split": split, "sentences": sentences} | more)
    path.write_text(json.dumps({"images": images}))
    return path


def test_a_karpathy_split_has_any_number_of_captions_per_picture(classes):
    entries = [("0.png", "test", "x", "y"), ("1.png", "test"), ("2.png", "train", "z"),
               ("2.png", "test", "w")]  # fmt: skip
    path, blue = write_karpathy(classes / "k.json", *entries), classes / "a_blue"
    items, captions, owner = evaluate.karpathy_split(path, blue, "test")
    assert items == [str(blue / f"{i}.png") for i in range(3)]
    assert captions == ["x", "y", "w"] and owner == [0, 0, 2]
    with_folder = write_karpathy(classes / "coco.json", *entries, filepath="a_blue")
    for folder in (classes, blue):  # COCO's pictures lie in a subfolder, or were moved out of it
        assert evaluate.karpathy_split(with_folder, folder, "test")[0] == items
    with pytest.raises(ValueError, match="split 'val'"):
        evaluate.karpathy_split(path, blue, "val")
    (blue / "1.png").unlink()
    with pytest.raises(ValueError, match="1 of 3 pictures are not there.*1.png"):
        evaluate.karpathy_split(path, blue, "test")


@pytest.mark.parametrize("entry", [
    "marked", None, ["marked"], {"filename": "marked"},
    {"filename": "marked", "split": "test", "sentences": None},
    {"filename": "marked", "split": "test", "sentences": ["a dog"]},
    {"filename": "marked", "split": "test", "sentences": [{"raw": 7}]},
    {"filename": ["marked"], "split": "test", "sentences": [{"raw": "a dog"}]},
    {"filename": "marked", "split": ["test"], "sentences": [{"raw": "a dog"}]},
])  # fmt: skip
def test_a_karpathy_entry_of_another_type_is_refused_by_name(entry, tmp_path):
    (tmp_path / "k.json").write_text(json.dumps({"images": [entry]}))
    with pytest.raises(ValueError, match="null" if entry is None else "marked"):
        evaluate.karpathy_split(tmp_path / "k.json", tmp_path, "test")


@pytest.mark.parametrize("content", ["", "[]", "7", '{"image": []}', '{"images": 7}'])
def test_a_json_file_that_is_not_karpathys_is_refused(content, tmp_path):
    (tmp_path / "k.json").write_text(content)
    with pytest.raises(ValueError, match="k.json"):
        evaluate.karpathy_split(tmp_path / "k.json", tmp_path, "test")


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows])
    return path


def test_five_rows_of_a_picture_give_the_figures_of_the_same_karpathy_json(checkpoint):
    folder, entries, rows = checkpoint.parent, [], []
    for i in range(6):
        photo(32, 32, seed=i).save(folder / f"{i}.png")
        captions = [f"{word} {i}" for word in ("a", "one", "the", "my", "no")]
        entries.append((f"{i}.png", "test", *captions))
    for word in range(5):  # the rows of a picture need not stand together
        rows += [(entry[0], entry[2 + word]) for entry in entries]
    path = write_karpathy(folder / "k.json", *entries)
    from_json = run(checkpoint, "--retrieval", path, "--images", folder)["retrieval"]
    from_csv = run(checkpoint, "--val_data", write_csv(folder / "five.csv", rows))["retrieval"]
    assert from_csv == from_json
    assert from_csv["protocol"].startswith("6 pictures, 30 captions")
    assert from_csv["i2t_r10"] is not None and from_csv["t2i_r10"] is None


def test_what_cannot_be_used_is_left_out_and_counted(checkpoint, capsys):
    """A picture cut in half, one that is not there, and a row without caption."""
    folder, rows = checkpoint.parent, []
    for i in range(6):
        photo(32, 32, seed=i).save(folder / f"{i}.png")
        rows.append((f"{i}.png", f"picture {i}"))
    whole = run(checkpoint, "--val_data", write_csv(folder / "whole.csv", rows))["retrieval"]
    file = encoded(photo(64, 64))
    (folder / "broken.png").write_bytes(file[: len(file) // 2])
    damaged = [("broken.png", "cut off"), ("absent.png", "not there"), ("0.png", ""), *rows]
    result = run(checkpoint, "--val_data", write_csv(folder / "damaged.csv", damaged))["retrieval"]
    assert metrics(result) == metrics(whole)
    printed = capsys.readouterr().out
    assert "left out: 1 no caption, 2 unreadable" in printed and result["protocol"] in printed
    (folder / "none.csv").write_text("filepath,title\nbroken.png,cut off\n")
    with pytest.raises(ValueError, match="none of 1 pictures can be read"):
        run(checkpoint, "--val_data", folder / "none.csv")


def test_labels_stay_with_their_pictures_when_one_cannot_be_read(checkpoint, classes):
    before = run(checkpoint, "--classification", classes)["zero_shot"]
    (classes / "a_blue" / "00.png").write_bytes(b"no picture")
    after = run(checkpoint, "--classification", classes)["zero_shot"]
    assert metrics(after) == metrics(before) and "left out: 1 unreadable" in after["protocol"]


# ------------------------------------------------------------------------------------------------
# the hierarchy


def model_of(geometry, logit=None, **train_config):
    """The tests of this section bring their own embeddings: only its geometry matters."""
    model = small(geometry, logit=logit)
    model.train_config = train_config
    return model


def test_a_way_to_the_root_by_hand():
    """From radius 4 to 0 the nearest captions of those at 0.5, 2 and 6.1 on the same ray are that
    at 2, that at 0.5 below radius 1.25, and the root below 0.25. Captions aside are never met."""
    texts = torch.tensor([[0.5, 0.0], [2.0, 0.0], [6.1, 0.0], [0.0, 1.0]])
    (way,) = evaluate.traverse(model_of("euclidean"), torch.tensor([[4.0, 0.0]]), texts)
    radii = [4 * (1 - step / 49) for step in range(50)]
    below_125 = sum(radius > 1.25 for radius in radii)
    below_025 = sum(radius > 0.25 for radius in radii)
    assert way == [(0, 1), (below_125, 0), (below_025, 4)]


def brute_force_way(geometry, logit, image, texts, root, K):
    way = {}
    for step in range(50):
        point = geometry.project(image + step / 49 * (root - image))[None]
        similarity = geometry.similarity(point, texts, logit)[0]
        inside = [True] * len(texts)
        if K is not None:
            inside = geometry.entailment_loss(texts, point, K) == 0
        candidates = [(similarity[i].item(), i) for i in range(len(texts)) if inside[i]]
        end = geometry.project(root)[None]
        candidates.append((geometry.similarity(point, end, logit).item(), len(texts)))
        way.setdefault(max(candidates)[1], step)
    return [(step, text) for text, step in way.items()]


LOGITS = []
for name, geometry in GEOMETRIES.items():
    LOGITS += [(name, logit) for logit in geometry.logits]


@pytest.mark.parametrize("name, logit", LOGITS)
def test_traversal_equals_brute_force(name, logit):
    torch.manual_seed(0)
    geometry = GEOMETRIES[name]
    images = geometry.project(3 * torch.randn(3, 3, dtype=torch.float64))
    texts = geometry.project(torch.randn(70, 3, dtype=torch.float64))
    root = torch.cat([images, texts]).mean(0) if name == "clip" else torch.zeros(3).double()
    for K in (None, 0.5) if geometry.cones else (None,):
        found = evaluate.traverse(model_of(name, logit), images, texts, K)
        for image, way in zip(images, found):
            assert way == brute_force_way(geometry, logit, image, texts, root, K)
        assert any(len(way) > 2 for way in found) or logit == "inner"


def test_the_cones_of_a_traversal_are_those_of_the_end_of_the_training():
    falling = {"entailment_weight": 0.2, "min_radius": 0.3, "final_min_radius": 0.1}
    assert evaluate.last_min_radius(model_of("euclidean", **falling)) == 0.1
    constant = {"entailment_weight": 0.2, "min_radius": 0.3, "final_min_radius": None}
    assert evaluate.last_min_radius(model_of("hyperbolic", **constant)) == 0.3
    without = constant | {"entailment_weight": 0.0}
    assert evaluate.last_min_radius(model_of("euclidean", **without)) is None
    assert evaluate.last_min_radius(model_of("clip")) is None


EAST, NORTH = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


def test_hierarchy_by_hand():
    """Two pictures at radius 4 in the east and in the north. Their general caption and the middle
    one of the east lie between them, so near the root that their cones are half-spaces and hold
    both. The middle one of the north, at 5, is wrong: beyond the specific one and the picture."""
    images, between = torch.stack([4 * EAST, 4 * NORTH]), EAST + NORTH
    general = torch.stack([0.03 * between, 0.03 * between])
    middle, specific = torch.stack([0.06 * between, 5 * NORTH]), torch.stack([3 * EAST, 2 * NORTH])
    texts = torch.stack([general, middle, specific])
    h = evaluate.hierarchy_metrics(model_of("euclidean", min_radius=0.1), images, texts)
    root2 = math.sqrt(2)
    assert h["text_radius"] == pytest.approx([0.03 * root2, (0.06 * root2 + 5) / 2, 2.5])
    assert h["image_radius"] == pytest.approx(4) and h["general_nearer"] == pytest.approx(3 / 4)
    assert h["own_in_cone"] == [1, 0.5, 1] and h["other_in_cone"] == [1, 0.5, 0]


def test_the_sphere_has_radii_but_no_cones():
    north = torch.stack([NORTH, NORTH])
    h = evaluate.hierarchy_metrics(model_of("clip"), torch.stack([EAST, EAST]), north[None])
    # the root lies halfway: 45 degrees, and the scaled cosine distance is (1 - cos) / 2
    assert h["text_radius"] == pytest.approx([(1 - math.sqrt(0.5)) / 2])
    assert h["image_radius"] == pytest.approx(h["text_radius"][0])
    assert h["own_in_cone"] is None and h["other_in_cone"] is None


def test_held_out_captions_are_a_hierarchy_of_true_descriptions(few_held_out):
    _, captions, _, _ = data.held_out_pairs("shapes")
    chains = data.held_out_levels()
    assert [chain[-1] for chain in chains] == captions
    for general, middle, two, three, full in chains:
        assert general == "a shape" and full.startswith(three)
        assert two.split()[1:] == three.split()[2:] and middle.split()[1] in two.split()
    images, texts = evaluate.embed_hierarchy(small())
    assert len(images) == 48 and texts.shape[:2] == (5, 48)


# ------------------------------------------------------------------------------------------------
# the command

RECALLS = ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"]


def test_the_command_prints_tables_with_chance_and_writes_json(tmp_path):
    save_ours(tmp_path / "ckpt.pt", small("euclidean"))
    command = [sys.executable, ROOT / "evaluate.py", tmp_path / "ckpt.pt"]
    command += ["--json", tmp_path / "r.json"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("chance %") == 3 and "euclidean/squared" in done.stdout
    assert "480 pictures, 48 classes" in done.stdout and "hierarchy" in done.stdout
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["zero_shot"]["classes"] == 48 and 0 <= result["zero_shot"]["top1"] <= 1
    assert all(0 <= result["retrieval"][name] <= 1 for name in RECALLS)
    assert f"{100 * result['retrieval']['i2t_r10']:8.1f}" in done.stdout
    assert set(result["hierarchy"]) >= {"text_radius", "image_radius", "general_nearer"}


def test_json_has_null_where_a_figure_is_undefined(checkpoint, classes):
    result = run(checkpoint, "--classification", classes)
    assert result["zero_shot"]["top1"] is not None
    assert (result["zero_shot"]["top5"], result["zero_shot"]["classes"]) == (None, 2)
    assert result["retrieval"] == dict.fromkeys(RECALLS)


def test_the_data_of_its_training_is_what_a_model_is_evaluated_on():
    assert evaluate.held_out_source({"data": "shapes"}) == "shapes"
    assert evaluate.held_out_source({"data": "shapes", "val_data": "mine"}) == "mine"
    assert evaluate.held_out_source({"data": "mine", "val_data": None}) is None
    assert evaluate.held_out_source({}) is None  # a checkpoint of others


def command(monkeypatch, *flags):
    """evaluate.py as a program, in this process -> its exit status."""
    flags = [*map(str, flags), "--workers", "0", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    try:
        evaluate.main()
    except SystemExit as end:
        return end.code
    return 0


def test_a_checkpoint_without_held_out_data_is_refused(tmp_path, monkeypatch, capsys):
    save_ours(tmp_path / "ckpt.pt", small(), data="pairs.csv", val_data=None)
    assert command(monkeypatch, tmp_path / "ckpt.pt") == 2
    assert "--retrieval" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [
    "--query x", "--retrieval x", "--images x", "--traverse x", "--captions x", "--classnames x",
    "--templates x", "--val_data x --classification x", "--val_data x --retrieval x --images x",
])  # fmt: skip
def test_flags_that_need_each_other(flags, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.parse_args(["ckpt.pt", *flags.split()])
    assert end.value.code == 2 and flags.split()[0] in capsys.readouterr().err


@pytest.fixture
def photos(tmp_path):
    """A folder of three pictures, a broken one, and one that is hidden."""
    folder = tmp_path / "photos"
    (folder / ".cache").mkdir(parents=True)
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (40, 30), colour).save(folder / f"{colour}.png")
    Image.new("RGB", (40, 30), "pink").save(folder / ".cache" / "pink.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def test_a_query_finds_the_nearest_pictures_of_a_folder(checkpoint, photos):
    query = run(checkpoint, "--query", "a red circle", "--images", photos)["query"]
    model = evaluate.load_model(checkpoint)
    expected = []
    for name in ("red.png", "green.png", "blue.png"):
        image = model.encode_image(data.load_image(photos / name, 16)[None])
        text = model.encode_text(data.tokenize("a red circle", "bytes", 24))
        expected.append((model.similarity(text, image).item(), str(photos / name)))
    expected.sort(reverse=True)
    assert [path for path, _ in query["nearest"]] == [path for _, path in expected]
    found = [similarity for _, similarity in query["nearest"]]
    assert found == pytest.approx([similarity for similarity, _ in expected], abs=1e-5)
    assert "in 3 pictures" in query["protocol"] and "1 unreadable" in query["protocol"]
    (photos.parent / "none").mkdir()
    for folder in ("none", "absent"):
        with pytest.raises(ValueError, match="no pictures in"):
            run(checkpoint, "--query", "x", "--images", photos.parent / folder)


def test_traverse_prints_the_captions_from_each_picture_to_the_root(checkpoint, photos, capsys):
    captions = photos.parent / "captions.txt"
    captions.write_text("a red thing\n\na thing\na thing\n")
    flags = ["--traverse", photos / "red.png", photos / "broken.jpg", "--captions", captions]
    result = run(checkpoint, *flags)["traversal"]
    assert list(result["retrieved"]) == [str(photos / "red.png")]
    (way,) = result["retrieved"].values()
    assert way[-1][1] == "[ROOT]" and {c for _, c in way} <= {"a red thing", "a thing", "[ROOT]"}
    printed = capsys.readouterr().out
    assert "2 captions" in printed and "1 unreadable" in printed and "[ROOT]" in printed
    captions.write_text("\n")
    with pytest.raises(ValueError, match="no captions"):
        run(checkpoint, *flags)


def test_min_radius_chooses_the_cones_of_a_traversal(checkpoint, photos, monkeypatch, capsys):
    def behind_a_red_thing_and_a_little_beside_it(model, items, **loading):
        text, other = evaluate.embed_texts(model, ["a red thing", "something else"])
        return (3 * text + 0.3 * other)[None], [0]

    monkeypatch.setattr(evaluate, "embed_images", behind_a_red_thing_and_a_little_beside_it)
    (photos.parent / "captions.txt").write_text("a red thing\na thing\n")
    flags = ["--traverse", photos / "red.png", "--captions", photos.parent / "captions.txt"]
    for K, met in (("0", True), ("100", True), ("1e-06", False)):  # none, half-spaces, needles
        (way,) = run(checkpoint, *flags, "--min_radius", K)["traversal"]["retrieved"].values()
        assert (len(way) > 1) is met
        assert ("cone" in capsys.readouterr().out) is (K != "0")
    for K in ("-1", "nan", "inf"):
        with pytest.raises(SystemExit):
            run(checkpoint, *flags, "--min_radius", K)


def test_names_that_are_not_utf8_are_printed_with_escapes(checkpoint, photos, monkeypatch, capsys):
    """Linux takes any bytes as the name of a file, and Latin-1 ones are about."""
    (photos / "red.png").rename(photos / os.fsdecode(b"caf\xe9.png"))
    flags = ["--query", "x", "--images", photos, "--json", photos.parent / "r.json"]
    assert command(monkeypatch, checkpoint, *flags) == 0
    assert r"caf\udce9.png" in capsys.readouterr().out
    nearest = json.loads((photos.parent / "r.json").read_text())["query"]["nearest"]
    assert os.fsdecode(b"caf\xe9.png") in {os.path.basename(path) for path, _ in nearest}
