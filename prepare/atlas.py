"""The reward of every crop on a grid, computed once for all runs: train.py --sampler amo --atlas FILE.

    python -m prepare.atlas datasets/HGGT --reward musiq
    python -m prepare.atlas datasets/HGGT --reward musiq --compare 500     how often the grid and online scoring agree

Leaves DATA/atlas/<reward>-<crop>-<stride>.npy and .json: (sets, versions, 2, rows, columns) scores; the third axis is
for the image and its mirror image. HGGT, stride 32, crop 256: 16.4 million scorings and 65 MB, a third of the online
scorings of one run (300,000 steps of 32 samples of 5 versions). An interrupted atlas continues, torchrun shares the
sets. Sizes and modes are checked before the first score. A truncated image is noticed only when it is decoded, and an
atlas that was begun before the repair of an image has to begin anew: run prepare.verify first.
"""
from pathlib import Path

import runs


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("data", type=Path, metavar="DIR", help="quintuplets in HGGT's layout")
    p.add_argument("--reward", nargs="+", default=["musiq"], metavar="NAME[=WEIGHT]", help="as train.py's")
    p.add_argument("--reward-weights", type=Path, metavar="FILE",
                   help="local weights of the reward instead of a download")
    p.add_argument("--crop", type=runs.number(int, 32), default=256, help="side of the training crops in pixels (HGGT)")
    p.add_argument("--stride", type=runs.number(int, 4), default=32,
                   help="pixels between positions, a multiple of 4 (CHOICE)")
    p.add_argument("--batch-size", type=runs.SIZE, default=32, help="crops scored at a time")
    p.add_argument("--compare", type=runs.COUNT, default=0, metavar="N",
                   help="make nothing: score N random training crops online and report how often the nearest position "
                        "of the grid, and of a grid twice as coarse, has the same winner")
    p.add_argument("--seed", type=runs.COUNT, default=0, help="of --compare")
    p.add_argument("--out-json", type=Path, metavar="FILE", help="write the result of --compare here")
    p.add_argument("--out", type=Path, metavar="FILE",
                   help=".npy to make (default: DIR/atlas/<reward>-<crop>-<stride>.npy)")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    p.add_argument("--threads", type=runs.COUNT, default=0, help="CPU threads; 0: PyTorch's choice")
    args = p.parse_args(argv)
    if args.out and args.out.suffix != ".npy":
        p.error(f"--out {args.out}: name a file that ends in .npy")
    if args.out_json and not args.compare:
        p.error("--out-json is for --compare")
    if args.crop % 8:
        p.error(f"--crop {args.crop}: must be a multiple of 8, as train.py's")
    if args.stride % 4:
        p.error(f"--stride {args.stride}: crops lie on multiples of 4, so must the grid")
    return args


# before the imports that take seconds, so that --help answers at once
ARGS = parse_args() if __name__ == "__main__" else None

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


def table_hash(table):
    """As an atlas's record keeps it of the finished table. table: float32, may be memory-mapped."""
    # 12 digits: the atlases of earlier commits have so many
    return runs.digest(table.reshape(-1).data)[:12]


class Atlas:
    """The reward of every version's crops on a grid of positions, flipped and not, as `prepare.atlas` computed it.

    A .npy file of (stems, versions, 2, rows, columns) float32, memory-mapped, and a .json record beside it.
    sets, crop: the training images and the side of their crops. `rewards`: {name: {"weight", "hash"}} of the scores;
    `identity`: the rewards, the stride and a hash of the table, as a run pins them.
    UserError for an atlas of other data or crop, one that is not finished, or one that was changed or damaged.
    """

    def __init__(self, path, sets, crop):
        path = Path(path)
        try:
            record, self.table = Atlas.load(path)
            self.stride, self.rewards = record["stride"], record["reward"]
            self.rows = {stem: k for k, stem in enumerate(record["stems"])}
            recorded = {key: record[key] for key in ("signature", "versions", "crop")}
            finished = record["finished"]
            names = [f"{name}:{part['hash']}x{part['weight']:g}" for name, part in self.rewards.items()]
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:100]
            raise runs.UserError(f"--atlas {path}: not a whole atlas ({reason}); remove it, "
                                 "and python -m prepare.atlas makes one") from None
        current = {"signature": sets.signature(), "versions": sets.versions, "crop": crop}
        for key, value in current.items():
            if recorded[key] != value:
                raise runs.UserError(f"--atlas {path}: made of other {'images' if key == 'signature' else key} "
                                     f"({recorded[key]}, here {value}); make one of these: python -m prepare.atlas")
        if not finished:
            raise runs.UserError(f"--atlas {path}: not finished; the same `prepare.atlas` command continues it")
        grid = None
        if type(self.stride) is int and self.stride > 0:
            width, height = sets.size(sets.stems[0])
            grid = [(n // 4 * 4 - crop) // self.stride + 1 for n in (height, width)]
        if grid != list(self.table.shape[3:]) or sorted(self.rows) != sorted(sets.files["original"]):
            raise runs.UserError(f"--atlas {path}: its .json was changed (stride {self.stride} and {len(self.rows)} "
                                 "stems do not fit its table or the images); remove both, and python -m prepare.atlas "
                                 "makes them")
        self.identity = " ".join(names) + f" stride {self.stride} table {record['table']}"

    @staticmethod
    def load(path):
        """(record, memory-mapped table) of the two files, as they were written.

        A finished table is hashed: 0.04 s for HGGT's 65 MB.
        """
        record, table = json.loads(path.with_suffix(".json").read_text()), np.load(path, mmap_mode="r")
        if list(table.shape) != record["shape"] or table.dtype != np.float32:
            raise runs.UserError(f"a table of {table.shape}, expected {record['shape']}")
        if record["finished"] and table_hash(table) != record["table"]:
            raise runs.UserError("its table was changed after it was finished")
        return record, table

    @staticmethod
    def open_all(arguments, sets, crop, reward=None):
        """["FILE", "FILE=WEIGHT"] -> [(Atlas, weight)] of one grid. Their sum must be the reward in use, if one is."""
        opened = []
        for argument in arguments:
            # a path may have a = in it
            file, _, text = (argument, "", "") if argument.endswith(".npy") else argument.rpartition("=")
            file, text = (file, text) if file else (text, "")
            try:
                weight = float(text) if text else 1.0
            except ValueError:
                weight = np.nan
            if not np.isfinite(weight):
                raise runs.UserError(f"--atlas {argument}: write FILE or FILE=WEIGHT")
            opened.append((Atlas(file, sets, crop), weight))
        if len({(atlas.stride, atlas.table.shape) for atlas, _ in opened}) > 1:
            raise runs.UserError(f"--atlas {' '.join(arguments)}: of different grids; make them with one --stride")
        if opened and reward is not None:
            # {(name, hash): weight}
            in_use = {(name, part["hash"]): part["weight"] for name, part in reward.identity().items()}
            total = {}
            for atlas, weight in opened:
                for name, part in atlas.rewards.items():
                    total[name, part["hash"]] = total.get((name, part["hash"]), 0.0) + weight * part["weight"]
            if total.keys() != in_use.keys() or any(not np.isclose(total[key], in_use[key]) for key in total):
                raise runs.UserError(f"--atlas {' '.join(arguments)}: the sum of {sum_of(total)}, but --reward is "
                                     f"{sum_of(in_use)}: name the same reward, weights and all, or none")
        return opened

    def position(self, u):
        """Two uniform draws in [0, 1) -> top and left of a crop on the grid, in pixels."""
        return tuple(int(u[i] * n) * self.stride for i, n in enumerate(self.table.shape[3:]))

    def scores(self, stem, flipped, y, x):
        """(versions,) float32 of the crops at this position of the (flipped) images."""
        return torch.from_numpy(self.table[self.rows[stem], :, int(flipped), y // self.stride, x // self.stride].copy())


def sum_of(parts):
    """{(name, hash): weight} as text."""
    return " ".join(f"{name}={weight:g} ({digest})" for (name, digest), weight in parts.items())


def read(sets, stem, version):
    """(3, H, W) uint8 array, sides cut to multiples of 4: training crops are cut from it."""
    return cut_to_x4(sets.read(stem, version))


def positions(shape, crop, stride):
    """[(top, left)] of a grid over (3, H, W), and how many rows and columns it has."""
    rows, columns = ((n - crop) // stride + 1 for n in shape[1:])
    return [(y * stride, x * stride) for y in range(rows) for x in range(columns)], rows, columns


def score_crops(reward, image, where, crop, batch_size, device):
    """Scores (N,) of the crops of one (3, H, W) uint8 array. where: their N positions, (top, left)."""
    crops = [torch.from_numpy(np.array(image[:, y:y + crop, x:x + crop])) for y, x in where]
    scores = []
    with torch.no_grad():
        for k in range(0, len(crops), batch_size):
            scores.append(reward(torch.stack(crops[k:k + batch_size]).to(device).float() / 255).cpu())
    return torch.cat(scores)


def begin_or_continue(out, record, shape):
    """Check that the atlas at `out` was begun with the settings of `record`, or begin it with NaN for every score."""
    index = out.with_suffix(".json")
    runs.check_output(out, "--out")
    if index.exists():
        try:
            earlier, _ = Atlas.load(out)
            keys = ("reward", "crop", "stride", "signature", "versions", "stems", "shape")
            changed = [key for key in keys if earlier[key] != record[key]]
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:80]
            raise runs.UserError(f"{out}: damaged ({reason}): remove it and {index}") from None
        if changed:
            names = " and ".join("images" if key == "signature" else key for key in changed)
            more = "; its scores are of the images as they were then" if "signature" in changed else ""
            raise runs.UserError(f"{out}: begun with other {names}{more}: remove it and {index.name} to begin anew, "
                                 "or name another --out")
    elif out.exists():
        raise runs.UserError(f"{out}: is there, but not {index.name}, which would describe it: name another --out, "
                             "or remove it")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        size, free = 4 * math.prod(shape), shutil.disk_usage(out.parent).free
        if size + 4096 > free:
            raise runs.UserError(f"{out}: {size / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")
        table = np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=shape)
        table[:] = np.nan
        table.flush()
        runs.save_json(index, record | {"finished": False})


def main(args):
    world = runs.start_world(args.device, args.threads)
    runs.check_output(args.out_json, "--out-json")
    sets = data.find_sets(args.data, "Train")
    reward = iqa.create_reward(args.reward, world.device, args.reward_weights, musiq="fused")
    # refuses images smaller than the crop
    sizes = data.check_headers(data.TrainingSet(sets, "amo", None, 1, 1, args.crop), world)
    if args.compare:
        return compare(args, world, sets, reward)
    names = "+".join(re.sub(r"[^0-9A-Za-z_.-]", "_", name) for name, _ in iqa.parse_rewards(args.reward))
    out = args.out or args.data / "atlas" / f"{names}-{args.crop}-{args.stride}.npy"
    width, height = first = sets.size(sets.stems[0])
    for stem, size in sizes.items():
        if size != first:
            raise runs.UserError(f"{sets.path(stem)}: {size[0]}x{size[1]} pixels, unlike the first image, "
                                 f"{width}x{height}: an atlas needs images of one size")
    _, rows, columns = positions((3, height // 4 * 4, width // 4 * 4), args.crop, args.stride)
    shape = (len(sets.stems), len(sets.versions), 2, rows, columns)
    record = {"reward": reward.identity(), "crop": args.crop, "stride": args.stride, "signature": sets.signature(),
              "versions": sets.versions, "stems": sets.stems, "shape": list(shape), **runs.describe_machine()}
    if world.is_main:
        begin_or_continue(out, record, shape)
    world.barrier()
    table = np.lib.format.open_memmap(out, mode="r+")
    own = range(world.rank, len(sets.stems), world.size)
    todo = [i for i in own if np.isnan(table[i]).any()]
    for i in tqdm(todo, desc=f"{len(own) - len(todo)} sets scored before", unit="set", disable=not world.is_main):
        for k, version in enumerate(sets.versions):
            image = read(sets, sets.stems[i], version)
            where, *grid = positions(image.shape, args.crop, args.stride)
            for flip in (0, 1):
                flipped = image[:, :, ::-1] if flip else image
                scores = score_crops(reward, flipped, where, args.crop, args.batch_size, world.device)
                # -inf for a crop without a finite score, which is never chosen; NaN is what is still to be scored
                scores = scores.where(torch.isfinite(scores), -torch.inf)
                table[i, k, flip] = scores.view(*grid).numpy()
        # a set counts once its last version is there
        table.flush()
    world.barrier()
    if world.is_main:
        if np.isnan(table).any():
            missing = np.isnan(table).any((1, 2, 3, 4)).sum()
            raise runs.UserError(f"{out}: {missing} sets have no scores, although every process has ended: "
                                 "the same command continues")
        runs.save_json(out.with_suffix(".json"), record | {"finished": True, "table": table_hash(table)})
        winners = np.bincount(table[:].argmax(1).ravel(), minlength=len(sets.versions)) / table[:, 0].size
        shares = ", ".join(f"{version} {share:.0%}" for version, share in zip(sets.versions, winners))
        print(f"{out}: {table.size} scores, {table.nbytes / 1e6:.1f} MB; winners: {shares}")
        if np.isinf(table).any():
            print(f"{np.isinf(table).sum()} crops have no finite score and are never chosen, first of "
                  f"{sets.stems[int(np.isinf(table).any((1, 2, 3, 4)).argmax())]}")


def compare(args, world, sets, reward):
    """Agreement of arg max: random crops scored online, and the nearest positions of this grid and of a coarser one."""
    rng = np.random.default_rng(args.seed)
    strides = (args.stride, 2 * args.stride)
    same, gaps = dict.fromkeys(strides, 0), {stride: [] for stride in strides}
    for _ in tqdm(range(args.compare), unit="crop", disable=not world.is_main):
        stem = sets.stems[rng.integers(len(sets.stems))]
        images = [read(sets, stem, version) for version in sets.versions]
        sides = images[0].shape[1:]
        place = [4 * int(rng.integers((n - args.crop) // 4 + 1)) for n in sides]
        places = [place]
        for stride in strides:
            nearest = (round(v / stride) * stride for v in place)
            places.append([min(v, (n - args.crop) // stride * stride) for v, n in zip(nearest, sides)])
        scores = [score_crops(reward, image, places, args.crop, len(places), world.device) for image in images]
        scores = torch.stack(scores)  # (versions, 3)
        best = scores.argmax(0)
        for k, stride in enumerate(strides, 1):
            same[stride] += int(best[k] == best[0])
            gaps[stride].append((scores[best[0], 0] - scores[best[k], 0]).item())
    lost = {stride: float(np.mean([gap for gap in gaps[stride] if gap] or [0])) for stride in strides}
    if args.out_json and world.is_main:
        runs.save_json(args.out_json, {"command": sys.argv, **runs.describe_machine(), "reward": reward.identity(),
                                       "crop": args.crop, "n": args.compare, "seed": args.seed, "same_winner": same,
                                       "lost_score": lost})
    for stride, count in same.items() if world.is_main else ():
        low, high = stats.binomtest(count, args.compare).proportion_ci(method="wilson")
        print(f"stride {stride}: the same winner in {count / args.compare:.1%} [{low:.1%}, {high:.1%}] of "
              f"{args.compare} random crops; where it differs the online score of the grid's choice is lower by "
              f"{lost[stride]:.2f} on average (seed {args.seed})")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
