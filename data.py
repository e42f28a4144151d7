"""Captions to tokens, images to uint8 tensors, and the sources of both.

A data source is one string:

    shapes                       coloured shapes and their captions, drawn during training
    shards/{00000..01287}.tar    tar shards as img2dataset writes them; a glob; several joined by ::
    pairs.csv, pairs.tsv         columns `filepath` (relative to the list) and `title`
    a folder                     images, each with its captions in a .txt of the same name

Sample i can be read or drawn without the samples before it. The batch of step s therefore depends
only on the data, the flags and s, for any number of processes and loading workers. To resume a run,
it is enough to know the step. A sample that raises any exception is skipped and counted: training
replaces it by another one, evaluation leaves it out.

An *image source* is a path, the bytes of a file, (tar, offset, size), a PIL image, or a function
that draws the image: size -> PIL image. Axes: N samples, T tokens, H, W pixels.
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
import tempfile
from array import array
from collections import namedtuple
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import regex
import tiktoken.load
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, get_worker_info

# ---- captions and images -----------------------------------------------------------------------

def tokenize(texts, tokenizer, context_length=77):
    """One or N strings -> int64 (N, context_length): start, ids, end, zeros. Long texts are cut but
    keep the end token. In every vocabulary of size V, start is V - 2, end is V - 1, and padding is
    0. Unlike CLIP's own tokenizer, this one does not repair mis-encoded text."""
    encode, V = find_tokenizer(tokenizer)
    texts = [texts] if isinstance(texts, str) else texts
    tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, text in zip(tokens, texts):
        text = " ".join(html.unescape(html.unescape(text)).split())  # CLIP's cleaning
        ids = encode(text)[: context_length - 2]
        row[: len(ids) + 2] = torch.tensor([V - 2, *ids, V - 1])
    return tokens

def load_image(image, size):
    """Image source -> uint8 (3, size, size), by open_clip's evaluation crop: resize the shorter
    side to `size` (bicubic), then crop the centre square. Raises what Pillow raises."""
    image = to_rgb(image(size) if callable(image) else open_image(image))
    w, h = image.size
    x, y = max(0, w - 16 * h) // 2, max(0, h - 16 * w) // 2  # ends of a strip beyond 16:1
    image = image.crop((x, y, w - x, h - y))
    w, h = (size * side // min(image.size) for side in image.size)
    left, top = round((w - size) / 2), round((h - size) / 2)
    image = image.resize((w, h), Image.Resampling.BICUBIC)
    return to_tensor(image.crop((left, top, left + size, top + size)))

def random_box(w, h, scale, rng):
    """RandomResizedCrop's box: its area is `scale` to 1 of the image, its aspect ratio 3/4 to 4/3.
    If no such box fits (a very long strip), take the largest centred box with an allowed ratio."""
    for _ in range(10):
        area = w * h * rng.uniform(scale, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        box_w, box_h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_w <= w and 0 < box_h <= h:
            left, top = rng.randint(0, w - box_w), rng.randint(0, h - box_h)
            return left, top, left + box_w, top + box_h
    x, y = max(0, w - round(h * 4 / 3)) // 2, max(0, h - round(w * 4 / 3)) // 2
    return x, y, w - x, h - y

def load_training_crop(image, size, scale, rng):
    """A random box of the image, resized to a square -> uint8 (3, size, size). To save time, JPEGs
    are decoded at 1/2, 1/4 or 1/8 of their size (`draft`) if the shorter side of the smallest
    possible box still has `size` pixels."""
    if callable(image):
        return to_tensor(image(size))
    image = open_image(image)
    w, h = image.size
    shrink = min(w, h, math.sqrt(scale * w * h * 3 / 4)) / size  # limited by the smallest box
    image.draft(None, (math.ceil(w / shrink), math.ceil(h / shrink)))
    image = to_rgb(image)
    box = random_box(*image.size, scale, rng)
    return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=1.0))

# ---- the training stream: an endless sequence of samples, in which every position is independent

def shuffled(number, count, seed, block=2**16):
    """Position in the endless stream -> index of one of `count` samples. Every epoch contains each
    sample once. It shuffles blocks of consecutive samples (a shorter block comes last), and the
    samples within each block. So nearby positions come from a few shards."""
    epoch, i = divmod(number, count)
    b, i = divmod(i, block)
    if b < count // block:
        b = int(permutation(count // block, seed, epoch)[b])  # the block at position b
    size = min(block, count - b * block)
    return b * block + int(permutation(size, seed, epoch, b)[i])

@lru_cache(16)
def permutation(count, *seed):
    return np.random.default_rng(seed).permutation(count)

def read_sample(samples, number, seed, size, crop_scale, skipped):
    """The sample at a position of the stream -> image uint8 (3, size, size), caption. Unreadable
    samples are counted in `skipped` and replaced. After 100 of them -> None."""
    rng = random.Random((seed << 48) | number)  # no two seeds share a sequence
    i = samples.at(number, seed)
    for _ in range(100):
        with reading(samples.name(i), skipped):
            image, captions = samples[i]
            caption = rng.choice(clean_captions(captions))
            return load_training_crop(image, size, crop_scale, rng), caption
        i = rng.randrange(len(samples))  # after an exception: try another sample

def read_batch(samples, config, count, crop_scale, seed, start):
    """`count` samples from a position of the stream -> images uint8 (N, 3, H, W), tokens int64
    (N, T), skipped samples. T is the longest caption's length, rounded up to a multiple of 8 so
    that few shapes occur. If a sample cannot be replaced, images and tokens are None."""
    skipped, read = {}, []
    for number in range(start, start + count):
        sample = read_sample(samples, number, seed, config.image_size, crop_scale, skipped)
        if sample is None:
            return None, None, skipped
        read.append(sample)
    images, captions = zip(*read)
    tokens = tokenize(captions, config.tokenizer, config.context_length)
    longest = int(tokens.nonzero()[:, 1].max()) + 1  # after the last end token all is padding
    return torch.stack(images), tokens[:, : 8 * math.ceil(longest / 8)].contiguous(), skipped

def batches(samples, config, batch_size, crop_scale=0.9, seed=0, rank=0, world_size=1, workers=0,
            step=0, pin_memory=False):
    """Endless batches (images, tokens, skipped samples) of this process, beginning at `step`.
    samples: see `open_source`; config: the model's. Raises LoadingError once 100 samples are
    unreadable, one after the other or a tenth of all, or ValueError if it is the first batch."""
    local = batch_size // world_size  # process r takes the r-th slice of each batch
    starts = range(step * batch_size + rank * local, 2**62, batch_size)  # each becomes a batch
    read = partial(read_batch, samples, config, local, crop_scale, seed)
    stream = load(starts, read, batch_size=None, num_workers=workers, pin_memory=pin_memory)
    taken, all_skipped = 0, {}
    for images, tokens, skipped in stream:
        all_skipped = merge_skips([all_skipped, skipped])
        taken, bad = taken + local, sum(count for count, _ in all_skipped.values())
        if images is None or (bad >= 100 and bad > 0.1 * (bad + taken)):
            kind = ValueError if taken == local else LoadingError  # ValueError: wrong data
            raise kind(f"{bad:,} of {bad + taken:,} samples tried are bad: {describe(all_skipped)}")
        yield images, tokens, skipped

# ---- below: vocabularies, decoding, and the files that samples come from -----------------------

@contextmanager
def reading(name, skipped=None):
    """Turn any exception raised while reading `name` into a one-line ValueError with that name or,
    if `skipped` is given, count it there. Pillow raises almost any exception on damaged files."""
    try:
        yield
    except Exception as error:
        kind, reason = type(error).__name__, " ".join(str(error).split())[:400]
        if skipped is None:
            raise ValueError(f"{name}: {kind}: {reason}") from None
        add_skip(skipped, kind, name)

def say(*words):
    """Print. If nobody reads stdout any more, this ends the printing, not the run."""
    text, code = " ".join(map(str, words)), getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(code, "backslashreplace").decode(code), flush=True)
    except (OSError, ValueError):
        with suppress(Exception):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

def print0(*words):
    """Print on process 0."""
    if os.environ.get("RANK", "0") == "0":
        say(*words)

def add_skip(skipped, kind, name, count=1):
    """Count one more in skipped: {kind: [number of skipped samples or files, the first's name]}."""
    skipped.setdefault(kind, [0, str(name)])[0] += count

def merge_skips(several):
    total = {}
    for skipped in several:
        for kind, (count, name) in skipped.items():
            add_skip(total, kind, name, count)
    return total

def describe(skipped):
    return ", ".join(f"{n:,} {kind} ({name})" for kind, (n, name) in skipped.items()) or "none"

CLIP_VOCABULARY = ("https://raw.githubusercontent.com/openai/CLIP/"
                   "d05afc436d78f1c48dc0dbf8e5980a9d471f35f6/clip/bpe_simple_vocab_16e6.txt.gz")
CLIP_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
CLIP_WORDS = regex.compile(r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")

def clip_tokenizer():
    """CLIP's byte-pair encoding by tiktoken -> (function: text to ids, V). CLIP's vocabulary
    marks the last letter of every word: c a t</w>. tiktoken's tokens are byte strings, so we use an
    extra byte as the mark, a newline after the word: "cat\\n". The first merges join every byte
    with the newline, which gives CLIP's marked letters. All others are CLIP's own 48,894."""
    file = hashlib.sha1(CLIP_VOCABULARY.encode()).hexdigest()
    with reading(f"put {CLIP_VOCABULARY} into TIKTOKEN_CACHE_DIR as {file}"):
        raw = tiktoken.load.read_file_cached(CLIP_VOCABULARY, CLIP_SHA256)
    # CLIP writes printable bytes as themselves and the others as chr(256), chr(257), ...
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {256 + i: b for i, b in enumerate(others)}
    tokens = [bytes([b]) for b in printable + others]
    tokens += [token + b"\n" for token in tokens]
    for merge in gzip.decompress(raw).decode().split("\n")[1:48_895]:  # line 0 is a version
        token = merge.replace("</w>", "\n").replace(" ", "").translate(byte_of)
        tokens.append(token.encode("latin-1"))
    ranks = {token: i for i, token in enumerate(tokens)}
    bpe = tiktoken.Encoding("clip", pat_str=r"[^\n]+\n", mergeable_ranks=ranks, special_tokens={})

    def encode(text):
        words = CLIP_WORDS.findall(text.lower())
        return bpe.encode_ordinary("".join(word + "\n" for word in words))

    return encode, bpe.n_vocab + 2

@lru_cache
def find_tokenizer(name):
    """bytes, clip, or a name known to tiktoken -> (function: text to ids, V). Raises ValueError."""
    if name == "bytes":
        return lambda text: list(text.encode("utf-8", errors="replace")), 256 + 2
    where = f"vocabulary {name} (TIKTOKEN_CACHE_DIR={os.environ.get('TIKTOKEN_CACHE_DIR', '')})"
    print0(f"loading or fetching the {where}")
    with reading(where):
        if name == "clip":
            return clip_tokenizer()
        encoding = tiktoken.get_encoding(name)
    return encoding.encode_ordinary, encoding.n_vocab + 2

def vocab_size(tokenizer):
    return find_tokenizer(tokenizer)[1]

Image.MAX_IMAGE_PIXELS = 100_000_000  # above twice this, Pillow suspects a decompression bomb
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # not EPS, which starts another program
IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

def read_bytes(place):
    """A path, bytes, or (tar, offset, size) -> bytes."""
    if not isinstance(place, tuple):
        return place if isinstance(place, bytes) else Path(place).read_bytes()
    path, offset, size = place
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)

def open_image(image):
    """Image source -> PIL image, not decoded yet."""
    if isinstance(image, Image.Image):
        return image.copy()
    return Image.open(io.BytesIO(read_bytes(image)), formats=FORMATS)

def to_rgb(image):
    """PIL image -> RGB, upright, over white. We rescale 16-bit grey, which Pillow would clip."""
    image.load()
    with suppress(Exception):  # ignore EXIF data that cannot be parsed
        image.getexif()  # Pillow keeps what it could parse
    for name in ("exif", "Raw profile type exif"):  # exif_transpose would rewrite them and can fail
        image.info.pop(name, None)
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("an image of floating-point numbers has no known range")
    if image.mode.startswith("I"):
        grey = np.asarray(image, dtype=np.float64)
        top = 65535 if grey.max() > 255 else 255  # 255: 8-bit values in a wider type
        image = Image.fromarray((grey.clip(0, top) * (255 / top)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # uint8 (3, H, W)

class NoCaption(ValueError):
    pass

def clean_captions(captions):
    """A caption or a list of captions -> list of those not empty. Raises NoCaption if all are."""
    captions = captions if isinstance(captions, list) else [captions]
    captions = [caption.replace("\0", " ").strip()[:10_000] for caption in captions]
    if not any(captions):
        raise NoCaption("there is no text")
    return [caption for caption in captions if caption]

def read_captions(place, in_json=False):
    """A .txt (one caption per line) or a .json, see `read_bytes` -> captions. Raises UnicodeError
    for other encodings than UTF-8, and what json raises."""
    text = read_bytes(place).decode("utf-8-sig")
    # Nearly half of the bytes of UTF-16 are below 16, in most alphabets. In text, far fewer are.
    if len(re.findall(r"[\0-\t\v\f\x0e\x0f]", text)) > 0.4 * len(text):
        raise UnicodeError("this is UTF-16 without a byte order mark")
    if in_json:
        return json.loads(text)["caption"]
    # str.splitlines would also split a caption at characters like "\x85"
    return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]

def read_lines(path):
    with reading(path):
        return clean_captions(read_captions(path))

# ---- sources -----------------------------------------------------------------------------------

# What an evaluation needs: N image sources, M strings, pairs (index of an image, of one of its
# captions), skipped files and samples, and images, labels, names and templates of classes or None.
HeldOut = namedtuple("HeldOut", "images captions pairs skipped classes", defaults=[None])

class Source:
    """A list of samples (path of an image below `folder`, captions), and which files were skipped.
    Subclasses read or draw their samples, whereas this class stores them in one byte string. It has
    no reference counts to update, so the loading workers share its memory."""

    def __init__(self, samples, folder="", skipped=None):
        self.text, self.starts = bytearray(), array("q", [0])
        for sample in samples:  # file names may not be UTF-8
            self.text += json.dumps(sample, ensure_ascii=False).encode("utf-8", "surrogatepass")
            self.starts.append(len(self.text))
        self.count, self.folder, self.skipped = len(self.starts) - 1, folder, skipped or {}

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        """-> image source, captions."""
        image, captions = json.loads(self.text[self.starts[i] : self.starts[i + 1]])
        return os.path.join(self.folder, image), captions

    def name(self, i):
        return self[i][0]  # names the sample in messages

    def at(self, number, seed):
        """Position in the endless training stream -> index of a sample."""
        return shuffled(number, len(self), seed)

    def __str__(self):
        return f"{len(self):,} samples"

    def held_out(self):
        """-> HeldOut. An image is its content: equal images (same bytes) become one image with all
        their captions, and equal captions become one caption, right for each of its images."""
        images, captions, pairs, skipped = {}, {}, {}, merge_skips([self.skipped])
        for i in range(len(self)):
            with reading(self.name(i), skipped):
                image, texts = self[i]
                texts, content = clean_captions(texts), hashlib.sha256(read_bytes(image)).digest()
                row, _ = images.setdefault(content, (len(images), image))
                for text in texts:
                    column = captions.setdefault(text, len(captions))
                    pairs[row, column] = None  # a set in the order of insertion
        if not pairs:
            raise ValueError(f"no captioned image; skipped: {describe(skipped)}")
        return HeldOut([image for _, image in images.values()], [*captions], [*pairs], skipped)

def open_source(source):
    """-> Source. Raises ValueError, OSError or LoadingError."""
    if source == "shapes":
        from lab.shapes import Shapes
        return Shapes()
    if "://" in source or source.startswith("pipe:"):
        raise ValueError(f"{source} is not on this machine; download or mount it first")
    if os.path.isdir(source):
        samples = read_folder(source)
    elif source.lower().endswith((".csv", ".tsv")):
        samples = Source(csv_rows(source), os.path.dirname(source))
        if not any(os.path.isfile(samples.name(i)) for i in range(min(100, len(samples)))):
            samples.folder = ""  # names are relative to the current folder
    else:
        samples = Shards(expand_shards(source))
    if len(samples) == 0:
        raise ValueError(f"no captioned image in {source}; skipped: {describe(samples.skipped)}")
    return samples

def list_files(folder):
    """-> sorted names of all visible files below the folder, relative to it."""
    names, visited = [], set()
    for path, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(path) in visited:  # links may form a loop
            folders[:], files = [], []
        visited.add(os.path.realpath(path))
        names += [os.path.relpath(os.path.join(path, name), folder) for name in files]
    return sorted(itertools.filterfalse(is_hidden, names))

def is_hidden(name):
    """Whether any part of the name is hidden, or is a folder that macOS adds to archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in Path(name).parts)

def pair_up(names, skipped):
    """Yields (image, text, whether that is a .json) of file names that differ only in the
    extension. The text is a .txt or, if there is none, a .json. Others are skipped."""
    samples = {}
    for name in names:
        key, extension = os.path.splitext(name)
        kind = "image" if extension.lower() in IMAGES else f"{extension.lower() or 'other'} file"
        samples.setdefault(key, {}).setdefault(kind, name)
    for key, files in samples.items():
        text = files.get(".txt file") or files.get(".json file")
        stem, suffix = os.path.splitext(key)
        if "image" in files and text:
            yield files["image"], text, ".txt file" not in files
        elif not (suffix and stem in samples):  # 1.seg.png belongs to 1.jpg and is not counted
            for kind, name in files.items():
                add_skip(skipped, "image without caption" if kind == "image" else kind, name)

def read_folder(folder):
    """-> Source. Raises ValueError."""
    samples, skipped = [], {}
    for image, text, in_json in pair_up(list_files(folder), skipped):
        with reading(text, skipped):
            samples.append((image, read_captions(os.path.join(folder, text), in_json)))
    if ".tar file" in skipped:
        raise ValueError(f"{folder} contains tar shards; use '{os.path.join(folder, '*.tar')}'")
    return Source(samples, folder, skipped)

# A field in quotation marks with a later line that names an image has swallowed other rows.
SWALLOWED = re.compile(r"[\r\n].*\.(jpe?g|png|webp|gif|bmp|tiff?)\b", re.IGNORECASE)

def csv_rows(path):
    """Yields (filepath, title). In a file with tabs, quotation marks have no special meaning."""
    tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    commas = {"strict": True, "skipinitialspace": True}
    with reading(path), open(path, newline="", encoding="utf-8-sig") as file:
        header = file.readline()
        file.seek(0)
        table = csv.DictReader(file, **(tabs if "\t" in header else commas))
        try:
            if not {"filepath", "title"} <= set(table.fieldnames or ()):
                raise ValueError(f"columns {table.fieldnames}; filepath and title are needed")
            for row in table:
                if None in row or any(SWALLOWED.search(field or "") for field in row.values()):
                    raise ValueError("more fields than columns, or an unclosed quotation mark")
                yield (row["filepath"] or "").strip(), row["title"] or ""
        except Exception as error:
            raise ValueError(f"line {table.reader.line_num}: {error}") from None

# ---- tar shards --------------------------------------------------------------------------------

def expand_shards(source):
    """'a/{000..127}.tar', a glob, or several joined by :: -> existing files. Raises ValueError."""
    if os.path.isfile(source):  # even if its name looks like a pattern
        return [source]
    numbers = re.search(r"\{(\d+)\.\.(\d+)\}", source)
    if "::" in source:
        parts = source.split("::")
    elif numbers:
        first, last = numbers.groups()
        names = (str(i).zfill(len(first)) for i in range(int(first), int(last) + 1))
        parts = [source.replace(numbers[0], name, 1) for name in names]
    else:
        parts = sorted(glob.glob(source))
    if parts in ([], [source]):  # the pattern matches nothing, or is none
        raise ValueError(f"there is no file or folder {os.path.abspath(source)}")
    return list(itertools.chain.from_iterable(map(expand_shards, parts)))

def scan_shard(path):
    """Headers of a tar -> {name: (offset, size)}, skipped members. Python's tarfile treats most
    damage as the end of the archive. But an intact archive ends with zeros, so anything else after
    the last member is damage."""
    members, skipped, end, total = {}, {}, 0, os.path.getsize(path)
    with open(path, "rb") as file:
        with suppress(Exception):  # tarfile raises almost any exception on damaged files
            tar = tarfile.open(fileobj=file, mode="r:")
            for member in tar:
                name, stop = os.path.normpath(member.name), member.offset_data + member.size
                if member.issparse() or member.issym() or member.islnk():
                    add_skip(skipped, "link or sparse file", name)
                elif member.isfile() and stop <= total:
                    members.setdefault(name, (member.offset_data, member.size))
                end = min(total, tar.offset)  # where the next header begins
        file.seek(end)
        rest = file.read(2**20)
    if len(rest) < 512 or any(rest):
        kind = "damaged shard" if end else "file that is no tar"  # such as a parquet file
        add_skip(skipped, kind, f"{rest.lstrip(bytes(1))[:12]!r} after byte {end:,}")
    return members, skipped

def index_shard(path):
    """-> rows int64 (samples, 5), skipped members. A row contains the offset and size of the image,
    the offset and size of the caption, and whether the caption is in a .json. A cache folder keeps
    the index until the shard's size or ctime (which nobody can set) changes."""
    stat, home = os.stat(path), os.environ.get("HOME") or tempfile.gettempdir()
    cache = os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache"
    shard = f"{os.path.abspath(path)}.{stat.st_size}.{stat.st_ctime_ns}"
    file = Path(f"{cache}/nanoeuclip/shards{shard}.index.pt")
    with suppress(Exception):  # the cached file may be missing or damaged
        return torch.load(file, weights_only=True)
    members, skipped = scan_shard(path)
    pairs = pair_up(itertools.filterfalse(is_hidden, members), skipped)
    rows = [(*members[image], *members[text], in_json) for image, text, in_json in pairs]
    skipped = {kind: [count, f"{path}: {name}"] for kind, (count, name) in skipped.items()}
    index = torch.tensor(rows, dtype=torch.int64).view(-1, 5), skipped
    with suppress(OSError, RuntimeError):  # without a cache folder, every process scans the shard
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = f"{file}.{os.getpid()}.tmp"
        torch.save(index, temporary)
        os.replace(temporary, file)  # atomic, because several processes may write it
    return index

load_index = lru_cache(64)(index_shard)  # a process keeps 64 indices in memory

def summarize_shard(path):
    rows, skipped = index_shard(path)
    return len(rows), skipped

class Shards(Source):
    """The samples of tar shards, one shard after the other. Raises LoadingError or OSError."""

    def __init__(self, paths):
        load_index.cache_clear()
        print0(f"reading the index of {len(paths):,} shards")
        workers = min(len(paths), cores(16))
        counts, skips = zip(*load(paths, summarize_shard, batch_size=None, num_workers=workers))
        self.paths, self.count, self.skipped = paths, sum(counts), merge_skips(skips)
        self.starts = np.cumsum([0, *counts])

    def locate(self, i):
        shard = np.searchsorted(self.starts, i, side="right") - 1
        return self.paths[shard], int(i - self.starts[shard])

    def name(self, i):
        path, row = self.locate(i)
        return f"{path}, sample {row}"

    def __getitem__(self, i):
        path, row = self.locate(i)
        offset, size, text_offset, text_size, in_json = load_index(path)[0][row].tolist()
        return (path, offset, size), read_captions((path, text_offset, text_size), in_json)

# ---- loading workers ---------------------------------------------------------------------------

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
                signal.SIGHUP)

def cores(most=32, processes=1):
    """Cores for each process on this machine, at most `most`."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(most, here // processes))

class LoadingError(RuntimeError):
    """The data loader has failed."""

def prepare_worker(worker):
    """Signals may reach all processes, but only the training decides when to stop, so workers
    ignore them. SIGTERM must end workers, so they drop the training's handler for it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

def share(collate, samples):
    """In a worker, tensors move to shared memory. If /dev/shm is full, this raises here, where the
    worker's queue would hang."""
    batch = collate(samples)
    if get_worker_info():
        for tensor in filter(torch.is_tensor, batch):
            tensor.share_memory_()
    return batch

def load(dataset, collate, **settings):
    """Yields collate(samples) of each batch, or of each sample if batch_size is None. Raises
    LoadingError if a worker fails."""
    settings |= {"worker_init_fn": prepare_worker, "collate_fn": partial(share, collate)}
    loader = DataLoader(dataset, **settings)
    try:
        iterator = iter(loader)
        if loader.num_workers:
            # When a worker dies, torch's handler would raise in the middle of a step. Without it,
            # the next batch raises. (Outside the main thread, torch installs none.)
            with suppress(ValueError):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from iterator
    except (RuntimeError, MemoryError, OSError, EOFError) as error:  # the last two: broken pipes
        reason = [type(error).__name__, *str(error).strip().splitlines()][-1]
        raise LoadingError(f"loading data failed ({reason}). If memory or /dev/shm is full, use "
                           "fewer --workers or 0; in Docker: --ipc=host") from None
