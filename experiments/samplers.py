"""What do the ground-truth samplers bring on photographs that nobody labelled? The first experiment, in one resumable queue.

    PYTHONPATH=../shared/tools python -m experiments.samplers [shrink] [data] [runs] [grain] [report]       all five without a word; continues where it stopped

shrink   enhanced versions of the photos at several shrink factors, judged by what no training here optimises: make_quintuplets.py's default
data     quintuplets of the photos, low-resolution test images, and how often each reward picks each version before any training
runs     orig, rand, sma, amo with the first reward, sma and amo with the others, every seed: train.py, then evaluate.py, one JSON file each
grain    thought of after the runs, to find out why NIQE disagrees: NIQE again with a little Gaussian noise on every output; structured noise
report   RESULTS.json, RESULTS.png, RESULTS-sets.png and the tables of README

The analysis was fixed before the runs. All runs start from the same weights and see the same crops and degradations in the same order;
only the ground truth differs. A difference between two samplers is the mean over test images of (mean over seeds of A - the same of B), with a 95 %
bootstrap interval (BCa, 9999 resamples) over the images. It `holds` in its direction when the interval excludes zero and every seed has that sign; all else
is `no evidence`. The paper's ordering is the hypothesis: no-reference quality orig < rand < sma < amo, PSNR the reverse.
The shrink factor's rule, fixed likewise: per photo and metric (NIQE, BRISQUE, PIQE), does some version beat the original? The factors whose mean
share is within .05 of the best are as good; of these the one with the highest PSNR of the versions to the original wins. That is .25, and it was overruled
after looking: see README. The default is .75.
"""
import argparse
import shlex
from pathlib import Path

import runs


SHARED = Path("../shared/data")
SR = SHARED / "weights" / "sr"
STAGES = ("shrink", "data", "runs", "grain", "report")
SHRINKS, SOFTENED = (0.25, 0.375, 0.5, 0.75), ((1, 3, 320), (2, 6, 512))          # (--soften, every n-th photo, patch)
QUINTUPLETS = "--soften 2 --patch 192 --step 192".split()
TRAIN = """--arch compact --total-steps 200 --batch-size 8 --group-size 4 --pool-size 32 --crop 96 --load-size 128 --lr 2e-4 --milestones 140 170
           --lambda-p 0.03 --lambda-a 0.01 --d-features 8 --ema-decay 0.98 --workers 0 --log-every 40 --save-every 40 --weights-every 0
           --val-every 0 --sample-every 0""".split()


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=runs.Help)
    p.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default all")
    p.add_argument("--photos", type=Path, nargs="+", metavar="DIR", default=[SHARED / "images" / d for d in ("hr_kodak24", "hr_bsd100", "hr_urban100")],
                   help="training photographs")
    p.add_argument("--test-photos", type=Path, nargs="+", metavar="DIR", default=[SHARED / "images" / d for d in ("test_set5", "test_set14")],
                   help="test photographs, never trained on")
    p.add_argument("--enhancers", type=Path, nargs="+", metavar="FILE", help="x4 checkpoints of versions 01, 02, ...",
                   default=[SR / f"{name}_fp16.pth" for name in ("4xLSDIRCompactC3", "realesr-general-wdn-x4v3", "realesr-general-x4v3",
                                                                 "realesr-animevideov3-x4")])
    p.add_argument("--init", type=Path, default=SR / "realesr-general-x4v3_fp16.pth", help="weights that all runs start from")
    p.add_argument("--rewards", nargs="+", default=["cnniqa_live:build", "ranker"], metavar="NAME",
                   help="quality models; the first is compared with orig and rand")
    p.add_argument("--unseen", nargs="+", default=["niqe", "brisque", "piqe"], metavar="NAME", help="no-reference metrics that nobody optimises")
    p.add_argument("--slow", nargs="*", default=["ilniqe"], metavar="NAME", help="likewise, in a call of their own after all runs")
    p.add_argument("--metric-weights", nargs="*", metavar="NAME=FILE", help="local weight files of the metrics",
                   default=[f"{n}={SHARED / 'weights' / 'iqa' / f}" for n, f in (("niqe", "niqe_modelparameters.mat"),
                            ("brisque", "brisque_svm_weights.pth"), ("ilniqe", "ILNIQE_templateModel.mat"))])
    p.add_argument("--vgg-weights", type=Path, metavar="FILE", default=Path("runs/vgg19.pth"),
                   help="VGG19, for the loss and the distance (../shared/tools/vgg19_for_torchvision.py makes it)")
    p.add_argument("--figure", nargs="+", metavar="NAME", help="test images of the picture, <folder>_<name>; the middle of each is shown",
                   default=["test_set5_bird", "test_set5_butterfly", "test_set14_comic", "test_set14_zebra"])
    p.add_argument("--seeds", type=runs.COUNT, nargs="+", default=[0, 1, 2])
    p.add_argument("--train", default="", metavar="'FLAGS'", help="further flags of train.py, for example a GPU's: '--crop 256 --batch-size 48 "
                   "--group-size 12 --d-features 64 --total-steps 20000 --milestones 15000'")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of training and evaluation")
    p.add_argument("--jobs", type=runs.SIZE, default=2, help="processes at a time, each with one thread")
    p.add_argument("--work", type=Path, default=Path("runs/experiment"), help="photos, quintuplets, runs and logs")
    p.add_argument("--results", type=Path, default=Path("results/experiment"), help="one JSON file per run; tables beside it")
    args = p.parse_args(argv)
    args.stages = args.stages or list(STAGES)
    args.train = TRAIN + [part for word in shlex.split(args.train) for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if set(args.stages) - set(STAGES):
        p.error(f"stages are {', '.join(STAGES)}; got {' '.join(args.stages)}")
    return args


ARGS = parse_args() if __name__ == "__main__" else None                           # --help needs no torch: seconds

import hashlib
import json
import signal
import sys
from collections import Counter
from functools import partial

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import archs
from experiments import jobs
import data
import degradations
import iqa
import metrics as quality
from images import cut_to_x4, list_images, load_image, save_image
from report import tables
from prepare.quintuplets import contact_sheet
from report import pictures


def link_photos(folders, every, target):
    """Links to every n-th photo of all folders, named <folder>_<file>, in one folder."""
    target.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        for path in list(list_images(folder).values())[::every]:
            link = target / f"{folder.name}_{path.name}"
            if not link.exists():
                link.symlink_to(path.resolve())
    return target


def train_flag(args, flag):
    """The whole number that train.py is given for a flag: the last one counts."""
    return int(args.train[len(args.train) - args.train[::-1].index(flag)])


# Stage 1: the shrink factor

def shrink(args):
    """Builds small sets at every factor and judges them -> RESULTS-shrink.json."""
    file = args.results.with_name(args.results.name + "-shrink.json")
    if file.exists():
        return
    folder = lambda soften, f: args.work / "shrink" / f"soften{soften}-shrink{f}"
    tasks = []
    for soften, every, patch in SOFTENED:
        photos = link_photos(args.photos, every, args.work / "shrink" / f"photos-{every}")
        for f in SHRINKS:
            words = ["--photos", photos, "--enhancers", *args.enhancers, "--out", folder(soften, f), "--shrink", f, "--soften", soften,
                     "--patch", patch, "--step", patch, "--jitter", 0, "--min-std", 0, "--min-laplacian", 0, "--min-change", 0]
            tasks.append(partial(jobs.call, folder(soften, f).with_name(folder(soften, f).name + ".log"), "prepare.quintuplets", *words))
    jobs.parallel(args.jobs, tasks[::-1])                                      # the longest first
    judges = {m: jobs.judge(args, m) for m in [*args.unseen, args.rewards[0]]}
    rows = []
    for soften, every, patch in SOFTENED:
        for f in SHRINKS:
            sets = data.find_sets(folder(soften, f), "Train")
            scores = {stem: judge_set(sets, stem, judges) for stem in tqdm(sets.stems, desc=f"soften {soften}, shrink {f}", unit="set")}
            rows.append({"soften": soften, "shrink": f, "patch": patch, "sets": len(sets.stems), **summarise(scores, sets.versions[1:], judges, args.unseen)})
    runs.save_json(file, {"command": sys.argv, **runs.describe_machine(), "enhancers": [p.name for p in args.enhancers], "rule": best_shrink(rows), "rows": rows})
    print(f"by the rule of the docstring: shrink factor {best_shrink(rows)}")


@torch.no_grad()
def judge_set(sets, stem, judges):
    """-> {version: {metric: score, higher is better, "psnr": to the original}}"""
    images = {v: load_image(sets.path(stem, v))[None].float() / 255 for v in sets.versions}
    score = {v: {m: (-1 if metric.lower_is_better else 1) * metric(image, None).item() for m, metric in judges.items()} for v, image in images.items()}
    for v, image in images.items():
        score[v]["psnr"] = quality.psnr(image, images["original"]).item()
    return score


def summarise(scores, versions, judges, unseen):
    """Shares of patches, averaged per photo and then over photos, in which each version, or any of them, beats the original."""
    photos = {}
    for stem, s in scores.items():
        photos.setdefault(data.photo_of(stem), []).append(s)
    mean = lambda value: float(np.mean([np.mean([value(s) for s in sets]) for sets in photos.values()]))
    beats = {m: {v: mean(lambda s: s[v][m] > s["original"][m]) for v in versions} for m in judges}
    any_beats = {m: mean(lambda s: max(s[v][m] for v in versions) > s["original"][m]) for m in judges}
    return {"photos": len(photos), "any": any_beats, "any_unseen": float(np.mean([any_beats[m] for m in unseen])), "version": beats,
            "psnr": {v: mean(lambda s: s[v]["psnr"]) for v in versions}, "psnr_mean": mean(lambda s: np.mean([s[v]["psnr"] for v in versions]))}


def best_shrink(rows):
    """The rule fixed in the docstring. -> factor"""
    share = {f: np.mean([r["any_unseen"] for r in rows if r["shrink"] == f]) for f in SHRINKS}
    psnr = {f: np.mean([r["psnr_mean"] for r in rows if r["shrink"] == f]) for f in SHRINKS}
    return max((f for f in SHRINKS if share[f] >= max(share.values()) - 0.05), key=psnr.get)


# Stage 2: quintuplets, test images, and what the rewards would choose

def prepare(args):
    photos = link_photos(args.photos, 1, args.work / "photos")
    jobs.call(args.work / "quintuplets.log", "prepare.quintuplets", "--photos", photos, "--enhancers", *args.enhancers, "--out", args.work / "set", *QUINTUPLETS,
                 "--device", args.device, processes=args.jobs if args.device == "cpu" else 1)
    make_test(args)
    file = args.results.with_name(args.results.name + "-picks.json")
    if file.exists():
        return
    sets = data.find_sets(args.work / "set", "Train")
    world, seeds = runs.start_world("cpu", args.jobs), partial(runs.sample_seed, args.seeds[0])
    word = partial(train_flag, args)
    crops = data.TrainingSet(sets, "amo", seeds, word("--batch-size"), word("--group-size"), word("--crop"), word("--load-size"))
    record = json.loads((args.work / "set" / "quintuplets.json").read_text())
    result = {"command": sys.argv, **runs.describe_machine(), "sets": len(sets.stems), "photos": len(record["photos"]), "dropped": record["dropped"],
              "settings": record["settings"], "crops": 400, "rewards": {}}
    for name in args.rewards:
        reward, online = iqa.create_reward([name]), Counter()
        whole = iqa.score_images([sets.path(stem, v) for stem in sets.stems for v in sets.versions], reward, args.work / "scores", world)
        whole = whole.view(len(sets.stems), -1)
        with torch.no_grad():
            for k in tqdm(range(400), desc=f"{name}: crops", unit="crop"):        # the very crops that seed 0 trains on
                sample = crops.sample(1 + k // crops.batch_size, k % crops.batch_size)
                online[int(reward(sample["crops"].float() / 255).argmax())] += 1
        soft = data.sampling_probs(whole, torch.ones_like(whole, dtype=torch.bool), 10.0)
        result["rewards"][name] = {
            "best crop (amo)": {v: online[i] / 400 for i, v in enumerate(sets.versions)},
            "best whole patch": {v: (whole.argmax(1) == i).double().mean().item() for i, v in enumerate(sets.versions)},
            "probability (sma)": dict(zip(sets.versions, soft.mean(0).tolist()))}
    runs.save_json(file, result)


def make_test(args):
    """WORK/test/{gt,lq}: the test photos, cut to a multiple of 4, and each once degraded by two rounds with a seed of its own."""
    for folder in args.test_photos:
        for i, (stem, path) in enumerate(list_images(folder).items()):
            name = f"{folder.name}_{stem}.png"
            gt = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].float() / 255
            gt = cut_to_x4(gt)
            if not (args.work / "test" / "lq" / name).exists():
                seeds = [[runs.sample_seed(0, k, i, folder.name)] for k in (0, 1)]
                for kind, image in (("gt", gt), ("lq", degradations.degrade(gt, "two-round", *seeds))):            # lq last: it says that both are there
                    runs.write_atomic(args.work / "test" / kind / name, lambda temporary: save_image(temporary, image[0]))


# Stage 3: the queue

def plan(args):
    """-> {name of the run: flags of train.py}, seed by seed."""
    names = {}
    for seed in args.seeds:
        for sampler in ("orig", "rand"):
            names[f"{sampler}-{seed}"] = ["--sampler", sampler, "--reward", "none", "--seed", seed]
        for reward in args.rewards:
            for sampler in ("sma", "amo"):
                names[f"{sampler}-{reward.partition(':')[0]}-{seed}"] = ["--sampler", sampler, "--reward", reward, "--seed", seed]
    return names


def one_run(args, name, words):
    """Train, evaluate, write RESULTS/<name>.json; continues an interrupted training."""
    run = args.work / "runs" / name
    jobs.call(run.with_suffix(".log"), "train.py", "--data", args.work / "set", "--init", args.init, "--vgg-weights", args.vgg_weights, *args.train, *words,
         "--score-cache", args.work / "scores", "--device", args.device, "--out", run, "--resume", "auto")
    total, step = train_flag(args, "--total-steps"), runs.load_checkpoint(run / "ckpt" / "last.pt")["step"]
    if step != total:
        raise runs.UserError(f"{run}: training was stopped at step {step} of {total}; the same command continues")
    judged = jobs.evaluate(args, run, run.with_suffix(".json"), [*args.rewards, *args.unseen, *jobs.WITH_REFERENCE])
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    runs.save_json(args.results / f"{name}.json", {
        "train": args.train + list(map(str, words)), **{k: judged[k] for k in ("commit", "torch", "python", "device", "lower_is_better")},
        "picked": [e["picked"] for e in events if "picked" in e][-1], "scores": judged["scores"][name]})


def queue(args):
    before = args.results / "before.json"
    if not before.exists():                                                       # the rows without a run: references, bicubic, start
        metrics = [*args.rewards, *args.unseen, *jobs.WITH_REFERENCE]
        judged = jobs.evaluate(args, args.init, args.work / "before.json", metrics, ["bicubic", "reference"])
        runs.save_json(before, {k: v for k, v in judged.items() if k not in ("mean", "intervals", "differences")}
                       | {"scores": {k.replace(args.init.stem, "start"): v for k, v in judged["scores"].items()}})
    jobs.parallel(args.jobs, [partial(one_run, args, name, words) for name, words in plan(args).items() if not (args.results / f"{name}.json").exists()])
    jobs.parallel(args.jobs, [partial(slow, args, name) for name in ["before", *plan(args)]])


def slow(args, name):
    """Add the slow metrics to RESULTS/<name>.json."""
    file = args.results / f"{name}.json"
    record = json.loads(file.read_text())
    rows = record["scores"] if name == "before" else {name: record["scores"]}
    if not args.slow or all(m in s for images in rows.values() for s in images.values() for m in args.slow):
        return
    weights, baselines = (args.init, ["bicubic", "reference"]) if name == "before" else (args.work / "runs" / name, [])
    if not weights.exists():
        raise runs.UserError(f"{file} has no {' '.join(args.slow)} yet, and {weights} is not here to compute it: name the folder of the runs with --work, "
                         "or leave these metrics out with --slow")
    judged = jobs.evaluate(args, weights, args.work / "runs" / f"{name}-slow.json", args.slow, baselines)
    for row, images in rows.items():
        for stem, scores in images.items():
            scores |= judged["scores"][args.init.stem if row == "start" else row][stem]
    runs.save_json(file, record | {"lower_is_better": record["lower_is_better"] | judged["lower_is_better"]})


# Stage 4: why does NIQE disagree?

@torch.no_grad()
def grain(args, sigmas=(0, 1, 2, 4)):
    """RESULTS-grain.json: mean NIQE of every row when noise of so many grey levels is added to it, and quality.noise_peaks of run minus start."""
    file = args.results.with_name(args.results.name + "-grain.json")
    if file.exists():
        return
    niqe = jobs.judge(args, "niqe")
    start, rows, stems = archs.load_x4(args.init, "--init")[0], {}, list(list_images(args.work / "test" / "lq"))
    for name in tqdm(["reference", "start", *plan(args)], unit="row"):
        net = start if name in ("reference", "start") else archs.load_x4(args.work / "runs" / name, "--work")[0]
        row = rows[name] = {"niqe": {str(s): 0.0 for s in sigmas}, "peaks": 0.0}
        for i, stem in enumerate(stems):
            lq, gt = jobs.test_pair(args, stem)
            sr = gt if name == "reference" else degradations.to_8bit(archs.upscale_tiled(net, lq))
            noise = torch.randn(gt[:, :1].shape, generator=torch.Generator().manual_seed(i)) / 255                # grey, the same for every row
            for s in sigmas:
                row["niqe"][str(s)] += niqe(degradations.to_8bit(sr + s * noise), None).item() / len(stems)
            if name != "reference":
                row["peaks"] += quality.noise_peaks(sr - degradations.to_8bit(archs.upscale_tiled(start, lq))).item() / len(stems)
    runs.save_json(file, {"command": sys.argv, **runs.describe_machine(), "images": len(stems), "rows": rows})


# Stage 5: tables and picture

def report(args):
    results = {name: json.loads((args.results / f"{name}.json").read_text()) for name in ["before", *plan(args)]}
    lower = results["before"]["lower_is_better"]
    metrics = [m for m in [*args.rewards, *args.unseen, *args.slow, *jobs.WITH_REFERENCE] if all(m in r["lower_is_better"] for r in results.values())]
    stems = sorted(results["before"]["scores"]["start"])
    samplers = list(dict.fromkeys(name.rpartition("-")[0] for name in plan(args)))
    value = lambda scores: np.array([[scores[stem][m] for m in metrics] for stem in stems])                # (images, metrics)
    before = {row: value(scores) for row, scores in results["before"]["scores"].items()}
    after = {s: np.stack([value(results[f"{s}-{seed}"]["scores"]) for seed in args.seeds]) for s in samplers}   # (seeds, images, metrics)
    summary = {"command": sys.argv, **runs.describe_machine(), "images": len(stems), "seeds": args.seeds, "metrics": metrics, "lower_is_better": lower,
               "mean": {row: v.mean(0).tolist() for row, v in before.items()} | {s: v.mean((0, 1)).tolist() for s, v in after.items()},
               "seed_means": {s: v.mean(1).tolist() for s, v in after.items()}, "differences": {},
               "picked": {s: shares(results[f"{s}-{seed}"]["picked"] for seed in args.seeds) for s in samplers}}
    first = args.rewards[0].partition(":")[0]
    chain = ["orig", "rand", f"sma-{first}", f"amo-{first}"]
    pairs = [*zip(chain[1:], chain), (chain[3], "orig")]
    for r in (reward.partition(":")[0] for reward in args.rewards[1:]):
        pairs += [(f"sma-{r}", "rand"), (f"amo-{r}", f"sma-{r}"), (f"sma-{r}", "orig"), (f"amo-{r}", "orig")]
    for a, b in pairs:
        summary["differences"][f"{a} - {b}"] = {m: tables.difference(after[a][..., k], after[b][..., k]) for k, m in enumerate(metrics)}
    runs.save_json(args.results.with_suffix(".json"), summary)
    print(readme_tables(summary, args))
    if not (args.work / "set").is_dir():
        print(f"no pictures: {args.work} holds no set and no runs")
        return
    sets = data.find_sets(args.work / "set", "Train")
    shown = [stem for stem in sets.stems if stem.startswith(args.photos[0].name)]  # Kodak's photographs may be shown freely
    contact_sheet(args.results.with_name(args.results.name + "-sets.png"), sets, shown, [iqa.create_reward([name]) for name in args.rewards],
                  "cpu", rows=4)
    picture(args, [f"{s}-{args.seeds[0]}" for s in (chain[0], chain[1], chain[3])])


def shares(counts):
    """[{version: times chosen}] of several runs -> {version: share}"""
    total = sum(map(Counter, counts), Counter())
    return {version: n / sum(total.values()) for version, n in total.items()}


def readme_tables(summary, args):
    """The Markdown that README shows: shrink factors, what the rewards pick, metrics, differences, what the samplers picked."""
    load = lambda what: json.loads(args.results.with_name(f"{args.results.name}-{what}.json").read_text())
    percent = lambda counts: [f"{n:.0%}" for n in counts.values()]
    parts = []
    rows = load("shrink")["rows"]
    judges = list(rows[0]["any"])
    parts.append(runs.markdown(["soften", "shrink", *(tables.SHOWN.get(m, m) for m in judges), "mean of unseen", "PSNR"],
                               [[r["soften"], r["shrink"], *percent(r["any"]), f"{r['any_unseen']:.3f}", f"{r['psnr_mean']:.1f}"] for r in rows]))
    picks = load("picks")["rewards"]
    versions = list(picks[args.rewards[0]]["best crop (amo)"])
    parts.append(runs.markdown(["", *versions], [[f"{tables.SHOWN.get(reward, reward)}: {how}", *percent(p)] for reward, hows in picks.items() for how, p in hows.items()]))

    parts.append(jobs.metric_tables(summary))
    if args.results.with_name(f"{args.results.name}-grain.json").exists():
        parts.append(grain_table(load("grain")["rows"], summary, args))
    parts.append(runs.markdown(["", *versions], [[s, *percent({v: picked.get(v, 0) for v in versions})] for s, picked in summary["picked"].items()]))
    return "\n\n".join(parts)


def grain_table(rows, summary, args):
    """Mean NIQE per sampler at every noise level, and the structured noise of what training changed."""
    mean = lambda names, value: np.mean([value(rows[name]) for name in names])
    groups = {"reference": ["reference"], "start": ["start"]} | {s: [f"{s}-{seed}" for seed in args.seeds] for s in summary["seed_means"]}
    return runs.markdown(["NIQE with noise of", *(f"{s} grey levels" for s in rows["start"]["niqe"]), "structured noise"],
                         [[row, *(f"{mean(names, lambda r: r['niqe'][s]):.2f}" for s in rows["start"]["niqe"]), f"{mean(names, lambda r: r['peaks']):.3f}"]
                          for row, names in groups.items()])


@torch.no_grad()
def picture(args, names, side=128):
    """RESULTS.png: the middle of some test images: LR, the named runs, reference, enlarged twice."""
    nets = {name: archs.load_x4(args.work / "runs" / name, "--work")[0] for name in names}
    cells = []
    for stem in args.figure:
        lq, gt = jobs.test_pair(args, stem)
        images = {"LR": lq.repeat_interleave(4, 2).repeat_interleave(4, 3)}
        images |= {name.rpartition("-")[0]: archs.upscale_tiled(net, lq).clamp(0, 1) for name, net in nets.items()} | {"reference": gt}
        y, x = ((n - side) // 2 for n in gt.shape[2:])
        cells.append([(pictures.enlarged_crop(image, y, x, side, 2), name) for name, image in images.items()])
    pictures.save_grid(args.results.with_suffix(".png"), cells)


def check_settings(args):
    """Results are reused only for the same inputs: RESULTS-settings.json holds their hashes. ValueError where they differ."""
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    folders = lambda dirs: {f"{d.name}_{p.name}": digest(p) for d in dirs for p in list_images(d).values()}
    vgg = hashlib.sha256(b"".join(value.numpy().tobytes() for _, value in sorted(archs.read_file(args.vgg_weights).items())))   # a file's bytes hold its name
    settings = {"train": args.train, "quintuplets": QUINTUPLETS, "init": digest(args.init), "enhancers": [digest(p) for p in args.enhancers],
                "vgg": vgg.hexdigest()[:16], "photos": folders(args.photos), "test_photos": folders(args.test_photos), "rewards": args.rewards,
                "unseen": args.unseen}
    file = args.results.with_name(args.results.name + "-settings.json")
    begun = any(args.results.glob("*.json")) or any(file.with_name(f"{args.results.name}-{what}.json").exists() for what in ("shrink", "picks", "grain"))
    if file.exists() and begun:
        changed = runs.changes(json.loads(file.read_text()), settings)
        if changed:
            raise runs.UserError(f"{file}: these results were made with other {', '.join(changed)}: choose another --results and --work")
    else:
        runs.save_json(file, settings)


def main(args):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if args.stages != ["report"]:                                                 # which needs the results only
        if not args.vgg_weights.is_file():
            raise runs.UserError(f"--vgg-weights {args.vgg_weights}: no such file; here: mkdir -p {args.vgg_weights.parent} && "
                                    f"python ../shared/tools/vgg19_for_torchvision.py {args.vgg_weights}")
        for path in [*args.photos, *args.test_photos, *args.enhancers, args.init]:
            if not path.exists():
                raise runs.UserError(f"{path}: not there; see --help for the flag that names another")
        check_settings(args)
    for stage in STAGES:
        if stage in args.stages:
            print(f"== {stage}", flush=True)
            {"shrink": shrink, "data": prepare, "runs": queue, "grain": grain, "report": report}[stage](args)


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
