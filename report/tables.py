"""Numbers as tables: bootstrap intervals, differences with a verdict; as text, Markdown, LaTeX and CSV.

    python -m report.tables FILE.json                                  the table that evaluate.py printed
    python -m report.tables FILE.json --format latex --out FILE.tex    or markdown, or csv of every image
    python -m report.tables --diff A.json B.json                       why do two tables disagree?

FILE.json is a result, as evaluate.py --out-json writes it: scores {row: {image: {metric: value}}}, their means,
intervals and differences, and the circumstances under which they were computed. Nothing here knows of networks.
"""
import csv
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
from scipy import stats

import runs

# PAPER Sec. 5: the columns of Tables 5, 7 and 8, in order
NINE = ("psnr", "ssim", "lpips", "stlpips", "dists", "musiq", "nima", "qalign", "topiq_nr")
SHOWN = {"psnr": "PSNR", "ssim": "SSIM", "vgg": "VGG distance", "flat_hf": "flat HF share", "lpips": "LPIPS",
         "stlpips": "LPIPS-ST", "dists": "DISTS", "musiq": "MUSIQ", "nima": "NIMA", "qalign": "Q-Align",
         "topiq_nr": "TOPIQ", "niqe": "NIQE", "brisque": "BRISQUE", "piqe": "PIQE", "ilniqe": "IL-NIQE",
         "rewards.cnniqa:build": "CNNIQA-LIVE", "cnniqa_live:build": "CNNIQA-LIVE",
         "rewards.sharpness:build": "log Laplacian variance", "rewards.gridfree:build": "ranker3 without grid"}
# a row of every table of opinions, never a model to train with
CONTROL = "rewards.sharpness:build"
# the paper's "FR low", "FR mid" and "NR high"; other metrics that a result says to compare are full-reference, too
FULL_REFERENCE, PERCEPTUAL, NO_REFERENCE = "full-reference", "perceptual full-reference", "no-reference"
GROUPS = {FULL_REFERENCE: ("psnr", "ssim", "flat_hf"), PERCEPTUAL: ("lpips", "stlpips", "dists", "vgg")}
# rows that are no outputs of a method: they have no place among the best
NO_RIVALS = ("reference", "gold")
LEGEND = ("↑ higher is better, ↓ lower is better; in brackets 95 % bootstrap intervals over images",
          "*  interval without zero and p < 0.05 in a paired t test over images; unmarked: no evidence of a difference")


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("result", type=Path, nargs="?", metavar="FILE.json", help="a file of evaluate.py --out-json")
    p.add_argument("--diff", type=Path, nargs=2, metavar=("A.json", "B.json"), help="compare two results")
    p.add_argument("--format", choices=list(FORMATS), default="text", help="text: aligned columns; csv: every image")
    p.add_argument("--against", metavar="ROW", help="take differences to this row; default: as evaluate.py did")
    p.add_argument("--out", type=Path, metavar="FILE", help="write a file instead of printing")
    args = p.parse_args(argv)
    if (args.result is None) == (args.diff is None):
        p.error("give FILE.json, or --diff A.json B.json")
    return args


# Statistics

def interval(values):
    """95 % bootstrap interval of the mean of (n,) values: BCa, 9999 resamples, always the same.

    (mean, mean) where the values hardly differ: the bootstrap would be degenerate.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2 or np.ptp(values) < 1e-9:
        return float(values.mean()), float(values.mean())
    low, high = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=9999,
                                rng=np.random.default_rng(0)).confidence_interval
    return float(low), float(high)


def paired_p(values):
    """p of a two-sided t test of (n,) differences against 0; 1 for a single image, 0 where all differ by the same."""
    if len(values) < 2 or np.ptp(values) < 1e-9:
        return float(len(values) < 2 or abs(values[0]) < 1e-9)
    return float(stats.ttest_1samp(values, 0).pvalue)


def difference(a, b):
    """a, b (seeds, images) -> mean of a - b, its 95 % interval over images, the seeds' means, and the verdict.

    The verdict needs an interval without 0, seeds that agree, and p < 0.05 in a paired t test over images of the
    seeds' mean: with few images the interval alone is too short. Of normal differences of mean 0 it leaves out 0 in
    16 % with 5 images and in 8 % with 17; with the t test 6 % and 5 % are called clear (2000 draws each).
    """
    delta = a - b
    images, seeds = delta.mean(0), delta.mean(1)
    low, high = interval(images)
    sign = np.sign(delta.mean())
    clear = low * high > 0 and (np.sign(seeds) == sign).all() and paired_p(images) < 0.05
    return {"mean": float(delta.mean()), "low": low, "high": high, "seeds": seeds.tolist(),
            "verdict": ("higher" if sign > 0 else "lower") if clear else "no evidence"}


def judged(scores, metric):
    """-> the rows that have scores of a metric, and the images of which all these rows have one.

    Rows are compared on the same images: one that lacks a finite score in one row is left out of all.
    """
    rows = [row for row, images in scores.items() if any(metric in s for s in images.values())]
    return rows, [stem for stem in next(iter(scores.values())) if all(metric in scores[row][stem] for row in rows)]


def summarise(scores, lower, against):
    """{row: {metric: {"mean", "low", "high"}}} and {row: {metric: difference to the row `against`}}."""
    means, differences = {row: {} for row in scores}, {row: {} for row in scores if row != against}
    for m in lower:
        rows, stems = judged(scores, m)
        values = {row: np.array([scores[row][stem][m] for stem in stems]) for row in rows if stems}
        for row, v in values.items():
            means[row][m] = dict(zip(("mean", "low", "high"), (np.mean(v), *interval(v))))
            if row != against and against in values:
                differences[row][m] = difference(v[None], values[against][None])
    return means, differences


def ranks(means, lower, metric, rivals):
    """{row: 0 for the best, 1 for the second best, ...} of one column; equal means share a place."""
    values = {row: means[row][metric]["mean"] for row in rivals if metric in means[row]}
    order = sorted(set(values.values()), reverse=not lower[metric])
    return {row: order.index(v) for row, v in values.items()}


# Results

def read_result(path, whole=True):
    """A file of evaluate.py --out-json. whole: with means, intervals and differences, which very old files lack."""
    try:
        result = json.loads(path.read_bytes())
        for images in result["scores"].values():
            [float(value) for scores in images.values() for value in scores.values()]
        dict(result["lower_is_better"].items())
    except FileNotFoundError:
        raise runs.UserError(f"{path}: no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise runs.UserError(f"{path}: not a file of evaluate.py --out-json ({reason})") from None
    missing = {"mean", "intervals", "differences", "images", "protocol"} - set(result)
    if whole and missing:
        raise runs.UserError(f"{path}: has no {', '.join(sorted(missing))}: call evaluate.py again")
    return result


def means_of(result):
    """{row: {metric: {"mean", "low", "high"}}} of a result."""
    return {row: {m: dict(zip(("mean", "low", "high"), (mean, *result["intervals"][row][m])))
                  for m, mean in means.items()} for row, means in result["mean"].items()}


def compared_with(result):
    """The row that a result's differences are to; in files of earlier commits the one that has none."""
    return result.get("against") or next((row for row in result["mean"] if row not in result["differences"]), None)


def change_row(result, against):
    """The result with its differences to another row."""
    if against not in result["scores"]:
        raise runs.UserError(f"--against {against}: no such row; there are {', '.join(result['scores'])}")
    _, differences = summarise(result["scores"], result["lower_is_better"], against)
    return result | {"against": against, "differences": differences}


def group(metric, result=None):
    """The paper's group of columns that a metric belongs to."""
    of_result = FULL_REFERENCE if metric in (result or {}).get("full_reference", ()) else NO_REFERENCE
    return next((name for name, members in GROUPS.items() if metric in members), of_result)


def ordered(result):
    """The metrics by group, in it the paper's columns in the paper's order, then the others as they were given."""
    metrics = list(result["lower_is_better"])
    known = [m for m in NINE if m in metrics] + [m for m in metrics if m not in NINE]
    return sorted(known, key=lambda m: [*GROUPS, NO_REFERENCE].index(group(m, result)))


def spans(result):
    """{group of columns: its metrics}"""
    groups = {}
    for metric in ordered(result):
        groups.setdefault(group(metric, result), []).append(metric)
    return groups


def groups_line(result):
    names = {name: [shown(m) for m in metrics] for name, metrics in spans(result).items()}
    return "; ".join(f"{name}: {', '.join(metrics)}" for name, metrics in names.items())


def left_out(result):
    """One line for each metric that has no finite score of some images, [] where there is none."""
    lines = []
    for m in ordered(result):
        _, stems = judged(result["scores"], m)
        missing = [stem for stem in next(iter(result["scores"].values())) if stem not in stems]
        if missing:
            lines.append(f"{shown(m)}: {len(missing)} of {result['images']} images are left out, first "
                         f"{missing[0]}: not every row has a finite score there")
    return lines


def title_of(result):
    """The protocol in words, and the number of images."""
    title = f"protocol {result['protocol']['name']}: {result['protocol']['says']}; mean of {result['images']} images"
    # earlier commits had fp32 alone
    precisions = {record.get("precision", "fp32") for record in result.get("weights", {}).values()} - {"fp32"}
    return title + "".join(f"; networks in {precision}" for precision in sorted(precisions))


# Cells

def shown(metric):
    """A metric's name as tables have it; of a reward file its stem."""
    return SHOWN.get(metric, Path(metric).stem if runs.is_reward_file(metric) else metric)


def heading(metric, lower):
    """A metric's name with an arrow. lower None: neither is better."""
    return shown(metric) + ("" if lower is None else " ↓" if lower else " ↑")


def headings(result):
    return [heading(m, result["lower_is_better"][m]) for m in ordered(result)]


def digits(values):
    """Decimals of a column: three for small numbers."""
    return 3 if all(abs(v) < 2 for v in values) else 2


def decimals_of(result):
    return {m: digits([means[m] for means in result["mean"].values() if m in means]) for m in result["lower_is_better"]}


def difference_cell(d, decimals, mark="**{}**"):
    """The mean, marked where the verdict is clear (in Markdown: bold), and its interval."""
    mean = f"{d['mean']:+.{decimals}f}"
    marked = mark.format(mean) if d["verdict"] != "no evidence" else mean
    return f"{marked} [{d['low']:+.{decimals}f}, {d['high']:+.{decimals}f}]"


def mean_rows(result, best="{}", second="{}", intervals=True):
    """[[row, formatted mean, ...]]; best, second: formats of the best of a column and the second of three or more."""
    means, lower, decimals = means_of(result), result["lower_is_better"], decimals_of(result)
    rivals = [row for row in means if row not in NO_RIVALS] or list(means)
    places = {m: ranks(means, lower, m, rivals) for m in lower}
    lines = []
    for row, cells in means.items():
        line = [row]
        for m in ordered(result):
            if m not in cells:
                line.append("–")
                continue
            mean, low, high = (f"{cells[m][k]:.{decimals[m]}f}" for k in ("mean", "low", "high"))
            place = places[m].get(row)
            mark = best if place == 0 else second if place == 1 and len(rivals) > 2 else "{}"
            line.append(mark.format(mean) + (f" [{low}, {high}]" if intervals else ""))
        lines.append(line)
    return lines


def difference_rows(result, cell=difference_cell):
    """[[row, difference, ...]]"""
    decimals = decimals_of(result)
    return [[row, *(cell(differences[m], decimals[m]) if m in differences else "–" for m in ordered(result))]
            for row, differences in result["differences"].items()]


# Formats

def aligned(head, rows, width=None):
    """Columns aligned with spaces, the first to the left, the others to the right.

    They are split into several blocks where the width is too small. width: characters; None: of the terminal, 120 where
    there is none.
    """
    width = width or shutil.get_terminal_size((120, 24)).columns
    lines = [[str(cell) for cell in line] for line in [head, *rows]]
    widths = [max(len(line[c]) for line in lines) for c in range(len(head))]
    blocks, used = [[]], widths[0]
    for c in range(1, len(head)):
        if blocks[-1] and used + 2 + widths[c] > width:
            blocks.append([])
            used = widths[0]
        blocks[-1].append(c)
        used += 2 + widths[c]

    def of_block(line, block):
        return "  ".join([line[0].ljust(widths[0]), *(line[c].rjust(widths[c]) for c in block)]).rstrip()
    return "\n\n".join("\n".join(of_block(line, block) for line in lines) for block in blocks)


def text(result, width=None):
    """For a terminal: means, then differences, with a legend."""
    def signed(d, decimals):
        return difference_cell(d, decimals, "{}") + ("  " if d["verdict"] == "no evidence" else " *")
    parts = [f"{title_of(result)}\n{groups_line(result)}", aligned(["", *headings(result)], mean_rows(result), width)]
    if result["differences"]:
        head = [f"minus {compared_with(result)}", *(f"{text}  " for text in headings(result))]
        parts.append(aligned(head, difference_rows(result, signed), width))
    return "\n\n".join(parts) + "\n\n" + "\n".join([*LEGEND[:2 if result["differences"] else 1], *left_out(result)])


def markdown(result):
    """Means with intervals, the best of each column bold, the second italic; differences, bold where they are clear."""
    parts = [groups_line(result), runs.markdown(["", *headings(result)], mean_rows(result, "**{}**", "*{}*"))]
    if result["differences"]:
        parts.append(runs.markdown([f"minus {compared_with(result)}", *headings(result)], difference_rows(result)))
    return "\n\n".join([*parts, *left_out(result)])


def tex(text):
    """Plain text as LaTeX."""
    signs = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--",
             "↑": r"$\uparrow$", "↓": r"$\downarrow$"}
    return re.sub(r"[\\~^–↑↓%_&#${}]", lambda match: signs.get(match[0], "\\" + match[0]), str(text))


def latex(result):
    """A tabular with the paper's groups in its head (needs booktabs): best bold, second best underlined."""
    groups = [rf"\multicolumn{{{len(metrics)}}}{{c}}{{{name}}}" for name, metrics in spans(result).items()]
    rows = mean_rows(result, r"\textbf{{{}}}", r"\underline{{{}}}", intervals=False)
    body = [" & ".join([tex(name), *(value.replace("–", "--") for value in values)]) for name, *values in rows]
    head = [" & ".join(["", *groups]), " & ".join(["", *map(tex, headings(result))])]
    head, body = ([line + r" \\" for line in part] for part in (head, body))
    lines = [r"\toprule", *head, r"\midrule", *body, r"\bottomrule"]
    columns = "l" + "c" * len(result["lower_is_better"])
    title = "; ".join([title_of(result), f"commit {result.get('commit')}", *left_out(result)])
    return tabular_of(title, columns, lines)


def tabular(title, head, rows):
    """Formatted cells as a LaTeX tabular with a comment for its title (needs booktabs)."""
    lines = [" & ".join(map(tex, row)) + r" \\" for row in [head, *rows]]
    lines = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return tabular_of(title, "l" + "r" * (len(head) - 1), lines)


def tabular_of(title, columns, lines):
    return "\n".join([f"% {title}", rf"\begin{{tabular}}{{{columns}}}", *lines, r"\end{tabular}", ""])


def to_csv(result):
    """One line per row and image."""
    metrics, lines = ordered(result), io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["row", "image", "protocol", *metrics])
    for row, images in result["scores"].items():
        for stem, scores in images.items():
            writer.writerow([row, stem, result["protocol"]["name"], *(scores.get(m, "") for m in metrics)])
    return lines.getvalue()


FORMATS = {"text": text, "markdown": markdown, "latex": latex, "csv": to_csv}


# Why do two results disagree?

# identity: in files of older commits
MADE_BY = {"hash": "hash of weights (or of ready-made images)", "identity": "weights", "tile": "tile",
           "overlap": "overlap of tiles", "pad_mode": "padding", "precision": "precision"}


def explain(a, b):
    """A line for each difference in commit, protocol, metrics, versions, images, rows and scores."""
    lines, absent = [], "not recorded"

    def compare(subject, first, second):
        if first != second:
            lines.append(f"{subject} is {first!r} in the first, {second!r} in the second")
    for subject in ("commit", "code", "device"):
        compare(subject, a.get(subject, absent), b.get(subject, absent))
    for subject in ("protocol", "metrics", "versions"):
        first, second = a.get(subject, {}), b.get(subject, {})
        for key in first | second:
            # "says" is the wording of border and y
            if key != "says":
                compare(f"{subject}: {key}", first.get(key, absent), second.get(key, absent))
    files = a.get("files", {}), b.get("files", {})
    for name, own, other in (("first", *files), ("second", *files[::-1])):
        only = [stem for stem in own if stem not in other]
        if only:
            lines.append(f"images: {len(only)} in the {name} only, for example {only[0]}")
    changed = [stem for stem in files[0] if stem in files[1] and files[0][stem] != files[1][stem]]
    if changed:
        lines.append(f"images: {len(changed)} have other pixels (LR or reference), for example {changed[0]}")
    for row in a["scores"]:
        if row in b["scores"]:
            records = [result.get("weights", {}).get(row, {}) for result in (a, b)]
            for key, subject in MADE_BY.items():
                if any(key in record for record in records):
                    # earlier commits had fp32 alone
                    otherwise = "fp32" if key == "precision" else absent
                    compare(f"{row}: {subject}", *(record.get(key, otherwise) for record in records))
            lines += score_changes(row, a["scores"][row], b["scores"][row], a["lower_is_better"])
    for name, own, other in (("first", a["scores"], b["scores"]), ("second", b["scores"], a["scores"])):
        only = [row for row in own if row not in other]
        if only:
            lines.append(f"rows: {', '.join(only)} in the {name} only")
    return lines


def score_changes(row, first, second, metrics):
    """[a line with the largest difference of each metric between two {image: {metric: value}}], [] if all are equal."""
    pairs = {m: [(s[m], second[stem][m]) for stem, s in first.items() if m in s and m in second.get(stem, {})]
             for m in metrics}
    largest = {m: max((abs(one - other) for one, other in values), default=0) for m, values in pairs.items()}
    changed = ", ".join(f"{m} {d:.4g}" for m, d in largest.items() if d > 0)
    return [f"{row}: scores differ by up to {changed}"] if changed else []


def main(args):
    if args.diff:
        lines = explain(*(read_result(path, whole=False) for path in args.diff))
        print("\n".join(lines) or "no difference: same commit, images, weights, protocol, versions and scores")
        return
    runs.check_output(args.out, "--out")
    result = read_result(args.result)
    if args.against:
        result = change_row(result, args.against)
    table = FORMATS[args.format](result)
    if args.out:
        runs.write_atomic(args.out, lambda temporary: temporary.write_text(table, encoding="utf-8"))
        print(f"wrote {args.out}")
    else:
        print(table.rstrip("\n"))


if __name__ == "__main__":
    runs.cli(lambda: main(parse_args()))
