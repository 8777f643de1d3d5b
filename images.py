"""The one reader and writer of images: files of 8-bit RGB as (3, H, W) uint8, folders of them by name."""
import contextlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import runs

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@contextlib.contextmanager
def open_image(path):
    """Pillow's image of a file; what is read from it inside the `with` may be damaged too. ValueError for a damaged file."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise runs.UserError(f"{path}: no such image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow's ways to say damaged
        # not the image's fault: permission, disk
        if getattr(error, "errno", None):
            raise
        raise runs.UserError(f"{path}: damaged image ({error}): fetch or make it again") from None


def image_size(path):
    """(width, height) from the file's header."""
    with open_image(path) as image:
        return image.size


def load_image(path):
    """An 8-bit RGB file as (3, H, W) uint8. ValueError for a damaged file and for grey, alpha or palette images.

    Pillow reads a 16-bit colour PNG as the upper bytes of its values.
    """
    with open_image(path) as image:
        mode = image.mode
        pixels = np.array(image) if mode == "RGB" else None
    check_mode(path, mode)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def check_mode(path, mode):
    if mode != "RGB":
        raise runs.UserError(f"{path}: image mode {mode}, expected 8-bit RGB: convert it (Pillow: image.convert('RGB')) or remove it")


def save_image(path, image):
    """(3, H, W) in [0, 1] (rounded to 8 bit) or uint8 -> PNG."""
    if image.dtype != torch.uint8:
        image = image.clamp(0, 1).mul(255).round().byte()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(path, format="PNG", compress_level=1)


def cut_to_x4(image):
    """(..., H, W) -> the top left of it, sides multiples of 4: what has a x4 LR image."""
    return image[..., :image.shape[-2] // 4 * 4, :image.shape[-1] // 4 * 4]


def list_images(folder):
    """{stem: path} of a folder's image files, sorted by name. ValueError when two files share a stem or there is none."""
    found = {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir():
            if path.stem in found:
                raise runs.UserError(f"{path} and {found[path.stem].name}: two images of one name in {folder}: rename one")
            found[path.stem] = path
    if not found:
        raise runs.UserError(f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)}) directly in it (folders inside it are not searched)")
    return found


def match_images(folder, stems, flag):
    """{stem: file} of a folder: <stem>.png, else the one file <stem>_<anything>.png. FileNotFoundError or ValueError where there is none or several; flag named in it."""
    if not folder.is_dir():
        raise runs.UserError(f"{flag} {folder}: no such folder")
    found, files = list_images(folder), {}
    for stem in stems:
        fits = [found[stem]] if stem in found else [path for name, path in found.items() if stem == name.rpartition("_")[0]]
        if len(fits) != 1:
            raise runs.UserError(f"{flag} {folder}: {len(fits)} files for image {stem} ({', '.join(p.name for p in fits) or 'none'}); expected {stem}.png or {stem}_<anything>.png")
        files[stem] = fits[0]
    return files
