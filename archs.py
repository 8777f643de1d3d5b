"""Networks: the generators SwinIR, RRDBNet and SRVGGNetCompact, the U-Net discriminator; their files; large images.

    net = create("swinir")                                 the paper's backbone, HGGT's settings, 11,900,199 parameters
    net, info = load_generator("RealESRGAN_x4plus.pth")    any public file: its keys tell architecture and sizes
    sr = upscale_tiled(net, lq, tile=256).clamp(0, 1)      an image of any size, in bounded memory

Images are (B, 3, H, W) float RGB in [0, 1]; outputs are not clamped. Key names, shapes and parameter counts are those
of the public checkpoints (BasicSR, SwinIR, Real-ESRGAN), so that weights load strictly in both directions. Nothing but
ARCHS knows how a network is trained. In shape comments N is the number of tokens of a window (64), nW the number of
windows, C the embedding dimension.
"""
import math
import pickle
import re
import struct
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import spectral_norm  # the legacy one: torch.nn.utils.parametrizations gives other key names

import runs

# In place, so only for fresh convolution outputs
lrelu = partial(F.leaky_relu, negative_slope=0.2, inplace=True)


def conv3x3(in_channels, out_channels):
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def upsample_nearest(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


def to_rgb(conv, x):
    """Apply the last convolution in the precision of its weights: bf16, with 8 bits, is too coarse for white."""
    with torch.autocast(x.device.type, enabled=False):
        return conv(x.to(conv.weight.dtype))


def pad_reflect(x, bottom, right):
    """Pad (B, C, H, W) at bottom and right by reflection, repeatedly where the image is smaller than its padding."""
    h, w = x.shape[2:]
    if bottom < h and right < w:
        return F.pad(x, (0, right, 0, bottom), mode="reflect")

    def mirror(size, total):
        i = torch.arange(total, device=x.device) % max(2 * size - 2, 1)
        return torch.minimum(i, 2 * size - 2 - i)
    return x[:, :, mirror(h, h + bottom)][:, :, :, mirror(w, w + right)]


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))), used by selfsup/ and dpo/ (PAPER: residual blocks; CHOICE: this form)."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = conv3x3(width, width), conv3x3(width, width)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(x)))


# SwinIR (Liang et al., 2021)

def shift_mask(h, w, window, shift):
    """(nW, N, N): -100 between tokens that the cyclic shift brought together from opposite borders, otherwise 0."""
    row, col = ((torch.arange(n) >= n - window).long() + (torch.arange(n) >= n - shift) for n in (h, w))
    region = 3 * row[:, None] + col  # (h, w), nine regions
    region = to_windows(region[None, :, :, None], window)[0, :, :, 0]  # (nW, N)
    return torch.where(region[:, :, None] == region[:, None, :], 0.0, -100.0)


def to_windows(x, window):
    """(B, H, W, C) -> (B, nW, N, C), windows and tokens row by row."""
    b, h, w, c = x.shape
    x = x.view(b, h // window, window, w // window, window, c)
    return x.transpose(2, 3).reshape(b, -1, window * window, c)


def from_windows(x, h, w, window):
    """Inverse of to_windows."""
    x = x.view(x.shape[0], h // window, w // window, window, window, -1)
    return x.transpose(2, 3).reshape(x.shape[0], h, w, -1)


class WindowAttention(nn.Module):
    """Multi-head attention among the tokens of each window, with a learned bias per head and relative position."""

    def __init__(self, dim, window, heads):
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        dy, dx = (p.flatten()[:, None] - p.flatten() + window - 1 for p in (y, x))  # (N, N), 0 .. 2 * window - 2
        self.register_buffer("relative_position_index", dy * (2 * window - 1) + dx)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, mask):
        """x: (B, nW, N, C); mask: (nW, N, N) added to the logits, or None -> (B, nW, N, C)"""
        b, nw, n, c = x.shape
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.view(n, n, self.heads).permute(2, 0, 1)  # (heads, N, N)
        width = c // self.heads
        qkv = self.qkv(x).view(b, nw, n, 3, self.heads, width)
        if x.is_cuda:
            # its fused kernels take widths that are multiples of 8; zeros change no product
            qkv = F.pad(qkv, (0, -width % 8))
        qkv = qkv.permute(3, 0, 1, 4, 2, 5)
        if mask is None:
            # all windows have the same bias: they join the batch
            q, k, v = qkv.flatten(1, 2)  # (B * nW, heads, N, width)
            bias = bias[None]
        else:
            # every window has its own mask: they join the heads, and the batch shares the masks
            q, k, v = qkv.flatten(2, 3)  # (B, nW * heads, N, width)
            bias = (bias + mask[:, None]).flatten(0, 1)[None]  # (1, nW * heads, N, N)
        # Against attention written out, on a CPU (experiments/tricks.py): 1.07 times as fast forward, 0.94 times with
        # backward, so no gain
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=width ** -0.5)[..., :width]
        return self.proj(x.reshape(b, nw, self.heads, n, width).transpose(2, 3).reshape(b, nw, n, c))


class SwinBlock(nn.Module):
    """x + drop(attention(norm(x))), then x + drop(mlp(norm(x))). Odd blocks shift the windows by half a window."""

    def __init__(self, dim, window, heads, mlp_ratio, shift, img_size):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads)
        self.norm2 = nn.LayerNorm(dim)
        hidden = round(dim * mlp_ratio)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim)))
        # for the state dict only: the mask in use depends on the image's size
        if shift:
            self.register_buffer("attn_mask", shift_mask(img_size, img_size, window, shift))

    def forward(self, x, mask, keep):
        """x: (B, H, W, C); mask: (nW, N, N); keep: (B, 2), the scales of each sample's two branches, or None for 1."""
        y = self.attention(self.norm1(x), mask)
        x = x + (y if keep is None else y * keep[:, 0, None, None, None])
        y = self.mlp(self.norm2(x))
        return x + (y if keep is None else y * keep[:, 1, None, None, None])

    def attention(self, x, mask):
        h, w = x.shape[1:3]
        if not self.shift:
            return from_windows(self.attn(to_windows(x, self.window), None), h, w, self.window)
        x = to_windows(x.roll((-self.shift, -self.shift), (1, 2)), self.window)
        return from_windows(self.attn(x, mask), h, w, self.window).roll((self.shift, self.shift), (1, 2))


def residual_conv(dim, connection):
    """The convolution that ends a residual group: "1conv", or "3conv" with a bottleneck (SwinIR's large models)."""
    if connection == "1conv":
        return conv3x3(dim, dim)
    return nn.Sequential(conv3x3(dim, dim // 4), nn.LeakyReLU(0.2), nn.Conv2d(dim // 4, dim // 4, 1),
                         nn.LeakyReLU(0.2), conv3x3(dim // 4, dim))


class ResidualSwinGroup(nn.Module):
    """RSTB: x + conv(blocks(x)) on (B, H, W, C)."""

    def __init__(self, dim, depth, window, heads, mlp_ratio, img_size, resi_connection):
        super().__init__()
        blocks = [SwinBlock(dim, window, heads, mlp_ratio, j % 2 * (window // 2), img_size) for j in range(depth)]
        self.residual_group = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.conv = residual_conv(dim, resi_connection)

    def forward(self, x, mask, keep):
        """keep: for each block (B, 2) or None, see SwinBlock."""
        y = x
        for block, keep_block in zip(self.residual_group["blocks"], keep):
            y = block(y, mask, keep_block)
        return x + self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SwinIR(nn.Module):
    """SwinIR (Liang et al., 2021); the defaults are HGGT's x4 generator.

    forward(x, keep=None): (B, 3, h, w) RGB in [0, 1], any size -> (B, 3, upscale * h, upscale * w), not clamped.

    upscale:    2, 3, 4 or 8 with upsampler "pixelshuffle" (HGGT, classical SR), 2 or 4 with "nearest+conv" (public
                real-SR files)
    img_size:   side of the image whose attn_mask is kept in the state dict, 64 or 48 in public files. It does not limit
                the images
    pad_mode:   "swinir" reflects the image up to the next multiple of the window. "hggt" adds a whole window to sides
                that are multiples already (64 -> 72, about 27 % more work), as HGGT's models were trained and tested.
                Outputs differ near the right and bottom border, so a checkpoint belongs to one of the two
    drop_path:  stochastic depth: the rate of the last block, falling linearly to 0 at the first. Each of a block's two
                branches is dropped on its own, and scaled by 1 / (1 - rate) when kept. Only in train mode, where every
                forward needs keep = draw_keep(seeds), B ints: they alone decide what each sample drops, so the batch
                around it has no influence (HGGT draws from the global generator). The attribute may be changed at any
                time; 0 switches it off
    Raises ValueError on bad options and on a missing or miscounted keep.
    """

    def __init__(self, upscale=4, img_size=64, window=8, depths=(6,) * 6, embed_dim=180, heads=(6,) * 6, mlp_ratio=2.0,
                 upsampler="pixelshuffle", pad_mode="hggt", drop_path=0.1, resi_connection="1conv"):
        super().__init__()
        for name, value, allowed in (("upsampler", upsampler, ("pixelshuffle", "nearest+conv")),
                                     ("upscale", upscale, (2, 3, 4, 8) if upsampler == "pixelshuffle" else (2, 4)),
                                     ("pad_mode", pad_mode, ("hggt", "swinir")),
                                     ("resi_connection", resi_connection, ("1conv", "3conv"))):
            if value not in allowed:
                raise ValueError(f"SwinIR: {name} {value!r} is none of {allowed}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"SwinIR: drop_path {drop_path} is not in [0, 1)")
        if img_size % window or img_size <= window:
            raise ValueError(f"SwinIR: img_size {img_size} is not a larger multiple of the window {window}")
        if len(depths) != len(heads) or any(embed_dim % n for n in heads):
            raise ValueError(f"SwinIR: heads {heads} must be as many as depths {depths} "
                             f"and divide embed_dim {embed_dim}")
        self.upscale, self.window, self.depths = upscale, window, depths
        self.pad_mode, self.drop_path = pad_mode, drop_path
        # a buffer follows the module's device and dtype; not persistent, since public state dicts have no such key
        self.register_buffer("mean", torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1), persistent=False)
        # shift masks by image size, shared by all blocks
        self.masks = {}

        self.conv_first = conv3x3(3, embed_dim)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(embed_dim)})
        self.layers = nn.ModuleList(ResidualSwinGroup(embed_dim, depth, window, n, mlp_ratio, img_size, resi_connection)
                                    for depth, n in zip(depths, heads))
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = residual_conv(embed_dim, resi_connection)
        # slope 0.01 here and 0.2 elsewhere, as SwinIR has it
        self.conv_before_upsample = nn.Sequential(conv3x3(embed_dim, 64), nn.LeakyReLU(0.01))
        if upsampler == "pixelshuffle":
            factors = {2: [2], 3: [3], 4: [2, 2], 8: [2, 2, 2]}[upscale]
            pairs = [(conv3x3(64, f * f * 64), nn.PixelShuffle(f)) for f in factors]
            self.upsample = nn.Sequential(*[module for pair in pairs for module in pair])
        else:
            self.conv_up1 = conv3x3(64, 64)
            if upscale == 4:
                self.conv_up2 = conv3x3(64, 64)
            self.conv_hr = conv3x3(64, 64)
        self.conv_last = conv3x3(64, 3)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)

    def forward(self, x, keep=None):
        h, w = x.shape[2:]
        padding = [self.window - n % self.window if self.pad_mode == "hggt" else -n % self.window for n in (h, w)]
        x = pad_reflect(x, *padding)
        mask, blocks = self.mask(x), sum(self.depths)
        if not self.training or self.drop_path == 0:
            keep = [None] * blocks
        elif keep is None or keep.shape != (blocks, len(x), 2):
            raise ValueError(f"SwinIR with drop_path {self.drop_path} in train mode needs keep, {(blocks, len(x), 2)}, "
                             f"got {None if keep is None else tuple(keep.shape)}: net(x, net.draw_keep(seeds))")

        x = self.conv_first(x - self.mean)  # (B, C, H, W)
        y = self.patch_embed["norm"](x.permute(0, 2, 3, 1))  # (B, H, W, C)
        first = 0
        for layer, depth in zip(self.layers, self.depths):
            y = layer(y, mask, keep[first:first + depth])
            first += depth
        x = self.conv_after_body(self.norm(y).permute(0, 3, 1, 2)) + x

        x = self.conv_before_upsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
        else:
            x = lrelu(self.conv_up1(upsample_nearest(x)))
            if self.upscale == 4:
                x = lrelu(self.conv_up2(upsample_nearest(x)))
            x = lrelu(self.conv_hr(x))
        x = to_rgb(self.conv_last, x) + self.mean
        return x[:, :, :h * self.upscale, :w * self.upscale]

    def mask(self, x):
        """The shift mask (nW, N, N) of this image size."""
        key = (*x.shape[2:], self.mean.device, self.mean.dtype)
        if key not in self.masks:
            # four at most: a mask has 16 KB per window, 67 MB for a 512 x 512 input
            if len(self.masks) >= 4:
                self.masks.pop(next(iter(self.masks)))
            self.masks[key] = shift_mask(*x.shape[2:], self.window, self.window // 2).to(self.mean)
        return self.masks[key]

    def draw_keep(self, seeds):
        """(blocks, B, 2): by what each block's two branches are multiplied for B samples, 0 or 1 / (1 - rate)."""
        blocks = sum(self.depths)
        rates = np.linspace(0, self.drop_path, blocks)[:, None, None]
        draws = np.stack([np.random.default_rng(int(seed)).random((blocks, 2)) for seed in seeds], axis=1)
        keep = (draws >= rates) / (1 - rates)
        return runs.to_device(torch.from_numpy(keep).to(self.mean.dtype), self.mean.device)


# RRDBNet (ESRGAN, Wang et al., 2018; Real-ESRGAN, Wang et al., 2021)

class ResidualDenseBlock(nn.Module):
    """x + 0.2 * five convolutions, each of which sees the input and all earlier outputs."""

    def __init__(self, num_feat, num_grow):
        super().__init__()
        for i in range(5):
            conv = conv3x3(num_feat + i * num_grow, num_grow if i < 4 else num_feat)
            nn.init.kaiming_normal_(conv.weight)
            # so that a deep chain of residuals starts near the identity
            conv.weight.data *= 0.1
            nn.init.zeros_(conv.bias)
            setattr(self, f"conv{i + 1}", conv)

    def forward(self, x):
        seen = [x]
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen.append(lrelu(conv(torch.cat(seen, 1))))
        return x + 0.2 * self.conv5(torch.cat(seen, 1))


class RRDB(nn.Module):
    """x + 0.2 * three residual dense blocks."""

    def __init__(self, num_feat, num_grow):
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (ResidualDenseBlock(num_feat, num_grow) for _ in range(3))

    def forward(self, x):
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """RRDBNet as Real-ESRGAN uses it; the paper's second backbone.

    (B, 3, h, w) RGB in [0, 1], any size -> (B, 3, scale * h, scale * w), not clamped. The tail always enlarges by 4:
    scale 2 and 1 first fold 2 x 2 or 4 x 4 pixels into channels; sizes that do not divide are padded by reflection and
    cropped afterwards.
    Raises ValueError if scale is none of 4, 2, 1.
    """

    def __init__(self, scale=4, num_feat=64, num_block=23, num_grow=32):
        super().__init__()
        if scale not in (1, 2, 4):
            raise ValueError(f"RRDBNet: scale {scale} is none of (4, 2, 1)")
        self.scale, self.fold = scale, 4 // scale
        self.conv_first = conv3x3(3 * self.fold ** 2, num_feat)
        self.body = nn.Sequential(*[RRDB(num_feat, num_grow) for _ in range(num_block)])
        self.conv_body = conv3x3(num_feat, num_feat)
        self.conv_up1 = conv3x3(num_feat, num_feat)
        self.conv_up2 = conv3x3(num_feat, num_feat)
        self.conv_hr = conv3x3(num_feat, num_feat)
        self.conv_last = conv3x3(num_feat, 3)

    def forward(self, x):
        h, w = x.shape[2:]
        if self.fold > 1:
            x = F.pixel_unshuffle(pad_reflect(x, -h % self.fold, -w % self.fold), self.fold)
        x = self.conv_first(x)
        x = x + self.conv_body(self.body(x))
        x = lrelu(self.conv_up1(upsample_nearest(x)))
        x = lrelu(self.conv_up2(upsample_nearest(x)))
        x = to_rgb(self.conv_last, lrelu(self.conv_hr(x)))
        return x[:, :, :h * self.scale, :w * self.scale]


class SRVGGNetCompact(nn.Module):
    """A plain chain of convolutions, added to nearest-neighbour enlargement (Real-ESRGAN's realesr-general-x4v3).

    (B, 3, h, w) RGB in [0, 1] -> (B, 3, upscale * h, upscale * w), not clamped. num_conv: hidden convolutions.
    """

    def __init__(self, num_feat=64, num_conv=32, upscale=4):
        super().__init__()
        self.upscale = upscale
        layers = [conv3x3(3, num_feat), nn.PReLU(num_feat)]
        for _ in range(num_conv):
            layers += [conv3x3(num_feat, num_feat), nn.PReLU(num_feat)]
        self.body = nn.Sequential(*layers, conv3x3(num_feat, 3 * upscale ** 2))

    def forward(self, x):
        base = F.interpolate(x, scale_factor=self.upscale, mode="nearest")
        return base + F.pixel_shuffle(self.body(x), self.upscale)


# Discriminator

class UNetDiscriminatorSN(nn.Module):
    """U-Net discriminator with spectral normalisation (Real-ESRGAN; HGGT).

    (B, 3, H, W), sides multiples of 8 -> (B, 1, H, W) logits, positive is real. Each forward in train mode does one
    power iteration, so it changes the buffers weight_u and weight_v. Raises ValueError on other sides.
    """

    def __init__(self, num_feat=64):
        super().__init__()
        n = num_feat
        self.conv0 = conv3x3(3, n)
        for i, (wide, out, kernel, stride) in enumerate([(n, 2 * n, 4, 2), (2 * n, 4 * n, 4, 2), (4 * n, 8 * n, 4, 2),
                                                         (8 * n, 4 * n, 3, 1), (4 * n, 2 * n, 3, 1), (2 * n, n, 3, 1),
                                                         (n, n, 3, 1), (n, n, 3, 1)]):
            setattr(self, f"conv{i + 1}", spectral_norm(nn.Conv2d(wide, out, kernel, stride, padding=1, bias=False)))
        self.conv9 = conv3x3(n, 1)

    def forward(self, x):
        if x.shape[2] % 8 or x.shape[3] % 8:
            raise ValueError(f"discriminator: image of {x.shape[2]} x {x.shape[3]} pixels, "
                             "both sides must be multiples of 8")
        x0 = lrelu(self.conv0(x))  # (B, n, H, W)
        x1 = lrelu(self.conv1(x0))  # (B, 2n, H/2, W/2)
        x2 = lrelu(self.conv2(x1))  # (B, 4n, H/4, W/4)
        y = lrelu(self.conv3(x2))  # (B, 8n, H/8, W/8)
        for conv, skip in ((self.conv4, x2), (self.conv5, x1), (self.conv6, x0)):
            y = lrelu(conv(F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False))) + skip
        y = lrelu(self.conv8(lrelu(self.conv7(y))))
        return self.conv9(y)


# Of every generator its class, its sizes (keywords of the class) and the defaults of the flags of every stage: "train"
# for both stages of train.py, "psnr" and "gan" for one of them, "tune" for finetune_lora.py. Batch and pool are HGGT's
# options for 4 GPUs, summed over them; a group is the batch of one GPU. "targets" is a regular expression over names of
# layers: those that LoRA adapts; LAST stands for the number of the body's last layer.
# Plain values only: runs.literal reads them from the text of this file.
ARCHS = {
    "swinir": {
        "class": "SwinIR", "sizes": {},
        # HGGT options
        "train": {"degradation": "one-round", "batch_size": 32, "group_size": 8, "pool_size": 640, "drop_path": 0.1},
        "psnr": {"milestones": [150_000, 240_000, 270_000, 285_000]},
        "gan": {"milestones": [200_000, 250_000, 275_000, 287_500]},
        # PAPER Supp. 8.3: the MLPs, 72 layers
        "tune": {"rank": 48, "lr": 5e-6, "milestones": [5_000], "targets": r"\.mlp\.fc[12]$"},
    },
    "rrdbnet": {
        "class": "RRDBNet", "sizes": {},
        # HGGT options
        "train": {"degradation": "two-round", "batch_size": 48, "group_size": 12, "pool_size": 720},
        "psnr": {"milestones": [300_000], "usm": True},
        "gan": {"milestones": [300_000]},
        # PAPER Supp. 8.3: every convolution of the dense blocks, 345 layers
        "tune": {"rank": 24, "lr": 5e-5, "milestones": [], "targets": r"^body\.\d+\.rdb[123]\.conv[1-5]$"},
    },
    # CHOICE: neither paper trains this net; it has the settings of RRDBNet, the other convolutional one
    "compact": {
        "class": "SRVGGNetCompact", "sizes": {},
        "train": {"degradation": "two-round", "batch_size": 48, "group_size": 12, "pool_size": 720},
        "psnr": {"milestones": [300_000], "usm": True},
        "gan": {"milestones": [300_000]},
        # CHOICE: all convolutions but the first and the last; odd layers are PReLUs
        "tune": {"rank": 16, "lr": 2e-4, "milestones": [], "targets": r"^body\.(?!0$|LAST$)\d*[02468]$"},
    },
    # CHOICE: sizes that train on a CPU in minutes, for demo and tests. spandrel opens them; it requires num_grow 32
    "swinir-small": {
        "class": "SwinIR", "sizes": {"img_size": 16, "depths": (2, 2), "embed_dim": 32, "heads": (2, 2)},
        "train": {"degradation": "one-round", "batch_size": 8, "group_size": 4, "pool_size": 32, "drop_path": 0.1},
        "psnr": {"milestones": [], "lr": 1e-3},
        "gan": {"milestones": []},
        "tune": {"rank": 8, "lr": 5e-6, "milestones": [], "targets": r"\.mlp\.fc[12]$"},
    },
    "rrdbnet-small": {
        "class": "RRDBNet", "sizes": {"num_feat": 32, "num_block": 2},
        "train": {"degradation": "two-round", "batch_size": 8, "group_size": 4, "pool_size": 32},
        "psnr": {"milestones": [], "lr": 1e-3, "usm": True},
        "gan": {"milestones": []},
        "tune": {"rank": 8, "lr": 5e-5, "milestones": [], "targets": r"^body\.\d+\.rdb[123]\.conv[1-5]$"},
    },
    "compact-small": {
        "class": "SRVGGNetCompact", "sizes": {"num_feat": 32, "num_conv": 6},
        "train": {"degradation": "two-round", "batch_size": 8, "group_size": 4, "pool_size": 32},
        "psnr": {"milestones": [], "lr": 1e-3, "usm": True},
        "gan": {"milestones": []},
        "tune": {"rank": 8, "lr": 2e-4, "milestones": [], "targets": r"^body\.(?!0$|LAST$)\d*[02468]$"},
    },
}


def is_convolutional(net):
    """Does the channels-last memory format suit the network? SwinIR, which works on tokens, keeps the default one."""
    return not isinstance(net, SwinIR)


def within(autocast, net):
    """The network, called within autocast(), in a form that upscale_tiled takes."""
    def call(x):
        with autocast():
            return net(x)
    return call


def memory_format(net, precision):
    """Of a network that runs in this precision: bf16 convolutions are several times as fast with channels last."""
    return torch.channels_last if precision == "bf16" and is_convolutional(net) else torch.contiguous_format


def ready(net, device, precision):
    """A network for inference: on its device, in the precision of --precision, in the memory format that suits it."""
    net = net.to(device, memory_format=memory_format(net, precision))
    return within(partial(runs.in_precision, device, precision), net)


def compile_blocks(net):
    """Compile, in place, the blocks that a generator repeats; of one that repeats none, all.

    The compiler then takes half a minute instead of minutes, and the code is nearly as fast (docs/speed.md).
    """
    blocks = [module for module in net.modules() if isinstance(module, (SwinBlock, ResidualDenseBlock))]
    for module in blocks or [net]:
        module.compile()


def create(arch, **options):
    """The generator `arch` of ARCHS with random weights. options: keywords of its class, which win over its sizes."""
    return globals()[ARCHS[arch]["class"]](**ARCHS[arch]["sizes"] | options)


# Weight files

# all that torch.load was seen to raise on thousands of truncated, overwritten and foreign files
TORCH_DAMAGE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError,
                AttributeError, TypeError, AssertionError, struct.error)


def read_file(path):
    """The content of a .pth, .pt or .safetensors file, on the CPU. No code in the file is run.

    Raises UserError for a file that is missing, damaged or not made by torch.save.
    """
    path = Path(path)
    if not path.is_file():
        raise runs.UserError(f"{path}: no such weights file; {runs.how_to_get(path)}")
    if path.suffix.lower() == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError:
            raise runs.UserError(f"{path}: needs the package safetensors: pip install safetensors") from None
        damage, load = (SafetensorError, OSError), load_file
    else:
        damage, load = TORCH_DAMAGE, partial(torch.load, map_location="cpu", weights_only=True)
    try:
        return load(path)
    except damage as error:
        if "TorchScript" in str(error):
            raise runs.UserError(f"{path}: a TorchScript archive, which is a program, and nothing of it was run; save "
                                 "the network's state_dict() instead") from None
        pickled = re.search(r"GLOBAL (\S+)", str(error))
        if pickled:
            raise runs.UserError(f"{path}: not a readable weights file: it holds a pickled {pickled[1]}, and nothing "
                                 "of it was run; save the network's state_dict() instead") from None
        raise runs.UserError(f"{path}: not a readable weights file ({runs.first_sentence(error)}); "
                             "damaged, or not made by torch.save") from None


# around a state dict in public files, in the order of preference
WRAPPERS = ("params_ema", "params", "state_dict", "model_state_dict", "model")


def unwrap(path, content, key=None):
    """What stands under `key` in a file's content -> (it, key used). See read_weights."""
    if key is None:
        names = []
        while inner := [k for k in WRAPPERS if isinstance(content, dict) and isinstance(content.get(k), dict)]:
            content, names = content[inner[0]], [*names, inner[0]]
        return content, ".".join(names) or "none"
    # the dot may belong to a name
    whole = isinstance(content, dict) and key in content
    for name in [] if key == "none" else [key] if whole else key.split("."):
        if not isinstance(content, dict) or name not in content:
            raise runs.UserError(f"{path}: no key {key!r} in it, it has {first_keys(content)}")
        content = content[name]
    return content, key


def first_keys(content):
    return ", ".join(map(str, list(content)[:5])) or "nothing" if isinstance(content, dict) else type(content).__name__


def present_names(state):
    """A state dict under today's names of keys.

    Without the prefixes of DDP (module.), torch.compile (_orig_mod.) and Lightning (net_g., beside which the
    discriminator is left out); ESRGAN's first two ways of naming RRDBNet become BasicSR's.
    """
    def unprefixed(state):
        return {re.sub(r"^(module\.)+", "", k.replace("_orig_mod.", "")): v for k, v in state.items()}
    state = unprefixed(state)
    if any(k.startswith("net_g.") for k in state):
        state = unprefixed({k.removeprefix("net_g."): v for k, v in state.items() if k.startswith("net_g.")})
    # convolutions outside the body, in their order: the first, one for each enlargement by 2, two at the end
    outside = sorted({int(k.split(".")[1]) for k in state if re.match(r"model\.\d+\.weight$", k)})
    last = [f"conv_up{i + 1}" for i in range(len(outside) - 3)] + ["conv_hr", "conv_last"]
    tops = {f"model.{n}": name for n, name in zip(outside, ["conv_first", *last])}
    tops |= {"trunk_conv": "conv_body", "upconv1": "conv_up1", "upconv2": "conv_up2", "HRconv": "conv_hr"}
    first = "model.1.sub.0.RDB1.conv1.0.weight" in state
    if not first and "RRDB_trunk.0.RDB1.conv1.weight" not in state:
        return state

    def present(key):
        key = re.sub(r"^(model\.1\.sub|RRDB_trunk)\.(\d+)\.RDB(\d)\.conv(\d)\.(0\.)?", r"body.\2.rdb\3.conv\4.", key)
        key = re.sub(r"^model\.1\.sub\.\d+\.(?=weight|bias)", "conv_body.", key)
        layer, _, end = key.rpartition(".")
        return f"{tops.get(layer, layer)}.{end}"
    return {present(k): v for k, v in state.items()}


def read_weights(path, key=None):
    """State dict of a .pth, .pt or .safetensors file -> (state dict on the CPU, key used).

    key: None looks into each of WRAPPERS that is there, else takes the file itself ("none"); naming one forces it, and
    A.B is B inside A. Floating-point tensors become float32; names of keys: see present_names.
    Raises UserError as read_file, and for a file that lacks the key or holds no state dict.
    """
    content = read_file(path)
    if isinstance(content, dict) and "lora" in content:
        raise runs.UserError(f"{path}: an adapter of finetune_lora.py, not a network: upscale.py takes it with --lora, "
                             "evaluate.py under the name adapter.pth")
    state, used = unwrap(path, content, key)
    is_state = isinstance(state, dict) and state and all(
        isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout == torch.strided and not v.is_meta
        for k, v in state.items())
    if not is_state:
        entries = state.items() if isinstance(state, dict) else []
        inner = [k for k, v in entries if isinstance(v, dict)]
        odd = [f"{k} is no tensor but {type(v).__name__}" for k, v in entries if not isinstance(v, torch.Tensor)]
        # one that has something more, such as None, is told by that
        told = odd[0] if odd and len(odd) < len(entries) else f"it holds {first_keys(content)}"
        raise runs.UserError(f"{path}: no state dict ({told}); "
                             "of a run take weights/ema_*.pth, not a training checkpoint"
                             + (f"; --weights-key {inner[0]} looks into {inner[0]}" if inner else ""))
    return {k: v.float() if v.is_floating_point() else v for k, v in present_names(state).items()}, used


def recognise(state):
    """Architecture and sizes of a generator, from the keys and shapes of its state dict -> (name in ARCHS, keywords).

    The keywords are those of `create`; SwinIR's pad_mode and drop_path leave no trace in a state dict.
    Raises ValueError, which names no file, for anything else.
    """
    shapes = {k: tuple(v.shape) for k, v in state.items()}

    def count(prefix):
        """How many modules have a name <prefix><number>?"""
        return len({k[len(prefix):].split(".")[0] for k in shapes if k.startswith(prefix)})

    def check_channels(what, channels, allowed=(3,)):
        if channels not in allowed:
            raise ValueError(f"{what} for images of {channels} channel{'s' * (channels > 1)}; only those for RGB load")
    try:
        if "layers.0.residual_group.blocks.0.attn.relative_position_bias_table" in shapes:
            check_channels("a SwinIR", shapes["conv_first.weight"][1])
            return "swinir", swinir_sizes(shapes, count)
        if "body.0.rdb1.conv1.weight" in shapes:
            # one by one, so that a tensor of another kind is an IndexError
            num_feat, folded = shapes["conv_first.weight"][0], shapes["conv_first.weight"][1]
            # scale 2 and 1 fold pixels into channels
            check_channels("an RRDBNet", folded, (3, 12, 48))
            ups = count("conv_up")
            if ups != 2:
                raise ValueError(f"an RRDBNet that enlarges by {2 ** ups}; only those with two steps of 2 load")
            return "rrdbnet", dict(scale=4 // math.isqrt(folded // 3), num_feat=num_feat, num_block=count("body."),
                                   num_grow=shapes["body.0.rdb1.conv1.weight"][0])
        if len(shapes.get("body.1.weight", ())) == 1:
            last = count("body.") - 1
            check_channels("an SRVGGNetCompact", shapes["body.0.weight"][1])
            out = shapes[f"body.{last}.weight"][0]
            if out != 3 * math.isqrt(out // 3) ** 2:
                raise ValueError(f"an SRVGGNetCompact whose last layer has {out} channels; only those for RGB load")
            return "compact", dict(num_feat=shapes["body.0.weight"][0], num_conv=last // 2 - 1,
                                   upscale=math.isqrt(out // 3))
    except (KeyError, IndexError) as error:
        raise ValueError(f"an incomplete state dict (first problem: {error})") from None
    # a backbone that was added to ARCHS, in the sizes of its entry
    for name, entry in ARCHS.items():
        if entry["class"] not in ("SwinIR", "RRDBNet", "SRVGGNetCompact"):
            with torch.device("meta"):
                expected = create(name).state_dict()
            if {k: tuple(v.shape) for k, v in expected.items()} == shapes:
                return name, {}
    if "conv1.weight_orig" in shapes:
        raise ValueError("a discriminator, not a generator")
    if any("lora_" in k for k in shapes):
        raise ValueError("a LoRA adapter, not a whole generator: merge it, or load the weights it belongs to")
    raise ValueError(f"none of SwinIR, RRDBNet and SRVGGNetCompact (first keys: {', '.join(list(shapes)[:3])})")


def swinir_sizes(shapes, count):
    """The keywords of a SwinIR, from the shapes of its state dict; count: see recognise."""
    depths = [count(f"layers.{i}.residual_group.blocks.") for i in range(count("layers."))]
    embed_dim = shapes["conv_first.weight"][0]
    tables = [shapes[f"layers.{i}.residual_group.blocks.0.attn.relative_position_bias_table"]
              for i in range(len(depths))]
    window = (math.isqrt(tables[0][0]) + 1) // 2
    windows = shapes.get("layers.0.residual_group.blocks.1.attn_mask", (64,))[0]
    if "conv_before_upsample.0.weight" not in shapes:
        raise ValueError("a lightweight, denoising or JPEG SwinIR; "
                         "only those with pixelshuffle or nearest+conv tails load")
    if "conv_up1.weight" in shapes:
        upsampler, upscale = "nearest+conv", 4 if "conv_up2.weight" in shapes else 2
    else:
        upsampler = "pixelshuffle"
        upscale = math.prod(math.isqrt(shapes[f"upsample.{2 * i}.weight"][0] // 64) for i in range(count("upsample.")))
    return dict(upscale=upscale, img_size=math.isqrt(windows) * window, window=window, depths=tuple(depths),
                embed_dim=embed_dim, heads=tuple(table[1] for table in tables), upsampler=upsampler,
                mlp_ratio=shapes["layers.0.residual_group.blocks.0.mlp.fc1.weight"][0] / embed_dim,
                resi_connection="3conv" if "conv_after_body.0.weight" in shapes else "1conv")


def describe(state):
    """A phrase for messages: architecture and sizes of a state dict, or why it is not a generator's."""
    try:
        arch, sizes = recognise(state)
    except ValueError as error:
        return str(error)
    return f"{arch} ({', '.join(f'{k} {v}' for k, v in sizes.items())})"


def load_strict(net, state, path):
    """Load a state dict that fits in all keys, shapes and types; otherwise UserError describes file and network."""
    here = net.state_dict()
    shared = [k for k in here if k in state]
    problems = [f"{k} is {tuple(state[k].shape)} there, {tuple(here[k].shape)} here" for k in shared
                if state[k].shape != here[k].shape]
    problems += [f"{k} is missing" for k in here if k not in state]
    problems += [f"{k} is not expected" for k in state if k not in here]
    problems += [f"{k} is {state[k].dtype} there" for k in shared
                 if here[k].is_floating_point() and not state[k].is_floating_point()]
    if problems:
        there, network = describe(state), describe(here)
        what = f"the file is {there}" + ("" if there == network else f", the network is {network}")
        counted = f"{len(problems)} keys differ, the first:" if len(problems) > 1 else "1 key differs:"
        raise runs.UserError(f"{path}: {what}; {counted} {problems[0]}")
    net.load_state_dict(state, strict=True)


def load_weights(net, path, key=None):
    """Load a weights file strictly into a network. Returns the key used. Raises as read_weights and load_strict."""
    state, used = read_weights(path, key)
    load_strict(net, state, path)
    return used


def load_generator(path, key=None, pad_mode=None, **options):
    """A generator of the architecture and sizes that the file holds -> (net in eval mode on the CPU, info).

    key: see read_weights. pad_mode: SwinIR's, which no file tells. None takes "hggt" for pixelshuffle files, as HGGT
    and this repository make them, and "swinir" for nearest+conv, which only SwinIR's authors released; give "swinir"
    for their classical pixelshuffle files. The convolutional networks ignore it. options: further keywords of create.
    info: dict of arch (name in ARCHS), key, scale, parameters (count) and sizes (keywords that build the net).
    Raises UserError as read_weights does, and for an unknown or incomplete architecture.
    """
    state, used = read_weights(path, key)
    try:
        arch, sizes = recognise(state)
        if arch == "swinir":
            sizes["pad_mode"] = pad_mode or ("hggt" if sizes["upsampler"] == "pixelshuffle" else "swinir")
        net = create(arch, **sizes, **options)
    except ValueError as error:
        raise runs.UserError(f"{path}: {error}") from None
    load_strict(net, state, path)
    scale = getattr(net, "scale", None) or getattr(net, "upscale", 4)
    parameters = sum(p.numel() for p in net.parameters())
    return net.eval(), dict(arch=arch, key=used, scale=scale, parameters=parameters, sizes=sizes)


def load_run(path, flag, key=None, pad_mode=None):
    """load_generator of a weights file, or of a run folder's merged.pth, else newest EMA weights. -> (net, info)

    pad_mode wins over the run's own. info also has file, and trained_at: the run's commit, or None for a file.
    flag: the caller's, named in errors. Raises UserError as load_generator does, and where nothing is.
    """
    file = runs.find_weights(path, f"{flag} names weight files, or run folders that train.py made")
    record = Path(path) / "args.json"
    run = runs.read_record(record) if record.exists() else {"args": {}}
    net, info = load_generator(file, key, pad_mode or run["args"].get("pad_mode"))
    return net, {"file": str(file), **info, "trained_at": run.get("commit")}


def load_x4(path, flag, key=None, pad_mode=None):
    """load_run, and UserError for another scale."""
    net, info = load_run(path, flag, key, pad_mode)
    if info["scale"] != 4:
        raise runs.UserError(f"{flag} {path}: a x{info['scale']} checkpoint, expected a x4 one")
    return net, info


def load_start(path, flag, arch, key=None, sizes=None, **options):
    """A x4 network to train, in the sizes of its file, where they win over those of `arch`. -> (net, info)

    path None: random weights, in `sizes`. info: sizes, and start, a phrase.
    UserError, which names `flag`, for a network of another class or scale.
    """
    if path is None:
        return create(arch, **sizes or {}, **options), {"sizes": sizes, "start": "random start"}
    net, info = load_generator(path, key, **options)
    if ARCHS[info["arch"]]["class"] != ARCHS[arch]["class"] or info["scale"] != 4:
        raise runs.UserError(f"{flag} {path}: the file is {info['arch']} x{info['scale']}, and --arch {arch} is "
                             f"{ARCHS[arch]['class']} x4: name a file of it, or another --arch")
    return net, info | {"start": f"start from {path}, key {info['key']}"}


# Large images

# CHOICE: in LR pixels. Seams of four public networks are below 0.2 grey levels (tests/test_archs.py)
OVERLAP = 64


def tile_weights(size, tile, overlap, scale):
    """Tiles of one axis: [(start, stop, weights)], start and stop in LR pixels, weights (scale * (stop - start),).

    Weights sum to 1 at every pixel. Starts are multiples of 8, so that SwinIR's windows lie as in the whole image. Of
    an overlap the 3/8 at a tile's border, which see least of their surroundings, have weight 0; the quarter in the
    middle is a linear ramp.
    """
    stride = max((tile - overlap) // 8 * 8, 8)
    spans = [(start, min(start + tile, size)) for start in range(0, max(size - overlap, 1), stride)]
    total, ramps = torch.zeros(size * scale), []
    for start, stop in spans:
        # 1 everywhere for overlap 0
        rise = (4 * (torch.arange((stop - start) * scale) + 0.5) / (overlap * scale) - 1.5).clamp(0, 1)
        ramp = torch.ones_like(rise)
        if start > 0:
            ramp = ramp * rise
        if stop < size:
            ramp = ramp * rise.flip(0)
        total[start * scale:stop * scale] += ramp
        ramps.append(ramp)
    return [(start, stop, ramp / total[start * scale:stop * scale]) for (start, stop), ramp in zip(spans, ramps)]


@torch.no_grad()
def upscale_tiled(net, lq, scale=4, tile=256, overlap=OVERLAP, batch=1, sink=None):
    """Run a generator over images of any size, in overlapping tiles that are blended by linear ramps.

    lq: (B, 3, h, w) -> (B, 3, scale * h, scale * w) float32, not clamped
    tile, overlap: in LR pixels. tile 0 is the whole image, and an image no larger than a tile is not cut. Seams shrink
             as the overlap grows, and vanish where 3/8 of it exceed the network's field of view. Where memory does not
             suffice the tile is halved, down to just more than twice the overlap
    batch:   tiles of one size that go through the network at a time
    sink:    receives the result instead, which then is never held whole: sink(y, rows), rows (B, 3, n, scale * w) of
             the output from row y on, top to bottom; again from the top after the tile was halved
    Raises ValueError if tile <= 2 * overlap, MemoryError when the smallest tile does not fit either.
    """
    if overlap < 0 or 0 < tile <= 2 * overlap:
        raise ValueError(f"tile {tile} must be 0 (whole image) or more than twice the overlap {overlap}")
    tile = tile or max(lq.shape[2:])
    b, _, h, w = lq.shape
    sr = None if sink else torch.empty(b, 3, h * scale, w * scale, device=lq.device)
    while True:
        try:
            for y, rows in upscaled_rows(net, lq, scale, tile, overlap, batch):
                if sink:
                    sink(y, rows)
                else:
                    sr[:, :, y:y + rows.shape[2]] = rows
            return sr
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            tried, smallest = min(tile, max(lq.shape[2:])), 2 * overlap + 8
            tile = max(tried // 2, smallest)
            if tile >= tried:
                reason = " ".join(str(error).split())[:100]
                raise MemoryError(f"memory does not suffice for a tile of {tried} pixels ({reason})") from None
        # only here, where the exception no longer holds the tensors of the failed attempt
        torch.cuda.empty_cache()


def out_of_memory(error):
    """Does this exception of PyTorch mean that the memory of the GPU, or of the machine, does not suffice?"""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def upscaled_rows(net, lq, scale, tile, overlap, batch=1):
    """Yield (first row, rows of the output that no later tile changes), one row of tiles after the other."""
    b, _, h, w = lq.shape
    if max(h, w) <= tile:
        yield 0, net(lq).float()
        return
    spans, columns = tile_weights(h, tile, overlap, scale), tile_weights(w, tile, overlap, scale)
    # output rows to which the next row of tiles adds
    open_rows = torch.zeros(b, 3, 0, w * scale, device=lq.device)
    for (top, bottom, weight_y), following in zip(spans, [start for start, _, _ in spans[1:]] + [h]):
        strip = F.pad(open_rows, (0, 0, 0, (bottom - top) * scale - open_rows.shape[2]))
        for width in dict.fromkeys(right - left for left, right, _ in columns):
            same_width = [column for column in columns if column[1] - column[0] == width]
            for k in range(0, len(same_width), batch):
                together = same_width[k:k + batch]
                tiles = torch.cat([lq[:, :, top:bottom, left:right] for left, right, _ in together])
                for part, (left, right, weight_x) in zip(net(tiles).float().split(b), together):
                    strip[..., left * scale:right * scale] += part * (weight_y[:, None] * weight_x).to(lq.device)
        done = (following - top) * scale
        yield top * scale, strip[:, :, :done]
        open_rows = strip[:, :, done:]
