"""Does perceptual preference optimisation help, and which part of it? DP2O-SR; one resumable queue.

    python -m experiments.preferences                       every stage at CPU scale; resumes where it stopped
    python -m experiments.preferences --scale gpu           one CUDA device

data      photographs for generators and pools; others that nothing is trained on
generate  for every seed a FlowSR generator over a frozen x4 network
pool      --samples outputs for every low-resolution crop, their scores, how far the seeds differ; the untuned generator
          and the controls on the test photographs; was the criterion for generators met?
tune      DPO with equal steps and pairs per step, then the outputs for the test photographs. Arms: the best against the
          worst seed (Diffusion-DPO); the best and worst 1/4 and 1/8 of the seeds; 1/4 with the weights of HPO, the
          method, and with weights that differ from 1 as much as at the paper's sigma_g; HPO with a full- or a
          no-reference reward alone, with ranker3 judging images without their grid of pixels, and with pairs that have
          equal grids; 1/4 with winners and losers by the toss of a coin; HPO in two rounds of half the images and half
          the steps
report    sigma_g first, then tables, the signs of the paper, curves and a contact sheet

PRE-REGISTERED before any run, after a first experiment (docs/results-dpo.md) that was starved: its seeds hardly
differed (tau 0.6), 150 steps of 8 pairs were gradient noise, and the no-reference half of the reward decided alone.
- tau is 1, as in training. A generator is worth tuning if on held-out photographs the mean of its samples has at least
  1 dB more PSNR than its base, and if on the scale of the pool its reward is within 0.02 of the best of the tried tau.
  If not, the report says what was reached; nothing is left out.
- Reward: half SSIM and VGG distance, half ranker3, of the models at hand the one that agrees best with people on SR
  outputs, as sharpness does (docs/results-human.md). Pairs are chosen on each image's own scale if in the first pool
  the correlation of each half with the sum is then between 0.4 and 0.9, for all seeds alike; networks are compared on
  that of an average image.
- lr 2e-5 and beta 5000 are the paper's. The weights of the check with the best held-out reward count.
- Three seeds, each with a generator and a pool of its own, for the untuned generator, 1 of 4 and HPO; one for the other
  arms. A difference is the mean over test photographs of (mean over common seeds of A - B). It is in bold, and a sign
  holds, when its 95 % BCa interval over photographs excludes zero, every seed has its sign, and a paired t test has
  p < 0.05 (report.tables). The columns that count are the reward, and the worst of the seeds.
- Controls: less and more noise at the start, two unsharp masks, and the mean of all seeds, which a deterministic
  network would give. A gain that a control reaches is not credited to the preferences.
Added when the first arm had been judged and its change looked at: the untuned outputs with the grid of pixels that
tuning adds to all outputs alike, and the share of the change in isolated peaks of its spectrum. When four arms of the
first generator had been judged: rewards.gridfree, as a metric outside the reward and as the no-reference half of an arm
of its own, the arm of equal grids, and how much of an arm's grid the winners and losers of its pairs have. When that
arm had a grid as well: the tossed pairs, a control, since tuning may leave a grid whatever is preferred.
"""
import shlex
from pathlib import Path

import runs

DATA = Path(runs.literal("experiments/jobs", "DATA"))
STAGES = ("data", "generate", "pool", "tune", "report")
# {arm: (flags of dpo.pool curate, of dpo.tune)}, in order of value
ARMS = {"HPO": ("--top 8", "--hpo both"), "1 of 4": ("--top 8", "--hpo none"), "best-worst": ("--top 1", "--hpo none"),
        "HPO, equal grids": ("--top 8", "--hpo both --equal-grids"), "HPO, grid-free": ("--top 8", "--hpo both"),
        "HPO, paper sigma": ("--top 8", "--hpo both"),
        "tossed": ("--top 8", "--hpo none --keep last"),
        "2 rounds": ("--top 8", "--hpo both"),
        "nr": ("--top 8 --reward nr", "--hpo both"), "fr": ("--top 8 --reward fr", "--hpo both"),
        "1 of 8": ("--top 4", "--hpo none")}
# its outputs are those of the other arms, its no-reference half is GRID_FREE
GRID_FREE_ARM, GRID_FREE = "HPO, grid-free", "rewards.gridfree:build"
# those with all --seeds; the others have the first
REPEATED = ("HPO", "1 of 4")
ROUNDS = 2
# PAPER: median sigma_g of its generator. Weights differ from 1 by differences of rewards, so their size follows it
SIGMA = 0.056
# shares of the initial noise: of the criterion, and controls
NOISE = (0.6, 0.8, 1.2)
# LR with 20 grey levels of noise, as realesrgan makes it, asks for denoising only
DEGRADATION = "--degradation two-round"
# the reward knows little of outputs below 192 pixels (docs/results-opinions.md)
CROPS = f"--patch 48 --load-size 208 {DEGRADATION}"
GENERATOR = f"--patch 32 --load-size 160 {DEGRADATION} --val-photos 8 --warmup 200 --precision bf16"
TUNE = "--batch-size 256 --lr 2e-5 --beta 5000 --val-every 20 --log-every 10 --save-every 10"
# CHOICE. cpu: sized for calls of less than 20 minutes of a core: a generator step 0.6 s, a step of DPO 12 to 15 s, an
# output 0.2 s and its scores 0.7 s. gpu: unmeasured
SCALES = {
    "cpu": dict(base=DATA / "weights" / "sr" / "realesr-general-x4v3_fp16.pth", test_samples=12, groups=96,
                generator="--size tiny --batch-size 16 --group-size 4 --lr 1e-3 --total-steps 5000 --val-every 1000 "
                          "--save-every 100 --log-every 100 --workers 1", piece=1000,
                tune="--patch 24 --accumulate 16 --total-steps 100 --val-groups 12 --workers 0", tune_piece=60),
    "gpu": dict(base="realesrgan-x4plus", test_samples=32, groups=200,
                generator="--size base --batch-size 64 --group-size 8 --lr 4e-4 --total-steps 6000 --val-every 3000 "
                          "--save-every 500 --log-every 200 --workers 12", piece=6000,
                tune="--patch 32 --accumulate 4 --total-steps 150 --val-groups 16 --precision tf32 --workers 12",
                tune_piece=150)}


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default all")
    images = DATA / "images"
    p.add_argument("--scale", choices=list(SCALES), default="cpu", help="base, sizes, steps, batches")
    p.add_argument("--photos", type=Path, nargs="+", metavar="DIR",
                   default=[images / name for name in ("hr_kodak24", "hr_urban100", "pairs_realsr", "hr_bsd100")],
                   help="photographs for generators and pools, without those called <name>_LR; every other one of the "
                        "last folder is kept for the test")
    p.add_argument("--test", type=Path, nargs="+", default=[images / name for name in ("test_set5", "test_set14")],
                   metavar="DIR", help="further photographs of the test")
    p.add_argument("--base", type=runs.CHECKPOINT, metavar="FILE", help="frozen x4 network; default: the scale's")
    p.add_argument("--fr", nargs="+", default=["ssim", "vgg"], metavar="NAME", help="full-reference half of the reward")
    p.add_argument("--nr", nargs="+", default=["rewards/ranker3.pth"], metavar="NAME",
                   help=f"no-reference half; that of the arm {GRID_FREE_ARM} is {GRID_FREE}")
    p.add_argument("--watch", nargs="*", metavar="NAME", help="metrics outside the reward",
                   default=["psnr", GRID_FREE, "rewards/ranker2.pth", "rewards.cnniqa:build", "ranker", "gmsd",
                            "brisque", "piqe"])
    p.add_argument("--metric-weights", nargs="*", metavar="NAME=FILE",
                   default=[f"brisque={DATA / 'weights' / 'iqa' / 'brisque_svm_weights.pth'}"])
    p.add_argument("--vgg-weights", type=Path, default=Path("runs/vgg19.pth"), metavar="FILE",
                   help="VGG19 (python -m prepare.vgg19 makes it)")
    p.add_argument("--samples", type=runs.SIZE, default=32, help="M, candidates of a crop (PAPER)")
    p.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="NAME", help=", ".join(ARMS))
    p.add_argument("--seeds", type=runs.COUNT, nargs="+", default=[0, 1, 2],
                   help=f"of the generators and of {' and '.join(REPEATED)}; the first for the other arms")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], help="default: what the scale is for")
    p.add_argument("--jobs", type=runs.SIZE, default=2, help="processes at a time, each with one thread")
    p.add_argument("--work", type=Path, default=Path("runs/preferences"), metavar="DIR")
    p.add_argument("--results", type=Path, default=Path("runs/results/preferences"), metavar="DIR",
                   help="one JSON file per generator and arm, and the report")
    args = p.parse_args(argv)
    args.stages = args.stages or list(STAGES)
    args.device = args.device or {"cpu": "cpu", "gpu": "cuda"}[args.scale]
    args.base = args.base or runs.CHECKPOINT(str(SCALES[args.scale]["base"]))
    if set(args.stages) - set(STAGES):
        p.error(f"stages are {', '.join(STAGES)}; got {' '.join(args.stages)}")
    return args


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import json
import os
import shutil
import signal
import sys
from functools import partial

import numpy as np
from scipy import stats

import metrics
from dpo import candidates, compare, pool
from experiments import jobs, preference_report
from images import list_images, load_image
from report import tables
from rewards.gridfree import shared_grid


def settings(args):
    """What all results of one report must share."""
    scale = {name: str(value) for name, value in SCALES[args.scale].items() if name not in ("piece", "tune_piece")}
    return {"scale": args.scale, **scale, "base": args.base.stem, "generator": f"{GENERATOR} {scale['generator']}",
            "tune": f"{TUNE} {scale['tune']}", "crops": CROPS, "samples": args.samples, "fr": args.fr, "nr": args.nr,
            "watch": args.watch}


def metric_files(args):
    return ["--metric-weights", *args.metric_weights, *([f"vgg={args.vgg_weights}"] if "vgg" in args.fr else [])]


def folder(args, stage, seed, arm=""):
    return args.work / stage / (preference_report.stem(arm, seed) if arm else str(seed))


def result(args, seed, arm="generator"):
    return args.results / f"{folder(args, '', seed, arm).name}.json"


# Stages

def prepare(args):
    """WORK/hr and WORK/test."""
    def images(where):
        return [path for stem, path in list_images(where).items() if not stem.endswith("_LR")]
    last = images(args.photos[-1])
    tests = [path for where in args.test for path in images(where)] + last[1::2]
    # Set14's face is the head of Set5
    tests = [path for path in tests if (path.parent.name, path.stem) != ("test_set14", "face")]
    others = [path for where in args.photos[:-1] for path in images(where)]
    for files, name in ((tests, "test"), (others + last[::2], "hr")):
        jobs.whole(args.work / name, partial(jobs.copy_photos, files))


def generate(args, seed):
    scale, run = SCALES[args.scale], folder(args, "gen", seed)
    words = shlex.split(f"{GENERATOR} {scale['generator']}")
    jobs.in_pieces(run, jobs.last_value(words, "--total-steps"), scale["piece"], run.with_suffix(".log"),
                   "dpo.pretrain", "--hr", args.work / "hr", "--base", args.base, *words, "--seed", seed,
                   "--device", args.device)


def make_pool(args, seed):
    out, scale = folder(args, "pool", seed), SCALES[args.scale]
    log = out.with_suffix(".log")
    jobs.call(log, "dpo.pool", "sample", "--gen", folder(args, "gen", seed), "--hr", args.work / "hr",
              "--groups", scale["groups"], "--samples", args.samples, *shlex.split(CROPS), "--seed", seed,
              "--device", args.device, "--out", out)
    score(args, out, args.nr)
    if GRID_FREE_ARM in args.arms and seed in seeds_of(args, GRID_FREE_ARM):
        reuse(out, grid_free_pool(args, seed))
        score(args, grid_free_pool(args, seed), [GRID_FREE])


def grid_free_pool(args, seed):
    return folder(args, "pool", seed, "grid-free")


def score(args, out, no_reference):
    jobs.call(out.with_suffix(".log"), "dpo.pool", "score", "--pool", out, "--fr", *args.fr, "--nr", *no_reference,
              *metric_files(args), "--device", args.device)


def curate(args, seed, arm, *more):
    """-> curation.json of an arm's pairs, in WORK/pairs/<arm>-<seed>."""
    out = folder(args, "pairs", seed, arm)
    outputs = grid_free_pool(args, seed) if arm == GRID_FREE_ARM else folder(args, "pool", seed)

    def make(part):
        pool.main(pool.parse_args(["curate", "--pool", outputs, *shlex.split(ARMS[arm][0]), "--out", part, *more]))
        if arm == "tossed":
            toss(part / "pairs.jsonl", seed)
    jobs.whole(out, make)
    return json.loads((out / "curation.json").read_text())


def toss(file, seed):
    """Let winners and losers change places in each pair with a chance of one half."""
    rng, rows = np.random.default_rng(seed), candidates.read_lines(file, "remove the pairs")
    for row in rows:
        if rng.random() < 0.5:
            row["w_seed"], row["l_seed"], row["R_w"], row["R_l"] = (
                row["l_seed"], row["w_seed"], row["R_l"], row["R_w"])
    candidates.write_lines(file, rows)


def make_pairs(args, seed):
    """Pairs of all arms; the first seed's pool decides whether every image has its own scale."""
    scope = curate(args, args.seeds[0], "HPO")["scope"]
    sigma = curate(args, seed, "HPO", "--norm", scope)["sigma"][1]
    for arm in args.arms:
        gain = SIGMA / sigma if arm == "HPO, paper sigma" else 1.0
        if seed in seeds_of(args, arm):
            curate(args, seed, arm, "--norm", scope, "--gain", gain)


def judge(args, seed, out, generators, *more):
    """dpo.compare of {row: run} on the test photographs -> eval.json."""
    norm = folder(args, "pairs", seed, "HPO") / "norm.json"
    jobs.call(out.with_suffix(".log"), "dpo.compare", "--gen", *generators.values(), "--names", *generators,
              "--hr", args.work / "test", "--groups", len(list_images(args.work / "test")), *shlex.split(CROPS),
              "--samples", SCALES[args.scale]["test_samples"], "--norm-file", norm, "--watch", *args.watch,
              *metric_files(args), "--diversity", "none", "--device", args.device, "--out", out, *more)
    return json.loads((out / "eval.json").read_text())


def made_by(path):
    """Commit, versions and hardware in a JSON file of a stage."""
    about = json.loads(path.read_text())
    return {key: about[key] for key in jobs.MADE_BY}


def events(run, split):
    return [event for event in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            if event["split"] == split]


def judge_untuned(args, seed):
    """RESULTS/generator-<seed>.json: how it trained, how far its seeds differ, itself and the controls on the test."""
    file, run, pairs = result(args, seed), folder(args, "gen", seed), folder(args, "pairs", seed, "HPO")
    if file.exists():
        return
    judged = judge(args, seed, folder(args, "eval", seed, "base"), {"base": run}, "--less-noise", *NOISE)
    checks, norm = events(run, "val"), json.loads((pairs / "norm.json").read_text())
    curation = json.loads((pairs / "curation.json").read_text())
    by_tau = preference_report.rewards_by_tau(judged, norm, NOISE)
    kept = ("inside", "outside", "images", "photos", "samples", "k", "lower_is_better", "scope")
    runs.save_json(file, {
        "settings": settings(args), "seed": seed, "checks": checks, "reward_by_tau": by_tau,
        "criterion": preference_report.criterion(checks[-1], by_tau), "losses": events(run, "train"),
        "pool": {key: curation[key] for key in ("sigma", "sigma_pool", "halves", "groups", "candidates", "best", "mean",
                                                "worst")},
        **{key: judged[key] for key in kept}, "rows": rows_of(judged, judged["rows"]),
        "made_by": {"generator": made_by(run / "args.json"), "pool": made_by(folder(args, "pool", seed) / "pool.json"),
                    "evaluation": {key: judged[key] for key in jobs.MADE_BY}}})


def rows_of(judged, names):
    return {name: {key: judged["rows"][name][key] for key in ("per_photo", "curve", "rewards")} for name in names}


def tune(args, arm, seed):
    """RESULTS/<arm>-<seed>.json: a training, and its outputs for the test."""
    file, base = result(args, seed, arm), folder(args, "gen", seed)
    if file.exists():
        return
    scale, run, pairs = SCALES[args.scale], folder(args, "tuned", seed, arm), folder(args, "pairs", seed, arm)
    log, words = run.with_name(f"{run.name}.log"), shlex.split(f"{TUNE} {scale['tune']} {ARMS[arm][1]}")
    words += metric_files(args)
    if arm == "2 rounds":
        run, parts = in_rounds(args, seed, base, log, words)
    else:
        jobs.in_pieces(run, jobs.last_value(words, "--total-steps"), scale["tune_piece"], log, "dpo.tune",
                       "--gen", base, "--pairs", pairs, *words, "--seed", seed, "--device", args.device)
        parts = [(run, pairs)]
    out = folder(args, "eval", seed, arm)
    reuse(folder(args, "eval", seed, "base"), out)
    judged = judge(args, seed, out, {"base": base, arm: run}, "--less-noise")
    curations = [json.loads((pairs / "curation.json").read_text()) for _, pairs in parts]
    runs.save_json(file, {
        "settings": settings(args), "seed": seed, "arm": arm,
        "curation": [{key: about[key] for key in ("reward", "scope", "sigma", "gap", "gain", "pairs", "groups")}
                     for about in curations],
        "watched": [[(e["step"], e["reward"]) for e in events(part, "val")] for part, _ in parts],
        "training": [events(part, "train") for part, _ in parts],
        "rows": rows_of(judged, [arm, compare.with_grid("base", arm)]), "structured_noise": structured_noise(out, arm),
        "grid": grid_in_pairs(parts[0][1], out, arm),
        "made_by": {
            "training": made_by(run / "args.json"), "evaluation": {key: judged[key] for key in jobs.MADE_BY}}})


def structured_noise(out, arm):
    """{image: metrics.noise_peaks of the first seed's change}. out: of dpo.compare"""
    def change(name):
        before, after = (load_image(out / row / name / "0.png").float() for row in ("base", arm))
        return (after - before)[None] / 255
    return {path.name: metrics.noise_peaks(change(path.name)).item() for path in sorted((out / arm).iterdir())}


def grid_in_pairs(pairs, out, arm):
    """Where the grid of pixels of an arm comes from; pairs: its (first) pairs, out: of dpo.compare. In grey levels:

    strength      of the grid of 4x4 blocks that tuning added to all outputs, root mean square
    period 8      of what 8x8 blocks share beyond that
    spread        of the first grid in the candidates of an image, standard deviation over the seeds, mean over images
    preferred     of that grid winners minus losers, of candidates as they are: report.tables.difference from 0 over
                  photographs; all pairs alike, those of held-out photographs too
    correlation   {metric: the same of its rank correlation with the candidate's grid over the seeds of an image; above
                  0 where the metric takes the grid for better}
    """
    def outputs(row):
        return {path.name: sorted(path.iterdir()) for path in sorted((out / row).iterdir())}
    of_8 = 255 * compare.grid_of_change(outputs("base"), outputs(arm), 8).float()
    grid = of_8.unflatten(2, (-1, 4)).unflatten(1, (-1, 4)).mean((1, 3))
    strength, beyond = (pattern.square().mean().sqrt().item() for pattern in (grid, of_8 - grid.repeat(1, 2, 2)))
    made_from = pairs / json.loads((pairs / "curation.json").read_text())["pool"]
    names, raw, about = candidates.read_scores(made_from)
    # of a tuning that added no grid at all
    direction = grid / max(strength, 1e-9)
    levels = {name: (grids * direction.numpy()).mean((1, 2, 3)) for name, grids in candidate_grids(made_from).items()}
    preferred = {}
    for pair in candidates.read_lines(pairs / "pairs.jsonl", "remove the pairs"):
        level = levels[pair["name"]]
        preferred.setdefault(pair["name"], []).append(level[pair["w_seed"]] - level[pair["l_seed"]])
    _, items, _ = candidates.open_pool(made_from)
    photos = np.array([items[name]["photo"] for name in names])

    def against_zero(values):
        values = compare.over_photos(np.array(values), photos)
        return tables.difference(values[None], np.zeros((1, len(values))))
    correlation = {}
    for k, (name_of_metric, facts) in enumerate(about.items()):
        sign = -1 if facts["lower_is_better"] else 1
        # 0 where a metric, or the grid, is the same for all seeds
        ranks = [stats.spearmanr(sign * scores[:, k], levels[name]).statistic
                 if np.ptp(scores[:, k]) and np.ptp(levels[name]) else 0.0 for name, scores in zip(names, raw)]
        correlation[name_of_metric] = against_zero(ranks)
    return {"strength": strength, "period 8": beyond, "correlation": correlation,
            "spread": float(np.mean([level.std() for level in levels.values()])),
            "preferred": against_zero([np.mean(preferred[name]) for name in names])}


def candidate_grids(made_from):
    """{image: rewards.gridfree.shared_grid of every candidate, (M, 3, 4, 4), in grey levels}; kept in the pool."""
    file = made_from / "grids.npz"
    if not file.exists():
        _, _, files = candidates.open_pool(made_from)
        grids = {name: np.stack([shared_grid(load_image(path)[None].float())[0].numpy() for path in paths])
                 for name, paths in files.items()}

        def write(path):
            with path.open("wb") as stream:
                np.savez(stream, **grids)
        runs.write_atomic(file, write)
    return dict(np.load(file))


def in_rounds(args, seed, base, log, words):
    """dpo.rounds at the cost of one round -> the last run, and [(run, its pairs)]."""
    scale, out = SCALES[args.scale], folder(args, "rounds", seed)
    scope = json.loads((folder(args, "pairs", seed, "HPO") / "curation.json").read_text())["scope"]
    shorter = {name: jobs.last_value(words, name) // ROUNDS for name in ("--total-steps", "--val-groups")}
    flags = {"sample": ["--hr", args.work / "hr", "--groups", scale["groups"] // ROUNDS, "--samples", args.samples,
                        CROPS],
             "score": ["--fr", *args.fr, "--nr", *args.nr, *metric_files(args)],
             "curate": [ARMS["2 rounds"][0], "--norm", scope],
             "tune": [*words, *(word for item in shorter.items() for word in item)]}
    jobs.call(log, "dpo.rounds", "--rounds", ROUNDS, "--gen", base, "--seed", 100 * (seed + 1), "--device", args.device,
              "--out", out, *(f"--{stage}={' '.join(map(str, part))}" for stage, part in flags.items()))
    parts = [(out / f"tuned-{r}", out / f"pool-{r}") for r in range(1, ROUNDS + 1)]
    return parts[-1][0], parts


def reuse(made, out):
    """OUT of dpo.compare, or a pool, with what is already in another one: pictures as links, the rest copied."""
    def copy(a, b):
        (os.link if a.endswith(".png") and Path(a).parent != made else shutil.copy2)(a, b)
    jobs.whole(out, lambda part: shutil.copytree(made, part, copy_function=copy))


def seeds_of(args, arm):
    return args.seeds if arm in REPEATED else args.seeds[:1]


def main(args):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if args.stages != ["report"]:
        needed = [*args.photos, *args.test, args.base, *(Path(name) for name in args.nr if runs.is_reward_file(name))]
        for path in needed + ([args.vgg_weights] if "vgg" in args.fr else []):
            if not path.exists():
                command = f"; {runs.how_to_get(path)}" if path in (args.base, args.vgg_weights) else ""
                raise runs.UserError(f"{path}: not there; docs/data.md and experiments/README.md say where it comes "
                                     f"from, --help which flag names another{command}")
    if "data" in args.stages:
        prepare(args)
    if "generate" in args.stages:
        jobs.parallel(args.jobs, [partial(generate, args, seed) for seed in args.seeds])
    if "pool" in args.stages:
        jobs.parallel(args.jobs, [partial(make_pool, args, seed) for seed in args.seeds])
        for seed in args.seeds:
            make_pairs(args, seed)
        jobs.parallel(args.jobs, [partial(judge_untuned, args, seed) for seed in args.seeds])
    if "tune" in args.stages:
        jobs.parallel(args.jobs, [partial(tune, args, arm, seed) for arm in args.arms for seed in seeds_of(args, arm)])
    if "report" in args.stages:
        preference_report.report(args.results, args.work)


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
