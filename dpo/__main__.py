"""Tune a stochastic x4 super-resolution generator on preferences between its own outputs: DP2O-SR (Wu et al., NeurIPS 2025), first open training code.

    python -m dpo --demo                                                       all stages in small, on a CPU, no download
    torchrun --nproc_per_node 4 -m dpo pretrain --hr DF2K/HR                   a generator, FlowSR; leaves runs/flow-base
    torchrun --nproc_per_node 4 -m dpo sample --hr DF2K/HR --out POOL          --samples outputs, each from its own seed, for every low-resolution image
    torchrun --nproc_per_node 4 -m dpo score --pool POOL                       every output by full- and no-reference metrics
    python -m dpo curate --pool POOL                                           hybrid reward; the best N seeds of an image win over its worst N
    torchrun --nproc_per_node 4 -m dpo train --pairs POOL                      DPO on the weighted pairs; leaves runs/flow-base+dpo
    python -m dpo eval --gen runs/flow-base runs/flow-base+dpo --norm-file POOL/norm.json --lq-dir LR --gt-dir HR

Every stage leaves plain files and continues where it was stopped. The generator is flow.py's FlowSR, trained here, or a Stable Diffusion 2 or FLUX model with a ControlNet from a local
folder (--backend diffusers). The method is in preference.py, a page of equations; PAPER, DPO, RELEASED (the authors' inference code), INFERRED and CHOICE say where a default is from.

    rows of the paper's ablations     best against worst: curate --top 1     no weights: train --hpo none     M: curate --samples 8 --top 2     reward: curate --reward fr | nr
"""
import argparse
import sys
from pathlib import Path

import runs


ONOFF = argparse.BooleanOptionalAction
FR, NR = ["lpips", "topiq_fr", "afine_fr"], ["maniqa", "musiq", "clipiqa+", "topiq_nr", "afine_nr", "qalign"]
PHOTOS, TEST = Path("datasets/demo"), Path("datasets/demo/Test/GT/demo/untouched")
DEMO = {  # CHOICE: what ends within four minutes on two cores
    "pretrain": dict(hr=PHOTOS, out=Path("runs/flow-demo"), size="tiny", patch=16, load_size=96, degradation="two-round", batch_size=8, group_size=4, val_photos=1, total_steps=500, warmup=50,
                     lr=1e-3, ema_decay=0.98, steps=4, log_every=100, save_every=250, val_every=250, workers=0, threads=1),
    "sample": dict(gen=Path("runs/flow-demo"), hr=PHOTOS, out=Path("runs/dpo-demo-pool"), groups=24, patch=16, load_size=96, degradation="two-round", samples=8, batch_size=8, threads=1),
    "score": dict(pool=Path("runs/dpo-demo-pool"), fr=["ssim", "gmsd"], nr=["ranker"], threads=1),
    "curate": dict(pool=Path("runs/dpo-demo-pool"), top=2),
    "train": dict(gen=Path("runs/flow-demo"), pairs=Path("runs/dpo-demo-pool"), out=Path("runs/dpo-demo"), patch=0, batch_size=8, total_steps=100, beta=1000.0, lr=5e-5, val_groups=4, log_every=25,
                  save_every=50, val_every=50, workers=0, threads=1),
    "eval": dict(gen=[Path("runs/flow-demo"), Path("runs/dpo-demo")], norm_file=Path("runs/dpo-demo-pool/norm.json"), hr=TEST, groups=8, patch=16, load_size=96, degradation="two-round",
                 samples=8, watch=["piqe", "psnr"], diversity="proxy", out=Path("runs/dpo-demo-eval"), threads=1),
}


def parse_args(argv=None):
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=runs.Help)
    p.add_argument("--demo", action="store_true", dest="all", help="all stages, each in small")
    commands = p.add_subparsers(dest="command", metavar="STAGE")
    stages = {name: commands.add_parser(name, help=text, description=text, allow_abbrev=False, formatter_class=runs.Help) for name, text in (
        ("pretrain", "train FlowSR on photographs"), ("sample", "many outputs for every low-resolution image"), ("score", "judge every output"),
        ("curate", "from scores to preference pairs"), ("train", "DPO on the pairs"), ("eval", "generators side by side on the same seeds"))}
    for name, c in stages.items():
        c.add_argument("--demo", action="store_true", help="on the demo set, small and short; same code")
        {"pretrain": add_pretrain, "sample": add_sample, "score": add_score, "curate": add_curate, "train": add_train, "eval": add_eval}[name](c)
    command = next((word for word in words if word in stages), None)
    if command and "--demo" in words:
        stages[command].set_defaults(**DEMO[command])
    args = p.parse_args(words)
    if bool(args.command) == args.all:
        p.error("which stage? pretrain, sample, score, curate, train, eval, or --demo" if not args.all else f"--demo before {args.command} is all stages: write {args.command} --demo")
    if args.command:
        complete(stages[args.command], args)
    return args


def add_machine(c, training=False):
    g = c.add_argument_group("machine")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    g.add_argument("--threads", type=runs.COUNT, default=0, help="CPU threads per process; 0: PyTorch's choice")
    if training:
        g.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="of the network; errors, DPO's logarithms and weights stay in fp32")


def add_generator(c, many=False):
    g = c.add_argument_group("generator")
    if many:
        g.add_argument("--gen", type=Path, nargs="+", default=[Path("runs/flow-base"), Path("runs/flow-base+dpo")], metavar="PATH", help="run folders; differences are to the first. With --backend diffusers ControlNets")
    else:
        g.add_argument("--gen", type=Path, default=Path("runs/flow-base"), metavar="PATH", help="run folder of pretrain or train, or its gen.pth. With --backend diffusers a ControlNet")
    g.add_argument("--backend", choices=["flow", "diffusers"], default="flow", help="flow: FlowSR; diffusers: Stable Diffusion 2 or FLUX of --model")
    g.add_argument("--model", type=Path, metavar="DIR", help="diffusers: local folder of the text-to-image model (PAPER: SD2 and FLUX)")
    g.add_argument("--prompts", type=Path, metavar="DIR", help="diffusers: <name>.txt for every image; default: the empty prompt (RELEASED: tags by RAM)")
    g.add_argument("--guidance", type=runs.WEIGHT, help="diffusers: of sampling; default: SD2 3.5, FLUX 2.5 (RELEASED); 1: none")
    g.add_argument("--steps", type=runs.SIZE, help="steps of sampling; default: the generator's own (RELEASED: SD2 50, FLUX 25). train keeps them in what it leaves")
    g.add_argument("--tau", type=runs.RATE, help="scale of the initial noise, FlowSR only; default: the generator's own, 1 (CHOICE)")
    return g


def add_crops(g):
    """How images are drawn from photographs."""
    g.add_argument("--degradation", choices=["one-round", "two-round", "realesrgan", "blur"], default="realesrgan", help="preset of degradations.py (PAPER: synthetic pairs; CHOICE of the preset)")
    g.add_argument("--load-size", type=runs.SIZE, default=400, help="window of the photo that is degraded, in HR pixels (Real-ESRGAN)")


def add_loop(c, batch, lr, steps, warmup, clip, log, save, val):
    """Flags of both trainings."""
    g = c.add_argument_group("optimisation")
    g.add_argument("--total-steps", type=runs.SIZE, default=steps[0], help=steps[1])
    g.add_argument("--batch-size", type=runs.SIZE, default=batch[0], help=batch[1] + ", summed over processes")
    g.add_argument("--lr", type=runs.RATE, default=lr[0], help=f"AdamW; constant after the warm-up ({lr[1]})")
    g.add_argument("--warmup", type=runs.COUNT, default=warmup[0], help=f"steps of linear warm-up ({warmup[1]})")
    g.add_argument("--clip-grad", type=runs.WEIGHT, default=clip, help="largest gradient norm; 0: none (CHOICE)")
    g.add_argument("--seed", type=runs.COUNT, default=0, help="of every random draw")
    g = c.add_argument_group("output")
    g.add_argument("--out", type=Path, help="run folder; default: see above")
    g.add_argument("--resume", nargs="?", const="must", default="no", choices=["must", "auto", "no"], help="continue --out from its checkpoint; auto: start if there is none")
    g.add_argument("--log-every", type=runs.SIZE, default=log, help="steps between progress lines")
    g.add_argument("--save-every", type=runs.COUNT, default=save, help="steps between checkpoints; 0: only at the end")
    g.add_argument("--val-every", type=runs.COUNT, default=val, help="steps between checks on what is held out; 0: only at the end")
    g.add_argument("--workers", type=runs.COUNT, default=4, help="data processes per GPU")
    g.add_argument("--tensorboard", action=ONOFF, default=False, help="also write TensorBoard events")


def add_metric_files(g):
    g.add_argument("--metric-weights", nargs="*", default=[], metavar="NAME=FILE", help="local weights of metrics, instead of a download")


def add_pretrain(c):
    g = c.add_argument_group("data")
    g.add_argument("--hr", type=Path, default=Path("datasets/DF2K/HR"), metavar="DIR", help="photographs")
    g.add_argument("--val-photos", type=runs.SIZE, default=8, help="photographs held out for the checks (CHOICE)")
    g.add_argument("--patch", type=runs.number(int, 8), default=64, help="side of the LR patches in pixels (CHOICE)")
    g.add_argument("--group-size", type=runs.SIZE, default=8, help="samples that share a group's draws, see degradations.py (CHOICE)")
    add_crops(g)
    g = c.add_argument_group("generator (all CHOICE: the paper tunes Stable Diffusion 2 and FLUX)")
    g.add_argument("--size", choices=["tiny", "small", "base", "large"], default="base", help="1.4, 5.9, 10.1, 21.8 million weights")
    g.add_argument("--prediction", choices=["flow", "epsilon", "v"], default="flow", help="rectified flow, or a diffusion model of the noise or of v")
    g.add_argument("--base", type=Path, metavar="PATH", help="frozen x4 network to which the generated residual is added, any that upscale.py takes; default: bicubic enlargement")
    g.add_argument("--times", choices=["logit-normal", "uniform"], default="logit-normal", help="distribution of t (SD3)")
    g.add_argument("--steps", type=runs.SIZE, default=8, help="steps of sampling")
    g.add_argument("--tau", type=runs.RATE, default=1.0, help="scale of the initial noise")
    g.add_argument("--ema-decay", type=runs.SHARE, default=0.999, help="the EMA weights are the result")
    add_loop(c, (64, "pairs per step (CHOICE)"), (2e-4, "CHOICE"), (40_000, "CHOICE"), (500, "CHOICE"), 1.0, 100, 2_000, 5_000)
    add_machine(c, training=True)


def add_sample(c):
    add_generator(c)
    g = c.add_argument_group("images: photographs to draw crops from, or low-resolution images")
    g.add_argument("--hr", type=Path, metavar="DIR", help="photographs; each crop is degraded, and kept as ground truth")
    g.add_argument("--groups", type=runs.SIZE, default=1000, help="crops of --hr (PAPER: some 30,000)")
    g.add_argument("--patch", type=runs.number(int, 8), default=64, help="LR side of the crops in pixels (PAPER: 128, 512 for the output; CHOICE)")
    add_crops(g)
    g.add_argument("--lq-dir", type=Path, metavar="DIR", help="low-resolution images, instead of --hr")
    g.add_argument("--gt-dir", type=Path, metavar="DIR", help="their ground truth, which full-reference metrics need")
    g = c.add_argument_group("candidates")
    g.add_argument("--samples", type=runs.SIZE, default=32, help="M, outputs per image (PAPER: 32 for SD2, 64 for FLUX)")
    g.add_argument("--batch-size", type=runs.SIZE, default=16, help="outputs at a time; they do not depend on it")
    g.add_argument("--seed", type=runs.COUNT, default=0, help="of the crops and their degradation; candidates have seeds 0 to M - 1")
    g.add_argument("--out", type=Path, default=Path("runs/dpo-pool"), metavar="DIR", help="the pool; an unfinished one is continued")
    add_machine(c)


def add_score(c):
    g = c.add_argument_group("reward")
    g.add_argument("--pool", type=Path, default=Path("runs/dpo-pool"), metavar="DIR", help="what sample left")
    g.add_argument("--fr", nargs="*", default=FR, metavar="NAME", help="full-reference metrics, by pyiqa's names, or psnr, ssim (both on Y), vgg (PAPER: three)")
    g.add_argument("--nr", nargs="*", default=NR, metavar="NAME", help="no-reference metrics: pyiqa's names, ranker, module:function (PAPER: six; qalign is a model of 7 billion weights)")
    add_metric_files(g)
    add_machine(c)


def add_curate(c):
    g = c.add_argument_group("reward")
    g.add_argument("--pool", type=Path, default=Path("runs/dpo-pool"), metavar="DIR", help="what score left")
    g.add_argument("--reward", choices=["hybrid", "fr", "nr"], default="hybrid", help="half full-, half no-reference (PAPER), or one of them")
    g.add_argument("--norm", choices=["pool", "group"], default="pool", help="where a metric's extremes are taken: all candidates (INFERRED), or those of each image")
    g.add_argument("--norm-percent", type=runs.number(float, 0, 25), default=0.0, help="percentile instead of the extremes (CHOICE: 0)")
    g.add_argument("--norm-file", type=Path, metavar="FILE", help="use this norm.json instead of fitting one")
    g = c.add_argument_group("pairs")
    g.add_argument("--top", type=runs.SIZE, default=8, help="N: best and worst candidates of an image; all N x N pairs (PAPER: M / 4 for SD2, M / 16 for FLUX)")
    g.add_argument("--samples", type=runs.COUNT, default=0, help="use the first so many seeds; 0: all")
    g.add_argument("--min-sigma", type=runs.WEIGHT, default=0.0, help="drop images whose rewards have a smaller standard deviation (CHOICE: 0)")
    g.add_argument("--out", type=Path, metavar="DIR", help="leaves norm.json, pairs.jsonl and curation.json; default: the pool")


def add_train(c):
    add_generator(c).add_argument("--gradient-checkpointing", action=ONOFF, default=False, help="diffusers: less memory, more time")
    g = c.add_argument_group("pairs")
    g.add_argument("--pairs", type=Path, default=Path("runs/dpo-pool"), metavar="DIR", help="what curate left")
    g.add_argument("--patch", type=runs.COUNT, default=0, help="side of the LR patches in pixels; 0: whole images (CHOICE)")
    g.add_argument("--val-groups", type=runs.COUNT, default=16, help="images that are only watched, whole photographs at a time; 0: none, and no metric is loaded (CHOICE)")
    add_metric_files(g)
    g = c.add_argument_group("loss")
    g.add_argument("--beta", type=runs.RATE, default=5000.0, help="strength of the tie to the reference (PAPER)")
    g.add_argument("--beta-t", choices=["const", "sq"], default="const", help="sq: times (1 - t)^2, as the derivation for flows has it; const as Flow-DPO found better (CHOICE)")
    g.add_argument("--noise", choices=["fresh", "tracked"], default="fresh", help="eps of the loss: drawn (DPO), or what the candidate was made from (CHOICE); tracked needs whole images")
    g.add_argument("--hpo", choices=["none", "intra", "inter", "both"], default="both", help="weights of pairs (PAPER: both)")
    g.add_argument("--hpo-gain", type=runs.WEIGHT, default=1.0, help="how far weights are from 1, times this (PAPER: 1)")
    g.add_argument("--anchor", type=runs.WEIGHT, default=0.0, help="weight of the winners' plain training loss (CHOICE: 0)")
    g.add_argument("--max-displacement", type=runs.WEIGHT, default=0.02, help="stop when the error at the winners has grown by this share of the reference's: both become less likely; 0: never (CHOICE)")
    g.add_argument("--keep", choices=["last", "best"], default="last", help="weights of the last step (PAPER), or of the check with the best held-out reward")
    g.add_argument("--accumulate", type=runs.SIZE, default=1, help="micro-batches per step and process (CHOICE: 1)")
    g.add_argument("--weight-decay", type=runs.WEIGHT, default=0.0, help="of AdamW (CHOICE: the paper does not say)")
    add_loop(c, (1024, "pairs per step (PAPER)"), (2e-5, "PAPER"), (1000, "PAPER: 1000, of which 500 are enough"), (0, "CHOICE; Diffusion-DPO: 500"), 1.0, 10, 100, 100)
    add_machine(c, training=True)


def add_eval(c):
    add_generator(c, many=True)
    g = c.add_argument_group("images")
    g.add_argument("--lq-dir", type=Path, metavar="DIR", help="low-resolution images that no stage has seen")
    g.add_argument("--gt-dir", type=Path, metavar="DIR", help="their ground truth")
    g.add_argument("--hr", type=Path, metavar="DIR", help="or photographs: crops as in sample, kept in OUT/images")
    g.add_argument("--groups", type=runs.SIZE, default=100, help="crops of --hr")
    g.add_argument("--patch", type=runs.number(int, 8), default=64, help="LR side of the crops in pixels")
    add_crops(g)
    g.add_argument("--seed", type=runs.COUNT, default=0, help="of the crops and their degradation")
    g = c.add_argument_group("reward and metrics")
    g.add_argument("--norm-file", type=Path, default=Path("runs/dpo-pool/norm.json"), metavar="FILE", help="scale and metrics of the reward, from curate: never fitted again")
    g.add_argument("--reward", choices=["hybrid", "fr", "nr"], default="hybrid", help="as in curate")
    g.add_argument("--watch", nargs="*", metavar="NAME", help="metrics outside the reward; default: psnr ssim nima (PAPER, among others), without ground truth nima")
    add_metric_files(g)
    g.add_argument("--unsharp", type=runs.RATE, nargs="*", default=[0.5, 1.0], metavar="AMOUNT", help="unsharp masks of the first generator's outputs, as a control (CHOICE)")
    g.add_argument("--less-noise", type=runs.RATE, nargs="*", metavar="SHARE", help="the first generator with its initial noise times this (above 1: more), as a control; default 0.9 0.7, with --backend diffusers none (CHOICE)")
    g.add_argument("--diversity", choices=["lpips", "vgg", "proxy", "none"], default="lpips", help="distance between seeds")
    g.add_argument("--vgg-weights", type=Path, metavar="FILE", help="VGG19 for --diversity vgg, instead of a download")
    g.add_argument("--samples", type=runs.SIZE, default=64, help="M, seeds per image (PAPER: 64)")
    g.add_argument("--batch-size", type=runs.SIZE, default=16, help="outputs at a time")
    g = c.add_argument_group("output")
    g.add_argument("--names", nargs="+", metavar="NAME", help="of the rows; default: the run folders'")
    g.add_argument("--shown", type=runs.COUNT, default=4, help="photographs on the contact sheet")
    g.add_argument("--shown-rows", nargs="+", metavar="NAME", help="rows of the table that the contact sheet shows; default: all generators")
    g.add_argument("--out", type=Path, default=Path("runs/dpo-eval"), metavar="DIR", help="outputs, scores, table and plots; an unfinished call is continued")
    add_machine(c)


def complete(p, args):
    """What argparse cannot see: combinations that cannot work, and defaults that follow from others."""
    for word in getattr(args, "metric_weights", []):
        if not all(word.partition("=")[::2]):
            p.error(f"--metric-weights {word}: write NAME=FILE")
    if args.command in ("sample", "eval"):
        if bool(args.hr) == bool(args.lq_dir):
            p.error("which images? --hr PHOTOS, or --lq-dir DIR" + (", not both" if args.hr else ""))
        if args.hr and args.gt_dir:
            p.error("--gt-dir goes with --lq-dir: the crops of --hr are their own ground truth")
    if args.command == "pretrain" or getattr(args, "hr", None):
        if args.load_size < 4 * args.patch or args.load_size % 4:
            p.error(f"--load-size {args.load_size} must be a multiple of 4 and at least {4 * args.patch}, four times --patch")
        if args.degradation == "realesrgan" and args.load_size < 80:
            p.error("--degradation realesrgan shrinks to 15 % before it blurs: --load-size must be at least 80")
    if getattr(args, "backend", None) == "diffusers":
        if args.model is None:
            p.error("--backend diffusers: --model DIR, the folder of the text-to-image model")
        if args.tau or getattr(args, "less_noise", None):
            p.error("--tau and --less-noise are FlowSR's")
    if args.command == "eval" and args.less_noise is None:
        args.less_noise = [0.9, 0.7] if args.backend == "flow" else []
    if args.command == "eval" and args.watch is None:
        args.watch = ["psnr", "ssim", "nima"] if args.hr or args.gt_dir else ["nima"]
    if args.command == "curate" and args.norm == "group" and (args.norm_file or args.norm_percent):
        p.error("--norm group takes each image's extremes: leave out --norm-file and --norm-percent")
    if args.command == "train":
        if args.noise == "tracked" and args.patch:
            p.error("--noise tracked: the noise belongs to whole images: --patch 0")
        if args.keep == "best" and not args.val_groups:
            p.error("--keep best: of what? give --val-groups")
        args.out = args.out or Path("runs") / f"{(args.gen.parent.parent if args.gen.suffix == '.pth' else args.gen).name}+dpo"
    if args.command == "pretrain":
        args.out = args.out or Path("runs") / f"flow-{args.size}"


ARGS = parse_args() if __name__ == "__main__" else None                           # --help needs no torch: seconds

from functools import partial

from dpo import pool as dpo_pool
from dpo import flow


def load(path, args, device, like=None):
    """The generator that --gen names. like: another one, of the same --model."""
    if args.backend == "diffusers":
        from dpo import diffusers_backend
        folder = path / "weights" if (path / "weights").is_dir() else path        # of a run of `train`
        return diffusers_backend.load_diffusers(args.model, folder, device, args.prompts, args.steps, args.guidance, gradient_checkpointing=getattr(args, "gradient_checkpointing", False), like=like)
    return flow.load_flow(path, device=device, steps=args.steps, tau=args.tau)


def main(args):
    if args.all:
        for command in DEMO:
            print(f"\n# dpo.py {command} --demo", flush=True)
            main(parse_args([command, "--demo", *(["--resume", "auto"] if command in ("pretrain", "train") else [])]))
        return
    if args.demo and not PHOTOS.exists():
        from prepare.demo_set import build_demo
        build_demo(PHOTOS)
    if args.command == "curate":
        dpo_pool.curate(args)
    elif args.command == "pretrain":
        from dpo import tune as dpo_train
        dpo_train.pretrain(args)
    else:
        world = runs.start_world(args.device, args.threads)
        opened = partial(load, args=args, device=world.device)
        if args.command == "score":
            dpo_pool.score(args, world)
        elif args.command == "sample":
            dpo_pool.sample(args, opened(args.gen), world)
        elif args.command == "eval":
            from dpo import compare as dpo_eval
            dpo_eval.evaluate(args, world, opened)
        else:
            from dpo import tune as dpo_train
            pairs = dpo_train.open_pairs(args)
            dpo_train.train(args, opened(args.gen), pairs)


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
