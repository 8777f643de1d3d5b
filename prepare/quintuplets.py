"""Build quintuplets: photographs, each with enhanced versions that compete as ground truths.

    python -m prepare.quintuplets --photos PHOTOS --enhancers W1.pth W2.pth W3.pth W4.pth --out datasets/mine

The photographs are shrunk, super-resolved by any x4 checkpoint that this repository can load, and brought back to their
size: that is version 01 for the first checkpoint, 02 for the second, ... Patches are cut as HGGT cut them. A photo is recorded
when all its patches are written, so a killed build continues where it was, and processes share the photos (torchrun).

    OUT/Train/images/<name of OUT>/{original,01,02,...}/        OUT/records/ one file per photo, OUT/quintuplets.json all of them
    OUT/contact.png     a few sets, with scores                 no labels: upos and smp need them, the other samplers do not

The demo set, from photographs that ship with scikit-image, is made by prepare.demo_set.
"""
import argparse
from pathlib import Path

import runs


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=runs.Help)
    g = p
    g.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make, or to continue")
    g.add_argument("--photos", type=Path, required=True, metavar="DIR", help="folder of photographs")
    g.add_argument("--enhancers", type=Path, required=True, nargs="+", metavar="FILE", help="x4 checkpoints, one per enhanced version (HGGT has four)")
    g.add_argument("--shrink", type=runs.number(float, 0, 1, above=True), default=0.75,
                   help="the enhancers see the photo reduced to this share of its sides (CHOICE, measured by experiment.py; .25: nine times "
                        "faster, but what they invent is then no longer what the photo shows)")
    g.add_argument("--soften", type=runs.number(float, 1, 4), default=1.0,
                   help="enlarge the photos by this factor first, for photos so sharp that nothing can be enhanced; 1: off")
    g.add_argument("--patch", type=runs.number(int, 32), default=512, help="side of a patch in pixels (HGGT)")
    g.add_argument("--step", type=runs.SIZE, help="pixels between neighbouring patches; default 9/16 of a patch, HGGT's 288 of 512")
    g.add_argument("--jitter", type=runs.COUNT, default=16, help="each patch is moved by up to so many pixels (HGGT)")
    g.add_argument("--min-std", type=runs.WEIGHT, default=30.0,
                   help="of the grey values; patches where no version has it are dropped (HGGT)")
    g.add_argument("--min-laplacian", type=runs.WEIGHT, default=30.0, help="variance of the Laplacian, likewise (HGGT)")
    g.add_argument("--min-change", type=runs.WEIGHT, default=1.0,
                   help="grey levels; sets where no version differs so much, on average, from both the original and what bicubic interpolation in "
                        "place of the network gives are dropped: nothing was enhanced (CHOICE)")
    g.add_argument("--similar", type=runs.number(float, 0, 1), default=0.8,
                   help="correlation of 48x48 thumbnails from which the second of two photos is dropped as a near-duplicate (CHOICE)")
    g.add_argument("--reward", default="ranker", help="quality model of the contact sheet's scores")
    g.add_argument("--seed", type=runs.COUNT, default=0, help="of the patches' jitter")
    g.add_argument("--tile", type=runs.TILE, default=256, help="LR tile of the enhancers in pixels, more than 128; 0: whole photo")
    g.add_argument("--tile-batch", type=runs.SIZE, default=1, help="tiles enhanced at a time")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    g.add_argument("--threads", type=runs.COUNT, default=0, help="CPU threads per process; 0: PyTorch's choice")
    args = p.parse_args(argv)
    args.step = args.step or args.patch * 9 // 16
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
from tqdm import tqdm

import archs
import data
import degradations
import iqa
from images import list_images, load_image, open_image, save_image
from prepare import verify
from prepare.demo_set import has_texture
from report import pictures


# Photographs of one's own

def read_photo(path, args):
    """-> ((3, H, W) float in [0, 1], "") or (None, why it is no use: "grey", "alpha or palette", "too small").

    ValueError for a damaged file. The camera's orientation is applied.
    """
    with open_image(path) as image:
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
                raise runs.UserError(f"--enhancers: {path} is the same file as {other['file']}: every version needs an enhancer of its own")
        nets[f"{k:02d}"], sources[f"{k:02d}"] = net.to(device), {"file": str(path), "sha256": digest, "arch": info["arch"]}
    return nets, sources


def survey(args, world):
    """Read every photo once. -> ({name: path} of the photos to use, {name: why} of those dropped). ValueError names the damaged ones.

    Of photos that show the same, mirrored or with up to 2 % cut off each side, the first is kept; with more cut off they may both be. Every
    photo is compared with every other: minutes for some thousands of them.
    """
    files = sorted(p for p in args.photos.iterdir() if p.is_file())
    listed = list_images(args.photos)
    mine, damaged = {}, []
    names = list(listed)
    for name in tqdm(names[world.rank::world.size], desc="reading photos", unit="photo", disable=not world.is_main):
        try:
            photo, problem = read_photo(listed[name], args)
        except ValueError as error:
            damaged.append(str(error))
            continue
        mine[name] = problem or verify.thumbnail((photo * 255).byte())[1]
    damaged = sorted(sum(world.gather_objects(damaged), []))
    if damaged:
        raise runs.UserError(f"{len(damaged)} damaged photos, first {damaged[0]}")
    found = {name: value for part in world.gather_objects(mine) for name, value in part.items()}
    images = set(listed.values())
    dropped = {path.name: "not an image" for path in files if path not in images}
    dropped |= {listed[name].name: found[name] for name in names if isinstance(found[name], str)}
    usable, kept = [name for name in names if not isinstance(found[name], str)], []
    if usable:
        details = np.stack([found[name] for name in usable])
        alike = verify.look_alike(details, details) >= args.similar
    for i, name in enumerate(usable):
        if alike[i, kept].any():
            dropped[listed[name].name] = "near-duplicate"
        else:
            kept.append(i)
    if not kept:
        raise runs.UserError(f"{args.photos}: no photo is left ({', '.join(f'{n} {why}' for why, n in Counter(dropped.values()).items())})")
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
            raise runs.UserError(f"{path}: enhancers {a} and {b} give the same picture: every version needs an enhancer of its own")
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
                runs.write_atomic(file, lambda temporary: save_image(temporary, patch))
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
        raise runs.UserError(f"{file}: damaged ({error}); remove it and run the same command again") from None


def build(args, world):
    """Make or continue the set args.out. -> what quintuplets.json holds, on rank 0."""
    if not args.photos.is_dir():
        raise runs.UserError(f"--photos {args.photos}: no such folder")
    nets, sources = load_enhancers(args.enhancers, world.device)
    keys = ("shrink", "soften", "tile", "patch", "step", "jitter", "min_std", "min_laplacian", "min_change", "similar", "seed")
    settings = {k: getattr(args, k) for k in keys} | {"overlap": archs.OVERLAP, "enhancers": {v: source["sha256"] for v, source in sources.items()}}
    records, started = args.out / "records", args.out / "records" / "settings.json"
    begun = (args.out / "Train").exists()                                         # else nothing was written that could be mixed up
    if started.exists():
        changed = runs.changes(read_record(started), settings)
        if changed and begun:
            raise runs.UserError(f"{args.out} was begun with other settings ({'; '.join(changed.values())}): choose another --out")
    elif args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise runs.UserError(f"{args.out} exists and was not made by this script: choose another --out")
    if world.is_main:
        runs.check_writable(args.out, "--out")
    reward = iqa.create_reward([args.reward], world.device)                       # of the contact sheet, which comes last: refuse a wrong one now
    photos, dropped_photos = survey(args, world)
    done = {file.stem.removeprefix("photo-"): read_record(file) for file in records.glob("photo-*.json") if begun}
    gone = sorted(set(done) - set(photos))
    other = [name for name, record in done.items() if name in photos and record["sha256"] != hashlib.sha256(photos[name].read_bytes()).hexdigest()]
    if gone or other:
        raise runs.UserError(f"{args.out} has patches of photos that {'are not used any more' if gone else 'have changed since'}: {', '.join((gone or other)[:5])}: "
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
        raise runs.UserError(f"{args.out}: no set is left ({', '.join(f'{n} {why}' for why, n in dropped.items() if n)}): "
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
        images = torch.stack([load_image(sets.path(stem, v)) for v in sets.versions])
        scores = [[reward(image[None].to(device).float() / 255).item() for image in images] for reward in rewards]
        told = ["  ".join(f"{s[i]:.1f}{' *' if s[i] == max(s) else ''}" for s in scores) for i in range(len(images))]
        cells.append([(image, f"{v}:  {t}") for image, v, t in zip(images, sets.versions, told)])
    runs.write_atomic(path, lambda temporary: pictures.save_grid(temporary, cells))


def main(args):
    world = runs.start_world(args.device, args.threads)
    try:
        result = build(args, world)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO):
            raise runs.UserError(f"{args.out}: {error.strerror}; what is there is whole, the same command continues") from None
        raise
    if result:
        print(f"{args.out}: {result['sets']} sets of {1 + len(args.enhancers)} versions, {args.patch} px, "
              f"from {sum(bool(r['sets']) for r in result['photos'].values())} photos")
        print("dropped: " + (", ".join(f"{n} {why}" for why, n in result["dropped"].items()) or "nothing"))
        print(f"look at {args.out / 'contact.png'}, then: python train.py --data {args.out} --sampler amo --arch compact --init W.pth (x4 weights to start from)")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
