"""evaluate.py: PSNR against scikit-image, the table's arithmetic, the files it leaves, and its refusals."""
import json

import pytest
import torch

import archs
import data
import evaluate
import iqa
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
    for value, x, y in zip(iqa.psnr(a, b).tolist(), a.numpy(), b.numpy()):
        assert value == pytest.approx(peak_signal_noise_ratio(y[:, 4:-4, 4:-4].astype("float64"), x[:, 4:-4, 4:-4].astype("float64"), data_range=1), rel=1e-9)


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
    assert result["scores"]["net"]["1"]["psnr"] == pytest.approx(iqa.psnr(sr, gt).item(), abs=1e-6)


@pytest.mark.fast
def test_lower_is_better_metrics_are_reported_in_native_units(pairs, monkeypatch, tmp_path):
    (tmp_path / "darkness.py").write_text("import torch\ndef build(device):\n    f = lambda x: x.mean((1, 2, 3))\n    f.lower_better = True\n    return f\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = call(pairs, "--metrics", "darkness:build")
    assert result["lower_is_better"] == {"darkness:build": True} and result["mean"]["net"]["darkness:build"] > 0
    lines = evaluate.markdown({"a": {"m": 1.0}, "b": {"m": 2.0}}, ["m"], {"m": True}).splitlines()
    assert lines[0] == "| | m ↓ |" and "**1.00**" in lines[2] and "**" not in lines[3]


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
            psnr[mode] = iqa.psnr(net(lq).clamp(0, 1).mul(255).round() / 255, gt).item()
    assert abs(psnr["swinir"] - psnr["hggt"]) > 1e-4
    assert call(pairs, "--weights", pairs / "run")["scores"]["run"]["0"]["psnr"] == pytest.approx(psnr["swinir"], abs=1e-5)
    assert call(pairs, "--weights", pairs / "run", "--pad-mode", "hggt")["scores"]["run"]["0"]["psnr"] == pytest.approx(psnr["hggt"], abs=1e-5)
    runs.save_weights(pairs / "x2.pth", archs.ARCHS["rrdbnet-small"](scale=2).state_dict())
    with pytest.raises(ValueError, match="x2.pth: a x2 checkpoint"):
        call(pairs, "--weights", pairs / "x2.pth")
