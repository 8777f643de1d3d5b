"""Fine-tune a trained network on an NR-IQA model directly, through LoRA weights (paper Sec. 4.3, Eq. 5, Supp. 8.3).

    python finetune_lora.py --demo                                      in small, on a CPU, embedded reward, no download
    torchrun --nproc_per_node 4 finetune_lora.py --reward musiq         the paper: from runs/swinir-amo, 20,000 steps
    python finetune_lora.py --lambda-p 2                                FT_HP: more perceptual loss
    python finetune_lora.py --lambda-a 0.1                              FT_IG: with the discriminator of the run
    python finetune_lora.py --reward none --lambda-a 0.2                FT_NNR x2 (0.5: x5): more GAN, no reward
    python finetune_lora.py --tune all                                  all weights, no LoRA (the paper's Fig. 3 and 5)
    python finetune_lora.py --base realesrgan-x4plus --arch rrdbnet             from weights of a known architecture

It reads as train.py does. Data, pairs and losses are those of the run it starts from (--base); for a bare weights file
they are the paper's of its --arch. What differs: the base is frozen and low-rank adapters are trained; there is a
discriminator only when --lambda-a > 0; the loss has the term - lambda_q Q(SR), SR clamped to [0, 1] (Eq. 5). A quality
model can be fooled, so every validation also reports metrics that are not optimised and looks for structured noise, and
the run says so when only the optimised score gained.
Leaves lora/adapter.pth (A and B only) and weights/merged.pth, a plain generator.
"""
import argparse
import sys
from pathlib import Path

import runs

ARCHS = runs.literal("archs", "ARCHS")
# "as stage 2" (Supp. 8.3): taken from the run that is tuned, and so are its weights of losses
OF_BASE = ("data", "versions", "val_photos", "load_size", "crop", "degradation", "sampler", "tau", "atlas",
           "vgg_weights", "d_features", "batch_size", "group_size", "pool_size", "ema_decay", "drop_path",
           "channels_last", "seed")
# flags of train.py whose values only that run, or the architecture, decides
NO_FLAGS = ("--load-size", "--tau", "--atlas", "--d-features", "--group-size", "--drop-path", "--channels-last")
# CHOICE: under 90 s on two cores
DEMO = dict(reward=["ranker"], watch=["piqe"], lr=2e-3, total_steps=100, log_every=25, save_every=50, val_every=0,
            threads=1, workers=0)


def lambda_q(text):
    """An argparse type: a weight, or auto."""
    return text if text == "auto" else runs.WEIGHT(text)


lambda_q.__name__ = "number"


def parse_args(argv=None):
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    pre = runs.Parser(add_help=False)
    pre.add_argument("--demo", action="store_true",
                     help="from the demo's AMO run, which is made if it is missing; embedded reward; same code")
    pre.add_argument("--arch", choices=list(ARCHS),
                     help="backbone; default: that of --base, else swinir. Fills the defaults marked [arch]")
    pre.add_argument("--base", type=runs.CHECKPOINT, metavar="PATH",
                     help="run folder to start from (default runs/<arch>-<sampler>), or with --arch a weights file or "
                          "public name (python -m prepare.weights list)")
    pre.add_argument("--sampler", default="amo", help=argparse.SUPPRESS)
    first = pre.parse_known_args(words)[0]
    arch = first.arch or ("compact-small" if first.demo else "swinir")
    base = first.base or Path("runs") / f"{arch}-{first.sampler}"
    trained = runs.read_record(base / "args.json")["args"] if (base / "args.json").is_file() else {}
    arch = first.arch or trained.get("arch") or arch
    p = runs.Parser(description=__doc__, parents=[pre], conflict_handler="resolve")
    runs.add_training(p, NO_FLAGS)
    g = p.add_argument_group("fine-tuning (Eq. 5)")
    g.add_argument("--lambda-q", type=lambda_q,
                   help="weight of the reward; default 0.05, for MUSIQ's 0-100 (Supp. 8.3), 1 where --reward gives "
                        "weights, auto with --demo. auto: chosen so that, averaged over the first 8 batches, the "
                        "reward gradient on the adapted layers has the same norm as the gradient of L1 + perceptual "
                        "loss (CHOICE)")
    g.add_argument("--rank", type=runs.SIZE,
                   help="[arch] of the adapters (Supp. 8.3); the update is B A, since alpha is the rank (CHOICE)")
    g.add_argument("--tune", choices=["lora", "layers", "all"], default="lora",
                   help="lora; layers: the full weights of the same layers; all: every weight (the paper's naive)")
    g.add_argument("--stop-gain", type=runs.WEIGHT, default=0.0,
                   help="stop once the validation reward exceeds the base's by this many points (0: all --total-steps)")
    g.add_argument("--watch", nargs="*", default=["niqe", "piqe", "ranker"], metavar="NAME",
                   help="no-reference metrics that validation reports and nothing optimises (CHOICE: piqe alone likes "
                        "pixel grids)")
    g = p.add_argument_group("start and continue")
    g.add_argument("--d-init", type=runs.CHECKPOINT, metavar="FILE",
                   help="discriminator weights instead of the run's; with --lambda-a > 0 only")
    runs.add_weights_key(g)
    g.add_argument("--resume", nargs="?", const="must", default="no", choices=["must", "auto", "no"],
                   help="continue --out from its checkpoint; auto: start if there is none (Slurm requeue)")
    g.add_argument("--out", type=Path,
                   help="run folder (default: <base>+<reward>[-<variant>]; variant: hp, ig, nnr2, nnr5, layers, naive)")
    # the paper's defaults, then what the base was trained with, then those of this stage; explicit flags still win
    values = ARCHS[arch]["train"] | ARCHS[arch]["gan"]
    of_base = {k: v for k, v in trained.items()
               if k in OF_BASE or k.startswith("lambda_") and k not in ("lambda_a", "lambda_q")}
    if trained.get("sampler") not in ("sma", "smp") and not of_base.get("atlas"):
        of_base.pop("tau", None)
    # argparse turns strings into paths
    p.set_defaults(arch=arch, base=base, stage="gan", usm=False, **values | of_base)
    tune = {k: v for k, v in ARCHS[arch]["tune"].items() if k != "targets"}
    p.set_defaults(**tune, lambda_a=0.0, total_steps=20_000, save_every=1_000, val_every=2_000)
    if first.demo:
        p.set_defaults(**DEMO)
    args = p.parse_args(words)
    if base.is_file() and not first.arch:
        p.error(f"--base {base}: a weights file does not say what it is: name its --arch")
    if args.reward == ["none"]:
        if args.lambda_q == "auto" or args.stop_gain:
            flag = "--stop-gain" if args.stop_gain else "--lambda-q auto"
            p.error(f"{flag} looks at the reward: it needs a --reward")
        if args.lambda_q:
            p.error(f"--lambda-q {args.lambda_q:g} weighs the reward: it needs a --reward")
        args.lambda_q = 0.0
    elif args.lambda_q is None:
        args.lambda_q = 1.0 if any("=" in word for word in args.reward) else "auto" if first.demo else 0.05
    if args.d_init and not args.lambda_a:
        p.error(f"--d-init {args.d_init}: there is no discriminator with --lambda-a 0, the default")
    # what chooses the ground truths
    args.gt_reward, file = trained.get("reward", args.reward), trained.get("reward_weights")
    # earlier commits took a file for a reward that finds its own
    own = runs.finds_own_weights(runs.split_reward(args.gt_reward[0])[0])
    args.gt_reward_weights = Path(file) if file and not own else None
    if args.reward == args.gt_reward:
        # one model, where only one of them has a file
        args.reward_weights = args.reward_weights or args.gt_reward_weights
        args.gt_reward_weights = args.gt_reward_weights or args.reward_weights
    if args.sampler != "amo" and args.atlas:
        # of a base whose amo read one, softly where it has a tau
        args.atlas, args.tau = [], None
    if args.gt_reward == ["none"] and runs.chooses_by_score(args.sampler) and not args.atlas:
        p.error(f"{base}: no run there whose reward could choose the ground truths; make it with: python train.py "
                f"--arch {arch} --sampler {args.sampler}, or name a --sampler that needs none")
    if args.out is None:
        more_p = args.lambda_p > of_base.get("lambda_p", 1.0)
        variants = {"all": ["naive"], "layers": ["layers"], "lora": []}[args.tune] + ["hp"] * more_p
        if args.lambda_a:
            variants.append(f"nnr{args.lambda_a / 0.1:g}" if args.reward == ["none"] else "ig")
        rewards = "+".join(map(runs.short_reward, args.reward))
        folder = Path("runs") / base.stem if base.is_file() else base
        args.out = folder.with_name("-".join([f"{folder.name}+{rewards}", *variants]))
    checked = argparse.Namespace(**vars(args) | {"reward": args.gt_reward})
    runs.check_training(p, checked)
    # its default depends on the sampler
    args.tau = checked.tau
    given = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    args.words = words
    inherited = ", ".join(k for k in of_base if k not in given) or "nothing"
    args.sources = f"of {base}: {inherited}; given: {', '.join(sorted(given)) or 'nothing'}; else the paper's of {arch}"
    return args


# --help and flag errors need no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import contextlib
import copy
import itertools
import math
from collections import Counter
from functools import partial

import torch

import archs
import data
import degradations
import iqa
import lora
import losses
import metrics
from train import FIXED as FIXED_TRAINING
from train import RETIRED as RETIRED_TRAINING
from train import chosen_by, find_data, training_set

# flags of earlier commits, and what this one does in their place
RETIRED = RETIRED_TRAINING | {"alpha": None, "targets": None}


def fixed(args):
    """What a resumed run must share with its checkpoint."""
    return (*FIXED_TRAINING, "gt_reward", "lambda_q", "tune", "rank", "base_sha256")


def choose_tuned(net, tune, targets, rank):
    """Make of --tune what is trained: adds adapters, or leaves the weights of some layers or all. -> parameters"""
    if tune == "lora":
        lora.add_lora(net, targets, rank)
        return lora.lora_parameters(net)
    if tune == "all":
        tuned = list(net.parameters())
    else:
        tuned = [layer.weight for layer in lora.matching_layers(net.requires_grad_(False), targets).values()]
    for p in tuned:
        p.requires_grad_(True)
    return tuned


def gradient_ratio(net, targets, dataset, pairs, lambdas, vgg, reward, lanes, accumulate, world, batches=8):
    """lambda_q = auto: mean over the first batches of |d losses / d W| / |d Q / d W|, W the target layers of the base.

    CHOICE. Both then pull equally at what is adapted, and --tune lora, layers and all get the same number. (On the
    pixels of SR much of Q's gradient is fine noise that no weight can follow.)
    """
    weights, ratios = [layer.weight.requires_grad_(True) for layer in lora.matching_layers(net, targets).values()], []

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])
    for step in range(1, batches + 1):
        batch = data.collate([dataset.sample(step, lane) for lane in lanes])
        all_lq, all_gt, _, _ = pairs(batch, step, lanes)
        pull = push = 0
        for lq, gt in zip(all_lq.chunk(accumulate), all_gt.chunk(accumulate)):
            sr = net(lq)
            terms = losses.generator_terms(sr, gt, lambdas, vgg)
            pull = pull + gradient(sum(weight * value for weight, value in terms.values()))
            push = push + gradient(losses.mean_reward(reward, sr)[0])
        ratios.append(world.reduce(pull).norm() / world.reduce(push).norm())
    net.requires_grad_(False)
    ratio = torch.stack(ratios).mean().item()
    if not 0 < ratio < float("inf"):
        raise runs.UserError(f"--lambda-q auto: the ratio of the gradients is {ratio}: give a number")
    return ratio


@torch.no_grad()
def validate(base, net, sets, judges, degradation, seeds, world):
    """Means over the validation images, which processes share: every metric in native units, psnr, structured noise.

    peaks: metrics.noise_peaks of SR - base SR; unsharp_peaks: the same of a plain unsharp mask of the base with as much
    reward, or with the highest that such a mask reaches; unsharp_equal: share of images where it has as much. A value
    that is not finite is left out of its mean; unscored: the number of such values, if there are any.
    """
    sums, counts = Counter(), Counter()
    for i in range(world.rank, len(sets.stems), world.size):
        lq, gt = data.validation_pair(sets, i, seeds, world.device, degradation)
        sr, before = (degradations.to_8bit(archs.upscale_tiled(g, lq)) for g in (net, base))
        values = {name: metric(sr, gt).item() for name, metric in judges.items()}
        values["peaks"] = metrics.noise_peaks(sr - before).item()
        if math.isfinite(values.get("reward", math.nan)):
            like, equal = metrics.unsharp_like(before, sr, lambda x: judges["reward"](x, None))
            values |= {"unsharp_peaks": metrics.noise_peaks(like - before).item(), "unsharp_equal": equal}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        sums.update(finite)
        counts.update([*finite, *["unscored"] * (len(values) - len(finite))])
    names = [*judges, "peaks", *(["unsharp_peaks", "unsharp_equal"] if "reward" in judges else [])]
    totals = torch.tensor([[part[name] for name in [*names, "unscored"]] for part in (sums, counts)],
                          dtype=torch.float64, device=world.device)
    sums, counts = world.reduce(totals).tolist()
    unscored = {"unscored": counts.pop()} if counts[-1] else {}
    return {name: value / max(1, count) for name, value, count in zip(names, sums, counts)} | unscored


def verdict(before, after, judges):
    """Lines of values, structured noise, warnings. Did only the optimised score gain?

    before, after: values of the base and of the tuned network.
    """
    better = {m: (after[m] - before[m]) * (-1 if metric.lower_is_better else 1) > 0 for m, metric in judges.items()}
    worse = [m for m in judges if m not in ("reward", "psnr") and not better[m] and after[m] != before[m]]
    lines = ["; ".join(f"{m} {before[m]:.2f} -> {after[m]:.2f}" for m in judges),
             f"structured noise: {after['peaks']:.1%} of the change"]
    if "unscored" in after:
        lines[0] += f"; {after['unscored']:.0f} scores are not finite and left out"
    if "unsharp_peaks" in after:
        lines[1] += (f", {after['unsharp_peaks']:.1%} of an unsharp mask's (with the same reward in "
                     f"{after['unsharp_equal']:.0%} of the images, in the others with the most it reaches)")
        if after["peaks"] > after["unsharp_peaks"] + metrics.PEAKS_ABOVE_UNSHARP:
            lines.append("WARNING, structured noise: isolated peaks in the spectrum of what was changed")
    else:
        lines[1] += " (no reward, so no unsharp mask to compare with)"
    if better.get("reward") and worse:
        lines.append(f"WARNING, the reward may be fooled: it rose while {', '.join(worse)} got worse")
    return "\n  ".join(lines)


@torch.no_grad()
def sample_grid(base, net, sets, degradation, seeds, device, path, rows=4, side=64):
    """PNG: the flattest place of a few validation images, where grids show first: base | tuned | original.

    Every pixel is enlarged three times.
    """
    from report import pictures
    cells = []
    for i in range(min(rows, len(sets.stems))):
        lq, gt = data.validation_pair(sets, i, seeds, device, degradation)
        y, x = pictures.flattest(gt, side)
        images = {"base": archs.upscale_tiled(base, lq).clamp(0, 1), "tuned": archs.upscale_tiled(net, lq).clamp(0, 1),
                  "original": gt}
        cells.append([(pictures.enlarged_crop(image, y, x, side, 3), name) for name, image in images.items()])
    pictures.save_grid(path, cells)


def with_demo_base(args):
    """The same arguments; where the run that the demo tunes is missing, it is made, and its flags are the defaults.

    UserError where another --base is missing: its flags would be, too, and errors would speak of the defaults.
    """
    default = Path("runs") / f"{args.arch}-{args.sampler}"
    if args.base != default and not args.base.exists():
        raise runs.UserError(f"--base {args.base}: no such run folder or weights file; {runs.how_to_get(args.base)}")
    if not args.demo or args.base != default or (args.base / "weights").exists():
        return args
    shorter = ["--total-steps", args.total_steps] if args.total_steps != DEMO["total_steps"] else []
    world = runs.start_world(args.device, args.threads)
    words = ["--demo", "--sampler", args.sampler, "--arch", args.arch, "--device", args.device, "--resume", "auto",
             *shorter]
    runs.make_missing(args.base / "weights", world, "train.py", *words)
    return parse_args(args.words)


def create_judges(reward, watch, device):
    """{name: Metric} of what a validation reports: the reward, if there is one, the metrics to watch, and PSNR."""
    judges = {} if reward is None else {"reward": metrics.Metric(lambda sr, gt: reward(sr))}
    return judges | {name: metrics.create_metric(name, device, flag="--watch") for name in [*watch, "psnr"]}


def create_chooser(args, reward, device):
    """What chooses the ground truths: the base's reward, or None. `reward`, which is optimised, where they are one."""
    if args.gt_reward == ["none"] or not runs.chooses_by_score(args.sampler):
        return None
    same = (args.gt_reward, args.gt_reward_weights) == (args.reward, args.reward_weights)
    return reward if same else iqa.create_reward(args.gt_reward, device, args.gt_reward_weights, musiq=args.musiq)


def unwatched(val_sets):
    """What the log says where nothing is validated."""
    return "" if val_sets is not None else "; nothing watches the reward without validation images (--val-photos N)"


def main(args):
    args = with_demo_base(args)
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
    sets, val_sets = find_data(args, world, seeds)
    if args.stop_gain and val_sets is None:
        raise runs.UserError(f"--stop-gain needs validation images, and {args.data} has no Test split: "
                             "hold out photos with --val-photos N")
    init = runs.find_weights(
        args.base, f"make it with: python train.py --arch {args.arch} --sampler {args.sampler}, or name a --base FILE")
    d_init = None if args.lambda_a == 0 else args.d_init or runs.find_discriminator(args.base)
    reward = None
    if args.reward != ["none"]:
        reward = iqa.create_reward(args.reward, device, args.reward_weights, need_gradient=True, musiq=args.musiq)
    gt_reward = create_chooser(args, reward, device)
    judges = {} if val_sets is None else create_judges(reward, args.watch, device)
    dataset = training_set(args, world, gt_reward, seeds, sets)
    run.pin(samples=len(dataset), **chosen_by(dataset, run))
    pairs = partial(data.make_pair, seeds=seeds, device=device, degradation=args.degradation,
                    group_size=args.group_size, crop=args.crop, reward=gt_reward, usm=args.usm,
                    sampler=args.sampler, tau=args.tau)

    # networks: raw_* are the plain modules that are saved, net_* what the loop calls
    # initial weights; nothing else uses this state
    torch.manual_seed(args.seed)
    drop_path = {"drop_path": args.drop_path} if "drop_path" in ARCHS[args.arch]["train"] else {}
    raw_g, info = archs.load_start(init, "--base", args.arch, args.weights_key, **drop_path)
    run.pin(sizes=info["sizes"])
    run.pin(base_sha256=lora.base_hash(raw_g))
    memory = torch.channels_last if args.channels_last else torch.contiguous_format
    memory_g = memory if archs.is_convolutional(raw_g) else torch.contiguous_format
    base = copy.deepcopy(raw_g).eval().requires_grad_(False).to(device, memory_format=memory_g)
    targets = lora.default_targets(raw_g, args.arch)
    tuned = choose_tuned(raw_g, args.tune, targets, args.rank)
    raw_g = raw_g.to(device, memory_format=memory_g)
    ema = copy.deepcopy(raw_g).eval().requires_grad_(False)
    opt_g = runs.adam(tuned, args.lr)
    vgg = losses.VGGFeatureLoss(args.vgg_weights).to(device, memory_format=memory) if args.lambda_p > 0 else None
    raw_d = archs.UNetDiscriminatorSN(args.d_features) if args.lambda_a > 0 else None
    if raw_d is not None:
        archs.load_weights(raw_d, d_init)
        raw_d = raw_d.to(device, memory_format=memory)
        opt_d = runs.adam(raw_d.parameters(), args.lr)
    state = run.checkpoint or {"pool": None, "meter": None, "picked": None,
                               "lambda_q": args.lambda_q, "before": None, "after": None}
    if run.checkpoint:
        raw_g.load_state_dict(state["net_g"])
        ema.load_state_dict(state["ema"])
        runs.load_adam(opt_g, state["opt_g"])
        if raw_d is not None:
            raw_d.load_state_dict(state["net_d"])
            runs.load_adam(opt_d, state["opt_d"])
    # before, after: validation of the base, the last one
    weight_q, before, after = state["lambda_q"], state["before"], state["after"]
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
    if weight_q == "auto":
        weight_q = gradient_ratio(base, targets, dataset, pairs, lambdas, vgg, reward, lanes, args.accumulate, world)
    lambdas["lambda_q"] = weight_q
    run.open()
    adapters = f" in {len(lora.adapted(raw_g))} adapters of rank {args.rank}" if args.tune == "lora" else ""
    count, total = (sum(p.numel() for p in weights) for weights in (tuned, base.parameters()))
    run.say(f"{args.arch}, {args.tune}: {count:,} of {total:,} weights{adapters}, lambda_q {weight_q:.4g}; "
            f"sampler {args.sampler}, {len(dataset)} sets, {sets.grouping()}; "
            f"{world.size} process(es) on {device}; "
            f"{f'from step {run.start_step}' if run.checkpoint else info['start']}")
    run.say(f"values {args.sources}{unwatched(val_sets)}")
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
        state |= {"lambda_q": weight_q, "before": before, "after": after}
        if raw_d is not None:
            state |= {"net_d": raw_d.state_dict(), "opt_d": opt_d.state_dict()}
        if weights and world.is_main:
            if args.tune == "lora":
                lora.save_lora(args.out / "lora" / "adapter.pth", raw_g, ema)
            runs.save_weights(args.out / "weights" / "merged.pth", *map(lora.merged_state_dict, (raw_g, ema)))
            if raw_d is not None:
                runs.save_weights(args.out / "weights" / f"net_d_{step:07d}.pth", raw_d.state_dict())
        run.save(step, state)

    shown = archs.within(autocast, base), archs.within(autocast, ema)

    def look(step):
        nonlocal before, after
        if val_sets is not None:
            after = validate(*shown, val_sets, judges, args.degradation, seeds, world)
            before = before or after
            run.say(f"step {step} validation, {len(val_sets.stems)} images: {verdict(before, after, judges)}")
            run.event(step, "val", **after)
        if step and world.is_main:
            path = args.out / "samples" / f"{step:07d}.png"
            sample_grid(*shown, val_sets or sets, args.degradation, seeds, device, path)

    def gained_enough():
        return args.stop_gain and after and after["reward"] - before["reward"] >= args.stop_gain

    def due(step, every):
        return runs.due(step, args.total_steps, every)

    def no_sync(net, last):
        return net.no_sync() if world.size > 1 and not last else contextlib.nullcontext()

    def optimise(lq, gt, *keep):
        """One step of the networks on this process's pairs -> {term: its mean}. keep: SwinIR's, with --drop-path."""
        share = len(lanes) // args.accumulate
        parts = [slice(i, i + share) for i in range(0, len(lanes), share)]
        logged, fakes = Counter(), []

        # generator, Eq. 5
        if raw_d is not None:
            raw_d.requires_grad_(False)
        opt_g.zero_grad(set_to_none=True)
        for part in parts:
            with no_sync(net_g, part is parts[-1]):
                with autocast():
                    sr = net_g(lq[part], *(scales[:, part] for scales in keep))
                    terms = losses.generator_terms(sr, gt[part], lambdas, vgg, judge, reward)
                loss_g = sum(weight * value for weight, value in terms.values())
                (loss_g / len(parts)).backward()
            fakes.append(sr.detach())
            logged.update({name: value.detach() / len(parts) for name, (_, value) in terms.items()})
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

    if "graph" in args.fast:
        optimise = runs.Graphed(optimise, [opt_g] if raw_d is None else [opt_g, opt_d])
    stop = runs.StopSignal(world)
    if run.start_step == 0:
        look(0)
    if gained_enough():
        run.say(f"nothing to do: --stop-gain {args.stop_gain:g} is reached; a larger one continues")
        return
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
        logged = optimise(lq, gt, *keep)
        meter.leave_out(step, "rewards", logged.pop("unscored", None), len(lanes), limit=args.batch_size / 10)
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
        if gained_enough():
            gain = after["reward"] - before["reward"]
            run.say(f"reward +{gain:.2f} at step {step}: --stop-gain {args.stop_gain:g} is reached")
            return
        if stopping:
            run.say(f"stopped by a signal at step {step}; continue with --resume")
            return
    run.say(f"done: {args.out}")


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
