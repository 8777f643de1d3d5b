"""Does HR-aware self-supervision help the network it was made for, and which part of it? One resumable queue.

    python -m experiments.self_supervision                       all rows at CPU scale; resumes where it stopped
    python -m experiments.self_supervision --domains inside --rows baseline controller both --seeds 0      some of them
    python -m experiments.self_supervision --scale gpu           one CUDA device: larger networks and patches

data      photographs for pre-training; the test photographs under two hidden degradations (prepare.degrade, camera):
          "inside" what pre-training draws (lr-grid) and "outside" of it; pairs of RealSR
pretrain  the reconstruction networks that the rows need: LWay, baseline, + controller, + FAR, both; + FAR three times
          as long
tune      rows: RealESRGAN_x4plus adapted to a domain with each of them, and with "both" and the other sign of the
          controller (Table 4); the compact network with "both" as one row
controls  the start's outputs, blurred, sharpened, and blurred with the mean colours of the LR image, by strengths whose
          PSNR is nearest to that of "both"
precision start and "both" in fp32 on ten images, since all else is trained and scored in bf16
probe     the paper's Fig. 7 (baseline, + controller) and Fig. 8 (+ FAR) on photographs that pre-training did not see;
          Fig. 7 also for LR images with hardly any noise
report    tables, plots, a picture, and RESULTS/selfsup.json, of the rows that are there

Each row is a file of RESULTS and is not made again; what only it needs is not trained either.

PRE-REGISTERED before any run, after a first experiment (docs/results-selfsup.md) that adapted a network with a
pixel-shuffle tail, moved its weights further than the paper can, in a domain that pre-training had not seen. A
difference is the mean over images of (mean over seeds of A - B). It is in bold when its 95 % BCa interval over the
images excludes zero, every seed has its sign, and a paired t test has p < 0.05 (report.tables). Three seeds for
"baseline" and "both", one for the others: a difference takes the seeds that both have. 100 steps of 5e-6 with EMA 0.95
move the averaged weights by at most 4.1e-4, within the paper's 8e-5 to 7.5e-4; the report has the largest movement.
Hypotheses, each per domain:
1. both - before: PSNR up, VGG distance down (Table 1); LWay - before: PSNR up.
2. controller - baseline and FAR - baseline: VGG distance down (Table 2).
3. both - flipped: PSNR up or VGG distance down (Table 4).
4. both - blur control and both - unsharp control: VGG distance down. If not, adaptation did no more than a filter.
5. Fig. 7: without a controller half a blur reconstructs better than the true image, with Eq. 8 this stops. Fig. 8: FAR
   is larger for degraded images, blur included.
6. Gains are larger inside than outside.
No network is left out (--force), but one that does not beat bicubic down-sampling, or a FAR whose T predicts less than
half of the descriptors' energy, counts as not tested: the report shows both.
PSNR and SSIM are on Y; VGG19's features stand for LPIPS and CLIP; NIQE is reported and decides nothing. Networks,
patches and steps of stage 1 are those of a CPU: no number here is the paper's.

ADDED after seeds 0 and 1, in which T predicted 45 % of the energy, so that FAR was not tested, and before its own runs:
a pre-training three times as long, and from it a tuning with FAR ("FAR, long") and one without ("baseline, long").
7. T then predicts more than half, FAR is larger for blurred photographs (Fig. 8), and FAR, long - baseline, long: VGG
   distance down.
Later, after a reader's questions: "both" from weights changed by 1e-6, and in fp32 and the other memory format, which
must have the signs of "both"; "both" with the controller's s shifted to where R was trained (s is 0.7 in tuning, 0.48
in the mean of pre-training); the control with the LR image's colours; Fig. 7 without noise.

At GPU scale the hypotheses are the same, of one seed. Stage 1 has the paper's network, 3,000 steps instead of 500,000.
Two pre-trainings serve all rows, with FAR in both: rows without FAR leave it out of the tuning only. 300 steps of 5e-6
with EMA 0.997 move the averaged weights by at most 5.1e-4.
"""
import shlex
from pathlib import Path

import runs

DATA = Path(runs.literal("experiments/jobs", "DATA"))
STAGES = ("data", "pretrain", "tune", "controls", "precision", "probe", "report")
# flags of prepare.degrade; lr-grid draws sigmas up to 4, noise up to 12 grey levels, quality from 20
DOMAINS = {"inside": "--blur 2.5 1.2 --angle 30 --noise 5 --jpeg 60",
           "outside": "--blur 5 2 --angle 30 --noise 16 --jpeg 15"}
# flags of pretrain
NETWORKS = {"LWay": "--arch lway", "baseline": "--s-rule one --no-far", "controller": "--no-far", "FAR": "--s-rule one",
            "both": "", "FAR-long": "--s-rule one --total-steps 6000"}
# {row: (pre-training, flags of finetune)}
ROWS = {"baseline": ("baseline", ""), "controller": ("controller", ""), "both": ("both", ""), "FAR": ("FAR", ""),
        "flipped": ("both", "--s-rule flip"), "LWay": ("LWay", ""), "both, compact": ("both", ""),
        "FAR, long": ("FAR-long", ""), "baseline, long": ("FAR-long", "--no-far"), "both, perturbed": ("both", ""),
        "both, fp32": ("both", "--precision fp32"), "shifted": ("both", "--s-rule shifted")}
# not tuned on RealSR's pairs, which no pre-training imitates
SYNTHETIC = ("controller", "FAR", "flipped", "shifted", "both, compact")
# those with all --seeds; the others have the first
REPEATED = ("baseline", "both")
# CHOICE: sizes. plan: {domain: its rows}, in order of value
# fig7, fig8: networks that are probed
SCALES = {
    # two cores: a pre-training takes up to 25 minutes, FAR-long's an hour; both resume
    "cpu": dict(
        rows=ROWS, plan={"inside": list(ROWS), "realsr": [row for row in ROWS if row not in SYNTHETIC],
                         "outside": ["both", "baseline", "controller", "FAR", "flipped", "LWay", "shifted"]},
        pretrain="""--patch 32 --load-size 160 --batch-size 4 --group-size 2 --size small --total-steps 2000 --lr 1e-3
                    --ema-decay 0.99 --workers 0 --log-every 200 --save-every 200 --val-every 0""",
        finetune="""--patch 24 --batch-size 2 --total-steps 100 --ema-decay 0.95 --workers 0 --log-every 25
                    --save-every 25 --val-every 50""",
        seeds=[0, 1, 2], metrics=("psnr", "ssim", "vgg", "niqe"), pairs=20, crops=64,
        fig7=("baseline", "controller"), fig8=("FAR", "both", "FAR-long")),
    # eight tunings sized for eight minutes of one device of the class of an H100
    "gpu": dict(
        rows=ROWS | {"baseline": ("FAR", "--no-far"), "controller": ("both", "--no-far")},
        plan={"inside": ["both", "baseline", "controller", "FAR", "flipped"], "realsr": ["both", "baseline"],
              "outside": ["both"]},
        pretrain="""--patch 48 --load-size 256 --batch-size 16 --group-size 4 --size paper --total-steps 3000 --lr 5e-4
                    --ema-decay 0.99 --workers 12 --log-every 250 --save-every 1000 --val-every 0""",
        finetune="""--patch 48 --batch-size 8 --total-steps 300 --ema-decay 0.997 --workers 4 --log-every 50
                    --save-every 0 --val-every 150""",
        # no metric that is a package of its own
        seeds=[0], metrics=("psnr", "ssim", "vgg"), pairs=100, crops=128, fig7=("FAR", "both"), fig8=("FAR", "both")),
}
COMMON = dict(pretrain="--degradation lr-grid --val-photos 6 --deg-enc bands --distance vgg --far-enc vgg --n-std 0.1 "
                       "--precision bf16",
              finetune="--lr 5e-6 --precision bf16 --force")
# make gpu on a CPU, see rehearsal
SCALES["rehearsal"] = SCALES["gpu"] | dict(
    pretrain="""--val-photos 1 --distance proxy --far-enc rand --patch 16 --load-size 96 --batch-size 2 --group-size 2
                --size tiny --total-steps 2 --workers 0 --val-every 0""",
    finetune="--patch 16 --batch-size 2 --total-steps 2 --workers 0 --val-every 2", pairs=2, crops=8)
# strengths of the controls: sigmas of the blur in HR pixels, amounts of the unsharp mask
SIGMAS, AMOUNTS = (0.3, 0.5, 0.7, 0.9, 1.1, 1.4, 1.8, 2.3), (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2)
# images of the stage precision
IN_FP32 = 10


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    images, iqa = DATA / "images", DATA / "weights" / "iqa"
    g = p.add_argument_group("data (docs/data.md says where it comes from)")
    g.add_argument("--photos", type=Path, nargs="+", metavar="DIR",
                   default=[images / name for name in ("hr_kodak24", "hr_urban100", "hr_bsd100")],
                   help="photographs for pre-training; every other one of the last folder is kept for the probes")
    g.add_argument("--test", type=Path, nargs="+", default=[images / name for name in ("test_set5", "test_set14")],
                   metavar="DIR", help="photographs of the domains that are adapted to")
    g.add_argument("--realsr", type=Path, default=images / "pairs_realsr", metavar="DIR",
                   help="pairs <name>_LR and <name>_HR of RealSR")
    g.add_argument("--sr", type=runs.CHECKPOINT, metavar="PATH",
                   default=Path("weights/downloads/RealESRGAN_x4plus.pth"),
                   help="x4 network to adapt, which python -m prepare.weights fetches")
    g.add_argument("--compact", type=runs.CHECKPOINT, metavar="PATH",
                   default=DATA / "weights" / "sr" / "realesr-general-x4v3_fp16.pth",
                   help="the network of the first experiment: one row")
    g.add_argument("--vgg-weights", type=Path, default=Path("runs/vgg19.pth"), metavar="FILE",
                   help="VGG19, which python -m prepare.vgg19 makes")
    g.add_argument("--metrics", nargs="+", metavar="NAME",
                   help="psnr and ssim on Y, whole images; default: psnr ssim vgg, at CPU scale niqe")
    g.add_argument("--metric-weights", nargs="*", metavar="NAME=FILE", default=[f"niqe={iqa}/niqe_modelparameters.mat"])
    g = p.add_argument_group("rows")
    g.add_argument("--scale", choices=list(SCALES), default="cpu", help="networks, patches, steps, rows")
    g.add_argument("--domains", nargs="+", choices=[*DOMAINS, "realsr"], help="adapt to these; default: all")
    g.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW",
                   help=f"these of {', '.join(ROWS)}; default: all")
    g.add_argument("--seeds", type=runs.COUNT, nargs="+", help="default: 0 1 2; at GPU scale 0")
    g = p.add_argument_group("machine and files")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    g.add_argument("--jobs", type=runs.SIZE, default=2,
                   help="processes at a time, one thread each; at GPU scale everything is done in this one")
    g.add_argument("--work", type=Path, metavar="DIR",
                   help="runs and data sets; default: runs/self_supervision-<scale>")
    g.add_argument("--results", type=Path, metavar="DIR",
                   help="one JSON file per row, the report and plots; default: WORK/results")
    args = p.parse_args(argv)
    args.stages = args.stages or list(STAGES)
    for stage in args.stages:
        if stage not in STAGES:
            p.error(f"{stage}: no such stage; choose from {', '.join(STAGES)}")
    args.seeds = args.seeds or SCALES[args.scale]["seeds"]
    args.metrics = args.metrics or SCALES[args.scale]["metrics"]
    args.work = args.work or Path("runs") / f"self_supervision-{args.scale}"
    args.results = args.results or args.work / "results"
    return args


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import json
import re
import signal
import sys
from functools import partial

import numpy as np
import torch

import archs
import degradations
import metrics
from experiments import demo_seeds, jobs, selfsup_report
from images import list_images, load_image, save_image
from prepare import demo_set
from report import style
from selfsup import networks as rec


def call(args, log, script, *words):
    """jobs.call; at GPU scale in this process, because starting one takes as long as tuning."""
    (jobs.call if args.scale == "cpu" else jobs.call_here)(log, script, *words)


def flags(args, script):
    """Words of all pre-trainings, or all fine-tunings. Of a flag that stands twice, the last counts."""
    return shlex.split(COMMON[script]) + shlex.split(SCALES[args.scale][script])


def plan(args):
    """[(domain, row, seed)] of the tunings, in order of value: those of the first seed first."""
    scale = SCALES[args.scale]
    return [(domain, row, seed) for seed in args.seeds for domain, rows in scale["plan"].items() for row in rows
            if (args.domains is None or domain in args.domains) and (args.rows is None or row in args.rows)
            and (seed == args.seeds[0] or row in REPEATED)]


def row_file(args, domain, row, seed):
    return args.results / f"{domain}-{row.replace(', ', '-').replace(' ', '-')}-{seed}.json"


def prepare(args):
    def images(folder):
        return list(list_images(folder).values())
    last = images(args.photos[-1])
    others = [path for folder in args.photos[:-1] for path in images(folder)]
    for name, files in (("hr", others + last[::2]), ("held-photos", last[1::2]),
                        ("test-photos", [path for folder in args.test for path in images(folder)])):
        jobs.whole(args.work / name, partial(jobs.copy_photos, files))
    for name, words in DOMAINS.items():
        if not (args.work / name).exists():
            call(args, args.work / f"{name}.log", "prepare.degrade", args.work / "test-photos", args.work / name,
                 "--degradation", "camera", *shlex.split(words))
    jobs.whole(args.work / "realsr", lambda folder: jobs.copy_realsr(args.realsr, folder, SCALES[args.scale]["pairs"]))


def pretrain(args, network, seed):
    """RESULTS/rec-<network>-<seed>.json: how well it reconstructs held-out photographs."""
    out, words = args.work / "rec" / f"{network}-{seed}", [*flags(args, "pretrain"), *shlex.split(NETWORKS[network])]
    file = args.results / f"rec-{network}-{seed}.json"
    made = (out / "weights" / "rec.pth").exists()
    if made and file.exists():
        return
    if not made:
        call(args, out.with_suffix(".log"), "selfsup.pretrain", "--hr", args.work / "hr", "--vgg-weights",
             args.vgg_weights, *words, "--seed", seed, "--device", args.device, "--out", out, "--resume", "auto")
    held_out = rec.load_reconstruction(out)[1]["held_out"]
    runs.save_json(file, {"pretrain": words, **runs.describe_machine(args.device == "cpu"), **held_out})


def score(args, folder, out, *row):
    """evaluate.py's JSON of one row on a folder of pairs: "--weights" PATH or "--images" DIR, and further flags."""
    call(args, out.with_suffix(".log"), "evaluate.py", "--protocol", "whole-y", *row, "--baselines",
         "--lq", folder / "lq", "--gt", folder / "gt", "--metrics", *args.metrics,
         *jobs.metric_files(args, args.metrics), "--out-json", out, "--device", args.device,
         "--cache", args.work / "evaluation-cache")
    return json.loads(out.read_text())


def add_row(args, domain, row, seed, *words, **more):
    """Judge a row, and write its file of RESULTS."""
    file = row_file(args, domain, row, seed)
    judged = score(args, args.work / domain, args.work / "scores" / file.name, *words)
    scores, = judged["scores"].values()
    runs.save_json(file, {"domain": domain, "row": row, "seed": seed, **more, "scores": scores,
                          **{key: judged[key] for key in (*jobs.MADE_BY, "lower_is_better")}})


def kept(args, domain, row):
    """Folder of a row's outputs, for the controls."""
    return args.work / "outputs" / domain / row.replace(", ", "-")


def keep(args, domain, row):
    """Flags of evaluate.py for that."""
    folder = kept(args, domain, row)
    return ["--names", folder.name, "--save", folder.parent]


def add_start(args, domain, row, sr):
    """The network before tuning."""
    add_row(args, domain, row, 0, "--weights", sr, "--precision", "bf16", *keep(args, domain, row))


def perturbed(args):
    """The network with every weight changed by a share of at most 1e-6."""
    file = args.work / "perturbed.pth"
    if not file.exists():
        demo_seeds.perturb(args.sr, file, args.seeds[0])
    return file


def tuned(args, domain, row, seed):
    return args.work / "tuned" / f"{domain}-{row.replace(', ', '-')}-{seed}"


def tune(args, domain, row, seed):
    """Adapt the network, judge it."""
    network, words = SCALES[args.scale]["rows"][row]
    sr = args.compact if "compact" in row else perturbed(args) if "perturbed" in row else args.sr
    out, words = tuned(args, domain, row, seed), [*flags(args, "finetune"), *shlex.split(words)]
    call(args, out.with_suffix(".log"), "selfsup.finetune", "--rec", args.work / "rec" / f"{network}-{seed}", "--sr",
         sr, "--lr-dir", args.work / domain / "lq", "--vgg-weights", args.vgg_weights, *words, "--seed", seed,
         "--device", args.device, "--out", out, "--resume", "auto")
    log = (out / "log.txt").read_text(encoding="utf-8")
    moved = re.findall(r"movement of the averaged weights: ([\d.e-]+)", log)
    if not moved:
        raise runs.UserError(f"{out}: the tuning was stopped; the same command continues")
    saved = keep(args, domain, row) if (row, seed) == ("both", args.seeds[0]) else []
    add_row(args, domain, row, seed, "--weights", out, "--precision", "bf16", *saved, finetune=words, network=network,
            movement=float(moved[-1]), **checks_of(out))


def checks_of(run):
    """Of the fixed patches: {"far_floor", FAR of clean photographs, "checks": [before tuning, after]}."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [event for event in events if event["split"] == "ema"]
    settings = json.loads((run / "args.json").read_text())["args"]
    return {"far_floor": settings["far_floor"], "checks": [events[0], events[-1]]}


def controls(args, domain):
    """The start's outputs, filtered with the strength whose mean PSNR is nearest to that of "both", scored like
    networks. RESULTS/colours-<domain>.json: how far mean colours of the start's and of its outputs are from the LR
    images', in grey levels."""
    seed = args.seeds[0]
    both, colours = row_file(args, domain, "both", seed), args.results / f"colours-{domain}.json"
    if not both.exists() or colours.exists():
        return
    folders = {row: kept(args, domain, row) for row in ("before", "both")}
    for row, folder in folders.items():
        if not any(folder.glob("*.png")):
            file = row_file(args, domain, row, seed if row == "both" else 0)
            raise runs.UserError(f"{folder}: not there; remove {file}, and `tune` makes it again")
    goal = np.mean([values["psnr"] for values in json.loads(both.read_text())["scores"].values()])
    device = runs.start_world(args.device, 0 if args.scale == "gpu" else 1).device

    def read(folder):
        return {stem: load_image(path)[None].to(device).float() / 255 for stem, path in list_images(folder).items()}
    lq, gt = (read(args.work / domain / part) for part in ("lq", "gt"))
    outputs = {row: read(folder) for row, folder in folders.items()}

    def shift(image, stem):
        """What is missing to the mean colours of the LR image, (1, 3, 1, 1)."""
        return lq[stem].mean((2, 3), keepdim=True) - image.mean((2, 3), keepdim=True)

    def blurred(image, sigma, _):
        return degradations.to_8bit(degradations.blur(image, degradations.gaussian_kernel(21, sigma)))

    def sharpened(image, amount, _):
        return metrics.unsharp(image, amount)

    def blurred_in_colour(image, sigma, stem):
        return degradations.to_8bit(blurred(image, sigma, stem) + shift(image, stem))
    for name, change, strengths in (("blur control", blurred, SIGMAS), ("unsharp control", sharpened, AMOUNTS),
                                    ("blur and colour control", blurred_in_colour, SIGMAS)):
        if row_file(args, domain, name, 0).exists():
            continue

        def psnr(strength, change=change):
            return np.mean([metrics.psnr(metrics.luma(change(image, strength, stem)), metrics.luma(gt[stem]), 0).item()
                            for stem, image in outputs["before"].items()])
        reached = {strength: psnr(strength) for strength in strengths}
        best = min(strengths, key=lambda strength: abs(reached[strength] - goal))
        folder = kept(args, domain, name.replace(" ", "-"))
        for stem, image in outputs["before"].items():
            save_image(folder / f"{stem}.png", change(image, best, stem)[0])
        add_row(args, domain, name, 0, "--images", folder, strength=best, psnr=reached[best], goal=goal)
    distances = {row: {stem: 255 * shift(image, stem).abs().mean().item() for stem, image in images.items()}
                 for row, images in outputs.items()}
    runs.save_json(colours, {**runs.describe_machine(args.device == "cpu"), "domain": domain, "seed": seed,
                             "colours": distances})


def precision(args):
    """RESULTS/precision.json: {row: {metric: largest difference}} of start and "both" in fp32 and bf16."""
    seed, differences = args.seeds[0], {}
    names = sorted(list_images(args.work / "inside" / "lq"))[:IN_FP32]
    only = args.work / "in-fp32.txt"
    only.write_text("".join(f"{name}\n" for name in names))
    for row, weights in (("before", args.sr), ("both", tuned(args, "inside", "both", seed))):
        file = row_file(args, "inside", row, 0 if row == "before" else seed)
        if file.exists() and weights.exists():
            exact, = score(args, args.work / "inside", args.work / "scores" / f"fp32-{row}.json", "--weights", weights,
                           "--only", only)["scores"].values()
            rounded = json.loads(file.read_text())["scores"]
            differences[row] = {m: max(abs(exact[name][m] - rounded[name][m]) for name in names) for m in args.metrics}
    runs.save_json(args.results / "precision.json",
                   {**runs.describe_machine(args.device == "cpu"), "differences": differences})


def probe(args, figure, network, *words):
    """RESULTS/<figure>-<network>-<seed>.json and its plot."""
    name = f"{network}-{args.seeds[0]}"
    file, net = args.results / f"{figure}-{name}.json", args.work / "rec" / name
    if (net / "weights" / "rec.pth").exists() and not file.exists():
        call(args, args.work / "probe" / f"{figure}-{name}.log", "selfsup.probe", figure[:4], "--rec", net, "--hr",
             args.work / "held-photos", "--crops", SCALES[args.scale]["crops"], "--vgg-weights", args.vgg_weights,
             "--device", args.device, "--out", file.with_suffix(""), *words)


def rehearsal(folder):
    """Flags for the whole queue on a CPU with a small network and parts of scikit-image's photographs, made here."""
    for k, name in enumerate(("astronaut", "coffee", "chelsea", "astronaut")):
        image = demo_set.load_photo(name)[:, 100:228, 64 * k:64 * k + 128]
        save_image(folder / "photos" / f"{k}.png", image)
        save_image(folder / "realsr" / f"{k}_HR.png", image)
        save_image(folder / "realsr" / f"{k}_LR.png", degradations.to_8bit(torch.nn.functional.avg_pool2d(image, 4)))
    torch.manual_seed(0)
    runs.save_weights(folder / "start.pth", archs.create("compact-small").state_dict())
    return ["--scale", "rehearsal", "--photos", folder / "photos", "--test", folder / "photos", "--realsr",
            folder / "realsr", "--sr", folder / "start.pth", "--work", folder / "self_supervision"]


def main(args):
    if args.scale == "cpu":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    def every(tasks):
        """One after the other in this process: selfsup's scripts handle signals, which threads cannot."""
        if args.scale == "cpu":
            return jobs.parallel(args.jobs, tasks)
        for task in tasks:
            task()
    missing = [task for task in plan(args) if not row_file(args, *task).exists()]
    domains = list(dict.fromkeys(domain for domain, *_ in plan(args)))
    compact = [args.compact] if any("compact" in row for _, row, _ in plan(args)) else []
    if args.stages != ["report"]:
        for path in [args.vgg_weights, args.sr, *compact]:
            if not path.exists():
                raise runs.UserError(f"{path}: not there; --help says which flag names another; "
                                     f"{runs.how_to_get(path)}")
    if "data" in args.stages:
        prepare(args)
    if "pretrain" in args.stages:
        needed = [(SCALES[args.scale]["rows"][row][0], seed) for _, row, seed in missing]
        every([partial(pretrain, args, *task) for task in dict.fromkeys(needed)])
    if "tune" in args.stages:
        starts = [(domain, "before", args.sr) for domain in domains]
        starts += [("inside", "before, compact", path) for path in compact]
        every([*(partial(add_start, args, *start) for start in starts
                 if not row_file(args, *start[:2], 0).exists()), *(partial(tune, args, *task) for task in missing)])
    if "controls" in args.stages:
        for domain in domains:
            controls(args, domain)
    if "precision" in args.stages and "inside" in domains:
        precision(args)
    if "probe" in args.stages and not style.is_there():
        print("no matplotlib: no Fig. 7 and 8")
    elif "probe" in args.stages:
        scale = SCALES[args.scale]
        tasks = [(figure, network) for figure in ("fig7", "fig8") for network in scale[figure]]
        tasks += [("fig7-clean", network, "--degradation", "blur") for network in scale["fig7"]]
        every([partial(probe, args, *task) for task in tasks])
    if "report" in args.stages:
        selfsup_report.report(args, flags(args, "pretrain"), flags(args, "finetune"))
        adapted = {row: tuned(args, "inside", row, args.seeds[0]) for row in ("LWay", "baseline", "both")}
        adapted = {row: path for row, path in adapted.items() if (path / "weights").is_dir()}
        if adapted:
            selfsup_report.picture(args, {"before": args.sr, **adapted})


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
