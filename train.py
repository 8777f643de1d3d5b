"""Train x4 super-resolution on quintuplets with any ground-truth sampler (paper Sec. 4.1-4.2, Eq. 1-4; settings of HGGT).

    python train.py --demo                                                     everything in small, on a CPU, no download
    python train.py --stage psnr --arch swinir --data PHOTOS                   L1 pre-training, leaves runs/swinir-psnr
    torchrun --nproc_per_node 4 train.py --arch swinir --sampler amo           the paper: datasets/HGGT, MUSIQ, 4 GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py --arch rrdbnet --sampler sma
    python train.py --demo --resume                                            continue after an interruption

For every photo there are several candidate ground truths (an original, four enhanced versions). The sampler chooses the one
that supervises each crop: orig, rand, upos (uniform over those people preferred), sma / smp (softmax of NR-IQA scores over
all / positives), amo (the crop that the NR-IQA model likes best). Everything else is HGGT's GAN training.
"""
import argparse
from pathlib import Path

import flags

PSNR_STAGE = dict(load_size=512, sampler="orig", reward=["none"], lambda_p=0.0, lambda_a=0.0, lr=2e-4)      # HGGT options of the L1 stage
PSNR = {
    "swinir": dict(milestones=[150_000, 240_000, 270_000, 285_000], usm=False),
    "rrdbnet": dict(milestones=[300_000], usm=True),
    "compact": dict(milestones=[300_000], usm=True),                              # CHOICE: as rrdbnet
}
PSNR |= {f"{name}-small": preset | dict(lr=1e-3, milestones=[]) for name, preset in PSNR.items()}
DEMO = {  # CHOICE: sized to finish in five minutes on two cores. No GAN: in so few steps rounding decides what a small one does, and hides
    # the effect of the ground truths (experiments/demo_seeds.py)
    "gan": dict(data=Path("datasets/demo"), total_steps=250, milestones=[150, 200], crop=96, load_size=128, lr=2e-3, reward=["ranker"],
                lambda_p=0.0, lambda_a=0.0, d_features=4, ema_decay=0.97, log_every=50, save_every=100, weights_every=0, val_every=0,
                sample_every=125, workers=0, threads=1),
    "psnr": dict(data=Path("datasets/demo"), total_steps=400, crop=48, load_size=64, lr=2e-3, reward=["none"], ema_decay=0.98,
                 log_every=100, save_every=200, weights_every=0, val_every=0, sample_every=200, workers=0, threads=1),
}


def parse_args(argv=None):
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--demo", action="store_true", help="demo data set, small net, short schedule, embedded reward, no VGG; same code")
    pre.add_argument("--arch", choices=list(flags.PRESETS), help="backbone; fills the defaults marked [arch] (paper: swinir, rrdbnet)")
    pre.add_argument("--stage", choices=["gan", "psnr"], default="gan", help="gan: Eq. 1; psnr: HGGT's L1-only pre-training")
    first = pre.parse_known_args(argv)[0]
    arch = first.arch or ("compact-small" if first.demo else "swinir")
    p = argparse.ArgumentParser(description=__doc__, parents=[pre], allow_abbrev=False, formatter_class=flags.Help)
    flags.add_training(p)
    g = p.add_argument_group("start and continue")
    g.add_argument("--init", type=Path, metavar="FILE",
                   help="generator weights, or a run folder; gan default runs/<arch>-psnr; psnr default: none, random")
    g.add_argument("--weights-key", choices=["params_ema", "params"],
                   help="key to take from --init; default params_ema, else params, else bare")
    g.add_argument("--resume", nargs="?", const="must", default="no", choices=["must", "auto", "no"],
                   help="continue --out from its checkpoint; auto: start if there is none (Slurm requeue)")
    g.add_argument("--out", type=Path, help="run folder (default: runs/<arch>-<sampler>, runs/<arch>-psnr)")
    psnr = first.stage == "psnr"
    p.set_defaults(arch=arch, **flags.PRESETS[arch])                              # explicit flags still win
    if psnr:
        p.set_defaults(**(PSNR_STAGE | PSNR[arch]))
    if first.demo:
        p.set_defaults(**DEMO[first.stage])
    args = p.parse_args(argv)
    args.out = args.out or Path("runs") / (f"{args.arch}-psnr" if psnr else f"{args.arch}-{args.sampler}")
    if args.init is None and not psnr:
        args.init = Path("runs") / f"{args.arch}-psnr"
    if psnr and args.sampler != "orig":
        p.error("--stage psnr trains on plain photos: its only sampler is orig")
    flags.check_training(p, args)
    if args.usm and not psnr:
        p.error("--usm belongs to --stage psnr: neither paper sharpens in GAN training")
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
import quality
import runs

FIXED = ("arch", "stage", "sampler", "reward", "degradation", "jpeg_table", "usm", "tau", "include_original", "drop_without_positive",
         "batch_size", "group_size", "pool_size", "crop", "load_size", "drop_path", "pad_mode", "d_features", "chosen_by",
         "seed", "discriminator", "samples")


def adversarial_loss(logits, real):
    """Vanilla GAN loss, binary cross-entropy with logits against 1 (real) or 0, averaged over the logit map (HGGT)."""
    return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, float(real), dtype=torch.float32))


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema <- decay * ema + (1 - decay) * net, over the parameters. One foreach call is 1.1 to 1.2 times faster than a loop (tests/tricks.py, CPU); equal bitwise there."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def adam(weights, lr, fused):
    """HGGT's Adam. Fused it is 2.6 to 2.8 times faster by itself (tests/tricks.py, CPU), which is .1 % of the step measured in README."""
    return torch.optim.Adam(weights, lr=lr, betas=(0.9, 0.99), fused=fused or None)


def restore(optimiser, state):
    """load_state_dict; whether the optimiser is fused is this run's choice, not the checkpoint's."""
    for saved, group in zip(state["param_groups"], optimiser.param_groups):
        saved["fused"] = group["fused"]
    optimiser.load_state_dict(state)


def crop_like(lq, where, size, scale=4):
    """The part of each whole LR image that belongs to its HR crop. lq (B, 3, h, w), where (B, 2) HR top and left, size in HR pixels."""
    rows = [image[:, y // scale:(y + size) // scale, x // scale:(x + size) // scale] for image, (y, x) in zip(lq, where.tolist())]
    return torch.stack(rows)


def chosen_by(dataset, run):
    """What a run's atlases are, to be pinned: {} for a run that scores online, from its beginning to its end."""
    told = " + ".join(f"{weight:g} {atlas.told}" for atlas, weight in dataset.atlases)
    pinned = bool(run.checkpoint and "chosen_by" in run.checkpoint["args"])
    return {"chosen_by": f"{told} margin {dataset.margin:g}" if told else "online"} if told or pinned else {}


def learning_rate(step, lr, milestones):
    """HGGT's scheduler starts at step 2, so milestone m acts from step m + 1."""
    return lr * 0.5 ** sum(step > m for m in milestones)


def make_pair(batch, step, lanes, args, reward, seeds, device):
    """One fresh training pair per lane: lq (b, 3, p/4, p/4) and gt (b, 3, p, p) in [0, 1], which version was chosen (b,), and
    its score (b,), None unless the sampler is amo.

    The LR image is always made from the whole original, then cropped; AMO scores the aligned crops of all versions at once.
    """
    original = batch["original"].to(device, non_blocking=True).float() / 255      # (b, 3, H, W)
    crops = batch["crops"].to(device, non_blocking=True).float() / 255            # (b, V, 3, p, p)
    if args.usm:                                                                  # HGGT's psnr stage of RRDBNet: the sharpened image is input and target
        original = degradations.usm_sharpen(original)
    lq = degradations.degrade(original, args.degradation,
                              [seeds(step, lane, "degrade") for lane in lanes],
                              [seeds(step, lane // args.group_size, "degrade-group") for lane in lanes], args.jpeg_table)
    lq = crop_like(lq, batch["where"], args.crop)
    versions = batch["version"].to(device, non_blocking=True)                     # (b, V)
    if versions.shape[1] == 1:                                                    # chosen when the sample was read
        gt = crop_like(original, batch["where"], args.crop, scale=1) if args.usm else crops[:, 0]
        return lq, gt, versions[:, 0], batch["score"].to(device, non_blocking=True) if "score" in batch else None
    with torch.no_grad():
        scores = reward(crops.flatten(0, 1)).view(versions.shape)
    index = data.pick_gt("amo", batch["candidates"].to(device, non_blocking=True), scores)[:, None]
    gt = torch.take_along_dim(crops, index[:, :, None, None, None], 1)[:, 0]
    return lq, gt, versions.gather(1, index)[:, 0], scores.gather(1, index)[:, 0]


def validation_pair(sets, i, args, seeds, device):
    """-> lq (1, 3, h, w), gt (1, 3, 4h, 4w) in [0, 1]: image i of a validation split, with its own LR image or always the same degradation."""
    gt = data.load_image(sets.path(sets.stems[i]))[None].to(device).float() / 255
    gt = data.cut_to_x4(gt)
    if sets.lq is not None:                                                        # LR images that came with the set
        return data.load_image(sets.lq[sets.stems[i]])[None].to(device).float() / 255, gt
    return degradations.degrade(gt, args.degradation, [seeds(0, i, "val")], [seeds(0, i, "val-group")], args.jpeg_table), gt


@torch.no_grad()
def validate(net, sets, args, reward, seeds, world):
    """Mean PSNR (8-bit output against the original, as evaluate.py) and mean reward over the validation images, shared over processes."""
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)             # count, PSNR, score
    for i in range(world.rank, len(sets.stems), world.size):
        lq, gt = validation_pair(sets, i, args, seeds, world.device)
        sr = degradations.to_8bit(archs.upscale_tiled(net, lq, tile=args.tile))
        psnr = quality.psnr(sr, gt)[0]
        totals += torch.stack([torch.ones_like(psnr), psnr, reward(sr)[0].double() if reward else torch.zeros_like(psnr)])
    count, psnr, score = world.reduce(totals).tolist()
    return {"psnr": psnr / count} | ({"score": score / count} if reward else {})


@torch.no_grad()
def sample_grid(net, dataset, args, reward, seeds, device, path, rows=4):
    """PNG with lq | sr | chosen gt of the first few fixed samples, each with its score, by the code that training uses."""
    lanes = range(min(rows, len(dataset), args.batch_size))
    pairs = [make_pair(data.collate([dataset.sample(1, lane)]), 1, [lane], args, reward, seeds, device)[:3] for lane in lanes]
    lq, gt, version = map(torch.cat, zip(*pairs))                                 # one by one: whole images may differ in size
    columns = {"lq": F.interpolate(lq, scale_factor=4, mode="nearest"), "sr": archs.upscale_tiled(net, lq, tile=0).clamp(0, 1), "gt": gt}
    scores = {k: [f"{s:.1f}" for s in reward(v).tolist()] if reward else [""] * len(lanes) for k, v in columns.items()}
    names = {"gt": [dataset.sets.versions[v] for v in version.tolist()]}
    data.save_grid(path, [[(images[i], " ".join([k, *names.get(k, [])[i:i + 1], scores[k][i]])) for k, images in columns.items()]
                          for i in range(len(lanes))])


def open_data(args, world, reward, seeds):
    """-> (training Sets, TrainingSet, validation Sets or None, the TrainingSet that sample grids show); ranks share static scoring."""
    if args.demo and world.is_main and args.data == DEMO["gan"]["data"] and not args.data.exists():
        from make_quintuplets import build_demo
        build_demo(args.data)
    world.barrier()
    if args.stage == "gan":
        sets, val_sets = data.find_sets(args.data, "Train"), data.find_sets(args.data, "Test")
    else:
        sets, val_sets = data.find_photos(args.data), None
    if args.val_photos:
        sets, val_sets = sets.hold_out(args.val_photos, seeds(0, 0, "val-photos"))
    needs_labels = args.sampler in data.NEEDS_LABELS or args.drop_without_positive

    def training_set(sets, atlases=()):
        labels = sets.labels() if needs_labels else None
        scores = None
        if args.sampler in data.NEEDS_SCORES:
            paths = [sets.path(stem, version) for stem in sets.stems for version in sets.versions]
            scores = iqa.score_images(paths, reward, args.score_cache, world).view(len(sets.stems), -1)
        return data.TrainingSet(sets, args.sampler, seeds, args.batch_size, args.group_size, args.crop, args.load_size, args.tau,
                                labels, scores, args.include_original, args.drop_without_positive,
                                atlases=atlases, margin=args.margin)

    dataset = training_set(sets, data.Atlas.open_all(args.atlas, sets, args.crop, reward))
    unlabelled = val_sets is not None and val_sets.label_folder is None and needs_labels
    unscored = args.sampler == "amo" and reward is None                          # an atlas knows the training images only
    shown = dataset if val_sets is None or unlabelled or unscored else training_set(val_sets)
    data.check_headers(dataset, world)
    for lane in range(min(4, len(shown), args.batch_size)):
        shown.sample(1, lane)                                                     # unsuitable test images are refused now, not hours later
    return sets, dataset, val_sets, shown


def main(args):
    world, seeds, autocast = runs.start_training(args)
    device, lanes = world.device, world.lanes(args.batch_size)
    if len(lanes) % args.accumulate:
        raise ValueError(f"--accumulate {args.accumulate} does not divide the {len(lanes)} crops of one process")

    # what costs nothing to refuse comes first
    run = runs.Run(args.out, vars(args) | {"discriminator": args.lambda_a > 0}, world, args.resume, FIXED, args.tensorboard)
    if run.start_step > args.total_steps:
        raise ValueError(f"--total-steps {args.total_steps}: {args.out} is already at step {run.start_step}")
    init = None if run.checkpoint or args.init is None else runs.find_weights(
        args.init, f"make it with: python train.py --stage psnr --arch {args.arch} --data PHOTOS, or name weights with --init FILE")
    reward = None if args.reward == ["none"] else iqa.create_reward(args.reward, device, args.reward_weights, fused=flags.FUSED[args.musiq])
    sets, dataset, val_sets, shown = open_data(args, world, reward, seeds)
    run.pin(samples=len(dataset), **chosen_by(dataset, run))

    # networks: raw_* are the plain modules that are saved, net_* what the loop calls
    start = "random start"
    torch.manual_seed(args.seed)                                                  # initial weights; nothing else uses this state
    options = {"drop_path": args.drop_path, "pad_mode": args.pad_mode} if args.arch.startswith("swinir") else {}
    raw_g = archs.ARCHS[args.arch](**options)
    raw_d = archs.UNetDiscriminatorSN(args.d_features) if args.lambda_a > 0 else None
    memory = torch.channels_last if args.channels_last else torch.contiguous_format
    vgg = archs.VGGFeatureLoss(args.vgg_weights).to(device, memory_format=memory) if args.lambda_p > 0 else None
    if init is not None:
        start = f"start from {init}, key {archs.load_weights(raw_g, init, args.weights_key)}"
    memory_g = torch.contiguous_format if args.arch.startswith("swinir") else memory
    raw_g = raw_g.to(device, memory_format=memory_g)
    ema = copy.deepcopy(raw_g).eval().requires_grad_(False)
    opt_g = adam(raw_g.parameters(), args.lr, args.fused_adam)
    if raw_d is not None:
        raw_d = raw_d.to(device, memory_format=memory)
        opt_d = adam(raw_d.parameters(), args.lr, args.fused_adam)
    state = run.checkpoint or {"pool": None, "meter": None, "picked": None}
    if run.checkpoint:
        raw_g.load_state_dict(state["net_g"])
        ema.load_state_dict(state["ema"])
        restore(opt_g, state["opt_g"])
        if raw_d is not None:
            raw_d.load_state_dict(state["net_d"])
            restore(opt_d, state["opt_d"])
    pool = data.TrainingPool(args.pool_size, args.batch_size, lanes, seeds, state["pool"], device, eight_bit=not args.usm)
    meter = runs.Meter(world, state["meter"])
    picked = torch.zeros(len(sets.versions), device=device)                       # how often each version was chosen
    if state["picked"] and world.is_main:
        picked += torch.tensor(state["picked"], device=device)
    batches = data.batches(dataset, run.start_step + 1, args.total_steps, lanes, args.workers, device.type == "cuda")
    batches = data.prefetch(batches, device)
    if run.start_step < args.total_steps:
        batches = itertools.chain([next(batches)], batches)                       # a first batch that cannot be read leaves no folder
    run.open()
    run.say(f"{args.arch}, sampler {args.sampler}: {len(dataset)} sets of {len(sets.versions)} versions ({dataset.dropped} dropped), "
            f"{world.size} process(es) on {device}; {f'from step {run.start_step}' if run.checkpoint else start}")
    if args.demo and args.stage == "gan" and args.lambda_p == 0:
        run.say("demo: VGG19 would be a download, so lambda_p is 0")
    state = run.checkpoint = None                                                 # the pool's copy alone may be 100 MB

    compiled = lambda net: torch.compile(net) if args.compile else net
    net_g = world.parallel(compiled(raw_g.train()))
    if raw_d is not None:
        judge = compiled(raw_d.train())                                           # D of the generator's loss: without DDP
        net_d = world.parallel(judge)

    def save(step, weights):
        meter.check_finite(lambda s: ", ".join(dataset.names(s)))
        state = {"net_g": raw_g.state_dict(), "ema": ema.state_dict(), "opt_g": opt_g.state_dict(), "pool": pool.state(world.gather_lanes),
                 "meter": meter.state_dict(), "picked": world.reduce(picked.clone()).tolist()}
        if raw_d is not None:
            state |= {"net_d": raw_d.state_dict(), "opt_d": opt_d.state_dict()}
        if weights and world.is_main:
            runs.save_weights(args.out / "weights" / f"ema_{step:07d}.pth", raw_g.state_dict(), ema.state_dict())
            if raw_d is not None:
                runs.save_weights(args.out / "weights" / f"net_d_{step:07d}.pth", raw_d.state_dict())
        run.save(step, state)

    due = lambda step, every: runs.due(step, args.total_steps, every)
    no_sync = lambda net, last: net.no_sync() if world.size > 1 and not last else contextlib.nullcontext()
    lambdas = {"pix": args.lambda_l1, "percep": args.lambda_p, "adv": args.lambda_a}
    stop = runs.StopSignal(world)
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

        lq, gt, version, score = make_pair(batch, step, lanes, args, reward, seeds, device)
        picked.scatter_add_(0, version, torch.ones_like(version, dtype=picked.dtype))
        lq, gt = pool.swap((lq, gt), step)                                        # training-pair pool: the winner only
        lq, gt = lq.contiguous(memory_format=memory_g), gt.contiguous(memory_format=memory)
        parts = [slice(i, i + len(lanes) // args.accumulate) for i in range(0, len(lanes), len(lanes) // args.accumulate)]
        terms, fakes = Counter(), []

        # generator, Eq. 1
        if raw_d is not None:
            raw_d.requires_grad_(False)
        opt_g.zero_grad(set_to_none=True)
        for part in parts:
            drop = {"drop_path_seeds": [seeds(step, lane, "drop-path") for lane in lanes[part]]} if args.drop_path else {}
            with no_sync(net_g, part is parts[-1]):
                with autocast():
                    sr = net_g(lq[part], **drop)
                    losses = {"pix": F.l1_loss(sr.float(), gt[part])}
                    if vgg is not None:
                        losses["percep"] = vgg(sr, gt[part])
                    if raw_d is not None:
                        losses["adv"] = adversarial_loss(judge(sr), real=True)
                loss_g = sum(lambdas[name] * loss for name, loss in losses.items())
                (loss_g / len(parts)).backward()
            fakes.append(sr.detach())
            terms.update({name: loss.detach() / len(parts) for name, loss in losses.items()})
        if args.clip_grad:
            torch.nn.utils.clip_grad_norm_(raw_g.parameters(), args.clip_grad)
        opt_g.step()
        update_ema(ema, raw_g, args.ema_decay)

        # discriminator: real = the chosen GT, fake = SR. No forward pass is shared: D's of the generator's loss and these two each come after another power iteration of the
        # spectral norm. Both in one batch would do one iteration instead of two, which is another D, and is not faster (x1.01, x0.99, tests/tricks.py, CPU)
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
        if due(step, args.save_every) or due(step, args.weights_every) or stopping:
            save(step, weights=due(step, args.weights_every))
        if due(step, args.val_every) and val_sets is not None:
            values = validate(ema, val_sets, args, reward, seeds, world)
            run.say(f"step {step:07d} validation, {len(val_sets.stems)} images: " + " ".join(f"{k} {v:.3f}" for k, v in values.items()))
            run.event(step, "val", **values)
        if due(step, args.sample_every) and args.sample_every and world.is_main:
            sample_grid(ema, shown, args, reward, seeds, device, args.out / "samples" / f"{step:07d}.png")
        if stopping:
            run.say(f"stopped by a signal at step {step}; continue with --resume")
            return
    run.say(f"done: {args.out / 'weights' / f'ema_{args.total_steps:07d}.pth'}")


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
