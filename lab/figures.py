"""All drawing: the geometry explained, and what a checkpoint makes of the held-out shapes.

    python -m assets.figures geometry assets          # the README's opening picture, and the cones
    python -m assets.figures out/ckpt.pt out/figures  # distances, traversal, contact sheet

Coordinates are pixels, y downwards. Radii are distances from the root.
"""

import argparse
import itertools
import math
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

import data
import evaluate
from geometry import GEOMETRIES
from model import load_model

PAPER, INK, FAINT, GRID = "#fcfcfa", "#24292f", "#6e7781", "#dfe3e8"  # for light and dark pages
TEXT, IMAGE, GOOD, BAD = "#d1741c", "#2464a8", "#1f7a3a", "#c62f2f"

# ------------------------------------------------------------------------------------------------
# a sheet of paper


def mixed(colour, share):
    """A colour thinned with that of the paper -> RGB."""
    pairs = zip(ImageColor.getrgb(colour), ImageColor.getrgb(PAPER))
    return tuple(round(share * a + (1 - share) * b) for a, b in pairs)


def heat(values, top):
    """(H, W) in [0, top] -> uint8 (H, W, 3), from paper through orange to dark red."""
    grey = Image.fromarray((255 * np.clip(values / top, 0, 1)).astype(np.uint8))
    return np.array(ImageOps.colorize(grey, PAPER, "#6e1428", mid="#f2924a"))


class Sheet:
    """All is drawn at twice the size, then reduced."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (2 * width, 2 * height), PAPER)
        self.pen = ImageDraw.Draw(self.image, "RGBA")  # colours may end in an alpha

    def text(self, x, y, words, size=11, colour=INK, anchor="la"):
        font = ImageFont.load_default(2 * size)
        align = "center" if anchor == "mm" else "left"
        self.pen.text((2 * x, 2 * y), words, colour, font, anchor, spacing=8, align=align)

    def line(self, points, colour=INK, width=1.0):
        points = (2 * np.array(points, dtype=float)).ravel().tolist()
        self.pen.line(points, colour, int(2 * width), joint="curve")

    def circle(self, x, y, r, fill=None, outline=None):
        self.pen.circle((2 * x, 2 * y), 2 * r, fill, outline, 2)

    def paste(self, pixels, x, y):
        """uint8 (2H, 2W, 3) -> H times W pixels of the sheet."""
        self.image.paste(Image.fromarray(pixels), (2 * x, 2 * y))

    def save(self, path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.image.reduce(2).save(path, optimize=True)
        print(path)


def ticks(high, count=5):
    """Round numbers from 0 to high, about `count` of them."""
    step = 10 ** math.floor(math.log10(high / count))
    step *= next(m for m in (1, 2, 5, 10) if high / (step * m) <= count + 1)
    return np.arange(0, high + step / 1e6, step)


# ------------------------------------------------------------------------------------------------
# the geometry itself


def to_disc(v):
    """Tangent vectors at the root (..., 2), curvature -1 -> the Poincare disc."""
    r = np.linalg.norm(v, axis=-1, keepdims=True)
    return v * np.tanh(r / 2) / np.where(r > 0, r, 1)


def from_disc(p):
    r = np.linalg.norm(p, axis=-1, keepdims=True)
    return p * 2 * np.arctanh(np.minimum(r, 0.9999)) / np.where(r > 0, r, 1)


def hyperbolic_path(x, y, count=60):
    """The shortest path between two tangent vectors (2,) -> (count, 2) in the disc, by way of the
    hyperboloid."""
    r = np.hypot(*np.array([x, y]).T)[:, None]
    X, Y = np.hstack([np.cosh(r), np.sinh(r) / r * [x, y]])
    d, t = np.arccosh(X[0] * Y[0] - X[1:] @ Y[1:]), np.linspace(0, 1, count)[:, None]
    points = (np.sinh((1 - t) * d) * X + np.sinh(t * d) * Y) / np.sinh(d)
    return points[:, 1:] / (1 + points[:, :1])


def distance(x, y, geometry, logit):
    x, y = (torch.tensor(v)[None] for v in (x, y))
    return -GEOMETRIES[geometry].similarity(x, y, logit).item()


def sphere(sheet, cx, cy, R, angle):
    """Draws a globe -> two points on it `angle` apart and the great circle between, (60, 2)."""
    for t in np.linspace(0, 1, R):  # ever smaller and lighter discs, towards the light
        sheet.circle(cx - 0.35 * R * t, cy - 0.4 * R * t, R * (1 - t), mixed(IMAGE, (1 - t) / 4))
    for a in np.radians(range(-60, 61, 30)):  # parallels are lines, meridians ellipses
        x, y = R * math.cos(a), R * math.sin(a)
        sheet.line([(cx - x, cy - y), (cx + x, cy - y)], mixed(FAINT, 0.35))
        box = (2 * (cx - abs(y)), 2 * (cy - R), 2 * (cx + abs(y)), 2 * (cy + R))
        sheet.pen.ellipse(box, outline=mixed(FAINT, 0.35), width=2)
    first, aside = np.array([[0.85, 0.15], [-0.485, 0.602]])  # in space a right angle apart
    t = np.linspace(0, angle, 60)[:, None]
    return np.cos(t) * first + np.sin(t) * aside


def three_geometries(path):
    """Two embeddings, at the same angle and (but for the sphere) with the same radii in each
    geometry, and the shortest path between them."""
    sheet, R, cy = Sheet(840, 330), 112, 170
    u, v = (np.array([math.cos(a), math.sin(a)]) for a in np.radians([22, 97]))
    image, text = 1.8 * u, 1.4 * v
    angle = distance(u, v, "clip", "arc")
    flat, curved = (distance(image, text, g, "distance") for g in ("euclidean", "hyperbolic"))
    great_circle = sphere(sheet, 140, cy, R, angle)
    for r in (0.5, 1, 1.5, 2):  # circles around the root, for scale
        for cx, radius in ((420, R * r / 2), (700, R * math.tanh(r / 2))):
            sheet.circle(cx, cy, radius, outline=mixed(FAINT, 0.35))
            sheet.text(cx, cy + radius - 2, f"{r}" if r in (1, 2) else "", 10, FAINT, "md")
    for cx in (140, 700):
        sheet.circle(cx, cy, R, outline=FAINT)
    for cx, title, length, note, way in (
        (140, "sphere: CLIP", angle, "only the turn is left", great_circle),
        (420, "plane: EuCLIP", flat, "walk, and turn", np.array([image, text]) / 2),
        (700, "hyperbolic disc: MERU", curved, "turning costs more further out",
         hyperbolic_path(image, text)),
    ):  # fmt: skip
        points = [(cx + R * x, cy - R * y) for x, y in way]
        for end in (points[0], points[-1]):
            sheet.line([(cx, cy), end], FAINT)
        sheet.line(points, INK, 3)
        sheet.circle(cx, cy, 3, FAINT)  # the root; in the sphere its centre
        for (x, y), colour, name in ((points[0], IMAGE, "image"), (points[-1], TEXT, "text")):
            sheet.circle(x, y, 6, colour, PAPER)
            sheet.text(x + 10, y - 8, name, 12, colour, "lm")
        sheet.text(cx, 22, title, 16, anchor="mm")
        sheet.text(cx, 298, f"distance {length:.2f}", 14, anchor="mm")
        sheet.text(cx, 316, note, 11, FAINT, "mm")
    sheet.save(path)


SIDE, APEXES = 230, [(0.25, 0.25), (0.75, 0.3), (1.1, -0.55)]  # of the panels below


def cone_panel(sheet, left, top, geometry, apex, K):
    """The entailment loss of every point as an image, for a text at the apex."""
    in_disc = geometry == "hyperbolic"
    edge, geometry = math.asinh(2 * K) if in_disc else K, GEOMETRIES[geometry]
    grid = (np.arange(2 * SIDE) - SIDE + 0.5) / SIDE
    grid = np.stack(np.meshgrid(grid, -grid), -1)  # (H, W, 2), in [-1, 1]
    points = torch.tensor(from_disc(grid) if in_disc else 1.6 * grid)
    text = torch.tensor(apex, dtype=torch.float64)
    loss = geometry.entailment_loss(text, points, K).numpy()
    picture = heat(loss, math.pi)
    picture[loss == 0] = mixed(IMAGE, 0.3)
    if in_disc:
        picture[np.linalg.norm(grid, axis=-1) > 1] = mixed(PAPER, 1)
    sheet.paste(picture, left, top)
    x, y = left + SIDE / 2, top + SIDE / 2
    if in_disc:
        sheet.circle(x, y, SIDE / 2, outline=FAINT)
    ends = np.array([apex, (edge, 0)])
    (east, north), (edge, _) = SIDE / 2 * (to_disc(ends) if in_disc else ends / 1.6)
    sheet.circle(x, y, edge, outline=FAINT)
    sheet.line([(x, y), (x + east, y - north)])
    sheet.circle(x, y, 3, INK)
    sheet.circle(x + east, y - north, 6, TEXT, PAPER)
    aperture = math.degrees(geometry.cone(text, text, K)[1].item())
    words = f"text at ({apex[0]:g}, {apex[1]:g}): half-aperture {aperture:.0f}°"
    sheet.text(left, top - 19, words, 12)


def cones(path, K=0.25):
    """Figure 1 of the paper and its hyperbolic sister."""
    sheet = Sheet(840, 640)
    for geometry, top, where in (
        ("euclidean", 44, "x and y from -1.6 to 1.6"),
        ("hyperbolic", 354, "tangent vectors at the root, shown in the Poincare disc, c = 1"),
    ):
        for column, apex in enumerate(APEXES):
            cone_panel(sheet, 20 + column * (SIDE + 20), top, geometry, apex, K)
        words = f"{geometry}, K = {K:g}, {where}"
        sheet.text(385, top + SIDE + 8, words, 12, anchor="ma")
    sheet.paste(heat(np.repeat(np.linspace(1, 0, 400)[:, None], 28, 1), 1), 786, 240)
    for y, words in ((440, "0"), (340, "pi/2"), (240, "pi")):
        sheet.text(804, y, words, 11, FAINT, "lm")
    sheet.text(800, 222, "loss (rad)", 11, FAINT, "mm")
    words = "black: the root; orange: a text; blue: the images in its cone, loss 0; circle: "
    sheet.text(20, 618, words + "texts inside it have half-spaces as cones", 11, FAINT)
    sheet.save(path)


# ------------------------------------------------------------------------------------------------
# a checkpoint


class Subject:
    """A model, the held-out pictures of two shapes and their captions of all levels, embedded."""

    def __init__(self, checkpoint):
        model = self.model = load_model(checkpoint)
        self.images, texts = evaluate.embed_hierarchy(model)
        self.root = model.geometry.root(torch.cat([self.images, texts.flatten(0, 1)]))
        chains = data.held_out_levels()
        captions = list(itertools.chain.from_iterable(chains))
        self.captions = list(dict.fromkeys(captions))
        first = [captions.index(caption) for caption in self.captions]
        self.texts = texts.transpose(0, 1).flatten(0, 1)[first]
        self.chains = [[self.captions.index(caption) for caption in chain] for chain in chains]
        self.own = [chain[-1] for chain in self.chains]  # the most specific captions, as indices
        self.name = f"{model.config.geometry}/{model.config.logit}"
        if model.geometry.cones:
            self.name += f", lambda {model.train_config.get('entailment_weight', 0):g}"

    def draw(self, i, sheet, x, y, size):
        picture = data.load_item(data.HELD_OUT + i, 2 * size)
        sheet.paste(picture.permute(1, 2, 0).numpy(), x, y)


def distances_panel(sheet, subject, left, top, width, height):
    """Figures 2 and 4 of the paper: how far text and pictures are from the root."""
    captions, radius = subject.texts[subject.own], subject.model.geometry.distance_to_root
    radii = [radius(x, subject.root).numpy() for x in (captions, subject.images)]
    edges = np.linspace(0, 1.15 * max(map(max, radii)), 61)
    shares = [np.histogram(r, edges)[0] / len(r) for r in radii]
    right, up = width / edges[-1], height / (1.45 * np.max(shares))  # pixels per unit
    bottom = top + height
    for share in ticks(np.max(shares)):
        y = bottom - up * share
        sheet.line([(left, y), (left + width, y)], GRID)
        sheet.text(left - 6, y, f"{100 * share:g} %", 11, FAINT, "rm")
    for r in ticks(edges[-1]):
        sheet.text(left + right * r, bottom + 6, f"{r:g}", 11, FAINT, "ma")
    for i, (name, colour) in enumerate((("text", TEXT), ("image", IMAGE))):
        steps = np.concatenate([[0], np.repeat(shares[i], 2), [0]])
        outline = np.stack([left + right * np.repeat(edges, 2), bottom - up * steps], -1)
        sheet.pen.polygon((2 * outline).ravel().tolist(), colour + "5a")
        sheet.line(outline, colour, 1.5)
        sheet.text(left + width, top + 2 + 16 * i, f"{name}, n = {len(radii[i])}", 12, colour, "ra")
    sheet.text(left, top - 20, subject.name, 13)
    words = "distance from the root; % of n in 60 bins"
    sheet.text(left + width / 2, bottom + 22, words, 11, FAINT, "ma")


def distances(subjects, path):
    """A panel for each subject, three in a row."""
    columns = min(3, len(subjects))
    width = 840 // columns - 60
    sheet = Sheet(860, 20 + 250 * math.ceil(len(subjects) / columns))
    for n, subject in enumerate(subjects):
        left, top = 60 + n % columns * (width + 60), 40 + n // columns * 250
        distances_panel(sheet, subject, left, top, width, 170)
    sheet.save(path)


def balanced(chains):
    """Captions to choose from, as many of each level as there are: those of pictures that share
    none but general ones. Otherwise nearly all would be specific. -> captions, pictures"""
    pictures, captions, specific = [], set(), set()
    for i, chain in enumerate(chains):
        if specific.isdisjoint(chain[2:]):
            pictures.append(i)
            captions.update(chain)
            specific.update(chain[2:])
    return sorted(captions), pictures


def traversal(subject, path, strips=6):
    """Figures 3 and 5 of the paper: captions on the way from pictures to the root."""
    K, (chosen, theirs) = evaluate.last_min_radius(subject.model), balanced(subject.chains)
    ways = evaluate.traverse(subject.model, subject.images, subject.texts[chosen], K)
    names = [*(subject.captions[j] for j in chosen), "[ROOT]"]
    counts = [len(way) - 1 for way in ways]  # without the root
    order = sorted(range(len(ways)), key=lambda i: (-min(counts[i], 2), i not in theirs))
    sheet, among = Sheet(860, 86 + 92 * strips), "" if K is None else " whose cone holds the point"
    title = f"{subject.name}: on the way to the root, the nearest of {len(chosen)} captions{among}"
    sheet.text(20, 14, title, 14)
    for row, i in enumerate(order[:strips]):
        top, words = 50 + 92 * row, [names[j] for _, j in ways[i]]
        if len(words) > 6:
            words[4:-1] = ["..."]
        subject.draw(i, sheet, 20, top, 80)
        for n, caption in enumerate(words):
            left, fill = 124 + 124 * n, GRID if caption == "[ROOT]" else mixed(TEXT, 0.12)
            sheet.text(left - 12, top + 40, ">", 13, FAINT, "lm")
            box = (2 * left, 2 * top, 2 * left + 216, 2 * top + 160)
            sheet.pen.rounded_rectangle(box, 10, fill)
            sheet.text(left + 54, top + 40, textwrap.fill(caption, 17), anchor="mm")
    words = ", ".join(f"{count} on {n}" for count, n in sorted(Counter(counts).items()))
    note = f"captions on all {len(ways)} ways: {words}; shown first: ways with two or more"
    sheet.text(20, 60 + 92 * strips, note, 11, FAINT)
    sheet.save(path)


def contact(subject, path):
    """Twelve held-out pictures with their three nearest captions, wrong ones in red."""
    chosen = np.random.default_rng(0).permutation(len(subject.images))[:12]
    captions = subject.own
    with torch.no_grad():
        similarity = subject.model.similarity(subject.images[chosen], subject.texts[captions])
    sheet, n = Sheet(860, 40 + 4 * 124), len(captions)
    sheet.text(20, 12, f"{subject.name}: the three nearest of {n} held-out captions", 14)
    sheet.text(660, 14, "its own caption", 12, GOOD)
    sheet.text(770, 14, "another one", 12, BAD)
    for n, (i, nearest) in enumerate(zip(chosen.tolist(), similarity.topk(3).indices.tolist())):
        left, top = 20 + 280 * (n % 3), 44 + 124 * (n // 3)
        subject.draw(i, sheet, left, top, 108)
        for k, j in enumerate(nearest):
            colour = GOOD if captions[j] == captions[i] else BAD
            words = textwrap.fill(subject.captions[captions[j]], 29)
            sheet.text(left + 116, top + 37 * k, words, 10, colour)
    sheet.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("subject", help="a checkpoint, or the word geometry")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    args = parser.parse_args()
    try:
        if args.subject == "geometry":
            three_geometries(args.folder / "three_geometries.png")
            cones(args.folder / "cones.png")
        else:
            subject = Subject(args.subject)
            distances([subject], args.folder / "distances.png")
            traversal(subject, args.folder / "traversal.png")
            contact(subject, args.folder / "contact.png")
    except (ValueError, OSError) as error:
        sys.exit(f"figures.py: {error}")


if __name__ == "__main__":
    main()
