"""What a super-resolved image is judged by: full-reference metrics, structure where there should be none, and the NR-IQA models of iqa.py.

    metric = create_metric("niqe", device); metric(sr, gt)      (B, 3, H, W) RGB in [0, 1] -> (B,), native units; metric.lower_is_better
"""
import math
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity

import archs
import degradations
import iqa


def luma(x):
    """(B, 3, H, W) RGB in [0, 1] -> (B, 1, H, W): Y of BT.601 in its studio range, 16/255 to 235/255, as MATLAB's rgb2ycbcr and BasicSR have it."""
    return (x * x.new_tensor([65.481, 128.553, 24.966]).view(3, 1, 1)).sum(1, keepdim=True) / 255 + 16 / 255


def crop(x, border):
    return x[..., border:x.shape[2] - border, border:x.shape[3] - border]


def psnr(sr, gt, border=4):
    """Peak signal-to-noise ratio in dB of (B, C, H, W) in [0, 1], over all channels, `border` pixels cropped (HGGT). -> (B,)

    Identical images give 100. ValueError for another shape, or one that the border leaves nothing of.
    """
    check_pair("PSNR", sr, gt, border)
    error = crop(sr - gt, border).double().square().mean((1, 2, 3))
    return -10 * error.clamp_min(1e-10).log10()


def ssim(sr, gt, border=4):
    """Structural similarity (Wang et al., 2004) of (B, C, H, W) in [0, 1]: mean over channels. -> (B,)

    `border` pixels are cropped (HGGT); 11x11 Gaussian window of sigma 1.5, valid region only. ValueError as psnr.
    """
    check_pair("SSIM", sr, gt, border + 5)
    images = [crop(image, border).double().cpu().numpy() for image in (sr, gt)]
    return torch.tensor([structural_similarity(a, b, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                               channel_axis=0) for a, b in zip(*images)], dtype=torch.float64)


def flat_hf(sr, gt, block=16, flat=0.25):
    """How much grid and noise stands where nothing should be: high-frequency share of the spectral energy of flat blocks.

    sr, gt: (B, 3, H, W) RGB in [0, 1] -> (B,) in [0, 1]. Flat are the quarter of the reference's 16x16 blocks with the least standard
    deviation of luma (a border of 16 pixels is left out), so that all methods are judged at the same places. Energy is that of SR's
    luma, mean removed, under a Hann window, of these blocks together; high is from 0.25 cycles per pixel upwards in either
    direction, where the 4-pixel grid of an x4 pixel shuffle has its lowest line. ValueError as psnr.
    """
    check_pair("flat_hf", sr, gt, 2 * block)
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64, device=sr.device).view(3, 1, 1)

    def blocks(image):                                                           # -> (B, N, 16, 16) grey levels
        grey = (255 * image.double() * luma).sum(1)[:, block:image.shape[2] - block, block:image.shape[3] - block]
        return grey.unfold(1, block, block).unfold(2, block, block).flatten(1, 2)

    spread = blocks(gt).flatten(2).std(2)
    quiet = spread.argsort(1)[:, :max(1, int(flat * spread.shape[1]))]
    chosen = blocks(sr).gather(1, quiet[..., None, None].expand(-1, -1, block, block))
    window = torch.hann_window(block, periodic=False, dtype=torch.float64, device=sr.device)
    energy = torch.fft.fft2((chosen - chosen.mean((2, 3), keepdim=True)) * window * window[:, None]).abs().square().sum(1)
    high = torch.fft.fftfreq(block, device=sr.device).abs() >= 0.25
    return (energy * (high | high[:, None])).sum((1, 2)) / energy.sum((1, 2)).clamp_min(1e-9)


PEAKS_ABOVE_UNSHARP = 0.03     # CHOICE, fixed on synthetic grids before any fine-tuning was judged: see tests/test_finetune.py


def noise_peaks(residual, window=64, low=0.2, times=8.0):
    """Structured noise: share of the spectral energy of a change that stands in isolated high-frequency peaks.

    residual: (B, 3, H, W), SR of the tuned network minus SR of its base, sides of at least 64 -> (B,) in [0, 1]. A pixel grid is a few
    sharp peaks; sharpening and new texture spread smoothly. The spectrum of the luma is averaged over half-overlapping 64x64 Hann
    windows; a peak is a frequency of `low` cycles per pixel or more, in either direction, with `times` the energy of the median of its 9x9
    neighbours; its energy is what exceeds that median. 0 for no change at all.
    """
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64, device=residual.device).view(3, 1, 1)
    grey = (255 * residual.double() * luma).sum(1)
    if min(grey.shape[1:]) < window:
        raise ValueError(f"noise_peaks wants images with sides of at least {window} pixels, got {tuple(grey.shape[1:])}")
    blocks = grey.unfold(1, window, window // 2).unfold(2, window, window // 2).flatten(1, 2)              # (B, N, 64, 64)
    hann = torch.hann_window(window, dtype=torch.float64, device=grey.device)
    floor = 0.1 ** 2 * window ** 2 * hann.square().sum() ** 2                      # of a change of a tenth of a grey level
    power = torch.fft.fft2((blocks - blocks.mean((2, 3), keepdim=True)) * hann * hann[:, None]).abs().square()               # (B, N, 64, 64)
    power = (power / (power.sum((2, 3), keepdim=True) + floor)).mean(1)
    around = F.pad(power[:, None], (4, 4, 4, 4), mode="circular")[:, 0].unfold(1, 9, 1).unfold(2, 9, 1).flatten(3).median(3).values
    high = torch.fft.fftfreq(window, device=grey.device).abs() >= low
    peaks = (power > times * around) & (high | high[:, None])
    return ((power - around) * peaks).sum((1, 2))


def unsharp(images, amount):
    """8-bit result of a plain unsharp mask, Gaussian of sigma 1.5, of (B, 3, H, W)."""
    return degradations.to_8bit(images + amount * (images - degradations.blur(images, degradations.gaussian_kernel(9, 1.5))))


def unsharp_like(base, sr, reward, amounts=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)):
    """A plain unsharp mask (Gaussian, sigma 1.5) of `base`, the weakest with at least the reward of `sr`, else the one with the highest.

    (1, 3, H, W) twice -> the mask's image, and whether it has as much reward: sharpening alone often cannot earn what tuning can.
    """
    best, wanted = (-math.inf, base), reward(sr).item()
    for amount in amounts:
        image = unsharp(base, amount)
        best = max(best, (reward(image).item(), image), key=lambda pair: pair[0])
        if best[0] >= wanted:
            break
    return best[1], best[0] >= wanted


def check_pair(metric, sr, gt, border):
    if sr.shape != gt.shape or min(sr.shape[2:]) <= 2 * border:
        raise ValueError(f"{metric} of an output of {tuple(sr.shape[2:])} pixels against a reference of {tuple(gt.shape[2:])}: the reference "
                         f"must be x4 the input, and more than {2 * border} pixels")


@dataclass(frozen=True)
class Metric:
    """metric(sr, gt): (B, 3, H, W) RGB in [0, 1] twice -> (B,) in native units; gt is not used unless full_reference."""
    function: Callable
    lower_is_better: bool = False
    full_reference: bool = False
    identity: object = None                                                      # what a score depends on beside images, border and luma: plain values

    def __call__(self, sr, gt):
        return self.function(sr, gt)


def create_metric(name, device, weights_file=None, border=4, y=False, flag="--metrics"):
    """The Metric called `name`, for evaluation.

    name: psnr, ssim (y: on luma only), vgg (distance of VGG19 features, the loss of Eq. 1), flat_hf, a pyiqa metric (lpips, stlpips and dists
    are full-reference ones; niqe, musiq, ... are not), ranker, or module:function. border: pixels that full-reference metrics but
    vgg and flat_hf crop from every side (HGGT, LPIPS and DISTS included); no-reference ones see the whole image. weights_file: a
    local copy of the weights. flag: named in errors. Raises as iqa.create_reward does.
    """
    if "=" in name:
        raise ValueError(f"{flag} {name}: a metric has no weight here; write {name.partition('=')[0]}")
    if name == "vgg":
        distance = archs.VGGFeatureLoss(weights_file).to(device)

        def each(sr, gt):
            wanted = distance.taps(gt[:1]) if gt.stride(0) == 0 else None         # one ground truth, expanded: looked through once
            return torch.stack([distance(a[None], b[None], wanted) for a, b in zip(sr, gt)])
        return Metric(each, True, True, [name, iqa.tensors_hash(distance)])
    if name == "flat_hf":
        return Metric(flat_hf, True, True, [name])
    if name in ("psnr", "ssim"):
        function = {"psnr": psnr, "ssim": ssim}[name]
        return Metric(lambda sr, gt: function(luma(sr), luma(gt), border) if y else function(sr, gt, border), False, True, [name])
    if name != "ranker" and ":" not in name and iqa.pyiqa_modes().get(name) == "FR":
        model = iqa.pyiqa_model(name, device, weights_file, mode="FR", flag=flag)

        @torch.no_grad()
        def judge(sr, gt):
            check_pair(name, sr, gt, border)
            return model(crop(sr, border), crop(gt, border)).reshape(-1).float()
        return Metric(judge, model.lower_better, True, [name, iqa.tensors_hash(model)])
    reward = iqa.create_reward([name], device, weights_file, flag=flag)
    sign = -1 if getattr(next(iter(reward.models.values())), "lower_better", False) else 1
    return Metric(lambda sr, gt: sign * reward(sr), sign < 0, False, reward.identity())
