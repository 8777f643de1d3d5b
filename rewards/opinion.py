"""NR-IQA models that learn from people's opinions: rewards.train_opinion makes them, `--reward FILE.pth` uses them.

    python -m rewards.train_opinion --mos labels.csv --mos-images PHOTOS --out runs/rewards/clive.pth
    python train.py --reward runs/rewards/clive.pth

A reward file is {"reward": how it was made, "params": state dict}. The first part names the architecture, what it
was trained on, seed, commit and scores.
"""
import json
import math

import torch
import torch.nn.functional as F
from torch import nn

import archs
import losses
import runs
from rewards.ranker import Ranker

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# the edge of smaller images is repeated up to this size: MobileNetV2 reduces by 32
SMALLEST = 32
# CHOICE: larger images are scored in tiles of this side, pixels, which overlap by half: the middle counts more, as in
# the mean of random crops by which quality models are usually tested
TILE = 256


class MobileNetV2(nn.Module):
    """torchvision's MobileNetV2 1.0 (Sandler et al., CVPR 2018), every batch norm folded into its convolution.

    (B, 3, H, W), ImageNet-normalised -> five maps: outputs of the inverted residuals 1, 3, 6, 13 (strides 4, 8, 16, 32:
    24, 32, 64, 160 channels) and of the last layer (1,280). A folded network trains with batches of any kind.
    """

    TAPS = {2: 24, 4: 32, 7: 64, 14: 160, 18: 1280}
    # CHOICE: so many layers, to stride 8, stay as they are in a plain training: half of its time
    FIRST = 5

    def __init__(self):
        super().__init__()
        from torchvision.models import mobilenet_v2
        self.layers = fold_batch_norms(mobilenet_v2(weights=None).features.eval())

    def forward(self, x):
        maps = []
        for k, layer in enumerate(self.layers):
            x = layer(x)
            if k in self.TAPS:
                maps.append(x)
        return maps

    def load_imagenet(self, file=None):
        """Take ImageNet weights: those of a file with torchvision's keys, else torchvision's download."""
        from torchvision.models import MobileNet_V2_Weights, mobilenet_v2
        state = archs.read_weights(file)[0] if file else losses.torchvision_weights(
            MobileNet_V2_Weights.IMAGENET1K_V2, "MobileNetV2", "--backbone FILE")
        net = mobilenet_v2(weights=None).features.eval()
        state = {key.removeprefix("features."): value for key, value in state.items() if "classifier" not in key}
        archs.load_strict(net, state, file or "the downloaded mobilenet_v2")
        self.layers = fold_batch_norms(net)


class VGG19(nn.Module):
    """The convolutions of torchvision's vgg19: (B, 3, H, W), ImageNet-normalised -> the last ReLU of each block."""

    TAPS = {3: 64, 8: 128, 17: 256, 26: 512, 35: 512}
    FIRST = 10

    def __init__(self):
        super().__init__()
        from torchvision.models import vgg
        self.layers = vgg.make_layers(vgg.cfgs["E"])[:36]

    forward = MobileNetV2.forward

    def load_imagenet(self, file=None):
        # reads, checks and downloads
        loss = losses.VGGFeatureLoss(file, "--backbone FILE")
        self.layers.load_state_dict(loss.features.state_dict())


def fold_batch_norms(net):
    """Every convolution with the batch norm that follows it as one convolution, in place. net in eval mode."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval
    for module in net.modules():
        children = list(module.named_children())
        for (name, conv), (next_name, norm) in zip(children, children[1:]):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, next_name, nn.Identity())
    return net


def tiles(x):
    """Views of (B, 3, H, W) that cover it: whole sides below 1.5 TILE pixels, else parts of TILE, half overlapping."""
    def starts(size):
        count = math.ceil(2 * size / TILE) - 1 if size >= 1.5 * TILE else 1
        return [round(k * (size - TILE) / (count - 1)) for k in range(count)] if count > 1 else [0]
    h, w = (TILE if size >= 1.5 * TILE else size for size in x.shape[2:])
    return [x[..., top:top + h, left:left + w] for top in starts(x.shape[2]) for left in starts(x.shape[3])]


class DeepRegressor(nn.Module):
    """Quality from pooled features of an ImageNet network: (B, 3, H, W) RGB in [0, 1] -> (B,), higher is better.

    Every map of the backbone is described by the mean and the standard deviation of each channel, at any image size.
    The score is linear in these standardised features, plus a small MLP, in the units of the opinions (0 to 100). It
    has no bounds, so its gradient never vanishes. The edge of images with sides below 32 pixels is repeated; those of
    384 pixels or more have the mean score of tiles of 256 that overlap by half.
    """

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        count = 2 * sum(backbone.TAPS.values())
        self.linear = nn.Linear(count, 1)
        self.mlp = nn.Sequential(nn.Linear(count, 64), nn.SiLU(), nn.Linear(64, 1))
        for zero in (self.linear, self.mlp[2]):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("centre", torch.zeros(count))
        self.register_buffer("spread", torch.ones(count))
        self.register_buffer("shift", torch.tensor(50.0))
        self.register_buffer("stretch", torch.tensor(20.0))

    def features(self, x):
        """(B, 3, H, W) -> (B, F) float32: mean and standard deviation of every channel of every map."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"a quality model wants (B, 3, H, W) RGB, got {tuple(x.shape)}")
        h, w = (max(SMALLEST - size, 0) for size in x.shape[2:])
        x = F.pad(x, (0, w, 0, h), mode="replicate")
        pooled = []
        for maps in self.backbone((x - self.mean) / self.std):
            maps = maps.float()
            mean = maps.mean((2, 3))
            # the floor: a square root of 0 has no gradient
            pooled += [mean, ((maps - mean[:, :, None, None]).square().mean((2, 3)) + 1e-6).sqrt()]
        return torch.cat(pooled, 1)

    def described(self, x):
        """(T, B, F): the standardised features of the tiles of (B, 3, H, W)."""
        return torch.stack([(self.features(tile) - self.centre) / self.spread for tile in tiles(x)])

    def forward(self, x):
        return self.head(self.described(x))

    def head(self, z):
        """(T, B, F) -> (B,) scores, the means over the tiles."""
        with torch.autocast(z.device.type, enabled=False):
            return self.shift + self.stretch * (self.linear(z) + self.mlp(z))[..., 0].mean(0)

    def standardise(self, features):
        """Have features like these (N, F) centred, each with standard deviation 1, for the head."""
        self.centre.copy_(features.mean(0))
        self.spread.copy_(features.std(0).clamp_min(1e-4))

    def start_linear(self, features, quality):
        """Begin with ridge regression of quality (N,), 0 to 100, on features (N, F) of the backbone as it is.

        The penalty is that of the least generalised cross-validation error (Golub, Heath and Wahba, 1979).
        """
        self.standardise(features)
        z = ((features - self.centre.cpu()) / self.spread.cpu()).double()
        mean = quality.mean()
        target = ((quality - mean) / self.stretch.item()).double()
        values, vectors = torch.linalg.eigh(z @ z.T)
        projected, best = vectors.T @ target, (math.inf, None)
        for penalty in torch.logspace(-3, 3, 25).double() * z.shape[1]:
            left = penalty / (values.clamp_min(0) + penalty)
            error = ((left * projected).square().mean() / left.mean().square()).item()
            best = min(best, (error, penalty.item()))
        weight = z.T @ (vectors @ (projected / (values.clamp_min(0) + best[1])))
        self.shift.copy_(mean)
        with torch.no_grad():
            self.linear.weight.copy_(weight.float()[None])


ARCHITECTURES = {"mobilenet_v2": lambda: DeepRegressor(MobileNetV2()), "vgg19": lambda: DeepRegressor(VGG19()),
                 "ranker": Ranker}


def save(path, net, record):
    """Write a reward file. record: plain values, among them "arch", the name in ARCHITECTURES."""
    # plain types: torch's version is a class of its own, which weights_only refuses
    record = json.loads(json.dumps(record))
    params = {key: value.detach().cpu().float().contiguous() for key, value in net.state_dict().items()}
    runs.write_atomic(path, lambda temporary: torch.save({"reward": record, "params": params}, temporary))


def load(path):
    """A reward file of rewards.train_opinion -> (frozen model on the CPU, its record). UserError for any other file."""
    content = archs.read_file(path)
    record = content.get("reward") if isinstance(content, dict) else None
    arch = record.get("arch") if isinstance(record, dict) else None
    if arch not in ARCHITECTURES or not isinstance(content.get("params"), dict):
        raise runs.UserError(f"{path}: not a reward file (no architecture of {', '.join(ARCHITECTURES)} in it); "
                             "make one with: python -m rewards.train_opinion")
    net = ARCHITECTURES[arch]()
    archs.load_strict(net, content["params"], path)
    return net.eval().requires_grad_(False), record
