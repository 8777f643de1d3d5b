"""Does perceptual preference optimisation help, and which part of it? DP2O-SR on real photographs at the scale of a CPU; one resumable queue.

    PYTHONPATH=../shared/tools python -m experiments.preferences [data] [pretrain] [pool] [train] [eval] [report]         all without a word; continues where it stopped

data      photographs for the generator and the pools; others that nothing is trained on
pretrain  a FlowSR generator for every seed
pool      --samples outputs of it for every low-resolution crop, their scores, and the pairs of every variant. How far the seeds differ is reported first
train     DPO with equal steps and pairs per step, the weights of the check with the best reward on held-out images: the best against the worst seed without weights (Diffusion-DPO); the best
          and worst 1/8, 1/4, 1/2 of the seeds; 1/4 with the weights of HPO, the method; the same with a full-reference or a no-reference reward alone
eval      all of a seed's networks on the same noise, by every metric of the reward and by metrics outside it; as controls unsharp masks of the untuned outputs, and the untuned network with
          less or more noise at the start
report    RESULTS.json, plots and the tables of README

Less noise at the start alone can raise mean and worst and narrow the spread. So pools and test have the noise that the untuned generator's reward likes best (--tau), and what tuning gains
is not that.

The analysis was fixed before the runs; --tau, --beta and --lr were chosen on a generator of another seed; 150 steps and --keep best after eleven runs of 300, whose held-out reward fell
after some 100, and before anything was tested (README). The columns that count are the reward and the worst of the seeds.
A difference is the mean over test photographs of (mean over seeds of A - B), each generator's reward on the scale of its own pool; it is in bold when its 95 % BCa interval over the
photographs excludes zero, every seed has its sign, and a paired t test has p < .05 (tables.py). Hypotheses of the paper: tuning raises the mean and the worst of k seeds and narrows their
spread; a quarter of the seeds on each side beats best against worst in a small network; HPO adds to it; a hybrid reward keeps what one kind of metric alone gives away; metrics outside the
reward gain too. The generator is tiny and every number belongs to it, none to the paper.
"""
import argparse
import shlex
from pathlib import Path

import runs


SHARED = Path("../shared/data")
STAGES = ("data", "pretrain", "pool", "train", "eval", "report")
VARIANTS = {  # (flags of curate, flags of train)
    "best-worst": ("--top 1", "--hpo none"), "1 of 8": ("--top 2", "--hpo none"), "1 of 4": ("--top 4", "--hpo none"), "1 of 2": ("--top 8", "--hpo none"), "HPO": ("--top 4", "--hpo both"),
    "fr": ("--top 4 --reward fr", "--hpo both"), "nr": ("--top 4 --reward nr", "--hpo both")}
SHOWN = ("best-worst", "1 of 2", "HPO")                                           # in curves and contact sheet
PAIRS = [(name, "base") for name in VARIANTS] + [("1 of 4", "best-worst"), ("1 of 4", "1 of 8"), ("1 of 4", "1 of 2"), ("HPO", "best-worst"), ("HPO", "1 of 4"), ("HPO", "fr"), ("HPO", "nr")]
PRETRAIN = """--size tiny --patch 16 --load-size 120 --degradation realesrgan --batch-size 8 --group-size 2 --val-photos 4 --total-steps 8000 --warmup 100 --lr 1e-3 --ema-decay 0.999 --steps 8
--log-every 500 --save-every 500 --val-every 4000 --workers 0"""
CROPS = "--patch 24 --load-size 160 --degradation realesrgan"
TRAIN = "--patch 16 --batch-size 8 --total-steps 150 --lr 5e-6 --beta 5000 --max-displacement 0 --keep best --val-groups 8 --val-every 25 --log-every 25 --save-every 75 --workers 0"


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=runs.Help)
    p.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    g = p.add_argument_group("data")
    g.add_argument("--photos", type=Path, nargs="+", default=[SHARED / "images" / name for name in ("hr_kodak24", "hr_urban100", "hr_bsd100")], metavar="DIR",
                   help="photographs for generator and pools; every other one of the last folder is kept for the test")
    g.add_argument("--test", type=Path, nargs="+", default=[SHARED / "images" / name for name in ("test_set5", "test_set14")], metavar="DIR", help="further photographs of the test")
    g.add_argument("--tile", type=runs.COUNT, default=240, help="side of the squares that photographs are cut into, so that less is decoded for a crop; 0: none (CHOICE)")
    g.add_argument("--groups", type=runs.SIZE, default=64, help="crops of a pool (CHOICE; PAPER: 30,000)")
    g.add_argument("--samples", type=runs.SIZE, default=16, help="M, candidates of a crop (CHOICE; PAPER: 32 or 64)")
    g.add_argument("--test-samples", type=runs.SIZE, default=8, help="outputs of a test image (CHOICE)")
    g = p.add_argument_group("reward")
    g.add_argument("--fr", nargs="+", default=["ssim", "vgg"], help="full-reference half of the reward")
    g.add_argument("--nr", nargs="+", default=["cnniqa_live:build", "ranker"], help="no-reference half")
    g.add_argument("--watch", nargs="+", default=["psnr", "gmsd", "brisque", "piqe"], help="metrics outside the reward")
    g.add_argument("--vgg-weights", type=Path, default=Path("runs/vgg19.pth"), metavar="FILE", help="README says how to make it of the shared weights")
    g.add_argument("--metric-weights", nargs="*", default=[f"brisque={SHARED}/weights/iqa/brisque_svm_weights.pth"], metavar="NAME=FILE")
    g = p.add_argument_group("runs")
    g.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    g.add_argument("--pretrain", default=PRETRAIN, help="flags of the generators (CHOICE: what two cores do)")
    g.add_argument("--crops", default=CROPS, help="flags of the pools and of the test images (CHOICE)")
    g.add_argument("--tau", type=runs.RATE, default=0.6, help="scale of the initial noise from pools to test (CHOICE: the reward of the untuned generator of another seed was best there, see README)")
    g.add_argument("--train", default=TRAIN, help="flags of all DPO runs (CHOICE)")
    g.add_argument("--controls", type=runs.RATE, nargs="+", default=[0.8, 1.2], metavar="SHARE", help="the untuned generator with its initial noise times this")
    g.add_argument("--seeds", type=runs.COUNT, nargs="+", default=[0, 1, 2], help="each with a generator and a pool of its own")
    g.add_argument("--jobs", type=runs.SIZE, default=2, help="runs at a time, one thread each")
    g.add_argument("--work", type=Path, default=Path("runs/dpo-experiment"), metavar="DIR", help="runs and data sets")
    g.add_argument("--results", type=Path, default=Path("results/dpo"), metavar="STEM", help="leaves STEM.json, STEM-curves.png, STEM-steps.png and STEM-grid.png")
    args = p.parse_args(argv)
    args.stages = args.stages or list(STAGES)
    for stage in args.stages:
        if stage not in STAGES:
            p.error(f"{stage}: no such stage; choose from {', '.join(STAGES)}")
    return args


ARGS = parse_args() if __name__ == "__main__" else None                           # --help needs no torch: seconds

import json
import signal
import sys
from functools import partial

import numpy as np

from experiments import jobs
from dpo import __main__ as dpo
from dpo import compare as dpo_eval
from images import list_images
from report import tables


def metric_files(args):
    return ["--metric-weights", *args.metric_weights, *([f"vgg={args.vgg_weights}"] if "vgg" in args.fr else [])]


def folder(args, kind, seed, name=""):
    return args.work / kind / (f"{name}-{seed}".replace(" ", "-") if name else str(seed))


def prepare(args):
    if (args.work / "hr").exists():
        return
    images = lambda where: list(list_images(where).values())
    last = images(args.photos[-1])
    tests = [path for where in args.test for path in images(where)] + last[1::2]
    jobs.copy_photos([path for path in tests if (path.parent.name, path.stem) != ("test_set14", "face")], args.work / "test")              # Set14's face is Set5's head
    jobs.copy_photos([path for where in args.photos[:-1] for path in images(where)] + last[::2], args.work / "hr.tmp", args.tile)
    (args.work / "hr.tmp").rename(args.work / "hr")


def pretrain(args, seed):
    out = folder(args, "gen", seed)
    jobs.once(out / "weights" / "gen.pth", out.with_suffix(".log"), "dpo", "pretrain", "--hr", args.work / "hr", *shlex.split(args.pretrain), "--seed", seed, "--out", out, "--resume", "auto",
                 inputs=[args.work / "hr"])


def pool(args, seed):
    out, log = folder(args, "pool", seed), folder(args, "pool", f"{seed}.log")
    jobs.call(log, "dpo", "sample", "--gen", folder(args, "gen", seed), "--hr", args.work / "hr", "--groups", args.groups, "--samples", args.samples, "--tau", args.tau, *shlex.split(args.crops),
                 "--seed", seed, "--out", out)
    jobs.call(log, "dpo", "score", "--pool", out, "--fr", *args.fr, "--nr", *args.nr, *metric_files(args))
    for name in args.variants:
        dpo.main(dpo.parse_args(["curate", "--pool", out, *shlex.split(VARIANTS[name][0]), "--out", folder(args, "pairs", seed, name)]))


def train(args, name, seed):
    out = folder(args, "tuned", seed, name)
    jobs.once(out / "weights" / "gen.pth", out.with_name(out.name + ".log"), "dpo", "train", "--gen", folder(args, "gen", seed), "--pairs", folder(args, "pairs", seed, name), *metric_files(args),
                 "--tau", args.tau, *shlex.split(args.train), *shlex.split(VARIANTS[name][1]), "--seed", seed, "--out", out, "--resume", "auto",
                 inputs=[folder(args, "gen", seed) / "weights" / "gen.pth", *(folder(args, "pairs", seed, name) / file for file in ("pairs.jsonl", "norm.json"))])


def evaluate(args, seed):
    out = folder(args, "eval", seed)
    jobs.once(out / "eval.json", out.with_suffix(".log"), "dpo", "eval", "--gen", folder(args, "gen", seed), *(folder(args, "tuned", seed, name) for name in args.variants), "--names", "base", *args.variants,
                 "--hr", args.work / "test", "--groups", len(list_images(args.work / "test")), *shlex.split(args.crops), "--samples", args.test_samples, "--tau", args.tau, "--less-noise", *args.controls,
                 "--shown-rows", "base", *(name for name in args.variants if name in SHOWN),
                 "--norm-file", folder(args, "pairs", seed, args.variants[0]) / "norm.json", "--watch", *args.watch, *metric_files(args),
                 *(["--diversity", "vgg", "--vgg-weights", args.vgg_weights] if "vgg" in args.fr else ["--diversity", "proxy"]), "--out", out,
                 inputs=[args.work / "test", *(net / "weights" / "gen.pth" for net in (folder(args, "gen", seed), *(folder(args, "tuned", seed, name) for name in args.variants))),
                         folder(args, "pairs", seed, args.variants[0]) / "norm.json"])


def report(args):
    found = [json.loads((folder(args, "eval", seed) / "eval.json").read_text()) for seed in args.seeds]
    rows, names = list(found[0]["rows"]), list(next(iter(found[0]["rows"].values()))["per_photo"])
    values = {row: np.array([[f["rows"][row]["per_photo"][name] for name in names] for f in found]).transpose(0, 2, 1) for row in rows}          # (seeds, photos, columns)
    controls = [row for row in rows if row.startswith("base") and row != "base"]
    pairs = [*((a, b) for a, b in PAIRS if a in rows and b in rows), *((row, "base") for row in controls), *(("HPO", row) for row in controls if "HPO" in rows)]
    curation = {f"{name}-{seed}": json.loads((folder(args, "pairs", seed, name) / "curation.json").read_text()) for seed in args.seeds for name in args.variants}
    events = lambda name, seed: [json.loads(line) for line in (folder(args, "tuned", seed, name) / "metrics.jsonl").read_text().splitlines()]
    summary = {"command": sys.argv, **runs.describe_machine(), "seeds": args.seeds, **{k: getattr(args, k) for k in ("variants", "pretrain", "crops", "tau", "train", "groups", "samples", "test_samples")},
               **{k: found[0][k] for k in ("inside", "outside", "images", "photos", "k", "diversity_by")}, "metrics": names, "lower_is_better": found[0]["lower_is_better"],
               "sigma": {str(seed): curation[f"{args.variants[0]}-{seed}"]["sigma"] for seed in args.seeds}, "pairs": {k: v["pairs"] for k, v in curation.items()}, "curation": {k: {x: v[x] for x in ("reward", "sigma", "gap", "best", "mean", "worst")} for k, v in curation.items()},
               "mean": {row: v.mean((0, 1)).tolist() for row, v in values.items()}, "seed_means": {row: v.mean(1).tolist() for row, v in values.items()},
               "curves": {row: {which: np.mean([f["rows"][row]["curve"][which] for f in found], 0).tolist() for which in ("best", "mean", "worst")} for row in rows},
               "differences": {f"{a} - {b}": {name: tables.difference(values[a][..., k], values[b][..., k]) for k, name in enumerate(names)} for a, b in pairs},
               "watched": {f"{name}-{seed}": [(e["step"], e["reward"]) for e in events(name, seed) if e["split"] == "val"] for seed in args.seeds for name in args.variants},
               "training": {f"{name}-{seed}": [{k: e[k] for k in ("step", "loss", "accuracy", "win_change", "lose_change", "win_ref")} for e in events(name, seed) if e["split"] == "train"]
                            for seed in args.seeds for name in args.variants}}
    runs.save_json(args.results.with_suffix(".json"), summary)
    plot = lambda name: args.results.with_name(f"{args.results.name}-{name}.png")
    shown = {row: {"curve": v} for row, v in summary["curves"].items() if row == "base" or row in SHOWN}
    dpo_eval.draw_curves({"rows": shown, "k": summary["k"], "reward": "hybrid"}, plot("curves"))
    draw_steps(summary, plot("steps"))
    runs.write_atomic(plot("grid"), lambda t: t.write_bytes((folder(args, "eval", args.seeds[0]) / "grid.png").read_bytes()))
    print(readme_tables(summary))


def draw_steps(summary, path):
    """Held-out reward against steps, mean over seeds, as its difference to before. fr and nr are watched by their own reward."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in summary["variants"]:
        curves = np.array([[v for _, v in summary["watched"][f"{name}-{seed}"]] for seed in summary["seeds"]])
        steps = [step for step, _ in summary["watched"][f"{name}-{summary['seeds'][0]}"]]
        axis.plot(steps, (curves - curves[:, :1]).mean(0), "o-", markersize=3, label=name)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(xlabel="step", ylabel="gain of the run's own reward, held-out images")
    axis.legend(fontsize=8)
    runs.write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def readme_tables(summary):
    """The Markdown that README shows."""
    spread = runs.markdown(["sigma_g of the reward over seeds", "quartile", "median", "quartile"], [[f"generator {seed}", *(f"{v:.3f}" for v in values)] for seed, values in summary["sigma"].items()])
    last = {name: [summary["training"][f"{name}-{seed}"][-1] for seed in summary["seeds"]] for name in summary["variants"]}
    ends = runs.markdown(["at the last step", "implicit accuracy", "error at winners, change", "at losers"],
                         [[name, f"{np.mean([e['accuracy'] for e in v]):.2f}", *(f"{100 * np.mean([e[k] / e['win_ref'] for e in v]):+.2f} %" for k in ("win_change", "lose_change"))] for name, v in last.items()])
    return "\n\n".join([spread, jobs.metric_tables(summary), ends])


def main(args):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if "vgg" in args.fr and not args.vgg_weights.is_file():
        raise runs.UserError(f"--vgg-weights {args.vgg_weights}: no such file; python ../shared/tools/vgg19_for_torchvision.py makes it of the shared weights")
    if "data" in args.stages:
        prepare(args)
    for stage, task in (("pretrain", pretrain), ("pool", pool)):
        if stage in args.stages:
            jobs.parallel(args.jobs, [partial(task, args, seed) for seed in args.seeds])
    if "train" in args.stages:
        jobs.parallel(args.jobs, [partial(train, args, name, seed) for seed in args.seeds for name in args.variants])
    if "eval" in args.stages:
        jobs.parallel(args.jobs, [partial(evaluate, args, seed) for seed in args.seeds])
    if "report" in args.stages:
        report(args)


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
