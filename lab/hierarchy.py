"""Is a caption nearer to the root, and its cone wider, the more general it is?

    python -m lab.hierarchy out/ckpt.pt [--json results.json]

This evaluates a model on the toy world's held-out images of two objects and their captions of five
levels, from "a shape" to "a small red circle left of a large blue square".

Axes: N images, L levels of generality, D embedding width.
"""

import json
from pathlib import Path

import torch

import evaluate
from lab import shapes
from model import load_model


def embed_hierarchy(model, **loading):
    """Held-out shapes -> images (N, D), their captions of L levels (L, N, D), general first."""
    N = shapes.HELD_OUT
    sources = [shapes.held_out_image(i) for i in range(N, 2 * N)]
    images, _ = evaluate.embed_images(model, sources, **loading)
    levels = zip(*shapes.held_out_levels())  # L tuples of N captions
    texts = [evaluate.embed_texts(model, captions) for captions in levels]
    return images, torch.stack(texts)


@torch.no_grad()
def hierarchy_metrics(model, images, texts):
    """images (N, D), captions of L levels (L, N, D), general first -> dict of

    text_radius, image_radius   mean distance from the root: of each level, and of the images
    general_nearer              how often a caption is nearer to the root than the caption of the
                                next level for the same image (chance: 0.5)
    own_in_cone, other_in_cone  for each level, how often the cone of a caption contains its own
                                image, and another image ("a shape" fits both); None without cones
    """
    geometry = model.geometry
    root = geometry.root(torch.cat([images, texts.flatten(0, 1)]))
    radius = geometry.distance_to_root(texts, root)  # (L, N)
    out = {"text_radius": radius.mean(1).tolist(),
           "image_radius": geometry.distance_to_root(images, root).mean().item(),
           "general_nearer": (radius[:-1] < radius[1:]).float().mean().item(),
           "own_in_cone": None, "other_in_cone": None}
    if geometry.cones:
        K = evaluate.last_min_radius(model)
        K = model.train_config.get("min_radius", 0.1) if K is None else K
        others = images.roll(len(images) // 2, 0)
        for name, points in (("own_in_cone", images), ("other_in_cone", others)):
            outside = geometry.entailment_loss(texts, points, K, model.scalars()[1])  # (L, N)
            out[name] = (outside == 0).float().mean(1).tolist()
    return out


def main():
    parser = evaluate.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint")
    parser.add_argument("--json", metavar="FILE", help="write the metrics to this file")
    args = parser.parse_args()
    try:
        model = load_model(args.checkpoint)
        metrics = hierarchy_metrics(model, *embed_hierarchy(model))
        if args.json:
            Path(args.json).write_text(json.dumps(metrics, indent=1) + "\n")
    except (ValueError, OSError) as error:
        evaluate.end(f"hierarchy.py: {error}")
    unit = "" if model.geometry.cones else "; the radius is (1 - cos) / 2"
    print(f"general captions nearer to the root: {metrics['general_nearer']:.1%} (chance 50%){unit}")
    print(f"{'':50}radius   own image in cone   another one")
    nothing = [None] * len(shapes.LEVELS)
    own, other = metrics["own_in_cone"] or nothing, metrics["other_in_cone"] or nothing
    for level, radius, *cones in zip(shapes.LEVELS, metrics["text_radius"], own, other):
        cells = ["       -" if share is None else f"{share:8.1%}" for share in cones]
        print(f"{level:48}{radius:8.2f}{cells[0]:>20}{cells[1]:>14}")
    print(f"{'images':48}{metrics['image_radius']:8.2f}")


if __name__ == "__main__":
    main()
