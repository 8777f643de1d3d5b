"""Does perceptual preference optimisation help, and which part of it? DP2O-SR on a CPU; one resumable queue.

    python -m experiments.preferences                       all stages; resumes where it stopped
    python -m experiments.preferences eval report           some of them

data      photographs for the generators and the pools; others that nothing is trained on
pretrain  a FlowSR generator for every seed
pool      --samples outputs of it for every low-resolution crop, their scores, and the pairs of every variant; how far
          the seeds differ is reported first
train     DPO with equal steps and pairs per step, the weights of the check with the best reward on held-out images: the
          best against the worst seed without weights (Diffusion-DPO); the best and worst 1/8, 1/4, 1/2 of the seeds;
          1/4 with the weights of HPO, the method; the same with a full-reference or a no-reference reward alone
eval      all networks of a seed on the same noise, by every metric of the reward and by metrics outside it. Controls:
          unsharp masks of the untuned outputs, and the untuned network with less or more noise at the start
report    the results as JSON, plots, and tables

Less noise at the start alone can raise the mean and the worst and narrow the spread. So pools and test have the noise
that the untuned generator's reward likes best (--tau): this gain cannot be credited to tuning.

The analysis was fixed before the runs. --tau, --beta and --lr were chosen on a generator of another seed; 150 steps and
--keep best after eleven runs of 300 steps, whose held-out reward fell after some 100, and before anything was tested
(docs/results-dpo.md). The columns that count are the reward and the worst of the seeds.
A difference is the mean over test photographs of (mean over seeds of A - B), each generator's reward on the scale of
its own pool. It is in bold when its 95 % BCa interval over the photographs excludes zero, every seed has its sign, and
a paired t test has p < 0.05 (report.tables). Hypotheses of the paper: tuning raises the mean and the worst of k seeds
and narrows their spread; a quarter of the seeds on each side beats best against worst in a small network; HPO adds to
it; a hybrid reward keeps what one kind of metric alone gives away; metrics outside the reward gain too. The generator
is tiny: every number belongs to it, none to the paper.
"""
import shlex
from pathlib import Path

import runs

# photographs and public weights; docs/data.md says where they come from
DATA = Path("datasets/public")
STAGES = ("data", "pretrain", "pool", "train", "eval", "report")
# flags of dpo.pool curate, and of dpo.tune
VARIANTS = {
    "best-worst": ("--top 1", "--hpo none"), "1 of 8": ("--top 2", "--hpo none"), "1 of 4": ("--top 4", "--hpo none"),
    "1 of 2": ("--top 8", "--hpo none"), "HPO": ("--top 4", "--hpo both"), "fr": ("--top 4 --reward fr", "--hpo both"),
    "nr": ("--top 4 --reward nr", "--hpo both")}
# in curves and contact sheet
SHOWN = ("best-worst", "1 of 2", "HPO")
# names in pictures
NAMES = {"base": "untuned generator", "best-worst": "best against worst",
         "1 of 8": "best eighth against worst", "1 of 4": "best quarter against worst",
         "1 of 2": "better half against worse", "HPO": "best quarter against worst, HPO",
         "fr": "full-reference reward", "nr": "no-reference reward"}
# pairs beside each variant against the untuned generator
PAIRS = [("1 of 4", "best-worst"), ("1 of 4", "1 of 8"), ("1 of 4", "1 of 2"), ("HPO", "best-worst"),
         ("HPO", "1 of 4"), ("HPO", "fr"), ("HPO", "nr")]
# CHOICE: sized for two cores
PRETRAIN = ("--size tiny --patch 16 --load-size 120 --degradation realesrgan --batch-size 8 --group-size 2 "
            "--val-photos 4 --total-steps 8000 --warmup 100 --lr 1e-3 --steps 8 --log-every 500 --save-every 500 "
            "--val-every 4000 --workers 0")
CROPS = "--patch 24 --load-size 160 --degradation realesrgan"
TRAIN = ("--patch 16 --batch-size 8 --total-steps 150 --lr 5e-6 --beta 5000 --max-displacement 0 --keep best "
         "--val-groups 8 --val-every 25 --log-every 25 --save-every 75 --workers 0")


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    images, iqa = DATA / "images", DATA / "weights" / "iqa"
    g = p.add_argument_group("data (docs/data.md says where it comes from)")
    g.add_argument("--photos", type=Path, nargs="+", metavar="DIR",
                   default=[images / name for name in ("hr_kodak24", "hr_urban100", "hr_bsd100")],
                   help="photographs for generators and pools; every other one of the last folder is kept for the test")
    g.add_argument("--test", type=Path, nargs="+", default=[images / name for name in ("test_set5", "test_set14")],
                   metavar="DIR", help="further photographs of the test")
    g.add_argument("--tile", type=runs.COUNT, default=240,
                   help="side of the squares that photographs are cut into, so that less is decoded for a crop; 0: "
                        "none (CHOICE)")
    g.add_argument("--groups", type=runs.SIZE, default=64, help="crops of a pool (CHOICE; PAPER: 30,000)")
    g.add_argument("--samples", type=runs.SIZE, default=16, help="M, candidates of a crop (CHOICE; PAPER: 32 or 64)")
    g.add_argument("--test-samples", type=runs.SIZE, default=8, help="outputs of a test image (CHOICE)")
    g = p.add_argument_group("reward")
    g.add_argument("--fr", nargs="+", default=["ssim", "vgg"], metavar="NAME", help="full-reference half of the reward")
    g.add_argument("--nr", nargs="+", default=["rewards.cnniqa:build", "ranker"], metavar="NAME",
                   help="no-reference half")
    g.add_argument("--watch", nargs="+", default=["psnr", "gmsd", "brisque", "piqe"], metavar="NAME",
                   help="metrics outside the reward")
    g.add_argument("--vgg-weights", type=Path, default=Path("runs/vgg19.pth"), metavar="FILE",
                   help="VGG19, which python -m prepare.vgg19 makes")
    g.add_argument("--metric-weights", nargs="*", metavar="NAME=FILE",
                   default=[f"brisque={iqa}/brisque_svm_weights.pth"])
    g = p.add_argument_group("runs")
    g.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME",
                   help=", ".join(VARIANTS))
    g.add_argument("--pretrain", default=PRETRAIN, help="flags of the generators")
    g.add_argument("--crops", default=CROPS, help="flags of the pools and of the test images (CHOICE)")
    g.add_argument("--tau", type=runs.RATE, default=0.6,
                   help="scale of the initial noise from pools to test (CHOICE: best for the reward of an untuned "
                        "generator of another seed)")
    g.add_argument("--train", default=TRAIN, help="flags of all DPO runs (CHOICE)")
    g.add_argument("--controls", type=runs.RATE, nargs="+", default=[0.8, 1.2], metavar="SHARE",
                   help="the untuned generator with its initial noise times this")
    g.add_argument("--seeds", type=runs.COUNT, nargs="+", default=[0, 1, 2],
                   help="each with a generator and a pool of its own")
    g.add_argument("--jobs", type=runs.SIZE, default=2, help="runs at a time, one thread each")
    g.add_argument("--work", type=Path, default=Path("runs/dpo-experiment"), metavar="DIR", help="runs and data sets")
    g.add_argument("--results", type=Path, metavar="STEM",
                   help="leaves STEM.json, STEM-curves.png, STEM-steps.png, STEM-grid.png; default: WORK/dpo")
    g.add_argument("--redraw", type=Path, metavar="FILE.json",
                   help="draw the plots of an earlier report beside it again, and do nothing else")
    args = p.parse_args(argv)
    args.stages = args.stages or list(STAGES)
    for stage in args.stages:
        if stage not in STAGES:
            p.error(f"{stage}: no such stage; choose from {', '.join(STAGES)}")
    args.results = args.results or args.work / "dpo"
    return args


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import json
import signal
import sys
from functools import partial

import numpy as np

from dpo import compare, pool
from experiments import jobs
from images import list_images
from report import style, tables


def metric_files(args):
    return ["--metric-weights", *args.metric_weights, *([f"vgg={args.vgg_weights}"] if "vgg" in args.fr else [])]


def folder(args, stage, seed, variant=""):
    return args.work / stage / (f"{variant}-{seed}".replace(" ", "-") if variant else str(seed))


def generator(args, seed, variant=None):
    """Run folder of the untuned generator of a seed, or of a variant that was tuned from it."""
    return folder(args, "tuned", seed, variant) if variant else folder(args, "gen", seed)


def prepare(args):
    if (args.work / "hr").exists():
        return

    def images(where):
        return list(list_images(where).values())
    last = images(args.photos[-1])
    tests = [path for where in args.test for path in images(where)] + last[1::2]
    # Set14's face is the head of Set5
    tests = [path for path in tests if (path.parent.name, path.stem) != ("test_set14", "face")]
    jobs.copy_photos(tests, args.work / "test")
    others = [path for where in args.photos[:-1] for path in images(where)]
    jobs.copy_photos(others + last[::2], args.work / "hr.tmp", args.tile)
    (args.work / "hr.tmp").rename(args.work / "hr")


def pretrain(args, seed):
    out = generator(args, seed)
    jobs.once(out / "weights" / "gen.pth", out.with_suffix(".log"), "dpo.pretrain", "--hr", args.work / "hr",
              *shlex.split(args.pretrain), "--seed", seed, "--out", out, "--resume", "auto", inputs=[args.work / "hr"])


def make_pool(args, seed):
    out, log = folder(args, "pool", seed), folder(args, "pool", f"{seed}.log")
    jobs.call(log, "dpo.pool", "sample", "--gen", generator(args, seed), "--hr", args.work / "hr",
              "--groups", args.groups, "--samples", args.samples, "--tau", args.tau, *shlex.split(args.crops),
              "--seed", seed, "--out", out)
    jobs.call(log, "dpo.pool", "score", "--pool", out, "--fr", *args.fr, "--nr", *args.nr, *metric_files(args))
    for variant in args.variants:
        pairs = folder(args, "pairs", seed, variant)
        pool.main(pool.parse_args(["curate", "--pool", out, *shlex.split(VARIANTS[variant][0]), "--out", pairs]))


def train(args, variant, seed):
    out, start, pairs = generator(args, seed, variant), generator(args, seed), folder(args, "pairs", seed, variant)
    jobs.once(out / "weights" / "gen.pth", out.with_name(out.name + ".log"), "dpo.tune", "--gen", start,
              "--pairs", pairs, *metric_files(args), *shlex.split(args.train), *shlex.split(VARIANTS[variant][1]),
              "--seed", seed, "--out", out, "--resume", "auto",
              inputs=[start / "weights" / "gen.pth", *(pairs / file for file in ("pairs.jsonl", "norm.json"))])


def evaluate(args, seed):
    out, norm = folder(args, "eval", seed), folder(args, "pairs", seed, args.variants[0]) / "norm.json"
    generators = [generator(args, seed), *(generator(args, seed, variant) for variant in args.variants)]
    diversity = "vgg" if "vgg" in args.fr else "proxy"
    jobs.once(out / "eval.json", out.with_suffix(".log"), "dpo.compare", "--gen", *generators,
              "--names", "base", *args.variants, "--hr", args.work / "test",
              "--groups", len(list_images(args.work / "test")), *shlex.split(args.crops),
              "--samples", args.test_samples, "--tau", args.tau, "--less-noise", *args.controls,
              "--shown-rows", "base", *(variant for variant in args.variants if variant in SHOWN), "--norm-file", norm,
              "--watch", *args.watch, *metric_files(args), "--diversity", diversity, "--out", out,
              inputs=[args.work / "test", *(gen / "weights" / "gen.pth" for gen in generators), norm])


def report(args):
    evals = [json.loads((folder(args, "eval", seed) / "eval.json").read_text()) for seed in args.seeds]
    first = evals[0]
    rows, names = list(first["rows"]), list(first["rows"]["base"]["per_photo"])

    def per_photo(row):
        """(seeds, photos, columns)"""
        parts = [of_seed["rows"][row]["per_photo"] for of_seed in evals]
        return np.array([[part[name] for name in names] for part in parts]).transpose(0, 2, 1)

    def curve(row, kind):
        return np.mean([of_seed["rows"][row]["curve"][kind] for of_seed in evals], 0).tolist()
    values = {row: per_photo(row) for row in rows}
    controls = [row for row in rows if row.startswith("base") and row != "base"]
    pairs = [*((variant, "base") for variant in args.variants), *PAIRS, *((row, "base") for row in controls),
             *(("HPO", row) for row in controls)]
    tuned = {f"{variant}-{seed}": (seed, variant) for seed in args.seeds for variant in args.variants}
    curation = {name: json.loads((folder(args, "pairs", *run) / "curation.json").read_text())
                for name, run in tuned.items()}
    events = {name: [json.loads(line) for line in (generator(args, *run) / "metrics.jsonl").read_text().splitlines()]
              for name, run in tuned.items()}
    curated, trained = (("reward", "sigma", "gap", "best", "mean", "worst"),
                        ("step", "loss", "accuracy", "win_change", "lose_change", "win_ref"))
    settings = ("seeds", "variants", "pretrain", "crops", "tau", "train", "groups", "samples", "test_samples")
    summary = {
        "command": sys.argv, **runs.describe_machine(), **{name: getattr(args, name) for name in settings},
        **{name: first[name] for name in ("inside", "outside", "images", "photos", "k", "diversity_by")},
        "metrics": names, "lower_is_better": first["lower_is_better"],
        "sigma": {str(seed): curation[f"{args.variants[0]}-{seed}"]["sigma"] for seed in args.seeds},
        "pairs": {name: about["pairs"] for name, about in curation.items()},
        "curation": {name: {key: about[key] for key in curated} for name, about in curation.items()},
        "mean": {row: v.mean((0, 1)).tolist() for row, v in values.items()},
        "seed_means": {row: v.mean(1).tolist() for row, v in values.items()},
        "curves": {row: {kind: curve(row, kind) for kind in ("best", "mean", "worst")} for row in rows},
        "differences": {f"{a} - {b}": {name: tables.difference(values[a][..., k], values[b][..., k])
                                       for k, name in enumerate(names)} for a, b in pairs if a in rows and b in rows},
        "watched": {name: [(e["step"], e["reward"]) for e in lines if e["split"] == "val"]
                    for name, lines in events.items()},
        "training": {name: [{key: e[key] for key in trained} for e in lines if e["split"] == "train"]
                     for name, lines in events.items()}}
    runs.save_json(args.results.with_suffix(".json"), summary)

    draw(summary, args.results)
    grid = (folder(args, "eval", args.seeds[0]) / "grid.png").read_bytes()
    runs.write_atomic(picture(args.results, "grid"), partial(Path.write_bytes, data=grid))
    print(markdown_tables(summary))


def picture(results, name):
    """STEM-<name>.png"""
    return results.with_name(f"{results.name}-{name}.png")


def draw(summary, results):
    """Both plots of a report."""
    shown = {}
    for row in ("base", *(variant for variant in SHOWN if variant in summary["variants"])):
        shown[NAMES.get(row, row)] = {"curve": summary["curves"][row],
                                      "minus_first": summary["differences"].get(f"{row} - base")}
    compare.draw_curves({"rows": shown, "k": summary["k"], "reward": "hybrid"}, picture(results, "curves"))
    draw_steps(summary, picture(results, "steps"))


def draw_steps(summary, path):
    """Held-out reward against steps minus that of step 0, by variant; fr and nr by their own reward."""
    variants = summary["variants"]
    rows = -(-len(variants) // 2)
    drawing, axes = style.figure(rows, 2, height=1.0 + 1.7 * rows, sharex=True, sharey=True, squeeze=False)
    for variant, axis in zip(variants, axes.flat):
        watched = [summary["watched"][f"{variant}-{seed}"] for seed in summary["seeds"]]
        rewards = np.array([[reward for _, reward in of_seed] for of_seed in watched])
        axis.axhline(0, color="grey", linewidth=0.8)
        style.seeds(axis, [step for step, _ in watched[0]], rewards - rewards[:, :1])
        axis.set_title(NAMES.get(variant, variant))
    for axis in axes.flat[max(0, len(variants) - 2):len(variants)]:
        axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(variants):]:
        axis.remove()
    drawing.supxlabel("training steps", fontsize=style.FONT)
    drawing.supylabel("gain of the run's own reward on held-out images", fontsize=style.FONT)
    drawing.suptitle(f"Thick: mean of {len(summary['seeds'])} generators, thin: each of them", fontsize=style.FONT)
    style.save(drawing, path)


def markdown_tables(summary):
    """The results as Markdown: spread of the seeds, scores and differences, ends of the trainings."""
    spread = runs.markdown(["sigma_g of the reward over seeds", "quartile", "median", "quartile"],
                           [[f"generator {seed}", *(f"{v:.3f}" for v in values)]
                            for seed, values in summary["sigma"].items()])
    rows = []
    for name in summary["variants"]:
        ends = [summary["training"][f"{name}-{seed}"][-1] for seed in summary["seeds"]]
        changes = [100 * np.mean([end[key] / end["win_ref"] for end in ends]) for key in ("win_change", "lose_change")]
        rows.append([name, f"{np.mean([end['accuracy'] for end in ends]):.2f}", *(f"{v:+.2f} %" for v in changes)])
    ends = runs.markdown(["at the last step", "implicit accuracy", "error at winners, change", "at losers"], rows)
    return "\n\n".join([spread, jobs.metric_tables(summary), ends])


def main(args):
    if args.redraw:
        draw(json.loads(args.redraw.read_text()), args.redraw.with_suffix(""))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if "vgg" in args.fr and not args.vgg_weights.is_file():
        raise runs.UserError(f"--vgg-weights {args.vgg_weights}: no such file; python -m prepare.vgg19 makes it")
    if "data" in args.stages:
        prepare(args)
    for stage, task in (("pretrain", pretrain), ("pool", make_pool)):
        if stage in args.stages:
            jobs.parallel(args.jobs, [partial(task, args, seed) for seed in args.seeds])
    if "train" in args.stages:
        jobs.parallel(args.jobs, [partial(train, args, variant, seed)
                                  for seed in args.seeds for variant in args.variants])
    if "eval" in args.stages:
        jobs.parallel(args.jobs, [partial(evaluate, args, seed) for seed in args.seeds])
    if "report" in args.stages:
        report(args)


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
