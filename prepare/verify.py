"""Check a quintuplet data set before days are spent on it: one line per defect, then a table; exit code 1 if there is a defect.

    python -m prepare.verify datasets/HGGT
    python -m prepare.verify datasets/mine --out-json mine.json

Every image of Train and Test is decoded: damaged, grey or alpha, of another size than its original, missing, named like no original,
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
import sys
from pathlib import Path

import runs


# CHOICE: a test patch is a near-duplicate when the detail of the thumbnails correlates by CANDIDATE at the best shift, and that of DETAIL_SIDE
# pixels by SIMILAR. Measured on Kodak24, BSD100 and Urban100 (52 photos, patches of 160 to 448 px): JPEG copies of quality 70, 5 % darker, of
# another gamma, half of them mirrored, shifted by up to 1/16: lowest .77 (n = 733), lowest of DETAIL_SIDE .84 (n = 234). Patches of different
# photos: 99.99 % at most .59, highest .77 (174,720 ordered pairs), those 8 with .7 or more at most .37 in DETAIL_SIDE.
# Disjoint patches of one photo: facades reach .97 in both.
CANDIDATE, DETAIL_SIDE, SIMILAR = 0.7, 192, 0.8


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=runs.Help)
    p.add_argument("data", type=Path, metavar="DIR", help="quintuplets in HGGT's layout (see data.py)")
    p.add_argument("--workers", type=runs.SIZE, default=8, help="images decoded at a time")
    p.add_argument("--similar", type=runs.number(float, 0, 1), default=SIMILAR,
                   help="correlation of the detail, at the best shift, from which two patches are near-duplicates (CHOICE)")
    p.add_argument("--out-json", type=Path, help="write the defects and the counts here")
    return p.parse_args(argv)


ARGS = parse_args() if __name__ == "__main__" else None                           # --help needs no torch: seconds

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch.nn.functional as F
from scipy import ndimage
from tqdm import tqdm

import data
from images import IMAGE_SUFFIXES, load_image

SPLITS = ("Train", "Test")
# CHOICE: below both correlations of zero shift a file shows something else than its original. Enhanced photos have .98 and more; LR images
# after one or two rounds of degradations.py at least .84 and .74 (n = 95 patches of 256 px), other photos at most .73 and .46 (8,556 pairs).
OTHER_GREY, OTHER_DETAIL = 0.8, 0.5
WITHOUT_LABELS = {"Train": "upos and smp cannot train on it", "Test": "evaluate.py compares with the originals"}
WITHOUT_POSITIVE = {"Train": "upos and smp leave them out", "Test": "evaluate.py has no reference for them: its full-reference metrics stop"}


def thumbnail(image, side=48):
    """(3, H, W) uint8 -> (2, side, side): grey values, and their detail of 1 to 3 pixels; each of zero mean and unit norm.

    Detail tells pictures apart where light and shade do not (two skies); its finest part is left out, which a shift by half a pixel changes.
    """
    grey = F.interpolate(image.float().mean(0)[None, None], size=(side, side), mode="area")[0, 0].numpy()
    fine, coarse = (ndimage.gaussian_filter(grey, sigma, mode="nearest", truncate=3) for sigma in (1, 3))
    both = np.stack([grey, fine - coarse])
    both = both - both.mean((1, 2), keepdims=True)
    return both / np.maximum(np.linalg.norm(both, axis=(1, 2), keepdims=True), 1e-6)


def look_alike(some, many):
    """Correlation of the detail of every thumbnail of `some` (T, S, S) with that of every one of `many` (N, S, S). -> (N, T)

    The best of all shifts by up to 1/16 of the side (HGGT's patches move by +-16 of 512 pixels each, so two cuts of one photo are up to
    32 apart), mirrored or not. The middle of `some` slides over `many`, one matrix product per shift.
    """
    side = many.shape[-1]
    reach = side // 16
    inner = side - 2 * reach
    middle = some[:, reach:reach + inner, reach:reach + inner]
    middle = np.concatenate([middle, middle[:, :, ::-1]]).reshape(2 * len(some), -1)
    middle = middle - middle.mean(1, keepdims=True)
    middle /= np.maximum(np.linalg.norm(middle, axis=1, keepdims=True), 1e-6)
    found = []
    for first in range(0, len(many), 1024):                                      # a window of all at once would be hundreds of MB
        part = many[first:first + 1024]
        best = np.full((len(part), len(middle)), -1, np.float32)
        for top in range(2 * reach + 1):
            for left in range(2 * reach + 1):
                window = part[:, top:top + inner, left:left + inner].reshape(len(part), -1)
                window = window - window.mean(1, keepdims=True)
                window /= np.maximum(np.linalg.norm(window, axis=1, keepdims=True), 1e-6)
                np.maximum(best, window @ middle.T, out=best)
        found.append(np.maximum(best[:, :len(some)], best[:, len(some):]))
    return np.concatenate(found)


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
        if path.suffix.lower() not in IMAGE_SUFFIXES:
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
        image = load_image(path)
        if path.suffix.lower() == ".png" and b"IEND" not in tail(path, 32):
            raise runs.UserError("truncated: its end is missing; fetch or make it again")
    except (ValueError, OSError) as error:
        return None, None, None, " ".join(str(error).split()).removeprefix(f"{path}: ")
    return (image.shape[2], image.shape[1]), thumbnail(image), hashlib.sha256(image.numpy().tobytes()).digest(), None


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
    images = [load_image(path) for path in (one, other)]
    side = min(DETAIL_SIDE, *(min(image.shape[1:]) for image in images))
    a, b = (thumbnail(image, side)[1:] for image in images)
    return look_alike(a, b).item() >= similar


def verify_splits(train, test, small, similar, report):
    """train, test: {stem: path}; small: {split: {stem: thumbnail}}. Nothing of a test photo may be trained on."""
    shared = {data.photo_of(s) for s in train} & {data.photo_of(s) for s in test}
    for stem in sorted(s for s in test if data.photo_of(s) in shared):
        report.add("leak", test[stem], f"photo {data.photo_of(stem)} is in Train too: all its patches belong to one side")
    ours, theirs = (sorted(small[split]) for split in SPLITS)
    if not ours or not theirs:
        return
    alike = look_alike(*(np.stack([small[split][stem][1] for stem in stems]) for split, stems in (("Test", theirs), ("Train", ours))))
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


def main(args):
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
