"""Which ground-truth sampler is best on photographs that nobody labelled? One resumable queue.

    python -m experiments.samplers                              all five stages; resumes where it stopped
    python -m experiments.samplers shrink data                  some of them

shrink   enhanced versions of the photos at several shrink factors, judged by metrics that no training here optimises:
         where the default of prepare.quintuplets comes from
data     quintuplets of the photos, low-resolution test images, and how often each reward picks each version
runs     orig, rand, sma, amo with the first reward, sma and amo with the others, every seed: train.py, then evaluate.py
grain    added after the runs, to find out why NIQE disagrees: NIQE again with a little Gaussian noise on every output,
         and structured noise
report   RESULTS.json, RESULTS.png, RESULTS-sets.png and the tables of docs/results-samplers.md

The analysis was fixed before the runs. All runs start from the same weights and see the same crops and degradations in
the same order; only the ground truth differs. A difference between two samplers is the mean over test images of (mean
over seeds of A - the same of B), with a 95 % bootstrap interval (BCa, 9999 resamples) over the images. It holds in its
direction when the interval excludes zero and every seed has that sign; everything else is "no evidence". The paper's
ordering is the hypothesis: no-reference quality orig < rand < sma < amo, PSNR the reverse.

The rule for the shrink factor was fixed likewise: per photo and metric (NIQE, BRISQUE, PIQE), does some version beat
the original? The factors whose mean share is within 0.05 of the best are as good; of these the one with the highest
PSNR of the versions to the original wins. That is 0.25, and it was overruled after looking (docs/data.md): the default
is 0.75.
"""
from pathlib import Path

import runs

DATA = Path(runs.literal("experiments/jobs", "DATA"))
SR, IQA = DATA / "weights" / "sr", DATA / "weights" / "iqa"
STAGES = ("shrink", "data", "runs", "grain", "report")
SHRINKS = (0.25, 0.375, 0.5, 0.75)
# (--soften, every n-th photo, patch)
SOFTENED = ((1, 3, 320), (2, 6, 512))
QUINTUPLETS = "--soften 2 --patch 192 --step 192".split()
# random crops by which the choices of the rewards are compared
CROPS = 400
TRAIN = """--arch compact --total-steps 200 --batch-size 8 --group-size 4 --pool-size 32 --crop 96 --load-size 128
           --lr 2e-4 --milestones 140 170 --lambda-p 0.03 --lambda-a 0.01 --d-features 8 --ema-decay 0.98 --workers 0
           --log-every 40 --save-every 40 --val-every 0""".split()
# where train.py keeps static scores
SCORES = Path("runs/scores")


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default all")
    p.add_argument("--photos", type=Path, nargs="+", metavar="DIR", help="training photographs",
                   default=[DATA / "images" / name for name in ("hr_kodak24", "hr_bsd100", "hr_urban100")])
    p.add_argument("--test-photos", type=Path, nargs="+", metavar="DIR", help="test photographs, never trained on",
                   default=[DATA / "images" / name for name in ("test_set5", "test_set14")])
    enhancers = ("4xLSDIRCompactC3", "realesr-general-wdn-x4v3", "realesr-general-x4v3", "realesr-animevideov3-x4")
    p.add_argument("--enhancers", type=runs.CHECKPOINT, nargs="+", metavar="FILE",
                   help="x4 checkpoints of versions 01, 02, ...",
                   default=[SR / f"{name}_fp16.pth" for name in enhancers])
    p.add_argument("--init", type=runs.CHECKPOINT, metavar="FILE", default=SR / "realesr-general-x4v3_fp16.pth",
                   help="weights that all runs start from")
    p.add_argument("--rewards", nargs="+", default=["rewards.cnniqa:build", "ranker"], metavar="NAME",
                   help="quality models; the first is compared with orig and rand")
    p.add_argument("--unseen", nargs="+", default=["niqe", "brisque", "piqe"], metavar="NAME",
                   help="no-reference metrics that nothing optimises")
    p.add_argument("--slow", nargs="*", default=["ilniqe"], metavar="NAME",
                   help="likewise, in a call of their own after all runs")
    files = {"niqe": "niqe_modelparameters.mat", "brisque": "brisque_svm_weights.pth",
             "ilniqe": "ILNIQE_templateModel.mat"}
    p.add_argument("--metric-weights", nargs="*", metavar="NAME=FILE", help="local weight files of the metrics",
                   default=[f"{name}={IQA / file}" for name, file in files.items()])
    p.add_argument("--vgg-weights", type=Path, metavar="FILE", default=Path("runs/vgg19.pth"),
                   help="VGG19, for the loss and the distance (python -m prepare.vgg19 makes it)")
    p.add_argument("--figure", nargs="+", metavar="NAME",
                   help="test images of the picture, <folder>_<name>; the middle of each is shown",
                   default=["test_set5_bird", "test_set5_butterfly", "test_set14_comic", "test_set14_zebra"])
    p.add_argument("--seeds", type=runs.COUNT, nargs="+", default=[0, 1, 2], help="of the runs")
    p.add_argument("--train", default="", metavar="'FLAGS'",
                   help="further flags of train.py, for example for a GPU: '--crop 256 --batch-size 48 --group-size 12 "
                        "--d-features 64 --total-steps 20000 --milestones 15000'")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of training and evaluation")
    p.add_argument("--jobs", type=runs.SIZE, default=2, help="processes at a time, each with one thread")
    p.add_argument("--work", type=Path, default=Path("runs/samplers"), metavar="DIR",
                   help="photos, quintuplets, runs and logs")
    p.add_argument("--results", type=Path, metavar="STEM",
                   help="one JSON file per run in this folder, tables and pictures beside it; default: WORK/samplers")
    args = p.parse_args(argv)
    args.stages = args.stages or list(STAGES)
    args.results = args.results or args.work / "samplers"
    args.train = TRAIN + runs.split_flags(args.train)
    if set(args.stages) - set(STAGES):
        p.error(f"stages are {', '.join(STAGES)}; got {' '.join(args.stages)}")
    return args


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import json
import signal
import sys
from collections import Counter
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import archs
import data
import degradations
import iqa
import metrics
from experiments import jobs, sampler_report
from experiments.sampler_report import label
from images import cut_to_x4, list_images, load_image, save_image


def link_photos(folders, every, target):
    """Links to every n-th photo of all folders, named <folder>_<file>, in one folder."""
    target.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        for path in list(list_images(folder).values())[::every]:
            link = target / f"{folder.name}_{path.name}"
            if not link.exists():
                link.symlink_to(path.resolve())
    return target


# Stage 1: the shrink factor

def shrink(args):
    """Builds small sets at every factor and judges them -> RESULTS-shrink.json."""
    file = sampler_report.beside(args.results, "shrink")
    if file.exists():
        return
    settings = [(soften, every, patch, factor) for soften, every, patch in SOFTENED for factor in SHRINKS]

    def folder(soften, factor):
        return args.work / "shrink" / f"soften{soften}-shrink{factor}"
    tasks = []
    for soften, every, patch, factor in settings:
        photos = link_photos(args.photos, every, args.work / "shrink" / f"photos-{every}")
        out = folder(soften, factor)
        words = ["--photos", photos, "--enhancers", *args.enhancers, "--out", out, "--shrink", factor,
                 "--soften", soften, "--patch", patch, "--step", patch, "--jitter", 0, "--min-std", 0,
                 "--min-laplacian", 0, "--min-change", 0]
        tasks.append(partial(jobs.call, out.with_name(f"{out.name}.log"), "prepare.quintuplets", *words))
    # the longest first
    jobs.parallel(args.jobs, tasks[::-1])
    judges = {name: jobs.judge(name, args.metric_weights) for name in [*args.unseen, args.rewards[0]]}
    rows = []
    for soften, _, patch, factor in settings:
        sets = data.find_sets(folder(soften, factor), "Train")
        bar = tqdm(sets.stems, desc=f"soften {soften}, shrink {factor}", unit="set")
        scores = {stem: judge_set(sets, stem, judges) for stem in bar}
        rows.append({"soften": soften, "shrink": factor, "patch": patch, "sets": len(sets.stems),
                     **summarise(scores, sets.versions[1:], judges, args.unseen)})
    runs.save_json(file, {"command": sys.argv, **runs.describe_machine(), "rule": best_shrink(rows), "rows": rows,
                          "enhancers": [path.name for path in args.enhancers]})
    print(f"by the rule of the docstring: shrink factor {best_shrink(rows)}")


@torch.no_grad()
def judge_set(sets, stem, judges):
    """-> {version: {metric: score, higher is better, "psnr": to the original}}"""
    images = {version: load_image(sets.path(stem, version))[None].float() / 255 for version in sets.versions}
    scores = {}
    for version, image in images.items():
        scores[version] = {name: (-1 if metric.lower_is_better else 1) * metric(image, None).item()
                           for name, metric in judges.items()}
        scores[version]["psnr"] = metrics.psnr(image, images["original"]).item()
    return scores


def summarise(scores, versions, names, unseen):
    """Shares of patches in which each version, or any of them, beats the original; over a photo's patches, then photos.

    scores: {stem: what judge_set returned}; names: metrics; unseen: those of them that are averaged for the rule.
    """
    photos = {}
    for stem, score in scores.items():
        photos.setdefault(data.photo_of(stem), []).append(score)

    def mean(value):
        return float(np.mean([np.mean([value(score) for score in patches]) for patches in photos.values()]))

    def beats(name, *rivals):
        return mean(lambda score: max(score[v][name] for v in rivals) > score["original"][name])
    any_beats = {name: beats(name, *versions) for name in names}
    psnr = {version: mean(lambda score, version=version: score[version]["psnr"]) for version in versions}
    return {"photos": len(photos), "any": any_beats, "any_unseen": float(np.mean([any_beats[m] for m in unseen])),
            "version": {name: {version: beats(name, version) for version in versions} for name in names},
            "psnr": psnr, "psnr_mean": mean(lambda score: np.mean([score[version]["psnr"] for version in versions]))}


def best_shrink(rows):
    """The rule fixed in the docstring. -> factor"""
    def mean(key, factor):
        return np.mean([row[key] for row in rows if row["shrink"] == factor])
    share = {factor: mean("any_unseen", factor) for factor in SHRINKS}
    good = [factor for factor in SHRINKS if share[factor] >= max(share.values()) - 0.05]
    return max(good, key=partial(mean, "psnr_mean"))


# Stage 2: quintuplets, test images, and what the rewards would choose

def prepare(args):
    photos = link_photos(args.photos, 1, args.work / "photos")
    jobs.call(args.work / "quintuplets.log", "prepare.quintuplets", "--photos", photos, "--enhancers", *args.enhancers,
              "--out", args.work / "set", *QUINTUPLETS, "--device", args.device,
              processes=args.jobs if args.device == "cpu" else 1)
    make_test(args.test_photos, args.work / "test")
    file = sampler_report.beside(args.results, "picks")
    if file.exists():
        return
    sets = data.find_sets(args.work / "set", "Train")
    world, seeds = runs.start_world("cpu", args.jobs), partial(runs.sample_seed, args.seeds[0])
    numbers = [jobs.last_value(args.train, name) for name in ("--batch-size", "--group-size", "--crop", "--load-size")]
    crops = data.TrainingSet(sets, "amo", seeds, *numbers)
    record = json.loads((args.work / "set" / "quintuplets.json").read_text())
    picks = {name: rewards_choice(name, sets, crops, world) for name in args.rewards}
    runs.save_json(file, {"command": sys.argv, **runs.describe_machine(), "sets": len(sets.stems),
                          "photos": len(record["photos"]), "dropped": record["dropped"], "settings": record["settings"],
                          "crops": CROPS, "rewards": picks})


@torch.no_grad()
def rewards_choice(name, sets, crops, world):
    """Shares of each version as the best of a crop, the best whole patch, and by the probabilities of sma."""
    reward, online = iqa.create_reward([name]), Counter()
    paths = [sets.path(stem, version) for stem in sets.stems for version in sets.versions]
    whole = iqa.score_images(paths, reward, SCORES, world).view(len(sets.stems), -1)
    for k in tqdm(range(CROPS), desc=f"{name}: crops", unit="crop"):
        # the very crops that the first seed trains on
        sample = crops.sample(1 + k // crops.batch_size, k % crops.batch_size)
        online[int(reward(sample["crops"].float() / 255).argmax())] += 1
    soft = data.sampling_probs(whole, torch.ones_like(whole, dtype=torch.bool), 10.0)
    return {"best crop (amo)": {version: online[i] / CROPS for i, version in enumerate(sets.versions)},
            "best whole patch": {version: (whole.argmax(1) == i).double().mean().item()
                                 for i, version in enumerate(sets.versions)},
            "probability (sma)": dict(zip(sets.versions, soft.mean(0).tolist()))}


def make_test(folders, target):
    """TARGET/{gt,lq}: the test photos, cut to a multiple of 4, each degraded once by two rounds, with its own seed."""
    for folder in folders:
        for i, (stem, path) in enumerate(list_images(folder).items()):
            file = f"{folder.name}_{stem}.png"
            # Set14 has a grey image
            gt = cut_to_x4(load_image(path, rgb=True)[None].float() / 255)
            if not (target / "lq" / file).exists():
                seeds = [[runs.sample_seed(0, k, i, folder.name)] for k in (0, 1)]
                lq = degradations.degrade(gt, "two-round", *seeds)
                # lq last: it says that both are there
                for part, image in (("gt", gt), ("lq", lq)):
                    runs.write_atomic(target / part / file, partial(save_image, image=image[0]))


# Stage 3: the queue

def plan(args):
    """-> {name of the run: flags of train.py}, seed by seed."""
    names = {}
    for seed in args.seeds:
        for sampler in ("orig", "rand"):
            names[f"{sampler}-{seed}"] = ["--sampler", sampler, "--reward", "none", "--seed", seed]
        for reward in args.rewards:
            for sampler in ("sma", "amo"):
                flags = ["--sampler", sampler, "--reward", reward, "--seed", seed]
                names[f"{sampler}-{label(reward)}-{seed}"] = flags
    return names


def one_run(args, name, flags):
    """Train, evaluate, write RESULTS/<name>.json; continues an interrupted training."""
    run = args.work / "runs" / name
    jobs.call(run.with_suffix(".log"), "train.py", "--data", args.work / "set", "--init", args.init, "--vgg-weights",
              args.vgg_weights, *args.train, *flags, "--device", args.device, "--out", run, "--resume", "auto")
    total = jobs.last_value(args.train, "--total-steps")
    step = runs.load_checkpoint(run / "ckpt" / "last.pt")["step"]
    if step != total:
        raise runs.UserError(f"{run}: training was stopped at step {step} of {total}; the same command continues")
    names = [*args.rewards, *args.unseen, *jobs.WITH_REFERENCE]
    judged = jobs.evaluate(args, run, run.with_suffix(".json"), names)
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    runs.save_json(args.results / f"{name}.json", {
        "train": args.train + list(map(str, flags)), **{key: judged[key] for key in (*jobs.MADE_BY, "lower_is_better")},
        "picked": [event["picked"] for event in events if "picked" in event][-1], "scores": judged["scores"][name]})


def queue(args):
    before = args.results / "before.json"
    if not before.exists():
        # the rows without a run: references, bicubic, start
        names = [*args.rewards, *args.unseen, *jobs.WITH_REFERENCE]
        judged = jobs.evaluate(args, args.init, args.work / "before.json", names, ["bicubic", "reference"])
        scores = {row.replace(args.init.stem, "start"): values for row, values in judged["scores"].items()}
        kept = {key: value for key, value in judged.items() if key not in ("mean", "intervals", "differences")}
        runs.save_json(before, kept | {"scores": scores})
    left = {name: flags for name, flags in plan(args).items() if not (args.results / f"{name}.json").exists()}
    jobs.parallel(args.jobs, [partial(one_run, args, name, flags) for name, flags in left.items()])
    jobs.parallel(args.jobs, [partial(slow, args, name) for name in ["before", *plan(args)]])


def slow(args, name):
    """Add the slow metrics to RESULTS/<name>.json."""
    file = args.results / f"{name}.json"
    record = json.loads(file.read_text())
    rows = record["scores"] if name == "before" else {name: record["scores"]}
    if all(metric in scores for images in rows.values() for scores in images.values() for metric in args.slow):
        return
    weights, baselines = args.work / "runs" / name, []
    if name == "before":
        weights, baselines = args.init, ["bicubic", "reference"]
    if not weights.exists():
        raise runs.UserError(f"{file} has no {' '.join(args.slow)} yet, and {weights} is not here to compute it: name "
                             "the folder of the runs with --work, or leave these metrics out with --slow")
    judged = jobs.evaluate(args, weights, args.work / "runs" / f"{name}-slow.json", args.slow, baselines)
    for row, images in rows.items():
        for stem, scores in images.items():
            scores |= judged["scores"][args.init.stem if row == "start" else row][stem]
    runs.save_json(file, record | {"lower_is_better": record["lower_is_better"] | judged["lower_is_better"]})


# Stage 4: why does NIQE disagree?

@torch.no_grad()
def grain(args, sigmas=(0, 1, 2, 4)):
    """RESULTS-grain.json: mean NIQE of every row with noise of so many grey levels; noise_peaks of run minus start."""
    file = sampler_report.beside(args.results, "grain")
    if file.exists():
        return
    niqe, rows = jobs.judge("niqe", args.metric_weights), {}
    stems = list(list_images(args.work / "test" / "lq"))
    start = archs.load_x4(args.init, "--init")[0]

    def upscaled(net, lq):
        return degradations.to_8bit(archs.upscale_tiled(net, lq))
    for name in tqdm(["reference", "start", *plan(args)], unit="row"):
        net = start if name in ("reference", "start") else archs.load_x4(args.work / "runs" / name, "--work")[0]
        row = rows[name] = {"niqe": {str(sigma): 0.0 for sigma in sigmas}, "peaks": 0.0}
        for i, stem in enumerate(stems):
            lq, gt = jobs.test_pair(args.work, stem)
            sr = gt if name == "reference" else upscaled(net, lq)
            # grey, the same for every row
            noise = torch.randn(gt[:, :1].shape, generator=torch.Generator().manual_seed(i)) / 255
            for sigma in sigmas:
                row["niqe"][str(sigma)] += niqe(degradations.to_8bit(sr + sigma * noise), None).item() / len(stems)
            if name != "reference":
                row["peaks"] += metrics.noise_peaks(sr - upscaled(start, lq)).item() / len(stems)
    runs.save_json(file, {"command": sys.argv, **runs.describe_machine(), "images": len(stems), "rows": rows})


# Stage 5 is sampler_report.py

def report(args):
    sampler_report.report(args, list(plan(args)))


def check_settings(args):
    """UserError unless the inputs are those of earlier results, whose hashes are in RESULTS-settings.json."""
    # 16 digits: the settings of results/experiment have so many
    def digest(value):
        return runs.digest(value)[:16]

    def folders(paths):
        return {f"{path.name}_{file.name}": digest(file) for path in paths for file in list_images(path).values()}
    # of the tensors: a file's bytes hold its name
    vgg = sorted(archs.read_file(args.vgg_weights).items())
    vgg = digest(b"".join(value.numpy().tobytes() for _, value in vgg))
    settings = {"train": args.train, "quintuplets": QUINTUPLETS, "init": digest(args.init),
                "enhancers": [digest(path) for path in args.enhancers], "vgg": vgg, "photos": folders(args.photos),
                "test_photos": folders(args.test_photos), "rewards": args.rewards, "unseen": args.unseen}
    file = sampler_report.beside(args.results, "settings")
    parts = [sampler_report.beside(args.results, part) for part in ("shrink", "picks", "grain")]
    begun = any(args.results.glob("*.json")) or any(part.exists() for part in parts)
    if file.exists() and begun:
        changed = runs.changes(json.loads(file.read_text()), settings)
        if changed:
            raise runs.UserError(f"{file}: these results were made with other {', '.join(changed)}: "
                                 "choose another --results and --work")
    else:
        runs.save_json(file, settings)


def main(args):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # a report needs the results only
    if args.stages != ["report"]:
        if not args.vgg_weights.is_file():
            raise runs.UserError(f"--vgg-weights {args.vgg_weights}: no such file; "
                                 f"{runs.how_to_get(args.vgg_weights)}; docs/data.md says where the shards of those "
                                 "that were measured are, and python -m prepare.vgg19 SHARDS "
                                 f"{args.vgg_weights} makes it of them")
        for path in [*args.photos, *args.test_photos, *args.enhancers, args.init]:
            if not path.exists():
                command = f"; {runs.how_to_get(path)}" if path in (*args.enhancers, args.init) else ""
                raise runs.UserError(f"{path}: not there; docs/data.md says where it comes from, --help which flag "
                                     f"names another{command}")
        check_settings(args)
    for stage in STAGES:
        if stage in args.stages:
            print(f"== {stage}", flush=True)
            {"shrink": shrink, "data": prepare, "runs": queue, "grain": grain, "report": report}[stage](args)


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
