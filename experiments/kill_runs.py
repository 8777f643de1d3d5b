"""Train once undisturbed and once with ten kill -9 on the way; tests/test_train.py compares what both leave.

    python -m experiments.kill_runs FOLDER FLAGS...     flags of train.py but --out and --resume

Leaves FOLDER/whole and FOLDER/killed. The runs are forked children, so torch is imported once.
"""
import argparse
from pathlib import Path

import runs


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("folder", type=Path, metavar="FOLDER", help="new folder for both runs")
    p.add_argument("flags", nargs=argparse.REMAINDER, metavar="FLAGS", help="of train.py")
    return p.parse_args(argv)


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import os
import random
import signal
import sys
import time
from functools import partial

import torch

import train


def start(out, flags, kill_at_replace=0):
    """Fork a run that continues `out` -> its process id.

    kill_at_replace n: it kills itself instead of its n-th rename of a finished file.
    """
    pid = os.fork()
    if pid:
        return pid
    if kill_at_replace:
        calls, replace = [0], os.replace

        def replace_or_die(*paths):
            calls[0] += 1
            if calls[0] == kill_at_replace:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)
        os.replace = replace_or_die
    try:
        train.main(train.parse_args([*flags, "--out", str(out), "--resume", "auto"]))
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def finish(pid):
    """-> exit code of a child; -9 where it was killed"""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder, flags, kills=10):
    torch.set_num_threads(1)
    began = time.monotonic()
    if finish(start(folder / "whole", flags)):
        sys.exit("the undisturbed run failed")
    whole = time.monotonic() - began
    rng, killed = random.Random(0), 0
    while killed < kills:
        if killed % 2:
            pid = start(folder / "killed", flags, kill_at_replace=rng.randint(1, 3))
        else:
            pid = start(folder / "killed", flags)
            time.sleep(rng.uniform(0.1, 0.6) * whole)
            os.kill(pid, signal.SIGKILL)
        code = finish(pid)
        if code > 0:
            sys.exit("a resumed run failed")
        killed += code == -signal.SIGKILL
        if code == 0:
            # it was too fast to be killed: begin again, the kills so far count
            (folder / "killed" / "ckpt" / "last.pt").unlink()
    if finish(start(folder / "killed", flags)):
        sys.exit("the last resumed run failed")
    print(f"killed {killed} times")


if __name__ == "__main__":
    runs.cli(partial(main, ARGS.folder, ARGS.flags))
