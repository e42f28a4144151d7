"""Where an embedding lives: three geometries, one law.

An embedding is a vector drawn from a *root*: it has a radius (how far) and a direction (where to). Take two of them, x and y, with
radii a and b and the angle g between their directions, and write the *haversine* of that angle as

    hav = (1 - cos g) / 2 = sin^2(g / 2)          0 when they point the same way, 1 when they point apart.

The law of haversines then gives the distance d between x and y in every geometry:

    clip         unit sphere           sin^2(d/2)  = hav
    euclidean    flat space            d^2         = (a - b)^2 + 4 a b hav
    hyperbolic   curvature -c          sinh^2(d/2) = sinh^2((a - b)/2) + sinh(a) sinh(b) hav

(in the hyperbolic row a, b and d are measured in units of 1/sqrt(c): multiply the radii by sqrt(c) first, divide the distance by it last).
Read it aloud: *walk the difference in radius, then turn*. On the sphere all radii are 1 and only the turn is left. In the plane a turn
costs a chord of length 2 sqrt(a b hav). In hyperbolic space circles are longer than 2 pi a, by sinh(a)/a, so the same turn costs more
the further out it is taken. For small radii sinh(a) = a, and the third row becomes the second.

Why this form and not arccosh(x0 y0 - <x, y>), the usual one? Everything on the right is a sum of non-negative terms, so nothing
cancels: float32 is enough, no exponential map is needed, and only hav = 0 (the very same direction) asks for care.

The triangle root-x-y also gives the *exterior angle* at x, by which the path root -> x has to bend to go on to y:

    euclidean    ext = atan2(b sin g,       (b - a) - 2 b hav)                half-aperture = asin(min(1, K / a))
    hyperbolic   ext = atan2(sinh(b) sin g, sinh(b - a) - 2 cosh(a) sinh(b) hav)            asin(min(1, 2 K / sinh(a)))

x *entails* y when y lies in the cone that opens outward behind x: exterior angle <= half-aperture. Near the root cones are wide ("a
shape" entails nearly everything), far out they are narrow. A sphere has no outward, hence no cones.

Sign convention: a *similarity* grows as points get closer; the minus sign in front of a distance stands in this file only.
Axes: N, M embeddings, D embedding width. Sources: EuCLIP (arXiv:2409.13079), MERU (arXiv:2304.09172), CLIP (arXiv:2103.00020).
Everything here is a pure function in float32 or float64, autocast off; learned scalars come in as arguments.
"""

import functools
import inspect
import math
from dataclasses import dataclass
from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------------------------------------------
# numerical guards: each keeps the value and makes the gradient 0 where the true one is infinite or does not exist. torch.where sends
# a zero gradient to the branch that is not taken, but 0 * inf = nan, so the argument of that branch is made harmless as well.

def full_precision(function):
    """Run `function` with autocast off and low-precision arguments in float32: in bfloat16 a distance between neighbours is noise."""
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        lift = lambda v: v.float() if torch.is_tensor(v) and v.dtype in (torch.bfloat16, torch.float16) else v
        device = next(v.device for v in (*args, *kwargs.values()) if torch.is_tensor(v))
        with torch.autocast(device.type, enabled=False):
            return function(*map(lift, args), **{k: lift(v) for k, v in kwargs.items()})
    wrapper.__signature__ = inspect.signature(function)
    return wrapper


class Distance(torch.autograd.Function):
    """The last step of the law, s -> d: s = sin^2(d/2) on the sphere (sign 1), (d/2)^2 in flat space (0), sinh^2(d/2) in hyperbolic
    space (-1). Written by hand because s is all that the derivative 1 / sqrt(s (1 - sign s)) needs; it is 0 where that is infinite."""

    @staticmethod
    def forward(ctx, s, sign):
        ctx.save_for_backward(s)
        ctx.sign = sign
        root = s.sqrt()
        if sign == 1:
            return 2 * torch.atan2(root, (1 - s).sqrt())   # no edge where asin and acos have two
        return 2 * root if sign == 0 else torch.log1p(2 * (s + root * (1 + s).sqrt()))   # 2 asinh(root), twenty times as fast

    @staticmethod
    def backward(ctx, grad):
        s, = ctx.saved_tensors
        slope = s.rsqrt() * (1 - ctx.sign * s).rsqrt()     # two roots: the product s (1 + s) overflows first
        return torch.where(slope.isinf(), 0, grad * slope), None


def safe_atan2(y, x):
    defined = x * x + y * y > torch.finfo(x.dtype).tiny
    return torch.atan2(torch.where(defined, y, 0.0), torch.where(defined, x, 1.0))


def half_aperture(k, r):
    """asin(min(1, k / r)): a quarter turn, with zero gradient, for every r <= k."""
    outside = r > k
    return torch.where(outside, torch.asin(k / torch.where(outside, r, math.inf)), math.pi / 2)


# ---------------------------------------------------------------------------------------------------------------------------------
# radius, direction, haversine

def polar(x, curv=1.0):
    """x (N, D) -> radius sqrt(curv) |x| (N, 1) and unit direction (N, D). At the root both are 0: there the law multiplies whatever depends
    on the direction by a radius of 0, so no gradient gets through."""
    r = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return curv ** 0.5 * r, x / torch.where(r > 0, r, 1.0)


def snap(s, unit):
    """Directions closer than a matmul can tell apart are the same direction: hav < 2 eps -> 0 with zero gradient, here of s = unit * hav.
    The derivative of sqrt(hav) grows like 1/sqrt(hav): on rounding noise it would be thousands of times too large. Squared logits need
    no snap."""
    return torch.where(s <= 2 * torch.finfo(s.dtype).eps * unit, 0, s)   # NaN stays NaN


def haversine_of_pairs(u, v):
    """u, v (N, D), row by row -> hav and sin of the angle (N, 1) each. |u - v|^2 / 4 does not cancel, so no snap is needed."""
    hav, rest = (u - v).square().sum(-1, keepdim=True) / 4, (u + v).square().sum(-1, keepdim=True) / 4   # sin^2, cos^2 of g/2
    return hav, Distance.apply(hav * rest, 0)


# ---------------------------------------------------------------------------------------------------------------------------------
# sphere: CLIP. Embeddings are unit vectors.

def normalize(features, alpha=None):
    return F.normalize(features, dim=-1)


def cosine_similarity(x, y, curv):
    return x @ y.T


def arc_similarity(x, y, curv):
    hav = snap(0.5 - 0.5 * (x @ y.T), 1)
    return -Distance.apply(1 - snap(1 - hav, 1), 1)


# ---------------------------------------------------------------------------------------------------------------------------------
# flat space: EuCLIP. The law multiplied out is |x|^2 + |y|^2 - 2 x.y: one matmul, two sums.

def divide_by_sqrt_width(features, alpha=None):
    return features / features.shape[-1] ** 0.5   # so that |embedding| does not grow with D; a learned scale did not help the authors


def euclidean_s(x, y):
    """s = (d/2)^2 (N, M), and the sum of both squared radii that it came from."""
    sums = x.square().sum(-1, keepdim=True) + y.square().sum(-1)   # (N, M)
    return torch.addmm(sums, x, y.T, beta=0.25, alpha=-0.5), sums


def euclidean_squared_similarity(x, y, curv):
    return -4 * torch.relu(euclidean_s(x, y)[0])


def euclidean_distance_similarity(x, y, curv):
    s, sums = euclidean_s(x, y)
    return -Distance.apply(snap(s, sums.detach() / 2), 0)   # unit: a b, which is half the sum where distances are near 0


def inner_similarity(x, y, curv):
    return x @ y.T


def euclidean_cone(text, image, min_radius, curv):
    (a, u), (b, v) = polar(text), polar(image)
    hav, sin = haversine_of_pairs(u, v)
    return safe_atan2(b * sin, (b - a) - 2 * b * hav), half_aperture(min_radius, a)


# ---------------------------------------------------------------------------------------------------------------------------------
# hyperbolic space: MERU. An embedding is a tangent vector at the root; the exponential map is part of the law.

def times_exp_alpha(features, alpha):
    return alpha.exp() * features


def cap(r):
    """sinh(a) sinh(b) overflows float32 beyond a + b = 89. Radii past 40 (float64: 319) count as 40: the rest is room for 1/c and
    the logit scale. Working embeddings have radii of a few units."""
    return r.clamp_max(0.45 * math.log(torch.finfo(r.dtype).max))


def hyperbolic_s(x, y, curv, snapped=False):
    """s = sinh^2(d/2) (N, M). Whatever depends on one radius is a vector here: per pair there are a matmul and products."""
    (a, u), (b, v) = polar(x, curv), polar(y, curv)
    a, b = cap(a), cap(b)                                                                    # (N, 1), (M, 1)
    walk = (a / 2).exp() / 2 * (-b / 2).exp().T - (-a / 2).exp() / 2 * (b / 2).exp().T       # sinh((a - b)/2)
    sinh_a, sinh_b = torch.sinh(a), torch.sinh(b)
    both = sinh_a * sinh_b.T
    turn = torch.addmm(both, sinh_a * u, (sinh_b * v).T, beta=0.5, alpha=-0.5)               # sinh(a) sinh(b) hav
    turn = snap(turn, both.detach()) if snapped else torch.relu(turn)
    return walk.square() + turn


def hyperbolic_distance_similarity(x, y, curv):
    return -curv ** -0.5 * Distance.apply(hyperbolic_s(x, y, curv, snapped=True), -1)


def hyperbolic_squared_similarity(x, y, curv):
    return (-1 / curv) * Distance.apply(hyperbolic_s(x, y, curv), -1).square()


def hyperbolic_inner_similarity(x, y, curv):
    return (-1 / curv) * (1 + 2 * hyperbolic_s(x, y, curv))   # <x, y>_L = -cosh(d) / c, and cosh d = 1 + 2 sinh^2(d/2)


def hyperbolic_cone(text, image, min_radius, curv):
    (a, u), (b, v) = polar(text, curv), polar(image, curv)
    a, b = cap(a), cap(b)
    hav, sin = haversine_of_pairs(u, v)
    exterior = safe_atan2(torch.sinh(b) * sin, torch.sinh(b - a) - 2 * torch.cosh(a) * torch.sinh(b) * hav)
    return exterior, half_aperture(2 * min_radius, torch.sinh(a))


# ---------------------------------------------------------------------------------------------------------------------------------
# the table: adding a geometry means adding a row

CLIP_SCALE = math.log(1 / 0.07)           # CLIP's start; the authors' for every logit that is not squared


class Logit(NamedTuple):
    similarity: Callable                  # (x (N, D), y (M, D), curv) -> (N, M), larger = closer
    scale: float = CLIP_SCALE             # logit_scale at the start, in log space
    scale_with_cones: Optional[float] = None   # the same when an entailment loss is added; None: as without
    scale_for_shapes: Optional[float] = None   # the same for runs of minutes on the built-in data: measured, not the paper's (README, "Numbers that bite")


class Scalar(NamedTuple):
    start: Callable                       # embedding width D -> value at the start
    low: float = -math.inf                # range kept by clamping in place after every step: a clamp in the forward pass would have no
    high: float = math.inf                # gradient outside, so a value that got there would never come back


@dataclass(frozen=True)
class Geometry:
    project: Callable                     # (features (N, D), alpha) -> embeddings (N, D), points of the space; alpha: see scalars
    logits: dict                          # name -> Logit; the first is the default
    final_ln: bool                        # LayerNorm at the end of both towers? It fixes |features|, and so a radius that is free otherwise
    scalars: dict                         # learned scalars, of three names: `alpha_image` and `alpha_text` go to `project` (else alpha is
                                          # None), exp(`log_curv`) is `curv` (else 1)
    cone: Optional[Callable]              # (text, image, min_radius, curv) -> exterior angle, half-aperture (N, 1) each; None = no cones
    root: Callable                        # all embeddings (N, D) -> the root (D,), before `retract`
    radius: Callable                      # (x (N, D), root (D,)) -> distance from the root (N,)
    retract: Callable                     # (..., D) -> (..., D): back onto the space after averaging or interpolating
    root_is: str = "the origin"           # in words, for protocols and axes
    radius_is: str = "distance from the root"
    average_is: str = "mean"


def scaled_cosine_distance(x, root):
    return (1 - F.normalize(x, dim=-1) @ F.normalize(root, dim=-1)) / 2


def length(x, root=None):
    return torch.linalg.vector_norm(x, dim=-1)


def origin(embeddings):
    return torch.zeros_like(embeddings[0])


def as_it_is(x):
    return x


GEOMETRIES = {
    "clip": Geometry(                                                          # the root is the mean of all embeddings
        project=normalize,
        logits={"cosine": Logit(cosine_similarity, scale_for_shapes=3.4),
                "arc": Logit(arc_similarity, scale_for_shapes=3.4)},
        final_ln=True, scalars={}, cone=None,
        root=lambda embeddings: embeddings.mean(0), radius=scaled_cosine_distance, retract=normalize,
        root_is="the mean of all text and image embeddings", radius_is="scaled cosine distance from the root", average_is="normalised mean"),
    "euclidean": Geometry(
        project=divide_by_sqrt_width,
        logits={"squared": Logit(euclidean_squared_similarity, 0.0, -1.0, 2.0),     # EuCLIP
                "distance": Logit(euclidean_distance_similarity, scale_for_shapes=3.0),
                "inner": Logit(inner_similarity, scale_for_shapes=3.0)},
        final_ln=False, scalars={}, cone=euclidean_cone,
        root=origin, radius=length, retract=as_it_is),
    "hyperbolic": Geometry(
        project=times_exp_alpha,
        logits={"distance": Logit(hyperbolic_distance_similarity, scale_for_shapes=3.0),   # MERU
                "squared": Logit(hyperbolic_squared_similarity, 0.0, -1.0, 2.0),
                "inner": Logit(hyperbolic_inner_similarity, scale_for_shapes=3.0)},
        final_ln=True, cone=hyperbolic_cone,
        scalars={"alpha_image": Scalar(lambda D: -math.log(D) / 2), "alpha_text": Scalar(lambda D: -math.log(D) / 2),
                 "log_curv": Scalar(lambda D: 0.0, math.log(0.1), math.log(10.0))},
        root=origin, radius=length, retract=as_it_is),
}


def find(geometry, logit=None):
    """Look a geometry up: -> its row of the table and the name of the logit, the first where none is given. Raises ValueError."""
    if geometry not in GEOMETRIES:
        raise ValueError(f"no geometry {geometry!r}; choose one of {', '.join(GEOMETRIES)}")
    row = GEOMETRIES[geometry]
    logit = next(iter(row.logits)) if logit is None else logit
    if logit not in row.logits:
        raise ValueError(f"geometry {geometry!r} has no logit {logit!r}; choose one of {', '.join(row.logits)}")
    return row, logit


def with_cones():
    return " or ".join(name for name, row in GEOMETRIES.items() if row.cone)


def given_or_origin(row, x, root):
    if root is None and row.root is not origin:
        raise ValueError(f"this geometry has no root of its own; pass root={row.root_is}")
    return row.root(x) if root is None else root


# ---------------------------------------------------------------------------------------------------------------------------------
# what everybody else calls

@full_precision
def project(features, geometry, alpha=None):
    """What a tower says -> where it is: features (N, D) -> embeddings (N, D), float32 at least.

    clip: unit vectors f/|f|; euclidean: f/sqrt(D); hyperbolic: exp(alpha) f, tangent vectors at the root, alpha a learned 0-d tensor.
    """
    return find(geometry)[0].project(features, alpha)


@full_precision
def similarity(x, y, geometry, logit=None, curv=1.0):
    """Similarity of every x to every y, before the logit scale: larger = closer.

    x (N, D), y (M, D) embeddings, curv > 0 (hyperbolic only) -> (N, M). clip: cosine in [-1, 1] or arc in [-pi, 0]; euclidean: squared
    or distance <= 0, inner any; hyperbolic: distance or squared <= 0, inner <= -1/curv. Unit: that of the embeddings, or its square:
    scaling every embedding by s asks for a logit scale smaller by s (distance), s^2 (squared, inner).
    Raises ValueError for unknown names or widths that differ. Source: EuCLIP and its authors' code (eight logits).
    """
    row, logit = find(geometry, logit)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"embeddings differ in width: {tuple(x.shape)} and {tuple(y.shape)}")
    return row.logits[logit].similarity(x, y, curv)


@full_precision
def entailment_loss(text, image, geometry, min_radius=0.1, curv=1.0):
    """How far each image is outside the cone of its text: max(0, exterior angle - half-aperture).

    text, image (N, D), row by row (one may be (1, D)) -> (N,) in radians, [0, pi]; 0 = inside. min_radius K > 0: within K of the root
    (hyperbolic: where sinh(a) < 2K) the cone is a half-space. Its mean over the batch, times lambda, is added to the contrastive loss.
    Raises ValueError for a geometry without cones. Source: EuCLIP, Figure 1; MERU.
    """
    row, _ = find(geometry)
    if row.cone is None:
        raise ValueError(f"the entailment loss needs cones and geometry {geometry!r} has none; use {with_cones()}")
    exterior, aperture = row.cone(text, image, min_radius, curv)
    return torch.relu(exterior - aperture).squeeze(-1)


@full_precision
def distance_to_root(x, geometry, root=None):
    """How far from the root each embedding is: general concepts are near, specific ones far.

    x (N, D) -> (N,). clip: (1 - cos)/2 in [0, 1] from `root` (D,), the mean of all text and image embeddings; elsewhere the root is 0
    and this is |x| (the hyperbolic distance from the root, whatever the curvature). Source: EuCLIP, Figure 2.
    """
    row, _ = find(geometry)
    return row.radius(x, given_or_origin(row, x, root))


@full_precision
def path_to_root(x, steps, geometry, root=None):
    """Points on the way from each embedding to the root, evenly spaced in tangent coordinates (clip: normalised again).

    x (N, D), steps >= 2 -> (steps, N, D): x first, root last, both included. root as in `distance_to_root`.
    Source: MERU (50 steps); EuCLIP, Figures 3 and 5.
    """
    row, _ = find(geometry)
    t = torch.linspace(0, 1, steps, device=x.device, dtype=x.dtype).view(-1, 1, 1)
    return row.retract((1 - t) * x + t * given_or_origin(row, x, root))   # (steps, N, D)


@full_precision
def average(x, geometry):
    """One embedding from several of the same thing (prompts of a class): x (P, ..., D) -> (..., D).

    clip: mean, normalised again; elsewhere the plain mean (hyperbolic: of tangent vectors). Source: the authors' zero-shot code.
    """
    return find(geometry)[0].retract(x.mean(0))
