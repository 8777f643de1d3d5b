"""Stage 1 of HR-aware self-supervision: learn from sharp photographs alone how images are degraded (Eq. 5).

    python -m selfsup.pretrain --demo                                              small and short, on a CPU
    torchrun --nproc_per_node 4 -m selfsup.pretrain --hr DIV2K/train_HR            the method; leaves runs/rec-hra
    python -m selfsup.pretrain --hr DIV2K/train_HR --arch lway                     LWay; leaves runs/rec-lway

An encoder sees how a low-resolution image X was degraded, and a reconstructor makes X again from the high-resolution
image and that embedding. Pairs are synthetic. Each row of Table 2 needs a pre-training of its own:

    row 1, baseline    --s-rule one --no-far        row 2, + controller    --no-far        row 3, + FAR    --s-rule one
    Table 3            --far-enc sr --far-sr FILE | vgg | clip

Leaves OUT/weights/rec.pth, the networks with their settings, which finetune and probe follow.
"""
import argparse
from pathlib import Path

import runs
from selfsup import options

# channels of all three networks; residual blocks of degradation encoder, image encoder and reconstructor; length of the
# embedding
SIZES = {
    # PAPER: 64 channels and 6 blocks of the image encoder, 16 blocks of the degradation encoder, 512 numbers (LWAY:
    # 2048 may help). CHOICE: the rest
    "paper": dict(width=64, blocks=[16, 6, 4], dim=512),
    # CHOICE: trains in minutes on two cores
    "small": dict(width=16, blocks=[3, 2, 4], dim=512),
    "tiny": dict(width=8, blocks=[2, 2, 2], dim=64),
}
# CHOICE: sized so that all stages end within three minutes on two cores
DEMO = dict(hr=options.DEMO_SET, out=options.DEMO_REC, patch=16, load_size=96, degradation="blur", batch_size=4,
            group_size=2, val_photos=1, size="tiny", deg_enc="bands", distance="proxy", far_enc="rand", lr=2e-3,
            total_steps=1250, ema_decay=0.97, log_every=250, save_every=250, val_every=250, workers=0, threads=1)


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--demo", action="store_true", help="the demo set, tiny networks, no download; same code")
    g = p.add_argument_group("data")
    g.add_argument("--hr", type=Path, default=Path("datasets/DIV2K_train_HR"), metavar="DIR",
                   help="sharp photographs (PAPER: DIV2K's training images)")
    g.add_argument("--val-photos", type=runs.SIZE, default=8, help="photographs held out for the checks (CHOICE)")
    g.add_argument("--degradation", choices=runs.literal("degradations", "PRESETS"), default="realesrgan",
                   help="preset of degradations.py (PAPER: second order, realesrgan; lr-grid, CHOICE: a camera's order,"
                        " blur, then noise and JPEG on the LR grid; blur: noise and JPEG before shrinking)")
    g.add_argument("--load-size", type=runs.SIZE, default=400,
                   help="window of the photograph that is degraded, in HR pixels (Real-ESRGAN)")
    g.add_argument("--group-size", type=runs.SIZE, default=4,
                   help="samples that share a group's draws, see degradations.py (CHOICE)")
    g = p.add_argument_group("networks")
    g.add_argument("--arch", choices=["hra", "lway"], default="hra",
                   help="hra: the method; lway: no image encoder, no controller, no FAR")
    g.add_argument("--size", choices=list(SIZES), default="paper", help="widths and depths, see SIZES in this file")
    g.add_argument("--deg-enc", choices=["conv", "bands"], default="conv",
                   help="degradation encoder: convolutions (PAPER) or, for short runs, strengths of bands (CHOICE)")
    g.add_argument("--skip", action=argparse.BooleanOptionalAction,
                   help="X^ = mean of every 4 x 4 pixels of Y, plus R less its mean (CHOICE), so that colours are "
                        "right and it begins as a down-sampling; PAPER and LWAY: X^ = R; default: on, and what a run "
                        "that is continued began with")
    g.add_argument("--distance", choices=["lpips", "vgg", "proxy"], default="lpips",
                   help="perceptual part of L_rec and distance of the controller: lpips (LWAY; CHOICE: VGG for L_rec, "
                        "AlexNet for the controller), vgg: cosine of VGG19's features, proxy: no weights")
    g.add_argument("--vgg-stages", type=runs.number(int, 1, 5), default=5,
                   help="of --distance vgg (CHOICE); 2 takes a quarter of the time, but d is so small that Eq. 8 asks R"
                        " for an s that it has not seen")
    g.add_argument("--far-enc", choices=["clip", "vgg", "sr", "rand"], default="clip",
                   help="established encoder of FAR (Table 3): CLIP RN50 (PAPER), VGG19, a x4 network, random")
    options.add_files(p)
    g = p.add_argument_group("losses (Eq. 5-11)")
    g.add_argument("--s-rule", choices=["eq8", "one"], help="controller; one: none; default: eq8, with --arch lway one")
    g.add_argument("--far", action=argparse.BooleanOptionalAction,
                   help="feature-alignment regulariser; default: on, with --arch lway off")
    g.add_argument("--lambda-pt", default="auto", type=options.weight_or_auto,
                   help="weight of FAR; auto: as large as L_rec over the first 100 steps (CHOICE, not published)")
    g.add_argument("--n-std", type=runs.WEIGHT, default=1.0, help="of the controller's noise n (PAPER: 1)")
    options.add_training(p)
    p.set_defaults(batch_size=16, total_steps=500_000, lr=2e-4, log_every=100, save_every=5_000, val_every=10_000)
    if p.parse_known_args(argv)[0].demo:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    needed = 4 * args.patch
    if args.load_size < needed or args.load_size % 4:
        p.error(f"--load-size {args.load_size} must be a multiple of 4 and at least {needed}, four times --patch")
    if args.degradation == "realesrgan" and args.load_size < 80:
        p.error("--degradation realesrgan shrinks to 15 % before it blurs: --load-size must be at least 80")
    lway = args.arch == "lway"
    args.s_rule = args.s_rule or ("one" if lway else "eq8")
    if lway and args.far:
        p.error("--arch lway --far: FAR aligns the image encoder, and LWay has none")
    args.far = not lway if args.far is None else args.far
    if not args.far and args.lambda_pt != "auto":
        p.error(f"--lambda-pt {args.lambda_pt:g} weighs FAR, which is off")
    if args.far and args.far_enc == "sr" and not args.far_sr:
        p.error("--far-enc sr: which network? --far-sr PATH")
    args.out = args.out or Path("runs") / f"rec-{args.arch}"
    return args


# --help and flag errors need no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import copy
import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F

import archs
import data
import metrics
from selfsup import encoders
from selfsup import networks as rec

# CHOICE: the paper does not say which feature of CLIP
FAR_LAYER = "layer1"
# CHOICE: the formula of Eq. 10 has each channel's correlation with itself; the text ("to others") leaves it out, True
OFFDIAG = False
FIXED = ("arch", "deg_enc", "s_rule", "far", "far_enc", "far_layer", "offdiag", "distance", "vgg_stages", "percep",
         "degradation", "patch", "load_size", "batch_size", "group_size", "width", "blocks", "dim", "lambda_pt",
         "total_steps", "lr", "ema_decay", "seed", "n_std", "val_photos", "samples", "looked_through")
# flags of earlier commits, and the only value that still is possible
RETIRED = {"encoder_from": 0}


@torch.no_grad()
def check_pretraining(net, held_out, distance, hqi, encoder, s_rule, means=None):
    """Means over held-out pairs, without noise.

    l1, d, far; PSNR and perceptual distance to lq of the reconstruction, and of two images that it must beat: a
    reconstruction with other images' embeddings (_shuffled) and bicubic down-sampling (_bicubic). explained: see below,
    with its `means`.
    """
    sums, aligned = {}, []
    for lq, hr in held_out:
        d = rec.hqi_distance(hqi, lq, hr)
        s = rec.controller(s_rule, d, pretrain=True)
        again, far = net(lq, hr, s, encoder and encoder(hr), offdiag=OFFDIAG)
        shuffled = net(lq, hr, s, shuffle=True)[0]
        down = F.interpolate(hr, scale_factor=0.25, mode="bicubic", antialias=True)
        values = rec.reconstruction_loss(distance, again, lq) | {"d": d}
        for name, image in (("", again), ("_shuffled", shuffled), ("_bicubic", down)):
            values[f"psnr{name}"] = metrics.psnr(image.clamp(0, 1), lq, border=0)
            values[f"percep{name}"] = distance(image, lq)
        if far is not None:
            values["far"] = far
            aligned.append(net.aligned(net.e_img(hr), encoder(hr), OFFDIAG))
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.sum().item()
    averages = {name: value / sum(len(lq) for lq, _ in held_out) for name, value in sums.items()}
    return averages | ({"explained": explained(aligned, means)} if aligned else {})


@torch.no_grad()
def mean_descriptors(encoder, batches):
    """[mean S_avg, mean S_max] of the established encoder over batches of lq, hr."""
    each = [rec.descriptors(encoder(hr), OFFDIAG) for _, hr in batches]
    return [torch.cat(part).mean(0) for part in zip(*each)]


def explained(aligned, means):
    """Share of the energy of the established descriptors that T predicts, S_avg and S_max together, as in FAR.

    aligned: [Reconstruction.aligned of a batch]. Energy is the squared length of what differs from `means`, the mean
    descriptors of training photographs, which T's bias alone predicts. 1: all of it; 0 or less: no better than the
    mean, so FAR is blind to what is in an image.
    """
    pairs = [(*pair, mean) for parts in aligned for pair, mean in zip(parts, means)]
    error = sum((ours - established).double().square().sum() for ours, established, _ in pairs)
    return (1 - error / sum((established - mean).double().square().sum() for _, established, mean in pairs)).item()


def warnings(values):
    """Which of the two images that the reconstruction must beat it does not beat, and whether FAR is blind, as text."""
    texts = []
    for bar, name in (("bicubic down-sampling's", "bicubic"), ("with the embeddings of other images", "shuffled")):
        if not values["psnr"] > values[f"psnr_{name}"]:
            texts.append(f"psnr is no better than {bar}")
        if not values["percep"] < values[f"percep_{name}"]:
            texts.append(f"percep is no better than {bar}")
    if values.get("explained", 1) < rec.EXPLAINED:
        texts.append(f"T predicts {values['explained']:.0%} of the descriptors' energy, too little for FAR")
    return "".join(f"; WARNING, {text}" for text in texts)


def main(args):
    world, seeds, autocast = runs.start_training(args.device, args.threads, args.seed, args.precision)
    device, lanes = world.device, world.lanes(args.batch_size)
    size = SIZES[args.size]
    fixed_here = {"far_layer": FAR_LAYER, "offdiag": OFFDIAG, "percep": rec.PERCEP}
    record = {name: value for name, value in (vars(args) | size | fixed_here).items() if name != "skip"}
    run = runs.Run(args.out, record, world, args.resume, FIXED, RETIRED, args.tensorboard)
    if args.demo and args.hr in options.DEMO_COMMANDS:
        options.make_demo_start([args.hr], world, args.device)
    far_enc = args.far_enc if args.far else None
    distance, hqi, encoder = encoders.open_frozen(device, args.distance, args.vgg_stages, far_enc, FAR_LAYER,
                                                  args.vgg_weights, args.clip_weights, args.far_sr, args.precision)
    looked_through = encoders.hashes_of(distance, hqi, encoder)
    sets, val_sets = data.find_photos(args.hr, "--hr").hold_out(args.val_photos, seeds(0, 0, "val-photos"))

    def check_seeds(step, lane, purpose):
        return seeds(step, lane, f"check {purpose}")
    dataset = data.TrainingSet(sets, "orig", seeds, args.batch_size, args.group_size, 4 * args.patch, args.load_size)
    val_set = data.TrainingSet(val_sets, "orig", check_seeds, args.batch_size, 1, 4 * args.patch, args.load_size)
    for photos in (dataset, val_set):
        data.check_headers(photos, world)
    run.pin(samples=len(dataset), looked_through=looked_through)
    pairs = data.synthetic_pairs(dataset, seeds, device, args.degradation, args.patch, args.group_size)
    val_pairs = data.synthetic_pairs(val_set, check_seeds, device, args.degradation, args.patch, 1)
    held_out = [val_pairs(1, range(k, k + 8)) for k in range(0, 32, 8)]
    means = encoder and mean_descriptors(encoder, [pairs(1, range(k, k + 8)) for k in range(0, 32, 8)])
    check = partial(check_pretraining, held_out=held_out, distance=distance, hqi=hqi, encoder=encoder,
                    s_rule=args.s_rule, means=means)

    # initial weights; nothing else uses this state
    torch.manual_seed(args.seed)
    # a resumed run goes on as it began, earlier commits' without
    skip = run.checkpoint["args"].get("skip", False) if run.checkpoint else args.skip is not False
    if args.skip not in (None, skip):
        raise runs.UserError(f"--resume {args.out}: it began with --{'' if skip else 'no-'}skip")
    run.pin(skip=skip)
    sizes = {**size, "image_encoder": args.arch == "hra", "far_channels": encoder.channels if args.far else 0,
             "bands": args.deg_enc == "bands", "skip": skip}
    raw = rec.Reconstruction(**sizes)
    raw = raw.to(device, memory_format=archs.memory_format(raw, args.precision))
    ema = copy.deepcopy(raw).eval().requires_grad_(False)
    # two groups, as the checkpoints of earlier commits have them
    others = [p for name, p in raw.named_parameters() if not name.startswith("e_deg.")]
    # PAPER
    opt = torch.optim.Adam([{"params": raw.e_deg.parameters()}, {"params": others}], lr=args.lr, betas=(0.9, 0.999))
    state = run.checkpoint or {"meter": None, "balance": torch.zeros(2)}
    if run.checkpoint:
        raw.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        opt.load_state_dict(state["opt"])
    # sums of L_rec and FAR over the first 100 steps
    meter, balance = runs.Meter(world, state["meter"]), state["balance"].to(device)
    batches = data.batches(dataset, run.start_step + 1, args.total_steps, lanes, args.workers, device.type == "cuda")
    batches = data.prefetch(batches, device)
    if run.start_step < args.total_steps:
        # a first batch that cannot be read leaves no folder
        batches = itertools.chain([next(batches)], batches)
    run.open()
    run.say(f"{args.arch}, controller {args.s_rule}, FAR {far_enc or 'off'}, distance {args.distance}: "
            f"{sum(p.numel() for p in raw.parameters()):,} weights, {len(dataset)} photos, {len(val_set)} held out, "
            f"{world.size} process(es) on {device}" + (f"; from step {run.start_step}" if run.checkpoint else ""))
    net = world.parallel(raw.train())

    def samples_of(step):
        return ", ".join(dataset.names(step))

    def save(step):
        meter.check_finite(samples_of, raw)
        run.save(step, {"net": raw.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict(),
                        "meter": meter.state_dict(), "balance": balance.cpu()})

    def due(step, every):
        return runs.due(step, args.total_steps, every)

    def far_weight():
        return balance[0] / balance[1] if args.lambda_pt == "auto" else args.lambda_pt
    stop, held = runs.StopSignal(world), None
    for step in run.steps(args.total_steps):
        with meter.waiting():
            batch = next(batches)
        lr = args.lr * (1 + math.cos(math.pi * step / args.total_steps)) / 2
        for group in opt.param_groups:
            group["lr"] = lr
        lq, hr = pairs(step, lanes, batch)
        noise = rec.noise_maps(raw, [seeds(step, lane, "noise") for lane in lanes], lq.shape[2:], device)
        with autocast():
            s, d = 1.0, None
            if args.s_rule != "one":
                d = rec.hqi_distance(hqi, lq, hr)
                n = rec.embedding_noise(raw, [seeds(step, lane, "n") for lane in lanes], args.n_std, device)
                s = rec.controller(args.s_rule, d, n, pretrain=True)
            with torch.no_grad():
                e_clip = encoder and encoder(hr)
            again, far = net(lq, hr, s, e_clip, noise, offdiag=OFFDIAG)
        terms = {name: value.mean() for name, value in rec.reconstruction_loss(distance, again.float(), lq).items()}
        loss = terms["l1"] + rec.PERCEP * terms["percep"]
        if far is not None:
            terms["far"] = far.mean()
            if args.lambda_pt == "auto" and step <= 100:
                balance += world.reduce(torch.stack([loss, terms["far"]]).detach())
            loss = loss + far_weight() * terms["far"]
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        runs.update_ema(ema, raw, args.ema_decay)
        if d is not None:
            terms |= {"d": d.mean(), "s": rec.controller(args.s_rule, d, pretrain=True).mean()}
        meter.add(step, **terms)
        if step == 100 and far is not None and args.lambda_pt == "auto":
            run.say(f"weight of FAR from now on: {far_weight().item():.4g}")
        if due(step, args.log_every):
            meter.check_finite(samples_of)
            run.progress(step, args.total_steps, meter, lr, {})
        stopping = stop.requested(step)
        # before saving: a saved step has its check
        if due(step, args.val_every):
            held = check(ema)
            run.say(f"step {step} held out: {' '.join(f'{k} {v:.4g}' for k, v in held.items())}{warnings(held)}")
            run.event(step, "val", **held)
        if due(step, args.save_every) or stopping:
            save(step)
        if stopping and step < args.total_steps:
            run.say(f"stopped by a signal at step {step}; continue with --resume")
            return
    file = args.out / "weights" / "rec.pth"
    if world.is_main and not file.exists():
        # of the last step; None where a finished run has lost its file
        held = held or check(ema)
        as_given = ("s_rule", "distance", "vgg_stages", "degradation", "patch", "load_size", "n_std")
        settings = {"sizes": sizes, **{name: getattr(args, name) for name in as_given},
                    "lambda_pt": float(far_weight()) if args.far else args.lambda_pt, "offdiag": OFFDIAG,
                    "far_enc": far_enc, "far_layer": FAR_LAYER, "looked_through": looked_through,
                    "mean_d": held["d"], "held_out": held}
        weights = {"params_ema": ema.state_dict(), "params": raw.state_dict(), "settings": settings}
        runs.write_atomic(file, partial(torch.save, weights))
        run.say(f"done: {file}")


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
