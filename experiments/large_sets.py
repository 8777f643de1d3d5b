"""What a large data set costs: packed images and an atlas of so many quintuplets, without a byte of pixels (the file is sparse), opened and read.

    python -m experiments.large_sets 1000 100000          a table, and the ratio of the last to the first; --json FILE

Processor time. Memory is what the process grew by. A sample reads a 512 x 512 original and one crop, as AMO from an atlas does.
"""
import argparse
import hashlib
import json
import pickle
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path


import numpy as np
import torch

import data
import runs

torch.set_num_threads(1)
VERSIONS, SIDE, STRIDE, CROP = ["original", "01", "02", "03", "04"], 512, 32, 256


def resident():
    """MB of this process."""
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def write(root, stems):
    """Index and sparse file of packed images, and a finished atlas."""
    (root / "packed").mkdir()
    size = 3 * SIDE * SIDE
    index = {v: {stem: [(n * len(VERSIONS) + k) * size, SIDE, SIDE] for n, stem in enumerate(stems)} for k, v in enumerate(VERSIONS)}
    (root / "packed/Train.json").write_text(json.dumps({"signature": "none", "images": index}))
    with open(root / "packed/Train.bin", "wb") as file:
        file.truncate(len(stems) * len(VERSIONS) * size)
    positions = (SIDE - CROP) // STRIDE + 1
    shape = [len(stems), len(VERSIONS), 2, positions, positions]
    table = np.lib.format.open_memmap(root / "atlas.npy", mode="w+", dtype=np.float32, shape=tuple(shape))
    about = {"reward": {"none": {"weight": 1.0, "hash": ""}}, "crop": CROP, "stride": STRIDE, "signature": "none", "versions": VERSIONS, "stems": stems, "shape": shape, "finished": True,
             "table": hashlib.sha256(table.reshape(-1)).hexdigest()[:12]}
    (root / "atlas.json").write_text(json.dumps(about))


def cost(function, *arguments):
    """ms of processor time."""
    started = time.process_time()
    function(*arguments)
    return 1000 * (time.process_time() - started)


def measure(count, samples=200):
    """{what: number} of a data set of `count` quintuplets."""
    found = {}

    def part(name, function, memory=False):
        before, started = resident(), time.process_time()
        result = function()
        found[f"{name}, ms"] = 1000 * (time.process_time() - started)
        if memory:
            found[f"{name}, MB"] = resident() - before
        return result
    with tempfile.TemporaryDirectory() as folder:
        root, stems = Path(folder), [f"photo{n // 8:07d}-{288 * (n % 8)}-0" for n in range(count)]
        write(root, stems)
        names = lambda version: {data.file_stem(stem, version): root / version / f"{data.file_stem(stem, version)}.png" for stem in stems}
        sets = part("paths of files", lambda: data.Sets({version: names(version) for version in VERSIONS}, signed="none"), True)
        sets.packed = part("open packed", lambda: data.Packed(root / "packed", "Train", sets))
        found["index of packed, MB"] = (sets.packed.index.nbytes + sys.getsizeof(sets.packed.rows)) / 2 ** 20
        atlas = part("open atlas", lambda: data.Atlas(root / "atlas.npy", sets, CROP), True)
        dataset = part("training set", lambda: data.TrainingSet(sets, "amo", partial(runs.sample_seed, 0), 32, 8, CROP, tau=None, atlases=[(atlas, 1.0)]))
        part("check sizes", lambda: data.check_headers(dataset, runs.World(0, 1, torch.device("cpu"))))
        found["permutation of an epoch, ms"] = statistics.median(cost(dataset._order, epoch) for epoch in range(7))
        keys = [(1 + n // 32, n % 32) for n in range(samples)]
        for key in keys:
            dataset.sample(*key)                                                  # a hole of a sparse file costs the system more than a page that is there
        found["sample, ms"] = statistics.median(cost(dataset.sample, *key) for key in keys)
        found["pickled for a worker that is not forked, MB"] = len(part("pickle", lambda: pickle.dumps(dataset))) / 2 ** 20
    return found


def main(counts, file=None):
    found = {count: measure(count) for count in counts}
    growth = {name: found[counts[-1]][name] / max(found[counts[0]][name], 1e-9) for name in found[counts[0]]}
    print(runs.markdown(["quintuplets", *(f"{n:,}" for n in counts), "ratio"],
                        [[name, *(f"{found[n][name]:.2f}" for n in counts), f"{growth[name]:.2f}"] for name in growth]))
    if file:
        runs.save_json(file, {"command": sys.argv, **runs.describe_machine(), "found": found, "growth": growth})


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("counts", type=int, nargs="+")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    main(args.counts, args.json)
