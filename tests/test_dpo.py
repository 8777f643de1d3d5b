"""DP2O-SR: reward, pairs, weights, loss, estimates against worked numbers and brute force; stages as users run them."""
import argparse
import copy
import itertools
import json
import math
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch

import archs
import data
import metrics
import runs
from dpo import __main__ as demo
from dpo import candidates, compare, flow, options, pool, preference, pretrain, rounds, tune
from images import image_size, list_images, load_image, save_image

fast = pytest.mark.fast


def run(script, *words):
    """The main of a script of dpo/ with these flags, in this process."""
    script.main(script.parse_args(words))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# Reward

@fast
def test_a_pool_is_normalised_to_0_and_1_and_affine_changes_of_a_metric_do_not_matter():
    raw = np.random.default_rng(0).normal(size=(5, 7, 3))
    names, lower = ["a", "b", "c"], {"a": False, "b": True, "c": False}
    norm = preference.fit_norm(raw, names, lower)
    scores = preference.normalise(raw, names, norm)
    assert scores.min((0, 1)) == pytest.approx([0, 0, 0]) and scores.max((0, 1)) == pytest.approx([1, 1, 1])
    # lower is better
    assert np.argmax(scores[..., 1]) == np.argmin(raw[..., 1])
    other = raw * [3, 0.1, 20] + [5, -2, 100]
    assert np.allclose(preference.normalise(other, names, preference.fit_norm(other, names, lower)), scores)
    r = preference.reward(scores, [True, False, False])
    assert ((r >= 0) & (r <= 1)).all() and np.allclose(r, scores[..., 0] / 2 + (scores[..., 1] + scores[..., 2]) / 4)


@fast
def test_a_later_network_is_judged_on_the_first_ones_scale():
    norm = preference.fit_norm(np.array([[[0.0], [10.0]]]), ["a"], {"a": False})
    assert preference.normalise(np.array([[[20.0], [-10.0]]]), ["a"], norm).tolist() == [[[2.0], [-1.0]]]


@fast
def test_a_scale_for_every_group():
    raw = np.array([[[0.0], [1.0], [2.0], [100.0]], [[5.0], [5.0], [5.0], [5.0]]])
    scores = preference.normalise_groups(raw, ["a"], {"a": True})[..., 0]
    assert scores.tolist() == [[1.0, 0.99, 0.98, 0.0], [0.5] * 4]
    # the ranges are 100 and 0: as wide as their mean, around the mean of all
    assert preference.typical_range(-raw, ["a"], {"a": True}) == {"a": {"low": 15.375 - 25, "high": 15.375 + 25}}


@fast
def test_the_say_of_each_half_of_the_reward():
    rng = np.random.default_rng(0)
    full, none = rng.normal(size=(2, 400, 16))
    def say(full, none):
        # what differs between images has no part in it
        return preference.halves(np.stack([full + 9 * rng.normal(size=(400, 1)), none], -1), [True, False])
    assert say(full, none) == pytest.approx({"fr": 0.5 ** 0.5, "nr": 0.5 ** 0.5}, abs=0.02)
    # standard deviations of 0.003 and 0.03: cosines of a triangle with these legs
    assert say(0.1 * full, none) == pytest.approx({"fr": 0.0995, "nr": 0.995}, abs=0.02)
    assert say(full, full) == pytest.approx({"fr": 1, "nr": 1})
    assert math.isnan(say(0 * full, none)["fr"])


@fast
@pytest.mark.parametrize("which, flag", [("hybrid", "--nr"), ("nr", "--nr")])
def test_a_reward_without_its_metrics_is_refused(which, flag):
    with pytest.raises(runs.UserError, match=flag):
        preference.reward(np.ones((2, 3, 1)), [True], which)


@fast
def test_a_metric_that_never_differs_is_named():
    with pytest.raises(runs.UserError, match="dull is 3 for every candidate"):
        preference.fit_norm(np.full((2, 2, 1), 3.0), ["dull"], {"dull": False})


# Curation and weights

@fast
def test_pairs_are_the_best_against_the_worst():
    r = np.random.default_rng(1).random((6, 9))
    best, worst = preference.choose(r, 4)
    for g in range(6):
        assert not set(best[g]) & set(worst[g]) and r[g, best[g]].min() > r[g, worst[g]].max()
        assert r[g, best[g][0]] == r[g].max() and r[g, worst[g][0]] == r[g].min()
    # ties: the earlier seed
    assert preference.choose(np.zeros((1, 4)), 1)[0].tolist() == [[0]]


@fast
@pytest.mark.parametrize("n", [0, 5])
def test_too_few_candidates_are_refused(n):
    with pytest.raises(runs.UserError, match="--top"):
        preference.choose(np.zeros((1, 9)), n)


@fast
def test_weights_of_a_worked_example():
    """Two groups of four, N = 2."""
    r = np.array([[0.1, 0.9, 0.5, 0.3], [0.4, 0.6, 0.5, 0.5]])
    intra, inter = preference.pair_weights(r, *preference.choose(r, 2))
    # first group: winners 0.9, 0.5; losers 0.1, 0.3 -> gaps 0.8 0.6 0.4 0.2, mean 0.5
    # second: winners 0.6, 0.5 (seed 2), losers 0.4, 0.5 (seed 3) -> 0.2 0.1 0.1 0, mean 0.1
    assert np.allclose(intra, [[[1.3, 1.1], [0.9, 0.7]], [[1.1, 1.0], [1.0, 0.9]]])
    first = math.sqrt((0.35 ** 2 + 0.45 ** 2 + 0.05 ** 2 + 0.15 ** 2) / 4)
    sigma = np.array([first, math.sqrt(2 * 0.1 ** 2 / 4)])
    assert np.allclose(inter, sigma + 1 - sigma.mean())


@fast
def test_a_gain_stretches_the_weights_around_one():
    r = np.array([[0.1, 0.9, 0.5, 0.3], [0.4, 0.6, 0.5, 0.5]])
    plain, steep = (preference.pair_weights(r, *preference.choose(r, 2), gain) for gain in (1, 3))
    # the worked example above: 1.3, 1.1, 0.9, 0.7
    assert np.allclose(steep[0][0], [[1.9, 1.3], [0.7, 0.1]])
    assert np.allclose(steep[1] - 1, 3 * (plain[1] - 1))


@fast
@pytest.mark.parametrize("seed", range(3))
def test_both_weights_average_to_one(seed):
    r = np.random.default_rng(seed).random((20, 16))
    intra, inter = preference.pair_weights(r, *preference.choose(r, 4))
    assert np.allclose(intra.mean((1, 2)), 1) and inter.mean() == pytest.approx(1)
    for hpo in preference.HPO:
        assert np.mean(preference.combine(intra, inter[:, None, None], hpo)) == pytest.approx(1)


@fast
def test_a_weight_is_the_product_of_two_or_one_of_them():
    intra, inter = np.array([1.2, 0.9]), np.array([1.5, 0.5])
    assert preference.combine(intra, inter).tolist() == pytest.approx([1.8, 0.45])
    assert preference.combine(intra, inter, "intra").tolist() == [1.2, 0.9]
    assert preference.combine(intra, inter, "inter").tolist() == [1.5, 0.5]
    assert preference.combine(intra, inter, "none").tolist() == 1.0
    assert preference.combine(np.array([-0.5]), 1.0, "intra").tolist() == [0.0]


# Loss

@fast
def test_loss_at_the_start_is_ln_2_and_its_gradient_favours_the_winner():
    d = torch.rand(6)
    win, lose = d.clone().requires_grad_(), d.clone().requires_grad_()
    loss, logit = preference.dpo_loss(win, d, lose, d, 5000.0, torch.linspace(0.5, 1.5, 6))
    assert torch.allclose(loss, math.log(2) * torch.linspace(0.5, 1.5, 6))
    assert not logit.any() and preference.implicit_accuracy(logit) == 0.5
    loss.sum().backward()
    # downhill: the winner's error shrinks
    assert (win.grad > 0).all() and (lose.grad < 0).all()


@fast
def test_swapping_winner_and_loser_flips_the_sign():
    a, b, c, d = torch.rand(4, 5)
    assert torch.allclose(preference.dpo_loss(a, b, c, d, 700.0)[1], -preference.dpo_loss(c, d, a, b, 700.0)[1])


@fast
def test_pairs_of_equal_grids_teach_no_grid():
    generator = torch.Generator().manual_seed(0)
    win, lose = torch.rand(2, 3, 3, 16, 24, generator=generator, dtype=torch.double)
    equal_win, equal_lose = preference.equal_grids(win, lose)
    # what a network that adds the same 4x4 block everywhere is told by the loss
    gradients = []
    for w, x in ((win, lose), (equal_win, equal_lose)):
        block = torch.zeros(1, 3, 4, 4, dtype=torch.double, requires_grad=True)
        output = block.repeat(3, 1, 4, 6)
        errors = [(output - target).square().flatten(1).mean(1) for target in (w, x)]
        losses, _ = preference.dpo_loss(errors[0], errors[0].detach(), errors[1], errors[1].detach(), 100.0)
        losses.sum().backward()
        gradients.append(block.grad - block.grad.mean((2, 3), keepdim=True))
    assert gradients[0].abs().max() > 0.01 and gradients[1].abs().max() < 1e-12
    # the mean of winner and loser stays, and so do the mean colours
    torch.testing.assert_close(equal_win + equal_lose, win + lose)
    torch.testing.assert_close(equal_win.mean((2, 3)), win.mean((2, 3)))
    # a second time there is nothing to take
    torch.testing.assert_close(preference.equal_grids(equal_win, equal_lose)[0], equal_win)


@fast
def test_loss_of_a_worked_example():
    win, win_ref, lose, lose_ref = (torch.tensor([d]) for d in (0.10, 0.12, 0.30, 0.29))
    loss, logit = preference.dpo_loss(win, win_ref, lose, lose_ref, 100.0, 2.0)
    assert logit.item() == pytest.approx(1.5, abs=1e-5)
    assert loss.item() == pytest.approx(2 * math.log(1 + math.exp(-1.5)), abs=1e-5)


@fast
def test_the_error_does_not_depend_on_the_size_of_images():
    small = torch.rand(2, 48, 4, 4)
    error = preference.error(small, torch.zeros_like(small))
    assert torch.allclose(error, preference.error(small.repeat(1, 1, 3, 2), torch.zeros(2, 48, 12, 8)))
    assert preference.error(small.bfloat16(), small.bfloat16()).dtype == torch.float32


# Estimates

@fast
@pytest.mark.parametrize("m", [1, 2, 5, 8])
def test_best_and_worst_of_k_against_all_subsets(m):
    r = np.random.default_rng(m).normal(size=(3, m))
    for k in range(1, m + 1):
        subsets = [list(s) for s in itertools.combinations(range(m), k)]
        assert np.allclose(preference.best_of(r, k), np.mean([r[:, s].max(1) for s in subsets], 0))
        assert np.allclose(preference.worst_of(r, k), np.mean([r[:, s].min(1) for s in subsets], 0))
    with pytest.raises(ValueError, match=f"k = {m + 1} of {m} seeds"):
        preference.best_of(r, m + 1)


@fast
def test_estimates_of_many_seeds_stay_finite():
    r = np.arange(2000.0)[None]
    # expected maximum of 64 of 1..2000, minus 1
    assert preference.best_of(r, 64).item() == pytest.approx(64 / 65 * 2001 - 1, rel=1e-9)
    assert preference.curves(np.random.default_rng(0).random((2, 12)))["k"] == [1, 2, 4, 8, 12]


# Order of pairs

@fast
def test_an_epoch_is_every_pair_once_and_goes_through_the_groups_in_turn():
    rows = [{"name": f"g{g}", "w_seed": k, "l_seed": 9, "w_intra": 1.0, "w_inter": 1.0}
            for g in range(3) for k in range(4)]
    pairs = tune.PairSet(rows, np.ones(12), {}, {}, partial(runs.sample_seed, 0), 4, 0)
    order = [pairs.index(step, lane) for step in range(1, 7) for lane in range(4)]
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12)) and order[:12] != order[12:]
    assert all(len({pairs.rows[k]["name"] for k in order[n:n + 3]}) == 3 for n in range(0, 24, 3))


# Photographs

@fast
def test_photos_are_held_out_whole():
    items = {f"photo{p}-{k}-0": {"photo": f"photo{p}"} for p in range(4) for k in range(3)}
    held = tune.hold_out(items, 4, 0)
    assert len(held) == 6 and len({items[name]["photo"] for name in held}) == 2 and not tune.hold_out(items, 0, 0)


@fast
def test_names_of_a_users_images_are_not_read(tmp_path):
    """Dated photographs are not crops of one: each is its own, when images are held out, in intervals and pictures."""
    names = [f"trip-2023-{day:02d}" for day in range(1, 7)]
    for name in names:
        save_image(tmp_path / "lq" / f"{name}.png", torch.rand(3, 8, 8))
    world = runs.World(0, 1, torch.device("cpu"))
    source = {"lq_dir": tmp_path / "lq", "gt_dir": None}
    for items in (candidates.find_items(**source), candidates.open_images(tmp_path / "pool", world, source, "pool")):
        assert [item["photo"] for item in items.values()] == names
        assert len(tune.hold_out(items, 2, 0)) == 2
        photos = np.array([item["photo"] for item in items.values()])
        assert compare.over_photos(np.arange(6.0), photos).tolist() == list(range(6))
        outputs, rewards = {name: [tmp_path / "sr.png"] for name in names}, {"net": np.zeros((6, 1))}
        save_image(tmp_path / "sr.png", torch.rand(3, 32, 32))
        compare.draw_sheet(tmp_path / "grid.png", items, {"net": outputs}, rewards)
        # a line of at least 32 pixels for each of four images
        assert image_size(tmp_path / "grid.png")[1] > 4 * 32


@fast
def test_names_of_crops_that_were_drawn_here_are_grouped(tmp_path):
    for k in range(2):
        save_image(tmp_path / "photos" / f"trip-2023-0{k}.png", torch.rand(3, 48, 48))
    source = dict(hr=tmp_path / "photos", groups=4, patch=8, load_size=48, degradation="two-round", seed=0)
    items = candidates.open_images(tmp_path / "pool", runs.World(0, 1, torch.device("cpu")), source, "pool")
    assert len(items) == 4 and {item["photo"] for item in items.values()} == {"trip-2023-00", "trip-2023-01"}
    # also where the folder of the pool is named as --lq-dir
    assert candidates.find_items(tmp_path / "pool" / "lq", None).keys() == items.keys()
    assert len({item["photo"] for item in candidates.find_items(tmp_path / "pool" / "lq", None).values()}) == 2


# A toy of two modes: that of the winners becomes likelier

def test_dpo_moves_what_is_sampled_towards_the_winners():
    """Images are a pattern or its negative by chance; the pattern wins. FlowNet as small as it goes."""
    torch.manual_seed(0)
    gen = flow.FlowSR((16, 16, 16), 1, steps=6)
    lq, draw, pattern = torch.full((32, 3, 4, 4), 0.5), torch.Generator().manual_seed(0), torch.randn(3, 16, 16).sign()

    def toy_images(positive):
        return 0.5 + 0.3 * (2 * positive.float() - 1).view(-1, 1, 1, 1) * pattern

    def share(net):
        outputs = gen.sample(net, lq[:1].expand(64, -1, -1, -1), ["toy"] * 64, range(64))
        return (outputs - 0.5).mul(pattern).mean((1, 2, 3)).gt(0).float().mean().item()
    gen.sigma_r = 0.3
    opt = torch.optim.AdamW(gen.net.parameters(), 3e-3)
    for _ in range(250):
        x0 = gen.encode(toy_images(torch.arange(32) < 16), lq)
        xt, target = gen.noised(x0, torch.randn(x0.shape, generator=draw), t := torch.rand(32, generator=draw))
        loss = preference.error(gen.predict(gen.net, xt, t, lq), target).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    untuned = share(gen.net)
    assert 0.2 < untuned < 0.8
    reference, net = copy.deepcopy(gen.net).requires_grad_(False), gen.net
    opt = torch.optim.AdamW(net.parameters(), 5e-4)
    x0 = gen.encode(torch.cat([toy_images(torch.ones(16)), toy_images(torch.zeros(16))]), lq)
    for _ in range(50):
        t = torch.rand(16, generator=draw).repeat(2)
        eps = torch.randn(16, *x0.shape[1:], generator=draw).repeat(2, 1, 1, 1)
        xt, target = gen.noised(x0, eps, t)
        (win, lose), (win_ref, lose_ref) = (preference.error(gen.predict(network, xt, t, lq), target).chunk(2)
                                            for network in (net, reference))
        loss = preference.dpo_loss(win, win_ref, lose, lose_ref, 20.0)[0].mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert share(net) > untuned + 0.15


# From scores to pairs, and the samples of a training

@pytest.fixture
def scored(tmp_path):
    """Scores of a pool alone: 4 images of 2 photos, 8 candidates, two metrics that disagree.

    full: higher is better; none: lower is better.
    """
    rng = np.random.default_rng(0)
    rows = [{"name": f"photo{g // 2}-{g}-0", "seed": s, "full": float(rng.random()), "none": float(10 * rng.random())}
            for g in range(4) for s in range(8)]
    candidates.write_lines(tmp_path / "scores.jsonl", rows)
    runs.save_json(tmp_path / "scores.json", {"metrics": {
        "full": {"lower_is_better": False, "full_reference": True, "identity": ["full"]},
        "none": {"lower_is_better": True, "full_reference": False, "identity": ["none"]}}})
    return tmp_path, np.array([[[row["full"], row["none"]] for row in rows[8 * g:8 * g + 8]] for g in range(4)])


def curated(folder, *words):
    """-> pairs, {name: its pairs}"""
    run(pool, "curate", "--pool", folder, *words)
    rows = read_lines(folder / "pairs.jsonl")
    names = dict.fromkeys(row["name"] for row in rows)
    return rows, {name: [row for row in rows if row["name"] == name] for name in names}


@fast
def test_curated_pairs_follow_the_rewards_worked_out_here(scored):
    folder, raw = scored
    full = (raw[..., 0] - raw[..., 0].min()) / np.ptp(raw[..., 0])
    none = (raw[..., 1].max() - raw[..., 1]) / np.ptp(raw[..., 1])
    for which, r in (("hybrid", (full + none) / 2), ("fr", full), ("nr", none)):
        rows, groups = curated(folder, "--top", 2, "--reward", which, "--norm", "pool")
        assert len(rows) == 16 and all(len(group) == 4 for group in groups.values())
        for g, group in enumerate(groups.values()):
            order = np.argsort(-r[g])
            assert {row["w_seed"] for row in group} == set(order[:2])
            assert {row["l_seed"] for row in group} == set(order[-2:])
            for row in group:
                assert row["R_w"] == pytest.approx(r[g, row["w_seed"]])
                assert row["R_l"] == pytest.approx(r[g, row["l_seed"]])
            gaps = np.array([row["R_w"] - row["R_l"] for row in group])
            assert [row["w_intra"] for row in group] == pytest.approx(list(gaps + 1 - gaps.mean()))
            assert group[0]["w_inter"] == pytest.approx(r[g].std() + 1 - r.std(1).mean())
    about = json.loads((folder / "curation.json").read_text())
    assert about["sigma"] == pytest.approx(list(np.percentile(none.std(1), [25, 50, 75])))
    assert about["reward"] == "nr" and about["pool"] == "."


@fast
def test_curate_by_the_first_samples_by_groups_and_by_a_given_scale(scored):
    folder, raw = scored
    rows, _ = curated(folder, "--top", 2, "--samples", 4)
    assert max(max(row["w_seed"], row["l_seed"]) for row in rows) < 4
    with pytest.raises(runs.UserError, match="--samples 9: .* has 8 candidates"):
        curated(folder, "--top", 2, "--samples", 9)
    rows, groups = curated(folder, "--top", 1, "--norm", "group", "--reward", "fr")
    assert all(group[0]["R_w"] == 1 and group[0]["R_l"] == 0 for group in groups.values())
    norm = json.loads((folder / "norm.json").read_text())
    norm["metrics"]["full"] |= {"low": -1.0, "high": 3.0}
    (folder / "given.json").write_text(json.dumps(norm))
    rows, groups = curated(folder, "--top", 1, "--reward", "fr", "--norm-file", folder / "given.json")
    assert [group[0]["R_w"] for group in groups.values()] == pytest.approx(list((raw[..., 0].max(1) + 1) / 4))


@fast
def test_every_image_has_its_own_scale_if_both_halves_then_have_a_say(scored, capsys):
    folder, raw = scored
    curated(folder, "--top", 2)
    about = json.loads((folder / "curation.json").read_text())
    assert about["scope"] == json.loads((folder / "norm.json").read_text())["scope"] == "group"
    # of images 1 and 3, worked out here
    scores = raw[1::2] * [1, -1]
    low, high = scores.min(1, keepdims=True), scores.max(1, keepdims=True)
    full, none = np.moveaxis((scores - low) / (high - low), -1, 0)
    parts = [(part - part.mean(1, keepdims=True)).ravel() for part in (full, none, full + none)]
    for name, part in zip(("fr", "nr"), parts):
        assert about["halves"]["group"][name] == pytest.approx(np.corrcoef(part, parts[2])[0, 1])
    said = capsys.readouterr().out
    assert f"{about['halves']['group']['fr']:.2f} of its full-" in said and said.count("(taken)") == 1
    # on the range of the pool, too, by which the paper's is understood
    by_pool = ((raw - raw.min((0, 1))) / np.ptp(raw, (0, 1)) * [1, -1]).mean(-1).std(1)
    assert about["sigma_pool"] == pytest.approx(list(np.percentile(by_pool, [25, 50, 75])))
    assert f"as the paper's 0.056, {about['sigma_pool'][1]:.4f}" in said
    # two halves that say the same: nothing to balance
    rows = read_lines(folder / "scores.jsonl")
    candidates.write_lines(folder / "scores.jsonl", [row | {"none": -row["full"]} for row in rows])
    curated(folder, "--top", 2)
    about = json.loads((folder / "curation.json").read_text())
    assert about["scope"] == "pool" and about["halves"]["group"]["fr"] == pytest.approx(1)


@fast
def test_a_gain_of_curate_is_in_the_weights(scored):
    folder, _ = scored
    plain, _ = curated(folder, "--top", 2)
    steep, _ = curated(folder, "--top", 2, "--gain", 4)
    for name in ("w_intra", "w_inter"):
        assert [row[name] - 1 for row in steep] == pytest.approx([4 * (row[name] - 1) for row in plain])
    assert json.loads((folder / "curation.json").read_text())["gain"] == 4


@fast
def test_a_sample_is_three_crops_of_one_place_and_its_weight(tmp_path):
    torch.manual_seed(0)
    lq, win, lose = (torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((9, 7), (36, 28), (36, 28)))
    for name, image in (("lq", lq), ("3", win), ("5", lose)):
        save_image(tmp_path / f"{name}.png", image)
    rows = [{"name": "a", "w_seed": 3, "l_seed": 5, "w_intra": 1.0, "w_inter": 1.0}]
    files = {"a": [tmp_path / f"{seed}.png" for seed in range(6)]}
    pairs = tune.PairSet(rows, [1.25], {"a": {"lq": tmp_path / "lq.png"}}, files, partial(runs.sample_seed, 0), 2, 4)
    places = set()
    for step in range(1, 40):
        s = pairs.sample(step, 1)
        y, x = next((y, x) for y in range(6) for x in range(4) if torch.equal(lq[:, y:y + 4, x:x + 4], s["lq"]))
        assert torch.equal(s["win"], win[:, 4 * y:4 * y + 16, 4 * x:4 * x + 16])
        assert torch.equal(s["lose"], lose[:, 4 * y:4 * y + 16, 4 * x:4 * x + 16]) and s["weight"] == 1.25
        places.add((y, x))
    assert len(places) > 10


@fast
def test_weights_average_to_one_over_what_is_trained_on():
    r = np.random.default_rng(0).random((6, 8))
    best, worst = preference.choose(r, 2)
    intra, inter = preference.pair_weights(r, best, worst)
    # two groups are held out
    rows = [{"name": str(g), "w_intra": intra[g, i, j], "w_inter": inter[g]}
            for g in range(4) for i in range(2) for j in range(2)]
    weights = tune.weights_of(rows, "both")
    assert weights.mean() == pytest.approx(1) and weights.std() > 0.01
    assert tune.weights_of(rows, "none").tolist() == [1] * 16
    assert tune.weights_of(rows, "intra").tolist() == pytest.approx([row["w_intra"] for row in rows])


# The stages as a user runs them

CROPS = ["--patch", 8, "--load-size", 48, "--degradation", "two-round"]
GEN = ["--size", "tiny", *CROPS, "--batch-size", 4, "--group-size", 2, "--val-photos", 1, "--steps", 2, "--workers", 0,
       "--threads", 1, "--lr", "1e-3", "--warmup", 2, "--log-every", 1, "--save-every", 2, "--val-every", 0]
TUNE = ["--batch-size", 4, "--val-groups", 1, "--workers", 0, "--threads", 1, "--log-every", 1, "--save-every", 2,
        "--val-every", 2, "--lr", "1e-4", "--beta", 500]


@pytest.fixture(scope="module")
def stages(quintuplets, rewards, tmp_path_factory):
    """Folder with gen (4 steps), pool (5 images, 4 candidates), its scores and pairs; made in this process."""
    work = tmp_path_factory.mktemp("dpo")
    run(pretrain, "--hr", quintuplets, "--out", work / "gen", "--total-steps", 4, *GEN)
    run(pool, *sampling(work, quintuplets, work / "pool"))
    run(pool, "score", "--pool", work / "pool", "--fr", "ssim", "--nr", "test_rewards:brightness")
    run(pool, "curate", "--pool", work / "pool", "--top", 1, "--norm", "pool")
    return work


def sampling(stages, photos, out):
    """The words of `dpo.pool sample` that make the pool of `stages`."""
    return ["sample", "--gen", stages / "gen", "--hr", photos, "--groups", 5, *CROPS, "--samples", 4, "--out", out]


def tuning(stages, pairs=None):
    """The first words of `dpo.tune`."""
    return ["--gen", stages / "gen", "--pairs", pairs or stages / "pool", *TUNE]


def weights_of(path):
    return torch.load(path, weights_only=True)


def test_the_stages_leave_plain_files(stages):
    folder = stages / "pool"
    rows = read_lines(folder / "scores.jsonl")
    assert len(rows) == 20 and set(rows[0]) == {"name", "seed", "ssim", "test_rewards:brightness"}
    image = load_image(folder / "cand" / rows[3]["name"] / f"{rows[3]['seed']}.png")
    brightness = 100 * (image.float() / 255).mean().item()
    assert image.shape == (3, 32, 32) and rows[3]["test_rewards:brightness"] == pytest.approx(brightness, abs=1e-3)
    pairs = read_lines(folder / "pairs.jsonl")
    assert len(pairs) == 5 and all(row["R_w"] > row["R_l"] for row in pairs)
    norm = json.loads((folder / "norm.json").read_text())
    assert {"commit", "torch", "device", "threads"} < set(norm)
    norm = norm["metrics"]
    assert norm["ssim"]["high"] == max(row["ssim"] for row in rows) and norm["ssim"]["full_reference"]
    names = list_images(folder / "lq")
    assert {data.photo_of(name) for name in names} <= {"photo0", "photo1", "photo2"}
    assert len({tuple(p.read_bytes() for p in sorted((folder / "cand" / name).iterdir())) for name in names}) == 5


def test_candidates_are_what_the_generator_gives_for_name_and_seed(stages):
    gen = flow.load_flow(stages / "gen")
    name, path = next(iter(list_images(stages / "pool" / "lq").items()))
    again = gen.sample(gen.net, load_image(path)[None].float() / 255, [name], [2])[0]
    kept = load_image(stages / "pool" / "cand" / name / "2.png").float() / 255
    # made with seeds 0 to 3 at once
    assert (again - kept).abs().max() < 0.51 / 255 + 1e-5


def test_an_interrupted_sampling_continues_and_keeps_what_is_there(stages, quintuplets, tmp_path):
    shutil.copytree(stages / "pool", tmp_path / "pool")

    def contents():
        return {p.name: [f.read_bytes() for f in sorted(p.iterdir())] for p in (tmp_path / "pool" / "cand").iterdir()}
    folders = sorted((tmp_path / "pool" / "cand").iterdir())
    whole, kept = contents(), folders[0] / "0.png"
    stamp = kept.stat().st_mtime_ns
    shutil.rmtree(folders[-1])
    # of the killed call
    (tmp_path / "pool" / "cand" / f"{folders[-1].name}.tmp").mkdir()
    with pytest.raises(runs.UserError, match="1 of 5 images have no candidates"):
        candidates.open_pool(tmp_path / "pool")
    words = sampling(stages, quintuplets, tmp_path / "pool")
    run(pool, *words)
    assert contents() == whole and kept.stat().st_mtime_ns == stamp
    with pytest.raises(runs.UserError, match="samples 4 -> 8"):
        run(pool, *[8 if word == 4 else word for word in words])


def test_interrupted_scoring_continues(stages, rewards, tmp_path):
    """Without a scored image twice: the metric counts its calls."""
    shutil.copytree(stages / "pool", tmp_path / "pool")
    (rewards / "counting.py").write_text(
        "calls = []\ndef build(device):\n    return lambda x: (calls.append(len(x)), x.mean((1, 2, 3)))[1]\n")
    words = ["score", "--pool", tmp_path / "pool", "--fr", "--nr", "counting:build"]
    run(pool, *words)
    import counting
    whole = (tmp_path / "pool" / "scores.jsonl").read_bytes()
    assert sum(counting.calls) >= 20
    cache = next((tmp_path / "pool" / "scores").glob("*.jsonl"))
    lines = cache.read_text().splitlines(keepends=True)
    # killed while it wrote
    cache.write_text("".join(lines[:-6]) + lines[-6][:10])
    counting.calls.clear()
    run(pool, *words)
    # a new reward is probed, too
    assert (tmp_path / "pool" / "scores.jsonl").read_bytes() == whole and 6 <= sum(counting.calls) <= 8


def test_a_run_equals_one_that_was_stopped_and_resumed(stages, quintuplets, tmp_path):
    run(tune, *tuning(stages), "--total-steps", 4, "--out", tmp_path / "tuned")
    for script, words, whole in ((pretrain, ["--hr", quintuplets, *GEN], stages / "gen"),
                                 (tune, tuning(stages), tmp_path / "tuned")):
        run(script, *words, "--total-steps", 4, "--out", tmp_path / "again")
        assert_same(whole, tmp_path / "again")
        shutil.rmtree(tmp_path / "again")
        # the state after two steps, continued
        run(script, *words, "--total-steps", 2, "--out", tmp_path / "again")
        shutil.rmtree(tmp_path / "again" / "weights")
        run(script, *words, "--total-steps", 4, "--out", tmp_path / "again", "--resume")
        assert_same(whole, tmp_path / "again")
        events = read_lines(tmp_path / "again" / "metrics.jsonl")
        assert [e["step"] for e in events if e["split"] == "train"] == [1, 2, 3, 4]
        with pytest.raises(runs.UserError, match="already at step 4"):
            run(script, *words, "--total-steps", 2, "--out", tmp_path / "again", "--resume")
        shutil.rmtree(tmp_path / "again")


def assert_same(a, b):
    a, b = (weights_of(path / "weights" / "gen.pth") for path in (a, b))
    assert a["settings"] == b["settings"]
    for key in a.keys() - {"settings"}:
        assert all(torch.equal(a[key][k], b[key][k]) for k in a[key])


@pytest.mark.slow
def test_two_processes_train_and_sample_what_one_does(stages, quintuplets, script, tmp_path):
    words = [*tuning(stages), "--total-steps", 3, "--hpo", "both"]
    run(tune, *words, "--out", tmp_path / "one")
    script("dpo.tune", *words, "--accumulate", 2, "--out", tmp_path / "two", processes=2)
    one, two = (weights_of(tmp_path / name / "weights" / "gen.pth")["params"] for name in ("one", "two"))
    assert all(torch.allclose(one[k], two[k], atol=2e-5) for k in one)
    assert any(not torch.equal(one[k], v) for k, v in flow.load_flow(stages / "gen").net.state_dict().items())
    script("dpo.pool", *sampling(stages, quintuplets, tmp_path / "pool"), processes=2)
    for path in (stages / "pool").glob("cand/*/*.png"):
        assert path.read_bytes() == (tmp_path / "pool" / path.relative_to(stages / "pool")).read_bytes()


def test_pretraining_warms_up_and_is_checked_before_the_first_step(stages):
    events = read_lines(stages / "gen" / "metrics.jsonl")
    assert [e["lr"] for e in events if e["split"] == "train"] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])
    assert [e["step"] for e in events if e["split"] == "val"] == [0, 4]


def test_training_brings_out_what_the_reward_likes(stages, tmp_path, monkeypatch):
    """Brightness alone: the network learns to tell winners, outputs become brighter, a held-out photo is not seen."""
    shutil.copytree(stages / "pool", tmp_path / "pool")
    run(pool, "score", "--pool", tmp_path / "pool", "--fr", "--nr", "test_rewards:brightness")
    run(pool, "curate", "--pool", tmp_path / "pool", "--top", 2, "--reward", "nr")
    seen, sample = set(), tune.PairSet.sample

    def seeing(self, step, lane):
        seen.add(self.rows[self.index(step, lane)]["name"])
        return sample(self, step, lane)
    monkeypatch.setattr(tune.PairSet, "sample", seeing)
    words = [*tuning(stages, tmp_path / "pool"), "--lr", "3e-4", "--beta", 300, "--max-displacement", 0,
             "--save-every", 0, "--log-every", 5, "--total-steps", 30, "--val-every", 10]
    run(tune, *words, "--out", tmp_path / "out")
    events = read_lines(tmp_path / "out" / "metrics.jsonl")
    train, val = ([e for e in events if e["split"] == split] for split in ("train", "val"))
    assert train[-1]["accuracy"] > 0.8 and train[-1]["win_change"] < train[-1]["lose_change"]
    assert val[-1]["reward"] > val[0]["reward"]
    _, items, files = candidates.open_pool(tmp_path / "pool")
    held = held_out(items)
    assert seen == set(items) - set(held) and len(held) >= 1
    brightness = []
    for path in (stages / "gen", tmp_path / "out"):
        gen, lq = flow.load_flow(path), load_image(items[held[0]]["lq"])[None].float() / 255
        brightness.append(gen.sample(gen.net, lq.expand(8, -1, -1, -1), [held[0]] * 8, range(8)).mean().item())
    assert brightness[1] > brightness[0]
    # the watched reward is that of seeds 0 to 3 on the scale of the pool
    norm = json.loads((tmp_path / "pool" / "norm.json").read_text())["metrics"]["test_rewards:brightness"]
    kept = np.mean([load_image(files[name][seed]).float().mean() / 2.55 for name in held for seed in range(4)])
    assert val[0]["reward"] == pytest.approx((kept - norm["low"]) / (norm["high"] - norm["low"]), abs=2e-3)
    # the best of the checks, kept through an interruption
    best = max(val[1:], key=lambda e: e["reward"])
    words += ["--keep", "best", "--save-every", 10, "--out", tmp_path / "best"]
    run(tune, *words, "--total-steps", 20)
    run(tune, *words, "--resume")
    assert f"of step {best['step']}" in (tmp_path / "best" / "log.txt").read_text().splitlines()[-1]
    with pytest.raises(runs.UserError, match="keep 'best' -> 'last'"):
        run(tune, *words, "--keep", "last", "--total-steps", 40, "--resume")


def test_pairs_on_each_images_own_scale_and_networks_on_that_of_an_average_image(stages, tmp_path):
    shutil.copytree(stages / "pool", tmp_path / "pool")
    run(pool, "curate", "--pool", tmp_path / "pool", "--top", 1, "--norm", "group")
    run(tune, *tuning(stages, tmp_path / "pool"), "--total-steps", 1, "--out", tmp_path / "out")
    first = read_lines(tmp_path / "out" / "metrics.jsonl")[0]
    held = held_out(candidates.open_pool(tmp_path / "pool")[1])
    rows = read_lines(tmp_path / "pool" / "scores.jsonl")
    values = np.array([[row["ssim"], row[BRIGHTNESS]] for row in rows]).reshape(5, 4, 2)
    names = list(dict.fromkeys(row["name"] for row in rows))
    for row in read_lines(tmp_path / "pool" / "pairs.jsonl"):
        own = values[names.index(row["name"])]
        rewards = ((own - own.min(0)) / np.ptp(own, 0)).mean(1)
        assert [row["R_w"], row["R_l"]] == pytest.approx([rewards.max(), rewards.min()])
    # seeds 0 to 3 of the untuned generator are all that is in the pool
    seen = values[[names.index(name) for name in held]]
    expected = 0.5 + (seen.mean((0, 1)) - values.mean((0, 1))) / np.ptp(values, 1).mean(0)
    assert first["split"] == "val" and first["reward"] == pytest.approx(expected.mean(), abs=1e-3)
    norm = json.loads((tmp_path / "pool" / "norm.json").read_text())["metrics"]["ssim"]
    assert norm["pool"] == pytest.approx([values[..., 0].min(), values[..., 0].max()])


def test_the_best_check_is_kept_by_default_and_an_earlier_run_goes_on_as_it_began(stages, tmp_path):
    words = [*tuning(stages), "--out", tmp_path / "out"]
    for begun, more in (("best", []), ("last", ["--keep", "last"])):
        run(tune, *words, "--total-steps", 2, *more)
        run(tune, *words, "--total-steps", 4, "--resume")
        state = weights_of(tmp_path / "out" / "ckpt" / "last.pt")
        assert state["args"]["keep"] == begun and (state["best"] is None) == (begun == "last")
        # after a last step that was not the best
        weights = weights_of(tmp_path / "out" / "weights" / "gen.pth")["params"]
        kept = state["best"]["net"] if state["best"] else state["net"]
        assert all(torch.equal(weights[name], value) for name, value in kept.items())
        shutil.rmtree(tmp_path / "out")
    assert tune.keep_of(tmp_path / "new", "auto", 0) == "last"


def held_out(items):
    """The names that a tuning with TUNE's flags holds out."""
    return tune.hold_out(items, 1, runs.sample_seed(0, 0, 0, "val-groups"))


def test_a_base_network_runs_once_for_an_image(stages, tmp_path, monkeypatch):
    """For all candidates of one image, and once a step for the residual and the condition together."""
    torch.manual_seed(0)
    gen, sizes = flow.FlowSR((8, 16, 24), 1, base=archs.create("compact-small"), steps=2), []
    gen.base.register_forward_hook(lambda net, inputs, output: sizes.append(len(output)))
    torch.nn.init.normal_(gen.net.last.weight, std=0.1)
    lq = torch.rand(1, 3, 8, 8)
    shared = gen.sample(gen.net, lq.expand(3, -1, -1, -1), ["a"] * 3, range(3))
    assert sizes == [1]
    alone = gen.sample(gen.net, lq.repeat(3, 1, 1, 1), ["a"] * 3, range(3))
    torch.testing.assert_close(shared, alone, atol=1e-5, rtol=1e-5)
    assert sizes == [1, 3] and (shared[0] - shared[1]).abs().max() > 1e-3
    hr, lq = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 8, 8)
    assert torch.equal(gen.encode(hr, lq), torch.nn.functional.pixel_unshuffle(hr - gen.base(lq), 4))
    assert torch.equal(gen.condition(lq)[:, 3:], torch.nn.functional.pixel_unshuffle(gen.base(lq), 4))
    assert sizes == [1, 3, 2, 2, 2]


def test_winner_and_loser_share_time_and_noise_and_pairs_have_their_weights(stages, tmp_path, monkeypatch):
    calls, losses, dpo_loss, noised = [], [], preference.dpo_loss, flow.FlowSR.noised

    def recorded_noised(self, x0, eps, t):
        calls.append((eps, t))
        return noised(self, x0, eps, t)

    def recorded_loss(*terms):
        losses.append(terms)
        return dpo_loss(*terms)
    monkeypatch.setattr(flow.FlowSR, "noised", recorded_noised)
    monkeypatch.setattr(preference, "dpo_loss", recorded_loss)
    run(tune, *tuning(stages), "--total-steps", 1, "--out", tmp_path / "out")
    (eps, t), (win, win_ref, lose, lose_ref, beta, weight) = calls[-1], losses[-1]
    assert torch.equal(*eps.chunk(2)) and torch.equal(*t.chunk(2)) and len(set(t.tolist())) == 4
    assert beta == 500 and torch.equal(win, win_ref) and torch.equal(lose, lose_ref)
    held = held_out(candidates.open_pool(stages / "pool")[1])
    rows = [row for row in read_lines(stages / "pool" / "pairs.jsonl") if row["name"] not in held]
    assert set(weight.tolist()) <= set(np.float32(tune.weights_of(rows, "both")).tolist())
    assert len(set(weight.tolist())) > 1
    event = next(e for e in read_lines(tmp_path / "out" / "metrics.jsonl") if e["split"] == "train")
    assert event["lr"] == 1e-4 and event["loss"] == pytest.approx(math.log(2) * weight.mean().item(), abs=1e-5)


def test_equal_grids_are_trained_on(stages, tmp_path, monkeypatch, capsys):
    noised, targets = flow.FlowSR.noised, []

    def recorded(self, x0, eps, t):
        targets.append(x0)
        return noised(self, x0, eps, t)
    monkeypatch.setattr(flow.FlowSR, "noised", recorded)
    spreads = []
    for name, flags in (("plain", []), ("equal", ["--equal-grids"])):
        run(tune, *tuning(stages), *flags, "--total-steps", 1, "--out", tmp_path / name)
        win, lose = targets[-1].chunk(2)
        # channels are the 16 places of a block for every colour
        blocks = (win - lose).mean((2, 3)).unflatten(1, (3, 16))
        spreads.append((blocks - blocks.mean(2, keepdim=True)).abs().max().item())
    assert spreads[0] > 1e-3 and spreads[1] < 1e-6
    with pytest.raises(SystemExit):
        tune.parse_args(["--model", str(tmp_path), "--equal-grids"])
    assert "--equal-grids is for FlowSR" in capsys.readouterr().err


def test_tuning_samples_as_its_pool_was_sampled(stages, tmp_path):
    shutil.copytree(stages / "pool", tmp_path / "quiet")
    about = json.loads((tmp_path / "quiet" / "pool.json").read_text())
    about["generator"]["tau"] = 0.5
    (tmp_path / "quiet" / "pool.json").write_text(json.dumps(about))
    with pytest.raises(runs.UserError, match="pairs of another pool than .* is now"):
        run(tune, *tuning(stages, tmp_path / "quiet"), "--total-steps", 1, "--out", tmp_path / "stale")
    run(pool, "curate", "--pool", tmp_path / "quiet", "--top", 1)
    for name, pairs, tau in (("plain", stages / "pool", 1.0), ("quieter", tmp_path / "quiet", 0.5)):
        run(tune, *tuning(stages, pairs), "--total-steps", 1, "--out", tmp_path / name)
        assert weights_of(tmp_path / name / "weights" / "gen.pth")["settings"]["tau"] == tau


def test_training_starts_at_ln_2_leaves_the_reference_alone_and_saves_the_generator(stages, tmp_path):
    start = weights_of(stages / "gen" / "weights" / "gen.pth")
    run(tune, *tuning(stages), "--total-steps", 2, "--hpo", "none", "--out", tmp_path / "out")
    events = read_lines(tmp_path / "out" / "metrics.jsonl")
    first = next(e for e in events if e["split"] == "train")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["win_change"] == 0
    assert [e["step"] for e in events if e["split"] == "val"] == [0, 2]
    after = weights_of(stages / "gen" / "weights" / "gen.pth")
    assert all(torch.equal(after["params"][k], v) for k, v in start["params"].items())
    assert flow.load_flow(tmp_path / "out").settings() == flow.load_flow(stages / "gen").settings()


@pytest.mark.parametrize("more", [["--hpo", "inter"], ["--patch", 4], ["--accumulate", 2], ["--keep", "best"],
                                  ["--precision", "bf16"], ["--val-groups", 0]])
def test_variants_of_the_training_run(stages, tmp_path, more):
    run(tune, *tuning(stages), "--total-steps", 2, *more, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "weights" / "gen.pth").is_file()


def test_micro_batches_add_up(stages, tmp_path):
    for n in (1, 2):
        run(tune, *tuning(stages), "--total-steps", 2, "--accumulate", n, "--out", tmp_path / str(n))
    one, two = (weights_of(tmp_path / str(n) / "weights" / "gen.pth")["params"] for n in (1, 2))
    assert all(torch.allclose(one[k], two[k], atol=2e-5) for k in one)


def test_likelihood_displacement_ends_the_training(stages, tmp_path):
    words = [*tuning(stages), "--lr", "0.02", "--total-steps", 30, "--out", tmp_path / "out"]
    run(tune, *words)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "likelihood displacement" in log and "step 30/30" not in log
    assert (tmp_path / "out" / "weights" / "gen.pth").is_file()
    run(tune, *words, "--resume")
    assert "nothing to do" in (tmp_path / "out" / "log.txt").read_text()


# Rounds

def test_the_next_round_starts_from_the_tuned_generator_and_finished_rounds_stay(
        stages, quintuplets, tmp_path, monkeypatch):
    ran = []

    def in_this_process(command, **more):
        script, *words = command[2:]
        ran.append(script)
        run({"dpo.pool": pool, "dpo.tune": tune}[script], *words)
        return argparse.Namespace(returncode=0)
    monkeypatch.setattr(rounds, "subprocess", argparse.Namespace(run=in_this_process))
    crops = " ".join(map(str, CROPS))
    words = ["--gen", stages / "gen", "--sample", f"--hr {quintuplets} --groups 4 --samples 4 {crops}", "--score",
             f"--fr ssim --nr {BRIGHTNESS}", "--curate", "--top 1",
             "--tune", f"{' '.join(map(str, TUNE))} --total-steps 2", "--seed", 5, "--threads", 1,
             "--out", tmp_path / "out"]
    run(rounds, *words, "--rounds", 1)
    run(rounds, *words, "--rounds", 2)
    assert ran == ["dpo.pool", "dpo.pool", "dpo.pool", "dpo.tune"] * 2
    about = [json.loads((tmp_path / "out" / f"pool-{r}" / "pool.json").read_text()) for r in (1, 2)]
    tuned = flow.load_flow(tmp_path / "out" / "tuned-1")
    assert about[1]["generator"] == tuned.identity(tuned.net) != about[0]["generator"]
    assert [each["seed"] for each in about] == [6, 7]
    assert (tmp_path / "out" / "tuned-2" / "weights" / "gen.pth").exists()
    contents = [{path.read_bytes() for path in (tmp_path / "out" / f"pool-{r}" / "lq").iterdir()} for r in (1, 2)]
    assert not contents[0] & contents[1]
    with pytest.raises(runs.UserError, match="other settings .curate"):
        run(rounds, *words, "--curate", "--top 2")
    with pytest.raises(SystemExit):
        run(rounds, *words, "--tune", "--no-such-flag 1")
    assert len(ran) == 8


# Comparing generators

@pytest.fixture(scope="module")
def compared(stages, quintuplets, tmp_path_factory):
    """-> OUT of dpo.compare, and its words"""
    out = tmp_path_factory.mktemp("compare")
    run(tune, *tuning(stages), "--total-steps", 2, "--out", out / "tuned")
    words = ["--gen", stages / "gen", out / "tuned", "--hr", quintuplets, "--groups", 4, *CROPS,
             "--norm-file", stages / "pool" / "norm.json", "--watch", "psnr", "--samples", 4, "--diversity", "proxy",
             "--out", out / "eval"]
    run(compare, *words)
    return out / "eval", words


BRIGHTNESS = "test_rewards:brightness"


def test_the_comparison_is_what_its_files_say(compared, stages):
    out, _ = compared
    summary = json.loads((out / "eval.json").read_text())
    rows = summary["rows"]
    assert list(rows) == ["gen", "tuned", "gen, 0.9 of the noise", "gen, 0.7 of the noise", "gen + grid of tuned",
                          "gen + unsharp 0.5", "gen + unsharp 1", "gen, mean of seeds"]
    assert summary["inside"] == ["ssim", BRIGHTNESS] and summary["outside"] == ["psnr"]
    names = list(list_images(out / "images" / "lq"))
    outputs = torch.stack([torch.stack([load_image(out / "gen" / name / f"{seed}.png") for seed in range(4)])
                           for name in names]).float() / 255
    photos = np.array([data.photo_of(name) for name in names])
    # over photographs: first the mean of each, then of all
    bright = 100 * outputs.mean((2, 3, 4)).numpy()
    expected = np.mean([bright[photos == photo].mean() for photo in dict.fromkeys(photos)])
    assert rows["gen"]["means"][BRIGHTNESS]["mean"] == pytest.approx(expected, abs=1e-3)
    expected = np.mean([bright[photos == photo].std(1).mean() for photo in dict.fromkeys(photos)])
    assert rows["gen"]["seed_std"][BRIGHTNESS] == pytest.approx(expected, abs=1e-3)
    for row in rows.values():
        means, curve = row["means"], row["curve"]
        assert means["best@4"]["mean"] >= means["reward"]["mean"] >= means["worst@4"]["mean"]
        assert curve["best"][0] == pytest.approx(curve["mean"][0])
        assert curve["worst"][-1] == pytest.approx(means["worst@4"]["mean"])
    # the reward is linear in the metrics
    norm = json.loads((stages / "pool" / "norm.json").read_text())
    for row, parts in rows.items():
        values = parts["per_photo"]
        r = candidates.rewards_of(np.array([values["ssim"], values[BRIGHTNESS]]).T, norm, "hybrid")
        assert values["reward"] == pytest.approx(list(r), abs=1e-6)
        if row != "gen":
            difference = np.mean(values["psnr"]) - np.mean(rows["gen"]["per_photo"]["psnr"])
            assert parts["minus_first"]["psnr"]["mean"] == pytest.approx(difference)
    sharp, plain = (load_image(out / row / names[0] / "2.png") for row in ("gen + unsharp 1", "gen"))
    expected = (255 * metrics.unsharp(outputs[0, 2][None], 1.0)[0]).round().byte()
    assert torch.equal(sharp, expected) and not torch.equal(sharp, plain)
    mean = load_image(out / "gen, mean of seeds" / f"{names[0]}.png").float() / 255
    assert (mean - outputs[0].mean(0)).abs().max() < 0.51 / 255
    still = rows["gen, mean of seeds"]["means"]
    assert still["best@4"]["mean"] == still["worst@4"]["mean"] and still["seed std"]["mean"] == 0
    gen, lq = flow.load_flow(stages / "gen", tau=0.7), load_image(out / "images" / "lq" / f"{names[0]}.png")
    quiet = load_image(out / "gen, 0.7 of the noise" / names[0] / "1.png").float() / 255
    again = gen.sample(gen.net, lq[None].float() / 255, [names[0]], [1])[0]
    assert (again - quiet).abs().max() < 0.51 / 255 + 1e-5
    assert rows["gen, 0.7 of the noise"]["means"]["diversity"]["mean"] > 0
    # by hand: what tuning changes at each place of the 4x4 blocks of all images and seeds, less its mean
    tuned = torch.stack([torch.stack([load_image(out / "tuned" / name / f"{seed}.png") for seed in range(4)])
                         for name in names]).float() / 255
    grid = torch.stack([torch.stack([(tuned - outputs)[..., y::4, x::4].mean((0, 1, 3, 4)) for x in range(4)], 1)
                        for y in range(4)], 1)
    grid -= grid.mean((1, 2), keepdim=True)
    shifted = load_image(out / "gen + grid of tuned" / names[0] / "1.png")
    gen = flow.load_flow(stages / "gen")
    again = gen.sample(gen.net, lq[None].float() / 255, [names[0]], [1])[0]
    size = again.shape[1] // 4
    with_grid, without = ((255 * image.clamp(0, 1)).round().byte() == shifted
                          for image in (again + grid.repeat(1, size, size), again))
    assert with_grid.float().mean() > 0.99 > 0.95 > without.float().mean()
    assert summary["lower_is_better"]["diversity"] is None
    assert load_image(out / "grid.png").shape[0] == 3 and (out / "curves.png").is_file()
    assert "tuned - gen" in (out / "table.md").read_text()


def test_comparing_again_computes_nothing_and_another_generator_is_refused(compared, monkeypatch):
    out, words = compared
    rows = json.loads((out / "eval.json").read_text())["rows"]
    monkeypatch.setattr(flow.FlowSR, "sample", lambda *_: pytest.fail("sampled again"))
    run(compare, *words)
    assert json.loads((out / "eval.json").read_text())["rows"] == rows
    with pytest.raises(runs.UserError, match="another generator"):
        run(compare, *words, "--names", "tuned", "gen")
    with pytest.raises(runs.UserError, match="--shown-rows 'other': no such row; choose from gen, tuned"):
        run(compare, *words, "--shown-rows", "other")
    width = image_size(out / "grid.png")[0]
    run(compare, *words, "--shown-rows", "gen + unsharp 1")
    assert image_size(out / "grid.png")[0] < width


def test_comparing_without_ground_truth(stages, tmp_path):
    words = ["--gen", stages / "gen", "--lq-dir", stages / "pool" / "lq", "--norm-file", stages / "pool" / "norm.json",
             "--samples", 2, "--diversity", "none", "--less-noise", "--watch", "--out", tmp_path / "eval"]
    norm = json.loads((stages / "pool" / "norm.json").read_text())
    del norm["metrics"]["ssim"]
    runs.save_json(tmp_path / "nr.json", norm)
    with pytest.raises(runs.UserError, match="nr.json has no full-reference metric: take --reward nr"):
        run(compare, *words, "--norm-file", tmp_path / "nr.json")
    for more in ([], ["--reward", "nr", "--watch", "psnr"]):
        with pytest.raises(runs.UserError, match="(ssim|psnr): .* no ground truth to compare with: give --gt-dir"):
            run(compare, *words, *more)
        assert not (tmp_path / "eval").exists()
    assert compare.parse_args(["--lq-dir", "x"]).watch == ["nima"]
    assert "psnr" in compare.parse_args(["--hr", "x"]).watch
    run(compare, *words, "--reward", "nr")
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["inside"] == [BRIGHTNESS]
    run(compare, *words, "--out", tmp_path / "paired", "--reward", "nr", "--gt-dir", stages / "pool" / "gt")
    summary = json.loads((tmp_path / "paired" / "eval.json").read_text())
    # measured, and no part of this reward
    assert summary["inside"] == [BRIGHTNESS] and summary["outside"] == ["ssim"]


# Errors are one line

def refused(script, match, name, *words):
    result = script(name, *words, check=False)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert any(": error: " in line and match in line for line in lines), result.stderr


def test_m_below_2n(stages, script):
    refused(script, "--top 3: 4 candidates per image are not twice as many",
            "dpo.pool", "curate", "--pool", stages / "pool", "--top", 3)


def test_unpaired_images_with_a_full_reference_reward(stages, script, tmp_path):
    folder = tmp_path / "pool"
    run(pool, "sample", "--gen", stages / "gen", "--lq-dir", stages / "pool" / "lq", "--samples", 2, "--out", folder)
    refused(script, "no ground truth to compare with: --fr without names",
            "dpo.pool", "score", "--pool", folder, "--fr", "ssim", "--nr", BRIGHTNESS)
    run(pool, "score", "--pool", folder, "--fr", "--nr", BRIGHTNESS)
    with pytest.raises(runs.UserError, match="--reward hybrid needs a full-reference metric"):
        run(pool, "curate", "--pool", folder, "--top", 1)
    run(pool, "curate", "--pool", folder, "--top", 1, "--reward", "nr")


def test_groups_without_spread_and_metrics_without(stages, tmp_path, capsys):
    folder = tmp_path / "pool"
    shutil.copytree(stages / "pool", folder)
    rows = read_lines(folder / "scores.jsonl")
    first = rows[0]["name"]
    same = {"ssim": 0.5, BRIGHTNESS: 30.0}
    candidates.write_lines(folder / "scores.jsonl", [row | (same if row["name"] == first else {}) for row in rows])
    with pytest.raises(runs.UserError, match=f"1 image.s. are all equally good, first {first}"):
        run(pool, "curate", "--pool", folder, "--top", 1)
    run(pool, "curate", "--pool", folder, "--top", 1, "--min-sigma", "1e-6")
    assert "4 images (1 dropped)" in capsys.readouterr().out
    candidates.write_lines(folder / "scores.jsonl", [row | {"ssim": 0.5} for row in rows])
    with pytest.raises(runs.UserError, match="ssim is 0.5 for every candidate"):
        run(pool, "curate", "--pool", folder, "--top", 1)


def test_scores_that_are_not_finite(stages, script, rewards, tmp_path):
    (rewards / "bad_at_white.py").write_text(
        "import torch\ndef build(device):\n"
        "    return lambda x: torch.where(x.amin((1, 2, 3)) > 0.99, torch.nan, x.mean((1, 2, 3)))\n")
    folder = tmp_path / "pool"
    shutil.copytree(stages / "pool", folder)
    name = sorted((folder / "cand").iterdir())[0]
    save_image(name / "1.png", torch.ones(3, 32, 32))
    script("dpo.pool", "score", "--pool", folder, "--fr", "--nr", "bad_at_white:build")
    done = script("dpo.pool", "curate", "--pool", folder, "--top", 1, "--reward", "nr")
    assert f"1 images have scores that are not finite and are left out, first {name.name}" in done.stdout
    assert name.name not in {row["name"] for row in read_lines(folder / "pairs.jsonl")}
    rows = read_lines(folder / "scores.jsonl")
    candidates.write_lines(folder / "scores.jsonl", [row | {"bad_at_white:build": float("nan")} for row in rows])
    with pytest.raises(runs.UserError, match="every image has scores that are not finite"):
        run(pool, "curate", "--pool", folder, "--top", 1)


def test_a_scale_of_other_metrics(stages, tmp_path):
    norm = json.loads((stages / "pool" / "norm.json").read_text())
    words = ["curate", "--pool", stages / "pool", "--top", 1, "--norm-file", tmp_path / "norm.json", "--out",
             tmp_path / "out"]
    norm["metrics"]["gmsd"] = norm["metrics"].pop("ssim")
    (tmp_path / "norm.json").write_text(json.dumps(norm))
    with pytest.raises(runs.UserError, match="a scale of other metrics: ssim is missing; gmsd is unknown here"):
        run(pool, *words)
    norm["metrics"]["ssim"] = norm["metrics"].pop("gmsd")
    norm["metrics"][BRIGHTNESS]["identity"] = "other weights"
    (tmp_path / "norm.json").write_text(json.dumps(norm))
    with pytest.raises(runs.UserError, match=f"{BRIGHTNESS} is another model there"):
        run(pool, *words)


@pytest.mark.parametrize("low, high", [(0.5, 0.5), (1, 0), (0, None), (float("nan"), 1)])
def test_a_scale_without_range(stages, tmp_path, low, high):
    norm = json.loads((stages / "pool" / "norm.json").read_text())
    norm["metrics"]["ssim"] |= {"low": low, "high": high}
    (tmp_path / "norm.json").write_text(json.dumps(norm))
    with pytest.raises(runs.UserError, match="ssim goes from .*, which is no range"):
        run(pool, "curate", "--pool", stages / "pool", "--top", 1, "--norm-file", tmp_path / "norm.json",
            "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_stage_left_is_looked_at_before_it_is_used(stages, tmp_path):
    shutil.copytree(stages / "pool", tmp_path / "pool")
    folder = tmp_path / "pool"
    scores, pairs = read_lines(folder / "scores.jsonl"), read_lines(folder / "pairs.jsonl")

    def lines(rows):
        return "".join(json.dumps(row) + "\n" for row in rows)
    curate = pool, ["curate", "--pool", folder, "--top", 1]
    train = tune, [*tuning(stages, folder), "--out", tmp_path / "out"]
    unweighted = [{k: v for k, v in row.items() if k != "w_inter"} for row in pairs]
    for name, damaged, (script, words), match in (
            ("scores.jsonl", lines(row for row in scores if row["seed"]), curate, "seeds of an image are missing"),
            ("scores.json", "[]", curate, "not one whole row"), ("scores.jsonl", "", curate, "not one whole row"),
            ("scores.jsonl", lines(row for row in scores if row["seed"] < 3), curate, "not as many seeds as were"),
            ("curation.json", "{}", train, "is incomplete"), ("pairs.jsonl", lines(unweighted), train, "is incomplete"),
            ("pairs.jsonl", "", train, "is incomplete"), ("pairs.jsonl", "{", train, "damaged"),
            ("pairs.jsonl", lines(row | {"w_intra": "1"} for row in pairs), train, "is incomplete"),
            ("pairs.jsonl", lines(row | {"name": "other"} for row in pairs), train, "pairs of another pool"),
            ("pairs.jsonl", lines(row | {"w_seed": 99} for row in pairs), train, "pairs of another pool")):
        text = (folder / name).read_text()
        (folder / name).write_text(damaged)
        with pytest.raises(runs.UserError, match=match):
            run(script, *words)
        (folder / name).write_text(text)
    path = next(iter(list_images(folder / "lq").values()))
    save_image(path, load_image(path)[:, :7])
    save_image(folder / "gt" / path.name, torch.zeros(3, 28, 32))
    for patch, match in ((0, "--patch 0 needs one size"), (8, "8x7 pixels, smaller than --patch 8")):
        with pytest.raises(runs.UserError, match=match):
            run(tune, *train[1], "--patch", patch, "--val-groups", 0)
    assert not (tmp_path / "out").exists()


def test_a_held_out_reward_that_is_not_finite_ends_the_run(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "rewards_of", lambda raw, *more: np.full(raw.shape[:-1], np.nan))
    with pytest.raises(runs.UserError, match="the reward of held-out images is nan"):
        run(tune, *tuning(stages), "--out", tmp_path / "out")


def test_a_reference_of_another_size(stages, tmp_path):
    shutil.copytree(stages / "pool" / "gt", tmp_path / "gt")
    path = next(iter(list_images(tmp_path / "gt").values()))
    save_image(path, torch.zeros(3, 28, 32))
    with pytest.raises(runs.UserError, match=f"{path.name}: 8x8 pixels, expected a quarter of its original's 32x28"):
        run(pool, "sample", "--gen", stages / "gen", "--lq-dir", stages / "pool" / "lq", "--gt-dir", tmp_path / "gt",
            "--out", tmp_path / "pool")
    assert not (tmp_path / "pool").exists()


def test_a_missing_folder_of_stable_diffusion(stages, script, tmp_path):
    refused(script, "sd2", "dpo.pool", "sample", "--model", tmp_path / "sd2", "--gen", tmp_path / "controlnet",
            "--lq-dir", stages / "pool" / "lq", "--out", tmp_path / "pool")


def test_pairs_of_another_generator(stages, quintuplets, tmp_path):
    run(pretrain, "--hr", quintuplets, "--out", tmp_path / "gen", "--total-steps", 1, *GEN, "--seed", 5)
    with pytest.raises(runs.UserError, match="another generator's"):
        run(tune, "--gen", tmp_path / "gen", "--pairs", stages / "pool", *TUNE, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_with_a_flag_that_is_gone_is_not_continued_otherwise(stages, tmp_path):
    run(tune, *tuning(stages), "--total-steps", 2, "--out", tmp_path / "out")
    last = tmp_path / "out" / "ckpt" / "last.pt"
    state = weights_of(last)
    for name, value in tune.RETIRED.items():
        state["args"][name] = value
    torch.save(state, last)
    run(tune, *tuning(stages), "--total-steps", 2, "--out", tmp_path / "out", "--resume")
    state["args"]["beta_t"] = "sq"
    torch.save(state, last)
    with pytest.raises(runs.UserError, match="beta_t 'sq' is no flag any more"):
        run(tune, *tuning(stages), "--total-steps", 2, "--out", tmp_path / "out", "--resume")


def test_images_that_changed_are_refused(stages, tmp_path):
    shutil.copytree(stages / "pool" / "lq", tmp_path / "lq")
    words = ["sample", "--gen", stages / "gen", "--lq-dir", tmp_path / "lq", "--samples", 2, "--out", tmp_path / "pool"]
    run(pool, *words)
    save_image(tmp_path / "lq" / "new.png", torch.rand(3, 8, 8))
    with pytest.raises(runs.UserError, match="made with other settings .images"):
        run(pool, *words)


@fast
def test_pool_and_test_draw_apart(quintuplets, tmp_path):
    source = dict(hr=quintuplets, groups=6, patch=8, load_size=48, degradation="two-round", seed=0)
    contents = {}
    for purpose in ("pool", "test"):
        folder = tmp_path / purpose
        candidates.open_images(folder, runs.World(0, 1, torch.device("cpu")), source, purpose)
        contents[purpose] = {path.read_bytes() for path in (folder / "lq").iterdir()}
    assert len(contents["pool"]) == 6 and not contents["pool"] & contents["test"]


@pytest.mark.parametrize("match, name, words", [
    ("required: STAGE", "dpo.pool", []), ("required: --demo", "dpo", []),
    ("--norm group", "dpo.pool", ["curate", "--norm", "group", "--norm-file", "norm.json"]),
    ("not a scale of the reward", "dpo.compare", ["--norm-file", "POOL/scores.json", "--hr", "x"]),
    ("images without candidates", "dpo.pool", ["score", "--pool", "IMAGES"]),
    ("which images?", "dpo.pool", ["sample"]), ("not both", "dpo.pool", ["sample", "--hr", "a", "--lq-dir", "b"]),
    ("--keep best", "dpo.tune", ["--keep", "best", "--val-groups", "0"]),
    ("multiple of 4", "dpo.pool", ["sample", "--hr", "a", "--patch", "64", "--load-size", "200"]),
    ("multiple of 4", "dpo.pretrain", ["--patch", "64", "--load-size", "200"]),
    ("--tau is FlowSR's", "dpo.pool", ["sample", "--hr", "a", "--model", "sd2", "--tau", "1"]),
    ("--less-noise is for FlowSR", "dpo.compare", ["--hr", "a", "--model", "sd2", "--less-noise", "0.5"]),
    ("go with --model", "dpo.tune", ["--prompts", "tags"]),
    ("--gradient-checkpointing goes with", "dpo.tune", ["--gradient-checkpointing"]),
    ("NAME=FILE", "dpo.pool", ["score", "--metric-weights", "niqe"]),
    ("no generator there", "dpo.pool", ["sample", "--gen", "nowhere", "--lq-dir", "x"]),
    ("not there", "dpo.pool", ["curate", "--pool", "nowhere"]), ("not there", "dpo.tune", ["--pairs", "nowhere"])])
def test_flags_that_cannot_work(script, stages, tmp_path, match, name, words):
    (tmp_path / "pool.json").write_text("{}")
    places = {"POOL": stages / "pool", "IMAGES": tmp_path}
    refused(script, match, name, *("/".join(str(places.get(part, part)) for part in word.split("/")) for word in words))


def test_damaged_generators(stages, tmp_path):
    words = ["sample", "--gen", tmp_path / "gen.pth", "--lq-dir", stages / "pool" / "lq", "--out", tmp_path / "pool"]
    (tmp_path / "gen.pth").write_bytes(b"no")
    with pytest.raises(runs.UserError, match="not a generator of dpo.pretrain"):
        run(pool, *words)
    content = weights_of(stages / "gen" / "weights" / "gen.pth")
    del content["params_ema"]["last.bias"]
    torch.save(content, tmp_path / "gen.pth")
    with pytest.raises(runs.UserError, match="last.bias is missing"):
        run(pool, *words)


# Flags, help and demo

@fast
@pytest.mark.parametrize("parse, demo", [
    (pretrain.parse_args, pretrain.DEMO), (tune.parse_args, tune.DEMO), (compare.parse_args, compare.DEMO),
    *((lambda words, stage=stage: pool.parse_args([stage, *words]), demo) for stage, demo in pool.DEMO.items())])
def test_the_settings_of_a_demo_are_flags(parse, demo):
    assert demo.items() <= vars(parse(["--demo"])).items()
    if "out" in demo:
        # flags that are given win
        assert str(parse(["--demo", "--out", "other"]).out) == "other"


@pytest.mark.parametrize("name", ["dpo", "dpo.pretrain", "dpo.pool", "dpo.pool sample", "dpo.pool score",
                                  "dpo.pool curate", "dpo.tune", "dpo.rounds", "dpo.compare"])
def test_help_answers_at_once(script, name):
    module, *stage = name.split()
    text = script(module, *stage, "--help", timeout=20).stdout
    assert text.startswith(f"usage: python -m {name} ")


@pytest.mark.slow
def test_a_demo_makes_what_it_starts_from(script, tmp_path):
    """In an empty folder, with trainings of two steps."""
    log = script("dpo.tune", "--demo", "--total-steps", 2, cwd=tmp_path, timeout=580).stdout
    for path, command in options.DEMO_COMMANDS.items():
        if path != options.DEMO_TUNED / "weights" / "gen.pth":
            assert f"{path} is missing and made first: python -m {command[0]}" in log
        assert (tmp_path / path).exists()
    for folder in (options.DEMO_GENERATOR, options.DEMO_TUNED):
        assert weights_of(tmp_path / folder / "ckpt" / "last.pt")["step"] == 2
    log = script("dpo.tune", "--demo", "--total-steps", 2, "--resume", "auto", cwd=tmp_path).stdout
    assert "missing" not in log and log.count("nothing to do") == 1
    log = script("dpo.compare", "--demo", cwd=tmp_path).stdout
    assert "missing" not in log and "8 images of 2 photos" in log


def test_all_stages_of_the_demo(monkeypatch, capsys):
    """python -m dpo --demo starts the scripts one after the other, and continues trainings that are there."""
    started = []
    monkeypatch.setattr(demo.subprocess, "run",
                        lambda command, **more: started.append(command[2:]) or argparse.Namespace(returncode=0))
    monkeypatch.setattr(sys, "argv", ["dpo", "--demo", "--total-steps", "2"])
    demo.main()
    assert [words[0] for words in started] == ["dpo.pretrain", "dpo.pool", "dpo.pool", "dpo.pool", "dpo.tune",
                                               "dpo.compare"]
    assert [words[1] for words in started[1:4]] == ["sample", "score", "curate"]
    for training in (started[0], started[4]):
        assert training[1:] == ["--demo", "--resume", "auto", "--total-steps", "2"]
    assert "# python -m dpo.pretrain --demo --resume auto --total-steps 2" in capsys.readouterr().out
