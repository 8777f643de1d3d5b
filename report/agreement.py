"""Do scores agree with people? Pairs with votes, labelled quintuplets, and the statistics of paper Sec. 3. Knows files and numbers, no images.

A pair is two images and a vote, the fraction of people who prefer the right one (SBS180K's definition, BAPPS's too). A margin is the
quality of the right image minus that of the left one, higher is better; NaN where a score is missing. agree() turns margins and votes into
1, 0 and NaN, and everything about pairs follows from that (pairs, metrics) array.
"""
import re

import numpy as np
import pandas as pd
from scipy import stats

import data
import runs

SYNTHETIC = "SYNTHETIC, no human judged"                                          # begins the `truth` of preferences without people
TIE = 1e-6                                                                       # votes this near to 0.5 are no consensus
MARGIN = 0.01                                                                    # CHOICE: accuracies nearer than this are equal for `recommend`
COLUMNS = "left=left,right=right,score=score"                                    # what the scripts of this repository write
OPTIONAL = ("left_method", "right_method", "photo")
QUALITY = {data.NEGATIVE: 0, data.SIMILAR: 1, data.ORIGINAL: 1, data.POSITIVE: 2}


# Files

def read_csv(path, flag, **options):
    """pandas.read_csv of strings as they stand; one line for what cannot be read. A .tsv file is separated by tabs."""
    try:
        return pd.read_csv(path, sep="\t" if str(path).endswith(".tsv") else ",", skipinitialspace=True, dtype=object, keep_default_na=False, index_col=False, **options)
    except FileNotFoundError:
        raise runs.UserError(f"{flag} {path}: no such file") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise runs.UserError(f"{flag} {path}: not a CSV file ({' '.join(str(error).split())})") from None


def parse_columns(text):
    """"left=a,right=b,score=c[,methods=d+e][,photo=f]" -> {"left": "a", ..., "left_method": "d", "right_method": "e"}.

    Numbers, from 0, name the columns of a file without a header. methods is one column that names the pair, or two with a plus. ValueError otherwise.
    """
    words = dict(word.split("=", 1) for word in text.split(",") if "=" in word)
    methods = words.pop("methods", None)
    if methods:
        words["left_method"], _, words["right_method"] = methods.partition("+")
    unknown = [w for w in words if w not in ("left", "right", "score", *OPTIONAL)]
    missing = [w for w in ("left", "right", "score") if not words.get(w)]
    if unknown or missing or len(text.split(",")) != text.count("="):
        raise runs.UserError(f"--columns {text}: write left=A,right=B,score=C[,methods=D+E][,photo=F] with the names of columns, or their numbers from 0"
                         + (f" ({', '.join(unknown)} is unknown)" if unknown else f" ({', '.join(missing)} is missing)" if missing else ""))
    if len({w.isdigit() for w in words.values() if w}) > 1:
        raise runs.UserError(f"--columns {text}: names or numbers, not both")
    return {k: v for k, v in words.items() if v}


def read_pairs(path, columns=COLUMNS, pattern=None, photo_pattern=None):
    """A preference CSV -> (pairs, left_out): DataFrame of left, right, score and the optional columns, and lines that say what was left out.

    pattern, photo_pattern: regular expressions whose group finds the method, and the photo, in the name of an image. ValueError where nothing usable
    is left, or most votes look like per cent.
    """
    names = parse_columns(columns)
    numbered = all(v.isdigit() for v in names.values())
    table = read_csv(path, "--pairs", header=None if numbered else "infer")
    where = {role: int(name) if numbered else name for role, name in names.items()}
    absent = [str(name) for name in where.values() if name not in table.columns]
    if absent:
        raise runs.UserError(f"--columns: {path} has no column {', '.join(absent)}; it has {', '.join(map(str, table.columns))}")
    pairs = pd.DataFrame({role: table[name] for role, name in where.items()})
    pairs["score"] = pd.to_numeric(pairs["score"], errors="coerce")
    for side in ("left", "right"):
        pairs[side] = pairs[side].str.strip()
    if ((pairs.score > 1) & (pairs.score <= 100)).mean() > 0.5:
        raise runs.UserError(f"--columns {columns}: most votes of {path} lie between 1 and 100, as per cent do: divide them by 100 (a vote is the fraction that prefers the second image)")
    if "left_method" in names and "right_method" not in names:                    # one column names the pair
        pairs["right_method"] = ""
    left_out = []

    def drop(bad, why):
        nonlocal pairs
        if bad.any():
            first = pairs[bad].iloc[0]
            left_out.append(f"{int(bad.sum())} pairs left out: {why} (first: line {pairs.index[bad][0] + (1 if numbered else 2)}, {first.left} {first.right} {first.score})")
            pairs = pairs[~bad]

    drop((pairs.left == "") | (pairs.right == ""), "an image is not named")
    drop(pairs.score.isna(), "the score is no number")
    drop((pairs.score < 0) | (pairs.score > 1), "the score is outside [0, 1]")
    drop(pairs.left == pairs.right, "an image against itself")
    first = np.where(pairs.left < pairs.right, pairs.left + "\0" + pairs.right, pairs.right + "\0" + pairs.left)
    drop(pd.Series(first, pairs.index).duplicated(), "named before; the first vote counts")
    if pairs.empty:
        raise runs.UserError(f"--pairs {path}: no usable pair; {'; '.join(left_out) or 'the file has no rows'}")
    if pattern:
        for side in ("left", "right"):
            pairs[f"{side}_method"] = find_in(pairs[side], pattern, "--method-pattern")
    if photo_pattern:
        pairs["photo"] = find_in(pairs["left"], photo_pattern, "--photo-pattern")
    return pairs.reset_index(drop=True), left_out


def find_in(names, pattern, flag):
    """The group of a regular expression in each name. ValueError where there is none."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise runs.UserError(f"{flag} {pattern}: not a regular expression ({error})") from None
    if groups != 1:
        raise runs.UserError(f"{flag} {pattern}: has {groups} groups; put what is wanted, and only it, in parentheses")
    found = names.str.extract(pattern, expand=True)[0]
    if found.isna().any():
        raise runs.UserError(f"{flag} {pattern}: no match in {names[found.isna()].iloc[0]}")
    return found


def photo_codes(pairs):
    """The photos of pairs as whole numbers, None where they are not known; a pair whose photo is not named stands for itself."""
    if "photo" not in pairs:
        return None
    codes = pd.factorize(pairs["photo"].where(pairs["photo"] != ""))[0]
    unnamed = codes < 0
    codes[unnamed] = codes.max(initial=-1) + 1 + np.arange(unnamed.sum())
    return codes


def read_scores(path):
    """A CSV with a column `image` and one per metric, native units -> (scores, left_out): DataFrame by image; what is no finite number is NaN."""
    table = read_csv(path, "--scores")
    if "image" not in table.columns or len(table.columns) < 2:
        raise runs.UserError(f"--scores {path}: needs a column image and one per metric; it has {', '.join(map(str, table.columns))}")
    scores = table.set_index("image").apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], np.nan)
    scores.index, left_out = scores.index.astype(str), []
    doubled = scores.index.duplicated(keep=False)
    if doubled.any():
        same = scores[doubled].groupby(level=0).nunique(dropna=False).max(axis=1) == 1
        clash = same.index[~same]
        left_out.append(f"{int(doubled.sum())} rows of {len(same)} images in {path} are doubled: one of each is kept"
                        + (f", but {len(clash)} with different scores are left out (first: {clash[0]})" if len(clash) else ""))
        scores = scores[~scores.index.duplicated() & ~scores.index.isin(clash)]
    for metric, missing in scores.isna().sum().items():
        if missing:
            left_out.append(f"{metric}: {missing} of {len(scores)} images have no score (first: {scores.index[scores[metric].isna()][0]})")
    return scores, left_out


def draw(pairs, each, seed):
    """`each` pairs of every pair of methods (paper's phase I: 3), fixed by seed; fewer where there are not as many. ValueError without methods."""
    if "left_method" not in pairs:
        raise runs.UserError("--draw: which methods a pair compares is not known: --columns methods=..., or --method-pattern")
    both = pairs[["left_method", "right_method"]].astype(str)
    key = both.min(axis=1) + " / " + both.max(axis=1)
    shuffled = key.iloc[np.random.default_rng(seed).permutation(len(pairs))]
    return pairs.loc[shuffled.groupby(shuffled).head(each).index.sort_values()].reset_index(drop=True)


# Pairs

def margins(pairs, scores, lower):
    """(pairs, metrics): how much better the right image is, higher is better; NaN where a score is missing. lower: metrics where less is better."""
    sign = np.array([-1.0 if m in lower else 1.0 for m in scores.columns])
    right, left = (scores.reindex(pairs[side]).to_numpy(float) for side in ("right", "left"))
    return (right - left) * sign


def agree(margin, votes, ties="out"):
    """1 where metric and people prefer the same image, 0 where not, NaN where a score is missing. (pairs, metrics)

    Two equal scores prefer neither: 0. ties: what becomes of votes of 0.5: "out" (NaN; paper's phase II), or "wrong" (0).
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
    """Mean of (n,) zeros, ones and NaNs, with Wilson's interval; where photos are known, widened to that over photos."""
    known = values[~np.isnan(values)]
    low, high = wilson(known.sum(), len(known))
    if photo is not None:
        _, wide_low, wide_high, _ = over_photos(values, photo)
        low, high = max(0, np.fmin(low, wide_low)), min(1, np.fmax(high, wide_high))
    return (known.mean() if len(known) else np.nan), low, high


def over_photos(values, photo):
    """Mean of (n,) values, its 95 % t interval and the p of a mean of zero, when values of one photo are not independent (cluster-robust)."""
    keep = ~np.isnan(values)
    values, photo = values[keep], np.unique(np.asarray(photo)[keep], return_inverse=True)[1]
    groups, mean = photo.max(initial=-1) + 1, values.mean() if len(values) else np.nan
    if groups < 2:
        return mean, np.nan, np.nan, np.nan
    spread = np.bincount(photo, values - mean)                                    # per photo: sum of what is left
    error = np.sqrt((spread ** 2).sum() * groups / (groups - 1)) / len(values)
    reach = stats.t.ppf(0.975, groups - 1) * error
    return mean, mean - reach, mean + reach, 2 * stats.t.sf(abs(mean) / error, groups - 1) if error else float(mean == 0)


def accuracy(agreed, margin, metrics, photo=None):
    """DataFrame by metric: n, accuracy, low, high (as share), ties (pairs of equal scores), best first."""
    rows = {}
    for k, metric in enumerate(metrics):
        values = agreed[:, k]
        mean, low, high = share(values, photo)
        rows[metric] = {"n": int((~np.isnan(values)).sum()), "accuracy": mean, "low": low, "high": high, "ties": int((margin[~np.isnan(values), k] == 0).sum())}
    return pd.DataFrame.from_dict(rows, orient="index").sort_values("accuracy", ascending=False, kind="stable")


def paired(agreed, metrics, photo=None):
    """DataFrame, one row per two metrics, on the pairs that both judged: n, only_a and only_b (pairs one alone gets right), difference, p, q.

    p: McNemar's exact test; with photos the larger of it and of a t test on their sums. q: p after Benjamini-Hochberg over all rows; `differs` is q < 0.05.
    """
    rows = []
    for i in range(len(metrics)):
        for j in range(i + 1, len(metrics)):
            delta = agreed[:, i] - agreed[:, j]
            n, a, b = (~np.isnan(delta)).sum(), (delta == 1).sum(), (delta == -1).sum()
            p = min(1.0, 2 * stats.binom.cdf(min(a, b), a + b, 0.5))
            p = p if photo is None else np.fmax(p, over_photos(delta, photo)[3])
            rows.append({"a": metrics[i], "b": metrics[j], "n": int(n), "only_a": int(a), "only_b": int(b), "difference": (a - b) / n if n else np.nan, "p": p})
    table = pd.DataFrame(rows, columns=["a", "b", "n", "only_a", "only_b", "difference", "p"])
    known = table.p.notna()
    table["q"] = np.nan
    if known.any():
        table.loc[known, "q"] = stats.false_discovery_control(table.p[known].astype(float))
    table["differs"] = table["q"] < 0.05
    return table


def complement(agreed, metrics):
    """Of the pairs on which the row's metric fails: share in which the column's agrees with people (Table 3). (share, count), two DataFrames."""
    right, wrong, judged = agreed == 1, agreed == 0, ~np.isnan(agreed)
    count = wrong.T.astype(float) @ judged
    with np.errstate(invalid="ignore"):
        share = (wrong.T.astype(float) @ right) / count
    return tuple(pd.DataFrame(a, metrics, metrics) for a in (share, count.astype(int)))


def two_afc(margin, votes):
    """BAPPS's score of every pair: the share of people that the metric sides with; 0.5 for two equal scores. (pairs, metrics)"""
    votes = np.asarray(votes, float)[:, None]
    return np.where(np.isnan(margin), np.nan, np.where(margin > 0, votes, np.where(margin < 0, 1 - votes, 0.5)))


# Quintuplets

def spearman(a, b):
    """Spearman's correlation of every row of (S, V) with the same row of another, ties by mean rank; NaN where one is constant."""
    a, b = (stats.rankdata(x, axis=1) for x in (a, b))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a ** 2).sum(1) * (b ** 2).sum(1))


def misalignment(labels, quality, original_similar=True):
    """Per quintuplet: Spearman's correlation, is a positive ranked below a similar one, is a negative ranked above one (Sec. 3.2)?

    labels (S, V) codes of data.py, original first; quality (S, V), higher is better. original_similar: the original counts as a similar one,
    else it is left out. Equal qualities are no misalignment. -> {"src": (S,), NaN where all labels or all qualities are equal; "pm", "nm": (S,) bool;
    "positive", "negative", "similar": (S,) bool, is there one; "negative_first": (S,) bool, is the best of all versions (of equals the
    first) a negative?}
    """
    first = np.take_along_axis(labels, quality.argmax(1)[:, None], 1)[:, 0]
    negative_first = first == data.NEGATIVE
    if not original_similar:
        labels, quality = labels[:, 1:], quality[:, 1:]
    rank = np.vectorize(QUALITY.get)(labels)
    best = lambda mask, worst: np.where(mask, quality, worst)
    similar = rank == 1
    low, high = best(similar, np.inf).min(1), best(similar, -np.inf).max(1)      # of the similar ones
    return {"src": spearman(rank, quality), "pm": best(rank == 2, np.inf).min(1) < high, "nm": best(rank == 0, -np.inf).max(1) > low,
            "positive": (rank == 2).any(1), "negative": (rank == 0).any(1), "similar": similar.any(1), "negative_first": negative_first}


# Advice

def recommend(table, share):
    """The paper's reasoning (Sec. 3, Supp. 7.1) as a rule -> (metric to train with, [metrics to keep for evaluation]).

    table by metric: accuracy, pm (NaN: not known), differentiable, less (does a test say that it is less accurate than the best differentiable one?).
    share: as complement's. Only metrics that are right more often than chance count. Train with: differentiable; no less accurate than the best such one,
    by test and by MARGIN; of these the least positive misalignment, else the highest accuracy. Keep: the two others that are right most often
    where it fails, and the one with the next least positive misalignment.
    """
    table = table[table.accuracy > 0.5]
    usable = table[table.differentiable]
    usable = usable[~(usable.less & (usable.accuracy < usable.accuracy.max() - MARGIN))]
    if usable.empty:
        return None, []
    train = usable.sort_values(["pm", "accuracy"], ascending=[True, False]).index[0]
    others = [m for m in table.index if m != train]
    helpful = share.loc[train, others].sort_values(ascending=False, kind="stable").index[:2].tolist()
    aligned = table.pm[others].dropna().sort_values(kind="stable").index[:1].tolist()
    return train, list(dict.fromkeys(helpful + aligned))


# What the paper reports, in per cent (Tables 2-4 in its units), by pyiqa name

TOP7 = "paq2piq nima musiq liqe arniqa-tid qalign topiq_nr".split()
TABLE6 = {  # phase I; also Table 1. Every one is k / 1136 and no other denominator up to 1212 fits: 76 of the 1212 pairs were left out
    "paq2piq": 76.41, "nima": 74.91, "musiq": 74.47, "liqe": 74.03, "arniqa-tid": 74.03, "qalign": 73.77, "topiq_nr": 73.06, "hyperiqa": 72.27,
    "liqe_mix": 71.48, "arniqa-kadid": 71.48, "arniqa-flive": 71.30, "topiq_nr-spaq": 71.30, "arniqa-csiq": 71.21, "musiq-spaq": 70.86,
    "nima-vgg16-ava": 70.77, "maniqa": 70.51, "clipiqa+": 70.25, "maniqa-kadid": 70.16, "tres": 69.98, "clipiqa+_vitL14_512": 69.98,
    "musiq-paq2piq": 69.98, "maniqa-pipal": 69.63, "clipiqa+_rn50_512": 69.10, "dbcnn": 68.49, "clipiqa": 68.40, "arniqa-live": 68.05,
    "arniqa-clive": 66.81, "arniqa-spaq": 66.73, "arniqa": 66.46, "musiq-ava": 66.37, "nrqm": 65.05, "cnniqa": 63.73, "tres-flive": 63.29,
    "pi": 62.41, "brisque_matlab": 61.00, "wadiqam_nr": 60.30, "topiq_nr-flive": 58.19, "ilniqe": 57.92, "niqe": 56.43, "brisque": 55.11,
    "niqe_matlab": 51.94, "piqe": 46.21}
TABLE2 = {"train": dict(zip(TOP7, (80.41, 79.32, 79.96, 77.70, 77.74, 80.00, 78.30))), "test": dict(zip(TOP7, (80.57, 81.37, 82.73, 77.45, 77.07, 80.68, 81.28)))}
TABLE3 = {"train": {"paq2piq": 37.58, "nima": 44.21, "liqe": 31.50, "arniqa-tid": 42.05, "qalign": 42.86, "topiq_nr": 25.71},
          "test": {"paq2piq": 33.10, "nima": 39.70, "liqe": 30.70, "arniqa-tid": 38.60, "qalign": 41.06, "topiq_nr": 30.89}}        # where MUSIQ fails
TABLE4 = {m: dict(zip(("src", "pm", "nm"), row)) for m, row in zip(TOP7, (
    (0.10, 0.26, 0.85), (0.17, 0.28, 0.79), (0.17, 0.16, 0.95), (0.03, 0.58, 0.64), (0.28, 0.51, 0.45), (0.20, 0.39, 0.63), (0.09, 0.21, 0.97)))}
REPORTED = {"phase1": TABLE6, **TABLE2}
TRAINED_ON = {  # what pyiqa trained the variants on, for the grouping of Table 6
    "KonIQ-10k": "musiq topiq_nr liqe arniqa hyperiqa maniqa clipiqa+ clipiqa+_vitL14_512 clipiqa+_rn50_512 tres dbcnn wadiqam_nr cnniqa".split(),
    "FLIVE (PaQ-2-PiQ)": "paq2piq musiq-paq2piq arniqa-flive topiq_nr-flive tres-flive".split(), "AVA": "nima nima-vgg16-ava musiq-ava".split(),
    "SPAQ": "musiq-spaq arniqa-spaq topiq_nr-spaq".split(), "KADID-10k": "arniqa-kadid maniqa-kadid".split(), "TID2013": ["arniqa-tid"],
    "CSIQ": ["arniqa-csiq"], "LIVE": "arniqa-live brisque brisque_matlab".split(), "LIVE Challenge": ["arniqa-clive"], "PIPAL": ["maniqa-pipal"],
    "Ma et al. (SR images)": ["nrqm"], "several": "qalign liqe_mix".split(), "no quality labels": "clipiqa ilniqe niqe niqe_matlab piqe".split(),
    "NRQM with NIQE": ["pi"]}
