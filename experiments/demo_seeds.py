"""Does the demo's result survive another seed, and rounding? Trains orig and AMO several times and compares them.

    python -m experiments.demo_seeds                                three seeds, three variants each
    python -m experiments.demo_seeds --metrics ranker piqe psnr niqe --metric-weights niqe=FILE

Leaves OUT/summary.json; finished parts are kept. The analysis was fixed before the runs:
- Every seed is trained in three variants: `plain`, as the demo does; `perturbed`, from the same L1 start with every
  weight changed by a random share of at most 1e-6; `contiguous`, in the other memory format, L1 start included.
- The difference of a metric is amo minus orig, mean over the demo's test images (8 patches of 2 photographs).
- The interval is Student's t over the seeds of `plain`, 95 %: it says what another seed would give, not what other
  photographs would.
- `holds` is true where the difference has one sign in every seed and variant, and the interval excludes zero.
"""
from pathlib import Path

import runs

# flags of train.py
VARIANTS = {"plain": [], "perturbed": [], "contiguous": ["--no-channels-last"]}


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--seeds", type=runs.COUNT, nargs="+", default=[0, 1, 2], help="at least two")
    p.add_argument("--metrics", nargs="+", default=["ranker", "piqe", "psnr"], help="of evaluate.py")
    p.add_argument("--metric-weights", nargs="*", default=[], metavar="NAME=FILE", help="of evaluate.py")
    p.add_argument("--train-flags", default="", metavar="TEXT",
                   help="further flags of orig and amo in one string, to look at another demo")
    p.add_argument("--jobs", type=runs.SIZE, default=2, help="seeds trained at a time, a thread each")
    p.add_argument("--out", type=Path, default=Path("runs/demo-seeds"), metavar="DIR", help="runs, logs, summary.json")
    args = p.parse_args(argv)
    if len(set(args.seeds)) < 2:
        p.error("--seeds: an interval over seeds needs at least two")
    return args


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import json
import shlex
import sys
from functools import partial

import numpy as np
import torch
from scipy import stats

import archs
from experiments import jobs

# the demo's test images; evaluate.py --demo would write files that two processes must not write at the same time
TEST = Path("datasets/demo/Test")
LQ, GT = TEST / "Blind_Degradation_Benchmark_LQ/demo/Blind_LR", TEST / "GT/demo/untouched"


def perturb(source, target, seed, share=1e-6):
    """Copy a weight file with every weight w changed to w (1 + u), u uniform in [-share, share]."""
    state, _ = archs.read_weights(source)
    generator = torch.Generator().manual_seed(seed)

    def changed(weight):
        if not weight.is_floating_point():
            return weight
        return weight * (1 + share * (2 * torch.rand(weight.shape, generator=generator) - 1))
    runs.save_weights(target, {name: changed(weight) for name, weight in state.items()})


def train_seed(seed, args):
    """-> {variant: {"orig": {metric: mean}, "amo": {...}}} of one seed, and "lower_is_better"."""
    result = {}
    for variant, flags in VARIANTS.items():
        folder = args.out / f"{variant}-{seed}"
        log = folder / "log.txt"
        start = folder / "psnr"
        if variant == "perturbed":
            start = folder / "start.pth"
            perturb(runs.find_weights(args.out / f"plain-{seed}" / "psnr", "train it first"), start, seed)
        else:
            jobs.call(log, "train.py", "--demo", "--stage", "psnr", "--seed", seed, "--out", start,
                      "--resume", "auto", *flags)
        for sampler in ("orig", "amo"):
            jobs.call(log, "train.py", "--demo", "--sampler", sampler, "--seed", seed, "--init", start,
                      "--out", folder / sampler, "--resume", "auto", *flags, *shlex.split(args.train_flags))
        table = folder / "table.json"
        jobs.call(log, "evaluate.py", "--lq", LQ, "--gt", GT, "--weights", folder / "orig", folder / "amo",
                  "--baselines", "bicubic", "--metrics", *args.metrics, "--metric-weights", *args.metric_weights,
                  "--cache", folder / "scores", "--out-json", table)
        judged = json.loads(table.read_text())
        result |= {variant: judged["mean"], "lower_is_better": judged["lower_is_better"]}
    return result


def summarise(results, metrics):
    """results: {seed: {variant: {row: {metric: mean}}}}

    -> {metric: {"mean", "low", "high", "differences": {variant: [per seed]}, "holds"}}
    """
    summary = {}
    for metric in metrics:
        differences = {v: [r[v]["amo"][metric] - r[v]["orig"][metric] for r in results.values()] for v in VARIANTS}
        plain = np.array(differences["plain"])
        low, high = stats.t.interval(0.95, len(plain) - 1, plain.mean(), stats.sem(plain))
        signs = {float(np.sign(d)) for values in differences.values() for d in values}
        summary[metric] = {"mean": float(plain.mean()), "low": float(low), "high": float(high),
                           "differences": differences, "holds": bool(len(signs) == 1 and low * high > 0)}
    return summary


def line(metric, lower, summary, seeds):
    """One sentence about a metric; summary: its part of what summarise returned."""
    values = [d for differences in summary["differences"].values() for d in differences]
    better = sum((d < 0) == lower and d != 0 for d in values)
    return (f"{metric} ({'lower' if lower else 'higher'} is better): amo - orig {summary['mean']:+.3f} "
            f"[{summary['low']:+.3f}, {summary['high']:+.3f}] over {seeds} seeds, smallest {min(values):+.3f}, "
            f"largest {max(values):+.3f}; amo better in {better} of {len(values)}; "
            f"{'holds' if summary['holds'] else 'does not hold'}")


def main(args):
    results = {}

    def one(seed):
        results[seed] = train_seed(seed, args)
    # makes the demo's data set, once
    jobs.call(args.out / "demo-set.log", "train.py", "--demo", "--stage", "psnr", "--total-steps", 1,
              "--out", args.out / "demo-set", "--resume", "auto")
    jobs.parallel(args.jobs, [partial(one, seed) for seed in args.seeds])
    results = {seed: results[seed] for seed in args.seeds}
    lower = next(iter(results.values()))["lower_is_better"]
    summary = summarise(results, args.metrics)
    runs.save_json(args.out / "summary.json", {
        "command": sys.argv, **runs.describe_machine(), "seeds": args.seeds, "images": 8, "lower_is_better": lower,
        "amo_minus_orig": summary, "mean": {seed: {v: r[v] for v in VARIANTS} for seed, r in results.items()}})
    for metric, values in summary.items():
        print(line(metric, lower[metric], values, len(args.seeds)))
    print(f"wrote {args.out / 'summary.json'}")


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
