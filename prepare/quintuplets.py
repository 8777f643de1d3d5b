"""Build quintuplets: photographs, each with enhanced versions that compete as ground truths.

    python -m prepare.quintuplets --photos PHOTOS --enhancers W1.pth W2.pth W3.pth W4.pth --out datasets/mine

The photographs are shrunk, super-resolved by any x4 checkpoint that this repository can load, and brought back to their
size: that is version 01 for the first checkpoint, 02 for the second, ... Patches are cut as HGGT cut them. A photo is
recorded when all its patches are written, so a killed build continues where it was, and processes share the photos
(torchrun).

    OUT/Train/images/photos/{original,01,02,...}/
    OUT/records/            one file per photo; OUT/quintuplets.json has them all
    OUT/contact.png         a few sets, with scores

There are no labels: the samplers upos and smp need them, the others do not. prepare.demo_set makes the demo set from
photographs that ship with scikit-image.
"""
from pathlib import Path

import runs


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make, or to continue")
    p.add_argument("--photos", type=Path, required=True, metavar="DIR", help="folder of photographs")
    p.add_argument("--enhancers", type=runs.CHECKPOINT, required=True, nargs="+", metavar="FILE",
                   help="x4 checkpoints or public names (python -m prepare.weights list), one per enhanced version "
                        "(HGGT has four)")
    p.add_argument("--shrink", type=runs.number(float, 0, 1, above=True), default=0.75,
                   help="the enhancers see the photo reduced to this share of its sides (CHOICE, measured by "
                        "experiments.samplers; 0.25 is nine times faster, but the enhancers then invent content that "
                        "the photo does not show)")
    p.add_argument("--soften", type=runs.number(float, 1, 4), default=1.0,
                   help="enlarge the photos by this factor first, for photos so sharp that nothing can be enhanced; "
                        "1: off")
    p.add_argument("--patch", type=runs.number(int, 32), default=512, help="side of a patch in pixels (HGGT)")
    p.add_argument("--step", type=runs.SIZE,
                   help="pixels between neighbouring patches; default 9/16 of a patch, HGGT's 288 of 512")
    p.add_argument("--jitter", type=runs.COUNT, default=16, help="each patch is moved by up to so many pixels (HGGT)")
    p.add_argument("--min-std", type=runs.WEIGHT, default=30.0,
                   help="standard deviation of grey; patches where no version has so much are dropped (HGGT)")
    p.add_argument("--min-laplacian", type=runs.WEIGHT, default=30.0,
                   help="variance of the Laplacian of grey, likewise (HGGT's number; CHOICE: of its signed values, see "
                        "prepare.demo_set)")
    p.add_argument("--min-change", type=runs.WEIGHT, default=1.0,
                   help="grey levels; a set is dropped, as not enhanced, unless one version differs by so much, on "
                        "average, both from the original and from bicubic interpolation in place of the network "
                        "(CHOICE)")
    p.add_argument("--similar", type=runs.number(float, 0, 1), default=0.8,
                   help="the second of two photos is dropped as a near-duplicate from this correlation of 48x48 "
                        "thumbnails (CHOICE)")
    p.add_argument("--reward", default="ranker", help="quality model of the contact sheet's scores")
    p.add_argument("--seed", type=runs.COUNT, default=0, help="of the patches' jitter")
    p.add_argument("--tile", type=runs.TILE, default=256,
                   help="LR tile of the enhancers in pixels, more than 128; 0: whole photo")
    p.add_argument("--tile-batch", type=runs.SIZE, default=1, help="tiles enhanced at a time")
    p.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32",
                   help="of the enhancers; bf16 keeps weights, last convolution and blending in fp32")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    p.add_argument("--threads", type=runs.COUNT, default=0, help="CPU threads per process; 0: PyTorch's choice")
    args = p.parse_args(argv)
    args.step = args.step or args.patch * 9 // 16
    return args


# before the imports that take seconds, so that --help answers at once
ARGS = parse_args() if __name__ == "__main__" else None

import errno
import json
import sys
from collections import Counter
from functools import partial
from itertools import combinations, product

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import archs
import data
import degradations
import iqa
from images import RGB_MODES, decoded, list_images, load_image, open_image, save_image, visible
from prepare import verify
from prepare.demo_set import has_texture
from report import pictures


def read_photo(path, args):
    """-> ((3, H, W) float in [0, 1], "") or (None, reason): "grey", "alpha, palette or CMYK", "too small".

    UserError for a damaged file. The camera's orientation is applied.
    """
    with open_image(path) as image:
        if image.mode in ("L", "1", "I", "F", "LA") or image.mode.startswith("I;"):
            return None, "grey"
        if image.mode not in RGB_MODES:
            return None, "alpha, palette or CMYK"
        pixels = decoded(image)
    if (np.ptp(pixels.astype(np.int16), axis=2) <= 2).all():
        return None, "grey"
    photo = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    if args.soften > 1:
        size = [round(n * args.soften) for n in photo.shape[1:]]
        larger = F.interpolate(photo[None], size, mode="bicubic", align_corners=False)
        photo = degradations.to_8bit(larger.clamp(0, 1))[0]
    if min(photo.shape[1:]) < args.patch:
        return None, "too small"
    return photo, ""


def corners(height, width, patch, step, jitter, seed):
    """As HGGT's cropper: (row, column) of every patch, on a grid of `step` and moved by up to `jitter` pixels each.

    CHOICE: the grid begins at 0, where HGGT draws a beginning, and a patch that is moved out of the photo is moved
    back, where HGGT drops it.
    """
    rng, places = np.random.default_rng(seed), []
    for row in range(0, height - patch + 1, step):
        for column in range(0, width - patch + 1, step):
            moved = rng.integers(-jitter, jitter + 1, size=2) + (row, column)
            places.append(tuple(int(v) for v in moved.clip(0, (height - patch, width - patch))))
    return places


def enhance(photo, net, args):
    """(3, H, W) -> the same size: shrunk to args.shrink of its sides, super-resolved x4, brought back; 8-bit values."""
    size = photo.shape[1:]
    reduced = [max(1, round(n * args.shrink)) for n in size]
    small = F.interpolate(photo[None], reduced, mode="bicubic", align_corners=False, antialias=True)
    sr = archs.upscale_tiled(net, small.clamp(0, 1), tile=args.tile, batch=args.tile_batch).clamp(0, 1)
    if sr.shape[2:] != size:
        sr = F.interpolate(sr, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    return degradations.to_8bit(sr)[0]


def load_enhancers(paths, device, precision):
    """-> {version: net}, {version: {"file", "sha256", "arch"}}.

    UserError for another scale than x4 and for a checkpoint that is given twice.
    """
    nets, sources = {}, {}
    for k, path in enumerate(paths, 1):
        net, info = archs.load_x4(path, "--enhancers")
        digest = runs.sha256(Path(info["file"]))
        for other in sources.values():
            if other["sha256"] == digest:
                raise runs.UserError(f"--enhancers: {path} is the same file as {other['file']}: "
                                     "every version needs an enhancer of its own")
        version = f"{k:02d}"
        nets[version] = archs.ready(net, device, precision)
        sources[version] = {"file": str(path), "sha256": digest, "arch": info["arch"]}
    return nets, sources


def survey(args, world):
    """Read every photo once. -> {name: path} of the photos to use, {file name: reason} of those dropped.

    UserError names the first damaged one. Of photos that show the same, mirrored or with up to 2 % cut off each side,
    the first is kept; with more cut off both may be kept. Every photo is compared with every other: minutes for some
    thousands of them.
    """
    paths = list_images(args.photos)
    names = list(paths)
    # thumbnails of this process's photos, and the reasons why photos are not used
    thumbnails, problems, damaged = {}, {}, []
    for name in tqdm(names[world.rank::world.size], desc="reading photos", unit="photo",
                     disable=None if world.is_main else True):
        try:
            photo, problem = read_photo(paths[name], args)
        except runs.UserError as error:
            damaged.append(str(error))
            continue
        if problem:
            problems[name] = problem
        else:
            thumbnails[name] = verify.thumbnail((photo * 255).byte())[1]
    damaged = sorted(sum(world.gather_objects(damaged), []))
    if damaged:
        raise runs.UserError(f"{len(damaged)} damaged photos, first {damaged[0]}")
    thumbnails = {name: value for part in world.gather_objects(thumbnails) for name, value in part.items()}
    problems = {name: reason for part in world.gather_objects(problems) for name, reason in part.items()}

    images = set(paths.values())
    files = [path for path in visible(args.photos.iterdir()) if path.is_file()]
    dropped = {path.name: "not an image" for path in files if path not in images}
    dropped |= {paths[name].name: problems[name] for name in names if name in problems}
    usable, kept = [name for name in names if name in thumbnails], []
    if usable:
        details = np.stack([thumbnails[name] for name in usable])
        alike = verify.look_alike(details, details) >= args.similar
    for i, name in enumerate(usable):
        if alike[i, kept].any():
            dropped[paths[name].name] = "near-duplicate"
        else:
            kept.append(i)
    if not kept:
        hint = f"; --patch {args.patch} may be less" if "too small" in dropped.values() else ""
        raise runs.UserError(f"{args.photos}: no photo is left ({counted(Counter(dropped.values()))}){hint}")
    return {usable[i]: paths[usable[i]] for i in kept}, dropped


def counted(numbers):
    """{name: n} as text, without zeros."""
    return ", ".join(f"{n} {name}" for name, n in numbers.items() if n)


@torch.no_grad()
def build_photo(name, path, nets, args, device):
    """Write the patches of one photo and their enhanced versions. -> its record."""
    photo = read_photo(path, args)[0]
    versions = {"original": photo}
    versions |= {version: enhance(photo.to(device), net, args).cpu() for version, net in nets.items()}
    # with interpolation in place of a network
    resized = enhance(photo.to(device), partial(F.interpolate, scale_factor=4, mode="bicubic"), args).cpu()
    record = {"photo": name, "source": path.name, "sha256": runs.sha256(path), "sets": [],
              "dropped": {"flat": 0, "not enhanced": 0}}
    folder, seed = image_folder(args.out), runs.sample_seed(args.seed, 0, 0, name)
    places = corners(*photo.shape[1:], args.patch, args.step, args.jitter, seed)
    runs.save_json(args.out / "records" / f"begun-{name}.json", [f"{name}-{row}-{column}" for row, column in places])
    for a, b in combinations(nets, 2):
        if torch.equal(versions[a], versions[b]):
            raise runs.UserError(f"{path}: enhancers {a} and {b} give the same picture: "
                                 "every version needs an enhancer of its own")
    for row, column in places:
        window = slice(None), slice(row, row + args.patch), slice(column, column + args.patch)
        patches = {version: image[window] for version, image in versions.items()}
        references = patches["original"], resized[window]
        change = max(min((patches[version] - other).abs().mean() for other in references) for version in nets)
        if not any(has_texture(patch, args.min_std, args.min_laplacian) for patch in patches.values()):
            record["dropped"]["flat"] += 1
        elif 255 * change < args.min_change:
            record["dropped"]["not enhanced"] += 1
        else:
            stem = f"{name}-{row}-{column}"
            record["sets"].append(stem)
            for version, patch in patches.items():
                file = folder / version / f"{data.file_stem(stem, version)}.png"
                runs.write_atomic(file, partial(save_image, image=patch))
    return record


def image_folder(out):
    """Train/images/<any name>: the folder that exists, or a new one."""
    folders = [p for p in (out / "Train" / "images").glob("*") if p.is_dir()]
    return folders[0] if len(folders) == 1 else out / "Train" / "images" / "photos"


def remove_unfinished(args, done):
    """Remove the patches of photos that were interrupted: such a photo may have changed or may not be used any more."""
    for marker in (args.out / "records").glob("begun-*.json"):
        if marker.stem.removeprefix("begun-") not in done:
            for stem, folder in product(read_record(marker), image_folder(args.out).glob("*")):
                for ending in (".png", ".png.tmp"):
                    (folder / (data.file_stem(stem, folder.name) + ending)).unlink(missing_ok=True)
        marker.unlink()


def read_record(file):
    """One of the JSON files in OUT/records. UserError if it is damaged."""
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise runs.UserError(f"{file}: damaged ({error}); remove it and run the same command again") from None


def build(args, world):
    """Make or continue the set args.out. -> the content of quintuplets.json, on rank 0."""
    if not args.photos.is_dir():
        raise runs.UserError(f"--photos {args.photos}: no such folder")
    nets, sources = load_enhancers(args.enhancers, world.device, args.precision)
    keys = ("shrink", "soften", "tile", "patch", "step", "jitter", "min_std", "min_laplacian", "min_change", "similar",
            "seed", "precision")
    settings = {key: getattr(args, key) for key in keys} | {"overlap": archs.OVERLAP}
    settings["enhancers"] = {version: source["sha256"] for version, source in sources.items()}
    records, started = args.out / "records", args.out / "records" / "settings.json"
    # else nothing was written that could be mixed up
    begun = (args.out / "Train").exists()
    if started.exists():
        # earlier commits had fp32 alone
        changed = runs.changes({"precision": "fp32"} | read_record(started), settings)
        if changed and begun:
            raise runs.UserError(f"{args.out} was begun with other settings ({'; '.join(changed.values())}): "
                                 "choose another --out")
    elif args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise runs.UserError(f"{args.out} exists and was not made by this script: choose another --out")
    if world.is_main:
        runs.check_writable(args.out, "--out")
    # of the contact sheet, which comes last: refuse a wrong one now
    reward = iqa.create_reward([args.reward], world.device, local="")
    remark = runs.precision_remark(world.device, args.precision, next(iter(sources.values()))["arch"])
    if world.is_main and remark:
        print(remark, file=sys.stderr)
    photos, dropped_photos = survey(args, world)
    done = {file.stem.removeprefix("photo-"): read_record(file) for file in records.glob("photo-*.json") if begun}
    gone = sorted(set(done) - set(photos))
    altered = [name for name, record in done.items()
               if name in photos and record["sha256"] != runs.sha256(photos[name])]
    if gone or altered:
        problem = "are not used any more" if gone else "have changed since"
        raise runs.UserError(f"{args.out} has patches of photos that {problem}: {', '.join((gone or altered)[:5])}: "
                             "restore them, or choose another --out")
    world.barrier()
    if world.is_main:
        # of a build that wrote no patch, perhaps with other settings
        for file in [] if begun else [*records.glob("photo-*.json")]:
            file.unlink()
        remove_unfinished(args, done)
        runs.save_json(started, settings)
    world.barrier()
    todo = [name for name in photos if name not in done]
    for name in tqdm(todo[world.rank::world.size], desc="enhancing", unit="photo",
                     disable=None if world.is_main else True):
        runs.save_json(records / f"photo-{name}.json", build_photo(name, photos[name], nets, args, world.device))
        (records / f"begun-{name}.json").unlink()
    world.barrier()
    if not world.is_main:
        return None
    done, dropped = [read_record(records / f"photo-{name}.json") for name in photos], Counter(dropped_photos.values())
    for record in done:
        dropped.update({f"{reason} patches": n for reason, n in record["dropped"].items()})
    result = {"settings": settings, "enhancers": sources, "dropped": +dropped, "dropped_photos": dropped_photos,
              "sets": sum(len(record["sets"]) for record in done),
              "photos": {record["photo"]: record for record in done}, **runs.describe_machine()}
    if not result["sets"]:
        raise runs.UserError(f"{args.out}: no set is left ({counted(dropped)}): "
                             "see --min-std, --min-laplacian, --min-change and --soften")
    runs.save_json(args.out / "quintuplets.json", result)
    sets = data.find_sets(args.out, "Train", packed=False)
    contact_sheet(args.out / "contact.png", sets, sets.stems, [reward], world.device, names_of(sources))
    return result


def names_of(sources):
    """{version: name of its network's file} of the "enhancers" in quintuplets.json."""
    return {version: Path(source["file"]).stem for version, source in sources.items()}


@torch.no_grad()
def contact_sheet(path, sets, stems, rewards, device, names, rows=6):
    """PNG of a few of the sets `stems`, every version with its network and scores; * marks the best of each reward.

    names: {version: name of its network}
    """
    cells = []
    for stem in stems[::max(1, len(stems) // rows)][:rows]:
        images = torch.stack([load_image(sets.path(stem, version)) for version in sets.versions])
        scores = [[reward(image[None].to(device).float() / 255).item() for image in images] for reward in rewards]
        texts = ["  ".join(f"{row[i]:.1f}{' *' if row[i] == max(row) else ''}" for row in scores)
                 for i in range(len(images))]
        titles = [f"{version} {names.get(version, '')}".strip() for version in sets.versions]
        cells.append([(image, f"{title}\n{text}") for image, title, text in zip(images, titles, texts)])
    runs.write_atomic(path, lambda temporary: pictures.save_grid(temporary, cells))


def main(args):
    world = runs.start_world(args.device, args.threads)
    try:
        result = build(args, world)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO):
            raise runs.UserError(f"{args.out}: {error.strerror}; all files in it are whole, "
                                 "the same command continues") from None
        raise
    if result:
        used = sum(bool(record["sets"]) for record in result["photos"].values())
        print(f"{args.out}: {result['sets']} sets of {1 + len(args.enhancers)} versions, {args.patch} px, "
              f"from {used} photos")
        print(f"dropped: {counted(result['dropped']) or 'nothing'}")
        print(f"look at {args.out / 'contact.png'}, then: python train.py --data {args.out} --sampler amo "
              "--arch compact --init W.pth (x4 weights to start from)")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
