"""Train CLIP in one of three geometries.

    python train.py                                                # EuCLIP on drawn shapes (CPU)
    python train.py --geometry hyperbolic --entailment_weight 0.2 --out_dir out_meru  # MERU
    torchrun --nproc_per_node=8 train.py --out_dir out_8           # eight processes share a batch
    python train.py --resume                                       # resume the run in out/

The batch of step s depends only on the data, the flags and s. Apart from rounding, a run is
therefore the same on one process and on eight, and it stays the same if we stop and resume it.
out/ckpt.pt contains its whole state, and out/log.jsonl its history.
"""

import os

# While torch's threads wait for each other, they spin. This limit, which OpenMP reads when torch is
# imported, saves time if other programs share the cores. See `python -m lab.bench threads`.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import datetime
import fcntl
import json
import math
import re
import signal
import textwrap
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel as DDP

import data
import evaluate
from data import print0
from geometry import GEOMETRIES
from model import CLIP, PRESETS, Config, load_checkpoint, load_model, pack_tokens, rank, world_size

def not_negative(value):
    return not isinstance(value, (int, float)) or 0 <= value < math.inf

def flag(default, help, allowed=not_negative, fixed=False):
    return field(default=default, metadata={"help": help, "allowed": allowed, "fixed": fixed})

fixed = partial(flag, fixed=True)  # a flag that a resumed run cannot change

@dataclass
class TrainConfig:
    """The flags. The defaults are for the quick start; README lists the settings of the paper."""

    geometry: str = fixed("euclidean", ", ".join(GEOMETRIES), GEOMETRIES.__contains__)
    logit: str | None = fixed(None, "default: the geometry's first; see geometry.py")
    entailment_weight: float = flag(0.0, "lambda, the weight of the entailment loss, at least 0")
    min_radius: float = flag(0.1, "K, at least 0; a larger K makes wider cones")
    final_min_radius: float | None = flag(None, "K changes linearly to this value at the last step")
    init_logit_scale: float | None = fixed(None, "log space; default: the logit's", math.isfinite)
    max_logit_scale: float = flag(100.0, "a factor (not its log) > 0", lambda x: 0 < x < math.inf)
    model: str | None = fixed(None, f"default: tiny; {', '.join(PRESETS)}", PRESETS.__contains__)
    final_ln: bool | None = fixed(None, "whether both towers end with a LayerNorm")
    init_from: str | None = fixed(None, "start with the weights and sizes of this checkpoint")
    data: str = flag("shapes", "shapes, tar shards, a .csv or .tsv, or a folder: see data.py")
    val_data: str | None = flag(None, "source of held-out data; shapes has its own")
    crop_scale: float = fixed(0.9, "smallest crop area / image area", lambda x: 0 < x <= 1)
    tokenizer: str | None = fixed(None, "bytes, clip or tiktoken's; default: bytes (tiny) or clip")
    batch_size: int = fixed(64, "samples over all processes, at least 2", lambda n: n >= 2)
    micro_batch: int = flag(0, "samples per process and pass, to save memory; 0: all at once")
    samples: int = flag(45_000, "total number of training samples")
    lr: float = flag(1.5e-3, "peak learning rate; after the warm-up it decays to 0 as a cosine")
    warmup: int | None = flag(None, "steps; default: two fifths of all, at most 500")
    weight_decay: float = fixed(0.2, "of matrices; other parameters have none")
    beta2: float = fixed(0.98, "of AdamW, below 1", lambda x: 0 <= x < 1)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: no limit")
    out_dir: str = flag("out", "folder for ckpt.pt and log.jsonl")
    resume: bool = flag(False, "resume out_dir/ckpt.pt with its flags; start if it is missing")
    save_every: int = flag(1000, "steps between checkpoints, at least 1", lambda n: n >= 1)
    eval_every: int | None = flag(None, "steps, at least 1; default: 1/5 of all", lambda n: n >= 1)
    log_every: int = flag(20, "steps between reports, at least 1", lambda n: n >= 1)
    seed: int = fixed(0, "of weights and data, below 2**63", lambda n: 0 <= n < 2**63)
    device: str | None = flag(None, "default: cuda, else mps, else cpu")
    dtype: str | None = flag(None, "default: bfloat16 if the GPU supports it, else float32",
                             ("float32", "bfloat16").__contains__)
    compile: bool | None = flag(None, "use torch.compile; default: on cuda, but not for tiny")
    workers: int | None = flag(None, "loading workers per process; default: its cores, at most 32")

# ---- the parts of a step -----------------------------------------------------------------------

def learning_rate(step, steps, peak, warmup):
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

def min_radius(step, steps, first, last):
    return first if last is None else first + (last - first) * step / max(1, steps - 1)

def build_model(c):
    torch.manual_seed(c.seed)  # the same weights on every process
    scale = c.init_logit_scale
    if c.init_from:
        model = load_model(c.init_from).train()
        for name in ("geometry", "logit", "tokenizer", "final_ln"):
            value = getattr(model.config, name)
            if getattr(c, name) not in (None, value):
                raise ValueError(f"{c.init_from} has --{name} {value}, not {getattr(c, name)}")
        if scale is not None:
            model.logit_scale.data.fill_(scale)
        return model
    if scale is None and c.data == "shapes":  # short runs need other values; see README, Pitfalls
        scale = {"squared": 2.0, "cosine": 3.4, "arc": 3.4}.get(c.logit, 3.0)
    elif scale is None:
        scale = GEOMETRIES[c.geometry].init_logit_scale(c.logit, entailment=c.entailment_weight > 0)
    tokenizer = c.tokenizer or ("bytes" if c.model == "tiny" else "clip")
    return CLIP(Config(**PRESETS[c.model], geometry=c.geometry, logit=c.logit, final_ln=c.final_ln,
                       init_logit_scale=scale, tokenizer=tokenizer,
                       vocab_size=data.vocab_size(tokenizer)))

def build_optimizer(model, c):
    """-> AdamW with weight decay on matrices, not on gains, biases, the class token and scalars."""
    decay = [p for p in model.parameters() if p.ndim >= 2]
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": c.weight_decay},
              {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=c.lr, betas=(0.9, c.beta2), eps=1e-6, fused=True)

def split_batch(images, tokens, micro_batch, vocab_size, device):
    """-> [(images, tokens, index)] on the device, micro_batch samples each (0: all samples)."""
    size, parts = micro_batch or len(images), []
    for part in zip(images.split(size), tokens.split(size)):
        index = pack_tokens(part[1], vocab_size)
        images, tokens, index = (x.to(device, non_blocking=True) for x in (*part, index))
        torch._dynamo.maybe_mark_dynamic(tokens, 1)  # compile once for captions of all lengths
        torch._dynamo.maybe_mark_dynamic(index, 0)
        parts.append((images, tokens, index))
    return parts

def gradcache_backward(net, model, parts, autocast, *loss_args):
    """Gradients of the whole batch, with the activations of one part at a time (GradCache,
    arXiv:2101.06983).

    First embed all parts without gradient. Then compute the loss of the whole batch and the
    gradients of the embeddings. Finally embed each part again and backpropagate its rows of these
    gradients through the towers. Summing the losses of small batches would give other gradients.
    This method is exact if the towers have no dropout, and costs one additional forward pass.
    """
    with torch.no_grad(), autocast:
        images, texts, scalars = zip(*(model(*part) for part in parts))
    embeddings = torch.cat(images), torch.cat(texts), scalars[0]
    embeddings = [x.detach().requires_grad_() for x in embeddings]
    metrics = model.loss(*embeddings, *loss_args)
    metrics["loss"].backward()
    image_grad, text_grad, scalars_grad = (x.grad for x in embeddings)
    for i, part in enumerate(parts):
        rows = slice(i * len(part[0]), (i + 1) * len(part[0]))
        net.require_backward_grad_sync = i == len(parts) - 1  # DDP averages after the last part
        with autocast:
            outputs = net(*part)
        # All parts share the scalars, so each part backpropagates a fraction of their gradient.
        grads = image_grad[rows], text_grad[rows], scalars_grad / len(parts)
        torch.autograd.backward(outputs, grads)
    return metrics

# ---- the training ------------------------------------------------------------------------------

def train(c, checkpoint):
    """Start a run, or resume the run of a checkpoint (a new run: {}). Raises ValueError or OSError
    for errors that the user can fix."""
    device = join_processes(c.device)
    main_process, path, start = rank() == 0, Path(c.out_dir, "ckpt.pt"), checkpoint.get("step", 0)
    steps = validate(c, start)
    check_equal(start, f"{path}; it must be on a shared disk")
    if start >= steps:
        return print0(f"{path} is already complete: {start} steps")

    # model and optimizer
    model = CLIP(Config(**checkpoint["config"])) if checkpoint else build_model(c)
    model.config.max_logit_scale = c.max_logit_scale
    c.tokenizer = model.config.tokenizer  # to be printed and saved
    model.to(device)
    optimizer = build_optimizer(model, c)
    if checkpoint:
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    cuda = device.type == "cuda"
    supported = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    bfloat16 = supported if c.dtype is None else c.dtype == "bfloat16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)  # for the towers
    tiny = model.config.vision_width <= PRESETS["tiny"]["vision_width"]
    if c.compile or (c.compile is None and cuda and not tiny):
        print0("torch.compile compiles during the first steps, which takes minutes")
        model.compile()  # in place, so that parameters keep their names
        model.loss = torch.compile(model.loss)
    net = DDP(model, gradient_as_bucket_view=True) if world_size() > 1 else model

    # data: process 0 indexes the shards, and then the other processes read its index
    if not main_process:
        barrier()
    samples = data.open_source(c.data)
    if main_process:
        barrier()
    val_data = evaluate.held_out_source(asdict(c))
    held_out = data.open_source(val_data).held_out() if val_data and main_process else None
    check_equal(len(samples), f"numbers of samples in {c.data}")
    if len(samples) != checkpoint.get("data_size", len(samples)):
        raise ValueError(f"{c.data} has {len(samples):,} samples, but the run has begun with "
                         f"{checkpoint['data_size']:,}")
    stream = data.batches(samples, model.config, c.batch_size, c.crop_scale, c.seed, rank(),
                          world_size(), c.workers, step=start, pin_memory=cuda)
    batches = ((split_batch(images, tokens, c.micro_batch, model.config.vocab_size, device),
                skipped) for images, tokens, skipped in stream)
    batch = next(batches)  # may raise, before the folder of the run exists
    skipped = Counter(checkpoint.get("skipped", {}) if main_process else {})

    log = open_log(path.with_name("log.jsonl"), start) if main_process else None
    print_start(c, model, device, steps, checkpoint, samples)
    received, loading_error = [], None  # why this process wants to stop: signals, an error
    catch_signals(received)
    began = since = time.monotonic()
    counted = start  # step of the last report, which was at the time `since`
    for step in range(start, steps):
        signaled, errors = zip(*gather((bool(received), loading_error)))
        if any(signaled + errors):  # if one process must stop, all do
            save(path, model, optimizer, c, step, skipped, len(samples))
            if not any(signaled):  # a signal to all processes also ends the loading workers
                raise next(filter(None, errors))
            return print0(f"stopped after step {step}; resume the run with --resume")
        lr = learning_rate(step, steps, c.lr, c.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        K = min_radius(step, steps, c.min_radius, c.final_min_radius)
        K = torch.full((), K, device=device)  # torch.compile treats a float as a constant

        parts, newly_skipped = batch  # fetched in the step before
        for kind, (number, name) in newly_skipped.items():
            if kind not in skipped:
                data.say(f"skipping {name}: {kind}")
            skipped[kind] += number
        if len(parts) == 1:
            with autocast:
                image, text, scalars = net(*parts[0])
            metrics = model.loss(image, text, scalars, c.entailment_weight, K)
            metrics["loss"].backward()
        else:
            metrics = gradcache_backward(net, model, parts, autocast, c.entailment_weight, K)

        try:
            batch = next(batches)  # meanwhile a GPU computes the gradient
        except data.LoadingError as error:
            loading_error = error

        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
        if not grad_norm.isfinite():  # on all processes, which share the gradient
            values = ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())
            raise FloatingPointError(f"gradient {grad_norm} at step {step + 1}, {c.geometry}/"
                                     f"{c.logit}, {values}; see README, Pitfalls")
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_scalars()

        done = step + 1
        evaluating = val_data and (done == steps or done % c.eval_every == 0)
        if done in (1, steps) or done % c.log_every == 0:
            values = dict(zip(metrics, torch.stack([*metrics.values()]).tolist()))  # waits for GPU
            seconds = time.monotonic() - since
            values["skipped"] = skipped.total()
            everyones = gather(values)
            means = {name: sum(v[name] for v in everyones) / world_size() for name in values}
            means |= {"lr": lr, "skipped": sum(v["skipped"] for v in everyones),  # no mean
                      "samples_per_second": (done - counted) * c.batch_size / seconds,
                      "grad_norm": grad_norm.item()}
            left = (steps - done) / (done - counted) * seconds
            report(log, done, steps, means, describe_step(means, c.entailment_weight, left))
            since, counted = time.monotonic(), done
        if evaluating or done == steps or done % c.save_every == 0:
            save(path, model, optimizer, c, done, skipped, len(samples))  # evaluating takes long
        if evaluating and main_process:  # the other processes wait in their next `gather`
            moment = time.monotonic()
            with autocast:
                report(log, done, steps, *evaluate_held_out(model, held_out, c.workers))
            since += time.monotonic() - moment
    seconds = time.monotonic() - began
    print0(f"{steps - start} steps in {seconds:.0f} s; evaluate {path} with evaluate.py")

# ---- below: flags, processes, signals, and the folder of a run ----------------------------------

NOT_KEPT = ("resume", "out_dir", "device", "workers",  # flags not taken from the checkpoint
            "quick_gelu", "vision_heads", "text_heads")  # of older versions, now in `config`

def parse_args(argv=None):
    """-> TrainConfig, and the checkpoint to resume, or {} for a new run. Flags that argv does not
    contain come from the checkpoint. Raises ValueError."""
    parser = evaluate.Parser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    for f in fields(TrainConfig):
        kind = getattr(f.type, "__args__", [f.type])[0]  # of str | None: str
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        text = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")
        parser.add_argument(f"--{f.name}", help=text, default=argparse.SUPPRESS, **how)
    explicit = vars(parser.parse_args(argv))  # the flags that argv contains
    c = TrainConfig(**explicit)
    path = Path(c.out_dir, "ckpt.pt")
    if not path.exists():
        if c.resume:  # schedulers start and resume runs by one command
            print0(f"there is nothing to resume in {c.out_dir}: starting afresh")
        return c, {}
    if not c.resume:
        raise ValueError(f"{path} already contains a run; add --resume or change --out_dir")
    checkpoint = load_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise ValueError(f"{path} has no optimizer state to resume; use --init_from instead")
    before = {k: v for k, v in checkpoint["train_config"].items() if k not in NOT_KEPT}
    with data.reading(path):  # a newer version may have more flags
        c = TrainConfig(**before | explicit)
    for f in fields(c):
        value, old = getattr(c, f.name), before.get(f.name, f.default)
        if f.metadata["fixed"] and value != old:
            raise ValueError(f"{path} has --{f.name} {old}, not {value}")
    return c, checkpoint

def validate(c, done):
    """Set the defaults that depend on other flags -> number of steps. Raises ValueError."""
    for f in fields(c):
        value = getattr(c, f.name)
        if value is not None and not f.metadata["allowed"](value):
            raise ValueError(f"--{f.name} {value} is not allowed: {f.metadata['help']}")
    steps, local = c.samples // c.batch_size, c.batch_size // world_size()
    geometry = GEOMETRIES[c.geometry]
    c.logit = geometry.find_logit(c.logit)
    c.warmup = min(500, steps * 2 // 5) if c.warmup is None else c.warmup
    c.eval_every = c.eval_every or max(1, math.ceil(steps / 5))
    if c.workers is None:
        c.workers = data.cores(processes=int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    for wrong, message in (
        (os.path.exists(c.out_dir) and not os.path.isdir(c.out_dir),
         f"--out_dir {c.out_dir} is not a folder"),
        (c.entailment_weight and not geometry.cones,
         f"--entailment_weight needs cones, but {c.geometry} has none; change --geometry"),
        (c.init_from and c.model, "--init_from determines the sizes; remove --model"),
        (c.batch_size % world_size(), f"--batch_size is not divisible by {world_size()} processes"),
        (c.micro_batch and local % c.micro_batch,
         f"--micro_batch {c.micro_batch} does not divide the {local} samples of a process"),
        (steps < 1, f"--samples {c.samples} is less than one batch of {c.batch_size}"),
        (done < steps <= c.warmup,  # a complete run may have any
         f"--warmup {c.warmup} must be less than the {steps} steps"),
    ):
        if wrong:
            raise ValueError(message)
    c.model = c.model or (None if c.init_from else "tiny")
    return steps

def join_processes(name):
    """Join the other processes, if torchrun started any -> the device of this process."""
    if "RANK" not in os.environ:
        return evaluate.pick_device(name)
    backend, local = "gloo", os.environ.get("LOCAL_RANK", "0")
    if torch.cuda.device_count() and (name or "cuda").startswith("cuda"):
        name, backend = f"cuda:{local}", "cpu:gloo,cuda:nccl"
    device = evaluate.pick_device(name)  # raises ValueError if the GPU does not exist
    if device.type == "cuda":
        torch.cuda.set_device(device)  # so that it allocates on no other GPU
    if local == "0":
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        data.say(f"waiting for {os.environ.get('WORLD_SIZE')} processes at {place}")
    # The timeout is a day, because process 0 may evaluate for hours while the others wait. If a
    # process fails, torchrun ends the others.
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    return device

def gather(value):
    """-> list of the values of all processes, which also wait here for each other."""
    values = [value] * world_size()
    if world_size() > 1:
        try:
            dist.all_gather_object(values, value)  # by gloo, on the CPU
        except RuntimeError:  # another process has failed
            time.sleep(5)  # torchrun shows the error of the process that ends first
            raise
    return values

def barrier():
    gather(None)

def check_equal(number, what):
    numbers = gather(number)
    if len(set(numbers)) > 1:
        raise ValueError(f"processes see different {what}: {numbers}")

def catch_signals(received):
    """After the first signal, a run stops after the step. Ctrl-C then kills it."""

    def receive(number, frame):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not received and rank() == 0:
            with suppress(OSError):  # a signal handler cannot use print
                os.write(2, b"\nstopping after this step; Ctrl-C again ends at once\n")
        received.append(number)

    for number in data.STOP_SIGNALS:
        with suppress(ValueError):  # only the main thread can receive signals
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, receive)

def open_log(path, step):
    """-> log.jsonl without the reports after `step`, which will be written again. The file is
    locked until this process ends, so that no other run writes to the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = open(path, "a+b")
    try:
        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # worker processes do not inherit the lock
    except (BlockingIOError, PermissionError):
        raise ValueError(f"another run writes to {path.parent}; use another --out_dir") from None
    except OSError:
        pass  # some network disks do not support locks
    log.seek(0)
    lines, kept = log.read().splitlines(keepends=True), []
    for line in lines:
        match = re.match(rb'\s*\{"step": (\d+)', line)
        if not match or int(match[1]) <= step:
            kept.append(line if line.endswith((b"\n", b"\r")) else line + b"\n")
    if kept != lines:
        log.truncate(0)
        log.writelines(kept)
        log.flush()
    return log

def save(path, model, optimizer, c, step, skipped, data_size):
    """Write a checkpoint. The old file stays intact until the new one is on the disk."""
    skipped = sum(gather(skipped), Counter())
    if rank() == 0:
        state = {"state_dict": model.state_dict(), "config": asdict(model.config),
                 "optimizer": optimizer.state_dict(), "train_config": asdict(c), "step": step,
                 "skipped": dict(skipped), "data_size": data_size, "epoch": 0}  # for open_clip
        temporary = path.with_suffix(".tmp")
        with data.reading(f"cannot write {path}"), open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    barrier()  # wait until the file exists

def print_start(c, model, device, steps, checkpoint, samples):
    flags = " ".join(f"{name}={value}" for name, value in asdict(c).items() if value is not None)
    print0(textwrap.fill(flags, 100))
    count = sum(p.numel() for p in model.parameters())
    print0(f"torch {torch.__version__}, {device}, {world_size()} processes, {count:,} parameters")
    print0(f"{c.data}: {samples}; skipped: {data.describe(samples.skipped)}")
    print0(f"chance level of the loss: ln({c.batch_size}) = {math.log(c.batch_size):.3f}")
    if len(samples) < c.batch_size:
        floor = math.log(c.batch_size / len(samples))
        print0(f"warning: batches repeat samples, so the loss stays above {floor:.2f}")
    if checkpoint:
        step, old = checkpoint["step"], checkpoint["optimizer"]["param_groups"][0]["lr"]
        new = learning_rate(step, steps, c.lr, c.warmup)
        print0(f"resuming after step {step}, with a learning rate of {old:.2g}, next {new:.2g}")

def report(log, step, steps, values, text):
    """Report `values` in log.jsonl for programs, and the text on stdout for people."""
    if rank() == 0:
        log.write(json.dumps({"step": step} | values).encode() + b"\n")
        log.flush()
        line = f"step {step}/{steps}  {text}"
        print0(textwrap.fill(line, 100, subsequent_indent="  ", break_on_hyphens=False))

def describe_step(values, entailment_weight, seconds_left):
    text = f"loss {values['loss']:.4g}"
    if entailment_weight:
        text += f"  entailment {values['entailment']:.2f}  in cone {values['in_cone']:.0%}"
    left = str(datetime.timedelta(seconds=int(min(seconds_left, 1e9)))).removeprefix("0:")
    text += f"  lr {values['lr']:.1e}  {values['samples_per_second']:,.0f} samples/s  {left} left"
    return text + (f"  skipped {values['skipped']}" if values["skipped"] else "")

def evaluate_held_out(model, held_out, workers):
    """-> values for log.jsonl, text for people."""
    print0(f"evaluating {len(held_out.images)} held-out images")
    try:
        results = evaluate.evaluate(model, held_out, workers=workers)
    except (ValueError, OSError, data.LoadingError) as error:  # a signal can end the workers
        return {}, f"warning: not evaluated: {error}"
    metrics = results.get("zero_shot", {}) | results["retrieval"]
    values = {f"val_{name}": v for name, v in metrics.items() if isinstance(v, float)}
    top1 = f"  top-1 {values['val_top1']:.1%}" if "val_top1" in values else ""
    r1 = f"{values['val_i2t_r1']:.1%} / {values['val_t2i_r1']:.1%}"
    return values, f"held out: R@1 {r1}{top1}"

@record  # lets torchrun show the traceback of the first process that fails
def main():
    try:
        train(*parse_args())
    except (ValueError, OSError, dist.DistError) as error:  # errors the user can fix
        evaluate.end(f"train.py: {error}")
    except (FloatingPointError, data.LoadingError) as error:
        evaluate.end(f"train.py: {error}", status=1)
    if dist.is_initialized():
        barrier()  # threads of a process that exits early can abort the others
        dist.destroy_process_group()

if __name__ == "__main__":
    main()
