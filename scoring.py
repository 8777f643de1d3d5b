"""Outputs and their scores: every image through every row and metric, once; kept on disk and shared by processes. Knows no flags and no tables.

items: {stem: {"lq": path or None, "refs": [path], "versions": [path]}}, lq None: degraded from versions[0]; rows: {name: Row}; metrics: {name: quality.Metric}.

A score is used again only for the same bytes of images, weights and metrics, the same versions of libraries, and the same text of this file and of SOURCES,
the modules that make outputs and scores: after an edit of one of them, be it of a comment, everything is computed again. Tiles and their overlap are part of a row's identity.
"""
import hashlib
import importlib.metadata
import json
import math
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import archs
import data
import degradations
import iqa
import lora
import quality
import runs

SOURCES = (archs, data, degradations, iqa, lora, quality, runs)


def digest(value):
    """Hash of a file's bytes, or of plain values."""
    content = value.read_bytes() if isinstance(value, Path) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:24]


class Row(NamedTuple):
    """A row of the table. make: lq (1, 3, h, w) -> (1, 3, 4h, 4w); or files: {stem: image}. identity: hash of what `make` does. record: for the JSON."""
    make: Callable | None
    files: dict | None
    identity: str | None
    record: dict | None


# Images

def load(path, device):
    return data.load_image(path)[None].to(device).float() / 255


def low_resolution(stem, item, degradation, device):
    """The LR image that comes with the set, or the same one every time by `degradation` of the original. -> (1, 3, h, w) in [0, 1]"""
    if item["lq"] is not None:
        return load(item["lq"], device)
    gt = data.cut_to_x4(load(item["versions"][0], device))
    return degradations.degrade(gt, degradation, *([[runs.sample_seed(0, 0, k, f"test {stem}")] for k in (0, 1)]))


def bicubic(lq):
    return F.interpolate(lq, scale_factor=4, mode="bicubic")


def output(name, row, stem, lq, device):
    """The 8-bit output of one row, (1, 3, H, W). ValueError if a network gives what is not finite."""
    if row.files is not None:
        return load(row.files[stem], device)
    sr = row.make(lq)
    if not torch.isfinite(sr).all():
        raise ValueError(f"{name}, image {stem}: the network's output is not finite: look at its weights")
    return degradations.to_8bit(sr)


@torch.no_grad()
def cells_of(stem, items, rows, degradation, device):
    """{"LR", "GT", "GT 2", ..., then the rows: (3, H, W)} of one image."""
    lq = low_resolution(stem, items[stem], degradation, device)
    cells = {"LR": lq} | {"GT" if k == 0 else f"GT {k + 1}": load(ref, device) for k, ref in enumerate(items[stem]["refs"])}
    cells |= {name: output(name, row, stem, lq, device) for name, row in rows.items()}
    return {name: image[0].cpu() for name, image in cells.items()}


# Scores

def versions():
    """Libraries that scores depend on, and a hash of this repository's own text."""
    code = digest([digest(Path(file)) for file in (__file__, *(module.__file__ for module in SOURCES))])
    return {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "pyiqa", "scikit-image")} | {"code": code}


def read_cache(folder):
    """{key: score} of every earlier call. What is no record (cut off by a kill, damaged) is skipped: its score is computed again."""
    scores = {}
    for line in (line for file in sorted(folder.glob("*.jsonl")) for line in file.read_bytes().splitlines()):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("key"), str) and isinstance(row.get("score"), float) and math.isfinite(row["score"]):
            scores[row["key"]] = row["score"]
    return scores


def score_keys(stem, item, rows, metrics, protocol, degradation, gold, libraries):
    """{(row, or file of a version, metric): key}: a hash of everything that this score depends on."""
    lq = [digest(item["lq"] or item["versions"][0]), degradation]
    against = [protocol["border"], protocol["y"], [digest(path) for path in item["refs"]]]
    judged = {name: [row.identity if row.files is None else digest(row.files[stem]), lq] for name, row in rows.items()}
    candidates, keys = {path: ["version", digest(path)] for path in item["versions"]} if gold else {}, {}
    for m, metric in metrics.items():
        how = [metric.identity, libraries, against if metric.full_reference else None]
        keys |= {(who, m): digest([what, how]) for who, what in (judged if metric.full_reference else judged | candidates).items()}
    return keys


@torch.no_grad()
def score(rows, items, metrics, folder, world, protocol, degradation=None, gold=False, batch_size=8):
    """-> {row: {stem: {metric: value}}}; what is not in the cache `folder` is computed, ranks share the images.

    protocol: {"border", "y"} of full-reference metrics. gold: a first row with the best score of an image's versions by each no-reference metric.
    """
    cache, libraries, found = read_cache(folder), versions(), {}
    own = folder / f"{world.rank}.jsonl"
    own.parent.mkdir(parents=True, exist_ok=True)
    with open(own, "a") as out:
        if out.tell() and not own.read_bytes().endswith(b"\n"):                   # the last line was cut off
            out.write("\n")
        for stem, item in tqdm(list(items.items())[world.rank::world.size], unit="img", disable=not world.is_main):
            keys = score_keys(stem, item, rows, metrics, protocol, degradation, gold, libraries)
            todo = [k for k, key in keys.items() if key not in cache]
            for k, value in compute(todo, stem, item, rows, metrics, degradation, batch_size, world.device) if todo else []:
                cache[keys[k]] = value
                out.write(json.dumps({"key": keys[k], "score": value}) + "\n")
            out.flush()
            best = lambda m: (min if metrics[m].lower_is_better else max)(cache[keys[path, m]] for path in item["versions"])
            found[stem] = {"gold": {m: best(m) for m in metrics if not metrics[m].full_reference}} if gold else {}
            found[stem] |= {row: {m: cache[keys[row, m]] for m in metrics} for row in rows}
    found = {stem: scores for part in world.gather_objects(found) for stem, scores in part.items()}
    return {row: {stem: found[stem][row] for stem in items} for row in [*(["gold"] if gold else []), *rows]}


def compute(todo, stem, item, rows, metrics, degradation, batch_size, device):
    """Yield ((row or file, metric), score) of an image's `todo`; every output is made once."""
    lq = low_resolution(stem, item, degradation, device)
    images = {who: load(who, device) if isinstance(who, Path) else output(who, rows[who], stem, lq, device) for who in dict.fromkeys(who for who, _ in todo)}
    refs = [load(path, device) for path in item["refs"]] if any(metrics[m].full_reference for _, m in todo) else []
    for m in dict.fromkeys(m for _, m in todo):
        whose = [who for who, metric in todo if metric == m]
        for k in range(0, len(whose), batch_size):
            for who, value in judge(m, metrics[m], {who: images[who] for who in whose[k:k + batch_size]}, refs, stem).items():
                if not math.isfinite(value):
                    raise ValueError(f"{who}, image {stem}: {m} is {value}: leave this metric out, or look at the image")
                yield (who, m), value


def judge(m, metric, images, refs, stem):
    """{row: (1, 3, H, W)} -> {row: score}; with several references the mean over them (HGGT). Images of one size go through the metric together.

    ValueError names row, image, size and metric where the metric fails; running out of memory stays what it is.
    """
    if len({image.shape for image in images.values()}) == 1:
        batch = torch.cat(list(images.values()))
        try:
            if metric.full_reference:
                values = torch.stack([metric(batch, gt.expand(len(batch), -1, -1, -1)).double().cpu() for gt in refs]).mean(0)
            else:
                values = metric(batch, None).double()
            return dict(zip(images, values.tolist()))
        except (RuntimeError, ValueError) as error:
            if archs.out_of_memory(error):
                raise
            if len(images) == 1:
                height, width = batch.shape[2:]
                raise ValueError(f"{next(iter(images))}, image {stem} ({width}x{height} pixels): {m} cannot judge it ({' '.join(str(error).split())[:150]}): "
                                 "leave out the metric, or images of this size") from error
    return {who: value for who, image in images.items() for value in judge(m, metric, {who: image}, refs, stem).values()}
