"""--deterministic on CUDA: a resumed run, and one with --fast graph, equal an uninterrupted one bitwise.

Needs PyTorch, torchvision, NumPy, SciPy, scikit-image, Pillow, tqdm and psutil, no network, and none of pyiqa, peft.
"""
import json
import os
import subprocess
import sys

import pytest
import torch
from test_train import equal, flags, init  # noqa: F401 (a fixture)

import runs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SMALL = ("compact-small", "rrdbnet-small", "swinir-small")


def train_apart(trainings):
    """Trainings, lists of flags, in one process of their own, since --deterministic holds for the whole process."""
    code = "import json, sys, train\nfor words in json.loads(sys.argv[1]):\n    train.main(train.parse_args(words))"
    environment = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"}
    result = subprocess.run([sys.executable, "-c", code, json.dumps(trainings)], cwd=runs.REPO, capture_output=True,
                            text=True, timeout=300, env=environment | {"PYTHONPATH": str(runs.REPO)})
    assert result.returncode == 0, result.stderr


def differences(a, b):
    """What two finished runs' checkpoints hold that is not bitwise equal."""
    a, b = (runs.load_checkpoint(folder / "ckpt" / "last.pt") for folder in (a, b))
    return [name for name in a if name != "args" and not equal(a[name], b[name])]


@pytest.mark.parametrize("arch, precision", [*((arch, "fp32") for arch in SMALL), ("rrdbnet-small", "tf32"),
                                             ("swinir-small", "bf16")])
def test_a_deterministic_run_resumes_bitwise_and_so_does_a_recorded_one(
        quintuplets, init, rewards, vgg_file, tmp_path, arch, precision):  # noqa: F811
    """3 + 3 steps equal 6, and 6 steps of which the last three are replayed, one of them at another learning rate."""
    def words(name, steps, *more):
        return [*flags(quintuplets, init, tmp_path / name, arch=arch, precision=precision, total_steps=steps,
                       device="cuda", reward="ranker", lambda_p=1, vgg_weights=vgg_file, deterministic=True,
                       milestones=5), *more]
    train_apart([words("whole", 6), words("halves", 3), words("halves", 6, "--resume"),
                 words("recorded", 6, "--fast", "graph")])
    assert differences(tmp_path / "whole", tmp_path / "halves") == []
    assert differences(tmp_path / "whole", tmp_path / "recorded") == []
    whole = runs.load_checkpoint(tmp_path / "whole" / "ckpt" / "last.pt")
    assert whole["step"] == 6 and not equal(whole["net_g"], runs.load_checkpoint(init[arch])["params"])
