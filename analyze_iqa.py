"""How well do NR-IQA metrics agree with people? (paper Sec. 3, Supp. 7; Tables 1, 2, 3, 4 and 6)

    python analyze_iqa.py --demo                  all analyses in small, with synthetic preferences

    phase I (Tables 1 and 6)
        python analyze_iqa.py score --pairs train.csv --images SBS180K --draw 3 --paper phase1 --out runs/phase1 \\
            --columns left=A,right=B,score=C,methods=D+E
        python analyze_iqa.py sbs runs/phase1
    phase II (Tables 2 and 3); test.csv with --paper test likewise
        python analyze_iqa.py score --pairs train.csv --images SBS180K --phase1 runs/phase1 --paper train \\
            --columns left=A,right=B,score=C --out runs/sbs-train
        python analyze_iqa.py sbs runs/sbs-train runs/sbs-test
        python analyze_iqa.py complement runs/sbs-train runs/sbs-test --fails musiq
    quintuplets (Table 4)
        python analyze_iqa.py score --sets datasets/HGGT --paper hggt --out runs/hggt-scores
        python analyze_iqa.py hggt runs/hggt-scores
    opinions of people: scores of single images, and choices of the best of several methods' images
        python analyze_iqa.py score --mos labels.csv --images CLIVE --metrics musiq niqe --out runs/clive
        python analyze_iqa.py mos runs/clive
        python analyze_iqa.py score --choices votes.csv --images STUDY --metrics musiq niqe --out runs/study
        python analyze_iqa.py choices runs/study
    the metric to train with, and those to keep for evaluation
        python analyze_iqa.py recommend runs/sbs-test runs/hggt-scores
    published distances with votes of people
        python analyze_iqa.py bapps FILES

`score` is the slow step: it scores every image by every metric, continues after an interruption, and shares the
images over the processes of torchrun. It leaves a folder of plain files, pairs.csv, sets.csv, mos.csv or choices.csv,
scores.csv (native units) and about.json, from which the analyses are computed. --scores FILE takes scores computed
elsewhere; the forms of opinions are described in report/opinions.py.
Each analysis prints its tables and writes them to --out: .md, .tex, .csv, .json and .png.
"""
import argparse
from pathlib import Path

import runs

DEMO = Path("datasets/demo/Test/GT/demo")


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--demo", action="store_true",
                   help="all analyses on the demo set, whose untouched photographs stand in for people")
    commands = p.add_subparsers(dest="command", metavar="COMMAND")

    def command(name, text, folders=None):
        c = commands.add_parser(name, description=text, help=text)
        if folders:
            c.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=folders)
            c.add_argument("--out", type=Path, metavar="DIR", help="folder of the tables; default: the first RUN")
            c.add_argument("--metrics", nargs="+", metavar="NAME", help="some of the scored metrics; default: all")
        return c

    add_score(command("score", "score images by metrics; leaves a folder that the analyses read"))
    command("sbs", "accuracy on pairs (Tables 1, 2 and 6), with intervals and paired tests",
            "folders of `score --pairs`")
    c = command("complement", "accuracy of the other metrics where one fails (Table 3), and the full matrix",
                "folders of `score --pairs`")
    c.add_argument("--fails", default="musiq", metavar="NAME", help="the metric that fails")
    command("hggt", "rank correlation and misalignment on quintuplets (Table 4)", "one folder of `score --sets`")
    command("mos", "correlations with mean opinion scores, of all images and on ten splits",
            "folders of `score --mos`")
    command("choices", "agreement with choices of the best of several, floors and ceilings, strengths of the methods",
            "folders of `score --choices`")
    command("recommend", "the metric to train with, and the metrics to keep for evaluation",
            "folders of `score`: pairs, choices, opinions, quintuplets")
    c = command("disagree", "a sheet of the pairs, or quintuplets, on which two metrics disagree most",
                "one folder of `score`")
    c.add_argument("--images", type=Path, default=Path("."), metavar="DIR",
                   help="folder that the image names start from")
    c.add_argument("--count", type=runs.SIZE, default=8, help="pairs or quintuplets on the sheet")
    c.add_argument("--side", type=runs.number(int, 32), default=256,
                   help="longer side of an image on the sheet, in pixels")
    c = command("bapps", "accuracy and 2AFC score of full-reference distances on BAPPS's votes")
    c.add_argument("files", type=Path, nargs="+", metavar="CSV",
                   help="name, distance of the first, of the second, 2AFC score, vote; no header")
    c.add_argument("--out", type=Path, default=Path("runs/bapps"), metavar="DIR", help="folder of the tables")
    add_synthetic(command("synthetic", "preferences without people: of two images the one nearer to the original; for "
                                       "trying the analyses, never as a finding"))
    args = p.parse_args(argv)
    if args.demo == (args.command is not None):
        p.error("give a COMMAND, or --demo and nothing else")
    if args.command == "score":
        if sum(bool(given) for given in (args.pairs, args.sets, args.mos, args.choices)) > 1:
            p.error("--pairs or --sets or --mos or --choices, one at a time")
        if args.metrics and args.phase1:
            p.error("--metrics or --phase1, not both")
        if args.lower and not args.scores:
            p.error("--lower is for ready --scores; the metrics themselves know their direction")
        if args.scores and (args.metrics or args.phase1 or args.metric_weights):
            p.error("--scores takes ready ones: compute others in a second call, with --metrics and the same --out")
        for flag, kind in (("draw", "pairs"), ("method_pattern", "pairs"), ("photo_pattern", "pairs"),
                           ("all_sets", "sets"), ("mos_lower", "mos"), ("methods", "choices"),
                           ("name_pattern", "choices")):
            if getattr(args, flag) and not getattr(args, kind):
                p.error(f"--{flag.replace('_', '-')} is for --{kind}")
    return args


def add_score(p):
    g = p.add_argument_group("people's preferences")
    g.add_argument("--pairs", type=Path, metavar="CSV",
                   help="pairs of images with the fraction of people who prefer the second (SBS180K)")
    g.add_argument("--mos", type=Path, metavar="CSV", help="mean opinion scores of images: image, mos[, std]")
    g.add_argument("--mos-lower", action="store_true", help="a lower score of --mos is better (DMOS)")
    g.add_argument("--choices", type=Path, metavar="CSV",
                   help="best of several: observer, scene, candidates (methods, A|B|C), selected; --images holds "
                        "METHOD/SCENE.png")
    g.add_argument("--methods", nargs="+", metavar="NAME",
                   help="the candidates of every row of --choices, where no column has them")
    g.add_argument("--name-pattern", metavar="REGEX",
                   help="splits the image names of --choices into (?P<scene>...) and (?P<method>...), where no column "
                        "has the scene")
    g.add_argument("--columns", metavar="ROLE=NAME,...",
                   help="names of the columns, or their numbers from 0 where there is no header; of --pairs: "
                        "left=A,right=B,score=C[,methods=D[+E]][,photo=F] (pairs of one photo are not independent); of "
                        "--mos: image=A,mos=B[,std=C]; of --choices: selected=A[,candidates=B[+C]][,scene=D]"
                        "[,observer=E]; default: the roles themselves")
    g.add_argument("--method-pattern", metavar="REGEX",
                   help="finds the SR method in the name of an image, for --draw; instead of methods=")
    g.add_argument("--photo-pattern", metavar="REGEX",
                   help="finds the photo in the name of the left image; instead of photo=")
    g.add_argument("--draw", type=runs.SIZE, metavar="N",
                   help="take only N random pairs of every two methods (the paper's phase I: 3)")
    g.add_argument("--seed", type=runs.COUNT, default=0, help="of --draw")
    g.add_argument("--sets", type=Path, metavar="DIR", help="labelled quintuplets in HGGT's layout")
    g.add_argument("--split", choices=["Train", "Test"], default="Train", help="of --sets")
    g.add_argument("--all-sets", action="store_true",
                   help="also take quintuplets without a negative, which the paper leaves out")
    g.add_argument("--paper", choices=["phase1", "train", "test", "hggt"],
                   help="show the paper's results beside these: of SBS180K (phase1, train, test), or of HGGT's "
                        "training sets with a negative")
    g = p.add_argument_group("scores")
    g.add_argument("--images", type=Path, default=Path("."), metavar="DIR",
                   help="folder that the image names of --pairs, --mos and --choices start from")
    g.add_argument("--metrics", nargs="+", metavar="NAME",
                   help="pyiqa's no-reference metrics, ranker, module:function; default: the paper's 42 with --draw, "
                        "else its 7")
    g.add_argument("--metric-weights", nargs="*", default=[], metavar="NAME=FILE", help="local weight files of metrics")
    g.add_argument("--phase1", type=Path, metavar="RUN", help="take the --top metrics of this analysed run")
    g.add_argument("--top", type=runs.SIZE, default=7, help="of --phase1 (the paper: 7)")
    g.add_argument("--keep-going", action="store_true",
                   help="leave out metrics that cannot be created or score no image, instead of stopping")
    g.add_argument("--scores", type=Path, metavar="CSV",
                   help="ready scores instead: a column image, one per metric, native units")
    g.add_argument("--lower", nargs="*", default=[], metavar="NAME", help="metrics of --scores where lower is better")
    g.add_argument("--speed", action=argparse.BooleanOptionalAction, default=True,
                   help="measure images/s, forward and with gradient, for `recommend`")
    g = p.add_argument_group("computing")
    g.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder to make, or to continue")
    g.add_argument("--batch-size", type=runs.SIZE, default=8, help="images of one size that a metric sees at a time")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    g.add_argument("--threads", type=runs.COUNT, default=0, help="CPU threads; 0: PyTorch's choice")


def add_synthetic(p):
    p.add_argument("--candidates", type=Path, nargs="+", required=True, metavar="DIR",
                   help="folders of images, <stem>.png or <stem>_<anything>.png; labels of quintuplets compare with "
                        "the first")
    p.add_argument("--gt", type=Path, required=True, metavar="DIR",
                   help="the originals; pairs are grouped by photo where one of these folders belongs to a set in "
                        "HGGT's layout, whose names are <photo>-<row>-<column>")
    p.add_argument("--truth", default="psnr", metavar="NAME", help="full-reference metric that stands in for people")
    p.add_argument("--truth-weights", type=Path, metavar="FILE", help="its weights")
    p.add_argument("--tie", type=runs.WEIGHT, default=0.05,
                   help="differences of the truth up to this are a tie, and `similar`")
    p.add_argument("--out", type=Path, required=True, metavar="RUN",
                   help="folder for pairs.csv, sets.csv and about.json")


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import json
import sys
import time

import numpy as np
import pandas as pd
import torch

from images import image_size

# the top level imports the support folders only where it uses them
agreement, analyses = runs.Lazy("report.agreement"), runs.Lazy("report.analyses")
opinion_analyses, opinions = runs.Lazy("report.opinion_analyses"), runs.Lazy("report.opinions")
preferences, tables = runs.Lazy("report.preferences"), runs.Lazy("report.tables")

# the analysis of a kind of preferences
NEXT = {"pairs": "sbs", "sets": "hggt", "mos": "mos", "choices": "choices"}


# Scoring

def score(args):
    world = runs.start_world(args.device, args.threads)
    about_file, about = args.out / "about.json", {"truth": None, "metrics": {}, "left_out": []}
    if about_file.exists():
        about = json.loads(about_file.read_text())
    before = about["truth"]
    frames, about["truth"], left_out = preferences.read_preferences(args, about, world.is_main)
    # kept where only metrics are added
    paper = args.paper or (about.get("paper") if about["truth"] == before else None)
    if args.paper and about["truth"].startswith(agreement.SYNTHETIC):
        raise runs.UserError(f"--paper {args.paper}: these preferences are synthetic; the paper's are people's")
    columns = [frame[column] for frame in frames.values() for column in ("left", "right", "image") if column in frame]
    names = list(dict.fromkeys(name for column in columns for name in column))
    if "choices" in frames:
        names = opinions.names_of(frames["choices"])
    guarded = "mos" in frames or "choices" in frames
    if args.scores:
        scores, more = agreement.read_scores(args.scores)
        unknown = [m for m in args.lower if m not in scores.columns]
        if unknown:
            raise runs.UserError(f"--lower {' '.join(unknown)}: no such column in {args.scores}; "
                                 f"it has {', '.join(scores.columns)}")
        metrics = {m: {"lower_is_better": m in args.lower, "source": str(args.scores)} for m in scores.columns}
    else:
        files = opinions.images_of(frames["choices"], args.images) if "choices" in frames else {}
        paths = [files.get(name) or args.images / name for name in names]
        chosen = list(args.metrics or default_metrics(args))
        # the guard that every table of opinions has
        chosen += [tables.CONTROL] * (guarded and tables.CONTROL not in chosen)
        scores, metrics, more = compute(args, names, paths, chosen, about["metrics"], world)
    # metrics scored in an earlier call stay
    if (args.out / "scores.csv").exists():
        earlier, _ = agreement.read_scores(args.out / "scores.csv")
        scores = scores.join(earlier.reindex(scores.index)[[m for m in earlier.columns if m not in scores.columns]])
    left_out += more
    if guarded and tables.CONTROL not in scores:
        column, facts, more = control(args, names, frames, world)
        scores, metrics, left_out = scores.join(column), metrics | facts, left_out + more
    if not world.is_main:
        return
    absent = [name for name in names if name not in scores.index]
    if len(absent) == len(names):
        raise runs.UserError(f"--scores {args.scores}: has none of the {len(names)} images, such as {names[0]}; "
                             f"it has images such as {scores.index[0]}")
    if absent:
        left_out.append(f"{len(absent)} of {len(names)} images have no row of scores (first: {absent[0]})")
    about |= {"command": sys.argv, **runs.describe_machine(), "metrics": about["metrics"] | metrics,
              "left_out": left_out, "paper": paper}
    for name, frame in frames.items():
        path = args.out / f"{name}.csv"
        opinions.write_choices(path, frame) if name == "choices" else agreement.write_csv(path, frame, index=False)
    agreement.write_csv(args.out / "scores.csv", scores, index_label="image")
    runs.save_json(about_file, about)
    print("\n".join(left_out) or "nothing was left out")
    print(f"{args.out}: {len(names)} images, {len(scores.columns)} metrics; "
          f"next: python analyze_iqa.py {NEXT[next(reversed(frames))]} {args.out}")


def control(args, names, frames, world):
    """compute()'s result for the guard alone, beside ready scores; where it fails, nothing and a line that says so."""
    try:
        files = opinions.images_of(frames["choices"], args.images, strict=False) if "choices" in frames else {}
        paths = [files.get(name) or args.images / name for name in names]
        return compute(args, names, paths, [tables.CONTROL], {}, world)
    except runs.UserError as error:
        line = f"{tables.shown(tables.CONTROL)}, the guard, is absent: it needs the images in --images ({error})"
        return pd.DataFrame(index=names), {}, [line]


def compute(args, names, paths, metrics, known, world):
    """Score images, known as `names`, by each metric -> (scores by name, {metric: facts}, lines on what was left out).

    known: facts of an earlier call, whose speeds are kept.
    """
    import iqa
    files = dict(word.split("=", 1) for word in args.metric_weights if "=" in word)
    unknown = [word for word in args.metric_weights if word.partition("=")[0] not in metrics or "=" not in word]
    if unknown:
        raise runs.UserError(f"--metric-weights {unknown[0]}: write NAME=FILE with a NAME of --metrics "
                             f"({', '.join(metrics)})")
    if not any(path.is_file() for path in paths):
        raise runs.UserError(f"--images {args.images}: none of the {len(paths)} images is in it, "
                             f"for example {paths[0]}")
    # images of one size follow each other, so that they share batches
    order = sorted(range(len(paths)), key=lambda i: size_of(paths[i]))
    columns, facts, left_out = {}, {}, []
    for metric in metrics:
        try:
            reward = iqa.create_reward([metric], world.device, files.get(metric), flag="--metrics")
        except (ValueError, OSError) as error:
            # iqa's errors, and those of pyiqa itself
            if not args.keep_going:
                remedy = "--keep-going leaves such a metric out; scores so far are kept"
                raise runs.UserError(f"{error} ({remedy})") from error
            left_out.append(f"metric {metric} left out: {error}")
            continue
        failed = {}
        values = iqa.score_images([paths[i] for i in order], reward, args.out / "cache", world, args.batch_size,
                                  "--out", failed).numpy()
        if np.isnan(values).all():
            text = f"--metrics {metric}: fails on every image, first: {next(iter(failed.values()))}"
            if not args.keep_going:
                raise runs.UserError(f"{text} (--keep-going leaves such a metric out)")
            left_out.append(f"metric {metric} left out: {text}")
            continue
        for path, reason in list(failed.items())[:1]:
            left_out.append(f"{metric}: {len(failed)} of {len(paths)} images have no score (first: {path}: {reason})")
        lower = bool(getattr(next(iter(reward.models.values())), "lower_better", False))
        columns[metric] = np.empty(len(names))
        columns[metric][order] = -values if lower else values
        identity, earlier = reward.identity(), known.get(metric, {})
        speed = earlier.get("speed") if earlier.get("identity") == identity else None
        if not speed and args.speed and world.is_main:
            speed = measure_speed(metric, files.get(metric), reward, world.device)
        facts[metric] = {"lower_is_better": lower, "identity": identity, "speed": speed}
    if not columns:
        raise runs.UserError("no metric is left: " + "; ".join(left_out))
    return pd.DataFrame(columns, index=names), facts, left_out


def default_metrics(args):
    """The best of --phase1, else the paper's: its 42 of phase I with --draw, its 7 of phase II without."""
    if not args.phase1:
        return list(agreement.paper_table(6)) if args.draw else list(agreement.TOP7)
    result = args.phase1 / "sbs.json"
    if not result.exists():
        raise runs.UserError(f"--phase1 {args.phase1}: no sbs.json in it; make it with: "
                             f"python analyze_iqa.py sbs {args.phase1}")
    return list(json.loads(result.read_text())["accuracy"][0])[:args.top]


def size_of(path):
    """(width, height), or (0, 0) for an image that cannot be read: score_images names it."""
    try:
        return image_size(path)
    except (runs.UserError, OSError):
        return 0, 0


def measure_speed(metric, weights_file, reward, device, crops=4, side=256):
    """{"forward", "backward": images/s on random crops; "differentiable", "device"}.

    backward: with the gradient to the pixels; None for a metric without one. The first crop is a warm-up; if it takes
    more than 2 s it is the measurement.
    """
    import iqa

    def rate(model, gradient):
        for count in (1, crops):
            x = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))
            x = x.to(device).requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                started = time.perf_counter()
                total = model(x).sum()
                # .item() waits for a GPU
                (torch.autograd.grad(total, x)[0] if gradient else total).sum().item()
            seconds = time.perf_counter() - started
            if seconds > 2:
                break
        return round(count / seconds, 3)
    try:
        with_gradient = iqa.create_reward([metric], device, weights_file, need_gradient=True, flag="--metrics")
        backward = rate(with_gradient, True)
    except ValueError:
        # no usable gradient
        backward = None
    return {"forward": rate(reward, False), "backward": backward, "differentiable": backward is not None,
            "device": runs.describe_machine()["device"]}


def demo():
    """Every analysis on the demo set: of two versions the one nearer to the untouched photograph is preferred."""
    if not Path("datasets/demo").exists():
        from prepare.demo_set import build_demo
        build_demo(Path("datasets/demo"))
    out = "runs/analysis-demo"
    candidates = [str(DEMO / "images" / version) for version in ("original", "01", "02", "03", "04")]
    for words in (["synthetic", "--candidates", *candidates, "--gt", str(DEMO / "untouched"), "--out", out],
                  ["score", "--out", out, "--metrics", "ranker", "piqe"],
                  ["sbs", out],
                  ["complement", out, "--fails", "ranker"],
                  ["hggt", out],
                  ["recommend", out],
                  ["disagree", out, "--metrics", "ranker", "piqe"]):
        print(f"$ python analyze_iqa.py {' '.join(words)}")
        main(parse_args(words))


def main(args):
    if args.demo:
        demo()
    elif args.command == "score":
        score(args)
    elif args.command == "synthetic":
        preferences.synthetic(args)
    elif args.command in ("mos", "choices", "bapps"):
        getattr(opinion_analyses, args.command)(args)
    else:
        getattr(analyses, args.command)(args)


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
