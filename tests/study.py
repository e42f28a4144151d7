"""The study: every geometry, logit and entailment weight on the built-in shapes, three seeds each.

    python tests/study.py                          # trains what is missing, evaluates, writes table.md and pictures to out_study
    python tests/study.py --samples 9_000 --seeds 1

Runs are those of `train.py` with the flags below, one thread and one core each, as many at once as there are cores. What is done is
skipped, so the study can be interrupted and called again. Results: README, "Results".
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from assets import figures
from geometry import GEOMETRIES


def runs():
    """-> {name: flags}: {geometry} x {logit} x {lambda}; then for the default logits the other choice of final LayerNorms, and wider cones."""
    table = {}
    for geometry, row in GEOMETRIES.items():
        for logit in row.logits:
            for weight in ("0", "0.2") if row.cone else ("0",):
                table[f"{geometry}-{logit}" + f"-{weight}" * (weight != "0")] = ["--geometry", geometry, "--logit", logit, "--entailment_weight", weight]
    for geometry, row in GEOMETRIES.items():
        table[f"{geometry}-{'no_' * row.final_ln}ln"] = ["--geometry", geometry, "--no-final_ln" if row.final_ln else "--final_ln"]
    cones = ["--geometry", "euclidean", "--entailment_weight", "0.2", "--min_radius", "0.3"]
    return table | {"euclidean-squared-0.2-K0.3": cones, "euclidean-squared-0.2-K0.3to0.1": [*cones, "--final_min_radius", "0.1"]}


def call(command, log):
    """A program on one thread; its output goes to a file. A failure is told and does not stop the others."""
    with open(log, "w") as file:
        code = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                              env=os.environ | dict(OMP_NUM_THREADS="1")).returncode
    print(f"{log.parent.name}: {command[0]} " + (f"failed, see {log}" if code else "is done"), flush=True)


def one(folder, flags, seed, samples):
    """Train and evaluate one run, each unless it is done. Raises ValueError where the folder holds another study's."""
    folder.mkdir(parents=True, exist_ok=True)
    told, result = folder / "train.txt", folder / "result.json"
    if told.exists() and f"--samples {samples} " not in told.read_text():
        raise ValueError(f"{folder} was trained with other --samples; choose another --out")
    if not told.exists() or "is ready for evaluate.py" not in told.read_text():
        call(["train.py", *flags, "--seed", seed, "--samples", samples, "--workers", 0, "--device", "cpu", "--out_dir", folder, "--resume"], told)
        result.unlink(missing_ok=True)
    if (folder / "ckpt.pt").exists() and not result.exists():
        call(["evaluate.py", folder / "ckpt.pt", "--device", "cpu", "--json", result], folder / "evaluate.txt")


# ---------------------------------------------------------------------------------------------------------------------------------
# what came out

COLUMNS = {   # title -> what it shows of one run's (result.json, last line of its log); shares become per cent
    "top-1 %": lambda r, log: 100 * r["zero_shot"]["top1"],
    "R@1 %": lambda r, log: 100 * r["retrieval"]["mean_r1"],
    "loss": lambda r, log: log["contrastive"],
    "radius of text": lambda r, log: r["hierarchy"]["text_radius"],
    "of image": lambda r, log: r["hierarchy"]["image_radius"],
    "general nearer the root %": lambda r, log: 100 * r["hierarchy"]["right_order"],
    "picture in cone %": lambda r, log: 100 * r["hierarchy"]["own_in_cone"],
    "another %": lambda r, log: 100 * r["hierarchy"]["other_in_cone"],
    "captions on the way": lambda r, log: r["hierarchy"]["way"]["captions"],
    "to general %": lambda r, log: 100 * r["hierarchy"]["way"]["to_general"],
    "to specific %": lambda r, log: 100 * r["hierarchy"]["way"]["to_specific"],
    "captions in cones": lambda r, log: r["hierarchy"]["way_in_cones"]["captions"],
    "then to general %": lambda r, log: 100 * r["hierarchy"]["way_in_cones"]["to_general"],
}


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def mean_and_spread(values):
    """Values of the seeds -> "mean ± standard deviation", over those where it is defined."""
    defined = [v for v in values if v is not None]
    if not defined:
        return ""
    spread = f" ± {statistics.stdev(defined):.{digits(defined)}f}" if len(defined) > 1 else ""
    return f"{statistics.mean(defined):.{digits(defined)}f}{spread}"


def digits(values):
    return 1 if max(map(abs, values)) >= 10 else 2


def attempt(column, result, last):
    try:
        return column(result, last)
    except TypeError:   # of null: a column that this geometry does not have
        return None


def table(out, seeds):
    """-> a markdown table, one line for each kind of run."""
    lines = ["| run | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in runs():
        folders = [f for f in (out / f"{name}-s{seed}" for seed in range(seeds)) if (f / "result.json").exists()]
        found = [(json.loads((f / "result.json").read_text()), [r for r in log_of(f) if "loss" in r][-1]) for f in folders]
        cells = [mean_and_spread([attempt(column, *run) for run in found]) for column in COLUMNS.values()]
        lines.append(f"| {name}" + f" ({len(found)} of {seeds})" * (len(found) < seeds) + " | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(out, seeds, samples):
    def retrieval(names):
        groups = {}
        for name in names:
            logs = [[r for r in log_of(f) if "val_mean_r1" in r] for f in (out / f"{name}-s{seed}" for seed in range(seeds))]
            groups[name] = [r["step"] * 128 / 1000 for r in logs[0]], [[100 * r["val_mean_r1"] for r in log] for log in logs]
        return groups
    axes = dict(x_label="samples seen, thousands", y_label="held-out R@1, %")
    first = {geometry: f"{geometry}-{next(iter(row.logits))}" for geometry, row in GEOMETRIES.items()}   # the default logits
    with_cones = [f"{first[g]}-0.2" for g, row in GEOMETRIES.items() if row.cone]
    figures.curves(retrieval([*first.values(), *with_cones]), out / "curves_geometries.png", "three geometries, without and with entailment loss", **axes)
    figures.curves(retrieval([f"{g}-{logit}" for g, row in GEOMETRIES.items() for logit in row.logits]), out / "curves_logits.png", "all logits, lambda 0", **axes)
    subject = lambda name: figures.Subject(out / f"{name}-s0" / "ckpt.pt")
    figures.distances([[subject(first[g]) for g in GEOMETRIES], [subject(f"{first[g]}-0.2") if row.cone else None for g, row in GEOMETRIES.items()]],
                      out / "distances.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out_study")
    parser.add_argument("--samples", type=int, default=90_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
    args = parser.parse_args()
    out = args.out.resolve()
    with ThreadPoolExecutor(args.jobs) as pool:
        asked = [pool.submit(one, out / f"{name}-s{seed}", flags, seed, args.samples) for seed in range(args.seeds) for name, flags in runs().items()]
    for run in asked:
        run.result()   # or its error
    (out / "table.md").write_text(table(out, args.seeds) + "\n")
    print((out / "table.md").read_text())
    seconds = [int(s) for f in out.glob("*/train.txt") for s in re.findall(r"steps in (\d+) s", f.read_text())]
    print(f"{len(seconds)} trainings, {sum(seconds) / 3600:.1f} hours of one core, torch {torch.__version__}")
    draw(out, args.seeds, args.samples)


if __name__ == "__main__":
    main()
