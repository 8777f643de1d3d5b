"""selfsup's ZSSR and KernelGAN: resampling, pairs, learning rate, ends; the collapsed generator, crops, penalties."""
import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage import data as pictures

import degradations
import metrics
import runs
from images import load_image, save_image
from selfsup import kernelgan, kernels, zssr


def noise_image(h, w, seed=0):
    return torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(seed))


def smooth_image(h, w, seed=0):
    small = noise_image(h // 8, w // 8, seed)
    return F.interpolate(small, size=(h, w), mode="bicubic", antialias=True).clamp(0, 1)


def psnr(a, b):
    return metrics.psnr(a.clamp(0, 1), b, border=4).item()


def gaussian(*sigmas, angle=0.0):
    return kernels.aligned(degradations.gaussian_kernel(17, *sigmas, angle))


# Resampling

def matlab_weights(size, scale):
    """(round(size * scale), size): imresize's bicubic, written out from its definition."""
    matrix = np.zeros((round(size * scale), size))
    shrink = min(scale, 1)
    for i, row in enumerate(matrix):
        centre = (i + 0.5) / scale - 0.5
        around = np.arange(int(np.floor(centre - 2 / shrink)), int(np.ceil(centre + 2 / shrink)) + 1)
        d = np.abs(around - centre) * shrink
        weights = np.where(d <= 1, 1.5 * d ** 3 - 2.5 * d ** 2 + 1,
                           np.where(d <= 2, -0.5 * d ** 3 + 2.5 * d ** 2 - 4 * d + 2, 0))
        mirror = np.where(around < 0, -1 - around, np.where(around >= size, 2 * size - 1 - around, around))
        np.add.at(row, mirror, weights / weights.sum())
    return matrix


@pytest.mark.fast
@pytest.mark.parametrize("scale, size", [(2, (12, 17)), (0.5, (24, 18)), (0.25, (32, 24)), (4, (9, 12))])
def test_bicubic_is_matlabs_up_to_the_border(scale, size):
    image = noise_image(*size).double()
    rows, columns = (torch.from_numpy(matlab_weights(side, scale)) for side in size)
    torch.testing.assert_close(kernels.bicubic(image, scale), rows @ image @ columns.T, atol=1e-6, rtol=0)


@pytest.mark.fast
def test_a_quarter_equals_the_bicubic_of_degradations():
    image = (noise_image(32, 48) * 255).round() / 255
    torch.testing.assert_close(degradations.to_8bit(kernels.bicubic(image, 0.25)), degradations.bicubic(image),
                               atol=1.01 / 255, rtol=0)


@pytest.mark.fast
def test_sides_that_do_not_divide_are_refused():
    for kernel in (None, torch.ones(3, 3) / 9):
        with pytest.raises(runs.UserError, match="17x12 pixels do not divide by 2"):
            kernels.downscale(noise_image(12, 17), kernel)


def displacement(kernel, scale=2):
    """By how many pixels a bright spot is off after shrinking with a kernel and bicubic enlarging: its centre of
    mass."""
    spot = torch.zeros(1, 1, 64, 64)
    spot[..., 30:34, 26:30] = 1
    again = kernels.bicubic(kernels.downscale(spot, torch.from_numpy(kernel).float(), scale), scale)[0, 0].numpy()
    return np.subtract(ndimage.center_of_mass(again), (31.5, 27.5))


@pytest.mark.fast
def test_aligned_kernels_leave_images_where_they_are():
    raw = degradations.gaussian_kernel(13, 2.0, 1.2, 0.5)
    assert np.abs(displacement(raw)).max() == pytest.approx(0.5, abs=0.02)
    for kernel, scale in ((kernels.aligned(raw), 2), (kernels.twice(kernels.aligned(raw)), 4)):
        assert np.abs(displacement(kernel, scale)).max() < 0.02
        centre = ndimage.center_of_mass(kernel)
        assert centre == pytest.approx([len(kernel) // 2 + (scale - 1) / 2] * 2, abs=0.02)
    assert len(kernels.aligned(raw)) == 17 and len(kernels.twice(kernels.aligned(raw))) == 33


@pytest.mark.fast
def test_two_steps_are_one_with_the_kernel_of_both():
    kernel, image = gaussian(1.4, 0.9), noise_image(96, 96).double()
    k = torch.from_numpy(kernel)
    two = kernels.downscale(kernels.downscale(image, k), k)
    one = kernels.downscale(image, torch.from_numpy(kernels.twice(kernel)), 4)
    assert (two - one)[..., 6:-6, 6:-6].abs().max() < 1e-6
    assert (two - kernels.downscale(image, torch.from_numpy(np.pad(kernel, 8)), 4))[..., 6:-6, 6:-6].abs().max() > 0.01


@pytest.mark.fast
@pytest.mark.parametrize("sigmas", [None, (1.5, 0.8)])
def test_back_projection_comes_nearer_round_by_round(sigmas):
    gt = torch.from_numpy(pictures.astronaut()[:128, 128:256].copy()).permute(2, 0, 1)[None].float() / 255
    kernel = sigmas and torch.from_numpy(gaussian(*sigmas)).float()
    lq = kernels.downscale(gt, kernel)
    sr = kernels.bicubic(lq, 2).clamp(0, 1)
    errors, start = [], psnr(sr, gt)
    for _ in range(5):
        errors.append((kernels.downscale(sr, kernel) - lq).square().mean().item())
        sr = kernels.back_project(sr, lq, kernel, 1)
    assert all(b < a for a, b in zip(errors, errors[1:])) and psnr(sr, gt) > start + 0.5


# ZSSR

@pytest.mark.fast
def test_zssr_has_the_sizes_and_variances_of_the_original():
    torch.manual_seed(0)
    net = zssr.Network()
    assert sum(p.numel() for p in net.parameters()) == 9 * 64 * (3 + 6 * 64 + 3)
    for layer in net.layers[1:-1]:
        assert layer.weight.var().item() == pytest.approx(0.1 / (9 * 64), rel=0.05)
    assert net(noise_image(9, 7)).shape == (1, 3, 18, 14)


def follow(records):
    """Steps at which the learning rate falls while the error runs through `records`."""
    rate, values, falls = zssr.LearningRate(), iter(records), []
    for step in range(1, 3001):
        before, more = rate.rate, rate.after(step, lambda: next(values))
        falls += [step] if rate.rate < before else []
        if not more:
            break
    return falls


@pytest.mark.fast
def test_the_rate_falls_where_the_error_does_not():
    assert follow(1.0 + np.arange(60)) == [300, 600, 900]
    assert follow(100.0 - np.arange(60)) == []
    # falls for 1000 steps, then is as likely to rise
    late = np.concatenate([100.0 - np.arange(20), 80 + np.tile([0.0, 1.0], 20)])
    assert follow(late) == [1200, 1500, 1800]
    # five records of a slope that is not clear: 0.30, 1.5 times of which is above its deviation, 0.33; and one of 0.19,
    # 1.5 times of which is below it, 0.34
    for records, first in (([3, 1, 3, 1, 1.5], False), ([3, 1, 3, 1.1, 2.0], True)):
        slope, covariance = np.polyfit(np.arange(5), records, 1, cov=True)
        deviation = covariance[0, 0] ** 0.5
        assert -slope[0] < deviation and (-1.5 * slope[0] < deviation) == first
        assert (follow([3, *records] + [0.0] * 60)[:1] == [300]) == first


@pytest.mark.fast
def test_eight_turned_outputs_agree_and_are_turned_back():
    lq, net = smooth_image(24, 32), zssr.Network(4)
    for layer in net.layers:
        torch.nn.init.zeros_(layer.weight)
    up = kernels.bicubic(lq, 2).clamp(0, 1)
    config = zssr.IDEAL | {"rounds": 0}
    torch.testing.assert_close(zssr.enlarge(net, lq, None, config), up, atol=1e-5, rtol=0)
    torch.testing.assert_close(zssr.enlarge(net, lq, None, config | {"ensemble": False}), up, atol=0, rtol=0)
    # of eight outputs that differ, the median: a network that adds its call's number
    calls = []

    class Counting(torch.nn.Module):
        def forward(self, x):
            calls.append(1)
            return torch.full((1, 3, 2 * x.shape[2], 2 * x.shape[3]), 0.1 * len(calls))
    out = zssr.enlarge(Counting(), lq, None, config)
    assert len(calls) == 8 and out.mean().item() == pytest.approx(0.45, abs=1e-6)


@pytest.mark.fast
def test_sons_are_small_fathers_with_noise():
    image, rng = smooth_image(64, 80), np.random.default_rng(0)
    weight = torch.ones(1, 1, 64, 80)
    kernel = torch.from_numpy(gaussian(1.5, 1.0)).float()
    config, differences = zssr.CONFIGS["real"], []
    for _ in range(50):
        son, father, weights = zssr.draw_pair(0.2 + 0.6 * image, weight, kernel, 48, config, rng)
        assert son.shape == (1, 3, 24, 24) and father.shape == (1, 3, 48, 48) and weights.shape == (1, 1, 48, 48)
        differences.append(son - kernels.downscale(father, kernel))
    assert torch.cat(differences).std().item() == pytest.approx(0.0125, rel=0.03)
    son, father, _ = zssr.draw_pair(image, weight, None, 48, zssr.IDEAL, rng)
    torch.testing.assert_close(son, kernels.bicubic(father, 0.5).clamp(0, 1))


@pytest.mark.fast
def test_fathers_are_what_the_modes_say():
    image, rng = torch.stack(torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")) / 100, None
    image = torch.cat([image, torch.zeros(1, 40, 60)])[None]
    rng, plain = np.random.default_rng(0), zssr.CONFIGS["kernelgan"]
    for _ in range(20):
        father, weight = zssr.draw_father(image, image[:, :1], 16, plain, rng)
        y, x = (round(100 * father[0, c, 0, 0].item()) for c in (0, 1))
        assert torch.equal(father, image[..., y:y + 16, x:x + 16]) and torch.equal(weight, father[:, :1])
    turned = {tuple(np.sign((zssr.draw_father(image, image[:, :1], 16, zssr.IDEAL | {"as_is": 0.0, "dihedral": 1.0},
                                              rng)[0][0, :2, ::15, ::15] * 100).diff(dim=1)[:, 0, 0].round().numpy()))
              for _ in range(40)}
    # the first axis may point up, down, or be exchanged with the second
    assert {(1, 0), (-1, 0), (0, 1), (0, -1)} <= turned
    # affine: steps of one pixel become 1 / scale
    config = zssr.IDEAL | {"as_is": 0.0, "dihedral": 0.0, "turn": False, "spread": 0.0, "shear": 0.0}
    steps = [100 * zssr.draw_father(image, image[:, :1], 16, config, rng)[0][0, 0, 6:8, 8].diff().item()
             for _ in range(200)]
    assert 0.95 < min(steps) < 1.1 and 1.85 < max(steps) < 2.05


@pytest.mark.fast
def test_edge_weights():
    image = torch.zeros(1, 3, 40, 40)
    image[..., 20:] = 1
    weights = zssr.edge_weights(image)[0, 0]
    assert weights.mean() == pytest.approx(1, abs=1e-5) and (weights[:3] == 0).all() and (weights[:, :10] == 0).all()
    assert weights[20, 20] > 5 and (zssr.edge_weights(torch.zeros(1, 3, 20, 20)) == 1).all()


def recurring(side=192, seed=0):
    """Ellipses, rings and stripes of one kind at four sizes: what ZSSR lives on."""
    rng, image = np.random.default_rng(seed), np.full((side, side), 0.5)
    y, x = np.mgrid[:side, :side]
    for radius, count in ((40, 3), (20, 10), (10, 40), (5, 120)):
        for _ in range(count):
            cy, cx = rng.integers(0, side, 2)
            distance = np.hypot(y - cy, x - cx) / radius
            ring = (np.floor(distance * 4) % 2) * 0.7 + 0.15
            image = np.where(distance < 1, ring, image)
    image = ndimage.gaussian_filter(image, 0.5)
    return torch.from_numpy(image).float()[None, None].repeat(1, 3, 1, 1)


@pytest.mark.slow
def test_zssr_gains_where_structures_recur_and_nowhere_else():
    gt = recurring()
    shuffled = gt.flatten(2)[..., torch.randperm(gt[0, 0].numel(), generator=torch.Generator().manual_seed(0))]
    gains = []
    for image in (gt, shuffled.view_as(gt)):
        lq = degradations.to_8bit(kernels.bicubic(image, 0.5))
        projected = kernels.back_project(kernels.bicubic(lq, 2).clamp(0, 1), lq, None, 10)
        net, _ = zssr.train(lq, None, zssr.IDEAL, 0, width=16, crop=48, total_steps=600, lr=2e-3)
        gains.append(psnr(zssr.enlarge(net, lq, None, zssr.IDEAL), image) - psnr(projected, image))
    assert gains[0] > 0.7 and abs(gains[1]) < 0.2, gains


def test_the_true_kernel_is_worth_much():
    gt, kernel = recurring(seed=1), torch.from_numpy(gaussian(2.0, 1.4)).float()
    lq = degradations.to_8bit(kernels.downscale(gt, kernel))
    values = []
    for k, config in ((None, "ideal"), (kernel, "kernelgan")):
        net, _ = zssr.train(lq, k, zssr.CONFIGS[config], 0, width=16, crop=48, total_steps=300, lr=2e-3)
        values.append(psnr(zssr.enlarge(net, lq, k, zssr.CONFIGS[config]), gt))
    assert values[1] > values[0] + 2, values


def call(module, *words):
    module.main(module.parse_args([str(word) for word in words]))


def test_zssr_leaves_what_evaluate_reads_and_continues(tmp_path, monkeypatch):
    for k in range(2):
        save_image(tmp_path / "lq" / f"a{k}.png", smooth_image(40, 33, k)[0])
    words = ["--lr-dir", tmp_path / "lq", "--out", tmp_path / "out", "--width", 4, "--total-steps", 3, "--crop", 32]
    call(zssr, *words)
    first = {path.stem: load_image(path) for path in (tmp_path / "out").glob("*.png")}
    assert {stem: tuple(image.shape) for stem, image in first.items()} == {f"a{k}": (3, 160, 132) for k in range(2)}
    # the missing image is made again, the other kept, and does not matter to it
    (tmp_path / "out" / "a1.png").unlink()
    save_image(tmp_path / "out" / "a0.png", torch.zeros(3, 4, 4))
    call(zssr, *words)
    assert torch.equal(load_image(tmp_path / "out" / "a1.png"), first["a1"])
    assert load_image(tmp_path / "out" / "a0.png").shape == (3, 4, 4)
    with pytest.raises(runs.UserError, match="made with other settings .*crop"):
        call(zssr, *words[:-1], 16)
    np.save(tmp_path / "a0.npy", np.ones((4, 4)))
    with pytest.raises(runs.UserError, match="expected a square of odd side"):
        call(zssr, *words[:3], tmp_path / "other", "--kernels", tmp_path)
    with pytest.raises(SystemExit):
        zssr.parse_args([str(w) for w in [*words, "--config", "real"]])


# KernelGAN

def full_network(generator, image):
    """The six layers one after the other, the last with stride 2, on each channel."""
    x = image.transpose(0, 1)
    for layer in generator.layers[:-1]:
        x = F.conv2d(x, layer)
    return F.conv2d(x, generator.layers[-1], stride=2).transpose(0, 1)


@pytest.mark.fast
def test_the_kernel_does_what_the_six_layers_do():
    torch.manual_seed(0)
    collapsed = kernelgan.Generator().double()
    whole, image = copy.deepcopy(collapsed), noise_image(64, 64).double()
    one, other = collapsed(image), full_network(whole, image)
    assert one.shape == (1, 3, 26, 26)
    torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)
    for out in (one, other):
        out.square().sum().backward()
    for a, b in zip(collapsed.layers, whole.layers):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=1e-10)


@pytest.mark.fast
def test_the_bicubic_term_compares_places_that_belong_together():
    """A kernel that shrinks as bicubic interpolation does has no error, one that is shifted has."""
    d = np.abs(np.arange(13) - 6.5) / 2
    line = np.where(d <= 1, 1.5 * d ** 3 - 2.5 * d ** 2 + 1,
                    np.where(d <= 2, -0.5 * d ** 3 + 2.5 * d ** 2 - 4 * d + 2, 0)) / 2
    kernel, image = torch.from_numpy(np.outer(line, line)), 2 * noise_image(64, 64).double() - 1
    penalties = kernelgan.Penalties()
    errors = [penalties.terms(k, image, kernelgan.shrink(image, k))["bicubic"].item()
              for k in (kernel, kernel.roll(1, 0), torch.zeros_like(kernel))]
    assert errors[0] < 1e-10 and errors[1] > 0.01 and errors[2] > kernelgan.MET


@pytest.mark.fast
def test_penalties_of_hand_made_kernels():
    image = torch.zeros(1, 3, 64, 64)

    def terms(*taps):
        kernel = torch.zeros(13, 13, requires_grad=True)
        with torch.no_grad():
            for y, x, value in taps:
                kernel[y, x] = value
        penalties = kernelgan.Penalties()
        penalties.centre, penalties.sparse = 1.0, 5.0
        values = penalties.terms(kernel, image, kernelgan.shrink(image, kernel))
        sum(values.values()).backward()
        assert kernel.grad.isfinite().all()
        return {name: value.item() for name, value in values.items()}
    middle = terms((6, 6, 0.25), (6, 7, 0.25), (7, 6, 0.25), (7, 7, 0.25))
    assert middle["sum"] == middle["boundary"] == 0 and middle["centre"] == pytest.approx(0)
    off = terms((6, 6, 1.0))
    assert off["centre"] == pytest.approx(0.25) and off["boundary"] == 0
    corner = 30 * (1 - np.exp(-(6 / 13) ** 2)) / 169
    border = terms((0, 0, 2.0))
    assert border["sum"] == 1 and border["boundary"] == pytest.approx(2 * corner, rel=1e-4)
    assert border["centre"] == pytest.approx(6.5 ** 2)
    assert terms((1, 6, 1.0))["boundary"] > 0 and terms((2, 6, 1.0))["boundary"] == 0
    # 169 taps, of which all but one are (almost) nothing
    assert off["sparse"] == pytest.approx((1 + 168 * 1e-12 ** 0.2) / 169, rel=1e-3)
    assert "centre" not in kernelgan.Penalties().terms(torch.zeros(13, 13), image, torch.zeros(1, 3, 26, 26))


@pytest.mark.fast
def test_bicubic_is_let_go_once_it_was_met():
    penalties = kernelgan.Penalties()
    weights = []
    for step in range(1, 1001):
        penalties.go_on(1.0 if step < 150 or step == 153 else 0.01)
        if step % 200 == 0:
            weights.append((penalties.bicubic, penalties.centre, penalties.sparse))
    assert weights == [(pytest.approx(0.05), 0, 0), (pytest.approx(5e-4), 1, 5), *[(pytest.approx(5e-6), 1, 5)] * 3]
    never = kernelgan.Penalties()
    for step in range(1000):
        never.go_on(0.01 if step % 3 else 1.0)
    assert (never.bicubic, never.centre) == (5.0, 0.0)


@pytest.mark.fast
@pytest.mark.parametrize("crop, halved", [(64, True), (26, False)])
def test_crops_are_drawn_where_there_is_texture(crop, halved):
    image = torch.full((3, 200, 240), 0.5)
    image[:, :100, :120] = noise_image(100, 120)[0]
    likely = kernelgan.crop_probabilities(image, crop, halved)
    half = crop // 2
    assert likely.sum() == pytest.approx(1) and (likely >= 0).all()
    assert likely[:half].sum() == likely[-half:].sum() == likely[:, :half].sum() == likely[:, -half:].sum() == 0
    # a crop of 64 about the border of the texture still sees some of it
    assert likely[:100 + half // 2, :120 + half // 2].sum() > 0.85
    corners = kernelgan.draw_crops(likely, crop, 200, np.random.default_rng(0))
    assert (corners % 2 == 0).all() and (corners >= 0).all() and (corners + crop <= [200, 240]).all()
    flat = kernelgan.crop_probabilities(torch.full((3, 100, 100), 0.3), crop, halved)
    assert len(np.unique(flat)) == 2 and flat.sum() == pytest.approx(1)


@pytest.mark.fast
def test_what_the_generator_learned_becomes_a_kernel():
    raw = degradations.gaussian_kernel(13, 1.6, 1.0, 0.4) * 0.9
    raw[0, 0] = -0.01
    kernel = kernelgan.finish(raw)
    assert kernel.shape == (17, 17) and kernel.sum() == pytest.approx(1)
    assert ndimage.center_of_mass(kernel) == pytest.approx([8.5, 8.5], abs=0.02)
    kept = np.clip(raw - 0.75 * np.sort(raw.ravel())[-41], 0, None) > 0
    assert 41 <= kept.sum() < 60


@pytest.mark.slow
def test_a_blur_is_found_better_than_bicubic_would_guess():
    gt = torch.from_numpy(pictures.astronaut().copy()).permute(2, 0, 1)[None].float() / 255
    true = gaussian(2.0, 1.0)
    lq = degradations.to_8bit(kernels.downscale(gt, torch.from_numpy(true).float()))
    kernel = kernelgan.finish(kernelgan.estimate(lq, 0, 1000))

    def cosine(a, b):
        side = max(len(a), len(b))
        a, b = (np.pad(k, (side - len(k)) // 2).ravel() for k in (a, b))
        return a @ b / np.sqrt((a @ a) * (b @ b))
    d = np.abs(np.arange(17) - 8.5) / 2
    line = np.where(d <= 1, 1.5 * d ** 3 - 2.5 * d ** 2 + 1,
                    np.where(d <= 2, -0.5 * d ** 3 + 2.5 * d ** 2 - 4 * d + 2, 0)) / 2
    assert cosine(kernel, true) > max(0.9, cosine(np.outer(line, line), true))


def test_kernelgan_leaves_kernels_that_zssr_reads(tmp_path):
    save_image(tmp_path / "lq" / "a.png", smooth_image(90, 88)[0])
    words = ["--lr-dir", tmp_path / "lq", "--out", tmp_path / "k", "--total-steps", 4]
    before = (tmp_path / "lq" / "a.png").read_bytes()
    call(kernelgan, *words)
    kernel = np.load(tmp_path / "k" / "a.npy")
    assert kernel.sum() == pytest.approx(1) and load_image(tmp_path / "k" / "a.png").shape[1] == 16 * len(kernel)
    assert np.load(tmp_path / "k" / "a_x4.npy").shape == (2 * len(kernel) - 1,) * 2
    assert (tmp_path / "lq" / "a.png").read_bytes() == before
    assert json.loads((tmp_path / "k" / "kernelgan.json").read_text())["args"]["total_steps"] == 4
    call(zssr, *words[:2], "--out", tmp_path / "sr", "--kernels", tmp_path / "k", "--total-steps", 2, "--width", 4)
    assert load_image(tmp_path / "sr" / "a.png").shape == (3, 360, 352)
    save_image(tmp_path / "lq" / "b.png", smooth_image(80, 88)[0])
    with pytest.raises(runs.UserError, match="b.png: 88x80 pixels, KernelGAN needs sides of at least 84"):
        call(kernelgan, *words)


def test_a_training_that_diverges_is_named(tmp_path, monkeypatch):
    save_image(tmp_path / "in" / "a.png", smooth_image(90, 88)[0])
    monkeypatch.setattr(kernelgan, "estimate", lambda *_: np.full((13, 13), np.nan))
    args = kernelgan.parse_args(["--lr-dir", str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    with pytest.raises(runs.UserError, match="a.png: the training diverged"):
        kernelgan.main(args)


def test_the_image_is_not_changed_by_training(monkeypatch):
    """Noise that keeps D from seeing the rounding must not stay in the image from which crops are taken."""
    image, seen = smooth_image(96, 96), []
    monkeypatch.setattr(kernelgan, "draw_crops", lambda likely, crop, count, rng: np.zeros((count, 2), int))
    terms = kernelgan.Penalties.terms
    monkeypatch.setattr(kernelgan.Penalties, "terms",
                        lambda self, kernel, images, shrunk: (seen.append(images.clone()),
                                                              terms(self, kernel, images, shrunk))[1])
    kernelgan.estimate(image, 3, 3)
    assert len(seen) == 3 and all(torch.equal(crop, 2 * image[..., :64, :64] - 1) for crop in seen)
    monkeypatch.undo()
    before = image.clone()
    a, b = (kernelgan.estimate(image, 3, 5) for _ in range(2))
    assert torch.equal(image, before) and np.array_equal(a, b)
    assert not np.array_equal(a, kernelgan.estimate(image, 4, 5))
