"""Tune a stochastic x4 generator on preferences between its own outputs: Diffusion-DPO with the weights of DP2O-SR.

    torchrun --nproc_per_node 4 -m dpo.tune --pairs POOL                          leaves runs/flow-base+dpo
    python -m dpo.tune --model stable-diffusion-2-base --gen CONTROLNET --pairs POOL
    python -m dpo.tune --demo                                                     small and short, on a CPU, no download
    python -m dpo.tune --hpo none                                                 Diffusion-DPO, without the weights

The pairs come from dpo.pool; the reference is the generator that made them, and it samples as it did then. The loss is
in preference.py. The mean reward of four seeds on held-out photographs is watched, and the weights of the best check
are kept. The training ends early when the error at the winners grows (likelihood displacement: DPO may make both images
of a pair less likely, as long as the loser loses more).
"""
from pathlib import Path

import runs
from dpo import options

HPO = runs.literal("dpo/preference", "HPO")
# CHOICE: sized so that the whole demo ends within four minutes on two cores
DEMO = dict(gen=options.DEMO_GENERATOR, pairs=options.DEMO_POOL, out=options.DEMO_TUNED, patch=0, batch_size=8,
            total_steps=100, beta=1000.0, lr=5e-5, val_groups=4, log_every=25, save_every=50, val_every=50, workers=0,
            threads=1)


def parse_args(argv=None):
    p = options.parser("dpo.tune", __doc__)
    g = options.add_generator(p, sampling=False, default=Path("runs/flow-base"),
                              help="the generator that made the candidates; with --model a ControlNet")
    g.add_argument("--gradient-checkpointing", action="store_true", help="with --model: less memory, more time")
    g = p.add_argument_group("pairs")
    g.add_argument("--pairs", type=Path, default=Path("runs/dpo-pool"), metavar="DIR",
                   help="folder that dpo.pool curate has written")
    g.add_argument("--patch", type=runs.COUNT, default=0,
                   help="side of the LR patches in pixels; 0: whole images (CHOICE)")
    g.add_argument("--equal-grids", action="store_true",
                   help="take from every pair what its 4x4 blocks of pixels differ by alike, so that no grid of that "
                        "period is preferred (CHOICE; it did not keep grids away, docs/results-dpo.md; PAPER: off)")
    g.add_argument("--val-groups", type=runs.COUNT, default=16,
                   help="images that are only watched, whole photographs at a time; 0: none, and no metric is loaded "
                        "(CHOICE)")
    options.add_metric_files(g)
    g = p.add_argument_group("loss")
    g.add_argument("--beta", type=runs.RATE, default=5000.0, help="strength of the tie to the reference (PAPER)")
    g.add_argument("--hpo", choices=HPO, default="both", help="weights of pairs (PAPER: both)")
    g.add_argument("--max-displacement", type=runs.WEIGHT, default=0.02,
                   help="stop when the error at the winners has grown by this share of the reference's; 0: never "
                        "(CHOICE: a safety net; the reward has often fallen before)")
    g.add_argument("--keep", choices=["last", "best"],
                   help="weights of the last step (PAPER), or of the check with the best held-out reward; default: "
                        "best (CHOICE), without --val-groups last, and what a run that is continued began with")
    g = options.add_training(p, batch_size=(1024, "PAPER"), lr=(2e-5, "PAPER"),
                             total_steps=(1000, "PAPER: 1000; 500 already beat SeeSR and OSEDiff"),
                             log_every=10, save_every=100, val_every=100)
    g.add_argument("--accumulate", type=runs.SIZE, default=1, help="micro-batches per step and process (CHOICE: 1)")
    args = options.parse(p, argv, {p: DEMO})
    options.check_generator(p, args)
    if args.gradient_checkpointing and not args.model:
        p.error("--gradient-checkpointing goes with --model")
    if args.equal_grids and args.model:
        p.error("--equal-grids is for FlowSR, which ends in a pixel shuffle: leave it out with --model")
    if args.keep == "best" and not args.val_groups:
        p.error("--keep best needs held-out images: give --val-groups")
    if args.out is None:
        run = args.gen.parent.parent if args.gen.suffix.lower() == ".pth" else args.gen
        args.out = Path("runs") / f"{run.name}+dpo"
    return args


# --help and flag errors need no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import contextlib
import copy
import itertools
import json
import math
from functools import partial

import numpy as np
import torch

import data
import degradations
import metrics
from dpo import candidates, flow, preference
from images import image_size, load_image

# CHOICE: largest gradient norm, and AdamW's decay; the paper gives neither
CLIP_GRAD, WEIGHT_DECAY = 1.0, 0.0
# CHOICE: --keep best is the default. The held-out reward of a small network falls again while the error at the winners
# has grown by 0.3 to 1 %: --max-displacement, at 2 %, comes after the harm
KEEP = "best"
# the part of a generator's identity that says how it samples
SAMPLING = ("steps", "tau", "guidance", "negative", "adain", "dtype")
FIXED = ("generator", "pairs_hash", "beta", "hpo", "patch", "batch_size", "lr", "keep", "seed", "val_groups",
         "equal_grids", "samples", "steps", "tau", "guidance")
# Flags of earlier commits, and their only value that is left. CHOICE: beta is the same for all t (the derivation for
# flows has a factor (1 - t)^2, without which Flow-DPO found it better); noise is drawn afresh (DPO), not the one that a
# candidate was made from, and with standard deviation 1, also where sampling starts at another tau; the learning rate
# is constant (Diffusion-DPO warms up over 500 steps)
RETIRED = {"beta_t": "const", "noise": "fresh", "hpo_gain": 1.0, "anchor": 0.0, "warmup": 0, "clip_grad": CLIP_GRAD,
           "weight_decay": WEIGHT_DECAY}


class PairSet(torch.utils.data.Dataset):
    """Preference pairs by (step, lane).

    A sample is {"lq", "win", "lose": uint8 (3, ., .), "weight": (), "index": number of the pair}; all three images are
    cut at one place. An epoch is all pairs; it goes through the groups in turn, in a new order every time, and through
    each group's pairs in an order of its own (CHOICE).
    rows: of pairs.jsonl; weights: one per row; crop: side of the LR patch, 0 for whole images.
    """

    def __init__(self, rows, weights, items, files, seeds, batch_size, crop):
        self.rows, self.weights, self.items, self.files = rows, weights, items, files
        self.seeds, self.batch_size, self.crop = seeds, batch_size, crop
        names = {name: k for k, name in enumerate(dict.fromkeys(row["name"] for row in rows))}
        self.groups = [[] for _ in names]
        for k, row in enumerate(rows):
            self.groups[names[row["name"]]].append(k)
        self.each = len(self.groups[0])
        if any(len(group) != self.each for group in self.groups):
            raise runs.UserError("pairs.jsonl: images with different numbers of pairs: curate again")

    def __len__(self):
        return len(self.rows)

    def index(self, step, lane):
        epoch, position = divmod((step - 1) * self.batch_size + lane, len(self.rows))
        turn, place = divmod(position, len(self.groups))
        group = np.random.default_rng(self.seeds(epoch, turn, "groups")).permutation(len(self.groups))[place]
        order = np.random.default_rng(self.seeds(epoch, int(group), "pairs")).permutation(self.each)
        return self.groups[group][order[turn]]

    def names(self, step):
        return sorted({self.rows[self.index(step, lane)]["name"] for lane in range(self.batch_size)})

    def sample(self, step, lane):
        k = self.index(step, lane)
        row = self.rows[k]
        files = self.files[row["name"]]
        paths = self.items[row["name"]]["lq"], files[row["w_seed"]], files[row["l_seed"]]
        lq, win, lose = (load_image(path) for path in paths)
        if self.crop:
            y, x = (int(np.random.default_rng(self.seeds(step, lane, axis)).integers(n - self.crop + 1))
                    for axis, n in zip("yx", lq.shape[1:]))
            lq, win, lose = (image[:, s * y:s * (y + self.crop), s * x:s * (x + self.crop)]
                             for s, image in ((1, lq), (4, win), (4, lose)))
        return {"lq": lq, "win": win, "lose": lose, "weight": torch.tensor(self.weights[k], dtype=torch.float32),
                "index": torch.tensor(k)}


def twice(x):
    """(b, ...) -> (2 b, ...), for winners and then losers, which share image, time and noise."""
    return torch.cat([x, x])


def check_sizes(paths, patch):
    """UserError names the first LR image smaller than a patch; whole images (patch 0) must all have one size."""
    sizes = {name: image_size(path) for name, path in paths.items()}
    first = next(iter(sizes.values()))
    for name, size in sizes.items():
        if min(size) < patch:
            raise runs.UserError(f"{paths[name]}: {size[0]}x{size[1]} pixels, smaller than --patch {patch}: take a "
                                 "smaller one")
        if not patch and size != first:
            raise runs.UserError(f"{paths[name]}: {size[0]}x{size[1]} pixels, the first has {first[0]}x{first[1]}: "
                                 "--patch 0 needs one size")


def weights_of(rows, hpo):
    """Weight of each pair; w_inter averages to 1 over the groups that are trained on, even if others are held out."""
    intra, inter = (np.array([row[name] for row in rows]) for name in ("w_intra", "w_inter"))
    return np.broadcast_to(preference.combine(intra, inter + 1 - inter.mean(), hpo), len(rows))


def hold_out(items, count, seed):
    """Names that are only watched: all images of photographs drawn by seed, until there are `count`."""
    photos, held = sorted({item["photo"] for item in items.values()}), []
    for k in np.random.default_rng(seed).permutation(len(photos)):
        if len(held) >= count:
            break
        held += [name for name, item in items.items() if item["photo"] == photos[k]]
    return held


def keep_of(out, resume, val_groups):
    """--keep where it is not given: that of the run that is continued (earlier commits had "last"), else KEEP."""
    earlier = out / "args.json"
    if resume != "no" and (out / "ckpt" / "last.pt").exists() and earlier.exists():
        return json.loads(earlier.read_text())["args"].get("keep", "last")
    return KEEP if val_groups else "last"


@torch.no_grad()
def watch(gen, net, items, judges, norm, which, world):
    """Mean reward of seeds 0 to 3 over the held-out items; processes share them."""
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for name in list(items)[world.rank::world.size]:
        lq, gt = (metrics.load(path, world.device) if path else None
                  for path in (items[name]["lq"], (items[name]["refs"] or [None])[0]))
        outputs = degradations.to_8bit(gen.sample(net, lq.expand(4, -1, -1, -1), [name] * 4, range(4)))
        raw = torch.stack([metric(outputs, gt.expand(4, -1, -1, -1) if metric.full_reference else None)
                           .double().reshape(-1) for metric in judges.values()], 1)
        rewards = candidates.rewards_of(raw.cpu().numpy(), norm, which, list(judges))
        total += torch.tensor([rewards.sum(), 4.0], dtype=torch.float64, device=world.device)
    total = world.reduce(total)
    value = (total[0] / total[1]).item()
    if not math.isfinite(value):
        raise runs.UserError(f"the reward of held-out images is {value}: look at {', '.join(judges)} and the "
                             "generator, or --val-groups 0")
    return value


def open_pairs(folder):
    """-> the pool, content of curation.json and pairs.jsonl, the generator's identity, items and files of the pool.

    UserError for pairs that are not of this pool: it was made or scored again since, or holds other images.
    """
    remedy = "python -m dpo.pool curate makes it"
    about = candidates.read_json(folder / "curation.json", remedy)
    rows = candidates.read_lines(folder / "pairs.jsonl", remedy)
    try:
        # "." or an absolute path
        pool, made_from, _ = folder / about["pool"], about["pool_hash"], about["reward"]
        names, seeds = {row["name"] for row in rows}, {row[key] for row in rows for key in ("w_seed", "l_seed")}
        whole = rows and all(math.isfinite(row[key]) for row in rows for key in ("w_intra", "w_inter"))
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise runs.UserError(f"{folder}: curation.json or pairs.jsonl is incomplete; {remedy}")
    made_by, items, files = candidates.open_pool(pool)
    known = names <= items.keys() and seeds <= set(range(made_by["samples"]))
    if made_from != candidates.pool_hash(pool) or not known:
        raise runs.UserError(f"{folder}: pairs of another pool than {pool} is now (sampled or scored again since); "
                             f"{remedy}")
    return pool, about, rows, made_by["generator"], items, files


def main(args):
    world, seeds, autocast = runs.start_training(args.device, args.threads, args.seed, args.precision)
    device, lanes = world.device, world.lanes(args.batch_size)
    if len(lanes) % args.accumulate:
        raise runs.UserError(f"--accumulate {args.accumulate} does not divide the {len(lanes)} pairs of one process")

    # cheap checks first, so that a bad command fails before anything is loaded
    args.keep = args.keep or keep_of(args.out, args.resume, args.val_groups)
    run = runs.Run(args.out, vars(args), world, args.resume, FIXED, RETIRED, args.tensorboard)
    run.check_steps(args.total_steps)
    if args.demo and (args.gen, args.pairs) == (options.DEMO_GENERATOR, options.DEMO_POOL):
        shorter = args.total_steps if args.total_steps != DEMO["total_steps"] else None
        options.make_demo_start(world, options.DEMO_POOL / "curation.json", shorter)

    # the generator, which must be the one that made the candidates, and samples as it did then
    folder = args.pairs if args.pairs.is_dir() else args.pairs.parent
    pool, about, rows, made_by, items, files = open_pairs(folder)
    sampling = {name: made_by.get(name) for name in ("steps", "tau", "guidance")}
    gen = flow.load_generator(args.gen, args.model, device, sampling["steps"], sampling["tau"], prompts=args.prompts,
                              guidance=sampling["guidance"], gradient_checkpointing=args.gradient_checkpointing)
    trained, expected = ({k: v for k, v in identity.items() if k not in SAMPLING}
                         for identity in (gen.identity(gen.net), made_by))
    if trained != expected:
        changes = "; ".join(runs.changes(expected, trained).values())
        raise runs.UserError(f"--gen {args.gen}: the candidates of {pool} are another generator's ({changes}); DPO "
                             "starts from the one that made them")
    run.pin(generator=runs.digest(trained), pairs_hash=runs.digest(folder / "pairs.jsonl"), **sampling)

    # pairs: those of some photographs are only watched
    held = hold_out(items, args.val_groups, seeds(0, 0, "val-groups"))
    held_out = {name: items[name] for name in held}
    rows = [row for row in rows if row["name"] not in held_out]
    if not rows:
        photos = len({item["photo"] for item in items.values()})
        raise runs.UserError(f"--val-groups {args.val_groups}: nothing is left to train on: {len(items)} images of "
                             f"{photos} photos")
    dataset = PairSet(rows, weights_of(rows, args.hpo), items, files, seeds, args.batch_size, args.patch)
    check_sizes({row["name"]: items[row["name"]]["lq"] for row in rows}, args.patch)
    run.pin(samples=len(dataset))
    judges, norm = {}, None
    if held:
        norm = candidates.open_norm(folder / "norm.json")
        fr, nr = ([m for m, v in norm["metrics"].items() if v["full_reference"] == full] for full in (True, False))
        judges = candidates.create_metrics(fr, nr, dict(args.metric_weights), device)
        candidates.check_norm(folder / "norm.json", norm, candidates.describe_metrics(judges))

    def look(net):
        return watch(gen, net, held_out, judges, norm, about["reward"], world) if held else None

    # networks: both start from the EMA weights; nothing random is in them
    reference, raw = gen.net.eval().requires_grad_(False), copy.deepcopy(gen.net).requires_grad_(True)
    opt = torch.optim.AdamW(raw.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=WEIGHT_DECAY)
    state = run.checkpoint
    if state:
        raw.load_state_dict(state["net"])
        opt.load_state_dict(state["opt"])
        first, best, ended = state["first"], state["best"], state["ended"]
    else:
        first, best, ended = look(raw), None, ""
    meter = runs.Meter(world, state and state["meter"])
    batches = data.batches(dataset, run.start_step + 1, args.total_steps, lanes, args.workers, device.type == "cuda")
    batches = data.prefetch(batches, device)
    if run.start_step < args.total_steps:
        # a first batch that cannot be read leaves no folder
        batches = itertools.chain([next(batches)], batches)
    run.open()
    run.say(f"{args.gen}: {sum(p.numel() for p in raw.parameters()):,} weights, {len(dataset)} pairs of "
            f"{len(dataset.groups)} images, {len(held)} images held out, beta {args.beta:g}, HPO {args.hpo}, "
            f"{world.size} process(es) on {device}" + (f"; from step {run.start_step}" if state else ""))
    if not state and held:
        run.say(f"step 0 held out: reward {first:.4f}")
        run.event(0, "val", reward=first)
    net = world.parallel(raw.train())

    def save(step):
        meter.check_finite(lambda s: ", ".join(dataset.names(s)), raw)
        run.save(step, {"net": raw.state_dict(), "opt": opt.state_dict(), "meter": meter.state_dict(), "first": first,
                        "best": best, "ended": ended})

    def errors(step, part, batch):
        """-> d of the network, then of the reference, at winners and losers, each (b,). All share t and noise (DPO)."""
        lq, win, lose = (batch[kind].to(device).float() / 255 for kind in ("lq", "win", "lose"))
        if args.equal_grids:
            win, lose = preference.equal_grids(win, lose)
        names = [dataset.rows[int(k)]["name"] for k in batch["index"]]
        # winners first, then losers
        with torch.no_grad(), autocast():
            x0 = torch.cat([gen.encode(image, lq) for image in (win, lose)]).float()
            c = gen.condition(lq, names)
            c = tuple(map(twice, c)) if isinstance(c, tuple) else twice(c)
        t = [np.random.default_rng(seeds(step, lane, "time")).random() for lane in part]
        t = torch.tensor(t, dtype=torch.float32, device=device).repeat(2)
        eps = torch.stack([degradations.normal_field(x0.shape[1:], seeds(step, lane, "eps")) for lane in part])
        xt, target = gen.noised(x0, twice(eps).to(device), t)
        with autocast():
            predicted = gen.predict(net, xt, t, c)
            with torch.no_grad():
                predicted_ref = gen.predict(reference, xt, t, c)
        return *preference.error(predicted, target).chunk(2), *preference.error(predicted_ref, target).chunk(2)

    def due(step, every):
        return runs.due(step, args.total_steps, every)
    stop = runs.StopSignal(world)
    if ended:
        run.say(f"nothing to do: {args.out} has stopped at step {run.start_step}; remove it to train again")
    for step in run.steps(args.total_steps) if not ended else ():
        with meter.waiting():
            batch = next(batches)
        opt.zero_grad(set_to_none=True)
        share, terms = len(lanes) // args.accumulate, []
        for k in range(0, len(lanes), share):
            part = {name: value[k:k + share] for name, value in batch.items()}
            # processes average their gradients once per step
            last = k + share == len(lanes)
            with net.no_sync() if world.size > 1 and not last else contextlib.nullcontext():
                win, lose, win_ref, lose_ref = errors(step, lanes[k:k + share], part)
                losses, logit = preference.dpo_loss(win, win_ref, lose, lose_ref, args.beta, part["weight"].to(device))
                loss = losses.mean()
                (loss / args.accumulate).backward()
            terms.append({"loss": loss, "inside": logit.mean(), "accuracy": preference.implicit_accuracy(logit),
                          "win": win.mean(), "win_change": (win - win_ref).mean(),
                          "lose_change": (lose - lose_ref).mean(), "win_ref": win_ref.mean()})
        grad = torch.nn.utils.clip_grad_norm_(raw.parameters(), CLIP_GRAD)
        opt.step()

        means = {name: torch.stack([term[name].detach() for term in terms]).mean() for name in terms[0]}
        meter.add(step, **means, grad=grad)
        if due(step, args.log_every):
            meter.check_finite(lambda s: ", ".join(dataset.names(s)))
            means = run.progress(step, args.total_steps, meter, args.lr, {})
            # above 0: the winners, too, have become less likely
            shift = means["win_change"] / means["win_ref"]
            if args.max_displacement and shift > args.max_displacement:
                ended = (f"the error at the winners has grown by {shift:.1%} of the reference's: likelihood "
                         "displacement; take a larger --beta or a smaller --lr")
        if held and (due(step, args.val_every) or ended):
            value = look(raw)
            run.say(f"step {step} held out: reward {first:.4f} -> {value:.4f}")
            run.event(step, "val", reward=value)
            if args.keep == "best" and (best is None or value > best["value"]):
                best = {"value": value, "step": step, "net": {k: v.cpu().clone() for k, v in raw.state_dict().items()}}
        stopping = stop.requested(step)
        if due(step, args.save_every) or stopping or ended:
            save(step)
        if ended:
            run.say(f"stopped at step {step}: {ended}")
            break
        if stopping and step < args.total_steps:
            run.say(f"stopped by a signal at step {step}; continue with --resume")
            return
    if world.is_main:
        gen.save(args.out / "weights", best["net"] if best else raw.state_dict())
        run.say(f"done: {args.out / 'weights'}" + (f", of step {best['step']}" if best else ""))


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
