"""Look after a quintuplet data set before training on it: check it, make reading it fast, score it once for all runs.

    python prepare.py verify datasets/HGGT                      one line per defect, then a table; exit code 1 if there is a defect
    python prepare.py verify datasets/mine --out-json mine.json
    python prepare.py pack datasets/HGGT                        decoded images in one memory-mapped file; train.py then uses it by itself
    python prepare.py atlas datasets/HGGT --reward musiq        the reward of every crop on a grid: train.py --sampler amo --atlas FILE
    python prepare.py atlas datasets/HGGT --reward musiq --compare 500          how often the grid's winner is that of online scoring

pack writes DATA/packed/Train.bin (HGGT: 79 GB) and .json, and is refused once an image has changed (by name, size and samples of its bytes). atlas writes DATA/atlas/<reward>-<crop>-<stride>.npy and
.json: (sets, versions, 2, rows, columns) scores, the second axis for the flipped image. HGGT, stride 32, crop 256: 16.4 million scorings and 65 MB, a third of the online scorings
of one run (300,000 steps of 32 samples of 5 versions). An interrupted atlas continues, torchrun shares the sets. Sizes and modes are checked before the first score, but a truncated image is met
only when it is decoded, and an atlas begun before it was repaired has to begin anew: run verify first. A killed pack leaves Train.bin.tmp, which the next one replaces, and what was packed before.

verify: every image of Train and Test is decoded: damaged, grey or alpha, of another size than its original, missing, named like no original,
doubled (a file, or a whole set under another name), the same picture as another version, or of something else than its original shows. A
gap in the version folders or a wrong name of one, and where quintuplets.json and the folders disagree. Labels, where there are any: a
missing annotator or file, another stem's or version's votes, unknown words. Test LR images: a quarter of their original, and showing the
same. Train against Test: patches of one photo, or near-duplicates of a patch, in both.

What is not found: a copy of a training patch that is shifted by more than 1/16 of its side (32 of 512 pixels), turned, or scaled by 2 % and
more; a wrong LR or version that happens to resemble its original in light and shade. Patches of one periodic facade may be called alike.
"""
import argparse
import hashlib
import json
import math
import re
import shutil
import sys
from pathlib import Path

import flags

# CHOICE: a test patch is a near-duplicate when the detail of the thumbnails correlates by CANDIDATE at the best shift, and that of DETAIL_SIDE
# pixels by SIMILAR. Measured on Kodak24, BSD100 and Urban100 (52 photos, patches of 160 to 448 px): JPEG copies of quality 70, 5 % darker, of
# another gamma, half of them mirrored, shifted by up to 1/16: lowest .77 (n = 733), lowest of DETAIL_SIDE .84 (n = 234). Patches of different
# photos: 99.99 % at most .59, highest .77 (174,720 ordered pairs), those 8 with .7 or more at most .37 in DETAIL_SIDE.
# Disjoint patches of one photo: facades reach .97 in both.
CANDIDATE, DETAIL_SIDE, SIMILAR = 0.7, 192, 0.8


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=flags.Help)
    sub = p.add_subparsers(dest="job", required=True)
    v = sub.add_parser("verify", help="list every defect of a data set", allow_abbrev=False, formatter_class=flags.Help)
    v.add_argument("data", type=Path, metavar="DIR", help="quintuplets in HGGT's layout (see data.py)")
    v.add_argument("--workers", type=flags.SIZE, default=8, help="images decoded at a time")
    v.add_argument("--similar", type=flags.number(float, 0, 1), default=SIMILAR,
                   help="correlation of the detail, at the best shift, from which two patches are near-duplicates (CHOICE)")
    v.add_argument("--out-json", type=Path, help="write the defects and the counts here")
    v = sub.add_parser("pack", help="decode a split once, into one memory-mapped file", allow_abbrev=False, formatter_class=flags.Help)
    v.add_argument("data", type=Path, metavar="DIR", help="quintuplets in HGGT's layout")
    v.add_argument("--split", choices=["Train", "Test"], default="Train", help="which images")
    v.add_argument("--workers", type=flags.SIZE, default=8, help="images decoded at a time")
    v = sub.add_parser("atlas", help="the reward of crops on a grid", allow_abbrev=False, formatter_class=flags.Help)
    v.add_argument("data", type=Path, metavar="DIR", help="quintuplets in HGGT's layout")
    v.add_argument("--reward", nargs="+", default=["musiq"], metavar="NAME[=WEIGHT]", help="as train.py's")
    v.add_argument("--reward-weights", type=Path, metavar="FILE", help="local weights of the reward instead of a download")
    v.add_argument("--crop", type=flags.number(int, 32), default=256, help="side of the training crops in pixels (HGGT)")
    v.add_argument("--stride", type=flags.number(int, 4), default=32, help="pixels between positions, a multiple of 4 (CHOICE)")
    v.add_argument("--batch-size", type=flags.SIZE, default=32, help="crops scored at a time")
    v.add_argument("--compare", type=flags.COUNT, default=0, metavar="N",
                   help="make nothing: score N random training crops online and say how often the nearest position of the grid, and of one twice as coarse, has the same winner")
    v.add_argument("--seed", type=flags.COUNT, default=0, help="of --compare")
    v.add_argument("--out-json", type=Path, metavar="FILE", help="write what --compare found here")
    v.add_argument("--out", type=Path, metavar="FILE", help=".npy to make (default: DIR/atlas/<reward>-<crop>-<stride>.npy)")
    v.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    v.add_argument("--threads", type=flags.COUNT, default=0, help="CPU threads; 0: PyTorch's choice")
    args = p.parse_args(argv)
    if args.job == "atlas" and args.out and args.out.suffix != ".npy":
        p.error(f"--out {args.out}: name a file that ends in .npy")
    if args.job == "atlas" and args.crop % 8:
        p.error(f"--crop {args.crop}: must be a multiple of 8, as train.py's")
    if args.job == "atlas" and args.stride % 4:
        p.error(f"--stride {args.stride}: crops lie on multiples of 4, so must the grid")
    return args


ARGS = parse_args() if __name__ == "__main__" else None                           # --help needs no torch: seconds

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

import data
import iqa
import runs

SPLITS = ("Train", "Test")
# CHOICE: below both correlations of zero shift a file shows something else than its original. Enhanced photos have .98 and more; LR images
# after one or two rounds of degradations.py at least .84 and .74 (n = 95 patches of 256 px), other photos at most .73 and .46 (8,556 pairs).
OTHER_GREY, OTHER_DETAIL = 0.8, 0.5
WITHOUT_LABELS = {"Train": "upos and smp cannot train on it", "Test": "evaluate.py compares with the originals"}
WITHOUT_POSITIVE = {"Train": "upos and smp leave them out", "Test": "evaluate.py has no reference for them: its full-reference metrics stop"}


@dataclass
class Report:
    """What was found: defects [{"kind", "file", "text"}], counts {split: {what: number}}."""
    defects: list = field(default_factory=list)
    counts: dict = field(default_factory=dict)

    def add(self, kind, file, text):
        self.defects.append({"kind": kind, "file": str(file), "text": text})


def list_files(folder, report):
    """{stem: path} of a folder's images; what else lies there, and doubled names, are defects."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in data.IMAGE_SUFFIXES:
            report.add("foreign", path, "not an image: remove it")
        elif path.stem in found:
            report.add("doubled", path, f"a second image of this name beside {found[path.stem].name}: remove one")
        else:
            found[path.stem] = path
    return found


def compare_names(folder, found, expected, tolerated, report):
    """found: {stem: path}; expected: the stems that should be there; tolerated: stems that may be, their original being missing."""
    for stem in sorted(expected - set(found)):
        report.add("missing", folder / f"{stem}.png", "missing: fetch or make it again")
    for stem in sorted(set(found) - expected - tolerated):
        report.add("misnamed", found[stem], "no original has this name: rename or remove it")


def tail(path, count):
    with open(path, "rb") as file:
        file.seek(-min(count, path.stat().st_size), 2)
        return file.read()


def decode(path):
    """-> ((width, height), thumbnail, hash of the pixels, None) or (None, None, None, what is wrong)."""
    try:
        image = data.load_image(path)
        if path.suffix.lower() == ".png" and b"IEND" not in tail(path, 32):
            raise ValueError("truncated: its end is missing; fetch or make it again")
    except (ValueError, OSError) as error:
        return None, None, None, " ".join(str(error).split()).removeprefix(f"{path}: ")
    return (image.shape[2], image.shape[1]), data.thumbnail(image), hashlib.sha256(image.numpy().tobytes()).digest(), None


def verify_images(split, folders, workers, report):
    """Decode everything. -> ({stem: path} of the originals, {stem: thumbnail} of the readable ones, stems whose original is missing)."""
    files = {version: list_files(folder, report) for version, folder in folders["images"].items()}
    stems = set(files["original"])
    enhanced = list(files)[1:]
    strays = Counter(s.removesuffix(f"_{v}") for v in enhanced for s in files[v] if s.endswith(f"_{v}") and s.removesuffix(f"_{v}") not in stems)
    lost = {stem for stem, times in strays.items() if 2 * times >= len(enhanced)}        # fewer: rather that version's name is wrong
    for stem in sorted(lost):
        path = folders["images"]["original"] / f"{stem}.png"
        report.add("missing", path, f"the original of {stem} is missing, its versions are there: fetch it again")
    for v in enhanced:
        compare_names(folders["images"][v], files[v], {f"{s}_{v}" for s in stems}, {f"{s}_{v}" for s in lost}, report)
    todo = [(stem if version == "original" else stem.removesuffix(f"_{version}"), version, path)
            for version in files for stem, path in files[version].items()]
    if folders["lq"]:
        lq = list_files(folders["lq"], report)
        compare_names(folders["lq"], lq, stems, lost, report)
        todo += [(stem, "LR", path) for stem, path in lq.items()]
    sizes, thumbnails, pixels, first = {}, {}, {}, {}
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(decode, (path for _, _, path in todo))
        for (stem, version, path), (size, small, digest, problem) in zip(todo, tqdm(results, f"{split} images", len(todo), unit="img")):
            if problem:
                report.add("unreadable", path, problem)
                continue
            if version == "original":
                sizes[stem], thumbnails[stem] = size, small
                pixels[stem, digest] = version
                if first.setdefault(digest, stem) != stem:
                    report.add("doubled", path, f"the same picture as {first[digest]}: one photo under two names? Remove one set")
            elif stem in sizes:                                                  # originals come first
                try:
                    (data.check_lr_size if version == "LR" else data.check_size)(path, size, sizes[stem])
                except ValueError as error:
                    report.add("size", path, str(error).removeprefix(f"{path}: "))
                    if version == "LR":
                        continue                                                 # of another size it is another picture, or was cut
                grey, detail = (small * thumbnails[stem]).sum((1, 2))            # two correlations
                if version != "LR" and pixels.setdefault((stem, digest), version) != version:
                    report.add("identical", path, f"the same picture as {pixels[stem, digest]}: every version must differ")
                elif grey < OTHER_GREY and detail < OTHER_DETAIL:
                    report.add("content", path, "does not show what its original shows: files of two sets swapped?")
    report.counts[split] = {"sets": len(stems), "photos": len({data.photo_of(s) for s in stems}), "versions": len(files)}
    if len(set(sizes.values())) > 1:
        report.counts[split]["sizes"] = len(set(sizes.values()))
    return {stem: files["original"][stem] for stem in sorted(stems)}, thumbnails, lost


def verify_labels(split, folder, stems, lost, versions, report):
    """Read every vote, and count the merged labels of the sets whose three votes are readable. lost: stems without an original."""
    known = {*stems, *lost}
    for annotator in "ABC":
        if not (folder / annotator).is_dir():
            report.add("label", folder / annotator, "missing: HGGT's vote needs three annotators A, B and C")
            return
        for path in sorted((folder / annotator).iterdir()):
            if path.suffix != ".json" or path.stem not in known:
                report.add("misnamed", path, "no original has this name: rename or remove it")
    counts = dict.fromkeys(["positive", "similar", "negative", "without_positive"], 0)
    for stem in stems:
        votes = []
        for annotator in "ABC":
            path = folder / annotator / f"{stem}.json"
            try:
                votes.append(data.read_label(path, stem, versions))
            except (ValueError, OSError) as error:
                report.add("label", path, str(error).removeprefix(f"{path}: "))
        if len(votes) == 3:
            merged = [data.vote(*(v[version] for v in votes)) for version in versions[1:]]
            for name, code in (("positive", data.POSITIVE), ("similar", data.SIMILAR), ("negative", data.NEGATIVE)):
                counts[name] += merged.count(code)
            counts["without_positive"] += data.POSITIVE not in merged
    report.counts[split] |= counts


def detail_agrees(one, other, similar):
    """Do two image files show the same at four times the thumbnails' resolution? Facades and fences resemble each other in thumbnails."""
    images = [data.load_image(path) for path in (one, other)]
    side = min(DETAIL_SIDE, *(min(image.shape[1:]) for image in images))
    a, b = (data.thumbnail(image, side)[1:] for image in images)
    return data.look_alike(a, b).item() >= similar


def verify_splits(train, test, small, similar, report):
    """train, test: {stem: path}; small: {split: {stem: thumbnail}}. Nothing of a test photo may be trained on."""
    shared = {data.photo_of(s) for s in train} & {data.photo_of(s) for s in test}
    for stem in sorted(s for s in test if data.photo_of(s) in shared):
        report.add("leak", test[stem], f"photo {data.photo_of(stem)} is in Train too: all its patches belong to one side")
    ours, theirs = (sorted(small[split]) for split in SPLITS)
    if not ours or not theirs:
        return
    alike = data.look_alike(*(np.stack([small[split][stem][1] for stem in stems]) for split, stems in (("Test", theirs), ("Train", ours))))
    for column, row in np.argwhere(alike.T >= CANDIDATE):
        stem, name = theirs[column], ours[row]
        if data.photo_of(name) != data.photo_of(stem) and detail_agrees(test[stem], train[name], similar):
            report.add("near-duplicate", test[stem], f"looks like {name} of Train")


def verify_record(root, stems, lost, images, report):
    """What make_quintuplets.py --photos wrote down must be there, and nothing else: its sets, and a folder per enhancer."""
    file = root / "quintuplets.json"
    if not file.exists():
        return
    try:
        record = json.loads(file.read_text())
        listed = {stem for photo in record["photos"].values() for stem in photo.get("sets", [])}
        complete = all("sets" in photo for photo in record["photos"].values())                   # --demo records numbers only
    except (ValueError, KeyError, AttributeError) as error:
        report.add("unreadable", file, f"{type(error).__name__}: {error}; build the set again")
        return
    for version in sorted(set(record.get("enhancers", {})) - set(images)):
        report.add("missing", images["original"].with_name(version), "no such folder, but quintuplets.json names its enhancer")
    for stem in sorted(listed - set(stems) - lost):
        report.add("missing", images["original"] / f"{stem}.png", "missing, but listed in quintuplets.json")
    for stem in sorted(set(stems) - listed) if complete else []:
        report.add("unlisted", stems[stem], "not in quintuplets.json: left over from another build? Remove this set")


def verify(root, workers=8, similar=SIMILAR):
    """Look at everything under `root`. -> Report. FileNotFoundError or ValueError when there is no data set to look at."""
    root, report, originals, lost, small, folders = Path(root), Report(), {}, {}, {}, {}
    for split in SPLITS:
        if split == "Train" and not (root / "Train").exists() and (root / "Test").exists():
            continue                                                             # HGGT's Test-100 alone
        folders[split] = data.find_folders(root, split)
        if folders[split] is None:
            continue
        images = folders[split]["images"]
        for number in range(1, int(list(images)[-1])):
            if f"{number:02d}" not in images:
                report.add("missing", images["original"].with_name(f"{number:02d}"), f"no such folder, but there is {list(images)[-1]}")
        wrong = {f for f in images["original"].parent.iterdir() if f.is_dir() and f.name.isdecimal() and f.name not in images}
        for folder in sorted(wrong):
            report.add("misnamed", folder, f"versions have two digits and so this folder is not read: rename it {int(folder.name):02d}, or remove it")
        for empty in [] if folders[split]["labels"] else sorted(root.glob(f"{split}/**/labels")):
            report.add("label", empty, "no folders A, B and C in it: remove it, or add the votes")
        originals[split], small[split], lost[split] = verify_images(split, folders[split], workers, report)
        if not originals[split]:
            report.add("missing", images["original"], "no image in it")
        if folders[split]["labels"]:                                             # the votes of a misnamed folder are no defects of theirs
            versions = list(dict.fromkeys([*images, *sorted(f"{int(f.name):02d}" for f in wrong)]))
            verify_labels(split, folders[split]["labels"], list(originals[split]), lost[split], versions, report)
    if "Train" in small:
        verify_record(root, originals["Train"], lost["Train"], folders["Train"]["images"], report)
    if "Train" in small and "Test" in small:
        verify_splits(originals["Train"], originals["Test"], small, similar, report)
    return report


# Packed images

def pack(args):
    folder = args.data / "packed"
    sets = data.find_sets(args.data, args.split, packed=False)                    # older packed images may not fit any more; they stay until they are replaced
    if sets is None:
        raise FileNotFoundError(f"{args.data}: no {args.split} split in it")
    names = [(version, stem) for stem in sets.stems for version in sets.versions]
    sizes = [data.image_size(sets.path(stem, version)) for version, stem in names]
    of = {stem: size for (version, stem), size in zip(names, sizes) if version == "original"}
    for (version, stem), size in zip(names, sizes):
        data.check_size(sets.path(stem, version), size, of[stem])
    total = sum(3 * w * h for w, h in sizes)
    runs.check_writable(folder, "pack")
    folder.mkdir(exist_ok=True)
    (folder / f"{args.split}.bin.tmp").unlink(missing_ok=True)                    # of a pack that was killed
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OSError(f"{folder}: {total / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free" + (": an older pack lies there, remove it first" if (folder / f"{args.split}.bin").exists() else ""))
    index, offset = {version: {} for version in sets.versions}, 0

    def write(temporary):
        nonlocal offset
        with open(temporary, "wb") as out, ThreadPoolExecutor(args.workers) as pool:
            for k in tqdm(range(0, len(names), 256), unit="block of 256"):        # not all images wait in memory
                for (version, stem), image in zip(names[k:k + 256], pool.map(lambda name: sets.read(name[1], name[0]), names[k:k + 256])):
                    index[version][stem] = [offset, *image.shape[1:]]
                    offset += image.size
                    out.write(image.tobytes())
    runs.write_atomic(folder / f"{args.split}.bin", write)
    runs.save_json(folder / f"{args.split}.json", {"signature": sets.signature(), "images": index})
    print(f"{folder / args.split}.bin: {len(names)} images, {total / 1e9:.2f} GB; {'train.py uses' if args.split == 'Train' else 'its sample grids use'} it from now on, until the folder is removed")


# The score atlas

def read(sets, stem, version):
    """(3, H, W) uint8 array, sides cut to multiples of 4: what training crops from."""
    return data.cut_to_x4(sets.read(stem, version))


def positions(shape, crop, stride):
    """[(top, left)] of a grid over (3, H, W), and how many rows and columns it has."""
    rows, columns = ((n - crop) // stride + 1 for n in shape[1:])
    return [(y * stride, x * stride) for y in range(rows) for x in range(columns)], rows, columns


def score_crops(reward, image, where, crop, batch_size, device):
    """Scores of the crops of one (3, H, W) uint8 array, [] of floats."""
    crops = [torch.from_numpy(np.array(image[:, y:y + crop, x:x + crop])) for y, x in where]
    with torch.no_grad():
        return torch.cat([reward(torch.stack(crops[k:k + batch_size]).to(device).float() / 255).cpu() for k in range(0, len(crops), batch_size)])


def atlas(args):
    world = runs.start_world(args.device, args.threads)
    runs.check_output(args.out_json, "--out-json")
    sets = data.find_sets(args.data, "Train")
    reward = iqa.create_reward(args.reward, world.device, args.reward_weights, fused=True)
    if args.compare:
        return compare(args, world, sets, reward)
    out = args.out or args.data / "atlas" / f"{'+'.join(re.sub(r'[^0-9A-Za-z_.-]', '_', name) for name, _ in iqa.parse_rewards(args.reward))}-{args.crop}-{args.stride}.npy"
    sizes = data.check_headers(data.TrainingSet(sets, "amo", None, 1, 1, args.crop), world)
    width, height = first = sets.size(sets.stems[0])
    for stem, size in sizes.items():
        if size != first:
            raise ValueError(f"{sets.path(stem)}: {size[0]}x{size[1]} pixels, unlike the first image, {width}x{height}: an atlas needs images of one size")
    _, rows, columns = positions((3, height // 4 * 4, width // 4 * 4), args.crop, args.stride)
    shape = (len(sets.stems), len(sets.versions), 2, rows, columns)
    about = {"reward": reward.identity(), "crop": args.crop, "stride": args.stride, "signature": sets.signature(), "versions": sets.versions, "stems": sets.stems, "shape": list(shape), **runs.describe_machine()}
    record = out.with_suffix(".json")
    if world.is_main:
        runs.check_output(out, "--out")
        if record.exists():
            try:
                before, table = data.Atlas.load(out)
                other = [k for k in ("reward", "crop", "stride", "signature", "versions", "stems", "shape") if before[k] != about[k]]
            except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{out}: damaged ({' '.join(str(error).split())[:80]}): remove it and {record}") from None
            if other:
                changed = "; its scores are of the images as they were then" if "signature" in other else ""
                raise ValueError(f"{out}: begun with other {' and '.join('images' if k == 'signature' else k for k in other)}{changed}: remove it and {record.name} to begin anew, or name another --out")
        elif out.exists():
            raise ValueError(f"{out}: is there, but not {record.name}, which would say what it is: name another --out, or remove it")
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(out.parent).free
            if 4 * math.prod(shape) + 4096 > free:
                raise OSError(f"{out}: {4 * math.prod(shape) / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")
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
                    raise ValueError(f"{sets.path(sets.stems[i], version)}: a score is not finite")
                table[i, k, flip] = scores.view(*grid).numpy()
        table.flush()                                                             # a set counts once its last version is there
    world.barrier()
    if world.is_main:
        if np.isnan(table).any():
            raise ValueError(f"{out}: {np.isnan(table).any((1, 2, 3, 4)).sum()} sets have no scores, although every process has ended: the same command continues")
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


def main(args):
    if args.job != "verify":
        return {"pack": pack, "atlas": atlas}[args.job](args)
    runs.check_output(args.out_json, "--out-json")
    report = verify(args.data, args.workers, args.similar)
    for defect in report.defects:
        print(f"{defect['kind']:<14} {defect['file']}: {defect['text']}")
    for split, counts in report.counts.items():
        print(f"{split}: " + ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in counts.items())
              + ("" if "positive" in counts else f"; no labels: {WITHOUT_LABELS[split]}"))
        if counts.get("without_positive"):
            print(f"{split}: {counts['without_positive']} of {counts['sets']} sets have no positive: {WITHOUT_POSITIVE[split]}")
    kinds = {d["kind"]: sum(e["kind"] == d["kind"] for e in report.defects) for d in report.defects}
    print(f"defects: {len(report.defects)}" + (f" ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})" if kinds else ""))
    if args.out_json:
        runs.save_json(args.out_json, {"command": sys.argv, "data": str(args.data), "counts": report.counts, "defects": report.defects})
    if report.defects:
        sys.exit(1)


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
