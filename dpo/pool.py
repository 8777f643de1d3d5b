"""Make preference pairs in three stages: outputs of a generator from many seeds, their scores, and the pairs (DP2O-SR).

    torchrun --nproc_per_node 4 -m dpo.pool sample --hr DF2K/HR --out POOL    --samples outputs for every crop
    torchrun --nproc_per_node 4 -m dpo.pool score --pool POOL                 every output by every metric
    python -m dpo.pool curate --pool POOL                                     reward; best N against worst N of an image
    python -m dpo.pool curate --demo                                          all three in small

Every stage can be stopped and called again: it keeps its finished part. candidates.py lists the files of a pool; curate
leaves in it, or in --out,
    norm.json        the scale of the reward, fitted to these outputs; later stages use it and never fit it again. Where
                     pairs are chosen on each image's own scale, it is that of an average image
    pairs.jsonl      {"name", "w_seed", "l_seed", "R_w", "R_l", "w_intra", "w_inter"}: winner, loser, their weights
    curation.json    how far the seeds differ, and the numbers of images and pairs
"""
from pathlib import Path

import runs
from dpo import options

REWARDS = runs.literal("dpo/preference", "REWARDS")
# PAPER; qalign is a model of 7 billion weights
FR, NR = ["lpips", "topiq_fr", "afine_fr"], ["maniqa", "musiq", "clipiqa+", "topiq_nr", "afine_nr", "qalign"]
# CHOICE: sized so that the whole demo ends within four minutes on two cores
DEMO = {
    "sample": dict(gen=options.DEMO_GENERATOR, hr=options.DEMO_SET, out=options.DEMO_POOL, **options.DEMO_CROPS,
                   groups=24, samples=8, batch_size=8, threads=1),
    "score": dict(pool=options.DEMO_POOL, fr=["ssim", "gmsd"], nr=["ranker"], threads=1),
    "curate": dict(pool=options.DEMO_POOL, top=2),
}
# CHOICE: a median sigma_g (by the range of the pool) below this: the order of the seeds is mostly noise of the metrics
FEW = 0.01
# CHOICE, the paper does not say: --norm auto scales each image by its own range if the correlation of each half of the
# reward with the whole then lies in here. By the range of the pool, metrics that differ more between images than
# between seeds have no say: sigma_g of the full-reference half was a ninth of the other's (docs/results-dpo.md)
A_SAY = (0.4, 0.9)


def parse_args(argv=None):
    p = options.parser("dpo.pool", __doc__, demo=False)
    commands = p.add_subparsers(dest="stage", metavar="STAGE", required=True)
    stages = {name: options.parser(f"dpo.pool {name}", text, commands) for name, text in (
        ("sample", "Many outputs for every low-resolution image."), ("score", "Judge every output."),
        ("curate", "From scores to preference pairs."))}

    c = stages["sample"]
    options.add_generator(c, default=Path("runs/flow-base"),
                          help="run folder of dpo.pretrain or dpo.tune, or its gen.pth; with --model a ControlNet")
    options.add_images(c, 1000, "crops of --hr (PAPER: some 30,000)")
    g = c.add_argument_group("candidates")
    g.add_argument("--samples", type=runs.SIZE, default=32,
                   help="M, outputs per image (PAPER: 32 for SD2, 64 for FLUX); their seeds are 0 to M - 1")
    g.add_argument("--batch-size", type=runs.SIZE, default=16, help="outputs at a time; they do not depend on it")
    g.add_argument("--seed", type=runs.COUNT, default=0, help="of the crops and their degradation")
    g.add_argument("--out", type=Path, default=Path("runs/dpo-pool"), metavar="DIR",
                   help="the pool; an unfinished one is continued")
    options.add_machine(c)

    c = stages["score"]
    g = c.add_argument_group("reward")
    g.add_argument("--pool", type=Path, default=Path("runs/dpo-pool"), metavar="DIR", help="made by sample")
    g.add_argument("--fr", nargs="*", default=FR, metavar="NAME",
                   help="full-reference metrics: pyiqa's names, psnr, ssim (both on Y), vgg (PAPER: three)")
    g.add_argument("--nr", nargs="*", default=NR, metavar="NAME",
                   help="no-reference metrics: pyiqa's names, ranker, module:function (PAPER: six)")
    options.add_metric_files(g)
    options.add_machine(c)

    c = stages["curate"]
    g = c.add_argument_group("reward")
    g.add_argument("--pool", type=Path, default=Path("runs/dpo-pool"), metavar="DIR", help="scored by score")
    g.add_argument("--reward", choices=REWARDS, default="hybrid",
                   help="half full-, half no-reference (PAPER), or one of them")
    g.add_argument("--norm", choices=["auto", "pool", "group"], default="auto",
                   help="a metric's range is that of all candidates, or that of each image; auto: of each image, if "
                        "both halves of the reward then have a say (CHOICE)")
    g.add_argument("--norm-file", type=Path, metavar="FILE", help="use this norm.json instead of fitting one")
    g = c.add_argument_group("pairs")
    g.add_argument("--top", type=runs.SIZE, default=8,
                   help="N: best and worst candidates of an image, all N x N pairs (PAPER: M / 4 for SD2, M / 16 for "
                        "FLUX)")
    g.add_argument("--samples", type=runs.COUNT, default=0, help="use only this many seeds, the first ones; 0: all")
    g.add_argument("--min-sigma", type=runs.WEIGHT, default=0.0,
                   help="drop images whose rewards have a smaller standard deviation (CHOICE: 0)")
    g.add_argument("--gain", type=runs.RATE, default=1.0,
                   help="multiply what the weights of HPO differ from 1 by (PAPER: 1)")
    g.add_argument("--out", type=Path, metavar="DIR", help="folder of the pairs; default: the pool")

    args = options.parse(p, argv, {stages[name]: settings for name, settings in DEMO.items()})
    c = stages[args.stage]
    if args.stage == "sample":
        options.check_images(c, args)
        options.check_generator(c, args)
    if args.stage == "curate" and args.norm == "group" and args.norm_file:
        c.error("--norm group takes the range of each image: leave out --norm-file")
    return args


# --help and flag errors need no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

from functools import partial

import numpy as np

from dpo import candidates, flow, preference


def sample(gen, source, samples, out, batch_size, world):
    """Stage 2: `samples` outputs of the generator for every image. source: see candidates.open_images."""
    items = candidates.open_images(out, world, source, "pool", samples=samples, generator=gen.identity(gen.net))
    candidates.fill(gen, items, out / "cand", samples, world, batch_size)
    if world.is_main:
        print(f"{out}: {len(items)} images, {samples} candidates each")


def score(pool, fr, nr, metric_files, world):
    """Stage 3: every metric of every candidate."""
    _, items, files = candidates.open_pool(pool)
    candidates.check_references(fr, items, "--fr without names and later curate --reward nr, or sample again with "
                                           "--gt-dir")
    judges = candidates.create_metrics(fr, nr, metric_files, world.device)
    raw = candidates.judge(judges, items, files, pool / "scores", world)
    if world.is_main:
        candidates.write_lines(pool / "scores.jsonl", [
            {"name": name, "seed": seed, **dict(zip(judges, values.tolist()))}
            for name, group in zip(items, raw) for seed, values in enumerate(group)])
        about = {"metrics": candidates.describe_metrics(judges), **runs.describe_machine()}
        runs.save_json(pool / "scores.json", about)
        print(f"{pool / 'scores.jsonl'}: {raw.shape[0]} x {raw.shape[1]} candidates, {', '.join(judges)}")
        unscored = ~np.isfinite(raw).all((1, 2))
        if unscored.any():
            print(f"{unscored.sum()} images have scores that are not finite, first {list(items)[unscored.argmax()]}: "
                  "curate leaves them out")


def choose_scope(raw, judges, norm, about, reward):
    """-> "pool" or "group", and {scope: preference.halves}, both by every other image of (G, M, K) scores.

    {} and "pool" where the reward's metrics are all of one kind.
    """
    full_reference = [about[m]["full_reference"] for m in judges]
    if reward != "hybrid" or all(full_reference) or not any(full_reference):
        return "pool", {}
    raw = raw[1::2] if len(raw) > 1 else raw
    normalised = {"pool": preference.normalise(raw, judges, norm["metrics"]),
                  "group": preference.normalise_groups(raw, judges, {m: about[m]["lower_is_better"] for m in judges})}
    halves = {scope: preference.halves(values, full_reference) for scope, values in normalised.items()}
    low, high = A_SAY
    return "group" if all(low <= r <= high for r in halves["group"].values()) else "pool", halves


def curate(pool, out, reward="hybrid", scope="auto", norm_file=None, top=8, samples=0, min_sigma=0.0, gain=1.0):
    """Stage 4: the reward of every candidate, and the pairs. Arguments: the flags of curate."""
    names, raw, about = candidates.read_scores(pool)
    judges = list(about)
    if samples > raw.shape[1]:
        raise runs.UserError(f"--samples {samples}: {pool} has {raw.shape[1]} candidates per image")
    raw = raw[:, :samples] if samples else raw
    lower = {m: v["lower_is_better"] for m, v in about.items()}
    if norm_file:
        norm = candidates.open_norm(norm_file)
        candidates.check_norm(norm_file, norm, about)
    else:
        scale = preference.fit_norm(raw, judges, lower)
        norm = {"metrics": {m: about[m] | ends for m, ends in scale.items()}, "groups": len(names),
                "candidates": raw.shape[1], **runs.describe_machine()}
    chosen, halves = choose_scope(raw, judges, norm, about, reward)
    scope = "pool" if norm_file else chosen if scope == "auto" else scope
    rewards = candidates.rewards_of(raw, norm, reward, judges)
    sigma_pool = rewards.std(1)
    if scope == "group":
        full_reference = [about[m]["full_reference"] for m in judges]
        rewards = preference.reward(preference.normalise_groups(raw, judges, lower), full_reference, reward)
        # of networks that are compared; the pool's ends are kept beside it
        typical = preference.typical_range(raw, judges, lower)
        norm["metrics"] = {m: v | {"pool": [v["low"], v["high"]]} | typical[m] for m, v in norm["metrics"].items()}
    if not norm_file:
        norm["scope"] = scope
    flat = np.ptp(rewards, 1) < 1e-9
    if flat.any() and not min_sigma:
        raise runs.UserError(f"{pool}: the candidates of {flat.sum()} image(s) are all equally good, first "
                             f"{names[int(flat.argmax())]}: nothing to prefer; --min-sigma 0.001 drops such images")
    sigma = rewards.std(1)
    keep = (sigma >= min_sigma) & ~flat
    if not keep.any():
        raise runs.UserError(f"--min-sigma {min_sigma}: no image is left; the largest sigma_g is {sigma.max():.4g}")
    names, rewards = [name for name, kept in zip(names, keep) if kept], rewards[keep]
    best, worst = preference.choose(rewards, top)
    intra, inter = preference.pair_weights(rewards, best, worst, gain)

    runs.check_writable(out, "--out")
    # a call that is killed leaves no pairs that dpo.tune takes
    (out / "curation.json").unlink(missing_ok=True)
    runs.save_json(out / "norm.json", norm)
    candidates.write_lines(out / "pairs.jsonl", [
        {"name": name, "w_seed": int(winner), "l_seed": int(loser), "R_w": rewards[g, winner],
         "R_l": rewards[g, loser], "w_intra": intra[g, i, j], "w_inter": inter[g]}
        for g, name in enumerate(names) for i, winner in enumerate(best[g]) for j, loser in enumerate(worst[g])])
    quartiles, pool_quartiles = (np.percentile(each, [25, 50, 75]) for each in (sigma, sigma_pool))
    gap = np.take_along_axis(rewards, best, 1) - np.take_along_axis(rewards, worst, 1)
    summary = {
        "pool": "." if out.resolve() == pool.resolve() else str(pool.resolve()),
        "pool_hash": candidates.pool_hash(pool), "reward": reward, "scope": scope, "halves": halves,
        "top": top, "gain": gain, "candidates": raw.shape[1], "groups": len(names),
        "dropped": int((~keep).sum()), "pairs": intra.size,
        "sigma": quartiles.tolist(), "sigma_pool": pool_quartiles.tolist(),
        "gap": float(gap.mean()), "best": float(rewards.max(1).mean()),
        "mean": float(rewards.mean()), "worst": float(rewards.min(1).mean()), **runs.describe_machine()}
    runs.save_json(out / "curation.json", summary)
    for name, values in halves.items():
        print(f"by the range of each {'image' if name == 'group' else 'metric in the pool'}: correlation with the "
              f"reward within images {values['fr']:.2f} of its full-, {values['nr']:.2f} of its no-reference half"
              + (" (taken)" if name == scope else ""))
    print(f"sigma_g, the spread of the reward over {raw.shape[1]} seeds: median {quartiles[1]:.4f}, quartiles "
          f"{quartiles[0]:.4f} and {quartiles[2]:.4f}, over {len(sigma)} images"
          + (f"; by the range of the pool, as the paper's 0.056, {pool_quartiles[1]:.4f}" if scope == "group" else ""))
    if pool_quartiles[1] < FEW:
        print(f"WARNING: a median below {FEW}: the order of the seeds is mostly noise of the metrics; take a harsher "
              "--degradation, a generator over a network (dpo.pretrain --base) or more --steps")
    print(f"{out / 'pairs.jsonl'}: {intra.size} pairs of {len(names)} images ({summary['dropped']} dropped), {top} "
          f"best against {top} worst of {raw.shape[1]} by {reward}")
    print(f"mean reward of winners minus losers {summary['gap']:.3f}; best, mean, worst of all seeds "
          f"{summary['best']:.3f}, {summary['mean']:.3f}, {summary['worst']:.3f}")


def main(args):
    if args.stage == "curate":
        if args.demo and args.pool == options.DEMO_POOL:
            options.make_demo_start(runs.World(0, 1, None), options.DEMO_POOL / "scores.json")
        curate(args.pool, args.out or args.pool, args.reward, args.norm, args.norm_file, args.top, args.samples,
               args.min_sigma, args.gain)
        return
    world = runs.start_world(args.device, args.threads)
    if args.stage == "score":
        if args.demo and args.pool == options.DEMO_POOL:
            options.make_demo_start(world, options.DEMO_POOL / "pool.json")
        score(args.pool, args.fr, args.nr, dict(args.metric_weights), world)
        return
    if args.demo and args.gen == options.DEMO_GENERATOR:
        options.make_demo_start(world, options.DEMO_GENERATOR / "weights" / "gen.pth")
    gen = flow.load_generator(args.gen, args.model, world.device, args.steps, args.tau, prompts=args.prompts,
                              guidance=args.guidance)
    sample(gen, options.image_source(args, args.seed), args.samples, args.out, args.batch_size, world)


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
