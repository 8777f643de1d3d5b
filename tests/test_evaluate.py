"""evaluate.py: rows, test images, the files it leaves for report.*, its cache, its refusals, its demo."""
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import archs
import degradations
import evaluate
import iqa
import lora
import metrics
import runs
from images import cut_to_x4, image_size, load_image, match_images, save_image
from losses import VGGFeatureLoss
from report import page, pictures, tables


@pytest.fixture
def pairs(tmp_path):
    """Three LR images of odd size with references x4, and a checkpoint of the smallest net."""
    torch.manual_seed(0)
    for i in range(3):
        save_image(tmp_path / "lq" / f"{i}.png", torch.rand(3, 21, 18))
        save_image(tmp_path / "gt" / f"{i}.png", torch.rand(3, 84, 72))
    runs.save_weights(tmp_path / "net.pth", archs.create("compact-small").state_dict())
    return tmp_path


def run(folder, *words, weights="net.pth"):
    """evaluate.py with the network of `folder`, on the CPU -> the content of --out-json."""
    rows = ["--weights", folder / weights] if weights else []
    words = [*rows, "--device", "cpu", "--cache", folder / "cache", "--out-json", folder / "out.json", *words]
    evaluate.main(evaluate.parse_args([str(word) for word in words]))
    return json.loads((folder / "out.json").read_text())


def call(pairs, *more):
    more = more if "--metrics" in more else ("--metrics", "psnr", *more)
    return run(pairs, "--lq", pairs / "lq", "--gt", pairs / "gt", *more)


SET5 = runs.REPO.parent / "shared" / "data" / "images" / "test_set5"


def bicubic(lq):
    large = torch.nn.functional.interpolate(lq, scale_factor=4, mode="bicubic", antialias=True)
    return large.clamp(0, 1).mul(255).round() / 255


@pytest.mark.fast
def test_help_lists_at_most_30_flags(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert 20 < sum(line.startswith(("  -h", "  --")) for line in lines) <= 30


# Rows

@pytest.mark.fast
def test_baselines_are_rows_of_their_own_and_the_reference_is_no_rival(pairs, capsys):
    result = call(pairs, "--metrics", "psnr", "ssim", "--baselines", "reference")
    assert list(result["mean"]) == ["reference", "net"]
    assert result["mean"]["reference"]["psnr"] == 100 and result["mean"]["reference"]["ssim"] == pytest.approx(1)
    # a CPU with units for bf16 gets a remark
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("remark: --precision")]
    assert printed[0] == ("protocol hggt: RGB, 4 pixels of border cropped, mean over an image's references (HGGT: its "
                          "positives); mean of 3 images")
    assert printed[1] == "full-reference: PSNR, SSIM" and "PSNR ↑" in printed[3] and "SSIM ↑" in printed[3]
    markdown = tables.markdown(result).splitlines()
    assert "| PSNR ↑ | SSIM ↑ |" in markdown[2] and "**" not in markdown[4] and markdown[5].count("**") == 4
    assert list(call(pairs, "--baselines")["mean"]) == ["net"]
    for flags, error in ((["--lq", "x", "--metrics", "ranker", "--baselines"], "nothing to score"),
                         (["--lq", "x", "--baselines", "reference", "--metrics", "ranker"], "needs --gt"),
                         (["--weights", "run", "--scale", "0.5", "--metrics", "ranker"], "--scale: the strengths of"),
                         (["--lq", "x", "--metrics", "ranker", "flat_hf"], "flat_hf: compared with references")):
        with pytest.raises(SystemExit):
            evaluate.parse_args(flags)
        assert error in capsys.readouterr().err


@pytest.mark.fast
def test_an_error_of_a_flag_is_two_lines(capsys):
    for words in (["--tile", "x"], ["--nonsense"], ["--lq", "x", "--degradation", "bicubic", "--metrics", "ranker"]):
        with pytest.raises(SystemExit) as stopped:
            evaluate.parse_args(words)
        first, second = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and ": error: " in first
        assert second.startswith("see ") and second.endswith(" --help")


def test_a_script_names_itself_in_its_errors(script):
    for name, command in (("evaluate.py", "evaluate.py"), ("report.tables", "python -m report.tables")):
        done = script(name, "--nonsense", check=False)
        assert done.returncode == 2 and done.stderr.splitlines()[0].startswith(f"{name}: error: ")
        assert done.stderr.splitlines()[1:] == [f"see {command} --help"]


@pytest.mark.fast
def test_vgg_is_the_loss_of_training_as_a_distance(pairs, vgg_file):
    result = call(pairs, "--metrics", "vgg", "--metric-weights", f"vgg={vgg_file}")
    loss = VGGFeatureLoss(vgg_file)
    lq, gt = (load_image(pairs / folder / "0.png")[None].float() / 255 for folder in ("lq", "gt"))
    assert result["scores"]["bicubic"]["0"]["vgg"] == pytest.approx(loss(bicubic(lq), gt).item(), rel=1e-5)
    assert result["lower_is_better"] == {"vgg": True} and result["full_reference"] == ["vgg"]


@pytest.mark.skipif(not SET5.is_dir(), reason=f"{SET5}: not there")
def test_bicubic_on_set5_is_the_published_row():
    """28.42 dB and 0.8104 in SRCNN, VDSR and what followed: MATLAB's imresize both ways, Y, 4 pixels cropped."""
    values = []
    for path in sorted(SET5.glob("*.png")):
        gt = cut_to_x4(load_image(path)[None].float() / 255)
        sr = degradations.to_8bit(metrics.bicubic(degradations.bicubic(gt)))
        values.append([metric(metrics.luma(sr), metrics.luma(gt), 4).item() for metric in (metrics.psnr, metrics.ssim)])
    psnr, ssim = np.mean(values, 0)
    assert psnr == pytest.approx(28.42, abs=0.02) and ssim == pytest.approx(0.8104, abs=0.001)


@pytest.mark.fast
def test_means_are_over_images_and_native_units_keep_their_sign(pairs, rewards, capsys):
    result = call(pairs, "--metrics", "psnr", "test_rewards:brightness", "--save", pairs / "kept")
    assert result["images"] == 3 and set(result["mean"]) == {"bicubic", "net"}
    assert {"commit", "torch", "device", "command"} <= set(result)
    for row, images in result["scores"].items():
        assert result["mean"][row]["psnr"] == pytest.approx(sum(s["psnr"] for s in images.values()) / 3)
        assert all(0 < s["test_rewards:brightness"] < 100 for s in images.values())
    assert "bicubic" in capsys.readouterr().out
    pictures.grid(result, pairs / "out.png", 2)
    assert load_image(pairs / "out.png").shape == (3, 2 * (84 + 28) + 4, 3 * 72 + 2 * 4)


@pytest.mark.fast
def test_a_row_is_the_nets_output_in_8_bit(pairs):
    result = call(pairs)
    net, _ = archs.load_generator(pairs / "net.pth")
    with torch.no_grad():
        sr = net(load_image(pairs / "lq" / "1.png")[None].float() / 255).clamp(0, 1).mul(255).round() / 255
    gt = load_image(pairs / "gt" / "1.png")[None].float() / 255
    assert result["scores"]["net"]["1"]["psnr"] == pytest.approx(metrics.psnr(sr, gt).item(), abs=1e-6)


@pytest.mark.fast
def test_lower_is_better_metrics_are_reported_in_native_units(pairs, monkeypatch, tmp_path):
    (tmp_path / "darkness.py").write_text("def build(device):\n    def score(x):\n        return x.mean((1, 2, 3))\n"
                                          "    score.lower_better = True\n    return score\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = call(pairs, "--metrics", "darkness:build")
    assert result["lower_is_better"] == {"darkness:build": True} and result["mean"]["net"]["darkness:build"] > 0


@pytest.mark.fast
@pytest.mark.parametrize("more, error", [
    (["--lq", "/nowhere"], "no such folder"),
    (["--weights", "/nowhere"], "no such file or run"),
    (["--metrics", "mosaic"], "unknown"),
    (["--metrics", "ranker=2"], "no weight here; write ranker"),
    (["--save", "/proc/x"], "--save /proc/x cannot be written"),
    (["--out-json", "/tmp"], "--out-json /tmp: a folder; name a file"),
    (["--against", "nobody"], "--against nobody: no such row; there are bicubic, net"),
    (["--metric-weights", "niqe=x"], "NAME of --metrics")])
def test_refusals(pairs, more, error):
    with pytest.raises(runs.UserError, match=error):
        call(pairs, *more)
    assert not (pairs / "out.json").exists()


@pytest.mark.fast
def test_missing_and_misfitting_references_are_named(pairs):
    save_image(pairs / "gt" / "2.png", torch.rand(3, 80, 72))
    error = r"bicubic, image 2: .*lq/2.png x4 has 72x84 pixels, its reference .*gt/2.png 72x80"
    with pytest.raises(runs.UserError, match=error):
        call(pairs)
    # before any work
    assert not list((pairs / "cache").glob("*"))
    (pairs / "gt" / "2.png").unlink()
    with pytest.raises(runs.UserError, match="no reference for 1 of 3 images, first 2"):
        call(pairs)


def test_swinirs_padding_is_the_runs_own_and_other_scales_are_refused(pairs):
    torch.manual_seed(1)
    net = archs.create("swinir-small", pad_mode="swinir").eval()
    runs.save_weights(pairs / "run" / "weights" / "ema_0000001.pth", net.state_dict())
    runs.save_json(pairs / "run" / "args.json", {"args": {"pad_mode": "swinir"}, "commit": "abc"})
    # sides of whole windows: only hggt pads them
    for folder, k in (("lq", 1), ("gt", 4)):
        save_image(pairs / folder / "0.png", torch.rand(3, 24 * k, 16 * k))
    lq, gt = (load_image(pairs / folder / "0.png")[None].float() / 255 for folder in ("lq", "gt"))
    psnr = {}
    for mode in ("swinir", "hggt"):
        net.pad_mode = mode
        with torch.no_grad():
            psnr[mode] = metrics.psnr(net(lq).clamp(0, 1).mul(255).round() / 255, gt).item()
    assert abs(psnr["swinir"] - psnr["hggt"]) > 1e-4
    own = call(pairs, "--weights", pairs / "run")
    assert own["scores"]["run"]["0"]["psnr"] == pytest.approx(psnr["swinir"], abs=1e-5)
    forced = call(pairs, "--weights", pairs / "run", "--pad-mode", "hggt")
    assert forced["scores"]["run"]["0"]["psnr"] == pytest.approx(psnr["hggt"], abs=1e-5)
    runs.save_weights(pairs / "x2.pth", archs.create("rrdbnet-small", scale=2).state_dict())
    with pytest.raises(runs.UserError, match="x2.pth: a x2 checkpoint"):
        call(pairs, "--weights", pairs / "x2.pth")


# HGGT's protocol, RealSR, photographs, other rows, files

# of 01..04, by A, B, C
VOTES = {"a-0-0": ("PPP", "PPN", "SNP", "NNN"), "b-0-0": ("PSP", "NNP", "PNS", "PPP"),
         "c-0-0": ("SSP", "NPP", "PPS", "SSS")}
POSITIVES = {"a-0-0": ["01", "02"], "b-0-0": ["01", "04"], "c-0-0": ["02", "03"]}


@pytest.fixture
def hggt(tmp_path):
    """Three test quintuplets with known votes, LR images, and a checkpoint."""
    torch.manual_seed(0)
    words = {"P": "Positive", "S": "Similar", "N": "Negative"}
    images = tmp_path / "set" / "Test" / "GT" / "Test-100" / "images"
    for stem, votes in VOTES.items():
        gt = torch.rand(3, 80, 80)
        save_image(images / "original" / f"{stem}.png", gt)
        save_image(tmp_path / "set" / "Test" / "Blind" / "Blind_LR" / f"{stem}.png", gt[:, ::4, ::4])
        for k in range(1, 5):
            version = (gt + 0.05 * k * torch.rand(3, 80, 80)) / (1 + 0.05 * k)
            save_image(images / f"0{k}" / f"{stem}_0{k}.png", version)
        for j, annotator in enumerate("ABC"):
            entries = {"Picture_1": {"Name": f"{stem}.png", "File": "original", "Label": None}}
            for k in range(1, 5):
                label = words[votes[k - 1][j]]
                entries[f"Picture_{k + 1}"] = {"Name": f"{stem}_0{k}.png", "File": f"0{k}", "Label": label}
            runs.save_json(images.parent / "labels" / annotator / f"{stem}.json", entries)
    runs.save_weights(tmp_path / "net.pth", archs.create("compact-small").state_dict())
    return tmp_path


def judge(hggt, *more):
    return run(hggt, "--data", hggt / "set", "--metrics", "psnr", "ssim", "test_rewards:brightness", *more)


def lq_file(hggt, stem):
    return hggt / "set" / "Test" / "Blind" / "Blind_LR" / f"{stem}.png"


def image(hggt, stem, version):
    name = f"{stem}.png" if version == "original" else f"{stem}_{version}.png"
    return load_image(hggt / "set" / "Test" / "GT" / "Test-100" / "images" / version / name)[None].float() / 255


@pytest.mark.fast
def test_full_reference_metrics_are_averaged_over_the_positives_then_over_images(hggt, rewards):
    result = judge(hggt, "--baselines", "bicubic", "reference", "gold")
    for stem, versions in POSITIVES.items():
        sr = bicubic(load_image(lq_file(hggt, stem))[None].float() / 255)
        for name, metric in (("psnr", metrics.psnr), ("ssim", metrics.ssim)):
            by_hand = np.mean([metric(sr, image(hggt, stem, v)).item() for v in versions])
            assert result["scores"]["bicubic"][stem][name] == pytest.approx(by_hand, rel=1e-9)
            original = image(hggt, stem, "original")
            by_hand = np.mean([metric(original, image(hggt, stem, v)).item() for v in versions])
            assert result["scores"]["reference"][stem][name] == pytest.approx(by_hand, rel=1e-9)
        brightness = [100 * image(hggt, stem, v).mean().item() for v in ("original", "01", "02", "03", "04")]
        assert result["scores"]["gold"][stem] == {"test_rewards:brightness": pytest.approx(max(brightness), abs=1e-4)}
    psnr = [s["psnr"] for s in result["scores"]["bicubic"].values()]
    assert result["mean"]["bicubic"]["psnr"] == pytest.approx(np.mean(psnr))
    assert result["protocol"]["name"] == "hggt" and result["protocol"]["border"] == 4
    low, high = result["intervals"]["net"]["psnr"]
    assert low < result["mean"]["net"]["psnr"] < high


@pytest.mark.fast
def test_differences_are_to_the_first_of_weights_or_to_the_row_that_is_named(hggt, rewards, capsys):
    torch.manual_seed(7)
    runs.save_weights(hggt / "other.pth", archs.create("compact-small").state_dict())
    both = ["--weights", hggt / "net.pth", hggt / "other.pth", "--baselines", "bicubic", "gold"]
    result = judge(hggt, *both)
    assert list(result["scores"]) == ["gold", "bicubic", "net", "other"]
    assert result["against"] == "net" and set(result["differences"]) == {"gold", "bicubic", "other"}
    assert set(result["differences"]["other"]) == {"psnr", "ssim", "test_rewards:brightness"}
    assert set(result["differences"]["gold"]) == {"test_rewards:brightness"}
    change = result["mean"]["other"]["psnr"] - result["mean"]["net"]["psnr"]
    assert result["differences"]["other"]["psnr"]["mean"] == pytest.approx(change)
    printed = capsys.readouterr().out
    assert printed.index("\ngold ") < printed.index("\nbicubic ")
    assert "\nminus net " in printed and "minus bicubic" not in printed
    named = judge(hggt, *both, "--against", "bicubic")
    assert named["against"] == "bicubic" and set(named["differences"]) == {"gold", "net", "other"}
    assert tables.change_row(named, "net")["differences"] == result["differences"]
    for stem in VOTES:
        save_image(hggt / "ready" / f"{stem}.png", image(hggt, stem, "03")[0])
    words = ["--data", hggt / "set", "--metrics", "psnr", "--images", hggt / "ready"]
    assert run(hggt, *words, weights=None)["against"] == "ready"


@pytest.fixture
def calls(monkeypatch):
    """Counts the images that each metric judges: calls() -> {metric: images since the last call}."""
    made, create = [], metrics.create_metric

    def counted(name, *more):
        metric = create(name, *more)

        def function(sr, gt):
            made.append((name, len(sr)))
            return metric.function(sr, gt)
        return metrics.Metric(function, metric.lower_is_better, metric.full_reference, metric.identity)

    def count():
        total = {m: sum(n for name, n in made if name == m) for m in dict(made)}
        made.clear()
        return total
    monkeypatch.setattr(metrics, "create_metric", counted)
    return count


@pytest.mark.fast
def test_a_second_call_computes_only_what_is_new(hggt, rewards, calls):
    first = judge(hggt)
    # rows, images, positives
    assert calls() == {"psnr": 2 * 3 * 2, "ssim": 2 * 3 * 2, "test_rewards:brightness": 2 * 3}
    assert judge(hggt)["scores"] == first["scores"] and calls() == {}
    torch.manual_seed(7)
    runs.save_weights(hggt / "other.pth", archs.create("compact-small").state_dict())
    both = judge(hggt, "--weights", hggt / "net.pth", hggt / "other.pth")
    assert both["scores"]["net"] == first["scores"]["net"] != both["scores"]["other"] and calls()["psnr"] == 3 * 2
    judge(hggt, "--protocol", "y")
    assert set(calls()) == {"psnr", "ssim"}
    save_image(lq_file(hggt, "a-0-0"), torch.rand(3, 20, 20))
    assert judge(hggt)["scores"]["net"]["a-0-0"] != first["scores"]["net"]["a-0-0"] and calls()["psnr"] == 2 * 2
    file, = (hggt / "cache").iterdir()
    # killed in the middle of a line
    file.write_text(file.read_text().rstrip("\n")[:-9])
    judge(hggt)
    assert sum(calls().values()) == 1


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
    net, adapter = adapted(hggt), hggt / "tuned" / "lora" / "adapter.pth"
    lora.save_lora(adapter, net)
    runs.save_json(hggt / "tuned" / "args.json", {"args": {"init": str(hggt / "net.pth"), "base": "runs/none"}})
    runs.save_weights(hggt / "tuned" / "weights" / "merged.pth", lora.merged_state_dict(net))
    for k, stem in enumerate(VOTES):
        with torch.no_grad():
            sr = net(load_image(lq_file(hggt, stem))[None].float() / 255)[0]
        save_image(hggt / "outputs" / (f"{stem}_mine.png" if k else f"{stem}.png"), sr)
    result = judge(hggt, "--weights", hggt / "net.pth", hggt / "tuned" / "weights" / "merged.pth", adapter,
                   "--images", hggt / "outputs")
    assert list(result["scores"]) == ["bicubic", "net", "tuned", "tuned x1", "outputs"]
    for row in ("tuned x1", "outputs"):
        for stem in VOTES:
            assert result["scores"][row][stem] == pytest.approx(result["scores"]["tuned"][stem], abs=1e-3)
    plain = judge(hggt, "--weights", adapter, "--scale", 0)
    assert plain["mean"]["tuned x0"] == pytest.approx(result["mean"]["net"])
    (hggt / "outputs" / "b-0-0_mine.png").unlink()
    with pytest.raises(runs.UserError, match="0 files for image b-0-0"):
        judge(hggt, "--images", hggt / "outputs")


@pytest.mark.fast
def test_an_adapter_without_its_run_folder_and_at_several_strengths(hggt, rewards):
    adapter = hggt / "sent" / "adapter.pth"
    lora.save_lora(adapter, adapted(hggt))
    with pytest.raises(runs.UserError, match="name the tuned weights with --base"):
        judge(hggt, "--weights", adapter)
    result = judge(hggt, "--weights", hggt / "net.pth", adapter, "--base", hggt / "net.pth", "--scale", 0, 0.5, 1,
                   "--names", "before", "tuned")
    assert list(result["scores"]) == ["bicubic", "before", "tuned x0", "tuned x0.5", "tuned x1"]
    before, none, half, whole = (result["scores"][row] for row in list(result["scores"])[1:])
    assert none == before != half != whole
    assert [result["weights"][f"tuned x{k}"]["strength"] for k in ("0", "0.5", "1")] == [0, 0.5, 1]


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
    with pytest.raises(runs.UserError, match="has no LR images .*--degradation"):
        judge(hggt)
    again = judge(hggt, "--degradation", "two-round", "--baselines", "bicubic", "reference")
    # no labels: the original is the reference
    assert again["mean"]["reference"]["psnr"] == 100
    name = "test_rewards:brightness"
    assert again["scores"]["bicubic"]["a-0-0"][name] == first["scores"]["bicubic"]["a-0-0"][name]


@pytest.mark.fast
@pytest.mark.parametrize("degradation", ["bicubic", "one-round", "two-round", "realesrgan"])
def test_sharp_photographs_become_pairs(pairs, rewards, capsys, degradation):
    sizes = {"plain": (96, 128), "odd": (99, 130)}
    for name, (height, width) in sizes.items():
        save_image(pairs / "photos" / f"{name}.png", torch.rand(3, height, width))
    words = ["--gt", pairs / "photos", "--degradation", degradation, "--metrics", "psnr", "test_rewards:brightness",
             "--baselines", "bicubic", "reference", "--save", pairs / "kept"]
    result = run(pairs, *words)
    assert result["mean"]["reference"]["psnr"] == 100 and result["protocol"]["degradation"] == degradation
    printed = capsys.readouterr().out
    assert "remark: 1 of 2 originals and references are cut to multiples of 4 pixels" in printed
    assert "photos/odd.png" in printed
    for name, (height, width) in sizes.items():
        files = result["saved"]["images"][name]
        cut = {image_size(files[cell]) for cell in ("GT", "reference", "bicubic", "net")}
        assert cut == {(width // 4 * 4, height // 4 * 4)}
        assert image_size(files["LR"]) == (width // 4, height // 4)
        photo = pairs / "photos" / f"{name}.png"
        assert torch.equal(load_image(files["GT"]), load_image(photo)[:, :height // 4 * 4, :width // 4 * 4])
        lq = load_image(files["LR"])[None].float() / 255
        gt = load_image(files["GT"])[None].float() / 255
        by_hand = metrics.psnr(bicubic(lq), gt).item()
        assert result["scores"]["bicubic"][name]["psnr"] == pytest.approx(by_hand, abs=1e-9)
    assert Path(result["saved"]["images"]["plain"]["GT"]) == pairs / "photos" / "plain.png"
    shutil.rmtree(pairs / "cache")
    assert run(pairs, *words)["scores"] == result["scores"]


@pytest.mark.fast
def test_photographs_alone_need_a_degradation(capsys):
    made = ["--gt", "x", "--degradation", "bicubic"]
    for words, error in ((["--gt", "x"], "--gt DIR alone"), ([*made, "--lq", "x"], "leave one out"),
                         ([*made, "--baselines", "gold"], "needs a quintuplet set")):
        with pytest.raises(SystemExit):
            evaluate.parse_args(["--weights", "net.pth", "--metrics", "psnr", *words])
        assert error in capsys.readouterr().err


@pytest.mark.fast
def test_saved_outputs_are_the_scored_images_and_networks_run_once(hggt, rewards, monkeypatch):
    ran, through = [], archs.SRVGGNetCompact.forward

    def counted(net, x):
        ran.append(len(x))
        return through(net, x)
    monkeypatch.setattr(archs.SRVGGNetCompact, "forward", counted)
    result = judge(hggt, "--save", hggt / "kept", "--baselines", "bicubic", "reference", "gold")
    assert len(ran) == 3
    for stem, files in result["saved"]["images"].items():
        assert list(files) == ["LR", "GT", "GT 2", "bicubic", "reference", "net"]
        assert Path(files["LR"]) == lq_file(hggt, stem) and Path(files["net"]) == hggt / "kept" / "net" / f"{stem}.png"
        sr = load_image(files["net"])[None].float() / 255
        by_hand = np.mean([metrics.psnr(sr, image(hggt, stem, v)).item() for v in POSITIVES[stem]])
        assert result["scores"]["net"][stem]["psnr"] == pytest.approx(by_hand, abs=1e-9)
        for cell, version in zip(("GT", "GT 2"), POSITIVES[stem]):
            brightness = pytest.approx(100 * image(hggt, stem, version).mean().item(), abs=1e-4)
            assert result["saved"]["references"][stem][cell] == {"test_rewards:brightness": brightness}
    pictures.grid(result, hggt / "out.png")
    page.write(result, hggt / "out.html")
    assert len(ran) == 3
    # another network of this name: its outputs replace the others
    torch.manual_seed(5)
    runs.save_weights(hggt / "net.pth", archs.create("compact-small").state_dict())
    again = judge(hggt, "--save", hggt / "kept")
    sr = load_image(again["saved"]["images"]["a-0-0"]["net"])[None].float() / 255
    by_hand = np.mean([metrics.psnr(sr, image(hggt, "a-0-0", v)).item() for v in POSITIVES["a-0-0"]])
    assert again["scores"]["net"]["a-0-0"]["psnr"] == pytest.approx(by_hand, abs=1e-9)


@pytest.mark.slow
def test_processes_share_the_images(hggt, script):
    words = ["--weights", hggt / "net.pth", "--data", hggt / "set", "--metrics", "psnr", "ranker", "--device", "cpu"]
    for name, processes in (("one", 1), ("two", 2)):
        script("evaluate.py", *words, "--cache", hggt / f"{name}-cache", "--out-json", hggt / f"{name}.json",
               "--save", hggt / f"{name}-kept", processes=processes)
    one, two = (json.loads((hggt / f"{name}.json").read_text()) for name in ("one", "two"))
    assert list(one["scores"]["net"]) == list(two["scores"]["net"]) == list(VOTES)
    for row, images in one["scores"].items():
        for stem, s in images.items():
            assert two["scores"][row][stem] == pytest.approx(s, abs=1e-4)
            assert torch.equal(*(load_image(result["saved"]["images"][stem][row]) for result in (one, two)))
    assert one["saved"]["references"].keys() == two["saved"]["references"].keys()


# The cache

def cached(pairs):
    return b"".join(file.read_bytes() for file in sorted((pairs / "cache").iterdir()))


@pytest.mark.fast
def test_scores_of_another_version_of_the_scoring_are_not_used(pairs, monkeypatch):
    first = call(pairs)
    before = cached(pairs)
    assert call(pairs)["versions"] == first["versions"] and cached(pairs) == before
    monkeypatch.setattr(iqa, "SCORING_VERSION", iqa.SCORING_VERSION + 1)
    again = call(pairs)
    assert cached(pairs).startswith(before) and len(cached(pairs).splitlines()) == 2 * len(before.splitlines())
    assert again["versions"] != first["versions"] and again["scores"] == first["scores"]


@pytest.mark.fast
def test_scores_of_other_tiles_and_overlaps_are_not_used(pairs, monkeypatch):
    call(pairs)

    def size():
        return len(cached(pairs).splitlines())
    assert size() == 2 * 3
    # bicubic knows no tiles
    assert call(pairs, "--tile", 200)["weights"]["net"]["tile"] == 200 and size() == 3 * 3
    monkeypatch.setattr(archs, "OVERLAP", 48)
    assert call(pairs, "--tile", 200)["weights"]["net"]["overlap"] == 48 and size() == 4 * 3


@pytest.mark.fast
def test_the_precision_is_recorded_and_scores_of_another_are_not_used(pairs, monkeypatch, capsys):
    monkeypatch.setattr(runs, "cpu_flags", lambda: ["amx_bf16"])
    exact = call(pairs)
    assert capsys.readouterr().out.count("remark: --precision bf16") == 1
    before = cached(pairs)
    coarse = call(pairs, "--precision", "bf16")
    out = capsys.readouterr().out
    assert "mean of 3 images; networks in bf16" in out and "remark" not in out
    # bicubic, which is no network, is not computed again
    assert len(cached(pairs).splitlines()) == len(before.splitlines()) + 3
    assert [result["weights"]["net"]["precision"] for result in (exact, coarse)] == ["fp32", "bf16"]
    (one, other) = ([s["psnr"] for s in result["scores"]["net"].values()] for result in (exact, coarse))
    assert one != other and one == pytest.approx(other, abs=0.02)
    assert call(pairs)["scores"] == exact["scores"]


@pytest.mark.fast
def test_the_overlap_in_the_identity_is_the_one_that_is_used(pairs, monkeypatch):
    seen, tiled = [], archs.upscaled_rows

    def counted(net, lq, scale, tile, overlap, *more):
        seen.append((tile, overlap))
        return tiled(net, lq, scale, tile, overlap, *more)
    monkeypatch.setattr(archs, "upscaled_rows", counted)
    made = call(pairs)["weights"]["net"]
    assert set(seen) == {(made["tile"], made["overlap"])} and made["tile"] == 256


@pytest.mark.fast
def test_lines_of_the_cache_that_are_no_records_are_skipped(pairs):
    first = call(pairs)
    file, = (pairs / "cache").iterdir()
    good = cached(pairs).splitlines()
    assert b"" not in good
    nan, missing = json.loads(good[0]) | {"score": float("nan")}, {"key": json.loads(good[1])["key"]}
    junk = [json.dumps(nan).encode(), json.dumps(missing).encode(), b"{bad}", b"null}", b"\xff\xfe}", b"[1]", b"3",
            b'{"key": 3, "score": 1.0}', b'{"key": "x", "score": "y"}', b'{"key": "x", "score": true}', b"[" * 100_000]
    file.write_bytes(b"\n".join([*good[2:], *junk]) + b"\n")
    before = cached(pairs)
    assert call(pairs)["scores"] == first["scores"]
    assert cached(pairs).startswith(before) and len(cached(pairs)[len(before):].splitlines()) == 2
    # cut off: one line lost, and the next one starts anew
    file.write_bytes(cached(pairs)[:-9])
    assert call(pairs)["scores"] == first["scores"] and call(pairs)["scores"] == first["scores"]
    assert b"" not in cached(pairs).splitlines() and json.loads(cached(pairs).splitlines()[-1])["key"]


# Refusals

@pytest.mark.fast
@pytest.mark.parametrize("words, error", [
    (["--names", "a", "b"], "--names: 2 names for 1 --weights"),
    (["--base", "x.pth"], "--base: names what adapters belong to"),
    (["--total-steps", "2"], "--total-steps: is for --demo")])
def test_flags_that_make_no_sense_together(words, error, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--weights", "net.pth", "--metrics", "psnr", *words])
    assert error in capsys.readouterr().err


@pytest.mark.fast
def test_ready_made_outputs_of_another_size_are_named_before_any_work(pairs, rewards):
    for i in range(3):
        save_image(pairs / "sr" / f"{i}.png", torch.rand(3, 84, 72 - 4 * (i == 1)))
    error = r"sr, image 1: .*sr/1.png has 68x84 pixels, its reference .*gt/1.png 72x84"
    with pytest.raises(runs.UserError, match=error):
        call(pairs, "--images", pairs / "sr")
    assert not (pairs / "cache").exists()
    # nothing compares
    words = ["--images", pairs / "sr", "--metrics", "test_rewards:brightness", "--save", pairs / "kept"]
    result = call(pairs, *words)
    assert "sr" in result["mean"]
    with pytest.raises(runs.UserError, match="sr, image 1: .* has 68x84 pixels"):
        pictures.grid(result, pairs / "x.png", crops=["1:0,0,64"])


@pytest.mark.fast
def test_an_image_that_a_metric_cannot_judge_is_named_with_its_row_and_size(pairs):
    for i in range(3):
        save_image(pairs / "sr" / f"{i}.png", torch.rand(3, *((84, 72) if i != 1 else (20, 24))))
    error = r"sr, image 1 \(24x20 pixels\): ranker cannot judge it \(ranker wants .*at least 32 pixels"
    with pytest.raises(runs.UserError, match=error):
        call(pairs, "--images", pairs / "sr", "--metrics", "ranker")


@pytest.mark.fast
def test_an_image_without_a_finite_score_is_left_out_of_that_metrics_mean_and_counted(pairs, rewards, capsys):
    save_image(pairs / "sr" / "0.png", torch.rand(3, 84, 72))
    save_image(pairs / "sr" / "1.png", torch.ones(3, 84, 72))
    save_image(pairs / "sr" / "2.png", torch.rand(3, 84, 72))
    words = ["--images", pairs / "sr", "--metrics", "psnr", "test_rewards:singular_when_white", "--against", "bicubic"]
    for _ in range(2):
        # the second time from the cache
        result = call(pairs, *words)
        scores, m = result["scores"], "test_rewards:singular_when_white"
        assert "psnr" in scores["sr"]["1"] and m not in scores["sr"]["1"] and m in scores["net"]["1"]
        for row in ("bicubic", "net", "sr"):
            assert result["mean"][row][m] == pytest.approx(np.mean([scores[row][stem][m] for stem in "02"]))
            assert result["mean"][row]["psnr"] == pytest.approx(np.mean([s["psnr"] for s in scores[row].values()]))
        assert result["differences"]["sr"][m]["mean"] == pytest.approx(result["mean"]["sr"][m]
                                                                       - result["mean"]["bicubic"][m])
        footer = f"{m}: 1 of 3 images are left out, first 1: not every row has a finite score there"
        assert capsys.readouterr().out.count(footer) == 1
    assert footer in tables.markdown(result) and footer in tables.latex(result).splitlines()[0]
    assert "NaN" not in (pairs / "out.json").read_text()

    # no image has one
    for i in range(3):
        save_image(pairs / "sr" / f"{i}.png", torch.ones(3, 84, 72))
    result = call(pairs, *words)
    assert m not in result["mean"]["sr"] and m in result["mean"]["net"]


@pytest.mark.fast
def test_a_network_whose_output_is_not_finite_is_named(pairs):
    state = archs.create("compact-small").state_dict()
    state["body.0.bias"][0] = float("nan")
    runs.save_weights(pairs / "broken.pth", state)
    error = "broken, image 0: the network's output is not finite: look at its weights"
    with pytest.raises(runs.UserError, match=error):
        call(pairs, "--weights", pairs / "broken.pth")


@pytest.mark.fast
def test_realsr_is_tested_on_whole_images():
    def tile(*words):
        return evaluate.parse_args(["--weights", "net.pth", *words]).tile
    assert tile("--protocol", "realsr") == 0 and tile() == 256 and tile("--protocol", "realsr", "--tile", "200") == 200


@pytest.mark.fast
def test_no_row_takes_the_name_of_another_part_of_the_table():
    for name in ("gold", "LR", "GT", "GT 2"):
        with pytest.raises(runs.UserError, match=f"no row can be called {name}"):
            evaluate.add_row({}, name, metrics.Row())
    with pytest.raises(runs.UserError, match="two rows are called a"):
        evaluate.add_row({"a": metrics.Row()}, "a", metrics.Row())


@pytest.mark.fast
def test_all_metrics_that_cannot_be_created_are_named_at_once(pairs, monkeypatch):
    create = metrics.create_metric
    # as the hub's client raises it
    refused = OSError("no network")
    refused.request = SimpleNamespace(url="https://huggingface.co/timm/resnet50.a1_in1k/resolve/main/model.safetensors")

    def without_network(name, *more):
        if name != "topiq_nr":
            return create(name, *more)
        try:
            raise OSError("cannot find the requested files") from refused
        except OSError:
            raise runs.UserError("--metrics topiq_nr: weights are not here") from None

    def no_route(*words, **options):
        raise OSError("no route to host")
    monkeypatch.setattr(metrics, "create_metric", without_network)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_route)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_route)
    with pytest.raises(runs.UserError) as caught:
        call(pairs, "--metrics", "psnr", "mosaic", "topiq_nr", "vgg", "ranker")
    error = str(caught.value)
    for part in ("3 metrics cannot be created: ", "--metrics mosaic: this is unknown",
                 "--metrics vgg: no VGG19 weights", "timm/resnet50.a1_in1k/resolve/main/model.safetensors",
                 "--metric-weights vgg=FILE"):
        assert part in error, error
    assert "--lambda-p" not in error and "--vgg-weights" not in error and not (pairs / "cache").exists()


@pytest.mark.fast
def test_only_takes_a_line_as_one_name(pairs):
    for folder in ("lq", "gt"):
        (pairs / folder / "0.png").rename(pairs / folder / "my photo.png")
        (pairs / folder / "1.png").rename(pairs / folder / "cafe\u0301.png")
    # Windows' editor: a mark at the beginning, two signs at the end of a line
    (pairs / "only.txt").write_text("\ufeffmy photo\r\n\r\n  caf\u00e9  \r\n", encoding="utf-8", newline="")
    result = call(pairs, "--only", pairs / "only.txt", "--save", pairs / "kept")
    assert list(result["scores"]["net"]) == ["my photo", "caf\u00e9"]
    for text, error in (("my", "is called my$"), ("\n \n", "names no image"), ("my photo 2", "called my photo 2")):
        (pairs / "only.txt").write_text(text)
        with pytest.raises(runs.UserError, match=error):
            call(pairs, "--only", pairs / "only.txt")
    (pairs / "only.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(runs.UserError, match="no image is called caf"):
        call(pairs, "--only", pairs / "only.txt")


@pytest.mark.fast
def test_a_path_with_a_sign_of_equality_to_metric_weights(pairs, vgg_file):
    folder = pairs / "lr=1e-4"
    folder.mkdir()
    shutil.copy(vgg_file, folder / "vgg=1.pth")
    one, two = (call(pairs, "--metrics", "vgg", "--metric-weights", f"vgg={file}")["scores"]["net"]
                for file in (folder / "vgg=1.pth", vgg_file))
    assert one == two
    with pytest.raises(runs.UserError, match="write NAME=FILE with a NAME of --metrics"):
        call(pairs, "--metrics", "vgg", "--metric-weights", f"lr=1e-4/vgg={vgg_file}")


@pytest.mark.fast
def test_div2ks_names_are_pairs(pairs):
    """0001x4.png belongs to 0001.png."""
    for k in range(3):
        (pairs / "lq" / f"{k}.png").rename(pairs / "lq" / f"{k}x4.png")
    result = call(pairs, "--images", pairs / "gt")
    assert list(result["scores"]["gt"]) == ["0x4", "1x4", "2x4"]
    assert all(scores["psnr"] == 100 for scores in result["scores"]["gt"].values())


@pytest.mark.fast
def test_references_are_cut_to_multiples_of_4_and_it_is_said(tmp_path, capsys):
    """As Set14 is published: whole photographs, and LR images of their largest part of whole pixels."""
    torch.manual_seed(0)
    for name, height, width in (("a", 174, 213), ("b", 84, 72), ("c", 87, 75)):
        save_image(tmp_path / "gt" / f"{name}.png", torch.rand(3, height, width))
        save_image(tmp_path / "lq" / f"{name}.png", torch.rand(3, height // 4, width // 4))
    result = run(tmp_path, "--lq", tmp_path / "lq", "--gt", tmp_path / "gt", "--metrics", "psnr", "ranker",
                 "--baselines", "bicubic", "reference", "--save", tmp_path / "kept", weights=None)
    assert "remark: 2 of 3 originals and references are cut to multiples of 4 pixels" in capsys.readouterr().out
    for name, size in (("a", (212, 172)), ("c", (72, 84))):
        files = result["saved"]["images"][name]
        assert {image_size(files[cell]) for cell in ("GT", "reference", "bicubic")} == {size}
        lq, gt = (load_image(tmp_path / folder / f"{name}.png")[None].float() / 255 for folder in ("lq", "gt"))
        gt = gt[..., :size[1], :size[0]]
        assert torch.equal(load_image(files["GT"])[None].float() / 255, gt)
        psnr = metrics.create_metric("psnr", "cpu", border=4)(bicubic(lq), gt).item()
        assert result["scores"]["bicubic"][name]["psnr"] == pytest.approx(psnr)
    save_image(tmp_path / "lq" / "a.png", torch.rand(3, 44, 54))
    with pytest.raises(runs.UserError, match="has 216x176 pixels, its reference .*a.png 212x172"):
        run(tmp_path, "--lq", tmp_path / "lq", "--gt", tmp_path / "gt", "--metrics", "psnr", weights=None)


@pytest.mark.fast
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1"])
def test_grey_and_transparent_images_are_refused_by_name_and_read_as_rgb_on_request(pairs, mode):
    for folder in ("lq", "gt"):
        image = Image.open(pairs / folder / "1.png").convert("RGBA" if mode == "LA" else "RGB").convert(mode)
        image.convert("RGB").save(pairs / folder / "2.png")
        image.save(pairs / folder / "1.png")
    with pytest.raises(runs.UserError, match=f"1.png: image mode {mode}, expected 8-bit RGB.*--rgb takes grey"):
        call(pairs)
    # before any work
    assert not list(pairs.glob("cache/*"))
    result = call(pairs, "--rgb", "--save", pairs / "kept")
    assert result["scores"]["net"]["1"] == result["scores"]["net"]["2"]
    page.write(result, pairs / "page.html")
    pictures.grid(result, pairs / "grid.png")
    deep = np.array([[0, 65535]] * 2, np.uint16)
    Image.fromarray(deep).save(pairs / "lq" / "1.png")
    with pytest.raises(runs.UserError, match="1.png: image mode I;16"):
        run(pairs, "--rgb", "--lq", pairs / "lq", "--metrics", "ranker")
    (pairs / "deep").mkdir()
    Image.fromarray(np.tile(deep, (16, 16))).save(pairs / "deep" / "1.png")
    with pytest.raises(runs.UserError) as error:
        run(pairs, "--rgb", "--gt", pairs / "deep", "--degradation", "bicubic", "--metrics", "ranker")
    assert str(error.value).count("1.png") == 1


@pytest.mark.fast
def test_a_link_to_itself_and_a_pipe_do_not_stop_a_folder(pairs):
    for folder in ("lq", "gt"):
        os.mkfifo(pairs / folder / "pipe.png")
        (pairs / folder / "itself.png").symlink_to(pairs / folder / "itself.png")
        (pairs / folder / "folder.png").symlink_to(pairs / folder)
    assert list(call(pairs)["scores"]["net"]) == ["0", "1", "2"]
    (pairs / "lq" / "gone.png").symlink_to(pairs / "nothing.png")
    with pytest.raises(runs.UserError, match="no reference for 1 of 4 images, first gone"):
        call(pairs)


@pytest.mark.fast
def test_an_exact_name_wins_over_one_with_an_ending(tmp_path):
    for name in ("a", "a_1", "b_x", "c_x", "c_y"):
        save_image(tmp_path / f"{name}.png", torch.zeros(3, 4, 4))
    files = match_images(tmp_path, ["a", "a_1", "b"], "--images")
    assert {stem: path.name for stem, path in files.items()} == {"a": "a.png", "a_1": "a_1.png", "b": "b_x.png"}
    with pytest.raises(runs.UserError, match="2 files for image c"):
        match_images(tmp_path, ["c"], "--images")


@pytest.mark.fast
def test_a_stem_without_positives_stops_only_metrics_that_compare(hggt, rewards):
    for annotator in "ABC":
        path = hggt / "set" / "Test" / "GT" / "Test-100" / "labels" / annotator / "b-0-0.json"
        entries = json.loads(path.read_text())
        runs.save_json(path, {k: v | {"Label": v["Label"] and "Similar"} for k, v in entries.items()})
    error = "psnr ssim: compared with references, and 1 of 3 images have none, first b-0-0: none of its versions is a"
    with pytest.raises(runs.UserError, match=error):
        judge(hggt)
    result = judge(hggt, "--metrics", "ranker", "--save", hggt / "kept")
    page.write(result, hggt / "page.html")
    assert "b-0-0" in result["scores"]["net"] and "GT" not in result["saved"]["images"]["b-0-0"]


@pytest.mark.fast
def test_references_without_an_image_are_a_remark_and_a_missing_realsr_is_named(pairs, capsys):
    save_image(pairs / "gt" / "9.png", torch.rand(3, 84, 72))
    assert call(pairs)["images"] == 3
    assert "remark: 1 references in --gt" in capsys.readouterr().out
    for words in (["--data", pairs / "RealSR"], ["--data", pairs / "nowhere", "--protocol", "realsr"]):
        with pytest.raises(runs.UserError, match="no RealSR v3 there .*docs/evaluation.md says where"):
            run(pairs, *words)


# The demo

@pytest.mark.fast
@pytest.mark.parametrize("scores, change, verb", [((20.0, 21.94), "+1.9", "raised"), ((20.0, 17.0), "-3.0", "lowered"),
                                                  ((20.0, 20.004), "+0.004", "raised"),
                                                  ((20.0, 20.0), "+0.000", "did not change")])
def test_the_demos_sentence_says_what_was_seen(scores, change, verb):
    names = ("compact-small-orig", "compact-small-amo")
    result = {"mean": {name: {"ranker": score} for name, score in zip(names, scores)}, "images": 3,
              "files": {"coffee-0-0": {}, "coffee-0-192": {}, "chelsea-0-192": {}}}
    assert evaluate.demo_sentence(result) == (
        f"amo - orig, ranker: {change} (3 patches of 2 photographs). AMO's ground truths {verb} the score of the model "
        "that chose them.")
