"""The tables and the picture of experiments.paper_network, from its records: paper_network's stage `report`."""
import json
import re
import sys

import numpy as np

import runs
from experiments import jobs
from images import list_images, load_image
from report import pictures, tables

TESTS = ("realsr", "sets")
# files of RESULTS that are not a row
OTHERS = ("picks", "precision", "slow")
# test images that may be shown, side of the part
PICTURE = ("test_set14_comic", "test_set14_baboon", "test_set5_butterfly"), 96
# as the tables of docs/results-paper-network.md call them
NAMES = {"lora24": "LoRA 24", "lora4": "LoRA 4", "layers": "same layers", "naive": "all weights"}


def read_rows(args):
    """{row: its file of RESULTS}"""
    return {path.stem: json.loads(path.read_text()) for path in args.results.glob("*.json") if path.stem not in OTHERS}


def outputs(args, test, row):
    """{image: (1, 3, H, W) in [0, 1]} that evaluate.py kept."""
    files = list_images(args.work / "outputs" / test / row)
    return {stem: load_image(path)[None].float() / 255 for stem, path in files.items()}


def by_seed(names):
    """Rows -> {row without its seed: {seed: row}}; the seed of the start and the controls is None."""
    groups = {}
    for name in sorted(names):
        seed = re.search(r"-(\d+)(?=\+|$)", name)
        groups.setdefault(re.sub(r"-\d+(?=\+|$)", "", name), {})[int(seed[1]) if seed else None] = name
    return groups


def paired(a, b):
    """{seed: value} twice -> the values of the seeds that both have; one without a seed is repeated for every other."""
    if None in a and None not in b:
        a = dict.fromkeys(b, a[None])
    if None in b and None not in a:
        b = dict.fromkeys(a, b[None])
    seeds = [seed for seed in a if seed in b]
    return [a[seed] for seed in seeds], [b[seed] for seed in seeds]


def report(args, sets, variants):
    """RESULTS.json: means, differences with verdicts, per test; the tables; RESULTS.png where outputs are here.

    sets, variants: names of training sets and of tunings, in the order of the tables.
    """
    files = read_rows(args)
    groups = by_seed(files)
    lower = files["start"]["lower_is_better"]
    summary = {"command": sys.argv, **runs.describe_machine(), "lower_is_better": lower, "metrics": list(lower),
               "rows": {group: len(names) for group, names in groups.items()}}
    for test in TESTS:
        # a control that no filter reached on this test is the start itself
        kept = {row: names for row, names in groups.items()
                if files.get(row, {}).get("strength", {}).get(test, {"strength": 1})["strength"]}
        stems = sorted(files["start"]["scores"][test])
        summary[test] = {**compared({name: record["scores"][test] for name, record in files.items()}, lower,
                                    pairs_of(kept, sets)), **noise(files, kept, test, stems)}
    if (args.results / "slow.json").exists():
        slow = json.loads((args.results / "slow.json").read_text())
        summary["slow"] = {**compared(slow["scores"], slow["lower_is_better"], pairs_of(by_seed(slow["scores"]), sets)),
                           "lower_is_better": slow["lower_is_better"], "metrics": list(slow["lower_is_better"])}
    runs.save_json(args.results.with_suffix(".json"), summary)
    for test in (*TESTS, "slow"):
        if test in summary:
            seeds = [f"{row} ({n})" for row, n in summary["rows"].items() if row in summary[test]["mean"]]
            print(f"{test}, {summary[test]['images']} images; seeds: {', '.join(seeds)}\n")
            print(jobs.metric_tables(summary | summary[test]))
    if (args.work / "outputs").is_dir():
        picture(args, variants)


def compared(scores, metrics, pairs):
    """Means, and differences of pairs of rows with verdicts. scores: {name of a row: {image: {metric: value}}}"""
    # {row: {seed: (images, metrics)}}
    values = {row: {seed: np.array([[image[metric] for metric in metrics] for _, image in sorted(scores[name].items())])
                    for seed, name in names.items()} for row, names in by_seed(scores).items()}
    differences = {}
    for one, other in pairs:
        a, b = map(np.array, paired(values[one], values[other]))
        if len(a):
            differences[f"{one} - {other}"] = {metric: tables.difference(a[:, :, k], b[:, :, k])
                                               for k, metric in enumerate(metrics)} | {"seeds": len(a)}
    of_row = {row: np.array(list(of_seed.values())) for row, of_seed in values.items()}
    return {"images": next(iter(of_row.values())).shape[1], "differences": differences,
            "mean": {row: v.mean((0, 1)).tolist() for row, v in of_row.items()},
            "seed_means": {row: v.mean(1).tolist() for row, v in of_row.items()}}


def noise(files, groups, test, stems):
    """Structured noise of the changes by tuning and by filters: means, shares of images without any, differences."""
    peaks = {group: {seed: np.array([files[name]["structured_noise"][test][stem] for stem in stems])
                     for seed, name in names.items() if "structured_noise" in files[name]}
             for group, names in groups.items()}
    peaks = {group: of_seed for group, of_seed in peaks.items() if of_seed}
    differences = {}
    for one in peaks:
        for other in peaks:
            # every pair with a tuning, once
            if one < other and "+" in one + other:
                a, b = map(np.array, paired(peaks[one], peaks[other]))
                if len(a):
                    differences[f"{one} - {other}"] = tables.difference(a, b)
    return {"structured_noise": {row: float(np.mean(list(v.values()))) for row, v in peaks.items()},
            "without_structured_noise": {row: float(np.mean(np.array(list(v.values())) == 0))
                                         for row, v in peaks.items()},
            "structured_noise_differences": differences}


def picture(args, variants):
    """RESULTS.png: parts of test images, enlarged twice: LR, start, the first seed of some rows, reference."""
    (names, side), seed, cells = PICTURE, args.seeds[0], []
    rows = ["start", f"soft-orig-{seed}", f"soft-amo-{seed}", *(f"soft-amo-{seed}+{variant}" for variant in variants)]
    rows = [row for row in rows if (args.work / "outputs" / "sets" / row).is_dir()]
    for stem in names:
        lq, gt = jobs.test_pair(args.work / "sets", stem)
        cells.append(jobs.middle_row(lq, {caption(row): outputs(args, "sets", row)[stem] for row in rows}, gt, side))
    pictures.save_grid(args.results.with_suffix(".png"), cells)


def caption(row):
    """soft-amo-0+lora24 -> amo + LoRA 24"""
    row, _, variant = row.partition("+")
    row = row.split("-")[1] if row.startswith("soft-") else row
    return row + (f" + {NAMES[variant]}" if variant else "")


def pairs_of(groups, sets):
    """The differences that were fixed before the runs, of the rows that are there."""
    chosen = []
    for where in sets:
        orig, rand, sma, amo = (f"{where}-{sampler}" for sampler in ("orig", "rand", "sma", "amo"))
        # all but the last were fixed
        chosen += [(amo, orig), (amo, rand), (rand, orig), (amo, sma), (sma, rand)]
        chosen += [(f"{amo}-{variant}", f"{orig}-{variant}") for variant in ("perturbed", "contiguous")]
        chosen += [(row, "start") for row in groups if row.startswith(f"{where}-")]
        chosen += [(row, orig) for row in groups if row.startswith((f"{amo}-", f"{amo}+"))]
    tuned = [row for row in groups if "+" in row]
    chosen += [(row, row.partition("+")[0]) for row in tuned]
    # the same layers were added after the runs
    chosen += [(row, other) for row in tuned for other in tuned
               if row.endswith(("+naive", "+layers")) and "+lora" in other]
    chosen += [(row, "start") for row in groups if row.startswith("start-")]
    # the rule on controls, asked directly; added after the runs. Those of the first set's amo do not name it
    for control in (row for row in groups if row.startswith("start-")):
        where = next((where for where in sets if control.endswith(f"-{where}")), next(iter(sets)))
        chosen += [(row, control) for row in (f"{where}-amo", "soft-amo+lora4")]
    return [(a, b) for a, b in dict.fromkeys(chosen) if a in groups and b in groups]
