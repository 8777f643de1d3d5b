"""The paper's experiment on the paper's network: RealESRGAN_x4plus, real camera pairs, a reward chosen by human votes.

    python -m experiments.paper_network                        every stage at CPU scale; resumes where it stopped
    python -m experiments.paper_network --scale gpu            one CUDA device: the paper's crop and batch per GPU
    python -m experiments.paper_network --precision fp32 --train=... --work DIR --results DIR    do the signs survive?

data      two sets of quintuplets from the same photographs, the test images, and, before any training, the share of
          crops that each reward leaves to the original. `soft`: enlarged by 1.5 first, so that enhanced versions often
          win; `sharp`: the photographs as they are
train     every sampler on both sets from the published weights; orig and amo also from weights changed by 1e-6, and in
          the other memory format; train.py, then evaluate.py
tune      amo's networks of the set `soft`, tuned by the reward with LoRA of rank 24 (the paper's) and 4, with the full
          weights of the same layers, and with all weights, each until the reward on held-out photographs has gained
          --gain
controls  the start's outputs, blurred or sharpened until they have amo's PSNR, or its reward, in the mean of its
          seeds, for every set
judge     rows that were made before a metric was asked for, by their outputs, which are kept
slow      IL-NIQE of some rows on 20 pairs
real      a page of photographs of low quality, of which no better version exists, under --work
report    tables and a picture

The analysis was fixed before the runs. Test images: RealSR's pairs (x4, crops of 128 -> 512 pixels) and Set5 with Set14
after two rounds of degradation, reported apart. All trainings of one seed see the same crops and degradations in the
same order; only the ground truth differs. A difference of two rows is the mean over test images of (mean over seeds of
A - the same of B), with a 95 % bootstrap interval over images; its sign is claimed where the interval excludes zero,
every seed agrees and a paired t test has p < 0.05 (report.tables.difference). Rows of one seed say so; rows without
one, the start and the controls, are compared with every seed of the other. Hypotheses, from
the paper: (1) amo > rand > orig on the reward and on quality metrics that nobody optimised; (2) tuning adds to amo's;
(3) the VGG distance of both rises by less than 2 % over orig's; (4) PSNR falls; (5) the change by LoRA has less
structured noise (metrics.noise_peaks) than the change by naive tuning at the same gain. The start is a row of every
table: a difference in how much was lost is not a gain. A row whose gain over the start a control reaches has no more
than that control.
"""
from pathlib import Path

import runs

DATA = Path(runs.literal("experiments/jobs", "DATA"))
STAGES = ("data", "train", "tune", "controls", "judge", "slow", "real", "report")
# {set: flags of prepare.quintuplets}
SETS = {"soft": "--soften 1.5 --shrink 0.5".split(), "sharp": "--soften 1 --shrink 0.75".split()}
# crops of 192 pixels: below that the reward knows little (docs/results-opinions.md)
SCALES = {
    "cpu": dict(train="""--crop 192 --load-size 256 --batch-size 2 --group-size 2 --pool-size 16 --total-steps 140
                         --d-warmup 40 --ema-decay 0.95 --lr 1e-4 --milestones --workers 0""",
                tune="--total-steps 100 --val-every 5 --ema-decay 0.9", pairs=40, patch=256),
    "gpu": dict(train="""--crop 256 --load-size 0 --batch-size 12 --group-size 12 --pool-size 180 --total-steps 1400
                         --d-warmup 400 --ema-decay 0.99 --lr 1e-4 --milestones --fast graph --workers 12""",
                tune="--total-steps 400 --val-every 10 --ema-decay 0.95", pairs=100, patch=384),
}
# {variant: flags of finetune_lora.py}; at the paper's 5e-5, adapters that begin at zero do nothing in so few steps
VARIANTS = {"lora24": "--tune lora --rank 24 --lr 5e-4", "lora4": "--tune lora --rank 4 --lr 5e-4",
            "layers": "--tune layers --lr 5e-5", "naive": "--tune all --lr 5e-5"}
# photographs that no training of a row sees; their reward ends the tunings
VALIDATION = 4
# standard deviations of the blur, amounts of the unsharp mask, which are tried first; further ones between two of them,
# until so much of the way to the goal is left
STRENGTHS, TRIES, NEAR = (0.1, 0.2, 0.4, 0.8, 1.6), 5, 0.02


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default all")
    p.add_argument("--scale", choices=list(SCALES), default="cpu", help="steps, crops, batches")
    p.add_argument("--photos", type=Path, nargs="+", metavar="DIR", help="training photographs",
                   default=[DATA / "images" / name for name in ("hr_kodak24", "hr_bsd100", "hr_urban100")])
    p.add_argument("--every", type=runs.SIZE, default=1, help="take every n-th photograph of each folder")
    p.add_argument("--pairs", type=Path, metavar="DIR", default=DATA / "images" / "pairs_realsr",
                   help="RealSR's test crops, <name>_LR and <name>_HR")
    p.add_argument("--test-photos", type=Path, nargs="+", metavar="DIR",
                   default=[DATA / "images" / name for name in ("test_set5", "test_set14")])
    p.add_argument("--real-photos", type=Path, metavar="DIR", default=DATA / "images" / "lr_realsrset",
                   help="photographs of low quality")
    p.add_argument("--start", type=runs.CHECKPOINT, metavar="FILE", default="realesrgan-x4plus",
                   help="of every row, and enhancer of version 01")
    p.add_argument("--enhancers", type=runs.CHECKPOINT, nargs="+", metavar="FILE", help="of versions 02, 03, 04",
                   default=[DATA / "weights" / "sr" / f"{name}_fp16.pth" for name in
                            ("4xLSDIRCompactC3", "realesr-general-wdn-x4v3", "realesr-general-x4v3")])
    p.add_argument("--rewards", nargs="+", metavar="NAME",
                   default=["weights/downloads/opinion.pth", "rewards.cnniqa:build", "ranker", "rewards/ranker2.pth",
                            "rewards/ranker3.pth"],
                   help="quality models; the first, which agreed best with people's opinions of photographs when the "
                        "first row was trained, is the reward of sma, amo and tuning, the others of one amo each")
    p.add_argument("--unseen", nargs="*", default=["niqe", "brisque", "piqe"], metavar="NAME",
                   help="no-reference metrics that nothing optimises, a model that judges only among them")
    p.add_argument("--slow", nargs="*", default=["ilniqe"], metavar="NAME", help="likewise, on 20 pairs")
    files = {"niqe": "niqe_modelparameters.mat", "brisque": "brisque_svm_weights.pth",
             "ilniqe": "ILNIQE_templateModel.mat"}
    p.add_argument("--metric-weights", nargs="*", metavar="NAME=FILE",
                   default=[f"{name}={DATA / 'weights' / 'iqa' / file}" for name, file in files.items()])
    p.add_argument("--vgg-weights", type=Path, metavar="FILE", default=Path("runs/vgg19.pth"),
                   help="VGG19, for the loss and the distance (python -m prepare.vgg19 makes it)")
    p.add_argument("--gain", type=runs.RATE, default=3.0, help="points of the reward at which tunings are compared")
    p.add_argument("--seeds", type=runs.COUNT, nargs="+", default=[0, 1, 2],
                   help="of orig, rand, amo and tunings; 1 for the rest")
    p.add_argument("--precision", choices=["bf16", "fp32"], default="bf16",
                   help="of quintuplets, training and outputs; tuning is in fp32")
    p.add_argument("--train", type=runs.split_flags, default=[], metavar="WORDS",
                   help="flags of train.py after those of the scale, in one word; the last of a flag counts")
    p.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), help="train on these")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], help="default: what the scale is for")
    p.add_argument("--jobs", type=runs.SIZE, default=2, help="processes at a time, each with one thread")
    p.add_argument("--work", type=Path, default=Path("runs/paper_network"), metavar="DIR")
    p.add_argument("--results", type=Path, default=Path("runs/results/paper_network"), metavar="DIR",
                   help="one JSON file per row, and the report")
    args = p.parse_args(argv)
    args.stages = args.stages or list(STAGES)
    args.device = args.device or {"cpu": "cpu", "gpu": "cuda"}[args.scale]
    if set(args.stages) - set(STAGES):
        p.error(f"stages are {', '.join(STAGES)}; got {' '.join(args.stages)}")
    return args


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import itertools
import json
import shutil
import signal
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torchvision.transforms.functional import gaussian_blur

import data
import metrics
from experiments import demo_seeds, jobs, lora_tuning, paper_network_report, samplers
from experiments.paper_network_report import TESTS, outputs, read_rows
from experiments.sampler_report import label
from images import list_images, save_image
from report import page


def plan(args):
    """-> {row: (set, flags of train.py)}, in order of value."""
    first, *others = args.rewards
    rows = {}
    for where in args.sets:
        for seed in args.seeds:
            for sampler in ("orig", "amo", "rand"):
                reward = first if sampler == "amo" else "none"
                rows[f"{where}-{sampler}-{seed}"] = where, ["--sampler", sampler, "--reward", reward, "--seed", seed]
        seed = args.seeds[0]
        for sampler, reward in [("sma", first), *(("amo", reward) for reward in others)]:
            name = f"{where}-{sampler}-{seed}" if reward == first else f"{where}-{sampler}-{label(reward)}-{seed}"
            rows[name] = where, ["--sampler", sampler, "--reward", reward, "--seed", seed]
        # does the sign survive rounding? of the flags that repeat, the last counts
        for variant, flags in (("perturbed", ["--init", perturbed(args)]), ("contiguous", ["--no-channels-last"])):
            for sampler in ("orig", "amo"):
                _, row = rows[f"{where}-{sampler}-{seed}"]
                rows[f"{where}-{sampler}-{variant}-{seed}"] = where, [*row, *flags]
    return rows


def perturbed(args):
    """The start with every weight changed by a share of at most 1e-6: made by the stage `train`."""
    return args.work / "perturbed.pth"


# Stage 1: data

def prepare(args):
    scale = SCALES[args.scale]
    photos = samplers.link_photos(args.photos, args.every, args.work / "photos")
    for where in args.sets:
        if not (args.work / where / "quintuplets.json").exists():
            jobs.call(args.work / f"{where}.log", "prepare.quintuplets", "--photos", photos, "--enhancers", args.start,
                      *args.enhancers, "--out", args.work / where, *SETS[where], "--patch", scale["patch"],
                      "--step", scale["patch"], "--precision", args.precision, "--device", args.device,
                      processes=args.jobs if args.device == "cpu" else 1)
    samplers.make_test(args.test_photos, args.work / "sets" / "test")
    # evenly from both cameras
    jobs.copy_realsr(args.pairs, args.work / "realsr" / "test", scale["pairs"])
    file, machine = args.results / "picks.json", runs.describe_machine()
    record = json.loads(file.read_text()) if file.exists() else {
        "command": sys.argv, **machine, "crops": samplers.CROPS, "picks": {}}
    world, seeds = runs.start_world("cpu", args.jobs), partial(runs.sample_seed, args.seeds[0])
    numbers = [jobs.last_value([*scale["train"].split(), *args.train], name)
               for name in ("--batch-size", "--group-size", "--crop", "--load-size")]
    for where in args.sets:
        about = json.loads((args.work / where / "quintuplets.json").read_text())
        sets = data.find_sets(args.work / where, "Train")
        made = {"sets": len(sets.stems), "photos": len(about["photos"]), "dropped": about["dropped"],
                "settings": about["settings"]}
        known = record["picks"].setdefault(where, {**made, "rewards": {}, "commit": machine["commit"]})
        changed = [key for key in made if known[key] != made[key]]
        if changed:
            raise runs.UserError(f"{file}: of the set {where} it has other {', '.join(changed)} than "
                                 f"{args.work / where}: name the --work of that record, or other --results")
        crops = data.TrainingSet(sets, "amo", seeds, *numbers)
        for name in (name for name in args.rewards if label(name) not in known["rewards"]):
            if known.get("commit", record["commit"]) != machine["commit"]:
                # a reward that was asked for later
                known.setdefault("later", {})[label(name)] = machine["commit"]
            known["rewards"][label(name)] = samplers.rewards_choice(name, sets, crops, world)
            runs.save_json(file, record)


# Stages 2 and 3: networks

def all_metrics(args):
    return [*args.rewards, *args.unseen, *jobs.WITH_REFERENCE]


def judge(args, row, *words, names=None):
    """evaluate.py on both tests -> {test: its JSON}. words: --weights FILE, or --images DIR, where {test} is filled in.

    names: metrics, default all. Outputs are kept in WORK/outputs/<test>/<name of the row>/.
    """
    judged, names = {}, names or all_metrics(args)
    for test in TESTS:
        out = args.work / "rows" / f"{row}-{test}.json"
        setting = SimpleNamespace(**vars(args) | {"work": args.work / test})
        filled = [str(word).replace("{test}", test) for word in words]
        judged[test] = jobs.evaluate(setting, None, out, names, more=[
            *filled, "--precision", args.precision, "--save", args.work / "outputs" / test])
    return judged


def record_of(judged, row):
    """What is kept of a row's evaluations."""
    first = judged[TESTS[0]]
    return {**{key: first[key] for key in (*jobs.MADE_BY, "lower_is_better")},
            "scores": {test: judged[test]["scores"][row] for test in TESTS}}


def add_start(args):
    """RESULTS/start.json and the rows without a network."""
    if (args.results / "start.json").exists():
        return
    judged = judge(args, "start", "--weights", args.start, "--names", "start", "--baselines", "bicubic", "reference")
    for row in ("bicubic", "reference", "start"):
        runs.save_json(args.results / f"{row}.json", record_of(judged, row))
    if args.precision != "fp32":
        precision_check(args)


def precision_check(args, count=10):
    """RESULTS/precision.json: the start's scores in fp32 on ten pairs, beside those in bf16."""
    folder, every = args.work / "precision", max(1, SCALES[args.scale]["pairs"] // count)
    for part in ("lq", "gt"):
        for file in sorted((args.work / "realsr" / "test" / part).iterdir())[::every]:
            runs.write_atomic(folder / "test" / part / file.name, partial(shutil.copy, file))
    setting = SimpleNamespace(**vars(args) | {"work": folder})
    scores = {}
    for precision in ("fp32", "bf16"):
        result = jobs.evaluate(setting, args.start, folder / f"{precision}.json",
                               all_metrics(args), more=["--precision", precision])
        scores[precision] = result["scores"][args.start.stem]
    kept = {key: result[key] for key in jobs.MADE_BY}
    runs.save_json(args.results / "precision.json", {**kept, "scores": scores})


def train_row(args, row, where, flags):
    """Train, evaluate, write RESULTS/<row>.json; continues an interrupted training."""
    run, words = args.work / "runs" / row, SCALES[args.scale]["train"].split()
    words += ["--precision", args.precision, *args.train]
    jobs.call(run.with_suffix(".log"), "train.py", "--arch", "rrdbnet", "--data", args.work / where, "--init",
              args.start, "--vgg-weights", args.vgg_weights, *words, "--val-photos", VALIDATION, "--val-every", 0,
              "--save-every", 50, "--log-every", 10, *flags, "--device", args.device, "--out", run, "--resume", "auto")
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["split"] == "train"]
    if steps[-1]["step"] != jobs.last_value(words, "--total-steps"):
        raise runs.UserError(f"{run}: training was stopped at step {steps[-1]['step']}; the same command continues")
    losses = [{key: event[key] for key in ("step", "pix", "percep", "adv", "D_real", "D_fake") if key in event}
              for event in steps]
    record = record_of(judge(args, row, "--weights", run, "--names", row), row)
    runs.save_json(args.results / f"{row}.json", {"train": [*words, *map(str, flags)], "losses": losses,
                                                  "picked": steps[-1]["picked"], **record})
    # 321 MB each
    (run / "ckpt" / "last.pt").unlink()


def tune_row(args, variant, seed):
    """Tune amo's network of a seed until the gain is there; RESULTS/<row>.json."""
    row, base = f"soft-amo-{seed}+{variant}", args.work / "runs" / f"soft-amo-{seed}"
    if (args.results / f"{row}.json").exists():
        return
    if not base.exists():
        raise runs.UserError(f"{base}: not there; remove {args.results / base.name}.json, and `train` makes it again")
    run, words = args.work / "runs" / row, [*SCALES[args.scale]["tune"].split(), *VARIANTS[variant].split()]
    jobs.call(run.with_suffix(".log"), "finetune_lora.py", "--base", base, "--reward", args.rewards[0], "--lambda-q",
              "auto", "--milestones", *words, "--watch", "ranker", "--stop-gain", args.gain, "--save-every", 20,
              "--log-every", 5, "--device", args.device, "--out", run, "--resume", "auto")
    steps = lora_tuning.validations(run, args.gain)
    state = runs.load_checkpoint(run / "ckpt" / "last.pt")
    record = record_of(judge(args, row, "--weights", run / "weights" / "merged.pth", "--names", row), row)
    peaks = {test: structured_noise(args, test, base.name, row) for test in TESTS}
    runs.save_json(args.results / f"{row}.json", {
        "tune": words, "steps": steps[-1]["step"], "gain": steps[-1]["reward"] - steps[0]["reward"],
        "lambda_q": state["lambda_q"], "validation": steps, "structured_noise": peaks, **record})


def structured_noise(args, test, before, after):
    """{image: metrics.noise_peaks of the change}"""
    old, new = outputs(args, test, before), outputs(args, test, after)
    return {stem: metrics.noise_peaks(new[stem] - old[stem]).item() for stem in old}


# Stage 4: what a filter reaches

FILTERS = {"blur": lambda image, sigma: gaussian_blur(image, 2 * round(3 * sigma) + 3, sigma),
           "unsharp": metrics.unsharp}


def control(args, where, name, equal):
    """RESULTS/start-NAME-of-equal-EQUAL.json: the start's outputs, filtered until they have amo's mean PSNR or reward.

    where: amo of this training set; rows of all sets but the first name it at their end. Where no strength comes nearer
    than the start itself, the row says so and has the start's scores.
    """
    row = f"start-{name}-of-equal-{equal}" + ("" if where == next(iter(SETS)) else f"-{where}")
    metric = equal if equal == "psnr" else args.rewards[0]
    file, used = args.results / f"{row}.json", {}
    if file.exists():
        return
    amo = [record["scores"] for of, record in read_rows(args).items()
           if of in {f"{where}-amo-{seed}" for seed in args.seeds}]
    if not amo:
        raise runs.UserError(f"{args.results}: no {where}-amo-SEED.json to compare with; `train` makes them")
    reward = jobs.judge(args.rewards[0], args.metric_weights) if equal == "reward" else None
    for test in TESTS:
        goal = float(np.mean([values[metric] for scores in amo for values in scores[test].values()]))
        used[test] = filtered(args, test, row, FILTERS[name], goal, reward) | {"seeds": len(amo)}
    if not any(of_test["strength"] for of_test in used.values()):
        start = json.loads((args.results / "start.json").read_text())
        runs.save_json(file, {**start, "strength": used, "commit": runs.describe_machine()["commit"]})
        return
    judged = judge(args, row, "--images", args.work / "outputs" / "{test}" / row)
    noise = {test: structured_noise(args, test, "start", row) for test in TESTS}
    runs.save_json(file, {"strength": used, "structured_noise": noise, **record_of(judged, row)})


@torch.no_grad()
def filtered(args, test, row, function, goal, reward):
    """Filter all outputs with the strength whose mean PSNR, or mean reward, is nearest to `goal` -> what was reached.

    STRENGTHS are tried until one passes the goal, or leads away from it: means are monotone there. Then the interval is
    divided, where a straight line would meet the goal, until NEAR of the way is left.
    """
    images, tried, best = outputs(args, test, "start"), {}, None

    def attempt(strength):
        nonlocal best
        changed = {stem: (function(image, strength).clamp(0, 1) * 255).round() / 255 if strength else image
                   for stem, image in images.items()}
        tried[strength] = float(np.mean([
            reward(image, None).item() if reward else
            metrics.psnr(image, jobs.test_pair(args.work / test, stem)[1]).item() for stem, image in changed.items()]))
        if best is None or abs(tried[strength] - goal) < abs(tried[best[0]] - goal):
            best = strength, changed
        # 0 at the goal, 1 without the filter
        return (tried[strength] - goal) / (tried[0.0] - goal)
    low, left = 0.0, attempt(0.0)
    for strength in STRENGTHS:
        high, right = strength, attempt(strength)
        if right > 1.001:
            break
        if right <= 0:
            for _ in range(TRIES):
                if min(left, -right) < NEAR:
                    break
                middle = low + (high - low) * left / (left - right)
                share = attempt(middle)
                low, left, high, right = (middle, share, high, right) if share > 0 else (low, left, middle, share)
            break
        low, left = high, right
    for stem, image in best[1].items():
        save_image(args.work / "outputs" / test / row / f"{stem}.png", image[0])
    return {"strength": best[0], "reached": tried[best[0]], "goal": goal, "tried": dict(sorted(tried.items()))}


# Stage 5: metrics that were asked for later

def complete(args):
    """Add them to the scores of the rows that are there; `judged_later` says at which commit."""
    for row, record in read_rows(args).items():
        missing = [name for name in all_metrics(args) if name not in record["lower_is_better"]]
        if not missing:
            continue
        kept = args.work / "{test}" / "test" / "gt" if row == "reference" else args.work / "outputs" / "{test}" / row
        judged = judge(args, f"{row}-later", "--images", kept, names=missing)
        for test in TESTS:
            scores, = judged[test]["scores"].values()
            for stem, values in scores.items():
                record["scores"][test][stem] |= values
        record["lower_is_better"] |= judged[test]["lower_is_better"]
        record.setdefault("judged_later", {}).update(dict.fromkeys(missing, judged[test]["commit"]))
        runs.save_json(args.results / f"{row}.json", record)


# Stage 6: a metric of 15 seconds an image

def slow(args, count=20):
    """RESULTS/slow.json: {row: {image: {metric: value}}} of the first seed's outputs that are here."""
    seed, only = args.seeds[0], args.work / "slow.txt"
    stems = list(list_images(args.work / "realsr" / "test" / "lq"))[::max(1, SCALES[args.scale]["pairs"] // count)]
    runs.write_atomic(only, lambda path: path.write_text("\n".join(stems) + "\n"))
    trained = [f"{where}-{sampler}-{seed}" for where in args.sets for sampler in ("orig", "amo")]
    # the cheapest and the dearest tuning
    rows = ["start", *trained, f"soft-amo-{seed}+lora4", f"soft-amo-{seed}+naive"]
    folders = [args.work / "outputs" / "realsr" / row for row in rows]
    folders = [folder for folder in folders if folder.is_dir()]
    setting = SimpleNamespace(**vars(args) | {"work": args.work / "realsr"})
    judged = jobs.evaluate(setting, None, args.work / "rows" / "slow.json", args.slow,
                           more=["--images", *folders, "--only", only])
    kept = {key: judged[key] for key in (*jobs.MADE_BY, "lower_is_better")}
    runs.save_json(args.results / "slow.json", {**kept, "scores": judged["scores"]})


# Stage 7: photographs without a reference

def real(args):
    """WORK/real.html: outputs of the start and of the first seed's networks that are here, with the first reward."""
    seed, rows = args.seeds[0], {"start": args.start}
    rows |= {path.name: path for path in sorted((args.work / "runs").glob(f"*-{seed}")) if (path / "weights").is_dir()}
    tuned = sorted((args.work / "runs").glob(f"*-{seed}+*/weights/merged.pth"))
    rows |= {path.parent.parent.name: path for path in tuned}
    out = args.work / "real.json"
    jobs.call(args.work / "real.log", "evaluate.py", "--lq", args.real_photos, "--weights", *rows.values(), "--names",
              *rows, "--metrics", args.rewards[0], "--precision", args.precision, "--device", args.device, "--cache",
              args.work / "evaluation-cache", "--save", args.work / "outputs" / "real", "--out-json", out)
    page.main(page.parse_args([str(out), str(args.work / "real.html")]))


def main(args):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if args.stages != ["report"]:
        rewards = [Path(name) for name in [*args.rewards, *args.unseen] if runs.is_reward_file(name)]
        weights = [args.start, *args.enhancers, args.vgg_weights]
        for path in [*args.photos, args.pairs, *args.test_photos, args.real_photos, *weights, *rewards]:
            if not path.exists():
                command = f"; {runs.how_to_get(path)}" if path in weights else \
                    "; docs/results-paper-network.md has the command that trains it" if path in rewards else ""
                raise runs.UserError(f"{path}: not there; docs/data.md says where it comes from, --help which flag "
                                     f"names another{command}")
    left = {row: words for row, words in plan(args).items() if not (args.results / f"{row}.json").exists()}
    if "data" in args.stages:
        prepare(args)
    if "train" in args.stages:
        add_start(args)
        if not perturbed(args).exists():
            demo_seeds.perturb(args.start, perturbed(args), args.seeds[0])
        jobs.parallel(args.jobs, [partial(train_row, args, row, *words) for row, words in left.items()])
    # of amo's networks of that set
    if "tune" in args.stages and "soft" in args.sets:
        jobs.parallel(args.jobs, [partial(tune_row, args, name, seed) for seed in args.seeds for name in VARIANTS])
    if "controls" in args.stages:
        for where, name, equal in itertools.product(args.sets, FILTERS, ("psnr", "reward")):
            control(args, where, name, equal)
    if "judge" in args.stages:
        complete(args)
    if "slow" in args.stages and args.slow:
        slow(args)
    if "real" in args.stages:
        real(args)
    if "report" in args.stages:
        paper_network_report.report(args, SETS, VARIANTS)


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
