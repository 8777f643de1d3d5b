"""The user study's tools on real choices of people, and how many raters find which difference (Supp. 12).

    python -m experiments.votes ranking SR_STUDY     real choices as vote files through study.analyze
    python -m experiments.votes power SR_STUDY       power of the t test, for the paper's raters and these
    python -m experiments.votes page SR_STUDY        size of a page of 100 pairs of 1020 x 676, and time to load it

SR_STUDY holds pairs.csv, choice_of_4.csv and a folder of images per method, as a user study of four networks left them
(15 observers x 36 pairs of 6 scenes; 52 observers x 20 scenes, best of four). Writes study-COMMAND.json.
"""
import csv
import itertools
import json
import math
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import runs

# PAPER Supp. 12: mean preference, standard error over raters, raters, pairs per rater
PAPER = {"mean": 0.697, "se": 0.048, "raters": 12, "each": 25}


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("command", choices=["ranking", "power", "page"])
    p.add_argument("folder", type=Path, metavar="SR_STUDY", help="folder of the study's choices and images")
    p.add_argument("--results", type=Path, default=Path("runs/results/human"), metavar="DIR")
    return p.parse_args(argv)


ARGS = parse_args() if __name__ == "__main__" else None

import numpy as np

from experiments.human import METHODS, read_study
from study import analyze

# The real choices as files of votes

def write_votes(choices, folder, study):
    """Choices as key.json and a file per observer, as study.make and its page would have left them.

    A choice of four is three pairs: the selected one against each other. The sides are those of the file.
    """
    key = {"study": study, "methods": list(METHODS), "raters": {}, "files": {}}
    (folder / "votes").mkdir(parents=True)
    for method in METHODS:
        key["files"][method] = {scene: f"{method}/{scene}.webp" for scene in sorted(set(choices.scene))}
    for observer, rows in choices.groupby("observer"):
        trials, answers = [], []
        for row in rows.itertuples():
            for other in (method for method in row.candidates if method != row.selected):
                left, right = (method for method in row.candidates if method in (other, row.selected))
                trials.append({"kind": "pair", "scene": row.scene, "left": left, "right": right})
                # the times of the study are per choice, and not used
                answers.append({"choice": "left" if left == row.selected else "right", "seconds": 10, "scale": 1})
        key["raters"][observer] = trials
        (folder / "votes" / f"{observer}.json").write_text(json.dumps(
            {"format": analyze.FORMAT, "study": study, "rater": observer, "session": observer, "finished": "",
             "answers": answers}))
    runs.save_json(folder / "key.json", key)


def ranking(folder):
    """Both sorts of choices through study.analyze; beside them what can be counted by hand."""
    tables, left_out = read_study(folder)
    record = {"left_out": left_out}
    with tempfile.TemporaryDirectory() as temporary:
        for name, choices in tables.items():
            at = Path(temporary) / name
            write_votes(choices, at, name)
            words = [str(at / "votes"), "--key", str(at / "key.json"), "--ours", "ResShift"]
            analyze.main(analyze.parse_args(words))
            result = json.loads((at / "analysis" / "analysis.json").read_text())
            # the three pairs of a choice of four are not three judgements, so their agreement says nothing
            kept = ["votes", "raters", "photographs", "strengths", "preference", "won", "agreement"]
            record[name] = {part: result[part] for part in kept[:7 if name == "pairs" else 6]}
    record["pairs by hand"] = by_hand(folder / "pairs.csv")
    for part, value in record["pairs by hand"].items():
        print(f"by hand: {part} {value}")
    return record


def by_hand(file):
    """The numbers of "pairs" from the rows of the file, by loops and counts alone.

    strengths: Zermelo's iteration p_i = wins_i / sum_j n_ij / (p_i + p_j), as logarithms with mean zero.
    """
    with open(file) as rows:
        votes = [(row["observer"], *(row[name].removesuffix(".png").split("_")
                                     for name in ("left", "right", "selected"))) for row in csv.DictReader(rows)]
    won = {a: {b: 0 for b in METHODS if b != a} for a in METHODS}
    shares, ballots = {}, {}
    for observer, left, right, selected in votes:
        winner, loser = selected[1], (right if selected == left else left)[1]
        won[winner][loser] += 1
        ballots.setdefault((left[0], *sorted((left[1], right[1]))), []).append(winner)
        if "ResShift" in (winner, loser):
            other = loser if winner == "ResShift" else winner
            shares.setdefault(other, {}).setdefault(observer, []).append(winner == "ResShift")
    p = dict.fromkeys(METHODS, 1.0)
    for _ in range(10_000):
        p = {a: sum(won[a].values()) / sum((won[a][b] + won[b][a]) / (p[a] + p[b]) for b in METHODS if b != a)
             for a in METHODS}
    centre = sum(map(math.log, p.values())) / len(p)
    two = [a == b for ballot in ballots.values() for a, b in itertools.combinations(ballot, 2)]
    mean = {other: [sum(v) / len(v) for v in of.values()] for other, of in shares.items()}
    return {"won": won, "strengths": {a: math.log(p[a]) - centre for a in METHODS},
            "preference": {other: sum(v) / len(v) for other, v in mean.items()},
            "agreement": sum(two) / len(two),
            "majority": sum(max(map(ballot.count, ballot)) for ballot in ballots.values()) / len(votes)}


# Power

def spread_of(shares, each):
    """The standard deviation of raters' own preferences: that of their shares, less the chance of `each` votes."""
    mean = float(np.mean(shares))
    return math.sqrt(max(0.0, float(np.var(shares, ddof=1)) - mean * (1 - mean) / each))


def paper_spread():
    """The same of the paper's 12 raters, from its standard error."""
    share, each = PAPER["mean"], PAPER["each"]
    return math.sqrt(PAPER["se"] ** 2 * PAPER["raters"] - share * (1 - share) / each)


def power(folder):
    """Power of the one-sided t test at 5 % for raters, pairs and preferences, with two measured spreads."""
    tables, _ = read_study(folder)
    pairs = tables["pairs"]
    spreads = {"paper": paper_spread()}
    for method in METHODS:
        votes = pairs[pairs.candidates.map(lambda both, method=method: method in both)]
        won = (votes.selected == method).groupby(votes.observer)
        spreads[method] = spread_of(won.mean(), int(won.size().iloc[0]))
    # ResShift is the method that these raters preferred, as the paper's preferred AMO+FT
    used = {"paper": spreads["paper"], "study": spreads["ResShift"]}
    rows = [{"raters": raters, "each": each, "share": share,
             **{name: analyze.power(share, raters, each, spread) for name, spread in used.items()}}
            for raters in (6, 12, 24, 48) for each in (25, 50) for share in (0.55, 0.6, 0.65, PAPER["mean"])]
    for row in rows:
        print(" ".join(f"{name} {value:.3g}" for name, value in row.items()))
    return {"paper": PAPER, "spreads": spreads, "used": used, "level": 0.05, "power": rows}


# The page

def page(folder):
    """Size and loading time of the largest usual page: 100 pairs of 1020 x 676 in one file, 12 raters."""
    from PIL import Image
    from playwright.sync_api import sync_playwright
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)
        for method in ("ResShift", "SwinIR"):
            (made / method).mkdir()
            for file in sorted((folder / method).glob("*.webp")):
                image = Image.open(file).convert("RGB")
                image = image if image.width > image.height else image.transpose(Image.Transpose.ROTATE_90)
                image = image.resize((1020, 676)) if image.size != (1020, 676) else image
                # 20 scenes five times: as they are, mirrored, turned, and darker
                turns = [image, *(image.transpose(turn) for turn in (0, 1, 3)), image.point(lambda v: v * 0.9)]
                for k, turned in enumerate(turns):
                    turned.save(made / method / f"{file.stem}-{k}.png", compress_level=1)
        record = {"pairs": len(list((made / "SwinIR").iterdir()))}
        for words in ([], ["--split"]):
            out, name = made / f"out{len(words)}", "split" if words else "one_file"
            started = time.perf_counter()
            subprocess.run(runs.python("study.make", made / "ResShift", made / "SwinIR", "--out", out, *words),
                           check=True, env=runs.python_path())
            files = sorted(out.glob("study*.html"))
            record[name] = {"megabytes": max(file.stat().st_size for file in files) / 1e6, "files": len(files),
                            "seconds_to_make": time.perf_counter() - started}
            with sync_playwright() as p:
                chromium = p.chromium.launch(executable_path=shutil.which("chromium"),
                                             args=["--no-sandbox", "--disable-gpu"])
                times = [load(chromium, files[0].as_uri() + "#1") for _ in range(5)]
                record[name] |= {"chromium": chromium.version,
                                 "seconds_to_load": [t["loaded"] for t in times],
                                 "seconds_to_first_pair": [t["pair"] for t in times],
                                 "seconds_per_next_pair": [t["next"] for t in times]}
                chromium.close()
            print(name, record[name])
    return record


def load(chromium, address):
    """Seconds until the page can be begun, from there to the first pair, and from an answer to the next pair."""
    tab = chromium.new_page()
    started = time.perf_counter()
    tab.goto(address)
    tab.wait_for_function("!document.getElementById('go').disabled")
    loaded = time.perf_counter()
    tab.click("#go")
    tab.wait_for_function("shownAt > 0")
    pair = time.perf_counter()
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("a")
    tab.wait_for_function("at === 1 && shownAt > 0")
    after = time.perf_counter()
    tab.close()
    return {"loaded": loaded - started, "pair": pair - loaded, "next": after - pair}


def main(args):
    runs.check_writable(args.results, "--results")
    record = {"ranking": ranking, "power": power, "page": page}[args.command](args.folder)
    path = args.results / f"study-{args.command}.json"
    runs.save_json(path, {"command": f"python -m experiments.votes {args.command} SR_STUDY",
                          **runs.describe_machine(on_cpu=True), **record})
    print(f"wrote {path}")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
