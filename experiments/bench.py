"""Where a training step's time goes: ms per step of every part, images/s, share of the hardware's limit, peak memory.

    python -m experiments.bench train --arch compact --batch-size 4 --reward ranker            any flags of train.py
    python -m experiments.bench train --reward bench:untrained_musiq --sampler amo              MUSIQ's architecture without its weights: for times only (bench:untrained_fused: by musiq.py)
    python -m experiments.bench finetune --arch compact --batch-size 4 --reward ranker          the same of finetune_lora.py: reward with gradient, LoRA
    python -m experiments.bench evaluate --arch compact                                         tiled inference and metrics of one image
    python -m experiments.bench data --data datasets/mine                                       images/s from PNG and from packed files, warm and cold
    python -m experiments.bench samplers --atlas FILE --data DIR --reward bench:untrained_musiq  rand, AMO from an atlas, AMO online, in turn
    python -m experiments.bench grow                                                            how time and memory grow with batch, crop, data; drift
    python -m experiments.bench ranks                                                           what every process of torchrun holds and sends, counted
    python -m experiments.bench compare before.json after.json                                  ratios, part by part

`train` and `finetune` measure the parts one by one on the tensors of one batch (medians), and the whole step as the script runs it, as a process of
its own that leaves nothing behind. Without --data the quintuplets are made up: 24 of 512 x 512 pixels. Where an image is read from the disk the file cache is warm.
"""
import argparse
from pathlib import Path

import runs


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=runs.Help)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (("train", "a step of train.py; all its flags are taken"), ("finetune", "a step of finetune_lora.py; all its flags are taken"),
                       ("evaluate", "inference and metrics; train.py's --arch, --reward, --tile, --device, --threads"), ("data", "reading and degradation; train.py's flags"),
                       ("samplers", "step times of samplers in alternating runs; train.py's flags"), ("grow", "time and memory against batch, crop and data set size; train.py's flags")):
        c = commands.add_parser(name, help=text, description=text, allow_abbrev=False, formatter_class=runs.Help)
        c.add_argument("--repeats", type=runs.SIZE, default=5, help="measurements of each part; their median counts")
        c.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
        if name in ("samplers", "grow"):
            c.add_argument("--steps", type=runs.SIZE, default=20, help="whole steps, after as many warm-up ones")
        if name in ("train", "finetune"):
            c.add_argument("--steps", type=runs.COUNT, default=20, help="whole steps, after as many warm-up ones; 0: parts only")
            c.add_argument("--processes", type=runs.SIZE, default=1, help="of torchrun, for the whole steps")
        if name == "samplers":
            c.add_argument("--online", type=runs.COUNT, default=2, help="measurements of AMO that scores online (slow)")
        if name == "grow":
            c.add_argument("--rounds", type=runs.SIZE, default=3, help="how often all settings are measured, in turn; medians count")
            c.add_argument("--drift", type=runs.COUNT, default=2000, help="steps of the run that looks for drift, in twenty windows of which the first does not count; 0: none")
    commands.add_parser("ranks", help="memory and communication of a process, counted", description="memory and communication of a process, counted")
    c = commands.add_parser("compare", help="ratios of two results", description="ratios of two results", formatter_class=runs.Help)
    c.add_argument("before", type=Path)
    c.add_argument("after", type=Path)
    args, rest = p.parse_known_args(argv)
    if args.command in ("compare", "ranks") and rest:
        p.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "grow" and 0 < args.drift < 20:
        p.error(f"--drift {args.drift}: at least 20, a step for each window, or 0")
    return args, [part for word in rest for part in (word.split("=", 1) if word.startswith("--") else [word])]             # --data=DIR as --data DIR


if __name__ == "__main__":
    ARGS = parse_args()                                                           # --help answers before torch is loaded

import copy
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import archs
import data
import degradations
import finetune_lora
import iqa
import lora
import metrics as quality
from losses import VGGFeatureLoss, adversarial_loss
from images import save_image
import train


def untrained_musiq(device):
    """A reward of MUSIQ's architecture with random weights: costs what MUSIQ costs, means nothing."""
    from pyiqa.archs.musiq_arch import MUSIQ
    torch.manual_seed(0)
    return MUSIQ(pretrained=False).to(device).eval()


def untrained_fused(device):
    """The same through musiq.py."""
    from rewards.musiq import FusedMUSIQ
    return FusedMUSIQ.from_pyiqa(untrained_musiq(device))


def synthetic_sets(root, count=24, side=512):
    """Quintuplets of coloured noise with structure of every size, in HGGT's layout, under root."""
    rng = np.random.default_rng(0)
    for n in range(count):
        layers = [F.interpolate(torch.from_numpy(rng.random((1, 3, max(2, side // k), max(2, side // k)))).float(), (side, side), mode="bicubic") for k in (128, 32, 8, 2)]
        base = sum(layers)[0] / len(layers)
        for k, version in enumerate(("original", "01", "02", "03", "04")):
            image = (base + 0.02 * k * torch.from_numpy(rng.standard_normal((3, side, side))).float()).clamp(0, 1)
            save_image(root / "Train" / "images" / "0" / version / f"{data.file_stem(f'photo{n}-0-0', version)}.png", image)


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(function, repeats, device):
    """Median ms of function(), after one call that does not count."""
    times = []
    for _ in range(repeats + 1):
        sync(device)
        started = time.perf_counter()
        function()
        sync(device)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def flops(function):
    """Floating-point operations of function(), matrix products, convolutions and attention, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_flops(device, precision):
    """FLOP/s of the fastest of several large matrix products: what this hardware reaches. Convolutions done with fewer operations may exceed it."""
    kind, best = torch.bfloat16 if precision == "bf16" and device.type == "cuda" else torch.float32, 0.0
    for side in (4096, 8192) if device.type == "cuda" else (384, 768, 1536):
        a, b = torch.randn(2, side, side, device=device, dtype=kind)
        best = max(best, *(2 * side ** 3 / (timed(lambda: a @ b, 1, device) / 1000) for _ in range(6)))
    return best


def setup(args, tune):
    """What train.py, or with tune finetune_lora.py, builds -> world, seeds, autocast, reward, reward that chooses, TrainingSet, generator, discriminator or None, VGG or None, tuned weights."""
    world, seeds, autocast = runs.start_training(args)
    build = lambda words, **more: None if words == ["none"] else iqa.create_reward(words, world.device, musiq=args.musiq, **more)
    reward = build(args.reward, weights_file=args.reward_weights, need_gradient=tune)
    chooser = reward if not tune or args.gt_reward == args.reward else build(args.gt_reward)
    _, dataset, _, _ = train.open_data(args, world, chooser, seeds)
    torch.manual_seed(0)
    memory = torch.channels_last if args.channels_last else torch.contiguous_format
    net_g = archs.create(args.arch, **({"drop_path": args.drop_path, "pad_mode": args.pad_mode} if args.arch.startswith("swinir") else {}))
    tuned = finetune_lora.choose_tuned(net_g, args.tune, args.targets or lora.default_targets(net_g), args.rank, args.alpha) if tune else list(net_g.parameters())
    net_g = net_g.to(world.device, memory_format=torch.contiguous_format if args.arch.startswith("swinir") else memory).train()
    net_d = archs.UNetDiscriminatorSN(args.d_features).to(world.device, memory_format=memory).train() if args.lambda_a > 0 else None
    vgg = VGGFeatureLoss(args.vgg_weights).to(world.device, memory_format=memory) if args.lambda_p > 0 else None
    return world, seeds, autocast, reward, chooser, dataset, net_g, net_d, vgg, tuned


def step_parts(args, repeats, tune):
    """{part: ms per step} on one batch, {part: FLOPs}, and ms of both kinds of Adam, of train.py's step or of finetune_lora.py's. --compile compiles what they compile; FLOPs are counted eager."""
    world, seeds, autocast, reward, chooser, dataset, raw_g, raw_d, vgg, tuned = setup(args, tune)
    compiled = torch.compile if args.compile else lambda net: net
    net_g, net_d = compiled(raw_g), None if raw_d is None else compiled(raw_d)
    device, lanes = world.device, range(args.batch_size)
    measure, parts, work = partial(timed, repeats=repeats, device=device), {}, {}
    parts["decode, one worker"] = measure(lambda: [dataset.sample(1, lane) for lane in lanes])
    batch = data.collate([dataset.sample(1, lane) for lane in lanes])
    moved = lambda: [batch[name].to(device).float() / 255 for name in ("original", "crops")]
    parts["to the device"] = measure(moved)
    original, crops = moved()
    draws = [seeds(1, lane, "degrade") for lane in lanes], [seeds(1, lane // args.group_size, "degrade-group") for lane in lanes]
    degrade = lambda: degradations.degrade(degradations.usm_sharpen(original) if args.usm else original, args.degradation, *draws, args.jpeg_table)
    parts["degradation"] = measure(degrade)
    lq, gt = data.crop_like(degrade(), batch["where"], args.crop), crops[:, 0]
    if args.sampler == "amo" and crops.shape[1] > 1:
        score = torch.no_grad()(lambda: chooser(crops.flatten(0, 1)))
        parts["scoring"], work["scoring"] = measure(score), flops(score)

    def generator(net, backward=True):
        with autocast():
            sr = net(lq, **({"drop_path_seeds": list(lanes)} if args.drop_path else {}))
        if backward:
            F.l1_loss(sr.float(), gt).backward()
        return sr
    parts["G forward"] = measure(lambda: generator(net_g, False))
    parts["G backward, L1"] = max(0.0, measure(lambda: generator(net_g)) - parts["G forward"])
    work["G"] = flops(lambda: generator(raw_g))
    fake = generator(raw_g, False).detach()

    def through(loss):                                                            # from the SR image on
        sr = fake.clone().requires_grad_()
        with autocast():
            value = loss(sr)
        value.backward()
    losses = {"perceptual": lambda sr: vgg(sr, gt)} if vgg is not None else {}
    if tune and reward is not None:
        losses["reward with gradient"] = lambda sr: -reward(sr.clamp(0, 1)).mean()
    for name, loss in losses.items():
        parts[name], work[name] = measure(lambda: through(loss)), flops(lambda: through(loss))
    if raw_d is not None:
        def adversarial(net):
            raw_d.requires_grad_(False)
            through(lambda sr: adversarial_loss(net(sr), True))
            raw_d.requires_grad_(True)

        def discriminator(net):
            for images, real in ((gt, True), (fake, False)):
                with autocast():
                    loss = adversarial_loss(net(images), real)
                loss.backward()
        for name, part in (("D in G's loss", adversarial), ("D", discriminator)):
            parts[name], work[name] = measure(lambda: part(net_d)), flops(lambda: part(raw_d))
    ema = copy.deepcopy(raw_g).requires_grad_(False)
    adam_ms = {}
    for kind in ("plain", "fused"):
        optimisers = [runs.adam(weights, 1e-9, kind == "fused") for weights in (tuned, *([] if raw_d is None else [raw_d.parameters()]))]
        adam_ms[kind] = measure(lambda: [optimiser.step() for optimiser in optimisers])
    parts["optimiser, EMA"] = adam_ms["fused" if args.fused_adam else "plain"] + measure(lambda: runs.update_ema(ema, raw_g, 0.999))
    return world, parts, work, adam_ms


def whole_steps(words, args, steps, processes=1, windows=2, script="train.py"):
    """The script itself: ms per step, share of waiting for data and peak memory in GiB of each window of so many steps but the first."""
    with tempfile.TemporaryDirectory() as folder:
        runs.save_weights(Path(folder) / "init.pth", archs.create(args.arch).state_dict())
        out, more = Path(folder) / "run", []
        if script == "finetune_lora.py":
            runs.save_weights(Path(folder) / "net_d.pth", archs.UNetDiscriminatorSN(args.d_features).state_dict())
            more = ["--watch", "--d-init", f"{folder}/net_d.pth"]
        command = [*runs.python(script, *words, processes=processes), "--init", f"{folder}/init.pth", "--out", str(out), "--total-steps", str(windows * steps), "--log-every", str(steps),
                   "--save-every", "0", "--weights-every", "0", "--val-every", "0", "--sample-every", "0", *more]
        done = subprocess.run(command, capture_output=True, text=True, env=runs.python_path())
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no output"]
            raise runs.UserError(f"{script} ended with {done.returncode}: {([line for line in said if 'error:' in line] or said)[-1]}")
        events = [event for event in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if event["split"] == "train"][1:]
        return [{"ms": 1000 / event["it_per_s"], "wait": event["wait"], "memory": event["memory"]} for event in events]


def report(record, parts, work, peak, batch, alone=False):
    """Print the table of parts and keep everything in the record. alone: parts that make no step together, each with its own images/s."""
    total, rows = sum(parts.values()), []
    for name, ms in parts.items():
        key = "G" if name == "G backward, L1" else name                           # G's work counts forward and backward
        took = ms + parts["G forward"] if key == "G" else ms
        rows.append([name, f"{ms:.1f}", f"{1000 * batch / ms:.2f}" if alone else f"{ms / total:.1%}", *([f"{work[key] / 1e9:.1f}", f"{work[key] / (took / 1000) / peak:.0%}"] if work.get(key) else ["", ""])])
    print(runs.markdown(["part", "ms" if alone else "ms per step", "images/s" if alone else "share", "GFLOP", "of the peak"], rows))
    print(("" if alone else f"sum of the parts {total:.1f} ms, {1000 * batch / total:.2f} images/s, {sum(work.values()) / 1e9:.1f} GFLOP (G's counts forward and backward); ")
          + f"a matrix product reaches {peak / 1e9:.0f} GFLOP/s; peak memory {record['peak_memory_parts']:.2f} GiB")
    record |= {"parts_ms": parts, "flops": work, "matrix_product_flops": peak, "images": batch}


def bench_step(args, words, options, record):
    """The step of train.py or, for the command finetune, of finetune_lora.py: its parts, then whole."""
    tune = options.command == "finetune"
    world, parts, work, record["adam_ms"] = step_parts(args, options.repeats, tune)
    record["peak_memory_parts"] = runs.peak_memory(world.device)
    peak = peak_flops(world.device, args.precision)
    report(record, parts, work, peak, args.batch_size)
    print(f"parts {'compiled' if args.compile else 'eager'}, {args.precision}; Adam alone: {record['adam_ms']['plain']:.1f} ms, with --fused-adam {record['adam_ms']['fused']:.1f} ms")
    if options.steps:
        script = "finetune_lora.py" if tune else "train.py"
        whole = record["whole"] = whole_steps(words, args, options.steps, options.processes, script=script)[0]
        print(f"{script}{f', {options.processes} processes' if options.processes > 1 else ''}: {whole['ms']:.1f} ms per step, {1000 * args.batch_size / whole['ms']:.2f} images/s, "
              f"waiting for data {whole['wait']:.0%}, peak memory {whole['memory']:.2f} GiB, {sum(work.values()) / (whole['ms'] / 1000) / peak:.0%} of the peak")


def bench_evaluate(args, words, options, record):
    """One 128 x 128 LR image: inference whole and in tiles, and metrics without downloads."""
    if args.compile or args.precision != "fp32":
        raise runs.UserError("bench.py evaluate: evaluate.py runs eager and in fp32: leave out --compile and --precision")
    world = runs.start_world(args.device, args.threads)
    net = archs.create(args.arch).to(world.device).eval()
    lq = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)).to(world.device)
    sr = archs.upscale_tiled(net, lq).clamp(0, 1)
    wide = lq.repeat(1, 1, 2, 3)                                                  # 256 x 384
    jobs = {"inference, whole": lambda: archs.upscale_tiled(net, lq), f"inference of 256 x 384, tile {args.tile}": lambda: archs.upscale_tiled(net, wide, tile=args.tile)}
    for name in ("psnr", "ssim", *([] if args.reward == ["none"] else args.reward)):
        jobs[name] = partial(quality.create_metric(name, world.device), sr, sr)
    parts = {name: timed(job, options.repeats, world.device) for name, job in jobs.items()}
    record["peak_memory_parts"] = runs.peak_memory(world.device)
    report(record, parts, {name: flops(job) for name, job in jobs.items()}, peak_flops(world.device, args.precision), 1, alone=True)


def bench_data(args, words, options, record):
    """Samples per second of one worker, warm and cold, and degraded images per second."""
    world = runs.start_world(args.device, args.threads)
    seeds = partial(runs.sample_seed, args.seed)
    reward = None if args.reward == ["none"] else iqa.create_reward(args.reward, world.device, args.reward_weights, musiq=args.musiq)
    _, dataset, _, _ = train.open_data(args, world, reward, seeds)
    lanes, parts = range(args.batch_size), {}
    read = lambda: data.collate([dataset.sample(1, lane) for lane in lanes])
    cold = []
    for _ in range(options.repeats):
        forget(dataset)
        started = time.perf_counter()
        read()
        cold.append(1000 * (time.perf_counter() - started))
    parts["read a batch, cold"] = statistics.median(cold)
    parts["read a batch, warm"] = timed(read, options.repeats, world.device)
    original = read()["original"].to(world.device).float() / 255
    draws = [seeds(1, lane, "degrade") for lane in lanes], [seeds(1, lane // args.group_size, "degrade-group") for lane in lanes]
    for preset in ("one-round", "two-round"):
        parts[f"degrade a batch, {preset}"] = timed(lambda: degradations.degrade(original, preset, *draws), options.repeats, world.device)
    print(runs.markdown(["", "ms", "samples/s"], [[name, f"{ms:.2f}", f"{1000 * args.batch_size / ms:.1f}"] for name, ms in parts.items()]))
    record |= {"parts_ms": parts, "packed": getattr(dataset.sets, "packed", None) is not None}


def bench_samplers(args, words, options, record):
    """rand and AMO from an atlas in alternating runs of train.py; AMO that scores online a few times."""
    if not args.atlas:
        raise runs.UserError("bench.py samplers: --atlas FILE names the table of --data (python -m prepare.verify atlas)")
    plain = without(words, "--atlas", "--sampler")
    kinds = {"rand": [*without(plain, "--reward"), "--reward", "none", "--sampler", "rand"], "amo, atlas": [*without(plain, "--reward"), "--reward", "none", "--sampler", "amo", "--atlas", *args.atlas],
             "amo, online": [*plain, "--sampler", "amo"]}
    times = {kind: [] for kind in kinds}
    for k in range(max(options.repeats, options.online)):
        for kind in list(kinds)[::-1 if k % 2 else 1]:                            # neither always goes first
            if k < (options.online if kind == "amo, online" else options.repeats):
                times[kind].append(whole_steps(kinds[kind], args, options.steps)[0]["ms"])
                print(f"{kind}: {times[kind][-1]:.1f} ms per step", file=sys.stderr)
    ratios = [a / b for a, b in zip(times["amo, atlas"], times["rand"])]
    middle = {kind: statistics.median(values) for kind, values in times.items() if values}
    print(runs.markdown(["sampler", "ms per step, median", "of rand", "runs"], [[kind, f"{ms:.1f}", f"{ms / middle['rand']:.3f}", len(times[kind])] for kind, ms in middle.items()]))
    print(f"amo from the atlas over rand, {len(ratios)} alternating pairs: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}"
          + (f"; scoring online is {1 - middle['amo, atlas'] / middle['amo, online']:.0%} of its step" if "amo, online" in middle else ""))
    record |= {"ms": times, "parts_ms": middle, "ratio": statistics.median(ratios)}


def without(words, *flags):
    """Command-line words without these flags and their values."""
    kept, skip = [], False
    for word in words:
        skip = word in flags if word.startswith("--") else skip
        kept += [] if skip else [word]
    return kept


def bench_grow(args, words, options, record):
    """ms per step, ms of its parts and memory for a batch, a crop and a data set 1, 2 and 4 times as large, each alone, all of them in turn and again; then one long run."""
    side, found = args.crop, {}

    def measure(what, factor):
        more = {"batch": ["--batch-size", str(args.batch_size * factor), "--pool-size", "0"], "crop": ["--crop", str(int(side * factor ** 0.5) // 8 * 8), "--pool-size", "0"], "sets": []}[what]
        with tempfile.TemporaryDirectory() as made:
            synthetic_sets(Path(made), count=6 * factor if what == "sets" else 6, side=max(2 * side, 4 * side if what == "crop" else 0))
            changed = [*without(words, "--data", *more[::2]), "--data", made, *more]
            whole, parts = whole_steps(changed, args, options.steps)[0], step_parts(train.parse_args(changed), options.repeats, False)[1]
        print(f"{what} x{factor}: {whole['ms']:.1f} ms, {whole['memory']:.2f} GiB", file=sys.stderr)
        return {"whole step": whole["ms"], **{name: parts[name] for name in ("decode, one worker", "degradation", "scoring") if name in parts}, "memory": whole["memory"]}
    settings = [(what, factor) for what in ("batch", "crop", "sets") for factor in (1, 2, 4)]
    for turn in range(options.rounds):
        for setting in settings[::-1 if turn % 2 else 1]:
            found.setdefault(setting, []).append(measure(*setting))
    middle = lambda name, *setting: statistics.median(values[name] for values in found[setting])
    cells = lambda name, what: [f"{middle(name, what, 1):.4g}", *(f"x{middle(name, what, factor) / middle(name, what, 1):.2f}" for factor in (2, 4))]
    names = list(found["batch", 1][0])
    print(runs.markdown(["ms, or GiB", *(f"{what}{times}" for what in ("batch", "crop", "sets") for times in (" x1", " x2", " x4"))],
                        [[name, *(cell for what in ("batch", "crop", "sets") for cell in cells(name, what))] for name in names]))
    base = [values for what in ("batch", "sets") for values in found[what, 1]]      # one setting but for the pool: its scatter is that of all
    print(f"x1 of batch and of sets are nearly the same setting, measured {len(base)} times: " + ", ".join(f"{name} {min(v[name] for v in base):.4g} to {max(v[name] for v in base):.4g}" for name in names))
    record["grow"] = [{"what": what, "factor": factor, "rounds": values} for (what, factor), values in found.items()]
    if options.drift:
        windows = whole_steps(words, args, options.drift // 20, windows=20)
        slope = np.polyfit(np.arange(len(windows)), [w["ms"] for w in windows], 1)[0] * len(windows) / statistics.median(w["ms"] for w in windows)
        print(f"{options.drift} steps: step time drifts by {slope:+.1%} over the run (windows from {min(w['ms'] for w in windows):.1f} to {max(w['ms'] for w in windows):.1f} ms), "
              f"memory from {windows[0]['memory']:.3f} to {windows[-1]['memory']:.3f} GiB")
        record["drift"] = windows


def held(net_g, net_d):
    """Bytes that a process of train.py keeps for its networks: weights, gradients (held once, see World.parallel) and two moments of Adam, the generator's EMA, and buffers."""
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    return 5 * size(net_g.parameters()) + 4 * size(net_d.parameters()) + 2 * size(net_g.buffers()) + size(net_d.buffers())


def ranks():
    """Counted for the paper's settings and four GPUs, a process's share of the pool with it."""
    rows = []
    for arch in ("swinir", "rrdbnet", "compact"):
        preset, nets = archs.ARCHS[arch]["train"], (archs.create(arch), archs.UNetDiscriminatorSN())
        g, d = (sum(p.numel() for p in net.parameters()) for net in nets)
        pool = preset["pool_size"] / 4 * 3 * (256 ** 2 + 64 ** 2)
        rows.append([arch, f"{g:,}", f"{d:,}", f"{held(*nets) / 1e6:.0f}", f"{pool / 1e6:.0f}", f"{4 * (g + d) / 1e6:.1f}", preset["batch_size"] // 4])
    print(runs.markdown(["arch", "G", "D", "networks and optimiser, MB", "pool, MB", "gradients reduced per step, MB", "samples per process and step"], rows))


def forget(dataset):
    """Drop the data set's files from the system's cache, as far as the system does it on request (a virtual machine's host may keep them)."""
    if dataset.sets.packed:
        dataset.sets.packed.bytes._mmap.madvise(mmap.MADV_DONTNEED)               # what is mapped would stay
    for path in dataset.sets.all_files():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(options):
    try:
        before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
        before["parts_ms"], after["parts_ms"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise runs.UserError(f"bench.py compare: takes two files of --json with parts ({error})") from None
    rows = [[name, f"{before['parts_ms'][name]:.1f}", f"{after['parts_ms'][name]:.1f}", f"{before['parts_ms'][name] / after['parts_ms'][name]:.2f}"]
            for name in before["parts_ms"] if after["parts_ms"].get(name)]
    if "whole" in before and "whole" in after:
        rows.append(["whole step", f"{before['whole']['ms']:.1f}", f"{after['whole']['ms']:.1f}", f"{before['whole']['ms'] / after['whole']['ms']:.2f}"])
    print(runs.markdown(["", f"before ({before['commit'][:7]}), ms", f"after ({after['commit'][:7]}), ms", "ratio"], rows))
    for key in ("device", "torch", "arguments"):
        if before[key] != after[key]:
            print(f"{key} differ: {before[key]} and {after[key]}")


def main(options, words):
    if options.command == "compare":
        return compare(options)
    if options.command == "ranks":
        return ranks()
    runs.check_output(options.json, "--json")
    if "--lambda-p" not in words and "--vgg-weights" not in words and options.command != "train":
        words = [*words, "--lambda-p", "0"]                                       # no download
    given = words
    with tempfile.TemporaryDirectory() as folder:
        if "--data" not in words:
            synthetic_sets(Path(folder))
            words = [*words, "--data", folder]
        if "--score-cache" not in words:
            words = [*words, "--score-cache", f"{folder}/scores"]
        if options.command == "finetune" and "--base" not in words:
            words = [*words, "--base", f"{folder}/none"]                          # its weights are made up
        args = (finetune_lora if options.command == "finetune" else train).parse_args(words)
        record = {"command": sys.argv, "arguments": given, **runs.describe_machine(), "threads": args.threads or torch.get_num_threads()}
        {"train": bench_step, "finetune": bench_step, "evaluate": bench_evaluate, "data": bench_data, "samplers": bench_samplers, "grow": bench_grow}[options.command](args, words, options, record)
    if options.json:
        runs.save_json(options.json, record)


if __name__ == "__main__":
    runs.cli(partial(main, *ARGS))
