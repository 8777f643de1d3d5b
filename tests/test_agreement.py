"""agreement.py: hand-worked cases, scipy and brute force, the paper's numbers, real votes, files with faults."""
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import data
import runs
from report import agreement

pytestmark = pytest.mark.fast
LABELS = Path(__file__).resolve().parents[2] / "shared" / "data" / "labels"
ORIGINAL, POSITIVE, SIMILAR, NEGATIVE = data.ORIGINAL, data.POSITIVE, data.SIMILAR, data.NEGATIVE


# Pairs

def test_a_hand_worked_case():
    pairs = pd.DataFrame({"left": list("aaabc"), "right": list("bcdcd"), "score": [0.8, 0.2, 0.5, 1.0, 0.0]})
    scores = pd.DataFrame({"up": [1.0, 2, 0, np.nan], "down": [1.0, 2, 0, 0]}, index=list("abcd"))
    margin, nan = agreement.margins(pairs, scores, {"down"}), np.nan
    assert np.array_equal(margin, [[1, -1], [-1, 1], [nan, 1], [-2, 2], [nan, 0]], equal_nan=True)
    out, wrong = (agreement.agree(margin, pairs["score"], ties) for ties in ("out", "wrong"))
    assert np.array_equal(out, [[1, 0], [1, 0], [nan, nan], [0, 1], [nan, 0]], equal_nan=True)
    # a missing score stays missing
    assert np.array_equal(wrong, [[1, 0], [1, 0], [nan, 0], [0, 1], [nan, 0]], equal_nan=True)
    table = agreement.accuracy(out, margin, ["up", "down"])
    assert table.index.tolist() == ["up", "down"] and table.n.tolist() == [3, 4]
    assert table.accuracy.tolist() == [2 / 3, 1 / 4] and table.ties.tolist() == [0, 1]
    share, count = agreement.complement(out, ["up", "down"])
    assert count.loc["up", "down"] == 1 and share.loc["up", "down"] == 1
    assert count.loc["down", "up"] == 2 and share.loc["down", "up"] == 1
    assert agreement.two_afc(margin, pairs["score"])[:, 1].tolist() == pytest.approx([0.2, 0.2, 0.5, 1, 0.5])


def test_intervals_and_tests_are_the_textbook_ones():
    z, n, k = stats.norm.ppf(0.975), 40, 29
    p = k / n
    middle = (p + z * z / 2 / n) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    values = np.r_[np.ones(k), np.zeros(n - k), np.nan]
    assert agreement.share(values) == pytest.approx((p, middle - reach, middle + reach))
    assert np.isnan(agreement.share(np.array([np.nan]))).all()
    rng = np.random.default_rng(0)
    agreed = (rng.random((300, 3)) < [0.6, 0.7, 0.75]).astype(float)
    agreed[rng.random((300, 3)) < 0.05] = np.nan
    table = agreement.paired(agreed, ["a", "b", "c"])
    for row, (i, j) in zip(table.itertuples(), itertools.combinations(range(3), 2)):
        judged = [(x, y) for x, y in agreed[:, [i, j]] if x == x and y == y]
        first, second = sum(x > y for x, y in judged), sum(y > x for x, y in judged)
        assert (row.n, row.only_a, row.only_b) == (len(judged), first, second)
        assert row.difference == pytest.approx((first - second) / len(judged))
        assert row.p == pytest.approx(stats.binomtest(first, first + second).pvalue)
    order = table.p.sort_values()
    benjamini_hochberg = min(order.iloc[k] * 3 / (k + 1) for k in range(3))
    assert table.q[order.index[0]] == pytest.approx(benjamini_hochberg) and (table.differs == (table.q < 0.05)).all()


def test_pairs_of_one_photo_are_not_independent():
    values, each = np.random.default_rng(1).random(50), np.arange(50)
    reference = stats.ttest_1samp(values, 0)
    mean, low, high, p = agreement.over_photos(values, each)
    assert (mean, low, high) == pytest.approx((values.mean(), *reference.confidence_interval()))
    assert p == pytest.approx(reference.pvalue)
    # copies add no information
    copies = agreement.over_photos(np.repeat(values, 20), np.repeat(each, 20))
    assert copies == pytest.approx((mean, low, high, p))
    right = np.repeat(np.arange(10) % 2, 30).astype(float)
    alone, together = agreement.share(right), agreement.share(right, np.repeat(np.arange(10), 30))
    assert together[1] < alone[1] - 0.1 and together[2] > alone[2] + 0.1
    # no spread is no certainty: Wilson's interval and McNemar's p stay
    assert agreement.share(np.ones(8), np.arange(8) // 4) == agreement.share(np.ones(8))
    assert agreement.paired(np.array([[1.0, 0.0]] * 4), ["a", "b"], np.arange(4)).p[0] == 0.125
    agreed = np.stack([values > 0.3, values > 0.6], 1).astype(float)
    once = agreement.paired(agreed, ["a", "b"], each)
    often = agreement.paired(np.repeat(agreed, 20, 0), ["a", "b"], np.repeat(each, 20))
    delta = agreed[:, 0] - agreed[:, 1]
    assert often.p[0] == pytest.approx(stats.ttest_1samp(delta, 0).pvalue) and often.p[0] < once.p[0]
    assert once.p[0] == pytest.approx(stats.binomtest(int(delta.sum()), int(delta.sum())).pvalue)
    pairs = pd.DataFrame({"photo": ["x", "", "y", "", "x"]})
    assert agreement.photo_codes(pairs).tolist() == [0, 2, 1, 3, 0]
    assert agreement.photo_codes(pairs.drop(columns="photo")) is None


def test_the_matrix_of_failures_against_counting():
    rng = np.random.default_rng(2)
    agreed = rng.integers(0, 2, (200, 4)).astype(float)
    agreed[rng.random((200, 4)) < 0.1] = np.nan
    share, count = agreement.complement(agreed, list("abcd"))
    for i, j in itertools.product(range(4), repeat=2):
        failing = [row[j] for row in agreed if row[i] == 0 and row[j] == row[j]]
        assert count.iloc[i, j] == len(failing) and share.iloc[i, j] == pytest.approx(sum(failing) / len(failing))


def test_the_draw_takes_so_many_of_every_two_methods():
    rng = np.random.default_rng(3)
    pairs = pd.DataFrame({"left": [f"l{k}" for k in range(400)], "right": [f"r{k}" for k in range(400)],
                          "score": rng.random(400)})
    methods = rng.permuted(np.tile(list("wxyz"), (400, 1)), axis=1)[:, :2]
    pairs["left_method"], pairs["right_method"] = methods.T
    drawn = agreement.draw(pairs, 3, 0)
    both = drawn[["left_method", "right_method"]].apply(lambda row: "".join(sorted(row)), axis=1)
    assert both.value_counts().to_dict() == {a + b: 3 for a, b in itertools.combinations("wxyz", 2)}
    assert not drawn.left.duplicated().any()
    assert drawn.equals(agreement.draw(pairs, 3, 0)) and not drawn.equals(agreement.draw(pairs, 3, 1))
    with pytest.raises(runs.UserError, match="--draw: the methods of a pair are not known"):
        agreement.draw(pairs.drop(columns=["left_method", "right_method"]), 3, 0)


# Quintuplets

def test_spearman_is_scipys():
    rng = np.random.default_rng(4)
    labels, scores = rng.integers(0, 3, (60, 5)), rng.integers(0, 4, (60, 5)).astype(float)
    labels[0], scores[1] = 1, 2.0
    correlations = agreement.spearman(labels, scores)
    assert np.isnan(correlations[:2]).all()
    for a, b, r in zip(labels, scores, correlations):
        if len(set(a)) > 1 and len(set(b)) > 1:
            assert r == pytest.approx(stats.spearmanr(a, b).statistic)


def test_misalignment_by_hand():
    labels = np.array([[ORIGINAL, POSITIVE, SIMILAR, SIMILAR, NEGATIVE],
                       [ORIGINAL, POSITIVE, POSITIVE, POSITIVE, NEGATIVE],
                       [ORIGINAL, NEGATIVE, NEGATIVE, NEGATIVE, NEGATIVE],
                       [ORIGINAL, SIMILAR, SIMILAR, SIMILAR, NEGATIVE]])
    quality = np.array([[5.0, 4, 3, 3, 1], [1, 2, 3, 4, 9], [5, 1, 2, 3, 4], [2, 2, 2, 2, 2]])
    result = agreement.misalignment(labels, quality)
    # below the original, which counts as similar
    assert result["pm"].tolist() == [True, False, False, False]
    # equal scores are no misalignment
    assert result["nm"].tolist() == [False, True, False, False]
    assert result["negative_first"].tolist() == [False, True, False, False] and np.isnan(result["src"][3])
    result = agreement.misalignment(labels, quality, original_similar=False)
    assert result["pm"].tolist() == [False] * 4 and result["nm"].tolist() == [False] * 4
    assert result["similar"].tolist() == [True, False, False, True] and np.isnan(result["src"][2])
    # AMO always has the original
    assert result["negative_first"].tolist() == [False, True, False, False]


@pytest.mark.parametrize("counted", [True, False])
def test_misalignment_against_loops(counted):
    rng = np.random.default_rng(5)
    labels = np.concatenate([np.zeros((300, 1), int), rng.choice([POSITIVE, SIMILAR, NEGATIVE], (300, 4))], 1)
    quality = rng.integers(0, 6, (300, 5)).astype(float)
    result = agreement.misalignment(labels, quality, counted)
    for k, (row, q) in enumerate(zip(labels, quality)):
        members = [(code, v) for code, v in zip(row, q) if counted or code != ORIGINAL]
        similar = [v for code, v in members if code in (SIMILAR, ORIGINAL)]
        assert result["pm"][k] == any(v < s for code, v in members if code == POSITIVE for s in similar)
        assert result["nm"][k] == any(v > s for code, v in members if code == NEGATIVE for s in similar)
        assert result["negative_first"][k] == (row[q.tolist().index(q.max())] == NEGATIVE)


# The paper

def test_table_6_has_1136_pairs():
    """Its percentages are k / n for one n up to 1212 only: phase I leaves out the 76 pairs without a consensus, too."""
    table = agreement.paper_table(6)
    fits = [n for n in range(100, 1213)
            if all(abs(100 * round(v * n / 100) / n - v) <= 0.005 + 1e-9 for v in table.values())]
    assert fits == [1136] and len(table) == 42
    assert sorted(m for members in agreement.TRAINED_ON.values() for m in members) == sorted(table)
    assert sorted(agreement.TOP7) == sorted(sorted(table, key=table.get)[-7:])


def test_the_papers_tables_are_about_the_same_metrics():
    """Each of Tables 2 to 4 has the seven of Table 1, Table 3 without MUSIQ; Table 6 is in the paper's order."""
    accuracy = list(agreement.paper_table(6).values())
    assert accuracy == sorted(accuracy, reverse=True) and tuple(agreement.paper_table(6))[:7] == agreement.TOP7
    for part in ("train", "test"):
        assert tuple(agreement.paper_table(2)[part]) == agreement.TOP7
        assert tuple(agreement.paper_table(3)[part]) == tuple(m for m in agreement.TOP7 if m != "musiq")
    assert tuple(agreement.paper_table(4)) == agreement.TOP7
    assert agreement.paper_table(2)["test"]["musiq"] == 82.73 == agreement.paper_accuracy("test")["musiq"]
    assert agreement.paper_table(4)["qalign"] == {"src": 0.20, "pm": 0.39, "nm": 0.63}
    assert agreement.paper_accuracy("phase1")["piqe"] == 46.21 and agreement.paper_accuracy(None) == {}


@pytest.mark.parametrize("parts", [["train"], ["test"], ["train", "test"]])
def test_the_rule_decides_on_the_papers_numbers_as_the_paper_did(parts):
    """Every difference taken as tested: 0.45 points on the training pairs are less than the margin."""
    top7, reported, fails = list(agreement.TOP7), agreement.paper_table(2), agreement.paper_table(3)
    accuracy = {m: np.mean([reported[part][m] for part in parts]) / 100 for m in top7}
    best = max(accuracy, key=accuracy.get)
    table = pd.DataFrame({"accuracy": accuracy, "pm": {m: agreement.paper_table(4)[m]["pm"] for m in top7},
                          "differentiable": True, "measured": True, "less": {m: m != best for m in top7}})
    share = pd.DataFrame(np.nan, top7, top7)
    share.loc["musiq"] = pd.Series({m: np.mean([values[m] for values in fails.values()]) for m in fails["test"]})
    train, keep, tied = agreement.recommend(table, share)
    assert train == "musiq" and set(keep) == {"nima", "qalign", "topiq_nr"} and tied == []
    assert agreement.recommend(table.assign(differentiable=False), share) == (None, [], [])
    assert agreement.recommend(table.assign(accuracy=0.4), share) == (None, [], [])
    # a metric that is always right where others fail, and nearly always wrong
    contrary = table.copy()
    contrary.loc["nima", "accuracy"] = 0.03
    assert "nima" not in agreement.recommend(contrary, share.fillna(0).assign(nima=1.0))[1]


@pytest.mark.skipif(not LABELS.is_dir(), reason="needs ../shared/data/labels")
@pytest.mark.parametrize("name, published", [("alex_vanilla", 0.7119), ("alex_shift_tolerant", 0.7117),
                                             ("vgg_vanilla", 0.7120), ("vgg_shift_tolerant", 0.7107)])
def test_bapps_published_means(name, published):
    file = LABELS / f"bapps_val_superres_2afc_{name}.csv"
    table = pd.read_csv(file, header=None, names=["name", "d0", "d1", "afc", "vote"])
    ours = agreement.two_afc((table.d0 - table.d1).to_numpy()[:, None], table.vote)[:, 0]
    assert ours.mean() == pytest.approx(published, abs=0.00005) and np.abs(ours - table.afc).max() < 1e-6
    assert (table.d0 == table.d1).sum() == 56


# Files

FAULTY_PAIRS = """first,second,vote,pair
A/1.png, B/1.png,0.8,A B
A/1.png,B/1.png,0.8,A B
B/1.png,A/1.png,0.2,A B
A/2.png,B/2.png,1.4,A B
A/3.png,B/3.png,,A B
A/4.png,,0.5,A B
A/5.png,A/5.png,0.5,A B
A/6.png,B/6.png,often,A B
A/7.png,B/7.png,0,A B
"""


def test_a_preference_file_with_every_fault(tmp_path):
    (tmp_path / "p.csv").write_text(FAULTY_PAIRS)
    columns = "left=first,right=second,score=vote"
    pairs, left_out = agreement.read_pairs(tmp_path / "p.csv", columns + ",methods=pair")
    usable = [["A/1.png", "B/1.png", 0.8], ["A/7.png", "B/7.png", 0.0]]
    assert pairs[["left", "right", "score"]].values.tolist() == usable and len(agreement.draw(pairs, 1, 0)) == 1
    for text in ("2 pairs left out: named before; the first vote counts (first: line 3,",
                 "1 pairs left out: the score is outside [0, 1] (first: line 5, A/2.png B/2.png 1.4",
                 "2 pairs left out: the score is no number (first: line 6",
                 "1 pairs left out: an image is not named (first: line 7",
                 "1 pairs left out: an image against itself (first: line 8"):
        assert any(line.startswith(text) for line in left_out), (text, left_out)
    named, _ = agreement.read_pairs(tmp_path / "p.csv", columns, r"^([^/]+)/")
    assert named.left_method.tolist() == ["A", "A"] and named.right_method.tolist() == ["B", "B"]
    by_photo, _ = agreement.read_pairs(tmp_path / "p.csv", columns, None, r"/(\d)\.png$")
    assert by_photo.photo.tolist() == ["1", "7"]
    (tmp_path / "n.csv").write_text("A/1.png,B/1.png,0.8\n")
    assert len(agreement.read_pairs(tmp_path / "n.csv", "left=0,right=1,score=2")[0]) == 1
    # names that look like numbers or missing values, and a comma too many
    (tmp_path / "odd.csv").write_text("left,right,score\n0001,NA,0.8,\n2,nan,0.1,\n")
    odd, _ = agreement.read_pairs(tmp_path / "odd.csv")
    assert odd[["left", "right"]].values.tolist() == [["0001", "NA"], ["2", "nan"]]


def test_preference_files_that_are_refused(tmp_path):
    (tmp_path / "p.csv").write_text(FAULTY_PAIRS)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "bytes.csv").write_bytes(bytes(range(128, 256)))
    (tmp_path / "percent.csv").write_text("left,right,score\na,b,80\na,c,1\nb,c,60\n")
    columns = "left=first,right=second,score=vote"
    for file, words, message in (
            ("p.csv", "left=first,right=second,score=votes", "has no column votes; it has first, second, vote, pair"),
            ("p.csv", "left=first,right=second", r"\(score is missing\)"),
            ("p.csv", "left=first,right=second,score=vote,who=x", r"\(who is unknown\)"),
            ("p.csv", "left=first,right=second,score=vote,photo", r"their numbers from 0$"),
            ("p.csv", "left=0,right=second,score=vote", "names or numbers, not both"),
            ("none.csv", columns, "no such file"),
            ("empty.csv", columns, "not a CSV file"),
            ("bytes.csv", columns, "not a CSV file"),
            ("percent.csv", agreement.COLUMNS, "most votes of .*percent.csv lie between 1 and 100")):
        with pytest.raises(runs.UserError, match=message):
            agreement.read_pairs(tmp_path / file, words)
    for pattern, message in (("(", "not a regular expression"), (".*", "has 0 groups"), ("^(C)/", "no match in A/1")):
        with pytest.raises(runs.UserError, match=message):
            agreement.read_pairs(tmp_path / "p.csv", columns, pattern)


def test_a_score_file_with_every_fault(tmp_path):
    (tmp_path / "s.csv").write_text("image,m,n\na,1,2\nb,nan,2\nc,x,inf\nd,1,1\nd,1,1\ne,1,1\ne,2,1\n")
    scores, left_out = agreement.read_scores(tmp_path / "s.csv")
    assert scores.index.tolist() == ["a", "b", "c", "d"]
    assert scores.m.isna().tolist() == [False, True, True, False]
    assert scores.n.isna().tolist() == [False, False, True, False]
    assert left_out[0].startswith("4 rows of 2 images")
    assert "1 with different scores are left out (first: e)" in left_out[0]
    assert left_out[1:] == ["m: 2 of 4 images have no score (first: b)", "n: 1 of 4 images have no score (first: c)"]
    (tmp_path / "t.csv").write_text("file,m\na,1\n")
    with pytest.raises(runs.UserError, match="needs a column image"):
        agreement.read_scores(tmp_path / "t.csv")


@pytest.mark.fast
@pytest.mark.parametrize("name", ["a.tsv", "A.TSV"])
def test_tabs_separate_a_tsv_file(tmp_path, name):
    (tmp_path / name).write_text("image\tmos\nx, y.png\t3\n")
    assert agreement.read_csv(tmp_path / name, "--mos").to_dict("records") == [{"image": "x, y.png", "mos": "3"}]
