"""experiment.py and experiment_lora.py: statistics, the rule for the shrink factor, the queue, and both experiments whole, in small."""
import argparse
import importlib
import json
import multiprocessing
import time
from functools import partial

import numpy as np
import pytest
import torch

import archs
from experiments import jobs
from experiments import samplers as experiment
from experiments import lora_tuning as experiment_lora
import runs
from images import load_image, save_image
from report import tables


@pytest.mark.fast
def test_a_difference_needs_a_clear_interval_and_every_seed():
    rng = np.random.default_rng(0)
    b = rng.normal(0, 5, (3, 17))
    clear = tables.difference(b + 1 + rng.normal(0, 0.2, (3, 17)), b)
    assert clear["verdict"] == "higher" and clear["low"] < clear["mean"] < clear["high"] and 0.8 < clear["low"] and clear["high"] < 1.2
    delta = (b + 1) - b
    assert tables.difference(-b - 1, -b)["verdict"] == "lower" and tables.difference(b + 1, b)["mean"] == pytest.approx(delta.mean())
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


SCRIPTS = ["evaluate", "finetune_lora", "make_quintuplets", "train", "pyiqa"]


def run_script(name, words):
    """In a child of the fork server, which has imported the scripts: importing torch again would be half of every small run."""
    script = importlib.import_module(name)
    script.main(script.parse_args([*words, "--threads", "1"]))


@pytest.fixture(scope="module")
def small(tmp_path_factory, vgg_file):
    """experiment.py's arguments for two photographs and two steps a run, after `shrink data runs report` with the real scripts."""
    folder, real = tmp_path_factory.mktemp("experiment"), jobs.call

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(SCRIPTS)

    def call(log, script, *words, processes=1):
        if processes > 1:
            return real(log, script, *words, processes=processes)
        log.parent.mkdir(parents=True, exist_ok=True)
        child = server.Process(target=run_script, args=(script.removesuffix(".py"), list(map(str, words))))
        child.start()
        child.join()
        assert child.exitcode == 0, script
    from skimage import data as photos
    for name in ("astronaut", "coffee"):
        image = torch.from_numpy(getattr(photos, name)()[64:256, 128:320].copy()).permute(2, 0, 1)
        save_image(folder / "photos" / f"{name}.png", image)
        save_image(folder / "test" / f"{name}.png", image[:, :130, :150])
    for k, seed in enumerate((1, 2)):
        torch.manual_seed(seed)
        runs.save_weights(folder / f"enhancer{k}.pth", archs.create("compact-small").state_dict())
    replace = {"--arch": "compact-small", "--total-steps": "2", "--batch-size": "2", "--group-size": "2", "--pool-size": "4", "--crop": "64",
               "--load-size": "64", "--d-features": "4"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "call", call)
        patch.setattr(experiment, "TRAIN", [replace.get(before, word) for before, word in zip([""] + experiment.TRAIN, experiment.TRAIN)])
        patch.setattr(experiment, "QUINTUPLETS", "--soften 1 --patch 96 --step 96 --min-std 0 --min-laplacian 0".split())
        patch.setattr(experiment, "SHRINKS", (0.25, 0.5))
        patch.setattr(experiment, "SOFTENED", ((1, 1, 96),))
        args = experiment.parse_args(["shrink", "data", "runs", "report", "--photos", str(folder / "photos"), "--test-photos", str(folder / "test"), "--enhancers",
                                      str(folder / "enhancer0.pth"), str(folder / "enhancer1.pth"), "--init", str(folder / "enhancer0.pth"),
                                      "--rewards", "ranker", "--unseen", "piqe", "--slow", "piqe", "--seeds", "1", "--figure", "test_coffee", "--vgg-weights", str(vgg_file),
                                      "--work", str(folder / "work"), "--results", str(folder / "out" / "exp")])
        experiment.main(args)
        yield args


def test_a_whole_experiment_in_small(small, monkeypatch):
    """Real scripts from photographs to tables, two steps a run; a second call repeats nothing."""
    out = small.results.parent
    summary = json.loads((out / "exp.json").read_text())
    assert list(summary["mean"]) == ["bicubic", "reference", "start", "orig", "rand", "sma-ranker", "amo-ranker"]
    assert summary["picked"]["orig"]["original"] == 1 and summary["images"] == 2 and set(summary["lower_is_better"]) == set(summary["metrics"])
    first = json.loads((out / "exp" / "amo-ranker-1.json").read_text())
    assert sum(first["picked"].values()) == 4 and first["train"][-1] == "1"
    assert summary["mean"]["amo-ranker"][0] == pytest.approx(np.mean([s["ranker"] for s in first["scores"].values()]))
    picks = json.loads((out / "exp-picks.json").read_text())["rewards"]["ranker"]
    assert all(sum(shares.values()) == pytest.approx(1) for shares in picks.values())
    assert [row["shrink"] for row in json.loads((out / "exp-shrink.json").read_text())["rows"]] == [0.25, 0.5]
    assert load_image(out / "exp.png").shape[2] == 5 * 256 + 4 * 4
    monkeypatch.setattr(jobs, "call", lambda log, script, *words, **more: script == "prepare.quintuplets" or pytest.fail(f"{script} again"))
    experiment.main(small)
    assert json.loads((out / "exp.json").read_text())["mean"] == summary["mean"]
    with pytest.raises(ValueError, match="exp-settings.json: these results were made with other train: choose"):
        experiment.main(argparse.Namespace(**vars(small) | {"train": [*small.train, "--lr", "1"]}))


def test_the_lora_experiment_in_small(small, tmp_path, monkeypatch):
    """Three tunings to two gains each, from the runs of the small experiment; a second call repeats nothing."""
    monkeypatch.setattr(experiment_lora, "VARIANTS", {"lora": "--tune lora --lr 1e-2".split(), "naive": "--tune all --lr 1e-3".split(),
                                                      "layers": "--tune layers --lr 1e-3".split()})
    monkeypatch.setattr(experiment_lora, "SCALES", (0.0, 1.0))
    words = "--arch compact-small --rank 2 --val-photos 1 --val-every 1 --total-steps 6 --ema-decay 0 --lambda-q 1 --lambda-p 0"
    args = experiment_lora.parse_args(["--gains", "0.5", "2", "--tune", words, "--results", str(tmp_path / "lora")])
    experiment_lora.main(args, small)
    summary = json.loads((tmp_path / "lora.json").read_text())
    assert list(summary["tuning"]) == ["lora +0.5", "naive +0.5", "layers +0.5", "lora +2", "naive +2", "layers +2"]
    for name, tuning in summary["tuning"].items():
        assert tuning["gain"][0] >= float(name.partition("+")[2]) and 0 < tuning["steps"][0] <= 60
    before = json.loads((small.results / "amo-ranker-1.json").read_text())["scores"]
    assert summary["mean"]["before"][summary["metrics"].index("ranker")] == pytest.approx(np.mean([s["ranker"] for s in before.values()]))
    none, full = summary["strength"]                                              # the adapter's ends: the network before and the tuned one
    for point, row in ((none, "before"), (full, "lora +2")):
        for key, metric in (("reward", "ranker"), ("psnr", "psnr"), ("vgg", "vgg")):
            assert point[key] == pytest.approx(summary["mean"][row][summary["metrics"].index(metric)], abs=2e-3), (row, metric)
    assert load_image(tmp_path / "lora.png").shape[2] == 5 * 256 + 4 * 4 and (tmp_path / "lora-strength.png").stat().st_size > 10_000
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "call", lambda log, script, *words, **more: pytest.fail(f"{script} again"))
        experiment_lora.main(args, small)
    assert json.loads((tmp_path / "lora.json").read_text())["mean"] == summary["mean"]
    changed = json.loads((tmp_path / "lora" / "lora-1-0.5.json").read_text())
    runs.save_json(tmp_path / "lora" / "lora-1-0.5.json", changed | {"base": "0"})
    with pytest.raises(ValueError, match="lora-1-0.5.json: made from another network"):
        experiment_lora.main(argparse.Namespace(**vars(args) | {"stages": ["runs"]}), argparse.Namespace(**vars(small) | {"jobs": 1}))
    runs.save_json(tmp_path / "lora" / "lora-1-0.5.json", changed)
    with pytest.raises(ValueError, match="lora-1-0.5.json: made with other settings"):
        experiment_lora.main(argparse.Namespace(**vars(args) | {"tune": [*args.tune, "--clip-grad", "1"], "stages": ["runs"]}), argparse.Namespace(**vars(small) | {"jobs": 1}))
    with pytest.raises(ValueError, match="lora-1: at step .*, but the gain of 0.1 was there at step"):
        experiment_lora.main(argparse.Namespace(**vars(args) | {"gains": [0.1], "stages": ["runs"]}), argparse.Namespace(**vars(small) | {"jobs": 1}))
    with pytest.raises(ValueError, match="the reward gained .* at most, and 1000 is asked for"):
        experiment_lora.main(argparse.Namespace(**vars(args) | {"gains": [0.5, 2, 1000], "stages": ["runs"]}),
                             argparse.Namespace(**vars(small) | {"jobs": 1}))
