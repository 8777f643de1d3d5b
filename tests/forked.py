"""The repository's scripts in children of a fork server that has imported them: imports are 3 to 5 s of CPU a script.

`run` and `Popen` take the place of subprocess.run and Popen, also in the children themselves, so that what a script
starts is forked, too, and torchrun with its processes. What is no script, as `python -c`, starts as ever.
A script of another copy of the repository would meet the modules of this one.
"""
import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
LAUNCHER = "torch.distributed.run"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "torch._dynamo", "torchvision", "pyiqa", "lpips", "matplotlib.pyplot", "scipy.stats", "skimage.data", LAUNCHER,
    "torch.distributed.elastic.multiprocessing.subprocess_handler", "train", "finetune_lora", "evaluate", "upscale",
    "analyze_iqa", "report.analyses", "prepare.quintuplets", "prepare.atlas", "selfsup.finetune",
    "selfsup.pretrain", "selfsup.probe", "dpo.pretrain", "dpo.pool", "dpo.tune", "dpo.compare",
    "experiments.preferences", "rewards.ranker"])
real_run, real_popen = subprocess.run, subprocess.Popen
# the files that get this process's output, which a child of the server does not inherit
OUTPUT = [None, None]


def words_of(command):
    """The words after `python`, and after its -u, where the command is torchrun or a script."""
    if not isinstance(command, (list, tuple)) or str(command[0]) != sys.executable:
        return None
    words = [str(word) for word in command[1:]]
    words = words[1:] if words[0] == "-u" else words
    if words[0] != "-m":
        return words if words[0].endswith(".py") else None
    module = REPO / words[1].replace(".", "/")
    ours = module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
    return words if ours or words[1] == LAUNCHER else None


def execute(words, environment, folder, out, err, new_session):
    """What `python *words` does, in this process. out, err: files that get its output, None: the server's."""
    if new_session:
        os.setsid()
    for number, file in ((1, out), (2, err)):
        if file:
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    OUTPUT[:] = out, err
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    is_module = words[0] == "-m"
    sys.argv = words[1:] if is_module else words
    sys.path[:0] = [folder if is_module else str(Path(words[0]).parent),
                    *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    from torch.distributed.elastic.multiprocessing import subprocess_handler
    # this process knows the server that made it, but would start another
    forkserver._forkserver.ensure_running = lambda: None
    subprocess.run, subprocess.Popen, subprocess_handler.Popen = run, Popen, Popen
    if is_module:
        # runpy warns of a module that was imported before it is run
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


class Forked:
    """The part of subprocess.Popen that the scripts, torchrun and `run` use."""

    def __init__(self, words, out, err, cwd, env, new_session):
        names = [file.name if file else inherited for file, inherited in zip((out, err), OUTPUT)]
        environment, folder = dict(os.environ if env is None else env), str(cwd or os.getcwd())
        self.process = SERVER.Process(target=execute, args=(words, environment, folder, *names, new_session))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a script", timeout)
        return self.process.exitcode

    def terminate(self):
        self.process.terminate()


def Popen(args, *, stdout=None, stderr=None, cwd=None, env=None, start_new_session=False, **more):
    words = words_of(args)
    if words is None or more or {type(stdout), type(stderr)} & {int}:
        return real_popen(args, stdout=stdout, stderr=stderr, cwd=cwd, env=env, start_new_session=start_new_session,
                          **more)
    return Forked(words, stdout, stderr, cwd, env, start_new_session)


def run(command, *, capture_output=False, text=None, cwd=None, env=None, timeout=None, **more):
    words = words_of(command)
    if words is None or more or capture_output and not text:
        return real_run(command, capture_output=capture_output, text=text, cwd=cwd, env=env, timeout=timeout, **more)
    with contextlib.ExitStack() as stack:
        files = [None, None]
        if capture_output:
            files = [stack.enter_context(tempfile.NamedTemporaryFile("r")) for _ in range(2)]
        child = Forked(words, *files, cwd, env, False)
        try:
            child.wait(timeout)
        finally:
            child.terminate()
        output = [file and file.read() for file in files]
        return subprocess.CompletedProcess(command, child.returncode, *output)
