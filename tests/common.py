"""What several test files need: a small model, pictures, tar shards, runs of train.py."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
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
from model import CLIP, Config

SMALL = Config(
    image_size=16, patch_size=8, vision_width=64, vision_layers=2, text_width=64, text_layers=2,
    embed_dim=32, context_length=24, vision_heads=2, text_heads=2,
)  # fmt: skip
SHORT = ["--samples", "64", "--batch_size", "8", "--log_every", "1", "--save_every", "4",
         "--eval_every", "1000", "--workers", "0", "--device", "cpu"]  # 8 steps  # fmt: skip


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
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def write_shard(path, samples):
    """[(picture bytes, caption)] -> a tar in webdataset's layout; returns its path as a string."""
    members = []
    for i, (picture, caption) in enumerate(samples):
        members += [(f"{i:05d}.jpg", picture), (f"{i:05d}.txt", caption.encode())]
    return write_tar(path, members)


def in_process(*args):
    """train.py with these flags, in this process. Raises what it raises."""
    train.train(train.Run(*train.parse_args([str(arg) for arg in args])))


def run_train(*args, timeout=200, **env):
    """train.py with these flags, as a program -> what subprocess.run returns."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)


def torchrun(processes, script, *args, timeout=200, **env):
    """A script under torchrun, one thread each -> what subprocess.run returns."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", str(script), *map(str, args)]  # fmt: skip
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
    """Five tar shards, one of them cut off, with broken pictures -> a data source."""
    for s in range(5):
        pictures = [encoded(photo(48, 40 + i), "JPEG") for i in range(11)]
        pictures[2 * s] = b"<html>"
        path = write_shard(folder / f"{s}.tar", [(p, f"{s}, {i}") for i, p in enumerate(pictures)])
    os.truncate(path, 20_000)
    return f"{folder}/{{0..4}}.tar"


@contextmanager
def running(*args):
    """train.py with these flags, as a program in its own process group, which is killed at last."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, **pipes, env=env, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def signal_at(monkeypatch, step, number=signal.SIGTERM, times=1):
    """The next run in this process that comes to a step gets a signal there."""
    rate, pending = train.learning_rate, [step]

    def learning_rate(step, *rest):
        if step in pending:
            pending.clear()
            for _ in range(times):
                os.kill(os.getpid(), number)
        return rate(step, *rest)

    monkeypatch.setattr(train, "learning_rate", learning_rate)


def train_script(path, step, action):
    """Write train.py with a line of Python that is executed before a step -> its path."""
    path.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from model import rank

rate = train.learning_rate

def learning_rate(step, *rest):
    if step == {step}:
        {action}
    return rate(step, *rest)

train.learning_rate = learning_rate
train.main()
""")
    return path
