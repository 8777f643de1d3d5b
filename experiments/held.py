"""What a process of torchrun keeps for networks and optimisers, measured: its resident memory before and after three steps, against what bench.py counts.

    torchrun --nproc_per_node 2 experiments/held.py --json results/bench/held.json

Both ways of DDP: as World.parallel makes it, and with PyTorch's defaults, which hold a second copy of the gradients. On the CPU, tiny images, so that activations play no part.
"""
import argparse
import copy
import gc
import os
import sys
from functools import partial
from pathlib import Path

os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"                                    # read at the start of a process; main starts one for each measurement

import torch
import torch.nn.functional as F
from torch.multiprocessing import get_context
from torch.nn.parallel import DistributedDataParallel

import archs
from experiments import bench
import runs


def resident():
    gc.collect()
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024 / 1e6


def build(arch, d_features):
    return archs.create(arch, **({"drop_path": 0.0} if arch.startswith("swinir") else {})), archs.UNetDiscriminatorSN(d_features)


def steps(net_g, net_d, parallel):
    """Three steps. -> everything that a run keeps"""
    raw_g, ema = net_g, copy.deepcopy(net_g).requires_grad_(False)
    net_g, net_d = parallel(net_g), parallel(net_d)
    opt_g, opt_d = (runs.adam(net.parameters(), 1e-4, False) for net in (net_g, net_d))
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
    warm = steps(*build("compact-small", 8), parallel), steps(*build(f"{arch}-small", 8), parallel)                # libraries are loaded
    nets, before = build(arch, 64), resident()
    own = sum(t.numel() * t.element_size() for net in nets for t in [*net.parameters(), *net.buffers()]) / 1e6
    kept = steps(*nets, parallel)
    answer.put({"arch": arch, "ours": ours, "grew_MB": resident() - before + own, "counted_MB": bench.held(*nets) / 1e6, "gradients_MB": 4e-6 * sum(p.numel() for net in nets for p in net.parameters())})
    del warm, kept


def main(args):
    found, context = [], get_context("spawn")
    for k, (arch, ours) in enumerate((arch, ours) for arch in ("compact", "swinir", "rrdbnet") for ours in (True, False)):
        answer = context.SimpleQueue()
        process = context.Process(target=partial(measure, arch, ours, int(os.environ["MASTER_PORT"]) + 1 + k, answer))
        process.start()
        found.append(answer.get())
        process.join()
    if os.environ["RANK"] == "0":
        print(runs.markdown(list(found[0]), [[f"{v:.0f}" if isinstance(v, float) else v for v in row.values()] for row in found]))
        if args.json:
            runs.save_json(args.json, {"command": sys.argv, "processes": int(os.environ["WORLD_SIZE"]), **runs.describe_machine(), "found": found})


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", type=Path)
    main(p.parse_args())
