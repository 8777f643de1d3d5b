"""What the scripts' argparse share: help with defaults, numbers checked where they are given, the flags of training. Imports no torch."""
import argparse
import math
import re
from pathlib import Path


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The module's docstring as it stands, and every flag with its default."""


def number(kind, low=-math.inf, high=math.inf, above=False, below=False):
    """An argparse type: a finite `kind` (int or float) in [low, high]; above / below exclude low / high."""
    def convert(text):
        value = kind(text)
        if not math.isfinite(value) or value < low or above and value == low or value > high or below and value == high:
            bounds = [f"{'more than' if above else 'at least'} {low}"] * (low > -math.inf) + \
                     [f"{'less than' if below else 'at most'} {high}"] * (high < math.inf)
            raise argparse.ArgumentTypeError(f"{text}: must be {' and '.join(bounds) or 'finite'}")
        return value
    convert.__name__ = "whole number" if kind is int else "number"                # argparse says: invalid number value: 'x'
    return convert


def TILE(text):
    """An argparse type: side of an LR tile in pixels, 0 for the whole image."""
    value = COUNT(text)
    if 0 < value <= 128:
        raise argparse.ArgumentTypeError(f"{text}: must be 0 or more than 128: tiles overlap by 64")
    return value


TILE.__name__ = "whole number"
COUNT, SIZE = number(int, 0), number(int, 1)                                      # 0 often means off
WEIGHT, RATE = number(float, 0), number(float, 0, above=True)
SHARE = number(float, 0, 1, below=True)                                           # in [0, 1): EMA decay, drop rate
NINE = "psnr ssim lpips stlpips dists musiq nima qalign topiq_nr".split()          # PAPER Sec. 5: the columns of Tables 5, 7 and 8, in order
FULL_REFERENCE = ("psnr", "ssim", "vgg", "flat_hf", "lpips", "stlpips", "dists")   # metrics that compare; pyiqa knows further ones
CROP = re.compile(r"(.+):(\d+),(\d+),(\d+)")                                      # STEM:X,Y,SIDE

FUSED = {"fused": True, "fused-bf16": "bf16", "pyiqa": False}                      # --musiq, as iqa.create_reward takes it

PRESETS = {  # what differs per backbone; HGGT options for 4 GPUs: batch and pool are summed over them, group is one GPU's batch
    "swinir": dict(degradation="one-round", batch_size=32, group_size=8, pool_size=640, drop_path=0.1,
                   milestones=[200_000, 250_000, 275_000, 287_500]),
    "rrdbnet": dict(degradation="two-round", batch_size=48, group_size=12, pool_size=720, drop_path=0.0,
                    milestones=[300_000]),
    # CHOICE: neither paper trains this net; it gets RRDBNet's settings, being the convolutional one of the two
    "compact": dict(degradation="two-round", batch_size=48, group_size=12, pool_size=720, drop_path=0.0,
                    milestones=[300_000]),
}
SMALL = dict(batch_size=8, group_size=4, pool_size=32, milestones=[])             # CHOICE: nets for a CPU, demo and tests
PRESETS |= {f"{name}-small": preset | SMALL for name, preset in PRESETS.items()}


def add_training(p):
    """The flags that train.py and finetune_lora.py share, in the order of the paper. Defaults: the paper's GAN training."""
    onoff = argparse.BooleanOptionalAction
    g = p.add_argument_group("data")
    g.add_argument("--data", type=Path, default=Path("datasets/HGGT"),
                   help="quintuplets in HGGT's layout; for train.py --stage psnr any photo folder")
    g.add_argument("--val-photos", type=COUNT, default=0, help="hold out this many photos where there is no Test split")
    g.add_argument("--load-size", type=COUNT, default=0,
                   help="window of the image that is degraded, in pixels; 0 = whole image (HGGT: 512 of 512; Real-ESRGAN: 400)")
    g.add_argument("--crop", type=number(int, 32), default=256, help="side of the HR training crop in pixels (HGGT)")
    g.add_argument("--workers", type=COUNT, default=8, help="data processes per GPU (HGGT)")
    g = p.add_argument_group("degradation (Sec. 5)")
    g.add_argument("--degradation", choices=["one-round", "two-round", "realesrgan"], help="[arch] preset of degradations.py")
    g.add_argument("--jpeg-table", choices=["hggt", "libjpeg"], default="hggt", help="hggt keeps its transposed luma table")
    g.add_argument("--usm", action=onoff, default=False,
                   help="[arch] --stage psnr: sharpen the image, before LR synthesis and as target (HGGT: rrdbnet)")
    g = p.add_argument_group("ground-truth sampling (Sec. 4.2)")
    g.add_argument("--sampler", choices=["orig", "rand", "upos", "sma", "smp", "amo"], default="amo",
                   help="which GT supervises (Eq. 2-4)")
    g.add_argument("--reward", nargs="+", default=["musiq"], metavar="NAME[=WEIGHT]",
                   help="NR-IQA model Q: pyiqa metric, ranker, module:function; several are summed; none where the sampler needs none")
    g.add_argument("--reward-weights", type=Path, metavar="FILE", help="local weights of the reward instead of a download")
    g.add_argument("--tau", type=RATE, help="softmax temperature in score units: default 10 for sma and smp (Sec. 8.1); with --atlas soft AMO, default arg max")
    g.add_argument("--atlas", nargs="+", default=[], metavar="FILE[=WEIGHT]",
                   help="amo from tables of `prepare.py atlas` instead of online scoring, on their grid of crops; several are summed, and --reward must be the same sum, or none")
    g.add_argument("--margin", type=WEIGHT, default=0.0, help="with --atlas: score by which an enhanced version must beat the original (CHOICE: 0, the paper's arg max)")
    g.add_argument("--include-original", action=onoff, default=True, help="is the original in A_I? (Eq. 4: yes; Sec. 4.2 once: no)")
    g.add_argument("--drop-without-positive", action=onoff, default=False,
                   help="drop sets without a positive for every sampler; upos and smp always do (HGGT)")
    g.add_argument("--score-cache", type=Path, default=Path("runs/scores"), help="static scores of whole images (sma, smp)")
    g = p.add_argument_group("losses (Eq. 1)")
    g.add_argument("--lambda-l1", type=WEIGHT, default=1.0, help="weight of L1 (HGGT)")
    g.add_argument("--lambda-p", type=WEIGHT, default=1.0,
                   help="weight of the VGG19 perceptual loss (HGGT); 0: no VGG")
    g.add_argument("--lambda-a", type=WEIGHT, default=0.1,
                   help="weight of the adversarial loss (HGGT); 0: no discriminator")
    g.add_argument("--vgg-weights", type=Path, metavar="FILE", help="torchvision vgg19 or features-only file instead of a download")
    g.add_argument("--d-features", type=SIZE, default=64, help="width of the U-Net discriminator (HGGT)")
    g = p.add_argument_group("optimisation (HGGT)")
    g.add_argument("--total-steps", type=SIZE, default=300_000, help="optimisation steps")
    g.add_argument("--batch-size", type=SIZE, help="[arch] crops per step, summed over processes")
    g.add_argument("--group-size", type=SIZE,
                   help="[arch] lanes that share HGGT's once-per-GPU-batch draws (scale, mode, crop position)")
    g.add_argument("--pool-size", type=COUNT, help="[arch] pairs in the training-pair pool, summed over processes; 0: no pool")
    g.add_argument("--lr", type=RATE, default=1e-4, help="learning rate of G and D (HGGT; psnr: 2e-4)")
    g.add_argument("--milestones", type=COUNT, nargs="*", help="[arch] steps after which the learning rate halves")
    g.add_argument("--ema-decay", type=SHARE, default=0.999, help="of the generator's weights, every step")
    g.add_argument("--drop-path", type=SHARE, help="[arch] stochastic depth of SwinIR; 0: off")
    g.add_argument("--pad-mode", choices=["hggt", "swinir"], default="hggt", help="SwinIR only: hggt always adds a window")
    g.add_argument("--accumulate", type=SIZE, default=1, help="micro-batches per step and process (CHOICE: 1)")
    g.add_argument("--clip-grad", type=WEIGHT, default=0.0, help="largest gradient norm of G and of D; 0: none (HGGT)")
    g.add_argument("--seed", type=COUNT, default=0, help="of every random draw (HGGT)")
    g = p.add_argument_group("speed")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    g.add_argument("--threads", type=COUNT, default=0, help="CPU threads per process; 0: PyTorch's choice")
    g.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="bf16 keeps losses, reward and weights in fp32")
    g.add_argument("--channels-last", action=onoff, default=True, help="memory format of the convolutional networks, so not of SwinIR; on a CPU 1.1 to 1.6 times faster (tests/tricks.py), unmeasured on CUDA")
    g.add_argument("--musiq", choices=list(FUSED), default="fused",
                   help="how MUSIQ scores crops: fused is musiq.py, equal to pyiqa's in 1e-5 and faster; fused-bf16 is close only; pyiqa its own code")
    g.add_argument("--fused-adam", action=onoff, default=False, help="PyTorch's fused Adam: the same update, rounded otherwise (CHOICE: off, so that runs stay bitwise what they were)")
    g.add_argument("--compile", action=onoff, default=False, help="torch.compile generator and discriminator")
    g = p.add_argument_group("output")
    g.add_argument("--log-every", type=SIZE, default=100, help="steps between progress lines")
    g.add_argument("--save-every", type=COUNT, default=5_000, help="steps between checkpoints (ckpt/last.pt); 0: only at the end")
    g.add_argument("--weights-every", type=COUNT, default=50_000, help="steps between weight files (HGGT); 0: only at the end")
    g.add_argument("--val-every", type=COUNT, default=50_000, help="steps between validations (HGGT); 0: only at the end")
    g.add_argument("--sample-every", type=COUNT, default=5_000, help="steps between sample grids; 0: none")
    g.add_argument("--tile", type=TILE, default=256, help="LR tile of the validation in pixels, more than 128; 0: whole image")
    g.add_argument("--tensorboard", action=onoff, default=False, help="also write TensorBoard events")


def check_training(p, args):
    """What argparse cannot see: combinations of add_training's flags that cannot work. Fills args.tau."""
    if args.atlas and (args.sampler != "amo" or args.load_size):
        p.error("--atlas is for --sampler amo on whole images: " + ("give --sampler amo" if args.sampler != "amo" else f"give --load-size 0 (it is {args.load_size}{', the default of --demo' if args.demo else ''})"))
    if args.margin and not args.atlas:
        p.error("--margin is for amo with --atlas")
    if args.tau is None and not args.atlas:
        args.tau = 10.0
    if args.reward == ["none"] and args.sampler in ("sma", "smp", "amo") and not args.atlas:
        p.error(f"--sampler {args.sampler} chooses by score: it needs a --reward")
    if args.drop_path and not args.arch.startswith("swinir"):
        p.error("--drop-path is SwinIR's: use 0 for convolutional nets")
    if args.crop % 8 or args.load_size % 4 or 0 < args.load_size < args.crop:
        p.error(f"--crop {args.crop} must be a multiple of 8, --load-size {args.load_size} one of 4 and 0 or at least the crop")
    if args.degradation == "realesrgan" and max(args.crop, args.load_size) < 80:
        p.error("--degradation realesrgan shrinks to 15 % before it blurs: --load-size or --crop must be at least 80")
