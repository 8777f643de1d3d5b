"""Score networks on test images: one table, with intervals (paper Sec. 5, Tables 5, 7 and 8).

    python evaluate.py --weights runs/swinir-amo runs/swinir-amo+musiq             HGGT's Test-100, the paper's nine metrics
    python evaluate.py --weights runs/a W.pth --images SR --lq LR --gt HR --metrics psnr ranker piqe
    python evaluate.py --weights runs/a --data RealSR --protocol realsr
    python evaluate.py --weights runs/a+musiq/lora/adapter.pth --scale 0.7          an adapter at any strength
    python evaluate.py --diff A.json B.json                                         why do two tables disagree?
    python evaluate.py --demo                                                       what `make demo` ends with

Rows: baselines, --weights (weight files, run folders, adapters), --images (folders of ready-made outputs). Test images: --data is HGGT, another quintuplet set, or RealSR v3;
--lq and --gt are plain pairs; --lq alone has no references. With labels the references of an image are its positives, full-reference metrics
being averaged over them (HGGT); without, its original. Outputs are rounded to 8 bit. No-reference metrics see the whole image, in native units.
Metrics: psnr, ssim, vgg (the perceptual loss as a distance), flat_hf (high-frequency share of the reference's flat places), ranker,
module:function, and every pyiqa metric. Scores are kept under --cache: another row or call costs only what is new. torchrun shares the images.
"""
import argparse
from pathlib import Path

import flags

DEMO = dict(weights=[Path("runs/compact-small-orig"), Path("runs/compact-small-amo")],
            lq=Path("datasets/demo/Test/Blind_Degradation_Benchmark_LQ/demo/Blind_LR"), gt=Path("datasets/demo/Test/GT/demo/untouched"),
            metrics=["ranker", "piqe", "psnr"], out_json=Path("runs/demo.json"), figure=Path("runs/demo.png"))
PROTOCOLS = {                                                                      # of full-reference metrics
    "hggt": dict(border=4, y=False, says="RGB, 4 pixels of border cropped, mean over an image's positive references"),
    "realsr": dict(border=4, y=False, says="RGB, 4 pixels of border cropped, one reference"),
    "y": dict(border=4, y=True, says="PSNR and SSIM on Y of BT.601, all others on RGB, 4 pixels of border cropped"),
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=flags.Help)
    p.add_argument("--demo", action="store_true", help="the runs and test images of `make demo`")
    g = p.add_argument_group("rows")
    g.add_argument("--weights", type=Path, nargs="+", default=[], metavar="PATH", help="weight files, run folders, adapter.pth files of finetune_lora.py")
    g.add_argument("--weights-key", choices=["params_ema", "params"], help="key to take; default params_ema, else params, else bare")
    g.add_argument("--pad-mode", choices=["hggt", "swinir"],
                   help="SwinIR only; default: as the run was trained, else hggt for pixelshuffle files and swinir for nearest+conv files")
    g.add_argument("--scale", type=flags.number(float), default=1.0, help="strength of adapters")
    g.add_argument("--images", type=Path, nargs="+", default=[], metavar="DIR", help="folders of outputs, <stem>.png or <stem>_<anything>.png")
    g.add_argument("--baselines", nargs="*", choices=["bicubic", "reference", "gold"], default=["bicubic"],
                   help="bicubic interpolation; the originals or references judged as if they were outputs; gold: per image and no-reference metric "
                        "the best of a quintuplet's versions (the paper's Gold Standard)")
    g = p.add_argument_group("test images")
    g.add_argument("--data", type=Path, default=Path("datasets/HGGT"), metavar="DIR", help="HGGT, a set of its layout, or RealSR v3 (<camera>/Test/4)")
    g.add_argument("--lq", type=Path, metavar="DIR", help="folder of low-resolution images, instead of --data")
    g.add_argument("--gt", type=Path, metavar="DIR", help="folder of references of the same names")
    g.add_argument("--degradation", choices=["one-round", "two-round"], help="make the LR images from the originals, always the same; default: those of the set")
    g.add_argument("--protocol", choices=list(PROTOCOLS), default="hggt", help="; ".join(f"{k}: {v['says']}" for k, v in PROTOCOLS.items()))
    g = p.add_argument_group("metrics")
    g.add_argument("--metrics", nargs="+", metavar="NAME", help="see above; default: the paper's nine, the no-reference ones where there are no references")
    g.add_argument("--metric-weights", nargs="*", default=[], metavar="NAME=FILE", help="local weight files of metrics")
    g.add_argument("--cache", type=Path, default=Path("runs/evaluation-cache"), metavar="DIR", help="scores of earlier calls")
    g = p.add_argument_group("computing")
    g.add_argument("--tile", type=flags.TILE, default=256, help="LR tile in pixels, more than 128; 0: whole image")
    g.add_argument("--batch-size", type=flags.SIZE, default=8, help="outputs of one image that a metric sees at a time")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    g.add_argument("--threads", type=flags.COUNT, default=0, help="CPU threads; 0: PyTorch's choice")
    g = p.add_argument_group("results (a Markdown table is printed)")
    g.add_argument("--out-json", type=Path, metavar="FILE", help="every image's scores, means, intervals and what made them")
    g.add_argument("--csv", type=Path, metavar="FILE", help="every image's scores")
    g.add_argument("--latex", type=Path, metavar="FILE", help="the table as LaTeX, with the paper's groups of columns")
    g.add_argument("--figure", type=Path, metavar="FILE", help="PNG: each row | GT, of whole images; LR | GT | each row, of --crop")
    g.add_argument("--figure-images", type=flags.SIZE, default=4, help="rows of the picture")
    g.add_argument("--crop", nargs="+", default=[], metavar="STEM:X,Y,SIDE", help="rows of the picture: squares of images, in HR pixels, instead of whole images")
    g.add_argument("--front", nargs=3, metavar=("METRIC", "METRIC", "FILE"), help="PNG: the rows' means of one metric against another")
    g.add_argument("--page", type=Path, metavar="FILE", help="one self-contained HTML page: every output with synchronised zoom, before/after slider, sorted by any score")
    g.add_argument("--page-images", type=flags.COUNT, default=24, help="images on the page, evenly spread; 0: all")
    g.add_argument("--diff", type=Path, nargs=2, metavar="FILE", help="compare two files of --out-json, and nothing else")
    if p.parse_known_args(argv)[0].demo:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    if args.diff:
        return args
    references = args.gt is not None or args.lq is None
    args.metrics = args.metrics or [m for m in flags.NINE if references or m not in flags.FULL_REFERENCE]
    needy = [m for m in args.metrics if m in flags.FULL_REFERENCE]
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
    for metric in (args.front or [])[:2]:
        if metric not in args.metrics:
            p.error(f"--front {metric}: not among --metrics ({', '.join(args.metrics)})")
    for word in args.crop:
        if not flags.CROP.fullmatch(word):
            p.error(f"--crop {word}: write STEM:X,Y,SIDE, the last three in HR pixels")
    return args


ARGS = parse_args() if __name__ == "__main__" else None                           # --help needs no torch: seconds

import hashlib
import importlib.metadata
import json
import math
import sys
from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

import archs
import data
import degradations
import lora
import page
import quality
import runs
import tables


def digest(value):
    """Hash of a file's bytes, or of plain values."""
    content = value.read_bytes() if isinstance(value, Path) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:24]


# Test images: {stem: {"lq": path or None, "refs": [path], "versions": [path]}}; lq None: degraded from versions[0]

def find_items(args):
    if args.lq is not None:
        for folder in filter(None, (args.lq, args.gt)):
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder}: no such folder" + ("; train.py --demo makes the demo's" if args.demo else ""))
        lqs, gts = data.list_images(args.lq), data.list_images(args.gt) if args.gt else {}
        missing = sorted(set(lqs) - set(gts)) if args.gt else []
        if missing:
            raise FileNotFoundError(f"{args.gt}: no reference for {len(missing)} of {len(lqs)} images, first {missing[0]}")
        return {stem: {"lq": path, "refs": [gts[stem]] if gts else [], "versions": []} for stem, path in lqs.items()}
    pairs = data.find_realsr(args.data)
    if pairs:
        return {stem: {"lq": lq, "refs": [gt], "versions": []} for stem, (lq, gt) in pairs.items()}
    sets = data.find_sets(args.data, "Test")
    if sets is None:
        raise FileNotFoundError(f"{args.data}: no Test split of HGGT's layout and no RealSR; name test images with --lq and --gt")
    if sets.lq is None and args.degradation is None:
        raise ValueError(f"{args.data}: this set has no LR images (Test/**/Blind_LR): --degradation one-round or two-round makes them")
    labels = sets.labels() if sets.label_folder else torch.zeros(len(sets.stems), len(sets.versions), dtype=torch.long)
    items = {}
    for stem, codes in zip(sets.stems, labels.tolist()):
        refs = [sets.path(stem, v) for v, code in zip(sets.versions, codes) if code == data.POSITIVE] if sets.label_folder else [sets.path(stem)]
        if not refs:
            raise ValueError(f"{sets.path(stem)}: none of its versions is a positive for two of three annotators, so it has no reference")
        items[stem] = {"lq": None if args.degradation else sets.lq[stem], "refs": refs, "versions": [sets.path(stem, v) for v in sets.versions]}
    return items


def load(path, device):
    return data.load_image(path)[None].to(device).float() / 255


def low_resolution(stem, item, args, device):
    """-> (1, 3, h, w) in [0, 1]"""
    if item["lq"] is not None:
        return load(item["lq"], device)
    gt = load(item["versions"][0], device)
    gt = data.cut_to_x4(gt)
    return degradations.degrade(gt, args.degradation, *([[runs.sample_seed(0, 0, k, f"test {stem}")] for k in (0, 1)]))


# Rows: {name: (function (stem, item, lq) -> (1, 3, 4h, 4w), identity: what the output depends on beside the LR image, record for the JSON)}

def find_rows(args, items, device):
    rows = {}
    if "bicubic" in args.baselines:
        rows["bicubic"] = (lambda stem, item, lq: F.interpolate(lq, scale_factor=4, mode="bicubic")), lambda stem: "bicubic", None
    if "reference" in args.baselines:
        of = lambda item: (item["versions"] or item["refs"])[0]
        rows["reference"] = (lambda stem, item, lq: load(of(item), device)), lambda stem: digest(of(items[stem])), None
    for path in args.weights:
        adapter = path.name == "adapter.pth"
        net, info = lora.load_tuned(path, args.scale, None, args.weights_key, args.pad_mode, "--weights") if adapter else \
            archs.load_x4(path, "--weights", args.weights_key, args.pad_mode)
        name = path.name if path.is_dir() else path.stem
        if path.parent.name in ("lora", "weights") and path.name in ("adapter.pth", "merged.pth"):          # of a run folder
            name = path.parent.parent.name + (f" x{args.scale:g}" if adapter else "")
        net = net.to(device)
        identity = digest([lora.base_hash(net), str(getattr(net, "pad_mode", None)), args.tile])
        add_row(rows, name, partial(upscale, net, args.tile), lambda stem, identity=identity: identity, info | {"identity": identity})
    for folder in args.images:
        files = data.match_images(folder, items, "--images")
        add_row(rows, folder.name, lambda stem, item, lq, files=files: load(files[stem], device), lambda stem, files=files: digest(files[stem]),
                {"folder": str(folder), "identity": digest([digest(files[stem]) for stem in items])})
    return rows


def add_row(rows, name, function, identity, record):
    if name in rows:
        raise ValueError(f"two rows are called {name}: rename a file or folder")
    rows[name] = function, identity, record


def upscale(net, tile, stem, item, lq):
    return archs.upscale_tiled(net, lq, tile=tile)


# Scores

def read_cache(folder):
    """{key: score} of every earlier call; the last line of a killed process may be cut off."""
    return {row["key"]: row["score"] for file in sorted(folder.glob("*.jsonl")) for row in map(json.loads, filter(lambda line: line.endswith("}"), file.read_text().splitlines()))}


@torch.no_grad()
def score(rows, items, metrics, args, world):
    """-> {row: {stem: {metric: value}}}; what is not in the cache is computed, ranks share the images."""
    cache, (border, y), libraries = read_cache(args.cache), (PROTOCOLS[args.protocol][k] for k in ("border", "y")), versions()
    gold = "gold" in args.baselines
    found = {row: {} for row in [*rows, *(["gold"] if gold else [])]}
    args.cache.mkdir(parents=True, exist_ok=True)
    with open(args.cache / f"{world.rank}.jsonl", "a") as out:
        if out.tell():
            out.write("\n")                                                       # after a line that was cut off
        for stem, item in tqdm(list(items.items())[world.rank::world.size], unit="img", disable=not world.is_main):
            seen = [digest(item["lq"] or item["versions"][0]), args.degradation]
            refs = [digest(path) for path in item["refs"]]
            own = {row: identity(stem) for row, (_, identity, _) in rows.items()}
            candidates = {path: digest(path) for path in item["versions"]} if gold else {}
            keys, srs = {}, {}
            for m, metric in metrics.items():
                full = metric.full_reference
                told = [metric.identity, libraries, [border, y, refs] if full else None]
                keys |= {(row, m): digest([who, seen, told]) for row, who in own.items()}
                if not full:
                    keys |= {(path, m): digest(["version", content, told]) for path, content in candidates.items()}
            todo = [k for k, key in keys.items() if key not in cache]
            if todo:
                lq = low_resolution(stem, item, args, world.device)
                for who in dict.fromkeys(who for who, _ in todo):
                    srs[who] = load(who, world.device) if isinstance(who, Path) else degradations.to_8bit(rows[who][0](stem, item, lq))
                targets = [load(path, world.device) for path in item["refs"]] if any(metrics[m].full_reference for _, m in todo) else []
            for m in dict.fromkeys(m for _, m in todo):
                whose = [who for who, mm in todo if mm == m]
                for k in range(0, len(whose), args.batch_size):
                    part = whose[k:k + args.batch_size]
                    for who, value in zip(part, judge(metrics[m], [srs[who] for who in part], targets)):
                        if not math.isfinite(value):
                            raise ValueError(f"{who}, image {stem}: {m} is {value}: leave this metric out, or look at the image")
                        cache[keys[who, m]] = value
                        out.write(json.dumps({"key": keys[who, m], "score": value}) + "\n")
            out.flush()
            for row in rows:
                found[row][stem] = {m: cache[keys[row, m]] for m in metrics}
            if gold:
                best = lambda m: (min if metrics[m].lower_is_better else max)(cache[keys[path, m]] for path in item["versions"])
                found["gold"][stem] = {m: best(m) for m in metrics if not metrics[m].full_reference}
    parts = world.gather_objects(found)
    return {row: {stem: part[row][stem] for stem in items for part in parts if stem in part[row]} for row in found}


def judge(metric, outputs, references):
    """[(1, 3, H, W)] -> [score]; with several references the mean over them (HGGT). Outputs of one size go through the metric together."""
    groups = [outputs] if len({o.shape for o in outputs}) == 1 else [[o] for o in outputs]
    values = []
    for group in groups:
        batch = torch.cat(group)
        if metric.full_reference:
            values += torch.stack([metric(batch, gt.expand(len(batch), -1, -1, -1)).double().cpu() for gt in references]).mean(0).tolist()
        else:
            values += metric(batch, None).double().tolist()
    return values


def versions():
    """Libraries that scores depend on."""
    return {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "pyiqa", "scikit-image")}


# Pictures

def find_crops(args, items):
    """[(word of --crop, stem, (y, x, side))]; ValueError where it lies outside the image."""
    crops = []
    for word in args.crop:
        stem, x, y, side = flags.CROP.fullmatch(word).groups()
        if stem not in items:
            raise ValueError(f"--crop {word}: no image is called {stem}")
        x, y, side = int(x), int(y), int(side)
        width, height = (4 * n for n in data.image_size(items[stem]["lq"])) if items[stem]["lq"] else data.image_size(items[stem]["versions"][0])
        if y + side > height or x + side > width or not side:
            raise ValueError(f"--crop {word}: the image has {width}x{height} pixels")
        crops.append((word, stem, (y, x, side)))
    return crops


def picture(path, rows, items, crops, scores, args, device):
    """PNG: LR | GT | every row of the table of each crop, as the paper's Fig. 2; without crops whole images: every row | GT. The first scores above each."""
    lines = []
    for stem in [] if crops else list(items)[::max(1, len(items) // args.figure_images)][:args.figure_images]:
        cells = cells_of(stem, items[stem], rows, args, device)
        order = [*rows, *(["GT"] if "GT" in cells and "reference" not in rows else [])]
        lines.append([(cells[name], name + told(scores, name, stem)) for name in order])
    for word, stem, (y, x, side) in crops:
        cells = cells_of(stem, items[stem], rows, args, device)
        cells["LR"] = cells["LR"].repeat_interleave(4, 1).repeat_interleave(4, 2)
        lines.append([(data.enlarged_crop(image[None], y, x, side, max(1, 256 // side)), name + told(scores, name, stem)) for name, image in cells.items()])
    data.save_grid(path, lines)


def told(scores, row, stem):
    """The first three scores of a cell, on a line of their own."""
    return "\n" + " ".join(f"{k.partition(':')[0]} {v:.1f}" for k, v in list(scores[row][stem].items())[:3]) if row in scores else ""


def cells_of(stem, item, rows, args, device):
    """{"LR", "GT", "GT 2", ..., then the rows: (3, H, W)} of one image."""
    lq = low_resolution(stem, item, args, device)
    cells = {"LR": lq} | {"GT" if k == 0 else f"GT {k + 1}": load(ref, device) for k, ref in enumerate(item["refs"])}
    cells |= {row: degradations.to_8bit(function(stem, item, lq)) for row, (function, _, _) in rows.items()}
    return {name: image[0].cpu() for name, image in cells.items()}


def front(path, means, x, y, lower):
    """PNG: each row's mean of one metric against another, with 95 % intervals."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for row, cells in means.items():
        if x in cells and y in cells:
            error = lambda m: [[cells[m]["mean"] - cells[m]["low"]], [cells[m]["high"] - cells[m]["mean"]]]
            axis.errorbar(cells[x]["mean"], cells[y]["mean"], error(y), error(x), fmt="o", elinewidth=0.7, label=row)
    figure.legend(loc="outside right center")
    axis.set(xlabel=tables.heading(x, lower[x]), ylabel=tables.heading(y, lower[y]), title="means with 95 % intervals over images")
    figure.savefig(path, dpi=120)


def explain(paths):
    results = []
    for path in paths:
        try:
            results.append(json.loads(path.read_text()))
            results[-1]["scores"], results[-1]["lower_is_better"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"--diff {path}: not a file of --out-json ({error})") from None
    lines = tables.explain(*results)
    print("\n".join(lines) or "no difference: same images, weights, protocol, versions and scores")


def main(args):
    if args.diff:
        return explain(args.diff)
    world = runs.start_world(args.device, args.threads)
    outputs = {"--out-json": args.out_json, "--csv": args.csv, "--latex": args.latex, "--figure": args.figure, "--page": args.page, "--front": args.front and Path(args.front[2])}
    for flag, path in outputs.items():
        runs.check_output(path, flag)
    runs.check_writable(args.cache, "--cache")
    items = find_items(args)
    crops = find_crops(args, items)
    files = {}
    for word in args.metric_weights:
        name, _, file = word.rpartition("=")
        if name not in args.metrics:
            raise ValueError(f"--metric-weights {word}: write NAME=FILE with a NAME of --metrics ({', '.join(args.metrics)})")
        files[name] = file
    protocol = PROTOCOLS[args.protocol]
    metrics = {m: quality.create_metric(m, world.device, files.get(m), protocol["border"], protocol["y"]) for m in args.metrics}
    lower = {m: metric.lower_is_better for m, metric in metrics.items()}
    needy = [m for m, metric in metrics.items() if metric.full_reference]
    if needy and not all(item["refs"] for item in items.values()):
        raise ValueError(f"--metrics {' '.join(needy)}: compared with references: --gt DIR is needed")
    rows = find_rows(args, items, world.device)

    scores = score(rows, items, metrics, args, world)
    if not world.is_main:
        return
    means, differences = tables.summarise(scores, lower)
    print(tables.markdown(means, lower, differences))
    print(f"mean of {len(items)} images; ↑ higher is better, ↓ lower is better; best **bold**, second *italic*; 95 % bootstrap intervals over images; "
          "a difference in bold has an interval without zero, for any other there is no evidence")
    if args.out_json:
        record = {"command": sys.argv, **runs.describe_machine(), "versions": versions(), "images": len(items),
                  "protocol": {"name": args.protocol, **protocol, "degradation": args.degradation}, "metrics": {m: metric.identity for m, metric in metrics.items()},
                  "files": {stem: {"lq": digest(item["lq"] or item["versions"][0]), "refs": [digest(p) for p in item["refs"]]} for stem, item in items.items()},
                  "lower_is_better": lower, "weights": {row: info for row, (_, _, info) in rows.items() if info},
                  "mean": {row: {m: cell["mean"] for m, cell in cells.items()} for row, cells in means.items()},
                  "intervals": {row: {m: [cell["low"], cell["high"]] for m, cell in cells.items()} for row, cells in means.items()},
                  "differences": differences, "scores": scores}
        runs.save_json(args.out_json, record)
    if args.csv:
        runs.write_atomic(args.csv, lambda t: t.write_text(tables.to_csv(scores, lower)))
    if args.latex:
        runs.write_atomic(args.latex, lambda t: t.write_text(tables.latex(means, lower)))
    if args.figure:
        picture(args.figure, rows, items, crops, scores, args, world.device)
    if args.page:
        every = math.ceil(len(items) / args.page_images) if args.page_images else 1
        page.write(args.page, f"{', '.join(rows)}: {len(items)} images, protocol {args.protocol}",
                   {stem: cells_of(stem, items[stem], rows, args, world.device) for stem in list(items)[::every]}, scores, lower, means)
    if args.front:
        front(args.front[2], means, *args.front[:2], lower)
    for path in filter(None, outputs.values()):
        print(f"wrote {path}")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
