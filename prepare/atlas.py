"""The reward of every crop on a grid, computed once for all runs: train.py --sampler amo --atlas FILE.

    python -m prepare.atlas datasets/HGGT --reward musiq
    python -m prepare.atlas datasets/HGGT --reward musiq --compare 500          how often the grid's winner is that of online scoring

Leaves DATA/atlas/<reward>-<crop>-<stride>.npy and .json: (sets, versions, 2, rows, columns) scores, the third axis for the image and its mirror
image. HGGT, stride 32, crop 256: 16.4 million scorings and 65 MB, a third of the online scorings of one run (300,000 steps of 32 samples of 5
versions). An interrupted atlas continues, torchrun shares the sets. Sizes and modes are checked before the first score, but a truncated image is
met only when it is decoded, and an atlas begun before it was repaired has to begin anew: run prepare.verify first.
"""
import argparse
from pathlib import Path

import runs


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=runs.Help)
    p.add_argument("data", type=Path, metavar="DIR", help="quintuplets in HGGT's layout")
    p.add_argument("--reward", nargs="+", default=["musiq"], metavar="NAME[=WEIGHT]", help="as train.py's")
    p.add_argument("--reward-weights", type=Path, metavar="FILE", help="local weights of the reward instead of a download")
    p.add_argument("--crop", type=runs.number(int, 32), default=256, help="side of the training crops in pixels (HGGT)")
    p.add_argument("--stride", type=runs.number(int, 4), default=32, help="pixels between positions, a multiple of 4 (CHOICE)")
    p.add_argument("--batch-size", type=runs.SIZE, default=32, help="crops scored at a time")
    p.add_argument("--compare", type=runs.COUNT, default=0, metavar="N",
                   help="make nothing: score N random training crops online and say how often the nearest position of the grid, and of one twice as "
                        "coarse, has the same winner")
    p.add_argument("--seed", type=runs.COUNT, default=0, help="of --compare")
    p.add_argument("--out-json", type=Path, metavar="FILE", help="write what --compare found here")
    p.add_argument("--out", type=Path, metavar="FILE", help=".npy to make (default: DIR/atlas/<reward>-<crop>-<stride>.npy)")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    p.add_argument("--threads", type=runs.COUNT, default=0, help="CPU threads; 0: PyTorch's choice")
    args = p.parse_args(argv)
    if args.out and args.out.suffix != ".npy":
        p.error(f"--out {args.out}: name a file that ends in .npy")
    if args.crop % 8:
        p.error(f"--crop {args.crop}: must be a multiple of 8, as train.py's")
    if args.stride % 4:
        p.error(f"--stride {args.stride}: crops lie on multiples of 4, so must the grid")
    return args


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import hashlib
import json
import math
import re
import shutil
import sys

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

import data
import iqa
from images import cut_to_x4


class Atlas:
    """The reward of every version's crops on a grid of positions, flipped and not, as `prepare.atlas` computed it.

    A .npy file of (stems, versions, 2, rows, columns) float32, memory-mapped, and its .json: what it belongs to. sets, crop: what is trained on;
    `rewards`: what it holds. ValueError for an atlas of other data or crop, one that is not finished, or whose table or record is not what was written.
    """

    def __init__(self, path, sets, crop):
        path = Path(path)
        try:
            about, self.table = Atlas.load(path)
            self.stride, self.rewards = about["stride"], about["reward"]
            self.rows = {stem: k for k, stem in enumerate(about["stems"])}
            belongs, finished = {k: about[k] for k in ("signature", "versions", "crop")}, about["finished"]
            names = [f"{name}:{part['hash']}x{part['weight']:g}" for name, part in self.rewards.items()]
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise runs.UserError(f"--atlas {path}: not a whole atlas ({' '.join(str(error).split())[:100]}); remove what is there, and python -m prepare.atlas makes one") from None
        wanted = {"signature": sets.signature(), "versions": sets.versions, "crop": crop}
        for what, value in wanted.items():
            if belongs[what] != value:
                raise runs.UserError(f"--atlas {path}: made of other {'images' if what == 'signature' else what} ({belongs[what]}, here {value}); make one of these: python -m prepare.atlas")
        if not finished:
            raise runs.UserError(f"--atlas {path}: not finished; the same `prepare.atlas` command continues it")
        width, height = sets.size(sets.stems[0])
        grid = [(n // 4 * 4 - crop) // self.stride + 1 for n in (height, width)] if type(self.stride) is int and self.stride > 0 else None
        if grid != list(self.table.shape[3:]) or sorted(self.rows) != sorted(sets.files["original"]):
            raise runs.UserError(f"--atlas {path}: its .json was changed (stride {self.stride} and {len(self.rows)} stems do not fit its table or the images); remove both, and python -m prepare.atlas makes them")
        self.told = " ".join(names) + f" stride {self.stride} table {about['table']}"

    @staticmethod
    def load(path):
        """(record, memory-mapped table) of the two files, as they were written; a finished table is hashed, .04 s for HGGT's 65 MB."""
        about, table = json.loads(path.with_suffix(".json").read_text()), np.load(path, mmap_mode="r")
        if list(table.shape) != about["shape"] or table.dtype != np.float32:
            raise runs.UserError(f"a table of {table.shape}, expected {about['shape']}")
        if about["finished"] and hashlib.sha256(table.reshape(-1)).hexdigest()[:12] != about["table"]:
            raise runs.UserError("its table was changed after it was finished")
        return about, table

    @staticmethod
    def open_all(words, sets, crop, reward=None):
        """["FILE", "FILE=WEIGHT"] -> [(Atlas, weight)] of one grid. What they sum up to must be the reward in use, if there is one."""
        opened = []
        for word in words:
            file, _, weight = word.partition("=")
            try:
                number = float(weight) if weight else 1.0
            except ValueError:
                number = np.nan
            if not np.isfinite(number):
                raise runs.UserError(f"--atlas {word}: write FILE or FILE=WEIGHT")
            opened.append((Atlas(file, sets, crop), number))
        if len({(atlas.stride, atlas.table.shape) for atlas, _ in opened}) > 1:
            raise runs.UserError(f"--atlas {' '.join(words)}: of different grids; make them with one --stride")
        if opened and reward is not None:
            total, wanted = {}, {(name, part["hash"]): part["weight"] for name, part in reward.identity().items()}
            for atlas, weight in opened:
                for name, part in atlas.rewards.items():
                    total[name, part["hash"]] = total.get((name, part["hash"]), 0.0) + weight * part["weight"]
            if total.keys() != wanted.keys() or any(not np.isclose(total[key], wanted[key]) for key in total):
                told = lambda parts: " ".join(f"{name}={weight:g} ({digest})" for (name, digest), weight in parts.items())
                raise runs.UserError(f"--atlas {' '.join(words)}: the sum of {told(total)}, but --reward is {told(wanted)}: name the same reward, weights and all, or none")
        return opened

    def position(self, u):
        """Two uniform draws in [0, 1) -> top and left of a crop on the grid, in pixels."""
        return tuple(int(u[i] * n) * self.stride for i, n in enumerate(self.table.shape[3:]))

    def scores(self, stem, flipped, y, x):
        """(versions,) float32 of the crops at this position of the (flipped) images."""
        return torch.from_numpy(self.table[self.rows[stem], :, int(flipped), y // self.stride, x // self.stride].copy())


def read(sets, stem, version):
    """(3, H, W) uint8 array, sides cut to multiples of 4: what training crops from."""
    return cut_to_x4(sets.read(stem, version))


def positions(shape, crop, stride):
    """[(top, left)] of a grid over (3, H, W), and how many rows and columns it has."""
    rows, columns = ((n - crop) // stride + 1 for n in shape[1:])
    return [(y * stride, x * stride) for y in range(rows) for x in range(columns)], rows, columns


def score_crops(reward, image, where, crop, batch_size, device):
    """Scores of the crops of one (3, H, W) uint8 array, [] of floats."""
    crops = [torch.from_numpy(np.array(image[:, y:y + crop, x:x + crop])) for y, x in where]
    with torch.no_grad():
        return torch.cat([reward(torch.stack(crops[k:k + batch_size]).to(device).float() / 255).cpu() for k in range(0, len(crops), batch_size)])


def main(args):
    world = runs.start_world(args.device, args.threads)
    runs.check_output(args.out_json, "--out-json")
    sets = data.find_sets(args.data, "Train")
    reward = iqa.create_reward(args.reward, world.device, args.reward_weights, musiq="fused")
    if args.compare:
        return compare(args, world, sets, reward)
    out = args.out or args.data / "atlas" / f"{'+'.join(re.sub(r'[^0-9A-Za-z_.-]', '_', name) for name, _ in iqa.parse_rewards(args.reward))}-{args.crop}-{args.stride}.npy"
    sizes = data.check_headers(data.TrainingSet(sets, "amo", None, 1, 1, args.crop), world)
    width, height = first = sets.size(sets.stems[0])
    for stem, size in sizes.items():
        if size != first:
            raise runs.UserError(f"{sets.path(stem)}: {size[0]}x{size[1]} pixels, unlike the first image, {width}x{height}: an atlas needs images of one size")
    _, rows, columns = positions((3, height // 4 * 4, width // 4 * 4), args.crop, args.stride)
    shape = (len(sets.stems), len(sets.versions), 2, rows, columns)
    about = {"reward": reward.identity(), "crop": args.crop, "stride": args.stride, "signature": sets.signature(), "versions": sets.versions, "stems": sets.stems, "shape": list(shape), **runs.describe_machine()}
    record = out.with_suffix(".json")
    if world.is_main:
        runs.check_output(out, "--out")
        if record.exists():
            try:
                before, table = Atlas.load(out)
                other = [k for k in ("reward", "crop", "stride", "signature", "versions", "stems", "shape") if before[k] != about[k]]
            except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
                raise runs.UserError(f"{out}: damaged ({' '.join(str(error).split())[:80]}): remove it and {record}") from None
            if other:
                changed = "; its scores are of the images as they were then" if "signature" in other else ""
                raise runs.UserError(f"{out}: begun with other {' and '.join('images' if k == 'signature' else k for k in other)}{changed}: remove it and {record.name} to begin anew, or name another --out")
        elif out.exists():
            raise runs.UserError(f"{out}: is there, but not {record.name}, which would say what it is: name another --out, or remove it")
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(out.parent).free
            if 4 * math.prod(shape) + 4096 > free:
                raise runs.UserError(f"{out}: {4 * math.prod(shape) / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")
            table = np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=shape)
            table[:] = np.nan                                                     # not yet scored
            table.flush()
            runs.save_json(record, about | {"finished": False})
    world.barrier()
    table = np.lib.format.open_memmap(out, mode="r+")
    mine = range(world.rank, len(sets.stems), world.size)
    todo = [i for i in mine if np.isnan(table[i]).any()]
    for i in tqdm(todo, desc=f"{len(mine) - len(todo)} sets scored before", unit="set", disable=not world.is_main):
        for k, version in enumerate(sets.versions):
            image = read(sets, sets.stems[i], version)
            where, *grid = positions(image.shape, args.crop, args.stride)
            for flip in (0, 1):
                scores = score_crops(reward, image[:, :, ::-1] if flip else image, where, args.crop, args.batch_size, world.device)
                if not torch.isfinite(scores).all():
                    raise runs.UserError(f"{sets.path(sets.stems[i], version)}: a score is not finite")
                table[i, k, flip] = scores.view(*grid).numpy()
        table.flush()                                                             # a set counts once its last version is there
    world.barrier()
    if world.is_main:
        if np.isnan(table).any():
            raise runs.UserError(f"{out}: {np.isnan(table).any((1, 2, 3, 4)).sum()} sets have no scores, although every process has ended: the same command continues")
        runs.save_json(record, about | {"finished": True, "table": hashlib.sha256(table.tobytes()).hexdigest()[:12]})
        winner = np.bincount(table[:].argmax(1).ravel(), minlength=len(sets.versions)) / table[:, 0].size
        print(f"{out}: {table.size} scores, {table.nbytes / 1e6:.1f} MB; winners: " + ", ".join(f"{v} {w:.0%}" for v, w in zip(sets.versions, winner)))


def compare(args, world, sets, reward):
    """Agreement of arg max: random crops scored online against the nearest position of the grid, at this stride and twice it."""
    data.check_headers(data.TrainingSet(sets, "amo", None, 1, 1, args.crop), world)             # refuses images smaller than the crop
    rng = np.random.default_rng(args.seed)
    same, gaps = {args.stride: 0, 2 * args.stride: 0}, {args.stride: [], 2 * args.stride: []}
    for _ in tqdm(range(args.compare), unit="crop", disable=not world.is_main):
        stem = sets.stems[rng.integers(len(sets.stems))]
        images = [read(sets, stem, version) for version in sets.versions]
        y, x = (4 * int(rng.integers((n - args.crop) // 4 + 1)) for n in images[0].shape[1:])
        spots = [(y, x)] + [tuple(min(round(v / stride) * stride, (n - args.crop) // stride * stride) for v, n in zip((y, x), images[0].shape[1:])) for stride in same]
        scores = torch.stack([score_crops(reward, image, spots, args.crop, len(spots), world.device) for image in images])          # (versions, spots)
        best = scores.argmax(0)
        for k, stride in enumerate(same, 1):
            same[stride] += int(best[k] == best[0])
            gaps[stride].append((scores[best[0], 0] - scores[best[k], 0]).item())
    record = {"command": sys.argv, **runs.describe_machine(), "reward": reward.identity(), "crop": args.crop, "n": args.compare, "seed": args.seed, "same_winner": same}
    if args.out_json and world.is_main:
        runs.save_json(args.out_json, record | {"lost_score": {stride: float(np.mean([g for g in gap if g] or [0])) for stride, gap in gaps.items()}})
    for stride, count in same.items():
        low, high = stats.binomtest(count, args.compare).proportion_ci(method="wilson")
        print(f"stride {stride}: the same winner in {count / args.compare:.1%} [{low:.1%}, {high:.1%}] of {args.compare} random crops; where it differs the online score of the grid's choice "
              f"is lower by {np.mean([g for g in gaps[stride] if g] or [0]):.2f} on average (seed {args.seed})")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
