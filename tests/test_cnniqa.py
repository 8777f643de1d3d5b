"""The judge CNNIQA-LIVE: shapes, sign, gradient and errors with random weights; published scores where a file is."""
import hashlib
import math

import numpy as np
import pytest
import torch
from conftest import REPO
from scipy import ndimage

import iqa
import runs
from images import load_image
from rewards import cnniqa

pytestmark = pytest.mark.fast
SHARED = REPO.parent / "shared" / "data"
PUBLISHED = SHARED / "weights" / "iqa" / "cnniqa_live.pth"
# DMOS of TID2013 images, as recomputed from the published description: SHARED / "README.md"
REFERENCE = {"dist": {"I03": 77.90, "I04": 12.82, "I06": 14.39, "I08": 19.68, "I19": 85.68},
             "ref": {"I03": 12.28, "I04": 13.05, "I06": 14.61, "I08": 18.52, "I19": 19.43}}


@pytest.fixture
def weights_file(tmp_path, monkeypatch):
    """Random weights, at the place that CNNIQA_WEIGHTS names."""
    torch.manual_seed(0)
    file = tmp_path / "cnniqa.pth"
    torch.save(cnniqa.CNNIQA().state_dict(), file)
    monkeypatch.setenv("CNNIQA_WEIGHTS", str(file))
    return file


def images(n, h, w):
    return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(1))


def test_the_parameters_have_the_published_names_and_shapes():
    shapes = {name: tuple(value.shape) for name, value in cnniqa.CNNIQA().state_dict().items()}
    assert shapes == {"conv1.weight": (50, 1, 7, 7), "conv1.bias": (50,), "fc1.weight": (800, 100), "fc1.bias": (800,),
                      "fc2.weight": (800, 800), "fc2.bias": (800,), "fc3.weight": (1, 800), "fc3.bias": (1,)}


def test_it_equals_a_plain_reference_patch_by_patch(weights_file):
    net = cnniqa.build()
    image = images(1, 70, 100)
    state = {name: value.double().numpy() for name, value in net.state_dict().items()}
    grey = np.tensordot([0.299, 0.587, 0.114], image[0].double().numpy(), 1)
    dmos = []
    # 2 x 3 whole patches; 6 rows and 4 columns are left over
    for y in (0, 32):
        for x in (0, 32, 64):
            patch = grey[y:y + 32, x:x + 32]
            mean = ndimage.uniform_filter(patch, 3, mode="reflect")
            variance = ndimage.uniform_filter(patch * patch, 3, mode="reflect") - mean * mean
            patch = (patch - mean) / (np.sqrt(np.maximum(variance, 0)) + 1)
            maps = [ndimage.correlate(patch, kernel[0])[3:-3, 3:-3] + bias
                    for kernel, bias in zip(state["conv1.weight"], state["conv1.bias"])]
            feature = np.array([m.max() for m in maps] + [m.min() for m in maps])
            for name in ("fc1", "fc2"):
                feature = np.maximum(state[f"{name}.weight"] @ feature + state[f"{name}.bias"], 0)
            dmos.append((state["fc3.weight"] @ feature + state["fc3.bias"]).item())
    assert net(image).item() == pytest.approx(100 - np.mean(dmos), abs=1e-4)


def test_a_batch_is_scored_image_by_image_and_what_is_left_over_is_not_seen(weights_file):
    net, x = cnniqa.build(), images(3, 64, 96)
    scores = net(x)
    assert scores.shape == (3,) and torch.allclose(scores, torch.cat([net(image[None]) for image in x]), atol=1e-4)
    larger = torch.nn.functional.pad(x, (0, 31, 0, 17), value=0.5)
    assert torch.allclose(net(larger), scores, atol=1e-4)
    assert not any(p.requires_grad for p in net.parameters()) and not net.training


def test_the_gradient_is_finite_on_flat_images_too(weights_file):
    net = cnniqa.build()
    for x in (images(1, 64, 64), torch.full((1, 3, 64, 64), 0.5), torch.zeros(1, 3, 64, 64)):
        x = x.clone().requires_grad_()
        net(x).sum().backward()
        assert x.grad.isfinite().all()
    x = images(1, 64, 64).requires_grad_()
    net(x).sum().backward()
    assert x.grad.norm() > 0


def test_less_dmos_is_a_higher_score(weights_file):
    net, x = cnniqa.build(), images(2, 64, 64)
    before = net(x)
    with torch.no_grad():
        net.fc3.bias.sub_(5)
    assert torch.allclose(net(x), before + 5, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 31, 64)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"CNNIQA wants \(B, 3, H, W\)"):
        cnniqa.CNNIQA()(torch.zeros(shape))


def test_it_is_a_reward_by_name_and_can_be_optimised(weights_file):
    reward = iqa.create_reward(["rewards.cnniqa:build=2"], need_gradient=True)
    x = images(2, 64, 64)
    assert torch.allclose(reward(x), 2 * cnniqa.build()(x), atol=1e-3)


def test_a_missing_or_another_file_is_one_line_with_its_source(tmp_path, monkeypatch):
    monkeypatch.setenv("CNNIQA_WEIGHTS", str(tmp_path / "none.pth"))
    with pytest.raises(runs.UserError) as caught:
        cnniqa.build()
    assert f"{tmp_path}/none.pth: no weights of CNNIQA; " in str(caught.value)
    assert "file models/CNNIQA-LIVE of github.com/lidq92/CNNIQA (sha256 79cc404d0da3e76e" in str(caught.value)
    assert "\n" not in str(caught.value)
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "none.pth")
    with pytest.raises(runs.UserError, match="none.pth: not weights of CNNIQA"):
        cnniqa.build()
    (tmp_path / "none.pth").write_bytes(b"damaged")
    with pytest.raises(runs.UserError, match="none.pth: not weights of CNNIQA"):
        cnniqa.build()
    monkeypatch.delenv("CNNIQA_WEIGHTS")
    monkeypatch.setattr(cnniqa, "WEIGHTS", tmp_path / "weights" / "downloads" / "cnniqa_live.pth")
    with pytest.raises(runs.UserError, match="weights/downloads/cnniqa_live.pth: no weights of CNNIQA"):
        cnniqa.build()


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="needs CNNIQA-LIVE's weights, which are not in this repository")
def test_the_published_weights_give_the_published_scores(monkeypatch):
    assert hashlib.sha256(PUBLISHED.read_bytes()).hexdigest().startswith("79cc404d0da3e76e")
    monkeypatch.setenv("CNNIQA_WEIGHTS", str(PUBLISHED))
    net = cnniqa.build()
    for folder, values in REFERENCE.items():
        for stem, dmos in values.items():
            x = (load_image(SHARED / "calibration" / folder / f"{stem}.bmp")[None].float() / 255).requires_grad_()
            score = net(x)
            assert score.item() == pytest.approx(100 - dmos, abs=0.011), (folder, stem)
            score.backward()
            assert x.grad.isfinite().all() and math.isfinite(x.grad.norm()) and x.grad.norm() > 1
