"""KernelGAN: the blur kernel of a low-resolution image, from that image alone (Bell-Kligler et al., NeurIPS 2019).

    python -m selfsup.kernelgan --demo                              small and short, on a CPU
    python -m selfsup.kernelgan --lr-dir PHOTOS --out kernels       then: selfsup.zssr --kernels kernels

The patches of a photograph look alike at several scales. So a linear generator G learns to shrink the image X by 2 such
that a discriminator cannot tell patches of G(X) from patches of X. G is one kernel: it is what the camera did to the
scene. The estimate is rough: centred, of about the right width for blurred images, too round, and near a width of 1.2
pixels for sharp ones, where bicubic is the better guess. Judge it by the super-resolution, not by the kernel.

Leaves OUT/<image>.npy, the x2 kernel (float64, sum 1, shifted as selfsup/kernels.py explains); OUT/<image>_x4.npy, that
of two such steps; OUT/<image>.png, the first one as a picture; and OUT/kernelgan.json. The same command continues.
Written from descriptions of the method; its released code has another licence and was not used.
"""
from pathlib import Path

import runs
from selfsup import options

# CHOICE: a quarter of a minute for each image. The demo's LR images are too small: its photographs stand in for them
DEMO = dict(lr_dir=options.DEMO_PHOTOS, out=Path("runs/kernelgan-demo"), total_steps=500, threads=1)


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--demo", action="store_true", help="the demo's photographs, 500 steps; same code")
    p.add_argument("--lr-dir", type=Path, metavar="DIR", help="low-resolution images, sides of at least 84 pixels")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of the kernels")
    p.add_argument("--total-steps", type=runs.SIZE, default=3000,
                   help="KernelGAN: 3,000; after 1,000 kernels hardly move any more")
    options.add_seeded_machine(p)
    if p.parse_known_args(argv)[0].demo:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    options.need_folders(p, args)
    return args


# --help and flag errors need no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy import ndimage
from torch.nn.utils.parametrizations import spectral_norm

from images import load_image, save_image
from selfsup import kernels

# side of the kernel; of the crops that G shrinks (64 -> 26) and that D compares (26 -> a map of 20 x 20)
KERNEL, G_CROP, D_CROP = 13, 64, 26
# every so many steps the learning rate falls by 10, and the weight of the bicubic term by 100
FALL, RELAX = 750, 200
# CHOICE: the bicubic term counts as met below this. KernelGAN's 0.4 belongs to another target, see Penalties
MET = 0.04


class Generator(nn.Module):
    """A chain of linear layers, valid and without biases, that acts as one 13 x 13 kernel: (B, 3, H, W) -> half of it.

    Trained as a deep linear network, computed as its kernel: the same values and gradients in a quarter of the time.
    """

    def __init__(self):
        super().__init__()
        shapes = [(64, 1, 7), (64, 64, 5), (64, 64, 3), (64, 64, 1), (64, 64, 1), (1, 64, 1)]
        self.layers = nn.ParameterList(nn.Parameter(torch.empty(o, i, k, k)) for o, i, k in shapes)
        for layer in self.layers:
            nn.init.xavier_normal_(layer, gain=0.1)

    def kernel(self):
        """(13, 13): what the layers make of a single bright pixel, turned around."""
        x = F.pad(self.layers[0].new_ones(1, 1, 1, 1), (KERNEL - 1,) * 4)
        for layer in self.layers:
            x = F.conv2d(x, layer)
        return x[0, 0].flip(0, 1)

    def forward(self, images):
        return shrink(images, self.kernel())


def shrink(images, kernel):
    """Valid correlation of every channel, of which every second pixel is kept."""
    small = F.conv2d(images.flatten(0, 1)[:, None], kernel[None, None], stride=2)
    return small[:, 0].unflatten(0, images.shape[:2])


def discriminator():
    """(1, 3, H, W) in [-1, 1] -> (1, 1, H - 6, W - 6): is this 7 x 7 patch one of X? In train mode throughout."""
    layers = [spectral_norm(nn.Conv2d(3, 64, 7))]
    for _ in range(5):
        layers += [spectral_norm(nn.Conv2d(64, 64, 1)), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(64, 1, 1)), nn.Sigmoid())


class Penalties:
    """What a kernel should be like. The call gives their weighted sum and goes on to the next step's weights.

    At first G should shrink as bicubic interpolation does. Once it nearly does, this is let go, by a factor of 100
    every 200 steps, and the kernel shall be centred and sparse instead. (KernelGAN's released code compares with a grey
    image of three times the contrast; this one compares each channel with its own.)
    """

    def __init__(self):
        self.bicubic, self.centre, self.sparse = 5.0, 0.0, 0.0
        self.met_running, self.step = 0, 0
        line = np.exp(-0.5 * ((np.arange(KERNEL) - KERNEL // 2) / KERNEL) ** 2)
        bump = np.outer(line, line)
        mask = 30 * (1 - bump / bump.max())
        mask[2:-2, 2:-2] = 0
        self.mask = torch.from_numpy(mask).float()

    def terms(self, kernel, images, shrunk):
        """{"sum", "boundary", "bicubic", "centre", "sparse"}; the last two only while they count.

        The centre of mass divides by a sum that is near 0 at first.
        """
        target = kernels.bicubic(images, 0.5)[..., 3:-3, 3:-3]
        terms = {"sum": (1 - kernel.sum()).abs(), "boundary": (kernel * self.mask.to(kernel)).abs().mean(),
                 "bicubic": (shrunk - target).square().mean()}
        if self.centre:
            places = torch.arange(KERNEL).to(kernel)
            centres = torch.stack([(kernel.sum(1) * places).sum(), (kernel.sum(0) * places).sum()]) / kernel.sum()
            terms["centre"] = (centres - (KERNEL // 2 + 0.5)).square().mean()
            # the power has no finite slope at 0
            terms["sparse"] = (kernel.abs() + 1e-12).pow(0.2).mean()
        return terms

    def __call__(self, kernel, images, shrunk):
        terms = self.terms(kernel, images, shrunk)
        weights = {"sum": 0.5, "boundary": 0.5, "bicubic": self.bicubic, "centre": self.centre, "sparse": self.sparse}
        self.go_on(terms["bicubic"].item())
        return sum(weights[name] * value for name, value in terms.items())

    def go_on(self, error):
        self.step += 1
        if self.met_running < 3:
            self.met_running = self.met_running + 1 if error < MET else 0
        if self.met_running >= 3 and self.step % RELAX == 0 and self.bicubic > 5e-6:
            self.bicubic = max(self.bicubic / 100, 5e-6)
            if self.bicubic < 5e-3:
                self.centre, self.sparse = 1.0, 5.0


def crop_probabilities(image, crop, halved=False):
    """(H, W): how likely each pixel is the centre of a crop: where edges are strong. image: (3, H, W) in [0, 1].

    halved: edges of the image at half its size, since G's crops are judged after shrinking.
    """
    whole = image.shape[1:]
    if halved:
        image = kernels.bicubic(image[None], 0.5)[0]
    strength = kernels.gradient_map(image.mean(0).cpu().numpy())
    if halved:
        strength = strength.repeat(2, 0).repeat(2, 1)
    # the filter's running sums end a little below 0
    strength = ndimage.uniform_filter(strength, crop // 2, mode="constant").clip(0)
    inside = np.zeros(whole)
    inside[crop // 2:-(crop // 2), crop // 2:-(crop // 2)] = 1
    strength = strength * inside if (strength * inside).any() else inside
    return strength / strength.sum()


def draw_crops(probabilities, crop, count, rng):
    """(count, 2): top and left, even numbers."""
    centres = rng.choice(probabilities.size, count, p=probabilities.ravel())
    corners = np.stack(np.unravel_index(centres, probabilities.shape), 1) - crop // 2
    return np.maximum(corners, 0) // 2 * 2


def estimate(image, seed, total_steps=3000):
    """(1, 3, H, W) in [0, 1] -> (13, 13) float64 array, what G learned. The image stays as it is."""
    image = image[..., :image.shape[2] // 2 * 2, :image.shape[3] // 2 * 2]
    rng, noise = np.random.default_rng(seed), torch.Generator(image.device).manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        g, d = Generator().to(image.device), discriminator().to(image.device).train()
    opts = [torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in (g, d)]
    penalties = Penalties()
    corners = [draw_crops(crop_probabilities(image[0], crop, halved), crop, total_steps, rng)
               for crop, halved in ((G_CROP, True), (D_CROP, False))]
    image = 2 * image - 1

    def noisy(x, std):
        # without it D sees the rounding of the real one to 8 bit
        return x + std * torch.randn(x.shape, generator=noise, device=x.device)
    for step in range(total_steps):
        (y, x), (v, u) = corners[0][step], corners[1][step]
        large, real = image[..., y:y + G_CROP, x:x + G_CROP], image[..., v:v + D_CROP, u:u + D_CROP]
        kernel = g.kernel()
        fake = shrink(large, kernel)
        # L1, although the method's name says least squares
        loss = (d(fake) - 1).abs().mean() + penalties(kernel, large, fake)
        opts[0].zero_grad(set_to_none=True)
        loss.backward()
        opts[0].step()
        with torch.no_grad():
            fake = g(large)
        loss = ((d(noisy(real, 2 / 255)) - 1).abs().mean() + d(noisy(fake, 1 / 255)).abs().mean()) / 2
        opts[1].zero_grad(set_to_none=True)
        loss.backward()
        opts[1].step()
        if (step + 1) % FALL == 0:
            for group in (group for opt in opts for group in opt.param_groups):
                group["lr"] /= 10
    with torch.no_grad():
        return g.kernel().double().cpu().numpy()


def finish(kernel):
    """What G learned -> the x2 kernel: small values become 0 (below 3/4 of the 41st largest), sum 1, shifted."""
    kernel = np.clip(kernel - 0.75 * np.sort(kernel.ravel())[-41], 0, None)
    return kernels.aligned(kernel / kernel.sum())


def draw_kernel(path, kernel, side=16):
    """PNG: white is the largest value, a tap has 16 x 16 pixels."""
    picture = torch.from_numpy((kernel / kernel.max()).clip(0, 1)).float()[None].repeat(3, 1, 1)
    runs.write_atomic(path, partial(save_image, image=picture.repeat_interleave(side, 1).repeat_interleave(side, 2)))


def save_array(path, values):
    def write(temporary):
        with open(temporary, "wb") as file:
            np.save(file, values)
    runs.write_atomic(path, write)


def main(args):
    world, _, files = options.start_images(args, "kernelgan")
    kernels.check_files(files.values())
    for stem, path in list(files.items())[world.rank::world.size]:
        target = args.out / f"{stem}.npy"
        if target.exists():
            continue
        image = load_image(path)[None].to(world.device).float() / 255
        learned = estimate(image, runs.sample_seed(args.seed, 0, 0, f"kernelgan {stem}"), args.total_steps)
        if not np.isfinite(learned).all():
            raise runs.UserError(f"{path}: the training diverged: take another --seed")
        kernel = finish(learned)
        offsets = np.arange(len(kernel)) - len(kernel) // 2 - 0.5
        widths = [np.sqrt(max((kernel.sum(axis) * offsets ** 2).sum(), 0)) for axis in (1, 0)]
        print(f"{stem}: {widths[0]:.2f} pixels down, {widths[1]:.2f} across (standard deviations)", flush=True)
        draw_kernel(args.out / f"{stem}.png", kernel)
        save_array(args.out / f"{stem}_x4.npy", kernels.twice(kernel))
        # last: it says that the image is done
        save_array(target, kernel)
    world.barrier()
    if world.is_main:
        print(f"done: {len(files)} kernels in {args.out}")


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
