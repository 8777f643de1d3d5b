"""Fine-tune a trained network on an NR-IQA model directly, through LoRA weights (paper Sec. 4.3, Eq. 5, Supp. 8.3 and 9).

    python finetune_lora.py --demo                                             after train.py --demo; embedded reward, no download
    torchrun --nproc_per_node 4 finetune_lora.py --reward musiq                the paper: from runs/swinir-amo, 20,000 steps
    python finetune_lora.py --lambda-p 2                                       FT_HP: more perceptual loss
    python finetune_lora.py --lambda-a 0.1                                     FT_IG: with the discriminator of the run
    python finetune_lora.py --reward none --lambda-a 0.2                       FT_NNR x2 (0.5: x5): no reward, more GAN instead
    python finetune_lora.py --naive                                            all weights, no LoRA (the paper's Fig. 3 and 5)

It reads as train.py does, and the run that it starts from gives the defaults of data, pairs and losses. What differs: the base
is frozen and low-rank adapters are trained; a discriminator only when --lambda-a > 0; the loss has the term - lambda_q Q(SR), SR
clamped to [0, 1] (Eq. 5). A quality model can be fooled, so every validation also reports metrics that are not optimised and
looks for structured noise, and the run says so when only the optimised score gained.
Leaves lora/adapter.pth (A and B only) and weights/merged.pth, a plain generator.
"""
import argparse
import json
from pathlib import Path

import flags

TUNE = {  # Supp. 8.3
    "swinir": dict(rank=48, lr=5e-6, milestones=[5_000]),
    "rrdbnet": dict(rank=24, lr=5e-5, milestones=[]),
    "compact": dict(rank=16, lr=2e-4, milestones=[]),                             # CHOICE: the paper does not train it
}
TUNE |= {f"{name}-small": values | dict(rank=8, milestones=[]) for name, values in TUNE.items()}
DEMO = dict(reward=["ranker"], watch=["piqe"], lr=2e-3, total_steps=100, log_every=25, save_every=50, val_every=0,
            sample_every=0, threads=1, workers=0)                                 # CHOICE: under 90 s on two cores
OF_RUN = ("data", "val_photos", "load_size", "crop", "degradation", "jpeg_table", "sampler", "tau", "include_original",
          "atlas", "margin", "drop_without_positive", "score_cache", "lambda_l1", "lambda_p", "vgg_weights", "d_features", "batch_size", "group_size", "pool_size",
          "ema_decay", "drop_path", "pad_mode", "seed")                           # "as stage 2" (Supp. 8.3)


def lambda_q(text):
    """An argparse type: a weight, or auto."""
    return text if text == "auto" else flags.WEIGHT(text)


lambda_q.__name__ = "number"


def parse_args(argv=None):
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--demo", action="store_true", help="from the demo's AMO run, small net, embedded reward; same code")
    pre.add_argument("--arch", choices=list(flags.PRESETS), help="backbone; fills the defaults marked [arch] (paper: swinir, rrdbnet)")
    pre.add_argument("--base", type=Path, metavar="DIR",
                     help="run of train.py to start from, and to take the defaults of data, pairs and losses from; default runs/<arch>-<sampler>")
    pre.add_argument("--sampler", default="amo", help=argparse.SUPPRESS)
    first = pre.parse_known_args(argv)[0]
    arch = first.arch or ("compact-small" if first.demo else "swinir")
    base = first.base or Path("runs") / f"{arch}-{first.sampler}"
    p = argparse.ArgumentParser(description=__doc__, parents=[pre], allow_abbrev=False, conflict_handler="resolve", formatter_class=flags.Help)
    flags.add_training(p)
    g = p.add_argument_group("fine-tuning (Eq. 5)")
    g.add_argument("--lambda-q", type=lambda_q,
                   help="weight of the reward; default 0.05, for MUSIQ's 0-100 (Supp. 8.3), 1 where --reward gives weights, auto with --demo. auto: the reward's "
                        "gradient on the weights of the target layers is as long as that of L1 and perceptual loss, on average over the first batches")
    g.add_argument("--rank", type=int, help="[arch] of the adapters (Supp. 8.3)")
    g.add_argument("--alpha", type=flags.RATE, help="the update is alpha / rank * B A; default: the rank (CHOICE)")
    g.add_argument("--targets", metavar="REGEX", help="names of the layers to adapt; default: those of the paper, see lora.py")
    g.add_argument("--tune", choices=["lora", "layers", "all"], default="lora",
                   help="lora; layers: the full weights of the same layers; all: every weight")
    g.add_argument("--naive", action="store_const", const="all", dest="tune", help="the same as --tune all (Fig. 3 and 5)")
    g.add_argument("--gt-reward", nargs="+", metavar="NAME[=WEIGHT]", help="NR-IQA model that chooses the ground truths; default: the run's, else --reward")
    g.add_argument("--stop-gain", type=flags.WEIGHT, default=0.0, help="end when validation's reward is so much above the base's; 0: at --total-steps")
    g.add_argument("--watch", nargs="*", default=["niqe", "piqe", "ranker"], metavar="NAME",
                   help="no-reference metrics that validation reports and nothing optimises (CHOICE: piqe alone likes pixel grids)")
    g = p.add_argument_group("start and continue")
    g.add_argument("--init", type=Path, metavar="FILE", help="generator weights to start from instead of the run's")
    g.add_argument("--d-init", type=Path, metavar="FILE", help="discriminator weights instead of the run's; with --lambda-a > 0 only")
    g.add_argument("--weights-key", choices=["params_ema", "params"], help="key to take; default params_ema, else params, else bare")
    g.add_argument("--resume", nargs="?", const="must", default="no", choices=["must", "auto", "no"],
                   help="continue --out from its checkpoint; auto: start if there is none (Slurm requeue)")
    g.add_argument("--name", help="ending of the run folder's name; default by variant: hp, ig, nnr2, nnr5, layers, naive")
    g.add_argument("--out", type=Path, help="run folder (default: <run>+<reward>[-<name>])")
    p.set_defaults(arch=arch, base=base, stage="gan", **flags.PRESETS[arch])
    of_run = {}
    if (base / "args.json").is_file():
        trained = json.loads((base / "args.json").read_text())["args"]
        of_run = {k: v for k, v in trained.items() if k in OF_RUN}                # argparse turns strings into paths
        if not of_run.get("atlas"):
            of_run["tau"] = trained.get("tau") if trained.get("sampler") in ("sma", "smp") else None          # an atlas given now means arg max, unless told
        p.set_defaults(**of_run, gt_reward=trained["reward"])
    p.set_defaults(**TUNE[arch], lambda_a=0.0, total_steps=20_000, save_every=1_000, weights_every=0, val_every=2_000, sample_every=1_000)
    if first.demo:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    if args.reward == ["none"]:
        if args.lambda_q == "auto" or args.stop_gain:
            p.error(f"{'--stop-gain' if args.stop_gain else '--lambda-q auto'} looks at the reward: it needs a --reward")
        args.lambda_q = 0.0
    elif args.lambda_q is None:
        args.lambda_q = 1.0 if any("=" in word for word in args.reward) else "auto" if first.demo else 0.05
    args.gt_reward = args.gt_reward or args.reward
    if args.gt_reward == ["none"] and args.sampler in ("sma", "smp", "amo") and not args.atlas:
        p.error(f"{base}: no run there whose reward could choose the ground truths; make it with: python train.py --arch {arch} --sampler {args.sampler}, "
                "or give --gt-reward")
    if args.name is None:
        more_p = args.lambda_p > of_run.get("lambda_p", 1.0)
        args.name = "-".join([*({"all": ["naive"], "layers": ["layers"], "lora": []}[args.tune]), *(["hp"] if more_p else []),
                              *([f"nnr{args.lambda_a / 0.1:g}" if args.reward == ["none"] else "ig"] if args.lambda_a else [])])
    rewards = "+".join(word.partition("=")[0].partition(":")[0] for word in args.reward)
    args.out = args.out or args.base.with_name(f"{args.base.name}+{rewards}" + (f"-{args.name}" if args.name else ""))
    if args.rank < 1:
        p.error(f"--rank {args.rank}: must be at least 1")
    checked = argparse.Namespace(**vars(args) | {"reward": args.gt_reward})
    flags.check_training(p, checked)
    args.tau = checked.tau                                                        # its default depends on the sampler
    return args


ARGS = parse_args() if __name__ == "__main__" else None                           # --help and flag errors need no torch: seconds

import contextlib
import copy
import itertools
from collections import Counter
from functools import partial

import torch
import torch.nn.functional as F

import archs
import data
import degradations
import iqa
import lora
import quality
import runs
from train import FIXED as FIXED_TRAINING, adam, adversarial_loss, chosen_by, learning_rate, make_pair, open_data, restore, update_ema, validation_pair

FIXED = (*FIXED_TRAINING, "gt_reward", "lambda_q", "tune", "rank", "alpha", "targets", "base_sha256")


def choose_tuned(net, tune, targets, rank, alpha):
    """Make of --tune what is trained: adds adapters, or leaves the weights of some layers or all. -> parameters"""
    if tune == "lora":
        lora.add_lora(net, targets, rank, alpha)
        return lora.lora_parameters(net)
    tuned = list(net.parameters()) if tune == "all" else [layer.weight for layer in lora.matching_layers(net.requires_grad_(False), targets).values()]
    for p in tuned:
        p.requires_grad_(True)
    return tuned


def gradient_ratio(net, targets, dataset, losses, reward, lanes, args, gt_reward, seeds, world, batches=8):
    """lambda_q = auto: mean over the first batches of |d losses / d W| / |d Q / d W|, W the weights of the target layers of the base.

    CHOICE. Both then pull equally at what is adapted, and --tune lora, layers and all get the same number. (On the pixels of SR much of Q's
    gradient is fine noise that no weight can follow.)
    """
    weights, ratios = [layer.weight.requires_grad_(True) for layer in lora.matching_layers(net, targets).values()], []
    gradient = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])
    for step in range(1, batches + 1):
        batch = data.collate([dataset.sample(step, lane) for lane in lanes])
        lq, gt, _, _ = make_pair(batch, step, lanes, args, gt_reward, seeds, world.device)
        pull = push = 0
        for lq, gt in zip(lq.chunk(args.accumulate), gt.chunk(args.accumulate)):
            sr = net(lq)
            pull = pull + gradient(losses(sr, gt))
            push = push + gradient(reward(sr.clamp(0, 1)).mean())
        ratios.append(world.reduce(pull).norm() / world.reduce(push).norm())
    net.requires_grad_(False)
    ratio = torch.stack(ratios).mean().item()
    if not 0 < ratio < float("inf"):
        raise ValueError(f"--lambda-q auto: the ratio of the gradients is {ratio}: give a number")
    return ratio


@torch.no_grad()
def validate(base, net, sets, metrics, args, seeds, world):
    """Means over the validation images, shared over processes: every metric in native units, psnr, and structured noise.

    peaks: quality.noise_peaks of SR - base SR; unsharp_peaks: the same of a plain unsharp mask of the base with as much reward, or with as much as
    such a mask can have; unsharp_equal: share of images where it has as much.
    """
    totals = Counter()
    for i in range(world.rank, len(sets.stems), world.size):
        lq, gt = validation_pair(sets, i, args, seeds, world.device)
        sr, before = (degradations.to_8bit(archs.upscale_tiled(g, lq, tile=args.tile)) for g in (net, base))
        totals.update({name: metric(sr, gt).item() for name, metric in metrics.items()} | {"images": 1, "peaks": quality.noise_peaks(sr - before).item()})
        if "reward" in metrics:
            like, equal = quality.unsharp_like(before, sr, lambda x: metrics["reward"](x, None))
            totals.update({"unsharp_peaks": quality.noise_peaks(like - before).item(), "unsharp_equal": equal})
    names = [*metrics, "peaks", *(["unsharp_peaks", "unsharp_equal"] if "reward" in metrics else [])]
    sums = world.reduce(torch.tensor([totals["images"], *(totals[n] for n in names)], dtype=torch.float64, device=world.device)).tolist()
    return {name: value / sums[0] for name, value in zip(names, sums[1:])}


def verdict(before, after, metrics):
    """One line: did only what was optimised gain? before, after: what validate returned for the base and for the tuned network."""
    better = {m: (after[m] - before[m]) * (-1 if metric.lower_is_better else 1) > 0 for m, metric in metrics.items()}
    worse = [m for m in metrics if m not in ("reward", "psnr") and not better[m] and after[m] != before[m]]
    noisy = "unsharp_peaks" in after and after["peaks"] > after["unsharp_peaks"] + quality.PEAKS_ABOVE_UNSHARP
    said = "; ".join(f"{m} {before[m]:.2f} -> {after[m]:.2f}" for m in metrics)
    said += f"; peaks {after['peaks']:.3f}" + (f", of an unsharp mask {after['unsharp_peaks']:.3f} (of as much reward in {after['unsharp_equal']:.0%} of "
                                                   "the images, else of as much as it can have)" if "unsharp_peaks" in after else " (no reward, so no unsharp mask to compare with)")
    warnings = ["structured noise: isolated peaks in the spectrum of what was changed"] if noisy else []
    if better.get("reward") and worse:
        warnings.append(f"the reward may be fooled: it rose while {', '.join(worse)} got worse")
    return "".join(f"WARNING, {w}. " for w in warnings) + said


@torch.no_grad()
def sample_grid(base, net, sets, args, seeds, device, path, rows=4, side=64):
    """PNG: the flattest place of a few validation images, 1:1 pixels enlarged three times: base | tuned | original. Grids show there first."""
    cells = []
    for i in range(min(rows, len(sets.stems))):
        lq, gt = validation_pair(sets, i, args, seeds, device)
        y, x = data.flattest(gt, side)
        images = {name: archs.upscale_tiled(g, lq, tile=args.tile).clamp(0, 1) for name, g in (("base", base), ("tuned", net))}
        cells.append([(data.enlarged_crop(image, y, x, side, 3), name)
                      for name, image in (images | {"original": gt}).items()])
    data.save_grid(path, cells)


def main(args):
    world, seeds, autocast = runs.start_training(args)
    device, lanes = world.device, world.lanes(args.batch_size)
    if len(lanes) % args.accumulate:
        raise ValueError(f"--accumulate {args.accumulate} does not divide the {len(lanes)} crops of one process")

    # what costs nothing to refuse comes first
    run = runs.Run(args.out, vars(args) | {"discriminator": args.lambda_a > 0}, world, args.resume, FIXED, args.tensorboard)
    if run.start_step > args.total_steps:
        raise ValueError(f"--total-steps {args.total_steps}: {args.out} is already at step {run.start_step}")
    init = runs.find_weights(args.init or args.base, f"make it with: python train.py --arch {args.arch} --sampler {args.sampler}, or name weights with --init FILE")
    d_init = None if args.lambda_a == 0 else args.d_init or runs.find_discriminator(args.base)
    reward = None if args.reward == ["none"] else iqa.create_reward(args.reward, device, args.reward_weights, need_gradient=True, fused=flags.FUSED[args.musiq])
    gt_reward = reward if args.gt_reward == args.reward else None if args.gt_reward == ["none"] else iqa.create_reward(args.gt_reward, device, fused=flags.FUSED[args.musiq])
    metrics = {} if reward is None else {"reward": quality.Metric(lambda sr, gt: reward(sr))}
    metrics |= {name: quality.create_metric(name, device, flag="--watch") for name in [*args.watch, "psnr"]}
    sets, dataset, val_sets, _ = open_data(args, world, gt_reward, seeds)
    if args.stop_gain and val_sets is None:
        raise ValueError(f"--stop-gain needs validation images, and {args.data} has no Test split: hold out photos with --val-photos N")
    run.pin(samples=len(dataset), **chosen_by(dataset, run))

    # networks: the base stays as it is, raw_g is what is tuned
    torch.manual_seed(args.seed)                                                  # initial A; nothing else uses this state
    options = {"drop_path": args.drop_path, "pad_mode": args.pad_mode} if args.arch.startswith("swinir") else {}
    base = archs.ARCHS[args.arch](**options)
    key = archs.load_weights(base, init, args.weights_key)
    run.pin(base_sha256=lora.base_hash(base))
    memory = torch.channels_last if args.channels_last else torch.contiguous_format
    memory_g = torch.contiguous_format if args.arch.startswith("swinir") else memory
    raw_g = copy.deepcopy(base)
    base = base.eval().requires_grad_(False).to(device, memory_format=memory_g)
    targets = args.targets or lora.default_targets(raw_g)
    tuned = choose_tuned(raw_g, args.tune, targets, args.rank, args.alpha)
    raw_g = raw_g.to(device, memory_format=memory_g)
    ema = copy.deepcopy(raw_g).eval().requires_grad_(False)
    opt_g = adam(tuned, args.lr, args.fused_adam)
    vgg = archs.VGGFeatureLoss(args.vgg_weights).to(device, memory_format=memory) if args.lambda_p > 0 else None
    raw_d = None
    if args.lambda_a > 0:
        raw_d = archs.UNetDiscriminatorSN(args.d_features)
        archs.load_weights(raw_d, d_init)
        raw_d = raw_d.to(device, memory_format=memory)
        opt_d = adam(raw_d.parameters(), args.lr, args.fused_adam)
    state = run.checkpoint or {"pool": None, "meter": None, "picked": None, "lambda_q": args.lambda_q, "before": None, "after": None}
    if run.checkpoint:
        raw_g.load_state_dict(state["net_g"])
        ema.load_state_dict(state["ema"])
        restore(opt_g, state["opt_g"])
        if raw_d is not None:
            raw_d.load_state_dict(state["net_d"])
            restore(opt_d, state["opt_d"])
    weight_q, before, after = state["lambda_q"], state["before"], state["after"]             # validation of the base, the last one
    pool = data.TrainingPool(args.pool_size, args.batch_size, lanes, seeds, state["pool"], device)
    meter = runs.Meter(world, state["meter"])
    picked = torch.zeros(len(sets.versions), device=device)                       # how often each version was chosen
    if state["picked"] and world.is_main:
        picked += torch.tensor(state["picked"], device=device)
    batches = data.batches(dataset, run.start_step + 1, args.total_steps, lanes, args.workers, device.type == "cuda")
    batches = data.prefetch(batches, device)
    if run.start_step < args.total_steps:
        batches = itertools.chain([next(batches)], batches)                       # a first batch that cannot be read leaves no folder

    def losses_of(sr, target):
        terms = {"pix": F.l1_loss(sr.float(), target)}
        if vgg is not None:
            terms["percep"] = vgg(sr, target)
        return terms

    lambdas = {"pix": args.lambda_l1, "percep": args.lambda_p, "adv": args.lambda_a}
    if weight_q == "auto":
        plain = lambda sr, target: sum(lambdas[name] * loss for name, loss in losses_of(sr, target).items())
        weight_q = gradient_ratio(base, targets, dataset, plain, reward, lanes, args, gt_reward, seeds, world)
    lambdas["q"] = weight_q
    run.open()
    run.say(f"{args.arch}, {args.tune}: {sum(p.numel() for p in tuned):,} of {sum(p.numel() for p in base.parameters()):,} weights"
            f"{f' in {len(lora.adapted(raw_g))} adapters of rank {args.rank}' if args.tune == 'lora' else ''}, lambda_q {weight_q:.4g}; "
            f"sampler {args.sampler}, {len(dataset)} sets; {world.size} process(es) on {device}; "
            f"{f'from step {run.start_step}' if run.checkpoint else f'start from {init}, key {key}'}")
    if val_sets is not None and before is None:
        before = validate(base, ema, val_sets, metrics, args, seeds, world)       # the tuned network still is the base
        run.event(0, "val", **before)
    state = run.checkpoint = None                                                 # the pool's copy alone may be 100 MB

    compiled = lambda net: torch.compile(net) if args.compile else net
    net_g = world.parallel(compiled(raw_g.train()))
    if raw_d is not None:
        judge = compiled(raw_d.train())                                           # D of the generator's loss: without DDP
        net_d = world.parallel(judge)

    def save(step, weights):
        meter.check_finite(lambda s: ", ".join(dataset.names(s)))
        state = {"net_g": raw_g.state_dict(), "ema": ema.state_dict(), "opt_g": opt_g.state_dict(), "pool": pool.state(world.gather_lanes),
                 "meter": meter.state_dict(), "picked": world.reduce(picked.clone()).tolist(), "lambda_q": weight_q, "before": before,
                 "after": after}
        if raw_d is not None:
            state |= {"net_d": raw_d.state_dict(), "opt_d": opt_d.state_dict()}
        if weights and world.is_main:
            if args.tune == "lora":
                lora.save_lora(args.out / "lora" / "adapter.pth", raw_g, ema)
            runs.save_weights(args.out / "weights" / "merged.pth", *map(lora.merged_state_dict, (raw_g, ema)))
            if raw_d is not None:
                runs.save_weights(args.out / "weights" / f"net_d_{step:07d}.pth", raw_d.state_dict())
        run.save(step, state)

    due = lambda step, every: runs.due(step, args.total_steps, every)
    gained_enough = lambda: args.stop_gain and after and after["reward"] - before["reward"] >= args.stop_gain
    no_sync = lambda net, last: net.no_sync() if world.size > 1 and not last else contextlib.nullcontext()
    stop = runs.StopSignal(world)
    if gained_enough():
        run.say(f"nothing to do: --stop-gain {args.stop_gain:g} is reached; a larger one continues")
        return
    if run.start_step == args.total_steps:
        run.say(f"nothing to do: {args.out} is finished; remove it to train again")
    for step in range(run.start_step + 1, args.total_steps + 1):
        with meter.waiting():
            try:
                batch = next(batches)
            except (ValueError, OSError) as error:                                # an image that cannot be read
                if world.size == 1 and step > run.start_step + 1:                 # with more processes the others wait elsewhere
                    save(step - 1, weights=False)
                raise error
        lr = learning_rate(step, args.lr, args.milestones)
        for group in opt_g.param_groups + (opt_d.param_groups if raw_d is not None else []):
            group["lr"] = lr

        lq, gt, version, score = make_pair(batch, step, lanes, args, gt_reward, seeds, device)
        picked.scatter_add_(0, version, torch.ones_like(version, dtype=picked.dtype))
        lq, gt = pool.swap((lq, gt), step)                                        # training-pair pool: the winner only
        lq, gt = lq.contiguous(memory_format=memory_g), gt.contiguous(memory_format=memory)
        parts = [slice(i, i + len(lanes) // args.accumulate) for i in range(0, len(lanes), len(lanes) // args.accumulate)]
        terms, fakes = Counter(), []

        # generator, Eq. 5
        if raw_d is not None:
            raw_d.requires_grad_(False)
        opt_g.zero_grad(set_to_none=True)
        for part in parts:
            drop = {"drop_path_seeds": [seeds(step, lane, "drop-path") for lane in lanes[part]]} if args.drop_path else {}
            with no_sync(net_g, part is parts[-1]):
                with autocast():
                    sr = net_g(lq[part], **drop)
                    losses = losses_of(sr, gt[part])
                    if raw_d is not None:
                        losses["adv"] = adversarial_loss(judge(sr), real=True)
                    if reward is not None:
                        losses["q"] = -reward(sr.clamp(0, 1)).mean()              # no gradient where SR is outside
                loss_g = sum(lambdas[name] * loss for name, loss in losses.items())
                (loss_g / len(parts)).backward()
            fakes.append(sr.detach())
            terms.update({name: loss.detach() / len(parts) for name, loss in losses.items()})
        if args.clip_grad:
            torch.nn.utils.clip_grad_norm_(tuned, args.clip_grad)
        opt_g.step()
        update_ema(ema, raw_g, args.ema_decay)

        # discriminator: real = the chosen GT, fake = SR
        if raw_d is not None:
            raw_d.requires_grad_(True)
            opt_d.zero_grad(set_to_none=True)
            for part, fake in zip(parts, fakes):
                for name, images, real in (("D_real", gt[part], True), ("D_fake", fake, False)):
                    with no_sync(net_d, part is parts[-1] and not real):
                        with autocast():
                            loss_d = adversarial_loss(net_d(images), real)
                        (loss_d / len(parts)).backward()
                    terms.update({name: loss_d.detach() / len(parts)})
            if args.clip_grad:
                torch.nn.utils.clip_grad_norm_(raw_d.parameters(), args.clip_grad)
            opt_d.step()

        if score is not None:
            terms["score"] = score.mean()
        meter.add(step, **terms)
        if due(step, args.log_every):
            meter.check_finite(lambda s: ", ".join(dataset.names(s)))
            run.progress(step, args.total_steps, meter, lr, dict(zip(sets.versions, world.reduce(picked.clone()).tolist())))
        stopping = stop.requested(step)
        if due(step, args.val_every) and val_sets is not None:                     # before saving: a finished run has its verdict
            after = validate(base, ema, val_sets, metrics, args, seeds, world)
            run.say(f"step {step:07d} validation, {len(val_sets.stems)} images: {verdict(before, after, metrics)}")
            run.event(step, "val", **after)
        if due(step, args.save_every) or due(step, args.weights_every) or stopping or gained_enough():
            save(step, weights=due(step, args.weights_every) or gained_enough())
        if gained_enough():
            run.say(f"reward +{after['reward'] - before['reward']:.2f} at step {step}: --stop-gain {args.stop_gain:g} is reached")
            return
        if due(step, args.sample_every) and args.sample_every and world.is_main:
            sample_grid(base, ema, val_sets or sets, args, seeds, device, args.out / "samples" / f"{step:07d}.png")
        if stopping:
            run.say(f"stopped by a signal at step {step}; continue with --resume")
            return
    run.say(f"done: {args.out / 'weights' / 'merged.pth'}")


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
