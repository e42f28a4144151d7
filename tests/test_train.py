"""train.py: schedules, flags, short runs of everything, refusals, stopping and resuming."""

import math
import os
import signal
from dataclasses import fields

import pytest
import torch
from common import (
    ROOT, SHORT, encoded, in_process, log_of, losses_of, photo, run_train, running, same_weights,
    saved, signal_at, small, some_shards, torchrun, train_script,
)  # fmt: skip

import train
from model import load_model

pytestmark = pytest.mark.usefixtures("few_held_out")
CONES = ["--geometry", "hyperbolic", "--entailment_weight", "0.2"]


def test_the_learning_rate_rises_linearly_and_falls_to_zero_by_a_cosine():
    rates = [train.learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 0.001


def test_the_minimum_radius_stays_or_goes_linearly_to_its_last_value():
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


def test_every_flag_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    shown = capsys.readouterr().out
    for f in fields(train.TrainConfig):
        assert f"--{f.name}" in shown and f.metadata["help"]


@pytest.mark.parametrize("flags, message", [
    ("--geometry flat", "clip, euclidean, hyperbolic"),
    ("--geometry clip --logit squared", "cosine, arc"),
    ("--geometry clip --entailment_weight 0.2", "needs cones"),
    ("--entailment_weight -1", "--entailment_weight"),
    ("--model huge", "ViT-B-32"),
    ("--batch_size 1", "at least 2"),
    ("--micro_batch 3", "3 does not divide the 8"),
    ("--samples 7", "less than one batch of 8"),
    ("--warmup 8", "nothing of 8 steps"),
    ("--lr -1", "--lr"),
    ("--min_radius nan", "--min_radius"),
    ("--beta2 1", "--beta2"),
    ("--crop_scale 0", "--crop_scale"),
    ("--max_logit_scale 0", "--max_logit_scale"),
    ("--dtype float8", "float32 or bfloat16"),
    ("--device quantum", "--device quantum"),
    ("--data nowhere/0.tar", "nowhere/0.tar"),
    ("--val_data nowhere", "nowhere"),
    ("--tokenizer klingon", "bytes, clip"),
    ("--vision_heads 3", "heads"),
    ("--init_from nowhere.pt", "nowhere.pt"),
])  # fmt: skip
def test_bad_arguments_are_refused_before_the_first_step(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        in_process(*SHORT, "--out_dir", tmp_path / "out", *flags.split())
    assert not (tmp_path / "out" / "ckpt.pt").exists()


def test_the_program_refuses_in_one_sentence_with_status_2(tmp_path):
    done = run_train("--geometry", "flat", "--out_dir", tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    for flags in (["--no_such_flag", "1"], ["--lr", "fast"]):
        with pytest.raises(SystemExit) as end:
            train.parse_args(flags)
        assert end.value.code == 2


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
              "curvature", "lr", "samples_per_second", "skipped"}  # fmt: skip
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


def test_the_loss_falls(tmp_path):
    flags = ["--samples", 1920, "--batch_size", 32, "--lr", 1e-3, "--workers", 0, "--device", "cpu"]
    in_process(*flags, *CONES, "--eval_every", 1000, "--out_dir", tmp_path)
    losses = [line["contrastive"] for line in log_of(tmp_path) if "loss" in line]
    assert losses[-1] < 0.8 * math.log(32)


def test_micro_batches_change_the_memory_and_not_the_run(tmp_path):
    for size in (0, 2):
        in_process(*SHORT, *CONES, "--micro_batch", size, "--out_dir", tmp_path / str(size))
    whole, parts = losses_of(tmp_path / "0"), losses_of(tmp_path / "2")
    assert len(whole) == 8 and parts == pytest.approx(whole, rel=1e-5)


def test_init_from_takes_the_weights_and_sizes_of_a_file(tmp_path):
    theirs = small("hyperbolic")
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "theirs.pt")
    flags = [*SHORT, *CONES, "--init_from", tmp_path / "theirs.pt", "--tokenizer", "bytes"]
    in_process(*flags, "--lr", 0, "--out_dir", tmp_path)
    ours = saved(tmp_path)["state_dict"]
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, ours[name])


def test_init_from_asks_for_what_the_file_does_not_say_and_the_run_keeps_it(tmp_path):
    theirs = small("euclidean", vision_width=96, vision_heads=3)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "theirs.pt")
    flags = [*SHORT, "--init_from", tmp_path / "theirs.pt", "--tokenizer", "bytes", "--quick_gelu"]
    with pytest.raises(ValueError, match="--vision_heads"):
        in_process(*flags, "--out_dir", tmp_path)
    in_process(*flags, "--vision_heads", 3, "--out_dir", tmp_path)
    config = load_model(tmp_path / "ckpt.pt").config
    assert config.vision_heads == 3 and config.quick_gelu


# ------------------------------------------------------------------------------------------------
# stopping and resuming


def test_an_occupied_folder_is_refused_and_a_resumed_run_must_agree(tmp_path):
    in_process(*SHORT, "--out_dir", tmp_path)
    with pytest.raises(ValueError, match="--resume.*--out_dir"):
        in_process(*SHORT, "--out_dir", tmp_path)
    for name, value in (("geometry", "clip"), ("model", "ViT-S-16"), ("seed", 1), ("data", "x.csv"),
                        ("tokenizer", "gpt2"), ("batch_size", 16)):  # fmt: skip
        with pytest.raises(ValueError, match=f"--{name} .*not {value}"):
            in_process("--resume", "--out_dir", tmp_path, f"--{name}", value)


def test_resume_starts_in_an_empty_folder_and_leaves_a_finished_run_alone(tmp_path, capsys):
    in_process(*SHORT, "--resume", "--out_dir", tmp_path)
    assert "starting afresh" in capsys.readouterr().out
    before = (tmp_path / "ckpt.pt").read_bytes()
    in_process("--resume", "--out_dir", tmp_path)
    assert "already complete: 8 steps" in capsys.readouterr().out
    assert (tmp_path / "ckpt.pt").read_bytes() == before and len(losses_of(tmp_path)) == 8


def test_a_resumed_run_has_its_old_flags_except_those_given(tmp_path):
    in_process(*SHORT, "--lr", 1e-3, "--out_dir", tmp_path)
    flags = ["--samples", 96, "--grad_clip", 2, "--log_every", 2, "--workers", 0]
    in_process("--resume", "--out_dir", tmp_path, *flags)
    c = saved(tmp_path)["train_config"]
    assert (c["samples"], c["grad_clip"], c["log_every"]) == (96, 2, 2)
    assert (c["lr"], c["batch_size"], c["save_every"]) == (1e-3, 8, 4)
    assert [line["step"] for line in log_of(tmp_path) if "loss" in line][8:] == [10, 12]


@pytest.mark.parametrize("geometry", ["clip", "euclidean", "hyperbolic"])
@pytest.mark.parametrize("source, workers", [("shapes", 0), ("shards", 2)])
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


@pytest.mark.parametrize("end", ['{"step": 7, "lo', "\xff}\n", '{"a": 1}\n'])
def test_a_resumed_log_ends_at_the_checkpoint_or_where_damage_begins(end, tmp_path, monkeypatch):
    signal_at(monkeypatch, step=5, number=signal.SIGUSR1)
    in_process(*SHORT, "--out_dir", tmp_path)
    with open(tmp_path / "log.jsonl", "a", encoding="latin-1") as file:
        file.write('{"step": 6, "loss": 99}\n' + end)
    in_process("--resume", "--workers", 0, "--out_dir", tmp_path)
    assert [line["step"] for line in log_of(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert max(losses_of(tmp_path)) < 99


def test_a_second_sigterm_changes_nothing(tmp_path, monkeypatch):
    """Schedulers signal all processes, and torchrun passes its own on."""
    signal_at(monkeypatch, step=5, times=2)
    in_process(*SHORT, "--out_dir", tmp_path)
    assert saved(tmp_path)["step"] == 5


def test_a_finished_run_is_complete_also_for_fewer_samples(tmp_path, capsys):
    in_process(*SHORT, "--out_dir", tmp_path)
    in_process("--resume", "--samples", 2 * 8, "--out_dir", tmp_path)
    assert "already complete: 8 steps" in capsys.readouterr().out


def test_a_run_from_other_weights_goes_on_with_its_own_command(tmp_path):
    in_process(*SHORT, "--out_dir", tmp_path / "first")
    flags = ["--init_from", tmp_path / "first/ckpt.pt", "--init_logit_scale", 1.0, "--resume"]
    for samples in (16, 32):
        in_process(*SHORT, *flags, "--samples", samples, "--out_dir", tmp_path / "second")
    assert saved(tmp_path / "second")["step"] == 4


def test_ctrl_c_saves_and_ends_with_status_0(tmp_path):
    """A terminal sends it to all processes, the loading ones, too."""
    flags = ["--samples", 1_000_000, "--batch_size", 8, "--log_every", 1, "--workers", 1]
    with running(*flags, "--device", "cpu", "--out_dir", tmp_path) as process:
        next(line for line in process.stdout if line.startswith("step"))
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and "go on with --resume" in out and "Traceback" not in err
    assert saved(tmp_path)["step"] >= 1


# ------------------------------------------------------------------------------------------------
# several processes. Their sums have another order, so runs are not equal to the bit


def test_two_processes_with_micro_batches_do_the_same_run_as_one_without(tmp_path):
    """In evaluation, too. The last of seven held-out pictures is broken."""
    for i in range(7):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(photo(40, 50, seed=i), "JPEG") * (i < 6))
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    flags = [*SHORT, *CONES, "--val_data", tmp_path]
    in_process(*flags, "--out_dir", tmp_path / "one")
    flags += ["--micro_batch", 2, "--out_dir", tmp_path / "two"]
    done = torchrun(2, ROOT / "train.py", *flags)
    assert done.returncode == 0, done.stderr
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(two) == 9
    for a, b in zip(one, two):
        for name in set(a) - {"samples_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), (name, a["step"])


def test_one_process_goes_on_where_two_with_other_workers_were_stopped(tmp_path):
    flags = [*SHORT, "--lr", 3e-4, "--data", some_shards(tmp_path)]
    in_process(*flags, "--out_dir", tmp_path / "whole")
    stop = "if rank() == 1: os.kill(os.getpid(), signal.SIGTERM)"
    script = train_script(tmp_path / "stopping.py", 5, stop)
    done = torchrun(2, script, *flags, "--workers", 2, "--out_dir", tmp_path / "parts")
    assert done.returncode == 0, done.stderr
    assert saved(tmp_path / "parts")["step"] == 5
    in_process("--resume", "--workers", 0, "--out_dir", tmp_path / "parts")
    whole, parts = losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts")
    assert len(whole) == 8 and parts == pytest.approx(whole, rel=1e-6)
    assert saved(tmp_path / "whole")["skipped"] == saved(tmp_path / "parts")["skipped"]
