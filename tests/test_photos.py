"""lab/cifar10.py and lab/photos.py: a small archive in CIFAR-10's layout, an evaluation, tables."""

import io
import random
import sys
import tarfile

import numpy as np
import pytest
import torch
from common import save_ours, small
from PIL import Image

import data
from lab import cifar10, photos


@pytest.fixture
def archive(tmp_path):
    """Each of five training files and of one test file contains ten images: class i is uniformly
    (10 i, 20 i, 25 i)."""
    images = []
    for label in range(10):
        colour = np.repeat(np.array([10, 20, 25], np.uint8) * label, 32 * 32)
        images.append(bytes([label]) + colour.tobytes())
    path = tmp_path / "small.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
            cifar10.add_file(tar, f"cifar-10-batches-bin/{name}.bin", b"".join(images))
    return path


@pytest.fixture
def folder(archive, tmp_path, monkeypatch, capsys):
    command = ["cifar10.py", str(tmp_path / "cifar10"), "--archive", str(archive)]
    monkeypatch.setattr(sys, "argv", command)
    cifar10.main()
    assert "not the official archive" in capsys.readouterr().out
    return tmp_path / "cifar10"


def test_pixels_and_classes_are_those_of_the_archive(folder):
    samples = data.open_source(str(folder / "train.tar"))
    assert len(samples) == 50 and not samples.skipped
    for i in range(50):
        image, captions = samples[i]
        pixels = np.asarray(Image.open(io.BytesIO(data.read_bytes(image))))
        assert pixels.shape == (32, 32, 3)
        assert (pixels == [10 * (i % 10), 20 * (i % 10), 25 * (i % 10)]).all()
        assert len(captions) == 10 and cifar10.CLASSES[i % 10] in captions[-1]
    tests = sorted(str(path.relative_to(folder / "test")) for path in folder.rglob("test/*/*"))
    assert tests == [f"{name}/{i:04}.png" for i, name in enumerate(cifar10.CLASSES)]


def test_captions_have_three_levels():
    assert cifar10.caption_levels("dog") == ["a photo", "a photo of an animal", "a photo of a dog"]
    ship = cifar10.caption_levels("ship", "an image")
    assert ship == ["an image", "an image of a vehicle", "an image of a ship"]
    captions = cifar10.training_captions("dog", random.Random(0))
    assert len(set(captions)) == 10
    assert sum(" of a dog" in text for text in captions) == 7
    assert sum(" of an animal" in text for text in captions) == 2


def test_a_run_is_evaluated_without_the_images_on_which_flags_were_chosen(folder, monkeypatch):
    monkeypatch.setattr(photos, "TUNED", 0)
    torch.manual_seed(0)
    save_ours(folder / "ckpt.pt", small("hyperbolic", context_length=77))
    result = photos.evaluate_run(folder / "ckpt.pt", folder)
    assert result["zero_shot"]["classes"] == 10
    tenths = 10 * result["zero_shot"]["top1"]
    assert tenths == pytest.approx(round(tenths))
    assert len(result["hierarchy"]["text_radius"]) == 3
    monkeypatch.setattr(photos, "TUNED", 1)
    with pytest.raises(ValueError):
        photos.evaluate_run(folder / "ckpt.pt", folder)  # no image is left


def test_the_tables_of_the_photographs_by_hand():
    def result(top1):
        hierarchy = {"general_nearer": 0.5, "text_radius": [1, 2, 3], "image_radius": 4}
        return {"zero_shot": {"top1": top1, "mean_per_class_recall": top1}, "hierarchy": hierarchy}

    found = {name: {0: result(0.4), 1: result(0.5)} for name in photos.RUNS}
    found["clip"] = {0: result(0.2), 1: result(0.4)}
    text = photos.report(found, 100, official=False)
    assert "a stand-in" in text and "| clip | 2 | 30.0 ± 14.1 |" in text
    # the differences are 20 and 10 points: 15 with a deviation of 7.07, and t = 12.7
    assert "| euclidean minus clip | 2 | +15.0 ± 63.5 |" in text
    assert "the official archive" in photos.report(found, 100, official=True)
