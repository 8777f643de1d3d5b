"""The analyses of paper Sec. 3 on what `analyze_iqa.py score` left: tables, plots and one JSON each. No image is read, but by `disagree`.

    sbs          accuracy on pairs, paired tests, by training set        Tables 1, 2 and 6
    complement   accuracy of the others where one metric fails           Table 3
    hggt         rank correlation and misalignment on quintuplets        Table 4
    recommend    which metric to train with, which to keep               Sec. 3, Supp. 7.1
    bapps        full-reference distances on BAPPS's votes
    disagree     a sheet of the pairs on which two metrics disagree most

Each takes the arguments of its command. The statistics are in agreement.py.
"""
import json
import os
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from report import agreement
import data
import runs
from images import load_image
from report import tables
from report import pictures


# Reading and writing

def load_run(folder, kind=None, wanted=None):
    """What `score` left in a folder: name, truth, about, scores, pairs or sets (None), lower. ValueError where it lacks `kind`."""
    if not (folder / "scores.csv").exists():
        raise runs.UserError(f"{folder}: no scores.csv in it; make it with: python analyze_iqa.py score --out {folder} ...")
    about = json.loads((folder / "about.json").read_text())
    scores, _ = agreement.read_scores(folder / "scores.csv")
    folder = folder.resolve()
    unknown = [m for m in wanted or [] if m not in scores.columns]
    if unknown:
        raise runs.UserError(f"--metrics {' '.join(unknown)}: not scored in {folder}; it has {', '.join(scores.columns)}")
    scores = scores[wanted or list(scores.columns)]
    frames = {name: agreement.read_csv(folder / f"{name}.csv", "RUN") if (folder / f"{name}.csv").exists() else None for name in ("pairs", "sets")}
    if frames["pairs"] is not None:
        frames["pairs"]["score"] = frames["pairs"]["score"].astype(float)
    if kind and frames[kind] is None:
        raise runs.UserError(f"{folder}: no {kind}.csv in it; this analysis needs `score --{kind}`")
    return SimpleNamespace(folder=folder, name=folder.name, about=about, truth=about["truth"], scores=scores, metrics=list(scores.columns),
                           lower={m for m in scores.columns if about["metrics"][m]["lower_is_better"]}, **frames)


def load_runs(args, kind=None):
    """load_run of every folder; ValueError for two of one name, whose files would be one."""
    found = [load_run(folder, kind, args.metrics) for folder in args.runs]
    names = [run.name for run in found]
    if len(set(names)) < len(names):
        raise runs.UserError(f"two runs are called {max(names, key=names.count)}: rename a folder")
    return found


def judge_pairs(run):
    """-> margins, agreement (pairs, metrics), and the photos of the pairs as numbers (None: not known)."""
    margin = agreement.margins(run.pairs, run.scores, run.lower)
    return margin, agreement.agree(margin, run.pairs["score"]), agreement.photo_codes(run.pairs)


def together(photos):
    """The photos of several runs as numbers that do not meet; None where one run does not know them."""
    if any(p is None for p in photos):
        return None
    return np.concatenate([p + sum(q.max() + 1 for q in photos[:k]) for k, p in enumerate(photos)])


def write_csv(path, frame, **options):
    runs.write_atomic(path, lambda t: frame.to_csv(t, **options))


class Report:
    """Tables of one analysis: printed, and written as <name>.md, .tex, .json and one .csv per table."""

    def __init__(self, out, name, truth):
        self.out, self.name, self.parts, self.latex, self.record = out, name, [], [], {"command": sys.argv, **runs.describe_machine(), "truth": truth}
        runs.check_writable(out, "--out")
        self.truth = "; ".join(dict.fromkeys(truth))
        self.text(f"Preferences: {self.truth}")

    def text(self, line):
        self.parts.append(line)

    def table(self, title, head, rows, csv=None, frame=None):
        """head and rows are formatted; frame holds the numbers, for <name>-<csv>.csv."""
        self.parts += [f"**{title}**", runs.markdown(head, rows)]
        self.latex.append(tables.tabular(title, head, rows))
        if csv:
            write_csv(self.out / f"{self.name}-{csv}.csv", frame.assign(preferences=self.truth))

    def save(self):
        text = "\n\n".join(self.parts) + "\n"
        print(text)
        runs.write_atomic(self.out / f"{self.name}.md", lambda t: t.write_text(text))
        runs.write_atomic(self.out / f"{self.name}.tex", lambda t: t.write_text("\n".join([f"% Preferences: {self.truth}", *self.latex])))
        runs.save_json(self.out / f"{self.name}.json", self.record)
        print(f"wrote {self.out}/{self.name}.md and, beside it, .tex, .csv, .json and .png")


def percent(mean, low=None, high=None):
    return "–" if np.isnan(mean) else f"{100 * mean:.2f}" + ("" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]")


def shown(metric):
    return tables.SHOWN.get(metric, metric)


def wrapped(text, width=70):
    return textwrap.fill(text, width)


def plot(path, draw, **size):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(layout="constrained", **size)
    draw(figure, axis)
    runs.write_atomic(path, lambda t: figure.savefig(t, dpi=110, format="png"))
    plt.close(figure)


# Pairs

def sbs(args):
    found = load_runs(args, "pairs")
    report = Report(args.out or args.runs[0], "sbs", [run.truth for run in found])
    results = []
    for run in found:
        margin, agreed, photo = judge_pairs(run)
        result = agreement.accuracy(agreed, margin, run.metrics, photo)
        if not result.n.any():
            raise runs.UserError(f"{run.folder}: no pair has two scores and a consensus; {'; '.join(run.about['left_out']) or 'look at scores.csv'}")
        if photo is not None and photo.max() == 0:
            report.text(f"{run.name}: all pairs show one photo, and are taken as independent")
        strict = agreement.accuracy(agreement.agree(margin, run.pairs["score"], "wrong"), margin, run.metrics).accuracy
        reported = agreement.REPORTED.get(run.about.get("paper"), {})
        consensus = int((np.abs(run.pairs["score"] - 0.5) > agreement.TIE).sum())
        rows = [[shown(m), r.n, percent(r.accuracy, r.low, r.high), percent(strict[m]), r.ties, *([reported.get(m, "–")] if reported else [])]
                for m, r in zip(result.index, result.itertuples())]
        report.table(f"{run.name}: {len(run.pairs)} pairs, {consensus} with a consensus", ["metric", "n", "accuracy, %", "ties wrong, %", "equal scores", *(["paper, %"] if reported else [])],
                     rows, run.name, result.assign(ties_wrong=strict))
        best, pairs = result.index[0], agreement.paired(agreed, run.metrics, photo)
        against = pairs[(pairs.a == best) | (pairs.b == best)]
        against = against.assign(other=np.where(against.a == best, against.b, against.a), difference=np.where(against.a == best, 1, -1) * against.difference)
        if len(against):
            report.table(f"{run.name}: {shown(best)} minus the others", ["metric", "difference, points", "it alone right", "the other alone", "p", "q", "verdict"],
                         [[shown(r.other), f"{100 * r.difference:+.2f}", *((r.only_a, r.only_b) if r.a == best else (r.only_b, r.only_a)), f"{r.p:.2g}", f"{r.q:.2g}",
                           "differs" if r.differs else "no evidence"] for r in against.sort_values("difference").itertuples()], f"{run.name}-paired", pairs)
        known = {m: group for group, members in agreement.TRAINED_ON.items() for m in members}
        groups = result.accuracy.groupby(result.index.map(lambda m: known.get(m, "not listed"))).agg(["size", "mean", "max", "idxmax"]).sort_values("mean", ascending=False)
        if len(groups) > 1:
            report.table(f"{run.name}: by what a metric was trained on", ["trained on", "metrics", "mean accuracy, %", "best, %", "which"],
                         [[name, g["size"], percent(g["mean"]), percent(g["max"]), shown(g["idxmax"])] for name, g in groups.iterrows()])
        results.append(result)
        plot(report.out / f"sbs-{run.name}.png", lambda figure, axis: bars(axis, result, f"{run.name}: agreement with the majority, 95 % intervals", run.truth, reported),
             figsize=(8, 1.5 + 0.24 * len(result)))
    if len(found) > 1:
        both = pd.DataFrame({run.name: result.accuracy for run, result in zip(found, results)})
        both = both.sort_values(found[-1].name, ascending=False)
        report.table("all", ["metric", *both.columns], [[shown(m), *map(percent, row)] for m, row in zip(both.index, both.to_numpy())], "all", both)
    say_how(report, any("photo" in run.pairs for run in found))
    for m in results[0].index:
        if all(m in r.index and r.high[m] < 0.5 for r in results):
            report.text(f"WARNING: {m} is clearly below 50 % on every pair set: is lower better (score --lower {m}), or does the vote count those who prefer the LEFT image (--columns)?")
    report.record |= {"accuracy": [r.to_dict("index") for r in results], "left_out": [run.about["left_out"] for run in found]}
    for run in found:
        for line in run.about["left_out"]:
            report.text(f"{run.name}: {line}")
    report.save()


def say_how(report, clustered):
    report.text(f"accuracy: pairs on which metric and majority prefer the same image, of those with a consensus; two equal scores prefer neither; 'ties wrong' counts votes of 0.5 as wrong. "
                f"Intervals and tests: {'Wilson, widened where needed to t over photos, and t over photos: pairs of one photo are not independent' if clustered else 'Wilson and McNemar (exact), pairs taken as independent'}; q: p after Benjamini-Hochberg, differs where q < 0.05.")


def bars(axis, result, title, truth, reported):
    result = result[::-1]
    axis.errorbar(100 * result.accuracy, range(len(result)), xerr=100 * np.maximum(0, [result.accuracy - result.low, result.high - result.accuracy]), fmt="o", ms=4, elinewidth=1, label="here")
    if reported:
        axis.plot([reported.get(m, np.nan) for m in result.index], range(len(result)), "x", color="tab:red", label="paper")
        axis.legend()
    axis.axvline(50, color="grey", lw=0.7)
    axis.set(yticks=range(len(result)), yticklabels=map(shown, result.index), xlabel=f"accuracy, %\n{wrapped(truth)}")
    axis.set_title(title, fontsize=10)


def complement(args):
    found = load_runs(args, "pairs")
    report, shares = Report(args.out or args.runs[0], "complement", [run.truth for run in found]), []
    metrics = [m for m in found[0].metrics if all(m in run.metrics for run in found)]
    if args.fails not in metrics:
        raise runs.UserError(f"--fails {args.fails}: not scored; choose one of {', '.join(metrics)}")
    _, agreed, photos = zip(*map(judge_pairs, found))
    parts = [part[:, [run.metrics.index(m) for m in metrics]] for run, part in zip(found, agreed)]
    sets = [*zip([run.name for run in found], parts, photos, [agreement.TABLE3.get(run.about.get("paper"), {}) if args.fails == "musiq" else {} for run in found])]
    if len(found) > 1:
        sets.append(("all together", np.concatenate(parts), together(photos), {}))
    for name, agreed, photo, reported in sets:
        share, count = agreement.complement(agreed, metrics)
        order, failing = share.loc[args.fails].drop(args.fails).sort_values(ascending=False), agreed[:, metrics.index(args.fails)] == 0
        cell = lambda m: percent(*agreement.share(agreed[failing, metrics.index(m)], None if photo is None else photo[failing])) if count.loc[args.fails, m] else "–"
        rows = [[shown(m), count.loc[args.fails, m], cell(m), *([reported.get(m, "–")] if reported else [])] for m in order.index]
        report.table(f"{name}: pairs on which {shown(args.fails)} fails", ["metric", "n", "accuracy, %", *(["paper, %"] if reported else [])], rows, name.replace(" ", "-"), share)
        shares.append(share)

    def heat_map(figure, axis):
        values = 100 * shares[-1].to_numpy(copy=True)
        np.fill_diagonal(values, np.nan)
        figure.colorbar(axis.imshow(values, cmap="viridis", vmin=0, vmax=100), label="agrees with the preferences, %")
        for i, j in np.argwhere(~np.isnan(values)) if len(metrics) <= 20 else []:
            axis.text(j, i, f"{values[i, j]:.0f}", ha="center", va="center", fontsize=7, color="black" if values[i, j] > 60 else "white")
        axis.set(xticks=range(len(metrics)), yticks=range(len(metrics)), xticklabels=map(shown, metrics), yticklabels=map(shown, metrics), xlabel="this metric, ...",
                 ylabel="... where this one fails")
        axis.tick_params(axis="x", rotation=90)
        axis.set_title(wrapped(f"{sets[-1][0]}: {'; '.join(dict.fromkeys(run.truth for run in found))}", 45), fontsize=8)
    plot(report.out / "complement.png", heat_map, figsize=(4 + 0.35 * len(metrics), 3 + 0.3 * len(metrics)))
    report.text("accuracy on the pairs with a consensus that the named metric gets wrong (two equal scores included); Wilson intervals, widened where needed to t over photos where they are known; the matrix is in the .csv files and complement.png")
    report.record["share"] = {name: json.loads(share.to_json(orient="index")) for (name, *_), share in zip(sets, shares)}
    report.save()
    return shares[-1]


def bapps(args):
    """Distances with votes: accuracy and 2AFC score of each file's metric, and paired differences."""
    common = os.path.commonprefix([path.stem for path in args.files]).rpartition("_")[0]                    # says nothing about a metric
    read = {path.stem[len(common):].lstrip("_"): agreement.read_csv(path, "bapps", header=None, names=["name", "d0", "d1", "afc", "vote"]) for path in args.files}
    names, first = list(read), next(iter(read.values()))
    if len(names) < len(args.files):
        raise runs.UserError("bapps: two files of one name; rename one")
    for name, table in read.items():
        numbers = table[["d0", "d1", "vote"]].apply(pd.to_numeric, errors="coerce")
        if numbers.isna().any(axis=None) or not numbers.vote.between(0, 1).all():
            row = int((numbers.isna().any(axis=1) | ~numbers.vote.between(0, 1)).idxmax())
            raise runs.UserError(f"bapps {name}: line {row + 1} is not name, distance, distance, 2AFC, vote in [0, 1]: {', '.join(map(str, table.iloc[row]))}")
        table[["d0", "d1", "vote"]] = numbers
        if not table.name.equals(first.name) or not np.allclose(table.vote, first.vote):
            raise runs.UserError(f"bapps {name}: other pairs or votes than {names[0]}; paired tests need the same in each file")
    votes = first.vote.to_numpy()
    margin = np.stack([(t.d0 - t.d1).to_numpy(float) for t in read.values()], 1)
    agreed, afc = agreement.agree(margin, votes), agreement.two_afc(margin, votes)
    report = Report(args.out, "bapps", ["people's votes of BAPPS"])
    result, pairs = agreement.accuracy(agreed, margin, names), agreement.paired(agreed, names)
    photo = np.arange(len(votes))                                                 # every pair is a patch of its own
    mean = {m: agreement.over_photos(afc[:, k], photo) for k, m in enumerate(names)}
    report.table(f"{len(votes)} pairs", ["metric", "2AFC [95 %]", "accuracy, %", "n", "equal distances"],
                 [[m, "{:.4f} [{:.4f}, {:.4f}]".format(*mean[m][:3]), percent(r.accuracy, r.low, r.high), r.n, r.ties] for m, r in zip(result.index, result.itertuples())],
                 "accuracy", result.assign(afc=[mean[m][0] for m in result.index]))
    afc_delta = [agreement.over_photos(afc[:, names.index(r.a)] - afc[:, names.index(r.b)], photo) for r in pairs.itertuples()]
    report.table("paired", ["metrics", "accuracy, points", "first alone right", "second alone", "McNemar p", "q", "verdict", "2AFC difference [95 %]", "p"],
                 [[f"{r.a} – {r.b}", f"{100 * r.difference:+.2f}", r.only_a, r.only_b, f"{r.p:.2g}", f"{r.q:.2g}", "differs" if r.differs else "no evidence",
                   "{:+.4f} [{:+.4f}, {:+.4f}]".format(*d[:3]), f"{d[3]:.2g}"] for r, d in zip(pairs.itertuples(), afc_delta)], "paired", pairs)
    report.text("2AFC: mean share of people that the metric sides with; two equal distances side with nobody: 0.5 in 2AFC, wrong in accuracy. q: p after Benjamini-Hochberg.")
    report.record |= {"2afc": {m: v[:3] for m, v in mean.items()}, "accuracy": result.to_dict("index"), "paired": pairs.to_dict("records")}
    plot(report.out / "bapps.png", lambda figure, axis: bars(axis, result, "BAPPS: agreement with the majority, 95 % intervals", "people's votes", None), figsize=(7, 1.5 + 0.3 * len(names)))
    report.save()


def disagree(args):
    """PNG: the pairs, or else the quintuplets, on which the first two metrics differ most, in standard deviations of each."""
    run = load_run(args.runs[0], wanted=args.metrics)
    if len(run.metrics) < 2:
        raise runs.UserError("disagree compares two metrics: --metrics A B")
    a, b = run.metrics[:2]
    synthetic = " (synthetic)" * run.truth.startswith(agreement.SYNTHETIC)

    def cell(name, text):
        image = load_image(args.images / name).float()[None] / 255
        image = torch.nn.functional.interpolate(image, scale_factor=args.side / max(image.shape[2:]), mode="bicubic", antialias=True).clamp(0, 1)
        said = " ".join(f"{shown(m)} {run.scores.loc[name, m]:.2f}{' (low is good)' * (m in run.lower)}" for m in (a, b))
        return image[0], f"{Path(name).parent.name}/{Path(name).name}\n{said}\n{text}{synthetic}"
    if run.pairs is not None:
        z = judge_pairs(run)[0][:, :2]
        z = z / np.nanstd(z, axis=0)
        apart = np.where(z[:, 0] * z[:, 1] < 0, np.abs(z[:, 0] - z[:, 1]), np.nan)
        rows = lambda i: [cell(run.pairs.left[i], f"preferred by {1 - run.pairs.score[i]:.0%}"), cell(run.pairs.right[i], f"preferred by {run.pairs.score[i]:.0%}")]
    else:
        _, qualities, _ = read_sets(run)
        z = (qualities[:, :, :2] - np.nanmean(qualities[:, :, :2], (0, 1))) / np.nanstd(qualities[:, :, :2], (0, 1))
        best, every = np.nan_to_num(z, nan=-np.inf).argmax(1), np.arange(len(z))
        apart = sum(z[every, best[:, k], k] - z[every, best[:, 1 - k], k] for k in (0, 1))         # how much each loses by the other's choice
        apart = np.where(best[:, 0] != best[:, 1], apart, np.nan)
        groups = [group for _, group in run.sets.groupby("set")]
        rows = lambda i: [cell(r.image, f"{r.version}: {r.label}") for r in groups[i].itertuples()]
    order = [i for i in np.argsort(-apart) if not np.isnan(apart[i])][:args.count]
    if not order:
        raise runs.UserError(f"disagree: {a} and {b} prefer the same image everywhere")
    path = (args.out or args.runs[0]) / f"disagree-{a}-{b}.png".replace(":", "_")
    runs.check_output(path, "--out")
    pictures.save_grid(path, [rows(i) for i in order])
    print(f"{run.truth}: {np.isfinite(apart).sum()} of {len(apart)} on which {a} and {b} prefer different images; the {len(order)} furthest apart: {path}")


# Quintuplets

def read_sets(run):
    """-> labels (S, V) codes, qualities (S, V, metrics), photos. Original first."""
    codes = {"original": data.ORIGINAL} | {word.lower(): code for word, code in data.LABELS.items()}
    versions = list(dict.fromkeys(run.sets.version))
    label = run.sets.assign(code=run.sets.label.map(codes)).pivot(index="set", columns="version", values="code")[versions]
    image = run.sets.pivot(index="set", columns="version", values="image")[versions]
    sign = np.array([-1.0 if m in run.lower else 1.0 for m in run.metrics])
    qualities = run.scores.reindex(image.to_numpy().ravel()).to_numpy().reshape(*image.shape, len(run.metrics)) * sign
    return label.to_numpy(), qualities, run.sets.groupby("set").photo.first().to_numpy()


def hggt(args):
    run = load_run(args.runs[0], "sets", args.metrics)
    labels, qualities, photos = read_sets(run)
    report = Report(args.out or args.runs[0], "hggt", [run.truth])
    reported = agreement.TABLE4 if run.about.get("paper") == "hggt" else {}
    has = {word: int((labels == code).any(1).sum()) for word, code in data.LABELS.items()}
    report.text(f"{len(labels)} quintuplets: {has['Positive']} with a positive, {has['Similar']} with a similar, {has['Negative']} with a negative version")
    if not has["Negative"]:
        report.text("no quintuplet has a negative: NM and the share of negatives ranked first say nothing here")
    result = {}
    for counted in (True, False):
        rows, numbers = [], {}
        for k, metric in enumerate(run.metrics):
            whole = ~np.isnan(qualities[:, :, k]).any(1)
            if not whole.any():
                report.text(f"{metric}: no quintuplet has all its scores")
                continue
            found = agreement.misalignment(labels[whole], qualities[whole, :, k], counted)
            photo = pd.factorize(photos[whole])[0]
            mean = lambda name, of=slice(None): agreement.share(found[name][of].astype(float), photo[of])
            src = agreement.over_photos(found["src"], photo)[:3]
            cells = {"src": (src[0], *np.clip(src[1:], -1, 1)), "pm": mean("pm"), "pm_of_positive": mean("pm", found["positive"]), "nm": mean("nm"),
                     "nm_of_negative": mean("nm", found["negative"]), "negative_first": mean("negative_first", found["negative"])}
            numbers[metric] = {"n": int(whole.sum()), "src_undefined": int(np.isnan(found["src"]).sum()), "without_similar": int((~found["similar"]).sum()), **cells}
            paper = [" / ".join(f"{v:.2f}" for v in reported[metric].values()) if metric in reported else "–"] if reported and counted else []
            rows.append([shown(metric), int(whole.sum()), *("–" if np.isnan(v[0]) else f"{v[0]:.3f} [{v[1]:.2f}, {v[2]:.2f}]" for v in cells.values()), *paper])
        result["similar" if counted else "left out"] = numbers
        report.table(f"the original {'counts as similar' if counted else 'is left out'}", ["metric", "sets", "SRC ↑", "PM ↓", "PM, of sets with a positive", "NM ↓", "NM, of sets with a negative",
                     "negative first, of sets with one", *(["paper: SRC / PM / NM"] if reported and counted else [])], rows, f"original-{'similar' if counted else 'out'}",
                     pd.DataFrame.from_dict({m: {k: v[0] if isinstance(v, tuple) else v for k, v in n.items()} for m, n in numbers.items()}, orient="index"))
    picked = {}
    for k, metric in enumerate(run.metrics):
        whole = ~np.isnan(qualities[:, :, k]).any(1)
        best = np.take_along_axis(labels[whole], qualities[whole, :, k].argmax(1)[:, None], 1)[:, 0]
        picked[metric] = {word: (best == code).mean() if len(best) else np.nan for word, code in {"original": data.ORIGINAL, **data.LABELS}.items()}
    report.table("what AMO would pick, whole images", ["metric", *(f"{word.lower()}, %" for word in picked[run.metrics[0]])],
                 [[shown(m), *map(percent, row.values())] for m, row in picked.items()], "picks", pd.DataFrame.from_dict(picked, orient="index"))
    missing = {m: n["n"] for m, n in result["similar"].items() if n["n"] < len(labels)}
    for metric, n in missing.items():
        report.text(f"{metric}: {len(labels) - n} of {len(labels)} quintuplets left out, a version has no score")
    undefined = {m: n["src_undefined"] for m, n in result["similar"].items() if n["src_undefined"]}
    if undefined:
        report.text(f"SRC is undefined, and left out of the mean, where all labels or all scores are equal: {', '.join(f'{m} {n}' for m, n in undefined.items())} sets")
    report.text("SRC: mean over sets of Spearman's correlation of scores with labels (positive > similar > negative; ties by mean rank). PM (NM): share of sets in which a positive (negative) is ranked "
                "below (above) a similar one; equal scores are no misalignment. 95 % intervals: SRC t over photos, shares Wilson, widened where needed to t over photos. Negative first, and AMO: of equal scores the first version.")
    report.record |= {"result": result, "picks": picked}
    def marks(figure, axis):
        for k, (name, colour) in enumerate((("src", "tab:blue"), ("pm", "tab:orange"), ("nm", "tab:green"))):
            cells = np.array([n[name] for n in result["similar"].values()])
            axis.errorbar(cells[:, 0], np.arange(len(cells)) + 0.2 * (k - 1), xerr=np.maximum(0, [cells[:, 0] - cells[:, 1], cells[:, 2] - cells[:, 0]]), fmt="o", ms=4, color=colour, label=name.upper())
        axis.set(yticks=range(len(cells)), yticklabels=map(shown, result["similar"]), xlabel=wrapped(run.truth))
        axis.invert_yaxis()
        axis.set_title(f"{run.name}: the original counts as similar, 95 % intervals", fontsize=10)
        figure.legend(loc="outside right center")
    plot(report.out / "hggt.png", marks, figsize=(7, 2 + 0.5 * len(result["similar"])))
    report.save()


# Both

def recommend(args):
    found = load_runs(args)
    metrics = [m for m in found[0].metrics if all(m in run.metrics for run in found)]
    with_pairs, with_sets = ([run for run in found if getattr(run, kind) is not None] for kind in ("pairs", "sets"))
    if not with_pairs or len(metrics) < 2:
        raise runs.UserError("recommend needs a folder with pairs, and two metrics scored in every folder")
    _, agreed, photos = zip(*map(judge_pairs, with_pairs))
    agreed = [part[:, [run.metrics.index(m) for m in metrics]] for run, part in zip(with_pairs, agreed)]
    speed = {m: next((run.about["metrics"][m].get("speed") for run in found if run.about["metrics"][m].get("speed")), None) for m in metrics}
    unknown = [m for m in metrics if speed[m] is None]
    table = pd.DataFrame({"accuracy": [np.mean([np.nanmean(part[:, k]) for part in agreed]) for k in range(len(metrics))]}, metrics)
    table["pm"], table["nm"] = np.nan, np.nan
    if with_sets:
        labels, qualities, _ = read_sets(with_sets[0])
        for m in metrics:
            q = qualities[:, :, with_sets[0].metrics.index(m)]
            whole = ~np.isnan(q).any(1)
            marks = agreement.misalignment(labels[whole], q[whole])
            table.loc[m, ["pm", "nm"]] = marks["pm"].mean(), marks["nm"].mean()
    table["forward"] = [speed[m]["forward"] if speed[m] else np.nan for m in metrics]
    table["backward"] = [(speed[m]["backward"] or np.nan) if speed[m] else np.nan for m in metrics]
    table["differentiable"] = [bool(speed[m]["differentiable"]) if speed[m] else True for m in metrics]
    pooled, photo = np.concatenate(agreed), together(photos)
    usable = table[table.differentiable].accuracy
    best = usable.idxmax() if len(usable) else None                               # with it the others are compared
    pairs = agreement.paired(pooled, metrics, photo)
    less = {r.b for r in pairs[pairs.differs].itertuples() if r.a == best and r.difference > 0} | {r.a for r in pairs[pairs.differs].itertuples() if r.b == best and r.difference < 0}
    table["less"] = [m in less for m in metrics]
    share, _ = agreement.complement(pooled, metrics)
    train, keep = agreement.recommend(table, share)
    report = Report(args.out or args.runs[0], "recommend", [run.truth for run in found])
    table["where_it_fails"] = share.loc[train] if train else np.nan
    number = lambda v, text: "–" if v != v else text.format(v)
    report.table("metrics", ["metric", "accuracy, %", f"less than {shown(best)} by test", "PM ↓", "NM ↓", "images/s", "with gradient", "differentiable", f"right where {shown(train)} fails, %" if train else "–"],
                 [[shown(m), percent(r.accuracy), "yes" if r.less else "no", number(r.pm, "{:.2f}"), number(r.nm, "{:.2f}"), number(r.forward, "{:.1f}"), number(r.backward, "{:.1f}"),
                   "not measured" if m in unknown else "yes" if r.differentiable else "no", percent(r.where_it_fails) if m != train else ""]
                  for m, r in zip(table.sort_values("accuracy", ascending=False).index, table.sort_values("accuracy", ascending=False).itertuples())], "metrics", table)
    if unknown:
        report.text(f"speed not measured, taken as differentiable: {', '.join(unknown)} (ready scores, or --no-speed)")
    report.text(f"images/s: four random 256x256 crops, {next((s['device'] for s in speed.values() if s), 'not measured')}; accuracy: mean over {', '.join(run.name for run in with_pairs)}, each counting the same")
    report.text(f"By these preferences: train with {train}; keep {', '.join(keep)} for evaluation." if train else
                "None of these to train with: none is differentiable, right more often than chance, and not clearly worse than the best one that is.")
    report.record |= {"train": train, "keep": keep, "table": json.loads(table.to_json(orient="index"))}
    report.save()
