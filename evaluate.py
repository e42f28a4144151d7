"""Zero-shot classification, retrieval, and the way from a picture to the root.

    python evaluate.py out/ckpt.pt                                # held-out data of its training
    python evaluate.py ckpt.pt --classification imagenet/val --classnames names.txt
    python evaluate.py ckpt.pt --retrieval dataset_coco.json --images coco --split test
    python evaluate.py out/ckpt.pt --traverse photo.jpg --captions captions.txt
    python evaluate.py out/ckpt.pt --query "a red circle" --images photos

Ties count against the model: a right answer that is as similar as k wrong ones ranks below all of
them. So a model that gives everything the same embedding scores 0 and not 100 %.

Axes: N pictures, M captions or classes, S steps, L levels of generality, D embedding width.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see train.py

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

import data
from model import load_model, rank, world_size

PROMPTS = ["a photo of a {}.", "a picture of a {}.", "a close-up photo of a {}.",
           "a good photo of the {}.", "a drawing of a {}."]  # fmt: skip
RECALLS = [[f"{way}_r{k}" for k in (1, 5, 10)] for way in ("i2t", "t2i")]
STEPS = 50  # on the way to the root, as in MERU

# ------------------------------------------------------------------------------------------------
# embeddings: of several processes each embeds a part, and all get all


class Pictures(Dataset):
    """Items (what `data.load_item` takes) -> uint8 (3, size, size), could it be read?"""

    def __init__(self, items, size):
        self.items, self.size = items, size

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        try:
            return data.load_item(self.items[i], self.size), True
        except Exception:  # Pillow raises nearly anything on damaged files
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), False


def gather_rows(rows, what):
    """Of W processes the r-th has embedded rows r, r + W, r + 2 W, ... and has zeros in the others
    -> the rows of all. Raises ValueError for NaN: sorted by similarity, it would look best."""
    if world_size() > 1:
        dist.all_reduce(rows)  # adds them up
    bad = int((~rows.isfinite()).any(1).sum())
    if bad:
        raise ValueError(f"{bad} of {len(rows)} {what} embeddings are not finite")
    return rows


@torch.no_grad()
def embed_images(model, items, batch_size=64, workers=0):
    """Items -> embeddings (N, D) of those that can be read, and their N indices."""
    pictures = Pictures(items[rank() :: world_size()], model.config.image_size)
    # one column more than embeddings have: could the picture be read?
    rows = model.logit_scale.new_zeros(len(items), model.config.embed_dim + 1)
    blocks = rows[rank() :: world_size()].split(batch_size)
    loaded = data.load(pictures, batch_size=batch_size, num_workers=workers)
    for (images, readable), block in zip(loaded, blocks):
        block[:, :-1] = model.encode_image(images.to(rows.device))
        block[:, -1] = readable
    rows = gather_rows(rows, "image")
    kept = rows[:, -1].nonzero().squeeze(1).tolist()
    if not kept:
        raise ValueError(f"none of {len(items)} pictures can be read, the first is {items[0]}")
    return rows[kept, :-1], kept


@torch.no_grad()
def embed_texts(model, texts, batch_size=64):
    """M strings -> embeddings (M, D)."""
    c = model.config
    if data.vocab_size(c.tokenizer) != c.vocab_size:
        raise ValueError(f"the model has {c.vocab_size:,} tokens; which --tokenizer has as many?")
    rows = model.logit_scale.new_zeros(len(texts), c.embed_dim)
    mine, blocks = texts[rank() :: world_size()], rows[rank() :: world_size()].split(batch_size)
    for start, block in zip(range(0, len(mine), batch_size), blocks):
        tokens = data.tokenize(mine[start : start + batch_size], c.tokenizer, c.context_length)
        block.copy_(model.encode_text(tokens.to(rows.device)))
    return gather_rows(rows, "text")


def embed_classes(model, names, templates):
    """A class is the mean of its prompts (M, D), as the authors have it. On the sphere that mean,
    shorter than 1, is normalised again."""
    prompts = [template.replace("{}", name) for template in templates for name in names]
    prompts = embed_texts(model, prompts).unflatten(0, (len(templates), len(names)))
    return model.geometry.project(prompts.mean(0))


# ------------------------------------------------------------------------------------------------
# metrics: fractions of 1, None where undefined


@torch.no_grad()
def wrong_before_right(similarity, queries, candidates, is_match, block=1024):
    """How many wrong candidates are at least as similar as the best right one, per query.

    queries (N, D), candidates (M, D), is_match(i, j) on broadcast indices -> int64 (N,), 0 is best.
    """
    counts, columns = [], torch.arange(len(candidates), device=queries.device)
    for rows in torch.arange(len(queries), device=queries.device).split(block):
        similarities = similarity(queries[rows], candidates)  # (block, M)
        match = is_match(rows[:, None], columns)
        best = similarities.masked_fill(~match, -math.inf).amax(1, keepdim=True)
        counts.append(((similarities >= best) & ~match).sum(1))
    return torch.cat(counts).cpu()


def recall_at_k(wrong, k, candidates):
    """Fraction of queries with a right answer among the first k; None if there are fewer than k."""
    return (wrong < k).double().mean().item() if k <= candidates else None


def zero_shot_metrics(similarity, images, classes, labels):
    """images (N, D), classes (M, D), labels int64 (N,) -> dict."""
    M, labels = len(classes), labels.to(images.device)
    if int(labels.min()) < 0 or int(labels.max()) >= M:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}, of {M} classes")
    wrong = wrong_before_right(similarity, images, classes, lambda i, j: labels[i] == j)
    per_class = [recall_at_k(wrong[labels.cpu() == c], 1, M) for c in labels.unique().cpu()]
    chance = {"top1": 1 / M, "top5": 5 / M if M >= 5 else None, "mean_per_class_recall": 1 / M}
    return {"top1": recall_at_k(wrong, 1, M), "top5": recall_at_k(wrong, 5, M), "classes": M,
            "mean_per_class_recall": sum(per_class) / len(per_class), "chance": chance}  # fmt: skip


def retrieval_metrics(similarity, images, texts, image_of_caption):
    """images (N, D), texts (M, D), image_of_caption int64 (M,), any number per image -> dict.

    i2t_r1, ...: of the images with captions, those with any of them among the first k texts.
    t2i_r1, ...: of the texts, those with their image among the first k. mean_r1: of both."""
    N, M, image_of = len(images), len(texts), image_of_caption.to(images.device)
    i2t = wrong_before_right(similarity, images, texts, lambda i, j: image_of[j] == i)
    t2i = wrong_before_right(similarity, texts, images, lambda i, j: image_of[i] == j)
    captions = torch.bincount(image_of.cpu(), minlength=N)  # how many each image has
    i2t, captions = i2t[captions > 0], captions[captions > 0].tolist()
    out, chance = {}, {}
    for k in (1, 5, 10):
        out[f"i2t_r{k}"], out[f"t2i_r{k}"] = recall_at_k(i2t, k, M), recall_at_k(t2i, k, N)
        # of all choices of k texts, the fraction without one of the image's n
        missed = [math.comb(M - n, k) / max(1, math.comb(M, k)) for n in captions]
        chance[f"i2t_r{k}"] = 1 - sum(missed) / len(missed) if k <= M else None
        chance[f"t2i_r{k}"] = k / N if k <= N else None
    return out | {"mean_r1": (out["i2t_r1"] + out["t2i_r1"]) / 2, "chance": chance}


# ------------------------------------------------------------------------------------------------
# tasks: metrics of a model, and a sentence that says how they came about


def protocol(model, what, items, kept, left_out=()):
    """How the figures came about, in a sentence."""
    left_out = Counter(left_out) + Counter(unreadable=len(items) - len(kept))
    missing = ", ".join(f"{n} {why}" for why, n in left_out.items())
    ranked = f"{what}, ranked by {model.config.geometry}/{model.config.logit}"
    return {"protocol": ranked + (f"; left out: {missing}" if missing else "")}


def zero_shot(model, items, labels, names, templates, **loading):
    images, kept = embed_images(model, items, **loading)
    classes = embed_classes(model, names, templates)
    metrics = zero_shot_metrics(model.similarity, images, classes, torch.tensor(labels)[kept])
    what = f"{len(kept)} pictures, {len(names)} classes, mean of {len(templates)} prompts"
    return metrics | protocol(model, what, items, kept)


def retrieval(model, items, captions, image_of_caption, left_out=(), **loading):
    images, kept = embed_images(model, items, **loading)
    row = {item: i for i, item in enumerate(kept)}
    pairs = [(caption, row[i]) for caption, i in zip(captions, image_of_caption) if i in row]
    if not pairs:
        raise ValueError("no picture that can be read has a caption")
    texts, image_of = zip(*pairs)
    embeddings = embed_texts(model, texts)
    metrics = retrieval_metrics(model.similarity, images, embeddings, torch.tensor(image_of))
    what = f"{len(kept)} pictures, {len(texts)} captions, any match counts"
    return metrics | protocol(model, what, items, kept, left_out)


def held_out_source(train_config):
    """The flags of a training -> the data source that it is evaluated on, or None."""
    shapes = "shapes" if train_config.get("data") == "shapes" else None
    return train_config.get("val_data") or shapes


def held_out(model, source, pairs, **loading):
    """Held-out data (a source, and its `data.held_out_pairs`) -> results by task."""
    results = {"retrieval": retrieval(model, *pairs, **loading)}
    if source == "shapes":
        scenes = data.held_out_scenes()[: data.HELD_OUT]
        labels = [first % len(data.SHAPE_CLASSES) for first, _, _ in scenes]  # see OBJECTS
        task = range(data.HELD_OUT), labels, data.SHAPE_CLASSES, data.SHAPE_TEMPLATES
        results["zero_shot"] = zero_shot(model, *task, **loading)
    return results


# ------------------------------------------------------------------------------------------------
# hierarchy: on the way from a picture to the root, captions should turn from specific to general


def last_min_radius(model):
    """K of the cones at the end of the training; None if it was trained without cones. Files of
    others do not say: then the authors' 0.1."""
    c = model.train_config
    if not model.geometry.cones or c.get("entailment_weight", 1) == 0:
        return None
    first, last = c.get("min_radius", 0.1), c.get("final_min_radius")
    return first if last is None else last


@torch.no_grad()
def traverse(model, images, texts, min_radius=None):
    """Captions on the straight way from each image (N, D) to the root.

    -> for each image [(step, text)]: each text that is nearest somewhere, and the first of S steps
    where it is. Text M is the root: always a candidate, and it wins ties. With a min_radius other
    texts (M, D) are candidates only where their cone holds the point. Source: MERU; EuCLIP, Figures
    3 and 5.
    """
    geometry, curv, found = model.geometry, model.scalars()[1], []
    root = geometry.root(torch.cat([images, texts]))
    for path in geometry.path_to_root(images, STEPS, root).unbind(1):  # (S, D)
        similarity = model.similarity(path, texts)  # (S, M)
        if min_radius is not None:
            for step, point in enumerate(path):
                outside = geometry.entailment_loss(texts, point, min_radius, curv)  # (M,)
                similarity[step, outside > 0] = -math.inf
        best, nearest = similarity.max(1)
        nearest[model.similarity(path, path[-1:])[:, 0] >= best] = len(texts)
        way = nearest.tolist()
        found.append([(way.index(text), text) for text in dict.fromkeys(way)])
    return found


def embed_hierarchy(model, **loading):
    """Held-out shapes -> pictures (N, D), their captions of L levels (L, N, D), general first."""
    N = data.HELD_OUT
    images, _ = embed_images(model, range(N, 2 * N), **loading)
    levels = zip(*data.held_out_levels())  # L times N captions
    return images, torch.stack([embed_texts(model, captions) for captions in levels])


@torch.no_grad()
def hierarchy_metrics(model, images, texts):
    """Pictures (N, D), captions of L levels (L, N, D), general first -> dict of

    text_radius, image_radius   mean distance from the root, of each level; of the pictures
    general_nearer              how often a caption is nearer the root than the next level's of the
                                same picture: chance is 0.5
    own_in_cone, other_in_cone  how often a caption's cone holds its own picture, and another one,
                                of each level ("a shape" is true of both); None without cones
    """
    geometry = model.geometry
    root = geometry.root(torch.cat([images, texts.flatten(0, 1)]))
    radius = geometry.distance_to_root(texts, root)  # (L, N)
    out = {"text_radius": radius.mean(1).tolist(),
           "image_radius": geometry.distance_to_root(images, root).mean().item(),
           "general_nearer": (radius[:-1] < radius[1:]).float().mean().item(),
           "own_in_cone": None, "other_in_cone": None}  # fmt: skip
    if geometry.cones:
        K = last_min_radius(model)
        K = model.train_config.get("min_radius", 0.1) if K is None else K
        others = images.roll(len(images) // 2, 0)
        for name, points in (("own_in_cone", images), ("other_in_cone", others)):
            outside = geometry.entailment_loss(texts, points, K, model.scalars()[1])  # (L, N)
            out[name] = (outside == 0).float().mean(1).tolist()
    return out


def traversal(model, pictures, captions, min_radius=None, **loading):
    """min_radius K of the cones; 0: without cones; None: as in the training."""
    texts = list(dict.fromkeys(data.read_lines(captions)))
    K = last_min_radius(model) if min_radius is None else min_radius or None
    if not texts:
        raise ValueError(f"{captions} has no captions")
    images, kept = embed_images(model, pictures, **loading)
    found = traverse(model, images, embed_texts(model, texts), K)
    among = "" if K is None else f" whose cone holds the point (K = {K:g})"
    root = model.geometry.root_name
    what = f"{STEPS} steps to the root ({root}), nearest of {len(texts)} captions{among}"
    texts.append("[ROOT]")
    retrieved = {}
    for i, path in zip(kept, found):
        retrieved[pictures[i]] = [(step / (STEPS - 1), texts[text]) for step, text in path]
    return {"retrieved": retrieved} | protocol(model, what, pictures, kept)


def search(model, query, folder, count=10, **loading):
    items, _ = data.list_pictures(folder)
    if not items:
        raise ValueError(f"no pictures in {folder}")
    images, kept = embed_images(model, items, **loading)
    with torch.no_grad():
        similarity = model.similarity(embed_texts(model, [query]), images)[0]
    best, nearest = similarity.topk(min(count, len(kept)))
    found = [(items[kept[i]], s) for i, s in zip(nearest.tolist(), best.tolist())]
    return {"nearest": found} | protocol(model, f"{query!r} in {len(kept)} pictures", items, kept)


# ------------------------------------------------------------------------------------------------
# files of tasks. What does not fit together is refused with a ValueError


def class_folders(folder, classnames=None, templates=None):
    """A folder of class folders -> pictures, labels, names, templates; sorted folders = labels."""
    folders = sorted(p for p in Path(folder).iterdir() if p.is_dir() and not data.is_hidden(p.name))
    names = [p.name.replace("_", " ") for p in folders]
    if classnames:
        names = data.read_lines(classnames)
    templates = data.read_lines(templates) if templates else PROMPTS
    if not folders:
        raise ValueError(f"no class folders in {folder}")
    if len(names) != len(folders):
        raise ValueError(f"{len(names)} names of {classnames}, {len(folders)} folders in {folder}")
    if not templates or not all("{}" in template for template in templates):
        raise ValueError("there must be templates, each with a {} for the class name")
    items, labels = [], []
    for label, path in enumerate(folders):
        pictures, _ = data.list_pictures(path)
        if not pictures:
            raise ValueError(f"no pictures in class folder {path}")
        items += pictures
        labels += [label] * len(pictures)
    for i in sorted({0, len(folders) - 1}):
        print(f"class folder {folders[i].name} is {names[i]!r}")
    return items, labels, names, templates


def karpathy_split(path, folder, split):
    """Karpathy JSON -> pictures of a split, captions, index of the picture of each caption."""
    items, captions, image_of_caption, splits = [], [], [], Counter()
    entry = None
    try:
        for entry in json.loads(data.read_text(path))["images"]:
            splits[entry["split"]] += 1
            if entry["split"] == split:
                nested = os.path.join(folder, entry.get("filepath") or "", entry["filename"])
                flat = os.path.join(folder, entry["filename"])
                texts = [s["raw"] for s in entry["sentences"] if s["raw"].strip()]
                captions += texts
                image_of_caption += [len(items)] * len(texts)
                items.append(nested if os.path.exists(nested) else flat)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no Karpathy JSON: images with split, filename, sentences with "
                         f"raw captions; last: {json.dumps(entry)[:200]}") from None  # fmt: skip
    missing = [item for item in items if not os.path.exists(item)]
    if missing:
        raise ValueError(f"{len(missing)} of {len(items)} pictures are not there: {missing[0]}")
    if not captions:
        raise ValueError(f"{path} has no captions of split {split!r}, only {dict(splits)}")
    return items, captions, image_of_caption


# ------------------------------------------------------------------------------------------------
# the command


def print_row(title, values):
    cells = ("       -" if v is None else f"{100 * v:8.1f}" for v in values)
    print(f"  {title:17}", *cells, sep="")


def print_results(results):
    for task, heads, rows in (
        ("zero_shot", "   top-1   top-5   per class",
         [("accuracy %", ["top1", "top5", "mean_per_class_recall"])]),
        ("retrieval", "     R@1     R@5    R@10",
         [("image to text %", RECALLS[0]), ("text to image %", RECALLS[1])]),
    ):  # fmt: skip
        if r := results.get(task):
            print(f"{task}: {r['protocol']}\n{'':19}{heads}")
            for title, names in rows:
                print_row(title, [r[name] for name in names])
                print_row("chance %", [r["chance"][name] for name in names])
    if h := results.get("hierarchy"):
        nearer = f"{100 * h['general_nearer']:.1f} % nearer than the next level (chance 50)"
        print(f"hierarchy: captions of {len(data.LEVELS)} levels, {nearer}\n"
              f"{'':50}from root  cone holds own, other picture %")  # fmt: skip
        nothing = [None] * len(data.LEVELS)
        columns = h["text_radius"], h["own_in_cone"] or nothing, h["other_in_cone"] or nothing
        for level, radius, *cones in zip(data.LEVELS, *columns):
            print_row(f"{level:48}{radius:11.2f}", cones)
        print(f"  {'pictures':48}{h['image_radius']:11.2f}")
    if t := results.get("traversal"):
        print(f"traversal: {t['protocol']}")
        for picture, path in t["retrieved"].items():
            print(picture, *(f"  {walked:4.0%}  {caption}" for walked, caption in path), sep="\n")
    if q := results.get("query"):
        print(f"query: {q['protocol']}")
        print(*(f"{similarity:10.3f}  {path}" for path, similarity in q["nearest"]), sep="\n")


def pick_device(name=None):
    """A name, or the best there is -> torch.device. Raises ValueError for one that is not there."""
    other = "mps" if torch.backends.mps.is_available() else "cpu"
    name = name or ("cuda" if torch.cuda.is_available() else other)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


OVERRIDES = {"geometry": str, "logit": str, "tokenizer": str, "quick_gelu": bool,
             "vision_heads": int, "text_heads": int}  # of load_model  # fmt: skip
NEEDS = {"classnames": ["classification"], "templates": ["classification"],
         "captions": ["traverse"], "traverse": ["captions"], "min_radius": ["traverse"],
         "retrieval": ["images"], "query": ["images"],
         "images": ["retrieval", "query"]}  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", help="ours, or one that open_clip trained")
    add("--val_data", metavar="SOURCE", help="retrieval on a source of data.py (default: its own)")
    add("--classification", metavar="DIR", help="zero-shot on a folder of class folders")
    add("--classnames", metavar="FILE", help="a name a line, in the order of the sorted folders")
    add("--templates", metavar="FILE", help="a prompt a line, {} for the class name")
    add("--retrieval", metavar="JSON", help="retrieval on a Karpathy JSON")
    add("--images", metavar="DIR", help="where its pictures are; the folder that --query searches")
    add("--split", default="test", help="of the JSON")
    add("--traverse", metavar="IMG", nargs="+", help="the captions on their way to the root")
    add("--captions", metavar="FILE", help="the captions to choose from, one a line")
    add("--min_radius", metavar="K", type=float, help="of the cones of --traverse; 0: all are "
        "candidates; default: as in the training, for files of others 0.1")  # fmt: skip
    add("--query", metavar="TEXT", help="the nearest pictures of --images")
    add("--json", metavar="FILE", help="write all results there")
    for name, kind in OVERRIDES.items():
        how = {"action": "store_true", "default": None} if kind is bool else {"type": kind}
        add(f"--{name}", help="for checkpoints of others, which do not say", **how)
    add("--device", help="default: cuda, else mps, else cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the towers")
    add("--batch_size", type=int, default=64)
    add("--workers", type=int, default=data.cores(), help="loading processes")
    args = parser.parse_args(argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parser.error("one process evaluates: start it without torchrun")
    for name, others in NEEDS.items():
        if getattr(args, name) is not None and not any(getattr(args, other) for other in others):
            parser.error(f"--{name} needs --{' or --'.join(others)}")
    if args.batch_size < 1 or not 0 <= (args.min_radius or 0) < math.inf:
        parser.error("--batch_size must be at least 1, --min_radius finite and at least 0")
    if args.val_data and (args.retrieval or args.classification):
        parser.error("--val_data is a task of its own: leave --retrieval, --classification out")
    return args


def run(args):
    overrides = {name: getattr(args, name) for name in OVERRIDES}
    loading = {"batch_size": args.batch_size, "workers": args.workers}
    model, results = load_model(args.checkpoint, **overrides).to(pick_device(args.device)), {}
    if args.classification:
        task = class_folders(args.classification, args.classnames, args.templates)
        results["zero_shot"] = zero_shot(model, *task, **loading)
    if args.retrieval:
        task = karpathy_split(args.retrieval, args.images, args.split)
        results["retrieval"] = retrieval(model, *task, **loading)
    if args.traverse:
        task = args.traverse, args.captions, args.min_radius
        results["traversal"] = traversal(model, *task, **loading)
    if args.query:
        results["query"] = search(model, args.query, args.images, **loading)
    if args.val_data or not results:
        source = args.val_data or held_out_source(model.train_config)
        if source is None:
            raise ValueError(f"{args.checkpoint} names no held-out data: give --val_data SOURCE, "
                             "--retrieval JSON --images DIR or --classification DIR")  # fmt: skip
        results |= held_out(model, source, data.held_out_pairs(source), **loading)
        if source == "shapes":
            results["hierarchy"] = hierarchy_metrics(model, *embed_hierarchy(model, **loading))
    print(f"photos: shorter side to {model.config.image_size}, centre crop; towers in "
          f"{args.dtype}, similarities in float32, ties count against the model")  # fmt: skip
    print_results(results)
    if args.json:
        nothing = {"zero_shot": dict.fromkeys(("top1", "top5", "classes")),
                   "retrieval": dict.fromkeys(sum(RECALLS, []))}  # tasks not run  # fmt: skip
        Path(args.json).write_text(json.dumps(nothing | results, indent=1) + "\n")


def main():
    args = parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        device = pick_device(args.device).type
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            run(args)
    except (ValueError, OSError, data.LoadingError) as error:  # what a user can mend
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
