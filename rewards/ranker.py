"""The embedded NR-IQA model `ranker`: small, differentiable, no download. rewards.train_ranker makes its weights.

    load_ranker()                                (B, 3, H, W) RGB in [0, 1] -> (B,), higher is better
    python train.py --reward ranker

It was trained on six kinds of distortion of scikit-image's photographs, so it stands in for a published model in the
demo and in the tests. It does not agree with people on super-resolved images, and it is no substitute for MUSIQ.
rewards/ranker3.pth, a reward file of this network trained on opinions, does, as sharpness does (docs/results-human.md).
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import archs
import runs

RANKER_WEIGHTS = Path(__file__).resolve().parent / "ranker.pth"


class Ranker(nn.Module):
    """The embedded NR-IQA model: (B, 3, H, W) RGB in [0, 1], H and W >= 32 -> (B,) score, higher is better.

    Clean photographs score about 80, strongly degraded ones about 20 (rewards.train_ranker fixes the scale). The score
    has no bounds, so its gradient never vanishes. The network sees the luma in two forms, locally normalised (as in
    CNNIQA, Kang et al., CVPR 2014) and on a logarithmic scale. Both have a constant of about one grey level, so block
    edges in flat areas are not exaggerated. Features of three resolutions are pooled by mean and standard deviation.
    Those of full resolution are also pooled per position modulo 8: the lattice of JPEG and of upsampling layers stands
    out there wherever it begins. 49,185 parameters. Raises ValueError for another shape.
    """

    def __init__(self):
        super().__init__()
        self.luma, self.chroma = nn.Conv2d(2, 16, 7, padding=3), nn.Conv2d(2, 24, 3, padding=1)
        self.middle, self.coarse = nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.Conv2d(24, 40, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(40, 40, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(2 * (16 + 24 + 40) + 3 * 16 + 4, 96), nn.SiLU(), nn.Linear(96, 1))
        # JPEG's chroma, averaged over 2x2 pixels
        opponent = torch.tensor([[-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
        self.register_buffer("to_luma", torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1))
        self.register_buffer("to_chroma", opponent.view(2, 3, 1, 1).expand(2, 3, 2, 2) / 4)
        self.register_buffer("shift", torch.tensor(50.0))
        self.register_buffer("stretch", torch.tensor(20.0))

    def forward(self, x):
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < 32:
            raise ValueError(f"ranker wants (B, 3, H, W) RGB with sides of at least 32 pixels, got {tuple(x.shape)}")
        # 8 images at a time fit a CPU's cache: this halves the time
        return torch.cat([self._score(part) for part in x.split(8)])

    def _score(self, x):
        x = 255 * F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), mode="replicate")
        luma = F.conv2d(x, self.to_luma)
        luma = luma - self._mean(luma)  # (B, 1, H, W) grey levels
        contrast = (self._mean(luma * luma) + 1).sqrt()
        chroma = F.conv2d(x, self.to_chroma, stride=2)
        chroma = torch.asinh(chroma - self._mean(chroma))  # (B, 2, H/2, W/2)

        full = F.silu(self.luma(torch.cat([luma / (contrast + 0.5), torch.asinh(luma / 2)], 1)))  # (B, 16, H, W)
        half = F.silu(self.middle(full) + self.chroma(chroma))  # (B, 24, H/2, W/2)
        quarter = F.silu(self.deep(F.silu(self.coarse(half))))  # (B, 40, H/4, W/4)

        pooled = [4 * self._lattice(full), chroma.abs().mean((2, 3)).log1p()]
        for maps in (full, half, quarter, contrast.log()):
            mean = maps.mean((2, 3))
            pooled += [mean, ((maps * maps).mean((2, 3)) - mean * mean).clamp_min(1e-4).sqrt()]
        return self.shift + self.stretch * self.head(torch.cat(pooled, 1))[:, 0]

    @staticmethod
    def _mean(x):
        """7x7 mean. Sums of shifted images are several times faster on a CPU than pooling."""
        h, w = x.shape[2:]
        x = F.pad(x, (3, 3, 3, 3), mode="reflect")
        x = sum(x[..., k:k + w] for k in range(7))
        return sum(x[..., k:k + h, :] for k in range(7)) / 49

    @staticmethod
    def _lattice(maps):
        """How far the means over positions modulo 8 differ: (B, C, H, W) -> (B, 3 C).

        Of every channel their spread, and the highest and the lowest mean of a row or column.
        """
        b, c, h, w = maps.shape
        cells = maps[..., :h // 8 * 8, :w // 8 * 8].reshape(b, c, h // 8, 8, w // 8, 8).mean((2, 4))  # (B, C, 8, 8)
        cells = cells - cells.mean((2, 3), keepdim=True)
        rows, columns = cells.mean(3), cells.mean(2)  # (B, C, 8)
        return torch.cat([((cells ** 2).mean((2, 3)) + 1e-6).sqrt(), torch.maximum(rows.amax(2), columns.amax(2)),
                          torch.minimum(rows.amin(2), columns.amin(2))], 1)


def load_ranker(path=RANKER_WEIGHTS):
    """The Ranker with the weights of rewards.train_ranker, on the CPU. UserError for a missing or another file."""
    remedy = "make them with: python -m rewards.train_ranker"
    if not Path(path).exists():
        raise runs.UserError(f"{path}: no weights of the ranker; {remedy}")
    net = Ranker()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except archs.TORCH_DAMAGE as error:
        reason = " ".join(str(error).split())[:100]
        raise runs.UserError(f"{path}: not weights of the ranker ({reason}); {remedy}") from None
    return net
