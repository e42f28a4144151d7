"""All drawing: what a checkpoint does, and two pictures that explain the geometry. Pillow and numpy, at twice the size, then reduced.

    python -m assets.figures geometry assets                       # the README's opening picture, and the cones
    python -m assets.figures out/ckpt.pt out/figures               # distances, levels, traversal, matrix, contact sheet
    python -m assets.figures out/ckpt.pt out/figures --query "a red circle" --images photos

The study draws its own with `python tests/study.py`. Coordinates are pixels of the finished picture, y downwards; in a Panel, the data's.
"""

import argparse
import math
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import evaluate
import geometry as geo
from model import load_model

PAPER, INK, FAINT, GRID = "#fcfcfa", "#24292f", "#6e7781", "#dfe3e8"   # a card of its own: readable on a light page and on a dark one
TEXT, IMAGE, GOOD, BAD = "#d1741c", "#2464a8", "#1f7a3a", "#c62f2f"
LINES = ["#2464a8", "#d1741c", "#1f7a3a", "#8a3fa0", "#c62f2f", "#6e7781", "#0f9aa8", "#b59a00"]


# ---------------------------------------------------------------------------------------------------------------------------------
# a sheet of paper, and axes on it

def mixed(colour, share):
    """A colour thinned with that of the paper -> RGB."""
    a, b = (np.array([int(c[i:i + 2], 16) for i in (1, 3, 5)]) for c in (colour, PAPER))
    return tuple(np.rint(share * a + (1 - share) * b).astype(int).tolist())


class Sheet:
    def __init__(self, width, height):
        self.image = Image.new("RGB", (2 * width, 2 * height), PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x, y, words, size=13, colour=INK, anchor="la", upright=False):
        font = ImageFont.load_default(2 * size)
        if upright:   # turned a quarter to the left, centred at (x, y)
            left, top, right, bottom = font.getbbox(words)
            strip = Image.new("RGB", (right - left + 4, bottom - top + 4), PAPER)
            ImageDraw.Draw(strip).text((2 - left, 2 - top), words, colour, font)
            strip = strip.rotate(90, expand=True)
            return self.image.paste(strip, (int(2 * x) - strip.width // 2, int(2 * y) - strip.height // 2))
        self.pen.text((2 * x, 2 * y), words, colour, font, anchor)

    def line(self, points, colour=INK, width=1, dash=None):
        points = [(2 * x, 2 * y) for x, y in points]
        if dash is None:
            return self.pen.line(points, colour, int(2 * width), joint="curve")
        walked = 0.0   # along the line; drawn where it is in the first half of a period
        for (x0, y0), (x1, y1) in zip(points, points[1:]):
            length = math.hypot(x1 - x0, y1 - y0)
            for i in range(max(1, int(length))):
                if (walked + i) % (4 * dash) < 2 * dash:
                    t, u = i / max(length, 1), min(1, (i + 1) / max(length, 1))
                    self.pen.line([(x0 + t * (x1 - x0), y0 + t * (y1 - y0)), (x0 + u * (x1 - x0), y0 + u * (y1 - y0))], colour, int(2 * width))
            walked += length

    def rectangle(self, x0, y0, x1, y1, fill=None, outline=None, radius=0):
        self.pen.rounded_rectangle((2 * x0, 2 * y0, 2 * x1, 2 * y1), 2 * radius, fill, outline, 2 if outline else 0)

    def shade(self, points, colour):
        """A polygon that what is below shines through."""
        ImageDraw.Draw(self.image, "RGBA").polygon([(2 * x, 2 * y) for x, y in points], (*mixed(colour, 1), 90))

    def circle(self, x, y, r, fill=None, outline=None):
        self.pen.ellipse((2 * (x - r), 2 * (y - r), 2 * (x + r), 2 * (y + r)), fill, outline, 2)

    def picture(self, pixels, x, y, size):
        """pixels: uint8 (3, H, H), as `data` has them."""
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        self.image.paste(image.resize((2 * size, 2 * size), Image.Resampling.BICUBIC), (int(2 * x), int(2 * y)))

    def heat_bar(self, x, top, height, labels):
        """The colours of `heat`, from 0 at the bottom to 1; labels: [(share, words)]."""
        bar = heat(np.repeat(np.linspace(1, 0, 2 * height)[:, None], 28, 1), 1)
        self.image.paste(Image.fromarray(bar), (2 * x, 2 * top))
        for share, words in labels:
            self.text(x + 18, top + height * (1 - share), words, 11, FAINT, "lm")

    def legend(self, x, y, entries):
        for colour, words in entries:
            self.rectangle(x, y + 3, x + 12, y + 11, colour)
            self.text(x + 18, y, words, 11)
            y += 16

    def save(self, path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.image.reduce(2).save(path, optimize=True)
        print(path)


def ticks(low, high, count=5):
    """Round numbers in a range, about `count` of them."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count + 1)
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Panel:
    """A rectangle of a sheet in the data's coordinates, with ticks, labels and title."""

    def __init__(self, sheet, left, top, width, height, x, y, title="", x_label="", y_label="", x_ticks=None):
        self.sheet, self.left, self.top, self.width, self.height, self.x, self.y = sheet, left, top, width, height, x, y
        for value in ticks(*y):
            sheet.line([self.at(x[0], value), self.at(x[1], value)], GRID)
            sheet.text(left - 6, self.at(0, value)[1], f"{value:g}", 11, FAINT, "rm")
        for value, words in [(v, f"{v:g}") for v in ticks(*x)] if x_ticks is None else x_ticks:
            at = self.at(value, y[0])
            sheet.line([at, (at[0], at[1] + 4)], FAINT)
            sheet.text(at[0], at[1] + 6, words, 11, FAINT, "ma")
        sheet.line([self.at(x[0], y[0]), self.at(x[1], y[0])], FAINT)
        sheet.text(left, top - 20, title, 13)
        sheet.text(left + width / 2, top + height + 22, x_label, 11, FAINT, "ma")
        if y_label:
            sheet.text(left - 44, top + height / 2, y_label, 11, FAINT, upright=True)

    def at(self, x, y):
        return (self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * self.width,
                self.top + self.height - (y - self.y[0]) / (self.y[1] - self.y[0]) * self.height)

    def curve(self, xs, ys, colour, width=2, dash=None):
        self.sheet.line([self.at(x, y) for x, y in zip(xs, ys)], colour, width, dash)

    def bar(self, x0, x1, top, colour):
        self.sheet.rectangle(*self.at(x0, top), *self.at(x1, self.y[0]), colour)


def histogram(panel, shares, colour, edges):
    """Share of the values per bin, as a filled outline."""
    steps = [(edges[0], 0.0)] + [(e, s) for i, s in enumerate(shares) for e in edges[i:i + 2]] + [(edges[-1], 0.0)]
    outline = [panel.at(*p) for p in steps]
    panel.sheet.shade(outline, colour)
    panel.sheet.line(outline, colour, 1.5)


def heat(values, top):
    """(H, W) in [0, top] -> uint8 (H, W, 3), from paper through orange to dark red."""
    stops = np.array([mixed(PAPER, 1), (250, 200, 120), (214, 96, 60), (110, 20, 40)], dtype=float)
    at = np.clip(values / top, 0, 1) * (len(stops) - 1)
    low = np.minimum(at.astype(int), len(stops) - 2)
    return (stops[low] + (at - low)[..., None] * (stops[low + 1] - stops[low])).round().astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------------------
# the geometry itself

def to_disc(v):
    """Tangent vectors at the root (..., 2), curvature -1 -> the Poincare disc: the root in the middle, infinity at the rim."""
    r = np.linalg.norm(v, axis=-1, keepdims=True)
    return v * np.tanh(r / 2) / np.where(r > 0, r, 1)


def from_disc(p):
    r = np.linalg.norm(p, axis=-1, keepdims=True)
    return p * 2 * np.arctanh(np.minimum(r, 0.9999)) / np.where(r > 0, r, 1)


def hyperbolic_path(x, y, count=60):
    """The shortest path between two tangent vectors (2,) -> (count, 2) in the disc, by way of the hyperboloid."""
    lift = lambda v: np.array([np.cosh(np.hypot(*v)), *(np.sinh(np.hypot(*v)) * v / np.hypot(*v))])
    X, Y = lift(x), lift(y)
    d, t = np.arccosh(X[0] * Y[0] - X[1:] @ Y[1:]), np.linspace(0, 1, count)[:, None]
    points = (np.sinh((1 - t) * d) * X + np.sinh(t * d) * Y) / np.sinh(d)
    return points[:, 1:] / (1 + points[:, :1])


def distance(x, y, geometry, logit):
    return -geo.similarity(torch.tensor(x)[None], torch.tensor(y)[None], geometry, logit).item()


def sphere(sheet, cx, cy, R, angle):
    """A sphere in parallel projection, seen from above its equator -> two points on it `angle` apart, and the great circle between them, as
    (60, 3): right, up, towards the eye."""
    x, y = np.meshgrid(*[(np.arange(4 * R) - 2 * R + 0.5) / (2 * R)] * 2)
    light = 0.72 + 0.28 * (-0.45 * x - 0.5 * y + 0.75 * np.sqrt(np.clip(1 - x ** 2 - y ** 2, 0, 1)))
    ball = Image.fromarray((np.clip(light, 0, 1)[..., None] * np.array([238, 243, 250])).astype(np.uint8))
    sheet.image.paste(ball, (2 * (cx - R), 2 * (cy - R)), Image.fromarray(((x ** 2 + y ** 2 <= 1) * 255).astype(np.uint8)))
    sheet.circle(cx, cy, R, outline=FAINT)
    lift = math.radians(28)

    def at(latitude, longitude):
        east, south, up = math.cos(latitude) * math.sin(longitude), math.cos(latitude) * math.cos(longitude), math.sin(latitude)
        return np.array([east, up * math.cos(lift) - south * math.sin(lift), up * math.sin(lift) + south * math.cos(lift)])

    around = np.radians(np.arange(-180, 181, 3))
    parallels = [[at(latitude, a) for a in around] for latitude in np.radians(np.arange(-60, 61, 30))]
    meridians = [[at(a, longitude) for a in around] for longitude in np.radians(np.arange(0, 180, 30))]
    for ring in parallels + meridians:
        for p, q in zip(ring, ring[1:]):
            if p[2] > 0 and q[2] > 0:
                sheet.line([(cx + R * p[0], cy - R * p[1]), (cx + R * q[0], cy - R * q[1])], mixed(FAINT, 0.35))
    first, aside = at(math.radians(22), math.radians(66)), at(math.radians(62), math.radians(-60))
    aside -= (aside @ first) * first   # what is left is a right angle away
    return np.array([math.cos(t) * first + math.sin(t) * aside / np.linalg.norm(aside) for t in np.linspace(0, angle, 60)])


def three_geometries(path):
    """Two embeddings, at the same angle and (but for the sphere) with the same radii in each geometry, and the shortest path between them."""
    sheet, R, cy = Sheet(840, 330), 112, 170
    image, text = (r * np.array([np.cos(a), np.sin(a)]) for r, a in ((1.8, math.radians(22)), (1.4, math.radians(97))))
    angle = distance(image / 1.8, text / 1.4, "clip", "arc")
    great_circle = sphere(sheet, 140, cy, R, angle)
    for cx, radius in ((420, lambda r: r / 2), (700, lambda r: math.tanh(r / 2))):   # circles around the root, for scale
        for r in (0.5, 1, 1.5, 2):
            sheet.circle(cx, cy, R * radius(r), outline=mixed(FAINT, 0.35))
        for r in (1, 2):
            sheet.text(cx, cy + R * radius(r) - 2, f"{r}", 10, FAINT, "md")
    sheet.circle(700, cy, R, outline=FAINT)
    for cx, title, length, note, shortest in (
            (140, "sphere: CLIP", angle, "only the turn is left", great_circle[:, :2]),
            (420, "plane: EuCLIP", distance(image, text, "euclidean", "distance"), "walk, and turn", np.array([image, text]) / 2),
            (700, "hyperbolic disc: MERU", distance(image, text, "hyperbolic", "distance"), "turning costs more further out",
             hyperbolic_path(image, text))):
        points = [(cx + R * x, cy - R * y) for x, y in shortest]
        for end in (points[0], points[-1]):
            sheet.line([(cx, cy), end], FAINT, 1, dash=3)
        sheet.line(points, INK, 3)
        sheet.circle(cx, cy, 3, FAINT)   # the root; in the sphere its centre
        for end, colour, name in ((points[0], IMAGE, "image"), (points[-1], TEXT, "text")):
            sheet.circle(*end, 6, colour, PAPER)
            sheet.text(end[0] + 10, end[1] - 8, name, 12, colour, "lm")
        sheet.text(cx, 22, title, 16, anchor="mm")
        sheet.text(cx, 298, f"distance {length:.2f}", 14, anchor="mm")
        sheet.text(cx, 316, note, 11, FAINT, "mm")
    sheet.save(path)


def cones(path, K=0.25):
    """Figure 1 of the paper and its hyperbolic sister: the entailment loss of every point as an image, for three texts."""
    sheet, side = Sheet(840, 640), 230
    apexes = [(K, K), (0.75, 0.3), (1.1, -0.55)]
    grid = (np.arange(2 * side) - side + 0.5) / side
    flat = np.stack(np.meshgrid(grid, -grid), -1)                        # (2 side, 2 side, 2), in [-1, 1]
    rows = [("euclidean", 44, lambda v: v / 1.6, lambda p: p * 1.6, K, "x and y from -1.6 to 1.6"),
            ("hyperbolic", 354, to_disc, from_disc, math.asinh(2 * K), "tangent vectors at the root, shown in the Poincare disc, c = 1")]
    for geometry, top, shown, unshown, edge, where in rows:   # edge: nearer the root cones are half-spaces
        points = torch.tensor(unshown(flat).reshape(-1, 2))
        for column, apex in enumerate(apexes):
            left, text = 20 + column * (side + 20), torch.tensor([apex]).double()
            x, y = left + side / 2, top + side / 2
            loss = geo.entailment_loss(text, points, geometry, K).numpy().reshape(flat.shape[:2])
            picture = heat(loss, math.pi)
            picture[loss == 0] = mixed(IMAGE, 0.3)
            if shown is to_disc:
                picture[np.linalg.norm(flat, axis=-1) > 1] = mixed(PAPER, 1)
            sheet.image.paste(Image.fromarray(picture), (2 * left, 2 * top))
            if shown is to_disc:
                sheet.circle(x, y, side / 2, outline=FAINT)
            sheet.circle(x, y, side / 2 * shown(np.array([edge, 0.0]))[0], outline=FAINT)
            east, north = side / 2 * shown(np.array(apex))
            sheet.line([(x, y), (x + east, y - north)], INK, 1, dash=3)
            sheet.circle(x, y, 3, INK)
            sheet.circle(x + east, y - north, 6, TEXT, PAPER)
            aperture = geo.find(geometry)[0].cone(text, text, K, 1.0)[1].item()
            sheet.text(left, top - 19, f"text at ({apex[0]:g}, {apex[1]:g}): half-aperture {math.degrees(aperture):.0f}°", 12)
        sheet.text(385, top + side + 8, f"{geometry}, K = {K:g}, {where}", 12, anchor="ma")
    sheet.heat_bar(786, 240, 200, [(0, "0"), (0.5, "pi/2"), (1, "pi")])
    sheet.text(800, 222, "loss (rad)", 11, FAINT, "mm")
    sheet.legend(20, 618, [(mixed(IMAGE, 0.3), "images that the text entails: inside its cone, loss 0")])
    sheet.text(330, 618, "black: the root; orange: the text, apex of its cone; circle: nearer the root cones are half-spaces", 11, FAINT)
    sheet.save(path)


# ---------------------------------------------------------------------------------------------------------------------------------
# a checkpoint

class Subject:
    """A model with its held-out pictures and captions, embedded once."""

    def __init__(self, checkpoint):
        self.model = load_model(checkpoint)
        source = evaluate.held_out_source(self.model.recipe)
        if source is None:
            raise ValueError(f"{checkpoint} names no held-out data; train with --val_data")
        held = evaluate.embed_held_out(self.model, source)
        self.items, self.images, self.captions, self.texts, self.chains = (held[k] for k in ("items", "images", "captions", "texts", "chains"))
        self.own = [chain[-1] for chain in self.chains]   # the most specific caption of each picture, as indices
        self.root = self.model.row.root(torch.cat([self.images, self.texts]))
        self.name = f"{self.model.config.geometry}/{self.model.logit}"
        if self.model.row.cone:
            self.name += f", lambda {self.model.recipe.get('entailment_weight', 0):g}"

    def caption(self, i):
        return self.captions[self.own[i]]

    @torch.no_grad()
    def radius(self, x):
        return geo.distance_to_root(x, self.model.config.geometry, self.root).numpy()

    def picture(self, i):
        return data.load_item(self.items[i], 160)


def distances_panel(sheet, subject, left, top, width, height):
    """Figures 2 and 4 of the paper: how far text and pictures are from the root."""
    text, image = subject.radius(subject.texts[subject.own]), subject.radius(subject.images)
    high = 1.15 * float(max(text.max(), image.max()))
    edges = np.linspace(0, high, 61)
    shares = {colour: np.histogram(values, edges)[0] / len(values) for values, colour in ((text, TEXT), (image, IMAGE))}
    panel = Panel(sheet, left, top, width, height, (0, high), (0, 1.45 * max(map(max, shares.values()))), subject.name, subject.model.row.radius_is,
                  "share of n per bin")
    for colour in shares:
        histogram(panel, shares[colour], colour, edges)
    sheet.legend(left + width - 110, top + 2, [(TEXT, f"text, n = {len(text)}"), (IMAGE, f"image, n = {len(image)}")])


def distances(subjects, path):
    """One panel for each of a list of lists of subjects."""
    width, height = (560, 240) if len(subjects[0]) == 1 else (225, 150)
    sheet = Sheet(20 + (width + 65) * len(subjects[0]) + 5, 20 + (height + 80) * len(subjects))
    for row, line in enumerate(subjects):
        for column, subject in enumerate(line):
            left, top = 70 + column * (width + 65), 40 + row * (height + 80)
            if subject is None:
                sheet.text(left + width / 2, top + height / 2, "no cones on the sphere", 12, FAINT, "mm")
            else:
                distances_panel(sheet, subject, left, top, width, height)
    sheet.save(path)


def levels(subject, path):
    """Radius by level of generality, pictures last: box = middle half, whiskers = 5 to 95 %, line = median."""
    of_level = [sorted({chain[i] for chain in subject.chains}) for i in range(len(data.LEVELS))]
    groups = [(name, subject.radius(subject.texts[chosen]), TEXT) for name, chosen in zip(data.LEVELS, of_level)]
    groups += [("pictures", subject.radius(subject.images), IMAGE)]
    sheet = Sheet(760, 400)
    high = 1.1 * max(float(np.quantile(v, 0.95)) for _, v, _ in groups)
    panel = Panel(sheet, 70, 40, 660, 270, (-0.5, len(groups) - 0.5), (0, high),
                  f"{subject.name}: how far captions are from the root, by generality", "", subject.model.row.radius_is, x_ticks=[])
    for i, (name, values, colour) in enumerate(groups):
        low, q1, median, q3, top = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
        panel.curve((i, i), (low, top), colour)
        sheet.rectangle(*panel.at(i - 0.2, q3), *panel.at(i + 0.2, q1), mixed(colour, 0.35), colour)
        panel.curve((i - 0.2, i + 0.2), (median, median), colour, 3)
        for n, line in enumerate([*textwrap.wrap(name, 20), f"n = {len(values)}"]):
            sheet.text(panel.at(i, 0)[0], 318 + 15 * n, line, 11, FAINT if line.startswith("n =") else INK, "ma")
    sheet.save(path)


def chip(sheet, left, middle, words, fill):
    lines = textwrap.wrap(words, 17, max_lines=4, placeholder=" ...")
    sheet.text(left, middle, ">", 13, FAINT, "lm")
    sheet.rectangle(left + 12, middle - 4 - 8 * len(lines), left + 120, middle + 4 + 8 * len(lines), fill, radius=5)
    for k, line in enumerate(lines):
        sheet.text(left + 66, middle + 16 * (k - (len(lines) - 1) / 2), line, 11, anchor="mm")


def traversal(subject, path, strips=6):
    """Figures 3 and 5 of the paper: captions retrieved on the way from pictures to the root, and how many there are."""
    cones, number = evaluate.uses_cones(subject.model), min(500, len(subject.images))   # a large val_data would take hours
    found = [[text for _, text in f] for f in evaluate.traverse(subject.model, subject.images[:number], subject.texts, cones)]
    counts = [sum(text < len(subject.captions) for text in f) for f in found]
    sheet, words = Sheet(860, 60 + 92 * strips + 230), [*subject.captions, "[ROOT]"]
    among = ", among those whose cone holds the point" if cones else ""
    sheet.text(20, 14, f"{subject.name}: nearest captions on the way to the root{among}", 14)
    by_length = sorted(range(len(found)), key=lambda i: -counts[i])   # strips from the whole range of lengths
    for row in range(strips):
        i, top = by_length[row * (len(found) - 1) // (strips - 1)], 50 + 92 * row
        sheet.picture(subject.picture(i), 20, top, 80)
        for n, text in enumerate(found[i][:6]):
            chip(sheet, 112 + 124 * n, top + 40, words[text], mixed(TEXT, 0.12) if text < len(subject.captions) else GRID)
        if len(found[i]) > 6:
            sheet.text(855, top + 66, f"and {len(found[i]) - 6} more", 11, FAINT, "rm")
    share, most = Counter(counts), max(counts + [3])
    panel = Panel(sheet, 70, 60 + 92 * strips + 30, 400, 140, (-0.6, most + 0.6), (0, 1.1 * max(share.values()) / len(found)),
                  f"captions retrieved per picture, n = {len(found)}, mean {np.mean(counts):.1f}", "captions, without the root",
                  "share of pictures", x_ticks=[(k, str(k)) for k in range(most + 1)])
    sheet.text(500, 60 + 92 * strips + 30, "above: from the pictures with most captions to those with fewest", 11, FAINT)
    for k, n in share.items():
        panel.bar(k - 0.35, k + 0.35, n / len(found), TEXT)
    sheet.save(path)


def shortened(words, count):
    return words if len(words) <= count else words[:count - 3] + "..."


def some(subject, count):
    """The same few held-out pairs for every model."""
    return [int(i) for i in np.random.default_rng(0).permutation(len(subject.items))[:count]]


@torch.no_grad()
def matrix(subject, path):
    """The similarities of 24 held-out pairs: rows are captions, columns their pictures; the diagonal should be the darkest."""
    chosen, side = some(subject, 24), 22
    values = subject.model.similarity(subject.texts[[subject.own[i] for i in chosen]], subject.images[chosen]).numpy()
    n, left, top = len(chosen), 330, 84
    sheet = Sheet(left + side * n + 90, top + side * n + 40)
    sheet.text(20, 14, f"{subject.name}: similarity of {n} held-out pairs", 14)
    sheet.text(left, 40, "their pictures, in the same order", 11, FAINT)
    low, high = float(values.min()), float(values.max())
    cells, best = heat(values - low, max(high - low, 1e-6)), values.argmax(1)
    for i, a in enumerate(chosen):
        sheet.picture(subject.picture(a), left + side * i + 1, top - side, side - 2)
        sheet.text(left - 6, top + side * i + side / 2, shortened(subject.caption(a), 60), 10, anchor="rm")
        for j in range(n):
            x, y = left + side * j, top + side * i
            sheet.rectangle(x, y, x + side - 1, y + side - 1, tuple(cells[i, j].tolist()))
        sheet.circle(left + side * best[i] + side / 2, top + side * i + side / 2, 4, PAPER if best[i] == i else "#000000")
    sheet.heat_bar(left + side * n + 20, top, side * n, [(1, f"{high:.2f}"), (0, f"{low:.2f}")])
    right = int((best == np.arange(n)).sum())
    told = f"a dot marks the nearest picture of each caption: white right ({right}), black wrong ({n - right})"
    sheet.text(left, top + side * n + 8, told, 11, FAINT)
    sheet.save(path)


@torch.no_grad()
def contact(subject, path):
    """Twelve held-out pictures with their three nearest captions, wrong ones in red."""
    chosen = some(subject, 12)
    nearest = subject.model.similarity(subject.images[chosen], subject.texts[subject.own]).topk(min(3, len(subject.own))).indices.tolist()
    sheet = Sheet(860, 40 + 4 * 124)
    sheet.text(20, 12, f"{subject.name}: the three nearest of {len(subject.own)} held-out captions", 14)
    sheet.legend(640, 8, [(GOOD, "its own caption")])
    sheet.legend(760, 8, [(BAD, "another one")])
    for n, (i, found) in enumerate(zip(chosen, nearest)):
        left, top = 20 + 280 * (n % 3), 44 + 124 * (n // 3)
        sheet.picture(subject.picture(i), left, top, 108)
        y = top
        for j in found:
            for line in textwrap.wrap(subject.caption(j), 29, max_lines=2, placeholder=" ..."):
                sheet.text(left + 116, y, line, 10, GOOD if subject.own[j] == subject.own[i] else BAD)
                y += 15
            y += 6
    sheet.save(path)


def query(model, checkpoint, words, folder, path):
    """The nearest pictures of a folder to a text, the nearest first."""
    found = evaluate.search(model, checkpoint, words, folder, count=15)
    sheet = Sheet(860, 44 + 188 * -(-len(found["nearest"]) // 5))
    sheet.text(20, 12, f'"{words}" in {found["pictures"]} pictures: similarity by {model.config.geometry}/{model.logit}', 14)
    for n, (file, closeness) in enumerate(found["nearest"]):
        left, top = 20 + 166 * (n % 5), 44 + 188 * (n // 5)
        sheet.picture(data.load_image(file, 312), left, top, 156)
        sheet.text(left, top + 160, f"{closeness:.3f}  {shortened(Path(file).name, 20)}", 11, FAINT)
    sheet.save(path)


# ---------------------------------------------------------------------------------------------------------------------------------
# a study: curves of several runs each

def curves(groups, path, title, x_label, y_label, dashed=()):
    """groups: name -> (xs, [ys of each seed]) -> a line through the means (dashed: names), whiskers from the lowest to the highest seed."""
    sheet = Sheet(760, 380)
    most = max(1, *(y for _, seeds in groups.values() for ys in seeds for y in ys))
    high = max(x for xs, _ in groups.values() for x in xs)
    panel = Panel(sheet, 70, 40, 460, 280, (0, 1.04 * high), (0, 1.05 * most), title, x_label, y_label)
    for n, (name, (xs, seeds)) in enumerate(groups.items()):
        colour, aside = LINES[n % len(LINES)], (n - (len(groups) - 1) / 2) * 0.008 * high
        for x, ys in zip(xs, zip(*seeds)):
            panel.curve((x + aside, x + aside), (min(ys), max(ys)), mixed(colour, 0.6), 1.5)
        panel.curve([x + aside for x in xs], np.mean(seeds, 0), colour, dash=3 if name in dashed else None)
    sheet.legend(550, 44, [(LINES[n % len(LINES)], f"{name}, n = {len(seeds)}") for n, (name, (_, seeds)) in enumerate(groups.items())])
    for n, words in enumerate(("whiskers: lowest to highest seed,", "set side by side to be seen")):
        sheet.text(550, 52 + 16 * (len(groups) + n), words, 11, FAINT)
    sheet.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("subject", help="a checkpoint, or the word geometry")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--query", metavar="TEXT", help="draw the nearest pictures of --images instead")
    parser.add_argument("--images", metavar="DIR")
    args = parser.parse_args()
    try:
        if bool(args.query) != bool(args.images):
            raise ValueError("--query and --images need each other")
        if args.query and args.subject == "geometry":
            raise ValueError("--query needs a checkpoint")
        if args.subject == "geometry":
            three_geometries(args.folder / "three_geometries.png")
            cones(args.folder / "cones.png")
        elif args.query:
            query(load_model(args.subject), args.subject, args.query, args.images, args.folder / "query.png")
        else:
            subject = Subject(args.subject)
            distances([[subject]], args.folder / "distances.png")
            if len(subject.chains[0]) > 1:
                levels(subject, args.folder / "levels.png")
            for draw in (traversal, matrix, contact):
                draw(subject, args.folder / f"{draw.__name__}.png")
    except (ValueError, OSError) as error:
        sys.exit(f"figures.py: {error}")


if __name__ == "__main__":
    main()
