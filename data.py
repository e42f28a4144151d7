"""Captions to tokens, pictures to uint8 tensors, and where both come from.

A data source is one string:

    shapes                       drawn as we go: coloured shapes, and captions of them
    shards/{00000..01287}.tar    tar shards as img2dataset writes them; a glob; several, with ::
    pairs.csv, pairs.tsv         columns `filepath` and `title`
    a folder                     pictures, each with its caption in a .txt of the same name

Every source is a list: sample i can be read without the ones before it. The batch of step s is a
function of (seed, s) alone, whatever the number of processes and of loading workers, so to resume
a run is to go on counting. A sample that cannot be used is replaced by another one and counted.

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
import tarfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import regex
import tiktoken
import tiktoken.load
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset, get_worker_info

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
    bytes, so here the mark is one more byte, a newline, and the word is "cat\\n". Its first merges
    (every byte with the newline) give back CLIP's marked letters. All later ones are CLIP's own."""
    raw = gzip.decompress(tiktoken.load.read_file_cached(CLIP_VOCABULARY, CLIP_SHA256))
    merges = raw.decode().split("\n")[1:48_895]
    # CLIP spells a printable byte as itself, the others as chr(256), chr(257), ...
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}

    def spell(token):
        letters = bytes(byte_of[c] for c in token.removesuffix("</w>"))
        return letters + b"\n" if token.endswith("</w>") else letters

    tokens = [bytes([b]) for b in printable + others]
    tokens += [token + b"\n" for token in tokens]
    tokens += [b"".join(map(spell, merge.split())) for merge in merges]
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding("clip", pat_str=r"[^\n]+\n", mergeable_ranks=ranks, special_tokens={})


def clip_ids(text):
    words = CLIP_WORDS.findall(text.lower())
    return clip_encoding().encode_ordinary("".join(word + "\n" for word in words))


@lru_cache
def find_tokenizer(name):
    """bytes, clip, or a name that tiktoken knows -> (text to ids, V). Raises ValueError."""
    if name == "bytes":
        return lambda text: list(text.encode("utf-8", errors="replace")), 256 + 2
    if name not in ("clip", *tiktoken.list_encoding_names()):
        names = ", ".join(["bytes", "clip", *tiktoken.list_encoding_names()])
        raise ValueError(f"no tokenizer {name!r}; choose one of {names}")
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


def clean_text(text):
    """As CLIP cleans: no HTML escapes (often there are two layers), single spaces."""
    return " ".join(html.unescape(html.unescape(text)).split())


def tokenize(texts, tokenizer, context_length=77):
    """Any string, or N of them -> int64 (N, context_length): start, ids, end, zeros. Long ones are
    cut; the end token stays. Unlike CLIP's own tokenizer this does not repair encodings."""
    encode, V = find_tokenizer(tokenizer)
    texts = [texts] if isinstance(texts, str) else texts
    tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, text in zip(tokens, texts):
        ids = encode(clean_text(text))[: context_length - 2]
        row[: len(ids) + 2] = torch.tensor([V - 2, *ids, V - 1])
    return tokens


# ------------------------------------------------------------------------------------------------
# pictures

Image.MAX_IMAGE_PIXELS = 100_000_000  # Pillow refuses twice as many: a decompression bomb
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
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, dtype=np.float64)
        top = 65535 if grey.max() > 255 else 255
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
    limit = 16 * min(w, h)
    if max(w, h) > limit:  # of a strip, cut off what the crop never sees, before it gets huge
        x, y = (w - min(w, limit)) // 2, (h - min(h, limit)) // 2
        image = image.crop((x, y, w - x, h - y))
        w, h = image.size
    w, h = size * w // min(w, h), size * h // min(w, h)
    image = image.resize((w, h), Image.Resampling.BICUBIC)
    left, top = round((w - size) / 2), round((h - size) / 2)
    return to_tensor(image.crop((left, top, left + size, top + size)))


def random_box(w, h, scale, rng):
    """RandomResizedCrop's rectangle: area `scale` to 1 of the picture, aspect ratio 3/4 to 4/3."""
    for _ in range(10):
        area = w * h * rng.uniform(scale, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        box_w, box_h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_w <= w and 0 < box_h <= h:
            left, top = rng.randint(0, w - box_w), rng.randint(0, h - box_h)
            return left, top, left + box_w, top + box_h
    x, y = max(0, w - round(h * 4 / 3)) // 2, max(0, h - round(w * 4 / 3)) // 2
    return x, y, w - x, h - y  # a strip: the largest rectangle that is allowed, centred


def load_training_crop(item, size, scale, rng):
    """A random rectangle of the picture, made square -> uint8 (3, size, size). A JPEG is decoded at
    half, quarter or eighth size (`draft`) where that is enough, which is faster."""
    image = open_image(item)
    turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # EXIF orientation: on its side
    w, h = image.size[::-1] if turned else image.size
    left, top, right, bottom = random_box(w, h, scale, rng)
    enough = math.ceil(w * size / (right - left)), math.ceil(h * size / (bottom - top))
    image.draft(None, enough[::-1] if turned else enough)
    image = to_rgb(image)
    x, y = image.width / w, image.height / h
    box = (left * x, top * y, right * x, bottom * y)
    return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=1.0))


# ------------------------------------------------------------------------------------------------
# shapes: a world with a hierarchy. Integers and random.random() only: all machines draw the same

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
HELD_OUT = 480  # pictures of one object (ten of each class), and as many of two


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
    while True:
        first = int(rng.random() * 96)
        if not two:
            return first, None, None
        scene = first, int(rng.random() * 4), int(rng.random() * 96)
        if not is_held_out(scene):
            return scene


def describe(scene, level, rng=None):
    """A caption of a scene at a level of generality, from 0 ("a shape") to 4: see LEVELS."""
    first, relation, second = scene
    size, colour, kind = OBJECTS[first]
    if level == 1:
        return f"something {colour}" if rng.random() < 0.5 else f"a {kind}"
    if level < 4:
        return ("a shape", None, f"a {colour} {kind}", f"a {size} {colour} {kind}")[level]
    other = " ".join(OBJECTS[second])
    return f"a {size} {colour} {kind} {list(RELATIONS)[relation]} a {other}"


def draw(scene, rng, size):
    """A scene -> RGB image: place, size, shade and background vary. Drawn twice as large."""

    def vary(middle, spread):
        return int(middle + (2 * rng.random() - 1) * spread)

    grey = vary(30, 20)  # on light backgrounds a small ViT would need several times the pictures
    canvas = Image.new("RGB", (2 * size, 2 * size), (grey, grey, vary(grey, 12)))
    pen = ImageDraw.Draw(canvas)
    first, relation, second = scene
    dx, dy = (0, 0) if second is None else list(RELATIONS.values())[relation]
    for index, side in ((first, 1), (second, -1)):  # two objects are on opposite sides
        if index is None:
            break
        object_size, colour, kind = OBJECTS[index]
        low, high = SIZES[object_size]
        r = vary((low + high) / 2, (high - low) / 2)
        x, y = side * dx * 520 + vary(0, 60), side * dy * 520 + vary(0, 60)
        x, y, r = (1000 + x) * size // 1000, (1000 + y) * size // 1000, r * size // 1000
        fill = tuple(min(255, max(0, vary(c, 18))) for c in COLOURS[colour])
        box = (x - r, y - r, x + r, y + r)
        if kind == "circle":
            pen.ellipse(box, fill)
        elif kind == "ring":
            pen.ellipse(box, outline=fill, width=max(1, r * 2 // 5))
        else:
            corners = [(x + dx * r // 1000, y + dy * r // 1000) for dx, dy in POLYGONS[kind]]
            pen.polygon(corners, fill)
    return canvas.reduce(2)


def draw_sample(rng, size):
    """-> uint8 (3, size, size), caption. Of the pictures 30 % show two objects."""
    two = rng.random() < 0.3
    scene, at = random_scene(rng, two), rng.random()
    fractions = (0.03, 0.08, 0.25, 0.45, 1.0) if two else (0.03, 0.10, 0.40, 1.0)  # cumulative
    level = next(i for i, fraction in enumerate(fractions) if at < fraction)
    return to_tensor(draw(scene, rng, size)), describe(scene, level, rng)


@lru_cache
def held_out_scenes():
    """HELD_OUT scenes of one object, then as many of two, of which training never draws one."""
    rng = random.Random("held out")
    ones = [(i % 96, None, None) for i in range(HELD_OUT)]
    twos = itertools.product(range(96), range(4), range(96))
    twos = [scene for scene in twos if is_held_out(scene) and scene <= mirrored(scene)]
    twos = sorted(twos, key=lambda scene: rng.random())[:HELD_OUT]
    return ones + [scene if rng.random() < 0.5 else mirrored(scene) for scene in twos]


def held_out_levels():
    """The captions of each held-out picture of two objects, one per level."""
    rng = random.Random("levels")
    scenes = held_out_scenes()[HELD_OUT:]
    return [[describe(scene, level, rng) for level in range(len(LEVELS))] for scene in scenes]


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


def read_lines(path):
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def is_hidden(path):
    """Is a part of the path hidden, or what macOS puts beside the files?"""
    return any(part.startswith(".") or part == "__MACOSX" for part in Path(path).parts)


def list_pictures(folder):
    """-> sorted picture paths, and a Counter of the extensions of all other files. Links to folders
    are followed; hidden files and folders are not data."""
    pictures, others, visited = [], Counter(), set()
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        if os.path.realpath(path) in visited:  # links can form a loop
            folders.clear()
            continue
        visited.add(os.path.realpath(path))
        for name in files:
            extension = os.path.splitext(name)[1].lower()
            if extension in PICTURES and not is_hidden(name):
                pictures.append(os.path.join(path, name))
            elif not is_hidden(name):
                others[extension] += 1
    return sorted(pictures), others


class BadCaption(ValueError):
    """The reason why a sample has no caption that can be used."""


def clean_captions(captions):
    """A string or a list of them -> list of those that are not empty: no NUL, at most 10,000
    characters each. Raises BadCaption for all else."""
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise BadCaption("caption broken")
    captions = [caption.replace("\0", " ").strip()[:10_000] for caption in captions]
    captions = [caption for caption in captions if caption]
    if not captions:
        raise BadCaption("no caption")
    return captions


def txt_captions(raw):
    """Bytes of a .txt -> captions, one a line."""
    return raw.decode("utf-8-sig", errors="replace").replace("\r", "\n").split("\n")


def json_captions(raw):
    """Bytes of a .json -> what it has under `caption`, a string or a list, or None."""
    try:
        return json.loads(raw.decode("utf-8-sig", errors="replace"))["caption"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


# ------------------------------------------------------------------------------------------------
# Sources: len(source) samples; source.read(i) -> (what `open_image` takes, its captions), or raises
# what `skip_reason` names; source.left_out counts what is no sample at all


def read_csv(path):
    """-> [(picture, caption)]. In a file with tabs, quotation marks are letters like any other."""
    text = read_text(path)
    tabs = "\t" in text.partition("\n")[0]
    how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    rows = csv.reader(io.StringIO(text, newline=""), skipinitialspace=not tabs, **how)
    swallowed = re.compile(r"[\r\n].*\.(jpe?g|png|webp|gif|bmp|tiff?)\b", re.IGNORECASE)
    pairs = []
    try:
        header = [name.strip() for name in next(rows, [])]
        if not {"filepath", "title"} <= set(header):
            raise ValueError(f"columns {', '.join(header) or 'none'}; wanted filepath and title")
        for row in filter(None, rows):  # blank lines are none
            if len(row) > len(header) or any(map(swallowed.search, row)):
                raise ValueError("more fields than columns, or a quotation mark that never closes")
            row = dict(zip(header, row))
            pairs.append((row.get("filepath", "").strip(), row.get("title", "")))
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from None
    here = any(os.path.exists(name) for name, _ in pairs[:100])  # else relative to the list
    base = "" if here else os.path.dirname(path)
    return [(os.path.join(base, name), caption) for name, caption in pairs]


def read_folder(folder, left_out):
    """-> [(picture, captions)]. The Counter left_out gets the other files."""
    pictures, others = list_pictures(folder)
    if others[".tar"]:
        raise ValueError(f"{folder} holds tar shards: give '{os.path.join(folder, '*.tar')}'")
    left_out.update({f"{ext or 'other'} file": n for ext, n in others.items() if ext != ".txt"})
    pairs = []
    for picture in pictures:
        texts = [Path(picture).with_suffix(ext) for ext in (".txt", ".TXT")]
        texts = [text for text in texts if text.exists()]
        pairs.append((picture, txt_captions(texts[0].read_bytes()) if texts else []))
    return pairs


class PairList:
    """A .csv or .tsv, or a folder."""

    def __init__(self, source):
        self.pairs, self.left_out = [], Counter()
        folder = os.path.isdir(source)
        pairs = read_folder(source, self.left_out) if folder else read_csv(source)
        for picture, captions in pairs:
            try:
                self.pairs.append((picture, clean_captions(captions)))
            except BadCaption as error:
                self.left_out[str(error)] += 1
        if not self.pairs:
            raise ValueError(f"{os.path.abspath(source)} holds no picture with a caption")

    def __len__(self):
        return len(self.pairs)

    def read(self, i):
        return self.pairs[i]


def expand_braces(pattern):
    """As the shell does: {a,b}, {000..011}, nested ones."""
    match = re.search(r"\{([^{}]*,[^{}]*|\d+\.\.\d+)\}", pattern)
    if not match:
        return [pattern]
    items = match[1].split(",")
    if len(items) == 1:
        first, last = bounds = match[1].split("..")
        padded = any(len(bound) > 1 and bound.startswith("0") for bound in bounds)
        width, step = max(map(len, bounds)) if padded else 0, 1 if int(first) <= int(last) else -1
        items = [str(i).zfill(width) for i in range(int(first), int(last) + step, step)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    expanded = itertools.chain.from_iterable(expand_braces(before + i + after) for i in items)
    return list(dict.fromkeys(expanded))


def expand_shards(source):
    """'a/{000..009}.tar', globs, several joined by :: -> list of files. Raises ValueError for any
    that is not there. A name that exists is taken as it is."""
    shards = []
    for pattern in [source] if os.path.exists(source) else source.split("::"):
        for name in [pattern] if os.path.exists(pattern) else expand_braces(pattern):
            found = [name] if os.path.exists(name) else sorted(glob.glob(name))
            if not found or not all(map(os.path.isfile, found)):
                what = "not a file:" if found else "no file or folder matches"
                raise ValueError(f"{what} {os.path.abspath(name)}")
            shards += found
    return shards


def scan_shard(path):
    """Headers of a tar -> {name: (offset, size)}, broken links, the byte after which it is damaged
    or -1. Python's tarfile ends silently at most kinds of damage, so the end is looked at:
    an undamaged archive closes with zeros and nothing else."""
    members, links, end, total, damaged = {}, {}, 0, os.path.getsize(path), True
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = os.path.normpath(member.name)
                folder = os.path.dirname(name) if member.issym() else ""
                if member.islnk() or member.issym():
                    links[name] = os.path.normpath(os.path.join(folder, member.linkname))
                elif member.isfile() and member.offset_data + member.size <= total:
                    members.setdefault(name, (member.offset_data, member.size))
                end = min(total, member.offset_data + math.ceil(member.size / 512) * 512)
        rest = read_slice(path, end, 2**20)
        damaged = len(rest) < 512 or bool(rest.strip(b"\0"))
    except Exception:  # tarfile raises nearly anything on noise
        pass
    members |= {name: members[target] for name, target in links.items() if target in members}
    return members, sum(name not in members for name in links), end if damaged else -1


def make_index(path):
    """-> int64 (1 + samples, 5). Row 0: the shard's size and time, damage, incomplete samples and
    broken links. Others: offset and size of picture and caption, is the caption in a .json?"""
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
    """What `make_index` gives in a second for 10,000 samples, kept beside the shard (in ~/.cache
    where that cannot be written), and made anew when the shard has changed."""
    stat, name = os.stat(path), hashlib.sha1(os.fsencode(os.path.abspath(path))).hexdigest()
    cache = Path(os.path.expanduser("~/.cache/nanoeuclip"))
    files = Path(f"{path}.index.npy"), cache / f"{name}.npy"
    for file in files:
        with suppress(Exception):  # none yet, or cut off, or something else
            index = np.load(file)
            if tuple(index[0, :2]) == (stat.st_size, stat.st_mtime_ns) and index.shape[1] == 5:
                return index
    index = make_index(path)
    for file in files:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(f"{file}.{os.getpid()}.tmp")
            with open(temporary, "wb") as out:
                np.save(out, index)
            os.replace(temporary, file)  # whole, however many processes write it
            break
    return index


load_index = lru_cache(64)(index_shard)  # in a loading process: of the shards it is reading from


def summarize_shard(path):
    index = index_shard(path)
    return len(index) - 1, index[0].tolist()


class Shards:
    """Tar shards as img2dataset and webdataset write them."""

    def __init__(self, source, verbose=True):
        self.paths, self.left_out, counts = expand_shards(source), Counter(), []
        with ProcessPoolExecutor(min(len(self.paths), os.cpu_count())) as pool:
            for path, summary in zip(self.paths, pool.map(summarize_shard, self.paths)):
                count, (size, _, damage, incomplete, broken_links) = summary
                counts.append(count)
                self.left_out += Counter({"incomplete sample": incomplete, "link": broken_links})
                if damage >= 0:
                    self.left_out["damaged shard"] += 1
                    if verbose:
                        print(f"warning: shard {path} is damaged after byte {damage:,} of {size:,}")
                if verbose and len(counts) % 100 == 0:
                    print(f"{len(counts):,} of {len(self.paths):,} shards indexed", flush=True)
        self.ends = np.cumsum(counts)  # shard s has the samples from ends[s - 1] to ends[s] - 1
        if len(self) == 0:
            seen = dict(Counter(os.path.splitext(name)[1] for name in scan_shard(self.paths[0])[0]))
            wanted = f"{' '.join(PICTURES)} with .txt or .json (key `caption`)"
            raise ValueError(f"no sample in {source}; {self.paths[0]} has {seen}; wanted {wanted}")

    def __len__(self):
        return int(self.ends[-1])

    def read(self, i):
        shard = int(np.searchsorted(self.ends, i, side="right"))
        path, index = self.paths[shard], load_index(self.paths[shard])
        *places, in_json = index[i - self.ends[shard] + len(index)].tolist()
        raw = read_slice(path, *places[2:])
        captions = json_captions(raw) if in_json else txt_captions(raw)
        return (path, *places[:2]), clean_captions(captions)


def open_source(source, verbose=True):
    """-> PairList or Shards; None for shapes. Raises ValueError."""
    if source == "shapes":
        return None
    is_list = source.lower().endswith((".csv", ".tsv")) and os.path.isfile(source)
    return PairList(source) if is_list or os.path.isdir(source) else Shards(source, verbose)


def held_out_pairs(source, verbose=True):
    """A source, for evaluation -> items (for `load_item`), captions, each caption's item (index),
    a Counter of what was left out. A picture in several rows is one item with several captions."""
    if source == "shapes":
        items = list(range(HELD_OUT, 2 * HELD_OUT))
        return items, [describe(held_out_scenes()[i], 4) for i in items], range(HELD_OUT), Counter()
    source = open_source(source, verbose)
    captions_of, left_out = {}, Counter(source.left_out)
    for i in range(len(source)):
        try:
            item, captions = source.read(i)
            captions_of.setdefault(item, []).extend(captions)
        except (BadCaption, OSError) as error:
            left_out[skip_reason(error)] += 1
    image_of_caption = [i for i, texts in enumerate(captions_of.values()) for _ in texts]
    captions = list(itertools.chain.from_iterable(captions_of.values()))
    return list(captions_of), captions, image_of_caption, left_out


# ------------------------------------------------------------------------------------------------
# the training stream: the batch of step s is a function of (seed, s) alone


@lru_cache(16)
def permutation(count, *seed):
    return np.random.default_rng(seed).permutation(count)


def shuffled(number, count, seed, block=2**16):
    """Number in the endless stream -> index of a sample. Every epoch has each sample once: blocks
    of neighbours in random order (a shorter one last), the samples of a block in random order. So
    only a few shards are in use at a time."""
    epoch, i = divmod(number, count)
    b, i = divmod(i, block)
    if b < count // block:
        b = int(permutation(count // block, seed, epoch)[b])
    size = min(block, count - b * block)
    return b * block + int(permutation(size, seed, epoch, b)[i])


def skip_reason(error):
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
        rng, skipped = random.Random(self.seed << 48 | number), Counter()
        if self.source is None:
            return *draw_sample(rng, self.size), skipped
        i = shuffled(number, len(self.source), self.seed)
        for _ in range(100):
            try:
                item, captions = self.source.read(i)
                caption = rng.choice(captions)
                return load_training_crop(item, self.size, self.crop_scale, rng), caption, skipped
            except Exception as error:  # Pillow raises nearly anything on damaged files
                skipped[skip_reason(error)] += 1
            i = rng.randrange(len(self.source))  # another one instead
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8), "", skipped


def collate(samples, tokenizer, context_length):
    """-> images uint8 (N, 3, H, W), tokens int64 (N, T), Counter. T is a multiple of 8, or all."""
    images, captions, skipped = zip(*samples)
    images, tokens = torch.stack(images), tokenize(captions, tokenizer, context_length)
    longest = int((tokens == vocab_size(tokenizer) - 1).int().argmax(1).max()) + 1
    tokens = tokens[:, : 8 * math.ceil(longest / 8)].contiguous()
    if get_worker_info():  # here, so that an error reaches the training; later it would be a hang
        images.share_memory_()
    return images, tokens, sum(skipped, Counter())


class LoadingError(RuntimeError):
    """No data can come any more."""


def ignore_signals(worker):
    """Ctrl-C and SIGUSR1 go to all processes of a group, but the training ends its workers itself:
    with SIGTERM, for which they must not keep the handler of the process that they come from."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def load(dataset, **settings):
    """What a DataLoader gives. Raises LoadingError, in one sentence, when a worker has failed."""
    loader = DataLoader(dataset, worker_init_fn=ignore_signals, **settings)
    try:
        iterator = iter(loader)
        if loader.num_workers:  # a death is noticed when a batch is missing, not in mid-step
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from iterator
    except (RuntimeError, OSError, EOFError) as error:  # the last two: a worker's pipe
        reason = [type(error).__name__, *str(error).strip().splitlines()][-1]
        raise LoadingError(f"loading data failed ({reason}). If memory or /dev/shm is short, use "
                           "fewer --workers, or 0; in Docker: --shm-size=8g") from None  # fmt: skip


def batches(source, config, batch_size, crop_scale=0.9, seed=0, rank=0, world_size=1, workers=0,
            step=0, skipped=None, pin_memory=False):  # fmt: skip
    """Endless (images, tokens) of this process. source: from `open_source`; config: the model's.
    The Counter `skipped` grows. Raises LoadingError if too many samples are bad."""
    skipped, taken, bad = Counter() if skipped is None else skipped, 0, 0
    text = {"tokenizer": config.tokenizer, "context_length": config.context_length}
    local = batch_size // world_size  # of a batch, a process takes so many samples in a row
    starts = itertools.count(step * batch_size + rank * local, batch_size)
    loader = load(
        Samples(source, seed, config.image_size, crop_scale),
        batch_sampler=(range(start, start + local) for start in starts),
        collate_fn=partial(collate, **text), num_workers=workers, pin_memory=pin_memory,
    )  # fmt: skip
    for images, tokens, lost in loader:
        skipped.update(lost)
        taken, bad = taken + len(images), bad + sum(lost.values())
        if bad >= 100 and bad > 0.1 * (bad + taken):
            raise LoadingError(f"{bad:,} of {bad + taken:,} samples are bad: {dict(skipped)}")
        yield images, tokens
