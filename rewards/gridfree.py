"""`ranker3` for networks that end in a pixel shuffle: it judges an image without the grid that its 4x4 blocks share.

    python -m dpo.pool score --pool POOL --fr ssim --nr rewards.gridfree:build
    python evaluate.py ... --metrics rewards.gridfree:build

Such a network can add one small pattern to all 4x4 blocks of its outputs, which no image calls for and which costs the
other terms of a reward next to nothing; a quality model that likes patterns pays for it (docs/results-dpo.md). Here
the grid is taken away before the image is judged, so it has next to no score and gradient: what is left comes from the
borders, and from areas at black or white, where a grid is cut off. What changes over the image, and patterns of another
period, are still seen.
"""
import torch.nn.functional as F
from torch import nn

import runs
from rewards import opinion

PERIOD = 4
MODEL = "rewards/ranker3.pth"


def smoothed(x):
    """Means of 4 x 4 pixels around every pixel, centred by half weights at the ends: nothing of period 4 or 2 passes.

    The border is reflected.
    """
    around = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), 4, 1)
    return F.avg_pool2d(around, 2, 1)


def shared_grid(x):
    """(B, C, H, W) -> (B, C, 4, 4), of mean 0 in every channel: what the 4x4 blocks of each image have in common.

    Of x minus a smoothed x, whose flat areas are the grid alone, the mean over the middle half of all blocks, so that
    edges and textures have no say. Blocks that the lower and right border cut are left out.
    """
    details = x - smoothed(x)
    height, width = (n - n % PERIOD for n in x.shape[2:])
    blocks = details[..., :height, :width].unflatten(3, (-1, PERIOD)).unflatten(2, (-1, PERIOD))
    values = blocks.permute(0, 1, 3, 5, 2, 4).flatten(4).sort(-1).values
    count = values.shape[-1]
    grid = values[..., count // 4:count - count // 4].mean(-1)
    return grid - grid.mean((2, 3), keepdim=True)


def without_grid(x):
    """The images less their grid; values in [0, 1] may leave that range by as much as it is strong."""
    height, width = x.shape[2:]
    tiled = shared_grid(x).repeat(1, 1, height // PERIOD + 1, width // PERIOD + 1)
    return x - tiled[..., :height, :width]


class GridFree(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(without_grid(x))


def build(device="cpu"):
    return GridFree(opinion.load(runs.REPO / MODEL)[0]).to(device)
