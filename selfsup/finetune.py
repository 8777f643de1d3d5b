"""Stage 2 of selfsup.py: train a x4 network so that its output, degraded again by the frozen networks of stage 1, is the low-resolution image (Eq. 6)."""
import copy
import itertools
import math

import torch

import archs
import data
import degradations
import lora
import metrics as quality
from selfsup import networks as rec
import runs
import metrics as scoring
from images import image_size, load_image, match_images, save_image
from selfsup.pretrain import check_weights, embedding_noise, networks

FIXED = ("rec_hash", "sr_hash", "s_rule", "far", "far_path", "hf", "percep", "patch", "batch_size", "lambda_ft", "far_rho", "lr", "ema_decay", "clip_grad", "seed", "n_std", "stop", "patience",
         "check_patches", "hold_out", "images")
DRIFT, FAR_LOSS = 2.0, 1.05                                                       # CHOICE: grey levels, and times FAR before: warned about beyond these


class Judge:
    """The frozen part: how well R makes the LR image again from M(X), and FAR. shift: (s0, d0) of --s-rule shifted."""

    def __init__(self, args, net, distance, hqi, encoder, shift):
        self.args, self.net, self.distance, self.hqi, self.encoder, self.shift = args, net, distance, hqi, encoder, shift

    def __call__(self, lq, sr, noise=0.0):
        """-> {"rec", "l1", "percep", "d", "s"[, "far"]} of (b,); rec is l1 + --percep x percep, noise is n of Eq. 8, s is without it."""
        d = rec.hqi_distance(self.hqi, lq, sr)
        s = rec.controller(self.args.s_rule, d, noise, shift=self.shift)
        mean_s = rec.controller(self.args.s_rule, d, shift=self.shift)
        again, far = self.net(lq, sr, s, self.encoder and self.encoder(sr), offdiag=self.args.offdiag, path=self.args.far_path)
        terms = rec.reconstruction_loss(self.distance, again.float(), lq, rec.high_frequency_map(lq) if self.args.hf else None)
        terms = {"rec": terms["l1"] + self.args.percep * terms["percep"], **terms, "d": d, "s": torch.ones_like(d) if isinstance(mean_s, float) else mean_s[:, 0]}
        return terms if far is None else terms | {"far": far}


def gradient_ratio(judge, net, draw, world, batches=10):
    """lambda_ft = auto: --far-rho times |d L_rec / d M(X)| / |d FAR / d M(X)|, both averaged over the samples of the first batches of all processes."""
    pulls = []
    for step in range(1, batches + 1):
        lq, noise = draw(step)
        with torch.no_grad():
            sr = net(lq)
        terms = judge(lq, sr.requires_grad_(), noise)
        pulls.append(torch.stack([torch.autograd.grad(terms[name].sum(), sr, retain_graph=True)[0].flatten(1).norm(dim=1).mean() for name in ("rec", "far")]))
    both = world.reduce(torch.stack(pulls).mean(0))
    ratio = (judge.args.far_rho * both[0] / both[1]).item()
    if not 0 < ratio < math.inf:
        raise runs.UserError(f"--lambda-ft auto: the ratio of the gradients is {ratio}: give a number")
    return ratio


@torch.no_grad()
def check(net, patches, judge, items, metrics, tile, world, colours=None):
    """-> means over the fixed patches (the judge's terms without noise; drift: how far mean colours moved, in grey levels), and of `metrics` over whole
    images, shared over processes; and the mean colours, (patches, 3)."""
    sr = torch.cat([net(part) for part in patches.split(8)])
    terms = [judge(a, b) for a, b in zip(patches.split(8), sr.split(8))]
    values = {name: torch.cat([t[name] for t in terms]).mean().item() for name in terms[0]}
    now = sr.clamp(0, 1).mean((2, 3))
    values["drift"] = 0.0 if colours is None else 255 * (now - colours).abs().mean().item()
    sums = torch.zeros(len(metrics), dtype=torch.float64, device=world.device)
    for paths in items[world.rank::world.size] if metrics else []:
        lq, gt = (path and load_image(path)[None].to(world.device).float() / 255 for path in paths)
        whole = degradations.to_8bit(archs.upscale_tiled(net, lq, tile=tile))
        sums += torch.stack([metric(whole, gt).double().mean() for metric in metrics.values()]).to(sums)
    return values | (dict(zip(metrics, (world.reduce(sums) / len(items)).tolist())) if metrics else {}), now


def warnings(first, last):
    """What may have gone wrong between two checks, in words."""
    found = [f"colours moved by {last['drift']:.1f} grey levels"] if last["drift"] > DRIFT else []
    if last["rec"] < first["rec"] and last.get("far", 0) > FAR_LOSS * first.get("far", 0):
        found.append("the reconstruction gained while FAR lost: the output may be degrading")
    return "".join(f"WARNING, {text}. " for text in found)


def open_reconstruction(args):
    """-> the frozen networks of --rec, and its settings; fills the arguments that stage 1 decides."""
    file = args.rec / "weights" / "rec.pth" if args.rec.is_dir() else args.rec
    if not file.is_file():
        raise runs.UserError(f"--rec {args.rec}: no reconstruction network there; make it with: python -m selfsup pretrain --hr PHOTOS")
    net, settings = rec.load_reconstruction(file)
    plain, has_far = settings["s_rule"] == "one", settings["far_enc"] is not None
    args.s_rule = args.s_rule or settings["s_rule"]
    args.far = has_far if args.far is None else args.far
    if plain != (args.s_rule == "one"):
        raise runs.UserError(f"--s-rule {args.s_rule}: {file} was trained {'without' if plain else 'with'} a controller, so its embeddings mean something else; pretrain one for each")
    if args.stop == "far" and not args.far:
        raise runs.UserError("--stop far: FAR is off here (--no-far, or a --rec without it): --stop fixed")
    if args.far and not has_far:
        raise runs.UserError(f"--far: {file} was trained without; selfsup.py pretrain --far makes one with it")
    for name in ("distance", "vgg_stages", "far_enc", "far_layer", "offdiag"):
        setattr(args, name, settings[name])
    args.n_std = settings["n_std"] if args.n_std is None else args.n_std
    args.rec_hash = lora.base_hash(net)
    return net, settings


def open_images(args):
    """-> Sets of the LR images, {stem: ground truth}; ValueError for sizes that cannot be."""
    if not args.lr_dir.is_dir():
        raise runs.UserError(f"--lr-dir {args.lr_dir}: no such folder")
    sets = data.find_photos(args.lr_dir)
    gts = match_images(args.gt_dir, sets.stems, "--gt-dir") if args.gt_dir else {}
    for stem in sets.stems:
        wide, high = image_size(sets.path(stem))
        if min(wide, high) < args.patch:
            raise runs.UserError(f"{sets.path(stem)}: {wide}x{high} pixels, smaller than a patch: " + (f"--patch {min(wide, high) // 4 * 4} or less, or leave it out" if min(wide, high) >= 16 else "leave it out"))
        if stem in gts and image_size(gts[stem]) != (4 * wide, 4 * high):
            raise runs.UserError(f"{gts[stem]}: {'x'.join(map(str, image_size(gts[stem])))} pixels, expected four times its LR image's {wide}x{high}")
    return sets, gts


def finetune(args):
    world, seeds, autocast = runs.start_training(args.device, args.threads, args.seed, args.precision)
    sets, gts = open_images(args)
    net, settings = open_reconstruction(args)
    distance, hqi, encoder = networks(args, world.device)
    check_weights(settings, distance, hqi, encoder)
    judge = Judge(args, net.to(world.device), distance, hqi, encoder, (settings["mean_d"], 0.0))
    stop = runs.StopSignal(world)
    if not args.per_image:
        adapt(args, world, seeds, autocast, judge, sets, gts, args.out, stop)
        return
    for k, stem in enumerate(sets.stems):
        if k and args.resume == "must":                                           # the first image has begun, the others may not have
            args.resume = "auto"
        tuned = adapt(args, world, seeds, autocast, judge, data.Sets(sets.files, stems=[stem]), gts, args.out / stem, stop)
        if tuned is None:                                                         # stopped by a signal
            return
        if world.is_main:
            lq = load_image(sets.path(stem))[None].to(world.device).float() / 255
            save_image(args.out / "sr" / f"{stem}.png", archs.upscale_tiled(tuned, lq, tile=args.tile)[0])
    if world.is_main:
        print(f"done: {len(sets.stems)} images in {args.out / 'sr'}")


def adapt(args, world, seeds, autocast, judge, sets, gts, out, stop):
    """Adapt --sr to the images of `sets` in the run folder `out` -> the tuned network (EMA), None after a signal."""
    device, lanes = world.device, world.lanes(args.batch_size)
    base, info = archs.load_x4(args.sr, "--sr", args.weights_key, args.pad_mode)
    args.sr_hash, args.lr = lora.base_hash(base), args.lr or (2e-6 if info["arch"] == "swinir" else 5e-6)
    run = runs.Run(out, vars(args), world, args.resume, FIXED, tensorboard=args.tensorboard)
    if run.start_step > args.total_steps:
        raise runs.UserError(f"--total-steps {args.total_steps}: {out} is already at step {run.start_step}")
    checked = sets
    if args.hold_out:
        sets, checked = sets.hold_out(args.hold_out, seeds(0, 0, "hold-out"), "--hold-out")
    dataset, check_set = (data.TrainingSet(some, "orig", draw, args.batch_size, 1, args.patch, args.patch)
                          for some, draw in ((sets, seeds), (checked, lambda step, lane, purpose: seeds(step, lane, f"check {purpose}"))))
    run.pin(images=scoring.digest(dataset.stems))
    patches = torch.stack([check_set.sample(1, lane)["crops"][0] for lane in range(args.check_patches)]).to(device).float() / 255
    items = [(checked.path(stem), gts.get(stem)) for stem in checked.stems]
    metrics = {name: quality.create_metric(name, device, flag="--watch") for name in args.watch}
    if not gts and any(metric.full_reference for metric in metrics.values()):
        raise runs.UserError(f"--watch {' '.join(name for name, m in metrics.items() if m.full_reference)}: compares with ground truth: --gt-dir DIR is needed")
    if gts:
        metrics |= {"psnr": quality.create_metric("psnr", device, border=0, y=True), "distance": quality.Metric(torch.no_grad()(judge.distance), True, True)}

    base = base.to(device)
    if hasattr(base, "drop_path"):
        base.drop_path = 0.0                                                      # CHOICE: nothing random in M
    raw, ema = copy.deepcopy(base).train(), base.eval().requires_grad_(False)
    opt = torch.optim.Adam(raw.parameters(), lr=args.lr, betas=(0.9, 0.999))      # PAPER

    def draw(step, batch=None):
        """LR patches (b, 3, p, p) of this process, and n of Eq. 8."""
        batch = batch or data.collate([dataset.sample(step, lane) for lane in lanes])
        return batch["crops"][:, 0].to(device).float() / 255, 0.0 if args.s_rule == "one" else embedding_noise(judge.net, args, seeds, step, lanes, device)

    look = lambda net, colours: check(net, patches, judge, items, metrics, args.tile, world, colours)
    state = run.checkpoint
    if state:
        raw.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        opt.load_state_dict(state["opt"])
        first, colours, weight, judge.shift, best, ended = (state[name] for name in ("first", "colours", "weight", "shift", "best", "ended"))
        colours = colours.to(device)
    else:
        if args.s_rule == "shifted":                                              # needs d of the network before
            judge.shift = (judge.shift[0], check(ema, patches, judge, [], {}, args.tile, world)[0]["d"])
        weight = gradient_ratio(judge, ema, draw, world) if args.far and args.lambda_ft == "auto" else args.lambda_ft
        (first, colours), best, ended = look(ema, None), None, False
    meter = runs.Meter(world, state and state["meter"])
    batches = data.prefetch(data.batches(dataset, run.start_step + 1, args.total_steps, lanes, args.workers, device.type == "cuda"), device)
    if run.start_step < args.total_steps:
        batches = itertools.chain([next(batches)], batches)                       # a first batch that cannot be read leaves no folder
    run.open()
    run.say(f"{info['file']} ({info['arch']}, key {info['key']}), controller {args.s_rule}, FAR {f'{args.far_enc} x {weight:.4g}' if args.far else 'off'}, distance {args.distance}: "
            f"{len(dataset)} images, checked on {'the same' if checked is sets else f'{len(checked.stems)} others'}, {world.size} process(es) on {device}"
            + (f"; from step {run.start_step}" if state else ""))
    if not state:
        run.event(0, "ema", **first)
        for name, some in (("adapted", sets), ("held_out", checked)):
            if world.is_main and (name == "adapted" or args.hold_out):
                runs.write_atomic(out / f"{name}.txt", lambda t: t.write_text("".join(f"{stem}\n" for stem in some.stems)))
    state = run.checkpoint = None
    net = world.parallel(raw)

    def save(step):
        meter.check_finite(lambda s: ", ".join(dataset.names(s)))
        run.save(step, {"net": raw.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict(), "meter": meter.state_dict(), "first": first, "colours": colours.cpu(),
                        "weight": weight, "shift": judge.shift, "best": best, "ended": ended})

    due = lambda step, every: runs.due(step, args.total_steps, every)
    if ended or run.start_step == args.total_steps:
        run.say(f"nothing to do: {out} is finished; remove it to adapt again")
    for step in range(run.start_step + 1, args.total_steps + 1) if not ended else ():
        with meter.waiting():
            batch = next(batches)
        lq, noise = draw(step, batch)
        with autocast():
            terms = {name: value.mean() for name, value in judge(lq, net(lq), noise).items()}
        opt.zero_grad(set_to_none=True)
        (terms["rec"] + (weight * terms["far"] if args.far else 0)).backward()
        if args.clip_grad:
            torch.nn.utils.clip_grad_norm_(raw.parameters(), args.clip_grad)
        opt.step()
        runs.update_ema(ema, raw, args.ema_decay)
        meter.add(step, **terms)
        if due(step, args.log_every):
            meter.check_finite(lambda s: ", ".join(dataset.names(s)))
            run.progress(step, args.total_steps, meter, args.lr, {})
        if due(step, args.val_every):
            values = {name: look(one, colours)[0] for name, one in (("raw", raw), ("ema", ema))}
            for name in values:
                run.event(step, name, **values[name])
            now = values["ema"]                                                   # the EMA weights are the result
            run.say(f"step {step:07d} check: {warnings(first, now)}" + "; ".join(f"{name} {first.get(name, math.nan):.4g} -> {now[name]:.4g}" for name in now))
            value = world.gather_objects(now.get({"far": "far", "val-gt": "distance"}.get(args.stop)))[0]          # all stop where rank 0 does
            if value is not None and (best is None or value < best["value"]):
                best = {"value": value, "step": step, **{name: {k: v.cpu().clone() for k, v in one.state_dict().items()} for name, one in (("net", raw), ("ema", ema))}}
            ended = best is not None and step - best["step"] >= args.patience
        stopping = stop.requested(step)
        if due(step, args.save_every) or stopping or ended:
            save(step)
        if ended:
            break
        if stopping and step < args.total_steps:
            run.say(f"stopped by a signal at step {step}; continue with --resume")
            return None
    if best is not None:
        raw.load_state_dict(best["net"])
        ema.load_state_dict(best["ema"])
        run.say(f"--stop {args.stop}: the weights of step {best['step']}")
    if world.is_main:
        file = out / "weights" / f"ema_{best['step'] if best else args.total_steps:07d}.pth"
        runs.save_weights(file, raw.state_dict(), ema.state_dict())
        run.say(f"done: {file}")
    return ema
