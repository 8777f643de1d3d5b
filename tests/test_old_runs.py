"""Run folders, checkpoints and adapters of commit 6be4990 still open.

tests/old_runs.zip holds a run of train.py and one of finetune_lora.py. They were trained for two steps from weights
that are all zero (compact-small, AMO by brightness, no GAN), on the data set of conftest.py.
"""
import json
import zipfile
from pathlib import Path

import pytest
import torch

import archs
import finetune_lora
import lora
import runs
import train
from images import image_size, save_image

HERE = Path(__file__).resolve().parent
CPU = ["--workers", "0", "--device", "cpu"]
TUNED = ["--arch", "compact-small", "--base", "runs/compact-small-amo", "--reward", "test_rewards:brightness",
         "--lambda-q", "0.01", "--rank", "1", "--watch", *CPU]


@pytest.fixture
def old(tmp_path, monkeypatch, quintuplets, rewards):
    """The folder from which they were trained: runs/ and HGGT/ in it."""
    with zipfile.ZipFile(HERE / "old_runs.zip") as archive:
        archive.extractall(tmp_path / "runs")
    (tmp_path / "HGGT").symlink_to(quintuplets)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_they_load_by_folder_and_by_file(old):
    for name, file in (("compact-small-amo", "ema_0000002.pth"), ("compact-small-amo+brightness", "merged.pth")):
        net, info = archs.load_run(old / "runs" / name, "--weights")
        assert info["arch"] == "compact-small" or info["arch"] == "compact"
        again, _ = archs.load_run(old / "runs" / name / "weights" / file, "--weights")
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())


def test_the_adapter_and_its_base_give_the_merged_weights(old):
    for path in ("runs/compact-small-amo+brightness", "runs/compact-small-amo+brightness/lora/adapter.pth"):
        net, info = lora.load_tuned(Path(path))
        merged, _ = archs.load_run(Path("runs/compact-small-amo+brightness"), "--weights")
        merged = merged.state_dict()
        assert info["strength"] == 1
        assert all(torch.allclose(v, merged[k], atol=1e-7) for k, v in net.state_dict().items())


def test_both_go_on(old):
    train.main(train.parse_args([
        "--arch", "compact-small", "--batch-size", "2", "--group-size", "1", "--pool-size", "4", "--crop", "32",
        "--lambda-p", "0", "--lambda-a", "0", *CPU, "--data", "HGGT", "--reward", "test_rewards:brightness",
        "--init", "unused.pth", "--out", "runs/compact-small-amo", "--total-steps", "3", "--resume"]))
    finetune_lora.main(finetune_lora.parse_args([*TUNED, "--total-steps", "3", "--out", "tuned"]))
    events = map(json.loads, Path("runs/compact-small-amo/metrics.jsonl").read_text().splitlines())
    assert [event["step"] for event in events] == [1, 2, 3]
    assert (old / "runs/compact-small-amo/weights/ema_0000003.pth").exists()
    assert (old / "tuned/lora/adapter.pth").exists()


def test_tuning_goes_on(old):
    out = ["--out", "runs/compact-small-amo+brightness"]
    finetune_lora.main(finetune_lora.parse_args([*TUNED, *out, "--total-steps", "3", "--resume"]))
    assert "resumed at step 2" in Path("runs/compact-small-amo+brightness/log.txt").read_text()


def test_a_flag_that_is_gone_is_named_where_a_run_used_it(old):
    file = old / "runs/compact-small-amo/ckpt/last.pt"
    state = runs.load_checkpoint(file)
    state["args"]["clip_grad"] = 0.5
    torch.save(state, file)
    message = "its clip_grad 0.5 is no flag any more; the commit in its args.json continues it"
    with pytest.raises(runs.UserError, match=message):
        train.main(train.parse_args(["--arch", "compact-small", "--data", "HGGT", "--out", "runs/compact-small-amo",
                                     "--resume", "--device", "cpu"]))


def test_scripts_take_them(old, script):
    save_image(old / "lq" / "a.png", torch.rand(3, 20, 24))
    for weights in (["--weights", "runs/compact-small-amo"], ["--lora", "runs/compact-small-amo+brightness"]):
        script("upscale.py", "lq/a.png", *weights, "--out", "sr", "--overwrite", "--device", "cpu", cwd=old)
        assert image_size(old / "sr" / "a.png") == (96, 80)
    weights = ["runs/compact-small-amo", "runs/compact-small-amo+brightness/lora/adapter.pth"]
    script("evaluate.py", "--weights", *weights, "--lq", "lq", "--metrics", "ranker", "--device", "cpu",
           "--out-json", "table.json", cwd=old)
    rows = list(json.loads((old / "table.json").read_text())["mean"])
    assert rows == ["bicubic", "compact-small-amo", "compact-small-amo+brightness x1"]
