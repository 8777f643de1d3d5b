"""degradations.py against scipy, libjpeg (through Pillow), plain numpy, and the options of HGGT and Real-ESRGAN."""
import functools
import io
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import fft, ndimage, special, stats
from skimage import data

import degradations
import runs
from degradations import (
    PRESETS,
    bicubic,
    blur,
    degrade,
    draw_group,
    draw_sample,
    fixed,
    gaussian_kernel,
    jpeg,
    sinc_kernel,
    usm_sharpen,
)

pytestmark = pytest.mark.fast

# libjpeg's own tables, as Pillow reports them in the file it writes at quality 50 (row by row)
_file = io.BytesIO()
Image.new("RGB", (16, 16)).save(_file, "jpeg", quality=50)
LUMA, CHROMA = (Image.open(_file).quantization[n] for n in (0, 1))
# side in pixels that each preset is tried on
IMAGES = {"one-round": 64, "two-round": 64, "blur": 64, "lr-grid": 64, "realesrgan": 96}


def photo(h, w, top=60, left=180):
    """A crop of astronaut, (3, h, w) float32 in [0, 1]."""
    crop = data.astronaut()[top:top + h, left:left + w]
    return torch.from_numpy(crop.transpose(2, 0, 1).copy()).float() / 255


def photos(side):
    # (6, 3, side, side)
    return torch.stack([photo(side, side, 50 * i, 40 + 60 * i) for i in range(6)])


def custom(**changes):
    """A one-round preset that changes almost nothing but the size, with the given settings."""
    preset = PRESETS["one-round"]
    settings = dict(preset["rounds"][0], blur_prob=0.0, resize_prob=(0, 0, 1), jpeg_quality=(99.99, 99.99))
    return dict(preset, rounds=[settings | changes])


# Slow references, numpy and float64, one image (3, h, w) at a time

def slow_jpeg(image, quality, table):
    _, h, w = image.shape
    mode = dict(mode="constant") if table == "hggt" else dict(mode="edge")
    red, green, blue = np.pad(np.clip(image, 0, 1) * 255.0, ((0, 0), (0, -h % 16), (0, -w % 16)), **mode)
    planes = [0.299 * red + 0.587 * green + 0.114 * blue,
              128 - 0.168736 * red - 0.331264 * green + 0.5 * blue,
              128 + 0.5 * red - 0.418688 * green - 0.081312 * blue]
    for n in (1, 2):
        planes[n] = (planes[n][::2, ::2] + planes[n][1::2, ::2] + planes[n][::2, 1::2] + planes[n][1::2, 1::2]) / 4
    for plane, steps in zip(planes, (LUMA, CHROMA, CHROMA)):
        steps = np.reshape(steps, (8, 8))
        if table == "hggt":
            steps = steps.T * (50 / quality if quality < 50 else 2 - quality / 50)
        else:
            scale = 5000 // quality if quality < 50 else 200 - 2 * quality
            steps = np.clip((steps * scale + 50) // 100, 1, 255)
        # views: each block is replaced in place
        for rows in np.split(plane, plane.shape[0] // 8):
            blocks = np.stack(np.split(rows, rows.shape[1] // 8, axis=1))
            coefficients = np.round(fft.dctn(blocks - 128, axes=(1, 2), norm="ortho") / steps) * steps
            rows[:] = np.concatenate(fft.idctn(coefficients, axes=(1, 2), norm="ortho") + 128, axis=1)
    y, cb, cr = planes[0], np.kron(planes[1], np.ones((2, 2))) - 128, np.kron(planes[2], np.ones((2, 2))) - 128
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb])
    return np.clip(rgb[:, :h, :w], 0, 255) / 255


def resize_matrix(old, new, mode, scale):
    """(new, old) weights of one axis; bilinear and bicubic sample at (i + 0.5) / scale - 0.5, no anti-aliasing."""
    weights = np.zeros((new, old))
    for i in range(new):
        if mode == "area":
            low, high = i * old // new, -(-(i + 1) * old // new)
            weights[i, low:high] = 1 / (high - low)
            continue
        x = (i + 0.5) / scale - 0.5
        if mode == "bilinear":
            x = max(x, 0)
            taps = {0: 1 - x % 1, 1: x % 1}
        else:
            # Keys' cubic with a = -0.75
            d = {k: abs(x % 1 - k) for k in (-1, 0, 1, 2)}
            taps = {k: 1.25 * t**3 - 2.25 * t**2 + 1 if t <= 1 else -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
                    for k, t in d.items()}
        for k, weight in taps.items():
            weights[i, np.clip(int(np.floor(x)) + k, 0, old - 1)] += weight
    return weights


def slow_resize(image, h, w, mode, scale=None):
    _, old_h, old_w = image.shape
    if (h, w) == (old_h, old_w):
        return image
    rows, columns = (resize_matrix(old, new, mode, scale or new / old) for old, new in ((old_h, h), (old_w, w)))
    return rows @ image @ columns.T


def slow_blur(image, kernel):
    return np.stack([ndimage.correlate(channel, kernel, mode="mirror") for channel in image])


def slow_noise(image, sample, group):
    """Gaussian noise with the drawn field. Poisson noise is compared on its own; here it has a scale of 0."""
    if group["gaussian"]:
        channels, seed = (1, group["noise_seed"]) if sample["gray"] else (3, sample["noise_seed"])
        field = torch.randn(channels, *image.shape[1:], generator=torch.Generator().manual_seed(seed)).double().numpy()
        image = image + field * sample["gaussian_sigma"] / 255
    return np.clip(image, 0, 1)


def slow_degrade(image, sample, group):
    _, h, w = image.shape
    s, g = sample["rounds"][0], group["rounds"][0]
    x = slow_blur(image, s["kernel"]) if g["blur"] else image
    x = slow_resize(x, int(h * g["scale"]), int(w * g["scale"]), g["mode"], g["scale"])
    x = slow_jpeg(slow_noise(x, s, g), s["jpeg_quality"], "hggt")
    if len(group["rounds"]) == 1:
        x = slow_resize(x, h // 4, w // 4, g["mode"])
        return np.clip(np.round(x * 255), 0, 255)
    s, g = sample["rounds"][1], group["rounds"][1]
    x = slow_blur(x, s["kernel"]) if g["blur"] else x
    x = slow_noise(slow_resize(x, int(h / 4 * g["scale"]), int(w / 4 * g["scale"]), g["mode"]), s, g)
    if group["jpeg_last"]:
        x = slow_blur(slow_resize(x, h // 4, w // 4, group["final_mode"]), sample["final_kernel"])
        x = slow_jpeg(x, s["jpeg_quality"], "hggt")
    else:
        x = slow_jpeg(x, s["jpeg_quality"], "hggt")
        x = slow_blur(slow_resize(x, h // 4, w // 4, group["final_mode"]), sample["final_kernel"])
    return np.clip(np.round(x * 255), 0, 255)


# MATLAB's bicubic, and the LR images of test sets

def slow_imresize(image, scale=0.25):
    """MATLAB's imresize of (H, W) float64, pixel by pixel, after its contributions(): bicubic, antialiased."""
    for _ in range(2):
        old = image.shape[0]
        mirror, columns = [*range(old), *range(old - 1, -1, -1)], []
        for i in range(1, int(np.ceil(old * scale)) + 1):
            u = i / scale + 0.5 * (1 - 1 / scale)
            left = np.floor(u - 4 / scale / 2)
            taps = left + np.arange(np.ceil(4 / scale) + 2)
            t = np.abs(scale * (u - taps))
            near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
            weights = near * (t <= 1) + far * ((1 < t) & (t <= 2))
            places = [mirror[int(tap - 1) % len(mirror)] for tap in taps]
            columns.append(sum(w / weights.sum() * image[k] for w, k in zip(weights, places)))
        # rows first, then columns
        image = np.stack(columns).T
    return image


@pytest.mark.parametrize("h, w", [(64, 96), (4, 8), (12, 200)])
def test_bicubic_is_matlabs_imresize(h, w):
    image = photo(h, w)
    expected = np.stack([slow_imresize(plane) for plane in image.double().numpy() * 255])
    lq = bicubic(image[None])
    assert lq.dtype == torch.float32 and lq.shape == (1, 3, h // 4, w // 4)
    # rounded half upwards; no value lies nearer to a half than float64's errors
    assert np.array_equal((lq[0] * 255).round().numpy(), np.clip(np.floor(expected + 0.5), 0, 255))


def test_bicubic_keeps_constants_equals_pytorch_inside_and_is_8_bit():
    for level in (0, 1, 127, 255):
        assert torch.equal(bicubic(torch.full((1, 3, 16, 20), level / 255)), torch.full((1, 3, 4, 5), level / 255))
    images = photos(96)
    lq = bicubic(images)
    inside = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    expected = F.interpolate(images.double(), scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1)
    assert (lq - expected)[inside].abs().max() < 0.501 / 255
    # the borders are mirrored: PyTorch drops what lies outside
    padded = F.interpolate(F.pad(images.double(), (8, 8, 8, 8), mode="replicate"), scale_factor=0.25, mode="bicubic",
                           antialias=True)[..., 2:-2, 2:-2].clamp(0, 1)
    assert (expected - lq).abs().max() > 2 / 255 and (padded - lq).abs().mean() < 1 / 255
    assert torch.equal((lq * 255).round() / 255, lq)
    assert torch.equal(lq[2:3], bicubic(images[2:3])) and torch.equal(bicubic(images.flip(3)), lq.flip(3))


def test_the_lr_image_of_a_test_image_follows_from_its_name_and_the_seed():
    gt = photo(64, 64)[None]
    seeds = [[runs.sample_seed(0, 0, k, "test kodim01")] for k in (0, 1)]
    assert torch.equal(fixed(gt, "two-round", "kodim01"), degrade(gt, "two-round", *seeds))
    assert not torch.equal(fixed(gt, "two-round", "kodim02"), fixed(gt, "two-round", "kodim01"))
    assert not torch.equal(fixed(gt, "two-round", "kodim01", seed=1), fixed(gt, "two-round", "kodim01"))
    assert torch.equal(fixed(gt, "bicubic", "kodim01"), bicubic(gt))
    with pytest.raises(runs.UserError, match="multiples of 4, got 62x64"):
        fixed(gt[:, :, :62], "bicubic", "kodim01")
    with pytest.raises(ValueError, match="unknown degradation preset 'none'"):
        fixed(gt, "none", "kodim01")


# The whole chain

@pytest.mark.parametrize("name", PRESETS)
def test_the_chain_equals_a_slow_reference(name):
    preset = dict(PRESETS[name], rounds=[dict(r, poisson_scale=(0, 0)) for r in PRESETS[name]["rounds"]])
    images, seen = photos(IMAGES[name]), set()
    for seed in range(12):
        image = images[seed % 6]
        group = draw_group(preset, seed)
        for g in group["rounds"]:
            seen |= {g["resize"], g["mode"], ("gaussian", g["gaussian"]), ("jpeg_last", group["jpeg_last"])}
        expected = slow_degrade(image.double().numpy(), draw_sample(preset, 100 + seed), group)
        levels = (degrade(image[None], preset, [100 + seed], [seed])[0] * 255).numpy()
        # float32 moves a few values across a rounding border of the JPEG or of the output
        difference = np.abs(levels - expected)
        assert difference.mean() < 0.02 and (difference > 0.5).mean() < 0.02, (seed, difference.mean())
    # they draw no resizes
    if name in ("blur", "lr-grid"):
        return
    assert {"up", "down", *degradations.MODES} <= seen
    assert {(key, flag) for key in ("gaussian", "jpeg_last") for flag in (True, False)} <= seen


@pytest.mark.parametrize("name", PRESETS)
def test_a_lane_depends_on_its_own_image_and_seeds_alone(name):
    images = photos(IMAGES[name])
    for base in range(0, 40, 10):
        seeds, groups = [base + i for i in range(6)], [base, base + 1, base, base + 2, base + 1, base]
        full = degrade(images, name, seeds, groups)
        alone = torch.cat([degrade(images[i:i + 1], name, seeds[i:i + 1], groups[i:i + 1]) for i in range(6)])
        halves = torch.cat([degrade(images[i:i + 3], name, seeds[i:i + 3], groups[i:i + 3]) for i in (0, 3)])
        backwards = degrade(images.flip(0), name, seeds[::-1], groups[::-1]).flip(0)
        assert torch.equal(full, alone) and torch.equal(full, halves) and torch.equal(full, backwards)


def test_lr_grid_leaves_noise_and_blocks_in_the_lr_image_and_blur_does_not():
    images = photos(96).repeat(4, 1, 1, 1)
    strengths, steps = {}, {}
    for name in ("lr-grid", "blur"):
        silent = dict(PRESETS[name], rounds=[dict(r, gaussian_sigma=(0, 0), poisson_scale=(0.0, 0.0))
                                             for r in PRESETS[name]["rounds"]])
        with_noise, without = (degrade(images, preset, range(24), range(24)) * 255 for preset in (name, silent))
        strengths[name] = (with_noise - without).std((1, 2, 3)).median().item()
        # steps between neighbours at the borders of 8 x 8 blocks against all others
        across = without.diff(dim=3).abs().mean((0, 1, 2))
        steps[name] = (across[7::8].mean() / across[torch.arange(len(across)) % 8 != 7].mean()).item()
    assert strengths["lr-grid"] > 4 and strengths["blur"] < 2.5, strengths
    assert steps["lr-grid"] > steps["blur"] + 0.1, steps


def test_seeds_decide_the_result():
    image = photos(64)[:1]
    first = degrade(image, "two-round", [1], [2])
    assert torch.equal(first, degrade(image, "two-round", torch.tensor([1]), np.array([2])))
    assert not torch.equal(first, degrade(image, "two-round", [3], [2]))
    assert not torch.equal(first, degrade(image, "two-round", [1], [4]))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("h, w", [(96, 96), (100, 132), (116, 84)])
def test_the_output_is_a_quarter_as_large_and_exactly_8_bit(name, h, w):
    for seed in range(4):
        lq = degrade(photo(h, w).repeat(2, 1, 1, 1), name, [seed, seed + 9], [seed, seed])
        assert lq.shape == (2, 3, h // 4, w // 4) and lq.dtype == torch.float32
        assert torch.equal(lq, (lq * 255).round().clamp(0, 255).to(torch.uint8).float() / 255)


def test_no_gradient_no_side_effects_and_no_global_random_state():
    gt = photos(64).requires_grad_()
    before = gt.detach().clone()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    lq = degrade(gt, "two-round", range(6), [0, 0, 0, 1, 1, 1])
    assert not lq.requires_grad and lq.grad_fn is None and torch.equal(gt, before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]


def test_autocast_and_memory_format_do_not_change_the_result():
    images = photos(64)
    for name in ("one-round", "two-round"):
        expected = degrade(images, name, range(6), [5] * 6)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(expected, degrade(images, name, range(6), [5] * 6))
        assert torch.equal(expected, degrade(images.to(memory_format=torch.channels_last), name, range(6), [5] * 6))


def test_the_jpeg_table_reaches_both_rounds():
    results = [degrade(photos(64), "two-round", range(6), [3] * 6, jpeg_table=table) for table in ("hggt", "libjpeg")]
    assert not torch.equal(*results) and (results[0] - results[1]).abs().mean() < 3 / 255


@pytest.mark.parametrize("gt, seeds, groups, message", [
    (torch.rand(1, 3, 66, 64), [0], [0], "multiples of 4"), (torch.rand(3, 64, 64), [0], [0], r"\(B, 3, H, W\)"),
    (torch.rand(1, 1, 64, 64), [0], [0], r"\(B, 3, H, W\)"),
    (torch.ones(1, 3, 64, 64, dtype=torch.uint8), [0], [0], "float"),
    (torch.rand(1, 3, 64, 64) * 255, [0], [0], "divide 8-bit"),
    (torch.full((1, 3, 64, 64), torch.nan), [0], [0], r"\[0, 1\]"),
    (torch.rand(2, 3, 64, 64), [0], [0, 0], "seeds"), (torch.rand(2, 3, 64, 64), [0, 1], [0], "seeds"),
    (torch.rand(1, 3, 64, 64), [-1], [0], ">= 0"), (torch.rand(1, 3, 64, 64), [0], [-1], ">= 0"),
    (torch.rand(1, 3, 16, 64), [0], [0], "too small"), (torch.rand(0, 3, 64, 64), [], [], "seeds")])
def test_bad_input_is_one_clear_error(gt, seeds, groups, message):
    with pytest.raises(ValueError, match=message):
        degrade(gt, "two-round", seeds, groups)


def test_unknown_presets_keys_and_tables_are_named():
    gt = torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match="three-round.*one-round, two-round, blur, lr-grid, realesrgan"):
        degrade(gt, "three-round", [0], [0])
    with pytest.raises(ValueError, match="jpeg_qualty"):
        degrade(gt, custom(jpeg_qualty=(30, 95)), [0], [0])
    with pytest.raises(ValueError, match="missing keys .*pad_kernels_to"):
        degrade(gt, dict(rounds=PRESETS["one-round"]["rounds"]), [0], [0])
    with pytest.raises(ValueError, match="one or two"):
        degrade(gt, dict(PRESETS["one-round"], rounds=PRESETS["one-round"]["rounds"] * 3), [0], [0])
    with pytest.raises(ValueError, match="hggt, libjpeg"):
        degrade(gt, "one-round", [0], [0], jpeg_table="mozjpeg")


# The draws against the options of HGGT and Real-ESRGAN

HGGT = dict(families=[0.7, 0.3], sinc=0.01, resize=(0.1, 0.85, 0.05), gray=0.2, blur=1)
ORIGINAL = dict(families=[0.45, 0.25, 0.12, 0.03, 0.12, 0.03], sinc=0.1, gray=0.4, blur=1,
                sizes=[7, 9, 11, 13, 15, 17, 19, 21],
                q=(30, 95))
TABLE = {
    "one-round": [
        HGGT | dict(sizes=[3, 5, 7, 9], sigma=(0.1, 1.0), range=(0.8, 1.2), gauss=(1, 12), poisson=(0.05, 0.8),
                    q=(75, 95))],
    "two-round": [
        HGGT | dict(sizes=[3, 5, 7], sigma=(0.1, 0.6), range=(0.9, 1.1), gauss=(1, 8), poisson=(0.05, 0.5), q=(85, 95)),
        HGGT | dict(sizes=[3, 5], sigma=(0.1, 0.4), range=(0.9, 1.1), gauss=(0, 4), poisson=(0, 0.3), q=(87, 95),
                    blur=0.8)],
    "realesrgan": [
        ORIGINAL | dict(sigma=(0.2, 3), resize=(0.2, 0.7, 0.1), range=(0.15, 1.5), gauss=(1, 30), poisson=(0.05, 3)),
        ORIGINAL | dict(sigma=(0.2, 1.5), resize=(0.3, 0.4, 0.3), range=(0.3, 1.2), gauss=(1, 25), poisson=(0.05, 2.5),
                        blur=0.8)],
}
FINAL = {"two-round": (0.1, [3, 5]), "realesrgan": (0.8, [7, 9, 11, 13, 15, 17, 19, 21])}
PADDED = {"one-round": 9, "two-round": 9, "blur": 21, "lr-grid": 21, "realesrgan": 21}
FAMILIES = ["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]
DRAWS = 1500


@functools.cache
def sample_draws(name):
    return [draw_sample(name, seed) for seed in range(DRAWS)]


def assert_share(flags, probability):
    flags = list(flags)
    assert stats.binomtest(sum(flags), len(flags), probability).pvalue > 1e-4, (np.mean(flags), probability)


def assert_uniform(values, low, high):
    values = np.array(list(values))
    assert values.min() >= low and values.max() <= high
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-4


def assert_classes(values, classes, probabilities=None):
    values = list(values)
    counts = [values.count(c) for c in classes]
    expected = len(values) * np.array(probabilities if probabilities else [1 / len(classes)] * len(classes))
    assert sum(counts) == len(values) and stats.chisquare(counts, expected).pvalue > 1e-4, counts


@pytest.mark.parametrize("name", TABLE)
def test_sample_draws_follow_the_table(name):
    draws = sample_draws(name)
    assert all(len(d["rounds"]) == len(TABLE[name]) for d in draws)
    for n, options in enumerate(TABLE[name]):
        rounds = [d["rounds"][n] for d in draws]
        assert_classes((r["size"] for r in rounds), options["sizes"])
        assert_share((r["sinc"] for r in rounds), options["sinc"])
        for size in options["sizes"]:
            low = np.pi / 3 if size < 13 else np.pi / 5
            assert_uniform((r["cutoff"] for r in rounds if r["size"] == size), low, np.pi)
        assert_classes((r["family"] for r in rounds), FAMILIES[:len(options["families"])], options["families"])
        anisotropic = [r for r in rounds if "aniso" in r["family"]]
        assert_uniform((r["sigma_x"] for r in rounds), *options["sigma"])
        assert_uniform((r["sigma_y"] for r in anisotropic), *options["sigma"])
        assert_uniform((r["theta"] for r in anisotropic), -np.pi, np.pi)
        assert abs(stats.spearmanr([r["sigma_x"] for r in anisotropic], [r["sigma_y"] for r in anisotropic])[0]) < 0.2
        assert all(r["sigma_y"] == r["sigma_x"] and r["theta"] == 0 for r in rounds if "aniso" not in r["family"])
        assert_uniform((r["gaussian_sigma"] for r in rounds), *options["gauss"])
        assert_uniform((r["poisson_scale"] for r in rounds), *options["poisson"])
        assert_share((r["gray"] for r in rounds), options["gray"])
        assert_uniform((r["jpeg_quality"] for r in rounds), *options["q"])
        assert len({r["noise_seed"] for d in draws for r in d["rounds"]}) == DRAWS * len(TABLE[name])
    sinc = [d for d in draws if d["final_sinc"]]
    if name in FINAL:
        assert_share((d["final_sinc"] for d in draws), FINAL[name][0])
        assert_classes((d["final_size"] for d in sinc), FINAL[name][1])
        # for large sizes too
        assert_uniform((d["final_cutoff"] for d in sinc), np.pi / 3, np.pi)
    else:
        assert not sinc


def test_the_blur_preset_blurs_and_does_little_else():
    samples = [draw["rounds"][0] for draw in sample_draws("blur")]
    groups = [draw_group("blur", seed)["rounds"][0] for seed in range(200)]
    assert_uniform((r["sigma_x"] for r in samples), 0.2, 4.0)
    assert_uniform((r["gaussian_sigma"] for r in samples), 0, 6)
    assert_classes((r["family"] for r in samples), FAMILIES[:2], [0.5, 0.5])
    assert {r["size"] for r in samples} == {21} and not any(r["sinc"] for r in samples)
    assert {(r["resize"], r["scale"], r["gaussian"], r["blur"]) for r in groups} == {("keep", 1.0, True, True)}


def test_shape_parameters_are_a_fair_coin_between_below_and_above_one():
    rounds = [r for draw in sample_draws("realesrgan") for r in draw["rounds"]]
    generalized = [r["beta"] for r in rounds if r["family"].startswith("generalized")]
    assert_share((b < 1 for b in generalized), 0.5)
    assert_uniform((b for b in generalized if b < 1), 0.5, 1)
    assert_uniform((b for b in generalized if b > 1), 1, 4)
    plateau = [r["beta"] for r in rounds if r["family"].startswith("plateau")]
    # U(1, 1) is a draw of exactly 1
    assert_share((b == 1 for b in plateau), 0.5)
    assert_uniform((b for b in plateau if b > 1), 1, 2)


@pytest.mark.parametrize("name", TABLE)
def test_group_draws_follow_the_table(name):
    draws = [draw_group(name, seed) for seed in range(2 * DRAWS)]
    for n, options in enumerate(TABLE[name]):
        rounds = [d["rounds"][n] for d in draws]
        low, high = options["range"]
        assert_classes((r["resize"] for r in rounds), ["up", "down", "keep"], options["resize"])
        assert_uniform((r["scale"] for r in rounds if r["resize"] == "up"), 1, high)
        assert_uniform((r["scale"] for r in rounds if r["resize"] == "down"), low, 1)
        assert all(r["scale"] == 1 for r in rounds if r["resize"] == "keep")
        assert_classes((r["mode"] for r in rounds), ["area", "bilinear", "bicubic"])
        assert_share((r["gaussian"] for r in rounds), 0.5)
        assert_share((r["blur"] for r in rounds), options["blur"])
    assert_share((d["jpeg_last"] for d in draws), 0.5)
    assert_classes((d["final_mode"] for d in draws), ["area", "bilinear", "bicubic"])


@pytest.mark.parametrize("name", PRESETS)
def test_drawn_kernels_are_what_their_numbers_say_padded_to_the_presets_size(name):
    for seed in range(60):
        sample = draw_sample(name, seed)
        for r in sample["rounds"]:
            kernel, k = r["kernel"], r["size"]
            margin = (PADDED[name] - k) // 2
            kind = r["family"].split("_")[0] if "_" in r["family"] else "gaussian"
            inner = gaussian_kernel(k, r["sigma_x"], r["sigma_y"], r["theta"], kind, r["beta"])
            inner = sinc_kernel(k, r["cutoff"]) if r["sinc"] else inner
            assert kernel.shape == (PADDED[name],) * 2 and kernel.sum() == pytest.approx(1)
            assert np.array_equal(kernel[margin:margin + k, margin:margin + k], inner)
        centre = sample["final_kernel"][PADDED[name] // 2, PADDED[name] // 2]
        assert sample["final_kernel"].sum() == pytest.approx(1) and (sample["final_sinc"] or centre == 1)


def test_equal_seeds_give_a_sample_and_a_group_unrelated_streams():
    streams = np.array([[degradations._rng(stream, seed).random(4) for seed in range(200)] for stream in (0, 1)])
    assert len(np.unique(streams)) == streams.size and abs(np.corrcoef(*streams[..., 0])[0, 1]) < 0.25


def test_a_probability_does_not_shift_the_other_draws():
    preset = PRESETS["two-round"]
    always = dict(preset, rounds=[dict(r, sinc_prob=1.0, gray_prob=1.0) for r in preset["rounds"]])
    for seed in range(20):
        for a, b in zip(draw_sample("two-round", seed)["rounds"], draw_sample(always, seed)["rounds"]):
            assert b["sinc"] and b["gray"]
            assert all(a[key] == b[key] for key in a if key not in ("kernel", "sinc", "gray"))


# Kernels and blur

@pytest.mark.parametrize("size, sigma_x, sigma_y, theta",
                         [(7, 1.3, 1.3, 0), (9, 0.6, 2, 0.7), (21, 3, 1, -2), (3, 0.1, 1, 2)])
def test_gaussian_families_equal_their_formulas(size, sigma_x, sigma_y, theta):
    turn = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
    covariance = turn @ np.diag([sigma_x**2, sigma_y**2]) @ turn.T
    offset = np.arange(size) - size // 2
    # (k, k, 2): x = column, y = row
    grid = np.stack(np.meshgrid(offset, offset), -1)
    pdf = stats.multivariate_normal([0, 0], covariance).pdf(grid)
    np.testing.assert_allclose(gaussian_kernel(size, sigma_x, sigma_y, theta), pdf / pdf.sum(), atol=1e-12)
    m = np.einsum("ijk,kl,ijl->ij", grid, np.linalg.inv(covariance), grid)
    for beta in (0.5, 1.0, 2.7):
        for kind, expected in (("generalized", np.exp(-0.5 * m**beta)), ("plateau", 1 / (m**beta + 1))):
            kernel = gaussian_kernel(size, sigma_x, sigma_y, theta, kind, beta)
            np.testing.assert_allclose(kernel, expected / expected.sum(), atol=1e-12)
            assert kernel.sum() == pytest.approx(1)


@pytest.mark.parametrize("size, cutoff", [(3, np.pi / 3), (13, np.pi / 5), (21, np.pi)])
def test_sinc_kernel_equals_the_bessel_formula_with_its_limit_at_the_centre(size, cutoff):
    expected = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            # the centre as a limit
            r = max(np.hypot(i - size // 2, j - size // 2), 1e-6)
            expected[i, j] = cutoff * special.jv(1, cutoff * r) / (2 * np.pi * r)
    np.testing.assert_allclose(sinc_kernel(size, cutoff), expected / expected.sum(), atol=1e-9)
    assert sinc_kernel(size, cutoff).sum() == pytest.approx(1)


def test_kernel_errors_are_clear():
    for call, message in ((lambda: gaussian_kernel(4, 1.0), "odd"), (lambda: gaussian_kernel(5, 0.0), "sigma"),
                          (lambda: gaussian_kernel(5, 1.0, form="box"), "gaussian, generalized, plateau"),
                          (lambda: sinc_kernel(6, 2.0), "odd"), (lambda: sinc_kernel(7, 0.0), "cutoff"),
                          (lambda: degradations.pad_kernel(np.ones((11, 11)), 9), "11-pixel kernel to 9"),
                          (lambda: blur(torch.rand(1, 3, 4, 9), np.ones((9, 9))), "twice"),
                          (lambda: blur(torch.rand(1, 3, 9, 9), np.ones((4, 4))), "odd")):
        with pytest.raises(ValueError, match=message):
            call()


def test_blur_is_a_correlation_per_sample_with_mirrored_borders():
    rng = np.random.default_rng(0)
    images, kernels = rng.random((3, 3, 37, 53)), rng.normal(size=(3, 9, 9))
    expected = np.stack([slow_blur(image, kernel) for image, kernel in zip(images, kernels)])
    np.testing.assert_allclose(blur(torch.from_numpy(images).float(), kernels).numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(blur(torch.from_numpy(images), torch.from_numpy(kernels)).numpy(), expected, atol=1e-12)
    # one kernel for all, not square
    expected = np.stack([slow_blur(image, kernels[0][2:3, :5]) for image in images])
    np.testing.assert_allclose(blur(torch.from_numpy(images), kernels[0][2:3, :5].copy()).numpy(), expected, atol=1e-12)


def test_usm_equals_a_plain_scipy_version():
    image = photo(90, 120).double()
    # OpenCV's sigma for 51 taps
    line = stats.norm(0, 0.3 * ((51 - 1) * 0.5 - 1) + 0.8).pdf(np.arange(-25, 26))

    def smooth(x):
        for axis in (1, 2):
            x = ndimage.correlate1d(x, line / line.sum(), axis=axis, mode="mirror")
        return x
    i = image.numpy()
    residual = i - smooth(i)
    mask = smooth((np.abs(residual) * 255 > 10).astype(float))
    expected = mask * np.clip(i + 0.5 * residual, 0, 1) + (1 - mask) * i
    assert np.abs(expected - i).max() > 0.05
    np.testing.assert_allclose(usm_sharpen(image[None])[0].numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(usm_sharpen(image[None].float())[0].numpy(), expected, atol=2e-4)
    with pytest.raises(ValueError, match="smaller than twice"):
        usm_sharpen(torch.rand(1, 3, 24, 64))


# JPEG

def pillow_jpeg(levels, quality):
    """(h, w[, 3]) uint8 through libjpeg, 4:2:0"""
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "jpeg", quality=quality, subsampling="4:2:0")
    return np.asarray(Image.open(file)).astype(float)


@pytest.mark.parametrize("quality", [30, 49, 50, 75, 95])
def test_jpeg_with_libjpegs_table_matches_pillow(quality):
    # neither side a multiple of 16
    levels = data.astronaut()[:200, 100:330]
    ours = jpeg(torch.from_numpy(levels / 255).float().permute(2, 0, 1)[None], quality, "libjpeg")[0] * 255
    # libjpeg interpolates chroma
    assert np.abs(ours.permute(1, 2, 0).numpy() - pillow_jpeg(levels, quality)).mean() < 1.5
    # no chroma: only libjpeg's integer arithmetic is left
    grey = levels.mean(2).round().astype(np.uint8)
    ours = jpeg(torch.from_numpy(grey / 255).float().expand(1, 3, *grey.shape), quality, "libjpeg")[0, 0].numpy() * 255
    difference = np.abs(ours - pillow_jpeg(grey, quality))
    # 0.25 is what rounding alone gives
    assert difference.mean() < 0.45 and (difference < 1.01).mean() > 0.9


@pytest.mark.parametrize("table", ["hggt", "libjpeg"])
def test_jpeg_equals_a_slow_reference_at_each_samples_own_quality(table):
    images, qualities = torch.stack([photo(37, 53, 40 * i) for i in range(5)]), [10, 31, 50, 77, 98]
    if table == "hggt":
        # real-valued
        qualities = [q + 0.37 for q in qualities]
    result = jpeg(images, qualities, table).numpy()
    for ours, image, quality in zip(result, images, qualities):
        difference = np.abs(ours - slow_jpeg(image.double().numpy(), quality, table)) * 255
        # a coefficient may round the other way in float32
        assert difference.mean() < 0.02 and (difference > 0.01).mean() < 0.01


def test_hggts_luma_table_is_transposed_as_measured():
    # the highest frequency of 8x8 blocks
    cosine = 40 * np.cos((2 * np.arange(64) + 1) * 7 * np.pi / 16)
    horizontal = np.broadcast_to(128 + cosine[None, :, None], (64, 64, 3))
    for pattern, hggt, libjpeg in ((horizontal, 27.0, 30.4), (horizontal.transpose(1, 0, 2), 30.5, 26.8)):
        x = torch.from_numpy(pattern / 255).float().permute(2, 0, 1)[None]
        assert jpeg(x, 50.0).mul(255).std(correction=0).item() == pytest.approx(hggt, abs=0.05)
        assert jpeg(x, 50.0, "libjpeg").mul(255).std(correction=0).item() == pytest.approx(libjpeg, abs=0.25)
        assert pillow_jpeg(pattern.round().astype(np.uint8), 50).std() == pytest.approx(libjpeg, abs=0.1)


def test_black_padding_leaks_into_odd_sizes_with_hggts_jpeg_only():
    # 44 is padded to 48
    small, large = torch.ones(1, 3, 44, 44), torch.ones(1, 3, 48, 48)
    leak = (jpeg(small, 30.0) - jpeg(large, 30.0)[..., :44, :44]).abs()
    assert leak[..., 40:, :].max() > 0.05 and leak[..., :, 40:].max() > 0.05 and leak[..., :32, :32].max() == 0
    assert torch.equal(jpeg(small, 30.0, "libjpeg"), jpeg(large, 30.0, "libjpeg")[..., :44, :44])


def test_jpeg_changes_neither_the_images_nor_the_qualities_and_takes_any_shape():
    images, quality = photo(37, 53)[None].repeat(3, 1, 1, 1), torch.tensor([30.0, 60.0, 90.0])
    before = images.clone(), quality.clone()
    result = jpeg(images, quality)
    assert torch.equal(images, before[0]) and torch.equal(quality, before[1])
    assert result.shape == images.shape and 0 <= result.min() and result.max() <= 1
    assert torch.equal(jpeg(images * 2 - 0.5, quality), jpeg((images * 2 - 0.5).clamp(0, 1), quality))
    assert torch.equal(result[1:2], jpeg(images[1:2], 60.0))
    error = (result - images).abs().mean((1, 2, 3))
    assert error[0] > error[1] > error[2]


@pytest.mark.parametrize("quality, table", [(100, "hggt"), (0.5, "hggt"), (100.5, "libjpeg"),
                                            ([50, float("nan")], "hggt"),
                                            ([50, 100], "hggt")])
def test_a_quality_outside_the_range_is_an_error(quality, table):
    with pytest.raises(ValueError, match="quality"):
        jpeg(torch.rand(2, 3, 16, 16), quality, table)
    assert jpeg(torch.rand(2, 3, 16, 16), 100, "libjpeg").isfinite().all()


# Noise

def test_gaussian_noise_has_the_drawn_standard_deviation():
    fields = torch.stack([degradations.normal_field((3, 200, 200), seed) for seed in (1, 2)])
    noisy = degradations.add_gaussian_noise(torch.full((2, 3, 200, 200), 0.5), [4.0, 12.0], fields)
    assert (noisy * 255).std((1, 2, 3)).tolist() == pytest.approx([4.0, 12.0], rel=0.01)
    torch.testing.assert_close(noisy, 0.5 + fields * torch.tensor([4.0, 12.0]).view(2, 1, 1, 1) / 255)
    assert degradations.add_gaussian_noise(torch.ones(1, 3, 9, 9), 20.0, fields[:1, :, :9, :9]).max() == 1


def test_gray_noise_is_shared_by_a_group_and_colour_noise_by_nobody():
    flat = torch.full((4, 3, 128, 128), 0.5)

    def correlations(gray_prob):
        preset = custom(gray_prob=gray_prob, gaussian_prob=1.0, gaussian_sigma=(30, 40))
        lq = degrade(flat, preset, range(4), [1, 1, 1, 2])
        return np.corrcoef(lq.reshape(12, -1).numpy()).reshape(4, 3, 4, 3)
    gray = correlations(1.0)
    assert gray[:3, :, :3].min() > 0.98 and gray[3, :, 3].min() > 0.98 and np.abs(gray[:3, :, 3]).max() < 0.15
    colour = correlations(0.0)
    for i in range(4):
        assert np.abs(colour[i][:, np.arange(4) != i]).max() < 0.15
        # not 0: chroma has half the resolution
        assert colour[i, :, i][~np.eye(3, dtype=bool)].max() < 0.75


@pytest.mark.parametrize("levels, peak", [(1, 1), (2, 2), (3, 4), (128, 128), (129, 256), (256, 256)])
def test_poisson_variance_follows_the_power_of_two_above_the_number_of_levels(levels, peak):
    # distinct, 100 among them
    values = np.sort((np.arange(levels) * 97 + 100) % 256)
    image = np.full((3, 128, 128), 100)
    # all in one channel: values are counted over the three together
    image.reshape(-1)[:levels] = values
    x = torch.from_numpy(image / 255).float()[None]
    noise = degradations.add_poisson_noise(x, 0.02, [False], [7])[0] - x[0]
    flat = noise.reshape(-1)[512:] / 0.02
    assert flat.mean().item() == pytest.approx(0, abs=5 * (100 / 255 / peak / len(flat)) ** 0.5)
    assert flat.var().item() == pytest.approx(100 / 255 / peak, rel=0.05)


def test_poisson_noise_equals_a_plain_reference_in_colour_and_gray():
    images = photos(48)
    # overshoot, as bicubic resizing leaves it
    images[2:4] = images[2:4] * 1.2 - 0.1
    gray, scales, seeds = [False, True] * 3, [0.1, 0.2, 0.5, 0.8, 2.0, 0.0], [11, 12, 13, 14, 15, 16]
    result = degradations.add_poisson_noise(images, scales, gray, seeds)
    for ours, image, is_gray, scale, seed in zip(result, images, gray, scales, seeds):
        source = (0.2989 * image[0] + 0.587 * image[1] + 0.114 * image[2])[None] if is_gray else image
        eight_bit = np.clip(np.round(source.numpy() * np.float32(255)), 0, 255)
        peak = 2 ** int(np.ceil(np.log2(len(np.unique(eight_bit)))))
        clean = torch.from_numpy(eight_bit) / 255
        noise = torch.poisson(clean * peak, generator=torch.Generator().manual_seed(seed)) / peak - clean
        assert noise.shape[0] == (1 if is_gray else 3)
        torch.testing.assert_close(ours, (image + scale * noise).clamp(0, 1))
