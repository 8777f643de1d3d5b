"""ZSSR: a small network for every image, trained on that image alone ("Zero-Shot" Super-Resolution, CVPR 2018).

    python -m selfsup.zssr --demo                                         small and short, on a CPU
    python -m selfsup.zssr --lr-dir PHOTOS --out zssr                     bicubic down-sampling is assumed
    python -m selfsup.zssr --lr-dir PHOTOS --kernels K --out kernelgan    with kernels that selfsup.kernelgan left in K
    python evaluate.py --protocol whole-y --images zssr kernelgan --lq PHOTOS --gt HR

Structures recur at several scales of a photograph. So crops of the image (fathers) are shrunk (sons), and the network
learns to turn sons into fathers; then it enlarges the image itself. x4 is two complete runs of x2, the second on the
result of the first: a x4 run at once ends below bicubic (22.0 against 22.1 dB, two runs 25.5; one image, butterfly).

Leaves OUT/<image>.png and OUT/zssr.json. The same command continues: images that are there are kept. Written from
descriptions of the method; its released code has another licence and was not used.
"""
from pathlib import Path

import runs
from selfsup import options

# how fathers are drawn and outputs are finished; all but "ideal" need kernels
IDEAL = dict(
    # probability of a plain crop, of one turned by multiples of 90 degrees; the rest is affine
    as_is=0.05, dihedral=0.45,
    # turns and mirrors; smallest scale; standard deviations of the difference of the two scales, and of shears
    turn=True, low=0.5, spread=0.25, shear=0.1,
    # standard deviation of the noise on sons; rounds of back-projection; median of eight turned outputs
    noise=0.0, rounds=10, ensemble=True,
    # weight the loss by the strength of edges
    weighted=False)
CONFIGS = {"ideal": IDEAL,
           # a kernel is right for the image as it stands
           "kernel": IDEAL | dict(turn=False, ensemble=False, rounds=2),
           "real": IDEAL | dict(turn=False, ensemble=False, rounds=0, noise=0.0125, spread=0.0, shear=0.0, low=0.75),
           # as KernelGAN calls ZSSR; back-projection would put an image's noise back
           "kernelgan": IDEAL | dict(as_is=1.0, turn=False, ensemble=False, rounds=2, weighted=True),
           "kernelgan-real": IDEAL | dict(as_is=1.0, turn=False, ensemble=False, rounds=0, weighted=True, noise=0.0125)}
# CHOICE: seconds for each image
DEMO = dict(lr_dir=options.DEMO_DOMAIN / "lq", out=Path("runs/zssr-demo"), width=16, crop=48, total_steps=600, lr=2e-3,
            threads=1)


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--demo", action="store_true", help="the demo's images, a narrow network; same code")
    p.add_argument("--lr-dir", type=Path, metavar="DIR", help="low-resolution images")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    p.add_argument("--kernels", type=Path, metavar="DIR", help="<image>.npy: x2 kernels, as selfsup.kernelgan leaves")
    p.add_argument("--config", choices=list(CONFIGS),
                   help="see CONFIGS in this file; default: ideal, with --kernels kernelgan. The -real ones are for "
                        "noisy images: noise on sons, no back-projection")
    g = p.add_argument_group("training")
    g.add_argument("--width", type=runs.SIZE, default=64, help="channels of the eight convolutions (ZSSR: 64)")
    g.add_argument("--crop", type=runs.number(int, 16), default=128,
                   help="side of a father in pixels (ZSSR: 128; 64 takes a quarter of the time)")
    g.add_argument("--total-steps", type=runs.SIZE, default=3000,
                   help="most steps of each x2 run (ZSSR: 3,000); it ends before where the learning rate has fallen "
                        "three times")
    g.add_argument("--lr", type=runs.RATE, default=1e-3, help="first learning rate (ZSSR)")
    options.add_seeded_machine(p, "of the convolutions while training; tests and outputs stay in fp32")
    if p.parse_known_args(argv)[0].demo:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    options.need_folders(p, args)
    args.config = args.config or ("kernelgan" if args.kernels else "ideal")
    if (args.config == "ideal") != (args.kernels is None):
        p.error(f"--config {args.config}: {'takes no' if args.kernels else 'needs'} --kernels")
    return args


# --help and flag errors need no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy import ndimage

import archs
from images import load_image, save_image
from selfsup import kernels

# ZSSR: steps between records of the error and between looks at them; steps without a change of the rate; its end
RECORD, LOOK, WINDOW, LAST = 50, 60, 256, 9e-6
# CHOICE: the error is taken on a part of at most so many pixels; of a whole photograph it costs more than training
TEST_SIDE = 128


class Network(nn.Module):
    """(B, 3, h, w) -> (B, 3, 2h, 2w): bicubic enlargement plus eight convolutions without biases at the large size."""

    def __init__(self, width=64):
        super().__init__()
        sizes = [3, *[width] * 7, 3]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in zip(sizes, sizes[1:]))
        for layer in self.layers:
            # ZSSR: a variance of 0.1 over the inputs
            nn.init.normal_(layer.weight, std=(0.1 / (9 * layer.in_channels)) ** 0.5)

    def forward(self, lq):
        enlarged = kernels.bicubic(lq, 2)
        x = enlarged
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        # in fp32 whatever the convolutions compute in
        return enlarged + self.layers[-1](x).float()


class LearningRate:
    """Divided by 10 where the error has stopped falling: -1.5 slope < deviation of the slope, of its last five records.

    after(step, error) -> is there more to do? error() is called where a record is due. Three falls end it.
    """

    def __init__(self, rate=1e-3):
        self.rate, self.changed, self.records = rate, 0, []

    def after(self, step, error):
        if step % RECORD == 0:
            self.records.append(error())
        if step % LOOK == 0 and step - self.changed > WINDOW:
            y = np.array(self.records[-(WINDOW // RECORD):])
            x = np.arange(len(y)) - (len(y) - 1) / 2
            slope = (x * y).sum() / (x * x).sum()
            residual = y - y.mean() - slope * x
            deviation = np.sqrt((residual ** 2).sum() / (len(y) - 2) / (x * x).sum())
            if -1.5 * slope < deviation:
                self.rate, self.changed = self.rate / 10, step
        return self.rate >= LAST


def draw_father(source, weight, crop, config, rng):
    """-> a father (1, 3, crop, crop) in [0, 1] and its weights (1, 1, crop, crop). source: (1, 3, H, W)"""
    (h, w), u = source.shape[2:], rng.random()
    if u < config["as_is"] + config["dihedral"]:
        y, x = rng.integers(h - crop + 1), rng.integers(w - crop + 1)
        parts = [image[..., y:y + crop, x:x + crop] for image in (source, weight)]
        if u >= config["as_is"] and config["turn"]:
            turns, mirror = int(rng.integers(4)), rng.random() < 0.5
            parts = [part.rot90(turns, (2, 3)) for part in parts]
            parts = [part.flip(3) if mirror else part for part in parts]
        return parts
    scale, spread = rng.uniform(config["low"], 1), rng.normal(0, 1) * config["spread"] / 2
    # CHOICE: not below a quarter
    across, down = max(scale + spread, 0.25), max(scale - spread, 0.25)
    angle, mirror = (rng.uniform(0, 2 * np.pi), rng.choice((-1, 1))) if config["turn"] else (0.0, 1)
    shear = np.array([[1, rng.normal(0, 1)], [rng.normal(0, 1), 1]]) * [[1, config["shear"]], [config["shear"], 1]]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inverse = np.linalg.inv(shear @ turn @ np.diag([across * mirror, down]))
    shift = (rng.random(2) - 0.5) * np.maximum([across * w - crop, down * h - crop], 0)
    axis = np.arange(crop) - (crop - 1) / 2
    points = (np.stack(np.meshgrid(axis, axis), -1) + shift) @ inverse.T + [(w - 1) / 2, (h - 1) / 2]
    grid = torch.from_numpy((2 * points + 1) / [w, h] - 1).to(source)[None]
    # CHOICE: mirrored where ZSSR's is black, of which crops of small images would be full
    father = F.grid_sample(source, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return father.clamp(0, 1), torch.ones_like(father[:, :1])


def draw_pair(source, weight, kernel, crop, config, rng):
    """-> son (1, 3, crop / 2, crop / 2), father, weights of the loss"""
    father, weight = draw_father(source, weight, crop, config, rng)
    noise = rng.normal(0, 1, (1, 3, crop // 2, crop // 2)).astype(np.float32) * config["noise"]
    return (kernels.downscale(father, kernel) + torch.from_numpy(noise).to(father)).clamp(0, 1), father, weight


def edge_weights(image):
    """(1, 3, H, W) -> (1, 1, H, W) of mean 1: the gradient's length in a 5 x 5 box, zero in a margin of 3 pixels."""
    grey = image.mean((0, 1)).cpu().numpy()
    strength = ndimage.uniform_filter(np.hypot(*np.gradient(grey)), 5, mode="constant")
    strength[:3], strength[-3:], strength[:, :3], strength[:, -3:] = 0, 0, 0, 0
    # a flat image: all the same
    strength = strength / strength.mean() if strength.any() else np.ones_like(strength)
    return torch.from_numpy(strength).to(image)[None, None]


def train(image, kernel, config, seed, width=64, crop=128, total_steps=3000, lr=1e-3, autocast=nullcontext):
    """Train a network for one image -> (network, steps). image: (1, 3, h, w) in [0, 1]; kernel: x2, None: bicubic."""
    rng = np.random.default_rng(seed)
    crop = min(crop, *image.shape[2:]) // 2 * 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Network(width).to(image.device, memory_format=torch.channels_last)
    opt, rate = torch.optim.Adam(net.parameters(), lr=lr), LearningRate(lr)
    weight = edge_weights(image) if config["weighted"] else torch.ones_like(image[:, :1])
    sides = [min(side, TEST_SIDE) // 2 * 2 for side in image.shape[2:]]
    top, left = ((whole - side) // 2 for whole, side in zip(image.shape[2:], sides))
    part = image[..., top:top + sides[0], left:left + sides[1]]

    @torch.no_grad()
    def error():
        return (net(kernels.downscale(part, kernel)).clamp(0, 1) - part).square().mean().item()
    for step in range(1, total_steps + 1):
        son, father, weights = draw_pair(image, weight, kernel, crop, config, rng)
        with autocast():
            loss = ((net(son) - father).abs() * weights).mean()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        if not rate.after(step, error):
            break
        for group in opt.param_groups:
            group["lr"] = rate.rate
    return net.eval().requires_grad_(False), step


def enlarge(net, lq, kernel, config):
    """(1, 3, h, w) -> (1, 3, 2h, 2w) in [0, 1]: back-projected, and the median of eight turned outputs."""
    def once(image):
        return archs.upscale_tiled(net, image, 2).clamp(0, 1)

    def projected(sr):
        return kernels.back_project(sr, lq, kernel, config["rounds"])
    if not config["ensemble"]:
        return projected(once(lq))
    outputs = torch.stack(list(map(projected, kernels.eight_ways(once, lq))))
    # of eight values the mean of the two in the middle
    return projected(outputs.sort(0).values[3:5].mean(0))


def super_resolve(lq, kernel, config, seed, stem, **training):
    """(1, 3, h, w) -> (1, 3, 4h, 4w): two x2 runs with the same kernel. Seeds follow from the image's name."""
    for k in range(2):
        net, steps = train(lq, kernel, config, runs.sample_seed(seed, 0, k, f"zssr {stem}"), **training)
        lq = enlarge(net, lq, kernel, config)
        print(f"{stem}: x{2 ** (k + 1)} after {steps} steps")
    return lq


def find_kernels(folder, stems):
    """{stem: (K, K) float tensor} of folder/<stem>.npy. UserError where one is missing or is no kernel."""
    found = {}
    for stem in stems:
        file = folder / f"{stem}.npy"
        if not file.is_file():
            raise runs.UserError(f"--kernels {folder}: no {file.name}; python -m selfsup.kernelgan makes it")
        try:
            kernel = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise runs.UserError(f"{file}: not a kernel ({error})") from None
        if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1] or len(kernel) % 2 == 0:
            raise runs.UserError(f"{file}: {kernel.shape} numbers, expected a square of odd side")
        found[stem] = torch.from_numpy(kernel).float()
    return found


def main(args):
    world, autocast, files = options.start_images(args, "zssr")
    kernels_of = find_kernels(args.kernels, files) if args.kernels else {}
    for stem, path in list(files.items())[world.rank::world.size]:
        target = args.out / f"{stem}.png"
        if target.exists():
            continue
        lq = load_image(path)[None].to(world.device).float() / 255
        sr = super_resolve(lq, kernels_of.get(stem), CONFIGS[args.config], args.seed, stem, width=args.width,
                           crop=args.crop, total_steps=args.total_steps, lr=args.lr, autocast=autocast)
        if not sr.isfinite().all():
            raise runs.UserError(f"{path}: the training diverged: take a smaller --lr")
        runs.write_atomic(target, partial(save_image, image=sr[0]))
    world.barrier()
    if world.is_main:
        print(f"done: {len(files)} images in {args.out}")


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
