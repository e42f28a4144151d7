"""CIFAR-10 as images with captions of three levels of generality.

    python -m lab.cifar10                                           # downloads 162 MiB
    python -m lab.cifar10 cifar10 --archive cifar-10-binary.tar.gz  # uses your own copy

It writes cifar10/train.tar for train.py: 50,000 images, where the captions of 00000.png are the
lines of 00000.txt. It writes 10,000 images into cifar10/test for evaluate.py, in one folder per
class. From general to specific, captions of a dog are "a photo", "a photo of an animal" and "a
photo of a dog", or the same with another of PROMPTS. At each visit training draws one line of the
.txt, so LINES decides how often it sees each level. The same archive always gives the same files.

Source: Alex Krizhevsky, https://www.cs.toronto.edu/~kriz/cifar.html
"""

import argparse
import hashlib
import io
import random
import sys
import tarfile
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"

VEHICLES = ["airplane", "automobile", "ship", "truck"]
ANIMALS = ["bird", "cat", "deer", "dog", "frog", "horse"]
CLASSES = sorted(VEHICLES + ANIMALS)  # the order of the labels in the archive
KINDS = dict.fromkeys(VEHICLES, "vehicle") | dict.fromkeys(ANIMALS, "animal")  # of a class

# Images are photos of 32 x 32 pixels, so every prompt is true of every image.
PROMPTS = ["a photo", "a picture", "an image", "a snapshot", "a colour photo", "a small photo",
           "a tiny picture", "a low-resolution image", "a blurry photo", "a square picture"]
LEVELS = ["any photo", "animal or vehicle", "class"]
LINES = [1, 2, 7]  # captions that an image has of each level


def with_article(noun):
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def caption_levels(name, prompt="a photo"):
    """The captions of a class, one of each level, from general to specific."""
    kind = with_article(KINDS[name])
    return [prompt, f"{prompt} of {kind}", f"{prompt} of {with_article(name)}"]


def training_captions(name, rng):
    """The captions of an image of a class: of each level as many as LINES says."""
    captions = []
    for level, count in enumerate(LINES):
        for prompt in rng.sample(PROMPTS, count):
            captions.append(caption_levels(name, prompt)[level])
    return captions


def is_official(archive):
    with open(archive, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest() == MD5


def read_images(archive, split):
    """The split `data` (training) or `test` -> the class and the PNG file (bytes) of each image."""
    with tarfile.open(archive) as tar:
        names = sorted(name for name in tar.getnames() if f"/{split}_batch" in name)
        raw = b"".join(tar.extractfile(name).read() for name in names)
    # A record is one byte for the label, then 32 x 32 bytes each for red, green and blue.
    for record in np.frombuffer(raw, np.uint8).reshape(-1, 1 + 3 * 32 * 32):
        pixels, png = record[1:].reshape(3, 32, 32).transpose(1, 2, 0), io.BytesIO()  # (H, W, 3)
        Image.fromarray(pixels).save(png, "PNG")
        yield CLASSES[record[0]], png.getvalue()


def add_file(tar, name, content):
    member = tarfile.TarInfo(name)  # its date is 1970, so equal contents give equal archives
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", nargs="?", default="cifar10", type=Path, help="folder to write")
    parser.add_argument("--archive", type=Path, help="your copy of cifar-10-binary.tar.gz")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    archive = args.archive or args.out / "cifar-10-binary.tar.gz"
    if not args.archive:
        print(f"downloading {URL}", flush=True)
        urllib.request.urlretrieve(URL, archive)
    if not is_official(archive):
        if not args.archive:
            sys.exit(f"the download is damaged: the MD5 of {archive} is not {MD5}")
        print(f"{archive} is not the official archive: it has another MD5")
    with tarfile.open(args.out / "train.tar", "w") as tar:
        for i, (name, png) in enumerate(read_images(archive, "data")):
            captions = training_captions(name, random.Random(i))
            add_file(tar, f"{i:05}.png", png)
            add_file(tar, f"{i:05}.txt", "\n".join(captions).encode())
    for i, (name, png) in enumerate(read_images(archive, "test")):
        file = args.out / "test" / name / f"{i:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png)
    print(f"wrote {args.out}/train.tar and {args.out}/test")


if __name__ == "__main__":
    main()
