"""finetune_lora.py: the paper's settings, Eq. 5 by hand, trained and frozen weights, files, resume, refusals.

Also the warnings about a reward that is fooled.
"""
import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import equal_on_both_ranks

import archs
import data
import degradations
import finetune_lora as ft
import lora
import metrics
import runs
import train
from images import image_size
from losses import VGGFeatureLoss, mean_reward

TINY = ["--crop", "64", "--watch", "--log-every", "1", "--val-every", "0", "--lr", "1e-2", "--lambda-q", "0.01",
        "--rank", "3", "--device", "cpu", "--workers", "0"]
# the layers that LoRA adapts in compact-small
ADAPTED = [f"body.{k}" for k in range(2, 13, 2)]


@pytest.fixture(scope="session")
def base(quintuplets, rewards, vgg_file, tmp_path_factory):
    """A run of train.py: compact-small, two steps, with a discriminator, one photo held out."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    runs.save_weights(folder / "init.pth", archs.create("compact-small").state_dict())
    train.main(train.parse_args([
        "--arch", "compact-small", "--batch-size", "4", "--group-size", "2", "--pool-size", "8", "--crop", "32",
        "--lambda-p", "0.5", "--vgg-weights", str(vgg_file), "--d-features", "4", "--workers", "0", "--device", "cpu",
        "--init", str(folder / "init.pth"), "--data", str(quintuplets), "--reward", "test_rewards:brightness",
        "--total-steps", "2", "--val-photos", "1", "--ema-decay", "0.5", "--out", str(folder / "compact-small-amo")]))
    return folder / "compact-small-amo"


def flags(base, *more, reward="test_rewards:brightness", steps=3):
    return ["--arch", "compact-small", "--base", base, "--reward", reward, *TINY, "--total-steps", steps, *more]


def tune(base, out, *more, **options):
    ft.main(ft.parse_args(list(map(str, flags(base, "--out", out, *more, **options)))))


def recorded_pairs(monkeypatch):
    """A list that receives every training pair of the runs that follow."""
    pairs, make_pair = [], data.make_pair
    monkeypatch.setattr(data, "make_pair", lambda *a, **k: pairs.append(make_pair(*a, **k)) or pairs[-1])
    return pairs


def events(out, split="train"):
    return [e for e in map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines()) if e["split"] == split]


def weights(path, key="params_ema"):
    return torch.load(path, weights_only=True)[key]


@pytest.mark.fast
def test_the_papers_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    swinir, rrdbnet = (ft.parse_args(["--arch", arch]) for arch in ("swinir", "rrdbnet"))
    assert (swinir.rank, swinir.lr, swinir.milestones) == (48, 5e-6, [5_000])
    assert (rrdbnet.rank, rrdbnet.lr, rrdbnet.milestones) == (24, 5e-5, [])
    for args in (swinir, rrdbnet):
        assert (args.total_steps, args.lambda_q, args.lambda_a) == (20_000, 0.05, 0)
        assert (args.lambda_l1, args.lambda_p, args.ema_decay, args.crop) == (1, 1, 0.999, 256)
        assert (args.reward, args.gt_reward, args.sampler) == (["musiq"], ["musiq"], "amo")
    assert (swinir.batch_size, swinir.pool_size, swinir.degradation, swinir.drop_path) == (32, 640, "one-round", 0.1)
    assert swinir.out == Path("runs/swinir-amo+musiq") and ft.parse_args([]).arch == "swinir"


@pytest.mark.fast
@pytest.mark.parametrize("words, name", [
    ([], "swinir-amo+musiq"), (["--tune", "all"], "swinir-amo+musiq-naive"),
    (["--tune", "layers"], "swinir-amo+musiq-layers"), (["--lambda-p", "2"], "swinir-amo+musiq-hp"),
    (["--lambda-a", "0.1"], "swinir-amo+musiq-ig"),
    (["--reward", "none", "--lambda-a", "0.2"], "swinir-amo+none-nnr2"),
    (["--reward", "none", "--lambda-a", "0.5"], "swinir-amo+none-nnr5"),
    (["--reward", "paq2piq"], "swinir-amo+paq2piq"), (["--reward", "my.py:build"], "swinir-amo+my.py"),
    (["--reward", "musiq=0.05", "nima=0.5"], "swinir-amo+musiq+nima"), (["--base", "elsewhere/r"], "r+musiq")])
def test_rows_of_the_paper_have_folders_of_their_own(words, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "none" in words:
        with pytest.raises(SystemExit):
            ft.parse_args(words)
        runs.save_json(Path("runs/swinir-amo/args.json"), {"args": {"arch": "swinir", "reward": ["musiq"]}})
    args = ft.parse_args(words)
    assert args.out.name == name and args.lambda_q == (1 if "nima=0.5" in words else 0 if "none" in words else 0.05)


@pytest.mark.fast
def test_a_given_lambda_q_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, expected in ((["--reward", "musiq=1", "--lambda-q", "0.05"], 0.05), (["--demo"], "auto"),
                            (["--demo", "--reward", "ranker=0.5"], 1),
                            (["--demo", "--reward", "ranker=0.5", "--lambda-q", "auto"], "auto")):
        assert ft.parse_args(words).lambda_q == expected, words


@pytest.mark.fast
def test_the_runs_settings_are_the_defaults_and_flags_win(base):
    args = ft.parse_args(["--arch", "compact-small", "--base", str(base), "--crop", "64"])
    assert (args.batch_size, args.group_size, args.pool_size, args.d_features) == (4, 2, 8, 4)
    assert (args.lambda_p, args.ema_decay) == (0.5, 0.5)
    assert args.crop == 64 and args.gt_reward == ["test_rewards:brightness"] and args.reward == ["musiq"]
    assert isinstance(args.data, Path) and isinstance(args.vgg_weights, Path) and args.lr == 2e-4 and args.lambda_a == 0
    paq = ft.parse_args(["--arch", "compact-small", "--base", str(base), "--reward", "paq2piq"])
    # the pairs stay those of the run
    assert paq.gt_reward == ["test_rewards:brightness"]


@pytest.mark.fast
def test_the_ground_truths_are_chosen_with_the_file_that_the_run_was_trained_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.save_json(Path("runs/swinir-amo/args.json"), {"args": {
        "arch": "swinir", "sampler": "amo", "reward": ["musiq"], "reward_weights": "m.pth"}})
    made = []
    monkeypatch.setattr(ft.iqa, "create_reward", lambda *words, **options: made.append(words))

    def reward_files(*words):
        args = ft.parse_args(words)
        ft.create_chooser(args, "the reward", "cpu")
        return args.reward_weights, args.gt_reward_weights
    # one model for both
    assert reward_files() == (Path("m.pth"), Path("m.pth")) and not made
    runs.save_json(Path("runs/other/args.json"), {"args": {"arch": "swinir", "reward": ["musiq"]}})
    assert reward_files("--base", "runs/other", "--reward-weights", "n.pth") == (Path("n.pth"), Path("n.pth"))
    assert not made and reward_files("--reward", "nima") == (None, Path("m.pth"))
    assert reward_files("--reward-weights", "n.pth") == (Path("n.pth"), Path("m.pth"))
    assert made == 2 * [(["musiq"], "cpu", Path("m.pth"))]


@pytest.mark.fast
def test_a_base_that_read_an_atlas_can_be_tuned_with_another_sampler(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.save_json(Path("runs/swinir-amo/args.json"), {"args": {
        "arch": "swinir", "sampler": "amo", "reward": ["musiq"], "atlas": ["a.npy"], "tau": 5.0}})
    same, other = ft.parse_args([]), ft.parse_args(["--base", "runs/swinir-amo", "--sampler", "sma"])
    assert (same.atlas, same.tau, other.atlas, other.tau) == (["a.npy"], 5, [], 10)


def test_reward_rises_the_base_stays_and_the_files_fit_together(base, tmp_path, vgg_file):
    tune(base, tmp_path / "out", "--val-every", 6, steps=12)
    # base | tuned | original, one line per validation image
    for step in (6, 12):
        assert image_size(tmp_path / "out" / "samples" / f"{step:07d}.png")[0] == 3 * 3 * 64 + 2 * 4
    plain = archs.create("compact-small")
    archs.load_weights(plain, runs.find_weights(base, ""))
    val = events(tmp_path / "out", "val")
    assert [e["step"] for e in val] == [0, 6, 12] and val[2]["reward"] > val[0]["reward"] + 0.5
    content = torch.load(tmp_path / "out" / "lora" / "adapter.pth", weights_only=True)
    assert content["base_sha256"] == lora.base_hash(plain) and content["rank"] == 3
    adapted = copy.deepcopy(plain)
    lora.load_lora(adapted, tmp_path / "out" / "lora" / "adapter.pth")
    # a run folder means weights/merged.pth
    merged, info = archs.load_x4(tmp_path / "out", "--weights")
    x = torch.rand(1, 3, 20, 24)
    with torch.no_grad():
        assert (merged(x) - adapted(x)).abs().max() < 1e-5 and (merged(x) - plain(x)).abs().max() > 1e-3
    file, start = tmp_path / "out" / "weights" / "merged.pth", plain.state_dict()
    changed = {k for k, v in weights(file).items() if not torch.equal(v, start[k])}
    assert changed == {f"{name}.weight" for name in content["targets"]}
    from spandrel import ModelLoader
    client = ModelLoader().load_from_file(file)
    with torch.no_grad():
        assert torch.allclose(client.model(x), merged(x), atol=1e-6)


def test_lora_as_a_script_merges_at_any_strength(base, tmp_path, capsys):
    tune(base, tmp_path / "out", steps=2)

    def merge(*words):
        lora.main(lora.parse_args(list(map(str, words))))
    start, tuned = weights(runs.find_weights(base, "")), weights(tmp_path / "out" / "weights" / "merged.pth")
    for scale in (0, 0.5, 1, 1.5):
        merge(tmp_path / "out", "--scale", scale, "--out", tmp_path / "m.pth")
        merged = archs.load_x4(tmp_path / "m.pth", "--weights")[0].state_dict()
        assert all(torch.allclose(merged[k], start[k] + scale * (tuned[k] - start[k]), atol=1e-6) for k in start)
    assert f"1.5 x {tmp_path / 'out' / 'lora' / 'adapter.pth'}" in capsys.readouterr().out
    shutil.copy(tmp_path / "out" / "lora" / "adapter.pth", tmp_path / "alone.pth")
    with pytest.raises(ValueError, match="alone.pth: no args.json .*name the tuned weights with --base"):
        merge(tmp_path / "alone.pth", "--out", tmp_path / "n.pth")
    with pytest.raises(ValueError, match="belongs to another base"):
        merge(tmp_path / "alone.pth", "--base", base.parent / "init.pth", "--out", tmp_path / "n.pth")
    assert not (tmp_path / "n.pth").exists()
    shutil.move(base, tmp_path / "moved")
    try:
        message = "args.json: was tuned from .*compact-small-amo, which is not here; .* name it with --base"
        with pytest.raises(ValueError, match=message):
            merge(tmp_path / "out", "--out", tmp_path / "n.pth")
    finally:
        shutil.move(tmp_path / "moved", base)
    merge(tmp_path / "alone.pth", "--base", base, "--out", tmp_path / "n.pth")
    assert all(torch.allclose(weights(tmp_path / "n.pth", "params")[k], tuned[k], atol=1e-6) for k in tuned)


def test_stop_gain_ends_at_the_first_validation_that_has_it(base, tmp_path):
    tune(base, tmp_path / "out", "--val-every", 2, "--stop-gain", 0.1, steps=30)
    val = events(tmp_path / "out", "val")
    gains = [e["reward"] - val[0]["reward"] for e in val]
    assert 0 < val[-1]["step"] < 30 and gains[-1] >= 0.1 and all(g < 0.1 for g in gains[:-1])
    assert (tmp_path / "out" / "weights" / "merged.pth").exists()

    def last_step():
        return torch.load(tmp_path / "out" / "ckpt" / "last.pt", weights_only=True)["step"]
    assert last_step() == val[-1]["step"]
    # the gain is reached: not one step more
    tune(base, tmp_path / "out", "--val-every", 2, "--stop-gain", 0.1, "--resume", steps=30)
    assert last_step() == val[-1]["step"] and events(tmp_path / "out", "val") == val
    tune(base, tmp_path / "out", "--val-every", 2, "--stop-gain", gains[-1] + 0.1, "--resume", steps=30)
    more = events(tmp_path / "out", "val")
    assert val[-1]["step"] < last_step() == more[-1]["step"] < 30
    assert more[-1]["reward"] - val[0]["reward"] >= gains[-1] + 0.1


@pytest.mark.parametrize("tuned", ["layers", "all"])
def test_the_controls_train_what_they_say(base, tmp_path, tuned):
    tune(base, tmp_path / "out", "--tune", tuned)
    start, end = weights(runs.find_weights(base, "")), weights(tmp_path / "out" / "weights" / "merged.pth")
    changed = {k for k in start if not torch.equal(start[k], end[k])}
    assert changed == ({f"{name}.weight" for name in ADAPTED} if tuned == "layers" else set(start))
    assert not (tmp_path / "out" / "lora").exists()


def test_two_steps_of_equation_5_by_hand(base, tmp_path, vgg_file, monkeypatch):
    pairs = recorded_pairs(monkeypatch)
    tune(base, tmp_path / "out", "--pool-size", 0, "--lambda-l1", 2, "--lambda-q", 0.03, "--milestones", 1, "--seed", 7,
         steps=2)
    net = archs.create("compact-small")
    archs.load_weights(net, runs.find_weights(base, ""))
    start = {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(7)
    # finetune_lora.py creates the network first, which draws before A does
    archs.create("compact-small")
    A = [torch.empty(3, 32 * 9) for _ in ADAPTED]
    for a in A:
        torch.nn.init.kaiming_uniform_(a, a=5 ** 0.5)
    A, B = [a.requires_grad_() for a in A], [torch.zeros(32, 3, requires_grad=True) for _ in ADAPTED]
    opt, vgg = torch.optim.Adam(A + B, lr=1, betas=(0.9, 0.99)), VGGFeatureLoss(vgg_file)
    ema = [p.detach().clone() for p in A + B]
    for lr, (lq, gt, _, _) in zip((1e-2, 5e-3), pairs, strict=True):
        updates = {f"{name}.weight": (b @ a).view(32, 32, 3, 3) for name, a, b in zip(ADAPTED, A, B)}
        state = start | {name: start[name] + update for name, update in updates.items()}
        sr = torch.func.functional_call(net, state, lq)
        brightness = 100 * sr.clamp(0, 1).mean((1, 2, 3))
        loss = 2 * (sr - gt).abs().mean() + 0.5 * vgg(sr, gt) - 0.03 * brightness.mean()
        opt.zero_grad()
        loss.backward()
        opt.param_groups[0]["lr"] = lr
        opt.step()
        ema = [0.5 * e + 0.5 * p.detach() for e, p in zip(ema, A + B)]
    content = torch.load(tmp_path / "out" / "lora" / "adapter.pth", weights_only=True)
    for i, name in enumerate(ADAPTED):
        for key, values, average in (("lora_A", A, ema), ("lora_B", B, ema[len(A):])):
            # the two steps are 1e-2 and 5e-3 long, so a wrong one shows
            assert torch.allclose(content["lora"][f"{name}.{key}"], values[i], atol=2e-4)
            assert torch.allclose(content["lora_ema"][f"{name}.{key}"], average[i], atol=2e-4)


# VGG in bf16 takes minutes on CPUs without units for it
@pytest.mark.parametrize("more", [
    [], ["--tune", "all", "--precision", "bf16", "--lambda-p", "0"], ["--lambda-a", "0.1"], ["--lambda-q", "auto"]])
def test_four_steps_are_two_and_two_bitwise(base, tmp_path, more):
    tune(base, tmp_path / "whole", *more, steps=4)
    tune(base, tmp_path / "parts", *more, steps=2)
    tune(base, tmp_path / "parts", *more, "--resume", steps=4)
    a, b = (torch.load(tmp_path / n / "ckpt" / "last.pt", weights_only=True) for n in ("whole", "parts"))
    for net in ("net_g", "ema"):
        assert all(torch.equal(a[net][k], b[net][k]) for k in a[net])
    assert a["lambda_q"] == b["lambda_q"]
    whole, parts = ((tmp_path / n / "weights" / "merged.pth").read_bytes() for n in ("whole", "parts"))
    assert whole == parts
    assert events(tmp_path / "whole", "val")[-1] == events(tmp_path / "parts", "val")[-1]


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_validation_runs_in_the_runs_precision(base, tmp_path, validated_in, precision, dtype):
    tune(base, tmp_path / "out", "--precision", precision, steps=1)
    assert validated_in == {dtype} and events(tmp_path / "out", "val")


def test_the_discriminator_is_the_runs(base, tmp_path, monkeypatch):
    loaded, load_weights = [], archs.load_weights

    def recorded(net, path, key=None):
        loaded.append((type(net).__name__, Path(path).name))
        return load_weights(net, path, key)
    monkeypatch.setattr(archs, "load_weights", recorded)
    tune(base, tmp_path / "ig", "--lambda-a", 0.1, steps=1)
    assert ("UNetDiscriminatorSN", "net_d_0000002.pth") in loaded
    assert {"adv", "D_real", "D_fake"} <= set(events(tmp_path / "ig")[0])
    tune(base, tmp_path / "nnr", "--lambda-a", 0.2, "--lambda-q", 0, reward="none", steps=1)
    assert "q" not in events(tmp_path / "nnr")[0] and "adv" in events(tmp_path / "nnr")[0]


@pytest.mark.slow
def test_auto_weighs_the_gradients_on_the_target_layers(base, tmp_path, vgg_file, monkeypatch):
    pairs = recorded_pairs(monkeypatch)
    tune(base, tmp_path / "out", "--lambda-q", "auto", steps=1)
    net, vgg, ratios = archs.create("compact-small"), VGGFeatureLoss(vgg_file), []
    archs.load_weights(net, runs.find_weights(base, ""))
    adapted = [net.get_submodule(name).weight for name in ADAPTED]

    def norm(loss):
        return sum(g.square().sum() for g in torch.autograd.grad(loss, adapted)).sqrt().item()

    def lambda_q(out):
        return torch.load(tmp_path / out / "ckpt" / "last.pt", weights_only=True)["lambda_q"]
    for lq, gt, _, _ in pairs[:8]:
        fidelity = norm((net(lq) - gt).abs().mean() + 0.5 * vgg(net(lq), gt))
        ratios.append(fidelity / norm(100 * net(lq).clamp(0, 1).mean()))
    assert len(pairs) == 9
    assert lambda_q("out") == pytest.approx(np.mean(ratios), rel=1e-4)
    tune(base, tmp_path / "all", "--lambda-q", "auto", "--tune", "all", steps=1)
    assert lambda_q("all") == lambda_q("out")


@pytest.mark.slow
def test_two_processes_do_as_one(base, tmp_path, script):
    words = flags(base, "--lambda-q", "auto", steps=2)
    ft.main(ft.parse_args(list(map(str, [*words, "--out", tmp_path / "one"]))))
    script("finetune_lora.py", *words, "--out", tmp_path / "two", processes=2)
    one, two = (weights(tmp_path / n / "weights" / "merged.pth") for n in ("one", "two"))
    assert all(torch.allclose(one[k], two[k], rtol=1e-3, atol=1e-5) for k in one)
    one, two = (events(tmp_path / n, "val")[-1] for n in ("one", "two"))
    for key, value in one.items():
        assert value == two[key] or value == pytest.approx(two[key], abs=1e-3)


@pytest.mark.slow
def test_gradients_held_once_change_nothing_in_fine_tuning(base, tmp_path, script):
    state = equal_on_both_ranks(script, tmp_path, "finetune_lora", flags(base, "--lambda-a", 0.1))
    assert any("lora_A" in k for k in state["net_g"])


@pytest.mark.fast
def test_noise_peaks_sees_grids_and_neither_sharpening_nor_noise():
    from skimage import data as photos
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    # one repeats every 4 pixels, one every 2 along the diagonal
    grids = [torch.cos(torch.pi * x / 2) * torch.cos(torch.pi * y / 2), torch.cos(torch.pi * (x + y))]
    noise = 0.02 * torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))

    def q(image):
        return image.clamp(0, 1).mul(255).round() / 255
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        photo = torch.from_numpy(getattr(photos, name)()[:256, :256].copy()).permute(2, 0, 1)[None].float() / 255
        soft = degradations.blur(photo, degradations.gaussian_kernel(9, 1.0))
        sharp = soft + 1.0 * (soft - degradations.blur(soft, degradations.gaussian_kernel(9, 1.5)))
        for natural in (q(sharp) - q(soft), q(photo) - q(soft), noise):
            assert metrics.noise_peaks(natural) < 0.025
        for grid in grids:
            plain = metrics.noise_peaks(q(sharp) - q(soft))
            assert metrics.noise_peaks(q(soft + 2 / 255 * grid) - q(soft)) > 0.8
            assert metrics.noise_peaks(q(sharp + 3 / 255 * grid) - q(soft)) > plain + metrics.PEAKS_ABOVE_UNSHARP
    assert metrics.noise_peaks(torch.zeros(1, 3, 64, 64)) == 0


@pytest.mark.fast
def test_unsharp_like_reaches_the_reward_or_the_most_it_can():
    image = torch.rand(1, 3, 64, 64) * 0.5 + 0.25

    def contrast(x):
        return x.std((1, 2, 3)) * 100
    soft = degradations.blur(image, degradations.gaussian_kernel(9, 1.5))
    sharp = (image + 0.9 * (image - soft)).clamp(0, 1)
    like, equal = metrics.unsharp_like(image, sharp, contrast)
    assert equal and contrast(like) >= contrast(sharp) and contrast(like) < contrast(sharp) * 1.1
    eight_bit = image.mul(255).round() / 255
    # no sharpening reaches the reward: the nearest is none
    less, equal = metrics.unsharp_like(image, soft, lambda x: -x.std((1, 2, 3)))
    assert torch.equal(less, eight_bit) and not equal
    # an image with less reward than the base needs no mask
    same, equal = metrics.unsharp_like(image, image * 0.5, contrast)
    assert torch.equal(same, eight_bit) and equal


@pytest.mark.fast
def test_the_verdict_names_a_fooled_reward_and_structured_noise():
    judges = {"reward": metrics.Metric(None), "piqe": metrics.Metric(None, lower_is_better=True),
              "ranker": metrics.Metric(None), "psnr": metrics.Metric(None)}
    start = {"reward": 50.0, "piqe": 40.0, "ranker": 60.0, "psnr": 25.0,
             "peaks": 0.0, "unsharp_peaks": 0.0, "unsharp_equal": 0.5}

    def verdict(**end):
        return ft.verdict(start, start | end, judges)
    fooled = "WARNING, the reward may be fooled: it rose while {} got worse"
    assert "WARNING" not in verdict(reward=55.0, piqe=38.0, ranker=61.0, psnr=20.0)
    assert "reward 50.00 -> 55.00" in verdict(reward=55.0, piqe=38.0)
    assert "with the same reward in 50% of the images" in verdict()
    noise = verdict(peaks=0.021, unsharp_peaks=0.03).splitlines()[1]
    assert noise.startswith("  structured noise: 2.1% of the change, 3.0% of an unsharp mask's (")
    assert verdict(reward=55.0, piqe=41.0, ranker=59.0).endswith(fooled.format("piqe, ranker"))
    assert verdict(reward=55.0, piqe=38.0, ranker=59.0).endswith(fooled.format("ranker"))
    assert "WARNING" not in verdict(reward=49.0, piqe=41.0, ranker=59.0)
    assert "WARNING, structured noise" in verdict(reward=55.0, piqe=30.0, peaks=0.2)
    both = verdict(reward=55.0, piqe=41.0, peaks=0.2)
    assert "WARNING, structured noise" in both and fooled.format("piqe") in both
    assert "WARNING" not in verdict(reward=55.0, piqe=30.0, peaks=0.2, unsharp_peaks=0.19)
    without = {k: v for k, v in start.items() if not k.startswith(("unsharp", "reward"))}
    text = ft.verdict(without, without | {"peaks": 0.2}, {m: v for m, v in judges.items() if m != "reward"})
    assert "WARNING" not in text and "no unsharp mask to compare with" in text
    assert text.splitlines()[1].startswith("  structured noise: 20.0% of the change")


@pytest.mark.fast
@pytest.mark.parametrize("more, message", [
    (["--base", "/nowhere"], "--base /nowhere: no such run folder or weights file; "),
    (["--reward", "piqe"], "--reward piqe: no usable gradient"),
    (["--watch", "musik"], "--watch musik: this is unknown"),
    (["--d-init", "/nowhere.pth", "--lambda-a", "0.1"], "/nowhere.pth: no such weights"),
    (["--reward", "test_rewards:nan_when_bright"], "no usable gradient|not finite"),
    (["--arch", "rrdbnet-small"], "ema_0000002.pth")])
def test_refusals_leave_no_folder(base, tmp_path, more, message):
    with pytest.raises(runs.UserError, match=message):
        tune(base, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.fast
def test_another_base_cannot_be_resumed(base, tmp_path):
    tune(base, tmp_path / "out", steps=1)
    torch.manual_seed(5)
    other = shutil.copytree(base, tmp_path / "other")
    runs.save_weights(runs.find_weights(other, ""), archs.create("compact-small").state_dict())
    with pytest.raises(ValueError, match="other settings .*base_sha256"):
        tune(other, tmp_path / "out", "--resume", steps=2)
    with pytest.raises(ValueError, match="other settings .*lambda_q 0.01 -> 0.5"):
        tune(base, tmp_path / "out", "--lambda-q", 0.5, "--resume", steps=2)


@pytest.mark.fast
@pytest.mark.parametrize("words, message", [
    (["--rank", "0"], "--rank: 0: must be at least 1"), (["--lambda-q", "much"], "invalid number value: 'much'"),
    (["--reward", "none", "--lambda-q", "auto"], "it needs a --reward"),
    (["--reward", "none", "--stop-gain", "3"], "--stop-gain looks at the reward"),
    (["--reward", "none", "--lambda-q", "0.05"], "--lambda-q 0.05 weighs the reward"),
    (["--d-init", "d.pth"], "--d-init d.pth: there is no discriminator"),
    (["--arch", "rrdbnet-small", "--reward", "none", "--lambda-a", "0.2"], "-small-amo: no run there whose reward")])
def test_flags_are_checked_at_once(words, message, capsys):
    with pytest.raises(SystemExit):
        ft.parse_args(words)
    assert message in capsys.readouterr().err


@pytest.fixture
def late_nan(rewards):
    """late_nan.one and .all: from the third step on the first sample, or all, have neither a reward nor a gradient."""
    (rewards / "late_nan.py").write_text("""
import torch

calls = []

def build(bad):
    def create(device):
        calls.clear()
        def score(x):
            calls.extend([0] * x.requires_grad)
            # two calls are the test for a usable gradient
            spoilt = torch.arange(len(x)) < (bad if len(calls) > 4 and x.requires_grad else 0)
            return (x * torch.where(spoilt, torch.nan, 1)[:, None, None, None]).mean((1, 2, 3))
        return score
    return create

one, all = build(1), build(99)
""")


def test_samples_whose_reward_is_not_finite_are_left_out_counted_and_named_once(base, tmp_path, late_nan):
    for fault, count in (("one", 1), ("all", 4)):
        tune(base, tmp_path / fault, "--sampler", "orig", reward=f"late_nan:{fault}", steps=4)
        log = (tmp_path / fault / "log.txt").read_text().splitlines()
        told = [line for line in log if "without a finite score" in line]
        first = (f"{count} rewards without a finite score since this call began, left out, the first at step 3, "
                 "which drew photo")
        assert told[0].startswith(first)
        assert told[1:] == [f"{2 * count} rewards without a finite score since this call began, left out"]
        assert all(math.isfinite(event["q"]) for event in events(tmp_path / fault))
        assert all(torch.isfinite(t).all() for t in weights(tmp_path / fault / "weights" / "merged.pth").values())


@pytest.mark.slow
def test_too_many_rewards_that_are_not_finite_end_the_run(base, tmp_path, late_nan, monkeypatch):
    assert runs.Meter.WINDOW == 100
    monkeypatch.setattr(runs.Meter, "WINDOW", 6)
    error = "4 rewards had no finite score in the 6 steps up to step 6; more than 2 are too many"
    with pytest.raises(runs.UserError, match=error):
        tune(base, tmp_path / "out", "--sampler", "orig", reward="late_nan:one", steps=7)


@pytest.mark.fast
def test_a_sample_of_finite_reward_without_a_finite_gradient_is_left_out():
    """sqrt has none at 0: a flat image has a contrast, and no gradient of it."""
    def contrast(x):
        return x.var((1, 2, 3), unbiased=False).sqrt()
    sr = torch.rand(3, 3, 4, 4) * 0.8 + 0.1
    sr[1] = 0.5
    sr.requires_grad_()
    value, unscored = mean_reward(contrast, sr)
    value.backward()
    assert unscored.item() == pytest.approx(1 / 3) and value.item() == pytest.approx(contrast(sr).mean().item())
    alone = sr.detach()[[0, 2]].requires_grad_()
    (contrast(alone).sum() / 3).backward()
    assert torch.equal(sr.grad[1], torch.zeros(3, 4, 4)) and torch.allclose(sr.grad[[0, 2]], alone.grad)


@pytest.mark.fast
def test_an_atlas_comes_with_its_run(tmp_path):
    base = tmp_path / "run"
    base.mkdir()

    def settings(*trained):
        """atlas, tau and gt_reward of a tuning whose base was trained with these flags."""
        args = train.parse_args(["--arch", "compact-small", *trained])
        (base / "args.json").write_text(json.dumps({"args": vars(args)}, default=str))
        args = ft.parse_args(["--arch", "compact-small", "--base", str(base), "--reward", "ranker"])
        return args.atlas, args.tau, args.gt_reward
    assert settings("--atlas", "a.npy", "--reward", "none") == (["a.npy"], None, ["none"])
    assert settings("--atlas", "a.npy", "--reward", "none", "--tau", "5") == (["a.npy"], 5, ["none"])
    assert settings("--reward", "ranker") == ([], 10, ["ranker"])
    assert settings("--sampler", "sma", "--tau", "7", "--reward", "ranker")[1] == 7
