"""Build quintuplets: photographs, each with enhanced versions that compete as ground truths.

    python make_quintuplets.py --photos PHOTOS --enhancers W1.pth W2.pth W3.pth W4.pth --out datasets/mine
    python make_quintuplets.py --demo [--out datasets/demo]     from photographs that ship with scikit-image, no download

Photographs of one's own are shrunk, super-resolved by any x4 checkpoint that this repository can load, and brought back to their
size: that is version 01 for the first checkpoint, 02 for the second, ... Patches are cut as HGGT cut them. A photo is recorded
when all its patches are written, so a killed build continues where it was, and processes share the photos (torchrun).

    OUT/Train/images/<name of OUT>/{original,01,02,...}/        OUT/records/ one file per photo, OUT/quintuplets.json all of them
    OUT/contact.png     a few sets, with scores                 no labels: upos and smp need them, the other samplers do not

The demo set stands in for HGGT on a machine that has neither data nor networks. Real photographs are a little soft and noisy,
and that is why enhanced versions can be better ground truths than the original; so here the original is a photograph that
was softened and noised, more in one place than in another (parameters below, recorded in quintuplets.json), and classical
restoration of fixed strength makes four versions of it: well (01), moderately (02), too strongly (03) and badly (04)
restored. None is best everywhere. The untouched photograph is kept beside the set, for full-reference scores only.

    OUT/Train/images/demo/{original,01,02,03,04}/
    OUT/Test/GT/demo/images/{original,01,...}/      OUT/Test/GT/demo/untouched/
    OUT/Test/Blind_Degradation_Benchmark_LQ/demo/Blind_LR/      x4 smaller, one fixed degradation per image
    OUT/quintuplets.json
"""
import argparse
import os
import shutil
from pathlib import Path

import flags

TRAIN_PHOTOS = ("astronaut", "motorcycle_left", "motorcycle_right", "rocket")     # the stereo pair shows one scene: same split
TEST_PHOTOS = ("chelsea", "coffee")
PATCH, TRAIN_STEP, TEST_STEP = 192, 128, 192                                      # CHOICE: pixels; training patches overlap
BLUR, NOISE = (0.2, 2.0), (0.5, 6.0)                                              # CHOICE: pixels, grey levels; from place to place
MEAN_BLUR, MEAN_NOISE = 1.2, 3.5                                                  # what the restorations assume everywhere
MIN_STD, MIN_LAPLACIAN = 12.0, 30.0                                               # of the demo's patches; HGGT's 30 is for 512 pixels
SEED = 0


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=flags.Help)
    p.add_argument("--demo", action="store_true", help="build the demo set")
    p.add_argument("--out", type=Path, default=Path("datasets/demo"), help="folder to make, or to continue; for --demo it must not exist")
    g = p.add_argument_group("photographs of one's own")
    g.add_argument("--photos", type=Path, metavar="DIR", help="folder of photographs")
    g.add_argument("--enhancers", type=Path, nargs="+", metavar="FILE", help="x4 checkpoints, one per enhanced version (HGGT has four)")
    g.add_argument("--shrink", type=flags.number(float, 0, 1, above=True), default=0.75,
                   help="the enhancers see the photo reduced to this share of its sides (CHOICE, measured by experiment.py; .25: nine times "
                        "faster, but what they invent is then no longer what the photo shows)")
    g.add_argument("--soften", type=flags.number(float, 1, 4), default=1.0,
                   help="enlarge the photos by this factor first, for photos so sharp that nothing can be enhanced; 1: off")
    g.add_argument("--patch", type=flags.number(int, 32), default=512, help="side of a patch in pixels (HGGT)")
    g.add_argument("--step", type=flags.SIZE, help="pixels between neighbouring patches; default 9/16 of a patch, HGGT's 288 of 512")
    g.add_argument("--jitter", type=flags.COUNT, default=16, help="each patch is moved by up to so many pixels (HGGT)")
    g.add_argument("--min-std", type=flags.WEIGHT, default=30.0,
                   help="of the grey values; patches where no version has it are dropped (HGGT)")
    g.add_argument("--min-laplacian", type=flags.WEIGHT, default=30.0, help="variance of the Laplacian, likewise (HGGT)")
    g.add_argument("--min-change", type=flags.WEIGHT, default=1.0,
                   help="grey levels; sets where no version differs so much, on average, from both the original and what bicubic interpolation in "
                        "place of the network gives are dropped: nothing was enhanced (CHOICE)")
    g.add_argument("--similar", type=flags.number(float, 0, 1), default=0.8,
                   help="correlation of 48x48 thumbnails from which the second of two photos is dropped as a near-duplicate (CHOICE)")
    g.add_argument("--reward", default="ranker", help="quality model of the contact sheet's scores")
    g.add_argument("--seed", type=flags.COUNT, default=0, help="of the patches' jitter")
    g.add_argument("--tile", type=flags.TILE, default=256, help="LR tile of the enhancers in pixels, more than 128; 0: whole photo")
    g.add_argument("--tile-batch", type=flags.SIZE, default=1, help="tiles enhanced at a time")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    g.add_argument("--threads", type=flags.COUNT, default=0, help="CPU threads per process; 0: PyTorch's choice")
    args = p.parse_args(argv)
    args.step = args.step or args.patch * 9 // 16
    if args.demo == (args.photos is not None):
        p.error("give either --demo or --photos DIR")
    if args.photos and not args.enhancers:
        p.error("--photos needs --enhancers: x4 checkpoints, one per enhanced version")
    if args.photos and args.out == p.get_default("out"):
        p.error("--photos needs --out DIR: where shall the set lie?")
    return args


ARGS = parse_args() if __name__ == "__main__" else None                           # --help needs no torch: seconds

import errno
import hashlib
import json
from collections import Counter
from itertools import combinations, product

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageOps
from scipy import ndimage
from skimage import color, filters, restoration
from skimage import data as photos
from tqdm import tqdm

import archs
import data
import degradations
import iqa
import runs


# The demo set


def load_photo(name):
    """One of scikit-image's colour photographs, (3, H, W) in [0, 1]."""
    if name.startswith("motorcycle"):
        pixels = photos.stereo_motorcycle()[name == "motorcycle_right"]
    else:
        pixels = getattr(photos, name)()
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


def smooth_field(rng, height, width, low, high):
    """(height, width) of values in [low, high] that change slowly over the image, as focus and light do."""
    field = F.interpolate(torch.from_numpy(rng.random((1, 1, 4, 5))), (height, width), mode="bicubic", align_corners=True)[0, 0]
    return low + (high - low) * (field - field.min()) / (field.max() - field.min())


def soften(photo, rng):
    """A photograph as a plain camera would have left it: blur and noise that differ from place to place. (3, H, W) -> same."""
    sigma = smooth_field(rng, *photo.shape[1:], *BLUR)                            # blur in pixels at every place
    levels = np.linspace(*BLUR, 6)
    blurred = [degradations.blur(photo[None], degradations.gaussian_kernel(15, s))[0] for s in levels]
    position = (sigma - levels[0]) / (levels[1] - levels[0])
    soft = sum(image * (1 - (position - i).abs()).clamp_min(0) for i, image in enumerate(blurred))    # between the two nearest levels
    noise = torch.from_numpy(rng.normal(0, 1, photo.shape)) * smooth_field(rng, *photo.shape[1:], *NOISE) / 255
    return degradations.to_8bit((soft + noise).float())


def restore(original):
    """{version: restored image}. Every version has one fixed strength, as an enhancement network has, whatever the place needs."""
    image = original.permute(1, 2, 0).numpy()
    sigma = MEAN_NOISE / 255
    clean = restoration.denoise_nl_means(image, patch_size=5, patch_distance=5, h=0.7 * sigma, sigma=sigma, channel_axis=2)
    luma = color.rgb2ycbcr(clean)                                                 # Y 16-235
    padded = np.pad(luma[..., 0], 16, mode="reflect") / 255
    luma[..., 0] = restoration.wiener(padded, degradations.gaussian_kernel(15, MEAN_BLUR), balance=0.02, clip=False)[16:-16, 16:-16] * 255
    versions = {"01": color.ycbcr2rgb(luma),                                      # denoised and deconvolved for the mean blur and noise
                "02": filters.unsharp_mask((3 * clean + image) / 4, radius=1.0, amount=0.4, channel_axis=2),
                "03": filters.unsharp_mask(clean, radius=2.0, amount=2.0, channel_axis=2),       # halos where the photo was sharp
                "04": ndimage.median_filter(image, size=(5, 5, 1))}               # texture gone, then JPEG blocks
    result = {v: degradations.to_8bit(torch.from_numpy(pixels.astype(np.float32))).permute(2, 0, 1) for v, pixels in versions.items()}
    result["04"] = degradations.to_8bit(degradations.jpeg(result["04"][None], 30.0, table="libjpeg")[0])
    return result


def has_texture(patch, min_std=MIN_STD, min_laplacian=MIN_LAPLACIAN):
    """Is there something to learn in it? Standard deviation of grey and variance of its Laplacian, in grey levels (HGGT)."""
    grey = color.rgb2gray(patch.permute(1, 2, 0).numpy()) * 255
    return grey.std() >= min_std and ndimage.laplace(grey).var() >= min_laplacian


def build_demo(out):
    """Write the demo set under `out`; deterministic. The folder appears under its name only when it is complete."""
    if out.exists():
        raise ValueError(f"{out} exists: remove it to build the demo set again")
    runs.check_writable(out.parent, "--out")
    work = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        record = write_demo(work)
        try:
            work.rename(out)
        except OSError:
            if not out.is_dir():                                                  # else another process was faster, with the same files
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return record


def write_demo(work):
    """Patches of the demo's photographs and their restorations, in HGGT's layout under `work`. -> what quintuplets.json records."""
    record = {"seed": SEED, "patch": PATCH, "blur_sigma_pixels": BLUR, "noise_sigma_grey_levels": NOISE, "photos": {}}
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
                        data.save_image(folder / version / f"{data.file_stem(stem, version)}.png", image[patch])
                    if split == "Test":
                        data.save_image(base / "untouched" / f"{stem}.png", photo[patch])
                        lq = degradations.degrade(original[patch][None], "two-round", [runs.sample_seed(SEED, 0, kept, name)],
                                                  [runs.sample_seed(SEED, 1, kept, name)])[0]
                        data.save_image(work / "Test" / "Blind_Degradation_Benchmark_LQ" / "demo" / "Blind_LR" / f"{stem}.png", lq)
                    kept += 1
            record["photos"][name] = {"split": split, "source": f"skimage.data.{name}", "patches": kept}
    runs.save_json(work / "quintuplets.json", record)
    return record


# Photographs of one's own

def read_photo(path, args):
    """-> ((3, H, W) float in [0, 1], "") or (None, why it is no use: "grey", "alpha or palette", "too small").

    ValueError for a damaged file. The camera's orientation is applied.
    """
    with data.open_image(path) as image:
        if image.mode in ("L", "1", "I", "F", "LA") or image.mode.startswith("I;"):
            return None, "grey"
        if image.mode != "RGB":
            return None, "alpha, palette or CMYK"
        pixels = np.array(ImageOps.exif_transpose(image))
    if (np.ptp(pixels.astype(np.int16), axis=2) <= 2).all():
        return None, "grey"
    photo = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    if args.soften > 1:
        size = [round(n * args.soften) for n in photo.shape[1:]]
        photo = degradations.to_8bit(F.interpolate(photo[None], size, mode="bicubic", align_corners=False).clamp(0, 1))[0]
    if min(photo.shape[1:]) < args.patch:
        return None, "too small"
    return photo, ""


def corners(height, width, patch, step, jitter, seed):
    """HGGT's cropper: (row, column) of every patch, on a grid of `step` and moved by up to `jitter` pixels each, inside the photo."""
    rng, found = np.random.default_rng(seed), []
    for row in range(0, height - patch + 1, step):
        for column in range(0, width - patch + 1, step):
            moved = rng.integers(-jitter, jitter + 1, size=2) + (row, column)
            found.append(tuple(int(v) for v in moved.clip(0, (height - patch, width - patch))))
    return found


def enhance(photo, net, args):
    """(3, H, W) -> the same size: shrunk to args.shrink of its sides, super-resolved x4, brought back; 8-bit values."""
    size = photo.shape[1:]
    reduced = [max(1, round(n * args.shrink)) for n in size]
    small = F.interpolate(photo[None], reduced, mode="bicubic", align_corners=False, antialias=True)
    sr = archs.upscale_tiled(net, small.clamp(0, 1), tile=args.tile, batch=args.tile_batch).clamp(0, 1)
    if sr.shape[2:] != size:
        sr = F.interpolate(sr, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    return degradations.to_8bit(sr)[0]


def load_enhancers(paths, device):
    """-> ({version: net}, {version: {"file", "sha256", ...}}). ValueError for another scale and for a checkpoint given twice."""
    nets, sources = {}, {}
    for k, path in enumerate(paths, 1):
        net, info = archs.load_x4(path, "--enhancers")
        digest = hashlib.sha256(Path(info["file"]).read_bytes()).hexdigest()
        for version, other in sources.items():
            if other["sha256"] == digest:
                raise ValueError(f"--enhancers: {path} is the same file as {other['file']}: every version needs an enhancer of its own")
        nets[f"{k:02d}"], sources[f"{k:02d}"] = net.to(device), {"file": str(path), "sha256": digest, "arch": info["arch"]}
    return nets, sources


def survey(args, world):
    """Read every photo once. -> ({name: path} of the photos to use, {name: why} of those dropped). ValueError names the damaged ones.

    Of photos that show the same, mirrored or with up to 2 % cut off each side, the first is kept; with more cut off they may both be. Every
    photo is compared with every other: minutes for some thousands of them.
    """
    files = sorted(p for p in args.photos.iterdir() if p.is_file())
    listed = data.list_images(args.photos)
    mine, damaged = {}, []
    names = list(listed)
    for name in tqdm(names[world.rank::world.size], desc="reading photos", unit="photo", disable=not world.is_main):
        try:
            photo, problem = read_photo(listed[name], args)
        except ValueError as error:
            damaged.append(str(error))
            continue
        mine[name] = problem or data.thumbnail((photo * 255).byte())[1]
    damaged = sorted(sum(world.gather_objects(damaged), []))
    if damaged:
        raise ValueError(f"{len(damaged)} damaged photos, first {damaged[0]}")
    found = {name: value for part in world.gather_objects(mine) for name, value in part.items()}
    images = set(listed.values())
    dropped = {path.name: "not an image" for path in files if path not in images}
    dropped |= {listed[name].name: found[name] for name in names if isinstance(found[name], str)}
    usable, kept = [name for name in names if not isinstance(found[name], str)], []
    if usable:
        details = np.stack([found[name] for name in usable])
        alike = data.look_alike(details, details) >= args.similar
    for i, name in enumerate(usable):
        if alike[i, kept].any():
            dropped[listed[name].name] = "near-duplicate"
        else:
            kept.append(i)
    if not kept:
        raise ValueError(f"{args.photos}: no photo is left ({', '.join(f'{n} {why}' for why, n in Counter(dropped.values()).items())})")
    return {usable[i]: listed[usable[i]] for i in kept}, dropped


@torch.no_grad()
def build_photo(name, path, nets, args, device):
    """Write the patches of one photo and their enhanced versions. -> its record."""
    photo = read_photo(path, args)[0]
    versions = {"original": photo} | {v: enhance(photo.to(device), net, args).cpu() for v, net in nets.items()}
    resized = enhance(photo.to(device), lambda x: F.interpolate(x, scale_factor=4, mode="bicubic"), args).cpu()        # enhanced by no network
    record = {"photo": name, "source": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "sets": [],
              "dropped": {"flat": 0, "not enhanced": 0}}
    folder, places = image_folder(args.out), corners(*photo.shape[1:], args.patch, args.step, args.jitter, runs.sample_seed(args.seed, 0, 0, name))
    runs.save_json(args.out / "records" / f"begun-{name}.json", [f"{name}-{row}-{column}" for row, column in places])
    for a, b in combinations(nets, 2):
        if torch.equal(versions[a], versions[b]):
            raise ValueError(f"{path}: enhancers {a} and {b} give the same picture: every version needs an enhancer of its own")
    for row, column in places:
        cut = lambda image: image[:, row:row + args.patch, column:column + args.patch]
        patches = {v: cut(image) for v, image in versions.items()}
        change = lambda v: 255 * min((patches[v] - other).abs().mean() for other in (patches["original"], cut(resized)))
        if not any(has_texture(patch, args.min_std, args.min_laplacian) for patch in patches.values()):
            record["dropped"]["flat"] += 1
        elif max(map(change, nets)) < args.min_change:
            record["dropped"]["not enhanced"] += 1
        else:
            stem = f"{name}-{row}-{column}"
            record["sets"].append(stem)
            for version, patch in patches.items():
                file = folder / version / f"{data.file_stem(stem, version)}.png"
                runs.write_atomic(file, lambda temporary: data.save_image(temporary, patch))
    return record


def image_folder(out):
    """Train/images/<any name>: the one that is there, or a new one."""
    there = [p for p in (out / "Train" / "images").glob("*") if p.is_dir()]
    return there[0] if len(there) == 1 else out / "Train" / "images" / "photos"


def remove_unfinished(args, done):
    """Patches of photos that were interrupted go, so that nothing stays of a photo that is not used any more or has changed."""
    for marker in (args.out / "records").glob("begun-*.json"):
        if marker.stem.removeprefix("begun-") not in done:
            for stem, folder in product(read_record(marker), image_folder(args.out).glob("*")):
                for ending in (".png", ".png.tmp"):
                    (folder / (data.file_stem(stem, folder.name) + ending)).unlink(missing_ok=True)
        marker.unlink()


def read_record(file):
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: damaged ({error}); remove it and run the same command again") from None


def build(args, world):
    """Make or continue the set args.out. -> what quintuplets.json holds, on rank 0."""
    if not args.photos.is_dir():
        raise FileNotFoundError(f"--photos {args.photos}: no such folder")
    nets, sources = load_enhancers(args.enhancers, world.device)
    keys = ("shrink", "soften", "tile", "patch", "step", "jitter", "min_std", "min_laplacian", "min_change", "similar", "seed")
    settings = {k: getattr(args, k) for k in keys} | {"overlap": archs.OVERLAP, "enhancers": {v: source["sha256"] for v, source in sources.items()}}
    records, started = args.out / "records", args.out / "records" / "settings.json"
    begun = (args.out / "Train").exists()                                         # else nothing was written that could be mixed up
    if started.exists():
        changed = runs.changes(read_record(started), settings)
        if changed and begun:
            raise ValueError(f"{args.out} was begun with other settings ({'; '.join(changed.values())}): choose another --out")
    elif args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} exists and was not made by this script: choose another --out")
    if world.is_main:
        runs.check_writable(args.out, "--out")
    reward = iqa.create_reward([args.reward], world.device)                       # of the contact sheet, which comes last: refuse a wrong one now
    photos, dropped_photos = survey(args, world)
    done = {file.stem.removeprefix("photo-"): read_record(file) for file in records.glob("photo-*.json") if begun}
    gone = sorted(set(done) - set(photos))
    other = [name for name, record in done.items() if name in photos and record["sha256"] != hashlib.sha256(photos[name].read_bytes()).hexdigest()]
    if gone or other:
        raise ValueError(f"{args.out} has patches of photos that {'are not used any more' if gone else 'have changed since'}: {', '.join((gone or other)[:5])}: "
                         "restore them, or choose another --out")
    world.barrier()
    if world.is_main:
        remove_unfinished(args, done)
        runs.save_json(started, settings)
    world.barrier()
    todo = [name for name in photos if name not in done]
    for name in tqdm(todo[world.rank::world.size], desc="enhancing", unit="photo", disable=not world.is_main):
        runs.save_json(records / f"photo-{name}.json", build_photo(name, photos[name], nets, args, world.device))
        (records / f"begun-{name}.json").unlink()
    world.barrier()
    if not world.is_main:
        return None
    done, dropped = [read_record(records / f"photo-{name}.json") for name in photos], Counter(dropped_photos.values())
    for record in done:
        dropped.update({f"{why} patches": n for why, n in record["dropped"].items()})
    result = {"settings": settings, "enhancers": sources, "dropped": +dropped, "dropped_photos": dropped_photos, "sets": sum(len(r["sets"]) for r in done),
              "photos": {r["photo"]: r for r in done}, **runs.describe_machine()}
    if not result["sets"]:
        raise ValueError(f"{args.out}: no set is left ({', '.join(f'{n} {why}' for why, n in dropped.items() if n)}): "
                         "see --min-std, --min-laplacian, --min-change and --soften")
    runs.save_json(args.out / "quintuplets.json", result)
    sets = data.find_sets(args.out, "Train")
    contact_sheet(args.out / "contact.png", sets, sets.stems, [reward], world.device)
    return result


@torch.no_grad()
def contact_sheet(path, sets, stems, rewards, device, rows=6):
    """PNG of a few of the sets `stems`, every version with its scores; * marks the best of each reward."""
    cells = []
    for stem in stems[::max(1, len(stems) // rows)][:rows]:
        images = torch.stack([data.load_image(sets.path(stem, v)) for v in sets.versions])
        scores = [[reward(image[None].to(device).float() / 255).item() for image in images] for reward in rewards]
        told = ["  ".join(f"{s[i]:.1f}{' *' if s[i] == max(s) else ''}" for s in scores) for i in range(len(images))]
        cells.append([(image, f"{v}:  {t}") for image, v, t in zip(images, sets.versions, told)])
    runs.write_atomic(path, lambda temporary: data.save_grid(temporary, cells))


def main(args):
    if args.demo:
        record = build_demo(args.out)
        counts = {split: sum(p["patches"] for p in record["photos"].values() if p["split"] == split) for split in ("Train", "Test")}
        print(f"{args.out}: {counts['Train']} training and {counts['Test']} test quintuplets of {PATCH} px "
              f"from {len(record['photos'])} photographs")
        return
    world = runs.start_world(args.device, args.threads)
    try:
        result = build(args, world)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO):
            raise OSError(f"{args.out}: {error.strerror}; what is there is whole, the same command continues") from None
        raise
    if result:
        print(f"{args.out}: {result['sets']} sets of {1 + len(args.enhancers)} versions, {args.patch} px, "
              f"from {sum(bool(r['sets']) for r in result['photos'].values())} photos")
        print("dropped: " + (", ".join(f"{n} {why}" for why, n in result["dropped"].items()) or "nothing"))
        print(f"look at {args.out / 'contact.png'}, then: python train.py --data {args.out} --sampler amo --arch compact --init W.pth (x4 weights to start from)")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
