"""experiments/golden.py: equal trees are called equal, a changed training is not, and its commands exist."""
import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import runs
from experiments import golden


@pytest.fixture
def copy(tmp_path):
    """This working tree as a repository of its own with one commit, and with a demo set of two photographs."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "datasets", "results", "tests", "docs", "__pycache__")
    shutil.copytree(runs.REPO, tree, ignore=ignored)
    demo_set = tree / "prepare" / "demo_set.py"
    text, count = re.subn(r"^(TRAIN_PHOTOS|TEST_PHOTOS) = .*\n", "", demo_set.read_text(), flags=re.MULTILINE)
    assert count == 2
    few = 'TRAIN_PHOTOS, TEST_PHOTOS = ("rocket",), ("chelsea",)\n'
    demo_set.write_text(text.replace("\nPATCH, ", f"\n{few}PATCH, "))
    git(tree, "init", "-q")
    commit(tree)
    return tree


def git(tree, *words):
    return subprocess.run(["git", "-C", str(tree), *words], check=True, capture_output=True, text=True).stdout


def commit(tree):
    git(tree, "add", "-A")
    git(tree, "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-qm", "all")


def run(tree, *words):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-m", "experiments.golden", *words], cwd=tree, env=environment,
                          capture_output=True, text=True, timeout=300)


def test_two_steps_of_the_same_tree_are_equal_and_of_a_changed_one_are_not(copy):
    words = ["HEAD", "--jobs", "psnr", "--total-steps", "2"]
    done = run(copy, *words)
    assert done.returncode == 0 and done.stdout.startswith("psnr     equal, "), done.stderr
    assert "ema_0000002.pth" in done.stdout
    script = copy / "train.py"
    # the learning rate of the demo's first stage
    assert script.read_text().count("lr=2e-3") == 2
    script.write_text(script.read_text().replace("lr=2e-3", "lr=2.001e-3"))
    done = run(copy, *words)
    assert done.returncode == 1, done.stderr
    assert "tensors differ, first runs/compact-small-psnr/weights/ema_0000002.pth: " in done.stdout
    assert "largest difference" in done.stdout
    assert len(git(copy, "worktree", "list").splitlines()) == 1
    script.write_text("raise SystemExit('nothing works')")
    commit(copy)
    done = run(copy, *words)
    assert done.returncode == 2 and "train.py ended with 1: nothing works" in done.stderr


@pytest.mark.fast
def test_the_first_tensor_that_differs_is_named(tmp_path):
    old = {"params": {"a": torch.tensor([1.0, float("nan")]), "b": torch.zeros(2)}, "step": 3}
    runs.write_atomic(tmp_path / "old.pth", lambda t: torch.save(old, t))
    same = {"w": tmp_path / "old.pth"}
    assert golden.compare_job(same, same) == (True, "equal, 2 tensors in w")
    changes = [({"b": torch.tensor([0.0, 1e-3])}, "1 of 2", "b: largest difference 0.001"),
               # equal numbers, other bits
               ({"b": torch.tensor([0.0, -0.0])}, "1 of 2", "b: largest difference 0"),
               ({"b": torch.zeros(3)}, "1 of 2", "b: (2,) became (3,)"),
               ({"c": torch.zeros(2)}, "1 of 3", "c: only in the new tree")]
    for change, count, text in changes:
        torch.save({"params": old["params"] | change}, tmp_path / "new.pth")
        assert golden.compare_job(same, {"w": tmp_path / "new.pth"}) == (
            False, f"{count} tensors differ, first w: params {text}")
    assert golden.compare_job({}, {}) == (False, "left no weights")


@pytest.mark.fast
def test_its_commands_are_commands_of_this_repository():
    for job in golden.NEEDS:
        for script, *words in golden.commands(runs.REPO, job, ["--total-steps", "2"]):
            name = script.removesuffix(".py")
            module = importlib.import_module(name if "." in script else f"{name}.__main__")
            assert module.parse_args(words)


@pytest.mark.fast
def test_an_older_layout_has_its_own_commands(tmp_path):
    (tmp_path / "selfsup.py").touch()
    (tmp_path / "dpo.py").touch()
    steps = ["--total-steps", "2"]
    assert golden.commands(tmp_path, "selfsup", steps)[-1] == ["selfsup.py", "finetune", "--demo", *steps]
    assert golden.commands(tmp_path, "dpo", [])[1:3] == [["dpo.py", "sample", "--demo"], ["dpo.py", "score", "--demo"]]


@pytest.mark.fast
def test_what_a_job_starts_from_is_trained_first():
    assert golden.with_needs(["tune"]) == ["psnr", "amo", "tune"]
    assert golden.with_needs(["dpo", "orig"]) == ["psnr", "orig", "dpo"]


@pytest.mark.fast
def test_an_unknown_commit_and_a_full_folder_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(runs.UserError, match="exists and is not empty"):
        golden.main(golden.parse_args(["HEAD", "--keep", str(tmp_path)]))
    with pytest.raises(runs.UserError, match="git worktree add .*nosuchcommit"):
        golden.main(golden.parse_args(["nosuchcommit", "--total-steps", "2"]))
