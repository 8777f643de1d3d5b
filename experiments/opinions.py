"""Rewards trained on people's opinions: do they agree with people on images they have not seen, and can they be fooled?

    python -m experiments.opinions train 0 1 2        plain, hardened, small models of these splits of CLIVE
    python -m experiments.opinions ridge              the same splits, ridge regression on the backbone as it is
    python -m experiments.opinions others             the same splits, models that learned nothing of CLIVE
    python -m experiments.opinions attack 0 1 2       how far their scores can be raised
    python -m experiments.opinions study              a judge that learns from the choices of a user study, and controls
    python -m experiments.opinions report             tables and plot of all that is there

Ten random 80/20 splits of CLIVE (report.opinions.splits), fixed before the first training. Per split a plain model and
one hardened from it are trained on the 80 %, and judged on the 20 %: whole images, and the mean of four random crops of
96 to 256 pixels. Attacks begin at ten photographs of Kodak and at their bicubic images (rewards/attack.py); starting
points, steps and step sizes are other than the training's. One JSON per model, and one per attack, in --results; what
is there is not computed again.
"""
import sys
from pathlib import Path

import runs

DATA = Path("datasets/public")
# of a training, by model. CHOICE, made before any training of that model had ended, but for `small`, of which one try
# saw split 1, as the development of the others did
SETTINGS = {"plain": dict(epochs=3, lr=2e-4), "hard": dict(epochs=4, lr=2e-4),
            "mild": dict(epochs=6, lr=1e-4, harden_weight=0.3), "norm": dict(epochs=2, lr=2e-4, gradient_norm=0.5),
            "small": dict(epochs=12, lr=2e-3, crop=128),
            "small-hard": dict(epochs=8, lr=1e-3, crop=128, harden_weight=0.5),
            "small-random": dict(epochs=24, lr=2e-3, crop=128)}
# the models that others begin with
BASES = {"hard": "plain", "mild": "plain", "norm": "plain", "small-hard": "small"}
# those that learned nothing of CLIVE: {name: as --reward takes it}
OTHERS = {"sharpness": "rewards.sharpness:build", "ranker": "ranker", "CNNIQA-LIVE": "rewards.cnniqa:build",
          "NIQE": "niqe", "BRISQUE": "brisque", "PIQE": "piqe"}


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("stage", choices=["train", "ridge", "others", "attack", "study", "report"], help="what to do")
    p.add_argument("splits", type=runs.COUNT, nargs="*", default=list(range(10)),
                   help="train, attack: numbers of the splits; study: the split whose model is used")
    p.add_argument("--models", nargs="+", choices=list(SETTINGS), default=["plain", "hard", "small"],
                   help="train, attack: which; hard, mild with a smaller weight of the attack, and norm with the "
                        "regularisation of gradients alone begin with plain, small-hard with small, the network of "
                        "rewards/ranker.py: they are made if they are missing; small-random is that network from "
                        "random weights")
    p.add_argument("--clive", type=Path, default=DATA / "human" / "clive", help="folder of labels.csv and images/")
    p.add_argument("--study", type=Path, default=DATA / "human" / "sr_study", help="folder of choice_of_4.csv")
    p.add_argument("--weights", type=Path, default=DATA / "weights" / "iqa", help="of NIQE and BRISQUE, for others")
    p.add_argument("--kodak", type=Path, default=DATA / "images" / "hr_kodak24", help="photographs that are attacked")
    p.add_argument("--backbone", type=Path, default=Path("runs/mobilenet_v2.pth"), help="of prepare.mobilenet_v2")
    p.add_argument("--work", type=Path, default=Path("runs/opinions"), help="where the reward files go")
    p.add_argument("--results", type=Path, default=Path("runs/results/human"),
                   help="where the JSON files go; what is there is not computed again")
    p.add_argument("--threads", type=runs.SIZE, default=1, help="CPU threads")
    return p.parse_args(argv)


# before the imports that take seconds, so that --help answers at once
ARGS = parse_args() if __name__ == "__main__" else None

import json
import time

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from tqdm import tqdm

import iqa
from experiments.human import FILES, METHODS, read_study
from images import load_image
from report import opinions, style, tables
from rewards import attack, opinion, train_opinion
from rewards.ranker import load_ranker

CROP, SEED = 224, 0
IN_WORDS = {"ridge": "ridge regression", "hard": "hardened", "mild": "hardened mildly", "norm": "gradient norm",
            "small": "small network", "small-hard": "small, hardened", "small-random": "small, random start"}


def train(args, mos, features, split, name):
    """One model of one split: the reward file, which has the settings in it."""
    file = args.work / f"{name}-{split}.pth"
    if file.exists():
        return file
    began, machine = time.process_time(), runs.describe_machine(on_cpu=True)
    rows, _ = opinions.splits(mos["names"])[split]
    training = train_opinion.part(mos, rows)
    teacher, settings = None, dict(crop=CROP, seed=SEED) | SETTINGS[name]
    if name == "small":
        net = load_ranker()
    elif name == "small-random":
        torch.manual_seed(SEED)
        net = opinion.ARCHITECTURES["ranker"]().eval().requires_grad_(False)
    elif name in BASES:
        base = train(args, mos, features, split, BASES[name])
        net, teacher = opinion.load(base)[0], opinion.load(base)[0] if name != "norm" else None
    else:
        torch.manual_seed(SEED)
        net = imagenet(args)
        net.start_linear(features(net)[rows], training["mos"])
    losses = train_opinion.fit(net, training, teacher=teacher, **settings)
    record = {"arch": "ranker" if name.startswith("small") else "mobilenet_v2", "command": sys.argv, **machine,
              "model": name, "split": split, "mos": {"file": "clive/labels.csv", "images": len(rows)}, **settings,
              "losses": losses, "seconds_of_training": round(time.process_time() - began)}
    opinion.save(file, net, record)
    return file


def judge(args, mos, features, split, name):
    """The JSON of one model of one split."""
    out = args.results / f"clive-{name}-{split}.json"
    if out.exists():
        return
    file = train(args, mos, features, split, name)
    net, record = opinion.load(file)
    record |= {"file_sha256": runs.digest(file), "judged_at": runs.describe_machine(on_cpu=True)["commit"]}
    test = train_opinion.part(mos, opinions.splits(mos["names"])[split][1])
    record["test"] = train_opinion.test_scores(net, test["images"], test["mos"].numpy())
    runs.save_json(out, record)
    print(out, record["test"], flush=True)


def attacked(args, photos, split, name):
    """The JSON of an attack on one model of one split."""
    out, file = args.results / f"attack-{name}-{split}.json", args.work / f"{name}-{split}.pth"
    if out.exists():
        return
    if not file.exists():
        raise runs.UserError(f"{file}: no such model; make it with: python -m experiments.opinions train {split} "
                             f"--models {name}")
    machine, reward = runs.describe_machine(on_cpu=True), iqa.create_reward([str(file)], need_gradient=True)
    found = attack.measure({name: reward}, photos, [1, 2, 4])[name]
    runs.save_json(out, {"command": sys.argv, **machine, "model": name, "split": split,
                         "file_sha256": runs.digest(file), "ways": attack.WAYS, **found})


def imagenet(args):
    net = opinion.ARCHITECTURES["mobilenet_v2"]()
    net.backbone.load_imagenet(args.backbone)
    return net.eval().requires_grad_(False)


@torch.no_grad()
def ridge(args, mos, first_crops):
    """The baseline: every split's ridge regression on features of the backbone as it is. One JSON."""
    machine, net = runs.describe_machine(on_cpu=True), imagenet(args)
    sides = ("whole", *map(str, train_opinion.TEST_CROPS))
    means = {side: [] for side in sides}
    for k, image in enumerate(tqdm(mos["images"], desc="features", mininterval=5)):
        # not standardised yet
        means["whole"].append(net.described(image[None].float() / 255).mean((0, 1)))
        for size in train_opinion.TEST_CROPS:
            rng = np.random.default_rng([SEED, 5, size, k])
            x = train_opinion.random_crops([image] * train_opinion.REPEATS, size, rng)
            means[str(size)].append(net.features(x).mean(0))
    means, result = {side: torch.stack(rows) for side, rows in means.items()}, []
    for split, (rows, test) in enumerate(opinions.splits(mos["names"])):
        net.start_linear(first_crops[rows], mos["mos"][rows])
        scores = {side: net.linear((features[test] - net.centre) / net.spread)[:, 0].numpy()
                  for side, features in means.items()}
        result.append({"split": split, **{side: srcc(score, mos["mos"][test]) for side, score in scores.items()}})
    runs.save_json(args.results / "clive-ridge.json", {"command": sys.argv, **machine, "images": len(mos["images"]),
                                                       "srcc": result})


def others(args, mos):
    """The SRCC of OTHERS on the test part of every split. One JSON per model."""
    for name, word in OTHERS.items():
        out = args.results / f"clive-{name}.json"
        if out.exists():
            continue
        machine, weights = runs.describe_machine(on_cpu=True), word in FILES and args.weights / FILES[word]
        net = iqa.create_reward([word], weights_file=weights)
        scores = {"whole": train_opinion.score_whole(net, mos["images"])}
        for size in train_opinion.TEST_CROPS:
            scores[str(size)] = train_opinion.score_crops(net, mos["images"], size)
        # an image that a model cannot score, as NIQE a flat crop, is left out
        known, result = {side: np.isfinite(values) for side, values in scores.items()}, []
        for split, (_, test) in enumerate(opinions.splits(mos["names"])):
            rows = {side: test[known[side][test]] for side in scores}
            result.append({"split": split, **{side: srcc(values[rows[side]], mos["mos"][rows[side]])
                                              for side, values in scores.items()}})
        runs.save_json(out, {"command": sys.argv, **machine, "model": word, "images": len(mos["images"]),
                             "not_scored": {side: int((~rows).sum()) for side, rows in known.items()}, "srcc": result})
        print(out, flush=True)


def srcc(scores, mos):
    return round(float(spearmanr(scores, mos).statistic), 4)


# The user study

def fit_head(table, choices, penalty):
    """Weights (1 + F,) under which the choices are most likely: utility = w0 score + w f, with a penalty on w.

    table: {METHOD/SCENE: (score, standardised features (F,))}.
    """
    names = opinions.names_of(choices)
    place = {name: k for k, name in enumerate(names)}
    x = torch.stack([torch.cat([table[name][0].view(1), table[name][1]]) for name in names]).double()
    places, selected = map(torch.from_numpy, opinions.utilities(choices, lambda scene, m: place[f"{m}/{scene}"]))
    absent, candidates = places.isnan(), places.nan_to_num(0).long()
    w = torch.zeros(x.shape[1], dtype=torch.double, requires_grad=True)
    opt = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        opt.zero_grad()
        utility = (x @ w)[candidates].masked_fill(absent, -torch.inf)
        value = F.cross_entropy(utility, selected) + penalty * w[1:].square().sum()
        value.backward()
        return value
    opt.step(loss)
    return w.detach()


def utility_of(w, table):
    """The utility of an image under these weights, as a function of (scene, method)."""
    def value(scene, method):
        score, features = table[f"{method}/{scene}"]
        return (w[0] * score + w[1:] @ features.double()).item()
    return value


def judge_file(args, base, w, shift):
    """WORK/judge.pth: the model of the reward file `base` with the head w of fit_head -> its path.

    Its unit is that of the opinions: TEMPERATURE points are one of utility. shift: utility that has 50 points. It is
    for judging; what it judges must not have been trained with the choices.
    """
    net, record = opinion.load(base)
    points = train_opinion.TEMPERATURE
    share = w[0].item() / points * net.stretch.item()
    with torch.no_grad():
        for layer in (net.linear, net.mlp[2]):
            layer.weight *= share
            layer.bias *= share
        net.linear.weight += w[1:].float()
        # the constant of the score is no part of the layers
        net.linear.bias += w[0].item() / points * net.shift.item() - shift
        net.stretch.fill_(points)
        net.shift.fill_(50)
    opinion.save(args.work / "judge.pth", net, {
        "arch": record["arch"], "command": sys.argv, **runs.describe_machine(on_cpu=True), "init": record,
        "choices": "sr_study, all; the head alone", "role": "judges; no network may be trained with it"})
    return args.work / "judge.pth"


def all_layers(base, choices, images, folds):
    """{METHOD/SCENE: score} by models of which every layer learned the choices of the other folds, not the head alone.

    images: {METHOD/SCENE: (3, H, W) uint8}.
    """
    found = {}
    for fold in folds:
        net, seen = opinion.load(base)[0], train_opinion.shown(choices[~choices.scene.isin(fold)], images)
        train_opinion.fit(net, choices=seen, epochs=1, lr=1e-4, crop=CROP, seed=SEED)
        names = [name for name in images if name.split("/", 1)[1] in fold]
        found |= dict(zip(names, train_opinion.score_whole(net, [images[name] for name in names])))
    return found


def study(args):
    """A judge: the head of a model that saw CLIVE's training images, fitted to the choices, on scenes it did not see.

    Beside it: all layers fitted to them, the model as it is, the hardened and the small ones of all splits, the
    method's name alone, sharpness alone. With every method left out in turn as well: then judged on the pairs that
    contain it. The judge of all scenes is WORK/judge.pth.
    """
    machine = runs.describe_machine(on_cpu=True)
    split = args.splits[0]
    files = {"plain": args.work / f"plain-{split}.pth"}
    kinds = ("hard-*.pth", "mild-*.pth", "norm-*.pth", "small-*.pth")
    files |= {path.stem: path for pattern in kinds for path in sorted(args.work.glob(pattern))}
    files |= {name: runs.REPO / "rewards" / f"{name}.pth" for name in ("ranker2", "ranker3")}
    models = {name: opinion.load(file)[0] for name, file in files.items() if file.exists()}
    if "plain" not in models:
        raise runs.UserError(f"{files['plain']}: no such model; make it with: "
                             f"python -m experiments.opinions train {split}")
    votes, _ = read_study(args.study)
    best, pairs = votes["choices"], votes["pairs"]
    net, table, images, values = models["plain"], {}, {}, {name: {} for name in (*models, "sharpness")}
    sharp = iqa.create_reward(["rewards.sharpness:build"])
    with torch.no_grad():
        for name, file in tqdm(opinions.images_of(best, args.study).items(), desc="study", mininterval=5):
            images[name] = load_image(file)
            x = images[name][None].float() / 255
            z = net.described(x)
            for model in models:
                values[model][name] = (net.head(z) if model == "plain" else models[model](x)).item()
            values["sharpness"][name] = sharp(x).item()
            table[name] = torch.tensor(values["plain"][name] / train_opinion.TEMPERATURE), z.mean((0, 1))
    scenes = np.array(sorted(best.scene.unique()))
    folds = np.array_split(np.random.default_rng(SEED).permutation(scenes), 5)

    def learned(left_out=None):
        """{METHOD/SCENE: utility} of all images, each by a head that did not see its scene (nor the method)."""
        found = {}
        for fold in folds:
            seen = best[~best.scene.isin(fold)]
            seen = opinions.without(seen, left_out) if left_out else seen
            value = utility_of(fit_head(table, seen, penalty_by_scenes(table, seen)), table)
            found |= {name: value(*reversed(name.split("/", 1))) for name in table if name.split("/", 1)[1] in fold}
        return found
    values["judge"] = learned()
    values["judge, all layers"] = {name: value / train_opinion.TEMPERATURE
                                   for name, value in all_layers(files["plain"], best, images, folds).items()}
    w = fit_head(table, best, penalty_by_scenes(table, best))
    value = utility_of(w, table)
    mean = np.mean([value(*reversed(name.split("/", 1))) for name in table])
    file = judge_file(args, files["plain"], w, mean)

    def value_of(name):
        return lambda scene, method: values[name][f"{method}/{scene}"]
    rows = {name: {"best": opinions.judge(best, value_of(name)), "pairs": opinions.judge(pairs, value_of(name))}
            for name in values}
    for name, row in rows.items():
        row["like_sharpness"] = likeness(values[name], values["sharpness"], scenes)
    rows["name of the method"] = {"best": opinions.judge_names(best)}
    left_out = {}
    for method in METHODS:
        values["left out"] = learned(method)
        of_row = {"judge": "left out"} | {name: name for name in (*models, "sharpness")}
        left_out[method] = {name: opinions.judge(best, value_of(row))["containing"][method]
                            for name, row in of_row.items()}
        left_out[method]["name of the method"] = rows["name of the method"]["best"]["containing"][method]
    runs.save_json(args.results / "study-judge.json", {
        "command": sys.argv, **machine, "model": f"{files['plain'].name}, trained on 80 % of CLIVE",
        "folds": len(folds), "seed": SEED, "scenes": len(scenes), "choices": len(best), "pair_choices": len(pairs),
        "file": {"name": file.name, "sha256": runs.digest(file)},
        "ceilings": {"best": opinions.ceilings(best), "pairs": opinions.ceilings(pairs)},
        "rows": rows, "left_out": left_out})
    for name, row in rows.items():
        print(f"{name:<20} pairs {row['best']['pairs'][0]:.3f}  within {row['best']['within'][0]:+.3f}")


def likeness(values, others, scenes):
    """Spearman's correlation of two {METHOD/SCENE: value} over the methods, the mean of the scenes."""
    def of_scene(table, scene):
        return [table[f"{method}/{scene}"] for method in METHODS]
    return float(np.mean([spearmanr(of_scene(values, scene), of_scene(others, scene)).statistic for scene in scenes]))


def penalty_by_scenes(table, choices, grid=(1e-4, 1e-3, 1e-2, 1e-1, 1.0)):
    """The penalty with the most likely choices on scenes left out of the choices at hand."""
    folds = np.array_split(np.random.default_rng(SEED).permutation(sorted(choices.scene.unique())), 4)

    def likelihood(penalty):
        total = 0.0
        for fold in folds:
            inside = choices.scene.isin(fold)
            value = utility_of(fit_head(table, choices[~inside], penalty), table)
            utility, selected = opinions.utilities(choices[inside], value)
            total += opinions.choice_likelihood(utility, selected)[0].sum()
        return total
    return max(grid, key=likelihood)


# Report

def read_models(args):
    """-> {"ridge", "ranker", "plain", ...: {split: {"whole", "96", ...: SRCC}}}, {model: {split: its attack}}."""
    table, attacks = {}, {}
    for name in ("ridge", *OTHERS):
        if (args.results / f"clive-{name}.json").exists():
            rows = json.loads((args.results / f"clive-{name}.json").read_text())["srcc"]
            table[name] = {row.pop("split"): row for row in rows}
    for name in SETTINGS:
        for split in range(10):
            file = args.results / f"clive-{name}-{split}.json"
            if file.exists():
                test = json.loads(file.read_text())["test"]
                table.setdefault(name, {})[split] = {"whole": test["whole"]["srcc"], **test["crops"]}
            file = args.results / f"attack-{name}-{split}.json"
            if file.exists():
                attacks.setdefault(name, {})[split] = json.loads(file.read_text())
    return table, attacks


def study_table(record):
    """Markdown of study-judge.json: on scenes that the judge did not see, and with a method left out as well."""
    def cell(values, sign=""):
        mean, low, high = (f"{value:{sign}.2f}" for value in values)
        return f"{mean} [{low}, {high}]"
    head, rows = ["the study", "pairs", "p", "within scenes", "p", "like sharpness", "log likelihood"], []
    for name, row in record["rows"].items():
        best = row["best"]
        without = [cell(values[name]) if name in values else "" for values in record["left_out"].values()]
        like = f"{row['like_sharpness']:+.2f}" if "like_sharpness" in row else ""
        rows.append([name, cell(best["pairs"]), f"{best['p']['pairs']:.3f}", cell(best["within"], "+"),
                     f"{best['p']['within']:.3f}", like, cell(best["log_likelihood"]), *without])
    return runs.markdown([*head, *(f"{method} left out" for method in record["left_out"])], rows)


def report(args):
    """Markdown tables, printed, and a plot beside the JSON files."""
    table, attacks = read_models(args)
    if not table:
        raise runs.UserError(f"{args.results}: no clive-*.json; make them with: python -m experiments.opinions train")
    columns = ("whole", *map(str, reversed(train_opinion.TEST_CROPS)))
    rows = []
    for name, splits in table.items():
        values = {column: [row[column] for row in splits.values()] for column in columns}
        rows.append([name, len(splits), *(f"{np.median(v):.3f} [{min(v):.3f}, {max(v):.3f}]" for v in values.values())])
    print(runs.markdown(["SRCC, median [range] over splits", "splits", *columns], rows), "\n")
    rows = []
    for name, base in {"plain": "ridge", **BASES, "small-random": "small"}.items():
        both = sorted(set(table.get(name, {})) & set(table.get(base, {})))
        gains = {column: [table[name][k][column] - table[base][k][column] for k in both] for column in columns}
        if both:
            rows.append([f"{name} - {base}", len(both), *(
                f"{np.mean(v):+.3f}, above 0 in {sum(x > 0 for x in v)}" for v in gains.values())])
    print(runs.markdown(["paired difference of SRCC, mean", "splits", *columns], rows), "\n")
    starts = [f"{start} {level}" for start in ("photo", "bicubic") for level in (1, 2, 4)]
    rows = []
    for name, splits in attacks.items():
        gains = [attack.in_units({name: entry})[name, name] for entry in splits.values()]
        scale = np.mean([entry["D"] for entry in splits.values()])
        rows.append([name, len(splits), f"{scale:.1f}",
                     *(f"{np.mean([g[start] for g in gains]):+.2f}" for start in starts)])
    print(runs.markdown(["gain in units of D", "models", "D", *starts], rows))
    if (args.results / "study-judge.json").exists():
        print("\n" + study_table(json.loads((args.results / "study-judge.json").read_text())))
    plot(table, attacks, args.results / "opinions.png")


def plot(table, attacks, path):
    """Left: SRCC by the side of the crops, of models with several splits. Right: gains of attacks."""
    drawing, axes = style.figure(columns=2, height=3.5)
    sides = [*map(str, train_opinion.TEST_CROPS), "whole"]
    colours = dict(zip(["ridge", *SETTINGS], style.COLOURS))
    # the plot has those that learned
    table = {name: splits for name, splits in table.items() if name not in OTHERS}
    for name, splits in table.items():
        if len(splits) > 1:
            style.seeds(axes[0], range(5), [[row[side] for side in sides] for row in splits.values()],
                        colour=colours[name])
    axes[0].set(xticks=range(5), xticklabels=sides, ylabel="SRCC on CLIVE", xlabel="side of the crops, pixels",
                title="thin: a split each")
    levels = (1, 2, 4)
    for name in table:
        # (models, levels, photographs), then the mean over models
        gains = [[np.array(entry["gains"]["photo"][str(level)][name]) / entry["D"] for level in levels]
                 for entry in attacks.get(name, {}).values()]
        label = f"{IN_WORDS.get(name, name)}, splits: {len(table[name])}"
        if gains:
            means = np.mean(gains, 0)
            ends = np.array([tables.interval(of_level) for of_level in means]).T
            style.band(axes[1], (0, *levels), [0, *means.mean(1)], [[0, *end] for end in ends],
                       f"{label}; {len(gains)} attacked", colours[name])
        else:
            axes[1].plot([], [], color=colours[name], label=label)
    axes[1].set(xlabel="limit of the attack, grey levels", ylabel="gain, units of D",
                title="bands: 95 %, ten photographs")
    style.legend(drawing, axes[1], columns=2)
    style.save(drawing, path)


def main(args):
    runs.start_world("cpu", args.threads)
    if args.stage in ("study", "report"):
        return (study if args.stage == "study" else report)(args)
    if args.stage == "attack":
        photos = attack.read_photos(args.kodak, 10, 256)
        for split in args.splits:
            for name in args.models:
                attacked(args, photos, split, name)
        return None
    mos = train_opinion.read_mos(args.clive / "labels.csv", args.clive / "images", CROP)

    def features(net):
        """Of the backbone as it is, one crop per image: the same for all splits."""
        file = args.work / "features.pth"
        if not file.exists():
            found = train_opinion.crop_features(net, mos["images"], CROP, SEED)
            runs.write_atomic(file, lambda temporary: torch.save(found, temporary))
        return torch.load(file, weights_only=True)
    if args.stage == "others":
        return others(args, mos)
    if args.stage == "ridge":
        return ridge(args, mos, features(imagenet(args)))
    for split in args.splits:
        for name in args.models:
            judge(args, mos, features, split, name)


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
