"""Check a quintuplet data set before days are spent on it: one line per defect, then the counts.

    python -m prepare.verify datasets/HGGT
    python -m prepare.verify datasets/mine --out-json mine.json

The exit code is 1 if there is a defect. Checked are:
- every image of Train and Test, which is decoded: damaged, grey or with alpha, of another size than its original,
  missing, named like no original, doubled (a file, or a whole set under another name), the same picture as another
  version, or not showing the same as its original;
- the folders: a gap between the versions, a wrong name, and differences from quintuplets.json;
- labels, if there are any: a missing annotator or file, votes for another stem or version, unknown words;
- LR images of Test: a quarter of their original, and showing the same;
- Train against Test: patches of one photo in both, or near-duplicates of a patch.

Not detected: a copy of a training patch that is shifted by more than 1/16 of its side (32 of 512 pixels), rotated, or
scaled by 2 % or more; a wrong LR image or version that resembles its original in light and shade by chance. Patches of
one periodic facade may be reported as near-duplicates.
"""
import json
import sys
from pathlib import Path

import runs

# CHOICE: a test patch is a near-duplicate if the detail of the thumbnails correlates by CANDIDATE at the best shift,
# and that of thumbnails of DETAIL_SIDE pixels by SIMILAR. Measured on Kodak24, BSD100 and Urban100 (52 photos, patches
# of 160 to 448 px). Copies (JPEG of quality 70, 5 % darker, of another gamma, half of them mirrored, shifted by up to
# 1/16): lowest correlation 0.77 (n = 733), lowest at DETAIL_SIDE 0.84 (n = 234). Patches of different photos: 99.99 %
# have at most 0.59, the highest 0.77 (174,720 ordered pairs); the 8 pairs with 0.7 or more have at most 0.37 at
# DETAIL_SIDE. Disjoint patches of one photo: facades reach 0.97 in both.
CANDIDATE, DETAIL_SIDE, SIMILAR = 0.7, 192, 0.8


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("data", type=Path, metavar="DIR", help="quintuplets in HGGT's layout (see data.py)")
    p.add_argument("--workers", type=runs.SIZE, default=8, help="images decoded at a time")
    p.add_argument("--similar", type=runs.number(float, 0, 1), default=SIMILAR,
                   help="two patches are near-duplicates from this correlation of their detail, best shift (CHOICE)")
    p.add_argument("--out-json", type=Path, help="write the defects and the counts here")
    return p.parse_args(argv)


# before the imports that take seconds, so that --help answers at once
ARGS = parse_args() if __name__ == "__main__" else None

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch.nn.functional as F
from scipy import ndimage
from tqdm import tqdm

import data
from images import IMAGE_SUFFIXES, is_no_file, load_image, nfc, visible

SPLITS = ("Train", "Test")
# CHOICE: a file that has less than both correlations, at zero shift, does not show the same as its original. Enhanced
# photos have 0.98 or more, LR images after one or two rounds of degradations.py at least 0.84 and 0.74 (n = 95 patches
# of 256 px), other photos at most 0.73 and 0.46 (8,556 pairs).
OTHER_GREY, OTHER_DETAIL = 0.8, 0.5
WITHOUT_LABELS = {"Train": "upos and smp cannot train on it", "Test": "evaluate.py compares with the originals"}
WITHOUT_POSITIVE = {"Train": "upos and smp leave them out",
                    "Test": "evaluate.py has no reference for them: its full-reference metrics stop"}


def thumbnail(image, side=48):
    """(3, H, W) uint8 -> (2, side, side): grey values, their detail of 1 to 3 pixels; each of zero mean and unit norm.

    Detail distinguishes pictures of the same light and shade (two skies). Its finest part is left out: a shift by half
    a pixel changes it.
    """
    grey = F.interpolate(image.float().mean(0)[None, None], size=(side, side), mode="area")[0, 0].numpy()
    fine, coarse = (ndimage.gaussian_filter(grey, sigma, mode="nearest", truncate=3) for sigma in (1, 3))
    both = np.stack([grey, fine - coarse])
    both = both - both.mean((1, 2), keepdims=True)
    return both / np.maximum(np.linalg.norm(both, axis=(1, 2), keepdims=True), 1e-6)


def look_alike(some, many):
    """Correlations (N, T) of the detail of thumbnails: each of `some` (T, S, S) with each of `many` (N, S, S).

    The best of all shifts by up to 1/16 of the side, mirrored or not: HGGT's patches move by +-16 of 512 pixels each,
    so two cuts of one photo are up to 32 apart. The middle of `some` slides over `many`, one matrix product per shift.
    """
    side = many.shape[-1]
    reach = side // 16
    inner = side - 2 * reach
    middle = some[:, reach:reach + inner, reach:reach + inner]
    middle = np.concatenate([middle, middle[:, :, ::-1]]).reshape(2 * len(some), -1)
    middle = middle - middle.mean(1, keepdims=True)
    middle /= np.maximum(np.linalg.norm(middle, axis=1, keepdims=True), 1e-6)
    correlations = []
    # the windows of all at once would be hundreds of MB
    for first in range(0, len(many), 1024):
        part = many[first:first + 1024]
        best = np.full((len(part), len(middle)), -1, np.float32)
        for top in range(2 * reach + 1):
            for left in range(2 * reach + 1):
                window = part[:, top:top + inner, left:left + inner].reshape(len(part), -1)
                window = window - window.mean(1, keepdims=True)
                window /= np.maximum(np.linalg.norm(window, axis=1, keepdims=True), 1e-6)
                np.maximum(best, window @ middle.T, out=best)
        correlations.append(np.maximum(best[:, :len(some)], best[:, len(some):]))
    return np.concatenate(correlations)


@dataclass
class Report:
    """Defects [{"kind", "file", "text"}], and counts {split: {name: number}}."""
    defects: list = field(default_factory=list)
    counts: dict = field(default_factory=dict)

    def add(self, kind, file, text):
        self.defects.append({"kind": kind, "file": str(file), "text": text})


def list_files(folder, report):
    """{stem: path} of a folder's images; other files, and doubled names, are defects."""
    files = {}
    for path in visible(folder.iterdir()):
        stem = nfc(path.stem)
        if path.suffix.lower() not in IMAGE_SUFFIXES or is_no_file(path):
            report.add("foreign", path, "not an image: remove it")
        elif stem in files:
            report.add("doubled", path, f"a second image of this name beside {files[stem].name}: remove one")
        else:
            files[stem] = path
    return files


def compare_names(folder, files, expected, tolerated, report):
    """files: {stem: path}; expected: the stems that should be there; tolerated: stems whose original is missing."""
    for stem in sorted(expected - set(files)):
        report.add("missing", folder / f"{stem}.png", "missing: fetch or make it again")
    for stem in sorted(set(files) - expected - tolerated):
        report.add("misnamed", files[stem], "no original has this name: rename or remove it")


def tail(path, count):
    with open(path, "rb") as file:
        file.seek(-min(count, path.stat().st_size), 2)
        return file.read()


def decode(path):
    """-> ((width, height), thumbnail, hash of the pixels, None) or (None, None, None, the problem)."""
    try:
        image = load_image(path)
        if path.suffix.lower() == ".png" and b"IEND" not in tail(path, 32):
            raise runs.UserError("truncated: its end is missing; fetch or make it again")
    except (ValueError, OSError) as error:
        return None, None, None, " ".join(str(error).split()).removeprefix(f"{path}: ")
    pixels = runs.digest(image.numpy().tobytes())
    return (image.shape[2], image.shape[1]), thumbnail(image), pixels, None


def verify_images(split, folders, workers, report):
    """Decode everything.

    -> {stem: path} of the originals, {stem: thumbnail} of the readable ones, the stems whose original is missing.
    """
    files = {version: list_files(folder, report) for version, folder in folders["images"].items()}
    stems = set(files["original"])
    enhanced = list(files)[1:]
    named = [s.removesuffix(f"_{v}") for v in enhanced for s in files[v] if s.endswith(f"_{v}")]
    strays = Counter(stem for stem in named if stem not in stems)
    # if fewer versions have it, those are misnamed
    lost = {stem for stem, times in strays.items() if 2 * times >= len(enhanced)}
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
        results = tqdm(results, f"{split} images", len(todo), unit="img")
        for (stem, version, path), (size, small, digest, problem) in zip(todo, results):
            if problem:
                report.add("unreadable", path, problem)
                continue
            if version == "original":
                sizes[stem], thumbnails[stem] = size, small
                pixels[stem, digest] = version
                if first.setdefault(digest, stem) != stem:
                    report.add("doubled", path, f"the same picture as {first[digest]}: one photo under two names? "
                                                "Remove one set")
            # originals come first
            elif stem in sizes:
                try:
                    (data.check_lr_size if version == "LR" else data.check_size)(path, size, sizes[stem])
                except runs.UserError as error:
                    report.add("size", path, str(error).removeprefix(f"{path}: "))
                    # an LR image of another size shows another picture, or was cut
                    if version == "LR":
                        continue
                # two correlations
                grey, detail = (small * thumbnails[stem]).sum((1, 2))
                if version != "LR" and pixels.setdefault((stem, digest), version) != version:
                    other = pixels[stem, digest]
                    report.add("identical", path, f"the same picture as {other}: every version must differ")
                elif grey < OTHER_GREY and detail < OTHER_DETAIL:
                    report.add("content", path, "does not show what its original shows: files of two sets swapped?")
    photos = {data.photo_of(stem) for stem in stems}
    report.counts[split] = {"sets": len(stems), "photos": len(photos), "versions": len(files)}
    if len(set(sizes.values())) > 1:
        report.counts[split]["sizes"] = len(set(sizes.values()))
    return {stem: files["original"][stem] for stem in sorted(stems)}, thumbnails, lost


def verify_labels(split, folder, stems, lost, versions, report):
    """Read every vote, and count the merged labels of the sets whose three votes are readable.

    lost: stems without an original.
    """
    known = {*stems, *lost}
    for annotator in "ABC":
        if not (folder / annotator).is_dir():
            report.add("label", folder / annotator, "missing: HGGT's vote needs three annotators A, B and C")
            return
        for path in visible((folder / annotator).iterdir()):
            if path.suffix != ".json" or nfc(path.stem) not in known:
                report.add("misnamed", path, "no original has this name: rename or remove it")
    counts = dict.fromkeys(["positive", "similar", "negative", "without_positive"], 0)
    for stem in stems:
        votes = []
        for annotator in "ABC":
            path = data.label_file(folder / annotator, stem)
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
    """Do two image files show the same at four times the thumbnails' resolution? Facades look alike in thumbnails."""
    images = [load_image(path) for path in (one, other)]
    side = min(DETAIL_SIDE, *(min(image.shape[1:]) for image in images))
    a, b = (thumbnail(image, side)[1:] for image in images)
    return look_alike(a, b).item() >= similar


def verify_splits(train, test, small, similar, report):
    """train, test: {stem: path}; small: {split: {stem: thumbnail}}. Nothing of a test photo may be trained on."""
    shared = {data.photo_of(s) for s in train} & {data.photo_of(s) for s in test}
    for stem in sorted(s for s in test if data.photo_of(s) in shared):
        photo = data.photo_of(stem)
        report.add("leak", test[stem], f"photo {photo} is in Train too: all its patches belong to one side")
    stems = {split: sorted(small[split]) for split in SPLITS}
    if not stems["Train"] or not stems["Test"]:
        return
    details = {split: np.stack([small[split][stem][1] for stem in stems[split]]) for split in SPLITS}
    alike = look_alike(details["Test"], details["Train"])
    for column, row in np.argwhere(alike.T >= CANDIDATE):
        stem, name = stems["Test"][column], stems["Train"][row]
        if data.photo_of(name) != data.photo_of(stem) and detail_agrees(test[stem], train[name], similar):
            report.add("near-duplicate", test[stem], f"looks like {name} of Train")


def verify_record(root, stems, lost, images, report):
    """The sets that quintuplets.json lists must be there, and no others, with a folder for every enhancer it names."""
    file = root / "quintuplets.json"
    if not file.exists():
        return
    try:
        record = json.loads(file.read_text())
        listed = {stem for photo in record["photos"].values() for stem in photo.get("sets", [])}
        # prepare.demo_set records numbers only
        complete = all("sets" in photo for photo in record["photos"].values())
    except (ValueError, KeyError, AttributeError) as error:
        report.add("unreadable", file, f"{type(error).__name__}: {error}; build the set again")
        return
    for version in sorted(set(record.get("enhancers", {})) - set(images)):
        folder = images["original"].with_name(version)
        report.add("missing", folder, "no such folder, but quintuplets.json names its enhancer")
    for stem in sorted(listed - set(stems) - lost):
        report.add("missing", images["original"] / f"{stem}.png", "missing, but listed in quintuplets.json")
    for stem in sorted(set(stems) - listed) if complete else []:
        report.add("unlisted", stems[stem], "not in quintuplets.json: left over from another build? Remove this set")


def verify(root, workers=8, similar=SIMILAR):
    """Look at everything under `root`. -> Report. UserError when there is no data set to look at."""
    root, report, originals, lost, small, folders = Path(root), Report(), {}, {}, {}, {}
    for split in SPLITS:
        # HGGT's Test-100 alone
        if split == "Train" and not (root / "Train").exists() and (root / "Test").exists():
            continue
        folders[split] = data.find_folders(root, split)
        if folders[split] is None:
            continue
        images = folders[split]["images"]
        last = list(images)[-1]
        for number in range(1, int(last)):
            if f"{number:02d}" not in images:
                folder = images["original"].with_name(f"{number:02d}")
                report.add("missing", folder, f"no such folder, but there is {last}")
        numbered = [f for f in images["original"].parent.iterdir() if f.is_dir() and f.name.isdecimal()]
        wrong = sorted(f for f in numbered if f.name not in images)
        for folder in wrong:
            report.add("misnamed", folder, "versions have two digits, so this folder is not read: "
                                           f"rename it {int(folder.name):02d}, or remove it")
        for empty in [] if folders[split]["labels"] else sorted(root.glob(f"{split}/**/labels")):
            report.add("label", empty, "no folders A, B and C in it: remove it, or add the votes")
        originals[split], small[split], lost[split] = verify_images(split, folders[split], workers, report)
        if not originals[split]:
            report.add("missing", images["original"], "no image in it")
        if folders[split]["labels"]:
            # votes for a misnamed folder are not wrong themselves
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
        print(f"{split}: " + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items())
              + ("" if "positive" in counts else f"; no labels: {WITHOUT_LABELS[split]}"))
        if without := counts.get("without_positive"):
            print(f"{split}: {without} of {counts['sets']} sets have no positive: {WITHOUT_POSITIVE[split]}")
    kinds = Counter(defect["kind"] for defect in report.defects)
    summary = f" ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})" if kinds else ""
    print(f"defects: {len(report.defects)}{summary}")
    if args.out_json:
        runs.save_json(args.out_json, {"command": sys.argv, **runs.describe_machine(), "data": str(args.data),
                                       "counts": report.counts, "defects": report.defects})
    if report.defects:
        sys.exit(1)


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
