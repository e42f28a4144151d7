"""data.py: tokens, images, the training stream, sources of every kind."""

import gzip
import hashlib
import html
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from common import ROOT, SMALL, data, encoded, photo, shapes, write_shard, write_tar
from PIL import EpsImagePlugin, Image, UnidentifiedImageError

from data import load_image, load_training_crop, tokenize

JPEG = encoded(photo(48, 40), "JPEG")


def write_files(folder, files):
    """{name: bytes or text} -> the folder that holds them, as a string."""
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder)


def jpeg(i):
    """An image for every number, all different."""
    return encoded(photo(48, 40, seed=i), "JPEG")


def counts(skipped):
    """{kind: [count, first name]} -> {kind: count}."""
    return {kind: count for kind, (count, _) in skipped.items()}


def pairs_of(source):
    """-> sorted captions of a source, what was skipped."""
    held_out = data.open_source(str(source)).held_out()
    return sorted(held_out.captions), counts(held_out.skipped)


# tokens


def test_bytes_by_hand():
    assert tokenize("hi", "bytes", 6).tolist() == [[256, 104, 105, 257, 0, 0]]
    empty, long = tokenize(["", "abcdefgh"], "bytes", 5).tolist()
    assert empty == [256, 257, 0, 0, 0] and long == [256, 97, 98, 99, 257]
    escaped, clean = tokenize([" a &amp;amp;\n\t b", "a & b"], "bytes", 16)
    assert torch.equal(escaped, clean)


def test_the_end_token_survives_truncation_and_is_the_only_one():
    for text in ("<|endoftext|>" * 3, "x" * 100_000, "\ufeffa\0b", "é", "\udcff", "  \n\t "):
        tokens = tokenize(text, "bytes", 16)
        assert (tokens == 257).sum() == 1 and tokens.max() == 257


def test_unknown_tokenizers_are_refused():
    with pytest.raises(ValueError, match="vocabulary no such.*Unknown encoding"):
        tokenize("x", "no such", 5)


@pytest.fixture
def fresh_vocabularies():
    """Vocabularies are not shared between tests."""
    data.find_tokenizer.cache_clear()
    yield
    data.find_tokenizer.cache_clear()


def test_a_missing_vocabulary_is_requested_with_one_connection(
    tmp_path, monkeypatch, fresh_vocabularies
):
    wanted = []

    def connect(self, address):
        wanted.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    name = hashlib.sha1(data.CLIP_VOCABULARY.encode()).hexdigest()
    with pytest.raises(ValueError, match=f"(?s){tmp_path}.*bpe_simple_vocab_16e6.*{name}"):
        data.vocab_size("clip")
    with pytest.raises(ValueError, match=f"(?s)gpt2.*{tmp_path}"):
        data.vocab_size("gpt2")
    assert wanted == [("127.0.0.1", 9)] * 2


@pytest.fixture
def toy_merges(monkeypatch, fresh_vocabularies):
    """A vocabulary in CLIP's layout with a few merges of our own. The others never apply."""
    merges = ["t h", "th e</w>", "c a", "ca t</w>", "r e", "re d</w>", "a t</w>", "1 2</w>",
              "Ã ©</w>"]
    letters = [chr(33 + i) for i in range(94)]
    pairs = itertools.islice(itertools.product(letters, repeat=3), 48_894 - len(merges))
    filler = ["".join(triple) + "\u0100 x" for triple in pairs]  # \u0100 stands for byte 0
    content = gzip.compress("\n".join(["#version", *merges, *filler]).encode())

    def read(url, sha256):
        return content

    monkeypatch.setattr(tiktoken.load, "read_file_cached", read)
    return merges


def plain_bpe(merges):
    """CLIP's byte-pair encoding, written out: split the text into words, map bytes to characters,
    mark the last one, then apply the lowest merge first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    char = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokens = [char[b] for b in printable + others]
    tokens += [c + "</w>" for c in tokens]
    tokens += [merge.replace(" ", "") for merge in merges]
    id_of = {token: i for i, token in enumerate(tokens)}
    rank = {tuple(merge.split()): i for i, merge in enumerate(merges)}

    def rank_of(pair):
        return rank.get(pair, math.inf)

    def merge_word(parts):
        while len(parts) > 1:
            lowest = min(zip(parts, parts[1:]), key=rank_of)
            if lowest not in rank:
                break
            merged, i = [], 0
            while i < len(parts):
                together = tuple(parts[i : i + 2]) == lowest
                merged.append("".join(lowest) if together else parts[i])
                i += 1 + together
            parts = merged
        return parts

    def encode(text):
        ids = []
        for word in data.CLIP_WORDS.findall(text.lower()):
            *parts, last = [char[b] for b in word.encode()]
            ids += [id_of[part] for part in merge_word([*parts, last + "</w>"])]
        return ids

    return encode


def check_against_plain(texts, encode):
    for text, row in zip(texts, tokenize(texts, "clip", 200)):
        expected = [49406, *encode(" ".join(html.unescape(html.unescape(text)).split())), 49407]
        assert row.tolist() == expected + [0] * (200 - len(expected)), text


def test_clips_byte_pairs_by_tiktoken_equal_a_plain_encoder(toy_merges):
    words = ["the", "cat", "red", "12", "it's", "é", "at", "theca", "?!", "ünï", "<|endoftext|>"]
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=i % 8)) for i in range(200)]
    check_against_plain(texts, plain_bpe(toy_merges))
    assert tokenize("\ud800 cat", "clip", 9).max() == 49407  # half a character is no error


CACHED = Path(os.environ.get("TIKTOKEN_CACHE_DIR", "-"),
              hashlib.sha1(data.CLIP_VOCABULARY.encode()).hexdigest())


@pytest.mark.skipif(not CACHED.exists(), reason="TIKTOKEN_CACHE_DIR contains no CLIP vocabulary")
def test_clips_own_vocabulary_against_a_plain_encoder():
    """The texts are random words and, if KARPATHY_JSON is set, its captions."""
    cat = tokenize("a photo of a cat", "clip", 9)[0].tolist()
    assert cat == [49406, 320, 1125, 539, 320, 2368, 49407, 0, 0]
    merges = gzip.decompress(CACHED.read_bytes()).decode().split("\n")[1:48_895]
    rng, letters = random.Random(0), "abcdefghij  'stTE.,!?0123é漢🙂ßñ&<|>"
    texts = ["".join(rng.choices(letters, k=i % 40)) for i in range(500)]
    if "KARPATHY_JSON" in os.environ:
        for image in json.loads(Path(os.environ["KARPATHY_JSON"]).read_text())["images"]:
            texts += [sentence["raw"] for sentence in image["sentences"]]
    check_against_plain(texts, plain_bpe(merges))


# images


def crops(image, size=16):
    """The evaluation crop and a training crop."""
    return load_image(image, size), load_training_crop(image, size, 0.9, random.Random(1))


def test_an_image_source_is_a_path_bytes_a_part_of_a_tar_an_image_or_a_function(tmp_path):
    image = photo(40, 30)
    png = encoded(image)
    path = Path(write_files(tmp_path, {"a.png": png})) / "a.png"
    tar = write_tar(tmp_path / "a.tar", [("a.txt", b"red"), ("a.png", png)])
    with tarfile.open(tar) as members:
        offset = members.getmember("a.png").offset_data

    def draw(size):
        return image.crop((5, 0, 35, 30)).resize((size, size), Image.Resampling.BICUBIC)

    plain, crop = crops(png)
    for source in (path, str(path), (tar, offset, len(png)), image):
        assert torch.equal(load_image(source, 16), plain)
        assert torch.equal(load_training_crop(source, 16, 0.9, random.Random(1)), crop)
    assert torch.equal(load_image(draw, 30), data.to_tensor(image.crop((5, 0, 35, 30))))
    assert torch.equal(*crops(draw))  # drawn in its final size, without a crop
    assert image.mode == "RGB" and image.size == (40, 30)


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/a.jpg"):
        load_image(tmp_path / "a.jpg", 16)


def test_evaluation_crop_is_the_centre_of_the_shorter_side():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    crop = load_image(encoded(image), 50)
    assert crop.shape == (3, 50, 50) and crop.dtype == torch.uint8
    assert (crop[:, :, 3:-3] == torch.tensor([0, 0, 255])[:, None, None]).all()


def camera_photo(w, h):
    """Sharp edges between saturated colours, and noise, unlike the smooth `photo`."""
    rng = np.random.default_rng(0)
    pixels = np.asarray(photo(w, h), dtype=np.float64).copy()
    for _ in range(60):
        x, y = rng.integers(w), rng.integers(h)
        pixels[y : y + h // 5, x : x + w // 9] = rng.choice([0, 128, 255], 3)
    pixels += rng.normal(0, 12, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def torch_resize(image, shape):
    return torch.nn.functional.interpolate(image, shape, mode="bicubic", antialias=True)


@pytest.mark.parametrize("kind", [photo, camera_photo])
@pytest.mark.parametrize("w,h", [(640, 416), (368, 496), (500, 333), (300, 300), (20, 600)])
def test_evaluation_crop_is_torchs_antialiased_bicubic_to_one_level(kind, w, h):
    """Pillow resizes the rows first and clips the result to 0..255 before it resizes the columns.
    Without this clipping, torch differs by more than ten levels at sharp edges."""
    image, size = kind(w, h), 112
    height, width = size * h // min(w, h), size * w // min(w, h)
    rows = torch_resize(data.to_tensor(image)[None].float(), (h, width)).clamp(0, 255)
    plain = torch_resize(rows, (height, width))[0].round().clamp(0, 255)
    top, left = round((height - size) / 2), round((width - size) / 2)
    plain = plain[:, top : top + size, left : left + size]
    assert (load_image(encoded(image), size) - plain).abs().max() <= 1


def test_images_of_six_formats_are_recognized_by_content(tmp_path):
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        write_files(tmp_path, {"a.jpg": encoded(photo(32, 32), kind)})
        assert all(crop.shape == (3, 16, 16) for crop in crops(tmp_path / "a.jpg"))
    for kind in ("PPM", "ICO", "TGA", "PCX", "EPS"):
        with pytest.raises(UnidentifiedImageError):
            load_image(encoded(photo(32, 32), kind), 16)


def test_modes_are_converted_and_not_washed_out():
    def middle(image, kind="PNG", **options):
        return load_image(encoded(image, kind, **options), 8)[:, 4, 4].tolist()

    white, size = [255] * 3, (8, 8)
    assert middle(Image.new("RGBA", size, (255, 0, 0, 0))) == white
    assert middle(Image.new("RGB", size, (9, 0, 0)), transparency=(9, 0, 0)) == white
    assert middle(Image.new("L", size, 7), transparency=7) == white
    lime = Image.new("RGB", size, "lime").convert("P")
    assert middle(lime, transparency=lime.getpixel((0, 0))) == white
    assert middle(lime) == [0, 255, 0]
    assert middle(Image.new("1", size, 1)) == white
    assert middle(Image.new("LA", size, (0, 255))) == [0] * 3
    assert middle(Image.new("CMYK", size, (255, 0, 0, 0)), "JPEG")[0] < 40
    for dtype in (np.uint16, np.int32):  # 16 bits of grey
        grey = Image.fromarray(np.full(size, 128 * 256, dtype))
        assert 126 <= middle(grey, "TIFF")[0] <= 129
    frames = [Image.new("RGB", size, colour) for colour in ("red", "blue")]
    assert middle(frames[0], "GIF", save_all=True, append_images=frames[1:]) == [255, 0, 0]


def test_extreme_sizes_do_not_crash():
    for size in ((1, 1), (1, 5000), (5000, 1)):
        for kind in ("PNG", "JPEG"):
            assert all(crop.shape == (3, 16, 16) for crop in crops(encoded(photo(*size), kind)))


def test_a_strip_is_not_blown_up_to_a_huge_image(monkeypatch):
    resize, sizes = Image.Image.resize, []

    def record(image, size, *args):
        sizes.append(size)
        return resize(image, size, *args)

    monkeypatch.setattr(Image.Image, "resize", record)
    load_image(encoded(Image.new("RGB", (5000, 1))), 16)
    assert sizes and max(map(max, sizes)) < 1000


def test_random_boxes_keep_area_ratio_and_place():
    rng, areas, lefts = random.Random(0), [], []
    for _ in range(4000):
        left, top, right, bottom = data.random_box(640, 480, 0.5, rng)
        w, h = right - left, bottom - top
        assert 0 <= left < right <= 640 and 0 <= top < bottom <= 480 and 0.74 < w / h < 1.34
        areas.append(w * h / (640 * 480))
        lefts.append(left / max(1, 640 - w))
    assert 0.495 < min(areas) and max(areas) <= 1 and abs(np.mean(lefts) - 0.5) < 0.02
    assert data.random_box(1000, 12, 0.9, rng) == (492, 0, 508, 12)  # none fits: the largest


def test_the_fast_crop_looks_like_the_plain_one(monkeypatch):
    """JPEGs are decoded at full, half, and quarter size. The mean absolute difference to decode,
    crop, resize is less than 2 %."""
    decoded, to_rgb = [], data.to_rgb

    def record(image):
        decoded.append(image.size)
        return to_rgb(image)

    monkeypatch.setattr(data, "to_rgb", record)
    for size, shrunk in ((300, 1), (224, 2), (64, 4)):
        jpeg = encoded(photo(640, 480), "JPEG", quality=90)
        fast = load_training_crop(jpeg, size, 0.9, random.Random(1)).float()
        assert decoded.pop() == (640 // shrunk, 480 // shrunk)
        box = data.random_box(640 // shrunk, 480 // shrunk, 0.9, random.Random(1))
        box = [shrunk * side for side in box]
        plain = Image.open(io.BytesIO(jpeg)).crop(box).resize((size, size), Image.BICUBIC)
        assert (fast - data.to_tensor(plain)).abs().mean() < 0.02 * 255


TURN = Image.Transpose
STORED = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE,
          6: TURN.ROTATE_90, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_270}


@pytest.mark.parametrize("orientation", [*STORED, 0, 9])  # the last two mean nothing
def test_a_rotated_photo_is_upright_in_both_crops(orientation):
    exif, upright = Image.Exif(), photo(400, 300)
    exif[0x0112] = orientation
    stored = upright.transpose(STORED[orientation]) if orientation in STORED else upright
    stored = encoded(stored, "JPEG", quality=95, exif=exif)
    for turned, plain in zip(crops(stored, 64), crops(encoded(upright, "JPEG", quality=95), 64)):
        assert (turned.float() - plain).abs().mean() < 0.02 * 255


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_data_that_cannot_be_parsed_are_ignored(format):
    for crop in crops(encoded(photo(60, 40), format, exif=b"Exif\0\0garbage!", dpi=(72, 72))):
        assert crop.shape == (3, 16, 16)


def test_a_rotated_photo_with_an_invalid_tag_is_read():
    """Orientation 6, and the name of the software as a fraction, which Pillow cannot write."""
    tags = b"\2\0\x12\1\3\0\1\0\0\0\6\0\0\0\x31\1\5\0\1\0\0\0\x26\0\0\0"
    exif = b"Exif\0\0II*\0\10\0\0\0" + tags + b"\0\0\0\0\1\0\0\0\1\0\0\0"
    for crop in crops(encoded(photo(60, 40), "JPEG", exif=exif), 16):
        assert crop.shape == (3, 16, 16)


EPS = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


def test_postscript_called_jpg_starts_no_program(tmp_path, monkeypatch):
    mark, image = tmp_path / "mark", tmp_path / "a.jpg"
    write_files(tmp_path, {"bin/gs": f"#!/bin/sh\ntouch {mark}\n", "a.jpg": EPS})
    (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(UnidentifiedImageError):
        load_image(image, 16)
    with pytest.raises(UnidentifiedImageError):
        load_training_crop(image, 16, 0.9, random.Random(0))
    assert not mark.exists()
    with pytest.raises(OSError):
        Image.open(image).load()
    assert mark.exists()  # Pillow's own default starts it


# the training stream


@pytest.mark.parametrize("count", [1, 7, 20, 23])
def test_every_epoch_has_every_sample_once_block_after_block(count):
    for epoch in range(3):
        numbers = range(epoch * count, (epoch + 1) * count)
        order = [data.shuffled(number, count, 0, block=5) for number in numbers]
        assert sorted(order) == list(range(count))
        for start in range(0, count, 5):
            assert len({i // 5 for i in order[start : start + 5]}) == 1


def blocks_of(epoch, seed):
    """-> [(block, its samples)] in the order of an epoch."""
    order = [data.shuffled(200 * epoch + i, 200, seed, block=8) for i in range(200)]
    return [(order[i] // 8, order[i : i + 8]) for i in range(0, 200, 8)]


def test_seed_and_epoch_decide_the_order_of_blocks_and_of_the_samples_in_them():
    first = blocks_of(0, 0)
    for others in (blocks_of(1, 0), blocks_of(0, 1)):
        assert [b for b, _ in first] != [b for b, _ in others]
        assert sum(block in others for block in first) < 3
    assert blocks_of(0, 0) == first  # no state is kept between calls


def first_batches(count, source=None, batch_size=8, skipped=None, **settings):
    """The source is the toy world unless another one is given. `skipped` counts skipped samples."""
    source, out = source or shapes.Shapes(), []
    stream = data.batches(source, SMALL, batch_size, **settings)
    for images, tokens, skipped_here in itertools.islice(stream, count):
        out.append((images, tokens))
        if skipped is not None:
            skipped.update(counts(skipped_here))
    return out


def captions_in(batches):
    rows = itertools.chain.from_iterable(tokens.tolist() for _, tokens in batches)
    return [bytes(row[1 : row.index(257)]).decode() for row in rows]


def same(a, b):
    return all(map(torch.equal, a, b))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards of eight samples each, as a Source."""
    folder = tmp_path_factory.mktemp("shards")
    for s in range(3):
        write_shard(folder / f"{s}.tar", [(JPEG, f"shard {s} sample {i}") for i in range(8)])
    return data.open_source(f"{folder}/{{0..2}}.tar")


ALL = sorted(f"shard {i // 8} sample {i % 8}" for i in range(24))


@pytest.mark.parametrize("kind", ["shapes", "shards"])
def test_a_batch_depends_only_on_seed_and_step(kind, shards):
    source = None if kind == "shapes" else shards
    plain = first_batches(4, source)
    assert all(map(same, plain, first_batches(4, source, workers=2)))
    assert all(map(same, plain[2:], first_batches(2, source, step=2)))
    assert not same(plain[0], first_batches(1, source, seed=1)[0])


@pytest.mark.parametrize("processes,workers", [(1, 0), (2, 1), (4, 0)])
def test_processes_take_contiguous_slices_and_no_sample_is_repeated(
    shards, processes, workers
):
    whole, local = first_batches(6, shards), 8 // processes
    seen = [[], []]
    for rank in range(processes):
        parts = first_batches(6, shards, rank=rank, world_size=processes, workers=workers)
        for (images, _), (part, _) in zip(whole, parts):
            assert torch.equal(images[rank * local : (rank + 1) * local], part)
        for epoch in range(2):
            seen[epoch] += captions_in(parts[3 * epoch : 3 * epoch + 3])
    assert sorted(seen[0]) == sorted(seen[1]) == ALL


def test_tokens_are_cut_to_a_few_lengths():
    lengths = set()
    for _, tokens in first_batches(20, batch_size=2):
        longest = (tokens == 257).int().argmax(1).max() + 1
        lengths.add(tokens.shape[1])
        assert tokens.shape[1] - 8 < longest <= tokens.shape[1]
    assert len(lengths) > 1 and lengths <= {8, 16, 24}


def test_a_data_set_can_be_pickled(shards, tmp_path):
    folder = write_files(tmp_path, {"a.jpg": JPEG, "a.txt": "one\ntwo"})
    for source in (shapes.Shapes(), shards, data.open_source(folder)):
        copy = pickle.loads(pickle.dumps(source))
        image, caption = data.read_sample(source, 3, 0, 16, 0.9, {})
        again = data.read_sample(copy, 3, 0, 16, 0.9, {})
        assert torch.equal(again[0], image) and again[1] == caption


# captions


def test_every_line_of_a_text_is_a_caption_that_training_draws(tmp_path):
    folder = write_files(tmp_path, {"a.jpg": JPEG, "a.txt": "\ufeffone\n\n two\r\nthree\n"})
    source = data.open_source(folder)
    drawn, again = [[data.read_sample(source, number, 0, 16, 0.9, {})[1] for number in range(30)]
                    for _ in range(2)]
    assert set(drawn) == {"one", "two", "three"} and drawn == again
    assert pairs_of(folder)[0] == ["one", "three", "two"]


def test_captions_are_cleaned_and_empty_ones_skipped(tmp_path):
    raw = [b"", b" \n ", b"a\tb", b"\xef\xbb\xbfBOM", b"one\0NUL", b"x" * 100_000, b"<|endoftext|>",
           "mis\x85decoded".encode()]
    members = []
    for i, text in enumerate(raw):
        members += [(f"{i}.jpg", jpeg(i)), (f"{i}.txt", text)]
    captions, skipped = pairs_of(write_tar(tmp_path / "a.tar", members))
    assert captions == ["<|endoftext|>", "BOM", "a\tb", "mis\x85decoded", "one NUL", "x" * 10_000]
    assert skipped == {"NoCaption": 2}


NOT_UTF8 = {
    "UTF-16 of PowerShell": "a red circle\r\n".encode("utf-16"),
    "UTF-16-LE": "a red circle".encode("utf-16-le"),
    "UTF-16-BE": "a red circle".encode("utf-16-be"),
    "UTF-16-LE of one letter": "a".encode("utf-16-le"),
    "UTF-16-LE in Russian": "красный круг".encode("utf-16-le"),
    # Every second byte is 9, a tab.
    "UTF-16-LE in Hindi": "लाल वृत्त".encode("utf-16-le"),
    "UTF-16-LE in Chinese": "红色的圆圈".encode("utf-16-le"),
    "UTF-32": "a red circle".encode("utf-32"),
    "UTF-32-BE": "a red circle".encode("utf-32-be"),
    "cp1252": "un café “rouge”".encode("cp1252"),
    "GBK": "红色的圆圈".encode("gbk"),
}


@pytest.mark.parametrize("encoding", NOT_UTF8)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_captions_in_other_encodings_than_utf8_are_skipped_and_counted(tmp_path, kind, encoding):
    files = {"1.jpg": jpeg(1), "1.txt": NOT_UTF8[encoding], "2.jpg": jpeg(2), "2.txt": b"sky"}
    if kind == "folder":
        source = write_files(tmp_path / "a", files)
    else:
        source = write_tar(tmp_path / "a.tar", files.items())
    captions, skipped = pairs_of(source)
    assert captions == ["sky"]
    assert skipped in ({"UnicodeDecodeError": 1}, {"UnicodeError": 1})


JSON = {'{"caption": "red"}': ["red"], '{"caption": ["red", " ", "blue"]}': ["blue", "red"],
        '\ufeff{"caption": "red"}': ["red"], '{"caption": null}': [], '{"caption": 3}': [],
        '{"caption": NaN}': [], '{"caption": {"en": "red"}}': [], '{"caption": ["red", 3]}': [],
        '{"caption": []}': [], '{"title": "red"}': [], '["red"]': [], "<html>": [],
        "[" * 100_000: []}


@pytest.mark.parametrize("text", JSON, ids=range(len(JSON)))
def test_captions_in_json_are_strings_or_lists_of_them(tmp_path, text):
    members = [("1.jpg", jpeg(1)), ("1.json", text.encode()), ("2.jpg", jpeg(2)), ("2.txt", b"sky")]
    captions, skipped = pairs_of(write_tar(tmp_path / "a.tar", members))
    assert captions == sorted([*JSON[text], "sky"])
    assert sum(skipped.values()) == (0 if JSON[text] else 1)


# lists

GOOD_LISTS = {
    "plain.csv": "filepath,title\n0.jpg,red\n1.jpg,blue\n",
    "no_last_newline.csv": "filepath,title\n0.jpg,red\n1.jpg,blue",
    "crlf_bom.csv": "\ufefffilepath,title\r\n0.jpg,red\r\n1.jpg,blue\r\n",
    "cr_only.csv": "filepath,title\r0.jpg,red\r1.jpg,blue\r",
    "spaces.csv": 'filepath, title\n 0.jpg, red\n 1.jpg, "blue"\n',
    "blank_lines.csv": "filepath,title\n0.jpg,red\n\n1.jpg,blue\n\n",
    "quoted.csv": 'filepath,title\n0.jpg,"red"\n"1.jpg","blue"\n',
    "more_columns.csv": "id,title,width,filepath\n7,red,64,0.jpg\n8,blue,64,1.jpg\n",
    "UPPER.CSV": "filepath,title\n0.jpg,red\n1.jpg,blue\n",
    "tabs.csv": "filepath\ttitle\n0.jpg\tred\n1.jpg\tblue\n",
    "tabs.tsv": "title\tfilepath\nred\t0.jpg\nblue\t1.jpg\n",
    "commas.tsv": "filepath,title\n0.jpg,red\n1.jpg,blue\n",
}


@pytest.mark.parametrize("name", GOOD_LISTS)
def test_lists_of_other_programs_are_read(tmp_path, name):
    write_files(tmp_path, {"0.jpg": jpeg(0), "1.jpg": jpeg(1), name: GOOD_LISTS[name]})
    held_out = data.open_source(str(tmp_path / name)).held_out()
    assert held_out.images == [str(tmp_path / f"{i}.jpg") for i in range(2)]
    assert held_out.captions == ["red", "blue"] and not held_out.skipped


def test_captions_in_lists_may_contain_anything(tmp_path):
    rows = ['0.jpg,"red, and blue"', '1.jpg,"red\nand blue"', "2.jpg,a\0b", "3.jpg,nan",
            'dir\\4.jpg,"say ""red"""', "5.jpg,", "6.jpg"]
    names = ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "dir\\4.jpg", "5.jpg", "6.jpg"]
    write_files(tmp_path, {name: jpeg(i) for i, name in enumerate(names)})
    write_files(tmp_path, {"a.csv": "\n".join(["filepath,title", *rows])})
    captions, skipped = pairs_of(tmp_path / "a.csv")
    assert captions == ["a b", "nan", "red\nand blue", "red, and blue", 'say "red"']
    assert skipped == {"NoCaption": 2}


def test_quotation_marks_in_a_tsv_are_letters(tmp_path):
    captions = ['"Gift" is what they call it', '"Sunset, said the painter', '5" nails', "sky"]
    rows = [f"{i}.jpg\t{caption}" for i, caption in enumerate(captions)]
    write_files(tmp_path, {f"{i}.jpg": jpeg(i) for i in range(4)})
    write_files(tmp_path, {"a.tsv": "\n".join(["filepath\ttitle", *rows])})
    assert pairs_of(tmp_path / "a.tsv") == (sorted(captions), {})


BAD_LISTS = {
    "comma.csv": ("filepath,title\n0.jpg,red\n1.jpg,red, and blue\n", "line 3"),
    "semicolon.csv": ("filepath;title\n0.jpg;red\n", "line 1.*filepath"),
    "never_closes.csv": ('filepath,title\n0.jpg,"red\n1.jpg,blue\n', "line 3"),
    "closes_later.csv": ('filepath,title\n0.jpg,"red\n1.jpg,5"\n2.jpg,blue\n', "line 3"),
    "closes_later_cr.csv": ('filepath,title\r0.jpg,"red\r1.jpg,5"\r2.jpg,blue\r', "line"),
    "quote_within.csv": ('filepath,title\n0.jpg,"red" and blue\n', "line 2"),
    "huge_field.csv": ("filepath,title\n0.jpg," + "x" * 140_000, "line 2"),
    "empty.csv": ("", "filepath"),
    "header_only.csv": ("filepath,title\n", ""),
    "latin.csv": ("filepath,title\n0.jpg,café".encode("latin-1"), ""),
    "utf16_without_mark.csv": ("filepath,title\n0.jpg,red".encode("utf-16-le"), ""),
    "utf16.csv": ("filepath,title\n0.jpg,red".encode("utf-16"), ""),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_malformed_lists_are_refused_with_file_and_line(tmp_path, name):
    text, message = BAD_LISTS[name]
    write_files(tmp_path, {name: text})
    with pytest.raises(ValueError, match=f"{tmp_path}/{name}.*{message}"):
        data.open_source(str(tmp_path / name))


def test_names_in_a_list_are_relative_to_its_folder_or_else_to_the_current_one(
    tmp_path, monkeypatch
):
    rows = "filepath,title\nx/0.jpg,red\nx/1.jpg,blue"
    write_files(tmp_path, {"lists/a.csv": rows, "x/0.jpg": jpeg(0), "x/1.jpg": jpeg(1)})
    monkeypatch.chdir(tmp_path)
    held_out = data.open_source("lists/a.csv").held_out()
    assert held_out.images == ["x/0.jpg", "x/1.jpg"] and not held_out.skipped
    # One image decides for the entire list.
    write_files(tmp_path, {"lists/x/1.jpg": jpeg(2)})
    held_out = data.open_source("lists/a.csv").held_out()
    assert held_out.images == ["lists/x/1.jpg"] and held_out.captions == ["blue"]
    assert held_out.skipped == {"FileNotFoundError": [1, "lists/x/0.jpg"]}


def test_a_row_without_a_name_does_not_decide_where_the_images_are(tmp_path, monkeypatch):
    rows = "filepath,title\n,nothing\n0.jpg,red"
    write_files(tmp_path, {"lists/a.csv": rows, "0.jpg": JPEG})
    monkeypatch.chdir(tmp_path)
    captions, skipped = pairs_of("lists/a.csv")
    assert captions == ["red"] and sum(skipped.values()) == 1


def test_a_long_list_needs_little_more_memory_than_its_file(tmp_path):
    rows = []
    for i in range(20_000):
        caption = f"a small cat sleeps on a red sofa in house no {i}"  # 46 to 50 characters
        rows.append(f"images/{i:012d}.jpg,{caption}")
    path = tmp_path / "a.csv"
    write_files(tmp_path, {"a.csv": "\n".join(["filepath,title", *rows])})
    source = data.open_source(str(path))
    assert len(source) == 20_000
    memory = sys.getsizeof(source.text) + sys.getsizeof(source.starts)
    assert memory < 1.3 * path.stat().st_size


def test_text_files_with_a_byte_order_mark_are_read_and_other_encodings_refused(tmp_path):
    write_files(tmp_path, {"a.txt": "\ufeffred \n\nblé", "b.txt": "blé".encode("latin-1")})
    assert data.read_lines(tmp_path / "a.txt") == ["red", "blé"]
    with pytest.raises(ValueError, match=f"{tmp_path}/b.txt"):
        data.read_lines(tmp_path / "b.txt")


# folders


def test_hidden_files_are_ignored_and_other_files_are_counted(tmp_path):
    root = tmp_path / ".mine"  # a hidden folder above does not matter
    write_files(root, {
        "IMG_1.JPG": JPEG, "IMG_1.TXT": "upper", "sub/a.b.png": JPEG, "sub/a.b.txt": "dots",
        "._IMG_1.JPG": b"\0\5", "__MACOSX/._x.jpg": b"\0\5", ".ipynb_checkpoints/y.jpg": JPEG,
        ".ipynb_checkpoints/y.txt": "hidden", "x.heic": "", "y.HEIC": "", "README": "",
        "without.jpg": JPEG,
    })
    captions, skipped = pairs_of(root)
    assert captions == ["dots", "upper"]
    assert skipped == {".heic file": 2, "other file": 1, "image without caption": 1}


def test_other_files_of_a_sample_are_not_counted(tmp_path):
    """v.seg.png belongs to the sample v. A file in the folder v.old does not."""
    names = ["v.jpg", "v.txt", "v.seg.png", "v.cls", "v.old/x.heic", "v2.seg.png"]
    skipped = {}
    assert list(data.pair_up(names, skipped)) == [("v.jpg", "v.txt", False)]
    assert counts(skipped) == {".heic file": 1, "image without caption": 1}


def test_pairs_whose_names_differ_are_refused_with_both_names(tmp_path):
    write_files(tmp_path, {"1.image.jpg": JPEG, "1.caption.txt": "red"})
    with pytest.raises(ValueError, match=r"(?=.*\b1\.image\.jpg)(?=.*\b1\.caption\.txt)"):
        data.open_source(str(tmp_path))


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_all_extensions_of_jpegs_are_read(tmp_path, kind):
    files = {}
    for i, extension in enumerate(["jpg", "jpeg", "jpe", "jfif", "JFIF"]):
        files |= {f"{i}.{extension}": jpeg(i), f"{i}.txt": extension.encode()}
    if kind == "folder":
        source = write_files(tmp_path / "a", files)
    else:
        source = write_tar(tmp_path / "a.tar", files.items())
    assert pairs_of(source) == (["JFIF", "jfif", "jpe", "jpeg", "jpg"], {})


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    write_files(tmp_path, {"far/a.jpg": JPEG, "far/a.txt": "far", "root/b.jpg": JPEG,
                           "root/b.txt": "near"})
    (tmp_path / "root/link").symlink_to(tmp_path / "far")
    (tmp_path / "root/loop").symlink_to(tmp_path / "root")
    assert pairs_of(tmp_path / "root") == (["far", "near"], {})


def test_a_folder_of_shards_is_refused_with_the_pattern(tmp_path):
    write_shard(tmp_path / "0.tar", [(JPEG, "red")])
    with pytest.raises(ValueError, match=rf"{tmp_path}/\*\.tar"):
        data.open_source(str(tmp_path))


def test_a_folder_without_captions_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}.*a.jpg"):
        data.open_source(write_files(tmp_path, {"a.jpg": JPEG}))


def test_names_that_are_not_utf8_are_read(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    folder = write_files(tmp_path / name, {f"{name}.jpg": JPEG, f"{name}.txt": "red"})
    held_out = data.open_source(folder).held_out()
    assert held_out.captions == ["red"] and load_image(held_out.images[0], 16).shape == (3, 16, 16)
    shard = write_shard(tmp_path / name / "a.tar", [(JPEG, "blue")])
    assert pairs_of(shard) == (["blue"], {})


# patterns

def in_bash(pattern):
    echo = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True)
    return echo.stdout.split()


@pytest.mark.parametrize("pattern", ["{000..011}", "{9..11}", "{01..3}", "x{5..5}y",
                                     "{0..1}-{00..02}", "a/{0..1}/{0..1}"])
def test_numeric_ranges_expand_as_in_bash(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    names = in_bash(pattern)
    write_files(tmp_path, dict.fromkeys(names, ""))
    assert data.expand_shards(pattern) == names


@pytest.mark.parametrize("pattern", ["{a,b}", "{0..1,2}", "{a{0..1},b}", "{1..0}"])
def test_other_braces_are_refused(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, dict.fromkeys(in_bash(pattern), ""))
    with pytest.raises(ValueError, match=str(tmp_path)):
        data.open_source(pattern)


def test_names_that_exist_are_no_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a[1].tar", "b*.tar", "c?.tar", "d{1,2}.tar", "e::f.tar"]
    others = ["a1.tar", "bb.tar", "cc.tar", "d1.tar", "d2.tar", "e", "f.tar"]
    write_files(tmp_path, dict.fromkeys(names + others, ""))
    for name in names:
        assert data.expand_shards(name) == [name]
    assert data.expand_shards("d{1,2}.tar::c*::e") == ["d{1,2}.tar", "c?.tar", "cc.tar", "e"]


def test_patterns_without_files_are_refused_with_the_resolved_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, {"0.tar": "", "1.tar": "", "folder.tar/x": ""})
    for pattern, missing in (("no*.tar", r"no\*.tar"), ("{0..2}.tar", "2.tar"), ("no", "no"),
                             ("no/", "no"), ("0.tar::y.tar", "y.tar"), ("*.tar", "folder.tar")):
        with pytest.raises(ValueError, match=f"{tmp_path}/{missing}"):
            data.open_source(pattern)
    for name in ("folder.tar", "a.csv"):
        with pytest.raises(ValueError, match=name):
            data.open_source(name)


@pytest.mark.parametrize("address", ["s3://bucket/{00..12}.tar", "gs://bucket/0.tar",
                                     "https://host/a.csv", "https://host/0.tar",
                                     "pipe:aws s3 cp s3://bucket/0.tar -", "pipe:cat 0.tar"])
def test_remote_addresses_are_refused_as_such(address):
    with pytest.raises(ValueError, match=re.escape(address) + " is not on this machine"):
        data.open_source(address)


# shards

PNG, WEBP = encoded(photo(16, 16)), encoded(photo(16, 16), "WEBP")
LAYOUTS = {
    "extensions and dots": (
        [("v1.0/a.b.JPG", JPEG), ("c.JPEG", JPEG), ("v1.0/a.b.txt", b"dots"), ("d.png", PNG),
         ("c.txt", b"jpeg"), ("./e.webp", WEBP), ("d.TXT", b"png"), ("e.txt", b"webp")],
        ["dots", "jpeg", "png", "webp"], {}),
    "duplicates": (
        [("a.jpg", JPEG), ("a.txt", b"first"), ("a.txt", b"second"), ("a.png", PNG)],
        ["first"], {}),
    "img2dataset": (
        [("1.jpg", JPEG), ("1.txt", b"in txt"), ("1.json", b'{"caption": "not this"}'),
         ("2.jpg", JPEG), ("2.json", b'{"caption": "in json"}')],
        ["in json", "in txt"], {}),
    "incomplete": (
        [("a.jpg", JPEG), ("b.txt", b"red"), ("c.cls", b"3"), ("d.jpg", JPEG), ("d.txt", b"blue")],
        ["blue"], {"image without caption": 1, ".txt file": 1, ".cls file": 1}),
    "more images of a sample": (
        [("1.jpg", JPEG), ("1.seg.png", PNG), ("1.txt", b"red"), ("1.cls", b"3")], ["red"], {}),
    "hidden": (
        [("a.jpg", JPEG), ("a.txt", b"red"), ("._a.jpg", b"\0\5"), ("__MACOSX/._a.jpg", b"\0\5"),
         (".trash/b.jpg", JPEG), (".trash/b.txt", b"blue")],
        ["red"], {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_members_of_a_tar_become_samples(tmp_path, layout):
    members, captions, skipped = LAYOUTS[layout]
    assert pairs_of(write_tar(tmp_path / "a.tar", members)) == (captions, skipped)


def gnu_sparse(name):
    """A member as `tar --sparse` writes it: one block is stored, at the start of 100,000 bytes."""
    info = tarfile.TarInfo(name)
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 512)  # offset and size of the block
    header[483:495] = b"%011o\0" % 100_000
    header[148:156] = b" " * 8  # the checksum counts its own field as spaces
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + JPEG[:512].ljust(512, b"\0")


def test_links_and_sparse_members_are_skipped_and_counted(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", JPEG), ("a.txt", b"red"), ("b.txt", b"blue"),
                                          ("c.txt", b"green"), ("d.txt", b"grey"),
                                          ("e.txt", b"black")])
    with tarfile.open(path, "a") as tar:
        for name, kind in (("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "a.jpg"
            tar.addfile(link)
        sparse = tarfile.TarInfo("d.jpg")  # 100,000 bytes, of which the first 512 are stored
        sparse.size = 512
        sparse.pax_headers = {"GNU.sparse.size": "100000", "GNU.sparse.map": "0,512"}
        tar.addfile(sparse, io.BytesIO(JPEG[:512].ljust(512, b"\0")))
        tar.fileobj.write(gnu_sparse("e.jpg"))
        tar.offset += 1024
        for name, content in (("f.jpg", jpeg(1)), ("f.txt", b"behind them")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    captions, skipped = pairs_of(path)
    assert captions == ["behind them", "red"]
    assert skipped == {"link or sparse file": 4, ".txt file": 4}


def tar_header(kind, size, content=b""):
    info = tarfile.TarInfo("a.jpg")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT) + content.ljust(512, b"\0")


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("0.jpg", JPEG)
    return buffer.getvalue()


def gzipped_tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.jpg"))
    return buffer.getvalue()


OTHER_FILES = {
    "a.html": b"<html>404</html>" * 99,
    "a.tar.gz": gzipped_tar(),
    "a.parquet": b"PAR1" + bytes(999) + b"PAR1",
    "a.zip": zipped(),
    "a.jsonl": b'{"url": "a.jpg", "caption": "red"}\n' * 99,
    "a.jpg": JPEG,
    "a.png": encoded(photo(48, 40)),
    "a.webp": encoded(photo(48, 40), "WEBP"),
    "a.gif": encoded(photo(48, 40), "GIF"),
    "a.bmp": encoded(photo(48, 40), "BMP"),
    "a.tiff": encoded(photo(48, 40), "TIFF"),
    "empty.tar": b"",
    "attribute.tar": tar_header(tarfile.XHDTYPE, 25, b"9" * 20 + b" a=b\n"),
    "random.tar": random.Random(0).randbytes(2000),
}


def check_bad_shard(bad, kind):
    """It is skipped beside a good shard, and refused alone."""
    good = write_shard(bad.parent / "good.tar", [(JPEG, "red")])
    assert pairs_of(f"{bad}::{good}") == (["red"], {kind: 1})
    with pytest.raises(ValueError, match=rf"1 {kind} \({bad}"):
        data.open_source(str(bad))


def test_a_damaged_shard_is_skipped_and_refused_if_all_are(tmp_path):
    (tmp_path / "bad.tar").write_bytes(tar_header(tarfile.REGTYPE, 2**80))
    check_bad_shard(tmp_path / "bad.tar", "damaged shard")


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_that_is_no_tar_is_refused_with_its_first_bytes(tmp_path, name):
    (tmp_path / name).write_bytes(OTHER_FILES[name])
    check_bad_shard(tmp_path / name, "file that is no tar")
    with pytest.raises(ValueError) as error:
        data.open_source(str(tmp_path / name))
    assert f"{name}: {OTHER_FILES[name][:12]!r}" in str(error.value)


def test_a_skipped_member_is_named_with_its_shard(tmp_path):
    good = write_shard(tmp_path / "good.tar", [(JPEG, "red")])
    bad = write_tar(tmp_path / "bad.tar", [("x.jpg", JPEG), ("y.heic", b"")])
    skipped = data.open_source(f"{good}::{bad}").skipped
    assert set(skipped) == {"image without caption", ".heic file"}
    for kind, member in (("image without caption", "x.jpg"), (".heic file", "y.heic")):
        _, name = skipped[kind]
        assert member in name and bad in name


def test_shards_without_samples_are_refused_with_the_extensions(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", JPEG), ("a.cls", b"3"), ("b.cls", b"3")])
    with pytest.raises(ValueError, match=r"a\.tar.*1 image without caption.*2 \.cls"):
        data.open_source(path)


@pytest.mark.parametrize("damage", ["within a member", "between members", "within a header",
                                    "a header of noise"])
def test_samples_before_the_damage_of_a_tar_are_read(tmp_path, damage):
    path = write_shard(tmp_path / "a.tar", [(jpeg(i), f"caption {i}") for i in range(8)])
    with tarfile.open(path) as tar:
        image = tar.getmembers()[8]  # of sample 4
    raw = bytearray(Path(path).read_bytes())
    if damage == "a header of noise":
        raw[image.offset : image.offset + 512] = random.Random(0).randbytes(512)
    else:
        ends = {"within a member": image.offset_data + 100, "between members": image.offset,
                "within a header": image.offset + 200}
        del raw[ends[damage] :]
    Path(path).write_bytes(raw)
    assert pairs_of(path) == ([f"caption {i}" for i in range(4)], {"damaged shard": 1})


# the index of a shard


@pytest.fixture
def shard(tmp_path, monkeypatch):
    """A shard of five samples. The cache folder is tmp_path / "cache"."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return write_shard(tmp_path / "data/a.tar", [(jpeg(i), f"caption {i}") for i in range(5)])


def scan_never(monkeypatch):
    def refuse(path):
        raise AssertionError(f"{path} is scanned")

    monkeypatch.setattr(data, "scan_shard", refuse)


def same_index(a, b):
    return torch.equal(a[0], b[0]) and a[1] == b[1]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_shard_is_scanned_once(shard, monkeypatch, damaged):
    if damaged:
        os.truncate(shard, 5000)
    rows, skipped = data.index_shard(shard)
    scan_never(monkeypatch)
    assert (len(rows) < 5) == damaged == ("damaged shard" in skipped)
    assert same_index(data.index_shard(shard), (rows, skipped))


def test_nothing_is_written_beside_a_shard(shard):
    data.open_source(shard)
    assert os.listdir(os.path.dirname(shard)) == ["a.tar"]


@pytest.mark.parametrize("mtime", [0, 10**18])
@pytest.mark.parametrize("reader", ["another process", "this process"])
def test_a_replaced_shard_of_equal_size_and_time_is_indexed_anew(tmp_path, reader, mtime):
    """The second shard has its images in another order. All images have 4,000 bytes."""
    path, images = tmp_path / "a.tar", [jpeg(i).ljust(4000, b"\0") for i in range(2)]
    for order in ((0, 1), (1, 0)):
        members = [(f"{i}.jpg", images[i]) for i in order]
        write_tar(path, [*members, ("0.txt", b"zero"), ("1.txt", b"one")])
        os.utime(path, ns=(mtime, mtime))
        if reader == "another process":
            data.load_index.cache_clear()
        held_out = data.open_source(str(path)).held_out()
        found = {}
        for image, caption in held_out.pairs:
            found[held_out.captions[caption]] = data.read_bytes(held_out.images[image])
        assert found == {"zero": images[0], "one": images[1]} and not held_out.skipped
        time.sleep(0.05)  # a file system's clock has a resolution of a few milliseconds


def test_a_damaged_index_is_made_anew(shard, tmp_path):
    index = data.index_shard(shard)
    (file,) = (tmp_path / "cache").rglob("*.pt")
    whole = file.read_bytes()
    for content in (b"", b"<html>", b"PK\3\4", whole[:50], whole[:-9]):
        file.write_bytes(content)
        assert same_index(data.index_shard(shard), index)
        assert same_index(torch.load(file, weights_only=True), index)


@pytest.mark.parametrize("obstacle", ["a file", "a folder", "a full disk"])
def test_without_a_cache_folder_shards_are_read_all_the_same(shard, tmp_path, obstacle):
    cache, limits = tmp_path / "cache", resource.getrlimit(resource.RLIMIT_FSIZE)
    if obstacle == "a file":
        cache.write_bytes(b"")
    if obstacle == "a folder":  # where the temporary file would be
        data.index_shard(shard)
        (file,) = cache.rglob("*.pt")
        file.unlink()
        Path(f"{file}.{os.getpid()}.tmp").mkdir()
    if obstacle == "a full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        rows, _ = data.index_shard(shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(rows) == 5 and not list(tmp_path.rglob("*.index.pt"))


def test_without_home_the_cache_is_in_the_temporary_folder(shard, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    assert len(data.index_shard(shard)[0]) == 5
    assert sorted(os.listdir()) == ["data", "temporary"]


def test_names_that_are_not_utf8_are_stored_in_an_index(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    members = [(f"{name}.jpg", JPEG), (f"{name}.txt", b"red"), (f"{name}.flac", b"")]
    path = write_tar(tmp_path / f"{name}.tar", members)
    index = data.index_shard(path)
    assert len(index[0]) == 1 and same_index(data.index_shard(path), index)


# messages


def test_a_name_that_cannot_be_printed_does_not_end_the_output(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "utf-8", errors="strict"))
    data.say("caf" + chr(0xDCE9))
    data.say("after")
    assert raw.getvalue() == b"caf\\udce9\nafter\n"


def test_a_reader_of_stdout_that_leaves_does_not_end_the_program(monkeypatch):
    read, write = os.pipe()
    stdout = open(write, "w")
    monkeypatch.setattr(sys, "stdout", stdout)
    os.close(read)
    for i in range(100):
        data.say(i)
    stdout.close()  # Python does so at the end. It would raise if text were left.


# faults during training


def test_a_vanished_shard_is_counted_and_the_stream_continues(tmp_path):
    for s in range(2):
        write_shard(tmp_path / f"{s}.tar", [(JPEG, f"{s} {i}") for i in range(20)])
    source = data.open_source(f"{tmp_path}/{{0..1}}.tar")
    stream = data.batches(source, SMALL, 10)
    next(stream)
    (tmp_path / "1.tar").unlink()
    *rest, skipped = zip(*itertools.islice(stream, 6))
    assert counts(data.merge_skips(skipped))["FileNotFoundError"] > 10
    assert set(captions_in(zip(*rest))) <= {f"0 {i}" for i in range(20)}


def bomb():
    """A small PNG whose header claims 207 megapixels."""
    raw = bytearray(encoded(Image.new("L", (9, 9))))
    raw[16:24] = struct.pack(">II", 14_400, 14_400)
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    return bytes(raw)


FLOATS = Image.fromarray(np.full((16, 16), 0.5, np.float32))  # of unknown range
BROKEN = {
    "truncated": (JPEG[:-100], "OSError"),
    "empty": (b"", "UnidentifiedImageError"),
    "html": (b"<html>", "UnidentifiedImageError"),
    "eps": (EPS.encode(), "UnidentifiedImageError"),
    "bomb": (bomb(), "DecompressionBombError"),
    "float tiff": (encoded(FLOATS, "TIFF"), "ValueError"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_image_is_replaced_by_another_sample_and_counted(tmp_path, kind):
    bad, error = BROKEN[kind]
    samples = [(bad if i == 3 else JPEG, f"caption {i}") for i in range(8)]
    source = data.open_source(write_shard(tmp_path / "a.tar", samples))
    for workers in (0, 1):
        skipped = Counter()
        captions = captions_in(first_batches(1, source, skipped=skipped, workers=workers))
        assert len(captions) == 8 and set(captions) == {f"caption {i}" for i in range(8) if i != 3}
        assert list(skipped) == [error]


def test_a_float_tiff_is_refused_by_both_crops():
    with pytest.raises(ValueError):
        load_image(FLOATS, 16)
    with pytest.raises(ValueError):
        load_training_crop(encoded(FLOATS, "TIFF"), 16, 0.9, random.Random(0))


def bad_shard(path, bad):
    """25 small images, of which some are broken."""
    tiny = encoded(photo(16, 16), "JPEG")
    return data.open_source(write_shard(path, [(b"", "x")] * bad + [(tiny, "x")] * (25 - bad)))


class Breaks(shapes.Shapes):
    """Shapes that become unreadable at once, as on a disk that fails."""

    broken = False

    def __getitem__(self, i):
        if self.broken:
            raise OSError
        return super().__getitem__(i)


def test_training_never_gets_an_image_that_stands_for_an_unreadable_one():
    """After 2,000 good samples, 200 attempts for the next two are less than a tenth of all."""
    source = Breaks()
    stream = data.batches(source, SMALL, 2)
    for _ in range(1000):
        next(stream)
    source.broken = True
    with pytest.raises(data.LoadingError, match="100 of 2,102 samples tried are bad: 100 OSError"):
        next(stream)


def test_more_than_a_tenth_of_bad_samples_ends_the_stream_with_the_counts(tmp_path):
    with pytest.raises(data.LoadingError, match=r"\d\d\d UnidentifiedImageError.*a\.tar"):
        first_batches(100, bad_shard(tmp_path / "a.tar", 5))
    skipped = Counter()
    first_batches(14, bad_shard(tmp_path / "b.tar", 2), batch_size=100, skipped=skipped)
    assert skipped["UnidentifiedImageError"] > 100  # 8 %


def test_a_source_of_bad_samples_is_refused_with_one_name_of_each_kind(tmp_path):
    folder = write_files(tmp_path, {"a.jpg": b"", "a.txt": "red", "b.jpg": JPEG, "b.txt": " ",
                                    "c.jpg": JPEG[:300], "c.txt": "blue"})
    kinds = {"UnidentifiedImageError": "a.jpg", "NoCaption": "b.jpg", "OSError": "c.jpg"}
    with pytest.raises(ValueError) as error:
        first_batches(1, data.open_source(folder))
    for kind, name in kinds.items():
        assert f"{kind} ({tmp_path}/{name})" in str(error.value)


def mutate(raw, rng):
    """Flipped bits, a truncation, or a splice of itself."""
    raw, kind = bytearray(raw), rng.randrange(3)
    a, b, n = rng.randrange(len(raw)), rng.randrange(len(raw)), rng.randrange(1, 2000)
    if kind == 0:
        for _ in range(n % 20 + 1):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del raw[a:]
    else:
        raw[a : a + n] = raw[b : b + n]
    return bytes(raw)


@pytest.mark.parametrize("kind", ["tar", "jpg", "txt"])
def test_whatever_happens_to_a_shard_every_sample_is_read_or_counted(tmp_path, kind):
    """SLOW=1 for many more mutations."""
    rng, members = random.Random(kind), {}
    for i in range(12):
        members[f"{i}.jpg"] = encoded(photo(40 + i, 30), "JPEG")
        members[f"{i}.txt"] = f"a caption {i}".encode()
    whole = Path(write_tar(tmp_path / "whole.tar", members.items())).read_bytes()
    for i in range(500 if "SLOW" in os.environ else 10):
        path, bad = tmp_path / f"{i}a.tar", f"{rng.randrange(12)}.{kind}"
        if kind == "tar":
            path.write_bytes(mutate(whole, rng))
        else:
            write_tar(path, (members | {bad: mutate(members[bad], rng)}).items())
        try:
            source = data.open_source(str(path))
            first_batches(1, source, 12)
        except (ValueError, data.LoadingError) as error:
            assert kind == "tar" and ("a.tar" in str(error) or "bad" in str(error))
            continue
        assert len(source) == 12 or kind == "tar" and source.skipped


# held-out data


def test_several_rows_of_an_image_are_one_image_with_several_captions(tmp_path):
    rows = ["0.jpg,red", "1.jpg,blue", "0.jpg,a red one", "2.jpg,", "1.jpg,a blue one", "0.jpg,r"]
    write_files(tmp_path, {f"{i}.jpg": jpeg(i) for i in range(3)})
    write_files(tmp_path, {"a.csv": "\n".join(["filepath,title", *rows])})
    held_out = data.open_source(str(tmp_path / "a.csv")).held_out()
    assert held_out.images == [str(tmp_path / "0.jpg"), str(tmp_path / "1.jpg")]
    assert held_out.captions == ["red", "blue", "a red one", "a blue one", "r"]
    assert held_out.pairs == [(0, 0), (1, 1), (0, 2), (1, 3), (0, 4)]
    assert held_out.skipped == {"NoCaption": [1, str(tmp_path / "2.jpg")]}


def matches(held_out):
    """-> {(SHA-256 of the image, caption)}"""
    found = set()
    for image, caption in held_out.pairs:
        content = hashlib.sha256(data.read_bytes(held_out.images[image])).hexdigest()
        found.add((content, held_out.captions[caption]))
    return found


def test_held_out_data_are_the_same_in_every_layout(tmp_path, monkeypatch):
    """Three images have five captions each. img2dataset stores one sample per caption."""
    monkeypatch.chdir(tmp_path)
    spellings = ["{}.jpg", "./{}.jpg", f"{tmp_path}/{{}}.jpg", "copies/{}.jpg", "copies/../{}.jpg"]
    rows, samples = [], []
    for i in range(3):
        texts = [f"image {i}, caption {k}" for k in range(5)]
        write_files(tmp_path, {f"{i}.jpg": jpeg(i), f"copies/{i}.jpg": jpeg(i)})
        write_files(tmp_path / "folder", {f"{i}.jpg": jpeg(i), f"{i}.txt": "\n".join(texts)})
        rows += [f'{name.format(i)},"{text}"' for name, text in zip(spellings, texts)]
        samples += [(jpeg(i), text) for text in texts]
    write_files(tmp_path, {"a.csv": "\n".join(["filepath,title", *rows])})
    half = [write_shard(tmp_path / f"{s}.tar", samples[s::2]) for s in range(2)]
    expected = {(hashlib.sha256(image).hexdigest(), text) for image, text in samples}
    for source in ("folder", "a.csv", "::".join(half)):
        held_out = data.open_source(source).held_out()
        assert len(held_out.images) == 3 and len(held_out.captions) == len(held_out.pairs) == 15
        assert matches(held_out) == expected and not held_out.skipped


def test_equal_captions_are_one_caption_that_is_right_for_each_of_its_images(tmp_path):
    write_files(tmp_path, {"0.jpg": jpeg(0), "0.txt": "a cat\na cat", "1.jpg": jpeg(1),
                           "1.txt": " a cat ", "2.jpg": jpeg(2), "2.txt": "a dog"})
    held_out = data.open_source(str(tmp_path)).held_out()
    assert held_out.captions == ["a cat", "a dog"]
    assert held_out.pairs == [(0, 0), (1, 0), (2, 1)]


def test_held_out_images_that_cannot_be_read_are_refused_with_counts(tmp_path):
    write_files(tmp_path, {"a.csv": "filepath,title\n0.jpg,red\n1.jpg,blue"})
    with pytest.raises(ValueError, match=r"2 FileNotFoundError \(0\.jpg\)"):
        data.open_source(str(tmp_path / "a.csv")).held_out()


def test_skipped_files_and_skipped_samples_are_counted_together(tmp_path):
    """One text is read when the folder is opened. The other skips are found later."""
    write_files(tmp_path, {"0.jpg": jpeg(0), "0.txt": "red", "1.jpg": jpeg(1), "1.txt": "",
                           "2.jpg": jpeg(2), "2.txt": b"caf\xe9", "3.heic": "", "4.jpg": JPEG})
    captions, skipped = pairs_of(tmp_path)
    assert captions == ["red"]
    assert skipped == {"NoCaption": 1, "UnicodeDecodeError": 1, ".heic file": 1,
                       "image without caption": 1}
