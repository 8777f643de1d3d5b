"""Frozen networks that others trained, through which self-supervision looks: perceptual distances, encoders of FAR.

    distance, hqi, encoder = open_frozen("cpu", "vgg", far_enc="clip")     what pretrain, finetune and probe need
    encoder = create_encoder("clip")                 (B, 3, H, W) RGB in [0, 1] -> (B, encoder.channels, H', W')

distance(a, b) -> (B,); distance(a, b, weight): the mean of weight times the map (see metrics.create_distances).
"""
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import archs
import iqa
import metrics
import runs

CLIP_URL = ("https://openaipublic.azureedge.net/clip/models/"
            "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt")


def open_frozen(device, distance, vgg_stages=5, far_enc=None, far_layer="layer1", vgg_weights=None, clip_weights=None,
                far_sr=None, precision="fp32"):
    """-> distance of L_rec, distance of HQI, established encoder of FAR (None without far_enc).

    distance, vgg_stages: see metrics.create_distances; far_enc, far_layer: see create_encoder. vgg_weights,
    clip_weights: files instead of downloads; far_sr: file or run folder of the x4 network of far_enc "sr".
    """
    def placed(net):
        return net.to(device, memory_format=archs.memory_format(net, precision))
    distances = metrics.create_distances(distance, vgg_weights, vgg_stages)
    if far_enc is None:
        return *map(placed, distances), None
    if far_enc == "sr" and far_sr is None:
        raise runs.UserError("--far-sr PATH is needed: FAR looks at the features of this network")
    sr = archs.load_x4(far_sr, "--far-sr")[0] if far_enc == "sr" else None
    encoder = create_encoder(far_enc, far_layer, vgg_weights, clip_weights, sr)
    return *map(placed, distances), placed(encoder)


def hashes_of(*nets):
    """Hashes of the networks that are looked through, so that both stages look through the same. None stays None."""
    return [None if net is None else iqa.tensors_hash(net) for net in nets]


def check_weights(settings, distance, hqi, encoder):
    """UserError unless pre-training looked through these networks. None: not looked through now."""
    names = ("--distance", "--distance", "FAR's encoder")
    for name, here, there in zip(names, hashes_of(distance, hqi, encoder), settings["looked_through"]):
        if here is not None and here != there:
            raise runs.UserError(f"{name}: other weights than pre-training had; name the same files as there "
                                 "(--vgg-weights, --clip-weights, --far-sr)")


# Established encoders of FAR: (B, 3, H, W) in [0, 1] -> features, frozen; .channels

class CLIPResNet(nn.Module):
    """Stem and first stages of CLIP's RN50 image encoder, with the public key names.

    layer: stem (64 channels, stride 4), layer1 (256, 4), layer2 (512, 8) or layer3 (1024, 16). PAPER: an internal
    feature of RN50, without saying which; CHOICE: layer1, whose receptive field is near E_img's.
    """

    CHANNELS = {"stem": 64, "layer1": 256, "layer2": 512, "layer3": 1024}

    def __init__(self, state, layer="layer1"):
        super().__init__()
        self.channels, self.stages = self.CHANNELS[layer], list(self.CHANNELS).index(layer)
        for k, (a, b) in enumerate(((3, 32), (32, 32), (32, 64)), 1):
            setattr(self, f"conv{k}", nn.Conv2d(a, b, 3, 2 if k == 1 else 1, 1, bias=False))
            setattr(self, f"bn{k}", nn.BatchNorm2d(b))
        planes = 64
        for k, blocks in enumerate((3, 4, 6)[:self.stages], 1):
            width = 64 * 2 ** (k - 1)
            first = Bottleneck(planes, width, 2 if k > 1 else 1)
            others = [Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{k}", nn.Sequential(first, *others))
            planes = 4 * width
        self.load_state_dict({k: state[k] for k in self.state_dict()})
        mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def train(self, mode=True):
        # the statistics of its batch norms are part of the established encoder
        return super().train(False)

    def forward(self, hr):
        x = (hr - self.mean) / self.std
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(bn(conv(x)))
        x = F.avg_pool2d(x, 2)
        for k in range(1, self.stages + 1):
            x = getattr(self, f"layer{k}")(x)
        return x


class Bottleneck(nn.Module):
    """CLIP's: strides are averages before the convolution."""

    def __init__(self, inside, planes, stride):
        super().__init__()
        self.stride = stride
        self.conv1, self.bn1 = nn.Conv2d(inside, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        if stride > 1 or inside != 4 * planes:
            shortcut = {"0": nn.Conv2d(inside, 4 * planes, 1, bias=False), "1": nn.BatchNorm2d(4 * planes)}
            self.downsample = nn.ModuleDict(shortcut)

    def shrink(self, x):
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x

    def forward(self, x):
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(self.shrink(y)))
        if hasattr(self, "downsample"):
            x = self.downsample["1"](self.downsample["0"](self.shrink(x)))
        return F.relu(y + x)


def clip_state(path=None):
    """State dict of CLIP's RN50 image encoder.

    path: OpenAI's RN50.pt (a TorchScript archive), or a plain state dict with or without "visual."; None: a download.
    """
    given = path is not None
    path = Path(path) if given else Path(torch.hub.get_dir()) / "clip" / "RN50.pt"
    if given and not path.is_file():
        raise runs.UserError(f"--clip-weights {path}: no such file")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(CLIP_URL, str(path), hash_prefix=CLIP_URL.split("/")[-2], progress=True)
        except (OSError, RuntimeError) as error:
            raise runs.UserError(
                f"--far-enc clip: RN50.pt is not here and could not be fetched ({' '.join(str(error).split())[:80]}): "
                f"save {CLIP_URL} as {path} ({runs.how_to_get(path)}), name a copy with --clip-weights "
                "FILE, take another encoder in pre-training (--far-enc vgg), or finetune --no-far") from None
    try:
        state = torch.jit.load(str(path), map_location="cpu").state_dict()
    except (RuntimeError, ValueError):
        # no TorchScript archive
        state = archs.read_weights(path)[0]
    state = {k.removeprefix("visual."): v.float() for k, v in state.items()
             if v.is_floating_point() or v.dtype == torch.long}
    if "layer1.0.downsample.0.weight" not in state or "bn3.weight" not in state:
        raise runs.UserError(f"{path}: not CLIP's RN50 image encoder (first keys: {', '.join(list(state)[:3])})")
    return state


class VGGFeatures(nn.Module):
    """VGG19's features after the second ReLU of the second stage, relu2_2: 128 channels, stride 2.

    Table 3's VGG; which layer is a CHOICE.
    """

    channels = 128

    def __init__(self, weights=None):
        super().__init__()
        vgg = metrics.open_vgg(weights, "take another encoder in pre-training (--far-enc rand), or finetune --no-far")
        self.features, self.mean, self.std = vgg.features[:9], vgg.mean, vgg.std

    def forward(self, hr):
        return self.features((hr - self.mean.to(hr)) / self.std.to(hr))


class SRFeatures(nn.Module):
    """Features of the HR image in a x4 super-resolution network: the output of its body, before its tail.

    Stands for EDSR in Table 3.
    """

    def __init__(self, net):
        super().__init__()
        self.net, self.output = net, None
        layer = getattr(net, "conv_after_body", None) or getattr(net, "conv_body", None) or net.body[-2]
        first = layer if isinstance(layer, nn.Conv2d) else next(m for m in layer.modules() if hasattr(m, "weight"))
        self.channels = first.weight.shape[0]
        layer.register_forward_hook(self._keep)

    def _keep(self, module, inputs, output):
        self.output = output
        raise _EnoughError

    def forward(self, hr):
        try:
            self.net(hr)
        except _EnoughError:
            output, self.output = self.output, None
            return output


class _EnoughError(Exception):
    """The features are there: the rest of the network need not run."""


class RandomFeatures(nn.Module):
    """Frozen random convolutions, 32 channels, stride 4: for tests."""

    channels = 32

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU())

    def forward(self, hr):
        return self.layers(hr)


def create_encoder(name, layer="layer1", vgg_weights=None, clip_weights=None, sr=None):
    """One of clip (its `layer`), vgg, sr (of the network `sr`), rand.

    Frozen and in eval mode; gradients pass through to the image.
    """
    if name == "clip":
        encoder = CLIPResNet(clip_state(clip_weights), layer)
    elif name == "vgg":
        encoder = VGGFeatures(vgg_weights)
    else:
        encoder = SRFeatures(sr) if name == "sr" else RandomFeatures()
    return encoder.eval().requires_grad_(False)
