"""What --precision bf16 gains on this CPU, and what it changes: three generators in fp32, in bf16, with channels_last.

    python -m experiments.precision --side 64 --repeats 3 --json runs/bench/precision-amx_bf16.json

One thread, processor time, variants in turn on a crop of a photograph; "faster" is the median time of fp32 over that of
the variant, with the range over turns. `as used` is archs.ready's bf16: autocast, channels_last where the network is
convolutional. `weights cast once` is the same with the weights of all convolutions and linear layers but the last kept
in bf16. The outputs of fp32 and `as used` are compared over the whole photograph: PSNR in 8 bit, and the largest
difference in grey levels before rounding. A network that is given no file has random weights: for times only.

Scripts say on a CPU with bf16 units what results/bench/precision-<unit>.json found, on one without what
precision-none.json found (runs.precision_remark).
"""
from pathlib import Path

import runs

DATA = Path(runs.literal("experiments/jobs", "DATA"))
ARCHITECTURES = ("compact", "swinir", "rrdbnet")


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--weights", type=runs.CHECKPOINT, nargs="+", metavar="FILE",
                   help="x4 checkpoints; what they are is seen",
                   default=[DATA / "weights" / "sr" / "realesr-general-x4v3_fp16.pth"])
    p.add_argument("--photo", type=Path, metavar="FILE", help="LR photograph",
                   default=DATA / "images" / "lr_realsrset" / "dped_crop00061.png")
    p.add_argument("--side", type=runs.SIZE, default=64, help="of the crop that is timed, LR pixels")
    p.add_argument("--repeats", type=runs.SIZE, default=5, help="turns")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    return p.parse_args(argv)


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import copy
import statistics
import sys
import time
from functools import partial

import torch
import torch.nn as nn

import archs
import degradations
import metrics
from images import load_image


def networks(files):
    """{arch: (network, file or "random")}"""
    nets = {}
    for file in files:
        net, info = archs.load_x4(file, "--weights")
        nets[info["arch"]] = net, str(file)
    for arch in ARCHITECTURES:
        if arch not in nets:
            torch.manual_seed(0)
            nets[arch] = archs.create(arch).eval(), "random"
    return nets


def variants(net, device):
    """{name: function of an LR batch}; the first is the reference."""
    def used(net, precision, memory):
        return archs.within(partial(runs.in_precision, device, precision), net.to(memory_format=memory))
    cast = copy.deepcopy(net)
    for layer in [m for m in cast.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][:-1]:
        layer.to(torch.bfloat16)
    made = {"fp32": used(copy.deepcopy(net), "fp32", torch.contiguous_format),
            "fp32, channels_last": used(copy.deepcopy(net), "fp32", torch.channels_last),
            "bf16": used(copy.deepcopy(net), "bf16", torch.contiguous_format),
            "bf16, channels_last": used(copy.deepcopy(net), "bf16", torch.channels_last),
            "bf16, weights cast once": archs.ready(cast, device, "bf16"),
            "bf16, as used": archs.ready(net, device, "bf16")}
    return made


@torch.no_grad()
def measure(functions, lq, repeats):
    """{name: [seconds of processor time]}; no variant always goes first, and the first turn does not count."""
    times = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name in list(functions)[::-1 if turn % 2 else 1]:
            started = time.process_time()
            functions[name](lq)
            times[name].append(time.process_time() - started)
    return {name: values[1:] for name, values in times.items()}


def compare(functions, photo):
    """PSNR of the 8-bit outputs, and the largest difference in grey levels, of `as used` against fp32."""
    one, other = (archs.upscale_tiled(functions[name], photo).clamp(0, 1) for name in ("fp32", "bf16, as used"))
    psnr = metrics.psnr(degradations.to_8bit(other), degradations.to_8bit(one)).item()
    gap = 255 * (one - other).abs()
    return {"psnr": psnr, "largest": gap.max().item(), "mean": gap.mean().item()}


def main(args):
    device = runs.start_world("cpu", 1).device
    runs.check_output(args.json, "--json")
    photo = load_image(args.photo)[None].float() / 255
    top, left = ((n - args.side) // 2 for n in photo.shape[2:])
    crop = photo[..., top:top + args.side, left:left + args.side]
    found, rows = {}, []
    for arch, (net, source) in networks(args.weights).items():
        functions = variants(net, device)
        times = measure(functions, crop, args.repeats)
        table = {}
        for name in list(times)[1:]:
            turns = sorted(a / b for a, b in zip(times["fp32"], times[name]))
            faster = statistics.median(times["fp32"]) / statistics.median(times[name])
            table[name] = {"faster": faster, "least": turns[0], "most": turns[-1]}
            rows.append([arch, name, f"{faster:.2f}", f"{turns[0]:.2f} to {turns[-1]:.2f}"])
        difference = compare(functions, photo) if source != "random" else {}
        found[arch] = {"faster": table["bf16, as used"]["faster"], "weights": source, "variants": table, **difference}
        print(arch, found[arch], file=sys.stderr)
    print(runs.markdown(["", "variant", "faster", "range"], rows))
    if args.json:
        runs.save_json(args.json, {"command": sys.argv, **runs.describe_machine(on_cpu=True), "n": args.repeats,
                                   "side": args.side, "photo": str(args.photo), "found": found})


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
