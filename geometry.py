"""Three geometries for embeddings: the sphere (CLIP), flat space (EuCLIP), hyperbolic space (MERU).

Distance. Let vectors x and y have lengths a and b and an angle g between them, and call
hav = sin^2(g/2) = (1 - cos g) / 2 the *haversine* of g. One law, the law of haversines, gives their
distance d in every geometry:

    S(d/2)^2 = S((a - b)/2)^2 + S(a) S(b) hav

    euclidean    S(r) = r       d^2         = (a - b)^2 + 4 a b hav
    hyperbolic   S(r) = sinh r  sinh^2(d/2) = sinh^2((a - b)/2) + sinh(a) sinh(b) hav
    clip         S(r) = sin r   sin^2(d/2)  = hav       (a = b = pi/2: the points of an equator)

If the curvature of hyperbolic space is -c, the unit of a, b and d is 1/sqrt(c).

Entailment. In flat and hyperbolic space the origin is the *root*, and a is the distance of x from
it. Walk from the root to x, then turn towards y: you turn by the *exterior angle* at x. x *entails*
y if that is at most the *half-aperture* of x: y is in the cone that opens behind x.

    exterior angle   atan2(S(b) sin g, S(b - a) - 2 S'(a) S(b) hav)       S'(r) = 1 or cosh r
    half-aperture    asin(K / a), in hyperbolic space asin(2 K / sinh(a))

The *minimum radius* K sets how wide cones are. So near the root that asin has no value the
half-aperture is a right angle. A sphere has no outward, hence no cones.

Precision. No term of the law is negative, so nothing cancels. But for all pairs at once hav comes
from a matrix product, as 1 - cos g, with an error of 1e-7 in float32. Its square root, which the
logits `arc` and `distance` take, would be noise for near pairs. There `snap` takes a hav below
4 eps for 0: directions within 1.4e-3 rad, and flat points within 1.4e-3 of their length, count as
equal. Cones compare row with row and can afford hav = |u - v|^2 / 4: at 1e-4 rad, in 128
dimensions, its error is 1e-4 of its value. All this wants float32 or 64: no autocast, no TF32.

A *similarity* is larger for closer points: minus a distance, or a product. Axes: N images and M
texts, or the other way round; D is the width of the embeddings.
Sources: EuCLIP (arXiv:2409.13079), MERU (arXiv:2304.09172), CLIP (arXiv:2103.00020).
"""

import math

import torch
import torch.nn.functional as F

# Guards: where a derivative is infinite or undefined, the gradient shall be 0. torch.where alone
# does not give that: backward multiplies 0 by the infinite derivative of the unused branch: nan. So
# the unused branch is computed from a harmless argument. NaN fails all conditions, passes through.


def safe_sqrt(x):
    """sqrt(x), but 0 with gradient 0 for x <= 0: relu's backward turns infinity into 0 there."""
    return torch.relu(x).sqrt()


def safe_atan2(y, x):
    """atan2; 0 with gradient 0 at the origin, where no angle is defined."""
    origin = x * x + y * y <= torch.finfo(x.dtype).tiny
    return torch.atan2(torch.where(origin, 0.0, y), torch.where(origin, 1.0, x))


def half_aperture(K, radius):
    """asin(K / radius); a right angle with gradient 0 for radius <= K."""
    near = (radius <= K) | (K / radius >= 1)  # the quotient is rounded, too
    return torch.where(near, math.pi / 2, torch.asin(K / torch.where(near, math.inf, radius)))


def snap(x, unit=1.0):
    """x, but 0 with gradient 0 up to 4 * eps * unit. There x is only the rounding error of a matrix
    product with terms of size unit, and the gradient of sqrt(x) would amplify it."""
    return torch.where(x <= 4 * torch.finfo(x.dtype).eps * unit, 0.0, x)


def polar(x):
    """x (..., D) -> radius (..., 1) and direction (..., D) of length 1; at the root both are 0."""
    radius = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return radius, x / torch.where(radius == 0, 1.0, radius)


def haversine(u, v):
    """Directions u, v (..., D), broadcast -> haversine and sine of their angle, (..., 1) each."""
    hav = (u - v).square().sum(-1, keepdim=True) / 4  # sin^2(g / 2)
    rest = (u + v).square().sum(-1, keepdim=True) / 4  # cos^2(g / 2)
    return hav, 2 * safe_sqrt(hav * rest)


class Geometry:
    """What geometries have in common. To add one, add a class, and its name at the end of the file.

    It needs `logits` (names of its similarities, the default first), `final_ln` (do both towers end
    with a LayerNorm? In the released weights EuCLIP's do not), `cones`, `embed`, `similarity`, and
    `cone` if it has cones. If it is no vector space, then `root`, `distance_to_root` and `project`.
    Its `learned_scalars` may be called alpha_img, alpha_txt (they come to `embed`) and curvature.
    """

    cones = True  # does it have entailment cones?
    root_name = "the origin"

    def learned_scalars(self, D):
        """Learned scalars for embeddings of width D: name -> (initial value, lowest, highest)."""
        return {}

    def find_logit(self, logit):
        """The name of a logit, or None for the default -> the name. Raises ValueError."""
        if logit is not None and logit not in self.logits:
            raise ValueError(f"no logit {logit!r} here; choose one of {', '.join(self.logits)}")
        return logit or self.logits[0]

    def init_logit_scale(self, logit, cones=False):
        """CLIP's ln(1 / 0.07); the authors' for squared distances: 0, and -1 with entailment."""
        if logit == "squared":
            return -1.0 if cones else 0.0
        return math.log(1 / 0.07)

    def root(self, embeddings):
        """All embeddings (N, D) -> the root (D,)."""
        return torch.zeros_like(embeddings[0])

    def distance_to_root(self, x, root=None):
        """x (..., D) -> |x|, which is the distance from the root in hyperbolic space, too."""
        return torch.linalg.vector_norm(x, dim=-1)

    def project(self, x):
        """Back onto the space, after averaging or interpolating. Here all vectors are in it."""
        return x

    def entailment_loss(self, text, image, min_radius=0.1, curv=1.0):
        """The angle by which each image is outside the cone of its text: max(0, exterior angle -
        half-aperture). text, image (..., D), broadcast; min_radius K > 0; curv c > 0 (hyperbolic)
        -> (...,) in rad, 0 (inside) to pi. Raises ValueError on the sphere. EuCLIP, Figure 1.
        """
        if not self.cones:
            raise ValueError("no cones here: the entailment loss needs another geometry")
        exterior, aperture = self.cone(text, image, min_radius, curv)
        return torch.relu(exterior - aperture).squeeze(-1)

    def path_to_root(self, x, steps, root=None):
        """Points on the straight way from embeddings x (N, D) to the root (D,), by default
        self.root(x), evenly spaced (on the sphere: before they are projected) -> (steps, N, D),
        both ends included. Source: MERU; EuCLIP, Figure 3."""
        root = self.root(x) if root is None else root
        t = torch.linspace(0, 1, steps, device=x.device, dtype=x.dtype).view(-1, 1, 1)
        return self.project(torch.lerp(x, root.expand_as(x), t))


class Sphere(Geometry):
    """CLIP: embeddings are unit vectors, compared by the cosine or the angle between them."""

    logits = ("cosine", "arc")
    final_ln = True
    cones = False
    root_name = "the mean of the text and image embeddings at hand"

    def embed(self, features, alpha=None):
        """Features of a tower (N, D) -> unit vectors (N, D)."""
        return F.normalize(features, dim=-1)

    def similarity(self, x, y, logit=None, curv=1.0):
        """x (N, D), y (M, D) -> (N, M). cosine in [-1, 1]; arc = -angle in [-pi, 0], in rad."""
        logit = self.find_logit(logit)
        cos = x @ y.T
        if logit == "cosine":
            return cos
        hav = snap((1 - cos) / 2)
        rest = snap(1 - hav)
        # unlike that of acos, this gradient is finite at both ends
        return -2 * torch.atan2(safe_sqrt(hav), safe_sqrt(rest))

    def root(self, embeddings):
        """All embeddings (N, D) -> their mean (D,). Source: EuCLIP, Figure 2."""
        return embeddings.mean(0)

    def distance_to_root(self, x, root=None):
        """x (..., D), root (D,) -> (1 - cos)/2 in [0, 1]. Raises ValueError without a root."""
        if root is None:
            raise ValueError(f"the sphere needs a root: pass root = {self.root_name}")
        cos = (F.normalize(x, dim=-1) * F.normalize(root, dim=-1)).sum(-1)
        return (1 - cos) / 2

    def project(self, x):
        return F.normalize(x, dim=-1)


class Euclidean(Geometry):
    """EuCLIP: embeddings are points of flat space, compared by their squared distance."""

    logits = ("squared", "distance", "inner")
    final_ln = False

    def embed(self, features, alpha=None):
        """Features (N, D) -> features / sqrt(D), so that |x| does not grow with the width."""
        return features / features.shape[-1] ** 0.5

    def similarity(self, x, y, logit=None, curv=1.0):
        """x (N, D), y (M, D) -> (N, M): -d^2, -d, or the inner product. If all embeddings
        grow by t, the logit scale must shrink by t^2 for the same logits (distance: by t)."""
        logit = self.find_logit(logit)
        if logit == "inner":
            return x @ y.T
        sums = x.square().sum(-1, keepdim=True) + y.square().sum(-1)  # (N, M)
        d2 = torch.addmm(sums, x, y.T, alpha=-2)  # the law, multiplied out: |x|^2 + |y|^2 - 2 x.y
        if logit == "squared":
            return -torch.relu(d2)
        return -safe_sqrt(snap(d2, 2 * sums))

    def cone(self, text, image, min_radius, curv=1.0):
        """-> exterior angle at each text towards its image, half-aperture of the text; (..., 1)."""
        a, u = polar(text)
        b, v = polar(image)
        hav, sin = haversine(u, v)
        exterior = safe_atan2(b * sin, (b - a) - 2 * b * hav)
        return exterior, half_aperture(min_radius, a)


class Hyperbolic(Geometry):
    """MERU: embeddings are tangent vectors at the root, compared by the hyperbolic distance.
    Learned, in log space: the scales of image and text features, and the curvature c."""

    logits = ("distance", "squared", "inner")
    final_ln = True

    def learned_scalars(self, D):
        return {
            "alpha_img": (-math.log(D) / 2, -math.inf, math.inf),
            "alpha_txt": (-math.log(D) / 2, -math.inf, math.inf),
            "curvature": (0.0, math.log(0.1), math.log(10.0)),
        }

    def embed(self, features, alpha=None):
        """Features (N, D), alpha () -> tangent vectors exp(alpha) features (N, D)."""
        return alpha.exp() * features

    def scaled_polar(self, x, curv):
        """Radius sqrt(c) |x| and direction. sinh(a) sinh(b) overflows float32 beyond a + b = 90, so
        radii above 40 (float64: 319) count as 40: the loss of embeddings gone wild is finite, but
        there the radius has no gradient, and that of the curvature is wrong."""
        radius, direction = polar(x)
        return (curv**0.5 * radius).clamp_max(0.45 * math.log(torch.finfo(x.dtype).max)), direction

    def similarity(self, x, y, logit=None, curv=1.0):
        """x (N, D), y (M, D), curv c > 0 -> (N, M): distance -d; squared -d^2; inner, the Lorentz
        product -cosh(sqrt(c) d) / c <= -1 / c. Source: MERU; EuCLIP for squared and inner."""
        logit = self.find_logit(logit)
        a, u = self.scaled_polar(x, curv)  # (N, 1), (N, D)
        b, v = self.scaled_polar(y, curv)  # (M, 1), (M, D)
        radial = torch.sinh((a - b.T) / 2)  # (N, M)
        sinh_a, sinh_b = torch.sinh(a), torch.sinh(b)
        sinh_ab = sinh_a * sinh_b.T  # (N, M)
        # sinh(a) sinh(b) hav = (sinh(a) sinh(b) - (sinh(a) u).(sinh(b) v)) / 2
        angular = torch.addmm(sinh_ab, sinh_a * u, (sinh_b * v).T, beta=0.5, alpha=-0.5)
        if logit == "distance":
            angular = snap(angular, sinh_ab)
        sinh2 = radial.square() + torch.relu(angular)  # sinh^2(d / 2)
        if logit == "inner":
            return -(1 + 2 * sinh2) / curv  # cosh(d) = 1 + 2 sinh^2(d / 2)
        d = 2 * torch.asinh(safe_sqrt(sinh2))  # in units of 1 / sqrt(c)
        if logit == "squared":
            return -d.square() / curv
        return -d / curv**0.5

    def cone(self, text, image, min_radius, curv=1.0):
        """-> exterior angle at each text towards its image, half-aperture of the text; (..., 1)."""
        a, u = self.scaled_polar(text, curv)
        b, v = self.scaled_polar(image, curv)
        hav, sin = haversine(u, v)
        ahead = torch.sinh(b - a) - 2 * torch.cosh(a) * torch.sinh(b) * hav
        exterior = safe_atan2(torch.sinh(b) * sin, ahead)
        return exterior, half_aperture(2 * min_radius, torch.sinh(a))


GEOMETRIES = {"clip": Sphere(), "euclidean": Euclidean(), "hyperbolic": Hyperbolic()}


def find_geometry(name):
    """Raises ValueError, with the names that there are."""
    if name not in GEOMETRIES:
        raise ValueError(f"no geometry {name!r}; choose one of {', '.join(GEOMETRIES)}")
    return GEOMETRIES[name]
