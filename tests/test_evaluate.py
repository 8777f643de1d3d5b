"""evaluate.py: PSNR against scikit-image, the table's arithmetic, the files it leaves, and its refusals."""
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import archs
import data
import evaluate
import lora
from report import pictures
import metrics as quality
import runs
import metrics as scoring
from losses import VGGFeatureLoss
from images import image_size, load_image, match_images, save_image
from report import tables


@pytest.fixture
def pairs(tmp_path):
    """Three LR images of odd size with references x4, and a checkpoint of the smallest net."""
    torch.manual_seed(0)
    for i in range(3):
        save_image(tmp_path / "lq" / f"{i}.png", torch.rand(3, 21, 18))
        save_image(tmp_path / "gt" / f"{i}.png", torch.rand(3, 84, 72))
    runs.save_weights(tmp_path / "net.pth", archs.create("compact-small").state_dict())
    return tmp_path


def call(pairs, *more):
    more = more if "--metrics" in more else ("--metrics", "psnr", *more)
    evaluate.main(evaluate.parse_args(["--weights", str(pairs / "net.pth"), "--lq", str(pairs / "lq"), "--gt", str(pairs / "gt"),
                                       "--device", "cpu", "--cache", str(pairs / "cache"), "--out-json", str(pairs / "out.json"), *map(str, more)]))
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
    assert table[0] == "protocol hggt: RGB, 4 pixels of border cropped, mean over an image's references (HGGT: its positives); mean of 3 images" and table[2] == "FR low: PSNR, SSIM"
    assert "| PSNR ↑ | SSIM ↑ |" in table[4] and "**" not in table[6] and table[7].count("**") == 4
    assert list(call(pairs, "--baselines")["mean"]) == ["net"]
    for flags, said in ((["--lq", "x", "--metrics", "ranker", "--baselines"], "nothing to score"), (["--lq", "x", "--baselines", "reference", "--metrics", "ranker"], "needs --gt"),
                        (["--lq", "x", "--metrics", "ranker", "flat_hf"], "flat_hf: compared with references")):
        with pytest.raises(SystemExit):
            evaluate.parse_args(flags)
        assert said in capsys.readouterr().err


@pytest.mark.fast
def test_vgg_is_the_loss_of_training_as_a_distance(pairs, vgg_file):
    result = call(pairs, "--metrics", "vgg", "--metric-weights", f"vgg={vgg_file}")
    loss, (sr, gt) = VGGFeatureLoss(vgg_file), (load_image(pairs / d / "0.png")[None].float() / 255 for d in ("lq", "gt"))
    sr = torch.nn.functional.interpolate(sr, scale_factor=4, mode="bicubic").clamp(0, 1).mul(255).round() / 255
    assert result["scores"]["bicubic"]["0"]["vgg"] == pytest.approx(loss(sr, gt).item(), rel=1e-5)
    assert result["lower_is_better"] == {"vgg": True}


def test_vgg_looks_once_at_the_ground_truth_of_many_outputs(vgg_file, monkeypatch):
    metric, seen, taps = quality.create_metric("vgg", torch.device("cpu"), vgg_file), [], VGGFeatureLoss.taps
    monkeypatch.setattr(VGGFeatureLoss, "taps", lambda self, x: seen.append(len(x)) or taps(self, x))
    sr, gt = (torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in (3, 1))
    once = metric(sr, gt.expand(3, -1, -1, -1))
    assert len(seen) == 4 and torch.equal(once, metric(sr, gt.repeat(3, 1, 1, 1))) and len(seen) == 10


@pytest.mark.fast
def test_means_are_over_images_and_native_units_keep_their_sign(pairs, rewards, capsys):
    result = call(pairs, "--metrics", "psnr", "test_rewards:brightness", "--figure", pairs / "out.png", "--figure-images", 2)
    assert result["images"] == 3 and set(result["mean"]) == {"bicubic", "net"} and {"commit", "torch", "device", "command"} <= set(result)
    for row, images in result["scores"].items():
        assert result["mean"][row]["psnr"] == pytest.approx(sum(s["psnr"] for s in images.values()) / 3)
        assert all(0 < s["test_rewards:brightness"] < 100 for s in images.values())
    assert load_image(pairs / "out.png").shape == (3, 2 * (84 + 28) + 4, 3 * 72 + 2 * 4)
    assert "| bicubic |" in capsys.readouterr().out


@pytest.mark.fast
def test_a_row_is_what_the_net_gives_in_8_bit(pairs):
    result = call(pairs)
    net, _ = archs.load_generator(pairs / "net.pth")
    with torch.no_grad():
        sr = net(load_image(pairs / "lq" / "1.png")[None].float() / 255).clamp(0, 1).mul(255).round() / 255
    gt = load_image(pairs / "gt" / "1.png")[None].float() / 255
    assert result["scores"]["net"]["1"]["psnr"] == pytest.approx(quality.psnr(sr, gt).item(), abs=1e-6)


@pytest.mark.fast
def test_lower_is_better_metrics_are_reported_in_native_units(pairs, monkeypatch, tmp_path):
    (tmp_path / "darkness.py").write_text("import torch\ndef build(device):\n    f = lambda x: x.mean((1, 2, 3))\n    f.lower_better = True\n    return f\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = call(pairs, "--metrics", "darkness:build")
    assert result["lower_is_better"] == {"darkness:build": True} and result["mean"]["net"]["darkness:build"] > 0


@pytest.mark.fast
@pytest.mark.parametrize("more, error, said", [(["--lq", "/nowhere"], FileNotFoundError, "no such folder"),
                                               (["--weights", "/nowhere"], FileNotFoundError, "no such file or run"),
                                               (["--metrics", "mosaic"], ValueError, "unknown"),
                                               (["--metrics", "ranker=2"], ValueError, "no weight here; write ranker"),
                                               (["--figure", "/proc/x.png"], OSError, "--figure /proc cannot be written"),
                                               (["--out-json", "/tmp"], ValueError, "--out-json /tmp: a folder; name a file"),
                                               (["--metric-weights", "niqe=x"], ValueError, "NAME of --metrics")])
def test_refusals(pairs, more, error, said):
    with pytest.raises(error, match=said):
        call(pairs, *more)
    assert not (pairs / "out.json").exists()


@pytest.mark.fast
def test_missing_and_misfitting_references_are_named(pairs):
    save_image(pairs / "gt" / "2.png", torch.rand(3, 80, 72))
    with pytest.raises(ValueError, match=r"bicubic, image 2: .*lq/2.png x4 has 72x84 pixels, its reference .*gt/2.png 72x80"):
        call(pairs)
    assert not list((pairs / "cache").glob("*"))                                  # before any work
    (pairs / "gt" / "2.png").unlink()
    with pytest.raises(ValueError, match="no reference for 1 of 3 images, first 2"):
        call(pairs)


def test_swinirs_padding_is_the_runs_own_and_other_scales_are_refused(pairs):
    torch.manual_seed(1)
    net = archs.create("swinir-small", pad_mode="swinir").eval()
    runs.save_weights(pairs / "run" / "weights" / "ema_0000001.pth", net.state_dict())
    runs.save_json(pairs / "run" / "args.json", {"args": {"pad_mode": "swinir"}, "commit": "abc"})
    for folder, k in (("lq", 1), ("gt", 4)):                                      # sides of whole windows: only hggt pads them
        save_image(pairs / folder / "0.png", torch.rand(3, 24 * k, 16 * k))
    lq, gt = (load_image(pairs / folder / "0.png")[None].float() / 255 for folder in ("lq", "gt"))
    psnr = {}
    for mode in ("swinir", "hggt"):
        net.pad_mode = mode
        with torch.no_grad():
            psnr[mode] = quality.psnr(net(lq).clamp(0, 1).mul(255).round() / 255, gt).item()
    assert abs(psnr["swinir"] - psnr["hggt"]) > 1e-4
    assert call(pairs, "--weights", pairs / "run")["scores"]["run"]["0"]["psnr"] == pytest.approx(psnr["swinir"], abs=1e-5)
    assert call(pairs, "--weights", pairs / "run", "--pad-mode", "hggt")["scores"]["run"]["0"]["psnr"] == pytest.approx(psnr["hggt"], abs=1e-5)
    runs.save_weights(pairs / "x2.pth", archs.create("rrdbnet-small", scale=2).state_dict())
    with pytest.raises(ValueError, match="x2.pth: a x2 checkpoint"):
        call(pairs, "--weights", pairs / "x2.pth")


# HGGT's protocol, RealSR, other rows, cache, files

VOTES = {"a-0-0": ("PPP", "PPN", "SNP", "NNN"), "b-0-0": ("PSP", "NNP", "PNS", "PPP"), "c-0-0": ("SSP", "NPP", "PPS", "SSS")}      # of 01..04, by A, B, C
POSITIVES = {"a-0-0": ["01", "02"], "b-0-0": ["01", "04"], "c-0-0": ["02", "03"]}


@pytest.fixture
def hggt(tmp_path):
    """Three test quintuplets with votes that are known, LR images, and a checkpoint."""
    torch.manual_seed(0)
    words = {"P": "Positive", "S": "Similar", "N": "Negative"}
    images = tmp_path / "set" / "Test" / "GT" / "Test-100" / "images"
    for stem, votes in VOTES.items():
        gt = torch.rand(3, 80, 80)
        save_image(images / "original" / f"{stem}.png", gt)
        save_image(tmp_path / "set" / "Test" / "Blind" / "Blind_LR" / f"{stem}.png", gt[:, ::4, ::4])
        for k in range(1, 5):
            save_image(images / f"0{k}" / f"{stem}_0{k}.png", (gt + 0.05 * k * torch.rand(3, 80, 80)) / (1 + 0.05 * k))
        for j, annotator in enumerate("ABC"):
            pictures = {"Picture_1": {"Name": f"{stem}.png", "File": "original", "Label": None}}
            pictures |= {f"Picture_{k + 1}": {"Name": f"{stem}_0{k}.png", "File": f"0{k}", "Label": words[votes[k - 1][j]]} for k in range(1, 5)}
            runs.save_json(images.parent / "labels" / annotator / f"{stem}.json", pictures)
    runs.save_weights(tmp_path / "net.pth", archs.create("compact-small").state_dict())
    return tmp_path


def judge(hggt, *more):
    words = ["--weights", hggt / "net.pth", "--data", hggt / "set", "--metrics", "psnr", "ssim", "test_rewards:brightness", "--device", "cpu", "--cache", hggt / "cache",
             "--out-json", hggt / "out.json", *more]
    evaluate.main(evaluate.parse_args(list(map(str, words))))
    return json.loads((hggt / "out.json").read_text())


def image(hggt, stem, version):
    folder = hggt / "set" / "Test" / "GT" / "Test-100" / "images" / version
    return load_image(folder / (f"{stem}.png" if version == "original" else f"{stem}_{version}.png"))[None].float() / 255


@pytest.mark.fast
def test_full_reference_metrics_are_averaged_over_the_positives_then_over_images(hggt, rewards):
    result = judge(hggt, "--baselines", "bicubic", "reference", "gold")
    for stem, versions in POSITIVES.items():
        lq = load_image(hggt / "set/Test/Blind/Blind_LR" / f"{stem}.png")[None].float() / 255
        sr = torch.nn.functional.interpolate(lq, scale_factor=4, mode="bicubic").clamp(0, 1).mul(255).round() / 255
        for name, metric in (("psnr", quality.psnr), ("ssim", quality.ssim)):
            by_hand = np.mean([metric(sr, image(hggt, stem, v)).item() for v in versions])
            assert result["scores"]["bicubic"][stem][name] == pytest.approx(by_hand, rel=1e-9)
            of_original = np.mean([metric(image(hggt, stem, "original"), image(hggt, stem, v)).item() for v in versions])
            assert result["scores"]["reference"][stem][name] == pytest.approx(of_original, rel=1e-9)
        brightness = [100 * image(hggt, stem, v).mean().item() for v in ("original", "01", "02", "03", "04")]
        assert result["scores"]["gold"][stem] == {"test_rewards:brightness": pytest.approx(max(brightness), abs=1e-4)}
    assert result["mean"]["bicubic"]["psnr"] == pytest.approx(np.mean([s["psnr"] for s in result["scores"]["bicubic"].values()]))
    assert result["protocol"]["name"] == "hggt" and result["protocol"]["border"] == 4
    low, high = result["intervals"]["net"]["psnr"]
    assert low < result["mean"]["net"]["psnr"] < high and set(result["differences"]["net"]) == {"psnr", "ssim", "test_rewards:brightness"}


@pytest.mark.fast
def test_a_second_call_computes_only_what_is_new(hggt, rewards, monkeypatch):
    calls, create = [], quality.create_metric

    def counted(name, *more):
        metric = create(name, *more)
        function = lambda sr, gt: calls.append((name, len(sr))) or metric.function(sr, gt)
        return quality.Metric(function, metric.lower_is_better, metric.full_reference, metric.identity)
    monkeypatch.setattr(quality, "create_metric", counted)
    count = lambda: ({m: sum(n for name, n in calls if name == m) for m in dict(calls)}, calls.clear())[0]
    first = judge(hggt)
    assert count() == {"psnr": 2 * 3 * 2, "ssim": 2 * 3 * 2, "test_rewards:brightness": 2 * 3}              # rows, images, positives
    assert judge(hggt)["scores"] == first["scores"] and count() == {}
    torch.manual_seed(7)
    runs.save_weights(hggt / "other.pth", archs.create("compact-small").state_dict())
    both = judge(hggt, "--weights", hggt / "net.pth", hggt / "other.pth")
    assert both["scores"]["net"] == first["scores"]["net"] != both["scores"]["other"] and count()["psnr"] == 3 * 2
    judge(hggt, "--protocol", "y")
    assert set(count()) == {"psnr", "ssim"}
    save_image(hggt / "set/Test/Blind/Blind_LR/a-0-0.png", torch.rand(3, 20, 20))
    assert judge(hggt)["scores"]["net"]["a-0-0"] != first["scores"]["net"]["a-0-0"] and count()["psnr"] == 2 * 2
    lines = (hggt / "cache" / "0.jsonl").read_text().rstrip("\n")
    (hggt / "cache" / "0.jsonl").write_text(lines[:-9])                           # killed in the middle of a line
    judge(hggt)
    assert sum(count().values()) == 1


def adapted(hggt):
    """The network of the fixture with adapters that change it."""
    torch.manual_seed(0)
    net, _ = archs.load_generator(hggt / "net.pth")
    lora.add_lora(net, lora.default_targets(net), rank=2)
    for adapter in lora.adapted(net).values():
        torch.nn.init.normal_(adapter.lora_B, 0, 0.1)
    return net


@pytest.mark.fast
def test_rows_from_folders_and_from_adapters(hggt, rewards):
    net = adapted(hggt)
    lora.save_lora(hggt / "tuned" / "lora" / "adapter.pth", net)
    runs.save_json(hggt / "tuned" / "args.json", {"args": {"init": str(hggt / "net.pth"), "base": "runs/none"}})
    runs.save_weights(hggt / "tuned" / "weights" / "merged.pth", lora.merged_state_dict(net))
    for k, stem in enumerate(VOTES):
        lq = load_image(hggt / "set/Test/Blind/Blind_LR" / f"{stem}.png")[None].float() / 255
        with torch.no_grad():
            save_image(hggt / "outputs" / (f"{stem}_mine.png" if k else f"{stem}.png"), net(lq)[0])
    result = judge(hggt, "--weights", hggt / "net.pth", hggt / "tuned" / "weights" / "merged.pth", hggt / "tuned" / "lora" / "adapter.pth", "--images", hggt / "outputs")
    assert list(result["scores"]) == ["bicubic", "net", "tuned", "tuned x1", "outputs"]
    for row in ("tuned x1", "outputs"):
        for stem in VOTES:
            assert result["scores"][row][stem] == pytest.approx(result["scores"]["tuned"][stem], abs=1e-3)
    plain = judge(hggt, "--weights", hggt / "tuned" / "lora" / "adapter.pth", "--scale", 0)
    assert plain["mean"]["tuned x0"] == pytest.approx(result["mean"]["net"])
    (hggt / "outputs" / "b-0-0_mine.png").unlink()
    with pytest.raises(ValueError, match="0 files for image b-0-0"):
        judge(hggt, "--images", hggt / "outputs")


@pytest.mark.fast
def test_realsr_and_sets_without_lr_images(hggt, rewards):
    for camera in ("Canon", "Nikon"):
        gt = torch.rand(3, 64, 48)
        save_image(hggt / "real" / camera / "Test" / "4" / f"{camera}_001_HR.png", gt)
        save_image(hggt / "real" / camera / "Test" / "4" / f"{camera}_001_LR4.png", gt[:, ::4, ::4])
    result = judge(hggt, "--data", hggt / "real", "--protocol", "realsr")
    assert list(result["scores"]["net"]) == ["Canon_Canon_001", "Nikon_Nikon_001"]
    first = judge(hggt, "--degradation", "two-round")
    assert first["mean"]["bicubic"]["psnr"] != pytest.approx(judge(hggt)["mean"]["bicubic"]["psnr"], abs=0.1)
    shutil.rmtree(hggt / "set" / "Test" / "Blind")
    shutil.rmtree(hggt / "set" / "Test" / "GT" / "Test-100" / "labels")
    with pytest.raises(ValueError, match="has no LR images .*--degradation"):
        judge(hggt)
    again = judge(hggt, "--degradation", "two-round", "--baselines", "bicubic", "reference")
    assert again["mean"]["reference"]["psnr"] == 100                              # no labels: the original is the reference
    assert again["scores"]["bicubic"]["a-0-0"]["test_rewards:brightness"] == first["scores"]["bicubic"]["a-0-0"]["test_rewards:brightness"]


@pytest.mark.fast
def test_the_files_it_writes(hggt, rewards, capsys):
    judge(hggt, "--csv", hggt / "out.csv", "--latex", hggt / "out.tex", "--figure", hggt / "out.png", "--crop", "a-0-0:10,20,32", "b-0-0:0,0,64",
          "--front", "psnr", "test_rewards:brightness", hggt / "front.png",
          "--page", hggt / "page.html", "--page-images", 2)
    lines = (hggt / "out.csv").read_text().splitlines()
    assert lines[0] == "row,image,protocol,psnr,ssim,test_rewards:brightness" and len(lines) == 1 + 2 * 3 and lines[1].startswith("bicubic,a-0-0,hggt,")
    tex = (hggt / "out.tex").read_text()
    assert r"\multicolumn{2}{c}{FR low} & \multicolumn{1}{c}{NR high}" in tex and r"PSNR $\uparrow$" in tex and r"\textbf{" in tex and r"test\_rewards" in tex
    assert tex.startswith("% protocol hggt: RGB, ") and "; n = 3 images; commit " in tex.splitlines()[0]
    assert load_image(hggt / "out.png").shape[2] == 4 * 256 + 3 * 4 and image_size(hggt / "front.png")[0] > 300         # LR, GT, two rows
    said = capsys.readouterr().out
    assert "| minus bicubic | PSNR ↑ | SSIM ↑ |" in said and said.count("wrote ") == 6 and (hggt / "page.html").read_text().count("data:image/webp") == 2 * 5
    with pytest.raises(ValueError, match="--crop a-0-0:60,0,32: the image has 80x80 pixels"):
        judge(hggt, "--figure", hggt / "x.png", "--crop", "a-0-0:60,0,32")
    with pytest.raises(ValueError, match="no image is called z"):
        judge(hggt, "--figure", hggt / "x.png", "--crop", "z:0,0,8")


@pytest.mark.fast
def test_diff_says_why_two_tables_disagree(hggt, rewards, capsys):
    judge(hggt)
    shutil.copy(hggt / "out.json", hggt / "one.json")
    diff = lambda a, b: (capsys.readouterr(), evaluate.main(evaluate.parse_args(["--diff", str(a), str(b)])), capsys.readouterr().out)[2]
    judge(hggt)
    assert diff(hggt / "one.json", hggt / "out.json").startswith("no difference")
    torch.manual_seed(9)
    runs.save_weights(hggt / "net.pth", archs.create("compact-small").state_dict())
    save_image(hggt / "set/Test/Blind/Blind_LR/a-0-0.png", torch.rand(3, 20, 20))
    judge(hggt, "--protocol", "y", "--baselines", "bicubic", "gold")
    said = diff(hggt / "one.json", hggt / "out.json")
    for words in ("protocol: y is False in the first, True in the second", "images: 1 have other pixels (LR or reference), for example a-0-0", "net: hash of weights (or of ready-made images) is ",
                  "bicubic: scores differ by up to psnr", "rows: gold in the second only"):
        assert words in said, said
    (hggt / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match="bad.json: not a file of --out-json"):
        evaluate.main(evaluate.parse_args(["--diff", str(hggt / "bad.json"), str(hggt / "out.json")]))


def test_processes_share_the_images(hggt, script):
    words = ["--weights", hggt / "net.pth", "--data", hggt / "set", "--metrics", "psnr", "ranker", "--device", "cpu"]
    script("evaluate.py", *words, "--cache", hggt / "c1", "--out-json", hggt / "one.json")
    script("evaluate.py", *words, "--cache", hggt / "c2", "--out-json", hggt / "two.json", processes=2)
    one, two = (json.loads((hggt / f"{n}.json").read_text()) for n in ("one", "two"))
    assert list(one["scores"]["net"]) == list(two["scores"]["net"]) == list(VOTES)
    for row, images in one["scores"].items():
        for stem, s in images.items():
            assert two["scores"][row][stem] == pytest.approx(s, abs=1e-4)


@pytest.mark.fast
def test_places_and_intervals():
    means = lambda *values: {f"r{k}": {"m": {"mean": v, "low": v - 0.5, "high": v + 0.25}} for k, v in enumerate(values)}
    lines = tables.markdown(means(1.0, 2.0, 3.0), {"m": True}).splitlines()
    assert lines[:3] == ["NR high: m", "", "|  | m ↓ |"] and [line.split("|")[2].strip() for line in lines[4:]] == ["**1.00** [0.50, 1.25]", "*2.00* [1.50, 2.25]", "3.00 [2.50, 3.25]"]
    lines = tables.markdown(means(1.0, 1.0, 3.0) | {"gold": {"m": {"mean": 9.0, "low": 9, "high": 9}}}, {"m": False}).splitlines()
    assert [line.split("|")[2].split()[0] for line in lines[4:]] == ["*1.00*", "*1.00*", "**3.00**", "9.00"]
    from scipy import stats
    values = np.random.default_rng(3).normal(5, 2, 100)
    theirs = stats.ttest_1samp(values, 0).confidence_interval()
    assert tables.interval(values) == pytest.approx((theirs.low, theirs.high), abs=0.08) and tables.interval([2.0, 2.0]) == (2, 2)
    assert tables.ordered(["ranker", "musiq", "vgg", "dists", "psnr", "niqe"]) == ["psnr", "dists", "vgg", "musiq", "ranker", "niqe"]


# What is kept, what is refused, what is shown

def cached(pairs):
    return (pairs / "cache" / "0.jsonl").read_bytes()


@pytest.mark.fast
@pytest.mark.parametrize("module", ["archs", "degradations", "lora", "quality", "iqa", "data", "scoring"])
def test_scores_of_other_code_are_not_used(pairs, monkeypatch, module):
    first = call(pairs)
    before = cached(pairs)
    assert call(pairs)["versions"] == first["versions"] and cached(pairs) == before
    module = sys.modules[module]
    edited = pairs / "edited.py"
    edited.write_text(Path(module.__file__).read_text() + "\nEDITED = True\n")
    monkeypatch.setattr(module, "__file__", str(edited))
    again = call(pairs)
    assert cached(pairs).startswith(before) and len(cached(pairs).splitlines()) == 2 * len(before.splitlines())
    assert again["versions"]["code"] != first["versions"]["code"] and again["scores"] == first["scores"]


@pytest.mark.fast
def test_scores_of_other_tiles_and_overlaps_are_not_used(pairs, monkeypatch):
    call(pairs)
    size = lambda: len(cached(pairs).splitlines())
    assert size() == 2 * 3
    assert call(pairs, "--tile", 200)["weights"]["net"]["tile"] == 200 and size() == 3 * 3              # bicubic knows no tiles
    monkeypatch.setattr(archs, "OVERLAP", 48)
    assert call(pairs, "--tile", 200)["weights"]["net"]["overlap"] == 48 and size() == 4 * 3


@pytest.mark.fast
def test_the_overlap_in_the_identity_is_the_one_that_is_used(pairs, monkeypatch):
    seen, tiled = [], archs.upscaled_rows
    monkeypatch.setattr(archs, "upscaled_rows", lambda net, lq, scale, tile, overlap, *more: seen.append((tile, overlap)) or tiled(net, lq, scale, tile, overlap, *more))
    made = call(pairs)["weights"]["net"]
    assert set(seen) == {(made["tile"], made["overlap"])} and made["tile"] == 256


@pytest.mark.fast
def test_lines_of_the_cache_that_are_no_records_are_skipped(pairs):
    first = call(pairs)
    good = cached(pairs).splitlines()
    assert b"" not in good
    nan, missing = json.loads(good[0]) | {"score": float("nan")}, {"key": json.loads(good[1])["key"]}
    junk = [json.dumps(nan).encode(), json.dumps(missing).encode(), b"{bad}", b"null}", b"\xff\xfe}", b"[1]", b"3", b'{"key": 3, "score": 1.0}', b'{"key": "x", "score": "y"}',
            b'{"key": "x", "score": true}', b"[" * 100_000]
    (pairs / "cache" / "0.jsonl").write_bytes(b"\n".join([*good[2:], *junk]) + b"\n")
    before = cached(pairs)
    assert call(pairs)["scores"] == first["scores"] and cached(pairs).startswith(before) and len(cached(pairs)[len(before):].splitlines()) == 2
    (pairs / "cache" / "0.jsonl").write_bytes(cached(pairs)[:-9])                 # cut off: one line lost, and the next one starts anew
    assert call(pairs)["scores"] == first["scores"] and call(pairs)["scores"] == first["scores"]
    assert b"" not in cached(pairs).splitlines() and json.loads(cached(pairs).splitlines()[-1])["key"]


@pytest.fixture
def grids(monkeypatch):
    """What was given to pictures.save_grid: [[(image, caption)]] of each call."""
    kept, save = [], pictures.save_grid
    monkeypatch.setattr(data, "save_grid", lambda path, lines: kept.append(lines) or save(path, lines))
    return kept


@pytest.mark.fast
def test_crops_stand_in_columns_with_one_ground_truth_and_its_score(hggt, rewards, grids):
    votes = hggt / "set" / "Test" / "GT" / "Test-100" / "labels"
    for annotator in "ABC":                                                       # a third positive for one image, none for another
        for stem, label in (("a-0-0", "Positive"), ("c-0-0", "Negative")):
            path = votes / annotator / f"{stem}.json"
            entries = json.loads(path.read_text())
            for k in (2, 3, 4) if label == "Positive" else (2, 3, 4, 5):
                entries[f"Picture_{k}"]["Label"] = label
            runs.save_json(path, entries)
    bright = (image(hggt, "a-0-0", "02")[0] + 0.2).clamp(0, 1)                    # so that the best is not the first
    save_image(hggt / "set/Test/GT/Test-100/images/02/a-0-0_02.png", bright)
    words = ["--metrics", "ranker", "test_rewards:brightness", "--figure", hggt / "x.png", "--baselines", "bicubic", "gold", "--crop", "a-0-0:8,4,20", "c-0-0:0,0,64", "b-0-0:0,0,80"]
    result = judge(hggt, *words)
    (lines,) = grids
    names = [[caption.split("\n")[0] for _, caption in line] for line in lines]
    assert names == [["LR", "GT", "bicubic", "net"]] * 3 and {image.shape for line in lines for image, _ in line} == {(3, 256, 256)}
    told = [dict((caption.split("\n") for _, caption in line)) for line in lines]
    brightest = max(100 * image(hggt, "a-0-0", v).mean().item() for v in ("01", "02", "03"))
    assert told[0]["GT"] == f"test_rewards:brightness {brightest:.2f}" and told[0]["LR"] == told[1]["GT"] == ""           # c-0-0 has no reference: a grey cell
    for stem, cells in zip(("a-0-0", "c-0-0", "b-0-0"), told):
        for row in ("bicubic", "net"):
            assert cells[row] == f"test_rewards:brightness {result['scores'][row][stem]['test_rewards:brightness']:.2f}"
    best = max(("01", "02", "03"), key=lambda v: image(hggt, "a-0-0", v).mean().item())
    part = image(hggt, "a-0-0", best)[0, :, 4:24, 8:28]
    assert torch.equal(lines[0][1][0][:, 6::13, 6::13][:, :19, :19], part[:, :19, :19]) and (lines[1][1][0] == 0.5).all()
    lr = load_image(hggt / "set/Test/Blind/Blind_LR/a-0-0.png").float() / 255
    assert torch.equal(lines[0][0][0][:, 0, 0], lr[:, 1, 2])


@pytest.mark.fast
def test_the_inset_is_a_metric_with_the_tables_decimals(hggt, rewards, grids):
    result = judge(hggt, "--figure", hggt / "x.png", "--crop", "a-0-0:0,0,32", "--inset", "ssim")
    told = dict(caption.split("\n") for _, caption in grids[-1][0])
    assert told["net"] == f"SSIM {result['scores']['net']['a-0-0']['ssim']:.3f}" and told["GT"] == ""
    assert torch.equal(grids[-1][0][1][0][:, ::8, ::8], image(hggt, "a-0-0", "01")[0, :, :32, :32])              # the first positive
    judge(hggt, "--figure", hggt / "x.png", "--metrics", "psnr", "ssim")
    assert all(caption.split("\n")[1].startswith("PSNR ") for line in grids[-1] for _, caption in line[:2])


@pytest.mark.fast
@pytest.mark.parametrize("words, said", [(["--crop", "a:0,0,8"], "--crop: a part of --figure"), (["--inset", "psnr"], "--inset: a part of --figure"),
                                         (["--figure", "x.png", "--inset", "lpips"], "--inset lpips: not among --metrics (psnr)"),
                                         (["--figure", "x.jpg"], "--figure x.jpg: a PNG is written"), (["--front", "psnr", "psnr", "x"], "--front x: a PNG is written"),
                                         (["--names", "a", "b"], "--names: 2 names for 1 --weights"), (["--base", "x.pth"], "--base: names what adapters belong to")])
def test_flags_that_make_no_sense_together(words, said, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--weights", "net.pth", "--metrics", "psnr", *words])
    assert said in capsys.readouterr().err


@pytest.mark.fast
def test_front_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    import matplotlib.figure
    means = {"net": {m: {"mean": 1.0, "low": 0.5, "high": 2.0} for m in ("psnr", "musiq")}}
    lower = {"psnr": False, "musiq": False}
    pictures.front(tmp_path / "f.png", means, "psnr", "musiq", lower)
    before = (tmp_path / "f.png").read_bytes()

    def killed(figure, file, **more):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", killed)
    with pytest.raises(KeyboardInterrupt):
        pictures.front(tmp_path / "f.png", means, "psnr", "musiq", lower)
    assert (tmp_path / "f.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.fast
def test_ready_made_outputs_of_another_size_are_named_before_any_work(pairs, rewards):
    for i in range(3):
        save_image(pairs / "sr" / f"{i}.png", torch.rand(3, 84, 72 - 4 * (i == 1)))
    with pytest.raises(ValueError, match=r"sr, image 1: .*sr/1.png has 68x84 pixels, its reference .*gt/1.png 72x84"):
        call(pairs, "--images", pairs / "sr")
    assert not (pairs / "cache" / "0.jsonl").exists()
    assert "sr" in call(pairs, "--images", pairs / "sr", "--metrics", "test_rewards:brightness")["mean"]                # nothing compares
    with pytest.raises(ValueError, match="sr, image 1"):                          # a crop does
        call(pairs, "--images", pairs / "sr", "--metrics", "test_rewards:brightness", "--figure", pairs / "x.png", "--crop", "1:0,0,64")


@pytest.mark.fast
def test_an_image_that_a_metric_cannot_judge_is_named_with_its_row_and_size(pairs, monkeypatch):
    for i in range(3):
        save_image(pairs / "sr" / f"{i}.png", torch.rand(3, *((84, 72) if i != 1 else (20, 24))))
    with pytest.raises(ValueError, match=r"sr, image 1 \(24x20 pixels\): ranker cannot judge it \(ranker wants .*at least 32 pixels"):
        call(pairs, "--images", pairs / "sr", "--metrics", "ranker")
    images = {"good": torch.zeros(1, 3, 8, 9), "bad": torch.ones(1, 3, 8, 9)}

    def fails(sr, gt, error=RuntimeError("negative dimensions")):
        if sr.max() == 1:
            raise error
        return sr.mean((1, 2, 3))
    with pytest.raises(ValueError, match=r"bad, image s \(9x8 pixels\): niqe cannot judge it \(negative dimensions\)"):
        scoring.judge("niqe", quality.Metric(fails), images, [], "s")
    assert scoring.judge("niqe", quality.Metric(fails), {"good": images["good"], "small": torch.zeros(1, 3, 4, 4)}, [], "s") == {"good": 0, "small": 0}
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")):
        with pytest.raises(type(error), match="memory"):
            scoring.judge("niqe", quality.Metric(lambda sr, gt: fails(sr, gt, error)), images, [], "s")


@pytest.mark.fast
def test_a_network_whose_output_is_not_finite_is_named(pairs):
    state = archs.create("compact-small").state_dict()
    state["body.0.bias"][0] = float("nan")
    runs.save_weights(pairs / "broken.pth", state)
    with pytest.raises(ValueError, match="broken, image 0: the network's output is not finite: look at its weights"):
        call(pairs, "--weights", pairs / "broken.pth")


@pytest.mark.fast
def test_a_difference_of_few_images_needs_students_t_test_too():
    values = np.array([[0.8, 1.1, 0.5, -0.1, 0.3]])                               # p = .065
    found = tables.difference(values, 0 * values)
    assert found["low"] > 0 and found["verdict"] == "no evidence" and tables.paired_p(values[0]) == pytest.approx(0.065, abs=1e-3)
    assert tables.difference(values + 0.2, 0 * values)["verdict"] == "higher"
    assert [tables.paired_p(np.array(v)) for v in ([3.0], [0.0, 0.0], [2.0, 2.0])] == [1, 1, 0]
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(150):
        found = tables.difference(rng.normal(0, 1, (1, 5)), np.zeros((1, 5)))
        wrong += found["verdict"] != "no evidence"
    assert wrong <= 15                                                            # the interval alone: 24


@pytest.mark.fast
def test_an_adapter_without_its_run_folder_and_at_several_strengths(hggt, rewards):
    net = adapted(hggt)
    lora.save_lora(hggt / "sent" / "adapter.pth", net)
    with pytest.raises(ValueError, match="name the tuned weights with --base"):
        judge(hggt, "--weights", hggt / "sent" / "adapter.pth")
    result = judge(hggt, "--weights", hggt / "net.pth", hggt / "sent" / "adapter.pth", "--base", hggt / "net.pth", "--scale", 0, 0.5, 1, "--names", "before", "tuned")
    assert list(result["scores"]) == ["bicubic", "before", "tuned x0", "tuned x0.5", "tuned x1"]
    assert result["scores"]["tuned x0"] == result["scores"]["before"] != result["scores"]["tuned x0.5"] != result["scores"]["tuned x1"]
    assert [result["weights"][f"tuned x{k}"]["strength"] for k in ("0", "0.5", "1")] == [0, 0.5, 1]


@pytest.mark.fast
def test_diff_tells_weights_tile_padding_and_commit_apart(hggt, rewards, capsys):
    first = judge(hggt)
    assert {"hash", "tile", "overlap", "pad_mode"} <= set(first["weights"]["net"])
    change = {"tile": 128, "overlap": 8, "pad_mode": "swinir"}
    second = json.loads(json.dumps(first)) | {"commit": "abc"}
    for key, value in change.items():
        second["weights"]["net"][key] = value
    lines = tables.explain(first, second)
    assert len(lines) == 4 and lines[0].endswith("'abc' in the second") and lines[0].startswith("commit is ")
    assert "net: tile is 256 in the first, 128 in the second" in lines and "net: padding is None in the first, 'swinir' in the second" in lines
    other = json.loads(json.dumps(first))
    other["protocol"]["says"] = "other words"
    assert tables.explain(first, other) == []


@pytest.mark.fast
@pytest.mark.parametrize("contents, said", [(b"{", "not a file of --out-json"), (b"\xff\xfe\x00", "not a file of --out-json"), (b'{"scores": 3, "lower_is_better": {}}', "scores must be"),
                                            (b'{"scores": {"net": {"a": 3}}, "lower_is_better": {}}', "scores must be"),
                                            (b'{"scores": {"net": {"a": {"psnr": "x"}}}, "lower_is_better": {}}', "scores must be"),
                                            (b'{"scores": {"net": {"a": {"psnr": 3}}}, "lower_is_better": ["psnr"]}', "lower_is_better must be"),
                                            (b'{"scores": {}, "lower_is_better": {}, "weights": {"net": 3}}', "weights must be"), (None, "no such file")])
def test_diff_names_the_file_that_is_no_result(tmp_path, contents, said):
    good = tmp_path / "good.json"
    good.write_text('{"scores": {"net": {"a": {"psnr": 3}}}, "lower_is_better": {"psnr": false}}')
    if contents is not None:
        (tmp_path / "bad.json").write_bytes(contents)
    for files in ([good, tmp_path / "bad.json"], [tmp_path / "bad.json", good]):
        with pytest.raises(ValueError, match=f"--diff .*bad.json: .*{said}"):
            evaluate.main(evaluate.parse_args(["--diff", *map(str, files)]))
    evaluate.main(evaluate.parse_args(["--diff", str(good), str(good)]))


@pytest.mark.fast
def test_realsr_is_tested_on_whole_images():
    tile = lambda *words: evaluate.parse_args(["--weights", "net.pth", *words]).tile
    assert tile("--protocol", "realsr") == 0 and tile() == 256 and tile("--protocol", "realsr", "--tile", "200") == 200


@pytest.mark.fast
def test_gold_stands_first_and_nothing_is_compared_with_it(hggt, rewards, capsys):
    result = judge(hggt, "--baselines", "bicubic", "gold")
    assert list(result["scores"]) == ["gold", "bicubic", "net"] and set(result["differences"]) == {"gold", "net"}
    assert set(result["differences"]["net"]) == {"psnr", "ssim", "test_rewards:brightness"}
    said = capsys.readouterr().out
    assert said.index("| gold |") < said.index("| bicubic |") and "| minus bicubic |" in said and "FR low: PSNR, SSIM; NR high: test_rewards:brightness" in said


@pytest.mark.fast
def test_latex_says_what_was_measured_and_escapes_names():
    means = {r"a & 50 % of #1_x {y} ~^\z $": {"psnr": {"mean": 20.0, "low": 19, "high": 21}}}
    tex = tables.latex(means, {"psnr": False}, "protocol hggt, n = 3, commit abc")
    assert tex.startswith("% protocol hggt, n = 3, commit abc\n\\begin{tabular}")
    assert r"a \& 50 \% of \#1\_x \{y\} \textasciitilde{}\textasciicircum{}\textbackslash{}z \$ & \textbf{20.00} \\" in tex
    with pytest.raises(ValueError, match="no row can be called gold"):
        evaluate.add_row({}, "gold", scoring.Row(None, None, None, None))


@pytest.mark.fast
def test_all_metrics_that_cannot_be_had_are_named_at_once(pairs, monkeypatch):
    create = quality.create_metric
    refused = OSError("no network")                                               # as the hub's client raises it
    refused.request = SimpleNamespace(url="https://huggingface.co/timm/resnet50.a1_in1k/resolve/main/model.safetensors")

    def without_network(name, *more):
        if name not in ("topiq_nr", "vgg"):
            return create(name, *more)
        if name == "vgg":
            raise FileNotFoundError("no VGG19 weights (no network): put vgg19.pth into ~/x, or name a file with --vgg-weights FILE, or do without the perceptual loss: --lambda-p 0")
        try:
            raise OSError("cannot find the requested files") from refused
        except OSError:
            raise OSError("--metrics topiq_nr: weights are not here") from None
    monkeypatch.setattr(quality, "create_metric", without_network)
    with pytest.raises(ValueError) as found:
        call(pairs, "--metrics", "psnr", "mosaic", "topiq_nr", "vgg", "ranker")
    said = str(found.value)
    for words in ("3 metrics cannot be had: ", "--metrics mosaic: this is unknown", "timm/resnet50.a1_in1k/resolve/main/model.safetensors", "--metrics vgg: no VGG19 weights", "vgg=FILE"):
        assert words in said, said
    assert "--lambda-p" not in said and not (pairs / "cache").exists()


@pytest.mark.fast
def test_an_exact_name_wins_over_one_with_an_ending(tmp_path):
    for name in ("a", "a_1", "b_x", "c_x", "c_y"):
        save_image(tmp_path / f"{name}.png", torch.zeros(3, 4, 4))
    found = match_images(tmp_path, ["a", "a_1", "b"], "--images")
    assert {stem: path.name for stem, path in found.items()} == {"a": "a.png", "a_1": "a_1.png", "b": "b_x.png"}
    with pytest.raises(ValueError, match="2 files for image c"):
        match_images(tmp_path, ["c"], "--images")


@pytest.mark.fast
def test_a_stem_without_positives_stops_only_metrics_that_compare(hggt, rewards):
    for annotator in "ABC":
        path = hggt / "set" / "Test" / "GT" / "Test-100" / "labels" / annotator / "b-0-0.json"
        runs.save_json(path, {k: v | {"Label": v["Label"] and "Similar"} for k, v in json.loads(path.read_text()).items()})
    with pytest.raises(ValueError, match="--metrics psnr ssim: compared with references, and 1 of 3 images have none, first b-0-0: none of its versions is a positive"):
        judge(hggt)
    assert "b-0-0" in judge(hggt, "--metrics", "ranker", "--page", hggt / "page.html")["scores"]["net"]


@pytest.mark.fast
def test_references_without_an_image_are_a_remark_and_a_missing_realsr_is_named(pairs, capsys):
    save_image(pairs / "gt" / "9.png", torch.rand(3, 84, 72))
    assert call(pairs)["images"] == 3
    assert "remark: 1 references in --gt" in capsys.readouterr().out
    for words in (["--data", pairs / "RealSR"], ["--data", pairs / "nowhere", "--protocol", "realsr"]):
        with pytest.raises(ValueError, match="no RealSR v3 there .*README says where"):
            evaluate.main(evaluate.parse_args(["--weights", str(pairs / "net.pth"), "--device", "cpu", "--cache", str(pairs / "cache"), *map(str, words)]))
