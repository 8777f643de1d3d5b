"""Images, a generator's outputs for them, and the judging of these outputs; shared by dpo.pool, dpo.tune, dpo.compare.

    POOL/pool.json                       how it was made; another generator, other images or other crops are refused
    POOL/lq/<name>.png, gt/<name>.png    the images; no gt where there is no ground truth
    POOL/cand/<name>/<seed>.png          8-bit outputs: the images that are scored are those that are trained on
    POOL/scores.jsonl, scores.json       {"name", "seed", metric: value in native units, ...}; what each metric is
    POOL/norm.json                       the scale of the reward

Items are {name: {"lq": path, "refs": [path of the ground truth], "versions": [path], "photo": name of the photograph}}.
Crops of one photograph resemble each other, so it is held out, and counted in an interval, as a whole. Crops that were
drawn here are named <photo>-<crop>-0; of other names nothing is read: each image is its own photograph.
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
import metrics
import runs
from dpo import preference
from images import check_pairs, cut_to_x4, find_pairs, load_image, save_image

# whole images, PSNR and SSIM on Y (CHOICE)
PROTOCOL = {"border": 0, "y": True}


# Files

def read_json(path, remedy, parse=json.loads):
    """A JSON file of an earlier stage. UserError, ending in `remedy`, where it is missing or damaged."""
    try:
        return parse(path.read_text())
    except FileNotFoundError:
        raise runs.UserError(f"{path}: not there; {remedy}") from None
    except ValueError as error:
        raise runs.UserError(f"{path}: damaged ({str(error)[:80]}); {remedy}") from None


def read_lines(path, remedy):
    """[{...}] of a JSON-lines file; errors as read_json."""
    return read_json(path, remedy, lambda text: [json.loads(line) for line in text.splitlines()])


def write_lines(path, rows):
    runs.write_atomic(path, lambda t: t.write_text("".join(json.dumps(row) + "\n" for row in rows)))


# Images

def find_items(lq_dir, gt_dir, remarks=False):
    """The items of a folder of LR images. UserError for a ground truth that is not four times its image.

    remarks: print what is left out of the ground truth.
    """
    pairs = find_pairs(lq_dir, gt_dir, "--lq-dir", "--gt-dir", remarks)
    check_pairs(pairs, remarks)
    about = lq_dir.parent / "pool.json"
    drawn_here = about.is_file() and "hr" in read_json(about, "make the pool again")
    return {name: {"lq": lq, "refs": [gt] if gt else [], "versions": [gt or lq],
                   "photo": data.photo_of(name) if drawn_here else name} for name, (lq, gt) in pairs.items()}


def draw_crops(hr, groups, patch, load_size, degradation, seed, purpose, device):
    """Yield (name, lq (3, h, w), gt (3, 4h, 4w)) of `groups` crops of the photographs in `hr`, degraded."""
    def seeds(step, lane, stream):
        return runs.sample_seed(seed, step, lane, f"{purpose} {stream}")
    dataset = data.TrainingSet(data.find_photos(hr, "--hr"), "orig", seeds, groups, 1, 4 * patch, load_size)
    data.check_headers(dataset, runs.World(0, 1, device))
    draw = data.synthetic_pairs(dataset, seeds, device, degradation, patch, 1)
    for k in range(groups):
        lq, gt = draw(1, [k])
        yield f"{dataset.sets.photo(dataset.stems[dataset.index(1, k)])}-{k}-0", lq[0], gt[0]


def open_images(folder, world, source, purpose, **facts):
    """The items of `folder`, made first if it is missing. UserError if it was made otherwise, or is something else.

    source: the arguments of draw_crops from "hr" to "seed", or {"lq_dir", "gt_dir"}, which are copied.
    purpose: "pool" or "test", whose crops and degradations are drawn apart. facts: further settings for pool.json.
    """
    record = {name: str(value) if isinstance(value, Path) else value for name, value in source.items()} | facts
    if "lq_dir" in source:
        record["images"] = runs.digest([[name, *map(runs.digest, (item["lq"], *item["refs"]))]
                                        for name, item in find_items(**source, remarks=world.is_main).items()])
    made = folder / "pool.json"
    earlier = read_json(made, "remove the folder") if made.exists() else {}
    # all processes have looked before anything is made
    world.barrier()
    changes = runs.changes(earlier, record).values() if earlier else ()
    if changes:
        raise runs.UserError(f"--out {folder}: was made with other settings ({'; '.join(changes)}): "
                             "choose another folder, or remove it")
    if not earlier and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise runs.UserError(f"--out {folder}: exists and is no pool: choose another folder")
    if world.is_main and not earlier:
        runs.check_writable(folder, "--out")
        copy_images(folder, record, source, purpose, world.device)
    world.barrier()
    return find_items(folder / "lq", folder / "gt" if (folder / "gt").is_dir() else None)


def copy_images(folder, record, source, purpose, device):
    """folder/lq, gt and pool.json of a `source`, whole or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    # of a call that was killed
    shutil.rmtree(temporary, ignore_errors=True)
    if "hr" in source:
        for name, lq, gt in draw_crops(**source, purpose=purpose, device=device):
            save_image(temporary / "lq" / f"{name}.png", lq)
            save_image(temporary / "gt" / f"{name}.png", gt)
    else:
        for name, item in find_items(**source).items():
            for kind, path in (("lq", item["lq"]), *(("gt", path) for path in item["refs"])):
                image = load_image(path)
                save_image(temporary / kind / f"{name}.png", image if kind == "lq" else cut_to_x4(image))
    runs.save_json(temporary / "pool.json", record | runs.describe_machine())
    if folder.is_dir():
        # it is empty
        folder.rmdir()
    temporary.rename(folder)


# Candidates

@torch.no_grad()
def fill(gen, items, folder, samples, world, batch_size, text="candidates"):
    """Write folder/<name>/<seed>.png for seeds 0 to samples - 1 of every item without; processes share the images."""
    todo = [name for name in list(items)[world.rank::world.size] if not (folder / name).is_dir()]
    for name in tqdm(todo, unit="img", desc=text, disable=not (world.is_main and todo)):
        lq = metrics.load(items[name]["lq"], world.device)
        temporary = folder / f"{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        for k in range(0, samples, batch_size):
            seeds = range(k, min(k + batch_size, samples))
            outputs = gen.sample(gen.net, lq.expand(len(seeds), -1, -1, -1), [name] * len(seeds), seeds)
            if not torch.isfinite(outputs).all():
                raise runs.UserError(f"image {name}, seeds {k} to {seeds[-1]}: the generator's output is not finite: "
                                     "look at its weights")
            for seed, output in zip(seeds, degradations.to_8bit(outputs)):
                save_image(temporary / f"{seed}.png", output)
        # a killed call leaves whole groups only
        temporary.rename(folder / name)
    world.barrier()


def open_pool(pool):
    """-> (content of pool.json, items, {name: [candidate files by seed]}); UserError for an unfinished pool."""
    remedy = "make it with: python -m dpo.pool sample"
    about = read_json(pool / "pool.json", remedy)
    if "samples" not in about:
        raise runs.UserError(f"{pool}: images without candidates; {remedy}")
    items = find_items(pool / "lq", pool / "gt" if (pool / "gt").is_dir() else None)
    files = {name: [pool / "cand" / name / f"{seed}.png" for seed in range(about["samples"])] for name in items}
    missing = [name for name, candidates in files.items() if not candidates[-1].is_file()]
    if missing:
        raise runs.UserError(f"{pool}: {len(missing)} of {len(files)} images have no candidates, first {missing[0]}: "
                             "call python -m dpo.pool sample with this --out again, it continues")
    return about, items, files


def pool_hash(pool):
    """Hash of everything that the pairs of a pool depend on: how it was made, and its scores."""
    return runs.digest([runs.digest(path) if path.exists() else ""
                           for path in (pool / "pool.json", pool / "scores.jsonl")])


# Judging

def create_metrics(fr, nr, files, device):
    """{name: metrics.Metric} of full- and no-reference metrics. UserError for one of the other kind, or given twice.

    files: {name: local weights}.
    """
    judges = {}
    for flag, names in (("--fr", fr), ("--nr", nr)):
        for name in names:
            if name in judges:
                raise runs.UserError(f"{flag} {name}: given twice")
            judges[name] = metrics.create_metric(name, device, files.get(name), **PROTOCOL, flag=flag)
            if judges[name].full_reference != (flag == "--fr"):
                kind, right = ("full", "--fr") if judges[name].full_reference else ("no", "--nr")
                raise runs.UserError(f"{flag} {name}: is a {kind}-reference metric: give it to {right}")
    return judges


def describe_metrics(judges):
    """The description of metrics in scores.json and norm.json."""
    return {name: {"lower_is_better": m.lower_is_better, "full_reference": m.full_reference, "identity": m.identity}
            for name, m in judges.items()}


def check_references(names, items, remedy):
    """UserError where one of the images has no ground truth for the full-reference metrics `names`."""
    if names and not all(item["refs"] for item in items.values()):
        raise runs.UserError(f"{', '.join(names)}: the images have no ground truth to compare with: {remedy}")


def judge(judges, items, files, cache, world):
    """{name: [candidate files]} -> (images, M, K) native scores; continues where it was stopped (metrics.score).

    NaN where a score is not finite.
    """
    count = len(next(iter(files.values())))
    rows = {str(seed): metrics.Row(None, {name: candidates[seed] for name, candidates in files.items()}, None, None)
            for seed in range(count)}
    scores = metrics.score(rows, items, judges, cache, world, PROTOCOL)
    return np.array([[[scores[row][name].get(m, math.nan) for m in judges] for row in rows] for name in items])


# Scores, and the scale of the reward

def read_scores(pool):
    """-> names, (G, M, K) scores, {metric: description}. Images with a score that is not finite are left out."""
    file, remedy = pool / "scores.jsonl", f"make it with: python -m dpo.pool score --pool {pool}"
    about, rows = read_json(pool / "scores.json", remedy), read_lines(file, remedy)
    try:
        about, names = dict(about["metrics"]), list(dict.fromkeys(row["name"] for row in rows))
        samples = len(rows) // len(names)
        if [(row["name"], row["seed"]) for row in rows] != [(name, seed) for name in names for seed in range(samples)]:
            raise ValueError("seeds of an image are missing, or not in order")
        made = pool / "pool.json"
        if made.exists() and samples != read_json(made, remedy).get("samples"):
            raise ValueError("not as many seeds as were sampled")
        raw = np.array([[row[m] for m in about] for row in rows], dtype=float).reshape(len(names), -1, len(about))
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise runs.UserError(f"{file}: not one whole row per candidate ({reason}); {remedy}") from None
    finite = np.isfinite(raw).all((1, 2))
    if not finite.any():
        raise runs.UserError(f"{file}: every image has scores that are not finite: score again, without that metric")
    if not finite.all():
        print(f"{(~finite).sum()} images have scores that are not finite and are left out, first "
              f"{names[int(finite.argmin())]}")
    return [name for name, kept in zip(names, finite) if kept], raw[finite], about


def open_norm(path):
    """norm.json as dpo.pool curate writes it; UserError for anything else."""
    norm = read_json(path, "python -m dpo.pool curate makes it")
    try:
        for name, entry in norm["metrics"].items():
            low, high, _ = (entry[key] for key in ("low", "high", "identity"))
            numbers = all(isinstance(end, (int, float)) and math.isfinite(end) for end in (low, high))
            if not numbers or not low < high:
                raise runs.UserError(f"{path}: {name} goes from {low} to {high}, which is no range")
    except (KeyError, TypeError, AttributeError):
        raise runs.UserError(f"{path}: not a scale of the reward, the norm.json of dpo.pool curate") from None
    return norm


def check_norm(path, norm, judges):
    """UserError unless the scale `norm`, of the file `path`, is one of these metrics; names the first that differ.

    judges: {name: description}, see describe_metrics.
    """
    known, problems = norm["metrics"], []
    for name in {**judges, **known}:
        if name not in known:
            problems.append(f"{name} is missing")
        elif name not in judges:
            problems.append(f"{name} is unknown here")
        elif any(known[name].get(key) != value for key, value in judges[name].items()):
            problems.append(f"{name} is another model there (weights, or kind)")
    if problems:
        raise runs.UserError(f"{path}: a scale of other metrics: {'; '.join(problems[:3])}; name the same ones, or fit "
                             "a scale of its own with dpo.pool curate")


def rewards_of(raw, norm, which, names=None):
    """(..., K) native scores, metrics in the order of `names` (default norm's) -> (...) rewards on norm's scale."""
    names = list(norm["metrics"]) if names is None else names
    full_reference = [norm["metrics"][m]["full_reference"] for m in names]
    return preference.reward(preference.normalise(raw, names, norm["metrics"]), full_reference, which)
