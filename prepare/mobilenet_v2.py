"""MobileNetV2's ImageNet weights from a public 8-bit file, where torchvision's own cannot be downloaded.

    python -m prepare.mobilenet_v2 mobilenet_v2_1.0_224_uint8.pth mobilenet_v2.pth
    python -m rewards.train_opinion --backbone mobilenet_v2.pth ...

The source holds the tensors of mobilenet_v2_1.0_224_quant.tflite (github.com/google-coral/test_data, commit 104342d2,
Apache-2.0), a byte per weight: value = (byte - zero) * scale. Its keys are stem, blocks.N.expand, blocks.N.depthwise,
blocks.N.project, head and classifier, batch norms folded into the biases.

The result has the keys of torchvision.models.mobilenet_v2 and takes its input, RGB in [0, 1] less the ImageNet mean,
divided by the standard deviation; TensorFlow's is 2 x - 1, and the difference is folded into the first convolution.
The batch norms are identities with the biases. TensorFlow pads an even side at the right and bottom only where it
halves it: torchvision's network sees the image on a lattice shifted by one pixel per halving, which changes borders
only.
"""
from pathlib import Path

import runs


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("source", type=Path, metavar="SOURCE.pth", help="file of 8-bit tensors")
    p.add_argument("out", type=Path, metavar="OUT.pth", help="file to write, for --backbone")
    return p.parse_args(argv)


# before the imports that take seconds, so that --help answers at once
ARGS = parse_args() if __name__ == "__main__" else None

import torch

import archs
from rewards.opinion import MEAN, STD


def layer_names():
    """{name in the source: (convolution, batch norm) in torchvision}"""
    names = {"stem": ("features.0.0", "features.0.1"), "head": ("features.18.0", "features.18.1")}
    for n in range(17):
        parts = ["depthwise", "project"] if n == 0 else ["expand", "depthwise", "project"]
        for k, part in enumerate(parts):
            block, last = f"features.{n + 1}.conv", part == "project"
            names[f"blocks.{n}.{part}"] = ((f"{block}.{k}", f"{block}.{k + 1}") if last else
                                           (f"{block}.{k}.0", f"{block}.{k}.1"))
    return names


def convert(packed):
    """The 8-bit tensors -> state dict of torchvision's mobilenet_v2, without its classifier. KeyError for others."""
    state = {}
    for name, (conv, norm) in layer_names().items():
        weight = packed[name + ".weight"]
        if weight.dtype == torch.uint8:
            weight = (weight.float() - packed[name + ".weight.zero"]) * packed[name + ".weight.scale"]
        bias = packed[name + ".bias"].float()
        if name == "stem":
            # 2 x - 1 = 2 std ((x - mean) / std) + 2 mean - 1
            mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))
            bias = bias + (weight * (2 * mean - 1)).sum((1, 2, 3))
            weight = weight * 2 * std
        state[conv + ".weight"] = weight.float().contiguous()
        one = torch.ones_like(bias)
        # its denominator is the root of variance + 1e-5
        state |= {norm + ".weight": one, norm + ".bias": bias, norm + ".running_mean": torch.zeros_like(bias),
                  norm + ".running_var": one - 1e-5, norm + ".num_batches_tracked": torch.tensor(0)}
    return state


def main(args):
    runs.check_output(args.out, "OUT.pth")
    try:
        state = convert(archs.read_file(args.source))
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        raise runs.UserError(f"{args.source}: not a .pth file of 8-bit MobileNetV2 tensors ({reason})") from None
    runs.write_atomic(args.out, lambda temporary: torch.save(state, temporary))
    print(f"{args.out}: {len(layer_names())} convolutions of MobileNetV2, for --backbone")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
