"""CNNIQA (Kang et al., CVPR 2014) with the weights trained on LIVE: an NR-IQA model that was learned elsewhere.

It is differentiable, so it can be a reward; where nothing was trained with it, it is an independent judge.

    python evaluate.py --demo --metrics ranker rewards.cnniqa:build
    python train.py --reward rewards.cnniqa:build ...

The weights are those of github.com/lidq92/CNNIQA, file models/CNNIQA-LIVE (2.9 MB, sha256 79cc404d0da3e76e...; the
repository names no licence, so the file is not part of this one). They are looked for at $CNNIQA_WEIGHTS, else at
weights/downloads/cnniqa_live.pth. The model predicts DMOS, where lower is better; this one returns 100 - DMOS, so
HIGHER IS BETTER: about 10 for a badly blurred photograph, about 90 for a clean one.
"""
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import archs
import runs

WEIGHTS = Path(__file__).resolve().parents[1] / "weights" / "downloads" / "cnniqa_live.pth"
SOURCE = "file models/CNNIQA-LIVE of github.com/lidq92/CNNIQA (sha256 79cc404d0da3e76e...)"
PATCH = 32


class CNNIQA(nn.Module):
    """Quality of images: (B, 3, H, W) RGB in [0, 1], H and W >= 32 -> (B,), 100 - DMOS, higher is better.

    The luma is cut into 32x32 patches that do not overlap, from the top left; what is left over at the right and at the
    bottom is not seen. Every patch is normalised locally, as (p - mean) / (deviation + 1) over 3x3 pixels, goes through
    one convolution of 50 channels, and is described by each channel's maximum and minimum; three linear layers predict
    its DMOS. The image has the mean of its patches. CHOICE: all whole patches count; the published code drops the last
    row and column of them. Names of the parameters as in the published file. Raises ValueError for another shape.
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 50, 7)
        self.fc1, self.fc2, self.fc3 = nn.Linear(100, 800), nn.Linear(800, 800), nn.Linear(800, 1)
        luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        self.register_buffer("luma", luma, persistent=False)

    def forward(self, x):
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < PATCH:
            raise ValueError(f"CNNIQA wants (B, 3, H, W) RGB with sides of at least {PATCH}, got {tuple(x.shape)}")
        grey = (x * self.luma).sum(1, keepdim=True)  # (B, 1, H, W)
        patches = F.unfold(grey, PATCH, stride=PATCH)  # (B, 1024, P)
        patches = normalise(patches.transpose(1, 2).reshape(-1, 1, PATCH, PATCH))  # (B P, 1, 32, 32)
        maps = self.conv1(patches).flatten(2)  # (B P, 50, 26 * 26)
        described = torch.cat([maps.amax(2), maps.amin(2)], 1)  # (B P, 100)
        dmos = self.fc3(F.relu(self.fc2(F.relu(self.fc1(described)))))  # (B P, 1)
        return 100 - dmos.view(len(x), -1).mean(1)


def normalise(patches):
    """(p - mean) / (standard deviation + 1) over 3x3 pixels of (N, 1, H, W), with the border mirrored.

    The mirrored margin of one pixel repeats the edge. The variance has a floor of 1e-12: the square root of 0 has no
    gradient.
    """
    padded = F.pad(patches, (1, 1, 1, 1), mode="replicate")
    mean = F.avg_pool2d(padded, 3, 1)
    variance = F.avg_pool2d(padded * padded, 3, 1) - mean * mean
    return (patches - mean) / (variance.clamp_min(1e-12).sqrt() + 1)


def build(device="cpu"):
    """The frozen model, for --reward and --metrics. UserError for a missing or another file of weights."""
    path = Path(os.environ.get("CNNIQA_WEIGHTS") or WEIGHTS)
    if not path.is_file():
        raise runs.UserError(f"{path}: no weights of CNNIQA; {runs.how_to_get(WEIGHTS)}: {SOURCE}; or set "
                             "CNNIQA_WEIGHTS to where it is")
    net = CNNIQA()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except archs.TORCH_DAMAGE as error:
        reason = " ".join(str(error).split())[:100]
        raise runs.UserError(f"{path}: not weights of CNNIQA ({reason}); get {SOURCE}") from None
    return net.eval().requires_grad_(False).to(device)
