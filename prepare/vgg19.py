"""VGG19 for the perceptual loss from public 8-bit weights, where torchvision's own weights cannot be downloaded.

    python -m prepare.vgg19 little_shards vgg19.pth
    python train.py --vgg-weights vgg19.pth ...

The source is the folder models/little_shards of github.com/azertat/tfjs_models (commit 3c14b35a): the ImageNet VGG19 of
Oxford (CC-BY-4.0) as Keras ships it, exported to TensorFlow.js with 8 bits per weight. Needed are model.json and the
first 20 shards, group1-shard1of138.bin to group1-shard20of138.bin (21 MB); the others hold the fully connected layers.
A .pth file of the same 8-bit tensors works as well (its keys: see read_packed).

The result holds the convolutions under the keys of torchvision.models.vgg19().features and takes torchvision's input,
RGB in [0, 1] less the ImageNet mean, divided by the standard deviation. Two exact rewrites make that possible:
- Keras's input is BGR in [0, 255] without a division. The channels of the first kernel are reversed, and 255 times the
  standard deviation is folded into it.
- All activations are divided by 100. ReLU, pooling and convolution are homogeneous, so the first kernel and every bias
  shrink.

The two means differ by at most half a grey level; this is not corrected. The features are those of Oxford's network,
not of torchvision's own training: weights of the loss that were tuned with one are comparable with the other in order
of magnitude only.
"""
from pathlib import Path

import runs


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("source", type=Path, metavar="SHARDS",
                   help="folder with model.json and the shards, or a .pth file of 8-bit tensors")
    p.add_argument("out", type=Path, metavar="OUT.pth", help="file to write, for --vgg-weights")
    return p.parse_args(argv)


# before the imports that take seconds, so that --help answers at once
ARGS = parse_args() if __name__ == "__main__" else None

import json
import math

import torch

import archs

# convolutions per block; ReLU after each convolution, pooling after each block
BLOCKS = (2, 2, 4, 4, 4)
# CHOICE: Keras's input is 58 times as large as torchvision's; this brings activations to a similar order of magnitude
SHRINK = 100.0
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
ADDRESS = "github.com/azertat/tfjs_models, folder models/little_shards"


def layer_numbers():
    """{"block1_conv1": 0, "block1_conv2": 2, "block2_conv1": 5, ...}: Keras's names, torchvision's numbers."""
    numbers, number = {}, 0
    for block, convs in enumerate(BLOCKS, 1):
        for conv in range(1, convs + 1):
            numbers[f"block{block}_conv{conv}"] = number
            number += 2
        number += 1
    return numbers


def read_shards(folder):
    """The convolutions of a TensorFlow.js export -> {number: (kernel, bias)}, float32, kernels (out, in, 3, 3) for RGB.

    The shards, one after the other, hold the tensors in the order of model.json, a byte per value: value = byte * scale
    + min. UserError where a file is missing or of another kind.
    """
    numbers, tensors, content = layer_numbers(), {}, b""
    try:
        manifest = json.loads((folder / "model.json").read_text())["weightsManifest"][0]
        shards = iter(manifest["paths"])
        for entry in manifest["weights"]:
            layer, _, role = entry["name"].partition("/")
            if layer not in numbers:
                break
            size, coding = math.prod(entry["shape"]), entry["quantization"]
            if coding["dtype"] != "uint8":
                raise ValueError(f"{entry['name']} has {coding['dtype']} values, expected uint8")
            while len(content) < size:
                content += (folder / next(shards)).read_bytes()
            values = torch.frombuffer(bytearray(content[:size]), dtype=torch.uint8).float().view(entry["shape"])
            tensors[numbers[layer], role], content = values * coding["scale"] + coding["min"], content[size:]
        # HWIO -> OIHW
        layers = {n: (tensors[n, "kernel"].permute(3, 2, 0, 1), tensors[n, "bias"]) for n in numbers.values()}
    except FileNotFoundError as error:
        raise runs.UserError(f"{error.filename}: missing; fetch it from {ADDRESS}") from None
    except (ValueError, KeyError, IndexError, TypeError, StopIteration) as error:
        reason = f"{type(error).__name__}: {error}"[:100]
        raise runs.UserError(f"{folder}: not the 8-bit VGG19 of {ADDRESS} ({reason})") from None
    kernel, bias = layers[0]
    # BGR -> RGB
    return layers | {0: (kernel.flip(1), bias)}


def read_packed(file):
    """The same from a .pth file.

    Keys: "features.N.weight" uint8 (out, in, 3, 3) for RGB, with "features.N.weight.scale" and "features.N.weight.min";
    "features.N.bias" float.
    """
    layers = {}
    try:
        packed = torch.load(file, map_location="cpu", weights_only=True)
        for n in layer_numbers().values():
            key = f"features.{n}.weight"
            kernel = packed[key].float() * packed[key + ".scale"] + packed[key + ".min"]
            layers[n] = kernel, packed[f"features.{n}.bias"].float()
    except FileNotFoundError:
        raise runs.UserError(f"{file}: no such folder or file") from None
    except archs.TORCH_DAMAGE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        raise runs.UserError(f"{file}: not a .pth file of 8-bit VGG19 tensors ({reason})") from None
    return layers


def convert(layers):
    """{number: (kernel, bias)} of Keras's network, for RGB -> state dict of torchvision's vgg19().features."""
    state = {}
    for number, (kernel, bias) in layers.items():
        state[f"{number}.weight"], state[f"{number}.bias"] = kernel.contiguous(), bias / SHRINK
    state["0.weight"] = state["0.weight"] * (255 * STD) / SHRINK
    return state


def main(args):
    runs.check_output(args.out, "OUT.pth")
    state = convert((read_shards if args.source.is_dir() else read_packed)(args.source))
    runs.write_atomic(args.out, lambda temporary: torch.save(state, temporary))
    print(f"{args.out}: {len(state) // 2} convolutions of VGG19, for --vgg-weights")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
