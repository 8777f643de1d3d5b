"""The report of self_supervision.py: RESULTS/selfsup.json of the rows that are there, tables, plots of the probes."""
import json
import shlex
import sys

import numpy as np
import torch

import archs
import runs
from experiments import jobs
from images import list_images, load_image
from report import pictures, tables

ROWS = ("before", "LWay", "baseline", "controller", "FAR", "both", "flipped", "blur control", "unsharp control",
        "before, compact", "both, compact")
# rows that are the same for every seed
CONTROLS = ("before", "before, compact", "blur control", "unsharp control")
PAIRS = [*((row, "before") for row in ("LWay", "baseline", "controller", "FAR", "both", "flipped")),
         ("controller", "baseline"), ("FAR", "baseline"), ("both", "baseline"), ("both", "LWay"), ("both", "flipped"),
         ("both", "blur control"), ("both", "unsharp control"), ("both, compact", "before, compact")]
# the lines of each plot
FIGURES = {"fig7": ("baseline", "controller", "FAR", "both"), "fig8": ("FAR", "both")}
# test images that may be shown, side of the part
PICTURE = ("test_set14-comic", "test_set14-baboon", "test_set5-butterfly"), 96
NETWORKS = {"FAR": "FAR alone", "both": "FAR and controller"}


def compare(files):
    """Scores of the rows of a domain, {row: {seed: its file}}, and their differences."""
    first = files["before"][0]
    lower, stems, values = first["lower_is_better"], sorted(first["scores"]), {}
    for row in (row for row in ROWS if row in files):
        # (seeds, images, metrics)
        values[row] = np.array([[[file["scores"][stem][m] for m in lower] for stem in stems]
                                for _, file in sorted(files[row].items())])
    differences = {}
    for a, b in (pair for pair in PAIRS if set(pair) <= set(values)):
        seeds = sorted(files[a] if b in CONTROLS else files[a].keys() & files[b].keys())
        of_a, of_b = (np.array([values[row][sorted(files[row]).index(0 if row in CONTROLS else seed)]
                                for seed in seeds]) for row in (a, b))
        differences[f"{a} - {b}"] = {m: tables.difference(of_a[..., k], of_b[..., k])
                                     for k, m in enumerate(lower)} | {"seeds": len(seeds)}
    movement = {row: [file["movement"] for _, file in sorted(files[row].items())] for row in values
                if "movement" in files[row][min(files[row])]}
    return {"images": len(stems), "metrics": list(lower), "lower_is_better": lower, "movement": movement,
            "mean": {name: v.mean((0, 1)).tolist() for name, v in values.items()},
            "seed_means": {name: v.mean(1).tolist() for name, v in values.items() if len(v) > 1},
            "differences": differences}


def report(args, pretrain, finetune):
    """args: flags of self_supervision.py; pretrain, finetune: words of all trainings, for the record."""
    sets, summary = {}, {"command": sys.argv, **runs.describe_machine(), "pretrain": shlex.join(pretrain),
                         "finetune": shlex.join(finetune), "sets": {}, "pretraining": {}}
    for path in sorted(args.results.glob("*.json")):
        content = json.loads(path.read_text())
        if "row" in content:
            sets.setdefault(content["domain"], {}).setdefault(content["row"], {})[content["seed"]] = content
        elif path.stem.startswith("rec-"):
            summary["pretraining"][path.stem.removeprefix("rec-")] = content
        elif path.stem.startswith("fig"):
            lines = summary.setdefault(path.stem.partition("-")[0], [{}])
            lines[0] |= {name: {key: v for key, v in values.items() if key in ("auc", "far_enc") or path.stem[3] == "7"}
                         for name, values in content["lines"].items()}
        elif path.stem == "precision":
            summary["precision"] = content["differences"]
    for domain in ("inside", "outside", "realsr"):
        if "before" in sets.get(domain, {}):
            summary["sets"][domain] = compare(sets[domain])
    runs.save_json(args.results / "selfsup.json", summary)
    draw(summary, args.results / "selfsup")
    print(markdown_tables(summary))


def without_seed(lines):
    """A line of Fig. 7 is called <network>-<seed>, <rule>, and one of Fig. 8 <network>-<seed>."""
    parted = [(*line.partition(","), values) for line, values in lines.items()]
    return {f"{network.rpartition('-')[0]}{comma}{rule}": values for network, comma, rule, values in parted}


def draw(summary, stem):
    """STEM-fig7.png and the others of FIGURES, with all seeds, of what the report has."""
    shares = np.linspace(0, 1, 11).tolist()
    for figure, names in FIGURES.items():
        by_seed = [{name: values for name, values in without_seed(lines).items() if name.partition(",")[0] in names}
                   for lines in summary.get(figure, [])]
        if not by_seed or not all(by_seed):
            continue
        # matplotlib is not needed by anything else
        from selfsup import probe
        path = stem.with_name(f"{stem.name}-{figure}.png")
        if figure.startswith("fig7"):
            distance = shlex.split(summary["pretrain"])
            more = {"i": shares, "distance_name": distance[distance.index("--distance") + 1]}
            probe.draw7(path, [{name: values | more for name, values in lines.items()} for lines in by_seed])
        else:
            probe.draw_areas(path, {NETWORKS[name]: [lines[name]["auc"] for lines in by_seed] for name in names
                                    if name in by_seed[0]})


@torch.no_grad()
def picture(args, networks):
    """RESULTS/selfsup.png: the middle of three images of the domain `inside`: LR, the networks' outputs, reference.

    networks: {name: weights}, each run once more, in bf16.
    """
    (shown, side), images = PICTURE, list_images(args.work / "inside" / "lq")
    device, cells = runs.start_world(args.device).device, []
    nets = {name: archs.ready(archs.load_run(path, name)[0], device, "bf16") for name, path in networks.items()}
    for stem in [stem for stem in (*shown, *images) if stem in images][:3]:
        lq, gt = (load_image(list_images(args.work / "inside" / part)[stem])[None].float() / 255
                  for part in ("lq", "gt"))
        of_nets = {name: archs.upscale_tiled(net, lq.to(device)).clamp(0, 1).cpu() for name, net in nets.items()}
        cells.append(jobs.middle_row(lq, of_nets, gt, side))
    pictures.save_grid(args.results / "selfsup.png", cells)


def markdown_tables(summary):
    """The results as Markdown: scores and differences, pre-trainings, Fig. 7, Fig. 8."""
    parts = []
    for folder, values in summary["sets"].items():
        moved = ", ".join(f"{row} {max(moves):.2g}" for row, moves in values["movement"].items())
        parts.append(f"{folder}, {values['images']} images\n\n{jobs.metric_tables(values)}\n\nmovement: {moved}")
    names = [f"{metric}{end}" for metric in ("psnr", "percep") for end in ("", "_shuffled", "_bicubic")] + ["explained"]
    rows = [[network, *(f"{values[name]:.4g}" if name in values else "" for name in names)]
            for network, values in summary["pretraining"].items()]
    parts.append(runs.markdown(["pre-training", *names], rows))

    def with_interval(values, form):
        value, low, high = (format(v, form) for v in values)
        return f"{value} [{low}, {high}]"
    for lines in summary.get("fig7", []):
        rows = [[name, with_interval(values["half_minus_clean"], "+.2f")] for name, values in lines.items()]
        parts.append(runs.markdown(["line of Fig. 7", "PSNR of half a blur minus that of the true image, dB"], rows))
    for lines in summary.get("fig8", []):
        kinds = list(next(iter(lines.values()))["auc"])
        rows = [[name, *(with_interval(values["auc"][kind], ".3f") for kind in kinds)]
                for name, values in lines.items()]
        parts.append(runs.markdown(["area under the ROC curve of FAR", *kinds], rows))
    return "\n\n".join(parts)
