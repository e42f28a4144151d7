"""data.py: tokens, pictures, shapes, sources of every kind, the endless stream."""

import gzip
import html
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import socket
import struct
import subprocess
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from common import SMALL, data, encoded, photo, write_shard, write_tar
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


def pairs_of(source):
    """-> sorted captions of a source, what was left out."""
    _, captions, _, left_out = data.held_out_pairs(str(source))
    return sorted(captions), dict(left_out)


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


def test_unknown_tokenizers_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="bytes, clip, .*gpt2"):
        tokenize("x", "no such", 5)


@pytest.fixture
def fresh_vocabularies():
    """None is remembered from another test, nor from this one."""
    for function in (data.clip_encoding, data.find_tokenizer):
        function.cache_clear()
    yield
    for function in (data.clip_encoding, data.find_tokenizer):
        function.cache_clear()


def test_a_vocabulary_that_is_missing_is_asked_for_with_one_connection(
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
    with pytest.raises(ValueError, match=f"(?s){tmp_path}.*put .*bpe_simple_vocab_16e6.*{name}"):
        data.vocab_size("clip")
    with pytest.raises(ValueError, match=f"(?s)gpt2.*{tmp_path}"):
        data.vocab_size("gpt2")
    assert wanted == [("127.0.0.1", 9)] * 2


@pytest.fixture
def toy_merges(monkeypatch, fresh_vocabularies):
    """A vocabulary in CLIP's layout with a few merges of our own; the others never apply."""
    merges = ["t h", "th e</w>", "c a", "ca t</w>", "r e", "re d</w>", "a t</w>", "1 2</w>",
              "Ã ©</w>"]  # fmt: skip
    letters = [chr(33 + i) for i in range(94)]
    pairs = itertools.islice(itertools.product(letters, repeat=3), 48_894 - len(merges))
    filler = ["".join(triple) + "\u0100 x" for triple in pairs]  # \u0100 stands for byte 0
    content = gzip.compress("\n".join(["#version", *merges, *filler]).encode())

    def read(url, sha256):
        return content

    monkeypatch.setattr(tiktoken.load, "read_file_cached", read)
    return merges


def plain_bpe(merges):
    """CLIP's byte-pair encoding, written out: words, bytes as characters, a mark on the last one,
    then the lowest merge first."""
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
              hashlib.sha1(data.CLIP_VOCABULARY.encode()).hexdigest())  # fmt: skip


@pytest.mark.skipif(not CACHED.exists(), reason="TIKTOKEN_CACHE_DIR holds no CLIP vocabulary")
def test_clips_own_vocabulary_against_a_plain_encoder():
    """On words of every kind, and on the captions of a Karpathy JSON where one is named."""
    cat = tokenize("a photo of a cat", "clip", 9)[0].tolist()
    assert cat == [49406, 320, 1125, 539, 320, 2368, 49407, 0, 0]
    merges = gzip.decompress(CACHED.read_bytes()).decode().split("\n")[1:48_895]
    rng, letters = random.Random(0), "abcdefghij  'stTE.,!?0123é漢🙂ßñ&<|>"
    texts = ["".join(rng.choices(letters, k=i % 40)) for i in range(500)]
    if "KARPATHY_JSON" in os.environ:
        for image in json.loads(Path(os.environ["KARPATHY_JSON"]).read_text())["images"]:
            texts += [sentence["raw"] for sentence in image["sentences"]]
    check_against_plain(texts, plain_bpe(merges))


# pictures


def crops(item, size=16):
    """The evaluation crop and a training crop."""
    return load_image(item, size), load_training_crop(item, size, 0.9, random.Random(1))


def test_evaluation_crop_is_the_centre_of_the_shorter_side():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    picture = load_image(encoded(image), 50)
    assert picture.shape == (3, 50, 50) and picture.dtype == torch.uint8
    assert (picture[:, :, 3:-3] == torch.tensor([0, 0, 255])[:, None, None]).all()


@pytest.mark.parametrize("w,h", [(640, 416), (368, 496), (20, 600)])
def test_evaluation_crop_is_torchs_antialiased_bicubic_to_one_level(w, h):
    image, size = photo(w, h), 112
    shape = size * h // min(w, h), size * w // min(w, h)
    whole = data.to_tensor(image)[None].float()
    plain = torch.nn.functional.interpolate(whole, shape, mode="bicubic", antialias=True)[0]
    top, left = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    plain = plain.round().clamp(0, 255)[:, top : top + size, left : left + size]
    assert (load_image(encoded(image), size) - plain).abs().max() <= 1


def test_pictures_are_read_in_six_formats_whatever_their_names(tmp_path):
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
    for dtype in (np.uint16, np.int32, np.float32):  # 16 bits of grey
        grey = Image.fromarray(np.full(size, 128 * 256, dtype))
        assert 126 <= middle(grey, "TIFF")[0] <= 129
    frames = [Image.new("RGB", size, colour) for colour in ("red", "blue")]
    assert middle(frames[0], "GIF", save_all=True, append_images=frames[1:]) == [255, 0, 0]


def test_extreme_sizes_do_not_crash():
    for size in ((1, 1), (1, 5000), (5000, 1)):
        for kind in ("PNG", "JPEG"):
            assert all(crop.shape == (3, 16, 16) for crop in crops(encoded(photo(*size), kind)))


def test_a_strip_is_not_blown_up_to_a_huge_picture(monkeypatch):
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
    """Decoded at half and at a quarter of the size, but for 300 pixels. Against decode, crop,
    resize: less than 2 % mean absolute difference."""
    decoded, to_rgb = [], data.to_rgb
    monkeypatch.setattr(data, "to_rgb", lambda image: decoded.append(image.size) or to_rgb(image))
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
          6: TURN.ROTATE_90, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_270}  # fmt: skip


@pytest.mark.parametrize("orientation", [*STORED, 0, 9])  # the last two say nothing
def test_what_a_camera_stores_turned_is_upright_in_both_crops(orientation):
    exif, upright = Image.Exif(), photo(400, 300)
    exif[0x0112] = orientation
    stored = upright.transpose(STORED[orientation]) if orientation in STORED else upright
    stored = encoded(stored, "JPEG", quality=95, exif=exif)
    for turned, plain in zip(crops(stored, 64), crops(encoded(upright, "JPEG", quality=95), 64)):
        assert (turned.float() - plain).abs().mean() < 0.02 * 255


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_noise_in_place_of_exif_is_no_reason_to_lose_a_photo(format):
    for crop in crops(encoded(photo(60, 40), format, exif=b"Exif\0\0garbage!", dpi=(72, 72))):
        assert crop.shape == (3, 16, 16)


def test_a_turned_photo_with_an_odd_tag_is_read_all_the_same():
    """Orientation 6, and the name of the software as a fraction, which Pillow cannot write."""
    tags = b"\2\0\x12\1\3\0\1\0\0\0\6\0\0\0\x31\1\5\0\1\0\0\0\x26\0\0\0"
    exif = b"Exif\0\0II*\0\10\0\0\0" + tags + b"\0\0\0\0\1\0\0\0\1\0\0\0"
    for crop in crops(encoded(photo(60, 40), "JPEG", exif=exif), 16):
        assert crop.shape == (3, 16, 16)


EPS = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


def test_postscript_called_jpg_starts_no_program(tmp_path, monkeypatch):
    mark, picture = tmp_path / "mark", tmp_path / "a.jpg"
    write_files(tmp_path, {"bin/gs": f"#!/bin/sh\ntouch {mark}\n", "a.jpg": EPS})
    (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(UnidentifiedImageError):
        load_image(picture, 16)
    with pytest.raises(UnidentifiedImageError):
        load_training_crop(picture, 16, 0.9, random.Random(0))
    assert not mark.exists()
    with pytest.raises(OSError):
        Image.open(picture).load()
    assert mark.exists()  # Pillow, left to itself, does start it


# shapes


def scene(first, relation, second):
    """('small red circle', 'left of', 'large blue square') -> indices."""
    objects = [" ".join(words) for words in data.OBJECTS]
    relation = list(data.RELATIONS).index(relation)
    return objects.index(first), relation, objects.index(second)


def test_captions_run_from_general_to_specific():
    both = scene("small red circle", "left of", "large blue square")
    captions = data.describe(both, random.Random(0))
    assert captions == ["a shape", "a circle", "a red circle", "a small red circle",
                        "a small red circle left of a large blue square"]  # fmt: skip
    assert len(data.SHAPE_CLASSES) == 48 and len(data.LEVELS) == 5
    for general, half, red, small, full in data.held_out_levels():
        assert general == "a shape" and half.split()[-1] in red.split()
        assert set(red.split()) < set(small.split()) and full.startswith(small)


def test_pictures_show_what_their_captions_say():
    """The fraction of the picture that a circle covers; the side that the first object is on."""
    for size, (low, high) in data.SIZES.items():
        first, _, _ = scene(f"{size} red circle", "above", "small red circle")
        picture = data.to_tensor(data.draw((first, None, None), random.Random(1), 64))
        covered = (picture[0] > 150).float().mean()
        assert np.pi * (low / 2000) ** 2 * 0.9 < covered < np.pi * (high / 2000) ** 2 * 1.1
    for relation, (dx, dy) in data.RELATIONS.items():
        both = scene("large red square", relation, "small blue circle")
        picture = data.to_tensor(data.draw(both, random.Random(2), 64))
        y, x = torch.nonzero(picture[0] > 150).float().mean(0) - 31.5
        assert x * dx + y * dy > 10, relation


def test_every_machine_draws_the_same_pictures():
    drawn = []
    for number in (0, 1, 2, 123_456_789):
        picture, caption = data.draw_sample(random.Random(0 << 48 | number), 64)
        drawn.append((int(picture.long().sum()), caption))
    assert drawn == [(509942, "a large cyan circle"),
                     (569834, "a large blue triangle below a small cyan circle"),
                     (531435, "something pink"), (628582, "a large red cross")]  # fmt: skip


def test_held_out_arrangements_are_distinct_and_never_drawn_in_training():
    ones, twos = np.split(np.array(data.held_out_scenes(), dtype=object), 2)
    classes = [" ".join(data.OBJECTS[first][1:]) for first, _, _ in ones]
    assert Counter(classes) == Counter(data.SHAPE_CLASSES * 10)
    items, captions, image_of_caption, left_out = data.held_out_pairs("shapes")
    assert len(set(captions)) == len(items) == len(image_of_caption) == 480 and not left_out
    assert data.load_item(items[0], 64).shape == (3, 64, 64)
    drawn = {data.random_scene(random.Random(i), True) for i in range(20_000)}
    assert len(drawn) > 10_000


def test_a_held_out_picture_is_not_drawn_in_training_in_other_words():
    """A circle left of a star is a star right of a circle."""
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    names = list(data.RELATIONS)
    held_out = set()
    for first, relation, second in data.held_out_scenes()[data.HELD_OUT :]:
        other = names.index(opposite[names[relation]])
        held_out |= {(first, relation, second), (second, other, first)}
    assert len(held_out) == 2 * data.HELD_OUT
    drawn = {data.random_scene(random.Random(i), True) for i in range(20_000)}
    assert not drawn & held_out


# the order, and the stream


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
    assert blocks_of(0, 0) == first  # whatever was asked for before


def first_batches(count, source=None, batch_size=8, skipped=None, **settings):
    stream, out = data.batches(source, SMALL, batch_size, **settings), []
    for images, tokens, lost in itertools.islice(stream, count):
        out.append((images, tokens))
        if skipped is not None:
            skipped.update(lost)
    return out


def captions_in(batches):
    rows = itertools.chain.from_iterable(tokens.tolist() for _, tokens in batches)
    return [bytes(row[1 : row.index(257)]).decode() for row in rows]


def same(a, b):
    return all(map(torch.equal, a, b))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards of eight samples -> what opens them."""
    folder = tmp_path_factory.mktemp("shards")
    for s in range(3):
        write_shard(folder / f"{s}.tar", [(JPEG, f"shard {s} sample {i}") for i in range(8)])
    return data.open_source(f"{folder}/{{0..2}}.tar")[0]


ALL = sorted(f"shard {i // 8} sample {i % 8}" for i in range(24))


@pytest.mark.parametrize("kind", ["shapes", "shards"])
def test_a_batch_depends_on_seed_and_step_alone(kind, shards):
    source = None if kind == "shapes" else shards
    plain = first_batches(4, source)
    assert all(map(same, plain, first_batches(4, source, workers=2)))
    assert all(map(same, plain[2:], first_batches(2, source, step=2)))
    assert not same(plain[0], first_batches(1, source, seed=1)[0])


@pytest.mark.parametrize("processes,workers", [(1, 0), (2, 1), (4, 0)])
def test_processes_take_contiguous_slices_and_nobody_sees_a_sample_twice(
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


def test_data_sets_travel_to_new_interpreters(shards, tmp_path):
    folder = write_files(tmp_path, {"a.jpg": JPEG, "a.txt": "one\ntwo"})
    for source in (None, shards, data.open_source(folder)[0]):
        samples = data.Samples(source, 0, 16, 0.9)
        copy = pickle.loads(pickle.dumps(samples))
        assert torch.equal(copy[3][0], samples[3][0]) and copy[3][1:] == samples[3][1:]


# captions


def test_every_line_of_a_text_is_a_caption_and_gets_drawn(tmp_path):
    folder = write_files(tmp_path, {"a.jpg": JPEG, "a.txt": "\ufeffone\n\n two\r\nthree\n"})
    samples = data.Samples(data.open_source(folder)[0], 0, 16, 0.9)
    drawn = [samples[number][1] for number in range(30)]
    assert set(drawn) == {"one", "two", "three"}
    assert drawn == [samples[number][1] for number in range(30)]
    assert pairs_of(folder)[0] == ["one", "three", "two"]


def test_texts_of_every_kind_are_cleaned_or_left_out(tmp_path):
    raw = [b"", b" \n ", b"caf\xe9", b"\xef\xbb\xbfBOM", b"a\0b", b"x" * 100_000, b"<|endoftext|>",
           "mis\x85decoded".encode()]  # fmt: skip
    samples = [[(f"{i}.jpg", JPEG), (f"{i}.txt", text)] for i, text in enumerate(raw)]
    captions, left_out = pairs_of(write_tar(tmp_path / "a.tar", itertools.chain(*samples)))
    expected = ["<|endoftext|>", "BOM", "a b", "caf\ufffd", "mis\x85decoded", "x" * 10_000]
    assert captions == expected
    assert left_out == {"no caption": 2}


JSON = {'{"caption": "red"}': ["red"], '{"caption": ["red", " ", "blue"]}': ["blue", "red"],
        '\ufeff{"caption": "red"}': ["red"], '{"caption": null}': [], '{"caption": 3}': [],
        '{"caption": NaN}': [], '{"caption": {"en": "red"}}': [], '{"caption": ["red", 3]}': [],
        '{"caption": []}': [], '{"title": "red"}': [], '["red"]': [], "<html>": [],
        "[" * 100_000: []}  # fmt: skip


@pytest.mark.parametrize("text", JSON, ids=range(len(JSON)))
def test_captions_in_json_are_strings_or_lists_of_them(tmp_path, text):
    members = [("1.jpg", JPEG), ("1.json", text.encode()), ("2.jpg", JPEG), ("2.txt", b"sky")]
    captions, left_out = pairs_of(write_tar(tmp_path / "a.tar", members))
    assert captions == sorted([*JSON[text], "sky"])
    assert left_out in ([{}] if JSON[text] else [{"caption broken": 1}, {"no caption": 1}])


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
    write_files(tmp_path, {name: GOOD_LISTS[name]})
    items, captions, _, left_out = data.held_out_pairs(str(tmp_path / name))
    assert items == [str(tmp_path / f"{i}.jpg") for i in range(2)]  # relative to the list
    assert captions == ["red", "blue"] and not left_out


def test_captions_in_lists_may_hold_anything(tmp_path):
    rows = ['0.jpg,"red, and blue"', '1.jpg,"red\nand blue"', "2.jpg,a\0b", "3.jpg,nan",
            'dir\\4.jpg,"say ""red"""', "5.jpg,", "6.jpg"]  # fmt: skip
    write_files(tmp_path, {"a.csv": "\n".join(["filepath,title", *rows])})
    captions, left_out = pairs_of(tmp_path / "a.csv")
    assert captions == ["a b", "nan", "red\nand blue", "red, and blue", 'say "red"']
    assert left_out == {"no caption": 2}


def test_quotation_marks_in_a_tsv_are_letters(tmp_path):
    captions = ['"Gift" is what they call it', '"Sunset, said the painter', '5" nails', "sky"]
    rows = [f"{i}.jpg\t{caption}" for i, caption in enumerate(captions)]
    write_files(tmp_path, {"a.tsv": "\n".join(["filepath\ttitle", *rows])})
    assert pairs_of(tmp_path / "a.tsv") == (sorted(captions), {})


BAD_LISTS = {
    "comma.csv": ("filepath,title\n0.jpg,red\n1.jpg,red, and blue\n", "line 3"),
    "semicolon.csv": ("filepath;title\n0.jpg;red\n", "line 1.*filepath and title"),
    "never_closes.csv": ('filepath,title\n0.jpg,"red\n1.jpg,blue\n', "line 3"),
    "closes_later.csv": ('filepath,title\n0.jpg,"red\n1.jpg,5"\n2.jpg,blue\n', "line 3"),
    "closes_later_cr.csv": ('filepath,title\r0.jpg,"red\r1.jpg,5"\r2.jpg,blue\r', "line"),
    "quote_within.csv": ('filepath,title\n0.jpg,"red" and blue\n', "line 2"),
    "huge_field.csv": ("filepath,title\n0.jpg," + "x" * 140_000, "line 2.*limit"),
    "empty.csv": ("", "filepath and title"),
    "header_only.csv": ("filepath,title\n", "no picture"),
    "latin.csv": ("filepath,title\n0.jpg,café".encode("latin-1"), "UTF-8"),
    "utf16.csv": ("filepath,title\n0.jpg,red".encode("utf-16"), "UTF-8"),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_lists_that_cannot_be_meant_so_are_refused_with_file_and_line(tmp_path, name):
    text, message = BAD_LISTS[name]
    write_files(tmp_path, {name: text})
    with pytest.raises(ValueError, match=f"{tmp_path}/{name}.*{message}"):
        data.open_source(str(tmp_path / name))


def test_names_in_a_list_are_taken_from_here_if_they_exist_here(tmp_path, monkeypatch):
    write_files(tmp_path, {"lists/a.csv": "filepath,title\nx/0.jpg,red", "x/0.jpg": JPEG})
    monkeypatch.chdir(tmp_path)
    assert data.held_out_pairs("lists/a.csv")[0] == ["x/0.jpg"]


def test_text_files_with_a_mark_are_read_and_other_encodings_refused(tmp_path):
    write_files(tmp_path, {"a.txt": "\ufeffred \n\nblé", "b.txt": "blé".encode("latin-1")})
    assert data.read_lines(tmp_path / "a.txt") == ["red", "blé"]
    with pytest.raises(ValueError, match=f"{tmp_path}/b.txt.*UTF-8"):
        data.read_lines(tmp_path / "b.txt")


# folders


def test_hidden_files_are_no_data_and_other_files_are_counted(tmp_path):
    root = tmp_path / ".mine"  # a hidden folder above does not matter
    write_files(root, {
        "IMG_1.JPG": JPEG, "IMG_1.TXT": "upper", "sub/a.b.png": JPEG, "sub/a.b.txt": "dots",
        "._IMG_1.JPG": b"\0\5", "__MACOSX/._x.jpg": b"\0\5", ".ipynb_checkpoints/y.jpg": JPEG,
        ".ipynb_checkpoints/y.txt": "hidden", "x.heic": "", "y.HEIC": "", "README": "",
        "without.jpg": JPEG,
    })  # fmt: skip
    captions, left_out = pairs_of(root)
    assert captions == ["dots", "upper"]
    assert left_out == {".heic file": 2, "other file": 1, "no caption": 1}


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    write_files(tmp_path, {"far/a.jpg": JPEG, "far/a.txt": "far", "root/b.jpg": JPEG,
                           "root/b.txt": "near"})  # fmt: skip
    (tmp_path / "root/link").symlink_to(tmp_path / "far")
    (tmp_path / "root/loop").symlink_to(tmp_path / "root")
    assert pairs_of(tmp_path / "root") == (["far", "near"], {})


def test_a_folder_of_shards_is_refused_with_the_pattern(tmp_path):
    write_shard(tmp_path / "0.tar", [(JPEG, "red")])
    with pytest.raises(ValueError, match=rf"{tmp_path}/\*\.tar"):
        data.open_source(str(tmp_path))


def test_a_folder_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no picture"):
        data.open_source(write_files(tmp_path, {"a.jpg": JPEG}))


def test_names_that_are_not_utf8_are_read(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    folder = write_files(tmp_path / name, {f"{name}.jpg": JPEG, f"{name}.txt": "red"})
    (item,), captions, _, _ = data.held_out_pairs(folder)
    assert captions == ["red"] and load_image(item, 16).shape == (3, 16, 16)
    shard = write_shard(tmp_path / name / "a.tar", [(JPEG, "blue")])
    assert pairs_of(shard) == (["blue"], {})


# patterns

BRACES = ["x.tar", "{a,b}.tar", "{000..011}", "{9..11}", "{3..1}", "{10..8}", "{8..010}", "{01..3}",
          "a{,b}", "x{a,b}{1,2}y", "{00..02}-{a,b}", "{a,{b,{c,d}}}", "{a,b{1,2},c}", "{{a,b},c}",
          "{a{0..2},b}", "{single}", "{}", "{a,b", "a,b}", "{1..3,7}", "{{1..2}}"]  # fmt: skip


@pytest.mark.parametrize("pattern", BRACES)
def test_braces_are_bashs(pattern):
    bash = subprocess.run(["bash", "-c", f"set -f; echo {pattern}"], capture_output=True, text=True)
    assert sorted(data.expand_braces(pattern)) == sorted(bash.stdout.split())


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
    for pattern, missing in (("no*.tar", r"no\*.tar"), ("{0..2}.tar", "2.tar"), ("a.csv", "a.csv"),
                             ("0.tar::y.tar", "y.tar"), ("*.tar", "")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{tmp_path}/.*{missing}"):
            data.open_source(pattern)
    with pytest.raises(ValueError, match="folder.tar"):
        data.open_source("folder.tar")


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
        ["blue"], {"incomplete sample": 3}),
    "more pictures of a sample": (
        [("1.jpg", JPEG), ("1.seg.png", PNG), ("1.txt", b"red"), ("1.cls", b"3")], ["red"], {}),
    "hidden": (
        [("a.jpg", JPEG), ("a.txt", b"red"), ("._a.jpg", b"\0\5"), ("__MACOSX/._a.jpg", b"\0\5"),
         (".trash/b.jpg", JPEG), (".trash/b.txt", b"blue")],
        ["red"], {}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_members_of_a_tar_become_samples(tmp_path, layout):
    members, captions, left_out = LAYOUTS[layout]
    assert pairs_of(write_tar(tmp_path / "a.tar", members)) == (captions, left_out)


def test_links_in_a_tar_are_the_members_they_name(tmp_path):
    texts = [(f"{name}.txt", name.encode()) for name in ("a", "b", "sub/c", "d")]
    path = write_tar(tmp_path / "a.tar", [("a.jpg", JPEG), *texts])
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (("b.jpg", tarfile.LNKTYPE, "a.jpg"),
                                   ("sub/c.jpg", tarfile.SYMTYPE, "../a.jpg"),
                                   ("d.jpg", tarfile.SYMTYPE, "gone.jpg")):  # fmt: skip
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    items, captions, _, left_out = data.held_out_pairs(path)
    assert sorted(captions) == ["a", "b", "sub/c"] and len(items) == 1  # one picture
    assert left_out == {"link": 1, "incomplete sample": 1}


def tar_header(kind, size, content=b""):
    info = tarfile.TarInfo("a.jpg")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT) + content.ljust(512, b"\0")


NO_TARS = {"empty": b"", "html": b"<html>404</html>" * 99, "gzip": gzip.compress(bytes(20_000)),
           "a member of 2**80 bytes": tar_header(tarfile.REGTYPE, 2**80),
           "an attribute of 10**20 bytes": tar_header(tarfile.XHDTYPE, 25, b"9" * 20 + b" a=b\n"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_TARS)
def test_a_file_that_is_no_tar_is_skipped_by_name_and_refused_if_all_are(tmp_path, kind, capsys):
    write_files(tmp_path, {"bad.tar": NO_TARS[kind]})
    good = write_shard(tmp_path / "good.tar", [(JPEG, "red")])
    assert pairs_of(f"{tmp_path}/bad.tar::{good}") == (["red"], {"damaged shard": 1})
    assert capsys.readouterr().out.count("bad.tar") == 1
    with pytest.raises(ValueError, match="bad.tar"):
        data.open_source(f"{tmp_path}/bad.tar")


def test_shards_without_samples_are_refused_with_the_extensions_seen_and_wanted(tmp_path):
    none = write_tar(tmp_path / "a.tar", [("a.jpg", JPEG), ("a.cls", b"3"), ("b.cls", b"3")])
    with pytest.raises(ValueError, match=r"a.tar.*'.jpg': 1, '.cls': 2.*wanted .jpg.*\.json"):
        data.open_source(none)


@pytest.mark.parametrize("damage", ["within a member", "between members", "within a header",
                                    "a header of noise"])  # fmt: skip
def test_damaged_tars_give_what_stands_before_the_damage_and_a_warning(tmp_path, damage, capsys):
    path = write_shard(tmp_path / "a.tar", [(JPEG, f"caption {i}") for i in range(8)])
    with tarfile.open(path) as tar:
        picture = tar.getmembers()[8]  # of sample 4
    raw = bytearray(Path(path).read_bytes())
    if damage == "a header of noise":
        raw[picture.offset : picture.offset + 512] = random.Random(0).randbytes(512)
    else:
        ends = {"within a member": picture.offset_data + 100, "between members": picture.offset,
                "within a header": picture.offset + 200}  # fmt: skip
        del raw[ends[damage] :]
    Path(path).write_bytes(raw)
    _, captions, _, left_out = data.held_out_pairs(path)
    assert captions == [f"caption {i}" for i in range(4)] and left_out == {"damaged shard": 1}
    assert capsys.readouterr().out.count("a.tar") == 1
    data.held_out_pairs(path, verbose=False)  # on the other processes
    assert not capsys.readouterr().out


# the index of a shard


@pytest.fixture
def shard(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    return write_shard(tmp_path / "data/a.tar", [(JPEG, f"caption {i}") for i in range(5)])


def scan_never(monkeypatch):
    def refuse(path):
        raise AssertionError(f"{path} is scanned")

    monkeypatch.setattr(data, "scan_shard", refuse)


def test_an_index_is_made_once(shard, monkeypatch):
    index = data.index_shard(shard)
    scan_never(monkeypatch)
    assert len(index) == 6 and np.array_equal(data.index_shard(shard), index)


def test_an_index_is_made_anew_when_the_shard_changes(shard, monkeypatch):
    data.index_shard(shard)
    time = os.stat(shard).st_mtime_ns
    write_shard(shard, [(JPEG, "red")] * 20)
    os.utime(shard, ns=(time, time))  # another size
    assert len(data.index_shard(shard)) == 21
    os.utime(shard, ns=(0, 0))  # another time
    scan_never(monkeypatch)
    with pytest.raises(AssertionError, match="is scanned"):
        data.index_shard(shard)


def test_an_index_that_is_damaged_is_made_anew(shard):
    index = data.index_shard(shard)
    (file,) = Path(shard).parent.glob("*.npy")
    whole, other = file.read_bytes(), io.BytesIO()
    np.save(other, index[:, :3])
    for content in (b"", b"<html>", b"PK\3\4", whole[:50], whole[:-9], other.getvalue()):
        file.write_bytes(content)
        assert np.array_equal(data.index_shard(shard), index)
        assert file.read_bytes() == whole


@pytest.mark.parametrize("writable", [1, 0])
def test_an_index_that_cannot_lie_beside_its_shard_lies_in_the_cache(shard, monkeypatch, writable):
    """Permissions do not bind root, hence a disk that refuses."""
    replace, home = os.replace, Path(os.environ["HOME"])

    def refuse(old, new):
        if not writable or home not in Path(new).parents:
            raise PermissionError(new)
        replace(old, new)

    monkeypatch.setattr(os, "replace", refuse)
    index = data.index_shard(shard)
    assert len(index) == 6 and not list(Path(shard).parent.glob("*.npy"))
    assert len(list(home.rglob("*.npy"))) == writable
    if writable:
        scan_never(monkeypatch)
    assert np.array_equal(data.index_shard(shard), index)


# what goes wrong in mid-run


def test_a_shard_that_vanishes_is_counted_and_the_stream_goes_on(tmp_path):
    for s in "ab":
        write_shard(tmp_path / f"{s}.tar", [(JPEG, f"{s} {i}") for i in range(20)])
    source, _ = data.open_source(f"{tmp_path}/{{a,b}}.tar")
    stream = data.batches(source, SMALL, 10)
    next(stream)
    (tmp_path / "b.tar").unlink()
    *rest, counts = zip(*itertools.islice(stream, 6))
    assert sum(map(Counter, counts), Counter())["file missing"] > 10
    assert set(captions_in(zip(*rest))) <= {f"a {i}" for i in range(20)}


def bomb():
    """A small PNG that says it has 207 megapixels."""
    raw = bytearray(encoded(Image.new("L", (9, 9))))
    raw[16:24] = struct.pack(">II", 14_400, 14_400)
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    return bytes(raw)


BROKEN = {"truncated": JPEG[: len(JPEG) // 2], "empty": b"", "html": b"<html>", "eps": EPS.encode(),
          "bomb": bomb()}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_bad_picture_is_replaced_by_another_sample_and_counted(tmp_path, kind):
    pictures = [BROKEN[kind] if i == 3 else JPEG for i in range(8)]
    samples = [(picture, f"caption {i}") for i, picture in enumerate(pictures)]
    source, _ = data.open_source(write_shard(tmp_path / "a.tar", samples))
    for workers in (0, 1):
        skipped = Counter()
        captions = captions_in(first_batches(1, source, skipped=skipped, workers=workers))
        assert len(captions) == 8 and set(captions) == {f"caption {i}" for i in range(8) if i != 3}
        assert list(skipped) == ["picture too large" if kind == "bomb" else "picture broken"]


def bad_shard(path, bad):
    """25 small pictures, of which some are broken."""
    tiny = encoded(photo(16, 16), "JPEG")
    return data.open_source(write_shard(path, [(b"", "x")] * bad + [(tiny, "x")] * (25 - bad)))[0]


def test_more_than_a_tenth_of_bad_samples_ends_the_stream_with_the_counts(tmp_path):
    for bad in (5, 25):
        with pytest.raises(data.LoadingError, match=r"bad: \{'picture broken': \d\d\d"):
            first_batches(100, bad_shard(tmp_path / f"{bad}.tar", bad))
    skipped = Counter()
    first_batches(14, bad_shard(tmp_path / "2.tar", 2), batch_size=100, skipped=skipped)
    assert skipped["picture broken"] > 100  # 8 %


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
            (source, left_out), skipped = data.open_source(str(path), verbose=False), Counter()
            first_batches(1, source, 12, skipped=skipped)
        except (ValueError, data.LoadingError) as error:
            assert kind == "tar" and ("a.tar" in str(error) or "bad" in str(error))
            continue
        assert len(source) == 12 or kind == "tar" and left_out


# held-out data


def test_several_rows_of_a_picture_are_one_picture_with_several_captions(tmp_path):
    rows = ["0.jpg,red", "1.jpg,blue", "0.jpg,a red one", "2.jpg,", "1.jpg,a blue one", "0.jpg,r"]
    write_files(tmp_path, {"a.csv": "\n".join(["filepath,title", *rows])})
    items, captions, image_of_caption, left_out = data.held_out_pairs(str(tmp_path / "a.csv"))
    assert items == [str(tmp_path / "0.jpg"), str(tmp_path / "1.jpg")]
    assert captions == ["red", "a red one", "r", "blue", "a blue one"]
    assert list(image_of_caption) == [0, 0, 0, 1, 1] and left_out == {"no caption": 1}


def test_held_out_pairs_that_cannot_be_read_any_more_are_refused_with_counts(shard, monkeypatch):
    def gone(path, offset, size):
        raise FileNotFoundError(path)

    data.index_shard(shard)
    monkeypatch.setattr(data, "read_slice", gone)
    with pytest.raises(ValueError, match="'file missing': 5"):
        data.held_out_pairs(shard)
