"""The study: every geometry, logit and entailment weight on the built-in shapes, three seeds each.

    python tests/study.py                          # trains what is missing, evaluates, writes out_study/table.md and its figures
    python tests/study.py --samples 9_000 --seeds 1

Runs are those of `train.py` with the flags below, one thread and one core each, as many at once as there are cores. What is done is
skipped, so the study can be interrupted and called again. Results: README, "Results".
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
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
    """A program on one thread -> seconds it took. Its output goes to a file; a failure is told and does not stop the others."""
    began = time.monotonic()
    with open(log, "w") as file:
        code = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                              env=os.environ | dict(OMP_NUM_THREADS="1")).returncode
    print(f"{log.parent.name}: {log.stem} " + (f"failed, see {log}" if code else f"took {time.monotonic() - began:.0f} s"), flush=True)


def one(folder, flags, seed, samples):
    """Train and evaluate one run, each unless it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "done").exists():
        call(["train.py", *flags, "--seed", seed, "--samples", samples, "--workers", 0, "--device", "cpu", "--out_dir", folder, "--resume"], folder / "train.txt")
        if "is ready for evaluate.py" in (folder / "train.txt").read_text():
            (folder / "done").touch()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out_study")
    parser.add_argument("--samples", type=int, default=90_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    began = time.monotonic()
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in range(args.seeds):
            for name, flags in runs().items():
                pool.submit(one, args.out / f"{name}-s{seed}", flags, seed, args.samples)
    print(f"{(time.monotonic() - began) / 3600:.2f} hours on {args.jobs} cores")


if __name__ == "__main__":
    main()
