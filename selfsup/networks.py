"""Reconstruct a low-resolution image from a high-resolution one: the criterion of self-supervised adaptation.

    net = Reconstruction()                                   encoders and reconstructor; image_encoder=False: LWay's
    lq_again, far = net(lq, hr, s, e_clip)                   Eq. 4 and the feature-alignment regulariser, Eq. 9-11

"High-Resolution Be Aware! Improving the Self-Supervised Real-World Super-Resolution" (Zhang and Yao, arXiv 2411.16175)
and "Low-Res Leads the Way" (LWay, CVPR 2024). Neither has released code, and the first paper's supplement, which has
the sizes and the weights of the losses, is not public. Each number here therefore names its source: PAPER (the first
paper), LWAY (README and answers of its author), INFERRED, or CHOICE (ours).

lq is (B, 3, h, w), hr (B, 3, 4h, 4w), RGB in [0, 1]; nothing here knows how the networks are trained. The
super-resolution network that is adapted lies outside: gradients reach it through `hr`.
"""
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import archs
import degradations
import runs

# CHOICE: FAR needs a T that predicts at least this share of the energy of descriptors, see selfsup.pretrain.explained
EXPLAINED = 0.5
# CHOICE, not published: weight of the perceptual part of L_rec, beside L1 of weight 1
PERCEP = 1.0


def lrelu(x):
    return F.leaky_relu(x, 0.1)


# Networks

class DegradationEncoder(nn.Module):
    """E_deg: (B, 3, h, w) -> (B, dim), how this image was degraded.

    PAPER: 16 residual blocks, 512 numbers; CHOICE: the rest.
    He's initialisation, so that embeddings differ more between images: after 600 steps by 0.20 and 0.25 of their size,
    by 0.03 and 0.18 with PyTorch's. PSNR did not tell the two apart, and R used neither yet (two seeds;
    results/selfsup-choices.json, python -m experiments.selfsup_choices).
    """

    def __init__(self, width=64, blocks=16, dim=512):
        super().__init__()
        self.first = archs.conv3x3(3, width)
        self.blocks = nn.Sequential(*[archs.ResidualBlock(width) for _ in range(blocks)])
        self.down = nn.ModuleList(nn.Conv2d(width * n, width * 2 * n, 4, 2, 1) for n in (1, 2, 4))
        self.head = nn.ModuleList(nn.Linear(n, dim) for n in (width * 8, dim, dim))
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, a=0.1)
                nn.init.zeros_(layer.bias)
            if isinstance(layer, archs.ResidualBlock):
                layer.conv2.weight.data *= 0.3

    def forward(self, lq):
        x = self.blocks(lrelu(self.first(lq)))
        for conv in self.down:
            x = lrelu(conv(x))
        x = x.mean((2, 3))
        for layer in self.head[:-1]:
            x = lrelu(layer(x))
        return self.head[-1](x)


class BandEncoder(nn.Module):
    """E_deg for short pre-training: (B, 3, h, w) -> (B, dim). CHOICE, in neither paper.

    Its inputs are the logarithms of the strengths of first and second differences of the grey image at three scales:
    twelve numbers that tell blur and noise and need not be learned. Its embeddings differ by 0.71 and 0.95 of their
    size where the convolutional encoder's differ by 0.2 (600 steps, two seeds; results/selfsup-choices.json). After
    2,000 steps R loses 0.9 to 1.2 dB when it gets other images' embeddings (docs/results-selfsup.md).
    """

    def __init__(self, dim=512, width=128):
        super().__init__()
        self.head = nn.ModuleList(nn.Linear(a, b) for a, b in ((12, width), (width, width), (width, dim)))

    def forward(self, lq):
        x, strengths = lq.float().mean(1, keepdim=True), []
        for _ in range(3):
            down, right = x.diff(dim=2), x.diff(dim=3)
            differences = (down, right, down.diff(dim=2), right.diff(dim=3))
            strengths += [(d.square().mean((1, 2, 3)) + 1e-6).log() for d in differences]
            x = F.avg_pool2d(x, 2)
        # about zero mean and unit variance for photographs
        x = (torch.stack(strengths, 1) + 6) / 2
        for layer in self.head[:-1]:
            x = lrelu(layer(x))
        return self.head[-1](x)


class ImageEncoder(nn.Module):
    """E_img: (B, 3, H, W) -> (B, width, H, W). PAPER: six residual blocks of 64 channels that keep the resolution."""

    def __init__(self, width=64, blocks=6):
        super().__init__()
        self.first = archs.conv3x3(3, width)
        self.blocks = nn.Sequential(*[archs.ResidualBlock(width) for _ in range(blocks)])

    def forward(self, hr):
        return self.blocks(lrelu(self.first(hr)))


class ModulatedConv(nn.Module):
    """3x3 convolution with input channels scaled by a style and output channels brought to unit weight (StyleGAN2).

    x (B, C, h, w), z (B, dim) -> (B, C, h, w). Scaling input and output equals scaling the kernel of every sample, and
    needs one convolution for all of them: a sample's result does not depend on the others.
    """

    def __init__(self, width, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, 3, 3) / (3 * width ** 0.5))
        self.bias = nn.Parameter(torch.zeros(width))
        self.style = nn.Linear(dim, width)
        # StyleGAN2: an embedding of zero changes nothing
        nn.init.ones_(self.style.bias)

    def forward(self, x, z):
        style = self.style(z)                                                     # (B, C)
        norm = (self.weight.square().sum((2, 3)) @ style.square().mT + 1e-8).rsqrt().mT    # (B, C) of the output
        y = F.conv2d(x * style[:, :, None, None], self.weight, padding=1)
        return y * norm[:, :, None, None] + self.bias[:, None, None]


class ModulatedBlock(nn.Module):
    """Residual block, modulated convolution, noise of learned strength, convolution."""

    def __init__(self, width, dim):
        super().__init__()
        self.residual, self.modulated = archs.ResidualBlock(width), ModulatedConv(width, dim)
        self.conv = archs.conv3x3(width, width)
        self.noise = nn.Parameter(torch.zeros(width, 1, 1))

    def forward(self, x, z, noise):
        x = self.modulated(self.residual(x), z)
        if noise is not None:
            x = x + self.noise * noise
        return lrelu(self.conv(x))


class Reconstructor(nn.Module):
    """R: image features (B, channels, 4h, 4w) and embedding (B, dim) -> (B, 3, h, w), without the skip of Eq. 4's X^.

    PAPER: SRResNet and StyleGAN2 combined; CHOICE: the rest.
    Where the factor of four goes is not published: here two convolutions of stride 2 come first. The blocks are
    bridged as SRResNet's are, or R learns more slowly: after 600 steps it reaches 3.1 and 3.4 dB less (two seeds;
    results/selfsup-choices.json). noise: (B, blocks, h, w) normal, or None for none.
    """

    def __init__(self, channels=64, width=64, blocks=4, dim=512):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(channels, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)])
        self.blocks = nn.ModuleList(ModulatedBlock(width, dim) for _ in range(blocks))
        self.last = nn.ModuleList([archs.conv3x3(width, width), archs.conv3x3(width, 3)])

    def forward(self, features, z, noise=None):
        x = features
        for conv in self.down:
            x = lrelu(conv(x))
        y = x
        for k, block in enumerate(self.blocks):
            y = block(y, z, None if noise is None else noise[:, k:k + 1])
        return self.last[1](lrelu(self.last[0](x + y)))


class Reconstruction(nn.Module):
    """E_deg, E_img, R, and the two linear layers of FAR: all that pre-training learns (Eq. 4, 11).

    width: channels of all three networks; blocks: residual blocks of E_deg, E_img and R; dim: length of the embedding;
    image_encoder=False: R sees the HR image itself (LWAY). bands: BandEncoder for E_deg.
    far_channels: channels of the established encoder's features, 0 for no FAR.
    skip: the reconstruction is the mean of every 4 x 4 pixels of the HR image plus what R adds beyond its own mean over
    the image (CHOICE). Its mean colours are those of the HR image, as blur, down-sampling, noise and JPEG keep them;
    without the skip R's own are a little off, and the adapted network's colours drift. Neither paper has it; files of
    earlier commits are without.
    """

    def __init__(self, width=64, blocks=(16, 6, 4), dim=512, image_encoder=True, far_channels=0, bands=False,
                 skip=True):
        super().__init__()
        if far_channels and not image_encoder:
            raise ValueError("FAR aligns the image encoder's features, and LWay has none")
        self.dim, self.noise_maps, self.skip = dim, blocks[2], skip
        self.e_deg = BandEncoder(dim) if bands else DegradationEncoder(width, blocks[0], dim)
        self.e_img = ImageEncoder(width, blocks[1]) if image_encoder else nn.Identity()
        self.r = Reconstructor(width if image_encoder else 3, width, blocks[2], dim)
        if skip:
            self.r.last[1].weight.data *= 0.1
            nn.init.zeros_(self.r.last[1].bias)
        if far_channels:
            self.t_a, self.t_m = nn.Linear(width, far_channels), nn.Linear(width, far_channels)

    def forward(self, lq, hr, s, e_clip=None, noise=None, shuffle=False, offdiag=False, path="both"):
        """-> (reconstruction of lq (B, 3, h, w), FAR of hr (B,), or None without e_clip).

        s: controller, (B, dim) or a number; e_clip: the established encoder's features of hr (B, C, H', W')
        noise: (B, blocks, h, w) for R, or None
        shuffle: embeddings of the neighbours in the batch instead, to see whether they matter
        offdiag: see descriptors
        path: where FAR's gradient may go to hr, "im" (the image encoder), "cl" (the established one) or "both"
        """
        e_d, e_im = self.e_deg(lq), self.e_img(hr)
        lq_again = self.r(e_im, s * (e_d.roll(1, 0) if shuffle else e_d), noise)
        if self.skip:
            lq_again = lq_again.float()
            lq_again = F.avg_pool2d(hr.float(), 4) + lq_again - lq_again.mean((2, 3), keepdim=True)
        if e_clip is None:
            return lq_again, None
        e_im, e_clip = e_im.detach() if path == "cl" else e_im, e_clip.detach() if path == "im" else e_clip
        pairs = self.aligned(e_im, e_clip, offdiag)
        return lq_again, sum(length(ours - established) for ours, established in pairs)

    def aligned(self, e_im, e_clip, offdiag=False):
        """[(what T makes of a descriptor of the image encoder, that of the established encoder)], (B, C) each: S_avg,
        then S_max."""
        both = zip((self.t_a, self.t_m), descriptors(e_im, offdiag), descriptors(e_clip, offdiag))
        with torch.autocast(e_im.device.type, enabled=False):
            return [(layer(ours), established) for layer, ours, established in both]


def descriptors(features, offdiag=False):
    """S_avg and S_max of Eq. 10: mean and maximum of each row of the Gram matrix of (B, C, H, W) -> two (B, C).

    The Gram matrix is divided by H W, so that the size of an image does not matter (CHOICE). offdiag: without a
    channel's correlation with itself, as the text has it ("to others"); the formula has it in.
    """
    with torch.autocast(features.device.type, enabled=False):
        f = features.float().flatten(2)
        gram = f @ f.mT / f.shape[2]                                              # (B, C, C)
        if not offdiag:
            return gram.mean(2), gram.amax(2)
        diagonal = torch.eye(gram.shape[1], dtype=torch.bool, device=gram.device)
        others = gram.masked_fill(diagonal, 0)
        return others.sum(2) / (gram.shape[1] - 1), gram.masked_fill(diagonal, -torch.inf).amax(2)


def length(x):
    """Euclidean length of (B, C), with a gradient at zero too."""
    return (x.square().sum(1) + 1e-8).sqrt()


# Controller (Eq. 7, 8)

def hqi_distance(distance, lq, hr):
    """d = 1 - HQI (Eq. 7): the distance of hr to bicubically enlarged lq, in [0, 1] -> (B,).

    No gradient (CHOICE: a controller, not a loss). The name HQI misleads: the indicator is high where hr still looks
    like the low-resolution image, so where super-resolution did little.
    """
    with torch.no_grad():
        enlarged = F.interpolate(lq, scale_factor=4, mode="bicubic").clamp(0, 1)
        return distance(enlarged, hr.detach().clamp(0, 1)).clamp(0, 1)


def controller(rule, d, noise=0.0, pretrain=False, shift=(0.0, 0.0)):
    """s of Eq. 8, (B, dim) or 1. d: hqi_distance (B,), noise: n of Eq. 8, (B, dim) or 0.

    Pre-training sees true HR images: far from the LR image means much degradation, s = n + d. Fine-tuning, "eq8": near
    means that the network did little, s = n + 1 - d. R then degrades more, so that the network need not degrade.
    "flip": n + d there too (Table 4, row 1). "one": no controller. "shifted" (ours): n + s0 + d0 - d with shift = (s0,
    d0), the mean of s in pre-training and of d before tuning, so that both stages begin alike.
    """
    if rule == "one":
        return 1.0
    s = d if pretrain or rule == "flip" else 1 - d if rule == "eq8" else shift[0] + shift[1] - d
    return noise + s[:, None]


def embedding_noise(net, seeds, std, device):
    """n of Eq. 8, (B, dim) normal of standard deviation `std`, one seed per sample."""
    return std * torch.stack([degradations.normal_field((net.dim,), seed, device) for seed in seeds])


def noise_maps(net, seeds, size, device):
    """(B, blocks, h, w) normal for Reconstructor, one seed per sample."""
    return torch.stack([degradations.normal_field((net.noise_maps, *size), seed, device) for seed in seeds])


# Reconstruction loss

def high_frequency_map(lq):
    """W of LWay's loss, (B, 1, h, w) in [0, 1]: the length of the three detail bands of a wavelet transform.

    Zero for a flat image. CHOICE: Haar, one level, of the luma, stretched to [0, 1] per image, each value for its 2x2
    pixels. Odd sides are reflected.
    """
    with torch.no_grad():
        h, w = lq.shape[2:]
        y = (lq * lq.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        y = archs.pad_reflect(y, h % 2, w % 2)
        a, b, c, d = y[..., ::2, ::2], y[..., ::2, 1::2], y[..., 1::2, ::2], y[..., 1::2, 1::2]
        bands = ((a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2)
        detail = sum(band.square() for band in bands).sqrt()
        low, high = detail.amin((2, 3), keepdim=True), detail.amax((2, 3), keepdim=True)
        detail = (detail - low) / (high - low).clamp_min(1e-6)
        return detail.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :h, :w]


def reconstruction_loss(distance, lq_again, lq, weight=None):
    """The parts of L_rec, {"l1", "percep"} of (B,): L1 and the perceptual distance (LWAY).

    weight: W (B, 1, h, w), by which both are weighted, or None.
    """
    difference = (lq_again - lq).abs()
    l1 = (difference if weight is None else difference * weight).mean((1, 2, 3))
    return {"l1": l1, "percep": distance(lq_again, lq, weight)}


# Files

# of pre-training, which fine-tuning and the probes follow
SETTINGS = ("sizes", "s_rule", "far_enc", "far_layer", "offdiag", "distance", "vgg_stages", "degradation", "patch",
            "load_size", "n_std", "mean_d", "lambda_pt", "looked_through")


# of later commits: what stands for it in files of before
LATER = {"held_out": None}


def weaknesses(held_out, far):
    """[reason] why R, or FAR, would teach nothing. held_out: pre-training's last check, None where it is unknown."""
    bars = {"psnr_bicubic": "it reconstructs no better than bicubic down-sampling",
            "psnr_shuffled": "it does as well with the embeddings of other images, so it does not look at them"}
    if not held_out:
        return []
    reasons = [f"{text} ({held_out['psnr']:.2f} against {held_out[bar]:.2f} dB on held-out photographs)"
               for bar, text in bars.items() if not held_out["psnr"] > held_out[bar]]
    if far and held_out["explained"] < EXPLAINED:
        reasons.append(f"its T predicts {held_out['explained']:.0%} of the descriptors' energy, so FAR says little of "
                       "an image (--no-far does without)")
    return reasons


def load_reconstruction(path):
    """A run folder of selfsup.pretrain, or its rec.pth -> (Reconstruction, its settings).

    The EMA weights, frozen and in eval mode.
    """
    file = Path(path) / "weights" / "rec.pth" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise runs.UserError(f"--rec {path}: no reconstruction network there; make it with: "
                             "python -m selfsup.pretrain --hr PHOTOS")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        settings = {name: content["settings"][name] for name in SETTINGS}
        settings |= {name: content["settings"].get(name, value) for name, value in LATER.items()}
        net = Reconstruction(**{"skip": False} | settings["sizes"])
        net.load_state_dict(content["params_ema"])
    except archs.TORCH_DAMAGE as error:
        raise runs.UserError(f"--rec {file}: not a reconstruction network as selfsup.pretrain leaves it "
                             f"({type(error).__name__}: {' '.join(str(error).split())[:160]})") from None
    return net.eval().requires_grad_(False), settings
