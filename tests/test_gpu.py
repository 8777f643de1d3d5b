"""Training on CUDA: losses of the CPU, bitwise resume, nothing that waits between log lines, batches fetched ahead.

Needs PyTorch, torchvision, NumPy, SciPy, scikit-image, Pillow, tqdm and psutil, no network, and none of pyiqa, peft.
"""

import pytest
import torch
from test_data import plain, root, sets  # noqa: F401 (fixtures)
from test_finetune import base  # noqa: F401 (a fixture)
from test_sync import between_logs, run_training, run_tuning
from test_train import equal, events, flags, init, train_with  # noqa: F401 (a fixture)

import data
import degradations
import runs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SMALL = ("compact-small", "rrdbnet-small", "swinir-small")


@pytest.fixture(autouse=True)
def switches():
    """What a training sets for its process is as before afterwards."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    yield
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


@pytest.fixture
def noiseless(monkeypatch):
    """Presets of degradations.py without noise, whose fields differ between CPU and CUDA."""
    silent = dict(poisson_scale=(0, 0), gaussian_sigma=(0, 0))
    for name, preset in degradations.PRESETS.items():
        monkeypatch.setitem(degradations.PRESETS, name, preset | {"rounds": [r | silent for r in preset["rounds"]]})


@pytest.mark.parametrize("arch", SMALL)
def test_three_steps_log_the_losses_of_the_cpu(
        quintuplets, init, rewards, vgg_file, noiseless, tmp_path, arch):  # noqa: F811
    """To 1e-3: rounding moves ReLUs, JPEG's coefficients, and the signs that Adam's first steps consist of."""
    for device in ("cpu", "cuda"):
        train_with(flags(quintuplets, init, tmp_path / device, arch=arch, total_steps=3, device=device, lambda_p=1,
                         vgg_weights=vgg_file))
    cpu, cuda = (events(tmp_path / device) for device in ("cpu", "cuda"))
    assert len(cpu) == len(cuda) == 3 and cpu[-1]["picked"] == cuda[-1]["picked"]
    for a, b in zip(cuda, cpu):
        for name in ("pix", "percep", "adv", "D_real", "D_fake", "score"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), (name, b["step"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_resumes_and_stays_finite(quintuplets, init, rewards, tmp_path, precision):  # noqa: F811
    words = dict(precision=precision, device="cuda")
    train_with(flags(quintuplets, init, tmp_path / "run", total_steps=3, **words))
    train_with(flags(quintuplets, init, tmp_path / "run", total_steps=6, **words) + ["--resume"])
    assert [event["step"] for event in events(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def cuda_complains(monkeypatch):
    """CUDA raises an error for anything that waits between the log steps of the runs that follow."""
    between_logs(monkeypatch, lambda: torch.cuda.set_sync_debug_mode("error"),
                 lambda: torch.cuda.set_sync_debug_mode("default"))
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("more", [dict(reward="ranker"), dict(arch="swinir-small", drop_path=0.5, precision="bf16"),
                                  dict(sampler="rand", accumulate=2, workers=2)])
def test_a_training_step_never_waits(quintuplets, init, rewards, tmp_path, cuda_complains, more):  # noqa: F811
    run_training(quintuplets, init, tmp_path, device="cuda", **more)


def test_a_tuning_step_never_waits(base, tmp_path, cuda_complains):  # noqa: F811
    run_tuning(base, tmp_path, "--device", "cuda")


def test_a_value_that_is_read_is_an_error(
        quintuplets, init, rewards, tmp_path, cuda_complains, monkeypatch):  # noqa: F811
    """So that the two tests above can fail."""
    monkeypatch.setattr(runs, "update_ema", lambda ema, net, decay: next(net.parameters()).sum().item())
    with pytest.raises(RuntimeError, match="synchroniz"):
        run_training(quintuplets, init, tmp_path, device="cuda")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_fetched_ahead_are_those_of_the_loader(sets, workers):  # noqa: F811
    plain_batches = list(data.batches(plain(sets), 1, 40, range(4), workers, True))
    device, count = torch.device("cuda"), 0
    busy = torch.rand(2000, 2000, device=device)
    ahead = data.prefetch(data.batches(plain(sets), 1, 40, range(4), workers, True), device)
    for batch, expected in zip(ahead, plain_batches, strict=True):
        for _ in range(20):
            # work that the next copy overtakes
            busy = busy @ busy / 1000
        # read by the main stream, late
        again = {name: t.clone() for name, t in batch.items()}
        # its memory may be given away only after that
        batch = None
        assert again["original"].is_cuda and not again["where"].is_cuda
        assert again.keys() == expected.keys() and all(torch.equal(again[k].cpu(), expected[k]) for k in expected)
        count += 1
    assert count == 40
