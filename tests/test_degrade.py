"""prepare.degrade: pairs of LR image and ground truth, the same as evaluate.py's, whole or not at all."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from skimage import data as pictures

import degradations
import runs
from images import load_image, save_image
from prepare import degrade

pytestmark = pytest.mark.fast
DEGRADATIONS = ["bicubic", *degradations.PRESETS, "camera"]


@pytest.fixture
def photos(tmp_path):
    """Two photographs, 98 x 131 and 96 x 128 pixels (height x width)."""
    folder = tmp_path / "photos"
    for name, h, w in (("astronaut", 98, 131), ("coffee", 96, 128)):
        pixels = getattr(pictures, name)()[60:60 + h, 150:150 + w].copy()
        save_image(folder / f"{name}.png", torch.from_numpy(pixels).permute(2, 0, 1))
    return folder


def call(*words):
    degrade.main(degrade.parse_args([str(word) for word in words]))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


@pytest.mark.parametrize("degradation", DEGRADATIONS)
def test_pairs_are_named_like_the_photo_a_quarter_as_large_and_always_the_same(photos, tmp_path, degradation):
    for name in ("a", "b"):
        call(photos, tmp_path / name, "--degradation", degradation)
    call(photos, tmp_path / "other", "--degradation", degradation, "--seed", 1)
    files = contents(tmp_path / "a")
    assert sorted(files) == ["gt/astronaut.png", "gt/coffee.png", "lq/astronaut.png", "lq/coffee.png"]
    assert files == contents(tmp_path / "b")
    assert (contents(tmp_path / "other") == files) == (degradation == "bicubic")
    gt = load_image(tmp_path / "a" / "gt" / "astronaut.png")
    assert torch.equal(gt, load_image(photos / "astronaut.png")[:, :96, :128])
    assert load_image(tmp_path / "a" / "lq" / "astronaut.png").shape == (3, 24, 32)
    record = json.loads((tmp_path / "a" / "degrade.json").read_text())
    assert record["images"] == 2 and record["degradation"] == degradation and record["seed"] == 0
    assert {"commit", "torch", "python", "device"} <= set(record)
    assert (record.get("blur") == [3.5, 1.4]) == (degradation == "camera")


@pytest.mark.parametrize("degradation", [name for name in DEGRADATIONS if name != "camera"])
def test_the_images_are_those_of_evaluate(photos, tmp_path, degradation):
    call(photos, tmp_path / "pairs", "--degradation", degradation)
    gt = load_image(tmp_path / "pairs" / "gt" / "coffee.png")[None].float() / 255
    lq = load_image(tmp_path / "pairs" / "lq" / "coffee.png").float() / 255
    assert torch.equal(degradations.fixed(gt, degradation, "coffee")[0], lq)


def test_the_camera_blurs_shrinks_adds_noise_and_compresses(photos, tmp_path):
    clean = ["--noise", 0, "--jpeg", 100]
    call(photos, tmp_path / "blur", "--degradation", "camera", *clean)
    gt = load_image(photos / "coffee.png").double().numpy()
    # a plain reference: rotated Gaussian of 21 pixels, mirrored borders, means of 4 x 4 pixels
    y, x = np.mgrid[-10:11, -10:11]
    angle = math.radians(30)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    kernel = np.exp(-((along / 3.5) ** 2 + (across / 1.4) ** 2) / 2)
    blurred = np.stack([ndimage.correlate(plane, kernel / kernel.sum(), mode="mirror") for plane in gt])
    expected = blurred.reshape(3, 24, 4, 32, 4).mean((2, 4))
    lq = load_image(tmp_path / "blur" / "lq" / "coffee.png").double().numpy()
    # chroma has half the resolution, also at quality 100
    assert np.abs((lq - expected).mean(0)).mean() < 1

    call(photos, tmp_path / "noise", "--degradation", "camera", "--noise", 12, "--jpeg", 100)
    noise = load_image(tmp_path / "noise" / "lq" / "coffee.png").double().numpy() - lq
    # of the mean over channels, whose noise is independent
    assert noise.mean(0).std() == pytest.approx(12 / 3 ** 0.5, rel=0.15)
    call(photos, tmp_path / "jpeg", "--degradation", "camera", "--noise", 0, "--jpeg", 10)
    assert np.abs(load_image(tmp_path / "jpeg" / "lq" / "coffee.png").double().numpy() - lq).mean() > 2


def test_of_a_quintuplet_set_the_originals_are_taken(quintuplets, tmp_path):
    call(quintuplets, tmp_path / "pairs", "--degradation", "bicubic")
    assert len(list((tmp_path / "pairs" / "lq").iterdir())) == 6
    original = quintuplets / "Train" / "images" / "0-6" / "original" / "photo0-0-0.png"
    assert torch.equal(load_image(tmp_path / "pairs" / "gt" / "photo0-0-0.png"), load_image(original))


def test_an_out_that_exists_is_refused_and_a_bad_photo_is_named_and_leaves_nothing(photos, tmp_path):
    def refused(message, *more, degradation="two-round", folder=photos):
        with pytest.raises(runs.UserError, match=message):
            call(folder, tmp_path / "pairs", "--degradation", degradation, *more)
        assert not list(tmp_path.glob("pairs*"))
    refused("none: no such folder of photographs", folder=tmp_path / "none")
    whole = (photos / "coffee.png").read_bytes()
    (photos / "coffee.png").write_bytes(whole[:len(whole) // 2])
    refused("coffee.png: damaged image")
    Image.new("L", (96, 96)).save(photos / "coffee.png")
    refused("coffee.png: image mode L, expected 8-bit RGB")
    Image.new("RGB", (96, 12)).save(photos / "coffee.png")
    refused("coffee.png: degrade: 12x96 images are too small")
    Image.new("RGB", (96, 3)).save(photos / "coffee.png")
    refused("coffee.png: bicubic: .* got 0x96", degradation="bicubic")
    refused("coffee.png: camera: 0x96 images are too small", degradation="camera")
    (photos / "coffee.png").write_bytes(whole)

    (tmp_path / "pairs.tmp" / "lq").mkdir(parents=True)
    (tmp_path / "pairs.tmp" / "lq" / "of a killed call.png").write_text("")
    call(photos, tmp_path / "pairs", "--degradation", "two-round")
    assert not list(tmp_path.glob("*.tmp")) and len(contents(tmp_path / "pairs")) == 4
    with pytest.raises(runs.UserError, match="pairs exists: remove it"):
        call(photos, tmp_path / "pairs", "--degradation", "two-round")


def test_the_script_prints_one_line_for_a_mistake(photos, tmp_path, script):
    done = script("prepare.degrade", photos, tmp_path / "pairs", "--degradation", "bicubic")
    assert done.stdout == f"{tmp_path / 'pairs'}: 2 pairs of lq and gt, bicubic\n"
    done = script("prepare.degrade", photos, tmp_path / "pairs", "--degradation", "bicubic", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "exists" in done.stderr
