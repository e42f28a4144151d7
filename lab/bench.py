"""Where the time goes, as ratios: python tests/bench.py [loss steps pictures evaluate threads ...]

Machines differ and are noisy, so both sides of every comparison run in turns in one process, and
the ratio of their medians counts. Without a name all parts run but `memory`, of many minutes.
"""

import io
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
import evaluate  # sets the environment that torch reads
import torch
import torch.nn.functional as F
from PIL import Image

import data
from geometry import GEOMETRIES
from model import CLIP, PRESETS, Config, pack_tokens

DEVICE = evaluate.pick_device()
GPU = DEVICE.type == "cuda"


def seconds(*functions, repeats=5):
    """Median time of each function, called in turns."""

    def once(function):
        start = time.perf_counter()
        function()
        if GPU:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for function in functions:
        once(function)
    rounds = [[once(function) for function in functions] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*rounds)]


# ------------------------------------------------------------------------------------------------
# the loss, beside the formulas as papers print them, in float64


def lift(v, curv):
    """Tangent vectors (N, D) -> the hyperboloid: space (N, D) and time (N, 1) components."""
    r = curv**0.5 * v.norm(dim=1, keepdim=True)
    space = torch.sinh(r) * v / r.clamp_min(1e-8)
    return space, (1 / curv + space.square().sum(1, keepdim=True)).sqrt()


def textbook(geometry, logit, x, y, curv):
    inner = x @ y.T
    if geometry == "clip":
        return inner if logit == "cosine" else -torch.acos(inner.clamp(-1 + 1e-7, 1 - 1e-7))
    if geometry == "euclidean":
        squares = x.square().sum(1, keepdim=True) + y.square().sum(1)
        squared = (squares - 2 * inner).clamp_min(1e-12)
        return {"inner": inner, "squared": -squared, "distance": -squared.sqrt()}[logit]
    (xs, x0), (ys, y0) = lift(x, curv), lift(y, curv)
    inner = xs @ ys.T - x0 @ y0.T
    d = torch.acosh((-curv * inner).clamp_min(1 + 1e-8)) / curv**0.5
    return {"inner": inner, "squared": -d.square(), "distance": -d}[logit]


def bench_loss(N=8192 if GPU else 2048, D=512):
    print(f"\nloss, forward and backward, {N} x {N} x {D}, beside the textbook in float64")
    torch.manual_seed(0)
    x, y = (torch.randn(N, D, device=DEVICE) / D**0.5 for _ in range(2))
    match = torch.arange(N, device=DEVICE)

    def step(similarity):
        def run():
            a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
            logits = 10 * similarity(a, b, torch.ones((), device=DEVICE))
            (F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)).backward()

        return run

    for name, geometry in GEOMETRIES.items():
        for logit in geometry.logits:

            def ours(a, b, curv):
                return geometry.similarity(geometry.project(a), geometry.project(b), logit, curv)

            def theirs(a, b, curv):
                a, b = geometry.project(a).double(), geometry.project(b).double()
                return textbook(name, logit, a, b, curv.double())

            fast, slow = seconds(step(ours), step(theirs))
            print(f"{name + '/' + logit:22} {1e3 * fast:6.0f} ms  {slow / fast:5.2f} times as fast")


# ------------------------------------------------------------------------------------------------
# training steps, with and without the padding of captions


def bench_steps():
    print("\ntraining steps, captions of 13 tokens in 77: unpadded beside padded")
    sizes = [("tiny", 128), ("ViT-B-32", 512 if GPU else 16)] + [("ViT-B-16", 512)] * GPU
    for name, N in sizes:
        torch.manual_seed(0)
        model = CLIP(Config(**PRESETS[name], vocab_size=49408)).to(DEVICE)
        if GPU:
            model.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        size = model.config.image_size
        images = torch.randint(0, 256, (N, 3, size, size), dtype=torch.uint8, device=DEVICE)
        lengths = torch.randint(10, 17, (N, 1))
        tokens = torch.randint(1, 49406, (N, 77)).scatter(1, lengths - 1, 49407)

        def step(tokens, index):
            tokens, index = tokens.to(DEVICE), index.to(DEVICE)

            def run():
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
                    outputs = model(images, tokens, index)
                model.loss(*outputs)["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()

            return run

        short = tokens[:, :16].contiguous()
        unpadded = step(short, pack_tokens(short, 49408))
        padded = step(tokens, torch.arange(N * 77))
        fast, slow = seconds(unpadded, padded, repeats=20 if GPU else 3)
        print(f"{name:9} batch {N:4}: {N / fast:8.0f} samples/s, {slow / fast:5.2f} times as fast")


# ------------------------------------------------------------------------------------------------
# pictures


def photo_like(w, h, seed):
    """Noise in octaves, less of it in colour than in brightness, as in photographs."""
    rng, canvas = np.random.default_rng(seed), np.full((h, w, 3), 128.0)
    for octave in range(8):
        for weights in ([1, 1, 1], [0.2, 0, -0.2]):
            cells = (2 + 3 * 2**octave, 2 + 4 * 2**octave)
            noise = rng.normal(0, 40 / 1.3**octave, cells).astype(np.float32)
            noise = Image.fromarray(noise).resize((w, h), Image.Resampling.BICUBIC)
            canvas += np.asarray(noise)[..., None] * weights
    buffer = io.BytesIO()
    Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def bench_pictures(count=20):
    print("\ntraining crop to 224: beside decode, crop, resize")
    for w, h in ((640, 427), (640, 480), (1024, 768)):
        jpegs = [photo_like(w, h, seed) for seed in range(count)]

        def plain():
            for i, jpeg in enumerate(jpegs):
                box = data.random_box(w, h, 0.9, random.Random(i))
                image = Image.open(io.BytesIO(jpeg)).convert("RGB").crop(box)
                data.to_tensor(image.resize((224, 224), Image.Resampling.BICUBIC))

        def ours():
            for i, jpeg in enumerate(jpegs):
                data.load_training_crop(jpeg, 224, 0.9, random.Random(i))

        fast, slow = seconds(ours, plain)
        print(f"{w}x{h}: {count / fast:5.0f} pictures/s, {slow / fast:5.2f} times as fast")


def bench_evaluate(count=256):
    print("\nembedding pictures of 640x480: loading processes beside a plain loop")
    jpegs = [photo_like(640, 480, seed) for seed in range(8)] * (count // 8)
    for name in ("tiny", "ViT-B-32"):
        model = CLIP(Config(**PRESETS[name])).to(DEVICE).eval()

        @torch.no_grad()
        def plain():
            for start in range(0, count, 64):
                images = [data.load_image(j, model.config.image_size) for j in jpegs[start:][:64]]
                model.encode_image(torch.stack(images).to(DEVICE))

        def ours():
            evaluate.embed_images(model, jpegs, workers=data.cores())

        fast, slow = seconds(ours, plain, repeats=3)
        print(f"{name:9} {count / fast:5.0f} pictures/s, {slow / fast:5.2f} times as fast")


# ------------------------------------------------------------------------------------------------
# whole trainings


def train(folder, *flags, **env):
    """A training as a program; yields its step lines."""
    command = [sys.executable, ROOT / "train.py", "--out_dir", folder, *flags]
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", *env)} | env
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    for line in process.stdout:
        if line.startswith("step"):
            yield process, line
    process.wait()


def bench_threads(samples=3200, rounds=3):
    print(f"\n{samples} samples of the quick start, beside two busy loops (GNU's own: 300000)")
    cases = {"as it is": {}, "GOMP_SPINCOUNT=300000": {"GOMP_SPINCOUNT": "300000"},
             "one thread": {"OMP_NUM_THREADS": "1"}}  # fmt: skip
    flags = ["--samples", str(samples), "--eval_every", "100000", "--save_every", "100000",
             "--log_every", "1", "--workers", "0", "--device", "cpu"]  # fmt: skip
    loop = "import time\nend = time.time() + 600\nwhile time.time() < end: 1"
    busy = [sys.executable, "-c", loop]
    times = {}
    for _ in range(rounds):
        for loops in (0, 2):
            others = [subprocess.Popen(busy) for _ in range(loops)]
            for name, env in cases.items():
                with tempfile.TemporaryDirectory() as folder:
                    lines = train(folder, *flags, **env)
                    next(lines)
                    start = time.perf_counter()
                    for _ in lines:
                        pass
                times.setdefault((name, loops), []).append(time.perf_counter() - start)
            for other in others:
                other.kill()
    for name in cases:
        idle, beside = (statistics.median(times[name, loops]) for loops in (0, 2))
        print(f"{name:22} idle {idle:5.1f} s, beside them {beside:5.1f} s: {beside / idle:4.1f}")


GATHER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from model import all_gather
dist.init_process_group("gloo")
x = torch.randn(2048, 512, requires_grad=True)
def sent():
    return int(next(l for l in open("/proc/net/dev") if " lo:" in l).split()[9]) / 1e6 / 10
def all_reduce():
    grad = torch.ones(2 * 2048, 512)
    dist.all_reduce(grad)
y = all_gather(x)
def backward():
    y.sum().backward(retain_graph=True)
for function in (backward, all_reduce):
    dist.barrier()
    before = sent()
    for _ in range(5):
        function()
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"{function.__name__:11} {sent() - before:5.1f} MB by each; its rows are 4.2 MB")
"""


def bench_gather():
    print("\nbackward of the gather, two processes, 2048 x 512 each: beside an all_reduce")
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(GATHER)
        script.flush()
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        command = [*launch, "--standalone", script.name, ROOT]
        subprocess.run(command, stderr=subprocess.DEVNULL)


def bench_memory(steps=2000):
    print("\nresident memory, MB, after steps 50, 500, 2000")
    for batch in (128, 256):
        with tempfile.TemporaryDirectory() as folder:
            jpegs = [photo_like(320, 240, seed) for seed in range(8)]
            rng, members = random.Random(0), []
            for i in range(2000):
                caption = data.draw_sample(rng, 16)[1]
                members += [(f"{i}.jpg", jpegs[i % 8]), (f"{i}.txt", caption.encode())]
            from common import write_tar

            shard = write_tar(Path(folder, "0.tar"), members)
            for source in ("shapes", shard):
                samples = str(batch * steps)
                flags = ["--data", source, "--batch_size", str(batch), "--samples", samples,
                         "--log_every", "50", "--eval_every", "100000"]  # fmt: skip
                seen = []
                for process, line in train(Path(folder, f"out_{Path(source).stem}"), *flags):
                    if line.split("/")[0] in ("step 50", "step 500", "step 2000"):
                        status = Path(f"/proc/{process.pid}/status").read_text()
                        seen.append(int(status.split("VmRSS:")[1].split()[0]) // 1024)
                grown = seen[-1] / seen[0]
                print(f"{Path(source).name:8} batch {batch}: {seen}, {grown:.2f} times")


if __name__ == "__main__":
    where = torch.cuda.get_device_name() if GPU else f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads")
    parts = ["loss", "steps", "pictures", "evaluate", "threads", "gather"]
    for name in sys.argv[1:] or parts:
        globals()[f"bench_{name}"]()
