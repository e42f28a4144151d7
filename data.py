"""Captions to tokens, pictures to uint8, and where both come from.

    tokens = tokenize(["a red circle"], "bytes", 77)          # int64 (1, 77): start, words, end, zeros
    picture = load_image("photo.jpg", 224)                     # uint8 (3, 224, 224), the evaluation crop
    for batch in Batches("shards/{000..099}.tar", ...): ...    # endless

A data source is one string:

    shapes                          drawn as we go: coloured shapes with captions from "a shape" to "a small red circle left of ..."
    shards/{00000..01287}.tar       tar shards as img2dataset and webdataset write them; also a glob, also several joined by ::
    pairs.csv, pairs.tsv            columns `filepath` and `title`
    a folder                        pictures, each with a caption in the .txt of the same name

Training reads an endless stream and counts samples, never epochs. Sources that can be addressed (all but tar shards) make the global
batch of step s from (seed, s) alone, and each process takes its slice: the number of processes changes the speed, not the run. What
cannot be used is dropped, counted by reason and reported; faults in a worker travel as values, because an exception would carry a page
of traceback with it.

Axes: N samples, T tokens, H, W pixels, R real (unpadded) tokens of a batch.
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
import tempfile
import threading
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import regex
import tiktoken
import tiktoken.load
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset, IterableDataset


# ---------------------------------------------------------------------------------------------------------------------------------
# captions to tokens. In every vocabulary of V: start V - 2, end V - 1, padding 0 after the end

CLIP_VOCABULARY = ("https://raw.githubusercontent.com/openai/CLIP/d05afc436d78f1c48dc0dbf8e5980a9d471f35f6/clip/bpe_simple_vocab_16e6.txt.gz",
                   "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")   # URL, sha256
CLIP_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def collapse_whitespace(text):
    """Undo HTML escapes (twice: scraped captions are often escaped twice), make every run of whitespace one space."""
    return " ".join(html.unescape(html.unescape(text)).split())


@lru_cache
def clip_encoding():
    """CLIP's byte-pair encoding as a tiktoken Encoding.

    CLIP marks the last letter of a word (t</w>), tiktoken merges bytes. The mark becomes a byte of its own, a newline: collapsing
    whitespace leaves none in a caption. The 256 tokens (byte, mark) rank below every merge, so each word's last byte takes its mark
    first, as in CLIP; after that both merge by the same ranks.
    """
    lines = gzip.decompress(tiktoken.load.read_file_cached(*CLIP_VOCABULARY)).decode().split("\n")[1:48_895]   # 48,894 merges
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]   # CLIP spells every byte as one character: these as themselves
    order = printable + [b for b in range(256) if b not in printable]   # the others as chr(256), chr(257), ...
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(order[len(printable):])}
    spell = lambda token: bytes(byte_of[c] for c in token.removesuffix("</w>")) + (b"\n" if token.endswith("</w>") else b"")
    tokens = [bytes([b]) for b in order] + [bytes([b]) + b"\n" for b in order]
    tokens += [b"".join(map(spell, line.split())) for line in lines]
    return tiktoken.Encoding("clip", pat_str=r"[^\n]+\n", mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens={})


def clip_ids(text):
    return clip_encoding().encode_ordinary("".join(word + "\n" for word in CLIP_WORDS.findall(text.lower())))


@lru_cache
def find_tokenizer(name):
    """A name (bytes, clip, or any that tiktoken knows) -> text to ids, size of the vocabulary V. Raises ValueError."""
    if name == "bytes":
        return lambda text: list(text.encode("utf-8", errors="replace")), 256 + 2
    try:
        if name == "clip":
            return clip_ids, clip_encoding().n_vocab + 2
        encoding = tiktoken.get_encoding(name)
        return encoding.encode_ordinary, encoding.n_vocab + 2
    except OSError:   # requests' errors are OSErrors
        folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.path.join(tempfile.gettempdir(), "data-gym-cache")
        hint = f"\nput {CLIP_VOCABULARY[0]} there as {hashlib.sha1(CLIP_VOCABULARY[0].encode()).hexdigest()}" if name == "clip" else ""
        raise ValueError(f"the vocabulary of tokenizer {name!r} is neither in tiktoken's cache ({folder}; set TIKTOKEN_CACHE_DIR to use "
                         f"another folder) nor can it be downloaded{hint}") from None
    except ValueError as error:
        if name == "clip":   # the file in the cache is not the one that was published
            raise ValueError(f"CLIP's vocabulary: {error}") from None
        names = ", ".join(["bytes", "clip", *tiktoken.list_encoding_names()])
        raise ValueError(f"no tokenizer {name!r}; choose one of {names}") from None


def tokenize(texts, tokenizer, context_length=77):
    """texts: a string or a list of N -> int64 (N, context_length): start, ids, end, zeros. Any string is allowed, the empty one too.

    Long texts are cut so that the end token stays; `<|endoftext|>` written out is text like any other. CLIP's own tokenizer cleans
    with ftfy besides, which is not used here: captions with broken encodings differ.
    """
    encode, V = find_tokenizer(tokenizer)
    texts = [texts] if isinstance(texts, str) else list(texts)
    tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, text in zip(tokens, texts):
        ids = [V - 2, *encode(collapse_whitespace(text))[:context_length - 2], V - 1]
        row[:len(ids)] = torch.tensor(ids)
    return tokens


def clean_caption(raw):
    """bytes of a file -> a caption, '' where there is none: no BOM, no NUL, no surrogates; nobody reads beyond 10,000 characters."""
    return raw[:40_000].decode("utf-8-sig", errors="replace").replace("\0", " ").strip()[:10_000]


# ---------------------------------------------------------------------------------------------------------------------------------
# pictures to uint8

Image.MAX_IMAGE_PIXELS = 100_000_000   # Pillow warns beyond this, and refuses beyond twice this: a decompression bomb
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def open_image(source):
    """A path, bytes or file -> PIL image, not decoded yet."""
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def to_rgb(image):
    """Any mode -> RGB. Transparency over white; 16-bit grey rescaled, where Pillow would clip it to white."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, dtype=np.float64)
        top = 65535 if grey.max() > 255 else 255
        return Image.fromarray((grey.clip(0, top) * (255 / top)).astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()   # (3, H, W)


def load_image(path, size):
    """The evaluation crop, as open_clip's: shorter side to `size` (bicubic, antialiased), centre square.

    path: a path, bytes or an open file -> uint8 (3, size, size). Raises OSError, as Pillow does, for what is no picture.
    """
    image = to_rgb(open_image(path))
    w, h = image.size
    short = min(w, h)
    if max(w, h) > 16 * short:   # a strip: cut off what the crop never sees, before resizing makes it huge
        image = image.crop(((w - min(w, 16 * short)) // 2, (h - min(h, 16 * short)) // 2, (w + min(w, 16 * short)) // 2, (h + min(h, 16 * short)) // 2))
        w, h = image.size
    image = image.resize((max(size, int(size * w / short)), max(size, int(size * h / short))), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return to_tensor(image.crop((left, top, left + size, top + size)))


def random_box(w, h, scale, rng):
    """RandomResizedCrop's rectangle: area scale..1 of the picture, ratio 3/4..4/3, log-uniform -> (left, top, right, bottom)."""
    for _ in range(10):
        area, ratio = w * h * rng.uniform(scale, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        cw, ch = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < cw <= w and 0 < ch <= h:
            left, top = rng.randint(0, w - cw), rng.randint(0, h - ch)
            return left, top, left + cw, top + ch
    cw, ch = min(w, round(h * 4 / 3)), min(h, round(w * 4 / 3))   # too long a picture: the largest centred one of allowed ratio
    return (w - cw) // 2, (h - ch) // 2, (w - cw) // 2 + cw, (h - ch) // 2 + ch


def load_training_crop(source, size, scale, rng):
    """The training crop: a random box of the picture, made size x size -> uint8 (3, size, size).

    A JPEG is decoded at half, quarter or eighth size where the box stays larger than the target (`draft`), and only the box is resized,
    whole multiples of it by plain averaging (`reducing_gap`). The mean difference from the plain path is below 2 %.
    """
    image = open_image(source)
    w, h = image.size
    left, top, right, bottom = random_box(w, h, scale, rng)
    image.draft(None, (math.ceil(w * size / (right - left)), math.ceil(h * size / (bottom - top))))
    image = to_rgb(image)
    x, y = image.width / w, image.height / h
    return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=(left * x, top * y, right * x, bottom * y), reducing_gap=1.0))


# ---------------------------------------------------------------------------------------------------------------------------------
# shapes: a world with a hierarchy. Integers and random.random() only, so that every machine draws the same pictures

COLOURS = {"red": (240, 50, 50), "orange": (255, 140, 20), "yellow": (250, 220, 40), "green": (60, 200, 80),
           "cyan": (60, 210, 220), "blue": (70, 110, 255), "purple": (170, 80, 230), "pink": (250, 130, 190)}
POLYGONS = {   # corners in thousandths of the radius; the circle and the ring are ellipses
    "circle": None, "ring": None,
    "square": [(-900, -900), (900, -900), (900, 900), (-900, 900)],
    "triangle": [(0, -1000), (1000, 840), (-1000, 840)],
    "cross": [(-260, -1000), (260, -1000), (260, -260), (1000, -260), (1000, 260), (260, 260),
              (260, 1000), (-260, 1000), (-260, 260), (-1000, 260), (-1000, -260), (-260, -260)],
    "star": [(0, -1080), (235, -323), (1027, -333), (380, 123), (634, 873), (0, 400), (-634, 873), (-380, 123), (-1027, -333), (-235, -323)],
}
SIZES = {"small": (250, 290), "large": (420, 460)}   # radius in thousandths of half the picture
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}   # from the second object to the first
KINDS = [(s, c, k) for s in SIZES for c in COLOURS for k in POLYGONS]   # 96 objects
SHAPE_CLASSES = [f"{c} {k}" for c in COLOURS for k in POLYGONS]   # 48
SHAPE_TEMPLATES = ["a {}", "a small {}", "a large {}"]
LEVELS = ["a shape", "something red / a circle", "a red circle", "a small red circle", "a small red circle left of a large blue square"]   # by example
HELD_OUT = 480   # pictures of one object (ten of each class), and as many of two


def is_held_out(first, relation, second):
    """A tenth of all arrangements of two objects is never drawn in training. Arguments are indices into KINDS, RELATIONS, KINDS."""
    return ((first * 4 + relation) * 96 + second) * 2_654_435_761 % 2**32 % 10 == 0


def random_scene(rng, two):
    """-> (first, relation, second), indices; relation and second are None for one object."""
    pick = lambda n: int(rng.random() * n)
    while True:
        scene = (pick(96), pick(4), pick(96)) if two else (pick(96), None, None)
        if not two or not is_held_out(*scene):
            return scene


def describe(scene, level, rng):
    """One caption of a scene at a level of generality: 0 = "a shape" ... 3 = "a small red circle", 4 = with what it stands next to."""
    size, colour, kind = KINDS[scene[0]]
    if level == 1:
        return f"something {colour}" if rng.random() < 0.5 else f"a {kind}"
    words = ["a shape", None, f"a {colour} {kind}", f"a {size} {colour} {kind}"]
    if level < 4:
        return words[level]
    return f"{words[3]} {list(RELATIONS)[scene[1]]} a {' '.join(KINDS[scene[2]])}"


def draw(scene, rng, size):
    """A scene -> RGB image, size x size: places, sizes, shades and background vary. Drawn at twice the size, then averaged."""
    unit = size   # half the side of the canvas, in its pixels
    vary = lambda middle, spread: int(middle + (2 * rng.random() - 1) * spread)
    grey = vary(30, 20)   # dark: with backgrounds of any grey a small ViT needs five times as many pictures to tell the shapes
    canvas = Image.new("RGB", (2 * unit, 2 * unit), (grey, grey, vary(grey, 12)))
    pen = ImageDraw.Draw(canvas)
    first, relation, second = scene
    for kind, side in ((first, 1), (second, -1)) if second is not None else ((first, 0),):
        name, colour, shape = KINDS[kind]
        low, high = SIZES[name]
        r = vary((low + high) / 2, (high - low) / 2)
        if side:   # two objects, each on its side of the middle
            dx, dy = RELATIONS[list(RELATIONS)[relation]]
            x, y = (side * d * 520 + vary(0, 60) for d in (dx, dy))
        else:
            x, y = vary(0, 60), vary(0, 60)
        x, y, r = (1000 + x) * unit // 1000, (1000 + y) * unit // 1000, r * unit // 1000
        fill = tuple(min(255, max(0, vary(c, 18))) for c in COLOURS[colour])
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif shape == "ring":
            pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(1, r * 2 // 5))
        else:
            pen.polygon([(x + px * r // 1000, y + py * r // 1000) for px, py in POLYGONS[shape]], fill=fill)
    return canvas.reduce(2)


@lru_cache
def held_out_scenes():
    """The fixed split: HELD_OUT pictures of one object, all kinds alike, then HELD_OUT arrangements of two that training never draws."""
    rng = random.Random("held out")
    ones = [(i % 96, None, None) for i in range(HELD_OUT)]
    twos = [(i // 384, i // 96 % 4, i % 96) for i in range(96 * 4 * 96) if is_held_out(i // 384, i // 96 % 4, i % 96)]
    return ones + sorted(twos, key=lambda scene: rng.random())[:HELD_OUT]


def held_out_levels():
    """Captions of each held-out picture of two objects, from "a shape" to its own: HELD_OUT lists of one caption per level."""
    rng = random.Random("levels")
    return [[describe(scene, level, rng) for level in range(len(LEVELS))] for scene in held_out_scenes()[HELD_OUT:]]


def held_out_shape(i, size):
    return to_tensor(draw(held_out_scenes()[i], random.Random(f"held out {i}"), size))


class Shapes:
    """Addressed by sample number: the same (seed, number) gives the same picture and caption, everywhere."""
    TWO = 0.3   # share of pictures with two objects
    MIX = {False: (0.03, 0.10, 0.40, 1.0), True: (0.03, 0.08, 0.25, 0.45, 1.0)}   # cumulative shares of the levels, one object and two

    def sample(self, number, seed, size, scale, skipped):
        rng = random.Random(seed << 48 | number)
        two = rng.random() < self.TWO
        scene, at = random_scene(rng, two), rng.random()
        level = next(i for i, share in enumerate(self.MIX[two]) if at < share)
        return to_tensor(draw(scene, rng, size)), describe(scene, level, rng)


# ---------------------------------------------------------------------------------------------------------------------------------
# csv and folders: lists of pictures with captions

def read_list(source):
    """csv, tsv or folder -> [(picture path, caption)]. Raises ValueError for a source that yields nothing."""
    path = Path(source)
    if source.endswith((".csv", ".tsv")):
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, delimiter="," if source.endswith(".csv") else "\t")
            if not {"filepath", "title"} <= set(rows.fieldnames or ()):
                raise ValueError(f"{source} needs columns filepath and title; it has {rows.fieldnames}")
            pairs = [(row["filepath"], clean_caption((row["title"] or "").encode())) for row in rows]
        pairs = [(p if not p or os.path.exists(p) else str(path.parent / p), c) for p, c in pairs]   # relative to here, or to the list
    else:
        if not path.is_dir():
            raise ValueError(f"no data source {source!r}: not `shapes`, not a .tar, .csv or .tsv, and no folder {path.resolve()}")
        pictures = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES)
        captions = [clean_caption(p.with_suffix(".txt").read_bytes()) if p.with_suffix(".txt").exists() else "" for p in pictures]
        pairs = [(str(p), c) for p, c in zip(pictures, captions)]
    kept = [(p, c) for p, c in pairs if p and c]
    if not kept:
        raise ValueError(f"{path.resolve()} holds no picture with a caption")
    if len(kept) < len(pairs):
        print(f"warning: {len(pairs) - len(kept):,} of {len(pairs):,} pictures of {source} have no caption", flush=True)
    return kept


@lru_cache(2)   # a batch may lie across two passes
def order_of_pass(count, seed, turn):
    return np.random.default_rng((seed, turn)).permutation(count)


class PairList:
    """A list of pictures, each pass in another order. What cannot be read is replaced by another sample and counted."""

    def __init__(self, source):
        self.pairs = read_list(source)

    def sample(self, number, seed, size, scale, skipped):
        rng = random.Random(seed << 48 | number)
        turn, place = divmod(number, len(self.pairs))
        chosen = order_of_pass(len(self.pairs), seed, turn)[place]
        for _ in range(100):
            path, caption = self.pairs[chosen]
            try:
                return load_training_crop(path, size, scale, rng), caption
            except Exception as error:   # Pillow's decoders raise nearly anything on damaged files
                skipped[skip_reason(error)] += 1
                chosen = rng.randrange(len(self.pairs))
        raise ValueError(f"100 pictures in a row cannot be read, the last one {path}: {dict(skipped)}")


def skip_reason(error):
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return "picture too large"
    return "picture missing" if isinstance(error, FileNotFoundError) else "picture broken"


# ---------------------------------------------------------------------------------------------------------------------------------
# tar shards

def expand_shards(pattern):
    """'a/{000..009}.tar', globs, several joined by :: -> the list of files. Raises ValueError for anything that is not there."""
    shards = []
    for part in pattern.split("::"):
        braces = re.search(r"\{(\d+)\.\.(\d+)\}", part)
        if braces:
            first, last = braces.groups()
            numbers = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
            shards += itertools.chain.from_iterable(expand_shards(part[:braces.start()] + n + part[braces.end():]) for n in numbers)
        elif (found := sorted(glob.glob(part))) and all(map(os.path.isfile, found)):
            shards += found
        else:
            raise ValueError(f"{'no file matches' if not found else 'not a file:'} {os.path.abspath(part)}")
    if not shards:
        raise ValueError(f"{pattern!r} names no shard")
    return shards


def is_tar(source):
    return any(part.endswith(".tar") for part in source.split("::"))


def index_shard(path):
    """Read a shard's headers -> [(picture offset, size, caption offset, size, caption in json?)], extensions seen, warning or None.

    Members of one sample share their path up to the last dot and may stand anywhere. Python's tarfile ends silently at most kinds of
    damage, so the end is looked at: an undamaged archive closes with zeros and nothing else.
    """
    groups, seen, end, warning = {}, Counter(), 0, None
    try:
        total = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                whole = member.offset_data + member.size <= total
                end = member.offset_data + -(-member.size // 512) * 512
                key, suffix = os.path.splitext(member.name)
                if member.isfile() and whole:
                    seen[suffix.lower()] += 1
                    kind = "picture" if suffix.lower() in PICTURES else suffix.lower()
                    groups.setdefault(key, {}).setdefault(kind, (member.offset_data, member.size))   # of duplicate keys the first
        with open(path, "rb") as file:
            file.seek(end)
            rest = file.read(1 << 20)
            if len(rest) < 512 or rest.strip(b"\0"):   # a block of zeros in the middle is no end
                warning = f"shard {path} is damaged or cut short after byte {end:,} of {total:,}; what follows is lost"
    except (OSError, tarfile.TarError) as error:
        warning = f"shard {path} cannot be read{' to its end' if groups else ''} ({error})"
    samples = [(*g["picture"], *(g.get(".txt") or g[".json"]), ".txt" not in g) for g in groups.values()
               if "picture" in g and (".txt" in g or ".json" in g)]
    seen["incomplete samples"] = sum("picture" in g or ".txt" in g or ".json" in g or ".cls" in g for g in groups.values()) - len(samples)
    return samples, seen, warning


class Shards:
    """One reader's endless stream. Readers are the workers of all processes. Each pass deals the shards anew, permuted by (seed, pass);
    a reader pools the samples of a few of its shards at a time and takes them in random order.

    With fewer shards than readers several readers share a shard, each with its own samples. The cursor (pass, pool, place) after the
    last sample taken is all it needs to go on.
    """
    POOL = 4   # shards

    def __init__(self, source, seed):
        self.shards, self.seed = expand_shards(source), seed

    def samples(self, reader, readers, cursor, skipped, warnings):
        """Yields (picture bytes, caption, cursor after it)."""
        turn, pool, place = cursor
        empty = 0   # passes in a row that gave this reader nothing
        while True:
            order = np.random.default_rng((self.seed, turn)).permutation(len(self.shards))
            if len(order) >= readers:
                mine, share, part = order[reader::readers], 1, 0
            else:
                mine, share = order[[reader % len(order)]], -(-(readers - reader % len(order)) // len(order))
                part = (reader // len(order) + turn) % share   # in turn, so that a shard of few samples starves nobody
            seen, taken = Counter(), 0
            while pool * self.POOL < len(mine):
                paths = [self.shards[i] for i in mine[pool * self.POOL:(pool + 1) * self.POOL]]
                pooled = []
                for path in paths:
                    samples, extensions, warning = index_shard(path)
                    pooled += [(path, *s) for s in samples][part::share]
                    seen += extensions
                    if warning and warning not in warnings:
                        warnings.append(warning)
                if place == 0:
                    skipped["incomplete sample"] += seen.pop("incomplete samples", 0) if part == 0 else 0
                shuffled = np.random.default_rng((self.seed, turn, reader, pool)).permutation(len(pooled))
                for i in shuffled[place:]:
                    place += 1
                    path, at, size, text_at, text_size, is_json = pooled[i]
                    try:
                        with open(path, "rb") as file:
                            picture, raw = (file.seek(a) and file.read(n) for a, n in ((at, size), (text_at, text_size)))
                        caption = clean_caption(str(json.loads(raw).get("caption") or "").encode("utf-8", "replace")) if is_json else clean_caption(raw)
                    except (OSError, ValueError, AttributeError) as error:
                        skipped["shard unreadable" if isinstance(error, OSError) else "caption broken"] += 1
                        continue
                    if not caption:
                        skipped["no caption"] += 1
                        continue
                    taken += 1
                    yield picture, caption, (turn, pool, place)
                pool, place = pool + 1, 0
            empty = 0 if taken else empty + 1
            if empty > 2 * len(self.shards) + readers:
                raise ValueError(f"no sample in {empty} passes over {self.shards[mine[0]]}{' and others' if len(mine) > 1 else ''}: extensions seen "
                                 f"{dict(seen)}, wanted {'/'.join(PICTURES)} with .txt or .json (key `caption`); {'; '.join(warnings)}")
            turn, pool, place = turn + 1, 0, 0


# ---------------------------------------------------------------------------------------------------------------------------------
# batches

class Maker:
    """What both kinds of data set below share: pictures and captions to one batch."""

    def __init__(self, source, seed, image_size, crop_scale, tokenizer, context_length):
        self.source, self.seed = source, seed
        self.image_size, self.crop_scale, self.tokenizer, self.context_length = image_size, crop_scale, tokenizer, context_length

    def batch(self, images, captions, **more):
        tokens = tokenize(captions, self.tokenizer, self.context_length)
        lengths = (tokens == find_tokenizer(self.tokenizer)[1] - 1).int().argmax(1) + 1   # the first end token; there is one in each row
        tokens = tokens[:, :lengths.max()]
        index = (torch.arange(tokens.shape[1]) < lengths[:, None]).flatten().nonzero().squeeze(1)
        return dict(images=torch.stack(images), tokens=tokens, index=index, **more)


class AddressedBatches(Maker, Dataset):
    """Item: a list of sample numbers (which DataLoader passes whole to __getitems__) -> batch."""

    def __getitems__(self, numbers):
        skipped = Counter()
        try:
            pairs = [self.source.sample(n, self.seed, self.image_size, self.crop_scale, skipped) for n in numbers]
        except ValueError as error:
            return dict(error=str(error))
        return self.batch(*zip(*pairs), skipped=dict(skipped), warnings=[], cursor=None)


class StreamedBatches(Maker, IterableDataset):
    """Batches of one process from tar shards. `cursors`: where each worker of this process stands, the one whose turn it is first."""

    def __init__(self, *args, batch_size, process, processes, workers, cursors):
        super().__init__(*args)
        self.batch_size, self.process, self.processes, self.workers, self.cursors = batch_size, process, processes, workers, cursors

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, cursor = self.cursors[info.id if info else 0]
        skipped, warnings, images, captions, dropped, taken = Counter(), [], [], [], Counter(), 0
        stream = self.source.samples(self.process * self.workers + worker, self.processes * self.workers, cursor, skipped, warnings)
        try:
            for picture, caption, cursor in stream:
                try:   # decoding is part of the test whether a sample can be used; the crop depends on where the sample stands
                    rng = random.Random(f"{self.seed} {self.process} {worker} {cursor}")
                    images.append(load_training_crop(picture, self.image_size, self.crop_scale, rng))
                except Exception as error:   # Pillow's decoders raise nearly anything on damaged files
                    skipped[skip_reason(error)] += 1
                    refuse_if_too_many_are_bad(dropped + skipped, taken)
                    continue
                captions.append(caption)
                if len(images) == self.batch_size:
                    yield self.batch(images, captions, skipped=dict(skipped), warnings=list(warnings), cursor=(worker, cursor))
                    dropped, taken = dropped + skipped, taken + len(images)
                    for part in skipped, warnings, images, captions:
                        part.clear()
        except ValueError as error:
            yield dict(error=str(error))


def refuse_if_too_many_are_bad(skipped, taken):
    bad = sum(skipped.values())
    if bad + taken >= 1000 and bad > 0.1 * (bad + taken):
        raise ValueError(f"{bad} of {bad + taken} samples cannot be used: {dict(skipped)}")


def leave_signals_to_the_trainer(worker):
    """A signal goes to all processes of a group; the one that trains finishes its step and ends the loading ones. Should it not, they
    end by themselves when torchrun's patience (30 s) is over: SIGTERM is also how Python ends what it waits for when it exits."""
    def end_later(number, frame):
        timer = threading.Timer(30, os._exit, (0,))
        timer.daemon = True
        timer.start()
    signal.signal(signal.SIGTERM, end_later)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class Steps:
    """The sample numbers of this process's share of every global batch from step `first` on."""

    def __init__(self, first, batch_size, process, processes):
        self.first, self.batch_size, self.process, self.processes = first, batch_size, process, processes

    def __iter__(self):
        share = self.batch_size // self.processes
        for step in itertools.count(self.first):
            start = step * self.batch_size + self.process * share
            yield range(start, start + share)


def as_it_is(batch):
    return batch


class Batches:
    """The endless training stream of one process.

    Iterating gives dicts: images uint8 (N, 3, H, W), tokens int64 (N, T) cut to the longest caption, index int64 (R,) flat positions of
    the real tokens. `state` says where the stream stands after the last batch taken: those of all processes, passed in as `states` with the
    number of steps done, let it go on from there. `skipped` counts dropped samples by reason, with those of the run before. Raises
    ValueError when more than a tenth of a thousand samples had to be dropped.
    """

    def __init__(self, source, batch_size, image_size, tokenizer, context_length, crop_scale=0.9, seed=0, process=0, processes=1,
                 workers=0, step=0, states=None, skipped=None, pin_memory=False):
        counts = [Counter(c) for c in skipped or ()]   # of the processes before; how many they were does not matter
        self.skipped_before = sum(counts, Counter()) if process == 0 else Counter()
        self.dropped, self.taken, self.warned, readers = Counter(), 0, set(), max(1, workers)
        settings = dict(num_workers=workers, pin_memory=pin_memory, prefetch_factor=4 if workers else None, worker_init_fn=leave_signals_to_the_trainer)
        share, recipe = batch_size // processes, (seed, image_size, crop_scale, tokenizer, context_length)
        if is_tar(source):
            turn = 0
            if states and [len(s) for s in states] != [readers] * processes:   # other readers: each sample belongs to somebody else now
                turn, states = 1 + max(c[0] for s in states for _, c in s), None
                print(f"the numbers of processes or workers have changed: going on with pass {turn + 1} over the shards", flush=True)
            self.state = [(w, tuple(c)) for w, c in states[process]] if states else [(w, (turn, 0, 0)) for w in range(readers)]
            data = StreamedBatches(Shards(source, seed), *recipe, batch_size=share, process=process, processes=processes,
                                   workers=readers, cursors=list(self.state))
            self.loader = DataLoader(data, batch_size=None, collate_fn=as_it_is, **settings)
        else:
            self.state = None
            data = AddressedBatches(Shapes() if source == "shapes" else PairList(source), *recipe)
            self.loader = DataLoader(data, batch_sampler=Steps(step, batch_size, process, processes), collate_fn=as_it_is, **settings)

    @property
    def skipped(self):
        return self.skipped_before + self.dropped

    def __iter__(self):
        for batch in self.loader:
            if "error" in batch:
                raise ValueError(batch["error"])
            self.dropped.update(batch.pop("skipped"))
            for warning in set(batch.pop("warnings")) - self.warned:
                self.warned.add(warning)
                print(f"warning: {warning}", flush=True)
            cursor = batch.pop("cursor")
            if cursor:   # workers take turns: the one that has just delivered goes to the end of the queue
                self.state = self.state[1:] + [cursor]
            self.taken += len(batch["images"])
            refuse_if_too_many_are_bad(self.dropped, self.taken)
            yield batch


# ---------------------------------------------------------------------------------------------------------------------------------
# held-out data

def load_item(item, size):
    """A path, bytes, or the number of a held-out shape -> uint8 (3, size, size), the evaluation crop."""
    return held_out_shape(item, size) if isinstance(item, int) else load_image(item, size)


class Pictures(Dataset):
    """Items: paths, bytes, or numbers of held-out shapes -> uint8 (3, size, size), the evaluation crop; a sentence where there is none."""

    def __init__(self, items, size):
        self.items, self.size = items, size

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        item = self.items[i]
        try:
            return load_item(item, self.size)
        except Exception as error:   # Pillow's decoders raise nearly anything on damaged files
            return f"picture {i} ({item if isinstance(item, str) else f'{len(item):,} bytes'}) cannot be read: {error}"


def stack_pictures(items):
    """What came out of `Pictures` -> uint8 (N, 3, size, size) of those that could be read, {place in the batch: sentence} of the others."""
    good = [i for i in items if not isinstance(i, str)]
    return torch.stack(good) if good else (), {n: i for n, i in enumerate(items) if isinstance(i, str)}


def held_out_pairs(source):
    """A data source, read once, in a fixed order -> (pictures for `Pictures`, [caption]), matching one to one."""
    if source == "shapes":
        twos = range(HELD_OUT, 2 * HELD_OUT)
        return list(twos), [describe(held_out_scenes()[i], 4, None) for i in twos]
    if is_tar(source):
        stream = Shards(source, 0).samples(0, 1, (0, 0, 0), Counter(), [])
        pairs = [(picture, caption) for picture, caption, _ in itertools.takewhile(lambda sample: sample[2][0] == 0, stream)]
    else:
        pairs = read_list(source)
    return [p for p, _ in pairs], [c for _, c in pairs]
