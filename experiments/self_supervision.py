"""Does HR-aware self-supervision help, and which part of it? A domain of one hidden degradation whose ground truth is kept; one resumable queue.

    PYTHONPATH=../shared/tools python -m experiments.self_supervision [data] [pretrain] [probe] [finetune] [real] [report]      all without a word; continues where it stopped

data      photos for pre-training; the test photos and as many others, degraded by `selfsup.py domain`: the domain, adapted to, and images of it that nothing is adapted to
pretrain  for every seed a reconstruction network each: LWay, baseline, + controller, + FAR, both, and those named below
probe     the paper's Fig. 7 (baseline, + controller) and Fig. 8 (+ FAR) on photos that pre-training did not see
finetune  the network --sr adapted with each of them, and with both but the controller's sign flipped (Table 4): all with equal steps
real      both and LWay, first seed, adapted to real photos without ground truth: before and after as a page
report    RESULTS.json, plots and the tables of README

The analysis was fixed before the runs. A difference is the mean over images of (mean over seeds of A - B); it is in bold when its 95 % BCa interval over the images excludes zero,
every seed has its sign, and a paired t test has p < .05 (tables.py). 100 steps of 2e-5 move a weight about as far as the paper's 300 to 600 of 2e-6 to 5e-6. Hypotheses of the paper: the method beats the network before on PSNR and on no-reference
quality (Table 1); + controller and + FAR each beat the baseline perceptually (Table 2); a controller of the other sign is worse (Table 4); without a controller half a blur reconstructs better
than the true image, with it this stops (Fig. 7); FAR is larger for degraded images (Fig. 8). The widths, patches and steps are those of a CPU, and LPIPS is replaced by
cosines of VGG19's features: nothing here is the paper's number.

Added after results, when a review had found that Eq. 8 asks R for s of about .9 and pre-training had shown it .2 +- .13 (--n-std .1): shifted, which keeps s where R was trained, and controller-noise1, both-noise1
and flipped-noise1 with the paper's noise of 1. That noise is drawn for each of the 512 numbers, so along an embedding it changes s by only some .08 (sqrt(3 / 512)) and R still never sees .9; what it
teaches is that an embedding's direction cannot be relied on. The latter two also have a fifth of the automatic weight of FAR (2.4e-3), which had left three of six networks below bicubic down-sampling:
they are to be compared with controller-noise1 and with each other, not with both.
"""
import argparse
import shlex
from pathlib import Path

import runs


SHARED = Path("../shared/data")
STAGES = ("data", "pretrain", "probe", "finetune", "real", "report")
PRETRAIN = {"LWay": "--arch lway", "baseline": "--s-rule one --no-far", "controller": "--no-far", "FAR": "--s-rule one", "both": "",
            "controller-noise1": "--no-far --n-std 1", "both-noise1": "--n-std 1 --lambda-pt 5e-4"}
FINETUNE = {name: (name, "") for name in PRETRAIN} | {"flipped": ("both", "--s-rule flip"), "shifted": ("both", "--s-rule shifted"), "flipped-noise1": ("both-noise1", "--s-rule flip")}          # (network, switches)
FIGURES = {"fig7": ("baseline", "controller"), "fig7-noise1": ("controller-noise1",), "fig8": ("FAR", "both"), "fig8-noise1": ("both-noise1",)}
COMMON = """--patch 32 --load-size 160 --degradation blur --batch-size 4 --group-size 2 --val-photos 6 --deg-enc bands --width 16 --blocks 3 2 4 --distance vgg --vgg-stages 2
--far-enc vgg --n-std 0.1 --total-steps 2000 --lr 1e-3 --ema-decay 0.99 --workers 0 --log-every 200 --save-every 200 --val-every 1000"""
TUNE = "--patch 32 --batch-size 4 --total-steps 100 --lr 2e-5 --ema-decay 0.95 --workers 0 --log-every 25 --save-every 25 --val-every 100"
METRICS = ("psnr", "ssim", "vgg", "niqe", "brisque", "cnniqa_live:build")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=runs.Help)
    p.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    g = p.add_argument_group("data")
    g.add_argument("--photos", type=Path, nargs="+", default=[SHARED / "images" / name for name in ("hr_kodak24", "hr_urban100", "hr_bsd100")], metavar="DIR",
                   help="photos for pre-training; every other one of the last folder is kept out of it")
    g.add_argument("--test", type=Path, nargs="+", default=[SHARED / "images" / name for name in ("test_set5", "test_set14")], metavar="DIR", help="photos of the domain that is adapted to")
    g.add_argument("--real", type=Path, default=SHARED / "images" / "lr_realsrset", metavar="DIR", help="real low-resolution photos")
    g.add_argument("--sr", type=Path, default=SHARED / "weights" / "sr" / "realesr-general-x4v3_fp16.pth", metavar="PATH", help="x4 network to adapt")
    g.add_argument("--domain", default="", help="flags of `selfsup.py domain`; default: its own")
    g = p.add_argument_group("runs")
    g.add_argument("--pretrain", default=COMMON, help="flags of all pre-trainings (CHOICE: what two cores do)")
    g.add_argument("--finetune", default=TUNE, help="flags of all fine-tunings (CHOICE)")
    g.add_argument("--seeds", type=runs.COUNT, nargs="+", default=[0, 1, 2])
    g.add_argument("--vgg-weights", type=Path, default=Path("runs/vgg19.pth"), metavar="FILE", help="see selfsup.py; README says how to make it of the shared weights")
    g.add_argument("--metrics", nargs="+", default=list(METRICS), help="psnr and ssim on Y, whole images")
    g.add_argument("--metric-weights", nargs="*", default=[f"niqe={SHARED}/weights/iqa/niqe_modelparameters.mat", f"brisque={SHARED}/weights/iqa/brisque_svm_weights.pth"], metavar="NAME=FILE")
    g.add_argument("--variants", nargs="+", choices=list(FINETUNE), default=list(FINETUNE), metavar="NAME", help=f"what pretrain, probe and finetune work at: {', '.join(FINETUNE)}; report wants all")
    g.add_argument("--jobs", type=runs.SIZE, default=2, help="runs at a time, one thread each")
    g.add_argument("--work", type=Path, default=Path("runs/selfsup-experiment"), metavar="DIR", help="runs and data sets")
    g.add_argument("--results", type=Path, default=Path("results/selfsup"), metavar="STEM", help="leaves STEM.json and the probes' plots, STEM-fig7.png and others")
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
from images import list_images
from report import tables


def prepare(args):
    images = lambda folder: list(list_images(folder).values())
    last = images(args.photos[-1])
    if not (args.work / "hr").exists():
        jobs.copy_photos([path for folder in args.photos[:-1] for path in images(folder)] + last[::2], args.work / "hr.tmp")
        (args.work / "hr.tmp").rename(args.work / "hr")
    for name, files in (("domain", [path for folder in args.test for path in images(folder)]), ("held", last[1::2])):
        if (args.work / name / "domain.json").exists():
            continue
        jobs.copy_photos(files, args.work / f"{name}-photos")
        jobs.call(args.work / f"{name}.log", "selfsup", "domain", "--hr", args.work / f"{name}-photos", "--out", args.work / name, *shlex.split(args.domain))


def pretrain(args, name, seed):
    out = args.work / "rec" / f"{name}-{seed}"
    jobs.once(out / "weights" / "rec.pth", out.with_suffix(".log"), "selfsup", "pretrain", "--hr", args.work / "hr", "--vgg-weights", args.vgg_weights, *shlex.split(args.pretrain), *shlex.split(PRETRAIN[name]),
                 "--seed", seed, "--out", out, "--resume", "auto")


def probe(args, seed):
    rec = lambda name: args.work / "rec" / f"{name}-{seed}"
    for figure, nets in FIGURES.items():
        out = args.work / "probe" / f"{figure}-{seed}"
        if set(nets) <= set(args.variants):
            jobs.once(out.with_name(out.name + ".json"), out.with_suffix(".log"), "selfsup", "probe", figure.partition("-")[0], "--rec", *map(rec, nets), "--hr", args.work / "held-photos", "--vgg-weights", args.vgg_weights, "--out", out)


def finetune(args, name, seed, lr_dir, gt_dir, out):
    net, switches = FINETUNE[name]
    jobs.call(out.with_suffix(".log"), "selfsup", "finetune", "--rec", args.work / "rec" / f"{net}-{seed}", "--sr", args.sr, "--lr-dir", lr_dir, *(["--gt-dir", gt_dir] if gt_dir else []),
                 "--vgg-weights", args.vgg_weights, *shlex.split(args.finetune), *shlex.split(switches), "--seed", seed, "--out", out, "--resume", "auto")


def score(args, weights, folder, out, *more):
    files = [file for path in weights for file in (path.glob("weights/*.pth") if path.is_dir() else [path])]
    if not out.exists() or any(file.stat().st_mtime > out.stat().st_mtime for file in files):                # of a longer tuning
        jobs.call(out.with_suffix(".log"), "evaluate.py", "--weights", *weights, "--lq", folder / "lq", "--gt", folder / "gt", "--protocol", "whole-y", "--baselines", "--metrics", *args.metrics,
                     "--metric-weights", *args.metric_weights, *([f"vgg={args.vgg_weights}"] if "vgg" in args.metrics else []), "--out-json", out, "--cache", args.work / "evaluation-cache", *more)
    return json.loads(out.read_text())


def one_run(args, name, seed):
    out = args.work / "tuned" / f"{name}-{seed}"
    finetune(args, name, seed, args.work / "domain" / "lq", args.work / "domain" / "gt", out)
    for folder in ("domain", "held"):
        score(args, [out], args.work / folder, args.work / "scores" / f"{folder}-{name}-{seed}.json")


def real(args):
    """RESULTS: a page of the real photos before, after LWay and after the method."""
    seed, outs = args.seeds[0], []
    for name in ("LWay", "both"):
        outs.append(args.work / "real" / f"{name}-{seed}")
        finetune(args, name, seed, args.real, None, outs[-1])
    alone = [m for m in args.metrics if m not in runs.literal("metrics", "FULL_REFERENCE")]
    jobs.call(args.work / "real.log", "evaluate.py", "--weights", args.sr, *outs, "--names", "before", *(out.name for out in outs), "--lq", args.real, "--baselines", "bicubic", "--metrics", *alone,
                 "--metric-weights", *args.metric_weights, "--out-json", args.results.with_name(args.results.name + "-real.json"), "--page", args.work / "real.html", "--cache", args.work / "evaluation-cache")


def report(args):
    summary = {"command": sys.argv, **runs.describe_machine(), "seeds": args.seeds, "pretrain": args.pretrain, "finetune": args.finetune, "sets": {}}
    for folder in ("domain", "held"):
        before = score(args, [args.sr], args.work / folder, args.work / "scores" / f"{folder}-before.json")
        lower, stems = before["lower_is_better"], sorted(next(iter(before["scores"].values())))
        scores = lambda result: [[next(iter(result["scores"].values()))[stem][m] for m in lower] for stem in stems]
        values = {"before": np.array([scores(before)] * len(args.seeds))}
        values |= {name: np.array([scores(json.loads((args.work / "scores" / f"{folder}-{name}-{seed}.json").read_text())) for seed in args.seeds]) for name in FINETUNE}
        pairs = [(name, "before") for name in FINETUNE] + [("controller", "baseline"), ("FAR", "baseline"), ("both", "baseline"), ("both", "LWay"), ("both", "flipped"), ("both", "shifted"), ("shifted", "baseline"),
                                                           ("controller-noise1", "baseline"), ("both-noise1", "baseline"), ("both-noise1", "controller-noise1"), ("both-noise1", "LWay"), ("both-noise1", "flipped-noise1")]
        summary["sets"][folder] = {"images": len(stems), "metrics": list(lower), "lower_is_better": lower, "mean": {name: v.mean((0, 1)).tolist() for name, v in values.items()},
                                   "seed_means": {name: v.mean(1).tolist() for name, v in values.items() if name != "before"},
                                   "differences": {f"{a} - {b}": {m: tables.difference(values[a][..., k], values[b][..., k]) for k, m in enumerate(lower)} for a, b in pairs}}
    lines_of = lambda figure, seed: {k: v for name in FIGURES if name.startswith(figure) for k, v in json.loads((args.work / "probe" / f"{name}-{seed}.json").read_text())["lines"].items()}
    figures = {figure: [lines_of(figure, seed) for seed in args.seeds] for figure in ("fig7", "fig8")}
    summary["fig7"] = [{line: {k: v[k] for k in ("half_minus_clean", "psnr", "distance", "photos", "crops")} for line, v in lines.items()} for lines in figures["fig7"]]
    summary["fig8"] = [{net: {k: v[k] for k in ("auc", "photos", "crops", "far_enc")} for net, v in lines.items()} for lines in figures["fig8"]]
    for figure in FIGURES:
        source = args.work / "probe" / f"{figure}-{args.seeds[0]}.png"
        runs.write_atomic(args.results.with_name(f"{args.results.name}-{figure}.png"), lambda t: t.write_bytes(source.read_bytes()))
    events = lambda folder, split: [e for e in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if e["split"] == split]
    summary["pretraining"] = {f"{name}-{seed}": events(args.work / "rec" / f"{name}-{seed}", "val")[-1] for name in PRETRAIN for seed in args.seeds}
    summary["tuning"] = {f"{name}-{seed}": [e for e in events(args.work / "tuned" / f"{name}-{seed}", "ema")] for name in FINETUNE for seed in args.seeds}
    runs.save_json(args.results.with_suffix(".json"), summary)
    print(readme_tables(summary))


def readme_tables(summary):
    """The Markdown that README shows."""
    parts = [f"{folder}, {found['images']} images\n\n{jobs.metric_tables(found)}" for folder, found in summary["sets"].items()]
    first = summary["pretraining"].values()
    names = [name for name in ("psnr", "psnr_shuffled", "psnr_bicubic", "percep", "percep_shuffled", "percep_bicubic") if all(name in v for v in first)]
    parts.append(runs.markdown(["pre-training", *names], [[net, *(f"{v[name]:.4g}" for name in names)] for net, v in summary["pretraining"].items()]))
    cell = lambda d: f"{d[0]:+.2f} [{d[1]:+.2f}, {d[2]:+.2f}]"
    strip = lambda lines: {line.partition(",")[0].rsplit("-", 1)[0] + "," + line.partition(",")[2]: v for line, v in lines.items()}
    lines = list(strip(summary["fig7"][0]))
    parts.append(runs.markdown(["PSNR of half a blur minus that of the true image, dB", *(f"seed {s}" for s in summary["seeds"])],
                               [[line, *(cell(strip(found)[line]["half_minus_clean"]) for found in summary["fig7"])] for line in lines]))
    area = lambda d: f"{d[0]:.3f} [{d[1]:.3f}, {d[2]:.3f}]"
    for net in [name.rsplit("-", 1)[0] for name in summary["fig8"][0]]:
        kinds = next(iter(summary["fig8"][0].values()))["auc"]
        parts.append(runs.markdown([f"area under the ROC curve of FAR, {net}", *(f"seed {s}" for s in summary["seeds"])],
                                   [[kind, *(area(found[f"{net}-{s}"]["auc"][kind]) for s, found in zip(summary["seeds"], summary["fig8"]))] for kind in kinds]))
    return "\n\n".join(parts)


def main(args):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if not args.vgg_weights.is_file():
        raise runs.UserError(f"--vgg-weights {args.vgg_weights}: no such file; python ../shared/tools/vgg19_for_torchvision.py makes it of the shared weights")
    wanted = {FINETUNE[name][0] for name in args.variants}
    if "data" in args.stages:
        prepare(args)
    if "pretrain" in args.stages:
        jobs.parallel(args.jobs, [partial(pretrain, args, name, seed) for seed in args.seeds for name in PRETRAIN if name in wanted])
    if "probe" in args.stages:
        jobs.parallel(args.jobs, [partial(probe, args, seed) for seed in args.seeds])
    if "finetune" in args.stages:
        jobs.parallel(args.jobs, [partial(one_run, args, name, seed) for seed in args.seeds for name in args.variants])
    if "real" in args.stages:
        real(args)
    if "report" in args.stages:
        report(args)


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
