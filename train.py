"""Train x4 super-resolution on quintuplets with any ground-truth sampler (paper Sec. 4.1 and 4.2, Eq. 1-4).

    python train.py --demo                                              everything in small, on a CPU, no download
    python train.py --stage psnr --arch swinir --data PHOTOS            L1 pre-training, leaves runs/swinir-psnr
    torchrun --nproc_per_node 4 train.py --arch swinir --sampler amo    the paper: datasets/HGGT, MUSIQ, 4 GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py --arch rrdbnet
    python train.py --demo --resume                                     continue after an interruption

For every photo there are several candidate ground truths (an original, four enhanced versions). The sampler chooses the
one that supervises each crop: orig, rand, upos (uniform over those people preferred), sma / smp (softmax of NR-IQA
scores over all / positives), amo (the crop that the NR-IQA model likes best). Everything else is HGGT's GAN training.
"""
from pathlib import Path

import runs

ARCHS = runs.literal("archs", "ARCHS")
# HGGT options of the L1 stage
PSNR = dict(load_size=512, sampler="orig", reward=["none"], lambda_p=0.0, lambda_a=0.0, lr=2e-4)
DEMO_DATA = Path("datasets/demo")
# CHOICE: sized to finish in five minutes on two cores. No GAN: in so few steps rounding decides what a small one does,
# and hides the effect of the ground truths (experiments/demo_seeds.py).
DEMO = {
    "gan": dict(data=DEMO_DATA, total_steps=250, milestones=[150, 200], crop=96, load_size=128, lr=2e-3,
                reward=["ranker"], lambda_p=0.0, lambda_a=0.0, ema_decay=0.97, log_every=50, save_every=100,
                val_every=0, workers=0, threads=1),
    "psnr": dict(data=DEMO_DATA, total_steps=400, crop=48, load_size=64, lr=2e-3, reward=["none"], ema_decay=0.98,
                 log_every=100, save_every=200, val_every=0, workers=0, threads=1),
}


def parse_args(argv=None):
    pre = runs.Parser(add_help=False)
    pre.add_argument("--demo", action="store_true",
                     help="demo data set, small net, short schedule, embedded reward, no VGG, no GAN; same code")
    pre.add_argument("--arch", choices=list(ARCHS),
                     help="backbone; fills the defaults marked [arch] (paper: swinir, rrdbnet)")
    pre.add_argument("--stage", choices=["gan", "psnr"], default="gan",
                     help="gan: Eq. 1; psnr: HGGT's L1-only pre-training")
    first = pre.parse_known_args(argv)[0]
    arch = first.arch or ("compact-small" if first.demo else "swinir")
    psnr = first.stage == "psnr"
    p = runs.Parser(description=__doc__, parents=[pre])
    runs.add_training(p)
    p.add_argument("--d-warmup", type=runs.COUNT, default=0, metavar="N",
                   help="the first N steps train the discriminator alone: one that begins from random weights says "
                        "nothing of use for hundreds of steps (CHOICE; HGGT: 0)")
    g = p.add_argument_group("start and continue")
    g.add_argument("--init", type=runs.CHECKPOINT, metavar="FILE",
                   help="generator weights, a run folder, or a public name (python -m prepare.weights list); gan "
                        "default runs/<arch>-psnr; psnr default: none, random")
    runs.add_weights_key(g)
    g.add_argument("--resume", nargs="?", const="must", default="no", choices=["must", "auto", "no"],
                   help="continue --out from its checkpoint; auto: start if there is none (Slurm requeue)")
    g.add_argument("--out", type=Path, help="run folder (default: runs/<arch>-<sampler>, runs/<arch>-psnr)")
    # usm: sharpen the targets, as HGGT's psnr stage of RRDBNet does; what set_defaults says, explicit flags change
    p.set_defaults(arch=arch, usm=False, reward=None)
    p.set_defaults(**ARCHS[arch]["train"] | (PSNR if psnr else {}) | ARCHS[arch][first.stage])
    if first.demo:
        p.set_defaults(**DEMO[first.stage])
    args = p.parse_args(argv)
    if args.reward is None:
        args.reward = ["musiq"] if runs.chooses_by_score(args.sampler) else ["none"]
    args.out = args.out or Path("runs") / (f"{args.arch}-psnr" if psnr else f"{args.arch}-{args.sampler}")
    if args.init is None and not psnr:
        args.init = Path("runs") / f"{args.arch}-psnr"
    if psnr and args.sampler != "orig":
        p.error("--stage psnr trains on plain photos: its only sampler is orig")
    if args.d_warmup and args.lambda_a == 0:
        p.error(f"--d-warmup {args.d_warmup} trains the discriminator, and --lambda-a 0 is without one")
    runs.check_training(p, args)
    return args


# --help and flag errors need no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import contextlib
import copy
import itertools
from collections import Counter
from functools import partial

import torch

import archs
import data
import degradations
import iqa
import losses
import metrics

# what a resumed run must share with its checkpoint
FIXED = ("arch", "stage", "sampler", "versions", "reward", "degradation", "usm", "tau", "batch_size", "group_size",
         "pool_size", "crop", "load_size", "drop_path", "d_features", "chosen_by", "seed", "discriminator", "samples",
         "d_warmup")
# flags of earlier commits, and what this one does in their place
RETIRED = {"jpeg_table": "hggt", "pad_mode": "hggt", "include_original": True, "drop_without_positive": False,
           "clip_grad": 0.0, "margin": 0.0}


def fixed(args):
    """FIXED; the reward is not fixed where it only validates."""
    return FIXED if runs.chooses_by_score(args.sampler) else [name for name in FIXED if name != "reward"]


def chosen_by(dataset, run):
    """What a run's atlases are, to be pinned: {} for a run that scores online, from its beginning to its end."""
    tables = " + ".join(f"{weight:g} {atlas.identity}" for atlas, weight in dataset.atlases)
    pinned = bool(run.checkpoint and "chosen_by" in run.checkpoint["args"])
    return {"chosen_by": f"{tables} margin 0" if tables else "online"} if tables or pinned else {}


@torch.no_grad()
def validate(net, sets, degradation, reward, seeds, world):
    """Mean PSNR (8-bit output against the original, as evaluate.py) and mean reward over the validation images.

    Processes share the images; every one gets the means. Images without a finite reward are left out of its mean, and
    counted if there are any.
    """
    # count, PSNR, score, count of scores
    totals = torch.zeros(4, dtype=torch.float64, device=world.device)
    for i in range(world.rank, len(sets.stems), world.size):
        lq, gt = data.validation_pair(sets, i, seeds, world.device, degradation)
        sr = degradations.to_8bit(archs.upscale_tiled(net, lq))
        psnr = metrics.psnr(sr, gt)[0]
        score = reward(sr)[0].double() if reward else torch.zeros_like(psnr)
        finite = torch.isfinite(score)
        totals += torch.stack([torch.ones_like(psnr), psnr, score.where(finite, 0), finite.double()])
    count, psnr, score, scored = world.reduce(totals).tolist()
    values = {"psnr": psnr / count} | ({"score": score / max(1, scored)} if reward else {})
    return values | ({"unscored": count - scored} if scored < count else {})


@torch.no_grad()
def sample_grid(net, dataset, pairs, reward, path, rows=4):
    """PNG with lq | sr | chosen gt of the first few fixed samples, each with its score.

    pairs: (batch, step, lanes) -> lq, gt, version, score, as the training loop sees them.
    """
    from report import pictures
    lines = []
    for lane in range(min(rows, len(dataset), dataset.batch_size)):
        lq, gt, version, _ = pairs(data.collate([dataset.sample(1, lane)]), 1, [lane])
        sr = archs.upscale_tiled(net, lq, tile=0).clamp(0, 1)
        cells = {"lq": lq.repeat_interleave(4, 2).repeat_interleave(4, 3), "sr": sr,
                 f"gt {dataset.sets.versions[version.item()]}": gt}
        lines.append([(image[0], name + (f" {reward(image).item():.1f}" if reward else ""))
                      for name, image in cells.items()])
    pictures.save_grid(path, lines)


def create_training_set(args, sets, seeds, scores=None, atlases=()):
    labels = sets.labels() if args.sampler in data.NEEDS_LABELS else None
    return data.TrainingSet(sets, args.sampler, seeds, args.batch_size, args.group_size, args.crop, args.load_size,
                            args.tau, labels, scores, atlases)


def find_data(args, world, seeds):
    """-> (training Sets, validation Sets or None). Looks at the header of every image that is trained on."""
    if args.demo and world.is_main and args.data == DEMO_DATA and not args.data.exists():
        from prepare.demo_set import build_demo
        build_demo(args.data)
    world.barrier()
    if args.stage == "gan":
        sets, val_sets = data.find_sets(args.data, "Train"), data.find_sets(args.data, "Test")
        sets, val_sets = sets.choose(args.versions), val_sets and val_sets.choose(args.versions)
    else:
        sets, val_sets = data.find_photos(args.data), None
    if args.val_photos:
        sets, val_sets = sets.hold_out(args.val_photos, seeds(0, 0, "val-photos"))
    data.check_headers(create_training_set(args, sets, seeds), world)
    return sets, val_sets


def training_set(args, world, reward, seeds, sets, atlas=True):
    """-> data.TrainingSet; atlas: with --atlas. Processes share the static scoring that sma and smp need."""
    atlases = []
    if args.atlas and atlas:
        from prepare.atlas import Atlas
        atlases = Atlas.open_all(args.atlas, sets, args.crop, reward)
    scores = None
    if args.sampler in data.NEEDS_SCORES:
        paths = [sets.path(stem, version) for stem in sets.stems for version in sets.versions]
        scores = iqa.score_images(paths, reward, Path("runs/scores"), world).view(len(sets.stems), -1)
    return create_training_set(args, sets, seeds, scores, atlases)


def create_shown_set(args, world, reward, seeds, val_sets, dataset):
    """-> the TrainingSet that sample grids show: of the validation images, or `dataset` where they cannot be used."""
    unlabelled = val_sets is not None and val_sets.label_folder is None and args.sampler in data.NEEDS_LABELS
    unscored = args.sampler == "amo" and reward is None
    shown = dataset
    if not (val_sets is None or unlabelled or unscored):
        # an atlas knows the training images only
        shown = training_set(args, world, reward, seeds, val_sets, atlas=False)
    for lane in range(min(4, len(shown), args.batch_size)):
        # unsuitable test images are refused now, not hours later
        shown.sample(1, lane)
    return shown


def make_demo_start(args, world):
    """The demo's L1 stage, where the run that the GAN stage starts from is missing; one that was shortened goes on."""
    if args.demo and world.is_main and args.lambda_p == args.lambda_a == 0:
        print("demo: L1 alone; VGG19 would be a download, and rounding decides what a GAN does in so few steps")
    if args.demo and args.init == Path("runs") / f"{args.arch}-psnr":
        words = ["--demo", "--stage", "psnr", "--arch", args.arch, "--device", args.device, "--resume", "auto"]
        made = args.init / "weights"
        if args.total_steps != DEMO["gan"]["total_steps"]:
            words += ["--total-steps", args.total_steps]
        else:
            made = made / f"ema_{DEMO['psnr']['total_steps']:07d}.pth"
        runs.make_missing(made, world, "train.py", *words)


def pin_start(args, run, init):
    """Record the file that a run begins from. A demo that began from a shortened start is not continued."""
    began = run.checkpoint["args"].get("began_from") if run.checkpoint else init and str(init)
    run.pin(began_from=began)
    if args.demo and run.checkpoint and began and args.init and (args.init / "weights").is_dir():
        now = runs.find_weights(args.init, "")
        if str(now) != began:
            raise runs.UserError(f"{args.out}: this demo began from {began}, and now there is {now}: remove {args.out}")


def main(args):
    world, seeds, autocast = runs.start_training(args.device, args.threads, args.seed, args.precision,
                                                 args.deterministic)
    device, lanes = world.device, world.lanes(args.batch_size)
    if len(lanes) % args.accumulate:
        raise runs.UserError(f"--accumulate {args.accumulate} does not divide the {len(lanes)} crops of one process")
    if "graph" in args.fast and (device.type != "cuda" or world.size > 1):
        raise runs.UserError(f"--fast graph is for one process on CUDA; here are {world.size} on {device.type}")

    # cheap checks first, so that a bad command fails before anything is loaded
    record = vars(args) | {"discriminator": args.lambda_a > 0}
    run = runs.Run(args.out, record, world, args.resume, fixed(args), RETIRED, args.tensorboard)
    run.check_steps(args.total_steps)
    make_demo_start(args, world)
    sets, val_sets = find_data(args, world, seeds)
    init = None if run.checkpoint or args.init is None else runs.find_weights(
        args.init, f"make it with: python train.py --stage psnr --arch {args.arch} --data PHOTOS, or name --init FILE")
    reward = None
    if args.reward != ["none"]:
        reward = iqa.create_reward(args.reward, device, args.reward_weights, musiq=args.musiq)
    dataset = training_set(args, world, reward, seeds, sets)
    shown_set = create_shown_set(args, world, reward, seeds, val_sets, dataset)
    run.pin(samples=len(dataset), **chosen_by(dataset, run))
    pin_start(args, run, init)
    pairs = partial(data.make_pair, seeds=seeds, device=device, degradation=args.degradation,
                    group_size=args.group_size, crop=args.crop, reward=reward, usm=args.usm,
                    sampler=args.sampler, tau=args.tau)

    # networks: raw_* are the plain modules that are saved, net_* what the loop calls
    # initial weights; nothing else uses this state
    torch.manual_seed(args.seed)
    drop_path = {"drop_path": args.drop_path} if "drop_path" in ARCHS[args.arch]["train"] else {}
    # a resumed run keeps the sizes that it began with
    sizes = run.checkpoint and run.checkpoint["args"].get("sizes")
    raw_g, info = archs.load_start(init, "--init", args.arch, args.weights_key, sizes, **drop_path)
    run.pin(sizes=info["sizes"])
    raw_d = archs.UNetDiscriminatorSN(args.d_features) if args.lambda_a > 0 else None
    memory = torch.channels_last if args.channels_last else torch.contiguous_format
    memory_g = memory if archs.is_convolutional(raw_g) else torch.contiguous_format
    raw_g = raw_g.to(device, memory_format=memory_g)
    ema = copy.deepcopy(raw_g).eval().requires_grad_(False)
    opt_g = runs.adam(raw_g.parameters(), args.lr)
    vgg = losses.VGGFeatureLoss(args.vgg_weights).to(device, memory_format=memory) if args.lambda_p > 0 else None
    if raw_d is not None:
        raw_d = raw_d.to(device, memory_format=memory)
        opt_d = runs.adam(raw_d.parameters(), args.lr)
    state = run.checkpoint or {"pool": None, "meter": None, "picked": None}
    if run.checkpoint:
        raw_g.load_state_dict(state["net_g"])
        ema.load_state_dict(state["ema"])
        runs.load_adam(opt_g, state["opt_g"])
        if raw_d is not None:
            raw_d.load_state_dict(state["net_d"])
            runs.load_adam(opt_d, state["opt_d"])
    pool = data.TrainingPool(args.pool_size, args.batch_size, lanes, seeds, state["pool"], device, not args.usm)
    meter = runs.Meter(world, state["meter"])
    # how often each version was chosen
    picked = torch.zeros(len(sets.versions), device=device)
    if state["picked"] and world.is_main:
        picked += torch.tensor(state["picked"], device=device)
    batches = data.batches(dataset, run.start_step + 1, args.total_steps, lanes, args.workers, device.type == "cuda")
    batches = data.prefetch(batches, device)
    if run.start_step < args.total_steps:
        # read now, so that a first batch that cannot be read leaves no folder behind
        batches = itertools.chain([next(batches)], batches)
    lambdas = {name: value for name, value in vars(args).items() if name.startswith("lambda_")}
    run.open()
    run.say(f"{args.arch}, sampler {args.sampler}: {len(dataset)} sets of {len(sets.versions)} versions "
            f"({dataset.dropped} dropped), {sets.grouping()}; "
            f"{world.size} process(es) on {device}; "
            f"{f'from step {run.start_step}' if run.checkpoint else info['start']}")
    if args.val_photos:
        run.say(f"held out for validation: {val_sets.photographs()}")
    if dataset.unscored:
        run.say(f"{len(dataset.unscored)} images without a finite score are left out, first {dataset.unscored[0]}")
    # free the loaded checkpoint: its copy of the pool alone may be 100 MB
    state = run.checkpoint = None

    if "compile" in args.fast:
        losses.compile_parts(raw_g, vgg, reward)
    net_g, judge = world.parallel(raw_g.train()), None
    if raw_d is not None:
        # the generator's loss uses D without DDP
        judge = raw_d.train()
        net_d = world.parallel(judge)

    def save(step, weights):
        meter.check_finite(lambda s: ", ".join(dataset.names(s)), raw_g, raw_d)
        state = {"net_g": raw_g.state_dict(), "ema": ema.state_dict(), "opt_g": opt_g.state_dict(),
                 "pool": pool.state(world.gather_lanes), "meter": meter.state_dict(),
                 "picked": world.reduce(picked.clone()).tolist()}
        if raw_d is not None:
            state |= {"net_d": raw_d.state_dict(), "opt_d": opt_d.state_dict()}
        if weights and world.is_main:
            runs.save_weights(args.out / "weights" / f"ema_{step:07d}.pth", raw_g.state_dict(), ema.state_dict())
            if raw_d is not None:
                runs.save_weights(args.out / "weights" / f"net_d_{step:07d}.pth", raw_d.state_dict())
        run.save(step, state)

    shown_net = archs.within(autocast, ema)

    def look(step):
        if val_sets is not None:
            values = validate(shown_net, val_sets, args.degradation, reward, seeds, world)
            shown = " ".join(f"{k} {v:.3f}" for k, v in values.items())
            run.say(f"step {step} validation, {len(val_sets.stems)} images: {shown}")
            run.event(step, "val", **values)
        if step and world.is_main:
            path = args.out / "samples" / f"{step:07d}.png"
            sample_grid(shown_net, shown_set, pairs, reward, path)

    def due(step, every):
        return runs.due(step, args.total_steps, every)

    def no_sync(net, last):
        return net.no_sync() if world.size > 1 and not last else contextlib.nullcontext()

    def optimise(lq, gt, *keep, train_g=True):
        """One step of the networks on this process's pairs -> {term: its mean}. keep: SwinIR's, with --drop-path."""
        share = len(lanes) // args.accumulate
        parts = [slice(i, i + share) for i in range(0, len(lanes), share)]
        logged, fakes = Counter(), []

        # generator, Eq. 1
        if raw_d is not None:
            raw_d.requires_grad_(False)
        opt_g.zero_grad(set_to_none=True)
        for part in parts:
            with torch.set_grad_enabled(train_g), no_sync(net_g, part is parts[-1]):
                with autocast():
                    sr = net_g(lq[part], *(scales[:, part] for scales in keep))
                    terms = losses.generator_terms(sr, gt[part], lambdas, vgg, judge)
                loss_g = sum(weight * value for weight, value in terms.values())
                if train_g:
                    (loss_g / len(parts)).backward()
            fakes.append(sr.detach())
            logged.update({name: value.detach() / len(parts) for name, (_, value) in terms.items()})
        if train_g:
            opt_g.step()
            runs.update_ema(ema, raw_g, args.ema_decay)

        # discriminator: real = the chosen GT, fake = SR. No forward pass is shared: D's of the generator's loss and
        # these two each come after another power iteration of the spectral norm.
        if raw_d is not None:
            raw_d.requires_grad_(True)
            opt_d.zero_grad(set_to_none=True)
            for part, fake in zip(parts, fakes):
                for name, images, real in (("D_real", gt[part], True), ("D_fake", fake, False)):
                    with no_sync(net_d, part is parts[-1] and not real):
                        with autocast():
                            loss_d = losses.adversarial_loss(net_d(images), real)
                        (loss_d / len(parts)).backward()
                    logged.update({name: loss_d.detach() / len(parts)})
            opt_d.step()
        return logged

    warm_up = partial(optimise, train_g=False)
    if "graph" in args.fast:
        optimise = runs.Graphed(optimise, [opt_g] if raw_d is None else [opt_g, opt_d])
    stop = runs.StopSignal(world)
    if run.start_step == 0:
        look(0)
    for step in run.steps(args.total_steps):
        with meter.waiting():
            try:
                batch = next(batches)
            except (ValueError, OSError, MemoryError):
                # an image that cannot be read; with more processes the others wait elsewhere
                if world.size == 1 and step > run.start_step + 1:
                    save(step - 1, weights=False)
                raise
        lr = runs.learning_rate(step, args.lr, args.milestones)
        for group in opt_g.param_groups + (opt_d.param_groups if raw_d is not None else []):
            group["lr"] = lr

        lq, gt, version, score = pairs(batch, step, lanes, leave_out=meter.leave_out)
        picked.scatter_add_(0, version, torch.ones_like(version, dtype=picked.dtype))
        # training-pair pool: the winner only
        lq, gt = pool.swap((lq, gt), step)
        lq, gt = lq.contiguous(memory_format=memory_g), gt.contiguous(memory_format=memory)
        keep = [raw_g.draw_keep([seeds(step, lane, "drop-path") for lane in lanes])] if args.drop_path else []
        logged = (warm_up if step <= args.d_warmup else optimise)(lq, gt, *keep)
        meter.add(step, score, **logged)
        if due(step, args.log_every):
            meter.check_finite(lambda s: ", ".join(dataset.names(s)))
            counts = dict(zip(sets.versions, world.reduce(picked.clone()).tolist()))
            run.progress(step, args.total_steps, meter, lr, counts)
            for sentence in meter.left_out(lambda s: ", ".join(dataset.names(s))):
                run.say(sentence)
        stopping = stop.requested(step)
        # validate before saving, so that a finished run has its last validation
        if due(step, args.val_every):
            look(step)
        if due(step, args.save_every) or due(step, args.val_every) or stopping:
            save(step, weights=due(step, args.val_every))
        if stopping:
            run.say(f"stopped by a signal at step {step}; continue with --resume")
            return
    run.say(f"done: {args.out}")


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
