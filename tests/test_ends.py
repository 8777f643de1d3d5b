"""Every process ends, whatever happens to it: errors, killed data workers, signals; alone and under torchrun."""
import os
import shutil
import signal
import subprocess
import time

import psutil
import pytest
import torch

import runs
from images import save_image

FAULTS = '''
import os, time
import torch

calls = []

def late(error):
    """A reward that raises `error` after some calls, on the last process alone."""
    def build(device):
        def score(x):
            calls.append(0)
            if len(calls) > 6 and int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
                raise error
            return x.mean((1, 2, 3)) * 100
        return score
    return build

bug = late(RuntimeError("a bug in the reward"))
memory = late(torch.OutOfMemoryError("CUDA out of memory"))

def brightness(device):
    return lambda x: x.mean((1, 2, 3)) * 100

def slow(device):
    """Takes minutes as soon as the third step begins, and says so."""
    def score(x):
        calls.append(0)
        if len(calls) > 6:
            print("slow now", flush=True)
            for _ in range(600):
                time.sleep(0.1)
        return x.mean((1, 2, 3)) * 100
    return score
'''


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A data set without labels, of two sets of two versions, 32 px; and a module `faults` of rewards that fail."""
    root = tmp_path_factory.mktemp("photos")
    for k, version in enumerate(("original", "01")):
        for stem in ("a", "b"):
            name = stem if version == "original" else f"{stem}_{version}"
            image = torch.full((3, 32, 32), 80 + 40 * k, dtype=torch.uint8)
            save_image(root / "set" / "Train" / "images" / "x" / version / f"{name}.png", image)
    (root / "faults.py").write_text(FAULTS)
    return root


def start(photos, out, reward, *more, processes=1):
    """train.py --stage gan of the smallest net on `photos`, with data workers, in a process group of its own."""
    words = ["--arch", "compact-small", "--stage", "gan", "--data", photos / "set", "--reward", f"faults:{reward}",
             "--batch-size", 2, "--group-size", 1, "--pool-size", 0, "--crop", 32, "--lambda-p", 0, "--lambda-a", 0,
             "--workers", 2, "--device", "cpu", "--log-every", 1, "--total-steps", 100_000, "--init",
             photos / "init.pth", "--out", out, *more]
    environment = os.environ | {"PYTHONPATH": f"{photos}{os.pathsep}{runs.REPO}", "OMP_NUM_THREADS": "1"}
    if not (photos / "init.pth").exists():
        import archs
        runs.save_weights(photos / "init.pth", archs.create("compact-small").state_dict())
    return subprocess.Popen(runs.python("train.py", *words, processes=processes), text=True, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def end_of(process, seconds):
    """-> (exit code, standard error) of a process that must end within `seconds`, and none of its group be left."""
    try:
        _, errors = process.communicate(timeout=seconds)
        # data workers that were not killed would notice within five seconds that their parent is gone
        left = [p for p in psutil.process_iter(["status"]) if group_of(p.pid) == process.pid
                and p.info["status"] != psutil.STATUS_ZOMBIE]
        assert not left, left
        return process.returncode, errors
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def group_of(pid):
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def wait_for(process, text):
    return next(line for line in process.stdout if text in line)


def workers_of(process):
    """Data workers are the only children."""
    return psutil.Process(process.pid).children()


@pytest.mark.parametrize("fault, shown", [
    ("bug", "RuntimeError: a bug in the reward"), ("memory", "OutOfMemoryError: CUDA out of memory")])
def test_an_unexpected_error_shows_its_traceback_and_ends_the_process(photos, tmp_path, fault, shown):
    process = start(photos, tmp_path / "run", fault)
    wait_for(process, " step 2/")
    code, errors = end_of(process, 10)
    assert code == 1 and "Traceback" in errors and shown in errors


def test_a_killed_data_worker_ends_the_run(photos, tmp_path):
    process = start(photos, tmp_path / "run", "brightness")
    wait_for(process, " step 2/")
    workers_of(process)[0].kill()
    code, errors = end_of(process, 10)
    assert code == 1 and "Traceback" in errors
    # A worker that dies while it hands over a batch breaks the connection before torch has seen that it is dead.
    assert any(name in errors for name in ("DataLoader worker", "ConnectionResetError", "EOFError"))


def test_an_image_that_cannot_be_read_is_one_line_and_saves_the_run(photos, tmp_path):
    shutil.copytree(photos / "set", tmp_path / "set")
    process = start(photos, tmp_path / "run", "brightness", "--data", tmp_path / "set")
    wait_for(process, " step 2/")
    (tmp_path / "set" / "Train" / "images" / "x" / "01" / "a_01.png").unlink()
    code, errors = end_of(process, 10)
    assert code == 2 and "a_01.png" in errors and len(errors.splitlines()) == 1
    assert (tmp_path / "run" / "ckpt" / "last.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(photos, tmp_path, number):
    process = start(photos, tmp_path / "run", "slow")
    wait_for(process, "slow now")
    process.send_signal(number)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(number)
    code, errors = end_of(process, 3)
    assert code == 130 and "Traceback" not in errors


def test_an_error_of_one_process_of_torchrun_ends_all(photos, tmp_path):
    process = start(photos, tmp_path / "run", "bug", processes=2)
    wait_for(process, " step 2/")
    code, errors = end_of(process, 60)
    assert code == 1 and "RuntimeError: a bug in the reward" in errors


def test_a_killed_process_of_torchrun_ends_all(photos, tmp_path):
    process = start(photos, tmp_path / "run", "brightness", processes=2)
    wait_for(process, " step 2/")
    psutil.Process(process.pid).children()[1].kill()
    code, _ = end_of(process, 60)
    assert code == 1


def test_a_signal_that_the_group_of_torchrun_gets_twice_saves_the_run(photos, tmp_path):
    process = start(photos, tmp_path / "run", "brightness", processes=2)
    wait_for(process, " step 2/")
    # the processes get it from the system and from torchrun
    os.killpg(process.pid, signal.SIGTERM)
    wait_for(process, "stopped by a signal")
    end_of(process, 60)
    assert (tmp_path / "run" / "ckpt" / "last.pt").exists()


# Two processes and one run folder

def test_a_second_process_is_refused_and_a_killed_one_taken_over(photos, tmp_path):
    out = tmp_path / "run"
    first = start(photos, out, "brightness", "--save-every", 1)
    wait_for(first, " step 2/")
    for resume in ([], ["--resume"], ["--resume", "auto"]):
        code, errors = end_of(start(photos, out, "brightness", *resume), 60)
        assert code == 2 and f"process {first.pid} on " in errors and len(errors.splitlines()) == 1
    first.kill()
    end_of(first, 10)
    assert (out / "lock.json").exists()
    second = start(photos, out, "brightness", "--resume", "--save-every", 1)
    assert f"process {first.pid} on " in wait_for(second, "took over the lock of")
    wait_for(second, "/100000 |")
    second.send_signal(signal.SIGTERM)
    assert end_of(second, 10)[0] == 0 and not (out / "lock.json").exists()
