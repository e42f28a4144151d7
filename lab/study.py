"""The study: geometries, logits, final LayerNorms and cones on the toy world, over several seeds.

    python -m lab.study                                          # out_study/, lab/results.md
    python -m lab.study --samples 9_000 --seeds 2 --out out_try  # everything in out_try/

Every run is a run of train.py with one thread; as many run at once as there are cores. Finished
runs are skipped, so an interrupted study continues when it is started again. README has the
results, and lab/results.md all numbers.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import evaluate
from geometry import GEOMETRIES
from lab import figures, hierarchy

ROOT = Path(__file__).resolve().parents[1]
CODE = ("geometry.py", "model.py", "data.py", "evaluate.py", "train.py", "lab/shapes.py",
        "lab/hierarchy.py")
OUT, SAMPLES, SEEDS, FEWER = ROOT / "out_study", 90_000, 10, 4
COMMON = ["--batch_size", 128, "--lr", 3e-3, "--device", "cpu", "--workers", 0]
DEFAULT = {g: f"{g}-{geometry.logits[0]}" for g, geometry in GEOMETRIES.items()}
WITH_CONES = {g: f"{DEFAULT[g]}-0.2" for g, geometry in GEOMETRIES.items() if geometry.cones}
WIDER = (  # runs with wider cones: the run without, K, other flags
    ("euclidean-squared-0.2", "0.3", ()),
    ("euclidean-squared-0.2", "0.3", ("--final_min_radius", "0.1")),
    ("euclidean-squared-0.2", "0.6", ()),
    ("hyperbolic-distance-0.2", "0.3", ()),
)


def runs():
    """-> {name: (number of seeds, flags)}. In a name, 0.2 is lambda, the weight of the entailment
    loss. The names ln and no_ln mark the final LayerNorms that are not the geometry's default."""
    table = {}
    for g, geometry in GEOMETRIES.items():
        for logit in geometry.logits:
            seeds = SEEDS if logit == geometry.logits[0] else FEWER
            table[f"{g}-{logit}"] = seeds, ["--geometry", g, "--logit", logit]
        if geometry.cones:
            table[WITH_CONES[g]] = SEEDS, ["--geometry", g, "--entailment_weight", "0.2"]
        name, other = ("no_ln", "--no-final_ln") if geometry.final_ln else ("ln", "--final_ln")
        table[f"{g}-{name}"] = SEEDS, ["--geometry", g, other]
    for name, K, more in WIDER:
        flags = [*table[name][1], "--min_radius", K, *more]
        table[f"{name}-K{K}{'-falling' if more else ''}"] = FEWER, flags
    return table


def refuse_to_mix(out, samples):
    """Store a digest of everything that decides the results, code and flags, beside the runs. End
    the program if runs of another digest are there."""
    code = b"".join((ROOT / name).read_bytes() for name in CODE)
    mine = hashlib.sha256(code + json.dumps([samples, COMMON, runs()]).encode()).hexdigest()
    if not (out / "digest").exists():
        (out / "digest").write_text(mine)
    if (out / "digest").read_text() != mine:
        sys.exit(f"{out} contains runs of other code or flags; choose another --out or remove it")


def call(command, log):
    """Run a program with one thread. A failure is reported and does not stop the other runs."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        command = [sys.executable, *map(str, command)]
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, env=env).returncode
    result = f"failed, see {log}" if code else "ended"
    print(f"{log.parent.name}: {log.stem} {result}", flush=True)


def is_trained(folder, samples):
    if not (folder / "ckpt.pt").exists():
        return False
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    return checkpoint["step"] == samples // checkpoint["train_config"]["batch_size"]


def one(folder, flags, seed, samples):
    """Train and evaluate one run, unless its results exist."""
    result, evaluated = folder / "result.json", folder / "evaluate.json"
    if result.exists():
        return
    refuse_to_mix(folder.parent, samples)
    folder.mkdir(parents=True, exist_ok=True)
    run = ["--seed", seed, "--samples", samples, "--out_dir", folder, "--resume"]
    if not is_trained(folder, samples):
        call(["train.py", *flags, *run, *COMMON], folder / "train.txt")
    if is_trained(folder, samples):
        command = ["evaluate.py", folder / "ckpt.pt", "--json", evaluated, "--workers", 0]
        call(command, folder / "evaluate.txt")
    refuse_to_mix(folder.parent, samples)  # has the code changed in the meantime?
    if evaluated.exists():
        metrics, subject = json.loads(evaluated.read_text()), figures.Subject(folder / "ckpt.pt")
        texts = subject.texts[torch.tensor(subject.chains)].transpose(0, 1)  # (L, N, D)
        metrics["hierarchy"] = hierarchy.hierarchy_metrics(subject.model, subject.images, texts)
        metrics["traversal"] = traversal_metrics(subject)
        K = evaluate.last_min_radius(subject.model)
        if K is not None:
            metrics["traversal_in_cones"] = traversal_metrics(subject, K)
        result.write_text(json.dumps(metrics))


def traversal_metrics(subject, min_radius=None):
    """-> dict of captions: mean number per path; transitions: how many lead from a caption
    to the next, over all paths; to_general, to_specific: fractions of these that lead to a more
    general or more specific level. The root does not count."""
    texts, level, captions, transitions = subject.texts, {}, 0, []
    for chain in subject.chains:
        level |= {text: i for i, text in enumerate(chain)}
    for path in evaluate.traverse(subject.model, subject.images, texts, min_radius):
        levels = [level[text] for _, text in path if text < len(texts)]
        captions += len(levels)
        transitions += [b - a for a, b in zip(levels, levels[1:])]
    metrics = {"captions": captions / len(subject.images), "transitions": len(transitions),
               "to_general": None, "to_specific": None}
    if transitions:
        metrics["to_general"] = sum(step < 0 for step in transitions) / len(transitions)
        metrics["to_specific"] = sum(step > 0 for step in transitions) / len(transitions)
    return metrics


# ------------------------------------------------------------------------------------------------
# the tables

R1 = ("retrieval.mean_r1", 100, 1)  # place in the results, factor, digits
TOP1 = ("zero_shot.top1", 100, 1)
GENERAL = ("hierarchy.general_nearer", 100, 1)
TABLES = {
    "accuracy and radius": {
        "top-1 %": TOP1, "R@1 %": R1, "general nearer the root %": GENERAL,
        "text radius, training": ("log.text_radius", 1, 2),
        "image radius, training": ("log.image_radius", 1, 2),
        "text radius, held out": ("hierarchy.text_radius.4", 1, 2),
        "image radius, held out": ("hierarchy.image_radius", 1, 2)},
    "radius of held-out captions by level": {
        f"level {i + 1}": (f"hierarchy.text_radius.{i}", 1, 2) for i in range(5)},
    "cones and paths to the root": {
        "in its caption's cone %, training": ("log.in_cone", 100, 1),
        "in its caption's cone %, held out": ("hierarchy.own_in_cone.4", 100, 1),
        "in another caption's cone %": ("hierarchy.other_in_cone.4", 100, 1),
        "captions per path": ("traversal.captions", 1, 2),
        "transitions": ("traversal.transitions", 1, 0),
        "to general %": ("traversal.to_general", 100, 1),
        "to specific %": ("traversal.to_specific", 100, 1),
        "with cones: captions": ("traversal_in_cones.captions", 1, 2),
        "with cones: transitions": ("traversal_in_cones.transitions", 1, 0),
        "with cones: to general %": ("traversal_in_cones.to_general", 100, 1),
        "with cones: to specific %": ("traversal_in_cones.to_specific", 100, 1)},
}
# 97.5 % quantiles of Student's t distribution for 2 to 10 seeds
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def finished(out, seeds):
    """-> {name: {seed: results}}; "log" in the results is the last report of the training."""
    found = {}
    for name, (most, _) in runs().items():
        for seed in range(min(seeds, most)):
            folder = out / f"{name}-s{seed}"
            if (folder / "result.json").exists():
                result = json.loads((folder / "result.json").read_text())
                result["log"] = [line for line in log_of(folder) if "loss" in line][-1]
                found.setdefault(name, {})[seed] = result
    return found


def look_up(result, path):
    """{"a": {"b": [5, 6]}}, "a.b.1" -> 6; None if a geometry does not have this metric."""
    for name in path.split("."):
        if result is None:
            return None
        result = result[int(name)] if isinstance(result, list) else result.get(name)
    return result


def mean_and_deviation(results, path, factor, digits):
    """-> "mean ± standard deviation" over the seeds for which the metric is defined."""
    values = [look_up(result, path) for result in results.values()]
    values = [factor * value for value in values if value is not None]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}" if values else ""


def difference(a, b, path, factor, digits):
    """Run a minus run b, seed by seed -> "mean ± half of the 95 % interval" (Student's t)."""
    d = [factor * (look_up(a[seed], path) - look_up(b[seed], path)) for seed in a if seed in b]
    if len(d) < 2:
        return ""
    half = STUDENT[len(d) - 2] * statistics.stdev(d) / math.sqrt(len(d))
    return f"{statistics.mean(d):+.{digits}f} ± {half:.{digits}f}"


def markdown(title, heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join([f"\n## {title}\n", *(f"| {' | '.join(line)} |" for line in lines)])


def comparisons():
    """-> pairs of names: first the geometries, also with the same LayerNorms, then each run beside
    the one that differs in a single flag."""
    clip, flat, curved = (DEFAULT[g] for g in ("clip", "euclidean", "hyperbolic"))
    pairs = [(flat, clip), (curved, clip), (flat, curved), (f"{flat}-0.2", clip),
             (f"{curved}-0.2", clip), ("euclidean-ln", clip), ("euclidean-ln", curved),
             ("hyperbolic-no_ln", clip), ("hyperbolic-no_ln", "clip-no_ln"),
             (flat, "clip-no_ln"), (flat, "hyperbolic-no_ln")]
    for name in runs():
        geometry, _, *more = name.split("-")
        simpler = name.rpartition("-")[0] if more else DEFAULT[geometry]
        pairs += [(name, simpler)] if simpler != name else []
    return pairs


def report(found, samples):
    parts = [f"Written by lab/study.py: {samples:,} samples per run, torch {torch.__version__}. "
             "In the names of runs, 0.2 is lambda; K is min_radius, 0.1 if not named; falling: K "
             "falls to 0.1; ln, no_ln: the final LayerNorms are not the geometry's default. A "
             "radius is a distance from the root; CLIP's is (1 - cos) / 2. Paths lead from an "
             "image to the root; a transition leads from one caption to the next. Transitions are "
             "counted over all images."]
    for title, columns in TABLES.items():
        rows = []
        for name, results in found.items():
            cells = [mean_and_deviation(results, *column) for column in columns.values()]
            rows.append([name, str(len(results)), *cells])
        title = f"{title}: mean ± standard deviation"
        parts.append(markdown(title, ["run", "seeds", *columns], rows))
    columns, rows = {"R@1": R1, "top-1": TOP1, "general nearer the root": GENERAL}, []
    for a, b in comparisons():
        if a in found and b in found:
            cells = [difference(found[a], found[b], *column) for column in columns.values()]
            rows.append([f"{a} minus {b}", str(len(found[a].keys() & found[b].keys())), *cells])
    title = "differences in points, seed by seed: mean ± half of the 95 % interval (Student's t)"
    parts.append(markdown(title, ["difference", "seeds", *columns], rows))
    columns, rows = {}, []
    for more in TABLES.values():
        columns |= more
    for name, results in found.items():
        for seed, result in results.items():
            cells = [mean_and_deviation({seed: result}, *column) for column in columns.values()]
            rows.append([name, str(seed), *cells])
    parts.append(markdown("each run", ["run", "seed", *columns], rows))
    return "\n".join(parts) + "\n"


def draw(out, found, path):
    """Distances from the root in the first seed; the second row is with entailment loss."""
    by_cones = sorted(GEOMETRIES, key=lambda g: g not in WITH_CONES)  # the sphere comes last
    subjects = []
    for name in (*(DEFAULT[g] for g in by_cones), *WITH_CONES.values()):
        subjects.append(figures.Subject(out / f"{name}-s{min(found[name])}" / "ckpt.pt"))
    figures.distances(subjects, path)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the runs")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="largest number of seeds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of runs at once")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    refuse_to_mix(out, args.samples)
    torch.set_num_threads(1)

    began, pool = time.monotonic(), ThreadPoolExecutor(args.jobs)
    first, second = [], []  # the main runs first
    for seed in range(args.seeds):
        for name, (most, flags) in runs().items():
            run = (out / f"{name}-s{seed}", flags, seed, args.samples)
            if most == SEEDS:
                first.append(run)
            elif seed < most:
                second.append(run)
    waiting = [pool.submit(one, *run) for run in first + second]
    try:
        for run in waiting:
            run.result()
    except KeyboardInterrupt:  # the runs receive it as well, and save their checkpoints
        sys.exit("interrupted; the same command resumes the study")
    finally:
        pool.shutdown(cancel_futures=True)
    default = (args.out, args.samples, args.seeds) == (OUT, SAMPLES, SEEDS)
    found, folder = finished(out, args.seeds), ROOT / "lab" if default else out
    (folder / "results.md").write_text(report(found, args.samples))
    if {*DEFAULT.values(), *WITH_CONES.values()} <= set(found):
        draw(out, found, folder / "distances.png")
    hours = (time.monotonic() - began) / 3600
    print(f"{folder / 'results.md'}: this call took {hours:.2f} hours, {args.jobs} runs at once")


if __name__ == "__main__":
    main()
