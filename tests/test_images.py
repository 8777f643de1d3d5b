"""images.py: one contract of all scripts for what an image file is: upright, modes, formats, size; names in folders."""
import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import runs
from images import find_pairs, find_realsr, image_size, list_images, load_image, match_images, read_any, save_image

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
    shown = Image.open(io.BytesIO(base64.b64decode(page.encode(load_image(tmp_path / "a.jpg")))))
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


# Names

def touch(folder, *names):
    """Small images of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        save_image(folder / name, torch.zeros(3, 16, 16))


@pytest.mark.fast
def test_sidecars_and_hidden_files_are_skipped_everywhere(tmp_path):
    """macOS puts ._<name> beside every file on other file systems, and __MACOSX into archives."""
    import data
    import upscale
    from dpo import candidates
    from prepare import quintuplets, verify
    touch(tmp_path / "lq", "a.png", "b.jpg")
    for name in ("._a.png", "._b.jpg", ".hidden.png"):
        (tmp_path / "lq" / name).write_bytes(b"\0\5\x16\7 AppleDouble")
    names = ["a", "b"]
    assert list(list_images(tmp_path / "lq")) == data.find_photos(tmp_path / "lq").stems == names
    assert [path.stem for path in upscale.find_images([str(tmp_path / "lq")])] == names
    assert list(candidates.find_items(tmp_path / "lq", None)) == names
    report = verify.Report()
    assert list(verify.list_files(tmp_path / "lq", report)) == names and not report.defects
    args = SimpleNamespace(photos=tmp_path / "lq", soften=1, patch=32, similar=0.9)
    with pytest.raises(runs.UserError, match=r"no photo is left \(2 grey\)"):
        quintuplets.survey(args, runs.World(0, 1, torch.device("cpu")))
    touch(tmp_path / "RealSR" / "Canon" / "Test" / "4", "x_HR.png", "x_LR4.png", "._x_HR.png")
    assert list(find_realsr(tmp_path / "RealSR")) == ["Canon_x"]


@pytest.mark.fast
def test_folders_that_macos_adds_to_archives_are_no_second_set(quintuplets, tmp_path):
    import data
    shutil.copytree(quintuplets, tmp_path / "set")
    for folder in ("Train/__MACOSX/images/0-6/original", "Train/.Trash/images/0-6/original"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    for path in list((tmp_path / "set").rglob("*.*")):
        (path.parent / f"._{path.name}").write_bytes(b"\0")
    assert len(data.find_sets(tmp_path / "set", "Train").stems) == 6
    assert data.find_sets(tmp_path / "set", "Train").labels().shape == (6, 5)


@pytest.mark.fast
def test_names_match_after_nfc_and_two_that_become_one_are_named(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    touch(tmp_path / "lq", f"{apart}.png")
    touch(tmp_path / "gt", f"{composed}.png")
    assert list(list_images(tmp_path / "lq")) == list(list_images(tmp_path / "gt")) == [composed]
    assert match_images(tmp_path / "lq", [composed], "--gt-dir")[composed].stem == apart
    touch(tmp_path / "gt", f"{apart}.png")
    with pytest.raises(runs.UserError, match=f"{composed}.png and {apart}.png: two images of one name"):
        list_images(tmp_path / "gt")
    import upscale
    paths = sorted((tmp_path / "gt").iterdir())
    with pytest.raises(runs.UserError, match="would both become"):
        upscale.find_targets(paths, tmp_path / "sr", None)


@pytest.mark.fast
def test_labels_are_found_by_either_spelling(quintuplets, tmp_path):
    import unicodedata

    import data
    shutil.copytree(quintuplets, tmp_path / "set")
    for path in list((tmp_path / "set").rglob("photo0-0-0*")):
        if path.suffix == ".json":
            path.write_text(path.read_text().replace("photo0", "cafe\u0301"))
        path.rename(path.with_name(unicodedata.normalize("NFD", path.name.replace("photo0", "caf\u00e9"))))
    sets = data.find_sets(tmp_path / "set", "Train")
    assert sets.stems[0] == "caf\u00e9-0-0" and sets.labels().shape == (6, 5)


@pytest.mark.fast
def test_a_name_that_is_not_utf8_is_named(tmp_path, photo):
    import os
    folder = os.fsencode(tmp_path / "lq")
    os.mkdir(folder)
    touch(tmp_path / "lq", "a.png")
    os.rename(folder + b"/a.png", folder + b"/caf\xe9.png")
    path, = (tmp_path / "lq").iterdir()
    for read in (lambda: list_images(tmp_path / "lq"), lambda: read_any(path)):
        with pytest.raises(runs.UserError, match=r"lq/caf\\xe9.png: its name is not UTF-8: rename it") as error:
            read()
        str(error.value).encode()


@pytest.mark.fast
def test_low_resolution_names_of_public_sets_match(tmp_path):
    touch(tmp_path / "lq", "0001x4.png", "0002X4.png", "b_x4.png", "c-x4.png", "x4.png", "0003x4_sr.png", "0003.png")
    files = match_images(tmp_path / "lq", ["0001", "0002x4", "b", "c", "x4", "0003"], "--gt-dir")
    assert [path.name for path in files.values()] == ["0001x4.png", "0002X4.png", "b_x4.png", "c-x4.png", "x4.png",
                                                      "0003.png"]
    touch(tmp_path / "sr", "0001x4_net.png")
    assert match_images(tmp_path / "sr", ["0001"], "--images")["0001"].name == "0001x4_net.png"
    # as BasicSR names its outputs; an image's own name may go on with an underscore
    touch(tmp_path / "basicsr", "0002_SwinIR_x4.png", "a_net_g_5000.png", "a_b_net_g_5000.png")
    files = match_images(tmp_path / "basicsr", ["0002x4", "a", "a_b"], "--images")
    assert [path.name for path in files.values()] == ["0002_SwinIR_x4.png", "a_net_g_5000.png", "a_b_net_g_5000.png"]
    for stem in ("001", "0001x", "x40001"):
        with pytest.raises(runs.UserError, match="0 files for image"):
            match_images(tmp_path / "sr", [stem], "--images")


def find_pairs_of(script, folder, capsys):
    """(names, sizes of the references that a script compares with, its remarks) of folder/lq and folder/gt."""
    import data
    from dpo import candidates
    from selfsup import finetune
    if script == "dpo":
        items = candidates.open_images(folder / "pool", runs.World(0, 1, torch.device("cpu")),
                                       {"lq_dir": folder / "lq", "gt_dir": folder / "gt"}, "pool")
        pairs = {name: item["refs"][0] for name, item in items.items()}
    else:
        sets, pairs = finetune.open_images(folder / "lq", folder / "gt", 4, True)
        assert isinstance(sets, data.Sets) and sets.stems == list(pairs)
    # a pool keeps copies, selfsup.finetune cuts what it reads
    return list(pairs), [image_size(path) for path in pairs.values()], capsys.readouterr().out


@pytest.mark.fast
@pytest.mark.parametrize("script", ["dpo", "selfsup"])
def test_methods_read_two_folders_as_evaluate_does(script, tmp_path, capsys):
    for name, height, width in (("0001", 43, 53), ("caf\u00e9", 40, 48), ("9", 40, 40)):
        save_image(tmp_path / "gt" / f"{name}.png", torch.rand(3, height, width))
    save_image(tmp_path / "lq" / "0001x4.png", torch.rand(3, 10, 13))
    save_image(tmp_path / "lq" / "cafe\u0301.png", torch.rand(3, 10, 12))
    for folder in ("lq", "gt"):
        (tmp_path / folder / "._0001x4.png").write_bytes(b"\0")
    names, sizes, said = find_pairs_of(script, tmp_path, capsys)
    assert names == ["0001x4", "caf\u00e9"] and sizes == [(52, 40) if script == "dpo" else (53, 43), (48, 40)]
    assert said.count("remark: 1 references in --gt-dir") == said.count("are left out, first 9") == 1
    assert said.count("remark: 1 of 2 references are cut to multiples of 4 pixels") == 1
    save_image(tmp_path / "lq" / "0001.png", torch.rand(3, 10, 13))
    (tmp_path / "pool").exists() and shutil.rmtree(tmp_path / "pool")
    with pytest.raises(runs.UserError, match="0001.png and 0001x4.png: two images of one name"):
        find_pairs_of(script, tmp_path, capsys)
    save_image(tmp_path / "lq" / "0001.png", torch.rand(3, 11, 13))
    (tmp_path / "lq" / "0001x4.png").unlink()
    with pytest.raises(runs.UserError, match="0001.png: 13x11 pixels, expected a quarter of its original's 53x43"):
        find_pairs_of(script, tmp_path, capsys)
    Image.new("L", (13, 10)).save(tmp_path / "lq" / "0001.png")
    with pytest.raises(runs.UserError, match="0001.png: image mode L, expected 8-bit RGB"):
        find_pairs_of(script, tmp_path, capsys)


@pytest.mark.fast
@pytest.mark.parametrize("value", [0, 9, 255])
def test_an_orientation_that_does_not_exist_turns_nothing(photo, tmp_path, value):
    Image.fromarray(photo).save(tmp_path / "a.png", exif=exif(value))
    assert image_size(tmp_path / "a.png") == (36, 24) and load_image(tmp_path / "a.png").shape == (3, 24, 36)
    assert read_vips(tmp_path / "a.png").shape == (3, 24, 36)


@pytest.mark.fast
def test_one_name_for_several_files_of_two_folders(tmp_path):
    touch(tmp_path / "gt", "a.png", "ax4.png", "b.png")
    touch(tmp_path / "lq", "a.png", "ax4.png", "b_x4.png")
    pairs = find_pairs(tmp_path / "lq", tmp_path / "gt", "--lq", "--gt")
    assert {name: gt.name for name, (_, gt) in pairs.items()} == {"a": "a.png", "ax4": "ax4.png", "b_x4": "b.png"}
    (tmp_path / "lq" / "a.png").rename(tmp_path / "lq" / "a_X4.png")
    with pytest.raises(runs.UserError, match="gt/a.png and ax4.png: two images of one name"):
        find_pairs(tmp_path / "lq", tmp_path / "gt", "--lq", "--gt")
    with pytest.raises(runs.UserError, match="--gt .*nowhere: no such folder"):
        find_pairs(tmp_path / "lq", tmp_path / "nowhere", "--lq", "--gt")
