"""Does LoRA keep the optimisation from fooling the quality model? Paper Fig. 3 in small, from the AMO runs that experiment.py leaves.

    PYTHONPATH=../shared/tools python -m experiments.lora_tuning [runs] [report]         both without a word; continues where it stopped

Every seed's AMO network (first reward of experiment.py) is tuned by that reward in several ways, and judged where the reward on held-out photos
has gained each of --gains:
    lora     adapters of rank 16 on the convolutions between the first and the last
    layers   the full weights of these convolutions: what the choice of layers does without the low rank
    naive    all weights
    lora64   adapters of rank 64, which is full rank here: the parametrisation without the low rank (thought of after the first three were seen)
Analysis, fixed before the runs of the first three: experiment.py's metrics, test images, intervals and verdicts, as differences from the network before tuning
and from lora at the same gain; structured noise (quality.noise_peaks of SR after - SR before) on each test image against that of an unsharp mask
of as much reward, or of as much as sharpening can have. The hypothesis is the paper's: naive tuning leaves structured noise and LoRA does not; `layers` tells whether the rank
does that. Last, the strength of the first seed's adapter from 0 to 1.5: reward against PSNR and VGG distance.
"""
import argparse
import shlex
from pathlib import Path

import runs


STAGES = ("runs", "report")
VARIANTS = {"lora": "--tune lora --lr 2e-4".split(), "layers": "--tune layers --lr 2e-5".split(), "naive": "--tune all --lr 2e-5".split(),
            "lora64": "--tune lora --rank 64 --lr 2e-4".split()}
TUNE = """--arch compact --lambda-q auto --total-steps 200 --ema-decay 0.9 --val-every 2 --val-photos 2 --milestones --watch ranker piqe --log-every 2
          --save-every 20 --sample-every 0 --workers 0""".split()
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=runs.Help)
    p.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default both")
    p.add_argument("--gains", type=runs.RATE, nargs="+", default=[4.0, 8.0, 16.0], metavar="POINTS",
                   help="rising: of the reward on the validation images, at which the tuned networks are compared")
    p.add_argument("--tune", default="", metavar="'FLAGS'", help="further flags of finetune_lora.py")
    p.add_argument("--results", type=Path, default=Path("results/experiment-lora"), help="one JSON file per tuning and gain; tables and pictures beside it")
    p.add_argument("--experiment", default="", metavar="'FLAGS'", help="flags that experiment.py was given: --work, --seeds, --vgg-weights, --jobs, ...")
    args = p.parse_args(argv)
    args.stages = args.stages or list(STAGES)
    args.tune = TUNE + shlex.split(args.tune)
    if set(args.stages) - set(STAGES):
        p.error(f"stages are {', '.join(STAGES)}; got {' '.join(args.stages)}")
    if args.gains != sorted(set(args.gains)):
        p.error(f"--gains {' '.join(map('{:g}'.format, args.gains))}: every one must be larger than the one before")
    return args


ARGS = parse_args() if __name__ == "__main__" else None                           # --help needs no torch: seconds

import json
import shutil
import signal
import sys
from functools import partial

import matplotlib
import numpy as np
import torch

import archs
from experiments import jobs
import degradations
from experiments import samplers as experiment
import iqa
import lora
import metrics as quality
from images import list_images
from report import tables

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from report import pictures


def base_of(exp, seed):
    return exp.work / "runs" / f"amo-{exp.rewards[0].partition(':')[0]}-{seed}"


def row(variant, gain):
    return f"{variant} +{gain:g}"


def weights_at(exp, variant, gain, seed):
    """The merged generator as it was at this gain."""
    return exp.work / "lora" / f"{variant}-{seed}-{gain:g}.pth"


def one_run(args, exp, variant, seed):
    """Tune to one gain after the other; at each: RESULTS/<variant>-<seed>-<gain>.json. Continues an interrupted tuning."""
    run, words = exp.work / "lora" / f"{variant}-{seed}", [*args.tune, *VARIANTS[variant], "--reward", exp.rewards[0]]
    base = lora.base_hash(archs.load_x4(base_of(exp, seed), "--work")[0])
    for gain in args.gains:
        weights = weights_at(exp, variant, gain, seed)
        file = args.results / f"{weights.stem}.json"
        if file.exists():
            record = json.loads(file.read_text())
            if (record["tune"], record["base"]) != (list(map(str, words)), base):
                raise runs.UserError(f"{file}: made {'with other settings of the tuning' if record['base'] == base else 'from another network'}: choose another --results, "
                                 "and --work in --experiment")
            continue
        if not weights.exists():
            jobs.call(run.with_suffix(".log"), "finetune_lora.py", *words, "--base", base_of(exp, seed), "--out", run, "--stop-gain", gain, "--device",
                         exp.device, "--resume", "auto")
        val = [e for e in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if e["split"] == "val"]
        gained = [e["reward"] - val[0]["reward"] for e in val]
        at = next((i for i, g in enumerate(gained) if g >= gain), None)
        if at is None:
            raise runs.UserError(f"{run}: the reward gained {max(gained):.1f} at most, and {gain:g} is asked for: more --total-steps (--tune) or smaller --gains")
        last = runs.load_checkpoint(run / "ckpt" / "last.pt")
        if not weights.exists():
            if last["step"] != val[at]["step"]:
                raise runs.UserError(f"{run}: at step {last['step']}, but the gain of {gain:g} was there at step {val[at]['step']}: remove this run to tune again")
            runs.write_atomic(weights, lambda temporary: shutil.copy(run / "weights" / "merged.pth", temporary))
        judged = jobs.evaluate(exp, weights, weights.with_suffix(".json"), [*exp.rewards, *exp.unseen, *jobs.WITH_REFERENCE])
        runs.save_json(file, {"tune": list(map(str, words)), "base": base, **{k: judged[k] for k in ("commit", "torch", "python", "device", "lower_is_better")},
                              "steps": val[at]["step"], "gain": gained[at], "lambda_q": last["lambda_q"],
                              "validation": val[:at + 1], "scores": judged["scores"][weights.stem],
                              "peaks": structured_noise(exp, base_of(exp, seed), weights)})


@torch.no_grad()
def structured_noise(exp, before, after):
    """{test image: {"peaks": of what tuning changed; "unsharp": of an unsharp mask of the network before with as much reward; "equal": or of as
    much as it can have; "grey_levels": how strong the peaks are, the root mean square of the change times the root of their share}}"""
    reward, nets, found = iqa.create_reward(exp.rewards[:1]), [archs.load_x4(path, "--work")[0] for path in (before, after)], {}
    for stem in list_images(exp.work / "test" / "lq"):
        lq, _ = jobs.test_pair(exp, stem)
        old, new = (degradations.to_8bit(archs.upscale_tiled(net, lq)) for net in nets)
        (like, equal), peaks = quality.unsharp_like(old, new, reward), quality.noise_peaks(new - old).item()
        strength = 255 * quality.luma(new - old).std().item() / (219 / 255) * peaks ** 0.5                       # luma of 16 to 235 as 0 to 255
        found[stem] = {"peaks": peaks, "grey_levels": strength, "unsharp": quality.noise_peaks(like - old).item(), "equal": equal}
    return found


def report(args, exp):
    """RESULTS.json with means, differences and the sweep; the tables; RESULTS.png and RESULTS-strength.png."""
    load = lambda path: json.loads(path.read_text())
    results = {"before": [load(exp.results / f"{base_of(exp, seed).name}.json") for seed in exp.seeds]}
    results |= {row(v, gain): [load(args.results / f"{weights_at(exp, v, gain, seed).stem}.json") for seed in exp.seeds] for gain in args.gains for v in VARIANTS}
    tuned = {name: found for name, found in results.items() if name != "before"}
    lower = next(iter(tuned.values()))[0]["lower_is_better"]
    stems, metrics = sorted(results["before"][0]["scores"]), list(lower)
    values = {name: np.array([[[r["scores"][stem][m] for m in metrics] for stem in stems] for r in found]) for name, found in results.items()}
    noise = {name: np.array([[r["peaks"][stem]["peaks"] for stem in stems] for r in found]) for name, found in tuned.items()}           # (seeds, images)
    unsharp, equal, strong = ({name: np.array([[r["peaks"][stem][key] for stem in stems] for r in found]) for name, found in tuned.items()}
                              for key in ("unsharp", "equal", "grey_levels"))
    against = [(row(v, gain), row("lora", gain)) for gain in args.gains for v in VARIANTS if v != "lora"]
    summary = {"command": sys.argv, **runs.describe_machine(), "images": len(stems), "seeds": exp.seeds, "metrics": metrics, "lower_is_better": lower,
               "mean": {name: v.mean((0, 1)).tolist() for name, v in values.items()}, "seed_means": {name: v.mean(1).tolist() for name, v in values.items()},
               "tuning": {name: {key: [r[key] for r in found] for key in ("steps", "gain", "lambda_q")} for name, found in tuned.items()},
               "differences": {f"{a} - {b}": {m: tables.difference(values[a][..., k], values[b][..., k]) for k, m in enumerate(metrics)}
                               for a, b in [*((name, "before") for name in tuned), *against]},
               "structured_noise": {name: {"mean": float(noise[name].mean()), "seeds": noise[name].mean(1).tolist(), "unsharp": float(unsharp[name].mean()),
                                           "unsharp_equal": int(equal[name].sum()), "grey_levels": strong[name].mean(1).tolist()}
                                    for name in tuned},
               "structured_noise_differences": {f"{name} - its unsharp mask": tables.difference(noise[name], unsharp[name]) for name in tuned}
               | {f"{a} - {b}": tables.difference(noise[a], noise[b]) for a, b in against},
               "grey_levels_differences": {f"{a} - {b}": tables.difference(strong[a], strong[b]) for a, b in against},
               "strength": strength(args, exp)}
    runs.save_json(args.results.with_suffix(".json"), summary)
    print(readme_tables(summary))
    picture(args, exp)


def readme_tables(summary):
    """The Markdown that README shows: metrics, differences, how far each tuning went, structured noise."""
    each = lambda numbers, form: " ".join(form.format(n) for n in numbers)
    tuning = runs.markdown(["", "steps", "gain in validation", "lambda_q", "structured noise", "in grey levels", "of an unsharp mask",
                            "of as much reward", "above .03 more"],
                           [[name, each(t["steps"], "{}"), each(t["gain"], "{:.1f}"), each(t["lambda_q"], "{:.4f}"), f"{p['mean']:.3f}", f"{np.mean(p['grey_levels']):.2f}",
                             f"{p['unsharp']:.3f}", f"{p['unsharp_equal']} of {len(t['steps']) * summary['images']}",
                             "yes" if p["mean"] > p["unsharp"] + quality.PEAKS_ABOVE_UNSHARP else "no"]
                            for (name, t), p in zip(summary["tuning"].items(), summary["structured_noise"].values())])
    noise = runs.markdown(["structured noise", "difference", "95 %", "verdict"],
                          [[pair, f"{d['mean']:+.3f}", f"[{d['low']:+.3f}, {d['high']:+.3f}]", d["verdict"]]
                           for pair, d in summary["structured_noise_differences"].items()])
    noise += "\n\n" + runs.markdown(["in grey levels", "difference", "95 %", "verdict"],
                                    [[pair, f"{d['mean']:+.2f}", f"[{d['low']:+.2f}, {d['high']:+.2f}]", d["verdict"]]
                                     for pair, d in summary["grey_levels_differences"].items()])
    points = runs.markdown(["strength", "reward", "PSNR", "VGG distance"],
                           [[f"{p['scale']:g}", f"{p['reward']:.2f}", f"{p['psnr']:.2f}", f"{p['vgg']:.3f}"] for p in summary["strength"]])
    return "\n\n".join([jobs.metric_tables(summary), tuning, noise, points])


@torch.no_grad()
def strength(args, exp):
    """The first seed's adapter at several strengths -> [{"scale", "reward", "psnr", "vgg"}], and RESULTS-strength.png."""
    metrics = {"reward": jobs.judge(exp, exp.rewards[0]), "psnr": quality.psnr, "vgg": quality.create_metric("vgg", "cpu", exp.vgg_weights)}
    points = []
    for scale in SCALES:
        net = archs.load_x4(base_of(exp, exp.seeds[0]), "--work")[0]
        lora.load_lora(net, exp.work / "lora" / f"lora-{exp.seeds[0]}" / "lora" / "adapter.pth", scale)
        lora.merge_lora(net)
        sums, stems = dict.fromkeys(metrics, 0.0), list_images(exp.work / "test" / "lq")
        for stem in stems:
            lq, gt = jobs.test_pair(exp, stem)
            sr = degradations.to_8bit(archs.upscale_tiled(net, lq))
            for name, metric in metrics.items():
                sums[name] += metric(sr, gt).item() / len(stems)
        points.append({"scale": scale, **sums})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, name, label in zip(axes, ("psnr", "vgg"), ("PSNR in dB, higher is better", "VGG distance, lower is better")):
        axis.plot([p["reward"] for p in points], [p[name] for p in points], "o-")
        for p in points:
            axis.annotate(f"{p['scale']:g}", (p["reward"], p[name]), textcoords="offset points", xytext=(4, 4))
        axis.margins(0.12)
        axis.set(xlabel=f"{tables.SHOWN.get(exp.rewards[0], exp.rewards[0])}, optimised", ylabel=label)
    figure.suptitle("Strength of one adapter: 0 is the network before, 1 as tuned")
    figure.savefig(args.results.with_name(args.results.name + "-strength.png"), dpi=110)
    return points


@torch.no_grad()
def picture(args, exp, side=64):
    """RESULTS.png: the flattest place of some test images, enlarged four times: before, each variant at the largest gain, reference; below
    it what tuning changed, eight times as strong (first seed). Places too dark to see anything are left out."""
    seed, cells = exp.seeds[0], []
    nets = {v: archs.load_x4(weights_at(exp, v, args.gains[-1], seed), "--work")[0] for v in VARIANTS}
    start = archs.load_x4(base_of(exp, seed), "--work")[0]
    for stem in exp.figure:
        lq, gt = jobs.test_pair(exp, stem)
        y, x = pictures.flattest(gt, side)
        if gt[..., y:y + side, x:x + side].mean() < 0.1:
            continue
        before = archs.upscale_tiled(start, lq).clamp(0, 1)
        after = {v: archs.upscale_tiled(net, lq).clamp(0, 1) for v, net in nets.items()}
        show = lambda image, name: (pictures.enlarged_crop(image, y, x, side, 4), name)
        cells.append([show(before, "before"), *(show(image, row(v, args.gains[-1])) for v, image in after.items()), show(gt, "reference")])
        cells.append([show(before, "before"), *(show((0.5 + 8 * (image - before)).clamp(0, 1), "change x8") for image in after.values()), show(gt, "reference")])
    pictures.save_grid(args.results.with_suffix(".png"), cells)


def main(args, exp):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for seed in exp.seeds:
        runs.find_weights(base_of(exp, seed), "make it with: python -m experiments.samplers data runs")
    if "runs" in args.stages:
        jobs.parallel(exp.jobs, [partial(one_run, args, exp, variant, seed) for seed in exp.seeds for variant in VARIANTS])
    if "report" in args.stages:
        report(args, exp)


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS, experiment.parse_args(shlex.split(ARGS.experiment))))
