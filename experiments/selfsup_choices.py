"""What the choices in reconstruction.py are worth, where the papers say nothing: not a test, prints a table. `python -m experiments.selfsup_choices [--seeds 0 1 2] [--steps 1500]`

Each row trains the reconstruction network of LWay (16 channels, blocks 3 2 4, L1 only, batches of 8, Adam 1e-3 falling as a cosine) on the same pairs of photographs of scikit-image
and their `blur` degradations, with one thing changed: PSNR of the reconstruction of 96 held-out crops of other photographs, the same with the embeddings of other images, and how much
embeddings differ between images relative to their size. A network that uses its embedding loses PSNR when it gets another image's.
"""
import argparse
from pathlib import Path


import numpy as np
import torch
import torch.nn.functional as F
from skimage import data as photos
from torch import nn

import degradations
import metrics as quality
from selfsup import networks as rec
import runs

TRAIN, HELD_OUT = ("astronaut", "coffee", "rocket", "motorcycle"), ("chelsea", "retina", "immunohistochemistry")


def load(name):
    photo = photos.stereo_motorcycle()[0] if name == "motorcycle" else getattr(photos, name)()
    photo = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(photo, scale_factor=0.5, mode="area") if max(photo.shape) > 1000 else photo


def make_pairs(names, count, seed):
    """count crops of 128 pixels -> lq (count, 3, 32, 32), hr (count, 3, 128, 128) uint8"""
    rng, images, hr = np.random.default_rng(seed), [load(name) for name in names], []
    for _ in range(count):
        image = images[rng.integers(len(images))]
        y, x = (int(rng.integers(n - 160 + 1)) for n in image.shape[2:])
        hr.append(image[:, :, y:y + 160, x:x + 160])
    hr = torch.cat(hr)
    lq = torch.cat([degradations.degrade(part, "blur", seeds, seeds) for part, seeds in zip(hr.split(32), torch.arange(count).add(10 ** 6 * seed).split(32))])
    return lq[..., 4:36, 4:36].mul(255).round().byte(), hr[..., 16:144, 16:144].mul(255).round().byte()


def plain_initialisation(net):
    for module in net.e_deg.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()


def without_bridge(net):
    """R without the sum over its blocks."""
    def forward(features, z, noise=None):
        x = features
        for conv in net.r.down:
            x = rec.lrelu(conv(x))
        for block in net.r.blocks:
            x = block(x, z, None)
        return net.r.last[1](rec.lrelu(net.r.last[0](x)))
    net.r.forward = forward


ROWS = {  # change, from which share of the steps the encoder is trained, bands
    "conv": (None, 0.0, False), "conv, from step 1/4 on": (None, 0.25, False), "conv, PyTorch's initialisation": (plain_initialisation, 0.0, False),
    "bands": (None, 0.0, True), "bands, no bridge in R": (without_bridge, 0.0, True)}


def train(change, encoder_from, bands, seed, steps, lq, hr, held_lq, held_hr):
    torch.manual_seed(seed)
    net = rec.Reconstruction(16, (3, 2, 4), 512, image_encoder=False, bands=bands)
    if change:
        change(net)
    encoder, others = list(net.e_deg.parameters()), list(net.r.parameters())
    opt, rng = torch.optim.Adam([{"params": encoder}, {"params": others}], lr=1e-3), np.random.default_rng(seed)
    for step in range(1, steps + 1):
        rate = 1e-3 * (1 + np.cos(np.pi * step / steps)) / 2
        opt.param_groups[0]["lr"], opt.param_groups[1]["lr"] = rate * (step > encoder_from * steps), rate
        chosen = torch.from_numpy(rng.integers(len(lq), size=8))
        x, y = lq[chosen].float() / 255, hr[chosen].float() / 255
        loss = F.l1_loss(net(x, y, 1.0)[0], x)
        opt.zero_grad()
        loss.backward()
        opt.step()
    x, y = held_lq.float() / 255, held_hr.float() / 255
    with torch.no_grad():
        psnr = [torch.cat([quality.psnr(net(a, b, 1.0, shuffle=shuffle)[0].clamp(0, 1), a, border=0) for a, b in zip(x.split(16), y.split(16))]).mean().item() for shuffle in (False, True)]
        e = net.e_deg(x)
    return {"psnr": psnr[0], "lost_by_shuffling": psnr[0] - psnr[1], "spread": (e.std(0).mean() / e.abs().mean()).item()}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    torch.set_num_threads(1)
    pairs = *make_pairs(TRAIN, 3000, 0), *make_pairs(HELD_OUT, 96, 1)
    found = {name: [train(*how, seed, args.steps, *pairs) for seed in args.seeds] for name, how in ROWS.items()}
    each = lambda values, form: " ".join(form.format(v) for v in values)
    print(runs.markdown([f"{args.steps} steps, seeds {each(args.seeds, '{}')}", "PSNR, dB", "lost with other embeddings, dB", "spread of embeddings"],
                        [[name, *(each([run[key] for run in rows], form) for key, form in (("psnr", "{:.2f}"), ("lost_by_shuffling", "{:+.2f}"), ("spread", "{:.3f}")))] for name, rows in found.items()]))
    if args.json:
        runs.save_json(args.json, {**runs.describe_machine(), "seeds": args.seeds, "steps": args.steps, "rows": found})


if __name__ == "__main__":
    main()
