"""Does HR-aware self-supervision help, and which part of it? One resumable queue on images whose ground truth is kept.

    python -m experiments.self_supervision                       all stages; resumes where it stopped
    python -m experiments.self_supervision finetune report       some of them

data      photographs for pre-training; the test photographs and as many others under one hidden degradation
          (prepare.degrade, camera): "domain", which networks are adapted to, and "held", which nothing is adapted to
pretrain  for every seed one reconstruction network each: LWay, baseline, + controller, + FAR, both, and variants
probe     the paper's Fig. 7 (baseline, + controller) and Fig. 8 (+ FAR) on photographs that pre-training did not see
finetune  the network --sr adapted with each of them, and with "both" and the other sign of the controller (Table 4);
          the number of steps is the same for all
real      "both" and LWay of the first seed, adapted to real photographs without ground truth: outputs as a page
report    the results as JSON, plots, and tables

The analysis was fixed before the runs. A difference is the mean over images of (mean over seeds of A - B). It is in
bold when its 95 % BCa interval over the images excludes zero, every seed has its sign, and a paired t test has p <
0.05 (report.tables). 100 steps of 2e-5 move a weight about as far as the paper's 300 to 600 of 2e-6 to 5e-6.
Hypotheses of the paper: the method beats the network before tuning on PSNR and on no-reference quality (Table 1); +
controller and + FAR each beat the baseline perceptually (Table 2); a controller of the other sign is worse (Table 4);
without a controller half a blur reconstructs better than the true image, with it this stops (Fig. 7); FAR is larger
for degraded images (Fig. 8). Widths, patches and steps are those of a CPU, and VGG19's features stand for LPIPS and
CLIP: no number here is the paper's.

Added after results were known. Eq. 8 asks R for s of about 0.9, and pre-training with noise of 0.1 had shown it 0.2 +-
0.13. "shifted" keeps s where R was trained. "controller-noise1", "both-noise1" and "flipped-noise1" have the paper's
noise of 1. This noise is drawn for each of the 512 numbers, so along an embedding it changes s by only some 0.08
(sqrt(3 / 512)), and R still never sees 0.9; it teaches R that the direction of an embedding cannot be relied on. The
last two also have a fifth of the automatic weight of FAR (2.4e-3), which had left three of six networks below bicubic
down-sampling: compare them with controller-noise1 and with each other, not with "both".
"""
import shlex
from pathlib import Path

import runs

DATA = Path(runs.literal("experiments/jobs", "DATA"))
STAGES = ("data", "pretrain", "probe", "finetune", "real", "report")
# flags of pretrain
PRETRAIN = {"LWay": "--arch lway", "baseline": "--s-rule one --no-far", "controller": "--no-far", "FAR": "--s-rule one",
            "both": "", "controller-noise1": "--no-far --n-std 1", "both-noise1": "--n-std 1 --lambda-pt 5e-4"}
# pre-training, and flags of finetune
FINETUNE = {name: (name, "") for name in PRETRAIN} | {
    "flipped": ("both", "--s-rule flip"), "shifted": ("both", "--s-rule shifted"),
    "flipped-noise1": ("both-noise1", "--s-rule flip")}
# pairs beside each variant against the network before tuning
PAIRS = [("controller", "baseline"), ("FAR", "baseline"), ("both", "baseline"), ("both", "LWay"), ("both", "flipped"),
         ("both", "shifted"), ("shifted", "baseline"), ("controller-noise1", "baseline"), ("both-noise1", "baseline"),
         ("both-noise1", "controller-noise1"), ("both-noise1", "LWay"), ("both-noise1", "flipped-noise1")]
FIGURES = {"fig7": ("baseline", "controller"), "fig7-noise1": ("controller-noise1",), "fig8": ("FAR", "both"),
           "fig8-noise1": ("both-noise1",)}
# of Fig. 8, in its plots
NETWORKS = {"FAR": "FAR alone", "both": "FAR and controller", "both-noise1": "FAR and controller, noise 1"}
# CHOICE: sized for two cores
COMMON = ("--patch 32 --load-size 160 --degradation blur --batch-size 4 --group-size 2 --val-photos 6 --deg-enc bands "
          "--size small --distance vgg --vgg-stages 2 --far-enc vgg --n-std 0.1 --total-steps 2000 --lr 1e-3 "
          "--ema-decay 0.99 --workers 0 --log-every 200 --save-every 200 --val-every 1000")
TUNE = ("--patch 32 --batch-size 4 --total-steps 100 --lr 2e-5 --ema-decay 0.95 --workers 0 --log-every 25 "
        "--save-every 25 --val-every 100")
METRICS = ("psnr", "ssim", "vgg", "niqe", "brisque", "rewards.cnniqa:build")


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    images, iqa = DATA / "images", DATA / "weights" / "iqa"
    g = p.add_argument_group("data (docs/data.md says where it comes from)")
    g.add_argument("--photos", type=Path, nargs="+", metavar="DIR",
                   default=[images / name for name in ("hr_kodak24", "hr_urban100", "hr_bsd100")],
                   help="photographs for pre-training; every other one of the last folder is kept out of it")
    g.add_argument("--test", type=Path, nargs="+", default=[images / name for name in ("test_set5", "test_set14")],
                   metavar="DIR", help="photographs of the domain that is adapted to")
    g.add_argument("--real", type=Path, default=images / "lr_realsrset", metavar="DIR",
                   help="real low-resolution photographs")
    g.add_argument("--sr", type=runs.CHECKPOINT, metavar="PATH",
                   default=DATA / "weights" / "sr" / "realesr-general-x4v3_fp16.pth", help="x4 network to adapt")
    g.add_argument("--vgg-weights", type=Path, default=Path("runs/vgg19.pth"), metavar="FILE",
                   help="VGG19, which python -m prepare.vgg19 makes")
    g = p.add_argument_group("runs")
    g.add_argument("--pretrain", default=COMMON, help="flags of all pre-trainings (CHOICE)")
    g.add_argument("--finetune", default=TUNE, help="flags of all fine-tunings (CHOICE)")
    g.add_argument("--seeds", type=runs.COUNT, nargs="+", default=[0, 1, 2])
    g.add_argument("--metrics", nargs="+", default=list(METRICS), help="psnr and ssim on Y, whole images")
    g.add_argument("--metric-weights", nargs="*", metavar="NAME=FILE",
                   default=[f"niqe={iqa}/niqe_modelparameters.mat", f"brisque={iqa}/brisque_svm_weights.pth"])
    g.add_argument("--variants", nargs="+", choices=list(FINETUNE), default=list(FINETUNE), metavar="NAME",
                   help=f"variants of pretrain, probe and finetune: {', '.join(FINETUNE)}; report needs all")
    g.add_argument("--jobs", type=runs.SIZE, default=2, help="runs at a time, one thread each")
    g.add_argument("--work", type=Path, default=Path("runs/selfsup-experiment"), metavar="DIR",
                   help="runs and data sets")
    g.add_argument("--results", type=Path, metavar="STEM",
                   help="leaves STEM.json and plots of the probes, STEM-fig7.png and others; default: WORK/selfsup")
    g.add_argument("--redraw", type=Path, metavar="FILE.json",
                   help="draw the plots of an earlier report beside it again, and do nothing else")
    args = p.parse_args(argv)
    args.stages = args.stages or list(STAGES)
    for stage in args.stages:
        if stage not in STAGES:
            p.error(f"{stage}: no such stage; choose from {', '.join(STAGES)}")
    args.results = args.results or args.work / "selfsup"
    return args


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import json
import signal
import sys
from functools import partial

import numpy as np

from experiments import jobs
from images import list_images
from report import tables
from selfsup import probe as probes


def prepare(args):
    def images(folder):
        return list(list_images(folder).values())
    last = images(args.photos[-1])
    if not (args.work / "hr").exists():
        others = [path for folder in args.photos[:-1] for path in images(folder)]
        jobs.copy_photos(others + last[::2], args.work / "hr.tmp")
        (args.work / "hr.tmp").rename(args.work / "hr")
    for name, files in (("domain", [path for folder in args.test for path in images(folder)]), ("held", last[1::2])):
        if not (args.work / name).exists():
            photos = args.work / f"{name}-photos"
            jobs.copy_photos(files, photos)
            jobs.call(args.work / f"{name}.log", "prepare.degrade", photos, args.work / name, "--degradation", "camera")


def pretrain(args, name, seed):
    out = args.work / "rec" / f"{name}-{seed}"
    jobs.once(out / "weights" / "rec.pth", out.with_suffix(".log"), "selfsup.pretrain", "--hr", args.work / "hr",
              "--vgg-weights", args.vgg_weights, *shlex.split(args.pretrain), *shlex.split(PRETRAIN[name]),
              "--seed", seed, "--out", out, "--resume", "auto")


def probe(args, seed):
    for figure, names in FIGURES.items():
        out = args.work / "probe" / f"{figure}-{seed}"
        if set(names) <= set(args.variants):
            networks = [args.work / "rec" / f"{name}-{seed}" for name in names]
            jobs.once(out.with_name(out.name + ".json"), out.with_suffix(".log"), "selfsup.probe",
                      figure.partition("-")[0], "--rec", *networks, "--hr", args.work / "held-photos",
                      "--vgg-weights", args.vgg_weights, "--out", out)


def finetune(args, name, seed, lr_dir, gt_dir, out):
    network, switches = FINETUNE[name]
    jobs.call(out.with_suffix(".log"), "selfsup.finetune", "--rec", args.work / "rec" / f"{network}-{seed}",
              "--sr", args.sr, "--lr-dir", lr_dir, *(["--gt-dir", gt_dir] if gt_dir else []),
              "--vgg-weights", args.vgg_weights, *shlex.split(args.finetune), *shlex.split(switches),
              "--seed", seed, "--out", out, "--resume", "auto")


def score(args, weights, folder, out):
    """evaluate.py's JSON of one network on a folder of pairs; made again when the network was tuned further."""
    files = list(weights.glob("weights/*.pth")) if weights.is_dir() else [weights]
    if not out.exists() or any(file.stat().st_mtime > out.stat().st_mtime for file in files):
        vgg = [f"vgg={args.vgg_weights}"] if "vgg" in args.metrics else []
        jobs.call(out.with_suffix(".log"), "evaluate.py", "--protocol", "whole-y", "--weights", weights, "--baselines",
                  "--lq", folder / "lq", "--gt", folder / "gt", "--metrics", *args.metrics,
                  "--metric-weights", *args.metric_weights, *vgg, "--out-json", out,
                  "--cache", args.work / "evaluation-cache")
    return json.loads(out.read_text())


def tune_and_score(args, name, seed):
    out = args.work / "tuned" / f"{name}-{seed}"
    finetune(args, name, seed, args.work / "domain" / "lq", args.work / "domain" / "gt", out)
    for folder in ("domain", "held"):
        score(args, out, args.work / folder, args.work / "scores" / f"{folder}-{name}-{seed}.json")


def real(args):
    """STEM-real.json and a page of the real photographs: before, after LWay and after the method."""
    seed, outs = args.seeds[0], []
    for name in ("LWay", "both"):
        outs.append(args.work / "real" / f"{name}-{seed}")
        finetune(args, name, seed, args.real, None, outs[-1])
    no_reference = [m for m in args.metrics if m not in runs.literal("metrics", "FULL_REFERENCE")]
    scores = args.results.with_name(args.results.name + "-real.json")
    jobs.call(args.work / "real.log", "evaluate.py", "--weights", args.sr, *outs,
              "--names", "before", *(out.name for out in outs), "--lq", args.real, "--baselines", "bicubic",
              "--metrics", *no_reference, "--metric-weights", *args.metric_weights, "--out-json", scores,
              "--save", args.work / "real" / "outputs", "--cache", args.work / "evaluation-cache")
    command = runs.python("report.page", scores, args.work / "real.html")
    jobs.run_command(args.work / "real.log", "report.page", command, runs.python_path())


def events(folder, split):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [event for event in lines if event["split"] == split]


def compare(args, folder):
    """Scores of all variants on "domain" or "held", and their differences."""
    scores = args.work / "scores"
    start = score(args, args.sr, args.work / folder, scores / f"{folder}-before.json")
    lower = start["lower_is_better"]
    stems = sorted(next(iter(start["scores"].values())))

    def array_of(result):
        """(images, metrics) of the one row."""
        row, = result["scores"].values()
        return [[row[stem][m] for m in lower] for stem in stems]
    # (seeds, images, metrics)
    values = {"before": np.array([array_of(start)] * len(args.seeds))}
    for name in FINETUNE:
        files = [scores / f"{folder}-{name}-{seed}.json" for seed in args.seeds]
        values[name] = np.array([array_of(json.loads(file.read_text())) for file in files])
    differences = {}
    for a, b in [*((name, "before") for name in FINETUNE), *PAIRS]:
        differences[f"{a} - {b}"] = {m: tables.difference(values[a][..., k], values[b][..., k])
                                     for k, m in enumerate(lower)}
    return {"images": len(stems), "metrics": list(lower), "lower_is_better": lower,
            "mean": {name: v.mean((0, 1)).tolist() for name, v in values.items()},
            "seed_means": {name: v.mean(1).tolist() for name, v in values.items() if name != "before"},
            "differences": differences}


def probed(args, figure, seed, keys):
    """{line or network: its `keys`} of all probes of Fig. 7 or Fig. 8."""
    files = [args.work / "probe" / f"{name}-{seed}.json" for name in FIGURES if name.startswith(figure)]
    lines = [line for file in files for line in json.loads(file.read_text())["lines"].items()]
    return {name: {key: values[key] for key in keys} for name, values in lines}


def report(args):
    summary = {"command": sys.argv, **runs.describe_machine(), "seeds": args.seeds, "pretrain": args.pretrain,
               "finetune": args.finetune, "sets": {folder: compare(args, folder) for folder in ("domain", "held")}}
    for figure, keys in (("fig7", ("half_minus_clean", "psnr", "distance", "photos", "crops")),
                         ("fig8", ("auc", "photos", "crops", "far_enc"))):
        summary[figure] = [probed(args, figure, seed, keys) for seed in args.seeds]
    summary["pretraining"] = {f"{name}-{seed}": events(args.work / "rec" / f"{name}-{seed}", "val")[-1]
                              for name in PRETRAIN for seed in args.seeds}
    summary["tuning"] = {f"{name}-{seed}": events(args.work / "tuned" / f"{name}-{seed}", "ema")
                         for name in FINETUNE for seed in args.seeds}
    runs.save_json(args.results.with_suffix(".json"), summary)
    draw(summary, args.results)
    print(markdown_tables(summary))


def without_seed(lines):
    """A line of Fig. 7 is called <network>-<seed>, <rule>, and one of Fig. 8 <network>-<seed>."""
    parted = [(*line.partition(","), values) for line, values in lines.items()]
    return {f"{network.rpartition('-')[0]}{comma}{rule}": values for network, comma, rule, values in parted}


def draw(summary, results):
    """STEM-fig7.png and the others of FIGURES, with all seeds."""
    shares = np.linspace(0, 1, 11).tolist()
    for figure, names in FIGURES.items():
        by_seed = [{name: values for name, values in without_seed(lines).items() if name.partition(",")[0] in names}
                   for lines in summary[figure.partition("-")[0]]]
        path = results.with_name(f"{results.name}-{figure}.png")
        if figure.startswith("fig7"):
            distance = shlex.split(summary["pretrain"])
            more = {"i": shares, "distance_name": distance[distance.index("--distance") + 1]}
            probes.draw7(path, [{name.replace("-noise1", ", noise 1"): values | more
                                 for name, values in lines.items()} for lines in by_seed])
        else:
            probes.draw_areas(path, {NETWORKS[name]: [lines[name]["auc"] for lines in by_seed] for name in names})


def markdown_tables(summary):
    """The results as Markdown: scores and differences, pre-trainings, Fig. 7, Fig. 8."""
    parts = [f"{folder}, {values['images']} images\n\n{jobs.metric_tables(values)}"
             for folder, values in summary["sets"].items()]
    seeds = [f"seed {seed}" for seed in summary["seeds"]]

    checks = summary["pretraining"]
    names = [f"{metric}{end}" for metric in ("psnr", "percep") for end in ("", "_shuffled", "_bicubic")]
    names = [name for name in names if all(name in values for values in checks.values())]
    rows = [[network, *(f"{values[name]:.4g}" for name in names)] for network, values in checks.items()]
    parts.append(runs.markdown(["pre-training", *names], rows))

    def with_interval(values, form):
        value, low, high = (format(v, form) for v in values)
        return f"{value} [{low}, {high}]"

    lines = [without_seed(lines) for lines in summary["fig7"]]
    rows = [[name, *(with_interval(of_seed[name]["half_minus_clean"], "+.2f") for of_seed in lines)]
            for name in lines[0]]
    parts.append(runs.markdown(["PSNR of half a blur minus that of the true image, dB", *seeds], rows))

    for network in [name.rsplit("-", 1)[0] for name in summary["fig8"][0]]:
        areas = [of_seed[f"{network}-{seed}"]["auc"] for seed, of_seed in zip(summary["seeds"], summary["fig8"])]
        rows = [[degradation, *(with_interval(area[degradation], ".3f") for area in areas)]
                for degradation in areas[0]]
        parts.append(runs.markdown([f"area under the ROC curve of FAR, {network}", *seeds], rows))
    return "\n\n".join(parts)


def main(args):
    if args.redraw:
        draw(json.loads(args.redraw.read_text()), args.redraw.with_suffix(""))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if not args.vgg_weights.is_file():
        raise runs.UserError(f"--vgg-weights {args.vgg_weights}: no such file; python -m prepare.vgg19 makes it")
    networks = {FINETUNE[name][0] for name in args.variants}
    if "data" in args.stages:
        prepare(args)
    if "pretrain" in args.stages:
        jobs.parallel(args.jobs, [partial(pretrain, args, name, seed)
                                  for seed in args.seeds for name in PRETRAIN if name in networks])
    if "probe" in args.stages:
        jobs.parallel(args.jobs, [partial(probe, args, seed) for seed in args.seeds])
    if "finetune" in args.stages:
        jobs.parallel(args.jobs, [partial(tune_and_score, args, name, seed)
                                  for seed in args.seeds for name in args.variants])
    if "real" in args.stages:
        real(args)
    if "report" in args.stages:
        report(args)


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
