"""Train CLIP in one of three geometries.

    python train.py                                                # EuCLIP on drawn shapes (CPU)
    python train.py --geometry hyperbolic --entailment_weight 0.2  # MERU
    torchrun --nproc_per_node=8 train.py --geometry euclidean      # eight processes share a batch
    python train.py --resume                                       # go on with what is in out/

The batch of step s depends on the data, the flags and s alone. So up to rounding a run is the same
on one process or eight, and after any number of stops. Its whole state is out/ckpt.pt, its history
out/log.jsonl.
"""

import os

# Torch's threads wait for each other in a loop; beside other programs that takes most of the time.
# GNU's OpenMP reads this when torch is imported. Measurements: tests/bench.py threads
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import datetime
import fcntl
import json
import math
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel as DDP

import data
import evaluate
from geometry import GEOMETRIES, find_geometry
from model import CLIP, PRESETS, Config, load_checkpoint, load_model, pack_tokens, rank, world_size


def flag(default, help, lowest=0):
    return field(default=default, metadata={"help": help, "lowest": lowest})


@dataclass
class TrainConfig:
    """The flags. Defaults are the quick start's; README has the paper's."""

    geometry: str = flag("euclidean", ", ".join(GEOMETRIES))
    logit: str | None = flag(None, "default: the geometry's first; see geometry.py")
    entailment_weight: float = flag(0.0, "lambda, the weight of the entailment loss")
    min_radius: float = flag(0.1, "K: the larger, the wider the cones")
    final_min_radius: float | None = flag(None, "K at the end, reached linearly")
    init_logit_scale: float | None = flag(None, "log space; default: see README", -math.inf)
    max_logit_scale: float = flag(100.0, "the factor itself", 1e-9)
    model: str = flag("tiny", ", ".join(PRESETS))
    final_ln: bool | None = flag(None, "LayerNorm at the end of both towers")
    quick_gelu: bool | None = flag(None, "as in OpenAI's own weights")
    vision_heads: int | None = flag(None, "default: width / 64")
    text_heads: int | None = flag(None, "default: width / 64")
    init_from: str | None = flag(None, "start with the weights and sizes of this checkpoint")
    data: str = flag("shapes", "shapes, tar shards, a .csv or .tsv, or a folder; see data.py")
    val_data: str | None = flag(None, "held-out data, likewise; shapes has its own")
    crop_scale: float = flag(0.9, "smallest fraction of a picture's area that a crop keeps")
    tokenizer: str | None = flag(None, "bytes, clip, or tiktoken's; default: bytes for tiny")
    batch_size: int = flag(64, "over all processes", 2)
    micro_batch: int = flag(0, "samples per process and pass, if memory is short; 0: all at once")
    samples: int = flag(45_000, "how many to see")
    lr: float = flag(1.5e-3, "at its peak; after the warm-up it falls to 0 by a cosine")
    warmup: int | None = flag(None, "steps; default: two fifths of all, 500 at most")
    weight_decay: float = flag(0.2, "on matrices only")
    beta2: float = flag(0.98, "AdamW's")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: any")
    out_dir: str = flag("out", "for ckpt.pt and log.jsonl")
    resume: bool = flag(False, "go on from out_dir/ckpt.pt with its flags; start if there is none")
    save_every: int = flag(1000, "steps", 1)
    eval_every: int | None = flag(None, "steps; default: five times in all", 1)
    log_every: int = flag(20, "steps", 1)
    device: str | None = flag(None, "default: cuda, else mps, else cpu")
    dtype: str | None = flag(None, "float32 or bfloat16; default: bfloat16 on cuda")
    compile: bool | None = flag(None, "torch.compile; default: on cuda")
    workers: int | None = flag(None, "loading processes per process; default: its cores, at most 8")
    seed: int = flag(0, "of weights and data")


# A resumed run cannot change these flags, but all others. The first start's warmup and eval_every
# stay, also with other --samples, unless they are given.
FIXED = ("geometry", "logit", "model", "final_ln", "quick_gelu", "vision_heads", "text_heads",
         "init_from", "init_logit_scale", "data", "crop_scale", "tokenizer", "batch_size",
         "weight_decay", "beta2", "seed")  # fmt: skip


def parse_args(argv=None):
    """-> TrainConfig, the names of the flags that were given."""
    about = {"description": __doc__.split("\n")[0], "argument_default": argparse.SUPPRESS}
    parser = argparse.ArgumentParser(**about, allow_abbrev=False)
    for f in fields(TrainConfig):
        kind = next(t for t in (bool, int, float, str) if f.type in (t, t | None))
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        default = "" if f.default is None else f" (default: {f.default})"
        parser.add_argument(f"--{f.name}", help=f.metadata["help"] + default, **how)
    given = vars(parser.parse_args(argv))
    return TrainConfig(**given), set(given)


def validate(c):
    """Fill in what depends on other flags. Raises ValueError for what cannot work."""
    geometry = find_geometry(c.geometry)
    c.logit = geometry.find_logit(c.logit)
    for f in fields(c):
        value, lowest = getattr(c, f.name), f.metadata["lowest"]
        if isinstance(value, (int, float)) and not lowest <= value < math.inf:
            raise ValueError(f"--{f.name} must be finite, at least {lowest}, not {value}")
    steps, local = c.samples // c.batch_size, c.batch_size // world_size()
    c.warmup = min(500, steps * 2 // 5) if c.warmup is None else c.warmup
    c.eval_every = c.eval_every or max(1, math.ceil(steps / 5))
    if c.workers is None:
        c.workers = data.cores(processes=int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    for wrong, message in (
        (c.entailment_weight and not geometry.cones,
         f"--entailment_weight needs cones; {c.geometry} has none: use another --geometry"),
        (c.model not in PRESETS, f"no model {c.model!r}; choose one of {', '.join(PRESETS)}"),
        (not 0 < c.crop_scale <= 1, f"--crop_scale must be in (0, 1], not {c.crop_scale}"),
        (c.beta2 >= 1, f"--beta2 must be below 1, not {c.beta2}"),
        (c.batch_size % world_size(),
         f"--batch_size {c.batch_size} is not divisible by {world_size()} processes"),
        (c.micro_batch and local % c.micro_batch,
         f"--micro_batch {c.micro_batch} does not divide the {local} samples of a process"),
        (steps < 1, f"--samples {c.samples} is less than one batch of {c.batch_size}"),
        (c.warmup >= max(1, steps), f"--warmup {c.warmup} leaves nothing of {steps} steps"),
        (c.dtype not in (None, "float32", "bfloat16"), "--dtype must be float32 or bfloat16"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)


# ------------------------------------------------------------------------------------------------
# processes and signals


def print0(*args):
    if rank() == 0:
        print(*args, flush=True)


def join_processes(name):
    """Meet the other processes, if torchrun started any -> the device of this one."""
    if "RANK" not in os.environ:
        if os.environ.get("SLURM_NTASKS", "1") != "1":
            raise ValueError("each SLURM task would train alone; start one per machine, which runs "
                             "torchrun --nproc_per_node=GPUS train.py")  # fmt: skip
        return evaluate.pick_device(name)
    backend, gpus = "gloo", torch.cuda.device_count()
    if gpus and (name or "cuda").startswith("cuda"):  # each has its own, and touches no other
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= gpus:
            raise ValueError(f"process {local} has no GPU; use --nproc_per_node={gpus}")
        name, backend = f"cuda:{local}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local)
    device = evaluate.pick_device(name)
    if device.type == "mps":
        raise ValueError("several processes cannot share mps: use --device cpu")
    # A day, for evaluations of hours. When a process fails, torchrun ends the others
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    return device


def add_up(*numbers):
    """Sums over all processes, which also wait here for each other."""
    numbers = torch.tensor(numbers, dtype=torch.float64)
    if world_size() > 1:
        try:
            dist.all_reduce(numbers)  # numbers on the CPU travel by gloo
        except RuntimeError as error:
            time.sleep(5)  # the one that failed ends first, and torchrun shows its error
            sys.exit(f"train.py: another process has failed ({error})")
    return numbers.tolist()


class StopSignals:
    """A signal ends the training: after the step, or at once if it waits for data. More of them
    change nothing, as schedulers signal all processes and torchrun passes its own on, but Ctrl-C
    after the first kills."""

    def __init__(self):
        self.received = self.waiting = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.received = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.waiting:  # in `next`, for data that may never come
            self.waiting = False
            raise KeyboardInterrupt

    def next(self, batches):
        """-> a batch, or the KeyboardInterrupt or LoadingError that came instead: not raised, for
        all processes are to hear of it in their next sum."""
        try:
            self.waiting = True
            return KeyboardInterrupt() if self.received else next(batches)
        except (KeyboardInterrupt, data.LoadingError) as error:
            return error
        finally:
            self.waiting = False


def choose_precision(c, device):
    """-> autocast of the towers, whether to compile. Raises ValueError for what cannot be had."""
    cuda = device.type == "cuda"
    bfloat16 = c.dtype == "bfloat16" or (c.dtype is None and cuda)
    if bfloat16 and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError("this GPU has no bfloat16: use --dtype float32")
    compile = cuda if c.compile is None else c.compile
    try:
        if compile:
            torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no triton
        print0(f"torch.compile does not work here ({type(error).__name__}): going on without it")
        compile = False
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16), compile


# ------------------------------------------------------------------------------------------------
# the parts of a step


def learning_rate(step, steps, peak, warmup):
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def min_radius(step, steps, first, last):
    return first if last is None else first + (last - first) * step / max(1, steps - 1)


def build_model(c):
    torch.manual_seed(c.seed)  # the same weights on every process
    settings = {name: getattr(c, name) for name in evaluate.OVERRIDES}  # geometry, logit, ...
    if c.init_from:
        model = load_model(c.init_from, **settings).train()
        if c.final_ln not in (None, model.config.final_ln):
            raise ValueError(f"{c.init_from} has final_ln {model.config.final_ln}: leave it out")
        if data.vocab_size(model.config.tokenizer) != model.config.vocab_size:
            raise ValueError(f"{c.init_from} has {model.config.vocab_size:,} tokens: --tokenizer?")
        if c.init_logit_scale is not None:
            model.config.init_logit_scale = c.init_logit_scale
            model.logit_scale.data.fill_(c.init_logit_scale)
        return model
    scale = c.init_logit_scale
    if scale is None and c.data == "shapes":  # few samples: see README, "Pitfalls"
        scale = {"squared": 2.0, "cosine": 3.4, "arc": 3.4}.get(c.logit, 3.0)
    elif scale is None:
        scale = GEOMETRIES[c.geometry].init_logit_scale(c.logit, cones=c.entailment_weight > 0)
    tokenizer = c.tokenizer or ("bytes" if c.model == "tiny" else "clip")
    settings |= {"quick_gelu": bool(c.quick_gelu), "final_ln": c.final_ln, "tokenizer": tokenizer,
                 "init_logit_scale": scale, "vocab_size": data.vocab_size(tokenizer)}  # fmt: skip
    return CLIP(Config(**PRESETS[c.model], **settings))


def build_optimizer(model, c):
    """AdamW; weight decay on matrices only: not on gains, biases, the class token and scalars."""
    decay = [p for p in model.parameters() if p.ndim >= 2]
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": c.weight_decay},
              {"params": no_decay, "weight_decay": 0.0}]  # fmt: skip
    return torch.optim.AdamW(groups, lr=c.lr, betas=(0.9, c.beta2), eps=1e-6, fused=True)


def split_batch(images, tokens, micro_batch, vocab_size, device):
    """-> [(images, tokens, index)] on the device, of micro_batch samples each; 0: of all."""
    size = micro_batch or len(images)
    parts = zip(images.split(size), tokens.split(size))
    parts = [(*part, pack_tokens(part[1], vocab_size)) for part in parts]
    return [[x.to(device, non_blocking=True) for x in part] for part in parts]


def gradcache_backward(net, model, parts, autocast, *loss_args):
    """Gradients of the whole batch with only a part of it in memory (GradCache, arXiv:2101.06983).

    Embed all parts without gradient. Take the loss of the whole batch and its gradients for the
    embeddings. Then embed each part once more and send its rows of those gradients through the
    towers. Unlike adding up losses of small batches this is exact, as long as the towers have no
    dropout. It costs one more forward pass.
    """
    with torch.no_grad(), autocast:
        images, texts, scalars = zip(*(model(*part) for part in parts))
    embeddings = torch.cat(images), torch.cat(texts), scalars[0]
    embeddings = [x.detach().requires_grad_() for x in embeddings]
    losses = model.loss(*embeddings, *loss_args)
    losses["loss"].backward()
    image_grad, text_grad, scalars_grad = (x.grad for x in embeddings)
    for i, part in enumerate(parts):
        rows = slice(i * len(part[0]), (i + 1) * len(part[0]))
        net.require_backward_grad_sync = i == len(parts) - 1  # DDP averages after the last part
        with autocast:
            outputs = net(*part)
        # every part has the same scalars, so each gets a fraction of their gradient
        grads = image_grad[rows], text_grad[rows], scalars_grad / len(parts)
        torch.autograd.backward(outputs, grads)
    return losses


# ------------------------------------------------------------------------------------------------
# a run and its folder


def find_checkpoint(path, c, given):
    """The checkpoint to go on from, or {}. Raises ValueError if a run would be overwritten."""
    if not path.exists():
        if c.resume:
            print0(f"nothing to resume in {path.parent}: starting afresh")
        return {}
    if not c.resume:
        raise ValueError(f"{path} holds a run: go on with --resume, or choose another --out_dir")
    checkpoint = load_checkpoint(path)
    if not {"optimizer", "train_config", "config", "step"} <= set(checkpoint):
        raise ValueError(f"{path} has no optimizer state: evaluate it, or use --init_from")
    for name in given & set(FIXED):
        mine = getattr(c, name)
        its = checkpoint["config"].get(name, checkpoint["train_config"].get(name))
        if mine != its:
            raise ValueError(f"{path} was trained with --{name} {its}, not {mine}")
    return checkpoint


def open_log(path, step):
    """log.jsonl up to step, or to the first damaged line: a kill can leave half of one. Locked, so
    that no other run writes here, until this process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = open(path, "a+", encoding="latin-1")  # of damage, too, a character is a byte
    try:
        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loading processes do not inherit it
    except (BlockingIOError, PermissionError):
        raise ValueError(f"another run writes to {path.parent}; use another --out_dir") from None
    except OSError as error:  # Lustre and NFS may have none
        print(f"warning: no lock on {path} ({error.strerror}): start no second run there")
    log.seek(0)
    kept = 0
    for line in log.read().splitlines(keepends=True):
        written = re.match(r'\{"step": (\d+), .*\}\n$', line)
        if not written or int(written[1]) > step:
            break
        kept += len(line)
    log.truncate(kept)
    return log


class Run:
    """Model, optimizer, data and log of a training, new or as it was when it stopped. Raises
    ValueError, OSError."""

    def __init__(self, c, given):
        self.device = join_processes(c.device)
        self.path = Path(c.out_dir, "ckpt.pt")
        checkpoint = find_checkpoint(self.path, c, given)
        before = checkpoint.get("train_config", {})  # flags that are not given stay as they were
        for name in before.keys() - given - {"resume", "out_dir", "device", "workers"}:
            setattr(c, name, before[name])
        if checkpoint and checkpoint["step"] >= c.samples // c.batch_size:
            c.warmup = 0  # complete: `validate` shall not refuse one that is longer than the run
        if c.init_from and "model" in given:
            raise ValueError("--init_from has sizes of its own: leave --model out")
        validate(c)
        self.c, self.steps = c, c.samples // c.batch_size
        self.step, self.skipped = checkpoint.get("step", 0), Counter(checkpoint.get("skipped"))
        if add_up(self.step)[0] != self.step * world_size():
            raise ValueError(f"processes see different {self.path}: it must be on a shared disk")
        if rank() == 0:
            self.log = open_log(self.path.with_name("log.jsonl"), self.step)
        model = CLIP(Config(**checkpoint["config"])) if checkpoint else build_model(c)
        model.config.max_logit_scale, c.tokenizer = c.max_logit_scale, model.config.tokenizer
        self.model = model.to(self.device)
        self.optimizer = build_optimizer(model, c)
        if checkpoint:
            model.load_state_dict(checkpoint["state_dict"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        if self.step < self.steps:
            self.open_data()
            self.start()

    def open_data(self):
        c, first = self.c, rank() == 0
        if not first:
            add_up(0)  # wait until process 0 has indexed all shards
        source, left_out = data.open_source(c.data, verbose=first)
        self.val_source = evaluate.held_out_source(asdict(c))
        if self.val_source:
            self.held_out = data.held_out_pairs(self.val_source, verbose=first)
        if first:
            add_up(0)
        self.batches = data.batches(
            source, self.model.config, c.batch_size, c.crop_scale, c.seed, rank(), world_size(),
            c.workers, self.step, pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        if source:
            print0(f"{len(source):,} samples in {c.data}; left out: {dict(left_out)}")
        if source and len(source) < c.batch_size:
            floor = math.log(c.batch_size / len(source))
            print0(f"warning: a batch has pairs more than once: no loss below {floor:.2f}")

    def start(self):
        c, model = self.c, self.model
        self.autocast, compile = choose_precision(c, self.device)
        if compile:
            model.compile()  # in place: parameters keep their names
            model.loss = torch.compile(model.loss)
        self.net = DDP(model, gradient_as_bucket_view=True) if world_size() > 1 else model
        print0(*(f"{name}={value}" for name, value in asdict(c).items() if value is not None))
        count, chance = sum(p.numel() for p in model.parameters()), math.log(c.batch_size)
        print0(f"torch {torch.__version__}, {self.device}, {world_size()} processes, {count:,} "
               f"parameters; guessing has loss ln({c.batch_size}) = {chance:.3f}")  # fmt: skip
        self.reports_at_bound, self.stop = Counter(), StopSignals()

    def write(self, values):
        """One line for programs, one for people."""
        if rank() == 0:
            print(json.dumps({"step": self.step} | values), file=self.log, flush=True)
            text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"step {self.step}/{self.steps}  {text}", flush=True)

    def report(self, metrics, **more):
        totals = add_up(*torch.stack(list(metrics.values())).tolist())
        means = {name: total / world_size() for name, total in zip(metrics, totals)}
        self.write(means | more | {"skipped": self.skipped.total()})
        for name, bounds in self.model.bounds().items():
            value = getattr(self.model, name).item()
            at_bound = any(abs(value - bound) < 1e-6 for bound in bounds)
            self.reports_at_bound[name] = at_bound * (self.reports_at_bound[name] + 1)
            if self.reports_at_bound[name] == 10:
                print0(f"warning: {name} stays at its bound")

    def stop_at_nan(self, metrics, grad_norm):
        values = {"norm of the gradient": grad_norm, **metrics}
        values = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        raise FloatingPointError(
            f"the gradient is not finite at step {self.step + 1}: {values}, "
            f"{self.c.geometry}/{self.c.logit}. --resume goes on from the last checkpoint; "
            "without one, try a lower --lr or --init_logit_scale, or a longer --warmup"
        )

    def evaluate(self):
        """By all processes, each a part, in the precision of the training."""
        args = self.model, self.val_source, self.held_out
        try:
            with self.autocast:
                results = evaluate.held_out(*args, workers=self.c.workers)
        except ValueError as error:  # such as pictures that are gone
            return print0(f"warning: no evaluation: {error}")
        except data.LoadingError:
            if not self.stop.received:  # a SIGTERM to all processes ends loading ones as well
                raise
            if world_size() > 1:  # others may wait in a gather
                sys.exit("train.py: stopped while evaluating; go on with --resume")
            return  # the next step notices the signal
        metrics = {}
        for task in results.values():
            metrics |= {f"val_{k}": v for k, v in task.items() if isinstance(v, float)}
        self.write(metrics)

    def save(self):
        """The old file stays whole until the new one is on the disk."""
        if rank() > 0:
            return
        state = {"state_dict": self.model.state_dict(), "config": asdict(self.model.config),
                 "optimizer": self.optimizer.state_dict(), "train_config": asdict(self.c),
                 "step": self.step, "skipped": dict(self.skipped)}  # fmt: skip
        state["epoch"] = 0  # which open_clip looks for
        temporary = self.path.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except (RuntimeError, OSError) as error:  # torch raises the first if the disk is full
            raise OSError(f"cannot write {self.path} ({error}); it is as it was before") from None


# ------------------------------------------------------------------------------------------------


def train(run):
    c, model, optimizer, steps, first = run.c, run.model, run.optimizer, run.steps, run.step
    if first >= steps:
        return print0(f"{run.path} is already complete: {first} steps")
    began = since = time.monotonic()
    counted = first  # steps before that time
    for step in range(first, steps):
        lr = learning_rate(step, steps, c.lr, c.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        K = min_radius(step, steps, c.min_radius, c.final_min_radius)
        K = torch.full((), K, device=run.device)  # torch.compile would make a constant of a float

        batch = run.stop.next(run.batches)
        ended = isinstance(batch, BaseException)
        # one sum tells all processes whether any must stop, and how many samples were skipped
        lost = Counter() if ended else Counter(batch[2])
        stopping, *skipped = add_up(ended, *(lost[reason] for reason in data.REASONS))
        if stopping:
            run.save()
            add_up(0)  # until process 0 has written it
            if isinstance(batch, data.LoadingError):
                raise batch
            return print0(f"stopped after step {step}; go on with --resume")
        run.skipped += Counter(dict(zip(data.REASONS, map(int, skipped))))
        parts = split_batch(*batch[:2], c.micro_batch, model.config.vocab_size, run.device)

        if len(parts) == 1:
            with run.autocast:
                image, text, scalars = run.net(*parts[0])
            metrics = model.loss(image, text, scalars, c.entailment_weight, K)
            metrics["loss"].backward()
        else:
            args = c.entailment_weight, K
            metrics = gradcache_backward(run.net, model, parts, run.autocast, *args)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
        if not grad_norm.isfinite():  # then on all processes: they have one gradient
            run.stop_at_nan(metrics, grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_scalars()

        run.step = step + 1
        last = run.step == steps
        reporting = last or run.step % c.log_every == 0
        evaluating = run.val_source and (last or run.step % c.eval_every == 0)
        if reporting:
            speed = (run.step - counted) * c.batch_size / (time.monotonic() - since)
            run.report(metrics, grad_norm=grad_norm.item(), lr=lr, samples_per_second=speed)
        if last or evaluating or run.step % c.save_every == 0:
            run.save()  # before evaluating, which can take long, or fail
        if evaluating:
            run.evaluate()
        if reporting or evaluating:
            since, counted = time.monotonic(), run.step
    seconds = time.monotonic() - began
    print0(f"{steps - first} steps in {seconds:.0f} s; {run.path} is ready for evaluate.py")


@record  # torchrun shows the traceback of the process that failed first
def main():
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        run = Run(*parse_args())
    except (ValueError, OSError, dist.DistError, data.LoadingError) as error:  # a user's to mend
        print(f"train.py: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    try:
        train(run)
    except (FloatingPointError, OSError, data.LoadingError) as error:
        sys.exit(f"train.py: {error}")  # status 1
    if dist.is_initialized():
        add_up(0)  # threads of a process that leaves early can abort the others
        del run  # its DDP would free gloo under Python's lock, for which gloo's threads may wait
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
