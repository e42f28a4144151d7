"""Whether captions form a hierarchy: general ones near the root, with images in their cones.

    python -m lab.hierarchy out/ckpt.pt [--json FILE]  # on the toy world's images of two objects

Axes: N images, L levels of generality, D embedding width.
"""

import json
from pathlib import Path

import torch

import evaluate
from data import print0
from lab import shapes
from model import load_model


def embed_hierarchy(model, **loading):
    """-> held-out images of the toy world (N, D), their captions of L levels (L, N, D)."""
    sources = [shapes.held_out_image(i) for i in range(shapes.HELD_OUT, 2 * shapes.HELD_OUT)]
    images, _ = evaluate.embed_images(model, sources, **loading)
    levels = zip(*shapes.held_out_levels())  # L tuples of N captions
    return images, torch.stack([evaluate.embed_texts(model, captions) for captions in levels])


@torch.no_grad()
def hierarchy_metrics(model, images, texts):
    """images (N, D), captions of L levels (L, N, D), general first -> dict of

    text_radius, image_radius   mean distance from the root: of each level, and of the images
    general_nearer              how often a caption is nearer to the root than the caption of the
                                next level for the same image (chance: 0.5); None for one level
    own_in_cone, other_in_cone  for each level, how often the cone of a caption contains its own
                                image, and another image ("a shape" fits both); None without cones
    min_radius                  K of these cones
    """
    geometry = model.geometry
    root = geometry.root(torch.cat([images, texts.flatten(0, 1)]))
    radius = geometry.distance_to_root(texts, root)  # (L, N)
    nearer = (radius[:-1] < radius[1:]).float().mean().item()
    out = {"text_radius": radius.mean(1).tolist(),
           "image_radius": geometry.distance_to_root(images, root).mean().item(),
           "general_nearer": nearer if len(texts) > 1 else None,
           "own_in_cone": None, "other_in_cone": None, "min_radius": None}
    if geometry.cones:
        K = evaluate.last_min_radius(model)
        out["min_radius"] = K = model.train_config.get("min_radius", 0.1) if K is None else K
        others = images.roll(len(images) // 2, 0)
        for name, points in (("own_in_cone", images), ("other_in_cone", others)):
            outside = geometry.entailment_loss(texts, points, K, model.scalars()[1])  # (L, N)
            out[name] = (outside == 0).float().mean(1).tolist()
    return out


def print_table(levels, metrics):
    nearer = metrics["general_nearer"]
    print0(f"captions nearer to the root than those of the next level: {nearer:.1%} (chance 50%)")
    print0(f"{'':46}  radius    own image in cone  other image in cone")
    absent = [None] * len(levels)
    cones = metrics["own_in_cone"] or absent, metrics["other_in_cone"] or absent
    for level, radius, *shares in zip(levels, metrics["text_radius"], *cones):
        cells = ["-" if share is None else f"{share:.1%}" for share in shares]
        print0(f"{level:46}{radius:8.2f}" + "".join(f"{cell:>21}" for cell in cells))
    print0(f"{'images':46}{metrics['image_radius']:8.2f}")
    print0("radius: mean distance to the root; for clip, (1 - cos)/2 to the mean embedding")
    if metrics["min_radius"] is not None:
        print0(f"cones: those of the captions, with K = {metrics['min_radius']:g}")


def main():
    parser = evaluate.Parser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", help="a checkpoint of train.py or lab/convert.py")
    parser.add_argument("--json", metavar="FILE", help="also write the metrics to this file")
    args = parser.parse_args()
    if args.json and not Path(args.json).absolute().parent.is_dir():
        parser.error(f"--json {args.json} is in a folder that does not exist")
    try:
        model = load_model(args.checkpoint).to(evaluate.pick_device())
        metrics = hierarchy_metrics(model, *embed_hierarchy(model))
        if args.json:  # first, because printing may fail
            Path(args.json).write_text(json.dumps(metrics, indent=1) + "\n")
    except (ValueError, OSError) as error:
        evaluate.end(f"hierarchy.py: {error}")
    print_table(shapes.LEVELS, metrics)


if __name__ == "__main__":
    main()
