"""experiments/samplers.py and lora_tuning.py: statistics, the rule for the shrink factor, the queue, both in small."""
import argparse
import json
import time
from functools import partial

import numpy as np
import pytest
import torch

import archs
import runs
from experiments import jobs, lora_tuning, samplers
from experiments.sampler_report import label
from images import load_image, save_image
from report import tables


@pytest.mark.fast
def test_a_difference_needs_a_clear_interval_and_every_seed():
    rng = np.random.default_rng(0)
    b = rng.normal(0, 5, (3, 17))
    clear = tables.difference(b + 1 + rng.normal(0, 0.2, (3, 17)), b)
    assert clear["verdict"] == "higher" and 0.8 < clear["low"] < clear["mean"] < clear["high"] < 1.2
    assert tables.difference(-b - 1, -b)["verdict"] == "lower"
    assert tables.difference(b + 1, b)["mean"] == pytest.approx(1)
    one_seed_against = b + np.array([2.0, 2.0, -0.1])[:, None] + rng.normal(0, 0.01, (3, 17))
    against = tables.difference(one_seed_against, b)
    assert against["low"] > 0 and against["verdict"] == "no evidence"
    assert tables.difference(b, b) == {"mean": 0, "low": 0, "high": 0, "seeds": [0, 0, 0], "verdict": "no evidence"}
    few_images = b + np.where(np.arange(17) < 2, 30.0, -1.0)
    assert tables.difference(few_images, b)["verdict"] == "no evidence"


@pytest.mark.fast
def test_interval_agrees_with_students_for_normal_differences():
    from scipy import stats
    delta = np.random.default_rng(1).normal(0.3, 1, 40)
    ours = tables.difference(np.stack([delta] * 2), np.zeros((2, 40)))
    student = stats.ttest_1samp(delta, 0).confidence_interval()
    assert (ours["low"], ours["high"]) == pytest.approx((student.low, student.high), abs=0.06)


@pytest.mark.fast
def test_the_shrink_factor_is_the_most_faithful_of_the_good_ones():
    def row(factor, share, psnr):
        return {"shrink": factor, "any_unseen": share, "psnr_mean": psnr}
    rows = [row(0.25, 0.80, 24), row(0.375, 0.78, 27), row(0.5, 0.76, 29), row(0.75, 0.60, 33)]
    # 0.75 is more faithful, but 0.20 worse
    assert samplers.best_shrink(rows) == 0.5
    # mean over both sharpnesses
    assert samplers.best_shrink(rows + [row(0.5, 0.50, 29)]) == 0.375


@pytest.mark.fast
def test_shares_are_per_photo_and_scores_higher_is_better():
    def score(original, a, b):
        return {"original": {"m": original, "psnr": 100}, "01": {"m": a, "psnr": 30}, "02": {"m": b, "psnr": 20}}
    scores = {"a-0-0": score(1, 2, 0), "a-0-9": score(1, 0, 0), "a-9-0": score(1, 0, 0), "b-0-0": score(1, 0, 2)}
    result = samplers.summarise(scores, ["01", "02"], ["m"], ["m"])
    assert result["photos"] == 2 and result["version"]["m"] == {"01": pytest.approx(1 / 6), "02": 0.5}
    assert result["any"]["m"] == result["any_unseen"] == pytest.approx((1 / 3 + 1) / 2)
    assert result["psnr"] == {"01": 30, "02": 20} and result["psnr_mean"] == 25


@pytest.mark.fast
def test_plan_has_every_sampler_seed_by_seed():
    flags = samplers.plan(samplers.parse_args(["--seeds", "0", "1", "2"]))
    names = list(flags)
    assert len(names) == 18 and names[:6] == ["orig-0", "rand-0", "sma-cnniqa-0", "amo-cnniqa-0", "sma-ranker-0",
                                              "amo-ranker-0"]
    assert flags["amo-ranker-2"] == ["--sampler", "amo", "--reward", "ranker", "--seed", 2]
    assert "none" in flags["rand-1"]


@pytest.mark.fast
def test_results_lie_beside_the_runs_and_the_last_value_of_a_flag_counts():
    args = samplers.parse_args(["--work", "runs/again", "--train", "--crop 256 --batch-size=48"])
    assert str(args.results) == "runs/again/samplers" and jobs.last_value(args.train, "--batch-size") == 48
    assert jobs.last_value(args.train, "--crop") == 256 and jobs.last_value(args.train, "--group-size") == 4
    labels = [label(name) for name in ("rewards.cnniqa:build", "cnniqa_live:build", "ranker")]
    assert labels == ["cnniqa", "cnniqa_live", "ranker"]


@pytest.mark.fast
def test_flags_of_the_trainings_exist(tmp_path):
    import finetune_lora
    import train
    args = samplers.parse_args([])
    for flags in samplers.plan(args).values():
        assert train.parse_args([*args.train, *map(str, flags)]).val_every == 0
    tune = lora_tuning.parse_args([]).tune
    for flags in lora_tuning.VARIANTS.values():
        words = [*tune, *flags, "--reward", "ranker", "--base", tmp_path / "none", "--arch", "compact"]
        assert finetune_lora.parse_args(words).lambda_q == "auto"


@pytest.mark.fast
def test_a_failed_job_is_named_and_stops_the_queue(tmp_path):
    text = r"evaluate.py ended with 2: .*.*/nowhere: no such folder.*all of it in .*a.log"
    with pytest.raises(runs.UserError, match=text):
        jobs.call(tmp_path / "a.log", "evaluate.py", "--lq", "/nowhere", "--metrics", "ranker")
    begun = []

    def job(k):
        begun.append(k)
        if k == 1:
            raise RuntimeError("no")
        time.sleep(0.05)
    with pytest.raises(RuntimeError, match="no"):
        jobs.parallel(1, [partial(job, k) for k in range(50)])
    assert begun[:2] == [0, 1] and len(begun) < 10


def small_flags(words):
    """The flags of the trainings, with small sizes."""
    values = {"--arch": "compact-small", "--total-steps": "2", "--batch-size": "2", "--group-size": "2",
              "--pool-size": "4", "--crop": "64", "--load-size": "64", "--d-features": "4"}
    return [values.get(before, word) for before, word in zip(["", *words], words)]


@pytest.fixture(scope="module")
def small(tmp_path_factory, vgg_file, forked_call, photographs):
    """Flags of samplers.py for two photographs and two steps a run, after `shrink data runs report`, real scripts."""
    folder = tmp_path_factory.mktemp("samplers")
    for name, image in photographs.items():
        save_image(folder / "photos" / f"{name}.png", image)
        save_image(folder / "test" / f"{name}.png", image[:, :130, :150])
    for k, seed in enumerate((1, 2)):
        torch.manual_seed(seed)
        runs.save_weights(folder / f"enhancer{k}.pth", archs.create("compact-small").state_dict())
    with pytest.MonkeyPatch.context() as patch:
        # train.py keeps static scores in runs/scores
        patch.chdir(folder)
        patch.setattr(jobs, "call", forked_call)
        patch.setattr(samplers, "TRAIN", small_flags(samplers.TRAIN))
        quintuplets = "--soften 1 --patch 96 --step 96 --min-std 0 --min-laplacian 0".split()
        patch.setattr(samplers, "QUINTUPLETS", quintuplets)
        patch.setattr(samplers, "CROPS", 40)
        patch.setattr(samplers, "SHRINKS", (0.25, 0.5))
        patch.setattr(samplers, "SOFTENED", ((1, 1, 96),))
        enhancers = [folder / f"enhancer{k}.pth" for k in range(2)]
        words = ["shrink", "data", "runs", "report", "--photos", folder / "photos", "--test-photos", folder / "test",
                 "--enhancers", *enhancers, "--init", enhancers[0], "--rewards", "ranker", "--unseen", "piqe",
                 "--slow", "piqe", "--seeds", 1, "--figure", "test_coffee", "--vgg-weights", vgg_file,
                 "--work", folder / "work", "--results", folder / "out" / "exp"]
        args = samplers.parse_args(list(map(str, words)))
        samplers.main(args)
        yield args


def no_call(log, script, *words, **more):
    """Instead of jobs.call, where nothing is left to do but a build that finds everything there."""
    if script != "prepare.quintuplets":
        pytest.fail(f"{script} again")


def changed(args, **values):
    return argparse.Namespace(**vars(args) | values)


@pytest.mark.slow
def test_a_whole_experiment_in_small(small, monkeypatch):
    """Real scripts from photographs to tables, two steps a run; a second call repeats nothing."""
    out = small.results.parent
    summary = json.loads((out / "exp.json").read_text())
    assert list(summary["mean"]) == ["bicubic", "reference", "start", "orig", "rand", "sma-ranker", "amo-ranker"]
    assert summary["picked"]["orig"]["original"] == 1 and summary["images"] == 2
    assert set(summary["lower_is_better"]) == set(summary["metrics"])
    first = json.loads((out / "exp" / "amo-ranker-1.json").read_text())
    assert sum(first["picked"].values()) == 4 and first["train"][-1] == "1"
    mean = np.mean([scores["ranker"] for scores in first["scores"].values()])
    assert summary["mean"]["amo-ranker"][0] == pytest.approx(mean)
    picks = json.loads((out / "exp-picks.json").read_text())["rewards"]["ranker"]
    assert all(sum(shares.values()) == pytest.approx(1) for shares in picks.values())
    rows = json.loads((out / "exp-shrink.json").read_text())["rows"]
    assert [row["shrink"] for row in rows] == [0.25, 0.5]
    assert load_image(out / "exp.png").shape[2] == 5 * 256 + 4 * 4
    monkeypatch.setattr(jobs, "call", no_call)
    samplers.main(small)
    assert json.loads((out / "exp.json").read_text())["mean"] == summary["mean"]
    with pytest.raises(runs.UserError, match="exp-settings.json: these results were made with other train: choose"):
        samplers.main(changed(small, train=[*small.train, "--lr", "1"]))


@pytest.mark.slow
def test_the_lora_experiment_in_small(small, tmp_path, monkeypatch):
    """Three tunings to two gains each, from the runs of the small experiment; a second call repeats nothing."""
    variants = {"lora": "--tune lora --lr 1e-2", "naive": "--tune all --lr 1e-3", "layers": "--tune layers --lr 1e-3"}
    monkeypatch.setattr(lora_tuning, "VARIANTS", {name: flags.split() for name, flags in variants.items()})
    monkeypatch.setattr(lora_tuning, "SCALES", (0.0, 1.0))
    tune = "--rank 2 --val-photos 1 --val-every 1 --total-steps 6 --ema-decay 0 --lambda-q 1 --lambda-p 0"
    args = lora_tuning.parse_args(["--gains", "0.5", "2", "--tune", tune, "--results", str(tmp_path / "lora")])
    lora_tuning.main(args, small)
    summary = json.loads((tmp_path / "lora.json").read_text())
    assert list(summary["tuning"]) == ["lora +0.5", "naive +0.5", "layers +0.5", "lora +2", "naive +2", "layers +2"]
    for name, tuning in summary["tuning"].items():
        assert tuning["gain"][0] >= float(name.partition("+")[2]) and 0 < tuning["steps"][0] <= 60
    before = json.loads((small.results / "amo-ranker-1.json").read_text())["scores"]
    mean = np.mean([scores["ranker"] for scores in before.values()])
    assert summary["mean"]["before"][summary["metrics"].index("ranker")] == pytest.approx(mean)
    # the adapter's ends: the network before and the tuned one
    none, full = summary["strength"]
    for point, row in ((none, "before"), (full, "lora +2")):
        for key, metric in (("reward", "ranker"), ("psnr", "psnr"), ("vgg", "vgg")):
            expected = summary["mean"][row][summary["metrics"].index(metric)]
            assert point[key] == pytest.approx(expected, abs=2e-3), (row, metric)
    assert load_image(tmp_path / "lora.png").shape[2] == 5 * 256 + 4 * 4
    assert (tmp_path / "lora-strength.png").stat().st_size > 10_000
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "call", no_call)
        lora_tuning.main(args, small)
    assert json.loads((tmp_path / "lora.json").read_text())["mean"] == summary["mean"]

    # results of other networks or settings, and gains that cannot be had
    args, exp = changed(args, stages=["runs"]), changed(small, jobs=1)
    file = tmp_path / "lora" / "lora-1-0.5.json"
    record = json.loads(file.read_text())
    runs.save_json(file, record | {"base": "0"})
    with pytest.raises(runs.UserError, match="lora-1-0.5.json: made from another network"):
        lora_tuning.main(args, exp)
    runs.save_json(file, record)
    with pytest.raises(runs.UserError, match="lora-1-0.5.json: made with other settings"):
        lora_tuning.main(changed(args, tune=[*args.tune, "--seed", "1"]), exp)
    with pytest.raises(runs.UserError, match="lora-1: at step .*, but the gain of 0.1 was there at step"):
        lora_tuning.main(changed(args, gains=[0.1]), exp)
    with pytest.raises(runs.UserError, match="the reward gained .* at most, and 1000 is asked for"):
        lora_tuning.main(changed(args, gains=[0.5, 2, 1000]), exp)
