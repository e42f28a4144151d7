"""geometry.py: facts that can be checked by hand, the degenerate pairs, and numbers from the authors' own code."""

import inspect
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import geometry as geo
from geometry import GEOMETRIES, distance_to_root, entailment_loss, path_to_root, similarity

LOGITS = [(name, logit) for name, row in GEOMETRIES.items() for logit in row.logits]
CONES = [name for name, row in GEOMETRIES.items() if row.cone]


def points(*rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype)


# by hand

def test_a_quarter_turn_on_the_sphere():
    x, y = points([1, 0]), points([0, 1])
    assert similarity(x, y, "clip", "arc").item() == pytest.approx(-math.pi / 2)
    assert similarity(x, y, "clip").item() == 0


def test_three_four_five():
    x, y = points([3, 0]), points([0, 4])
    assert similarity(x, y, "euclidean").item() == pytest.approx(-25)
    assert similarity(x, y, "euclidean", "distance").item() == pytest.approx(-5)
    assert similarity(x, y, "euclidean", "inner").item() == 0


def test_hyperbolic_distance_along_a_ray_is_the_difference_of_radii_and_through_the_root_their_sum():
    x, y = points([1, 0]), points([3, 0], [-3, 0])
    torch.testing.assert_close(similarity(x, y, "hyperbolic", curv=0.7), points([-2, -4]))


def test_hyperbolic_pythagoras():
    """cosh c = cosh a cosh b for a right angle at the root."""
    d = -similarity(points([1.5, 0]), points([0, 2]), "hyperbolic").item()
    assert math.cosh(d) == pytest.approx(math.cosh(1.5) * math.cosh(2))


def test_hyperbolic_distance_by_the_exponential_map():
    """The textbook route: lift both tangent vectors to the hyperboloid, take the Lorentz product, arccosh."""
    torch.manual_seed(0)
    x, y, c = torch.randn(5, 8, dtype=torch.float64), torch.randn(7, 8, dtype=torch.float64), 0.6

    def lift(v):
        r = math.sqrt(c) * v.norm(dim=1, keepdim=True)
        return torch.sinh(r) * v / r, torch.cosh(r) / math.sqrt(c)

    (xs, x0), (ys, y0) = lift(x), lift(y)
    lorentz = xs @ ys.T - x0 @ y0.T
    assert torch.allclose(similarity(x, y, "hyperbolic", "inner", c), lorentz)
    assert torch.allclose(similarity(x, y, "hyperbolic", "distance", c), -torch.acosh(-c * lorentz) / math.sqrt(c))


def test_small_curvature_is_flat():
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    for logit in ("distance", "squared"):
        flat = similarity(x, y, "euclidean", logit)
        torch.testing.assert_close(similarity(x, y, "hyperbolic", logit, curv=1e-8), flat, rtol=1e-6, atol=0)
    torch.testing.assert_close(entailment_loss(x, y[:4], "hyperbolic", 0.1 / 2, 1e-8), entailment_loss(x, y[:4], "euclidean", 0.1 / 2 * 2e4),
                               rtol=1e-6, atol=1e-6)   # asin(2K / sinh(sqrt(c) a)) is asin(K' / a) with K' = 2K / sqrt(c)


@pytest.mark.parametrize("geometry", CONES)
def test_point_straight_ahead_is_inside_the_cone_and_straight_behind_is_half_a_turn_off(geometry):
    text, ahead, behind = points([1, 0]), points([2, 0]), points([-2, 0])
    assert entailment_loss(text, ahead, geometry).item() == 0
    aperture = math.asin(0.1) if geometry == "euclidean" else math.asin(0.2 / math.sinh(1))
    assert entailment_loss(text, behind, geometry).item() == pytest.approx(math.pi - aperture)


def test_exterior_angle_of_a_unit_square():
    """From (1, 0) to (1, 1) the path turns by 90 degrees; the cone at radius 1 with K = 1/2 is open by 30."""
    assert entailment_loss(points([1, 0]), points([1, 1]), "euclidean", 0.5).item() == pytest.approx(math.pi / 2 - math.pi / 6)


def test_cone_at_k_k_is_a_shifted_quadrant():
    """Figure 1 of the paper: apex (K, K) has half-aperture 45 degrees."""
    apex, corners = points([0.1, 0.1]), points([0.1, 0.5], [0.5, 0.1], [0.3, 0.2], [0.09, 0.5])
    loss = entailment_loss(apex, corners, "euclidean", 0.1)
    assert loss[:3].max() < 1e-12 and loss[3] > 0.01


@pytest.mark.parametrize("geometry", CONES)
def test_the_root_entails_everything(geometry):
    assert entailment_loss(torch.zeros(1, 6), torch.randn(50, 6), geometry).max() == 0


def test_path_goes_straight_to_the_root_and_keeps_both_ends():
    x, root = torch.tensor([[3.0, 4.0]]), torch.tensor([0.0, 2.0])
    path = path_to_root(x, 5, "euclidean")
    assert path.shape == (5, 1, 2) and torch.equal(path[0], x) and torch.equal(path[-1], torch.zeros(1, 2))
    assert torch.allclose(distance_to_root(path[:, 0], "euclidean"), torch.tensor([5.0, 3.75, 2.5, 1.25, 0.0]))
    on_sphere = path_to_root(F.normalize(x, dim=-1), 3, "clip", root)[:, 0]
    assert torch.allclose(on_sphere.norm(dim=-1), torch.ones(3)) and torch.allclose(on_sphere[-1], torch.tensor([0.0, 1.0]))


def test_distance_to_root_on_the_sphere_is_half_of_one_minus_cosine():
    x = points([1, 0], [0, 1], [-1, 0])
    assert distance_to_root(x, "clip", points([5, 0])[0]).tolist() == [0, 0.5, 1]
    with pytest.raises(ValueError, match="root="):
        distance_to_root(x, "clip")


def test_averages_of_prompts_are_normalised_on_the_sphere_only():
    prompts = points([[3, 0]], [[0, 3]])   # two prompts, one class
    assert torch.allclose(geo.average(prompts, "clip"), points([math.sqrt(0.5)] * 2))
    assert geo.average(prompts, "euclidean").tolist() == geo.average(prompts, "hyperbolic").tolist() == [[1.5, 1.5]]


def test_unknown_names_are_refused_with_the_choices():
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match="clip, euclidean, hyperbolic"):
        similarity(x, x, "spherical")
    with pytest.raises(ValueError, match="cosine, arc"):
        similarity(x, x, "clip", "squared")
    with pytest.raises(ValueError, match="width"):
        similarity(x, torch.ones(1, 3), "euclidean")
    with pytest.raises(ValueError, match="cones"):
        entailment_loss(x, x, "clip")


# the edges: every gradient is finite where two points, or a point and the root, are the same or in line

def degenerate_sets(dtype):
    torch.manual_seed(0)
    x = torch.randn(6, 16, dtype=dtype) / 4
    return dict(equal=(x, x.clone()), all_equal=(x[:1].repeat(6, 1), x[:1].repeat(6, 1)), zero_text=(x, 0 * x), zero_both=(0 * x, 0 * x),
                collinear=(x, 3 * x), antipodal=(x, -x), far=(1e4 * x, 1e4 * x.flip(0)), far_equal=(1e4 * x, 1e4 * x),
                neighbours=(x, x * (1 + torch.finfo(dtype).eps)), tiny=(1e-30 * x, 1e-30 * x.flip(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("geometry,logit", LOGITS)
def test_fault_28_values_and_gradients_are_finite_on_every_degenerate_pair(geometry, logit, dtype):
    for name, (x, y) in degenerate_sets(dtype).items():
        x, y = GEOMETRIES[geometry].retract(x), GEOMETRIES[geometry].retract(y)
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        curv = torch.tensor(0.1, dtype=dtype, requires_grad=True)
        logits = 100 * similarity(x, y, geometry, logit, curv)
        target = torch.arange(len(x))
        (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)).backward()
        for value in (logits, x.grad, y.grad, *([curv.grad] if geometry == "hyperbolic" else [])):
            assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("geometry", CONES)
def test_fault_28_cones_are_finite_on_every_degenerate_pair(geometry, dtype):
    for name, (image, text) in degenerate_sets(dtype).items():
        image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
        K = torch.tensor(0.1, dtype=dtype, requires_grad=True)
        loss = entailment_loss(text, image, geometry, K)
        loss.sum().backward()
        for value in (loss, image.grad, text.grad, K.grad):
            assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("geometry,logit", [l for l in LOGITS if l[1] in ("distance", "squared", "arc")])
def test_equal_points_have_distance_zero_and_no_gradient(geometry, logit):
    """In float32 at D = 512 a matmul's rounding noise, not zero, stands where the distance should be."""
    torch.manual_seed(0)
    x = GEOMETRIES[geometry].retract(F.normalize(torch.randn(64, 512), dim=-1)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    own = similarity(x, y, geometry, logit).diagonal()
    own.sum().backward()
    assert own.abs().max() <= (0 if logit != "squared" else 1e-5)
    assert max(x.grad.abs().max(), y.grad.abs().max()) <= (0 if logit != "squared" else 1e-5)


@pytest.mark.parametrize("geometry,logit", LOGITS)
def test_low_precision_and_autocast_do_not_reach_the_geometry(geometry, logit):
    torch.manual_seed(0)
    x, y = (F.normalize(torch.randn(4, 64), dim=-1).bfloat16() for _ in range(2))
    plain = similarity(x.float(), y.float(), geometry, logit)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(similarity(x, y, geometry, logit), plain) and plain.dtype == torch.float32


def test_float32_keeps_near_duplicates_apart_in_the_cones():
    """Angle 1e-3 at radius 2: a hav that came from a matmul would be noise (README, "Numbers that bite")."""
    text = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    image = 2.5 * torch.tensor([[math.cos(1e-3), math.sin(1e-3)]], dtype=torch.float64)
    for geometry in CONES:
        exact = entailment_loss(text, image, geometry, 1e-4).item()
        assert entailment_loss(text.float(), image.float(), geometry, 1e-4).item() == pytest.approx(exact, rel=1e-4)


def test_a_curvature_clamped_inside_the_forward_pass_would_never_come_back():
    """Why ranges are restored after the step: outside its range a clamped parameter has no gradient."""
    log_curv = torch.tensor(math.log(20.0), requires_grad=True)
    similarity(torch.ones(1, 2), -torch.ones(1, 2), "hyperbolic", curv=log_curv.clamp(max=math.log(10)).exp()).sum().backward()
    assert log_curv.grad == 0


# numbers put out by the authors' code, and by an evaluation to 80 digits

GOLDEN = np.load(Path(__file__).parent / "golden.npz")


def check_contrastive(x_raw, y_raw, geometry, logit, curv, log_scale, expected, close):
    dtype = close["dtype"]
    x_raw, y_raw = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in (x_raw, y_raw))
    log_scale, log_curv = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in (log_scale, math.log(curv)))
    project = (lambda f: F.normalize(f, dim=-1)) if geometry == "clip" else (lambda f: f / f.shape[1] ** 0.5)
    logits = log_scale.exp() * similarity(project(x_raw), project(y_raw), geometry, logit, log_curv.exp())
    target = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    loss.backward()
    found = dict(logits=logits, loss=loss, grad_x=x_raw.grad, grad_y=y_raw.grad, grad_log_scale=log_scale.grad, grad_log_curv=log_curv.grad)
    compare(found, expected, close)


def check_entailment(x_raw, y_raw, geometry, curv, K, expected, close):
    dtype = close["dtype"]
    text, image = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in (y_raw, x_raw))
    log_curv = torch.tensor(math.log(curv), dtype=dtype, requires_grad=True)
    width = text.shape[1] ** 0.5
    per_pair = entailment_loss(text / width, image / width, geometry, K, log_curv.exp())
    per_pair.mean().backward()
    found = dict(per_pair=per_pair, loss=per_pair.mean(), grad_text=text.grad, grad_image=image.grad, grad_log_curv=log_curv.grad)
    compare(found, expected, close)


def compare(found, expected, close):
    assert expected
    for key, value in expected.items():
        value = torch.tensor(value)
        error = ((found[key].double() - value).abs() / (1 + value.abs())).max()
        assert error < close["tolerance"], f"{key}: {error:.1e}"


CLOSE = [dict(dtype=torch.float64, tolerance=1e-11), dict(dtype=torch.float32, tolerance=1e-4)]


@pytest.mark.parametrize("close", CLOSE, ids=["float64", "float32"])
@pytest.mark.parametrize("case", sorted({k.rsplit("/", 2)[0] for k in GOLDEN.files if k[0] in "ce"}))
def test_the_authors_code_and_eighty_digits_agree(case, close):
    what, data, geometry, *rest = case.split("/")
    x_raw, y_raw = GOLDEN[f"input/{data}/x"], GOLDEN[f"input/{data}/y"]
    for source in ("authors", "truth"):
        expected = {k.rsplit("/", 1)[1]: GOLDEN[k] for k in GOLDEN.files if k.startswith(f"{case}/{source}/")}
        if what == "contrastive":
            check_contrastive(x_raw, y_raw, geometry, rest[0], float(rest[1]), float(rest[2]), expected, close)
        else:
            check_entailment(x_raw, y_raw, geometry, float(rest[0]), float(rest[1]), expected, close)


AUTHORS_NAMES = {"clip": ("clip", "cosine"), "elliptic": ("clip", "arc"), "euclidean": ("euclidean", "distance"),
                 "euclidean-squared": ("euclidean", "squared"), "euclidean-inner": ("euclidean", "inner"), "hyperbolic": ("hyperbolic", "distance"),
                 "hyperbolic-squared": ("hyperbolic", "squared"), "hyperbolic-inner": ("hyperbolic", "inner")}
ALL_GOLDEN = Path(os.environ.get("GOLDEN_DIR", "-")) / "golden_public.npz"


@pytest.mark.skipif(not ALL_GOLDEN.exists(), reason="set GOLDEN_DIR to the folder of the full set of golden vectors; an excerpt is always tested")
@pytest.mark.parametrize("close", CLOSE, ids=["float64", "float32"])
@pytest.mark.parametrize("source", ["golden_public.npz", "truth_public.npz"])
def test_the_full_set_of_golden_vectors(source, close):
    golden = np.load(ALL_GOLDEN)
    values, scales = np.load(ALL_GOLDEN.with_name(source)), json.loads(str(golden["log_scales_json"]))
    cases = 0
    for case in json.loads(str(golden["index_json"])):
        keys = [k for k in values.files if k.startswith(case["name"] + "/")]
        names = ("logits", "loss", "grad_x_raw", "grad_y_raw", "grad_log_scale", "grad_log_curv", "per_pair", "grad_text_raw", "grad_image_raw")
        expected = {k.rsplit("/", 1)[1].removesuffix("_raw"): values[k] for k in keys if k.rsplit("/", 1)[1] in names}
        x_raw, y_raw = (golden[f"input/{case['set']}/{k}_raw"] for k in "xy") if "set" in case else (None, None)
        if case["what"] == "contrastive" and expected:
            check_contrastive(x_raw, y_raw, *AUTHORS_NAMES[case["geometry"]], case["curv"], scales[case["scale"]], expected, close)
        elif case["what"] == "entailment" and expected:
            check_entailment(x_raw, y_raw, case["geometry"], case["curv"], case["K"], expected, close)
        cases += bool(expected)
    assert cases > 100


def test_the_table_is_complete():
    for name, row in GEOMETRIES.items():
        assert all(math.isfinite(logit.scale) for logit in row.logits.values()), name
        assert row.project and row.root and row.radius and row.retract
    defaults = {name: (next(iter(row.logits)), row.final_ln) for name, row in GEOMETRIES.items()}
    assert defaults.items() >= dict(clip=("cosine", True), euclidean=("squared", False), hyperbolic=("distance", True)).items()
    assert list(inspect.signature(similarity).parameters) == ["x", "y", "geometry", "logit", "curv"]
