"""analyze_iqa.py and report/analyses.py by their commands: real images, real and hand-made metrics, refusals."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import analyze_iqa
import metrics
import runs
from images import load_image, save_image

REPO = Path(__file__).resolve().parents[1]
LABELS = REPO.parent / "shared" / "data" / "labels"
COLUMNS = ["--columns", "left=first,right=second,score=vote"]


def run(*words):
    analyze_iqa.main(analyze_iqa.parse_args([str(word) for word in words]))


@pytest.fixture
def preferences(tmp_path):
    """Six images of rising brightness; people mostly prefer the brighter one."""
    for k in range(6):
        image = torch.full((3, 64, 64 + 8 * (k % 2)), 0.1 + 0.05 * k)
        save_image(tmp_path / "images" / f"m{k % 3}" / f"{k}.png", image)
    names = [f"m{k % 3}/{k}.png" for k in range(6)]
    rows = [(names[i], names[j], 0.9 if (i + j) % 4 else 0.5 if j == 5 else 0.2)
            for i in range(6) for j in range(i + 1, 6)]
    pd.DataFrame(rows, columns=["first", "second", "vote"]).to_csv(tmp_path / "votes.csv", index=False)
    return tmp_path


def votes_of(folder):
    return ["--pairs", folder / "votes.csv", *COLUMNS, "--images", folder / "images"]


def score(folder, *words, metrics=("test_rewards:brightness", "ranker")):
    run("score", *votes_of(folder), "--out", folder / "run", "--metrics", *metrics, "--device", "cpu", *words)


def test_pairs_from_images_to_tables(preferences, rewards, capsys):
    score(preferences)
    printed = capsys.readouterr().out
    assert "understood: 90% of people prefer m1/1.png to m0/0.png" in printed and "nothing was left out" in printed
    scores = pd.read_csv(preferences / "run/scores.csv", index_col="image")
    brightness = [100 * load_image(preferences / "images" / name).float().mean().item() / 255 for name in scores.index]
    assert scores["test_rewards:brightness"].to_numpy() == pytest.approx(brightness, abs=1e-3)
    votes = pd.read_csv(preferences / "votes.csv")
    consensus = votes[votes.vote != 0.5]
    run("sbs", preferences / "run")
    result = json.loads((preferences / "run/sbs.json").read_text())["accuracy"][0]["test_rewards:brightness"]
    assert result["n"] == len(consensus) < len(votes)
    assert result["accuracy"] == pytest.approx((consensus.vote > 0.5).mean())
    report = (preferences / "run/sbs.md").read_text()
    assert f"{len(votes)} pairs, {len(consensus)} with a consensus" in report
    assert f"| {100 * (consensus.vote > 0.5).sum() / len(votes):.2f} |" in report
    for name in ("sbs.md", "sbs.tex", "sbs-run.csv", "sbs-run-paired.csv", "sbs-run.png"):
        assert (preferences / "run" / name).stat().st_size > 100
    run("complement", preferences / "run", "--fails", "ranker")
    run("disagree", preferences / "run", "--metrics", "test_rewards:brightness", "ranker", "--images",
        preferences / "images", "--side", 64)
    assert (preferences / "run/disagree-test_rewards_brightness-ranker.png").exists()
    run("recommend", preferences / "run")
    advice = json.loads((preferences / "run/recommend.json").read_text())
    # the ranker is right in 21 %
    assert advice["train"] == "test_rewards:brightness" and advice["keep"] == []
    assert advice["table"]["ranker"]["backward"] > 0
    message = "--fails musiq: not scored; choose one of test_rewards:brightness, ranker"
    with pytest.raises(runs.UserError, match=message):
        run("complement", preferences / "run")
    with pytest.raises(runs.UserError, match="no sets.csv in it"):
        run("hggt", preferences / "run")


def test_figures_are_wide_enough_to_read(preferences, rewards):
    """At 150 dpi, so that letters are readable where a page shows 830 pixels."""
    from PIL import Image
    score(preferences, "--no-speed")
    run("sbs", preferences / "run")
    with Image.open(preferences / "run/sbs-run.png") as figure:
        assert figure.info["dpi"] == pytest.approx((150, 150), abs=0.1) and figure.width >= 1000


ODD_METRIC = '''
import torch
def build(device):
    def metric(x):
        if (x.mean() - 0.2).abs() < 0.01:
            raise RuntimeError("cannot judge this one")
        return torch.where((x.mean((1, 2, 3)) - 0.9).abs() < 0.01, torch.nan, x.mean((1, 2, 3)))
    return metric
'''


def test_images_and_metrics_without_scores_are_named_and_left_out(preferences, monkeypatch, capsys):
    (preferences / "odd_metric.py").write_text(ODD_METRIC)
    monkeypatch.syspath_prepend(preferences)
    (preferences / "images/m0/0.png").unlink()
    (preferences / "images/m1/1.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    save_image(preferences / "images/m2/5.png", torch.full((3, 64, 64), 0.9))
    score(preferences, "--keep-going", metrics=("odd_metric:build", "ranker", "musiq-nonsense"))
    printed = capsys.readouterr().out
    for text in ("odd_metric:build: 4 of 6 images have no score", "ranker: 2 of 6 images have no score",
                 "metric musiq-nonsense left out: --metrics musiq-nonsense: this is unknown"):
        assert text in printed
    run("sbs", preferences / "run")
    result = json.loads((preferences / "run/sbs.json").read_text())
    assert result["accuracy"][0]["ranker"]["n"] < 15 and len(result["left_out"][0]) == 3
    assert "ranker: 2 of 6 images" in capsys.readouterr().out
    message = r"musiq-nonsense.*\(--keep-going leaves such a metric out; scores so far are kept\)"
    with pytest.raises(runs.UserError, match=message):
        score(preferences, metrics=("ranker", "musiq-nonsense"))
    for path in (preferences / "images").glob("*/*.png"):
        save_image(path, torch.full((3, 64, 64), 0.9))
    message = "odd_metric:build: fails on every image, first: no such image .--keep-going"
    with pytest.raises(runs.UserError, match=message):
        score(preferences, metrics=["odd_metric:build"])
    with pytest.raises(runs.UserError, match="--images .*: none of the 6 images is in it, for example "):
        score(preferences, "--images", preferences)


def test_ready_scores_and_the_warning_about_direction(preferences, capsys):
    names = [f"m{k % 3}/{k}.png" for k in range(5)]
    ready = pd.DataFrame({"image": names, "dark": [-k for k in range(5)], "bright": range(5)})
    ready.to_csv(preferences / "ready.csv", index=False)
    pd.read_csv(preferences / "votes.csv").assign(vote=0.9).to_csv(preferences / "votes.csv", index=False)
    words = ["score", "--pairs", preferences / "votes.csv", *COLUMNS, "--scores", preferences / "ready.csv",
             "--out", preferences / "run", "--method-pattern", "^(m.)/"]
    run(*words)
    assert "1 of 6 images have no row of scores (first: m2/5.png)" in capsys.readouterr().out
    run("sbs", preferences / "run")
    printed = capsys.readouterr().out
    assert "WARNING: dark is clearly below 50 % on every pair set: is lower better (score --lower dark)" in printed
    assert "WARNING: bright" not in printed
    run(*words, "--lower", "dark")
    run("sbs", preferences / "run")
    assert "WARNING" not in capsys.readouterr().out
    assert (preferences / "run/sbs.md").read_text().count("| 100.00 [") == 2
    run(*words, "--draw", 2)
    # three pairs of methods, and each method with itself once
    assert f"{3 * 2 + 3} of 15 pairs" in capsys.readouterr().out
    with pytest.raises(runs.UserError, match="--lower gloomy: no such column"):
        run(*words, "--lower", "gloomy")
    pd.DataFrame({"image": ["x"], "m": [1]}).to_csv(preferences / "ready.csv", index=False)
    with pytest.raises(runs.UserError, match="has none of the 6 images, such as m0/0.png; it has images such as x"):
        run(*words)


def test_the_best_of_phase_one_are_scored_in_phase_two(preferences, rewards):
    score(preferences)
    run("sbs", preferences / "run")
    run("score", *votes_of(preferences), "--out", preferences / "two", "--phase1", preferences / "run", "--top", 1,
        "--device", "cpu")
    best = next(iter(json.loads((preferences / "run/sbs.json").read_text())["accuracy"][0]))
    assert pd.read_csv(preferences / "two/scores.csv").columns.tolist() == ["image", best]
    run("sbs", preferences / "run", preferences / "two", "--metrics", best)
    with pytest.raises(runs.UserError, match="no sbs.json in it; make it with: python analyze_iqa.py sbs"):
        run("score", *votes_of(preferences), "--out", preferences / "three", "--phase1", preferences / "none")


def test_the_papers_metrics_are_the_default():
    def default(*words):
        return analyze_iqa.default_metrics(analyze_iqa.parse_args(["score", "--out", "x", *words]))
    assert default() == "paq2piq nima musiq liqe arniqa-tid qalign topiq_nr".split()
    pairs = default("--pairs", "p.csv", "--draw", "3")
    assert len(pairs) == 42 and pairs[:7] == default()


def test_quintuplets_and_their_labels(quintuplets, rewards, tmp_path, capsys):
    words = ["score", "--sets", quintuplets, "--out", tmp_path / "run", "--metrics", "test_rewards:brightness",
             "--device", "cpu"]
    message = "none of its 6 quintuplets has a negative, which the paper's analysis needs; --all-sets takes all of them"
    with pytest.raises(runs.UserError, match=message):
        run(*words)
    run(*words, "--all-sets")
    run("hggt", tmp_path / "run")
    printed = capsys.readouterr().out
    assert "6 quintuplets: 5 with a positive, 6 with a similar, 0 with a negative version" in printed
    assert "no quintuplet has a negative: NM" in printed
    result = json.loads((tmp_path / "run/hggt.json").read_text())
    # the brightest version, 02, is similar; the second, 01, is positive in five sets
    ours = result["result"]["similar"]["test_rewards:brightness"]
    assert ours["pm"][0] == pytest.approx(5 / 6) and ours["pm_of_positive"][0] == 1 and ours["nm"][0] == 0
    assert ours["src_undefined"] == 1
    picks = result["picks"]["test_rewards:brightness"]
    assert picks == {"original": 0, "Positive": 0, "Similar": 1, "Negative": 0}
    labels = sorted((quintuplets / "Train/labels/0-6/A").glob("*.json"))
    assert len(pd.read_csv(tmp_path / "run/sets.csv")) == 30 == 5 * len(labels)


# Photographs

def synthetic_photos(out, gt, *candidates):
    """Photos of pairs.csv and sets.csv that `synthetic` writes, as {image of the originals: photo}."""
    run("synthetic", "--candidates", *candidates, "--gt", gt, "--out", out)
    pairs, sets = (pd.read_csv(out / f"{name}.csv", dtype=str) for name in ("pairs", "sets"))
    photos = dict(zip(sets.set, sets.photo))
    names = pairs.left.map(lambda path: Path(path).stem.partition("_")[0])
    assert pairs.photo.tolist() == names.map(photos).tolist()
    return photos


@pytest.mark.parametrize("names", [["trip-2023-01", "trip-2023-02", "trip-2024-01", "other"],
                                   ["IMG-20240101-121501", "IMG-20240101-121502"], ["2023-01-11", "2023-01-12"]])
def test_dates_in_names_of_photographs_group_nothing(tmp_path, names):
    for folder, level in (("gt", 0.5), ("a", 0.6), ("b", 0.8)):
        for name in names:
            save_image(tmp_path / folder / f"{name}.png", torch.full((3, 32, 32), level))
    photos = synthetic_photos(tmp_path / "run", tmp_path / "gt", tmp_path / "a", tmp_path / "b")
    assert photos == {name: name for name in names}


def test_dates_group_nothing_where_votes_name_no_photo(tmp_path):
    names = ["trip-2023-01", "trip-2023-02", "trip-2023-03"]
    for folder, level in (("a", 0.4), ("b", 0.6)):
        for name in names:
            save_image(tmp_path / folder / f"{name}.png", torch.full((3, 32, 32), level))
    votes = pd.DataFrame({"left": [f"a/{name}.png" for name in names], "right": [f"b/{name}.png" for name in names],
                          "score": [0.8, 0.9, 0.7]})
    votes.to_csv(tmp_path / "votes.csv", index=False)
    words = ["score", "--pairs", tmp_path / "votes.csv", "--images", tmp_path, "--out", tmp_path / "run", "--metrics",
             "ranker", "--device", "cpu", "--no-speed"]
    run(*words)
    assert "photo" not in pd.read_csv(tmp_path / "run/pairs.csv")
    run(*words, "--photo-pattern", r"/(trip-\d+)-\d+\.png$")
    assert pd.read_csv(tmp_path / "run/pairs.csv").photo.tolist() == ["trip-2023"] * 3


def test_patches_in_hggts_layout_are_grouped_by_photo(quintuplets, tmp_path):
    images = quintuplets / "Train/images/0-6"
    photos = synthetic_photos(tmp_path / "run", images / "original", images / "01", images / "02")
    assert len(photos) == 6 and set(photos.values()) == {"photo0", "photo1", "photo2"}
    run("score", "--sets", quintuplets, "--all-sets", "--out", tmp_path / "sets", "--metrics", "ranker", "--device",
        "cpu", "--no-speed")
    assert set(pd.read_csv(tmp_path / "sets/sets.csv").photo) == {"photo0", "photo1", "photo2"}


# Interruption and several processes

def test_two_processes_score_what_one_does(preferences, script):
    words = ["score", *votes_of(preferences), "--metrics", "test_rewards:brightness", "ranker", "--device", "cpu",
             "--no-speed"]
    script("analyze_iqa.py", *words, "--out", preferences / "one")
    script("analyze_iqa.py", *words, "--out", preferences / "two", processes=2)
    one, two = (pd.read_csv(preferences / name / "scores.csv", index_col="image") for name in ("one", "two"))
    assert one.index.equals(two.index) and np.allclose(one, two, atol=1e-4)


SLOW_METRIC = '''
import time
def build(device):
    def metric(x):
        time.sleep(0.3)
        return x.mean((1, 2, 3))
    return metric
'''


def test_killed_scoring_continues_without_a_lost_or_doubled_row(preferences):
    (preferences / "slow_metric.py").write_text(SLOW_METRIC)
    command = runs.python("analyze_iqa.py", "score", *votes_of(preferences), "--metrics", "slow_metric:build",
                          "--device", "cpu", "--batch-size", "1", "--no-speed", "--out", preferences / "run")
    environment = os.environ | {"PYTHONPATH": str(preferences)}

    def rows():
        lines = [line for file in (preferences / "run/cache").glob("*.jsonl") for line in file.read_text().splitlines()]
        return [json.loads(line) for line in lines if line.endswith("}")]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(rows()) < 2 and time.time() < deadline:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    begun = rows()
    assert 2 <= len(begun) < 6
    with open(next((preferences / "run/cache").glob("*.jsonl")), "a") as file:
        file.write('{"path": "cut o')
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    paths = [row["path"] for row in rows()]
    assert f"{len(begun)} cached" in done.stderr and rows()[:len(begun)] == begun and len(paths) == len(set(paths))
    scores = pd.read_csv(preferences / "run/scores.csv")
    assert len(rows()) == len(scores) == 6 and scores["slow_metric:build"].notna().all()


# Votes of people

@pytest.mark.skipif(not LABELS.is_dir(), reason="needs ../shared/data/labels")
def test_bapps_says_which_distances_differ(tmp_path):
    files = sorted(LABELS.glob("bapps*.csv"))
    run("bapps", *files, "--out", tmp_path)
    record = json.loads((tmp_path / "bapps.json").read_text())
    assert {m: round(v[0], 4) for m, v in record["2afc"].items()} == {
        "alex_vanilla": 0.7119, "alex_shift_tolerant": 0.7117, "vgg_vanilla": 0.7120, "vgg_shift_tolerant": 0.7107}
    assert len(record["paired"]) == 6 and not any(row["differs"] for row in record["paired"])
    assert all(row["ties"] == 56 for row in record["accuracy"].values())
    lines = files[0].read_text().splitlines()
    (tmp_path / "a_x.csv").write_text("\n".join(lines[:5]))
    (tmp_path / "a_y.csv").write_text("\n".join(lines[1:6]))
    (tmp_path / "a_z.csv").write_text(lines[0].rpartition(",")[0] + ",7\n")
    with pytest.raises(runs.UserError, match="bapps y: other pairs or votes than x"):
        run("bapps", tmp_path / "a_x.csv", tmp_path / "a_y.csv", "--out", tmp_path)
    with pytest.raises(runs.UserError, match=r"line 1 is not name, distance, distance, 2AFC, vote in \[0, 1\]"):
        run("bapps", tmp_path / "a_z.csv", "--out", tmp_path)


# runs a command and prints its processor time (s) and its peak memory (kB)
MEASURE = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], check=True)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print("USED", usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
"""


def measured(*words):
    """-> output of analyze_iqa.py, its processor time in seconds, its peak memory in kB"""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(REPO / "analyze_iqa.py"), *map(str, words)],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    output, _, usage = done.stdout.rpartition("USED")
    return output, *map(float, usage.split())


def test_a_hundred_thousand_pairs(tmp_path):
    """Seven ready metrics: below 10 s of processor time and 1 GB, Python and PyTorch included."""
    rng = np.random.default_rng(0)
    quality = rng.normal(size=20_000)
    names = np.array([f"methods/m{k % 20:02d}/img{k // 20:05d}.png" for k in range(20_000)])
    scores = pd.DataFrame({"image": names, **{f"m{k}": quality + rng.normal(size=20_000) for k in range(7)}})
    scores.to_csv(tmp_path / "scores.csv", index=False)
    keys = rng.choice(20_000 ** 2, 110_000, replace=False)
    left, right = (side[keys // 20_000 < keys % 20_000] for side in (keys // 20_000, keys % 20_000))
    left, right = np.concatenate([left] * 2)[:100_000], np.concatenate([right, (right + 1) % 20_000])[:100_000]
    votes = rng.binomial(5, 1 / (1 + np.exp(quality[left] - quality[right]))) / 5
    pairs = pd.DataFrame({"left": names[left], "right": names[right], "score": votes})
    pairs.to_csv(tmp_path / "pairs.csv", index=False)
    for words in (["score", "--pairs", tmp_path / "pairs.csv", "--scores", tmp_path / "scores.csv", "--out",
                   tmp_path / "run"], ["sbs", tmp_path / "run"]):
        output, seconds, kilobytes = measured(*words)
        assert seconds < 10 and kilobytes < 1e6, (words[0], seconds, kilobytes)
    assert int(re.search(r"run: (\d+) pairs", output)[1]) > 95_000


# The demo and the command line

def test_demo_and_its_claims(tmp_path, script):
    """It makes the demo set where there is none, takes less than two minutes, and always says SYNTHETIC."""
    done = script("analyze_iqa.py", "--demo", cwd=tmp_path, timeout=120)
    out = tmp_path / "runs/analysis-demo"
    assert done.stdout.count("SYNTHETIC, no human judged") >= 6
    for name in ("sbs.md", "hggt.md", "complement.md", "recommend.md"):
        text = (out / name).read_text()
        assert text.startswith("Preferences: SYNTHETIC, no human judged") and "paper" not in text, name
    scores, pairs = pd.read_csv(out / "scores.csv", index_col="image"), pd.read_csv(out / "pairs.csv")
    # PIQE has no gradient
    assert len(scores) == 40 and json.loads((out / "recommend.json").read_text())["train"] == "ranker"
    # 8 patches of two photographs
    assert set(pairs.photo) == {"chelsea", "coffee"}

    def psnr(path):
        untouched = analyze_iqa.DEMO / "untouched" / re.sub(r"(_\d\d)?\.png$", ".png", Path(path).name)
        return metrics.psnr(*(load_image(tmp_path / p)[None].float() / 255 for p in (path, untouched))).item()
    for pair in pairs.sample(5, random_state=0).itertuples():
        delta = psnr(pair.right) - psnr(pair.left)
        assert pair.score == (0.5 if abs(delta) <= 0.05 else float(delta > 0))


@pytest.mark.fast
def test_help_is_quick():
    for words in (["--help"], ["score", "--help"]):
        output, seconds, _ = measured(*words)
        assert "usage: analyze_iqa.py" in output and seconds < 0.5


@pytest.mark.fast
def test_help_names_the_commands(script):
    text = script("analyze_iqa.py", "--help").stdout
    for command in ("score", "sbs", "complement", "hggt", "recommend", "disagree", "bapps", "synthetic"):
        assert command in text
    assert "(default: 7)" in script("analyze_iqa.py", "score", "--help").stdout


@pytest.mark.fast
def test_bad_words_end_in_one_line(tmp_path, script):
    out = ["--out", tmp_path / "x"]
    for words, message in (
            (["sbs", tmp_path], "no scores.csv in it; make it with: python analyze_iqa.py score --out"),
            (["score", *out], "has neither pairs.csv nor sets.csv"),
            (["score", *out, "--pairs", tmp_path / "no.csv"], "no such file"),
            ([], "give a COMMAND, or --demo"),
            (["score", *out, "--pairs", "a", "--sets", "b"], "--pairs or --sets"),
            (["score", *out, "--lower", "niqe"], "--lower is for ready --scores"),
            (["score", *out, "--pairs", "a", "--scores", "b", "--metrics", "niqe"], "--scores takes ready ones"),
            (["score", *out, "--sets", "a", "--draw", 3], "--draw is for --pairs")):
        done = script("analyze_iqa.py", *words, check=False)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "x").exists()


# What may be claimed

def test_synthetic_preferences_stay_synthetic(preferences, quintuplets, rewards, tmp_path):
    images, made, copy = quintuplets / "Train/images/0-6", preferences / "made", tmp_path / "copy"
    run("synthetic", "--candidates", images / "01", images / "02", images / "original", "--gt", images / "original",
        "--out", made)
    with pytest.raises(runs.UserError, match="--paper train: these preferences are synthetic"):
        run("score", "--out", made, "--metrics", "test_rewards:brightness", "--paper", "train")
    run("score", "--pairs", made / "pairs.csv", "--out", copy, "--metrics", "test_rewards:brightness")
    run("sbs", copy)
    for name in ("sbs.md", "sbs.tex", "sbs-copy.csv"):
        assert "SYNTHETIC, no human judged" in (copy / name).read_text(), name
    with pytest.raises(runs.UserError, match="two runs are called copy"):
        run("sbs", copy, copy)


def test_the_papers_values_stand_only_where_asked_for(quintuplets, rewards, tmp_path):
    sets = tmp_path / "sets"
    words = ["score", "--sets", quintuplets, "--all-sets", "--out", sets, "--device", "cpu"]
    run(*words, "--metrics", "ranker")
    run("hggt", sets)
    assert "paper" not in (sets / "hggt.md").read_text()
    run(*words, "--metrics", "test_rewards:brightness", "--paper", "hggt", "--no-speed")
    run("hggt", sets)
    assert "paper: SRC / PM / NM" in (sets / "hggt.md").read_text()
    # metrics of the earlier call stay, and so does this
    assert list(pd.read_csv(sets / "scores.csv")) == ["image", "test_rewards:brightness", "ranker"]
    run(*words, "--metrics", "ranker", "--no-speed")
    assert json.loads((sets / "about.json").read_text())["paper"] == "hggt"
    run("disagree", sets, "--metrics", "test_rewards:brightness", "ranker", "--side", 64)
    assert (sets / "disagree-test_rewards_brightness-ranker.png").exists()
    with pytest.raises(runs.UserError, match="holds sets.csv: name another --out for --pairs"):
        run("score", "--pairs", sets / "pairs.csv", "--out", sets, "--metrics", "ranker")


def test_names_that_look_like_numbers(preferences):
    pairs = pd.DataFrame({"left": ["0001", "0002"], "right": ["0002", "0003"], "score": [1.0, 0.0]})
    pairs.to_csv(preferences / "n.csv", index=False)
    scores = pd.DataFrame({"image": ["0001", "0002", "0003"], "m": [1, 2, 3]})
    scores.to_csv(preferences / "s.csv", index=False)
    run("score", "--pairs", preferences / "n.csv", "--scores", preferences / "s.csv", "--out", preferences / "r")
    run("sbs", preferences / "r")
    accuracy = json.loads((preferences / "r/sbs.json").read_text())["accuracy"][0]["m"]
    assert accuracy == pytest.approx({"n": 2, "accuracy": 0.5, "low": 0.0945, "high": 0.9055, "ties": 0}, abs=1e-4)
