"""Does what the demo shows survive another seed, and rounding? Trains orig and AMO with several seeds and looks at the sign of amo - orig.

    python -m experiments.demo_seeds                                five seeds, three variants each; leaves runs/demo-seeds/summary.json
    python -m experiments.demo_seeds --metrics ranker piqe psnr niqe --metric-weights niqe=FILE

The analysis was fixed before the runs:
- Every seed is trained in three variants: `plain`, as the demo does; `perturbed`, from the same L1 start with every weight changed by a
  random share of at most 1e-6; `contiguous`, in the other memory format, L1 start included.
- The difference of a metric is amo minus orig, mean over the demo's test images (8 patches of 2 photographs).
- The interval is Student's t over the seeds of `plain`, 95 %: it says what another seed would give, not what other photographs would.
- `holds` is true where the difference has one sign in every seed and variant, and the interval excludes zero.
"""
import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import stats

import archs
import runs
from experiments import jobs

VARIANTS = {"plain": [], "perturbed": [], "contiguous": ["--no-channels-last"]}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="at least two (default: 0 to 4)")
    p.add_argument("--metrics", nargs="+", default=["ranker", "piqe", "psnr"], help="of evaluate.py (default: ranker piqe psnr)")
    p.add_argument("--metric-weights", nargs="*", default=[], metavar="NAME=FILE", help="of evaluate.py")
    p.add_argument("--train-flags", default="", metavar="TEXT", help="further flags of orig and amo in one string, to look at another demo")
    p.add_argument("--jobs", type=int, default=2, help="seeds trained at a time, a thread each (default: 2)")
    p.add_argument("--out", type=Path, default=Path("runs/demo-seeds"), metavar="DIR", help="finished parts are kept (default: runs/demo-seeds)")
    args = p.parse_args(argv)
    if len(set(args.seeds)) < 2:
        p.error("--seeds: an interval over seeds needs at least two")
    return args


def perturb(source, target, seed, share=1e-6):
    """Copy a weight file with every weight w changed to w (1 + u), u uniform in [-share, share]."""
    state, _ = archs.read_weights(source)
    generator = torch.Generator().manual_seed(seed)
    changed = {k: v * (1 + share * (2 * torch.rand(v.shape, generator=generator) - 1)) if v.is_floating_point() else v for k, v in state.items()}
    runs.save_weights(target, changed)


def train_seed(seed, args):
    """-> {variant: {"orig": {metric: mean}, "amo": {...}}} of one seed."""
    found = {}
    for variant, flags in VARIANTS.items():
        folder = args.out / f"{variant}-{seed}"
        start = args.out / f"plain-{seed}" / "psnr"
        if variant != "perturbed":
            start = folder / "psnr"
            jobs.call(folder / "log.txt", "train.py", "--demo", "--stage", "psnr", "--seed", seed, "--out", start, "--resume", "auto", *flags)
        else:
            perturb(runs.find_weights(start, ""), folder / "start.pth", seed)
            start = folder / "start.pth"
        for sampler in ("orig", "amo"):
            jobs.call(folder / "log.txt", "train.py", "--demo", "--sampler", sampler, "--seed", seed, "--init", start, "--out", folder / sampler,
                      "--resume", "auto", *flags, *args.train_flags.split())
        table = folder / "table.json"
        jobs.call(folder / "log.txt", "evaluate.py", "--demo", "--weights", folder / "orig", folder / "amo", "--baselines", "bicubic",
                  "--metrics", *args.metrics, "--metric-weights", *args.metric_weights, "--cache", folder / "scores", "--out-json", table)
        result = json.loads(table.read_text())
        found[variant] = result["mean"]
        found["lower_is_better"] = result["lower_is_better"]
    return found


def summarise(results, metrics):
    """results: {seed: {variant: {row: {metric: mean}}}} -> {metric: {"mean", "low", "high", "differences": {variant: [per seed]}, "holds"}}"""
    summary = {}
    for metric in metrics:
        differences = {v: [r[v]["amo"][metric] - r[v]["orig"][metric] for r in results.values()] for v in VARIANTS}
        plain = np.array(differences["plain"])
        low, high = stats.t.interval(0.95, len(plain) - 1, plain.mean(), stats.sem(plain))
        signs = {float(np.sign(d)) for values in differences.values() for d in values}
        summary[metric] = {"mean": float(plain.mean()), "low": float(low), "high": float(high), "differences": differences,
                           "holds": bool(len(signs) == 1 and low * high > 0)}
    return summary


def main(args):
    results = {}

    def one(seed):
        results[seed] = train_seed(seed, args)
    jobs.call(args.out / "demo-set.log", "train.py", "--demo", "--stage", "psnr", "--total-steps", 1, "--out", args.out / "demo-set", "--resume", "auto")
    jobs.parallel(args.jobs, [partial(one, seed) for seed in args.seeds])
    results = {seed: results[seed] for seed in args.seeds}
    lower = next(iter(results.values()))["lower_is_better"]
    summary = summarise(results, args.metrics)
    record = {"command": sys.argv, **runs.describe_machine(), "seeds": args.seeds, "images": 8, "lower_is_better": lower, "amo_minus_orig": summary,
              "mean": {seed: {v: r[v] for v in VARIANTS} for seed, r in results.items()}}
    runs.save_json(args.out / "summary.json", record)
    for metric, s in summary.items():
        runs_of = len(args.seeds) * len(VARIANTS)
        values = [d for v in VARIANTS for d in s["differences"][v]]
        better = sum((d < 0) == lower[metric] and d != 0 for d in values)
        print(f"{metric} ({'lower' if lower[metric] else 'higher'} is better): amo - orig {s['mean']:+.3f} [{s['low']:+.3f}, {s['high']:+.3f}] over {len(args.seeds)} seeds, "
              f"smallest {min(values):+.3f}, largest {max(values):+.3f}; amo better in {better} of {runs_of}; {'holds' if s['holds'] else 'does not hold'}")
    print(f"wrote {args.out / 'summary.json'}")


if __name__ == "__main__":
    runs.cli(partial(main, parse_args()))
