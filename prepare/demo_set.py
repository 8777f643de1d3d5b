"""The demo set: quintuplets from photographs that ship with scikit-image, no download.

    python -m prepare.demo_set [--out datasets/demo]

It stands in for HGGT on a machine that has neither data nor networks. Real photographs are a little soft and noisy, and
that is why enhanced versions can be better ground truths than the original. So here the original is a photograph that
was softened and noised, more in one place than in another (parameters below, recorded in quintuplets.json). Classical
restoration of fixed strength makes four versions of it: well (01), moderately (02), too strongly (03) and badly (04)
restored. None is best everywhere. The untouched photograph is kept beside the set, for full-reference scores only.

    OUT/Train/images/demo/{original,01,02,03,04}/
    OUT/Test/GT/demo/images/{original,01,...}/      OUT/Test/GT/demo/untouched/
    OUT/Test/Blind_Degradation_Benchmark_LQ/demo/Blind_LR/      x4 smaller, one fixed degradation per image
    OUT/quintuplets.json
"""
import os
import shutil
from pathlib import Path

import runs

# the stereo pair shows one scene, so both are in one split
TRAIN_PHOTOS = ("astronaut", "motorcycle_left", "motorcycle_right", "rocket")
TEST_PHOTOS = ("chelsea", "coffee")
# CHOICE: pixels; training patches overlap
PATCH, TRAIN_STEP, TEST_STEP = 192, 128, 192
# CHOICE: pixels, grey levels; they vary over the image
BLUR, NOISE = (0.2, 2.0), (0.5, 6.0)
# the values that the restorations assume everywhere
MEAN_BLUR, MEAN_NOISE = 1.2, 3.5
# of the demo's patches; HGGT's 30 is for 512 pixels
MIN_STD, MIN_LAPLACIAN = 12.0, 30.0
SEED = 0


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--out", type=Path, default=Path("datasets/demo"), help="folder to make; it must not exist")
    return p.parse_args(argv)


# before the imports that take seconds, so that --help answers at once
ARGS = parse_args() if __name__ == "__main__" else None

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage import color, filters, restoration
from skimage import data as photos

import degradations
from data import file_stem
from images import save_image


def load_photo(name):
    """One of scikit-image's colour photographs, (3, H, W) in [0, 1]."""
    if name.startswith("motorcycle"):
        pixels = photos.stereo_motorcycle()[name == "motorcycle_right"]
    else:
        pixels = getattr(photos, name)()
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


def smooth_field(rng, height, width, low, high):
    """(height, width) of values in [low, high] that change slowly over the image, as focus and light do."""
    coarse = torch.from_numpy(rng.random((1, 1, 4, 5)))
    field = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0, 0]
    return low + (high - low) * (field - field.min()) / (field.max() - field.min())


def soften(photo, rng):
    """A photograph as a plain camera would have left it: blur and noise that vary over the image. (3, H, W) -> same."""
    # blur in pixels at every place, between the two nearest of six levels
    sigma = smooth_field(rng, *photo.shape[1:], *BLUR)
    levels = np.linspace(*BLUR, 6)
    blurred = [degradations.blur(photo[None], degradations.gaussian_kernel(15, s))[0] for s in levels]
    position = (sigma - levels[0]) / (levels[1] - levels[0])
    soft = sum(image * (1 - (position - i).abs()).clamp_min(0) for i, image in enumerate(blurred))
    noise = torch.from_numpy(rng.normal(0, 1, photo.shape)) * smooth_field(rng, *photo.shape[1:], *NOISE) / 255
    return degradations.to_8bit((soft + noise).float())


def restore(original):
    """{version: restored image}. Every version has one fixed strength, as an enhancement network has."""
    image = original.permute(1, 2, 0).numpy()
    sigma = MEAN_NOISE / 255
    clean = restoration.denoise_nl_means(image, patch_size=5, patch_distance=5, h=0.7 * sigma, sigma=sigma,
                                         channel_axis=2)
    # Y from 16 to 235
    ycbcr = color.rgb2ycbcr(clean)
    padded = np.pad(ycbcr[..., 0], 16, mode="reflect") / 255
    sharp = restoration.wiener(padded, degradations.gaussian_kernel(15, MEAN_BLUR), balance=0.02, clip=False)
    ycbcr[..., 0] = sharp[16:-16, 16:-16] * 255
    # 01: denoised and deconvolved for the mean blur and noise; 02: sharpened; 03: halos where the photo was sharp;
    # 04: texture gone, then JPEG blocks
    versions = {"01": color.ycbcr2rgb(ycbcr),
                "02": filters.unsharp_mask((3 * clean + image) / 4, radius=1.0, amount=0.4, channel_axis=2),
                "03": filters.unsharp_mask(clean, radius=2.0, amount=2.0, channel_axis=2),
                "04": ndimage.median_filter(image, size=(5, 5, 1))}
    result = {version: degradations.to_8bit(torch.from_numpy(pixels.astype(np.float32))).permute(2, 0, 1)
              for version, pixels in versions.items()}
    result["04"] = degradations.to_8bit(degradations.jpeg(result["04"][None], 30.0, table="libjpeg")[0])
    return result


def has_texture(patch, min_std=MIN_STD, min_laplacian=MIN_LAPLACIAN):
    """Is there something to learn in it? As HGGT's rule: standard deviation of grey and variance of its Laplacian.

    CHOICE: of its signed values; HGGT's call of OpenCV cuts negative ones to 0, which leaves about 0.4 of that.
    """
    grey = color.rgb2gray(patch.permute(1, 2, 0).numpy()) * 255
    return grey.std() >= min_std and ndimage.laplace(grey).var() >= min_laplacian


def build_demo(out):
    """Write the demo set under `out`; deterministic. The folder appears under its name only when it is complete.

    -> the content of quintuplets.json.
    """
    if out.exists():
        raise runs.UserError(f"{out} exists: remove it to build the demo set again")
    runs.check_writable(out.parent, "--out")
    work = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        record = write_demo(work)
        try:
            work.rename(out)
        except OSError:
            # else another process was faster, with the same files
            if not out.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return record


def write_demo(work):
    """Patches of the demo's photographs and their restorations, in HGGT's layout under `work`. -> quintuplets.json"""
    record = {"seed": SEED, "patch": PATCH, "blur_sigma_pixels": BLUR, "noise_sigma_grey_levels": NOISE, "photos": {}}
    lq_folder = work / "Test" / "Blind_Degradation_Benchmark_LQ" / "demo" / "Blind_LR"
    for split, names, step in (("Train", TRAIN_PHOTOS, TRAIN_STEP), ("Test", TEST_PHOTOS, TEST_STEP)):
        base = work / "Train" if split == "Train" else work / "Test" / "GT" / "demo"
        folder = base / "images" / "demo" if split == "Train" else base / "images"
        for name in names:
            rng = np.random.default_rng(runs.sample_seed(SEED, 0, len(record["photos"]), "photo"))
            photo = load_photo(name)
            original = soften(photo, rng)
            images = {"original": original, **restore(original)}
            kept = 0
            for row in range(0, photo.shape[1] - PATCH + 1, step):
                for column in range(0, photo.shape[2] - PATCH + 1, step):
                    patch = (slice(None), slice(row, row + PATCH), slice(column, column + PATCH))
                    if not has_texture(photo[patch]):
                        continue
                    stem = f"{name}-{row}-{column}"
                    for version, image in images.items():
                        save_image(folder / version / f"{file_stem(stem, version)}.png", image[patch])
                    if split == "Test":
                        save_image(base / "untouched" / f"{stem}.png", photo[patch])
                        seeds = [[runs.sample_seed(SEED, stream, kept, name)] for stream in (0, 1)]
                        lq = degradations.degrade(original[patch][None], "two-round", *seeds)[0]
                        save_image(lq_folder / f"{stem}.png", lq)
                    kept += 1
            record["photos"][name] = {"split": split, "source": f"skimage.data.{name}", "patches": kept}
    runs.save_json(work / "quintuplets.json", record | runs.describe_machine())
    return record


def main(args):
    record = build_demo(args.out)
    counts = {split: sum(photo["patches"] for photo in record["photos"].values() if photo["split"] == split)
              for split in ("Train", "Test")}
    print(f"{args.out}: {counts['Train']} training and {counts['Test']} test quintuplets of {PATCH} px "
          f"from {len(record['photos'])} photographs")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
