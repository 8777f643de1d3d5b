"""Shared by the experiments: this repository's scripts as child processes, one test set, tables of differences.

Photographs and public weights are looked for below DATA; docs/data.md says where they come from.
"""
import contextlib
import importlib
import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial

import numpy as np
from tqdm import tqdm

import metrics
import runs
from images import list_images, load_image, save_image
from report import pictures, tables

# images/<set>/*.png, weights/sr/*.pth (x4 networks), weights/iqa/* (quality models); not part of the repository
DATA = "datasets/public"
# reported beside the no-reference metrics
WITH_REFERENCE = ("psnr", "ssim", "vgg", "flat_hf")
# what made a result, copied from evaluate.py's JSON
MADE_BY = ("commit", "torch", "python", "device", "cpu_flags", "threads")
RUNNING = set()


def run_command(log, script, command, environment, folder=None):
    """Run `command` in `folder`; its output goes to the file `log`. UserError with its last line where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as out:
        child = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, cwd=folder,
                                 env=environment | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})
        RUNNING.add(child)
        try:
            status = child.wait()
        finally:
            # it has ended, or this process is being stopped
            child.terminate()
            RUNNING.discard(child)
    if status:
        lines = log.read_text().strip().splitlines() or ["no output"]
        last = ([line for line in lines if line.startswith(f"{script}: error:")] or lines)[-1]
        raise runs.UserError(f"{script} ended with {status}: {last} (all of it in {log})")


def call(log, script, *words, processes=1):
    """One of this repository's scripts, in one or more processes with one thread each; `log` gets its output."""
    command = runs.python(script, *words, "--threads", 1, processes=processes)
    run_command(log, script, command, runs.python_path())


def call_here(log, script, *words):
    """The same in this process, and with its threads: for machines where starting a process takes as long as a run."""
    log.parent.mkdir(parents=True, exist_ok=True)
    module = importlib.import_module(script.removesuffix(".py"))
    with open(log, "a", encoding="utf-8") as out, contextlib.redirect_stdout(out):
        module.main(module.parse_args([str(word) for word in words]))


def last_value(words, name):
    """The whole number of a flag: the last one counts."""
    return int(words[len(words) - words[::-1].index(name)])


def whole(folder, make):
    """Call make(a folder beside it) and give that its name, unless `folder` is there: it is never half there."""
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(folder)


def in_pieces(run, total, piece, log, script, *words):
    """A training of `total` steps in the folder `run`: calls of at most `piece` steps, each of which continues it.

    UserError where one of them was stopped by a signal.
    """
    last = run / "ckpt" / "last.pt"
    state = runs.load_checkpoint(last) if last.exists() else {"step": 0}
    for steps in [*range(piece, total, piece), total]:
        if state["step"] >= steps or state.get("ended"):
            continue
        call(log, script, *words, "--total-steps", steps, "--out", run, "--resume", "auto")
        state = runs.load_checkpoint(last)
        # dpo.tune may end a training early
        if state["step"] < steps and not state.get("ended"):
            raise runs.UserError(f"{run}: was stopped at step {state['step']}; the same command continues")


def copy_photos(files, target, tile=0):
    """The photos as PNG under <folder>-<name>, so that photos of two folders do not collide.

    tile: whole squares of this side only, <folder>-<name>-<row>-<column>, so that less is decoded for a crop.
    """
    for path in files:
        image, name = load_image(path), f"{path.parent.name}-{path.stem}"
        tops, lefts = ([k * tile for k in range(n // tile)] if tile else [0] for n in image.shape[1:])
        for top in tops:
            for left in lefts:
                part = image[:, top:top + tile, left:left + tile] if tile else image
                save_image(target / (f"{name}-{top}-{left}.png" if tile else f"{name}.png"), part)


def copy_realsr(folder, target, count):
    """TARGET/{lq,gt}/<name>.png: `count` pairs <name>_LR, <name>_HR of a folder, evenly spread over it, or all."""
    pairs = [path for stem, path in list_images(folder).items() if stem.endswith("_LR")]
    if not pairs:
        raise runs.UserError(f"{folder}: no <name>_LR images with <name>_HR beside them")
    for low in (pairs[k * len(pairs) // count] for k in range(count)):
        name = low.stem.removesuffix("_LR")
        for part, path in (("gt", low.with_stem(f"{name}_HR")), ("lq", low)):
            file = target / part / f"{name}.png"
            if not file.exists():
                runs.write_atomic(file, partial(save_image, image=load_image(path)))


def parallel(jobs, tasks):
    """Call the functions `tasks`, `jobs` at a time; the first error stops those that have not begun."""
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(tasks), unit="job") as bar:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            # an error, Ctrl-C or SIGTERM: no child stays behind
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(RUNNING):
                child.terminate()
            raise


# The test set WORK/test/{lq,gt} of samplers.py and lora_tuning.py

def judge(metric, metric_weights):
    """The Metric on the CPU; metric_weights: words NAME=FILE."""
    return metrics.create_metric(metric, "cpu", dict(word.split("=", 1) for word in metric_weights).get(metric))


def test_pair(work, stem):
    """-> lq (1, 3, h, w), gt (1, 3, 4h, 4w) in [0, 1]"""
    return [load_image(work / "test" / folder / f"{stem}.png")[None].float() / 255 for folder in ("lq", "gt")]


def middle_row(lq, images, gt, side):
    """[(part in the middle, side x side pixels enlarged twice, label)]: LR, images {label: (1, 3, H, W)}, reference."""
    side = min(side, *gt.shape[2:])
    y, x = ((n - side) // 2 for n in gt.shape[2:])
    images = {"LR": lq.repeat_interleave(4, 2).repeat_interleave(4, 3), **images, "reference": gt}
    return [(pictures.enlarged_crop(image, y, x, side, 2), label) for label, image in images.items()]


def metric_files(exp, names):
    """Words of evaluate.py: the weight files of the metrics `names`."""
    files = [word for word in exp.metric_weights if word.partition("=")[0] in names]
    return ["--metric-weights", *files, *([f"vgg={exp.vgg_weights}"] if "vgg" in names else [])]


def evaluate(exp, weights, out, names, baselines=(), more=()):
    """evaluate.py on the test set of exp.work -> its JSON, also in the file `out`.

    exp: flags of samplers.py; weights: None, where `more`, further flags, names the rows.
    """
    test = exp.work / "test"
    rows = ["--weights", weights] if weights else []
    call(out.with_suffix(".log"), "evaluate.py", *rows, "--lq", test / "lq", "--gt", test / "gt",
         "--baselines", *baselines, "--metrics", *names, *metric_files(exp, names), "--out-json", out,
         "--cache", exp.work / "evaluation-cache", "--device", exp.device, *more)
    return json.loads(out.read_text())


def metric_tables(summary):
    """Means with their spread over seeds, then differences with intervals; bold where the verdict is clear."""
    names, lower = summary["metrics"], summary["lower_is_better"]
    digits = [tables.digits([values[k] for values in summary["mean"].values()]) for k in range(len(names))]
    head = ["", *(tables.heading(name, lower[name]) for name in names)]
    spread = {row: np.std(values, axis=0, ddof=1) for row, values in summary["seed_means"].items() if len(values) > 1}
    means = []
    for row, values in summary["mean"].items():
        after = [f" ± {spread[row][k]:.{d}f}" if row in spread else "" for k, d in enumerate(digits)]
        means.append([row, *(f"{value:.{d}f}{text}" for value, d, text in zip(values, digits, after))])
    differences = [[pair, *(tables.difference_cell(values[name], d) for name, d in zip(names, digits))]
                   for pair, values in summary["differences"].items()]
    return runs.markdown(head, means) + "\n\n" + runs.markdown(head, differences)
