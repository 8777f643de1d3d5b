"""data.py: labels, samplers (Eq. 2-4), aligned crops, the order of samples, the pair pool, and bad data sets."""
import itertools
import json
import shutil
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import data
import runs
from data import NEGATIVE, ORIGINAL, POSITIVE, SIMILAR, TrainingPool, TrainingSet, pick_gt, sampling_probs
from images import list_images, load_image, save_image
from report import pictures

pytestmark = pytest.mark.fast

VERSIONS = ["original", "01", "02", "03", "04"]
SEEDS = partial(runs.sample_seed, 7)
NAME = {POSITIVE: "Positive", SIMILAR: "Similar", NEGATIVE: "Negative"}


def coordinates(h, w, version, stem=0):
    """(3, h, w) uint8 image whose pixels tell their place: red = column, green = row, blue = version and stem."""
    y, x = np.mgrid[:h, :w]
    return torch.from_numpy(np.stack([x, y, np.full((h, w), 20 * stem + version)]).astype(np.uint8))


def write_sets(root, stems, versions=VERSIONS, size=(64, 96), train="Train/images/0-2"):
    for n, stem in enumerate(stems):
        for v, version in enumerate(versions):
            save_image(root / train / version / f"{stem}{f'_{version}' if v else ''}.png", coordinates(*size, v, n))
    return root


def write_label(path, stem, codes, order=None, change=lambda entries: None):
    """An annotator's JSON. codes: {version: code}; order: of the Picture numbers; change edits the entries in place."""
    entries = [{"Name": f"{stem}.png", "File": "original", "Label": None}]
    entries += [{"Name": f"{stem}_{v}.png", "File": v, "Label": NAME[c]} for v, c in codes.items()]
    entries = {f"Picture_{i + 1}": entries[k] for i, k in enumerate(order or range(len(entries)))}
    change(entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries | {"Time_cost": {"Start": "1", "End": "2", "Total": 1}}))


def plain(sets, sampler="amo", batch_size=4, group_size=2, crop=32, **options):
    return TrainingSet(sets, sampler, SEEDS, batch_size, group_size, crop, **options)


@pytest.fixture
def root(tmp_path):
    """Three patches of two photos, 96 x 64 pixels, five versions, no labels."""
    return write_sets(tmp_path / "set", ["cat-0-0", "cat-0-288", "dog-0-0"])


@pytest.fixture
def sets(root):
    return data.find_sets(root, "Train")


# Labels

def test_merged_vote_is_the_majority_and_three_different_votes_are_similar():
    for votes in itertools.product((POSITIVE, SIMILAR, NEGATIVE), repeat=3):
        most, times = Counter(votes).most_common(1)[0]
        assert data.vote(*votes) == (most if times >= 2 else SIMILAR), votes
    assert {data.vote(*votes) for votes in itertools.permutations((POSITIVE, SIMILAR, NEGATIVE))} == {SIMILAR}


def test_labels_are_merged_per_version_and_column_0_is_the_original(root):
    votes = {"A": [POSITIVE, SIMILAR, NEGATIVE, POSITIVE], "B": [POSITIVE, NEGATIVE, NEGATIVE, SIMILAR],
             "C": [NEGATIVE, SIMILAR, NEGATIVE, NEGATIVE]}
    for stem, (annotator, codes) in itertools.product(["cat-0-0", "cat-0-288", "dog-0-0"], votes.items()):
        write_label(root / "Train/labels/0-2" / annotator / f"{stem}.json", stem, dict(zip(VERSIONS[1:], codes)))
    labels = data.find_sets(root, "Train").labels()
    assert labels.tolist() == [[ORIGINAL, POSITIVE, SIMILAR, NEGATIVE, SIMILAR]] * 3 and labels.dtype == torch.int64


def test_label_follows_file_and_not_the_picture_number(tmp_path):
    codes = {"01": POSITIVE, "02": NEGATIVE, "03": SIMILAR, "04": NEGATIVE}
    for order in itertools.permutations(range(5)):
        write_label(tmp_path / "a-0-0.json", "a-0-0", codes, order)
        assert data.read_label(tmp_path / "a-0-0.json", "a-0-0", VERSIONS) == codes | {"original": ORIGINAL}


def edit(key, field, value):
    return lambda entries: entries[key].update({field: value})


@pytest.mark.parametrize("change, message", [
    (edit("Picture_3", "File", "07"), "Picture_3 has File '07'"),
    (edit("Picture_3", "File", None), "Picture_3 has File None"),
    # this version is named twice
    (edit("Picture_3", "File", "01"), "Picture_3 has File '01'.*once"),
    (edit("Picture_1", "File", "04"), "names 'a-0-0.png', which is not version '04'"),
    (edit("Picture_3", "Name", "b-0-0_02.png"), "names 'b-0-0_02.png', which is not version '02' of a-0-0"),
    (edit("Picture_3", "Name", "a-0-0_03.png"), "which is not version '02'"),
    (edit("Picture_3", "Label", "Good"), "Picture_3 has Label 'Good'; expected one of .*Positive"),
    (edit("Picture_3", "Label", None), "Picture_3 has Label None"),
    (lambda entries: entries.pop("Picture_5"), r"no label for version\(s\) \['04'\]"),
    (lambda entries: entries.update(Picture_2=["01", "Positive"]), "Picture_2 is .*expected an object"),
])
def test_unexpected_label_entry_is_refused(tmp_path, change, message):
    write_label(tmp_path / "a.json", "a-0-0", dict.fromkeys(VERSIONS[1:], SIMILAR), change=change)
    with pytest.raises(ValueError, match=message) as error:
        data.read_label(tmp_path / "a.json", "a-0-0", VERSIONS)
    assert "a.json" in str(error.value)


def test_unreadable_label_file_is_refused(tmp_path):
    for text in ('{"Picture_1": ', "[1, 2]"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match="a.json: not a label file"):
            data.read_label(tmp_path / "a.json", "a", VERSIONS)


@pytest.mark.parametrize("annotator", "ABC")
def test_labels_of_two_annotators_are_refused(root, annotator):
    for stem, name in itertools.product(["cat-0-0", "cat-0-288", "dog-0-0"], sorted({*"ABC"} - {annotator})):
        write_label(root / "Train/labels/0-2" / name / f"{stem}.json", stem, dict.fromkeys(VERSIONS[1:], SIMILAR))
    with pytest.raises(ValueError, match=f"labels/0-2/{annotator}/cat-0-0.json: label missing.*three annotators"):
        data.find_sets(root, "Train").labels()


def test_missing_label_file_and_missing_label_folder_are_named(root, sets):
    with pytest.raises(ValueError, match="no labels beside it.*upos and smp need them"):
        sets.labels()
    for stem, name in itertools.product(["cat-0-0", "cat-0-288", "dog-0-0"], "ABC"):
        write_label(root / "Train/labels/0-2" / name / f"{stem}.json", stem, dict.fromkeys(VERSIONS[1:], SIMILAR))
    (root / "Train/labels/0-2/B/dog-0-0.json").unlink()
    with pytest.raises(ValueError, match="B/dog-0-0.json: label missing"):
        data.find_sets(root, "Train").labels()


def test_only_upos_and_smp_drop_sets_without_a_positive(sets):
    labels = torch.tensor([[0, 1, 2, 1, 3], [0, 2, 3, 2, 2], [0, 2, 2, 2, 1]])
    scores = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    for sampler in data.SAMPLERS:
        kept = plain(sets, sampler, labels=labels, scores=scores)
        needs = sampler in ("upos", "smp")
        assert (len(kept), kept.dropped) == ((2, 1) if needs else (3, 0)), sampler
        if needs:
            # the scores follow their sets
            assert kept.stems == ["cat-0-0", "dog-0-0"] and torch.equal(kept.scores, scores[[0, 2]])
    with pytest.raises(ValueError, match="no quintuplet is left.*upos"):
        plain(sets, "upos", labels=torch.full((3, 5), SIMILAR))


# Samplers, Eq. 2-4

def test_candidates_are_all_versions_or_the_positive_ones():
    labels = torch.tensor([[0, 1, 2, 3, 1]])
    every, positive = [[True] * 5], [[False, True, False, False, True]]
    for sampler in ("rand", "sma", "amo"):
        assert data.candidates_for(sampler, labels).tolist() == every
    for sampler in ("upos", "smp"):
        assert data.candidates_for(sampler, labels).tolist() == positive
    assert data.candidates_for("orig", labels).tolist() == [[True, False, False, False, False]]
    with pytest.raises(ValueError, match="unknown sampler 'best'.*orig, rand, upos, sma, smp, amo"):
        data.candidates_for("best", labels)


def test_ten_points_are_a_factor_e_at_the_papers_tau():
    probs = sampling_probs(torch.tensor([[60.0, 70, 80]]), torch.ones(1, 3, dtype=torch.bool), tau=10)
    assert probs[0].tolist() == pytest.approx([0.0900305731703805, 0.244728471054798, 0.665240955774822], abs=1e-12)
    assert (probs[0, 1:] / probs[0, :-1]).tolist() == pytest.approx([np.e, np.e])


def test_probabilities_are_zero_off_the_candidates_and_sum_to_one():
    candidates = torch.tensor([[True, False, True, False], [False, True, False, False], [True, True, True, True]])
    probs = sampling_probs(torch.tensor([[50.0, 99, 60, torch.nan], [1, 2, 3, 4], [50, 50, 50, 50]]), candidates, 10)
    assert probs[0].tolist() == pytest.approx([1 / (1 + np.e), 0, np.e / (1 + np.e), 0])
    assert probs[0, 1] == probs[0, 3] == 0
    assert probs[1].tolist() == [0, 1, 0, 0] and probs[2].tolist() == [0.25] * 4
    assert probs.dtype == torch.float64 and torch.allclose(probs.sum(1), torch.ones(3).double())


def test_probabilities_are_uniform_as_tau_grows_and_arg_max_as_it_shrinks():
    scores, candidates = torch.tensor([[60.0, 71, 70, 80]]), torch.tensor([[True, True, True, False]])
    assert sampling_probs(scores, candidates, 1e9)[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=1e-7)
    assert sampling_probs(scores, candidates, torch.inf)[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert sampling_probs(scores, candidates, 1e-3)[0].tolist() == [0, 1, 0, 0]


def test_useless_tau_scores_and_candidates_are_refused():
    scores, candidates = torch.tensor([[1.0, torch.nan]]), torch.tensor([[True, False]])
    for tau in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="tau must be > 0"):
            sampling_probs(scores, candidates, tau)
    with pytest.raises(ValueError, match="no candidate GT"):
        sampling_probs(scores, ~candidates & candidates, 10)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="not finite"):
            sampling_probs(torch.tensor([[1.0, bad]]), torch.tensor([[True, True]]), 10)


SCORES = torch.tensor([55.0, 60, 70, 62, 48])
# each sampler's probabilities for labels original, Positive, Similar, Negative, Positive
EXPECTED = {
    "orig": [1, 0, 0, 0, 0],
    "rand": [1 / 5] * 5,
    "upos": [0, 1 / 2, 0, 0, 1 / 2],
    "sma": (np.exp(SCORES.double().numpy() / 10) / np.exp(SCORES.double().numpy() / 10).sum()).tolist(),
    "smp": [0, 1 / (1 + np.exp(-1.2)), 0, 0, 1 / (1 + np.exp(1.2))],
    "amo": [0, 0, 1, 0, 0],
}


@pytest.mark.parametrize("sampler", ["sma", "smp", "amo"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_candidate_whose_score_is_not_finite_is_never_chosen(sampler, bad):
    labels = torch.tensor([[ORIGINAL, POSITIVE, SIMILAR, NEGATIVE, POSITIVE]] * 2)
    scores = torch.tensor([[55.0, bad, bad, bad, 48.0], [bad] * 5])
    candidates = data.candidates_for(sampler, labels)
    chosen = {tuple(data.pick_gt(sampler, candidates, scores, 10, [u, u]).tolist()) for u in np.linspace(0, 0.999, 50)}
    # where no score is finite: the original
    assert chosen == {"sma": {(0, 0), (4, 0)}, "smp": {(4, 0)}, "amo": {(0, 0)}}[sampler]
    assert torch.equal(candidates, data.candidates_for(sampler, labels))


@pytest.mark.parametrize("sampler", data.SAMPLERS)
def test_versions_are_chosen_with_the_samplers_frequencies(sampler):
    n = 20_000
    labels = torch.tensor([[ORIGINAL, POSITIVE, SIMILAR, NEGATIVE, POSITIVE]])
    candidates = data.candidates_for(sampler, labels).expand(n, 5)
    index = pick_gt(sampler, candidates, SCORES.expand(n, 5), 10.0, np.random.default_rng(5).random(n))
    counts, expected = np.bincount(index, minlength=5), np.array(EXPECTED[sampler])
    assert index.shape == (n,) and index.dtype == torch.int64 and not counts[expected == 0].any()
    if (expected > 0).sum() > 1:
        assert stats.chisquare(counts[expected > 0], n * expected[expected > 0]).pvalue > 1e-3, counts / n


@pytest.mark.parametrize("sampler", ["rand", "sma"])
def test_draws_are_the_inverse_of_the_cumulated_probabilities_and_stay_inside_the_candidates_at_both_ends(sampler):
    for bits in range(1, 32):
        mask = torch.tensor([[bool(bits >> k & 1) for k in range(5)]])
        inside = mask[0].nonzero()[:, 0].tolist()
        picks = [pick_gt(sampler, mask, SCORES[None], 10.0, np.array([u])).item() for u in (0.0, 1 - 2 ** -53)]
        assert picks == [inside[0], inside[-1]]
        probs = sampling_probs(SCORES[None] if sampler == "sma" else torch.zeros(1, 5), mask, 10.0)[0].tolist()
        for u in (0.1, 0.35, 0.5, 0.77, 0.93):
            assert pick_gt(sampler, mask, SCORES[None], 10.0, np.array([u])).item() == \
                next(k for k in range(5) if u < sum(probs[:k + 1])), (bits, u)
    # a version whose probability rounds to zero is never drawn
    far = torch.tensor([[9000.0, 0, 0], [0, 9000, 0]])
    for u in (0.0, 1 - 2 ** -53):
        assert pick_gt("sma", torch.ones(2, 3, dtype=torch.bool), far, 10.0, np.full(2, u)).tolist() == [0, 1]


def test_amo_takes_the_best_candidate_and_ties_go_to_the_original():
    # rounded, so that there are many ties
    scores = torch.rand(200, 5, generator=torch.Generator().manual_seed(1)).mul(4).round()
    picks = pick_gt("amo", data.candidates_for("amo", torch.zeros(200, 5)), scores).tolist()
    assert picks == [max(range(5), key=lambda k: (row[k], -k)) for row in scores.tolist()]
    assert pick_gt("amo", data.candidates_for("amo", torch.zeros(1, 5)), torch.full((1, 5), 3.0)).tolist() == [0]
    without_original = torch.tensor([[False, True, True, True, True]])
    assert pick_gt("amo", without_original, torch.full((1, 5), 3.0)).tolist() == [1]


# Training samples

def places(sample):
    """(stem, flipped, left, top of the window; x, y of each crop inside it) read from the pixels of a sample."""
    red, green, blue = sample["original"].int()
    flipped = bool(red[0, 0] > red[0, -1])
    window = (int(red[0].min()), int(green[0, 0]))
    crops = [(int(abs(c[0, 0, 0].int() - red[0, 0])), int(c[1, 0, 0]) - window[1]) for c in sample["crops"]]
    return int(blue[0, 0]) // 20, flipped, window, crops


@pytest.mark.parametrize("load_size", [0, 48])
def test_all_five_versions_share_one_flip_window_and_crop(sets, load_size):
    dataset, seen = plain(sets, load_size=load_size), set()
    for step, lane in itertools.product(range(1, 20), range(4)):
        sample = dataset.sample(step, lane)
        stem, flipped, (left, top), crops = places(sample)
        h, w = (load_size, load_size) if load_size else (64, 96)
        y, x = sample["where"].tolist()
        # every image, cut out of its file by hand
        for v in range(5):
            image = coordinates(64, 96, v, stem)[:, top:top + h, left:left + w]
            image = torch.from_numpy(image.numpy()[:, :, ::-1].copy()) if flipped else image
            assert torch.equal(sample["crops"][v], image[:, y:y + 32, x:x + 32])
            assert v or torch.equal(sample["original"], image)
        assert crops == [(x, y)] * 5 and sample["version"].tolist() == [0, 1, 2, 3, 4] and sample["candidates"].all()
        assert sample["original"].dtype == sample["crops"].dtype == torch.uint8
        seen.add((flipped, left, top))
    assert {flipped for flipped, *_ in seen} == {True, False} and (len(seen) > 20 if load_size else len(seen) == 2)


def test_crops_stand_on_the_lr_grid_and_reach_both_ends_uniformly(sets):
    dataset = plain(sets, "orig", group_size=1)
    where = np.array([places(dataset.sample(step, lane))[3][0] for step in range(1, 300) for lane in range(4)])
    assert not (where % 4).any()
    for axis, positions in ((0, (96 - 32) // 4 + 1), (1, (64 - 32) // 4 + 1)):
        counts = np.bincount(where[:, axis] // 4, minlength=positions)
        assert len(counts) == positions and stats.chisquare(counts).pvalue > 1e-3


def test_sizes_that_are_no_multiple_of_4_lose_their_last_pixels(tmp_path):
    sets = data.find_sets(write_sets(tmp_path, ["a"], size=(51, 62)), "Train")
    for lane in range(4):
        sample = plain(sets, crop=48).sample(1, lane)
        assert sample["original"].shape == (3, 48, 60) and sample["crops"].shape == (5, 3, 48, 48)
        # the image is cut before the flip, so both have the same pixels
        assert int(sample["original"][0].max()) == 59


def test_lanes_of_a_group_share_the_crop_position_and_groups_differ(sets):
    dataset = plain(sets, "orig", batch_size=8, group_size=4)
    same = 0
    for step in range(1, 40):
        where = [tuple(dataset.sample(step, lane)["where"].tolist()) for lane in range(8)]
        assert len(set(where[:4])) == len(set(where[4:])) == 1
        same += where[0] == where[4]
    # there are 153 positions, so few coincide by chance
    assert same < 5


def test_flips_are_per_sample_with_probability_one_half(sets):
    dataset = plain(sets, "orig", batch_size=8, group_size=4)
    flips = np.array([[places(dataset.sample(step, lane))[1] for lane in range(8)] for step in range(1, 100)])
    assert stats.binomtest(int(flips.sum()), flips.size).pvalue > 1e-3
    assert (flips[:, 0] != flips[:, 1]).any() and len({tuple(row) for row in flips}) > 50


@pytest.mark.parametrize("sampler", data.SAMPLERS)
def test_only_what_the_sampler_needs_is_decoded_each_file_once(sets, sampler, monkeypatch):
    opened, load = [], load_image
    monkeypatch.setattr(data, "load_image", lambda path: opened.append(path) or load(path))
    dataset = plain(sets, sampler, labels=torch.tensor([[0, 1, 2, 2, 1]] * 3), scores=torch.full((3, 5), 50.0))
    amounts = Counter()
    for step, lane in itertools.product(range(1, 11), range(4)):
        opened.clear()
        sample = dataset.sample(step, lane)
        assert len(opened) == len(set(opened)) and sum(p.parent.name == "original" for p in opened) == 1
        assert len(sample["crops"]) == (5 if sampler == "amo" else 1)
        version = sample["version"].tolist()
        assert {p.parent.name for p in opened} == {"original", *(VERSIONS[v] for v in version)}
        # the crop is of the version it claims
        assert sample["crops"][-1][2, 0, 0].item() % 20 == version[-1]
        amounts[len(opened)] += 1
    assert set(amounts) == {"amo": {5}, "orig": {1}, "upos": {2}, "smp": {2}, "rand": {1, 2}, "sma": {1, 2}}[sampler]


def test_training_draws_follow_the_static_scores(sets):
    scores = torch.tensor([[55.0, 60, 70, 62, 48]] * 3)
    dataset = plain(sets, "sma", scores=scores)
    drawn = [dataset.sample(step, lane)["version"].item() for step in range(1, 300) for lane in range(4)]
    assert stats.chisquare(np.bincount(drawn, minlength=5), np.array(EXPECTED["sma"]) * len(drawn)).pvalue > 1e-3


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_samples_depend_on_seed_step_and_lane_alone(sets):
    a, b = (list(data.batches(plain(sets, "rand", load_size=48), 1, 6, range(4), workers, False)) for workers in (0, 2))
    halves = [list(data.batches(plain(sets, "rand", load_size=48), 1, 6, lanes, 0, False))
              for lanes in (range(2), range(2, 4))]
    late = list(data.batches(plain(sets, "rand", load_size=48), 4, 6, range(4), 0, False))
    backwards = plain(sets, "rand", load_size=48)
    for step in range(6, 0, -1):
        samples = {lane: backwards.sample(step, lane) for lane in (2, 0, 3, 1)}
        assert equal(a[step - 1], data.collate([samples[lane] for lane in range(4)])), "order"
    assert all(map(equal, a, b)), "workers"
    assert all(equal(whole, {k: torch.cat([x[k], y[k]]) for k in x}) for whole, x, y in zip(a, *halves)), "ranks"
    assert all(map(equal, a[3:], late)), "start"
    other = TrainingSet(sets, "rand", partial(runs.sample_seed, 8), 4, 2, 32, 48)
    assert not equal(a[0], next(data.batches(other, 1, 1, range(4), 0, False)))
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    backwards.sample(1, 0)
    assert torch.equal(state[0], torch.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()


def test_every_epoch_visits_each_set_once_in_another_order(tmp_path):
    root = write_sets(tmp_path, [f"p-{n}-0" for n in range(11)], size=(8, 8), versions=VERSIONS[:2])
    sets = data.find_sets(root, "Train")
    # 11 is no multiple of 4: epochs meet in a batch
    dataset = plain(sets, "orig", batch_size=4, crop=8)
    visits = [dataset.index(step, lane) for step in range(1, 34) for lane in range(4)]
    epochs = [tuple(visits[i:i + 11]) for i in range(0, len(visits), 11)]
    assert len(epochs) == 12 and all(sorted(e) == list(range(11)) for e in epochs) and len(set(epochs)) == 12
    assert dataset.names(2) == [dataset.stems[i] for i in visits[4:8]]


@pytest.mark.parametrize("names", [["trip-2023-01", "trip-2023-02", "trip-2024-01", "other"],
                                   ["IMG-20240101-121501", "IMG-20240101-121502", "IMG-20240102-090000"],
                                   ["2023-01-11", "2023-01-12", "2023-02-11"],
                                   ["scan-001-1", "scan-001-2", "scan-002-1"]])
def test_dates_and_numbers_in_names_of_photographs_group_nothing(tmp_path, names):
    for name in names:
        save_image(tmp_path / "photos" / f"{name}.png", torch.zeros(3, 8, 8))
    sets = data.find_photos(tmp_path / "photos")
    kept, held = sets.hold_out(1, 0)
    assert [len(kept.stems), len(held.stems)] == [len(names) - 1, 1]
    assert [kept.photo(name) for name in names] == names


@pytest.mark.parametrize("name", ["trip-2023-01", "IMG-20240101-121501", "2023-01-11", "scan-001-2", "a-01-0",
                                  "2023-01-11 a", "shot-12-345678", "plain", "b-7"])
def test_dates_and_times_are_no_rows_and_columns_in_any_set(name):
    """Also in sets of HGGT's layout that somebody made of photographs, where verify looks for shared photographs."""
    from prepare import verify
    assert data.photo_of(name) == name
    other = name[:-1] + ("3" if name[-1] != "3" else "4")
    sets = data.Sets({version: dict.fromkeys([name, other]) for version in ("original", "01")})
    assert [len(side.stems) for side in sets.hold_out(1, 0)] == [1, 1]
    assert sets.grouping() == "2 photographs, each image one of its own"
    report = verify.Report()
    verify.verify_splits({name: "x"}, {other: "y"}, {"Train": {}, "Test": {}}, 0.9, report)
    assert not report.defects
    patches = data.Sets({"original": dict.fromkeys(["c-0-0", "c-288-10240", "d-1-2"])})
    assert patches.grouping() == "2 photographs, grouped by <photo>-<row>-<column>"


def test_originals_of_quintuplets_are_grouped_by_photo_wherever_they_are_named(quintuplets):
    for folder in (quintuplets, quintuplets / "Train" / "images" / "0-6" / "original"):
        kept, held = data.find_photos(folder).hold_out(1, 0)
        assert len(held.stems) == 2 and len({held.photo(stem) for stem in held.stems}) == 1 and len(kept.stems) == 4


def test_held_out_photos_keep_all_their_patches_on_one_side():
    names = ("a", "b-7", "c", "d", "e")
    stems = [f"{name}-{y}-{x}" for name in names for y in (0, 288) for x in (3, 291)] + ["alone"]
    sets = data.Sets({"original": dict.fromkeys(stems, None), "01": dict.fromkeys([f"{s}_01" for s in stems], None)})
    sides = set()
    for seed in range(12):
        train, held = sets.hold_out(2, seed)
        photos = [{data.photo_of(s) for s in side.stems} for side in (train, held)]
        assert len(photos[1]) == 2 and not photos[0] & photos[1] and photos[0] | photos[1] == {*names, "alone"}
        assert sorted(train.stems + held.stems) == sorted(stems)
        assert train.versions == held.versions == ["original", "01"]
        assert [s.stems for s in sets.hold_out(2, seed)] == [train.stems, held.stems]
        sides.add(tuple(held.stems))
    assert len(sides) > 4
    for photos in (0, 6):
        with pytest.raises(ValueError, match=f"--val-photos {photos}: the data set has 6 photos"):
            sets.hold_out(photos, 0)


# The pool

def numbers(step, lanes):
    """A pair that says which step and lane made it, as integers and as an 8-bit image."""
    ids = torch.tensor([1000 * lane + step for lane in lanes])
    return ids, (ids % 256).byte().float()[:, None, None, None].expand(-1, 3, 2, 2) / 255


def drive(pool, steps, lanes):
    """ids (steps, b) that came out of the pool, each with its own image."""
    out = []
    for step in steps:
        ids, images = pool.swap(numbers(step, lanes), step)
        # bit for bit
        assert torch.equal(images, (ids % 256).byte().float()[:, None, None, None].expand(-1, 3, 2, 2) / 255)
        out.append(ids)
    return torch.stack(out)


def test_pool_passes_the_filling_phase_through_and_gives_every_pair_back_once():
    lanes, slots = range(4), 5
    out = drive(TrainingPool(20, 4, lanes, SEEDS), range(1, 401), lanes)
    assert torch.equal(out[:slots], torch.stack([numbers(step, lanes)[0] for step in range(1, slots + 1)]))
    for lane in lanes:
        times = Counter((out[:, lane] - 1000 * lane).tolist())
        # a lane keeps its own pairs
        assert set(out[:, lane].div(1000, rounding_mode="floor").tolist()) == {lane}
        assert all(times[s] == 2 for s in range(1, slots + 1)) and all(times[s] == 1 for s in range(slots + 1, 350))
        # one pair per slot still waits
        assert max(times.values()) == 2 and len(times) == 400 - slots


def test_pool_does_not_depend_on_how_lanes_are_split():
    whole = drive(TrainingPool(32, 8, range(8), SEEDS), range(1, 60), range(8))
    parts = [drive(TrainingPool(32, 8, lanes, SEEDS), range(1, 60), lanes) for lanes in (range(0, 2), range(2, 8))]
    assert torch.equal(whole, torch.cat(parts, 1))
    other = TrainingPool(32, 8, range(8), partial(runs.sample_seed, 8))
    assert not torch.equal(whole, drive(other, range(1, 60), range(8)))


def test_pool_continues_from_its_saved_state_also_on_another_number_of_processes(tmp_path):
    pool = TrainingPool(32, 8, range(8), SEEDS)
    drive(pool, range(1, 8), range(8))
    torch.save(pool.state(lambda t: t), tmp_path / "pool.pt")
    expected = drive(pool, range(8, 40), range(8))
    state = torch.load(tmp_path / "pool.pt", weights_only=True)
    assert [t.dtype for t in state] == [torch.int64, torch.uint8] and state[1].shape == (8, 4, 3, 2, 2)
    assert torch.equal(drive(TrainingPool(32, 8, range(8), SEEDS, state), range(8, 40), range(8)), expected)
    # read again: the pool above wrote into its copy
    state = torch.load(tmp_path / "pool.pt", weights_only=True)
    halves = [drive(TrainingPool(32, 8, lanes, SEEDS, state), range(8, 40), lanes)
              for lanes in (range(0, 4), range(4, 8))]
    assert torch.equal(torch.cat(halves, 1), expected)


def test_pool_keeps_all_8_bit_values_exactly():
    values = torch.arange(256).float().view(1, 1, 16, 16) / 255
    pool = TrainingPool(1, 1, range(1), SEEDS)
    pool.swap((values, values), 1)
    first, second = pool.swap((values * 0, values * 0), 2)
    assert torch.equal(first, values) and torch.equal(second, values) and first.dtype == torch.float32


def test_waiting_times_are_those_of_shuffling_one_big_pool():
    size, batch, steps, tail = 32, 8, 1200, 80
    out = drive(TrainingPool(size, batch, range(batch), SEEDS), range(1, steps), range(batch))
    made = out - 1000 * torch.arange(batch)
    # pairs are counted that were made neither while the pool fills, nor so late that they may still wait
    counted = range(size // batch + 1, steps - tail)
    ours = [step - m for step, row in enumerate(made.tolist(), 1) for m in row if m in counted and step > m]
    rng, pool, hggts = np.random.default_rng(0), np.repeat(np.arange(1, size // batch + 1), batch), []
    # HGGT: shuffle, take the first b, refill them
    for step in range(size // batch + 1, steps):
        rng.shuffle(pool)
        hggts += [step - m for m in pool[:batch].tolist() if m in counted]
        pool[:batch] = step
    for waits in (ours, hggts):
        assert np.mean(waits) == pytest.approx(size / batch, rel=0.04)
    table = np.array([np.bincount(np.minimum(waits, 16), minlength=17)[1:] for waits in (ours, hggts)])
    assert stats.chi2_contingency(table).pvalue > 1e-3
    geometric = stats.geom(batch / size).pmf(np.arange(1, 16))
    assert stats.chisquare(table[0], len(ours) * np.append(geometric, 1 - geometric.sum())).pvalue > 1e-3


def test_pool_size_must_be_a_multiple_of_the_batch_and_0_switches_it_off():
    with pytest.raises(ValueError, match="--pool-size 30 must be a multiple of --batch-size 8"):
        TrainingPool(30, 8, range(8), SEEDS)
    pool, pair = TrainingPool(0, 8, range(8), SEEDS), numbers(1, range(8))
    assert pool.swap(pair, 1) is pair and pool.state(lambda t: t) is None


# Layouts and bad data sets

@pytest.mark.parametrize("enhanced", [1, 3, 6])
def test_any_number_of_enhanced_folders_works(tmp_path, enhanced):
    versions = ["original"] + [f"{k:02d}" for k in range(1, enhanced + 1)]
    sets = data.find_sets(write_sets(tmp_path, ["a-0-0", "b-0-0"], versions), "Train")
    assert sets.versions == versions and sets.stems == ["a-0-0", "b-0-0"] and sets.label_folder is None
    assert plain(sets).sample(1, 0)["crops"].shape == (enhanced + 1, 3, 32, 32)


def test_a_missing_folder_of_a_version_is_refused_unless_the_others_are_named(quintuplets, tmp_path):
    root = shutil.copytree(quintuplets, tmp_path / "set")
    images = root / "Train/images/0-6"
    for missing, named in (("03", "original 01 02 04"), ("04", "original 01 02 03")):
        # the labels know of 04
        (images / missing).rename(root / "kept")
        sets = data.find_sets(root, "Train")
        with pytest.raises(runs.UserError, match=f"no folder {missing} .*--versions {named}$"):
            sets.choose()
        chosen = sets.choose(named.split())
        assert chosen.versions == named.split() and chosen.labels().shape == (6, 4)
        assert plain(chosen).sample(1, 0)["crops"].shape[0] == 4
        (root / "kept").rename(images / missing)
    whole = data.find_sets(root, "Train")
    assert whole.choose() is whole
    assert torch.equal(whole.choose(["04", "original", "01"]).labels(), whole.labels()[:, [0, 1, 4]])
    for versions in (["01", "02"], ["original", "05"], ["original"]):
        with pytest.raises(runs.UserError, match="--versions .*: name original and some of .*: original, 01"):
            whole.choose(versions)


def test_test_split_is_found_in_both_spellings_with_its_lr_images(tmp_path):
    for spelling in ("original", "Original"):
        root = tmp_path / spelling
        assert data.find_sets(write_sets(root, ["a-0-0"]), "Test") is None
        write_sets(root, ["t-0-0", "u-0-0"], train="Test/GT/Test-100/images")
        (root / "Test/GT/Test-100/images/original").rename(root / "Test/GT/Test-100/images" / spelling)
        assert data.find_sets(root, "Test").lq is None
        lr = root / "Test/Blind_Degradation_Benchmark_LQ/Test-100/Blind_LR"
        save_image(lr / "t-0-0.png", coordinates(16, 24, 0))
        with pytest.raises(ValueError, match="Blind_LR: no LR image for 1 of .* first u-0-0.png"):
            data.find_sets(root, "Test")
        save_image(lr / "u-0-0.png", coordinates(16, 24, 0))
        save_image(lr / "u-0-0.png", coordinates(16, 23, 0))
        with pytest.raises(ValueError, match="u-0-0.png: 23x16 pixels, expected a quarter of its original's 96x64"):
            data.find_sets(root, "Test")
        save_image(lr / "u-0-0.png", coordinates(16, 24, 0))
        sets = data.find_sets(root, "Test")
        assert sets.lq == list_images(lr) and sets.stems == ["t-0-0", "u-0-0"]
        assert sets.path("t-0-0").parent.name == spelling and sets.path("u-0-0", "03").name == "u-0-0_03.png"
        assert data.find_sets(root, "Train").stems == ["a-0-0"]


def test_two_folders_of_labels_or_of_lr_images_are_refused(tmp_path):
    write_sets(tmp_path, ["t-0-0"], train="Test/GT/Test-100/images")
    for n in "12":
        (tmp_path / f"Test/GT/Test-100/labels/{n}/A").mkdir(parents=True)
    with pytest.raises(ValueError, match="2 folders .*labels.1, .*labels.2: keep one"):
        data.find_sets(tmp_path, "Test")
    (tmp_path / "Test/GT/Test-100/labels/2/A").rmdir()
    for n in "12":
        (tmp_path / f"Test/LQ/{n}/Blind_LR").mkdir(parents=True)
    with pytest.raises(ValueError, match="2 folders .*Blind_LR"):
        data.find_sets(tmp_path, "Test")


def test_photos_are_a_folder_or_the_originals_of_a_data_set(tmp_path, root):
    save_image(tmp_path / "photos/b.png", coordinates(8, 8, 0))
    Image.new("RGB", (8, 8)).save(tmp_path / "photos/a.JPG")
    (tmp_path / "photos/notes.txt").write_text("")
    photos = data.find_photos(tmp_path / "photos")
    assert photos.stems == ["a", "b"] and photos.versions == ["original"]
    originals = data.find_photos(root)
    assert originals.stems == ["cat-0-0", "cat-0-288", "dog-0-0"] and originals.versions == ["original"]
    with pytest.raises(ValueError, match="no such folder"):
        data.find_photos(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no images"):
        data.find_photos(tmp_path / "empty")


def test_incomplete_data_sets_are_named_with_the_first_file(root, tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such data set"):
        data.find_sets(tmp_path / "nowhere", "Train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images/\\*/original folder"):
        data.find_sets(tmp_path / "empty", "Train")
    images = root / "Train/images/0-2"
    (images / "03/dog-0-0_03.png").rename(tmp_path / "kept.png")
    with pytest.raises(ValueError, match=r"03: 1 files missing \(of 3 expected\), first dog-0-0_03.png"):
        data.find_sets(root, "Train")
    (tmp_path / "kept.png").rename(images / "03/dog-0-0_03.png")
    save_image(images / "02/extra_02.png", coordinates(8, 8, 0))
    with pytest.raises(ValueError, match="02: 1 files without an original.* first extra_02.png"):
        data.find_sets(root, "Train")
    (images / "02/extra_02.png").unlink()
    Image.new("RGB", (8, 8)).save(images / "original/cat-0-0.jpg")
    with pytest.raises(ValueError, match="cat-0-0.png and cat-0-0.jpg: two images of one name"):
        data.find_sets(root, "Train")
    (images / "original/cat-0-0.jpg").unlink()
    write_sets(root, ["x-0-0"], train="Train/images/other")
    with pytest.raises(ValueError, match="several sets"):
        data.find_sets(root, "Train")
    write_sets(tmp_path / "bare", ["x-0-0"], versions=VERSIONS[:1])
    with pytest.raises(ValueError, match="no folders of enhanced versions"):
        data.find_sets(tmp_path / "bare", "Train")


def test_versions_of_another_size_and_images_below_the_crop_are_refused(root, sets):
    with pytest.raises(ValueError, match="96x64 pixels, smaller than the 72 pixels .* at most 64"):
        plain(sets, crop=72).sample(1, 0)
    with pytest.raises(ValueError, match="smaller than the 80 pixels"):
        plain(sets, load_size=80).sample(1, 0)
    for stem in sets.stems:
        save_image(root / f"Train/images/0-2/04/{stem}_04.png", coordinates(64, 92, 4))
    with pytest.raises(ValueError, match="_04.png: 92x64 pixels but its original has 96x64"):
        plain(sets).sample(1, 0)


def test_images_of_different_sizes_need_a_load_size(tmp_path):
    write_sets(tmp_path, ["a-0-0"], size=(64, 96))
    sets = data.find_sets(write_sets(tmp_path, ["b-0-0"], size=(80, 64)), "Train")
    with pytest.raises(ValueError, match=r"different sizes in one batch .*set --load-size"):
        next(data.batches(plain(sets), 1, 1, range(4), 0, False))
    assert next(data.batches(plain(sets, load_size=64), 1, 1, range(4), 0, False))["original"].shape == (4, 3, 64, 64)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16"])
def test_images_that_are_not_rgb_are_refused(tmp_path, mode):
    Image.new(mode, (8, 8)).save(tmp_path / "x.png")
    # Pillow's conversion of 16 bits would cut off what is above 255
    how = "scale its values to 0 to 255" if mode == "I;16" else "convert it"
    with pytest.raises(ValueError, match=f"x.png: image mode {mode}, expected 8-bit RGB: {how}"):
        load_image(tmp_path / "x.png")


def test_damaged_images_are_refused_wherever_they_are_cut(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "webp", "bmp"):
        noise.save(tmp_path / f"whole.{suffix}")
        raw = (tmp_path / f"whole.{suffix}").read_bytes()
        for cut in range(0, len(raw) - 20, 41):
            (tmp_path / f"cut.{suffix}").write_bytes(raw[:cut])
            with pytest.raises(ValueError, match=f"cut.{suffix}: damaged image"):
                load_image(tmp_path / f"cut.{suffix}")
    with pytest.raises(ValueError, match="none.png: no such image"):
        load_image(tmp_path / "none.png")


def test_error_in_a_worker_process_arrives_as_the_same_line(root, sets):
    for path in (root / "Train/images/0-2/02").iterdir():
        path.write_bytes(path.read_bytes()[:150])
    messages = []
    for workers in (0, 2):
        with pytest.raises(ValueError, match="_02.png: damaged image") as error:
            next(data.batches(plain(sets), 1, 3, range(4), workers, False))
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "\n" not in messages[0]


def test_batches_are_fetched_one_ahead_on_a_stream_and_errors_wait_for_their_own_step(monkeypatch):
    """With a stand-in for CUDA: batch n is awaited before n + 1 is fetched, which happens before n is used.

    `where` stays on the CPU. For a CPU nothing is fetched ahead.
    """
    log = []

    class Image:
        def __init__(self, step):
            self.step = step

        def to(self, device, non_blocking):
            assert device.type == "cuda" and non_blocking
            log.append(f"copy {self.step} on {streams[-1]}")
            return self

        def record_stream(self, stream):
            log.append(f"{stream} keeps {self.step}")

    class Stream(str):
        def wait_stream(self, other):
            log.append(f"{self} waits for {other}")

    class use:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            streams.append(self.stream)

        def __exit__(self, *error):
            streams.pop()
    streams = [Stream("main")]
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])

    def source():
        for step in (1, 2):
            yield {"original": Image(step), "where": f"where {step}"}
        raise ValueError("3.png: damaged image")
    on_gpu = data.prefetch(source(), torch.device("cuda"))
    for step in (1, 2):
        batch = next(on_gpu)
        assert batch["original"].step == step and batch["where"] == f"where {step}"
        log.append(f"step {step}")
    with pytest.raises(ValueError, match="3.png"):
        next(on_gpu)
    assert log == ["copy 1 on side", "main waits for side", "main keeps 1", "copy 2 on side", "step 1",
                   "main waits for side", "main keeps 2", "step 2"]
    assert len(list(data.prefetch(iter([{"original": Image(1), "where": 0}] * 3), torch.device("cuda")))) == 3

    left = iter([{"n": n} for n in range(4)])
    on_cpu = data.prefetch(left, torch.device("cpu"))
    assert next(on_cpu) == {"n": 0} and next(left) == {"n": 1} and [b["n"] for b in on_cpu] == [2, 3]


def test_saved_images_are_read_back(tmp_path):
    image = coordinates(12, 20, 3)
    save_image(tmp_path / "new/folder/a.png", image)
    save_image(tmp_path / "b.png", image.float() / 255)
    save_image(tmp_path / "c.png", torch.tensor([-0.2, 0.5 / 255 + 1e-4, 1.7]).view(3, 1, 1))
    assert all(torch.equal(load_image(tmp_path / name), image) for name in ("new/folder/a.png", "b.png"))
    # clamped and rounded, not truncated
    assert load_image(tmp_path / "c.png").flatten().tolist() == [0, 1, 255]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), image.permute(1, 2, 0).numpy())


def test_grid_holds_every_image_under_its_caption(tmp_path):
    rows = [[(torch.zeros(3, 20, 30), "a"), (coordinates(24, 40, 5), "b")], [(torch.ones(3, 10, 30), "c")]]
    pictures.save_grid(tmp_path / "samples/grid.png", rows)
    sheet = load_image(tmp_path / "samples/grid.png")
    assert sheet.shape == (3, (16 + 24) + 4 + (16 + 10), 30 + 4 + 40)
    assert torch.equal(sheet[:, 16:40, 34:], coordinates(24, 40, 5)) and not sheet[:, 16:36, :30].any()
    assert (sheet[:, :16, :30] < 128).any() and (sheet[:, 60:, :30] == 255).all()
