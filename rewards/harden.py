"""Make a quality model hard to fool (paper Sec. 5.2, 10.2): the terms of rewards.train_opinion --harden.

A model that is optimised finds images that it likes and people do not. Three terms train against that, and a fourth
keeps the scale: without it, hardening merely makes all differences of scores smaller, gains and losses alike.

- negatives: photographs against the same ones with what optimised networks leave (pixel grids, checkerboards, ringing,
  over-sharpening, noise), as ranking pairs whose margin rises with the severity.
- attack: a training image against itself after steps of gradient ascent on the model: no gain is wanted.
- gradient: the L1 norm of the gradient on the image, by finite differences (Liu et al., CVPR 2024, Eq. 7-9).
- scale: the scores of photographs and of their bicubic images stay those of the plain model, and their distance does
  not become smaller.

Margins and gains are in units of D, the plain model's mean score of photographs minus that of their bicubic images.
"""
import numpy as np
import torch
import torch.nn.functional as F

import degradations
import runs
from rewards.train_ranker import apply, draw_style

# weights of the terms; that of the attack is a flag
WEIGHTS = {"negatives": 0.3, "scale": 1.0}
# photographs per step for negatives and scale, and the side of their crops
PHOTOS, SIDE = 4, 160
# share of the batch that is attacked, the largest change in grey levels, drawn per image, and the steps of the ascent:
# against one step a model learns to bend its gradient, and ten steps gain what they gained before
ATTACKED, LEVELS, STEPS = 0.5, (0.5, 2.5), 3
# the strongest negative is to lie this many D below the photograph
MARGIN = 1.0


def photographs(images, rng):
    """Crops of images that are halved, so that they are sharp: (PHOTOS, 3, SIDE, SIDE) in [0, 1]. images: uint8"""
    crops = []
    for k in rng.integers(len(images), size=PHOTOS):
        size = min(2 * SIDE, *images[k].shape[1:])
        top, left = (int(rng.integers(n - size + 1)) for n in images[k].shape[1:])
        crop = images[k][None, :, top:top + size, left:left + size].float() / 255
        crops.append(F.interpolate(crop, (SIDE, SIDE), mode="area"))
    x = torch.cat(crops)
    return x.flip(3) if rng.random() < 0.5 else x


def bicubic(x):
    """x4 down and up again, 8-bit: the image that D measures the distance to."""
    small = F.interpolate(x, scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1)
    return degradations.to_8bit(F.interpolate(small, x.shape[2:], mode="bicubic").clamp(0, 1))


def checkerboard(h, w, period):
    """Squares of +1 and -1 of period / 2 pixels (at least one): (1, 3, h, w)."""
    y, x = np.mgrid[:h, :w] // max(1, period // 2)
    return torch.from_numpy(1.0 - 2 * ((x + y) % 2)).float().expand(1, 3, h, w)


def ringing(x, u, cutoff):
    """The image behind an ideal low-pass filter of cutoff (radians), its edges steepened 0.6 to 3 times."""
    kernel = degradations.sinc_kernel(21, cutoff)
    kernel = torch.from_numpy(np.asarray(kernel)).float().expand(len(x), 21, 21)
    low = degradations.blur(x, kernel)
    # beyond the low-pass image, edges of it are steepened: its ripples grow with them
    return (low + (0.3 + 1.2 * u) * (low - degradations.blur(low, kernel)) * 2).clamp(0, 1)


def negative(x, rng):
    """x (1, 3, H, W) with one fault, 8-bit -> (image, severity in (0, 1])."""
    h, w = x.shape[2:]
    name = rng.choice(["grid", "grid", "checkerboard", "ringing", "halo", "noise"])
    u = rng.uniform(0, 1)
    if name == "checkerboard":
        # 1 to 20 grey levels
        y = degradations.add_gaussian_noise(x, torch.tensor([20.0 ** u]), checkerboard(h, w, int(rng.integers(2, 9))))
    elif name == "ringing":
        y = ringing(x, u, rng.uniform(0.8, 2.2))
    else:
        y = apply(x, name, np.array([u]), draw_style(name, rng, h, w))
    return degradations.to_8bit(y), u


@torch.no_grad()
def unit(teacher, images, seed, device, draws=16):
    """D of a model on photographs made of `images`: its mean score of them less that of their bicubic images."""
    rng, differences = np.random.default_rng([seed, 6]), []
    for _ in range(draws):
        x = photographs(images, rng).to(device)
        differences.append(teacher(degradations.to_8bit(x)) - teacher(bicubic(x)))
    d = torch.cat(differences).mean().item()
    if d <= 0:
        raise runs.UserError(f"the model prefers bicubic images to photographs by {-d:.1f} points: train it without "
                             "--harden and --gradient-norm first")
    return d


def spread(scores):
    """Mean score of the photographs minus that of their bicubic images, which follow them."""
    return scores[:PHOTOS].mean() - scores[PHOTOS:2 * PHOTOS].mean()


def step(x, gradient, size):
    """x after a step along the sign of the gradient of the score. size: (B,) in grey levels."""
    return (x + gradient.sign() * size.view(-1, 1, 1, 1) / 255).clamp(0, 1)


def ascend(score, x, start, level, steps, share):
    """x after steps along the sign of the gradient of the score, within level (B,) grey levels of start.

    A step is this share of the level.
    """
    limit = level.view(-1, 1, 1, 1) / 255
    for _ in range(steps):
        x = x.detach().requires_grad_()
        gradient = torch.autograd.grad(score(x).sum(), x)[0]
        x = torch.minimum(torch.maximum(step(x.detach(), gradient, level * share), start - limit), start + limit)
    return x


def terms(net, teacher, d, images, x, score, weight, gradient_norm, rng):
    """{name: weighted term}. x, score: the batch and its scores after loss.backward(), which left gradients on both.

    weight: of the attack.
    """
    result, count = {}, max(1, round(ATTACKED * len(x)))
    level = torch.from_numpy(rng.uniform(*LEVELS, count)).float().to(x.device)
    # of the loss's gradient the sign of dQ/dx: the loss depends on an image through its score alone
    rises = (x.grad * score.grad.sign().view(-1, 1, 1, 1))[:count]
    start, before = x.detach()[:count], score.detach()[:count]
    found = step(start, rises, level)
    if gradient_norm:
        result["gradient"] = gradient_norm * ((net(found) - before).abs() / d / level).mean()
    if teacher is not None:
        further = ascend(net, found, start, level, STEPS - 1, 0.5)
        result["attack"] = weight * ((net(further) - before) / d).relu().mean()
        photos = degradations.to_8bit(photographs(images, rng))
        worse, severity = zip(*(negative(one[None], rng) for one in photos))
        anchors = torch.cat([photos, bicubic(photos)]).to(x.device)
        with torch.no_grad():
            wanted = teacher(anchors)
        scores = net(torch.cat([anchors, torch.cat(worse).to(x.device)]))
        result["scale"] = WEIGHTS["scale"] * (F.smooth_l1_loss(scores[:2 * PHOTOS] / d, wanted / d)
                                              + (1 - spread(scores) / spread(wanted)).relu())
        margin = MARGIN * torch.tensor(severity, device=x.device, dtype=torch.float32)
        above = (scores[:PHOTOS] - scores[2 * PHOTOS:]) / d
        result["negatives"] = WEIGHTS["negatives"] * (margin - above).relu().mean()
    return result
