"""The one reader and writer of images: their pixels, sizes, and folders of them by name.

What every script takes: one picture per file (not several pages or frames), at most one gigapixel, upright as EXIF says
it stands. load_image reads 8-bit RGB as (3, H, W) uint8, with Pillow. read_any reads grey and RGB of 8 and 16 bit, with
or without alpha, and the metadata, with libvips; upscale.py keeps all of it.
"""
import contextlib
import errno
import hashlib
import os
import re
import stat
import struct
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

import runs

# upscale.py needs it
pyvips = runs.Lazy("pyvips")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# CHOICE: pixels of an image; the header says how many there are
LARGEST = 10 ** 9
# Pillow's own limit, at which it warns, and twice as much, at which it stops: ours is in check_whole
Image.MAX_IMAGE_PIXELS = None
# what is done to the pixels of each EXIF orientation
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}
# a TIFF may hold RGB as YCbCr, as every JPEG does
RGB_MODES = ("RGB", "YCbCr")
# those that can be shown as 8-bit RGB without a choice of range
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGBA")


class ModeError(runs.UserError):
    """An image that is not 8-bit RGB."""


# Files

@contextlib.contextmanager
def open_image(path):
    """Pillow's image of a file, not yet upright. UserError for a missing or damaged file, also where it is decoded.

    UserError also for several frames and for more than LARGEST pixels.
    """
    try:
        with Image.open(path) as image:
            # the second picture of an MPO (phones write them) is a thumbnail or a map
            check_whole(path, image.size, 1 if image.format == "MPO" else getattr(image, "n_frames", 1))
            yield image
    except FileNotFoundError:
        raise runs.UserError(f"{path}: no such image") from None
    except runs.UserError:
        raise
    # all that Pillow raises for a damaged file
    except (OSError, SyntaxError, ValueError) as error:
        # an errno is not the image's fault: permission, disk
        if getattr(error, "errno", None):
            raise
        raise runs.UserError(f"{path}: damaged image ({error}): fetch or make it again") from None


def orientation(image):
    """EXIF's orientation of Pillow's image, 1 to 8. A header is enough, and libvips sees the same.

    1 for a TIFF, which Pillow turns by itself, for an EXIF block that is damaged, and for any other value.
    """
    exif = Image.Exif()
    with contextlib.suppress(SyntaxError, struct.error):
        exif.load(image.info.get("exif", b""))
    value = exif.get(ExifTags.Base.Orientation)
    return value if value in TURNS else 1


def decoded(image):
    """(H, W) or (H, W, C) uint8 array of Pillow's image, upright; YCbCr becomes RGB."""
    if image.mode == "YCbCr":
        image = image.convert("RGB")
    turn = TURNS.get(orientation(image))
    return np.array(image if turn is None else image.transpose(turn))


def image_size(path, only_rgb=False):
    """(width, height) of the upright image, from the file's header. only_rgb: UserError unless it is 8-bit RGB."""
    with open_image(path) as image:
        mode, size, turned = image.mode, image.size, orientation(image) >= 5
    if only_rgb:
        check_mode(path, mode)
    return size[::-1] if turned else size


def load_image(path, rgb=False):
    """An 8-bit RGB file as (3, H, W) uint8, upright. Raises UserError for a damaged file, grey, alpha and palette.

    rgb: convert those; transparency is dropped. Pillow reads a 16-bit colour PNG as the upper bytes of its values.
    """
    with open_image(path) as image:
        if rgb and image.mode in EIGHT_BIT_MODES:
            image = image.convert("RGB")
        check_mode(path, image.mode)
        pixels = decoded(image)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_any(path):
    """A file as a pyvips image, upright: grey or RGB, with or without alpha, 8 or 16 bit. UserError for other files."""
    check_name(path)
    if not path.is_file():
        raise runs.UserError(f"{path}: {'a link to a file that is not there' if path.is_symlink() else 'no file'}")
    try:
        if (image := by_pillow(path)) is not None:
            return image
        image = pyvips.Image.new_from_file(str(path), fail_on="error")
        pages = image.get("n-pages") if image.get_typeof("n-pages") else 1
        animated = image.get("vips-loader") == "pngload" and is_animated_png(path)
        check_whole(path, (image.width, image.height), 2 if animated else pages)
        if image.interpretation == "cmyk":
            image = image.icc_transform("srgb", embedded=True, input_profile="cmyk")
        # decodes the whole image, so that damage shows here
        image = image.autorot().copy_memory()
    except pyvips.Error as error:
        if not os.access(path, os.R_OK):
            raise runs.UserError(f"{path}: you may not read it") from None
        reason = (error.detail.strip().splitlines() or ["unreadable"])[0]
        raise runs.UserError(f"{path}: not a readable image ({reason})") from None
    known = image.interpretation in ("b-w", "grey16", "srgb", "rgb16", "rgb") and image.format in ("uchar", "ushort")
    if not known or image.bands - image.hasalpha() not in (1, 3):
        raise runs.UserError(f"{path}: {image.bands} bands of {image.format} ({image.interpretation}); "
                             "expected grey or RGB of 8 or 16 bit")
    return image


def by_pillow(path):
    """The pyvips image of a BMP, which libvips cannot read, or of a TIFF of which it shows YCbCr as RGB; else None."""
    try:
        with Image.open(path) as header:
            # PhotometricInterpretation and YCbCrSubSampling; where colours are subsampled libvips is right
            ycbcr = header.format == "TIFF" and (header.tag_v2.get(262), header.tag_v2.get(530)) == (6, (1, 1))
            if header.format != "BMP" and not ycbcr:
                return None
    except (OSError, SyntaxError, ValueError):
        # libvips reads more formats, and says what is wrong
        return None
    with open_image(path) as image:
        pixels = decoded(image.convert({"1": "L", "P": "RGB"}.get(image.mode, image.mode)))
        # of a file that does not say: libvips' own, a pixel per mm
        across, down = (dots / 25.4 for dots in image.info.get("dpi", (25.4, 25.4)))
        profile = image.info.get("icc_profile")
    image = pyvips.Image.new_from_array(pixels, interpretation="b-w" if pixels.ndim == 2 else "srgb")
    image = image.copy(xres=across, yres=down)
    if profile:
        image.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
    return image


def is_animated_png(path):
    """libvips reads the first frame of an animated PNG silently; its animation control chunk precedes the pixels."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
            if head[4:] == b"acTL":
                return True
            file.seek(int.from_bytes(head[:4]) + 4, 1)
    return False


def save_image(path, image):
    """Write a (3, H, W) image as PNG: floats in [0, 1], which are clamped and rounded to 8 bit, or uint8."""
    if image.dtype != torch.uint8:
        image = image.clamp(0, 1).mul(255).round().byte()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with runs.says_where(path):
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(path, format="PNG", compress_level=1)


def sample_hash(files):
    """16 hex digits that tell these files from others, from a little of each. files: {name: path}; order counts.

    A SHA-256 over every name, file size, and 256 bytes at the beginning, middle and end. A change elsewhere that keeps
    the size goes unnoticed: that is unlikely in a compressed file (PNG, JPEG), possible in a BMP.
    """
    def sample(name):
        with open(files[name], "rb") as file:
            size = file.seek(0, 2)
            parts = [(file.seek(at), file.read(256))[1] for at in (0, size // 2, max(0, size - 256))]
        return f"{name} {size} ".encode() + b"".join(parts)
    # file by file, and 16 digits, unlike runs.digest: atlases, packed sets and checkpoints hold it
    digest = hashlib.sha256()
    with ThreadPoolExecutor(8) as pool:
        for part in pool.map(sample, files):
            digest.update(part)
    return digest.hexdigest()[:16]


# Checks; all raise UserError. Sizes are (width, height)

def check_whole(path, size, frames):
    """size: (width, height)"""
    if size[0] * size[1] > LARGEST:
        raise runs.UserError(f"{path}: {size[0]}x{size[1]} pixels, more than the limit of one gigapixel: "
                             "cut it into parts")
    if frames > 1:
        raise runs.UserError(f"{path}: several pages or frames: save the one you want as a file of its own")


def check_mode(path, mode):
    if mode not in RGB_MODES:
        # of more than 8 bit Pillow cuts off what is above 255
        deep = mode.startswith(("I", "F"))
        how = "scale its values to 0 to 255" if deep else "convert it (Pillow: image.convert('RGB'))"
        raise ModeError(f"{path}: image mode {mode}, expected 8-bit RGB: {how} or remove it")


def check_size(path, size, original, need=0):
    """An image must be as large as its original, and at least `need` pixels wide and high."""
    if tuple(size) != tuple(original):
        raise runs.UserError(f"{path}: {size[0]}x{size[1]} pixels but its original has {original[0]}x{original[1]}: "
                             "make this quintuplet again")
    if min(size) < need:
        raise runs.UserError(f"{path}: {size[0]}x{size[1]} pixels, smaller than the {need} pixels that are "
                             f"read of it (--load-size, else --crop): use at most {min(size) // 8 * 8}")


def check_lr_size(path, size, hr_size):
    """An LR image must be a quarter of its original; pixels that do not divide are left out."""
    if size != (hr_size[0] // 4, hr_size[1] // 4):
        raise runs.UserError(f"{path}: {size[0]}x{size[1]} pixels, expected a quarter of its original's "
                             f"{hr_size[0]}x{hr_size[1]}")


# Parts

def cut_to_x4(image):
    """(..., H, W) -> its top left part with sides that are multiples of 4; a x4 LR image shows no more than that."""
    return image[..., :image.shape[-2] // 4 * 4, :image.shape[-1] // 4 * 4]


def crop_like(lq, where, size, scale=4):
    """The part of each whole LR image that belongs to its HR crop: (B, 3, size / scale, size / scale).

    lq: (B, 3, h, w); where: (B, 2) top and left of the HR crops, size: their side, in HR pixels and multiples of scale.
    """
    parts = [image[:, y // scale:(y + size) // scale, x // scale:(x + size) // scale]
             for image, (y, x) in zip(lq, where.tolist())]
    return torch.stack(parts)


# Folders

def nfc(name):
    """A name as it is compared: macOS writes letters and their accents as two characters, others as one."""
    return unicodedata.normalize("NFC", name)


def visible(paths):
    """Sorted, without hidden files: macOS leaves ._<name> beside every file on other file systems."""
    return sorted(path for path in paths if not path.name.startswith("."))


def is_no_file(path):
    """Is this a folder, a pipe, a device or a link to itself? Not a link to nothing: whoever reads it names it."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return True


def image_paths(folder):
    """The image files of a folder, sorted by name."""
    paths = [path for path in visible(Path(folder).iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
    return [path for path in paths if not is_no_file(path)]


def check_name(path):
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise runs.UserError(f"{shown}: its name is not UTF-8: rename it") from None


def list_images(folder):
    """{stem: path} of a folder's image files, sorted by name. Raises UserError if two share a stem or there is none."""
    files = {}
    for path in image_paths(folder):
        check_name(path)
        stem = nfc(path.stem)
        if stem in files:
            raise runs.UserError(f"{path} and {files[stem].name}: two images of one name in {folder}: rename one")
        files[stem] = path
    if not files:
        raise runs.UserError(f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)}) directly in it "
                             "(folders inside it are not searched)")
    return files


def without_scale(stem):
    """0001x4 -> 0001: low-resolution images of public sets are named so."""
    return re.sub(r"(?<=.)[_-]?[xX]4$", "", stem)


def match_images(folder, stems, flag):
    """{stem: path} of a folder's images: <stem>.png, otherwise the one file <stem>_<anything>.png.

    0001x4 and 0001 are one name. Raises UserError, which names `flag`, where there is none or several. Any image
    suffix will do.
    """
    if not folder.is_dir():
        raise runs.UserError(f"{flag} {folder}: no such folder")
    names = {without_scale(stem): stem for stem in stems} | {stem: stem for stem in stems}

    def owner(name):
        """The stem that a name, or its longest part before an underscore, is; None: of none."""
        while name and name not in names and without_scale(name) not in names:
            name = name.rpartition("_")[0]
        return names.get(name, names.get(without_scale(name)))
    files, matches, owned = list_images(folder), {}, {}
    for name, path in files.items():
        owned.setdefault(owner(name), []).append(path)
    for stem in stems:
        fitting = [files[stem]] if stem in files else owned.get(stem, [])
        if len(fitting) != 1:
            raise runs.UserError(f"{flag} {folder}: {len(fitting)} files for image {stem} "
                                 f"({', '.join(path.name for path in fitting) or 'none'}); "
                                 f"expected {stem}.png or {stem}_<anything>.png")
        matches[stem] = fitting[0]
    return matches


def find_pairs(lq_dir, gt_dir, lq_flag, gt_flag, remarks=True):
    """{stem: (LR path, reference path)} of a folder of LR images and one of references; gt_dir None: no references.

    The stems are those of the LR images; 0001x4.png and 0001.png are one name. remarks: print how many references have
    no LR image. Raises UserError for an LR image without a reference, and for two files that are one name. Sizes are
    compared by check_pairs.
    """
    for folder, flag in ((lq_dir, lq_flag), (gt_dir, gt_flag)):
        if folder and not Path(folder).is_dir():
            raise runs.UserError(f"{flag} {folder}: no such folder")
    images, references = list_images(lq_dir), list_images(gt_dir) if gt_dir else {}
    if not gt_dir:
        return {stem: (path, None) for stem, path in images.items()}
    # DIV2K's 0001x4.png belongs to 0001.png
    names = {stem: [stem] if stem in references else
             [name for name in references if without_scale(name) == without_scale(stem)] for stem in images}
    missing = [stem for stem, fitting in names.items() if not fitting]
    if missing:
        raise runs.UserError(f"{gt_flag} {gt_dir}: no reference for {len(missing)} of {len(images)} images, "
                             f"first {missing[0]}")
    users = {}
    for stem, fitting in names.items():
        pair = [references[name] for name in fitting] if len(fitting) > 1 else None
        pair = pair or [images[user] for user in (users.setdefault(fitting[0], stem), stem)]
        if pair[0] != pair[1]:
            raise runs.UserError(f"{pair[0]} and {pair[1].name}: two images of one name: remove one")
    unused = sorted(set(references) - set(users))
    if unused and remarks:
        print(f"remark: {len(unused)} references in {gt_flag} {gt_dir} have no image in {lq_flag} {lq_dir} "
              f"and are left out, first {unused[0]}")
    return {stem: (path, references[names[stem][0]]) for stem, path in images.items()}


def check_pairs(pairs, remarks=True):
    """UserError where an LR image is not a quarter of its reference, or one of them not 8-bit RGB; by their headers.

    pairs: as of find_pairs. References may have up to three rows and columns more, which cut_to_x4 removes: it is said.
    """
    for lq, reference in pairs.values():
        size = image_size(lq, only_rgb=True)
        if reference:
            check_lr_size(lq, size, image_size(reference, only_rgb=True))
    if remarks:
        remark_cut([reference for _, reference in pairs.values() if reference], "references")


def remark_cut(paths, what):
    """Say how many images are cut to multiples of 4."""
    cut = [path for path in paths if any(side % 4 for side in image_size(path))]
    if cut:
        print(f"remark: {len(cut)} of {len(paths)} {what} are cut to multiples of 4 pixels, "
              f"at the right and at the bottom, first {cut[0]}")


def find_realsr(root):
    """RealSR v3's x4 test pairs under `root`: {"<camera>_<name>": (LR path, HR path)}; {} if there are none.

    The files are <root>/<camera>/Test/4/<name>_LR4.png and <name>_HR.png.
    """
    pairs = {}
    for hr in visible(Path(root).glob("*/Test/4/*_HR.png")):
        name = hr.name.removesuffix("_HR.png")
        lq = hr.with_name(f"{name}_LR4.png")
        if not lq.exists():
            raise runs.UserError(f"{lq}: missing, the LR image of {hr.name}: fetch RealSR v3 again")
        pairs[f"{hr.parts[-4]}_{name}"] = lq, hr
    return pairs
