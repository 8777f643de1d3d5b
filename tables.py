"""Numbers as tables: bootstrap intervals, differences with a verdict, Markdown, LaTeX and CSV. Knows nothing of networks.

A result is what evaluate.py writes as JSON: scores {row: {image: {metric: value}}}, lower_is_better {metric: bool}, and what made them.
"""
import csv
import io
import re

import numpy as np
from scipy import stats

import flags
import runs

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


def difference(a, b):
    """a, b (seeds, images) -> mean of a - b, its 95 % interval over images, the seeds' means, and the verdict: all seeds agree and 0 is outside."""
    delta = a - b
    seeds, (low, high) = delta.mean(1), interval(delta.mean(0))
    sign = np.sign(delta.mean())
    clear = low * high > 0 and (np.sign(seeds) == sign).all()
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
    known = [m for m in flags.NINE if m in metrics] + [m for m in metrics if m not in flags.NINE]
    return sorted(known, key=lambda m: [*GROUPS, "NR high"].index(group(m)))


def heading(metric, lower):
    return f"{SHOWN.get(metric, metric)} {'↓' if lower else '↑'}"


def digits(values):
    """Decimals of a column: three for small numbers."""
    return 3 if all(abs(v) < 2 for v in values) else 2


def summarise(scores, lower):
    """{row: {metric: {"mean", "low", "high"}}}, and {row: {metric: difference to the first row}} over the images that both have."""
    means, differences, first = {}, {}, next(iter(scores))
    for row, images in scores.items():
        have = [m for m in lower if all(m in s for s in images.values())]
        means[row] = {m: dict(zip(("mean", "low", "high"), (np.mean(values), *interval(values))))
                      for m, values in ((m, [s[m] for s in images.values()]) for m in have)}
        if row != first:
            both = [m for m in have if m in means[first]]
            differences[row] = {m: difference(*(np.array([[scores[r][stem][m] for stem in images]]) for r in (row, first))) for m in both}
    return means, differences


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


def markdown(means, lower, differences=None):
    """Means with intervals, the best of each column bold and the second italic; then differences to the first row, bold where the verdict is clear."""
    metrics, rows = cells(means, lower, ("**{}**", "*{}*"), intervals=True)
    parts = [runs.markdown(["", *(heading(m, lower[m]) for m in metrics)], rows)]
    if differences:
        first = next(iter(means))
        decimals = {m: digits([row[m]["mean"] for row in means.values() if m in row]) for m in metrics}
        parts.append(runs.markdown([f"minus {first}", *(heading(m, lower[m]) for m in metrics)],
                                   [[row, *(difference_cell(d[m], decimals[m]) if m in d else "–" for m in metrics)] for row, d in differences.items()]))
    return "\n\n".join(parts)


def latex(means, lower):
    """A tabular with the paper's groups in its head (needs booktabs): best bold, second best underlined."""
    metrics, rows = cells(means, lower, (r"\textbf{{{}}}", r"\underline{{{}}}"))
    groups = [group(m) for m in metrics]
    spans = [(name, groups.count(name)) for name in dict.fromkeys(groups)]
    escape = lambda text: text.replace("_", r"\_").replace("–", "--")
    head = " & ".join(["", *(rf"\multicolumn{{{n}}}{{c}}{{{name}}}" for name, n in spans)])
    arrows = " & ".join(["", *(escape(SHOWN.get(m, m)) + (r" $\downarrow$" if lower[m] else r" $\uparrow$") for m in metrics)])
    body = " \\\\\n".join(" & ".join(map(escape, row)) for row in rows)
    return f"\\begin{{tabular}}{{l{'c' * len(metrics)}}}\n\\toprule\n{head} \\\\\n{arrows} \\\\\n\\midrule\n{body} \\\\\n\\bottomrule\n\\end{{tabular}}\n"


def tabular(title, head, rows):
    """Formatted cells as a LaTeX tabular with a comment for its title (needs booktabs)."""
    escape = lambda cell: re.sub(r"([%_&#])", r"\\\1", str(cell)).replace("–", "--").replace("↑", r"$\uparrow$").replace("↓", r"$\downarrow$")
    lines = [" & ".join(map(escape, row)) + r" \\" for row in [head, *rows]]
    return "\n".join([f"% {title}", rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}", ""])


def to_csv(scores, lower):
    """One line per row and image."""
    metrics, text = ordered(list(lower)), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "image", *metrics])
    for row, images in scores.items():
        writer.writerows([row, stem, *(s.get(m, "") for m in metrics)] for stem, s in images.items())
    return text.getvalue()


def explain(a, b):
    """Why may two results disagree? Lines, one per difference in protocol, metrics, versions, images, weights and scores; [] if there is none."""
    lines = []
    for what in ("protocol", "metrics", "versions", "tiles"):
        one, other = a.get(what, {}), b.get(what, {})
        lines += [f"{what}: {k} is {one.get(k)!r} in the first, {other.get(k)!r} in the second" for k in one | other if one.get(k) != other.get(k)]
    files_a, files_b = a.get("files", {}), b.get("files", {})
    for name, only in (("first", sorted(set(files_a) - set(files_b))), ("second", sorted(set(files_b) - set(files_a)))):
        if only:
            lines.append(f"images: {len(only)} in the {name} only, for example {only[0]}")
    other = [stem for stem in files_a if stem in files_b and files_a[stem] != files_b[stem]]
    if other:
        lines.append(f"images: {len(other)} have other pixels (LR or reference), for example {other[0]}")
    for row in a["scores"]:
        if row in b["scores"]:
            identity = [r.get("weights", {}).get(row, {}).get("identity") for r in (a, b)]
            if identity[0] != identity[1]:
                lines.append(f"{row}: other weights ({identity[0]} and {identity[1]})")
            deltas = {m: max((abs(s[m] - b["scores"][row][stem][m]) for stem, s in images.items() if m in s and m in b["scores"][row].get(stem, {})), default=0)
                      for images in [a["scores"][row]] for m in a["lower_is_better"]}
            moved = {m: d for m, d in deltas.items() if d > 0}
            if moved:
                lines.append(f"{row}: scores differ by up to " + ", ".join(f"{m} {d:.4g}" for m, d in moved.items()))
    for name, only in (("first", set(a["scores"]) - set(b["scores"])), ("second", set(b["scores"]) - set(a["scores"]))):
        if only:
            lines.append(f"rows: {', '.join(sorted(only))} in the {name} only")
    return lines
