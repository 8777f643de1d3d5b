"""What people prefer, as analyze_iqa.py takes it: votes, labelled quintuplets, opinions; or made up without people."""
import json
import sys

import numpy as np
import pandas as pd

import data
import runs
from images import cut_to_x4, list_images, load_image, match_images
from report import agreement, opinions

KINDS = ("pairs", "sets", "mos", "choices")


def read_preferences(args, about, is_main):
    """-> {one of KINDS: DataFrame}, the truth in words, lines on what was left out.

    From --pairs, --sets, --mos or --choices; else from the folder --out, which `synthetic` or an earlier call of
    `score` made, and which may hold pairs and sets.
    """
    files = {kind: args.out / f"{kind}.csv" for kind in KINDS}
    given = next((kind for kind in KINDS if getattr(args, kind)), None)
    if given:
        for other in KINDS:
            if other != given and files[other].exists():
                raise runs.UserError(f"{args.out} holds {other}.csv: name another --out for --{given}")
        reader = {"pairs": read_votes, "sets": read_labelled_sets, "mos": read_mos, "choices": read_choices}[given]
        frame, truth, left_out, remarks = reader(args)
        if is_main:
            print("\n".join(remarks))
        return {given: frame}, truth, left_out
    frames = read_frames(args.out, "--out")
    if not frames:
        raise runs.UserError(f"{args.out} has neither pairs.csv nor sets.csv: name preferences with --pairs CSV, "
                             "--sets DIR, --mos CSV or --choices CSV")
    # keeps "12 pairs left out: ..."; lines on scores are written anew
    return frames, about["truth"], [line for line in about["left_out"] if " left out: " in line
                                    and line.split()[1] in ("pairs", "opinions", "choices")]


def read_frames(folder, flag):
    """{kind: DataFrame} of the files that `score` or `synthetic` left in a folder."""
    readers = {"mos": lambda path, flag: opinions.read_mos(path, flag=flag)[0],
               "choices": lambda path, flag: opinions.read_choices(path, flag=flag)[0]}
    return {kind: readers.get(kind, agreement.read_csv)(folder / f"{kind}.csv", flag) for kind in KINDS
            if (folder / f"{kind}.csv").exists()}


def read_labelled_sets(args):
    """--sets -> DataFrame of set, version, image, label, photo; the truth; [] left out; remarks to print."""
    sets = data.find_sets(args.sets, args.split, packed=False)
    if sets is None:
        raise runs.UserError(f"--sets {args.sets}: no {args.split} split in it")
    labels = sets.labels().numpy()
    chosen = np.arange(len(labels)) if args.all_sets else np.flatnonzero((labels == data.NEGATIVE).any(1))
    if not len(chosen):
        raise runs.UserError(f"--sets {args.sets}: none of its {len(labels)} quintuplets has a negative, which the "
                             "paper's analysis needs; --all-sets takes all of them")
    names = {data.ORIGINAL: "original"} | {code: label.lower() for label, code in data.LABELS.items()}
    rows = []
    for i in chosen:
        stem = sets.stems[i]
        rows += [(stem, version, str(sets.path(stem, version)), names[labels[i, k]], sets.photo(stem))
                 for k, version in enumerate(sets.versions)]
    remark = (f"{len(chosen)} of {len(labels)} quintuplets" + ("" if args.all_sets else " have a negative")
              + f"; {sets.grouping()}")
    frame = pd.DataFrame(rows, columns=["set", "version", "image", "label", "photo"])
    return frame, f"labels of {args.sets}, {args.split}", [], [remark]


def read_votes(args):
    """--pairs -> DataFrame of agreement.read_pairs; the truth; lines on pairs left out; remarks to print."""
    pairs, left_out = agreement.read_pairs(args.pairs, args.columns or agreement.COLUMNS, args.method_pattern,
                                           args.photo_pattern)
    remarks = []
    if args.draw:
        total, pairs = len(pairs), agreement.draw(pairs, args.draw, args.seed)
        remarks.append(f"{len(pairs)} of {total} pairs: {args.draw} of every two methods, seed {args.seed}")
    for row in pairs.head(3).itertuples():
        methods = f" ({row.right_method} to {row.left_method})" if "left_method" in pairs else ""
        remarks.append(f"understood: {row.score:.0%} of people prefer {row.right} to {row.left}{methods}")
    # a copy of synthetic preferences stays synthetic
    beside = args.pairs.parent / "about.json"
    truth = json.loads(beside.read_text()).get("truth") or "" if beside.exists() else ""
    return pairs, truth if truth.startswith(agreement.SYNTHETIC) else f"votes of {args.pairs}", left_out, remarks


def read_mos(args):
    """--mos -> DataFrame of opinions.read_mos; the truth; lines on rows left out; remarks to print."""
    mos, left_out = opinions.read_mos(args.mos, args.columns, args.mos_lower)
    best, worst = mos.loc[mos.mos.idxmax()], mos.loc[mos.mos.idxmin()]
    remark = f"understood: of {len(mos)} images people like {best.image} most and {worst.image} least"
    return mos, f"opinions of {args.mos}", left_out, [remark]


def read_choices(args):
    """--choices -> DataFrame of opinions.read_choices; the truth; lines on rows left out; remarks to print."""
    choices, left_out = opinions.read_choices(args.choices, args.columns, args.methods, args.name_pattern)
    first = choices.iloc[0]
    remarks = [f"understood: of {', '.join(first.candidates)} in scene {first.scene}, {first.observer} selected "
               f"{first.selected}", f"{len(choices)} choices of {choices.observer.nunique()} observers in "
               f"{choices.scene.nunique()} scenes"]
    return choices, f"choices of {args.choices}", left_out, remarks


# Preferences without people

def synthetic(args):
    from metrics import create_metric
    truth = create_metric(args.truth, "cpu", args.truth_weights, flag="--truth")
    if not truth.full_reference:
        raise runs.UserError(f"--truth {args.truth}: not a full-reference metric; choose one that compares, for "
                             "example psnr, ssim, vgg, lpips")
    originals, methods = list_images(args.gt), [folder.name for folder in args.candidates]
    if len(set(methods)) < len(methods) or len(methods) < 2:
        raise runs.UserError("--candidates: two or more folders of different names")
    files = [match_images(folder, originals, "--candidates") for folder in args.candidates]
    patches = any(map(holds_patches, [args.gt, *args.candidates]))

    def load(path):
        return cut_to_x4(load_image(path)[None].float() / 255)
    pairs, sets = [], []
    for stem, original in originals.items():
        photo, gt = data.photo_of(stem) if patches else stem, load(original)
        paths = [candidates[stem] for candidates in files]
        sign = -1 if truth.lower_is_better else 1
        nearness = [sign * truth(load(path), gt).item() for path in paths]
        for i in range(len(paths)):
            for j in range(i + 1, len(paths)):
                delta = nearness[j] - nearness[i]
                vote = 0.5 if abs(delta) <= args.tie else float(delta > 0)
                pairs.append((str(paths[i]), str(paths[j]), vote, methods[i], methods[j], photo))
            delta = nearness[i] - nearness[0]
            label = "similar" if abs(delta) <= args.tie else "positive" if delta > 0 else "negative"
            sets.append((stem, methods[i], str(paths[i]), label if i else "original", photo))
    runs.check_writable(args.out, "--out")
    args.out.mkdir(parents=True, exist_ok=True)
    pairs = pd.DataFrame(pairs, columns=["left", "right", "score", "left_method", "right_method", "photo"])
    agreement.write_csv(args.out / "pairs.csv", pairs, index=False)
    sets = pd.DataFrame(sets, columns=["set", "version", "image", "label", "photo"])
    agreement.write_csv(args.out / "sets.csv", sets, index=False)
    text = f"{agreement.SYNTHETIC}: preferred is what is nearer to {args.gt} by {args.truth}"
    runs.save_json(args.out / "about.json", {"command": sys.argv, **runs.describe_machine(), "truth": text,
                                             "metrics": {}, "left_out": [], "identity": truth.identity})
    photos = sets.photo.nunique()
    print(f"{text}: {len(pairs)} pairs, {len(originals)} sets of {photos} photographs"
          f"{', grouped by <photo>-<row>-<column>,' if photos < len(originals) else ''} in {args.out}; "
          f"next: python analyze_iqa.py score --out {args.out} --metrics ...")


def holds_patches(folder):
    """Does the folder belong to a set in HGGT's layout (ROOT/Train or ROOT/Test/GT, with */*/original in it)?

    Only there names are <photo>-<row>-<column>; of other names, such as trip-2023-01, nothing is read.
    """
    bases = [base for base in folder.resolve().parents if base.name == "Train" or base.match("Test/GT")]
    return any(next(base.glob("*/*/[Oo]riginal"), None) for base in bases)
