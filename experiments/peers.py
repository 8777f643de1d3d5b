"""Our code against that of its peers, in turn, in one run: spandrel, BasicSR, Real-ESRGAN; fp32, one CPU thread.

    pip download --no-deps basicsr==1.4.2 realesrgan==0.3.0
    tar xzf basicsr-1.4.2.tar.gz && unzip realesrgan-0.3.0-py3-none-any.whl
    python -m experiments.peers --basicsr basicsr-1.4.2 --realesrgan . --json runs/bench/peers.json

process       upscale.py against a script that reads, enlarges and writes by Pillow and spandrel: one checkpoint, one
              image, the whole process; wall time, processor time, peak memory, largest difference of the two outputs
networks      forward and backward of the same weights: generators against spandrel's classes, D against BasicSR's; ours
              also in channels_last, as train.py uses it. `apart`: largest difference of the image's gradients over the
              largest one
degradations  ours against BasicSR's, one by one, and Real-ESRGAN's whole sequence (feed_data of its model, with USM;
              its kernels are drawn beforehand, ours in the call). Random settings differ in every call

`faster` is the median time of the peer over ours, with the range over pairs. BasicSR 1.4.2 cannot be imported beside a
torchvision of today, which has no transforms.functional_tensor: only the files needed are loaded, with a stand-in for
that module, for the package's __init__, and for the base class of Real-ESRGAN's model.
"""
import argparse
from pathlib import Path

import runs

DATA = Path(runs.literal("experiments/jobs", "DATA"))


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--weights", type=runs.CHECKPOINT, metavar="FILE", help="checkpoint of part `process`",
                   default=DATA / "weights" / "sr" / "realesr-general-x4v3_fp16.pth")
    p.add_argument("--image", type=Path, metavar="FILE", help="LR photograph of part `process`",
                   default=DATA / "images" / "lr_realsrset" / "dped_crop00061.png")
    p.add_argument("--basicsr", type=Path, required=True, metavar="DIR", help="unpacked source of BasicSR 1.4.2")
    p.add_argument("--realesrgan", type=Path, required=True, metavar="DIR", help="where the wheel was unpacked")
    p.add_argument("--repeats", type=runs.SIZE, default=5, help="measurements of each")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    p.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    return p.parse_args(argv)


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import copy
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from PIL import Image

import archs
import degradations
from experiments import tricks

# Whole processes

def enlarge_by_spandrel(weights, image, out):
    """What somebody writes who has spandrel and Pillow."""
    import spandrel
    torch.set_num_threads(1)
    model = spandrel.ModelLoader().load_from_file(weights).float().eval()
    lq = torch.from_numpy(np.array(Image.open(image).convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        sr = model(lq)
    pixels = sr[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(out)


def run_process(command):
    """-> wall seconds, processor seconds, peak GiB of a process that ends well."""
    started = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=runs.python_path() | {"OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise runs.UserError(f"{' '.join(map(str, command))} failed: call it yourself to see why")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2 ** 20


def processes(args):
    """One row per quantity: the peer's median over ours."""
    values = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        ours = runs.python("upscale.py", "--weights", args.weights, "--out", folder, "--overwrite", "--device", "cpu",
                           "--threads", 1, args.image)
        peer = runs.python("experiments.peers", "--basicsr", args.basicsr, "--realesrgan", args.realesrgan,
                           "--weights", args.weights, "--image", args.image, "--peer", folder / "peer.png")
        for turn in range(args.repeats + 1):
            for name, command in [("ours", ours), ("peer", peer)][::-1 if turn % 2 else 1]:
                values[name].append(run_process(command))
        one, other = (np.array(Image.open(folder / name)).astype(int) for name in (args.image.name, "peer.png"))
    rows = []
    for k, quantity in enumerate(("wall time", "processor time", "peak memory")):
        # the first turn fills the file cache
        pairs = [(peer[k], ours[k]) for peer, ours in zip(values["peer"][1:], values["ours"][1:])]
        ratios = sorted(peer / ours for peer, ours in pairs)
        medians = [statistics.median(column) for column in zip(*pairs)]
        rows.append({"what": f"process, {quantity}", "trick": "ours", "peer": "spandrel",
                     "faster": medians[0] / medians[1], "least": ratios[0], "most": ratios[-1], "n": len(pairs),
                     "grey_levels_apart": int(abs(one - other).max())})
    return rows


# BasicSR and Real-ESRGAN without their packages' __init__

def load_peers(basicsr, realesrgan):
    """-> the modules of BasicSR that are compared, and Real-ESRGAN's model class."""
    def stand_in(name, folder=None, **contents):
        sys.modules[name] = module = ModuleType(name)
        module.__path__ = [str(folder)] if folder else []
        vars(module).update(contents)
        return module
    from torchvision.transforms.functional import rgb_to_grayscale
    stand_in("torchvision.transforms.functional_tensor", rgb_to_grayscale=rgb_to_grayscale)
    for folder in (basicsr / "basicsr", realesrgan / "realesrgan"):
        if not folder.is_dir():
            raise runs.UserError(f"{folder}: no such folder; the docstring says how to get it")
        stand_in(folder.name, folder)
        for part in ("archs", "data", "models", "utils"):
            package = stand_in(f"{folder.name}.{part}", folder / part)
            setattr(sys.modules[folder.name], part, package)
    stand_in("basicsr.models.srgan_model", SRGANModel=object)
    names = ("utils.img_process_util", "utils.diffjpeg", "data.degradations", "archs.discriminator_arch")
    process, jpeg, noise, discriminator = (importlib.import_module(f"basicsr.{name}") for name in names)
    sys.modules["basicsr.utils"].DiffJPEG = jpeg.DiffJPEG
    sys.modules["basicsr.utils"].USMSharp = process.USMSharp
    whole = importlib.import_module("realesrgan.models.realesrgan_model")
    # with PyTorch 2.14 it cannot view what its JPEG and a resize leave in another memory format
    whole.filter2D = lambda image, kernel: process.filter2D(image.contiguous(), kernel)
    return SimpleNamespace(filter2D=process.filter2D, USMSharp=process.USMSharp, DiffJPEG=jpeg.DiffJPEG, noise=noise,
                           D=discriminator.UNetDiscriminatorSN, model=whole.RealESRGANModel)


# Networks

def networks(m, peers):
    import spandrel
    sizes = {"compact": (4, 32), "rrdbnet": (1, 24), "swinir": (1, 32), "D of 64 features": (1, 128)}
    for arch, (batch, side) in sizes.items():
        is_d = arch not in archs.ARCHS
        torch.manual_seed(0)
        if is_d:
            ours, peer = archs.UNetDiscriminatorSN(64), peers.D(3, 64)
            peer.load_state_dict(ours.state_dict())
        else:
            ours = archs.create(arch, **{"pad_mode": "swinir"} if arch == "swinir" else {})
            with tempfile.TemporaryDirectory() as folder:
                torch.save({"params": ours.state_dict()}, Path(folder) / "net.pth")
                peer = spandrel.ModelLoader().load_from_file(Path(folder) / "net.pth").model.requires_grad_(True)
        nets = {"peer": (peer, torch.contiguous_format), "ours": (ours, torch.contiguous_format)}
        if archs.is_convolutional(ours):
            nets["ours, channels_last"] = copy.deepcopy(ours), torch.channels_last
        x, calls = torch.rand(batch, 3, side, side), {}
        for name, (net, memory) in nets.items():
            # SwinIR without stochastic depth, D with its power iteration
            net = net.train(is_d).to(memory_format=memory)
            own = x.clone().contiguous(memory_format=memory).requires_grad_()
            calls[name] = partial(tricks.gradients, net, own)
        # of the image: the order of the weights may differ
        expected, *found = (call()[:1] for call in calls.values())
        more = {name: {"peer": "basicsr" if is_d else "spandrel", "apart": tricks.apart(expected, value)}
                for name, value in zip(list(calls)[1:], found)}
        m.compare(f"{arch}, {batch} crops of {side}", calls, **more)


# Degradations

@torch.no_grad()
def degrade(m, peers, batch=4, side=256):
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    photo = torch.rand(batch, 3, side // 8, side // 8, generator=generator)
    gt = torch.nn.functional.interpolate(photo, size=side, mode="bicubic").clamp(0, 1)
    preset = degradations.PRESETS["realesrgan"]
    seeds = [int(n) for n in rng.integers(2 ** 31, size=batch)]
    samples = [degradations.draw_sample(preset, seed) for seed in seeds]
    kernels = [np.stack([s["rounds"][n]["kernel"] for s in samples]) for n in (0, 1)]
    kernels.append(np.stack([s["final_kernel"] for s in samples]))
    peer_kernels = [torch.from_numpy(k).float() for k in kernels]
    sharpen, jpeg, quality = peers.USMSharp(), peers.DiffJPEG(differentiable=False), torch.linspace(30, 95, batch)
    gray = [True, False] * (batch // 2)

    def gaussian_noise():
        fields = torch.stack([degradations.normal_field(gt.shape[1:], seed) for seed in seeds])
        return degradations.add_gaussian_noise(gt, torch.full((batch,), 10.0), fields)

    def compare(title, peer, ours, exact=True):
        gap = {"apart": tricks.apart([peer()], [ours()])} if exact else {}
        m.compare(f"{title}, {batch} images of {side}", {"peer": peer, "ours": ours}, ours={"peer": "basicsr"} | gap)
    compare("blur, 21 pixels", lambda: peers.filter2D(gt, peer_kernels[0]), lambda: degradations.blur(gt, kernels[0]))
    compare("USM", lambda: sharpen(gt), lambda: degradations.usm_sharpen(gt))
    # the peer overwrites its qualities
    compare("JPEG", lambda: jpeg(gt, quality=quality.clone()), lambda: degradations.jpeg(gt, quality))
    compare("Gaussian noise", lambda: peers.noise.add_gaussian_noise_pt(gt, torch.full((batch,), 10.0)),
            gaussian_noise, exact=False)
    flags = torch.tensor(gray).float()
    compare("Poisson noise", lambda: peers.noise.add_poisson_noise_pt(gt, torch.ones(batch), gray_noise=flags),
            lambda: degradations.add_poisson_noise(gt, 1.0, gray, seeds), exact=False)

    first, second = preset["rounds"]
    options = {"scale": 4, "gt_size": side, "second_blur_prob": second["blur_prob"]}
    for ending, r in (("", first), ("2", second)):
        options |= {f"resize_prob{ending}": r["resize_prob"], f"resize_range{ending}": r["resize_range"],
                    f"gaussian_noise_prob{ending}": r["gaussian_prob"], f"noise_range{ending}": r["gaussian_sigma"],
                    f"poisson_scale_range{ending}": r["poisson_scale"], f"gray_noise_prob{ending}": r["gray_prob"],
                    f"jpeg_range{ending}": r["jpeg_quality"]}
    client = SimpleNamespace(is_train=True, opt=options, device="cpu", usm_sharpener=sharpen, jpeger=jpeg,
                             _dequeue_and_enqueue=lambda: None)
    names = ("kernel1", "kernel2", "sinc_kernel")

    def theirs(steps):
        for _ in range(steps):
            peers.model.feed_data(client, {"gt": gt, **dict(zip(names, peer_kernels))})

    def mine(steps):
        for _ in range(steps):
            draws = [[int(n) for n in rng.integers(2 ** 31, size=batch)], [int(rng.integers(2 ** 31))] * batch]
            degradations.degrade(degradations.usm_sharpen(gt), preset, *draws)
            degradations.usm_sharpen(gt)
    m.compare(f"whole sequence, 2 batches of {batch} images of {side}",
              {"peer": partial(theirs, 2), "ours": partial(mine, 2)}, ours={"peer": "realesrgan"})


def main(args):
    device = runs.start_world("cpu", 1).device
    if args.peer:
        return enlarge_by_spandrel(args.weights, args.image, args.peer)
    runs.check_output(args.json, "--json")
    rows = processes(args)
    m, peers = tricks.Measurements(device, args.repeats), load_peers(args.basicsr, args.realesrgan)
    networks(m, peers)
    degrade(m, peers)
    rows += m.rows
    lines = [[row["what"], row["trick"], row["peer"], f"{row['faster']:.2f}",
              f"{row['least']:.2f} to {row['most']:.2f}", row["n"], f"{row['apart']:.0e}" if "apart" in row else ""]
             for row in rows]
    print(runs.markdown(["", "", "peer", "faster", "range", "n", "apart"], lines))
    if args.json:
        runs.save_json(args.json, {"command": sys.argv, **runs.describe_machine(on_cpu=True), "found": rows})


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
