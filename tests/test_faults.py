"""Bad machines and bad luck: what happens to a run. Bad inputs are tested with their modules."""

import io
import math
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
from common import (
    ROOT, SHORT, as_rank, at_step, encoded, free_port, in_process, log_of, losses_of, photo,
    run_train, running, saved, signal_at, status_of, two_processes,
)

import data
import evaluate
import train
from model import load_model

pytestmark = pytest.mark.usefixtures("few_held_out")
ENDLESS = ["--samples", "1000000", "--batch_size", "8", "--log_every", "1", "--device", "cpu"]
STOPPING = "stopping after this step; Ctrl-C again ends at once"


def main(monkeypatch, *args):
    """train.py as from the command line, in this process -> its status."""
    return status_of(train.main, monkeypatch, *args)


def some_images(folder, good=8, broken=0):
    """A folder with images and captions. The last images cannot be read."""
    folder.mkdir()
    for i in range(good + broken):
        image = encoded(photo(40, 50, seed=i), "JPEG") if i < good else b""
        (folder / f"{i}.jpg").write_bytes(image)
        (folder / f"{i}.txt").write_text(f"image {i}")
    return folder


def some_rows(folder, rows):
    """A folder with images and their list -> path of the list."""
    some_images(folder, rows)
    lines = [f"{i}.jpg,image {i}\n" for i in range(rows)]
    (folder / "pairs.csv").write_text("filepath,title\n" + "".join(lines))
    return folder / "pairs.csv"


# ------------------------------------------------------------------------------------------------
# starts that fail


def bad_csv(folder):
    (folder / "pairs.csv").write_text("path,caption\n0.jpg,image 0\n")
    return ["--data", folder / "pairs.csv"], "filepath"


def wrong_glob(folder):
    return ["--data", f"{folder}/*.tar"], "no file or folder"


def broken_images(folder):
    return ["--data", some_images(folder / "broken", good=0, broken=8)], "are bad"


def missing_held_out_data(folder):
    return ["--val_data", folder / "nowhere"], "nowhere"


def folder_below_a_file(folder):
    (folder / "file").write_text("")
    return ["--out_dir", folder / "file" / "out"], "file"


BAD_STARTS = [bad_csv, wrong_glob, broken_images, missing_held_out_data, folder_below_a_file]


@pytest.mark.parametrize("bad", BAD_STARTS)
def test_a_start_that_fails_leaves_nothing_and_the_mended_command_starts(
    bad, tmp_path, monkeypatch, capsys
):
    flags, message = bad(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(monkeypatch, *SHORT, "--out_dir", tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert main(monkeypatch, *SHORT, "--samples", 8, "--out_dir", tmp_path / "out") == 0
    assert saved(tmp_path / "out")["step"] == 1


def test_an_output_folder_that_is_a_file_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").write_text("notes")
    for resume in ([], ["--resume"]):
        assert main(monkeypatch, *SHORT, *resume, "--out_dir", tmp_path / "out") == 2
        assert f"{tmp_path / 'out'} is not a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "notes"


def test_one_process_of_several_prints_a_refusal(tmp_path):
    """The other one finds that its partner is gone. (torchrun would end it before.)"""
    flags = [*SHORT, "--data", "nowhere", "--out_dir", tmp_path / "out"]
    first, second = two_processes(*flags, code="time.sleep = print")
    (status, _, error), (second_status, second_out, second_error) = first, second
    assert status == 2 and len(error.splitlines()) == 1
    assert "there is no file or folder" in error
    assert second_status != 0 and "there is no file" not in second_out + second_error
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------
# signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP"])
def test_a_signal_saves_and_ends_the_run_with_status_0(name, tmp_path):
    code = at_step(3, f"os.kill(os.getpid(), signal.{name})")
    status, out, error = run_train(*SHORT, "--out_dir", tmp_path, code=code)
    assert status == 0 and error.count(STOPPING) == 1
    assert "stopped after step 3; resume the run with --resume" in out
    assert saved(tmp_path)["step"] == 3 and len(losses_of(tmp_path)) == 3


def test_a_hangup_that_was_ignored_stays_ignored(tmp_path):
    """nohup starts programs in this way."""
    code = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    code += at_step(3, "os.kill(os.getpid(), signal.SIGHUP)")
    status, _, error = run_train(*SHORT, "--out_dir", tmp_path, code=code)
    assert status == 0 and STOPPING not in error and saved(tmp_path)["step"] == 8


def test_signals_to_all_processes_of_a_run_save_it(tmp_path):
    """Schedulers signal all of them, workers included, and torchrun passes its own signal on."""
    with running(*ENDLESS, "--workers", 2, "--out_dir", tmp_path) as program:
        next(line for line in program.stdout if line.startswith("step"))
        program.send_to_all(signal.SIGTERM)
        program.send_to_all(signal.SIGTERM)
        status, out, error = program.finish()
    assert status == 0 and "resume the run with --resume" in out and "Traceback" not in error
    assert saved(tmp_path)["step"] == len(losses_of(tmp_path)) >= 1


def test_ctrl_c_saves_and_a_second_one_ends_at_once(tmp_path):
    """The first run continues after Ctrl-C, the second one hangs in step 3."""
    with running(*ENDLESS, "--workers", 1, "--out_dir", tmp_path / "saved") as program:
        next(line for line in program.stdout if line.startswith("step"))
        program.send_to_all(signal.SIGINT)
        status, out, error = program.finish()
    assert status == 0 and "resume the run with --resume" in out and "Traceback" not in error
    assert saved(tmp_path / "saved")["step"] >= 1
    hang = at_step(3, "time.sleep(1000)")
    with running(*ENDLESS, "--workers", 1, "--out_dir", tmp_path, code=hang) as program:
        next(line for line in program.stdout if " 2/" in line)
        time.sleep(0.5)
        program.send_to_all(signal.SIGINT)
        next(line for line in program.stderr if STOPPING in line)
        program.send_to_all(signal.SIGINT)
        program.process.join(30)
        assert program.process.exitcode == -signal.SIGINT


def test_a_signal_during_an_evaluation_is_answered_at_once(tmp_path, monkeypatch, capfd):
    found, answers = evaluate.evaluate, []

    def slow(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGHUP)
        answers.append(capfd.readouterr().err)
        return found(*args, **kwargs)

    monkeypatch.setattr(evaluate, "evaluate", slow)
    in_process(*SHORT, "--eval_every", 3, "--out_dir", tmp_path)
    assert len(answers) == 1 and STOPPING in answers[0]
    assert saved(tmp_path)["step"] == 3 and "val_i2t_r1" in log_of(tmp_path)[-1]


# ------------------------------------------------------------------------------------------------
# whoever reads the output


def test_the_reader_of_the_output_can_go_away(tmp_path):
    """As `python train.py | head -2`."""
    flags = [*SHORT, "--samples", "16", "--val_data", some_images(tmp_path / "images")]
    with running(*flags, "--out_dir", tmp_path / "out") as program:
        program.stdout.readline()
        program.stdout.readline()
        program.stdout.close()
        error = program.stderr.read()
        program.process.join()
    assert (program.process.exitcode, error) == (0, "")
    assert saved(tmp_path / "out")["step"] == 2


FULL = "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
CLOSED = "os.close(1); sys.stdout = None"


@pytest.mark.parametrize("code, torchrun", [(FULL, False), (CLOSED, True)])
def test_a_full_or_closed_output_does_not_end_the_run(code, torchrun, tmp_path):
    env = as_rank(0, free_port(), size=1) if torchrun else {}
    status, _, error = run_train(*SHORT, "--out_dir", tmp_path, code=code, **env)
    assert status == 0, error
    assert saved(tmp_path)["step"] == 8 and "val_i2t_r1" in log_of(tmp_path)[-1]


def test_the_output_of_a_notebook_cannot_be_reconfigured(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert main(monkeypatch, *SHORT, "--out_dir", tmp_path) == 0
    assert "step 8/8" in sys.stdout.getvalue() and saved(tmp_path)["step"] == 8


def test_a_run_works_in_a_thread(tmp_path, monkeypatch):
    """Only the main thread can receive signals."""
    statuses = []
    flags = [*SHORT, "--workers", 1, "--out_dir", tmp_path]
    thread = threading.Thread(target=lambda: statuses.append(main(monkeypatch, *flags)))
    thread.start()
    thread.join()
    assert statuses == [0] and saved(tmp_path)["step"] == 8


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_optimized_code_has_no_docstrings_and_needs_none(name, monkeypatch, capsys):
    """As `python -OO` compiles it."""
    module = types.ModuleType(f"optimized_{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = (ROOT / f"{name}.py").read_text()
    exec(compile(source, f"{name}.py", "exec", optimize=2), module.__dict__)
    assert module.__doc__ is None
    with pytest.raises(SystemExit) as end:
        module.parse_args(["--help"])
    assert end.value.code == 0 and "--device" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# data and folders


def test_data_that_have_moved_are_resumed_from_their_new_place(tmp_path, monkeypatch):
    rows = some_rows(tmp_path / "old", 12)
    in_process(*SHORT, "--data", rows, "--out_dir", tmp_path / "whole")
    signal_at(monkeypatch, step=5)
    in_process(*SHORT, "--data", rows, "--out_dir", tmp_path / "parts")
    (tmp_path / "old").rename(tmp_path / "new")
    resume = ["--resume", "--workers", 0, "--out_dir", tmp_path / "parts"]
    with pytest.raises(ValueError, match="old/pairs.csv"):
        in_process(*resume)
    in_process(*resume, "--data", tmp_path / "new" / "pairs.csv")
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")


def test_a_run_whose_data_have_grown_is_refused_with_both_numbers(tmp_path, monkeypatch):
    rows = some_rows(tmp_path / "data", 12)
    signal_at(monkeypatch, step=5)
    in_process(*SHORT, "--data", rows, "--out_dir", tmp_path / "out")
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    with open(rows, "a") as file:
        file.write("0.jpg,another caption\n")
    for more in ([], ["--data", rows]):
        with pytest.raises(ValueError, match="13 samples.* 12"):
            in_process("--resume", "--workers", 0, "--out_dir", tmp_path / "out", *more)
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before


def test_training_and_evaluation_open_no_connection(tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("something uses the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    in_process(*SHORT, "--out_dir", tmp_path)
    evaluate.run(evaluate.parse_args([str(tmp_path / "ckpt.pt"), "--workers", "0"]))


def test_two_runs_do_not_write_into_one_folder(tmp_path, monkeypatch):
    """The lock ends with its process, however that ends, though a worker may outlive it."""
    flags = ["--workers", 1, "--save_every", 1, "--out_dir", tmp_path]
    with running(*ENDLESS, *flags) as first:
        next(line for line in first.stdout if " 3/" in line)
        with pytest.raises(ValueError, match="another run"):
            in_process("--resume", "--workers", 0, "--out_dir", tmp_path)
        first.send(signal.SIGKILL)
        first.process.join()
        stopped = saved(tmp_path)["step"]
        two_more = ["--samples", 8 * stopped + 16, "--warmup", 0, "--workers", 0]
        in_process("--resume", "--out_dir", tmp_path, *two_more)
    assert saved(tmp_path)["step"] == stopped + 2


def test_a_run_without_a_checkpoint_yet_is_not_overwritten_by_a_second_start(tmp_path):
    with running(*ENDLESS, "--workers", 0, "--out_dir", tmp_path) as first:
        next(line for line in first.stdout if " 3/" in line)
        with pytest.raises(ValueError, match="another run"):
            in_process(*ENDLESS, "--workers", 0, "--out_dir", tmp_path)
        first.send(signal.SIGTERM)
        first.finish()
    assert saved(tmp_path)["step"] == len(losses_of(tmp_path)) >= 3


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    signal_at(monkeypatch, step=5)
    in_process(*SHORT, "--out_dir", tmp_path)
    before = (tmp_path / "ckpt.pt").read_bytes()
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))  # no file may grow beyond this
    try:
        with pytest.raises(ValueError, match="cannot write .*ckpt.pt"):
            in_process("--resume", "--workers", 0, "--out_dir", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    in_process("--resume", "--workers", 0, "--out_dir", tmp_path)
    assert saved(tmp_path)["step"] == 8


def test_weights_without_optimizer_can_be_evaluated_but_not_resumed(tmp_path):
    in_process(*SHORT, "--samples", 8, "--out_dir", tmp_path)
    checkpoint = saved(tmp_path)
    del checkpoint["optimizer"]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    load_model(tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="optimizer.*--init_from"):
        in_process("--resume", "--out_dir", tmp_path)


# ------------------------------------------------------------------------------------------------
# workers and processes that fail or see something else


def test_a_killed_worker_ends_the_run_saved_and_with_a_remedy(tmp_path, monkeypatch, capsys):
    rate = train.learning_rate

    def learning_rate(step, *rest):
        if step == 4:
            multiprocessing.active_children()[0].kill()
        return rate(step, *rest)

    monkeypatch.setattr(train, "learning_rate", learning_rate)
    assert main(monkeypatch, *ENDLESS, "--workers", 1, "--out_dir", tmp_path) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "--workers" in error and "--ipc=host" in error
    assert saved(tmp_path)["step"] == len(losses_of(tmp_path)) >= 4


SMALL_SHM = "mount -t tmpfs -o size=1m tmpfs /dev/shm || exit 77; exec \"$@\""


def test_a_small_shared_memory_ends_the_run_with_a_remedy(tmp_path):
    """As in Docker, whose default is 64 MB. Two workers have eight batches of 1.6 MB in flight. The
    first batch may already fail, and then there is no folder."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("only root can mount a small /dev/shm")
    command = ["unshare", "-m", "bash", "-c", SMALL_SHM, "bash", sys.executable]
    flags = [*ENDLESS, "--batch_size", "128", "--workers", "2", "--out_dir", str(tmp_path / "out")]
    command += [str(ROOT / "train.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.returncode in (1, 2) and "--ipc=host" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    if (tmp_path / "out").exists():
        assert saved(tmp_path / "out")["step"] == len(losses_of(tmp_path / "out"))
    else:
        assert "step" not in done.stdout


def test_when_one_process_fails_the_other_one_ends_too(tmp_path):
    code = at_step(3, "if train.rank() == 1: raise RuntimeError('the disk is on fire')")
    code = "time.sleep = print\n" + code
    flags = [*ENDLESS, "--workers", 0, "--out_dir", tmp_path]
    (status, _, _), (second_status, _, second_error) = two_processes(*flags, code=code)
    assert status != 0 and second_status != 0 and "the disk is on fire" in second_error


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_says_at_once_for_whom_it_waits(rank, tmp_path):
    """Process 0 waits for process 1, or the first process of the second machine for process 0.
    Both can be ended."""
    env = as_rank(rank, free_port()) | {"LOCAL_RANK": "0"}
    began = time.monotonic()
    with running(*SHORT, "--out_dir", tmp_path / "out", **env) as program:
        line = program.stdout.readline()
        assert f"waiting for 2 processes at 127.0.0.1:{env['MASTER_PORT']}" in line
        assert time.monotonic() - began < 20
        program.send(signal.SIGTERM)
        status, _, _ = program.finish()
    assert status != 0 and not (tmp_path / "out").exists()


def test_processes_that_see_different_numbers_of_samples_are_all_refused(tmp_path):
    """As on two machines, where the same relative path is another file."""
    port, programs = free_port(), []
    for rank, rows in enumerate((8, 6)):
        some_rows(tmp_path / str(rank), rows)
        env = as_rank(rank, port) | {"LOCAL_RANK": "0"}
        flags = [*SHORT, "--data", "pairs.csv", "--out_dir", tmp_path / "out"]
        here = f"os.chdir({str(tmp_path / str(rank))!r}); time.sleep = print"
        programs.append(running(*flags, code=here, **env))
    with programs[0] as first, programs[1] as second:
        for status, _, error in (first.finish(), second.finish()):
            assert status == 2 and "different numbers of samples in pairs.csv: [8, 6]" in error
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------
# numbers


def spoil_the_loss(monkeypatch, step):
    """In the given step, counted from 1, the loss is NaN."""
    original, calls = train.CLIP.loss, []

    def loss(self, *args):
        losses = original(self, *args)
        calls.append(1)
        if len(calls) == step:
            losses["loss"] = losses["loss"] * math.nan
        return losses

    monkeypatch.setattr(train.CLIP, "loss", loss)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_applied(
    tmp_path, monkeypatch, capsys
):
    spoil_the_loss(monkeypatch, 6)
    assert main(monkeypatch, *SHORT, "--geometry", "hyperbolic", "--out_dir", tmp_path) == 1
    error = capsys.readouterr().err
    for part in ("step 6", "hyperbolic", "logit_scale", "curvature", "gradient nan", "_radius"):
        assert part in error
    checkpoint = saved(tmp_path)
    assert checkpoint["step"] == 4
    assert all(weight.isfinite().all() for weight in checkpoint["state_dict"].values())


def test_a_batch_larger_than_the_data_is_warned_of_once_with_the_floor_of_the_loss(
    tmp_path, capsys
):
    source = some_images(tmp_path / "images")
    flags = ["--data", source, "--batch_size", 32, "--out_dir", tmp_path / "out"]
    in_process(*SHORT, *flags)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "1.39" in warnings[0]  # ln(32 / 8)


# ------------------------------------------------------------------------------------------------
# held-out data


def test_a_held_out_image_that_cannot_be_read_is_counted_and_ends_nothing(tmp_path):
    held_out = some_images(tmp_path / "held_out", good=8, broken=2)
    in_process(*SHORT, "--val_data", held_out, "--out_dir", tmp_path / "out")
    assert log_of(tmp_path / "out")[-1]["val_i2t_r1"] >= 0


def test_held_out_images_that_have_gone_end_the_evaluation_and_not_the_run(tmp_path, capsys):
    held_out = some_images(tmp_path / "held_out", good=0, broken=8)
    in_process(*SHORT, "--val_data", held_out, "--eval_every", 4, "--out_dir", tmp_path / "out")
    assert capsys.readouterr().out.count("warning: not evaluated") == 2
    assert saved(tmp_path / "out")["step"] == 8


def test_the_checkpoint_is_on_the_disk_before_evaluation_begins(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("the power is off")

    monkeypatch.setattr(evaluate, "evaluate", fails)
    with pytest.raises(RuntimeError, match="power"):
        in_process(*SHORT, "--eval_every", 3, "--out_dir", tmp_path)
    assert saved(tmp_path)["step"] == 3
