"""What the scripts share: flags, processes, seeds, the run folder, logs, exact save and resume.

    runs/<name>/args.json  log.txt  metrics.jsonl  ckpt/last.pt  weights/*.pth  samples/*.png

Nothing here knows what is trained. Every file is written under a temporary name and then renamed, so a run killed at
any moment leaves either the old file or the new one. Checkpoints hold plain tensors, numbers, strings and lists only:
they load with `weights_only=True`.
"""
import argparse
import ast
import contextlib
import errno
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
import zlib
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np


class Lazy:
    """A module that is imported when something of it is used: this file parses flags, and torch takes seconds."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, key):
        return getattr(importlib.import_module(self.name), key)


torch, dist, psutil = Lazy("torch"), Lazy("torch.distributed"), Lazy("psutil")

REPO = Path(__file__).resolve().parent
# see StopSignal
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# instructions that decide how PyTorch computes on a CPU, as /proc/cpuinfo calls them
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "avx_vnni", "avx512_vnni")
# those that compute in bf16
BF16_UNITS = ("amx_bf16", "avx512_bf16")


class UserError(ValueError):
    """Something that the user can mend: bad data, a missing file, flags. The text says what, where, what to do."""


class Console(io.FileIO):
    """Standard output or error; printing never raises: who reads it may have gone (head), or its disk may be full."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)

    @staticmethod
    def of(stream):
        try:
            stream.flush()
            raw = Console(stream.fileno(), "w", closefd=False)
        except (AttributeError, OSError):
            # closed, which Python calls None, or a notebook's
            return stream
        # a console that knows no arrow gets a question mark
        return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "replace",
                                line_buffering=stream.line_buffering, write_through=stream.write_through)


def cli(main):
    """Run a script's `main`: a UserError ends in one line and exit code 2, other exceptions in a traceback and code 1.

    What the system says of a file (no permission, full disk) and memory that does not suffice are one line, too.
    Under torchrun an error that every process meets is printed once, and the launcher's summary repeats it.
    IQASR_TRACEBACK=1 shows the traceback of every error. Whatever happens, the process ends.
    """
    status = 0
    record_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if record_file:
        from torch.distributed.elastic.multiprocessing.errors import record
        main = record(main)
    sys.stdout, sys.stderr = map(Console.of, (sys.stdout, sys.stderr))
    try:
        main()
    except SystemExit as end:
        # the group has to be left here, too: as Python ends, its threads would abort the process
        status = end.code or 0
    except KeyboardInterrupt:
        print(f"{program()}: interrupted", file=sys.stderr)
        status = 130
    except Exception as error:
        known = isinstance(error, (UserError, MemoryError)) or isinstance(error, OSError) and error.filename
        if os.environ.get("IQASR_TRACEBACK") or not known:
            if not in_group():
                raise
            traceback.print_exc()
            status = 1
        else:
            sys.stdout.flush()
            text = f"{program()}: error: {' '.join(str(error).split())}"
            if not record_file or not said_by_first_process(Path(record_file), text):
                print(text, file=sys.stderr, flush=True)
            status = 2
    finally:
        end_workers()
        for file in [*Lock.held]:
            Lock.release(file)
    if in_group():
        if status:
            # to leave the group in order, or as Python ends, may wait for processes that are gone
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        dist.destroy_process_group()
    if status:
        sys.exit(status)


def in_group():
    """Has this process joined torchrun's group?"""
    return "torch" in sys.modules and dist.is_available() and dist.is_initialized()


def end_workers():
    """End the data workers, which ignore signals: Python would wait for those that an error's traceback still holds."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    # PyTorch's handler raises where a worker has died
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def said_by_first_process(file, text):
    """Writes the error for torchrun's summary. -> has the first process of this machine met the same one?

    file: where torchrun wants this process's error; that of the first process lies beside it, under its number, and is
    waited for up to five seconds.
    """
    message = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
    write_atomic(file, lambda temporary: temporary.write_text(json.dumps(message)))
    first = file.parent.parent / "0" / file.name
    for _ in range(50 if first != file else 0):
        if first.exists() and json.loads(first.read_text())["message"]["message"] == text:
            return True
        time.sleep(0.1)
    return False


def program():
    """What was started: train.py, or selfsup.finetune for `python -m selfsup.finetune`."""
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec and spec.name else Path(sys.argv[0]).name


def python(script, *words, processes=1):
    """The command that runs a script of this repository, "train.py" or "selfsup.finetune", in one or more processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launch = launch if processes > 1 else []
    where = [str(REPO / script)] if str(script).endswith(".py") else ["-m", script]
    return [sys.executable, *launch, *where, *map(str, words)]


def make_missing(path, world, script, *words):
    """Unless `path` is there, rank 0 runs the script of this repository that leaves it: what a demo starts from.

    path: of a run its folder weights, which an interrupted run lacks.
    """
    if world.is_main and not path.exists():
        shown = " ".join(["python", *([] if script.endswith(".py") else ["-m"]), script, *map(str, words)])
        print(f"{path} is missing and made first: {shown}", flush=True)
        of_torchrun = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE",
                       "SLURM_STEP_NUM_TASKS")
        alone = {k: v for k, v in python_path().items() if k not in of_torchrun}
        status = subprocess.run(python(script, *words), env=alone).returncode
        if status:
            raise UserError(f"{script} ended with {status}, so {path} is not there")
    world.barrier()


def python_path():
    """os.environ with this repository in PYTHONPATH: what `python` of a `-m` script needs wherever it is called."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])}


# Flags

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The module's docstring as it stands, and every flag with its default; where that is None, the text says it."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, []) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Flags without abbreviations, shown by Help; an error is two lines, without the usage of every flag."""

    def __init__(self, *names, allow_abbrev=False, formatter_class=Help, **options):
        name = program()
        options = {"prog": name if name.endswith(".py") else f"python -m {name}"} | options
        super().__init__(*names, allow_abbrev=allow_abbrev, formatter_class=formatter_class, **options)

    def _print_message(self, message, file=None):
        # before cli has made the console take any letter
        encoding = getattr(file, "encoding", None) or "utf-8"
        super()._print_message(message and message.encode(encoding, "replace").decode(encoding), file)

    def error(self, message):
        # under torchrun every process meets the same error
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        name = self.prog.removeprefix("python -m ")
        self.exit(2, f"{name}: error: {message}\nsee {self.prog} --help\n" if first else None)


def number(kind, low=-math.inf, high=math.inf, above=False, below=False):
    """An argparse type: a finite `kind` (int or float) in [low, high]; above / below exclude low / high."""
    def convert(text):
        value = kind(text)
        if not math.isfinite(value) or value < low or above and value == low or value > high or below and value == high:
            bounds = [f"{'more than' if above else 'at least'} {low}"] * (low > -math.inf) + \
                     [f"{'less than' if below else 'at most'} {high}"] * (high < math.inf)
            raise argparse.ArgumentTypeError(f"{text}: must be {' and '.join(bounds) or 'finite'}")
        return value
    # argparse says: invalid number value: 'x'
    convert.__name__ = "whole number" if kind is int else "number"
    return convert


def TILE(text):
    """An argparse type: side of an LR tile in pixels, 0 for the whole image."""
    value = COUNT(text)
    if 0 < value <= 128:
        raise argparse.ArgumentTypeError(f"{text}: must be 0 or more than 128: tiles overlap by 64")
    return value


TILE.__name__ = "whole number"
# 0 often means off
COUNT, SIZE = number(int, 0), number(int, 1)
WEIGHT, RATE = number(float, 0), number(float, 0, above=True)
# in [0, 1): EMA decay, drop rate
SHARE = number(float, 0, 1, below=True)


def literal(module, name):
    """The value of a constant of one of this repository's modules; of a dict whose values are computed, its keys.

    It is read from the module's text: importing the module would import torch.
    """
    for node in ast.parse((REPO / f"{module}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == [name]:
            try:
                return ast.literal_eval(node.value)
            except ValueError:
                return [ast.literal_eval(key) for key in node.value.keys]
    raise AttributeError(f"{module}.py has no constant {name}")


def downloads():
    """The folder of downloaded weights, as seen from here."""
    folder = REPO / "weights" / "downloads"
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def public_weights():
    """{name: file, address, hash, ...} of the public weight files that prepare.weights can get."""
    return json.loads((REPO / "prepare" / "weights.json").read_text())


def CHECKPOINT(text):
    """An argparse type: a weight file, a run folder, or a name that `python -m prepare.weights list` knows.

    A name becomes the path that `get` leaves. Whether it is there is seen later, with the other paths.
    """
    known = public_weights()
    return downloads() / known[text]["file"] if text in known and not Path(text).exists() else Path(text)


def how_to_get(path=""):
    """How errors about missing weights end: with the command that fetches this file, the same weights, or the list."""
    path, known = Path(path), public_weights()
    name = next((name for name, entry in known.items() if entry["file"] == path.name), None)
    if name:
        return f"python -m prepare.weights get {name} fetches it"
    # as runs/vgg19.pth, or another precision of a network
    name = path.stem.removesuffix("_fp16")
    return f"python -m prepare.weights get {name} --out {path.parent} fetches {path.parent / known[name]['file']}, " \
           "which can be named instead" if name in known else "public weights: python -m prepare.weights list"


def add_weights_key(group):
    """The flag of every script that reads a network's file, see archs.read_weights."""
    group.add_argument("--weights-key", metavar="KEY",
                       help="key of the weights in a file; A.B is B inside A; default params_ema, else params, "
                            "state_dict, model_state_dict, model, else the file itself")


def add_training(p, leave_out=()):
    """The flags that train.py and finetune_lora.py share, in the paper's order. Defaults: the paper's GAN training."""
    onoff = argparse.BooleanOptionalAction

    def add(group, flag, **options):
        if flag in leave_out:
            p.set_defaults(**{flag[2:].replace("-", "_"): options.get("default")})
        else:
            group.add_argument(flag, **options)
    g = p.add_argument_group("data")
    add(g, "--data", type=Path, default=Path("datasets/HGGT"), metavar="DIR",
        help="quintuplets in HGGT's layout, as python -m prepare.quintuplets makes them of photographs; "
             "for train.py --stage psnr any photo folder")
    add(g, "--versions", nargs="+", metavar="NAME",
        help="train on these versions alone, as original 01 02 04; default: all, of which none may be missing")
    add(g, "--val-photos", type=COUNT, default=0,
        help="validate on this many photos that are held out of Train, with all their patches, instead of on Test; "
             "0: on Test, where there is one")
    add(g, "--load-size", type=COUNT, default=0,
        help="window of the image that is degraded, in pixels; 0 = whole image (HGGT: 512 of 512; Real-ESRGAN: 400)")
    add(g, "--crop", type=number(int, 32), default=256, help="side of the HR training crop in pixels (HGGT)")
    add(g, "--workers", type=COUNT, default=8, help="data processes per GPU (HGGT)")
    g = p.add_argument_group("degradation (Sec. 5)")
    add(g, "--degradation", choices=literal("degradations", "PRESETS"), help="[arch] preset of degradations.py")
    g = p.add_argument_group("ground-truth sampling (Sec. 4.2)")
    add(g, "--sampler", choices=literal("data", "SAMPLERS"), default="amo",
        help="which GT supervises (Eq. 2-4): the original; any version; any that people like (labels); by softmax of "
             "its score; the same of those that people like; the highest score of the crop")
    add(g, "--reward", nargs="+", default=["musiq"], metavar="NAME[=WEIGHT]",
        help="NR-IQA model Q: pyiqa metric, ranker, reward file PATH.pth, module:function; several are summed; none: "
             "no score is needed. Default musiq (the paper's); train.py with a sampler that needs no score loads one "
             "only if it is named, for validation to report")
    add(g, "--reward-weights", type=Path, metavar="FILE", help="local weights of the reward instead of a download")
    add(g, "--tau", type=RATE,
        help="softmax temperature in score units: default 10 for sma and smp (Sec. 8.1); with --atlas soft AMO, "
             "default arg max")
    add(g, "--atlas", nargs="+", default=[], metavar="FILE[=WEIGHT]",
        help="amo from tables of prepare.atlas instead of online scoring, on their grid of crops; several are summed, "
             "and --reward must be the same sum, or none")
    g = p.add_argument_group("losses (Eq. 1)")
    add(g, "--lambda-l1", type=WEIGHT, default=1.0, help="weight of L1 (HGGT)")
    add(g, "--lambda-p", type=WEIGHT, default=1.0, help="weight of the VGG19 perceptual loss (HGGT); 0: no VGG")
    add(g, "--lambda-a", type=WEIGHT, default=0.1, help="weight of the adversarial loss (HGGT); 0: no discriminator")
    add(g, "--vgg-weights", type=Path, metavar="FILE",
        help="torchvision vgg19 or features-only file instead of a download")
    add(g, "--d-features", type=SIZE, default=64, help="width of the U-Net discriminator (HGGT)")
    g = p.add_argument_group("optimisation (HGGT)")
    add(g, "--total-steps", type=SIZE, default=300_000, help="optimisation steps")
    add(g, "--batch-size", type=SIZE, help="[arch] crops per step, summed over processes")
    add(g, "--group-size", type=SIZE,
        help="[arch] lanes that share HGGT's once-per-GPU-batch draws (scale, mode, crop position)")
    add(g, "--pool-size", type=COUNT, help="[arch] pairs in the training-pair pool, summed over processes; 0: no pool")
    add(g, "--lr", type=RATE, default=1e-4, help="learning rate of G and D (HGGT; psnr: 2e-4)")
    add(g, "--milestones", type=COUNT, nargs="*", help="[arch] steps after which the learning rate halves")
    add(g, "--ema-decay", type=SHARE, default=0.999, help="of the generator's weights, every step")
    add(g, "--drop-path", type=SHARE, default=0.0, help="[arch] stochastic depth of SwinIR; 0: off")
    add(g, "--accumulate", type=SIZE, default=1, help="micro-batches per step and process (CHOICE: 1)")
    add(g, "--seed", type=COUNT, default=0, help="of every random draw (HGGT)")
    g = p.add_argument_group("speed")
    add(g, "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    add(g, "--threads", type=COUNT, default=0, help="CPU threads per process; 0: PyTorch's choice")
    add(g, "--precision", choices=["fp32", "tf32", "bf16"], default="fp32",
        help="of the networks and VGG19; bf16 keeps weights, reward and the differences of the losses in fp32")
    add(g, "--channels-last", action=onoff, default=True,
        help="memory format of the convolutional networks, so not of SwinIR: 1.1 to 1.6 times faster (docs/speed.md)")
    add(g, "--musiq", choices=literal("iqa", "MUSIQ"), default="fused",
        help="how MUSIQ scores crops: fused is rewards/musiq.py, equal to pyiqa's in 1e-5 and faster; fused-bf16 is "
             "close only; pyiqa its own code")
    add(g, "--fast", nargs="*", choices=["graph", "compile"], default=[],
        help="graph: record the step of one CUDA process and replay it, the same work with little of the CPU's time; "
             "compile: torch.compile the generator's blocks, VGG19 and MUSIQ")
    add(g, "--deterministic", action=onoff, default=False,
        help="CUDA too computes bitwise the same again, so that a resumed run equals an uninterrupted one; slower")
    g = p.add_argument_group("output")
    add(g, "--log-every", type=SIZE, default=100, help="steps between progress lines")
    add(g, "--save-every", type=COUNT, default=5_000,
        help="steps between checkpoints (ckpt/last.pt); 0: only at the end")
    add(g, "--val-every", type=COUNT, default=50_000,
        help="steps between weight files, validations and sample grids (HGGT); 0: only at the end")
    add(g, "--tensorboard", action=onoff, default=False, help="also write TensorBoard events")


def split_flags(text):
    """The words of "--a=1 --b 2": ["--a", "1", "--b", "2"], where every value stands behind its flag."""
    return [part for word in shlex.split(text) for part in (word.split("=", 1) if word[:2] == "--" else [word])]


def is_reward_file(name):
    """Does the name of a reward mean a file of rewards.train_opinion?"""
    return name.lower().endswith(".pth")


def split_reward(word):
    """A word of --reward -> (name, text of the weight, "" for none)."""
    # a path may hold an equals sign of its own
    return (word, "") if is_reward_file(word) or "=" not in word else tuple(word.rsplit("=", 1))


def finds_own_weights(name):
    """Is the reward a file, or a function, so that no other file of weights can be named for it?"""
    return is_reward_file(name) or ":" in name


def short_reward(word):
    """What stands in names of folders for a word of --reward: the stem of a file, the module of module:function."""
    name = split_reward(word)[0]
    return Path(name).stem if is_reward_file(name) else name.partition(":")[0]


def chooses_by_score(sampler):
    """Does the sampler need a reward, of whole images or of crops?"""
    return bool({"static", "online"} & {*literal("data", "SAMPLERS")[sampler]})


def check_training(p, args):
    """What argparse cannot see: combinations of add_training's flags that cannot work. Fills args.tau."""
    if args.atlas and (args.sampler != "amo" or args.load_size):
        default = ", the default of --demo" if args.demo else ""
        need = "--sampler amo" if args.sampler != "amo" else f"--load-size 0 (it is {args.load_size}{default})"
        p.error(f"--atlas is for --sampler amo on whole images: give {need}")
    if args.tau is None and not args.atlas:
        args.tau = 10.0
    if args.reward == ["none"] and chooses_by_score(args.sampler) and not args.atlas:
        p.error(f"--sampler {args.sampler} chooses by score: it needs a --reward")
    if args.drop_path and "drop_path" not in literal("archs", "ARCHS")[args.arch]["train"]:
        p.error("--drop-path is SwinIR's: use 0 for convolutional nets")
    if args.crop % 8 or args.load_size % 4 or 0 < args.load_size < args.crop:
        p.error(f"--crop {args.crop} must be a multiple of 8, --load-size {args.load_size} one of 4 and 0 or at least "
                "the crop")
    if args.degradation == "realesrgan" and max(args.crop, args.load_size) < 80:
        p.error("--degradation realesrgan shrinks to 15 % before it blurs: --load-size or --crop must be at least 80")


# Seeds

# All random streams of training: what `purpose` draws, once per step and lane unless another key is named.
#   every training     epoch (epoch): order of the samples    flip, window, sampler, pool, drop-path
#                      crop, degrade-group (step, group)      degrade: the rest of the degradation
#                      val-photos (0): which are held out     val, val-group (image): degradation of validation images
#   plain photographs  turn: quarter turns                    check ...: the same streams for what is held out
#   selfsup            n, noise: the controller's and R's     hold-out (0): images that are not adapted to
#   dpo                time, eps: of the diffusion            groups, pairs, val-groups: order and choice of pairs
# Images outside a training have streams of their own, named after the image ("test ...", "candidate ...").

def sample_seed(seed, step, lane, purpose):
    """A 63-bit seed that is a pure function of (seed, step, lane, purpose): the root of every random draw in a run.

    step: optimisation step (1-based) or epoch; lane: position in the global batch, or a group's number; purpose: a word
    that keeps streams apart ("crop", "flip", "degrade", ...). The process that happens to hold the lane plays no part.
    """
    words = np.random.SeedSequence([seed, step, lane, zlib.crc32(purpose.encode())]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


# Processes

@dataclass
class World:
    """This process among all: rank 0..size-1 and its device."""
    rank: int
    size: int
    device: "torch.device"

    @property
    def is_main(self):
        return self.rank == 0

    def lanes(self, batch_size):
        """The lanes of the global batch that this process trains on, a contiguous range. They must divide."""
        if batch_size % self.size:
            raise UserError(f"--batch-size {batch_size} does not divide by {self.size} processes: "
                             f"use a multiple, for example {self.size * max(1, batch_size // self.size)}")
        share = batch_size // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def reduce(self, tensor, op="SUM"):
        """All-reduce in place over the processes; op: SUM, MIN or MAX. Returns the tensor."""
        if self.size > 1:
            dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op))
        return tensor

    def parallel(self, net):
        """The module in DDP, where there are several processes; its gradients are then averaged over them.

        Gradients are held once, not a second time for the all-reduce. Buffers are not sent at every forward pass:
        SwinIR's (20 MB) are constants, and the spectral norm's vectors follow from the weights, which are equal (a test
        compares weights and buffers with DDP's defaults, bitwise on a CPU).
        """
        if self.size == 1:
            return net
        net = torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
        # not as an argument: PyTorch 2.15 warns of it, and older ones do not know its new name
        net.broadcast_buffers = False
        return net

    def gather_lanes(self, tensor):
        """(b, ...) of every process -> (B, ...) in lane order, on every process."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def gather_objects(self, value):
        """[value of rank 0, value of rank 1, ...] on every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def start_world(device="auto", threads=0):
    """Join torchrun's process group (NCCL on CUDA, gloo on CPU) or be alone; choose the device; set threads (0: leave).

    fp32 is fp32: cuDNN's default of TF32 is switched off.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if threads > 0:
        torch.set_num_threads(threads)
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        # as torchrun wants it
        started = program() if program().endswith(".py") else f"-m {program()}"
        raise UserError(f"srun has started {tasks} processes, each of which would do all the work alone; start one per "
                        f"node (srun --ntasks-per-node 1) of: torchrun --nproc_per_node {tasks} {started} ...")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: this PyTorch sees no GPU; use --device cpu or install a CUDA build")
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        # rank 0 may make images for hours, and candidates take unequal time
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=1))
    return World(rank, size, torch.device(device))


def start_training(device, threads, seed, precision, deterministic=False):
    """The beginning of every training. -> world, seeds(step, lane, purpose), autocast(): where networks run.

    deterministic: CUDA computes bitwise the same again, as a CPU does anyway; PyTorch raises RuntimeError for an
    operation of which it has no such form.
    """
    if deterministic:
        # cuBLAS reads it when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    world = start_world(device, threads)
    # bf16 without units is many times slower, and nothing else would say so
    if precision == "bf16" and world.is_main and (remark := precision_remark(world.device, precision, None)):
        print(remark, file=sys.stderr)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    # it times the algorithms of cuDNN, so that the next process may take others, which round otherwise
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    autocast = partial(torch.autocast, world.device.type, torch.bfloat16, enabled=precision == "bf16")
    return world, partial(sample_seed, seed), autocast


@contextlib.contextmanager
def in_precision(device, precision):
    """Networks inside run in fp32, tf32 or bf16, as --precision says; nothing outside does."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def precision_remark(device, precision, arch):
    """What bf16 gains or costs on this CPU, where that is not what was chosen; else "". arch: None for any other.

    The numbers are those of results/bench/precision-<unit>.json (experiments/precision.py), where there is one.
    """
    flags = cpu_flags()
    unit = next((flag for flag in BF16_UNITS if flag in flags), "none")
    if device.type != "cpu" or (precision == "bf16") == (unit != "none"):
        return ""
    file = REPO / "results" / "bench" / f"precision-{unit}.json"
    found = json.loads(file.read_text())["found"].get(arch) if file.exists() else None
    if unit == "none":
        than = f"fp32 is about {1 / found['faster']:.0f} times as fast (measured)" if found else "fp32 is faster"
        return f"--precision bf16: {than} on a CPU without units for it ({' and '.join(BF16_UNITS)} are such)"
    if not found:
        return f"--precision bf16 may be faster, this CPU has {unit}: python -m experiments.precision measures"
    largest = f", differences of up to {found['largest']:.1f} grey levels" if "largest" in found else ""
    gain = f"about {found['faster']:.1f} times as fast on a CPU with {unit} (measured){largest}"
    return f"--precision bf16 would be {gain}"


def update_ema(ema, net, decay):
    """ema <- decay * ema + (1 - decay) * net, over the parameters.

    One foreach call is 1.1 to 1.2 times faster than a loop (experiments/tricks.py, CPU) and bitwise equal there.
    """
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def adam(weights, lr):
    """HGGT's Adam. On CUDA all weights change in a few kernels."""
    weights = list(weights)
    return torch.optim.Adam(weights, lr=lr, betas=(0.9, 0.99), fused=weights[0].is_cuda or None)


def load_adam(optimiser, state):
    """Take up the state of a checkpoint; how the weights are changed is this device's way."""
    for group, here in zip(state["param_groups"], optimiser.param_groups):
        group["fused"] = here["fused"]
    optimiser.load_state_dict(state)


def learning_rate(step, lr, milestones):
    """HGGT's scheduler starts at step 2, so milestone m acts from step m + 1."""
    return lr * 0.5 ** sum(step > m for m in milestones)


def due(step, total, every):
    """Is it time for what is done every `every` steps and at the end? 0: only then."""
    return step == total or every and step % every == 0


def to_device(tensor, device):
    """Copy a CPU tensor to the device; through pinned memory, since a plain copy waits until the GPU is done."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Graphed:
    """A training step of one CUDA process, recorded once and replayed: thousands of kernels start with one call.

    step(*tensors) -> {name: 0-d tensor} must be the same work at every call: shapes stay, no value is read back,
    nothing is drawn on the host. The first calls run as they are, while cuDNN chooses, compilers compile and Adam makes
    its moments. A changed learning rate is recorded anew. UserError where a step cannot be recorded.
    """

    def __init__(self, step, optimisers):
        self.step, self.optimisers, self.plain_calls, self.rates = step, optimisers, 3, None

    def __call__(self, *inputs):
        if self.plain_calls:
            self.plain_calls -= 1
            # not on the default stream, of which nothing can be recorded
            side, main = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                result = self.step(*inputs)
            main.wait_stream(side)
            return result
        rates = [group["lr"] for optimiser in self.optimisers for group in optimiser.param_groups]
        if rates != self.rates:
            self.record(inputs)
            self.rates = rates
        for kept, given in zip(self.inputs, inputs):
            kept.copy_(given)
        self.graph.replay()
        # the next replay writes to the same places
        return {name: value.clone() for name, value in self.result.items()}

    def record(self, inputs):
        groups = [group for optimiser in self.optimisers for group in optimiser.param_groups]
        # the memory of an earlier record goes first
        self.graph = self.result = None
        self.graph, self.inputs = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in inputs]
        for group in groups:
            group["capturable"] = True
        try:
            # data workers' threads may allocate pinned memory meanwhile
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.result = self.step(*self.inputs)
        except RuntimeError as error:
            raise UserError(f"--fast graph: this step cannot be recorded ({' '.join(str(error).split())[:200]}): leave "
                            "graph out") from error
        finally:
            for group in groups:
                group["capturable"] = False


class StopSignal:
    """SIGTERM, SIGUSR1 (Slurm's, before its limit) and Ctrl-C ask for a clean stop; a second one stops at once.

    SIGUSR1 never does. Of several processes each gets a signal twice, from the system and from torchrun: within a
    second it is the same one.
    """

    def __init__(self, world, every=10):
        self.world, self.every, self.received, self.first = world, every, False, {}
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.received, now = True, time.monotonic()
        waited = now - self.first.setdefault(number, now)
        if number != signal.SIGUSR1 and waited > (1 if self.world.size > 1 else 0):
            raise KeyboardInterrupt

    def requested(self, step):
        """Has any process been told to stop? Processes agree every `every` steps: an all-reduce, a sync on CUDA."""
        if self.world.size == 1:
            return self.received
        if step % self.every:
            return False
        flag = torch.tensor(float(self.received), device=self.world.device)
        return bool(self.world.reduce(flag, "MAX").item())


# Files

def write_atomic(path, write):
    """Call write(temporary path), flush it to disk, rename it to `path`: nobody sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with says_where(path):
            # torch.save hides what the system said
            if isinstance(error, RuntimeError):
                with open(temporary, "ab", buffering=0) as f:
                    f.write(bytes(2 ** 20))
                    os.fsync(f.fileno())
            raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def says_where(path):
    """An error of writing that names no file, as that of a full disk, names this one and its disk."""
    try:
        yield
    except OSError as error:
        if not error.errno or error.filename:
            raise
        text, disk = error.strerror, Path(path).absolute().parent
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(disk).free / 2 ** 20
            while not disk.is_mount():
                disk = disk.parent
            text += f" (disk {disk}, {free:.0f} MB free)"
        raise OSError(error.errno, text, str(path)) from None


def append(path, line):
    """Add a line to a file, as UTF-8."""
    with says_where(path), open(path, "a", encoding="utf-8") as f:
        f.write(line + "\n")


def check_writable(folder, flag):
    """UserError unless `folder` can be written, or made, as `flag` asks. Leaves nothing behind."""
    nearest = Path(folder).absolute()
    while not nearest.exists():
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written ({error.strerror}): choose another place") from None


def check_output(path, flag):
    """UserError unless the file `path` (None: no file) can be written, as `flag` asks: before the work, not after."""
    if path is not None:
        check_writable(path.parent, flag)
        if path.is_dir():
            raise UserError(f"{flag} {path}: a folder; name a file")


def sha256(path):
    """All digits of a file's SHA-256, as it is published, and as the records of quintuplets hold it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value):
    """Hash of a file's bytes (of a Path), of bytes or a memoryview, or of plain values: 24 digits of its SHA-256."""
    if isinstance(value, Path):
        return sha256(value)[:24]
    if not isinstance(value, bytes | memoryview):
        value = json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(value).hexdigest()[:24]


def save_json(path, value):
    write_atomic(path, lambda t: t.write_text(json.dumps(value, indent=1) + "\n"))


def read_record(path):
    """A run's args.json. UserError when it is damaged."""
    try:
        record = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged ({error}); the run's weights can be named by their file") from None
    if not isinstance(record, dict) or not isinstance(record.get("args"), dict):
        raise UserError(f"{path}: not the record of a run (no args in it); the weights can be named by their file")
    return record


def save_weights(path, params, params_ema=None):
    """The file that BasicSR, spandrel and chaiNNer read: {"params_ema": ..., "params": ...} of float32 CPU tensors."""
    weights = {"params_ema": params_ema, "params": params} if params_ema is not None else {"params": params}
    weights = {name: {k: v.detach().cpu().clone() for k, v in state.items()} for name, state in weights.items()}
    write_atomic(path, lambda t: torch.save(weights, t))


def find_weights(path, remedy):
    """The weight file meant by `path`: itself, or a run folder's weights/merged.pth, else its newest weights/ema_*.pth.

    remedy: how the error ends.
    """
    path = Path(path)
    files = [path] if path.is_file() else [*sorted(path.glob("weights/ema_*.pth")), *path.glob("weights/merged.pth")]
    if not files:
        missing = "weights/ema_*.pth in it" if path.is_dir() else "such file or run"
        raise UserError(f"{path}: no {missing}; {remedy}; {how_to_get(path)}")
    return files[-1]


def find_discriminator(run):
    """The newest weights/net_d_*.pth of a run folder."""
    files = sorted(Path(run).glob("weights/net_d_*.pth"))
    if not files:
        raise UserError(f"{run}: no weights/net_d_*.pth in it, which --lambda-a > 0 needs; train.py leaves it, or name "
                        "one with --d-init FILE")
    return files[-1]


def first_sentence(error):
    """What torch.load says of a file, in one line without colours: its first sentence, or its unpickler's."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).partition("WeightsUnpickler error:")
    line = ((text[2] or text[0]).strip().splitlines() or [type(error).__name__])[0]
    return re.split(r"(?<=[.!?])\s", line)[0].rstrip(".")


def load_checkpoint(path):
    """A dict saved by `torch.save` through write_atomic, on the CPU. UserError when it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; without --resume a new run starts") from None
    except (RuntimeError, ValueError, KeyError, EOFError, OSError, pickle.UnpicklingError) as error:
        # torch: damaged
        raise UserError(f"{path}: not a readable checkpoint ({first_sentence(error)})") from error


def cpu_flags():
    """Those of CPU_FLAGS that this CPU has; numbers differ in their last digits between CPUs of other instructions."""
    info = Path("/proc/cpuinfo")
    known = re.search(r"^flags\s*:(.*)", info.read_text() if info.exists() else "", re.MULTILINE)
    return [flag for flag in CPU_FLAGS if known and flag in known[1].split()]


def describe_machine(on_cpu=False):
    """Commit, versions and hardware, as recorded beside every number. on_cpu: a GPU, if there is one, has no part.

    The commit ends with +dirty if a file that git tracks was changed; results/, which experiments write, has no part.
    """
    def git(*words):
        try:
            done = subprocess.run(["git", "-C", str(REPO), *words], capture_output=True, text=True, check=True)
            return done.stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None
    commit = git("rev-parse", "HEAD")
    if commit and git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"):
        commit += "+dirty"
    cpu = f"CPU {platform.machine()}, {os.cpu_count()} cores"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and not on_cpu else cpu
    return {"commit": commit, "torch": torch.__version__, "python": platform.python_version(), "device": device,
            "cpu_flags": cpu_flags(), "threads": torch.get_num_threads()}


def peak_memory(device):
    """GiB: the most that was allocated on this GPU, or resident of this process.

    On Linux getrusage would count the process that started this one, too.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def markdown(head, rows):
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


# The run folder

def is_running(pid, started):
    """Does the process run that began at this time (psutil's)? One that is over and only waits for its parent does not.
    """
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 1
    except psutil.NoSuchProcess:
        return False


class Lock:
    """Keeps a second process out of a run folder: lock.json says who writes there, and is touched every minute.

    It is stale where that process has ended (seen from the same host), belonged to this SLURM job, which was requeued,
    or has not touched it for ten minutes.
    """

    held = []

    def __init__(self, folder):
        self.file, process = Path(folder) / "lock.json", psutil.Process()
        self.own = {"host": platform.node(), "pid": process.pid, "started": process.create_time(),
                    "job": os.environ.get("SLURM_JOB_ID")}

    def stale(self):
        """-> whom a stale lock belonged to, as text, "" where there is none. UserError where it is held."""
        try:
            owner, untouched = self.file.read_text(), time.time() - self.file.stat().st_mtime
            host, pid, started, job = (json.loads(owner)[key] for key in self.own)
            who, since = f"process {pid} on {host}" + (f" (job {job})" if job else ""), f" since {time.ctime(started)}"
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except (ValueError, KeyError, TypeError):
            # being written, or damaged
            host, pid, job, who, since = None, 0, None, "a process", ""
        here = host == self.own["host"]
        running = here and is_running(pid, started)
        if running and pid == self.own["pid"]:
            return ""
        if untouched > 600 or not running and (here or job and job == self.own["job"]):
            return who
        raise UserError(f"{self.file.parent}: {who} is writing there{since}: choose another --out, or end it"
                        + ("" if here else f"; if it has ended, wait for ten minutes or remove {self.file}"))

    def take(self):
        """-> as stale()."""
        whom = self.stale()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if whom:
            self.file.unlink(missing_ok=True)
        try:
            with says_where(self.file), open(self.file, "x") as f:
                f.write(json.dumps(self.own))
        except FileExistsError:
            self.stale()
        if whom:
            # another process may have taken it over in the same moment
            time.sleep(1)
            self.stale()
        if not Lock.held:
            threading.Thread(target=Lock.touch_all, daemon=True).start()
        Lock.held.append(self.file)
        return whom

    @staticmethod
    def touch_all():
        while Lock.held:
            for file in Lock.held:
                with contextlib.suppress(OSError):
                    os.utime(file)
            time.sleep(60)

    @staticmethod
    def release(file):
        if file in Lock.held:
            Lock.held.remove(file)
            file.unlink(missing_ok=True)


def changes(before, now):
    """{name: "name old -> new"} of the values in `now` that `before` has otherwise; what it lacks was off."""
    return {k: f"{k} {before.get(k)!r} -> {v!r}" for k, v in now.items() if before.get(k, None if v else v) != v}


# arguments that another call of the same run may have otherwise
NO_SETTINGS = ("resume", "words", "sources")


class Run:
    """A run's folder: refuses to overwrite another run, writes args.json, log.txt, metrics.jsonl and ckpt/last.pt.

    resume: "no" (the folder must be new), "must" (needs ckpt/last.pt), "auto" (continues if there is one, else starts).
    fixed: names of arguments, and of facts given to `pin`, that a resumed run must share with the checkpoint.
    retired: {flag of earlier commits: the only value that still is possible}.
    `self.checkpoint` is the loaded state or None. Nothing is left on disk before `open()`; only rank 0 writes.
    """

    def __init__(self, out, args, world, resume="no", fixed=(), retired=(), tensorboard=False):
        self.out, self.world, self.last = Path(out), world, Path(out) / "ckpt" / "last.pt"
        plain = (str, int, float, bool, list, type(None))
        self.args = {k: v if isinstance(v, plain) else str(v) for k, v in args.items()}
        self.lock = Lock(self.out)
        if world.is_main:
            self.lock.stale()
        used = self.out.exists() and (not self.out.is_dir() or set(self.out.iterdir()) - {self.lock.file})
        if used and resume == "no":
            begun = not self.last.exists() and (self.out / "args.json").exists()
            way = "continue it with --resume"
            if begun:
                way = "it ended before its first checkpoint, --resume auto starts it again"
            raise UserError(f"{self.out} exists and is not empty: {way}, or choose another --out")
        if resume == "must" and not self.last.exists():
            raise UserError(f"--resume: {self.last} does not exist; --resume auto starts a run where there is none")
        if used and not self.last.exists() and not (self.out / "args.json").exists():
            raise UserError(f"{self.out} exists and is not a run folder: choose another --out")
        self.checkpoint = load_checkpoint(self.last) if self.last.exists() else None
        before = self.checkpoint["args"] if self.checkpoint else {}
        lost = [f"{name} {before[name]!r}" for name, value in dict(retired).items() if before.get(name, value) != value]
        if lost:
            raise UserError(f"--resume {self.out}: its {', '.join(lost)} is no flag any more; the commit in its "
                            "args.json continues it")
        self.fixed, self.changed = fixed, []
        self.pin(**{k: v for k, v in self.args.items() if k not in NO_SETTINGS})
        if world.is_main:
            check_writable(self.out, "--out")
        self.start_step = self.checkpoint["step"] if self.checkpoint else 0
        self.tensorboard, self.use_tensorboard, self.bar = None, tensorboard, None

    def check_steps(self, total):
        """UserError where the run is further than it shall go."""
        if self.start_step > total:
            raise UserError(f"--total-steps {total}: {self.out} is already at step {self.start_step}")

    def steps(self, total):
        """The steps that are left, with a progress bar where the output is a terminal."""
        if self.start_step == total:
            self.say(f"nothing to do: {self.out} is finished; remove it to train again")
        if self.world.is_main and sys.stdout.isatty():
            from tqdm import tqdm
            self.bar = tqdm(total=total, initial=self.start_step, unit="step", dynamic_ncols=True)
        for step in range(self.start_step + 1, total + 1):
            yield step
            if self.bar is not None:
                self.bar.update()
        if self.bar is not None:
            self.bar.close()

    def pin(self, **facts):
        """Record facts beside the arguments (say, how many samples there are); compare them with the checkpoint's."""
        self.args |= facts
        before = self.checkpoint["args"] if self.checkpoint else facts
        changed = changes(before, facts)
        broken = [text for k, text in changed.items() if k in self.fixed]
        if broken:
            raise UserError(f"--resume {self.out}: this checkpoint was made with other settings ({'; '.join(broken)})")
        self.changed += changed.values()

    def open(self):
        """Start writing: called when all that can be refused has been checked; a refused run leaves no folder."""
        # every rank has looked at the folder before rank 0 writes into it
        self.world.barrier()
        if not self.world.is_main:
            return
        whom = self.lock.take()
        weakref.finalize(self, Lock.release, self.lock.file)
        if self.start_step == 0:
            for name in ("log.txt", "metrics.jsonl"):
                (self.out / name).unlink(missing_ok=True)
            save_json(self.out / "args.json", {"args": self.args, "command": sys.argv, "processes": self.world.size,
                                               **describe_machine()})
        else:
            self._drop_events_after(self.start_step)
            self.say(f"resumed at step {self.start_step} from {self.last}"
                     + (f"; changed: {'; '.join(self.changed)}" if self.changed else ""))
        if whom:
            self.say(f"took over the lock of {whom}, which has ended")
        if self.use_tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(self.out / "tensorboard", purge_step=self.start_step + 1)

    def _drop_events_after(self, step):
        """Events later than the checkpoint are about to happen again."""
        path = self.out / "metrics.jsonl"
        if path.exists():
            # the last may be cut off
            whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
            kept = "".join(line for line in whole if json.loads(line)["step"] <= step)
            write_atomic(path, lambda temporary: temporary.write_text(kept))

    def say(self, text, quiet=False):
        """Print and append to log.txt, on rank 0. quiet: what the progress bar shows anyway."""
        if self.world.is_main:
            append(self.out / "log.txt", text)
            # the terminal may have gone
            with contextlib.suppress(OSError):
                if self.bar is None:
                    print(text, flush=True)
                elif not quiet:
                    self.bar.write(text)

    def event(self, step, split, **values):
        """One object in metrics.jsonl: {"step": ..., "split": ..., **values}; scalars also go to TensorBoard."""
        if self.world.is_main:
            append(self.out / "metrics.jsonl", json.dumps({"step": step, "split": split, **values}))
            if self.tensorboard:
                for name, value in values.items():
                    if isinstance(value, (int, float)):
                        self.tensorboard.add_scalar(f"{split}/{name}", value, step)

    def progress(self, step, total, meter, lr, picked):
        """The line that grep and eyes read, and the same numbers as an event. -> the window's averages

        picked: {version: times chosen so far}, {} where nothing is chosen.
        """
        terms, speed, waiting = meter.read()
        loss = " ".join(f"{k} {v:.3g}" for k, v in terms.items() if k != "score" and not k.startswith("D_"))
        if "D_real" in terms:
            loss += f" D {terms['D_real']:.2f} {terms['D_fake']:.2f}"
        minutes, seconds = divmod(round((total - step) / speed), 60)
        # at most 110 characters; the learning rate, which seldom changes, is in the event
        line = f"{time.strftime('%H:%M:%S')} step {step}/{total} | {loss} {speed:.3g} it/s"
        line += f" wait {waiting:.0%}" if waiting >= 0.1 else ""
        self.say(f"{line} eta {minutes // 60}:{minutes % 60:02d}:{seconds:02d}", quiet=True)
        if self.bar is not None:
            self.bar.set_postfix_str(loss)
        if len(picked) > 1:
            # of the fresh pairs, before the pool swaps them
            chosen = max(1.0, sum(picked.values()))
            shares = " ".join(f"{version} {count / chosen:.0%}" for version, count in picked.items() if count)
            score = f"; score of the fresh pairs {terms['score']:.1f}" if "score" in terms else ""
            self.say(f"  chosen so far: {shares}{score}", quiet=True)
        self.event(step, "train", **terms, lr=lr, it_per_s=round(speed, 5), wait=round(waiting, 3),
                   memory=round(peak_memory(self.world.device), 3), picked=picked)
        return terms

    def save(self, step, state):
        """Replace ckpt/last.pt by {"step", "args", **state}; the other ranks wait until it is there."""
        if self.world.is_main:
            write_atomic(self.last, lambda t: torch.save({"step": step, "args": self.args, **state}, t))
            record = self.out / "args.json"
            if self.changed and record.is_file():
                # a fine-tuning of this run takes its settings from there
                save_json(record, read_record(record) | {"args": self.args})
                self.changed = []
        self.world.barrier()


class Meter:
    """Window averages without a device sync: sums stay on the device until `read`.

    Also remembers, for every term, the first step at which it was not finite, so that the check costs nothing per step.
    """

    # steps
    WINDOW = 100

    def __init__(self, world, state=None):
        self.world, self.sums, self.count, self.first_bad, self.unscored = world, {}, 0, {}, {}
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, 0
        if state:
            self.count = state["count"]
            self.sums = {k: v.to(world.device) for k, v in state["sums"].items()}

    def state_dict(self):
        """Window sums averaged over processes, so that a resumed run logs the line an uninterrupted one would."""
        sums = {k: self.world.reduce(v.clone()).cpu() / self.world.size for k, v in self.sums.items()}
        return {"count": self.count, "sums": sums}

    @contextlib.contextmanager
    def waiting(self):
        """Counts the time inside as waiting for data."""
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    def add(self, step, score=None, **terms):
        """terms: 0-d tensors of this process's share of the batch; score: (b,), averaged where it is finite."""
        if score is not None:
            finite = torch.isfinite(score)
            terms |= {"score": score.where(finite, 0).mean(), "unscored": (~finite).float().mean()}
        self.count += 1
        self.steps += 1
        for name, value in terms.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            never = torch.full((), 2 ** 31 - 1, dtype=torch.int64, device=value.device)
            bad = torch.where(torch.isfinite(value), never, torch.full_like(never, step))
            self.first_bad[name] = torch.minimum(self.first_bad[name], bad) if name in self.first_bad else bad

    def leave_out(self, step, what, number, each=1, limit=None):
        """Count what has no finite score: `number` times `each`, a 0-d tensor, of this process at `step`; None: none.

        limit: UserError where it is more per step, of all processes, on average over WINDOW steps.
        """
        if number is None:
            return
        number = (number.detach() * each).float().round().long()
        zero, never = torch.zeros_like(number), torch.full_like(number, 2 ** 31 - 1)
        total, first, recent, told = self.unscored.get(what, (zero, never, zero, 0))
        first = torch.minimum(first, torch.where(number > 0, step, never))
        recent = recent + number
        if limit is not None and step % self.WINDOW == 0:
            # a device sync
            sum_of_all, limit = int(self.world.reduce(recent).item()), limit * self.WINDOW
            if sum_of_all > limit:
                raise UserError(f"{sum_of_all} {what} had no finite score in the {self.WINDOW} steps up to step "
                                f"{step}; more than {limit:.0f} are too many: look at the images and the --reward")
            recent = zero
        self.unscored[what] = total + number, first, recent, told

    def left_out(self, describe):
        """[a sentence about each kind that leave_out has counted more of]; describe(step) names samples, once."""
        sentences = []
        for what, (total, first, recent, told) in self.unscored.items():
            # device syncs
            count = int(self.world.reduce(total.clone()).item())
            step = int(self.world.reduce(first.clone(), "MIN").item())
            if count > told:
                where = "" if told else f", the first at step {step}, which drew {describe(step)}"
                sentences.append(f"{count} {what} without a finite score since this call began, left out{where}")
                self.unscored[what] = total, first, recent, count
        return sentences

    def check_finite(self, describe, *nets):
        """Raise UserError naming the first non-finite term and its step; describe(step) names the samples.

        nets: what is about to be saved. A finite loss may have had a gradient that is not; a run that was resumed from
        such weights would end at its next step for ever.
        """
        for name, first in self.first_bad.items():
            # a device sync
            step = int(self.world.reduce(first.clone(), "MIN").item())
            if step < 2 ** 31 - 1:
                raise UserError(f"{name} is not finite at step {step}; the last checkpoint is older. "
                                f"Samples: {describe(step)}")
        weights = [weight.detach() for net in nets if net is not None for weight in net.parameters()]
        # one device sync
        if weights and not torch.stack([torch.isfinite(weight).all() for weight in weights]).all().item():
            raise UserError("the weights are not finite any more, though every loss is: a gradient was not. The last "
                            "checkpoint is older: look at the images and the losses, or try a smaller --lr")

    def read(self):
        """Starts a new window. -> averages over window and processes, steps per second, share of time spent waiting"""
        averages = {k: (self.world.reduce(v.clone()) / self.world.size).item() / self.count
                    for k, v in self.sums.items()}
        unscored = averages.pop("unscored", 0.0)
        if unscored:
            averages["score"] = averages["score"] / (1 - unscored) if unscored < 1 else 0.0
        elapsed = time.perf_counter() - self.started
        speed, waiting = self.steps / elapsed, self.waited / elapsed
        self.sums, self.count, self.steps, self.waited, self.started = {}, 0, 0, 0.0, time.perf_counter()
        return averages, speed, waiting
