"""Shared by the test files: the repository on the path, few threads, small data sets and rewards of known order."""
import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import numpy as np
import pytest
import torch

import archs
import runs
from images import save_image

torch.set_num_threads(1)

REWARDS = '''
import torch

def brightness(device):
    """Mean brightness, 0-100: a reward whose order over images is known."""
    return lambda x: x.mean((1, 2, 3)) * 100

def nan_when_bright(device):
    """Not finite for an image whose mean is above one half."""
    return lambda x: torch.where(x.mean((1, 2, 3)) > 0.5, torch.nan, 1.0)

def singular_when_white(device):
    """Brightness; fails at a batch with a white image, as NIQE does."""
    def score(x):
        if (x == 1).all(3).all(2).all(1).any():
            raise torch.linalg.LinAlgError("SVD did not converge")
        return x.mean((1, 2, 3)) * 100
    return score
'''


@pytest.fixture(scope="session")
def rewards(tmp_path_factory):
    """Folder of a module `test_rewards` with rewards of known order, importable in this process."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "test_rewards.py").write_text(REWARDS)
    sys.path.insert(0, str(folder))
    return folder


@pytest.fixture(scope="session")
def quintuplets(tmp_path_factory):
    """A labelled data set in HGGT's layout: 6 sets of 3 photos, 64 px. Version 02 is the brightest, 03 the darkest."""
    root = tmp_path_factory.mktemp("data") / "HGGT"
    rng = np.random.default_rng(0)
    shift = {"original": 0, "01": 10, "02": 30, "03": -30, "04": 5}
    for n in range(6):
        stem = f"photo{n // 2}-{288 * (n % 2)}-0"
        base = torch.from_numpy(rng.integers(60, 190, (3, 64, 64)))
        for version, value in shift.items():
            name = stem if version == "original" else f"{stem}_{version}"
            save_image(root / "Train" / "images" / "0-6" / version / f"{name}.png", (base + value).byte())
        for annotator in "ABC":
            entries = {"Picture_1": {"Name": f"{stem}.png", "File": "original", "Label": None}}
            for i, version in enumerate(list(shift)[1:], 2):
                # version 01 is positive, except in the first set, which has no positive
                label = "Positive" if version == "01" and n else "Similar"
                entries[f"Picture_{i}"] = {"Name": f"{stem}_{version}.png", "File": version, "Label": label}
            path = root / "Train" / "labels" / "0-6" / annotator / f"{stem}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(entries | {"Time_cost": {"Start": "", "End": "", "Total": 1}}))
    return root


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory):
    """The features of torchvision's vgg19 with random weights, as --vgg-weights takes them."""
    from torchvision.models import vgg19
    file = tmp_path_factory.mktemp("vgg19") / "vgg19.pth"
    torch.manual_seed(1)
    torch.save(vgg19(weights=None).features.state_dict(), file)
    return file


@pytest.fixture
def browser():
    """Headless Chromium, with pages as playwright has them."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]
    with sync_playwright() as p:
        started = p.chromium.launch(executable_path=chromium, args=flags)
        yield started
        started.close()


@pytest.fixture(scope="session")
def photographs():
    """{name: (3, 192, 192) uint8} parts of two photographs of scikit-image."""
    from skimage import data
    return {name: torch.from_numpy(getattr(data, name)()[64:256, 128:320].copy()).permute(2, 0, 1)
            for name in ("astronaut", "coffee")}


@pytest.fixture
def compiled(monkeypatch):
    """Names of the classes of the modules that are compiled, by a compiler that leaves the code as it is."""
    names, compile_module = [], torch.nn.Module.compile

    def compile_eagerly(module):
        names.append(type(module).__name__)
        compile_module(module, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    return names


@pytest.fixture
def validated_in(monkeypatch):
    """The types in which the first layer of compact networks computes outside training."""
    seen, forward = set(), archs.SRVGGNetCompact.forward

    def watched(net, x):
        if not net.training:
            seen.add(net.body[0](x).dtype)
        return forward(net, x)
    monkeypatch.setattr(archs.SRVGGNetCompact, "forward", watched)
    return seen


@pytest.fixture
def script(rewards):
    """Run one of the repository's scripts as a user would -> CompletedProcess.

    script("train.py", "--demo", ...), script("selfsup.finetune", ..., processes=2). check: fail if the script does.
    Where it must not fail, several processes are started without torchrun, which would import torch a time more.
    """
    def call(name, *words, processes=1, cwd=REPO, timeout=300, check=True):
        environment = {**os.environ, "PYTHONPATH": f"{rewards}{os.pathsep}{REPO}", "OMP_NUM_THREADS": "1"}
        others = []
        with contextlib.ExitStack() as stack:
            if processes > 1 and check:
                with socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                             "MASTER_PORT": str(free.getsockname()[1])}
                for rank in range(1, processes):
                    place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    others.append(subprocess.Popen(runs.python(name, *words), cwd=cwd, env=environment | group | place))
                    # in the other order: where rank 0 has failed it would wait for ever
                    stack.callback(others[-1].wait)
                    stack.callback(others[-1].kill)
                environment |= group | {"RANK": "0", "LOCAL_RANK": "0"}
                processes = 1
            result = subprocess.run(runs.python(name, *words, processes=processes), capture_output=True, text=True,
                                    cwd=cwd, timeout=timeout, env=environment)
            assert result.returncode or not any(other.wait(60) for other in others)
        if check and result.returncode:
            raise AssertionError(f"{name} exited {result.returncode}:\n{result.stdout}\n{result.stderr}")
        return result
    return call


def run_script(name, words):
    """In a child of the fork server, which has imported the scripts: importing torch would be half of every run."""
    module = importlib.import_module(name)
    module.main(module.parse_args([*words, "--threads", "1"]))


@pytest.fixture(scope="session")
def forked_call():
    """Instead of experiments.jobs.call: scripts of one process are children of a fork server."""
    from experiments import jobs
    real_call, server = jobs.call, multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["evaluate", "finetune_lora", "prepare.quintuplets", "train", "pyiqa"])

    def call(log, script, *words, processes=1):
        if processes > 1:
            return real_call(log, script, *words, processes=processes)
        log.parent.mkdir(parents=True, exist_ok=True)
        child = server.Process(target=run_script, args=(script.removesuffix(".py"), list(map(str, words))))
        child.start()
        child.join()
        assert child.exitcode == 0, script
    return call
