"""The study on photographs: three geometries, with and without cones, on CIFAR-10.

    python -m lab.cifar10                # cifar10/train.tar and cifar10/test
    python -m lab.photos cifar10         # out_photos/, lab/photos.md

Runs are those of train.py on one thread each, as many at once as there are cores. Finished runs are
skipped and interrupted ones resumed, so the study can be stopped and started again. Captions have
three levels: any photo, animal or vehicle, class. They are evaluated with the prompts of
lab/cifar10.py, each test image with one of them. The flags were chosen on the first 200 test images
of each class, in some twenty short runs of one seed: batch size, learning rate, warm-up, crop and
initial logit scale. EuCLIP tried more of these scales than the others.
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import evaluate
from lab import cifar10, hierarchy, study
from model import load_model

SAMPLES, BATCH, SEEDS = 100_000, 64, 4
TUNED = 200  # images of each class on which the flags were chosen; they are not evaluated
COMMON = ["--samples", SAMPLES, "--batch_size", BATCH, "--lr", 1.5e-3, "--warmup", 100,
          "--device", "cpu", "--workers", 0, "--eval_every", 10_000_000]
FLAT, CURVED = ["--geometry", "euclidean", "--init_logit_scale", 1.5], ["--geometry", "hyperbolic"]
RUNS = {  # 0.2 is lambda, the weight of the entailment loss; K is the minimum radius
    "clip": ["--geometry", "clip"],
    "euclidean": FLAT,
    "euclidean-0.2-K0.6": [*FLAT, "--entailment_weight", 0.2, "--min_radius", 0.6],
    "hyperbolic": CURVED,
    "hyperbolic-0.2-K0.3": [*CURVED, "--entailment_weight", 0.2, "--min_radius", 0.3],
}
COLUMNS = {  # where a result has it, factor, digits: see lab/study.py
    "top-1 %": ("zero_shot.top1", 100, 1),
    "mean per class %": ("zero_shot.mean_per_class_recall", 100, 1),
    "general nearer the root %": ("hierarchy.general_nearer", 100, 1),
    "radius of any photo": ("hierarchy.text_radius.0", 1, 2),
    "of animal or vehicle": ("hierarchy.text_radius.1", 1, 2),
    "of class": ("hierarchy.text_radius.2", 1, 2),
    "of images": ("hierarchy.image_radius", 1, 2),
    "image in the cone of its kind %": ("hierarchy.own_in_cone.1", 100, 1),
    "of its class %": ("hierarchy.own_in_cone.2", 100, 1),
    "in the cone of another image's class %": ("hierarchy.other_in_cone.2", 100, 1),
}
DIFFERENCES = [("euclidean", "clip"), ("hyperbolic", "clip"), ("euclidean", "hyperbolic"),
               ("euclidean-0.2-K0.6", "euclidean"), ("hyperbolic-0.2-K0.3", "hyperbolic")]


def evaluate_run(checkpoint, photos):
    """-> metrics of zero-shot classification and of the hierarchy, on all test images."""
    model = load_model(checkpoint)
    images, names = [], []
    for name in cifar10.CLASSES:
        files = sorted(map(str, (photos / "test" / name).iterdir()))[TUNED:]
        images += files
        names += [name] * len(files)
    embeddings, kept = evaluate.embed_images(model, images)
    templates = [f"{prompt} of {{}}" for prompt in cifar10.PROMPTS]
    nouns = [cifar10.with_article(name) for name in cifar10.CLASSES]
    classes = evaluate.embed_classes(model, nouns, templates)
    labels = torch.tensor([cifar10.CLASSES.index(names[i]) for i in kept])
    zero_shot = evaluate.zero_shot_metrics(model.similarity, embeddings, classes, labels)
    captions = []
    for i in kept:
        prompt = cifar10.PROMPTS[i % len(cifar10.PROMPTS)]
        captions.append(cifar10.caption_levels(names[i], prompt))
    texts = sorted(set(sum(captions, [])))
    rows = evaluate.embed_texts(model, texts)
    index = torch.tensor([[texts.index(text) for text in chain] for chain in captions])  # (N, 3)
    metrics = hierarchy.hierarchy_metrics(model, embeddings, rows[index.T])
    return {"zero_shot": zero_shot, "hierarchy": metrics}


def one(folder, flags, seed, photos, samples):
    """Train and evaluate one run, unless it is done."""
    if (folder / "result.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    run = ["--seed", seed, "--out_dir", folder, "--resume", "--data", photos / "train.tar"]
    if not study.is_trained(folder, samples):
        study.call(["train.py", *flags, *COMMON, *run, "--samples", samples], folder / "train.txt")
    if study.is_trained(folder, samples):
        result = evaluate_run(folder / "ckpt.pt", photos)
        (folder / "result.json").write_text(json.dumps(result))


def report(found, samples, official):
    archive = "the official archive" if official else "a stand-in, compressed as JPEG once more"
    parts = [f"# Photographs\n\nWritten by lab/photos.py: CIFAR-10 ({archive}), {samples:,} "
             f"samples a run, torch {torch.__version__}. 0.2 is lambda, K is `min_radius`. Chance "
             "is 10 % for top-1, and 50 % for general nearer. CLIP's radius is (1 - cos) / 2. The "
             f"first {TUNED} test images of each class, on which the flags were chosen, are not "
             "counted."]
    rows = []
    for name, results in found.items():
        cells = [study.mean_and_deviation(results, *column) for column in COLUMNS.values()]
        rows.append([name, str(len(results)), *cells])
    title = "means ± standard deviations over seeds"
    parts.append(study.markdown(title, ["run", "seeds", *COLUMNS], rows))
    shown, rows = list(COLUMNS)[:3], []
    for a, b in DIFFERENCES:
        cells = [study.difference(found[a], found[b], *COLUMNS[name]) for name in shown]
        rows.append([f"{a} minus {b}", str(len(found[a].keys() & found[b].keys())), *cells])
    title = "differences in points, seed by seed: mean ± half of the 95 % interval (Student's t)"
    parts.append(study.markdown(title, ["difference", "seeds", *shown], rows))
    rows = []
    for name, results in found.items():
        for seed, result in results.items():
            one_seed = {seed: result}
            cells = [study.mean_and_deviation(one_seed, *column) for column in COLUMNS.values()]
            rows.append([name, str(seed), *cells])
    parts.append(study.markdown("each run", ["run", "seed", *COLUMNS], rows))
    return "\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("photos", type=Path, help="the folder that lab/cifar10.py has written")
    parser.add_argument("--out", type=Path, default=study.ROOT / "out_photos", help="for the runs")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
    parser.add_argument("--stand_in", action="store_true", help="the archive is not the official")
    args = parser.parse_args()
    torch.set_num_threads(1)
    photos, out = args.photos.resolve(), args.out.resolve()
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = []
        for seed in range(args.seeds):
            for name, flags in RUNS.items():
                run = (out / f"{name}-s{seed}", flags, seed, photos, args.samples)
                runs.append(pool.submit(one, *run))
        for run in runs:
            run.result()
    found = {}
    for name in RUNS:
        for seed in range(args.seeds):
            path = out / f"{name}-s{seed}" / "result.json"
            if path.exists():
                found.setdefault(name, {})[seed] = json.loads(path.read_text())
    default = (args.samples, args.seeds) == (SAMPLES, SEEDS)
    path = study.ROOT / "lab" / "photos.md" if default else out / "photos.md"
    path.write_text(report(found, args.samples, not args.stand_in))
    print(path)


if __name__ == "__main__":
    main()
