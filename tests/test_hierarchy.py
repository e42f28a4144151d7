"""lab/hierarchy.py: radii and cones of captions from general to specific."""

import json
import math

import pytest
import torch
from common import save_ours, shapes, small, status_of

from lab import hierarchy

EAST, NORTH = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


def model_of(geometry, **train_config):
    """A model for tests that bring their own embeddings. Only its geometry and flags matter."""
    model = small(geometry)
    model.train_config = train_config
    return model


def test_hierarchy_by_hand():
    """Two images at radius 4, one in the east and one in the north. Between them lie their general
    captions and the middle one of the east, so near to the root that their cones are half-planes
    and contain both images. The middle caption of the north is wrong: at radius 5, it is beyond the
    specific caption and the image."""
    images, between = torch.stack([4 * EAST, 4 * NORTH]), EAST + NORTH
    general = torch.stack([0.03 * between, 0.03 * between])
    middle, specific = torch.stack([0.06 * between, 5 * NORTH]), torch.stack([3 * EAST, 2 * NORTH])
    texts = torch.stack([general, middle, specific])
    h = hierarchy.hierarchy_metrics(model_of("euclidean", min_radius=0.1), images, texts)
    root2 = math.sqrt(2)
    assert h["text_radius"] == pytest.approx([0.03 * root2, (0.06 * root2 + 5) / 2, 2.5])
    assert h["image_radius"] == pytest.approx(4) and h["general_nearer"] == pytest.approx(3 / 4)
    assert h["own_in_cone"] == [1, 0.5, 1] and h["other_in_cone"] == [1, 0.5, 0]
    assert h["min_radius"] == 0.1


def test_the_sphere_has_radii_but_no_cones():
    north = torch.stack([NORTH, NORTH])
    h = hierarchy.hierarchy_metrics(model_of("clip"), torch.stack([EAST, EAST]), north[None])
    # the root is halfway: at 45 degrees, where the radius (1 - cos)/2 is
    assert h["text_radius"] == pytest.approx([(1 - math.sqrt(0.5)) / 2])
    assert h["image_radius"] == pytest.approx(h["text_radius"][0])
    assert h["own_in_cone"] is h["other_in_cone"] is h["min_radius"] is None
    assert h["general_nearer"] is None  # a single level has no next one


@pytest.mark.parametrize("levels", [2, 3, 6])
def test_any_number_of_levels_equals_brute_force(levels):
    """The cones are those of the end of the training, K = 0.3."""
    torch.manual_seed(0)
    flags = {"entailment_weight": 0.2, "min_radius": 0.1, "final_min_radius": 0.3}
    model, N = model_of("hyperbolic", **flags), 10
    images, texts = torch.randn(N, 3), torch.randn(levels, N, 3) / 4
    h = hierarchy.hierarchy_metrics(model, images, texts)
    radius, nearer = texts.norm(dim=-1), 0
    for n in range(N):
        for level in range(levels - 1):
            nearer += bool(radius[level, n] < radius[level + 1, n])
    assert h["general_nearer"] == pytest.approx(nearer / (N * (levels - 1)))
    assert h["text_radius"] == pytest.approx(radius.mean(1).tolist())
    for name, shift in (("own_in_cone", 0), ("other_in_cone", 5)):
        for level in range(levels):
            inside = 0
            for n in range(N):
                image = images[(n - shift) % N]
                inside += model.geometry.entailment_loss(texts[level, n], image, 0.3).item() == 0
            assert h[name][level] == pytest.approx(inside / N)
    assert 0 < max(h["other_in_cone"]) < 1


def test_held_out_captions_are_a_hierarchy_of_true_descriptions(few_held_out):
    held_out = shapes.Shapes().held_out()
    chains = shapes.held_out_levels()
    assert [chain[-1] for chain in chains] == held_out.captions
    for general, middle, two, three, full in chains:
        assert general == "a shape" and full.startswith(three)
        assert two.split()[1:] == three.split()[2:] and middle.split()[1] in two.split()
    images, texts = hierarchy.embed_hierarchy(small())
    assert len(images) == 48 and texts.shape[:2] == (len(shapes.LEVELS), 48)


def command(monkeypatch, *args):
    """Execute python -m lab.hierarchy in this process -> its exit status."""
    return status_of(hierarchy.main, monkeypatch, *args)


@pytest.mark.parametrize("geometry", ["clip", "hyperbolic"])
def test_the_command_prints_a_row_per_level_and_writes_the_same_numbers(
    tmp_path, monkeypatch, capsys, few_held_out, geometry
):
    save_ours(tmp_path / "ckpt.pt", small(geometry), min_radius=0.2)
    assert command(monkeypatch, tmp_path / "ckpt.pt", "--json", tmp_path / "h.json") == 0
    metrics = json.loads((tmp_path / "h.json").read_text())
    printed = capsys.readouterr().out
    assert f"{metrics['general_nearer']:.1%}" in printed and "chance 50%" in printed
    rows = printed.splitlines()
    for i, level in enumerate(shapes.LEVELS):
        (row,) = [row for row in rows if row.startswith(f"{level}  ")]
        *_, radius, own, other = row.split()
        assert radius == f"{metrics['text_radius'][i]:.2f}"
        if geometry == "clip":
            assert own == other == "-"
        else:
            assert own == f"{metrics['own_in_cone'][i]:.1%}"
            assert other == f"{metrics['other_in_cone'][i]:.1%}"
    assert ("K = 0.2" in printed) is (geometry == "hyperbolic")
    assert max(map(len, rows)) <= 100


def test_errors_of_the_command_are_one_line_with_status_2(tmp_path, monkeypatch, capsys):
    save_ours(tmp_path / "ckpt.pt", small())
    without_folder = [tmp_path / "ckpt.pt", "--json", tmp_path / "none" / "h.json"]
    for args in ([tmp_path / "none.pt"], without_folder):
        assert command(monkeypatch, *args) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
