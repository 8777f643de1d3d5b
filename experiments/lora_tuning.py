"""Does LoRA keep the optimisation from fooling the quality model? The paper's Fig. 3 in small.

    python -m experiments.lora_tuning                           both stages, runs and report; resumes where it stopped

Every seed's AMO network (first reward of samplers.py) is tuned by that reward in several ways, and judged where the
reward on held-out photos has gained each of --gains:
    lora     adapters of rank 16 on the convolutions between the first and the last
    layers   the full weights of these convolutions: the choice of layers without the low rank
    naive    all weights
    lora64   adapters of rank 64, which is full rank here: the parametrisation without the low rank (added after the
             first three were seen)

The analysis was fixed before the runs of the first three: metrics, test images, intervals and verdicts of samplers.py,
as differences from the network before tuning and from lora at the same gain; structured noise (metrics.noise_peaks of
SR after - SR before) on each test image against that of an unsharp mask with as much reward, or with as much as
sharpening can have. The hypothesis is the paper's: naive tuning leaves structured noise and LoRA does not; `layers`
tells whether the rank does that. Last, the strength of the first seed's adapter from 0 to 1.5: reward against PSNR and
VGG distance.
"""
import shlex
from pathlib import Path

import runs

STAGES = ("runs", "report")
VARIANTS = {"lora": "--tune lora --lr 2e-4".split(), "layers": "--tune layers --lr 2e-5".split(),
            "naive": "--tune all --lr 2e-5".split(), "lora64": "--tune lora --rank 64 --lr 2e-4".split()}
TUNE = """--lambda-q auto --total-steps 200 --ema-decay 0.9 --val-every 2 --val-photos 2 --milestones
          --watch ranker piqe --log-every 2 --save-every 20 --workers 0""".split()
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default both")
    p.add_argument("--gains", type=runs.RATE, nargs="+", default=[4.0, 8.0, 16.0], metavar="POINTS",
                   help="rising: of the reward on the validation images, at which the tuned networks are compared")
    p.add_argument("--tune", default="", metavar="'FLAGS'", help="further flags of finetune_lora.py")
    p.add_argument("--results", type=Path, metavar="STEM",
                   help="one JSON file per tuning and gain in this folder, tables and pictures beside it; default: "
                        "lora_tuning in samplers.py's --work")
    p.add_argument("--samplers", default="", metavar="'FLAGS'",
                   help="flags that samplers.py was given: --work, --seeds, --vgg-weights, --jobs, ...")
    p.add_argument("--redraw", type=Path, metavar="FILE.json",
                   help="draw the plot of an earlier report's strengths beside it again, and do nothing else")
    args = p.parse_args(argv)
    args.stages = args.stages or list(STAGES)
    args.tune = TUNE + shlex.split(args.tune)
    if set(args.stages) - set(STAGES):
        p.error(f"stages are {', '.join(STAGES)}; got {' '.join(args.stages)}")
    if args.gains != sorted(set(args.gains)):
        gains = " ".join(f"{gain:g}" for gain in args.gains)
        p.error(f"--gains {gains}: every one must be larger than the one before")
    return args


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import json
import shutil
import signal
import sys
from functools import partial

import numpy as np
import torch

import archs
import degradations
import iqa
import lora
import metrics
from experiments import jobs, samplers
from experiments.sampler_report import label
from images import list_images
from report import pictures, style, tables


def base_of(exp, seed):
    """The AMO run of samplers.py; exp: its flags."""
    return exp.work / "runs" / f"amo-{label(exp.rewards[0])}-{seed}"


def row_name(variant, gain):
    return f"{variant} +{gain:g}"


def weights_at(exp, variant, gain, seed):
    """The merged generator as it was at this gain."""
    return exp.work / "lora" / f"{variant}-{seed}-{gain:g}.pth"


# Stage 1: tunings

def one_run(args, exp, variant, seed):
    """Tune to one gain after the other; at each: RESULTS/<variant>-<seed>-<gain>.json. Resumes where it stopped."""
    run = exp.work / "lora" / f"{variant}-{seed}"
    flags = [str(word) for word in [*args.tune, *VARIANTS[variant], "--reward", exp.rewards[0]]]
    base = lora.base_hash(archs.load_x4(base_of(exp, seed), "--work")[0])
    for gain in args.gains:
        weights = weights_at(exp, variant, gain, seed)
        file = args.results / f"{weights.stem}.json"
        if file.exists():
            record = json.loads(file.read_text())
            if (record["tune"], record["base"]) != (flags, base):
                how = "with other settings of the tuning" if record["base"] == base else "from another network"
                raise runs.UserError(f"{file}: made {how}: choose another --results, and --work in --samplers")
            continue
        if not weights.exists():
            jobs.call(run.with_suffix(".log"), "finetune_lora.py", *flags, "--base", base_of(exp, seed), "--out", run,
                      "--stop-gain", gain, "--device", exp.device, "--resume", "auto")
        steps = validations(run, gain)
        last = runs.load_checkpoint(run / "ckpt" / "last.pt")
        if not weights.exists():
            if last["step"] != steps[-1]["step"]:
                raise runs.UserError(f"{run}: at step {last['step']}, but the gain of {gain:g} was there at step "
                                     f"{steps[-1]['step']}: remove this run to tune again")
            runs.write_atomic(weights, partial(shutil.copy, run / "weights" / "merged.pth"))
        names = [*exp.rewards, *exp.unseen, *jobs.WITH_REFERENCE]
        judged = jobs.evaluate(exp, weights, weights.with_suffix(".json"), names)
        kept = {key: judged[key] for key in (*jobs.MADE_BY, "lower_is_better")}
        runs.save_json(file, {"tune": flags, "base": base, **kept, "steps": steps[-1]["step"],
                              "gain": steps[-1]["reward"] - steps[0]["reward"], "lambda_q": last["lambda_q"],
                              "validation": steps, "scores": judged["scores"][weights.stem],
                              "peaks": structured_noise(exp, base_of(exp, seed), weights)})


def validations(run, gain):
    """The validations of a run, from that of the base to the first with this gain."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["split"] == "val"]
    gained = [event["reward"] - steps[0]["reward"] for event in steps]
    reached = next((k for k, value in enumerate(gained) if value >= gain), None)
    if reached is None:
        raise runs.UserError(f"{run}: the reward gained {max(gained):.1f} at most, and {gain:g} is asked for: more "
                             "--total-steps (--tune) or smaller --gains")
    return steps[:reached + 1]


@torch.no_grad()
def structured_noise(exp, before, after):
    """{test image: {"peaks", "unsharp", "equal", "grey_levels"}} of a tuning; before, after: weights.

    peaks: of the change by tuning; unsharp: of an unsharp mask of the network before with as much reward, or with as
    much as it can have; equal: whether it has as much; grey_levels: how strong the peaks are, the root mean square of
    the change times the root of their share.
    """
    reward, images = iqa.create_reward(exp.rewards[:1]), {}
    nets = [archs.load_x4(path, "--work")[0] for path in (before, after)]
    for stem in list_images(exp.work / "test" / "lq"):
        lq, _ = jobs.test_pair(exp.work, stem)
        old, new = (degradations.to_8bit(archs.upscale_tiled(net, lq)) for net in nets)
        (like, equal), peaks = metrics.unsharp_like(old, new, reward), metrics.noise_peaks(new - old).item()
        # luma of 16 to 235 as 0 to 255
        strength = 255 * metrics.luma(new - old).std().item() / (219 / 255) * peaks ** 0.5
        images[stem] = {"peaks": peaks, "grey_levels": strength, "unsharp": metrics.noise_peaks(like - old).item(),
                        "equal": equal}
    return images


# Stage 2: tables and pictures

def report(args, exp):
    """RESULTS.json with means, differences and the strengths; the tables; RESULTS.png and RESULTS-strength.png."""
    def load(path):
        return json.loads(path.read_text())
    results = {"before": [load(exp.results / f"{base_of(exp, seed).name}.json") for seed in exp.seeds]}
    for gain in args.gains:
        for variant in VARIANTS:
            files = [f"{weights_at(exp, variant, gain, seed).stem}.json" for seed in exp.seeds]
            results[row_name(variant, gain)] = [load(args.results / file) for file in files]
    tuned = {row: records for row, records in results.items() if row != "before"}
    lower = next(iter(tuned.values()))[0]["lower_is_better"]
    stems, names = sorted(results["before"][0]["scores"]), list(lower)

    def values(records):
        # (seeds, images, metrics)
        return np.array([[[record["scores"][stem][name] for name in names] for stem in stems] for record in records])

    def noise(key):
        # {row: (seeds, images)}
        return {row: np.array([[record["peaks"][stem][key] for stem in stems] for record in records])
                for row, records in tuned.items()}
    scores = {row: values(records) for row, records in results.items()}
    peaks, unsharp, equal, strong = map(noise, ("peaks", "unsharp", "equal", "grey_levels"))
    against = [(row_name(variant, gain), row_name("lora", gain)) for gain in args.gains for variant in VARIANTS
               if variant != "lora"]

    def differences(of):
        return {f"{a} - {b}": tables.difference(of[a], of[b]) for a, b in against}
    summary = {
        "command": sys.argv, **runs.describe_machine(), "images": len(stems), "seeds": exp.seeds, "metrics": names,
        "lower_is_better": lower, "mean": {row: v.mean((0, 1)).tolist() for row, v in scores.items()},
        "seed_means": {row: v.mean(1).tolist() for row, v in scores.items()},
        "tuning": {row: {key: [record[key] for record in records] for key in ("steps", "gain", "lambda_q")}
                   for row, records in tuned.items()},
        "differences": {f"{a} - {b}": {name: tables.difference(scores[a][..., k], scores[b][..., k])
                                       for k, name in enumerate(names)}
                        for a, b in [*((row, "before") for row in tuned), *against]},
        "structured_noise": {row: {"mean": float(peaks[row].mean()), "seeds": peaks[row].mean(1).tolist(),
                                   "unsharp": float(unsharp[row].mean()), "unsharp_equal": int(equal[row].sum()),
                                   "grey_levels": strong[row].mean(1).tolist()} for row in tuned},
        "structured_noise_differences": {f"{row} - its unsharp mask": tables.difference(peaks[row], unsharp[row])
                                         for row in tuned} | differences(peaks),
        "grey_levels_differences": differences(strong), "strength": strength(exp)}
    runs.save_json(args.results.with_suffix(".json"), summary)
    print(all_tables(summary))
    strength_plot(summary, args.results)
    picture(args, exp)


def all_tables(summary):
    """Markdown: metrics, differences, how far each tuning went, structured noise, strengths of one adapter."""
    def each(numbers, form):
        return " ".join(form.format(number) for number in numbers)

    def verdicts(head, differences, digits):
        return runs.markdown([head, "difference", "95 %", "verdict"], [
            [pair, f"{d['mean']:+.{digits}f}", f"[{d['low']:+.{digits}f}, {d['high']:+.{digits}f}]", d["verdict"]]
            for pair, d in differences.items()])
    rows = []
    for (row, tuning), noise in zip(summary["tuning"].items(), summary["structured_noise"].values()):
        above = noise["mean"] > noise["unsharp"] + metrics.PEAKS_ABOVE_UNSHARP
        rows.append([row, each(tuning["steps"], "{}"), each(tuning["gain"], "{:.1f}"),
                     each(tuning["lambda_q"], "{:.4f}"), f"{noise['mean']:.3f}", f"{np.mean(noise['grey_levels']):.2f}",
                     f"{noise['unsharp']:.3f}",
                     f"{noise['unsharp_equal']} of {len(tuning['steps']) * summary['images']}",
                     "yes" if above else "no"])
    tuning = runs.markdown(["", "steps", "gain in validation", "lambda_q", "structured noise", "in grey levels",
                            "of an unsharp mask", "of as much reward", "above 0.03 more"], rows)
    points = runs.markdown(["strength", "reward", "PSNR", "VGG distance"],
                           [[f"{p['scale']:g}", f"{p['reward']:.2f}", f"{p['psnr']:.2f}", f"{p['vgg']:.3f}"]
                            for p in summary["strength"]])
    return "\n\n".join([jobs.metric_tables(summary), tuning,
                        verdicts("structured noise", summary["structured_noise_differences"], 3),
                        verdicts("in grey levels", summary["grey_levels_differences"], 2), points])


@torch.no_grad()
def strength(exp):
    """The first seed's adapter at several strengths -> [{"scale", "reward", "psnr", "vgg"}]."""
    judges = {"reward": jobs.judge(exp.rewards[0], exp.metric_weights), "psnr": metrics.psnr,
              "vgg": metrics.create_metric("vgg", "cpu", exp.vgg_weights)}
    stems, points = list_images(exp.work / "test" / "lq"), []
    for scale in SCALES:
        net = archs.load_x4(base_of(exp, exp.seeds[0]), "--work")[0]
        lora.load_lora(net, exp.work / "lora" / f"lora-{exp.seeds[0]}" / "lora" / "adapter.pth", scale)
        lora.merge_lora(net)
        means = dict.fromkeys(judges, 0.0)
        for stem in stems:
            lq, gt = jobs.test_pair(exp.work, stem)
            sr = degradations.to_8bit(archs.upscale_tiled(net, lq))
            for name, metric in judges.items():
                means[name] += metric(sr, gt).item() / len(stems)
        points.append({"scale": scale, **means})
    return points


def strength_plot(summary, results):
    """STEM-strength.png of STEM.json, whose first metric is the reward; thin: from start to end of every seed."""
    points, reward = summary["strength"], summary["metrics"][0]
    ends = [summary["seed_means"][row] for row in ("before", [row for row in summary["mean"] if "lora +" in row][-1])]
    drawing, axes = style.figure(columns=2, height=3.4)
    labels = {"psnr": "PSNR, dB (higher is better)", "vgg": "VGG distance (lower is better)"}
    for axis, (name, text) in zip(axes, labels.items()):
        for both in zip(*ends):
            axis.plot(*([means[summary["metrics"].index(metric)] for means in both] for metric in (reward, name)),
                      color=style.COLOURS[0], linewidth=0.7, alpha=0.5)
        axis.plot([point["reward"] for point in points], [point[name] for point in points], "o-")
        for point in points:
            place = point["reward"], point[name]
            axis.annotate(f"{point['scale']:g}", place, textcoords="offset points", xytext=(-6, -8), ha="right")
        axis.margins(0.14)
        axis.set(xlabel=f"{tables.shown(reward)}, the reward", ylabel=text)
    seeds = len(ends[0])
    drawing.suptitle("Strength of one adapter (0: before tuning, 1: as tuned)"
                     + (f"; thin: 0 to 1 of all {seeds} seeds" if seeds > 1 else ""), fontsize=style.FONT)
    style.save(drawing, results.with_name(f"{results.name}-strength.png"))


@torch.no_grad()
def picture(args, exp, side=64):
    """RESULTS.png: the flattest place of some test images, enlarged four times, of the first seed.

    Before, each variant at the largest gain, reference; below it the change by tuning, eight times as strong. Places
    too dark to see anything are left out.
    """
    seed, cells = exp.seeds[0], []
    nets = {variant: archs.load_x4(weights_at(exp, variant, args.gains[-1], seed), "--work")[0] for variant in VARIANTS}
    start = archs.load_x4(base_of(exp, seed), "--work")[0]
    for stem in exp.figure:
        lq, gt = jobs.test_pair(exp.work, stem)
        y, x = pictures.flattest(gt, side)
        if gt[..., y:y + side, x:x + side].mean() < 0.1:
            continue

        def show(image, text, y=y, x=x):
            return pictures.enlarged_crop(image, y, x, side, 4), text
        before = archs.upscale_tiled(start, lq).clamp(0, 1)
        after = {variant: archs.upscale_tiled(net, lq).clamp(0, 1) for variant, net in nets.items()}
        tuned = [show(image, row_name(variant, args.gains[-1])) for variant, image in after.items()]
        changes = [show((0.5 + 8 * (image - before)).clamp(0, 1), "change x8") for image in after.values()]
        for middle in (tuned, changes):
            cells.append([show(before, "before"), *middle, show(gt, "reference")])
    pictures.save_grid(args.results.with_suffix(".png"), cells)


def main(args, exp):
    """exp: flags of samplers.py."""
    if args.redraw:
        strength_plot(json.loads(args.redraw.read_text()), args.redraw.with_suffix(""))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    args.results = args.results or exp.work / "lora_tuning"
    for seed in exp.seeds:
        runs.find_weights(base_of(exp, seed), "make it with: python -m experiments.samplers data runs")
    if "runs" in args.stages:
        tasks = [partial(one_run, args, exp, variant, seed) for seed in exp.seeds for variant in VARIANTS]
        jobs.parallel(exp.jobs, tasks)
    if "report" in args.stages:
        report(args, exp)


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS, samplers.parse_args(shlex.split(ARGS.samplers))))
