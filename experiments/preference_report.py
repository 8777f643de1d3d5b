"""The report of experiments.preferences: from one JSON file per generator and arm to tables, signs and pictures."""
import json
import sys

import numpy as np
import torch

import runs
from dpo import candidates, compare
from experiments import jobs
from images import load_image
from report import pictures, style, tables

NAMES = {"base": "untuned generator", "best-worst": "best against worst", "1 of 4": "best quarter against worst",
         "1 of 8": "best eighth against worst", "HPO": "best quarter, HPO",
         "HPO, equal grids": "best quarter, HPO, pairs of equal grids",
         "tossed": "winners and losers by a coin",
         "HPO, grid-free": "best quarter, HPO, ranker3 without grid",
         "HPO, paper sigma": "best quarter, HPO, weights as at\nthe paper's sigma_g",
         "nr": "HPO, no-reference reward", "fr": "HPO, full-reference reward", "2 rounds": "HPO, two rounds"}
# in the plot of curves
SHOWN = ("best-worst", "HPO")
# arms that are compared with each other, beside each with the untuned generator
PAIRS = [("1 of 4", "best-worst"), ("1 of 4", "1 of 8"), ("HPO", "best-worst"), ("HPO", "1 of 4"),
         ("HPO, paper sigma", "1 of 4"), ("HPO", "fr"), ("HPO", "nr"), ("HPO, grid-free", "HPO"),
         ("HPO, equal grids", "HPO"), ("HPO, equal grids", "base + grid of HPO"),
         ("HPO", "tossed"),
         ("2 rounds", "HPO")]
# the paper's claims: (sentence, A, B, column, sign of A - B); WORST is worst@M
WORST = "worst"
SIGNS = [("Tuning raises the mean of the seeds", "HPO", "base", "reward", 1),
         ("Tuning raises the worst of the seeds", "HPO", "base", WORST, 1),
         ("Tuning narrows the spread of the seeds", "HPO", "base", "seed std", -1),
         ("Many pairs beat the best against the worst in a small network", "1 of 4", "best-worst", "reward", 1),
         ("The weights of HPO add to a quarter", "HPO", "1 of 4", "reward", 1),
         ("So do weights as far from 1 as the paper's", "HPO, paper sigma", "1 of 4", "reward", 1),
         ("A no-reference reward alone gives away SSIM", "HPO", "nr", "ssim", 1),
         ("Two rounds beat one at equal cost (the paper's future work)", "2 rounds", "HPO", "reward", 1)]
# arms whose changes are shown; of the first one the outputs as well
PICTURED = ("HPO", "HPO, equal grids", "tossed")
# first names that fit: photographs of these sets may be shown; side of the part; times that differences are enlarged
PICTURE, SIDE, TIMES = ("test_set14-monarch", "test_set14", "test_set5", ""), 128, 16


# Was the generator worth tuning?

def rewards_by_tau(judged, norm, shares):
    """{tau: mean reward of the untuned generator on the scale of the pool}. judged: eval.json; shares: of tau 1."""
    # curate keeps the ends of the pool beside those of an average image
    norm = {"metrics": {m: v | dict(zip(("low", "high"), v.get("pool", (v["low"], v["high"]))))
                        for m, v in norm["metrics"].items()}}
    names, rewards = list(norm["metrics"]), {}
    for share in sorted({1.0, *shares}):
        row = judged["rows"]["base" if share == 1 else f"base, {share:g} of the noise"]["per_photo"]
        # linear in the metrics: the mean over seeds may come first
        values = np.array([row[name] for name in names]).T
        rewards[f"{share:g}"] = float(candidates.rewards_of(values, norm, "hybrid").mean())
    return rewards


def criterion(check, by_tau):
    """What the pre-registered criterion looks at. check: the last of dpo.pretrain's checks."""
    gain, behind = check["psnr_of_mean"] - check["psnr_base"], max(by_tau.values()) - by_tau["1"]
    return {"psnr_gain": gain, "behind_best_tau": behind, "met": bool(gain >= 1 and behind <= 0.02)}


# From files to one summary

def stem(arm, seed):
    """Of an arm's files and folders."""
    return f"{arm}-{seed}".replace(",", "").replace(" ", "-")


def read(results):
    """-> {seed: a generator's file}, {arm: {seed: its file}}. UserError for none, and for files of several settings."""
    files = {path: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    generators = {about["seed"]: about for path, about in files.items() if path.stem.startswith("generator-")}
    if not generators:
        raise runs.UserError(f"{results}: no generator-SEED.json; python -m experiments.preferences makes them")
    first = next(iter(generators.values()))["settings"]
    for path, about in files.items():
        if changed := runs.changes(first, about["settings"]).values():
            raise runs.UserError(f"{path}: made with other settings than {results / 'generator-*.json'} "
                                 f"({'; '.join(changed)[:200]}): choose another --results")
    arms = {}
    for path, about in files.items():
        if "arm" in about:
            if "grid" not in about:
                raise runs.UserError(f"{path}: by an earlier version, without the grid of pixels: remove the files of "
                                     "that seed, and the same command judges its arms again")
            arms.setdefault(about["arm"], {})[about["seed"]] = about
    # in the order of NAMES
    return generators, {arm: arms[arm] for arm in NAMES if arm in arms}


def summarise(generators, arms):
    """The JSON of the report."""
    first = next(iter(generators.values()))
    columns, k = list(first["rows"]["base"]["per_photo"]), first["k"]
    # {row: {seed: (photos, columns)}}
    values, curves = {}, {}
    for seed, about in [*generators.items(), *(item for of_seed in arms.values() for item in of_seed.items())]:
        for row, parts in about["rows"].items():
            values.setdefault(row, {})[seed] = np.array([parts["per_photo"][name] for name in columns]).T
            curves.setdefault(row, {})[seed] = parts["curve"]
    controls = [row for row in first["rows"] if row != "base"]
    grids = {arm: compare.with_grid("base", arm) for arm in arms}
    pairs = [*((row, "base") for row in (*arms, *controls, *grids.values())), *PAIRS,
             *(("HPO", row) for row in (*controls, *grids.values())),
             *((arm, grid) for arm, grid in grids.items() if arm != "HPO")]
    differences = {}
    for a, b in pairs:
        seeds = [seed for seed in values.get(a, {}) if seed in values.get(b, {})]
        if seeds:
            both = [np.stack([values[row][seed] for seed in seeds]) for row in (a, b)]
            differences[f"{a} - {b}"] = {name: tables.difference(both[0][..., n], both[1][..., n])
                                         for n, name in enumerate(columns)}
    def share_of_grid(arm):
        """Of an arm's gain; None where nothing is gained."""
        gain, grid = (differences[f"{row} - base"]["reward"] for row in (arm, grids[arm]))
        return grid["mean"] / gain["mean"] if gain["verdict"] == "higher" else None
    sigma, sigma_pool = ({seed: about["pool"][name] for seed, about in generators.items()}
                         for name in ("sigma", "sigma_pool"))
    gain = differences.get("HPO - base")
    return {
        "command": sys.argv, **runs.describe_machine(), "settings": first["settings"], "scope": first["scope"],
        "sigma": sigma, "sigma_pool": sigma_pool,
        "halves": {seed: about["pool"]["halves"] for seed, about in generators.items()},
        "criterion": {seed: about["criterion"] for seed, about in generators.items()},
        "reward_by_tau": {seed: about["reward_by_tau"] for seed, about in generators.items()},
        "gain_over_sigma": gain and gain["reward"]["mean"] / float(np.mean(
            [v[:, columns.index("seed std")].mean() for v in values["base"].values()])),
        **{name: first[name] for name in ("inside", "outside", "images", "photos", "k", "lower_is_better")},
        "metrics": columns, "seeds": {row: list(of_seed) for row, of_seed in values.items()},
        "mean": {row: np.mean(list(of_seed.values()), (0, 1)).tolist() for row, of_seed in values.items()},
        "seed_means": {row: [v.mean(0).tolist() for v in of_seed.values()] for row, of_seed in values.items()},
        "curves": {row: {kind: [curve[kind] for curve in of_seed.values()] for kind in ("best", "mean", "worst")}
                   for row, of_seed in curves.items()},
        "differences": differences, "signs": signs(differences, f"worst@{k[-1]}"),
        "grid_share": {arm: share_of_grid(arm) for arm in arms},
        "structured_noise": {arm: float(np.mean([list(about["structured_noise"].values())
                                                 for about in of_seed.values()])) for arm, of_seed in arms.items()},
        "grid": {arm: {seed: about["grid"] for seed, about in of_seed.items()} for arm, of_seed in arms.items()},
        "watched": {arm: {seed: about["watched"] for seed, about in of_seed.items()} for arm, of_seed in arms.items()},
        "training": {arm: {seed: [part[-1] for part in about["training"]] for seed, about in of_seed.items()}
                     for arm, of_seed in arms.items()}}


def signs(differences, worst):
    """One sentence for each of SIGNS whose rows are there, then whether a control reaches HPO's gain."""
    sentences = []
    for claim, a, b, column, sign in SIGNS:
        column = worst if column is WORST else column
        values = differences.get(f"{a} - {b}", {}).get(column)
        if values:
            cell = tables.difference_cell(values, 3, "{}")
            expected = {1: "higher", -1: "lower"}[sign]
            verdict = "no evidence" if values["verdict"] == "no evidence" else \
                "holds" if values["verdict"] == expected else "the opposite holds"
            sentences.append(f"{claim}: {verdict} ({a} - {b}, {column}: {cell}).")
    reached = [name.removeprefix("HPO - ") for name, values in differences.items()
               if name.startswith("HPO - base") and name != "HPO - base" and values["reward"]["verdict"] != "higher"]
    if "HPO - base" in differences:
        sentences.append("The gain is above that of every control: " + (
            f"does not hold, not above {'; '.join(reached)}." if reached else "holds."))
    return sentences


# Text

def text(summary):
    """sigma_g and the criterion first, then scores and differences, signs, ends of the trainings."""
    rows = []
    for seed, quartiles in summary["sigma"].items():
        about, halves = summary["criterion"][seed], summary["halves"][seed].get(summary["scope"], {})
        rows.append([f"generator {seed}", *(f"{v:.3f}" for v in (*quartiles, summary["sigma_pool"][seed][1])),
                     *(f"{halves[half]:.2f}" if half in halves else "" for half in ("fr", "nr")),
                     f"{about['psnr_gain']:+.2f}", f"{about['behind_best_tau']:.3f}", "yes" if about["met"] else "no"])
    scale = {"pool": "the pool's range", "group": "each image's own range"}[summary["scope"]]
    parts = [f"sigma_g, the spread of the reward over the seeds of an image, by {scale}",
             runs.markdown(["", "quartile", "median", "quartile", "median by the pool's range (paper: 0.056)",
                            "full-reference half with the sum", "no-reference half", "mean of samples over base, dB",
                            "tau 1 behind the best tau", "criterion met"], rows)]
    if summary["gain_over_sigma"] is not None:
        parts.append(f"HPO's gain of the mean reward is {summary['gain_over_sigma']:.2f} times the spread of the "
                     "untuned seeds on the test photographs (the paper's: 1.3).")
    parts.append("seeds: " + "; ".join(f"{row} {len(seeds)}" for row, seeds in summary["seeds"].items()))
    parts += [jobs.metric_tables(summary), "\n".join(f"- {sentence}" for sentence in summary["signs"])]
    rows = []
    for arm, of_seed in summary["training"].items():
        ends = [part[-1] for part in of_seed.values()]
        changes = [100 * np.mean([end[key] / end["win_ref"] for end in ends]) for key in ("win_change", "lose_change")]
        share = summary["grid_share"][arm]
        rows.append([arm, f"{np.mean([end['accuracy'] for end in ends]):.2f}", *(f"{v:+.2f} %" for v in changes),
                     f"{summary['structured_noise'][arm]:.1%}",
                     "" if share is None else f"{share:.0%}"])
    if rows:
        parts.append(runs.markdown(["at the last step", "implicit accuracy", "error at winners, change", "at losers",
                                    "change in isolated peaks", "gain that a fixed grid of pixels has"], rows))
        rows = [[f"{arm}, {seed}", f"{grid['strength']:.3f}", f"{grid['period 8']:.3f}", f"{grid['spread']:.3f}",
                 tables.difference_cell(grid["preferred"], 4),
                 ", ".join(f"{m} {values['mean']:+.2f}" for m, values in grid["correlation"].items())]
                for arm, of_seed in summary["grid"].items() for seed, grid in of_seed.items()]
        parts.append(runs.markdown(["grid of pixels, grey levels", "in the tuned outputs", "beyond it in 8x8 blocks",
                                    "in the candidates, spread", "candidates, winners minus losers",
                                    "candidates, rank correlation with the metrics, better up"], rows))
    return "\n\n".join(parts)


# Pictures

def picture(results, name):
    """RESULTS-<name>.png"""
    return results.with_name(f"{results.name}-{name}.png")


def draw_curves(summary, path):
    """compare.draw_curves, with a thin line for every generator; of arms that all generators have."""
    shown, seeds = {}, summary["seeds"]
    for row in ("base", *(arm for arm in SHOWN if seeds.get(arm) == seeds["base"])):
        shown[NAMES[row]] = {"curve": summary["curves"][row],
                             "minus_first": summary["differences"].get(f"{row} - base")}
    compare.draw_curves({"rows": shown, "k": summary["k"], "reward": "hybrid"}, path)


def draw_steps(summary, path):
    """Held-out reward against steps minus that of step 0, by arm; fr and nr by their own reward."""
    # in rounds every round has photographs and a scale of its own
    arms = [arm for arm, of_seed in summary["watched"].items() if all(len(parts) == 1 for parts in of_seed.values())]
    if not arms:
        return
    rows = -(-len(arms) // 2)
    drawing, axes = style.figure(rows, 2, height=1.0 + 1.9 * rows, sharex=True, sharey=True, squeeze=False)
    for arm, axis in zip(arms, axes.flat):
        watched = [parts[0] for parts in summary["watched"][arm].values()]
        rewards = np.array([[reward for _, reward in of_seed] for of_seed in watched])
        axis.axhline(0, color="grey", linewidth=0.8)
        style.seeds(axis, [step for step, _ in watched[0]], rewards - rewards[:, :1])
        axis.set_title(NAMES[arm])
    for axis in axes.flat[max(0, len(arms) - 2):len(arms)]:
        axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(arms):]:
        axis.remove()
    drawing.supxlabel("training steps", fontsize=style.FONT)
    drawing.supylabel("gain of the run's own reward on held-out images", fontsize=style.FONT)
    if max(map(len, summary["watched"].values())) > 1:
        drawing.suptitle("Thick: mean of the generators, thin: each of them", fontsize=style.FONT)
    style.save(drawing, path)


def draw_grid(folders, rewards, path):
    """One photograph: the worst, middle and best seed of the untuned generator; below, the same seeds tuned; and what
    changed, TIMES as large, around grey, for every arm.

    folders: {arm: OUT of dpo.compare}; the first arm's outputs are shown; rewards: {"base" and the first arm: {image:
    [reward of every seed]}}
    """
    first, *_ = arms = list(folders)
    name = next(name for start in PICTURE for name in rewards["base"] if name.startswith(start))
    before, after = rewards["base"][name], rewards[first][name]
    order = np.argsort(before)
    seeds = {"worst": order[0], "middle": order[len(order) // 2], "best": order[-1]}
    lq, gt = (load_image(folders[first] / "images" / part / f"{name}.png") for part in ("lq", "gt"))
    images = {row: [load_image(folders.get(row, folders[first]) / row / name / f"{seed}.png")
                    for seed in seeds.values()] for row in ("base", *arms)}
    side = min(SIDE, *gt.shape[1:])
    top, left = ((n - side) // 2 for n in gt.shape[1:])

    def cell(image, caption):
        return pictures.enlarged_crop(image[None].float() / 255, top, left, side, 2), caption
    def change(a, b):
        return (128 + TIMES * (b.float() - a.float())).clamp(0, 255).round().byte()
    lq = lq.repeat_interleave(4, 1).repeat_interleave(4, 2)
    lines = [[cell(image, f"{row}, {rank} {r[seed]:.2f}") for image, (rank, seed) in zip(images[key], seeds.items())]
             for row, key, r in (("before", "base", before), (first, first, after))]
    lines += [[cell(change(a, b), f"{arm}, change x {TIMES}") for a, b in zip(images["base"], images[arm])]
              for arm in arms]
    grey = cell(torch.full_like(gt, 128), "no change")
    ends = [cell(lq, "low resolution"), cell(gt, "ground truth"), *[grey] * len(arms)]
    pictures.save_grid(path, [[*line, end] for line, end in zip(lines, ends)])


def report(results, work):
    """RESULTS.json, RESULTS-curves.png, RESULTS-steps.png, and where the outputs are in `work` RESULTS-grid.png."""
    generators, arms = read(results)
    summary = summarise(generators, arms)
    runs.save_json(results.with_suffix(".json"), summary)
    print(text(summary))
    if style.is_there():
        draw_curves(summary, picture(results, "curves"))
    if style.is_there() and summary["watched"]:
        draw_steps(summary, picture(results, "steps"))
    for seed, about in arms.get("HPO", {}).items():
        folders = {arm: work / "eval" / stem(arm, seed) for arm in PICTURED}
        folders = {arm: folder for arm, folder in folders.items() if (folder / arm).is_dir()}
        if "HPO" in folders:
            rewards = {"base": generators[seed]["rows"]["base"]["rewards"], "HPO": about["rows"]["HPO"]["rewards"]}
            draw_grid(folders, rewards, picture(results, "grid"))
            break
