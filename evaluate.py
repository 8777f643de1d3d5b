"""Score networks on test images: one table, with intervals (paper Sec. 5, Tables 5, 7 and 8).

    python evaluate.py --weights runs/swinir-amo runs/swinir-amo+musiq             HGGT's Test-100, the paper's nine metrics
    python evaluate.py --weights runs/a W.pth --images SR --lq LR --gt HR --metrics psnr ranker piqe
    python evaluate.py --weights runs/a --data RealSR --protocol realsr
    python evaluate.py --weights runs/a+musiq/lora/adapter.pth --scale 0.5 0.7 1    an adapter at any strength
    python evaluate.py --diff A.json B.json                                         why do two tables disagree?
    python evaluate.py --demo                                                       what `make demo` ends with

Rows: baselines, --weights (weight files, run folders, adapters), --images (folders of ready-made outputs). Test images: --data is HGGT, another quintuplet set, or RealSR v3;
--lq and --gt are plain pairs; --lq alone has no references. With labels the references of an image are its positives, full-reference metrics
being averaged over them (HGGT); without, its original. Outputs are rounded to 8 bit. No-reference metrics see the whole image, in native units.
Metrics: psnr, ssim, vgg (the perceptual loss as a distance), flat_hf (high-frequency share of the reference's flat places), ranker,
module:function, and every pyiqa metric. Scores are kept under --cache (scoring.py): another row or call costs only what is new. torchrun shares the images.
"""
import argparse
import re
from pathlib import Path

import runs

NINE, FULL_REFERENCE = runs.literal("report/tables", "NINE"), runs.literal("metrics", "FULL_REFERENCE")
DEMO = dict(weights=[Path("runs/compact-small-orig"), Path("runs/compact-small-amo")],
            lq=Path("datasets/demo/Test/Blind_Degradation_Benchmark_LQ/demo/Blind_LR"), gt=Path("datasets/demo/Test/GT/demo/untouched"),
            metrics=["ranker", "piqe", "psnr"], out_json=Path("runs/demo.json"), figure=Path("runs/demo.png"))
PROTOCOLS = {                                                                      # of full-reference metrics
    "hggt": dict(border=4, y=False, says="RGB, 4 pixels of border cropped, mean over an image's references (HGGT: its positives)"),
    "realsr": dict(border=4, y=False, says="RGB, 4 pixels of border cropped, one reference"),
    "whole-y": dict(border=0, y=True, says="PSNR and SSIM on Y of BT.601, all others on RGB, nothing cropped"),
    "y": dict(border=4, y=True, says="PSNR and SSIM on Y of BT.601, all others on RGB, 4 pixels of border cropped"),
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=runs.Help)
    p.add_argument("--demo", action="store_true", help="the runs and test images of `make demo`")
    g = p.add_argument_group("rows")
    g.add_argument("--weights", type=Path, nargs="+", default=[], metavar="PATH", help="weight files, run folders, adapter.pth files of finetune_lora.py")
    g.add_argument("--weights-key", choices=["params_ema", "params"], help="key to take; default params_ema, else params, else bare")
    g.add_argument("--pad-mode", choices=["hggt", "swinir"],
                   help="SwinIR only; default: as the run was trained, else hggt for pixelshuffle files and swinir for nearest+conv files")
    g.add_argument("--names", nargs="+", default=[], metavar="NAME", help="what the rows of --weights are called, one for each; default: folder or file")
    g.add_argument("--base", type=Path, metavar="PATH", help="weights or run that the adapters belong to; default: what their run folder says")
    g.add_argument("--scale", type=runs.number(float), nargs="+", default=[1.0], metavar="S", help="strengths of adapters, one row each")
    g.add_argument("--images", type=Path, nargs="+", default=[], metavar="DIR", help="folders of outputs, <stem>.png, else <stem>_<anything>.png")
    g.add_argument("--baselines", nargs="*", choices=["bicubic", "reference", "gold"], default=["bicubic"],
                   help="bicubic interpolation; the originals or references judged as if they were outputs; gold: per image and no-reference metric "
                        "the best of a quintuplet's versions (the paper's Gold Standard)")
    g = p.add_argument_group("test images")
    g.add_argument("--data", type=Path, default=Path("datasets/HGGT"), metavar="DIR", help="HGGT, a set of its layout, or RealSR v3 (<camera>/Test/4)")
    g.add_argument("--lq", type=Path, metavar="DIR", help="folder of low-resolution images, instead of --data")
    g.add_argument("--gt", type=Path, metavar="DIR", help="folder of references of the same names")
    g.add_argument("--only", type=Path, metavar="FILE", help="text file of image names, one per line: score these alone")
    g.add_argument("--degradation", choices=["one-round", "two-round"], help="make the LR images from the originals, always the same; default: those of the set")
    g.add_argument("--protocol", choices=list(PROTOCOLS), default="hggt", help="; ".join(f"{k}: {v['says']}" for k, v in PROTOCOLS.items()))
    g = p.add_argument_group("metrics")
    g.add_argument("--metrics", nargs="+", metavar="NAME", help="see above; default: the paper's nine, the no-reference ones where there are no references")
    g.add_argument("--metric-weights", nargs="*", default=[], metavar="NAME=FILE", help="local weight files of metrics")
    g.add_argument("--cache", type=Path, default=Path("runs/evaluation-cache"), metavar="DIR", help="scores of earlier calls")
    g = p.add_argument_group("computing")
    g.add_argument("--tile", type=runs.TILE, metavar="SIDE",
                   help="LR tile in pixels; 0: whole image, as HGGT tests; default: 0 with --protocol realsr, else 256 (HGGT's test images have 128, so they stay whole); "
                        "halved where a GPU's memory does not suffice")
    g.add_argument("--batch-size", type=runs.SIZE, default=8, help="outputs of one image that a metric sees at a time")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    g.add_argument("--threads", type=runs.COUNT, default=0, help="CPU threads; 0: PyTorch's choice")
    g = p.add_argument_group("results (a Markdown table is printed)")
    g.add_argument("--out-json", type=Path, metavar="FILE", help="every image's scores, means, intervals and what made them")
    g.add_argument("--csv", type=Path, metavar="FILE", help="every image's scores")
    g.add_argument("--latex", type=Path, metavar="FILE", help="the table as LaTeX, with the paper's groups of columns")
    g.add_argument("--figure", type=Path, metavar="FILE", help="PNG: each row | GT, of whole images; LR | GT | each row, of --crop; GT: the reference with the best inset score, "
                   "the first one for a metric that compares")
    g.add_argument("--inset", metavar="NAME", help="the metric whose score stands above each cell; default: musiq, else the last no-reference one, else the first")
    g.add_argument("--figure-images", type=runs.SIZE, default=4, help="rows of the picture")
    g.add_argument("--crop", nargs="+", default=[], metavar="STEM:X,Y,SIDE", help="rows of the picture: squares of images, in HR pixels, instead of whole images")
    g.add_argument("--front", nargs=3, metavar=("METRIC", "METRIC", "FILE"), help="PNG: the rows' means of one metric against another")
    g.add_argument("--page", type=Path, metavar="FILE", help="one self-contained HTML page: every output with synchronised zoom, before/after slider, sorted by any score")
    g.add_argument("--page-images", type=runs.COUNT, default=24, help="images on the page, evenly spread; 0: all")
    g.add_argument("--diff", type=Path, nargs=2, metavar="FILE", help="compare two files of --out-json, and nothing else")
    if p.parse_known_args(argv)[0].demo:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    if not args.diff:
        complete(p, args)
    return args


def complete(p, args):
    """Fill the defaults that depend on other flags; refuse combinations that cannot work."""
    references = args.gt is not None or args.lq is None
    args.metrics = args.metrics or [m for m in NINE if references or m not in FULL_REFERENCE]
    if args.tile is None:
        args.tile = 0 if args.protocol == "realsr" else 256
    needy = [m for m in args.metrics if m in FULL_REFERENCE]
    if not references and needy:
        p.error(f"--metrics {' '.join(needy)}: compared with references: --gt DIR is needed")
    if not references and "reference" in args.baselines:
        p.error("--baselines reference: needs --gt DIR")
    if args.lq is not None and ("gold" in args.baselines or args.degradation):
        p.error(f"{'--baselines gold' if 'gold' in args.baselines else '--degradation'}: needs a quintuplet set (--data)")
    if args.gt is not None and args.lq is None:
        p.error("--gt DIR holds the references of --lq DIR: give both")
    if not (args.weights or args.baselines or args.images):
        p.error("nothing to score: give --weights, --images or --baselines")
    if args.names and len(args.names) != len(args.weights):
        p.error(f"--names: {len(args.names)} names for {len(args.weights)} --weights; give one for each")
    if args.base and not any(path.name == "adapter.pth" for path in args.weights):
        p.error("--base: names what adapters belong to, and no adapter.pth is among --weights")
    for flag, metrics in (("--front", (args.front or [])[:2]), ("--inset", [args.inset] if args.inset else [])):
        for metric in metrics:
            if metric not in args.metrics:
                p.error(f"{flag} {metric}: not among --metrics ({', '.join(args.metrics)})")
    for flag, file in (("--figure", args.figure), ("--front", args.front and Path(args.front[2]))):
        if file and file.suffix.lower() != ".png":
            p.error(f"{flag} {file}: a PNG is written: name a file that ends in .png")
    for flag, given in (("--crop", args.crop), ("--inset", args.inset)):
        if given and not args.figure:
            p.error(f"{flag}: a part of --figure FILE.png: give both")
    for word in args.crop:
        if not re.fullmatch(r".+:\d+,\d+,\d+", word):
            p.error(f"--crop {word}: write STEM:X,Y,SIDE, the last three in HR pixels")


ARGS = parse_args() if __name__ == "__main__" else None                           # --help needs no torch: seconds

import json
import math
import sys
from functools import partial

import torch

import archs
import data
import lora
import metrics as quality
import metrics as scoring
import runs
from images import find_realsr, image_size, list_images, match_images
from report import page, pictures, tables

# Test images: {stem: {"lq": path or None, "refs": [path], "versions": [path]}}; lq None: degraded from versions[0]

def find_items(args, world):
    if args.lq is not None:
        return find_pairs(args, world)
    pairs = find_realsr(args.data)
    if pairs:
        return {stem: {"lq": lq, "refs": [gt], "versions": []} for stem, (lq, gt) in pairs.items()}
    if not (args.data / "Test").is_dir() and (args.protocol == "realsr" or args.data.name.lower().startswith("realsr")):
        raise runs.UserError(f"--data {args.data}: no RealSR v3 there (<camera>/Test/4/*_LR4.png and *_HR.png); README says where it is found")
    sets = data.find_sets(args.data, "Test")
    if sets is None:
        raise runs.UserError(f"{args.data}: no Test split of HGGT's layout and no RealSR; name test images with --lq and --gt")
    if sets.lq is None and args.degradation is None:
        raise runs.UserError(f"{args.data}: this set has no LR images (Test/**/Blind_LR): --degradation one-round or two-round makes them")
    labels = sets.labels() if sets.label_folder else torch.zeros(len(sets.stems), len(sets.versions), dtype=torch.long)
    items = {}
    for stem, codes in zip(sets.stems, labels.tolist()):
        refs = [sets.path(stem, v) for v, code in zip(sets.versions, codes) if code == data.POSITIVE] if sets.label_folder else [sets.path(stem)]
        items[stem] = {"lq": None if args.degradation else sets.lq[stem], "refs": refs, "versions": [sets.path(stem, v) for v in sets.versions]}
    return items


def choose(items, file):
    """The items that --only FILE names."""
    if not file.is_file():
        raise runs.UserError(f"--only {file}: no such file")
    names = file.read_text().split()
    unknown = [name for name in names if name not in items]
    if unknown or not names:
        raise runs.UserError(f"--only {file}: " + (f"no image is called {unknown[0]}" if unknown else "names no image"))
    return {name: items[name] for name in names}


def find_pairs(args, world):
    for folder in filter(None, (args.lq, args.gt)):
        if not folder.is_dir():
            raise runs.UserError(f"{folder}: no such folder" + ("; train.py --demo makes the demo's" if args.demo else ""))
    lqs, gts = list_images(args.lq), list_images(args.gt) if args.gt else {}
    missing, more = (sorted(set(a) - set(b)) if args.gt else [] for a, b in ((lqs, gts), (gts, lqs)))
    if missing:
        raise runs.UserError(f"{args.gt}: no reference for {len(missing)} of {len(lqs)} images, first {missing[0]}")
    if more and world.is_main:
        print(f"remark: {len(more)} references in --gt {args.gt} have no image in --lq {args.lq} and are left out, first {more[0]}")
    return {stem: {"lq": path, "refs": [gts[stem]] if gts else [], "versions": []} for stem, path in lqs.items()}


def find_rows(args, items, device):
    """{name: Row}; ValueError for two of one name."""
    rows = {}
    if "bicubic" in args.baselines:
        rows["bicubic"] = scoring.Row(scoring.bicubic, None, "bicubic", None)
    if "reference" in args.baselines:
        rows["reference"] = scoring.Row(None, {stem: (item["versions"] or item["refs"])[0] for stem, item in items.items()}, None, None)
    for k, path in enumerate(args.weights):
        adapter = path.name == "adapter.pth"
        for scale in args.scale if adapter else [None]:
            net, info = lora.load_tuned(path, scale, args.base, args.weights_key, args.pad_mode, "--base") if adapter else \
                archs.load_x4(path, "--weights", args.weights_key, args.pad_mode)
            name = args.names[k] if args.names else row_name(path)
            made = {"hash": lora.base_hash(net)[:24], "pad_mode": getattr(net, "pad_mode", None), "tile": args.tile, "overlap": archs.OVERLAP}
            add_row(rows, name + (f" x{scale:g}" if adapter and (len(args.scale) > 1 or not args.names) else ""),
                    scoring.Row(partial(archs.upscale_tiled, net.to(device), tile=args.tile), None, scoring.digest(made), info | made))
    for folder in args.images:
        files = match_images(folder, items, "--images")
        add_row(rows, folder.name, scoring.Row(None, files, None, {"folder": str(folder), "hash": scoring.digest([scoring.digest(files[stem]) for stem in items])}))
    return rows


def row_name(path):
    """A run folder's name, also for the weights of it that name no step; else the file's, without suffix."""
    if path.parent.name in ("lora", "weights") and path.name in ("adapter.pth", "merged.pth"):
        return path.parent.parent.name
    return path.name if path.is_dir() else path.stem


def add_row(rows, name, row):
    if name in rows or name in ("gold", "LR") or name.partition(" ")[0] == "GT":
        raise runs.UserError(f"{'two rows are called' if name in rows else 'no row can be called'} {name}: rename a file or folder" + ", or use --names" * (row.files is None))
    rows[name] = row


def check_sizes(rows, items, metrics, crops):
    """ValueError where what is compared, or cropped alike, differs in size: ready-made outputs and LR x4 against references. From headers, before any work."""
    if not crops and not any(metric.full_reference for metric in metrics.values()):
        return
    for stem, item in items.items():
        x4 = f"{item['lq']} x4" if item["lq"] else f"{item['versions'][0]}, cut to multiples of 4,", pictures.hr_size(item)
        others = [(f"its reference {ref}", image_size(ref)) for ref in item["refs"]] + [x4] * bool(crops)
        for name, row in rows.items():
            file, (width, height) = x4 if row.files is None else (row.files[stem], image_size(row.files[stem]))
            for other, (w, h) in others:
                if (w, h) != (width, height):
                    raise runs.UserError(f"{name}, image {stem}: {file} has {width}x{height} pixels, {other} {w}x{h}: outputs must be as large as their references, x4 the LR image")


# Metrics

def create_metrics(args, device):
    """{name: Metric}. All that cannot be had end in one ValueError or OSError, before any work."""
    files, metrics, lost = {}, {}, []
    for word in args.metric_weights:
        name, _, file = word.rpartition("=")
        if name not in args.metrics:
            raise runs.UserError(f"--metric-weights {word}: write NAME=FILE with a NAME of --metrics ({', '.join(args.metrics)})")
        files[name] = file
    protocol = PROTOCOLS[args.protocol]
    for m in args.metrics:
        try:
            metrics[m] = quality.create_metric(m, device, files.get(m), protocol["border"], protocol["y"])
        except runs.UserError as error:
            text = str(error).replace("--vgg-weights FILE, or do without the perceptual loss: --lambda-p 0", "--metric-weights vgg=FILE")
            lost.append(f"{'' if text.startswith('--metric') else f'--metrics {m}: '}{text}{hub_file(error)}")
    if lost:
        raise runs.UserError((f"{len(lost)} metrics cannot be had: " if len(lost) > 1 else "") + " || ".join(lost))
    return metrics


def hub_file(error):
    """Which file of which repository was asked of the Hugging Face hub, and where its cache is, if that is what an error began with; else ""."""
    while error is not None:
        try:
            url = str(error.request.url)
        except (AttributeError, RuntimeError):                                    # httpx raises where an error has none
            url = ""
        if "huggingface" in url:
            from huggingface_hub.constants import HF_HUB_CACHE
            return f"; asked for was {url}; the hub's cache is {HF_HUB_CACHE}"
        error = error.__cause__ or error.__context__
    return ""


# Results

def explain(paths):
    """--diff"""
    results = []
    for path in paths:
        if not path.is_file():
            raise runs.UserError(f"--diff {path}: no such file")
        try:
            results.append(json.loads(path.read_bytes()))
            tables.check_result(results[-1])
        except (ValueError, RecursionError) as error:
            raise runs.UserError(f"--diff {path}: not a file of --out-json ({error})") from None
    lines = tables.explain(*results)
    print("\n".join(lines) or "no difference: same commit, images, weights, protocol, versions and scores")


def result_of(args, items, rows, metrics, scores, means, differences, machine):
    """What --out-json holds: every number, and what made it."""
    return {"command": sys.argv, **machine, "versions": scoring.versions(), "images": len(items),
            "protocol": {"name": args.protocol, **PROTOCOLS[args.protocol], "degradation": args.degradation}, "metrics": {m: metric.identity for m, metric in metrics.items()},
            "files": {stem: {"lq": scoring.digest(item["lq"] or item["versions"][0]), "refs": [scoring.digest(p) for p in item["refs"]]} for stem, item in items.items()},
            "lower_is_better": {m: metric.lower_is_better for m, metric in metrics.items()}, "weights": {name: row.record for name, row in rows.items() if row.record},
            "mean": {row: {m: cell["mean"] for m, cell in cells.items()} for row, cells in means.items()},
            "intervals": {row: {m: [cell["low"], cell["high"]] for m, cell in cells.items()} for row, cells in means.items()},
            "differences": differences, "scores": scores}


def main(args):
    if args.diff:
        return explain(args.diff)
    world = runs.start_world(args.device, args.threads)
    outputs = {"--out-json": args.out_json, "--csv": args.csv, "--latex": args.latex, "--figure": args.figure, "--page": args.page, "--front": args.front and Path(args.front[2])}
    for flag, path in outputs.items():
        runs.check_output(path, flag)
    runs.check_writable(args.cache, "--cache")
    items = find_items(args, world)
    if args.only:
        items = choose(items, args.only)
    crops = pictures.find_crops(args.crop, items)
    metrics = create_metrics(args, world.device)
    needy, without = [m for m, metric in metrics.items() if metric.full_reference], [stem for stem, item in items.items() if not item["refs"]]
    if needy and without:
        why = "none of its versions is a positive for two of three annotators" if items[without[0]]["versions"] else "--gt DIR is needed"
        raise runs.UserError(f"--metrics {' '.join(needy)}: compared with references, and {len(without)} of {len(items)} images have none, first {without[0]}: {why}")
    rows = find_rows(args, items, world.device)
    check_sizes(rows, items, metrics, crops)

    scores = scoring.score(rows, items, metrics, args.cache, world, PROTOCOLS[args.protocol], args.degradation, "gold" in args.baselines, args.batch_size)
    if not world.is_main:
        return
    lower, machine = {m: metric.lower_is_better for m, metric in metrics.items()}, runs.describe_machine()
    means, differences = tables.summarise(scores, lower)
    protocol = f"protocol {args.protocol}: {PROTOCOLS[args.protocol]['says']}"
    print(f"{protocol}; mean of {len(items)} images\n\n{tables.markdown(means, lower, differences)}\n")
    print("↑ higher is better, ↓ lower is better; best **bold**, second *italic*; 95 % bootstrap intervals over images; a difference in bold has an interval "
          "without zero and p < .05 in a paired t test, for any other there is no evidence")
    if args.out_json:
        runs.save_json(args.out_json, result_of(args, items, rows, metrics, scores, means, differences, machine))
    if args.csv:
        runs.write_atomic(args.csv, lambda t: t.write_text(tables.to_csv(scores, lower, args.protocol)))
    if args.latex:
        title = f"{protocol}; n = {len(items)} images; commit {machine['commit']}"
        runs.write_atomic(args.latex, lambda t: t.write_text(tables.latex(means, lower, title)))
    cells = partial(scoring.cells_of, items=items, rows=rows, degradation=args.degradation, device=world.device)
    if args.figure:
        alone = [m for m in metrics if not metrics[m].full_reference]
        inset = args.inset or ("musiq" if "musiq" in metrics else [args.metrics[0], *alone][-1])
        stems = list(items)[::max(1, len(items) // args.figure_images)][:args.figure_images]
        pictures.figure(args.figure, crops, stems, list(rows), cells, scores, means, inset, metrics[inset], world.device)
    if args.page:
        every = math.ceil(len(items) / args.page_images) if args.page_images else 1
        page.write(args.page, f"{', '.join(scores)}: {len(items)} images, protocol {args.protocol}", {stem: cells(stem) for stem in list(items)[::every]}, scores, lower, means)
    if args.front:
        pictures.front(args.front[2], means, *args.front[:2], lower)
    for path in filter(None, outputs.values()):
        print(f"wrote {path}")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
