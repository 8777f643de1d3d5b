"""Analyses of opinions: tables, plots and a JSON file each, from the folders that `analyze_iqa.py score` makes.

    mos          correlations with mean opinion scores, of all images and on ten random 80/20 splits
    choices      agreement with choices of the best of several, floors, ceilings, controls; strengths of the methods
    bapps        full-reference distances on BAPPS's votes

Each function takes the arguments of its command. The statistics are in opinions.py and agreement.py.

    python -m report.opinion_analyses FILE.json       draws the plots of mos or choices beside it again
"""
import json
import os
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd

import runs
from report import agreement, opinions, style, tables
from report.analyses import Report, load_runs, number, percent, plot_accuracy, signed_points, verdict
from report.tables import shown

MEASURES = {"srcc": "SRCC", "plcc": "PLCC", "plcc_logistic": "PLCC, logistic", "krcc": "KRCC"}
MOS_RULE = ("SRCC, KRCC: Spearman's and Kendall's (tau-b) rank correlation; PLCC: Pearson's, without and after the "
            "four-parameter logistic (with the sign of its slope). 95 % intervals: bootstrap over images. Splits: the "
            "test images of ten random 80/20 divisions (opinions.splits, seed 0), median and range.")
NAME_ONLY = "the method's name only"
# of the measures that are tested
CHANCE = {"pairs": 0.5, "within": 0.0}
GUARD = ("A guard, not a target: log Laplacian variance (sharpness alone) and the method's name alone are rows of this "
         "table. A model that does worse than chance has the wrong sign; one that does as well as these two may have "
         "learned no more than they know.")
NO_GUARD = ("{}: log Laplacian variance (sharpness alone) is absent from this table, so whether a model knows more "
            "than sharpness cannot be seen: score once more with the images in --images")
CHOICE_RULE = ("Pairs: of the K - 1 pairs of each choice (the selected one and every other candidate), the share that "
               "the scores order as the observer did; equal scores count half. Within scenes: mean over scenes of "
               "Spearman's correlation with how often each method was selected. Favourite: share of the choices that "
               "went to the best-scored candidate. Log likelihood: mean per choice of log softmax(t score), t >= 0 "
               "fitted on the other scenes. 95 % intervals: bootstrap over scenes. The method's name only: strengths "
               "fitted on the other scenes. Most possible: the majority of the same choices; the other observers: "
               "their majority without the one who chooses. p: t test of the scenes' means against chance. Better, "
               "worse: than chance, by interval and test (p < 0.05); unmarked: no evidence of a difference.")


# Mean opinion scores

def mos(args):
    loaded = load_runs(args, "mos")
    report = Report(args.out or args.runs[0], "mos", [run.truth for run in loaded])
    report.record |= {"result": {}, "left_out": {run.name: run.about["left_out"] for run in loaded}}
    for run in loaded:
        report.record["result"][run.name] = result = {}
        people = run.mos.set_index("image").mos
        for metric in run.metrics:
            scores = run.scores[metric].reindex(people.index)
            quality = (-scores if metric in run.lower else scores).dropna()
            truth = people[quality.index].to_numpy()
            if len(quality) < 5:
                report.text(f"{metric}: fewer than five images have a score")
                continue
            parts = [test for _, test in opinions.splits(quality.index)]
            splits = [opinions.correlations(quality.to_numpy()[test], truth[test]) for test in parts]
            result[metric] = {"n": len(quality), **opinions.correlations_over(quality.to_numpy(), truth),
                              "splits": {key: [split[key] for split in splits] for key in MEASURES}}
        order = sorted(result, key=lambda m: -result[m]["srcc"][0])
        rows = []
        for metric in order:
            values, splits = result[metric], result[metric]["splits"]["srcc"]
            rows.append([shown(metric), values["n"], interval(values["srcc"]),
                         *(number(values[key][0], "{:.3f}") for key in list(MEASURES)[1:]),
                         # of few images a split has none or too few
                         "–" if np.isnan(splits).any() else
                         f"{np.median(splits):.3f} ({min(splits):.2f} to {max(splits):.2f})"])
        frame = pd.DataFrame({m: {"n": result[m]["n"], **{key: result[m][key][0] for key in MEASURES}} for m in order})
        report.table(f"{run.name}: {len(people)} images",
                     ["metric", "images", "SRCC ↑", "PLCC ↑", "PLCC, logistic ↑", "KRCC ↑", "SRCC of splits"], rows,
                     run.name, frame.T)
        for line in run.about["left_out"]:
            report.text(f"{run.name}: {line}")
    report.text(MOS_RULE)
    report.save()
    plot_mos(report.out, report.record)


def interval(value, text="{:.3f} [{:.3f}, {:.3f}]"):
    """(value, low, high) or one number, formatted."""
    if not isinstance(value, (tuple, list)):
        value = (value, np.nan, np.nan)
    return "–" if np.isnan(value[0]) else text.format(*value) if np.isfinite(value[1]) else f"{value[0]:.3f}"


def plot_mos(folder, record):
    """SRCC of every metric with its interval, and of ten splits as dots: <folder>/mos-<run>.png."""
    for name, result in record["result"].items():
        order = sorted(result, key=lambda m: result[m]["srcc"][0])
        drawing, axis = style.figure(height=1.9 + 0.32 * len(order))
        values = np.array([result[m]["srcc"] for m in order])
        splits = np.array([result[m]["splits"]["srcc"] for m in order])
        axis.plot(splits, np.repeat(np.arange(len(order))[:, None] - 0.25, splits.shape[1], 1), ".",
                  color=style.COLOURS[7], markersize=4)
        axis.plot([], [], ".", color=style.COLOURS[7], label="test images of ten splits")
        style.interval(axis, values[:, 0], np.arange(len(order)), values[:, 1:].T, label="all images, 95 %",
                       colour=style.COLOURS[0])
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(yticks=range(len(order)), yticklabels=map(shown, order), xlabel="SRCC with mean opinion scores",
                 title=f"{name}: {max(result[m]['n'] for m in order)} images")
        style.legend(drawing, axis)
        style.save(drawing, folder / f"mos-{name}.png")


# Choices

def choices(args):
    loaded = load_runs(args, "choices")
    report = Report(args.out or args.runs[0], "choices", [run.truth for run in loaded])
    report.record |= {"result": {}, "strengths": {}, "left_out": {run.name: run.about["left_out"] for run in loaded}}
    for run in loaded:
        result = judge_all(run)
        report.record["result"][run.name] = result
        report.record["strengths"][run.name] = strengths = strengths_of(run.choices)
        title = (f"{run.name}: {len(run.choices)} choices of {run.choices.observer.nunique()} observers in "
                 f"{run.choices.scene.nunique()} scenes")
        choice_table(report, title, run.name, result)
        containing_table(report, run.name, result)
        head = ["method", "strength, nats [95 % over scenes]", "[95 % over observers]", "selected", "shown"]
        rows = [[method, interval(r["over scenes"]), "[{:.3f}, {:.3f}]".format(*r["over observers"][1:]),
                 r["selected"], r["shown"]] for method, r in strengths.items()]
        report.table(f"{run.name}: strengths of the methods (Bradley-Terry)", head, rows)
        if run.choices.scene.nunique() == 1:
            report.text(f"{run.name}: one scene only, so the method's name has no other scenes to know anything from")
        for line in run.about["left_out"]:
            report.text(f"{run.name}: {line}")
    report.text(CHOICE_RULE)
    unguarded = [run.name for run in loaded if tables.CONTROL not in report.record["result"][run.name]]
    for name in unguarded:
        report.text(NO_GUARD.format(name))
    if len(unguarded) < len(loaded):
        report.text(GUARD)
    report.save()
    plot_choices(report.out, report.record)


def judge_all(run):
    """{row: what opinions.judge says}: metrics, best first, the method's name, floors and ceilings."""
    judged = {}
    for metric in run.metrics:
        scores = (run.scores[metric] * (-1 if metric in run.lower else 1)).to_dict()

        def value(scene, method, scores=scores):
            return scores.get(f"{method}/{scene}", np.nan)
        judged[metric] = opinions.judge(run.choices, value)
    judged = {metric: values for metric, values in judged.items() if values}
    result = dict(sorted(judged.items(), key=lambda item: -item[1]["pairs"][0]))
    return result | {NAME_ONLY: opinions.judge_names(run.choices)} | opinions.ceilings(run.choices)


def strengths_of(choices):
    scenes, observers = (opinions.bradley_terry(choices, cluster) for cluster in ("scene", "observer"))
    return {m: {"over scenes": [r.strength, r.low, r.high], "selected": int(r.choices), "shown": int(r.shown),
                "over observers": [r.strength, observers.low[m], observers.high[m]]}
            for m, r in zip(scenes.index, scenes.itertuples())}


def choice_table(report, title, name, result):
    keys, rows = ("pairs", "within", "favourite", "log_likelihood"), []
    for row, values in result.items():
        cells = {key: interval(values.get(key, np.nan)) for key in keys}
        tests = [than_chance(values, key, chance) for key, chance in CHANCE.items()]
        rows.append([shown(row), values.get("choices", ""), cells["pairs"], tests[0], cells["within"], tests[1],
                     cells["favourite"], cells["log_likelihood"]])
    frame = pd.DataFrame({row: {f"{key}{end}": x for key in keys if key in values
                                for end, x in zip(("", "_low", "_high"), np.atleast_1d(values[key]))}
                          | {f"{key}_p": p for key, p in values.get("p", {}).items()}
                          for row, values in result.items()}).T
    report.table(title, ["scores", "choices", "pairs ↑", "p", "within scenes ↑", "p", "favourite ↑",
                         "log likelihood ↑"], rows, name, frame)


def than_chance(values, key, chance):
    """p of one of judge()'s measures, with "better" or "worse" where interval and test both say so; "" without one."""
    p = values.get("p", {}).get(key, np.nan)
    if np.isnan(p):
        return ""
    _, low, high = values[key]
    word = "better" if low > chance else "worse" if high < chance else ""
    return f"{p:.2g}, {word}" if word and p < 0.05 else f"{p:.2g}"


def containing_table(report, name, result):
    methods = list(result[NAME_ONLY]["containing"])
    rows = [[shown(row), *(interval(values["containing"][m]) for m in methods)] for row, values in result.items()
            if "containing" in values]
    report.table(f"{name}: pairs that contain one method", ["scores", *methods], rows)


def plot_choices(folder, record):
    """Pairs and correlation within scenes, of every row, with intervals: <folder>/choices-<run>.png."""
    for name, result in record["result"].items():
        order = [row for row in result if "choices" in result[row]][::-1]
        drawing, axes = style.figure(columns=2, height=2.2 + 0.32 * len(order), sharey=True)
        for axis, key, label in zip(axes, ("pairs", "within"), ("pairs ordered as observers did",
                                                                "Spearman within scenes")):
            values = np.array([result[row][key] for row in order])
            control = np.array([row in (NAME_ONLY, tables.CONTROL) for row in order])
            for rows, colour, words in ((~control, 0, "scores"), (control, 1, "controls")):
                style.interval(axis, values[rows, 0], np.flatnonzero(rows), values[rows, 1:].T, label=words,
                               colour=style.COLOURS[colour])
            axis.axvline(result["chance"][key], color="grey", linewidth=0.8, label="chance")
            axis.axvline(result["most possible"][key], color="grey", linewidth=0.8, linestyle="--",
                         label="most possible")
            axis.set(xlabel=label, yticks=range(len(order)), yticklabels=map(shown, order))
        drawing.suptitle(textwrap.fill(f"{name}, 95 % intervals over scenes", 60), fontsize=style.FONT)
        style.legend(drawing, axes[0], columns=4)
        style.save(drawing, folder / f"choices-{name}.png")


# BAPPS

def bapps(args):
    """Distances with votes: accuracy and 2AFC score of each file's metric, and paired differences."""
    distances = read_distances(args.files)
    names, votes = list(distances), next(iter(distances.values())).vote.to_numpy()
    margin = np.stack([(table.d0 - table.d1).to_numpy(float) for table in distances.values()], 1)
    agreed, afc = agreement.agree(margin, votes), agreement.two_afc(margin, votes)
    report = Report(args.out, "bapps", ["people's votes of BAPPS"])
    result, pairs = agreement.accuracy(agreed, margin, names), agreement.paired(agreed, names)
    # every pair is a patch of its own
    photo = np.arange(len(votes))
    mean = {m: agreement.over_photos(afc[:, k], photo) for k, m in enumerate(names)}
    head = ["metric", "2AFC [95 %]", "accuracy, %", "n", "equal distances"]
    rows = [[r.Index, "{:.4f} [{:.4f}, {:.4f}]".format(*mean[r.Index][:3]), percent(r.accuracy, r.low, r.high), r.n,
             r.ties] for r in result.itertuples()]
    report.table(f"{len(votes)} pairs", head, rows, "accuracy", result.assign(afc=[mean[m][0] for m in result.index]))
    rows = []
    for r in pairs.itertuples():
        delta = agreement.over_photos(afc[:, names.index(r.a)] - afc[:, names.index(r.b)], photo)
        rows.append([f"{r.a} – {r.b}", signed_points(r.difference), r.only_a, r.only_b, *verdict(r),
                     "{:+.4f} [{:+.4f}, {:+.4f}]".format(*delta[:3]), f"{delta[3]:.2g}"])
    head = ["metrics", "accuracy, points", "first alone right", "second alone", "McNemar p", "q", "verdict",
            "2AFC difference [95 %]", "p"]
    report.table("paired", head, rows, "paired", pairs)
    report.text("2AFC: mean share of people that the metric sides with; two equal distances side with nobody: 0.5 in "
                "2AFC, wrong in accuracy. q: p after Benjamini-Hochberg.")
    report.record |= {"2afc": {m: values[:3] for m, values in mean.items()}, "accuracy": result.to_dict("index"),
                      "paired": pairs.to_dict("records")}
    plot_accuracy(report.out / "bapps.png", result, "BAPPS: agreement with the majority", "people's votes", {})
    report.save()


def read_distances(files):
    """{name: DataFrame of name, d0, d1, afc, vote} of BAPPS files, which must hold the same pairs in the same order.

    The names are those of the files without their common beginning, which says nothing about a metric.
    """
    common = os.path.commonprefix([path.stem for path in files]).rpartition("_")[0]
    columns = ["name", "d0", "d1", "afc", "vote"]
    distances = {path.stem[len(common):].lstrip("_"): agreement.read_csv(path, "bapps", header=None, names=columns)
                 for path in files}
    if len(distances) < len(files):
        raise runs.UserError("bapps: two files of one name; rename one")
    first_name, first = next(iter(distances.items()))
    for name, table in distances.items():
        numbers = table[["d0", "d1", "vote"]].apply(pd.to_numeric, errors="coerce")
        bad = numbers.isna().any(axis=1) | ~numbers.vote.between(0, 1)
        if bad.any():
            row = int(bad.idxmax())
            raise runs.UserError(f"bapps {name}: line {row + 1} is not name, distance, distance, 2AFC, vote in [0, 1]: "
                                 f"{', '.join(map(str, table.iloc[row]))}")
        table[["d0", "d1", "vote"]] = numbers
        if not table.name.equals(first.name) or not np.allclose(table.vote, first.vote):
            raise runs.UserError(f"bapps {name}: other pairs or votes than {first_name}; "
                                 "paired tests need the same in each file")
    return distances


def redraw(path):
    """The plots of mos.json or choices.json, from the numbers in it."""
    record = json.loads(path.read_text())
    plots = {"mos": plot_mos, "choices": plot_choices}
    if path.stem not in plots:
        raise runs.UserError(f"{path}: give mos.json or choices.json")
    plots[path.stem](path.parent, record)
    print(f"drew {path.parent}/{path.stem}-*.png")


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("file", type=Path, metavar="FILE.json", help="mos.json or choices.json of python analyze_iqa.py")
    return p.parse_args(argv)


if __name__ == "__main__":
    runs.cli(lambda: redraw(parse_args().file))
