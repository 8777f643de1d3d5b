"""dpo.py: reward, curation, weights, loss and estimates against hand-worked numbers and brute force; the stages as a user runs them (specification, section 6)."""
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch

import data
import dpo
import dpo_pool
import dpo_train
import flow
import preference
import runs

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
    for hpo in preference.HPO:
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
    image = data.load_image(pool / "cand" / rows[3]["name"] / f"{rows[3]['seed']}.png")
    assert image.shape == (3, 32, 32) and rows[3]["test_rewards:brightness"] == pytest.approx(100 * (image.float() / 255).mean().item(), abs=1e-3)
    pairs = [json.loads(line) for line in (pool / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 5 and all(row["R_w"] > row["R_l"] for row in pairs)
    norm = json.loads((pool / "norm.json").read_text())["metrics"]
    assert norm["ssim"]["high"] == max(row["ssim"] for row in rows) and norm["ssim"]["full_reference"]
    photos = {data.photo_of(name) for name in data.list_images(pool / "lq")}
    assert photos <= {"photo0", "photo1", "photo2"}
    assert len({tuple(p.read_bytes() for p in sorted((pool / "cand" / name).iterdir())) for name in data.list_images(pool / "lq")}) == 5


def test_candidates_are_what_the_generator_gives_for_name_and_seed(stages):
    gen = flow.load_flow(stages / "gen")
    name, path = next(iter(data.list_images(stages / "pool" / "lq").items()))
    lq = data.load_image(path)[None].float() / 255
    again = gen.sample(gen.net, lq, [name], [2])[0]
    kept = data.load_image(stages / "pool" / "cand" / name / "2.png").float() / 255
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
    with pytest.raises(FileNotFoundError, match="1 of 5 images have no candidates"):
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
    script("dpo.py", *words, "--out", tmp_path / "two", processes=2)
    one, two = (weights_of(tmp_path / name / "weights" / "gen.pth")["params"] for name in ("one", "two"))
    assert all(torch.allclose(one[k], two[k], atol=2e-5) for k in one) and any(not torch.equal(one[k], v) for k, v in flow.load_flow(stages / "gen").net.state_dict().items())
    script("dpo.py", "sample", "--gen", stages / "gen", "--hr", quintuplets, "--groups", 5, "--patch", 8, "--load-size", 48, "--degradation", "two-round", "--samples", 4, "--out", tmp_path / "pool", processes=2)
    for path in (stages / "pool").glob("cand/*/*.png"):
        assert path.read_bytes() == (tmp_path / "pool" / path.relative_to(stages / "pool")).read_bytes()


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
    assert list(found["rows"]) == ["gen", "tuned", "gen + unsharp 0.5", "gen + unsharp 1"] and found["inside"] == ["ssim", "test_rewards:brightness"] and found["outside"] == ["psnr"]
    names = list(data.list_images(out / "images" / "lq"))
    images = torch.stack([torch.stack([data.load_image(out / "gen" / name / f"{s}.png") for s in range(4)]) for name in names]).float() / 255
    bright = (100 * images.mean((2, 3, 4))).numpy()
    photos = [data.photo_of(name) for name in names]
    by_photo = [bright[[p == photo for p in photos]].mean() for photo in dict.fromkeys(photos)]
    assert found["rows"]["gen"]["means"]["test_rewards:brightness"]["mean"] == pytest.approx(np.mean(by_photo), abs=1e-3)
    for row in found["rows"].values():
        assert row["means"]["best@4"]["mean"] >= row["means"]["mean"]["mean"] >= row["means"]["worst@4"]["mean"]
        assert row["curve"]["best"][0] == pytest.approx(row["curve"]["mean"][0]) and row["curve"]["worst"][-1] == pytest.approx(row["means"]["worst@4"]["mean"])
    assert data.load_image(out / "grid.png").shape[0] == 3 and (out / "curves.png").is_file() and "tuned - gen" in (out / "table.md").read_text()


def test_evaluation_again_computes_nothing_and_another_generator_is_refused(evaluated, stages, tmp_path, monkeypatch):
    out, words = evaluated
    before = (out / "eval.json").read_text()
    monkeypatch.setattr(flow.FlowSR, "sample", lambda *_: pytest.fail("sampled again"))
    dpo.main(dpo.parse_args(words))
    assert json.loads((out / "eval.json").read_text())["rows"] == json.loads(before)["rows"]
    with pytest.raises(ValueError, match="another generator"):
        dpo.main(dpo.parse_args([*words, "--names", "tuned", "gen"]))


# What is refused, in one line

def refused(script, match, *words):
    result = script("dpo.py", *words, check=False)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) >= 1, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert match in last and "Traceback" not in result.stderr, result.stderr


def test_m_below_2n(stages, script):
    refused(script, "--top 3: 4 candidates per image are not twice as many", "curate", "--pool", stages / "pool", "--top", 3)


def test_unpaired_images_with_a_full_reference_reward(stages, script, tmp_path):
    script("dpo.py", "sample", "--gen", stages / "gen", "--lq-dir", stages / "pool" / "lq", "--samples", 2, "--out", tmp_path / "pool")
    refused(script, "no ground truth to compare with", "score", "--pool", tmp_path / "pool", "--fr", "ssim", "--nr", "test_rewards:brightness")
    script("dpo.py", "score", "--pool", tmp_path / "pool", "--fr", "--nr", "test_rewards:brightness")
    refused(script, "--reward hybrid needs a full-reference metric", "curate", "--pool", tmp_path / "pool", "--top", 1)
    script("dpo.py", "curate", "--pool", tmp_path / "pool", "--top", 1, "--reward", "nr")


def test_groups_without_spread_and_metrics_without(stages, script, tmp_path):
    pool = tmp_path / "pool"
    shutil.copytree(stages / "pool", pool)
    rows = [json.loads(line) for line in (pool / "scores.jsonl").read_text().splitlines()]
    first = rows[0]["name"]
    dpo_pool.write_lines(pool / "scores.jsonl", [row | ({"ssim": 0.5, "test_rewards:brightness": 30.0} if row["name"] == first else {}) for row in rows])
    refused(script, f"1 image(s) are all equally good, first {first}", "curate", "--pool", pool, "--top", 1)
    out = script("dpo.py", "curate", "--pool", pool, "--top", 1, "--min-sigma", "1e-6").stdout
    assert "4 images (1 dropped)" in out
    dpo_pool.write_lines(pool / "scores.jsonl", [row | {"ssim": 0.5} for row in rows])
    refused(script, "ssim is 0.5 for every candidate", "curate", "--pool", pool, "--top", 1)


def test_scores_that_are_not_finite(stages, script, rewards, tmp_path):
    (rewards / "bad_at_white.py").write_text("import torch\ndef build(device):\n    return lambda x: torch.where(x.amin((1, 2, 3)) > 0.99, torch.nan, x.mean((1, 2, 3)))\n")
    pool = tmp_path / "pool"
    shutil.copytree(stages / "pool", pool)
    name = sorted((pool / "cand").iterdir())[0]
    data.save_image(name / "1.png", torch.ones(3, 32, 32))
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


def test_a_reference_of_another_size(stages, script, tmp_path):
    shutil.copytree(stages / "pool" / "gt", tmp_path / "gt")
    path = next(iter(data.list_images(tmp_path / "gt").values()))
    data.save_image(path, torch.zeros(3, 28, 32))
    refused(script, f"{path.name}: 32x28 pixels, expected four times its LR image's 8x8", "sample", "--gen", stages / "gen", "--lq-dir", stages / "pool" / "lq", "--gt-dir", tmp_path / "gt", "--out", tmp_path / "pool")
    assert not (tmp_path / "pool").exists()


def test_a_missing_diffusers_folder(stages, script, tmp_path):
    refused(script, "--model", "sample", "--backend", "diffusers", "--model", tmp_path / "sd2", "--gen", tmp_path / "controlnet", "--lq-dir", stages / "pool" / "lq", "--out", tmp_path / "pool")
    refused(script, "--backend diffusers: --model DIR", "sample", "--backend", "diffusers", "--lq-dir", stages / "pool" / "lq", "--out", tmp_path / "pool")


def test_pairs_of_another_generator(stages, script, quintuplets, tmp_path):
    script("dpo.py", "pretrain", "--hr", quintuplets, "--out", tmp_path / "gen", "--total-steps", 1, *GEN, "--seed", 5)
    refused(script, "another generator's", "train", "--gen", tmp_path / "gen", "--pairs", stages / "pool", *TUNE, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("match, words", [
    ("which stage?", []), ("which images?", ["sample"]), ("not both", ["sample", "--hr", "a", "--lq-dir", "b"]), ("--noise tracked", ["train", "--noise", "tracked", "--patch", "8"]),
    ("--keep best", ["train", "--keep", "best", "--val-groups", "0"]), ("multiple of 4", ["sample", "--hr", "a", "--patch", "64", "--load-size", "200"]),
    ("NAME=FILE", ["score", "--metric-weights", "niqe"]), ("no generator there", ["sample", "--gen", "nowhere", "--lq-dir", "x"]), ("not there", ["curate", "--pool", "nowhere"]),
    ("not there", ["train", "--pairs", "nowhere", "--gen", "nowhere"])])
def test_flags_that_cannot_work(script, stages, match, words):
    words = [stages / "gen" if word == "nowhere" and "train" in words and words[k - 1] == "--gen" else word for k, word in enumerate(words)]
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
        assert "(default: " in script("dpo.py", stage, "--help", timeout=20).stdout
