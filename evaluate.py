"""Score checkpoints on a folder of low-resolution images: one table, one JSON file, one picture.

    python evaluate.py --demo                                                              what `make demo` ends with
    python evaluate.py --weights runs/a runs/b --lq LR --gt HR --metrics ranker piqe psnr --out-json ab.json --figure ab.png

Rows are bicubic interpolation (--baselines) and one per checkpoint (a file, or a run folder: its newest EMA weights). Outputs are rounded
to 8 bit before they are scored. Metrics: psnr and ssim (RGB, borders of 4 pixels cropped, as HGGT does), vgg (the perceptual loss as
a distance), flat_hf (high-frequency share of the reference's flat places: sees grids and noise), any reward that train.py knows (a pyiqa
no-reference metric, ranker, module:function); no-reference metrics see the whole image, in native units.
"""
import argparse
from pathlib import Path

import flags

DEMO = dict(weights=[Path("runs/compact-small-orig"), Path("runs/compact-small-amo")],
            lq=Path("datasets/demo/Test/Blind_Degradation_Benchmark_LQ/demo/Blind_LR"), gt=Path("datasets/demo/Test/GT/demo/untouched"),
            metrics=["ranker", "piqe", "psnr"], out_json=Path("runs/demo.json"), figure=Path("runs/demo.png"))


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=flags.Help)
    p.add_argument("--demo", action="store_true", help="the runs and test images of `make demo`")
    p.add_argument("--weights", type=Path, nargs="+", default=[], metavar="PATH", help="checkpoints: weight files or run folders")
    p.add_argument("--weights-key", choices=["params_ema", "params"], help="key to take; default params_ema, else params, else bare")
    p.add_argument("--baselines", nargs="*", choices=["bicubic", "reference"], default=["bicubic"],
                   help="rows without a checkpoint: bicubic interpolation, and the references judged as if they were outputs")
    p.add_argument("--pad-mode", choices=["hggt", "swinir"],
                   help="SwinIR only; default: as the run was trained, else hggt for pixelshuffle files and swinir for nearest+conv files")
    p.add_argument("--lq", type=Path, help="folder of low-resolution images")
    p.add_argument("--gt", type=Path, help="folder of references of the same names; needed by psnr, ssim, vgg, flat_hf")
    p.add_argument("--metrics", nargs="+", default=["psnr"], metavar="NAME", help="psnr, ssim, vgg, flat_hf, or a no-reference metric (see above)")
    p.add_argument("--metric-weights", nargs="*", default=[], metavar="NAME=FILE", help="local weight files of metrics")
    p.add_argument("--tile", type=flags.TILE, default=256, help="LR tile in pixels, more than 64; 0: whole image")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    p.add_argument("--threads", type=flags.COUNT, default=0, help="CPU threads; 0: PyTorch's choice")
    p.add_argument("--out-json", type=Path, help="write every image's scores, the means and what made them")
    p.add_argument("--figure", type=Path, help="write a PNG: bicubic | each checkpoint | reference")
    p.add_argument("--figure-images", type=flags.SIZE, default=4, help="rows of the picture")
    if p.parse_known_args(argv)[0].demo:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    if args.lq is None:
        p.error("--lq DIR is needed: which images?")
    needy = [m for m in args.metrics if m in flags.WITH_REFERENCE]
    if args.gt is None and needy:
        p.error(f"--metrics {' '.join(needy)}: compared with references: --gt DIR is needed")
    if args.gt is None and "reference" in args.baselines:
        p.error("--baselines reference: needs --gt DIR")
    if not args.weights and not args.baselines:
        p.error("nothing to score: give --weights or --baselines")
    return args


ARGS = parse_args() if __name__ == "__main__" else None                           # --help needs no torch: seconds

import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

import archs
import data
import degradations
import quality
import runs


def markdown(table, metrics, lower):
    """{row: {metric: mean}} as a Markdown table, the best of each column in bold."""
    rivals = [row for name, row in table.items() if name != "reference"] or list(table.values())
    best = {m: (min if lower[m] else max)(row[m] for row in rivals) for m in metrics}
    digits = {m: 3 if all(abs(row[m]) < 2 for row in table.values()) else 2 for m in metrics}
    cell = lambda row, m: "**" * (row[m] == best[m]) + f"{row[m]:.{digits[m]}f}" + "**" * (row[m] == best[m])
    return runs.markdown(["", *(f"{m} {'↓' if lower[m] else '↑'}" for m in metrics)],
                         [[name, *(cell(row, m) for m in metrics)] for name, row in table.items()])


@torch.no_grad()
def main(args):
    world = runs.start_world(args.device, args.threads)
    if world.size > 1:
        raise ValueError("evaluate.py runs as one process: start it without torchrun")
    for folder in filter(None, (args.lq, args.gt)):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder" + ("; train.py --demo makes the demo's" if args.demo else ""))
    runs.check_output(args.out_json, "--out-json")
    runs.check_output(args.figure, "--figure")
    lqs = data.list_images(args.lq)
    gts = data.list_images(args.gt) if args.gt else {}
    missing = sorted(set(lqs) - set(gts)) if args.gt else []
    if missing:
        raise FileNotFoundError(f"{args.gt}: no reference for {len(missing)} of {len(lqs)} images, first {missing[0]}")
    files = {}
    for word in args.metric_weights:
        name, _, file = word.rpartition("=")
        if name not in args.metrics:
            raise ValueError(f"--metric-weights {word}: write NAME=FILE with a NAME of --metrics ({', '.join(args.metrics)})")
        files[name] = file
    metrics = {name: quality.create_metric(name, world.device, files.get(name)) for name in args.metrics}
    lower = {name: metrics[name][1] for name in metrics}

    baselines = {"bicubic": lambda lq, gt: F.interpolate(lq, scale_factor=4, mode="bicubic"), "reference": lambda lq, gt: gt}
    nets, sources = {row: baselines[row] for row in args.baselines}, {}
    for path in args.weights:
        net, info = archs.load_x4(path, "--weights", args.weights_key, args.pad_mode)
        net = net.to(world.device)
        name = path.name if path.is_dir() else path.stem
        if name in nets:
            raise ValueError(f"--weights: two checkpoints are called {name}: rename one")
        nets[name] = lambda lq, gt, net=net: archs.upscale_tiled(net, lq, tile=args.tile, overlap=32)
        sources[name] = info

    scores = {row: {} for row in nets}                                            # row -> stem -> metric -> value
    shown = list(lqs)[::max(1, len(lqs) // max(1, args.figure_images))][:args.figure_images]
    pictures = []
    for stem, path in tqdm(lqs.items(), unit="img"):
        lq = data.load_image(path)[None].to(world.device).float() / 255
        gt = data.load_image(gts[stem])[None].to(world.device).float() / 255 if args.gt else None
        cells = []
        for row, upscale in nets.items():
            sr = degradations.to_8bit(upscale(lq, gt))
            scores[row][stem] = {name: metric(sr, gt).item() for name, (metric, _) in metrics.items()}
            if stem in shown:
                told = " ".join(f"{k.partition(':')[0]} {v:.1f}" for k, v in list(scores[row][stem].items())[:3])
                cells.append((sr[0].cpu(), f"{row}\n{told}"))
        if stem in shown:
            pictures.append(cells + ([(gt[0].cpu(), "reference")] if args.gt and "reference" not in args.baselines else []))
    table = {row: {m: sum(s[m] for s in images.values()) / len(images) for m in metrics} for row, images in scores.items()}
    print(markdown(table, list(metrics), lower))
    print(f"mean of {len(lqs)} images; ↑ higher is better, ↓ lower is better")
    if args.out_json:
        runs.save_json(args.out_json, {"command": sys.argv, **runs.describe_machine(), "images": len(lqs), "lower_is_better": lower,
                                       "weights": sources, "mean": table, "scores": scores})
    if args.figure:
        data.save_grid(args.figure, pictures)
    for path in filter(None, (args.out_json, args.figure)):
        print(f"wrote {path}")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
