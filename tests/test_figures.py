"""assets/figures.py and tests/study.py: the geometry of the drawings, pictures of a small model, the table's arithmetic."""

import json
import math

import numpy as np
import pytest
from PIL import Image

import geometry as geo
import study
from assets import figures
from test_model import save_ours, small


def test_disc_and_tangent_plane_are_inverse():
    v = np.array([[0.0, 0.0], [0.3, -0.4], [2.0, 1.0]])
    assert np.allclose(figures.from_disc(figures.to_disc(v)), v)
    assert np.allclose(figures.to_disc(np.array([math.log(3), 0.0])), [0.5, 0])   # tanh(ln 3 / 2) = 1/2


def test_the_hyperbolic_path_drawn_is_the_shortest():
    """Its small steps add up to the distance; those of the straight line in tangent coordinates to more."""
    x, y = np.array([1.7, 0.6]), np.array([-0.2, 1.4])
    length = lambda points: sum(figures.distance(a, b, "hyperbolic", "distance") for a, b in zip(points, points[1:]))
    told = figures.distance(x, y, "hyperbolic", "distance")
    assert length(figures.from_disc(figures.hyperbolic_path(x, y))) == pytest.approx(told, rel=1e-6)
    assert length(np.linspace(x, y, 60)) > 1.01 * told


def test_ticks_by_hand():
    assert figures.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1]) and figures.ticks(0, 90) == [0, 20, 40, 60, 80]


def test_colours_of_the_heat_map():
    strip = figures.heat(np.array([[0.0, math.pi, 9.0]]), math.pi)
    assert tuple(strip[0, 0]) == figures.mixed(figures.PAPER, 1) and tuple(strip[0, 1]) == tuple(strip[0, 2]) == (110, 20, 40)


@pytest.mark.parametrize("geometry, weight", [("clip", 0.0), ("hyperbolic", 0.2)])
def test_a_checkpoint_is_drawn(geometry, weight, tmp_path, monkeypatch):
    save_ours(tmp_path / "ckpt.pt", small(geometry=geometry, context_length=77), entailment_weight=weight)
    monkeypatch.setattr(figures.sys, "argv", ["figures", str(tmp_path / "ckpt.pt"), str(tmp_path / "figures")])
    figures.main()
    drawn = {p.name: Image.open(p) for p in (tmp_path / "figures").iterdir()}
    assert set(drawn) == {"distances.png", "levels.png", "traversal.png", "matrix.png", "contact.png"}
    for name, picture in drawn.items():   # something is on the paper, and nothing touches its edge
        pixels = np.asarray(picture.convert("L"), dtype=float)
        assert pixels.std() > 5, name
        assert min(pixels[0].min(), pixels[-1].min(), pixels[:, 0].min(), pixels[:, -1].min()) > 240, name


def test_the_geometry_is_drawn_and_cones_are_where_they_should_be(tmp_path):
    figures.three_geometries(tmp_path / "three.png")
    figures.cones(tmp_path / "cones.png")
    picture = Image.open(tmp_path / "cones.png")
    inside = figures.mixed(figures.IMAGE, 0.3)
    # first panel, 230 pixels for -1.6 to 1.6 from (20, 44): the apex (K, K) opens a quadrant to the upper right
    at = lambda x, y: picture.getpixel((round(20 + 115 + 115 * x / 1.6), round(44 + 115 - 115 * y / 1.6)))
    assert at(1.2, 0.4) == at(0.4, 1.2) == inside and inside not in (at(0.1, 1.2), at(1.2, 0.1), at(-1, -1))


def test_the_studys_runs_are_every_cell():
    runs = study.runs()
    cells = {tuple(flags[1:6:2]) for flags in runs.values() if len(flags) == 6 and flags[2] == "--logit"}
    assert cells == {(g, logit, w) for g, row in geo.GEOMETRIES.items() for logit in row.logits for w in (("0", "0.2") if row.cone else ("0",))}
    assert len(runs) == len(cells) + len(geo.GEOMETRIES) + 2


def test_the_studys_table_by_hand(tmp_path):
    """Two seeds of one run: 50 and 52 % make 51.0 ± 1.4; a third that is missing is told; what the sphere does not have stays empty."""
    for seed, r1, name in ((0, 0.50, "clip-cosine"), (1, 0.52, "clip-cosine"), (0, 0.53, "clip-arc"), (1, 0.57, "clip-arc")):
        folder = tmp_path / f"{name}-s{seed}"
        folder.mkdir()
        way = dict(captions=1.0, changes=0, to_general=None, to_specific=None)
        hierarchy = dict(text_radius=0.1, image_radius=0.2, general_nearer=0.5, own_in_cone=None, other_in_cone=None, traversal=way, traversal_in_cones=None)
        (folder / "result.json").write_text(json.dumps(dict(zero_shot=dict(top1=1.0), retrieval=dict(mean_r1=r1), hierarchy=hierarchy)))
        (folder / "log.jsonl").write_text('{"step": 1, "loss": 9, "text_radius": 9, "image_radius": 9}\n'
                                          '{"step": 2, "loss": 3, "text_radius": 1, "image_radius": 2}\n{"step": 2, "val_mean_r1": 0}\n')
    row = lambda which: next(line for line in study.table(tmp_path, 3, which).splitlines() if line.startswith("| clip-cosine"))
    told = "| clip-cosine (2 of 3 seeds) | "
    accuracy, cones = study.COLUMNS
    assert row(accuracy) == told + "100.0 ± 0.0 | 51.0 ± 1.4 | 0.0 ± 0.0 | 1.00 ± 0.00 | 2.00 ± 0.00 | 0.10 ± 0.00 | 0.20 ± 0.00 | 50.0 ± 0.0 |"
    arc = next(line for line in study.table(tmp_path, 3, accuracy).splitlines() if line.startswith("| clip-arc"))
    assert "| 55.0 ± 2.8 | 4.0 ± 1.4 |" in arc   # 3 and 5, seed by seed
    assert row(cones) == told + " |  |  | 1.00 ± 0.00 | 0 ± 0 |  |  |  |  |  |  |"


def test_a_study_knows_what_is_done(tmp_path):
    """Interrupted, failed, never begun: to be trained; complete, also on being asked again: not."""
    told = tmp_path / "train.txt"
    assert not study.is_trained(tmp_path)
    for text, done in (("stopped by a signal after step 5; go on with --resume", False), ("Traceback ...", False),
                       ("703 steps in 96 s; out/ckpt.pt is ready for evaluate.py", True), ("out/ckpt.pt is already complete: 703 steps", True)):
        told.write_text(text)
        assert study.is_trained(tmp_path) == done
