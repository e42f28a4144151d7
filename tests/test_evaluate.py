"""evaluate.py: metrics by hand and by brute force, ties, equal images and equal captions, class
folders and Karpathy JSONs, paths to the root, the command."""

import csv
import io
import itertools
import json
import math
import os
import random
import re
import sys

import pytest
import torch
from common import data, encoded, photo, run_train, save_ours, shapes, small, status_of, write_tar
from PIL import Image

import evaluate
from geometry import GEOMETRIES

# ------------------------------------------------------------------------------------------------
# metrics


def inner(x, y):
    return x @ y.T


def test_recall_by_hand():
    """Three images, four captions: 0 and 1 belong to image 0, 2 to image 1, 3 to image 2."""
    images = torch.eye(3)
    texts = torch.tensor([[0.9, 0, 0], [0.1, 0.5, 0], [0, 0.4, 0.6], [0, 0.7, 0.3]])
    m = evaluate.retrieval_metrics(inner, images, texts, torch.tensor([0, 0, 1, 2]))
    # the nearest captions of the images are 0 (right), 3 and 2
    assert m["i2t_r1"] == pytest.approx(1 / 3)
    # the nearest images of the captions are 0 (right), 1, 2 and 1
    assert m["t2i_r1"] == pytest.approx(1 / 4)
    assert m["mean_r1"] == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert m["i2t_r5"] is None and m["t2i_r5"] is None  # there are fewer than five candidates
    assert m["chance"]["t2i_r1"] == pytest.approx(1 / 3)
    assert m["chance"]["i2t_r1"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)


def ragged_pairs(images, texts):
    """Images with 0, 1, 3 and 7 captions in turn, drawn at random, so captions have any number of
    images, too -> int64 (P, 2)."""
    rng, pairs = random.Random(0), []
    for i in range(images):
        pairs += [(i, text) for text in rng.sample(range(texts), (0, 1, 3, 7)[i % 4])]
    rng.shuffle(pairs)
    return torch.tensor(pairs)


def test_wrong_before_right_equals_brute_force_in_both_directions():
    """Similarities are small integers, so there are many ties, which count as wrong."""
    torch.manual_seed(0)
    images, texts = torch.randint(-2, 3, (20, 3)).float(), torch.randint(-2, 3, (30, 3)).float()
    pairs = ragged_pairs(20, 30)
    ties = 0
    for queries, candidates, matches in ((images, texts, pairs), (texts, images, pairs.flip(1))):
        found = evaluate.wrong_before_right(inner, queries, candidates, matches)
        assert found.dtype == torch.int64 and found.shape == (len(queries),)
        for q, query in enumerate(queries):
            right = [c for i, c in matches.tolist() if i == q]
            if not right:
                continue
            similarity = [(query @ candidate).item() for candidate in candidates]
            best = max(similarity[c] for c in right)
            wrong = [s for c, s in enumerate(similarity) if c not in right]
            assert found[q] == sum(s >= best for s in wrong)
            ties += best in wrong
    assert ties > 10


def test_recall_equals_a_sorted_list_on_ragged_pairs():
    """Images and captions without a partner are candidates, but no queries."""
    torch.manual_seed(0)
    images, texts, pairs = torch.randn(20, 6), torch.randn(40, 6), ragged_pairs(20, 40)
    m = evaluate.retrieval_metrics(inner, images, texts, pairs)
    for name, queries, candidates, matches in (
        ("i2t", images, texts, pairs.tolist()), ("t2i", texts, images, pairs.flip(1).tolist()),
    ):
        nearest = (queries @ candidates.T).argsort(1, descending=True).tolist()
        asked = {query for query, _ in matches}
        assert len(asked) < len(queries)
        for k in (1, 5, 10):
            found = [any([q, c] in matches for c in nearest[q][:k]) for q in asked]
            assert m[f"{name}_r{k}"] == pytest.approx(sum(found) / len(asked))


def test_chance_is_the_mean_over_all_choices_in_both_directions():
    """The last image and the last caption have no partner. They are candidates, but no queries."""
    pairs = torch.tensor([(0, 0), (1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (0, 5), (3, 5), (4, 5)])
    m = evaluate.retrieval_metrics(inner, torch.ones(6, 3), torch.ones(7, 3), pairs)
    for name, candidates, matches in (("i2t", 7, pairs), ("t2i", 6, pairs.flip(1))):
        queries = matches[:, 0].unique().tolist()
        for k in (1, 5):
            found = []
            for choice in itertools.combinations(range(candidates), k):
                hit = {q for q, c in matches.tolist() if c in choice}
                found.append(len(hit) / len(queries))
            assert m["chance"][f"{name}_r{k}"] == pytest.approx(sum(found) / len(found))


def test_blocks_of_queries_count_what_a_single_query_counts():
    torch.manual_seed(0)
    queries, candidates = torch.randn(2500, 4), torch.randn(7, 4)
    matches = torch.stack([torch.arange(2500), torch.randint(7, (2500,))], dim=1)
    counts = evaluate.wrong_before_right(inner, queries, candidates, matches)
    for q in (0, 1023, 1024, 2047, 2048, 2499):
        match = torch.tensor([[0, matches[q, 1]]])
        alone = evaluate.wrong_before_right(inner, queries[q : q + 1], candidates, match)
        assert counts[q] == alone[0]


def test_with_many_candidates_a_block_has_few_queries():
    """Four million candidates: a block has four queries, not a thousand."""
    sizes, candidates = [], torch.arange(2**22).float()[:, None]

    def similarity(x, y):
        sizes.append(len(x) * len(y))
        return x @ y.T

    matches = torch.tensor([[q, 2**22 - 1 - q] for q in range(6)])
    counts = evaluate.wrong_before_right(similarity, torch.ones(6, 1), candidates, matches)
    assert counts.tolist() == [0, 1, 2, 3, 4, 5]
    assert max(sizes) <= 2**24 and len(sizes) == 2


def test_ties_count_against_the_model():
    same, each = torch.ones(6, 3), torch.arange(6)
    m = evaluate.retrieval_metrics(inner, same, same, each)
    assert m["i2t_r1"] == m["i2t_r5"] == m["t2i_r1"] == m["t2i_r5"] == 0
    assert evaluate.zero_shot_metrics(inner, same, same, each)["top1"] == 0


def test_zero_shot_by_hand_and_without_top5_for_three_classes():
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


def drawn(n):
    return [shapes.held_out_image(i) for i in range(n)]


def test_embeddings_do_not_depend_on_batches_or_workers_and_the_model_stays_as_it_was():
    model = small("hyperbolic").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = [{"batch_size": 1}, {"batch_size": 7}, {"batch_size": 64, "workers": 2}]
    images = [evaluate.embed_images(model, drawn(20), **loading)[0] for loading in settings]
    strings = ["a", "some longer text", ""] * 5
    texts = [evaluate.embed_texts(model, strings, s["batch_size"]) for s in settings]
    assert evaluate.embed_texts(model, []).shape == (0, model.config.embed_dim)
    for x in (images, texts):
        torch.testing.assert_close(x[1], x[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(x[2], x[0], rtol=1e-5, atol=1e-6)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_not_finite_are_refused(value):
    model = small()
    with torch.no_grad():
        model.visual.proj[0, 0] = model.text_projection[0, 0] = value
    with pytest.raises(ValueError, match="2 of 2 image embeddings are not finite"):
        evaluate.embed_images(model, drawn(2))
    with pytest.raises(ValueError, match="1 of 1 text embeddings are not finite"):
        evaluate.embed_texts(model, ["a red circle"])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_class_embeddings_are_means_of_their_prompts(geometry):
    model = small(geometry)
    classes = evaluate.embed_classes(model, ["red", "blue"], ["a {}", "the {}!"])
    mean = evaluate.embed_texts(model, ["a blue", "the blue!"]).mean(0)
    torch.testing.assert_close(classes[1], mean / mean.norm() if geometry == "clip" else mean)


# ------------------------------------------------------------------------------------------------
# equal images and equal captions


def run(path, *flags):
    """evaluate.py with these flags -> what it writes as JSON."""
    out = path.with_suffix(".json")
    flags = [*map(str, flags), "--json", str(out), "--workers", "0", "--device", "cpu"]
    evaluate.run(evaluate.parse_args([str(path), *flags]))
    return json.loads(out.read_text())


def metrics(result):
    return {name: value for name, value in result.items() if name != "protocol"}


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_ours(tmp_path / "ckpt.pt", small("hyperbolic"))
    return tmp_path / "ckpt.pt"


def write_karpathy(path, *entries, **more):
    """[(filename, split, *captions)] -> a Karpathy JSON; returns its path."""
    images = []
    for filename, split, *captions in entries:
        sentences = [{"raw": caption} for caption in captions]
        images.append({"filename": filename, "split": split, "sentences": sentences} | more)
    path.write_text(json.dumps({"images": images}))
    return path


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows])
    return path


@pytest.fixture
def coco(tmp_path):
    """Twelve images with five captions each -> their folder, [(filename, captions)]."""
    (tmp_path / "coco").mkdir()
    entries = []
    for i in range(12):
        name = f"COCO_val2014_{i:012}.jpg"
        photo(40, 32 + i, seed=i).save(tmp_path / "coco" / name)
        captions = [f"{word} {i}" for word in ("a", "one", "the", "my", "no")]
        entries.append((name, captions))
    return tmp_path / "coco", entries


def coco_json(folder, entries):
    return [(name, "test", *captions) for name, captions in entries]


def json_entry_per_image(folder, entries):
    path = write_karpathy(folder.parent / "images.json", *coco_json(folder, entries))
    return ["--retrieval", path, "--images", folder]


def json_entry_per_caption(folder, entries):
    rows = []
    for name, captions in entries:
        rows += [(name, "test", caption) for caption in captions]
    path = write_karpathy(folder.parent / "captions.json", *rows)
    return ["--retrieval", path, "--images", folder]


def folder_with_five_lines(folder, entries):
    for name, captions in entries:
        (folder / name).with_suffix(".txt").write_text("\n".join(captions) + "\n")
    return ["--val_data", folder]


def shard_sample_per_caption(folder, entries):
    """As img2dataset writes COCO."""
    members = []
    for name, captions in entries:
        for caption in captions:
            key, image = f"{len(members) // 3:09}", (folder / name).read_bytes()
            members += [(f"{key}.jpg", image), (f"{key}.txt", caption.encode())]
            members.append((f"{key}.json", json.dumps({"caption": caption, "key": key}).encode()))
    return ["--val_data", write_tar(folder.parent / "rows.tar", members)]


def csv_with_two_spellings(folder, entries):
    """The rows of an image are not adjacent, and every other one spells its path differently."""
    rows = []
    for i in range(5):
        start = "coco" if i % 2 else "../" + folder.parent.name + "/coco"
        rows += [(f"{start}/{name}", captions[i]) for name, captions in entries]
    return ["--val_data", write_csv(folder.parent / "rows.csv", rows)]


FORMS = [json_entry_per_caption, folder_with_five_lines, shard_sample_per_caption,
         csv_with_two_spellings]
SEVEN = ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "mean_r1"]


@pytest.mark.parametrize("form", FORMS)
def test_the_same_data_in_any_form_give_the_metrics_of_its_karpathy_json(checkpoint, coco, form):
    expected = run(checkpoint, *json_entry_per_image(*coco))["retrieval"]
    found = run(checkpoint, *form(*coco))["retrieval"]
    assert [found[name] for name in SEVEN] == [expected[name] for name in SEVEN]
    assert found["chance"] == expected["chance"]
    assert any(0 < expected[name] < 1 for name in SEVEN)
    for result in (expected, found):
        assert result["protocol"].startswith("12 images, 60 captions")


PURE = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture
def perfect(monkeypatch):
    """A model that embeds an image as its colour, and a text as the colour that it names."""

    def embed_images(model, images, **loading):
        colours = [data.load_image(image, 8).float().mean((1, 2)) for image in images]
        return torch.stack(colours), list(range(len(images)))

    def embed_texts(model, texts, **loading):
        return torch.tensor([PURE[text.split()[-1]] for text in texts]).float()

    monkeypatch.setattr(evaluate, "embed_images", embed_images)
    monkeypatch.setattr(evaluate, "embed_texts", embed_texts)


def test_a_perfect_model_scores_1_if_many_images_have_the_same_caption(checkpoint, perfect):
    """Twelve different images of three colours, as of CIFAR's classes."""
    rows, folder = [], checkpoint.parent
    for i in range(12):
        colour = list(PURE)[i % 3]
        Image.new("RGB", (20 + i, 20), colour).save(folder / f"{i}.png")
        rows.append((f"{i}.png", f"a photo of {colour}"))
    result = run(checkpoint, "--val_data", write_csv(folder / "pairs.csv", rows))["retrieval"]
    assert result["i2t_r1"] == result["t2i_r1"] == result["t2i_r10"] == result["mean_r1"] == 1
    assert result["i2t_r5"] is None  # there are only three captions
    assert result["chance"]["i2t_r1"] == pytest.approx(1 / 3)
    assert result["chance"]["t2i_r1"] == pytest.approx(4 / 12)
    assert result["protocol"].startswith("12 images, 3 captions")


def test_unusable_held_out_samples_are_skipped_and_counted(checkpoint, capsys):
    """An image cut in half, one that does not exist, and a row without caption."""
    folder, rows = checkpoint.parent, []
    for i in range(6):
        photo(32, 32, seed=i).save(folder / f"{i}.png")
        rows.append((f"{i}.png", f"image {i}"))
    whole = run(checkpoint, "--val_data", write_csv(folder / "whole.csv", rows))["retrieval"]
    file = encoded(photo(64, 64))
    (folder / "broken.png").write_bytes(file[: len(file) // 2])
    damaged = [("broken.png", "cut off"), ("absent.png", "not there"), ("0.png", ""), *rows]
    result = run(checkpoint, "--val_data", write_csv(folder / "damaged.csv", damaged))["retrieval"]
    assert metrics(result) == metrics(whole)
    for kind, name in (("unreadable", "broken"), ("FileNotFoundError", "absent"),
                       ("NoCaption", "0")):
        assert re.search(rf"1 {kind} \([^)]*{name}\.png\)", result["protocol"])
    assert result["protocol"] in capsys.readouterr().out
    (folder / "none.csv").write_text("filepath,title\nbroken.png,cut off\n")
    with pytest.raises(ValueError, match="none of 1 images is readable.*broken.png"):
        run(checkpoint, "--val_data", folder / "none.csv")


# ------------------------------------------------------------------------------------------------
# class folders


@pytest.fixture
def classes(tmp_path):
    """Three images in each of two class folders."""
    folder = tmp_path / "classes"
    for name, colour in (("b_red", "red"), ("a_blue", "blue")):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40 + i, 40), colour).save(folder / name / f"{i}.png")
    return folder


def add_images(folder, count=1):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        photo(20, 20, seed=i).save(folder / f"{i}.png")


def test_class_folders_are_sorted_and_the_first_and_last_names_are_printed(classes, capsys):
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        add_images(classes / hidden)
    images, labels, names, templates, skipped = evaluate.class_folders(classes)
    assert names == ["a blue", "b red"] and labels == [0, 0, 0, 1, 1, 1]
    assert ["a_blue" in image for image in images] == [True] * 3 + [False] * 3
    assert templates == evaluate.PROMPTS and not skipped
    (classes.parent / "names.txt").write_text("sea\nrose\n")
    (classes.parent / "templates.txt").write_text("a {}\n")
    files = classes.parent / "names.txt", classes.parent / "templates.txt"
    assert evaluate.class_folders(classes, *files)[2:4] == (["sea", "rose"], ["a {}"])
    printed = capsys.readouterr().out
    assert "a_blue is 'sea'" in printed and "b_red is 'rose'" in printed


def test_folders_with_numbers_as_names_have_numeric_order(tmp_path):
    names = [f"class {i}" for i in range(11)]
    for i in range(11):
        add_images(tmp_path / "val" / str(i), count=1 + i % 2)
    (tmp_path / "names.txt").write_text("\n".join(names))
    images, labels, found, *_ = evaluate.class_folders(tmp_path / "val", tmp_path / "names.txt")
    assert found == names and len(images) == 16
    for image, label in zip(images, labels):
        assert image.split(os.sep)[-2] == str(label)


def test_too_few_or_too_many_names_are_refused_with_both_counts(classes):
    (classes.parent / "names.txt").write_text("sea\nrose\nsun\n")
    with pytest.raises(ValueError, match=r"(?s)3 names.*2 class folders|2 class folders.*3 names"):
        evaluate.class_folders(classes, classes.parent / "names.txt")


@pytest.mark.parametrize("lines", ["\n", "a photo of\n", "a {}\na photo\n"])
def test_templates_without_a_place_for_the_name_are_refused(classes, lines):
    (classes.parent / "templates.txt").write_text(lines)
    with pytest.raises(ValueError, match="templates"):
        evaluate.class_folders(classes, templates=classes.parent / "templates.txt")


def test_a_class_without_images_of_its_own_is_refused_by_name(classes):
    (classes / "c_empty").mkdir()
    with pytest.raises(ValueError, match="c_empty"):
        evaluate.class_folders(classes)
    add_images(classes / "c_empty" / "deeper")
    with pytest.raises(ValueError, match="c_empty"):
        evaluate.class_folders(classes)


def test_the_folder_above_the_class_folders_is_refused_with_its_folders(tmp_path):
    """As imagenet, with train/ and val/ in it."""
    for split in ("train", "val"):
        for name in ("n01", "n02"):
            add_images(tmp_path / split / name)
    with pytest.raises(ValueError, match="train.*val"):
        evaluate.class_folders(tmp_path)


def test_a_single_class_is_refused(tmp_path):
    """As tiny-imagenet's val, where all images are in images/."""
    add_images(tmp_path / "val" / "images", count=3)
    (tmp_path / "val" / "val_annotations.txt").write_text("0.png n01\n")
    with pytest.raises(ValueError, match="1 class folders"):
        evaluate.class_folders(tmp_path / "val")
    with pytest.raises(ValueError, match="0 class folders"):
        evaluate.class_folders(tmp_path / "val" / "images")


def test_two_classes_of_one_name_are_refused_with_that_name(tmp_path):
    for name in ("ant", "bee", "cat", "dog", "polar_bear"):
        add_images(tmp_path / "val" / name)
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ncrane\ncrane\n")  # as in ImageNet
    with pytest.raises(ValueError, match="crane"):
        evaluate.class_folders(tmp_path / "val", tmp_path / "names.txt")
    add_images(tmp_path / "val" / "polar bear")
    with pytest.raises(ValueError, match="polar bear"):
        evaluate.class_folders(tmp_path / "val")


def test_files_that_are_no_images_of_a_class_are_counted_in_the_protocol(checkpoint, classes):
    clean = run(checkpoint, "--classification", classes)["zero_shot"]
    assert "skipped" not in clean["protocol"]
    (classes / "a_blue" / "3.heic").write_bytes(b"an unknown format")
    (classes / "labels.csv").write_text("beside the class folders")
    add_images(classes / "b_red" / "deeper")
    (classes / "a_blue" / ".DS_Store").write_bytes(b"hidden")
    result = run(checkpoint, "--classification", classes)["zero_shot"]
    assert metrics(result) == metrics(clean)
    skipped = result["protocol"].partition("skipped: ")[2]
    counts = re.findall(r"(\d+) [^()]* \([^)]*\)", skipped)  # "2 kind (first name), ..."
    assert sum(map(int, counts)) == 3


def test_labels_stay_with_their_images_if_one_is_unreadable(checkpoint, classes):
    before = run(checkpoint, "--classification", classes)["zero_shot"]
    (classes / "a_blue" / "00.png").write_bytes(b"no image")
    after = run(checkpoint, "--classification", classes)["zero_shot"]
    assert metrics(after) == metrics(before)
    assert "1 unreadable" in after["protocol"] and "00.png" in after["protocol"]


# ------------------------------------------------------------------------------------------------
# Karpathy JSONs


def test_a_karpathy_split_has_any_number_of_captions_per_image(classes):
    entries = [("0.png", "test", "x", "y"), ("1.png", "test"), ("2.png", "train", "z"),
               ("2.png", "test", "w")]
    path, blue = write_karpathy(classes / "k.json", *entries), classes / "a_blue"
    held_out = evaluate.karpathy_split(path, blue, "test")
    assert held_out.images == [str(blue / "0.png"), str(blue / "2.png")]
    assert held_out.captions == ["x", "y", "w"] and held_out.pairs == [(0, 0), (0, 1), (1, 2)]
    ((count, name),) = held_out.skipped.values()  # the image without captions
    assert count == 1 and name.endswith("1.png")
    with_folder = write_karpathy(classes / "coco.json", *entries, filepath="a_blue")
    for folder in (classes, blue):  # COCO's images are in a subfolder, or were moved out of it
        assert evaluate.karpathy_split(with_folder, folder, "test").images == held_out.images
    with pytest.raises(ValueError, match="split 'val'"):
        evaluate.karpathy_split(path, blue, "val")
    (blue / "1.png").unlink()
    with pytest.raises(ValueError, match="1 of 3 images do not exist.*1.png"):
        evaluate.karpathy_split(path, blue, "test")


@pytest.mark.parametrize("entry", [
    "marked", None, ["marked"], {"filename": "marked"},
    {"filename": "marked", "split": "test", "sentences": None},
    {"filename": "marked", "split": "test", "sentences": ["a dog"]},
    {"filename": "marked", "split": "test", "sentences": [{"raw": 7}]},
    {"filename": ["marked"], "split": "test", "sentences": [{"raw": "a dog"}]},
    {"filename": "marked", "split": ["test"], "sentences": [{"raw": "a dog"}]},
])
def test_a_karpathy_entry_of_another_type_is_refused_by_name(entry, tmp_path):
    (tmp_path / "k.json").write_text(json.dumps({"images": [entry]}))
    with pytest.raises(ValueError, match="entry None" if entry is None else "marked"):
        evaluate.karpathy_split(tmp_path / "k.json", tmp_path, "test")


@pytest.mark.parametrize("content", ["", "[]", "7", '{"image": []}', '{"images": 7}'])
def test_a_json_file_that_is_not_karpathys_is_refused(content, tmp_path):
    (tmp_path / "k.json").write_text(content)
    with pytest.raises(ValueError, match="k.json"):
        evaluate.karpathy_split(tmp_path / "k.json", tmp_path, "test")


# ------------------------------------------------------------------------------------------------
# paths to the root


def model_of(geometry, logit=None, **train_config):
    """A model for tests that bring their own embeddings. Only its geometry and flags matter."""
    model = small(geometry, logit=logit)
    model.train_config = train_config
    return model


def test_a_path_to_the_root_by_hand():
    """The path goes from radius 4 to 0. Captions are on the same ray at 0.5, 2 and 6.1. The nearest
    one is at 2, then at 0.5 below radius 1.25. Below 0.25 it is the root. The caption beside the
    ray is never the nearest."""
    texts = torch.tensor([[0.5, 0.0], [2.0, 0.0], [6.1, 0.0], [0.0, 1.0]])
    (path,) = evaluate.traverse(model_of("euclidean"), torch.tensor([[4.0, 0.0]]), texts)
    radii = [4 * (1 - step / 49) for step in range(50)]
    below_125 = sum(radius > 1.25 for radius in radii)
    below_025 = sum(radius > 0.25 for radius in radii)
    assert path == [(0, 1), (below_125, 0), (below_025, 4)]


def brute_force_path(geometry, logit, image, texts, root, K):
    first_step = {}
    for step in range(50):
        point = geometry.project(image + step / 49 * (root - image))[None]
        similarity = geometry.similarity(point, texts, logit)[0]
        inside = [True] * len(texts)
        if K is not None:
            inside = geometry.entailment_loss(texts, point, K) == 0
        candidates = [(similarity[i].item(), i) for i in range(len(texts)) if inside[i]]
        end = geometry.project(root)[None]
        candidates.append((geometry.similarity(point, end, logit).item(), len(texts)))
        first_step.setdefault(max(candidates)[1], step)
    return [(step, text) for text, step in first_step.items()]


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
        for image, path in zip(images, found):
            assert path == brute_force_path(geometry, logit, image, texts, root, K)
        assert any(len(path) > 2 for path in found) or logit == "inner"


def test_the_cones_of_a_traversal_are_those_of_the_end_of_the_training():
    falling = {"entailment_weight": 0.2, "min_radius": 0.3, "final_min_radius": 0.1}
    assert evaluate.last_min_radius(model_of("euclidean", **falling)) == 0.1
    constant = {"entailment_weight": 0.2, "min_radius": 0.3, "final_min_radius": None}
    assert evaluate.last_min_radius(model_of("hyperbolic", **constant)) == 0.3
    without = constant | {"entailment_weight": 0.0}
    assert evaluate.last_min_radius(model_of("euclidean", **without)) is None
    assert evaluate.last_min_radius(model_of("clip")) is None


@pytest.fixture
def photos(tmp_path):
    """A red image, a broken one, and three captions, two of which are equal."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "captions.txt").write_text("a red thing\n\na thing\na thing\n")
    return folder


def traverse_flags(photos, *images):
    return ["--traverse", *(photos / image for image in images),
            "--captions", photos / "captions.txt"]


def test_traverse_prints_the_captions_from_each_image_to_the_root(checkpoint, photos, capsys):
    flags = traverse_flags(photos, "red.png", "broken.jpg")
    result = run(checkpoint, *flags)["traversal"]
    assert list(result["retrieved"]) == [str(photos / "red.png")]
    (path,) = result["retrieved"].values()
    assert path[-1][1] == "[ROOT]" and 0 <= path[0][0] <= path[-1][0] <= 1
    assert {caption for _, caption in path} <= {"a red thing", "a thing", "[ROOT]"}
    printed = capsys.readouterr().out
    assert "2 captions" in printed and "1 unreadable" in printed and "[ROOT]" in printed
    (photos / "captions.txt").write_text("\n")
    with pytest.raises(ValueError, match="captions.txt: NoCaption"):
        run(checkpoint, *flags)


def test_min_radius_sets_the_cones_of_a_traversal(checkpoint, photos, monkeypatch, capsys):
    def behind_a_red_thing_and_a_little_beside_it(model, images, **loading):
        text, other = evaluate.embed_texts(model, ["a red thing", "something else"])
        return (3 * text + 0.3 * other)[None], [0]

    monkeypatch.setattr(evaluate, "embed_images", behind_a_red_thing_and_a_little_beside_it)
    flags = traverse_flags(photos, "red.png")
    for K, met in (("0", True), ("100", True), ("1e-06", False)):  # no cones, half-spaces, needles
        (path,) = run(checkpoint, *flags, "--min_radius", K)["traversal"]["retrieved"].values()
        assert (len(path) > 1) is met
        assert ("whose cone" in capsys.readouterr().out) is (K != "0")
    for K in ("-1", "nan", "inf"):
        with pytest.raises(SystemExit):
            run(checkpoint, *flags, "--min_radius", K)


# ------------------------------------------------------------------------------------------------
# the command

RECALLS = SEVEN[:6]


def command(monkeypatch, *flags):
    """evaluate.py as a program, in this process -> its exit status."""
    return status_of(evaluate.main, monkeypatch, *flags, "--workers", 0, "--device", "cpu")


def test_the_command_prints_tables_with_chance_and_writes_json(
    checkpoint, monkeypatch, capsys, few_held_out
):
    assert command(monkeypatch, checkpoint, "--json", checkpoint.with_name("r.json")) == 0
    printed = capsys.readouterr().out
    assert printed.count(" %   chance ") == 3 + 6 and "hyperbolic/distance" in printed
    assert "48 images, 48 classes" in printed and "48 images, 48 captions" in printed
    result = json.loads(checkpoint.with_name("r.json").read_text())
    assert result["zero_shot"]["classes"] == 48 and 0 <= result["zero_shot"]["top1"] <= 1
    assert all(0 <= result["retrieval"][name] <= 1 for name in RECALLS)
    assert f"i2t_r10               {100 * result['retrieval']['i2t_r10']:5.1f} %" in printed


def test_json_has_null_where_a_metric_is_undefined(checkpoint, classes):
    result = run(checkpoint, "--classification", classes)
    assert result["zero_shot"]["top1"] is not None
    assert (result["zero_shot"]["top5"], result["zero_shot"]["classes"]) == (None, 2)
    assert result["retrieval"] == dict.fromkeys(RECALLS)


EVALUATE = """
import evaluate
{before}
sys.argv = ["evaluate.py", *{args}]
evaluate.main()
"""


@pytest.mark.parametrize("stdout", ["closed", "broken pipe"])
def test_results_are_written_if_nobody_can_read_stdout(checkpoint, classes, stdout):
    results = checkpoint.with_name("r.json")
    args = [checkpoint, "--classification", classes, "--workers", "0", "--json", results]
    broken = "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)"
    before = "os.close(1)" if stdout == "closed" else broken
    status, _, error = run_train(code=EVALUATE.format(before=before, args=[*map(str, args)]))
    assert json.loads(results.read_text())["zero_shot"]["classes"] == 2
    assert (status, error) == (0, "")


class NotebookStdout(io.TextIOBase):
    """As ipykernel's, it has no `reconfigure`."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)


def test_a_stdout_without_reconfigure_gets_the_results(checkpoint, classes, monkeypatch):
    stdout = NotebookStdout()
    monkeypatch.setattr(sys, "stdout", stdout)
    assert command(monkeypatch, checkpoint, "--classification", classes) == 0
    assert "6 images, 2 classes" in stdout.text


def test_names_that_are_not_utf8_are_printed_with_escapes(checkpoint, photos, monkeypatch, capsys):
    """Linux allows any bytes in a file name, and old files have Latin-1 names."""
    name = os.fsdecode(b"caf\xe9.png")
    (photos / "red.png").rename(photos / name)
    flags = [*traverse_flags(photos, name), "--json", photos / "r.json"]
    assert command(monkeypatch, checkpoint, *flags) == 0
    assert r"caf\udce9.png" in capsys.readouterr().out
    (found,) = json.loads((photos / "r.json").read_text())["traversal"]["retrieved"]
    assert found == str(photos / name)


@pytest.mark.parametrize("file", ["none/r.json", "ckpt.pt/r.json", "."])
def test_a_json_that_cannot_be_written_is_refused_before_the_work(
    checkpoint, monkeypatch, capsys, file
):
    def work(*args, **kwargs):
        raise AssertionError("the evaluation has begun")

    monkeypatch.chdir(checkpoint.parent)
    monkeypatch.setattr(evaluate, "load_model", work)
    assert command(monkeypatch, checkpoint, "--json", file) == 2
    assert file in capsys.readouterr().err


def test_a_model_is_evaluated_on_the_held_out_data_of_its_training():
    assert evaluate.held_out_source({"data": "shapes"}) == "shapes"
    assert evaluate.held_out_source({"data": "shapes", "val_data": "mine"}) == "mine"
    assert evaluate.held_out_source({"data": "mine", "val_data": None}) is None
    assert evaluate.held_out_source({}) is None  # a converted checkpoint


def test_a_checkpoint_without_held_out_data_is_refused(tmp_path, monkeypatch, capsys):
    save_ours(tmp_path / "ckpt.pt", small(), data="pairs.csv", val_data=None)
    assert command(monkeypatch, tmp_path / "ckpt.pt") == 2
    message = capsys.readouterr().err
    assert "--retrieval" in message and len(message.splitlines()) == 1


@pytest.mark.parametrize("flags", [
    "--retrieval x", "--images x", "--traverse x", "--captions x", "--classnames x",
    "--templates x", "--min_radius 1", "--val_data x --classification x",
    "--val_data x --retrieval x --images x",
])
def test_flags_that_need_or_exclude_each_other(flags, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.parse_args(["ckpt.pt", *flags.split()])
    message = capsys.readouterr().err
    assert end.value.code == 2 and flags.split()[0] in message and len(message.splitlines()) == 1


@pytest.mark.parametrize("flags", [
    "", "none.pt", "text.pt", "ckpt.pt more.pt", "ckpt.pt --unknown 1", "ckpt.pt --batch_size many",
    "ckpt.pt --batch_size 0", "ckpt.pt --workers -1", "ckpt.pt --dtype float16",
    "ckpt.pt --device none", "ckpt.pt --val_data none.csv", "ckpt.pt --val_data text.pt",
    "ckpt.pt --classification none", "ckpt.pt --classification text.pt",
    "ckpt.pt --retrieval none.json --images .", "ckpt.pt --retrieval text.pt --images .",
    "ckpt.pt --traverse none.png --captions text.pt",
    "ckpt.pt --traverse none.png --captions none.txt",
])
def test_errors_are_one_line_with_status_2(flags, checkpoint, monkeypatch, capsys):
    monkeypatch.chdir(checkpoint.parent)
    (checkpoint.parent / "text.pt").write_text("some text\n")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags.split()])
    with pytest.raises(SystemExit) as end:
        evaluate.main()
    (message,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and message.startswith("evaluate.py: ")


def test_flags_may_have_dashes_instead_of_underscores():
    for flags in (["--batch-size", "7"], ["--batch-size=7"], ["--batch_size", "7"]):
        assert evaluate.parse_args(["ckpt.pt", *flags]).batch_size == 7
    args = evaluate.parse_args(["my-run/ckpt.pt", "--val-data=a-b/c-d.csv"])
    assert (args.checkpoint, args.val_data) == ("my-run/ckpt.pt", "a-b/c-d.csv")


def test_evaluation_by_several_processes_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(SystemExit) as end:
        evaluate.parse_args(["ckpt.pt"])
    assert end.value.code == 2 and "without torchrun" in capsys.readouterr().err


def test_captions_can_come_from_a_pipe():
    reader, writer = os.pipe()
    os.write(writer, b"a cat\na dog\n")
    os.close(writer)
    assert data.read_lines(f"/dev/fd/{reader}") == ["a cat", "a dog"]
    os.close(reader)
