"""Does LoRA keep the optimisation from fooling the quality model? Paper Fig. 3 in small, from the AMO runs that experiment.py leaves.

    PYTHONPATH=../shared/tools python experiment_lora.py [runs] [report]         both without a word; continues where it stopped

Every seed's AMO network (first reward of experiment.py) is tuned by that reward in three ways, each until the same gain on held-out photos:
    lora     adapters of rank 16 on the 32 convolutions between the first and the last
    layers   the full weights of these convolutions: what the choice of layers does without the low rank
    naive    all weights
Analysis, fixed before the runs: experiment.py's metrics, test images, intervals and verdicts, as differences from the network before tuning
and from lora; structured noise (iqa.noise_peaks of SR after - SR before) on each test image against that of an unsharp mask of equal reward. The
hypothesis is the paper's: naive tuning leaves structured noise and LoRA does not; `layers` tells whether the rank does that. Last, the
strength of the first seed's adapter from 0 to 1.5: reward against PSNR and VGG distance.
"""
import argparse
from pathlib import Path

import flags

STAGES = ("runs", "report")
VARIANTS = {"lora": "--tune lora --lr 2e-4".split(), "layers": "--tune layers --lr 2e-5".split(), "naive": "--tune all --lr 2e-5".split()}
TUNE = "--lambda-q auto --total-steps 150 --val-every 5 --val-photos 2 --milestones --watch ranker piqe --log-every 5 --save-every 20 --sample-every 0".split()
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=flags.Help)
    p.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default both")
    p.add_argument("--out", type=Path, default=Path("results/experiment-lora"), help="one JSON file per run; table and pictures beside it")
    p.add_argument("--gain", type=flags.RATE, default=8.0, help="of the reward on the validation images, at which every tuning ends")
    p.add_argument("--experiment", default="", metavar="'FLAGS'", help="flags that experiment.py was given: --work, --seeds, --vgg-weights, --jobs, ...")
    args = p.parse_args(argv)
    args.stages = args.stages or list(STAGES)
    if set(args.stages) - set(STAGES):
        p.error(f"stages are {', '.join(STAGES)}; got {' '.join(args.stages)}")
    return args


ARGS = parse_args() if __name__ == "__main__" else None                           # --help needs no torch: seconds

import json
import shlex
import sys
from functools import partial

import matplotlib
import numpy as np
import torch

import archs
import data
import degradations
import experiment
import iqa
import lora
import runs

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def base_of(exp, seed):
    return exp.work / "runs" / f"amo-{exp.rewards[0].partition(':')[0]}-{seed}"


def one_run(args, exp, variant, seed):
    """Tune, evaluate, look for structured noise -> OUT/<variant>-<seed>.json; continues an interrupted tuning."""
    run, file, reward = exp.work / "lora" / f"{variant}-{seed}", args.out / f"{variant}-{seed}.json", exp.rewards[0]
    if file.exists():
        return
    words = [*TUNE, *VARIANTS[variant], "--stop-gain", args.gain, "--reward", reward]
    experiment.call(run.with_suffix(".log"), "finetune_lora.py", "--arch", "compact", "--base", base_of(exp, seed), "--out", run, *words, "--resume", "auto",
                    "--device", exp.device)
    metrics = [reward, *exp.rewards[1:], *exp.unseen, *flags.WITH_REFERENCE]
    judged = experiment.evaluate(exp, run, run.with_suffix(".json"), metrics)
    val = [e for e in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if e["split"] == "val"]
    runs.save_json(file, {"tune": list(map(str, words)), **{k: judged[k] for k in ("commit", "torch", "python", "device", "lower_is_better")}, "validation": val,
                          "lambda_q": runs.load_checkpoint(run / "ckpt" / "last.pt")["lambda_q"], "scores": judged["scores"][run.name],
                          "peaks": structured_noise(exp, base_of(exp, seed), run)})


@torch.no_grad()
def structured_noise(exp, before, after):
    """{test image: {"peaks": of what tuning changed, "unsharp": of an unsharp mask of the network before with as much reward}}"""
    reward, nets, found = iqa.create_reward(exp.rewards[:1]), [archs.load_x4(path, "--work")[0] for path in (before, after)], {}
    for stem in data.list_images(exp.work / "test" / "lq"):
        lq, _ = experiment.test_pair(exp, stem)
        old, new = (degradations.to_8bit(archs.upscale_tiled(net, lq)) for net in nets)
        found[stem] = {"peaks": iqa.noise_peaks(new - old).item(), "unsharp": iqa.noise_peaks(iqa.unsharp_like(old, new, reward) - old).item()}
    return found


def report(args, exp):
    seeds = exp.seeds
    after = {v: [json.loads((args.out / f"{v}-{seed}.json").read_text()) for seed in seeds] for v in VARIANTS}
    before = [json.loads((exp.results / f"{base_of(exp, seed).name}.json").read_text()) for seed in seeds]
    lower = after["lora"][0]["lower_is_better"]
    stems, metrics = sorted(before[0]["scores"]), list(lower)
    value = lambda results: np.array([[[r["scores"][stem][m] for m in metrics] for stem in stems] for r in results])        # (seeds, images, metrics)
    values = {"before": value(before)} | {v: value(r) for v, r in after.items()}
    peaks = {v: {kind: np.array([[r["peaks"][stem][kind] for stem in stems] for r in results]) for kind in ("peaks", "unsharp")} for v, results in after.items()}
    pairs = [(v, "before") for v in VARIANTS] + [(v, "lora") for v in VARIANTS if v != "lora"]
    summary = {"command": sys.argv, **runs.describe_machine(), "images": len(stems), "seeds": seeds, "metrics": metrics, "lower_is_better": lower,
               "mean": {row: v.mean((0, 1)).tolist() for row, v in values.items()}, "seed_means": {row: v.mean(1).tolist() for row, v in values.items()},
               "steps": {v: [r["validation"][-1]["step"] for r in results] for v, results in after.items()},
               "gain": {v: [r["validation"][-1]["reward"] - r["validation"][0]["reward"] for r in results] for v, results in after.items()},
               "lambda_q": {v: [r["lambda_q"] for r in results] for v, results in after.items()},
               "differences": {f"{a} - {b}": {m: experiment.difference(values[a][..., k], values[b][..., k]) for k, m in enumerate(metrics)} for a, b in pairs},
               "peaks": {v: {kind: float(p.mean()) for kind, p in kinds.items()} for v, kinds in peaks.items()},
               "peaks_differences": {f"{v} - its unsharp mask": experiment.difference(p["peaks"], p["unsharp"]) for v, p in peaks.items()}
               | {f"{v} - lora": experiment.difference(peaks[v]["peaks"], peaks["lora"]["peaks"]) for v in VARIANTS if v != "lora"},
               "sweep": sweep(args, exp)}
    runs.save_json(args.out.with_suffix(".json"), summary)
    print(experiment.metric_tables(summary))
    print("\n" + runs.markdown(["", "steps", "reward gained in validation", "structured noise", "of its unsharp mask"],
                               [[v, summary["steps"][v], [round(g, 1) for g in summary["gain"][v]], f"{p['peaks']:.3f}", f"{p['unsharp']:.3f}"]
                                for v, p in summary["peaks"].items()]))
    print("\n" + runs.markdown(["structured noise", "difference", "95 %", "verdict"],
                               [[pair, f"{d['mean']:+.3f}", f"[{d['low']:+.3f}, {d['high']:+.3f}]", d["verdict"]] for pair, d in summary["peaks_differences"].items()]))
    picture(args, exp)


@torch.no_grad()
def sweep(args, exp):
    """The first seed's adapter at several strengths -> [{"scale", "reward", "psnr", "vgg"}], and OUT-strength.png."""
    metrics = {"reward": iqa.create_metric(exp.rewards[0], "cpu")[0], "psnr": iqa.psnr, "vgg": iqa.create_metric("vgg", "cpu", exp.vgg_weights)[0]}
    points = []
    for scale in SCALES:
        net = archs.load_x4(base_of(exp, exp.seeds[0]), "--work")[0]
        lora.load_lora(net, exp.work / "lora" / f"lora-{exp.seeds[0]}" / "lora" / "adapter.pth", scale)
        lora.merge_lora(net)
        sums = dict.fromkeys(metrics, 0.0)
        stems = data.list_images(exp.work / "test" / "lq")
        for stem in stems:
            lq, gt = experiment.test_pair(exp, stem)
            sr = degradations.to_8bit(archs.upscale_tiled(net, lq))
            for name, metric in metrics.items():
                sums[name] += metric(sr, gt).item() / len(stems)
        points.append({"scale": scale, **sums})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, name, label in zip(axes, ("psnr", "vgg"), ("PSNR in dB, higher is better", "VGG distance, lower is better")):
        axis.plot([p["reward"] for p in points], [p[name] for p in points], "o-")
        for p in points:
            axis.annotate(f"{p['scale']:g}", (p["reward"], p[name]), textcoords="offset points", xytext=(4, 4))
        axis.set(xlabel=f"{experiment.SHOWN.get(exp.rewards[0], exp.rewards[0])}, optimised", ylabel=label)
    figure.suptitle("Strength of one adapter: 0 is the network before, 1 as tuned")
    figure.savefig(args.out.with_name(args.out.name + "-strength.png"), dpi=110)
    return points


@torch.no_grad()
def picture(args, exp, side=64):
    """OUT.png: the flattest place of some test images, enlarged four times: before, lora, layers, naive, reference (first seed)."""
    seed = exp.seeds[0]
    paths = {"before": base_of(exp, seed)} | {v: exp.work / "lora" / f"{v}-{seed}" for v in VARIANTS}
    nets = {name: archs.load_x4(path, "--work")[0] for name, path in paths.items()}
    cells = []
    for stem in exp.figure:
        lq, gt = experiment.test_pair(exp, stem)
        y, x = data.flattest(gt, side)
        images = {name: archs.upscale_tiled(net, lq).clamp(0, 1) for name, net in nets.items()} | {"reference": gt}
        cells.append([(data.enlarged_crop(image, y, x, side, 4), name) for name, image in images.items()])
    data.save_grid(args.out.with_suffix(".png"), cells)


def main(args, exp):
    for seed in exp.seeds:
        runs.find_weights(base_of(exp, seed), "make it with: python experiment.py data runs")
    if "runs" in args.stages:
        experiment.parallel(exp.jobs, [partial(one_run, args, exp, variant, seed) for seed in exp.seeds for variant in VARIANTS])
    if "report" in args.stages:
        report(args, exp)


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS, experiment.parse_args(shlex.split(ARGS.experiment))))
