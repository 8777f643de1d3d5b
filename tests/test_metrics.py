"""metrics.py: full-reference metrics against scikit-image, pyiqa and the lpips package, border, luma, errors."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import metrics
import runs
from images import load_image
from losses import VGGFeatureLoss

CPU = torch.device("cpu")


def pair(*size, seed=0):
    a, b = torch.rand(2, 2, 3, *size, generator=torch.Generator().manual_seed(seed))
    return a, (a + 0.2 * b) / 1.2


@pytest.mark.fast
def test_psnr_is_scikit_images_after_hggts_crop():
    from skimage.metrics import peak_signal_noise_ratio
    a, b = torch.rand(2, 3, 40, 36), torch.rand(2, 3, 40, 36)
    inside = (slice(None), slice(4, -4), slice(4, -4))
    for value, x, y in zip(metrics.psnr(a, b).tolist(), a.double().numpy(), b.double().numpy()):
        assert value == pytest.approx(peak_signal_noise_ratio(y[inside], x[inside], data_range=1), rel=1e-9)


@pytest.mark.fast
def test_ssim_is_the_colour_ssim_of_pyiqa_after_hggts_crop():
    from pyiqa import create_metric
    a, b = torch.rand(2, 3, 48, 40), torch.rand(2, 3, 48, 40)
    b = (a + 0.2 * b) / 1.2
    published = create_metric("ssimc", device=CPU)(a[..., 4:-4, 4:-4], b[..., 4:-4, 4:-4])
    assert metrics.ssim(a, b).tolist() == pytest.approx(published.tolist(), abs=1e-4)
    assert metrics.ssim(a, a).tolist() == [1, 1]
    with pytest.raises(runs.UserError, match="SSIM of an output"):
        metrics.ssim(torch.rand(1, 3, 18, 18), torch.rand(1, 3, 18, 18))


@pytest.mark.fast
def test_flat_hf_sees_a_grid_in_flat_places_and_only_there():
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    # flat on the left, busy on the right
    ramp = (0.3 + 0.2 * x / 128 + 0.1 * y / 128).expand(1, 3, -1, -1)
    gt = ramp + (x >= 64) * 0.2 * torch.sin(2 * torch.pi * x / 32)
    # as an x4 pixel shuffle leaves it
    grid = 0.02 * torch.cos(2 * torch.pi * x / 4) * torch.cos(2 * torch.pi * y / 4)
    clean, gridded = metrics.flat_hf(gt, gt).item(), metrics.flat_hf(gt + grid, gt).item()
    assert clean < 0.01 and gridded > 0.5
    assert metrics.flat_hf(gt + (x >= 96) * grid, gt).item() == pytest.approx(clean, abs=1e-6)
    # one cycle per block: not high
    smooth = gt + 0.05 * torch.cos(2 * torch.pi * x / 16)
    assert metrics.flat_hf(smooth, gt).item() < 0.02
    with pytest.raises(runs.UserError, match="more than 64 pixels"):
        metrics.flat_hf(gt[..., :64], gt[..., :64])


@pytest.mark.fast
def test_flat_hf_by_hand():
    sr, gt = torch.rand(1, 3, 96, 80), torch.rand(1, 3, 96, 80)
    # 4 x 3 blocks, of which the 3 flattest count
    gt[..., 32:48, 48:64] = 0.5

    def blocks(image):
        weights = torch.tensor([.299, .587, .114], dtype=torch.float64).view(3, 1, 1)
        grey = (255 * image[0].double() * weights).sum(0).numpy()
        return [grey[r:r + 16, c:c + 16] for r in range(16, 80, 16) for c in range(16, 64, 16)]
    high = total = 0.0
    for _, block in sorted(zip([block.std() for block in blocks(gt)], blocks(sr)), key=lambda b: b[0])[:3]:
        window = np.outer(np.hanning(16), np.hanning(16))
        power = np.abs(np.fft.fft2((block - block.mean()) * window)) ** 2
        total += power.sum()
        high += sum(power[i, j] for i in range(16) for j in range(16) if max(min(i, 16 - i), min(j, 16 - j)) >= 4)
    assert metrics.flat_hf(sr, gt).item() == pytest.approx(high / total, rel=1e-6)


def test_vgg_looks_once_at_the_ground_truth_of_many_outputs(vgg_file, monkeypatch):
    metric, seen, taps = metrics.create_metric("vgg", CPU, vgg_file), [], VGGFeatureLoss.taps

    def counted(loss, x):
        seen.append(len(x))
        return taps(loss, x)
    monkeypatch.setattr(VGGFeatureLoss, "taps", counted)
    sr, gt = (torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in (3, 1))
    once = metric(sr, gt.expand(3, -1, -1, -1))
    assert len(seen) == 4 and torch.equal(once, metric(sr, gt.repeat(3, 1, 1, 1))) and len(seen) == 10


@pytest.mark.fast
def test_luma_is_scikit_images_and_psnr_and_ssim_can_use_it():
    from skimage.color import rgb2ycbcr
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    def psnr(x, y):
        return peak_signal_noise_ratio(y, x, data_range=1)

    def ssim(x, y):
        return structural_similarity(x, y, data_range=1, gaussian_weights=True, use_sample_covariance=False)
    a, b = pair(48, 40)
    x, y = (np.stack([rgb2ycbcr(image.permute(1, 2, 0).double().numpy())[..., 0] / 255 for image in images])
            for images in (a, b))
    assert np.abs(metrics.luma(a)[:, 0].numpy() - x).max() < 1e-5
    cut = (slice(4, -4), slice(4, -4))
    for name, function in (("psnr", psnr), ("ssim", ssim)):
        metric = metrics.create_metric(name, CPU, y=True)
        assert metric.full_reference and not metric.lower_is_better
        assert metric(a, b).tolist() == pytest.approx([function(p[cut], q[cut]) for p, q in zip(x, y)], rel=1e-5)


CALIBRATION = Path(__file__).resolve().parents[2] / "shared" / "data" / "calibration"
NAMES = ("I03", "I04", "I06", "I08", "I19")
needs_calibration = pytest.mark.skipif(not CALIBRATION.is_dir(), reason="needs ../shared/data/calibration")


def published(metric):
    """Values of five TID2013 images, or pairs."""
    with open(CALIBRATION / "results_official.csv") as file:
        return next([float(v) for v in row[1:]] for row in csv.reader(file) if row[0] == metric)


@pytest.mark.fast
@needs_calibration
def test_psnr_and_ssim_are_the_published_values_of_five_tid2013_pairs():
    """Published: PSNR over RGB; SSIM of MATLAB's rgb2gray, nothing cropped."""
    def grey(x):
        return (255 * x * x.new_tensor([0.2989, 0.5870, 0.1140]).view(3, 1, 1)).sum(1, keepdim=True).round() / 255
    images = [[load_image(CALIBRATION / folder / f"{name}.bmp")[None].double() / 255 for folder in ("dist", "ref")]
              for name in NAMES]
    psnr = [metrics.psnr(*pair, border=0).item() for pair in images]
    ssim = [metrics.ssim(*map(grey, pair), border=0).item() for pair in images]
    assert psnr == pytest.approx(published("psnr"), abs=0.006) and ssim == pytest.approx(published("ssim"), abs=0.0002)


@pytest.mark.slow
@needs_calibration
def test_ilniqe_is_the_published_one_of_two_tid2013_images():
    """Values of pyiqa 0.1.16 (shared/data/README.md): the published ones of MATLAB differ from pyiqa's by up to 4 %."""
    metric = metrics.create_metric("ilniqe", CPU, CALIBRATION.parent / "weights/iqa/ILNIQE_templateModel.mat")
    assert metric.lower_is_better and not metric.full_reference
    # the worst and the best of the five: an image takes 20 s
    images = [load_image(CALIBRATION / "dist" / f"{name}.bmp")[None].float() / 255 for name in (NAMES[0], NAMES[2])]
    scores = [metric(image, None).item() for image in images]
    assert scores == pytest.approx([115.6177, 19.7533], rel=0.002)
    assert scores == pytest.approx(published("ilniqe")[0:3:2], rel=0.04)


LPIPS = """
import json, sys, torch, lpips
sys.path.insert(0, sys.argv[2])
import metrics
a, b = torch.load(sys.argv[1], weights_only=True)
metric = metrics.create_metric("lpips", torch.device("cpu"))
package = lpips.LPIPS(net="alex", verbose=False)
with torch.no_grad():
    cut = [2 * x[..., 4:-4, 4:-4] - 1 for x in (a, b)]
    values = [metric(a, b), package(*cut).flatten(), package(2 * a - 1, 2 * b - 1).flatten()]
    print(json.dumps([*(v.tolist() for v in values), metric.lower_is_better]))
"""


def test_lpips_is_the_lpips_packages_on_cropped_rgb(tmp_path):
    """With a random AlexNet, since the trained one is a download; the linear layers are the published ones."""
    import lpips
    import torchvision
    hub = tmp_path / "hub"
    (hub / "checkpoints").mkdir(parents=True)
    (hub / "pyiqa").mkdir()
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), hub / "checkpoints" / "alexnet-owt-7be5be79.pth")
    weights = Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth"
    linear = torch.load(weights, weights_only=True, map_location="cpu")
    torch.save(linear, hub / "pyiqa" / "LPIPS_v0.1_alex-df73285e.pth")
    torch.save(torch.stack(pair(72, 80)), tmp_path / "pair.pt")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LPIPS, tmp_path / "pair.pt", runs.REPO],
                          capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"TORCH_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    ours, cropped, uncropped, lower = json.loads(done.stdout.splitlines()[-1])
    assert lower and len(ours) == 2
    assert ours == pytest.approx(cropped, rel=1e-4) and ours != pytest.approx(uncropped, rel=1e-3)


@pytest.mark.fast
def test_refusals_name_the_flag(tmp_path):
    with pytest.raises(runs.UserError, match="--metrics musik: this is unknown; .*musiq"):
        metrics.create_metric("musik", CPU)
    with pytest.raises(runs.UserError, match="--metrics fid: this compares two sets"):
        metrics.create_metric("fid", CPU)
    (tmp_path / "x.pth").write_text("<html>")
    with pytest.raises(runs.UserError, match="--metric-weights lpips=.*x.pth: not a plain weight file"):
        metrics.create_metric("lpips", CPU, tmp_path / "x.pth")
    # a full-reference metric without weights
    metric = metrics.create_metric("gmsd", CPU)
    error = r"gmsd of an output of \(40, 40\) pixels against a reference of \(44, 40\)"
    with pytest.raises(runs.UserError, match=error):
        metric(torch.rand(1, 3, 40, 40), torch.rand(1, 3, 44, 40))
    a, b = pair(64, 64)
    assert metric(a, a).tolist() == pytest.approx([0, 0], abs=1e-6) and (metric(a, b) > 0.01).all()


@pytest.mark.fast
def test_an_image_that_a_metric_cannot_judge_is_named_and_memory_errors_pass():
    images = {"good": torch.zeros(1, 3, 8, 9), "bad": torch.ones(1, 3, 8, 9)}

    def metric(error):
        def fails(sr, gt):
            if sr.max() == 1:
                raise error
            return sr.mean((1, 2, 3))
        return metrics.Metric(fails)
    negative = metric(RuntimeError("negative dimensions"))
    error = r"bad, image s \(9x8 pixels\): niqe cannot judge it \(negative dimensions\)"
    with pytest.raises(runs.UserError, match=error):
        metrics.judge("niqe", negative, images, [], "s")
    sizes = {"good": images["good"], "small": torch.zeros(1, 3, 4, 4)}
    assert metrics.judge("niqe", negative, sizes, [], "s") == {"good": 0, "small": 0}
    for error in (torch.OutOfMemoryError("CUDA out of memory"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")):
        with pytest.raises(type(error), match="memory"):
            metrics.judge("niqe", metric(error), images, [], "s")
