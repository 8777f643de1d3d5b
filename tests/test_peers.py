"""experiments/peers.py and experiments/precision.py: what they measure is what they say."""
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import archs
import runs
import upscale
from experiments import peers, precision


@pytest.fixture
def files(tmp_path):
    """A checkpoint of the smallest network and a photograph of 24 x 20 pixels."""
    from skimage import data
    torch.manual_seed(0)
    runs.save_weights(tmp_path / "net.pth", archs.create("compact-small").state_dict())
    Image.fromarray(data.astronaut()[100:120, 200:224]).save(tmp_path / "a.png")
    return tmp_path


def test_the_peers_script_gives_our_pixels(files):
    peers.enlarge_by_spandrel(files / "net.pth", files / "a.png", files / "peer.png")
    words = ["--weights", files / "net.pth", files / "a.png", "--out", files / "sr", "--device", "cpu"]
    with pytest.raises(SystemExit):
        upscale.main(upscale.parse_args(list(map(str, words))))
    one, other = (np.array(Image.open(file)).astype(int) for file in (files / "peer.png", files / "sr" / "a.png"))
    assert one.shape == (80, 96, 3) and abs(one - other).max() == 0


def test_a_process_is_measured_and_must_end_well():
    burn = "import time\nwhile time.process_time() < 0.5: pass\nx = bytearray(300 * 2**20)\nx[::4096] = b'1' * 76800"
    wall, processor, peak = peers.run_process([sys.executable, "-c", burn])
    assert 0.5 < processor < 5 and wall > 0.4 and peak > 0.28
    with pytest.raises(runs.UserError, match="failed: call it yourself"):
        peers.run_process([sys.executable, "-c", "raise SystemExit(1)"])


@pytest.mark.fast
def test_missing_sources_are_named(tmp_path):
    with pytest.raises(runs.UserError, match="basicsr: no such folder; the docstring says"):
        peers.load_peers(tmp_path, tmp_path)


def test_what_the_remark_reads_is_what_the_measurement_writes(files, monkeypatch):
    monkeypatch.setattr(precision, "ARCHITECTURES", ("compact",))
    file = files / "results" / "bench" / "precision-amx_bf16.json"
    words = ["--weights", files / "net.pth", "--photo", files / "a.png", "--side", 16, "--repeats", 1, "--json", file]
    precision.main(precision.parse_args(list(map(str, words))))
    found = json.loads(file.read_text())["found"]["compact"]
    assert found["faster"] > 0 and found["psnr"] > 40 and 0 < found["mean"] < found["largest"] < 5
    monkeypatch.setattr(runs, "REPO", files)
    monkeypatch.setattr(runs, "cpu_flags", lambda: ["amx_bf16"])
    said = runs.precision_remark(torch.device("cpu"), "fp32", "compact")
    assert f"about {found['faster']:.1f} times" in said and f"up to {found['largest']:.1f} grey" in said
