"""MUSIQ on square crops, equal to pyiqa's and faster. AMO scores with it at every step, fine-tuning differentiates it.

    fused = FusedMUSIQ.from_pyiqa(pyiqa.create_metric("musiq").net)              (B, 3, S, S) RGB in [0, 1] -> (B,)

The network of Ke et al., "MUSIQ: Multi-scale Image Quality Transformer", ICCV 2021: the image at several sizes is cut
into patches; a ResNet's first layers and a linear layer make a token of each; embeddings say where in the image and at
which scale it lies; a transformer's class token becomes the score. pyiqa's MUSIQ stays the reference: its weights are
loaded, the tests compare both. This file needs no pyiqa, and `--reward rewards.musiq:untrained` (or :untrained_bf16)
measures MUSIQ's times where there are no weights.

Speed on five 256 x 256 crops, random weights, CPU x86_64 (AMD EPYC, shared with other jobs), 1 thread, torch 2.15,
commit a7065ea. Milliseconds of wall time and speed-up, medians and range of n = 10 alternating runs; the ranges are
wide because the machine was busy:
                        pyiqa    fused                     bf16
    forward              2132     1153  x1.79 (1.67-2.52)    637  x3.08 (2.91-4.91)
    forward + backward   4367     3138  x1.38 (0.49-1.87)   1624  x2.66 (1.31-4.11)
By the processor time of the same runs: forward x1.69 (1.66-2.05) and x3.11, forward + backward x1.38 (0.94-1.74) and
x2.64. Parts of a forward pass (processor time, ms, n = 5): resize and patches 32 -> 23; convolutions 882 -> 261;
embedding 170 -> 169; transformer 754 -> 657. In fp32 the matrix products are the same as pyiqa's (in bf16: embedding
42, transformer 260). The gain comes from PATCHES: 1,285 patches at once are maps of 84 MB, a few dozen at a time stay
in the cache. channels_last makes a forward pass in fp32 6 % faster (processor time, n = 16). On a GPU: docs/speed.md.
Left out: query, key and value in one product (no faster, n = 5); channels_last in bf16 (1.7 times slower, n = 4) and
with gradients (no clear gain, n = 4, and gradients that differ from pyiqa's as below).
After commit 0e710d5 the layers became this file's own. Scores and gradients stayed the same bit by bit (224 x 224, fp32
and bf16, head of one class), and nothing got slower: forward in fp32 by processor time, on another busy EPYC, torch
2.14, n = 5 alternating runs: x1.54 (1.45-1.84) as fast as pyiqa's; that commit x1.44 (1.35-1.59).

Gradients: pyiqa's own in fp32 is 2e-3 (relative, random pixels) from its own in float64, because rounding decides ReLUs
and maxima near a tie. The one here differs from pyiqa's by 1.6e-6 where convolutions round alike (NCHW, this CPU), by
1e-14 in float64.
"""
import math
import re

import torch
import torch.nn.functional as F
from torch import nn

# of the paper's network: pixels of a patch's side, width of a token, heads, cells of the position grid's side, scales
PATCH, WIDTH, HEADS, GRID, SCALES = 32, 384, 6, 10, 3
# so many patches, at most, go through the convolutions at a time on a CPU
PATCHES = 32
# so many image sizes have their embeddings kept
SIZES = 8


class FusedMUSIQ(nn.Module):
    """Frozen MUSIQ for batches of square images: (B, 3, S, S) RGB in [0, 1] -> (B,) float32, higher is better.

    Scores have the units of the head: `classes` 1 gives the score itself, 10 a distribution over 1 to 10 (AVA), whose
    mean is the score.
    A square image is resized to L x L for every L of `lengths` and cut into ceil(L / 32)^2 patches, exactly the number
    that pyiqa pads to. `original` is pyiqa's max_seq_len_from_original_res: -1 takes all patches of the image at its
    own size as well, None takes none, a number wants exactly that many. So pyiqa's mask of patches is all ones, also
    where S is no multiple of 32, since pixels are padded then. Differentiable with respect to the pixels; always in
    eval mode.
    bf16: matrix products and convolutions in bfloat16 (autocast); input, resize, residuals, norms, head and output stay
    float32.
    Raises ValueError for another shape, or where pyiqa would mask or cut patches of this S: use pyiqa's model there.
    """

    def __init__(self, classes=1, layers=14, lengths=(224, 384), original=-1, bf16=False):
        super().__init__()
        self.lengths, self.original, self.bf16 = sorted(lengths), original, bf16
        self.conv_root, self.gn_root = nn.Conv2d(3, 64, 7, stride=2, bias=False), nn.GroupNorm(32, 64, eps=1e-6)
        self.conv1, self.gn1 = nn.Conv2d(64, 64, 1, bias=False), nn.GroupNorm(32, 64, eps=1e-4)
        self.conv2, self.gn2 = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.GroupNorm(32, 64, eps=1e-4)
        self.conv3, self.gn3 = nn.Conv2d(64, 256, 1, bias=False), nn.GroupNorm(32, 256, eps=1e-4)
        self.conv_proj, self.gn_proj = nn.Conv2d(64, 256, 1, bias=False), nn.GroupNorm(32, 256, eps=1e-4)
        self.embedding = nn.Linear(256 * (PATCH // 4) ** 2, WIDTH)
        self.position_emb = nn.Parameter(torch.zeros(1, GRID * GRID, WIDTH))
        self.scale_emb = nn.Parameter(torch.zeros(SCALES, WIDTH))
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.encoder_norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, classes)
        self.register_buffer("ratings", torch.arange(1.0, classes + 1), persistent=False)
        self.requires_grad_(False)
        self.eval()
        # (S, device, dtype) -> (1, 1 + tokens, WIDTH)
        self._embeddings = {}

    @classmethod
    def from_pyiqa(cls, net, bf16=False):
        """From a pyiqa MUSIQ with any head, which is left alone; the weights are those of this moment."""
        from pyiqa.archs.musiq_arch import MUSIQ
        if not isinstance(net, MUSIQ):
            raise ValueError(f"FusedMUSIQ is made from pyiqa's MUSIQ, the .net of its metric; got {type(net).__name__}")
        nested = r"block1\.|transformer_encoder\.|posembed_input\.|scaleembed_input\.|attention\.|mlp\.|(?<=head\.)0\."
        weights = {re.sub(nested, "", name).replace("transformer.encoderblock_", "blocks."): w
                   for name, w in net.state_dict().items()}
        options, encoder = net.data_preprocess_opts, net.transformer_encoder
        if not encoder.use_scale_emb:
            weights["scale_emb"] = torch.zeros_like(weights["scale_emb"])
        heads = {block.attention.num_heads for block in encoder.transformer.values()}
        own = cls(len(weights["head.bias"]), len(encoder.transformer), options["longer_side_lengths"],
                  options["max_seq_len_from_original_res"], bf16)
        shapes = {name: w.shape for name, w in own.state_dict().items()}
        if heads - {HEADS} or shapes != {name: w.shape for name, w in weights.items()}:
            raise ValueError("FusedMUSIQ has the paper's widths, heads and scales, this network has others: use "
                             "pyiqa's MUSIQ")
        return own.load(weights)

    def load(self, weights):
        """{name: tensor} of this module's parameters -> self, with their dtype and on their device.

        Filters are standardised, once and not at every call: mean 0 and standard deviation 1.
        """
        def standardised(w):
            w = w - w.mean((1, 2, 3), keepdim=True)
            return w / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        self.to(weights["cls"])
        self.load_state_dict({name: standardised(w) if w.ndim == 4 else w for name, w in weights.items()})
        if self.bf16:
            # autocast would cast frozen weights again at every call
            for module in self.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)) and module is not self.head:
                    module.bfloat16()
        return self

    def compile_blocks(self):
        """Compile, in place, the convolutions and the transformer's blocks."""
        self.features = torch.compile(self.features)
        for block in self.blocks:
            block.compile()

    def train(self, mode=True):
        return super().train(False)

    def forward(self, x):
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] != x.shape[3]:
            raise ValueError(f"FusedMUSIQ wants square (B, 3, S, S) RGB, got {tuple(x.shape)}: use pyiqa's MUSIQ")
        with torch.autocast(x.device.type, enabled=False):
            embeddings = self.embeddings(x.shape[2], x.device)
            patches = self.patches((x.to(self.cls.dtype) - 0.5) * 2).flatten(0, 1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            parts = patches.tensor_split(math.ceil(len(patches) / PATCHES) if x.device.type == "cpu" else 1)
            tokens = self.embedding(torch.cat([self.features(part) for part in parts]))
            tokens = tokens.view(len(x), -1, WIDTH).to(self.cls.dtype)
            tokens = torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1) + embeddings
            for block in self.blocks[:-1]:
                tokens = block(tokens)
            # the head reads the class token: the last block computes nothing else
            quality = self.blocks[-1](tokens, 1)[:, 0]
        with torch.autocast(x.device.type, enabled=False):
            y = self.head(self.encoder_norm(quality))
            return y[:, 0] if len(self.ratings) == 1 else (y.softmax(1) * self.ratings).sum(1)

    def sides(self, size):
        """Sides of the square images that an S x S image is seen as, in pixels, the original last."""
        return self.lengths + [size] * (self.original is not None)

    def embeddings(self, size, device):
        """Position plus scale embedding of every token, zero for the class token: (1, 1 + tokens, C). Kept per size."""
        key = size, device, self.cls.dtype
        if key not in self._embeddings:
            counts = [math.ceil(side / PATCH) for side in self.sides(size)]
            if self.original is not None and 0 <= self.original != counts[-1] ** 2:
                raise ValueError(f"FusedMUSIQ: pyiqa masks or cuts patches of {size}x{size} images, of which it wants "
                                 f"{self.original}: use pyiqa's MUSIQ")
            with torch.inference_mode(False), torch.no_grad():
                position = torch.cat([hashed_positions(count) for count in counts])
                scale = torch.cat([torch.full((count ** 2,), k) for k, count in enumerate(counts)])
                embedding = self.position_emb[0][position.to(device)] + self.scale_emb[scale.to(device)]
                if len(self._embeddings) >= SIZES:
                    self._embeddings.pop(next(iter(self._embeddings)))
                self._embeddings[key] = F.pad(embedding, (0, 0, 1, 0))[None]
        return self._embeddings[key]

    def patches(self, x):
        """(B, 3, S, S) in [-1, 1] -> (B, tokens, 3, 32, 32): row by row, scale by scale (Section 3.2)."""
        size, patches = x.shape[2], []
        for k, side in enumerate(self.sides(size)):
            image = x if k == len(self.lengths) else F.interpolate(x, (side, side), mode="bicubic")
            pad = -side % PATCH
            image = F.pad(image, (pad // 2, pad - pad // 2) * 2) if pad else image
            image = image.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
            patches.append(image.permute(0, 2, 4, 1, 3, 5).flatten(1, 2))
        return torch.cat(patches, 1)

    def features(self, x):
        """(N, 3, 32, 32) -> (N, 8 * 8 * 256): root convolution and one bottleneck of a ResNet, channels last."""
        # elsewhere it is slower, or its rounding moves ReLUs and maxima
        if x.device.type == "cpu" and not self.bf16 and not x.requires_grad:
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv_root(F.pad(x, (2, 3, 2, 3)))
        # zero padding changes no maximum
        x = F.max_pool2d(F.relu(self.gn_root(x), inplace=True), 3, 2, ceil_mode=True)
        y = F.relu(self.gn1(self.conv1(x)), inplace=True)
        y = F.relu(self.gn2(self.conv2(y)), inplace=True)
        y = self.gn3(self.conv3(y)) + self.gn_proj(self.conv_proj(x))
        return F.relu(y, inplace=True).permute(0, 2, 3, 1).flatten(1)


class Block(nn.Module):
    """Transformer block, norms first: (B, N, C) -> (B, N, C), or (B, count, C), the first ones only."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x, count=None):
        y = self.norm1(x)
        q, k, v = (layer(z).unflatten(2, (HEADS, -1)).transpose(1, 2)
                   for layer, z in ((self.query, y[:, :count]), (self.key, y), (self.value, y)))
        x = x[:, :count] + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def hashed_positions(count):
    """Cells of the GRID x GRID position embeddings for count x count patches, row by row: (count^2,) (Section 3.3)."""
    # floor(k * GRID / count), in the rounding of pyiqa's: whole numbers differ for some images of 6,560 pixels and more
    cell = F.interpolate(torch.arange(float(GRID))[None, None], count, mode="nearest")[0, 0].long()
    return (cell[:, None] * GRID + cell).flatten()


def untrained(device, bf16=False):
    """MUSIQ with random weights (seed 0) of a trained one's scale, for times: costs what MUSIQ costs, means nothing."""
    net, generator = FusedMUSIQ(bf16=bf16), torch.Generator().manual_seed(0)
    weights = {name: torch.randn(w.shape, generator=generator) / math.sqrt(w[0].numel()) if w.ndim > 1
               # norms and biases
               else torch.full_like(w, float(name.endswith("weight"))) for name, w in net.state_dict().items()}
    return net.load(weights).to(device)


def untrained_bf16(device):
    """The same in bfloat16."""
    return untrained(device, bf16=True)
