"""Stage 6 of dpo.py: generators side by side on the same seeds. What to expect of the best, the mean and the worst of k seeds, every metric, how far seeds differ.

    OUT/eval.json  curves.png  grid.png  table.md     OUT/<row>/<name>/<seed>.png
Three things guard against a reward that was fooled: metrics that had no part in it (--watch); the first generator's outputs under a plain unsharp mask; and the first generator with less initial noise.
Where one of the last two gains as much as tuning did, tuning may have done no more than that. Intervals are over photographs, paired: crops of one photograph resemble each other.
"""
import copy
import re

import numpy as np
import torch

import data
from dpo import pool as dpo_pool
from dpo import preference
import metrics as quality
import runs
import metrics as scoring
from images import load_image, save_image
from report import tables
from report import pictures


def open_rows(args, load):
    """{row: generator}, in the order of --gen; ValueError for names that are not fit for folders, or are not as many."""
    names = args.names or [path.name if path.is_dir() else path.parent.parent.name for path in args.gen]
    if len(names) != len(args.gen) or len(set(names)) != len(names):
        raise runs.UserError(f"--names {' '.join(names)}: {len(args.gen)} different names are needed, one for each --gen")
    if bad := [name for name in names if not re.fullmatch(r"[\w .+@,=-]+", name) or name.startswith(".") or name in ("eval", "images", "scores")]:
        raise runs.UserError(f"--names {bad[0]!r}: names a folder beside eval.json, images and scores: another word, of letters, digits, blanks and + - . , = @")
    rows = {}
    for name, path in zip(names, args.gen):
        rows[name] = load(path, like=next(iter(rows.values()), None))
    for share in args.less_noise:
        gen = copy.copy(rows[names[0]])
        gen.tau = share * gen.tau
        rows[f"{names[0]}, {share:g} of the noise"] = gen
    return rows


def candidates(args, rows, items, world):
    """{row: {name: [files]}}: outputs of every generator, and of the first under unsharp masks. rows: of open_rows."""
    files, first = {}, next(iter(rows))
    for row, gen in rows.items():
        record, about = args.out / f"{row}.json", {"generator": gen.identity(gen.net), "images": {name: scoring.digest(item["lq"]) for name, item in items.items()}, "samples": args.samples}
        before = dpo_pool.read_json(record, "") if record.exists() else about
        if before != about:
            raise runs.UserError(f"--out {args.out}: its {row} was made by another generator, of other images, or with another --samples: choose another folder")
        world.barrier()
        if world.is_main:
            runs.save_json(record, about)
        dpo_pool.fill(gen, gen.net, items, args.out / row, args.samples, world, args.batch_size, row)
        files[row] = {name: [args.out / row / name / f"{seed}.png" for seed in range(args.samples)] for name in items}
    for amount in args.unsharp:
        row = f"{first} + unsharp {amount:g}"
        files[row] = {name: [args.out / row / name / path.name for path in found] for name, found in files[first].items()}
        for name in list(items)[world.rank::world.size]:
            for source, target in zip(files[first][name], files[row][name]):
                if not target.exists():
                    runs.write_atomic(target, lambda t: save_image(t, quality.unsharp(scoring.load(source, world.device), amount)[0]))
    world.barrier()
    return files


@torch.no_grad()
def diversity(files, distance, device):
    """{name: [files]} -> (images,): mean distance between outputs of two seeds, over disjoint pairs of seeds."""
    one = lambda a, b: distance(scoring.load(a, device), scoring.load(b, device)).mean().item()
    return np.array([np.mean([one(a, b) for a, b in zip(found[:-1:2], found[1::2])]) for found in files.values()])


def evaluate(args, world, load):
    """Everything that is measured, as eval.json; load: path -> generator."""
    norm = dpo_pool.open_norm(args.norm_file)
    paired = bool(args.hr or args.gt_dir)
    kinds = {m: v["full_reference"] for m, v in norm["metrics"].items() if paired or args.reward != "nr" or not v["full_reference"]}          # without ground truth the others alone
    watched = [m for m in args.watch if m not in kinds]
    metrics = dpo_pool.create_metrics([m for m, full in kinds.items() if full], [m for m, full in kinds.items() if not full], args.metric_weights, world.device)
    dpo_pool.check_norm(args.norm_file, {"metrics": {m: norm["metrics"][m] for m in kinds}}, dpo_pool.describe_metrics(metrics))
    inside = list(metrics)
    metrics |= {m: quality.create_metric(m, world.device, dict(w.split("=", 1) for w in args.metric_weights).get(m), **dpo_pool.PROTOCOL, flag="--watch") for m in watched}
    rows = open_rows(args, load)
    known = [*rows, *(f"{next(iter(rows))} + unsharp {amount:g}" for amount in args.unsharp)]
    if unknown := [row for row in args.shown_rows or () if row not in known]:
        raise runs.UserError(f"--shown-rows {unknown[0]!r}: no such row; choose from {', '.join(known)}")
    items = dpo_pool.own_images(args, args.out / "images", world, "test") if args.hr else dpo_pool.find_items(args.lq_dir, args.gt_dir)
    if (full := [m for m, metric in metrics.items() if metric.full_reference]) and not paired:
        raise runs.UserError(f"{', '.join(full)}: --lq-dir {args.lq_dir} has no ground truth to compare with: --gt-dir DIR, or only no-reference metrics (--reward nr, --watch)")
    if world.is_main:
        runs.check_writable(args.out, "--out")
    files = candidates(args, rows, items, world)
    raw = {row: dpo_pool.judge(metrics, items, found, args.out / "scores", world, f"--lq-dir {args.lq_dir}") for row, found in files.items()}
    if not world.is_main:
        return None
    whose = np.array([data.photo_of(name) for name in items])
    over_photos = lambda values: np.stack([values[whose == photo].mean(0) for photo in dict.fromkeys(whose)])
    lower = {m: metric.lower_is_better for m, metric in metrics.items()}
    used = [m for m in inside if args.reward == "hybrid" or kinds[m] == (args.reward == "fr")]
    rewards = {row: dpo_pool.rewards_of(values[..., :len(inside)], norm, args.reward, inside) for row, values in raw.items()}
    distance = None if args.diversity == "none" else metrics.create_distances(args.diversity, args.vgg_weights, 2)[0].to(world.device)
    found = {}
    for row, r in rewards.items():
        curve = preference.curves(r)
        values = {f"best@{args.samples}": curve["best"][:, -1], "reward": r.mean(1), f"worst@{args.samples}": curve["worst"][:, -1], "seed std": r.std(1)}
        values |= {"diversity": diversity(files[row], distance, world.device)} if distance and args.samples > 1 else {}
        values |= {m: raw[row][..., k].mean(1) for k, m in enumerate(metrics)}
        found[row] = {"values": {name: over_photos(v) for name, v in values.items()}, "curve": {which: over_photos(curve[which]).mean(0).tolist() for which in ("best", "mean", "worst")},
                      "seed_std": {m: float(over_photos(raw[row][..., k].std(1)).mean()) for k, m in enumerate(metrics)}}
    first = next(iter(found))
    summary = {"reward": args.reward, "inside": used, "outside": [m for m in metrics if m not in used], "samples": args.samples, "images": len(items), "photos": len(set(whose)), "k": curve["k"],
               "lower_is_better": {name: lower.get(name, None if name in ("seed std", "diversity") else False) for name in found[first]["values"]}, "diversity_by": args.diversity, "norm": str(args.norm_file), "rows": {}, **runs.describe_machine()}
    for row, v in found.items():
        means = {name: dict(zip(("mean", "low", "high"), (float(x.mean()), *tables.interval(x)))) for name, x in v["values"].items()}
        differences = {name: tables.difference(x[None], found[first]["values"][name][None]) for name, x in v["values"].items()} if row != first else {}
        summary["rows"][row] = {"means": means, "minus_first": differences, "curve": v["curve"], "seed_std": v["seed_std"], "per_photo": {name: x.tolist() for name, x in v["values"].items()}}
    runs.save_json(args.out / "eval.json", summary)
    text = table(summary)
    runs.write_atomic(args.out / "table.md", lambda t: t.write_text(text + "\n"))
    print(text)
    draw_curves(summary, args.out / "curves.png")
    shown = args.shown_rows or list(rows)[:len(args.gen)]
    sheet(args.out / "grid.png", items, {row: files[row] for row in shown}, rewards, args.shown)
    print(f"wrote eval.json, table.md, curves.png and grid.png in {args.out}")
    return summary


def table(summary):
    """Markdown: the reward's curve ends and every metric, then differences to the first row, bold where the verdict is clear (tables.difference)."""
    names = list(next(iter(summary["rows"].values()))["means"])
    head = ["", *(tables.heading(name, summary["lower_is_better"][name]) + " (outside)" * (name in summary["outside"]) for name in names)]
    decimals = {name: tables.digits([row["means"][name]["mean"] for row in summary["rows"].values()]) for name in names}
    means = runs.markdown(head, [[row, *(f"{v['means'][name]['mean']:.{decimals[name]}f}" for name in names)] for row, v in summary["rows"].items()])
    first = next(iter(summary["rows"]))
    rest = [[f"{row} - {first}", *(tables.difference_cell(v["minus_first"][name], decimals[name]) for name in names)] for row, v in summary["rows"].items() if row != first]
    about = (f"{summary['images']} images of {summary['photos']} photos, {summary['samples']} seeds; reward ({summary['reward']}) of {', '.join(summary['inside'])}; "
             f"{', '.join(summary['outside']) or 'nothing'} outside it")
    return "\n\n".join([about, means, *([runs.markdown(head, rest)] if rest else [])])


def draw_curves(summary, path):
    """Best, mean and worst of k seeds against k, one colour per row."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for n, (row, v) in enumerate(summary["rows"].items()):
        for which, style in (("best", "-"), ("mean", "--"), ("worst", ":")):
            axis.plot(summary["k"], v["curve"][which], style, color=f"C{n}", label=row if which == "best" else None)
    axis.set(xscale="log", xlabel="k, seeds", ylabel=f"reward ({summary['reward']})")
    axis.set_xticks(summary["k"], summary["k"])
    axis.minorticks_off()
    axis.legend(fontsize=8, title="solid: best of k, dashed: mean, dotted: worst", title_fontsize=8)
    runs.write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    plt.close(figure)


def sheet(path, items, files, rewards, shown):
    """PNG: LR, then of every row the worst, the middle and the best seed by its reward, then the ground truth; the first `shown` photographs, an image each."""
    first_of = {data.photo_of(name): (k, name) for k, name in reversed(list(enumerate(items)))}
    lines = []
    for k, name in sorted(first_of.values())[:shown]:
        lq = load_image(items[name]["lq"])
        line = [(lq.repeat_interleave(4, 1).repeat_interleave(4, 2), "LR")]
        for row, found in files.items():
            order = rewards[row][k].argsort()
            line += [(load_image(found[name][seed]), f"{row}\n{text} {rewards[row][k, seed]:.3f}") for text, seed in (("worst", order[0]), ("middle", order[len(order) // 2]), ("best", order[-1]))]
        lines.append(line + [(load_image(ref), "GT") for ref in items[name]["refs"]])
    pictures.save_grid(path, lines)
