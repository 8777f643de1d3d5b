"""Adapt a x4 network to real low-resolution images that have no ground truth: HR-aware self-supervision, and LWay, which it extends.

    python -m selfsup --demo                                                   all stages in small, on a CPU, after train.py --demo --stage psnr
    torchrun --nproc_per_node 4 -m selfsup pretrain --hr DIV2K/train_HR        a network that degrades, from sharp photos alone
    python -m selfsup finetune --rec runs/rec-hra --sr runs/swinir-amo --lr-dir PHOTOS          adapt a network to PHOTOS
    python -m selfsup eval --weights runs/swinir-amo runs/swinir-amo+PHOTOS --lr-dir PHOTOS --gt-dir HR
    python -m selfsup probe fig7 --rec runs/rec-hra runs/rec-hra-plain --hr PHOTOS             the paper's Fig. 7, 8 and 9 (selfsup_probe.py)
    python -m selfsup domain --hr PHOTOS --out datasets/domain                 a stand-in for a camera: one fixed degradation, ground truth kept

Pre-training learns from pairs: an encoder tells how a low-resolution image X was degraded, and a reconstructor makes X again from the high-resolution one and
that embedding. Fine-tuning freezes both and trains the network M so that M(X), degraded again, gives X. Two things keep M from degrading its output
itself: the controller s (Eq. 8) and the feature-alignment regulariser FAR (Eq. 9-11). See reconstruction.py for both, and for what is published and what is not.

    LWay                       --arch lway                                    Table 2, row 1    --s-rule one --no-far
    Table 2, row 2             --s-rule eq8 --no-far                          row 3             --s-rule one --far
    row 4, the method          (default)                                      Table 4, row 1    finetune --s-rule flip
    Table 3                    --far-enc sr | vgg | clip                      Fig. 9            finetune --total-steps 600 --val-every 50
The switches are given to pretrain; finetune follows its --rec. Fine-tuning on the images that are then evaluated is what the paper does; --hold-out N keeps N back.
"""
import argparse
import sys
from pathlib import Path

import runs


ONOFF = argparse.BooleanOptionalAction
DEMO_SET = Path("datasets/demo-domain")
DEMO = {  # CHOICE: what ends within three minutes on two cores
    "domain": dict(hr=Path("datasets/demo/Test/GT/demo/untouched"), out=DEMO_SET),
    "pretrain": dict(hr=Path("datasets/demo"), out=Path("runs/rec-demo"), patch=16, load_size=96, degradation="blur", batch_size=4, group_size=2, val_photos=1, width=8, blocks=[2, 2, 2],
                     dim=64, deg_enc="bands", distance="proxy", far_enc="rand", total_steps=1000, lr=2e-3, ema_decay=0.97, log_every=250, save_every=250, val_every=500, workers=0, threads=1),
    "finetune": dict(rec=Path("runs/rec-demo"), sr=Path("runs/compact-small-psnr"), out=Path("runs/selfsup-demo"), lr_dir=DEMO_SET / "lq", gt_dir=DEMO_SET / "gt", patch=16,
                     batch_size=4, lr=5e-5, total_steps=60, ema_decay=0.9, log_every=20, save_every=30, val_every=30, watch=["piqe"], workers=0, threads=1),
    "eval": dict(weights=[Path("runs/compact-small-psnr"), Path("runs/selfsup-demo")], lr_dir=DEMO_SET / "lq", gt_dir=DEMO_SET / "gt"),
    "probe": dict(figure="fig8", rec=[Path("runs/rec-demo")], hr=Path("datasets/demo/Test/GT/demo/untouched"), out=Path("runs/selfsup-demo-fig8"), crops=8),
}

def parse_args(argv=None):
    words = sys.argv[1:] if argv is None else argv
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=runs.Help)
    p.add_argument("--demo", action="store_true", dest="all", help="domain, pretrain, finetune, eval and probe, each in small")
    commands = p.add_subparsers(dest="command", metavar="STAGE")
    stages = {name: commands.add_parser(name, help=text, description=text, allow_abbrev=False, formatter_class=runs.Help) for name, text in (
        ("pretrain", "train encoders and reconstructor on sharp photos"), ("finetune", "adapt a x4 network to a folder of low-resolution images"),
        ("eval", "evaluate.py with the paper's metrics and protocol; takes its flags too"), ("probe", "the paper's Fig. 7, 8 and 9 as plots"),
        ("domain", "degrade photos by one fixed degradation, and keep them as ground truth"))}
    for name, c in stages.items():
        c.add_argument("--demo", action="store_true", help="on the demo set, small and short; same code")
    for name in ("pretrain", "finetune"):
        add_training(stages[name], name)

    c = stages["eval"]
    c.add_argument("--weights", type=Path, nargs="+", default=[], metavar="PATH", help="networks before and after; differences are to the first (--baselines bicubic adds a row above it)")
    c.add_argument("--lr-dir", type=Path, metavar="DIR", help="low-resolution images")
    c.add_argument("--gt-dir", type=Path, metavar="DIR", help="their ground truth, if there is any")
    c.add_argument("--metrics", nargs="+", help="default psnr ssim lpips nrqm (PAPER), without --gt-dir nrqm")
    c = stages["probe"]
    c.add_argument("figure", nargs="?", choices=["fig7", "fig8", "fig9"], help="fig7: does a blurrier Y reconstruct better; fig8: does FAR tell clean from degraded; fig9: curves of fine-tuning runs")
    c.add_argument("--rec", type=Path, nargs="+", default=[], metavar="PATH", help="fig7, fig8: reconstruction networks, run folders or rec.pth")
    c.add_argument("--runs", type=Path, nargs="+", default=[], metavar="DIR", help="fig9: runs of finetune")
    c.add_argument("--hr", type=Path, metavar="DIR", help="fig7, fig8: photos that pre-training did not see")
    c.add_argument("--sr", type=Path, nargs="*", default=[], metavar="PATH", help="fig8: networks whose output is probed as well, before and after tuning")
    c.add_argument("--lr-dir", type=Path, metavar="DIR", help="fig8: what --sr enlarges")
    c.add_argument("--crops", type=runs.SIZE, default=128, help="fig7, fig8: crops of the photos (CHOICE)")
    c.add_argument("--out", type=Path, default=Path("runs/probe"), metavar="STEM", help="leaves STEM.png and STEM.json")
    add_files(c)
    add_machine(c)
    c = stages["domain"]
    c.add_argument("--hr", type=Path, metavar="DIR", help="photos")
    c.add_argument("--out", type=Path, default=Path("datasets/domain"), metavar="DIR", help="leaves DIR/lq, DIR/gt and DIR/domain.json")
    c.add_argument("--blur", type=runs.number(float, 0, above=True), nargs=2, default=[3.5, 1.4], metavar="SIGMA", help="of the Gaussian along and across, in HR pixels (CHOICE: wider than realesrgan's, within blur's)")
    c.add_argument("--angle", type=runs.number(float), default=30.0, help="of the blur in degrees")
    c.add_argument("--noise", type=runs.WEIGHT, default=6.0, help="grey levels (CHOICE)")
    c.add_argument("--jpeg", type=runs.number(float, 1, 100), default=27.0, help="quality (CHOICE: below pre-training's 30)")
    c.add_argument("--seed", type=runs.COUNT, default=0, help="of the noise")
    c.add_argument("--threads", type=runs.COUNT, default=0, help="CPU threads; 0: PyTorch's choice")

    command = next((word for word in words if word in stages), None)
    if command and "--demo" in words:
        stages[command].set_defaults(**DEMO[command])
    if command == "pretrain":
        lway = any(a == "lway" for flag, a in zip(words, words[1:]) if flag == "--arch") or "--arch=lway" in words
        stages[command].set_defaults(**({"s_rule": "one", "far": False} if lway else {}))
    args, rest = p.parse_known_args(argv)
    if rest and args.command != "eval":
        (stages.get(args.command) or p).error(f"unrecognized arguments: {' '.join(rest)}")
    if bool(args.command) == args.all:
        p.error("which stage? pretrain, finetune, eval, probe, domain, or --demo" if not args.all else f"--demo before {args.command} is all stages: write {args.command} --demo")
    args.rest = rest
    if args.command:
        complete(stages[args.command], args)
    return args


def add_networks(c):
    """What the controller, FAR and L_rec look through."""
    g = c.add_argument_group("distance and encoder, which come with weights of their own")
    g.add_argument("--distance", choices=["lpips", "vgg", "proxy"], default="lpips",
                   help="perceptual part of L_rec, and the controller's distance: lpips (LWAY; VGG there, AlexNet here: CHOICE), vgg: cosine of VGG19's features, proxy: no weights")
    g.add_argument("--vgg-stages", type=runs.number(int, 1, 5), default=5, help="of --distance vgg; 2 takes a quarter of the time")
    g.add_argument("--far-enc", choices=["clip", "vgg", "sr", "rand"], default="clip", help="established encoder of FAR (Table 3): CLIP RN50 (PAPER), VGG19, a x4 network, random")
    g.add_argument("--far-layer", choices=["stem", "layer1", "layer2", "layer3"], default="layer1", help="of CLIP (CHOICE: the paper does not say)")


def add_files(c):
    g = c.add_argument_group("weights of distance and encoder")
    g.add_argument("--vgg-weights", type=Path, metavar="FILE", help="torchvision vgg19 or features-only file instead of a download")
    g.add_argument("--clip-weights", type=Path, metavar="FILE", help="OpenAI's RN50.pt, or its state dict, instead of a download")
    g.add_argument("--far-sr", type=Path, metavar="PATH", help="the x4 network of --far-enc sr")


def add_machine(c, training=False):
    g = c.add_argument_group("machine")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    g.add_argument("--threads", type=runs.COUNT, default=0, help="CPU threads per process; 0: PyTorch's choice")
    if training:
        g.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="bf16 keeps losses, Gram matrices and weights in fp32")


def add_training(c, stage):
    first = stage == "pretrain"
    g = c.add_argument_group("data")
    if first:
        g.add_argument("--hr", type=Path, default=Path("datasets/DIV2K_train_HR"), metavar="DIR", help="sharp photos (PAPER: DIV2K's training images)")
        g.add_argument("--val-photos", type=runs.SIZE, default=8, help="photos held out for the checks (CHOICE)")
        g.add_argument("--degradation", choices=["one-round", "two-round", "realesrgan", "blur"], default="realesrgan", help="preset of degradations.py (PAPER: second order)")
        g.add_argument("--load-size", type=runs.SIZE, default=400, help="window of the photo that is degraded, in HR pixels (Real-ESRGAN)")
        g.add_argument("--group-size", type=runs.SIZE, default=4, help="samples that share a group's draws, see degradations.py (CHOICE)")
    else:
        g.add_argument("--rec", type=Path, default=Path("runs/rec-hra"), metavar="PATH", help="run folder of pretrain, or its rec.pth")
        g.add_argument("--sr", type=Path, metavar="PATH", help="x4 network to adapt: any weight file or run folder that upscale.py takes")
        g.add_argument("--lr-dir", type=Path, metavar="DIR", help="low-resolution images of one source")
        g.add_argument("--gt-dir", type=Path, metavar="DIR", help="their ground truth: only watched, unless --stop val-gt")
        g.add_argument("--hold-out", type=runs.COUNT, default=0, help="images that are not adapted to (PAPER: 0)")
        g.add_argument("--per-image", action="store_true", help="adapt to each image alone, always from --sr (LWAY: 100-300 steps); leaves OUT/<image> and OUT/sr")
        g.add_argument("--weights-key", choices=["params_ema", "params"], help="key to take of --sr; default params_ema, else params, else bare")
        g.add_argument("--pad-mode", choices=["hggt", "swinir"], help="SwinIR only, see upscale.py")
    g.add_argument("--patch", type=runs.number(int, 16), default=64, help="side of the LR patches in pixels (PAPER: 64)")
    g.add_argument("--workers", type=runs.COUNT, default=4, help="data processes per GPU")
    if first:
        g = c.add_argument_group("networks")
        g.add_argument("--arch", choices=["hra", "lway"], default="hra", help="lway: no image encoder, and by default no controller and no FAR")
        g.add_argument("--deg-enc", choices=["conv", "bands"], default="conv", help="degradation encoder: convolutions (PAPER), or strengths of frequency bands, for short runs (CHOICE)")
        g.add_argument("--width", type=runs.SIZE, default=64, help="channels (PAPER, of the image encoder)")
        g.add_argument("--blocks", type=runs.SIZE, nargs=3, default=[16, 6, 4], metavar="N", help="of degradation encoder, image encoder (PAPER: 16, 6) and reconstructor (CHOICE)")
        g.add_argument("--dim", type=runs.SIZE, default=512, help="length of the embedding (PAPER; LWAY: 2048 may help)")
        add_networks(c)
    add_files(c)
    g = c.add_argument_group("losses (Eq. 5-11)")
    g.add_argument("--s-rule", choices=["eq8", "one"] if first else ["eq8", "flip", "one", "shifted"], default="eq8" if first else None,
                   help="controller; one: none" + ("" if first else "; flip: Table 4, row 1; shifted: ours, see reconstruction.py; default as in pre-training"))
    g.add_argument("--far", action=ONOFF, default=True if first else None, help="feature-alignment regulariser" + ("" if first else "; default as in pre-training"))
    if first:
        g.add_argument("--offdiag", action=ONOFF, default=False, help="FAR without each channel's correlation with itself (the text; the formula has it)")
        g.add_argument("--lambda-pt", default="auto", type=auto, help="weight of FAR; auto: as large as L_rec over the first 100 steps (CHOICE, not published)")
    else:
        g.add_argument("--lambda-ft", default="auto", type=auto, help="weight of FAR; auto: its gradient on M(X) is --far-rho times that of L_rec, over 10 batches (CHOICE, not published)")
        g.add_argument("--far-rho", type=runs.RATE, default=0.5, help="see --lambda-ft (CHOICE)")
        g.add_argument("--far-path", choices=["both", "im", "cl"], default="both", help="where FAR's gradient goes: both encoders (INFERRED), or one")
        g.add_argument("--hf", action=ONOFF, default=True, help="weight L_rec by the LR image's high frequencies (LWAY)")
    g.add_argument("--percep", type=runs.WEIGHT, default=1.0, help="weight of the perceptual part of L_rec (CHOICE, not published)")
    g.add_argument("--n-std", type=runs.WEIGHT, default=1.0 if first else None, help="of the controller's noise n (PAPER: 1" + (")" if first else "); default as in pre-training"))
    g = c.add_argument_group("optimisation")
    g.add_argument("--total-steps", type=runs.SIZE, default=500_000 if first else 300, help="PAPER: 500,000" if first else "PAPER: 300 to 600")
    g.add_argument("--batch-size", type=runs.SIZE, default=16 if first else 8, help="patches per step, summed over processes (CHOICE, not published)")
    if first:
        g.add_argument("--lr", type=runs.RATE, default=2e-4, help="falls to 0 as a cosine (PAPER)")
        g.add_argument("--encoder-from", type=runs.COUNT, default=0, metavar="STEP", help="the degradation encoder stays as initialised until then (CHOICE: 0; experiments/selfsup_choices.py)")
    else:
        g.add_argument("--lr", type=runs.RATE, help="default 2e-6 for SwinIR, 5e-6 for convolutional networks (PAPER: from 2e-6 to 5e-6, by architecture)")
        g.add_argument("--clip-grad", type=runs.WEIGHT, default=1.0, help="largest gradient norm; 0: none (CHOICE)")
        g.add_argument("--stop", choices=["fixed", "far", "val-gt"], default="fixed",
                       help="fixed: after --total-steps; far: at FAR's minimum among the checks after the start; val-gt: at the smallest distance to the ground truth (PAPER: it looks at test images)")
        g.add_argument("--patience", type=runs.SIZE, default=100, help="steps without a new minimum that end it (CHOICE)")
    g.add_argument("--ema-decay", type=runs.SHARE, default=0.999, help="PAPER; " + ("" if first else "after 300 steps three quarters are still the start: ") + "the EMA weights are the result")
    g.add_argument("--seed", type=runs.COUNT, default=0, help="of every random draw")
    add_machine(c, training=True)
    g = c.add_argument_group("output")
    g.add_argument("--out", type=Path, help="run folder; default " + ("runs/rec-<arch>" if first else "<sr>+<name of lr-dir>, in runs/"))
    g.add_argument("--resume", nargs="?", const="must", default="no", choices=["must", "auto", "no"], help="continue --out from its checkpoint; auto: start if there is none")
    g.add_argument("--log-every", type=runs.SIZE, default=100 if first else 10, help="steps between progress lines")
    g.add_argument("--save-every", type=runs.COUNT, default=5_000 if first else 100, help="steps between checkpoints; 0: only at the end")
    g.add_argument("--val-every", type=runs.COUNT, default=10_000 if first else 50, help="steps between checks; 0: only at the end")
    if not first:
        g.add_argument("--watch", nargs="*", default=[], metavar="NAME", help="no-reference metrics of the whole outputs, reported with the checks")
        g.add_argument("--check-patches", type=runs.SIZE, default=16, help="fixed patches of the checks (CHOICE)")
        g.add_argument("--tile", type=runs.TILE, default=256, help="LR tile of whole images in pixels, more than 128; 0: whole")
    g.add_argument("--tensorboard", action=ONOFF, default=False, help="also write TensorBoard events")


def auto(text):
    """An argparse type: a weight, or auto."""
    return text if text == "auto" else runs.WEIGHT(text)


auto.__name__ = "number"


def complete(p, args):
    """What argparse cannot see: combinations that cannot work."""
    if args.command == "pretrain":
        if args.arch == "lway" and args.far:
            p.error("--arch lway --far: FAR aligns the image encoder, and LWay has none")
        if args.load_size < 4 * args.patch or args.load_size % 4:
            p.error(f"--load-size {args.load_size} must be a multiple of 4 and at least {4 * args.patch}, four times --patch")
        if args.degradation == "realesrgan" and args.load_size < 80:
            p.error("--degradation realesrgan shrinks to 15 % before it blurs: --load-size must be at least 80")
        if args.far and args.far_enc == "sr" and not args.far_sr:
            p.error("--far-enc sr: which network? --far-sr PATH")
        args.out = args.out or Path("runs") / f"rec-{args.arch}"
    if args.command == "finetune":
        for flag in ("sr", "lr_dir"):
            if getattr(args, flag) is None:
                p.error(f"--{flag.replace('_', '-')} is needed")
        if args.stop == "val-gt" and not args.gt_dir:
            p.error("--stop val-gt looks at the ground truth: --gt-dir DIR is needed")
        if args.stop != "fixed" and not args.val_every:
            p.error(f"--stop {args.stop} looks at the checks: --val-every must not be 0")
        if not args.gt_dir and (compared := [name for name in args.watch if name in runs.literal("metrics", "FULL_REFERENCE")]):
            p.error(f"--watch {compared[0]} compares with ground truth: --gt-dir DIR is needed")
        if args.per_image and args.hold_out:
            p.error("--hold-out: with --per-image nothing is shared between images")
        args.out = args.out or Path("runs") / f"{args.sr.name if args.sr.is_dir() else args.sr.stem}+{args.lr_dir.resolve().name}"
    if args.command == "probe":
        needed = {"fig7": ("rec", "hr"), "fig8": ("rec", "hr"), "fig9": ("runs",)}.get(args.figure)
        if needed is None:
            p.error("which figure? fig7, fig8 or fig9")
        for flag in needed:
            if not getattr(args, flag):
                p.error(f"{args.figure}: --{flag} is needed")
        if bool(args.sr) != bool(args.lr_dir):
            p.error("--sr and --lr-dir: give both")
    if args.command in ("domain", "eval"):
        for flag in ("hr",) if args.command == "domain" else ("weights", "lr_dir"):
            if not getattr(args, flag):
                p.error(f"--{flag.replace('_', '-')} is needed")


ARGS = parse_args() if __name__ == "__main__" else None                           # --help needs no torch: seconds

import math
import shutil
from functools import partial

import torch.nn.functional as F

import data
import degradations
from images import cut_to_x4, load_image, save_image


def evaluate(args):
    """evaluate.py with the paper's protocol: PSNR and SSIM on Y, whole images."""
    import evaluate as table
    words = ["--lq", args.lr_dir, *(["--gt", args.gt_dir] if args.gt_dir else []), "--weights", *args.weights, "--baselines", "--protocol", "whole-y"]
    metrics = args.metrics or (["ranker", "piqe"] + ["psnr", "ssim"] * bool(args.gt_dir) if args.demo else ["psnr", "ssim", "lpips", "nrqm"] if args.gt_dir else ["nrqm"])
    table.main(table.parse_args([str(word) for word in [*words, "--metrics", *metrics, *args.rest]]))


def domain(args):
    """Photos and what one fixed degradation makes of them: blur, x4 smaller, noise, JPEG. A hidden domain whose ground truth is known."""
    if args.demo and not Path("datasets/demo").exists():
        from prepare.demo_set import build_demo
        build_demo(Path("datasets/demo"))
    if args.out.exists():
        raise runs.UserError(f"--out {args.out}: exists; remove it to make it again")
    photos = data.find_photos(args.hr, "--hr")
    runs.check_writable(args.out, "--out")
    runs.start_world("cpu", args.threads)
    work = args.out.with_name(args.out.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)                                       # of a call that was killed
    kernel = degradations.gaussian_kernel(21, *args.blur, math.radians(args.angle))
    for stem in photos.stems:
        gt = cut_to_x4(load_image(photos.path(stem)))[None].float() / 255
        small = F.interpolate(degradations.blur(gt, kernel), scale_factor=0.25, mode="area")
        field = degradations.normal_field(small.shape, runs.sample_seed(args.seed, 0, 0, f"domain {stem}"))
        lq = degradations.to_8bit(degradations.jpeg(degradations.add_gaussian_noise(small, args.noise, field), args.jpeg, "libjpeg"))
        for name, image in (("lq", lq), ("gt", gt)):
            save_image(work / name / f"{stem}.png", image[0])
    runs.save_json(work / "domain.json", {"images": len(photos.stems), **{k: getattr(args, k) for k in ("blur", "angle", "noise", "jpeg", "seed")}, **runs.describe_machine()})
    work.rename(args.out)
    print(f"{args.out}: {len(photos.stems)} images")


def main(args):
    if args.all:
        if not (start := parse_args(["finetune", "--demo"]).sr).exists():
            raise runs.UserError(f"{start}: not there; the demo adapts what this leaves: python train.py --demo --stage psnr")
        for command in (["domain"] if not DEMO_SET.exists() else []) + ["pretrain", "finetune", "eval", "probe"]:
            print(f"\n# selfsup.py {command} --demo", flush=True)
            main(parse_args([command, "--demo", *(["--resume", "auto"] if command in ("pretrain", "finetune") else [])]))
    elif args.command == "pretrain":
        from selfsup import pretrain as selfsup_pretrain
        selfsup_pretrain.pretrain(args)
    elif args.command == "finetune":
        from selfsup import finetune as selfsup_finetune
        selfsup_finetune.finetune(args)
    elif args.command == "probe":
        from selfsup import probe as selfsup_probe
        selfsup_probe.main(args)
    else:
        {"eval": evaluate, "domain": domain}[args.command](args)


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
