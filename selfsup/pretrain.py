"""Stage 1 of selfsup.py: train degradation encoder, image encoder and reconstructor on sharp photos and what a synthetic degradation makes of them (Eq. 5)."""
import copy
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

import archs
import data
import degradations
from selfsup import encoders as features
import iqa
import metrics
from selfsup import networks as rec
import runs

FIXED = ("arch", "deg_enc", "s_rule", "far", "far_enc", "far_layer", "offdiag", "distance", "vgg_stages", "percep", "degradation", "patch", "load_size", "batch_size", "group_size",
         "width", "blocks", "dim", "lambda_pt", "total_steps", "lr", "encoder_from", "ema_decay", "seed", "n_std", "val_photos", "samples", "looked_through")


def networks(args, device):
    """-> distance of L_rec, distance of HQI, established encoder of FAR or None"""
    distances = metrics.create_distances(args.distance, args.vgg_weights, args.vgg_stages)
    sr = None
    if args.far and args.far_enc == "sr":
        if args.far_sr is None:
            raise runs.UserError("--far-sr PATH: the network whose features FAR looks at is needed")
        sr = archs.load_x4(args.far_sr, "--far-sr")[0]
    encoder = features.create_encoder(args.far_enc, args.far_layer, args.vgg_weights, args.clip_weights, sr).to(device) if args.far else None
    return *(d.to(device) for d in distances), encoder


def weights_of(*nets):
    """Hashes of what is looked through, so that both stages look through the same."""
    return [None if net is None else iqa.tensors_hash(net) for net in nets]


def check_weights(settings, distance, hqi, encoder):
    """ValueError unless these are what stage 1 looked through; encoder None: not looked through."""
    for what, here, there in zip(("--distance", "--distance", "FAR's encoder"), weights_of(distance, hqi, encoder), settings["looked_through"]):
        if here is not None and here != there:
            raise runs.UserError(f"{what}: other weights than stage 1 had; name the same files (--vgg-weights, --clip-weights, --far-sr) as in pretraining")


def embedding_noise(net, args, seeds, step, lanes, device):
    """n of Eq. 8, (b, dim), from each sample's own seed."""
    return args.n_std * torch.stack([degradations.normal_field((net.dim,), seeds(step, lane, "n"), device) for lane in lanes])


@torch.no_grad()
def check_pretraining(net, held_out, distance, hqi, encoder, args):
    """Means over held-out pairs, without noise: l1, d, far; psnr and perceptual distance to lq of the reconstruction, of one with other images' embeddings, and of
    bicubic down-sampling, both of which it must beat."""
    sums = {}
    for lq, hr in held_out:
        d = rec.hqi_distance(hqi, lq, hr)
        s = rec.controller(args.s_rule, d, pretrain=True)
        again, far = net(lq, hr, s, encoder and encoder(hr), offdiag=args.offdiag)
        shuffled, down = net(lq, hr, s, shuffle=True)[0], F.interpolate(hr, scale_factor=0.25, mode="bicubic", antialias=True)
        values = rec.reconstruction_loss(distance, again, lq) | {"d": d}
        for name, image in (("", again), ("_shuffled", shuffled), ("_bicubic", down)):
            values |= {f"psnr{name}": metrics.psnr(image.clamp(0, 1), lq, border=0), f"percep{name}": distance(image, lq)}
        for name, value in (values if far is None else values | {"far": far}).items():
            sums[name] = sums.get(name, 0) + value.sum().item()
    return {name: value / sum(len(lq) for lq, _ in held_out) for name, value in sums.items()}


def pretrain(args):
    world, seeds, autocast = runs.start_training(args.device, args.threads, args.seed, args.precision)
    device, lanes = world.device, world.lanes(args.batch_size)
    run = runs.Run(args.out, vars(args), world, args.resume, FIXED, tensorboard=args.tensorboard)
    distance, hqi, encoder = networks(args, device)
    sets, val_sets = data.find_photos(args.hr, "--hr").hold_out(args.val_photos, seeds(0, 0, "val-photos"))
    check_seeds = lambda step, lane, purpose: seeds(step, lane, f"check {purpose}")
    dataset, val_set = (data.TrainingSet(some, "orig", draw, args.batch_size, group, 4 * args.patch, args.load_size)
                        for some, draw, group in ((sets, seeds, args.group_size), (val_sets, check_seeds, 1)))
    for photos in (dataset, val_set):
        data.check_headers(photos, world)
    run.pin(samples=len(dataset), looked_through=weights_of(distance, hqi, encoder))
    draw = data.synthetic_pairs(val_set, check_seeds, device, args.degradation, args.patch, 1)
    held_out = [draw(1, range(k, k + 8)) for k in range(0, 32, 8)]

    torch.manual_seed(args.seed)                                                  # initial weights; nothing else uses this state
    sizes = {"width": args.width, "blocks": args.blocks, "dim": args.dim, "image_encoder": args.arch == "hra", "far_channels": encoder.channels if args.far else 0, "bands": args.deg_enc == "bands"}
    raw = rec.Reconstruction(**sizes).to(device)
    ema = copy.deepcopy(raw).eval().requires_grad_(False)
    opt = torch.optim.Adam([{"params": part} for part in (raw.e_deg.parameters(), [p for name, p in raw.named_parameters() if not name.startswith("e_deg.")])],
                           lr=args.lr, betas=(0.9, 0.999))                        # PAPER
    state = run.checkpoint or {"meter": None, "balance": torch.zeros(2)}
    if run.checkpoint:
        raw.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        opt.load_state_dict(state["opt"])
    meter, balance = runs.Meter(world, state["meter"]), state["balance"].to(device)         # sums of L_rec and FAR over the first 100 steps
    batches = data.prefetch(data.batches(dataset, run.start_step + 1, args.total_steps, lanes, args.workers, device.type == "cuda"), device)
    if run.start_step < args.total_steps:
        batches = itertools.chain([next(batches)], batches)                       # a first batch that cannot be read leaves no folder
    run.open()
    run.say(f"{args.arch}, controller {args.s_rule}, FAR {args.far_enc if args.far else 'off'}, distance {args.distance}: {sum(p.numel() for p in raw.parameters()):,} weights, "
            f"{len(dataset)} photos, {len(val_set)} held out, {world.size} process(es) on {device}" + (f"; from step {run.start_step}" if run.checkpoint else ""))
    net = world.parallel(raw.train())
    draw = data.synthetic_pairs(dataset, seeds, device, args.degradation, args.patch, args.group_size)

    def save(step):
        meter.check_finite(lambda s: ", ".join(dataset.names(s)))
        run.save(step, {"net": raw.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict(), "meter": meter.state_dict(), "balance": balance.cpu()})

    stop, due = runs.StopSignal(world), lambda step, every: runs.due(step, args.total_steps, every)
    if run.start_step == args.total_steps:
        run.say(f"nothing to do: {args.out} is finished; remove it to train again")
    for step in range(run.start_step + 1, args.total_steps + 1):
        with meter.waiting():
            batch = next(batches)
        lr = args.lr * (1 + math.cos(math.pi * step / args.total_steps)) / 2
        opt.param_groups[0]["lr"], opt.param_groups[1]["lr"] = lr * (step > args.encoder_from), lr
        lq, hr = draw(step, lanes, batch)
        d = rec.hqi_distance(hqi, lq, hr) if args.s_rule != "one" else None
        noise = rec.noise_maps(raw, [seeds(step, lane, "noise") for lane in lanes], lq.shape[2:], device)
        with autocast():
            s = 1.0 if d is None else rec.controller(args.s_rule, d, embedding_noise(raw, args, seeds, step, lanes, device), pretrain=True)
            with torch.no_grad():
                theirs = encoder and encoder(hr)
            again, far = net(lq, hr, s, theirs, noise, offdiag=args.offdiag)
        terms = {name: value.mean() for name, value in rec.reconstruction_loss(distance, again.float(), lq).items()}
        loss = terms["l1"] + args.percep * terms["percep"]
        if far is not None:
            terms["far"] = far.mean()
            if args.lambda_pt == "auto" and step <= 100:
                balance += world.reduce(torch.stack([loss, terms["far"]]).detach())
            loss = loss + (balance[0] / balance[1] if args.lambda_pt == "auto" else args.lambda_pt) * terms["far"]
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        runs.update_ema(ema, raw, args.ema_decay)
        meter.add(step, **terms, **({} if d is None else {"d": d.mean(), "s": rec.controller(args.s_rule, d, pretrain=True).mean()}))
        if step == 100 and far is not None and args.lambda_pt == "auto":
            run.say(f"weight of FAR from now on: {(balance[0] / balance[1]).item():.4g}")
        if due(step, args.log_every):
            meter.check_finite(lambda s: ", ".join(dataset.names(s)))
            run.progress(step, args.total_steps, meter, lr, {})
        stopping = stop.requested(step)
        if due(step, args.save_every) or stopping:
            save(step)
        if due(step, args.val_every):
            values = check_pretraining(ema, held_out, distance, hqi, encoder, args)
            weak = [f"{m} no better than {bar}" for bar, name in (("of bicubic down-sampling", "bicubic"), ("with the embeddings of other images", "shuffled")) for m, better in (("psnr", np.greater), ("percep", np.less))
                    if not better(values[m], values[f"{m}_{name}"])]
            run.say(f"step {step:07d} held out: " + " ".join(f"{k} {v:.4g}" for k, v in values.items()) + "".join(f"; WARNING, {text}" for text in weak))
            run.event(step, "val", **values)
        if stopping and step < args.total_steps:
            run.say(f"stopped by a signal at step {step}; continue with --resume")
            return
    file = args.out / "weights" / "rec.pth"
    if world.is_main and not file.exists():
        frozen = (balance[0] / balance[1]).item() if args.far and args.lambda_pt == "auto" else args.lambda_pt
        settings = {"sizes": sizes, "lambda_pt": frozen, "looked_through": weights_of(distance, hqi, encoder), "far_enc": args.far_enc if args.far else None, "mean_d": check_pretraining(ema, held_out, distance, hqi, encoder, args)["d"],
                    **{name: getattr(args, name) for name in ("s_rule", "far_layer", "offdiag", "distance", "vgg_stages", "degradation", "patch", "load_size", "n_std")}}
        runs.write_atomic(file, lambda t: torch.save({"params_ema": ema.state_dict(), "params": raw.state_dict(), "settings": settings}, t))
        run.say(f"done: {file}")
