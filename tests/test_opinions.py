"""report/opinions.py: readers of faulty files, hand-worked votes, scipy, autograd and brute force, the real study."""
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import optimize, stats

import runs
from images import save_image
from report import opinions

pytestmark = pytest.mark.fast
HUMAN = Path(__file__).resolve().parents[2] / "shared" / "data" / "human"
needs_study = pytest.mark.skipif(not HUMAN.is_dir(), reason=f"{HUMAN} is not here: images with people's opinions")
METHODS = ["BSRGAN", "RealESRGAN", "ResShift", "SwinIR"]
SIDES = "observer=observer,candidates=left+right,selected=selected"
NAMES = r"(?P<scene>.+)_(?P<method>[^_]+)"


def write(path, text):
    path.write_text(text)
    return path


# Readers

def test_mos_with_faults(tmp_path):
    text = ("name,score,dev\na.png,10,1\n,20,1\nb.png,many,1\nc.png,30,\nd.png,inf,1\n\na.png,40,2\ne.png,50,-1\n"
            "f.png,60,3\n")
    path = write(tmp_path / "mos.csv", text)
    mos, left_out = opinions.read_mos(path, "image=name,mos=score,std=dev")
    assert mos.image.tolist() == ["a.png", "c.png", "f.png"] and mos.mos.tolist() == [10, 30, 60]
    assert mos.index.tolist() == [2, 5, 10] and np.array_equal(mos["std"], [1, np.nan, 3], equal_nan=True)
    assert [line.partition(";")[0] for line in left_out] == [
        "1 opinions left out: an image is not named (line 3", "2 opinions left out: the mos is no number (line 4, 6",
        "1 opinions left out: the std is no deviation (line 9",
        "1 opinions left out: the image was named before"]
    turned, _ = opinions.read_mos(path, "image=name,mos=score", lower_is_better=True)
    assert turned.mos.tolist() == [-10, -30, -50, -60] and turned["std"].isna().all()
    plain = write(tmp_path / "plain.csv", "image,mos,std\nx.png,3,1\n")
    assert opinions.read_mos(plain)[0].iloc[0].tolist() == ["x.png", 3, 1]
    for text, columns, message in (("image,mos\na,b\n", None, "no usable row; 1 opinions left out"),
                                   ("image,score\na,1\n", None, "has no column mos; it has image, score"),
                                   ("image,mos\na,1\n", "image=image", r"\(mos is missing\)"),
                                   ("image,mos\na,1\n", "image=image,mos=1", "names or numbers, not both")):
        with pytest.raises(runs.UserError, match=message):
            opinions.read_mos(write(tmp_path / "bad.csv", text), columns)


def test_the_general_form_with_faults(tmp_path):
    text = """observer,scene,candidates,selected
1,s,A|B|C,B
1,s.png,C|B|A,A
1,s,A|B,A
2,s,A|B|C,D
2,s,A,A
2,s,A|A|B,A
2,,A|B,A
2,s,A|B|,A

2,t.v2,B | C,C
"""
    choices, left_out = opinions.read_choices(write(tmp_path / "choices.csv", text))
    assert [tuple(row) for row in choices.itertuples()] == [
        (2, "1", "s", ("A", "B", "C"), "B"), (4, "1", "s", ("A", "B"), "A"), (11, "2", "t.v2", ("B", "C"), "C")]
    faults = ["a field is empty (line 8;", "fewer than two candidates, or one twice (line 6, 7, 9;",
              "the selected one is no candidate (line 5;",
              "the observer chose there before; the first choice counts (line 3;"]
    assert all(fault in line for line, fault in zip(left_out, faults, strict=True))
    pairs = opinions.pairs_of(choices)
    assert pairs.index.tolist() == [2, 2, 4, 11]
    assert (pairs.method_a + pairs.method_b).tolist() == ["BA", "BC", "AB", "CB"]
    opinions.write_choices(tmp_path / "again.csv", choices)
    again, left_out = opinions.read_choices(tmp_path / "again.csv")
    assert again.to_dict("list") == choices.to_dict("list") and left_out == []
    assert opinions.names_of(choices) == ["A/s", "B/s", "B/t.v2", "C/s", "C/t.v2"]


def test_two_other_forms_mean_the_same(tmp_path):
    best = write(tmp_path / "best.csv", "who,picture,liked\nann,1.png,B\nbob,1.png,A\nann,2.png,Z\n")
    choices, left_out = opinions.read_choices(best, "observer=who,scene=picture,selected=liked", ["A", "B"])
    assert choices.candidates.tolist() == [("A", "B")] * 2 and choices.scene.tolist() == ["1", "1"]
    assert "the selected one is no candidate (line 4; first: ann, 2, ('A', 'B'), Z)" in left_out[0]
    sides = write(tmp_path / "sides.csv", "1_A.png,1_B.webp,1_B.png\n1_A.png,2_B.png,1_A.png\nx,1_B.png,x\n")
    choices, left_out = opinions.read_choices(sides, "candidates=0+1,selected=2", pattern=NAMES)
    assert choices.iloc[0].tolist() == ["line 1", "1", ("A", "B"), "B"] and len(choices) == 1
    assert "different scenes, or have names of another form (line 2, 3;" in left_out[0]
    for words, message in (((None, ["A", "B"]), "stand in columns .candidates=. or are named once"),
                           (("scene=picture,selected=liked",), "give one of the two"),
                           (("selected=liked", ["A", "B"]), "the scene of a choice stands in a column"),
                           (("selected=liked", ["A", "B"], "(?P<scene>"), "not a regular expression"),
                           (("selected=liked", ["A", "B"], "(.+)_(.+)"), "needs the groups"),
                           (("scene=picture,selected=liked", ["C", "D"]), "no usable row; 3 choices left out")):
        with pytest.raises(runs.UserError, match=message):
            opinions.read_choices(best, *words)


def test_images_of_candidates_have_any_suffix(tmp_path):
    for name in ("A/1.png", "A/2.png", "B/1.webp"):
        save_image(tmp_path / name, torch.zeros(3, 8, 8))
    choices, _ = opinions.read_choices(write(tmp_path / "c.csv", "scene,selected\n1,A\n2,B\n"),
                                       "scene=scene,selected=selected", ["A", "B"])
    files = opinions.images_of(choices, tmp_path)
    assert {name: file and file.name for name, file in files.items()} == {
        "A/1": "1.png", "A/2": "2.png", "B/1": "1.webp", "B/2": None}
    with pytest.raises(runs.UserError, match="no folder A in it; a method's images are METHOD/SCENE"):
        opinions.images_of(choices, tmp_path / "A")
    assert set(opinions.images_of(choices, tmp_path / "A", strict=False).values()) == {None}


def test_splits_keep_groups_together_and_forget_the_order_of_rows():
    groups = np.array([f"s{k % 10}" for k in range(50)])
    divided = opinions.splits(groups)
    assert len(divided) == 10 and len({tuple(test) for _, test in divided}) > 5
    order = np.random.default_rng(1).permutation(50)
    for (train, test), (_, moved) in zip(divided, opinions.splits(groups[order])):
        assert sorted([*train, *test]) == list(range(50))
        assert set(groups[test]).isdisjoint(groups[train]) and len(set(groups[test])) == 2
        assert set(groups[order][moved]) == set(groups[test])
    assert not np.array_equal(divided[0][1], opinions.splits(groups, seed=1)[0][1])


# Statistics

def test_correlations_are_scipys_and_the_logistic_is_curve_fits():
    rng = np.random.default_rng(0)
    quality = rng.normal(50, 12, 300)
    mos = 20 + 60 / (1 + np.exp(-(quality - 55) / 4)) + rng.normal(0, 4, 300)
    found = opinions.correlations(quality, mos)
    assert found["srcc"] == pytest.approx(stats.spearmanr(quality, mos).statistic)
    assert found["krcc"] == pytest.approx(stats.kendalltau(quality, mos).statistic)
    assert found["plcc"] == pytest.approx(stats.pearsonr(quality, mos).statistic)

    def curve(x, a, b, c, d):
        return b + (a - b) / (1 + np.exp(-(x - c) / abs(d)))
    reference = curve(quality, *optimize.curve_fit(curve, quality, mos, [80, 20, 50, 5])[0])
    assert found["plcc_logistic"] == pytest.approx(np.corrcoef(reference, mos)[0, 1], abs=1e-6)
    assert found["plcc_logistic"] > found["plcc"] + 0.02
    # a wrong sign shows
    assert opinions.correlations(-quality, mos)["plcc_logistic"] == pytest.approx(-found["plcc_logistic"], abs=1e-6)
    assert all(np.isnan(value) for value in opinions.correlations(np.ones(9), mos[:9]).values())


def test_likelihood_and_its_gradient_against_autograd_and_brute_force():
    rng = np.random.default_rng(1)
    utility, selected = rng.normal(size=(20, 4)), rng.integers(0, 3, 20)
    utility[:5, 3] = np.nan
    value, gradient = opinions.choice_likelihood(utility, selected)
    for k in range(20):
        row = utility[k][~np.isnan(utility[k])]
        x = torch.tensor(row, requires_grad=True)
        reference = torch.log_softmax(x, 0)[selected[k]]
        reference.backward()
        assert value[k] == pytest.approx(reference.item())
        assert gradient[k, :len(row)] == pytest.approx(x.grad.numpy()) and not gradient[k, len(row):].any()
    # one draw of Gumbel noise per candidate, best of them: the model's meaning
    noisy = utility[10] + rng.gumbel(size=(200_000, 4))
    shares = np.bincount(noisy.argmax(1), minlength=4) / 200_000
    model = [np.exp(opinions.choice_likelihood(utility[10:11], np.array([k]))[0][0]) for k in range(4)]
    assert shares == pytest.approx(model, abs=0.005)


def choices_of(rows):
    return pd.DataFrame(rows, columns=["observer", "scene", "candidates", "selected"])


def test_strengths_by_hand_and_by_a_general_optimiser():
    # two methods: the log of the odds
    rows = [(k, "s", ("A", "B"), "A" if k < 9 else "B") for k in range(12)]
    table = opinions.bradley_terry(choices_of(rows))
    assert table.index.tolist() == ["A", "B"] and table.choices.tolist() == [9, 3] and table.shown.tolist() == [12, 12]
    assert table.strength["A"] - table.strength["B"] == pytest.approx(np.log(3), abs=1e-3)
    # four methods, mixed sizes
    rng = np.random.default_rng(2)
    truth, rows = {"A": 0.8, "B": 0.3, "C": -0.2, "D": -0.9}, []
    for k in range(400):
        among = tuple(rng.permutation(list(truth))[:rng.integers(2, 5)])
        rows.append((k % 20, k % 25, among, max(among, key=lambda m: truth[m] + rng.gumbel())))
    choices = choices_of(rows)
    table = opinions.bradley_terry(choices, "scene", resamples=300)

    def loss(free):
        strength = dict(zip("ABCD", [*free, 0.0]))
        return -sum(strength[s] - np.log(sum(np.exp(strength[m]) for m in among)) for _, _, among, s in rows)
    reference = np.append(optimize.minimize(loss, np.zeros(3)).x, 0)
    assert table.strength[list("ABCD")].to_numpy() == pytest.approx(reference - reference.mean(), abs=2e-3)
    assert (table.low < table.strength).all() and (table.strength < table.high).all()
    # of two methods and independent choices the standard error of the log odds is known
    rows = [(k, k, ("A", "B"), "A" if k < 120 else "B") for k in range(200)]
    table = opinions.bradley_terry(choices_of(rows), "observer")
    width = 2 * 1.96 * np.sqrt(1 / 120 + 1 / 80) / 2
    assert table.high["A"] - table.low["A"] == pytest.approx(width, rel=0.1)
    # never selected: finite
    lost = opinions.bradley_terry(choices_of([(0, 0, ("A", "B"), "A")] * 5), "scene")
    assert np.isfinite(lost.strength).all() and lost.strength["A"] > 1 and lost.low.isna().all()


def test_intervals_count_clusters():
    rng = np.random.default_rng(3)
    values, scene = rng.random(30), np.arange(30)
    mean, low, high = opinions.over_clusters(values, scene)
    reference = stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0), n_resamples=5000)
    assert (mean, low, high) == pytest.approx((values.mean(), *reference.confidence_interval), abs=0.01)
    copied = opinions.over_clusters(np.append(np.repeat(values, 50), np.nan), np.append(np.repeat(scene, 50), 0))
    assert copied == pytest.approx((mean, low, high))
    assert np.isnan(opinions.over_clusters(values, np.zeros(30))[1])


# Scores and choices

def worked():
    """Two scenes, three methods; the third observer sees two of them in the second scene."""
    return choices_of([("a", "s", ("A", "B", "C"), "A"), ("b", "s", ("A", "B", "C"), "A"),
                       ("c", "s", ("A", "B", "C"), "B"), ("a", "t", ("A", "B", "C"), "C"), ("c", "t", ("A", "B"), "B")])


def test_choices_as_pairs_with_votes():
    votes = opinions.votes_of(worked())
    rows = {(r.left, r.right): (r.score, r.votes, r.photo) for r in votes.itertuples()}
    assert rows == {("A/s", "B/s"): (1 / 3, 3, "s"), ("A/s", "C/s"): (0, 2, "s"), ("B/s", "C/s"): (0, 1, "s"),
                    ("A/t", "C/t"): (1, 1, "t"), ("B/t", "C/t"): (1, 1, "t"), ("A/t", "B/t"): (1, 1, "t")}


def test_scores_are_judged_as_by_hand():
    values = {"s": {"A": 1.0, "B": 3.0, "C": 2.0}, "t": {"A": 1.0, "B": 2.0, "C": 2.0}}
    found = opinions.judge(worked(), lambda scene, method: values[scene][method])
    # s: A beats B, C twice (wrong), B beats A, C (right); t: C beats A (right), B (equal), B beats A (right)
    assert found["choices"] == 5 and found["pairs"][0] == pytest.approx((0 + 0 + 2 + 1.5 + 1) / 9)
    assert found["favourite"][0] == pytest.approx((0 + 0 + 1 + 0.5 + 1) / 5)
    # selected in s: 2/3, 1/3, 0; in t: 0/2, 1/2, 1/1
    expected = [stats.spearmanr([1, 3, 2], [2, 1, 0]).statistic, stats.spearmanr([1, 2, 2], [0, 0.5, 1]).statistic]
    assert found["within"][0] == pytest.approx(np.mean(expected))
    assert found["containing"]["C"][0] == pytest.approx((0 + 0 + 1 + 1 + 0.5) / 5)
    # the wrong sign on the other scene: a temperature of zero, equal chances
    shares = np.log([1 / 3, 1 / 2])
    reverse = opinions.judge(worked(), lambda scene, method: -values[scene][method])
    assert reverse["pairs"][0] == pytest.approx(1 - found["pairs"][0])
    wrong = opinions.likelihood_elsewhere(np.array([[2.0, 1, 0], [2, 1, 0], [2, 1, np.nan]]), np.array([2, 2, 1]),
                                          np.array(["s", "t", "t"]))
    assert wrong == pytest.approx([shares[0], shares[0], shares[1]], abs=1e-3)
    # a candidate without a score leaves its choice out
    values["t"]["C"] = np.nan
    assert opinions.judge(worked(), lambda scene, method: values[scene][method])["choices"] == 4
    assert opinions.judge(worked(), lambda scene, method: np.nan) is None


def test_few_scenes_are_tested_against_chance_as_scipy_does():
    values = {"s": {"A": 1.0, "B": 3.0, "C": 2.0}, "t": {"A": 1.0, "B": 2.0, "C": 2.0}}
    found = opinions.judge(worked(), lambda scene, method: values[scene][method])["p"]
    # of the six pairs of s two are right, of the three of t two and a half
    assert found["pairs"] == pytest.approx(stats.ttest_1samp([2 / 6, 2.5 / 3], 0.5).pvalue)
    within = [stats.spearmanr([1, 3, 2], [2, 1, 0]).statistic, stats.spearmanr([1, 2, 2], [0, 0.5, 1]).statistic]
    assert found["within"] == pytest.approx(stats.ttest_1samp(within, 0).pvalue)
    assert np.isnan(opinions.t_test([0.7, np.nan], 0.5))
    assert opinions.t_test([0.7, 0.7], 0.5) == 0 and opinions.t_test([0.5, 0.5], 0.5) == 1


def test_floors_and_ceilings_by_hand():
    limits = opinions.ceilings(worked())
    most, others, chance = (limits[name] for name in ("most possible", "the other observers", "chance"))
    # of the nine votes, the majority of each scene and pair has 2 + 2 + 1, and 1 + 1 + 1
    assert most["pairs"] == pytest.approx(8 / 9) and most["favourite"] == pytest.approx((2 + 1 + 1) / 5)
    assert most["log_likelihood"] == pytest.approx((2 * np.log(2 / 3) + np.log(1 / 3)) / 5)
    # A against B: 1 to 1 without one's own for A twice, 2 to 0 against B; A against C: right; nobody else: half
    assert others["pairs"] == pytest.approx((0.5 + 0.5 + 0 + 1 + 1 + 4 * 0.5) / 9)
    assert others["favourite"] == pytest.approx((0.5 + 0.5 + 0 + 1 / 3 + 1 / 2) / 5)
    assert chance["favourite"] == pytest.approx((4 / 3 + 1 / 2) / 5) and chance["pairs"] == 0.5


def test_the_name_alone_knows_other_scenes():
    value = opinions.names_only(worked())
    # in scene t only C beat A and B, and B beat A; of s the order is A, B, C
    assert value("s", "C") > value("s", "B") > value("s", "A")
    assert value("t", "A") > value("t", "B") > value("t", "C")
    # no other scene
    alone = worked()[worked().scene == "s"]
    assert [opinions.names_only(alone)("s", method) for method in "ABC"] == [0, 0, 0]


def test_opinions_as_random_pairs():
    mos = pd.DataFrame({"image": [f"{k:02d}.png" for k in range(21)], "mos": np.arange(21.0) // 2})
    pairs = opinions.random_pairs(mos)
    assert len(pairs) == 10 and len({*pairs.left, *pairs.right}) == 20
    means = mos.set_index("image").mos
    assert pairs.score.tolist() == [0.5 + 0.5 * np.sign(means[r.right] - means[r.left]) for r in pairs.itertuples()]
    again = opinions.random_pairs(mos.sample(frac=1, random_state=1))
    assert again[["left", "right"]].equals(pairs[["left", "right"]])


@needs_study
def test_the_real_study():
    best, left_out = opinions.read_choices(HUMAN / "sr_study/choice_of_4.csv",
                                           "observer=observer,scene=image,selected=selected", METHODS)
    # the twenty choices of one observer stand twice in the file
    assert len(best) == 1040 and left_out[0].startswith("20 choices left out: the observer chose there before")
    assert (best.groupby("scene").size() == 52).all() and best.observer.nunique() == 52
    sides, left_out = opinions.read_choices(HUMAN / "sr_study/pairs.csv", SIDES, pattern=NAMES)
    assert len(sides) == 540 and not left_out and sides.scene.nunique() == 6
    table = opinions.bradley_terry(best)
    # all four are candidates everywhere: the logs of the shares
    log_share = np.log(best.selected.value_counts() / len(best))[table.index]
    assert table.strength.to_numpy() == pytest.approx((log_share - log_share.mean()).to_numpy(), abs=1e-4)
    assert table.index[0] == opinions.bradley_terry(sides).index[0] == "ResShift"
    assert all(opinions.images_of(best, HUMAN / "sr_study").values())
    mos, left_out = opinions.read_mos(HUMAN / "clive/labels.csv")
    assert len(mos) == 1162 and not left_out and mos["std"].notna().all()
    assert list(itertools.chain(mos.image[:2])) == ["100.jpg", "101.jpg"]
