"""The analyses of paper Sec. 3: tables, plots and a JSON file each, from the folders that `analyze_iqa.py score` makes.

    sbs          accuracy on pairs, paired tests, by training set        Tables 1, 2 and 6
    complement   accuracy of the others where one metric fails           Table 3
    hggt         rank correlation and misalignment on quintuplets        Table 4
    recommend    the metric to train with, the metrics to keep           Sec. 3, Supp. 7.1
    disagree     a sheet of the pairs on which two metrics disagree most; the only one that reads images

Each function takes the arguments of its command. The statistics are in agreement.py; opinion_analyses.py has the
analyses of opinions.

    python -m report.analyses FILE.json       draws the plot of sbs, complement, hggt or bapps beside it again
"""
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

import data
import runs
from report import agreement, opinions, preferences, style, tables
from report.tables import shown

PAIR_RULE = ("accuracy: pairs on which metric and majority prefer the same image, of those with a consensus; two equal "
             "scores prefer neither; 'ties wrong' counts votes of 0.5 as wrong.")
SET_RULE = ("SRC: mean over sets of Spearman's correlation of scores with labels (positive > similar > negative; ties "
            "by mean rank). PM (NM): share of sets in which a positive (negative) is ranked below (above) a similar "
            "one; equal scores are no misalignment. 95 % intervals: SRC t over photos, shares Wilson, widened where "
            "needed to t over photos. Negative first, and AMO: of equal scores the first version.")
INDEPENDENT = "Wilson and McNemar (exact), pairs taken as independent"
CLUSTERED = "Wilson, widened where needed to t over photos, and t over photos: pairs of one photo are not independent"
MEASURES = {"src": "rank correlation (SRC)", "pm": "positive misalignment (PM)", "nm": "negative misalignment (NM)"}
# the published files of BAPPS's votes, by the end of their names
BAPPS_NAMES = {f"{net}_{kind}": f"{words}, {name}" for net, name in (("alex", "AlexNet"), ("vgg", "VGG"))
               for kind, words in (("vanilla", "LPIPS"), ("shift_tolerant", "shift-tolerant LPIPS"))}


# Reading and writing

def load_run(folder, kind=None, metrics=None):
    """A folder that `score` left: name, truth, about, scores, metrics, lower, pairs, sets, mos, choices (None: absent).

    Choices and opinions also count as pairs with votes, see opinions.votes_of and opinions.random_pairs. UserError
    where it has no scores, lacks `kind`, or one of `metrics` (None: all) was not scored.
    """
    if not (folder / "scores.csv").exists():
        raise runs.UserError(f"{folder}: no scores.csv in it; make it with: "
                             f"python analyze_iqa.py score --out {folder} ...")
    about = json.loads((folder / "about.json").read_text())
    scores, _ = agreement.read_scores(folder / "scores.csv")
    folder = folder.resolve()
    unknown = [m for m in metrics or [] if m not in scores.columns]
    if unknown:
        raise runs.UserError(f"--metrics {' '.join(unknown)}: not scored in {folder}; "
                             f"it has {', '.join(scores.columns)}")
    # the guard stays in every table of opinions
    guard = [tables.CONTROL] * (kind in ("mos", "choices") and tables.CONTROL in scores)
    scores = scores[list(dict.fromkeys([*metrics, *guard] if metrics else scores.columns))]
    frames = dict.fromkeys(preferences.KINDS) | preferences.read_frames(folder, "RUN")
    if kind and kind != "pairs" and frames[kind] is None:
        raise runs.UserError(f"{folder}: no {kind}.csv in it; this analysis needs `score --{kind}`")
    if frames["choices"] is not None:
        frames["pairs"] = opinions.votes_of(frames["choices"])
    elif frames["mos"] is not None:
        frames["pairs"] = opinions.random_pairs(frames["mos"])
    if frames["pairs"] is not None:
        frames["pairs"]["score"] = frames["pairs"]["score"].astype(float)
    elif kind == "pairs":
        raise runs.UserError(f"{folder}: no pairs.csv in it; this analysis needs `score --pairs`")
    return SimpleNamespace(folder=folder, name=folder.name, about=about, truth=about["truth"], scores=scores,
                           metrics=list(scores.columns),
                           lower={m for m in scores.columns if about["metrics"][m]["lower_is_better"]}, **frames)


def load_runs(args, kind=None):
    """load_run of every folder. UserError for two folders of one name, which would write the same files."""
    loaded = [load_run(folder, kind, args.metrics) for folder in args.runs]
    names = [run.name for run in loaded]
    if len(set(names)) < len(names):
        raise runs.UserError(f"two runs are called {max(names, key=names.count)}: rename a folder")
    return loaded


def judge_pairs(run):
    """-> margins, agreement (pairs, metrics), and the photos of the pairs as numbers (None: not known)."""
    margin = agreement.margins(run.pairs, run.scores, run.lower)
    return margin, agreement.agree(margin, run.pairs["score"]), agreement.photo_codes(run.pairs)


def together(photos):
    """The photos of several runs as numbers that do not meet; None where one run does not know its photos."""
    if any(codes is None for codes in photos):
        return None
    starts = np.cumsum([0, *(codes.max() + 1 for codes in photos)])
    return np.concatenate([codes + start for codes, start in zip(photos, starts)])


class Report:
    """Tables of one analysis: printed, and written as <name>.md, .tex, .json and one .csv per table."""

    def __init__(self, out, name, truths):
        runs.check_writable(out, "--out")
        self.out, self.name, self.printed, self.markdown, self.latex = out, name, [], [], []
        self.record = {"command": sys.argv, **runs.describe_machine(), "truth": truths}
        self.truth = "; ".join(dict.fromkeys(truths))
        self.text(f"Preferences: {self.truth}")

    def text(self, line):
        self.printed.append(line)
        self.markdown.append(line)

    def table(self, title, head, rows, csv=None, frame=None):
        """head and rows are formatted; frame holds the numbers, for <name>-<csv>.csv."""
        self.printed.append(f"{title}\n\n{tables.aligned(head, rows)}")
        self.markdown.append(f"**{title}**\n\n{runs.markdown(head, rows)}")
        self.latex.append(tables.tabular(title, head, rows))
        if csv:
            agreement.write_csv(self.out / f"{self.name}-{csv}.csv", frame.assign(preferences=self.truth))

    def save(self):
        latex = [f"% Preferences: {self.truth}", *self.latex]
        for suffix, text in (("md", "\n\n".join(self.markdown) + "\n"), ("tex", "\n".join(latex))):
            runs.write_atomic(self.out / f"{self.name}.{suffix}", partial(Path.write_text, data=text))
        print("\n\n".join(self.printed) + "\n")
        runs.save_json(self.out / f"{self.name}.json", self.record)
        print(f"wrote {self.out}/{self.name}.md and, beside it, .tex, .csv, .json and .png")


def percent(mean, low=None, high=None):
    interval = "" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return "–" if np.isnan(mean) else f"{100 * mean:.2f}{interval}"


def signed_points(difference):
    return f"{100 * difference:+.2f}"


def number(value, text):
    return "–" if np.isnan(value) else text.format(value)


def warning(truth):
    """A further line for plots of preferences that nobody had; what made them, with its paths, is in the JSON."""
    return f"\n{agreement.SYNTHETIC}" if agreement.SYNTHETIC in truth else ""


def plot_accuracy(path, result, title, truth, reported):
    """A point and an interval per metric; reported: the paper's per cent by metric, drawn as crosses."""
    drawing, axis = style.figure(height=2.0 + 0.26 * len(result))
    rows = 100 * result[["accuracy", "low", "high"]][::-1]
    style.interval(axis, rows.accuracy.to_numpy(), np.arange(len(rows)), (rows.low.to_numpy(), rows.high.to_numpy()),
                   label="here")
    if reported:
        axis.plot([reported.get(m, np.nan) for m in rows.index], range(len(rows)), "x", label="paper")
        style.legend(drawing, axis)
    axis.axvline(50, color="grey", linewidth=0.8)
    axis.set(yticks=range(len(rows)), yticklabels=[BAPPS_NAMES.get(m, shown(m)) for m in rows.index], title=title,
             xlabel=f"accuracy on pairs, %, with 95 % intervals (grey line: chance){warning(truth)}")
    axis.margins(y=0.2 if len(rows) < 8 else 0.05)
    style.save(drawing, path)


# Pairs

def sbs(args):
    loaded = load_runs(args, "pairs")
    report = Report(args.out or args.runs[0], "sbs", [run.truth for run in loaded])
    results = [accuracy_tables(report, run) for run in loaded]
    if len(loaded) > 1:
        every = pd.DataFrame({run.name: result.accuracy for run, result in zip(loaded, results)})
        every = every.sort_values(loaded[-1].name, ascending=False)
        rows = [[shown(m), *map(percent, row)] for m, row in zip(every.index, every.to_numpy())]
        report.table("all", ["metric", *every.columns], rows, "all", every)
    intervals = CLUSTERED if any("photo" in run.pairs for run in loaded) else INDEPENDENT
    report.text(f"{PAIR_RULE} Intervals and tests: {intervals}; q: p after Benjamini-Hochberg, differs where q < 0.05.")
    for m in results[0].index:
        if all(m in result.index and result.high[m] < 0.5 for result in results):
            report.text(f"WARNING: {m} is clearly below 50 % on every pair set: is lower better (score --lower {m}), "
                        "or does the vote count those who prefer the LEFT image (--columns)?")
    report.record |= {"accuracy": [result.to_dict("index") for result in results],
                      "left_out": [run.about["left_out"] for run in loaded]}
    for run in loaded:
        for line in run.about["left_out"]:
            report.text(f"{run.name}: {line}")
    report.save()


def accuracy_tables(report, run):
    """Tables and plot of one set of pairs -> agreement.accuracy's DataFrame."""
    margin, agreed, photo = judge_pairs(run)
    result = agreement.accuracy(agreed, margin, run.metrics, photo)
    if not result.n.any():
        reasons = "; ".join(run.about["left_out"]) or "look at scores.csv"
        raise runs.UserError(f"{run.folder}: no pair has two scores and a consensus; {reasons}")
    if photo is not None and photo.max() == 0:
        report.text(f"{run.name}: all pairs show one photo, and are taken as independent")
    ties_wrong = agreement.agree(margin, run.pairs["score"], "wrong")
    ties_wrong = agreement.accuracy(ties_wrong, margin, run.metrics).accuracy
    reported = agreement.paper_accuracy(run.about.get("paper"))
    consensus = int((np.abs(run.pairs["score"] - 0.5) > agreement.TIE).sum())
    head = ["metric", "n", "accuracy, %", "ties wrong, %", "equal scores"] + ["paper, %"] * bool(reported)
    rows = [[shown(r.Index), r.n, percent(r.accuracy, r.low, r.high), percent(ties_wrong[r.Index]), r.ties]
            + [reported.get(r.Index, "–")] * bool(reported) for r in result.itertuples()]
    report.table(f"{run.name}: {len(run.pairs)} pairs, {consensus} with a consensus", head, rows, run.name,
                 result.assign(ties_wrong=ties_wrong))
    best, pairs = result.index[0], agreement.paired(agreed, run.metrics, photo)
    if len(pairs):
        report.table(f"{run.name}: {shown(best)} minus the others",
                     ["metric", "difference, points", "it alone right", "the other alone", "p", "q", "verdict"],
                     rows_against(best, pairs), f"{run.name}-paired", pairs)
    dataset_of = {m: dataset for dataset, members in agreement.TRAINED_ON.items() for m in members}
    groups = result.accuracy.groupby(result.index.map(lambda m: dataset_of.get(m, "not listed")))
    groups = groups.agg(["size", "mean", "max", "idxmax"]).sort_values("mean", ascending=False)
    if len(groups) > 1:
        rows = [[dataset, group["size"], percent(group["mean"]), percent(group["max"]), shown(group["idxmax"])]
                for dataset, group in groups.iterrows()]
        report.table(f"{run.name}: by the training set of the metric",
                     ["trained on", "metrics", "mean accuracy, %", "best, %", "best metric"], rows)
    plot_accuracy(report.out / f"sbs-{run.name}.png", result, f"{run.name}: agreement with the majority", run.truth,
                  reported)
    return result


def rows_against(best, pairs):
    """Formatted rows: `best` minus every other metric, from the rows of agreement.paired that hold it."""
    rows = []
    for r in pairs.itertuples():
        if best in (r.a, r.b):
            other, sign, alone = (r.b, 1, (r.only_a, r.only_b)) if r.a == best else (r.a, -1, (r.only_b, r.only_a))
            rows.append((sign * r.difference, [shown(other), signed_points(sign * r.difference), *alone, *verdict(r)]))
    return [row for _, row in sorted(rows, key=lambda entry: entry[0])]


def verdict(paired_row):
    """p, q and the verdict of a row of agreement.paired, formatted."""
    return f"{paired_row.p:.2g}", f"{paired_row.q:.2g}", "differs" if paired_row.differs else "no evidence"


def complement(args):
    loaded = load_runs(args, "pairs")
    report, shares = Report(args.out or args.runs[0], "complement", [run.truth for run in loaded]), {}
    metrics = [m for m in loaded[0].metrics if all(m in run.metrics for run in loaded)]
    if args.fails not in metrics:
        raise runs.UserError(f"--fails {args.fails}: not scored; choose one of {', '.join(metrics)}")
    _, agreed, photos = zip(*map(judge_pairs, loaded))
    agreed = [part[:, [run.metrics.index(m) for m in metrics]] for run, part in zip(loaded, agreed)]
    by_paper = agreement.paper_table(3) if args.fails == "musiq" else {}
    pair_sets = [(run.name, part, photo, by_paper.get(run.about.get("paper"), {}))
                 for run, part, photo in zip(loaded, agreed, photos)]
    if len(loaded) > 1:
        pair_sets.append(("all together", np.concatenate(agreed), together(photos), {}))
    for name, part, photo, reported in pair_sets:
        share, count = agreement.complement(part, metrics)
        failing = part[:, metrics.index(args.fails)] == 0
        failing_photo = None if photo is None else photo[failing]
        rows = []
        for m in share.loc[args.fails].drop(args.fails).sort_values(ascending=False).index:
            n, values = count.loc[args.fails, m], part[failing, metrics.index(m)]
            rows.append([shown(m), n, percent(*agreement.share(values, failing_photo)) if n else "–"]
                        + [reported.get(m, "–")] * bool(reported))
        head = ["metric", "n", "accuracy, %"] + ["paper, %"] * bool(reported)
        report.table(f"{name}: pairs on which {shown(args.fails)} fails", head, rows, name.replace(" ", "-"), share)
        shares[name] = share
    last = pair_sets[-1][0]
    plot_shares(report.out / "complement.png", shares[last], f"{last}{warning(report.truth)}")
    report.text("accuracy on the pairs with a consensus that the named metric gets wrong (two equal scores included); "
                "Wilson intervals, widened where needed to t over photos where they are known; the matrix is in the "
                ".csv files and complement.png")
    report.record["share"] = {name: json.loads(share.to_json(orient="index")) for name, share in shares.items()}
    report.save()
    return shares[last]


def plot_shares(path, share, title):
    """The matrix of agreement.complement as a heat map, with numbers where it has at most 20 metrics."""
    side = max(style.WIDTH, 3 + 0.3 * len(share))
    drawing, axis = style.figure(height=0.85 * side, width=side)
    values, names = 100 * share.to_numpy(copy=True), list(map(shown, share.index))
    np.fill_diagonal(values, np.nan)
    image = axis.imshow(values, cmap="viridis", vmin=0, vmax=100)
    drawing.colorbar(image, label="agreement with the preferences, %")
    for i, j in np.argwhere(~np.isnan(values)) if len(names) <= 20 else []:
        colour = "black" if values[i, j] > 60 else "white"
        axis.text(j, i, f"{values[i, j]:.0f}", ha="center", va="center", color=colour)
    axis.set(xticks=range(len(names)), yticks=range(len(names)), xticklabels=names, yticklabels=names,
             xlabel="agreement of this metric", ylabel="on pairs where this metric fails", title=title)
    axis.tick_params(axis="x", rotation=90)
    axis.grid(False)
    style.save(drawing, path)


def disagree(args):
    """PNG: the pairs, or else the quintuplets, on which two metrics differ most, in standard deviations of each."""
    from torch.nn.functional import interpolate

    from images import load_image
    from report import pictures
    run = load_run(args.runs[0], metrics=args.metrics)
    if len(run.metrics) < 2:
        raise runs.UserError("disagree compares two metrics: --metrics A B")
    a, b = run.metrics[:2]
    synthetic = " (synthetic)" * run.truth.startswith(agreement.SYNTHETIC)

    files = {} if run.choices is None else opinions.images_of(run.choices, args.images)

    def cell(name, label):
        image = load_image(files.get(name) or args.images / name).float()[None] / 255
        image = interpolate(image, scale_factor=args.side / max(image.shape[2:]), mode="bicubic", antialias=True)
        scores = [f"{shown(m)} {run.scores.loc[name, m]:.2f}{' (low is good)' * (m in run.lower)}" for m in (a, b)]
        caption = f"{Path(name).parent.name}/{Path(name).name}\n{' '.join(scores)}\n{label}{synthetic}"
        return image.clamp(0, 1)[0], caption

    def pair_row(i):
        pair = run.pairs.loc[i]
        return [cell(name, f"preferred by {vote:.0%}")
                for name, vote in ((pair.left, 1 - pair.score), (pair.right, pair.score))]

    def set_row(i):
        return [cell(r.image, f"{r.version}: {r.label}") for r in quintuplets[i].itertuples()]
    if run.pairs is not None:
        z = judge_pairs(run)[0][:, :2]
        z = z / np.nanstd(z, axis=0)
        apart, row = np.where(z[:, 0] * z[:, 1] < 0, np.abs(z[:, 0] - z[:, 1]), np.nan), pair_row
    else:
        _, qualities, _ = read_sets(run)
        z = (qualities[:, :, :2] - np.nanmean(qualities[:, :, :2], (0, 1))) / np.nanstd(qualities[:, :, :2], (0, 1))
        best, every = np.nan_to_num(z, nan=-np.inf).argmax(1), np.arange(len(z))
        # how much each metric loses by the choice of the other
        apart = sum(z[every, best[:, k], k] - z[every, best[:, 1 - k], k] for k in (0, 1))
        apart = np.where(best[:, 0] != best[:, 1], apart, np.nan)
        quintuplets, row = [group for _, group in run.sets.groupby("set")], set_row
    order = [i for i in np.argsort(-apart) if not np.isnan(apart[i])][:args.count]
    if not order:
        raise runs.UserError(f"disagree: {a} and {b} prefer the same image everywhere")
    path = (args.out or args.runs[0]) / f"disagree-{a}-{b}.png".replace(":", "_").replace("/", "_")
    runs.check_output(path, "--out")
    pictures.save_grid(path, [row(i) for i in order])
    print(f"{run.truth}: {np.isfinite(apart).sum()} of {len(apart)} on which {a} and {b} prefer different images; "
          f"the {len(order)} furthest apart: {path}")


# Quintuplets

def read_sets(run):
    """-> labels (S, V) codes, qualities (S, V, metrics), photos (S,). Original first."""
    codes = {"original": data.ORIGINAL} | {label.lower(): code for label, code in data.LABELS.items()}
    versions = list(dict.fromkeys(run.sets.version))
    sets = run.sets.assign(code=run.sets.label.map(codes))
    label, image = (sets.pivot(index="set", columns="version", values=values)[versions] for values in ("code", "image"))
    sign = np.array([-1.0 if m in run.lower else 1.0 for m in run.metrics])
    qualities = run.scores.reindex(image.to_numpy().ravel()).to_numpy().reshape(*image.shape, len(run.metrics)) * sign
    return label.to_numpy(), qualities, run.sets.groupby("set").photo.first().to_numpy()


def hggt(args):
    run = load_run(args.runs[0], "sets", args.metrics)
    labels, qualities, photos = read_sets(run)
    report = Report(args.out or args.runs[0], "hggt", [run.truth])
    count = {label: int((labels == code).any(1).sum()) for label, code in data.LABELS.items()}
    report.text(f"{len(labels)} quintuplets: {count['Positive']} with a positive, {count['Similar']} with a similar, "
                f"{count['Negative']} with a negative version")
    if not count["Negative"]:
        report.text("no quintuplet has a negative: NM and the share of negatives ranked first say nothing here")
    complete = ~np.isnan(qualities).any(1)
    for k, metric in enumerate(run.metrics):
        if not complete[:, k].any():
            report.text(f"{metric}: no quintuplet has all its scores")
    reported = agreement.paper_table(4) if run.about.get("paper") == "hggt" else {}
    result = {}
    for key, title in (("similar", "the original counts as similar"), ("left out", "the original is left out")):
        result[key] = {metric: misalignment_of(labels[whole], qualities[whole, :, k], photos[whole], key == "similar")
                       for k, (metric, whole) in enumerate(zip(run.metrics, complete.T)) if whole.any()}
        misalignment_table(report, title, result[key], reported if key == "similar" else {},
                           f"original-{key.removeprefix('left ')}")
    picks = {metric: picked_labels(labels[whole], qualities[whole, :, k])
             for k, (metric, whole) in enumerate(zip(run.metrics, complete.T))}
    picks = pd.DataFrame.from_dict(picks, orient="index")
    report.table("labels that AMO would pick, whole images", ["metric", *(f"{label.lower()}, %" for label in picks)],
                 [[shown(m), *map(percent, row)] for m, row in zip(picks.index, picks.to_numpy())], "picks", picks)
    for metric, values in result["similar"].items():
        if values["n"] < len(labels):
            report.text(f"{metric}: {len(labels) - values['n']} of {len(labels)} quintuplets left out, "
                        "a version has no score")
    undefined = [f"{m} {values['src_undefined']}" for m, values in result["similar"].items() if values["src_undefined"]]
    if undefined:
        report.text("SRC is undefined, and left out of the mean, where all labels or all scores are equal: "
                    f"{', '.join(undefined)} sets")
    report.text(SET_RULE)
    report.record |= {"result": result, "picks": picks.to_dict("index")}
    plot_misalignment(report.out / "hggt.png", result["similar"], f"{run.name}: the original counts as similar",
                      run.truth)
    report.save()


def misalignment_of(labels, quality, photos, original_similar):
    """One metric on its quintuplets -> {"n", "src_undefined", "without_similar", then measure: (mean, low, high)}."""
    per_set = agreement.misalignment(labels, quality, original_similar)
    photo = pd.factorize(photos)[0]

    def rate(measure, of=None):
        chosen = slice(None) if of is None else per_set[of]
        return agreement.share(per_set[measure][chosen].astype(float), photo[chosen])
    src = agreement.over_photos(per_set["src"], photo)[:3]
    return {"n": len(labels), "src_undefined": int(np.isnan(per_set["src"]).sum()),
            "without_similar": int((~per_set["similar"]).sum()),
            "src": (src[0], *np.clip(src[1:], -1, 1)),
            "pm": rate("pm"), "pm_of_positive": rate("pm", "positive"),
            "nm": rate("nm"), "nm_of_negative": rate("nm", "negative"),
            "negative_first": rate("negative_first", "negative")}


def misalignment_table(report, title, result, reported, csv):
    """Table 4: a row per metric of misalignment_of's values. reported: the paper's, or {}."""
    measures = {"src": "SRC ↑", "pm": "PM ↓", "pm_of_positive": "PM, of sets with a positive", "nm": "NM ↓",
                "nm_of_negative": "NM, of sets with a negative", "negative_first": "negative first, of sets with one"}
    rows = []
    for metric, values in result.items():
        cells = ["–" if np.isnan(values[key][0]) else "{:.3f} [{:.2f}, {:.2f}]".format(*values[key])
                 for key in measures]
        of_paper = " / ".join(f"{v:.2f}" for v in reported[metric].values()) if metric in reported else "–"
        rows.append([shown(metric), values["n"], *cells] + [of_paper] * bool(reported))
    head = ["metric", "sets", *measures.values()] + ["paper: SRC / PM / NM"] * bool(reported)
    means = {m: {key: v[0] if isinstance(v, tuple) else v for key, v in values.items()} for m, values in result.items()}
    report.table(title, head, rows, csv, pd.DataFrame.from_dict(means, orient="index"))


def picked_labels(labels, quality):
    """{label: share of quintuplets whose best version, of equals the first, has it}"""
    best = np.take_along_axis(labels, quality.argmax(1)[:, None], 1)[:, 0]
    return {label: (best == code).mean() if len(best) else np.nan
            for label, code in {"original": data.ORIGINAL, **data.LABELS}.items()}


def plot_misalignment(path, result, title, truth):
    """SRC, PM and NM of every metric with their intervals."""
    drawing, axis = style.figure(height=2.6 + 0.5 * len(result))
    for k, (key, label) in enumerate(MEASURES.items()):
        mean, low, high = np.array([values[key] for values in result.values()]).T
        style.interval(axis, mean, np.arange(len(mean)) + 0.2 * (k - 1), (low, high), label=label)
    axis.set(yticks=range(len(result)), yticklabels=map(shown, result), title=title,
             xlabel=f"mean correlation, or share of quintuplets, with 95 % intervals{warning(truth)}")
    axis.invert_yaxis()
    style.legend(drawing, axis, columns=2)
    style.save(drawing, path)


# Both

def recommend(args):
    loaded = load_runs(args)
    metrics = [m for m in loaded[0].metrics if all(m in run.metrics for run in loaded) and m != tables.CONTROL]
    with_pairs = [run for run in loaded if run.pairs is not None]
    with_sets = [run for run in loaded if run.sets is not None]
    if not with_pairs or len(metrics) < 2:
        raise runs.UserError("recommend needs a folder with pairs, and two metrics scored in every folder")
    _, agreed, photos = zip(*map(judge_pairs, with_pairs))
    agreed = [part[:, [run.metrics.index(m) for m in metrics]] for run, part in zip(with_pairs, agreed)]
    speeds = {}
    for m in metrics:
        measured = [run.about["metrics"][m].get("speed") for run in loaded]
        speeds[m] = next(filter(None, measured), {})
    table = pd.DataFrame({"accuracy": np.mean([np.nanmean(part, axis=0) for part in agreed], axis=0)}, metrics)
    table["pm"], table["nm"] = np.nan, np.nan
    if with_sets:
        labels, qualities, _ = read_sets(with_sets[0])
        for m in metrics:
            quality = qualities[:, :, with_sets[0].metrics.index(m)]
            whole = ~np.isnan(quality).any(1)
            if whole.any():
                per_set = agreement.misalignment(labels[whole], quality[whole])
                table.loc[m, ["pm", "nm"]] = per_set["pm"].mean(), per_set["nm"].mean()
    table["forward"] = [speed.get("forward", np.nan) for speed in speeds.values()]
    table["backward"] = [speed.get("backward") or np.nan for speed in speeds.values()]
    # a distance to a reference needs ground truth, and cannot choose one
    comparing = {m for group in tables.GROUPS.values() for m in group}
    table["differentiable"] = [bool(speed.get("differentiable", True)) and m.lower() not in comparing
                               for m, speed in speeds.items()]
    pooled = np.concatenate(agreed)
    table["measured"] = table.backward.notna()
    # the others are compared with the most accurate differentiable one; of equals with one that was measured
    usable = table[table.differentiable].sort_values(["accuracy", "measured"], ascending=False, kind="stable")
    best = usable.index[0] if len(usable) else None
    pairs = agreement.paired(pooled, metrics, together(photos))
    pairs = pairs[pairs.differs]
    less = {*pairs[(pairs.a == best) & (pairs.difference > 0)].b, *pairs[(pairs.b == best) & (pairs.difference < 0)].a}
    table["less"] = [m in less for m in metrics]
    share, _ = agreement.complement(pooled, metrics)
    train, keep, tied = agreement.recommend(table, share)
    table["where_it_fails"] = share.loc[train] if train else np.nan

    report = Report(args.out or args.runs[0], "recommend", [run.truth for run in loaded])
    unmeasured = [m for m, speed in speeds.items() if not speed and m.lower() not in comparing]
    rows = []
    for r in table.sort_values("accuracy", ascending=False).itertuples():
        differentiable = ("needs a reference" if r.Index.lower() in comparing else
                          "not measured" if r.Index in unmeasured else "yes" if r.differentiable else "no")
        rows.append([shown(r.Index), percent(r.accuracy), "yes" if r.less else "no", number(r.pm, "{:.2f}"),
                     number(r.nm, "{:.2f}"), number(r.forward, "{:.1f}"), number(r.backward, "{:.1f}"), differentiable,
                     percent(r.where_it_fails) if r.Index != train else ""])
    head = ["metric", "accuracy, %", f"less than {shown(best)} by test", "PM ↓", "NM ↓", "images/s",
            "images/s with gradient", "differentiable", f"right where {shown(train)} fails, %" if train else "–"]
    report.table("metrics", head, rows, "metrics", table)
    if unmeasured:
        report.text(f"speed not measured, taken as differentiable: {', '.join(unmeasured)} "
                    "(ready scores, or --no-speed)")
    device = next((speed["device"] for speed in speeds.values() if speed), "not measured")
    report.text(f"images/s: four random 256x256 crops, {device}; accuracy: mean over "
                f"{', '.join(run.name for run in with_pairs)}, each counting the same")
    if tied:
        why = ("its gradient was measured here" if table.measured[train] and not table.measured[tied].any()
               else "it is the first of them that was scored")
        report.text(f"A tie: {' and '.join([train, *tied])} are equal by this rule; {train} is named because {why}.")
    report.text(f"By these preferences: train with {train}; keep {', '.join(keep)} for evaluation." if train else
                "No metric to train with: none is differentiable, right more often than chance, and not clearly worse "
                "than the best one that is.")
    report.record |= {"train": train, "keep": keep, "tied": tied, "table": json.loads(table.to_json(orient="index"))}
    report.save()


def redraw(path):
    """The plot of <analysis>.json that an analysis of one folder left, from the numbers in it."""
    record, folder = json.loads(path.read_text()), path.resolve().parent
    truth, out = "; ".join(dict.fromkeys(record["truth"])), path.with_suffix(".png")
    if path.stem == "sbs" and len(record["accuracy"]) == 1:
        about, out = json.loads((folder / "about.json").read_text()), path.with_name(f"sbs-{folder.name}.png")
        plot_accuracy(out, pd.DataFrame.from_dict(record["accuracy"][0], "index"),
                      f"{folder.name}: agreement with the majority", truth,
                      agreement.paper_accuracy(about.get("paper")))
    elif path.stem == "complement":
        name, share = list(record["share"].items())[-1]
        plot_shares(out, pd.DataFrame.from_dict(share, "index"), f"{name}{warning(truth)}")
    elif path.stem == "hggt":
        plot_misalignment(out, record["result"]["similar"], f"{folder.name}: the original counts as similar", truth)
    elif path.stem == "bapps":
        plot_accuracy(out, pd.DataFrame.from_dict(record["accuracy"], "index"), "BAPPS: agreement with the majority",
                      "people's votes", {})
    else:
        raise runs.UserError(f"{path}: give sbs.json (of one folder), complement.json, hggt.json or bapps.json")
    print(f"wrote {out}")


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("file", type=Path, metavar="FILE.json", help="of python analyze_iqa.py")
    return p.parse_args(argv)


if __name__ == "__main__":
    runs.cli(lambda: redraw(parse_args().file))
