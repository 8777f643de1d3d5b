"""experiment.py: its statistics, its rule for the shrink factor, its queue, and one whole experiment in small."""
import json
import multiprocessing
import os
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

import archs
import data
import evaluate
import experiment
import make_quintuplets
import runs
import train


@pytest.mark.fast
def test_a_difference_needs_a_clear_interval_and_every_seed():
    rng = np.random.default_rng(0)
    b = rng.normal(0, 5, (3, 17))
    clear = experiment.difference(b + 1 + rng.normal(0, 0.2, (3, 17)), b)
    assert clear["verdict"] == "higher" and clear["low"] < clear["mean"] < clear["high"] and 0.8 < clear["low"] and clear["high"] < 1.2
    delta = (b + 1) - b
    assert experiment.difference(-b - 1, -b)["verdict"] == "lower" and experiment.difference(b + 1, b)["mean"] == pytest.approx(delta.mean())
    one_seed_against = b + np.array([2.0, 2.0, -0.1])[:, None] + rng.normal(0, 0.01, (3, 17))
    against = experiment.difference(one_seed_against, b)
    assert against["low"] > 0 and against["verdict"] == "no evidence"
    assert experiment.difference(b, b) == {"mean": 0, "low": 0, "high": 0, "seeds": [0, 0, 0], "verdict": "no evidence"}
    few_images = b + np.where(np.arange(17) < 2, 30.0, -1.0)
    assert experiment.difference(few_images, b)["verdict"] == "no evidence"


@pytest.mark.fast
def test_interval_agrees_with_students_for_normal_differences():
    from scipy import stats
    delta = np.random.default_rng(1).normal(0.3, 1, 40)
    ours = experiment.difference(np.stack([delta] * 2), np.zeros((2, 40)))
    theirs = stats.ttest_1samp(delta, 0).confidence_interval()
    assert (ours["low"], ours["high"]) == pytest.approx((theirs.low, theirs.high), abs=0.06)


@pytest.mark.fast
def test_the_shrink_factor_is_the_most_faithful_of_the_good_ones():
    row = lambda f, share, psnr: {"shrink": f, "any_unseen": share, "psnr_mean": psnr}
    rows = [row(0.25, 0.80, 24), row(0.375, 0.78, 27), row(0.5, 0.76, 29), row(0.75, 0.60, 33)]
    assert experiment.best_shrink(rows) == 0.5                                    # .75 is more faithful, but .20 worse
    assert experiment.best_shrink(rows + [row(0.5, 0.50, 29)]) == 0.375           # mean over both sharpnesses


@pytest.mark.fast
def test_shares_are_per_photo_and_scores_higher_is_better():
    s = lambda o, a, b: {"original": {"m": o, "psnr": 100}, "01": {"m": a, "psnr": 30}, "02": {"m": b, "psnr": 20}}
    scores = {"a-0-0": s(1, 2, 0), "a-0-9": s(1, 0, 0), "a-9-0": s(1, 0, 0), "b-0-0": s(1, 0, 2)}
    result = experiment.summarise(scores, ["01", "02"], {"m": None}, ["m"])
    assert result["photos"] == 2 and result["version"]["m"] == {"01": pytest.approx(1 / 6), "02": 0.5}
    assert result["any"]["m"] == result["any_unseen"] == pytest.approx((1 / 3 + 1) / 2) and result["psnr_mean"] == 25


@pytest.mark.fast
def test_plan_has_every_sampler_seed_by_seed():
    args = experiment.parse_args(["--seeds", "0", "1", "2"])
    names = list(experiment.plan(args))
    assert len(names) == 18 and names[:6] == ["orig-0", "rand-0", "sma-cnniqa_live-0", "amo-cnniqa_live-0", "sma-ranker-0", "amo-ranker-0"]
    flags = experiment.plan(args)
    assert flags["amo-ranker-2"] == ["--sampler", "amo", "--reward", "ranker", "--seed", 2] and "none" in flags["rand-1"]


@pytest.mark.fast
def test_a_failed_job_is_named_and_stops_the_queue(tmp_path):
    with pytest.raises(ValueError, match=r"evaluate.py ended with 2: .*.*/nowhere: no such folder.*all of it in .*a.log"):
        experiment.call(tmp_path / "a.log", "evaluate.py", "--lq", "/nowhere", "--metrics", "ranker")
    begun = []

    def job(k):
        begun.append(k)
        if k == 1:
            raise RuntimeError("no")
        time.sleep(0.05)
    with pytest.raises(RuntimeError, match="no"):
        experiment.parallel(1, [partial(job, k) for k in range(50)])
    assert begun[:2] == [0, 1] and len(begun) < 10


def in_fork(module, words):
    torch.set_num_threads(1)
    module.main(module.parse_args([*words, "--threads", "1"]))
    os._exit(0)                                                                   # not through pytest's own ending


def test_a_whole_experiment_in_small(tmp_path, vgg_file, monkeypatch):
    """Real scripts from photographs to tables, two steps a run; a second call repeats nothing."""
    real = experiment.call

    def call(log, script, *words, processes=1):                                   # a fork need not import torch again: a third of the time
        if processes > 1:
            return real(log, script, *words, processes=processes)
        log.parent.mkdir(parents=True, exist_ok=True)
        child = multiprocessing.get_context("fork").Process(target=in_fork, args=(sys.modules[script.removesuffix(".py")], list(map(str, words))))
        child.start()
        child.join()
        assert child.exitcode == 0, script
    monkeypatch.setattr(experiment, "call", call)
    from skimage import data as photos
    for k, name in enumerate(("astronaut", "coffee")):
        image = torch.from_numpy(getattr(photos, name)()[64:256, 128:320].copy()).permute(2, 0, 1)
        data.save_image(tmp_path / "photos" / f"{name}.png", image)
        data.save_image(tmp_path / "test" / f"{name}.png", image[:, :130, :150])
    for k, seed in enumerate((1, 2)):
        torch.manual_seed(seed)
        runs.save_weights(tmp_path / f"enhancer{k}.pth", archs.ARCHS["compact-small"]().state_dict())
    replace = {"--arch": "compact-small", "--total-steps": "2", "--batch-size": "2", "--group-size": "2", "--pool-size": "4", "--crop": "64",
               "--load-size": "64", "--d-features": "4"}
    monkeypatch.setattr(experiment, "TRAIN", [replace.get(before, word) for before, word in zip([""] + experiment.TRAIN, experiment.TRAIN)])
    monkeypatch.setattr(experiment, "QUINTUPLETS", "--soften 1 --patch 96 --step 96 --min-std 0 --min-laplacian 0".split())
    monkeypatch.setattr(experiment, "SHRINKS", (0.25, 0.5))
    monkeypatch.setattr(experiment, "SOFTENED", ((1, 1, 96),))
    args = experiment.parse_args(["shrink", "data", "runs", "report", "--photos", str(tmp_path / "photos"), "--test-photos", str(tmp_path / "test"), "--enhancers",
                                  str(tmp_path / "enhancer0.pth"), str(tmp_path / "enhancer1.pth"), "--init", str(tmp_path / "enhancer0.pth"),
                                  "--rewards", "ranker", "--unseen", "piqe", "--slow", "piqe", "--seeds", "1", "--figure", "test_coffee", "--vgg-weights", str(vgg_file),
                                  "--work", str(tmp_path / "work"), "--results", str(tmp_path / "out" / "exp")])
    experiment.main(args)
    out = tmp_path / "out"
    summary = json.loads((out / "exp.json").read_text())
    assert list(summary["mean"]) == ["bicubic", "reference", "start", "orig", "rand", "sma-ranker", "amo-ranker"]
    assert summary["picked"]["orig"]["original"] == 1 and summary["images"] == 2 and set(summary["lower_is_better"]) == set(summary["metrics"])
    first = json.loads((out / "exp" / "amo-ranker-1.json").read_text())
    assert sum(first["picked"].values()) == 4 and first["train"][-1] == "1"
    assert summary["mean"]["amo-ranker"][0] == pytest.approx(np.mean([s["ranker"] for s in first["scores"].values()]))
    picks = json.loads((out / "exp-picks.json").read_text())["rewards"]["ranker"]
    assert all(sum(shares.values()) == pytest.approx(1) for shares in picks.values())
    assert [row["shrink"] for row in json.loads((out / "exp-shrink.json").read_text())["rows"]] == [0.25, 0.5]
    assert data.load_image(out / "exp.png").shape[2] == 5 * 256 + 4 * 4 and {evaluate, make_quintuplets, train} <= set(sys.modules.values())
    monkeypatch.setattr(experiment, "call", lambda log, script, *words, **more: script == "make_quintuplets.py" or pytest.fail(f"{script} again"))
    experiment.main(args)
    assert json.loads((out / "exp.json").read_text())["mean"] == summary["mean"]
    args.train += ["--lr", "1"]
    with pytest.raises(ValueError, match="exp-settings.json: these results were made with other train: choose"):
        experiment.main(args)
