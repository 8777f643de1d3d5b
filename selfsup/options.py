"""Flags that the scripts of this folder share, and what their demos start from. Imports no torch: --help is fast."""
import argparse
from pathlib import Path

import runs

DEMO_SET = Path("datasets/demo")
DEMO_PHOTOS = DEMO_SET / "Test" / "GT" / "demo" / "untouched"
DEMO_DOMAIN = Path("datasets/demo-domain")
DEMO_SR = Path("runs/compact-small-psnr")
DEMO_REC = Path("runs/rec-demo")
DEMO_TUNED = Path("runs/selfsup-demo")
# what the demos start from, and the commands that make it
DEMO_COMMANDS = {
    DEMO_SET: ["prepare.demo_set"],
    DEMO_DOMAIN: ["prepare.degrade", DEMO_PHOTOS, DEMO_DOMAIN, "--degradation", "camera"],
    DEMO_SR: ["train.py", "--demo", "--stage", "psnr", "--resume", "auto"],
    DEMO_REC: ["selfsup.pretrain", "--demo", "--resume", "auto"],
}


def make_demo_start(paths, world, device, total_steps=None):
    """Make those of DEMO_COMMANDS that are missing, in the order of `paths`.

    total_steps: length of the trainings, None: the demo's. A run counts as made once its weights are there: an
    interrupted one is continued.
    """
    for path in paths:
        script, *flags = DEMO_COMMANDS[path]
        is_run = "--resume" in flags
        if is_run:
            flags += ["--device", device, *(["--total-steps", total_steps] if total_steps else [])]
        runs.make_missing(path / "weights" if is_run else path, world, script, *flags)


def add_files(p):
    g = p.add_argument_group("weights of the distance and of FAR's encoder")
    g.add_argument("--vgg-weights", type=Path, metavar="FILE",
                   help="torchvision vgg19 or features-only file instead of a download")
    g.add_argument("--clip-weights", type=Path, metavar="FILE",
                   help="OpenAI's RN50.pt, or its state dict, instead of a download")
    g.add_argument("--far-sr", type=runs.CHECKPOINT, metavar="PATH", help="the x4 network of --far-enc sr")


def add_machine(p):
    g = p.add_argument_group("machine")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    g.add_argument("--threads", type=runs.COUNT, default=0, help="CPU threads per process; 0: PyTorch's choice")
    return g


def add_training(p):
    """What pretrain and finetune share. Where their defaults differ, the scripts set them."""
    g = p.add_argument_group("optimisation")
    g.add_argument("--patch", type=runs.number(int, 16), default=64,
                   help="side of the LR patches in pixels (PAPER: 64)")
    g.add_argument("--batch-size", type=runs.SIZE,
                   help="patches per step, summed over processes (CHOICE, not published)")
    g.add_argument("--total-steps", type=runs.SIZE, help="optimisation steps (PAPER: 500,000, then 300 to 600)")
    g.add_argument("--lr", type=runs.RATE, help="learning rate (PAPER: pretrain 2e-4, falling to 0 as a cosine; "
                   "finetune 2e-6 to 5e-6 by architecture: here 2e-6 for SwinIR and 5e-6 for convolutional networks)")
    g.add_argument("--ema-decay", type=runs.SHARE, default=0.999,
                   help="PAPER; the EMA weights are the result; after 300 steps three quarters are still the start")
    g.add_argument("--seed", type=runs.COUNT, default=0, help="of every random draw")
    g = add_machine(p)
    g.add_argument("--workers", type=runs.COUNT, default=4, help="data processes per GPU")
    g.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32",
                   help="bf16 keeps losses, Gram matrices and weights in fp32")
    g = p.add_argument_group("output")
    g.add_argument("--out", type=Path, metavar="DIR", help="run folder; default: see above")
    g.add_argument("--resume", nargs="?", const="must", default="no", choices=["must", "auto", "no"],
                   help="continue --out from its checkpoint; auto: start if there is none")
    g.add_argument("--log-every", type=runs.SIZE, help="steps between progress lines")
    g.add_argument("--save-every", type=runs.COUNT, help="steps between checkpoints; 0: only at the end")
    g.add_argument("--val-every", type=runs.COUNT, help="steps between checks; 0: only at the end")
    g.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=False,
                   help="also write TensorBoard events")


def weight_or_auto(text):
    """An argparse type: a weight, or auto."""
    return text if text == "auto" else runs.WEIGHT(text)


weight_or_auto.__name__ = "number"
