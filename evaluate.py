"""What a model is worth on pictures it has never seen: zero-shot classification and retrieval.

    python evaluate.py out/ckpt.pt                                               # on the held-out data of its training
    python evaluate.py ckpt.pt --classification imagenet/val --classnames names.txt
    python evaluate.py ckpt.pt --retrieval dataset_coco.json --images coco --split test
    python evaluate.py out/ckpt.pt --traverse photo.jpg --captions captions.txt  # from the specific to the general, down to the root
    python evaluate.py out/ckpt.pt --query "a red circle" --images photos        # search a folder in your own words

The measures are pure functions of embeddings. Ties count against us: a right answer that shares its similarity with k wrong ones ranks
below all of them, so a model that gives everybody the same embedding scores 0 and not 100 %. Similarities are the training's own, in
float32, a block of rows at a time.

Axes: N pictures, M captions or classes, P prompts, S steps, D embedding width.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import data
import geometry as geo
from model import load_model, read_checkpoint

BLOCK = 1024   # rows of a similarity matrix that exist at once
CONES = 64     # of these, whose pairs need D numbers each
STEPS = 50     # from a picture to the root, as in MERU


# ---------------------------------------------------------------------------------------------------------------------------------
# measures

def check_finite(**embeddings):
    for name, x in embeddings.items():
        if not torch.isfinite(x).all():
            raise ValueError(f"{int((~torch.isfinite(x)).any(1).sum())} of {len(x)} {name} embeddings are not finite; no ranking is possible")


def ranks(similarity, queries, candidates, is_match):
    """How many wrong candidates are at least as close as the best right one, per query: 0 = right at once.

    queries (N, D), candidates (M, D), is_match(i, j) on broadcast index tensors -> bool -> int64 (N,). NaN in, ValueError out.
    """
    check_finite(query=queries, candidate=candidates)
    numbers, found = torch.arange(len(candidates), device=queries.device), []
    for start in range(0, len(queries), BLOCK):
        block = similarity(queries[start:start + BLOCK], candidates)                                # (block, M)
        match = is_match(torch.arange(start, start + len(block), device=queries.device)[:, None], numbers)
        best = block.masked_fill(~match, -math.inf).amax(1, keepdim=True)
        found.append(((block >= best) & ~match).sum(1))
    return torch.cat(found).cpu()


def share_within(ranks, k, candidates):
    """Share of queries whose right answer is among the first k -> float, or None where k is no real choice among so few candidates."""
    return (ranks < k).double().mean().item() if k <= candidates and len(ranks) else None


def zero_shot_metrics(similarity, images, classes, labels):
    """images (N, D), classes (M, D), labels int64 (N,) -> dict: top1, top5 (None below five classes), classes, mean_per_class_recall,
    per_class. Chance is 1/M and 5/M."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise ValueError(f"labels run from {int(labels.min())} to {int(labels.max())}, but there are {len(classes)} classes")
    labels = labels.to(images.device)
    found = ranks(similarity, images, classes, lambda i, j: labels[i] == j)
    labels = labels.cpu()
    per_class = [share_within(found[labels == c], 1, len(classes)) for c in range(len(classes))]
    present = [r for r in per_class if r is not None]
    return dict(top1=share_within(found, 1, len(classes)), top5=share_within(found, 5, len(classes)), classes=len(classes),
                pictures=len(images), mean_per_class_recall=sum(present) / len(present), per_class=per_class)


def retrieval_metrics(similarity, images, texts, owner):
    """images (N, D), texts (M, D), owner int64 (M,): the picture each caption belongs to; any number of captions per picture.

    -> dict: i2t_r1, i2t_r5, i2t_r10 (a picture is right if any of its captions is among the first k; pictures without captions do not
    ask, but can be found), t2i_r1, ..., mean_r1 (DataComp's figure), and the chance level of each under `chance`.
    """
    N, M = len(images), len(texts)
    owner = owner.to(images.device)
    i2t = ranks(similarity, images, texts, lambda i, j: owner[j] == i)
    t2i = ranks(similarity, texts, images, lambda i, j: owner[i] == j)
    captions = torch.bincount(owner.cpu(), minlength=N)
    i2t, asked = i2t[captions > 0], Counter(captions[captions > 0].tolist())
    out, chance = {}, {}
    for k in (1, 5, 10):
        out[f"i2t_r{k}"], out[f"t2i_r{k}"] = share_within(i2t, k, M), share_within(t2i, k, N)
        chance[f"t2i_r{k}"] = min(1, k / N)   # i2t: 1 - the chance that k captions drawn without return are all somebody else's
        missed = {c: math.prod(max(0, M - c - i) / max(1, M - i) for i in range(k)) for c in asked}
        chance[f"i2t_r{k}"] = sum(n * (1 - missed[c]) for c, n in asked.items()) / max(1, len(i2t))
    both = out["i2t_r1"], out["t2i_r1"]
    return out | dict(mean_r1=None if None in both else sum(both) / 2, pictures=N, captions=M, chance=chance)


# ---------------------------------------------------------------------------------------------------------------------------------
# embeddings of many pictures and texts

class Progress:
    """One line that counts up with the time left, on a terminal only; silent for what takes less than two seconds."""

    def __init__(self, what, total):
        self.what, self.total, self.start = what, total, time.monotonic()

    def __call__(self, done):
        passed = time.monotonic() - self.start
        if sys.stderr.isatty() and passed > 2:
            left = passed / done * (self.total - done)
            print(f"\r{self.what} {done:,}/{self.total:,}, {left:.0f} s left ", end="" if done < self.total else "\n", file=sys.stderr, flush=True)


@contextlib.contextmanager
def evaluating(model, dtype=None):
    """Eval mode, no gradients, autocast where asked; the model is left as it was found."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            yield device
    finally:
        model.train(was_training)


def encode_pictures(model, items, batch_size=64, workers=0, dtype=None, unreadable=None):
    """items: paths, bytes, or numbers of held-out shapes -> embeddings (N, D), in order, on the model's device. Raises ValueError for one
    that cannot be read; where a dict `unreadable` is given, it is left out and told there: number -> sentence."""
    progress, done = Progress("pictures", len(items)), 0
    with evaluating(model, dtype) as device:
        parts = [torch.empty(0, model.config.embed_dim, device=device)]
        for images, faults in DataLoader(data.Pictures(items, model.config.image_size), batch_size, num_workers=workers,
                                         collate_fn=data.stack_pictures, worker_init_fn=data.leave_signals_to_the_trainer):
            if faults and unreadable is None:   # left out, it would make the figure another one
                raise ValueError(next(iter(faults.values())))
            if faults:
                unreadable.update({done + i: sentence for i, sentence in faults.items()})
            if len(images):
                parts.append(model.encode_image(images.to(device)))
            done += len(images) + len(faults)
            progress(done)
    return torch.cat(parts)


def encode_texts(model, texts, batch_size=64, dtype=None):
    """texts: list of N strings -> embeddings (N, D), in order."""
    progress, parts, config = Progress("captions", len(texts)), [], model.config
    V = data.find_tokenizer(config.tokenizer)[1]
    if V != config.vocab_size:
        raise ValueError(f"tokenizer {config.tokenizer} has {V:,} tokens, the model {config.vocab_size:,}; give --tokenizer")
    with evaluating(model, dtype) as device:
        for start in range(0, len(texts), batch_size):
            tokens = data.tokenize(texts[start:start + batch_size], config.tokenizer, config.context_length)
            parts.append(model.encode_text(tokens.to(device)))
            progress(min(len(texts), start + batch_size))
    return torch.cat(parts)


def encode_classes(model, names, templates, batch_size=64, dtype=None):
    """names of M classes, P templates -> one embedding per class (M, D): the geometry's own average of its prompts."""
    prompts = encode_texts(model, [t.replace("{}", n) for t in templates for n in names], batch_size, dtype)
    return geo.average(prompts.unflatten(0, (len(templates), len(names))), model.config.geometry)


def for_texts(how):
    """Options of `encode_pictures` -> those that `encode_texts` has as well."""
    return {k: v for k, v in how.items() if k != "workers"}


def similarity_of(model):
    def function(x, y):
        with torch.no_grad():
            return model.similarity(x, y)
    return function


# ---------------------------------------------------------------------------------------------------------------------------------
# protocols: each returns its numbers and a sentence that says how they were made

PROMPTS = ["a photo of a {}.", "a picture of a {}.", "a close-up photo of a {}.", "a good photo of the {}.", "a drawing of a {}."]


def zero_shot(model, items, labels, names, templates, **how):
    images, classes = encode_pictures(model, items, **how), encode_classes(model, names, templates, **for_texts(how))
    protocol = f"{len(items)} pictures, {len(names)} classes, {model.row.average_is} of {len(templates)} prompts, ranked by {model.config.geometry}/{model.logit}"
    return zero_shot_metrics(similarity_of(model), images, classes, torch.tensor(labels)) | dict(protocol=protocol, class_names=names)


def retrieval(model, items, captions, owner, **how):
    images, texts = encode_pictures(model, items, **how), encode_texts(model, captions, **for_texts(how))
    protocol = f"{len(items)} pictures, {len(captions)} captions, any match counts, ranked by {model.config.geometry}/{model.logit}"
    return retrieval_metrics(similarity_of(model), images, texts, torch.tensor(owner)) | dict(protocol=protocol)


def held_out_source(recipe):
    """The flags of a training -> the data source that judges it, or None."""
    return recipe.get("val_data") or ("shapes" if recipe.get("data") == "shapes" else None)


def held_out(model, source, pairs=None, **how):
    """The held-out data of a source -> {"zero_shot": ..., "retrieval": ...}; zero-shot for `shapes` only. `pairs`: the data, if read already."""
    items, captions = pairs or data.held_out_pairs(source)
    results = dict(zero_shot=None, retrieval=retrieval(model, items, captions, range(len(items)), **how))
    results["retrieval"]["protocol"] += f", held out from {source}" if source == "shapes" else f", {source}"
    if source == "shapes":
        scenes = data.held_out_scenes()[:data.HELD_OUT]
        labels = [data.SHAPE_CLASSES.index(" ".join(data.KINDS[first][1:])) for first, _, _ in scenes]
        results["zero_shot"] = zero_shot(model, list(range(data.HELD_OUT)), labels, data.SHAPE_CLASSES, data.SHAPE_TEMPLATES, **how)
    return results


# ---------------------------------------------------------------------------------------------------------------------------------
# the hierarchy: on the way from a picture to the root, captions turn from specific to general

def last_min_radius(recipe):
    """The K that a training was to end with; of a foreign checkpoint the default."""
    last = recipe.get("final_min_radius")
    return recipe.get("min_radius", 0.1) if last is None else last


def uses_cones(model):
    """Was it trained with an entailment loss? Of a foreign checkpoint with cones this is taken to be so."""
    return model.row.cone is not None and model.recipe.get("entailment_weight", 1) > 0


@torch.no_grad()
def traverse(model, images, texts, cones):
    """The captions retrieved on straight paths from pictures to the root.

    images (N, D), texts (M, D) embeddings -> for each picture [(step, text)]: at each of S steps the nearest text, listed at the step where
    it first appears; M stands for the root, a candidate everywhere, which wins ties. cones: only texts whose cone holds the point are
    candidates. clip: the root is the mean of the embeddings given. Source: MERU (50 steps, with cones); EuCLIP, Figures 3 and 5.
    """
    check_finite(picture=images, text=texts)
    geometry, K, found = model.config.geometry, last_min_radius(model.recipe), []
    root = model.row.root(torch.cat([images, texts]))
    for path in geo.path_to_root(images, STEPS, geometry, root).unbind(1):            # (S, D)
        near = model.similarity(path, texts)                                          # (S, M)
        for start in range(0, len(texts) if cones else 0, CONES):   # a block of texts at a time: each needs (S, block, D)
            some = texts[start:start + CONES]
            outside = geo.entailment_loss(some, path[:, None], geometry, K, model.curvature())
            near[:, start:start + len(some)].masked_fill_(outside > 0, -math.inf)
        best, nearest = near.max(1)
        nearest[model.similarity(path, path[-1:])[:, 0] >= best] = len(texts)         # every path ends at the root
        first = {}
        for step, text in enumerate(nearest.tolist()):
            first.setdefault(text, step)
        found.append([(step, text) for text, step in first.items()])
    return found


def traversal(model, pictures, captions, **how):
    """Paths of pictures, a file with a caption a line -> dict: retrieved {picture: [(share of the path walked, caption)]}, protocol."""
    texts = list(dict.fromkeys(read_lines(captions)))
    if not texts:
        raise ValueError(f"{captions} has no captions")
    cones = uses_cones(model)
    found = traverse(model, encode_pictures(model, pictures, **how), encode_texts(model, texts, **for_texts(how)), cones)
    among = f" whose cone holds the point (K = {last_min_radius(model.recipe):g})" if cones else ""
    protocol = f"{STEPS} steps to the root ({model.row.root_is}), nearest of {len(texts)} captions{among}, by {model.config.geometry}/{model.logit}"
    texts.append("[ROOT]")
    return dict(protocol=protocol, retrieved={picture: [(step / (STEPS - 1), texts[text]) for step, text in path]
                                              for picture, path in zip(pictures, found)})


def share(hits):
    return sum(hits) / len(hits) if hits else None


def retrieved_figures(found, level):
    """What `traverse` found, the level of each text (0 = the most general) -> dict: see `hierarchy_metrics`."""
    paths = [[level[text] for _, text in path if text in level] for path in found]   # without the root
    changes = [b - a for path in paths for a, b in zip(path, path[1:])]
    return dict(captions=sum(map(len, paths)) / len(paths), changes=len(changes),
                to_general=share([c < 0 for c in changes]), to_specific=share([c > 0 for c in changes]))


@torch.no_grad()
def hierarchy_metrics(model, images, texts, chains):
    """Does the geometry know what is general and what is specific?

    images (N, D); texts (M, D); chains (N, L): captions of each picture, from the most general to the most specific, as indices into texts.
    -> dict:
    text_radius, image_radius   mean distance from the root of the most specific captions, of the pictures
    general_nearer, pairs       share of the distinct (general, specific) pairs in which the general one is nearer the root (chance: half);
                                how many there are
    own_in_cone, other_in_cone  share of all those captions whose cone holds their picture, the picture half the set away (captions that both
                                pictures share are left out there); None without cones
    traversal, traversal_in_cones   of `traverse` without and with cones (None where the model was not trained with them): captions (mean
                                number of distinct ones), changes from caption to caption, to_general, to_specific (shares of these that
                                lead up, down the levels; the rest stay on one; None where nothing changes)
    """
    geometry, K = model.config.geometry, last_min_radius(model.recipe)
    root, own = model.row.root(torch.cat([images, texts])), [chain[-1] for chain in chains]
    radius = geo.distance_to_root(texts, geometry, root).cpu()   # compared one by one below
    pairs = {pair for chain in chains for pair in itertools.combinations(chain, 2)}
    out = dict(text_radius=radius[own].mean().item(), image_radius=geo.distance_to_root(images, geometry, root).mean().item(),
               general_nearer=share([bool(radius[general] < radius[specific]) for general, specific in pairs]), pairs=len(pairs),
               own_in_cone=None, other_in_cone=None, traversal_in_cones=None)
    if model.row.cone:
        half, apexes = len(images) // 2, texts[torch.tensor(chains)]   # (N, L, D)
        inside = lambda shown: (geo.entailment_loss(apexes, shown[:, None], geometry, K, model.curvature()) == 0).tolist()
        out["own_in_cone"] = share([hit for row in inside(images) for hit in row])
        out["other_in_cone"] = share([hit for row, chain, other in zip(inside(images.roll(-half, 0)), chains, chains[half:] + chains[:half])
                                      for hit, text in zip(row, chain) if text not in other])
    level = {text: depth for chain in chains for depth, text in enumerate(chain)}
    out["traversal"] = retrieved_figures(traverse(model, images, texts, cones=False), level)
    if uses_cones(model):
        out["traversal_in_cones"] = retrieved_figures(traverse(model, images, texts, cones=True), level)
    return out


def embed_held_out(model, source, **how):
    """Held-out data with its levels of generality, where it has some (`shapes`) -> dict: items (what `Pictures` takes), images (N, D),
    captions (M distinct ones), texts (M, D), chains (N, L): the captions of each picture, general to specific, as indices into captions."""
    items, captions = data.held_out_pairs(source)
    chains = data.held_out_levels() if source == "shapes" else [[caption] for caption in captions]
    place = {caption: i for i, caption in enumerate(dict.fromkeys(caption for chain in chains for caption in chain))}
    return dict(items=items, images=encode_pictures(model, items, **how), captions=list(place),
                texts=encode_texts(model, list(place), **for_texts(how)), chains=[[place[caption] for caption in chain] for chain in chains])


def shapes_hierarchy(model, **how):
    """`hierarchy_metrics` of the held-out pictures of `shapes`, which are a hierarchy by construction."""
    held = embed_held_out(model, "shapes", **how)
    protocol = f"{len(held['images'])} pictures, {len(held['captions'])} captions of {len(data.LEVELS)} levels; {STEPS} steps to the root"
    protocol += f" ({model.row.root_is})" + (f"; K = {last_min_radius(model.recipe):g}" if model.row.cone else "")
    return hierarchy_metrics(model, held["images"], held["texts"], held["chains"]) | dict(protocol=protocol)


# ---------------------------------------------------------------------------------------------------------------------------------
# search

def folder_embeddings(model, checkpoint, folder, **how):
    """Pictures of a folder -> their paths, embeddings (N, D). They are kept beside the folder, in FOLDER.embeddings, for this checkpoint:
    the next time only pictures that are new or have changed are read. One that cannot be read is left out with a warning."""
    folder = Path(folder).resolve()
    stamp = lambda path: [path.stat().st_size, path.stat().st_mtime_ns]
    stamps = {str(p): stamp(p) for p in sorted(folder.rglob("*")) if p.suffix.lower() in data.PICTURES and p.is_file()}
    if not stamps:
        raise ValueError(f"no pictures in {folder}" if folder.is_dir() else f"no folder {folder}")
    kept, known = folder.with_name(folder.name + ".embeddings"), {}
    key = [str(Path(checkpoint).resolve()), *stamp(Path(checkpoint)), str(model.config), str(how.get("dtype"))]
    with contextlib.suppress(ValueError, KeyError):   # none yet, or cut off
        before = read_checkpoint(kept)
        if before["key"] == key:
            rows = zip(before["paths"], before["stamps"], before["embeddings"])
            known = {path: row for path, then, row in rows if stamps.get(path) == then}
    missing, unreadable = [path for path in stamps if path not in known], {}
    rows = encode_pictures(model, missing, unreadable=unreadable, **how).cpu()
    known.update(zip((path for i, path in enumerate(missing) if i not in unreadable), rows))
    for sentence in unreadable.values():
        print(f"warning: {sentence}", file=sys.stderr)
    paths = [path for path in stamps if path in known]
    if not paths:
        raise ValueError(f"none of the {len(stamps)} pictures in {folder} can be read")
    embeddings = torch.stack([known[path] for path in paths])
    if len(rows):
        try:
            torch.save(dict(key=key, paths=paths, stamps=[stamps[path] for path in paths], embeddings=embeddings), kept)
        except (OSError, RuntimeError) as error:   # torch.save turns some of the first into the second
            print(f"warning: the embeddings cannot be kept in {kept}: {error}", file=sys.stderr)
    return paths, embeddings.to(next(model.parameters()).device)


def search(model, checkpoint, query, folder, count=10, **how):
    """The pictures of a folder that are nearest to a text -> dict: nearest [(path, similarity)], the nearest first; query; pictures, how many."""
    paths, embeddings = folder_embeddings(model, checkpoint, folder, **how)
    text = encode_texts(model, [query], **for_texts(how))
    check_finite(text=text, picture=embeddings)
    similarity, nearest = similarity_of(model)(text, embeddings)[0].topk(min(count, len(paths)))
    return dict(query=query, pictures=len(paths), nearest=[(paths[i], s) for i, s in zip(nearest.tolist(), similarity.tolist())])


# ---------------------------------------------------------------------------------------------------------------------------------
# folders and lists on disk

def read_lines(path):
    return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def class_folder(folder, classnames=None, templates=None):
    """A folder of class folders, sorted = label order -> pictures, labels, names, templates. Raises ValueError for what does not fit."""
    folders = sorted(p for p in Path(folder).iterdir() if p.is_dir())
    names = read_lines(classnames) if classnames else [p.name.replace("_", " ") for p in folders]
    templates = read_lines(templates) if templates else PROMPTS
    if len(names) != len(folders):
        raise ValueError(f"{classnames} has {len(names)} names for {len(folders)} class folders in {folder}")
    if not templates or any("{}" not in t for t in templates):
        raise ValueError(f"every template needs a {{}} for the class name; got {templates}")
    pictures = [sorted(p for p in f.rglob("*") if p.suffix.lower() in data.PICTURES) for f in folders]
    empty = [f.name for f, found in zip(folders, pictures) if not found]
    if empty or not folders:
        raise ValueError(f"no pictures in class folder {', '.join(empty[:5])}" if empty else f"no class folders in {folder}")
    labels = [label for label, found in enumerate(pictures) for _ in found]
    return [str(p) for found in pictures for p in found], labels, names, templates


def karpathy(path, images, split):
    """Karpathy JSON -> pictures of a split, captions, the picture each caption belongs to. Raises ValueError naming what is missing."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["images"]
        return karpathy_split(entries, path, images, split)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a Karpathy JSON (images: filename, split, sentences: raw): {error}") from None


def karpathy_split(entries, path, images, split):
    chosen = [e for e in entries if e.get("split") == split]
    if not chosen:
        raise ValueError(f"{path} has no split {split!r}; it has {dict(Counter(e.get('split') for e in entries))}")
    places = [[os.path.join(images, e.get("filepath") or "", e["filename"]), os.path.join(images, e["filename"])] for e in chosen]
    items = [next(filter(os.path.exists, p), None) for p in places]
    missing = [p[0] for p, item in zip(places, items) if item is None]
    if missing:
        raise ValueError(f"{len(missing)} of {len(chosen)} pictures are not there, the first is {missing[0]}")
    captions = [(s["raw"], i) for i, e in enumerate(chosen) for s in e["sentences"]]
    if not captions:
        raise ValueError(f"split {split!r} of {path} has no captions")
    return items, [c for c, _ in captions], [i for _, i in captions]


# ---------------------------------------------------------------------------------------------------------------------------------
# the command

def table(results):
    """Results -> lines of text: every figure in per cent beside its chance level, under a sentence that says how it was made."""
    percent = lambda x: "     -" if x is None else f"{100 * x:6.1f}"
    lines = []
    if (z := results["zero_shot"]):
        lines += [f"zero-shot: {z['protocol']}", "                   top-1   top-5   per-class",
                  f"  accuracy %      {percent(z['top1'])}  {percent(z['top5'])}      {percent(z['mean_per_class_recall'])}",
                  f"  chance %        {percent(1 / z['classes'])}  {percent(5 / z['classes'] if z['classes'] >= 5 else None)}      {percent(1 / z['classes'])}"]
    if (r := results["retrieval"]):
        lines += [f"retrieval: {r['protocol']}", "                     R@1     R@5    R@10"]
        for way, title in (("i2t", "image to text %"), ("t2i", "text to image %")):
            lines.append(f"  {title} " + "  ".join(percent(r[f"{way}_r{k}"]) for k in (1, 5, 10)))
            lines.append("  chance %        " + "  ".join(percent(r["chance"][f"{way}_r{k}"]) for k in (1, 5, 10)))
    if (h := results.get("hierarchy")):
        lines += [f"hierarchy: {h['protocol']}",
                  f"  mean distance from the root            text {h['text_radius']:.2f}   image {h['image_radius']:.2f}",
                  f"  general caption nearer the root % {percent(h['general_nearer'])}   chance 50, {h['pairs']:,} pairs",
                  f"  caption's cone holds its picture %{percent(h['own_in_cone'])}   another picture {percent(h['other_in_cone'])}"]
        for name, among in (("traversal", "all"), ("traversal_in_cones", "those whose cone holds the point")):
            if (t := h[name]):
                lines.append(f"  on the way, nearest of {among}: {t['captions']:.1f} captions; of {t['changes']:,} changes to a more general one "
                             f"{percent(t['to_general']).strip()} %, to a more specific one {percent(t['to_specific']).strip()} %")
    if (t := results.get("traversal")):
        lines.append(f"traversal: {t['protocol']}")
        for picture, retrieved in t["retrieved"].items():
            lines += [picture, *(f"  {walked:4.0%}  {caption}" for walked, caption in retrieved)]
    if (q := results.get("query")):
        lines += [f"query: {q['query']!r} in {q['pictures']} pictures", *(f"  {similarity:8.3f}  {path}" for path, similarity in q["nearest"])]
    return "\n".join(lines)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", help="ours, or one that open_clip trained")
    add("--classification", metavar="DIR", help="zero-shot on a folder of class folders; sorted = label order")
    add("--classnames", metavar="FILE", help="one name a line, in the order of the sorted folders (default: the folders' names)")
    add("--templates", metavar="FILE", help="one prompt a line, {} for the class name (default: five of our own)")
    add("--retrieval", metavar="JSON", help="retrieval on a Karpathy JSON")
    add("--images", metavar="DIR", help="where its pictures lie; the folder that --query searches")
    add("--split", default="test")
    add("--val_data", metavar="SOURCE", help="retrieval on a data source of data.py (default: what its training was judged by)")
    add("--traverse", metavar="IMG", nargs="+", help="the captions on the way from each picture to the root")
    add("--captions", metavar="FILE", help="to choose them from, one a line")
    add("--query", metavar="TEXT", help="the nearest pictures of --images")
    add("--json", metavar="FILE", help="write all results there")
    for name in ("geometry", "logit", "tokenizer"):
        add(f"--{name}", help="for foreign checkpoints, which do not say")
    add("--quick_gelu", action="store_true", default=None, help="for OpenAI's own weights")
    add("--vision_heads", type=int, help="for foreign checkpoints (default: width / 64)")
    add("--text_heads", type=int)
    add("--device", help="default: cuda, else mps, else cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the towers")
    add("--batch_size", type=int, default=64)
    add("--workers", type=int, default=0)
    return parser.parse_args(argv)


def pick_device(name=None):
    """A name, or the best there is -> torch.device. Raises ValueError where the machine has none of that kind."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:   # a torch built without CUDA asserts
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def run(args):
    for name, needs in (("classnames", ["classification"]), ("templates", ["classification"]), ("images", ["retrieval", "query"]),
                        ("captions", ["traverse"])):
        if getattr(args, name) and not any(getattr(args, n) for n in needs):
            raise ValueError(f"--{name} says nothing without --{' or --'.join(needs)}")
    for name, needs in (("retrieval", "images"), ("query", "images"), ("traverse", "captions")):
        if getattr(args, name) and not getattr(args, needs):
            raise ValueError(f"--{name} needs --{needs}")
    if args.val_data and (args.retrieval or args.classification):
        raise ValueError("--val_data is an evaluation of its own; leave --retrieval and --classification out")
    foreign = {k: getattr(args, k) for k in ("geometry", "logit", "tokenizer", "quick_gelu", "vision_heads", "text_heads")}
    model = load_model(args.checkpoint, **foreign).to(pick_device(args.device))
    how = dict(batch_size=args.batch_size, workers=args.workers, dtype=torch.bfloat16 if args.dtype == "bfloat16" else None)
    results = dict(zero_shot=None, retrieval=None)
    if args.classification:
        results["zero_shot"] = zero_shot(model, *class_folder(args.classification, args.classnames, args.templates), **how)
    if args.retrieval:
        results["retrieval"] = retrieval(model, *karpathy(args.retrieval, args.images, args.split), **how)
        results["retrieval"]["protocol"] += f", split {args.split} of {args.retrieval}"
    if args.traverse:
        results["traversal"] = traversal(model, args.traverse, args.captions, **how)
    if args.query:
        results["query"] = search(model, args.checkpoint, args.query, args.images, **how)
    if args.val_data or not (args.classification or args.retrieval or args.traverse or args.query):
        source = args.val_data or held_out_source(model.recipe)
        if source is None:
            raise ValueError(f"{args.checkpoint} names no held-out data of its own; give --val_data, --retrieval JSON --images DIR or --classification DIR")
        results |= {task: found for task, found in held_out(model, source, **how).items() if found}
        if source == "shapes":
            results["hierarchy"] = shapes_hierarchy(model, **how)
    print(f"pictures: shorter side to {model.config.image_size}, centre crop; similarities in float32, ties count against the model")
    print(table(results))
    empty = dict(zero_shot=dict.fromkeys(("top1", "top5", "classes")),
                 retrieval=dict.fromkeys(f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)))
    if args.json:
        Path(args.json).write_text(json.dumps(results | {task: results[task] or empty[task] for task in empty}, indent=1) + "\n")


def main():
    args = parse()
    try:
        run(args)
    except (ValueError, OSError) as error:   # what a user can mend gets a sentence
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
