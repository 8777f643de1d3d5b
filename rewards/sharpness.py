"""Sharpness alone, as a control for no-reference quality models: the logarithm of the variance of the Laplacian.

    python analyze_iqa.py score ... --metrics musiq rewards.sharpness:build

No quality model: it calls noise, halos and grids sharp. Where it agrees with people as well as a model does, the
agreement of the model may be no more than sharpness. Never optimise it.
"""
import torch
import torch.nn.functional as F


def log_laplacian_variance(x):
    """(B, 3, H, W) RGB in [0, 1] -> (B,): natural log of the variance of the Laplacian of 8-bit luma.

    The Laplacian is the sum of four neighbours minus four times the pixel, without the border; luma of BT.601 in grey
    levels. A flat image has the log of 1e-6. Pech-Pacheco et al., ICPR 2000, as a measure of focus.
    """
    luma = 255 * (x * torch.tensor([0.299, 0.587, 0.114], device=x.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=x.device)[None, None]
    return F.conv2d(luma, kernel).flatten(1).var(1, unbiased=False).clamp_min(1e-6).log()


def build(device="cpu"):
    return log_laplacian_variance
