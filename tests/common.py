"""What several test files need: a small model, images, tar shards, runs of train.py."""

import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data
import train
from lab import shapes
from lab.cifar10 import add_file
from model import CLIP, Config

SMALL = Config(
    image_size=16, patch_size=8, vision_width=64, vision_layers=2, text_width=64, text_layers=2,
    embed_dim=32, context_length=24, vision_heads=2, text_heads=2,
)
CONES = ["--geometry", "hyperbolic", "--entailment_weight", "0.2"]
SHORT = ["--samples", "64", "--batch_size", "8", "--log_every", "1", "--save_every", "4",
         "--eval_every", "1000", "--workers", "0", "--device", "cpu"]  # 8 steps


def small(geometry="euclidean", seed=0, **changes):
    """A model with two layers, the same every time."""
    torch.manual_seed(seed)
    defaults = {"logit": None, "final_ln": None, "init_logit_scale": None}
    return CLIP(replace(SMALL, geometry=geometry, **(defaults | changes)))


def small_batch(n=8, seed=0):
    """-> images uint8 (n, 3, 16, 16), tokens (n, 24) of different lengths."""
    torch.manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8)
    return images, data.tokenize([f"{'very ' * (i % 4)}red {i}" for i in range(n)], "bytes", 24)


def save_ours(path, model, **train_config):
    """A checkpoint as train.py writes it, without optimizer."""
    flags = {"data": "shapes"} | train_config
    checkpoint = {"state_dict": model.state_dict(), "config": asdict(model.config)}
    torch.save(checkpoint | {"train_config": flags}, path)


class Malicious:
    """What a checkpoint contains that wants to start a program."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def photo(w=640, h=480, seed=0):
    """Smooth colour noise, about as compressible as a photo."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (max(1, h // 16), max(1, w // 16), 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((w, h), Image.Resampling.BICUBIC)


def encoded(image, format="PNG", **options):
    """PIL image -> bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_tar(path, members):
    """[(name, bytes)] -> a tar of exactly these members; returns its path as a string."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            add_file(tar, name, content)
    return str(path)


def write_shard(path, samples):
    """[(image bytes, caption)] -> a tar in webdataset's layout; returns its path as a string."""
    members = []
    for i, (image, caption) in enumerate(samples):
        members += [(f"{i:05d}.jpg", image), (f"{i:05d}.txt", caption.encode())]
    return write_tar(path, members)


def status_of(main, monkeypatch, *args):
    """Run the main function of a program with these flags, in this process -> its status."""
    monkeypatch.setattr(sys, "argv", ["program.py", *map(str, args)])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


def in_process(*args):
    """train.py with these flags, in this process. Raises what it raises."""
    train.train(*train.parse_args([str(arg) for arg in args]))


FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["train"])
os.environ["PYTHONPATH"] = str(ROOT)


def call_main(args, code, env, stdout, stderr):
    """What the process of a `Program` does."""
    multiprocessing.set_start_method("fork", force=True)  # workers would import torch anew
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    stdout.close()
    stderr.close()
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    sys.argv = ["train.py", *args]
    torch.set_num_threads(1)
    shapes.HELD_OUT = 48
    exec(code, {"os": os, "signal": signal, "sys": sys, "time": time, "train": train})
    if args:
        train.main()


class Program:
    """train.py with these flags in a new process, on one thread, with few held-out shapes. It is a
    fork of a server that has imported torch, so it starts at once. It first executes `code`;
    without flags, it does nothing else."""

    def __init__(self, *args, code="", **env):
        stdout, child_stdout = FORK_SERVER.Pipe(duplex=False)
        stderr, child_stderr = FORK_SERVER.Pipe(duplex=False)
        args = [str(arg) for arg in args], code, os.environ | env, child_stdout, child_stderr
        self.process = FORK_SERVER.Process(target=call_main, args=args)
        self.process.start()
        child_stdout.close()  # so that reading ends when the process does
        child_stderr.close()
        self.stdout = os.fdopen(os.dup(stdout.fileno()))
        self.stderr = os.fdopen(os.dup(stderr.fileno()))

    def send(self, number):
        """Signal the process, but not its workers."""
        os.kill(self.process.pid, number)

    def send_to_all(self, number):
        """Signal the process and its workers, as a terminal does."""
        os.killpg(self.process.pid, number)

    def finish(self):
        """Wait for the end -> status (negative: the signal that killed it), stdout, stderr."""
        stdout, stderr = self.stdout.read(), self.stderr.read()
        self.process.join()
        return self.process.exitcode, stdout, stderr


@contextmanager
def running(*args, **options):
    """A `Program` that is killed at last, with its workers."""
    program = Program(*args, **options)
    try:
        yield program
    finally:
        with suppress(ProcessLookupError):
            program.send_to_all(signal.SIGKILL)
        program.process.kill()
        program.process.join()


def run_train(*args, **options):
    """Run a `Program` -> status, stdout, stderr."""
    with running(*args, **options) as program:
        return program.finish()


def as_rank(rank, port, size=2):
    """What torchrun tells process `rank` on the only machine -> environment variables."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def two_processes(*args, code=""):
    """A run that two processes share -> status, stdout, stderr of both."""
    port = free_port()
    with running(*args, code=code, **as_rank(0, port)) as first:
        with running(*args, code=code, **as_rank(1, port)) as second:
            return first.finish(), second.finish()


def torchrun(processes, script, *args, timeout=200, **env):
    """A script under torchrun, one thread each -> what subprocess.run returns."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", str(script), *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)


def log_of(folder):
    """out_dir -> the lines of its log.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def losses_of(folder):
    return [line["loss"] for line in log_of(folder) if "loss" in line]


def same_weights(a, b):
    """Do two output folders hold the same step and weights, bit for bit?"""
    a, b = (torch.load(Path(f) / "ckpt.pt", weights_only=True) for f in (a, b))
    pairs = zip(a["state_dict"].values(), b["state_dict"].values())
    return a["step"] == b["step"] and all(torch.equal(x, y) for x, y in pairs)


def saved(folder):
    """out_dir -> its checkpoint."""
    return torch.load(Path(folder) / "ckpt.pt", weights_only=True)


def some_shards(folder):
    """Five tar shards, one of them cut off, with broken images -> a data source."""
    for s in range(5):
        images = [encoded(photo(48, 40 + i), "JPEG") for i in range(11)]
        images[2 * s] = b"<html>"
        path = write_shard(folder / f"{s}.tar", [(x, f"{s}, {i}") for i, x in enumerate(images)])
    os.truncate(path, 20_000)
    return f"{folder}/{{0..4}}.tar"


def signal_at(monkeypatch, step, number=signal.SIGTERM, times=1):
    """The next run in this process that comes to a step, counted from 1, gets a signal in it."""
    rate, pending = train.learning_rate, [step - 1]

    def learning_rate(step, *rest):
        if step in pending:
            pending.clear()
            for _ in range(times):
                os.kill(os.getpid(), number)
        return rate(step, *rest)

    monkeypatch.setattr(train, "learning_rate", learning_rate)


def at_step(step, action):
    """-> Python code that makes train.py execute a statement in a step, counted from 1."""
    return f"""
def learning_rate(step, *rest, rate=train.learning_rate):
    if step + 1 == {step}:
        {action}
    return rate(step, *rest)

train.learning_rate = learning_rate
"""


def train_script(path, code):
    """Write a program that executes code before train.py -> its path."""
    start = f"import os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
    path.write_text(start + code + "train.main()\n")
    return path
