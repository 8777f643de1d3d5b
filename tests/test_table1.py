"""selfsup.table1: every system of the HR-aware paper's Table 1 in one call, and what the table says."""
import importlib
import json

import pytest
import torch
from skimage import data as pictures

import archs
import runs
from images import save_image
from report import tables
from selfsup import options, table1


def astronaut(y, x, side):
    return torch.from_numpy(pictures.astronaut()[y:y + side, x:x + side].copy()).permute(2, 0, 1).float() / 255


@pytest.fixture
def folders(tmp_path):
    for k in range(2):
        save_image(tmp_path / "lq" / f"a{k}.png", astronaut(100 * k, 150, 88))
        save_image(tmp_path / "gt" / f"a{k}.png", astronaut(100 * k, 150, 352))
        save_image(tmp_path / "hr" / f"h{k}.png", astronaut(150 * k, 0, 128))
    torch.manual_seed(0)
    runs.save_weights(tmp_path / "sr.pth", archs.create("compact-small").state_dict())
    return tmp_path


TINY = {"kernelgan": "--total-steps 2", "zssr": "--total-steps 2 --width 4 --crop 32",
        "srtta": "--batch-size 2 --patch 16 --steps 1 --types noise",
        "pretrain": "--patch 16 --load-size 64 --degradation two-round --batch-size 2 --group-size 2 --val-photos 1 "
                    "--size tiny --distance proxy --far-enc rand --workers 0 --total-steps 2 --val-every 0",
        "finetune": "--patch 16 --batch-size 2 --total-steps 2 --workers 0 --val-every 0"}


def test_one_call_fills_the_table(folders, monkeypatch, capsys):
    started = []

    def call(script, *words):
        started.append([script, *map(str, words)])
        module = importlib.import_module(script.removesuffix(".py"))
        module.main(module.parse_args([*map(str, words)]))
    monkeypatch.setattr(options, "run", call)
    monkeypatch.setattr(table1, "SMALL", TINY)
    monkeypatch.setattr(table1, "columns", lambda: ["psnr", "ssim"])
    monkeypatch.chdir(folders)
    words = ["--lq", "lq", "--gt", "gt", "--hr", "hr", "--sr", "sr.pth", "--out", "out", "--small", "--force",
             "--paper", "RealSR-Canon", "--device", "cpu", "--threads", "1"]
    table1.main(table1.parse_args(words))
    result = json.loads((folders / "out" / "table1.json").read_text())
    assert set(result["mean"]) == {*table1.ROWS, "online", "bicubic"} and result["protocol"]["name"] == "whole-y"
    text = (folders / "out" / "table1.md").read_text()
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert [name for name in lines if name and "-" not in name[:2]] == [
        "ZSSR", "KernelGAN+ZSSR", "start", "+SRTTA", "+SRTTA, online", "+LWay", "+full"]
    assert "(paper 26.45)" in lines["ZSSR"] and "(paper" not in lines["start"]
    assert "crops" in text and "4 patches of 32 pixels" in text
    assert f"{result['mean']['+full']['psnr']:.2f} [" in lines["+full"]
    # nothing is made twice
    count = len(started)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *a, **k: pytest.fail("trained again"))
    table1.main(table1.parse_args(words))
    assert [words[0] for words in started[count:]] == [words[0] for words in started[:count]]


def test_an_image_too_small_for_a_row_is_named_before_hours_of_other_rows(folders, monkeypatch):
    monkeypatch.setattr(options, "run", lambda *words: pytest.fail("began"))
    monkeypatch.setattr(table1, "columns", lambda: ["psnr", "ssim"])
    save_image(folders / "lq" / "small.png", astronaut(0, 0, 80))
    args = table1.parse_args(["--hr", str(folders / "hr"), "--sr", str(folders / "sr.pth"), "--out", "out", "--lq",
                              str(folders / "lq"), "--gt", str(folders / "gt")])
    with pytest.raises(runs.UserError, match="small.png: 80x80 pixels, KernelGAN needs .* at least 84; take"):
        table1.main(args)


def test_some_rows_with_given_pretrainings(folders, monkeypatch):
    started = []
    monkeypatch.setattr(options, "run", lambda *words: started.append([str(word) for word in words]))
    args = table1.parse_args(["--lq", "l", "--gt", "g", "--hr", "h", "--sr", "s.pth", "--out", "out", "--rec", "rec",
                              "--rows", "start", "+full", "ZSSR"])
    places = table1.make_rows(args)
    assert list(places) == ["start", "ZSSR", "+full"]
    assert [words[0] for words in started] == ["selfsup.zssr", "selfsup.finetune"]
    assert started[1][started[1].index("--rec") + 1] == "rec" and "--force" not in started[1]


@pytest.mark.fast
def test_the_papers_values_and_signs():
    """Facts that the paper's text states of its Table 1; a slip of the pen would break one."""
    def of(row, arch, data):
        return table1.paper_values(row, arch, data)
    for data in table1.SETS:
        assert of("ZSSR", "compact", data)["psnr"] > of("start", "rrdbnet", data)["psnr"]
        assert of("KernelGAN+ZSSR", "", data)["nrqm"] > of("ZSSR", "", data)["nrqm"]
        for arch in ("rrdbnet", "swinir"):
            start, srtta, lway = (of(row, arch, data) for row in ("start", "+SRTTA", "+LWay"))
            assert srtta["ssim"] > start["ssim"] and srtta["nrqm"] < start["nrqm"] > lway["nrqm"]
    assert of("start", "compact", "NTIRE20") is None and of("ZSSR", "rrdbnet", None) is None
    assert of("+full", "rrdbnet", "NTIRE20") == {"psnr": 25.87, "ssim": 0.7204, "lpips": 0.2369, "nrqm": 6.137}


@pytest.mark.fast
def test_columns_are_what_can_be_had(monkeypatch):
    monkeypatch.setattr(table1, "can_be_had", lambda name: False)
    assert table1.columns() == ["psnr", "ssim", "vgg"] and tables.SHOWN["vgg"] == "VGG distance"
    monkeypatch.setattr(table1, "can_be_had", lambda name: True)
    assert table1.columns() == list(table1.METRICS)
