"""Resampling for the methods that learn from one image: MATLAB's bicubic, blur kernels of a camera, back-projection.

    small = downscale(images, kernel)             the x2 degradation that ZSSR assumes; kernel None: bicubic
    sr = back_project(sr, lq, kernel, 10)         sr that gives lq when it is shrunk again

Images are (B, C, H, W) float. Kernels are (K, K), K odd. They act by correlation (they are not flipped) and on a grid
whose pixel 0 lies half a pixel off: the centre of mass must be at K // 2 + (scale - 1) / 2. Otherwise an enlarged image
is shifted against its source, which costs 3 dB (see aligned).
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage, signal

import runs
from images import image_size

# CHOICE: a crop of KernelGAN's generator, 64 pixels, and room to move it
SMALLEST = 64 + 20


def mirrored(images, margin):
    """(B, C, H, W) with `margin` more pixels on every side: MATLAB's border, which repeats the edge pixel."""
    for dim in (2, 3):
        index = np.pad(np.arange(images.shape[dim]), margin, mode="symmetric")
        images = images.index_select(dim, torch.from_numpy(index).to(images.device))
    return images


def bicubic(images, scale):
    """MATLAB's imresize by 2 or 1/2 (or another whole number, or one over it): a = -0.5, antialiased, mirrored borders.

    Not clipped. UserError where the sides do not divide.
    """
    factor = round(max(scale, 1 / scale))
    check_sides(images, 1 if scale > 1 else factor)
    # what the kernel sees beyond the border; PyTorch's own border is another
    margin = 4 if scale > 1 else 4 * factor
    size = [round((side + 2 * margin) * scale) for side in images.shape[2:]]
    resized = F.interpolate(mirrored(images, margin), size=size, mode="bicubic", antialias=True)
    margin = round(margin * scale)
    return resized[..., margin:size[0] - margin, margin:size[1] - margin]


def check_sides(images, scale):
    if any(side % scale for side in images.shape[2:]):
        size = f"{images.shape[3]}x{images.shape[2]}"
        raise runs.UserError(f"{size} pixels do not divide by {scale}: crop the image first")


def check_files(paths):
    """UserError for the first image that is too small for KernelGAN."""
    for path in paths:
        width, height = image_size(path)
        if min(width, height) < SMALLEST:
            raise runs.UserError(f"{path}: {width}x{height} pixels, KernelGAN needs sides of at least {SMALLEST}; "
                                 "take the image out of the folder (selfsup.table1: or the row out of --rows)")


def downscale(images, kernel=None, scale=2):
    """(B, C, H, W) -> (B, C, H / scale, W / scale): correlation with a kernel, of which every scale-th pixel is kept.

    kernel: (K, K) tensor, or None for bicubic. Mirrored borders. UserError where the sides do not divide.
    """
    check_sides(images, scale)
    if kernel is None:
        return bicubic(images, 1 / scale)
    padded = mirrored(images, len(kernel) // 2)
    small = F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None].to(images), stride=scale)
    return small[:, 0].unflatten(0, images.shape[:2])


def back_project(sr, lq, kernel, rounds):
    """Add to sr, twice as large, what is missing in it, `rounds` times: sr + up(lq - down(sr)), clipped to [0, 1]."""
    for _ in range(rounds):
        sr = (sr + bicubic(lq - downscale(sr, kernel), 2)).clamp(0, 1)
    return sr


def eight_ways(function, images):
    """[function of the images turned by multiples of 90 degrees and mirrored, turned back], of all eight ways."""
    outputs = []
    for turns in range(4):
        for mirror in (False, True):
            turned = images.rot90(turns, (2, 3))
            output = function(turned.flip(3) if mirror else turned)
            outputs.append((output.flip(3) if mirror else output).rot90(-turns, (2, 3)))
    return outputs


def aligned(kernel, scale=2):
    """(K, K) array -> kernel of sum 1 whose centre of mass is at K // 2 + (scale - 1) / 2, by cubic splines.

    It grows by what the shift needs: usually from 13 to 17 taps.
    """
    goal = len(kernel) // 2 + (scale - 1) / 2
    shift = [goal - centre for centre in ndimage.center_of_mass(kernel)]
    shifted = ndimage.shift(np.pad(kernel, math.ceil(max(map(abs, shift))) + 1), shift)
    return shifted / shifted.sum()


def twice(kernel):
    """The x4 kernel of two x2 steps with the same (K, K) kernel: (2 K - 1, 2 K - 1).

    The second step sees every second pixel, so it is the kernel convolved with itself spread apart.
    """
    size = len(kernel)
    spread = np.zeros((2 * size - 1, 2 * size - 1))
    spread[::2, ::2] = kernel
    both = signal.convolve2d(kernel, spread)[size // 2:-(size // 2), size // 2:-(size // 2)]
    return both / both.sum()


def gradient_map(image, share=0.03, margin=5):
    """Where an image has its strongest edges: (H, W) in [0, 1] array -> (H, W) of mean 1, all zero for a flat image.

    The places of the largest `share` of the horizontal, vertical and whole gradient, each of weight 1 together, in a
    5 x 5 box; nothing near the border.
    """
    total = np.zeros(image.shape)
    down, right = np.gradient(image)
    for part in (np.abs(right), np.abs(down), np.hypot(right, down)):
        part[:margin], part[-margin:], part[:, :margin], part[:, -margin:] = 0, 0, 0, 0
        largest = part > np.quantile(part, 1 - share)
        total += largest / max(largest.sum(), 1)
    total = ndimage.uniform_filter(total, 5, mode="constant").clip(0)
    return total / total.mean() if total.any() else total
