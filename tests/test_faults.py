"""Bad input, bad luck, bad machines: what a run does then. One test per fault; those about formulas, tokens, checkpoints and metrics stand
with their subjects. Every test has a time limit, because the worst answer is none."""

import gzip
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter

import pytest
import torch

import data
import train
from data import Batches
from model import load_model, read_checkpoint
from test_data import captions_of, encoded, photo, tar_of, write_shard
from test_model import ROOT, torchrun
from test_train import SHORT, StopAfter, in_process, same_weights

JPEG = encoded(photo(48, 40), "JPEG")


TIME_LIMIT, pytestmark = 60, pytest.mark.usefixtures("time_limit", "few_held_out")


def one_pass(source):
    """-> captions of one pass over shards, what was skipped up to the last of them, warnings."""
    skipped, warnings, captions, so_far = Counter(), [], [], {}
    for _, caption, cursor in data.Shards(str(source), 0).samples(0, 1, (0, 0, 0), skipped, warnings):
        if cursor[0]:
            break
        captions.append(caption)
        so_far = dict(+skipped)
    return sorted(captions), so_far, warnings


def from_stream(source, batches=1, size=4, **more):
    stream = Batches(str(source), size, 16, "bytes", 77, **more)
    running = iter(stream)
    return [next(running) for _ in range(batches)], stream


# shards and samples

@pytest.mark.parametrize("content", [b"", b"<html>404 Not Found</html>" * 100, gzip.compress(bytes(20_000))], ids=["empty", "html", "gzip"])
def test_fault_03_a_file_that_is_no_tar_is_skipped_by_name(tmp_path, content):
    (tmp_path / "bad.tar").write_bytes(content)
    good = str(write_shard(tmp_path / "good.tar", [(JPEG, f"caption {i}") for i in range(5)]))
    captions, _, warnings = one_pass(f"{good}::{tmp_path}/bad.tar")
    assert len(captions) == 5 and len(warnings) == 1 and "bad.tar" in warnings[0]
    with pytest.raises(ValueError, match="bad.tar"):
        from_stream(tmp_path / "bad.tar")


@pytest.mark.parametrize("damage", ["middle of a member", "border of a member", "inside a header", "header corrupted"])
def test_fault_04_a_damaged_tar_gives_what_stands_before_the_damage_and_a_warning(tmp_path, damage):
    path = write_shard(tmp_path / "a.tar", [(JPEG, f"caption {i}") for i in range(8)])
    with tarfile.open(path) as tar:
        fifth = tar.getmembers()[8]   # the picture of sample 4
    raw = bytearray(path.read_bytes())
    if damage == "header corrupted":
        raw[fifth.offset:fifth.offset + 512] = os.urandom(512)
    else:
        raw = raw[:{"middle of a member": fifth.offset_data + 100, "border of a member": fifth.offset, "inside a header": fifth.offset + 200}[damage]]
    path.write_bytes(raw)
    captions, _, warnings = one_pass(path)
    assert captions == [f"caption {i}" for i in range(4)] and len(warnings) == 1 and "a.tar" in warnings[0]


def test_fault_05_samples_without_caption_or_picture_are_skipped_and_a_pass_of_nothing_is_refused(tmp_path):
    some = tar_of(tmp_path / "some.tar", [("a.jpg", JPEG), ("b.txt", b"words"), ("c.cls", b"3"), ("d.jpg", JPEG), ("d.txt", b"good")])
    assert one_pass(some)[:2] == (["good"], {"incomplete sample": 3})
    none = tar_of(tmp_path / "none.tar", [("a.jpg", JPEG), ("a.cls", b"3")])
    with pytest.raises(ValueError, match=r"none.tar.*'.cls': 1.*wanted .jpg"):
        from_stream(none)


def test_fault_06_extensions_dots_duplicates_and_scattered_members(tmp_path):
    members = [("x/v1.0/a.b.JPG", JPEG), ("c.JPEG", JPEG), ("x/v1.0/a.b.txt", b"dots"), ("d.png", encoded(photo(9, 9), "PNG")), ("c.txt", b"jpeg"),
               ("e.webp", encoded(photo(9, 9), "WEBP")), ("d.txt", b"png"), ("e.txt", b"webp"), ("c.txt", b"a duplicate")]
    assert one_pass(tar_of(tmp_path / "a.tar", members))[0] == ["dots", "jpeg", "png", "webp"]


def test_fault_07_img2dataset_and_captions_only_in_json(tmp_path):
    members = [("1.jpg", JPEG), ("1.txt", b"in txt"), ("1.json", b'{"caption": "not this"}'), ("2.jpg", JPEG), ("2.json", b'{"caption": "in json"}')]
    assert one_pass(tar_of(tmp_path / "a.tar", members))[0] == ["in json", "in txt"]


def bomb():
    """A PNG that says it has 207 megapixels."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 14_400, 14_400, 8, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("picture,reason", [(JPEG[:len(JPEG) // 2], "picture broken"), (b"", "picture broken"), (b"<html>", "picture broken"),
                                            (bomb(), "picture too large")], ids=["truncated", "empty", "html", "fault_09_bomb"])
def test_fault_08_09_pictures_that_cannot_be_read_are_skipped_and_counted(tmp_path, picture, reason):
    source = write_shard(tmp_path / "a.tar", [(picture if i == 3 else JPEG, f"caption {i}") for i in range(8)])
    batches, stream = from_stream(source, batches=2, size=7)
    assert sorted(captions_of(batches[:1])) == [f"caption {i}" for i in range(8) if i != 3] and stream.skipped[reason] >= 1


def test_fault_12_captions_of_every_kind_are_cleaned_or_skipped(tmp_path):
    raw = [b"", b"  \n ", b"\xff\xfe caf\xe9", b"\xef\xbb\xbfBOM", b"a\0b", b"long " * 20_000, b"<|endoftext|> red"]
    source = tar_of(tmp_path / "a.tar", [(f"{i}.{kind}", content) for i, text in enumerate(raw) for kind, content in (("jpg", JPEG), ("txt", text))])
    captions, skipped, _ = one_pass(source)
    assert set(skipped) <= {"no caption"} and len(captions) == 5 and {"BOM", "a b", "<|endoftext|> red"} <= set(captions) and max(map(len, captions)) <= 10_000
    (batch,), _ = from_stream(source, size=5)
    assert ((batch["tokens"] == 257).sum(1) == 1).all()


def test_fault_13_a_shard_that_vanishes_in_mid_run_is_counted_and_the_run_goes_on(tmp_path):
    for s in "ab":
        write_shard(tmp_path / f"{s}.tar", [(JPEG, f"{s} {i}") for i in range(20)])
    stream = Batches(f"{tmp_path}/a.tar::{tmp_path}/b.tar", 10, 16, "bytes", 77)
    running = iter(stream)
    next(running)
    (tmp_path / "b.tar").unlink()
    rest = [next(running) for _ in range(6)]
    assert stream.skipped["shard unreadable"] > 0 and set(captions_of(rest[-2:])) <= {f"a {i}" for i in range(20)}


# arguments and environment

def test_fault_18_compile_and_bfloat16_that_the_machine_lacks(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler\n" * 50)
    monkeypatch.setattr(torch, "compile", broken)
    _, compile = train.choose_precision(train.TrainConfig(compile=True), torch.device("cpu"))
    assert not compile and len(capsys.readouterr().out.splitlines()) == 1
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: False)
    with pytest.raises(ValueError, match="use --dtype float32"):
        train.choose_precision(train.TrainConfig(dtype="bfloat16"), torch.device("cuda"))


def test_fault_19_environments_that_do_not_fit_get_one_sentence(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR.*torchrun"):
        train.join_processes(torch.device("cpu"))
    for name, value in dict(WORLD_SIZE="4", LOCAL_RANK="3", MASTER_ADDR="localhost", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="nproc_per_node=2"):
        train.join_processes(torch.device("cuda"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = os.environ | dict(WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken.getsockname()[1]))
        env |= dict(RANK="0", LOCAL_RANK="0")
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *SHORT], capture_output=True, text=True, env=env, timeout=50)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "train.py:" in done.stderr.splitlines()[-1]


FAILING = """
import sys
sys.path.insert(0, {root!r})
import train
from model import rank

rate = train.learning_rate
def learning_rate(step, *rest):
    if step == 5 and rank() == 1:
        raise RuntimeError("the disk is on fire")
    return rate(step, *rest)
train.learning_rate = learning_rate
train.main()
"""


def test_fault_20_one_process_fails_all_end_and_its_error_is_shown_last(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING.format(root=str(ROOT)))
    started = time.monotonic()
    done = torchrun(2, tmp_path / "failing.py", "--samples", 100_000, "--batch_size", 8, "--workers", 1, "--device", "cpu", "--out_dir", tmp_path / "out", timeout=50)
    assert done.returncode != 0 and time.monotonic() - started < 45
    assert "the disk is on fire" in done.stderr[-2500:] and "Connection" not in done.stderr[done.stderr.rindex("the disk is on fire"):]


def test_fault_21_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "StopSignals", lambda: StopAfter(5))
    in_process(*SHORT, "--out_dir", tmp_path)
    before, limits = (tmp_path / "ckpt.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(train, "StopSignals", lambda: StopAfter(-1))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))   # no file may grow beyond this
        with pytest.raises(OSError, match="ckpt.pt is still what was saved before|best.pt is still"):
            in_process("--resume", "--out_dir", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    in_process("--resume", "--out_dir", tmp_path)
    assert read_checkpoint(tmp_path / "ckpt.pt")["step"] == 8


def test_fault_21_kill_9_around_saves_changes_nothing(tmp_path):
    """Killed at random moments of a run that saves after every step; each time what is left must load. KILL_ROUNDS=20 for more rounds."""
    rng, env, pictures = random.Random(0), os.environ | {"OMP_NUM_THREADS": "1"}, tmp_path / "pictures"
    pictures.mkdir()
    for i in range(8):
        (pictures / f"{i}.jpg").write_bytes(encoded(photo(48, 40 + i), "JPEG"))
        (pictures / f"{i}.txt").write_text(f"picture {i}")
    command = [sys.executable, str(ROOT / "train.py"), "--data", str(pictures), "--samples", "160", "--batch_size", "8", "--log_every", "1",
               "--save_every", "1", "--workers", "0", "--device", "cpu", "--resume", "--out_dir"]
    rounds = int(os.environ.get("KILL_ROUNDS", 2))
    signal.alarm(60 + 10 * rounds)
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, env=env)
    for _ in range(rounds):
        process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.PIPE, text=True, env=env)
        next((line for line in process.stdout if line.startswith("step")), None)
        time.sleep(rng.random() * 0.2 if rounds < 10 else rng.random() * 0.05)
        process.kill()
        process.wait()
        process.stdout.close()
        if (tmp_path / "killed" / "ckpt.pt").exists():
            load_model(tmp_path / "killed" / "ckpt.pt")
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True, env=env)
    assert same_weights(tmp_path / "whole", tmp_path / "killed")


RESUMING = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch, torch.distributed as dist
dist.init_process_group("gloo")
import data, train
from test_train import SHORT, StopAfter
data.HELD_OUT = 48
join, train.join_processes, folder = train.join_processes, lambda device: device, sys.argv[1]
for source, geometry, workers in (("shapes", "clip", 0), (sys.argv[2], "euclidean", 2), (sys.argv[2], "hyperbolic", 2)):
    flags = [*SHORT, "--geometry", geometry, "--data", source, "--workers", str(workers)]
    for name, stop, more in (("whole", -1, flags), ("parts", 5, flags), ("parts", -1, ["--resume"])):
        train.StopSignals = lambda: StopAfter(stop)
        c, given = train.parse([*more, "--out_dir", f"{{folder}}/{{geometry}}_{{name}}"])
        train.train(c, given)
dist.barrier()
dist.destroy_process_group()
"""


def some_shards(folder):
    for s in range(5):
        write_shard(folder / f"{s}.tar", [(b"<html>" if i == 2 * s else encoded(photo(48, 40 + i), "JPEG"), f"shard {s} sample {i}") for i in range(11)])
    return f"{folder}/{{0..4}}.tar"


@pytest.mark.parametrize("geometry", ["clip", "euclidean", "hyperbolic"])
def test_a_run_on_shards_with_two_workers_resumes_bit_for_bit(tmp_path, geometry, monkeypatch):
    flags = [*SHORT, "--geometry", geometry, "--data", some_shards(tmp_path), "--workers", 2]
    in_process(*flags, "--out_dir", tmp_path / "whole")
    monkeypatch.setattr(train, "StopSignals", lambda: StopAfter(5))
    in_process(*flags, "--out_dir", tmp_path / "parts")
    monkeypatch.setattr(train, "StopSignals", lambda: StopAfter(-1))
    in_process("--resume", "--out_dir", tmp_path / "parts")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "parts"))
    assert whole["stream"] == parts["stream"] and whole["skipped"] == parts["skipped"] and sum(whole["skipped"][0].values()) > 0


def test_fault_26_two_processes_resume_bit_for_bit_and_one_goes_on_where_two_stopped(tmp_path, capsys, monkeypatch):
    (tmp_path / "resuming.py").write_text(RESUMING.format(root=str(ROOT), tests=str(ROOT / "tests")))
    done = torchrun(2, tmp_path / "resuming.py", tmp_path, some_shards(tmp_path), timeout=100)
    assert done.returncode == 0, done.stderr
    for geometry in ("clip", "euclidean", "hyperbolic"):
        assert same_weights(tmp_path / f"{geometry}_whole", tmp_path / f"{geometry}_parts")
    in_process("--resume", "--out_dir", tmp_path / "euclidean_parts", "--samples", 96)
    assert "going on with pass" in capsys.readouterr().out and read_checkpoint(tmp_path / "euclidean_parts" / "ckpt.pt")["step"] == 12


def test_fault_26_weights_alone_can_be_evaluated_but_not_resumed(tmp_path):
    in_process(*SHORT, "--out_dir", tmp_path)
    checkpoint = read_checkpoint(tmp_path / "ckpt.pt")
    del checkpoint["optimizer"]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    load_model(tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="no optimizer state.*--init_from"):
        in_process("--resume", "--out_dir", tmp_path)


def test_fault_23_training_and_evaluation_open_no_connection(tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("somebody wants the network")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    in_process(*SHORT, "--out_dir", tmp_path)
    import evaluate
    evaluate.run(evaluate.parse([str(tmp_path / "ckpt.pt"), "--device", "cpu"]))


def test_fault_23_a_vocabulary_that_is_not_there_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    data.find_tokenizer.cache_clear(), data.clip_encoding.cache_clear()
    with pytest.raises(ValueError, match=f"(?s){tmp_path}.*put .*bpe_simple_vocab_16e6"):
        data.find_tokenizer("clip")


# numbers

def test_fault_29_the_first_gradient_that_is_not_finite_stops_the_run_before_it_is_applied(tmp_path, monkeypatch):
    original, calls = train.CLIP.losses, []
    def losses(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        calls.append(1)
        return out if len(calls) != 6 else out | dict(loss=out["loss"] * float("nan"))
    monkeypatch.setattr(train.CLIP, "losses", losses)
    with pytest.raises(FloatingPointError, match=r"step 6: geometry hyperbolic/distance, logit scale \d.*curvature \d.*norm of the gradient nan"):
        in_process(*SHORT, "--geometry", "hyperbolic", "--out_dir", tmp_path)
    checkpoint = read_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint["step"] == 4 and all(v.isfinite().all() for v in checkpoint["model"].values())


def test_fault_29_on_a_gpu_no_step_is_taken_until_the_host_looks():
    model = torch.nn.Linear(2, 2)
    guard, optimizer = train.Guard(torch.device("cpu")), torch.optim.AdamW(model.parameters(), fused=True)
    for step, norm in ((1, 1.0), (2, float("inf")), (3, 1.0)):
        model(torch.ones(1, 2)).sum().backward()
        before = model.weight.clone()
        guard.watch(optimizer, torch.tensor(norm), step)
        optimizer.step()
        assert torch.equal(before, model.weight) == (step > 1)
    assert guard.failed == 2


def test_fault_30_a_scale_pinned_at_its_bound_is_warned_of_once(tmp_path, capsys):
    flags = ["--samples", 200, "--batch_size", 8, "--log_every", 1, "--workers", 0, "--device", "cpu", "--eval_every", 1000, "--lr", 0]
    in_process(*flags, "--max_logit_scale", 2, "--out_dir", tmp_path)
    assert capsys.readouterr().out.count("warning: logit_scale has been at its bound") == 1


def test_best_checkpoint_is_kept_beside_the_last(tmp_path, monkeypatch):
    scores = iter([0.2, 0.5, 0.3, 0.1])
    monkeypatch.setattr(train, "held_out_figures", lambda *args: dict(val_mean_r1=next(scores)))
    in_process(*SHORT, "--eval_every", 2, "--out_dir", tmp_path)
    best, last = (read_checkpoint(tmp_path / f"{name}.pt") for name in ("best", "ckpt"))
    assert (best["step"], best["best"], last["step"], last["best"]) == (4, 0.5, 8, 0.5)


# everything at once

def mutate(raw, rng):
    """Bit flips, a truncation, or a splice of itself."""
    raw, kind = bytearray(raw), rng.randrange(3)
    if kind == 0:
        for _ in range(rng.randrange(1, 20)):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del raw[rng.randrange(len(raw)):]
    else:
        a, b, n = rng.randrange(len(raw)), rng.randrange(len(raw)), rng.randrange(1, 2000)
        raw[a:a + n] = raw[b:b + n]
    return bytes(raw)


@pytest.mark.parametrize("kind", ["tar", "jpeg", "caption", "checkpoint"])
def test_fuzz(tmp_path, kind, monkeypatch, capsys):
    """A sentence or a count, never a hang or a crash: 25 mutations of each kind here, FUZZ=500 for two thousand in all."""
    count, rng = int(os.environ.get("FUZZ", 25)), random.Random(f"fuzz {kind}")
    signal.alarm(60 + count)
    if kind == "checkpoint":
        monkeypatch.setitem(train.PRESETS, "tiny", train.PRESETS["tiny"] | dict(image_size=16, vision_layers=1, text_layers=1, embed_dim=16))
        in_process(*SHORT, "--out_dir", tmp_path)
    samples = [(encoded(photo(40 + i, 30 + 2 * i), "JPEG"), f"a caption {i}".encode()) for i in range(12)]
    members = [(f"{i}.{k}", content) for i, s in enumerate(samples) for k, content in zip(("jpg", "txt"), s)]
    whole = open(tar_of(tmp_path / "whole.tar", members), "rb").read()
    for _ in range(count):
        path = tmp_path / "mutated.tar"
        if kind == "checkpoint":
            path.write_bytes(mutate((tmp_path / "ckpt.pt").read_bytes(), rng))
            try:
                load_model(path)   # a flipped bit of a weight is no fault of the file
            except ValueError as error:
                assert "mutated.tar" in str(error)
            continue
        if kind == "tar":
            path.write_bytes(mutate(whole, rng))
        else:
            tar_of(path, [(n, mutate(c, rng) if n.endswith("jpg" if kind == "jpeg" else "txt") else c) for n, c in members])
        try:
            stream, seen = Batches(str(path), 1, 16, "bytes", 77), 0
            for batch in stream:
                if stream.state[0][1][0]:   # the second pass
                    break
                seen += 1
        except ValueError as error:
            assert "cannot be used" in str(error) or "mutated.tar" in str(error)
            continue
        if kind != "tar":
            indexed = len(data.index_shard(path)[0])
            assert indexed == 12 and seen <= 12 and (seen == 12 or sum(stream.skipped.values()) >= 12 - seen)
        else:
            assert seen == 12 or stream.skipped or stream.warned, "samples are gone and nobody says so"
