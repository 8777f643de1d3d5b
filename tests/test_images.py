"""images.py: one contract of all scripts for what an image file is: upright, modes, formats, size; names in folders."""
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import runs
from images import image_size, load_image, read_any

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"
ORIENTATION = 0x0112


@pytest.fixture
def photo():
    """(24, 36, 3) uint8, smooth, so that JPEG changes little"""
    y, x = np.mgrid[:24, :36]
    return np.stack([6 * x, 9 * y, 100 + 0 * x], 2).astype(np.uint8)


def exif(value):
    block = Image.Exif()
    block[ORIENTATION] = value
    return block


def read_vips(path):
    """(3, H, W) uint8 of an RGB file, as upscale.py reads it"""
    return torch.from_numpy(read_any(path).numpy()).permute(2, 0, 1)


@pytest.mark.fast
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
def test_all_readers_see_the_same_upright_image(photo, tmp_path, suffix):
    """All eight orientations; the right value is that of the file turned by hand."""
    from PIL import ImageOps
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    for value in range(1, 9):
        path = tmp_path / f"{value}{suffix}"
        image = Image.fromarray(photo)
        image.save(path, exif=exif(value), **options)
        image.getexif()[ORIENTATION] = value
        right = torch.from_numpy(np.array(ImageOps.exif_transpose(image))).permute(2, 0, 1)
        for seen in (load_image(path), read_vips(path)):
            assert seen.shape == right.shape and (seen.int() - right.int()).abs().max() <= (4 if options else 0), value
        assert image_size(path, only_rgb=True) == (right.shape[2], right.shape[1])


@pytest.mark.fast
@pytest.mark.parametrize("block", [b"Exif\0\0garbage", b"", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM"])
def test_a_damaged_exif_block_turns_nothing(photo, tmp_path, block):
    Image.fromarray(photo).save(tmp_path / "a.jpg", exif=block)
    assert load_image(tmp_path / "a.jpg").shape == (3, 24, 36) and image_size(tmp_path / "a.jpg") == (36, 24)
    assert read_any(tmp_path / "a.jpg").width == 36


@pytest.mark.fast
def test_more_than_a_gigapixel_is_refused_by_the_header_and_less_is_not(tmp_path, monkeypatch):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def header(width, height):
        size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    (tmp_path / "huge.png").write_bytes(header(40_000, 30_000))
    for read in (load_image, image_size, read_any):
        with pytest.raises(runs.UserError, match="huge.png: 40000x30000 pixels, more than the limit of one gigapixel"):
            read(tmp_path / "huge.png")
    # a scan of 250 megapixels, at which Pillow alone warns or stops
    (tmp_path / "scan.png").write_bytes(header(25_000, 10_000))
    assert image_size(tmp_path / "scan.png") == (25_000, 10_000)


@pytest.mark.fast
@pytest.mark.parametrize("suffix", [".webp", ".png", ".tif"])
def test_several_frames_are_refused_by_all(photo, tmp_path, suffix):
    frames = [Image.fromarray(np.roll(photo, k, 0)) for k in range(2)]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    for read in (load_image, image_size, read_any):
        with pytest.raises(runs.UserError, match="several pages or frames"):
            read(tmp_path / f"a{suffix}")


@pytest.mark.fast
def test_the_second_picture_of_a_phones_jpeg_is_left_out(photo, tmp_path):
    frames = [Image.fromarray(image) for image in (photo, photo[::2, ::2])]
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.jpg").shape == (3, 24, 36) and read_any(tmp_path / "a.jpg").width == 36


@pytest.mark.skipif(not CASES.exists(), reason="no ../shared/cases")
def test_the_scores_of_a_turned_photograph(tmp_path, script):
    """Network and metrics give a rotated file and its upright copy the same scores."""
    import json
    (tmp_path / "lq").mkdir()
    (tmp_path / "lq" / "turned.jpg").write_bytes((CASES / "exif6.jpg").read_bytes())
    with Image.open(CASES / "exif6.jpg") as image:
        image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "lq" / "upright.png")
    script("evaluate.py", "--lq", "lq", "--metrics", "ranker", "piqe", "--out-json", "a.json", "--device", "cpu",
           cwd=tmp_path)
    scores = json.loads((tmp_path / "a.json").read_text())["scores"]["bicubic"]
    assert scores["turned"] == scores["upright"]


@pytest.mark.fast
def test_a_training_sample_is_upright(photo, tmp_path):
    import data
    Image.fromarray(photo).save(tmp_path / "a.png", exif=exif(6))
    dataset = data.TrainingSet(data.find_photos(tmp_path), "orig", lambda *words: 0, 1, 1, 16)
    assert data.check_headers(dataset, runs.World(0, 1, torch.device("cpu"))) == {"a": (24, 36)}
    assert dataset.sample(1, 0)["original"].shape == (3, 36, 24)


@pytest.mark.fast
def test_the_page_shows_a_turned_photograph_upright(photo, tmp_path):
    import base64
    import io

    from report import page
    Image.fromarray(photo).save(tmp_path / "a.jpg", exif=exif(8))
    shown = Image.open(io.BytesIO(base64.b64decode(page.encode(tmp_path / "a.jpg").partition(",")[2])))
    assert shown.size == (24, 36)


@pytest.mark.fast
def test_a_tiff_in_ycbcr_is_rgb_to_all_readers(photo, tmp_path):
    image = Image.fromarray(photo).convert("YCbCr")
    image.save(tmp_path / "a.tif")
    right = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(load_image(tmp_path / "a.tif"), right) and torch.equal(read_vips(tmp_path / "a.tif"), right)
    assert image_size(tmp_path / "a.tif", only_rgb=True) == (36, 24)


@pytest.mark.fast
def test_a_tiff_in_subsampled_ycbcr(tmp_path):
    """Of one colour, written by hand: no library at hand writes it without JPEG."""
    luma, *chroma = Image.new("RGB", (1, 1), (200, 40, 90)).convert("YCbCr").getpixel((0, 0))
    pixels = bytes([*[luma] * 4, *chroma]) * 64
    tags = [(256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 6), (273, 4, 1, 140),
            (277, 3, 1, 3), (278, 3, 1, 16), (279, 4, 1, len(pixels)), (530, 3, 2, 2 | 2 << 16)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries
                                     + struct.pack("<IHHH", 0, 8, 8, 8) + pixels)
    colours = read_any(tmp_path / "a.tif").numpy()[..., :3].astype(int)
    assert colours.shape == (16, 16, 3) and abs(colours - (200, 40, 90)).max() <= 2
