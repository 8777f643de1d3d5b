"""How well do NR-IQA metrics agree with people? (paper Sec. 3, Supp. 7; Tables 1, 2, 3, 4 and 6)

    python analyze_iqa.py --demo                                                        everything in small, synthetic preferences
    python analyze_iqa.py score --pairs train.csv --images SBS180K --columns left=A,right=B,score=C,methods=D+E --draw 3 --paper phase1 --out runs/phase1
    python analyze_iqa.py sbs runs/phase1                                               Tables 1 and 6
    python analyze_iqa.py score --pairs test.csv --images SBS180K --phase1 runs/phase1 --top 7 --paper test --out runs/sbs-test
    python analyze_iqa.py sbs runs/sbs-train runs/sbs-test                              Table 2
    python analyze_iqa.py complement runs/sbs-train runs/sbs-test --fails musiq         Table 3
    python analyze_iqa.py score --sets datasets/HGGT --paper hggt --out runs/hggt-scores && python analyze_iqa.py hggt runs/hggt-scores             Table 4
    python analyze_iqa.py recommend runs/sbs-test runs/hggt-scores                      which metric to train with, which to keep
    python analyze_iqa.py bapps FILES                                                   ready distances with votes of people

`score` is the slow step: every image by every metric, continued after an interruption, shared over the processes of torchrun. It leaves a folder of plain
files, pairs.csv or sets.csv, scores.csv (native units) and about.json, from which the analyses need no image. --scores FILE takes scores computed elsewhere.
Each analysis prints its tables and writes them beside the scores: .md, .tex, .csv, .json and .png.
"""
import argparse
from pathlib import Path

import runs


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=runs.Help)
    p.add_argument("--demo", action="store_true", help="all analyses on the demo set, whose untouched photographs stand in for people")
    commands = p.add_subparsers(dest="command", metavar="COMMAND")

    def command(name, text, runs_help=None):
        c = commands.add_parser(name, description=text, help=text, allow_abbrev=False, formatter_class=runs.Help)
        if runs_help:
            c.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=runs_help)
            c.add_argument("--out", type=Path, metavar="DIR", help="where the tables go; default: the first RUN")
            c.add_argument("--metrics", nargs="+", metavar="NAME", help="of those scored; default: all")
        return c

    c = command("score", "score images by metrics; leaves a folder that the analyses read")
    g = c.add_argument_group("people's preferences")
    g.add_argument("--pairs", type=Path, metavar="CSV", help="pairs of images with the fraction of people who prefer the second (SBS180K)")
    g.add_argument("--columns", default="left=left,right=right,score=score", metavar="left=A,right=B,score=C[,methods=D[+E]][,photo=F]",
                   help="names of the columns, or their numbers from 0 where there is no header; photo: pairs of one photo are not independent")
    g.add_argument("--method-pattern", metavar="REGEX", help="finds the SR method in the name of an image, for --draw; instead of methods=")
    g.add_argument("--photo-pattern", metavar="REGEX", help="finds the photo in the name of the left image; instead of photo=")
    g.add_argument("--draw", type=runs.SIZE, metavar="N", help="only so many pairs of every two methods (the paper's phase I: 3)")
    g.add_argument("--seed", type=runs.COUNT, default=0, help="of --draw")
    g.add_argument("--sets", type=Path, metavar="DIR", help="labelled quintuplets in HGGT's layout")
    g.add_argument("--split", choices=["Train", "Test"], default="Train", help="of --sets")
    g.add_argument("--all-sets", action="store_true", help="also quintuplets without a negative, which the paper leaves out")
    g.add_argument("--paper", choices=["phase1", "train", "test", "hggt"], help="which of the paper's results stands beside those of SBS180K (phase1, train, test) or of HGGT's training sets with a negative")
    g = c.add_argument_group("scores")
    g.add_argument("--images", type=Path, default=Path("."), metavar="DIR", help="what the image names of --pairs are relative to")
    g.add_argument("--metrics", nargs="+", metavar="NAME", help="pyiqa's no-reference metrics, ranker, module:function; default: the paper's 42 for --draw, else its 7")
    g.add_argument("--metric-weights", nargs="*", default=[], metavar="NAME=FILE", help="local weight files of metrics")
    g.add_argument("--phase1", type=Path, metavar="RUN", help="take the --top metrics of this analysed run")
    g.add_argument("--top", type=runs.SIZE, default=7, help="of --phase1 (the paper: 7)")
    g.add_argument("--keep-going", action="store_true", help="leave out metrics whose weights cannot be had, instead of stopping")
    g.add_argument("--scores", type=Path, metavar="CSV", help="ready scores instead: a column image, one per metric, native units")
    g.add_argument("--lower", nargs="*", default=[], metavar="NAME", help="metrics of --scores where lower is better")
    g.add_argument("--speed", action=argparse.BooleanOptionalAction, default=True, help="measure images/s, forward and with gradient, for `recommend`")
    g = c.add_argument_group("computing")
    g.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder to make, or to continue")
    g.add_argument("--batch-size", type=runs.SIZE, default=8, help="images of one size that a metric sees at a time")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    g.add_argument("--threads", type=runs.COUNT, default=0, help="CPU threads; 0: PyTorch's choice")

    command("sbs", "accuracy on pairs (Tables 1, 2 and 6), with intervals and paired tests", "folders of `score --pairs`")
    c = command("complement", "accuracy of the others where one metric fails (Table 3), and the full matrix", "folders of `score --pairs`")
    c.add_argument("--fails", default="musiq", metavar="NAME", help="the metric that fails")
    command("hggt", "rank correlation and misalignment on quintuplets (Table 4)", "one folder of `score --sets`")
    c = command("recommend", "which metric to train with, which to keep for evaluation", "folders of `score`, pairs and quintuplets")
    c = command("disagree", "a sheet of the pairs, or quintuplets, on which two metrics disagree most", "one folder of `score`")
    c.add_argument("--images", type=Path, default=Path("."), metavar="DIR", help="what the image names are relative to")
    c.add_argument("--count", type=runs.SIZE, default=8, help="pairs or quintuplets on the sheet")
    c.add_argument("--side", type=runs.number(int, 32), default=256, help="to which the longer side of an image is resized on the sheet, pixels")
    c = command("bapps", "accuracy and 2AFC score of full-reference distances on BAPPS's votes")
    c.add_argument("files", type=Path, nargs="+", metavar="CSV", help="name, distance of the first, of the second, 2AFC score, vote; no header")
    c.add_argument("--out", type=Path, default=Path("runs/bapps"), metavar="DIR", help="where the tables go")
    c = command("synthetic", "preferences without people: of two images the one nearer to the original; for trying the analyses, never as a finding")
    c.add_argument("--candidates", type=Path, nargs="+", required=True, metavar="DIR",
                   help="folders of images, <stem>.png or <stem>_<anything>.png; labels of quintuplets compare with the first")
    c.add_argument("--gt", type=Path, required=True, metavar="DIR", help="the originals")
    c.add_argument("--truth", default="psnr", metavar="NAME", help="full-reference metric that stands in for people")
    c.add_argument("--truth-weights", type=Path, metavar="FILE", help="its weights")
    c.add_argument("--tie", type=runs.WEIGHT, default=0.05, help="differences of the truth up to this are a tie, and `similar`")
    c.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder for pairs.csv, sets.csv and about.json")
    args = p.parse_args(argv)
    if args.demo == (args.command is not None):
        p.error("give a COMMAND, or --demo and nothing else")
    if args.command == "score":
        if args.pairs and args.sets:
            p.error("--pairs or --sets, one at a time")
        if args.metrics and args.phase1:
            p.error("--metrics or --phase1, not both")
        if args.lower and not args.scores:
            p.error("--lower is for ready --scores; the metrics themselves know their direction")
    return args


if __name__ == "__main__":
    ARGS = parse_args()                                                           # --help answers before torch is loaded

import json
import sys
import time

import numpy as np
import pandas as pd
import torch

import data
from images import cut_to_x4, image_size, list_images, load_image, match_images
from report import agreement, analyses

# Scoring

def score(args):
    world = runs.start_world(args.device, args.threads)
    about_file = args.out / "about.json"
    about = json.loads(about_file.read_text()) if about_file.exists() else {"truth": None, "metrics": {}, "left_out": []}
    frames, left_out = find_images(args, about, print if world.is_main else lambda text: None)
    if args.paper and about["truth"].startswith(agreement.SYNTHETIC):
        raise runs.UserError(f"--paper {args.paper}: these preferences are synthetic; the paper's are people's")
    names = list(dict.fromkeys(name for frame in frames.values() for column in ("left", "right", "image") if column in frame for name in frame[column]))
    if args.scores:
        scores, more = agreement.read_scores(args.scores)
        unknown = [m for m in args.lower if m not in scores.columns]
        if unknown:
            raise runs.UserError(f"--lower {' '.join(unknown)}: no such column in {args.scores}; it has {', '.join(scores.columns)}")
        metrics = {m: {"lower_is_better": m in args.lower, "source": str(args.scores)} for m in scores.columns}
        left_out += more
    else:
        scores, metrics, more = compute(args, names, about, world)
        left_out += more
        if (args.out / "scores.csv").exists():                                    # metrics scored in an earlier call stay
            before, _ = agreement.read_scores(args.out / "scores.csv")
            scores = scores.join(before.reindex(scores.index)[[m for m in before.columns if m not in scores.columns]])
    if not world.is_main:
        return
    absent = [name for name in names if name not in scores.index]
    if absent:
        left_out.append(f"{len(absent)} of {len(names)} images have no row of scores (first: {absent[0]})")
    if len(absent) == len(names):
        raise runs.UserError(f"--scores {args.scores}: has none of the {len(names)} images, such as {names[0]}; it has images such as {scores.index[0]}")
    about |= {"command": sys.argv, **runs.describe_machine(), "metrics": about["metrics"] | metrics, "left_out": left_out, "paper": args.paper}
    for name, frame in frames.items():
        analyses.write_csv(args.out / f"{name}.csv", frame, index=False)
    analyses.write_csv(args.out / "scores.csv", scores, index_label="image")
    runs.save_json(about_file, about)
    print("\n".join(left_out) or "nothing was left out")
    print(f"{args.out}: {len(names)} images, {len(scores.columns)} metrics; next: python analyze_iqa.py {'hggt' if 'sets' in frames else 'sbs'} {args.out}")


def find_images(args, about, say):
    """-> {"pairs" or "sets": DataFrame}, lines of what was left out. A folder that `synthetic` made, or that was begun, brings its own."""
    own = {name: args.out / f"{name}.csv" for name in ("pairs", "sets")}
    other = own["sets"] if args.pairs else own["pairs"]
    if (args.pairs or args.sets) and other.exists():
        raise runs.UserError(f"{args.out} holds {other.name}: name another --out for {'--pairs' if args.pairs else '--sets'}")
    if args.sets:
        sets = data.find_sets(args.sets, args.split)
        if sets is None:
            raise runs.UserError(f"--sets {args.sets}: no {args.split} split in it")
        labels = sets.labels().numpy()
        chosen = np.arange(len(labels)) if args.all_sets else np.flatnonzero((labels == data.NEGATIVE).any(1))
        if not len(chosen):
            raise runs.UserError(f"--sets {args.sets}: none of its {len(labels)} quintuplets has a negative, which the paper's analysis needs; --all-sets takes all of them")
        words = {data.ORIGINAL: "original"} | {code: word.lower() for word, code in data.LABELS.items()}
        rows = [(sets.stems[i], version, str(sets.path(sets.stems[i], version)), words[labels[i, k]], data.photo_of(sets.stems[i]))
                for i in chosen for k, version in enumerate(sets.versions)]
        say(f"{len(chosen)} of {len(labels)} quintuplets" + ("" if args.all_sets else " have a negative"))
        about["truth"] = f"labels of {args.sets}, {args.split}"
        return {"sets": pd.DataFrame(rows, columns=["set", "version", "image", "label", "photo"])}, []
    if args.pairs:
        pairs, left_out = agreement.read_pairs(args.pairs, args.columns, args.method_pattern, args.photo_pattern)
        if args.draw:
            whole, pairs = len(pairs), agreement.draw(pairs, args.draw, args.seed)
            say(f"{len(pairs)} of {whole} pairs: {args.draw} of every two methods, seed {args.seed}")
        for row in pairs.head(3).itertuples():
            say(f"understood: {row.score:.0%} of people prefer {row.right} to {row.left}" + (f" ({row.right_method} to {row.left_method})" if "left_method" in pairs else ""))
        beside = args.pairs.parent / "about.json"                                 # a copy of synthetic preferences stays synthetic
        made = json.loads(beside.read_text()).get("truth") or "" if beside.exists() else ""
        about["truth"] = made if made.startswith(agreement.SYNTHETIC) else f"votes of {args.pairs}"
        return {"pairs": pairs}, left_out
    found = {name: agreement.read_csv(path, "--out") for name, path in own.items() if path.exists()}
    if not found:
        raise runs.UserError(f"{args.out} has neither pairs.csv nor sets.csv: name preferences with --pairs CSV or --sets DIR")
    return found, [line for line in about["left_out"] if line.partition(" ")[2].startswith("pairs")]


def compute(args, names, about, world):
    """Score the images `names` by each metric -> (scores by name, {metric: facts}, lines of what was left out)."""
    import iqa  # the analyses do without, and are lighter
    wanted = args.metrics or (top_of(args.phase1, args.top) if args.phase1 else list(agreement.TABLE6) if args.draw else agreement.TOP7)
    files = dict(word.split("=", 1) for word in args.metric_weights if "=" in word)
    unknown = [word for word in args.metric_weights if word.partition("=")[0] not in wanted or "=" not in word]
    if unknown:
        raise runs.UserError(f"--metric-weights {unknown[0]}: write NAME=FILE with a NAME of --metrics ({', '.join(wanted)})")
    paths = [args.images / name for name in names]
    if not any(path.is_file() for path in paths):
        raise runs.UserError(f"--images {args.images}: none of the {len(paths)} images is in it, for example {paths[0]}")
    order = sorted(range(len(paths)), key=lambda i: size_of(paths[i]))             # images of one size follow each other
    columns, metrics, left_out = {}, {}, []
    for metric in wanted:
        try:
            reward = iqa.create_reward([metric], world.device, files.get(metric), flag="--metrics")
        except (ValueError, OSError) as error:
            if not args.keep_going:
                raise runs.UserError(f"{error} (--keep-going leaves such a metric out; scores so far are kept)") from None
            left_out.append(f"metric {metric} left out: {error}")
            continue
        lower = bool(getattr(next(iter(reward.models.values())), "lower_better", False))
        failed = {}
        values = iqa.score_images([paths[i] for i in order], reward, args.out / "cache", world, args.batch_size, "--out", failed).numpy()
        if np.isnan(values).all():
            text = f"--metrics {metric}: fails on every image, first: {next(iter(failed.values()))}"
            if not args.keep_going:
                raise runs.UserError(f"{text} (--keep-going leaves such a metric out)")
            left_out.append(f"metric {metric} left out: {text}")
            continue
        left_out += [f"{metric}: {len(failed)} of {len(paths)} images have no score (first: {path}: {why})" for path, why in list(failed.items())[:1]]
        column = np.empty(len(names))
        column[order] = -values if lower else values
        columns[metric] = column
        identity = reward.identity()
        before = about["metrics"].get(metric, {})
        speed = before.get("speed") if before.get("identity") == identity else None
        metrics[metric] = {"lower_is_better": lower, "identity": identity, "speed": speed or (measure(metric, files.get(metric), reward, world.device) if args.speed and world.is_main else None)}
    if not columns:
        raise runs.UserError("no metric is left: " + "; ".join(left_out))
    return pd.DataFrame(columns, index=names), metrics, left_out


def size_of(path):
    try:
        return image_size(path)
    except (ValueError, OSError):                                                 # score_images will name it
        return 0, 0


def top_of(run, count):
    """The most accurate metrics of an analysed phase I."""
    result = run / "sbs.json"
    if not result.exists():
        raise runs.UserError(f"--phase1 {run}: no sbs.json in it; make it with: python analyze_iqa.py sbs {run}")
    return list(json.loads(result.read_text())["accuracy"][0])[:count]


def measure(metric, weights_file, reward, device, crops=4, side=256):
    """{"forward", "backward": images/s on random crops, backward with the gradient to the pixels, None without one; "differentiable", "device"}.

    One crop first, as a warm-up; a metric that takes more than 2 s for it is measured by it.
    """
    import iqa

    def rate(model, gradient):
        for count in (1, crops):
            x = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                started = time.perf_counter()
                total = model(x).sum()
                (torch.autograd.grad(total, x)[0] if gradient else total).sum().item()              # waits for a GPU
            seconds = time.perf_counter() - started
            if seconds > 2:
                break
        return round(count / seconds, 3)
    try:
        backward = rate(iqa.create_reward([metric], device, weights_file, need_gradient=True, flag="--metrics"), True)
    except ValueError:                                                            # no usable gradient
        backward = None
    return {"forward": rate(reward, False), "backward": backward, "differentiable": backward is not None, "device": runs.describe_machine()["device"]}


# Preferences without people

def synthetic(args):
    import metrics as quality
    truth = quality.create_metric(args.truth, "cpu", args.truth_weights, flag="--truth")
    if not truth.full_reference:
        raise runs.UserError(f"--truth {args.truth}: not a full-reference metric; choose one that compares, for example psnr, ssim, vgg, lpips")
    originals = list_images(args.gt)
    names = {folder: folder.name for folder in args.candidates}
    if len(set(names.values())) < len(args.candidates) or len(names) < 2:
        raise runs.UserError("--candidates: two or more folders of different names")
    files = {folder: match_images(folder, originals, "--candidates") for folder in names}
    load = lambda path: cut_to_x4(load_image(path)[None].float() / 255)
    pairs, sets = [], []
    for stem, original in originals.items():
        gt = load(original)
        near = {f: (-1 if truth.lower_is_better else 1) * truth(load(files[f][stem]), gt).item() for f in names}
        order = list(names)
        for i, left in enumerate(order):
            for right in order[i + 1:]:
                delta = near[right] - near[left]
                pairs.append((str(files[left][stem]), str(files[right][stem]), 0.5 if abs(delta) <= args.tie else float(delta > 0), names[left], names[right], data.photo_of(stem)))
        for k, folder in enumerate(order):
            delta = near[folder] - near[order[0]]
            label = "original" if k == 0 else "similar" if abs(delta) <= args.tie else "positive" if delta > 0 else "negative"
            sets.append((stem, names[folder], str(files[folder][stem]), label, data.photo_of(stem)))
    runs.check_writable(args.out, "--out")
    args.out.mkdir(parents=True, exist_ok=True)
    analyses.write_csv(args.out / "pairs.csv", pd.DataFrame(pairs, columns=["left", "right", "score", "left_method", "right_method", "photo"]), index=False)
    analyses.write_csv(args.out / "sets.csv", pd.DataFrame(sets, columns=["set", "version", "image", "label", "photo"]), index=False)
    said = f"{agreement.SYNTHETIC}: preferred is what is nearer to {args.gt} by {args.truth}"
    runs.save_json(args.out / "about.json", {"truth": said, "metrics": {}, "left_out": [], "identity": truth.identity})
    print(f"{said}: {len(pairs)} pairs, {len(sets) // len(names)} sets in {args.out}; next: python analyze_iqa.py score --out {args.out} --metrics ...")


def demo():
    """Every analysis on the demo set: of two versions the one nearer to the untouched photograph counts as preferred."""
    if not Path("datasets/demo").exists():
        from prepare.demo_set import build_demo
        build_demo(Path("datasets/demo"))
    base, out = Path("datasets/demo/Test/GT/demo"), "runs/analysis-demo"
    candidates = [str(base / "images" / name) for name in ("original", "01", "02", "03", "04")]
    for words in (["synthetic", "--candidates", *candidates, "--gt", str(base / "untouched"), "--out", out],
                  ["score", "--out", out, "--metrics", "ranker", "piqe"], ["sbs", out], ["complement", out, "--fails", "ranker"], ["hggt", out], ["recommend", out],
                  ["disagree", out, "--metrics", "ranker", "piqe"]):
        print(f"$ python analyze_iqa.py {' '.join(words)}")
        main(parse_args(words))


def main(args):
    if args.demo:
        return demo()
    {"score": score, "synthetic": synthetic}.get(args.command, getattr(analyses, args.command, None))(args)


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
