"""Q-Align, the metric of the paper's Tables 5, 7 and 8: pyiqa's own code, of which the 7B model alone is stubbed."""
import json

import pytest
import torch

import archs
import dpo.candidates
import evaluate
import iqa
import runs
from images import load_image, save_image


class Model(torch.nn.Module):
    """In place of the language model: the mean of the processed image, as a score from 1 to 5."""
    generation_config = None

    def score(self, images, image_tensor, task_, input_):
        return 1 + 4 * image_tensor.float().sigmoid().mean((1, 2, 3))


@pytest.fixture
def qalign(monkeypatch):
    from pyiqa.archs import qalign_arch
    from transformers import CLIPImageProcessor
    monkeypatch.setattr(qalign_arch.MPLUGOwl2LlamaForCausalLM, "from_pretrained", lambda *a, **k: Model())
    monkeypatch.setattr(qalign_arch.CLIPImageProcessor, "from_pretrained", lambda *a, **k: CLIPImageProcessor())


def test_a_metric_that_takes_no_batches_is_asked_one_by_one(qalign, tmp_path):
    torch.manual_seed(0)
    for i in range(3):
        save_image(tmp_path / "lq" / f"{i}.png", torch.rand(3, 20, 20) * (i + 1) / 3)
    runs.save_weights(tmp_path / "net.pth", archs.create("compact-small").state_dict())
    words = ["--lq", tmp_path / "lq", "--weights", tmp_path / "net.pth", "--metrics", "qalign", "--device", "cpu",
             "--cache", tmp_path / "cache", "--out-json", tmp_path / "out.json"]
    evaluate.main(evaluate.parse_args([str(word) for word in words]))
    scores = json.loads((tmp_path / "out.json").read_text())["scores"]
    assert all(1 < scores[row][str(i)]["qalign"] < 5 for row in ("bicubic", "net") for i in range(3))

    # what sma and smp, amo and dpo.pool score ask
    reward, world = iqa.create_reward(["qalign"]), runs.World(0, 1, torch.device("cpu"))
    files = [tmp_path / "lq" / f"{i}.png" for i in range(3)]
    whole = iqa.score_images(files, reward, tmp_path / "static", world).tolist()
    assert whole == sorted(whole) and len(set(whole)) == 3
    judges = dpo.candidates.create_metrics([], ["qalign"], {}, world.device)
    images = torch.stack([load_image(file).float() / 255 for file in files])
    assert judges["qalign"](images, None).tolist() == pytest.approx(whole, abs=1e-6)
