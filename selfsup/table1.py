"""The HR-aware paper's Table 1 for a folder of low-resolution images with ground truth: every system, one command.

    python -m selfsup.table1 --lq LR --gt HR --sr RealESRGAN_x4plus.pth --hr DIV2K/train_HR --out runs/table1
    python -m selfsup.table1 ... --small                     what two CPU cores can do; marked in the table
    python -m selfsup.table1 ... --paper RealSR-Canon        with the paper's values beside ours

Rows: ZSSR, KernelGAN+ZSSR, the network --sr as it is, and adapted by SRTTA (final, and each image after its own steps),
by LWay and by the whole method. Everything is found again where it stopped by the same command. Pre-trainings are made
of --hr where --rec and --rec-lway name none. Columns: PSNR and SSIM on Y, LPIPS (the distance of VGG19's features where
LPIPS' weights cannot be had, and called so) and NRQM (where its weights can). Leaves OUT/table1.json, a result of
evaluate.py, and OUT/table1.md.
"""
from pathlib import Path

import runs
from selfsup import options

ROWS = ("ZSSR", "KernelGAN+ZSSR", "start", "+SRTTA", "+LWay", "+full")
SETS = ("NTIRE20", "AIM2019", "RealSR-Canon", "RealSR-Nikon")
METRICS = ("psnr", "ssim", "lpips", "nrqm")
# PAPER Table 1: PSNR, SSIM, LPIPS, NRQM on SETS. What is adapted: RealESRGAN+ (rrdbnet), SwinIRGAN (swinir)
PAPER = {
    "ZSSR": [(26.11, 0.6841, 0.6465, 4.612), (22.84, 0.6233, 0.6446, 3.765), (26.45, 0.7631, 0.3999, 2.861),
             (26.09, 0.7378, 0.4114, 3.156)],
    "KernelGAN+ZSSR": [(16.20, 0.2777, 0.7446, 5.019), (16.29, 0.3335, 0.7547, 4.577), (23.06, 0.6385, 0.4506, 4.053),
                       (21.34, 0.5871, 0.4619, 4.385)],
    "rrdbnet start": [(25.08, 0.7061, 0.2504, 6.121), (22.58, 0.6444, 0.2959, 6.243), (24.74, 0.7634, 0.2607, 6.065),
                      (24.31, 0.7334, 0.2851, 5.669)],
    "rrdbnet +SRTTA": [(25.51, 0.7212, 0.2718, 5.885), (23.06, 0.6686, 0.3459, 5.357), (24.97, 0.7788, 0.2470, 5.438),
                       (24.07, 0.7399, 0.2796, 5.334)],
    "rrdbnet +LWay": [(25.41, 0.7142, 0.2498, 6.022), (22.77, 0.6525, 0.2942, 6.077), (25.77, 0.785, 0.2460, 5.118),
                      (25.21, 0.7532, 0.2781, 5.163)],
    "rrdbnet +full": [(25.87, 0.7204, 0.2369, 6.137), (22.72, 0.6470, 0.2894, 6.252), (25.46, 0.7674, 0.2510, 6.098),
                      (25.14, 0.7449, 0.2681, 5.739)],
    "swinir start": [(26.93, 0.7467, 0.2290, 5.740), (23.14, 0.6634, 0.2897, 5.959), (26.77, 0.7892, 0.2576, 4.225),
                     (26.25, 0.7602, 0.2796, 4.854)],
    "swinir +SRTTA": [(27.09, 0.7513, 0.2417, 5.476), (23.22, 0.6692, 0.3145, 5.491), (26.78, 0.7898, 0.2513, 4.169),
                      (26.25, 0.7615, 0.2758, 4.799)],
    "swinir +LWay": [(26.96, 0.7474, 0.2232, 5.734), (23.15, 0.6667, 0.2871, 5.885), (26.74, 0.7896, 0.2567, 4.193),
                     (26.20, 0.7607, 0.2785, 4.819)],
    "swinir +full": [(27.04, 0.7497, 0.2178, 5.804), (23.13, 0.6652, 0.2831, 5.961), (26.52, 0.7895, 0.2506, 4.335),
                     (25.97, 0.7607, 0.2729, 4.889)]}
# CHOICE, of --small: flags of every stage for two cores. VGG19 stands for LPIPS and CLIP
SMALL = {
    "kernelgan": "--total-steps 1000",
    "zssr": "--crop 64 --total-steps 1000 --precision bf16",
    "srtta": "--batch-size 4 --patch 32 --precision bf16",
    "pretrain": "--patch 32 --load-size 160 --degradation lr-grid --batch-size 4 --group-size 2 --val-photos 6 "
                "--deg-enc bands --size small --distance vgg --far-enc vgg --n-std 0.1 --total-steps 2000 --lr 1e-3 "
                "--ema-decay 0.99 --workers 0 --log-every 200 --save-every 200 --val-every 1000",
    "finetune": "--patch 24 --batch-size 2 --total-steps 100 --lr 5e-6 --ema-decay 0.95 --workers 0 --log-every 25 "
                "--save-every 25 --val-every 0 --precision bf16"}
SMALL_REMARK = ("Small settings for two CPU cores: SRTTA with 4 patches of 32 pixels (its authors: 32 of 64), small "
                "reconstruction networks, short runs. The table tests the code, not the paper.")


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--lq", type=Path, required=True, metavar="DIR", help="low-resolution images of one source")
    p.add_argument("--gt", type=Path, required=True, metavar="DIR", help="their ground truth, only looked at to score")
    p.add_argument("--sr", type=runs.CHECKPOINT, required=True, metavar="PATH", help="x4 network that is adapted")
    p.add_argument("--hr", type=Path, required=True, metavar="DIR",
                   help="sharp photographs for pre-training and SRTTA, none of them of --gt")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of all runs and of the table")
    p.add_argument("--rec", type=Path, metavar="DIR", help="the method's pre-training; default: made in OUT/rec-hra")
    p.add_argument("--rec-lway", type=Path, metavar="DIR", help="LWay's; default: made in OUT/rec-lway")
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="KernelGAN needs LR sides of 84 pixels")
    p.add_argument("--small", action="store_true", help="what two CPU cores can do, see SMALL in this file")
    p.add_argument("--force", action="store_true", help="passed to selfsup.finetune")
    p.add_argument("--paper", choices=SETS, help="the data are these: show the paper's values too")
    p.add_argument("--vgg-weights", type=Path, metavar="FILE",
                   help="torchvision vgg19 or features-only file instead of a download")
    options.add_seeded_machine(p)
    return p.parse_args(argv)


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import json
import shlex
from functools import partial

import archs
import metrics
from images import image_size, list_images
from report import tables
from selfsup import kernels


def can_be_had(name):
    """Can this metric be created: are its package and weights here, or can they be fetched?"""
    try:
        metrics.create_metric(name, "cpu", border=0, y=True)
    except (runs.UserError, ImportError):
        return False
    return True


def columns():
    """The metrics of the table: LPIPS, or else VGG distance, and NRQM only where its weights are."""
    return ["psnr", "ssim", "lpips" if can_be_had("lpips") else "vgg", *(["nrqm"] if can_be_had("nrqm") else [])]


def make_rows(args):
    """Run what the rows need. -> {row: run folder, weight file or folder of images}"""
    machine = ["--device", args.device, "--threads", args.threads, "--seed", args.seed]
    vgg = ["--vgg-weights", args.vgg_weights] if args.vgg_weights else []

    def run(stage, *words):
        options.run(f"selfsup.{stage}", *words, *(shlex.split(SMALL[stage]) if args.small else []), *machine)
    places = {"start": args.sr} if "start" in args.rows else {}
    if "ZSSR" in args.rows:
        places["ZSSR"] = args.out / "ZSSR"
        run("zssr", "--lr-dir", args.lq, "--out", places["ZSSR"])
    if "KernelGAN+ZSSR" in args.rows:
        places["KernelGAN+ZSSR"], folder = args.out / "KernelGAN+ZSSR", args.out / "kernels"
        run("kernelgan", "--lr-dir", args.lq, "--out", folder)
        # real photographs are noisy: noise on sons, no back-projection (CHOICE: the paper does not say)
        run("zssr", "--lr-dir", args.lq, "--out", places["KernelGAN+ZSSR"], "--kernels", folder, "--config",
            "kernelgan-real")
    if "+SRTTA" in args.rows:
        places["+SRTTA"] = args.out / "srtta"
        # CHOICE: photographs of a camera have all three; a classifier that sees none would leave the network as it is
        run("srtta", "--sr", args.sr, "--lr-dir", args.lq, "--clean", args.hr, "--out", places["+SRTTA"],
            "--resume", "auto", "--types", "blur", "noise", "jpeg")
        places["online"] = places["+SRTTA"] / "online"
    for row, arch, rec in (("+LWay", "lway", args.rec_lway), ("+full", "hra", args.rec)):
        if row not in args.rows:
            continue
        places[row] = args.out / row[1:].lower()
        if rec is None:
            rec = args.out / f"rec-{arch}"
            run("pretrain", "--arch", arch, "--hr", args.hr, "--out", rec, "--resume", "auto", *vgg)
        run("finetune", "--rec", rec, "--sr", args.sr, "--lr-dir", args.lq, "--out", places[row], "--resume", "auto",
            *vgg, *(["--force"] if args.force else []))
    return places


def paper_values(row, arch, data):
    """The paper's values of a row on one of SETS, or None."""
    values = PAPER.get(row, PAPER.get(f"{arch} {row}"))
    return None if values is None or data is None else dict(zip(METRICS, values[SETS.index(data)]))


def table(result, arch, data, notes):
    """Markdown: our means with their intervals, the paper's values in brackets behind them."""
    names = list(result["lower_is_better"])
    head = ["", *(tables.SHOWN.get(m, m.upper()) + (", lower" if result["lower_is_better"][m] else "") for m in names)]
    rows = []
    for row in [name for name in (*ROWS[:4], "online", *ROWS[4:]) if name in result["mean"]]:
        paper, cells = paper_values(row, arch, data), []
        for m in names:
            digits = 2 if m in ("psnr", "vgg") else 3
            low, high = result["intervals"][row][m]
            text = f"{result['mean'][row][m]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
            cells.append(text + (f" (paper {paper[m]})" if paper and m in paper else ""))
        rows.append([{"online": "+SRTTA, online"}.get(row, row), *cells])
    return "\n".join([runs.markdown(head, rows), "", *notes])


def remarks(args, gt):
    """Sentences below the table."""
    count = len(gt)
    notes = [f"{count} images, 95 % bootstrap intervals over them; PSNR and SSIM on Y, nothing cropped."]
    if args.paper and args.paper.startswith("RealSR") and all(max(image_size(path)) <= 512 for path in gt.values()):
        notes.append("The images are crops; the paper scores RealSR's whole photographs: its values are of other data.")
    if args.small:
        notes.append(SMALL_REMARK)
    return notes


def main(args):
    for flag, folder in (("--lq", args.lq), ("--gt", args.gt), ("--hr", args.hr)):
        if not folder.is_dir():
            raise runs.UserError(f"{flag} {folder}: no such folder")
    arch, names = archs.load_x4(args.sr, "--sr")[1]["arch"], columns()
    gt = list_images(args.gt)
    if "KernelGAN+ZSSR" in args.rows:
        kernels.check_files(list_images(args.lq).values())
    places = make_rows(args)
    networks = {row: path for row, path in places.items() if row in ("start", "+SRTTA", "+LWay", "+full")}
    images = [path for row, path in places.items() if row not in networks]
    file = args.out / "table1.json"
    weights = ["--weights", *networks.values(), "--names", *networks] if networks else []
    # evaluate.py's distance of VGG19 features, and its own way to name their file
    vgg = ["--metric-weights", f"vgg={args.vgg_weights}"] if args.vgg_weights and "vgg" in names else []
    options.run("evaluate.py", "--protocol", "whole-y", *weights, *(["--images", *images] if images else []),
                "--lq", args.lq, "--gt", args.gt, "--metrics", *names, *vgg, "--baselines", "bicubic",
                "--out-json", file, "--device", args.device, "--threads", args.threads)
    text = table(json.loads(file.read_text()), arch, args.paper, remarks(args, gt))
    runs.write_atomic(args.out / "table1.md", partial(Path.write_text, data=text + "\n"))
    print(f"\n{text}\n\nwrote {file} and {args.out / 'table1.md'}")


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
