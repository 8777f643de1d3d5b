"""The picture at the top of README: the idea (a quintuplet with its scores and the choice), and below it the effect.

    python -m experiments.hero results/hero.png

The quintuplet is of the demo set, scored by the ranker. The effect is a row of results/experiment.png, which
experiments.samplers made: outputs of one network after training with three samplers.
"""
from functools import partial
from pathlib import Path

import runs


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("out", type=Path, metavar="OUT.png", help="picture to write")
    p.add_argument("--set", default="astronaut-0-128", metavar="STEM", help="quintuplet of the demo's training set")
    p.add_argument("--crop", type=runs.COUNT, nargs=2, default=[64, 48], metavar="PIXEL", help="its crop: top and left")
    return p.parse_args(argv)


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import torch

import data
import iqa
from images import load_image
from prepare.demo_set import build_demo
from report import style

DEMO, SIDE = Path("datasets/demo"), 96
# of results/experiment.png: the second row, cells of 256 pixels below strips of 23 with gaps of 4
ROW, CELL, STRIP, GAP = 1, 256, 23, 4
LABELS = ("LR image", "trained with originals", "with random versions", "with AMO", "reference")


def idea(stem, top, left):
    """[(crop (3, SIDE, SIDE), label, was it chosen?)] of a quintuplet, scored by the ranker as AMO does."""
    if not DEMO.exists():
        build_demo(DEMO)
    sets = data.find_sets(DEMO, "Train")
    crops = [load_image(sets.path(stem, version))[:, top:top + SIDE, left:left + SIDE] for version in sets.versions]
    scores = iqa.create_reward(["ranker"])(torch.stack(crops).float() / 255)
    chosen = data.pick_gt("amo", torch.ones(1, len(crops), dtype=torch.bool), scores[None]).item()
    return [(crop, f"{'original' if k == 0 else f'enhanced {k}'}: Q = {score:.1f}", k == chosen)
            for k, (crop, score) in enumerate(zip(crops, scores.tolist()))]


def effect():
    """[(cell (3, CELL, CELL), label, False)] of one row of the samplers' picture."""
    sheet = load_image(runs.REPO / "results" / "experiment.png")
    top = ROW * (STRIP + CELL + GAP) + STRIP
    return [(sheet[:, top:top + CELL, k * (CELL + GAP):][:, :, :CELL], label, False) for k, label in enumerate(LABELS)]


def main(args):
    # wider than other pictures: five cells with their names
    drawing, axes = style.figure(2, 5, height=4.5, width=10)
    for row, cells in zip(axes, (idea(args.set, *args.crop), effect())):
        for axis, (image, label, chosen) in zip(row, cells):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_title(label + (" ✓" if chosen else ""), fontweight="bold" if chosen else "normal")
            axis.set(xticks=[], yticks=[])
            for edge in axis.spines.values():
                edge.set(visible=chosen, color="tab:green", linewidth=4)
    style.save(drawing, args.out)


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
