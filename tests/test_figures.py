"""assets/figures.py and tests/study.py: geometry, small models drawn, arithmetic of the tables."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import study
import torch
from common import save_ours, small
from PIL import Image

from assets import figures
from geometry import GEOMETRIES

# ------------------------------------------------------------------------------------------------
# drawing


def test_disc_and_tangent_plane_are_inverse():
    v = np.array([[0.0, 0.0], [0.3, -0.4], [2.0, 1.0]])
    assert np.allclose(figures.from_disc(figures.to_disc(v)), v)
    half = figures.to_disc(np.array([math.log(3), 0.0]))  # tanh(ln 3 / 2) = 1 / 2
    assert np.allclose(half, [0.5, 0])


def test_the_hyperbolic_path_that_is_drawn_is_the_shortest():
    """Its small steps add up to the distance, those of the straight tangent line to more."""
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


def test_no_loss_has_the_colour_of_paper_and_pi_is_dark_red():
    none, pi, more = figures.heat(np.array([[0.0, math.pi, 9.0]]), math.pi)[0].tolist()
    assert tuple(none) == figures.mixed(figures.PAPER, 1) and pi == more == [110, 20, 40]


def test_cones_are_drawn_where_they_are(tmp_path):
    figures.three_geometries(tmp_path / "three.png")
    figures.cones(tmp_path / "cones.png")
    picture, blue = Image.open(tmp_path / "cones.png"), figures.mixed(figures.IMAGE, 0.3)

    def in_cone(x, y):
        """In the first panel: 230 pixels from (20, 44) on, for -1.6 to 1.6."""
        pixel = (round(20 + 115 + 115 * x / 1.6), round(44 + 115 - 115 * y / 1.6))
        return picture.getpixel(pixel) == blue

    # the cone of the apex (K, K) is the quadrant to its upper right
    assert in_cone(1.2, 0.4) and in_cone(0.4, 1.2)
    assert not (in_cone(0.1, 1.2) or in_cone(1.2, 0.1) or in_cone(-1, -1))


def test_balanced_captions_are_those_of_pictures_that_share_only_general_ones():
    chains = [[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 5, 6], [0, 7, 5, 8], [0, 7, 9, 10]]
    captions, pictures = figures.balanced(chains)
    assert pictures == [0, 2, 4] and captions == [0, 1, 2, 3, 5, 6, 7, 9, 10]


@pytest.mark.parametrize("geometry, weight", [("clip", 0.0), ("hyperbolic", 0.2)])
def test_a_checkpoint_is_drawn(geometry, weight, tmp_path, monkeypatch, few_held_out):
    path = tmp_path / "ckpt.pt"
    save_ours(path, small(geometry, context_length=77), entailment_weight=weight)
    monkeypatch.setattr(figures.sys, "argv", ["figures", str(path), str(tmp_path / "drawn")])
    figures.main()
    drawn = {file.stem: Image.open(file) for file in (tmp_path / "drawn").iterdir()}
    assert set(drawn) == {"distances", "traversal", "contact"}
    for name, picture in drawn.items():  # something is on the paper, and nothing touches its edge
        pixels = np.asarray(picture.convert("L"), dtype=float)
        edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
        assert pixels.std() > 5 and min(edge.min() for edge in edges) > 240, name


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
    """3 and 5, 4 on average: the deviation is sqrt(2), the t quantile of one degree of freedom is
    12.706, so the half interval is 12.706. Of seeds without a partner nothing is known."""
    a = {seed: {"x": {"y": value}} for seed, value in ((0, 0.53), (1, 0.57), (2, 0.99))}
    b = {seed: {"x": {"y": value}} for seed, value in ((0, 0.50), (1, 0.52), (3, 0.01))}
    assert study.difference(a, b, "x.y", 100, 1) == "+4.0 ± 12.7"
    assert study.difference(a, {0: b[0]}, "x.y", 100, 1) == ""


def write_result(out, name, seed, r1):
    folder = out / f"{name}-s{seed}"
    folder.mkdir()
    hierarchy = {"text_radius": [5, 4, 3, 2, 0.1], "image_radius": 0.2, "general_nearer": 0.5,
                 "own_in_cone": None, "other_in_cone": None}  # fmt: skip
    way = {"captions": 1.0, "changes": 0, "to_general": None, "to_specific": None}
    result = {"zero_shot": {"top1": 1.0}, "retrieval": {"mean_r1": r1}, "hierarchy": hierarchy}
    result["traversal"] = way
    (folder / "result.json").write_text(json.dumps(result))
    log = [{"step": 1, "loss": 9, "text_radius": 9, "image_radius": 9},
           {"step": 2, "loss": 3, "text_radius": 1, "image_radius": 2},
           {"step": 2, "val_mean_r1": r1}]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def test_the_tables_of_a_study_by_hand(tmp_path):
    """50 and 52 % make 51.0 ± 1.4. What the sphere does not have stays empty."""
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


def test_traversals_are_counted_by_level():
    """From 4 to 0 the way on a ray meets captions at 2 (specific) and 0.5 (general), that in the
    opposite direction one at 1; the ways have 2 and 1 captions and together one change."""
    texts = torch.tensor([[0.5, 0.0], [2.0, 0.0], [-1.0, 0.0]])
    images, model = torch.tensor([[4.0, 0.0], [-4.0, 0.0]]), small("euclidean")

    def metrics_of(images, chains):
        subject = SimpleNamespace(model=model, images=images, texts=texts, chains=chains)
        return study.traversal_metrics(subject)

    m = metrics_of(images, [[0, 1], [0, 2]])
    assert m == {"captions": 1.5, "changes": 1, "to_general": 1.0, "to_specific": 0.0}
    m = metrics_of(images, [[1, 0], [1, 2]])
    assert (m["to_general"], m["to_specific"]) == (0.0, 1.0)
    m = metrics_of(images[1:], [[0, 2]])
    assert m == {"captions": 1.0, "changes": 0, "to_general": None, "to_specific": None}


def test_a_run_is_trained_when_its_checkpoint_has_the_last_step(tmp_path):
    assert not study.is_trained(tmp_path, 64)
    for step, done in ((7, False), (8, True)):
        torch.save({"step": step, "train_config": {"batch_size": 8}}, tmp_path / "ckpt.pt")
        assert study.is_trained(tmp_path, 64) == done


def test_runs_of_other_code_or_flags_are_not_mixed(tmp_path, monkeypatch):
    study.refuse_to_mix(tmp_path, 1000)
    study.refuse_to_mix(tmp_path, 1000)
    with pytest.raises(SystemExit, match="other code or flags"):
        study.refuse_to_mix(tmp_path, 2000)
    monkeypatch.setattr(study, "CODE", study.CODE[1:])
    with pytest.raises(SystemExit, match="other code or flags"):
        study.refuse_to_mix(tmp_path, 1000)
