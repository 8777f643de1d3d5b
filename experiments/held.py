"""The memory that a process of torchrun keeps for networks and optimisers, against what experiments.bench counts.

    torchrun --nproc_per_node 2 -m experiments.held --json runs/bench/held.json

Resident memory before and after three steps, for both ways of DDP: as World.parallel makes it, and with PyTorch's
defaults, which hold a second copy of the gradients. On the CPU, with tiny images, so that activations play no part.
"""
from pathlib import Path

import runs


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    return p.parse_args(argv)


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import copy
import gc
import os
import sys
from functools import partial

# read at the start of a process; main starts one for each measurement
os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"

import torch
import torch.nn.functional as F
from torch.multiprocessing import get_context
from torch.nn.parallel import DistributedDataParallel

import archs
from experiments import bench


def resident():
    """MB of this process."""
    gc.collect()
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) * 1024 / 1e6


def build(arch, d_features):
    drop_path = {"drop_path": 0.0} if "drop_path" in archs.ARCHS[arch]["train"] else {}
    return archs.create(arch, **drop_path), archs.UNetDiscriminatorSN(d_features)


def steps(net_g, net_d, parallel):
    """Three steps -> everything that a run keeps."""
    raw_g, ema = net_g, copy.deepcopy(net_g).requires_grad_(False)
    net_g, net_d = parallel(net_g), parallel(net_d)
    opt_g, opt_d = (runs.adam(net.parameters(), 1e-4) for net in (net_g, net_d))
    for _ in range(3):
        sr = net_g(torch.rand(1, 3, 8, 8))
        for opt, loss in ((opt_g, F.l1_loss(sr, torch.rand_like(sr))), (opt_d, net_d(sr.detach()).mean())):
            opt.zero_grad()
            loss.backward()
            opt.step()
        runs.update_ema(ema, raw_g, 0.9)
    return net_g, net_d, ema, opt_g, opt_d


def measure(arch, ours, port, answer):
    """In a process of its own, since freed memory need not go back to the system."""
    os.environ["MASTER_PORT"] = str(port)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    world = runs.start_world("cpu", 1)
    parallel = world.parallel if ours else DistributedDataParallel
    # small networks first, so that libraries are loaded
    warm = steps(*build("compact-small", 8), parallel), steps(*build(f"{arch}-small", 8), parallel)
    nets, before = build(arch, 64), resident()
    own = sum(t.numel() * t.element_size() for net in nets for t in [*net.parameters(), *net.buffers()]) / 1e6
    kept = steps(*nets, parallel)
    gradients = 4e-6 * sum(p.numel() for net in nets for p in net.parameters())
    answer.put({"arch": arch, "ours": ours, "grew_MB": resident() - before + own,
                "counted_MB": bench.held(*nets) / 1e6, "gradients_MB": gradients})
    del warm, kept


def main(args):
    if "RANK" not in os.environ:
        raise runs.UserError("measures processes of torchrun: torchrun --nproc_per_node 2 -m experiments.held")
    runs.check_output(args.json, "--json")
    rows, context = [], get_context("spawn")
    settings = [(arch, ours) for arch in ("compact", "swinir", "rrdbnet") for ours in (True, False)]
    for k, (arch, ours) in enumerate(settings):
        answer = context.SimpleQueue()
        port = int(os.environ["MASTER_PORT"]) + 1 + k
        process = context.Process(target=partial(measure, arch, ours, port, answer))
        process.start()
        rows.append(answer.get())
        process.join()
    if os.environ["RANK"] == "0":
        cells = [[f"{v:.0f}" if isinstance(v, float) else v for v in row.values()] for row in rows]
        print(runs.markdown(list(rows[0]), cells))
        if args.json:
            record = {"command": sys.argv, "processes": int(os.environ["WORLD_SIZE"]), **runs.describe_machine()}
            runs.save_json(args.json, record | {"found": rows})


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
