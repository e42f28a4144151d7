"""geometry.py: facts checked by hand, coincident and collinear points, the authors' numbers."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import small, small_batch

import geometry
from geometry import GEOMETRIES

LOGITS = []
for name, space in GEOMETRIES.items():
    LOGITS += [(name, logit) for logit in space.logits]
METRICS = [pair for pair in LOGITS if pair[1] in ("arc", "distance")]
CONES = [name for name, space in GEOMETRIES.items() if space.cones]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def points(*rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype)


def similarity(x, y, name, logit=None, curv=1.0):
    return GEOMETRIES[name].similarity(x, y, logit, curv)


def outside(text, image, name, K=0.1, curv=1.0):
    return GEOMETRIES[name].entailment_loss(text, image, K, curv)


def polar_points(radius, angle):
    """A point of the plane for each angle, in float64."""
    angle = torch.as_tensor(angle, dtype=torch.float64)
    return radius * torch.stack([angle.cos(), angle.sin()], dim=-1)


# distances by hand


def test_a_quarter_turn_on_the_sphere():
    x, y = points([1, 0]), points([0, 1])
    assert similarity(x, y, "clip", "arc").item() == pytest.approx(-math.pi / 2)
    assert similarity(x, y, "clip").item() == 0


def test_three_four_five():
    x, y = points([3, 0]), points([0, 4])
    assert similarity(x, y, "euclidean").item() == pytest.approx(-25)
    assert similarity(x, y, "euclidean", "distance").item() == pytest.approx(-5)
    assert similarity(x, y, "euclidean", "inner").item() == 0


def test_hyperbolic_radii_subtract_along_a_ray_and_add_through_the_root():
    x, y = points([1, 0]), points([3, 0], [-3, 0])
    torch.testing.assert_close(similarity(x, y, "hyperbolic", curv=0.7), points([-2, -4]))


def test_hyperbolic_pythagoras():
    """cosh(d) = cosh(a) cosh(b) for a right angle at the root."""
    d = -similarity(points([1.5, 0]), points([0, 2]), "hyperbolic").item()
    assert math.cosh(d) == pytest.approx(math.cosh(1.5) * math.cosh(2))


def test_the_exponential_map_gives_the_same_hyperbolic_distance():
    """The textbook's method: lift both points to the hyperboloid, Lorentz product, acosh."""
    torch.manual_seed(0)
    x, y, c = torch.randn(5, 8).double(), torch.randn(7, 8).double(), 0.6

    def lift(v):
        r = math.sqrt(c) * v.norm(dim=1, keepdim=True)
        return torch.sinh(r) * v / r, torch.cosh(r) / math.sqrt(c)

    (x_space, x_time), (y_space, y_time) = lift(x), lift(y)
    lorentz = x_space @ y_space.T - x_time @ y_time.T
    d = torch.acosh(-c * lorentz) / math.sqrt(c)
    torch.testing.assert_close(similarity(x, y, "hyperbolic", "inner", c), lorentz)
    torch.testing.assert_close(similarity(x, y, "hyperbolic", "distance", c), -d)
    torch.testing.assert_close(similarity(x, y, "hyperbolic", "squared", c), -d.square())


@pytest.mark.parametrize("logit", ["distance", "squared"])
def test_small_curvature_is_flat(logit):
    torch.manual_seed(0)
    x, y = torch.randn(4, 3).double(), torch.randn(5, 3).double()
    flat = similarity(x, y, "euclidean", logit)
    bent = similarity(x, y, "hyperbolic", logit, 1e-8)
    torch.testing.assert_close(bent, flat, rtol=1e-6, atol=0)


def test_cones_of_small_curvature_are_flat():
    """asin(2 K / sinh(sqrt(c) a)) is asin(K' / a) with K' = 2 K / sqrt(c)."""
    torch.manual_seed(0)
    text, image = torch.randn(50, 3).double(), torch.randn(50, 3).double()
    flat = outside(text, image, "euclidean", 0.1)
    bent = outside(text, image, "hyperbolic", 0.1 / 2 * 1e-4, curv=1e-8)
    assert flat.max() > 1
    torch.testing.assert_close(bent, flat, rtol=1e-6, atol=1e-6)


# cones by hand


@pytest.mark.parametrize("name,sine", [("euclidean", 0.1), ("hyperbolic", 0.2 / math.sinh(1))])
def test_point_straight_ahead_is_in_the_cone_and_straight_behind_is_half_a_turn_off(name, sine):
    ahead, behind = outside(points([1, 0]), points([2, 0], [-2, 0]), name).tolist()
    assert ahead == 0 and behind == pytest.approx(math.pi - math.asin(sine))


def test_the_exterior_angle_of_a_unit_square_is_a_right_angle():
    """At radius 1 a cone with K = 1/2 has a half-aperture of 30 degrees."""
    loss = outside(points([1, 0]), points([1, 1]), "euclidean", 0.5).item()
    assert loss == pytest.approx(math.pi / 2 - math.pi / 6)


def test_the_cone_at_k_k_is_a_shifted_quadrant():
    """EuCLIP, Figure 1: the half-aperture there is 45 degrees."""
    apex = points([0.1, 0.1])
    assert outside(apex, points([0.1, 0.5], [0.5, 0.1], [0.3, 0.2]), "euclidean").max() < 1e-12
    assert outside(apex, points([0.09, 0.5]), "euclidean").item() > 0.01


@pytest.mark.parametrize("name", CONES)
def test_the_root_entails_everything(name):
    torch.manual_seed(0)
    assert outside(torch.zeros(1, 6), torch.randn(50, 6), name).max() == 0


@pytest.mark.parametrize("name", CONES)
def test_float32_cones_keep_near_duplicates_apart(name):
    """They are 1e-3 rad apart at radius 2. A haversine from a matrix product would be noise."""
    text, image = points([2.0, 0.0]), polar_points(2.5, [1e-3])
    exact = outside(text, image, name, 1e-4).item()
    found = outside(text.float(), image.float(), name, 1e-4).item()
    assert found == pytest.approx(exact, rel=1e-4)


# roots, paths, names


def test_distance_to_root_is_half_of_one_minus_cosine_on_the_sphere_and_the_norm_elsewhere():
    sphere, x = GEOMETRIES["clip"], points([1, 0], [0, 1], [-1, 0])
    assert sphere.distance_to_root(x, points([5, 0])[0]).tolist() == [0, 0.5, 1]
    with pytest.raises(ValueError, match="root"):
        sphere.distance_to_root(x)
    for name in CONES:
        assert GEOMETRIES[name].distance_to_root(points([3, 4], [0, 0])).tolist() == [5, 0]


def test_the_root_is_the_mean_on_the_sphere_and_the_origin_elsewhere():
    x = points([1, 0], [0, 1])
    assert GEOMETRIES["clip"].root(x).tolist() == [0.5, 0.5]
    for name in CONES:
        assert GEOMETRIES[name].root(x).tolist() == [0, 0]


@pytest.mark.parametrize("name", CONES)
def test_a_path_is_straight_and_contains_both_ends(name):
    space, x = GEOMETRIES[name], points([3, 4])
    path = space.path_to_root(x, 5)
    assert path.shape == (5, 1, 2)
    assert space.distance_to_root(path[:, 0]).tolist() == [5, 3.75, 2.5, 1.25, 0]
    assert torch.equal(path[0], x)


def test_a_path_on_the_sphere_stays_on_it_and_ends_in_the_direction_of_the_root():
    x = polar_points(1, [0.0])
    path = GEOMETRIES["clip"].path_to_root(x, 3, points([0, 2])[0])[:, 0]
    torch.testing.assert_close(path.norm(dim=-1), torch.ones(3).double())
    torch.testing.assert_close(path[[0, -1]], points([1, 0], [0, 1]))


def test_only_the_sphere_projects_points():
    mean = points([1.5, 1.5])
    torch.testing.assert_close(GEOMETRIES["clip"].project(mean), points([0.5**0.5, 0.5**0.5]))
    for name in CONES:
        assert torch.equal(GEOMETRIES[name].project(mean), mean)


def test_embeddings_are_unit_vectors_scaled_features_or_tangent_vectors():
    features, alpha = points([3.0, 4, 0, 0]), torch.tensor(2.0).log()
    for name, first in (("clip", 0.6), ("euclidean", 1.5), ("hyperbolic", 6)):
        assert GEOMETRIES[name].embed(features, alpha)[0, 0].item() == pytest.approx(first)


def test_each_geometry_starts_with_the_values_of_the_paper():
    logits = {name: space.find_logit(None) for name, space in GEOMETRIES.items()}
    assert logits == {"clip": "cosine", "euclidean": "squared", "hyperbolic": "distance"}
    final_ln = {name: space.final_ln for name, space in GEOMETRIES.items()}
    assert final_ln == {"clip": True, "euclidean": False, "hyperbolic": True}
    assert not GEOMETRIES["clip"].cones and CONES == ["euclidean", "hyperbolic"]
    for name, logit in LOGITS:
        scales = [GEOMETRIES[name].init_logit_scale(logit, cones) for cones in (False, True)]
        assert scales == [0, -1] if logit == "squared" else [math.log(1 / 0.07)] * 2
    learned = GEOMETRIES["hyperbolic"].learned_scalars(16)
    assert learned["curvature"] == (0, math.log(0.1), math.log(10))
    assert learned["alpha_img"] == learned["alpha_txt"] == (-math.log(4), -math.inf, math.inf)
    for name in ("clip", "euclidean"):
        assert GEOMETRIES[name].learned_scalars(16) == {}


def test_unknown_names_and_cones_on_the_sphere_are_refused():
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match="cosine, arc"):
        similarity(x, x, "clip", "squared")
    with pytest.raises(ValueError, match="cones"):
        outside(x, x, "clip")
    with pytest.raises(ValueError, match="clip, euclidean, hyperbolic"):
        small("spherical")


# the edges: values and gradients where points coincide or are collinear with the root


def degenerate_pairs(dtype):
    """name -> x, y (6, 16)."""
    torch.manual_seed(0)
    x = torch.randn(6, 16, dtype=dtype) / 4
    one, least = x[:1].repeat(6, 1), torch.finfo(dtype).tiny ** 0.5
    return {
        "equal": (x, x), "all equal": (one, one), "y zero": (x, 0 * x), "both zero": (0 * x, 0 * x),
        "collinear": (x, 3 * x), "antipodal": (x, -x), "neighbours": (x, x * (1 + 2**-7)),
        "far": (1e4 * x, 1e4 * x.flip(0)), "far and equal": (1e4 * x, 1e4 * x),
        "far and near": (1e4 * x, x), "tiny": (1e-30 * x, 1e-30 * x.flip(0)),
        "squares underflow": (least * x, least * x.flip(0)),
    }


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name,logit", LOGITS)
def test_values_and_gradients_are_finite_on_every_degenerate_pair(name, logit, dtype):
    project = GEOMETRIES[name].project
    for case, (x, y) in degenerate_pairs(dtype).items():
        curv = torch.tensor(0.1, dtype=dtype)
        x, y, curv = leaves(project(x), project(y), curv)
        logits = 100 * similarity(x, y, name, logit, curv)
        match = torch.arange(len(x))
        loss = F.cross_entropy(logits, match) / 2 + F.cross_entropy(logits.T, match) / 2
        loss.backward()
        grads = [x.grad, y.grad] + [curv.grad] * (name == "hyperbolic")
        assert all(value.isfinite().all() for value in (logits, loss, *grads)), case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONES)
def test_cones_are_finite_on_every_degenerate_pair(name, dtype):
    for case, (x, y) in degenerate_pairs(dtype).items():
        for text, image in ((x, y), (y, x)):
            K, curv = torch.tensor(0.1, dtype=dtype), torch.tensor(0.1, dtype=dtype)
            text, image, K, curv = leaves(text, image, K, curv)
            loss = outside(text, image, name, K, curv)
            loss.sum().backward()
            grads = [text.grad, image.grad, K.grad] + [curv.grad] * (name == "hyperbolic")
            assert all(value.isfinite().all() for value in (loss, *grads)), case
            assert loss.min() >= 0 and loss.max() <= 3.2, case


@pytest.mark.parametrize("D,bits", [(16, 64), (128, 32), (512, 32)])
@pytest.mark.parametrize("name,logit", METRICS)
def test_equal_points_have_distance_zero_and_no_gradient(name, logit, D, bits):
    """A matrix product alone would leave rounding errors instead of zeros."""
    torch.manual_seed(0)
    x = F.normalize(torch.randn(1024, D, dtype=getattr(torch, f"float{bits}")), dim=-1)
    x, y = leaves(x, x)
    own = similarity(x, y, name, logit).diagonal()
    own.sum().backward()
    assert [v.count_nonzero().item() for v in (own, x.grad, y.grad)] == [0, 0, 0]


@pytest.mark.parametrize("name", CONES)
def test_squared_distances_of_equal_points_are_tiny_and_have_a_tiny_gradient(name):
    x, y = leaves(*[pairs_at(0)[0].float()] * 2)
    own = similarity(x, y, name, "squared").diagonal()
    own.sum().backward()
    assert max(v.abs().max() for v in (own, x.grad, y.grad)) < 5e-6 and own.max() <= 0


@pytest.mark.parametrize("name,logit", LOGITS)
def test_no_guard_hides_nan(name, logit):
    x, y = torch.eye(3), torch.eye(3)
    x[0, 1] = math.nan
    for found in (similarity(x, y, name, logit), similarity(y, x, name, logit).T):
        assert found[0].isnan().all() and found[1:].isfinite().all()


@pytest.mark.parametrize("name", CONES)
def test_no_guard_of_the_cones_hides_nan(name):
    x, y = torch.eye(3), torch.eye(3).flip(0)
    x[0, 1] = math.nan
    for found in (outside(x, y, name), outside(y, x, name)):
        assert found.isnan().tolist() == [True, False, False]
    assert outside(y, y, name, torch.tensor(math.nan)).isnan().all()
    assert not outside(y, y, name).isnan().any()


# what the docstring says about float32


def pairs_at(angle, D=512):
    """64 points of radius 1 and their neighbours at that angle, computed in float64."""
    torch.manual_seed(0)
    u, w = F.normalize(torch.randn(2, 64, D, dtype=torch.float64), dim=-1)
    side = F.normalize(w - (w * u).sum(-1, keepdim=True) * u, dim=-1)
    return u, math.cos(angle) * u + math.sin(angle) * side


@pytest.mark.parametrize("name,logit", METRICS)
def test_float32_merges_directions_within_a_thousandth_but_separates_two_thousandths(name, logit):
    seen = []
    for angle in (0.95e-3, 2e-3):
        x, y = pairs_at(angle)
        exact = similarity(x, y, name, logit).diagonal()
        torch.testing.assert_close(exact, torch.full_like(exact, -angle), rtol=0.2, atol=0)
        seen.append(similarity(x.float(), y.float(), name, logit).diagonal() / exact)
    below, above = seen
    assert below.abs().max() < 1e-3  # in hyperbolic space the rounded radii still differ
    assert above.min() > 0.8 and above.max() < 1.2


def test_float32_haversines_of_rows_resolve_a_ten_thousandth_of_a_radian():
    """A matrix product would return 0 or 24 times the exact value, which is 2.5e-9."""
    x, y = pairs_at(1e-4, D=128)
    hav, _ = geometry.haversine(x.float(), y.float())
    exact = math.sin(1e-4 / 2) ** 2
    assert ((hav - exact).abs() / exact).max() < 5e-4


@pytest.mark.parametrize("radius", [1e-3, 1, 1e3])
def test_float32_merges_flat_points_within_a_thousandth_of_their_radius(radius):
    x = points([radius, 0], dtype=torch.float32)
    y = points([radius, 0.95e-3 * radius], [(1 + 0.95e-3) * radius, 0], dtype=torch.float32)
    assert similarity(x, y, "euclidean", "distance").tolist() == [[0, 0]]
    y = points([radius, 2e-3 * radius], [(1 + 2e-3) * radius, 0], dtype=torch.float32)
    assert similarity(x, y, "euclidean", "distance").max() < -1.8e-3 * radius


@pytest.mark.parametrize("dtype,cap", [(torch.float32, 40), (torch.float64, 319)])
def test_hyperbolic_radii_beyond_the_cap_equal_the_cap_and_have_no_gradient(dtype, cap):
    x, y = leaves(points([1e4, 0], [cap / 2, 0]).to(dtype), points([-1e4, 0]).to(dtype))
    d = -similarity(x, y, "hyperbolic")
    d.sum().backward()
    assert d[:, 0].tolist() == pytest.approx([2 * cap, 1.5 * cap], rel=0.01)
    assert x.grad[0].abs().max() < 1e-9 and y.grad.abs().max() < 1e-9
    assert x.grad[1].tolist() == pytest.approx([1, 0])
    turned = -similarity(points([1e4, 0]).to(dtype), points([0, 1e4]).to(dtype), "hyperbolic")
    assert turned.isfinite().all() and outside(x, y.expand(2, 2), "hyperbolic").isfinite().all()


# another geometry is another class


class Manhattan(geometry.Geometry):
    """Distances along a grid of streets, and one learned scalar."""

    logits = ("distance",)
    final_ln = True
    cones = False

    def learned_scalars(self, D):
        return {"alpha_txt": (0.5, -1.0, 1.0)}

    def embed(self, features, alpha=None):
        return features if alpha is None else alpha.exp() * features

    def similarity(self, x, y, logit=None, curv=1.0):
        return -torch.cdist(x, y, p=1)


def test_a_fourth_geometry_is_one_class(monkeypatch):
    monkeypatch.setitem(GEOMETRIES, "manhattan", Manhattan())
    model, (images, tokens) = small("manhattan"), small_batch()
    image, text, scalars = model(images, tokens)
    losses = model.loss(image, text, scalars)
    streets = (image[:, None] - text).abs().sum(-1)  # (N, N)
    logits, match = -streets / 0.07, torch.arange(8)
    expected = F.cross_entropy(logits, match) / 2 + F.cross_entropy(logits.T, match) / 2
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-4, atol=1e-5)
    losses["loss"].backward()
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0
    assert "text_radius" in losses and not {"entailment", "in_cone"} & set(losses)
    model.alpha_txt.data.fill_(7.0)
    model.clamp_scalars()
    assert model.alpha_txt.item() == 1
    with pytest.raises(ValueError, match="cones"):
        model.loss(image, text, scalars, entailment_weight=0.2)


# results of the authors' code, and of an evaluation of the same formulas to 80 digits

GOLDEN = np.load(Path(__file__).parent / "golden.npz")
CASES = sorted({key.rsplit("/", 2)[0] for key in GOLDEN.files if not key.startswith("input")})
CLOSE = [(torch.float64, 1e-11), (torch.float32, 1e-4)]  # tolerance relative to 1 + |value|


def check_contrastive(raw, name, logit, curv, log_scale, expected, close):
    """raw: features of images x and of texts y (N, D)."""
    space, (dtype, _) = GEOMETRIES[name], close
    numbers = (*raw, log_scale, math.log(curv))
    x, y, log_scale, log_curv = leaves(*(torch.tensor(v, dtype=dtype) for v in numbers))
    alpha = torch.tensor(-math.log(x.shape[1]) / 2, dtype=dtype)
    x_embedding, y_embedding = space.embed(x, alpha), space.embed(y, alpha)
    logits = log_scale.exp() * space.similarity(x_embedding, y_embedding, logit, log_curv.exp())
    match = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)) / 2
    loss.backward()
    compare(expected, close, logits=logits, loss=loss, grad_x=x.grad, grad_y=y.grad,
            grad_log_scale=log_scale.grad, grad_log_curv=log_curv.grad)


def check_entailment(raw, name, curv, K, expected, close):
    space, (dtype, _) = GEOMETRIES[name], close
    image, text, log_curv = leaves(*(torch.tensor(v, dtype=dtype) for v in (*raw, math.log(curv))))
    width = text.shape[1] ** 0.5
    per_pair = space.entailment_loss(text / width, image / width, K, log_curv.exp())
    loss = per_pair.mean()
    loss.backward()
    compare(expected, close, per_pair=per_pair, loss=loss, grad_text=text.grad,
            grad_image=image.grad, grad_log_curv=log_curv.grad)


def compare(expected, close, **found):
    expected = {key: torch.tensor(v) for key, v in expected.items() if key in found}
    assert expected
    for key, value in expected.items():
        error = ((found[key].double() - value).abs() / (1 + value.abs())).max()
        assert error < close[1], f"{key}: {error:.1e}"


@pytest.mark.parametrize("close", CLOSE, ids=["float64", "float32"])
@pytest.mark.parametrize("source", ["authors", "truth"])
@pytest.mark.parametrize("case", CASES)
def test_the_authors_code_and_eighty_digits_agree(case, source, close):
    what, points, name, *rest = case.split("/")
    raw = GOLDEN[f"input/{points}/x"], GOLDEN[f"input/{points}/y"]
    start = f"{case}/{source}/"
    expected = {k.removeprefix(start): GOLDEN[k] for k in GOLDEN.files if k.startswith(start)}
    if what == "contrastive":
        logit, curv, log_scale = rest
        check_contrastive(raw, name, logit, float(curv), float(log_scale), expected, close)
    else:
        curv, K = rest
        check_entailment(raw, name, float(curv), float(K), expected, close)


AUTHORS_NAMES = {
    "clip": ("clip", "cosine"), "elliptic": ("clip", "arc"),
    "euclidean": ("euclidean", "distance"), "euclidean-squared": ("euclidean", "squared"),
    "euclidean-inner": ("euclidean", "inner"), "hyperbolic": ("hyperbolic", "distance"),
    "hyperbolic-squared": ("hyperbolic", "squared"), "hyperbolic-inner": ("hyperbolic", "inner"),
}
FULL_SET = Path(os.environ.get("GOLDEN_DIR", "-")) / "golden_public.npz"


@pytest.mark.skipif(not FULL_SET.exists(), reason="GOLDEN_DIR is no folder with golden vectors")
@pytest.mark.parametrize("close", CLOSE, ids=["float64", "float32"])
@pytest.mark.parametrize("source", ["golden_public.npz", "truth_public.npz"])
def test_the_full_set_of_golden_vectors(source, close):
    golden, values = dict(np.load(FULL_SET)), dict(np.load(FULL_SET.with_name(source)))
    scales = json.loads(str(golden["log_scales_json"]))
    checked = 0
    for case in json.loads(str(golden["index_json"])):
        start, what = case["name"] + "/", case["what"]
        keys = [key for key in values if key.startswith(start)]
        if what not in ("contrastive", "entailment") or not keys:
            continue
        # the gradients for the towers' features are called grad_x_raw and so on
        expected = {k.removeprefix(start).removesuffix("_raw"): values[k] for k in sorted(keys)}
        raw = golden[f"input/{case['set']}/x_raw"], golden[f"input/{case['set']}/y_raw"]
        if what == "contrastive":
            names = AUTHORS_NAMES[case["geometry"]]
            scale = scales[case["scale"]]
            check_contrastive(raw, *names, case["curv"], scale, expected, close)
        else:
            check_entailment(raw, case["geometry"], case["curv"], case["K"], expected, close)
        checked += 1
    assert checked > 100
