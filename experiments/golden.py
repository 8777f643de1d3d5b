"""Does this working tree still train the same weights as an earlier commit? Compares them bitwise, on this machine.

    python -m experiments.golden HEAD~3                             all six jobs at full length
    python -m experiments.golden 47ef54c --total-steps 20           every training shortened
    python -m experiments.golden HEAD --jobs psnr tune              some of them

Jobs, each the demo of a stage; what a job starts from is trained first:
    psnr, orig, amo    train.py                    tune    finetune_lora.py
    selfsup            reconstruction network, then the adapted generator
    dpo                flow generator, pool and pairs, then the tuned generator

COMMIT is checked out into a temporary folder (git worktree), which is removed afterwards. Both trees train with the
same seeds at the same time, one thread each. For every job one line says whether all tensors of its weight files (EMA
included) have the same bits; exit code 1 if any differs. No hash is committed: CPUs and versions of PyTorch round
differently.
"""
from pathlib import Path

import runs

# {job: the jobs whose run folders it starts from}, in the order of training
NEEDS = {"psnr": [], "orig": ["psnr"], "amo": ["psnr"], "tune": ["psnr", "amo"], "selfsup": ["psnr"], "dpo": []}


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("commit", metavar="COMMIT", help="any name that git knows: a hash, a branch, HEAD~3")
    p.add_argument("--jobs", nargs="+", choices=list(NEEDS), default=list(NEEDS), metavar="JOB", help="some of the six")
    p.add_argument("--total-steps", type=runs.SIZE, metavar="N", help="of every training; default: the demo's")
    p.add_argument("--processes", type=runs.SIZE, default=2, help="1: one tree after the other")
    p.add_argument("--keep", type=Path, metavar="DIR",
                   help="new folder for run folders and logs of both trees; default: a temporary one")
    return p.parse_args(argv)


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import os
import signal
import subprocess
import sys
import tempfile
from functools import partial

import numpy as np
import torch

from experiments import jobs

DEMO_PHOTOS, DEMO_DOMAIN = "datasets/demo/Test/GT/demo/untouched", "datasets/demo-domain"


def commands(tree, job, steps):
    """[script and its words] of one job, as the files of this tree want them; steps: words that shorten a training."""
    train = {"psnr": ["--stage", "psnr"], "orig": ["--sampler", "orig"], "amo": ["--sampler", "amo"]}
    if job in train:
        return [["train.py", "--demo", *train[job], *steps]]
    if job == "tune":
        return [["finetune_lora.py", "--demo", *steps]]
    if job == "selfsup":
        degrade, pretrain, finetune = selfsup_stages(tree)
        return [degrade, [*pretrain, "--demo", *steps], [*finetune, "--demo", *steps]]
    pretrain, *pool, tune = dpo_stages(tree)
    return [[*pretrain, "--demo", *steps], *([*stage, "--demo"] for stage in pool), [*tune, "--demo", *steps]]


# Two earlier layouts: selfsup.py and dpo.py at the top level; one command line with stages for each folder

def selfsup_stages(tree):
    """-> the commands that degrade photographs, pre-train the reconstruction network and adapt a generator"""
    if (tree / "selfsup.py").exists() or not has_parser(tree / "selfsup" / "pretrain.py"):
        script = "selfsup.py" if (tree / "selfsup.py").exists() else "selfsup"
        return [script, "domain", "--demo"], [script, "pretrain"], [script, "finetune"]
    degrade = ["prepare.degrade", DEMO_PHOTOS, DEMO_DOMAIN, "--degradation", "camera"]
    return degrade, ["selfsup.pretrain"], ["selfsup.finetune"]


def dpo_stages(tree):
    """-> the commands that train a generator, make, score and curate a pool, and tune"""
    if (tree / "dpo.py").exists() or not has_parser(tree / "dpo" / "pool.py"):
        script = "dpo.py" if (tree / "dpo.py").exists() else "dpo"
        return [[script, stage] for stage in ("pretrain", "sample", "score", "curate", "train")]
    return [["dpo.pretrain"], ["dpo.pool", "sample"], ["dpo.pool", "score"], ["dpo.pool", "curate"], ["dpo.tune"]]


def has_parser(file):
    return "\ndef parse_args" in file.read_text()


def with_needs(names):
    """The jobs, and those that they start from, in the order of training."""
    needed = {*names, *(need for name in names for need in NEEDS[name])}
    return [name for name in NEEDS if name in needed]


def weight_files(folder):
    """{path below the folder: file} of all run folders in folder/runs."""
    files = [path for part in ("weights", "lora") for path in sorted(folder.glob(f"runs/*/{part}/*.pth"))]
    return {str(path.relative_to(folder)): path for path in files}


def train_tree(tree, folder, names, steps, made):
    """Run the jobs with the scripts of `tree` in `folder`; fills made: {job: {path: weight file}}."""
    others = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    python_path = [str(tree), *(entry for entry in others if Path(entry).resolve() != runs.REPO)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(python_path)}
    for name in names:
        before = weight_files(folder)
        for script, *words in commands(tree, name, steps):
            where = [str(tree / script)] if script.endswith(".py") else ["-m", script]
            jobs.run_command(folder / "log.txt", script, [sys.executable, *where, *words], environment, folder)
        made[name] = {path: file for path, file in weight_files(folder).items() if path not in before}


def tensors(value, name=""):
    """{name: tensor} of nested dicts; what else a file holds (strings, numbers) is left out."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if not isinstance(value, dict):
        return {}
    return {key: tensor for k, part in value.items() for key, tensor in tensors(part, f"{name} {k}".strip()).items()}


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def compare(old, new):
    """Two {name: tensor} -> (number of tensors, [(name, how it differs)])"""
    differing = []
    for name in dict.fromkeys([*old, *new]):
        if name not in old or name not in new:
            differing.append((name, f"only in the {'old' if name in old else 'new'} tree"))
        elif old[name].shape != new[name].shape:
            differing.append((name, f"{tuple(old[name].shape)} became {tuple(new[name].shape)}"))
        elif not same_bits(old[name], new[name]):
            gap = np.abs(old[name].double().numpy() - new[name].double().numpy()).max()
            differing.append((name, f"largest difference {gap:.3g}"))
    return len(dict.fromkeys([*old, *new])), differing


def compare_job(old, new):
    """{path: weight file} of both trees -> (do all tensors have the same bits, one line)"""
    def read(files):
        contents = {path: tensors(runs.load_checkpoint(file)) for path, file in files.items()}
        return {f"{path}: {name}": tensor for path, content in contents.items() for name, tensor in content.items()}
    count, differing = compare(read(old), read(new))
    if not count:
        return False, "left no weights"
    if not differing:
        return True, f"equal, {count} tensors in {', '.join(old)}"
    (name, how), *_ = differing
    return False, f"{len(differing)} of {count} tensors differ, first {name}: {how}"


def git(*words):
    done = subprocess.run(["git", "-C", str(runs.REPO), *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise runs.UserError(f"git {' '.join(map(str, words))}: {' '.join(done.stderr.split())}")


def train_both(trees, folder, names, steps, processes):
    """-> {"old": {job: {path: weight file}}, "new": ...}"""
    made = {side: {} for side in trees}
    for side in trees:
        (folder / side).mkdir(parents=True)
    try:
        tasks = [partial(train_tree, tree, folder / side, names, steps, made[side]) for side, tree in trees.items()]
        jobs.parallel(processes, tasks)
    except runs.UserError:
        # the folder may be a temporary one
        for log in folder.glob("*/log.txt"):
            print(f"end of {log}:", *log.read_text().splitlines()[-20:], sep="\n  ", file=sys.stderr)
        raise
    return made


def main(args):
    def stop(*_):
        sys.exit(1)
    signal.signal(signal.SIGTERM, stop)
    if args.keep and args.keep.exists() and any(args.keep.iterdir()):
        raise runs.UserError(f"--keep {args.keep}: exists and is not empty: name a new folder")
    names = with_needs(args.jobs)
    steps = ["--total-steps", str(args.total_steps)] if args.total_steps else []
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        tree, folder = Path(temporary) / "tree", (args.keep or Path(temporary)).resolve()
        git("worktree", "add", "--detach", tree, args.commit)
        try:
            made = train_both({"old": tree, "new": runs.REPO}, folder, names, steps, args.processes)
        finally:
            git("worktree", "remove", "--force", tree)
        results = {name: compare_job(made["old"][name], made["new"][name]) for name in names}
    for name, (_, line) in results.items():
        print(f"{name:<8} {line}")
    if not all(equal for equal, _ in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
