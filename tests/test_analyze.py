"""analyze_iqa.py and analyses.py through the command line: real images, real and hand-made metrics, every analysis, what is refused or left out."""
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
from images import load_image, save_image

REPO = Path(__file__).resolve().parents[1]
LABELS = REPO.parent / "shared" / "data" / "labels"


def run(*words):
    analyze_iqa.main(analyze_iqa.parse_args([str(word) for word in words]))


@pytest.fixture
def preferences(tmp_path):
    """Six images of rising brightness; people mostly prefer the brighter one."""
    for k in range(6):
        save_image(tmp_path / "images" / f"m{k % 3}" / f"{k}.png", torch.full((3, 64, 64 + 8 * (k % 2)), 0.1 + 0.05 * k))
    names = [f"m{k % 3}/{k}.png" for k in range(6)]
    rows = [(names[i], names[j], 0.9 if (i + j) % 4 else 0.5 if j == 5 else 0.2) for i in range(6) for j in range(i + 1, 6)]
    pd.DataFrame(rows, columns=["first", "second", "vote"]).to_csv(tmp_path / "votes.csv", index=False)
    return tmp_path


ARGS = ["--columns", "left=first,right=second,score=vote"]


def score(folder, *words, metrics=("test_rewards:brightness", "ranker")):
    run("score", "--pairs", folder / "votes.csv", *ARGS, "--images", folder / "images", "--out", folder / "run", "--metrics", *metrics, "--device", "cpu", *words)


def test_pairs_from_images_to_tables(preferences, rewards, capsys):
    score(preferences)
    said = capsys.readouterr().out
    assert "understood: 90% of people prefer m1/1.png to m0/0.png" in said and "nothing was left out" in said
    scores = pd.read_csv(preferences / "run/scores.csv", index_col="image")
    assert scores["test_rewards:brightness"].to_numpy() == pytest.approx([100 * load_image(preferences / "images" / name).float().mean().item() / 255 for name in scores.index], abs=1e-3)
    votes = pd.read_csv(preferences / "votes.csv")
    consensus = votes[votes.vote != 0.5]
    run("sbs", preferences / "run")
    result = json.loads((preferences / "run/sbs.json").read_text())["accuracy"][0]["test_rewards:brightness"]
    assert result["n"] == len(consensus) < len(votes) and result["accuracy"] == pytest.approx((consensus.vote > 0.5).mean())
    ours = capsys.readouterr().out
    assert f"{len(votes)} pairs, {len(consensus)} with a consensus" in ours and f"| {100 * (consensus.vote > 0.5).sum() / len(votes):.2f} |" in ours
    for name in ("sbs.md", "sbs.tex", "sbs-run.csv", "sbs-run-paired.csv", "sbs-run.png"):
        assert (preferences / "run" / name).stat().st_size > 100
    run("complement", preferences / "run", "--fails", "ranker")
    run("disagree", preferences / "run", "--metrics", "test_rewards:brightness", "ranker", "--images", preferences / "images", "--side", 64)
    assert (preferences / "run/disagree-test_rewards_brightness-ranker.png").exists()
    run("recommend", preferences / "run")
    advice = json.loads((preferences / "run/recommend.json").read_text())
    assert advice["train"] == "test_rewards:brightness" and advice["keep"] == [] and advice["table"]["ranker"]["backward"] > 0      # ranker is right in 21 %
    with pytest.raises(ValueError, match="--fails musiq: not scored; choose one of test_rewards:brightness, ranker"):
        run("complement", preferences / "run")
    with pytest.raises(ValueError, match="no sets.csv in it"):
        run("hggt", preferences / "run")


ODD = '''
import torch
def build(device):
    def metric(x):
        if (x.mean() - 0.2).abs() < 0.01:
            raise RuntimeError("cannot judge this one")
        return torch.where((x.mean((1, 2, 3)) - 0.9).abs() < 0.01, torch.nan, x.mean((1, 2, 3)))
    return metric
'''


def test_what_cannot_be_scored_is_named_and_left_out(preferences, monkeypatch, capsys):
    (preferences / "odd_metric.py").write_text(ODD)
    monkeypatch.syspath_prepend(preferences)
    (preferences / "images/m0/0.png").unlink()
    (preferences / "images/m1/1.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    save_image(preferences / "images/m2/5.png", torch.full((3, 64, 64), 0.9))
    score(preferences, "--keep-going", metrics=("odd_metric:build", "ranker", "musiq-nonsense"))
    said = capsys.readouterr().out
    assert "odd_metric:build: 4 of 6 images have no score" in said and "ranker: 2 of 6 images have no score" in said and "metric musiq-nonsense left out: --metrics musiq-nonsense: this is unknown" in said
    run("sbs", preferences / "run")
    result = json.loads((preferences / "run/sbs.json").read_text())
    assert result["accuracy"][0]["ranker"]["n"] < 15 and "ranker: 2 of 6 images" in capsys.readouterr().out and len(result["left_out"][0]) == 3
    with pytest.raises(ValueError, match=r"musiq-nonsense.*\(--keep-going leaves such a metric out; scores so far are kept\)"):
        score(preferences, metrics=("ranker", "musiq-nonsense"))
    for path in (preferences / "images").glob("*/*.png"):
        save_image(path, torch.full((3, 64, 64), 0.9))
    with pytest.raises(ValueError, match="odd_metric:build: fails on every image, first: no such image .--keep-going"):
        score(preferences, metrics=["odd_metric:build"])
    with pytest.raises(ValueError, match="--images .*: none of the 6 images is in it, for example "):
        run("score", "--pairs", preferences / "votes.csv", *ARGS, "--images", preferences, "--out", preferences / "run", "--metrics", "ranker")


def test_ready_scores_and_the_warning_about_direction(preferences, capsys):
    names = [f"m{k % 3}/{k}.png" for k in range(5)]
    pd.DataFrame({"image": names, "dark": [-k for k in range(5)], "bright": range(5)}).to_csv(preferences / "ready.csv", index=False)
    votes = pd.read_csv(preferences / "votes.csv").assign(vote=0.9)
    pd.concat([votes] * 1).to_csv(preferences / "votes.csv", index=False)
    words = ["score", "--pairs", preferences / "votes.csv", *ARGS, "--scores", preferences / "ready.csv", "--out", preferences / "run", "--method-pattern", "^(m.)/"]
    run(*words)
    assert "1 of 6 images have no row of scores (first: m2/5.png)" in capsys.readouterr().out
    run("sbs", preferences / "run")
    said = capsys.readouterr().out
    assert "WARNING: dark is clearly below 50 % on every pair set: is lower better (score --lower dark)" in said and "WARNING: bright" not in said
    run(*words, "--lower", "dark")
    run("sbs", preferences / "run")
    said = capsys.readouterr().out
    assert "WARNING" not in said and said.count("| 100.00 [") == 2
    run(*words, "--draw", 2)
    assert f"{3 * 2 + 3} of 15 pairs" in capsys.readouterr().out                  # three pairs of methods, and each with itself once
    with pytest.raises(ValueError, match="--lower gloomy: no such column"):
        run(*words, "--lower", "gloomy")
    pd.DataFrame({"image": ["x"], "m": [1]}).to_csv(preferences / "ready.csv", index=False)
    with pytest.raises(ValueError, match="has none of the 6 images, such as m0/0.png; it has images such as x"):
        run(*words)


def test_the_best_of_phase_one_are_scored_in_phase_two(preferences, rewards):
    score(preferences)
    run("sbs", preferences / "run")
    run("score", "--pairs", preferences / "votes.csv", *ARGS, "--images", preferences / "images", "--out", preferences / "two", "--phase1", preferences / "run", "--top", 1, "--device", "cpu")
    best = next(iter(json.loads((preferences / "run/sbs.json").read_text())["accuracy"][0]))
    assert pd.read_csv(preferences / "two/scores.csv").columns.tolist() == ["image", best]
    run("sbs", preferences / "run", preferences / "two", "--metrics", best)
    with pytest.raises(ValueError, match="no sbs.json in it; make it with: python analyze_iqa.py sbs"):
        run("score", "--pairs", preferences / "votes.csv", *ARGS, "--out", preferences / "three", "--phase1", preferences / "none")


def test_quintuplets_and_their_labels(quintuplets, rewards, tmp_path, capsys):
    words = ["score", "--sets", quintuplets, "--out", tmp_path / "run", "--metrics", "test_rewards:brightness", "--device", "cpu"]
    with pytest.raises(ValueError, match="none of its 6 quintuplets has a negative, which the paper's analysis needs; --all-sets takes all of them"):
        run(*words)
    run(*words, "--all-sets")
    run("hggt", tmp_path / "run")
    said = capsys.readouterr().out
    assert "6 quintuplets: 5 with a positive, 6 with a similar, 0 with a negative version" in said and "no quintuplet has a negative: NM" in said
    result = json.loads((tmp_path / "run/hggt.json").read_text())
    ours = result["result"]["similar"]["test_rewards:brightness"]                 # the brightest, 02, is similar; 01, second, is positive in five sets
    assert ours["pm"][0] == pytest.approx(5 / 6) and ours["pm_of_positive"][0] == 1 and ours["nm"][0] == 0 and ours["src_undefined"] == 1
    assert result["picks"]["test_rewards:brightness"] == {"original": 0, "Positive": 0, "Similar": 1, "Negative": 0}
    labels = sorted((quintuplets / "Train/labels/0-6/A").glob("*.json"))
    assert len(pd.read_csv(tmp_path / "run/sets.csv")) == 30 == 5 * len(labels)


def test_two_processes_score_what_one_does(preferences, script):
    words = ["score", "--pairs", preferences / "votes.csv", *ARGS, "--images", preferences / "images", "--metrics", "test_rewards:brightness", "ranker", "--device", "cpu", "--no-speed"]
    script("analyze_iqa.py", *words, "--out", preferences / "one")
    script("analyze_iqa.py", *words, "--out", preferences / "two", processes=2)
    one, two = (pd.read_csv(preferences / name / "scores.csv", index_col="image") for name in ("one", "two"))
    assert one.index.equals(two.index) and np.allclose(one, two, atol=1e-4)


SLOW = '''
import time
def build(device):
    def metric(x):
        time.sleep(0.3)
        return x.mean((1, 2, 3))
    return metric
'''


def test_killed_scoring_continues_without_a_lost_or_doubled_row(preferences):
    (preferences / "slow_metric.py").write_text(SLOW)
    command = [sys.executable, REPO / "analyze_iqa.py", "score", "--pairs", preferences / "votes.csv", *ARGS, "--images", preferences / "images", "--metrics", "slow_metric:build",
               "--device", "cpu", "--batch-size", "1", "--no-speed", "--out", preferences / "run"]
    environment = os.environ | {"PYTHONPATH": str(preferences)}
    rows = lambda: [json.loads(line) for file in (preferences / "run/cache").glob("*.jsonl") for line in file.read_text().splitlines() if line.endswith("}")]
    child = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(rows()) < 2 and time.time() < deadline:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    begun = rows()
    assert 2 <= len(begun) < 6
    with open(next((preferences / "run/cache").glob("*.jsonl")), "a") as file:
        file.write('{"path": "cut o')
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(begun)} cached" in done.stderr and rows()[:len(begun)] == begun and sorted(row["path"] for row in rows()) == sorted({row["path"] for row in rows()})
    scores = pd.read_csv(preferences / "run/scores.csv")
    assert len(rows()) == len(scores) == 6 and scores["slow_metric:build"].notna().all()


@pytest.mark.skipif(not LABELS.is_dir(), reason="needs ../shared/data/labels")
def test_bapps_says_which_distances_differ(tmp_path, capsys):
    run("bapps", *sorted(LABELS.glob("bapps*.csv")), "--out", tmp_path)
    record = json.loads((tmp_path / "bapps.json").read_text())
    assert {m: round(v[0], 4) for m, v in record["2afc"].items()} == {"alex_vanilla": 0.7119, "alex_shift_tolerant": 0.7117, "vgg_vanilla": 0.7120, "vgg_shift_tolerant": 0.7107}
    assert len(record["paired"]) == 6 and all(row["ties"] == 56 for row in record["accuracy"].values()) and not any(row["differs"] for row in record["paired"])
    lines = sorted(LABELS.glob("bapps*.csv"))[0].read_text().splitlines()
    (tmp_path / "a_x.csv").write_text("\n".join(lines[:5]))
    (tmp_path / "a_y.csv").write_text("\n".join(lines[1:6]))
    (tmp_path / "a_z.csv").write_text(lines[0].rpartition(",")[0] + ",7\n")
    with pytest.raises(ValueError, match="bapps y: other pairs or votes than x"):
        run("bapps", tmp_path / "a_x.csv", tmp_path / "a_y.csv", "--out", tmp_path)
    with pytest.raises(ValueError, match=r"line 1 is not name, distance, distance, 2AFC, vote in \[0, 1\]"):
        run("bapps", tmp_path / "a_z.csv", "--out", tmp_path)


def test_a_hundred_thousand_pairs(tmp_path):
    """Seven ready metrics: below 10 s of processor time and 1 GB, Python and PyTorch included."""
    rng = np.random.default_rng(0)
    quality = rng.normal(size=20_000)
    names = np.array([f"methods/m{k % 20:02d}/img{k // 20:05d}.png" for k in range(20_000)])
    pd.DataFrame({"image": names, **{f"m{k}": quality + rng.normal(size=20_000) for k in range(7)}}).to_csv(tmp_path / "scores.csv", index=False)
    keys = rng.choice(20_000 ** 2, 110_000, replace=False)
    left, right = (side[keys // 20_000 < keys % 20_000] for side in (keys // 20_000, keys % 20_000))
    left, right = np.concatenate([left] * 2)[:100_000], np.concatenate([right, (right + 1) % 20_000])[:100_000]
    pd.DataFrame({"left": names[left], "right": names[right], "score": rng.binomial(5, 1 / (1 + np.exp(quality[left] - quality[right]))) / 5}).to_csv(tmp_path / "pairs.csv", index=False)
    measured = "import resource, subprocess, sys; c = subprocess.run([sys.executable, *sys.argv[1:]], check=True); u = resource.getrusage(resource.RUSAGE_CHILDREN); print('USED', u.ru_utime + u.ru_stime, u.ru_maxrss)"
    for words in (["score", "--pairs", tmp_path / "pairs.csv", "--scores", tmp_path / "scores.csv", "--out", tmp_path / "run"], ["sbs", tmp_path / "run"]):
        done = subprocess.run([sys.executable, "-c", measured, str(REPO / "analyze_iqa.py"), *map(str, words)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        seconds, kilobytes = map(float, done.stdout.split("USED")[1].split())
        assert seconds < 10 and kilobytes < 1e6, (words[0], seconds, kilobytes)
    assert int(re.search(r"run: (\d+) pairs", done.stdout)[1]) > 95_000


def test_demo_and_what_it_may_not_claim(tmp_path, script):
    done = script("analyze_iqa.py", "--demo", cwd=tmp_path, timeout=600)
    out = tmp_path / "runs/analysis-demo"
    assert done.stdout.count("SYNTHETIC, no human judged") >= 6
    for name in ("sbs.md", "hggt.md", "complement.md", "recommend.md"):
        text = (out / name).read_text()
        assert text.startswith("Preferences: SYNTHETIC, no human judged") and "paper" not in text, name
    scores = pd.read_csv(out / "scores.csv", index_col="image")
    assert len(scores) == 40 and json.loads((out / "recommend.json").read_text())["train"] == "ranker"      # PIQE has no gradient
    pairs = pd.read_csv(out / "pairs.csv")
    import metrics as quality
    near = lambda path: quality.psnr(*(load_image(tmp_path / p)[None].float() / 255 for p in (path, Path("datasets/demo/Test/GT/demo/untouched") / re.sub(r"(_\d\d)?\.png$", ".png", Path(path).name)))).item()
    for pair in pairs.sample(5, random_state=0).itertuples():
        delta = near(pair.right) - near(pair.left)
        assert pair.score == (0.5 if abs(delta) <= 0.05 else float(delta > 0))


@pytest.mark.fast
def test_help_names_the_commands_and_bad_words_end_in_one_line(tmp_path, script):
    for words, message in ((["sbs", tmp_path], "no scores.csv in it; make it with: python analyze_iqa.py score --out"), (["score", "--out", tmp_path / "x"], "has neither pairs.csv nor sets.csv"),
                           (["score", "--out", tmp_path / "x", "--pairs", tmp_path / "no.csv"], "no such file"), ([], "give a COMMAND, or --demo"),
                           (["score", "--out", tmp_path / "x", "--pairs", "a", "--sets", "b"], "--pairs or --sets"), (["score", "--out", tmp_path / "x", "--lower", "niqe"], "--lower is for ready --scores")):
        done = script("analyze_iqa.py", *words, check=False)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "x").exists()
    for command in ("score", "sbs", "complement", "hggt", "recommend", "disagree", "bapps", "synthetic"):
        assert command in script("analyze_iqa.py", "--help").stdout
        if command == "score":
            assert "(default: 7)" in script("analyze_iqa.py", command, "--help").stdout


def test_synthetic_stays_synthetic_and_the_papers_values_stay_where_they_belong(preferences, quintuplets, rewards, tmp_path):
    made = preferences / "made"
    run("synthetic", "--candidates", *(sorted((quintuplets / "Train/images/0-6").glob("0[12]"))), quintuplets / "Train/images/0-6/original", "--gt", quintuplets / "Train/images/0-6/original", "--out", made)
    with pytest.raises(ValueError, match="--paper train: these preferences are synthetic"):
        run("score", "--out", made, "--metrics", "test_rewards:brightness", "--paper", "train")
    run("score", "--pairs", made / "pairs.csv", "--out", tmp_path / "copy", "--metrics", "test_rewards:brightness", "--device", "cpu")
    run("sbs", tmp_path / "copy")
    for name in ("sbs.md", "sbs.tex", "sbs-copy.csv"):
        assert "SYNTHETIC, no human judged" in (tmp_path / "copy" / name).read_text(), name
    run("score", "--sets", quintuplets, "--all-sets", "--out", tmp_path / "sets", "--metrics", "ranker", "--device", "cpu")
    run("hggt", tmp_path / "sets")
    assert "paper" not in (tmp_path / "sets/hggt.md").read_text()
    run("score", "--sets", quintuplets, "--all-sets", "--out", tmp_path / "sets", "--metrics", "test_rewards:brightness", "--paper", "hggt", "--device", "cpu", "--no-speed")
    run("hggt", tmp_path / "sets")
    assert "paper: SRC / PM / NM" in (tmp_path / "sets/hggt.md").read_text()
    assert list(pd.read_csv(tmp_path / "sets/scores.csv")) == ["image", "test_rewards:brightness", "ranker"]                     # what was scored before stays
    run("disagree", tmp_path / "sets", "--metrics", "test_rewards:brightness", "ranker", "--side", 64)
    assert (tmp_path / "sets/disagree-test_rewards_brightness-ranker.png").exists()
    with pytest.raises(ValueError, match="holds sets.csv: name another --out for --pairs"):
        run("score", "--pairs", made / "pairs.csv", "--out", tmp_path / "sets", "--metrics", "ranker")
    with pytest.raises(ValueError, match="two runs are called copy"):
        run("sbs", tmp_path / "copy", tmp_path / "copy")


def test_names_that_look_like_numbers(preferences):
    pd.DataFrame({"left": ["0001", "0002"], "right": ["0002", "0003"], "score": [1.0, 0.0]}).to_csv(preferences / "n.csv", index=False)
    pd.DataFrame({"image": ["0001", "0002", "0003"], "m": [1, 2, 3]}).to_csv(preferences / "s.csv", index=False)
    run("score", "--pairs", preferences / "n.csv", "--scores", preferences / "s.csv", "--out", preferences / "r")
    run("sbs", preferences / "r")
    assert json.loads((preferences / "r/sbs.json").read_text())["accuracy"][0]["m"] == pytest.approx({"n": 2, "accuracy": 0.5, "low": 0.0945, "high": 0.9055, "ties": 0}, abs=1e-4)
