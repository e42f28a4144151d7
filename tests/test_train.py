"""train.py: flags, schedules, one short run of everything, refusals, resuming."""

import math
import signal
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

import train
from model import load_model
from study import log_of
from test_model import ROOT, in_open_clips_layout, small, torchrun

SHORT = ["--samples", "64", "--batch_size", "8", "--log_every", "1", "--save_every", "4", "--eval_every", "1000", "--workers", "0", "--device", "cpu"]
pytestmark = pytest.mark.usefixtures("few_held_out")


def run(*args, timeout=100):
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, args)], capture_output=True, text=True, timeout=timeout)


def in_process(*args):
    """main() in this process -> exit status and what it printed to stderr is left to capsys."""
    c, given = train.parse([str(a) for a in args])
    train.train(c, given)


def same_weights(a, b):
    a, b = (torch.load(f / "ckpt.pt", weights_only=True) for f in (a, b))
    return all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"]) and a["step"] == b["step"]


def test_learning_rate_rises_linearly_and_falls_to_zero_by_a_cosine():
    rates = [train.learning_rate(s, 100, 1.0, 10) for s in range(100)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 0.001
    assert train.min_radius(0, 11, 0.3, 0.1) == 0.3 and train.min_radius(10, 11, 0.3, 0.1) == pytest.approx(0.1) and train.min_radius(5, 11, 0.3, None) == 0.3


def test_only_matrices_decay():
    model = small("hyperbolic")
    decayed, free = train.build_optimizer(model, train.TrainConfig()).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.2 and free["weight_decay"] == 0 and free["eps"] == 1e-6 and free["betas"] == (0.9, 0.98)
    exempt = {names[id(p)] for p in free["params"]}
    assert {"logit_scale", "alpha_image", "log_curv", "visual.class_embedding", "visual.ln_pre.weight", "text.transformer.resblocks.0.mlp.c_fc.bias"} <= exempt
    assert not any(n.endswith(("conv1.weight", "in_proj_weight", "positional_embedding")) for n in exempt)


def test_every_flag_has_a_help_text_and_a_default_of_its_type(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{f.name}" in shown and f.metadata["help"] for f in fields(train.TrainConfig))


@pytest.mark.parametrize("args,message", [
    (["--geometry", "flat"], "clip, euclidean, hyperbolic"), (["--geometry", "clip", "--logit", "squared"], "cosine, arc"),
    (["--geometry", "clip", "--entailment_weight", "0.2"], "needs cones"), (["--model", "huge"], "ViT-B-32"),
    (["--batch_size", "1"], "at least 2"), (["--micro_batch", "3"], "does not divide the 8"), (["--samples", "7"], "less than one batch"),
    (["--warmup", "8"], "leaves nothing of 8 steps"), (["--lr", "-1"], "--lr must be"), (["--entailment_weight", "-1"], "--entailment_weight must be"),
    (["--min_radius", "nan"], "--min_radius must be"), (["--dtype", "float8"], "float32 or bfloat16"), (["--device", "quantum"], "--device quantum"),
    (["--data", "nowhere/*.tar"], "nowhere/*.tar"), (["--data", "nowhere"], "nowhere"), (["--tokenizer", "klingon"], "bytes, clip")])
def test_fault_15_16_17_bad_arguments_are_refused_before_the_first_step(tmp_path, args, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        in_process(*SHORT, "--out_dir", tmp_path / "out", *args)
    assert not (tmp_path / "out" / "ckpt.pt").exists()


def test_fault_15_the_program_says_it_in_one_sentence_and_ends_with_status_2():
    done = run("--geometry", "flat")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.strip()
    for args in (["--no_such_flag", "1"], ["--lr", "fast"]):
        with pytest.raises(SystemExit) as end:
            train.parse(args)
        assert end.value.code == 2


@pytest.mark.parametrize("geometry", ["clip", "euclidean", "hyperbolic"])
def test_a_short_run_of_each_geometry_logs_everything_and_saves_what_evaluate_reads(tmp_path, geometry, capsys):
    cones = geometry != "clip"
    in_process(*SHORT, "--geometry", geometry, "--out_dir", tmp_path, "--eval_every", "8", *(["--entailment_weight", "0.2"] if cones else []))
    lines = log_of(tmp_path)
    steps, judged = [line for line in lines if "loss" in line], [line for line in lines if "val_top1" in line]
    assert [line["step"] for line in steps] == list(range(1, 9)) and len(judged) == 1 and judged[0]["step"] == 8
    wanted = {"loss", "contrastive", "grad_norm", "logit_scale", "curvature", "lr", "samples_per_second", "waiting", "text_radius", "image_radius"}
    assert all(wanted | ({"entailment", "inside"} if cones else set()) <= set(line) for line in steps)
    for line in steps:
        expected = line["contrastive"] + (0.2 * line["entailment"] if cones else 0)
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert 0.5 * math.log(8) < steps[0]["contrastive"] < 3 * math.log(8)
    model = load_model(tmp_path / "ckpt.pt")
    assert model.config.geometry == geometry and model.recipe["data"] == "shapes"
    assert "ln(8) = 2.079" in capsys.readouterr().out


def test_the_loss_falls(tmp_path):
    in_process("--samples", 3200, "--batch_size", 32, "--lr", 3e-3, "--workers", 0, "--device", "cpu", "--eval_every", 10_000, "--out_dir", tmp_path)
    losses = [line["loss"] for line in log_of(tmp_path) if "loss" in line]
    assert losses[-1] < 0.8 * math.log(32)


def test_fault_22_an_occupied_folder_is_refused_and_resume_must_agree(tmp_path):
    in_process(*SHORT, "--out_dir", tmp_path)
    with pytest.raises(ValueError, match="--resume.*--out_dir"):
        in_process(*SHORT, "--out_dir", tmp_path)
    with pytest.raises(ValueError, match="--geometry euclidean, not clip"):
        in_process("--out_dir", tmp_path, "--resume", "--geometry", "clip")


def test_resuming_a_finished_run_says_so_and_an_empty_folder_starts_afresh(tmp_path, capsys):
    in_process(*SHORT, "--out_dir", tmp_path, "--resume")
    assert "starting afresh" in capsys.readouterr().out
    in_process("--out_dir", tmp_path, "--resume")
    assert "already complete: 8 steps" in capsys.readouterr().out


class StopAfter:
    """Stands in for StopSignals: a signal arrives during step n."""
    def __init__(self, n):
        self.n = n

    @property
    def received(self):
        self.n -= 1
        return self.n == 0


@pytest.mark.parametrize("geometry", ["clip", "euclidean", "hyperbolic"])
def test_a_run_that_was_stopped_and_resumed_equals_the_undisturbed_run_bit_for_bit(tmp_path, geometry, monkeypatch):
    flags = [*SHORT, "--geometry", geometry]
    in_process(*flags, "--out_dir", tmp_path / "whole")
    monkeypatch.setattr(train, "StopSignals", lambda: StopAfter(5))
    in_process(*flags, "--out_dir", tmp_path / "parts")
    assert torch.load(tmp_path / "parts" / "ckpt.pt", weights_only=True)["step"] == 5
    monkeypatch.setattr(train, "StopSignals", lambda: StopAfter(-1))
    in_process("--resume", "--out_dir", tmp_path / "parts")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    losses = [[line["loss"] for line in log_of(tmp_path / name) if "loss" in line] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_sigterm_saves_and_ends_cleanly(tmp_path):
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--samples", "1000000", "--batch_size", "8", "--log_every", "1", "--eval_every", "100000",
                                "--workers", "1", "--device", "cpu", "--out_dir", str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        next(line for line in process.stdout if line.startswith("step"))
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "go on with --resume" in out
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] >= 1


def test_init_from_starts_with_the_weights_and_sizes_of_a_file(tmp_path):
    in_process(*SHORT, "--geometry", "hyperbolic", "--out_dir", tmp_path / "first")
    in_process(*SHORT, "--geometry", "hyperbolic", "--init_from", tmp_path / "first" / "ckpt.pt", "--out_dir", tmp_path / "second", "--lr", 0)
    first, second = (torch.load(tmp_path / n / "ckpt.pt", weights_only=True)["model"] for n in ("first", "second"))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_quick_gelu_of_foreign_weights_is_told_once_and_kept(tmp_path):
    torch.save(in_open_clips_layout(small("euclidean", vision_heads=1, text_heads=1, context_length=77, quick_gelu=True)), tmp_path / "theirs.pt")
    in_process(*SHORT, "--geometry", "euclidean", "--tokenizer", "bytes", "--quick_gelu", "--init_from", tmp_path / "theirs.pt", "--out_dir", tmp_path / "out")
    assert load_model(tmp_path / "out" / "ckpt.pt").config.quick_gelu


def test_a_run_is_the_same_run_on_one_process_and_on_two(tmp_path):
    """As torchrun starts it, through files: log and weights. Sums are taken in another order, hence not to the bit."""
    flags = [*SHORT, "--geometry", "hyperbolic", "--entailment_weight", "0.2"]
    in_process(*flags, "--out_dir", tmp_path / "one")
    done = torchrun(2, str(ROOT / "train.py"), *flags, "--out_dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, two = ([line for line in log_of(tmp_path / name) if "loss" in line] for name in ("one", "two"))
    assert len(one) == len(two) == 8
    for a, b in zip(one, two):
        for key in ("loss", "contrastive", "entailment", "inside"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), (a["step"], key)
