"""What the experiments share: this repository's scripts as child processes, one test set, differences with intervals, and their tables.

`exp` is what experiment.py's parse_args returns: folders, seeds, rewards and metrics.
"""
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
from tqdm import tqdm

import metrics as quality
import runs
import metrics as scoring
from images import load_image, save_image
from report import tables

WITH_REFERENCE = ("psnr", "ssim", "vgg", "flat_hf")                               # what the experiments report beside no-reference metrics
RUNNING = set()                                                                   # child processes


def call(log, script, *words, processes=1):
    """One of this repository's scripts, in one or more processes with one thread each; its output goes to the file `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as out:
        child = subprocess.Popen(runs.python(script, *words, "--threads", 1, processes=processes), stdout=out, stderr=out,
                                 env=runs.python_path() | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})
        RUNNING.add(child)
        try:
            status = child.wait()
        finally:
            child.terminate()                                                     # it has ended, or this process is being stopped
            RUNNING.discard(child)
    if status:
        lines = log.read_text().strip().splitlines() or ["no output"]
        last = ([line for line in lines if line.startswith(f"{script}: error:")] or lines)[-1]
        raise runs.UserError(f"{script} ended with {status}: {last} (all of it in {log})")


def once(made, log, script, *words, inputs=()):
    """call, unless the file `made` is there; ValueError where that was made with other flags or of other inputs, which are kept beside it. inputs: files, or folders, whose names count."""
    content = lambda path: scoring.digest(path if path.is_file() else sorted(file.name for file in path.iterdir()))
    record, about = made.with_name(made.name + ".flags.json"), {"flags": [str(word) for word in words], "inputs": {str(path): content(path) for path in inputs}}
    if not made.exists():
        call(log, script, *words)
        runs.save_json(record, about)
    elif record.exists() and json.loads(record.read_text()) != about:
        raise runs.UserError(f"{made}: was made with other flags or of other inputs than now, kept in {record.name}: remove what is after the change, or choose another --work")


def copy_photos(files, target, tile=0):
    """The photos as PNG under <folder>-<name>, so that none of two folders collide. tile: whole squares of this side only, <folder>-<name>-<row>-<column>: less to decode for a crop."""
    for path in files:
        image, name = load_image(path), f"{path.parent.name}-{path.stem}"
        tops, lefts = ([k * tile for k in range(n // tile)] if tile else [0] for n in image.shape[1:])
        for top in tops:
            for left in lefts:
                part = image[:, top:top + tile, left:left + tile] if tile else image
                save_image(target / (f"{name}-{top}-{left}.png" if tile else f"{name}.png"), part)


def parallel(jobs, tasks):
    """Call the functions `tasks`, `jobs` at a time; the first error stops what has not begun."""
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(tasks), unit="job") as bar:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:                                                     # an error, Ctrl-C or SIGTERM: no child stays behind
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(RUNNING):
                child.terminate()
            raise


def judge(exp, metric):
    """quality.create_metric on the CPU, with the weights of --metric-weights."""
    return quality.create_metric(metric, "cpu", dict(w.split("=", 1) for w in exp.metric_weights).get(metric))


def test_pair(exp, stem):
    """-> lq (1, 3, h, w), gt (1, 3, 4h, 4w) in [0, 1]"""
    return [load_image(exp.work / "test" / kind / f"{stem}.png")[None].float() / 255 for kind in ("lq", "gt")]


def metric_files(exp, metrics):
    """The words of --metric-weights that belong to these metrics, and VGG's."""
    return [w for w in exp.metric_weights if w.partition("=")[0] in metrics] + [f"vgg={exp.vgg_weights}"] * ("vgg" in metrics)


def evaluate(exp, weights, out, metrics, baselines=()):
    call(out.with_suffix(".log"), "evaluate.py", *(["--weights", weights] if weights else []), "--lq", exp.work / "test" / "lq", "--gt",
         exp.work / "test" / "gt", "--baselines", *baselines, "--metrics", *metrics, "--metric-weights", *metric_files(exp, metrics), "--out-json", out,
         "--cache", exp.work / "evaluation-cache", "--device", exp.device)
    return json.loads(out.read_text())


def metric_tables(summary):
    """Means with their spread over seeds, then differences with intervals; bold where the verdict is clear."""
    metrics, lower = summary["metrics"], summary["lower_is_better"]
    digits = [tables.digits([v[k] for v in summary["mean"].values()]) for k in range(len(metrics))]
    head = ["", *(tables.heading(m, lower[m]) for m in metrics)]
    spread = {row: np.std(v, axis=0, ddof=1) for row, v in summary["seed_means"].items() if len(v) > 1}
    means = runs.markdown(head, [[row, *(f"{v:.{d}f}" + (f" ± {spread[row][k]:.{d}f}" if row in spread else "")
                                              for k, (v, d) in enumerate(zip(mean, digits)))] for row, mean in summary["mean"].items()])
    differences = runs.markdown(head, [[pair, *(tables.difference_cell(values[m], d) for m, d in zip(metrics, digits))] for pair, values in summary["differences"].items()])
    return means + "\n\n" + differences
