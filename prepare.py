"""Check a quintuplet data set before days are spent on it.

    python prepare.py verify datasets/HGGT                      one line per defect, then a table; exit code 1 if there is a defect
    python prepare.py verify datasets/mine --out-json mine.json

Every image of Train and Test is decoded: damaged, grey or alpha, of another size than its original, missing, named like no original,
doubled, the same picture as another version, or of something else than its original shows. A gap in the version folders, and what
quintuplets.json lists and is not there. Labels, where there are any: a missing annotator or file, another stem's or version's votes, unknown words. Test LR images: a
quarter of their original. Train against Test: patches of one photo, or near-duplicates of a patch, in both.
"""
import argparse
import hashlib
import json
import sys
from pathlib import Path

import flags


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=flags.Help)
    sub = p.add_subparsers(dest="job", required=True)
    v = sub.add_parser("verify", help="list every defect of a data set", allow_abbrev=False, formatter_class=flags.Help)
    v.add_argument("data", type=Path, metavar="DIR", help="quintuplets in HGGT's layout (see data.py)")
    v.add_argument("--workers", type=flags.SIZE, default=8, help="images decoded at a time")
    v.add_argument("--similar", type=flags.number(float, 0, 1), default=0.98,
                   help="correlation of 32x32 thumbnails from which two patches are near-duplicates (CHOICE)")
    v.add_argument("--out-json", type=Path, help="write the defects and the counts here")
    return p.parse_args(argv)


ARGS = parse_args() if __name__ == "__main__" else None                           # --help needs no torch: seconds

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

import data
import runs

SPLITS = ("Train", "Test")
OTHER = 0.5             # CHOICE: correlation of thumbnails below which a version shows something else; enhanced photos have .98 and more


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


def compare_names(folder, found, expected, report):
    """found: {stem: path}; expected: the stems that should be there."""
    for stem in sorted(expected - set(found)):
        report.add("missing", folder / f"{stem}.png", "missing: fetch or make it again")
    for stem in sorted(set(found) - expected):
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
    """Decode everything. -> (stems of the originals, {stem: thumbnail} of the readable ones)."""
    files = {version: list_files(folder, report) for version, folder in folders["images"].items()}
    stems = set(files["original"])
    for version in list(files)[1:]:
        compare_names(folders["images"][version], files[version], {f"{s}_{version}" for s in stems}, report)
    todo = [(stem if version == "original" else stem.removesuffix(f"_{version}"), version, path)
            for version in files for stem, path in files[version].items()]
    if folders["lq"]:
        lq = list_files(folders["lq"], report)
        compare_names(folders["lq"], lq, stems, report)
        todo += [(stem, "LR", path) for stem, path in lq.items()]
    sizes, thumbnails, pixels = {}, {}, {}
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(decode, (path for _, _, path in todo))
        for (stem, version, path), (size, small, digest, problem) in zip(todo, tqdm(results, f"{split} images", len(todo), unit="img")):
            if problem:
                report.add("unreadable", path, problem)
                continue
            if version == "original":
                sizes[stem], thumbnails[stem] = size, small
                pixels[stem, digest] = version
            elif stem in sizes:                                                  # originals come first
                try:
                    (data.check_lr_size if version == "LR" else data.check_size)(path, size, sizes[stem])
                except ValueError as error:
                    report.add("size", path, str(error).removeprefix(f"{path}: "))
                if version == "LR":
                    continue
                if pixels.setdefault((stem, digest), version) != version:
                    report.add("identical", path, f"the same picture as {pixels[stem, digest]}: every version must differ")
                elif small[0] @ thumbnails[stem][0] < OTHER:
                    report.add("content", path, "does not show what its original shows: files of two sets swapped?")
    report.counts[split] = {"sets": len(stems), "photos": len({data.photo_of(s) for s in stems}), "versions": len(files)}
    if len(set(sizes.values())) > 1:
        report.counts[split]["sizes"] = len(set(sizes.values()))
    return sorted(stems), thumbnails


def verify_labels(split, folder, stems, versions, report):
    """Read every vote, and count the merged labels of the sets whose three votes are readable."""
    known = set(stems)
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


def verify_splits(train, test, folder, similar, report):
    """train, test: {stem: thumbnail}. Nothing of a test photo may be trained on."""
    shared = {data.photo_of(s) for s in train} & {data.photo_of(s) for s in test}
    for stem in sorted(s for s in test if data.photo_of(s) in shared):
        report.add("leak", folder / f"{stem}.png", f"photo {data.photo_of(stem)} is in Train too: all its patches belong to one side")
    if not train or not test:
        return
    names, vectors = list(train), np.stack(list(train.values()))                 # (N, 2, 1024)
    for stem, small in sorted(test.items()):
        for i in np.flatnonzero(data.look_alike(small, vectors, similar)):
            if data.photo_of(names[i]) != data.photo_of(stem):
                report.add("near-duplicate", folder / f"{stem}.png", f"looks like {names[i]} of Train")


def verify_record(root, stems, images, report):
    """What make_quintuplets.py --photos wrote down must be there: its sets, and a folder per enhancer."""
    file = root / "quintuplets.json"
    if not file.exists():
        return
    try:
        record = json.loads(file.read_text())
        listed = {stem for photo in record["photos"].values() for stem in photo.get("sets", [])}
    except (ValueError, KeyError, AttributeError) as error:
        report.add("unreadable", file, f"{type(error).__name__}: {error}; build the set again")
        return
    for version in sorted(set(record.get("enhancers", {})) - set(images)):
        report.add("missing", images["original"].with_name(version), "no such folder, but quintuplets.json names its enhancer")
    for stem in sorted(listed - stems):
        report.add("missing", images["original"] / f"{stem}.png", "missing, but listed in quintuplets.json")


def verify(root, workers=8, similar=0.98):
    """Look at everything under `root`. -> Report. FileNotFoundError or ValueError when there is no data set to look at."""
    root, report, listed, small, folders = Path(root), Report(), {}, {}, {}
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
        for empty in [] if folders[split]["labels"] else sorted(root.glob(f"{split}/**/labels")):
            report.add("label", empty, "no folders A, B and C in it: remove it, or add the votes")
        stems, small[split] = verify_images(split, folders[split], workers, report)
        listed[split] = stems
        if not stems:
            report.add("missing", folders[split]["images"]["original"], "no image in it")
        if folders[split]["labels"]:
            verify_labels(split, folders[split]["labels"], stems, list(folders[split]["images"]), report)
    if "Train" in small:
        verify_record(root, set(listed["Train"]), folders["Train"]["images"], report)
    if "Train" in small and "Test" in small:
        verify_splits(small["Train"], small["Test"], folders["Test"]["images"]["original"], similar, report)
    return report


def main(args):
    runs.check_output(args.out_json, "--out-json")
    report = verify(args.data, args.workers, args.similar)
    for defect in report.defects:
        print(f"{defect['kind']:<14} {defect['file']}: {defect['text']}")
    for split, counts in report.counts.items():
        print(f"{split}: " + ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in counts.items())
              + ("" if "positive" in counts else "; no labels: upos and smp cannot train on it"))
        if counts.get("without_positive"):
            print(f"{split}: upos and smp leave out {counts['without_positive']} of {counts['sets']} sets")
    kinds = {d["kind"]: sum(e["kind"] == d["kind"] for e in report.defects) for d in report.defects}
    print(f"defects: {len(report.defects)}" + (f" ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})" if kinds else ""))
    if args.out_json:
        runs.save_json(args.out_json, {"command": sys.argv, "data": str(args.data), "counts": report.counts, "defects": report.defects})
    if report.defects:
        sys.exit(1)


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
