"""What the votes of a study say: preference, ranking of methods, agreement of raters (Supp. 12).

    python -m study.analyze VOTES/ --key runs/study/key.json

VOTES holds the files that the raters sent back. Prints the paper's statistics (two methods) or Bradley-Terry strengths
(more), and what was left out; writes analysis.json and two tables of the votes for analyze_iqa.py and
rewards.train_opinion: pairs.csv, the share per pair, and choices.csv, a row per vote, whose METHOD/SCENE are links in
images/. docs/study.md has the commands.
"""
import json
import math
import sys
from pathlib import Path

import runs

# CHOICE: a rater with more wrong answers to attention checks is left out; so is one whose median is faster, seconds
WRONG_CHECKS, FASTEST = 1, 1.0
FORMAT = 1


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("votes", type=Path, metavar="VOTES", help="folder of the files that raters sent back")
    p.add_argument("--key", type=Path, required=True, help="key.json of study.make")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder to write; default: analysis, beside the key")
    p.add_argument("--ours", metavar="METHOD",
                   help="the method that is tested against the others; default: the first one of study.make")
    return p.parse_args(argv)


ARGS = parse_args() if __name__ == "__main__" else None

import numpy as np
import pandas as pd
from scipy import stats

from images import visible
from report import opinions

# Files

def read_key(path):
    """key.json of study.make; UserError where it is none."""
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        complete = {"study", "methods", "raters", "files"} <= key.keys()
    except FileNotFoundError:
        raise runs.UserError(f"--key {path}: no such file; study.make wrote it beside the page") from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        complete = False
    if not complete:
        raise runs.UserError(f"--key {path}: not the key.json of a study: name the one that study.make wrote")
    return key


def read_file(path, key):
    """A file of votes -> {"rater", "session", "finished", "answers", ...}; ValueError says what is wrong with it."""
    try:
        votes = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        raise ValueError("damaged: not the text that the page saved") from None
    if not isinstance(votes, dict) or "answers" not in votes or votes.get("format") != FORMAT:
        raise ValueError("no file of votes")
    if votes.get("study") != key["study"]:
        raise ValueError(f"of another study ({votes.get('study')}, the key is of {key['study']})")
    if not isinstance(votes.get("rater"), str) or votes["rater"] not in key["raters"]:
        raise ValueError(f"rater {votes.get('rater')} is not in the key")
    trials, answers = key["raters"][votes["rater"]], votes["answers"]
    if not isinstance(answers, list) or len(answers) > len(trials):
        raise ValueError("damaged: more answers than pairs")
    # a pair without an answer is null
    given = [a for a in answers if a is not None]
    if not all(isinstance(a, dict) and a.get("choice") in ("left", "right") for a in given):
        raise ValueError("damaged: an answer is neither left nor right")
    if len(given) < len(trials):
        raise ValueError(f"incomplete: {len(given)} of {len(trials)} pairs answered")
    # json reads NaN and Infinity as well
    timed = all(isinstance(a.get(name), int | float) and 0 <= a[name] < 1e9 for a in given
                for name in ("seconds", "scale"))
    if not timed or not all(isinstance(votes.get(name), str) for name in ("session", "finished")):
        raise ValueError("damaged: a field is missing, or no number")
    return votes


def read_votes(folder, key):
    """-> ({rater: votes}, [a line per file left out: damaged, foreign, incomplete, or a second one of a rater]).

    Of several files of a rater the session that was finished first counts, and of that the last file: the page can be
    saved again after a correction. UserError where no file is left.
    """
    if not folder.is_dir():
        raise runs.UserError(f"{folder}: no such folder of votes")
    files, left_out = {}, []
    for path in visible(folder.iterdir()):
        try:
            files[path] = read_file(path, key)
        except ValueError as error:
            left_out.append(f"{path.name}: {error}")
        except OSError as error:
            left_out.append(f"{path.name}: {error.strerror}")
    counted = {}
    for path, votes in sorted(files.items(), key=lambda item: item[1]["finished"]):
        name, before = votes["rater"], counted.get(votes["rater"])
        if before is None or files[before]["session"] == votes["session"]:
            counted[name], path = path, before
        if path is not None:
            left_out.append(f"{path.name}: a second file of rater {name}; {counted[name].name} counts")
    if not counted:
        raise runs.UserError(f"{folder}: no complete file of votes of study {key['study']}"
                             + "".join(f"; {line}" for line in left_out))
    ordered = sorted(counted, key=lambda name: list(key["raters"]).index(name))
    return {name: files[counted[name]] for name in ordered}, left_out


def choices_of(key, votes, kind="pair"):
    """The answers as report.opinions has choices: observer, scene, candidates (left, right), selected."""
    rows = [(rater, trial["scene"], (trial["left"], trial["right"]), trial[answer["choice"]])
            for rater, one in votes.items() for trial, answer in zip(key["raters"][rater], one["answers"])
            if trial["kind"] == kind]
    return pd.DataFrame(rows, columns=["observer", "scene", "candidates", "selected"])


# Raters

def describe_raters(key, votes):
    """DataFrame by rater: checks right of how many, repeats answered alike, share of left, median seconds and scale.

    scale: pixels of the screen per pixel of the picture. others: the mean share of the other raters that chose as this
    one on the pairs they share. reason: why the rater is left out, or "".
    """
    choices, rows = choices_of(key, votes), {}
    ballots = choices.assign(both=choices.candidates.map(sorted).map(tuple))
    for rater, one in votes.items():
        trials, answers = key["raters"][rater], one["answers"]
        chosen = {(t["scene"], frozenset((t["left"], t["right"]))): t[a["choice"]] for t, a in zip(trials, answers)
                  if t["kind"] == "pair"}
        checks = [t[a["choice"]] == "original" for t, a in zip(trials, answers) if t["kind"] == "check"]
        repeats = [t[a["choice"]] == chosen[t["scene"], frozenset((t["left"], t["right"]))]
                   for t, a in zip(trials, answers) if t["kind"] == "repeat"]
        seconds, scale = (float(np.median([a[name] for a in answers])) for name in ("seconds", "scale"))
        others = ballots[ballots.observer != rater].merge(ballots[ballots.observer == rater], on=["scene", "both"])
        reason = f"{checks.count(False)} of {len(checks)} checks wrong" if checks.count(False) > WRONG_CHECKS else ""
        reason = reason or f"median of {seconds:.1f} s per pair" * (seconds < FASTEST)
        rows[rater] = {"checks": len(checks), "right": sum(checks), "repeats": len(repeats), "alike": sum(repeats),
                       "left": np.mean([a["choice"] == "left" for a in answers]), "seconds": seconds,
                       "scale": scale, "others": (others.selected_x == others.selected_y).mean(), "reason": reason}
    return pd.DataFrame.from_dict(rows, orient="index")


def agreement(choices):
    """How far raters agree: {"agreement", "low", "high", "u", "majority", "compared"}.

    agreement: the share of equal choices among all two raters who saw the same pair, with an interval over photographs;
    0.5 by chance. u = 2 agreement - 1 is Kendall and Babington Smith's coefficient (1940) for paired comparisons, here
    over the raters that each pair has. majority: the mean share of the more frequent choice, the most that any metric
    can agree with these votes. compared: how many couples of votes. NaN where no pair was seen twice.
    """
    equal, scenes, most, votes = [], [], 0, 0
    for (scene, _), group in choices.groupby([choices.scene, choices.candidates.map(sorted).map(tuple)]):
        count = group.selected.value_counts()
        alike, every = sum(math.comb(n, 2) for n in count), math.comb(len(group), 2)
        equal += [1.0] * alike + [0.0] * (every - alike)
        scenes += [scene] * every
        most, votes = most + count.max(), votes + len(group)
    share, low, high = opinions.over_clusters(equal, scenes)
    return {"agreement": share, "low": low, "high": high, "u": 2 * share - 1, "majority": most / votes,
            "compared": len(equal)}


# Preference

def preference(shares):
    """The paper's statistics (Supp. 12) of (n,) shares, one per rater: how often this rater preferred our method.

    mean, median, se (of the mean), t and p of the one-sided t test against 0.5, low and high of the 95 % interval with
    Student's t. normal_low, normal_high: mean -+ 1.96 se, which is what the paper's [60.2, 79.1] is. NaN for one rater,
    and where all raters have the same share: a t test of no spread would be sure of anything.
    """
    shares = np.asarray(shares, float)
    n, mean = len(shares), float(shares.mean())
    se = float(shares.std(ddof=1)) / math.sqrt(n) if np.ptp(shares) else math.nan
    t, width, normal = (mean - 0.5) / se, stats.t.ppf(0.975, n - 1) * se, stats.norm.ppf(0.975) * se
    return {"raters": n, "mean": mean, "median": float(np.median(shares)), "se": se, "t": t,
            "p": float(stats.t.sf(t, n - 1)), "low": mean - width, "high": mean + width,
            "normal_low": mean - normal, "normal_high": mean + normal}


def power(share, raters, each, spread, level=0.05):
    """The chance that the one-sided t test over raters finds a preference.

    share: the true one, above 0.5; each: pairs per rater; spread: the standard deviation of the raters' own
    preferences, beside which every rater's score varies as `each` votes do.
    """
    se = math.sqrt((spread ** 2 + share * (1 - share) / each) / raters)
    return float(stats.nct.sf(stats.t.isf(level, raters - 1), raters - 1, (share - 0.5) / se))


def over_both(won, observers, scenes):
    """Ends of the 95 % interval of a share by a bootstrap that draws raters and photographs at once (Owen, 2007)."""
    codes = [pd.factorize(names)[0] for names in (observers, scenes)]
    by_rater, by_scene = (opinions.draw_clusters(code.max() + 1, seed=k)[:, code] for k, code in enumerate(codes))
    weight = by_rater * by_scene
    weight = weight[weight.any(1)]
    return np.percentile(weight @ won / weight.sum(1), [2.5, 97.5]).tolist()


def against(choices, ours):
    """{other method: preference() of ours over it, and both_low, both_high: ends of over_both()}."""
    table = {}
    for other in sorted({method for both in choices.candidates for method in both} - {ours}):
        votes = choices[choices.candidates.map(set) == {ours, other}]
        won = (votes.selected == ours).astype(float)
        if len(votes):
            low, high = over_both(won.to_numpy(), votes.observer, votes.scene)
            table[other] = preference(won.groupby(votes.observer).mean()) | {"both_low": low, "both_high": high,
                                                                            "votes": len(votes)}
    return table


def summarise(choices, ours):
    """-> {"preference": against(), "agreement": agreement(), "strengths": Bradley-Terry, "won": votes}."""
    won = choices.assign(lost=[next(m for m in both if m != chosen)
                               for both, chosen in zip(choices.candidates, choices.selected)])
    won = pd.crosstab(won.selected, won.lost)
    strengths = opinions.bradley_terry(choices, ["observer", "scene"])
    return {"votes": len(choices), "raters": choices.observer.nunique(), "photographs": choices.scene.nunique(),
            "preference": against(choices, ours), "agreement": agreement(choices),
            "strengths": strengths.to_dict("index"),
            "won": {a: {b: int(won.get(b, {}).get(a, 0)) for b in strengths.index if b != a} for a in strengths.index}}


# Tables

def pairs_table(choices, files):
    """The votes per pair as analyze_iqa.py reads them: score is the share that prefers the right image."""
    table = opinions.votes_of(choices)
    for side in ("left", "right"):
        table[side] = [files[method][scene] for method, scene in zip(table[f"{side}_method"], table.photo)]
    return table[["left", "right", "score", "left_method", "right_method", "photo", "votes"]]


def link_images(folder, files):
    """Links METHOD/SCENE.<suffix> to the images of a key, as whoever reads choices.csv finds them."""
    for method, images in files.items():
        (folder / method).mkdir(parents=True, exist_ok=True)
        for scene, path in images.items():
            link = folder / method / (scene + Path(path).suffix)
            if link.is_symlink():
                link.unlink()
            link.symlink_to(Path(path).absolute())


def percent(value):
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def without_nan(value):
    """For JSON: NaN becomes null."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def report_text(summary, raters, ours):
    """What is printed: tables of the raters, of the preference, and of the ranking."""
    rows = [[rater, f"{r.right}/{r.checks}", f"{r.alike}/{r.repeats}", percent(r.left), f"{r.seconds:.1f}",
             f"{r.scale:.2g}", percent(r.others), r.reason] for rater, r in raters.iterrows()]
    parts = [runs.markdown(["rater", "checks right", "repeats alike", "left, %", "seconds", "scale", "as others, %",
                            "left out"], rows)]
    a = summary["agreement"]
    if a["compared"]:
        parts.append(f"Two raters choose alike in {percent(a['agreement'])} % [{percent(a['low'])}, "
                     f"{percent(a['high'])}] (chance 50; Kendall's u {a['u']:.2f}); the majority has "
                     f"{percent(a['majority'])} % of the votes.")
    rows = [[f"{ours} over {other}", f"{percent(r['mean'])} [{percent(r['low'])}, {percent(r['high'])}]",
             percent(r["median"]), percent(r["se"]), "-" if math.isnan(r["p"]) else f"{r['p']:.2g}",
             f"[{percent(r['both_low'])}, {percent(r['both_high'])}]"] for other, r in summary["preference"].items()]
    parts.append(runs.markdown(["preferred, %", "mean over raters, 95 % interval", "median", "standard error",
                                "one-sided p", "interval over raters and photographs"], rows))
    if len(summary["strengths"]) > 2:
        rows = [[method, f"{s['strength']:+.2f} [{s['low']:+.2f}, {s['high']:+.2f}]".replace("+nan", "-"),
                 f"{s['choices']}/{s['shown']}"]
                for method, s in summary["strengths"].items()]
        parts.append(runs.markdown(["method", "Bradley-Terry strength, 95 % interval over raters and photographs",
                                    "preferred"], rows))
        extreme = [method for method, s in summary["strengths"].items() if s["choices"] in (0, s["shown"])]
        if extreme:
            parts.append(f"{', '.join(extreme)}: preferred always or never, so the strength has no finite value and "
                         "its interval says nothing.")
    return "\n\n".join(parts)


def main(args):
    key = read_key(args.key)
    ours, out = args.ours or key["methods"][0], args.out or args.key.parent / "analysis"
    if ours not in key["methods"]:
        raise runs.UserError(f"--ours {ours}: not a method of this study ({', '.join(key['methods'])})")
    runs.check_writable(out, "--out")
    votes, left_out = read_votes(args.votes, key)
    raters = describe_raters(key, votes)
    kept = {rater: one for rater, one in votes.items() if not raters.reason[rater]}
    if not kept:
        raise runs.UserError(f"{args.votes}: all {len(votes)} raters are left out ({'; '.join(raters.reason)})")
    choices = choices_of(key, kept)
    summary = summarise(choices, ours)
    summary["all_raters"] = {other: {name: row[name] for name in ("mean", "low", "high")}
                             for other, row in against(choices_of(key, votes), ours).items()}
    print(report_text(summary, raters, ours))
    if len(kept) < len(votes):
        shown = ", ".join(f"{ours} over {other} {percent(row['mean'])}" for other, row in summary["all_raters"].items())
        print(f"\nwith the raters left out: {shown}")
    print("".join(f"\nleft out: {line}" for line in left_out))
    pairs = pairs_table(choices, key["files"])
    runs.write_atomic(out / "pairs.csv", lambda temporary: pairs.to_csv(temporary, index=False))
    opinions.write_choices(out / "choices.csv", choices)
    link_images(out / "images", key["files"])
    runs.save_json(out / "analysis.json", {
        "command": sys.argv, **runs.describe_machine(on_cpu=True), "study": key["study"], "ours": ours,
        "left_out": left_out, "rater_table": without_nan(raters.to_dict("index")), **without_nan(summary)})
    print(f"wrote {out}/analysis.json, pairs.csv ({len(pairs)} pairs), choices.csv ({len(choices)} votes), images/")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
