"""What the CHOICEs in selfsup/networks.py are worth, where the papers say nothing. Prints a table.

    python -m experiments.selfsup_choices [--seeds 0 1 2] [--steps 1500] [--json FILE]

Each row trains the reconstruction network of LWay (16 channels, blocks 3 2 4, L1 only, batches of 8, Adam 1e-3 falling
as a cosine) on the same pairs of scikit-image's photographs and their `blur` degradations, with one thing changed.
Columns: PSNR of the reconstruction of 96 held-out crops of other photographs; how much of it is lost with the
embeddings of other images; how much embeddings differ between images, relative to their size. A network that uses its
embedding loses PSNR when it gets another image's.
"""
from pathlib import Path

import runs


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--seeds", type=runs.COUNT, nargs="+", default=[0, 1, 2], help="of weights and batches")
    p.add_argument("--steps", type=runs.SIZE, default=1500, help="optimisation steps of each row")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    return p.parse_args(argv)


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from skimage import data as photos
from torch import nn

import degradations
import metrics
from selfsup import networks as rec

TRAIN = ("astronaut", "coffee", "rocket", "motorcycle")
HELD_OUT = ("chelsea", "retina", "immunohistochemistry")


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
    seeds = torch.arange(count).add(10 ** 6 * seed)
    lq = torch.cat([degradations.degrade(part, "blur", own, own) for part, own in zip(hr.split(32), seeds.split(32))])
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


# change, share of the steps after which the degradation encoder is trained, bands
ROWS = {
    "conv": (None, 0.0, False),
    "conv, from step 1/4 on": (None, 0.25, False),
    "conv, PyTorch's initialisation": (plain_initialisation, 0.0, False),
    "bands": (None, 0.0, True),
    "bands, no bridge in R": (without_bridge, 0.0, True)}


def train(change, encoder_from, bands, seed, steps, lq, hr, held_lq, held_hr):
    """One row and seed -> {"psnr", "lost_by_shuffling", "spread"}"""
    torch.manual_seed(seed)
    net = rec.Reconstruction(16, (3, 2, 4), 512, image_encoder=False, bands=bands, skip=False)
    if change:
        change(net)
    opt = torch.optim.Adam([{"params": part.parameters()} for part in (net.e_deg, net.r)], lr=1e-3)
    rng = np.random.default_rng(seed)
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

    def psnr(shuffle):
        parts = [metrics.psnr(net(a, b, 1.0, shuffle=shuffle)[0].clamp(0, 1), a, border=0)
                 for a, b in zip(x.split(16), y.split(16))]
        return torch.cat(parts).mean().item()
    with torch.no_grad():
        own, shuffled, e = psnr(False), psnr(True), net.e_deg(x)
    return {"psnr": own, "lost_by_shuffling": own - shuffled, "spread": (e.std(0).mean() / e.abs().mean()).item()}


def main(args):
    torch.set_num_threads(1)
    pairs = *make_pairs(TRAIN, 3000, 0), *make_pairs(HELD_OUT, 96, 1)
    results = {name: [train(*how, seed, args.steps, *pairs) for seed in args.seeds] for name, how in ROWS.items()}
    head = [f"{args.steps} steps, seeds {' '.join(map(str, args.seeds))}", "PSNR, dB", "lost with other embeddings, dB",
            "spread of embeddings"]
    forms = {"psnr": ".2f", "lost_by_shuffling": "+.2f", "spread": ".3f"}
    rows = [[name, *(" ".join(format(row[key], form) for row in of_seeds) for key, form in forms.items())]
            for name, of_seeds in results.items()]
    print(runs.markdown(head, rows))
    if args.json:
        record = {**runs.describe_machine(), "seeds": args.seeds, "steps": args.steps, "rows": results}
        runs.save_json(args.json, record)


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
