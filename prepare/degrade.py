"""Pairs of LR image and ground truth from a folder of sharp photographs, degraded in one fixed way.

    python -m prepare.degrade PHOTOS OUT --degradation bicubic       what super-resolution papers call bicubic x4
    python -m prepare.degrade PHOTOS OUT --degradation two-round     as evaluate.py --gt PHOTOS --degradation two-round
    python -m prepare.degrade PHOTOS OUT --degradation camera        a stand-in for an unknown camera

Leaves OUT/lq/<name>.png, a quarter as large as OUT/gt/<name>.png, whose sides are cut to multiples of 4, and
OUT/degrade.json. Of a quintuplet data set the originals are taken. The same command gives the same bytes: all draws
follow from --seed and the name of the photograph. OUT appears under its name only when it is complete.
"""
from pathlib import Path

import runs

PRESETS = runs.literal("degradations", "PRESETS")


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("photos", type=Path, metavar="IN", help="folder of sharp photographs, or a quintuplet data set")
    p.add_argument("out", type=Path, metavar="OUT", help="folder to make; it must not exist")
    p.add_argument("--degradation", choices=["bicubic", *PRESETS, "camera"], required=True,
                   help="bicubic: MATLAB's imresize, antialiased; camera: see below; else a preset of degradations.py")
    p.add_argument("--seed", type=runs.COUNT, default=0, help="of every random draw; evaluate.py uses 0")
    p.add_argument("--threads", type=runs.COUNT, default=0, help="CPU threads; 0: PyTorch's choice")
    g = p.add_argument_group("--degradation camera: blur, x4 smaller, noise, JPEG, of one strength for all images")
    g.add_argument("--blur", type=runs.RATE, nargs=2, default=[3.5, 1.4], metavar="SIGMA",
                   help="sigmas of the Gaussian along its two axes, in HR pixels (CHOICE: wider than realesrgan's)")
    g.add_argument("--angle", type=runs.number(float), default=30.0, help="of the first axis, in degrees (CHOICE)")
    g.add_argument("--noise", type=runs.WEIGHT, default=6.0, help="standard deviation, in grey levels (CHOICE)")
    g.add_argument("--jpeg", type=runs.number(float, 1, 100), default=27.0,
                   help="libjpeg's quality (CHOICE: below realesrgan's 30)")
    return p.parse_args(argv)


# before the imports that take seconds, so that --help answers at once
ARGS = parse_args() if __name__ == "__main__" else None

import math
import shutil
import sys

import torch.nn.functional as F
from tqdm import tqdm

import data
import degradations
from images import check_mode, cut_to_x4, load_image, open_image, save_image

CAMERA = ("blur", "angle", "noise", "jpeg")


def camera(gt, stem, blur, angle, noise, jpeg, seed=0):
    """One fixed degradation, as if all images came from one camera: (1, 3, H, W) -> (1, 3, H/4, W/4), in [0, 1], 8-bit.

    blur: two sigmas in HR pixels; angle: of the first, in degrees; noise: in grey levels; jpeg: libjpeg's quality. Only
    the noise is drawn, from (seed, stem).
    """
    if min(gt.shape[2:]) < 12:
        raise runs.UserError(f"camera: {gt.shape[2]}x{gt.shape[3]} images are too small for its blur; use larger ones")
    kernel = degradations.gaussian_kernel(21, *blur, math.radians(angle))
    small = F.interpolate(degradations.blur(gt, kernel), scale_factor=0.25, mode="area")
    field = degradations.normal_field(small.shape, runs.sample_seed(seed, 0, 0, f"domain {stem}"))
    noisy = degradations.add_gaussian_noise(small, noise, field)
    return degradations.to_8bit(degradations.jpeg(noisy, jpeg, "libjpeg"))


def main(args):
    if args.out.exists():
        raise runs.UserError(f"{args.out} exists: remove it to make it again, or choose another OUT")
    if not args.photos.is_dir():
        raise runs.UserError(f"{args.photos}: no such folder of photographs")
    photos = data.find_photos(args.photos)
    runs.check_writable(args.out.parent, "OUT")
    runs.start_world("cpu", args.threads)
    # Wrong modes are found in the headers, before the work; a truncated file is found when it is decoded.
    for stem in photos.stems:
        with open_image(photos.path(stem)) as image:
            check_mode(photos.path(stem), image.mode)
    settings = {"degradation": args.degradation, "seed": args.seed}
    if args.degradation == "camera":
        settings |= {name: getattr(args, name) for name in CAMERA}

    work = args.out.with_name(args.out.name + ".tmp")
    # of a call that was killed
    shutil.rmtree(work, ignore_errors=True)
    try:
        for stem in tqdm(photos.stems, unit="img"):
            gt = cut_to_x4(load_image(photos.path(stem)))[None].float() / 255
            try:
                if args.degradation == "camera":
                    lq = camera(gt, stem, args.blur, args.angle, args.noise, args.jpeg, args.seed)
                else:
                    lq = degradations.fixed(gt, args.degradation, stem, args.seed)
            except runs.UserError as error:
                raise runs.UserError(f"{photos.path(stem)}: {error}") from None
            save_image(work / "lq" / f"{stem}.png", lq[0])
            save_image(work / "gt" / f"{stem}.png", gt[0])
        record = {"images": len(photos.stems), **settings, "command": sys.argv, **runs.describe_machine()}
        runs.save_json(work / "degrade.json", record)
        work.rename(args.out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{args.out}: {len(photos.stems)} pairs of lq and gt, {args.degradation}")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
