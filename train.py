"""Train CLIP in one of three geometries.

    python train.py                                                    # EuCLIP on the built-in shapes: a CPU, minutes
    python train.py --geometry hyperbolic --entailment_weight 0.2      # MERU
    torchrun --nproc_per_node=8 train.py --geometry euclidean          # eight processes, one batch
    python train.py --resume                                           # go on with what is in out/

Processes split the batch, not the data: a run is the same run on one process or eight. Its whole state is out/ckpt.pt, its history
out/log.jsonl; out/best.pt is the checkpoint with the best held-out retrieval. Units: batch in samples over all processes, periods and warm-up in steps, angles in radians.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import signal
import sys
import time
import typing
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Optional

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

import evaluate
import geometry as geo
from data import Batches, find_tokenizer, held_out_pairs
from model import CLIP, PRESETS, Config, any_length, check_keys, load_model, rank, read_checkpoint, world_size


def flag(default, help):
    return field(default=default, metadata=dict(help=help))


@dataclass
class TrainConfig:
    """The flags. Defaults are the quick start's; README has the paper's setting."""
    geometry: str = flag("euclidean", f"{', '.join(geo.GEOMETRIES)}; euclidean is EuCLIP, hyperbolic MERU")
    logit: Optional[str] = flag(None, "default: the geometry's first; see geometry.GEOMETRIES")
    entailment_weight: float = flag(0.0, "lambda, the weight of the entailment loss")
    min_radius: float = flag(0.1, "K: within this distance of the root cones are half-spaces")
    final_min_radius: Optional[float] = flag(None, "K at the end, reached linearly; default: as at the start")
    init_logit_scale: Optional[float] = flag(None, "in log space; default: the geometry's, for shapes a higher one")
    max_logit_scale: float = flag(100.0, "the factor itself")
    model: str = flag("tiny", " ".join(PRESETS))
    final_ln: Optional[bool] = flag(None, "LayerNorm at the end of both towers; default: the geometry's")
    quick_gelu: Optional[bool] = flag(None, "QuickGELU, as in OpenAI's own weights; default: exact GELU, or what --init_from is known to have")
    init_from: Optional[str] = flag(None, "start from the weights and sizes of this checkpoint, ours or open_clip's")
    data: str = flag("shapes", "shapes, tar shards, a .csv or .tsv, or a folder; see data.py")
    val_data: Optional[str] = flag(None, "held-out data, likewise; shapes has its own")
    crop_scale: float = flag(0.9, "smallest share of a picture's area that a training crop keeps")
    tokenizer: Optional[str] = flag(None, "bytes, clip, or any that tiktoken knows; default: bytes for tiny, else clip")
    batch_size: int = flag(128, "over all processes")
    micro_batch: int = flag(0, "samples per process and pass, for batches that memory does not hold; 0: everything at once")
    samples: int = flag(90_000, "how many to see")
    lr: float = flag(3e-3, "at its peak; from there by a cosine to 0")
    warmup: Optional[int] = flag(None, "steps; default: a tenth of all, 500 at most")
    weight_decay: float = flag(0.2, "on matrices only")
    beta2: float = flag(0.98, "AdamW's")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: any")
    out_dir: str = flag("out", "for ckpt.pt and log.jsonl")
    resume: bool = flag(False, "go on from out_dir/ckpt.pt; start where there is none")
    save_every: int = flag(1000, "steps")
    eval_every: Optional[int] = flag(None, "steps; default: five times in all")
    log_every: int = flag(20, "steps")
    device: Optional[str] = flag(None, "default: cuda, else mps, else cpu")
    dtype: Optional[str] = flag(None, "of the towers, float32 or bfloat16; default: bfloat16 on cuda, else float32")
    compile: Optional[bool] = flag(None, "torch.compile; default: on cuda")
    workers: Optional[int] = flag(None, "loading processes per training process; default: its share of the cores, 8 at most")
    seed: int = flag(0, "of weights and data")


def parse(argv=None):
    """argv -> TrainConfig, names of the flags that were given. Unknown flags and wrong types end the program with a sentence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(TrainConfig):
        kind = next(t for t in (*typing.get_args(f.type), f.type) if t is not type(None))   # Optional[int] -> int
        note = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")
        parser.add_argument(f"--{f.name}", help=note, **(dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind)))
    given = vars(parser.parse_args(argv))
    return TrainConfig(**given), set(given)


def check(c):
    """Refuse at the door what cannot work, fill in what follows from the rest -> number of steps. Raises ValueError."""
    row, c.logit = geo.find(c.geometry, c.logit)
    if c.entailment_weight > 0 and row.cone is None:
        raise ValueError(f"--entailment_weight needs cones; {c.geometry} has none. Use --geometry {geo.with_cones()}.")
    if not c.init_from and c.model not in PRESETS:
        raise ValueError(f"no model {c.model!r}; choose one of {', '.join(PRESETS)}")
    for f in fields(c):
        value = getattr(c, f.name)
        lowest = dict(init_logit_scale=-math.inf, max_logit_scale=1e-9, log_every=1, save_every=1, eval_every=1, batch_size=2).get(f.name, 0)
        if isinstance(value, (int, float)) and not lowest <= value < math.inf:
            raise ValueError(f"--{f.name} must be at least {lowest}; got {value}")
    if not 0 < c.crop_scale <= 1 or not c.beta2 < 1:
        raise ValueError(f"--crop_scale must be in (0, 1] and --beta2 in [0, 1); got {c.crop_scale} and {c.beta2}")
    if c.batch_size % world_size():
        raise ValueError(f"--batch_size {c.batch_size} is not divisible by {world_size()} processes")
    share = c.batch_size // world_size()
    if c.micro_batch and share % c.micro_batch:
        raise ValueError(f"--micro_batch {c.micro_batch} does not divide the {share} samples of each process")
    if c.dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"--dtype {c.dtype}: choose float32 or bfloat16")
    steps = c.samples // c.batch_size
    if steps < 1:
        raise ValueError(f"--samples {c.samples} is less than one batch of {c.batch_size}")
    if c.warmup is None:
        c.warmup = min(500, steps // 10)
    if c.warmup >= steps:
        raise ValueError(f"--warmup {c.warmup} leaves nothing of {steps} steps (--samples {c.samples} / --batch_size {c.batch_size})")
    return steps


# ---------------------------------------------------------------------------------------------------------------------------------
# processes and devices

def print0(*args):
    if rank() == 0:
        print(*args, flush=True)


def join_processes(device):
    """Meet the other processes, if torchrun started any -> this process's device. Raises ValueError for what does not fit together."""
    if "RANK" not in os.environ:
        return device
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"RANK is set, but not {', '.join(missing)}: start several processes with torchrun, or unset RANK")
    if device.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"process {local} of this machine has no GPU of its own: there are {gpus}; use --nproc_per_node={gpus}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ValueError(f"several processes need cpu or cuda, not {device.type}; give --device cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30))
    return device


def mean_over_processes(values):
    """0-d tensors -> their means over all processes, as floats."""
    values = torch.stack([v.detach().float() for v in values])
    if world_size() > 1:
        dist.all_reduce(values)
    return (values / world_size()).tolist()


def on_any_process(raised):
    """What is true on any process is true on all. It travels by gloo, so that no GPU has to wait for it."""
    raised = torch.tensor(int(raised))
    if world_size() > 1:
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised)


def from_process_0(function):
    """Run on process 0 alone -> its result, or its ValueError, on all: files are looked at once."""
    box = [None]
    if rank() == 0:
        try:
            box = [function()]
        except (ValueError, OSError) as error:
            box = [ValueError(str(error))]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    if isinstance(box[0], ValueError):
        raise box[0]
    return box[0]


class StopSignals:
    """SIGTERM, SIGUSR1 (a cluster takes its machine back) and Ctrl-C do not end the program: they ask it to finish the step and save. A
    second one ends it."""

    def __init__(self):
        self.received = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.received = True
        signal.signal(number, signal.SIG_DFL)


def choose_precision(c, device):
    """-> (autocast for the towers, whether to compile). What the machine cannot do is refused if asked for, else left out."""
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if c.dtype == "bfloat16" and not bf16:
        raise ValueError("--dtype bfloat16: this GPU cannot; use --dtype float32")
    bf16 = c.dtype == "bfloat16" or (c.dtype is None and device.type == "cuda" and bf16)
    torch.set_float32_matmul_precision("highest")   # torch's default, on purpose: TF32 has ten bits, and the geometry subtracts what it multiplied
    compile = c.compile if c.compile is not None else device.type == "cuda"
    if compile:
        try:
            torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))   # without a C++ compiler or triton this fails
        except Exception as error:
            print0(f"torch.compile does not work here ({type(error).__name__}): going on without it")
            compile = False
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16), compile


# ---------------------------------------------------------------------------------------------------------------------------------
# the parts of a step: schedules are pure functions of the step

def learning_rate(step, steps, peak, warmup):
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def min_radius(step, steps, first, last):
    return first if last is None else first + (last - first) * step / max(1, steps - 1)


def build_optimizer(model, c):
    """AdamW; weight decay on matrices only: not on gains, biases, the class token and scalars."""
    groups = [dict(params=[p for p in model.parameters() if p.ndim >= 2], weight_decay=c.weight_decay),
              dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=c.lr, betas=(0.9, c.beta2), eps=1e-6, fused=True)


def split(batch, size):
    """A batch -> parts of `size` samples. On the CPU, because what it computes has to be known there: a GPU would have to be waited for."""
    N, T = batch["tokens"].shape
    cuts = torch.searchsorted(batch["index"], torch.arange(0, N + 1, size) * T).tolist()
    return [dict(images=batch["images"][i * size:(i + 1) * size], tokens=batch["tokens"][i * size:(i + 1) * size],
                 index=batch["index"][cuts[i]:cuts[i + 1]] - i * size * T) for i in range(N // size)]


def backward(net, model, parts, autocast, **entailment):
    """Gradients of the loss of the whole batch -> what CLIP.losses returns. parts: [batch], or what `split` made of it.

    In parts a batch never passes the towers at once: embed them without gradient, take the loss of all and its gradient with respect to
    the embeddings, then embed the parts again and hand each its gradient. Unlike adding up the losses of small batches this is exact, for
    every parameter, and processes exchange embeddings and gradients once.
    """
    if len(parts) == 1:
        with autocast:
            out = net(**parts[0], **entailment)
        out["loss"].backward()
        return out
    with autocast, torch.no_grad():
        image, text = (torch.cat(e) for e in zip(*((model.encode_image(p["images"]), model.encode_text(p["tokens"], p["index"])) for p in parts)))
    image.requires_grad_(), text.requires_grad_()
    out = model.losses(image, text, **entailment)
    out["loss"].backward()   # reaches both embeddings, the logit scale and the curvature
    cached = zip(image.grad.chunk(len(parts)), text.grad.chunk(len(parts)))
    for i, (part, gradients) in enumerate(zip(parts, cached)):
        wait = net is not model and i < len(parts) - 1   # processes add up their gradients after the last part
        with net.no_sync() if wait else contextlib.nullcontext():
            with autocast:
                stand_in = net(**part, cached=gradients)
            stand_in.backward()
    return out


# ---------------------------------------------------------------------------------------------------------------------------------
# checkpoints and reports

MUST_AGREE = ("geometry", "logit", "model", "tokenizer", "batch_size", "seed", "data", "final_ln", "quick_gelu", "init_from",
              "init_logit_scale")   # between a run and its resumption


def look_into(folder, c, given):
    """Is there a checkpoint to go on from in the output folder? Raises ValueError where a run would be overwritten or does not fit."""
    path = folder / "ckpt.pt"
    if not path.exists():
        return False
    if not c.resume:
        raise ValueError(f"{path} holds a run already; go on with --resume, or choose another --out_dir")
    checkpoint = read_checkpoint(path)
    if not {"optimizer", "train_config", "model_config"} <= set(checkpoint):
        raise ValueError(f"{path} has no optimizer state: it can be evaluated, or started from with --init_from, but not resumed")
    for name in MUST_AGREE:
        if name in given and getattr(c, name) != checkpoint["train_config"][name]:
            raise ValueError(f"{path} was trained with --{name} {checkpoint['train_config'][name]}, not {getattr(c, name)}")
    return True


def save(path, model, optimizer, c, step, stream, best):
    """Everything a run is, as tensors and plain values. The old file stays whole until the new one is on disk."""
    streams = [(stream.state, dict(stream.skipped))]   # of each process
    if world_size() > 1:
        mine, streams = streams[0], [None] * world_size()
        dist.all_gather_object(streams, mine)
    if rank() == 0:
        states, skipped = map(list, zip(*streams))
        checkpoint = dict(format=1, model=model.state_dict(), model_config=asdict(model.config), train_config=asdict(c),
                          optimizer=optimizer.state_dict(), step=step, samples=step * c.batch_size, stream=states, skipped=skipped, best=best,
                          torch=str(torch.__version__))
        temporary = path.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (RuntimeError, OSError) as error:   # torch.save turns a full disk into a RuntimeError
            raise OSError(f"cannot write {temporary} ({error}); {path} is still what was saved before") from None
        os.replace(temporary, path)


class Log:
    """log.jsonl, one JSON object a line, on process 0. A resumed run drops lines beyond its checkpoint."""

    def __init__(self, path, step):
        self.file = None
        if rank() == 0:
            lines = path.read_text().splitlines() if step and path.exists() else []
            self.file = open(path, "w")
            for line in lines:
                with contextlib.suppress(json.JSONDecodeError):   # a kill can leave half a line
                    if (values := json.loads(line))["step"] <= step:
                        self.write(**values)

    def write(self, **values):
        if self.file:
            print(json.dumps(values), file=self.file, flush=True)


def training_line(r, steps, c):
    """A report as one line for people."""
    cones = f" + {c.entailment_weight:g} x {r['entailment']:.3f}" if c.entailment_weight > 0 else ""
    inside = f" | in cone {r['inside']:4.0%}" if "inside" in r else ""
    left = str(datetime.timedelta(seconds=round(r["seconds_left"]))).removeprefix("0:")
    skipped = f" | {r['skipped']} skipped" if r["skipped"] else ""
    hint = "; more --workers may help" if r["waiting"] > 0.3 else ""
    return (f"step {r['step']:5d}/{steps} | loss {r['contrastive']:.3f}{cones}{inside} | radius text {r['text_radius']:.2f} image {r['image_radius']:.2f}"
            f" | scale {r['logit_scale']:.2f} curv {r['curvature']:.2f} | grad {r['grad_norm']:.2f} | lr {r['lr']:.1e}"
            f" | {r['samples_per_second']:,.0f}/s, {r['waiting']:.0%} waiting for data{hint}{skipped} | {left} left")


def held_out_figures(model, source, pairs, workers):
    """Held-out data -> flat dict for the log. val_mean_r1 decides which checkpoint is the best."""
    results = evaluate.held_out(model, source, pairs, workers=workers)
    figures = {f"val_{k}": results["retrieval"][k] for k in ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "mean_r1")}
    return figures | ({f"val_{k}": results["zero_shot"][k] for k in ("top1", "top5")} if results["zero_shot"] else {})


# ---------------------------------------------------------------------------------------------------------------------------------
# the run

def build_model(c, given):
    """A new model, the same on every process; with --init_from one that starts from the weights and sizes of a file."""
    torch.manual_seed(c.seed)
    if c.init_from:
        model = load_model(c.init_from, **{k: getattr(c, k) for k in ("geometry", "logit", "tokenizer", "quick_gelu") if k in given})
        if c.final_ln not in (None, model.config.final_ln):
            raise ValueError(f"{c.init_from} was trained with{'out' * c.final_ln} final LayerNorms; leave --final_ln out")
        if find_tokenizer(model.config.tokenizer)[1] != model.config.vocab_size:
            raise ValueError(f"{c.init_from} has {model.config.vocab_size:,} tokens, other than tokenizer {model.config.tokenizer}; give --tokenizer")
        c.geometry, c.logit = model.config.geometry, model.logit
        if "model" in given and any(getattr(model.config, k) != v for k, v in PRESETS[c.model].items()):
            raise ValueError(f"{c.init_from} has not the sizes of --model {c.model}; leave --model out, the file says its sizes")
        if c.init_logit_scale is not None:
            model.logit_scale.data.fill_(c.init_logit_scale)
        model.config.max_logit_scale = c.max_logit_scale
        return model.train()
    tokenizer = c.tokenizer or ("bytes" if c.model == "tiny" else "clip")
    logit = geo.GEOMETRIES[c.geometry].logits[c.logit]
    starts = (c.init_logit_scale, logit.scale_for_shapes if c.data == "shapes" else None,
              logit.scale_with_cones if c.entailment_weight > 0 else None, logit.scale)   # the first that is given counts
    return CLIP(Config(**PRESETS[c.model], vocab_size=find_tokenizer(tokenizer)[1], tokenizer=tokenizer, geometry=c.geometry, logit=c.logit,
                       final_ln=c.final_ln, init_logit_scale=next(s for s in starts if s is not None),
                       max_logit_scale=c.max_logit_scale, quick_gelu=bool(c.quick_gelu)))


def prepare(c, given, folder):
    """Flags and what is in the output folder -> flags with nothing left open, number of steps, the model, the checkpoint to go on from or None."""
    before = None
    if from_process_0(lambda: look_into(folder, c, given)):   # flags that were not given are those of the run so far
        before = read_checkpoint(folder / "ckpt.pt")
        c = replace(c, **{k: v for k, v in before["train_config"].items() if k not in given | {"resume", "out_dir", "device"}})
    elif c.resume:
        print0(f"nothing to resume in {folder}: starting afresh")
    steps = check(c)
    if before:
        model = CLIP(Config(**before["model_config"]))
        check_keys(model, before["model"], folder / "ckpt.pt")
        model.load_state_dict(before["model"])
        model.config.max_logit_scale = c.max_logit_scale
    else:
        model = build_model(c, given)
    c.tokenizer, c.eval_every = model.config.tokenizer, c.eval_every or -(-steps // 5)
    model.recipe.update(asdict(c))
    return c, steps, model, before


def distribute(model, device, compile):
    """What is called in place of the model: compiled where asked, with gradients averaged over processes where there are several."""
    if compile:
        model.compile()   # in place: parameters keep their names
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True,
                                   broadcast_buffers=False)   # the only buffers are constants


def introduce(c, model, device, workers):
    print0(" ".join(f"--{k} {v}" for k, v in asdict(c).items() if v is not None))
    print0(f"torch {torch.__version__}, {device}, {world_size()} process{'es' * (world_size() > 1)}, {workers} loading workers each, "
           f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print0(f"a model that knows nothing has loss ln({c.batch_size}) = {math.log(c.batch_size):.3f}")


def scale_and_curvature(model):
    return dict(logit_scale=model.logit_scale.exp().item(), curvature=torch.as_tensor(model.curvature()).item())


class Guard:
    """Watches for what quietly spoils a run, without making a GPU wait: from the first gradient that is not finite on, no step is taken on
    any process (they share the gradient), until the host looks and stops them all."""

    def __init__(self, device):
        self.failed = torch.full((), -1, device=device)   # step of the first such gradient
        self.pinned = Counter()                           # scalar -> reports in a row at its bound

    def watch(self, optimizer, grad_norm, step):
        self.failed = torch.where((self.failed < 0) & ~grad_norm.isfinite(), step, self.failed)
        optimizer.found_inf = (self.failed >= 0).float()   # a fused optimizer leaves its step out where this is not 0

    def stop(self, model, losses, grad_norm):
        if self.failed >= 0:
            values = scale_and_curvature(model) | {"norm of the gradient": grad_norm.item()} | {k: v.item() for k, v in losses.items()}
            raise FloatingPointError(f"the gradient is not finite at step {self.failed.item()}: geometry {model.config.geometry}/{model.logit}, "
                                     + ", ".join(f"{k.replace('logit_scale', 'logit scale')} {v:.3g}" for k, v in values.items()))

    def warn(self, model):
        for name in model.pinned_scalars():
            self.pinned[name] += 1
            if self.pinned[name] == 10:
                print0(f"warning: {name} has been at its bound for 10 reports: the loss asks for more than it is allowed")


def train(c, given):
    stop = StopSignals()
    device = join_processes(evaluate.pick_device(c.device))
    folder = Path(c.out_dir)
    c, steps, model, before = prepare(c, given, folder)
    first, best = (before["step"], before.get("best")) if before else (0, None)
    if first >= steps:
        return print0(f"{folder / 'ckpt.pt'} is already complete: {first} steps")

    autocast, compile = choose_precision(c, device)
    optimizer = build_optimizer(model.to(device), c)
    if before:
        optimizer.load_state_dict(before["optimizer"])
        for group, decay in zip(optimizer.param_groups, (c.weight_decay, 0.0)):   # which brings the old rates along
            group.update(weight_decay=decay, betas=(0.9, c.beta2))
    net = distribute(model, device, compile)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if c.workers is None else c.workers
    stream = Batches(c.data, c.batch_size, model.config.image_size, c.tokenizer, model.config.context_length, c.crop_scale, c.seed, rank(),
                     world_size(), workers, step=first, states=before and before["stream"], skipped=before and before["skipped"],
                     pin_memory=device.type == "cuda")
    del before   # a copy of all weights
    val_source, held = evaluate.held_out_source(model.recipe), []
    if val_source:
        from_process_0(lambda: held.append(held_out_pairs(val_source)))   # now, not after the first thousand steps
    from_process_0(lambda: folder.mkdir(parents=True, exist_ok=True))
    log, guard = Log(folder / "log.jsonl", first), Guard(device)
    introduce(c, model, device, workers)

    started = since = time.monotonic()
    waited, reported = 0.0, first
    with contextlib.closing(iter(stream)) as batches:   # ends the loading processes, whatever happens
        for step in range(first, steps):
            lr = learning_rate(step, steps, c.lr, c.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr

            asked = time.monotonic()
            batch = next(batches)
            parts = [{k: v.to(device, non_blocking=True) for k, v in part.items()} for part in (split(batch, c.micro_batch) if c.micro_batch else [batch])]
            waited += time.monotonic() - asked
            for part in parts if compile else []:
                any_length(part["tokens"], part["index"])

            K = torch.full((), min_radius(step, steps, c.min_radius, c.final_min_radius), device=device)   # a float that changes would recompile
            optimizer.zero_grad()
            losses = backward(net, model, parts, autocast, entailment_weight=c.entailment_weight, min_radius=K)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
            guard.watch(optimizer, grad_norm, step + 1)
            optimizer.step()
            model.clamp_scalars()

            done, stopping = step + 1, on_any_process(stop.received)
            reporting, saving = (done == steps or stopping or done % every == 0 for every in (c.log_every, c.save_every))
            judging = val_source and (done % c.eval_every == 0 or done == steps)
            if reporting or saving or judging or device.type != "cuda":   # elsewhere looking costs nothing
                guard.stop(model, losses, grad_norm)
            if reporting:
                r = dict(step=done, **dict(zip(losses, mean_over_processes(losses.values()))), grad_norm=grad_norm.item(),
                         **scale_and_curvature(model), lr=lr)
                passed, count = time.monotonic() - since, done - reported
                r |= dict(samples_per_second=count * c.batch_size / passed, waiting=waited / passed, seconds_left=(steps - done) * passed / count,
                          skipped=sum(stream.skipped.values()))
                log.write(**r)
                print0(training_line(r, steps, c))
                guard.warn(model)
                since, waited, reported = time.monotonic(), 0.0, done
            if judging:
                asked = time.monotonic()
                figures = from_process_0(lambda: held_out_figures(model, val_source, held[0], workers))
                log.write(step=done, **figures)
                print0(f"held-out after {done} steps: " + ", ".join(f"{k[4:]} {v:.1%}" for k, v in figures.items() if v is not None))
                score = figures["val_mean_r1"]
                if score is not None and (best is None or score > best):
                    best = score
                    save(folder / "best.pt", model, optimizer, c, done, stream, best)
                since += time.monotonic() - asked   # not part of the training speed
            if saving or judging:   # never a best checkpoint without one to go on from
                save(folder / "ckpt.pt", model, optimizer, c, done, stream, best)
            if stopping:
                return print0(f"stopped by a signal after step {done}; go on with --resume")
    print0(f"{steps} steps in {time.monotonic() - started:.0f} s; {folder / 'ckpt.pt'} is ready for evaluate.py")


@record   # torchrun shows the error of the process that failed first, last
def main():
    c, given = parse()
    try:
        train(c, given)
    except (ValueError, OSError, FloatingPointError, dist.DistError) as error:   # what a user can mend gets a sentence
        print(f"train.py: {error}", file=sys.stderr, flush=True)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    if dist.is_initialized():   # not after a failure: it would wait for the other processes
        dist.barrier()   # leave together: threads of a process that leaves while others still talk to it can abort
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
