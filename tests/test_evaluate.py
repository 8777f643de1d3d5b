"""evaluate.py: PSNR against scikit-image, the table's arithmetic, the files it leaves, and its refusals."""
import json
import shutil

import numpy as np
import pytest
import torch

import archs
import data
import evaluate
import lora
import quality
import runs
import tables


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
    assert table[0] == "protocol hggt (RGB, 4 pixels of border cropped, mean over an image's references (HGGT: its positives)), mean of 3 images; FR low: PSNR, SSIM"
    assert "| PSNR ↑ | SSIM ↑ |" in table[2] and "**" not in table[4] and table[5].count("**") == 4
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
    data.save_image(pairs / "gt" / "2.png", torch.rand(3, 80, 72))
    with pytest.raises(ValueError, match=r"bicubic, image 2: .*lq/2.png x4 has 72x84 pixels, its reference .*gt/2.png 72x80"):
        call(pairs)
    assert not list((pairs / "cache").glob("*"))                                  # before any work
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
        data.save_image(images / "original" / f"{stem}.png", gt)
        data.save_image(tmp_path / "set" / "Test" / "Blind" / "Blind_LR" / f"{stem}.png", gt[:, ::4, ::4])
        for k in range(1, 5):
            data.save_image(images / f"0{k}" / f"{stem}_0{k}.png", (gt + 0.05 * k * torch.rand(3, 80, 80)) / (1 + 0.05 * k))
        for j, annotator in enumerate("ABC"):
            pictures = {"Picture_1": {"Name": f"{stem}.png", "File": "original", "Label": None}}
            pictures |= {f"Picture_{k + 1}": {"Name": f"{stem}_0{k}.png", "File": f"0{k}", "Label": words[votes[k - 1][j]]} for k in range(1, 5)}
            runs.save_json(images.parent / "labels" / annotator / f"{stem}.json", pictures)
    runs.save_weights(tmp_path / "net.pth", archs.ARCHS["compact-small"]().state_dict())
    return tmp_path


def judge(hggt, *more):
    words = ["--weights", hggt / "net.pth", "--data", hggt / "set", "--metrics", "psnr", "ssim", "test_rewards:brightness", "--device", "cpu", "--cache", hggt / "cache",
             "--out-json", hggt / "out.json", *more]
    evaluate.main(evaluate.parse_args(list(map(str, words))))
    return json.loads((hggt / "out.json").read_text())


def image(hggt, stem, version):
    folder = hggt / "set" / "Test" / "GT" / "Test-100" / "images" / version
    return data.load_image(folder / (f"{stem}.png" if version == "original" else f"{stem}_{version}.png"))[None].float() / 255


@pytest.mark.fast
def test_full_reference_metrics_are_averaged_over_the_positives_then_over_images(hggt, rewards):
    result = judge(hggt, "--baselines", "bicubic", "reference", "gold")
    for stem, versions in POSITIVES.items():
        lq = data.load_image(hggt / "set/Test/Blind/Blind_LR" / f"{stem}.png")[None].float() / 255
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
    runs.save_weights(hggt / "other.pth", archs.ARCHS["compact-small"]().state_dict())
    both = judge(hggt, "--weights", hggt / "net.pth", hggt / "other.pth")
    assert both["scores"]["net"] == first["scores"]["net"] != both["scores"]["other"] and count()["psnr"] == 3 * 2
    judge(hggt, "--protocol", "y")
    assert set(count()) == {"psnr", "ssim"}
    data.save_image(hggt / "set/Test/Blind/Blind_LR/a-0-0.png", torch.rand(3, 20, 20))
    assert judge(hggt)["scores"]["net"]["a-0-0"] != first["scores"]["net"]["a-0-0"] and count()["psnr"] == 2 * 2
    lines = (hggt / "cache" / "0.jsonl").read_text().rstrip("\n")
    (hggt / "cache" / "0.jsonl").write_text(lines[:-9])                           # killed in the middle of a line
    judge(hggt)
    assert sum(count().values()) == 1


@pytest.mark.fast
def test_rows_from_folders_and_from_adapters(hggt, rewards):
    torch.manual_seed(0)
    net, _ = archs.load_generator(hggt / "net.pth")
    lora.add_lora(net, lora.default_targets(net), rank=2)
    for adapter in lora.adapted(net).values():
        torch.nn.init.normal_(adapter.lora_B, 0, 0.1)
    lora.save_lora(hggt / "tuned" / "lora" / "adapter.pth", net)
    runs.save_json(hggt / "tuned" / "args.json", {"args": {"init": str(hggt / "net.pth"), "base": "runs/none"}})
    runs.save_weights(hggt / "tuned" / "weights" / "merged.pth", lora.merged_state_dict(net))
    for k, stem in enumerate(VOTES):
        lq = data.load_image(hggt / "set/Test/Blind/Blind_LR" / f"{stem}.png")[None].float() / 255
        with torch.no_grad():
            data.save_image(hggt / "outputs" / (f"{stem}_mine.png" if k else f"{stem}.png"), net(lq)[0])
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
        data.save_image(hggt / "real" / camera / "Test" / "4" / f"{camera}_001_HR.png", gt)
        data.save_image(hggt / "real" / camera / "Test" / "4" / f"{camera}_001_LR4.png", gt[:, ::4, ::4])
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
    assert tex.startswith("% protocol hggt (RGB, ") and ", n = 3 images, commit " in tex.splitlines()[0]
    assert data.load_image(hggt / "out.png").shape[2] == 4 * 256 + 3 * 4 and data.image_size(hggt / "front.png")[0] > 300         # LR, GT, two rows
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
    runs.save_weights(hggt / "net.pth", archs.ARCHS["compact-small"]().state_dict())
    data.save_image(hggt / "set/Test/Blind/Blind_LR/a-0-0.png", torch.rand(3, 20, 20))
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
