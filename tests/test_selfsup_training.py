"""selfsup/: trainings, stops, probes and the experiment, against computations that are written out here."""
# ruff: noqa: F811, fixtures are imported
import importlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_selfsup import TINY, TUNE, events_of, photos, run, settings_of, trained, tune  # noqa: F401

import archs
import data
import degradations
import metrics
import runs
from experiments import jobs, self_supervision
from images import load_image, save_image
from report import tables
from selfsup import encoders, finetune, pretrain, probe
from selfsup import networks as rec


def seeds(*words):
    return runs.sample_seed(0, *words)


def enlarge(lq):
    return F.interpolate(lq, scale_factor=4, mode="bicubic").clamp(0, 1)


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


def gram_rows(features, offdiag=False):
    """Mean and maximum over each row of F F^T / (H W), as Eq. 10 has it; offdiag: without the diagonal."""
    flat = features.flatten(2)
    gram = torch.einsum("bcx,bdx->bcd", flat, flat) / flat.shape[2]
    if offdiag:
        others = ~torch.eye(gram.shape[1], dtype=torch.bool)
        gram = gram[:, others].view(len(gram), gram.shape[1], -1)
    return gram.mean(2), gram.amax(2)


def far_of(net, e_im, e_cl, offdiag=False):
    """Eq. 11 from its letters."""
    rows = zip((net.t_a, net.t_m), gram_rows(e_im, offdiag), gram_rows(e_cl, offdiag))
    return sum((t(ours) - established).square().sum(1).add(1e-8).sqrt() for t, ours, established in rows)


# Stage 2

@pytest.mark.parametrize("words, constants", [
    ([], {}), (["--s-rule", "flip"], {}), (["--s-rule", "shifted"], {}), (["--no-hf"], {}),
    (["--no-far", "--lambda-ft", "auto"], {}),
    (["--no-far-floor"], {}),
    (["--no-far-floor"], {"FAR_PATH": "im"}), (["--no-far-floor"], {"FAR_PATH": "cl"}), ([], {"PERCEP": 0.3})])
def test_a_step_of_fine_tuning_follows_the_gradient_worked_out_here(photos, trained, tmp_path, gradients, words,
                                                                    constants, monkeypatch):
    monkeypatch.setattr(finetune, "CLIP_GRAD", 0)
    for name, value in constants.items():
        monkeypatch.setattr(rec if name == "PERCEP" else finetune, name, value)
    tune(photos, trained / "method", tmp_path / "out", "--total-steps", 1, "--lambda-ft", 0.05, "--val-every", 0,
         *words)
    m, (net, settings) = archs.load_x4(photos / "sr.pth", "--sr")[0], rec.load_reconstruction(trained / "method")
    distance, encoder = metrics.create_distances("proxy")[0], encoders.create_encoder("rand")
    dataset = data.TrainingSet(data.find_photos(photos / "lq"), "orig", seeds, 2, 1, 16, 16)
    lq = torch.stack([dataset.sample(1, lane)["crops"][0] for lane in range(2)]).float() / 255
    n = torch.stack([degradations.normal_field((64,), seeds(1, lane, "n")) for lane in range(2)])
    sr = m(lq)
    d = distance(enlarge(lq), sr.detach().clamp(0, 1)).clamp(0, 1)[:, None]
    if "shifted" in words:
        patches = fixed_patches(photos)
        with torch.no_grad():
            d_start = distance(enlarge(patches), m(patches).clamp(0, 1)).clamp(0, 1).mean()
        s = n + settings["mean_d"] + d_start - d
    else:
        s = n + d if "flip" in words else n + 1 - d
    e_im, e_cl = net.e_img(sr), encoder(sr)
    added = net.r(e_im, s * net.e_deg(lq), None)
    again = F.avg_pool2d(sr, 4) + added - added.mean((2, 3), keepdim=True)
    if "--no-hf" in words:
        # without a map the distance is its plain mean
        l1, percep = (again - lq).abs().mean(), distance(again, lq).mean()
    else:
        w = rec.high_frequency_map(lq)
        l1, percep = ((again - lq).abs() * w).mean(), distance(again, lq, w).mean()
    loss = l1 + constants.get("PERCEP", 1.0) * percep
    if "--no-far" not in words:
        path = constants.get("FAR_PATH", "both")
        features = e_im.detach() if path == "cl" else e_im, e_cl.detach() if path == "im" else e_cl
        floor = 0 if "--no-far-floor" in words else settings["held_out"]["far"]
        excess = (far_of(net, *features) - floor).clamp_min(0).mean()
        loss = loss + 0.05 * excess
    assert len(gradients) == 1
    for ours, expected in zip(gradients[0], torch.autograd.grad(loss, list(m.parameters()))):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("floor, like", [(0.0, ["--no-far-floor"]), (1e9, ["--no-far", "--lambda-ft", "auto"])])
def test_far_counts_above_its_level_on_clean_photographs(photos, trained, tmp_path, gradients, floor, like):
    content = torch.load(trained / "method" / "weights" / "rec.pth", weights_only=True)
    settings = content["settings"] | {"held_out": content["settings"]["held_out"] | {"far": floor}}
    torch.save(content | {"settings": settings}, tmp_path / "rec.pth")
    for k, words in enumerate(([], like)):
        tune(photos, tmp_path / "rec.pth", tmp_path / f"{k}", "--total-steps", 1, "--lambda-ft", 0.05, *words)
    for ours, expected in zip(*gradients):
        torch.testing.assert_close(ours, expected, atol=1e-7, rtol=1e-4)
    assert ("it was fooled" in (tmp_path / "0" / "log.txt").read_text()) == (floor > 0)


def fixed_patches(photos):
    """The patches of the checks."""
    def check_seeds(step, lane, purpose):
        return seeds(step, lane, f"check {purpose}")
    fixed = data.TrainingSet(data.find_photos(photos / "lq"), "orig", check_seeds, 2, 1, 16, 16)
    return torch.stack([fixed.sample(1, lane)["crops"][0] for lane in range(16)]).float() / 255


def test_gradients_are_clipped_and_noise_is_drawn_anew(photos, trained, tmp_path, gradients, monkeypatch):
    drawn, real = [], rec.embedding_noise
    monkeypatch.setattr(rec, "embedding_noise", lambda *a: drawn.append(real(*a)) or drawn[-1])
    monkeypatch.setattr(finetune, "CLIP_GRAD", 1e-3)
    tune(photos, trained / "method", tmp_path / "out", "--total-steps", 3, "--lambda-ft", 0.05)
    for step in gradients:
        assert torch.cat([g.flatten() for g in step]).norm() == pytest.approx(1e-3, rel=1e-3)
    assert len(drawn) == 3 and 0.6 < torch.cat(drawn).std() < 1.4
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0][0], drawn[0][1])


def test_tuning_has_the_noise_of_pretraining(photos, trained, tmp_path, monkeypatch):
    drawn, real = [], rec.embedding_noise
    content = torch.load(trained / "method" / "weights" / "rec.pth", weights_only=True)
    torch.save(content | {"settings": content["settings"] | {"n_std": 0.25}}, tmp_path / "rec.pth")
    monkeypatch.setattr(rec, "embedding_noise", lambda *a: drawn.append(real(*a)) or drawn[-1])
    tune(photos, tmp_path / "rec.pth", tmp_path / "out", "--total-steps", 2, "--lambda-ft", 0.05)
    n = torch.stack([degradations.normal_field((64,), seeds(1, lane, "n")) for lane in range(2)])
    torch.testing.assert_close(drawn[0], 0.25 * n)


def test_nothing_is_random_in_an_adapted_network_and_its_rate_fits_it(photos, trained, tmp_path, monkeypatch):
    rates, drops = {}, []
    load, train = archs.load_x4, torch.nn.Module.train

    def load_with_drop_path(*words, **options):
        net, info = load(*words, **options)
        if hasattr(net, "drop_path"):
            net.drop_path = 0.5
        return net, info

    def watched_train(self, mode=True):
        drops.append(getattr(self, "drop_path", None))
        return train(self, mode)
    for arch in ("swinir-small", "compact-small"):
        runs.save_weights(tmp_path / f"{arch}.pth", archs.create(arch).state_dict())
        with monkeypatch.context() as patched:
            patched.setattr(archs, "load_x4", load_with_drop_path)
            patched.setattr(torch.nn.Module, "train", watched_train)
            run(finetune, "--rec", trained / "plain", "--sr", tmp_path / f"{arch}.pth", "--lr-dir", photos / "lq",
                "--out", tmp_path / arch, *TUNE, "--batch-size", 1, "--total-steps", 1, "--val-every", 0)
        rates[arch] = json.loads((tmp_path / arch / "args.json").read_text())["args"]["lr"]
    assert rates == {"swinir-small": 2e-6, "compact-small": 5e-6} and 0.0 in drops


def test_the_padding_of_the_adapted_network_is_kept(photos, trained, tmp_path):
    """A SwinIR that was trained with the public padding is enlarged with it after tuning too."""
    runs.save_weights(tmp_path / "run" / "weights" / "ema_0000001.pth", archs.create("swinir-small").state_dict())
    runs.save_json(tmp_path / "run" / "args.json", {"args": {"pad_mode": "swinir"}})
    run(finetune, "--rec", trained / "plain", "--sr", tmp_path / "run", "--lr-dir", photos / "lq",
        "--out", tmp_path / "out", *TUNE, "--total-steps", 1, "--val-every", 0)
    assert archs.load_x4(tmp_path / "out", "--sr")[0].pad_mode == "swinir"


def test_the_weight_of_far_balances_the_gradients():
    """L_rec pulls with 3 per pixel, FAR with 2: lambda = rho 3 / 2, whatever the batch."""
    def judge(lq, sr, noise):
        return {"rec": 3 * sr.sum((1, 2, 3)), "far": -2 * sr.sum((1, 2, 3))}

    def draw(step):
        return torch.rand(3, 3, 4, 4), 0.0
    ratio = finetune.gradient_ratio(judge, torch.nn.Identity(), draw, runs.World(0, 1, torch.device("cpu")))
    assert finetune.FAR_RHO == 0.5 and ratio == pytest.approx(0.75)


@pytest.mark.fast
def test_warnings():
    first = {"rec": 1.0, "far": 10.0, "colours": 0.0}
    assert finetune.warnings(first, {"rec": 0.9, "far": 9.0, "colours": 1.9}) == ""
    assert finetune.warnings(first, {"rec": 1.1, "far": 12.0, "colours": 0.0}) == ""
    moved = finetune.warnings(first, {"rec": 0.9, "far": 9.0, "colours": 2.1})
    assert "2.1 grey levels from the LR image's, before tuning 0.0" in moved
    assert "may be degrading" in finetune.warnings(first, {"rec": 0.9, "far": 10.6, "colours": 0.0})
    assert finetune.warnings({"rec": 1.0, "colours": 3.0}, {"rec": 0.9, "colours": 0.0}) == ""


def test_it_stops_at_the_minimum_and_keeps_the_weights_of_that_step(photos, trained, tmp_path, monkeypatch):
    # before tuning; then raw and EMA turn about, of which the raw ones do not count
    values, kept = iter([9.0, 0.1, 5.0, 0.1, 4.0, 0.1, 3.0, 0.1, 3.5, 0.1, 3.2]), []

    def fake_check(net, patches, judge, items, image_metrics, world):
        kept.append({k: v.clone() for k, v in net.state_dict().items()})
        terms = {"rec": 1.0, "l1": 1.0, "percep": 1.0, "d": 0.1, "s": 0.9, "far": next(values), "colours": 0.0}
        return terms
    monkeypatch.setattr(finetune, "check", fake_check)
    monkeypatch.setattr(finetune, "PATIENCE", 2)
    tuned = tune(photos, trained / "method", tmp_path / "out", "--total-steps", 8, "--val-every", 1, "--stop", "far",
                 "--lambda-ft", 0.01)
    # ended at step 5
    assert len(kept) == 1 + 2 * 5
    assert [p.name for p in (tmp_path / "out" / "weights").iterdir()] == ["ema_0000003.pth"]
    raw, ema = kept[1 + 2 * 2], kept[2 + 2 * 2]
    assert all(torch.equal(tuned["params"][k], raw[k]) and torch.equal(tuned["params_ema"][k], ema[k]) for k in raw)


def test_the_checks_see_what_was_held_out(photos, trained, tmp_path, monkeypatch):
    seen, real = [], finetune.check

    def watched(net, patches, judge, items, *others):
        seen.append((patches, items))
        return real(net, patches, judge, items, *others)
    monkeypatch.setattr(finetune, "check", watched)
    tune(photos, trained / "plain", tmp_path / "out", "--hold-out", 1)
    held = (tmp_path / "out" / "held_out.txt").read_text().split()
    image = load_image(photos / "lq" / f"{held[0]}.png").float() / 255
    windows = image.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    windows = torch.cat([windows, windows.flip(3)])
    for patches, items in seen:
        assert [path.stem for path, _ in items] == held
        assert all(((windows - patch).abs().amax((1, 2, 3)) < 1e-6).any() for patch in patches[:4])


@pytest.mark.parametrize("more, message", [(["--stop", "far", "--no-far"], "--stop far: FAR is off"),
                                           (["--watch", "gmsd"], "--gt-dir DIR is needed")])
def test_what_could_not_be_watched_is_refused(photos, trained, tmp_path, more, message):
    with pytest.raises(runs.UserError, match=message):
        tune(photos, trained / "method", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_a_resumed_tuning_may_watch_more_but_not_change_what_counts(photos, trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    tune(photos, trained / "method", out, "--total-steps", 2)
    watch = ["--gt-dir", photos / "gt", "--watch", "ranker"]
    tune(photos, trained / "method", out, "--total-steps", 4, "--resume", *watch)
    assert "psnr nan -> " in (out / "log.txt").read_text()
    shutil.copytree(photos / "lq", tmp_path / "lq")
    for k in range(4):
        (tmp_path / "lq" / f"p{k}.png").rename(tmp_path / "lq" / f"q{k}.png")

    def refused(name, *more):
        with pytest.raises(runs.UserError, match=f"other settings .*{name}"):
            tune(photos, trained / "method", out, "--total-steps", 6, "--resume", *more)
    refused("ema_decay", "--ema-decay", 0.5)
    refused("no_far_floor", "--no-far-floor")
    refused("images", "--lr-dir", tmp_path / "lq")
    for constant, value in (("CHECK_PATCHES", 8), ("CLIP_GRAD", 0.0), ("FAR_RHO", 1.0), ("PATIENCE", 2)):
        with monkeypatch.context() as patched:
            patched.setattr(finetune, constant, value)
            refused(constant.lower())


def test_interrupted_per_image_tuning_continues(photos, trained, tmp_path, monkeypatch):
    words = ["--per-image", "--total-steps", 2, "--save-every", 1]
    count = []
    with monkeypatch.context() as patched:
        # in the second image
        patched.setattr(runs.StopSignal, "requested", lambda self, step: count.append(step) or len(count) == 3)
        with pytest.raises(IndexError):
            tune(photos, trained / "plain", tmp_path / "out", *words)
    # tune looks for OUT/weights
    with pytest.raises(IndexError):
        tune(photos, trained / "plain", tmp_path / "out", *words, "--resume")
    assert sorted(p.name for p in (tmp_path / "out" / "sr").iterdir()) == [f"p{k}.png" for k in range(4)]


# Stage 1

def start_of(far):
    """The network of TINY before its first step."""
    torch.manual_seed(0)
    return rec.Reconstruction(**pretrain.SIZES["tiny"], far_channels=32 if far else 0)


@pytest.mark.parametrize("words, constants, lam", [
    ([], {}, "auto"), (["--lambda-pt", 0.02], {}, 0.02), (["--s-rule", "one", "--no-far"], {}, None),
    (["--n-std", 0], {}, "auto"), ([], {"PERCEP": 0.3}, "auto"), ([], {"OFFDIAG": True}, "auto")])
def test_a_step_of_pretraining_follows_the_gradient_worked_out_here(photos, tmp_path, gradients, words, constants, lam,
                                                                    monkeypatch):
    for name, value in constants.items():
        monkeypatch.setattr(rec if name == "PERCEP" else pretrain, name, value)
    words = ["--hr", photos / "gt", "--out", tmp_path / "out", *TINY, "--total-steps", 2, "--val-every", 0, *words]
    run(pretrain, *words)
    args = pretrain.parse_args(list(map(str, words)))
    net = start_of(lam is not None)
    sets, held = data.find_photos(photos / "gt").hold_out(1, seeds(0, 0, "val-photos"))
    assert not set(sets.stems) & set(held.stems)
    dataset = data.TrainingSet(sets, "orig", seeds, 4, 2, 64, 64)
    lq, hr = data.synthetic_pairs(dataset, seeds, torch.device("cpu"), "two-round", 16, 2)(1, range(4))
    distance, encoder = metrics.create_distances("proxy")[0], encoders.create_encoder("rand")
    n = args.n_std * torch.stack([degradations.normal_field((64,), seeds(1, lane, "n")) for lane in range(4)])
    d = distance(enlarge(lq), hr).clamp(0, 1)[:, None]
    # clean HR: far from the LR image means much degradation
    s = 1.0 if args.s_rule == "one" else n + d
    noise = torch.stack([degradations.normal_field((2, *lq.shape[2:]), seeds(1, lane, "noise")) for lane in range(4)])
    e_im = net.e_img(hr)
    added = net.r(e_im, s * net.e_deg(lq), noise)
    again = F.avg_pool2d(hr, 4) + added - added.mean((2, 3), keepdim=True)
    loss = (again - lq).abs().mean() + constants.get("PERCEP", 1.0) * distance(again, lq).mean()
    if lam is not None:
        far = far_of(net, e_im, encoder(hr), offdiag="OFFDIAG" in constants).mean()
        # auto: as large as L_rec over the steps so far
        loss = loss + (loss.detach() / far.detach() if lam == "auto" else lam) * far
    for ours, expected in zip(gradients[0], torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=2e-3)


def test_pretraining_has_a_cosine_and_an_ema(photos, tmp_path):
    words = ["--hr", photos / "gt", *TINY, "--lr", 1e-3, "--val-every", 0, "--log-every", 1]
    # the second step at a rate of 0
    run(pretrain, *words, "--out", tmp_path / "two", "--total-steps", 2, "--ema-decay", 0.7)
    weights = torch.load(tmp_path / "two" / "weights" / "rec.pth", weights_only=True)
    start = start_of(True).state_dict()
    for k, v in weights["params"].items():
        torch.testing.assert_close(weights["params_ema"][k], 0.49 * start[k] + 0.51 * v, atol=1e-6, rtol=1e-4)
    assert any(not torch.equal(v, start[k]) for k, v in weights["params"].items())
    run(pretrain, *words, "--out", tmp_path / "four", "--total-steps", 4)
    events = events_of(tmp_path / "four", "train")
    rates = [1e-3 * (1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3, 4)]
    assert [e["lr"] for e in events] == pytest.approx(rates)
    assert all(0 < e["s"] < 1 and e["s"] == e["d"] for e in events)


def test_pairs_are_aligned_after_flips_and_turns(photos):
    dataset = data.TrainingSet(data.find_photos(photos / "gt"), "orig", seeds, 8, 2, 64, 64)
    lq, hr = data.synthetic_pairs(dataset, seeds, torch.device("cpu"), "two-round", 16, 2)(3, range(8))
    down = F.interpolate(hr, scale_factor=0.25, mode="area")

    def error(a, b):
        return (a - b).square().mean((1, 2, 3))
    for wrong in (down.flip(3), down.flip(2), down.rot90(1, (2, 3)), down.rot90(3, (2, 3))):
        assert (error(lq, down) < error(lq, wrong)).all()


def test_held_out_checks_are_what_they_say():
    """A network that gives the true LR image back for its own embedding, and another image for another's."""
    class Knows(torch.nn.Module):
        def forward(self, lq, hr, s, e_clip=None, shuffle=False, offdiag=False):
            return (lq.roll(1, 0) if shuffle else lq), None
    hr = torch.rand(4, 3, 32, 32)
    lq = (F.interpolate(hr, scale_factor=0.25, mode="area") * 0.9).clamp(0, 1)
    distance = metrics.create_distances("proxy")[0]
    values = pretrain.check_pretraining(Knows(), [(lq, hr)], distance, distance, None, "eq8")
    bicubic = F.interpolate(hr, scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1)
    assert values["psnr"] == 100 and values["psnr_shuffled"] < 30 and values["l1"] == 0
    psnr = (-10 * (bicubic - lq).square().mean((1, 2, 3)).log10()).mean().item()
    assert values["psnr_bicubic"] == pytest.approx(psnr, abs=1e-3)
    assert values["d"] == pytest.approx(distance(enlarge(lq), hr).mean().item(), abs=1e-6)
    assert pretrain.warnings(values) == ""
    weak = values | {"psnr": values["psnr_bicubic"], "percep": math.nan, "explained": 0.4}
    assert pretrain.warnings(weak).count("WARNING") == 4
    assert "T predicts 40% of the descriptors' energy" in pretrain.warnings(weak)


# Probes

def test_figure_7_of_a_network_whose_answer_is_known(photos, trained, monkeypatch):
    def shrink(lq, y, s):
        return F.interpolate(y, scale_factor=0.25, mode="area"), None
    settings = settings_of(trained / "plain")
    monkeypatch.setattr(probe, "open_networks", lambda paths, device: {"fake": (shrink, settings)})
    line = next(iter(probe.figure7([], photos / "gt", 8, torch.device("cpu")).values()))
    names, ((lq, hr),) = probe.clean_pairs(settings, photos / "gt", 8, torch.device("cpu"))

    def psnr(i):
        y = i * enlarge(lq) + (1 - i) * hr
        return -10 * (F.interpolate(y, scale_factor=0.25, mode="area") - lq).square().mean((1, 2, 3)).log10()
    expected = [psnr(i).mean().item() for i in (0.0, 0.3, 0.5, 1.0)]
    assert [line["psnr"][k] for k in (0, 3, 5, 10)] == pytest.approx(expected, abs=1e-3)
    gain = (psnr(0.5) - psnr(0.0)).numpy()
    by_photo = [gain[names == name].mean() for name in np.unique(names)]
    value, low, high = line["psnr_change"][5]
    assert value == pytest.approx(np.mean(by_photo), abs=1e-3)
    assert low == pytest.approx(tables.interval(np.array(by_photo))[0], abs=2e-3) and low <= value <= high
    assert line["psnr_change"][0] == [0, 0, 0]


def test_figure_8_tells_degraded_images_by_a_larger_value(photos, trained, monkeypatch):
    """FAR replaced by how smooth an image is: blurred ones have more of it, noisy ones less."""
    def smoothness(lq, hr, s, e_clip, offdiag):
        return None, 1 / (hr.diff(dim=3).square().mean((1, 2, 3)) + 1e-6)
    settings = settings_of(trained / "method")
    monkeypatch.setattr(probe, "open_networks", lambda paths, device: {"fake": (smoothness, settings)})
    areas = probe.figure8([], photos / "gt", 16, torch.device("cpu"))["fake"]["auc"]
    assert areas["blur"][0] > 0.95 and areas["noise"][0] < 0.3 and areas["as in pre-training"][0] > 0.9
    # one photograph: no interval
    one = probe.area_with_interval(np.array([1.0, 2.0]), np.array([3.0, 4.0]), np.array(["a", "a"]))
    assert one == (1.0, 1.0, 1.0)


def test_networks_of_one_name_or_of_other_weights_are_refused(trained, tmp_path):
    shutil.copytree(trained / "plain", tmp_path / "plain")
    with pytest.raises(runs.UserError, match="two networks are called plain"):
        probe.open_networks([trained / "plain", tmp_path / "plain"], torch.device("cpu"))
    with pytest.raises(runs.UserError, match="FAR's encoder: other weights"):
        encoders.check_weights({"looked_through": ["a", "a", "b"]}, None, None, encoders.create_encoder("rand"))


# The experiment

@pytest.mark.slow
def test_the_queue_in_small(photos, tmp_path, monkeypatch, capsys):
    """All stages in this process: what a child process would do, with the same words."""
    scripts = []

    def call(log, script, *words, processes=1):
        log.parent.mkdir(parents=True, exist_ok=True)
        scripts.append(script)
        run(importlib.import_module(script.removesuffix(".py")), *words, "--threads", 1)
    monkeypatch.setattr(jobs, "call", call)
    monkeypatch.setattr(jobs, "parallel", lambda count, tasks: [task() for task in tasks])
    monkeypatch.setattr(self_supervision, "SIGMAS", (0.3, 2.0))
    monkeypatch.setattr(self_supervision, "AMOUNTS", (0.1, 1.0))
    (tmp_path / "vgg.pth").touch()
    for k in range(2):
        for folder, end in (("lq", "LR"), ("gt", "HR")):
            save_image(tmp_path / "realsr" / f"r{k}_{end}.png", load_image(photos / folder / f"p{k}.png"))
    short = "--workers 0 --total-steps 2 --val-every 2 --batch-size 2 --patch 16"
    tiny = f"--load-size 64 --group-size 2 --val-photos 1 --size tiny --distance proxy --far-enc rand {short}"
    scale = {"pretrain": tiny, "finetune": short, "crops": 8, "metrics": ("psnr", "ranker")}
    monkeypatch.setitem(self_supervision.SCALES, "cpu", self_supervision.SCALES["cpu"] | scale)
    monkeypatch.setitem(self_supervision.NETWORKS, "FAR-long", "--s-rule one --total-steps 3")
    work, results = tmp_path / "work", tmp_path / "results"
    words = ["--photos", photos / "gt", "--test", photos / "gt", "--realsr", tmp_path / "realsr", "--sr",
             photos / "sr.pth", "--compact", photos / "sr.pth", "--seeds", 0, 1, "--vgg-weights", tmp_path / "vgg.pth",
             "--metric-weights", "--jobs", 1, "--work", work, "--results", results]

    def queue(*more):
        self_supervision.main(self_supervision.parse_args([str(word) for word in [*words, *more]]))
        return json.loads((results / "selfsup.json").read_text())
    # the first rows alone need three networks
    first = queue("--domains", "inside", "--rows", "baseline", "controller", "both", "--seeds", 0)
    assert scripts.count("selfsup.pretrain") == scripts.count("selfsup.finetune") == 3
    assert first["sets"].keys() == {"inside"} and first["pretraining"].keys() == {"baseline-0", "controller-0",
                                                                                  "both-0"}
    assert set(first["sets"]["inside"]["differences"]) >= {"both - before", "controller - baseline",
                                                           "both - blur control"}
    result, output = queue(), capsys.readouterr().out
    assert list(result["sets"]) == ["inside", "outside", "realsr"]
    # LWay, FAR, FAR-long, and the second seeds of baseline and both
    assert scripts.count("selfsup.pretrain") == 3 + 5
    adapted = ["LWay", "baseline", "controller", "FAR", "both", "flipped", "shifted"]
    inside = result["sets"]["inside"]
    controls = ["blur control", "unsharp control", "blur and colour control"]
    more = ["baseline, long", "FAR, long", "both, perturbed", "both, fp32"]
    assert list(inside["mean"]) == ["before", *adapted, *controls, *more, "before, compact", "both, compact"]
    assert list(result["sets"]["realsr"]["mean"]) == ["before", "LWay", "baseline", "both", *controls, *more]

    def mean_psnr(name):
        row = json.loads((results / f"inside-{name}.json").read_text())["scores"]
        return np.mean([values["psnr"] for values in row.values()])
    expected = {"both - before": (mean_psnr("both-0") + mean_psnr("both-1")) / 2 - mean_psnr("before-0"),
                # one seed of LWay
                "both - LWay": mean_psnr("both-0") - mean_psnr("LWay-0"),
                "both - blur control": (mean_psnr("both-0") + mean_psnr("both-1")) / 2 - mean_psnr("blur-control-0")}
    for pair, value in expected.items():
        assert inside["differences"][pair]["psnr"]["mean"] == pytest.approx(value), pair
    assert len(inside["movement"]["both"]) == 2 and 0 < inside["movement"]["both"][0] < 1e-4
    control = json.loads((results / "inside-blur-control-0.json").read_text())
    assert control["strength"] in (0.3, 2.0) and control["goal"] == pytest.approx(mean_psnr("both-0"))
    row = json.loads((results / "inside-both-0.json").read_text())
    assert [check["step"] for check in row["checks"]] == [0, 2] and row["far_floor"] > 0
    outputs, lq = (load_image(work / part / "gt-p0.png").float().mean((1, 2)) for part in (
        "outputs/inside/before", "inside/lq"))
    colours = json.loads((results / "colours-inside.json").read_text())["colours"]
    assert colours["before"]["gt-p0"] == pytest.approx((outputs - lq).abs().mean().item(), abs=1e-3)
    assert colours["both"].keys() == colours["before"].keys() == {f"gt-p{k}" for k in range(4)}
    assert set(result["precision"]) == {"before", "both"} and 0 < result["precision"]["both"]["psnr"] < 1
    assert "| both - LWay |" in output and "area under the ROC curve of FAR" in output
    assert set(result["fig8"]) == {"FAR", "both", "FAR-long"} and len(result["fig7"]) == 2 * 3
    assert all((results / f"selfsup{name}.png").exists() for name in ("", "-fig7", "-fig8"))
    assert result["pretraining"].keys() == {"LWay-0", "controller-0", "FAR-0", "baseline-0", "baseline-1", "both-0",
                                            "both-1", "FAR-long-0"}
    # results that are there are kept
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *a, **k: pytest.fail("trained again"))
    assert queue()["sets"] == result["sets"]
