"""Networks, degradations and LoRA on CUDA give the numbers of the CPU.

Needs PyTorch, torchvision, NumPy, SciPy, scikit-image, Pillow, tqdm and psutil, no network, and none of pyiqa, peft.
"""
import copy

import pytest
import torch
from test_degradations import IMAGES, photos

import archs
import lora
from degradations import PRESETS, bicubic, degrade, jpeg, usm_sharpen
from losses import VGGFeatureLoss
from rewards.ranker import load_ranker

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GENERATORS = tuple(archs.ARCHS)
NETWORKS = (*GENERATORS, "discriminator", "vgg", "ranker", "musiq")


@pytest.fixture(autouse=True)
def switches():
    """fp32 is fp32, as in training, and the same algorithms every time."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = matmul.allow_tf32 = cudnn.benchmark = False
    yield
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


def network(name, vgg_file):
    """-> (module on the CPU, its input): random weights, parts of a photograph of a few pixels."""
    torch.manual_seed(0)
    if name in GENERATORS:
        # not square, no multiple of SwinIR's window
        return archs.create(name).train(), photos(16)[2:4, :, :12]
    if name == "discriminator":
        return archs.UNetDiscriminatorSN().train(), photos(48)[2:3, :, :32]
    if name == "vgg":
        return VGGFeatureLoss(vgg_file), photos(32)[2:3]
    if name == "ranker":
        return load_ranker().requires_grad_(False), photos(64)[2:4]
    from rewards import musiq
    # in flat parts of a photograph maxima tie, and CUDA gives the gradient to another pixel than the CPU
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) / 10
    return musiq.untrained("cpu"), photos(64)[2:4] * 0.9 + noise


def computed(name, net, x, autocast=False):
    """-> {"output", "input gradient", and of a network that trains "weight gradient"} on the CPU in float64.

    Gradients are those of a sum of the outputs with random weights.
    """
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        if name == "vgg":
            # its forward computes in fp32
            y = torch.cat([taps.flatten() for taps in net.taps(x)])
        else:
            y = net(x, *([net.draw_keep([1, 2])] if isinstance(net, archs.SwinIR) else []))
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = [p for p in net.parameters() if p.requires_grad]
    of_x, *of_weights = torch.autograd.grad((y.double() * direction.to(y.device)).sum(), [x, *weights])
    values = {"output": y, "input gradient": of_x}
    if weights:
        values["weight gradient"] = torch.cat([gradient.flatten() for gradient in of_weights])
    return {key: value.detach().double().cpu() for key, value in values.items()}


def apart(a, b):
    """|a - b| / |b - mean of b|; for an output of few numbers, scores, relative to |b|."""
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).norm() / (b - b.mean() if b.numel() > 8 else b).norm()).item()


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_and_gradients_in_float64(vgg_file, name):
    """To 1e-9: no rounding moves a ReLU, so every operation must be the same, on both sides."""
    net, x = network(name, vgg_file)
    net, x = net.double(), x.double()
    expected = computed(name, copy.deepcopy(net), x)
    result = computed(name, net.cuda(), x.cuda())
    assert max(apart(result[key], value) for key, value in expected.items()) < 1e-9


# |difference| of (output, gradients) from float64. A moved ReLU is a jump of the gradient. The limits of TF32 and bf16
# are about twice what was measured on a CPU (TF32 emulated). fp32 moved no ReLU there (3e-6, 6e-6).
LIMITS = {"fp32": (1e-4, 1e-2), "tf32": (5e-3, 0.1), "bf16": (4e-2, 0.3)}


@pytest.mark.parametrize("name, precision", [
    *((name, precision) for name in NETWORKS for precision in ("fp32", "tf32")),
    # what a training runs under autocast
    *((name, "bf16") for name in (*GENERATORS, "discriminator"))])
def test_networks_and_gradients_by_precision(vgg_file, record_property, name, precision):
    net, x = network(name, vgg_file)
    expected = computed(name, copy.deepcopy(net).double(), x.double())
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    result = computed(name, net.cuda(), x.cuda(), precision == "bf16")
    for key, value in expected.items():
        # for the file that make gpu writes
        record_property(key, apart(result[key], value))
        assert apart(result[key], value) < LIMITS[precision][key != "output"], key


def test_channels_last_changes_rounding_only(vgg_file):
    for name in [name for name in NETWORKS if not name.startswith(("swinir", "ranker", "musiq"))]:
        net, x = network(name, vgg_file)
        expected = computed(name, copy.deepcopy(net).double(), x.double())
        result = computed(name, net.to("cuda", memory_format=torch.channels_last),
                          x.to("cuda", memory_format=torch.channels_last))
        for key, value in expected.items():
            assert apart(result[key], value) < LIMITS["fp32"][key != "output"], (name, key)


# Degradations

def grey_levels_apart(a, b):
    return (a.cpu() - b.cpu()).abs() * 255


@pytest.mark.parametrize("name", PRESETS)
def test_degradations_without_noise_and_never_wait(name):
    silent = dict(poisson_scale=(0, 0), gaussian_sigma=(0, 0))
    quiet = dict(PRESETS[name], rounds=[r | silent for r in PRESETS[name]["rounds"]])
    images = photos(IMAGES[name])
    on_gpu = images.cuda()
    degrade(on_gpu, name, range(6), [0, 0, 0, 1, 1, 1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            results = [degrade(on_gpu, quiet, range(6), [g, g, g, g + 1, g + 1, g + 1]) for g in range(10)]
        noisy = degrade(on_gpu, name, range(6), [0, 0, 0, 1, 1, 1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for g, result in enumerate(results):
        difference = grey_levels_apart(result, degrade(images, quiet, range(6), [g, g, g, g + 1, g + 1, g + 1]))
        assert difference.mean() < 0.02 and (difference > 0.5).float().mean() < 0.02
    again = torch.cat([degrade(on_gpu[i:i + 1], name, [i], [i // 3]) for i in range(6)])
    assert (grey_levels_apart(noisy, again) > 0.5).float().mean() < 0.01


@pytest.mark.parametrize("table, quality", [("hggt", 30.5), ("hggt", 90.3), ("libjpeg", 30), ("libjpeg", 90)])
def test_jpeg(table, quality):
    """A coefficient half-way between two steps may round to the other one, which changes a block of 8 x 8 pixels.

    Of the 6 x 64 such blocks here five at most.
    """
    images = photos(64)
    difference = grey_levels_apart(jpeg(images.cuda(), quality, table), jpeg(images, quality, table)).amax(1)
    assert (difference > 0.01).float().mean() <= 5 * 64 / difference.numel()


def test_bicubic_and_usm():
    images = photos(64)
    small, on_gpu = bicubic(images), bicubic(images.cuda())
    # sums in float64 are exact; CUDA divides by 255 through the reciprocal, which may be one rounding away
    assert torch.equal((small * 255).round(), (on_gpu.cpu() * 255).round())
    assert grey_levels_apart(on_gpu, small).max() < 1e-4
    # a residual at the threshold of the mask moves it by at most 0.05^2, and the image by that share of the residual
    difference = grey_levels_apart(usm_sharpen(images.cuda()), usm_sharpen(images))
    assert difference.max() < 0.1 and difference.mean() < 1e-3


# LoRA

@pytest.mark.parametrize("arch", ["compact-small", "rrdbnet-small", "swinir-small"])
def test_merged_adapters(tmp_path, arch):
    """Adapted on the GPU and merged there: the adapted network's output, and the weights that the CPU merges."""
    torch.manual_seed(0)
    plain = archs.create(arch).eval()
    net = copy.deepcopy(plain)
    lora.add_lora(net, lora.default_targets(net), rank=4)
    for adapter in lora.adapted(net).values():
        torch.nn.init.normal_(adapter.lora_B)
    on_gpu, x = copy.deepcopy(net).cuda(), photos(16)[:2]
    expected, merged = lora.merged_state_dict(net), lora.merged_state_dict(on_gpu)
    assert max(apart(merged[f"{name}.weight"], expected[f"{name}.weight"]) for name in lora.adapted(net)) < 1e-6
    lora.save_lora(tmp_path / "adapter.pth", on_gpu)
    with torch.no_grad():
        adapted = on_gpu(x.cuda())
        again = lora.merge_lora(on_gpu)(x.cuda())
        assert apart(again, adapted) < 1e-6
        assert apart(adapted, net(x)) < 1e-4 and apart(adapted, plain(x)) > 1e-3
        # the file of a network on the GPU, for one on the CPU
        lora.load_lora(plain, tmp_path / "adapter.pth")
        assert apart(plain(x), adapted) < 1e-4
