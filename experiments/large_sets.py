"""The cost of a large data set: packed images and an atlas of many quintuplets, without pixels, opened and read.

    python -m experiments.large_sets 1000 100000        a table, and the ratio of the last to the first; --json FILE

The file of pixels is sparse. Processor time; memory is the growth of the process. A sample reads a 512 x 512 original
and one crop, as AMO from an atlas does.
"""
from pathlib import Path

import runs


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("counts", type=runs.SIZE, nargs="+", metavar="N", help="numbers of quintuplets")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    return p.parse_args(argv)


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import json
import pickle
import statistics
import sys
import tempfile
import time
from functools import partial

import numpy as np
import torch

import data
from prepare.atlas import Atlas, table_hash
from prepare.pack import Packed

VERSIONS, SIDE, STRIDE, CROP = ["original", "01", "02", "03", "04"], 512, 32, 256


def resident():
    """MB of this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) / 1024


def write(root, stems):
    """Index and sparse file of packed images, and a finished atlas."""
    (root / "packed").mkdir()
    size = 3 * SIDE * SIDE
    index = {version: {stem: [(n * len(VERSIONS) + k) * size, SIDE, SIDE] for n, stem in enumerate(stems)}
             for k, version in enumerate(VERSIONS)}
    (root / "packed/Train.json").write_text(json.dumps({"signature": "none", "images": index}))
    with open(root / "packed/Train.bin", "wb") as file:
        file.truncate(len(stems) * len(VERSIONS) * size)
    positions = (SIDE - CROP) // STRIDE + 1
    shape = [len(stems), len(VERSIONS), 2, positions, positions]
    table = np.lib.format.open_memmap(root / "atlas.npy", mode="w+", dtype=np.float32, shape=tuple(shape))
    about = {"reward": {"none": {"weight": 1.0, "hash": ""}}, "crop": CROP, "stride": STRIDE, "signature": "none",
             "versions": VERSIONS, "stems": stems, "shape": shape, "finished": True,
             "table": table_hash(table)}
    (root / "atlas.json").write_text(json.dumps(about))


def cost(function, *arguments):
    """ms of processor time."""
    started = time.process_time()
    function(*arguments)
    return 1000 * (time.process_time() - started)


def measure(count, samples=200):
    """{quantity: number} of a data set of `count` quintuplets."""
    measured = {}

    def part(name, function, memory=False):
        before, started = resident(), time.process_time()
        result = function()
        measured[f"{name}, ms"] = 1000 * (time.process_time() - started)
        if memory:
            measured[f"{name}, MB"] = resident() - before
        return result
    with tempfile.TemporaryDirectory() as folder:
        root, stems = Path(folder), [f"photo{n // 8:07d}-{288 * (n % 8)}-0" for n in range(count)]
        write(root, stems)

        def names(version):
            files = [data.file_stem(stem, version) for stem in stems]
            return {file: root / version / f"{file}.png" for file in files}

        def all_sets():
            return data.Sets({version: names(version) for version in VERSIONS}, signed="none")
        sets = part("paths of files", all_sets, True)
        sets.packed = part("open packed", lambda: Packed(root / "packed", "Train", sets))
        measured["index of packed, MB"] = (sets.packed.index.nbytes + sys.getsizeof(sets.packed.rows)) / 2 ** 20
        atlas = part("open atlas", lambda: Atlas(root / "atlas.npy", sets, CROP), True)
        seeds = partial(runs.sample_seed, 0)
        dataset = part("training set", lambda: data.TrainingSet(sets, "amo", seeds, 32, 8, CROP, tau=None,
                                                                atlases=[(atlas, 1.0)]))
        part("check sizes", lambda: data.check_headers(dataset, runs.World(0, 1, torch.device("cpu"))))
        measured["permutation of an epoch, ms"] = statistics.median(cost(dataset._order, epoch) for epoch in range(7))
        keys = [(1 + n // 32, n % 32) for n in range(samples)]
        for key in keys:
            # a hole of a sparse file costs the system more than a page that is there
            dataset.sample(*key)
        measured["sample, ms"] = statistics.median(cost(dataset.sample, *key) for key in keys)
        pickled = part("pickle", lambda: pickle.dumps(dataset))
        measured["pickled for a worker that is not forked, MB"] = len(pickled) / 2 ** 20
    return measured


def main(args):
    torch.set_num_threads(1)
    runs.check_output(args.json, "--json")
    measured = {count: measure(count) for count in args.counts}
    first, last = measured[args.counts[0]], measured[args.counts[-1]]
    growth = {name: last[name] / max(first[name], 1e-9) for name in first}
    rows = [[name, *(f"{measured[n][name]:.2f}" for n in args.counts), f"{growth[name]:.2f}"] for name in growth]
    print(runs.markdown(["quintuplets", *(f"{n:,}" for n in args.counts), "ratio"], rows))
    if args.json:
        record = {"command": sys.argv, **runs.describe_machine(), "found": measured, "growth": growth}
        runs.save_json(args.json, record)


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
