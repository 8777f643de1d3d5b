"""Flags that the scripts of this folder share, and what their demos start from. Imports no torch: --help is fast."""
import argparse
import subprocess
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


def run(script, *words):
    """Run a script of this repository, and show the command. UserError where it fails."""
    print(f"\n# python {'' if script.endswith('.py') else '-m '}{script} {' '.join(map(str, words))}", flush=True)
    status = subprocess.run(runs.python(script, *words), env=runs.python_path()).returncode
    if status:
        raise runs.UserError(f"{script} ended with {status}")


def need_folders(p, args):
    """Flag errors of the methods that learn from single images."""
    for name in ("lr_dir", "out"):
        if getattr(args, name) is None:
            p.error(f"--{name.replace('_', '-')} is needed")


def start_images(args, name):
    """The beginning of a method that leaves one file per image -> world, autocast, {stem: path}.

    OUT/<name>.json holds the settings. UserError where an earlier call, whose files are kept, had others.
    """
    from images import list_images
    world, _, autocast = runs.start_training(args.device, args.threads, args.seed, getattr(args, "precision", "fp32"))
    if args.demo:
        make_demo_start([DEMO_SET, DEMO_DOMAIN], world, args.device)
    if not args.lr_dir.is_dir():
        raise runs.UserError(f"--lr-dir {args.lr_dir}: no such folder")
    files = list_images(args.lr_dir)
    left_out = ("demo", "out", "device", "threads")
    settings = {k: v if isinstance(v, (int, float)) else str(v) for k, v in vars(args).items() if k not in left_out}
    record = args.out / f"{name}.json"
    if record.exists():
        changed = runs.changes(runs.read_record(record)["args"], settings)
        if changed:
            raise runs.UserError(f"--out {args.out}: its files were made with other settings "
                                 f"({'; '.join(changed.values())}): remove it, or choose another")
    runs.check_writable(args.out, "--out")
    world.barrier()
    if world.is_main and not record.exists():
        runs.save_json(record, {"args": settings, **runs.describe_machine()})
    return world, autocast, files


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


def add_seeded_machine(p, precision=None):
    """add_machine, --seed and, with its help, --precision."""
    g = add_machine(p)
    g.add_argument("--seed", type=runs.COUNT, default=0, help="of every random draw")
    if precision:
        g.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help=precision)


def add_training(p):
    """What pretrain and finetune share. Where their defaults differ, the scripts set them."""
    g = p.add_argument_group("optimisation")
    g.add_argument("--patch", type=runs.number(int, 16), default=64,
                   help="side of the LR patches in pixels (PAPER: 64, INFERRED: of the LR image)")
    g.add_argument("--batch-size", type=runs.SIZE,
                   help="patches per step, summed over processes (CHOICE, not published)")
    g.add_argument("--total-steps", type=runs.SIZE, help="optimisation steps (PAPER: 500,000, then 300 to 600)")
    g.add_argument("--lr", type=runs.RATE, help="learning rate (PAPER: pretrain 2e-4, as a cosine, CHOICE: to 0; "
                   "finetune 2e-6 to 5e-6 by architecture: here 2e-6 for SwinIR and 5e-6 for convolutional networks)")
    g.add_argument("--ema-decay", type=runs.SHARE, default=0.999,
                   help="PAPER; the EMA weights are the result; after 300 steps three quarters are still the start")
    g.add_argument("--seed", type=runs.COUNT, default=0, help="of every random draw")
    g = add_machine(p)
    g.add_argument("--workers", type=runs.COUNT, default=4, help="data processes per GPU")
    g.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32",
                   help="bf16: networks compute in it, with channels last; weights, Gram matrices and the sums of the "
                        "losses stay in fp32")
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
