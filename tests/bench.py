"""Where the time goes, as ratios: python tests/bench.py (a minute or two on a CPU; larger by itself on CUDA).

Machines differ and are noisy, so both sides of every comparison run in turns in this one process, and the ratio of their medians counts.
"""

import io
import os
import platform
import random
import statistics
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")   # the profiler announces each start otherwise

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import data
from geometry import GEOMETRIES, entailment_loss, similarity
from model import CLIP, PRESETS, Config, any_length, contrastive_loss

warnings.filterwarnings("ignore", module="torch", category=FutureWarning)   # torch.compile, about torch
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(*functions, repeats=5):
    """Median time of each function, taken in turns."""
    def once(function):
        start = time.perf_counter()
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for function in functions:
        once(function)
    rounds = [[once(function) for function in functions] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*rounds)]


def peak_memory(function):
    """MiB of tensors alive at once beyond those before, from the profiler's record of every allocation."""
    activities = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    now = peak = 0
    for event in sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 2**20


# ---- (a) the loss, beside the textbook formulas in float64

def textbook(geometry, logit, x, y, curv):
    """The formulas as papers print them, in the type of x and y: what a careful implementer would write first."""
    if geometry == "clip":
        cosine = x @ y.T
        return cosine if logit == "cosine" else -torch.acos(cosine.clamp(-1 + 1e-7, 1 - 1e-7))
    if geometry == "euclidean":
        inner = x @ y.T
        if logit == "inner":
            return inner
        squared = (x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * inner).clamp_min(1e-12)
        return -squared if logit == "squared" else -squared.sqrt()

    if geometry != "hyperbolic":
        raise ValueError(f"no textbook formula for {geometry}; add it here")

    def lift(v):
        r = curv**0.5 * v.norm(dim=1, keepdim=True)
        space = torch.sinh(r) * v / r.clamp_min(1e-8)
        return space, (1 / curv + space.square().sum(1, keepdim=True)).sqrt()

    (xs, x0), (ys, y0) = lift(x), lift(y)
    inner = xs @ ys.T - x0 @ y0.T
    if logit == "inner":
        return inner
    d = torch.acosh((-curv * inner).clamp_min(1 + 1e-8)) / curv**0.5
    return -d if logit == "distance" else -d.square()


def textbook_cone(geometry, text, image, K, curv):
    if geometry == "euclidean":
        to_image = image - text
        exterior = torch.acos(F.cosine_similarity(text, to_image).clamp(-1 + 1e-7, 1 - 1e-7))
        return torch.relu(exterior - torch.asin((K / text.norm(dim=1)).clamp(max=1 - 1e-7)))
    lift = lambda v: torch.sinh(curv**0.5 * v.norm(dim=1, keepdim=True)) * v / (curv**0.5 * v.norm(dim=1, keepdim=True))
    xs, ys = lift(text), lift(image)
    x0, y0 = ((1 / curv + v.square().sum(1)).sqrt() for v in (xs, ys))
    inner = curv * ((xs * ys).sum(1) - x0 * y0)
    cosine = (y0 + x0 * inner) / (xs.norm(dim=1) * (inner.square() - 1).clamp_min(1e-8).sqrt())
    exterior = torch.acos(cosine.clamp(-1 + 1e-7, 1 - 1e-7))
    return torch.relu(exterior - torch.asin((2 * K / (curv**0.5 * xs.norm(dim=1))).clamp(max=1 - 1e-7)))


def bench_loss(N=2048, D=512):
    print(f"\n(a) loss, forward + backward, {N} x {N} x {D}, beside the printed formulas: in float64, and for flat space in float32 too")
    print(f"{'':24}{'ms':>6}{'compiled':>10}{'float64':>9}{'times faster':>14}{'compiled':>10}{'MiB':>6}{'float64':>9}{'share':>7}")
    torch.manual_seed(0)
    x, y = (torch.randn(N, D, device=DEVICE) / D**0.5 for _ in range(2))
    target = torch.arange(N, device=DEVICE)

    def step(loss):
        def run():
            a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
            curv = torch.tensor(1.0, device=DEVICE, requires_grad=True)
            loss(a, b, curv).backward()
        return run

    def row(name, ours, theirs):
        torch._dynamo.reset()
        sides = [step(ours), step(torch.compile(ours)), step(theirs)]
        plain, compiled, slow = seconds(*sides)
        mine, other = peak_memory(sides[0]), peak_memory(sides[2])
        print(f"{name:24}{1e3 * plain:6.0f}{1e3 * compiled:10.0f}{1e3 * slow:9.0f}{slow / plain:14.2f}{slow / compiled:10.2f}{mine:6.0f}{other:9.0f}{mine / other:7.0%}")

    def cross_entropy(logits):
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    for name, geometry in GEOMETRIES.items():
        project = geometry.retract
        for logit in geometry.logits:
            def ours(a, b, c):
                logits = 10 * similarity(project(a), project(b), name, logit, c)
                return contrastive_loss(logits, logits.T)

            def theirs(a, b, c):
                return cross_entropy(10 * textbook(name, logit, project(a).double(), project(b).double(), c))

            row(f"{name}/{logit}", ours, theirs)
            if name == "euclidean":
                row("  beside float32", ours, lambda a, b, c: cross_entropy(10 * textbook(name, logit, project(a), project(b), c)))
        if geometry.cone:
            row(f"{name} cone", lambda a, b, c: entailment_loss(a, b, name, 0.1, c).mean(),
                lambda a, b, c: textbook_cone(name, a.double(), b.double(), 0.1, c).mean())


# ---- (b) pictures

def photo_like(w, h, seed):
    """Noise in octaves, less of it in colour than in brightness, as in photographs: a JPEG of it is as large as theirs."""
    rng, canvas = np.random.default_rng(seed), np.full((h, w, 3), 128.0)
    for octave in range(8):
        for part in ([1, 1, 1], [0.2, 0, -0.2]):
            noise = rng.normal(0, 40 / 1.3**octave, (2 + 3 * 2**octave, 2 + 4 * 2**octave)).astype(np.float32)
            canvas += np.asarray(Image.fromarray(noise).resize((w, h), Image.Resampling.BICUBIC))[..., None] * part
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def bench_pictures(count=20):
    print("\n(b) training crop to 224, pictures per second and core; plain = decode, crop, resize")
    for w, h in ((640, 427), (640, 480), (1024, 768)):
        jpegs = [io.BytesIO() for _ in range(count)]   # all different: a processor learns the branches of a single one by heart
        for seed, jpeg in enumerate(jpegs):
            photo_like(w, h, seed).save(jpeg, "JPEG", quality=90)

        def plain():
            for i, jpeg in enumerate(jpegs):
                box = data.random_box(w, h, 0.9, random.Random(i))
                data.to_tensor(Image.open(jpeg).convert("RGB").crop(box).resize((224, 224), Image.Resampling.BICUBIC))

        def ours():
            for i, jpeg in enumerate(jpegs):
                data.load_training_crop(jpeg, 224, 0.9, random.Random(i))

        fast, slow = seconds(ours, plain)
        size = statistics.mean(len(jpeg.getvalue()) for jpeg in jpegs) / 1000
        print(f"{w}x{h}, {size:.0f} kB: {count / fast:6.0f}/s   plain {count / slow:6.0f}/s   {slow / fast:5.2f} times faster")


# ---- (c) training steps

def matrix_peak(dtype):
    """FLOP/s of one large matrix product: what this machine can do at best."""
    n = 8192 if DEVICE.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b)[0]


def flops(config, N, real):
    """FLOPs of forward and backward (three times forward): 12 C^2 multiply-adds per token and layer, the last layer's but 2 C^2 for one token
    only; those of attention scores are left out."""
    tower = lambda tokens, layers, C: 12 * C**2 * (tokens * (layers - 1) + N) + 2 * C**2 * (tokens - N)
    patches = (config.image_size // config.patch_size) ** 2
    image = tower(N * (1 + patches), config.vision_layers, config.vision_width) + N * patches * 3 * config.patch_size**2 * config.vision_width
    return 6 * (image + tower(real, config.text_layers, config.text_width))


def bench_steps():
    on_gpu = DEVICE.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    peak = matrix_peak(dtype)
    print(f"\n(c) training steps, towers in {str(dtype)[6:]}, captions of 12.6 tokens in 77; peak of a matrix product {peak / 1e12:.2f} TFLOP/s")
    for name, N in (("tiny", 128), ("ViT-B-32", 512 if on_gpu else 16), *([("ViT-B-16", 512)] if on_gpu else [])):
        torch.manual_seed(0)
        config = Config(**PRESETS[name], vocab_size=49408, tokenizer="clip")
        model = CLIP(config).to(DEVICE)
        if on_gpu:
            model.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        images = torch.randint(0, 256, (N, 3, config.image_size, config.image_size), dtype=torch.uint8, device=DEVICE)
        lengths = torch.randint(10, 17, (N,)) - (torch.rand(N) < 0.4).int()
        tokens = torch.randint(1, 49406, (N, 77))
        tokens[torch.arange(N), lengths - 1] = 49407
        tokens[torch.arange(77) >= lengths[:, None]] = 0
        longest = int(lengths.max())
        real = (torch.arange(longest) < lengths[:, None]).flatten().nonzero().squeeze(1)   # as data.Batches gives them

        def step(tokens, index):
            tokens, index = tokens.to(DEVICE), index.to(DEVICE)
            any_length(tokens, index)

            def run():
                optimizer.zero_grad()
                with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=on_gpu):
                    loss = model(images, tokens, index)["loss"]
                loss.backward()
                optimizer.step()
            return run

        fast, slow = seconds(step(tokens[:, :longest], real), step(tokens, torch.arange(N * 77)), repeats=10 if on_gpu else 3)
        rate = flops(config, N, len(real)) / fast
        print(f"{name:10} batch {N:4}: {1 / fast:6.2f} steps/s, {N / fast:8.0f} samples/s, {rate / 1e12:7.3f} TFLOP/s, MFU {rate / peak:4.0%}; "
              f"padded text {N / slow:8.0f} samples/s, unpadded {slow / fast:.2f} times faster")


# ---- (d) tokens

def bench_tokens():
    from test_data import plain_bpe
    captions = [data.Shapes().sample(i, 0, 32, 0.9, {})[1] for i in range(2000)]
    took, = seconds(lambda: data.tokenize(captions, "bytes"))
    print(f"\n(d) captions per second: bytes {len(captions) / took:,.0f}")
    try:
        data.clip_encoding()
    except Exception as error:
        return print(f"    clip: its vocabulary is not here ({type(error).__name__})")
    import gzip
    import tiktoken.load
    merges = gzip.decompress(tiktoken.load.read_file_cached(*data.CLIP_VOCABULARY)).decode().split("\n")[1:48_895]
    encoder = plain_bpe(merges)
    ours, plain = seconds(lambda: data.tokenize(captions, "clip"), lambda: [encoder(data.collapse_whitespace(c)) for c in captions])
    print(f"    clip {len(captions) / ours:,.0f}, a plain encoder without a cache {len(captions) / plain:,.0f}: {plain / ours:.1f} times faster")


if __name__ == "__main__":
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}")
    sections = dict(loss=bench_loss, pictures=bench_pictures, steps=bench_steps, tokens=bench_tokens)
    for section in sys.argv[1:] or sections:
        sections[section]()
