"""Zero-shot classification, retrieval, and traversals from an image to the root.

    python evaluate.py out/ckpt.pt                                # on the training's held-out data
    python evaluate.py ckpt.pt --classification imagenet/val --classnames names.txt
    python evaluate.py ckpt.pt --retrieval dataset_coco.json --images coco --split test
    python evaluate.py out/ckpt.pt --traverse photo.jpg --captions captions.txt

Ties count against the model: a right answer that is as similar as k wrong answers ranks below all
of them. A model that gives every input the same embedding therefore scores 0, not 100 %.

Axes: N images, M captions or classes, P pairs of them, S steps, D embedding width.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see train.py

import argparse
import json
import math
import re
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

import data
from data import print0
from model import load_model

PROMPTS = ["a photo of a {}.", "a picture of a {}.", "a close-up photo of a {}.",
           "a good photo of the {}.", "a drawing of a {}."]
STEPS = 50  # points on a path to the root, as in MERU

# ---- metrics: all are fractions of 1, or None if undefined -------------------------------------

@torch.no_grad()
def wrong_before_right(similarity, queries, candidates, matches):
    """For each query, count the wrong candidates at least as similar as the best right candidate.

    queries (N, D), candidates (M, D), matches (P, 2): indices of a query and of a right candidate
    -> int64 (N,), 0 is best. For queries without a right candidate the count is meaningless.
    """
    counts = []
    block = max(1, min(1024, 2**24 // max(1, len(candidates))))  # of queries, to limit the memory
    query, candidate = matches.to(queries.device).unbind(1)
    for start in range(0, len(queries), block):
        similarities = similarity(queries[start : start + block], candidates)  # (block, M)
        right = torch.zeros_like(similarities, dtype=torch.bool)
        here = (query >= start) & (query < start + block)
        right[query[here] - start, candidate[here]] = True
        best = similarities.masked_fill(~right, -math.inf).amax(1, keepdim=True)
        counts.append(((similarities >= best) & ~right).sum(1))
    return torch.cat(counts).cpu()

def recall_at_k(wrong, k, total):
    """Fraction of queries with a right answer in the top k of `total` candidates; None if fewer."""
    return (wrong < k).double().mean().item() if k <= total else None

def zero_shot_metrics(similarity, images, classes, labels):
    """images (N, D), classes (M, D), labels int64 (N,) -> dict. Raises ValueError."""
    M, labels = len(classes), labels.cpu()
    if int(labels.min()) < 0 or int(labels.max()) >= M:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()} for {M} classes")
    matches = torch.stack([torch.arange(len(labels)), labels], dim=1)
    wrong = wrong_before_right(similarity, images, classes, matches)
    per_class = [recall_at_k(wrong[labels == c], 1, M) for c in labels.unique()]
    chance = {"top1": 1 / M, "top5": 5 / M if M >= 5 else None, "mean_per_class_recall": 1 / M}
    return {"top1": recall_at_k(wrong, 1, M), "top5": recall_at_k(wrong, 5, M), "classes": M,
            "mean_per_class_recall": sum(per_class) / len(per_class), "chance": chance}

def retrieval_metrics(similarity, images, texts, pairs):
    """images (N, D), texts (M, D), pairs int64 (P, 2): indices of an image and of a text that
    belong together, any number per image and per text; or (M,): the image of each text -> dict.

    i2t_r1, ...: fraction of images with texts that have any of their texts in the top k.
    t2i_r1, ...: fraction of texts that have any of their images in the top k.
    mean_r1: mean of i2t_r1 and t2i_r1."""
    out, chance, pairs = {}, {}, pairs.cpu()
    if pairs.ndim == 1:
        pairs = torch.stack([pairs, torch.arange(len(pairs))], dim=1)
    for name, queries, candidates, matches in (("i2t", images, texts, pairs),
                                               ("t2i", texts, images, pairs.flip(1))):
        total, right = len(candidates), torch.bincount(matches[:, 0], minlength=len(queries))
        wrong = wrong_before_right(similarity, queries, candidates, matches)[right > 0]
        for k in (1, 5, 10):
            out[f"{name}_r{k}"] = recall_at_k(wrong, k, total)
            # fraction of all choices of k candidates that contain none of the n right ones
            missed = [math.comb(total - n, k) / max(1, math.comb(total, k))
                      for n in right[right > 0].tolist()]
            chance[f"{name}_r{k}"] = 1 - sum(missed) / len(missed) if k <= total else None
    return out | {"mean_r1": (out["i2t_r1"] + out["t2i_r1"]) / 2, "chance": chance}

@torch.no_grad()
def traverse(model, images, texts, min_radius=None):
    """Captions on the straight path from each image (N, D) to the root. They should change from
    specific to general.

    Returns a list of (step, index of a text) for each image, ordered by step. It contains each text
    that is the nearest one somewhere on the path, with the first step at which it is. Index M
    stands for the root, which is always a candidate and wins ties. With a min_radius, the texts
    (M, D) are candidates only at the points that their cones contain. Source: MERU; EuCLIP, Figures
    3 and 5.
    """
    geometry, curv, found = model.geometry, model.scalars()[1], []
    root = geometry.root(torch.cat([images, texts]))
    for path in geometry.path_to_root(images, STEPS, root).unbind(1):  # (S, D)
        similarity = model.similarity(path, texts)  # (S, M)
        if min_radius is not None:
            for row, point in zip(similarity, path):  # (M,), (D,)
                row[geometry.entailment_loss(texts, point, min_radius, curv) > 0] = -math.inf
        best, nearest = similarity.max(1)
        nearest[model.similarity(path, path[-1:])[:, 0] >= best] = len(texts)
        nearest = nearest.tolist()
        found.append([(nearest.index(text), text) for text in dict.fromkeys(nearest)])
    return found

# ---- embeddings --------------------------------------------------------------------------------

def load_images(size, sources):
    """[(i, image source)] -> uint8 (N, 3, size, size), i of each; without unreadable images."""
    images, kept = [torch.empty(0, 3, size, size, dtype=torch.uint8)], []
    for i, source in sources:
        with suppress(Exception):  # Pillow raises almost any exception on damaged files
            images.append(data.load_image(source, size)[None])
            kept.append(i)
    return torch.cat(images), kept

def finite(rows, what):
    """rows (N, D) -> rows. Raises ValueError for NaN, which would rank first in similarity."""
    bad = int((~rows.isfinite()).any(1).sum())
    if bad:
        raise ValueError(f"{bad} of {len(rows)} {what} embeddings are not finite")
    return rows

@torch.no_grad()
def embed_images(model, images, batch_size=64, workers=0):
    """Image sources -> embeddings (N, D) of the readable images, and the N indices of these."""
    loading = {"batch_size": batch_size, "num_workers": workers}
    collate, rows, kept = partial(load_images, model.config.image_size), [], []
    for batch, indices in data.load([*enumerate(images)], collate, **loading):
        rows.append(model.encode_image(batch.to(model.logit_scale.device)))
        kept += indices
    if not kept:
        raise ValueError(f"none of {len(images)} images is readable, such as {images[:1]}")
    return finite(torch.cat(rows), "image"), kept

@torch.no_grad()
def embed_texts(model, texts, batch_size=64):
    """M strings -> embeddings (M, D)."""
    tokens = data.tokenize(texts, model.config.tokenizer, model.config.context_length)
    tokens = tokens.to(model.logit_scale.device)
    rows = [model.encode_text(some) for some in tokens.split(batch_size)]
    return finite(torch.cat(rows), "text")

def embed_classes(model, names, templates):
    """-> class embeddings (M, D). As in the authors' code, a class is the mean of its prompts. On
    the sphere, where that mean is shorter than 1, it is normalised again."""
    prompts = [template.replace("{}", name) for template in templates for name in names]
    prompts = embed_texts(model, prompts).unflatten(0, (len(templates), len(names)))
    return model.geometry.project(prompts.mean(0))

# ---- tasks: metrics of a model, and a sentence that states the evaluation protocol -------------

def protocol(model, what, images, kept, skipped=None):
    """-> {"protocol": what was evaluated, how it was ranked, which images were skipped}."""
    ranked = f"{what}, ranked by {model.config.geometry}/{model.config.logit}"
    skipped = dict(skipped or {})
    for i in sorted(set(range(len(images))) - set(kept)):
        data.add_skip(skipped, "unreadable", images[i])
    return {"protocol": f"{ranked}; skipped: {data.describe(skipped)}" if skipped else ranked}

def zero_shot(model, images, labels, names, templates, skipped=None, **loading):
    embeddings, kept = embed_images(model, images, **loading)
    classes = embed_classes(model, names, templates)
    metrics = zero_shot_metrics(model.similarity, embeddings, classes, torch.tensor(labels)[kept])
    what = f"{len(kept)} images, {len(names)} classes, mean of {len(templates)} prompts"
    return metrics | protocol(model, what, images, kept, skipped)

def retrieval(model, held_out, **loading):
    """data.HeldOut -> metrics over its readable images and their captions."""
    images, kept = embed_images(model, held_out.images, **loading)
    row = {image: i for i, image in enumerate(kept)}
    pairs = torch.tensor([(row[image], text) for image, text in held_out.pairs if image in row])
    used, pairs[:, 1] = pairs[:, 1].unique(return_inverse=True)  # captions of readable images
    texts = embed_texts(model, [held_out.captions[text] for text in used])
    metrics = retrieval_metrics(model.similarity, images, texts, pairs)
    what = f"{len(kept)} images, {len(texts)} captions, any match counts, duplicates count once"
    return metrics | protocol(model, what, held_out.images, kept, held_out.skipped)

def evaluate(model, held_out, **loading):
    """data.HeldOut -> {task: results}."""
    results = {}
    if held_out.classes:
        results["zero_shot"] = zero_shot(model, *held_out.classes, **loading)
    return results | {"retrieval": retrieval(model, held_out, **loading)}

def held_out_source(flags):
    """Flags of a training run -> the source of its held-out data, or None."""
    return flags.get("val_data") or ("shapes" if flags.get("data") == "shapes" else None)

def last_min_radius(model):
    """K of the cones at the end of training, or None if the model was trained without cones."""
    flags = model.train_config
    if not model.geometry.cones or flags.get("entailment_weight", 1) == 0:
        return None
    last = flags.get("final_min_radius")
    # Third-party checkpoints do not store K. The authors' is 0.1.
    return flags.get("min_radius", 0.1) if last is None else last

def traversal(model, images, captions, min_radius=None, **loading):
    """Image sources, M strings -> {image: [(position from 0 (image) to 1 (root), caption)]},
    protocol. min_radius is K of the cones; 0: no cones; None: as in training."""
    texts = list(dict.fromkeys(captions))
    K = last_min_radius(model) if min_radius is None else (min_radius or None)
    embeddings, kept = embed_images(model, images, **loading)
    found = traverse(model, embeddings, embed_texts(model, texts), K)
    among = "" if K is None else f" whose cone contains the point (K = {K:g})"
    root = model.geometry.root_name
    what = f"{STEPS} steps to the root ({root}), nearest of {len(texts)} captions{among}"
    texts.append("[ROOT]")
    retrieved = {}
    for i, path in zip(kept, found):
        retrieved[str(images[i])] = [(step / (STEPS - 1), texts[text]) for step, text in path]
    return {"retrieved": retrieved} | protocol(model, what, images, kept)

# ---- below: the files of a task, and the command ------------------------------------------------

def class_folders(folder, classnames=None, templates=None):
    """Folder of class folders -> images, labels (in the order of the sorted folders; numbers are
    sorted as numbers), names, templates, skipped files. Raises ValueError."""
    visible = [path for path in Path(folder).iterdir() if not data.is_hidden(path.name)]
    folders = [path.name for path in visible if path.is_dir()]
    folders.sort(key=int if all(map(str.isdecimal, folders)) else None)
    images, skipped = {}, {}  # images: {path: its class folder}
    for file in data.list_files(folder):
        if os.path.dirname(file) in folders and file.lower().endswith(data.IMAGES):
            images[os.path.join(folder, file)] = os.path.dirname(file)
        else:
            data.add_skip(skipped, "file that is no image of a class", file)
    names = data.read_lines(classnames) if classnames else [f.replace("_", " ") for f in folders]
    templates = data.read_lines(templates) if templates else PROMPTS
    empty = sorted(set(folders) - set(images.values()))
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if empty or repeated or len(folders) < 2 or len(names) != len(folders):
        raise ValueError(f"{len(folders)} class folders in {folder} (without images: {empty[:3]}), "
                         f"{len(names)} names in {classnames} (repeated: {repeated[:3]}); "
                         f"skipped: {data.describe(skipped)}")
    if not all("{}" in template for template in templates):
        raise ValueError(f"not all templates have {{}} for the class name: {templates}")
    print0(f"class folder {folders[0]} is {names[0]!r}, ..., {folders[-1]} is {names[-1]!r}")
    labels = [folders.index(name) for name in images.values()]
    return list(images), labels, names, templates, skipped

def karpathy_split(path, folder, split):
    """Karpathy JSON -> data.HeldOut of a split. Raises ValueError."""
    samples, splits = [], Counter()
    with data.reading(path):
        for entry in json.loads(Path(path).read_bytes())["images"]:
            with data.reading(f"entry {entry!r:.200}"):
                splits[entry["split"]] += 1
                if entry["split"] == split:
                    captions = [sentence["raw"].strip() for sentence in entry["sentences"]]
                    nested = Path(folder, entry.get("filepath") or "", entry["filename"])
                    flat = Path(folder, entry["filename"])
                    samples.append((str(nested if nested.exists() else flat), captions))
    missing = [image for image, _ in samples if not os.path.exists(image)]
    if missing:
        raise ValueError(f"{len(missing)} of {len(samples)} images do not exist: {missing[0]}")
    with data.reading(f"{path}, split {split!r} of {dict(splits)}"):  # it may have no captions
        return data.Source(samples).held_out()

def print_results(results):
    for task, metrics in results.items():
        print0(f"{task}: {metrics['protocol']}")
        for name, chance in metrics.get("chance", {}).items():
            if chance is not None:  # None: fewer candidates than k
                print0(f"  {name:21} {100 * metrics[name]:5.1f} %   chance {100 * chance:5.1f} %")
        for image, path in metrics.get("retrieved", {}).items():
            captions = [f"\n  {position:4.0%}  {caption}" for position, caption in path]
            print0(image + "".join(captions))

def pick_device(name=None):
    """A name, or None for the best device -> torch.device. Raises ValueError if it is missing."""
    other = "mps" if torch.backends.mps.is_available() else "cpu"
    name = name or ("cuda" if torch.cuda.is_available() else other)
    torch.set_float32_matmul_precision("highest")  # distances do not tolerate TF32
    torch.backends.cudnn.allow_tf32 = False
    with data.reading(f"--device {name}"):
        return torch.empty(0, device=name).device

def end(message, status=2):
    """End the program with one line on stderr. If several processes fail for the same reason, the
    message of process 0 is enough: torchrun then ends the others while they wait here."""
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(15)
    with suppress(OSError, AttributeError):
        print(message, file=sys.stderr, flush=True)
    sys.exit(status)

class Parser(argparse.ArgumentParser):
    """Takes --batch-size for --batch_size. Errors are one line, without the usage."""

    def parse_args(self, args=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_args([re.sub("^(--no-|--)([^=]+)", underscores, arg) for arg in args])

    def error(self, message):
        end(f"{self.prog}: {message}")

def underscores(match):
    return match[1] + match[2].replace("-", "_")

NEEDS = {"classnames": "classification", "templates": "classification", "captions": "traverse",
         "traverse": "captions", "min_radius": "traverse", "retrieval": "images",
         "images": "retrieval"}

def parse_args(argv=None):
    parser = Parser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", help="a checkpoint of train.py or lab/convert.py")
    add("--val_data", metavar="SOURCE", help="data source for retrieval (default: the training's)")
    add("--classification", metavar="DIR", help="zero-shot evaluation on a folder of class folders")
    add("--classnames", metavar="FILE", help="one name per line, in the order of sorted folders")
    add("--templates", metavar="FILE", help="one prompt per line, with {} for the class name")
    add("--retrieval", metavar="JSON", help="retrieval on a Karpathy JSON")
    add("--images", metavar="DIR", help="folder of its images")
    add("--split", default="test", help="split of the JSON (default: test)")
    add("--traverse", metavar="IMG", nargs="+", help="captions on the paths of images to the root")
    add("--captions", metavar="FILE", help="candidate captions for --traverse, one per line")
    add("--min_radius", metavar="K", type=float, help="K of the cones of --traverse; 0: no cones; "
        "default: K of the training, or 0.1 for third-party checkpoints")
    add("--json", metavar="FILE", help="write all results to this file")
    add("--device", help="default: cuda, else mps, else cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of the towers")
    add("--batch_size", type=int, default=64)
    add("--workers", type=int, default=data.cores(), help="processes that load images")
    args = parser.parse_args(argv)
    for name, other in NEEDS.items():
        if getattr(args, name) is not None and not getattr(args, other):
            parser.error(f"--{name} needs --{other}")
    if args.val_data and (args.retrieval or args.classification):
        parser.error("--val_data is a separate task; remove --retrieval and --classification")
    if args.batch_size < 1 or args.workers < 0 or not 0 <= (args.min_radius or 0) < math.inf:
        parser.error("--batch_size must be at least 1, --workers and --min_radius at least 0")
    if args.json and (os.path.isdir(args.json) or not Path(args.json).absolute().parent.is_dir()):
        parser.error(f"--json {args.json} is a folder, or in a folder that does not exist")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parser.error("one process evaluates; start it without torchrun")
    return args

def run(args):
    loading = {"batch_size": args.batch_size, "workers": args.workers}
    model, results = load_model(args.checkpoint).to(pick_device(args.device)), {}
    if args.classification:
        task = class_folders(args.classification, args.classnames, args.templates)
        results["zero_shot"] = zero_shot(model, *task, **loading)
    if args.retrieval:
        task = karpathy_split(args.retrieval, args.images, args.split)
        results["retrieval"] = retrieval(model, task, **loading)
    if args.traverse:
        task = args.traverse, data.read_lines(args.captions), args.min_radius
        results["traversal"] = traversal(model, *task, **loading)
    if args.val_data or not results:
        source = args.val_data or held_out_source(model.train_config)
        if source is None:
            raise ValueError(f"{args.checkpoint} names no held-out data; add --val_data SOURCE, "
                             "--retrieval JSON --images DIR or --classification DIR")
        results |= evaluate(model, data.open_source(source).held_out(), **loading)
    if args.json:  # first, because printing may fail
        recalls = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")
        nothing = {"zero_shot": dict.fromkeys(("top1", "top5", "classes")),
                   "retrieval": dict.fromkeys(recalls)}  # null for tasks that did not run
        Path(args.json).write_text(json.dumps(nothing | results, indent=1) + "\n")
    print0(f"images: shorter side resized to {model.config.image_size}, centre crop; towers in "
           f"{args.dtype}; ties count against us")
    print_results(results)

def main():
    args = parse_args()
    try:
        device = pick_device(args.device).type
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            run(args)
    except (ValueError, OSError, data.LoadingError) as error:  # errors the user can fix
        end(f"evaluate.py: {error}")

if __name__ == "__main__":
    main()
