"""evaluate.py: PSNR against scikit-image, the table's arithmetic, the files it leaves, and its refusals."""
import json

import numpy as np
import pytest
import torch

import archs
import data
import evaluate
import quality
import runs


@pytest.fixture
def pairs(tmp_path):
    """Three LR images of odd size with references x4, and a checkpoint of the smallest net."""
    torch.manual_seed(0)
    for i in range(3):
        data.save_image(tmp_path / "lq" / f"{i}.png", torch.rand(3, 21, 18))
        data.save_image(tmp_path / "gt" / f"{i}.png", torch.rand(3, 84, 72))
    runs.save_weights(tmp_path / "net.pth", archs.ARCHS["compact-small"]().state_dict())
    return tmp_path


def call(pairs, *more):
    evaluate.main(evaluate.parse_args(["--weights", str(pairs / "net.pth"), "--lq", str(pairs / "lq"), "--gt", str(pairs / "gt"),
                                       "--device", "cpu", "--out-json", str(pairs / "out.json"), *map(str, more)]))
    return json.loads((pairs / "out.json").read_text())


@pytest.mark.fast
def test_psnr_is_scikit_images_after_hggts_crop():
    from skimage.metrics import peak_signal_noise_ratio
    a, b = torch.rand(2, 3, 40, 36), torch.rand(2, 3, 40, 36)
    for value, x, y in zip(quality.psnr(a, b).tolist(), a.numpy(), b.numpy()):
        assert value == pytest.approx(peak_signal_noise_ratio(y[:, 4:-4, 4:-4].astype("float64"), x[:, 4:-4, 4:-4].astype("float64"), data_range=1), rel=1e-9)


@pytest.mark.fast
def test_ssim_is_the_colour_ssim_of_pyiqa_after_hggts_crop():
    from pyiqa import create_metric
    a, b = torch.rand(2, 3, 48, 40), torch.rand(2, 3, 48, 40)
    b = (a + 0.2 * b) / 1.2
    theirs = create_metric("ssimc", device=torch.device("cpu"))(a[..., 4:-4, 4:-4], b[..., 4:-4, 4:-4])
    assert quality.ssim(a, b).tolist() == pytest.approx(theirs.tolist(), abs=1e-4)
    assert quality.ssim(a, a).tolist() == [1, 1]
    with pytest.raises(ValueError, match="SSIM of an output"):
        quality.ssim(torch.rand(1, 3, 18, 18), torch.rand(1, 3, 18, 18))


@pytest.mark.fast
def test_flat_hf_sees_a_grid_in_flat_places_and_only_there():
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    ramp = (0.3 + 0.2 * x / 128 + 0.1 * y / 128).expand(1, 3, -1, -1)             # flat on the left, busy on the right
    gt = ramp + (x >= 64) * 0.2 * torch.sin(2 * torch.pi * x / 32)
    grid = 0.02 * torch.cos(2 * torch.pi * x / 4) * torch.cos(2 * torch.pi * y / 4)      # what an x4 pixel shuffle leaves
    clean, gridded = quality.flat_hf(gt, gt).item(), quality.flat_hf(gt + grid, gt).item()
    assert clean < 0.01 and gridded > 0.5
    assert quality.flat_hf(gt + (x >= 96) * grid, gt).item() == pytest.approx(clean, abs=1e-6)
    smooth = gt + 0.05 * torch.cos(2 * torch.pi * x / 16)                         # one cycle per block: not high
    assert quality.flat_hf(smooth, gt).item() < 0.02
    with pytest.raises(ValueError, match="more than 64 pixels"):
        quality.flat_hf(gt[..., :64], gt[..., :64])


@pytest.mark.fast
def test_flat_hf_by_hand():
    sr, gt = torch.rand(1, 3, 96, 80), torch.rand(1, 3, 96, 80)
    gt[..., 32:48, 48:64] = 0.5                                                   # 4 x 3 blocks, of which the 3 flattest count
    grey = lambda image: (255 * image[0].double() * torch.tensor([.299, .587, .114], dtype=torch.float64).view(3, 1, 1)).sum(0).numpy()
    blocks = [(grey(gt)[r:r + 16, c:c + 16].std(), grey(sr)[r:r + 16, c:c + 16]) for r in range(16, 80, 16) for c in range(16, 64, 16)]
    high = total = 0.0
    for _, block in sorted(blocks, key=lambda b: b[0])[:3]:
        window = np.outer(np.hanning(16), np.hanning(16))
        power = np.abs(np.fft.fft2((block - block.mean()) * window)) ** 2
        total += power.sum()
        high += sum(power[i, j] for i in range(16) for j in range(16) if max(min(i, 16 - i), min(j, 16 - j)) >= 4)
    assert quality.flat_hf(sr, gt).item() == pytest.approx(high / total, rel=1e-6)


@pytest.mark.fast
def test_baselines_are_rows_of_their_own_and_the_reference_is_no_rival(pairs, capsys):
    result = call(pairs, "--metrics", "psnr", "ssim", "--baselines", "reference")
    assert list(result["mean"]) == ["reference", "net"]
    assert result["mean"]["reference"]["psnr"] == 100 and result["mean"]["reference"]["ssim"] == pytest.approx(1)
    table = capsys.readouterr().out.splitlines()
    assert "**" not in table[2] and table[3].count("**") == 4
    assert list(call(pairs, "--baselines")["mean"]) == ["net"]
    for flags, said in ((["--lq", "x", "--metrics", "ranker", "--baselines"], "nothing to score"), (["--lq", "x", "--baselines", "reference", "--metrics", "ranker"], "needs --gt"),
                        (["--lq", "x", "--metrics", "ranker", "flat_hf"], "flat_hf: compared with references")):
        with pytest.raises(SystemExit):
            evaluate.parse_args(flags)
        assert said in capsys.readouterr().err


@pytest.mark.fast
def test_vgg_is_the_loss_of_training_as_a_distance(pairs, vgg_file):
    result = call(pairs, "--metrics", "vgg", "--metric-weights", f"vgg={vgg_file}")
    loss, (sr, gt) = archs.VGGFeatureLoss(vgg_file), (data.load_image(pairs / d / "0.png")[None].float() / 255 for d in ("lq", "gt"))
    sr = torch.nn.functional.interpolate(sr, scale_factor=4, mode="bicubic").clamp(0, 1).mul(255).round() / 255
    assert result["scores"]["bicubic"]["0"]["vgg"] == pytest.approx(loss(sr, gt).item(), rel=1e-5)
    assert result["lower_is_better"] == {"vgg": True}


@pytest.mark.fast
def test_means_are_over_images_and_native_units_keep_their_sign(pairs, rewards, capsys):
    result = call(pairs, "--metrics", "psnr", "test_rewards:brightness", "--figure", pairs / "out.png", "--figure-images", 2)
    assert result["images"] == 3 and set(result["mean"]) == {"bicubic", "net"} and {"commit", "torch", "device", "command"} <= set(result)
    for row, images in result["scores"].items():
        assert result["mean"][row]["psnr"] == pytest.approx(sum(s["psnr"] for s in images.values()) / 3)
        assert all(0 < s["test_rewards:brightness"] < 100 for s in images.values())
    assert data.load_image(pairs / "out.png").shape == (3, 2 * (84 + 28) + 4, 3 * 72 + 2 * 4)
    assert "| bicubic |" in capsys.readouterr().out


@pytest.mark.fast
def test_a_row_is_what_the_net_gives_in_8_bit(pairs):
    result = call(pairs)
    net, _ = archs.load_generator(pairs / "net.pth")
    with torch.no_grad():
        sr = net(data.load_image(pairs / "lq" / "1.png")[None].float() / 255).clamp(0, 1).mul(255).round() / 255
    gt = data.load_image(pairs / "gt" / "1.png")[None].float() / 255
    assert result["scores"]["net"]["1"]["psnr"] == pytest.approx(quality.psnr(sr, gt).item(), abs=1e-6)


@pytest.mark.fast
def test_lower_is_better_metrics_are_reported_in_native_units(pairs, monkeypatch, tmp_path):
    (tmp_path / "darkness.py").write_text("import torch\ndef build(device):\n    f = lambda x: x.mean((1, 2, 3))\n    f.lower_better = True\n    return f\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = call(pairs, "--metrics", "darkness:build")
    assert result["lower_is_better"] == {"darkness:build": True} and result["mean"]["net"]["darkness:build"] > 0
    lines = evaluate.markdown({"a": {"m": 1.0}, "b": {"m": 2.0}}, ["m"], {"m": True}).splitlines()
    assert lines[0] == "|  | m ↓ |" and "**1.00**" in lines[2] and "**" not in lines[3]


@pytest.mark.fast
@pytest.mark.parametrize("more, error, said", [(["--lq", "/nowhere"], FileNotFoundError, "no such folder"),
                                               (["--weights", "/nowhere"], FileNotFoundError, "no such file or run"),
                                               (["--metrics", "mosaic"], ValueError, "unknown"),
                                               (["--metrics", "ranker=2"], ValueError, "no weight here; write ranker"),
                                               (["--figure", "/proc/x.png"], OSError, "--figure /proc cannot be written"),
                                               (["--figure", "/tmp"], ValueError, "--figure /tmp: a folder; name a file"),
                                               (["--metric-weights", "niqe=x"], ValueError, "NAME of --metrics")])
def test_refusals(pairs, more, error, said):
    with pytest.raises(error, match=said):
        call(pairs, *more)
    assert not (pairs / "out.json").exists()


@pytest.mark.fast
def test_missing_and_misfitting_references_are_named(pairs):
    data.save_image(pairs / "gt" / "2.png", torch.rand(3, 80, 72))
    with pytest.raises(ValueError, match="must be x4"):
        call(pairs)
    (pairs / "gt" / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match="no reference for 1 of 3 images, first 2"):
        call(pairs)


def test_swinirs_padding_is_the_runs_own_and_other_scales_are_refused(pairs):
    torch.manual_seed(1)
    net = archs.ARCHS["swinir-small"](pad_mode="swinir").eval()
    runs.save_weights(pairs / "run" / "weights" / "ema_0000001.pth", net.state_dict())
    runs.save_json(pairs / "run" / "args.json", {"args": {"pad_mode": "swinir"}, "commit": "abc"})
    for folder, k in (("lq", 1), ("gt", 4)):                                      # sides of whole windows: only hggt pads them
        data.save_image(pairs / folder / "0.png", torch.rand(3, 24 * k, 16 * k))
    lq, gt = (data.load_image(pairs / folder / "0.png")[None].float() / 255 for folder in ("lq", "gt"))
    psnr = {}
    for mode in ("swinir", "hggt"):
        net.pad_mode = mode
        with torch.no_grad():
            psnr[mode] = quality.psnr(net(lq).clamp(0, 1).mul(255).round() / 255, gt).item()
    assert abs(psnr["swinir"] - psnr["hggt"]) > 1e-4
    assert call(pairs, "--weights", pairs / "run")["scores"]["run"]["0"]["psnr"] == pytest.approx(psnr["swinir"], abs=1e-5)
    assert call(pairs, "--weights", pairs / "run", "--pad-mode", "hggt")["scores"]["run"]["0"]["psnr"] == pytest.approx(psnr["hggt"], abs=1e-5)
    runs.save_weights(pairs / "x2.pth", archs.ARCHS["rrdbnet-small"](scale=2).state_dict())
    with pytest.raises(ValueError, match="x2.pth: a x2 checkpoint"):
        call(pairs, "--weights", pairs / "x2.pth")
