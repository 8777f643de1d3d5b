"""selfsup.py's trainings, stops, probes and experiment against computations of their own: what is learned, not only that something is."""
import argparse
import importlib
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import metrics
import archs
from experiments import jobs
import data
import degradations
from experiments import self_supervision as experiment_selfsup
from selfsup import encoders as features
from selfsup import networks as rec
import runs
from images import load_image
from selfsup import __main__ as selfsup
from selfsup import finetune as selfsup_finetune
from selfsup import pretrain as selfsup_pretrain
from selfsup import probe as selfsup_probe
from test_selfsup import TINY, photos, trained, tune                              # noqa: F401, fixtures among them

SEEDS = lambda *words: runs.sample_seed(0, *words)


@pytest.fixture
def gradients(monkeypatch):
    """What Adam was given, step by step: [[gradient of every weight]]."""
    seen = []

    class Recorder(torch.optim.Adam):
        def step(self):
            seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
            super().step()
    monkeypatch.setattr(torch.optim, "Adam", Recorder)
    return seen


def gram_rows(features_of):
    """Mean and maximum over each row of F F^T / (H W), as Eq. 10 has it."""
    flat = features_of.flatten(2)
    gram = torch.einsum("bcx,bdx->bcd", flat, flat) / flat.shape[2]
    return gram.mean(2), gram.amax(2)


def far_of(net, e_im, e_cl):
    """Eq. 11 from its letters."""
    return sum((t(ours) - theirs).square().sum(1).add(1e-8).sqrt() for t, ours, theirs in zip((net.t_a, net.t_m), gram_rows(e_im), gram_rows(e_cl)))


# Stage 2

@pytest.mark.parametrize("words", [[], ["--s-rule", "flip"], ["--s-rule", "shifted"], ["--no-hf"], ["--percep", 0.3], ["--no-far"], ["--far-path", "im"], ["--far-path", "cl"], ["--n-std", 0]])
def test_a_step_of_fine_tuning_follows_the_gradient_worked_out_here(photos, trained, tmp_path, gradients, words):
    tune(photos, trained / "method", tmp_path / "out", "--total-steps", 1, "--clip-grad", 0, "--lambda-ft", 0.05, "--val-every", 0, *words)
    given = dict(zip(words[::2], words[1::2])) if words and not str(words[0]).startswith("--no") else {}
    m, (net, settings) = archs.load_x4(photos / "sr.pth", "--sr")[0], rec.load_reconstruction(trained / "method" / "weights" / "rec.pth")
    distance, encoder = metrics.create_distances("proxy")[0], features.create_encoder("rand")
    dataset = data.TrainingSet(data.find_photos(photos / "lq"), "orig", SEEDS, 2, 1, 16, 16)
    lq = torch.stack([dataset.sample(1, lane)["crops"][0] for lane in range(2)]).float() / 255
    n = float(given.get("--n-std", 1.0)) * torch.stack([degradations.normal_field((16,), SEEDS(1, lane, "n")) for lane in range(2)])
    up = F.interpolate(lq, scale_factor=4, mode="bicubic").clamp(0, 1)
    sr = m(lq)
    d = distance(up, sr.detach().clamp(0, 1)).clamp(0, 1)[:, None]
    if given.get("--s-rule") == "shifted":
        fixed = data.TrainingSet(data.find_photos(photos / "lq"), "orig", lambda step, lane, what: SEEDS(step, lane, f"check {what}"), 2, 1, 16, 16)
        patches = torch.stack([fixed.sample(1, lane)["crops"][0] for lane in range(16)]).float() / 255
        with torch.no_grad():
            before = distance(F.interpolate(patches, scale_factor=4, mode="bicubic").clamp(0, 1), m(patches).clamp(0, 1)).clamp(0, 1).mean()
        s = n + settings["mean_d"] + before - d
    else:
        s = n + d if "--s-rule" in given else n + 1 - d
    e_im, e_cl = net.e_img(sr), encoder(sr)
    again = net.r(e_im, s * net.e_deg(lq), None)
    w = torch.ones_like(lq[:, :1]) if "--no-hf" in words else rec.high_frequency_map(lq)
    loss = ((again - lq).abs() * w).mean() + float(given.get("--percep", 1.0)) * distance(again, lq, w).mean()
    if "--no-hf" in words:                                                        # without a map the distance is its plain mean
        loss = (again - lq).abs().mean() + distance(again, lq).mean()
    if "--no-far" not in words:
        path = given.get("--far-path", "both")
        loss = loss + 0.05 * far_of(net, e_im.detach() if path == "cl" else e_im, e_cl.detach() if path == "im" else e_cl).mean()
    expected = torch.autograd.grad(loss, list(m.parameters()))
    assert len(gradients) == 1
    for ours, theirs in zip(gradients[0], expected):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)


def test_gradients_are_clipped_and_noise_is_drawn_anew(photos, trained, tmp_path, gradients, monkeypatch):
    drawn, real = [], selfsup_finetune.embedding_noise
    monkeypatch.setattr(selfsup_finetune, "embedding_noise", lambda *a: drawn.append(real(*a)) or drawn[-1])
    tune(photos, trained / "method", tmp_path / "out", "--total-steps", 3, "--clip-grad", 1e-3, "--lambda-ft", 0.05)
    assert all(torch.cat([g.flatten() for g in step]).norm() == pytest.approx(1e-3, rel=1e-3) for step in gradients)
    assert len(drawn) == 3 and not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0][0], drawn[0][1]) and 0.6 < torch.cat(drawn).std() < 1.4


def test_nothing_is_random_in_a_network_that_is_adapted_and_its_rate_is_by_kind(photos, trained, tmp_path, monkeypatch):
    rates, drops = {}, []
    for arch in ("swinir-small", "compact-small"):
        net = archs.create(arch)
        runs.save_weights(tmp_path / f"{arch}.pth", net.state_dict())
        real = archs.load_x4
        monkeypatch.setattr(archs, "load_x4", lambda *a, **k: (lambda found: (setattr(found[0], "drop_path", 0.5) if hasattr(found[0], "drop_path") else None, found)[1])(real(*a, **k)))
        monkeypatch.setattr(torch.nn.Module, "train", lambda self, mode=True, train=torch.nn.Module.train: drops.append(getattr(self, "drop_path", None)) or train(self, mode))
        words = ["finetune", "--rec", trained / "plain", "--sr", tmp_path / f"{arch}.pth", "--lr-dir", photos / "lq", "--out", tmp_path / arch, "--patch", 16, "--batch-size", 1, "--total-steps", 1,
                 "--val-every", 0, "--workers", 0, "--device", "cpu"]
        selfsup.main(selfsup.parse_args([str(word) for word in words]))
        monkeypatch.undo()
        rates[arch] = json.loads((tmp_path / arch / "args.json").read_text())["args"]["lr"]
    assert rates == {"swinir-small": 2e-6, "compact-small": 5e-6} and 0.0 in drops


def test_the_weight_of_far_balances_the_gradients():
    """L_rec pulls with 3 per pixel, FAR with 2: lambda = rho 3 / 2, whatever the batch."""
    terms = lambda self, lq, sr, noise: {"rec": 3 * sr.sum((1, 2, 3)), "far": -2 * sr.sum((1, 2, 3))}
    judge = type("Judge", (), {"args": argparse.Namespace(far_rho=0.5), "__call__": terms})()
    ratio = selfsup_finetune.gradient_ratio(judge, lambda lq: lq, lambda step: (torch.rand(3, 3, 4, 4), 0.0), runs.World(0, 1, torch.device("cpu")))
    assert ratio == pytest.approx(0.75)


@pytest.mark.fast
def test_warnings():
    first = {"rec": 1.0, "far": 10.0, "drift": 0.0}
    assert selfsup_finetune.warnings(first, {"rec": 0.9, "far": 9.0, "drift": 1.9}) == "" and selfsup_finetune.warnings(first, {"rec": 1.1, "far": 12.0, "drift": 0.0}) == ""
    assert "colours moved by 2.1" in selfsup_finetune.warnings(first, {"rec": 0.9, "far": 9.0, "drift": 2.1})
    assert "may be degrading" in selfsup_finetune.warnings(first, {"rec": 0.9, "far": 10.6, "drift": 0.0}) and selfsup_finetune.warnings({"rec": 1.0}, {"rec": 0.9, "drift": 0.0}) == ""


def test_it_stops_at_the_minimum_and_keeps_the_weights_of_that_step(photos, trained, tmp_path, monkeypatch):
    values, kept = iter([9.0, 0.1, 5.0, 0.1, 4.0, 0.1, 3.0, 0.1, 3.5, 0.1, 3.2]), []              # before; then raw and EMA turn about, the raw ones to be ignored

    def fake(net, patches, judge, items, metrics, tile, world, colours=None):
        kept.append({k: v.clone() for k, v in net.state_dict().items()})
        return {"rec": 1.0, "l1": 1.0, "percep": 1.0, "d": 0.1, "s": 0.9, "far": next(values), "drift": 0.0}, torch.zeros(16, 3)
    monkeypatch.setattr(selfsup_finetune, "check", fake)
    found = tune(photos, trained / "method", tmp_path / "out", "--total-steps", 8, "--val-every", 1, "--stop", "far", "--patience", 2, "--lambda-ft", 0.01)
    assert sorted(p.name for p in (tmp_path / "out" / "weights").iterdir()) == ["ema_0000003.pth"] and len(kept) == 1 + 2 * 5                # ended at step 5
    raw, ema = kept[1 + 2 * 2], kept[2 + 2 * 2]
    assert all(torch.equal(found["params"][k], raw[k]) for k in raw) and all(torch.equal(found["params_ema"][k], ema[k]) for k in ema)


def test_the_checks_see_what_was_held_out(photos, trained, tmp_path, monkeypatch):
    seen, real = [], selfsup_finetune.check
    monkeypatch.setattr(selfsup_finetune, "check", lambda net, patches, judge, items, *a: seen.append((patches, items)) or real(net, patches, judge, items, *a))
    tune(photos, trained / "plain", tmp_path / "out", "--hold-out", 1)
    held = (tmp_path / "out" / "held_out.txt").read_text().split()
    image = load_image(photos / "lq" / f"{held[0]}.png").float() / 255
    windows = image.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    for patches, items in seen:
        assert [path.stem for path, _ in items] == held
        assert all(any((patch - w).abs().max() < 1e-6 for w in [*windows, *windows.flip(3)]) for patch in patches[:4])


@pytest.mark.parametrize("more, message", [(["--stop", "far", "--no-far"], "--stop far: FAR is off"), (["--watch", "gmsd"], "--gt-dir DIR is needed")])
def test_what_could_not_be_watched_is_refused(photos, trained, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        tune(photos, trained / "method", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.fast
@pytest.mark.parametrize("words, message", [(["finetune", "--sr", "a", "--lr-dir", "b", "--watch", "psnr"], "--watch psnr compares"), (["finetune", "--sr", "a", "--lr-dir", "b", "--stop", "far", "--val-every", "0"], "must not be 0"),
                                            (["--demo", "pretrain"], "write pretrain --demo"), (["probe", "fig7", "--precision", "bf16"], "unrecognized")])
def test_flags_without_an_effect_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        selfsup.parse_args(words)
    assert message in capsys.readouterr().err


def test_a_resumed_tuning_may_watch_more_but_not_change_what_counts(photos, trained, tmp_path):
    tune(photos, trained / "method", tmp_path / "out", "--total-steps", 2)
    tune(photos, trained / "method", tmp_path / "out", "--total-steps", 4, "--resume", "--gt-dir", photos / "gt", "--watch", "ranker")
    assert "psnr nan -> " in (tmp_path / "out" / "log.txt").read_text()
    for more, name in ((["--check-patches", 8], "check_patches"), (["--ema-decay", 0.5], "ema_decay"), (["--clip-grad", 0], "clip_grad"), (["--lr-dir", photos / "gt"], "images|patch")):
        if name.startswith("images"):
            (tmp_path / "lq").mkdir()
            for k in range(4):
                (tmp_path / "lq" / f"q{k}.png").write_bytes((photos / "lq" / f"p{k}.png").read_bytes())
            more, name = ["--lr-dir", tmp_path / "lq"], "images"
        with pytest.raises(ValueError, match=f"other settings .*{name}"):
            tune(photos, trained / "method", tmp_path / "out", "--total-steps", 6, "--resume", *more)


def test_interrupted_per_image_tuning_continues(photos, trained, tmp_path, monkeypatch):
    words = ["--per-image", "--total-steps", 2, "--save-every", 1]
    real, count = runs.StopSignal.requested, []
    monkeypatch.setattr(runs.StopSignal, "requested", lambda self, step: count.append(step) or len(count) == 3)                      # in the second image
    with pytest.raises(IndexError):
        tune(photos, trained / "plain", tmp_path / "out", *words)
    monkeypatch.setattr(runs.StopSignal, "requested", real)
    with pytest.raises(IndexError):                                               # tune looks for OUT/weights
        tune(photos, trained / "plain", tmp_path / "out", *words, "--resume")
    assert sorted(p.name for p in (tmp_path / "out" / "sr").iterdir()) == [f"p{k}.png" for k in range(4)]


# Stage 1

def start_of(far):
    """The network of TINY before its first step."""
    torch.manual_seed(0)
    return rec.Reconstruction(width=8, blocks=[1, 1, 1], dim=16, far_channels=32 if far else 0)


@pytest.mark.parametrize("words, lam", [([], "auto"), (["--lambda-pt", "0.02"], 0.02), (["--s-rule", "one", "--no-far"], None), (["--percep", "0.3"], "auto"), (["--offdiag"], "auto"), (["--n-std", "0"], "auto")])
def test_a_step_of_pretraining_follows_the_gradient_worked_out_here(photos, tmp_path, gradients, words, lam):
    selfsup.main(selfsup.parse_args(["pretrain", "--hr", str(photos / "gt"), "--out", str(tmp_path / "out"), *TINY, "--total-steps", "2", "--val-every", "0", *words]))
    args = selfsup.parse_args(["pretrain", "--hr", "x", *TINY, *words])
    net = start_of(lam is not None)
    sets, held = data.find_photos(photos / "gt").hold_out(1, SEEDS(0, 0, "val-photos"))
    assert not set(sets.stems) & set(held.stems)
    dataset = data.TrainingSet(sets, "orig", SEEDS, 4, 2, 64, 64)
    lq, hr = selfsup_pretrain.pairs_of(dataset, args, SEEDS, torch.device("cpu"), 2)(1, range(4))
    distance, encoder = metrics.create_distances("proxy")[0], features.create_encoder("rand")
    n = args.n_std * torch.stack([degradations.normal_field((16,), SEEDS(1, lane, "n")) for lane in range(4)])
    d = distance(F.interpolate(lq, scale_factor=4, mode="bicubic").clamp(0, 1), hr).clamp(0, 1)[:, None]
    s = 1.0 if args.s_rule == "one" else n + d                                    # clean HR: far from the LR image means much degradation
    noise = torch.stack([degradations.normal_field((1, *lq.shape[2:]), SEEDS(1, lane, "noise")) for lane in range(4)])
    e_im = net.e_img(hr)
    again = net.r(e_im, s * net.e_deg(lq), noise)
    loss = (again - lq).abs().mean() + args.percep * distance(again, lq).mean()
    if lam is not None:
        far = far_of(net, e_im, encoder(hr)).mean() if not args.offdiag else sum(
            (t(a) - b).square().sum(1).add(1e-8).sqrt() for t, a, b in zip((net.t_a, net.t_m), rec.descriptors(e_im, True), rec.descriptors(encoder(hr), True))).mean()
        loss = loss + (loss.detach() / far.detach() if lam == "auto" else lam) * far        # auto: as large as L_rec over the steps so far
    order = [*net.e_deg.parameters(), *[p for name, p in net.named_parameters() if not name.startswith("e_deg.")]]
    for ours, theirs in zip(gradients[0], torch.autograd.grad(loss, order, allow_unused=True)):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=2e-3)


def test_pretraining_has_a_cosine_an_ema_and_an_encoder_that_may_wait(photos, tmp_path):
    call = lambda name, *more: selfsup.main(selfsup.parse_args(["pretrain", "--hr", str(photos / "gt"), "--out", str(tmp_path / name), *TINY, "--lr", "1e-3", "--val-every", "0", "--log-every", "1", *more]))
    call("one", "--total-steps", "2", "--ema-decay", "0.7")                        # the second at a rate of 0
    found = torch.load(tmp_path / "one" / "weights" / "rec.pth", weights_only=True)
    start = start_of(True).state_dict()
    for k, v in found["params"].items():
        torch.testing.assert_close(found["params_ema"][k], 0.49 * start[k] + 0.51 * v, atol=1e-6, rtol=1e-4)
    assert any(not torch.equal(v, start[k]) for k, v in found["params"].items())
    call("four", "--total-steps", "4", "--encoder-from", "2")
    events = [e for e in map(json.loads, (tmp_path / "four" / "metrics.jsonl").read_text().splitlines()) if e["split"] == "train"]
    assert [e["lr"] for e in events] == pytest.approx([1e-3 * (1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3, 4)]) and all(0 < e["s"] < 1 and e["s"] == e["d"] for e in events)
    call("two", "--total-steps", "2", "--encoder-from", "2")
    waited = torch.load(tmp_path / "two" / "weights" / "rec.pth", weights_only=True)["params"]
    assert all(torch.equal(v, start[k]) == k.startswith("e_deg.") for k, v in waited.items() if k.startswith("e_deg.") or k == "r.last.1.weight")


def test_pairs_are_aligned_after_flips_and_turns(photos):
    args = selfsup.parse_args(["pretrain", "--hr", "x", *TINY])
    dataset = data.TrainingSet(data.find_photos(photos / "gt"), "orig", SEEDS, 8, 2, 64, 64)
    lq, hr = selfsup_pretrain.pairs_of(dataset, args, SEEDS, torch.device("cpu"), 2)(3, range(8))
    down = F.interpolate(hr, scale_factor=0.25, mode="area")
    error = lambda a, b: (a - b).square().mean((1, 2, 3))
    for wrong in (down.flip(3), down.flip(2), down.rot90(1, (2, 3)), down.rot90(3, (2, 3))):
        assert (error(lq, down) < error(lq, wrong)).all()


def test_held_out_checks_are_what_they_say():
    """A network that gives the true LR image back for its own embedding, and something else for another's."""
    class Knows(torch.nn.Module):
        def forward(self, lq, hr, s, theirs=None, shuffle=False, offdiag=False):
            return (lq.roll(1, 0) if shuffle else lq), None
    hr = torch.rand(4, 3, 32, 32)
    lq = (F.interpolate(hr, scale_factor=0.25, mode="area") * 0.9).clamp(0, 1)
    distance = metrics.create_distances("proxy")[0]
    found = selfsup_pretrain.check_pretraining(Knows(), [(lq, hr)], distance, distance, None, argparse.Namespace(s_rule="eq8", offdiag=False))
    bicubic = F.interpolate(hr, scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1)
    assert found["psnr"] == 100 and found["psnr_shuffled"] < 30 and found["l1"] == 0
    assert found["psnr_bicubic"] == pytest.approx((-10 * (bicubic - lq).square().mean((1, 2, 3)).log10()).mean().item(), abs=1e-3)
    assert found["d"] == pytest.approx(distance(F.interpolate(lq, scale_factor=4, mode="bicubic").clamp(0, 1), hr).mean().item(), abs=1e-6)


# Probes and domain

def test_figure_7_of_a_network_whose_answer_is_known(photos, trained, tmp_path, monkeypatch):
    settings = rec.load_reconstruction(trained / "plain" / "weights" / "rec.pth")[1]
    monkeypatch.setattr(selfsup_probe, "open_networks", lambda paths, device: {"fake": (lambda lq, y, s: (F.interpolate(y, scale_factor=0.25, mode="area"), None), settings)})
    args = selfsup.parse_args(["probe", "fig7", "--rec", "x", "--hr", str(photos / "gt"), "--crops", "8"])
    found = next(iter(selfsup_probe.figure7(args, torch.device("cpu")).values()))
    whose, pairs = selfsup_probe.clean_pairs(settings, args, torch.device("cpu"))
    (lq, hr), = pairs
    up = F.interpolate(lq, scale_factor=4, mode="bicubic").clamp(0, 1)
    psnr = {i: -10 * (F.interpolate(i * up + (1 - i) * hr, scale_factor=0.25, mode="area") - lq).square().mean((1, 2, 3)).log10() for i in (0.0, 0.3, 0.5, 1.0)}
    assert [found["psnr"][k] for k in (0, 3, 5, 10)] == pytest.approx([v.mean().item() for v in psnr.values()], abs=1e-3)
    gain = (psnr[0.5] - psnr[0.0]).numpy()
    assert found["half_minus_clean"][0] == pytest.approx(np.mean([gain[whose == photo].mean() for photo in np.unique(whose)]), abs=1e-3)


def test_figure_8_tells_degraded_images_by_a_larger_value(photos, trained, monkeypatch):
    """FAR replaced by how smooth an image is: blurred ones have more of it, noisy ones less."""
    settings = rec.load_reconstruction(trained / "method" / "weights" / "rec.pth")[1]
    smooth = lambda hr: 1 / (hr.diff(dim=3).square().mean((1, 2, 3)) + 1e-6)
    net = lambda lq, hr, s, theirs, offdiag: (None, smooth(hr))
    monkeypatch.setattr(selfsup_probe, "open_networks", lambda paths, device: {"fake": (net, settings)})
    args = selfsup.parse_args(["probe", "fig8", "--rec", "x", "--hr", str(photos / "gt"), "--crops", "16"])
    areas = selfsup_probe.figure8(args, torch.device("cpu"))["fake"]["auc"]
    assert areas["blur"][0] > 0.95 and areas["noise"][0] < 0.3 and areas["as in pre-training"][0] > 0.9
    assert selfsup_probe.area_with_interval(np.array([1.0, 2.0]), np.array([3.0, 4.0]), np.array(["a", "a"])) == (1.0, 1.0, 1.0)           # one photo: no interval


def test_networks_of_one_name_or_of_other_weights_are_refused(trained, tmp_path):
    import shutil
    shutil.copytree(trained / "plain", tmp_path / "plain")
    with pytest.raises(ValueError, match="two networks are called plain"):
        selfsup_probe.open_networks([trained / "plain", tmp_path / "plain"], torch.device("cpu"))
    with pytest.raises(ValueError, match="FAR's encoder: other weights"):
        selfsup_pretrain.check_weights({"looked_through": ["a", "a", "b"]}, None, None, features.create_encoder("rand"))


def test_a_domain_is_blurred_noisy_and_compressed(photos, tmp_path):
    def made(name, *more):
        selfsup.main(selfsup.parse_args(["domain", "--hr", str(photos / "gt"), "--out", str(tmp_path / name), *more]))
        return torch.stack([load_image(p).float() for p in sorted((tmp_path / name / "lq").iterdir())])
    plain = made("plain", "--blur", "0.1", "0.1", "--noise", "0", "--jpeg", "100")
    detail = lambda x: x.diff(dim=3).square().mean().item()
    area = torch.stack([F.interpolate(load_image(photos / "gt" / f"p{k}.png")[None].float(), scale_factor=0.25, mode="area")[0] for k in range(4)])
    luma = lambda x: (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)                            # JPEG halves the chroma
    assert (luma(plain) - luma(area)).abs().mean() < 1.5
    assert detail(made("blur", "--blur", "4", "4", "--noise", "0", "--jpeg", "100")) < 0.5 * detail(plain)
    noisy = made("noise", "--blur", "0.1", "0.1", "--noise", "10", "--jpeg", "100")
    assert 6 < (luma(noisy) - luma(plain)).std() < 14 and (made("jpeg", "--blur", "0.1", "0.1", "--noise", "0", "--jpeg", "20") - plain).abs().mean() > 2


# The experiment

def test_the_queue_in_small(photos, tmp_path, monkeypatch, capsys):
    """All stages in this process: what a child process would do, with the same words."""
    def call(log, script, *words, processes=1):
        module = importlib.import_module(script.removesuffix(".py"))
        module.main(module.parse_args([*map(str, words), "--threads", "1"]))
    monkeypatch.setattr(jobs, "call", call)
    monkeypatch.setattr(jobs, "parallel", lambda count, tasks: [task() for task in tasks])
    (tmp_path / "vgg.pth").touch()
    tiny = "--patch 16 --load-size 64 --degradation two-round --batch-size 2 --group-size 2 --val-photos 1 --width 8 --blocks 1 1 1 --dim 16 --distance proxy --far-enc rand --workers 0 --total-steps 2 --val-every 2"
    words = ["--photos", photos / "gt", "--test", photos / "gt", "--real", photos / "lq", "--sr", photos / "sr.pth", "--pretrain", tiny, "--finetune", "--patch 16 --batch-size 2 --total-steps 2 --workers 0 --val-every 2",
             "--seeds", 0, 1, "--vgg-weights", tmp_path / "vgg.pth", "--metrics", "psnr", "ranker", "--metric-weights", "--jobs", 1, "--work", tmp_path / "work", "--results", tmp_path / "selfsup"]
    args = experiment_selfsup.parse_args([str(word) for word in words])
    experiment_selfsup.main(args)
    found, said = json.loads((tmp_path / "selfsup.json").read_text()), capsys.readouterr().out
    assert set(found["sets"]) == {"domain", "held"} and list(found["sets"]["domain"]["mean"]) == ["before", *experiment_selfsup.FINETUNE]
    scores = [json.loads((tmp_path / "work" / "scores" / f"domain-{name}.json").read_text())["scores"] for name in ("both-0", "both-1", "before")]
    mean = lambda result: np.mean([v["psnr"] for v in next(iter(result.values())).values()])
    assert found["sets"]["domain"]["differences"]["both - before"]["psnr"]["mean"] == pytest.approx((mean(scores[0]) + mean(scores[1])) / 2 - mean(scores[2]))
    assert "| both - LWay |" in said and "area under the ROC curve of FAR, both" in said and len(found["fig7"]) == 2 and (tmp_path / "work" / "real.html").stat().st_size > 1000
    assert found["pretraining"].keys() == {f"{name}-{seed}" for name in experiment_selfsup.PRETRAIN for seed in (0, 1)}
    before = (tmp_path / "selfsup.json").read_text()
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *a, **k: pytest.fail("trained again"))
    experiment_selfsup.main(args)                                                  # what is there is kept
    assert json.loads((tmp_path / "selfsup.json").read_text())["sets"] == json.loads(before)["sets"]
