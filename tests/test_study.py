"""study: the balanced design, blind pages clicked through in a browser, files of votes, statistics against scipy."""
import itertools
import json
import random
import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPO
from scipy import stats

import runs
from images import load_image, save_image
from report import opinions
from study import analyze, design, make

SR_STUDY = REPO.parent / "shared/data/human/sr_study"
METHODS = ("zebrafish", "quokka", "narwhal")


# Design

def spread(counts, everything):
    numbers = [counts[one] for one in everything]
    return max(numbers) - min(numbers)


@pytest.mark.fast
def test_the_design_is_balanced_for_any_number_of_raters_and_pairs():
    rng = random.Random(0)
    for _ in range(80):
        methods, photos, raters = rng.randint(2, 5), rng.randint(1, 20), rng.randint(1, 13)
        both = list(itertools.combinations(range(methods), 2))
        items = list(itertools.product(both, range(photos)))
        each = rng.randint(1, min(len(items), 40))
        hands = design.assign(methods, photos, raters, each, rng)
        sides = design.sides(hands, rng)
        assert spread(Counter(itertools.chain(*hands)), items) <= 1
        left = Counter()
        for hand, swapped in zip(hands, sides):
            assert len(hand) == len(set(hand)) == each and set(swapped) <= {0, 1}
            assert spread(Counter(item[0] for item in hand), both) <= 1
            assert spread(Counter(item[1] for item in hand), range(photos)) <= 1
            balance = Counter()
            for item, swap in zip(hand, swapped):
                balance[item[0]] += 2 * swap - 1
                left[item] += 2 * swap - 1
            assert all(abs(n) <= 1 for n in balance.values())
        assert all(abs(n) <= 1 for n in left.values())
    # the paper's: 12 raters x 25 of 100 pairs, every pair three times
    hands = design.assign(2, 100, 12, 25, random.Random(1))
    assert set(Counter(itertools.chain(*hands)).values()) == {3}
    with pytest.raises(runs.UserError, match="--each 31: there are only 30 pairs"):
        design.assign(3, 10, 4, 31, rng)


@pytest.mark.fast
def test_checks_and_repeats_stand_where_they_should():
    files = {method: {f"s{k}": None for k in range(17)} for method in METHODS}
    shown = make.trials(files, 5, 20, True, random.Random(3))
    for trials in shown.values():
        kinds = Counter(trial["kind"] for trial in trials)
        assert kinds == {"pair": 20, "repeat": make.REPEATS, "check": make.CHECKS} and trials[0]["kind"] != "check"
        checks = [trial for trial in trials if trial["kind"] == "check"]
        assert Counter(trial["left"] for trial in checks) == {"original": 2, "enlarged input": 2}
        for n, trial in enumerate(trials):
            if trial["kind"] == "repeat":
                mirrored = {"kind": "pair", "scene": trial["scene"], "left": trial["right"], "right": trial["left"]}
                assert trials.index(mirrored) <= n - 5


# Pages

def write_images(folder, photos=6, size=(60, 88)):
    torch.manual_seed(0)
    for method in (*METHODS, "originals", "inputs"):
        for k in range(photos):
            height, width = (n // 4 for n in size) if method == "inputs" else size
            save_image(folder / method / f"photograph-{k}.png", torch.rand(3, height, width))
    return [str(folder / method) for method in METHODS]


def build(folder, *words):
    folders = write_images(folder)
    make.main(make.parse_args([*folders, "--gt", str(folder / "originals"), "--lr", str(folder / "inputs"),
                               "--raters", "3", "--each", "6", "--out", str(folder / "study"), *words]))
    return json.loads((folder / "study/key.json").read_text())


@pytest.mark.fast
def test_the_page_is_one_file_whose_source_names_nothing(tmp_path, capsys):
    key = build(tmp_path)
    text = (tmp_path / "study/study.html").read_text()
    assert "18 pairs, each shown to 1 of 3 raters" in capsys.readouterr().out
    assert not re.search(r"https?:|<!--", text)
    hidden = [*METHODS, "originals", "inputs", "photograph", "enlarged", str(tmp_path), "check", "repeat"]
    own = (REPO / "study/study.html").read_text() + (REPO / "report/viewer.js").read_text()
    assert [word for word in hidden if word in text and word not in own] == []
    assert not [word for word in (*METHODS, "photograph") if word in text]
    content = json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', text)[1])
    assert content.keys() == {"study", "question", "view", "sizes", "raters"}
    # one picture is one blind name, and names are in random order
    names = {}
    for rater, trials in key["raters"].items():
        assert len(trials) == len(content["raters"][rater]) == 13
        for trial, pair in zip(trials, content["raters"][rater]):
            for side, name in zip(("left", "right"), pair):
                assert names.setdefault((trial[side], trial["scene"]), name) == name
    assert len(set(names.values())) == len(names) == text.count('<script type="text/plain"')
    assert sorted(names, key=names.get) != sorted(names)
    assert set(map(tuple, content["sizes"].values())) == {(88, 60)}


@pytest.mark.fast
def test_split_by_rater_every_file_has_its_own_pictures_only(tmp_path):
    key = build(tmp_path, "--split", "--lossless", "--view", "side", "--question", "Which is <sharper>?")
    for rater, trials in key["raters"].items():
        text = (tmp_path / f"study/study-{rater}.html").read_text()
        shown = {(trial[side], trial["scene"]) for trial in trials for side in ("left", "right")}
        assert text.count('<script type="text/plain"') == len(shown) and "<sharper>" not in text
    with pytest.raises(runs.UserError, match="holds the key of another study"):
        build(tmp_path)


@pytest.mark.fast
def test_what_cannot_be_a_study_is_refused(tmp_path):
    a, b, _ = write_images(tmp_path)
    save_image(tmp_path / "quokka/photograph-0.png", torch.rand(3, 60, 92))
    with pytest.raises(runs.UserError, match=r"photograph-0: .*zebrafish 88x60, quokka 92x60"):
        make.main(make.parse_args([a, b, "--out", str(tmp_path / "out")]))
    with pytest.raises(runs.UserError, match="another name"):
        make.main(make.parse_args([a, a, "--out", str(tmp_path / "out")]))
    # the separator of candidates in choices.csv
    (tmp_path / "new|old").symlink_to(b)
    with pytest.raises(runs.UserError, match=r"without \|"):
        make.main(make.parse_args([a, str(tmp_path / "new|old"), "--out", str(tmp_path / "out")]))
    with pytest.raises(runs.UserError, match="no such folder"):
        make.main(make.parse_args([a, a + "x", "--out", str(tmp_path / "out")]))
    for words in ([a, "--out", "x"], [a, b, "--out", "x", "--gt", a]):
        with pytest.raises(SystemExit):
            make.parse_args(words)


@pytest.mark.fast
def test_folders_of_one_name_and_files_of_other_names_reach_the_readers_of_choices(tmp_path, monkeypatch):
    pixels = {"a": 0.2, "b": 0.8}
    for folder, value in pixels.items():
        for k in range(3):
            save_image(tmp_path / folder / "images" / f"s{k}{'_x' * (folder == 'b')}.png", torch.full((3, 8, 8), value))
    monkeypatch.chdir(tmp_path)
    make.main(make.parse_args(["a/images", "b/images", "--raters", "2", "--out", "study"]))
    key = analyze.read_key(tmp_path / "study/key.json")
    (tmp_path / "votes").mkdir()
    for rater, votes in answer(key, lambda rater, trial: "left").items():
        (tmp_path / "votes" / f"{rater}.json").write_text(json.dumps(votes))
    monkeypatch.chdir("/")
    # a second time over its own links
    for _ in range(2):
        analyze.main(analyze.parse_args([str(tmp_path / "votes"), "--key", str(tmp_path / "study/key.json")]))
    choices, left_out = opinions.read_choices(tmp_path / "study/analysis/choices.csv")
    files = opinions.images_of(choices, tmp_path / "study/analysis/images")
    assert files.keys() == {f"{folder}-images/s{k}" for folder in "ab" for k in range(3)} and not left_out
    for name, file in files.items():
        assert load_image(file).float().mean() / 255 == pytest.approx(pixels[name[0]], abs=0.01)


@pytest.mark.fast
def test_who_has_the_code_cannot_work_out_the_sides(tmp_path):
    one, two = (build(tmp_path / name) for name in "ab")
    assert one["seed"] != two["seed"] and one["raters"] != two["raters"]
    content, again = (re.search('id="data">(.*?)</script>', (tmp_path / name / "study/study.html").read_text())[1]
                      for name in "ab")
    assert str(one["seed"]) not in content and content != again


# In a browser

PHONE = {"viewport": {"width": 390, "height": 780}, "device_scale_factor": 3, "is_mobile": True, "has_touch": True}


class Sitting:
    """A rater at the page, who prefers the method that METHODS names first, and the original to its input."""

    def __init__(self, browser, folder, key, rater, **options):
        self.tab, self.errors = browser.new_context(**options).new_page(), []
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.trials = key["raters"][rater]
        self.address = (folder / "study/study.html").as_uri()
        self.tab.goto(self.address)
        self.tab.locator("#rater").select_option(rater)
        self.tab.locator("#go").click()

    def reach(self, n):
        """Waits for the pair number n, from 0."""
        self.tab.wait_for_function(f"at === {n} && shownAt > 0", timeout=10_000)
        assert self.tab.locator("#place").inner_text() == f"{n + 1} of {len(self.trials)}"

    def better(self, trial):
        order = ("original", *METHODS, "enlarged input")
        return "left" if order.index(trial["left"]) < order.index(trial["right"]) else "right"

    def download(self):
        with self.tab.expect_download() as download:
            self.tab.locator("#save").click()
        return download.value


@pytest.fixture
def built(tmp_path):
    return tmp_path, build(tmp_path)


def test_a_study_by_keyboard_with_a_reload_in_the_middle(built, browser):
    folder, key = built
    rater = Sitting(browser, folder, key, "2")
    tab = rater.tab
    for n, trial in enumerate(rater.trials):
        rater.reach(n)
        # no answer before the pictures were compared, nor by a key that is held down
        tab.keyboard.press("a")
        assert tab.evaluate("at") == n and tab.locator("#a").is_disabled()
        tab.keyboard.press(("ArrowLeft", "ArrowRight", " ")[n % 3])
        tab.keyboard.down("a" if rater.better(trial) == "left" else "b")
        tab.keyboard.down("a")
        tab.keyboard.up("a")
        tab.keyboard.up("b")
        if n == 4:
            # a slip, and back
            rater.reach(5)
            tab.keyboard.press("Backspace")
            rater.reach(4)
            tab.keyboard.press("1" if rater.better(trial) == "left" else "2")
        if n == 6:
            rater.reach(7)
            tab.reload()
            assert tab.locator("#go").inner_text() == "go on" and tab.locator("#rater").input_value() == "2"
            tab.locator("#go").click()
    download = rater.download()
    votes = json.loads(download.path().read_text())
    assert download.suggested_filename == f"votes-{key['study']}-2.json" and rater.errors == []
    assert votes == json.loads(tab.locator("#text").input_value())
    assert [answer["choice"] for answer in votes["answers"]] == [rater.better(trial) for trial in rater.trials]
    assert votes.keys() == {"format", "study", "rater", "session", "view", "screen", "finished", "answers"}
    assert analyze.read_file(download.path(), key)["rater"] == "2"


def test_a_study_by_mouse_and_one_on_a_phone_are_analysed(built, browser, monkeypatch):
    # playwright is faster than people
    monkeypatch.setattr(analyze, "FASTEST", 0)
    folder, key = built
    (folder / "votes").mkdir()
    for name, options in (("1", {"viewport": {"width": 1280, "height": 720}}), ("3", PHONE)):
        rater = Sitting(browser, folder, key, name, **options)
        tab = rater.tab
        for n, trial in enumerate(rater.trials):
            rater.reach(n)
            size = tab.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
            assert size == list(options["viewport"].values())
            box = tab.locator("#slider .window").bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            tab.mouse.move(x, y)
            tab.mouse.down()
            tab.mouse.move(x + 40, y)
            tab.mouse.up()
            assert tab.locator("#split").input_value() > "500"
            button = tab.locator("#a" if rater.better(trial) == "left" else "#b")
            assert button.bounding_box()["height"] >= 44
            (button.tap if name == "3" else button.click)()
        rater.download().save_as(folder / "votes" / f"{name}.json")
        assert rater.errors == []
    analyze.main(analyze.parse_args([str(folder / "votes"), "--key", str(folder / "study/key.json")]))
    result = json.loads((folder / "study/analysis/analysis.json").read_text())
    assert list(result["strengths"]) == list(METHODS) and result["votes"] == 12
    assert result["preference"]["quokka"]["mean"] == result["preference"]["narwhal"]["mean"] == 1.0
    assert all(row["right"] == 4 and row["alike"] == 3 and not row["reason"] for row in result["rater_table"].values())
    # what analyze_iqa.py and the trainers of rewards read
    from report import agreement
    pairs, left_out = agreement.read_pairs(folder / "study/analysis/pairs.csv", "left=left,right=right,score=score,"
                                           "methods=left_method+right_method,photo=photo")
    assert len(pairs) == 12 and not left_out and all(map(runs.Path.is_file, map(runs.Path, pairs.left)))
    assert all((row.score == 1) == (METHODS.index(row.right_method) < METHODS.index(row.left_method))
               for row in pairs.itertuples())
    choices, left_out = opinions.read_choices(folder / "study/analysis/choices.csv")
    assert len(choices) == 12 and not left_out


def test_two_tabs_of_one_rater_do_not_lose_each_others_answers(built, browser):
    rater = Sitting(browser, *built, "1")
    rater.reach(0)
    other = rater.tab.context.new_page()
    other.goto(rater.address + "#1")
    other.locator("#go").click()
    for n, tab, key in ((0, other, "b"), (1, other, "b"), (0, rater.tab, "a")):
        tab.bring_to_front()
        tab.wait_for_function(f"at === {n} && shownAt > 0")
        tab.keyboard.press("ArrowLeft")
        tab.keyboard.press(key)
    rater.reach(2)
    assert rater.tab.evaluate("state.answers.map(one => one.choice)") == ["left", "right"]


@pytest.mark.parametrize("view", ["flip", "side"])
def test_the_other_views(tmp_path, browser, view):
    key = build(tmp_path, "--view", view)
    rater = Sitting(browser, tmp_path, key, "1", **PHONE)
    rater.reach(0)
    shown = "() => [...document.querySelectorAll('.window')].filter(p => p.clientWidth).length"
    assert rater.tab.evaluate(shown) == (2 if view == "side" else 1)
    if view == "flip":
        assert rater.tab.locator("#a").is_disabled() and rater.tab.locator("#name-a").inner_text() == "A"
        rater.tab.locator("#hold").dispatch_event("pointerdown", {"pointerId": 1})
        rater.tab.keyboard.down(" ")
        assert rater.tab.locator("#name-a").inner_text() == "B"
        rater.tab.keyboard.up(" ")
        # a picture larger than the window
        assert "shrunk" not in rater.tab.locator("#hint").inner_text()
        rater.tab.evaluate("Object.values(data.sizes).forEach(size => size.fill(2000)); show(0)")
        rater.reach(0)
        assert "shrunk" in rater.tab.locator("#hint").inner_text()
        rater.tab.locator("#hold").dispatch_event("pointerdown", {"pointerId": 1})
    else:
        rater.tab.locator("#larger").tap()
        transforms = rater.tab.evaluate("() => [...document.querySelectorAll('#two img')].map(i => i.style.transform)")
        assert len(transforms) == 2 and len(set(transforms)) == 1
    rater.tab.locator("#a").tap()
    rater.reach(1)


# Files of votes

def answer(key, choose, seconds=5.0):
    """{rater: a file of votes, as the page saves it}; choose: function of (rater, trial) -> "left" or "right"."""
    return {rater: {"format": 1, "study": key["study"], "rater": rater, "session": f"s{rater}", "finished": "2026-01",
                    "answers": [{"choice": choose(rater, t), "seconds": seconds, "scale": 1.0} for t in trials]}
            for rater, trials in key["raters"].items()}


def key_of(methods, photos, raters, each, seed=0, checks=False):
    files = {method: {f"s{k}": f"{method}/s{k}.png" for k in range(photos)} for method in methods}
    shown = make.trials(files, raters, each, checks, random.Random(seed))
    return {"study": "abc", "methods": list(methods), "files": files, "raters": shown}


@pytest.mark.fast
def test_files_that_cannot_count_are_named_and_left_out(tmp_path):
    key = key_of(METHODS, 5, 7, 6)
    votes = answer(key, lambda rater, trial: "left")
    votes["2"]["answers"][3] = None
    votes["3"]["study"] = "other"
    votes["4"]["answers"][0] = {"choice": "middle", "seconds": 1, "scale": 1}
    again, corrected = votes["5"] | {"session": "new", "finished": "2026-03"}, votes["5"] | {"finished": "2026-02"}
    files = {f"{r}.json": json.dumps(v) for r, v in votes.items()} | {
        "5b.json": json.dumps(again), "5c.json": json.dumps(corrected), "6.json": json.dumps(votes["6"])[:-20],
        "key.json": json.dumps(key), "list.json": "[1]", "9.json": json.dumps(votes["1"] | {"rater": "9"}),
        "deep.json": "[" * 100_000, "digits.json": "1" * 5000}
    for name, seconds in (("nan", float("nan")), ("inf", float("inf")), ("minus", -1)):
        timed = [one | {"seconds": seconds} for one in votes["1"]["answers"]]
        files[f"{name}.json"] = json.dumps(votes["1"] | {"answers": timed})
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    counted, left_out = analyze.read_votes(tmp_path, key)
    assert list(counted) == ["1", "5", "7"] and counted["5"]["finished"] == "2026-02"
    reasons = dict(line.split(": ", 1) for line in left_out)
    assert reasons.keys() == files.keys() - {"1.json", "5c.json", "7.json"} | {"photo.jpg", "folder", "link"}
    assert reasons["2.json"].startswith("incomplete: 8 of 9 pairs") and reasons["3.json"].startswith("of another study")
    assert reasons["4.json"].startswith("damaged") and reasons["6.json"].startswith("damaged")
    assert {reasons[f"{name}.json"].split(":")[0] for name in ("deep", "digits", "nan", "inf", "minus")} == {"damaged"}
    assert reasons["5.json"] == reasons["5b.json"] == "a second file of rater 5; 5c.json counts"
    assert reasons["key.json"] == reasons["list.json"] == "no file of votes" and "rater 9" in reasons["9.json"]
    with pytest.raises(runs.UserError, match="no complete file of votes of study none"):
        analyze.read_votes(tmp_path, key | {"study": "none"})
    (tmp_path / "key.json").write_text("{}")
    with pytest.raises(runs.UserError, match="not the key.json of a study"):
        analyze.read_key(tmp_path / "key.json")


@pytest.mark.fast
def test_raters_are_screened_by_checks_and_haste():
    key = key_of(METHODS, 8, 4, 10, checks=True)

    def right(trial):
        return "left" if trial["left"] == "original" else "right"
    votes = answer(key, lambda rater, trial: right(trial))
    votes["2"] = answer(key, lambda rater, trial: "left")["2"]
    votes["3"] = answer(key, lambda rater, trial: right(trial), seconds=0.4)["3"]
    # one slip is allowed
    n = next(n for n, trial in enumerate(key["raters"]["4"]) if trial["kind"] == "check")
    votes["4"]["answers"][n]["choice"] = "left" if right(key["raters"]["4"][n]) == "right" else "right"
    raters = analyze.describe_raters(key, votes)
    assert raters.reason.to_dict() == {"1": "", "2": "2 of 4 checks wrong", "3": "median of 0.4 s per pair", "4": ""}
    # who always says left contradicts himself on every mirrored pair
    assert raters.alike["2"] == 0 and raters.left["2"] == 1 and raters.right.tolist() == [4, 2, 4, 3]
    assert set(raters.scale) == {1.0}


# Statistics

@pytest.mark.fast
def test_the_papers_statistics_against_scipy():
    shares = np.array([0.52, 0.6, 0.64, 0.72, 0.68, 0.96, 0.88, 0.44, 0.68, 0.8, 0.76, 0.68])
    found = analyze.preference(shares)
    reference = stats.ttest_1samp(shares, 0.5, alternative="greater")
    low, high = stats.ttest_1samp(shares, 0.5).confidence_interval(0.95)
    assert (found["t"], found["p"]) == pytest.approx((reference.statistic, reference.pvalue))
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert (found["se"], found["median"]) == pytest.approx((stats.sem(shares), 0.68))
    # 12 raters with the paper's mean and standard error (4.8, as rounded): its [60.2, 79.1] and p < 0.01
    scaled = 0.697 + (shares - shares.mean()) / stats.sem(shares) * 0.0482
    found = analyze.preference(scaled)
    assert (found["normal_low"], found["normal_high"]) == pytest.approx((0.602, 0.791), abs=6e-4) and found["p"] < 0.01
    # one rater, or raters who all agree, show no spread
    for shares in ([0.7], [1.0, 1.0, 1.0]):
        found = analyze.preference(shares)
        assert found["mean"] == shares[0] and np.isnan([found["p"], found["low"], found["se"]]).all()


@pytest.mark.fast
def test_agreement_by_hand():
    rows = [("1", "s", ("A", "B"), "A"), ("2", "s", ("B", "A"), "A"), ("3", "s", ("A", "B"), "B"),
            ("1", "t", ("A", "C"), "C"), ("2", "t", ("A", "C"), "C"), ("1", "t", ("A", "B"), "A")]
    found = analyze.agreement(pd.DataFrame(rows, columns=["observer", "scene", "candidates", "selected"]))
    # s: 1 of 3 couples of raters alike; t: 1 of 1; the last pair was seen once
    assert found["agreement"] == pytest.approx(2 / 4) and found["compared"] == 4 and found["u"] == pytest.approx(0)
    assert found["majority"] == pytest.approx((2 + 2 + 1) / 6)


def draw_study(rng, methods, quality, photos=40, raters=12, each=25, tastes=0.5, scenes=0.5):
    """Answers of raters with tastes of their own to photographs that favour one method or the other."""
    key = key_of(methods, photos, raters, each, seed=int(rng.integers(2**31)))
    liked = {rater: dict(zip(methods, rng.normal(0, tastes, len(methods)))) for rater in key["raters"]}
    favoured = {f"s{k}": dict(zip(methods, rng.normal(0, scenes, len(methods)))) for k in range(photos)}

    def choose(rater, trial):
        gap = sum(sign * (quality[m] + liked[rater][m] + favoured[trial["scene"]][m])
                  for sign, m in ((1, trial["left"]), (-1, trial["right"])))
        return "left" if rng.random() < 1 / (1 + np.exp(-gap)) else "right"
    return analyze.choices_of(key, answer(key, choose))


def test_intervals_of_simulated_studies_hold_the_truth():
    rng = np.random.default_rng(0)
    quality = {"a": 0.9, "b": 0.0}
    # the population's preference: the mean over tastes and photographs
    gaps = 0.9 + rng.normal(0, np.sqrt(4 * 0.25), 400_000)
    truth, held, held_by_both = (1 / (1 + np.exp(-gaps))).mean(), 0, 0
    for _ in range(100):
        found = analyze.against(draw_study(rng, "ab", quality), "a")["b"]
        held += found["low"] <= truth <= found["high"]
        held_by_both += found["both_low"] <= truth <= found["both_high"]
    assert held >= 90 and held_by_both >= 95
    quality, held = {"a": 0.5, "b": 0.0, "c": -0.5}, 0
    # without tastes the model of Bradley and Terry is the true one, and its strengths are those of the population
    for _ in range(100):
        table = opinions.bradley_terry(draw_study(rng, "abc", quality, tastes=0, scenes=0), ["observer", "scene"], 100)
        held += np.mean([table.low[m] <= quality[m] <= table.high[m] for m in "abc"])
    assert held >= 90


@pytest.mark.fast
def test_power_against_simulated_tests():
    rng = np.random.default_rng(0)
    for share, raters, each, spread_ in ((0.6, 12, 25, 0.14), (0.697, 6, 50, 0.1)):
        own = rng.normal(share, np.sqrt(spread_**2 + share * (1 - share) / each), (20_000, raters))
        found = (stats.ttest_1samp(own, 0.5, axis=1, alternative="greater").pvalue < 0.05).mean()
        assert analyze.power(share, raters, each, spread_) == pytest.approx(found, abs=0.012)


@pytest.mark.skipif(not SR_STUDY.exists(), reason="needs the real study's choices in ../shared")
def test_real_choices_equal_a_hand_computation():
    from experiments import votes
    found = analyze.summarise(votes.read_study(SR_STUDY)[0]["pairs"], "ResShift")
    hand = votes.by_hand(SR_STUDY / "pairs.csv")
    assert found["won"] == hand["won"] and list(found["strengths"]) == ["ResShift", "SwinIR", "RealESRGAN", "BSRGAN"]
    assert {m: row["strength"] for m, row in found["strengths"].items()} == pytest.approx(hand["strengths"], abs=1e-4)
    assert {m: row["mean"] for m, row in found["preference"].items()} == pytest.approx(hand["preference"])
    assert found["agreement"]["agreement"] == pytest.approx(hand["agreement"])
    assert found["agreement"]["majority"] == pytest.approx(hand["majority"])
