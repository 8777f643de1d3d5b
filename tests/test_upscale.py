"""upscale.py: pixels equal spandrel's, what is kept of an image, odd and broken inputs, memory."""
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import archs
import lora
import runs
import upscale

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    net = archs.create("compact-small")
    runs.save_weights(tmp_path_factory.mktemp("w") / "net.pth", net.state_dict())
    return tmp_path_factory.getbasetemp() / "w0" / "net.pth"


@pytest.fixture
def photo():
    """(40, 50, 3) uint8"""
    from skimage import data
    return data.astronaut()[100:140, 200:250].copy()


def call(weights, *words):
    """upscale.main with these words, in this process."""
    upscale.main(upscale.parse_args(["--weights", str(weights), "--device", "cpu", *map(str, words)]))


def run(weights, *words, code=0):
    with pytest.raises(SystemExit) as stopped:
        call(weights, *words)
    assert (stopped.value.code or 0) == code


def expected(weights, lq):
    """(h, w, 3) in [0, 1] -> output of the network, in [0, 1]"""
    net, _ = archs.load_generator(weights)
    with torch.no_grad():
        sr = net(torch.from_numpy(lq.astype(np.float32)).permute(2, 0, 1)[None])
    return sr[0].clamp(0, 1).permute(1, 2, 0).numpy()


@pytest.mark.fast
def test_the_pixels_are_spandrels(weights, photo, tmp_path):
    from spandrel import ModelLoader
    Image.fromarray(photo).save(tmp_path / "a.png")
    run(weights, tmp_path / "a.png", "--out", tmp_path / "sr")
    with torch.no_grad():
        lq = torch.from_numpy(photo.astype(np.float32) / 255).permute(2, 0, 1)[None]
        sr = ModelLoader().load_from_file(weights)(lq)[0].permute(1, 2, 0).numpy()
    pixels = np.array(Image.open(tmp_path / "sr" / "a.png"))
    assert np.array_equal(pixels, np.round(sr.clip(0, 1) * 255).astype(np.uint8))


@pytest.mark.fast
def test_bf16_is_close_to_fp32_and_convolutions_run_in_it(weights, photo, tmp_path, monkeypatch):
    for name in "ab":
        Image.fromarray(photo).save(tmp_path / f"{name}.png")
    seen, forward = set(), archs.SRVGGNetCompact.forward

    def watched(net, x):
        seen.add((net.body[0](x).dtype, net.body[0].weight.is_contiguous(memory_format=torch.channels_last)))
        return forward(net, x)
    monkeypatch.setattr(archs.SRVGGNetCompact, "forward", watched)
    pixels = {}
    for precision in ("fp32", "bf16"):
        seen.clear()
        run(weights, tmp_path / "a.png", tmp_path / "b.png", "--out", tmp_path / precision, "--precision", precision)
        pixels[precision] = np.array(Image.open(tmp_path / precision / "a.png")).astype(int)
        assert seen == {(torch.float32, False) if precision == "fp32" else (torch.bfloat16, True)}
    assert 0 < abs(pixels["fp32"] - pixels["bf16"]).max() <= 2


@pytest.mark.fast
@pytest.mark.parametrize("flags, said", [(["amx_bf16", "avx2"], 1), (["avx2"], 0)])
def test_bf16_is_named_once_where_the_cpu_has_it(weights, photo, tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.setattr(runs, "cpu_flags", lambda: flags)
    for name in "ab":
        Image.fromarray(photo).save(tmp_path / f"{name}.png")
    run(weights, tmp_path / "a.png", tmp_path / "b.png", "--out", tmp_path / "sr")
    assert capsys.readouterr().err.count("--precision bf16") == said


@pytest.mark.fast
@pytest.mark.parametrize("mode, suffix", [("L", ".png"), ("LA", ".png"), ("RGB", ".png"), ("RGBA", ".png"),
                                          ("P", ".png"), ("1", ".png"), ("RGBA", ".webp"), ("L", ".tif"),
                                          ("RGBA", ".tiff"), ("L", ".jpg"), ("RGB", ".webp")])
def test_modes_are_kept(weights, photo, tmp_path, mode, suffix):
    image = Image.fromarray(photo).convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 50).astype(np.uint8), (40, 1))))
    image = image.convert("RGB").convert(mode) if mode in ("P", "1") else image.convert(mode)
    image.save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    run(weights, tmp_path / f"a{suffix}", "--out", tmp_path / "sr")
    sr = Image.open(tmp_path / "sr" / f"a{suffix}")
    assert sr.mode == {"P": "RGB", "1": "L"}.get(mode, mode) and sr.size == (200, 160)
    colour = expected(weights, np.array(image.convert("RGB")) / 255)
    if mode in ("L", "LA", "1"):
        colour = colour.mean(2, keepdims=True)
    pixels = np.array(sr.convert("RGB"), dtype=float)[..., :colour.shape[2]] / 255
    if "A" in mode:
        # the left edge is nearly transparent: its colours are those beside it
        pixels, colour = pixels[:, 40:], colour[:, 40:]
    assert np.abs(pixels - colour).mean() < (0.6 / 255 if suffix in (".png", ".tif", ".tiff") else 0.03)
    if "A" in mode:
        alpha = np.array(sr)[..., -1]
        assert alpha[:, :4].max() < 20 and alpha[:, -4:].min() > 235 and (np.diff(alpha[80].astype(int)) >= -1).all()


def cutout(photo):
    """The photo behind a disc with a soft edge: (40, 50, 4)"""
    y, x = np.mgrid[:40, :50]
    alpha = np.clip(12 - np.hypot(y - 20, x - 25), 0, 1) * 255
    return np.dstack([photo, alpha.astype(np.uint8)])


@pytest.mark.fast
@pytest.mark.parametrize("mode, suffix", [("RGBA", ".png"), ("LA", ".png"), ("RGBA", ".webp"), ("RGBA", ".tif"),
                                          ("RGBA16", ".png")])
def test_colours_under_alpha_0_do_not_show(weights, photo, tmp_path, mode, suffix):
    """Whatever lies there, black, white or noise, the result is the same."""
    import cv2
    image, seen = cutout(photo), []
    hidden = image[..., 3] == 0
    for k, colour in enumerate((0, 255, np.random.default_rng(0).integers(0, 256, (hidden.sum(), 3)))):
        image[hidden, :3] = colour
        file = tmp_path / f"{k}{suffix}"
        if mode == "RGBA16":
            cv2.imwrite(str(file), image.astype(np.uint16) * 257)
        else:
            Image.fromarray(image).convert(mode).save(file, **({"lossless": True, "exact": True} if suffix == ".webp"
                                                               else {}))
        run(weights, file, "--out", tmp_path / "sr", "--format", "png")
        seen.append(cv2.imread(str(tmp_path / "sr" / f"{k}.png"), cv2.IMREAD_UNCHANGED))
    assert all(np.array_equal(one, seen[0]) for one in seen) and seen[0].shape[0] == 160
    assert 0 == seen[0][..., -1].min() and seen[0][..., -1].max() >= 254


@pytest.mark.fast
@pytest.mark.parametrize("mode", ["RGBA", "P", "nearly transparent"])
def test_a_white_cutout_on_transparent_black_stays_white(tmp_path, monkeypatch, mode):
    """As ../shared/cases/cutout_black.png: on white paper its darkest pixel was 143."""
    class Bicubic(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.interpolate(x, scale_factor=4, mode="bicubic")
    monkeypatch.setattr(archs, "load_run", lambda *words: (Bicubic(), dict(file="", arch="", scale=4, key=None)))
    image = Image.new("RGBA", (48, 32), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (12, 8, 36, 24))
    if mode == "P":
        image = Image.fromarray(np.array(image)[..., 3] // 255, "L").convert("P")
        image.putpalette([0, 0, 0, 255, 255, 255])
        image.info["transparency"] = 0
    elif mode != "RGBA":
        image.putalpha(image.getchannel("A").point(lambda value: max(value, 1)))
    image.save(tmp_path / "a.png")
    run("x", tmp_path / "a.png", "--out", tmp_path / "sr")
    sr = Image.open(tmp_path / "sr" / "a.png")
    paper = Image.new("RGBA", sr.size, "white")
    paper.alpha_composite(sr)
    assert sr.mode == "RGBA" and sr.size == (192, 128)
    assert np.array(paper)[..., :3].min() >= (254 if mode == "nearly transparent" else 255)


@pytest.mark.fast
def test_an_image_of_which_nothing_shows(weights, photo, tmp_path):
    image = Image.fromarray(photo)
    image.putalpha(0)
    image.save(tmp_path / "a.png")
    run(weights, tmp_path / "a.png", "--out", tmp_path / "sr")
    assert np.array(Image.open(tmp_path / "sr" / "a.png"))[..., 3].max() == 0


@pytest.mark.fast
@pytest.mark.parametrize("compression, orientation", [(None, 1), (None, 6), ("tiff_lzw", 1), ("jpeg", 1)])
def test_a_tiff_in_ycbcr_has_the_right_colours(weights, photo, tmp_path, compression, orientation):
    """Right is what the network makes of the same picture in RGB."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    # coloured, and the same in blocks of 2x2, as YCbCr may keep it
    image = Image.fromarray(np.kron(photo[::2, ::2] // (1, 2, 4), np.ones((2, 2, 1), np.uint8)).astype(np.uint8))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.convert("YCbCr").save(tmp_path / "a.tif", compression=compression, exif=exif, icc_profile=profile)
    run(weights, tmp_path / "a.tif", "--out", tmp_path / "sr")
    pixels = np.array(image.convert("YCbCr").convert("RGB")) / 255
    right = expected(weights, np.rot90(pixels, -1).copy() if orientation == 6 else pixels)
    sr = Image.open(tmp_path / "sr" / "a.tif")
    assert sr.info["icc_profile"] == profile
    sr = np.array(sr.convert("RGB")) / 255
    assert sr.shape == right.shape and np.abs(sr - right).mean() < (1 if compression != "jpeg" else 6) / 255


@pytest.mark.fast
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_bmp_is_read_and_written(weights, photo, tmp_path, mode):
    image = Image.fromarray(photo).convert(mode)
    image.save(tmp_path / "a.BMP", dpi=(300, 300))
    run(weights, tmp_path / "a.BMP", "--out", tmp_path / "sr")
    with Image.open(tmp_path / "sr" / "a.bmp") as sr:
        assert sr.format == "BMP" and sr.mode == {"P": "RGB", "1": "L"}.get(mode, mode)
        assert sr.info["dpi"][0] == pytest.approx(300, abs=0.1)
        pixels = np.array(sr.convert("RGB")) / 255
    colour = expected(weights, np.array(image.convert("RGB")) / 255)
    colour = colour if mode in ("RGB", "P") else colour.mean(2, keepdims=True)
    assert np.abs(pixels - colour).max() <= 0.51 / 255


@pytest.mark.fast
def test_any_image_becomes_a_bmp_and_a_damaged_bmp_is_named(weights, photo, tmp_path, capsys):
    image = Image.fromarray(photo)
    image.putalpha(0)
    image.save(tmp_path / "clear.png")
    Image.fromarray(photo).save(tmp_path / "cut.bmp")
    (tmp_path / "cut.bmp").write_bytes((tmp_path / "cut.bmp").read_bytes()[:-900])
    Image.fromarray(photo[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    names = ("cut.bmp", "clear.png", "deep.png")
    run(weights, *(tmp_path / name for name in names), "--format", "bmp", "--out", tmp_path / "sr", code=1)
    printed = capsys.readouterr()
    assert "cut.bmp: damaged image" in printed.err and "2 of 3 images written" in printed.out
    assert "bmp has no transparency: on white" in printed.out and "bmp has 8 bit only" in printed.out
    assert np.array(Image.open(tmp_path / "sr" / "clear.bmp")).min() == 255
    assert Image.open(tmp_path / "sr" / "deep.bmp").mode == "L"


@pytest.mark.fast
@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("grey", [False, True])
def test_sixteen_bits_stay_sixteen_bits(weights, photo, tmp_path, suffix, grey):
    import cv2
    import tifffile
    # values that no 8-bit image has
    deep = photo.astype(np.uint16) * 251 + 7
    deep = deep[..., 0] if grey else deep
    if suffix == ".tif":
        tifffile.imwrite(tmp_path / "a.tif", deep, photometric="minisblack" if grey else "rgb")
    else:
        cv2.imwrite(str(tmp_path / "a.png"), deep if grey else deep[..., ::-1])
    run(weights, tmp_path / f"a{suffix}", "--out", tmp_path / "sr")
    if suffix == ".tif":
        sr = tifffile.imread(tmp_path / "sr" / "a.tif")
    else:
        sr = cv2.imread(str(tmp_path / "sr" / "a.png"), cv2.IMREAD_UNCHANGED)
        sr = sr if grey else sr[..., ::-1]
    colour = expected(weights, np.dstack([deep] * 3 if grey else [deep]) / 65535)
    colour = colour.mean(2) if grey else colour
    assert sr.dtype == np.uint16 and np.abs(sr - colour * 65535.0).max() < 3
    run(weights, tmp_path / f"a{suffix}", "--out", tmp_path / "webp", "--format", "webp")
    eight_bit = np.array(Image.open(tmp_path / "webp" / "a.webp").convert("RGB"))
    assert abs(eight_bit.mean() / 255 - colour.mean()) < 0.02


@pytest.mark.fast
def test_profile_metadata_and_orientation(weights, photo, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    orientation, camera = 0x0112, 0x010F
    exif = Image.Exif()
    # 6: turned by 90 degrees
    exif[orientation], exif[camera] = 6, "Maker"
    for suffix in (".jpg", ".png", ".webp", ".tif"):
        Image.fromarray(photo).save(tmp_path / f"a{suffix}", exif=exif, icc_profile=profile, dpi=(300, 300))
        run(weights, tmp_path / f"a{suffix}", "--out", tmp_path / "sr")
        sr = Image.open(tmp_path / "sr" / f"a{suffix}")
        assert sr.size == (160, 200) and sr.info["icc_profile"] == profile, suffix
        assert sr.getexif().get(orientation, 1) == 1 and sr.getexif().get(camera, "Maker") == "Maker", suffix
        if suffix in (".jpg", ".webp"):
            assert sr.getexif()[camera] == "Maker"
    upright = np.rot90(photo, -1)
    pixels = np.array(Image.open(tmp_path / "sr" / "a.png")) / 255
    assert np.abs(pixels - expected(weights, upright / 255)).max() <= 0.51 / 255


def test_cmyk_becomes_srgb(weights, photo, tmp_path):
    Image.fromarray(photo).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    run(weights, tmp_path / "a.jpg", "--out", tmp_path / "sr")
    sr = Image.open(tmp_path / "sr" / "a.jpg")
    assert sr.mode == "RGB" and sr.size == (200, 160)


@pytest.mark.fast
def test_broken_images_do_not_stop_the_others(weights, photo, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(photo).save(folder / "good.png")
    Image.fromarray(noise).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:9000])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    Image.fromarray(photo[:1, :1]).save(folder / "dot.png")
    Image.fromarray(photo[:1, :9]).save(folder / "line.png")
    frames = [Image.fromarray(np.roll(photo, k, 0)) for k in range(3)]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:])
    Image.fromarray(photo[..., 0].astype(np.float32)).save(folder / "float.tif")
    run(weights, folder, "--out", tmp_path / "sr", code=1)
    printed = capsys.readouterr()
    assert sorted(p.name for p in (tmp_path / "sr").iterdir()) == ["dot.png", "good.png", "line.png"]
    assert Image.open(tmp_path / "sr" / "dot.png").size == (4, 4)
    for name, reason in {"cut.jpg": "not a readable image", "empty.png": "not a readable image",
                         "text.png": "not a readable image", "moving.webp": "several pages or frames",
                         "float.tif": "1 bands of float"}.items():
        assert re.search(f"error: .*{re.escape(name)}: {reason}", printed.err), name
    assert "3 of 8 images written" in printed.out and "5 failed" in printed.out


@pytest.mark.fast
def test_a_fault_of_the_code_keeps_its_traceback(weights, photo, tmp_path, monkeypatch):
    Image.fromarray(photo).save(tmp_path / "a.png")

    def faulty(*args):
        raise ValueError("a fault of the code")
    monkeypatch.setattr(upscale, "check_result", faulty)
    with pytest.raises(ValueError, match="a fault of the code"):
        call(weights, tmp_path / "a.png", "--out", tmp_path / "sr")


@pytest.mark.fast
def test_nothing_is_overwritten_silently(weights, photo, tmp_path, capsys):
    Image.fromarray(photo).save(tmp_path / "a.png")
    run(weights, tmp_path / "a.png", "--out", tmp_path / "sr")
    (tmp_path / "sr" / "a.png").write_bytes(b"mine")
    run(weights, tmp_path / "a.png", "--out", tmp_path / "sr", code=1)
    assert "a.png exists: --overwrite" in capsys.readouterr().err
    assert (tmp_path / "sr" / "a.png").read_bytes() == b"mine"
    run(weights, tmp_path / "a.png", "--out", tmp_path / "sr", "--overwrite")
    assert Image.open(tmp_path / "sr" / "a.png").size == (200, 160)
    with pytest.raises(runs.UserError, match="a.png would be replaced by its result"):
        call(weights, tmp_path / "a.png", "--out", tmp_path)
    shutil.copy(tmp_path / "a.png", tmp_path / "a.tif")
    with pytest.raises(runs.UserError, match="would both become"):
        call(weights, tmp_path / "a.png", tmp_path / "a.tif", "--format", "jpg", "--out", tmp_path / "two")
    with pytest.raises(runs.UserError, match="no such file, folder or pattern"):
        call(weights, tmp_path / "*.bmp")


@pytest.mark.fast
def test_limits_are_named_before_the_work(weights, tmp_path, capsys):
    Image.fromarray(np.zeros((4, 4097, 3), np.uint8)).save(tmp_path / "wide.webp")
    run(weights, tmp_path / "wide.webp", "--out", tmp_path / "sr", code=1)
    assert "16388x16 pixels, and webp ends at 16383" in capsys.readouterr().err
    image = upscale.pyvips.Image.black(100_000, 100_000, bands=3).copy(interpretation="srgb")
    with pytest.raises(runs.UserError, match=r"the result takes 447.0 GiB, free are 20.0"):
        upscale.check_result(Path("x.png"), image, 4, ".png", 20 * 2**30)


@pytest.mark.fast
def test_a_pattern_and_an_adapter_at_any_strength(weights, photo, tmp_path):
    net, _ = archs.load_generator(weights)
    lora.add_lora(net, lora.default_targets(net), rank=2)
    with torch.no_grad():
        for adapter in lora.adapted(net).values():
            adapter.lora_B.normal_(0, 0.1)
    tuned_run = tmp_path / "run"
    lora.save_lora(tuned_run / "lora" / "adapter.pth", net)
    Image.fromarray(photo).save(tmp_path / "a.png")
    pixels = {}
    for name, words in {"plain": [], "none": ["--lora", tuned_run, "--scale", 0],
                        "half": ["--lora", tuned_run, "--scale", 0.5],
                        "full": ["--lora", tuned_run / "lora" / "adapter.pth"]}.items():
        run(weights, tmp_path / "*.png", *words, "--out", tmp_path / name)
        pixels[name] = np.array(Image.open(tmp_path / name / "a.png")).astype(int)
    with torch.no_grad():
        sr = net(torch.from_numpy(photo.astype(np.float32) / 255).permute(2, 0, 1)[None])[0].clamp(0, 1)
    tuned = sr.permute(1, 2, 0).numpy()
    assert np.array_equal(pixels["none"], pixels["plain"]) and np.abs(pixels["full"] - tuned * 255).max() < 0.51
    assert np.abs(pixels["half"] - pixels["plain"]).max() > 0 and np.abs(pixels["half"] - pixels["full"]).max() > 0


@pytest.mark.fast
def test_a_public_name_with_a_committed_adapter(weights, photo, tmp_path, monkeypatch, capsys):
    """--weights NAME --lora weights/ADAPTER: tuned from the file in fp32, used with that in fp16, which is said."""
    net, _ = archs.load_generator(weights)
    half = {key: value.half() for key, value in net.state_dict().items()}
    (tmp_path / "downloads").mkdir()
    torch.save({"params_ema": half}, tmp_path / "downloads" / "RealESRGAN_x4plus.pth")
    lora.add_lora(net, lora.default_targets(net), rank=2)
    with torch.no_grad():
        for adapter in lora.adapted(net).values():
            adapter.lora_B.normal_(0, 0.1)
    folder = tmp_path / "weights" / "sharp"
    lora.save_lora(folder / "adapter.pth", net)
    (folder / "README.md").write_text("---\nbase: realesrgan-x4plus\n---\n# Sharp\n")
    Image.fromarray(photo).save(tmp_path / "a.png")
    monkeypatch.setattr(runs, "downloads", lambda: tmp_path / "downloads")
    pixels = {}
    for name, words in {"named": ["--weights", "realesrgan-x4plus"], "card": []}.items():
        with pytest.raises(SystemExit) as stopped:
            upscale.main(upscale.parse_args([*words, "--lora", str(folder), str(tmp_path / "a.png"), "--device", "cpu",
                                             "--out", str(tmp_path / name)]))
        assert not stopped.value.code
        said = capsys.readouterr()
        assert f"RealESRGAN_x4plus.pth: compact x4, key params_ema + 1 x {folder}" in said.out
        assert "in another precision: its weights agree to 16 bits" in said.err
        pixels[name] = np.array(Image.open(tmp_path / name / "a.png")).astype(int)
    with torch.no_grad():
        sr = net(torch.from_numpy(photo.astype(np.float32) / 255).permute(2, 0, 1)[None])[0].clamp(0, 1)
    assert np.array_equal(pixels["named"], pixels["card"])
    assert np.abs(pixels["named"] - sr.permute(1, 2, 0).numpy() * 255).mean() < 1


@pytest.mark.fast
def test_damaged_tiff_animated_png_and_links_to_nothing(weights, photo, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    large = np.tile(photo, (6, 6, 1))
    Image.fromarray(large).save(folder / "plain.tif")
    (folder / "cut.tif").write_bytes((folder / "plain.tif").read_bytes()[:60_000])
    Image.fromarray(large).save(folder / "packed.tif", compression="tiff_lzw")
    packed = bytearray((folder / "packed.tif").read_bytes())
    packed[9_000:9_040] = bytes(40)
    (folder / "packed.tif").write_bytes(packed)
    frames = [Image.fromarray(np.roll(photo, k, 0)) for k in range(2)]
    frames[0].save(folder / "moving.png", save_all=True, append_images=frames[1:])
    (folder / "gone.png").symlink_to(tmp_path / "nothing.png")
    (folder / "folder.png").mkdir()
    run(weights, folder, "--out", tmp_path / "sr", code=1)
    printed = capsys.readouterr()
    for name, reason in (("cut.tif", "not a readable image"), ("packed.tif", "not a readable image"),
                         ("moving.png", "several pages or frames"), ("gone.png", "a link to a file that is not there")):
        assert f"{name}: {reason}" in printed.err
    assert [p.name for p in (tmp_path / "sr").iterdir()] == ["plain.tif"] and "1 of 5 images written" in printed.out
    with pytest.raises(runs.UserError, match="folder.png: no images"):
        call(weights, folder / "folder.png")


@pytest.mark.fast
def test_pipes_and_links_to_themselves_stop_nothing(weights, photo, tmp_path, capsys):
    import os
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(photo).save(folder / "a.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    run(weights, folder, "--out", tmp_path / "sr")
    assert "1 of 1 images written" in capsys.readouterr().out
    run(weights, folder / "pipe.png", folder / "itself.png", folder / "a.png", "--out", tmp_path / "two", code=1)
    printed = capsys.readouterr()
    assert "pipe.png: no file" in printed.err and "itself.png: a link to a file that is not there" in printed.err
    assert "1 of 3 images written" in printed.out


@pytest.mark.fast
def test_a_network_that_is_not_finite_writes_nothing(weights, photo, tmp_path, capsys):
    state = torch.load(weights, weights_only=True)["params"]
    runs.save_weights(tmp_path / "nan.pth", state | {"body.0.bias": state["body.0.bias"] * torch.nan})
    torch.save({"params": {k: (10 * v).to(torch.int8) for k, v in state.items()}}, tmp_path / "int8.pth")
    Image.fromarray(photo).save(tmp_path / "a.png")
    run(tmp_path / "nan.pth", tmp_path / "a.png", "--out", tmp_path / "sr", code=1)
    assert "a.png: the network's output is not finite" in capsys.readouterr().err
    assert not list((tmp_path / "sr").glob("*"))
    with pytest.raises(runs.UserError, match="body.0.weight is torch.int8 there"):
        call(tmp_path / "int8.pth", tmp_path / "a.png", "--out", tmp_path / "sr")


@pytest.mark.fast
def test_a_stopped_call_is_continued_and_a_signal_stops_between_tiles(weights, photo, tmp_path, capsys, monkeypatch):
    for name in "ab":
        Image.fromarray(photo).save(tmp_path / f"{name}.png")
    words = ["--out", tmp_path / "sr", tmp_path / "a.png", tmp_path / "b.png"]
    upscale_tiled = archs.upscale_tiled

    def interrupted(net, lq, *values, **options):
        signal.raise_signal(signal.SIGTERM)
        return upscale_tiled(net, lq, *values, **options)
    monkeypatch.setattr(archs, "upscale_tiled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(weights, *words)
    assert not list((tmp_path / "sr").glob("*"))
    monkeypatch.setattr(archs, "upscale_tiled", upscale_tiled)
    run(weights, *words[:3])
    written = (tmp_path / "sr/a.png").stat().st_mtime_ns
    run(weights, "--skip", *words)
    assert "a.png (was there)" in capsys.readouterr().out
    assert (tmp_path / "sr/a.png").stat().st_mtime_ns == written and (tmp_path / "sr/b.png").exists()


@pytest.mark.fast
def test_the_memory_of_the_machine_that_does_not_suffice(weights, photo, tmp_path, capsys, monkeypatch):
    """With the error that PyTorch raises on a CPU; the other image is done."""
    Image.fromarray(np.tile(photo, (5, 1, 1))).save(tmp_path / "a.png")
    Image.fromarray(photo).save(tmp_path / "b.png")
    net, info = archs.load_run(weights, "--weights")
    sides = []

    class Greedy(torch.nn.Module):
        def forward(self, x):
            sides.append(max(x.shape[2:]))
            if sides[-1] > 50:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: "
                                   "you tried to allocate 9 bytes")
            return net(x)
    monkeypatch.setattr(archs, "load_run", lambda *words: (Greedy(), info))
    run(weights, "--out", tmp_path / "sr", tmp_path / "a.png", tmp_path / "b.png", code=1)
    assert "a.png: memory does not suffice for a tile of 136 pixels" in capsys.readouterr().err
    assert sides[:2] == [200, 136] and (tmp_path / "sr/b.png").exists()
    run(weights, "--out", tmp_path / "sr", tmp_path / "a.png", "--overlap", 8, "--skip")
    assert Image.open(tmp_path / "sr/a.png").size == (200, 800)


@pytest.mark.fast
def test_the_tile_fits_the_memory(monkeypatch):
    def tile(gib):
        monkeypatch.setattr(upscale, "free_memory", lambda device: gib * 2**30)
        return upscale.auto_tile(torch.device("cpu"), 64)
    assert tile(1000) == tile(float("inf")) == 512 and tile(0.01) == 136
    assert 112 < tile(1) < 512 and tile(1) % 8 == 0


@pytest.mark.slow
def test_processes_share_the_images(weights, photo, tmp_path, script):
    folder = tmp_path / "in"
    folder.mkdir()
    for k in range(3):
        Image.fromarray(np.roll(photo, k, 0)).save(folder / f"{k}.png")
    done = script("upscale.py", "--weights", weights, folder, "--out", tmp_path / "sr", "--device", "cpu", processes=2)
    assert sorted(p.name for p in (tmp_path / "sr").iterdir()) == ["0.png", "1.png", "2.png"]
    assert "3 of 3 images written" in done.stdout and done.stdout.count("net.pth: compact x4") == 1


NEAREST = """
import resource, sys, torch
import archs, upscale

class Nearest(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.interpolate(x, scale_factor=4, mode="nearest")

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

archs.load_run = lambda *a: (Nearest(), dict(file="nearest", arch="nearest", scale=4, key=None))
args = upscale.parse_args(["--weights", "x", "--device", "cpu", "--threads", "1", "--tile", "136", *sys.argv[1:]])
start = peak()
try:
    upscale.main(args)
finally:
    print("used", peak() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_grows_with_the_result_only(weights, tmp_path):
    """A 3-megapixel photo: less than 400 MiB beside the 8-bit result (144 MiB) and its float input (36 MiB).

    As floats the result alone would have 576 MiB.
    """
    pixels = np.random.default_rng(0).integers(0, 255, (1536, 2048, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", compress_level=0)
    words = ["--format", "tif", "--out", str(tmp_path / "sr"), str(tmp_path / "a.png")]
    done = subprocess.run([sys.executable, "-c", NEAREST, *words], cwd=REPO, capture_output=True, text=True)
    assert "1 of 1 images" in done.stdout, done.stderr
    assert float(done.stdout.split("used")[1]) < 144 + 36 + 400
    with Image.open(tmp_path / "a.png") as small, Image.open(tmp_path / "sr" / "a.tif") as large:
        assert np.array_equal(np.array(large)[::4, ::4], np.array(small))
