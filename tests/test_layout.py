"""The layout: how many files, which way imports point, flags, line lengths; a fork without the further methods runs."""
import ast
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import runs
from images import image_size

REPO = runs.REPO
TRACKED = subprocess.run(["git", "-C", str(REPO), "ls-files"], capture_output=True, text=True).stdout.splitlines()
TOP = {Path(name).stem for name in TRACKED if re.fullmatch(r"\w+\.py", name)}
SUPPORT, METHODS = {"prepare", "rewards", "report"}, {"selfsup", "dpo", "study"}
FOLDERS = SUPPORT | METHODS | {"experiments"}
PYTHON = [name for name in TRACKED if name.endswith(".py")]
pytestmark = pytest.mark.skipif(not TRACKED, reason="not a git checkout: there is no list of files to look at")


def imports(path):
    """[(module or folder, is it at the top of the file?)] of this repository that a file imports."""
    tree = ast.parse((REPO / path).read_text())
    at_top = {id(node) for node in tree.body}
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(alias.name.split(".")[0], id(node) in at_top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append((node.module.split(".")[0], id(node) in at_top))
    return [(name, top) for name, top in names if name in TOP | FOLDERS]


@pytest.mark.fast
def test_the_top_level_is_small():
    python = [name for name in TRACKED if re.fullmatch(r"[^/]+\.py", name)]
    entries = {name.split("/")[0] for name in TRACKED}
    asked = {"analyze_iqa", "train", "finetune_lora", "evaluate", "archs", "data", "degradations", "lora"}
    assert len(python) <= 14 and asked <= TOP <= asked | {"upscale", "iqa", "metrics", "runs", "images", "losses"}
    assert len(entries) <= 36, sorted(entries)


@pytest.mark.fast
def test_imports_point_one_way():
    wrong = []
    for name in PYTHON:
        home = name.split("/")[0] if "/" in name else "top"
        if home == "tests":
            continue
        folders = FOLDERS if home == "experiments" else SUPPORT | {home} if home in METHODS else SUPPORT
        for other, at_top in imports(name):
            allowed = TOP | folders
            if other not in allowed or home == "top" and other in SUPPORT and at_top:
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.fast
def test_support_folders_have_no_cycle():
    reaches = {}
    for name in (name for name in PYTHON if name.split("/")[0] in SUPPORT):
        nodes = [node for node in ast.walk(ast.parse((REPO / name).read_text())) if isinstance(node, ast.ImportFrom)]
        nodes = [node for node in nodes if node.module.split(".")[0] in SUPPORT]
        module = name.removesuffix(".py").replace("/", ".")
        reaches[module] = {node.module if "." in node.module else f"{node.module}.{alias.name}"
                           for node in nodes for alias in node.names}
    for _ in reaches:
        reaches = {module: others.union(*(reaches.get(other, set()) for other in others))
                   for module, others in reaches.items()}
    assert not [module for module, others in reaches.items() if module in others]


@pytest.mark.fast
def test_no_script_is_imported_for_its_loop_but_train_by_finetune_lora():
    def module(name):
        return name.removesuffix(".py").replace("/", ".")

    scripts = {module(name) for name in PYTHON if "\nARGS = parse_args()" in (REPO / name).read_text()}
    users = set()
    for name in (name for name in PYTHON if not name.startswith(("tests/", "experiments/"))):
        for node in ast.walk(ast.parse((REPO / name).read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                home = getattr(node, "module", None)
                names = {home, *(f"{home}.{alias.name}" if home else alias.name for alias in node.names)}
                users |= {(module(name), other) for other in names & scripts}
    # modules with a small command of their own
    own = {"lora", "prepare.pack", "prepare.atlas", "prepare.demo_set", "prepare.verify", "report.pictures",
           "report.tables"}
    # the flags of the one, the distortions of the other
    parts = {("dpo.rounds", "dpo.pool"), ("dpo.rounds", "dpo.tune"), ("rewards.harden", "rewards.train_ranker"),
             ("rewards.attack", "rewards.train_ranker")}
    assert {user for user in users if user[1] not in own} - parts == {("finetune_lora", "train")}


@pytest.mark.fast
def test_no_file_in_a_folder_hides_another_module():
    inside = {name: Path(name).stem for name in PYTHON if "/" in name}
    hidden = TOP | sys.stdlib_module_names - {"__main__"}
    assert not [name for name, stem in inside.items() if stem in hidden]


@pytest.mark.fast
def test_no_line_is_longer_than_120_characters():
    long = [f"{name}:{n}" for name in PYTHON for n, line in enumerate((REPO / name).read_text().splitlines(), 1)
            if len(line) > 120]
    assert not long


def flags(text):
    """How many flags --help lists."""
    return len(set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.M)))


def test_the_stages_have_few_flags_and_help_needs_little_time_and_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('a parser needs no torch')\n")
    most = {"train.py": 47, "finetune_lora.py": 44, "evaluate.py": 30}
    scripts = [name for name in PYTHON
               if not name.startswith("tests/") and "\nARGS = parse_args()" in (REPO / name).read_text()]
    assert len(scripts) > 15
    for file in scripts:
        module = file.removesuffix(".py").replace("/", ".").removesuffix(".__main__")
        name = file if file in most or "/" not in file else module
        code = ("import os, runs, subprocess\n"
                f"p = subprocess.run(runs.python({name!r}, '--help'), capture_output=True, text=True)\n"
                "t = os.times()\nprint(p.returncode, t.children_user + t.children_system)\nprint(p.stdout, p.stderr)")
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO,
                                env=runs.python_path() | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO}"}).stdout
        status, seconds = result.split("\n")[0].split()
        assert status == "0", result
        assert float(seconds) < 2.5, f"{name} --help takes {seconds} s"
        assert flags(result) <= most.get(name, 99), f"{name} has {flags(result)} flags"


@pytest.mark.fast
def test_the_two_loops_differ_in_equation_5_only():
    mains = [(REPO / name).read_text().partition("\ndef main(args):")[2].splitlines()
             for name in ("train.py", "finetune_lora.py")]
    changed = [line for line in difflib.ndiff(*mains) if line[0] in "+-"]
    # what --d-warmup and --drop-path of train.py need included
    assert len(changed) <= 100, len(changed)


def copy_tree(target, without=()):
    for name in TRACKED:
        if name.split("/")[0] not in without:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, target / name)


WITHOUT = """
import importlib, sys
sys.path.insert(0, {repo!r})
sys.modules.update(dict.fromkeys({absent!r}))
for name in {modules!r}:
    importlib.import_module(name)
import torch, iqa, metrics
reward = iqa.create_reward(["ranker", "rewards.musiq:untrained"], need_gradient=True)
print(reward(torch.rand(2, 3, 32, 32)).shape, *metrics.versions())
"""


def test_all_modules_are_imported_and_rewards_of_our_own_made_without_optional_packages():
    """A machine with PyTorch, torchvision, scipy, scikit-image, pandas, matplotlib, tqdm and psutil trains."""
    absent = ("pyiqa", "lpips", "pyvips", "spandrel", "diffusers", "transformers", "accelerate", "loralib", "peft",
              "icecream", "playwright", "xdist", "tensorboard", "safetensors", "timm", "pywt", "cv2")
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in PYTHON
               if not name.startswith("tests/")]
    code = WITHOUT.format(repo=str(REPO), absent=absent, modules=modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "torch.Size([2]) torch torchvision scikit-image scoring"


@pytest.mark.slow
def test_a_fork_without_the_further_methods_runs(tmp_path):
    """Without selfsup/, dpo/, study/, experiments/ and their tests: the others are collected, the four demos run."""
    gone = METHODS | {"experiments"}
    copy_tree(tmp_path, gone)
    for file in (tmp_path / "tests").glob("test_*.py"):
        imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", file.read_text(), re.M)
        if {name.split(".")[0] for name in imported} & gone:
            file.unlink()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*words):
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{words}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout
    run("-m", "pytest", "-q", "--collect-only", "tests")
    # each makes what it starts from: the demos of all samplers and of the L1 stage
    tuned = run("finetune_lora.py", "--demo", "--total-steps", "2")
    table = run("evaluate.py", "--demo", "--total-steps", "2", "--threads", "1")
    for sampler, log in (("amo", tuned), ("orig", table)):
        made = f"compact-small-{sampler}/weights is missing and made first: python train.py --demo --sampler {sampler} "
        assert made in log and log.count(f"--sampler {sampler} ") == 1
        assert (tmp_path / "runs" / f"compact-small-{sampler}" / "weights").is_dir()
    result = json.loads((tmp_path / "runs" / "demo.json").read_text())
    assert list(result["mean"]) == ["bicubic", "compact-small-orig", "compact-small-amo"]
    assert list(result["lower_is_better"]) == ["ranker", "piqe", "psnr"] and result["against"] == "compact-small-orig"
    assert image_size(tmp_path / "runs" / "demo.png")[0] > 4 * 100
    last = table.rstrip().splitlines()[-1]
    assert last.startswith("amo - orig, ranker: ") and last.endswith(" the score of the model that chose them.")
    assert "(8 patches of 2 photographs)" in last
    # the second time nothing is trained
    again = run("evaluate.py", "--demo", "--threads", "1")
    assert "missing" not in again and again.rstrip().splitlines()[-1] == last
    run("analyze_iqa.py", "--demo")
