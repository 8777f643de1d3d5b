"""The picture at the top of README: the idea (a quintuplet with its scores and the choice), and below it the effect.

    python -m experiments.hero results/hero.png

Both are of experiments.paper_network, whose folders of quintuplets and outputs it reads: the set `soft` with the score
that chose there, and networks after training from one start.
"""
from functools import partial
from pathlib import Path

import runs


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("out", type=Path, metavar="OUT.png", help="picture to write")
    p.add_argument("--work", type=Path, default=Path("runs/paper_network"), metavar="DIR", help="of that experiment")
    p.add_argument("--reward", default="weights/downloads/opinion.pth", metavar="NAME", help="its first reward")
    p.add_argument("--set", default="hr_kodak24_kodim07-264-0", metavar="STEM", help="quintuplet of its training set")
    p.add_argument("--image", default="test_set14_comic", metavar="STEM", help="of its test images of known names")
    return p.parse_args(argv)


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import torch

import data
import iqa
from experiments import jobs
from images import load_image
from report import style

# the experiment's crops; side of the shown part of an output
CROP, SIDE = 192, 96
ROWS = {"start": "network as published", "soft-orig-0": "trained on originals", "soft-amo-0": "trained with AMO",
        "soft-amo-0+lora24": "then tuned with LoRA"}


def middle(image, side):
    """The part of this side in the middle of (..., H, W)."""
    top, left = ((n - side) // 2 for n in image.shape[-2:])
    return image[..., top:top + side, left:left + side]


def idea(args):
    """[(crop (3, CROP, CROP), label, was it chosen?)] of a quintuplet, scored and chosen as AMO does."""
    sets = data.find_sets(args.work / "soft", "Train")
    crops = torch.stack([middle(load_image(sets.path(args.set, version)), CROP) for version in sets.versions])
    crops = crops.float() / 255
    scores = iqa.create_reward([args.reward])(crops)
    chosen = data.pick_gt("amo", torch.ones(1, len(crops), dtype=torch.bool), scores[None]).item()
    return [(crop, f"{'original' if k == 0 else f'enhanced {k}'}: Q {score:.1f}", k == chosen)
            for k, (crop, score) in enumerate(zip(crops, scores.tolist()))]


def effect(args):
    """[(part (3, SIDE, SIDE), label, False)] of one image: LR, and the outputs of ROWS."""
    lq, _ = jobs.test_pair(args.work / "sets", args.image)
    cells = [(lq[0].repeat_interleave(4, 1).repeat_interleave(4, 2), "LR image")]
    for row, name in ROWS.items():
        cells.append((load_image(args.work / "outputs" / "sets" / row / f"{args.image}.png").float() / 255, name))
    return [(middle(image, SIDE), name, False) for image, name in cells]


def main(args):
    # wider than other pictures: five cells with their names
    drawing, axes = style.figure(2, 5, height=4.5, width=10)
    for row, cells in zip(axes, (idea(args), effect(args))):
        for axis, (image, label, chosen) in zip(row, cells):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_title(label + (" ✓" if chosen else ""), fontweight="bold" if chosen else "normal")
            axis.set(xticks=[], yticks=[])
            for edge in axis.spines.values():
                edge.set(visible=chosen, color="tab:green", linewidth=4)
    style.save(drawing, args.out)


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
