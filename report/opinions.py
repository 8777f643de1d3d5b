"""Opinions of people on images: mean opinion scores and best-of-K choices, read from CSV files, and their statistics.

Mean opinion scores (`read_mos`): a row per image with its mos and, if given, the standard deviation of the opinions.

Choices (`read_choices`): a row per choice. An observer saw a scene as several methods show it, and selected one. A pair
is a choice of two. The general form, which `write_choices` writes and every reader here takes without --columns:

    observer,scene,candidates,selected
    7,0829,BSRGAN|RealESRGAN|ResShift|SwinIR,ResShift
    7,0809,BSRGAN|SwinIR,SwinIR

Scenes and methods are names without a suffix; the image of a method for a scene is METHOD/SCENE.<suffix> below the
folder of images, and METHOD/SCENE is its name in tables of scores. Two other forms are mapped onto it by --columns:

    observer,image,selected                 --columns observer=observer,scene=image,selected=selected
                                            --methods BSRGAN RealESRGAN ResShift SwinIR: the candidates of every row
    observer,left,right,selected            --columns observer=observer,candidates=left+right,selected=selected
        1,0809_A.png,0809_B.png,0809_A.png  --name-pattern '(?P<scene>.+)_(?P<method>[^_]+)': splits all image names

In memory, choices are a DataFrame with the columns observer, scene, candidates (a tuple of methods) and selected (one
of them); its index is the line of the file. `pairs_of` makes the K - 1 pairs of each choice.
"""
import re
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

import runs
from images import IMAGE_SUFFIXES, list_images
from report import agreement, tables

MOS_COLUMNS = "image=image,mos=mos"
CHOICE_COLUMNS = "observer=observer,scene=scene,candidates=candidates,selected=selected"
BETWEEN = "|"
# CHOICE: keeps the strength of a method finite that is never, or always, chosen; else without effect
RIDGE = 1e-3
# CHOICE: resamples of the cluster bootstrap
RESAMPLES = 2000


# Files

class Faults:
    """Rows of a table that are left out, and a line of text for each reason."""

    def __init__(self, table, rows):
        self.table, self.rows, self.lines = table, rows, []

    def drop(self, bad, reason):
        """Leave out the rows where `bad`, a boolean Series of the table's index, is true."""
        if bad.any():
            lines = ", ".join(map(str, self.table.index[bad][:5])) + ", ..." * int(bad.sum() > 5)
            first = ", ".join(map(str, self.table[bad].iloc[0]))
            self.lines.append(f"{int(bad.sum())} {self.rows} left out: {reason} (line {lines}; first: {first})")
            self.table = self.table[~bad]

    def check(self, flag, path):
        if self.table.empty:
            raise runs.UserError(f"{flag} {path}: no usable row; {'; '.join(self.lines) or 'the file has no rows'}")


def read_mos(path, columns=None, lower_is_better=False, flag="--mos"):
    """A CSV of mean opinion scores -> (DataFrame of image, mos, std, lines on rows left out). Index: line of the file.

    mos: in the units of the file, its sign turned where lower is better, so that HIGHER IS ALWAYS BETTER. std: of the
    opinions, NaN where not given. columns: "image=A,mos=B[,std=C]"; None: image, mos and, if there is one, std.
    A row without a name or a finite number, and an image that was named before, are left out. UserError where no row
    is left.
    """
    if columns is None:
        columns = MOS_COLUMNS + ",std=std" * ("std" in agreement.read_csv(path, flag, nrows=0).columns)
    faults = Faults(agreement.read_columns(path, agreement.named_columns(columns, "image=A,mos=B[,std=C]"), flag),
                    "opinions")
    faults.drop(faults.table.image == "", "an image is not named")
    faults.drop(~np.isfinite(pd.to_numeric(faults.table.mos, errors="coerce")), "the mos is no number")
    if "std" in faults.table:
        spread = pd.to_numeric(faults.table["std"], errors="coerce")
        faults.drop((faults.table["std"] != "") & ~(np.isfinite(spread) & (spread >= 0)), "the std is no deviation")
    faults.drop(faults.table.image.duplicated(), "the image was named before; the first row counts")
    faults.check(flag, path)
    mos = pd.to_numeric(faults.table.mos).astype(float)
    spread = pd.to_numeric(faults.table["std"]).astype(float) if "std" in faults.table else np.nan
    return faults.table[["image"]].assign(mos=-mos if lower_is_better else mos, std=spread), faults.lines


def read_choices(path, columns=None, methods=None, pattern=None, flag="--choices"):
    """A CSV of choices in one of the forms above -> (choices, lines on rows left out).

    columns: "selected=A[,candidates=B[+C...]][,scene=D][,observer=E]"; None: the general form. methods: the candidates
    of every row where no column has them. pattern: regular expression with the groups scene and method, found in every
    name of a candidate, where those are names of images. Without a column of observers each row is somebody else's.
    Left out: a row with an empty field, a selected method that is no candidate, fewer than two candidates or one twice,
    images of different scenes, and a choice that the same observer made before among the same candidates of a scene.
    """
    usage = "selected=A[,candidates=B+C][,scene=D][,observer=E]"
    named = agreement.named_columns(columns or CHOICE_COLUMNS, usage)
    if ("candidates" in named) == bool(methods):
        raise runs.UserError(f"{flag} {path}: the candidates of a choice stand in columns (candidates=) or are named "
                             "once for all rows (--methods): give one of the two")
    if ("scene" in named) == bool(pattern):
        raise runs.UserError(f"{flag} {path}: the scene of a choice stands in a column (scene=) or in the names of "
                             "images (--name-pattern): give one of the two")
    parts = named.pop("candidates", "").split("+")
    table = agreement.read_columns(path, named | {f"candidate {k}": part for k, part in enumerate(parts) if part}, flag)
    given = [name for name in table if name.startswith("candidate ")]
    if "observer" not in table:
        table.insert(0, "observer", [f"line {line}" for line in table.index])
    faults = Faults(table, "choices")
    faults.drop((table == "").any(axis=1), "a field is empty")
    table = faults.table
    rows = [tuple(methods)] * len(table) if methods else [
        tuple(part.strip() for cell in row for part in cell.split(BETWEEN))
        for row in table[given].itertuples(index=False)]
    selected = table.selected.tolist()
    if pattern:
        scenes, rows, selected = split_names(rows, selected, pattern)
    else:
        scenes = [without_suffix(name) for name in table.scene]
    faults.table = pd.DataFrame({"observer": table.observer, "scene": scenes, "candidates": rows, "selected": selected},
                                index=table.index)
    faults.drop(faults.table.scene == "", "its images show different scenes, or have names of another form")
    faults.drop(faults.table.candidates.map(lambda row: len(set(row)) < max(2, len(row)) or "" in row),
                "fewer than two candidates, or one twice")
    table = faults.table
    faults.drop(pd.Series([chosen not in row for chosen, row in zip(table.selected, table.candidates)], table.index,
                          dtype=bool), "the selected one is no candidate")
    among = faults.table.candidates.map(lambda row: BETWEEN.join(sorted(row)))
    faults.drop(faults.table[["observer", "scene"]].assign(among=among).duplicated(),
                "the observer chose there before; the first choice counts")
    faults.check(flag, path)
    return faults.table, faults.lines


def split_names(rows, selected, pattern):
    """Names of images -> scenes (one per row, "" where not all agree), candidates and selected as methods."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise runs.UserError(f"--name-pattern {pattern}: not a regular expression ({error})") from None
    if set(compiled.groupindex) != {"scene", "method"}:
        raise runs.UserError(f"--name-pattern {pattern}: needs the groups (?P<scene>...) and (?P<method>...)")

    def parts(name):
        match = compiled.fullmatch(without_suffix(name))
        return (match["scene"], match["method"]) if match else ("", name)
    split = [[parts(name) for name in (*row, chosen)] for row, chosen in zip(rows, selected)]
    scenes = [names[0][0] if len({scene for scene, _ in names}) == 1 else "" for names in split]
    return scenes, [tuple(m for _, m in names[:-1]) for names in split], [names[-1][1] for names in split]


def without_suffix(name):
    return str(Path(name).with_suffix("")) if Path(name).suffix.lower() in IMAGE_SUFFIXES else name


def write_choices(path, choices):
    """Choices as a CSV of the general form."""
    table = choices[["observer", "scene", "candidates", "selected"]]
    table = table.assign(candidates=table.candidates.map(BETWEEN.join))
    runs.write_atomic(path, lambda temporary: table.to_csv(temporary, index=False))


def names_of(choices):
    """The names METHOD/SCENE of all candidates, sorted."""
    return sorted({f"{method}/{row.scene}" for row in choices.itertuples() for method in row.candidates})


def images_of(choices, folder, strict=True, flag="--images"):
    """{METHOD/SCENE: file, None where there is none} of all candidates.

    strict: UserError for a method without a folder, which names the `flag` of `folder`.
    """
    listed, files = {}, {}
    for name in names_of(choices):
        method, scene = name.split("/", 1)
        if method not in listed:
            there = (Path(folder) / method).is_dir()
            if strict and not there:
                raise runs.UserError(f"{flag} {folder}: no folder {method} in it; a method's images are "
                                     "METHOD/SCENE.<suffix>")
            listed[method] = list_images(Path(folder) / method) if there else {}
        files[name] = listed[method].get(scene)
    return files


def splits(groups, count=10, test=0.2, seed=0):
    """`count` random divisions of rows into training and test -> [(training, test)], positions in `groups`.

    Rows of one group (an image, a scene) stay together. The draw depends on the sorted names of the groups and on the
    seed, not on the order of rows: the usual protocol of MOS sets has ten 80/20 splits.
    """
    groups = np.asarray(groups, str)
    names = np.unique(groups)
    divided = []
    for k in range(count):
        order = np.random.default_rng([seed, k]).permutation(len(names))
        inside = np.isin(groups, names[order[:max(1, round(test * len(names)))]])
        divided.append((np.flatnonzero(~inside), np.flatnonzero(inside)))
    return divided


# Mean opinion scores

def logistic(x, top, bottom, middle, width):
    """The four-parameter logistic of VQEG (2000): bottom + (top - bottom) / (1 + exp(-(x - middle) / |width|))."""
    return bottom + (top - bottom) * special.expit((x - middle) / abs(width))


def fit_logistic(quality, mos):
    """logistic(quality) fitted to mos by least squares -> the fitted values and the sign of the slope.

    The usual fit, which may fall: a score of the wrong sign is as good as one of the right sign, so see the slope.
    """
    x = (quality - quality.mean()) / quality.std()
    slope = 1 if np.corrcoef(x, mos)[0, 1] >= 0 else -1
    ends = (mos.max(), mos.min())[::slope]
    found = optimize.least_squares(lambda p: logistic(x, *p) - mos, [*ends, 0.0, 0.25], method="lm", max_nfev=5000)
    return logistic(x, *found.x), np.sign(found.x[0] - found.x[1])


def correlations(quality, mos):
    """{"srcc", "plcc", "plcc_logistic", "krcc"} of (n,) qualities, higher is better, with (n,) opinions.

    Spearman's and Kendall's (tau-b) rank correlations, Pearson's without and after the four-parameter logistic; the
    last has the sign of the fitted slope. NaN where the qualities are all equal or fewer than five.
    """
    if len(quality) < 5 or np.ptp(quality) == 0 or np.ptp(mos) == 0:
        return dict.fromkeys(("srcc", "plcc", "plcc_logistic", "krcc"), np.nan)
    fitted, slope = fit_logistic(quality, mos)
    after = np.corrcoef(fitted, mos)[0, 1] * slope if np.ptp(fitted) else 0.0
    return {"srcc": stats.spearmanr(quality, mos).statistic, "plcc": np.corrcoef(quality, mos)[0, 1],
            "plcc_logistic": after, "krcc": stats.kendalltau(quality, mos).statistic}


def correlations_over(quality, mos, resamples=500, seed=0):
    """correlations() as {name: (value, low, high)}, 95 % intervals by bootstrap over images."""
    value, rng = correlations(quality, mos), np.random.default_rng(seed)
    if np.isnan(value["srcc"]):
        return {name: (np.nan,) * 3 for name in value}
    drawn = pd.DataFrame([correlations(quality[rows], mos[rows])
                          for rows in rng.integers(0, len(mos), (resamples, len(mos)))])
    return {name: (value[name], *np.nanpercentile(drawn[name], [2.5, 97.5])) for name in value}


# Choices

def pairs_of(choices):
    """The K - 1 pairs of each choice: DataFrame of observer, scene, method_a (the selected one), method_b.

    The index is that of the choices, so it repeats. Pairs of one choice are not independent, nor those of a scene.
    """
    rows = [(line, row.observer, row.scene, row.selected, method)
            for line, row in zip(choices.index, choices.itertuples()) for method in row.candidates
            if method != row.selected]
    table = pd.DataFrame(rows, columns=["line", "observer", "scene", "method_a", "method_b"])
    return table.set_index("line")


def votes_of(choices):
    """Pairs with the fraction of those who preferred the right one, as SBS180K's: one row per scene and two methods.

    Of the K - 1 pairs of each choice; a pair of which neither was selected says nothing. -> DataFrame of left, right,
    score, left_method, right_method, photo (the scene), votes (how many)
    """
    pairs = pairs_of(choices)
    first, second = (np.where(pairs.method_a < pairs.method_b, pairs[x], pairs[y])
                     for x, y in (("method_a", "method_b"), ("method_b", "method_a")))
    table = pd.DataFrame({"photo": pairs.scene.to_numpy(), "left_method": first, "right_method": second,
                          "score": (pairs.method_a > pairs.method_b).astype(float).to_numpy()})
    table = table.groupby(["photo", "left_method", "right_method"]).score.agg(score="mean", votes="size").reset_index()
    return table.assign(left=table.left_method + "/" + table.photo, right=table.right_method + "/" + table.photo)


def random_pairs(mos, seed=0):
    """Pairs with votes from mean opinion scores: every image in one random pair, so that pairs are independent.

    The vote is 1 or 0 by the means, 0.5 where they are equal. -> DataFrame of left, right, score
    """
    order = np.random.default_rng(seed).permutation(len(mos))
    left, right = (mos.sort_values("image").iloc[order[side::2][:len(mos) // 2]] for side in (0, 1))
    score = (1 + np.sign(right.mos.to_numpy() - left.mos.to_numpy())) / 2
    return pd.DataFrame({"left": left.image.to_numpy(), "right": right.image.to_numpy(), "score": score})


def utilities(choices, value):
    """(N, K) values of the candidates of N choices, NaN beyond a choice's own, and the place of the selected one (N,).

    value: function of (scene, method).
    """
    width = max(map(len, choices.candidates))
    table = np.full((len(choices), width), np.nan)
    for i, row in enumerate(choices.itertuples()):
        table[i, :len(row.candidates)] = [value(row.scene, method) for method in row.candidates]
    return table, np.array([row.candidates.index(row.selected) for row in choices.itertuples()])


def choice_likelihood(utility, selected):
    """Log likelihood of choices, log softmax(utility)[selected], and its gradient: the Bradley-Terry model for K = 2.

    utility: (N, K), NaN where there is no such candidate; selected: (N,) whole numbers. -> (N,), (N, K), 0 for NaN
    """
    known = np.where(np.isnan(utility), -np.inf, utility)
    log_share = known - special.logsumexp(known, axis=1, keepdims=True)
    gradient = -np.exp(log_share)
    every = np.arange(len(utility))
    gradient[every, selected] += 1
    return log_share[every, selected], gradient


def bradley_terry(choices, clusters=None, resamples=RESAMPLES, seed=0):
    """Strengths of the methods, in nats, mean zero: those under which the choices are most likely.

    The chance that a method is selected is softmax(strengths) over the candidates: Bradley and Terry (1952) for pairs,
    Luce's model for more. clusters: "scene", "observer" or a list of both for 95 % intervals by a bootstrap that draws
    whole scenes, whole observers, or both at once (Owen's pigeonhole bootstrap, 2007, wide rather than narrow); at
    least two of each. -> DataFrame by method, strongest first: strength, low, high (NaN without clusters), choices (how
    often selected), shown (how often a candidate). RIDGE keeps a method finite that is always or never selected.
    """
    methods = sorted({method for row in choices.candidates for method in row})
    number = {method: k for k, method in enumerate(methods)}
    names = [clusters] if isinstance(clusters, str) else clusters or []
    codes = [pd.factorize(choices[name])[0] for name in names]
    rows = pd.Series([(tuple(sorted(map(number.get, row))), number[chosen])
                      for row, chosen in zip(choices.candidates, choices.selected)])
    # choices with equal candidates and the same outcome count together
    pattern, kinds = pd.factorize(rows)
    shown = np.zeros((len(kinds), len(methods)), bool)
    for k, (candidates, _) in enumerate(kinds):
        shown[k, list(candidates)] = True
    selected = np.array([chosen for _, chosen in kinds])
    total = np.bincount(pattern).astype(float)
    table = pd.DataFrame({"strength": _strengths(shown, selected, total), "low": np.nan, "high": np.nan,
                          "choices": np.bincount(selected, total, len(methods)).astype(int),
                          "shown": (total @ shown).astype(int)}, methods)
    if codes and all(code.max() > 0 for code in codes):
        draws = [draw_clusters(code.max() + 1, resamples, seed + k) for k, code in enumerate(codes)]
        found = []
        for counts in zip(*draws):
            times = np.prod([count[code] for count, code in zip(counts, codes)], axis=0)
            if times.any():
                found.append(_strengths(shown, selected, np.bincount(pattern, times, len(kinds))))
        table["low"], table["high"] = np.percentile(found, [2.5, 97.5], axis=0)
    return table.sort_values("strength", ascending=False, kind="stable")


def _strengths(shown, selected, weight):
    """Newton's method on the concave, weighted log likelihood. shown: (P, M) bool; selected, weight: (P,)"""
    wins, strength = np.bincount(selected, weight, shown.shape[1]), np.zeros(shown.shape[1])
    for _ in range(200):
        chance = special.softmax(np.where(shown, strength, -np.inf), axis=1)
        expected = weight @ chance
        gradient = wins - expected - RIDGE * strength
        curvature = np.diag(expected + RIDGE) - (chance * weight[:, None]).T @ chance
        step = np.linalg.solve(curvature, gradient)
        # of a method that is never selected, a full step leaves the range in which the model is quadratic
        strength += step * min(1, 2 / max(np.abs(step).max(), 1e-12))
        if np.abs(step).max() < 1e-9:
            break
    return strength - strength.mean()


# Intervals over clusters

def draw_clusters(count, resamples=RESAMPLES, seed=0):
    """How often each of `count` clusters is drawn, with replacement, in each resample: (resamples, count)."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples).astype(float)


def over_clusters(values, clusters, resamples=RESAMPLES, seed=0):
    """Mean of (n,) values with a 95 % interval by bootstrap over whole clusters (scenes, observers); NaN is left out.

    -> mean, low, high; no interval for a single cluster.
    """
    values = np.asarray(values, float)
    keep = ~np.isnan(values)
    values, cluster = values[keep], pd.factorize(np.asarray(clusters)[keep])[0]
    if not len(values):
        return np.nan, np.nan, np.nan
    sums, sizes = np.bincount(cluster, values), np.bincount(cluster)
    if len(sizes) < 2:
        return values.mean(), np.nan, np.nan
    draws = draw_clusters(len(sizes), resamples, seed)
    return values.mean(), *np.percentile((draws @ sums) / (draws @ sizes), [2.5, 97.5])


# Scores and choices

def judge(choices, value):
    """How well `value`, a function of (scene, method), higher is better, NaN where unknown, predicts the choices.

    -> {"choices": how many had all values;
        "pairs": share of the K - 1 pairs of each choice that it orders as the observer did, 0.5 for equal values;
        "within": mean over scenes of Spearman's correlation with how often each method was selected where shown;
        "favourite": share of the choices that its favourite gets, shared by equals;
        "log_likelihood": mean per choice of log softmax(t value), t >= 0 fitted on the other scenes;
        "containing": {method: "pairs" of the pairs that contain the method};
        "p": {"pairs", "within"}: p values of two-sided t tests of the scenes' means against chance, 0.5 and 0},
    each of the four, and of "containing", as mean, low, high: 95 % intervals by bootstrap over scenes. The tests stand
    beside them because intervals of few scenes are too short.
    """
    utility, selected = utilities(choices, value)
    known = (~np.isnan(utility)).sum(axis=1) == choices.candidates.map(len)
    choices, utility, selected = choices[known], utility[known.to_numpy()], selected[known.to_numpy()]
    if choices.empty:
        return None
    scenes = choices.scene.to_numpy()
    every = np.arange(len(choices))
    chosen = utility[every, selected]
    best = np.nanmax(utility, axis=1)
    favourite = (chosen == best) / (utility == best[:, None]).sum(axis=1)
    pairs = pairs_of(choices)
    right = [(1 + np.sign(value(r.scene, r.method_a) - value(r.scene, r.method_b))) / 2 for r in pairs.itertuples()]
    right, of_pair = np.array(right), pairs.scene.to_numpy()
    within = within_scenes(choices, value)
    containing = {}
    for method in sorted({*pairs.method_a, *pairs.method_b}):
        rows = ((pairs.method_a == method) | (pairs.method_b == method)).to_numpy()
        containing[method] = over_clusters(right[rows], of_pair[rows])
    return {"choices": len(choices), "pairs": over_clusters(right, of_pair),
            "within": over_clusters(list(within.values()), list(within)),
            "favourite": over_clusters(favourite, scenes),
            "log_likelihood": over_clusters(likelihood_elsewhere(utility, selected, scenes), scenes),
            "containing": containing,
            "p": {"pairs": t_test(pd.Series(right).groupby(of_pair).mean(), 0.5), "within": t_test(within.values(), 0)}}


def t_test(values, chance):
    """p of a two-sided one-sample t test of the mean of values, a scene's each, against chance; NaN is left out.

    NaN for fewer than two. Values that are all alike differ from chance beyond doubt (0), or not at all (1).
    """
    values = np.array([value for value in values if not np.isnan(value)])
    return tables.paired_p(values - chance) if len(values) > 1 else np.nan


def selection_rates(choices):
    """DataFrame by scene and method: how often selected, of the times it was a candidate; NaN where it never was."""
    shown = choices.explode("candidates").groupby(["scene", "candidates"]).size().unstack()
    selected = choices.groupby(["scene", "selected"]).size().unstack().reindex_like(shown).fillna(0)
    return selected / shown


def within_scenes(choices, value):
    """{scene: Spearman's correlation of the values of its methods with their selection rates}, NaN where undefined."""
    found = {}
    for scene, rates in selection_rates(choices).iterrows():
        rates = rates.dropna()
        values = [value(scene, method) for method in rates.index]
        defined = np.ptp(values) > 0 and np.ptp(rates) > 0
        found[scene] = stats.spearmanr(values, rates).statistic if defined else np.nan
    return found


def likelihood_elsewhere(utility, selected, scenes):
    """Log likelihood of each choice under softmax(t utility): t >= 0 is the best one on all other scenes. (n,)"""
    utility = utility / (np.nanstd(utility) or 1)
    values = np.empty(len(utility))
    for scene in np.unique(scenes):
        inside = scenes == scene

        def loss(t, rows=~inside):
            return -choice_likelihood(t * utility[rows], selected[rows])[0].sum()
        t = optimize.minimize_scalar(loss, bounds=(0, 50), method="bounded").x if not inside.all() else 1.0
        values[inside] = choice_likelihood(t * utility[inside], selected[inside])[0]
    return values


def names_only(choices):
    """A value for judge() that knows the method and nothing of the image: its strength in all other scenes.

    0, the mean of the strengths, for a method that no other scene shows; so for all where there is one scene only.
    """
    strengths = {}
    for scene in choices.scene.unique():
        others = choices[choices.scene != scene]
        strengths[scene] = {} if others.empty else bradley_terry(others).strength
    return lambda scene, method: strengths.get(scene, {}).get(method, 0.0)


def judge_names(choices):
    """judge() of names_only; in "containing" each method is left out in turn, and has the others' mean strength."""
    judged = judge(choices, names_only(choices))
    for method in judged["containing"]:
        judged["containing"][method] = judge(choices, names_only(without(choices, method)))["containing"][method]
    return judged


def without(choices, method):
    """The choices as if a method had not been shown; those that selected it are gone."""
    left = choices[choices.selected != method]
    left = left.assign(candidates=left.candidates.map(lambda row: tuple(m for m in row if m != method)))
    return left[left.candidates.map(len) > 1]


def ceilings(choices):
    """What is had without looking, and what no scores can exceed, in the terms of judge() -> {name: {...}}.

    "chance"; "most possible": the majority of the same choices; "the other observers": the majority without the one
    who chooses.
    """
    votes, pairs = votes_of(choices), pairs_of(choices)
    most = np.average(np.fmax(votes.score, 1 - votes.score), weights=votes.votes)
    wins = pairs.groupby(["scene", "method_a", "method_b"]).size()
    ahead = [wins[row] - 1 - wins.get((row[0], row[2], row[1]), 0)
             for row in zip(pairs.scene, pairs.method_a, pairs.method_b)]
    favourite, by_others, likelihood, sizes = 0.0, 0.0, 0.0, choices.candidates.map(len)
    for _, part in choices.groupby(["scene", choices.candidates.map(lambda row: tuple(sorted(row)))]):
        count = part.selected.value_counts().to_numpy()
        favourite += count.max()
        likelihood += (count * np.log(count / count.sum())).sum()
        # unselected candidates matter where nobody else selected anything
        count = np.append(count, np.zeros(len(part.candidates.iloc[0]) - len(count)))
        for k in np.flatnonzero(count):
            without = count - (np.arange(len(count)) == k)
            by_others += count[k] * (without[k] == without.max()) / (without == without.max()).sum()
    n = len(choices)
    return {"the other observers": {"pairs": np.mean((1 + np.sign(ahead)) / 2), "favourite": by_others / n},
            "most possible": {"pairs": most, "within": 1.0, "favourite": favourite / n,
                              "log_likelihood": likelihood / n},
            "chance": {"pairs": 0.5, "within": 0.0, "favourite": (1 / sizes).mean(),
                       "log_likelihood": -np.log(sizes).mean()}}
