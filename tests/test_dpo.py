"""dpo.py: reward, curation, weights, loss and estimates against hand-worked numbers and brute force; the stages as a user runs them (specification, section 6)."""
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch

import data
from dpo import __main__ as dpo
from dpo import pool as dpo_pool
from dpo import tune as dpo_train
from dpo import flow
from dpo import preference
import metrics as quality
import runs
from images import image_size, list_images, load_image, save_image

fast = pytest.mark.fast


# Reward

@fast
def test_a_pool_is_normalised_to_0_and_1_and_affine_changes_of_a_metric_do_not_matter():
    raw = np.random.default_rng(0).normal(size=(5, 7, 3))
    names, lower = ["a", "b", "c"], {"a": False, "b": True, "c": False}
    norm = preference.fit_norm(raw, names, lower)
    scores = preference.normalise(raw, names, norm)
    assert scores.min((0, 1)) == pytest.approx([0, 0, 0]) and scores.max((0, 1)) == pytest.approx([1, 1, 1])
    assert np.argmax(scores[..., 1]) == np.argmin(raw[..., 1])                    # lower is better
    other = raw * [3, 0.1, 20] + [5, -2, 100]
    assert np.allclose(preference.normalise(other, names, preference.fit_norm(other, names, lower)), scores)
    r = preference.reward(scores, [True, False, False])
    assert ((r >= 0) & (r <= 1)).all() and np.allclose(r, scores[..., 0] / 2 + (scores[..., 1] + scores[..., 2]) / 4)


@fast
def test_a_later_network_is_judged_on_the_first_ones_scale():
    raw = np.array([[[0.0], [10.0]]])
    norm = preference.fit_norm(raw, ["a"], {"a": False})
    assert preference.normalise(np.array([[[20.0], [-10.0]]]), ["a"], norm).tolist() == [[[2.0], [-1.0]]]


@fast
def test_percentiles_and_groups():
    raw = np.array([[[0.0], [1.0], [2.0], [100.0]], [[5.0], [5.0], [5.0], [5.0]]])
    low = preference.fit_norm(raw, ["a"], {"a": False}, 10)["a"]
    assert low["high"] == pytest.approx(np.percentile(raw, 90))
    assert preference.normalise_groups(raw, ["a"], {"a": True})[..., 0].tolist() == [[1.0, 0.99, 0.98, 0.0], [0.5] * 4]


@fast
@pytest.mark.parametrize("which, flag", [("hybrid", "--nr"), ("nr", "--nr")])
def test_a_reward_without_its_metrics_is_refused(which, flag):
    with pytest.raises(ValueError, match=flag):
        preference.reward(np.ones((2, 3, 1)), [True], which)


@fast
def test_a_metric_that_never_differs_is_named():
    with pytest.raises(ValueError, match="dull is 3 for every candidate"):
        preference.fit_norm(np.full((2, 2, 1), 3.0), ["dull"], {"dull": False})


# Curation and weights

@fast
def test_pairs_are_the_best_against_the_worst():
    r = np.random.default_rng(1).random((6, 9))
    best, worst = preference.choose(r, 4)
    for g in range(6):
        assert not set(best[g]) & set(worst[g]) and r[g, best[g]].min() > r[g, worst[g]].max()
        assert r[g, best[g][0]] == r[g].max() and r[g, worst[g][0]] == r[g].min()
    assert preference.choose(np.zeros((1, 4)), 1)[0].tolist() == [[0]]            # ties: the earlier seed


@fast
@pytest.mark.parametrize("n", [0, 5])
def test_too_few_candidates_are_refused(n):
    with pytest.raises(ValueError, match="--top"):
        preference.choose(np.zeros((1, 9)), n)


@fast
def test_weights_of_a_worked_example():
    """Two groups of four, N = 1 and 2."""
    r = np.array([[0.1, 0.9, 0.5, 0.3], [0.4, 0.6, 0.5, 0.5]])
    intra, inter = preference.pair_weights(r, *preference.choose(r, 2))
    # first group: winners .9, .5; losers .1, .3 -> gaps .8 .6 .4 .2, mean .5; second: winners .6, .5 (seed 2), losers .4, .5 (seed 3) -> .2 .1 .1 0, mean .1
    assert np.allclose(intra, [[[1.3, 1.1], [0.9, 0.7]], [[1.1, 1.0], [1.0, 0.9]]])
    sigma = np.array([math.sqrt((0.35 ** 2 + 0.45 ** 2 + 0.05 ** 2 + 0.15 ** 2) / 4), math.sqrt(2 * 0.1 ** 2 / 4)])
    assert np.allclose(inter, sigma + 1 - sigma.mean())


@fast
@pytest.mark.parametrize("seed", range(3))
def test_both_weights_average_to_one(seed):
    r = np.random.default_rng(seed).random((20, 16))
    intra, inter = preference.pair_weights(r, *preference.choose(r, 4))
    assert np.allclose(intra.mean((1, 2)), 1) and inter.mean() == pytest.approx(1)
    for hpo in ("none", "intra", "inter", "both"):
        assert np.mean(preference.combine(intra, inter[:, None, None], hpo)) == pytest.approx(1)


@fast
def test_gain_multiplies_what_differs_from_one():
    w = preference.combine(np.array([1.2, 0.9]), np.array([1.0, 1.0]), "both", 5)
    assert w.tolist() == pytest.approx([2.0, 0.5]) and preference.combine(np.array([0.5]), 1.0, "intra", 10).tolist() == [0.0]
    assert preference.combine(np.array([1.2]), np.array([3.0]), "none").tolist() == 1.0


# Loss

@fast
def test_loss_at_the_start_is_ln_2_and_its_gradient_favours_the_winner():
    d = torch.rand(6)
    win, lose = d.clone().requires_grad_(), d.clone().requires_grad_()
    loss, inside = preference.dpo_loss(win, d, lose, d, 5000.0, torch.linspace(0.5, 1.5, 6))
    assert torch.allclose(loss, math.log(2) * torch.linspace(0.5, 1.5, 6)) and not inside.any() and preference.implicit_accuracy(inside) == 0.5
    loss.sum().backward()
    assert (win.grad > 0).all() and (lose.grad < 0).all()                         # downhill: the winner's error shrinks


@fast
def test_swapping_winner_and_loser_flips_the_sign():
    a, b, c, d = torch.rand(4, 5)
    assert torch.allclose(preference.dpo_loss(a, b, c, d, 700.0)[1], -preference.dpo_loss(c, d, a, b, 700.0)[1])


@fast
def test_loss_of_a_worked_example():
    loss, inside = preference.dpo_loss(torch.tensor([0.10]), torch.tensor([0.12]), torch.tensor([0.30]), torch.tensor([0.29]), 100.0, 2.0)
    assert inside.item() == pytest.approx(1.5, abs=1e-5) and loss.item() == pytest.approx(2 * math.log(1 + math.exp(-1.5)), abs=1e-5)


@fast
def test_the_error_does_not_depend_on_the_size_of_images():
    small = torch.rand(2, 48, 4, 4)
    assert torch.allclose(preference.error(small, torch.zeros_like(small)), preference.error(small.repeat(1, 1, 3, 2), torch.zeros(2, 48, 12, 8)))
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
    with pytest.raises(ValueError):
        preference.best_of(r, m + 1)


@fast
def test_estimates_of_many_seeds_stay_finite():
    r = np.arange(2000.0)[None]
    assert preference.best_of(r, 64).item() == pytest.approx(64 / 65 * 2001 - 1, rel=1e-9)   # expected maximum of 64 of 1..2000, minus 1
    assert preference.curves(np.random.default_rng(0).random((2, 12)))["k"] == [1, 2, 4, 8, 12]


# Order of pairs

def pair_rows(groups=3, each=4):
    return [{"name": f"g{g}", "w_seed": k, "l_seed": 9, "w_intra": 1.0, "w_inter": 1.0} for g in range(groups) for k in range(each)]


@fast
def test_an_epoch_is_every_pair_once_and_goes_through_the_groups_in_turn():
    pairs = dpo_train.PairSet(pair_rows(), np.ones(12), {}, {}, lambda *words: runs.sample_seed(0, *words), 4, 0)
    order = [pairs.index(step, lane) for step in range(1, 7) for lane in range(4)]
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12)) and order[:12] != order[12:]
    assert all(len({pairs.rows[k]["name"] for k in order[n:n + 3]}) == 3 for n in range(0, 24, 3))


@fast
def test_photos_are_held_out_whole():
    names = [f"photo{p}-{k}-0" for p in range(4) for k in range(3)]
    held = dpo_train.hold_out(names, 4, 0)
    assert len(held) == 6 and len({data.photo_of(name) for name in held}) == 2 and not dpo_train.hold_out(names, 0, 0)


# A toy of two modes: the winners' becomes likelier

def test_dpo_moves_what_is_sampled_towards_the_winners():
    """Images are a pattern or its negative by chance; the pattern wins. FlowNet as small as it goes."""
    torch.manual_seed(0)
    gen = flow.FlowSR((16, 16, 16), 1, steps=6)
    lq, draw, pattern = torch.full((32, 3, 4, 4), 0.5), torch.Generator().manual_seed(0), torch.randn(3, 16, 16).sign()
    images = lambda positive: 0.5 + 0.3 * (2 * positive.float() - 1).view(-1, 1, 1, 1) * pattern
    gen.sigma_r = 0.3
    opt = torch.optim.AdamW(gen.net.parameters(), 3e-3)
    for _ in range(250):
        x0 = gen.encode(images(torch.arange(32) < 16), lq)
        xt, target = gen.noised(x0, torch.randn(x0.shape, generator=draw), t := torch.rand(32, generator=draw))
        loss = preference.error(gen.predict(gen.net, xt, t, lq), target).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    share = lambda net: (gen.sample(net, lq[:1].expand(64, -1, -1, -1), ["toy"] * 64, range(64)) - 0.5).mul(pattern).mean((1, 2, 3)).gt(0).float().mean().item()
    before = share(gen.net)
    assert 0.2 < before < 0.8
    import copy
    reference, net = copy.deepcopy(gen.net).requires_grad_(False), gen.net
    opt = torch.optim.AdamW(net.parameters(), 5e-4)
    x0, lqs = gen.encode(torch.cat([images(torch.ones(16)), images(torch.zeros(16))]), lq), lq
    for _ in range(50):
        t, eps = torch.rand(16, generator=draw).repeat(2), torch.randn(16, *x0.shape[1:], generator=draw).repeat(2, 1, 1, 1)
        xt, target = gen.noised(x0, eps, t)
        ours, theirs = preference.error(gen.predict(net, xt, t, lqs), target).chunk(2), preference.error(gen.predict(reference, xt, t, lqs), target).chunk(2)
        loss = preference.dpo_loss(ours[0], theirs[0], ours[1], theirs[1], 20.0)[0].mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert share(net) > before + 0.15


# From scores to pairs, and what is trained on

@pytest.fixture
def scored(tmp_path):
    """A pool's scores alone: 4 images of 2 photos, 8 candidates, two metrics that disagree; full: higher is better, none: lower is better."""
    rng = np.random.default_rng(0)
    rows = [{"name": f"photo{g // 2}-{g}-0", "seed": s, "full": float(rng.random()), "none": float(10 * rng.random())} for g in range(4) for s in range(8)]
    dpo_pool.write_lines(tmp_path / "scores.jsonl", rows)
    runs.save_json(tmp_path / "scores.json", {"metrics": {"full": {"lower_is_better": False, "full_reference": True, "identity": ["full"]}, "none": {"lower_is_better": True, "full_reference": False, "identity": ["none"]}}})
    return tmp_path, np.array([[[row["full"], row["none"]] for row in rows[8 * g:8 * g + 8]] for g in range(4)])


def curated(pool, *words):
    dpo.main(dpo.parse_args(["curate", "--pool", pool, *words]))
    rows = [json.loads(line) for line in (pool / "pairs.jsonl").read_text().splitlines()]
    return rows, {name: [row for row in rows if row["name"] == name] for name in dict.fromkeys(row["name"] for row in rows)}


@fast
def test_curated_pairs_follow_the_rewards_worked_out_here(scored):
    pool, raw = scored
    full = (raw[..., 0] - raw[..., 0].min()) / np.ptp(raw[..., 0])
    none = (raw[..., 1].max() - raw[..., 1]) / np.ptp(raw[..., 1])
    for which, r in (("hybrid", (full + none) / 2), ("fr", full), ("nr", none)):
        rows, groups = curated(pool, "--top", 2, "--reward", which)
        assert len(rows) == 16 and all(len(group) == 4 for group in groups.values())
        for g, group in enumerate(groups.values()):
            order = np.argsort(-r[g])
            assert {row["w_seed"] for row in group} == set(order[:2]) and {row["l_seed"] for row in group} == set(order[-2:])
            assert all(row["R_w"] == pytest.approx(r[g, row["w_seed"]]) and row["R_l"] == pytest.approx(r[g, row["l_seed"]]) for row in group)
            gaps = np.array([row["R_w"] - row["R_l"] for row in group])
            assert [row["w_intra"] for row in group] == pytest.approx(list(gaps + 1 - gaps.mean())) and group[0]["w_inter"] == pytest.approx(r[g].std() + 1 - r.std(1).mean())
    about = json.loads((pool / "curation.json").read_text())
    assert about["sigma"] == pytest.approx(list(np.percentile(none.std(1), [25, 50, 75]))) and about["reward"] == "nr" and about["pool"] == "."


@fast
def test_curate_by_the_first_samples_by_groups_and_by_a_given_scale(scored):
    pool, raw = scored
    rows, _ = curated(pool, "--top", 2, "--samples", 4)
    assert max(max(row["w_seed"], row["l_seed"]) for row in rows) < 4
    with pytest.raises(ValueError, match="--samples 9: .* has 8 candidates"):
        curated(pool, "--top", 2, "--samples", 9)
    rows, groups = curated(pool, "--top", 1, "--norm", "group", "--reward", "fr")
    assert all(group[0]["R_w"] == 1 and group[0]["R_l"] == 0 for group in groups.values())
    norm = json.loads((pool / "norm.json").read_text())
    norm["metrics"]["full"] |= {"low": -1.0, "high": 3.0}
    (pool / "given.json").write_text(json.dumps(norm))
    rows, groups = curated(pool, "--top", 1, "--reward", "fr", "--norm-file", pool / "given.json")
    assert [group[0]["R_w"] for group in groups.values()] == pytest.approx(list((raw[..., 0].max(1) + 1) / 4))


@fast
def test_a_sample_is_three_crops_of_one_place_and_its_weight(tmp_path):
    torch.manual_seed(0)
    lq, win, lose = torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8), *torch.randint(0, 256, (2, 3, 36, 28), dtype=torch.uint8)
    for name, image in (("lq", lq), ("3", win), ("5", lose)):
        save_image(tmp_path / f"{name}.png", image)
    rows = [{"name": "a", "w_seed": 3, "l_seed": 5, "w_intra": 1.0, "w_inter": 1.0}]
    pairs = dpo_train.PairSet(rows, [1.25], {"a": {"lq": tmp_path / "lq.png"}}, {"a": [tmp_path / f"{s}.png" for s in range(6)]}, lambda *words: runs.sample_seed(0, *words), 2, 4)
    places = set()
    for step in range(1, 40):
        s = pairs.sample(step, 1)
        y, x = next((y, x) for y in range(6) for x in range(4) if torch.equal(lq[:, y:y + 4, x:x + 4], s["lq"]))
        assert torch.equal(s["win"], win[:, 4 * y:4 * y + 16, 4 * x:4 * x + 16]) and torch.equal(s["lose"], lose[:, 4 * y:4 * y + 16, 4 * x:4 * x + 16]) and s["weight"] == 1.25
        places.add((y, x))
    assert len(places) > 10


@fast
def test_weights_average_to_one_over_what_is_trained_on():
    r = np.random.default_rng(0).random((6, 8))
    best, worst = preference.choose(r, 2)
    intra, inter = preference.pair_weights(r, best, worst)
    rows = [{"name": str(g), "w_intra": intra[g, i, j], "w_inter": inter[g]} for g in range(4) for i in range(2) for j in range(2)]            # two groups held out
    weights = dpo_train.weights_of(rows, "both", 1)
    assert weights.mean() == pytest.approx(1) and weights.std() > 0.01 and dpo_train.weights_of(rows, "none", 1).tolist() == [1] * 16
    assert dpo_train.weights_of(rows, "intra", 1).tolist() == pytest.approx([row["w_intra"] for row in rows])


# The stages as a user runs them

GEN = ["--size", "tiny", "--patch", "8", "--load-size", "48", "--degradation", "two-round", "--batch-size", "4", "--group-size", "2", "--val-photos", "1", "--steps", "2", "--workers", "0", "--threads", "1",
       "--lr", "1e-3", "--warmup", "2", "--log-every", "1", "--save-every", "2", "--val-every", "0"]
TUNE = ["--batch-size", "4", "--val-groups", "1", "--workers", "0", "--threads", "1", "--log-every", "1", "--save-every", "2", "--val-every", "2", "--lr", "1e-4", "--beta", "500"]


@pytest.fixture(scope="module")
def stages(quintuplets, rewards, tmp_path_factory):
    """Folder with gen (4 steps), pool (5 images, 4 candidates), its scores and pairs; the functions are called in this process."""
    work = tmp_path_factory.mktemp("dpo")
    for words in (["pretrain", "--hr", quintuplets, "--out", work / "gen", "--total-steps", 4, *GEN],
                  ["sample", "--gen", work / "gen", "--hr", quintuplets, "--groups", 5, "--patch", 8, "--load-size", 48, "--degradation", "two-round", "--samples", 4, "--out", work / "pool"],
                  ["score", "--pool", work / "pool", "--fr", "ssim", "--nr", "test_rewards:brightness"], ["curate", "--pool", work / "pool", "--top", 1]):
        dpo.main(dpo.parse_args(words))
    return work


def weights_of(path):
    return torch.load(path, weights_only=True)


def test_the_stages_leave_plain_files(stages):
    pool = stages / "pool"
    rows = [json.loads(line) for line in (pool / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and set(rows[0]) == {"name", "seed", "ssim", "test_rewards:brightness"}
    image = load_image(pool / "cand" / rows[3]["name"] / f"{rows[3]['seed']}.png")
    assert image.shape == (3, 32, 32) and rows[3]["test_rewards:brightness"] == pytest.approx(100 * (image.float() / 255).mean().item(), abs=1e-3)
    pairs = [json.loads(line) for line in (pool / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 5 and all(row["R_w"] > row["R_l"] for row in pairs)
    norm = json.loads((pool / "norm.json").read_text())["metrics"]
    assert norm["ssim"]["high"] == max(row["ssim"] for row in rows) and norm["ssim"]["full_reference"]
    photos = {data.photo_of(name) for name in list_images(pool / "lq")}
    assert photos <= {"photo0", "photo1", "photo2"}
    assert len({tuple(p.read_bytes() for p in sorted((pool / "cand" / name).iterdir())) for name in list_images(pool / "lq")}) == 5


def test_candidates_are_what_the_generator_gives_for_name_and_seed(stages):
    gen = flow.load_flow(stages / "gen")
    name, path = next(iter(list_images(stages / "pool" / "lq").items()))
    lq = load_image(path)[None].float() / 255
    again = gen.sample(gen.net, lq, [name], [2])[0]
    kept = load_image(stages / "pool" / "cand" / name / "2.png").float() / 255
    assert (again - kept).abs().max() < 0.51 / 255 + 1e-5                          # made with seeds 0 to 3 at once


def test_an_interrupted_sampling_continues_and_keeps_what_is_there(stages, quintuplets, tmp_path):
    shutil.copytree(stages / "pool", tmp_path / "pool")
    folders = sorted((tmp_path / "pool" / "cand").iterdir())
    before = {p.name: [f.read_bytes() for f in sorted(p.iterdir())] for p in folders}
    kept = folders[0] / "0.png"
    stamp = kept.stat().st_mtime_ns
    shutil.rmtree(folders[-1])
    (tmp_path / "pool" / "cand" / f"{folders[-1].name}.tmp").mkdir()               # of the killed call
    words = ["sample", "--gen", stages / "gen", "--hr", quintuplets, "--groups", 5, "--patch", 8, "--load-size", 48, "--degradation", "two-round", "--samples", 4, "--out", tmp_path / "pool"]
    with pytest.raises(ValueError, match="1 of 5 images have no candidates"):
        dpo_pool.open_pool(tmp_path / "pool")
    dpo.main(dpo.parse_args(words))
    assert {p.name: [f.read_bytes() for f in sorted(p.iterdir())] for p in (tmp_path / "pool" / "cand").iterdir()} == before and kept.stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="samples 4 -> 8"):
        dpo.main(dpo.parse_args([8 if word == 4 else word for word in words]))


def test_interrupted_scoring_continues(stages, rewards, tmp_path):
    """Without a scored image twice: the metric counts its calls."""
    shutil.copytree(stages / "pool", tmp_path / "pool")
    (rewards / "counting.py").write_text("calls = []\ndef build(device):\n    return lambda x: (calls.append(len(x)), x.mean((1, 2, 3)))[1]\n")
    words = ["score", "--pool", tmp_path / "pool", "--fr", "--nr", "counting:build"]
    dpo.main(dpo.parse_args(words))
    import counting
    whole, text = (tmp_path / "pool" / "scores.jsonl").read_bytes(), [p for p in (tmp_path / "pool" / "scores").glob("*.jsonl")]
    assert sum(counting.calls) >= 20
    lines = text[0].read_text().splitlines(keepends=True)
    text[0].write_text("".join(lines[:-6]) + lines[-6][:10])                      # killed while it wrote
    counting.calls.clear()
    dpo.main(dpo.parse_args(words))
    assert (tmp_path / "pool" / "scores.jsonl").read_bytes() == whole and 6 <= sum(counting.calls) <= 8          # and the probes of a new reward


def test_a_run_equals_one_that_was_stopped_and_resumed(stages, quintuplets, tmp_path):
    for name, stage, words, steps in (("gen", "pretrain", ["--hr", quintuplets, *GEN], 4), ("dpo", "train", ["--gen", stages / "gen", "--pairs", stages / "pool", *TUNE], 4)):
        if name == "dpo":
            dpo.main(dpo.parse_args([stage, *words, "--total-steps", steps, "--out", tmp_path / "whole"]))
        whole = stages / "gen" if name == "gen" else tmp_path / "whole"
        dpo.main(dpo.parse_args([stage, *words, "--total-steps", steps, "--out", tmp_path / name]))
        shutil.copytree(whole, tmp_path / f"{name}-2")
        assert_same(whole, tmp_path / name)
        # the state after two steps, continued
        shutil.rmtree(tmp_path / name)
        dpo.main(dpo.parse_args([stage, *words, "--total-steps", steps - 2, "--out", tmp_path / name]))
        shutil.rmtree(tmp_path / name / "weights")
        dpo.main(dpo.parse_args([stage, *words, "--total-steps", steps, "--out", tmp_path / name, "--resume"]))
        assert_same(whole, tmp_path / name)
        events = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [e["step"] for e in events if e["split"] == "train"] == [1, 2, 3, 4]


def assert_same(a, b):
    a, b = (weights_of(path / "weights" / "gen.pth") for path in (a, b))
    assert a["settings"] == b["settings"]
    for key in a.keys() - {"settings"}:
        assert all(torch.equal(a[key][k], b[key][k]) for k in a[key])


def test_two_processes_train_and_sample_what_one_does(stages, quintuplets, script, tmp_path):
    words = ["train", "--gen", stages / "gen", "--pairs", stages / "pool", *TUNE, "--total-steps", 3, "--hpo", "both"]
    dpo.main(dpo.parse_args([*words, "--out", tmp_path / "one"]))
    script("dpo", *words, "--out", tmp_path / "two", processes=2)
    one, two = (weights_of(tmp_path / name / "weights" / "gen.pth")["params"] for name in ("one", "two"))
    assert all(torch.allclose(one[k], two[k], atol=2e-5) for k in one) and any(not torch.equal(one[k], v) for k, v in flow.load_flow(stages / "gen").net.state_dict().items())
    script("dpo", "sample", "--gen", stages / "gen", "--hr", quintuplets, "--groups", 5, "--patch", 8, "--load-size", 48, "--degradation", "two-round", "--samples", 4, "--out", tmp_path / "pool", processes=2)
    for path in (stages / "pool").glob("cand/*/*.png"):
        assert path.read_bytes() == (tmp_path / "pool" / path.relative_to(stages / "pool")).read_bytes()


def test_training_brings_out_what_the_reward_likes(stages, tmp_path, monkeypatch):
    """Brightness alone: the network learns to tell winners, its outputs become brighter, and nothing of a held-out photo is seen."""
    shutil.copytree(stages / "pool", tmp_path / "pool")
    dpo.main(dpo.parse_args(["score", "--pool", tmp_path / "pool", "--fr", "--nr", "test_rewards:brightness"]))
    dpo.main(dpo.parse_args(["curate", "--pool", tmp_path / "pool", "--top", 2, "--reward", "nr"]))
    seen, sample = set(), dpo_train.PairSet.sample
    monkeypatch.setattr(dpo_train.PairSet, "sample", lambda self, step, lane: seen.add(self.rows[self.index(step, lane)]["name"]) or sample(self, step, lane))
    words = ["train", "--gen", stages / "gen", "--pairs", tmp_path / "pool", *TUNE, "--lr", "3e-4", "--beta", 300, "--max-displacement", 0, "--save-every", 0, "--log-every", 5, "--total-steps", 30, "--val-every", 10]
    dpo.main(dpo.parse_args([*words, "--out", tmp_path / "out"]))
    events = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    train, val = ([e for e in events if e["split"] == split] for split in ("train", "val"))
    assert train[-1]["accuracy"] > 0.8 and train[-1]["win_change"] < train[-1]["lose_change"] and val[-1]["reward"] > val[0]["reward"]
    names = list(list_images(tmp_path / "pool" / "lq"))
    held = dpo_train.hold_out(names, 1, runs.sample_seed(0, 0, 0, "val-groups"))
    assert seen == set(names) - set(held) and len(held) >= 1
    gens, lq = [flow.load_flow(path) for path in (stages / "gen", tmp_path / "out")], load_image(list_images(tmp_path / "pool" / "lq")[held[0]])[None].float() / 255
    before, after = (gen.sample(gen.net, lq.expand(8, -1, -1, -1), [held[0]] * 8, range(8)).mean().item() for gen in gens)
    assert after > before
    # the watched reward is that of seeds 0 to 3 on the scale of the pool
    norm = json.loads((tmp_path / "pool" / "norm.json").read_text())["metrics"]["test_rewards:brightness"]
    bright = torch.stack([load_image(tmp_path / "pool" / "cand" / name / f"{s}.png").float().mean() / 2.55 for name in held for s in range(4)])
    assert val[0]["reward"] == pytest.approx(((bright.mean().item() - norm["low"]) / (norm["high"] - norm["low"])), abs=2e-3)
    # the best of the checks, kept through an interruption
    best = max(val[1:], key=lambda e: e["reward"])
    dpo.main(dpo.parse_args([*words, "--keep", "best", "--save-every", 10, "--total-steps", 20, "--out", tmp_path / "best"]))
    dpo.main(dpo.parse_args([*words, "--keep", "best", "--save-every", 10, "--out", tmp_path / "best", "--resume"]))
    assert f"of step {best['step']}" in (tmp_path / "best" / "log.txt").read_text().splitlines()[-1]
    with pytest.raises(ValueError, match="keep 'best' -> 'last'"):
        dpo.main(dpo.parse_args([*words, "--total-steps", 40, "--out", tmp_path / "best", "--resume"]))


def test_winner_and_loser_share_time_and_noise_and_every_option_enters_the_loss(stages, tmp_path, monkeypatch):
    calls, losses, error = [], [], preference.dpo_loss
    noised = flow.FlowSR.noised
    monkeypatch.setattr(flow.FlowSR, "noised", lambda self, x0, eps, t: calls.append((eps, t)) or noised(self, x0, eps, t))
    monkeypatch.setattr(preference, "dpo_loss", lambda *terms: losses.append(terms) or error(*terms))
    words = ["train", "--gen", stages / "gen", "--pairs", stages / "pool", *TUNE, "--total-steps", 1]
    run = lambda name, *more: dpo.main(dpo.parse_args([*words, *more, "--out", tmp_path / name]))
    run("plain")
    (eps, t), terms = calls[-1], losses[-1]
    assert torch.equal(*eps.chunk(2)) and torch.equal(*t.chunk(2)) and len(set(t.tolist())) == 4 and terms[4] == 500 and torch.equal(terms[0], terms[1]) and torch.equal(terms[2], terms[3])
    rows = [json.loads(line) for line in (stages / "pool" / "pairs.jsonl").read_text().splitlines()]
    assert set(terms[5].tolist()) <= set(np.float32(dpo_train.weights_of([row for row in rows if row["name"] not in dpo_train.hold_out(list(list_images(stages / "pool" / "lq")), 1,
                                                                      runs.sample_seed(0, 0, 0, "val-groups"))], "both", 1)).tolist()) and len(set(terms[5].tolist())) > 1
    run("sq", "--beta-t", "sq")
    assert torch.allclose(losses[-1][4], 500 * (1 - t.chunk(2)[0]) ** 2)
    run("tracked", "--noise", "tracked")
    tracked, _ = calls[-1]
    assert not torch.equal(*tracked.chunk(2))
    shutil.copytree(stages / "pool", tmp_path / "quiet")
    about = json.loads((tmp_path / "quiet" / "pool.json").read_text())
    (tmp_path / "quiet" / "pool.json").write_text(json.dumps(about | {"generator": about["generator"] | {"tau": 0.5}}))
    with pytest.raises(ValueError, match="pairs of another pool than .* is now"):
        run("stale", "--pairs", tmp_path / "quiet")
    dpo.main(dpo.parse_args(["curate", "--pool", tmp_path / "quiet", "--top", 1]))
    run("tracked-quiet", "--noise", "tracked", "--pairs", tmp_path / "quiet")
    assert torch.equal(calls[-1][0], 0.5 * tracked)
    taus = [weights_of(tmp_path / name / "weights" / "gen.pth")["settings"]["tau"] for name in ("tracked", "tracked-quiet")]
    assert taus == [1.0, 0.5]                                                      # as the pool was sampled
    run("anchor", "--anchor", 0.5)
    first = lambda name: json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[1])
    assert first("anchor")["loss"] == pytest.approx(first("plain")["loss"] + 0.5 * first("plain")["win"], rel=1e-5)
    run("warm", "--warmup", 4)
    assert first("warm")["lr"] == pytest.approx(2.5e-5) and first("plain")["lr"] == 1e-4


def test_training_starts_at_ln_2_leaves_the_reference_alone_and_saves_the_generator(stages, tmp_path):
    before = weights_of(stages / "gen" / "weights" / "gen.pth")
    dpo.main(dpo.parse_args(["train", "--gen", stages / "gen", "--pairs", stages / "pool", *TUNE, "--total-steps", 2, "--hpo", "none", "--out", tmp_path / "out"]))
    events = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    first = next(e for e in events if e["split"] == "train")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["win_change"] == 0 and [e["step"] for e in events if e["split"] == "val"] == [0, 2]
    after = weights_of(stages / "gen" / "weights" / "gen.pth")
    assert all(torch.equal(after["params"][k], v) for k, v in before["params"].items())
    tuned = flow.load_flow(tmp_path / "out")
    assert tuned.settings() == flow.load_flow(stages / "gen").settings()


@pytest.mark.parametrize("more", [["--noise", "tracked"], ["--beta-t", "sq"], ["--patch", "4"], ["--accumulate", "2"], ["--anchor", "0.5"], ["--keep", "best"], ["--precision", "bf16"], ["--val-groups", "0"]])
def test_variants_of_the_training_run(stages, tmp_path, more):
    dpo.main(dpo.parse_args(["train", "--gen", stages / "gen", "--pairs", stages / "pool", *TUNE, "--total-steps", 2, *more, "--out", tmp_path / "out"]))
    assert (tmp_path / "out" / "weights" / "gen.pth").is_file()


def test_micro_batches_add_up(stages, tmp_path):
    for n in (1, 2):
        dpo.main(dpo.parse_args(["train", "--gen", stages / "gen", "--pairs", stages / "pool", *TUNE, "--total-steps", 2, "--accumulate", n, "--out", tmp_path / str(n)]))
    one, two = (weights_of(tmp_path / str(n) / "weights" / "gen.pth")["params"] for n in (1, 2))
    assert all(torch.allclose(one[k], two[k], atol=2e-5) for k in one)


def test_likelihood_displacement_ends_the_training(stages, tmp_path):
    dpo.main(dpo.parse_args(["train", "--gen", stages / "gen", "--pairs", stages / "pool", *TUNE, "--lr", "0.02", "--total-steps", 30, "--out", tmp_path / "out"]))
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "likelihood displacement" in log and "step 0000030/" not in log and (tmp_path / "out" / "weights" / "gen.pth").is_file()
    dpo.main(dpo.parse_args(["train", "--gen", stages / "gen", "--pairs", stages / "pool", *TUNE, "--lr", "0.02", "--total-steps", 30, "--out", tmp_path / "out", "--resume"]))
    assert "nothing to do" in (tmp_path / "out" / "log.txt").read_text()


@pytest.fixture(scope="module")
def evaluated(stages, quintuplets, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval")
    dpo.main(dpo.parse_args(["train", "--gen", stages / "gen", "--pairs", stages / "pool", *TUNE, "--total-steps", 2, "--out", out / "tuned"]))
    words = ["eval", "--gen", stages / "gen", out / "tuned", "--hr", quintuplets, "--groups", 4, "--patch", 8, "--load-size", 48, "--degradation", "two-round", "--norm-file", stages / "pool" / "norm.json",
             "--watch", "psnr", "--samples", 4, "--diversity", "proxy", "--out", out / "eval"]
    dpo.main(dpo.parse_args(words))
    return out / "eval", words


def test_evaluation_is_what_its_files_say(evaluated, stages):
    out, words = evaluated
    found = json.loads((out / "eval.json").read_text())
    assert list(found["rows"]) == ["gen", "tuned", "gen, 0.9 of the noise", "gen, 0.7 of the noise", "gen + unsharp 0.5", "gen + unsharp 1"] and found["inside"] == ["ssim", "test_rewards:brightness"] and found["outside"] == ["psnr"]
    names = list(list_images(out / "images" / "lq"))
    images = torch.stack([torch.stack([load_image(out / "gen" / name / f"{s}.png") for s in range(4)]) for name in names]).float() / 255
    bright = (100 * images.mean((2, 3, 4))).numpy()
    photos = [data.photo_of(name) for name in names]
    by_photo = [bright[[p == photo for p in photos]].mean() for photo in dict.fromkeys(photos)]
    assert found["rows"]["gen"]["means"]["test_rewards:brightness"]["mean"] == pytest.approx(np.mean(by_photo), abs=1e-3)
    for row in found["rows"].values():
        assert row["means"]["best@4"]["mean"] >= row["means"]["reward"]["mean"] >= row["means"]["worst@4"]["mean"]
        assert row["curve"]["best"][0] == pytest.approx(row["curve"]["mean"][0]) and row["curve"]["worst"][-1] == pytest.approx(row["means"]["worst@4"]["mean"])
    raw = {row: np.array([found["rows"][row]["per_photo"][m] for m in ("ssim", "test_rewards:brightness")]).T for row in found["rows"]}
    norm = json.loads((stages / "pool" / "norm.json").read_text())
    for row, values in raw.items():                                               # the reward is linear in the metrics
        assert found["rows"][row]["per_photo"]["reward"] == pytest.approx(list(dpo_pool.rewards_of(values, norm, "hybrid")), abs=1e-6)
        assert row == "gen" or found["rows"][row]["minus_first"]["psnr"]["mean"] == pytest.approx(np.mean(found["rows"][row]["per_photo"]["psnr"]) - np.mean(found["rows"]["gen"]["per_photo"]["psnr"]))
    sharp = load_image(out / "gen + unsharp 1" / names[0] / "2.png")
    assert torch.equal(sharp, (255 * quality.unsharp(images[0, 2][None], 1.0)[0]).round().byte()) and not torch.equal(sharp, load_image(out / "gen" / names[0] / "2.png"))
    gen, lq = flow.load_flow(stages / "gen", tau=0.7), load_image(out / "images" / "lq" / f"{names[0]}.png")[None].float() / 255
    assert (gen.sample(gen.net, lq, [names[0]], [1])[0] - load_image(out / "gen, 0.7 of the noise" / names[0] / "1.png").float() / 255).abs().max() < 0.51 / 255 + 1e-5
    assert found["rows"]["gen, 0.7 of the noise"]["means"]["diversity"]["mean"] > 0 and found["lower_is_better"]["diversity"] is None
    std = torch.stack([images[[p == photo for p in photos]].mean((2, 3, 4)).std(1, unbiased=False).mean() for photo in dict.fromkeys(photos)]).mean().item() * 100
    assert found["rows"]["gen"]["seed_std"]["test_rewards:brightness"] == pytest.approx(std, abs=1e-3)
    assert load_image(out / "grid.png").shape[0] == 3 and (out / "curves.png").is_file() and "tuned - gen" in (out / "table.md").read_text()


def test_evaluation_again_computes_nothing_and_another_generator_is_refused(evaluated, stages, tmp_path, monkeypatch):
    out, words = evaluated
    before = (out / "eval.json").read_text()
    monkeypatch.setattr(flow.FlowSR, "sample", lambda *_: pytest.fail("sampled again"))
    dpo.main(dpo.parse_args(words))
    assert json.loads((out / "eval.json").read_text())["rows"] == json.loads(before)["rows"]
    with pytest.raises(ValueError, match="another generator"):
        dpo.main(dpo.parse_args([*words, "--names", "tuned", "gen"]))
    with pytest.raises(ValueError, match="--shown-rows 'other': no such row; choose from gen, tuned"):
        dpo.main(dpo.parse_args([*words, "--shown-rows", "other"]))
    wide = image_size(out / "grid.png")
    dpo.main(dpo.parse_args([*words, "--shown-rows", "gen + unsharp 1"]))
    assert image_size(out / "grid.png")[0] < wide[0]


# What is refused, in one line

def refused(script, match, *words):
    result = script("dpo", *words, check=False)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) >= 1, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert match in last and "Traceback" not in result.stderr, result.stderr


def test_m_below_2n(stages, script):
    refused(script, "--top 3: 4 candidates per image are not twice as many", "curate", "--pool", stages / "pool", "--top", 3)


def test_unpaired_images_with_a_full_reference_reward(stages, script, tmp_path):
    script("dpo", "sample", "--gen", stages / "gen", "--lq-dir", stages / "pool" / "lq", "--samples", 2, "--out", tmp_path / "pool")
    refused(script, "no ground truth to compare with", "score", "--pool", tmp_path / "pool", "--fr", "ssim", "--nr", "test_rewards:brightness")
    script("dpo", "score", "--pool", tmp_path / "pool", "--fr", "--nr", "test_rewards:brightness")
    refused(script, "--reward hybrid needs a full-reference metric", "curate", "--pool", tmp_path / "pool", "--top", 1)
    script("dpo", "curate", "--pool", tmp_path / "pool", "--top", 1, "--reward", "nr")


def test_groups_without_spread_and_metrics_without(stages, script, tmp_path):
    pool = tmp_path / "pool"
    shutil.copytree(stages / "pool", pool)
    rows = [json.loads(line) for line in (pool / "scores.jsonl").read_text().splitlines()]
    first = rows[0]["name"]
    dpo_pool.write_lines(pool / "scores.jsonl", [row | ({"ssim": 0.5, "test_rewards:brightness": 30.0} if row["name"] == first else {}) for row in rows])
    refused(script, f"1 image(s) are all equally good, first {first}", "curate", "--pool", pool, "--top", 1)
    out = script("dpo", "curate", "--pool", pool, "--top", 1, "--min-sigma", "1e-6").stdout
    assert "4 images (1 dropped)" in out
    dpo_pool.write_lines(pool / "scores.jsonl", [row | {"ssim": 0.5} for row in rows])
    refused(script, "ssim is 0.5 for every candidate", "curate", "--pool", pool, "--top", 1)


def test_scores_that_are_not_finite(stages, script, rewards, tmp_path):
    (rewards / "bad_at_white.py").write_text("import torch\ndef build(device):\n    return lambda x: torch.where(x.amin((1, 2, 3)) > 0.99, torch.nan, x.mean((1, 2, 3)))\n")
    pool = tmp_path / "pool"
    shutil.copytree(stages / "pool", pool)
    name = sorted((pool / "cand").iterdir())[0]
    save_image(name / "1.png", torch.ones(3, 32, 32))
    refused(script, f"image {name.name}: bad_at_white:build is nan", "score", "--pool", pool, "--fr", "--nr", "bad_at_white:build")
    text = (pool / "scores.jsonl").read_text().splitlines()
    (pool / "scores.jsonl").write_text("\n".join([text[0].replace(text[0].split('"ssim": ')[1].split(",")[0], "NaN"), *text[1:]]) + "\n")
    refused(script, "scores that are not finite", "curate", "--pool", pool, "--top", 1)


def test_a_scale_of_other_metrics(stages, script, tmp_path):
    norm = json.loads((stages / "pool" / "norm.json").read_text())
    norm["metrics"]["gmsd"] = norm["metrics"].pop("ssim")
    (tmp_path / "norm.json").write_text(json.dumps(norm))
    refused(script, "a scale of other metrics: ssim is missing; gmsd is unknown here", "curate", "--pool", stages / "pool", "--top", 1, "--norm-file", tmp_path / "norm.json")
    norm["metrics"]["ssim"] = norm["metrics"].pop("gmsd")
    norm["metrics"]["test_rewards:brightness"]["identity"] = "other weights"
    (tmp_path / "norm.json").write_text(json.dumps(norm))
    refused(script, "test_rewards:brightness is another model there", "curate", "--pool", stages / "pool", "--top", 1, "--norm-file", tmp_path / "norm.json", "--out", tmp_path / "out")


@pytest.mark.parametrize("low, high", [(0.5, 0.5), (1, 0), (0, None), (float("nan"), 1)])
def test_a_scale_without_range(stages, tmp_path, low, high):
    norm = json.loads((stages / "pool" / "norm.json").read_text())
    norm["metrics"]["ssim"] |= {"low": low, "high": high}
    (tmp_path / "norm.json").write_text(json.dumps(norm))
    with pytest.raises(ValueError, match="ssim goes from .*, which is no range"):
        dpo.main(dpo.parse_args(["curate", "--pool", stages / "pool", "--top", 1, "--norm-file", tmp_path / "norm.json", "--out", tmp_path / "out"]))
    assert not (tmp_path / "out").exists()


def test_what_a_stage_left_is_looked_at_before_it_is_used(stages, tmp_path):
    shutil.copytree(stages / "pool", tmp_path / "pool")
    pool, text = tmp_path / "pool", {name: (stages / "pool" / name).read_text() for name in ("scores.json", "scores.jsonl", "curation.json", "pairs.jsonl")}
    rows = [json.loads(line) for line in text["scores.jsonl"].splitlines()]
    pairs = [json.loads(line) for line in text["pairs.jsonl"].splitlines()]
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
    curate, train = ["curate", "--pool", pool, "--top", 1], ["train", "--gen", stages / "gen", "--pairs", pool, *TUNE, "--out", tmp_path / "out"]
    for name, damaged, words, match in (
            ("scores.jsonl", lines(row for row in rows if row["seed"]), curate, "seeds of an image are missing"), ("scores.json", "[]", curate, "not one whole row"), ("scores.jsonl", "", curate, "not one whole row"),
            ("curation.json", "{}", train, "not what this version of curate leaves"), ("pairs.jsonl", lines({k: v for k, v in row.items() if k != "w_inter"} for row in pairs), train, "not what this version"),
            ("pairs.jsonl", lines(row | {"name": "other"} for row in pairs), train, "pairs of another pool"),
            ("pairs.jsonl", lines(row | {"w_seed": 99} for row in pairs), train, "pairs of another pool"), ("pairs.jsonl", lines(row | {"w_intra": "1"} for row in pairs), train, "not what this version"),
            ("scores.jsonl", lines(row for row in rows if row["seed"] < 3), curate, "not as many seeds as were sampled")):
        (pool / name).write_text(damaged)
        with pytest.raises(ValueError, match=match):
            dpo.main(dpo.parse_args(words))
        (pool / name).write_text(text[name])
    path = next(iter(list_images(pool / "lq").values()))
    lq = load_image(path)
    save_image(path, lq[:, :7])
    save_image(pool / "gt" / path.name, torch.zeros(3, 28, 32))
    for patch, match in ((0, "--patch 0 needs one size"), (8, "8x7 pixels, smaller than --patch 8")):
        with pytest.raises(ValueError, match=match):
            dpo.main(dpo.parse_args([*train, "--patch", patch, "--val-groups", 0]))
    assert not (tmp_path / "out").exists()


def test_a_held_out_reward_that_is_not_finite_ends_the_run(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo_pool, "rewards_of", lambda raw, *more: np.full(raw.shape[:-1], np.nan))
    with pytest.raises(ValueError, match="the reward of held-out images is nan"):
        dpo.main(dpo.parse_args(["train", "--gen", stages / "gen", "--pairs", stages / "pool", *TUNE, "--out", tmp_path / "out"]))


def test_a_reference_of_another_size(stages, script, tmp_path):
    shutil.copytree(stages / "pool" / "gt", tmp_path / "gt")
    path = next(iter(list_images(tmp_path / "gt").values()))
    save_image(path, torch.zeros(3, 28, 32))
    refused(script, f"{path.name}: 32x28 pixels, expected four times its LR image's 8x8", "sample", "--gen", stages / "gen", "--lq-dir", stages / "pool" / "lq", "--gt-dir", tmp_path / "gt", "--out", tmp_path / "pool")
    assert not (tmp_path / "pool").exists()


def test_a_missing_diffusers_folder(stages, script, tmp_path):
    refused(script, "--model", "sample", "--backend", "diffusers", "--model", tmp_path / "sd2", "--gen", tmp_path / "controlnet", "--lq-dir", stages / "pool" / "lq", "--out", tmp_path / "pool")
    refused(script, "--backend diffusers: --model DIR", "sample", "--backend", "diffusers", "--lq-dir", stages / "pool" / "lq", "--out", tmp_path / "pool")


def test_pairs_of_another_generator(stages, script, quintuplets, tmp_path):
    script("dpo", "pretrain", "--hr", quintuplets, "--out", tmp_path / "gen", "--total-steps", 1, *GEN, "--seed", 5)
    refused(script, "another generator's", "train", "--gen", tmp_path / "gen", "--pairs", stages / "pool", *TUNE, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_evaluation_without_ground_truth(stages, tmp_path):
    words = ["eval", "--gen", stages / "gen", "--lq-dir", stages / "pool" / "lq", "--norm-file", stages / "pool" / "norm.json", "--samples", 2, "--diversity", "none", "--unsharp", "--less-noise", "--watch",
             "--out", tmp_path / "eval"]
    for more in ([], ["--reward", "nr", "--watch", "psnr"]):
        with pytest.raises(ValueError, match="(ssim|psnr): .* has no ground truth to compare with: --gt-dir"):
            dpo.main(dpo.parse_args([*words, *more]))
        assert not (tmp_path / "eval").exists()
    assert dpo.parse_args(["eval", "--lq-dir", "x"]).watch == ["nima"] and "psnr" in dpo.parse_args(["eval", "--hr", "x"]).watch
    dpo.main(dpo.parse_args([*words, "--reward", "nr"]))
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["inside"] == ["test_rewards:brightness"]
    dpo.main(dpo.parse_args([*words[:-1], tmp_path / "paired", "--reward", "nr", "--gt-dir", stages / "pool" / "gt"]))
    found = json.loads((tmp_path / "paired" / "eval.json").read_text())
    assert found["inside"] == ["test_rewards:brightness"] and found["outside"] == ["ssim"]         # measured, and no part of this reward


def test_the_factor_of_flows_is_for_flows(stages, tmp_path):
    args, gen = dpo.parse_args(["train", "--gen", stages / "gen", "--pairs", stages / "pool", *TUNE, "--beta-t", "sq", "--out", tmp_path / "out"]), flow.load_flow(stages / "gen")
    gen.prediction = "epsilon"
    with pytest.raises(ValueError, match="--beta-t sq: follows from flows"):
        dpo_train.train(args, gen, dpo_train.open_pairs(args))


def test_images_that_changed_are_refused(stages, tmp_path):
    shutil.copytree(stages / "pool" / "lq", tmp_path / "lq")
    words = ["sample", "--gen", stages / "gen", "--lq-dir", tmp_path / "lq", "--samples", 2, "--out", tmp_path / "pool"]
    dpo.main(dpo.parse_args(words))
    save_image(tmp_path / "lq" / "new.png", torch.rand(3, 8, 8))
    with pytest.raises(ValueError, match="made with other settings .images"):
        dpo.main(dpo.parse_args(words))


@fast
def test_pool_and_test_draw_apart(quintuplets, tmp_path):
    args = dpo.parse_args(["sample", "--hr", quintuplets, "--groups", 6, "--patch", 8, "--load-size", 48, "--degradation", "two-round"])
    for purpose in ("pool", "test"):
        dpo_pool.own_images(args, tmp_path / purpose, runs.World(0, 1, torch.device("cpu")), purpose)
    read = lambda purpose: {path.read_bytes() for path in (tmp_path / purpose / "lq").iterdir()}
    assert len(read("pool")) == 6 and not read("pool") & read("test")


@pytest.mark.parametrize("match, words", [
    ("--demo before train", ["--demo", "train"]), ("--norm group", ["curate", "--norm", "group", "--norm-percent", "1"]), ("not a scale of the reward", ["eval", "--norm-file", "scores.json", "--hr", "x", "--gen", "nowhere"]),
    ("images without candidates", ["score", "--pool", "images"]),
    ("which stage?", []), ("which images?", ["sample"]), ("not both", ["sample", "--hr", "a", "--lq-dir", "b"]), ("--noise tracked", ["train", "--noise", "tracked", "--patch", "8"]),
    ("--keep best", ["train", "--keep", "best", "--val-groups", "0"]), ("multiple of 4", ["sample", "--hr", "a", "--patch", "64", "--load-size", "200"]),
    ("NAME=FILE", ["score", "--metric-weights", "niqe"]), ("no generator there", ["sample", "--gen", "nowhere", "--lq-dir", "x"]), ("not there", ["curate", "--pool", "nowhere"]),
    ("not there", ["train", "--pairs", "nowhere", "--gen", "nowhere"])])
def test_flags_that_cannot_work(script, stages, match, words):
    if "images" in words:
        (stages / "images").mkdir(exist_ok=True)
        (stages / "images" / "pool.json").write_text("{}")
    words = [stages / "gen" if word == "nowhere" and ("train" in words or "eval" in words) and words[k - 1] == "--gen" else stages / "pool" / word if word == "scores.json" else
             stages / word if word == "images" else word for k, word in enumerate(words)]
    refused(script, match, *words)


def test_damaged_generators(stages, script, tmp_path):
    (tmp_path / "gen.pth").write_bytes(b"no")
    refused(script, "not a generator of dpo.py", "sample", "--gen", tmp_path / "gen.pth", "--lq-dir", stages / "pool" / "lq", "--out", tmp_path / "pool")
    content = weights_of(stages / "gen" / "weights" / "gen.pth")
    del content["params_ema"]["last.bias"]
    torch.save(content, tmp_path / "gen.pth")
    refused(script, "last.bias is missing", "sample", "--gen", tmp_path / "gen.pth", "--lq-dir", stages / "pool" / "lq", "--out", tmp_path / "pool")


def test_the_help_of_every_stage_answers_at_once(script):
    for stage in ("pretrain", "sample", "score", "curate", "train", "eval"):
        assert "(default: " in script("dpo", stage, "--help", timeout=20).stdout
