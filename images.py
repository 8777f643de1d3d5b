"""The one reader and writer of images: files of 8-bit RGB as (3, H, W) uint8, their sizes, folders of them by name."""
import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import runs

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


# Files

@contextlib.contextmanager
def open_image(path):
    """Pillow's image of a file. Raises UserError for a missing or damaged file, also where the pixels are read."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise runs.UserError(f"{path}: no such image") from None
    # all that Pillow raises for a damaged file
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # an errno is not the image's fault: permission, disk
        if getattr(error, "errno", None):
            raise
        raise runs.UserError(f"{path}: damaged image ({error}): fetch or make it again") from None


def image_size(path, only_rgb=False):
    """(width, height) from the file's header. only_rgb: raise UserError unless it is 8-bit RGB."""
    with open_image(path) as image:
        mode, size = image.mode, image.size
    if only_rgb:
        check_mode(path, mode)
    return size


def load_image(path):
    """An 8-bit RGB file as (3, H, W) uint8. Raises UserError for a damaged file and for grey, alpha or palette images.

    Pillow reads a 16-bit colour PNG as the upper bytes of its values.
    """
    with open_image(path) as image:
        mode = image.mode
        pixels = np.array(image) if mode == "RGB" else None
    check_mode(path, mode)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def save_image(path, image):
    """Write a (3, H, W) image as PNG: floats in [0, 1], which are clamped and rounded to 8 bit, or uint8."""
    if image.dtype != torch.uint8:
        image = image.clamp(0, 1).mul(255).round().byte()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
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

def check_mode(path, mode):
    if mode != "RGB":
        raise runs.UserError(f"{path}: image mode {mode}, expected 8-bit RGB: "
                             "convert it (Pillow: image.convert('RGB')) or remove it")


def check_size(path, size, original, need=0):
    """An image must be as large as its original, and at least `need` pixels wide and high."""
    if tuple(size) != tuple(original):
        raise runs.UserError(f"{path}: {size[0]}x{size[1]} pixels but its original has {original[0]}x{original[1]}: "
                             "make this quintuplet again")
    if min(size) < need:
        raise runs.UserError(f"{path}: {size[0]}x{size[1]} pixels, smaller than the {need}-pixel crop: "
                             f"use --crop/--load-size of at most {min(size) // 4 * 4}")


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

def list_images(folder):
    """{stem: path} of a folder's image files, sorted by name. Raises UserError if two share a stem or there is none."""
    files = {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir():
            if path.stem in files:
                raise runs.UserError(f"{path} and {files[path.stem].name}: two images of one name in {folder}: "
                                     "rename one")
            files[path.stem] = path
    if not files:
        raise runs.UserError(f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)}) directly in it "
                             "(folders inside it are not searched)")
    return files


def match_images(folder, stems, flag):
    """{stem: path} of a folder's images: <stem>.png, otherwise the one file <stem>_<anything>.png.

    Raises UserError, which names `flag`, where there is none or several. Any image suffix will do.
    """
    if not folder.is_dir():
        raise runs.UserError(f"{flag} {folder}: no such folder")
    files, matches = list_images(folder), {}
    for stem in stems:
        fitting = [files[stem]] if stem in files else [
            path for name, path in files.items() if stem == name.rpartition("_")[0]]
        if len(fitting) != 1:
            raise runs.UserError(f"{flag} {folder}: {len(fitting)} files for image {stem} "
                                 f"({', '.join(path.name for path in fitting) or 'none'}); "
                                 f"expected {stem}.png or {stem}_<anything>.png")
        matches[stem] = fitting[0]
    return matches


def find_realsr(root):
    """RealSR v3's x4 test pairs under `root`: {"<camera>_<name>": (LR path, HR path)}; {} if there are none.

    The files are <root>/<camera>/Test/4/<name>_LR4.png and <name>_HR.png.
    """
    pairs = {}
    for hr in sorted(Path(root).glob("*/Test/4/*_HR.png")):
        name = hr.name.removesuffix("_HR.png")
        lq = hr.with_name(f"{name}_LR4.png")
        if not lq.exists():
            raise runs.UserError(f"{lq}: missing, the LR image of {hr.name}: fetch RealSR v3 again")
        pairs[f"{hr.parts[-4]}_{name}"] = lq, hr
    return pairs
