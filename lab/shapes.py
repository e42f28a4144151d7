"""The toy world: coloured shapes with a hierarchy of captions, the default data of train.py.

    "a shape" > "something red" or "a circle" > "a red circle" > "a small red circle"
        > "a small red circle left of a large blue square"

An image shows one shape or two, and its caption has one of these five levels of generality. A given
Pillow version draws every image identically everywhere.
"""

import itertools
import random
from functools import lru_cache, partial

from PIL import Image, ImageDraw

import data

COLOURS = {"red": (240, 50, 50), "orange": (255, 140, 20), "yellow": (250, 220, 40),
           "green": (60, 200, 80), "cyan": (60, 210, 220), "blue": (70, 110, 255),
           "purple": (170, 80, 230), "pink": (250, 130, 190)}
POLYGONS = {"circle": None, "ring": None,  # corners in thousandths of the radius
    "square": [(-900, -900), (900, -900), (900, 900), (-900, 900)],
    "triangle": [(0, -1000), (1000, 840), (-1000, 840)],
    "cross": [(-260, -1000), (260, -1000), (260, -260), (1000, -260), (1000, 260), (260, 260),
              (260, 1000), (-260, 1000), (-260, 260), (-1000, 260), (-1000, -260), (-260, -260)],
    "star": [(0, -1080), (235, -323), (1027, -333), (380, 123), (634, 873), (0, 400), (-634, 873),
             (-380, 123), (-1027, -333), (-235, -323)]}
SIZES = {"small": (250, 290), "large": (420, 460)}  # radius in thousandths of half a side
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
LEVELS = ("a shape", "something red / a circle", "a red circle", "a small red circle",
          "a small red circle left of a large blue square")
OBJECTS = list(itertools.product(SIZES, COLOURS, POLYGONS))  # 96
SHAPE_CLASSES = [f"{colour} {kind}" for colour in COLOURS for kind in POLYGONS]  # 48
SHAPE_TEMPLATES = ["a {}", "a small {}", "a large {}"]
HELD_OUT = 480  # evaluation images of one object (ten per class), and as many of two objects


def mirrored(scene):
    """The same image in other words: "A left of B" means "B right of A"."""
    first, relation, second = scene
    return second, relation ^ 1, first


def is_held_out(scene):
    """Whether training never draws this scene of two objects. That is a tenth, in any wording."""
    first, relation, second = min(scene, mirrored(scene))
    return ((first * 4 + relation) * 96 + second) * 2_654_435_761 % 2**32 % 10 == 0


def random_scene(rng, two):
    """-> indices (first object, relation, second object); for one object the last two are None."""
    first = int(rng.random() * 96)
    if not two:
        return first, None, None
    scene = first, int(rng.random() * 4), int(rng.random() * 96)
    return random_scene(rng, two) if is_held_out(scene) else scene


def describe(scene, rng):
    """-> all captions of a scene, from general to specific (see LEVELS). One object has four."""
    first, relation, second = scene
    size, colour, kind = OBJECTS[first]
    half = f"something {colour}" if rng.random() < 0.5 else f"a {kind}"
    captions = ["a shape", half, f"a {colour} {kind}", f"a {size} {colour} {kind}"]
    if second is not None:
        other = " ".join(OBJECTS[second])
        captions.append(f"{captions[-1]} {list(RELATIONS)[relation]} a {other}")
    return captions


def arrange(scene, rng):
    """Scene -> background, [(kind, radius, x, y, colour)] with random positions, radii and shades.
    Lengths are in thousandths of half a side."""
    grey = int(rng.uniform(10, 50))  # dark: random greys cost a small ViT several times the samples
    blue = int(rng.uniform(grey - 12, grey + 12))
    first, relation, second = scene
    objects = [(first, 0, 0)]
    if second is not None:
        dx, dy = list(RELATIONS.values())[relation]
        objects = [(first, dx, dy), (second, -dx, -dy)]  # on opposite sides
    arranged = []
    for index, dx, dy in objects:
        size, colour, kind = OBJECTS[index]
        r = int(rng.uniform(*SIZES[size]))
        x = 1000 + 520 * dx + int(rng.uniform(-60, 60))
        y = 1000 + 520 * dy + int(rng.uniform(-60, 60))
        fill = tuple(min(255, int(rng.uniform(c - 18, c + 18))) for c in COLOURS[colour])
        arranged.append((kind, r, x, y, fill))
    return (grey, grey, blue), arranged


def draw(arrangement, size):
    """What `arrange` returns -> RGB image. We draw it twice as large and reduce it at the end,
    which smooths the edges."""
    background, objects = arrangement
    canvas = Image.new("RGB", (2 * size, 2 * size), background)
    pen = ImageDraw.Draw(canvas)
    for kind, *lengths, fill in objects:
        r, x, y = (length * size // 1000 for length in lengths)
        box = (x - r, y - r, x + r, y + r)
        if kind == "circle":
            pen.ellipse(box, fill)
        elif kind == "ring":
            pen.ellipse(box, outline=fill, width=max(1, r * 2 // 5))
        else:
            corners = [(x + a * r // 1000, y + b * r // 1000) for a, b in POLYGONS[kind]]
            pen.polygon(corners, fill)
    return canvas.reduce(2)


@lru_cache
def held_out_scenes():
    """-> HELD_OUT scenes of one object, followed by HELD_OUT scenes of two objects. Training draws
    other images of the former, and never draws the latter."""
    rng = random.Random("held out")
    ones = [(i % 96, None, None) for i in range(HELD_OUT)]
    twos = itertools.product(range(96), range(4), range(96))
    twos = [scene for scene in twos if is_held_out(scene) and scene <= mirrored(scene)]
    twos = sorted(twos, key=lambda scene: rng.random())[:HELD_OUT]
    return ones + [scene if rng.random() < 0.5 else mirrored(scene) for scene in twos]


def held_out_levels():
    """-> captions of each held-out scene of two objects, one caption per level."""
    rng = random.Random("levels")
    return [describe(scene, rng) for scene in held_out_scenes()[HELD_OUT:]]


def held_out_image(i):
    """Index of a held-out scene -> its image source."""
    arrangement = arrange(held_out_scenes()[i], random.Random(f"held out {i}"))
    return partial(draw, arrangement)


class Shapes(data.Source):
    """The toy world as a data source. Sample i is drawn from random.Random(i)."""

    def __init__(self):
        super().__init__([])

    def __len__(self):
        return 2**48  # endless

    def __str__(self):
        return "samples drawn during training"

    def at(self, number, seed):
        return (seed << 48) | number  # every position of the training stream has a new scene

    def name(self, i):
        return f"shape {i}"

    def __getitem__(self, i):
        """20 % of the images show two objects."""
        rng = random.Random(i)
        two = rng.random() < 0.2
        scene, at = random_scene(rng, two), rng.random()
        bounds = (0.03, 0.08, 0.25, 0.45) if two else (0.03, 0.10, 0.40)  # level 0: at < bounds[0]
        level = sum(at >= bound for bound in bounds)
        arrangement = arrange(scene, rng)
        return partial(draw, arrangement), describe(scene, rng)[level]

    def held_out(self):
        """-> data.HeldOut: retrieval on two objects, zero-shot classification of one object."""
        images = [held_out_image(i) for i in range(2 * HELD_OUT)]
        ones, twos = images[:HELD_OUT], images[HELD_OUT:]
        captions = [levels[-1] for levels in held_out_levels()]  # the most specific
        labels = [first % len(SHAPE_CLASSES) for first, _, _ in held_out_scenes()[:HELD_OUT]]
        classes = ones, labels, SHAPE_CLASSES, SHAPE_TEMPLATES
        pairs = [(i, i) for i in range(HELD_OUT)]
        return data.HeldOut(twos, captions, pairs, {}, classes)
