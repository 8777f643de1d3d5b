"""Stage 2 of HR-aware self-supervision: adapt a x4 network to low-resolution images that have no ground truth (Eq. 6).

    python -m selfsup.finetune --demo                                          small and short, on a CPU
    python -m selfsup.finetune --sr runs/swinir-amo --lr-dir PHOTOS            leaves runs/swinir-amo+PHOTOS
    python -m selfsup.finetune --rec runs/rec-lway --sr FILE --lr-dir PHOTOS   with another pre-training, here LWay's
    python -m selfsup.finetune ... --s-rule flip                               Table 4, row 1
    python -m selfsup.finetune ... --total-steps 600 --val-every 50            Fig. 9

The networks of selfsup.pretrain are frozen, and the network M is trained so that M(X), degraded again, gives X. Two
things keep M from degrading its output itself: the controller s (Eq. 8) and the feature-alignment regulariser FAR (Eq.
9-11). Controller and FAR follow --rec unless flags say otherwise. As in the paper, M is adapted to the images that it
is to enlarge; --hold-out N keeps N of them back. The result is a plain checkpoint, as train.py leaves it.
"""
import argparse
from pathlib import Path

import runs
from selfsup import options

# CHOICE: sized so that all stages end within three minutes on two cores
DEMO = dict(rec=options.DEMO_REC, sr=options.DEMO_SR, out=options.DEMO_TUNED, lr_dir=options.DEMO_DOMAIN / "lq",
            gt_dir=options.DEMO_DOMAIN / "gt", patch=16, batch_size=4, lr=5e-5, total_steps=60, ema_decay=0.9,
            log_every=20, save_every=30, val_every=30, watch=["piqe"], workers=0, threads=1)


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--demo", action="store_true", help="the demo set under one degradation, tiny networks; same code")
    g = p.add_argument_group("networks")
    g.add_argument("--rec", type=Path, default=Path("runs/rec-hra"), metavar="PATH",
                   help="run folder of selfsup.pretrain, or its rec.pth")
    g.add_argument("--sr", type=runs.CHECKPOINT, metavar="PATH",
                   help="x4 network to adapt: any weight file or run folder that upscale.py takes")
    runs.add_weights_key(g)
    options.add_files(p)
    g = p.add_argument_group("data")
    g.add_argument("--lr-dir", type=Path, metavar="DIR", help="low-resolution images of one source")
    g.add_argument("--gt-dir", type=Path, metavar="DIR", help="their ground truth: only watched, unless --stop val-gt")
    g.add_argument("--hold-out", type=runs.COUNT, default=0, help="images that are not adapted to (PAPER: 0)")
    g.add_argument("--per-image", action="store_true",
                   help="adapt to each image alone, from --sr (LWAY: 100-300 steps); leaves OUT/<image> and OUT/sr")
    g = p.add_argument_group("losses (Eq. 6-11)")
    g.add_argument("--s-rule", choices=["eq8", "flip", "one", "shifted"],
                   help="controller; flip: Table 4, row 1; one: none; shifted: ours, see networks.controller; "
                        "default: as in pre-training")
    g.add_argument("--far", action=argparse.BooleanOptionalAction,
                   help="feature-alignment regulariser; default: as in pre-training")
    g.add_argument("--far-floor", action=argparse.BooleanOptionalAction, default=True,
                   help="FAR counts only above its level on clean held-out photographs (CHOICE; PAPER: all of it)")
    g.add_argument("--lambda-ft", default="auto", type=options.weight_or_auto,
                   help="weight of FAR; auto: its gradient on M(X) is half as long as that of L_rec, over the first "
                        "10 batches (CHOICE, not published)")
    g.add_argument("--force", action="store_true",
                   help="tune although pre-training's last check says that the reconstruction, or FAR, learned too "
                        "little")
    g.add_argument("--hf", action=argparse.BooleanOptionalAction, default=True,
                   help="weight L_rec by the LR image's high frequencies (LWAY)")
    options.add_training(p)
    g = p.add_argument_group("checks")
    g.add_argument("--stop", choices=["fixed", "far", "val-gt"], default="fixed",
                   help="fixed: after --total-steps; far: at FAR's minimum among the checks after the start; val-gt: "
                        "at the smallest distance to the ground truth (PAPER: of test images)")
    g.add_argument("--watch", nargs="*", default=[], metavar="NAME",
                   help="metrics of the whole outputs, reported with the checks")
    p.set_defaults(batch_size=8, total_steps=300, log_every=10, save_every=100, val_every=50)
    if p.parse_known_args(argv)[0].demo:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    # a shortened demo shows that the stages fit together: its networks have learned nothing
    args.force = args.force or args.demo and args.total_steps != DEMO["total_steps"]
    for flag, value in (("--sr", args.sr), ("--lr-dir", args.lr_dir)):
        if value is None:
            p.error(f"{flag} is needed")
    if args.stop == "val-gt" and not args.gt_dir:
        p.error("--stop val-gt looks at the ground truth: --gt-dir DIR is needed")
    if args.stop != "fixed" and not args.val_every:
        p.error(f"--stop {args.stop} looks at the checks: --val-every must not be 0")
    compared = [name for name in args.watch if name in runs.literal("metrics", "FULL_REFERENCE")]
    if compared and not args.gt_dir:
        p.error(f"--watch {compared[0]} compares with ground truth: --gt-dir DIR is needed")
    if args.per_image and args.hold_out:
        p.error("--hold-out: with --per-image nothing is shared between images")
    name = args.sr.name if args.sr.is_dir() else args.sr.stem
    args.out = args.out or Path("runs") / f"{name}+{args.lr_dir.resolve().name}"
    return args


# --help and flag errors need no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import copy
import itertools
import math
from functools import partial

import torch

import archs
import data
import degradations
import lora
import metrics
from images import check_pairs, cut_to_x4, find_pairs, image_size, load_image, save_image
from selfsup import encoders
from selfsup import networks as rec

# CHOICE: largest norm of a step's gradient, 0 would be none
CLIP_GRAD = 1.0
# CHOICE: --lambda-ft auto makes FAR's gradient so long, as a share of that of L_rec
FAR_RHO = 0.5
# INFERRED: FAR's gradient reaches M through both encoders, "both"; "im" or "cl" would be one
FAR_PATH = "both"
# CHOICE: --stop far and val-gt end after so many steps without a new minimum
PATIENCE = 100
# CHOICE: fixed patches of the checks
CHECK_PATCHES = 16
# LR pixels, of whole images
TILE = 256
# the paper's 300 steps of 2e-6 and 600 of 5e-6 move weights averaged with 0.999 at most so far: a step of Adam moves a
# weight by about the learning rate at most
PAPER_MOVEMENT = 8e-5, 7.5e-4
# CHOICE: warn beyond these: how much further mean colours are from the LR image's, in grey levels; FAR as a multiple of
# its start
DRIFT, FAR_LOSS = 2.0, 1.05
FIXED = ("rec_hash", "sr_hash", "s_rule", "far", "far_path", "no_far_floor", "hf", "percep", "patch", "batch_size",
         "lambda_ft", "far_rho", "lr", "ema_decay", "clip_grad", "seed", "n_std", "stop", "patience", "check_patches",
         "hold_out", "images")


class Judge:
    """The frozen part: how well R makes the LR image again from M(X), and FAR.

    s_rule, shift: see networks.controller; offdiag: see networks.descriptors; hf: weight L_rec by high frequencies.
    """

    def __init__(self, net, distance, hqi, encoder, s_rule, shift, offdiag, hf):
        self.net, self.distance, self.hqi, self.encoder = net, distance, hqi, encoder
        self.s_rule, self.shift, self.offdiag, self.hf = s_rule, shift, offdiag, hf

    def __call__(self, lq, sr, noise=0.0):
        """-> {"rec", "l1", "percep", "d", "s"[, "far"]} of (b,); rec is L_rec, noise is n of Eq. 8, s is without it."""
        d = rec.hqi_distance(self.hqi, lq, sr)
        s = rec.controller(self.s_rule, d, noise, shift=self.shift)
        mean_s = rec.controller(self.s_rule, d, shift=self.shift)
        e_clip = self.encoder and self.encoder(sr)
        # CHOICE: without R's noise
        again, far = self.net(lq, sr, s, e_clip, offdiag=self.offdiag, path=FAR_PATH)
        weight = rec.high_frequency_map(lq) if self.hf else None
        terms = rec.reconstruction_loss(self.distance, again.float(), lq, weight)
        terms = {"rec": terms["l1"] + rec.PERCEP * terms["percep"], **terms, "d": d,
                 "s": torch.ones_like(d) if isinstance(mean_s, float) else mean_s[:, 0]}
        return terms if far is None else terms | {"far": far}


def gradient_ratio(judge, net, draw, world, batches=10):
    """The weight of --lambda-ft auto: FAR_RHO |d L_rec / d M(X)| / |d FAR / d M(X)|.

    Both lengths are averaged over the samples of the first batches of all processes.
    """
    lengths = []
    for step in range(1, batches + 1):
        lq, noise = draw(step)
        with torch.no_grad():
            sr = net(lq)
        terms = judge(lq, sr.requires_grad_(), noise)
        gradients = [torch.autograd.grad(terms[name].sum(), sr, retain_graph=True)[0] for name in ("rec", "far")]
        lengths.append(torch.stack([gradient.flatten(1).norm(dim=1).mean() for gradient in gradients]))
    of_rec, of_far = world.reduce(torch.stack(lengths).mean(0))
    ratio = (FAR_RHO * of_rec / of_far).item()
    if not 0 < ratio < math.inf:
        raise runs.UserError(f"--lambda-ft auto: the ratio of the gradients is {ratio}: give a number")
    return ratio


@torch.no_grad()
def check(net, patches, judge, items, image_metrics, world):
    """-> {value: mean}: the judge's terms without noise over the fixed patches; colours: how far the outputs' mean
    colours are from the patches', in grey levels; image_metrics {name: Metric} over the whole images `items`,
    [(LR file, ground truth or None)], which processes share.
    """
    sr = torch.cat([net(part) for part in patches.split(8)])
    terms = [judge(lq_part, sr_part) for lq_part, sr_part in zip(patches.split(8), sr.split(8))]
    values = {name: torch.cat([t[name] for t in terms]).mean().item() for name in terms[0]}
    values["colours"] = 255 * (sr.clamp(0, 1).mean((2, 3)) - patches.mean((2, 3))).abs().mean().item()
    if image_metrics:
        sums = torch.zeros(len(image_metrics), dtype=torch.float64, device=world.device)
        for paths in items[world.rank::world.size]:
            lq, gt = (path and load_image(path)[None].to(world.device).float() / 255 for path in paths)
            gt = None if gt is None else cut_to_x4(gt)
            whole = degradations.to_8bit(archs.upscale_tiled(net, lq, tile=TILE))
            sums += torch.stack([metric(whole, gt).double().mean() for metric in image_metrics.values()]).to(sums)
        values |= dict(zip(image_metrics, (world.reduce(sums) / len(items)).tolist()))
    return values


def warnings(first, last, floor=0.0):
    """Signs between two checks that the network is getting worse, as text. floor: FAR of clean photographs."""
    texts = []
    if last["colours"] > first["colours"] + DRIFT:
        texts.append(f"mean colours are {last['colours']:.1f} grey levels from the LR image's, before tuning "
                     f"{first['colours']:.1f}")
    if last["rec"] < first["rec"] and last.get("far", 0) > FAR_LOSS * first.get("far", 0):
        texts.append("the reconstruction gained while FAR lost: the output may be degrading")
    if last.get("far", floor) < floor:
        texts.append(f"FAR is below the {floor:.4g} of clean photographs: it was fooled")
    return "".join(f"WARNING, {text}. " for text in texts)


def choose_switches(settings, s_rule, far, stop):
    """-> (controller, FAR): as pre-training's settings say unless given. UserError where they do not fit its
    networks."""
    has_controller, has_far = settings["s_rule"] != "one", settings["far_enc"] is not None
    s_rule = s_rule or settings["s_rule"]
    if has_controller != (s_rule != "one"):
        raise runs.UserError(f"--s-rule {s_rule}: --rec was trained {'with' if has_controller else 'without'} a "
                             "controller, so its embeddings mean something else; pretrain one for each")
    if far and not has_far:
        raise runs.UserError("--far: --rec was trained without; python -m selfsup.pretrain --far makes one with it")
    far = has_far if far is None else far
    if stop == "far" and not far:
        raise runs.UserError("--stop far: FAR is off here (--no-far, or a --rec without it): --stop fixed")
    return s_rule, far


def open_images(lr_dir, gt_dir, patch, remarks):
    """-> Sets of the LR images, {stem: ground truth}; UserError for sizes that cannot be."""
    pairs = find_pairs(lr_dir, gt_dir, "--lr-dir", "--gt-dir", remarks)
    check_pairs(pairs, remarks)
    for path, _ in pairs.values():
        width, height = image_size(path)
        shorter = min(width, height)
        if shorter < patch:
            remedy = f"--patch {shorter // 4 * 4} or less, or leave it out" if shorter >= 16 else "leave it out"
            raise runs.UserError(f"{path}: {width}x{height} pixels, smaller than a patch: {remedy}")
    return data.find_photos(lr_dir), {stem: gt for stem, (_, gt) in pairs.items() if gt}


def watched_metrics(names, gts, distance, device):
    """{name: Metric} of the whole images of a check: those of --watch and, with ground truth, PSNR on Y and L_rec's
    distance."""
    chosen = {name: metrics.create_metric(name, device, border=0, y=True, flag="--watch") for name in names}
    compared = [name for name, metric in chosen.items() if metric.full_reference]
    if not gts and compared:
        raise runs.UserError(f"--watch {' '.join(compared)}: compares with ground truth: --gt-dir DIR is needed")
    if gts:
        chosen["psnr"] = metrics.create_metric("psnr", device, border=0, y=True)
        chosen["distance"] = metrics.Metric(torch.no_grad()(distance), True, True)
    return chosen


def main(args):
    world, seeds, autocast = runs.start_training(args.device, args.threads, args.seed, args.precision)
    if args.demo:
        shorter = args.total_steps if args.total_steps != DEMO["total_steps"] else None
        starts = [options.DEMO_SET, options.DEMO_DOMAIN] if args.lr_dir == DEMO["lr_dir"] else []
        starts += [path for path in (args.sr, args.rec) if path in options.DEMO_COMMANDS]
        options.make_demo_start(starts, world, args.device, shorter)
    sets, gts = open_images(args.lr_dir, args.gt_dir, args.patch, world.is_main)
    net, settings = rec.load_reconstruction(args.rec)
    s_rule, far = choose_switches(settings, args.s_rule, args.far, args.stop)
    if not far and args.lambda_ft != "auto":
        raise runs.UserError(f"--lambda-ft {args.lambda_ft:g} weighs FAR, which is off: --rec {args.rec} was trained "
                             "without it, or --no-far is given")
    weaknesses = rec.weaknesses(settings["held_out"], far)
    if weaknesses and not args.force:
        raise runs.UserError(f"--rec {args.rec}: {'; '.join(weaknesses)}: pre-train longer, or --force")
    far_enc = settings["far_enc"] if far else None
    distance, hqi, encoder = encoders.open_frozen(world.device, settings["distance"], settings["vgg_stages"],
                                                  far_enc, settings["far_layer"], args.vgg_weights,
                                                  args.clip_weights, args.far_sr, args.precision)
    encoders.check_weights(settings, distance, hqi, encoder)
    net = net.to(world.device, memory_format=archs.memory_format(net, args.precision))
    judge = Judge(net, distance, hqi, encoder, s_rule, (settings["mean_d"], 0.0), settings["offdiag"],
                  args.hf)
    followed = {name: settings[name] for name in ("distance", "vgg_stages", "far_enc", "far_layer", "offdiag", "n_std")}
    fixed_here = {"percep": rec.PERCEP, "far_path": FAR_PATH, "far_rho": FAR_RHO, "clip_grad": CLIP_GRAD,
                  "patience": PATIENCE, "check_patches": CHECK_PATCHES}
    # FAR of clean photographs; unknown in files of before
    floor = (settings["held_out"] or {}).get("far", 0.0)
    record = {**vars(args), **followed, **fixed_here, "s_rule": s_rule, "far": far, "far_floor": floor,
              "rec_hash": lora.base_hash(net), "weaknesses": weaknesses}
    stop = runs.StopSignal(world)
    if not args.per_image:
        adapt(args, record, world, seeds, autocast, judge, sets, gts, args.out, args.resume, stop)
        return
    for k, stem in enumerate(sets.stems):
        # the first image has begun, the others may not have
        resume = "auto" if k and args.resume == "must" else args.resume
        alone = data.Sets(sets.files, stems=[stem])
        tuned = adapt(args, record, world, seeds, autocast, judge, alone, gts, args.out / stem, resume, stop)
        if tuned is None:
            # stopped by a signal
            return
        if world.is_main:
            lq = load_image(sets.path(stem))[None].to(world.device).float() / 255
            save_image(args.out / "sr" / f"{stem}.png", archs.upscale_tiled(tuned, lq, tile=TILE)[0])
    if world.is_main:
        print(f"done: {len(sets.stems)} images in {args.out / 'sr'}")


def adapt(args, record, world, seeds, autocast, judge, sets, gts, out, resume, stop):
    """Adapt --sr to the images of `sets` in the run folder `out` -> the tuned network (EMA), None after a signal."""
    device, lanes = world.device, world.lanes(args.batch_size)
    far, floor, s_rule, n_std = record["far"], record["far_floor"], record["s_rule"], record["n_std"]
    base, info = archs.load_x4(args.sr, "--sr", args.weights_key)
    # PAPER: from 2e-6 to 5e-6, by architecture
    lr = args.lr or (2e-6 if info["arch"] == "swinir" else 5e-6)
    facts = {"sr_hash": lora.base_hash(base), "lr": lr, "pad_mode": info["sizes"].get("pad_mode")}
    run = runs.Run(out, record | facts, world, resume, FIXED, tensorboard=args.tensorboard)
    run.check_steps(args.total_steps)
    if not run.checkpoint or "no_far_floor" in run.checkpoint["args"]:
        # runs of earlier commits do not say
        run.pin(no_far_floor=not args.far_floor)
    checked = sets
    if args.hold_out:
        sets, checked = sets.hold_out(args.hold_out, seeds(0, 0, "hold-out"), "--hold-out")

    def check_seeds(step, lane, purpose):
        return seeds(step, lane, f"check {purpose}")
    dataset = data.TrainingSet(sets, "orig", seeds, args.batch_size, 1, args.patch, args.patch)
    check_set = data.TrainingSet(checked, "orig", check_seeds, args.batch_size, 1, args.patch, args.patch)
    run.pin(images=runs.digest(dataset.stems))
    patches = torch.stack([check_set.sample(1, lane)["crops"][0] for lane in range(CHECK_PATCHES)])
    patches = patches.to(device).float() / 255
    items = [(checked.path(stem), gts.get(stem)) for stem in checked.stems]
    image_metrics = watched_metrics(args.watch, gts, judge.distance, device)

    base = base.to(device, memory_format=archs.memory_format(base, args.precision))
    if hasattr(base, "drop_path"):
        # CHOICE: nothing random in M
        base.drop_path = 0.0
    raw, ema = copy.deepcopy(base).train(), base.eval().requires_grad_(False)
    start = [weight.clone() for weight in ema.parameters()]
    # PAPER
    opt = torch.optim.Adam(raw.parameters(), lr=lr, betas=(0.9, 0.999))

    def draw(step, batch=None):
        """LR patches (b, 3, p, p) of this process, and n of Eq. 8."""
        batch = batch or data.collate([dataset.sample(step, lane) for lane in lanes])
        lq = batch["crops"][:, 0].to(device).float() / 255
        if s_rule == "one":
            return lq, 0.0
        return lq, rec.embedding_noise(judge.net, [seeds(step, lane, "n") for lane in lanes], n_std, device)

    def look(net):
        return check(net, patches, judge, items, image_metrics, world)

    state = run.checkpoint
    if state:
        raw.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        opt.load_state_dict(state["opt"])
        first, weight, best, ended = (state[name] for name in ("first", "weight", "best", "ended"))
        judge.shift = state["shift"]
    else:
        if s_rule == "shifted":
            # d of the network before tuning
            judge.shift = (judge.shift[0], check(ema, patches, judge, [], {}, world)["d"])
        weight = gradient_ratio(judge, ema, draw, world) if far and args.lambda_ft == "auto" else args.lambda_ft
        first, best, ended = look(ema), None, False
    meter = runs.Meter(world, state and state["meter"])
    batches = data.batches(dataset, run.start_step + 1, args.total_steps, lanes, args.workers, device.type == "cuda")
    batches = data.prefetch(batches, device)
    if run.start_step < args.total_steps:
        # a first batch that cannot be read leaves no folder
        batches = itertools.chain([next(batches)], batches)
    run.open()
    far_text = f"{record['far_enc']} x {weight:.4g}" if far else "off"
    others = "the same" if checked is sets else f"{len(checked.stems)} others"
    run.say(f"{info['file']} ({info['arch']}, key {info['key']}), controller {s_rule}, FAR {far_text}, "
            f"distance {record['distance']}: {len(dataset)} images, checked on {others}, "
            f"{world.size} process(es) on {device}" + (f"; from step {run.start_step}" if state else ""))
    for text in record["weaknesses"]:
        run.say(f"WARNING, forced although {text}")
    if not state:
        run.event(0, "ema", **first)
        for name, some in (("adapted", sets), ("held_out", checked)):
            if world.is_main and (name == "adapted" or args.hold_out):
                text = "".join(f"{stem}\n" for stem in some.stems)
                runs.write_atomic(out / f"{name}.txt", partial(Path.write_text, data=text))
    state = run.checkpoint = None
    net = world.parallel(raw)

    def samples_of(step):
        return ", ".join(dataset.names(step))

    def save(step):
        meter.check_finite(samples_of, raw)
        run.save(step, {"net": raw.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict(),
                        "meter": meter.state_dict(), "first": first, "weight": weight, "shift": judge.shift,
                        "best": best, "ended": ended})

    def due(step, every):
        return runs.due(step, args.total_steps, every)
    if ended:
        run.say(f"nothing to do: {out} is finished; remove it to adapt again")
    for step in () if ended else run.steps(args.total_steps):
        with meter.waiting():
            batch = next(batches)
        lq, noise = draw(step, batch)
        with autocast():
            values = judge(lq, net(lq), noise)
            terms = {name: value.mean() for name, value in values.items()}
        opt.zero_grad(set_to_none=True)
        # of each sample, so that it is the same with any number of processes
        excess = (values["far"] - floor).clamp_min(0).mean() if far and args.far_floor else terms.get("far")
        (terms["rec"] + (weight * excess if far else 0)).backward()
        if CLIP_GRAD:
            torch.nn.utils.clip_grad_norm_(raw.parameters(), CLIP_GRAD)
        opt.step()
        runs.update_ema(ema, raw, args.ema_decay)
        meter.add(step, **terms)
        if due(step, args.log_every):
            meter.check_finite(samples_of)
            run.progress(step, args.total_steps, meter, lr, {})
        if due(step, args.val_every):
            values = {name: look(one) for name, one in (("raw", raw), ("ema", ema))}
            for name in values:
                run.event(step, name, **values[name])
            # the EMA weights are the result
            now = values["ema"]
            run.say(f"step {step} check: {warnings(first, now, floor)}"
                    + "; ".join(f"{name} {first.get(name, math.nan):.4g} -> {now[name]:.4g}" for name in now))
            # all stop where rank 0 does
            value = world.gather_objects(now.get({"far": "far", "val-gt": "distance"}.get(args.stop)))[0]
            if value is not None and (best is None or value < best["value"]):
                best = {"value": value, "step": step}
                for name, one in (("net", raw), ("ema", ema)):
                    best[name] = {k: v.cpu().clone() for k, v in one.state_dict().items()}
            ended = best is not None and step - best["step"] >= PATIENCE
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
    moved = max((now - before).abs().max().item() for now, before in zip(ema.parameters(), start))
    run.say(f"largest movement of the averaged weights: {moved:.2g}; the paper's steps and rates allow "
            f"{PAPER_MOVEMENT[0]:.1g} to {PAPER_MOVEMENT[1]:.2g}")
    if world.is_main:
        file = out / "weights" / f"ema_{best['step'] if best else args.total_steps:07d}.pth"
        runs.save_weights(file, raw.state_dict(), ema.state_dict())
        run.say(f"done: {file}")
    return ema


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
