"""Compare generators on the same seeds: best, mean and worst of k seeds, every metric, differences between seeds.

    python -m dpo.compare --gen runs/flow-base runs/flow-base+dpo --norm-file POOL/norm.json --lq-dir LR --gt-dir HR
    python -m dpo.compare --demo                      small, on a CPU, no download

    OUT/eval.json  table.md  curves.png  grid.png     OUT/<row>/<name>/<seed>.png

Controls show whether the reward was fooled: metrics that had no part in it (--watch); the first generator's outputs
under an unsharp mask; their mean over the seeds, which a deterministic network would give; the first generator with
less noise at the start (--less-noise), and with the grid of pixels that tuning adds to all outputs alike (these two
without --model). If one of these rows gains as much as tuning does, the gain cannot be credited to the preferences.
Intervals are over photographs, paired: crops of one photograph resemble each other.
"""
from pathlib import Path

import runs
from dpo import options

REWARDS = runs.literal("dpo/preference", "REWARDS")
# CHOICE: amounts of the unsharp masks
UNSHARP = (0.5, 1.0)
# CHOICE: photographs on the contact sheet
SHOWN = 4
# CHOICE: sized so that the whole demo ends within four minutes on two cores
DEMO = dict(gen=[options.DEMO_GENERATOR, options.DEMO_TUNED], norm_file=options.DEMO_POOL / "norm.json",
            hr=options.DEMO_TEST, **options.DEMO_CROPS, groups=8, samples=8, watch=["piqe", "psnr"], diversity="proxy",
            out=Path("runs/dpo-demo-eval"), threads=1)


def parse_args(argv=None):
    p = options.parser("dpo.compare", __doc__)
    options.add_generator(p, nargs="+", default=[Path("runs/flow-base"), Path("runs/flow-base+dpo")],
                          help="run folders; differences are to the first; with --model ControlNets")
    options.add_images(p, 100, "crops of --hr")
    g = p.add_argument_group("reward and metrics")
    g.add_argument("--norm-file", type=Path, default=Path("runs/dpo-pool/norm.json"), metavar="FILE",
                   help="scale and metrics of the reward, from dpo.pool curate; never fitted again")
    g.add_argument("--reward", choices=REWARDS, default="hybrid", help="as in dpo.pool curate")
    g.add_argument("--watch", nargs="*", metavar="NAME",
                   help="metrics outside the reward; default: psnr ssim nima (PAPER, among others), without ground "
                        "truth nima")
    options.add_metric_files(g)
    g.add_argument("--less-noise", type=runs.RATE, nargs="*", metavar="SHARE",
                   help="control: the first generator with its initial noise times this; above 1: more. Default: 0.9 "
                        "0.7, with --model none (CHOICE)")
    g.add_argument("--diversity", choices=["lpips", "vgg", "proxy", "none"], default="lpips",
                   help="distance between seeds; vgg takes its weights from --metric-weights vgg=FILE")
    g.add_argument("--samples", type=runs.SIZE, default=64, help="M, seeds per image (PAPER: 64)")
    g.add_argument("--batch-size", type=runs.SIZE, default=16, help="outputs at a time; they do not depend on it")
    g = p.add_argument_group("output")
    g.add_argument("--names", nargs="+", metavar="NAME", help="of the rows; default: the run folders'")
    g.add_argument("--shown-rows", nargs="+", metavar="NAME",
                   help="rows on the contact sheet; default: all generators of --gen")
    g.add_argument("--out", type=Path, default=Path("runs/dpo-eval"), metavar="DIR",
                   help="outputs, scores, table and plots; an unfinished call is continued")
    options.add_machine(p)
    args = options.parse(p, argv, {p: DEMO})
    options.check_images(p, args)
    options.check_generator(p, args)
    if args.model and args.less_noise:
        p.error("--less-noise is for FlowSR: leave it out with --model")
    if args.less_noise is None:
        args.less_noise = [] if args.model else [0.9, 0.7]
    if args.watch is None:
        args.watch = ["psnr", "ssim", "nima"] if args.hr or args.gt_dir else ["nima"]
    return args


# --help and flag errors need no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import copy
import re
from functools import partial

import numpy as np
import torch

import degradations
import metrics
from dpo import candidates, flow, preference
from images import cut_to_x4, load_image, save_image
from report import pictures, style, tables

# the crops of --hr are always the same
SEED = 0


def open_generators(paths, names, shares, load):
    """{row: generator} of --gen, then the first with its initial noise times each of `shares`.

    load: (path, like=generator of the same frozen networks) -> generator.
    UserError for names that are not fit for folders, or are not as many as paths.
    """
    names = names or [path.name if path.is_dir() else path.parent.parent.name for path in paths]
    if len(names) != len(paths) or len(set(names)) != len(names):
        raise runs.UserError(f"--names {' '.join(names)}: {len(paths)} different names are needed, one for each --gen")
    for name in names:
        if not re.fullmatch(r"[\w .+@,=-]+", name) or name.startswith(".") or name in ("eval", "images", "scores"):
            raise runs.UserError(f"--names {name!r}: names a folder beside eval.json, images and scores: take another "
                                 "word, of letters, digits, blanks and + - . , = @")
    generators = {}
    for name, path in zip(names, paths):
        generators[name] = load(path, like=next(iter(generators.values()), None))
    for share in shares:
        gen = copy.copy(generators[names[0]])
        gen.tau = share * gen.tau
        generators[f"{names[0]}, {share:g} of the noise"] = gen
    return generators


def sharpened(row, amount):
    """Name of the control row: `row` under an unsharp mask."""
    return f"{row} + unsharp {amount:g}"


def mean_of(row):
    """Name of the control row: the mean of `row` over its seeds, the same image for every seed."""
    return f"{row}, mean of seeds"


def with_grid(first, row):
    """Name of the control row: `first` with what `row` changes in every 4x4 block alike."""
    return f"{first} + grid of {row}"


class WithGrid:
    """A generator whose outputs get the same grid (3, 4, 4) in every 4x4 block, before they are rounded to 8 bits."""

    def __init__(self, gen, grid):
        self.gen, self.net, self.grid = gen, gen.net, grid

    def identity(self, net):
        return self.gen.identity(net) | {"grid": self.grid.tolist()}

    def sample(self, net, lq, names, seeds):
        sr = self.gen.sample(net, lq, names, seeds)
        return (sr + self.grid.to(sr).repeat(1, *(n // 4 for n in sr.shape[2:]))).clamp(0, 1)


def grid_of_change(before, after, period=4):
    """What all outputs change alike, by the place in 4x4 blocks: (3, 4, 4), mean 0 in every channel, of RGB in [0, 1].

    A pixel shuffle can add such a grid, which no image calls for. Its 45 free numbers are fitted to the outputs that
    are judged. before, after: {name: [files by seed]}; period: another side of the blocks.
    """
    total, blocks = 0, 0
    for name, paths in before.items():
        for old, new in zip(paths, after[name]):
            # whole numbers: the same sum on every machine
            change = load_image(new).long() - load_image(old).long()
            total = total + change.unflatten(2, (-1, period)).unflatten(1, (-1, period)).sum((1, 3))
            blocks += change[0].numel() // period ** 2
    grid = total.double() / (255 * blocks)
    return grid - grid.mean((1, 2), keepdim=True)


def make_outputs(out, generators, tuned, items, samples, batch_size, world):
    """{row: {name: [files by seed]}}: outputs of every generator, and the controls made of the first one's.

    tuned: rows whose grid of pixels makes a control.
    """
    files, first = {}, next(iter(generators))
    lq_hashes = {name: runs.digest(item["lq"]) for name, item in items.items()}

    def sampled(row, gen):
        record = out / f"{row}.json"
        about = {"generator": gen.identity(gen.net), "images": lq_hashes, "samples": samples}
        if record.exists() and candidates.read_json(record, "remove it") != about:
            raise runs.UserError(f"--out {out}: its {row} was made by another generator, of other images, or with "
                                 "another --samples: choose another folder")
        world.barrier()
        if world.is_main:
            runs.save_json(record, about)
        candidates.fill(gen, items, out / row, samples, world, batch_size, row)
        files[row] = {name: [out / row / name / f"{seed}.png" for seed in range(samples)] for name in items}
    for row, gen in generators.items():
        sampled(row, gen)
    for row in tuned:
        sampled(with_grid(first, row), WithGrid(generators[first], grid_of_change(files[first], files[row])))
    for amount in UNSHARP:
        row = sharpened(first, amount)
        files[row] = {name: [out / row / name / path.name for path in paths] for name, paths in files[first].items()}
        for name in list(items)[world.rank::world.size]:
            for source, target in zip(files[first][name], files[row][name]):
                if not target.exists():
                    image = metrics.unsharp(metrics.load(source, world.device), amount)[0]
                    runs.write_atomic(target, partial(save_image, image=image))
    row = mean_of(first)
    files[row] = {name: [out / row / f"{name}.png"] * samples for name in items}
    for name in list(items)[world.rank::world.size]:
        if not files[row][name][0].exists():
            mean = torch.stack([load_image(path).float() for path in files[first][name]]).mean(0) / 255
            runs.write_atomic(files[row][name][0], partial(save_image, image=degradations.to_8bit(mean)))
    world.barrier()
    return files


@torch.no_grad()
def mean_distance(files, distance, device):
    """Per image: mean distance between outputs of different seeds, over disjoint pairs of seeds."""
    def between(a, b):
        return distance(metrics.load(a, device), metrics.load(b, device)).mean().item()
    return np.array([np.mean([between(a, b) for a, b in zip(paths[:-1:2], paths[1::2])]) for paths in files.values()])


def over_photos(values, photos):
    """(images, ...) -> (photographs, ...): means over the images of each. photos: the photograph of every image."""
    return np.stack([values[photos == photo].mean(0) for photo in dict.fromkeys(photos)])


def summarise(raw, rewards, distances, judges, photos):
    """{row: {"values": {column: (photographs,)}, "curve", "seed_std"}}.

    raw: {row: (images, M, K)}, rewards: {row: (images, M)}, distances: {row: (images,)} or {}; judges: the K metrics.
    """
    rows = {}
    for row, r in rewards.items():
        curve, samples = preference.curves(r), r.shape[1]
        values = {f"best@{samples}": curve["best"][:, -1], "reward": r.mean(1),
                  f"worst@{samples}": curve["worst"][:, -1], "seed std": r.std(1)}
        values |= {"diversity": distances[row]} if distances else {}
        values |= {m: raw[row][..., k].mean(1) for k, m in enumerate(judges)}
        rows[row] = {
            "values": {name: over_photos(value, photos) for name, value in values.items()},
            "curve": {kind: over_photos(curve[kind], photos).mean(0).tolist() for kind in ("best", "mean", "worst")},
            "seed_std": {m: float(over_photos(raw[row][..., k].std(1), photos).mean()) for k, m in enumerate(judges)}}
    return rows


def main(args):
    world = runs.start_world(args.device, args.threads)
    if args.demo and args.gen == DEMO["gen"]:
        options.make_demo_start(world, options.DEMO_TUNED / "weights" / "gen.pth")
    norm, paired = candidates.open_norm(args.norm_file), bool(args.hr or args.gt_dir)
    # without ground truth the no-reference metrics alone
    full_reference = {m: v["full_reference"] for m, v in norm["metrics"].items()
                      if paired or args.reward != "nr" or not v["full_reference"]}
    fr, nr = ([m for m, full in full_reference.items() if full == kind] for kind in (True, False))
    for kind, found, words in (("fr", fr, "full-reference"), ("nr", nr, "no-reference")):
        if args.reward in ("hybrid", kind) and not found:
            raise runs.UserError(f"--reward {args.reward}: {args.norm_file} has no {words} metric: take --reward "
                                 f"{'nr' if kind == 'fr' else 'fr'}, as in dpo.pool curate")
    metric_files = dict(args.metric_weights)
    judges = candidates.create_metrics(fr, nr, metric_files, world.device)
    part = {"metrics": {m: norm["metrics"][m] for m in full_reference}}
    candidates.check_norm(args.norm_file, part, candidates.describe_metrics(judges))
    in_norm = list(judges)
    for name in args.watch:
        if name not in judges:
            judges[name] = metrics.create_metric(name, world.device, metric_files.get(name), **candidates.PROTOCOL,
                                                 flag="--watch")
    in_reward = [m for m in in_norm if args.reward == "hybrid" or full_reference[m] == (args.reward == "fr")]
    distance = None
    if args.diversity != "none" and args.samples > 1:
        distance = metrics.create_distances(args.diversity, metric_files.get("vgg"), 2)[0].to(world.device)
    load = partial(flow.load_generator, model=args.model, device=world.device, steps=args.steps, tau=args.tau,
                   **dict(prompts=args.prompts, guidance=args.guidance) if args.model else {})
    generators = open_generators(args.gen, args.names, args.less_noise, load)
    first = next(iter(generators))
    # with --model a row costs hours
    tuned = [] if args.model else list(generators)[1:len(args.gen)]
    rows = [*generators, *(with_grid(first, row) for row in tuned), *(sharpened(first, amount) for amount in UNSHARP),
            mean_of(first)]
    if unknown := [row for row in args.shown_rows or () if row not in rows]:
        raise runs.UserError(f"--shown-rows {unknown[0]!r}: no such row; choose from {', '.join(rows)}")
    if args.hr:
        items = candidates.open_images(args.out / "images", world, options.image_source(args, SEED), "test")
    else:
        items = candidates.find_items(args.lq_dir, args.gt_dir, world.is_main)
    candidates.check_references([m for m, metric in judges.items() if metric.full_reference], items,
                                "give --gt-dir, or leave full-reference metrics out and take --reward nr")
    if world.is_main:
        runs.check_writable(args.out, "--out")

    outputs = make_outputs(args.out, generators, tuned, items, args.samples, args.batch_size, world)
    raw = {row: candidates.judge(judges, items, files, args.out / "scores", world) for row, files in outputs.items()}
    if not world.is_main:
        return
    for row, values in raw.items():
        if not np.isfinite(values).all():
            image, _, k = np.argwhere(~np.isfinite(values))[0]
            raise runs.UserError(f"{row}, image {list(items)[image]}: {list(judges)[k]} has no finite score: leave out "
                                 "the metric or the image")
    rewards = {row: candidates.rewards_of(values[..., :len(in_norm)], norm, args.reward, in_norm)
               for row, values in raw.items()}
    distances = {}
    if distance:
        distances = {row: mean_distance(files, distance, world.device) for row, files in outputs.items()}
    photos = np.array([item["photo"] for item in items.values()])
    summary = {"reward": args.reward, "inside": in_reward, "outside": [m for m in judges if m not in in_reward],
               "samples": args.samples, "images": len(items), "photos": len(set(photos)),
               "diversity_by": args.diversity, "norm": str(args.norm_file),
               **compare_rows(summarise(raw, rewards, distances, judges, photos), judges),
               "scope": norm.get("scope", "pool"),
               "k": preference.curves(next(iter(rewards.values())))["k"], **runs.describe_machine()}
    for row, values in rewards.items():
        summary["rows"][row]["rewards"] = dict(zip(items, values.tolist()))
    runs.save_json(args.out / "eval.json", summary)
    text = table(summary)
    runs.write_atomic(args.out / "table.md", lambda t: t.write_text(text + "\n", encoding="utf-8"))
    print(text)
    if style.is_there():
        draw_curves(summary, args.out / "curves.png")
    shown_rows = args.shown_rows or rows[:len(args.gen)]
    draw_sheet(args.out / "grid.png", items, {row: outputs[row] for row in shown_rows}, rewards)
    print(f"wrote eval.json, table.md, curves.png and grid.png in {args.out}")


def compare_rows(rows, judges):
    """The rows of eval.json: means with intervals, and differences to the first row. rows: of summarise."""
    first = next(iter(rows.values()))["values"]
    # neither is better in itself
    lower = {name: None if name in ("seed std", "diversity") else False for name in first}
    lower |= {m: metric.lower_is_better for m, metric in judges.items()}
    compared = {}
    for row, parts in rows.items():
        values = parts["values"]
        means = {name: dict(zip(("mean", "low", "high"), (float(x.mean()), *tables.interval(x))))
                 for name, x in values.items()}
        differences = {name: tables.difference(x[None], first[name][None]) for name, x in values.items()}
        compared[row] = {"means": means, "minus_first": differences if values is not first else {},
                         "curve": parts["curve"], "seed_std": parts["seed_std"],
                         "per_photo": {name: x.tolist() for name, x in values.items()}}
    return {"lower_is_better": lower, "rows": compared}


def table(summary):
    """Markdown: ends of the reward's curve and every metric, then differences to the first row.

    Bold where the verdict is clear (tables.difference).
    """
    rows, outside = summary["rows"], summary["outside"]
    first = next(iter(rows))
    names = list(rows[first]["means"])
    head = ["", *(tables.heading(name, summary["lower_is_better"][name]) + " (outside)" * (name in outside)
                  for name in names)]
    decimals = {name: tables.digits([row["means"][name]["mean"] for row in rows.values()]) for name in names}
    means = [[row, *(f"{v['means'][name]['mean']:.{decimals[name]}f}" for name in names)] for row, v in rows.items()]
    differences = [
        [f"{row} - {first}", *(tables.difference_cell(v["minus_first"][name], decimals[name]) for name in names)]
        for row, v in rows.items() if row != first]
    about = (f"{summary['images']} images of {summary['photos']} photos, {summary['samples']} seeds; reward "
             f"({summary['reward']}) of {', '.join(summary['inside'])}; {', '.join(outside) or 'nothing'} outside it")
    return "\n\n".join([about, *(runs.markdown(head, part) for part in (means, differences) if part)])


def draw_curves(summary, path):
    """Left: best, mean and worst of k seeds against k, one colour per row. Right: gains over the first row at all k.

    summary: as eval.json; of its rows "curve" and "minus_first" are read. A curve may be of several generators, (n, k).
    """
    drawing, (left, right) = style.figure(columns=2, height=4.2)
    rows, kinds = list(summary["rows"].items()), ("best", "mean", "worst")
    thin = "; thin: each generator" if len(np.atleast_2d(rows[0][1]["curve"]["best"])) > 1 else ""
    for n, (row, v) in enumerate(rows):
        for kind, line in zip(kinds, ("-", "--", ":")):
            # the marker of this row on the right
            marker = style.MARKERS[(n - 1) % len(style.MARKERS)] if n and kind == "best" else None
            style.seeds(left, summary["k"], v["curve"][kind], label=row if kind == "best" else None,
                        colour=style.COLOURS[n % len(style.COLOURS)], linestyle=line, marker=marker)
    left.set(xscale="log", xlabel="k, number of seeds", ylabel=f"reward ({summary['reward']}), higher is better",
             title=f"Solid: best of k seeds,\ndashed: mean, dotted: worst{thin}")
    left.set_xticks(summary["k"], summary["k"])
    left.minorticks_off()
    columns = [f"best@{summary['k'][-1]}", "reward", f"worst@{summary['k'][-1]}"]
    right.axhline(0, color="grey", linewidth=0.8)
    for n, (_, v) in enumerate(rows[1:], 1):
        gains = [v["minus_first"][column] for column in columns]
        mean, low, high = np.array([[gain[key] for key in ("mean", "low", "high")] for gain in gains]).T
        style.interval(right, np.arange(3) + 0.6 * (n / len(rows) - 0.5), mean, y_ends=(low, high),
                       colour=style.COLOURS[n % len(style.COLOURS)])
    right.set(xticks=range(3), xticklabels=kinds, xlabel=f"of {summary['k'][-1]} seeds",
              title=f"Gain over {rows[0][0]},\n95 % intervals over photographs")
    style.legend(drawing, left)
    style.save(drawing, path)


def draw_sheet(path, items, files, rewards):
    """PNG with one image of each of the first SHOWN photographs.

    LR, then of every row of `files` the worst, the middle and the best seed by its reward, then the ground truth.
    """
    # the first image of every photograph
    shown = {}
    for k, (name, item) in enumerate(items.items()):
        shown.setdefault(item["photo"], (k, name))
    lines = []
    for k, name in list(shown.values())[:SHOWN]:
        lq = load_image(items[name]["lq"])
        line = [(lq.repeat_interleave(4, 1).repeat_interleave(4, 2), "LR")]
        for row, outputs in files.items():
            r = rewards[row][k]
            order = r.argsort()
            for rank, seed in (("worst", order[0]), ("middle", order[len(order) // 2]), ("best", order[-1])):
                line.append((load_image(outputs[name][seed]), f"{row}\n{rank} {r[seed]:.3f}"))
        lines.append(line + [(cut_to_x4(load_image(ref)), "GT") for ref in items[name]["refs"]])
    pictures.save_grid(path, lines)


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
