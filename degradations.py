"""Synthetic x4 degradation in batches: HGGT's one and two rounds, Real-ESRGAN's original ranges, and MATLAB's bicubic.

    lq = degrade(gt, "one-round", seeds, group_seeds)    (B, 3, H, W) -> (B, 3, H/4, W/4), in [0, 1]; lq exactly 8-bit
    lq = fixed(gt, "two-round", "kodim01")               the LR image of a test image: always the same

Every draw is a function of two integers per image. `seeds[i]` gives what HGGT draws per sample: kernels, noise level,
Poisson scale, gray flag, JPEG quality, the sample's noise field. `group_seeds[i]` gives what HGGT draws once per GPU
batch: up/down/keep, scale, interpolation mode, Gaussian or Poisson, whether the second blur happens, the order of the
last steps, and the one gray Gaussian field that all gray samples share. Lanes with equal group seeds form a group.
Numbers are drawn first (`draw_sample`, `draw_group`: no image needed) and pixels follow, so that the distributions can
be tested on their own.

Differences from HGGT's and Real-ESRGAN's code, and the reasons:
- No autograd and no modules: the original's JPEG tables are global trainable parameters, so its LRs require a gradient,
  and CPU and GPU cannot be used side by side.
- Seeds instead of a process's random state: a result does not depend on the other images, the batch size or the number
  of processes (bitwise on CPU). CPU and CUDA generators differ, so equal seeds give other noise fields there.
- Groups of lanes instead of "the batch of one GPU". The shared gray field is HGGT's; one group per lane shares nothing.
- A kernel larger than the size to pad to is an error, not a negative padding. Numbers that a branch does not need are
  drawn all the same, so changing a probability leaves the other draws where they were.
- Resizing never anti-aliases and needs no torchvision. `keep` skips an interpolation that would be the identity.
- JPEG: HGGT's luma table is transposed relative to libjpeg's and its padding is black. The paper's models saw both, so
  both are the default; jpeg_table="libjpeg" corrects them. The quality tensor is not overwritten, and there is no loop
  over samples. q = 100, which divides by zero, is refused. The DCT runs in float64, out of reach of TF32 and autocast.
- Poisson noise counts distinct levels by scattering into 256 bins and draws the gray or the colour noise, not both.
- Left to the caller: Real-ESRGAN's USM on the input (`usm_sharpen`), its 400-pixel pre-crop, the crop after degrading.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import dct
from scipy.special import j1

import runs

# equally likely, never anti-aliased
MODES = ("area", "bilinear", "bicubic")
# in the order of resize_prob
RESIZES = ("up", "down", "keep")

# Kernel sizes and sigmas in pixels, gaussian_sigma in grey levels (0-255), ranges are uniform.
# HGGT options; its betas are never used
HGGT = dict(blur_prob=1.0, sinc_prob=0.01, families=dict(iso=0.7, aniso=0.3), betag=(0.1, 2.0), betap=(0.1, 1.0),
            resize_prob=(0.1, 0.85, 0.05), gaussian_prob=0.5, gray_prob=0.2)
# Real-ESRGAN options
REALESRGAN = dict(blur_prob=1.0, kernel_sizes=tuple(range(7, 22, 2)), sinc_prob=0.1, betag=(0.5, 4.0), betap=(1.0, 2.0),
                  families=dict(iso=0.45, aniso=0.25, generalized_iso=0.12, generalized_aniso=0.03,
                                plateau_iso=0.12, plateau_aniso=0.03),
                  gaussian_prob=0.5, gray_prob=0.4, jpeg_quality=(30, 95))
PRESETS = {
    # HGGT options; no final sinc
    "one-round": dict(pad_kernels_to=9, final_sinc_prob=0.0, final_sinc_sizes=(3,), rounds=[
        HGGT | dict(kernel_sizes=(3, 5, 7, 9), blur_sigma=(0.1, 1.0), resize_range=(0.8, 1.2), gaussian_sigma=(1, 12),
                    poisson_scale=(0.05, 0.8), jpeg_quality=(75, 95))]),
    # HGGT options
    "two-round": dict(pad_kernels_to=9, final_sinc_prob=0.1, final_sinc_sizes=(3, 5), rounds=[
        HGGT | dict(kernel_sizes=(3, 5, 7), blur_sigma=(0.1, 0.6), resize_range=(0.9, 1.1), gaussian_sigma=(1, 8),
                    poisson_scale=(0.05, 0.5), jpeg_quality=(85, 95)),
        HGGT | dict(kernel_sizes=(3, 5), blur_sigma=(0.1, 0.4), resize_range=(0.9, 1.1), gaussian_sigma=(0, 4),
                    poisson_scale=(0.0, 0.3), jpeg_quality=(87, 95), blur_prob=0.8)]),
    # CHOICE, of no paper: much blur and little else, for self-supervision on a CPU
    "blur": dict(pad_kernels_to=21, final_sinc_prob=0.0, final_sinc_sizes=(3,), rounds=[
        REALESRGAN | dict(kernel_sizes=(21,), sinc_prob=0.0, families=dict(iso=0.5, aniso=0.5), blur_sigma=(0.2, 4.0),
                          resize_prob=(0.0, 0.0, 1.0), resize_range=(1.0, 1.0), gaussian_sigma=(0, 6),
                          gaussian_prob=1.0, poisson_scale=(0.0, 0.1), jpeg_quality=(60, 95))]),
    # CHOICE, of no paper: a camera's order, for self-supervision: blur on the HR grid, noise and JPEG on that of the LR
    # image, which keeps 6 grey levels of the noise (median of 240 draws on photographs). "blur" shrinks after its noise
    # and JPEG and keeps 1.5; "realesrgan" keeps 10
    "lr-grid": dict(pad_kernels_to=21, final_sinc_prob=0.0, final_sinc_sizes=(3,), rounds=[
        REALESRGAN | dict(kernel_sizes=(21,), sinc_prob=0.0, families=dict(iso=0.5, aniso=0.5), blur_sigma=(0.2, 4.0),
                          resize_prob=(0.0, 0.0, 1.0), resize_range=(1.0, 1.0), gaussian_prob=1.0,
                          gaussian_sigma=(0, 0), poisson_scale=(0.0, 0.0), jpeg_quality=(99, 99.9)),
        REALESRGAN | dict(kernel_sizes=(3,), blur_prob=0.0, blur_sigma=(0.2, 0.3), resize_prob=(0.0, 0.0, 1.0),
                          resize_range=(1.0, 1.0), gaussian_prob=0.7, gaussian_sigma=(0, 12),
                          poisson_scale=(0.0, 1.0), jpeg_quality=(20, 95))]),
    # Real-ESRGAN options
    "realesrgan": dict(pad_kernels_to=21, final_sinc_prob=0.8, final_sinc_sizes=tuple(range(7, 22, 2)), rounds=[
        REALESRGAN | dict(blur_sigma=(0.2, 3.0), resize_prob=(0.2, 0.7, 0.1), resize_range=(0.15, 1.5),
                          gaussian_sigma=(1, 30), poisson_scale=(0.05, 3.0)),
        REALESRGAN | dict(blur_sigma=(0.2, 1.5), resize_prob=(0.3, 0.4, 0.3), resize_range=(0.3, 1.2),
                          gaussian_sigma=(1, 25), poisson_scale=(0.05, 2.5), blur_prob=0.8)]),
}


@torch.no_grad()
def degrade(gt, preset, seeds, group_seeds, jpeg_table="hggt"):
    """Low-quality input of each ground truth: one or two rounds of blur, resize, noise and JPEG, down to a quarter.

    gt:          (B, 3, H, W) float RGB in [0, 1], H and W multiples of 4; whole images, cropped afterwards
    preset:      a name in PRESETS or a dict with the same keys
    seeds:       B ints >= 0, for what HGGT draws per sample
    group_seeds: B ints >= 0, equal for the lanes of one group, for what HGGT draws once per GPU batch
    jpeg_table:  "hggt" (the paper) or "libjpeg", see jpeg()
    Returns (B, 3, H/4, W/4) float32 in [0, 1], every value a multiple of 1/255, no gradient.
    "realesrgan" expects gt already sharpened by usm_sharpen and cropped to 400 pixels.
    Raises ValueError for a bad preset, shape, range or seed. The range is checked on CPU only: on CUDA that is a sync.
    """
    preset = get_preset(preset)
    if gt.ndim != 4 or gt.shape[1] != 3 or not gt.is_floating_point():
        raise ValueError(f"degrade: gt must be a float tensor (B, 3, H, W), got {gt.dtype} {tuple(gt.shape)}")
    b, _, h, w = gt.shape
    if h % 4 or w % 4:
        raise runs.UserError(f"degrade: height and width must be multiples of 4, got {h}x{w}; crop the image first")
    if b == 0 or len(seeds) != b or len(group_seeds) != b:
        raise ValueError(f"degrade: {b} images need as many seeds and group seeds, "
                         f"got {len(seeds)} and {len(group_seeds)}")
    k, smallest = preset["pad_kernels_to"], min(h, w)
    if len(preset["rounds"]) == 2:
        # later filters see the image after the first resize, and at a quarter
        smallest = int(smallest * min(preset["rounds"][0]["resize_range"][0], 0.25))
    if smallest <= k // 2:
        raise runs.UserError(f"degrade: {h}x{w} images are too small to reflect-pad for {k}-pixel kernels; "
                             "use larger ones")
    # NaN fails too
    if not gt.is_cuda and not bool(((gt >= 0) & (gt <= 1)).all()):
        raise ValueError(f"degrade: gt must lie in [0, 1], got {gt.min():.4g} to {gt.max():.4g}; "
                         "divide 8-bit images by 255")

    gt = gt.float().contiguous()
    seeds, group_seeds = [int(s) for s in seeds], [int(s) for s in group_seeds]
    lq = [None] * b
    for group_seed in dict.fromkeys(group_seeds):
        lanes = [i for i in range(b) if group_seeds[i] == group_seed]
        samples = [draw_sample(preset, seeds[i]) for i in lanes]
        images = torch.stack([gt[i] for i in lanes])  # (b, 3, H, W)
        for i, image in zip(lanes, _degrade_group(images, samples, draw_group(preset, group_seed), jpeg_table)):
            lq[i] = image
    return torch.stack(lq)


@torch.no_grad()
def fixed(gt, degradation, stem, seed=0):
    """The LR image of a test image, the same in every call: (1, 3, H, W) -> (1, 3, H/4, W/4), in [0, 1], exactly 8-bit.

    degradation: "bicubic", or a name in PRESETS, whose draws follow from (seed, stem). Computed on the CPU, since equal
    seeds give other noise on a GPU; returned on gt's device. Raises as degrade does.
    """
    if degradation == "bicubic":
        return bicubic(gt)
    sample, group = (runs.sample_seed(seed, 0, k, f"test {stem}") for k in (0, 1))
    return degrade(gt.cpu(), degradation, [sample], [group]).to(gt.device)


@torch.no_grad()
def bicubic(images):
    """MATLAB's imresize(I, 1/4), the field's "bicubic x4": Keys's kernel (a = -0.5), antialiased, so 16 pixels wide.

    images: (B, C, H, W) in [0, 1], rounded to 8 bit first; sides multiples of 4, else UserError.
    Returns (B, C, H/4, W/4) float32 in [0, 1], exactly 8-bit. The border is mirrored with its edge pixel. In float64
    these weights and sums are exact, so the result is the same everywhere. It is rounded once, half upwards, as after
    MATLAB's im2double; of uint8 images MATLAB rounds the intermediate result as well.
    """
    h, w = images.shape[2:]
    if min(h, w) == 0 or h % 4 or w % 4:
        raise runs.UserError(f"bicubic: height and width must be multiples of 4, got {h}x{w}; crop the image first")
    # output pixel i lies at 4 i + 1.5 of the input and sees pixels 4 i - 6 to 4 i + 9
    d = np.abs(np.arange(16) - 7.5) / 4
    kernel = np.where(d <= 1, 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2) / 4
    x = (images.double() * 255).round()
    for side in (w, h):
        x = x[..., np.pad(np.arange(side), 6, mode="symmetric")]
        x = sum(weight * x[..., k:side - 3 + k:4] for k, weight in enumerate(kernel.tolist()))
        x = x.transpose(2, 3)
    return ((x + 0.5).floor().clamp(0, 255).float() / 255).contiguous()


def _degrade_group(x, samples, group, jpeg_table):
    """HGGT's sequence for lanes that share a group's draws. x (b, 3, H, W) -> (b, 3, H/4, W/4)"""
    h, w = x.shape[-2:]
    small = (h // 4, w // 4)
    kernels = [[s["rounds"][n]["kernel"] for s in samples] for n in range(len(group["rounds"]))]
    qualities = [[s["rounds"][n]["jpeg_quality"] for s in samples] for n in range(len(group["rounds"]))]

    first = group["rounds"][0]
    if first["blur"]:
        x = blur(x, np.stack(kernels[0]))
    if first["resize"] != "keep":
        x = _resize(x, first["scale"], first["mode"])
    x = jpeg(_add_noise(x, samples, group, 0), qualities[0], jpeg_table)
    if len(group["rounds"]) == 1:
        # HGGT reuses the first resize's mode
        return to_8bit(F.interpolate(x, size=small, mode=first["mode"]))

    second = group["rounds"][1]
    if second["blur"]:
        x = blur(x, np.stack(kernels[1]))
    x = F.interpolate(x, size=[int(side / 4 * second["scale"]) for side in (h, w)], mode=second["mode"])
    x = _add_noise(x, samples, group, 1)
    final_kernels = np.stack([s["final_kernel"] for s in samples])
    if group["jpeg_last"]:
        x = blur(F.interpolate(x, size=small, mode=group["final_mode"]), final_kernels)
        x = jpeg(x, qualities[1], jpeg_table)
    else:
        x = jpeg(x, qualities[1], jpeg_table)
        x = blur(F.interpolate(x, size=small, mode=group["final_mode"]), final_kernels)
    return to_8bit(x)


def _resize(x, scale, mode):
    """x enlarged or shrunk by a factor, to sides rounded down; where they do not change it stays as it is.

    So it does on CUDA, where HGGT ran, in every mode; PyTorch's code for CPUs would stretch it in bicubic mode.
    """
    size = [int(side * scale) for side in x.shape[2:]]
    return x if size == list(x.shape[2:]) else F.interpolate(x, scale_factor=scale, mode=mode)


def _add_noise(x, samples, group, n):
    """Noise of round n with the seeds of the draws; the gray Gaussian field is the group's."""
    lanes, draw = [s["rounds"][n] for s in samples], group["rounds"][n]
    if not draw["gaussian"]:
        scale, gray, seeds = zip(*[(s["poisson_scale"], s["gray"], s["noise_seed"]) for s in lanes])
        return add_poisson_noise(x, scale, gray, seeds)
    gray_field = normal_field((1, *x.shape[-2:]), draw["noise_seed"], x.device).expand_as(x[0])
    fields = [gray_field if s["gray"] else normal_field(x.shape[1:], s["noise_seed"], x.device) for s in lanes]
    return add_gaussian_noise(x, [s["gaussian_sigma"] for s in lanes], torch.stack(fields))


def get_preset(preset):
    """The preset of that name, or the given dict after a check of its keys. Raises ValueError naming what is wrong."""
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"unknown degradation preset {preset!r}; choose from {', '.join(PRESETS)}")
        return PRESETS[preset]
    model = PRESETS["two-round"]
    for given, known in [(preset, model)] + [(r, model["rounds"][0]) for r in preset.get("rounds", [])]:
        if set(given) != set(known):
            unknown, missing = sorted(set(given) - set(known)), sorted(set(known) - set(given))
            raise ValueError(f"degradation preset: unknown keys {unknown}, missing keys {missing}")
    if len(preset["rounds"]) not in (1, 2):
        raise ValueError(f"degradation preset: rounds must hold one or two entries, got {len(preset['rounds'])}")
    return preset


def draw_sample(preset, seed):
    """What HGGT draws per sample: {"rounds": [...], "final_sinc", "final_size", "final_cutoff", "final_kernel"}.

    Each round holds what draw_kernel returns, then gaussian_sigma (grey levels), poisson_scale, gray, jpeg_quality
    (real-valued) and noise_seed. Kernels are (k, k) float64 numpy with k = pad_kernels_to; final_kernel is a delta
    unless final_sinc.
    """
    preset, rng = get_preset(preset), _rng(0, seed)
    rounds = [draw_kernel(rng, r, preset["pad_kernels_to"]) | {
        "gaussian_sigma": rng.uniform(*r["gaussian_sigma"]), "poisson_scale": rng.uniform(*r["poisson_scale"]),
        "gray": bool(rng.random() < r["gray_prob"]), "jpeg_quality": rng.uniform(*r["jpeg_quality"]),
        "noise_seed": int(rng.integers(2**63))} for r in preset["rounds"]]
    sinc, size = bool(rng.random() < preset["final_sinc_prob"]), int(rng.choice(preset["final_sinc_sizes"]))
    # for any size, unlike the sinc kernels of the rounds
    cutoff = rng.uniform(np.pi / 3, np.pi)
    kernel = pad_kernel(sinc_kernel(size, cutoff) if sinc else np.ones((1, 1)), preset["pad_kernels_to"])
    return {"rounds": rounds, "final_sinc": sinc, "final_size": size, "final_cutoff": cutoff, "final_kernel": kernel}


def draw_kernel(rng, r, pad_to):
    """One blur kernel by the settings r of a round, padded to pad_to, in a dict with the numbers it was made from."""
    size, sinc = int(rng.choice(r["kernel_sizes"])), bool(rng.random() < r["sinc_prob"])
    cutoff = rng.uniform(np.pi / 3 if size < 13 else np.pi / 5, np.pi)
    family = str(rng.choice(list(r["families"]), p=list(r["families"].values())))
    sigma_x, sigma_y, theta = rng.uniform(*r["blur_sigma"]), rng.uniform(*r["blur_sigma"]), rng.uniform(-np.pi, np.pi)
    if not family.endswith("aniso"):
        sigma_y, theta = sigma_x, 0.0
    form = family.split("_")[0] if "_" in family else "gaussian"
    low, high = r["betag"] if form == "generalized" else r["betap"]
    # with betap (1, 2), half of all are exactly 1
    beta = float(rng.choice((rng.uniform(low, 1), rng.uniform(1, high))))
    kernel = sinc_kernel(size, cutoff) if sinc else gaussian_kernel(size, sigma_x, sigma_y, theta, form, beta)
    return {"kernel": pad_kernel(kernel, pad_to), "size": size, "sinc": sinc, "cutoff": cutoff, "family": family,
            "sigma_x": sigma_x, "sigma_y": sigma_y, "theta": theta, "beta": beta}


def draw_group(preset, seed):
    """What HGGT draws once per GPU batch: {"rounds": [...], "final_mode", "jpeg_last"}.

    The last two are for two rounds; one ends with the mode of its resize.

    Each round holds blur (bool), resize (of RESIZES), scale, mode (of MODES), gaussian (else Poisson), and noise_seed,
    which is that of the gray field.
    """
    preset, rng = get_preset(preset), _rng(1, seed)
    rounds = []
    for r in preset["rounds"]:
        resize, u, (low, high) = str(rng.choice(RESIZES, p=r["resize_prob"])), rng.random(), r["resize_range"]
        rounds.append({"blur": bool(rng.random() < r["blur_prob"]), "resize": resize,
                       "scale": {"up": 1 + u * (high - 1), "down": low + u * (1 - low), "keep": 1.0}[resize],
                       "mode": str(rng.choice(MODES)), "gaussian": bool(rng.random() < r["gaussian_prob"]),
                       "noise_seed": int(rng.integers(2**63))})
    return {"rounds": rounds, "final_mode": str(rng.choice(MODES)), "jpeg_last": bool(rng.random() < 0.5)}


def _rng(stream, seed):
    """NumPy generator of (stream, seed): sample and group draws are independent even if a caller passes equal seeds."""
    if seed < 0:
        raise ValueError(f"degradation seeds must be >= 0, got {seed}")
    return np.random.default_rng((stream, seed))


def gaussian_kernel(size, sigma_x, sigma_y=None, theta=0.0, form="gaussian", beta=1.0):
    """(size, size) blur kernel on integer offsets; m = v' S^-1 v, S = R(theta) diag(sigma_x^2, sigma_y^2) R(theta)'.

    "gaussian": exp(-m / 2), "generalized": exp(-m^beta / 2), "plateau": 1 / (1 + m^beta); normalised to sum 1.
    size odd; sigmas > 0 in pixels, sigma_y None = isotropic; theta in radians; v = (column, row). Else ValueError.
    """
    r = _offsets(size)
    sigma_y = sigma_x if sigma_y is None else sigma_y
    if not (sigma_x > 0 and sigma_y > 0):
        raise ValueError(f"gaussian_kernel: sigmas must be > 0, got {sigma_x} and {sigma_y}")
    # coordinates in the rotated frame, (size, size)
    along = np.cos(theta) * r[None, :] + np.sin(theta) * r[:, None]
    across = np.cos(theta) * r[:, None] - np.sin(theta) * r[None, :]
    m = (along / sigma_x) ** 2 + (across / sigma_y) ** 2
    if form == "gaussian":
        kernel = np.exp(-m / 2)
    elif form == "generalized":
        kernel = np.exp(-(m**beta) / 2)
    elif form == "plateau":
        kernel = 1 / (1 + m**beta)
    else:
        raise ValueError(f"gaussian_kernel: unknown form {form!r}; choose from gaussian, generalized, plateau")
    return kernel / kernel.sum()


def sinc_kernel(size, cutoff):
    """(size, size) circular low-pass w J1(w r) / (2 pi r), centre w^2 / (4 pi), sum 1; cutoff w in (0, pi]; size odd.

    Raises ValueError otherwise.
    """
    if not 0 < cutoff <= np.pi:
        raise ValueError(f"sinc_kernel: cutoff must lie in (0, pi], got {cutoff}")
    r = _offsets(size)
    radius = np.hypot(r[:, None], r[None, :])
    # any number but 0; the limit is filled in below
    radius[size // 2, size // 2] = 1
    kernel = cutoff * j1(cutoff * radius) / (2 * np.pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * np.pi)
    return kernel / kernel.sum()


def pad_kernel(kernel, size):
    """Zero-pad an odd (k, k) kernel symmetrically to (size, size). Raises ValueError if it is larger."""
    margin = (size - len(kernel)) // 2
    if margin < 0 or size % 2 == 0:
        raise ValueError(f"pad_kernel: cannot pad a {len(kernel)}-pixel kernel to {size}; "
                         "choose an odd size at least as large")
    return np.pad(kernel, margin)


def _offsets(size):
    if size < 1 or size % 2 == 0:
        raise ValueError(f"kernel size must be odd and positive, got {size}")
    return np.arange(size) - size // 2


def blur(images, kernels):
    """Correlate every channel with its image's kernel, which is not flipped; reflect padding without the edge pixel.

    images: (B, C, H, W) float; kernels: (B, kh, kw) or (kh, kw) array or tensor. Returns (B, C, H, W).
    Raises ValueError unless kernel sizes are odd with kh//2 < H and kw//2 < W.
    """
    b, c, h, w = images.shape
    # far tails are denormals: invisible, and ten times slower on CPU
    kernels = F.hardshrink(_on_device(kernels, images), 1e-20)
    kernels = kernels.expand(b, *kernels.shape[-2:])
    top, left = kernels.shape[-2] // 2, kernels.shape[-1] // 2
    if kernels.shape[-2] % 2 == 0 or kernels.shape[-1] % 2 == 0 or top >= h or left >= w:
        raise ValueError(f"blur: {tuple(kernels.shape[-2:])} kernels must be odd and smaller than twice "
                         f"the {h}x{w} images")
    padded = F.pad(images, (left, left, top, top), mode="reflect").reshape(1, b * c, h + 2 * top, w + 2 * left)
    # in bfloat16 a blurred image would lose its last bits
    with torch.autocast(images.device.type, enabled=False):
        return F.conv2d(padded, kernels.repeat_interleave(c, 0)[:, None], groups=b * c).view(b, c, h, w)


def add_gaussian_noise(images, sigma, fields):
    """images + fields * sigma / 255, clamped to [0, 1].

    sigma: (B,) or number, grey levels; fields: (B, 3 or 1, H, W), standard normal numbers.
    """
    sigma = _on_device(sigma, images).expand(len(images)).view(-1, 1, 1, 1)
    return (images + fields * (sigma / 255)).clamp(0, 1)


def add_poisson_noise(images, scale, gray, seeds):
    """images + scale * (Poisson(x V) / V - x), clamped to [0, 1]; x: 8-bit image, V = 2^ceil(log2(distinct values)).

    images: (B, 3, H, W) in [0, 1] up to overshoot; scale: (B,) or number; gray: B bools, noise of the luminance, the
    same in all channels; seeds: B ints, one generator per image. Values are counted over all channels of an image.
    """
    # 1, 2, ..., 256
    powers = 2.0 ** torch.arange(9, device=images.device)
    noise = []
    for image, is_gray, seed in zip(images, gray, seeds, strict=True):
        if is_gray:
            image = (0.2989 * image[0] + 0.587 * image[1] + 0.114 * image[2])[None]
        x = to_8bit(image)  # (3 or 1, H, W)
        seen = x.new_zeros(256).scatter_(0, (x * 255).round().long().flatten(), 1.0)
        # the smallest power of two that is not below the count
        peak = torch.where(powers >= seen.sum(), powers, 256.0).min()
        generator = torch.Generator(images.device).manual_seed(seed)
        noise.append((torch.poisson(x * peak, generator) / peak - x).expand_as(images[0]))
    scale = _on_device(scale, images).expand(len(images)).view(-1, 1, 1, 1)
    return (images + scale * torch.stack(noise)).clamp(0, 1)


def normal_field(shape, seed, device="cpu"):
    """Standard normal numbers of that shape from a generator of their own."""
    return torch.randn(tuple(shape), generator=torch.Generator(device).manual_seed(seed), device=device)


def to_8bit(images):
    """Clamp to [0, 1] and round to multiples of 1/255."""
    return (images * 255).round().clamp(0, 255) / 255


# the JPEG standard's example tables, quality 50 (ITU-T T.81, Annex K); row = vertical frequency
JPEG_LUMA = np.array([
    [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99]])
JPEG_CHROMA = np.full((8, 8), 99)
JPEG_CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
# (8, 8) DCT-II, and (64, 64), the same for row-major 8x8 blocks; its transpose is its inverse
DCT = dct(np.eye(8), axis=0, norm="ortho")
DCT2 = np.kron(DCT, DCT)


def jpeg(images, quality, table="hggt"):
    """JPEG compression and decompression with 4:2:0 chroma; true rounding, so no useful gradient.

    images:  (B, 3, H, W) float RGB, clamped to [0, 1] first; any size
    quality: number or (B,), real-valued, in [1, 100), with "libjpeg" also 100. A CUDA tensor costs a sync to check
    table:   "hggt": luma transposed, table * factor neither floored nor bounded below by 1, black padding to 16 pixels
             "libjpeg": the standard's table in libjpeg's integers, padding by the edge pixels. Pixels stay real-valued
             and chroma is enlarged by repetition, where libjpeg rounds and interpolates
    Returns (B, 3, H, W) in [0, 1], not rounded to 8 bit. Raises ValueError for a bad quality or table.
    """
    b, _, h, w = images.shape
    quality = torch.as_tensor(quality, dtype=torch.float64)
    if table not in ("hggt", "libjpeg"):
        raise ValueError(f"jpeg: unknown table {table!r}; choose from hggt, libjpeg")
    if not bool(((quality >= 1) & ((quality < 100) | (quality == 100) & (table == "libjpeg"))).all()):
        raise ValueError("jpeg: quality must lie in [1, 100) ([1, 100] with the libjpeg table), "
                         f"got {quality.tolist()}")
    q = _on_device(quality, images, torch.float64).expand(b)[:, None]  # (B, 1)
    percent = torch.where(q < 50, 5000 / q, 200 - 2 * q)
    tables = np.stack([JPEG_LUMA.T if table == "hggt" else JPEG_LUMA, JPEG_CHROMA]).reshape(2, 64)
    luma, chroma = _on_device(tables, images, torch.float64)  # (64,) each
    if table == "hggt":
        luma, chroma = luma * (percent / 100), chroma * (percent / 100)  # (B, 64)
    else:
        luma, chroma = (((t * percent.floor() + 50) / 100).floor().clamp(1, 255) for t in (luma, chroma))

    border = "constant" if table == "hggt" else "replicate"
    padded = F.pad(images.clamp(0, 1) * 255, (0, -w % 16, 0, -h % 16), mode=border)
    red, green, blue = padded.unbind(1)
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    # without the +128 that the DCT takes off again
    cb = -0.168736 * red - 0.331264 * green + 0.5 * blue
    cr = 0.5 * red - 0.418688 * green - 0.081312 * blue
    y = _quantise(y[:, None] - 128, luma)[:, 0] + 128  # (B, H, W)
    c = _quantise(F.avg_pool2d(torch.stack([cb, cr], 1), 2), chroma)  # (B, 2, H/2, W/2)
    cb, cr = c.repeat_interleave(2, 2).repeat_interleave(2, 3).unbind(1)
    rgb = torch.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 1)
    return rgb[..., :h, :w].clamp(0, 255) / 255


def _quantise(planes, quantiser):
    """Round the 8x8 DCT-II coefficients of (B, C, H, W), sides multiples of 8, to multiples of quantiser (B, 64)."""
    b, c, h, w = planes.shape
    blocks = planes.reshape(b, c, h // 8, 8, w // 8, 8).transpose(3, 4).reshape(b, -1, 64).double()  # (B, blocks, 64)
    basis = _on_device(DCT2, planes, torch.float64).expand(b, 64, 64)
    coefficients = torch.bmm(blocks, basis.mT)
    coefficients = (coefficients / quantiser[:, None]).round() * quantiser[:, None]
    blocks = torch.bmm(coefficients, basis).to(planes.dtype)
    return blocks.view(b, c, h // 8, w // 8, 8, 8).transpose(3, 4).reshape(b, c, h, w)


@torch.no_grad()
def usm_sharpen(images):
    """Unsharp masking as Real-ESRGAN applies it to its ground truths: I + 0.5 (I - blur(I)) where a soft mask says so.

    images: (B, C, H, W) float in [0, 1], sides > 25. Returns the same shape in [0, 1]. The blur is a 51x51 Gaussian of
    sigma 8.0 (OpenCV's rule for that size) with reflected border; the mask, residuals above 10 grey levels, goes
    through it too.
    """
    line = np.exp(-0.5 * (_offsets(51) / 8.0) ** 2)
    line = line / line.sum()
    # separable: 102 products per pixel instead of 2601
    residual = images - blur(blur(images, line[:, None]), line[None, :])
    mask = blur(blur((residual.abs() * 255 > 10).to(images.dtype), line[:, None]), line[None, :])
    return mask * (images + 0.5 * residual).clamp(0, 1) + (1 - mask) * images


def _on_device(values, images, dtype=None):
    """Numbers, array or tensor as a tensor beside the images."""
    values = torch.as_tensor(values, dtype=dtype or images.dtype)
    return values if values.is_cuda else runs.to_device(values, images.device)
