"""prepare.vgg19: 8-bit shards of a Keras model become weights for torchvision's VGG19, with the same features."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO
from skimage import data as photos
from torchvision.models import vgg

import losses
import runs
from prepare import vgg19

pytestmark = pytest.mark.fast
REAL = REPO.parent / "shared" / "data" / "weights" / "vgg" / "vgg19_features_uint8.pth"
MEAN, STD = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
KERAS_MEAN_BGR = torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)


@pytest.fixture
def shards(tmp_path):
    """A VGG19 of 2 to 6 channels as TensorFlow.js stores it, in shards of 300 bytes; its {(layer, role): values}."""
    rng = np.random.default_rng(0)
    folder, entries, content, layers, before = tmp_path / "shards", [], b"", {}, 3
    folder.mkdir()
    for block, convs in enumerate((2, 2, 4, 4, 4), 1):
        for conv in range(1, convs + 1):
            layer, width = f"block{block}_conv{conv}", block + 1
            for role, shape in (("kernel", (3, 3, before, width)), ("bias", (width,))):
                values = rng.integers(0, 256, shape, dtype=np.uint8)
                # kernels have positive and negative weights, biases too
                scale = 2 / 255 / (3 * before ** 0.5) if role == "kernel" else 0.01
                coding = {"dtype": "uint8", "original_dtype": "float32", "scale": scale, "min": -scale * 120}
                entries.append({"name": f"{layer}/{role}", "shape": list(shape), "dtype": "float32",
                                "quantization": coding})
                content += values.tobytes()
                layers[layer, role] = values * coding["scale"] + coding["min"]
            before = width
    entries.append({"name": "fc1/kernel", "shape": [1000, 1000], "dtype": "float32",
                    "quantization": {"dtype": "uint8", "scale": 1.0, "min": 0.0}})
    count = math.ceil(len(content) / 300)
    names = [f"group1-shard{k + 1}of9999.bin" for k in range(count + 5)]
    # the shards of the fully connected layers are not there
    for k in range(count):
        (folder / names[k]).write_bytes(content[300 * k:300 * (k + 1)])
    (folder / "model.json").write_text(json.dumps({"weightsManifest": [{"paths": names, "weights": entries}]}))
    return folder, layers


def keras_features(x, layers):
    """Keras's network on x (1, 3, H, W), BGR in [0, 255] less the mean: the outputs of all convolutions."""
    outputs = []
    for block, convs in enumerate((2, 2, 4, 4, 4), 1):
        for conv in range(1, convs + 1):
            kernel, bias = (torch.from_numpy(layers[f"block{block}_conv{conv}", role]) for role in ("kernel", "bias"))
            outputs.append(F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, padding=1))
            x = outputs[-1].relu()
        x = F.max_pool2d(x, 2)
    return outputs


def torchvision_features(x, state):
    """The same of a state dict of torchvision's features, on RGB less the mean, divided by the standard deviation."""
    outputs = []
    for number, layer in enumerate(vgg.make_layers(vgg.cfgs["E"], False)):
        if isinstance(layer, torch.nn.Conv2d):
            x = F.conv2d(x, state[f"{number}.weight"].double(), state[f"{number}.bias"].double(), padding=1)
            outputs.append(x)
        else:
            x = x.relu() if isinstance(layer, torch.nn.ReLU) else F.max_pool2d(x, 2)
    return outputs


def test_features_equal_those_of_the_keras_network(shards, tmp_path):
    folder, layers = shards
    vgg19.main(vgg19.parse_args([str(folder), str(tmp_path / "vgg19.pth")]))
    state = torch.load(tmp_path / "vgg19.pth", weights_only=True)
    assert all(value.dtype == torch.float32 and value.is_contiguous() for value in state.values())
    photo = torch.from_numpy(photos.astronaut()[:64, 180:244].copy()).permute(2, 0, 1)[None].double()
    ours = torchvision_features((photo / 255 - MEAN) / STD, state)
    # with torchvision's mean, and with Keras's own, which differs by at most half a grey level
    exact = keras_features((photo - 255 * MEAN).flip(1), layers)
    keras = keras_features(photo.flip(1) - KERAS_MEAN_BGR, layers)
    assert len(ours) == 16
    for a, b, c in zip(ours, exact, keras):
        assert (100 * a - b).norm() < 1e-5 * b.norm()
        assert (100 * a - c).norm() < 0.03 * c.norm()


def test_a_pth_file_of_the_same_bytes_gives_the_same_weights(shards, tmp_path):
    folder, _ = shards
    entries, packed = json.loads((folder / "model.json").read_text())["weightsManifest"][0]["weights"], {}
    count = len(list(folder.glob("*.bin")))
    content = b"".join((folder / f"group1-shard{k + 1}of9999.bin").read_bytes() for k in range(count))
    numbers = vgg19.layer_numbers()
    for entry in entries[:-1]:
        layer, role = entry["name"].split("/")
        size = math.prod(entry["shape"])
        values, content = np.frombuffer(content[:size], np.uint8).reshape(entry["shape"]), content[size:]
        scale, least = entry["quantization"]["scale"], entry["quantization"]["min"]
        key = f"features.{numbers[layer]}"
        if role == "bias":
            packed[f"{key}.bias"] = torch.from_numpy(values.astype(np.float32) * np.float32(scale) + np.float32(least))
            continue
        kernel = torch.from_numpy(values.copy()).permute(3, 2, 0, 1)
        packed[f"{key}.weight"] = kernel.flip(1) if numbers[layer] == 0 else kernel
        packed[f"{key}.weight.scale"] = torch.tensor(scale, dtype=torch.float64)
        packed[f"{key}.weight.min"] = torch.tensor(least, dtype=torch.float64)
    torch.save(packed, tmp_path / "packed.pth")
    a, b = vgg19.convert(vgg19.read_shards(folder)), vgg19.convert(vgg19.read_packed(tmp_path / "packed.pth"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_numbers_are_those_of_torchvision():
    layers = vgg.make_layers(vgg.cfgs["E"], False)
    convolutions = [number for number, layer in enumerate(layers) if isinstance(layer, torch.nn.Conv2d)]
    assert list(vgg19.layer_numbers().values()) == convolutions
    assert list(vgg19.layer_numbers())[::5] == ["block1_conv1", "block3_conv2", "block4_conv3", "block5_conv4"]


def test_what_is_missing_or_something_else_is_one_line(shards, tmp_path):
    folder, _ = shards
    (folder / "group1-shard2of9999.bin").unlink()
    with pytest.raises(runs.UserError, match="shard2of9999.bin: missing; fetch it from github.com/azertat/tfjs_models"):
        vgg19.read_shards(folder)
    (folder / "model.json").write_text("{}")
    with pytest.raises(runs.UserError, match="not the 8-bit VGG19 of github.com/azertat"):
        vgg19.read_shards(folder)
    (folder / "model.json").unlink()
    with pytest.raises(runs.UserError, match="model.json: missing"):
        vgg19.read_shards(folder)
    with pytest.raises(runs.UserError, match="none.pth: no such folder or file"):
        vgg19.read_packed(tmp_path / "none.pth")
    for content in ({"features.0.weight": torch.zeros(1)}, [1]):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(runs.UserError, match="other.pth: not a .pth file of 8-bit VGG19 tensors"):
            vgg19.read_packed(tmp_path / "other.pth")
    with pytest.raises(runs.UserError, match="OUT.pth .*: a folder; name a file"):
        vgg19.main(vgg19.parse_args([str(folder), str(tmp_path)]))


@pytest.mark.skipif(not REAL.is_file(), reason="needs the real 8-bit VGG19, which is not in this repository")
def test_the_real_weights_load_into_the_perceptual_loss_and_keep_their_features(tmp_path):
    vgg19.main(vgg19.parse_args([str(REAL), str(tmp_path / "vgg19.pth")]))
    loss = losses.VGGFeatureLoss(tmp_path / "vgg19.pth")
    photo = torch.from_numpy(photos.astronaut()[:64, 180:244].copy()).permute(2, 0, 1)[None].double()
    packed = torch.load(REAL, weights_only=True)
    layers = {}
    for layer, number in vgg19.layer_numbers().items():
        key = f"features.{number}.weight"
        kernel = packed[key].double() * packed[key + ".scale"] + packed[key + ".min"]
        # back to Keras's order: HWIO, BGR
        kernel = kernel.flip(1) if number == 0 else kernel
        layers[layer, "kernel"] = kernel.permute(2, 3, 1, 0).numpy()
        layers[layer, "bias"] = packed[f"features.{number}.bias"].double().numpy()
    keras = keras_features(photo.flip(1) - KERAS_MEAN_BGR, layers)
    ours = torchvision_features((photo / 255 - MEAN) / STD, torch.load(tmp_path / "vgg19.pth", weights_only=True))
    for a, b in zip(ours, keras):
        assert (100 * a - b).norm() < 0.02 * b.norm()
    x = photo.float() / 255
    assert loss(x, x.flip(3)) > loss(x, 0.99 * x) > 0
