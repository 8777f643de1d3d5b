"""Decode a split of a data set once, into one memory-mapped file; train.py then reads crops from it by itself.

    python -m prepare.pack datasets/HGGT

Leaves DATA/packed/Train.bin (HGGT: 79 GB) and Train.json. They are refused once an image has changed (name, size or
samples of its bytes). Sizes are checked before anything is written. A killed call leaves Train.bin.tmp, which the next
one replaces; images that were packed before stay as they are.
"""
from pathlib import Path

import runs


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("data", type=Path, metavar="DIR", help="quintuplets in HGGT's layout")
    p.add_argument("--split", choices=["Train", "Test"], default="Train", help="which images")
    p.add_argument("--workers", type=runs.SIZE, default=8, help="images decoded at a time")
    return p.parse_args(argv)


# before the imports that take seconds, so that --help answers at once
ARGS = parse_args() if __name__ == "__main__" else None

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

import data
from images import image_size


class Packed:
    """The decoded images of a split in one memory-mapped file; a sample reads crops, not images.

    <folder>/<split>.bin: the images' bytes, (3, H, W) uint8, one after the other.
    <folder>/<split>.json: {"signature", "images": {version: {stem: [offset, H, W]}}}.
    UserError for a file that is damaged or was made of other images.
    """

    def __init__(self, folder, split, sets):
        self.file, index = folder / f"{split}.bin", folder / f"{split}.json"
        remedy = f"remove {folder}, and to use it again: python -m prepare.pack {folder.parent}"
        try:
            record = json.loads(index.read_text())
            images, self.bytes, signature = record["images"], np.memmap(self.file, mode="r"), record["signature"]
            self.rows = {stem: k for k, stem in enumerate(images["original"])}
            self.columns = {version: k for k, version in enumerate(sets.versions)}
            # (stems, versions, 3): offset, H, W; one array, since an object per image would take far more memory
            self.index = np.array([[images[version][stem] for version in self.columns] for stem in self.rows])
            places = self.index.reshape(-1, 3)[self.index[..., 0].ravel().argsort()]
            ends = (3 * places[:, 1] * places[:, 2]).cumsum()
            if self.index.dtype.kind != "i" or (places[:, 1:] < 1).any() or (places[:, 0] != [0, *ends[:-1]]).any():
                raise runs.UserError("the images do not lie one after the other")
            size = int(ends[-1])
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise runs.UserError(f"{index}: damaged ({' '.join(str(error).split())[:80]}): {remedy}") from None
        if size != len(self.bytes):
            raise runs.UserError(f"{self.file}: {len(self.bytes)} bytes, expected {size}: {remedy}")
        if signature != sets.signature():
            raise runs.UserError(f"{self.file}: was packed from other images than are there now: {remedy}")

    def place(self, stem, version):
        """Offset in the file, height and width of an image."""
        return self.index[self.rows[stem], self.columns[version]].tolist()

    def read(self, stem, version):
        """(3, H, W) uint8: a view of the file."""
        offset, h, w = self.place(stem, version)
        return self.bytes[offset:offset + 3 * h * w].reshape(3, h, w)

    def __getstate__(self):
        # a worker process maps the file again
        return {k: v for k, v in vars(self).items() if k != "bytes"}

    def __setstate__(self, state):
        vars(self).update(state)
        self.bytes = np.memmap(self.file, mode="r")


def main(args):
    folder = args.data / "packed"
    # older packed images may not fit any more; they stay until they are replaced
    sets = data.find_sets(args.data, args.split, packed=False)
    if sets is None:
        raise runs.UserError(f"{args.data}: no {args.split} split in it")
    names = [(version, stem) for stem in sets.stems for version in sets.versions]
    sizes = [image_size(sets.path(stem, version), only_rgb=True) for version, stem in names]
    size_of = {stem: size for (version, stem), size in zip(names, sizes) if version == "original"}
    for (version, stem), size in zip(names, sizes):
        data.check_size(sets.path(stem, version), size, size_of[stem])
    total = sum(3 * w * h for w, h in sizes)
    runs.check_writable(folder, "packed images")
    folder.mkdir(exist_ok=True)
    file = folder / f"{args.split}.bin"
    # of a call that was killed
    file.with_name(file.name + ".tmp").unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    if total > free:
        older = ": an older file lies there, remove it first" if file.exists() else ""
        raise runs.UserError(f"{folder}: {total / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free{older}")
    index, offset = {version: {} for version in sets.versions}, 0

    def write(temporary):
        nonlocal offset
        with open(temporary, "wb") as out, ThreadPoolExecutor(args.workers) as pool:
            # in blocks, so that not all images wait in memory
            for k in tqdm(range(0, len(names), 256), unit="block of 256"):
                block = names[k:k + 256]
                for (version, stem), image in zip(block, pool.map(lambda name: sets.read(name[1], name[0]), block)):
                    index[version][stem] = [offset, *image.shape[1:]]
                    offset += image.size
                    out.write(image.tobytes())
    runs.write_atomic(file, write)
    runs.save_json(file.with_suffix(".json"), {"signature": sets.signature(), "images": index})
    user = "train.py uses" if args.split == "Train" else "its sample grids use"
    print(f"{file}: {len(names)} images, {total / 1e9:.2f} GB; {user} it from now on, until the folder is removed")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
