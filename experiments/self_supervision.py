"""Does HR-aware self-supervision help the network it was made for, and which part of it? One resumable queue.

    python -m experiments.self_supervision                       all stages; resumes where it stopped
    python -m experiments.self_supervision tune report           some of them

data      photographs for pre-training; the test photographs under two hidden degradations (prepare.degrade, camera):
          "inside" what pre-training draws (lr-grid) and "outside" of it; 20 pairs of RealSR
pretrain  for every seed one reconstruction network each: LWay, baseline, + controller, + FAR, both
probe     the paper's Fig. 7 (baseline, + controller) and Fig. 8 (+ FAR) on photographs that pre-training did not see
tune      RealESRGAN_x4plus adapted to every domain with each of them, and with "both" and the other sign of the
          controller (Table 4); the compact network with "both" as one row
controls  the start's outputs, blurred and sharpened until their PSNR is nearest to that of "both"
precision start and "both" in fp32 on ten images, since everything else is scored in bf16
report    the results as JSON, plots, and tables

PRE-REGISTERED before any run, after a first experiment (docs/results-selfsup.md) that adapted a network with a
pixel-shuffle tail, moved its weights further than the paper can, in a domain that pre-training had not seen. A
difference is the mean over images of (mean over seeds of A - B). It is in bold when its 95 % BCa interval over the
images excludes zero, every seed has its sign, and a paired t test has p < 0.05 (report.tables). Three seeds for
"baseline" and "both", one for the others: a difference takes the seeds that both have. 100 steps of 5e-6 with EMA 0.95
move the averaged weights by at most 4.1e-4, within the paper's 8e-5 to 7.5e-4; the report has the largest movement.
Hypotheses, each per domain:
1. both - before: PSNR up, VGG distance down (Table 1); LWay - before: PSNR up.
2. controller - baseline and FAR - baseline: VGG distance down (Table 2).
3. both - flipped: PSNR up or VGG distance down (Table 4).
4. both - blur control and both - unsharp control: VGG distance down. If not, adaptation did no more than a filter.
5. Fig. 7: without a controller half a blur reconstructs better than the true image, with Eq. 8 this stops. Fig. 8: FAR
   is larger for degraded images, blur included.
6. Gains are larger inside than outside.
No network is left out (--force), but one that does not beat bicubic down-sampling, or a FAR whose T predicts less than
half of the descriptors' energy, counts as not tested: the report shows both.
PSNR and SSIM are on Y; VGG19's features stand for LPIPS and CLIP; NIQE is reported and decides nothing. Networks,
patches and steps of stage 1 are those of a CPU: no number here is the paper's.
"""
import shlex
from pathlib import Path

import runs

DATA = Path(runs.literal("experiments/jobs", "DATA"))
STAGES = ("data", "pretrain", "probe", "tune", "controls", "precision", "report")
# flags of prepare.degrade; lr-grid draws sigmas up to 4, noise up to 12 grey levels, quality from 20
DOMAINS = {"inside": "--blur 2.5 1.2 --angle 30 --noise 5 --jpeg 60",
           "outside": "--blur 5 2 --angle 30 --noise 16 --jpeg 15"}
# flags of pretrain
PRETRAIN = {"LWay": "--arch lway", "baseline": "--s-rule one --no-far", "controller": "--no-far", "FAR": "--s-rule one",
            "both": ""}
# pre-training, and flags of finetune
FINETUNE = {name: (name, "") for name in PRETRAIN} | {"flipped": ("both", "--s-rule flip")}
# of RealSR's pairs, which no pre-training imitates
ON_REALSR = ("LWay", "baseline", "both")
# those with all --seeds; the others have the first
REPEATED = ("baseline", "both")
PAIRS = [("controller", "baseline"), ("FAR", "baseline"), ("both", "baseline"), ("both", "LWay"), ("both", "flipped"),
         ("both", "blur control"), ("both", "unsharp control")]
# rows that are no outputs of an adapted network
CONTROLS = ("before", "before, compact", "blur control", "unsharp control")
# of the second set of names: the first experiment, for --redraw
FIGURES = {"fig7": ("baseline", "controller"), "fig8": ("FAR", "both"), "fig7-noise1": ("controller-noise1",),
           "fig8-noise1": ("both-noise1",)}
NETWORKS = {"FAR": "FAR alone", "both": "FAR and controller", "both-noise1": "FAR and controller, noise 1"}
# CHOICE: sized for two cores, every run under 20 minutes
COMMON = ("--patch 32 --load-size 160 --degradation lr-grid --batch-size 4 --group-size 2 --val-photos 6 "
          "--deg-enc bands --size small --distance vgg --far-enc vgg --n-std 0.1 --total-steps 2000 --lr 1e-3 "
          "--ema-decay 0.99 --workers 0 --log-every 200 --save-every 200 --val-every 1000")
TUNE = ("--patch 24 --batch-size 2 --total-steps 100 --lr 5e-6 --ema-decay 0.95 --workers 0 --log-every 25 "
        "--save-every 25 --val-every 50 --precision bf16 --force")
METRICS = ("psnr", "ssim", "vgg", "niqe")
# pairs of RealSR, and images of the stage precision
PAIRS_OF_REALSR, IN_FP32 = 20, 10
# strengths of the controls: sigmas of the blur in HR pixels, amounts of the unsharp mask
SIGMAS, AMOUNTS = (0.3, 0.5, 0.7, 0.9, 1.1, 1.4, 1.8, 2.3), (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2)


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    images, iqa = DATA / "images", DATA / "weights" / "iqa"
    g = p.add_argument_group("data (docs/data.md says where it comes from)")
    g.add_argument("--photos", type=Path, nargs="+", metavar="DIR",
                   default=[images / name for name in ("hr_kodak24", "hr_urban100", "hr_bsd100")],
                   help="photographs for pre-training; every other one of the last folder is kept for the probes")
    g.add_argument("--test", type=Path, nargs="+", default=[images / name for name in ("test_set5", "test_set14")],
                   metavar="DIR", help="photographs of the domains that are adapted to")
    g.add_argument("--realsr", type=Path, default=images / "pairs_realsr", metavar="DIR",
                   help="pairs <name>_LR and <name>_HR of RealSR")
    g.add_argument("--sr", type=runs.CHECKPOINT, metavar="PATH",
                   default=Path("weights/downloads/RealESRGAN_x4plus.pth"),
                   help="x4 network to adapt, which python -m prepare.weights fetches")
    g.add_argument("--compact", type=Path, default=DATA / "weights" / "sr" / "realesr-general-x4v3_fp16.pth",
                   metavar="PATH", help="the network of the first experiment: one row")
    g.add_argument("--vgg-weights", type=Path, default=Path("runs/vgg19.pth"), metavar="FILE",
                   help="VGG19, which python -m prepare.vgg19 makes")
    g = p.add_argument_group("runs")
    g.add_argument("--pretrain", default=COMMON, help="flags of all pre-trainings (CHOICE)")
    g.add_argument("--finetune", default=TUNE, help="flags of all fine-tunings (CHOICE)")
    g.add_argument("--seeds", type=runs.COUNT, nargs="+", default=[0, 1, 2])
    g.add_argument("--metrics", nargs="+", default=list(METRICS), help="psnr and ssim on Y, whole images")
    g.add_argument("--metric-weights", nargs="*", metavar="NAME=FILE", default=[f"niqe={iqa}/niqe_modelparameters.mat"])
    g.add_argument("--jobs", type=runs.SIZE, default=2, help="runs at a time, one thread each")
    g.add_argument("--work", type=Path, default=Path("runs/selfsup-experiment-2"), metavar="DIR",
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
import re
import signal
import sys
from functools import partial

import numpy as np

import degradations
import metrics
from experiments import jobs
from images import list_images, load_image, save_image
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
    for name, files in (("held", last[1::2]), ("test", [path for folder in args.test for path in images(folder)])):
        if not (args.work / f"{name}-photos").exists():
            jobs.copy_photos(files, args.work / f"{name}-photos.tmp")
            (args.work / f"{name}-photos.tmp").rename(args.work / f"{name}-photos")
    for name, flags in DOMAINS.items():
        if not (args.work / name).exists():
            jobs.call(args.work / f"{name}.log", "prepare.degrade", args.work / "test-photos", args.work / name,
                      "--degradation", "camera", *shlex.split(flags))
    if not (args.work / "realsr").exists():
        jobs.copy_realsr(args.realsr, args.work / "realsr.tmp", PAIRS_OF_REALSR)
        (args.work / "realsr.tmp").rename(args.work / "realsr")


def seeds_of(args, name):
    return args.seeds if name in REPEATED else args.seeds[:1]


def pretrain(args, name, seed):
    out = args.work / "rec" / f"{name}-{seed}"
    jobs.once(out / "weights" / "rec.pth", out.with_suffix(".log"), "selfsup.pretrain", "--hr", args.work / "hr",
              "--vgg-weights", args.vgg_weights, *shlex.split(args.pretrain), *shlex.split(PRETRAIN[name]),
              "--seed", seed, "--out", out, "--resume", "auto")


def probe(args):
    """Fig. 7 and Fig. 8 of the first seed, of which all networks are there."""
    seed = args.seeds[0]
    for figure in ("fig7", "fig8"):
        out = args.work / "probe" / f"{figure}-{seed}"
        networks = [args.work / "rec" / f"{name}-{seed}" for name in FIGURES[figure]]
        jobs.once(out.with_name(out.name + ".json"), out.with_suffix(".log"), "selfsup.probe", figure, "--rec",
                  *networks, "--hr", args.work / "held-photos", "--vgg-weights", args.vgg_weights, "--out", out)


def score(args, folder, out, *row):
    """evaluate.py's JSON of one row on a folder of pairs: "--weights" PATH or "--images" DIR, and further flags."""
    if not out.exists():
        vgg = [f"vgg={args.vgg_weights}"] if "vgg" in args.metrics else []
        jobs.call(out.with_suffix(".log"), "evaluate.py", "--protocol", "whole-y", *row, "--baselines",
                  "--lq", folder / "lq", "--gt", folder / "gt", "--metrics", *args.metrics,
                  "--metric-weights", *args.metric_weights, *vgg, "--out-json", out,
                  "--cache", args.work / "evaluation-cache")
    return json.loads(out.read_text())


def tune_and_score(args, domain, name, seed, sr=None):
    """name: of FINETUNE; sr: another network to adapt, "compact"."""
    network, switches = FINETUNE[name]
    row = f"{name}, {sr}" if sr else name
    out = args.work / "tuned" / f"{domain}-{row.replace(', ', '-')}-{seed}"
    jobs.call(out.with_suffix(".log"), "selfsup.finetune", "--rec", args.work / "rec" / f"{network}-{seed}",
              "--sr", args.compact if sr else args.sr, "--lr-dir", args.work / domain / "lq",
              "--vgg-weights", args.vgg_weights, *shlex.split(args.finetune), *shlex.split(switches),
              "--seed", seed, "--out", out, "--resume", "auto")
    score(args, args.work / domain, scores_file(args, domain, row, seed), "--weights", out, "--precision", "bf16")


def scores_file(args, domain, row, seed):
    return args.work / "scores" / f"{domain}-{row.replace(', ', '-').replace(' ', '-')}-{seed}.json"


def score_start(args, domain, row, sr):
    """The network before tuning. -> its result; its outputs are kept for the controls."""
    return score(args, args.work / domain, scores_file(args, domain, row, 0), "--weights", sr, "--precision", "bf16",
                 "--names", "start", "--save", args.work / "outputs" / domain / row.replace(", ", "-"))


def controls(args, domain):
    """The start's outputs under a blur, and under an unsharp mask, of the strength whose mean PSNR is nearest to that
    of "both"; both are scored like networks."""
    score_start(args, domain, "before", args.sr)
    outputs = args.work / "outputs" / domain / "before" / "start"
    goal = json.loads(scores_file(args, domain, "both", args.seeds[0]).read_text())["mean"]
    goal = next(iter(goal.values()))["psnr"]
    gt = {stem: load_image(path)[None].float() / 255 for stem, path in list_images(args.work / domain / "gt").items()}
    start = {stem: load_image(outputs / f"{stem}.png")[None].float() / 255 for stem in gt}

    def blurred(image, sigma):
        return degradations.to_8bit(degradations.blur(image, degradations.gaussian_kernel(21, sigma)))
    for name, change, strengths in (("blur control", blurred, SIGMAS), ("unsharp control", metrics.unsharp, AMOUNTS)):
        def psnr(strength, change=change):
            values = [metrics.psnr(metrics.luma(change(start[stem], strength)), metrics.luma(gt[stem]), 0).item()
                      for stem in gt]
            return np.mean(values)
        best = min(strengths, key=lambda strength: abs(psnr(strength) - goal))
        folder = args.work / "outputs" / domain / name.replace(" ", "-")
        for stem in gt:
            save_image(folder / f"{stem}.png", change(start[stem], best)[0])
        runs.save_json(folder.with_suffix(".json"), {"strength": best, "psnr": psnr(best), "goal": goal})
        score(args, args.work / domain, scores_file(args, domain, name, 0), "--images", folder)


def precision(args):
    """Start and "both" in fp32 and bf16 on the first images of "inside". -> {row: {metric: largest difference}}"""
    names = sorted(list_images(args.work / "inside" / "lq"))[:IN_FP32]
    only = args.work / "in-fp32.txt"
    only.write_text("".join(f"{name}\n" for name in names))
    differences, seed = {}, args.seeds[0]
    for row, weights in (("before", args.sr), ("both", args.work / "tuned" / f"inside-both-{seed}")):
        exact = score(args, args.work / "inside", args.work / "scores" / f"fp32-{row}.json", "--weights", weights,
                      "--only", only)
        exact, = exact["scores"].values()
        rounded = json.loads(scores_file(args, "inside", row, 0 if row == "before" else seed).read_text())
        rounded, = rounded["scores"].values()
        differences[row] = {m: max(abs(exact[name][m] - rounded[name][m]) for name in names) for m in args.metrics}
    runs.save_json(args.work / "precision.json", differences)


def rows_of(args, domain):
    """[(row, seeds)] of the domain's table."""
    names = ON_REALSR if domain == "realsr" else FINETUNE
    rows = [("before", [0]), *((name, seeds_of(args, name)) for name in names), ("blur control", [0]),
            ("unsharp control", [0])]
    return rows + ([("before, compact", [0]), ("both, compact", args.seeds[:1])] if domain == "inside" else [])


def compare(args, domain):
    """Scores of all rows of a domain, and their differences."""
    values, movement = {}, {}
    for row, seeds in rows_of(args, domain):
        results = [json.loads(scores_file(args, domain, row, seed).read_text()) for seed in seeds]
        lower = results[0]["lower_is_better"]
        images = [next(iter(result["scores"].values())) for result in results]
        stems = sorted(images[0])
        # (seeds, images, metrics)
        values[row] = np.array([[[scores[stem][m] for m in lower] for stem in stems] for scores in images])
        logs = [args.work / "tuned" / f"{domain}-{row.replace(', ', '-')}-{seed}" / "log.txt" for seed in seeds]
        moved = [re.findall(r"movement of the averaged weights: ([\d.e-]+)", log.read_text())[-1]
                 for log in logs if log.exists()]
        movement |= {row: [float(text) for text in moved]} if moved else {}
    pairs = [*((row, "before") for row in values if row in FINETUNE), *PAIRS, ("both, compact", "before, compact")]
    differences = {}
    for a, b in (pair for pair in pairs if set(pair) <= set(values)):
        count = len(values[a]) if b in CONTROLS else min(len(values[a]), len(values[b]))
        # a control is the same for every seed
        second = values[b].repeat(count, 0) if b in CONTROLS else values[b][:count]
        differences[f"{a} - {b}"] = {m: tables.difference(values[a][:count, :, k], second[..., k])
                                     for k, m in enumerate(lower)}
    return {"images": len(stems), "metrics": list(lower), "lower_is_better": lower, "movement": movement,
            "mean": {name: v.mean((0, 1)).tolist() for name, v in values.items()},
            "seed_means": {name: v.mean(1).tolist() for name, v in values.items() if len(v) > 1},
            "differences": differences}


def events(folder, split):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [event for event in lines if event["split"] == split]


def probed(args, figure, seed, keys):
    """{line or network: its `keys`} of the probe of Fig. 7 or Fig. 8."""
    lines = json.loads((args.work / "probe" / f"{figure}-{seed}.json").read_text())["lines"]
    return {name: {key: values[key] for key in keys} for name, values in lines.items()}


def report(args):
    summary = {"command": sys.argv, **runs.describe_machine(), "seeds": args.seeds, "pretrain": args.pretrain,
               "finetune": args.finetune, "sets": {domain: compare(args, domain) for domain in (*DOMAINS, "realsr")},
               "precision": json.loads((args.work / "precision.json").read_text())}
    for figure, keys in (("fig7", ("half_minus_clean", "psnr", "distance", "photos", "crops")),
                         ("fig8", ("auc", "photos", "crops", "far_enc"))):
        summary[figure] = [probed(args, figure, args.seeds[0], keys)]
    summary["pretraining"] = {f"{name}-{seed}": events(args.work / "rec" / f"{name}-{seed}", "val")[-1]
                              for name in PRETRAIN for seed in seeds_of(args, name)}
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
        if not all(by_seed):
            continue
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
    seeds = [f"seed {seed}" for seed in summary["seeds"]][:len(summary["fig7"])]

    checks = summary["pretraining"]
    names = [f"{metric}{end}" for metric in ("psnr", "percep") for end in ("", "_shuffled", "_bicubic")] + ["explained"]
    rows = [[network, *(f"{values[name]:.4g}" if name in values else "" for name in names)]
            for network, values in checks.items()]
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
    for flag, file in (("--vgg-weights", args.vgg_weights), ("--sr", args.sr), ("--compact", args.compact)):
        if not file.is_file():
            raise runs.UserError(f"{flag} {file}: no such file; --help says what makes it")
    domains = (*DOMAINS, "realsr")
    if "data" in args.stages:
        prepare(args)
    if "pretrain" in args.stages:
        jobs.parallel(args.jobs, [partial(pretrain, args, name, seed)
                                  for name in PRETRAIN for seed in seeds_of(args, name)])
    if "probe" in args.stages:
        probe(args)
    if "tune" in args.stages:
        tasks = [partial(score_start, args, domain, "before", args.sr) for domain in domains]
        tasks += [partial(tune_and_score, args, domain, name, seed) for domain in domains
                  for name in (ON_REALSR if domain == "realsr" else FINETUNE) for seed in seeds_of(args, name)]
        tasks += [partial(score_start, args, "inside", "before, compact", args.compact),
                  partial(tune_and_score, args, "inside", "both", args.seeds[0], "compact")]
        jobs.parallel(args.jobs, tasks)
    if "controls" in args.stages:
        for domain in domains:
            controls(args, domain)
    if "precision" in args.stages:
        precision(args)
    if "report" in args.stages:
        report(args)


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
