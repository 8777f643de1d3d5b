"""Where a training step's time goes: ms per step of every part, images/s, share of the hardware's limit, peak memory.

    python -m experiments.bench train --arch compact --batch-size 4 --reward ranker      any flags of train.py
    python -m experiments.bench finetune --arch compact --batch-size 4 --reward ranker   any flags of finetune_lora.py
    python -m experiments.bench evaluate --arch compact                 tiled inference and metrics of one image
    python -m experiments.bench data --data datasets/mine               images/s from PNG and packed files
    python -m experiments.bench samplers --data DIR --atlas FILE        rand, AMO from an atlas, AMO online, in turn
    python -m experiments.bench grow                                    time and memory against batch, crop, data; drift
    python -m experiments.bench ranks                                   memory and communication of a process, counted
    python -m experiments.bench compare before.json after.json          ratios, part by part

--reward rewards.musiq:untrained (or :untrained_bf16) is MUSIQ's architecture without its weights, for times only;
experiments.bench:untrained_musiq is pyiqa's own.

`train` and `finetune` measure the parts one by one on the tensors of one batch (medians), and the whole step as the
script runs it, in a process of its own that leaves nothing behind but static scores in runs/scores (sma, smp). Without
--data the quintuplets are made up: 24 of 512 x 512 pixels. Where an image is read from the disk the file cache is warm.
"""
from pathlib import Path

import runs

# {command: what it measures}; each takes the flags of train.py, finetune those of finetune_lora.py
COMMANDS = {
    "train": "a step of train.py; all its flags are taken",
    "finetune": "a step of finetune_lora.py; all its flags are taken",
    "evaluate": "inference and metrics; train.py's --arch, --reward, --device, --threads",
    "data": "reading and degradation; train.py's flags",
    "samplers": "step times of samplers in alternating runs; train.py's flags",
    "grow": "time and memory against batch, crop and data set size; train.py's flags",
}


def parse_args(argv=None):
    """-> own flags, flags for the script that is measured"""
    p = runs.Parser(description=__doc__)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        c = commands.add_parser(name, help=text, description=text, allow_abbrev=False, formatter_class=runs.Help)
        c.add_argument("--repeats", type=runs.SIZE, default=5, help="measurements of each part; their median counts")
        c.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
        if name in ("samplers", "grow"):
            c.add_argument("--steps", type=runs.SIZE, default=20, help="whole steps, after as many warm-up ones")
        if name in ("train", "finetune"):
            c.add_argument("--steps", type=runs.COUNT, default=20,
                           help="whole steps, after as many warm-up ones; 0: parts only")
            c.add_argument("--processes", type=runs.SIZE, default=1, help="of torchrun, for the whole steps")
        if name == "samplers":
            c.add_argument("--online", type=runs.COUNT, default=2, help="measurements of AMO that scores online (slow)")
        if name == "grow":
            c.add_argument("--rounds", type=runs.SIZE, default=3,
                           help="how often all settings are measured, in turn; medians count")
            c.add_argument("--drift", type=runs.COUNT, default=2000,
                           help="steps of a run that looks for drift, in 20 windows, the first not counted; 0: none")
    text = "memory and communication of a process, counted"
    commands.add_parser("ranks", help=text, description=text)
    text = "ratios of two results"
    c = commands.add_parser("compare", help=text, description=text, formatter_class=runs.Help)
    c.add_argument("before", type=Path)
    c.add_argument("after", type=Path)
    args, rest = p.parse_known_args(argv)
    if args.command in ("compare", "ranks") and rest:
        p.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "grow" and 0 < args.drift < 20:
        p.error(f"--drift {args.drift}: at least 20, a step for each window, or 0")
    # --data=DIR as --data DIR
    return args, [part for word in rest for part in (word.split("=", 1) if word.startswith("--") else [word])]


# --help answers before torch is loaded
ARGS = parse_args() if __name__ == "__main__" else None

import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import archs
import data
import degradations
import finetune_lora
import iqa
import metrics
import train
from experiments.steps import flops, peak_flops, step_parts, timed
from images import save_image


def untrained_musiq(device):
    """A reward of pyiqa's MUSIQ with random weights: costs what MUSIQ costs there, means nothing."""
    from pyiqa.archs.musiq_arch import MUSIQ
    torch.manual_seed(0)
    return MUSIQ(pretrained=False).to(device).eval()


def synthetic_sets(root, count=24, side=512):
    """Quintuplets of coloured noise with structure of every size, in HGGT's layout, under root."""
    rng = np.random.default_rng(0)
    with ThreadPoolExecutor(8) as pool:
        saved = []
        for n in range(count):
            sizes = [max(2, side // k) for k in (128, 32, 8, 2)]
            grids = [torch.from_numpy(rng.random((1, 3, size, size))).float() for size in sizes]
            base = sum(F.interpolate(grid, (side, side), mode="bicubic") for grid in grids)[0] / len(grids)
            for k, version in enumerate(("original", "01", "02", "03", "04")):
                image = (base + 0.02 * k * torch.from_numpy(rng.standard_normal((3, side, side))).float()).clamp(0, 1)
                name = data.file_stem(f"photo{n}-0-0", version)
                path = root / "Train" / "images" / "0" / version / f"{name}.png"
                saved.append(pool.submit(save_image, path, image))
        for save in saved:
            # raises what went wrong
            save.result()


# Whole steps

def whole_steps(flags, args, steps, processes=1, windows=2, script="train.py", inside=False):
    """The script itself with these flags, of which args is made; inside: in this process instead of one of its own.

    -> [{"ms" per step, "wait": share of waiting for data, "memory": peak in GiB}] of each window of so many steps but
    the first
    """
    with tempfile.TemporaryDirectory() as folder:
        runs.save_weights(Path(folder) / "init.pth", archs.create(args.arch).state_dict())
        start = ["--init", f"{folder}/init.pth"]
        if script == "finetune_lora.py":
            start = ["--watch"]
            if not args.base.exists():
                # random weights, unless --base names a run or a file
                start += ["--base", f"{folder}/init.pth", "--arch", args.arch]
            if args.lambda_a > 0:
                net_d = archs.UNetDiscriminatorSN(args.d_features)
                runs.save_weights(Path(folder) / "net_d.pth", net_d.state_dict())
                start += ["--d-init", f"{folder}/net_d.pth"]
        words = [str(word) for word in [*flags, *start, "--out", f"{folder}/run", "--total-steps", windows * steps,
                                        "--log-every", steps, "--save-every", 0, "--val-every", 0]]
        if inside:
            module = finetune_lora if script == "finetune_lora.py" else train
            module.main(module.parse_args(words))
        else:
            done = subprocess.run(runs.python(script, *words, processes=processes), capture_output=True, text=True,
                                  env=runs.python_path())
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["no output"]
                last = ([line for line in lines if "error:" in line] or lines)[-1]
                raise runs.UserError(f"{script} ended with {done.returncode}: {last}")
        events = map(json.loads, (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines())
        measured = [event for event in events if event["split"] == "train"][1:]
        keep = ("wait", "memory")
        return [{"ms": 1000 / event["it_per_s"]} | {key: event[key] for key in keep} for event in measured]


def without(flags, *names):
    """Command-line words without the flags of these names and their values."""
    kept, skip = [], False
    for word in flags:
        skip = word in names if word.startswith("--") else skip
        kept += [] if skip else [word]
    return kept


# Commands: args of the script, its flags as given, own options, the record for --json

def print_parts(record, parts, work, peak, batch, alone=False):
    """Print the table of parts and keep everything in the record.

    alone: parts that make no step together, each with its own images/s.
    """
    total, rows = sum(parts.values()), []
    for name, ms in parts.items():
        # G's work counts forward and backward
        key = "G" if name == "G backward, L1" else name
        seconds = (ms + parts["G forward"] if key == "G" else ms) / 1000
        share = [f"{work[key] / 1e9:.1f}", f"{work[key] / seconds / peak:.0%}"] if work.get(key) else ["", ""]
        rows.append([name, f"{ms:.1f}", f"{1000 * batch / ms:.2f}" if alone else f"{ms / total:.1%}", *share])
    head = ["part", *(["ms", "images/s"] if alone else ["ms per step", "share"]), "GFLOP", "of the peak"]
    print(runs.markdown(head, rows))
    if not alone:
        print(f"sum of the parts {total:.1f} ms, {1000 * batch / total:.2f} images/s, "
              f"{sum(work.values()) / 1e9:.1f} GFLOP (G's counts forward and backward)")
    print(f"a matrix product reaches {peak / 1e9:.0f} GFLOP/s; peak memory {record['peak_memory_parts']:.2f} GiB")
    record |= {"parts_ms": parts, "flops": work, "matrix_product_flops": peak, "images": batch}


def bench_step(args, flags, options, record):
    """The step of train.py or, for the command finetune, of finetune_lora.py: its parts, then whole."""
    tune = options.command == "finetune"
    world, parts, work, busy = step_parts(args, options.repeats, tune)
    record["busy"] = busy
    record["peak_memory_parts"] = runs.peak_memory(world.device)
    peak = peak_flops(world.device, args.precision)
    print_parts(record, parts, work, peak, args.batch_size)
    print(f"parts {'compiled' if 'compile' in args.fast else 'eager'}, {args.precision}")
    if options.steps:
        script = "finetune_lora.py" if tune else "train.py"
        whole = record["whole"] = whole_steps(flags, args, options.steps, options.processes, script=script)[0]
        several = f", {options.processes} processes" if options.processes > 1 else ""
        print(f"{script}{several}: {whole['ms']:.1f} ms per step, "
              f"{1000 * args.batch_size / whole['ms']:.2f} images/s, waiting for data {whole['wait']:.0%}, "
              f"peak memory {whole['memory']:.2f} GiB, "
              f"{sum(work.values()) / (whole['ms'] / 1000) / peak:.0%} of the peak")


def bench_evaluate(args, flags, options, record):
    """One 128 x 128 LR image: inference whole and in tiles, and metrics without downloads."""
    if args.fast or args.precision != "fp32":
        raise runs.UserError("evaluate.py runs eager and in fp32: leave out --fast and --precision")
    world = runs.start_world(args.device, args.threads)
    net = archs.create(args.arch).to(world.device).eval()
    lq = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)).to(world.device)
    sr = archs.upscale_tiled(net, lq).clamp(0, 1)
    tasks = {"inference, whole": partial(archs.upscale_tiled, net, lq),
             "inference of 256 x 384, tile 256": partial(archs.upscale_tiled, net, lq.repeat(1, 1, 2, 3), tile=256)}
    for name in ("psnr", "ssim", *([] if args.reward == ["none"] else args.reward)):
        tasks[name] = partial(metrics.create_metric(name, world.device), sr, sr)
    parts = {name: timed(task, options.repeats, world.device) for name, task in tasks.items()}
    record["peak_memory_parts"] = runs.peak_memory(world.device)
    work = {name: flops(task) for name, task in tasks.items()}
    print_parts(record, parts, work, peak_flops(world.device, args.precision), 1, alone=True)


def bench_data(args, flags, options, record):
    """Samples per second of one worker, warm and cold, and degraded images per second."""
    world = runs.start_world(args.device, args.threads)
    seeds = partial(runs.sample_seed, args.seed)
    reward = None
    if args.reward != ["none"]:
        reward = iqa.create_reward(args.reward, world.device, args.reward_weights, musiq=args.musiq)
    dataset = train.training_set(args, world, reward, seeds, train.find_data(args, world, seeds)[0])
    lanes, parts, cold = range(args.batch_size), {}, []

    def read():
        return data.collate([dataset.sample(1, lane) for lane in lanes])
    for _ in range(options.repeats):
        drop_from_cache(dataset)
        started = time.perf_counter()
        read()
        cold.append(1000 * (time.perf_counter() - started))
    parts["read a batch, cold"] = statistics.median(cold)
    parts["read a batch, warm"] = timed(read, options.repeats, world.device)
    original = read()["original"].to(world.device).float() / 255
    draws = ([seeds(1, lane, "degrade") for lane in lanes],
             [seeds(1, lane // args.group_size, "degrade-group") for lane in lanes])
    for preset in ("one-round", "two-round"):
        degrade = partial(degradations.degrade, original, preset, *draws)
        parts[f"degrade a batch, {preset}"] = timed(degrade, options.repeats, world.device)
    rows = [[name, f"{ms:.2f}", f"{1000 * args.batch_size / ms:.1f}"] for name, ms in parts.items()]
    print(runs.markdown(["", "ms", "samples/s"], rows))
    record |= {"parts_ms": parts, "packed": getattr(dataset.sets, "packed", None) is not None}


def drop_from_cache(dataset):
    """Drop the data set's files from the system's cache, as far as the system does it on request.

    The host of a virtual machine may keep them.
    """
    sets = dataset.sets
    files = [sets.path(stem, version) for stem in sets.stems for version in sets.versions]
    if sets.packed:
        files = [sets.packed.file]
        # pages that are mapped would stay
        sets.packed.bytes._mmap.madvise(mmap.MADV_DONTNEED)
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench_samplers(args, flags, options, record):
    """rand and AMO from an atlas in alternating runs of train.py; AMO that scores online a few times."""
    if not args.atlas:
        raise runs.UserError("samplers: --atlas FILE names the table of --data (python -m prepare.atlas)")
    plain = without(flags, "--atlas", "--sampler")
    unscored = [*without(plain, "--reward"), "--reward", "none"]
    settings = {"rand": [*unscored, "--sampler", "rand"],
                "amo, atlas": [*unscored, "--sampler", "amo", "--atlas", *args.atlas],
                "amo, online": [*plain, "--sampler", "amo"]}
    times = {name: [] for name in settings}
    for k in range(max(options.repeats, options.online)):
        # neither always goes first
        for name in list(settings)[::-1 if k % 2 else 1]:
            if k < (options.online if name == "amo, online" else options.repeats):
                times[name].append(whole_steps(settings[name], args, options.steps)[0]["ms"])
                print(f"{name}: {times[name][-1]:.1f} ms per step", file=sys.stderr)
    ratios = [a / b for a, b in zip(times["amo, atlas"], times["rand"])]
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    rows = [[name, f"{ms:.1f}", f"{ms / medians['rand']:.3f}", len(times[name])] for name, ms in medians.items()]
    print(runs.markdown(["sampler", "ms per step, median", "of rand", "runs"], rows))
    text = (f"amo from the atlas over rand, {len(ratios)} alternating pairs: median {statistics.median(ratios):.3f}, "
            f"from {min(ratios):.3f} to {max(ratios):.3f}")
    if "amo, online" in medians:
        text += f"; scoring online is {1 - medians['amo, atlas'] / medians['amo, online']:.0%} of its step"
    print(text)
    record |= {"ms": times, "parts_ms": medians, "ratio": statistics.median(ratios)}


def bench_grow(args, flags, options, record):
    """ms per step, ms of its parts and memory for a batch, a crop and a data set 1, 2 and 4 times as large.

    Each is changed alone; all settings are measured in turn, and again. Then one long run.
    """
    axes, factors = ("batch", "crop", "sets"), (1, 2, 4)

    def measure(axis, factor):
        side = args.crop
        changes = {"batch": ["--batch-size", str(args.batch_size * factor), "--pool-size", "0"],
                   "crop": ["--crop", str(int(side * factor ** 0.5) // 8 * 8), "--pool-size", "0"], "sets": []}[axis]
        with tempfile.TemporaryDirectory() as made:
            count, size = (6 * factor if axis == "sets" else 6), (4 * side if axis == "crop" else 2 * side)
            synthetic_sets(Path(made), count, size)
            changed = [*without(flags, "--data", *changes[::2]), "--data", made, *changes]
            whole = whole_steps(changed, args, options.steps)[0]
            _, parts, _, _ = step_parts(train.parse_args(changed), options.repeats, False)
        print(f"{axis} x{factor}: {whole['ms']:.1f} ms, {whole['memory']:.2f} GiB", file=sys.stderr)
        shown = {name: parts[name] for name in ("decode, one worker", "degradation", "scoring") if name in parts}
        return {"whole step": whole["ms"], **shown, "memory": whole["memory"]}
    settings = [(axis, factor) for axis in axes for factor in factors]
    rounds = {setting: [] for setting in settings}
    for turn in range(options.rounds):
        for setting in settings[::-1 if turn % 2 else 1]:
            rounds[setting].append(measure(*setting))

    def median(name, *setting):
        return statistics.median(values[name] for values in rounds[setting])

    def cells(name, axis):
        first = median(name, axis, 1)
        return [f"{first:.4g}", *(f"x{median(name, axis, factor) / first:.2f}" for factor in factors[1:])]
    names = list(rounds["batch", 1][0])
    print(runs.markdown(["ms, or GiB", *(f"{axis} x{factor}" for axis, factor in settings)],
                        [[name, *(cell for axis in axes for cell in cells(name, axis))] for name in names]))
    # one setting but for the pool: its scatter is that of all
    base = [values for axis in ("batch", "sets") for values in rounds[axis, 1]]
    scatter = [f"{name} {min(v[name] for v in base):.4g} to {max(v[name] for v in base):.4g}" for name in names]
    print(f"x1 of batch and of sets are nearly the same setting, measured {len(base)} times: " + ", ".join(scatter))
    record["grow"] = [{"what": axis, "factor": factor, "rounds": each} for (axis, factor), each in rounds.items()]
    if options.drift:
        record["drift"] = drift(flags, args, options.drift)


def drift(flags, args, steps):
    """One run in twenty windows -> the windows but the first."""
    windows = whole_steps(flags, args, steps // 20, windows=20)
    ms = [window["ms"] for window in windows]
    slope = np.polyfit(np.arange(len(ms)), ms, 1)[0] * len(ms) / statistics.median(ms)
    print(f"{steps} steps: step time drifts by {slope:+.1%} over the run "
          f"(windows from {min(ms):.1f} to {max(ms):.1f} ms), "
          f"memory from {windows[0]['memory']:.3f} to {windows[-1]['memory']:.3f} GiB")
    return windows


# Counted, and compared

def held(net_g, net_d):
    """Bytes that a process of train.py keeps for its networks.

    Weights, gradients (held once, see World.parallel), two moments of Adam, the generator's EMA, and buffers.
    """
    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)
    weights = 5 * size(net_g.parameters()) + 4 * size(net_d.parameters())
    return weights + 2 * size(net_g.buffers()) + size(net_d.buffers())


def ranks():
    """Print the counts for the paper's settings and four GPUs, a process's share of the pool with it."""
    rows = []
    for arch in ("swinir", "rrdbnet", "compact"):
        values, nets = archs.ARCHS[arch]["train"], (archs.create(arch), archs.UNetDiscriminatorSN())
        g, d = (sum(p.numel() for p in net.parameters()) for net in nets)
        pool = values["pool_size"] / 4 * 3 * (256 ** 2 + 64 ** 2)
        rows.append([arch, f"{g:,}", f"{d:,}", f"{held(*nets) / 1e6:.0f}", f"{pool / 1e6:.0f}",
                     f"{4 * (g + d) / 1e6:.1f}", values["batch_size"] // 4])
    print(runs.markdown(["arch", "G", "D", "networks and optimiser, MB", "pool, MB", "gradients reduced per step, MB",
                         "samples per process and step"], rows))


def compare(options):
    try:
        before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
        before["parts_ms"], after["parts_ms"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise runs.UserError(f"compare: takes two files of --json with parts ({error})") from None
    both = [name for name in before["parts_ms"] if after["parts_ms"].get(name)]
    pairs = {name: (before["parts_ms"][name], after["parts_ms"][name]) for name in both}
    if "whole" in before and "whole" in after:
        pairs["whole step"] = before["whole"]["ms"], after["whole"]["ms"]
    # None where git was missing
    commits = [(result["commit"] or "unknown")[:7] for result in (before, after)]
    print(runs.markdown(["", f"before ({commits[0]}), ms", f"after ({commits[1]}), ms", "ratio"],
                        [[name, f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}"] for name, (a, b) in pairs.items()]))
    # older results lack some
    for key in ("device", "cpu_flags", "threads", "torch", "arguments"):
        if key in before and key in after and before[key] != after[key]:
            print(f"{key} differ: {before[key]} and {after[key]}")


def main(options, flags):
    if options.command == "compare":
        return compare(options)
    if options.command == "ranks":
        return ranks()
    runs.check_output(options.json, "--json")
    if "--lambda-p" not in flags and "--vgg-weights" not in flags and options.command != "train":
        # no download
        flags = [*flags, "--lambda-p", "0"]
    given = flags
    with tempfile.TemporaryDirectory() as folder:
        made_up = "--data" not in flags
        if made_up:
            flags = [*flags, "--data", folder]
        if options.command == "finetune" and "--base" not in flags:
            # its weights are made up
            flags = [*flags, "--base", f"{folder}/none"]
        args = (finetune_lora if options.command == "finetune" else train).parse_args(flags)
        if made_up:
            synthetic_sets(Path(folder))
        record = {"command": sys.argv, "arguments": given, **runs.describe_machine()}
        record["threads"] = args.threads or record["threads"]
        functions = {"train": bench_step, "finetune": bench_step, "evaluate": bench_evaluate, "data": bench_data,
                     "samplers": bench_samplers, "grow": bench_grow}
        functions[options.command](args, flags, options, record)
    if options.json:
        runs.save_json(options.json, record)


if __name__ == "__main__":
    runs.cli(partial(main, *ARGS))
