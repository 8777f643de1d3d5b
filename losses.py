"""The terms of the training losses, Eq. 1 and Eq. 5: each stands here once, for every script that trains with it."""
import pickle
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import archs
import runs


def generator_terms(sr, gt, lambdas, vgg=None, net_d=None, reward=None):
    """{term: (weight, value)} of the generator's loss, the sum of weight * value: Eq. 1, with a reward Eq. 5.

    Every term is logged under its name; q is minus the mean reward. A term whose model is None is left out. With a
    reward there is also the share of samples without a finite one, of weight 0.
    sr, gt:  (B, 3, H, W) RGB in [0, 1]; sr is not clamped
    lambdas: {"lambda_l1": weight, ...}, the values of the flags of these names
    vgg:     VGGFeatureLoss. net_d: discriminator, images -> logits, positive is real
    reward:  NR-IQA model, (B, 3, H, W) in [0, 1] -> (B,), higher is better. It sees SR clamped to [0, 1], so that
             pixels outside get no gradient
    """
    terms = {"pix": (lambdas["lambda_l1"], F.l1_loss(sr.float(), gt))}
    if vgg is not None:
        terms["percep"] = lambdas["lambda_p"], vgg(sr, gt)
    if net_d is not None:
        terms["adv"] = lambdas["lambda_a"], adversarial_loss(net_d(sr), real=True)
    if reward is not None:
        value, unscored = mean_reward(reward, sr)
        terms |= {"q": (lambdas["lambda_q"], -value), "unscored": (0.0, unscored)}
    return terms


def mean_reward(reward, sr):
    """-> mean reward of (B, 3, H, W), clamped to [0, 1], and the share of samples whose reward is not finite.

    These count as 0 and have no gradient. A sample of finite reward without a finite gradient has none either; it is in
    the share once the backward pass is done.
    """
    seen = sr.clamp(0, 1)
    scores = reward(seen)
    finite = torch.isfinite(scores.detach())
    unscored = 1 - finite.float().mean()

    def leave_out(gradient):
        # here, since NaN times 0 is NaN again inside the reward
        usable = finite & torch.isfinite(gradient).flatten(1).all(1)
        unscored.copy_(1 - usable.float().mean())
        return gradient.where(usable[:, None, None, None], 0)
    if seen.requires_grad:
        seen.register_hook(leave_out)
    return scores.where(finite, 0).mean(), unscored


def compile_parts(net_g, vgg=None, reward=None):
    """What --fast compile compiles of a step, in place. Not the discriminator: that gets slower (docs/speed.md)."""
    archs.compile_blocks(net_g)
    if vgg is not None:
        vgg.compile()
    if reward is not None:
        reward.compile_blocks()


def adversarial_loss(logits, real):
    """Vanilla GAN loss, binary cross-entropy with logits against 1 (real) or 0, averaged over the logit map (HGGT)."""
    target = torch.full_like(logits, float(real), dtype=torch.float32)
    return F.binary_cross_entropy_with_logits(logits.float(), target)


class VGGFeatureLoss(nn.Module):
    """Perceptual loss of Eq. 1: weighted mean absolute differences of five VGG19 feature maps (HGGT options).

    forward(sr, gt): two (B, 3, H, W) RGB in [0, 1], sides at least 16, sr not clamped -> scalar. The network runs in
    the precision of the caller's autocast, differences are taken in fp32. Features are convolution outputs *before* the
    ReLU, of ImageNet-normalised images. The network is frozen, and no gradient reaches gt. gt_taps: taps(gt), where
    they are known.
    weights: a .pth or .safetensors file with torchvision's vgg19, whole ("features.0.weight", ...) or its features only
    ("0.weight", ...); None downloads torchvision's. Raises UserError, which names missing keys, if the file does not
    fit, and where there is no file or no download; otherwise: the caller's advice for the latter.
    """

    # HGGT options: conv1_2, conv2_2, conv3_4, conv4_4, conv5_4
    TAPS = {2: 0.1, 7: 0.1, 16: 1.0, 25: 1.0, 34: 1.0}

    def __init__(self, weights=None, otherwise="--vgg-weights FILE, or do without the perceptual loss: --lambda-p 0"):
        super().__init__()
        layers, channels = [], 3
        for width, convs in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            for _ in range(convs):
                # not in place, or it would overwrite the tap before it
                layers += [archs.conv3x3(channels, width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:max(self.TAPS) + 1])
        if weights is None:
            from torchvision.models import VGG19_Weights
            state = torchvision_weights(VGG19_Weights.IMAGENET1K_V1, "VGG19", otherwise)
        else:
            state = archs.read_weights(weights)[0]
        source = weights or "the downloaded vgg19"
        prefix = "features." if any(k.startswith("features.") for k in state) else ""
        expected = self.features.state_dict()
        missing = [prefix + key for key in expected if prefix + key not in state]
        if missing:
            raise runs.UserError(f"{source}: not torchvision's vgg19, {len(missing)} keys are missing: "
                                 f"{', '.join(missing[:4])} ...")
        for key, here in expected.items():
            there = state[prefix + key]
            if there.shape != here.shape or not there.is_floating_point():
                raise runs.UserError(f"{source}: {prefix + key} is {there.dtype} {tuple(there.shape)}, "
                                     f"not {here.dtype} {tuple(here.shape)}")
        self.features.load_state_dict({key: state[prefix + key] for key in expected})
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        """Stays in eval mode, also inside a module that trains."""
        return super().train(False)

    def taps(self, x):
        """The five feature maps of (B, 3, H, W), before their ReLU."""
        x, taps = (x - self.mean) / self.std, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.TAPS:
                taps.append(x)
        return taps

    def forward(self, sr, gt, gt_taps=None):
        if min(sr.shape[2:]) < 16:
            raise runs.UserError(f"VGG loss: image of {sr.shape[2]} x {sr.shape[3]} pixels, "
                                 "vgg19 needs at least 16 x 16")
        # Not sr and gt in one batch: that is 1.3 to 1.5 times slower and takes 1.4 times the memory
        # (experiments/tricks.py, CPU)
        with torch.no_grad():
            gt_taps = self.taps(gt) if gt_taps is None else gt_taps
        taps = zip(self.TAPS.values(), self.taps(sr), gt_taps)
        return sum(weight * F.l1_loss(a.float(), b.float()) for weight, a, b in taps)


def torchvision_weights(weights, network, otherwise):
    """State dict of an entry of torchvision's weights, from the torch hub cache or the network.

    network: its name, and otherwise: the flag that names a file, for errors.
    """
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    # no network, wrong hash, damaged cache
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason, name = " ".join(str(error).split())[:120], Path(weights.url).name
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise runs.UserError(f"no {network} weights ({reason}): put {name} into {folder} ({runs.how_to_get(name)}), or "
                             f"name a file with {otherwise}") from None
