"""Flags that the scripts of this folder share, and the start of their demos. Imports no torch: --help is fast."""
import argparse
import sys
from pathlib import Path

import runs

DEMO_SET = Path("datasets/demo")
DEMO_GENERATOR, DEMO_POOL, DEMO_TUNED = Path("runs/flow-demo"), Path("runs/dpo-demo-pool"), Path("runs/dpo-demo")
DEMO_TEST = DEMO_SET / "Test" / "GT" / "demo" / "untouched"
DEMO_CROPS = dict(patch=16, load_size=96, degradation="two-round")
# files that the demos start from, in the order in which they are made, and the commands that make them
DEMO_COMMANDS = {
    DEMO_SET: ["prepare.demo_set"],
    DEMO_GENERATOR / "weights" / "gen.pth": ["dpo.pretrain", "--demo", "--resume", "auto"],
    DEMO_POOL / "pool.json": ["dpo.pool", "sample", "--demo"],
    DEMO_POOL / "scores.json": ["dpo.pool", "score", "--demo"],
    DEMO_POOL / "curation.json": ["dpo.pool", "curate", "--demo"],
    DEMO_TUNED / "weights" / "gen.pth": ["dpo.tune", "--demo", "--resume", "auto"],
}


def make_demo_start(world, last, total_steps=None):
    """Make those of DEMO_COMMANDS' files that are missing, up to `last`.

    total_steps: length of the trainings, None: the demo's.
    """
    paths = list(DEMO_COMMANDS)
    for path in paths[:paths.index(last) + 1]:
        script, *words = DEMO_COMMANDS[path]
        shorter = ["--total-steps", total_steps] if "--resume" in words and total_steps else []
        runs.make_missing(path, world, script, *words, *shorter)


def parser(script, text, commands=None, demo=True):
    """The parser of a script of this folder, or, with `commands`, of a stage of it (script: "dpo.pool sample")."""
    if commands:
        p = commands.add_parser(script.split()[-1], help=text, description=text)
    else:
        p = runs.Parser(prog=f"python -m {script}", description=text)
    if demo:
        p.add_argument("--demo", action="store_true",
                       help="on the demo set, small and short, with the same code; a missing start is made first")
    return p


def parse(p, argv, demo):
    """p.parse_args. demo: {parser: its defaults with --demo}."""
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    if "--demo" in words:
        for each, settings in demo.items():
            each.set_defaults(**settings)
    return p.parse_args(words)


# Flags

def add_machine(p):
    g = p.add_argument_group("machine")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    g.add_argument("--threads", type=runs.COUNT, default=0, help="CPU threads per process; 0: PyTorch's choice")
    return g


def add_generator(p, sampling=True, **gen):
    """--gen, and the parts of Stable Diffusion and FLUX. sampling: add its flags, too; gen: options of --gen."""
    g = p.add_argument_group("generator")
    g.add_argument("--gen", type=Path, metavar="PATH", **gen)
    g.add_argument("--model", type=Path, metavar="DIR",
                   help="local folder of Stable Diffusion 2 or FLUX (PAPER) in diffusers' layout: --gen then names a "
                        "ControlNet; without --model a FlowSR")
    g.add_argument("--prompts", type=Path, metavar="DIR",
                   help="with --model: <name>.txt for every image; default: the empty prompt (RELEASED: tags by RAM)")
    if sampling:
        g.add_argument("--guidance", type=runs.WEIGHT,
                       help="with --model: classifier-free guidance; default: SD2 3.5, FLUX 2.5 (RELEASED); 1: none")
        g.add_argument("--steps", type=runs.SIZE,
                       help="steps of sampling; default: the generator's own (RELEASED: SD2 50, FLUX 25)")
        g.add_argument("--tau", type=runs.RATE,
                       help="scale of the initial noise, FlowSR only; default: the generator's own, 1 (CHOICE)")
    return g


def add_crops(g, patch_help):
    """How low-resolution patches are made of photographs."""
    g.add_argument("--patch", type=runs.number(int, 8), default=64, help=patch_help)
    g.add_argument("--degradation", choices=list(runs.literal("degradations", "PRESETS")), default="realesrgan",
                   help="preset of degradations.py (PAPER: synthetic pairs; CHOICE of the preset)")
    g.add_argument("--load-size", type=runs.SIZE, default=400,
                   help="window of the photo that is degraded, in HR pixels (Real-ESRGAN)")


def add_images(p, groups, groups_help):
    """Photographs to draw crops from, or low-resolution images."""
    g = p.add_argument_group("images (--hr, or --lq-dir)")
    g.add_argument("--hr", type=Path, metavar="DIR", help="photographs; a crop is degraded, and kept as ground truth")
    g.add_argument("--groups", type=runs.SIZE, default=groups, help=groups_help)
    add_crops(g, "LR side of the crops in pixels (PAPER: 128, that is 512 for the output; CHOICE)")
    g.add_argument("--lq-dir", type=Path, metavar="DIR",
                   help="low-resolution images, each of which counts as a photograph of its own")
    g.add_argument("--gt-dir", type=Path, metavar="DIR", help="their ground truth, which full-reference metrics need")
    return g


def name_and_file(text):
    """An argparse type: NAME=FILE -> [NAME, FILE]."""
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(f"{text}: write NAME=FILE")
    return [name, file]


def add_metric_files(g):
    g.add_argument("--metric-weights", nargs="*", type=name_and_file, default=[], metavar="NAME=FILE",
                   help="local weights of metrics, instead of a download")


def add_training(p, batch_size, lr, total_steps, log_every, save_every, val_every):
    """What pretrain and tune share. Each of batch_size, lr and total_steps is (default, help)."""
    g = p.add_argument_group("optimisation")
    g.add_argument("--total-steps", type=runs.SIZE, default=total_steps[0],
                   help=f"optimisation steps ({total_steps[1]})")
    g.add_argument("--batch-size", type=runs.SIZE, default=batch_size[0],
                   help=f"pairs per step, summed over processes ({batch_size[1]})")
    g.add_argument("--lr", type=runs.RATE, default=lr[0], help=f"learning rate of AdamW ({lr[1]})")
    g.add_argument("--seed", type=runs.COUNT, default=0, help="of every random draw")
    m = add_machine(p)
    m.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32",
                   help="of FlowSR (with --model bf16 on CUDA, whatever this says); errors, DPO's logarithms and "
                        "weights stay in fp32")
    m.add_argument("--workers", type=runs.COUNT, default=4, help="data processes per GPU")
    o = p.add_argument_group("output")
    o.add_argument("--out", type=Path, metavar="DIR", help="run folder; default: see above")
    o.add_argument("--resume", nargs="?", const="must", default="no", choices=["must", "auto", "no"],
                   help="continue --out from its checkpoint; auto: start if there is none")
    o.add_argument("--log-every", type=runs.SIZE, default=log_every, help="steps between progress lines")
    o.add_argument("--save-every", type=runs.COUNT, default=save_every,
                   help="steps between checkpoints; 0: only at the end")
    o.add_argument("--val-every", type=runs.COUNT, default=val_every,
                   help="steps between checks on held-out images; 0: only at the end")
    o.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=False,
                   help="also write TensorBoard events")
    return g


# Combinations that cannot work

def check_crops(p, args):
    if args.load_size < 4 * args.patch or args.load_size % 4:
        least = 4 * args.patch
        p.error(f"--load-size {args.load_size} must be a multiple of 4 and at least {least}, four times --patch")
    if args.degradation == "realesrgan" and args.load_size < 80:
        p.error("--degradation realesrgan shrinks to 15 % before it blurs: --load-size must be at least 80")


def check_images(p, args):
    if bool(args.hr) == bool(args.lq_dir):
        p.error("which images? --hr PHOTOS, or --lq-dir DIR" + (", not both" if args.hr else ""))
    if args.hr and args.gt_dir:
        p.error("--gt-dir goes with --lq-dir: the crops of --hr are their own ground truth")
    if args.hr:
        check_crops(p, args)


def check_generator(p, args):
    given = {name for name, value in vars(args).items() if value is not None}
    if "model" in given and "tau" in given:
        p.error("--tau is FlowSR's: leave it out with --model")
    if "model" not in given and given & {"prompts", "guidance"}:
        p.error("--prompts and --guidance go with --model")


def image_source(args, seed):
    """The images that add_images' flags name, as candidates.open_images takes them."""
    if args.hr:
        return dict(hr=args.hr, groups=args.groups, patch=args.patch, load_size=args.load_size,
                    degradation=args.degradation, seed=seed)
    return dict(lq_dir=args.lq_dir, gt_dir=args.gt_dir)
