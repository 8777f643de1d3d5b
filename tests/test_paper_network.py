"""experiments/paper_network.py: what is compared with what, the controls, the whole queue in small."""
import json

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

import archs
import metrics
import runs
import train
from experiments import jobs, paper_network, paper_network_report
from images import load_image, save_image


@pytest.mark.fast
def test_the_plan_has_three_seeds_of_three_samplers_and_one_of_the_rest():
    args = paper_network.parse_args(["--rewards", "runs/opinion.pth", "rewards.cnniqa:build", "ranker"])
    plan = paper_network.plan(args)
    assert len(plan) == 2 * (9 + 3 + 4)
    assert list(plan)[:3] == ["soft-orig-0", "soft-amo-0", "soft-rand-0"]
    assert plan["sharp-amo-2"] == ("sharp", ["--sampler", "amo", "--reward", "runs/opinion.pth", "--seed", 2])
    assert plan["soft-amo-cnniqa-0"][1][3] == "rewards.cnniqa:build" and "soft-amo-cnniqa-1" not in plan
    assert plan["soft-amo-contiguous-0"][1] == [*plan["soft-amo-0"][1], "--no-channels-last"]
    for scale in paper_network.SCALES.values():
        for _, flags in plan.values():
            given = train.parse_args(["--arch", "rrdbnet", *scale["train"].split(), *map(str, flags)])
            assert 0 < given.d_warmup < given.total_steps and given.milestones == []


@pytest.mark.fast
def test_the_differences_are_the_ones_fixed_before_the_runs():
    groups = ["start", "soft-orig", "soft-rand", "soft-amo", "soft-sma", "soft-amo-ranker", "soft-amo+lora4",
              "soft-amo+naive", "soft-amo-perturbed", "soft-orig-perturbed", "start-blur-of-equal-psnr", "sharp-amo",
              "start-blur-of-equal-psnr-sharp"]
    pairs = paper_network_report.pairs_of(groups, ["soft", "sharp"])
    for pair in (("soft-amo", "soft-orig"), ("soft-amo", "soft-rand"), ("soft-rand", "soft-orig"),
                 ("soft-amo-perturbed", "soft-orig-perturbed"), ("soft-amo", "start"),
                 ("soft-amo-ranker", "soft-orig"), ("soft-amo+lora4", "soft-amo"),
                 ("soft-amo+naive", "soft-amo+lora4"), ("start-blur-of-equal-psnr", "start"),
                 ("soft-amo", "start-blur-of-equal-psnr"), ("sharp-amo", "start-blur-of-equal-psnr-sharp")):
        assert pair in pairs, pair
    assert ("sharp-amo", "start-blur-of-equal-psnr") not in pairs
    assert len(set(pairs)) == len(pairs) and all(a != b for a, b in pairs)


@pytest.mark.fast
def test_the_start_is_compared_with_every_seed(tmp_path):
    """Against means by hand: start has one value per image, amo three, sma one (seed 0)."""
    generator = np.random.default_rng(0)
    amo, start, sma = 10 + generator.normal(size=(3, 6)), generator.normal(size=6), 5 + generator.normal(size=6)
    rows = {f"soft-amo-{seed}": values for seed, values in enumerate(amo)} | {"start": start, "soft-sma-0": sma}
    for row, values in rows.items():
        images = {f"image{k}": {"psnr": float(value)} for k, value in enumerate(values)}
        runs.save_json(tmp_path / "out" / f"{row}.json",
                       {"lower_is_better": {"psnr": False}, "scores": {"realsr": images, "sets": images}})
    slow = {row: {f"image{k}": {"ilniqe": float(value)} for k, value in enumerate(rows[row][:3])}
            for row in ("start", "soft-amo-1")}
    runs.save_json(tmp_path / "out" / "slow.json", {"lower_is_better": {"ilniqe": True}, "scores": slow})
    args = paper_network.parse_args(["report", "--work", str(tmp_path / "no"), "--results", str(tmp_path / "out")])
    paper_network_report.report(args, ["soft"], [])
    summary = json.loads((tmp_path / "out.json").read_text())
    change = summary["slow"]["differences"]["soft-amo - start"]["ilniqe"]
    assert summary["slow"]["images"] == 3 and change["mean"] == pytest.approx((amo[1, :3] - start[:3]).mean())
    found = summary["realsr"]["differences"]
    assert found["soft-amo - start"]["seeds"] == 3
    assert found["soft-amo - start"]["psnr"]["mean"] == pytest.approx(amo.mean() - start.mean())
    assert found["soft-amo - start"]["psnr"]["seeds"] == pytest.approx(amo.mean(1) - start.mean())
    assert found["soft-amo - start"]["psnr"]["verdict"] == "higher"
    assert found["soft-amo - soft-sma"]["seeds"] == 1
    assert found["soft-amo - soft-sma"]["psnr"]["mean"] == pytest.approx(amo[0].mean() - sma.mean())


@pytest.mark.fast
def test_a_filter_reaches_the_goal_or_says_that_it_cannot(tmp_path, photographs, monkeypatch):
    """A blur of known strength gives the goal; a blur cannot raise the sharpness."""
    args = paper_network.parse_args(["--work", str(tmp_path)])
    images = {name: image[None, :, :96, :96].float() / 255 for name, image in photographs.items()}
    monkeypatch.setattr(paper_network, "outputs", lambda *_: images)

    def blur(image, sigma):
        return gaussian_blur(image, 2 * round(3 * sigma) + 3, sigma)

    def sharpness(image, _):
        return image.diff(dim=3).abs().mean() * 100
    goal = np.mean([sharpness(blur(image, 0.57), None).item() for image in images.values()])
    used = paper_network.filtered(args, "realsr", "row", blur, goal, sharpness)
    assert used["strength"] == pytest.approx(0.57, abs=0.02) and used["reached"] == pytest.approx(goal, rel=0.01)
    kept = [load_image(file)[None].float() / 255 for file in (tmp_path / "outputs" / "realsr" / "row").iterdir()]
    assert np.mean([sharpness(image, None).item() for image in kept]) == pytest.approx(used["reached"], rel=1e-4)
    unreachable = paper_network.filtered(args, "realsr", "row", blur, 1.5 * used["tried"][0.0], sharpness)
    assert unreachable["strength"] == 0 and unreachable["reached"] == used["tried"][0.0] < unreachable["goal"]


@pytest.fixture(scope="module")
def small(tmp_path_factory, vgg_file, forked_call, photographs):
    """Flags after every stage on two photographs with a small network and two steps a run, real scripts."""
    folder = tmp_path_factory.mktemp("paper_network")
    for name, image in photographs.items():
        save_image(folder / "photos" / f"{name}.png", image)
        save_image(folder / "test" / f"{name}.png", image[:, :130, :150])
        save_image(folder / "pairs" / f"{name}_HR.png", image[:, :128, :128])
        save_image(folder / "pairs" / f"{name}_LR.png", image[:, :128:4, :128:4])
        save_image(folder / "real" / f"{name}.png", image[:, :32, :40])
    start, enhancer = folder / "start.pth", folder / "enhancer.pth"
    torch.manual_seed(0)
    runs.save_weights(start, archs.create("rrdbnet-small").state_dict())
    runs.save_weights(enhancer, archs.create("compact-small").state_dict())
    tiny = "--crop 64 --load-size 64 --batch-size 2 --group-size 2 --pool-size 4 --total-steps 2 --d-warmup 1 "
    tiny += "--d-features 4 --workers 0 --ema-decay 0 --lr 1e-3 --milestones"
    scale = dict(train=tiny, tune="--total-steps 8 --val-every 1 --ema-decay 0 --lambda-p 0", pairs=2, patch=96)
    with pytest.MonkeyPatch.context() as patch:
        # train.py keeps static scores in runs/scores
        patch.chdir(folder)
        patch.setattr(jobs, "call", forked_call)
        patch.setattr(paper_network, "SCALES", {"cpu": scale})
        patch.setattr(paper_network, "SETS", {"soft": "--shrink 0.5 --min-std 0 --min-laplacian 0".split()})
        patch.setattr(paper_network, "VARIANTS", {"lora4": "--tune lora --rank 4 --lr 1e-2"})
        patch.setattr(paper_network, "VALIDATION", 1)
        patch.setattr(paper_network_report, "PICTURE", (["test_coffee"], 96))
        patch.setattr(paper_network.samplers, "CROPS", 10)
        words = ["--photos", folder / "photos", "--test-photos", folder / "test", "--pairs", folder / "pairs",
                 "--real-photos", folder / "real", "--start", start, "--enhancers", enhancer, "--rewards", "ranker",
                 "--unseen", "--slow", "--seeds", 1, "--sets", "soft", "--gain", 0.01, "--vgg-weights", vgg_file,
                 "--train=--precision fp32",
                 "--jobs", 1, "--work", folder / "work", "--results", folder / "out"]
        args = paper_network.parse_args(list(map(str, words)))
        paper_network.main(args)
        yield args


@pytest.mark.slow
def test_the_whole_queue_in_small(small, monkeypatch):
    summary = json.loads(small.results.with_suffix(".json").read_text())
    trained = {f"soft-{sampler}" for sampler in ("orig", "rand", "sma", "amo")}
    assert trained | {"start", "bicubic", "reference", "soft-amo+lora4"} < set(summary["rows"])
    assert sum(row.startswith("start-") for row in summary["rows"]) == 4
    amo = json.loads((small.results / "soft-amo-1.json").read_text())
    assert [step["step"] for step in amo["losses"]] == [2] and "D_real" in amo["losses"][0]
    assert sum(amo["picked"].values()) == 4
    for test in paper_network.TESTS:
        mean = np.mean([scores["ranker"] for scores in amo["scores"][test].values()])
        column = summary["metrics"].index("ranker")
        assert summary[test]["mean"]["soft-amo"][column] == pytest.approx(mean)
        assert summary[test]["images"] == 2 and summary[test]["differences"]["soft-amo - soft-orig"]["seeds"] == 1
    tuned = json.loads((small.results / "soft-amo-1+lora4.json").read_text())
    assert tuned["gain"] >= 0.01 and set(tuned["structured_noise"]["sets"]) == {"test_astronaut", "test_coffee"}
    picks = json.loads((small.results / "picks.json").read_text())["picks"]["soft"]["rewards"]["ranker"]
    assert sum(picks["best crop (amo)"].values()) == pytest.approx(1)
    precision = json.loads((small.results / "precision.json").read_text())["scores"]
    assert set(precision) == {"fp32", "bf16"} and len(precision["bf16"]) == 2
    assert small.results.with_suffix(".png").stat().st_size > 1000
    shown = json.loads((small.work / "real.json").read_text())["scores"]
    assert {"start", "soft-orig-1", "soft-amo-1", "soft-amo-1+lora4"} <= set(shown)
    assert all(name in (small.work / "real.html").read_text() for name in shown)

    def no_call(log, script, *words, **more):
        # the page is made of what is there whenever it is asked for
        if "real" not in log.stem:
            pytest.fail(f"{script} again")
    monkeypatch.setattr(jobs, "call", no_call)
    paper_network.main(small)
    assert json.loads(small.results.with_suffix(".json").read_text())["sets"] == summary["sets"]


@pytest.mark.slow
def test_the_images_of_a_control_have_what_it_says(small):
    """PSNR of the blurred images, by hand; no strength that was tried is nearer to amo's."""
    control = json.loads((small.results / "start-blur-of-equal-psnr.json").read_text())
    used = control["strength"]["realsr"]
    folder = small.work / "outputs" / "realsr" / "start-blur-of-equal-psnr"
    values = []
    for file in sorted(folder.iterdir()):
        gt = jobs.test_pair(small.work / "realsr", file.stem)[1]
        values.append(metrics.psnr(load_image(file)[None].float() / 255, gt).item())
    assert np.mean(values) == pytest.approx(used["reached"], abs=1e-4)
    assert all(abs(used["reached"] - used["goal"]) <= abs(value - used["goal"]) for value in used["tried"].values())
    scored = [scores["psnr"] for scores in control["scores"]["realsr"].values()]
    assert np.mean(scored) == pytest.approx(used["reached"], abs=1e-3)


@pytest.mark.slow
def test_a_reward_that_is_asked_for_later_is_added_to_the_choices(small, monkeypatch):
    file = small.results / "picks.json"
    before = json.loads(file.read_text())
    args = paper_network.parse_args(["data"])
    vars(args).update(vars(small) | {"rewards": ["ranker", "sharpness"]})
    monkeypatch.setattr(paper_network.samplers, "rewards_choice", lambda name, *_: {"best crop (amo)": name})
    paper_network.prepare(args)
    after = json.loads(file.read_text())["picks"]["soft"]["rewards"]
    assert after == before["picks"]["soft"]["rewards"] | {"sharpness": {"best crop (amo)": "sharpness"}}


@pytest.mark.slow
def test_a_metric_that_is_asked_for_later_is_added_to_every_row(small):
    args = paper_network.parse_args(["judge"])
    vars(args).update(vars(small) | {"stages": ["judge"], "unseen": ["piqe"]})
    before = {path: json.loads(path.read_text()) for path in small.results.glob("*.json")}
    paper_network.main(args)
    rows = {path.stem: json.loads(path.read_text()) for path in before if "lower_is_better" in before[path]}
    for path, record in before.items():
        if path.stem not in rows:
            continue
        now = rows[path.stem]
        assert now["lower_is_better"]["piqe"] is True and set(now["judged_later"]) == {"piqe"}
        for test, images in record["scores"].items():
            for stem, values in images.items():
                assert {k: v for k, v in now["scores"][test][stem].items() if k != "piqe"} == values
    # of the images of this row
    stem = "astronaut"
    image = load_image(small.work / "outputs" / "realsr" / "soft-amo-1" / f"{stem}.png")[None].float() / 255
    expected = metrics.create_metric("piqe", "cpu")(image, None).item()
    assert rows["soft-amo-1"]["scores"]["realsr"][stem]["piqe"] == pytest.approx(expected, abs=1e-3)
