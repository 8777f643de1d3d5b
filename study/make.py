"""A user study as a page that opens from disk: blind pairs balanced over raters, before/after slider (Supp. 12).

    python -m study.make OURS/ THEIRS/ --out runs/study                        the paper's: 12 raters x 25 pairs
    python -m study.make A/ B/ C/ --gt GT/ --lr LR/ --raters 20 --out DIR      every two methods; attention checks

Leaves DIR/study.html, which the raters get, and DIR/key.json, which says what was behind each picture and is kept from
them. Raters send back the file that the page saves; python -m study.analyze reads these files. docs/study.md tells how
to run a study. Every rater has a number. The page is one file for all, or with --split one per rater, with their
pictures only.
"""
import json
import os
import random
import secrets
import sys
from pathlib import Path

import runs

# bytes; a file larger than this is split by rater
LARGEST = 150_000_000
# CHOICE: pairs with an obvious answer, and pairs that come again with their sides swapped, per rater
CHECKS, REPEATS = 4, 3


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("methods", type=Path, nargs="+", metavar="DIR",
                   help="folder of one method's outputs, whose name is the method's; the first is tested against the "
                        "others; images of one name belong together")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for study.html and key.json")
    p.add_argument("--gt", type=Path, metavar="DIR", help="the originals, for attention checks; needs --lr")
    p.add_argument("--lr", type=Path, metavar="DIR",
                   help=f"the x4 inputs; {CHECKS} checks per rater show an original beside its enlarged input")
    p.add_argument("--raters", type=runs.SIZE, default=12, help="how many people (paper: 12)")
    p.add_argument("--each", type=runs.SIZE, metavar="N",
                   help="pairs per rater, besides checks and repeats; default: 25 (paper), or all if there are fewer")
    p.add_argument("--view", choices=["slider", "flip", "side"], default="slider",
                   help="slider (paper); flip: one picture, the other while a key or button is held; side: both")
    p.add_argument("--question", default="Which picture is better?", help="what the raters are asked")
    p.add_argument("--lossless", action="store_true", help="lossless WebP instead of quality 95: four times as large")
    p.add_argument("--split", action="store_true",
                   help="a file per rater, with that rater's pictures only; done anyway where one would exceed "
                        f"{LARGEST // 10**6} MB")
    p.add_argument("--seed", type=runs.COUNT, help="of the design; default: drawn, and in key.json: whoever knows the "
                                                   "seed can work out which side is which method")
    args = p.parse_args(argv)
    args.seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    if len(args.methods) < 2:
        p.error("name at least two folders, one per method")
    if (args.gt is None) != (args.lr is None):
        p.error("--gt and --lr go together: attention checks show an original beside its enlarged input")
    return args


ARGS = parse_args() if __name__ == "__main__" else None

import torch.nn.functional as F

import images
from report import opinions, page
from study import design

ORIGINAL, ENLARGED = "original", "enlarged input"


def find_images(folders):
    """-> {method: {scene: path}} of the scenes of the first folder. UserError where one lacks some, or sizes differ."""
    # a link has its own name
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    names = [part[-1] for part in parts]
    # two folders of one name, a/images and b/images: a-images and b-images
    names = ["-".join(part[-2:]) if names.count(name) > 1 else name for part, name in zip(parts, names)]
    if len(set(names)) < len(names) or {ORIGINAL, ENLARGED} & set(names) or opinions.BETWEEN in "".join(names):
        raise runs.UserError(f"{' '.join(map(str, folders))}: every method needs a folder of another name, none "
                             f"of them {ORIGINAL} or {ENLARGED}, and without {opinions.BETWEEN}")
    for folder in folders:
        if not folder.is_dir():
            raise runs.UserError(f"{folder}: no such folder")
    scenes = list(images.list_images(folders[0]))
    files = {name: images.match_images(folder, scenes, "method") for name, folder in zip(names, folders)}
    for scene in scenes:
        sizes = {name: images.image_size(files[name][scene]) for name in names}
        if len(set(sizes.values())) > 1:
            shown = ", ".join(f"{name} {w}x{h}" for name, (w, h) in sizes.items())
            raise runs.UserError(f"{scene}: the methods' images differ in size ({shown}): a slider needs one size")
    return files


def trials(files, raters, each, checks, rng):
    """{rater: [{"kind", "scene", "left", "right"}, ...]} in the order of showing; rater: "1", "2", ...

    kind: pair; repeat: one of the rater's pairs again, sides swapped, in the last quarter; check: an original against
    its enlarged input, spread over the session. left, right: methods.
    """
    methods, scenes = list(files), list(files[next(iter(files))])
    hands, shown = design.assign(len(methods), len(scenes), raters, each, rng), {}
    for number, (hand, swapped) in enumerate(zip(hands, design.sides(hands, rng)), 1):
        order = []
        for (both, photo), swap in zip(hand, swapped):
            left, right = (methods[k] for k in (both[::-1] if swap else both))
            order.append({"kind": "pair", "scene": scenes[photo], "left": left, "right": right})
        again = rng.sample(order[:len(order) // 2], min(REPEATS, len(order) // 2))
        for trial in again:
            swap = trial | {"kind": "repeat", "left": trial["right"], "right": trial["left"]}
            order.insert(rng.randint(len(order) * 3 // 4, len(order)), swap)
        parts = rng.sample(scenes, min(CHECKS, len(scenes))) if checks else []
        # half of them with the original on the left
        first = rng.randrange(2)
        for k, scene in enumerate(parts):
            left, right = (ORIGINAL, ENLARGED) if (k + first) % 2 else (ENLARGED, ORIGINAL)
            low, high = (len(order) * n // len(parts) for n in (k, k + 1))
            order.insert(rng.randint(max(1, low), max(1, high)),
                         {"kind": "check", "scene": scene, "left": left, "right": right})
        shown[str(number)] = order
    return shown


def read_check(gt, lr):
    """An original and its enlarged input (bicubic), both (3, H, W) uint8 and as large as four inputs."""
    original, small = (images.load_image(path, rgb=True) for path in (gt, lr))
    images.check_lr_size(lr, small.shape[:0:-1], original.shape[:0:-1])
    original = images.cut_to_x4(original)
    large = F.interpolate(small[None].float(), size=original.shape[1:], mode="bicubic")[0].clamp(0, 255).round().byte()
    return {ORIGINAL: original, ENLARGED: large}


def encode_images(shown, files, gt, lr, quality):
    """{(method, scene): (base64 WebP, [width, height])} of all that is shown."""
    encoded = {}
    for scene in sorted({trial["scene"] for order in shown.values() for trial in order}):
        methods = {trial[side] for order in shown.values() for trial in order if trial["scene"] == scene
                   for side in ("left", "right")}
        pixels = {m: images.load_image(files[m][scene], rgb=True) for m in methods & set(files)}
        if ORIGINAL in methods:
            pixels |= read_check(gt[scene], lr[scene])
        for method, image in pixels.items():
            encoded[method, scene] = page.encode(image, quality), [image.shape[2], image.shape[1]]
    return encoded


def write_page(path, study, raters, shown, encoded, names, settings):
    """The page of some raters. names: {(method, scene): the blind name of the picture}"""
    used = sorted({(trial[side], trial["scene"]) for rater in raters for trial in shown[rater]
                   for side in ("left", "right")}, key=names.get)
    content = settings | {
        "study": study, "sizes": {names[cell]: encoded[cell][1] for cell in used},
        "raters": {rater: [[names[trial[side], trial["scene"]] for side in ("left", "right")]
                           for trial in shown[rater]] for rater in raters}}
    pictures = [f'<script type="text/plain" id="{names[cell]}">{encoded[cell][0]}</script>' for cell in used]
    parts = {"CONTENT": json.dumps(content).replace("<", "\\u003c"), "IMAGES": "\n".join(pictures)}
    page.fill(Path(__file__).with_name("study.html"), parts, path)


def main(args):
    runs.check_writable(args.out, "--out")
    if (args.out / "key.json").exists():
        raise runs.UserError(f"--out {args.out} holds the key of another study, without which its votes say nothing: "
                             "name another folder")
    files, rng = find_images(args.methods), random.Random(args.seed)
    scenes = list(files[next(iter(files))])
    gt, lr = (folder and images.match_images(folder, scenes, flag)
              for folder, flag in ((args.gt, "--gt"), (args.lr, "--lr")))
    pairs = len(scenes) * len(files) * (len(files) - 1) // 2
    each = min(25, pairs) if args.each is None else args.each
    shown = trials(files, args.raters, each, gt is not None, rng)
    encoded = encode_images(shown, files, gt, lr, None if args.lossless else 95)
    blind = rng.sample(range(16**8), len(encoded))
    names = {cell: f"p{number:08x}" for cell, number in zip(encoded, blind)}
    study = runs.digest([shown, sorted(runs.digest(text.encode()) for text, _ in encoded.values())])[:10]
    size = sum(len(text) for text, _ in encoded.values())
    split = args.split or size > LARGEST
    groups = [[rater] for rater in shown] if split else [list(shown)]
    settings = {"question": args.question, "view": args.view}
    for page_without_key in args.out.glob("study*.html"):
        # of a call that was ended
        page_without_key.unlink()
    for group in groups:
        name = f"study-{group[0].zfill(len(str(args.raters)))}.html" if split else "study.html"
        write_page(args.out / name, study, group, shown, encoded, names, settings)
    # last: a study without a key is not begun
    key = {"study": study, "methods": list(files), "seed": args.seed, "lossless": args.lossless, **settings,
           "command": sys.argv, **runs.describe_machine(on_cpu=True),
           "files": {name: {scene: str(path.absolute()) for scene, path in files[name].items()} for name in files},
           "raters": shown}
    runs.save_json(args.out / "key.json", key)
    low, rest = divmod(args.raters * each, pairs)
    count = len(shown["1"])
    print(f"{len(files)} methods, {len(scenes)} photographs: {pairs} pairs, each shown to {low}"
          + (f" or {low + 1}" if rest else "") + f" of {args.raters} raters")
    print(f"a rater has {count} pairs ({each}, {count - each} of them again or as checks), "
          f"about {max(1, round(count * 10 / 60))} minutes")
    largest = max(file.stat().st_size for file in args.out.glob("study*.html"))
    what = f"{len(groups)} files study-NUMBER.html" if split else "study.html"
    print(f"{args.out}: {what}, {'up to ' if split else ''}{largest / 1e6:.1f} MB, for the raters; keep key.json "
          f"from them. Their files come into a folder: python -m study.analyze VOTES --key {args.out / 'key.json'}")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
