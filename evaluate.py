"""Score networks on test images: one table, with intervals (paper Sec. 5, Tables 5, 7 and 8).

    python evaluate.py --weights runs/swinir-amo runs/swinir-amo+musiq      HGGT's Test-100, the paper's nine metrics
    python evaluate.py --weights runs/a W.pth --images SR --lq LR --gt HR --metrics psnr ranker piqe
    python evaluate.py --weights runs/a --gt PHOTOS --degradation bicubic   LR images made of sharp photographs
    python evaluate.py --weights runs/a --data RealSR --protocol realsr
    python evaluate.py --weights runs/a+musiq/lora/adapter.pth --scale 0.5 0.7 1       an adapter at any strength
    python evaluate.py --demo                                               the demo's two runs; makes what is missing

With --out-json FILE.json and --save DIR kept, no network has to run again for these:

    python -m report.tables FILE.json --format latex      or markdown, csv; --diff A.json B.json compares two files
    python -m report.pictures grid FILE.json OUT.png      outputs side by side; front shows one metric against another
    python -m report.page FILE.json OUT.html              every output, zoomed together, with a slider

Rows: baselines, --weights (weight files, run folders, adapters), --images (folders of ready-made outputs). Test
images: --data is HGGT, another quintuplet set, or RealSR v3; --lq and --gt are plain pairs; --lq alone has no
references; --gt alone is photographs of which --degradation makes the LR images. With labels the references of an
image are its positives, full-reference metrics being averaged over them (HGGT); without, its original. Outputs are
rounded to 8 bit. No-reference metrics see the whole image, in native units. Metrics: psnr, ssim, vgg (the perceptual
loss as a distance), flat_hf (high-frequency share of the reference's flat places), ranker, module:function, and every
pyiqa metric. Scores are kept under --cache: another row or call costs only what is new. torchrun shares the images.
"""
from pathlib import Path

import runs

NINE, FULL_REFERENCE = runs.literal("report/tables", "NINE"), runs.literal("metrics", "FULL_REFERENCE")
DEMO_SET = Path("datasets/demo")
DEMO = dict(weights=[Path("runs/compact-small-orig"), Path("runs/compact-small-amo")],
            lq=DEMO_SET / "Test/Blind_Degradation_Benchmark_LQ/demo/Blind_LR", gt=DEMO_SET / "Test/GT/demo/untouched",
            metrics=["ranker", "piqe", "psnr"], out_json=Path("runs/demo.json"))
# of full-reference metrics
PROTOCOLS = {
    "hggt": dict(border=4, y=False,
                 says="RGB, 4 pixels of border cropped, mean over an image's references (HGGT: its positives)"),
    "realsr": dict(border=4, y=False, says="RGB, 4 pixels of border cropped, one reference"),
    "whole-y": dict(border=0, y=True, says="PSNR and SSIM on Y of BT.601, all others on RGB, nothing cropped"),
    "y": dict(border=4, y=True, says="PSNR and SSIM on Y of BT.601, all others on RGB, 4 pixels of border cropped"),
}


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--demo", action="store_true", help="compare orig and amo of the demo; trains what is missing")
    p.add_argument("--total-steps", type=runs.SIZE, metavar="N", help="steps of these trainings; default: the demo's")
    g = p.add_argument_group("rows")
    g.add_argument("--weights", type=runs.CHECKPOINT, nargs="+", default=[], metavar="PATH",
                   help="weight files, run folders, public names (python -m prepare.weights list), adapters of "
                        "finetune_lora.py: adapter.pth, or a folder of weights/ with it and its card")
    runs.add_weights_key(g)
    g.add_argument("--pad-mode", choices=["hggt", "swinir"],
                   help="SwinIR only; default: as the run was trained, else hggt for pixelshuffle files and swinir for "
                        "nearest+conv files")
    g.add_argument("--names", nargs="+", default=[], metavar="NAME",
                   help="names of the rows of --weights, one for each; default: folder or file")
    g.add_argument("--base", type=runs.CHECKPOINT, metavar="PATH",
                   help="weights or run that the adapters belong to; default: what their run folder says")
    g.add_argument("--scale", type=runs.number(float), nargs="+", default=[1.0], metavar="S",
                   help="strengths of adapters, one row each")
    g.add_argument("--images", type=Path, nargs="+", default=[], metavar="DIR",
                   help="folders of outputs, <stem>.png, else <stem>_<anything>.png")
    g.add_argument("--baselines", nargs="*", choices=["bicubic", "reference", "gold"], default=["bicubic"],
                   help="bicubic: MATLAB's kernel; reference: originals or references as if they were outputs; gold: "
                        "per image and no-reference metric the best of a quintuplet's versions (the paper's Gold "
                        "Standard)")
    g.add_argument("--against", metavar="ROW", help="take differences to this row; default: the first of --weights")
    g = p.add_argument_group("test images")
    g.add_argument("--data", type=Path, default=Path("datasets/HGGT"), metavar="DIR",
                   help="HGGT, a set of its layout, or RealSR v3 (<camera>/Test/4)")
    g.add_argument("--lq", type=Path, metavar="DIR", help="folder of low-resolution images, instead of --data")
    g.add_argument("--gt", type=Path, metavar="DIR",
                   help="folder of references of the same names; without --lq: of sharp photographs, for --degradation")
    g.add_argument("--degradation", choices=["bicubic", *runs.literal("degradations", "PRESETS")],
                   help="make the LR images from the originals, always the same; default: those of the set. bicubic: "
                        "MATLAB's, antialiased")
    g.add_argument("--rgb", action="store_true", help="take grey and transparent images, too, without their alpha")
    g.add_argument("--only", type=Path, metavar="FILE", help="text file of the images to score, a name per line")
    g.add_argument("--protocol", choices=list(PROTOCOLS), default="hggt",
                   help="; ".join(f"{name}: {protocol['says']}" for name, protocol in PROTOCOLS.items()))
    g = p.add_argument_group("metrics")
    g.add_argument("--metrics", nargs="+", metavar="NAME",
                   help="see above; default: the paper's nine, the no-reference ones where there are no references")
    g.add_argument("--metric-weights", nargs="*", default=[], metavar="NAME=FILE", help="local weight files of metrics")
    g.add_argument("--cache", type=Path, default=Path("runs/evaluation-cache"), metavar="DIR",
                   help="scores of earlier calls")
    g = p.add_argument_group("computing")
    g.add_argument("--tile", type=runs.TILE, metavar="SIDE",
                   help="LR tile in pixels; 0: whole image, as HGGT tests; default: 0 with --protocol realsr, else 256 "
                        "(HGGT's test images have 128, so they stay whole); halved where memory does not suffice")
    g.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32",
                   help="of the networks; bf16 keeps weights, last convolution, blending and metrics in fp32")
    g.add_argument("--batch-size", type=runs.SIZE, default=8, help="outputs of one image that a metric sees at a time")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    g.add_argument("--threads", type=runs.COUNT, default=0, help="CPU threads; 0: PyTorch's choice")
    g = p.add_argument_group("results (a table is printed)")
    g.add_argument("--out-json", type=Path, metavar="FILE",
                   help="every image's scores, means, intervals, and how they were made")
    g.add_argument("--save", type=Path, metavar="DIR",
                   help="keep the outputs, DIR/<row>/<image>.png, for report.pictures and report.page")
    if p.parse_known_args(argv)[0].demo:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    complete(p, args)
    return args


def complete(p, args):
    """Fill the defaults that depend on other flags; refuse combinations that cannot work."""
    references = args.gt is not None or args.lq is None
    args.metrics = args.metrics or [m for m in NINE if references or m not in FULL_REFERENCE]
    if args.tile is None:
        args.tile = 0 if args.protocol == "realsr" else 256
    if args.demo and args.save is None:
        args.save = args.out_json.with_suffix("")
    comparing = [m for m in args.metrics if m in FULL_REFERENCE]
    if not references and comparing:
        p.error(f"--metrics {' '.join(comparing)}: compared with references: --gt DIR is needed")
    if not references and "reference" in args.baselines:
        p.error("--baselines reference: needs --gt DIR")
    if (args.lq or args.gt) and "gold" in args.baselines:
        p.error("--baselines gold: needs a quintuplet set (--data)")
    if args.lq and args.degradation:
        p.error("--degradation: makes LR images, and --lq DIR has some: leave one out")
    if args.gt and not (args.lq or args.degradation):
        p.error("--gt DIR alone: name its LR images with --lq DIR, or have them made with --degradation")
    if not (args.weights or args.baselines or args.images):
        p.error("nothing to score: give --weights, --images or --baselines")
    if args.names and len(args.names) != len(args.weights):
        p.error(f"--names: {len(args.names)} names for {len(args.weights)} --weights; give one for each")
    if args.base and not any(map(is_adapter, args.weights)):
        p.error("--base: names what adapters belong to, and no adapter.pth is among --weights")
    if args.scale != [1.0] and not any(map(is_adapter, args.weights)):
        p.error("--scale: the strengths of adapters, and no adapter.pth is among --weights (RUN/lora/adapter.pth)")
    if args.total_steps and not args.demo:
        p.error("--total-steps: is for --demo, which trains")


def is_adapter(path):
    """Is this an adapter's file, or a folder that holds one and its card?"""
    return path.name == "adapter.pth" or (path / "adapter.pth").is_file()


# --help and flag errors need no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import sys
from functools import partial

import torch

import archs
import data
import lora
import metrics
from images import ModeError, find_pairs, find_realsr, image_size, list_images, match_images, nfc, remark_cut

# Test images: {stem: {"lq": path or None, "refs": [path], "versions": [path]}}; lq None: made from versions[0]

def find_items(args, world):
    if args.lq is not None:
        pairs = find_pairs(args.lq, args.gt, "--lq", "--gt", world.is_main)
        return {stem: {"lq": lq, "refs": [gt] if gt else [], "versions": []} for stem, (lq, gt) in pairs.items()}
    if args.gt is not None:
        if not args.gt.is_dir():
            raise runs.UserError(f"--gt {args.gt}: no such folder")
        return {stem: {"lq": None, "refs": [path], "versions": [path]} for stem, path in list_images(args.gt).items()}
    pairs = find_realsr(args.data)
    if pairs:
        return {stem: {"lq": lq, "refs": [gt], "versions": []} for stem, (lq, gt) in pairs.items()}
    if not (args.data / "Test").is_dir() and (args.protocol == "realsr" or args.data.name.lower().startswith("realsr")):
        raise runs.UserError(f"--data {args.data}: no RealSR v3 there (<camera>/Test/4/*_LR4.png and *_HR.png); "
                             "docs/evaluation.md says where it is found")
    sets = data.find_sets(args.data, "Test", packed=False)
    if sets is None:
        raise runs.UserError(f"{args.data}: no Test split of HGGT's layout and no RealSR; "
                             "name test images with --lq and --gt")
    if sets.lq is None and args.degradation is None:
        raise runs.UserError(f"{args.data}: this set has no LR images (Test/**/Blind_LR): "
                             "--degradation one-round or two-round makes them")
    items, labelled = {}, sets.label_folder is not None
    labels = sets.labels() if labelled else torch.zeros(len(sets.stems), len(sets.versions), dtype=torch.long)
    for stem, codes in zip(sets.stems, labels.tolist()):
        positives = [sets.path(stem, v) for v, code in zip(sets.versions, codes) if code == data.POSITIVE]
        items[stem] = {"lq": None if args.degradation else sets.lq[stem],
                       "refs": positives if labelled else [sets.path(stem)],
                       "versions": [sets.path(stem, v) for v in sets.versions]}
    return items


def choose(items, file):
    """The items that --only FILE names."""
    if not file.is_file():
        raise runs.UserError(f"--only {file}: no such file")
    # a name that is not UTF-8 is compared by its bytes
    lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    names = [nfc(line.strip()) for line in lines if line.strip()]
    unknown = [name for name in names if name not in items]
    if unknown or not names:
        problem = f"no image is called {unknown[0]}" if unknown else "names no image"
        raise runs.UserError(f"--only {file}: {problem}")
    return {name: items[name] for name in names}


def check_modes(items, rows):
    """UserError for the first image that is not 8-bit RGB; from headers, before any work."""
    for stem, item in items.items():
        row_files = [row.files[stem] for row in rows.values() if row.files is not None]
        for path in filter(None, [item["lq"], *item["refs"], *item["versions"], *row_files]):
            try:
                image_size(path, only_rgb=True)
            except ModeError as error:
                raise runs.UserError(f"{error}; --rgb takes grey and transparent images") from None


def remark_precision(args, rows, device):
    """Say once, of the first network, what bf16 would gain or costs on this CPU."""
    architectures = [row.record["arch"] for row in rows.values() if row.record and row.files is None]
    remark = architectures and runs.precision_remark(device, args.precision, architectures[0])
    if remark:
        print(f"remark: {remark}")


# Rows

def find_rows(args, items, device):
    """{name: Row}; UserError for two of one name."""
    rows = {}
    if "bicubic" in args.baselines:
        rows["bicubic"] = metrics.Row(metrics.bicubic, identity="bicubic, a = -0.5")
    if "reference" in args.baselines:
        rows["reference"] = metrics.Row(files={stem: (i["versions"] or i["refs"])[0] for stem, i in items.items()})
    for k, path in enumerate(args.weights):
        adapter = is_adapter(path)
        for scale in args.scale if adapter else [None]:
            if adapter:
                net, info = lora.load_tuned(path, scale, args.base, args.weights_key, args.pad_mode, "--base")
                if info["remark"]:
                    print(f"remark: {info['remark']}")
            else:
                net, info = archs.load_x4(path, "--weights", args.weights_key, args.pad_mode)
            made = {"hash": lora.base_hash(net)[:24], "pad_mode": getattr(net, "pad_mode", None), "tile": args.tile,
                    "overlap": archs.OVERLAP}
            # scores of earlier commits, which had fp32 alone, stay valid
            made |= {} if args.precision == "fp32" else {"precision": args.precision}
            name = args.names[k] if args.names else row_name(path)
            if adapter and (len(args.scale) > 1 or not args.names):
                name += f" x{scale:g}"
            network = partial(archs.upscale_tiled, archs.ready(net, device, args.precision), tile=args.tile)
            record = info | made | {"precision": args.precision}
            add_row(rows, name, metrics.Row(network, identity=runs.digest(made), record=record))
    for folder in args.images:
        files = match_images(folder, items, "--images")
        hashes = runs.digest([runs.digest(files[stem]) for stem in items])
        add_row(rows, folder.name, metrics.Row(files=files, record={"folder": str(folder), "hash": hashes}))
    return rows


def row_name(path):
    """A run folder's name, also for the weights of it that name no step; else the file's, without suffix."""
    if path.parent.name in ("lora", "weights") and path.name in ("adapter.pth", "merged.pth"):
        return path.parent.parent.name
    if path.name == "adapter.pth":
        return path.parent.name
    return path.name if path.is_dir() else path.stem


def add_row(rows, name, row):
    if name in rows or name in ("gold", "LR") or name.partition(" ")[0] == "GT":
        problem = "two rows are called" if name in rows else "no row can be called"
        raise runs.UserError(f"{problem} {name}: rename a file or folder" + ("" if row.files else ", or use --names"))
    rows[name] = row


def compared_row(args, rows):
    """The row that differences are taken to: --against, else the first of --weights, of --images, of all."""
    names = [*(["gold"] if "gold" in args.baselines else []), *rows]
    if args.against and args.against not in names:
        raise runs.UserError(f"--against {args.against}: no such row; there are {', '.join(names)}")
    return args.against or next((name for name, row in rows.items() if row.record), [*rows, "gold"][0])


def check_sizes(rows, items, judges):
    """UserError where images that are compared differ in size; from headers, before any work."""
    if not any(metric.full_reference for metric in judges.values()):
        return
    for stem, item in items.items():
        if item["lq"]:
            source, size = f"{item['lq']} x4", tuple(4 * side for side in image_size(item["lq"]))
        else:
            source, size = item["versions"][0], metrics.high_resolution_size(item["versions"][0], item)
        for name, row in rows.items():
            file = source if row.files is None else row.files[stem]
            width, height = size if row.files is None else metrics.high_resolution_size(file, item)
            for reference in item["refs"]:
                w, h = metrics.high_resolution_size(reference, item)
                if (w, h) != (width, height):
                    raise runs.UserError(f"{name}, image {stem}: {file} has {width}x{height} pixels, its reference "
                                         f"{reference} {w}x{h}: outputs must be as large as their references, "
                                         "x4 the LR image")


# Metrics

def create_metrics(args, device):
    """{name: Metric}. Raises one UserError that names every metric that could not be created, before any work."""
    files, judges, problems = {}, {}, []
    for word in args.metric_weights:
        name, _, file = word.partition("=")
        if name not in args.metrics:
            raise runs.UserError(f"--metric-weights {word}: write NAME=FILE with a NAME of --metrics "
                                 f"({', '.join(args.metrics)})")
        files[name] = file
    protocol = PROTOCOLS[args.protocol]
    for name in args.metrics:
        try:
            judges[name] = metrics.create_metric(name, device, files.get(name), protocol["border"], protocol["y"])
        except runs.UserError as error:
            flag = "" if str(error).startswith("--metric") else f"--metrics {name}: "
            problems.append(f"{flag}{error}{hub_file(error)}")
    if problems:
        count = f"{len(problems)} metrics cannot be created: " if len(problems) > 1 else ""
        raise runs.UserError(count + " || ".join(problems))
    return judges


def hub_file(error):
    """The address, and the place of the cache, if an error began with a request to the Hugging Face hub; else ""."""
    while error is not None:
        try:
            url = str(error.request.url)
        # httpx raises where an error has none
        except (AttributeError, RuntimeError):
            url = ""
        if "huggingface" in url:
            from huggingface_hub.constants import HF_HUB_CACHE
            return f"; asked for was {url}; the hub's cache is {HF_HUB_CACHE}"
        error = error.__cause__ or error.__context__
    return ""


def check_references(items, judges):
    comparing = [m for m, metric in judges.items() if metric.full_reference]
    without = [stem for stem, item in items.items() if not item["refs"]]
    if comparing and without:
        labelled = items[without[0]]["versions"]
        why = "none of its versions is a positive for two of three annotators" if labelled else "--gt DIR is needed"
        raise runs.UserError(f"--metrics {' '.join(comparing)}: compared with references, and {len(without)} of "
                             f"{len(items)} images have none, first {without[0]}: {why}")


# Results

def result_of(args, items, rows, judges, scores, saved):
    """The content of --out-json: every number, and how it was made."""
    from report import tables
    lower, against = {m: metric.lower_is_better for m, metric in judges.items()}, compared_row(args, rows)
    means, differences = tables.summarise(scores, lower, against)
    files = {stem: {"lq": runs.digest(item["lq"] or item["versions"][0]),
                    "refs": [runs.digest(path) for path in item["refs"]]} for stem, item in items.items()}
    return {
        "command": sys.argv, **runs.describe_machine(), "versions": metrics.versions(), "images": len(items),
        "protocol": {"name": args.protocol, **PROTOCOLS[args.protocol], "degradation": args.degradation},
        "metrics": {m: metric.identity for m, metric in judges.items()}, "files": files, "lower_is_better": lower,
        "full_reference": [m for m, metric in judges.items() if metric.full_reference],
        "weights": {name: row.record for name, row in rows.items() if row.record},
        "mean": {row: {m: cell["mean"] for m, cell in cells.items()} for row, cells in means.items()},
        "intervals": {row: {m: [cell["low"], cell["high"]] for m, cell in cells.items()}
                      for row, cells in means.items()},
        "against": against, "differences": differences, "scores": scores, "saved": saved}


def make_demo(args, world):
    """Train the demo's runs, and make its images, where they are missing."""
    steps = ["--total-steps", args.total_steps] if args.total_steps else []
    for path in args.weights:
        if path in DEMO["weights"]:
            runs.make_missing(path / "weights", world, "train.py", "--demo", "--sampler", demo_name(path.name),
                              "--resume", "auto", "--device", args.device, *steps)
    if args.lq == DEMO["lq"]:
        runs.make_missing(args.lq, world, "prepare.demo_set", "--out", DEMO_SET)


def demo_name(row):
    return row.rpartition("-")[2]


def demo_sentence(result):
    """The one difference that the demo is about, and one sentence that says what was seen."""
    before, after = (path.name for path in DEMO["weights"])
    change = result["mean"][after]["ranker"] - result["mean"][before]["ranker"]
    photos = {data.photo_of(stem) for stem in result["files"]}
    verb = "raised" if change > 0 else "lowered" if change < 0 else "did not change"
    return (f"{demo_name(after)} - {demo_name(before)}, ranker: {change:+.{1 if abs(change) >= 0.05 else 3}f} "
            f"({result['images']} patches of {len(photos)} photographs). "
            f"AMO's ground truths {verb} the score of the model that chose them.")


def main(args):
    world = runs.start_world(args.device, args.threads)
    runs.check_output(args.out_json, "--out-json")
    for folder, flag in ((args.cache, "--cache"), (args.save, "--save")):
        if folder:
            runs.check_writable(folder, flag)
    if args.demo:
        make_demo(args, world)
    items = find_items(args, world)
    if args.only:
        items = choose(items, args.only)
    items = {stem: item | {"rgb": args.rgb} for stem, item in items.items()}
    judges = create_metrics(args, world.device)
    check_references(items, judges)
    rows = find_rows(args, items, world.device)
    compared_row(args, rows)
    check_sizes(rows, items, judges)
    if not args.rgb:
        check_modes(items, rows)
    if world.is_main:
        originals = [path for item in items.values() for path in {*item["refs"], *item["versions"][:1]}]
        remark_cut(originals, "originals and references")
        remark_precision(args, rows, world.device)

    common = (args.cache, world, PROTOCOLS[args.protocol])
    gold = "gold" in args.baselines
    scores = metrics.score(rows, items, judges, *common, args.degradation, gold, args.batch_size, args.save)
    saved = None
    if args.save:
        files = {stem: metrics.saved_files(args.save, stem, item, rows) for stem, item in items.items()}
        saved = {"images": {stem: {cell: str(path) for cell, path in cells.items()} for stem, cells in files.items()},
                 "references": metrics.score_references(items, judges, *common, args.batch_size)}
    if not world.is_main:
        return
    from report import pictures, tables
    result = result_of(args, items, rows, judges, scores, saved)
    written = []
    if args.out_json:
        runs.save_json(args.out_json, result)
        written.append(args.out_json)
    if args.demo:
        pictures.grid(result, args.out_json.with_suffix(".png"))
        written.append(args.out_json.with_suffix(".png"))
    print(f"{tables.text(result)}\n")
    for file in written:
        print(f"wrote {file}")
    if args.demo:
        if "ranker" in judges and {path.name for path in DEMO["weights"]} <= set(rows):
            print(f"\n{demo_sentence(result)}")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
