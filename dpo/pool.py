"""Pools of candidates: many outputs of one generator for every low-resolution image, their scores, and the preference pairs chosen from them (stages 2 to 4 of dpo.py).

    POOL/pool.json                    what it was made with; another generator, other images or other crops are refused
    POOL/lq/<name>.png, gt/<name>.png     the images; no gt where there is no ground truth
    POOL/cand/<name>/<seed>.png       8-bit outputs: what is scored is what is trained on
    POOL/scores.jsonl, scores.json    {"name", "seed", metric: value in native units, ...}, and what each metric is
    OUT/norm.json, pairs.jsonl, curation.json     the reward's scale, the pairs with their weights, and how far the seeds differ
A name is <photo>-<crop>-0 where crops were drawn from photographs, so that data.photo_of tells which belong together.
"""
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import degradations
from dpo import preference
import metrics as quality
import runs
import metrics as scoring
from images import image_size, list_images, load_image, match_images, save_image

PROTOCOL = {"border": 0, "y": True}                                              # whole images, PSNR and SSIM on Y (CHOICE)
FEW = 0.01                                                                        # CHOICE: median sigma_g below which labels are little but noise


def read_json(path, remedy, parse=json.loads):
    """A JSON file that a stage left; ValueError for a damaged one, FileNotFoundError ending in `remedy` where there is none. parse: text -> value."""
    try:
        return parse(path.read_text())
    except FileNotFoundError:
        raise runs.UserError(f"{path}: not there; {remedy}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise runs.UserError(f"{path}: damaged ({str(error)[:80]}); {remedy}") from None


def read_lines(path, remedy):
    """[{...}] of a JSON-lines file; errors as read_json."""
    return read_json(path, remedy, lambda text: [json.loads(line) for line in text.splitlines()])


def write_lines(path, rows):
    runs.write_atomic(path, lambda t: t.write_text("".join(json.dumps(row) + "\n" for row in rows)))


# Images

def make_images(args, folder, record, purpose, device):
    """folder/lq, gt and pool.json: copies of --lq-dir and --gt-dir, or --groups crops of the photographs --hr and what the synthetic degradation makes of them.

    purpose: "pool" or "test", whose crops and degradations are drawn apart.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)                                  # of a call that was killed
    save = lambda kind, name, image: save_image(temporary / kind / f"{name}.png", image)
    if args.hr:
        seeds = lambda step, lane, what: runs.sample_seed(args.seed, step, lane, f"{purpose} {what}")
        dataset = data.TrainingSet(data.find_photos(args.hr, "--hr"), "orig", seeds, args.groups, 1, 4 * args.patch, args.load_size)
        data.check_headers(dataset, runs.World(0, 1, device))
        draw = data.synthetic_pairs(dataset, seeds, device, args.degradation, args.patch, 1)
        for k in range(args.groups):
            name = f"{dataset.sets.photo(dataset.stems[dataset.index(1, k)])}-{k}-0"
            for kind, image in zip(("lq", "gt"), draw(1, [k])):
                save(kind, name, image[0])
    else:
        for name, item in find_items(args.lq_dir, args.gt_dir).items():
            for kind, path in (("lq", item["lq"]), *(("gt", path) for path in item["refs"])):
                save(kind, name, load_image(path))
    runs.save_json(temporary / "pool.json", record | runs.describe_machine())
    if folder.is_dir():                                                           # empty
        folder.rmdir()
    temporary.rename(folder)


def own_images(args, folder, world, purpose, **facts):
    """Items of `folder`, which this makes unless it is there already; ValueError if it was made with other settings, or is something else. facts: further settings; purpose: see make_images."""
    names = ("hr", "groups", "patch", "load_size", "degradation", "seed") if args.hr else ("lq_dir", "gt_dir")
    record = {name: str(v) if isinstance(v := getattr(args, name), Path) else v for name in names} | facts
    if args.lq_dir:
        record["images"] = scoring.digest([[name, *map(scoring.digest, (item["lq"], *item["refs"]))] for name, item in find_items(args.lq_dir, args.gt_dir).items()])
    before = read_json(folder / "pool.json", "") if (folder / "pool.json").exists() else {}
    world.barrier()                                                               # all have looked before anything is made
    other = runs.changes(before, record).values() if before else ()
    if other:
        raise runs.UserError(f"--out {folder}: was made with other settings ({'; '.join(other)}): choose another folder, or remove it")
    if not before and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise runs.UserError(f"--out {folder}: exists and was not made by dpo.py: choose another folder")
    if world.is_main and not before:
        runs.check_writable(folder, "--out")
        make_images(args, folder, record, purpose, world.device)
    world.barrier()
    return find_items(folder / "lq", folder / "gt" if (folder / "gt").is_dir() else None)


def find_items(lq_dir, gt_dir, flags=("--lq-dir", "--gt-dir")):
    """{name: {"lq", "refs", "versions"}}, as scoring.score wants them. ValueError for a ground truth that is not four times its image."""
    if not lq_dir.is_dir():
        raise runs.UserError(f"{flags[0]} {lq_dir}: no such folder")
    images = list_images(lq_dir)
    gts = match_images(gt_dir, images, flags[1]) if gt_dir else {}
    for name, gt in gts.items():
        (wide, high), size = image_size(images[name]), image_size(gt)
        if size != (4 * wide, 4 * high):
            raise runs.UserError(f"{gt}: {size[0]}x{size[1]} pixels, expected four times its LR image's {wide}x{high}")
    return {name: {"lq": path, "refs": [gts[name]] if gts else [], "versions": [gts.get(name, path)]} for name, path in images.items()}


def open_pool(pool):
    """-> (what pool.json says, items, {name: [candidate files by seed]}); an unfinished pool is an error."""
    remedy = "make it with: python -m dpo sample"
    about = read_json(pool / "pool.json", remedy)
    if "samples" not in about:
        raise runs.UserError(f"{pool}: images without candidates; {remedy}")
    items = find_items(pool / "lq", pool / "gt" if (pool / "gt").is_dir() else None, (str(pool), str(pool)))
    files = {name: [pool / "cand" / name / f"{seed}.png" for seed in range(about["samples"])] for name in items}
    missing = [name for name, found in files.items() if not found[-1].is_file()]
    if missing:
        raise runs.UserError(f"{pool}: {len(missing)} of {len(files)} images have no candidates, first {missing[0]}: call dpo.py sample with this --out again, it continues")
    return about, items, files


# Stage 2: sample

@torch.no_grad()
def fill(gen, net, items, folder, samples, world, batch_size, text="candidates"):
    """folder/<name>/<seed>.png for seeds 0 to samples - 1 of every item; what is there is left. Processes share the images."""
    todo = [name for name in list(items)[world.rank::world.size] if not (folder / name).is_dir()]
    for name in tqdm(todo, unit="img", desc=text, disable=not (world.is_main and todo)):
        lq = scoring.load(items[name]["lq"], world.device)
        temporary = folder / f"{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        for k in range(0, samples, batch_size):
            seeds = range(k, min(k + batch_size, samples))
            images = gen.sample(net, lq.expand(len(seeds), -1, -1, -1), [name] * len(seeds), seeds)
            if not torch.isfinite(images).all():
                raise runs.UserError(f"image {name}, seeds {k} to {seeds[-1]}: the generator's output is not finite: look at its weights")
            for seed, image in zip(seeds, degradations.to_8bit(images)):
                save_image(temporary / f"{seed}.png", image)
        temporary.rename(folder / name)                                           # a killed call leaves whole groups only
    world.barrier()


def sample(args, gen, world):
    """Stage 2: --samples outputs of the generator for every image."""
    items = own_images(args, args.out, world, "pool", samples=args.samples, generator=gen.identity(gen.net))
    fill(gen, gen.net, items, args.out / "cand", args.samples, world, args.batch_size)
    if world.is_main:
        print(f"{args.out}: {len(items)} images, {args.samples} candidates each")


# Stage 3: score

def create_metrics(fr, nr, weights, device):
    """{name: quality.Metric} of --fr and --nr; ValueError where one is of the other kind or named twice. weights: words of --metric-weights."""
    files, metrics = dict(word.split("=", 1) for word in weights), {}
    for flag, names in (("--fr", fr), ("--nr", nr)):
        for name in names:
            if name in metrics:
                raise runs.UserError(f"{flag} {name}: given twice")
            metrics[name] = quality.create_metric(name, device, files.get(name), **PROTOCOL, flag=flag)
            if metrics[name].full_reference != (flag == "--fr"):
                raise runs.UserError(f"{flag} {name}: is a {'full' if metrics[name].full_reference else 'no'}-reference metric: give it to {'--fr' if metrics[name].full_reference else '--nr'}")
    return metrics


def describe_metrics(metrics):
    """What scores.json and norm.json keep of them."""
    return {name: {"lower_is_better": m.lower_is_better, "full_reference": m.full_reference, "identity": m.identity} for name, m in metrics.items()}


def judge(metrics, items, files, cache, world, text):
    """{name: [candidate files]} -> (images, M, K) native scores; continues where it stopped (scoring.score)."""
    if any(m.full_reference for m in metrics.values()) and not all(item["refs"] for item in items.values()):
        raise runs.UserError(f"{', '.join(name for name, m in metrics.items() if m.full_reference)}: {text} has no ground truth to compare with; leave full-reference metrics out and take --reward nr")
    count = len(next(iter(files.values())))
    rows = {str(seed): scoring.Row(None, {name: found[seed] for name, found in files.items()}, None, None) for seed in range(count)}
    found = scoring.score(rows, items, metrics, cache, world, PROTOCOL)
    return np.array([[[found[row][name][m] for m in metrics] for row in rows] for name in items])


def score(args, world):
    """Stage 3: every metric of every candidate."""
    _, items, files = open_pool(args.pool)
    metrics = create_metrics(args.fr, args.nr, args.metric_weights, world.device)
    raw = judge(metrics, items, files, args.pool / "scores", world, f"--pool {args.pool}")
    if world.is_main:
        write_lines(args.pool / "scores.jsonl", [{"name": name, "seed": seed, **dict(zip(metrics, values.tolist()))} for name, group in zip(items, raw) for seed, values in enumerate(group)])
        runs.save_json(args.pool / "scores.json", {"metrics": describe_metrics(metrics), **runs.describe_machine()})
        print(f"{args.pool / 'scores.jsonl'}: {raw.shape[0]} x {raw.shape[1]} candidates, {', '.join(metrics)}")


def read_scores(pool):
    """-> names, (G, M, K) scores, {metric: what it is}."""
    remedy = f"make it with: python -m dpo score --pool {pool}"
    about, rows = read_json(pool / "scores.json", remedy), read_lines(pool / "scores.jsonl", remedy)
    try:
        about, names = dict(about["metrics"]), list(dict.fromkeys(row["name"] for row in rows))
        if [(row["name"], row["seed"]) for row in rows] != [(name, seed) for name in names for seed in range(len(rows) // len(names))]:
            raise runs.UserError("seeds of an image are missing, or not in order")
        if (pool / "pool.json").exists() and len(rows) != len(names) * read_json(pool / "pool.json", remedy).get("samples"):
            raise runs.UserError("not as many seeds as were sampled")
        raw = np.array([[row[m] for m in about] for row in rows], dtype=float).reshape(len(names), -1, len(about))
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        raise runs.UserError(f"{pool / 'scores.jsonl'}: not one whole row per candidate ({type(error).__name__}: {error}); {remedy}") from None
    bad = ~np.isfinite(raw).all((1, 2))
    if bad.any():
        raise runs.UserError(f"{pool / 'scores.jsonl'}: {bad.sum()} images have scores that are not finite, first {names[int(bad.argmax())]}: score again, without that metric or image")
    return names, raw, about


# Stage 4: curate

def pool_hash(pool):
    """Of what the pairs of a pool depend on: how it was made, its scores."""
    return scoring.digest([scoring.digest(path) if path.exists() else "" for path in (pool / "pool.json", pool / "scores.jsonl")])


def open_norm(path):
    """norm.json as curate writes it; ValueError for anything else."""
    norm = read_json(path, "python -m dpo curate makes it")
    entries = norm.get("metrics") if isinstance(norm, dict) else None
    if not isinstance(entries, dict) or not entries or not all(isinstance(v, dict) and {"low", "high", "lower_is_better", "full_reference", "identity"} <= set(v) for v in entries.values()):
        raise runs.UserError(f"{path}: not a scale of the reward, the norm.json of dpo.py curate")
    for m, v in entries.items():
        ends = [v["low"], v["high"]]
        if not all(isinstance(end, (int, float)) and math.isfinite(end) for end in ends) or not ends[0] < ends[1]:
            raise runs.UserError(f"{path}: {m} goes from {ends[0]} to {ends[1]}, which is no range; fit a scale with dpo.py curate")
    return norm


def check_norm(path, norm, metrics):
    """ValueError unless the scale `norm`, of the file `path`, is one of these metrics ({name: what it is}); names the first that differ."""
    theirs = norm["metrics"]
    other = [f"{m} is {'missing' if m not in theirs else 'unknown here' if m not in metrics else 'another model there (weights, or kind)'}"
             for m in {**metrics, **theirs} if m not in theirs or m not in metrics or any(theirs[m].get(k) != metrics[m][k] for k in metrics[m])]
    if other:
        raise runs.UserError(f"{path}: a scale of other metrics: {'; '.join(other[:3])}; name the same ones, or fit a scale of its own with dpo.py curate")


def rewards_of(raw, norm, which, names=None):
    """(..., K) native scores, metrics in the order of `names` (default norm's) -> (...) rewards on norm's scale."""
    names = list(norm["metrics"]) if names is None else names
    return preference.reward(preference.normalise(raw, names, norm["metrics"]), [norm["metrics"][m]["full_reference"] for m in names], which)


def curate(args):
    """Stage 4: the reward of every candidate, and the pairs."""
    names, raw, about = read_scores(args.pool)
    out, metrics = args.out or args.pool, list(about)
    if args.samples > raw.shape[1]:
        raise runs.UserError(f"--samples {args.samples}: {args.pool} has {raw.shape[1]} candidates per image")
    raw = raw[:, :args.samples] if args.samples else raw
    lower = {m: v["lower_is_better"] for m, v in about.items()}
    if args.norm_file:
        norm = open_norm(args.norm_file)
        check_norm(args.norm_file, norm, about)
    else:
        norm = {"metrics": {m: about[m] | ends for m, ends in preference.fit_norm(raw, metrics, lower, args.norm_percent).items()}, "percent": args.norm_percent,
                "groups": len(names), "candidates": raw.shape[1]}
    full = [about[m]["full_reference"] for m in metrics]
    rewards = preference.reward(preference.normalise_groups(raw, metrics, lower), full, args.reward) if args.norm == "group" else rewards_of(raw, norm, args.reward, metrics)
    flat = np.ptp(rewards, 1) < 1e-9
    if flat.any() and not args.min_sigma:
        raise runs.UserError(f"{args.pool}: the candidates of {flat.sum()} image(s) are all equally good, first {names[int(flat.argmax())]}: nothing to prefer; --min-sigma 0.001 drops such images")
    sigma = rewards.std(1)
    keep = (sigma >= args.min_sigma) & ~flat
    if not keep.any():
        raise runs.UserError(f"--min-sigma {args.min_sigma}: no image is left; the largest sigma_g is {sigma.max():.4g}")
    names, rewards = [name for name, kept in zip(names, keep) if kept], rewards[keep]
    best, worst = preference.choose(rewards, args.top)
    intra, inter = preference.pair_weights(rewards, best, worst)
    quartiles = np.percentile(sigma, [25, 50, 75])
    runs.check_writable(out, "--out")
    (out / "curation.json").unlink(missing_ok=True)                               # a call that is killed leaves no pairs that train takes
    runs.save_json(out / "norm.json", norm)
    write_lines(out / "pairs.jsonl", [{"name": name, "w_seed": int(w), "l_seed": int(l), "R_w": rewards[g, w], "R_l": rewards[g, l], "w_intra": intra[g, i, j], "w_inter": inter[g]}
                                      for g, name in enumerate(names) for i, w in enumerate(best[g]) for j, l in enumerate(worst[g])])
    summary = {"pool": "." if out.resolve() == args.pool.resolve() else str(args.pool.resolve()), "pool_hash": pool_hash(args.pool), "reward": args.reward, "scope": args.norm, "top": args.top, "candidates": raw.shape[1], "groups": len(names), "dropped": int((~keep).sum()),
               "pairs": intra.size, "sigma": quartiles.tolist(), "gap": float((np.take_along_axis(rewards, best, 1) - np.take_along_axis(rewards, worst, 1)).mean()),
               "best": float(rewards.max(1).mean()), "mean": float(rewards.mean()), "worst": float(rewards.min(1).mean()), **runs.describe_machine()}
    runs.save_json(out / "curation.json", summary)
    print(f"sigma_g, the spread of the reward over {raw.shape[1]} seeds: median {quartiles[1]:.4f}, quartiles {quartiles[0]:.4f} and {quartiles[2]:.4f}, over {len(sigma)} images"
          + (f"; WARNING, below {FEW} the order of the seeds is little but the metrics' noise: harsher degradation, --tau above 1 or more --steps" if quartiles[1] < FEW else ""))
    print(f"{out / 'pairs.jsonl'}: {intra.size} pairs of {len(names)} images ({summary['dropped']} dropped), {args.top} best against {args.top} worst of {raw.shape[1]} by {args.reward}: "
          f"mean reward of winners minus losers {summary['gap']:.3f}; best, mean, worst of all seeds {summary['best']:.3f}, {summary['mean']:.3f}, {summary['worst']:.3f}")
