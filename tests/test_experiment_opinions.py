"""experiments.opinions: the judge that learns from the choices of a user study, in memory and as a reward file."""
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import spearmanr

import iqa
from experiments import opinions as experiment
from experiments.human import METHODS, read_study
from images import load_image, save_image
from report import opinions
from rewards import opinion, train_opinion


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Six scenes by four methods, a brightness each; of a scene's eight observers six select the brightest, two the
    next. A plain model that likes the dark lies where the stage looks for one."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(experiment, "CROP", 32)
    choices, pairs = [], []
    for scene in range(6):
        order = [METHODS[k] for k in rng.permutation(4)]
        for level, method in enumerate(order):
            # one scene is scored in tiles
            noise = 0.03 * rng.standard_normal((3, 40, 400 if scene == 5 else 48))
            save_image(tmp_path / "study" / method / f"{scene}.png",
                       torch.from_numpy(0.2 + 0.2 * level + noise).clamp(0, 1))
        for observer in range(8):
            choices.append((observer, f"{scene}.png", order[3 if observer < 6 else 2], 5))
            left, right = (f"{scene}_{order[k]}.png" for k in (observer % 3, 3))
            pairs.append((observer, left, right, right, 5))
    for name, rows, columns in (("choice_of_4", choices, ["observer", "image", "selected", "time_spent_s"]),
                                ("pairs", pairs, ["observer", "left", "right", "selected", "time_spent_s"])):
        pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "study" / f"{name}.csv", index=False)
    torch.manual_seed(0)
    net = opinion.ARCHITECTURES["mobilenet_v2"]().eval()
    with torch.no_grad():
        net.standardise(net.features(torch.rand(20, 3, 32, 32)))
        net.linear.weight.normal_(0, 0.01).neg_()
        net.linear.bias.fill_(0.5)
        net.mlp[2].weight.normal_(0, 0.1).neg_()
        net.mlp[2].bias.fill_(-0.3)
    opinion.save(tmp_path / "work/plain-0.pth", net, {"arch": "mobilenet_v2"})
    return experiment.parse_args(["study", "0", "--study", str(tmp_path / "study"), "--work", str(tmp_path / "work"),
                                  "--results", str(tmp_path / "results")])


def test_the_head_is_that_of_the_most_likely_choices(study):
    choices = read_study(study.study)[0]["choices"]
    # a method that some were not shown
    choices = pd.concat([choices[:20], opinions.without(choices[20:], METHODS[1])])
    rng = np.random.default_rng(1)
    table = {name: (torch.tensor(rng.normal()), torch.from_numpy(rng.standard_normal(3)).float())
             for name in opinions.names_of(choices)}

    def loss(w):
        total = 0
        for row in choices.itertuples():
            values = [table[f"{method}/{row.scene}"] for method in row.candidates]
            utility = [w[0] * score.item() + w[1:] @ features.double().numpy() for score, features in values]
            total += math.log(sum(map(math.exp, utility))) - utility[row.candidates.index(row.selected)]
        return total / len(choices) + 0.01 * w[1:] @ w[1:]
    found = minimize(loss, np.zeros(4), tol=1e-10)
    assert np.abs(found.x).max() > 0.1
    assert experiment.fit_head(table, choices, 0.01).numpy() == pytest.approx(found.x, abs=1e-3)


def test_the_judge_of_unseen_scenes_and_its_file(study, monkeypatch):
    # searching for it takes a minute
    monkeypatch.setattr(experiment, "penalty_by_scenes", lambda table, choices: 0.01)
    experiment.main(study)
    record = json.loads((study.results / "study-judge.json").read_text())
    rows = record["rows"]
    assert {"plain", "judge", "judge, all layers", "sharpness", "name of the method"} <= set(rows)
    assert rows["judge"]["best"]["pairs"][0] > 0.8 > 0.4 > rows["plain"]["best"]["pairs"][0]
    # by hand: a scene's most selected image wins its 3 pairs 6 times, the next 2 of 3 twice
    assert rows["judge"]["best"]["choices"] == 48 and rows["judge"]["pairs"]["choices"] == 48
    assert record["ceilings"]["best"]["most possible"]["pairs"] == pytest.approx((6 * 3 + 2 * 2) / 24)
    assert set(record["left_out"]) == set(METHODS)
    assert rows["sharpness"]["like_sharpness"] == 1
    # the file has the utilities of the head that learned all scenes
    choices = read_study(study.study)[0]["choices"]
    files = opinions.images_of(choices, study.study)
    plain, judge = (opinion.load(study.work / f"{name}.pth") for name in ("plain-0", "judge"))
    table, scores = {}, {}
    with torch.no_grad():
        for name, file in files.items():
            x = load_image(file)[None].float() / 255
            table[name] = plain[0](x)[0] / train_opinion.TEMPERATURE, plain[0].described(x).mean((0, 1))
            scores[name] = judge[0](x).item()
    w = experiment.fit_head(table, choices, 0.01)
    utility = experiment.utility_of(w, table)
    want = np.array([utility(*reversed(name.split("/", 1))) for name in scores]) * train_opinion.TEMPERATURE
    assert np.array(list(scores.values())) == pytest.approx(want - want.mean() + 50, abs=0.02)
    assert np.std(want) > 5 and judge[1]["init"] == plain[1] and "no network" in judge[1]["role"]
    reward = iqa.create_reward([str(study.work / "judge.pth")])
    assert reward(x).item() == pytest.approx(scores[name], abs=0.02)
    # markdown of equal rows
    lines = experiment.study_table(record).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + len(rows)


def fails_on_grey(device):
    """More noise is better; nothing can be said of an image without any."""
    return lambda x: torch.where(x.std((1, 2, 3)) > 1e-4, x.std((1, 2, 3)), torch.nan)


def test_models_that_learned_nothing_are_judged_on_every_split(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    noise = rng.permutation(30)
    images = [torch.from_numpy(128 + level * rng.uniform(-1, 1, (3, 260, 264))).byte() for level in noise]
    mos = {"names": [f"{k:02d}.png" for k in range(30)], "images": images, "mos": torch.tensor(noise % 20).float()}
    monkeypatch.setattr(experiment, "OTHERS", {"sharpness": "rewards.sharpness:build",
                                               "noise": f"{__name__}:fails_on_grey"})
    args = experiment.parse_args(["others", "--results", str(tmp_path)])
    experiment.others(args, mos)
    table, _ = experiment.read_models(args)
    assert list(table) == ["sharpness", "noise"] and all(len(rows) == 10 for rows in table.values())
    for split, (_, test) in enumerate(opinions.splits(mos["names"])):
        want = spearmanr(noise[test], noise[test] % 20).statistic
        assert table["sharpness"][split] == pytest.approx(dict.fromkeys(("whole", "96", "128", "192", "256"), want),
                                                          abs=1e-4)
        rest = test[noise[test] > 0]
        assert table["noise"][split]["128"] == pytest.approx(spearmanr(noise[rest], noise[rest] % 20).statistic,
                                                             abs=1e-4)
    record = json.loads((tmp_path / "clive-noise.json").read_text())
    assert record["not_scored"] == dict.fromkeys(("whole", "96", "128", "192", "256"), 1)
    experiment.report(args)


def test_likeness_is_the_mean_rank_correlation_of_scenes():
    # 1 - 6 * 4 / (4 * 15) in the first scene, the opposite order in the second, the same in the third
    orders = {"a": ([1, 2, 3, 40], [2, 1, 40, 3]), "b": ([1, 2, 3, 40], [40, 30, 20, 1]),
              "c": ([1, 2, 3, 4], [0, 1, 50, 51])}
    one, other = ({f"{method}/{scene}": value for scene, both in orders.items()
                   for method, value in zip(METHODS, both[side])} for side in (0, 1))
    assert experiment.likeness(one, other, ["a", "b", "c"]) == pytest.approx((0.6 - 1 + 1) / 3)


def test_all_layers_learn_from_other_scenes_alone(study, monkeypatch):
    choices = read_study(study.study)[0]["choices"]
    images = {name: load_image(file) for name, file in opinions.images_of(choices, study.study).items()}
    scenes, seen = sorted(choices.scene.unique()), []
    fit = train_opinion.fit

    def watched(net, **words):
        seen.append(words["choices"])
        return fit(net, **words)
    monkeypatch.setattr(train_opinion, "fit", watched)
    folds = [scenes[:2], scenes[2:4], scenes[4:]]
    scores = experiment.all_layers(study.work / "plain-0.pth", choices, images, folds)
    assert set(scores) == set(images)
    for fold, learned in zip(folds, seen):
        hidden = [id(image) for name, image in images.items() if name.split("/")[1] in fold]
        shown = [id(image) for group in learned["images"] for image in group]
        assert len(learned["images"]) == 32 and not set(hidden) & set(shown)
        for group, selected, row in zip(learned["images"], learned["selected"],
                                        choices[~choices.scene.isin(fold)].itertuples()):
            assert group[selected] is images[f"{row.selected}/{row.scene}"]
    # a model that learned from a fold that it is not asked about
    base = train_opinion.score_whole(opinion.load(study.work / "plain-0.pth")[0], list(images.values()))
    assert np.abs(np.array([scores[name] for name in images]) - base).max() > 0.5
