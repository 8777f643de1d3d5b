"""Apply a network to images: files, folders or patterns, of any size.

    python upscale.py --weights runs/swinir-amo photo.jpg                          writes sr/photo.jpg
    python upscale.py --weights realesrgan-x4plus photo.jpg                        a name of prepare.weights
    python upscale.py --weights W.pth --out big scans 'more/*.tif'                 a folder, a pattern
    python upscale.py --lora runs/swinir-amo+musiq --scale 0.7 photo.jpg           an adapter, at 0.7 of its strength

Architecture, size and factor come from the checkpoint. Written are PNG, JPEG, WebP, TIFF and BMP. Kept: grey, 16 bit
(PNG, TIFF), transparency (enlarged bicubically), ICC profile, EXIF, XMP, IPTC, resolution. Photographs that EXIF calls
rotated come out upright; CMYK comes out as sRGB. Tiles overlap and are blended. If an image cannot be read or written,
the script says so, does the others, and ends with exit code 1. torchrun shares the images over its processes.
"""
from pathlib import Path

import runs

# options of libvips' savers
FORMATS = {".png": {"compression": 6}, ".jpg": {"Q": 95}, ".jpeg": {"Q": 95}, ".webp": {"Q": 95},
           ".tif": {"compression": "deflate"}, ".tiff": {"compression": "deflate"},
           # libvips has no saver: Pillow writes it
           ".bmp": None}
OPAQUE = (".jpg", ".jpeg", ".bmp")


def tile(text):
    """An argparse type: a whole number, or auto."""
    return text if text == "auto" else runs.COUNT(text)


tile.__name__ = "whole number"


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("images", nargs="+", metavar="IMAGE",
                   help="files, folders (all images in them) or patterns in quotes")
    p.add_argument("--weights", type=runs.CHECKPOINT, metavar="PATH",
                   help="weight file, public name (python -m prepare.weights list) or run folder (its merged.pth, "
                        "else its newest EMA weights); default with --lora: the adapter's base")
    runs.add_weights_key(p)
    p.add_argument("--pad-mode", choices=["hggt", "swinir"],
                   help="SwinIR only; default: as the run was trained, else hggt for pixelshuffle files and swinir for "
                        "nearest+conv files")
    p.add_argument("--lora", type=Path, metavar="PATH",
                   help="adapter of finetune_lora.py: its run folder, a folder of weights/ with an adapter and its "
                        "card, or an adapter.pth that belongs to --weights")
    p.add_argument("--scale", type=runs.number(float), default=1.0,
                   help="strength of --lora: 0 leaves the network as it is, 1 is as tuned")
    p.add_argument("--out", type=Path, default=Path("sr"), metavar="DIR",
                   help="folder of the results, which keep the names of the images")
    p.add_argument("--format", choices=[suffix[1:] for suffix in FORMATS],
                   help="of the results; default: that of the image, png for formats not in this list")
    g = p.add_mutually_exclusive_group()
    g.add_argument("--overwrite", action="store_true", help="replace results that exist; without it they are errors")
    g.add_argument("--skip", action="store_true", help="leave results that exist: continue a call that was stopped")
    p.add_argument("--tile", default="auto", type=tile, metavar="PIXELS",
                   help="LR pixels, more than twice the overlap; 0: whole image; auto: by free memory, at most 512. "
                        "Halved where memory does not suffice")
    p.add_argument("--overlap", type=runs.COUNT, default=64,
                   help="of tiles, LR pixels (CHOICE: seams are below one grey level)")
    p.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32",
                   help="of the network; bf16 keeps weights, last convolution and blending in fp32")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    p.add_argument("--threads", type=runs.COUNT, default=0, help="CPU threads; 0: PyTorch's choice")
    args = p.parse_args(argv)
    if not (args.weights or args.lora):
        p.error("which network? --weights names a weight file, a run folder, or a public network: python -m "
                "prepare.weights get realesrgan-x4plus, then --weights realesrgan-x4plus")
    if args.scale != 1 and not args.lora:
        p.error("--scale is the strength of --lora: name the adapter")
    if args.tile != 0 and (512 if args.tile == "auto" else args.tile) <= 2 * args.overlap:
        limit = " (at most 512)" if args.tile == "auto" else ""
        p.error(f"--tile {args.tile}{limit}: must be more than twice --overlap {args.overlap}")
    return args


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import glob
import math
import os
import sys

import numpy as np
import psutil
import torch
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

import archs
import lora
from images import IMAGE_SUFFIXES, image_paths, nfc, read_any

# where it is missing this file can still be imported
pyvips = runs.Lazy("pyvips")

# pixels: beyond twice Image.MAX_IMAGE_PIXELS Pillow refuses to open an image
PILLOW_LIMIT = 178_956_970
# largest width and height of the formats
LARGEST_SIDE = {".webp": 16_383, ".jpg": 65_535, ".jpeg": 65_535}
# CHOICE: opacity up to which a pixel counts as transparent: its own colour moves what is seen by at most 5 grey levels
HIDDEN = 0.02
# CHOICE: bytes per LR pixel, rounded up from those of the largest network here
BYTES_PER_LR_PIXEL = 32_768


def find_images(words):
    """Files, folders and patterns -> [path], each once. UserError for a word that names nothing."""
    images = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            paths = image_paths(path)
            if not paths:
                raise runs.UserError(f"{path}: no images ({', '.join(IMAGE_SUFFIXES)}) directly in it")
        elif os.path.lexists(path):
            # or a broken link: read_any says so
            paths = [path]
        else:
            paths = [Path(p) for p in sorted(glob.glob(word))]
            if not paths:
                raise runs.UserError(f"{word}: no such file, folder or pattern")
        images += [p for p in paths if not p.is_dir()]
    if not images:
        raise runs.UserError(f"{' '.join(words)}: only folders there, no images")
    return list(dict.fromkeys(images))


def fill_hidden(pixels, hidden):
    """Give each hidden pixel the colour of the nearest one that is not. pixels: (H, W, C); hidden: (H, W) bool."""
    if hidden.all() or not hidden.any():
        return pixels
    rows, columns = ndimage.distance_transform_edt(hidden, return_distances=False, return_indices=True)
    return pixels[rows, columns]


def enlarge(net, image, factor, tile, overlap, device, stop):
    """pyvips image -> pyvips image: colours by the network, alpha bicubically; bit depth, profile, metadata are kept.

    Colours that nobody sees (alpha up to HIDDEN) do not reach the network: at edges it would mix them with those beside
    them.

    UserError where the network's output is not finite; KeyboardInterrupt when stop.received, between rows of tiles.
    """
    alpha, colour = None, image
    if image.hasalpha():
        alpha, colour = image[image.bands - 1], image[:image.bands - 1]
    pixels, top = colour.numpy().reshape(image.height, image.width, -1), 255 if image.format == "uchar" else 65_535
    if alpha is not None:
        pixels = fill_hidden(pixels, alpha.numpy() <= HIDDEN * top)
    lq = torch.from_numpy(pixels.astype(np.float32) / top).permute(2, 0, 1)[None].expand(1, 3, -1, -1).to(device)
    sr = np.empty((image.height * factor, image.width * factor, pixels.shape[2]), pixels.dtype)

    def keep(y, rows):
        if stop.received:
            raise KeyboardInterrupt
        if not rows.isfinite().all():
            raise runs.UserError("the network's output is not finite: its weights are damaged, or --scale is too large")
        # a grey image stays grey
        rows = rows.clamp(0, 1) if sr.shape[2] == 3 else rows.clamp(0, 1).mean(1, keepdim=True)
        sr[y:y + rows.shape[2]] = rows[0].mul(top).round().permute(1, 2, 0).cpu().numpy()
        # backwards where the tile was halved
        bar.update(y + rows.shape[2] - bar.n)

    with tqdm(total=sr.shape[0], unit="row", leave=False, disable=None) as bar:
        archs.upscale_tiled(net, lq, factor, tile, overlap, sink=keep)
    result = pyvips.Image.new_from_array(sr, interpretation=colour.interpretation)
    result = result.copy(xres=image.xres, yres=image.yres)
    if alpha is not None:
        result = result.bandjoin(alpha.resize(factor, kernel="cubic").cast(image.format))

    # metadata can be set on a copy only
    result = result.copy()
    for name in image.get_fields():
        if name.startswith(("exif-", "icc-profile-data", "xmp-data", "iptc-data")):
            result.set_type(image.get_typeof(name), name, image.get(name))
    # autorot has turned the pixels, whatever the EXIF block says
    result.set_type(pyvips.GValue.gint_type, "orientation", 1)
    return result


def check_result(path, image, factor, suffix, free):
    """UserError where the result cannot be written: the format's limit, or more bytes than are `free`."""
    width, height = image.width * factor, image.height * factor
    limit = LARGEST_SIDE.get(suffix, math.inf)
    if max(width, height) > limit:
        raise runs.UserError(f"{path}: the result has {width}x{height} pixels, and {suffix[1:]} ends at {limit}: "
                             "take --format png or tif")
    need = width * height * image.bands * (1 + (image.format == "ushort"))
    if suffix == ".bmp" and need >= 2 ** 32:
        raise runs.UserError(f"{path}: the result takes {need / 2**30:.1f} GiB, and bmp ends at 4: take --format png")
    if need > free:
        raise runs.UserError(f"{path}: the result takes {need / 2**30:.1f} GiB, free are {free / 2**30:.1f}: "
                             "cut the image into parts")


def free_memory(device):
    """Bytes: of the GPU, or of the machine or container, file cache counted as free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    # a container's own limit: no such files outside one, "max" where there is none
    group = Path("/sys/fs/cgroup")
    try:
        return min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return free


def auto_tile(device, overlap):
    """Side of a tile whose activations take at most half of the free memory.

    At least just more than two overlaps, at most 512 (CHOICE: more brings no speed).
    """
    side = math.isqrt(int(min(free_memory(device) / 2 / BYTES_PER_LR_PIXEL, 512 ** 2)))
    return max(2 * overlap + 8, side // 8 * 8)


def upscale_file(net, path, target, factor, args, device, stop):
    """Enlarge one file. -> a remark, or "" """
    if target.exists() and args.skip:
        return "was there"
    if target.exists() and not args.overwrite:
        raise runs.UserError(f"{target} exists: --overwrite replaces it, --skip leaves it, --out names another folder")
    image = read_any(path)
    check_result(path, image, factor, target.suffix, free_memory(torch.device("cpu")))
    tile = auto_tile(device, args.overlap) if args.tile == "auto" else args.tile
    try:
        result = enlarge(net, image, factor, tile, args.overlap, device, stop)
    except (runs.UserError, MemoryError) as error:
        raise runs.UserError(f"{path}: {error}") from None
    remarks = []
    if image.format == "ushort" and target.suffix not in (".png", ".tif", ".tiff"):
        remarks.append(f"{target.suffix[1:]} has 8 bit only")
        result = (result / 257 + 0.5).cast("uchar").copy(interpretation="b-w" if result.bands < 3 else "srgb")
    if result.hasalpha() and target.suffix in OPAQUE:
        remarks.append(f"{target.suffix[1:]} has no transparency: on white")
        result = result.flatten(background=255)
    if result.width * result.height > PILLOW_LIMIT:
        remarks.append("Pillow opens it only with Image.MAX_IMAGE_PIXELS = None")

    def write(temporary):
        if target.suffix == ".bmp":
            Image.fromarray(result.numpy()).save(temporary, "BMP", dpi=(25.4 * result.xres, 25.4 * result.yres))
            return
        result.write_to_target(pyvips.Target.new_to_file(str(temporary)), target.suffix, **FORMATS[target.suffix])
    try:
        runs.write_atomic(target, write)
    except pyvips.Error as error:
        raise runs.UserError(f"{target}: cannot be written ({error.detail.strip().splitlines()[0]})") from None
    return "; ".join(remarks)


def find_targets(paths, out, suffix):
    """{image: file of its result} in folder `out`. suffix: of all results; None: that of the image.

    UserError where two images would become one file, or an image would be replaced by its result.
    """
    targets, owners = {}, {}
    for path in paths:
        own = path.suffix.lower()
        targets[path] = target = out / (path.stem + (suffix or (own if own in FORMATS else ".png")))
        other = owners.setdefault(nfc(str(target)), path)
        if other != path:
            raise runs.UserError(f"{other} and {path} would both become {target}: give them different names, or take "
                                 "two calls with --out")
        if os.path.realpath(target) == os.path.realpath(path):
            raise runs.UserError(f"--out {out}: {path} would be replaced by its result: name another folder")
    return targets


def main(args):
    world = runs.start_world(args.device, args.threads)
    paths = find_images(args.images)
    runs.check_writable(args.out, "--out")
    targets = find_targets(paths, args.out, args.format and f".{args.format}")
    if args.lora:
        net, info = lora.load_tuned(args.lora, args.scale, args.weights, args.weights_key, args.pad_mode, "--weights")
    else:
        net, info = archs.load_run(args.weights, "--weights", args.weights_key, args.pad_mode)
    remark = runs.precision_remark(world.device, args.precision, info["arch"])
    net = archs.ready(net, world.device, args.precision)
    adapter = f" + {args.scale:g} x {args.lora}" if args.lora else ""
    if world.is_main:
        print(f"{info['file']}: {info['arch']} x{info['scale']}, key {info['key']}{adapter}")
        for line in filter(None, (info.get("remark"), remark)):
            print(line, file=sys.stderr)
    # without it a signal that arrives within libvips would be lost
    failed, stop = 0, runs.StopSignal(world)
    for path in tqdm(paths[world.rank::world.size], unit="img", disable=None if world.is_main else True):
        try:
            remark = upscale_file(net, path, targets[path], info["scale"], args, world.device, stop)
            tqdm.write(f"{path} -> {targets[path]}" + (f" ({remark})" if remark else ""))
        except (runs.UserError, OSError) as error:
            failed += 1
            tqdm.write(f"{runs.program()}: error: {error}", file=sys.stderr)
        if stop.received:
            raise KeyboardInterrupt
    failed = sum(world.gather_objects(failed))
    if world.is_main:
        failures = f", {failed} failed" if failed else ""
        print(f"{len(paths) - failed} of {len(paths)} images written to {args.out}{failures}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
