"""The study: geometries, logits, final LayerNorms and cones on the built-in shapes, by seeds.

    python tests/study.py                                          # out_study/, assets/results.md
    python tests/study.py --samples 9_000 --seeds 2 --out out_try  # all of it in out_try/

Runs are those of train.py, one thread each, as many at once as there are cores. What is done is
skipped, so the study can be interrupted and called again. Results: README, and assets/results.md.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import evaluate
from assets import figures
from geometry import GEOMETRIES

CODE = ("geometry.py", "model.py", "data.py", "evaluate.py", "train.py")
OUT, SAMPLES, SEEDS, FEWER = ROOT / "out_study", 90_000, 10, 4
COMMON = ["--batch_size", 128, "--lr", 3e-3, "--device", "cpu", "--workers", 0]
DEFAULT = {g: f"{g}-{geometry.logits[0]}" for g, geometry in GEOMETRIES.items()}
WITH_CONES = {g: f"{DEFAULT[g]}-0.2" for g, geometry in GEOMETRIES.items() if geometry.cones}
WIDER = (  # cones: run, K, more flags
    ("euclidean-squared-0.2", "0.3", ()),
    ("euclidean-squared-0.2", "0.3", ("--final_min_radius", "0.1")),
    ("euclidean-squared-0.2", "0.6", ()),
    ("hyperbolic-distance-0.2", "0.3", ()),
)


def runs():
    """-> {name: (seeds, flags)}. 0.2 is lambda, the weight of the entailment loss; ln and no_ln are
    the choice of final LayerNorms that is not the geometry's own."""
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
    """A digest of all that decides what comes out, code and flags, stands beside the runs."""
    code = b"".join((ROOT / name).read_bytes() for name in CODE)
    mine = hashlib.sha256(code + json.dumps([samples, COMMON, runs()]).encode()).hexdigest()
    if not (out / "digest").exists():
        (out / "digest").write_text(mine)
    if (out / "digest").read_text() != mine:
        sys.exit(f"{out} holds a study of other code or flags: choose another --out, or remove it")


def call(command, log):
    """A program on one thread. A failure is told and does not stop the others."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        command = [sys.executable, *map(str, command)]
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, env=env).returncode
    print(f"{log.parent.name}: {log.stem} {f'failed, see {log}' if code else 'ended'}", flush=True)


def is_trained(folder, samples):
    if not (folder / "ckpt.pt").exists():
        return False
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    return checkpoint["step"] == samples // checkpoint["train_config"]["batch_size"]


def one(folder, flags, seed, samples):
    """Train and evaluate one run, unless it is done."""
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
        metrics["traversal"] = traversal_metrics(subject)
        K = evaluate.last_min_radius(subject.model)
        if K is not None:
            metrics["traversal_in_cones"] = traversal_metrics(subject, K)
        result.write_text(json.dumps(metrics))


def traversal_metrics(subject, min_radius=None):
    """captions: mean number on a way; changes: from a caption to the next, on all ways together;
    to_general, to_specific: fractions of these by level. The root does not count."""
    texts, level, captions, changes = subject.texts, {}, 0, []
    for chain in subject.chains:
        level |= {text: i for i, text in enumerate(chain)}
    for way in evaluate.traverse(subject.model, subject.images, texts, min_radius):
        levels = [level[text] for _, text in way if text < len(texts)]
        captions += len(levels)
        changes += [b - a for a, b in zip(levels, levels[1:])]
    n = len(changes)
    return {"captions": captions / len(subject.images), "changes": n,
            "to_general": sum(c < 0 for c in changes) / n if n else None,
            "to_specific": sum(c > 0 for c in changes) / n if n else None}  # fmt: skip


# ------------------------------------------------------------------------------------------------
# what came out

R1 = ("retrieval.mean_r1", 100, 1)  # where a result has it, factor, digits
TOP1 = ("zero_shot.top1", 100, 1)
GENERAL = ("hierarchy.general_nearer", 100, 1)
TABLES = {
    "accuracy and radius": {
        "top-1 %": TOP1, "R@1 %": R1, "general nearer the root %": GENERAL,
        "radius of text, training": ("log.text_radius", 1, 2),
        "of image, training": ("log.image_radius", 1, 2),
        "radius of text, held out": ("hierarchy.text_radius.4", 1, 2),
        "of image, held out": ("hierarchy.image_radius", 1, 2)},
    "radius of held-out captions by their level": {
        f"level {i + 1}": (f"hierarchy.text_radius.{i}", 1, 2) for i in range(5)},
    "cones and ways to the root": {
        "in its caption's cone %, training": ("log.in_cone", 100, 1),
        "held out": ("hierarchy.own_in_cone.4", 100, 1),
        "in another caption's %": ("hierarchy.other_in_cone.4", 100, 1),
        "captions on the way": ("traversal.captions", 1, 2),
        "changes": ("traversal.changes", 1, 0),
        "to general %": ("traversal.to_general", 100, 1),
        "to specific %": ("traversal.to_specific", 100, 1),
        "with cones: captions": ("traversal_in_cones.captions", 1, 2),
        "with cones: changes": ("traversal_in_cones.changes", 1, 0),
        "with cones: to general %": ("traversal_in_cones.to_general", 100, 1),
        "with cones: to specific %": ("traversal_in_cones.to_specific", 100, 1)},
}  # fmt: skip
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 %, for 2 to 10


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def finished(out, seeds):
    """-> {name: {seed: its results, and as `log` the last report of its training}}."""
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
    """"a.b.1" in {"a": {"b": [5, 6]}} -> 6; None where a geometry does not have it."""
    for name in path.split("."):
        if result is None:
            return None
        result = result[int(name)] if isinstance(result, list) else result.get(name)
    return result


def mean_and_deviation(results, path, factor, digits):
    """"mean ± standard deviation" of the seeds for which it is defined."""
    values = [look_up(result, path) for result in results.values()]
    values = [factor * value for value in values if value is not None]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}" if values else ""


def difference(a, b, path, factor, digits):
    """Run a minus run b, seed by seed: "mean ± half of the 95 % interval" by Student's t."""
    d = [factor * (look_up(a[seed], path) - look_up(b[seed], path)) for seed in a if seed in b]
    if len(d) < 2:
        return ""
    half = STUDENT[len(d) - 2] * statistics.stdev(d) / math.sqrt(len(d))
    return f"{statistics.mean(d):+.{digits}f} ± {half:.{digits}f}"


def markdown(title, heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join([f"\n## {title}\n", *(f"| {' | '.join(line)} |" for line in lines)])


def comparisons():
    """-> pairs of names: of geometries, also with the same LayerNorms; then each run and the one
    from which it differs in one flag."""
    clip, flat, curved = (DEFAULT[g] for g in ("clip", "euclidean", "hyperbolic"))
    pairs = [(flat, clip), (curved, clip), (flat, curved), (f"{flat}-0.2", clip),
             (f"{curved}-0.2", clip), ("euclidean-ln", clip), ("euclidean-ln", curved),
             ("hyperbolic-no_ln", clip), ("hyperbolic-no_ln", "clip-no_ln"),
             (flat, "clip-no_ln"), (flat, "hyperbolic-no_ln")]
    for name in runs():
        geometry, _, *more = name.split("-")
        simpler = name.rpartition("-")[0] if more else DEFAULT[geometry]
        pairs += [(name, simpler)] if simpler != name else []
    return pairs  # fmt: skip


def report(found, samples):
    parts = [f"Written by tests/study.py: {samples:,} samples a run, torch {torch.__version__}. "
             "0.2: lambda; K: min_radius, 0.1 if not named, falling: to 0.1; ln, no_ln: the other "
             "choice of final LayerNorms. Captions are met on the way from a picture to the root; "
             "changes: from one to the next, of all pictures."]  # fmt: skip
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
    """Distances from the root in the first seed; in the second row with entailment loss."""
    by_cones = sorted(GEOMETRIES, key=lambda g: g not in WITH_CONES)  # the sphere comes last
    subjects = []
    for name in (*(DEFAULT[g] for g in by_cones), *WITH_CONES.values()):
        subjects.append(figures.Subject(out / f"{name}-s{min(found[name])}" / "ckpt.pt"))
    figures.distances(subjects, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="for the runs")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="at most")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
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
    except KeyboardInterrupt:  # the runs got it as well, and save
        sys.exit("interrupted; the same command goes on")
    finally:
        pool.shutdown(cancel_futures=True)
    default = (args.out, args.samples, args.seeds) == (OUT, SAMPLES, SEEDS)
    found, folder = finished(out, args.seeds), ROOT / "assets" if default else out
    (folder / "results.md").write_text(report(found, args.samples))
    if {*DEFAULT.values(), *WITH_CONES.values()} <= set(found):
        draw(out, found, folder / "distances.png")
    hours = (time.monotonic() - began) / 3600
    print(f"{folder / 'results.md'}: this call took {hours:.2f} hours, {args.jobs} runs at once")


if __name__ == "__main__":
    main()
