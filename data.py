"""Captions to tokens, pictures to uint8 tensors, and where both come from.

A data source is one string:

    shapes                       drawn as we go: coloured shapes, and captions of them
    shards/{00000..01287}.tar    tar shards as img2dataset writes them; a glob; several, with ::
    pairs.csv, pairs.tsv         columns `filepath` and `title`
    a folder                     pictures, each with its caption in a .txt of the same name

Sample i can be read, or drawn, without the ones before it. So the batch of step s depends on the
data, the flags and s alone, whatever the number of processes and of loading workers, and to resume
a run is to go on counting. A sample that cannot be used is counted: in training another one takes
its place, in evaluation it is left out.

Axes: N samples, T tokens, H, W pixels.
"""

import csv
import glob
import gzip
import hashlib
import html
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import tarfile
from collections import Counter
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import regex
import tiktoken
import tiktoken.load
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import ConcatDataset, DataLoader, Dataset, get_worker_info

# ------------------------------------------------------------------------------------------------
# tokens. In every vocabulary of size V: start V - 2, end V - 1, padding 0 after the end

CLIP_VOCABULARY = (
    "https://raw.githubusercontent.com/openai/CLIP/d05afc436d78f1c48dc0dbf8e5980a9d471f35f6/"
    "clip/bpe_simple_vocab_16e6.txt.gz"
)
CLIP_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
CLIP_WORDS = regex.compile(r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")


@lru_cache
def clip_encoding():
    """CLIP's byte-pair encoding as a tiktoken Encoding.

    In CLIP's vocabulary the last letter of a word carries a mark: c a t</w>. tiktoken knows only
    bytes, so here the mark is a byte of its own, a newline after the word: "cat\\n". The first
    merges join every byte with that newline, which gives CLIP's marked letters. The rest are its
    own.
    """
    raw = gzip.decompress(tiktoken.load.read_file_cached(CLIP_VOCABULARY, CLIP_SHA256))
    merges = raw.decode().split("\n")[1:48_895]  # a version line first; CLIP uses 48,894
    # CLIP spells a printable byte as itself, the others as chr(256), chr(257), ...
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {256 + i: b for i, b in enumerate(others)}
    tokens = [bytes([b]) for b in printable + others]
    tokens += [token + b"\n" for token in tokens]
    for merge in merges:
        token = merge.replace("</w>", "\n").replace(" ", "").translate(byte_of)
        tokens.append(token.encode("latin-1"))
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding("clip", pat_str=r"[^\n]+\n", mergeable_ranks=ranks, special_tokens={})


def clip_ids(text):
    words = CLIP_WORDS.findall(text.lower())
    return clip_encoding().encode_ordinary("".join(word + "\n" for word in words))


@lru_cache
def find_tokenizer(name):
    """bytes, clip, or a name that tiktoken knows -> (text to ids, V). Raises ValueError."""
    names = ["bytes", "clip", *tiktoken.list_encoding_names()]
    if name not in names:
        raise ValueError(f"no tokenizer {name!r}; choose one of {', '.join(names)}")
    if name == "bytes":
        return lambda text: list(text.encode("utf-8", errors="replace")), 256 + 2
    try:
        encoding = clip_encoding() if name == "clip" else tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # among them those of a download
        folder = os.environ.get("TIKTOKEN_CACHE_DIR", "the folder TIKTOKEN_CACHE_DIR")
        file = hashlib.sha1(CLIP_VOCABULARY.encode()).hexdigest()
        hint = f"; put {CLIP_VOCABULARY} there as {file}" if name == "clip" else ""
        raise ValueError(f"the vocabulary of {name!r} is neither in {folder} nor to be downloaded "
                         f"({type(error).__name__}){hint}") from None  # fmt: skip
    return clip_ids if name == "clip" else encoding.encode_ordinary, encoding.n_vocab + 2


def vocab_size(tokenizer):
    return find_tokenizer(tokenizer)[1]


def tokenize(texts, tokenizer, context_length=77):
    """Any string, or N of them -> int64 (N, context_length): start, ids, end, zeros. Long ones are
    cut; the end token stays. Unlike CLIP's own tokenizer this does not repair encodings."""
    encode, V = find_tokenizer(tokenizer)
    texts = [texts] if isinstance(texts, str) else texts
    tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, text in zip(tokens, texts):
        text = " ".join(html.unescape(html.unescape(text)).split())  # as CLIP cleans
        ids = encode(text)[: context_length - 2]
        row[: len(ids) + 2] = torch.tensor([V - 2, *ids, V - 1])
    return tokens


# ------------------------------------------------------------------------------------------------
# pictures

Image.MAX_IMAGE_PIXELS = 100_000_000  # Pillow refuses more than twice as many: a bomb
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # EPS would start another program
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def open_image(item):
    """item: a path, bytes, a file, or (tar, offset, size) -> PIL image, not yet decoded."""
    if isinstance(item, tuple):
        item = read_slice(*item)
    if isinstance(item, bytes):
        item = io.BytesIO(item)
    return Image.open(item, formats=FORMATS)


def read_slice(path, offset, size):
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def to_rgb(image):
    """Any mode -> RGB, upright, over white. 16-bit grey is rescaled, where Pillow would clip it."""
    image.load()
    with suppress(Exception):  # noise in place of EXIF counts as none
        image.getexif()  # Pillow keeps what it has parsed
    for name in ("exif", "Raw profile type exif"):  # exif_transpose would write them; odd tags fail
        image.info.pop(name, None)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, dtype=np.float64)
        top = 65535 if grey.max() > 255 else 255  # or 8-bit numbers in a wider type
        image = Image.fromarray((grey.clip(0, top) * (255 / top)).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # uint8 (3, H, W)


def load_image(path, size):
    """What `open_image` takes -> uint8 (3, size, size): open_clip's evaluation crop, the shorter
    side to `size`, bicubic, then the centre square. Raises what Pillow raises."""
    image = to_rgb(open_image(path))
    w, h = image.size
    x, y = max(0, w - 16 * h) // 2, max(0, h - 16 * w) // 2
    if x or y:  # of a strip, cut off what the crop never sees, before it gets huge
        image = image.crop((x, y, w - x, h - y))
        w, h = image.size
    w, h = size * w // min(w, h), size * h // min(w, h)
    image = image.resize((w, h), Image.Resampling.BICUBIC)
    left, top = round((w - size) / 2), round((h - size) / 2)
    return to_tensor(image.crop((left, top, left + size, top + size)))


def random_box(w, h, scale, rng):
    """RandomResizedCrop's rectangle: area `scale` to 1 of the picture, aspect ratio 3/4 to 4/3. Of
    a strip, where that is impossible, the largest one in the middle with such a ratio."""
    for _ in range(10):
        area = w * h * rng.uniform(scale, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        box_w, box_h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_w <= w and 0 < box_h <= h:
            left, top = rng.randint(0, w - box_w), rng.randint(0, h - box_h)
            return left, top, left + box_w, top + box_h
    x, y = max(0, w - round(h * 4 / 3)) // 2, max(0, h - round(w * 4 / 3)) // 2
    return x, y, w - x, h - y


def load_training_crop(item, size, scale, rng):
    """A random rectangle of the picture, stretched to a square -> uint8 (3, size, size). A JPEG is
    decoded at half, quarter or eighth size (`draft`) if the smallest box still keeps `size` pixels
    on its shorter side."""
    image = open_image(item)
    w, h = image.size
    shrink = min(w, h, math.sqrt(scale * w * h * 3 / 4)) / size  # see random_box
    image.draft(None, (math.ceil(w / shrink), math.ceil(h / shrink)))
    image = to_rgb(image)
    box = random_box(*image.size, scale, rng)
    return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=1.0))


# ------------------------------------------------------------------------------------------------
# shapes: a world with a hierarchy. With the same Pillow all machines draw the same

COLOURS = {"red": (240, 50, 50), "orange": (255, 140, 20), "yellow": (250, 220, 40),
           "green": (60, 200, 80), "cyan": (60, 210, 220), "blue": (70, 110, 255),
           "purple": (170, 80, 230), "pink": (250, 130, 190)}  # fmt: skip
POLYGONS = {"circle": None, "ring": None,  # corners in thousandths of the radius
    "square": [(-900, -900), (900, -900), (900, 900), (-900, 900)],
    "triangle": [(0, -1000), (1000, 840), (-1000, 840)],
    "cross": [(-260, -1000), (260, -1000), (260, -260), (1000, -260), (1000, 260), (260, 260),
              (260, 1000), (-260, 1000), (-260, 260), (-1000, 260), (-1000, -260), (-260, -260)],
    "star": [(0, -1080), (235, -323), (1027, -333), (380, 123), (634, 873), (0, 400), (-634, 873),
             (-380, 123), (-1027, -333), (-235, -323)]}  # fmt: skip
SIZES = {"small": (250, 290), "large": (420, 460)}  # radius in thousandths of half the picture
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
LEVELS = ("a shape", "something red / a circle", "a red circle", "a small red circle",
          "a small red circle left of a large blue square")  # fmt: skip
OBJECTS = list(itertools.product(SIZES, COLOURS, POLYGONS))  # 96
SHAPE_CLASSES = [f"{colour} {kind}" for colour in COLOURS for kind in POLYGONS]  # 48
SHAPE_TEMPLATES = ["a {}", "a small {}", "a large {}"]
HELD_OUT = 480  # pictures of one object (ten of each class) to evaluate on, and as many of two


def mirrored(scene):
    """The same picture in other words: A left of B is B right of A."""
    first, relation, second = scene
    return second, relation ^ 1, first


def is_held_out(scene):
    """A tenth of all arrangements of two objects, in whatever words, is never drawn in training."""
    first, relation, second = min(scene, mirrored(scene))
    return ((first * 4 + relation) * 96 + second) * 2_654_435_761 % 2**32 % 10 == 0


def random_scene(rng, two):
    """-> indices (first object, relation, second object), the last two None for one object."""
    first = int(rng.random() * 96)
    if not two:
        return first, None, None
    scene = first, int(rng.random() * 4), int(rng.random() * 96)
    return random_scene(rng, two) if is_held_out(scene) else scene


def describe(scene, rng):
    """-> all captions of a scene, from general to specific: see LEVELS. One object has four."""
    first, relation, second = scene
    size, colour, kind = OBJECTS[first]
    half = f"something {colour}" if rng.random() < 0.5 else f"a {kind}"
    captions = ["a shape", half, f"a {colour} {kind}", f"a {size} {colour} {kind}"]
    if second is not None:
        other = " ".join(OBJECTS[second])
        captions.append(f"{captions[-1]} {list(RELATIONS)[relation]} a {other}")
    return captions


def draw(scene, rng, size):
    """A scene -> RGB image: place, size, shade and background vary. Drawn twice as large."""
    grey = int(rng.uniform(10, 50))  # dark: on any grey a small ViT needs several times the samples
    blue = int(rng.uniform(grey - 12, grey + 12))
    canvas = Image.new("RGB", (2 * size, 2 * size), (grey, grey, blue))
    pen = ImageDraw.Draw(canvas)
    first, relation, second = scene
    objects = [(first, 0, 0)]
    if second is not None:
        dx, dy = list(RELATIONS.values())[relation]
        objects = [(first, dx, dy), (second, -dx, -dy)]  # on opposite sides
    for index, dx, dy in objects:
        object_size, colour, kind = OBJECTS[index]
        r = int(rng.uniform(*SIZES[object_size])) * size // 1000
        x = (1000 + 520 * dx + int(rng.uniform(-60, 60))) * size // 1000
        y = (1000 + 520 * dy + int(rng.uniform(-60, 60))) * size // 1000
        fill = tuple(min(255, int(rng.uniform(c - 18, c + 18))) for c in COLOURS[colour])
        box = (x - r, y - r, x + r, y + r)
        if kind == "circle":
            pen.ellipse(box, fill)
        elif kind == "ring":
            pen.ellipse(box, outline=fill, width=max(1, r * 2 // 5))
        else:
            corners = [(x + a * r // 1000, y + b * r // 1000) for a, b in POLYGONS[kind]]
            pen.polygon(corners, fill)
    return canvas.reduce(2)


def draw_sample(rng, size):
    """-> uint8 (3, size, size), caption. Of the pictures 20 % show two objects."""
    two = rng.random() < 0.2
    scene, at = random_scene(rng, two), rng.random()
    bounds = (0.03, 0.08, 0.25, 0.45) if two else (0.03, 0.10, 0.40)  # level 0 below the first
    level = sum(at >= bound for bound in bounds)
    return to_tensor(draw(scene, rng, size)), describe(scene, rng)[level]


@lru_cache
def held_out_scenes():
    """HELD_OUT scenes of one object: known objects, newly drawn. Then HELD_OUT of two objects, in
    arrangements that are never drawn in training."""
    rng = random.Random("held out")
    ones = [(i % 96, None, None) for i in range(HELD_OUT)]
    twos = itertools.product(range(96), range(4), range(96))
    twos = [scene for scene in twos if is_held_out(scene) and scene <= mirrored(scene)]
    twos = sorted(twos, key=lambda scene: rng.random())[:HELD_OUT]
    return ones + [scene if rng.random() < 0.5 else mirrored(scene) for scene in twos]


def held_out_levels():
    """The captions of each held-out picture of two objects, one per level."""
    rng = random.Random("levels")
    return [describe(scene, rng) for scene in held_out_scenes()[HELD_OUT:]]


def load_item(item, size):
    """What `open_image` takes, or the number of a held-out scene -> uint8 (3, size, size)."""
    if isinstance(item, int):
        scene = held_out_scenes()[item]
        return to_tensor(draw(scene, random.Random(f"held out {item}"), size))
    return load_image(item, size)


# ------------------------------------------------------------------------------------------------
# text and folders, as people have them


def read_text(path):
    """UTF-8, with or without a byte order mark. Raises ValueError for other encodings."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start:,}); save it so") from None


def split_lines(text):
    """Lines that are not blank. For str.splitlines a "\x85" in a caption would end one, too."""
    return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]


def read_lines(path):
    return split_lines(read_text(path))


def is_hidden(path):
    """Is a part of the path hidden, or what macOS puts beside the files?"""
    return any(part.startswith(".") or part == "__MACOSX" for part in Path(path).parts)


def list_pictures(folder):
    """-> sorted picture paths, and a Counter of the extensions of all other files. Links to folders
    are followed; hidden files and folders are not data."""
    pictures, others, visited = [], Counter(), set()
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        if os.path.realpath(path) in visited:  # links can form a loop
            folders.clear()
            continue
        visited.add(os.path.realpath(path))
        for name in itertools.filterfalse(is_hidden, files):
            extension = os.path.splitext(name)[1].lower()
            if extension in PICTURES:
                pictures.append(os.path.join(path, name))
            else:
                others[extension] += 1
    return sorted(pictures), others


class BadCaption(ValueError):
    """The reason why a sample has no caption that can be used."""


def clean_captions(captions):
    """A string or a list of them -> list of those that are not empty: no NUL, at most 10,000
    characters each. Raises BadCaption if none is left, or if one is no string."""
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise BadCaption("caption broken")
    captions = [caption.replace("\0", " ").strip()[:10_000] for caption in captions]
    captions = [caption for caption in captions if caption]
    if not captions:
        raise BadCaption("no caption")
    return captions


def parse_captions(raw, in_json=False):
    """Bytes of a .txt, a caption a line, or of a .json -> what `clean_captions` takes, or None."""
    text = raw.decode("utf-8-sig", errors="replace")
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        return json.loads(text)["caption"] if in_json else split_lines(text)


# ------------------------------------------------------------------------------------------------
# sources: lists of samples. A sample is what `open_image` takes, and its captions; a sample that
# cannot be read raises an error, which `skip_reason` names


def read_csv(path):
    """-> [(picture, caption)]. In a file with tabs, quotation marks are letters like any other."""
    text = read_text(path)
    tabs = "\t" in "".join(text.splitlines()[:1])
    how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    rows = csv.reader(io.StringIO(text, newline=""), skipinitialspace=not tabs, **how)
    # a field with a later line that names a picture: its quotation mark swallowed other rows
    swallowed = re.compile(r"[\r\n].*\.(jpe?g|png|webp|gif|bmp|tiff?)\b", re.IGNORECASE)
    pairs = []
    try:
        header = [name.strip() for name in next(rows, [])]
        if not {"filepath", "title"} <= set(header):
            raise ValueError(f"columns {', '.join(header) or 'none'}; wanted filepath and title")
        for row in filter(None, rows):  # a blank line gives []
            if len(row) > len(header) or any(map(swallowed.search, row)):
                raise ValueError("more fields than columns, or a quotation mark that never closes")
            row = dict(zip(header, row))
            pairs.append((row.get("filepath", "").strip(), row.get("title", "")))
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from None
    # names are relative to the current folder if one of the first is there, else to the list
    here = any(os.path.exists(name) for name, _ in pairs[:100])
    base = "" if here else os.path.dirname(path)
    return [(os.path.join(base, name), caption) for name, caption in pairs]


def read_folder(folder):
    """-> [(picture, captions)], a Counter of the files that were left out."""
    pictures, others = list_pictures(folder)
    if others.pop(".tar", 0):
        raise ValueError(f"{folder} holds tar shards: give '{os.path.join(folder, '*.tar')}'")
    others.pop(".txt", 0)
    pairs, left_out = [], Counter({f"{ext or 'other'} file": n for ext, n in others.items()})
    for picture in pictures:
        text = Path(picture).with_suffix(".txt")
        text = text if text.exists() else text.with_suffix(".TXT")
        try:
            pairs.append((picture, parse_captions(text.read_bytes())))
        except FileNotFoundError:
            left_out["no caption"] += 1
        except OSError:
            left_out["caption that cannot be read"] += 1
    return pairs, left_out


def expand_braces(pattern):
    """{a,b}, {000..011} and nested ones, as bash expands them, without {a..c} and steps."""
    match = re.search(r"\{([^{}]*,[^{}]*|\d+\.\.\d+)\}", pattern)
    if not match:
        return [pattern]
    items = match[1].split(",")
    if len(items) == 1:
        first, last = match[1].split("..")
        width = max(len(first), len(last)) if re.search(r"\b0\d", match[1]) else 0
        step = 1 if int(first) <= int(last) else -1
        items = [str(i).zfill(width) for i in range(int(first), int(last) + step, step)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    expanded = itertools.chain.from_iterable(expand_braces(before + i + after) for i in items)
    return list(dict.fromkeys(expanded))  # of nested braces some come out more than once


def expand_shards(source):
    """'a/{000..009}.tar', globs, several joined by :: -> list of files. Raises ValueError for any
    that is not there. A name that exists is taken as it is."""
    if os.path.isfile(source):
        return [source]
    if not os.path.exists(source):
        for parts in (source.split("::"), expand_braces(source), sorted(glob.glob(source))):
            if parts not in ([], [source]):  # the first of the three that gives other names
                return list(itertools.chain.from_iterable(map(expand_shards, parts)))
    raise ValueError(f"no file {os.path.abspath(source)}")


def scan_shard(path):
    """Headers of a tar -> {name: (offset, size)}, the number of broken links, and where damage
    begins (a byte; -1: nowhere). Python's tarfile takes most damage for the end. But an undamaged
    archive ends with zeros, so damage is anything else after the last member."""
    members, links, end, total, damaged = {}, {}, 0, os.path.getsize(path), True
    read_slice(path, 0, 1)  # raises if the file cannot be read, which is no damage
    with open(path, "rb") as file, suppress(Exception):  # tarfile raises nearly anything on noise
        tar = tarfile.open(fileobj=file, mode="r:")
        for member in tar:
            name = os.path.normpath(member.name)
            folder = os.path.dirname(name) if member.issym() else ""
            if member.islnk() or member.issym():
                links[name] = os.path.normpath(os.path.join(folder, member.linkname))
            elif member.isfile() and member.offset_data + member.size <= total:
                members.setdefault(name, (member.offset_data, member.size))
            end = min(total, tar.offset)  # where the next header begins
        file.seek(end)
        rest = file.read(2**20)
        damaged = len(rest) < 512 or any(rest)
    members |= {name: members[target] for name, target in links.items() if target in members}
    return members, sum(name not in members for name in links), end if damaged else -1


def make_index(path):
    """-> int64 (1 + samples, 5). Row 0: the shard's size and time, where damage begins, numbers of
    incomplete samples and of broken links. Then a row per sample: offset and size of the picture,
    offset and size of the caption, 1 if that is in a .json."""
    stat, (members, broken_links, damage) = os.stat(path), scan_shard(path)
    samples, rows, incomplete = {}, [], 0
    for name, place in members.items():
        key, extension = os.path.splitext(name)
        kind = "picture" if extension.lower() in PICTURES else extension.lower()
        if not is_hidden(name):
            samples.setdefault(key, {}).setdefault(kind, place)
    for key, parts in samples.items():
        text = parts.get(".txt") or parts.get(".json")
        if "picture" in parts and text:
            rows.append((*parts["picture"], *text, ".txt" not in parts))
        elif key.rpartition(".")[0] not in samples:  # 1.seg.png belongs to 1.jpg
            incomplete += 1
    header = (stat.st_size, stat.st_mtime_ns, damage, incomplete, broken_links)
    return np.array([header, *rows], dtype=np.int64)


def index_shard(path):
    """What `make_index` gives, kept beside the shard (in ~/.cache where that cannot be written),
    and made anew when the shard has changed."""
    stat, cache = os.stat(path), os.path.expanduser("~/.cache/nanoeuclip")
    files = [Path(f"{folder}{os.path.abspath(path)}.index.npy") for folder in ("", cache)]
    for file in files:
        with suppress(Exception):  # none yet, or cut off, or something else
            index = np.load(file)
            if tuple(index[0, :2]) == (stat.st_size, stat.st_mtime_ns) and index.shape[1] == 5:
                return index
    index = make_index(path)
    if index[0, 2] >= 0:  # damage may be a disk's that is mended later
        return index
    for file in files:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(f"{file}.{os.getpid()}.tmp")
            with open(temporary, "wb") as out:
                np.save(out, index)
            os.replace(temporary, file)  # whole, however many processes write it
            break
    return index


load_index = lru_cache(64)(index_shard)  # each process keeps those of the last 64 shards


class Shard:
    """A tar shard as a list of samples."""

    def __init__(self, path):
        index = index_shard(path)
        self.path, self.count, self.header = path, len(index) - 1, index[0].tolist()

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        offset, size, text_offset, text_size, in_json = load_index(self.path)[1 + i].tolist()
        captions = parse_captions(read_slice(self.path, text_offset, text_size), in_json)
        return (self.path, offset, size), captions


def open_shards(source, verbose):
    """Tar shards -> their samples, a Counter of what was left out."""
    paths, shards, left_out = expand_shards(source), [], Counter()
    workers = min(len(paths), cores(16))
    for shard in load(paths, batch_size=None, collate_fn=Shard, num_workers=workers):
        size, _, damage, incomplete, broken_links = shard.header
        left_out += Counter({"incomplete sample": incomplete, "link": broken_links})
        left_out += Counter({"damaged shard": int(damage >= 0)})
        if verbose and damage >= 0:
            print(f"warning: shard {shard.path} is damaged after byte {damage:,} of {size:,}")
        shards.append(shard)
        if verbose and len(shards) % 100 == 0:
            print(f"{len(shards):,} of {len(paths):,} shards indexed", flush=True)
    samples = ConcatDataset(shards)
    if len(samples) == 0:
        seen = dict(Counter(os.path.splitext(name)[1] for name in scan_shard(paths[0])[0]))
        wanted = f"{' '.join(PICTURES)} with .txt or .json (key `caption`)"
        raise ValueError(f"no sample in {source}; {paths[0]} has {seen}; wanted {wanted}")
    return samples, left_out


def open_source(source, verbose=True):
    """-> samples (None for shapes), a Counter of what was left out. Raises ValueError."""
    if source == "shapes":
        return None, Counter()
    if os.path.isdir(source):
        samples, left_out = read_folder(source)
    elif source.lower().endswith((".csv", ".tsv")) and os.path.isfile(source):
        samples, left_out = read_csv(source), Counter()
    else:
        return open_shards(source, verbose)
    if not samples:
        raise ValueError(f"{os.path.abspath(source)} holds no picture with a caption")
    return samples, left_out


def held_out_pairs(source, verbose=True):
    """A source, for evaluation -> items (for `load_item`), captions, each caption's item (index),
    a Counter of what was left out. A picture in several rows is one item with several captions."""
    if source == "shapes":
        captions = [levels[-1] for levels in held_out_levels()]  # the most specific
        return range(HELD_OUT, 2 * HELD_OUT), captions, range(HELD_OUT), Counter()
    captions_of, (samples, left_out) = {}, open_source(source, verbose)
    for i in range(len(samples)):
        try:
            item, captions = samples[i]
            captions_of[item] = captions_of.get(item, []) + clean_captions(captions)
        except (BadCaption, OSError) as error:
            left_out[skip_reason(error)] += 1
    if not captions_of:
        raise ValueError(f"{source} holds no picture with a caption; left out: {dict(left_out)}")
    image_of_caption = [i for i, texts in enumerate(captions_of.values()) for _ in texts]
    captions = list(itertools.chain.from_iterable(captions_of.values()))
    return list(captions_of), captions, image_of_caption, left_out


# ------------------------------------------------------------------------------------------------
# the training stream


@lru_cache(16)
def permutation(count, *seed):
    return np.random.default_rng(seed).permutation(count)


def shuffled(number, count, seed, block=2**16):
    """Number in the endless stream -> index of a sample. Every epoch has each sample once. Blocks
    of neighbours come in random order (a shorter one last), and within a block its samples do. So
    only a few shards are in use at a time."""
    epoch, i = divmod(number, count)
    b, i = divmod(i, block)
    if b < count // block:
        b = int(permutation(count // block, seed, epoch)[b])  # the block that comes b-th
    size = min(block, count - b * block)
    return b * block + int(permutation(size, seed, epoch, b)[i])


REASONS = ("no caption", "caption broken", "picture broken", "picture too large", "file missing")


def skip_reason(error):
    """One of REASONS."""
    if isinstance(error, BadCaption):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return "picture too large"
    return "file missing" if isinstance(error, FileNotFoundError) else "picture broken"


class Samples(Dataset):
    """Number in the endless stream -> picture, caption, Counter of what was skipped on the way."""

    def __init__(self, source, seed, size, crop_scale):
        self.source, self.seed, self.size, self.crop_scale = source, seed, size, crop_scale

    def __getitem__(self, number):
        rng, skipped = random.Random((self.seed << 48) | number), Counter()
        if self.source is None:
            return *draw_sample(rng, self.size), skipped
        i = shuffled(number, len(self.source), self.seed)
        for _ in range(100):
            try:
                item, captions = self.source[i]
                caption = rng.choice(clean_captions(captions))
                return load_training_crop(item, self.size, self.crop_scale, rng), caption, skipped
            except Exception as error:  # Pillow raises nearly anything on damaged files
                skipped[skip_reason(error)] += 1
            i = rng.randrange(len(self.source))  # another one instead
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8), "", skipped


def collate(tokenizer, context_length, samples):
    """-> images uint8 (N, 3, H, W), tokens int64 (N, T), Counter. T is a multiple of 8, or all."""
    images, captions, skipped = zip(*samples)
    images, tokens = torch.stack(images), tokenize(captions, tokenizer, context_length)
    longest = int((tokens == vocab_size(tokenizer) - 1).int().argmax(1).max()) + 1
    tokens = tokens[:, : 8 * math.ceil(longest / 8)].contiguous()
    if get_worker_info():  # a full /dev/shm raises here; in the worker's queue it would be a hang
        images, tokens = images.share_memory_(), tokens.share_memory_()
    return images, tokens, dict(sum(skipped, Counter()))  # pin_memory would double a Counter


def cores(most=8, processes=1):
    """How many each of so many processes may use. (More loading ones would take long to start.)"""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(most, here // processes))


class LoadingError(RuntimeError):
    """No data can come any more."""


def prepare_worker(worker):
    """The training decides when to stop, so its workers ignore Ctrl-C and SIGUSR1, which can come
    to all processes. SIGTERM ends them at once: they must not inherit the training's handler. Their
    errors reach the training by its queue. The excepthook silences threads that hold batches which
    nobody fetches when the training ends."""
    sys.excepthook = lambda *error: None
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def load(dataset, **settings):
    """What a DataLoader gives. Raises LoadingError, in one sentence, when a worker has failed."""
    loader = DataLoader(dataset, worker_init_fn=prepare_worker, **settings)
    try:
        iterator = iter(loader)
        if loader.num_workers:  # torch's handler would raise in mid-step when a worker dies; so it
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # is noticed when a batch is missing
        yield from iterator
    except (RuntimeError, MemoryError, OSError, EOFError) as error:  # the last two: a pipe's
        reason = [type(error).__name__, *str(error).strip().splitlines()][-1]
        raise LoadingError(f"loading data failed ({reason}). If memory or /dev/shm is short, use "
                           "fewer --workers, or 0; in Docker: --shm-size=8g") from None  # fmt: skip


def batches(source, config, batch_size, crop_scale=0.9, seed=0, rank=0, world_size=1, workers=0,
            step=0, pin_memory=False):  # fmt: skip
    """Endless (images, tokens, {reason: samples skipped}) of this process. source: samples of
    `open_source`; config: the model's. Raises LoadingError once 100 samples and a tenth of all are
    bad."""
    taken, skipped = 0, Counter()
    local = batch_size // world_size  # process r takes the r-th slice of each batch
    starts = itertools.count(step * batch_size + rank * local, batch_size)
    loader = load(
        Samples(source, seed, config.image_size, crop_scale),
        batch_sampler=(range(start, start + local) for start in starts),
        collate_fn=partial(collate, config.tokenizer, config.context_length),
        num_workers=workers, pin_memory=pin_memory,
    )  # fmt: skip
    for images, tokens, lost in loader:
        skipped.update(lost)
        taken, bad = taken + len(images), skipped.total()
        if bad >= 100 and bad > 0.1 * (bad + taken):
            raise LoadingError(f"{bad:,} of {bad + taken:,} samples are bad: {dict(skipped)}")
        yield images, tokens, lost
