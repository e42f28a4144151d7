"""What takes minutes: kill -9, fuzz, torch.compile. Run by hand, with SLOW=1 in the environment."""

import os
import random
import signal
import time

import pytest
from common import (
    ROOT, SHORT, at_step, encoded, in_process, losses_of, photo, run_train, running, same_weights,
    saved, torchrun, train_script, write_tar,
)

import data
import train
from model import load_model

pytestmark = [
    pytest.mark.usefixtures("few_held_out"),
    pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes minutes: set SLOW=1"),
    pytest.mark.seconds(3000),
]


def test_twenty_kills_around_saves_change_nothing(tmp_path):
    images, rng = tmp_path / "images", random.Random(0)
    images.mkdir()
    for i in range(8):
        (images / f"{i}.jpg").write_bytes(encoded(photo(48, 40 + i), "JPEG"))
        (images / f"{i}.txt").write_text(f"image {i}")
    flags = [*SHORT, "--data", images, "--samples", 800, "--save_every", 1]  # 100 steps
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, _, error = run_train(*flags, "--out_dir", whole)  # on one thread, as the others
    assert status == 0, error
    steps = []
    for _ in range(20):
        with running(*flags, "--resume", "--out_dir", killed) as program:
            next(line for line in program.stdout if line.startswith("step"))
            time.sleep(rng.random() * 0.1)
            program.send(signal.SIGKILL)
            program.process.join()
        if (killed / "ckpt.pt").exists():
            load_model(killed / "ckpt.pt")
            steps.append(saved(killed)["step"])
    print("killed after steps", steps)
    assert steps == sorted(steps) and 0 < steps[-1] < 100
    status, _, error = run_train("--resume", "--workers", 0, "--out_dir", killed)
    assert status == 0, error
    assert same_weights(whole, killed) and losses_of(whole) == losses_of(killed)


# ------------------------------------------------------------------------------------------------
# fuzz: a sentence or a count. Never a hang, a crash, or a loss that nobody hears of


def mutate(raw, rng):
    """Bits flipped, the end cut off, or a piece overwritten by another one."""
    raw, kind = bytearray(raw), rng.randrange(3)
    if kind == 0:
        for _ in range(rng.randrange(1, 20)):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del raw[rng.randrange(len(raw)) :]
    else:
        a, b, n = rng.randrange(len(raw)), rng.randrange(len(raw)), rng.randrange(1, 2000)
        raw[a : a + n] = raw[b : b + n]
    return bytes(raw)


def twelve_samples():
    """-> members of a tar: [(name, content)]."""
    members = []
    for i in range(12):
        members.append((f"{i}.jpg", encoded(photo(40 + i, 30 + 2 * i), "JPEG")))
        members.append((f"{i}.txt", f"a caption {i}".encode()))
    return members


def one_epoch(source):
    """-> captions of the samples that came as they are, number of the others."""
    captions = []
    for number in range(len(source)):
        skipped = {}
        image, caption = data.read_sample(source, number, 0, 16, 0.9, skipped)
        assert image.shape == (3, 16, 16)
        captions += [] if skipped else [caption]
    return captions, len(source) - len(captions)


def has_caption(content):
    """Whether a .txt is UTF-8 and not blank."""
    try:
        return bool(content.decode("utf-8-sig").replace("\0", " ").strip())
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("extension", ["jpg", "txt"])
def test_fuzzed_members_are_used_or_counted(tmp_path, extension):
    members, rng, total = twelve_samples(), random.Random(extension), 0
    for i in range(500):
        mutated, blank = [], 0
        for name, content in members:
            content = mutate(content, rng) if name.endswith(extension) else content
            mutated.append((name, content))
            blank += name.endswith("txt") and not has_caption(content)
        source = data.open_source(write_tar(tmp_path / f"{i}.tar", mutated))
        assert len(source) == 12 and not source.skipped
        captions, others = one_epoch(source)
        if extension == "jpg":  # each is its own sample
            assert len(set(captions)) == len(captions)
        else:
            assert others == blank
        total += others
    print(f"{total} of 6,000 samples skipped")
    assert total > 0


def test_a_fuzzed_tar_is_used_refused_or_counted(tmp_path):
    with open(write_tar(tmp_path / "whole.tar", twelve_samples()), "rb") as file:
        whole = file.read()
    rng, refused, told, silent = random.Random("tar"), 0, 0, 0
    for i in range(500):
        (tmp_path / f"{i}.tar").write_bytes(mutate(whole, rng))
        try:
            source = data.open_source(str(tmp_path / f"{i}.tar"))
        except ValueError as error:
            assert f"{i}.tar" in str(error)
            refused += 1
            continue
        captions, others = one_epoch(source)
        told += bool(source.skipped)
        silent += len(captions) < 12 and not source.skipped and not others
    print(f"{refused} refused, {told} told of damage, {silent} silent")
    assert silent == 0


def test_a_fuzzed_checkpoint_is_loaded_or_refused(tmp_path, monkeypatch):
    tiny = train.PRESETS["tiny"] | {"image_size": 16, "vision_layers": 1, "text_layers": 1}
    monkeypatch.setitem(train.PRESETS, "tiny", tiny)
    in_process(*SHORT, "--out_dir", tmp_path)
    whole, rng, refused = (tmp_path / "ckpt.pt").read_bytes(), random.Random("checkpoint"), 0
    for _ in range(500):
        (tmp_path / "mutated.pt").write_bytes(mutate(whole, rng))
        try:
            load_model(tmp_path / "mutated.pt")  # a flipped bit of a weight is no fault of the file
        except ValueError as error:
            assert "mutated.pt" in str(error)
            refused += 1
    print(f"{refused} of 500 refused")
    assert refused > 0


# ------------------------------------------------------------------------------------------------


def test_under_torchrun_a_refusal_is_printed_once(tmp_path):
    for flags, message in ((["--data", "nowhere"], "there is no file or folder"),
                           (["--no_such_flag", "1"], "unrecognized arguments")):
        done = torchrun(2, ROOT / "train.py", *SHORT, *flags, "--out_dir", tmp_path / "out")
        assert done.returncode != 0
        assert (done.stdout + done.stderr).count(message) == 1
        assert not (tmp_path / "out").exists()


def test_torchrun_shows_the_error_of_the_process_that_fails(tmp_path):
    code = at_step(3, "if train.rank() == 1: raise RuntimeError('the disk is on fire')")
    script = train_script(tmp_path / "failing.py", code)
    done = torchrun(2, script, *SHORT, "--samples", 1_000_000, "--out_dir", tmp_path)
    assert done.returncode != 0
    root_cause = done.stderr[done.stderr.rindex("Root Cause") :]
    assert "the disk is on fire" in root_cause


@pytest.mark.parametrize("micro_batch", [0, 2])
@pytest.mark.parametrize("geometry", ["clip", "euclidean", "hyperbolic"])
def test_compiled_bfloat16_on_two_processes_follows_eager_float32(tmp_path, geometry, micro_batch):
    """And once the sizes have been seen, nothing is compiled any more."""
    weight = 0 if geometry == "clip" else 0.2
    flags = [*SHORT, "--samples", 320, "--lr", 1e-4, "--save_every", 1000]  # 40 steps
    flags += ["--geometry", geometry, "--entailment_weight", weight]
    in_process(*flags, "--out_dir", tmp_path / "eager")
    half = at_step(21, "print('HALF OF ALL STEPS', file=sys.stderr)")
    script = train_script(tmp_path / "half.py", half)
    flags += ["--compile", "--dtype", "bfloat16", "--micro_batch", micro_batch]
    done = torchrun(
        2, script, *flags, "--out_dir", tmp_path / "compiled", timeout=2900, TORCH_LOGS="recompiles"
    )
    assert done.returncode == 0, done.stderr
    assert "does not work" not in done.stdout
    before, after = done.stderr.split("HALF OF ALL STEPS")[::2]
    eager, compiled = losses_of(tmp_path / "eager"), losses_of(tmp_path / "compiled")
    differences = [abs(a / b - 1) for a, b in zip(compiled, eager)]
    print(f"losses differ by {max(differences):.2%} at most, "
          f"{before.count('Recompiling')} recompilations")
    assert len(compiled) == 40 and max(differences) < 0.03
    assert "Recompiling" not in after
