"""archs.py against published key names and counts, spandrel, torchvision, and networks that are written out here."""
import copy
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import spandrel
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models import vgg19

import archs
import runs
from archs import ARCHS, RRDBNet, SRVGGNetCompact, SwinIR, UNetDiscriminatorSN
from losses import VGGFeatureLoss

SHARED = Path(__file__).resolve().parents[2] / "shared"
CASES = SHARED / "cases"
REPO = Path(__file__).resolve().parents[1]
SWINIR_L = dict(upsampler="nearest+conv", embed_dim=240, depths=(6,) * 9, heads=(8,) * 9, resi_connection="3conv")
TINY = dict(img_size=16, depths=(2, 3), embed_dim=24, heads=(2, 3))


def randomise(net, seed=0):
    """Fill every parameter, also those that start at zero, with values that keep activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "bias_table" in name:
                std = 0.5
            else:
                std = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
            p.normal_(0, std, generator=generator)
            if "norm" in name and name.endswith("weight"):
                p += 1
    return net.eval()


def image(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def photo_crop(rows, columns):
    photo = Image.open(sorted((SHARED / "data" / "images" / "test_set5").glob("*.png"))[0]).convert("RGB")
    return torch.from_numpy(np.asarray(photo)[rows, columns].copy()).permute(2, 0, 1)[None] / 255


def real_net(name):
    path = SHARED / "data" / "weights" / "sr" / f"{name}_fp16.pth"
    if not path.exists():
        pytest.skip(f"needs {path}")
    return path


def count(net):
    return sum(p.numel() for p in net.parameters())


# Published sizes and names

@pytest.mark.fast
@pytest.mark.parametrize("make, parameters, keys, masks", [
    (SwinIR, 11_900_199, 550, 18), (lambda: SwinIR(upsampler="nearest+conv"), 11_715_559, 552, 18),
    (lambda: SwinIR(**SWINIR_L), 28_013_059, None, 27),
    (RRDBNet, 16_697_987, 702, 0),
    (lambda: RRDBNet(scale=2), 16_703_171, 702, 0), (lambda: RRDBNet(scale=1), 16_723_907, 702, 0),
    (lambda: RRDBNet(num_block=6), 4_467_779, None, 0),
    (SRVGGNetCompact, 1_213_296, 34 * 2 + 33, 0), (lambda: SRVGGNetCompact(num_conv=16), 621_424, None, 0),
    (UNetDiscriminatorSN, 4_376_897, 28, 0)])
def test_parameter_and_key_counts_are_the_published_ones(make, parameters, keys, masks):
    with torch.device("meta"):
        net = make()
    assert count(net) == parameters
    assert keys is None or len(net.state_dict()) == keys
    assert sum(k.endswith("attn_mask") for k in net.state_dict()) == masks


@pytest.mark.fast
@pytest.mark.parametrize("make, shapes", [
    (SwinIR, {"conv_first.weight": (180, 3, 3, 3), "patch_embed.norm.weight": (180,), "norm.bias": (180,),
              "layers.5.residual_group.blocks.4.attn.relative_position_bias_table": (225, 6),
              "layers.0.residual_group.blocks.0.attn.relative_position_index": (64, 64),
              "layers.3.residual_group.blocks.5.attn_mask": (64, 64, 64),
              "layers.0.residual_group.blocks.0.attn.qkv.weight": (540, 180),
              "layers.0.residual_group.blocks.0.attn.proj.bias": (180,),
              "layers.1.residual_group.blocks.1.norm1.weight": (180,),
              "layers.1.residual_group.blocks.1.norm2.bias": (180,),
              "layers.0.residual_group.blocks.0.mlp.fc1.weight": (360, 180),
              "layers.0.residual_group.blocks.0.mlp.fc2.bias": (180,), "layers.2.conv.weight": (180, 180, 3, 3),
              "conv_after_body.weight": (180, 180, 3, 3), "conv_before_upsample.0.weight": (64, 180, 3, 3),
              "upsample.0.weight": (256, 64, 3, 3), "upsample.2.bias": (256,), "conv_last.weight": (3, 64, 3, 3)}),
    (lambda: SwinIR(**SWINIR_L), {"layers.8.conv.0.weight": (60, 240, 3, 3), "layers.8.conv.2.weight": (60, 60, 1, 1),
                                  "layers.8.conv.4.weight": (240, 60, 3, 3), "conv_after_body.4.bias": (240,),
                                  "conv_up1.weight": (64, 64, 3, 3), "conv_up2.bias": (64,),
                                  "conv_hr.weight": (64, 64, 3, 3)}),
    (RRDBNet, {"conv_first.weight": (64, 3, 3, 3), "body.22.rdb3.conv5.weight": (64, 192, 3, 3),
               "body.0.rdb1.conv1.weight": (32, 64, 3, 3),
               "conv_body.bias": (64,), "conv_up1.weight": (64, 64, 3, 3), "conv_up2.weight": (64, 64, 3, 3),
               "conv_hr.weight": (64, 64, 3, 3), "conv_last.weight": (3, 64, 3, 3)}),
    (lambda: RRDBNet(scale=2), {"conv_first.weight": (64, 12, 3, 3)}),
    (lambda: RRDBNet(scale=1), {"conv_first.weight": (64, 48, 3, 3)}),
    (SRVGGNetCompact, {"body.0.weight": (64, 3, 3, 3), "body.1.weight": (64,), "body.65.weight": (64,),
                       "body.66.weight": (48, 64, 3, 3)}),
    (UNetDiscriminatorSN, {"conv0.bias": (64,), "conv9.weight": (1, 64, 3, 3), "conv1.weight_orig": (128, 64, 4, 4),
                           "conv3.weight_u": (512,), "conv3.weight_v": (256 * 16,),
                           "conv4.weight_orig": (256, 512, 3, 3),
                           "conv6.weight_orig": (64, 128, 3, 3), "conv8.weight_orig": (64, 64, 3, 3)})])
def test_published_keys_have_their_published_shapes(make, shapes):
    with torch.device("meta"):
        state = make().state_dict()
    assert {k: tuple(state[k].shape) for k in shapes} == shapes


@pytest.mark.fast
def test_swinir_state_dict_has_the_computed_buffers_and_no_mean():
    state = archs.create("swinir-small").state_dict()
    assert state["layers.0.residual_group.blocks.0.attn.relative_position_index"].dtype == torch.int64
    assert not any("mean" in k for k in state)
    index = state["layers.0.residual_group.blocks.0.attn.relative_position_index"]
    # {(i, j): index}, worked out by hand
    known = {(0, 0): 7 * 15 + 7, (0, 1): 7 * 15 + 6, (8, 0): 8 * 15 + 7, (0, 63): 0, (63, 0): 224}
    assert {ij: index[ij].item() for ij in known} == known
    mask = state["layers.1.residual_group.blocks.1.attn_mask"]
    assert mask.shape == (4, 64, 64) and set(mask.unique().tolist()) == {-100.0, 0.0}
    # the first window has no border, the last has two
    assert (mask[0] == 0).all() and (mask[3] == 0).float().mean() == 1 / 4
    net = archs.create("swinir-small").to(torch.float64)
    assert net.mean.dtype == torch.float64


@pytest.mark.fast
def test_initial_weights_follow_the_sources():
    net = archs.create("swinir-small")
    block = net.layers[0].residual_group["blocks"][1]
    assert 0.015 < block.mlp.fc1.weight.std() < 0.025 and 0.015 < block.attn.relative_position_bias_table.std() < 0.025
    assert (block.attn.qkv.bias == 0).all() and (block.norm1.weight == 1).all() and (net.norm.bias == 0).all()
    conv = RRDBNet(num_block=1).body[0].rdb1.conv2
    assert (conv.bias == 0).all() and conv.weight.std().item() == pytest.approx(0.1 * math.sqrt(2 / (96 * 9)), rel=0.05)
    assert (SRVGGNetCompact(8, 1).body[1].weight == 0.25).all()


# The same outputs as spandrel

@pytest.mark.fast
@pytest.mark.parametrize("name, net", [
    ("swinir", lambda: archs.create("swinir-small", pad_mode="swinir")),
    ("swinir real", lambda: SwinIR(**TINY, pad_mode="swinir", upsampler="nearest+conv", resi_connection="3conv")),
    ("swinir x2", lambda: SwinIR(**TINY, pad_mode="swinir", upscale=2, mlp_ratio=4)),
    ("rrdbnet", lambda: archs.create("rrdbnet-small")), ("rrdbnet x2", lambda: archs.create("rrdbnet-small", scale=2)),
    ("rrdbnet x1", lambda: archs.create("rrdbnet-small", scale=1)),
    ("compact", lambda: archs.create("compact-small")),
    ("compact x2", lambda: archs.create("compact-small", upscale=2))])
@pytest.mark.parametrize("layout", ["params", "both"])
def test_spandrel_opens_our_file_and_gives_our_output(name, net, layout, tmp_path):
    net = randomise(net())
    other = randomise(copy.deepcopy(net), seed=1)
    both = {"params_ema": net.state_dict(), "params": other.state_dict()}
    torch.save({"params": net.state_dict()} if layout == "params" else both, tmp_path / "g.pth")
    client = spandrel.ModelLoader().load_from_file(tmp_path / "g.pth")
    for size in ((16, 24), (37, 53)):
        x = image(2, 3, *size)
        with torch.no_grad():
            ours, expected = net(x), client.model.eval()(x)
        assert ours.shape == (2, 3, client.scale * size[0], client.scale * size[1])
        assert ours.std() > 0.05 and (ours - expected).abs().max() < 1e-5 * max(1, ours.abs().max())


def test_full_size_swinir_equals_spandrel(tmp_path):
    net = randomise(SwinIR(pad_mode="swinir"))
    torch.save({"params": net.state_dict()}, tmp_path / "g.pth")
    client = spandrel.ModelLoader().load_from_file(tmp_path / "g.pth").model.eval()
    x = image(1, 3, 13, 21)
    with torch.no_grad():
        ours, expected = net(x), client(x)
    assert ours.std() > 0.05 and (ours - expected).abs().max() < 2e-5 * max(1, ours.abs().max())


def test_full_size_rrdbnet_equals_spandrel(tmp_path):
    net = randomise(RRDBNet())
    torch.save({"params_ema": net.state_dict()}, tmp_path / "g.pth")
    client = spandrel.ModelLoader().load_from_file(tmp_path / "g.pth").model.eval()
    x = image(1, 3, 9, 7)
    with torch.no_grad():
        ours, expected = net(x), client(x)
    assert ours.std() > 0.05 and (ours - expected).abs().max() < 1e-5 * max(1, ours.abs().max())


@pytest.mark.parametrize("name", ["realesr-general-x4v3", "realesr-general-wdn-x4v3", "realesr-animevideov3-x4",
                                  "4xLSDIRCompactC3"])
def test_real_nets_load_and_equal_spandrel_on_a_photo(name):
    path = real_net(name)
    net, info = archs.load_generator(path)
    convs = 32 if "general" in name else 16
    assert (info["arch"], info["key"], info["scale"]) == ("compact", "params", 4) and info["parameters"] == count(net)
    assert info["sizes"] == dict(num_feat=64, num_conv=convs, upscale=4)
    assert all(p.dtype == torch.float32 for p in net.parameters())
    x = photo_crop(slice(40, 77), slice(30, 83))
    client = spandrel.ModelLoader().load_from_file(path).model.float().eval()
    with torch.no_grad():
        ours, expected = net(x), client(x)
    assert (ours - expected).abs().max() < 1e-5
    down = F.interpolate(ours, x.shape[2:], mode="area")
    # shrunk again it is the photo
    assert (down - x).abs().mean() < 0.03


# SwinIR: attention, padding, masks, stochastic depth

def plain_attention(attn, x, mask):
    """Window attention as the paper has it: softmax(q k' / sqrt(d) + bias + mask) v, head by head, window by window."""
    b, nw, n, c = x.shape
    d, side = c // attn.heads, math.isqrt(n)
    out = torch.zeros_like(x)
    for i in range(b):
        for j in range(nw):
            q, k, v = (x[i, j] @ attn.qkv.weight.T + attn.qkv.bias).split(c, dim=1)
            for h in range(attn.heads):
                logits = q[:, h * d:(h + 1) * d] @ k[:, h * d:(h + 1) * d].T / math.sqrt(d)
                for s in range(n):
                    for t in range(n):
                        dy, dx = s // side - t // side + side - 1, s % side - t % side + side - 1
                        logits[s, t] = logits[s, t] + attn.relative_position_bias_table[dy * (2 * side - 1) + dx, h]
                if mask is not None:
                    logits = logits + mask[j]
                out[i, j, :, h * d:(h + 1) * d] = logits.softmax(1) @ v[:, h * d:(h + 1) * d]
    return out @ attn.proj.weight.T + attn.proj.bias


@pytest.mark.fast
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_a_plain_softmax(masked):
    attn = randomise(archs.WindowAttention(12, 4, heads=3))
    x = image(2, 6, 16, 12)
    mask = archs.shift_mask(8, 12, 4, 2) if masked else None
    with torch.no_grad():
        expected = plain_attention(attn, x, mask)
        assert (attn(x, mask) - expected).abs().max() < 1e-5
    # with gradients torch picks another kernel
    y = attn(x, mask)
    assert (y - expected).abs().max() < 1e-5
    y.sum().backward()
    assert attn.relative_position_bias_table.grad.abs().sum() > 0


@pytest.mark.fast
def test_shift_mask_separates_what_the_shift_brought_together():
    h, w, window, shift = 16, 24, 8, 4
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    y, x = (archs.to_windows(p.roll((-shift, -shift), (0, 1))[None, :, :, None], window)[0, :, :, 0] for p in (y, x))

    def neighbours(p):
        """Tokens whose positions before the shift were less than a window apart."""
        return (p[:, :, None] - p[:, None, :]).abs() < window
    assert ((archs.shift_mask(h, w, window, shift) == 0) == (neighbours(y) & neighbours(x))).all()


@pytest.mark.fast
def test_masks_are_made_once_per_size():
    net = randomise(archs.create("swinir-small", pad_mode="swinir"))
    made, real = [], archs.shift_mask
    archs.shift_mask = lambda *args: made.append(args) or real(*args)
    try:
        for size in ((16, 16), (24, 16), (16, 16), (15, 13), (24, 16)):
            net(image(1, 3, *size))
        assert made == [(16, 16, 8, 4), (24, 16, 8, 4)]
        for side in range(32, 96, 8):
            net(image(1, 3, 8, side))
        # the masks of many sizes do not fill the memory
        assert len(net.masks) <= 4
    finally:
        archs.shift_mask = real


@pytest.mark.fast
@pytest.mark.parametrize("size, padded", [((16, 24), (24, 32)), ((13, 17), (16, 24)), ((3, 1), (8, 8))])
def test_hggt_padding_is_one_more_window_by_reflection(size, padded):
    net = randomise(archs.create("swinir-small"))
    x = image(1, 3, *size)
    manual = x.numpy()
    manual = np.pad(manual, ((0, 0), (0, 0), (0, padded[0] - size[0]), (0, padded[1] - size[1])), mode="reflect")
    with torch.no_grad():
        ours = net(x)
        net.pad_mode = "swinir"
        expected = net(torch.from_numpy(manual))[:, :, :4 * size[0], :4 * size[1]]
    assert torch.equal(ours, expected)


@pytest.mark.fast
def test_padding_modes_differ_only_near_the_right_and_bottom_border():
    net = randomise(SwinIR(img_size=16, depths=(2,), embed_dim=24, heads=(2,)))
    x = image(1, 3, 48, 48)
    with torch.no_grad():
        hggt = net(x)
        net.pad_mode = "swinir"
        difference = (hggt - net(x)).abs().amax((0, 1))
    # the reach of windows, shifted windows and convolutions, in HR pixels
    near = 4 * (8 + 4 + 8)
    assert difference.max() > 1e-3 and difference[:-near, :-near].max() < 1e-5
    assert difference[:, -4:].max() > 1e-3 and difference[-4:].max() > 1e-3


@pytest.mark.fast
def test_stochastic_depth_of_a_sample_depends_on_its_own_seed_alone():
    net = randomise(SwinIR(**TINY, drop_path=0.5)).train()
    x, seeds = image(4, 3, 16, 16), [11, 12, 13, 2 ** 63]
    def run(x, seeds):
        return net(x, net.draw_keep(seeds))
    together = run(x, seeds)
    assert torch.equal(run(x, seeds), together)
    torch.manual_seed(5)
    np.random.seed(5)
    order = [2, 0, 3, 1]
    assert (run(x[order], [seeds[i] for i in order]) - together[order]).abs().max() < 1e-5
    for i in range(4):
        assert (run(x[i:i + 1], seeds[i:i + 1]) - together[i:i + 1]).abs().max() < 1e-5
    changed = (run(x, [11, 12, 99, 2 ** 63]) - together).abs().amax((1, 2, 3)) > 1e-3
    assert changed.tolist() == [False, False, True, False]
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    run(x, seeds)
    assert torch.equal(state[0], torch.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()


@pytest.mark.fast
def test_stochastic_depth_has_linear_rates_own_draws_per_branch_and_unit_expectation():
    net = SwinIR(**TINY, drop_path=0.4).train()
    n = 4000
    keep = net.draw_keep(range(n)).double()  # (5 blocks, n samples, 2 branches)
    for block, rate in enumerate([0.0, 0.1, 0.2, 0.3, 0.4]):
        assert sorted(keep[block].unique().tolist()) == pytest.approx([0, 1 / (1 - rate)] if rate else [1], rel=1e-6)
        assert ((keep[block] == 0).double().mean(0) - rate).abs().max() < 4 * math.sqrt(0.25 / n)
        assert (keep[block].mean(0) - 1).abs().max() < 0.06
    both = (keep[4] == 0).all(1).double().mean()
    # the branches are independent: 0.4 * 0.4
    assert abs(both - 0.16) < 0.03
    assert torch.equal(keep[:, 7], net.draw_keep([7])[:, 0].double())


@pytest.mark.fast
def test_a_dropped_branch_leaves_the_residual_alone_and_a_kept_one_is_scaled():
    block = randomise(archs.SwinBlock(12, 4, 2, 2.0, shift=0, img_size=8))
    x = image(4, 8, 8, 12)
    keep = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.25], [1.0, 1.0]])
    with torch.no_grad():
        y = block(x, None, keep)
        attended = block.attention(block.norm1(x), None)
    assert torch.equal(y[0], x[0])
    assert torch.allclose(y[1], x[1] + 2 * attended[1], atol=1e-6)
    assert torch.allclose(y[2], x[2] + 1.25 * block.mlp(block.norm2(x[2])), atol=1e-6)
    assert torch.allclose(y[3], block(x, None, None)[3], atol=1e-6)


@pytest.mark.fast
def test_stochastic_depth_needs_draws_in_training_and_ignores_them_in_evaluation():
    net = randomise(archs.create("swinir-small"))
    x = image(2, 3, 16, 16)
    assert torch.equal(net(x), net(x, net.draw_keep([1, 2])))
    net.train()
    for keep, message in ((None, "got None"), (net.draw_keep([1]), r"needs keep, \(4, 2, 2\), got \(4, 1, 2\)")):
        with pytest.raises(ValueError, match=message):
            net(x, keep)
    net.drop_path = 0
    assert torch.equal(net(x), net.eval()(x))


@pytest.mark.fast
def test_a_mask_made_under_inference_mode_serves_training():
    net = archs.create("swinir-small", drop_path=0)
    with torch.inference_mode():
        net(image(1, 3, 16, 16))
    net.train()(image(1, 3, 16, 16)).sum().backward()


@pytest.mark.fast
def test_generators_keep_float_images_under_bf16_autocast():
    x = image(1, 3, 16, 16)
    for name in ("swinir-small", "rrdbnet-small", "compact-small"):
        net = randomise(archs.create(name))
        with torch.no_grad():
            exact = net(x)
            with torch.autocast("cpu", torch.bfloat16):
                sr = net(x)
        assert sr.dtype == torch.float32 and 0 < (sr - exact).abs().max() < 0.1 * exact.abs().max()
        # a bf16 image has far fewer values
        assert len(sr.unique()) > 0.9 * sr.numel()


@pytest.mark.parametrize("name, kinds", [("swinir-small", 2), ("rrdbnet-small", 1), ("compact-small", 1)])
def test_blocks_are_compiled_once_for_all_of_a_kind(name, kinds, monkeypatch):
    """Shifted and unshifted blocks of SwinIR are two kinds; new draws of its stochastic depth compile nothing again."""
    import torch._dynamo.testing
    torch._dynamo.reset()
    plain = randomise(archs.create(name)).train()
    plain.drop_path = 0.3
    net, counter = copy.deepcopy(plain), torch._dynamo.testing.CompileCounter()
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend=counter))
    archs.compile_blocks(net)
    for step in range(3):
        x = image(2, 3, 16, 16, seed=step)
        draws = [net.draw_keep([step, 7 ** step])] if name == "swinir-small" else []
        assert (net(x, *draws) - plain(x, *draws)).abs().max() < 1e-6
        assert counter.frame_count == kinds
    torch._dynamo.reset()


# Discriminator

def discriminator_written_out(state, x):
    """Forward with spectral norms from a singular value decomposition, leaky slope 0.2."""
    def act(t):
        return torch.where(t > 0, t, 0.2 * t)

    def conv(i, t, stride=1):
        w = state[f"conv{i}.weight_orig"]
        return act(F.conv2d(t, w / torch.linalg.svdvals(w.flatten(1))[0], padding=1, stride=stride))

    def double(t):
        return F.interpolate(t, (2 * t.shape[2], 2 * t.shape[3]), mode="bilinear")
    x0 = act(F.conv2d(x, state["conv0.weight"], state["conv0.bias"], padding=1))
    x1 = conv(1, x0, stride=2)
    x2 = conv(2, x1, stride=2)
    x3 = conv(3, x2, stride=2)
    y = conv(6, double(conv(5, double(conv(4, double(x3)) + x2)) + x1)) + x0
    return F.conv2d(conv(8, conv(7, y)), state["conv9.weight"], state["conv9.bias"], padding=1)


def test_discriminator_equals_a_written_out_forward():
    net = UNetDiscriminatorSN(8)
    randomise(net).train()
    x = image(2, 3, 24, 40)
    # power iterations until the norms are exact
    for _ in range(300):
        net(x[:1, :, :8, :8])
    net.eval()
    with torch.no_grad():
        logits = net(x)
        expected = discriminator_written_out(net.state_dict(), x)
    assert logits.shape == (2, 1, 24, 40) and logits.std() > 1e-3
    assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.fast
def test_discriminator_file_loads_back_and_gives_the_same_logits(tmp_path):
    net = UNetDiscriminatorSN(8).train()
    x = image(1, 3, 16, 16)
    net(x)
    torch.save({"params": net.state_dict()}, tmp_path / "d.pth")
    again = UNetDiscriminatorSN(8)
    assert archs.load_weights(again, tmp_path / "d.pth") == "params"
    assert torch.equal(again.eval()(x), net.eval()(x))
    with pytest.raises(ValueError, match="d.pth: a discriminator, not a generator"):
        archs.load_generator(tmp_path / "d.pth")


@pytest.mark.fast
def test_discriminator_refuses_sides_that_are_no_multiple_of_8():
    with pytest.raises(ValueError, match="16 x 20 pixels, both sides must be multiples of 8"):
        UNetDiscriminatorSN(4)(image(1, 3, 16, 20))


# Perceptual loss

@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """torchvision's vgg19 with random weights, and files of it in both layouts."""
    with torch.device("meta"):
        net = vgg19()
    # no classifier: it has 124 of the 144 million parameters
    net.classifier = torch.nn.Sequential()
    net = randomise(net.to_empty(device="cpu"))
    folder = tmp_path_factory.mktemp("vgg")
    whole = net.state_dict() | {"classifier.0.weight": torch.zeros(2, 2), "classifier.0.bias": torch.zeros(2)}
    torch.save(whole, folder / "whole.pth")
    torch.save({k.removeprefix("features."): v for k, v in net.state_dict().items()}, folder / "features.pth")
    return net, folder


def vgg_loss_written_out(net, sr, gt):
    layers = list(net.features)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    a, b, total = (sr - mean) / std, (gt - mean) / std, 0.0
    names, block, conv = {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1.0, "conv4_4": 1.0, "conv5_4": 1.0}, 1, 0
    for layer in layers:
        if isinstance(layer, torch.nn.MaxPool2d):
            block, conv = block + 1, 0
        a, b = layer(a), layer(b)
        if isinstance(layer, torch.nn.Conv2d):
            conv += 1
            if f"conv{block}_{conv}" in names:
                total = total + names.pop(f"conv{block}_{conv}") * (a - b).abs().mean()
                a, b = a.clone(), b.clone()
    assert not names
    return total


@pytest.mark.parametrize("layout", ["whole", "features"])
def test_vgg_loss_equals_one_written_with_torchvision(vgg, layout):
    net, folder = vgg
    loss = VGGFeatureLoss(folder / f"{layout}.pth")
    # sr beyond [0, 1]: it is not clamped
    sr, gt = 2 * image(2, 3, 32, 48) - 0.5, image(2, 3, 32, 48, seed=1)
    with torch.no_grad():
        expected = vgg_loss_written_out(net, sr, gt)
        assert expected > 0.1 and loss(sr, gt).item() == pytest.approx(expected.item(), rel=1e-5)
        assert loss(sr, sr).item() == 0
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss(sr, gt)
    # differences are taken in fp32, of features with the 8 bits of bf16
    assert inside.dtype == torch.float32 and inside != expected
    assert inside.item() == pytest.approx(expected.item(), rel=0.02)
    assert any((tap < 0).any() for tap in loss.taps(sr)) and all((tap < 0).any() for tap in loss.taps(sr))


def test_vgg_gradient_reaches_sr_and_neither_gt_nor_the_network(vgg):
    loss = VGGFeatureLoss(vgg[1] / "features.pth").train()
    assert not loss.training and not any(p.requires_grad for p in loss.parameters())
    sr, gt = image(1, 3, 16, 16).requires_grad_(), image(1, 3, 16, 16, seed=1).requires_grad_()
    loss(sr, gt).backward()
    assert sr.grad.abs().sum() > 0 and gt.grad is None
    with pytest.raises(ValueError, match="8 x 32 pixels, vgg19 needs at least 16 x 16"):
        loss(image(1, 3, 8, 32), image(1, 3, 8, 32))


def test_vgg_weights_that_do_not_fit_are_named(vgg, tmp_path):
    whole = torch.load(vgg[1] / "whole.pth", weights_only=True)
    torch.save({k: v for k, v in whole.items() if k != "features.34.bias"}, tmp_path / "short.pth")
    torch.save(whole | {"features.0.weight": torch.zeros(64, 1, 3, 3)}, tmp_path / "grey.pth")
    torch.save(whole | {"features.0.weight": torch.zeros(64, 3, 3, 3, dtype=torch.uint8)}, tmp_path / "packed.pth")
    torch.save({"params": archs.create("compact-small").state_dict()}, tmp_path / "generator.pth")
    for name, message in (("short", r"short.pth: .* 1 keys are missing: features.34.bias"),
                          ("generator", r"generator.pth: .* keys are missing: 0.weight, 0.bias"),
                          ("grey", r"features.0.weight is torch.float32 \(64, 1, 3, 3\)"),
                          ("packed", "features.0.weight is torch.uint8")):
        with pytest.raises(ValueError, match=message):
            VGGFeatureLoss(tmp_path / f"{name}.pth")
    with pytest.raises(ValueError, match="absent.pth: no such weights file"):
        VGGFeatureLoss(tmp_path / "absent.pth")


@pytest.mark.fast
def test_vgg_without_weights_or_network_says_what_to_do(monkeypatch, tmp_path):
    import urllib.request
    from urllib.error import URLError

    def offline(*args, **kwargs):
        raise URLError("no route to host")
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr("torch.hub.urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError) as error:
        VGGFeatureLoss()
    message = str(error.value)
    assert "\n" not in message
    folder = str(tmp_path / "hub" / "checkpoints")
    for part in ("vgg19-dcbb9e9d.pth", folder, "--vgg-weights FILE", "--lambda-p 0", "no route to host"):
        assert part in message


def test_vgg_takes_the_downloaded_file_from_the_torch_hub_folder(vgg, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "vgg19-dcbb9e9d.pth").write_bytes((vgg[1] / "whole.pth").read_bytes())
    loss = VGGFeatureLoss()
    assert torch.equal(loss.features[34].weight, vgg[0].features[34].weight)
    (tmp_path / "hub" / "checkpoints" / "vgg19-dcbb9e9d.pth").write_bytes(b"half a download")
    with pytest.raises(ValueError, match="vgg19-dcbb9e9d.pth"):
        VGGFeatureLoss()


# Weight files

@pytest.mark.fast
def test_read_weights_prefers_ema_then_params_then_the_bare_dict(tmp_path):
    ema, raw = {"a": torch.ones(2)}, {"a": torch.zeros(2)}
    both = {"params": raw, "params_ema": ema}
    cases = ((both, None, "params_ema", 1), ({"params": raw}, None, "params", 0), (ema, None, "none", 1),
             (both, "params", "params", 0), (both, "params_ema", "params_ema", 1), (raw, "none", "none", 0))
    for content, key, expected, value in cases:
        torch.save(content, tmp_path / "w.pth")
        state, used = archs.read_weights(tmp_path / "w.pth", key)
        assert used == expected and state["a"].tolist() == [value] * 2


@pytest.mark.fast
def test_read_weights_drops_the_ddp_prefix_and_halves_become_floats(tmp_path):
    state = {"module.a": torch.tensor([0.1], dtype=torch.float16), "module.b": torch.tensor([3]),
             "c": torch.nn.Parameter(torch.ones(1))}
    torch.save({"params": state}, tmp_path / "w.pth")
    read, _ = archs.read_weights(tmp_path / "w.pth")
    assert list(read) == ["a", "b", "c"] and read["a"].dtype == torch.float32 and read["b"].dtype == torch.int64
    assert read["a"].item() == torch.tensor(0.1, dtype=torch.float16).item()


@pytest.mark.fast
def test_safetensors_files_load_and_without_the_package_the_message_says_so(tmp_path, monkeypatch):
    from safetensors.torch import save_file
    net = randomise(archs.create("compact-small"))
    save_file(net.state_dict(), tmp_path / "g.safetensors")
    loaded, info = archs.load_generator(tmp_path / "g.safetensors")
    assert info["key"] == "none" and torch.equal(loaded(image(1, 3, 8, 8)), net(image(1, 3, 8, 8)))
    with pytest.raises(ValueError, match="no key 'params_ema' in it, it has body.0"):
        archs.read_weights(tmp_path / "g.safetensors", "params_ema")
    (tmp_path / "bad.safetensors").write_bytes((tmp_path / "g.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="bad.safetensors: not a readable weights file"):
        archs.read_weights(tmp_path / "bad.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        archs.read_weights(tmp_path / "g.safetensors")


@pytest.mark.fast
def test_files_that_hold_no_weights_are_refused_in_one_line(tmp_path):
    good = {"params": archs.create("compact-small").state_dict()}
    torch.save(good, tmp_path / "good.pth")
    torch.save(good, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    whole, legacy = (tmp_path / "good.pth").read_bytes(), (tmp_path / "legacy.pth").read_bytes()
    cases = {"empty": b"", "text": b"<!DOCTYPE html> not found", "half": whole[:len(whole) // 2], "cut": whole[:-10],
             "legacy": legacy[:len(legacy) // 2], "short": legacy[:40], "noise": bytes(range(256)) * 4}
    for name, content in cases.items():
        (tmp_path / f"{name}.pth").write_bytes(content)
    torch.save({"net_g": good["params"], "step": 3}, tmp_path / "checkpoint.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({}, tmp_path / "nothing.pth")
    torch.save({0: torch.zeros(1)}, tmp_path / "numbers.pth")
    torch.save({"params": torch.zeros(3)}, tmp_path / "tensor.pth")
    torch.save({"a": Path("x")}, tmp_path / "object.pth")
    messages = dict.fromkeys((*cases, "object"), "not a readable weights file")
    messages |= {"checkpoint": r"no state dict \(it holds net_g, step\); .* not a training checkpoint; "
                               "--weights-key net_g looks into net_g",
                 "list": "it holds list", "nothing": "it holds nothing",
                 "numbers": "no state dict", "tensor": r"none of SwinIR.*\(first keys: params\)"}
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message) as error:
            archs.load_generator(tmp_path / f"{name}.pth")
        assert "\n" not in str(error.value) and f"{name}.pth" in str(error.value)
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(ValueError, match="no such weights file"):
            archs.read_weights(path)
    with pytest.raises(ValueError, match="good.pth: no key 'params_ema' in it, it has params"):
        archs.load_generator(tmp_path / "good.pth", key="params_ema")


def esrgan_names(state, blocks, trunk=False):
    """RRDBNet's keys as ESRGAN first named them (trunk: as it did later)."""
    first = {"conv_first": "model.0", "conv_body": f"model.1.sub.{blocks}", "conv_up1": "model.3",
             "conv_up2": "model.6", "conv_hr": "model.8", "conv_last": "model.10"}
    later = {"conv_body": "trunk_conv", "conv_up1": "upconv1", "conv_up2": "upconv2", "conv_hr": "HRconv"}
    old = {}
    for key, value in state.items():
        layer, end = key.rsplit(".", 1)
        if layer.startswith("body"):
            _, block, rdb, conv = layer.split(".")
            rdb = rdb.upper()
            layer = f"RRDB_trunk.{block}.{rdb}.{conv}" if trunk else f"model.1.sub.{block}.{rdb}.{conv}.0"
        else:
            layer = (later if trunk else first).get(layer, layer)
        old[f"{layer}.{end}"] = value
    return old


@pytest.mark.fast
@pytest.mark.parametrize("scale", [4, 2, 1])
def test_esrgans_first_key_names_prefixes_and_wrappers(scale, tmp_path):
    net = randomise(archs.create("rrdbnet", scale=scale, num_feat=8, num_block=2, num_grow=4))
    state, x = net.state_dict(), image(1, 3, 8, 8)

    def before(prefix, state=state):
        return {prefix + k: v for k, v in state.items()}
    lightning = before("net_g.") | {"net_d.conv0.weight": torch.zeros(2), "loss.x": torch.zeros(1)}
    contents = {"first": esrgan_names(state, 2), "trunk": esrgan_names(state, 2, trunk=True),
                "compiled": before("_orig_mod."), "both": before("module._orig_mod."),
                "twice": before("_orig_mod.module.module."), "blocks": {
                    k.replace("body.0.", "body.0._orig_mod."): v for k, v in state.items()},
                "wrapped": {"state_dict": state, "epoch": 3}, "model_state": {"model_state_dict": before("module.")},
                "model": {"model": esrgan_names(state, 2)}, "nested": {"model": {"params_ema": state, "params": {}}},
                "lightning": {"state_dict": lightning}, "compiled_lightning": {
                    "state_dict": before("net_g.", before("_orig_mod."))}}
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.PTH")
        loaded, info = archs.load_generator(tmp_path / f"{name}.PTH")
        assert torch.equal(loaded(x), net(x)) and info["scale"] == scale, name
    assert archs.read_weights(tmp_path / "nested.PTH")[1] == "model.params_ema"
    from safetensors.torch import save_file
    save_file(state, tmp_path / "w.SAFETENSORS")
    assert torch.equal(archs.load_generator(tmp_path / "w.SAFETENSORS")[0](x), net(x))


@pytest.mark.fast
def test_a_key_goes_into_nested_dictionaries(tmp_path):
    ones, zeros = ({"a": torch.full((1,), v)} for v in (1.0, 0.0))
    torch.save({"nets": {"g": zeros, "ema": {"g": ones}}, "step": 3}, tmp_path / "w.pth")
    assert archs.read_weights(tmp_path / "w.pth", "nets.ema.g")[0]["a"].item() == 1
    assert archs.read_weights(tmp_path / "w.pth", "nets.g") == (zeros, "nets.g")
    torch.save({"nets.g": ones, "nets": {"g": zeros}}, tmp_path / "dot.pth")
    assert archs.read_weights(tmp_path / "dot.pth", "nets.g") == (ones, "nets.g")
    for key, names in (("nets.d", "nets, step"), ("net", "nets, step"), ("step.a", "nets, step"), ("nets", None)):
        with pytest.raises(ValueError, match="no state dict" if names is None else f"no key '{key}' in it, it has"):
            archs.read_weights(tmp_path / "w.pth", key)


@pytest.mark.fast
def test_what_does_not_load_is_told_in_one_true_sentence(tmp_path):
    small = dict(num_feat=8, num_block=1, num_grow=4)
    rrdb, compact, swinir = (archs.create(*words, **options).state_dict() for words, options in (
        (["rrdbnet"], small), (["compact-small"], {}), (["swinir-small"], {})))

    def grey(state, first):
        return state | {first: state[first][:, :1].clone()}
    without_up2 = {k: v for k, v in rrdb.items() if "conv_up2" not in k}
    x8 = rrdb | {k.replace("up2", "up3"): v for k, v in rrdb.items() if "conv_up2" in k}
    cases = {"rrdb": (grey(rrdb, "conv_first.weight"), "an RRDBNet for images of 1 channel; only those for RGB load"),
             "compact": (grey(compact, "body.0.weight"), "an SRVGGNetCompact for images of 1 channel;"),
             "swinir": (grey(swinir, "conv_first.weight"), "a SwinIR for images of 1 channel;"),
             "x2": (without_up2, "an RRDBNet that enlarges by 2; only those with two steps of 2 load"),
             "x8": (esrgan_x8(x8), "an RRDBNet that enlarges by 8"),
             "out": (compact | {f"body.14.{end}": compact[f"body.14.{end}"][:16] for end in ("weight", "bias")},
                     "an SRVGGNetCompact whose last layer has 16 channels; only those for RGB load"),
             "flat": (rrdb | {"conv_first.weight": torch.zeros(8)}, r"an incomplete state dict \(first problem: "),
             "none": (rrdb | {"ema": None}, r"no state dict \(ema is no tensor but NoneType\)"),
             "meta": ({k: v.to("meta") for k, v in rrdb.items()}, "no state dict"),
             "more": (rrdb | {"n_averaged": torch.zeros(1)},
                      r"the file is rrdbnet \(.*\); 1 key differs: n_averaged is not expected")}
    for name, (state, message) in cases.items():
        torch.save(state, tmp_path / f"{name}.pth")
        with pytest.raises(runs.UserError, match=f"{name}.pth: {message}"):
            archs.load_generator(tmp_path / f"{name}.pth")


@pytest.mark.fast
def test_a_torchscript_archive_is_called_one(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 1), torch.zeros(1, 2)), tmp_path / "net.pt")
    with pytest.raises(runs.UserError, match="net.pt: a TorchScript archive.*; save the network's state_dict"):
        archs.load_generator(tmp_path / "net.pt")


def esrgan_x8(state):
    old = esrgan_names(state, 1)
    old |= {f"model.9.{end}": old.pop(f"conv_up3.{end}") for end in ("weight", "bias")}
    for was, now in ((10, 13), (8, 11)):
        old |= {f"model.{now}.{end}": old.pop(f"model.{was}.{end}") for end in ("weight", "bias")}
    return old


@pytest.mark.fast
def test_a_pickled_module_is_refused_and_nothing_of_it_runs(tmp_path):
    class Bomb(torch.nn.Module):
        def __reduce__(self):
            return Path.write_text, (tmp_path / "ran", "it ran")
    torch.save(archs.create("compact-small"), tmp_path / "module.pth")
    torch.save({"params": Bomb()}, tmp_path / "bomb.pth")
    torch.save({"net": archs.create("compact-small").state_dict(), "where": Path("x")}, tmp_path / "object.pth")
    for name, what in (("module", "archs.SRVGGNetCompact"), ("bomb", "getattr"), ("object", "pathlib.")):
        with pytest.raises(runs.UserError, match=f"{name}.pth: .*it holds a pickled {what}") as error:
            archs.read_weights(tmp_path / f"{name}.pth")
        text = str(error.value)
        assert text.endswith("save the network's state_dict() instead") and "\x1b" not in text and "\n" not in text
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not CASES.exists(), reason="no ../shared/cases")
def test_the_checkpoints_of_shared_cases():
    nets = [archs.load_generator(CASES / f"{name}.pth")[0] for name in ("esrgan_old", "orig_mod", "state_dict")]
    one, *others = (net(image(1, 3, 8, 8)) for net in nets)
    assert all(torch.equal(one, other) for other in others)
    for name in ("gray", "full_module"):
        with pytest.raises(runs.UserError):
            archs.load_generator(CASES / f"{name}.pth")


@pytest.mark.fast
def test_training_starts_in_the_sizes_of_the_file(tmp_path):
    cases = (("rrdbnet", dict(num_feat=8, num_block=6, num_grow=4)), ("compact", dict(num_feat=8, num_conv=16)),
             ("swinir", TINY | dict(upsampler="nearest+conv", resi_connection="3conv")))
    for arch, sizes in cases:
        net = randomise(archs.create(arch, **sizes)).eval()
        torch.save(net.state_dict(), tmp_path / "g.pth")
        loaded, info = archs.load_start(tmp_path / "g.pth", "--init", f"{arch}-small")
        assert sizes.items() <= info["sizes"].items()
        again = archs.create(arch, **info["sizes"])
        archs.load_strict(again, loaded.state_dict(), "copy")
        assert arch != "swinir" or loaded.pad_mode == again.pad_mode == "swinir"
    torch.save(archs.create("rrdbnet", scale=2, num_feat=8, num_block=1).state_dict(), tmp_path / "x2.pth")
    for file, arch, text in (("g", "rrdbnet", "the file is swinir x4, and --arch rrdbnet is RRDBNet x4"),
                             ("x2", "rrdbnet", "the file is rrdbnet x2, and")):
        with pytest.raises(runs.UserError, match=f"--init .*{file}.pth: {text}"):
            archs.load_start(tmp_path / f"{file}.pth", "--init", arch)


@pytest.mark.fast
@pytest.mark.parametrize("arch, sizes, scale", [
    ("swinir", dict(upscale=4, img_size=48, window=8, depths=(2, 1, 3), embed_dim=24, heads=(2, 3, 4), mlp_ratio=3.0,
                    upsampler="pixelshuffle", resi_connection="1conv", pad_mode="hggt"), 4),
    ("swinir", dict(upscale=4, img_size=16, window=4, depths=(2,), embed_dim=16, heads=(2,), mlp_ratio=2.0,
                    upsampler="nearest+conv", resi_connection="3conv", pad_mode="swinir"), 4),
    ("swinir", dict(upscale=3, img_size=24, window=8, depths=(2,), embed_dim=15, heads=(3,), mlp_ratio=1.4,
                    upsampler="pixelshuffle", resi_connection="1conv", pad_mode="hggt"), 3),
    ("rrdbnet", dict(scale=4, num_feat=16, num_block=3, num_grow=8), 4),
    ("rrdbnet", dict(scale=2, num_feat=8, num_block=1, num_grow=4), 2),
    ("rrdbnet", dict(scale=1, num_feat=8, num_block=12, num_grow=4), 1),
    ("compact", dict(num_feat=8, num_conv=1, upscale=4), 4), ("compact", dict(num_feat=5, num_conv=11, upscale=2), 2)])
def test_load_generator_recognises_every_size(arch, sizes, scale, tmp_path):
    net = randomise(archs.create(arch, **sizes))
    torch.save({"params_ema": net.state_dict()}, tmp_path / "g.pth")
    loaded, info = archs.load_generator(tmp_path / "g.pth")
    if arch == "swinir":
        # a quotient, hidden / embed_dim
        info["sizes"]["mlp_ratio"] = round(info["sizes"]["mlp_ratio"], 6)
    assert info == dict(arch=arch, key="params_ema", scale=scale, parameters=count(net), sizes=sizes)
    assert not loaded.training
    x = image(1, 3, 11, 13)
    assert torch.equal(loaded(x), net(x)) and loaded(x).shape == (1, 3, 11 * scale, 13 * scale)


@pytest.mark.fast
def test_pad_mode_follows_the_tail_unless_given(tmp_path):
    for upsampler, default in (("pixelshuffle", "hggt"), ("nearest+conv", "swinir")):
        torch.save(SwinIR(**TINY, upsampler=upsampler).state_dict(), tmp_path / "g.pth")
        assert archs.load_generator(tmp_path / "g.pth")[0].pad_mode == default
        for pad_mode in ("hggt", "swinir"):
            assert archs.load_generator(tmp_path / "g.pth", pad_mode=pad_mode)[0].pad_mode == pad_mode
    with pytest.raises(ValueError, match="g.pth: SwinIR: pad_mode 'zero'"):
        archs.load_generator(tmp_path / "g.pth", pad_mode="zero")


@pytest.mark.fast
def test_files_of_unknown_or_incomplete_architecture_are_named(tmp_path):
    compact, swinir = archs.create("compact-small").state_dict(), archs.create("swinir-small").state_dict()

    def without(state, part):
        return {k: v for k, v in state.items() if part not in k}
    cases = {"vgg": ({"features.0.weight": torch.zeros(2, 2)},
                     "none of SwinIR, RRDBNet and SRVGGNetCompact .*features.0.weight"),
             "adapter": ({"body.0.lora_A": torch.zeros(2, 2)}, "a LoRA adapter"),
             "light": (without(swinir, "conv_before"), "lightweight, denoising or JPEG SwinIR"),
             "part": (without(swinir, "conv_first"), "incomplete state dict .*conv_first.weight"),
             "hole": (without(compact, "body.2.bias"), "1 key differs: body.2.bias is missing"),
             "more": (compact | {"extra": torch.zeros(1)}, "extra is not expected")}
    for name, (state, message) in cases.items():
        torch.save({"params": state}, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=f"{name}.pth: .*{message}") as error:
            archs.load_generator(tmp_path / f"{name}.pth")
        assert "\n" not in str(error.value)


@pytest.mark.fast
def test_load_weights_is_strict_and_says_what_the_file_is(tmp_path):
    net = randomise(archs.create("compact-small"))
    ema = randomise(copy.deepcopy(net), 1)
    torch.save({"params": net.state_dict(), "params_ema": ema.state_dict()}, tmp_path / "g.pth")
    other = archs.create("compact-small")
    assert archs.load_weights(other, tmp_path / "g.pth", "params") == "params"
    assert torch.equal(other.body[0].weight, net.body[0].weight)
    assert archs.load_weights(other, tmp_path / "g.pth") == "params_ema"
    assert not torch.equal(other.body[0].weight, net.body[0].weight)
    for target, message in (
            (archs.create("compact"),
             r"file is compact \(num_feat 32, num_conv 6, upscale 4\), the network is compact \(num_feat 64"),
            (archs.create("rrdbnet-small"),
             r"file is compact .*, the network is rrdbnet \(scale 4, num_feat 32, num_block 2"),
            (archs.create("compact-small", upscale=2),
             r"the first: body.14.weight is \(48, 32, 3, 3\) there, \(12, 32, 3, 3\) here")):
        untouched = copy.deepcopy(target.state_dict())
        with pytest.raises(ValueError, match=message) as error:
            archs.load_weights(target, tmp_path / "g.pth")
        assert "\n" not in str(error.value)
        # nothing was half loaded
        assert all(torch.equal(v, untouched[k]) for k, v in target.state_dict().items())


@pytest.mark.fast
def test_bad_options_are_refused():
    cases = ((dict(upsampler="bicubic"), "upsampler 'bicubic'"), (dict(pad_mode="zero"), "pad_mode 'zero'"),
             (dict(upscale=5), "upscale 5"), (dict(upscale=3, upsampler="nearest+conv"), "upscale 3"),
             (dict(drop_path=1.0), "drop_path 1.0"), (dict(img_size=20), "img_size 20"),
             (dict(img_size=8), "img_size 8"),
             (dict(heads=(7,) * 6), "divide embed_dim 180"), (dict(heads=(6,)), "as many as depths"))
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            SwinIR(**options)
    with pytest.raises(ValueError, match="scale 3"):
        RRDBNet(scale=3)


def test_every_arch_runs_on_odd_and_tiny_images_and_importing_is_quick():
    for name in ARCHS:
        if name.endswith("-small"):
            net = randomise(archs.create(name))
            for h, w in ((1, 1), (2, 5), (9, 13)):
                sr = net(image(1, 3, h, w))
                assert sr.shape == (1, 3, 4 * h, 4 * w) and sr.isfinite().all()
    code = "import sys, archs; sys.exit(any(m in sys.modules for m in ('torchvision', 'safetensors', 'torch._dynamo')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


# Tiles

@pytest.mark.fast
@pytest.mark.parametrize("size, tile, overlap", [
    ((37, 53), 24, 9), ((100, 33), 32, 8), ((64, 64), 64, 16),
    ((41, 40), 40, 16), ((57, 130), 33, 0), ((1, 90), 40, 12)])
def test_tile_weights_sum_to_one_and_tiles_cover_the_image(size, tile, overlap):
    class Nearest(torch.nn.Module):
        def forward(self, x):
            assert max(x.shape[2:]) <= tile
            return F.interpolate(x, scale_factor=3, mode="nearest")
    x = image(2, 3, *size)
    tiled = archs.upscale_tiled(Nearest(), x, scale=3, tile=tile, overlap=overlap)
    assert (tiled - F.interpolate(x, scale_factor=3)).abs().max() < 1e-6


@pytest.mark.fast
def test_tiles_give_the_untiled_pixels_once_the_overlap_exceeds_the_field_of_view():
    # a network that sees 4 pixels in every direction
    net = randomise(SRVGGNetCompact(8, 2))
    x = image(1, 3, 61, 83)
    whole = archs.upscale_tiled(net, x, tile=0)
    with torch.no_grad():
        assert torch.equal(whole, net(x))
    assert (archs.upscale_tiled(net, x, tile=40, overlap=16) - whole).abs().max() < 1e-5
    narrow = (archs.upscale_tiled(net, x, tile=24, overlap=2) - whole).abs().amax((0, 1))
    # so the comparison can tell a seam
    assert narrow.max() > 1e-3
    # far from every seam
    assert narrow[:4 * 15, :4 * 15].max() < 1e-5


@pytest.mark.parametrize("name", ["4xLSDIRCompactC3", "realesr-animevideov3-x4", "realesr-general-x4v3",
                                  "realesr-general-wdn-x4v3"])
def test_seams_of_real_nets_fall_with_the_overlap_to_below_a_grey_level(name):
    """On 136 x 200 LR pixels of a photograph, with one vertical seam. The general networks see 34 pixels far."""
    net, _ = archs.load_generator(real_net(name))
    x = photo_crop(slice(0, 136), slice(0, 200))
    whole = archs.upscale_tiled(net, x, tile=0).clamp(0, 1)

    def largest_error(overlap):
        """In grey levels."""
        tiled = archs.upscale_tiled(net, x, tile=136, overlap=overlap).clamp(0, 1)
        return (tiled - whole).abs().max().item() * 255
    seams = [largest_error(overlap) for overlap in (16, 32, archs.OVERLAP)]
    assert seams == sorted(seams, reverse=True) and seams[0] > 0.3 and seams[-1] < 0.2


def test_tiles_in_batches_give_the_same_picture():
    torch.manual_seed(0)
    net, x, sizes = archs.create("compact-small").eval(), torch.rand(2, 3, 70, 124), []
    net.register_forward_hook(lambda module, given, made: sizes.append(len(given[0])))
    one, many = (archs.upscale_tiled(net, x, tile=40, overlap=16, batch=n) for n in (1, 4))
    assert torch.allclose(one, many, atol=1e-6) and max(sizes) == 2 * 4 and sum(n == 2 for n in sizes) > 8


@pytest.mark.fast
def test_swinir_tiles_keep_the_window_grid():
    starts = [start for tile in (48, 50, 57) for start, _, _ in archs.tile_weights(200, tile, 16, 4)]
    assert all(start % 8 == 0 for start in starts) and len(starts) > 12
    net = randomise(archs.create("swinir-small"))
    x = image(1, 3, 70, 40)
    sr = archs.upscale_tiled(net, x, tile=48, overlap=16)
    assert sr.shape == (1, 3, 280, 160) and not sr.requires_grad
    assert (sr - archs.upscale_tiled(net, x, tile=0)).abs().mean() < 0.05


@pytest.mark.fast
def test_out_of_memory_halves_the_tile_down_to_a_minimum_and_then_raises():
    class Small(torch.nn.Module):
        def __init__(self, limit):
            super().__init__()
            self.limit, self.seen = limit, []

        def forward(self, x):
            self.seen.append(max(x.shape[2:]))
            if self.seen[-1] > self.limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return F.interpolate(x, scale_factor=4, mode="nearest")
    x = image(1, 3, 300, 200)
    for tile, sides in ((0, [300, 150, 75]), (256, [256, 128, 64]), (1024, [300, 150, 75])):
        net = Small(limit=100)
        sr = archs.upscale_tiled(net, x, tile=tile, overlap=16)
        assert (sr - F.interpolate(x, scale_factor=4)).abs().max() < 1e-6
        assert list(dict.fromkeys(s for s in net.seen if s in sides)) == sides
    net = Small(limit=10)
    with pytest.raises(MemoryError, match="does not suffice for a tile of 136 pixels .CUDA out of memory"):
        archs.upscale_tiled(net, x, tile=256)
    assert net.seen == [256, 136]
    with pytest.raises(RuntimeError, match="a bug"):
        archs.upscale_tiled(lambda x: (_ for _ in ()).throw(RuntimeError("a bug")), x)
    for tile, overlap in ((32, 16), (16, -1)):
        with pytest.raises(ValueError, match=f"tile {tile} must be 0"):
            archs.upscale_tiled(net, x, tile=tile, overlap=overlap)
