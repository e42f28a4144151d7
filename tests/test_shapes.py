"""lab/shapes.py: what the toy world draws, says, and keeps for the evaluation."""

import random
from collections import Counter

import numpy as np
import torch
from common import data, shapes

from data import load_image


def scene(first, relation, second):
    """('small red circle', 'left of', 'large blue square') -> indices."""
    objects = [" ".join(words) for words in shapes.OBJECTS]
    relation = list(shapes.RELATIONS).index(relation)
    return objects.index(first), relation, objects.index(second)


def test_captions_run_from_general_to_specific():
    both = scene("small red circle", "left of", "large blue square")
    captions = shapes.describe(both, random.Random(0))
    assert captions == ["a shape", "a circle", "a red circle", "a small red circle",
                        "a small red circle left of a large blue square"]
    assert len(shapes.SHAPE_CLASSES) == 48 and len(shapes.LEVELS) == 5
    for general, half, red, small, full in shapes.held_out_levels():
        assert general == "a shape" and half.split()[-1] in red.split()
        assert set(red.split()) < set(small.split()) and full.startswith(small)


def test_images_show_what_their_captions_say():
    """We test the area of a circle, and the side that the first object is on."""
    for size, (low, high) in shapes.SIZES.items():
        first, _, _ = scene(f"{size} red circle", "above", "small red circle")
        arrangement = shapes.arrange((first, None, None), random.Random(1))
        image = data.to_tensor(shapes.draw(arrangement, 64))
        covered = (image[0] > 150).float().mean()
        assert np.pi * (low / 2000) ** 2 * 0.9 < covered < np.pi * (high / 2000) ** 2 * 1.1
    for relation, (dx, dy) in shapes.RELATIONS.items():
        both = scene("large red square", relation, "small blue circle")
        image = data.to_tensor(shapes.draw(shapes.arrange(both, random.Random(2)), 64))
        y, x = torch.nonzero(image[0] > 150).float().mean(0) - 31.5
        assert x * dx + y * dy > 10, relation


def test_every_machine_draws_the_same_images():
    drawn = []
    for number in (0, 1, 2, 123_456_789):
        image, caption = shapes.Shapes()[number]
        drawn.append((int(load_image(image, 64).long().sum()), caption))
    assert drawn == [(509942, "a large cyan circle"),
                     (569834, "a large blue triangle below a small cyan circle"),
                     (531435, "something pink"), (628582, "a large red cross")]


def test_held_out_scenes_are_balanced_and_distinct():
    ones, twos = np.split(np.array(shapes.held_out_scenes(), dtype=object), 2)
    classes = [" ".join(shapes.OBJECTS[first][1:]) for first, _, _ in ones]
    assert Counter(classes) == Counter(shapes.SHAPE_CLASSES * 10)
    held_out = data.open_source("shapes").held_out()
    assert len(held_out.images) == len(set(held_out.captions)) == 480 and not held_out.skipped
    assert held_out.pairs == [(i, i) for i in range(480)]
    assert load_image(held_out.images[0], 64).shape == (3, 64, 64)
    images, labels, names, templates = held_out.classes
    assert [names[label] for label in labels] == classes and len(images) == 480
    assert len({load_image(image, 64).numpy().tobytes() for image in images}) == 480


def test_training_draws_no_held_out_scene_in_any_wording():
    """A circle left of a star is a star right of a circle."""
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    names = list(shapes.RELATIONS)
    held_out = set()
    for first, relation, second in shapes.held_out_scenes()[shapes.HELD_OUT :]:
        other = names.index(opposite[names[relation]])
        held_out |= {(first, relation, second), (second, other, first)}
    assert len(held_out) == 2 * shapes.HELD_OUT
    drawn = {shapes.random_scene(random.Random(i), True) for i in range(20_000)}
    assert len(drawn) > 10_000 and not drawn & held_out
