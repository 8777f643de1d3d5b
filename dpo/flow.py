"""FlowSR, a small stochastic x4 generator that trains from scratch, and the interface of every generator to be tuned.

    gen = FlowSR(**SIZES["tiny"])                   .net is trained; .base is None (bicubic) or a frozen x4 network
    sr = gen.sample(gen.net, lq, names, seeds)      one output per image and seed
    gen = load_flow(path)                           a run of dpo.pretrain or dpo.tune
    gen = load_generator(path, model)               the same, or with `model` a ControlNet of Stable Diffusion 2 or FLUX

It generates the residual of hr over an enlarged lq, on the LR grid (pixel-unshuffled), by rectified flow (Liu et al.,
2023; as in SD3 and FLUX), or by a diffusion model of epsilon or v (Ho et al., 2020; Salimans and Ho, 2022). DP2O-SR (Wu
et al., NeurIPS 2025) tunes Stable Diffusion 2 and FLUX; this network stands in for them where neither is at hand: all
its sizes are CHOICE.

A generator is any object with net, prediction ("flow", "epsilon", "v") and these methods, where `net` may be a copy of
its own net:
    encode(hr, lq) -> x0                 condition(lq, names) -> c
    noised(x0, eps, t) -> xt, target     predict(net, xt, t, c) -> as target
    noise(lq, names, seeds) -> eps       sample(net, lq, names, seeds) -> (B, 3, 4h, 4w)
    identity(net) -> {name: value}       save(folder, params)
lq (B, 3, h, w), hr (B, 3, 4h, 4w) are RGB in [0, 1]; t (B,) is in [0, 1], 1 being pure noise; names tell images apart,
seeds are whole numbers.
"""
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import archs
import degradations
import iqa
import runs

# channels of the three levels, blocks per level
SIZES = {
    "tiny": dict(width=(32, 64, 96), blocks=1), "small": dict(width=(48, 96, 192), blocks=2),
    "base": dict(width=(64, 128, 256), blocks=2), "large": dict(width=(96, 192, 384), blocks=2)}
PREDICTIONS = ("flow", "epsilon", "v")
# DETAIL: 3 channels x 4 x 4 pixels
SCALE, DETAIL = 4, 48


# Noise schedules

def noised(prediction, x0, eps, t):
    """x_t, and the target that the network shall predict from it. t (B,) in [0, 1].

    flow: x_t = (1 - t) x_0 + t eps, target eps - x_0. epsilon, v: x_t = a x_0 + s eps with a^2 + s^2 = 1; targets eps,
    and a eps - s x_0.
    """
    t = t.view(-1, *[1] * (x0.ndim - 1))
    if prediction == "flow":
        return (1 - t) * x0 + t * eps, eps - x0
    a, s = cosine(t)
    return a * x0 + s * eps, eps if prediction == "epsilon" else a * eps - s * x0


def cosine(t):
    """(a, s) of Nichol and Dhariwal's schedule (2021): a^2 = cos^2((t + 0.008) / 1.008 pi / 2) relative to t = 0.

    t = k / 1000 are DDPM's thousand steps.
    """
    start = math.cos(0.008 / 1.008 * math.pi / 2)
    # never without any signal
    a = (torch.cos((t + 0.008) / 1.008 * math.pi / 2) / start).clamp(1e-3, 1)
    return a, (1 - a * a).sqrt()


def linear_guess(prediction, t):
    """k (B,): of all multiples of x_t, k x_t is the nearest to the target, where x_0 has unit variance."""
    if prediction == "flow":
        return (2 * t - 1) / (t * t + (1 - t) ** 2)
    return cosine(t)[1] if prediction == "epsilon" else torch.zeros_like(t)


def step_back(prediction, x, out, t, next_t):
    """One step of sampling from t to next_t < t (numbers): Euler's for flow, DDIM's (Song et al., 2021) otherwise.

    out: the network's prediction at x.
    """
    if prediction == "flow":
        return x + (next_t - t) * out
    (a, s), (b, r) = (cosine(torch.as_tensor(time, dtype=x.dtype, device=x.device)) for time in (t, next_t))
    x0 = (x - s * out) / a if prediction == "epsilon" else a * x - s * out
    # CHOICE: at t = 1 epsilon says next to nothing about x_0, which has unit variance
    x0 = x0.clamp(-6, 6)
    return b * x0 + r * (x - a * x0) / s


# Network

class TimedBlock(nn.Module):
    """Residual block of two convolutions; the time scales and shifts the output of the second normalisation."""

    def __init__(self, inside, outside, time):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inside), archs.conv3x3(inside, outside)
        self.norm2, self.conv2 = nn.GroupNorm(8, outside), archs.conv3x3(outside, outside)
        self.time = nn.Linear(time, 2 * outside)
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x, e):
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(e)[:, :, None, None].chunk(2, 1)
        return self.skip(x) + self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))


class FlowNet(nn.Module):
    """U-Net on the LR grid: x_t (B, 48, h, w), t (B,), c (B, 3 or 51, h, w) -> (B, 48, h, w).

    It has no attention: any size, cost linear in pixels.
    c is lq, followed by the pixel-unshuffled base where the base is a network. Its encoder `look` knows nothing of x_t
    and t, so that sampling runs it once and then gives `features` instead of c. The output is added to a multiple of
    x_t: the best one without looking, plus a learned correction per channel and time (CHOICE, after Karras et al.,
    2022). Otherwise the noise, which is to be removed, would have to pass through width[0] < 48 channels.
    """

    def __init__(self, width=(64, 128, 256), blocks=2, condition=3, time=256, prediction="flow"):
        super().__init__()
        self.prediction = prediction
        self.look = nn.Sequential(archs.conv3x3(condition, width[0]),
                                  *[archs.ResidualBlock(width[0]) for _ in range(4)])
        self.time = nn.Sequential(nn.Linear(64, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.first = archs.conv3x3(DETAIL + width[0], width[0])
        inputs = (width[0], *width)
        self.down = nn.ModuleList(nn.ModuleList(TimedBlock(inputs[k] if i == 0 else c, c, time) for i in range(blocks))
                                  for k, c in enumerate(width))
        self.smaller = nn.ModuleList(nn.Conv2d(c, c, 3, 2, 1) for c in width[:-1])
        self.middle = TimedBlock(width[-1], width[-1], time)
        self.up = nn.ModuleList(nn.ModuleList(TimedBlock(2 * c if i == 0 else c, c, time) for i in range(blocks))
                                for c in reversed(width))
        self.larger = nn.ModuleList(archs.conv3x3(a, b) for a, b in zip(reversed(width), list(reversed(width))[1:]))
        self.norm, self.last = nn.GroupNorm(8, width[0]), archs.conv3x3(width[0], DETAIL)
        self.gate = nn.Linear(time, DETAIL)
        for layer in (self.last, self.gate):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, xt, t, c=None, features=None):
        h, w = xt.shape[2:]
        features = self.look(c) if features is None else features
        x = archs.pad_reflect(torch.cat([xt, features], 1), -h % 4, -w % 4)
        waves = 1000 * t[:, None] * torch.exp(-math.log(10_000) / 32 * torch.arange(32, device=t.device))  # (B, 32)
        e = self.time(torch.cat([waves.sin(), waves.cos()], 1).to(x.dtype))
        x, skips = self.first(x), []
        for k, level in enumerate(self.down):
            for block in level:
                x = block(x, e)
            skips.append(x)
            if k < len(self.smaller):
                x = self.smaller[k](x)
        x = self.middle(x, e)
        for k, level in enumerate(self.up):
            x = torch.cat([x, skips.pop()], 1)
            for block in level:
                x = block(x, e)
            if k < len(self.larger):
                x = self.larger[k](archs.upsample_nearest(x))
        passed = linear_guess(self.prediction, t)[:, None] + self.gate(e).float()  # (B, 48)
        return passed[:, :, None, None] * xt + archs.to_rgb(self.last, F.silu(self.norm(x)))[:, :, :h, :w]


# Generator

class FlowSR:
    """hr = base + sigma_r * pixel_shuffle(x_0), the base being lq enlarged bicubically or by a frozen network.

    prediction: one of PREDICTIONS; base: a frozen x4 network or None; sigma_r: standard deviation of the residual, so
    that x_0 has about 1; steps: of sampling; tau: scale of the initial noise (1: as in training).
    """

    def __init__(self, width, blocks, prediction="flow", base=None, sigma_r=1.0, steps=8, tau=1.0, device="cpu"):
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction {prediction!r}: choose from {', '.join(PREDICTIONS)}")
        self.sizes = {"width": list(width), "blocks": blocks}
        self.net = FlowNet(width, blocks, 3 if base is None else 3 + DETAIL, prediction=prediction).to(device)
        self.base = base and base.to(device).eval().requires_grad_(False)
        self.prediction, self.sigma_r, self.steps, self.tau = prediction, sigma_r, steps, tau
        self.device, self.kept = torch.device(device), (None, None)

    @torch.no_grad()
    def enlarged(self, lq):
        """The image to which the residual is added. That of the last lq is kept: a network would run twice a step."""
        if self.kept[0] is not lq:
            if self.base is None:
                image = F.interpolate(lq, scale_factor=SCALE, mode="bicubic")
            else:
                image = self.base(lq).float()
            self.kept = lq, image
        return self.kept[1]

    def encode(self, hr, lq):
        return F.pixel_unshuffle(hr - self.enlarged(lq), SCALE) / self.sigma_r

    def condition(self, lq, names=None):
        return lq if self.base is None else torch.cat([lq, F.pixel_unshuffle(self.enlarged(lq), SCALE)], 1)

    def predict(self, net, xt, t, c):
        return net(xt, t, c)

    def noised(self, x0, eps, t):
        return noised(self.prediction, x0, eps, t)

    def noise(self, lq, names, seeds):
        """The initial noise of every image and seed, made on the CPU: the same on every device and in every batch."""
        fields = [degradations.normal_field((DETAIL, *lq.shape[2:]), noise_seed(name, seed))
                  for name, seed in zip(names, seeds, strict=True)]
        return torch.stack(fields).to(lq.device)

    @torch.no_grad()
    def sample(self, net, lq, names, seeds):
        # one image, expanded: its base and its features are computed once
        image = lq[:1] if lq.stride(0) == 0 else lq
        features = net.look(self.condition(image)).expand(len(lq), -1, -1, -1)
        x = self.tau * self.noise(lq, names, seeds)
        for k in range(self.steps, 0, -1):
            t = lq.new_full((len(lq),), k / self.steps)
            x = step_back(self.prediction, x, net(x, t, features=features), k / self.steps, (k - 1) / self.steps)
        return (self.enlarged(image) + self.sigma_r * F.pixel_shuffle(x, SCALE)).clamp(0, 1)

    def settings(self):
        """Everything beside the weights that sampling depends on, as plain values."""
        return {"prediction": self.prediction, "sigma_r": self.sigma_r, "steps": self.steps, "tau": self.tau}

    def identity(self, net):
        """Everything that an output depends on, given its input and seed: hashes of weights, and the settings."""
        return {"net": iqa.tensors_hash(net), "base": self.base and iqa.tensors_hash(self.base), **self.settings()}

    def save(self, folder, params, params_ema=None):
        """Write folder/gen.pth, weights and settings, for load_flow; and base.pth where the base is a network.

        params, params_ema: state dicts of the network.
        """
        weights = {"params": params} if params_ema is None else {"params": params, "params_ema": params_ema}
        content = {name: {k: v.detach().cpu().clone() for k, v in state.items()} for name, state in weights.items()}
        content["settings"] = {**self.sizes, "base": self.base and iqa.tensors_hash(self.base), **self.settings()}
        if self.base is not None:
            runs.save_weights(folder / "base.pth", self.base.state_dict())
        runs.write_atomic(folder / "gen.pth", lambda t: torch.save(content, t))


def noise_seed(name, seed, step=0):
    """Seed of the noise of one step of sampling, 0 the initial one, of candidate `seed` of image `name`."""
    return runs.sample_seed(seed, step, 0, f"candidate {name}")


def load_flow(path, device="cpu", **changed):
    """FlowSR with its EMA weights, or the only ones there are, without gradients.

    path: run folder, or gen.pth; changed: settings to replace, unless None.
    UserError where nothing is, and for anything else than a FlowSR.
    """
    file = Path(path) / "weights" / "gen.pth" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise runs.UserError(f"{path}: no generator there; make one with: python -m dpo.pretrain --hr PHOTOS")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        settings = content["settings"]
        base_hash, state = settings.pop("base"), content.get("params_ema") or content["params"]
        for name in ("width", "blocks", "prediction", "sigma_r", "steps", "tau"):
            settings[name]
    except archs.TORCH_DAMAGE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        raise runs.UserError(f"{file}: not a generator of dpo.pretrain or dpo.tune ({reason})") from None
    base = None
    if base_hash:
        base_file = file.with_name("base.pth")
        base = archs.load_generator(base_file)[0] if base_file.is_file() else None
        if base is None or iqa.tensors_hash(base) != base_hash:
            problem = "missing" if base is None else "other weights than this generator was trained with"
            raise runs.UserError(f"{base_file}: {problem}: copy the whole folder of {file}")
    gen = FlowSR(base=base, device=device, **(settings | {k: v for k, v in changed.items() if v is not None}))
    archs.load_strict(gen.net, state, file)
    gen.net.eval().requires_grad_(False)
    return gen


def load_generator(path, model=None, device="cpu", steps=None, tau=None, **more):
    """The generator of --gen: FlowSR, or with the folder `model` Stable Diffusion 2 or FLUX with the ControlNet `path`.

    steps, tau: of sampling, None for the generator's own; more: see diffusers_backend.load_diffusers.
    """
    if model is None:
        return load_flow(path, device, steps=steps, tau=tau)
    from dpo import diffusers_backend
    # a run of dpo.tune keeps its ControlNet in weights/
    controlnet = path / "weights" if (path / "weights").is_dir() else path
    return diffusers_backend.load_diffusers(model, controlnet, device, steps=steps, **more)
