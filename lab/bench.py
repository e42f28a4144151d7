"""How fast is it? Most parts compare two programs and print the ratio of their times.

    python -m lab.bench                # all parts but memory, which takes many minutes
    python -m lab.bench loss gpu       # loss steps images evaluate threads gather memory gpu

Machines differ and are noisy, so both sides of a comparison run in turns in one process, and the
ratio of their medians counts. The part `gpu` measures training steps; on a CPU, with small sizes.
"""

import io
import os
import platform
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import evaluate  # before torch: it sets an environment variable that torch reads
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
from geometry import GEOMETRIES
from lab import shapes
from lab.cifar10 import add_file
from model import CLIP, PRESETS, Config, pack_tokens

ROOT = Path(__file__).resolve().parents[1]
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
# the loss, beside the textbook formulas in float64


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
            label = f"{name}/{logit}"
            print(f"{label:22} {1e3 * fast:6.0f} ms  {slow / fast:5.2f} times as fast")


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
# images


def photo_like(w, h, seed):
    """Noise in octaves, weaker in colour than in brightness, as in photographs -> JPEG bytes."""
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


def bench_images(count=20):
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
        print(f"{w}x{h}: {count / fast:5.0f} images/s, {slow / fast:5.2f} times as fast")


def bench_evaluate(count=256):
    print("\nembedding images of 640x480: loading workers beside a plain loop")
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
        print(f"{name:9} {count / fast:5.0f} images/s, {slow / fast:5.2f} times as fast")


# ------------------------------------------------------------------------------------------------
# whole trainings


def run_train(folder, *flags, **env):
    """Run train.py as a program -> yields (process, line) for the reports of steps."""
    command = [sys.executable, ROOT / "train.py", "--out_dir", folder, *flags]
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", *env)} | env
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    for line in process.stdout:
        if line.startswith("step"):
            yield process, line
    process.wait()


def bench_threads(samples=3200, rounds=3):
    print(f"\n{samples} samples of the quick start, beside two busy loops (GNU's own: 300000)")
    cases = {"default": {}, "GOMP_SPINCOUNT=300000": {"GOMP_SPINCOUNT": "300000"},
             "one thread": {"OMP_NUM_THREADS": "1"}}
    flags = ["--samples", str(samples), "--eval_every", "100000", "--save_every", "100000",
             "--log_every", "1", "--workers", "0", "--device", "cpu"]
    loop = "import time\nend = time.time() + 600\nwhile time.time() < end: 1"
    busy = [sys.executable, "-c", loop]
    times = {}
    for _ in range(rounds):
        for loops in (0, 2):
            others = [subprocess.Popen(busy) for _ in range(loops)]
            for name, env in cases.items():
                with tempfile.TemporaryDirectory() as folder:
                    lines = run_train(folder, *flags, **env)
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


def write_shard(path, samples):
    """[(JPEG bytes, caption)] -> a tar shard; returns its path as a string."""
    with tarfile.open(path, "w") as tar:
        for i, (jpeg, caption) in enumerate(samples):
            add_file(tar, f"{i}.jpg", jpeg)
            add_file(tar, f"{i}.txt", caption.encode())
    return str(path)


def bench_memory(steps=2000):
    print("\nresident memory, MB, after steps 60, 500, 2000")
    jpegs = [photo_like(320, 240, seed) for seed in range(8)]
    toy_world = shapes.Shapes()
    samples = [(jpegs[i % 8], toy_world[i][1]) for i in range(2000)]
    for batch in (128, 256):
        with tempfile.TemporaryDirectory() as folder:
            shard = write_shard(Path(folder, "0.tar"), samples)
            for source in ("shapes", shard):
                out = Path(folder, f"out_{Path(source).stem}")
                flags = ["--data", source, "--batch_size", str(batch), "--samples",
                         str(batch * steps), "--log_every", "20", "--eval_every", "100000"]
                seen = []
                for process, line in run_train(out, *flags):
                    if line.split("/")[0].split() in (["step", "60"], ["step", "500"],
                                                      ["step", "2000"]):
                        status = Path(f"/proc/{process.pid}/status").read_text()
                        seen.append(int(status.split("VmRSS:")[1].split()[0]) // 1024)
                grown = seen[-1] / seen[0]
                print(f"{Path(source).name:8} batch {batch}: {seen}, {grown:.2f} times")


# ------------------------------------------------------------------------------------------------
# training steps of the paper's models

# FLOP/s of bfloat16 without sparsity, from NVIDIA's data sheets; the first name that fits counts
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
COUNTED = 4  # samples whose operations are counted; the memory suffices for them without fusion


def count_flops(model, batch):
    """Floating-point operations of a forward and backward pass. Attention is counted as matrix
    products: fused kernels are not counted on a CPU, and with their recomputation on a GPU."""
    counter = FlopCounterMode(display=False)
    precision = torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU)
    with counter, precision, sdpa_kernel(SDPBackend.MATH):
        model.loss(*model(*batch))["loss"].backward()
    model.zero_grad()
    return counter.get_total_flops()


def training_step(model):
    """-> function of a batch that does what a step of train.py does."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(images, tokens):
        index = pack_tokens(tokens, model.config.vocab_size)
        batch = [x.to(DEVICE, non_blocking=True) for x in (images, tokens, index)]
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            outputs = model(*batch)
        model.loss(*outputs)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_scalars()

    return step


def bench_gpu():
    """The same batch again and again (resident), then batches of the loader from tar shards."""
    name = torch.cuda.get_device_name() if GPU else "cpu"
    peak = next((flops for card, flops in PEAKS.items() if card in name), None)
    print("\ntraining steps: a resident batch, and batches of the loader from tar shards")
    print(f"peak: {peak / 1e12:.0f} TFLOP/s" if peak else f"the peak of {name} is not known")
    print("model     batch  samples/s  TFLOP/s  of peak  peak GiB  loss  | loaded samples/s")
    jpegs = [photo_like(640, 480, seed) for seed in range(64 if GPU else 4)]
    cases = [("ViT-B-32", 1024), ("ViT-B-16", 512)] if GPU else [("tiny", 32), ("ViT-B-32", 4)]
    steps = 20 if GPU else 1
    with tempfile.TemporaryDirectory() as folder:
        samples = [(jpegs[i % len(jpegs)], f"a photo {i:04}") for i in range(8192 if GPU else 64)]
        source = data.open_source(write_shard(Path(folder, "0.tar"), samples))
        for name, N in cases:
            torch.manual_seed(0)
            model = CLIP(Config(**PRESETS[name], tokenizer="bytes", vocab_size=258)).to(DEVICE)
            batches = data.batches(source, model.config, N, workers=data.cores() if GPU else 0,
                                   pin_memory=GPU)
            images, tokens, _ = next(batches)
            resident = images.to(DEVICE), tokens.to(DEVICE)
            few = [x[:COUNTED].to(DEVICE) for x in (images, tokens)]
            index = pack_tokens(tokens[:COUNTED], 258).to(DEVICE)
            flops = N / COUNTED * count_flops(model, (*few, index))
            if GPU:
                model.compile()
                model.loss = torch.compile(model.loss)
                torch.cuda.reset_peak_memory_stats()
            step = training_step(model)
            vectors = [torch.randn(N, model.config.embed_dim, device=DEVICE) for _ in range(2)]
            vectors = [x.requires_grad_() for x in vectors]
            scalars = model.scalars().detach().requires_grad_()

            def several(batches):
                for images, tokens in batches:
                    step(images, tokens)

            def loss():
                for _ in range(steps):
                    model.loss(*vectors, scalars)["loss"].backward()

            def loaded():
                several(next(batches)[:2] for _ in range(steps))

            times = seconds(lambda: several([resident] * steps), loss, loaded, repeats=3)
            once, loss_time, from_loader = (t / steps for t in times)
            memory = torch.cuda.max_memory_allocated() / 2**30 if GPU else 0
            share = f"{flops / once / peak:7.1%}" if peak else "      -"
            print(f"{name:9} {N:5}  {N / once:9,.1f}  {flops / once / 1e12:7.3f}  {share}  "
                  f"{memory:8.1f} {loss_time / once:6.1%} | {N / from_loader:,.1f}")


def main():
    bench = "bench_"
    parts = {name: part for name, part in globals().items() if name.startswith(bench)}
    parts = {name.removeprefix(bench): part for name, part in parts.items()}
    parser = evaluate.Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    chosen = parser.parse_args().parts or [name for name in parts if name != "memory"]
    if not set(chosen) <= set(parts):
        parser.error(f"the parts are {', '.join(parts)}")
    where = torch.cuda.get_device_name() if GPU else f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads")
    for name in chosen:
        parts[name]()


if __name__ == "__main__":
    main()
