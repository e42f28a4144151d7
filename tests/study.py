"""The study: every geometry, logit and entailment weight on the built-in shapes, three seeds each.

    python tests/study.py                          # trains what is missing, evaluates, writes tables.md and pictures to out_study
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
import time
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
            flags = ["--geometry", geometry, "--logit", logit, "--entailment_weight"]
            table[f"{geometry}-{logit}"] = [*flags, "0"]
            if row.cone:
                table[f"{geometry}-{logit}-0.2"] = [*flags, "0.2"]
    for geometry, row in GEOMETRIES.items():
        table[f"{geometry}-no_ln" if row.final_ln else f"{geometry}-ln"] = ["--geometry", geometry, "--no-final_ln" if row.final_ln else "--final_ln"]
    cones = ["--geometry", "euclidean", "--entailment_weight", "0.2", "--min_radius", "0.3"]
    return table | {"euclidean-squared-0.2-K0.3": cones, "euclidean-squared-0.2-K0.3to0.1": [*cones, "--final_min_radius", "0.1"]}


def call(command, log):
    """Run a program on one thread. Its output goes to a file; a failure is told and does not stop the others."""
    with open(log, "w") as file:
        code = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                              env=os.environ | dict(OMP_NUM_THREADS="1")).returncode
    print(f"{log.parent.name}: {command[0]} " + (f"failed, see {log}" if code else "has ended"), flush=True)


def is_trained(folder):
    """Told by the output of the last call; a run that was interrupted or failed left something else there."""
    told = folder / "train.txt"
    return told.exists() and re.search(r"ckpt.pt is (ready for|already complete)", told.read_text()) is not None


def one(folder, flags, seed, samples):
    """Train and evaluate one run, each unless it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "result.json"
    if not is_trained(folder):
        result.unlink(missing_ok=True)
        call(["train.py", *flags, "--seed", seed, "--samples", samples, "--workers", 0, "--device", "cpu", "--out_dir", folder, "--resume"],
             folder / "train.txt")
    if is_trained(folder) and not result.exists():
        call(["evaluate.py", folder / "ckpt.pt", "--device", "cpu", "--json", result], folder / "evaluate.txt")


# ---------------------------------------------------------------------------------------------------------------------------------
# what came out

REFERENCE = "clip-cosine"   # seeds differ more than geometries, and in the same way for all: runs are compared seed by seed
COLUMNS = {   # table -> {title: (where `everything` has it, factor, digits)}
    "accuracy and radius": {
        "top-1 %": ("zero_shot.top1", 100, 1),
        "R@1 %": ("retrieval.mean_r1", 100, 1),
        f"R@1 minus {REFERENCE}'s": ("ahead", 100, 1),
        "radius of text, training": ("log.text_radius", 1, 2),
        "of image, training": ("log.image_radius", 1, 2),
        "radius of text, held out": ("hierarchy.text_radius", 1, 2),
        "of image, held out": ("hierarchy.image_radius", 1, 2),
        "general nearer the root %": ("hierarchy.general_nearer", 100, 1)},
    "cones and ways to the root": {
        "in its caption's cone %, training": ("log.inside", 100, 1),
        "in its captions' cones %, held out": ("hierarchy.own_in_cone", 100, 1),
        "in others' %": ("hierarchy.other_in_cone", 100, 1),
        "captions on the way": ("hierarchy.traversal.captions", 1, 2),
        "changes": ("hierarchy.traversal.changes", 1, 0),
        "to general %": ("hierarchy.traversal.to_general", 100, 1),
        "to specific %": ("hierarchy.traversal.to_specific", 100, 1),
        "with cones: captions": ("hierarchy.traversal_in_cones.captions", 1, 2),
        "with cones: changes": ("hierarchy.traversal_in_cones.changes", 1, 0),
        "with cones: to general %": ("hierarchy.traversal_in_cones.to_general", 100, 1),
        "with cones: to specific %": ("hierarchy.traversal_in_cones.to_specific", 100, 1)},
}


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def everything(folder):
    """-> result.json; as `log` the last report of the training; as `ahead` the difference in R@1 to the reference of the same seed."""
    result = json.loads((folder / "result.json").read_text())
    reference = folder.with_name(f"{REFERENCE}-s{folder.name.rsplit('-s', 1)[1]}") / "result.json"
    ahead = result["retrieval"]["mean_r1"] - json.loads(reference.read_text())["retrieval"]["mean_r1"] if reference.exists() else None
    return result | dict(log=[r for r in log_of(folder) if "loss" in r][-1], ahead=ahead)


def look_up(result, path):
    """"a.b" in {"a": {"b": 1}} -> 1; None where a geometry does not have it."""
    for key in path.split("."):
        result = result and result.get(key)
    return result


def mean_and_spread(values, digits):
    """Values of the seeds, of those where it is defined -> "mean ± standard deviation"."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def finished(out, name, seeds):
    """-> the folders of the seeds that were trained and evaluated."""
    return [folder for folder in (out / f"{name}-s{seed}" for seed in range(seeds)) if (folder / "result.json").exists()]


def table(out, seeds, which):
    """-> a markdown table, one line for each kind of run."""
    columns = COLUMNS[which]
    lines = ["| run | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name in runs():
        found = [everything(folder) for folder in finished(out, name, seeds)]
        cells = [mean_and_spread([factor * v for r in found if (v := look_up(r, path)) is not None], digits)
                 for path, factor, digits in columns.values()]
        some = "" if len(found) == seeds else f" ({len(found)} of {seeds} seeds)"
        lines.append(f"| {name}{some} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(out, seeds, samples):
    """Pictures of what is finished."""
    def retrieval(names):
        groups = {}
        for name in names:
            judged = [[r for r in log_of(folder) if "val_mean_r1" in r] for folder in finished(out, name, seeds)]
            if judged:
                groups[name] = ([r["step"] / judged[0][-1]["step"] * samples / 1000 for r in judged[0]],
                                [[100 * r["val_mean_r1"] for r in log] for log in judged])
        return groups

    def subject(name):
        return next((figures.Subject(folder / "ckpt.pt") for folder in finished(out, name, seeds)), None)

    axes = dict(x_label="samples seen, thousands", y_label="held-out R@1, %")
    default = {geometry: f"{geometry}-{next(iter(row.logits))}" for geometry, row in GEOMETRIES.items()}
    with_cones = {geometry: f"{default[geometry]}-0.2" for geometry, row in GEOMETRIES.items() if row.cone}
    for name, title, chosen in (
            ("curves_geometries", "three geometries, without and (dashed) with entailment loss", [*default.values(), *with_cones.values()]),
            ("curves_logits", "all logits, without entailment loss", [f"{g}-{logit}" for g, row in GEOMETRIES.items() for logit in row.logits])):
        if (groups := retrieval(chosen)):
            figures.curves(groups, out / f"{name}.png", title, dashed=with_cones.values(), **axes)
    figures.distances([[subject(default[g]) for g in GEOMETRIES], [subject(with_cones.get(g, "")) for g in GEOMETRIES]], out / "distances.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out_study")
    parser.add_argument("--samples", type=int, default=90_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
    args = parser.parse_args()
    out, settings = args.out.resolve(), args.out / "samples"
    out.mkdir(parents=True, exist_ok=True)
    if settings.exists() and settings.read_text() != str(args.samples):
        sys.exit(f"{out} holds a study of --samples {settings.read_text()}; choose another --out")
    settings.write_text(str(args.samples))

    began, pool = time.monotonic(), ThreadPoolExecutor(args.jobs)
    try:
        asked = [pool.submit(one, out / f"{name}-s{seed}", flags, seed, args.samples) for seed in range(args.seeds) for name, flags in runs().items()]
        for run in asked:
            run.result()
    except KeyboardInterrupt:   # the runs got it as well, and save
        sys.exit("interrupted; the same command goes on")
    finally:
        pool.shutdown(cancel_futures=True)
    tables = "\n\n".join(f"{which}, mean ± standard deviation over {args.seeds} seeds, {args.samples:,} samples\n\n{table(out, args.seeds, which)}"
                         for which in COLUMNS)
    (out / "tables.md").write_text(tables + "\n")
    print(f"{tables}\n\nthis call took {(time.monotonic() - began) / 3600:.2f} hours, {args.jobs} runs at once, torch {torch.__version__}")
    draw(out, args.seeds, args.samples)


if __name__ == "__main__":
    main()
