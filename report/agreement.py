"""Do scores agree with people? Statistics of paper Sec. 3 on pairs with votes and labelled quintuplets; no images.

A pair is two images and a vote: the fraction of people who prefer the right image (as in SBS180K and in BAPPS). A
margin is the quality of the right image minus that of the left one, higher is better; NaN where a score is missing.
agree() turns margins and votes into 1, 0 and NaN. All statistics of pairs are computed from that (pairs, metrics)
array.
"""
import functools
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

import data
import runs

# the first words of `truth` where nobody was asked
SYNTHETIC = "SYNTHETIC, no human judged"
# votes this near to 0.5 are no consensus
TIE = 1e-6
# CHOICE: `recommend` treats accuracies nearer than this as equal
MARGIN = 0.01
# the columns that the scripts of this repository write
COLUMNS = "left=left,right=right,score=score"
QUALITY = {data.NEGATIVE: 0, data.SIMILAR: 1, data.ORIGINAL: 1, data.POSITIVE: 2}
# PAPER Table 1: the seven most accurate metrics of phase I
TOP7 = ("paq2piq", "nima", "musiq", "liqe", "arniqa-tid", "qalign", "topiq_nr")
# what pyiqa's metrics were trained on; groups the metrics of Table 6
TRAINED_ON = {
    "KonIQ-10k": ("musiq", "topiq_nr", "liqe", "arniqa", "hyperiqa", "maniqa", "clipiqa+", "clipiqa+_vitL14_512",
                  "clipiqa+_rn50_512", "tres", "dbcnn", "wadiqam_nr", "cnniqa"),
    "FLIVE (PaQ-2-PiQ)": ("paq2piq", "musiq-paq2piq", "arniqa-flive", "topiq_nr-flive", "tres-flive"),
    "AVA": ("nima", "nima-vgg16-ava", "musiq-ava"),
    "SPAQ": ("musiq-spaq", "arniqa-spaq", "topiq_nr-spaq"),
    "KADID-10k": ("arniqa-kadid", "maniqa-kadid"),
    "TID2013": ("arniqa-tid",),
    "CSIQ": ("arniqa-csiq",),
    "LIVE": ("arniqa-live", "brisque", "brisque_matlab"),
    "LIVE Challenge": ("arniqa-clive",),
    "PIPAL": ("maniqa-pipal",),
    "Ma et al. (SR images)": ("nrqm",),
    "several": ("qalign", "liqe_mix"),
    "no quality labels": ("clipiqa", "ilniqe", "niqe", "niqe_matlab", "piqe"),
    "NRQM with NIQE": ("pi",),
}


# The paper's numbers

@functools.cache
def paper_table(number):
    """The values of one of the paper's tables (2, 3, 4 or 6) from paper_numbers.json, in the table's order and units.

    Table 6 (and Table 1, its first seven entries): every value is k / 1136, and no other denominator up to 1212 fits:
    76 of the 1212 pairs were left out.
    """
    tables = json.loads(Path(__file__).with_name("paper_numbers.json").read_text())
    return next(values for title, values in tables.items() if title.startswith(f"Table {number} "))


def paper_accuracy(experiment):
    """{metric: accuracy, %} that the paper reports for "phase1", "train" or "test" of SBS180K; {} for anything else."""
    return {"phase1": paper_table(6), **paper_table(2)}.get(experiment, {})


# Files

def read_csv(path, flag, **options):
    """A CSV file as a DataFrame of unchanged strings (.tsv: separated by tabs). UserError where it cannot be read."""
    separator = "\t" if str(path).lower().endswith(".tsv") else ","
    options |= {"sep": separator, "skipinitialspace": True, "index_col": False}
    try:
        return pd.read_csv(path, dtype=object, keep_default_na=False, **options)
    except FileNotFoundError:
        raise runs.UserError(f"{flag} {path}: no such file") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise runs.UserError(f"{flag} {path}: not a CSV file ({' '.join(str(error).split())})") from None


def write_csv(path, frame, **options):
    runs.write_atomic(path, lambda temporary: frame.to_csv(temporary, **options))


def named_columns(text, usage):
    """"left=a,right=b" -> {"left": "a", "right": "b"}. Numbers, from 0, name the columns of a file without a header.

    usage: the roles, optional ones behind "[,", as "left=A,right=B[,photo=F]". UserError for a text of another form.
    """
    named = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    unknown = [role for role in named if role not in re.findall(r"\w+(?==)", usage)]
    missing = [role for role in re.findall(r"\w+(?==)", usage.partition("[")[0]) if not named.get(role)]
    if unknown or missing or len(text.split(",")) != text.count("="):
        fault = f" ({', '.join(unknown or missing)} is {'unknown' if unknown else 'missing'})"
        raise runs.UserError(f"columns {text}: write {usage} with the names of columns, or their numbers from 0"
                             + fault * bool(unknown or missing))
    if len({name.isdigit() for joined in named.values() for name in joined.split("+") if name}) > 1:
        raise runs.UserError(f"columns {text}: names or numbers, not both")
    return {role: name for role, name in named.items() if name}


def parse_columns(text):
    """"left=a,right=b,score=c[,methods=d+e][,photo=f]" -> {"left": "a", ..., "left_method": "d", "right_method": "e"}.

    methods is one column that names the pair, or two joined by a plus. UserError for a text of another form.
    """
    columns = named_columns(text, "left=A,right=B,score=C[,methods=D+E][,photo=F]")
    methods = columns.pop("methods", None)
    if methods:
        columns["left_method"], _, columns["right_method"] = methods.partition("+")
    return {role: name for role, name in columns.items() if name}


def read_columns(path, columns, flag):
    """Columns of a CSV as strings, by role. columns: {role: name}, all names or all numbers.

    -> DataFrame whose index is the line of the file; empty lines are no rows. UserError for an absent column.
    """
    numbered = all(name.isdigit() for name in columns.values())
    table = read_csv(path, flag, header=None if numbered else "infer", skip_blank_lines=False)
    where = {role: int(name) if numbered else name for role, name in columns.items()}
    absent = [str(name) for name in where.values() if name not in table.columns]
    if absent:
        raise runs.UserError(f"{flag} {path}: has no column {', '.join(absent)}; "
                             f"it has {', '.join(map(str, table.columns))}")
    table.index += 1 if numbered else 2
    empty = table.fillna("").eq("").all(axis=1)
    return pd.DataFrame({role: table[name].fillna("").str.strip() for role, name in where.items()})[~empty]


def read_pairs(path, columns=COLUMNS, pattern=None, photo_pattern=None):
    """A preference CSV -> (DataFrame of left, right, score and the optional columns; lines on pairs left out).

    pattern, photo_pattern: regular expressions whose group finds the method, and the photo, in the name of an image.
    UserError where no usable pair is left, or where most votes look like per cent.
    """
    names = parse_columns(columns)
    pairs = read_columns(path, names, "--pairs")
    pairs["score"] = pd.to_numeric(pairs["score"], errors="coerce")
    if ((pairs.score > 1) & (pairs.score <= 100)).mean() > 0.5:
        raise runs.UserError(f"--columns {columns}: most votes of {path} lie between 1 and 100, as per cent do: divide "
                             "them by 100 (a vote is the fraction that prefers the second image)")
    # one column names both methods
    if "left_method" in names and "right_method" not in names:
        pairs["right_method"] = ""
    left_out = []

    def drop(bad, reason):
        nonlocal pairs
        if bad.any():
            first, line = pairs[bad].iloc[0], pairs.index[bad][0]
            left_out.append(f"{int(bad.sum())} pairs left out: {reason} "
                            f"(first: line {line}, {first.left} {first.right} {first.score})")
            pairs = pairs[~bad]

    drop((pairs.left == "") | (pairs.right == ""), "an image is not named")
    drop(pairs.score.isna(), "the score is no number")
    drop((pairs.score < 0) | (pairs.score > 1), "the score is outside [0, 1]")
    drop(pairs.left == pairs.right, "an image against itself")
    in_order = pairs.left < pairs.right
    both = np.where(in_order, pairs.left + "\0" + pairs.right, pairs.right + "\0" + pairs.left)
    drop(pd.Series(both, pairs.index).duplicated(), "named before; the first vote counts")
    if pairs.empty:
        raise runs.UserError(f"--pairs {path}: no usable pair; {'; '.join(left_out) or 'the file has no rows'}")
    if pattern:
        for side in ("left", "right"):
            pairs[f"{side}_method"] = extract(pairs[side], pattern, "--method-pattern")
    if photo_pattern:
        pairs["photo"] = extract(pairs["left"], photo_pattern, "--photo-pattern")
    return pairs.reset_index(drop=True), left_out


def extract(names, pattern, flag):
    """The group of a regular expression in each name. UserError where there is none."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise runs.UserError(f"{flag} {pattern}: not a regular expression ({error})") from None
    if groups != 1:
        raise runs.UserError(f"{flag} {pattern}: has {groups} groups; put exactly the part to extract in parentheses")
    parts = names.str.extract(pattern, expand=True)[0]
    if parts.isna().any():
        raise runs.UserError(f"{flag} {pattern}: no match in {names[parts.isna()].iloc[0]}")
    return parts


def photo_codes(pairs):
    """The photos of pairs as whole numbers, None where none is known. A pair without a photo has its own number."""
    if "photo" not in pairs:
        return None
    codes = pd.factorize(pairs["photo"].where(pairs["photo"] != ""))[0]
    unnamed = codes < 0
    codes[unnamed] = codes.max(initial=-1) + 1 + np.arange(unnamed.sum())
    return codes


def read_scores(path):
    """A CSV with a column `image` and one per metric, native units -> (scores by image, lines on what is missing).

    Values that are not finite numbers become NaN.
    """
    table = read_csv(path, "--scores")
    if "image" not in table.columns or len(table.columns) < 2:
        raise runs.UserError(f"--scores {path}: needs a column image and one per metric; "
                             f"it has {', '.join(map(str, table.columns))}")
    scores = table.set_index("image").apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], np.nan)
    scores.index, left_out = scores.index.astype(str), []
    doubled = scores.index.duplicated(keep=False)
    if doubled.any():
        same = scores[doubled].groupby(level=0).nunique(dropna=False).max(axis=1) == 1
        clash = same.index[~same]
        left_out.append(f"{int(doubled.sum())} rows of {len(same)} images in {path} are doubled: one of each is kept")
        if len(clash):
            left_out[-1] += f", but {len(clash)} with different scores are left out (first: {clash[0]})"
        scores = scores[~scores.index.duplicated() & ~scores.index.isin(clash)]
    for metric, missing in scores.isna().sum().items():
        if missing:
            first = scores.index[scores[metric].isna()][0]
            left_out.append(f"{metric}: {missing} of {len(scores)} images have no score (first: {first})")
    return scores, left_out


def draw(pairs, each, seed):
    """`each` random pairs of every two methods (phase I: 3), fewer where there are fewer. UserError without methods."""
    if "left_method" not in pairs:
        raise runs.UserError("--draw: the methods of a pair are not known: --columns methods=..., or --method-pattern")
    both = pairs[["left_method", "right_method"]].astype(str)
    key = both.min(axis=1) + " / " + both.max(axis=1)
    shuffled = key.iloc[np.random.default_rng(seed).permutation(len(pairs))]
    return pairs.loc[shuffled.groupby(shuffled).head(each).index.sort_values()].reset_index(drop=True)


# Pairs

def margins(pairs, scores, lower):
    """How much better the right image is, NaN where a score is missing. (pairs, metrics)

    scores: DataFrame by image, native units; lower: the metrics where lower is better.
    """
    sign = np.array([-1.0 if m in lower else 1.0 for m in scores.columns])
    right, left = (scores.reindex(pairs[side]).to_numpy(float) for side in ("right", "left"))
    return (right - left) * sign


def agree(margin, votes, ties="out"):
    """1 where metric and people prefer the same image, 0 where not, NaN where a score is missing. (pairs, metrics)

    Two equal scores prefer neither: 0. ties: votes of 0.5 become NaN with "out" (paper's phase II), 0 with "wrong".
    """
    votes = np.asarray(votes, float)[:, None]
    right = (np.sign(margin) == np.sign(votes - 0.5)).astype(float)
    consensus = np.abs(votes - 0.5) > TIE
    right = np.where(consensus, right, np.nan if ties == "out" else 0.0)
    return np.where(np.isnan(margin), np.nan, right)


def wilson(right, n):
    """Wilson's 95 % interval of right / n."""
    if n == 0:
        return np.nan, np.nan
    return tuple(stats.binomtest(int(right), int(n)).proportion_ci(method="wilson"))


def share(values, photo=None):
    """Mean of (n,) zeros, ones and NaNs, with Wilson's interval; with photos, widened to the interval over photos."""
    known = values[~np.isnan(values)]
    low, high = wilson(known.sum(), len(known))
    if photo is not None:
        _, wide_low, wide_high, _ = over_photos(values, photo)
        low, high = max(0, np.fmin(low, wide_low)), min(1, np.fmax(high, wide_high))
    return (known.mean() if len(known) else np.nan), low, high


def over_photos(values, photo):
    """Mean of (n,) values, its 95 % t interval and the p of a mean of zero, when values of one photo are not
    independent.

    The standard error is cluster-robust: computed from the sums of the residuals of each photo.
    """
    keep = ~np.isnan(values)
    values, photo = values[keep], np.unique(np.asarray(photo)[keep], return_inverse=True)[1]
    groups, mean = photo.max(initial=-1) + 1, values.mean() if len(values) else np.nan
    if groups < 2:
        return mean, np.nan, np.nan, np.nan
    residual_sums = np.bincount(photo, values - mean)
    error = np.sqrt((residual_sums ** 2).sum() * groups / (groups - 1)) / len(values)
    reach = stats.t.ppf(0.975, groups - 1) * error
    p = 2 * stats.t.sf(abs(mean) / error, groups - 1) if error else float(mean == 0)
    return mean, mean - reach, mean + reach, p


def accuracy(agreed, margin, metrics, photo=None):
    """DataFrame by metric, best first: n, accuracy, low, high (shares), ties (number of pairs with equal scores)."""
    rows = {}
    for k, metric in enumerate(metrics):
        judged = ~np.isnan(agreed[:, k])
        mean, low, high = share(agreed[:, k], photo)
        rows[metric] = {"n": int(judged.sum()), "accuracy": mean, "low": low, "high": high,
                        "ties": int((margin[judged, k] == 0).sum())}
    return pd.DataFrame.from_dict(rows, orient="index").sort_values("accuracy", ascending=False, kind="stable")


def paired(agreed, metrics, photo=None):
    """DataFrame with one row per two metrics a and b, on the pairs that both judged.

    n; only_a and only_b: pairs that one alone gets right; difference of accuracies. p: McNemar's exact test; where
    photos are known, the larger of it and of a t test over photos. q: p after Benjamini-Hochberg over all rows.
    differs: q < 0.05.
    """
    rows = []
    for i in range(len(metrics)):
        for j in range(i + 1, len(metrics)):
            delta = agreed[:, i] - agreed[:, j]
            n, only_a, only_b = (~np.isnan(delta)).sum(), (delta == 1).sum(), (delta == -1).sum()
            p = min(1.0, 2 * stats.binom.cdf(min(only_a, only_b), only_a + only_b, 0.5))
            p = p if photo is None else np.fmax(p, over_photos(delta, photo)[3])
            rows.append({"a": metrics[i], "b": metrics[j], "n": int(n), "only_a": int(only_a), "only_b": int(only_b),
                         "difference": (only_a - only_b) / n if n else np.nan, "p": p})
    table = pd.DataFrame(rows, columns=["a", "b", "n", "only_a", "only_b", "difference", "p"])
    known = table.p.notna()
    table["q"] = np.nan
    if known.any():
        table.loc[known, "q"] = stats.false_discovery_control(table.p[known].astype(float))
    table["differs"] = table["q"] < 0.05
    return table


def complement(agreed, metrics):
    """Of the pairs on which the row's metric fails: share in which the column's metric agrees with people (Table 3).

    -> (share, count), two DataFrames
    """
    right, wrong, judged = agreed == 1, agreed == 0, ~np.isnan(agreed)
    count = wrong.T.astype(float) @ judged
    with np.errstate(invalid="ignore"):
        fraction = (wrong.T.astype(float) @ right) / count
    return tuple(pd.DataFrame(a, metrics, metrics) for a in (fraction, count.astype(int)))


def two_afc(margin, votes):
    """BAPPS's score of every pair: share of people the metric sides with, 0.5 for equal scores. (pairs, metrics)"""
    votes = np.asarray(votes, float)[:, None]
    return np.where(np.isnan(margin), np.nan, np.where(margin > 0, votes, np.where(margin < 0, 1 - votes, 0.5)))


# Quintuplets

def spearman(a, b):
    """Spearman's correlation between equal rows of two (S, V) arrays, ties by mean rank; NaN where one is constant."""
    a, b = (stats.rankdata(x, axis=1) for x in (a, b))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a ** 2).sum(1) * (b ** 2).sum(1))


def misalignment(labels, quality, original_similar=True):
    """Per quintuplet: Spearman's correlation and the two misalignments of Sec. 3.2.

    Positive misalignment (pm): a positive version is ranked below a similar one. Negative misalignment (nm): a
    negative version is ranked above a similar one. Equal qualities are no misalignment.

    labels: (S, V) codes of data.py, original first; quality: (S, V), higher is better. original_similar: the original
    counts as a similar version; else it is left out.
    Returns {"src": (S,), NaN where all labels or all qualities are equal; "pm", "nm": (S,) bool; "positive",
    "negative", "similar": (S,) bool, is there such a version; "negative_first": (S,) bool, is the best of all
    versions (of equals the first) a negative one}.
    """
    first = np.take_along_axis(labels, quality.argmax(1)[:, None], 1)[:, 0]
    negative_first = first == data.NEGATIVE
    if not original_similar:
        labels, quality = labels[:, 1:], quality[:, 1:]
    rank = np.vectorize(QUALITY.get)(labels)
    negative, similar, positive = rank == 0, rank == 1, rank == 2

    def lowest(mask):
        return np.where(mask, quality, np.inf).min(1)

    def highest(mask):
        return np.where(mask, quality, -np.inf).max(1)
    return {"src": spearman(rank, quality), "pm": lowest(positive) < highest(similar),
            "nm": highest(negative) > lowest(similar), "positive": positive.any(1), "negative": negative.any(1),
            "similar": similar.any(1), "negative_first": negative_first}


# Advice

def recommend(table, share):
    """The paper's reasoning (Sec. 3, Supp. 7.1) as a rule -> metric to train with, [metrics to keep], [tied].

    table, by metric: accuracy; pm (NaN: not known); differentiable; measured: was its gradient measured here?; less:
    does a test say that the metric is less accurate than the best differentiable one? share: as complement returns it.
    Kept are metrics for evaluation; tied are those that the rule would train with as well.

    Only metrics that are right more often than chance count. Train with: a differentiable metric that is no less
    accurate than the best such one, by test and by MARGIN; of these the one with the least positive misalignment,
    else with the highest accuracy; CHOICE: of equals one whose gradient was measured, then the first of the table.
    Keep: the two other metrics that are right most often where it fails, and the one with the next least positive
    misalignment.
    """
    table = table[table.accuracy > 0.5]
    usable = table[table.differentiable]
    usable = usable[~(usable.less & (usable.accuracy < usable.accuracy.max() - MARGIN))]
    if usable.empty:
        return None, [], []
    usable = usable.sort_values(["pm", "accuracy", "measured"], ascending=[True, False, False], kind="stable")
    train, first = usable.index[0], usable.iloc[0]
    equal = (usable.accuracy == first.accuracy) & ((usable.pm == first.pm) | usable.pm.isna() & np.isnan(first.pm))
    others = [m for m in table.index if m != train]
    helpful = share.loc[train, others].sort_values(ascending=False, kind="stable").index[:2].tolist()
    aligned = table.pm[others].dropna().sort_values(kind="stable").index[:1].tolist()
    return train, list(dict.fromkeys(helpful + aligned)), usable.index[equal][1:].tolist()
