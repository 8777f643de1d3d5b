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

ROWS = ("before", "LWay", "baseline", "controller", "FAR", "both", "flipped", "shifted", "blur control",
        "unsharp control", "blur and colour control", "baseline, long", "FAR, long", "both, perturbed", "both, fp32",
        "before, compact", "both, compact")
# rows that are the same for every seed
CONTROLS = ("before", "before, compact", "blur control", "unsharp control", "blur and colour control")
PAIRS = [*((row, "before") for row in ("LWay", "baseline", "controller", "FAR", "both", "flipped")),
         ("controller", "baseline"), ("FAR", "baseline"), ("both", "baseline"), ("both", "LWay"), ("both", "flipped"),
         ("shifted", "both"), ("baseline", "LWay"), ("both", "blur control"), ("both", "unsharp control"),
         ("both", "blur and colour control"), ("both, compact", "before, compact"),
         *((row, "before") for row in ("baseline, long", "FAR, long", "both, perturbed", "both, fp32")),
         ("FAR, long", "baseline, long"), ("FAR, long", "FAR")]
# test images that may be shown, side of the part
PICTURE = ("test_set14-comic", "test_set14-baboon", "test_set5-butterfly"), 96
NETWORKS = {"FAR": "FAR alone", "both": "FAR and controller", "FAR-long": "FAR, three times as long"}


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
            lines, more = summary.setdefault(path.stem[:4], {}), ", LR without noise" * ("clean" in path.stem)
            lines |= {without_seed(name) + more: {key: v for key, v in values.items()
                                                  if key in ("auc", "far_enc") or path.stem[3] == "7"}
                      for name, values in content["lines"].items()}
        elif path.stem.startswith("colours-"):
            summary.setdefault("colours", {})[content["domain"]] = {
                row: float(np.mean(list(values.values()))) for row, values in content["colours"].items()}
        elif path.stem == "precision":
            summary["precision"] = content["differences"]
    for domain in ("inside", "outside", "realsr"):
        if "before" in sets.get(domain, {}):
            summary["sets"][domain] = compare(sets[domain])
    runs.save_json(args.results / "selfsup.json", summary)
    draw(summary, args.results / "selfsup")
    print(markdown_tables(summary))


def without_seed(line):
    """A line of Fig. 7 is called <network>-<seed>, <rule>, and one of Fig. 8 <network>-<seed>."""
    network, comma, rule = line.partition(",")
    return network.rpartition("-")[0] + comma + rule


def draw(summary, stem):
    """STEM-fig7.png and STEM-fig8.png, of what the report has."""
    # matplotlib is not needed by anything else
    from selfsup import probe
    if "fig7" in summary:
        probe.draw7(stem.with_name(f"{stem.name}-fig7.png"), summary["fig7"])
    if "fig8" in summary:
        areas = {NETWORKS[name]: lines["auc"] for name, lines in summary["fig8"].items()}
        probe.draw_areas(stem.with_name(f"{stem.name}-fig8.png"), areas)


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
    if "fig7" in summary:
        rows = [[name, with_interval(values["psnr_change"][5], "+.2f")] for name, values in summary["fig7"].items()]
        parts.append(runs.markdown(["line of Fig. 7", "PSNR of half a blur minus that of the true image, dB"], rows))
    if "fig8" in summary:
        kinds = list(next(iter(summary["fig8"].values()))["auc"])
        rows = [[name, *(with_interval(values["auc"][kind], ".3f") for kind in kinds)]
                for name, values in summary["fig8"].items()]
        parts.append(runs.markdown(["area under the ROC curve of FAR", *kinds], rows))
    return "\n\n".join(parts)
