"""Numbers as tables: bootstrap intervals, differences with a verdict, Markdown, LaTeX and CSV. Knows nothing of networks.

A result is what evaluate.py writes as JSON: scores {row: {image: {metric: value}}}, lower_is_better {metric: bool}, and what made them.
"""
import csv
import io
import re

import numpy as np
from scipy import stats

import runs

NINE = ("psnr", "ssim", "lpips", "stlpips", "dists", "musiq", "nima", "qalign", "topiq_nr")   # PAPER Sec. 5: the columns of Tables 5, 7 and 8, in order
SHOWN = {"cnniqa_live:build": "CNNIQA-LIVE", "niqe": "NIQE", "brisque": "BRISQUE", "piqe": "PIQE", "ilniqe": "IL-NIQE", "psnr": "PSNR", "ssim": "SSIM",
         "vgg": "VGG distance", "flat_hf": "flat HF share", "lpips": "LPIPS", "stlpips": "LPIPS-ST", "dists": "DISTS", "musiq": "MUSIQ", "nima": "NIMA",
         "qalign": "Q-Align", "topiq_nr": "TOPIQ"}
GROUPS = {"FR low": ("psnr", "ssim"), "FR mid": ("lpips", "stlpips", "dists", "vgg")}                     # all else is NR high


def interval(values):
    """95 % bootstrap interval of the mean of (n,) values: BCa, 9999 resamples, always the same. (mean, mean) where they hardly differ."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2 or np.ptp(values) < 1e-9:                                  # the bootstrap would be degenerate
        return float(values.mean()), float(values.mean())
    low, high = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=9999, rng=np.random.default_rng(0)).confidence_interval
    return float(low), float(high)


def paired_p(values):
    """p of a two-sided t test of (n,) differences against a mean of 0; 1 for a single image, 0 where all differ by the same."""
    if len(values) < 2 or np.ptp(values) < 1e-9:
        return float(len(values) < 2 or abs(values[0]) < 1e-9)
    return float(stats.ttest_1samp(values, 0).pvalue)


def difference(a, b):
    """a, b (seeds, images) -> mean of a - b, its 95 % interval over images, the seeds' means, and the verdict.

    The verdict needs an interval without 0, seeds that agree, and p < .05 in a paired t test over images of the seeds' mean: with few images the interval alone
    is too short. Of normal differences of mean 0 it leaves out 0 in 16 % with 5 images and in 8 % with 17; with the t test 6 % and 5 % are called clear (2000 draws each).
    """
    delta = a - b
    images, seeds = delta.mean(0), delta.mean(1)
    low, high = interval(images)
    sign = np.sign(delta.mean())
    clear = low * high > 0 and (np.sign(seeds) == sign).all() and paired_p(images) < 0.05
    return {"mean": float(delta.mean()), "low": low, "high": high, "seeds": seeds.tolist(),
            "verdict": ("higher" if sign > 0 else "lower") if clear else "no evidence"}


def group(metric):
    """The paper's column group: full-reference low-level, full-reference mid-level, no-reference."""
    return next((name for name, members in GROUPS.items() if metric in members), "NR high")


def difference_cell(d, decimals):
    """The mean, bold where the verdict is clear, and its interval."""
    bold = "**" * (d["verdict"] != "no evidence")
    return f"{bold}{d['mean']:+.{decimals}f}{bold} [{d['low']:+.{decimals}f}, {d['high']:+.{decimals}f}]"


def ordered(metrics):
    """By group, in it the paper's columns in the paper's order, then the others as given."""
    known = [m for m in NINE if m in metrics] + [m for m in metrics if m not in NINE]
    return sorted(known, key=lambda m: [*GROUPS, "NR high"].index(group(m)))


def heading(metric, lower):
    """lower None: neither is better."""
    return SHOWN.get(metric, metric) + ("" if lower is None else " ↓" if lower else " ↑")


def digits(values):
    """Decimals of a column: three for small numbers."""
    return 3 if all(abs(v) < 2 for v in values) else 2


def summarise(scores, lower):
    """{row: {metric: {"mean", "low", "high"}}}, and {row: {metric: difference to the first row but gold}} over the images that both have."""
    means, differences, first = {}, {}, first_row(scores)
    for row, images in scores.items():
        have = [m for m in lower if all(m in s for s in images.values())]
        means[row] = {m: dict(zip(("mean", "low", "high"), (np.mean(values), *interval(values))))
                      for m, values in ((m, [s[m] for s in images.values()]) for m in have)}
    for row, images in scores.items():
        if row != first:
            both = [m for m in means[row] if m in means[first]]
            differences[row] = {m: difference(*(np.array([[scores[r][stem][m] for stem in images]]) for r in (row, first))) for m in both}
    return means, differences


def first_row(rows):
    """What the others are compared with: the first row; not gold, which stands on top but is no method."""
    return next((row for row in rows if row != "gold"), "gold")


def ranks(means, lower, metric, rivals):
    """{row: 0 for the best, 1 for the second best, ...} of one column; equal means share a place."""
    values = {row: means[row][metric]["mean"] for row in rivals if metric in means[row]}
    order = sorted(set(values.values()), reverse=not lower[metric])
    return {row: order.index(v) for row, v in values.items()}


def cells(means, lower, marks, no_rivals=("reference", "gold"), intervals=False):
    """(metrics, rows of formatted means); marks: (best, second best), each a format of the number; intervals: [low, high] after it."""
    metrics = ordered(list(lower))
    rivals = [row for row in means if row not in no_rivals] or list(means)
    places = {m: ranks(means, lower, m, rivals) for m in metrics}
    decimals = {m: digits([row[m]["mean"] for row in means.values() if m in row]) for m in metrics}
    rows = []
    for name, row in means.items():
        shown = []
        for m in metrics:
            text = f"{row[m]['mean']:.{decimals[m]}f}" if m in row else "–"
            place = places[m].get(name)
            marked = marks[place].format(text) if place in (0, 1) and (place == 0 or len(rivals) > 2) else text
            ends = f" [{row[m]['low']:.{decimals[m]}f}, {row[m]['high']:.{decimals[m]}f}]" if intervals and m in row else ""
            shown.append(marked + ends)
        rows.append([name, *shown])
    return metrics, rows


def spans(metrics):
    """[(the paper's group of columns, how many of these ordered metrics)]"""
    groups = [group(m) for m in metrics]
    return [(name, groups.count(name)) for name in dict.fromkeys(groups)]


def markdown(means, lower, differences=None):
    """Groups of columns; means with intervals, the best of each column bold, the second italic; differences to the first row, bold where the verdict is clear."""
    metrics, rows = cells(means, lower, ("**{}**", "*{}*"), intervals=True)
    groups = "; ".join(f"{name}: {', '.join(SHOWN.get(m, m) for m in metrics if group(m) == name)}" for name, _ in spans(metrics))
    parts = [groups, runs.markdown(["", *(heading(m, lower[m]) for m in metrics)], rows)]
    if differences:
        first = first_row(means)
        decimals = {m: digits([row[m]["mean"] for row in means.values() if m in row]) for m in metrics}
        parts.append(runs.markdown([f"minus {first}", *(heading(m, lower[m]) for m in metrics)],
                                   [[row, *(difference_cell(d[m], decimals[m]) if m in d else "–" for m in metrics)] for row, d in differences.items()]))
    return "\n\n".join(parts)


def tex(text):
    """Plain text as LaTeX."""
    words = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}
    return re.sub(r"[\\~^–↑↓%_&#${}]", lambda found: words.get(found[0], "\\" + found[0]), str(text))


def latex(means, lower, title=""):
    """A tabular with the paper's groups in its head (needs booktabs): best bold, second best underlined. title: for a comment above it."""
    metrics, rows = cells(means, lower, (r"\textbf{{{}}}", r"\underline{{{}}}"))
    head = " & ".join(["", *(rf"\multicolumn{{{n}}}{{c}}{{{name}}}" for name, n in spans(metrics))])
    arrows = " & ".join(["", *(tex(heading(m, lower[m])) for m in metrics)])
    body = " \\\\\n".join(" & ".join([tex(name), *(value.replace("–", "--") for value in values)]) for name, *values in rows)
    return f"% {title}\n\\begin{{tabular}}{{l{'c' * len(metrics)}}}\n\\toprule\n{head} \\\\\n{arrows} \\\\\n\\midrule\n{body} \\\\\n\\bottomrule\n\\end{{tabular}}\n"


def tabular(title, head, rows):
    """Formatted cells as a LaTeX tabular with a comment for its title (needs booktabs)."""
    lines = [" & ".join(map(tex, row)) + r" \\" for row in [head, *rows]]
    return "\n".join([f"% {title}", rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}", ""])


def to_csv(scores, lower, protocol):
    """One line per row and image; protocol: its name, in every line."""
    metrics, text = ordered(list(lower)), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "image", "protocol", *metrics])
    for row, images in scores.items():
        writer.writerows([row, stem, protocol, *(s.get(m, "") for m in metrics)] for stem, s in images.items())
    return text.getvalue()


def check_result(result):
    """ValueError that says what is wrong, unless `result` has the parts of a result that explain compares."""
    number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
    table = lambda value: isinstance(value, dict) and all(isinstance(v, dict) for v in value.values())
    if not isinstance(result, dict):
        raise ValueError("no JSON object")
    scores, lower = result.get("scores"), result.get("lower_is_better")
    if not table(scores) or not all(map(table, scores.values())) or not all(number(v) for images in scores.values() for s in images.values() for v in s.values()):
        raise ValueError("scores must be {row: {image: {metric: number}}}")
    if not isinstance(lower, dict) or not all(isinstance(v, bool) for v in lower.values()):
        raise ValueError("lower_is_better must be {metric: true or false}")
    for what in ("protocol", "metrics", "versions", "files"):
        if not isinstance(result.get(what, {}), dict):
            raise ValueError(f"{what} must be an object")
    if not table(result.get("weights", {})):
        raise ValueError("weights must be {row: {...}}")


MADE_BY = {"hash": "hash of weights (or of ready-made images)", "identity": "weights", "tile": "tile", "overlap": "overlap of tiles", "pad_mode": "padding"}   # identity: in files of older commits


def explain(a, b):
    """Why may two results disagree? Lines, one per difference in commit, protocol, metrics, versions, images, rows and scores; [] if there is none."""
    lines, unsaid = [], "not recorded"
    say = lambda what, one, other: lines.append(f"{what} is {one!r} in the first, {other!r} in the second") if one != other else None
    for what in ("commit", "code", "device"):
        say(what, a.get(what, unsaid), b.get(what, unsaid))
    for what in ("protocol", "metrics", "versions"):
        one, other = a.get(what, {}), b.get(what, {})
        for k in one | other:
            if k != "says":                                                       # words about border and y
                say(f"{what}: {k}", one.get(k, unsaid), other.get(k, unsaid))
    files_a, files_b = a.get("files", {}), b.get("files", {})
    for name, only in (("first", sorted(set(files_a) - set(files_b))), ("second", sorted(set(files_b) - set(files_a)))):
        if only:
            lines.append(f"images: {len(only)} in the {name} only, for example {only[0]}")
    other = [stem for stem in files_a if stem in files_b and files_a[stem] != files_b[stem]]
    if other:
        lines.append(f"images: {len(other)} have other pixels (LR or reference), for example {other[0]}")
    for row in a["scores"]:
        if row in b["scores"]:
            made = [r.get("weights", {}).get(row, {}) for r in (a, b)]
            for key, what in MADE_BY.items():
                if any(key in m for m in made):
                    say(f"{row}: {what}", *(m.get(key, unsaid) for m in made))
            lines += moved(row, a["scores"][row], b["scores"][row], a["lower_is_better"])
    for name, only in (("first", set(a["scores"]) - set(b["scores"])), ("second", set(b["scores"]) - set(a["scores"]))):
        if only:
            lines.append(f"rows: {', '.join(sorted(only))} in the {name} only")
    return lines


def moved(row, one, other, metrics):
    """[a line with the largest difference of each metric's scores between two {image: {metric: value}}], [] where all are equal."""
    deltas = {m: max((abs(s[m] - other[stem][m]) for stem, s in one.items() if m in s and m in other.get(stem, {})), default=0) for m in metrics}
    found = ", ".join(f"{m} {d:.4g}" for m, d in deltas.items() if d > 0)
    return [f"{row}: scores differ by up to {found}"] if found else []
