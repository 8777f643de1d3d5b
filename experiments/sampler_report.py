"""The report of samplers.py: RESULTS.json of the files that its stages left, tables, two pictures."""
import json
import sys
from collections import Counter

import numpy as np
import torch

import archs
import data
import iqa
import runs
from experiments import jobs
from prepare.quintuplets import contact_sheet, names_of
from report import pictures, tables


def label(reward):
    """A quality model in names of runs: cnniqa for rewards.cnniqa:build, of a reward file its stem."""
    short = runs.short_reward(reward)
    return short if runs.is_reward_file(reward) else short.rpartition(".")[2]


def beside(results, part):
    """RESULTS-<part>.json"""
    return results.with_name(f"{results.name}-{part}.json")


def report(args, run_names):
    """args: flags of samplers.py; run_names: <sampler>-<seed>."""
    results = {name: json.loads((args.results / f"{name}.json").read_text()) for name in ["before", *run_names]}
    lower = results["before"]["lower_is_better"]
    names = [*args.rewards, *args.unseen, *args.slow, *jobs.WITH_REFERENCE]
    names = [name for name in names if all(name in result["lower_is_better"] for result in results.values())]
    stems = sorted(results["before"]["scores"]["start"])
    samplers = list(dict.fromkeys(name.rpartition("-")[0] for name in run_names))

    def values(scores):
        # (images, metrics)
        return np.array([[scores[stem][name] for name in names] for stem in stems])
    before = {row: values(scores) for row, scores in results["before"]["scores"].items()}
    # (seeds, images, metrics)
    after = {sampler: np.stack([values(results[f"{sampler}-{seed}"]["scores"]) for seed in args.seeds])
             for sampler in samplers}
    summary = {"command": sys.argv, **runs.describe_machine(), "images": len(stems), "seeds": args.seeds,
               "metrics": names, "lower_is_better": lower,
               "mean": {row: v.mean(0).tolist() for row, v in before.items()}
               | {sampler: v.mean((0, 1)).tolist() for sampler, v in after.items()},
               "seed_means": {sampler: v.mean(1).tolist() for sampler, v in after.items()}, "differences": {},
               "picked": {sampler: shares(results[f"{sampler}-{seed}"]["picked"] for seed in args.seeds)
                          for sampler in samplers}}
    for a, b in pairs(args.rewards):
        summary["differences"][f"{a} - {b}"] = {name: tables.difference(after[a][..., k], after[b][..., k])
                                                for k, name in enumerate(names)}
    runs.save_json(args.results.with_suffix(".json"), summary)
    print(all_tables(summary, args))
    if not (args.work / "set").is_dir():
        print(f"no pictures: {args.work} holds no set and no runs")
        return
    sets = data.find_sets(args.work / "set", "Train")
    # of the first folder: Kodak's photographs may be shown freely
    shown = [stem for stem in sets.stems if stem.startswith(args.photos[0].name)]
    contact_sheet(args.results.with_name(f"{args.results.name}-sets.png"), sets, shown,
                  [iqa.create_reward([name]) for name in args.rewards], "cpu",
                  names_of(json.loads((args.work / "set" / "quintuplets.json").read_text())["enhancers"]), rows=4)
    picture(args, [f"{sampler}-{args.seeds[0]}" for sampler in ("orig", "rand", f"amo-{label(args.rewards[0])}")])


def pairs(rewards):
    """The differences that were fixed before the runs: the chain of the first reward, then those of the others."""
    first, *others = map(label, rewards)
    chain = ["orig", "rand", f"sma-{first}", f"amo-{first}"]
    chosen = [*zip(chain[1:], chain), (chain[3], "orig")]
    for name in others:
        sma, amo = f"sma-{name}", f"amo-{name}"
        chosen += [(sma, "rand"), (amo, sma), (sma, "orig"), (amo, "orig")]
    return chosen


def shares(counts):
    """[{version: times chosen}] of several runs -> {version: share}"""
    total = sum(map(Counter, counts), Counter())
    return {version: n / sum(total.values()) for version, n in total.items()}


def all_tables(summary, args):
    """Markdown: shrink factors, picks of the rewards, metrics, differences, picks of the samplers."""
    def load(part):
        return json.loads(beside(args.results, part).read_text())

    def percent(parts):
        return [f"{part:.0%}" for part in parts.values()]
    rows = load("shrink")["rows"]
    parts = [runs.markdown(["soften", "shrink", *(tables.shown(name) for name in rows[0]["any"]),
                            "mean of unseen", "PSNR"],
                           [[row["soften"], row["shrink"], *percent(row["any"]), f"{row['any_unseen']:.3f}",
                             f"{row['psnr_mean']:.1f}"] for row in rows])]
    picks = load("picks")["rewards"]
    versions = list(picks[args.rewards[0]]["best crop (amo)"])
    parts.append(runs.markdown(["", *versions], [[f"{tables.shown(reward)}: {way}", *percent(picked)]
                                                 for reward, ways in picks.items() for way, picked in ways.items()]))
    parts.append(jobs.metric_tables(summary))
    if beside(args.results, "grain").exists():
        parts.append(grain_table(load("grain")["rows"], summary, args.seeds))
    parts.append(runs.markdown(["", *versions], [[sampler, *percent({v: picked.get(v, 0) for v in versions})]
                                                 for sampler, picked in summary["picked"].items()]))
    return "\n\n".join(parts)


def grain_table(rows, summary, seeds):
    """Mean NIQE per sampler at every noise level, and the structured noise of the change by training."""
    sigmas = list(rows["start"]["niqe"])
    groups = {"reference": ["reference"], "start": ["start"]}
    groups |= {sampler: [f"{sampler}-{seed}" for seed in seeds] for sampler in summary["seed_means"]}
    lines = []
    for group, names in groups.items():
        niqe = [np.mean([rows[name]["niqe"][sigma] for name in names]) for sigma in sigmas]
        peaks = np.mean([rows[name]["peaks"] for name in names])
        lines.append([group, *(f"{value:.2f}" for value in niqe), f"{peaks:.3f}"])
    head = ["NIQE with noise of", *(f"{sigma} grey levels" for sigma in sigmas), "structured noise"]
    return runs.markdown(head, lines)


@torch.no_grad()
def picture(args, run_names, side=128):
    """RESULTS.png: the middle of some test images: LR, the named runs, reference, enlarged twice."""
    nets = {name: archs.load_x4(args.work / "runs" / name, "--work")[0] for name in run_names}
    cells = []
    for stem in args.figure:
        lq, gt = jobs.test_pair(args.work, stem)
        images = {name.rpartition("-")[0]: archs.upscale_tiled(net, lq).clamp(0, 1) for name, net in nets.items()}
        cells.append(jobs.middle_row(lq, images, gt, side))
    pictures.save_grid(args.results.with_suffix(".png"), cells)
