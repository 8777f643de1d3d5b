"""How easily is a reward fooled? Projected gradient ascent on its score, in pixels, within 1, 2 and 4 grey levels.

    python -m rewards.attack --reward ranker runs/rewards/clive.pth --images PHOTOS --out-json attack.json

A gain is given in units of D, the reward's mean score of the photographs less that of their bicubic images (x4 down and
up again): +1 says that a change nobody sees is worth as much as all the detail that bicubic interpolation loses. Two
starts: the photographs, and their bicubic images. An attack goes two ways along the sign of the gradient, see WAYS,
since a hardened model may bend its gradient so that one of them finds nothing. What counts is the best of all images on
both ways and of those within smaller limits, rounded to 8 bits. With several rewards the images found on each are
judged by all others: what transfers fools more than one model. A second table has what every reward says of faults that
need no attack: noise, halos, ringing and patterns on the photographs. A reward of mere sharpness likes them.
"""
import sys
from pathlib import Path

import runs


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--reward", nargs="+", required=True, metavar="NAME", help="differentiable rewards, as for train.py")
    p.add_argument("--reward-weights", nargs="*", default=[], metavar="NAME=FILE",
                   help="local weights of these rewards instead of a download")
    p.add_argument("--images", type=Path, metavar="DIR", help="photographs (default: those of scikit-image)")
    p.add_argument("--count", type=runs.SIZE, default=10, help="at most so many photographs, the first by name")
    p.add_argument("--crop", type=runs.number(int, 32), default=256, help="side of their centre crops, pixels")
    p.add_argument("--levels", type=runs.SIZE, nargs="*", default=[1, 2, 4],
                   help="limits of the change of every value, grey levels; none: the second table alone")
    p.add_argument("--seed", type=runs.COUNT, default=0, help="of the random points")
    p.add_argument("--out-json", type=Path, help="write the numbers here")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where it runs")
    p.add_argument("--threads", type=runs.COUNT, default=0, help="CPU threads (0: PyTorch's choice)")
    args = p.parse_args(argv)
    names = [runs.split_reward(word)[0] for word in args.reward]
    for word in args.reward_weights:
        if "=" not in word or word.partition("=")[0] not in names:
            p.error(f"--reward-weights {word}: write NAME=FILE with a NAME of --reward ({', '.join(names)})")
    return args


# before the imports that take seconds, so that --help answers at once
ARGS = parse_args() if __name__ == "__main__" else None

import numpy as np
import torch

import degradations
import iqa
import metrics
from images import image_size, list_images, load_image
from rewards import harden
from rewards.train_ranker import training_photos

# steps; the first and the last, as shares of the limit; momentum; from a random point within the limit?
WAYS = {
    # Madry et al., ICLR 2018
    "long steps": dict(steps=10, first=0.25, last=0.25, momentum=0.0, random=True),
    # momentum: Dong et al., CVPR 2018; steps that fall, as in Croce and Hein, ICML 2020
    "momentum": dict(steps=60, first=0.11, last=0.01, momentum=0.9, random=False)}


def climb(score, start, level, seed, steps, first, last, momentum, random):
    """The images (B, 3, H, W) of one of WAYS, within `level` grey levels of `start`, not rounded."""
    limit, direction, x = level / 255, 0, start
    if random:
        noise = torch.rand(start.shape, generator=torch.Generator().manual_seed(seed)).to(start.device)
        x = (start + (2 * noise - 1) * limit).clamp(0, 1)
    for k in range(steps):
        x = x.detach().requires_grad_()
        gradient = torch.autograd.grad(score(x).sum(), x)[0]
        direction = momentum * direction + gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-12)
        share = first + (last - first) * k / (steps - 1)
        x = x.detach() + share * limit * direction.sign()
        x = torch.minimum(torch.maximum(x, start - limit), start + limit).clamp(0, 1)
        yield x


def ascend(score, start, level, seed, smaller=None):
    """The best 8-bit images (B, 3, H, W) found within `level` grey levels of the 8-bit `start`.

    score: (B, 3, H, W) in [0, 1] -> (B,). smaller: what was found within a smaller limit, default `start`.
    """
    found = (start if smaller is None else smaller).clone()
    with torch.no_grad():
        best = score(found)
    for way in WAYS.values():
        for x in climb(score, start, level, seed, **way):
            with torch.no_grad():
                image = degradations.to_8bit(x)
                value = score(image)
            better = value > best
            found[better], best = image[better], value.where(better, best)
    return found


def faults(photos, seed):
    """{fault: the 8-bit photos (N, 3, H, W) with it}: high frequencies that are no detail, by strength.

    Noise and checkerboard: grey levels; unsharp: amount.
    """
    noise = degradations.normal_field(photos.shape, seed).to(photos.device)
    pattern = harden.checkerboard(*photos.shape[2:], 2).to(photos.device)
    return {"noise 3": degradations.to_8bit(photos + 3 / 255 * noise),
            "noise 10": degradations.to_8bit(photos + 10 / 255 * noise),
            "unsharp 1": metrics.unsharp(photos, 1.0), "unsharp 4": metrics.unsharp(photos, 4.0),
            "ringing": degradations.to_8bit(harden.ringing(photos, 0.5, 1.5)),
            "checkerboard 3": degradations.to_8bit(photos + 3 / 255 * pattern)}


def measure(rewards, photos, levels, seed=0, batch=5):
    """{name: {"photo", "bicubic", "D", "faults", "gains"}} of {name: reward}. photos: (N, 3, H, W), 8-bit.

    gains: {start: {level: {judge: N changes of the judge's score}}}, the judges being all rewards; faults: {fault: N
    changes of its score}. Not divided by D.
    """
    starts, faulty = {"photo": photos, "bicubic": harden.bicubic(photos)}, faults(photos, seed)

    def score(reward, images):
        with torch.no_grad():
            return torch.cat([reward(part) for part in images.split(batch)])
    before = {name: {start: score(reward, x) for start, x in starts.items()} for name, reward in rewards.items()}
    table = {}
    for name, reward in rewards.items():
        gains = {}
        for start, x in starts.items():
            found = x
            for level in sorted(levels):
                found = torch.cat([ascend(reward, part, level, seed + k, smaller)
                                   for k, (part, smaller) in enumerate(zip(x.split(batch), found.split(batch)))])
                gains.setdefault(start, {})[f"{level:g}"] = {
                    judge: (score(other, found) - before[judge][start]).tolist() for judge, other in rewards.items()}
        means = {start: value.mean().item() for start, value in before[name].items()}
        changes = {fault: (score(reward, x) - before[name]["photo"]).tolist() for fault, x in faulty.items()}
        table[name] = means | {"D": means["photo"] - means["bicubic"], "faults": changes, "gains": gains}
    return table


def in_units(table):
    """Rows of mean gains in units of the judge's own D: {(attacked, judge): {start level: gain}}. NaN for a D <= 0."""
    rows = {}
    for name, entry in table.items():
        for start, levels in entry["gains"].items():
            for level, judges in levels.items():
                for judge, gains in judges.items():
                    d = table[judge]["D"]
                    value = float(np.mean(gains)) / d if d > 0 else float("nan")
                    rows.setdefault((name, judge), {})[f"{start} {level}"] = value
    return rows


def read_photos(folder, count, crop):
    """Centre crops of the first photographs of a folder (None: scikit-image's) that are large enough: (N, 3, ...)."""
    if folder is None:
        photos = [degradations.to_8bit(photo)[0] for photo in training_photos()]
    else:
        paths = [path for path in list_images(folder).values() if min(image_size(path)) >= crop][:count]
        photos = [load_image(path, rgb=True).float() / 255 for path in paths]
    photos = [photo for photo in photos if min(photo.shape[1:]) >= crop][:count]
    if not photos:
        whose = f"--images {folder}" if folder else "scikit-image"
        raise runs.UserError(f"{whose}: no photograph of at least {crop} x {crop} pixels; take a smaller --crop")
    middle = [[(n - crop) // 2 for n in photo.shape[1:]] for photo in photos]
    return torch.stack([photo[:, top:top + crop, left:left + crop] for photo, (top, left) in zip(photos, middle)])


def main(args):
    runs.check_output(args.out_json, "--out-json")
    device = runs.start_world(args.device, args.threads).device
    files, rewards = dict(word.split("=", 1) for word in args.reward_weights), {}
    for word in args.reward:
        name = runs.split_reward(word)[0]
        rewards[word] = iqa.create_reward([word], device, files.get(name), need_gradient=True,
                                          local=f"--reward-weights {name}=")
    photos = read_photos(args.images, args.count, args.crop).to(device)
    table = measure(rewards, photos, args.levels, args.seed)
    columns = [f"{start} {level:g}" for start in ("photo", "bicubic") for level in args.levels]
    rows = [[attacked, judge, f"{table[judge]['D']:.1f}", *(f"{gains[column]:+.2f}" for column in columns)]
            for (attacked, judge), gains in in_units(table).items()]
    print(f"{len(photos)} photographs")
    if args.levels:
        print("gains in units of the judge's D, by start and grey levels")
        print(runs.markdown(["attacked", "judge", "D", *columns], rows) + "\n")
    rows = []
    for name, entry in table.items():
        unit = entry["D"] if entry["D"] > 0 else np.nan
        rows.append([name, f"{unit:.1f}", *(f"{np.mean(changes) / unit:+.2f}" for changes in entry["faults"].values())])
    print("changes of the score by faults of the photographs, in units of D; noise and checkerboard: grey levels")
    print(runs.markdown(["judge", "D", *entry["faults"]], rows))
    if args.out_json:
        runs.save_json(args.out_json, {
            "command": sys.argv, **runs.describe_machine(device.type == "cpu"), "photos": len(photos),
            "crop": args.crop, "ways": WAYS, "seed": args.seed, "rewards": table})


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
