"""MUSIQ on square crops, equal to pyiqa's and faster. AMO scores with it at every step, fine-tuning differentiates it.

    fused = FusedMUSIQ.from_pyiqa(pyiqa.create_metric("musiq").net)              (B, 3, S, S) RGB in [0, 1] -> (B,)

pyiqa's MUSIQ (Ke et al., ICCV 2021) stays the reference; its weights, resize and positions are used and nothing in it
is patched. Importing this file imports pyiqa, which takes seconds.

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
in the cache. channels_last makes a forward pass in fp32 6 % faster (processor time, n = 16). Unmeasured on a GPU.
Left out: query, key and value in one product (no faster, n = 5); channels_last in bf16 (1.7 times slower, n = 4) and
with gradients (no clear gain, n = 4, and gradients that differ from pyiqa's as below).

Gradients: pyiqa's own in fp32 is 2e-3 (relative, random pixels) from its own in float64, because rounding decides ReLUs
and maxima near a tie. The one here differs from pyiqa's by 1.6e-6 where convolutions round alike (NCHW, this CPU), by
1e-14 in float64.
"""
import copy
import math

import torch
import torch.nn.functional as F
from pyiqa.archs.arch_util import dist_to_mos
from pyiqa.archs.musiq_arch import MUSIQ
from pyiqa.data.multiscale_trans_util import get_multiscale_patches, resize_preserve_aspect_ratio
from torch import nn

# so many patches, at most, go through the convolutions at a time on a CPU
PATCHES = 32
# so many image sizes have their embeddings kept
SIZES = 8


class FusedMUSIQ(nn.Module):
    """Frozen MUSIQ for batches of square images: (B, 3, S, S) RGB in [0, 1] -> (B,) float32, higher is better.

    Scores have the units of the head.
    A square image is resized to L x L for every L of pyiqa's `longer_side_lengths` and cut into ceil(L / 32)^2 patches,
    exactly the number that pyiqa pads to, and of the original all patches are taken (`max_seq_len_from_original_res` is
    -1). So pyiqa's mask is all ones at every S, also where S is no multiple of 32, since pyiqa pads the pixels then.
    That is verified once per S. The weights are those of the moment of from_pyiqa. Differentiable with respect to the
    pixels; always in eval mode.
    bf16: matrix products and convolutions in bfloat16 (autocast); input, resize, residuals, last norm, head and output
    stay float32.
    Raises ValueError for another shape, or where pyiqa's options do mask or cut patches of this S: use pyiqa's model
    there.
    """

    def __init__(self, net, bf16=False):
        super().__init__()
        if not isinstance(net, MUSIQ):
            raise ValueError(f"FusedMUSIQ is made from pyiqa's MUSIQ, the .net of its metric; got {type(net).__name__}")
        net = copy.deepcopy(net)
        self.bf16, self.options, self.side = bf16, net.data_preprocess_opts, net.patch_size
        self.gn_root, self.block, self.embedding = net.gn_root, net.block1, net.embedding
        self.encoder, self.head = net.transformer_encoder, net.head
        self.requires_grad_(False)
        self.eval()
        block = net.block1
        convs = {"root": net.conv_root, "conv1": block.conv1, "conv2": block.conv2, "conv3": block.conv3,
                 "proj": block.conv_proj}
        for name, conv in convs.items():
            # standardised, as in pyiqa's StdConv
            weight = conv.weight.detach()
            weight = weight - weight.mean((1, 2, 3), keepdim=True)
            self.register_buffer(name, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5))
        del block.conv1, block.conv2, block.conv3, block.conv_proj
        if bf16:
            # autocast would cast frozen weights again at every call
            for module in [self.embedding] + [m for m in self.encoder.modules() if isinstance(m, nn.Linear)]:
                module.bfloat16()
        # (S, device, dtype) -> (1, 1 + tokens, C)
        self._embeddings = {}

    @classmethod
    def from_pyiqa(cls, net, bf16=False):
        """From a pyiqa MUSIQ with any head, which is copied and left alone."""
        return cls(net, bf16)

    def train(self, mode=True):
        return super().train(False)

    def forward(self, x):
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] != x.shape[3]:
            raise ValueError(f"FusedMUSIQ wants square (B, 3, S, S) RGB, got {tuple(x.shape)}: use pyiqa's MUSIQ")
        with torch.autocast(x.device.type, enabled=False):
            embeddings = self.embeddings(x.shape[2], x.device)
            patches = self.patches((x.to(self.root.dtype) - 0.5) * 2)  # (B, tokens, 3, 32, 32)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            patches = patches.flatten(0, 1)
            parts = patches.tensor_split(math.ceil(len(patches) / PATCHES) if x.device.type == "cpu" else 1)
            tokens = self.embedding(torch.cat([self.features(part) for part in parts]))
            tokens = tokens.view(len(x), -1, embeddings.shape[2]).to(self.root.dtype)
            tokens = torch.cat([self.encoder.cls.expand(len(x), -1, -1), tokens], 1) + embeddings
            cls = self.transform(tokens)
        with torch.autocast(x.device.type, enabled=False):
            return dist_to_mos(self.head(self.encoder.encoder_norm(cls)))[:, 0]

    def embeddings(self, size, device):
        """Position plus scale embedding of every token, zero for the class token: (1, 1 + tokens, C). Kept per size."""
        key = size, device, self.root.dtype
        if key not in self._embeddings:
            with torch.inference_mode(False), torch.no_grad():
                # position, scale, mask of every token
                layout = get_multiscale_patches(torch.zeros(1, 3, size, size), **self.options)[0, :, -3:]
                scales = sorted(self.options["longer_side_lengths"]) + [size] * self.sees_original
                if not layout[:, 2].all() or len(layout) != sum(math.ceil(side / self.side) ** 2 for side in scales):
                    raise ValueError(f"FusedMUSIQ: pyiqa masks or cuts patches of {size}x{size} images with "
                                     f"{self.options}: use pyiqa's MUSIQ")
                position, scale = layout[:, :2].long().to(device).unbind(1)
                embedding = self.encoder.posembed_input.position_emb[0][position]
                if self.encoder.use_scale_emb:
                    embedding = embedding + self.encoder.scaleembed_input.scale_emb[scale]
                if len(self._embeddings) >= SIZES:
                    self._embeddings.pop(next(iter(self._embeddings)))
                self._embeddings[key] = F.pad(embedding, (0, 0, 1, 0))[None]
        return self._embeddings[key]

    @property
    def sees_original(self):
        """Is the image at its own size one of the scales?"""
        return self.options["max_seq_len_from_original_res"] is not None

    def patches(self, x):
        """(B, 3, S, S) in [-1, 1] -> (B, tokens, 3, 32, 32): the scales in pyiqa's order, the original last."""
        size, side, patches = x.shape[2], self.side, []
        lengths = sorted(self.options["longer_side_lengths"])
        scales = [resize_preserve_aspect_ratio(x, size, size, length)[0] for length in lengths]
        for image in scales + [x] * self.sees_original:
            pad = -image.shape[2] % side
            image = F.pad(image, (pad // 2, pad - pad // 2) * 2)
            n = image.shape[2] // side
            image = image.view(len(x), 3, n, side, n, side).permute(0, 2, 4, 1, 3, 5)
            patches.append(image.reshape(len(x), n * n, 3, side, side))
        return torch.cat(patches, 1)

    def features(self, x):
        """(N, 3, 32, 32) -> (N, 8 * 8 * 256) in pyiqa's (TensorFlow's) order."""
        # elsewhere it is slower, or its rounding moves ReLUs and maxima
        if x.device.type == "cpu" and not self.bf16 and not x.requires_grad:
            x = x.contiguous(memory_format=torch.channels_last)
        block = self.block
        x = F.conv2d(F.pad(x, (2, 3, 2, 3)), self.root, stride=2)
        # zero padding changes no maximum
        x = F.max_pool2d(F.relu(self.gn_root(x), inplace=True), 3, 2, ceil_mode=True)
        y = F.relu(block.gn1(F.conv2d(x, self.conv1)), inplace=True)
        y = F.relu(block.gn2(F.conv2d(y, self.conv2, padding=1)), inplace=True)
        y = block.gn3(F.conv2d(y, self.conv3)) + block.gn_proj(F.conv2d(x, self.proj))
        return F.relu(y, inplace=True).permute(0, 2, 3, 1).flatten(1)

    def transform(self, x):
        """(B, 1 + tokens, C) -> (B, C), the class token after all blocks; the last one computes nothing else."""
        blocks = list(self.encoder.transformer.values())
        for block in blocks:
            attention, y = block.attention, block.norm1(x)
            query = y
            if block is blocks[-1]:
                query, x = y[:, :1], x[:, :1]
            q, k, v = (layer(z).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
                       for layer, z in ((attention.query, query), (attention.key, y), (attention.value, y)))
            x = x + attention.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        return x[:, 0]
