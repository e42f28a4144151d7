"""data.py: tokens, pictures, shapes, tar shards, the endless stream."""

import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import tarfile
from collections import Counter

import numpy as np
import pytest
import tiktoken
import torch
from PIL import Image

import data
from data import Batches, load_image, tokenize


# tokens

def test_bytes_by_hand():
    assert tokenize("hi", "bytes", 6).tolist() == [[256, 104, 105, 257, 0, 0]]
    assert tokenize(["", "abcdefgh"], "bytes", 5).tolist() == [[256, 257, 0, 0, 0], [256, 97, 98, 99, 257]]


def test_fault_12_the_end_token_survives_truncation_and_is_the_only_one():
    for text in ("<|endoftext|>" * 3, "x" * 100_000, "\ufeffa\0b", "é&amp;amp;", "  \n\t "):
        tokens = tokenize(text, "bytes", 16)
        assert (tokens == 257).sum() == 1 and tokens.max() == 257


def test_unknown_tokenizers_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="bytes, clip, .*gpt2"):
        tokenize("x", "no such", 5)


@pytest.fixture
def toy_vocabulary(monkeypatch):
    """A vocabulary file in CLIP's layout with a few merges of our own, so that nothing is fetched; the rest of its 48,894 lines are merges
    that never apply."""
    merges = ["t h", "th e</w>", "c a", "ca t</w>", "r e", "re d</w>", "a t</w>", "1 2</w>", "Ã ©</w>"]
    filler = [f"{chr(0x21 + i % 94)}{chr(0x21 + i // 94 % 94)}\u0100{i} x" for i in range(48_894 - len(merges))]
    spell = [line.replace("\u0100", "\u0100") for line in filler]
    content = gzip.compress("\n".join(["#version", *merges, *spell]).encode())
    monkeypatch.setattr(tiktoken.load, "read_file_cached", lambda url, sha: content)
    data.clip_encoding.cache_clear()
    data.find_tokenizer.cache_clear()
    yield merges
    data.clip_encoding.cache_clear()
    data.find_tokenizer.cache_clear()


def plain_bpe(merges):
    """CLIP's byte-pair encoding, written out: words, bytes as characters, a mark on the last one, then the lowest merge first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    char = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    vocabulary = [char[b] for b in printable + others]
    vocabulary += [c + "</w>" for c in vocabulary] + ["".join(m.split()) for m in merges]
    id_of, rank = {token: i for i, token in enumerate(vocabulary)}, {tuple(m.split()): i for i, m in enumerate(merges)}

    def encode(text):
        ids = []
        for word in data.CLIP_WORDS.findall(text.lower()):
            parts = [char[b] for b in word.encode()]
            parts[-1] += "</w>"
            while len(parts) > 1:
                lowest = min(zip(parts, parts[1:]), key=lambda pair: rank.get(pair, math.inf))
                if lowest not in rank:
                    break
                merged, i = [], 0
                while i < len(parts):
                    together = tuple(parts[i:i + 2]) == lowest
                    merged.append("".join(lowest) if together else parts[i])
                    i += 1 + together
                parts = merged
            ids += [id_of[p] for p in parts]
        return ids

    return encode


def test_clips_byte_pairs_by_tiktoken_equal_a_plain_encoder(toy_vocabulary):
    words = ["the", "cat", "red", "12", "it's", "é", "at", "theca", "?!", "ünï", "<|endoftext|>", "ca", "t"]
    rng, encode = random.Random(0), plain_bpe(toy_vocabulary)
    for _ in range(200):
        text = " ".join(rng.choice(words) for _ in range(rng.randrange(8)))
        expected = [49406, *encode(text), 49407]
        found = tokenize(text, "clip", 77)[0].tolist()
        assert found == expected + [0] * (77 - len(expected)), text


CACHED = os.path.join(os.environ.get("TIKTOKEN_CACHE_DIR", "-"), hashlib.sha1(data.CLIP_VOCABULARY[0].encode()).hexdigest())


@pytest.mark.skipif(not os.path.exists(CACHED), reason="set TIKTOKEN_CACHE_DIR to a folder that holds CLIP's vocabulary")
def test_clips_own_vocabulary_against_a_plain_encoder():
    """On words of every kind, and on the captions of a Karpathy JSON where one is named."""
    assert tokenize("a photo of a cat", "clip", 9).tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407, 0, 0]]
    merges = gzip.decompress(tiktoken.load.read_file_cached(*data.CLIP_VOCABULARY)).decode().split("\n")[1:48_895]
    encode, rng = plain_bpe(merges), random.Random(0)
    texts = ["".join(rng.choice("abcdefghij  'stTE.,!?0123é漢🙂ßñ&<|>") for _ in range(rng.randrange(40))) for _ in range(500)]
    if "KARPATHY_JSON" in os.environ:
        texts += [s["raw"] for image in json.load(open(os.environ["KARPATHY_JSON"]))["images"] for s in image["sentences"]]
    for text, row in zip(texts, tokenize(texts, "clip", 200)):
        expected = [49406, *encode(data.collapse_whitespace(text)), 49407]
        assert row.tolist() == expected + [0] * (200 - len(expected)), text


# pictures

def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(w=640, h=480, seed=0):
    """Smooth colour noise, about as compressible as a photo."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (h // 16, w // 16, 3), dtype=np.uint8)).resize((w, h), Image.Resampling.BICUBIC)


def test_evaluation_crop_is_the_centre_of_the_shorter_side():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    picture = load_image(encoded(image), 50)
    assert picture.shape == (3, 50, 50) and picture.dtype == torch.uint8
    assert (picture[:, :, 3:-3] == torch.tensor([0, 0, 255])[:, None, None]).all()


def test_evaluation_crop_is_the_fields_to_one_level_in_255():
    """Against torch's own antialiased bicubic resize, for photos of both orientations."""
    for w, h in ((640, 427), (375, 500)):
        image, size = photo(w // 16 * 16, h // 16 * 16), 224
        w, h = image.size
        long = int(size * max(w, h) / min(w, h))
        shape = (size, long) if w > h else (long, size)
        plain = torch.nn.functional.interpolate(data.to_tensor(image)[None].float(), shape, mode="bicubic", antialias=True)[0].round().clamp(0, 255)
        top, left = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
        difference = (load_image(encoded(image), size) - plain[:, top:top + size, left:left + size]).abs()
        assert difference.max() <= 1


def test_fault_10_modes_are_converted_and_not_washed_out():
    white_over = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert load_image(encoded(white_over), 8).min() == 255   # transparent is white
    assert load_image(encoded(Image.new("LA", (8, 8), (0, 255))), 8).max() == 0
    assert load_image(encoded(Image.new("1", (8, 8), 1)), 8).min() == 255
    grey = load_image(encoded(Image.fromarray(np.full((8, 8), 128 * 256, dtype=np.uint16))), 8)
    assert 126 <= grey.float().mean() <= 129
    assert load_image(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG"), 8)[0].float().mean() < 40
    palette = Image.new("RGB", (8, 8), "lime").convert("P")
    assert load_image(encoded(palette), 8)[1].min() > 250


def test_fault_11_extreme_sizes_do_not_crash():
    for size in ((1, 1), (1, 5000), (5000, 1)):
        assert load_image(encoded(Image.new("RGB", size)), 16).shape == (3, 16, 16)
        assert data.load_training_crop(encoded(Image.new("RGB", size), "JPEG"), 16, 0.9, random.Random(0)).shape == (3, 16, 16)


def test_random_boxes_keep_area_ratio_and_place():
    rng, areas, lefts = random.Random(0), [], []
    for _ in range(4000):
        left, top, right, bottom = data.random_box(640, 480, 0.5, rng)
        assert 0 <= left < right <= 640 and 0 <= top < bottom <= 480 and 0.74 < (right - left) / (bottom - top) < 1.34
        areas.append((right - left) * (bottom - top) / (640 * 480))
        lefts.append(left / max(1, 640 - (right - left)))
    assert 0.495 < min(areas) and max(areas) <= 1 and abs(np.mean(lefts) - 0.5) < 0.02


def test_the_fast_crop_looks_like_the_plain_one():
    """draft + one resize against decode, crop, resize: less than 2 % mean absolute difference."""
    for w, h in ((640, 480), (1024, 768)):
        jpeg = encoded(photo(w, h), "JPEG", quality=90)
        fast = data.load_training_crop(jpeg, 224, 0.9, random.Random(1)).float()
        box = data.random_box(w, h, 0.9, random.Random(1))
        plain = data.to_tensor(Image.open(io.BytesIO(jpeg)).convert("RGB").crop(box).resize((224, 224), Image.Resampling.BICUBIC)).float()
        assert (fast - plain).abs().mean() < 0.02 * 255


# shapes

def test_captions_run_from_general_to_specific():
    scene = (data.KINDS.index(("small", "red", "circle")), list(data.RELATIONS).index("left of"), data.KINDS.index(("large", "blue", "square")))
    said = [data.describe(scene, level, random.Random(0)) for level in range(5)]
    assert said == ["a shape", "a circle", "a red circle", "a small red circle", "a small red circle left of a large blue square"]
    assert len(data.COLOURS) >= 8 and len(data.POLYGONS) >= 6 and len(data.SIZES) in (2, 3) and len(data.SHAPE_CLASSES) == 48


def test_pictures_show_what_their_captions_say():
    """Measured in the pixels: the share of a circle's picture that it covers, the side that the first of two objects is on."""
    circle = {size: data.KINDS.index((size, "red", "circle")) for size in data.SIZES}
    picture = {size: data.to_tensor(data.draw((circle[size], None, None), random.Random(1), 64)).float() for size in circle}
    covered = {size: (p[0] > 150).float().mean().item() for size, p in picture.items()}
    for size, (low, high) in data.SIZES.items():
        assert np.pi * (low / 2000) ** 2 * 0.9 < covered[size] < np.pi * (high / 2000) ** 2 * 1.1
    for relation, (name, (dx, dy)) in enumerate(data.RELATIONS.items()):
        scene = (data.KINDS.index(("large", "red", "square")), relation, data.KINDS.index(("small", "blue", "circle")))
        p = data.to_tensor(data.draw(scene, random.Random(2), 64)).float()
        y, x = torch.nonzero(p[0] > 150, as_tuple=True)
        assert ((x.float().mean() - 31.5) * dx + (y.float().mean() - 31.5) * dy) > 10, name


def test_every_machine_draws_the_same_pictures():
    source, total = data.Shapes(), []
    for number in (0, 1, 2, 123_456_789):
        picture, caption = source.sample(number, 0, 64, 0.9, Counter())
        total.append((int(picture.long().sum()), caption))
    assert total == [(509942, 'a large cyan circle'), (550163, 'a large cyan triangle left of a small red square'), (531435, 'something pink'), (628582, 'a large red cross')]


def test_the_held_out_arrangements_are_distinct_and_never_drawn_in_training():
    scenes = data.held_out_scenes()
    twos = scenes[data.HELD_OUT:]
    pictures, captions = data.held_out_pairs("shapes")
    assert len(set(captions)) == len(set(twos)) == len(pictures) == data.HELD_OUT
    assert Counter(" ".join(data.KINDS[first][1:]) for first, _, _ in scenes[:data.HELD_OUT]) == Counter(data.SHAPE_CLASSES * 10)
    drawn = {data.random_scene(random.Random(i), True) for i in range(20_000)}
    assert not drawn & set(twos)


# the stream

def first_batches(count, **settings):
    settings = dict(source="shapes", batch_size=8, image_size=32, tokenizer="bytes", context_length=77) | settings
    return list(itertools.islice(Batches(**settings), count))


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in ("images", "tokens", "index"))


def test_a_batch_depends_on_seed_and_step_alone():
    plain = first_batches(4)
    assert all(map(same, plain, first_batches(4, workers=2)))
    assert all(map(same, plain[2:], first_batches(2, step=2)))
    assert not same(plain[0], first_batches(1, seed=1)[0])


def test_processes_take_contiguous_slices_of_one_batch():
    whole = first_batches(2)
    for process in range(2):
        for batch, part in zip(whole, first_batches(2, process=process, processes=2)):
            assert torch.equal(batch["images"][process * 4:process * 4 + 4], part["images"])


def test_index_holds_the_flat_positions_of_real_tokens():
    batch = first_batches(1)[0]
    lengths = (batch["tokens"] == 257).int().argmax(1) + 1
    assert batch["tokens"].shape[1] == lengths.max() and len(batch["index"]) == lengths.sum()
    assert batch["tokens"].flatten()[batch["index"]].min() > 0


def tar_of(path, members):
    """[(name, content)] -> a tar of exactly these members."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shard(path, samples):
    """samples: [(picture bytes, caption)] -> a tar in webdataset's layout."""
    files = lambda i, picture, caption: [(f"{i:05d}.jpg", picture), (f"{i:05d}.txt", caption.encode())]
    return tar_of(path, [member for i, sample in enumerate(samples) for member in files(i, *sample)])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    jpeg = encoded(photo(48, 40), "JPEG")
    for s in range(4):
        write_shard(folder / f"{s:03d}.tar", [(jpeg, f"shard {s} sample {i}") for i in range(10)])
    return folder


def captions_of(batches):
    return [bytes(t for t in row.tolist() if 0 < t < 256).decode() for batch in batches for row in batch["tokens"]]


@pytest.mark.parametrize("shard_count,processes,workers", [(4, 1, 0), (4, 2, 2), (1, 2, 2), (3, 2, 1), (1, 1, 3)])
def test_fault_2_a_pass_shows_every_sample_once_however_many_readers_share_the_shards(shards, shard_count, processes, workers):
    source = str(shards / f"{{000..{shard_count - 1:03d}}}.tar")
    stream = data.Shards(source, seed=0)
    readers, seen = processes * max(1, workers), []
    for reader in range(readers):
        passes = stream.samples(reader, readers, (0, 0, 0), Counter(), [])
        seen += [caption for _, caption, cursor in itertools.takewhile(lambda s: s[2][0] == 0, passes)]
    assert sorted(seen) == sorted(f"shard {s} sample {i}" for s in range(shard_count) for i in range(10))


def test_passes_differ_in_order_and_a_cursor_takes_up_where_it_was_left(shards):
    stream = data.Shards(str(shards / "*.tar"), seed=0)
    whole = list(itertools.islice(stream.samples(0, 1, (0, 0, 0), Counter(), []), 100))
    captions = [c for _, c, _ in whole]
    assert sorted(captions[:40]) == sorted(captions[40:80]) and captions[:40] != captions[40:80]
    for at in (0, 7, 39, 40, 63):
        rest = itertools.islice(stream.samples(0, 1, whole[at][2], Counter(), []), 99 - at)
        assert [c for _, c, _ in rest] == captions[at + 1:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_shards_goes_on_from_its_state(shards, workers):
    settings = dict(source=str(shards / "*.tar"), workers=workers, batch_size=3)
    stream = Batches(**(dict(image_size=16, tokenizer="bytes", context_length=77) | settings))
    running = iter(stream)
    for _ in range(7):
        next(running)
    state, expected = json.loads(json.dumps(stream.state)), [next(running) for _ in range(5)]
    assert all(map(same, expected, first_batches(5, states=[state], step=7, image_size=16, **settings)))


def test_workers_start_by_spawn_too(shards):
    """As on a Mac: data sets travel to new interpreters."""
    for source in ("shapes", str(shards / "000.tar")):
        stream = Batches(source, 4, 16, "bytes", 77, workers=1)
        stream.loader.multiprocessing_context = multiprocessing.get_context("spawn")
        assert next(iter(stream))["images"].shape == (4, 3, 16, 16)


def test_fault_1_patterns_that_match_nothing_are_refused_with_the_resolved_path(shards, tmp_path):
    for pattern in ("nothing*.tar", "{000..009}.tar", "x.tar::y.tar"):
        with pytest.raises(ValueError, match=str(shards)):
            data.expand_shards(str(shards / pattern))
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(ValueError, match="folder.tar"):
        data.expand_shards(str(tmp_path / "folder.tar"))
    assert len(data.expand_shards(str(shards / "{000..002}.tar") + "::" + str(shards / "003.tar"))) == 4


def test_csv_and_folder_sources_read_every_pair(tmp_path):
    jpeg = encoded(photo(40, 40), "JPEG")
    for i in range(6):
        (tmp_path / f"{i}.JPG").write_bytes(jpeg)
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    (tmp_path / "list.csv").write_text("filepath,title\n" + "".join(f"{i}.JPG,picture {i}\n" for i in range(6)))
    (tmp_path / "list.tsv").write_text("title\tfilepath\n" + "".join(f"picture {i}\t{i}.JPG\n" for i in range(6)))
    for source in (tmp_path / "list.csv", tmp_path / "list.tsv", tmp_path):
        captions = captions_of(first_batches(2, source=str(source), batch_size=6, image_size=16))
        assert sorted(captions[:6]) == sorted(captions[6:]) == [f"picture {i}" for i in range(6)]
        assert len(data.held_out_pairs(str(source))[0]) == 6


def test_pictures_that_cannot_be_read_are_replaced_and_counted(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02d}.jpg").write_bytes(b"<html>" if i == 3 else encoded(photo(32, 32), "JPEG"))
        (tmp_path / f"{i:02d}.txt").write_text(str(i))
    stream = Batches(str(tmp_path), 40, 16, "bytes", 77)
    assert len(next(iter(stream))["images"]) == 40 and stream.skipped == {"picture broken": 1}


def test_fault_8_14_shards_of_broken_pictures_only_are_refused_with_the_counts(tmp_path, time_limit):
    write_shard(tmp_path / "a.tar", [(b"<html>", "a caption")] * 3)
    with pytest.raises(ValueError, match="1000 of 1000 samples cannot be used: {'picture broken': 1000}"):
        first_batches(1, source=str(tmp_path / "a.tar"))


def test_fault_3_a_broken_shard_is_skipped_by_name_and_refused_if_all_are(shards, tmp_path, time_limit, capsys):
    (tmp_path / "empty.tar").write_bytes(b"")
    mixed = f"{shards}/000.tar::{tmp_path}/empty.tar"
    for process in range(2):   # one of the two readers meets the empty shard first
        first_batches(2, source=mixed, process=process, processes=2)
    assert "empty.tar" in capsys.readouterr().out
    with pytest.raises(ValueError, match="empty.tar.*wanted .jpg"):
        first_batches(1, source=str(tmp_path / "empty.tar"))
