"""All figures: the geometries explained, and what a checkpoint makes of its held-out data.

    python -m lab.figures geometry lab          # three_geometries.png and cones.png
    python -m lab.figures out/ckpt.pt out/figures

The second command draws distances.png and contact.png; traversal.png for the toy world, or among
the captions of --captions FILE; and loss.png if log.jsonl is beside the checkpoint. Coordinates are
pixels, y downwards. Radii are distances from the root.
"""

import argparse
import itertools
import json
import math
import sys
import textwrap
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

import data
import evaluate
from geometry import GEOMETRIES
from lab import hierarchy, shapes
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
    """A PNG has two pixels for each pixel of the coordinates, for screens of high resolution."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (2 * width, 2 * height), PAPER)
        self.pen = ImageDraw.Draw(self.image, "RGBA")  # colours may end in an alpha

    def text(self, x, y, words, size=11, colour=INK, anchor="la", halo=0):
        """A halo of so many pixels hides the lines behind the text."""
        font = ImageFont.load_default(2 * size)
        align = "center" if anchor == "mm" else "left"
        style = {"align": align, "stroke_width": 2 * halo, "stroke_fill": PAPER}
        self.pen.text((2 * x, 2 * y), words, colour, font, anchor, spacing=8, **style)

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
        self.image.save(path)
        print(path)


def wrap(words, size, width, lines):
    """Text -> at most so many lines, the longest ones that fit into the width."""
    font = ImageFont.load_default(2 * size)
    for characters in range(60, 4, -1):
        text = textwrap.fill(words, characters, max_lines=lines, placeholder=" ...")
        if max(map(font.getlength, text.splitlines()), default=0) <= 2 * width:
            break
    return text


def ticks(high, count=5):
    """Round numbers from 0 to high, about `count` of them."""
    step = 10 ** math.floor(math.log10(high / count))
    step *= next(m for m in (1, 2, 5, 10) if high / (step * m) <= count + 1)
    return np.arange(0, high + step / 1e6, step)


def axes(sheet, box, right, top, unit=""):
    """Draws axes from 0 to `right` and `top` into a box (left, upper edge, width, height)
    -> function (x, y) -> points of the sheet (..., 2). Unit "%": y is a fraction of 1."""
    left, upper, width, height = box
    factor = 100 if unit else 1

    def place(x, y):
        across, up = np.divide(x, right), np.divide(y, top)
        return np.stack([left + width * across, upper + height * (1 - up)], -1)

    for y in ticks(top):
        ends = place([0, right], [y, y])
        sheet.line(ends, GRID)
        sheet.text(left - 6, ends[0, 1], f"{factor * y:g} {unit}".strip(), 11, FAINT, "rm")
    for x in ticks(right):
        sheet.text(place(x, 0)[0], upper + height + 6, f"{x:,g}", 11, FAINT, "ma")
    return place


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
    """The shortest path between two tangent vectors (2,) -> (count, 2) in the disc. We find it on
    the hyperboloid."""
    r = np.hypot(*np.array([x, y]).T)[:, None]
    X, Y = np.hstack([np.cosh(r), np.sinh(r) / r * [x, y]])
    d, t = np.arccosh(X[0] * Y[0] - X[1:] @ Y[1:]), np.linspace(0, 1, count)[:, None]
    points = (np.sinh((1 - t) * d) * X + np.sinh(t * d) * Y) / np.sinh(d)
    return points[:, 1:] / (1 + points[:, :1])


def distance(x, y, geometry, logit):
    x, y = (torch.tensor(v)[None] for v in (x, y))
    return -GEOMETRIES[geometry].similarity(x, y, logit).item()


def sphere(sheet, cx, cy, R, angle):
    """Draws a globe -> points on the great circle between two points `angle` apart (60, 2)."""
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
    """Two embeddings, at the same angle and (except on the sphere) with the same radii in each
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
    geodesic = hyperbolic_path(image, text)
    panels = [
        (140, great_circle, "sphere: CLIP", angle, "only the angle counts"),
        (420, np.array([image, text]) / 2, "plane: EuCLIP", flat, "the lengths count, too"),
        (700, geodesic, "hyperbolic disc: MERU", curved, "the cost of turning grows exponentially"),
    ]
    for cx, shortest, title, length, note in panels:
        points = [(cx + R * x, cy - R * y) for x, y in shortest]
        if cx != 140:  # the centre of the sphere is not its root
            for end in (points[0], points[-1]):
                sheet.line([(cx, cy), end], FAINT)
            sheet.circle(cx, cy, 3, FAINT)
            sheet.text(cx, cy + 5, "root", 11, FAINT, "ma")
        sheet.line(points, INK, 3)
        for (x, y), colour, name in ((points[0], IMAGE, "image"), (points[-1], TEXT, "text")):
            sheet.circle(x, y, 6, colour, PAPER)
            if cx == 140:
                sheet.text(x + 6, y + 16, name, 12, colour, "rm")
            else:
                sheet.text(x + 12, y - 8, name, 12, colour, "lm", halo=2)
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
    pixels = heat(loss, math.pi)
    pixels[loss == 0] = mixed(IMAGE, 0.3)
    if in_disc:
        pixels[np.linalg.norm(grid, axis=-1) > 1] = mixed(PAPER, 1)
    sheet.paste(pixels, left, top)
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
    words = "black: the root; orange: the text; blue: images inside its cone, which have loss 0; "
    words += "the cone of a text inside the circle is a half-space"
    sheet.text(20, 618, words, 11, FAINT)
    sheet.save(path)


# ------------------------------------------------------------------------------------------------
# a checkpoint


class Subject:
    """A model and its held-out data: images, and for each image a chain of captions from general to
    specific. Only the toy world has more than one caption per chain; of other data we take the
    first caption of each image. Raises ValueError without held-out data."""

    def __init__(self, checkpoint):
        model = self.model = load_model(checkpoint)
        source = evaluate.held_out_source(model.train_config)
        if source is None:
            raise ValueError(f"{checkpoint} names no held-out data; train it with --val_data")
        self.has_levels = source == "shapes"
        if self.has_levels:
            N, chains = shapes.HELD_OUT, shapes.held_out_levels()
            self.sources = [shapes.held_out_image(i) for i in range(N, 2 * N)]
            self.images, texts = hierarchy.embed_hierarchy(model)
        else:
            held_out = data.open_source(source).held_out()
            first = {image: text for image, text in reversed(held_out.pairs)}
            self.images, kept = evaluate.embed_images(model, held_out.images)
            self.sources = [held_out.images[i] for i in kept]
            captions = [held_out.captions[first[i]] for i in kept]
            chains, texts = [[c] for c in captions], evaluate.embed_texts(model, captions)[None]
        self.root = model.geometry.root(torch.cat([self.images, texts.flatten(0, 1)]))
        captions = list(itertools.chain.from_iterable(chains))
        rows = {}
        for row, caption in enumerate(captions):
            rows.setdefault(caption, row)  # equal captions are one caption
        self.captions = list(rows)
        self.texts = texts.transpose(0, 1).flatten(0, 1)[list(rows.values())]
        number = {caption: i for i, caption in enumerate(rows)}
        self.chains = [[number[caption] for caption in chain] for chain in chains]
        self.own = [chain[-1] for chain in self.chains]  # the most specific captions, as indices
        self.name = f"{model.config.geometry}/{model.config.logit}"
        if model.geometry.cones:
            self.name += f", lambda {model.train_config.get('entailment_weight', 0):g}"

    def draw(self, i, sheet, x, y, size):
        pixels = data.load_image(self.sources[i], 2 * size)
        sheet.paste(pixels.permute(1, 2, 0).numpy(), x, y)


def distances_panel(sheet, subject, box):
    """Figures 2 and 4 of the paper: how far texts and images are from the root."""
    texts, geometry = subject.texts[subject.own], subject.model.geometry
    radii = [geometry.distance_to_root(x, subject.root).numpy() for x in (texts, subject.images)]
    edges = np.linspace(0, 1.15 * max(1e-3, *map(np.max, radii)), 61)
    shares = [np.histogram(r, edges)[0] / len(r) for r in radii]
    left, top, width, height = box
    highest = np.max(shares)
    plot = (left, top + 0.31 * height, width, 0.69 * height)  # the legend is above it
    place = axes(sheet, plot, edges[-1], highest, "%")
    for i, (name, colour) in enumerate((("text", TEXT), ("image", IMAGE))):
        outline = place(np.repeat(edges, 2), np.concatenate([[0], np.repeat(shares[i], 2), [0]]))
        sheet.pen.polygon((2 * outline).ravel().tolist(), colour + "5a")
        sheet.line(outline, colour, 1.5)
        sheet.text(left + width, top + 2 + 16 * i, f"{name}, n = {len(radii[i])}", 12, colour, "ra")
    sheet.text(left, top - 20, subject.name, 13)
    unit = "distance from the root" if geometry.cones else "(1 - cos) / 2 from the root"
    words = f"{unit}; % of n in 60 bins"
    sheet.text(left + width / 2, top + height + 22, words, 11, FAINT, "ma")


def distances(subjects, path):
    """A panel for each subject, three in a row."""
    columns = min(3, len(subjects))
    width = 840 // columns - 60
    sheet = Sheet(860, 20 + 250 * math.ceil(len(subjects) / columns))
    for n, subject in enumerate(subjects):
        left, top = 60 + n % columns * (width + 60), 40 + n // columns * 250
        distances_panel(sheet, subject, (left, top, width, 170))
    sheet.save(path)


def balanced(chains):
    """-> candidate captions, images: as many captions of each level as there are images. For this
    we take images that share none but general captions. Otherwise most would be specific."""
    images, captions, specific = [], set(), set()
    for i, chain in enumerate(chains):
        if specific.isdisjoint(chain[2:]):
            images.append(i)
            captions.update(chain)
            specific.update(chain[2:])
    return sorted(captions), images


def traversal(subject, path, captions=None, strips=6):
    """Figures 3 and 5 of the paper: captions on the paths from images to the root. Without captions
    to choose from, we take balanced ones, and first show images that they describe."""
    K, theirs = evaluate.last_min_radius(subject.model), ()
    if captions is None:
        chosen, theirs = balanced(subject.chains)
        captions, texts = [subject.captions[j] for j in chosen], subject.texts[chosen]
    else:
        texts = evaluate.embed_texts(subject.model, captions)
    found = evaluate.traverse(subject.model, subject.images, texts, K)
    names = [*captions, "[ROOT]"]
    counts = [len(steps) - 1 for steps in found]  # without the root
    order = sorted(range(len(found)), key=lambda i: (-min(counts[i], 2), i not in theirs))
    strips = min(strips, len(found))
    sheet = Sheet(860, 108 + 92 * strips)
    cone = "" if K is None else " whose cone contains the point"
    among = f"the nearest of {len(captions)} captions{cone}"
    title = f"{subject.name}: on the path to the root, {among}"
    sheet.text(20, 12, title, 14)
    words = f"{counts.count(0)} of all {len(found)} paths meet no caption. "
    words += "Below, paths with two captions or more come first."
    sheet.text(20, 38, words, 13)
    for row, i in enumerate(order[:strips]):
        top, words = 70 + 92 * row, [names[j] for _, j in found[i]]
        if len(words) > 6:
            words[4:-1] = ["..."]
        subject.draw(i, sheet, 20, top, 80)
        for n, caption in enumerate(words):
            left, fill = 124 + 124 * n, GRID if caption == "[ROOT]" else mixed(TEXT, 0.12)
            sheet.text(left - 12, top + 40, ">", 13, FAINT, "lm")
            box = (2 * left, 2 * top, 2 * left + 216, 2 * top + 160)
            sheet.pen.rounded_rectangle(box, 10, fill)
            sheet.text(left + 54, top + 40, wrap(caption, 11, 94, lines=4), anchor="mm")
    words = ", ".join(f"{n} on {paths} paths" for n, paths in sorted(Counter(counts).items()))
    sheet.text(20, 80 + 92 * strips, f"number of captions: {words}", 11, FAINT)
    sheet.save(path)


def contact(subject, path):
    """Twelve random held-out images with their three nearest captions, wrong ones in red."""
    chosen = np.random.default_rng(0).permutation(len(subject.images))[:12]
    captions = list(dict.fromkeys(subject.own))
    with torch.no_grad():
        similarity = subject.model.similarity(subject.images[chosen], subject.texts[captions])
    nearest = similarity.topk(min(3, len(captions))).indices.tolist()
    sheet = Sheet(860, 40 + 124 * math.ceil(len(chosen) / 3))
    title = f"{subject.name}: the three nearest of {len(captions):,} held-out captions"
    sheet.text(20, 12, title, 14)
    sheet.text(660, 14, "its own caption", 12, GOOD)
    sheet.text(770, 14, "another one", 12, BAD)
    for n, i in enumerate(chosen.tolist()):
        left, top = 20 + 280 * (n % 3), 44 + 124 * (n // 3)
        subject.draw(i, sheet, left, top, 108)
        for k, j in enumerate(nearest[n]):
            colour = GOOD if captions[j] == subject.own[i] else BAD
            words = wrap(subject.captions[captions[j]], 10, 148, lines=2)
            sheet.text(left + 116, top + 37 * k, words, 10, colour)
    sheet.save(path)


def curve(sheet, box, title, colour, points, last, unit=""):
    """Draws values over training steps, points (P, 2), with steps up to `last`."""
    left, top, width, height = box
    steps, values = np.transpose(points)
    place = axes(sheet, box, last, 1.08 * max(values.max(), 0.01), unit)
    line = place(steps, values)
    sheet.line(line, colour, 1.5)
    for x, y in line if len(line) <= 20 else line[-1:]:
        sheet.circle(x, y, 3, colour)
    sheet.text(left, top - 22, title, 13)
    sheet.text(left + width / 2, top + height + 22, "step", 11, FAINT, "ma")
    return place


def loss(log, name, batch_size, path):
    """Lines of log.jsonl -> the training loss and, where there is held-out data, R@1."""
    lines = []
    for line in Path(log).read_text(errors="replace").splitlines():
        with suppress(ValueError):  # somebody's note is no report
            lines.append(json.loads(line))
    lines = [line for line in lines if isinstance(line, dict) and "step" in line]
    losses = [(x["step"], x["loss"]) for x in lines if math.isfinite(x.get("loss", math.nan))]
    recalls = [(x["step"], x["val_mean_r1"]) for x in lines if "val_mean_r1" in x]
    if not losses:
        raise ValueError(f"{log} has no finite loss")
    last = max(x["step"] for x in lines)
    sheet = Sheet(860, 310)
    place = curve(sheet, (60, 60, 340, 190), "training loss", INK, losses, last)
    knows_nothing = math.log(batch_size)
    if knows_nothing < 1.08 * max(value for _, value in losses):
        ends = place([0, last], [knows_nothing, knows_nothing])
        sheet.line(ends, BAD)
        words = f"ln {batch_size}: contrastive loss of a model that knows nothing"
        sheet.text(ends[1, 0], ends[1, 1] - 4, words, 11, BAD, "rd", halo=2)
    if recalls:
        box = (490, 60, 340, 190)
        curve(sheet, box, "held-out R@1, mean of both directions", IMAGE, recalls, last, "%")
    sheet.text(20, 10, name, 14)
    sheet.save(path)


def draw_checkpoint(checkpoint, folder, captions_file=None):
    captions = list(dict.fromkeys(data.read_lines(captions_file))) if captions_file else None
    subject, log = Subject(checkpoint), Path(checkpoint).with_name("log.jsonl")
    distances([subject], folder / "distances.png")
    contact(subject, folder / "contact.png")
    if captions or subject.has_levels:
        traversal(subject, folder / "traversal.png", captions)
    else:
        print("traversal.png needs captions of several levels, --captions FILE; it is not drawn")
    if log.exists():
        batch_size = subject.model.train_config["batch_size"]
        loss(log, subject.name, batch_size, folder / "loss.png")
    else:
        print(f"loss.png needs {log}, which does not exist; it is not drawn")


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("subject", help="a checkpoint, or the word geometry")
    parser.add_argument("folder", type=Path, help="where the figures are written")
    parser.add_argument("--captions", metavar="FILE", help="candidates of traversal.png")
    args = parser.parse_args()
    if args.captions and args.subject == "geometry":
        parser.error("--captions needs a checkpoint")
    try:
        if args.subject == "geometry":
            three_geometries(args.folder / "three_geometries.png")
            cones(args.folder / "cones.png")
        else:
            draw_checkpoint(args.subject, args.folder, args.captions)
    except (ValueError, OSError, data.LoadingError) as error:
        sys.exit(f"figures.py: {error}")


if __name__ == "__main__":
    main()
