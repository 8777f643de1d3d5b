"""The plots of the HR-aware paper: what controller and FAR do, before any network is tuned, and the curves of tuning. `selfsup.py probe` calls this.

fig7    Y_i = i up(X) + (1 - i) Y: does the reconstruction of X prefer a Y that still looks like X? Without a controller that is what a tuned network would be drawn to
fig8    FAR of clean photos, and of the same with blur, noise, JPEG, or pre-training's degradation (the paper's: second order): area under the ROC curve
fig9    metrics against steps of `selfsup.py finetune --val-every N`
Crops come from photos that pre-training did not see; intervals are over photos, not crops, which resemble each other.
"""
import argparse
import json
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

import archs
import data
import degradations
from selfsup import encoders as features
import metrics
from selfsup import networks as rec
import runs
from images import list_images, load_image
from report import tables
from selfsup.pretrain import check_weights

DEGRADED = ("blur", "noise", "jpeg", "as in pre-training")


def open_networks(paths, device):
    """{name: (Reconstruction, its settings)}; name: of the run folder or file. ValueError for two of one name."""
    nets = {}
    for path in paths:
        file = path / "weights" / "rec.pth" if path.is_dir() else path
        net, settings = rec.load_reconstruction(file)
        name = path.name if path.is_dir() else path.stem
        if name in nets:
            raise runs.UserError(f"--rec {path}: two networks are called {name}: rename a folder")
        nets[name] = net.to(device), settings
    return nets


def clean_pairs(settings, args, device):
    """-> photo of each crop (n,), and batches of lq, hr: crops of --hr and their synthetic low-resolution images, as in pre-training."""
    seeds = partial(runs.sample_seed, 0)
    how = argparse.Namespace(**{name: settings[name] for name in ("degradation", "patch", "load_size")})
    photos = data.TrainingSet(data.find_photos(args.hr, "--hr"), "orig", seeds, 8, 1, 4 * how.patch, how.load_size)
    draw, whose, pairs = data.synthetic_pairs(photos, seeds, device, how.degradation, how.patch, 1), [], []
    for k in range(0, args.crops, 8):
        lanes = range(k, min(k + 8, args.crops))
        whose += [photos.sets.photo(photos.stems[photos.index(1, lane)]) for lane in lanes]
        pairs.append(draw(1, lanes))
    return np.array(whose), pairs


def by_photo(values, whose):
    """(n,) of crops -> (photos,) means."""
    return np.array([values[whose == photo].mean() for photo in np.unique(whose)])


@torch.no_grad()
def figure7(args, device):
    """{line: {"i", "psnr", "distance": means per i, "half_minus_clean": PSNR of i = .5 minus that of i = 0 with its interval}}"""
    steps, lines, whose, pairs = np.round(np.arange(0, 1.01, 0.1), 1), {}, None, None
    for name, (net, settings) in open_networks(args.rec, device).items():
        distance, hqi = (d.to(device) for d in metrics.create_distances(settings["distance"], args.vgg_weights, settings["vgg_stages"]))
        check_weights(settings, distance, hqi, None)
        if pairs is None:                                                         # the same for every network
            whose, pairs = clean_pairs(settings, args, device)
        for rule in ("one",) if settings["s_rule"] == "one" else ("eq8", "flip"):                # flip is pre-training's rule
            found = {"psnr": [], "distance": []}
            for lq, hr in pairs:
                rows = {"psnr": [], "distance": []}
                for i in steps.tolist():
                    y = i * F.interpolate(lq, scale_factor=4, mode="bicubic").clamp(0, 1) + (1 - i) * hr
                    again, _ = net(lq, y, rec.controller(rule, rec.hqi_distance(hqi, lq, y)))
                    rows["psnr"].append(metrics.psnr(again.clamp(0, 1), lq, border=0))
                    rows["distance"].append(distance(again, lq))
                for m in rows:
                    found[m].append(torch.stack(rows[m], 1).double())
            found = {m: torch.cat(values).cpu().numpy() for m, values in found.items()}       # (crops, steps)
            gain = by_photo(found["psnr"][:, 5] - found["psnr"][:, 0], whose)
            label = {"one": "no controller", "eq8": "s = 1 - d (Eq. 8, fine-tuning)", "flip": "s = d (pre-training)"}[rule]
            lines[f"{name}, {label}"] = {"i": steps.tolist(), **{m: values.mean(0).tolist() for m, values in found.items()},
                                         "half_minus_clean": [gain.mean(), *tables.interval(gain)], "photos": len(gain), "crops": len(whose), "distance_name": settings["distance"]}
    for name, line in lines.items():
        mean, low, high = line["half_minus_clean"]
        print(f"{name}: PSNR {line['psnr'][0]:.2f} dB of Y, {line['psnr'][5]:.2f} dB of half a blur; difference {mean:+.2f} [{low:+.2f}, {high:+.2f}] over {line['photos']} photos")
    return lines


def degrade(kind, hr, k, preset):
    """hr (b, 3, H, W) after one degradation; k: seeds of this batch, preset: of pre-training (the paper's: second order). CHOICE of the strengths: plainly visible ones."""
    if kind == "blur":
        return degradations.blur(hr, degradations.gaussian_kernel(21, 2.0))
    if kind == "noise":
        return degradations.add_gaussian_noise(hr, 12.0, degradations.normal_field(hr.shape, k, hr.device))
    if kind == "jpeg":
        return degradations.jpeg(hr, 30.0, "libjpeg")
    seeds = [runs.sample_seed(0, k, lane, "fig8") for lane in range(len(hr))]
    return F.interpolate(degradations.degrade(hr, preset, seeds, seeds), scale_factor=4, mode="bicubic").clamp(0, 1)


def area(clean, degraded):
    """Area under the ROC curve: how often a degraded image has the larger value."""
    return stats.mannwhitneyu(degraded, clean).statistic / (len(clean) * len(degraded))


def area_with_interval(clean, degraded, whose):
    """-> (AUC, low, high), 95 % percentile bootstrap over photos."""
    rows = [np.flatnonzero(whose == photo) for photo in np.unique(whose)]
    if len(rows) < 2:                                                             # nothing to draw from
        return (area(clean, degraded),) * 3

    def resampled(photos):
        crops = np.concatenate([rows[int(p)] for p in photos])
        return area(clean[crops], degraded[crops])
    ends = stats.bootstrap((np.arange(len(rows)),), resampled, vectorized=False, n_resamples=1000, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return area(clean, degraded), float(ends.low), float(ends.high)


def area_of_others(clean, values):
    """As area_with_interval, for images of other content: clean (photos,) means, values (images,), resampled apart."""
    if min(len(clean), len(values)) < 2:
        return (area(clean, values),) * 3
    ends = stats.bootstrap((clean, values), area, vectorized=False, n_resamples=1000, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return area(clean, values), float(ends.low), float(ends.high)


@torch.no_grad()
def figure8(args, device):
    """{network: {"clean": FAR of each crop, degradation: ..., name of --sr: ..., "auc": {degradation: [value, low, high]}}}"""
    found = {}
    if len({path.name for path in args.sr}) < len(args.sr):
        raise runs.UserError(f"--sr: two networks of one name ({', '.join(path.name for path in args.sr)}): rename one")
    others = [(path.name, archs.load_x4(path, "--sr")[0].to(device)) for path in args.sr]
    if args.sr and not args.lr_dir.is_dir():
        raise runs.UserError(f"--lr-dir {args.lr_dir}: no such folder")
    images = list(list_images(args.lr_dir).values()) if args.sr else []
    for name, (net, settings) in open_networks(args.rec, device).items():
        if settings["far_enc"] is None:
            raise runs.UserError(f"--rec {name}: trained without FAR, so there is nothing to probe")
        if settings["far_enc"] == "sr" and args.far_sr is None:
            raise runs.UserError(f"--rec {name}: its FAR looks at a network's features: --far-sr PATH is needed")
        sr = archs.load_x4(args.far_sr, "--far-sr")[0] if settings["far_enc"] == "sr" else None
        encoder = features.create_encoder(settings["far_enc"], settings["far_layer"], args.vgg_weights, args.clip_weights, sr).to(device)
        check_weights(settings, None, None, encoder)

        def far_of(hr):                                                           # of any image: the LR input does not matter to it
            lq = F.interpolate(hr, scale_factor=0.25, mode="bicubic").clamp(0, 1)
            return net(lq, hr, 1.0, encoder(hr), offdiag=settings["offdiag"])[1].double().cpu()
        whose, pairs = clean_pairs(settings, args, device)
        values = {"clean": torch.cat([far_of(hr) for _, hr in pairs]).numpy()}
        for kind in DEGRADED:
            values[kind] = torch.cat([far_of(degrade(kind, hr, k, settings["degradation"])) for k, (_, hr) in enumerate(pairs)]).numpy()
        areas = {kind: area_with_interval(values["clean"], values[kind], whose) for kind in DEGRADED}
        for other, m in others:
            outputs = []
            for file in images:
                out = archs.upscale_tiled(m, load_image(file)[None].to(device).float() / 255).clamp(0, 1)
                outputs.append(far_of(out[..., :out.shape[2] // 16 * 16, :out.shape[3] // 16 * 16]))
            values[other] = torch.cat(outputs).numpy()
            areas[other] = area_of_others(by_photo(values["clean"], whose), values[other])
        found[name] = {k: v.tolist() for k, v in values.items()} | {"auc": areas, "photos": len(np.unique(whose)), "crops": len(whose), "far_enc": settings["far_enc"]}
        print(f"{name}, FAR by {settings['far_enc']}: area under the ROC curve, {len(whose)} crops of {len(np.unique(whose))} photos: "
              + ", ".join(f"{kind} {a:.3f} [{low:.3f}, {high:.3f}]" for kind, (a, low, high) in areas.items()))
        for other, _ in others:
            print(f"  mean FAR of {other}: {values[other].mean():.4g}, of clean photos {values['clean'].mean():.4g}")
    return found


def figure9(args):
    """{run: {"ema" or "raw": [event, ...]}}"""
    found = {}
    for folder in args.runs:
        log = folder / "metrics.jsonl"
        if not log.is_file():
            raise runs.UserError(f"--runs {folder}: no metrics.jsonl there; it is a run folder of selfsup.py finetune that is meant")
        events = [json.loads(line) for line in log.read_text().splitlines()]
        if folder.name in found:
            raise runs.UserError(f"--runs {folder}: two runs are called {folder.name}: rename a folder")
        found[folder.name] = {which: [e for e in events if e["split"] == which] for which in ("ema", "raw")}
        if len(found[folder.name]["ema"]) < 2:
            raise runs.UserError(f"--runs {folder}: only {len(found[folder.name]['ema'])} checks in it; finetune with --val-every")
    return found


def draw(args, found):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker
    if args.figure == "fig7":
        figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
        for axis, m in zip(axes, ("psnr", "distance")):
            for name, line in found.items():
                axis.plot(line["i"], line[m], "o-", markersize=3, label=name)
            kind = next(iter(found.values()))["distance_name"]
            axis.set(xlabel="i: share of the enlarged LR image in Y", ylabel="PSNR of the reconstruction, dB" if m == "psnr" else f"distance of the reconstruction ({kind})")
        axes[0].legend(fontsize=8)
    elif args.figure == "fig8":
        figure, axes = plt.subplots(1, len(found), figsize=(5.5 * len(found), 4), layout="constrained", squeeze=False)
        for axis, (name, values) in zip(axes[0], found.items()):
            shown = {k: v for k, v in values.items() if isinstance(v, list)}
            edges = np.geomspace(min(map(min, shown.values())), max(map(max, shown.values())), 30)
            for k, v in shown.items():
                axis.hist(v, edges, histtype="step", density=True, linewidth=2 if k == "clean" else 1.2, label=f"{k}, AUC {values['auc'][k][0]:.2f}" if k in values["auc"] else k)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
            axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
            axis.set(xlabel=f"FAR ({values['far_enc']})", ylabel="density", title=name)
            axis.legend(fontsize=8)
    else:
        has = lambda parts, m: all(m in e for events in parts.values() for e in events)           # not where a run was continued without --gt-dir
        names = [m for m in dict.fromkeys(m for parts in found.values() for m in parts["ema"][0]) if m not in ("step", "split", "l1", "percep") and any(has(parts, m) for parts in found.values())]
        figure, axes = plt.subplots(-(-len(names) // 4), min(4, len(names)), figsize=(4 * min(4, len(names)), 3.2 * -(-len(names) // 4)), layout="constrained", squeeze=False)
        for axis, m in zip(axes.flat, names):
            for k, (run, parts) in enumerate(found.items()):
                for which, style in (("ema", "-"), ("raw", ":")) if has(parts, m) else ():
                    axis.plot([e["step"] for e in parts[which]], [e[m] for e in parts[which]], style, color=f"C{k}", label=run if which == "ema" else None)
            axis.set(xlabel="step", ylabel=tables.SHOWN.get(m, m))
        for axis in list(axes.flat)[len(names):]:
            axis.remove()
        axes.flat[0].legend(fontsize=8, title="solid: EMA, dotted: raw", title_fontsize=8)
    runs.write_atomic(args.out.with_name(args.out.name + ".png"), lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def main(args):
    runs.check_writable(args.out.parent, "--out")
    world = runs.start_world(args.device, args.threads)
    if args.hr and not args.hr.is_dir():
        raise runs.UserError(f"--hr {args.hr}: no such folder")
    found = {"fig7": lambda: figure7(args, world.device), "fig8": lambda: figure8(args, world.device), "fig9": lambda: figure9(args)}[args.figure]()
    draw(args, found)
    runs.save_json(args.out.with_name(args.out.name + ".json"), {"figure": args.figure, **runs.describe_machine(), "lines": found})
    print(f"wrote {args.out}.png and .json")
