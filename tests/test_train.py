"""train.py as a user runs it: exact resume, the same numbers on one process and two, every sampler, every refusal."""
import argparse
import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import archs
import data
import degradations
import finetune_lora
import iqa
import runs
import train
from archs import ARCHS
from images import save_image
from losses import VGGFeatureLoss, adversarial_loss

HERE = Path(__file__).resolve().parent
TINY = ["--arch", "compact-small", "--batch-size", "4", "--group-size", "2", "--pool-size", "8", "--crop", "32",
        "--lambda-p", "0", "--d-features", "4", "--workers", "0", "--device", "cpu", "--log-every", "1",
        "--init", "none"]


@pytest.fixture(scope="session")
def init(tmp_path_factory):
    """{arch: random weight file} of the small nets."""
    folder, files = tmp_path_factory.mktemp("init"), {}
    for arch in ("compact-small", "rrdbnet-small", "swinir-small"):
        torch.manual_seed(0)
        files[arch] = folder / f"{arch}.pth"
        runs.save_weights(files[arch], archs.create(arch).state_dict())
    return files


def train_with(words):
    train.main(train.parse_args(words))


def as_flags(values):
    """{"total_steps": 3, "tensorboard": True} -> ["--total-steps", "3", "--tensorboard"]"""
    words = []
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def flags(quintuplets, init, out=None, arch="compact-small", **more):
    """The flags of an AMO training by brightness on a small net; `more` is added at their end."""
    words = TINY[:-1] + [str(init[arch]), "--data", str(quintuplets), "--reward", "test_rewards:brightness"]
    words[1] = arch
    if out is not None:
        words += ["--out", str(out)]
    return words + as_flags(more)


def events(out, split="train"):
    return [e for e in map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines()) if e["split"] == split]


def losses(out):
    return [{k: e[k] for k in ("step", "pix", "adv", "D_real", "D_fake")} for e in events(out)]


def equal(a, b):
    """Bitwise equality of nested checkpoints."""
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# Settings

@pytest.mark.fast
def test_presets_are_hggts_settings():
    swinir, rrdbnet = (train.parse_args(["--arch", arch]) for arch in ("swinir", "rrdbnet"))
    assert (swinir.batch_size, swinir.group_size, swinir.pool_size, swinir.drop_path) == (4 * 8, 8, 4 * 160, 0.1)
    assert (rrdbnet.batch_size, rrdbnet.group_size, rrdbnet.pool_size, rrdbnet.drop_path) == (4 * 12, 12, 4 * 180, 0)
    assert swinir.milestones == [200_000, 250_000, 275_000, 287_500] and rrdbnet.milestones == [300_000]
    assert (swinir.degradation, rrdbnet.degradation) == ("one-round", "two-round")
    for args in (swinir, rrdbnet):
        assert (args.lr, args.total_steps, args.crop, args.ema_decay) == (1e-4, 300_000, 256, 0.999)
        assert (args.tau, args.seed) == (10, 0)
        assert (args.lambda_l1, args.lambda_p, args.lambda_a, args.usm, args.precision) == (1, 1, 0.1, False, "fp32")
        assert (args.sampler, args.reward, args.data) == ("amo", ["musiq"], Path("datasets/HGGT"))
    psnr = {arch: train.parse_args(["--arch", arch, "--stage", "psnr"]) for arch in ("swinir", "rrdbnet")}
    assert psnr["swinir"].milestones == [150_000, 240_000, 270_000, 285_000]
    assert not psnr["swinir"].usm and psnr["rrdbnet"].usm
    assert all((a.lr, a.lambda_p, a.lambda_a, a.sampler, a.init) == (2e-4, 0, 0, "orig", None) for a in psnr.values())
    assert swinir.init == psnr["swinir"].out == Path("runs/swinir-psnr") and swinir.out == Path("runs/swinir-amo")


@pytest.mark.fast
def test_every_preset_key_is_a_flag_and_every_choice_exists():
    known, tuning = set(vars(train.parse_args([]))), set(vars(finetune_lora.parse_args([])))
    for entry in ARCHS.values():
        assert set(entry) == {"class", "sizes", "train", "psnr", "gan", "tune"} and hasattr(archs, entry["class"])
        assert set(entry["train"]) | set(entry["psnr"]) | set(entry["gan"]) <= known
        assert set(entry["tune"]) <= tuning | {"targets"}
    assert set(train.PSNR) | set(train.DEMO["gan"]) | set(train.DEMO["psnr"]) <= known
    assert set(finetune_lora.DEMO) <= tuning
    assert runs.literal("archs", "ARCHS") == ARCHS and runs.literal("data", "SAMPLERS") == data.SAMPLERS
    assert runs.literal("degradations", "PRESETS") == list(degradations.PRESETS)
    assert tuple(runs.literal("iqa", "MUSIQ")) == iqa.MUSIQ
    assert {train.parse_args(["--arch", arch]).degradation for arch in ARCHS} <= set(degradations.PRESETS)
    # these are recorded, but are no flags
    assert set(train.FIXED) - known == {"discriminator", "samples", "chosen_by"}


@pytest.mark.fast
def test_explicit_flags_win_over_presets():
    args = train.parse_args(["--demo", "--arch", "rrdbnet-small", "--batch-size", "12", "--total-steps", "7"])
    assert (args.arch, args.batch_size, args.total_steps, args.reward) == ("rrdbnet-small", 12, 7, ["ranker"])


@pytest.mark.fast
@pytest.mark.parametrize("name", ["train.py", "prepare.quintuplets", "evaluate.py", "rewards.train_ranker",
                                  "prepare.verify", "finetune_lora.py", "lora.py", "experiments.samplers",
                                  "experiments.lora_tuning", "upscale.py"])
def test_help_answers_at_once_with_defaults(script, name):
    began = time.monotonic()
    text = script(*name.split(), "--help").stdout
    assert time.monotonic() - began < 2 and "default:" in text


@pytest.mark.fast
@pytest.mark.parametrize("words, message", [
    (["--stage", "psnr", "--sampler", "amo"], "only sampler"), (["--reward", "none"], "needs a --reward"),
    (["--arch", "rrdbnet", "--drop-path", "0.1"], "SwinIR"),
    (["--d-warmup", "5", "--lambda-a", "0"], "without one"), (["--crop", "36"], "multiple of 8"),
    (["--crop", "24"], "at least 32"),
    (["--degradation", "realesrgan", "--crop", "72"], "at least 80"), (["--load-size", "128"], "at least the crop"),
    (["--lr", "-1"], "--lr: -1: must be more than 0"), (["--workers", "-1"], "at least 0"),
    (["--ema-decay", "2"], "at least 0 and less than 1"), (["--pool-size", "x"], "invalid whole number"),
    (["--tau", "nan"], "--tau: nan: must be"), (["--batch", "8"], "unrecognized")])
def test_flags_that_contradict_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(words)
    assert message in capsys.readouterr().err


# Parts of a step

@pytest.mark.fast
def test_learning_rate_halves_one_step_after_each_milestone():
    rates = [runs.learning_rate(s, 1e-4, [200_000, 250_000]) for s in (1, 200_000, 200_001, 250_000, 250_001)]
    assert rates == [1e-4, 1e-4, 5e-5, 5e-5, 2.5e-5]


@pytest.mark.fast
def test_adversarial_loss_is_the_hand_worked_cross_entropy():
    logits = torch.tensor([[0.0, 1.0], [-2.0, 3.0]])
    for real, expected in ((True, torch.log1p(torch.exp(-logits))), (False, torch.log1p(torch.exp(logits)))):
        assert adversarial_loss(logits, real).item() == pytest.approx(expected.mean().item(), rel=1e-6)


@pytest.mark.fast
def test_ema_is_the_recursion_of_hggt():
    net, ema = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = [0.999 * e.detach() + 0.001 * n.detach() for e, n in zip(ema.parameters(), net.parameters())]
    runs.update_ema(ema, net, 0.999)
    assert all(torch.allclose(e, x, atol=1e-7) for e, x in zip(ema.parameters(), expected))


@pytest.mark.fast
def test_lr_crop_covers_the_hr_crop():
    hr = torch.arange(64.0)[:, None] * 64 + torch.arange(64)
    lq = hr[::4, ::4].expand(1, 3, 16, 16)
    assert torch.equal(data.crop_like(lq, torch.tensor([[8, 20]]), 32)[0, 0], hr[8:40, 20:52][::4, ::4])


# Whole runs

def test_amo_chooses_the_brightest_version_and_the_pool_gets_the_winner_only(quintuplets, init, rewards, tmp_path):
    train_with(flags(quintuplets, init, tmp_path / "run", total_steps=3))
    assert events(tmp_path / "run")[-1]["picked"] == {"original": 0, "01": 0, "02": 12, "03": 0, "04": 0}
    pool = runs.load_checkpoint(tmp_path / "run" / "ckpt" / "last.pt")["pool"]
    assert [tuple(t.shape) for t in pool] == [(4, 2, 3, 8, 8), (4, 2, 3, 32, 32)]
    assert all(t.dtype == torch.uint8 for t in pool)
    grey = pool[1].float().mean((2, 3, 4))
    # 02 is 30 grey levels brighter than the original
    assert (grey > 145).all()


@pytest.mark.parametrize("sampler, chosen", [
    ("orig", {"original"}), ("rand", None), ("upos", {"01"}), ("sma", None), ("smp", {"01"})])
def test_every_sampler_trains_on_the_versions_it_may(
        quintuplets, init, rewards, tmp_path, monkeypatch, sampler, chosen):
    monkeypatch.chdir(tmp_path)
    train_with(flags(quintuplets, init, tmp_path / "run", sampler=sampler, total_steps=4, tau=20))
    picked = events(tmp_path / "run")[-1]["picked"]
    used = {v for v, n in picked.items() if n}
    assert sum(picked.values()) == 16 and (used == chosen if chosen else len(used) >= 3)
    sets = "5 sets of 5 versions (1 dropped)" if sampler in ("upos", "smp") else "6 sets of 5 versions (0 dropped)"
    assert f"{sets}, 3 photographs, grouped by <photo>-<row>-<column>; " in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("sampler", ["amo", "sma"])
def test_crops_without_a_finite_score_are_never_chosen_counted_and_named_once(
        quintuplets, init, rewards, tmp_path, monkeypatch, sampler):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(quintuplets, tmp_path / "set")
    for file in (tmp_path / "set").glob("Train/images/0-6/*/photo0-0-0*.png"):
        # all five of one photograph, and of another the brightest
        save_image(file, torch.full((3, 64, 64), 255, dtype=torch.uint8))
    save_image(next((tmp_path / "set").glob("**/photo1-0-0_02.png")), torch.full((3, 64, 64), 255, dtype=torch.uint8))
    train_with(flags(tmp_path / "set", init, tmp_path / "run", reward="test_rewards:singular_when_white",
                     sampler=sampler, tau=0.1, total_steps=6))
    last = events(tmp_path / "run")[-1]
    # 24 samples of 6 sets: 4 of each
    assert last["picked"] == {"original": 4, "01": 4, "02": 16, "03": 0, "04": 0}
    assert all(50 < event.get("score", 60) < 70 for event in events(tmp_path / "run"))
    log = (tmp_path / "run" / "log.txt").read_text()
    named = {"amo": "candidates without a finite score since this call began, left out, the first at step 1, which "
                    "drew photo",
             "sma": "6 images without a finite score are left out, first "}[sampler]
    assert log.count(named) == 1


def test_a_missing_version_is_refused_before_start_weights_are_looked_for(quintuplets, init, rewards, tmp_path):
    shutil.copytree(quintuplets, tmp_path / "set")
    shutil.rmtree(tmp_path / "set/Train/images/0-6/03")
    words = flags(tmp_path / "set", init, tmp_path / "run", total_steps=2, sampler="rand")
    words += ["--init", str(tmp_path / "none.pth")]
    with pytest.raises(runs.UserError, match="no folder 03"):
        train_with(words)
    with pytest.raises(runs.UserError, match="none.pth: no such file or run"):
        train_with([*words, "--versions", "original", "01", "02", "04"])
    train_with([*words, "--versions", "original", "01", "02", "04", "--init", str(init["compact-small"])])
    assert set(events(tmp_path / "run")[-1]["picked"]) == {"original", "01", "02", "04"}


def test_samplers_that_need_no_score_load_no_reward_unless_it_is_named(
        quintuplets, init, rewards, tmp_path, monkeypatch):
    created, create = [], iqa.create_reward
    monkeypatch.setattr(iqa, "create_reward", lambda words, *a, **k: created.append(words) or create(words, *a, **k))
    for sampler in ("orig", "rand", "upos"):
        words = flags(quintuplets, init, tmp_path / sampler, sampler=sampler, total_steps=1)
        place = words.index("--reward")
        train_with(words[:place] + words[place + 2:])
        assert not created and "score" not in events(tmp_path / sampler, "train")[-1]
    train_with(flags(quintuplets, init, tmp_path / "named", sampler="orig", total_steps=1, val_photos=1))
    assert created == [["test_rewards:brightness"]] and "score" in events(tmp_path / "named", "val")[-1]
    # a run of an earlier commit, which loaded it, continues
    train_with([*words[:place], *words[place + 2:], "--out", str(tmp_path / "named"), "--sampler", "orig",
                "--val-photos", "1", "--total-steps", "2", "--resume"])
    assert [event["step"] for event in events(tmp_path / "named")] == [1, 2]


def test_psnr_stage_leaves_what_the_gan_stage_starts_from(quintuplets, rewards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = quintuplets / "Train" / "images" / "0-6" / "original"
    common = TINY[:-2] + ["--total-steps", "2"]
    with pytest.raises(ValueError, match="train.py --stage psnr --arch compact-small"):
        train_with(common + ["--data", str(quintuplets), "--reward", "test_rewards:brightness"])
    assert not Path("runs/compact-small-amo").exists()
    train_with(common + ["--stage", "psnr", "--data", str(photos), "--load-size", "48", "--val-photos", "1"])
    run = Path("runs/compact-small-psnr")
    assert "pix" in events(run)[-1] and "adv" not in events(run)[-1] and not list(run.glob("weights/net_d*"))
    assert events(run, "val")[-1]["psnr"] > 5
    train_with(common + ["--data", str(quintuplets), "--reward", "test_rewards:brightness"])
    assert "runs/compact-small-psnr/weights/ema_0000002.pth" in Path("runs/compact-small-amo/log.txt").read_text()


def test_the_psnr_stage_of_rrdbnet_sharpens_the_whole_image_and_then_crops(quintuplets, rewards, tmp_path, monkeypatch):
    """HGGT: usm(image) makes the LR image and is the target.

    A sharpened crop would differ near its border, and 8 bit would round the target.
    """
    photos = quintuplets / "Train" / "images" / "0-6" / "original"
    assert train.parse_args(["--stage", "psnr", "--arch", "rrdbnet"]).usm
    assert not train.parse_args(["--stage", "psnr"]).usm
    pairs, make_pair, swapped, swap = [], data.make_pair, [], data.TrainingPool.swap

    def recorded_pair(batch, *args, **options):
        pair = make_pair(batch, *args, **options)
        pairs.append((batch, *pair))
        return pair
    monkeypatch.setattr(data, "make_pair", recorded_pair)
    monkeypatch.setattr(data.TrainingPool, "swap", lambda self, *a: swapped.append(swap(self, *a)) or swapped[-1])
    train_with(TINY[:-2] + ["--total-steps", "2", "--stage", "psnr", "--data", str(photos), "--load-size", "0",
                            "--crop", "32", "--pool-size", "8", "--out", str(tmp_path / "run")])
    for (batch, lq, gt, _, _), (_, pooled) in zip(pairs[:2], swapped, strict=True):
        whole = degradations.usm_sharpen(batch["original"].float() / 255)
        sharpened_crops = degradations.usm_sharpen(batch["crops"][:, 0].float() / 255)
        for image, crop, (y, x), sharpened in zip(whole, gt, batch["where"].tolist(), sharpened_crops):
            assert torch.equal(crop, image[:, y:y + 32, x:x + 32])
            assert not torch.allclose(crop, sharpened, atol=1e-3)
        # while the pool fills, a pair is trained on at once
        assert torch.equal(pooled, gt) and lq.shape == (4, 3, 8, 8)
    assert all(t.dtype == torch.float32 for t in runs.load_checkpoint(tmp_path / "run" / "ckpt" / "last.pt")["pool"])


def test_the_weight_files_load_in_spandrel_and_hold_ema_and_raw(quintuplets, init, rewards, tmp_path):
    spandrel = pytest.importorskip("spandrel")
    train_with(flags(quintuplets, init, tmp_path / "run", total_steps=2, sampler="rand"))
    file = tmp_path / "run" / "weights" / "ema_0000002.pth"
    state = runs.load_checkpoint(tmp_path / "run" / "ckpt" / "last.pt")
    saved = runs.load_checkpoint(file)
    assert equal(saved["params_ema"], state["ema"]) and equal(saved["params"], state["net_g"])
    assert not equal(state["ema"], state["net_g"])
    net, _ = archs.load_generator(file)
    client = spandrel.ModelLoader().load_from_file(file)
    x = torch.rand(1, 3, 37, 53)
    with torch.no_grad():
        assert torch.allclose(net(x), client.model(x), atol=1e-5)
    d = archs.UNetDiscriminatorSN(4)
    d.load_state_dict(runs.load_checkpoint(tmp_path / "run" / "weights" / "net_d_0000002.pth")["params"])


def test_a_network_of_other_sizes_is_trained_resumed_and_tuned(quintuplets, rewards, tmp_path):
    """The sizes of --init win over those of --arch, are recorded, and need no file to go on."""
    import finetune_lora
    torch.manual_seed(0)
    sizes, init = {"num_feat": 8, "num_conv": 3, "upscale": 4}, tmp_path / "small.pth"
    torch.save({"state_dict": archs.create("compact", **sizes).state_dict()}, init)
    run = tmp_path / "run"
    inits = dict.fromkeys(("compact-small", "rrdbnet-small"), init)
    train_with(flags(quintuplets, inits, run, total_steps=2, val_every=2))
    assert json.loads((run / "args.json").read_text())["args"]["sizes"] == sizes
    init.unlink()
    train_with(flags(quintuplets, inits, run, total_steps=3, val_every=3, resume="must"))
    assert archs.load_generator(run / "weights" / "ema_0000003.pth")[1]["sizes"] == sizes
    assert torch.load(run / "ckpt" / "last.pt", weights_only=True)["args"]["sizes"] == sizes
    words = ["--base", run, "--reward", "test_rewards:brightness", "--lambda-p", 0, "--total-steps", 1, "--watch",
             "--workers", 0, "--threads", 1, "--device", "cpu", "--out", tmp_path / "tuned"]
    finetune_lora.main(finetune_lora.parse_args(list(map(str, words))))
    assert json.loads((tmp_path / "tuned" / "args.json").read_text())["args"]["sizes"] == sizes
    with pytest.raises(ValueError, match="the file is compact x4, and --arch rrdbnet-small is RRDBNet x4"):
        train_with(flags(quintuplets, {"rrdbnet-small": run}, tmp_path / "other", arch="rrdbnet-small"))
    assert not (tmp_path / "other").exists()


def test_sample_grid_and_tensorboard_and_validation(quintuplets, init, rewards, tmp_path):
    pytest.importorskip("tensorboard")
    train_with(flags(quintuplets, init, tmp_path / "run", total_steps=2, val_photos=1, tensorboard=True))
    with Image.open(tmp_path / "run" / "samples" / "0000002.png") as grid:
        assert grid.size[0] == 3 * 32 + 2 * 4 and grid.size[1] >= 2 * (32 + 16)
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert set(events(tmp_path / "run", "val")[-1]) == {"step", "split", "psnr", "score"}
    # a photo has two patches: both are held out
    assert "4 sets of 5 versions" in (tmp_path / "run" / "log.txt").read_text()


def test_test_images_of_other_sizes_are_shown_and_validated_and_small_ones_refused(
        quintuplets, init, rewards, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(quintuplets, root)
    base = torch.randint(0, 200, (3, 90, 70), dtype=torch.uint8)
    for n, (h, w) in enumerate([(64, 70), (90, 48), (47, 41)]):
        for version in ("original", "01", "02", "03", "04"):
            name = f"t{n}-0-0" + ("" if version == "original" else f"_{version}")
            file = root / "Test" / "GT" / "t" / "images" / version / f"{name}.png"
            save_image(file, base[:, :h, :w] + int(version == "02"))
    train_with(flags(root, init, tmp_path / "run", total_steps=1))
    assert (tmp_path / "run" / "samples" / "0000001.png").exists()
    assert 0 < events(tmp_path / "run", "val")[-1]["psnr"] < 60
    with pytest.raises(ValueError, match="41x47 pixels, smaller than the 48 pixels"):
        train_with(flags(root, init, tmp_path / "other", total_steps=1) + ["--crop", "48"])
    assert not (tmp_path / "other").exists()


def test_accumulation_gives_the_same_losses(quintuplets, init, rewards, tmp_path):
    for n in (1, 2):
        train_with(flags(quintuplets, init, tmp_path / str(n), total_steps=3, accumulate=n, lambda_a=0))
    for a, b in zip(events(tmp_path / "1"), events(tmp_path / "2")):
        assert a["pix"] == pytest.approx(b["pix"], rel=1e-5)


def test_compiled_networks_give_the_same_losses(quintuplets, init, rewards, vgg_file, tmp_path, compiled):
    for on in (True, False):
        train_with(flags(quintuplets, init, tmp_path / str(on), total_steps=3, lambda_p=1, vgg_weights=vgg_file)
                   + ["--fast", "compile"] * on)
    assert compiled == ["SRVGGNetCompact", "VGGFeatureLoss"]
    for a, b in zip(losses(tmp_path / "True"), losses(tmp_path / "False")):
        assert a == pytest.approx(b, rel=1e-5)


def test_a_recorded_step_needs_cuda(quintuplets, init, rewards, tmp_path):
    with pytest.raises(runs.UserError, match="--fast graph is for one process on CUDA; here are 1 on cpu"):
        train_with(flags(quintuplets, init, tmp_path / "run", total_steps=1, fast="graph"))


@pytest.mark.parametrize("more", [dict(precision="bf16"), dict(pool_size=0), dict(arch="swinir-small", workers=2)])
def test_options_run_to_finite_losses(quintuplets, init, rewards, tmp_path, more):
    train_with(flags(quintuplets, init, tmp_path / "run", total_steps=2, **more))
    assert all(0 < e["pix"] < 10 for e in events(tmp_path / "run"))


def test_perceptual_loss_enters_the_objective(quintuplets, init, rewards, vgg_file, tmp_path):
    train_with(flags(quintuplets, init, tmp_path / "run", total_steps=1, lambda_p=1, vgg_weights=vgg_file))
    assert events(tmp_path / "run")[-1]["percep"] > 0


def test_two_steps_written_out_by_hand(quintuplets, init, rewards, vgg_file, tmp_path, monkeypatch):
    """Eq. 1 with its weights, the halved rate, D's labels, EMA: plain torch gives the same nets."""
    pairs, make_pair = [], data.make_pair
    monkeypatch.setattr(data, "make_pair", lambda *a, **k: pairs.append(make_pair(*a, **k)) or pairs[-1])
    train_with(flags(quintuplets, init, tmp_path / "run", total_steps=2, sampler="orig", lambda_l1=2, lambda_p=0.5,
                     lambda_a=0.3, vgg_weights=vgg_file, milestones=1, pool_size=0, ema_decay=0.9, lr=1e-3,
                     no_channels_last=True))
    torch.manual_seed(0)
    g = archs.create("compact-small")
    d = archs.UNetDiscriminatorSN(4)
    g.load_state_dict(torch.load(init["compact-small"], weights_only=True)["params"])
    vgg, ema = VGGFeatureLoss(vgg_file), [p.detach().clone() for p in g.parameters()]
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), lr=1, betas=(0.9, 0.99)) for net in (g, d))
    bce = torch.nn.BCEWithLogitsLoss()
    for lr, (lq, gt, _, _) in zip((1e-3, 5e-4), pairs[:2], strict=True):
        sr = g(lq)
        fooled = d(sr)
        terms = {"pix": (sr - gt).abs().mean(), "percep": vgg(sr, gt), "adv": bce(fooled, torch.ones_like(fooled))}
        loss = 2 * terms["pix"] + 0.5 * terms["percep"] + 0.3 * terms["adv"]
        grads = torch.autograd.grad(loss, list(g.parameters()))
        for p, v in zip(g.parameters(), grads):
            p.grad = v
        opt_g.param_groups[0]["lr"] = opt_d.param_groups[0]["lr"] = lr
        opt_g.step()
        ema = [0.9 * e + 0.1 * p.detach() for e, p in zip(ema, g.parameters())]
        real = d(gt)
        terms["D_real"] = bce(real, torch.ones_like(real))
        # before the second forward pass moves the spectral norm
        grads = torch.autograd.grad(terms["D_real"], list(d.parameters()))
        fake = d(sr.detach())
        terms["D_fake"] = bce(fake, torch.zeros_like(fake))
        grads = [a + b for a, b in zip(grads, torch.autograd.grad(terms["D_fake"], list(d.parameters())))]
        for p, v in zip(d.parameters(), grads):
            p.grad = v
        opt_d.step()
        event = events(tmp_path / "run")[int(lr == 5e-4)]
        expected = {name: value.item() for name, value in terms.items()}
        assert {name: event[name] for name in terms} == pytest.approx(expected, rel=1e-4) and event["lr"] == lr
    saved = runs.load_checkpoint(tmp_path / "run" / "ckpt" / "last.pt")
    for net, key in ((g, "net_g"), (d, "net_d")):
        assert all(torch.allclose(v, saved[key][k], rtol=1e-4, atol=2e-6) for k, v in net.state_dict().items())
    assert all(torch.allclose(e, saved["ema"][k], rtol=1e-4, atol=2e-6) for e, (k, _) in zip(ema, g.named_parameters()))
    assert not any(torch.equal(saved["ema"][k], saved["net_g"][k]) for k, _ in g.named_parameters())
    # the effect of the betas is too small to see above
    assert all(saved[opt]["param_groups"][0]["betas"] == (0.9, 0.99) for opt in ("opt_g", "opt_d"))


def test_the_warm_up_trains_the_discriminator_alone_and_resumes_bitwise(quintuplets, init, rewards, tmp_path):
    more = dict(save_every=1, val_every=0, d_warmup=2, lambda_a=1.0)
    for name, steps in (("warm", 2), ("whole", 4), ("parts", 1), ("parts", 3), ("parts", 4)):
        again = ["--resume", "auto"] if name == "parts" else []
        train_with(flags(quintuplets, init, tmp_path / name, total_steps=steps, **more) + again)
    start = archs.read_weights(init["compact-small"])[0]
    warm, whole, parts = (runs.load_checkpoint(tmp_path / name / "ckpt" / "last.pt") for name in
                          ("warm", "whole", "parts"))
    assert equal(warm["net_g"], start) and equal(warm["ema"], start) and not warm["opt_g"]["state"]
    assert all(state["step"] == 2 for state in warm["opt_d"]["state"].values())
    # the generator's losses are logged from the first step; its own steps are counted from the warm-up's end
    assert all({"pix", "adv", "D_real", "D_fake"} <= set(event) for event in events(tmp_path / "warm"))
    assert all(state["step"] == 2 for state in whole["opt_g"]["state"].values())
    assert not equal(whole["net_g"], start)
    for name in ("net_g", "ema", "opt_g", "net_d", "opt_d"):
        assert equal(whole[name], parts[name]), name
    with pytest.raises(runs.UserError, match="d_warmup 2 -> 0"):
        train_with(flags(quintuplets, init, tmp_path / "parts", total_steps=5) + ["--resume"])


def test_validation_is_of_the_ema(quintuplets, init, rewards, tmp_path):
    args = train.parse_args(flags(quintuplets, init, tmp_path / "run", total_steps=2, val_photos=1, lr=1e-2))
    train.main(args)
    state, net = runs.load_checkpoint(tmp_path / "run" / "ckpt" / "last.pt"), archs.create("compact-small").eval()
    seeds = functools.partial(runs.sample_seed, args.seed)
    held = data.find_sets(quintuplets, "Train").hold_out(1, seeds(0, 0, "val-photos"))[1]
    world, psnr = runs.World(0, 1, torch.device("cpu")), {}
    for key in ("ema", "net_g"):
        net.load_state_dict(state[key])
        psnr[key] = train.validate(net, held, args.degradation, None, seeds, world)["psnr"]
    assert events(tmp_path / "run", "val")[-1]["psnr"] == pytest.approx(psnr["ema"], abs=1e-4)
    assert abs(psnr["ema"] - psnr["net_g"]) > 1e-2
    named, = {held.photo(stem) for stem in held.stems}
    assert f"held out for validation: {named}\n" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_validation_runs_in_the_runs_precision(quintuplets, init, rewards, tmp_path, validated_in, precision, dtype):
    train_with(flags(quintuplets, init, tmp_path / "run", total_steps=1, val_photos=1, precision=precision))
    assert validated_in == {dtype} and events(tmp_path / "run", "val")


# One process and two

def test_two_processes_give_the_losses_of_one(quintuplets, init, rewards, tmp_path, script):
    """A global batch of 4 with pool, AMO, discriminator and DropPath; the pool hands out stored pairs from step 3."""
    words = dict(arch="swinir-small", drop_path=0.5, total_steps=4)
    train_with(flags(quintuplets, init, tmp_path / "one", **words))
    script("train.py", *flags(quintuplets, init, tmp_path / "two", **words), processes=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 4 and [e["step"] for e in two] == [1, 2, 3, 4]
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-4)
    a, b = (runs.load_checkpoint(tmp_path / n / "ckpt" / "last.pt") for n in ("one", "two"))
    assert equal(a["pool"], b["pool"]) and a["picked"] == b["picked"]
    assert all(torch.allclose(a["net_g"][k], b["net_g"][k], atol=1e-4) for k in a["net_g"])


RANKS = """
import importlib, os, sys
import torch
import runs
name, folder, *words = sys.argv[1:]
script, save = importlib.import_module(name), runs.Run.save
wraps = {"ours": runs.World(0, 2, None).parallel, "defaults": torch.nn.parallel.DistributedDataParallel}

def parallel(world, net):
    net = wraps[ddp](net)
    wrapped.append((net.gradient_as_bucket_view, net.will_sync_module_buffers()))
    return net
runs.World.parallel = parallel

def save_all(self, step, state):
    kept = {k: state[k] for k in ("net_g", "net_d", "opt_g", "opt_d") if k in state}
    torch.save({"wrapped": wrapped, **kept}, f"{folder}/{ddp}-{os.environ['RANK']}.pth")
    save(self, step, state)
runs.Run.save = save_all
for ddp in wraps:
    wrapped = []
    script.main(script.parse_args([*words, "--out", f"{folder}/{ddp}"]))
"""


def equal_on_both_ranks(script, tmp_path, name, words):
    """Run a script on two processes as it is and with DDP's own defaults. Returns what each of the four has at the end.

    Those are weights, buffers and moments, which must be equal bit by bit.
    """
    (tmp_path / "ranks.py").write_text("import sys\nsys.path[:0] = [" + repr(str(runs.REPO)) + "]\n" + RANKS)
    script(tmp_path / "ranks.py", name, tmp_path, *words, processes=2)
    first, *others = (torch.load(tmp_path / f"{ddp}-{rank}.pth") for ddp in ("ours", "defaults") for rank in (0, 1))
    wrapped = [state.pop("wrapped") for state in (first, *others)]
    nets = 2 if "net_d" in first else 1
    assert wrapped[0] == wrapped[1] == [(True, False)] * nets
    assert [view for view, _ in wrapped[2]] == [False] * nets and wrapped[2][-1][1]
    assert all(equal(first, other) for other in others)
    return first


@pytest.mark.slow
def test_gradients_held_once_and_buffers_not_sent_change_nothing(quintuplets, init, rewards, tmp_path, script):
    """Also with micro-batches without all-reduce, D's spectral norm, SwinIR's masks and stochastic depth."""
    words = flags(quintuplets, init, arch="swinir-small", drop_path=0.5, total_steps=5, accumulate=2)
    state = equal_on_both_ranks(script, tmp_path, "train", words)
    assert any("_u" in k for k in state["net_d"]) and any("attn_mask" in k for k in state["net_g"])


def test_a_run_continues_after_a_change_of_processes(quintuplets, init, rewards, tmp_path, script):
    words = flags(quintuplets, init, tmp_path / "run", total_steps=4)
    script("train.py", *flags(quintuplets, init, tmp_path / "run", total_steps=2), processes=2)
    train_with(words + ["--resume"])
    train_with(flags(quintuplets, init, tmp_path / "whole", total_steps=4))
    for a, b in zip(losses(tmp_path / "run"), losses(tmp_path / "whole")):
        assert a == pytest.approx(b, rel=1e-4)


# Interruption

@pytest.mark.slow
def test_ten_kills_leave_the_run_bitwise_as_if_undisturbed(quintuplets, init, rewards, tmp_path):
    words = flags(quintuplets, init, total_steps=12, save_every=1, log_every=2, workers=1)
    result = subprocess.run(runs.python("experiments.kill_runs", tmp_path, *words), capture_output=True, text=True,
                            timeout=280, env={**os.environ, "PYTHONPATH": f"{rewards}{os.pathsep}{runs.REPO}"})
    assert result.returncode == 0 and "killed 10 times" in result.stdout, result.stderr
    whole, killed = (runs.load_checkpoint(tmp_path / n / "ckpt" / "last.pt") for n in ("whole", "killed"))
    assert whole.pop("args") | {"out": ""} == killed.pop("args") | {"out": ""} and whole["step"] == 12
    assert equal(whole, killed)
    # averages of a log interval survive; none is missing or doubled
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert not list((tmp_path / "whole").rglob("*.tmp"))


@pytest.mark.parametrize("workers, name", [(0, "SIGUSR1"), (2, "SIGTERM"), (1, "SIGINT")])
def test_a_signal_to_the_process_group_saves_and_resume_ends_as_undisturbed(
        quintuplets, init, rewards, tmp_path, workers, name):
    words = flags(quintuplets, init, tmp_path / "run", total_steps=2000, workers=workers)
    process = subprocess.Popen([sys.executable, str(runs.REPO / "train.py"), *words], stdout=subprocess.PIPE, text=True,
                               start_new_session=True, env={**os.environ, "PYTHONPATH": str(rewards)})
    for line in process.stdout:
        if " step 3/" in line:
            # as torchrun and Slurm do: the data workers get it too
            os.killpg(process.pid, getattr(signal, name))
            break
    assert "stopped by a signal" in process.communicate(timeout=60)[0] and process.returncode == 0
    stopped = runs.load_checkpoint(tmp_path / "run" / "ckpt" / "last.pt")["step"]
    assert 3 <= stopped < 2000
    more = str(stopped + 2)
    train_with(flags(quintuplets, init, tmp_path / "run", total_steps=more) + ["--resume"])
    train_with(flags(quintuplets, init, tmp_path / "whole", total_steps=more))
    a, b = (runs.load_checkpoint(tmp_path / n / "ckpt" / "last.pt") for n in ("run", "whole"))
    assert all(equal(a[k], b[k]) for k in a if k != "args")


def test_a_non_finite_loss_names_term_step_and_samples_and_saves_nothing(quintuplets, init, rewards, tmp_path):
    message = r"(pix|adv|D_real|D_fake) is not finite at step [23]; .*Samples: photo\d-\d+-0, photo"
    with pytest.raises(ValueError, match=message):
        train_with(flags(quintuplets, init, tmp_path / "run", total_steps=5, lr="1e30"))
    assert not (tmp_path / "run" / "ckpt").exists()


def test_an_unreadable_image_met_later_keeps_the_steps_before_it(quintuplets, init, rewards, tmp_path):
    shutil.copytree(quintuplets, tmp_path / "set")
    options = dict(total_steps=4, batch_size=1, group_size=1, pool_size=2, log_every=4)
    words = flags(tmp_path / "set", init, tmp_path / "run", **options)
    sets = data.find_sets(tmp_path / "set", "Train")
    args = train.parse_args(words)
    dataset = data.TrainingSet(sets, "amo", functools.partial(runs.sample_seed, 0), 1, 1, 32)
    broken = sets.path(dataset.names(3)[0], "04")
    whole = broken.read_bytes()
    broken.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="_04.png: damaged image"):
        train.main(args)
    assert runs.load_checkpoint(tmp_path / "run" / "ckpt" / "last.pt")["step"] == 2
    broken.write_bytes(whole)
    train_with(words + ["--resume"])
    train_with(flags(tmp_path / "set", init, tmp_path / "whole", **options))
    a, b = (runs.load_checkpoint(tmp_path / n / "ckpt" / "last.pt") for n in ("run", "whole"))
    assert all(equal(a[k], b[k]) for k in a if k != "args")


def test_a_failing_disk_keeps_the_steps_before_it(quintuplets, init, rewards, tmp_path, monkeypatch):
    sample = data.TrainingSet.sample

    def failing(self, step, lane):
        if step == 3:
            raise OSError(errno.EIO, "Input/output error", "photo.png")
        return sample(self, step, lane)
    monkeypatch.setattr(data.TrainingSet, "sample", failing)
    with pytest.raises(OSError, match="photo.png"):
        train_with(flags(quintuplets, init, tmp_path / "run", total_steps=4))
    assert runs.load_checkpoint(tmp_path / "run" / "ckpt" / "last.pt")["step"] == 2


# Refusals

@pytest.mark.fast
@pytest.mark.parametrize("size, mode, message", [
    ((64, 60), "RGB", "64x60 pixels but its original has 64x64"), ((64, 64), "L", "image mode L")])
def test_a_wrong_size_or_mode_anywhere_is_refused_before_the_first_step(
        quintuplets, init, rewards, tmp_path, size, mode, message):
    shutil.copytree(quintuplets, tmp_path / "set")
    sets = data.find_sets(tmp_path / "set", "Train")
    dataset = data.TrainingSet(sets, "amo", functools.partial(runs.sample_seed, 0), 4, 2, 32)
    # an image that is not in the first batch
    last = ({*sets.stems} - {*dataset.names(1)}).pop()
    Image.new(mode, size).save(sets.path(last, "03"))
    with pytest.raises(ValueError, match=f"{last}_03.png: {message}"):
        train_with(flags(tmp_path / "set", init, tmp_path / "run", total_steps=1))
    assert not (tmp_path / "run").exists()


def test_deterministic_changes_nothing_on_a_cpu(quintuplets, init, rewards, vgg_file, tmp_path, monkeypatch):
    """On CUDA tests/test_gpu.py lets such a run be continued."""
    words = dict(arch="swinir-small", total_steps=3, lambda_p=1, vgg_weights=vgg_file)
    train_with(flags(quintuplets, init, tmp_path / "plain", **words))
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        train_with(flags(quintuplets, init, tmp_path / "deterministic", deterministic=True, **words))
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    plain, deterministic = (runs.load_checkpoint(tmp_path / n / "ckpt" / "last.pt") for n in ("plain", "deterministic"))
    assert all(equal(plain[k], deterministic[k]) for k in plain if k != "args")


def test_a_second_start_into_a_run_is_refused_and_resume_needs_a_checkpoint(quintuplets, init, rewards, tmp_path):
    words = flags(quintuplets, init, tmp_path / "run", total_steps=1)
    with pytest.raises(ValueError, match="--resume auto"):
        train_with(words + ["--resume"])
    assert not (tmp_path / "run").exists()
    train_with(words + ["--resume", "auto"])
    with pytest.raises(ValueError, match="exists and is not empty"):
        train_with(words)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "args.json").write_text("{}")
    with pytest.raises(ValueError, match="before its first checkpoint, --resume auto starts it again"):
        train_with(flags(quintuplets, init, tmp_path / "begun", total_steps=1))
    with pytest.raises(ValueError, match="other settings.*sampler"):
        train_with(words + ["--resume", "--sampler", "rand"])
    with pytest.raises(ValueError, match="not a run folder"):
        train_with(flags(quintuplets, init, quintuplets, total_steps=1) + ["--resume", "auto"])
    last = tmp_path / "run" / "ckpt" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        train_with(words + ["--resume"])


def test_cheap_checks_come_before_any_score(quintuplets, init, rewards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = dict(total_steps=1, sampler="sma")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    for out, message in ((tmp_path / "taken", "exists and is not empty"),
                         ("/proc/run", "--out /proc/run cannot be written")):
        with pytest.raises(ValueError, match=message):
            train_with(flags(quintuplets, init, out, **options))
    with pytest.raises(ValueError, match="/nowhere: no such file or run"):
        train_with(flags(quintuplets, init, tmp_path / "run", **options) + ["--init", "/nowhere"])
    assert not (tmp_path / "runs").exists() and not (tmp_path / "run").exists()


def test_the_demo_is_not_built_where_a_mistyped_data_set_points(init, tmp_path):
    with pytest.raises(ValueError, match="no such data set"):
        train_with(["--demo", "--data", str(tmp_path / "typo"), "--init", str(init["compact-small"]),
                    "--out", str(tmp_path / "run")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more, message", [
    (dict(batch_size=6), "--pool-size 8 must be a multiple of --batch-size 6"),
    (dict(accumulate=3), "--accumulate 3 does not divide"),
    (dict(crop=72), "64x64 pixels, smaller than the 72 pixels"),
    (dict(reward="muzik"), "unknown.*musiq"),
    (dict(data="/nowhere"), "/nowhere: no such"),
    (dict(init="/nowhere.pth"), "/nowhere.pth"),
    (dict(init="SWINIR"), "compact"),
    (dict(val_photos=3), "hold out between 1 and 2"),
    (dict(device="cuda"), "no GPU"),
])
def test_bad_settings_end_in_one_line_before_anything_is_written(quintuplets, init, rewards, tmp_path, more, message):
    if more.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if more.get("init") == "SWINIR":
        more = dict(init=init["swinir-small"])
    with pytest.raises(runs.UserError, match=message) as error:
        train_with(flags(quintuplets, init, tmp_path / "run", total_steps=1) + as_flags(more))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_user_errors_leave_one_line_and_exit_code_2(quintuplets, init, tmp_path, script):
    words = flags(quintuplets, init, tmp_path / "run", total_steps=1)
    result = script("train.py", *words, "--data", "/nowhere", check=False)
    assert result.returncode == 2 and not result.stdout
    assert re.fullmatch(r"train\.py: error: /nowhere: no such [^\n]*\n", result.stderr)
    result = script("train.py", *words, "--batch-size", 9, "--pool-size", 9, processes=2, check=False)
    assert result.returncode and "--batch-size 9 does not divide by 2 processes" in result.stderr
    assert not (tmp_path / "run").exists()


def test_an_unwritable_output_is_refused(quintuplets, init, rewards, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((OSError, ValueError), match="cannot be written"):
        train_with(flags(quintuplets, init, tmp_path / "file" / "run", total_steps=1))


def test_training_with_an_atlas_needs_no_reward_and_is_amo_on_its_grid(quintuplets, init, tmp_path, rewards):
    """Brightness: 02 always wins. Another atlas on --resume is refused; a temperature makes the choice soft."""
    from prepare import atlas
    root = shutil.copytree(quintuplets, tmp_path / "set")
    atlas.main(atlas.parse_args([str(root), "--reward", "test_rewards:brightness", "--crop", "32", "--stride", "16",
                                 "--device", "cpu"]))
    file = root / "atlas/test_rewards_brightness-32-16.npy"
    words = flags(root, init, tmp_path / "run", sampler="amo", total_steps=4, atlas=file, reward="none", load_size=0)
    train_with(words)
    last = events(tmp_path / "run")[-1]
    assert {v for v, n in last["picked"].items() if n} == {"02"} and 45 < last["score"] < 100
    with pytest.raises(ValueError, match="tau None -> 5.0"):
        train_with([*words, "--resume", "--tau", "5"])
    train_with(flags(root, init, tmp_path / "soft", sampler="amo", total_steps=6, atlas=file, load_size=0, tau=10))
    # without the atlas the run would continue with other ground truths
    with pytest.raises(ValueError, match="chosen_by .* -> 'online'"):
        train_with([*flags(root, init, tmp_path / "soft", sampler="amo", total_steps=8, load_size=0), "--resume"])
    assert len([v for v, n in events(tmp_path / "soft")[-1]["picked"].items() if n]) > 2


@pytest.mark.fast
def test_flags_of_the_atlas(capsys):
    for words, message in (
            (["--atlas", "a.npy", "--sampler", "rand"], "--atlas is for --sampler amo"),
            (["--atlas", "a.npy", "--load-size", "512"],
             "--atlas is for --sampler amo on whole images: give --load-size 0 (it is 512)"),
            (["--demo", "--atlas", "a.npy"], "give --load-size 0 (it is 128, the default of --demo)"),
            (["--reward", "none"], "it needs a --reward")):
        with pytest.raises(SystemExit):
            train.parse_args(words)
        assert message in capsys.readouterr().err
    assert train.parse_args([]).tau == train.parse_args(["--sampler", "sma"]).tau == 10
    assert train.parse_args(["--atlas", "a.npy", "--reward", "none"]).tau is None


def test_a_shortened_demo_is_not_mistaken_for_the_start_of_a_whole_one(tmp_path, monkeypatch):
    """Its L1 stage goes on, and a run that began from it is refused."""
    monkeypatch.chdir(tmp_path)
    args, wanted = train.parse_args(["--demo"]), []
    monkeypatch.setattr(runs, "make_missing", lambda path, *words: wanted.append((str(path), words[-2:])))
    world = runs.World(0, 1, "cpu")
    train.make_demo_start(args, world)
    train.make_demo_start(train.parse_args(["--demo", "--total-steps", "2"]), world)
    assert wanted == [("runs/compact-small-psnr/weights/ema_0000400.pth", ("--resume", "auto")),
                      ("runs/compact-small-psnr/weights", ("--total-steps", 2))]
    weights = tmp_path / "runs" / "compact-small-psnr" / "weights"
    weights.mkdir(parents=True)
    (weights / "ema_0000002.pth").touch()
    began = "runs/compact-small-psnr/weights/ema_0000002.pth"
    pinned = {}
    run = argparse.Namespace(checkpoint={"args": {"began_from": began}}, pin=pinned.update)
    train.pin_start(args, run, None)
    assert pinned == {"began_from": began}
    (weights / "ema_0000400.pth").touch()
    with pytest.raises(runs.UserError, match="began from .*_0000002.pth, and now there is .*_0000400.pth: remove"):
        train.pin_start(args, run, None)
    # runs of earlier commits do not know
    train.pin_start(args, argparse.Namespace(checkpoint={"args": {}}, pin=pinned.update), None)
