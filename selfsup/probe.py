"""The plots of the HR-aware paper: what controller and FAR do before any network is tuned, and the curves of tuning.

    python -m selfsup.probe --demo                                              fig8 of the demo's networks
    python -m selfsup.probe fig7 --rec runs/rec-hra runs/rec-plain --hr PHOTOS  leaves runs/probe.png and .json
    python -m selfsup.probe fig8 --rec runs/rec-hra --hr PHOTOS --sr BEFORE AFTER --lr-dir LR
    python -m selfsup.probe fig9 --runs runs/swinir-amo+LR                      runs of selfsup.finetune

fig7    Y_i = i up(X) + (1 - i) Y. Does R prefer, for the reconstruction of X, a Y that still looks like X? Without a
        controller a tuned network would be drawn to such a Y.
fig8    FAR of clean photographs, and of the same with blur, noise, JPEG, or pre-training's degradation (PAPER: second
        order). Reported is the area under the ROC curve.
fig9    Metrics against steps, of fine-tunings with --val-every N.

Crops come from photographs that pre-training did not see. Intervals are over photographs, not over crops, since the
crops of one photograph resemble each other.
"""
from pathlib import Path

import runs
from selfsup import options

DEMO = dict(figure="fig8", rec=[options.DEMO_REC], hr=options.DEMO_PHOTOS, out=Path("runs/selfsup-demo-fig8"), crops=8)


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--demo", action="store_true", help="fig8 of the demo's pre-training; same code")
    p.add_argument("figure", nargs="?", choices=["fig7", "fig8", "fig9"], help="the paper's figure")
    p.add_argument("--rec", type=Path, nargs="+", default=[], metavar="PATH",
                   help="fig7, fig8: run folders of selfsup.pretrain, or their rec.pth")
    p.add_argument("--runs", type=Path, nargs="+", default=[], metavar="DIR",
                   help="fig9: run folders of selfsup.finetune")
    p.add_argument("--hr", type=Path, metavar="DIR", help="fig7, fig8: photographs that pre-training did not see")
    p.add_argument("--sr", type=runs.CHECKPOINT, nargs="*", default=[], metavar="PATH",
                   help="fig8: x4 networks whose outputs are probed as well, before and after tuning")
    p.add_argument("--lr-dir", type=Path, metavar="DIR", help="fig8: images that --sr enlarges")
    p.add_argument("--crops", type=runs.SIZE, default=128, help="fig7, fig8: crops of the photographs (CHOICE)")
    p.add_argument("--degradation", choices=runs.literal("degradations", "PRESETS"), metavar="PRESET",
                   help="fig7: of the LR images; default: that of the first --rec's pre-training. blur leaves hardly "
                        "any noise or blocks in them, which Y would have to supply")
    p.add_argument("--out", type=Path, default=Path("runs/probe"), metavar="STEM", help="leaves STEM.png and STEM.json")
    options.add_files(p)
    options.add_machine(p)
    if p.parse_known_args(argv)[0].demo:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    if args.figure is None:
        p.error("which figure? fig7, fig8 or fig9")
    for name in ("runs",) if args.figure == "fig9" else ("rec", "hr"):
        if not getattr(args, name):
            p.error(f"{args.figure}: --{name} is needed")
    if args.degradation and args.figure != "fig7":
        p.error(f"--degradation {args.degradation}: of fig7 only")
    if args.sr and args.figure != "fig8":
        p.error("--sr: of fig8 only")
    if bool(args.sr) != bool(args.lr_dir):
        p.error("--sr and --lr-dir: give both")
    return args


# --help and flag errors need no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import json
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

import archs
import data
import degradations
import metrics
from images import list_images, load_image
from report import style, tables
from selfsup import encoders
from selfsup import networks as rec

DEGRADED = ("blur", "noise", "jpeg", "as in pre-training")
# names in plots; others as in tables
NAMES = {"jpeg": "JPEG", "rec": "reconstruction loss", "d": "quality distance d", "s": "controller s", "far": "FAR",
         "colours": "distance of mean colours, grey levels", "psnr": "PSNR, dB", "distance": "distance to truth"}


def open_networks(paths, device):
    """{name: (Reconstruction, its settings)}; name: of the run folder or file. UserError for two of one name."""
    nets = {}
    for path in paths:
        net, settings = rec.load_reconstruction(path)
        name = path.name if path.is_dir() else path.stem
        if name in nets:
            raise runs.UserError(f"--rec {path}: two networks are called {name}: rename a folder")
        nets[name] = net.to(device), settings
    return nets


def clean_pairs(settings, hr, crops, device, preset=None):
    """-> photograph of each crop (crops,), and batches of lq, hr: synthetic pairs of `hr`, made as in pre-training but
    for the preset, if there is one."""
    seeds, patch = partial(runs.sample_seed, 0), settings["patch"]
    dataset = data.TrainingSet(data.find_photos(hr, "--hr"), "orig", seeds, 8, 1, 4 * patch, settings["load_size"])
    draw = data.synthetic_pairs(dataset, seeds, device, preset or settings["degradation"], patch, 1)
    photos = [dataset.sets.photo(dataset.stems[dataset.index(1, lane)]) for lane in range(crops)]
    return np.array(photos), [draw(1, range(k, min(k + 8, crops))) for k in range(0, crops, 8)]


def by_photo(values, photos):
    """(crops, ...) -> (photographs, ...), their means."""
    return np.array([values[photos == photo].mean(0) for photo in np.unique(photos)])


# Figure 7

LINES = {"one": "no controller", "eq8": "s = 1 - d (Eq. 8, fine-tuning)", "flip": "s = d (pre-training)"}


def changes(values, photos):
    """[difference to the first share, low, high] per share, intervals over photographs. values: (crops, shares)"""
    of_photos = by_photo(values - values[:, :1], photos)
    return [[of_share.mean(), *tables.interval(of_share)] for of_share in of_photos.T]


@torch.no_grad()
def figure7(recs, hr, crops, device, vgg_weights=None, preset=None):
    """{line: {"i", "psnr", "distance": means per i, "psnr_change", "distance_change", ...}}

    Changes are [difference, low, high] per i against i = 0, the true image, with intervals over photographs.
    """
    shares, lines, pairs = np.round(np.arange(0, 1.01, 0.1), 1).tolist(), {}, None
    # d does not depend on R, and is most of the work: {(its settings, batch, i): d}
    known = {}
    for name, (net, settings) in open_networks(recs, device).items():
        distance, hqi, _ = encoders.open_frozen(device, settings["distance"], settings["vgg_stages"],
                                                vgg_weights=vgg_weights)
        encoders.check_weights(settings, distance, hqi, None)
        if pairs is None:
            # the same for every network
            photos, pairs = clean_pairs(settings, hr, crops, device, preset)

        def controller(rule, k, i, lq, y, looks=(settings["distance"], settings["vgg_stages"]), hqi=hqi):
            if rule == "one":
                return 1.0
            if (looks, k, i) not in known:
                known[looks, k, i] = rec.hqi_distance(hqi, lq, y)
            return rec.controller(rule, known[looks, k, i])
        # flip is the rule of pre-training
        for rule in ("one",) if settings["s_rule"] == "one" else ("eq8", "flip"):
            batches = []
            for k, (lq, clean) in enumerate(pairs):
                enlarged = F.interpolate(lq, scale_factor=4, mode="bicubic").clamp(0, 1)
                values = []
                for i in shares:
                    y = i * enlarged + (1 - i) * clean
                    again, _ = net(lq, y, controller(rule, k, i, lq, y))
                    psnr = metrics.psnr(again.clamp(0, 1), lq, border=0)
                    values.append(torch.stack([psnr.double(), distance(again, lq).double()]))
                batches.append(torch.stack(values, 2))
            psnr, distances = torch.cat(batches, 1).cpu().numpy()                 # (crops, shares) each
            lines[f"{name}, {LINES[rule]}"] = {
                "i": shares, "psnr": psnr.mean(0).tolist(), "distance": distances.mean(0).tolist(),
                "psnr_change": changes(psnr, photos), "distance_change": changes(distances, photos),
                "photos": len(np.unique(photos)), "crops": len(photos), "distance_name": settings["distance"]}
    for name, line in lines.items():
        mean, low, high = line["psnr_change"][5]
        print(f"{name}: PSNR {line['psnr'][0]:.2f} dB of Y, {line['psnr'][5]:.2f} dB of half a blur; "
              f"difference {mean:+.2f} [{low:+.2f}, {high:+.2f}] over {line['photos']} photos")
    return lines


def draw7(path, lines):
    """PNG of figure7's changes: a line with its 95 % interval over photographs for every network and rule."""
    drawing, axes = style.figure(columns=2, height=4.4)
    distance = next(iter(lines.values()))["distance_name"]
    titles = {"psnr": ("PSNR, dB", "higher"), "distance": (tables.shown(distance), "lower")}
    for axis, (metric, (title, better)) in zip(axes, titles.items()):
        axis.axhline(0, color="grey", linewidth=0.8)
        for name, line in lines.items():
            mean, *ends = np.array(line[f"{metric}_change"]).T
            style.band(axis, line["i"], mean, ends, label=name)
        axis.set(xlabel="share i of the enlarged LR image in Y", ylabel=f"{title}; {better} is better",
                 title="reconstruction from Y, minus\nthat from the true image")
    style.legend(drawing, axes[0], columns=1, title="bands: 95 % intervals over photographs")
    style.save(drawing, path)


# Figure 8

def degrade(name, hr, k, preset):
    """hr (b, 3, H, W) after one of DEGRADED. k: seeds of this batch; preset: of pre-training (PAPER: second order).

    CHOICE of the strengths: plainly visible ones.
    """
    if name == "blur":
        return degradations.blur(hr, degradations.gaussian_kernel(21, 2.0))
    if name == "noise":
        return degradations.add_gaussian_noise(hr, 12.0, degradations.normal_field(hr.shape, k, hr.device))
    if name == "jpeg":
        return degradations.jpeg(hr, 30.0, "libjpeg")
    seeds = [runs.sample_seed(0, k, lane, "fig8") for lane in range(len(hr))]
    lq = degradations.degrade(hr, preset, seeds, seeds)
    return F.interpolate(lq, scale_factor=4, mode="bicubic").clamp(0, 1)


def area(clean, degraded):
    """Area under the ROC curve: how often a degraded image has the larger value."""
    # Mann and Whitney's U, without the p value of scipy.stats.mannwhitneyu, which takes most of its time
    count = len(degraded)
    ranks = stats.rankdata(np.concatenate([degraded, clean]))[:count]
    return (ranks.sum() - count * (count + 1) / 2) / (count * len(clean))


def bootstrap(samples, statistic):
    """95 % percentile interval of 1,000 resamplings."""
    interval = stats.bootstrap(samples, statistic, n_resamples=1000, vectorized=False, method="percentile",
                               rng=np.random.default_rng(0)).confidence_interval
    return float(interval.low), float(interval.high)


def area_with_interval(clean, degraded, photos):
    """-> (area, low, high) of crops and the same crops degraded, resampled by photograph."""
    rows = [np.flatnonzero(photos == photo) for photo in np.unique(photos)]
    value = area(clean, degraded)
    if len(rows) < 2:
        # nothing to resample from
        return value, value, value

    def resampled(chosen):
        crops = np.concatenate([rows[int(k)] for k in chosen])
        return area(clean[crops], degraded[crops])
    return value, *bootstrap((np.arange(len(rows)),), resampled)


def area_of_others(clean, values):
    """As area_with_interval, for images of other content: clean (photos,) means, values (images,), resampled apart."""
    value = area(clean, values)
    if min(len(clean), len(values)) < 2:
        return value, value, value
    return value, *bootstrap((clean, values), area)


@torch.no_grad()
def figure8(recs, hr, crops, device, vgg_weights=None, clip_weights=None, far_sr=None, srs=(), lr_dir=None):
    """{network: {"clean": FAR of each crop, degradation: ..., name of one of srs: ..., "auc": {name: [area, low,
    high]}}}"""
    if len({path.name for path in srs}) < len(srs):
        raise runs.UserError(f"--sr: two networks of one name ({', '.join(path.name for path in srs)}): rename one")
    sr_nets = {path.name: archs.load_x4(path, "--sr")[0].to(device) for path in srs}
    if srs and not lr_dir.is_dir():
        raise runs.UserError(f"--lr-dir {lr_dir}: no such folder")
    images = list(list_images(lr_dir).values()) if srs else []
    results = {}
    for name, (net, settings) in open_networks(recs, device).items():
        if settings["far_enc"] is None:
            raise runs.UserError(f"--rec {name}: trained without FAR, so there is nothing to probe")
        # the distance is not used here, and proxy needs no weights
        *_, encoder = encoders.open_frozen(device, "proxy", far_enc=settings["far_enc"],
                                           far_layer=settings["far_layer"], vgg_weights=vgg_weights,
                                           clip_weights=clip_weights, far_sr=far_sr)
        encoders.check_weights(settings, None, None, encoder)

        def far_of(image, net=net, encoder=encoder, offdiag=settings["offdiag"]):
            """FAR of any image: the LR image does not matter to it."""
            lq = F.interpolate(image, scale_factor=0.25, mode="bicubic").clamp(0, 1)
            return net(lq, image, 1.0, encoder(image), offdiag=offdiag)[1].double().cpu()
        photos, pairs = clean_pairs(settings, hr, crops, device)
        values = {"clean": torch.cat([far_of(clean) for _, clean in pairs]).numpy()}
        for kind in DEGRADED:
            parts = [degrade(kind, clean, k, settings["degradation"]) for k, (_, clean) in enumerate(pairs)]
            values[kind] = torch.cat([far_of(part) for part in parts]).numpy()
        areas = {kind: area_with_interval(values["clean"], values[kind], photos) for kind in DEGRADED}
        for other, sr_net in sr_nets.items():
            outputs = []
            for file in images:
                sr = archs.upscale_tiled(sr_net, load_image(file)[None].to(device).float() / 255).clamp(0, 1)
                outputs.append(far_of(sr[..., :sr.shape[2] // 16 * 16, :sr.shape[3] // 16 * 16]))
            values[other] = torch.cat(outputs).numpy()
            areas[other] = area_of_others(by_photo(values["clean"], photos), values[other])
        count = len(np.unique(photos))
        results[name] = {k: v.tolist() for k, v in values.items()}
        results[name] |= {"auc": areas, "photos": count, "crops": len(photos), "far_enc": settings["far_enc"]}
        print(f"{name}, FAR by {settings['far_enc']}: area under the ROC curve, {len(photos)} crops of {count} photos: "
              + ", ".join(f"{kind} {a:.3f} [{low:.3f}, {high:.3f}]" for kind, (a, low, high) in areas.items()))
        for other in sr_nets:
            print(f"  mean FAR of {other}: {values[other].mean():.4g}, of clean photos {values['clean'].mean():.4g}")
    return results


def draw8(path, results):
    """PNG: for every network, which share of the crops has a FAR below a value."""
    from matplotlib import ticker
    drawing, axes = style.figure(columns=len(results), height=4.6, width=max(style.WIDTH, 3.5 * len(results)),
                                 sharey=True, squeeze=False)
    for axis, (name, values) in zip(axes[0], results.items()):
        for k, v in values.items():
            if isinstance(v, list):
                label = NAMES.get(k, k) + (f", ROC area {values['auc'][k][0]:.2f}" if k in values["auc"] else "")
                axis.ecdf(v, label=label, linewidth=2.6 if k == "clean" else 1.4)
        axis.set(xscale="log", xlabel=f"FAR ({values['far_enc']})", title=name)
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ticker.ScalarFormatter())
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axes[0][0].set_ylabel("share of crops below this value")
    style.save(drawing, path)


def draw_areas(path, networks):
    """PNG: areas under the ROC curve with their intervals. networks: {name: "auc" of figure8}"""
    drawing, axes = style.figure(columns=len(networks), height=3.0, sharex=True, sharey=True, squeeze=False)
    for axis, (name, areas) in zip(axes[0], networks.items()):
        axis.axvline(0.5, color="grey", linewidth=0.8)
        area, low, high = np.array(list(areas.values())).T
        style.interval(axis, area, np.arange(len(areas)), (low, high))
        axis.set(title=name, yticks=range(len(areas)), yticklabels=[NAMES.get(kind, kind) for kind in areas])
    axes[0][0].invert_yaxis()
    drawing.supxlabel("area under the ROC curve", fontsize=style.FONT)
    drawing.suptitle("95 % intervals over photographs; above 0.5 (grey line): FAR is larger for degraded ones",
                     fontsize=style.FONT)
    style.save(drawing, path)


# Figure 9

def figure9(folders):
    """{run: {"ema" or "raw": [event, ...]}}"""
    curves = {}
    for folder in folders:
        log = folder / "metrics.jsonl"
        if not log.is_file():
            raise runs.UserError(f"--runs {folder}: no metrics.jsonl there; name run folders of selfsup.finetune")
        if folder.name in curves:
            raise runs.UserError(f"--runs {folder}: two runs are called {folder.name}: rename a folder")
        events = [json.loads(line) for line in log.read_text().splitlines()]
        curves[folder.name] = {which: [e for e in events if e["split"] == which] for which in ("ema", "raw")}
        checks = len(curves[folder.name]["ema"])
        if checks < 2:
            raise runs.UserError(f"--runs {folder}: only {checks} checks in it; finetune with --val-every")
    return curves


def draw9(path, curves):
    """PNG of every logged metric against steps."""
    def has(parts, metric):
        """Not where a run was continued without --gt-dir."""
        return all(metric in event for events in parts.values() for event in events)
    logged = dict.fromkeys(metric for parts in curves.values() for metric in parts["ema"][0])
    names = [metric for metric in logged if metric not in ("step", "split", "l1", "percep")
             and any(has(parts, metric) for parts in curves.values())]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    drawing, axes = style.figure(rows, columns, height=1.0 + 2.2 * rows, squeeze=False)
    for axis, metric in zip(axes.flat, names):
        for k, (run, parts) in enumerate(curves.items()):
            for which, line in (("ema", "-"), ("raw", ":")) if has(parts, metric) else ():
                steps, values = ([event[key] for event in parts[which]] for key in ("step", metric))
                axis.plot(steps, values, line, color=style.COLOURS[k % len(style.COLOURS)],
                          label=run if which == "ema" else None)
        axis.set(title=NAMES.get(metric, tables.shown(metric)), xlabel="training steps")
    for axis in list(axes.flat)[len(names):]:
        axis.remove()
    style.legend(drawing, axes.flat[0], title="solid: averaged weights (EMA), dotted: raw weights")
    style.save(drawing, path)


def main(args):
    runs.check_writable(args.out.parent, "--out")
    world = runs.start_world(args.device, args.threads)
    if args.demo:
        starts = [options.DEMO_SET] if args.hr == options.DEMO_PHOTOS else []
        starts += [path for path in args.rec if path in options.DEMO_COMMANDS]
        options.make_demo_start(starts, world, args.device)
    if args.hr and not args.hr.is_dir():
        raise runs.UserError(f"--hr {args.hr}: no such folder")
    if args.figure == "fig7":
        lines = figure7(args.rec, args.hr, args.crops, world.device, args.vgg_weights, args.degradation)
        draw = draw7
    elif args.figure == "fig8":
        lines, draw = figure8(args.rec, args.hr, args.crops, world.device, args.vgg_weights, args.clip_weights,
                              args.far_sr, args.sr, args.lr_dir), draw8
    else:
        lines, draw = figure9(args.runs), draw9
    draw(args.out.with_name(args.out.name + ".png"), lines)
    record = {"figure": args.figure, **runs.describe_machine(), "lines": lines}
    runs.save_json(args.out.with_name(args.out.name + ".json"), record)
    print(f"wrote {args.out}.png and .json")


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
