"""Between log steps nothing waits for the GPU: neither a value that is read back nor a copy that waits.

On a CPU, PyTorch's dispatcher catches every value that a whole run reads, and the parts that copy numbers to the device
run on fake CUDA tensors, which know their device and hold no data. tests/test_gpu.py lets CUDA itself complain.
"""
import contextlib
import traceback
from pathlib import Path

import pytest
import torch
from test_finetune import TINY, base  # noqa: F401 (a fixture)
from test_train import flags, init  # noqa: F401 (a fixture)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import archs
import data
import finetune_lora
import runs
import train
from losses import adversarial_loss

aten = torch.ops.aten
# operations that return a value and so wait for the GPU
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.equal, aten.is_nonzero}
# (file, function) of reads that are of CPU tensors also in a run on a GPU
ON_THE_CPU_ANYWAY = {
    # the check of its input's range, which it skips on CUDA
    ("degradations.py", "degrade"),
    # qualities, drawn by NumPy
    ("degradations.py", "jpeg"),
    # batch["where"]
    ("images.py", "crop_like"),
    # a sample, made by a data worker
    ("data.py", "__getitem__"),
    # Adam's step counts, which stay on the CPU unless it is fused
    ("optimizer.py", "_get_value"),
}


def reader(frames):
    """(file, function) of the innermost frame of this repository or an optimiser; of __getitem__ in all of a sample."""
    for frame in reversed([*frames, *(f for f in frames if f.name == "__getitem__")]):
        file = Path(frame.filename)
        if file.parent == runs.REPO or file.parent.name == "optim":
            return file.name, frame.name
    return "?", "?"


class Reads(TorchDispatchMode):
    """Collects the readers of tensors while it is on."""

    def __init__(self):
        super().__init__()
        self.readers = set()

    def note(self):
        self.readers.add(reader(traceback.extract_stack()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indices = args[1] if function.overloadpacket == aten.index else ()
        by_mask = any(torch.is_tensor(i) and i.dtype == torch.bool for i in indices)
        if function.overloadpacket in READS or by_mask:
            self.note()
        return function(*args, **(kwargs or {}))


def between_logs(monkeypatch, enter, leave):
    """Call enter() after each of the steps 3 to 8 of 9, and leave() before values are read on purpose.

    That is for log lines and checkpoints.
    """
    requested, check_finite, on = runs.StopSignal.requested, runs.Meter.check_finite, []

    def requested_and_enter(self, step):
        stopping = requested(self, step)
        if 3 <= step < 9 and not on:
            on.append(step)
            enter()
        return stopping

    def leave_and_check_finite(self, describe, *nets):
        while on:
            on.pop()
            leave()
        return check_finite(self, describe, *nets)
    monkeypatch.setattr(runs.StopSignal, "requested", requested_and_enter)
    monkeypatch.setattr(runs.Meter, "check_finite", leave_and_check_finite)


def run_training(quintuplets, init, tmp_path, **more):  # noqa: F811
    more = dict(total_steps=9, lambda_a=0.1) | more
    words = flags(quintuplets, init, tmp_path / "run", **more) + ["--log-every", "5", "--save-every", "0"]
    train.main(train.parse_args(words))


def run_tuning(base, tmp_path, *more):  # noqa: F811
    words = ["--arch", "compact-small", "--base", base, "--reward", "ranker", *TINY, "--total-steps", 9,
             "--out", tmp_path / "tuned", "--log-every", 5, "--lambda-a", "0.1", *more]
    finetune_lora.main(finetune_lora.parse_args(list(map(str, words))))


@pytest.fixture
def reads(monkeypatch):
    """The readers of values between the log steps of the runs that follow."""
    mode = Reads()

    def noted(original):
        def call(self, *args, **kwargs):
            if torch.utils._python_dispatch._get_current_dispatch_mode() is mode:
                mode.note()
            return original(self, *args, **kwargs)
        return call
    # these do not pass the dispatcher on a CPU
    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, noted(getattr(torch.Tensor, name)))
    between_logs(monkeypatch, mode.__enter__, lambda: mode.__exit__(None, None, None))
    return mode


@pytest.mark.parametrize("more", [dict(reward="ranker"), dict(arch="swinir-small", drop_path=0.5),
                                  dict(sampler="rand", accumulate=2)])
def test_a_training_step_reads_nothing_back(quintuplets, init, rewards, tmp_path, reads, more):  # noqa: F811
    run_training(quintuplets, init, tmp_path, **more)
    assert reads.readers and reads.readers <= ON_THE_CPU_ANYWAY


def test_a_tuning_step_reads_nothing_back(base, tmp_path, reads):  # noqa: F811
    run_tuning(base, tmp_path)
    assert reads.readers and reads.readers <= ON_THE_CPU_ANYWAY


def test_a_value_that_is_read_is_caught(quintuplets, init, rewards, tmp_path, reads, monkeypatch):  # noqa: F811
    pick = data.pick_gt

    def pick_and_index_by_mask(sampler, candidates, scores, *rest):
        index = pick(sampler, candidates, scores.clone().masked_fill_(~candidates, 0))
        return index * (scores[candidates].shape[0] > 0)
    monkeypatch.setattr(runs, "update_ema", lambda ema, net, decay: next(net.parameters()).sum().item())
    monkeypatch.setattr(data, "pick_gt", pick_and_index_by_mask)
    run_training(quintuplets, init, tmp_path)
    caught = reads.readers - ON_THE_CPU_ANYWAY
    assert {file for file, _ in caught} == {"train.py", "data.py"} and len(caught) == 2


class Copies(TorchDispatchMode):
    """Raises for a copy to the GPU that would wait.

    That is a copy from memory that is not pinned, one without non_blocking, and one that another operation makes.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if torch.is_tensor(t)]
        devices = {t.device.type for t in given if t.ndim}
        target = (kwargs or {}).get("device")
        to_cuda = function.overloadpacket == aten._to_copy and target is not None and target.type == "cuda"
        if to_cuda and devices == {"cpu"}:
            if not kwargs.get("non_blocking") or not any(given[0] is p for p in self.pinned):
                raise AssertionError("a copy to the GPU that waits")
        elif len(devices) > 1:
            raise AssertionError(f"{function}: tensors of the CPU and of the GPU, copied on the way")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def fake_cuda(monkeypatch):
    """Fake tensors on a GPU that need none. Reading a value raises; so does a copy that waits."""
    copies = Copies()
    copies.pinned = []

    def pin_memory(self):
        copies.pinned.append(self)
        return self
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(copies)
        yield torch.device("cuda", 0)


def test_the_pool_copies_its_draws_without_waiting(fake_cuda):
    pool = data.TrainingPool(8, 4, range(4), lambda *key: sum(key[:2]))
    for step in range(1, 6):
        pair = torch.zeros(4, 3, 8, 8, device=fake_cuda), torch.zeros(4, 3, 32, 32, device=fake_cuda)
        lq, gt = pool.swap(pair, step)
        assert lq.device == gt.device == fake_cuda and gt.shape == (4, 3, 32, 32)


def test_swinirs_stochastic_depth_copies_its_draws_without_waiting(fake_cuda):
    with torch.utils._python_dispatch._disable_current_modes():
        net = archs.create("swinir-small", drop_path=0.5).train()
        mask = {(24, 24, fake_cuda, torch.float32): archs.shift_mask(24, 24, 8, 4)}
    net = copy_to(net, fake_cuda)
    # made once per size: that copy waits
    net.masks = {key: torch.zeros(value.shape, device=fake_cuda) for key, value in mask.items()}
    assert net(torch.zeros(2, 3, 16, 16, device=fake_cuda), net.draw_keep([1, 2])).device == fake_cuda


def copy_to(net, device):
    """A module like `net` of fake tensors on the device."""
    for module in net.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = p if p is None else torch.nn.Parameter(torch.zeros(p.shape, device=device))
        for name, b in module._buffers.items():
            module._buffers[name] = b if b is None else torch.zeros(b.shape, dtype=b.dtype, device=device)
    return net


def test_losses_choice_and_meter_read_nothing_on_a_gpu(fake_cuda):
    scores, candidates = torch.zeros(4, 5, device=fake_cuda), torch.ones(4, 5, dtype=torch.bool, device=fake_cuda)
    index = data.pick_gt("amo", candidates, scores)
    picked = torch.zeros(5, device=fake_cuda)
    picked.scatter_add_(0, index, torch.ones_like(index, dtype=picked.dtype))
    with torch.utils._python_dispatch._disable_current_modes():
        net_d = archs.UNetDiscriminatorSN(4).train()
    net_d = copy_to(net_d, fake_cuda)
    loss = adversarial_loss(net_d(torch.zeros(2, 3, 32, 32, device=fake_cuda)), True)
    meter = runs.Meter(runs.World(0, 1, fake_cuda))
    for step in (1, 2):
        meter.add(step, adv=loss, score=scores.mean())
    with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
        # a log step does this
        meter.check_finite(str)
