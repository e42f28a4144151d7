"""train.py: schedules, flags, short runs of everything, resuming, several processes."""

import io
import math
import signal
import sys
from dataclasses import fields

import pytest
import torch
from common import (
    CONES, SHORT, at_step, encoded, in_process, log_of, losses_of, photo, run_train, same_weights,
    saved, save_ours, signal_at, small, some_shards, two_processes,
)

import train
from data import shuffled
from model import load_model

pytestmark = pytest.mark.usefixtures("few_held_out")
STOPPED = "stopped after step {}; resume the run with --resume"

# ------------------------------------------------------------------------------------------------
# schedules and flags


def test_the_learning_rate_rises_linearly_and_falls_to_zero_as_a_cosine():
    rates = [train.learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 0.001


def test_the_minimum_radius_is_constant_or_changes_linearly_to_its_last_value():
    assert train.min_radius(5, 11, 0.3, None) == 0.3
    radii = [train.min_radius(step, 11, 0.3, 0.1) for step in (0, 5, 10)]
    assert radii == pytest.approx([0.3, 0.2, 0.1])


def test_only_matrices_decay():
    model = small("hyperbolic")
    decay, free = train.build_optimizer(model, train.TrainConfig()).param_groups
    assert decay["weight_decay"] == 0.2 and free["weight_decay"] == 0
    assert free["eps"] == 1e-6 and free["betas"] == (0.9, 0.98)
    name_of = {id(p): name for name, p in model.named_parameters()}
    free = {name_of[id(p)] for p in free["params"]}
    some = {"logit_scale", "alpha_img", "curvature", "visual.class_embedding", "ln_final.weight"}
    assert some <= free
    matrices = ("conv1.weight", "in_proj_weight", "positional_embedding", "proj")
    assert not [name for name in free if name.endswith(matrices)]


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    shown = capsys.readouterr().out
    for f in fields(train.TrainConfig):
        assert f"\n  --{f.name}" in shown and f.metadata["help"]


def test_hyphens_are_taken_for_underscores(tmp_path):
    flags = ["--batch-size", "16", "--entailment-weight=0.5", "--no-final_ln"]
    c, _ = train.parse_args([*flags, f"--out-dir={tmp_path}/my-run"])
    assert (c.batch_size, c.entailment_weight, c.final_ln) == (16, 0.5, False)
    assert c.out_dir == f"{tmp_path}/my-run"


BAD_FLAGS = [
    ("--geometry flat", "clip, euclidean, hyperbolic"),
    ("--geometry clip --logit squared", "cosine, arc"),
    ("--geometry clip --entailment_weight 0.2", "needs cones"),
    ("--entailment_weight -1", "--entailment_weight"),
    ("--model huge", "ViT-B-32"),
    ("--batch_size 1", "at least 2"),
    ("--micro_batch 3", "3 does not divide the 8"),
    ("--samples 7", "less than one batch of 8"),
    ("--warmup 8", "--warmup 8 must be less than the 8 steps"),
    ("--lr -1", "--lr"),
    ("--lr inf", "--lr"),
    ("--min_radius nan", "--min_radius"),
    ("--beta2 1", "--beta2"),
    ("--crop_scale 0", "--crop_scale"),
    ("--max_logit_scale 0", "--max_logit_scale"),
    ("--save_every 0", "--save_every"),
    ("--dtype float8", "bfloat16"),
    ("--device quantum", "--device quantum"),
    ("--seed -1", "--seed"),
    (f"--seed {2**64}", "--seed"),
    ("--data nowhere/0.tar", "nowhere/0.tar"),
    ("--val_data nowhere", "nowhere"),
    ("--tokenizer klingon", "Unknown encoding klingon"),
    ("--init_from nowhere.pt", "nowhere.pt"),
    ("--init_from nowhere.pt --model tiny", "remove --model"),
]


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_bad_flags_are_refused_before_the_folder_is_made(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        in_process(*SHORT, "--out_dir", tmp_path / "out", *flags.split())
    assert not (tmp_path / "out").exists()


def test_the_largest_seed_works(tmp_path):
    in_process(*SHORT, "--samples", 8, "--seed", 2**63 - 1, "--out_dir", tmp_path)
    assert saved(tmp_path)["step"] == 1


@pytest.mark.parametrize("flags", ["--no_such_flag 1", "--lr fast", "--geometry flat", "--lr -1"])
def test_a_refusal_is_one_line_with_status_2(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["train.py", "--out_dir", str(tmp_path), *flags.split()])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------
# one run


@pytest.mark.parametrize("geometry", ["clip", "euclidean", "hyperbolic"])
def test_a_short_run_logs_everything_and_saves_what_evaluate_reads(tmp_path, geometry, capsys):
    weight = 0 if geometry == "clip" else 0.2
    flags = ["--geometry", geometry, "--entailment_weight", weight, "--eval_every", 8]
    in_process(*SHORT, *flags, "--out_dir", tmp_path)
    *steps, held_out = log_of(tmp_path)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6, 7, 8]
    wanted = {"loss", "contrastive", "text_radius", "image_radius", "grad_norm", "logit_scale",
              "curvature", "lr", "samples_per_second", "skipped"}
    for line in steps:
        assert wanted <= set(line) and ("in_cone" in line) == ("entailment" in line) == (weight > 0)
        total = line["contrastive"] + weight * line.get("entailment", 0)
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert math.log(8) / 2 < steps[0]["contrastive"] < 3 * math.log(8)
    assert held_out["step"] == 8
    assert {"val_top1", "val_i2t_r1", "val_t2i_r10", "val_mean_r1"} <= set(held_out)
    model = load_model(tmp_path / "ckpt.pt")
    assert model.config.geometry == geometry and model.train_config["data"] == "shapes"
    assert "ln(8) = 2.079" in capsys.readouterr().out


def test_the_first_and_the_last_step_are_reported_beside_every_nth(tmp_path):
    in_process(*SHORT, "--log_every", 3, "--out_dir", tmp_path)
    assert [line["step"] for line in log_of(tmp_path) if "loss" in line] == [1, 3, 6, 8]


def console_of(capsys):
    """What a run has printed -> its lines, its reports. Paths must be short: no path is cut."""
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    return lines, [line for line in lines if line.startswith("step") and "loss" in line]


def test_the_console_shows_cones_only_if_their_loss_has_a_weight(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for weight in (0, 0.2):
        flags = ["--geometry", "hyperbolic", "--entailment_weight", weight]
        in_process(*SHORT, *flags, "--out_dir", f"out{weight}")
        _, reports = console_of(capsys)
        assert len(reports) == 8 and "samples/s" in reports[0] and "left" in reports[0]
        assert [("in cone" in line, "entailment" in line) for line in reports] == 8 * [
            (weight > 0, weight > 0)]


def test_the_console_shows_skipped_samples_and_one_name_of_each_kind(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    some_shards(tmp_path / "shards")
    in_process(*SHORT, *CONES, "--data", "shards/{0..4}.tar", "--out_dir", "out")
    lines, reports = console_of(capsys)
    skipped = saved("out")["skipped"]
    assert sum(skipped.values()) > 1 and reports[-1].endswith(f"skipped {sum(skipped.values())}")
    names = [line for line in lines if line.startswith("skipping")]
    assert len(names) == len(skipped)
    assert all("shards/" in name and name.endswith(tuple(skipped)) for name in names)


@pytest.mark.parametrize("digits", [1, 7])
def test_a_report_of_a_long_run_fits_100_columns(digits, capsys):
    """Of three days or for ever, and millions of steps, with cones and skipped samples."""
    means = {"loss": 12.3456, "entailment": 1.234, "in_cone": 1.0, "lr": 1.5e-4,
             "samples_per_second": 123_456, "skipped": 10**digits - 1}
    for seconds in (3 * 24 * 3600 + 1, 1e20):
        text = train.describe_step(means, 0.2, seconds)
        train.report(io.BytesIO(), 1, 10**digits - 1, means, text)
        console_of(capsys)


def test_the_loss_falls(tmp_path):
    flags = ["--samples", 960, "--batch_size", 16, "--lr", 2e-3, "--workers", 0, "--device", "cpu"]
    in_process(*flags, *CONES, "--eval_every", 1000, "--out_dir", tmp_path)
    losses = [line["contrastive"] for line in log_of(tmp_path) if "loss" in line]
    assert losses[-1] < 0.8 * math.log(16)


def test_micro_batches_change_the_memory_and_not_the_run(tmp_path):
    for size in (0, 2):
        in_process(*SHORT, *CONES, "--micro_batch", size, "--out_dir", tmp_path / str(size))
    whole, parts = losses_of(tmp_path / "0"), losses_of(tmp_path / "2")
    assert len(whole) == 8 and parts == pytest.approx(whole, rel=1e-5)


def test_init_from_loads_the_weights_and_sizes_of_a_checkpoint(tmp_path):
    other = small("hyperbolic")
    save_ours(tmp_path / "other.pt", other)
    flags = [*SHORT, *CONES, "--init_from", tmp_path / "other.pt", "--lr", 0]
    in_process(*flags, "--out_dir", tmp_path)
    weights = saved(tmp_path)["state_dict"]
    for name, weight in other.state_dict().items():
        assert torch.equal(weight, weights[name])
    with pytest.raises(ValueError, match="hyperbolic, not clip"):
        in_process(*SHORT, *flags[-4:], "--geometry", "clip", "--out_dir", tmp_path / "new")


# ------------------------------------------------------------------------------------------------
# stopping and resuming


def test_an_occupied_folder_is_refused_and_a_resumed_run_must_agree(tmp_path):
    in_process(*SHORT, "--out_dir", tmp_path)
    with pytest.raises(ValueError, match="--resume.*--out_dir"):
        in_process(*SHORT, "--out_dir", tmp_path)
    for name, value in (("geometry", "clip"), ("model", "ViT-S-16"), ("seed", 1), ("beta2", 0.9),
                        ("tokenizer", "gpt2"), ("batch_size", 16)):
        with pytest.raises(ValueError, match=f"--{name} .*not {value}"):
            in_process("--resume", "--out_dir", tmp_path, f"--{name}", value)


def test_resume_starts_in_an_empty_folder_and_leaves_a_finished_run_alone(tmp_path, capsys):
    in_process(*SHORT, "--resume", "--out_dir", tmp_path)
    assert "starting afresh" in capsys.readouterr().out
    before = (tmp_path / "ckpt.pt").read_bytes()
    in_process("--resume", "--out_dir", tmp_path)
    assert "already complete: 8 steps" in capsys.readouterr().out
    in_process("--resume", "--samples", 2 * 8, "--out_dir", tmp_path)  # fewer than it has seen
    assert "already complete: 8 steps" in capsys.readouterr().out
    assert (tmp_path / "ckpt.pt").read_bytes() == before and len(losses_of(tmp_path)) == 8


def test_a_resumed_run_has_its_old_flags_except_explicit_ones(tmp_path, capsys):
    in_process(*SHORT, "--lr", 1e-3, "--out_dir", tmp_path)
    flags = ["--samples", 96, "--grad_clip", 2, "--log_every", 2, "--workers", 0]
    in_process("--resume", "--out_dir", tmp_path, *flags)
    assert "resuming after step 8" in capsys.readouterr().out
    c = saved(tmp_path)["train_config"]
    assert (c["samples"], c["grad_clip"], c["log_every"]) == (96, 2, 2)
    assert (c["lr"], c["batch_size"], c["save_every"]) == (1e-3, 8, 4)
    assert [line["step"] for line in log_of(tmp_path) if "loss" in line][8:] == [10, 12]


@pytest.mark.parametrize("samples, now", [(64, "0.00035"), (640, "0.001")])
def test_a_resumed_run_says_the_learning_rate_before_and_now(
    tmp_path, monkeypatch, capsys, samples, now
):
    """Of 8 steps, step 3 has the peak rate, step 5 has 0.65 of it, and step 6 has 0.35. Of 80
    steps, step 6 has 0.996."""
    signal_at(monkeypatch, step=6)
    in_process(*SHORT, "--lr", 1e-3, "--out_dir", tmp_path)
    signal_at(monkeypatch, step=8 if samples == 640 else 100)
    in_process("--resume", "--samples", samples, "--workers", 0, "--out_dir", tmp_path)
    assert f"a learning rate of 0.00065, next {now}\n" in capsys.readouterr().out


@pytest.mark.parametrize("geometry, source, workers", [
    ("clip", "shapes", 0), ("euclidean", "shards", 2), ("hyperbolic", "shapes", 1),
])
def test_a_stopped_and_resumed_run_equals_the_undisturbed_one_bit_for_bit(
    tmp_path, geometry, source, workers, monkeypatch
):
    source = source if source == "shapes" else some_shards(tmp_path)
    flags = [*SHORT, "--geometry", geometry, "--data", source]
    in_process(*flags, "--out_dir", tmp_path / "whole")
    signal_at(monkeypatch, step=5)
    in_process(*flags, "--workers", workers, "--out_dir", tmp_path / "parts")
    assert saved(tmp_path / "parts")["step"] == 5
    in_process("--resume", "--workers", 0, "--out_dir", tmp_path / "parts")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")
    skipped = saved(tmp_path / "whole")["skipped"]
    assert skipped == saved(tmp_path / "parts")["skipped"] and bool(skipped) == (source != "shapes")


def test_a_checkpoint_of_the_version_before_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    """Its train_config has three more flags, and it does not contain the number of samples."""
    in_process(*SHORT, *CONES, "--out_dir", tmp_path / "whole")
    signal_at(monkeypatch, step=5)
    in_process(*SHORT, *CONES, "--out_dir", tmp_path / "parts")
    checkpoint = saved(tmp_path / "parts")
    checkpoint["train_config"] |= {"quick_gelu": None, "vision_heads": None, "text_heads": None}
    del checkpoint["data_size"]
    torch.save(checkpoint, tmp_path / "parts" / "ckpt.pt")
    in_process("--resume", "--workers", 0, "--out_dir", tmp_path / "parts")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_a_flag_of_a_newer_version_is_refused_by_name(tmp_path):
    in_process(*SHORT, "--samples", 8, "--out_dir", tmp_path)
    checkpoint = saved(tmp_path)
    checkpoint["train_config"]["warp_factor"] = 9
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="ckpt.pt: .*warp_factor"):
        in_process("--resume", "--samples", 64, "--out_dir", tmp_path)


def test_a_run_from_other_weights_is_resumed_by_its_own_command(tmp_path):
    in_process(*SHORT, "--out_dir", tmp_path / "first")
    flags = ["--init_from", tmp_path / "first/ckpt.pt", "--init_logit_scale", 1.0, "--resume"]
    for samples in (16, 32):
        in_process(*SHORT, *flags, "--samples", samples, "--out_dir", tmp_path / "second")
    assert saved(tmp_path / "second")["step"] == 4


ONE, TWO = b'{"step": 1, "loss": 2.5}', b'{"step": 2, "loss": 2.4}'
THREE, TWENTY = b'{"step": 3, "loss": 2.3}', b'{"step": 20, "loss": 2.2}'
NOTE, FOREIGN = b"# the learning rate was too high", b'{"a": 1, "step": 3}'


@pytest.mark.parametrize("log, kept", [
    ([], []),
    ([ONE, b"\n", TWO, b"\n"], [ONE, b"\n", TWO, b"\n"]),
    ([ONE, b"\n", TWO, b"\n", THREE, b"\n", TWENTY, b"\n"], [ONE, b"\n", TWO, b"\n"]),
    ([ONE, b"\r\n", TWO, b"\r\n", THREE, b"\r\n"], [ONE, b"\r\n", TWO, b"\r\n"]),
    ([ONE, b"\n", TWO], [ONE, b"\n", TWO, b"\n"]),
    ([NOTE, b"\n", ONE, b"\n", TWO, b"\n"], [NOTE, b"\n", ONE, b"\n", TWO, b"\n"]),
    ([ONE, b"\n", THREE, b"\n", NOTE], [ONE, b"\n", NOTE, b"\n"]),
    ([ONE, b"\n", THREE[:15]], [ONE, b"\n"]),
    ([ONE, b"\n", b"\xff}\n", TWO, b"\n"], [ONE, b"\n", b"\xff}\n", TWO, b"\n"]),
    ([FOREIGN, b"\n", ONE, b"\n"], [FOREIGN, b"\n", ONE, b"\n"]),
])
def test_resuming_after_step_2_drops_later_reports_and_no_other_lines(log, kept, tmp_path):
    """Line ends of Windows, notes, a missing last line end, half a line: all are kept but reports
    of step 3 and beyond."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(log))
    train.open_log(path, 2).close()
    assert path.read_bytes() == b"".join(kept)


def test_the_log_of_a_resumed_run_contains_each_step_once(tmp_path, monkeypatch):
    signal_at(monkeypatch, step=5, number=signal.SIGUSR1)
    in_process(*SHORT, "--out_dir", tmp_path)
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'{"step": 6, "loss": 99}\n{"step": 7, "lo')
    in_process("--resume", "--workers", 0, "--out_dir", tmp_path)
    assert [line["step"] for line in log_of(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert max(losses_of(tmp_path)) < 99


# ------------------------------------------------------------------------------------------------
# several processes. They add numbers in another order, so runs are not equal to the bit


def test_two_processes_with_micro_batches_do_the_same_run_as_one_without(tmp_path):
    """The last of seven held-out images is broken."""
    for i in range(7):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(photo(40, 50, seed=i), "JPEG") * (i < 6))
        (tmp_path / f"{i}.txt").write_text(f"image {i}")
    flags = [*SHORT, *CONES, "--val_data", tmp_path]
    in_process(*flags, "--out_dir", tmp_path / "one")
    (status, out, error), (second_status, second_out, _) = two_processes(
        *flags, "--micro_batch", 2, "--out_dir", tmp_path / "two")
    assert (status, second_status) == (0, 0), error
    assert "2 processes" in out and second_out == ""
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(two) == 9
    for a, b in zip(one, two):
        for name in set(a) - {"samples_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), (name, a["step"])


def test_one_process_resumes_what_two_with_two_workers_each_have_stopped(tmp_path):
    """The second process gets the signal."""
    flags = [*SHORT, "--lr", 3e-4, "--data", some_shards(tmp_path)]
    in_process(*flags, "--out_dir", tmp_path / "whole")
    stop = at_step(5, "if train.rank() == 1: os.kill(os.getpid(), signal.SIGTERM)")
    flags += ["--workers", 2, "--out_dir", tmp_path / "parts"]
    (status, out, error), (second_status, _, _) = two_processes(*flags, code=stop)
    assert (status, second_status) == (0, 0), error
    assert STOPPED.format(5) in out and saved(tmp_path / "parts")["step"] == 5
    in_process("--resume", "--workers", 0, "--out_dir", tmp_path / "parts")
    whole, parts = losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts")
    assert len(whole) == 8 and parts == pytest.approx(whole, rel=1e-6)
    assert saved(tmp_path / "whole")["skipped"] == saved(tmp_path / "parts")["skipped"]


def test_a_sample_that_only_the_second_process_skips_is_counted_and_named(tmp_path):
    """In the first and only batch of 8 samples, the second process takes positions 4 to 7."""
    broken = shuffled(6, 8, seed=0)
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(photo(seed=i), "JPEG") * (i != broken))
        (tmp_path / f"{i}.txt").write_text(f"image {i}")
    flags = [*SHORT, "--samples", 8, "--data", tmp_path, "--out_dir", tmp_path / "out"]
    (status, _, error), (_, out, _) = two_processes(*flags)
    assert status == 0, error
    assert log_of(tmp_path / "out")[0]["skipped"] == 1
    assert sum(saved(tmp_path / "out")["skipped"].values()) == 1
    assert f"skipping {broken}.jpg" in out.replace(f"{tmp_path}/", "")
