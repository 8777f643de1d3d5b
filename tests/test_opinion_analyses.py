"""analyze_iqa.py on opinions of people, by its commands: from images to tables, ready scores, controls, refusals."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from test_analyze import run

import runs
from images import load_image, save_image
from report import opinion_analyses
from rewards import sharpness

CONTROL, BRIGHTNESS = "rewards.sharpness:build", "test_rewards:brightness"
LEVELS = {"dark": 0.2, "grey": 0.5, "bright": 0.8}


@pytest.fixture
def study(tmp_path):
    """Four scenes by three methods; of 40 choices 24 are of the brightest image, which is another method in scene 3."""
    rng = np.random.default_rng(0)
    methods = list(LEVELS)
    for scene in range(4):
        for method, level in LEVELS.items():
            level = 1 - level if scene == 3 else level
            noise = 0.02 * rng.standard_normal((3, 40, 40 + 8 * scene))
            save_image(tmp_path / "images" / method / f"{scene}.png", torch.from_numpy(level + noise).clamp(0, 1))
    rows = []
    for observer in range(10):
        for scene in range(4):
            liked = ["bright", "bright", "bright", "grey", "dark"][observer % 5]
            liked = {"bright": "dark", "dark": "bright"}.get(liked, liked) if scene == 3 else liked
            rows.append((observer, f"{scene}.png", liked))
    table = pd.DataFrame(rows, columns=["observer", "image", "selected"])
    table.to_csv(tmp_path / "best.csv", index=False)
    words = ["--choices", tmp_path / "best.csv", "--columns", "observer=observer,scene=image,selected=selected",
             "--methods", *methods, "--images", tmp_path / "images"]
    return tmp_path, words


def test_choices_from_images_to_tables(study, rewards, capsys):
    folder, words = study
    run("score", *words, "--metrics", BRIGHTNESS, "--out", folder / "run", "--device", "cpu")
    printed = capsys.readouterr().out
    assert "understood: of dark, grey, bright in scene 0, 0 selected bright" in printed
    assert "40 choices of 10 observers in 4 scenes" in printed and "12 images, 2 metrics; next:" in printed
    # ready scores come beside those that were computed
    names = pd.read_csv(folder / "run/scores.csv").image
    assert sorted(names) == sorted(f"{method}/{scene}" for method in LEVELS for scene in range(4))
    ready = pd.DataFrame({"image": names, "LPIPS": [-LEVELS[name.split("/")[0]] for name in names]})
    ready.to_csv(folder / "ready.csv", index=False)
    run("score", "--out", folder / "run", "--scores", folder / "ready.csv", "--lower", "LPIPS")
    run("choices", folder / "run")
    printed = capsys.readouterr().out
    assert opinion_analyses.GUARD in printed
    record = json.loads((folder / "run/choices.json").read_text())
    result = record["result"]["run"]
    assert list(result)[0] == BRIGHTNESS and set(list(result)[1:3]) == {"LPIPS", CONTROL}
    assert list(result)[3:] == ["the method's name only", "the other observers", "most possible", "chance"]
    # of the 20 pairs of a scene: 12 of the 6 who selected the brightest, 1 of each of the 2 who selected grey
    assert result[BRIGHTNESS]["favourite"][0] == pytest.approx(0.6)
    assert result[BRIGHTNESS]["pairs"][0] == pytest.approx((6 * 2 + 2 * 1) / 20)
    assert result["LPIPS"]["favourite"][0] == pytest.approx((3 * 0.6 + 0.2) / 4)
    assert result["most possible"]["favourite"] == pytest.approx(0.6)
    # by hand: without bright the others are dark > grey and bright, unknown, between; in scene 3 all are equal
    by_name = {method: values[0] for method, values in result["the method's name only"]["containing"].items()}
    assert by_name == pytest.approx({"bright": 8 / 16, "dark": 32 / 52, "grey": 28 / 48})
    assert record["strengths"]["run"]["bright"]["selected"] == 20
    for name in ("choices.md", "choices.tex", "choices-run.csv", "choices-run.png"):
        assert (folder / "run" / name).stat().st_size > 100
    # choices are pairs with votes, too
    run("sbs", folder / "run", "--metrics", BRIGHTNESS)
    accuracy = json.loads((folder / "run/sbs.json").read_text())["accuracy"][0][BRIGHTNESS]
    assert accuracy["n"] == 8 and accuracy["accuracy"] == 1
    run("disagree", folder / "run", "--metrics", BRIGHTNESS, "LPIPS", "--images", folder / "images", "--side", 32)
    (folder / "run/choices-run.png").unlink()
    opinion_analyses.redraw(folder / "run/choices.json")
    assert (folder / "run/choices-run.png").exists()
    # neither a control nor a distance to a reference is advice
    run("recommend", folder / "run")
    advice = json.loads((folder / "run/recommend.json").read_text())
    assert advice["train"] == BRIGHTNESS and CONTROL not in advice["table"]
    assert advice["table"]["LPIPS"]["differentiable"] is False


def test_ready_scores_have_the_guard_where_there_are_images_or_a_line_that_says_it_is_absent(study, capsys):
    folder, words = study
    names = [f"{method}/{scene}" for method in LEVELS for scene in range(4)]
    pd.DataFrame({"image": names, "LPIPS": [-LEVELS[name.split("/")[0]] for name in names]}).to_csv(
        folder / "ready.csv", index=False)
    (folder / "images/dark/2.png").unlink()
    ready = ["--scores", folder / "ready.csv", "--lower", "LPIPS"]
    run("score", *words, *ready, "--out", folder / "run", "--device", "cpu")
    assert f"{CONTROL}: 1 of 12 images have no score" in capsys.readouterr().out
    scores = pd.read_csv(folder / "run/scores.csv", index_col="image")
    image = load_image(folder / "images/grey/1.png")[None].float() / 255
    assert scores[CONTROL]["grey/1"] == pytest.approx(sharpness.build()(image).item(), abs=1e-3)
    assert scores[CONTROL].isna().sum() == 1 and scores.LPIPS.notna().all()
    # it stays whatever else is asked for
    run("choices", folder / "run", "--metrics", "LPIPS")
    assert opinion_analyses.GUARD in capsys.readouterr().out
    assert json.loads((folder / "run/choices.json").read_text())["result"]["run"][CONTROL]["choices"] == 30
    # no images
    run("score", *words[:-1], folder, *ready, "--out", folder / "blind")
    printed = capsys.readouterr().out
    assert "log Laplacian variance, the guard, is absent: it needs the images in --images" in printed
    run("choices", folder / "blind")
    printed = capsys.readouterr().out
    assert "log Laplacian variance (sharpness alone) is absent from this table" in printed
    assert opinion_analyses.GUARD not in printed


def test_one_scene_is_judged_without_intervals(study, rewards, capsys):
    folder, words = study
    table = pd.read_csv(folder / "best.csv")
    table[table.image == "1.png"].to_csv(folder / "best.csv", index=False)
    run("score", *words, "--metrics", BRIGHTNESS, "--out", folder / "run", "--device", "cpu", "--no-speed")
    run("choices", folder / "run")
    assert "run: one scene only, so the method's name has no other scenes" in capsys.readouterr().out
    result = json.loads((folder / "run/choices.json").read_text())["result"]["run"]
    assert result["the method's name only"]["pairs"][0] == 0.5 and result[BRIGHTNESS]["favourite"][0] == 0.6
    assert np.isnan(result[BRIGHTNESS]["p"]["pairs"]) and (folder / "run/choices-run.png").exists()


@pytest.mark.parametrize("value, p, words", [((0.55, 0.501, 0.6), 0.04, "0.04, better"),
                                             ((0.55, 0.501, 0.6), 0.06, "0.06"), ((0.55, 0.49, 0.6), 0.04, "0.04"),
                                             ((0.4, 0.3, 0.49), 0.001, "0.001, worse"),
                                             ((0.55, np.nan, np.nan), np.nan, "")])
def test_the_verdict_needs_interval_and_test(value, p, words):
    values = {"pairs": value, "p": {"pairs": p}}
    assert opinion_analyses.than_chance(values, "pairs", 0.5) == words
    assert opinion_analyses.than_chance({"pairs": 0.5}, "pairs", 0.5) == ""


def test_of_equal_metrics_that_with_a_measured_gradient_is_named(study, rewards, capsys):
    folder, words = study
    run("score", *words, "--metrics", BRIGHTNESS, "--out", folder / "first", "--device", "cpu")
    scores = pd.read_csv(folder / "first/scores.csv")
    scores.assign(other=scores[BRIGHTNESS] * 2)[["image", "other"]].to_csv(folder / "ready.csv", index=False)
    # the ready scores are the first column
    run("score", *words, "--scores", folder / "ready.csv", "--out", folder / "run", "--device", "cpu")
    run("score", "--out", folder / "run", "--images", folder / "images", "--metrics", BRIGHTNESS, "--device", "cpu")
    table = pd.read_csv(folder / "run/scores.csv")
    table[["image", "other", BRIGHTNESS, CONTROL]].to_csv(folder / "run/scores.csv", index=False)
    run("recommend", folder / "run")
    advice = json.loads((folder / "run/recommend.json").read_text())
    assert advice["train"] == BRIGHTNESS and advice["tied"] == ["other"]
    assert list(advice["table"]) == ["other", BRIGHTNESS]
    assert (f"A tie: {BRIGHTNESS} and other are equal by this rule; {BRIGHTNESS} is named because its gradient was "
            "measured here.") in capsys.readouterr().out


def test_mos_from_images_to_tables(tmp_path, rewards, capsys):
    levels = np.linspace(0.1, 0.9, 30)
    for k, level in enumerate(levels):
        save_image(tmp_path / "images" / f"{k}.png", torch.full((3, 40, 40), level))
    people = 100 * levels ** 2 + np.random.default_rng(0).normal(0, 10, 30)
    table = pd.DataFrame({"file": [f"{k}.png" for k in range(30)] + ["absent.png"], "dmos": [*-people, 50.0]})
    table.to_csv(tmp_path / "dmos.csv", index=False)
    words = ["score", "--mos", tmp_path / "dmos.csv", "--columns", "image=file,mos=dmos", "--mos-lower", "--images",
             tmp_path / "images", "--metrics", BRIGHTNESS, "--out", tmp_path / "run", "--device", "cpu", "--no-speed"]
    run(*words)
    printed = capsys.readouterr().out
    assert "understood: of 31 images people like " in printed and "1 of 31 images have no score" in printed
    run("mos", tmp_path / "run")
    result = json.loads((tmp_path / "run/mos.json").read_text())["result"]["run"]
    found = result[BRIGHTNESS]
    value, low, high = found["srcc"]
    assert found["n"] == 30 and value == pytest.approx(stats.spearmanr(levels, people).statistic)
    assert 0.7 < low < value < high < 1 and len(found["splits"]["srcc"]) == 10
    assert found["plcc_logistic"][0] > found["plcc"][0]
    # all images are flat
    assert np.isnan(result[CONTROL]["srcc"][0])
    for name in ("mos.md", "mos.tex", "mos-run.csv", "mos-run.png"):
        assert (tmp_path / "run" / name).stat().st_size > 100
    run("sbs", tmp_path / "run", "--metrics", BRIGHTNESS)
    assert json.loads((tmp_path / "run/sbs.json").read_text())["accuracy"][0][BRIGHTNESS]["n"] in (14, 15)
    with pytest.raises(runs.UserError, match="holds mos.csv: name another --out for --choices"):
        run("score", "--choices", tmp_path / "dmos.csv", "--out", tmp_path / "run")
    with pytest.raises(runs.UserError, match="no choices.csv in it; this analysis needs `score --choices`"):
        run("choices", tmp_path / "run")


def test_the_control_is_the_variance_of_scipys_laplacian():
    from scipy import ndimage
    image = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    grey = 255 * (image.numpy() * np.array([0.299, 0.587, 0.114]).reshape(3, 1, 1)).sum(1)
    expected = [np.log(ndimage.laplace(luma)[1:-1, 1:-1].var()) for luma in grey]
    assert sharpness.build()(image).tolist() == pytest.approx(expected, abs=1e-4)
    assert sharpness.build()(torch.full((1, 3, 8, 8), 0.5)).item() == pytest.approx(np.log(1e-6))
