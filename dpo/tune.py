"""The two trainings of dpo.py: `pretrain` makes a generator (rectified flow or diffusion), `train` tunes one on preference pairs (Diffusion-DPO with the weights of DP2O-SR)."""
import copy
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

import archs
import data
import degradations
from dpo import pool as dpo_pool
from dpo import flow
import iqa
from dpo import preference
import metrics as quality
import runs
import metrics as scoring
from images import image_size, load_image

PRETRAIN_FIXED = ("size", "prediction", "base_hash", "degradation", "patch", "load_size", "batch_size", "group_size", "lr", "warmup", "ema_decay", "times", "seed", "samples")
TRAIN_FIXED = ("generator", "pairs_hash", "beta", "beta_t", "noise", "anchor", "hpo", "hpo_gain", "patch", "batch_size", "lr", "warmup", "weight_decay", "keep", "seed", "val_groups", "samples")


# Stage 1

def spread_of_residual(gen, draw, batch_size, batches=16):
    """sigma_r: standard deviation of hr - base over some training pairs, the same for every number of processes."""
    residuals = [F.pixel_shuffle(gen.encode(hr, lq), flow.SCALE) for lq, hr in (draw(k, range(batch_size)) for k in range(1, batches + 1))]
    return torch.stack([r.double().square().mean() for r in residuals]).mean().sqrt().item()


@torch.no_grad()
def check_generator(gen, net, held_out):
    """On held-out pairs, with fixed times and noise: loss; PSNR of one sample, of the mean of four and of the base; and how far seeds differ, in grey levels."""
    sums, count = {}, 0
    for k, (lq, hr) in enumerate(held_out):
        names = [f"check {k} {i}" for i in range(len(lq))]
        t, eps = (torch.arange(len(lq), device=lq.device) + 0.5) / len(lq), gen.noise(lq, names, [0] * len(lq))
        xt, target = gen.noised(gen.encode(hr, lq), eps, t)
        images = torch.stack([gen.sample(net, lq, names, [seed] * len(lq)) for seed in range(4)])              # (4, b, 3, H, W)
        psnr = lambda image: quality.psnr(image.clamp(0, 1), hr, border=0)
        values = {"loss": preference.error(gen.predict(net, xt, t, gen.condition(lq)), target), "psnr": psnr(images[0]), "psnr_of_mean": psnr(images.mean(0)), "psnr_base": psnr(gen.enlarged(lq)),
                  "spread": 255 * images.std(0).mean((1, 2, 3))}
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.double().sum().item()
        count += len(lq)
    return {name: value / count for name, value in sums.items()}


def warmed(step, lr, warmup):
    """Learning rate: rises linearly over the first `warmup` steps, then constant."""
    return lr * min(1, step / warmup) if warmup else lr


def pretrain(args):
    world, seeds, autocast = runs.start_training(args.device, args.threads, args.seed, args.precision)
    device, lanes = world.device, world.lanes(args.batch_size)
    base = archs.load_x4(args.base, "--base")[0] if args.base else None
    args.base_hash = base and iqa.tensors_hash(base)
    run = runs.Run(args.out, vars(args), world, args.resume, PRETRAIN_FIXED, tensorboard=args.tensorboard)
    sets, val_sets = data.find_photos(args.hr, "--hr").hold_out(args.val_photos, seeds(0, 0, "val-photos"))
    check_seeds = lambda step, lane, purpose: seeds(step, lane, f"check {purpose}")
    dataset, val_set = (data.TrainingSet(some, "orig", draw, args.batch_size, group, 4 * args.patch, args.load_size)
                        for some, draw, group in ((sets, seeds, args.group_size), (val_sets, check_seeds, 1)))
    for photos in (dataset, val_set):
        data.check_headers(photos, world)
    run.pin(samples=len(dataset))
    draw = data.synthetic_pairs(val_set, check_seeds, device, args.degradation, args.patch, 1)
    held_out = [draw(1, range(k, k + 8)) for k in range(0, 16, 8)]
    draw = data.synthetic_pairs(dataset, seeds, device, args.degradation, args.patch, args.group_size)

    torch.manual_seed(args.seed)                                                  # initial weights; nothing else uses this state
    gen = flow.FlowSR(**flow.SIZES[args.size], prediction=args.prediction, base=base, steps=args.steps, tau=args.tau, device=device)
    raw, ema = gen.net, copy.deepcopy(gen.net).eval().requires_grad_(False)
    opt = torch.optim.AdamW(raw.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    state = run.checkpoint
    if state:
        raw.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        opt.load_state_dict(state["opt"])
    gen.sigma_r = state["sigma_r"] if state else spread_of_residual(gen, draw, min(args.batch_size, 16))
    meter = runs.Meter(world, state and state["meter"])
    batches = data.prefetch(data.batches(dataset, run.start_step + 1, args.total_steps, lanes, args.workers, device.type == "cuda"), device)
    if run.start_step < args.total_steps:
        batches = itertools.chain([next(batches)], batches)                       # a first batch that cannot be read leaves no folder
    run.open()
    run.say(f"FlowSR {args.size}, {args.prediction}, base {args.base or 'bicubic'}: {sum(p.numel() for p in raw.parameters()):,} weights, sigma_r {gen.sigma_r:.4f}, "
            f"{len(dataset)} photos, {len(val_set)} held out, {world.size} process(es) on {device}" + (f"; from step {run.start_step}" if state else ""))
    net = world.parallel(raw.train())

    def save(step):
        meter.check_finite(lambda s: ", ".join(dataset.names(s)))
        run.save(step, {"net": raw.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict(), "meter": meter.state_dict(), "sigma_r": gen.sigma_r})

    stop, due = runs.StopSignal(world), lambda step, every: runs.due(step, args.total_steps, every)
    if run.start_step == args.total_steps:
        run.say(f"nothing to do: {args.out} is finished; remove it to train again")
    for step in range(run.start_step + 1, args.total_steps + 1):
        with meter.waiting():
            batch = next(batches)
        lr = opt.param_groups[0]["lr"] = warmed(step, args.lr, args.warmup)
        lq, hr = draw(step, lanes, batch)
        x0 = gen.encode(hr, lq)
        t = torch.tensor([draw_time(args.times, seeds(step, lane, "time")) for lane in lanes], dtype=torch.float32, device=device)
        eps = torch.stack([degradations.normal_field(x0.shape[1:], seeds(step, lane, "eps")) for lane in lanes]).to(device)
        xt, target = gen.noised(x0, eps, t)
        with autocast():
            out = gen.predict(net, xt, t, gen.condition(lq))
        loss = preference.error(out, target).mean()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        grad = torch.nn.utils.clip_grad_norm_(raw.parameters(), args.clip_grad or math.inf)
        opt.step()
        runs.update_ema(ema, raw, args.ema_decay)
        meter.add(step, loss=loss, grad=grad)
        if due(step, args.log_every):
            meter.check_finite(lambda s: ", ".join(dataset.names(s)))
            run.progress(step, args.total_steps, meter, lr, {})
        if due(step, args.val_every):                                             # before saving: a saved step has its check
            values = check_generator(gen, ema, held_out)
            run.say(f"step {step:07d} held out: " + " ".join(f"{k} {v:.4g}" for k, v in values.items()))
            run.event(step, "val", **values)
        stopping = stop.requested(step)
        if due(step, args.save_every) or stopping:
            save(step)
        if stopping and step < args.total_steps:
            run.say(f"stopped by a signal at step {step}; continue with --resume")
            return
    if world.is_main:
        gen.save(args.out / "weights", raw.state_dict(), ema.state_dict())
        run.say(f"done: {args.out / 'weights' / 'gen.pth'}")


def draw_time(times, seed):
    """t of one sample: uniform in [0, 1), or the logistic function of a normal number (as SD3), which is seldom near the ends."""
    rng = np.random.default_rng(seed)
    return rng.random() if times == "uniform" else 1 / (1 + math.exp(-rng.standard_normal()))


# Stage 5

SAMPLING = ("steps", "tau", "guidance", "negative", "adain", "dtype")             # of a generator's identity: how it samples, not what is trained


class PairSet(torch.utils.data.Dataset):
    """Preference pairs by (step, lane). A sample is {"lq", "win", "lose": uint8 (3, ., .), "weight": (), "index": number of the pair}; all three cut at one place.

    An epoch is all pairs; it goes through the groups in turn, in a new order every time, and through each group's pairs in an order of its own (CHOICE).
    rows: of pairs.jsonl, weights one per row; crop: side of the LR patch, 0 for whole images.
    """

    def __init__(self, rows, weights, items, files, seeds, batch_size, crop):
        self.rows, self.weights, self.items, self.files, self.seeds, self.batch_size, self.crop = rows, weights, items, files, seeds, batch_size, crop
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
        return self.groups[group][np.random.default_rng(self.seeds(epoch, int(group), "pairs")).permutation(self.each)[turn]]

    def names(self, step):
        return sorted({self.rows[self.index(step, lane)]["name"] for lane in range(self.batch_size)})

    def __getitem__(self, key):
        try:
            return self.sample(*key)
        except (ValueError, OSError) as error:                                    # raised again by data.batches
            return error

    def sample(self, step, lane):
        k = self.index(step, lane)
        row = self.rows[k]
        lq, win, lose = (load_image(path) for path in (self.items[row["name"]]["lq"], self.files[row["name"]][row["w_seed"]], self.files[row["name"]][row["l_seed"]]))
        if self.crop:
            y, x = (int(np.random.default_rng(self.seeds(step, lane, axis)).integers(n - self.crop + 1)) for axis, n in zip("yx", lq.shape[1:]))
            lq, win, lose = (image[:, s * y:s * (y + self.crop), s * x:s * (x + self.crop)] for s, image in ((1, lq), (4, win), (4, lose)))
        return {"lq": lq, "win": win, "lose": lose, "weight": torch.tensor(self.weights[k], dtype=torch.float32), "index": torch.tensor(k)}


def check_sizes(paths, patch):
    """ValueError names the first LR image that is smaller than a patch; whole images (patch 0) must all have one size."""
    sizes = {name: image_size(path) for name, path in paths.items()}
    first = next(iter(sizes.values()))
    for name, size in sizes.items():
        if min(size) < patch or not patch and size != first:
            raise runs.UserError(f"{paths[name]}: {size[0]}x{size[1]} pixels, " + (f"smaller than --patch {patch}: take a smaller one" if patch else f"the first has {first[0]}x{first[1]}: --patch 0 needs one size"))


def weights_of(rows, hpo, gain):
    """Weight of each pair; w_inter averages to 1 over the groups that are trained on, also where others are held out."""
    intra, inter = (np.array([row[name] for row in rows]) for name in ("w_intra", "w_inter"))
    return np.broadcast_to(preference.combine(intra, inter + 1 - inter.mean(), hpo, gain), len(rows))


def hold_out(names, count, seed):
    """Names that are only watched: those of photos drawn by seed until there are `count`; nothing else of their photos is trained on."""
    photos, held = sorted({data.photo_of(name) for name in names}), []
    for k in np.random.default_rng(seed).permutation(len(photos)):
        if len(held) >= count:
            break
        held += [name for name in names if data.photo_of(name) == photos[k]]
    return held


@torch.no_grad()
def watch(gen, net, items, metrics, norm, which, world):
    """Mean reward of seeds 0 to 3 over the held-out images; processes share them."""
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for name in list(items)[world.rank::world.size]:
        lq, refs = (scoring.load(path, world.device) if path else None for path in (items[name]["lq"], (items[name]["refs"] or [None])[0]))
        images = degradations.to_8bit(gen.sample(net, lq.expand(4, -1, -1, -1), [name] * 4, range(4)))
        raw = torch.stack([metric(images, refs.expand(4, -1, -1, -1) if metric.full_reference else None).double().reshape(-1) for metric in metrics.values()], 1)
        total += torch.tensor([dpo_pool.rewards_of(raw.cpu().numpy(), norm, which, list(metrics)).sum(), 4.0], dtype=torch.float64, device=world.device)
    total = world.reduce(total)
    value = (total[0] / total[1]).item()
    if not math.isfinite(value):
        raise runs.UserError(f"the reward of held-out images is {value}: look at {', '.join(metrics)} and the generator, or --val-groups 0")
    return value


def open_pairs(args):
    """-> folder of --pairs, its pool's folder, curation.json, pairs, pool.json, and items and files of the pool. Fills --steps, --tau and --guidance, where they were left out, with the pool's.

    ValueError for pairs that are not of this pool: it was made or scored again, or holds other images.
    """
    folder, remedy = args.pairs if args.pairs.is_dir() else args.pairs.parent, "python -m dpo curate makes it"
    about, rows = dpo_pool.read_json(folder / "curation.json", remedy), dpo_pool.read_lines(folder / "pairs.jsonl", remedy)
    whole = lambda row: isinstance(row, dict) and isinstance(row.get("name"), str) and all(isinstance(row.get(k), (int, float)) for k in ("w_seed", "l_seed", "w_intra", "w_inter"))
    if not isinstance(about, dict) or not all(isinstance(about.get(k), str) for k in ("pool", "pool_hash", "reward")) or not rows or not all(map(whole, rows)):
        raise runs.UserError(f"{folder}: curation.json or pairs.jsonl is not what this version of curate leaves; {remedy}")
    place = folder / about["pool"]                                                # "." or an absolute path
    pool, items, files = dpo_pool.open_pool(place)
    if about["pool_hash"] != dpo_pool.pool_hash(place) or not {row["name"] for row in rows} <= items.keys() or not {row[k] for row in rows for k in ("w_seed", "l_seed")} <= set(range(pool["samples"])):
        raise runs.UserError(f"{folder}: pairs of another pool than {place} is now (sampled or scored again since); {remedy}")
    for name in ("steps", "tau", "guidance"):
        if getattr(args, name) is None:
            setattr(args, name, pool["generator"].get(name))
    return folder, place, about, rows, pool, items, files


def train(args, gen, pairs):
    """Stage 5: the loss of Diffusion-DPO over weighted pairs; the reference is the generator as it was. pairs: of open_pairs."""
    world, seeds, autocast = runs.start_training(args.device, args.threads, args.seed, args.precision)
    device, lanes = world.device, world.lanes(args.batch_size)
    if len(lanes) % args.accumulate:
        raise runs.UserError(f"--accumulate {args.accumulate} does not divide the {len(lanes)} pairs of one process")
    folder, place, about, rows, pool, items, files = pairs
    mine, theirs = ({k: v for k, v in found.items() if k not in SAMPLING} for found in (gen.identity(gen.net), pool["generator"]))
    if args.beta_t == "sq" and gen.prediction != "flow":
        raise runs.UserError(f"--beta-t sq: follows from flows; {args.gen} predicts {gen.prediction}: --beta-t const")
    if mine != theirs:
        raise runs.UserError(f"--gen {args.gen}: the candidates of {place} are another generator's ({'; '.join(runs.changes(theirs, mine).values())}); DPO starts from the one that made them")
    args.generator, args.pairs_hash = scoring.digest(mine), scoring.digest(folder / "pairs.jsonl")
    run = runs.Run(args.out, vars(args), world, args.resume, TRAIN_FIXED, tensorboard=args.tensorboard)
    held = hold_out(list(items), args.val_groups, seeds(0, 0, "val-groups"))
    rows = [row for row in rows if row["name"] not in held]
    if not rows:
        raise runs.UserError(f"--val-groups {args.val_groups}: nothing is left to train on: {len(items)} images of {len({data.photo_of(name) for name in items})} photos")
    dataset = PairSet(rows, weights_of(rows, args.hpo, args.hpo_gain), items, files, seeds, args.batch_size, args.patch)
    check_sizes({name: items[name]["lq"] for name in dict.fromkeys(row["name"] for row in rows)}, args.patch)
    run.pin(samples=len(dataset))
    metrics, norm = {}, None
    if held:
        norm = dpo_pool.open_norm(folder / "norm.json")
        metrics = dpo_pool.create_metrics(*([m for m, v in norm["metrics"].items() if v["full_reference"] == full] for full in (True, False)), args.metric_weights, device)
        dpo_pool.check_norm(folder / "norm.json", norm, dpo_pool.describe_metrics(metrics))
    look = lambda net: watch(gen, net, {name: items[name] for name in held}, metrics, norm, about["reward"], world) if held else None

    reference, raw = gen.net.eval().requires_grad_(False), copy.deepcopy(gen.net).requires_grad_(True)       # both from the EMA weights; nothing random in them
    opt = torch.optim.AdamW(raw.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay)
    state = run.checkpoint
    if state:
        raw.load_state_dict(state["net"])
        opt.load_state_dict(state["opt"])
        first, best, ended = state["first"], state["best"], state["ended"]
    else:
        first, best, ended = look(raw), None, ""
    meter = runs.Meter(world, state and state["meter"])
    batches = data.prefetch(data.batches(dataset, run.start_step + 1, args.total_steps, lanes, args.workers, device.type == "cuda"), device)
    if run.start_step < args.total_steps:
        batches = itertools.chain([next(batches)], batches)
    run.open()
    run.say(f"{args.gen}: {sum(p.numel() for p in raw.parameters()):,} weights, {len(dataset)} pairs of {len(dataset.groups)} images, {len(held)} images held out, beta {args.beta:g}, HPO {args.hpo}, "
            f"{world.size} process(es) on {device}" + (f"; from step {run.start_step}" if state else ""))
    if not state and held:
        run.event(0, "val", reward=first)
    net = world.parallel(raw.train())

    def save(step):
        meter.check_finite(lambda s: ", ".join(dataset.names(s)))
        run.save(step, {"net": raw.state_dict(), "opt": opt.state_dict(), "meter": meter.state_dict(), "first": first, "best": best, "ended": ended})

    def errors(step, part, batch):
        """-> d of the network and of the reference at winners and losers, each (b,), with one t and one noise for all four (DPO), and t."""
        lq, win, lose = (batch[kind].to(device).float() / 255 for kind in ("lq", "win", "lose"))
        rows = [dataset.rows[int(k)] for k in batch["index"]]
        names, lqs = [row["name"] for row in rows] * 2, torch.cat([lq, lq])       # winners first, then losers
        with torch.no_grad():
            x0, c = gen.encode(torch.cat([win, lose]), lqs), gen.condition(lqs, names)
        t = torch.tensor([draw_time("uniform", seeds(step, lane, "time")) for lane in part], dtype=torch.float32, device=device)
        if args.noise == "tracked":                                               # what each image was made from
            eps = pool["generator"].get("tau", 1.0) * gen.noise(lqs, names, [row["w_seed"] for row in rows] + [row["l_seed"] for row in rows])
        else:
            eps = torch.stack([degradations.normal_field(x0.shape[1:], seeds(step, lane, "eps")) for lane in part]).to(device)
            eps = torch.cat([eps, eps])
        times = torch.cat([t, t])
        xt, target = gen.noised(x0, eps, times)
        with autocast():
            ours = gen.predict(net, xt, times, c)
            with torch.no_grad():
                theirs = gen.predict(reference, xt, times, c)
        win, lose = preference.error(ours, target).chunk(2)
        win_ref, lose_ref = preference.error(theirs, target).chunk(2)
        return win, lose, win_ref, lose_ref, t

    stop, due = runs.StopSignal(world), lambda step, every: runs.due(step, args.total_steps, every)
    if ended or run.start_step == args.total_steps:
        run.say(f"nothing to do: {args.out} is finished; remove it to train again")
    for step in range(run.start_step + 1, args.total_steps + 1) if not ended else ():
        with meter.waiting():
            batch = next(batches)
        lr = opt.param_groups[0]["lr"] = warmed(step, args.lr, args.warmup)
        opt.zero_grad(set_to_none=True)
        share = len(lanes) // args.accumulate
        terms = []
        for k in range(0, len(lanes), share):
            part = {name: value[k:k + share] for name, value in batch.items()}
            win, lose, win_ref, lose_ref, t = errors(step, lanes[k:k + share], part)
            losses, inside = preference.dpo_loss(win, win_ref, lose, lose_ref, args.beta * ((1 - t) ** 2 if args.beta_t == "sq" else 1), part["weight"].to(device))
            loss = losses.mean() + args.anchor * win.mean()
            (loss / args.accumulate).backward()
            terms.append([v.detach() for v in (loss, inside.mean(), preference.implicit_accuracy(inside), win.mean(), (win - win_ref).mean(), (lose - lose_ref).mean(), win_ref.mean())])
        grad = torch.nn.utils.clip_grad_norm_(raw.parameters(), args.clip_grad or math.inf)
        opt.step()
        named = dict(zip(("loss", "inside", "accuracy", "win", "win_change", "lose_change", "win_ref"), (torch.stack(values).mean() for values in zip(*terms))))
        meter.add(step, **named, grad=grad)
        if due(step, args.log_every):
            meter.check_finite(lambda s: ", ".join(dataset.names(s)))
            means = run.progress(step, args.total_steps, meter, lr, {})
            shift = means["win_change"] / means["win_ref"]                        # above 0: the winners, too, have become less likely
            if args.max_displacement and shift > args.max_displacement:
                ended = f"the error at the winners has grown by {shift:.1%} of the reference's: likelihood displacement; a larger --beta, a smaller --lr, or --anchor"
        if held and (due(step, args.val_every) or ended):
            value = look(raw)
            run.say(f"step {step:07d} held out: reward {first:.4f} -> {value:.4f}")
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
