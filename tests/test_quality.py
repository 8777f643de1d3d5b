"""quality.py: full-reference metrics against scikit-image, pyiqa and the lpips package, the protocol's border and luma, errors."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import metrics as quality
from images import load_image

CPU = torch.device("cpu")


def pair(*size, seed=0):
    a, b = torch.rand(2, 2, 3, *size, generator=torch.Generator().manual_seed(seed))
    return a, (a + 0.2 * b) / 1.2


@pytest.mark.fast
def test_luma_is_scikit_images_and_psnr_and_ssim_can_use_it():
    from skimage.color import rgb2ycbcr
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    a, b = pair(48, 40)
    x, y = (np.stack([rgb2ycbcr(i.permute(1, 2, 0).double().numpy())[..., 0] / 255 for i in images]) for images in (a, b))
    assert np.abs(quality.luma(a)[:, 0].numpy() - x).max() < 1e-5
    cut = (slice(4, -4), slice(4, -4))
    for name, function in (("psnr", lambda p, q: peak_signal_noise_ratio(q, p, data_range=1)),
                           ("ssim", lambda p, q: structural_similarity(p, q, data_range=1, gaussian_weights=True, use_sample_covariance=False))):
        metric = quality.create_metric(name, CPU, y=True)
        assert metric.full_reference and not metric.lower_is_better and metric(a, b).tolist() == pytest.approx([function(p[cut], q[cut]) for p, q in zip(x, y)], rel=1e-5)


CALIBRATION = Path(__file__).resolve().parents[2] / "shared" / "data" / "calibration"


@pytest.mark.fast
@pytest.mark.skipif(not CALIBRATION.is_dir(), reason="needs ../shared/data/calibration")
def test_psnr_and_ssim_are_the_published_values_of_five_tid2013_pairs():
    """Published: PSNR over RGB; SSIM of MATLAB's rgb2gray, nothing cropped."""
    with open(CALIBRATION / "results_official.csv") as file:
        published = {row[0]: [float(v) for v in row[1:]] for row in list(csv.reader(file))[1:]}
    pairs = [[load_image(CALIBRATION / folder / f"{name}.bmp")[None].double() / 255 for folder in ("dist", "ref")] for name in ("I03", "I04", "I06", "I08", "I19")]
    grey = lambda x: (255 * x * x.new_tensor([0.2989, 0.5870, 0.1140]).view(3, 1, 1)).sum(1, keepdim=True).round() / 255
    assert [quality.psnr(*pair, border=0).item() for pair in pairs] == pytest.approx(published["psnr"], abs=0.006)
    assert [quality.ssim(*map(grey, pair), border=0).item() for pair in pairs] == pytest.approx(published["ssim"], abs=0.0002)


@pytest.mark.skipif(not CALIBRATION.is_dir(), reason="needs ../shared/data/calibration")
def test_ilniqe_is_the_published_one_of_five_tid2013_images():
    """Values of pyiqa 0.1.16 (shared/data/README.md): the published ones of MATLAB differ from pyiqa's by up to 4 %."""
    metric = quality.create_metric("ilniqe", CPU, CALIBRATION.parent / "weights/iqa/ILNIQE_templateModel.mat")
    assert metric.lower_is_better and not metric.full_reference
    images = [load_image(CALIBRATION / "dist" / f"{name}.bmp")[None].float() / 255 for name in ("I03", "I04", "I06", "I08", "I19")]
    scores = [metric(image, None).item() for image in images]
    assert scores == pytest.approx([115.6177, 24.0712, 19.7533, 22.3366, 54.8366], rel=0.002)
    with open(CALIBRATION / "results_official.csv") as file:
        published = next([float(v) for v in row[1:]] for row in csv.reader(file) if row[0] == "ilniqe")
    assert scores == pytest.approx(published, rel=0.04)


LPIPS = """
import json, sys, torch, lpips
sys.path.insert(0, sys.argv[2])
import metrics as quality
a, b = torch.load(sys.argv[1], weights_only=True)
metric = quality.create_metric("lpips", torch.device("cpu"))
theirs = lpips.LPIPS(net="alex", verbose=False)
with torch.no_grad():
    cut = [2 * x[..., 4:-4, 4:-4] - 1 for x in (a, b)]
    print(json.dumps([metric(a, b).tolist(), theirs(*cut).flatten().tolist(), theirs(2 * a - 1, 2 * b - 1).flatten().tolist(), metric.lower_is_better]))
"""


def test_lpips_is_the_lpips_packages_on_cropped_rgb(tmp_path):
    """With a random AlexNet, since the trained one is a download; the linear layers are the published ones of the lpips package."""
    import lpips
    import torchvision
    hub = tmp_path / "hub"
    (hub / "checkpoints").mkdir(parents=True)
    (hub / "pyiqa").mkdir()
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), hub / "checkpoints" / "alexnet-owt-7be5be79.pth")
    linear = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth", weights_only=True, map_location="cpu")
    torch.save(linear, hub / "pyiqa" / "LPIPS_v0.1_alex-df73285e.pth")
    torch.save(torch.stack(pair(72, 80)), tmp_path / "pair.pt")
    repo = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LPIPS, tmp_path / "pair.pt", repo], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"TORCH_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    ours, theirs, uncropped, lower = json.loads(done.stdout.splitlines()[-1])
    assert lower and len(ours) == 2 and ours == pytest.approx(theirs, rel=1e-4) and ours != pytest.approx(uncropped, rel=1e-3)


@pytest.mark.fast
def test_refusals_name_the_flag(tmp_path):
    with pytest.raises(ValueError, match="--metrics musik: this is unknown; .*musiq"):
        quality.create_metric("musik", CPU)
    with pytest.raises(ValueError, match="--metrics fid: this compares two sets"):
        quality.create_metric("fid", CPU)
    (tmp_path / "x.pth").write_text("<html>")
    with pytest.raises(ValueError, match="--metric-weights lpips=.*x.pth: not a plain weight file"):
        quality.create_metric("lpips", CPU, tmp_path / "x.pth")
    metric = quality.create_metric("gmsd", CPU)                                # a full-reference metric without weights
    with pytest.raises(ValueError, match=r"gmsd of an output of \(40, 40\) pixels against a reference of \(44, 40\)"):
        metric(torch.rand(1, 3, 40, 40), torch.rand(1, 3, 44, 40))
    a, b = pair(64, 64)
    assert metric(a, a).tolist() == pytest.approx([0, 0], abs=1e-6) and (metric(a, b) > 0.01).all()
