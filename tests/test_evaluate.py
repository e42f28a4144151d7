"""evaluate.py: measures by hand, ties, folders and JSON files, the command."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import data
import evaluate
import geometry as geo
from test_model import ROOT, save_ours, small

INNER = lambda x, y: x @ y.T


def test_recall_by_hand():
    """Three pictures, four captions: 0 and 1 are picture 0's, 2 is picture 1's, 3 is picture 2's."""
    images = torch.eye(3)
    texts = torch.tensor([[0.9, 0, 0], [0.1, 0.5, 0], [0, 0.4, 0.6], [0, 0.7, 0.3]])
    owner = torch.tensor([0, 0, 1, 2])
    m = evaluate.retrieval_metrics(INNER, images, texts, owner)
    # picture 0 finds caption 0 first; picture 1 ranks captions 3, 1, 2; picture 2 ranks captions 2, 3
    assert m["i2t_r1"] == pytest.approx(1 / 3) and m["i2t_r5"] is None   # four captions: no five first ones
    # caption 0 finds picture 0; caption 1 finds picture 1 first; caption 2 picture 2; caption 3 picture 1
    assert m["t2i_r1"] == pytest.approx(1 / 4) and m["t2i_r5"] is None and m["mean_r1"] == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert m["chance"]["t2i_r1"] == pytest.approx(1 / 3) and m["chance"]["i2t_r1"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)


def test_recall_equals_a_sorted_list_on_ragged_captions():
    """Fault 33: pictures with 0, 1, 5 and 7 captions; brute force by sorting every row."""
    torch.manual_seed(0)
    counts = [0, 1, 5, 7] * 5
    owner = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)])
    images, texts = torch.randn(20, 6), torch.randn(len(owner), 6)
    m = evaluate.retrieval_metrics(INNER, images, texts, owner)
    s = images @ texts.T
    for k in (1, 5, 10):
        i2t = [any(owner[j] == i for j in s[i].argsort(descending=True)[:k]) for i in range(20) if counts[i]]
        t2i = [owner[j] in s[:, j].argsort(descending=True)[:k] for j in range(len(owner))]
        assert m[f"i2t_r{k}"] == pytest.approx(sum(i2t) / len(i2t)) and m[f"t2i_r{k}"] == pytest.approx(sum(map(int, t2i)) / len(t2i))


def test_blocks_of_rows_give_what_one_block_gives(monkeypatch):
    torch.manual_seed(0)
    images, texts, owner = torch.randn(50, 4), torch.randn(150, 4), torch.arange(150) % 50
    whole = evaluate.retrieval_metrics(INNER, images, texts, owner)
    monkeypatch.setattr(evaluate, "BLOCK", 7)
    assert evaluate.retrieval_metrics(INNER, images, texts, owner) == whole


def test_fault_34_ties_count_against_us_and_nan_is_refused():
    same = torch.ones(6, 3)
    m = evaluate.retrieval_metrics(INNER, same, same, torch.arange(6))
    assert m["i2t_r1"] == m["t2i_r1"] == m["t2i_r5"] == 0
    assert evaluate.zero_shot_metrics(INNER, same, same, torch.arange(6))["top1"] == 0
    broken = same.clone()
    broken[2, 1] = math.nan
    with pytest.raises(ValueError, match="1 of 6 query embeddings"):
        evaluate.retrieval_metrics(INNER, broken, same, torch.arange(6))


def test_fault_32_zero_shot_by_hand_and_no_top5_below_five_classes():
    images, classes = torch.eye(3)[[0, 0, 1, 2]], torch.eye(3)
    m = evaluate.zero_shot_metrics(INNER, images, classes, torch.tensor([0, 1, 1, 2]))
    assert (m["top1"], m["top5"], m["classes"]) == (0.75, None, 3)
    assert m["per_class"] == [1, 0.5, 1] and m["mean_per_class_recall"] == pytest.approx(2.5 / 3)


def test_fault_31_labels_out_of_range_are_refused():
    with pytest.raises(ValueError, match="3 classes"):
        evaluate.zero_shot_metrics(INNER, torch.eye(3), torch.eye(3), torch.tensor([0, 1, 3]))


@pytest.fixture
def pictures(tmp_path):
    for name, colour in (("b_red", "red"), ("a_blue", "blue")):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (40 + i, 40), colour).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_class_folders_are_read_in_sorted_order(pictures, tmp_path):
    items, labels, names, templates = evaluate.class_folder(pictures)
    assert names == ["a blue", "b red"] and labels == [0, 0, 0, 1, 1, 1] and "a_blue" in items[0] and templates == evaluate.PROMPTS


def test_fault_31_class_names_templates_and_empty_folders_are_refused(pictures, tmp_path_factory):
    other = tmp_path_factory.mktemp("lists")
    (other / "names.txt").write_text("one\n")
    with pytest.raises(ValueError, match="1 names for 2 class folders"):
        evaluate.class_folder(pictures, other / "names.txt")
    for content in ("a photo", ""):
        (other / "templates.txt").write_text(content)
        with pytest.raises(ValueError, match="template"):
            evaluate.class_folder(pictures, templates=other / "templates.txt")
    (pictures / "c_empty").mkdir()
    with pytest.raises(ValueError, match="c_empty"):
        evaluate.class_folder(pictures)


def test_karpathy_json_with_any_number_of_captions(pictures):
    entry = lambda name, split, *captions: dict(filepath="a_blue", filename=name, split=split, sentences=[dict(raw=c) for c in captions])
    (pictures / "k.json").write_text(json.dumps(dict(images=[entry("0.png", "test", "x", "y"), entry("1.png", "test"), entry("2.png", "train", "z")])))
    items, captions, owner = evaluate.karpathy(pictures / "k.json", pictures, "test")
    assert len(items) == 2 and captions == ["x", "y"] and owner == [0, 0]
    with pytest.raises(ValueError, match="no split 'val'"):
        evaluate.karpathy(pictures / "k.json", pictures, "val")
    (pictures / "a_blue" / "1.png").unlink()
    with pytest.raises(ValueError, match="1 of 2 pictures are not there.*1.png"):
        evaluate.karpathy(pictures / "k.json", pictures, "test")


def test_fault_35_results_do_not_depend_on_batch_size_or_workers_and_the_model_is_left_as_it_was():
    model = small("hyperbolic", image_size=16).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    results = [evaluate.encode_pictures(model, list(range(20)), **how) for how in (dict(batch_size=1), dict(batch_size=7), dict(batch_size=64, workers=2))]
    for r in results[1:]:
        torch.testing.assert_close(r, results[0], rtol=1e-5, atol=1e-6)
    texts = [evaluate.encode_texts(model, ["a", "some longer text", ""] * 5, batch_size=b) for b in (1, 4, 64)]
    for t in texts[1:]:
        torch.testing.assert_close(t, texts[0], rtol=1e-5, atol=1e-6)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_class_embeddings_are_averages_of_their_prompts():
    model = small("clip")
    classes = evaluate.encode_classes(model, ["red", "blue"], ["a {}", "the {}!"])
    one = evaluate.encode_texts(model, ["a blue", "the blue!"]).mean(0)
    torch.testing.assert_close(classes[1], one / one.norm())


def test_the_command_prints_a_table_with_chance_and_writes_json(pictures, tmp_path):
    save_ours(tmp_path / "ckpt.pt", small("euclidean", context_length=77))
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", tmp_path / "ckpt.pt", "--json", tmp_path / "out.json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "48 classes" in done.stdout and done.stdout.count("chance %") == 3 and "euclidean/squared" in done.stdout
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["zero_shot"]["classes"] == 48 and 0 <= result["zero_shot"]["top1"] <= 1
    assert {"i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"} <= set(result["retrieval"])
    folders = tmp_path / "classes"
    folders.mkdir()
    for name in ("a_blue", "b_red"):
        (pictures / name).rename(folders / name)
    evaluate.run(evaluate.parse([str(tmp_path / "ckpt.pt"), "--classification", str(folders), "--json", str(tmp_path / "out.json")]))
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["zero_shot"]["top5"] is None and result["zero_shot"]["classes"] == 2 and result["retrieval"]["t2i_r1"] is None
    with pytest.raises(ValueError, match="--images"):
        evaluate.run(evaluate.parse([str(tmp_path / "ckpt.pt"), "--retrieval", "x.json"]))


# ---------------------------------------------------------------------------------------------------------------------------------
# the hierarchy

class World:
    """A model whose embeddings are what a test says they are."""

    def __init__(self, geometry, logit=None, **recipe):
        self.row, self.logit = geo.find(geometry, logit)
        self.config, self.recipe = SimpleNamespace(geometry=geometry), recipe

    def similarity(self, x, y):
        return geo.similarity(x, y, self.config.geometry, self.logit)

    def curvature(self):
        return 1.0


def test_a_way_to_the_root_by_hand():
    """Captions on the ray of the picture at radius 0.5, 2 and 6, one aside: from radius 4 to 0 the nearest are 2, 0.5 (below 1.25), the
    root (below 0.25)."""
    texts = torch.tensor([[0.5, 0.0], [2.0, 0.0], [6.1, 0.0], [0.0, 1.0]])
    way, = evaluate.traverse(World("euclidean"), torch.tensor([[4.0, 0.0]]), texts, cones=False)
    assert [text for _, text in way] == [1, 0, 4]
    radii = [4 * (1 - i / 49) for i in range(50)]
    assert [step for step, _ in way] == [0, next(i for i, r in enumerate(radii) if r < 1.25), next(i for i, r in enumerate(radii) if r < 0.25)]


@pytest.mark.parametrize("geometry, logit, cones", [(g, logit, cones) for g, row in geo.GEOMETRIES.items() for logit in row.logits
                                                    for cones in ((False, True) if row.cone else (False,))])
def test_traversal_equals_brute_force(geometry, logit, cones, monkeypatch):
    monkeypatch.setattr(evaluate, "CONES", 3)
    torch.manual_seed(0)
    images, texts = geo.project(torch.randn(4, 3) * 3, geometry, torch.zeros(())), geo.project(torch.randn(10, 3), geometry, torch.zeros(()))
    root = torch.cat([images, texts]).mean(0) if geometry == "clip" else torch.zeros(3)
    for image, way in zip(images, evaluate.traverse(World(geometry, logit, min_radius=0.5), images, texts, cones)):
        expected = []
        for step in range(50):
            point = image + step / 49 * (root - image)
            point = point / point.norm() if geometry == "clip" else point
            all = [(geo.similarity(point[None], t[None] / (t.norm() if geometry == "clip" else 1), geometry, logit).item(), i) for i, t in enumerate([*texts, root])]
            if cones:
                all = [(s, i) for s, i in all if i == 10 or geo.entailment_loss(texts[i:i + 1], point[None], geometry, 0.5).item() == 0]
            nearest = max(all)[1]
            if nearest not in [text for _, text in expected]:
                expected.append((step, nearest))
        assert way == expected


def test_hierarchy_by_hand():
    """Two pictures, far out in the east and the north, three levels. One general caption lies between both, at radius 0.57; the middle
    ones on the rays of their pictures at 2 (right) and at 0.5 (wrong: nearer the root than the general one); the specific ones at 3."""
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    texts = torch.stack([0.4 * (east + north), 2 * east, 3 * east, 0.5 * north, 3 * north])
    h = evaluate.hierarchy_metrics(World("euclidean", min_radius=0.1, entailment_weight=0.2), torch.stack([4 * east, 4 * north]), texts, [[0, 1, 2], [0, 3, 4]])
    assert h["pairs"] == 6 and h["general_nearer"] == pytest.approx(5 / 6)
    assert h["own_in_cone"] == pytest.approx(4 / 6) and h["other_in_cone"] == 0   # the narrow cone of the general one holds neither
    # east: specific, middle, general, root; north: specific, middle, root, for the general one is never nearer than the middle one
    assert h["traversal"] == dict(captions=2.5, changes=3, to_general=1.0, to_specific=0.0)
    # the cone of the general caption, narrow at K = 0.1, opens between both rays and holds neither
    assert h["traversal_in_cones"]["captions"] == 2


def test_levels_of_held_out_pictures_are_a_hierarchy_of_true_captions():
    chains = data.held_out_levels()
    items, captions = data.held_out_pairs("shapes")
    assert [chain[-1] for chain in chains] == captions and {chain[0] for chain in chains} == {"a shape"}
    for _, middle, two, three, full in chains:
        assert full.startswith(three) and two.split()[1:] == three.split()[2:] and middle.split()[1] in two.split()


def test_traverse_and_query_on_the_command_line(tmp_path, capsys):
    """The second query reads no picture again but the one that has changed; broken ones are left out, a folder without any is refused."""
    path, folder = tmp_path / "ckpt.pt", tmp_path / "photos"
    save_ours(path, small(geometry="hyperbolic", context_length=77))
    folder.mkdir()
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (40, 30), colour).save(folder / f"{colour}.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "captions.txt").write_text("a red thing\n\na thing\na thing\n")
    run = lambda *flags: evaluate.run(evaluate.parse([str(path), "--json", str(tmp_path / "r.json"), *map(str, flags)]))
    run("--traverse", folder / "red.png", "--captions", tmp_path / "captions.txt", "--query", "a red circle", "--images", folder)
    first = json.loads((tmp_path / "r.json").read_text())
    way, = first["traversal"]["retrieved"].values()
    assert way[-1][1] == "[ROOT]" and {caption for _, caption in way} <= {"a red thing", "a thing", "[ROOT]"}
    assert len(first["query"]["nearest"]) == first["query"]["pictures"] == 3 and first["zero_shot"] == dict.fromkeys(("top1", "top5", "classes"))
    model = evaluate.load_model(path)
    text, image = evaluate.encode_texts(model, ["a red circle"]), evaluate.encode_pictures(model, [first["query"]["nearest"][0][0]])
    assert first["query"]["nearest"][0][1] == pytest.approx(model.similarity(text, image).item(), abs=1e-5)
    shown = capsys.readouterr()
    assert "broken.jpg" in shown.err and "query: 'a red circle' in 3 pictures" in shown.out

    read = []
    original, data.load_image = data.load_image, lambda item, size: read.append(Path(item).name) or original(item, size)
    try:
        run("--query", "a red circle", "--images", folder)
        assert read == ["broken.jpg"] and json.loads((tmp_path / "r.json").read_text())["query"] == first["query"]
        Image.new("RGB", (41, 30), "pink").save(folder / "blue.png")
        read.clear()
        run("--query", "a red circle", "--images", folder)
        assert set(read) == {"broken.jpg", "blue.png"}
        (tmp_path / "photos.embeddings").write_bytes(b"cut off")   # not ours: made anew
        read.clear()
        run("--query", "a red circle", "--images", folder)
        assert len(read) == 4
    finally:
        data.load_image = original
    for path_of_picture in folder.glob("*.png"):
        path_of_picture.with_suffix(".txt").write_text(f"a {path_of_picture.stem} picture")
    capsys.readouterr()
    run("--val_data", folder)
    assert json.loads((tmp_path / "r.json").read_text())["retrieval"]["captions"] == 3 and str(folder) in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    for flags, message in ((["--retrieval", "x", "--images", "x", "--val_data", "x"], "leave --retrieval"), (["--query", "x"], "--query needs --images"), (["--traverse", "x.png"], "--traverse needs --captions"),
                           (["--captions", "x"], "nothing without --traverse"), (["--query", "x", "--images", tmp_path / "none"], "no pictures in"),
                           (["--query", "x", "--images", tmp_path / "absent"], "no folder")):
        with pytest.raises(ValueError, match=message):
            run(*flags)
