"""Bad machines and bad luck: what happens to a run. Faults of inputs stand with their subjects."""

import errno
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

import pytest
import torch
from common import (
    ROOT, SHORT, encoded, in_process, log_of, losses_of, photo, running, saved,
    signal_at, torchrun, train_script,
)  # fmt: skip

import data
import evaluate
import train
from model import load_model

pytestmark = pytest.mark.usefixtures("few_held_out")
ENDLESS = ["--samples", "1000000", "--batch_size", "8", "--log_every", "1", "--device", "cpu"]


def main(monkeypatch, *args):
    """train.py as from the command line, in this process -> its status, or what it says."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        train.main()
    return end.value.code


def some_pictures(folder, broken=0):
    """A folder with eight pictures and captions, and some that cannot be read."""
    folder.mkdir()
    for i in range(8 + broken):
        (folder / f"{i}.jpg").write_bytes(encoded(photo(40, 50, seed=i), "JPEG") if i < 8 else b"")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


# ------------------------------------------------------------------------------------------------
# the environment


def test_without_a_compiler_a_run_says_so_in_a_line_and_goes_on(tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler\n" * 50)

    monkeypatch.setattr(torch, "compile", broken)
    in_process(*SHORT, "--compile", "--out_dir", tmp_path)
    assert capsys.readouterr().out.count("compile does not work here") == 1
    assert saved(tmp_path)["step"] == 8


def test_bfloat16_is_refused_where_the_gpu_lacks_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: False)
    with pytest.raises(ValueError, match="--dtype float32"):
        train.choose_precision(train.TrainConfig(dtype="bfloat16"), torch.device("cuda"))


def test_a_rank_without_an_address_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR|WORLD_SIZE"):
        train.join_processes("cpu")


def as_torchrun_sets(monkeypatch, port, **changes):
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (defaults | changes).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(port))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    as_torchrun_sets(monkeypatch, 1, LOCAL_RANK="3", WORLD_SIZE="4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="nproc_per_node=2"):
        train.join_processes("cuda")


def test_a_port_in_use_gets_a_sentence_and_status_2(tmp_path, monkeypatch, capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        as_torchrun_sets(monkeypatch, taken.getsockname()[1])
        assert main(monkeypatch, *SHORT, "--out_dir", tmp_path) == 2
    message = capfd.readouterr().err
    assert "Traceback" not in message and "train.py: " in message.splitlines()[-1]


def test_slurm_tasks_that_would_train_alone_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun"):
        in_process(*SHORT, "--out_dir", tmp_path)


def test_training_and_evaluation_open_no_connection(tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("somebody wants the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    in_process(*SHORT, "--out_dir", tmp_path)
    evaluate.run(evaluate.parse_args([str(tmp_path / "ckpt.pt"), "--workers", "0"]))


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    """The lock goes with its process, however that ends, and with its loading processes."""
    with running(*ENDLESS, "--workers", 1, "--save_every", 1, "--out_dir", tmp_path) as first:
        next(line for line in first.stdout if line.startswith("step 3"))
        with pytest.raises(ValueError, match="another run"):
            in_process("--resume", "--out_dir", tmp_path)
        first.kill()
        first.wait()
        stopped = saved(tmp_path)["step"]
        two_more = ["--samples", 8 * stopped + 16, "--warmup", 0, "--workers", 0]
        in_process("--resume", "--out_dir", tmp_path, *two_more)
    assert saved(tmp_path)["step"] == stopped + 2


# ------------------------------------------------------------------------------------------------
# processes and disks that fail


def test_when_one_process_fails_all_end_and_its_error_is_shown(tmp_path):
    error = "if rank() == 1: raise RuntimeError('the disk is on fire')"
    script = train_script(tmp_path / "failing.py", 5, error)
    done = torchrun(2, script, *ENDLESS, "--workers", 0, "--out_dir", tmp_path)
    assert done.returncode != 0
    root_cause = done.stderr[done.stderr.rindex("Root Cause") :]
    assert "the disk is on fire" in root_cause


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    signal_at(monkeypatch, step=5)
    in_process(*SHORT, "--out_dir", tmp_path)
    before = (tmp_path / "ckpt.pt").read_bytes()
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))  # no file may grow beyond this
    try:
        with pytest.raises(OSError, match="cannot write .*ckpt.pt"):
            in_process("--resume", "--workers", 0, "--out_dir", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    in_process("--resume", "--workers", 0, "--out_dir", tmp_path)
    assert saved(tmp_path)["step"] == 8


def test_weights_without_optimizer_can_be_evaluated_but_not_resumed(tmp_path):
    in_process(*SHORT, "--out_dir", tmp_path)
    checkpoint = saved(tmp_path)
    del checkpoint["optimizer"]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    load_model(tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="optimizer.*--init_from"):
        in_process("--resume", "--out_dir", tmp_path)


def test_a_killed_loading_process_ends_the_run_saved_and_with_a_remedy(tmp_path, monkeypatch):
    rate = train.learning_rate

    def learning_rate(step, *rest):
        if step == 4:
            multiprocessing.active_children()[0].kill()
        return rate(step, *rest)

    monkeypatch.setattr(train, "learning_rate", learning_rate)
    message = main(monkeypatch, *ENDLESS, "--workers", 1, "--out_dir", tmp_path)
    assert len(message.splitlines()) == 1 and "--workers" in message and "--shm-size" in message
    assert saved(tmp_path)["step"] == len(losses_of(tmp_path)) >= 4


SMALL_SHM = "mount -t tmpfs -o size=1m tmpfs /dev/shm || exit 77; exec \"$@\""


def test_a_small_shared_memory_ends_the_run_saved_and_with_a_remedy(tmp_path):
    """As in Docker, whose default is 64 MB. Two workers keep eight batches of 1.6 MB in flight."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("only root can mount a small /dev/shm")
    command = ["unshare", "-m", "bash", "-c", SMALL_SHM, "bash", sys.executable]
    flags = [*ENDLESS, "--batch_size", "128", "--workers", "2", "--out_dir", str(tmp_path)]
    command += [str(ROOT / "train.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.returncode == 1 and "--shm-size" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and saved(tmp_path)["step"] == len(losses_of(tmp_path))


def endless_picture(folder):
    """Pictures, of which one is a pipe: who reads it waits for ever."""
    some_pictures(folder)
    (folder / "3.jpg").unlink()
    os.mkfifo(folder / "3.jpg")
    return folder / "3.jpg"


def test_a_signal_ends_the_reading_of_data_that_never_come(tmp_path):
    pipe = endless_picture(tmp_path / "pictures")

    def signal_main():
        os.open(pipe, os.O_WRONLY)  # comes back when the run has opened it, too
        time.sleep(0.2)  # not between Python and the system call, where no signal is noticed
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    threading.Thread(target=signal_main).start()
    in_process(*ENDLESS, "--data", pipe.parent, "--workers", 0, "--out_dir", tmp_path)
    assert saved(tmp_path)["step"] == len(losses_of(tmp_path))


def test_a_signal_ends_the_waiting_for_workers_that_never_answer(tmp_path):
    """As clusters send it: to all processes, with loading ones."""
    pipe = endless_picture(tmp_path / "pictures")
    flags = ["--data", pipe.parent, "--workers", 1, "--out_dir", tmp_path]
    with running(*ENDLESS, *flags) as process:
        writer = open(pipe, "w")
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=200)
        writer.close()
    assert process.returncode == 0 and "go on with --resume" in out and "Traceback" not in err
    assert saved(tmp_path)["step"] == len(losses_of(tmp_path))


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(train.fcntl, "lockf", refuse)
    in_process(*SHORT, "--out_dir", tmp_path)
    assert saved(tmp_path)["step"] == 8 and "warning: no lock on" in capsys.readouterr().out


def test_evaluation_refuses_to_be_started_several_times_at_once(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(SystemExit):
        evaluate.parse_args(["ckpt.pt"])
    assert "without torchrun" in capsys.readouterr().err


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


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_applied(tmp_path, monkeypatch):
    spoil_the_loss(monkeypatch, 6)
    message = main(monkeypatch, *SHORT, "--geometry", "hyperbolic", "--out_dir", tmp_path)
    for part in ("step 6", "hyperbolic", "logit_scale", "curvature", "gradient nan", "_radius"):
        assert part in message
    checkpoint = saved(tmp_path)
    assert checkpoint["step"] == 4
    assert all(weight.isfinite().all() for weight in checkpoint["state_dict"].values())


def test_a_scale_at_its_bound_is_warned_of_once(tmp_path, capsys):
    flags = ["--samples", 200, "--lr", 0, "--max_logit_scale", 2, "--out_dir", tmp_path]
    in_process(*SHORT, *flags)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "logit_scale" in warnings[0] and "bound" in warnings[0]


def test_a_batch_larger_than_the_data_is_warned_of_once_with_the_floor_of_the_loss(
    tmp_path, capsys
):
    source = some_pictures(tmp_path / "pictures")
    flags = ["--data", source, "--batch_size", 32, "--out_dir", tmp_path]
    in_process(*SHORT, *flags)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "1.39" in warnings[0]  # ln(32 / 8)


# ------------------------------------------------------------------------------------------------
# held-out data


def test_a_held_out_picture_that_cannot_be_read_is_counted_and_ends_nothing(tmp_path):
    held_out = some_pictures(tmp_path / "held_out", broken=2)
    in_process(*SHORT, "--val_data", held_out, "--out_dir", tmp_path)
    assert log_of(tmp_path)[-1]["val_i2t_r1"] >= 0
    model = load_model(tmp_path / "ckpt.pt")
    pairs = data.held_out_pairs(str(held_out))
    results = evaluate.held_out(model, str(held_out), pairs)["retrieval"]
    assert "8 pictures" in results["protocol"] and "2 unreadable" in results["protocol"]


def test_the_checkpoint_is_on_the_disk_before_evaluation_begins(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("somebody has moved the pictures")

    monkeypatch.setattr(evaluate, "held_out", fails)
    with pytest.raises(RuntimeError, match="moved"):
        in_process(*SHORT, "--eval_every", 3, "--out_dir", tmp_path)
    assert saved(tmp_path)["step"] == 3
