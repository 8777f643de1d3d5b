"""experiments.preferences from photographs to tables, as small as it goes, and its report from files made by hand."""
import argparse
import importlib
import json
import re
import shlex

import numpy as np
import pytest
import torch

import archs
import runs
from dpo import candidates, pool, pretrain, rounds, tune
from experiments import gpu, jobs, preference_report
from experiments import preferences as exp
from images import save_image

fast = pytest.mark.fast


def run_here(script, *words):
    module = importlib.import_module(script)
    module.main(module.parse_args(words))


@pytest.fixture
def queue(quintuplets, tmp_path):
    """Flags after every stage, with the real scripts in this process, one after the other."""
    originals = quintuplets / "Train" / "images" / "0-6" / "original"
    torch.manual_seed(0)
    runs.save_weights(tmp_path / "base.pth", archs.create("compact-small").state_dict())
    crops = "--patch 16 --load-size 64 --degradation two-round"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "parallel", lambda jobs, tasks: [task() for task in tasks])
        patch.setattr(jobs, "call", lambda log, script, *words: run_here(script, *words, "--threads", 1))
        patch.setattr(rounds, "subprocess", argparse.Namespace(
            run=lambda command, **more: run_here(*command[2:]) or argparse.Namespace(returncode=0)))
        patch.setattr(exp, "CROPS", crops)
        patch.setattr(exp, "NOISE", (0.6, 1.2))
        patch.setattr(exp, "GENERATOR", f"{crops} --val-photos 1 --steps 2 --warmup 2 --precision bf16")
        patch.setattr(exp, "TUNE", "--batch-size 4 --lr 1e-3 --beta 500 --val-every 1 --log-every 1 --save-every 1")
        patch.setattr(exp, "ARMS", {arm: (flags[0].replace("8", "2").replace("4", "1"), flags[1])
                                    for arm, flags in exp.ARMS.items()})
        patch.setattr(exp, "SCALES", {"cpu": dict(
            base="", test_samples=4, groups=6, piece=3, tune_piece=2,
            generator="--size tiny --batch-size 2 --group-size 2 --lr 1e-3 --total-steps 4 --val-every 0 --workers 0",
            tune="--accumulate 2 --total-steps 4 --val-groups 2 --workers 0")})
        words = ["--photos", originals, "--test", originals, "--base", tmp_path / "base.pth", "--fr", "ssim",
                 "--nr", "ranker", "--watch", "psnr", "--metric-weights", "--samples", 8, "--seeds", 0, 1, "--jobs", 1,
                 "--work", tmp_path / "work", "--results", tmp_path / "out"]
        args = exp.parse_args(list(map(str, words)))
        exp.main(args)
        yield args


@pytest.mark.slow
def test_the_whole_queue_in_small(queue, monkeypatch):
    summary = json.loads(queue.results.with_suffix(".json").read_text())
    assert summary["seeds"]["base"] == summary["seeds"]["HPO"] == summary["seeds"]["1 of 4"] == [0, 1]
    assert all(summary["seeds"][arm] == [0] for arm in exp.ARMS if arm not in exp.REPEATED)
    assert set(summary["seeds"]) == {"base", *exp.ARMS, "base, 0.6 of the noise", "base, 1.2 of the noise",
                                     "base + unsharp 0.5", "base + unsharp 1", "base, mean of seeds",
                                     *(f"base + grid of {arm}" for arm in exp.ARMS)}
    # a sign for every claim and one for the controls
    assert len(summary["signs"]) == len(preference_report.SIGNS) + 1
    # one scale of the reward for all, which the first seed's pool has chosen
    arms = {file.stem: json.loads(file.read_text()) for file in queue.results.glob("*.json")
            if not file.stem.startswith("generator")}
    scopes = {part["scope"] for about in arms.values() for part in about["curation"]}
    assert len(arms) == 13 and scopes == {summary["scope"]}
    gains = {about["arm"]: about["curation"][0]["gain"] for about in arms.values() if about["seed"] == 0}
    assert gains["HPO"] == 1 and gains["HPO, paper sigma"] == pytest.approx(exp.SIGMA / summary["sigma"]["0"][1])
    # two rounds have half the images and half the steps
    in_rounds = arms["2-rounds-0"]
    assert [part["groups"] for part in in_rounds["curation"]] == [3, 3]
    assert [part[-1]["step"] for part in in_rounds["training"]] == [2, 2]
    assert [event["step"] for event in arms["HPO-0"]["training"][0]] == [1, 2, 3, 4]
    # an arm with scores of its own, of the same candidates
    norms = {arm: json.loads((queue.work / "pairs" / f"{arm}-0" / "norm.json").read_text())["metrics"]
             for arm in ("HPO", "HPO-grid-free")}
    assert set(norms["HPO"]) == {"ssim", "ranker"} and set(norms["HPO-grid-free"]) == {"ssim", exp.GRID_FREE}
    assert (queue.work / "pool" / "0" / "scores.jsonl").read_text().count("ranker") == 6 * 8
    # of the same pairs some the other way round
    pairs, tossed = (candidates.read_lines(queue.work / "pairs" / f"{arm}-0" / "pairs.jsonl", "")
                     for arm in ("1-of-4", "tossed"))
    turned = [(a["w_seed"], a["l_seed"]) == (b["l_seed"], b["w_seed"]) for a, b in zip(pairs, tossed)]
    assert 0 < sum(turned) < len(turned) == len(tossed)
    assert all((b["R_w"] < b["R_l"]) == turn for b, turn in zip(tossed, turned))
    # the untuned generator: tau, criterion, and its outputs judged once for all arms
    generator = json.loads((queue.results / "generator-0.json").read_text())
    assert set(generator["reward_by_tau"]) == {"0.6", "1", "1.2"} and not generator["criterion"]["met"]
    record = json.loads((queue.work / "gen" / "0" / "args.json").read_text())["args"]
    assert record["base"].endswith("base.pth") and record["precision"] == "bf16"
    # links, not outputs made again
    image = next((queue.work / "eval" / "base-0" / "base").rglob("*.png"))
    other = queue.work / "eval" / "HPO-0" / image.relative_to(queue.work / "eval" / "base-0")
    assert other.stat().st_ino == image.stat().st_ino
    for name in ("curves", "steps", "grid"):
        assert preference_report.picture(queue.results, name).stat().st_size > 1000
    # sample and score look at what is there by themselves
    monkeypatch.setattr(jobs, "call", lambda log, script, *words: script == "dpo.pool" or pytest.fail(script))
    exp.main(queue)
    assert json.loads(queue.results.with_suffix(".json").read_text())["mean"] == summary["mean"]


# The report, from files made by hand

PHOTOS = [f"test_set5-p{k}-0-0" for k in range(6)]


def row(rewards, shift=0.0):
    """rewards: of every photograph's two seeds are 0.1 below and above this."""
    rewards = np.asarray(rewards) + shift
    return {"per_photo": {"best@2": list(rewards + 0.1), "reward": list(rewards), "worst@2": list(rewards - 0.1),
                          "seed std": [0.1] * 6, "ssim": list(0.5 + rewards / 10)},
            "curve": {"best": [rewards.mean(), rewards.mean() + 0.1], "mean": [rewards.mean()] * 2,
                      "worst": [rewards.mean(), rewards.mean() - 0.1]},
            "rewards": {name: [r - 0.1, r + 0.1] for name, r in zip(PHOTOS, rewards)}}


@pytest.fixture
def results(tmp_path):
    """Two generators; HPO gains 0.03 in both, 1 of 4 gains 0.05, one control 0.02 and another 0.04."""
    base, folder = np.linspace(0.3, 0.6, 6), tmp_path / "out"
    noise = 1e-3 * np.arange(6)
    for seed in (0, 1):
        rows = {"base": row(base), "base, 0.8 of the noise": row(base + noise, 0.02),
                "base, mean of seeds": row(base + noise, 0.04)}
        about = {"sigma": [0.1, 0.15 + 0.1 * seed, 0.3], "sigma_pool": [0.01, 0.05, 0.1],
                 "halves": {"group": {"fr": 0.6, "nr": 0.8}}}
        checks = {"psnr_gain": 1.2, "behind_best_tau": 0.01, "met": True}
        runs.save_json(folder / f"generator-{seed}.json", {
            "settings": {"scale": "cpu"}, "seed": seed, "rows": rows, "pool": about, "criterion": checks,
            "reward_by_tau": {"1": 0.45}, "scope": "group", "inside": ["ssim"], "outside": [], "images": 6, "photos": 6,
            "k": [1, 2], "lower_is_better": {"best@2": False, "reward": False, "worst@2": False, "seed std": None,
                                               "ssim": False}})
        for arm, gain in (("HPO", 0.03), ("1 of 4", 0.05)):
            zero = {"mean": 0.0, "low": -0.1, "high": 0.1, "verdict": "no evidence"}
            step = {"step": 5, "win_ref": 2.0, "win_change": 0.01, "lose_change": 0.02, "accuracy": 0.7}
            runs.save_json(folder / f"{arm.replace(' ', '-')}-{seed}.json", {
                "settings": {"scale": "cpu"}, "seed": seed, "arm": arm, "structured_noise": {"a": 0.1, "b": 0.2 * seed},
                "grid": {"strength": 0.3, "period 8": 0.01, "spread": 0.02,
                         "correlation": {"ssim": zero | {"mean": -0.06}},
                         "preferred": zero | {"mean": 0.006, "low": 0.003, "high": 0.009, "verdict": "higher"}},
                "rows": {arm: row(base + noise, gain), f"base + grid of {arm}": row(base + noise, gain / 2)},
                "watched": [[[0, 0.4], [5, 0.4 + gain]]], "training": [[step]]})
    return folder


@fast
def test_the_report_says_sigma_first_and_what_holds_of_the_papers_signs(results, tmp_path, capsys):
    preference_report.report(results, tmp_path / "nowhere")
    said = capsys.readouterr().out
    assert said.startswith("sigma_g, the spread of the reward over the seeds of an image, by each image's own range")
    assert "| generator 1 | 0.100 | 0.250 | 0.300 | 0.050 | 0.60 | 0.80 | +1.20 | 0.010 | yes |" in said
    summary = json.loads(results.with_suffix(".json").read_text())
    # the noise adds 0.0025 to every row but the base's
    assert summary["differences"]["HPO - base"]["reward"]["mean"] == pytest.approx(0.0325)
    assert summary["gain_over_sigma"] == pytest.approx(0.0325 / 0.1) and "times the spread of the untuned seeds" in said
    assert "Tuning raises the worst of the seeds: holds (HPO - base, worst@2: +0.033" in said
    assert "Tuning narrows the spread of the seeds: no evidence" in said
    assert "The weights of HPO add to a quarter: the opposite holds" in said
    assert "not above base, mean of seeds." in said and "0.8 of the noise" not in said.split("every control:")[1]
    assert "best against the worst in a small network" not in said
    # a grid alone has 0.0175 of 0.0325; peaks of 0.1 and 0, 0.1 and 0.2
    assert "| HPO | 0.70 | +0.50 % | +1.00 % | 10.0% | 54% |" in said
    assert "| HPO, 1 | 0.300 | 0.010 | 0.020 | **+0.0060** [+0.0030, +0.0090] | ssim -0.06 |" in said
    assert summary["differences"]["HPO - base + grid of HPO"]["reward"]["mean"] == pytest.approx(0.015)
    assert summary["differences"]["HPO - base + grid of 1 of 4"]["reward"]["mean"] == pytest.approx(0.005)
    # of each generator
    assert np.array(summary["curves"]["base"]["best"]) == pytest.approx(np.array([[0.45, 0.55]] * 2))


@fast
def test_results_that_do_not_belong_together_are_refused(results, tmp_path):
    file = results / "HPO-1.json"
    file.write_text(file.read_text().replace('"cpu"', '"gpu"'))
    with pytest.raises(runs.UserError, match="HPO-1.json: made with other settings .*scale 'cpu' -> 'gpu'"):
        preference_report.report(results, tmp_path)
    about = json.loads(file.read_text().replace('"gpu"', '"cpu"'))
    del about["grid"]
    runs.save_json(file, about)
    with pytest.raises(runs.UserError, match="HPO-1.json: by an earlier version"):
        preference_report.report(results, tmp_path)
    with pytest.raises(runs.UserError, match="no generator-SEED.json"):
        preference_report.report(tmp_path / "empty", tmp_path)


@fast
def test_the_reward_by_tau_is_on_the_scale_of_the_pool():
    metric = {"lower_is_better": False, "low": 5.0, "high": 6.0}
    norm = {"metrics": {"ssim": metric | {"full_reference": True, "pool": [0.0, 1.0]},
                        "none": metric | {"full_reference": False, "pool": [0.0, 10.0]}}}
    rows = {"base": {"per_photo": {"ssim": [0.2, 0.4], "none": [1.0, 3.0]}},
            "base, 0.5 of the noise": {"per_photo": {"ssim": [0.6, 0.6], "none": [1.0, 1.0]}}}
    assert preference_report.rewards_by_tau({"rows": rows}, norm, (0.5,)) == pytest.approx({"0.5": 0.35, "1": 0.25})


@fast
def test_the_criterion_is_1_dB_and_002():
    by_tau, check = {"0.6": 0.5, "1": 0.49}, {"psnr_of_mean": 25.0, "psnr_base": 23.9}
    assert preference_report.criterion(check, by_tau) == pytest.approx(
        {"psnr_gain": 1.1, "behind_best_tau": 0.01, "met": True})
    assert not preference_report.criterion(check, by_tau | {"0.6": 0.52})["met"]
    assert not preference_report.criterion(check | {"psnr_base": 24.1}, by_tau)["met"]


@fast
def test_where_a_grid_comes_from_is_measured_in_the_candidates(tmp_path):
    """Candidates are flat, with 0 to 4 grey levels of a grid; one metric likes it, one does not, one is blind."""
    grid, names = torch.zeros(3, 4, 4), ["p0-0-0", "p0-1-0", "p1-2-0"]
    grid[:, 0, 0], grid[:, 2, 1] = 1, -1
    tile, flat, strength = grid.repeat(1, 6, 6), torch.full((3, 24, 24), 100.0), (2 / 16) ** 0.5
    pool_folder, out, pairs = tmp_path / "pool", tmp_path / "eval", tmp_path / "pairs"
    levels = [3, 0, 4, 1, 2]
    for name in names:
        save_image(pool_folder / "lq" / f"{name}.png", torch.zeros(3, 6, 6, dtype=torch.uint8))
        for seed, level in enumerate(levels):
            save_image(pool_folder / "cand" / name / f"{seed}.png", (flat + level * tile).byte())
            save_image(out / "base" / name / f"{seed}.png", flat.byte())
            # a part of period 8, too
            more = torch.zeros_like(flat)
            more[:, ::8, ::8] = 8
            save_image(out / "arm" / name / f"{seed}.png", (flat + 2 * tile + more).byte())
    runs.save_json(pool_folder / "pool.json", {"samples": 5, "hr": "x", "generator": {}})
    candidates.write_lines(pool_folder / "scores.jsonl", [
        {"name": name, "seed": seed, "likes": level, "distance": level, "blind": 1.0}
        for name in names for seed, level in enumerate(levels)])
    runs.save_json(pool_folder / "scores.json", {"metrics": {
        name: {"lower_is_better": name == "distance"} for name in ("likes", "distance", "blind")}})
    candidates.write_lines(pairs / "pairs.jsonl", [{"name": name, "w_seed": 2, "l_seed": 3} for name in names])
    runs.save_json(pairs / "curation.json", {"pool": str(pool_folder.resolve())})
    found = exp.grid_in_pairs(pairs, out, "arm")
    of_4 = 2 * grid
    of_4[:, 0, 0] += 2
    of_4 -= of_4.mean((1, 2), keepdim=True)
    assert found["strength"] == pytest.approx(of_4.square().mean().sqrt().item(), rel=1e-5)
    assert found["period 8"] == pytest.approx((sum(x * x for x in (6, -2, -2, -2)) / 64) ** 0.5, rel=1e-5)
    # the candidates' grid along that of the arm
    along = (grid * of_4).mean().item() / found["strength"]
    assert found["spread"] == pytest.approx(2 ** 0.5 * along, rel=0.01) and along < strength
    assert found["preferred"]["mean"] == pytest.approx(3 * along, rel=0.01)
    # intervals over two photographs
    assert {m: round(values["mean"], 6) for m, values in found["correlation"].items()} == {
        "likes": 1, "distance": -1, "blind": 0}
    for name in names:
        for seed in range(len(levels)):
            save_image(out / "arm" / name / f"{seed}.png", flat.byte())
    assert exp.grid_in_pairs(pairs, out, "arm")["strength"] == 0


@fast
def test_the_contact_sheet_has_the_same_seeds_before_and_after_and_what_changed(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save = {"images/lq/a-0-0.png": torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8),
            "images/gt/a-0-0.png": torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)}
    for seed in range(3):
        save[f"base/a-0-0/{seed}.png"] = torch.full((3, 32, 32), 50 + seed, dtype=torch.uint8)
        save[f"HPO/a-0-0/{seed}.png"] = torch.full((3, 32, 32), 56 + 2 * seed, dtype=torch.uint8)
        save[f"other/equal/a-0-0/{seed}.png"] = torch.full((3, 32, 32), 51 + seed, dtype=torch.uint8)
    for name, image in save.items():
        save_image(tmp_path / name, image)
    grids = []
    monkeypatch.setattr(preference_report.pictures, "save_grid", lambda path, lines: grids.append(lines))
    rewards = {"base": {"a-0-0": [0.5, 0.1, 0.9]}, "HPO": {"a-0-0": [0.6, 0.7, 0.8]}}
    preference_report.draw_grid({"HPO": tmp_path, "equal": tmp_path / "other"}, rewards, tmp_path / "grid.png")
    levels = [[round(255 * image.mean().item()) for image, _ in line[:3]] for line in grids[0]]
    # seeds 1, 0, 2
    assert levels == [[51, 50, 52], [58, 56, 60], [128 + 16 * 7, 128 + 16 * 6, 255], [128 + 16] * 3]
    assert [len(line) for line in grids[0]] == [4] * 4 and grids[0][3][0][1] == "equal, change x 16"
    assert grids[0][1][0][1] == "HPO, worst 0.70" and grids[0][0][3][1] == "low resolution"


# Flags

@fast
def test_its_flags_are_flags_of_the_stages():
    lines = []
    for scale in exp.SCALES.values():
        lines.append((pretrain.parse_args, f"{exp.GENERATOR} {scale['generator']}"))
        lines += [(tune.parse_args, f"{exp.TUNE} {scale['tune']} {flags}") for _, flags in exp.ARMS.values()]
        # every call has checks and checkpoints of its own, and a share of the pairs that --accumulate divides
        assert 256 % jobs.last_value(scale["tune"].split(), "--accumulate") == 0
    lines.append((pool.parse_args, f"sample --hr x {exp.CROPS}"))
    lines += [(pool.parse_args, f"curate {flags}") for flags, _ in exp.ARMS.values()]
    for parse, line in lines:
        args, words = vars(parse(shlex.split(line))), shlex.split(line)
        for flag, value in zip(words, words[1:]):
            if flag.startswith("--"):
                parsed = args[flag.removeprefix("--").replace("-", "_")]
                assert type(parsed)(value) == parsed
    assert set(exp.ARMS) <= set(preference_report.NAMES)
    assert all(arm in preference_report.NAMES for _, a, b, _, _ in preference_report.SIGNS for arm in (a, b))


@fast
def test_what_is_missing_is_named_in_one_line(tmp_path):
    words = ["--photos", tmp_path, "--test", tmp_path, "--base", tmp_path / "x4.pth", "--nr", "ranker"]
    with pytest.raises(runs.UserError, match=re.escape(f"{tmp_path / 'x4.pth'}: not there")):
        exp.main(exp.parse_args(list(map(str, words))))
    with pytest.raises(SystemExit):
        exp.parse_args(["tuning"])


@fast
def test_make_gpu_knows_the_experiment_by_its_short_name():
    module, words = gpu.EXPERIMENTS["dpo"]
    args = exp.parse_args(words)
    assert module == "preferences" and args.scale == "gpu" and args.device == "cuda" and args.seeds == [0]


@fast
def test_a_training_in_pieces_goes_on_where_it_is(tmp_path, monkeypatch):
    steps = []

    def call(log, script, *words, stops_at=None):
        steps.append(int(words[words.index("--total-steps") + 1]))
        (tmp_path / "ckpt").mkdir(exist_ok=True)
        torch.save({"step": stops_at or steps[-1]}, tmp_path / "ckpt" / "last.pt")
    monkeypatch.setattr(jobs, "call", call)
    jobs.in_pieces(tmp_path, 100, 40, tmp_path / "log", "dpo.tune")
    assert steps == [40, 80, 100]
    torch.save({"step": 80}, tmp_path / "ckpt" / "last.pt")
    jobs.in_pieces(tmp_path, 100, 40, tmp_path / "log", "dpo.tune")
    torch.save({"step": 55, "ended": "likelihood displacement"}, tmp_path / "ckpt" / "last.pt")
    jobs.in_pieces(tmp_path, 100, 40, tmp_path / "log", "dpo.tune")
    assert steps == [40, 80, 100, 100]
    torch.save({"step": 55}, tmp_path / "ckpt" / "last.pt")
    monkeypatch.setattr(jobs, "call", lambda *words: call(*words, stops_at=60))
    with pytest.raises(runs.UserError, match="was stopped at step 60"):
        jobs.in_pieces(tmp_path, 100, 40, tmp_path / "log", "dpo.tune")
