"""Train FlowSR, a stochastic x4 generator, on photographs: stage 1 of DP2O-SR without Stable Diffusion or FLUX.

    torchrun --nproc_per_node 4 -m dpo.pretrain --hr DF2K/HR            leaves runs/flow-base
    python -m dpo.pretrain --hr DF2K/HR --base runs/swinir-amo          generates a residual over that network's output
    python -m dpo.pretrain --demo                                       small and short, on a CPU, no download

The network and its three predictions are in flow.py. Everything here is CHOICE: the paper tunes Stable Diffusion 2 and
FLUX with a ControlNet. dpo.tune takes those too.
"""
from pathlib import Path

import runs
from dpo import options

# CHOICE: sized so that the whole demo ends within four minutes on two cores
DEMO = dict(hr=options.DEMO_SET, out=options.DEMO_GENERATOR, **options.DEMO_CROPS, size="tiny", batch_size=8,
            group_size=4, val_photos=1, total_steps=500, warmup=50, lr=1e-3, ema_decay=0.98, steps=4, log_every=100,
            save_every=250, val_every=250, workers=0, threads=1)


def parse_args(argv=None):
    p = options.parser("dpo.pretrain", __doc__)
    g = p.add_argument_group("data")
    g.add_argument("--hr", type=Path, default=Path("datasets/DF2K/HR"), metavar="DIR", help="photographs")
    g.add_argument("--val-photos", type=runs.SIZE, default=8, help="photographs held out for the checks")
    options.add_crops(g, "side of the LR patches in pixels")
    g.add_argument("--group-size", type=runs.SIZE, default=8,
                   help="samples that share a group's draws, see degradations.py")
    g = p.add_argument_group("generator")
    g.add_argument("--size", choices=runs.literal("dpo/flow", "SIZES"), default="base",
                   help="1.4, 5.9, 10.1, 21.8 million weights")
    g.add_argument("--prediction", choices=runs.literal("dpo/flow", "PREDICTIONS"), default="flow",
                   help="rectified flow, or a diffusion model that predicts the noise or v")
    g.add_argument("--base", type=runs.CHECKPOINT, metavar="PATH",
                   help="frozen x4 network whose output the residual is added to, any that upscale.py takes; "
                        "default: bicubic enlargement")
    g.add_argument("--steps", type=runs.SIZE, default=8, help="steps of sampling")
    g = options.add_training(p, batch_size=(64, "CHOICE"), lr=(2e-4, "CHOICE"), total_steps=(40_000, "CHOICE"),
                             log_every=100, save_every=2_000, val_every=5_000)
    g.add_argument("--warmup", type=runs.COUNT, default=500,
                   help="steps in which the learning rate rises linearly; constant afterwards")
    # decay of the EMA weights, which are the result; the demo is shorter and takes less
    p.set_defaults(ema_decay=0.999)
    args = options.parse(p, argv, {p: DEMO})
    options.check_crops(p, args)
    args.out = args.out or Path("runs") / f"flow-{args.size}"
    return args


# --help and flag errors need no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import copy
import itertools
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import archs
import data
import degradations
import iqa
import metrics
from dpo import flow, preference

# largest gradient norm
CLIP_GRAD = 1.0
FIXED = ("size", "prediction", "base_hash", "degradation", "patch", "load_size", "batch_size", "group_size", "lr",
         "warmup", "ema_decay", "seed", "samples")
# flags of earlier commits, and their only value that is left
RETIRED = {"times": "logit-normal", "tau": 1.0, "clip_grad": CLIP_GRAD}


def spread_of_residual(gen, pairs, batch_size, batches=16):
    """sigma_r: standard deviation of hr - base over some training pairs, the same for every number of processes."""
    residuals = [F.pixel_shuffle(gen.encode(hr, lq), flow.SCALE)
                 for lq, hr in (pairs(k, range(batch_size)) for k in range(1, batches + 1))]
    return torch.stack([r.double().square().mean() for r in residuals]).mean().sqrt().item()


def draw_time(seed):
    """t of one sample: the logistic function of a normal number (as SD3), which is seldom near the ends."""
    return 1 / (1 + math.exp(-np.random.default_rng(seed).standard_normal()))


def learning_rate(step, lr, warmup):
    """Rises linearly over the first `warmup` steps, then stays constant."""
    return lr * min(1, step / warmup) if warmup else lr


@torch.no_grad()
def check_generator(gen, net, held_out):
    """Means over held-out pairs [(lq, hr)], with fixed times and noise.

    loss; psnr of one sample, psnr_of_mean of the mean of four, psnr_base of the base; spread: standard deviation over
    four seeds, in grey levels.
    """
    totals, count = {}, 0
    for k, (lq, hr) in enumerate(held_out):
        names = [f"check {k} {i}" for i in range(len(lq))]
        t, eps = (torch.arange(len(lq), device=lq.device) + 0.5) / len(lq), gen.noise(lq, names, [0] * len(lq))
        xt, target = gen.noised(gen.encode(hr, lq), eps, t)
        outputs = torch.stack([gen.sample(net, lq, names, [seed] * len(lq)) for seed in range(4)])  # (4, b, 3, H, W)
        psnr = partial(metrics.psnr, gt=hr, border=0)
        values = {"loss": preference.error(gen.predict(net, xt, t, gen.condition(lq)), target),
                  "psnr": psnr(outputs[0].clamp(0, 1)), "psnr_of_mean": psnr(outputs.mean(0).clamp(0, 1)),
                  "psnr_base": psnr(gen.enlarged(lq).clamp(0, 1)), "spread": 255 * outputs.std(0).mean((1, 2, 3))}
        for name, value in values.items():
            totals[name] = totals.get(name, 0) + value.double().sum().item()
        count += len(lq)
    return {name: value / count for name, value in totals.items()}


def main(args):
    world, seeds, autocast = runs.start_training(args.device, args.threads, args.seed, args.precision)
    device, lanes = world.device, world.lanes(args.batch_size)
    base = archs.load_x4(args.base, "--base")[0] if args.base else None

    # cheap checks first, so that a bad command fails before anything is loaded
    facts = {"base_hash": base and iqa.tensors_hash(base)}
    run = runs.Run(args.out, vars(args) | facts, world, args.resume, FIXED, RETIRED, args.tensorboard)
    run.check_steps(args.total_steps)
    if args.demo and args.hr == options.DEMO_SET:
        options.make_demo_start(world, options.DEMO_SET)

    # photographs: those that are trained on, and a few for the checks, whose draws have streams of their own
    def check_seeds(step, lane, purpose):
        return seeds(step, lane, f"check {purpose}")

    def training_set(sets, seeds, group_size):
        dataset = data.TrainingSet(sets, "orig", seeds, args.batch_size, group_size, 4 * args.patch, args.load_size)
        data.check_headers(dataset, world)
        return dataset, data.synthetic_pairs(dataset, seeds, device, args.degradation, args.patch, group_size)
    sets, val_sets = data.find_photos(args.hr, "--hr").hold_out(args.val_photos, seeds(0, 0, "val-photos"))
    dataset, pairs = training_set(sets, seeds, args.group_size)
    val_set, val_pairs = training_set(val_sets, check_seeds, 1)
    run.pin(samples=len(dataset))
    held_out = [val_pairs(1, range(k, k + 8)) for k in range(0, 16, 8)]

    # initial weights; nothing else uses this state
    torch.manual_seed(args.seed)
    gen = flow.FlowSR(**flow.SIZES[args.size], prediction=args.prediction, base=base, steps=args.steps, device=device)
    raw, ema = gen.net, copy.deepcopy(gen.net).eval().requires_grad_(False)
    opt = torch.optim.AdamW(raw.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    state = run.checkpoint
    if state:
        raw.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        opt.load_state_dict(state["opt"])
    gen.sigma_r = state["sigma_r"] if state else spread_of_residual(gen, pairs, min(args.batch_size, 16))
    meter = runs.Meter(world, state and state["meter"])
    batches = data.batches(dataset, run.start_step + 1, args.total_steps, lanes, args.workers, device.type == "cuda")
    batches = data.prefetch(batches, device)
    if run.start_step < args.total_steps:
        # a first batch that cannot be read leaves no folder
        batches = itertools.chain([next(batches)], batches)
    run.open()
    run.say(f"FlowSR {args.size}, {args.prediction}, base {args.base or 'bicubic'}: "
            f"{sum(p.numel() for p in raw.parameters()):,} weights, sigma_r {gen.sigma_r:.4f}, {len(dataset)} images "
            f"({sets.grouping()}), {len(val_set)} held out, {world.size} process(es) on {device}"
            + (f"; from step {run.start_step}" if state else ""))
    net = world.parallel(raw.train())

    def save(step):
        meter.check_finite(lambda s: ", ".join(dataset.names(s)), raw)
        run.save(step, {"net": raw.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict(),
                        "meter": meter.state_dict(), "sigma_r": gen.sigma_r})

    def look(step):
        values = check_generator(gen, ema, held_out)
        run.say(f"step {step} held out: " + " ".join(f"{name} {value:.4g}" for name, value in values.items()))
        run.event(step, "val", **values)

    def due(step, every):
        return runs.due(step, args.total_steps, every)
    stop = runs.StopSignal(world)
    if run.start_step == 0:
        look(0)
    for step in run.steps(args.total_steps):
        with meter.waiting():
            batch = next(batches)
        lr = opt.param_groups[0]["lr"] = learning_rate(step, args.lr, args.warmup)
        lq, hr = pairs(step, lanes, batch)
        # the frozen base runs in the precision of the network; only images are subtracted
        with autocast():
            x0 = gen.encode(hr, lq)
        t = torch.tensor([draw_time(seeds(step, lane, "time")) for lane in lanes], dtype=torch.float32, device=device)
        eps = torch.stack([degradations.normal_field(x0.shape[1:], seeds(step, lane, "eps")) for lane in lanes])
        xt, target = gen.noised(x0, eps.to(device), t)
        with autocast():
            out = gen.predict(net, xt, t, gen.condition(lq))
        loss = preference.error(out, target).mean()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        grad = torch.nn.utils.clip_grad_norm_(raw.parameters(), CLIP_GRAD)
        opt.step()
        runs.update_ema(ema, raw, args.ema_decay)

        meter.add(step, loss=loss, grad=grad)
        if due(step, args.log_every):
            meter.check_finite(lambda s: ", ".join(dataset.names(s)))
            run.progress(step, args.total_steps, meter, lr, {})
        # before saving: a saved step has its check
        if due(step, args.val_every):
            look(step)
        stopping = stop.requested(step)
        if due(step, args.save_every) or stopping:
            save(step)
        if stopping and step < args.total_steps:
            run.say(f"stopped by a signal at step {step}; continue with --resume")
            return
    if world.is_main:
        gen.save(args.out / "weights", raw.state_dict(), ema.state_dict())
        run.say(f"done: {args.out / 'weights' / 'gen.pth'}")


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
