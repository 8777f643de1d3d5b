"""The picture at the top of README: the idea (a quintuplet, its scores and the choice) above the effect (what the demo's networks make of a patch).

    make demo && python -m experiments.hero results/demo.png
"""
import argparse
from functools import partial
from pathlib import Path

import runs


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=runs.Help)
    p.add_argument("out", type=Path, metavar="OUT.png", help="picture to write")
    p.add_argument("--set", default="astronaut-0-128", metavar="STEM", help="quintuplet of the demo set's training part")
    p.add_argument("--crop", type=runs.COUNT, nargs=2, default=[64, 48], metavar="PIXEL", help="top and left of its crop")
    p.add_argument("--test", default="chelsea-0-192", metavar="STEM", help="test patch of the demo set")
    p.add_argument("--detail", type=runs.COUNT, nargs=2, default=[60, 40], metavar="PIXEL", help="top and left of its detail")
    return p.parse_args(argv)


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import torch
import torch.nn.functional as F

import archs
import data
import iqa
from images import load_image

DEMO = Path("datasets/demo")
SIDE, DETAIL = 96, 80


def idea(stem, top, left):
    """[(crop, label, was it chosen?)] of a quintuplet, scored by the ranker as AMO does."""
    sets = data.find_sets(DEMO, "Train")
    crops = [load_image(sets.path(stem, version))[:, top:top + SIDE, left:left + SIDE] for version in sets.versions]
    scores = iqa.create_reward(["ranker"])(torch.stack(crops).float() / 255)
    chosen = data.pick_gt("amo", torch.ones(1, len(crops), dtype=torch.bool), scores[None]).item()
    return [(crop, f"{version}: Q = {score:.0f}", k == chosen)
            for k, (crop, version, score) in enumerate(zip(crops, sets.versions, scores.tolist()))]


@torch.no_grad()
def effect(stem, top, left):
    """[(detail, label, False)]: the LR image, bicubic, the two networks of the demo, and the photograph."""
    lq = load_image(DEMO / "Test/Blind_Degradation_Benchmark_LQ/demo/Blind_LR" / f"{stem}.png")[None].float() / 255
    photo = load_image(DEMO / "Test/GT/demo/untouched" / f"{stem}.png")[None].float() / 255
    outputs = {"LR image": F.interpolate(lq, scale_factor=4, mode="nearest"),
               "bicubic": F.interpolate(lq, scale_factor=4, mode="bicubic")}
    for sampler in ("orig", "amo"):
        net, _ = archs.load_run(Path("runs") / f"compact-small-{sampler}", "--weights")
        outputs[f"trained with {'originals' if sampler == 'orig' else 'AMO'}"] = net(lq)
    outputs["photograph"] = photo
    cut = (slice(None), slice(None), slice(top, top + DETAIL), slice(left, left + DETAIL))
    return [(image[cut][0].clamp(0, 1), label, False) for label, image in outputs.items()]


def main(args):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [idea(args.set, *args.crop), effect(args.test, *args.detail)]
    figure, axes = plt.subplots(2, 5, figsize=(10, 4.7), layout="constrained")
    for row, cells in zip(axes, rows):
        for axis, (image, label, chosen) in zip(row, cells):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_title(label + (", chosen" if chosen else ""), fontsize=12, fontweight="bold" if chosen else "normal")
            axis.set(xticks=[], yticks=[])
            for edge in axis.spines.values():
                edge.set(visible=chosen, color="tab:green", linewidth=4)
    runs.write_atomic(args.out, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    plt.close(figure)


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
