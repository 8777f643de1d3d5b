"""Train a reward on people's opinions: mean opinion scores, choices between images (pairs, best of K), or both.

    python -m rewards.train_opinion --mos labels.csv --mos-images PHOTOS --out runs/rewards/clive.pth
    python -m rewards.train_opinion --choices choices.csv --choice-images STUDY --out runs/rewards/study.pth
    python -m rewards.train_opinion --init runs/rewards/clive.pth --harden ... --out runs/rewards/clive-hard.pth
    python -m rewards.train_opinion --arch ranker --crop 128 --epochs 12 ... --out rewards/ranker2.pth
    python -m rewards.train_opinion --arch ranker --init random --crop 128 --epochs 24 ... --out rewards/ranker3.pth

The result is a reward file for --reward. Networks: MobileNetV2 or VGG19 with ImageNet weights and regression on pooled
features of several depths, which starts at ridge regression, or the small net of rewards/ranker.py, which knows
distortions unless it begins with random weights. Every image is seen as random crops, mirrored or not: neither changes
its quality, as a resize would.
docs/opinions.md has measurements.

- Mean opinion scores: smooth L1, and over the pairs of a batch the fidelity loss of UNIQUE (Zhang et al., TIP 2021,
  Eq. 1-4) for which the standard deviations of the opinions are given, else 1 - PLCC.
- Choices: minus the log likelihood of the chosen one under Bradley and Terry's (1952) model, Luce's for more than two.
- --harden: rewards/harden.py.
"""
import sys
from pathlib import Path

import runs

RANDOM = Path("random")
# CHOICE: per architecture, AdamW's peak rate
RATES = {"mobilenet_v2": 2e-4, "vgg19": 5e-5, "ranker": 2e-3}


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--out", type=Path, required=True, metavar="FILE.pth", help="reward file to write")
    g = p.add_argument_group("model")
    g.add_argument("--arch", choices=sorted(RATES), default="mobilenet_v2",
                   help="network; a file of --init brings its own")
    g.add_argument("--backbone", type=Path, metavar="FILE",
                   help="ImageNet weights with torchvision's keys instead of its download; prepare.mobilenet_v2 and "
                        "prepare.vgg19 convert public 8-bit ones")
    g.add_argument("--init", type=Path, metavar="FILE.pth|random",
                   help="begin with this reward file instead, or with random weights")
    g = p.add_argument_group("opinions; the forms of the files are described in report/opinions.py")
    g.add_argument("--mos", type=Path, metavar="CSV", help="mean opinion scores: image, mos[, std]")
    g.add_argument("--mos-images", type=Path, metavar="DIR", help="their images")
    g.add_argument("--mos-columns", metavar="image=A,mos=B[,std=C]", help="names of the columns, where they differ")
    g.add_argument("--mos-range", type=float, nargs=2, default=[0, 100], metavar=("WORST", "BEST"),
                   help="ends of the scale, mapped to 0 and 100; give the larger number first if lower is better")
    g.add_argument("--choices", type=Path, metavar="CSV", help="choices: observer, scene, candidates, selected")
    g.add_argument("--choice-images", type=Path, metavar="DIR", help="their images, METHOD/SCENE.<suffix>")
    g.add_argument("--choice-columns", metavar="NAMES", help="names of the columns, where they differ")
    g.add_argument("--methods", nargs="+", help="candidates of every choice, if no column has them")
    g.add_argument("--name-pattern", metavar="REGEX", help="splits names of images into scene and method")
    g.add_argument("--test", type=runs.number(float, 0, 1, below=True), default=0.0,
                   help="share of the MOS images that is kept out, and scored in the end")
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=runs.COUNT, default=5,
                   help="passes over the opinions, of --mos where there are any; 0: ridge regression only")
    g.add_argument("--lr", type=runs.RATE, help=f"peak learning rate of AdamW, one cycle; default by network: {RATES}")
    g.add_argument("--batch-size", type=runs.SIZE, default=16, help="crops of MOS images per step")
    g.add_argument("--crop", type=runs.number(int, 32), default=224, help="side of the crops, pixels")
    g.add_argument("--seed", type=runs.COUNT, default=0, help="of everything drawn")
    g.add_argument("--harden", type=runs.WEIGHT, nargs="?", const=1.0, default=0.0, metavar="WEIGHT",
                   help="against being optimised: negatives and attacked images as ranking pairs; the weight is that "
                        "of the attack (1 if none is given); needs --init")
    g.add_argument("--gradient-norm", type=runs.WEIGHT, default=0.0, metavar="WEIGHT",
                   help="weight of the L1 norm of the gradient on the image (Liu et al., CVPR 2024)")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where it runs")
    g.add_argument("--threads", type=runs.COUNT, default=0, help="CPU threads (0: PyTorch's choice)")
    args = p.parse_args(argv)
    for name in ("mos", "choices"):
        folder = "mos_images" if name == "mos" else "choice_images"
        if getattr(args, name) and not getattr(args, folder):
            p.error(f"--{name} needs the folder of its images: --{folder.replace('_', '-')} DIR")
    if args.backbone and (args.init or args.arch == "ranker"):
        p.error("--backbone is where a network with ImageNet weights begins: leave out --init, and --arch ranker")
    if args.test and not args.mos:
        p.error("--test keeps out images of --mos")
    if not (args.mos or args.choices):
        p.error("nothing to learn from: give --mos, --choices or both")
    if args.harden and (args.init in (None, RANDOM) or not args.mos):
        p.error("--harden keeps the scale of a trained model: give --init FILE.pth, and its --mos")
    if args.gradient_norm and not args.mos:
        p.error("--gradient-norm is taken on the images of --mos")
    if args.mos_range[0] == args.mos_range[1]:
        p.error("--mos-range: the two ends must differ")
    return args


# before the imports that take seconds, so that --help answers at once
ARGS = parse_args() if __name__ == "__main__" else None

import math

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from images import list_images, load_image
from report import opinions
from rewards import harden, opinion
from rewards.ranker import load_ranker

# points of the score that count as one unit in the losses
UNIT = 20.0
# CHOICE: weight of the term over pairs of a batch, against 1 for smooth L1
PAIRS = 0.3
# CHOICE: with two candidates, one whose score is 10 points above the other's is chosen by 73 %
TEMPERATURE = 10.0
# choices per step
CHOICES = 4
# CHOICE: opinions that span less of their scale, in percent, may have another one
SPAN = 20
# sides and number of the random crops on which a model is scored beside whole images: AMO judges crops
TEST_CROPS, REPEATS = (96, 128, 192, 256), 4


# Losses

def mos_loss(score, mos, std=None):
    """Scalar. score, mos: (B,), 0 to 100; std: (B,) standard deviations of the opinions, NaN where unknown, or None."""
    loss = F.smooth_l1_loss(score / UNIT, mos / UNIT)
    if len(score) < 2:
        return loss
    if std is None or (~std.isnan()).sum() < 2:
        a, b = score - score.mean(), mos - mos.mean()
        return loss + PAIRS * (1 - (a * b).sum() / ((a * a).sum() * (b * b).sum() + 1e-6).sqrt())
    return loss + PAIRS * fidelity_loss(score, mos, std)


def fidelity_loss(score, mos, std):
    """UNIQUE's fidelity loss over the pairs of (B,): the distance of two chances that the first is the better one.

    People's is Phi of the difference of the opinions over its standard deviation (Thurstone, 1927). CHOICE: so is the
    model's, with the same deviation; UNIQUE's model predicts its own. Pairs with a std of NaN are left out.
    """
    pairs = torch.triu_indices(len(score), len(score), 1, device=std.device)
    i, j = pairs[:, ~std[pairs].isnan().any(0)]
    deviation = (std[i] ** 2 + std[j] ** 2 + 1e-6).sqrt()
    people, model = (torch.special.ndtr((value[i] - value[j]) / deviation) for value in (mos, score))
    # the floor: a square root of 0 has no gradient
    same, other = ((p * q + 1e-6).sqrt() for p, q in ((people, model), (1 - people, 1 - model)))
    return (1 - same - other).mean()


def choice_loss(score, selected):
    """Minus the mean log likelihood of choices. score: (N, K) of the candidates, NaN for none; selected: (N,)."""
    known = score.masked_fill(score.isnan(), -math.inf)
    return F.cross_entropy(known / TEMPERATURE, selected)


# Crops

def random_crops(images, size, rng):
    """One crop of each (3, H, W) uint8 image, mirrored or not: (B, 3, size, size) in [0, 1]."""
    crops = []
    for image in images:
        top, left = (int(rng.integers(n - size + 1)) for n in image.shape[1:])
        part = image[:, top:top + size, left:left + size]
        crops.append(part.flip(2) if rng.random() < 0.5 else part)
    return torch.stack(crops).float() / 255


def same_crops(images, size, rng):
    """The same crop of all images of a scene: (K, 3, size, size) in [0, 1]."""
    top, left = (int(rng.integers(n - size + 1)) for n in images[0].shape[1:])
    part = torch.stack([image[:, top:top + size, left:left + size] for image in images])
    return (part.flip(3) if rng.random() < 0.5 else part).float() / 255


# Training

@torch.no_grad()
def crop_features(net, images, crop, seed, device="cpu", batch=16):
    """(N, F) features of a random crop of every image, for the ridge regression that a training starts from."""
    rng, features = np.random.default_rng([seed, 1]), []
    for k in range(0, len(images), batch):
        x = random_crops(images[k:k + batch], crop, rng)
        features.append(net.features(x.to(device, memory_format=torch.channels_last)).cpu())
    return torch.cat(features)


def optimiser(net, lr, all_layers):
    """AdamW with a rate per part. A plain training leaves the first layers of a backbone as they are."""
    net.requires_grad_(True)
    if not isinstance(net, opinion.DeepRegressor):
        return torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-4)
    if not all_layers:
        net.backbone.layers[:net.backbone.FIRST].requires_grad_(False)
    groups = [{"params": [p for p in net.backbone.parameters() if p.requires_grad], "lr": lr},
              {"params": net.linear.parameters(), "lr": lr * 0.5}, {"params": net.mlp.parameters(), "lr": lr * 5}]
    return torch.optim.AdamW(groups, weight_decay=1e-4)


def fit(net, mos=None, choices=None, epochs=5, lr=2e-4, batch_size=16, crop=224, seed=0, device="cpu", teacher=None,
        harden_weight=1.0, gradient_norm=0.0):
    """Train a model of opinion.ARCHITECTURES; its weights become their exponential moving average.

    mos: {"images": N of (3, H, W) uint8, "mos": (N,) 0 to 100, "std": (N,) or None}; choices: {"images": N lists of K
    images of one size, "selected": (N,) whole numbers}. teacher: the plain model whose scale a hardened one keeps.
    harden_weight: of the attack, with a teacher.
    -> mean of every term over the last epoch. Every draw is a function of (seed, step).
    """
    net.to(device, memory_format=torch.channels_last).train()
    count = len(mos["images"]) if mos else len(choices["images"])
    per_epoch = math.ceil(count / (batch_size if mos else CHOICES))
    total = epochs * per_epoch
    if not total:
        net.eval().requires_grad_(False)
        return {}
    attacked = teacher is not None or gradient_norm > 0
    unit = harden.unit(teacher or net, mos["images"], seed, device) if attacked else None
    opt = optimiser(net, lr, all_layers=attacked)
    warm = max(1, total // 10)

    def share_of_lr(k):
        return min((k + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * k / total))
    sched = torch.optim.lr_scheduler.LambdaLR(opt, share_of_lr)
    ema, sums = {key: value.clone() for key, value in net.state_dict().items()}, {}
    bar = tqdm(range(total), desc="reward", mininterval=5)
    for step in bar:
        rng, terms = np.random.default_rng([seed, 2, step]), {}
        opt.zero_grad(set_to_none=True)
        if mos:
            order = np.random.default_rng([seed, 3, step // per_epoch]).permutation(count)
            rows = order[step % per_epoch * batch_size:][:batch_size]
            x = random_crops([mos["images"][i] for i in rows], crop, rng)
            x = x.to(device, memory_format=torch.channels_last)
            want = [mos[key] if mos[key] is None else mos[key][rows].to(device) for key in ("mos", "std")]
            x.requires_grad_(attacked)
            score = net(x)
            terms["mos"] = mos_loss(score, *want)
            if not attacked:
                terms["mos"].backward()
            else:
                # its gradient on the images shows where the score rises
                score.retain_grad()
                terms["mos"].backward()
                further = harden.terms(net, teacher, unit, mos["images"], x, score, harden_weight, gradient_norm,
                                       rng)
                sum(further.values()).backward()
                terms |= further
        if choices:
            order = np.random.default_rng([seed, 4, step * CHOICES // len(choices["images"])])
            order = order.permutation(len(choices["images"]))
            rows = order[(step * CHOICES + np.arange(CHOICES)) % len(order)]
            images = [same_crops(choices["images"][i], crop, rng) for i in rows]
            scores = net(torch.cat(images).to(device, memory_format=torch.channels_last)).split(list(map(len, images)))
            scores = torch.nn.utils.rnn.pad_sequence(scores, batch_first=True, padding_value=math.nan)
            terms["choices"] = choice_loss(scores, choices["selected"][rows].to(device))
            terms["choices"].backward()
        values = {key: term.item() for key, term in terms.items()}
        if not math.isfinite(sum(values.values())):
            raise runs.UserError(f"the loss is not finite at step {step + 1} ({values}); lower --lr")
        torch.nn.utils.clip_grad_norm_(net.parameters(), 2.0)
        opt.step()
        sched.step()
        decay = min(0.99, (step + 1) / (step + 11))
        for key, value in net.state_dict().items():
            ema[key].lerp_(value, 1 - decay)
        sums = {} if step % per_epoch == 0 else sums
        sums = {key: sums.get(key, 0) + value for key, value in values.items()}
        shown = {key: f"{value / (step % per_epoch + 1):.3f}" for key, value in sums.items()}
        bar.set_postfix(shown, refresh=False)
    net.load_state_dict(ema)
    net.eval().requires_grad_(False)
    return {key: round(value / per_epoch, 4) for key, value in sums.items()}


# Scores

@torch.no_grad()
def score_whole(net, images, device="cpu"):
    """(N,) float64 scores of whole (3, H, W) uint8 images."""
    return np.array([net((image[None].float() / 255).to(device, memory_format=torch.channels_last)).item()
                     for image in images])


@torch.no_grad()
def score_crops(net, images, size, seed=0, device="cpu"):
    """(N,) float64: the mean score of REPEATS random crops of every image, equal for equal lists of images."""
    scores = []
    for k, image in enumerate(images):
        x = random_crops([image] * REPEATS, size, np.random.default_rng([seed, 5, size, k]))
        scores.append(net(x.to(device, memory_format=torch.channels_last)).double().mean().item())
    return np.array(scores)


def test_scores(net, images, mos, device="cpu"):
    """{"whole": {srcc, plcc, ...}, "crops": {side: srcc}} of images (N of (3, H, W) uint8) with opinions (N,).

    Of the crops those that fit into every image.
    """
    whole = opinions.correlations(score_whole(net, images, device), mos)
    crops = {}
    smallest = min(min(image.shape[1:]) for image in images)
    for size in (size for size in TEST_CROPS if size <= smallest):
        value = opinions.correlations(score_crops(net, images, size, device=device), mos)["srcc"]
        crops[str(size)] = round(float(value), 4)
    return {"images": len(images), "whole": {key: round(float(value), 4) for key, value in whole.items()},
            "crops": crops}


# Files

def read_mos(path, folder, crop, columns=None, ends=(0, 100)):
    """A MOS set -> {"names", "images", "mos", "std"}, for `fit`: mos 0 to 100, std NaN where unknown, None for all.

    ends: worst and best of its scale; UserError for an opinion outside. Prints which rows are left out, and warns where
    the opinions span little of the scale.
    """
    table, faults = opinions.read_mos(path, columns)
    files = list_images(folder)
    found = table.image.map(lambda name: files.get(opinions.without_suffix(name)))
    if found.isna().any():
        faults.append(f"{int(found.isna().sum())} opinions left out: {folder} has no image of theirs "
                      f"(first: {table.image[found.isna()].iloc[0]})")
    table, found = table[found.notna()], found[found.notna()]
    scale, shown = 100 / (ends[1] - ends[0]), f"--mos-range {ends[0]:g} {ends[1]:g}"
    outside = table[~table.mos.between(*sorted(ends))]
    if len(outside):
        raise runs.UserError(f"--mos {path}: line {outside.index[0]} ({outside.image.iloc[0]}) has "
                             f"{outside.mos.iloc[0]:g}, outside {shown}: give the ends of its scale")
    loaded, damaged = load_images(found, "opinions")
    faults += damaged
    images = [image for image in loaded if image is not None]
    whole = [image is not None for image in loaded]
    table, found = table[whole], found[whole]
    if len(table) < 20:
        raise runs.UserError(f"--mos {path}: {len(table)} usable opinions are too few; {'; '.join(faults)}")
    low, high, unknown = table.mos.min(), table.mos.max(), int(table["std"].isna().sum())
    if (high - low) * abs(scale) < SPAN:
        faults.append(f"WARNING: its opinions lie between {low:g} and {high:g}, {(high - low) * abs(scale):.0f} % of "
                      f"{shown}; if that is not its scale, give the scale's ends, such as --mos-range 1 5")
    if 0 < unknown < len(table):
        faults.append(f"{unknown} of {len(table)} opinions have no std: pairs with them have no fidelity loss")
    for line in faults:
        print(f"{path}: {line}")
    check_size(images, found, crop)
    std = torch.tensor(table["std"].to_numpy() * abs(scale)).float()
    return {"names": table.image.tolist(), "images": images,
            "mos": torch.tensor((table.mos.to_numpy() - ends[0]) * scale).float(),
            "std": None if std.isnan().all() else std}


def load_images(files, rows):
    """Images of files, None for one that cannot be read; [a line that counts those and names the first], or []."""
    images, reasons = [], []
    for file in tqdm(files, desc="images", mininterval=5):
        try:
            images.append(load_image(file, rgb=True))
        except runs.UserError as error:
            images.append(None)
            reasons.append(error)
    counted = [f"{len(reasons)} {rows} left out: an image cannot be read (first: {error})" for error in reasons[:1]]
    return images, counted


def read_choices(path, folder, crop, columns=None, methods=None, pattern=None):
    """Choices -> {"table", "images", "selected"}, for `fit`. Prints which rows are left out."""
    table, faults = opinions.read_choices(path, columns, methods, pattern)
    files = opinions.images_of(table, folder, flag="--choice-images")
    files = {name: file for name, file in files.items() if file}
    images, damaged = load_images(files.values(), "images")
    loaded = {name: image for name, image in zip(files, images) if image is not None}
    whole = [all(f"{method}/{row.scene}" in loaded for method in row.candidates) for row in table.itertuples()]
    faults += damaged
    if not all(whole):
        faults.append(f"{whole.count(False)} choices left out: {folder} lacks an image of theirs")
        table = table[whole]
    if table.empty:
        raise runs.UserError(f"--choices {path}: no usable choice; {'; '.join(faults)}")
    for line in faults:
        print(f"{path}: {line}")
    loaded = {name: loaded[name] for name in opinions.names_of(table)}
    check_size(loaded.values(), [files[name] for name in loaded], crop)
    choices = shown(table, loaded)
    for row, candidates in zip(table.itertuples(), choices["images"]):
        if len({image.shape for image in candidates}) > 1:
            raise runs.UserError(f"--choices {path}: the images of scene {row.scene} differ in size")
    return {"table": table, **choices}


def shown(table, images):
    """{"images", "selected"} of choices, for `fit`. images: {METHOD/SCENE: (3, H, W) uint8}."""
    rows = list(table.itertuples())
    return {"images": [[images[f"{method}/{row.scene}"] for method in row.candidates] for row in rows],
            "selected": torch.tensor([row.candidates.index(row.selected) for row in rows])}


def check_size(images, files, crop):
    for image, file in zip(images, files):
        if min(image.shape[1:]) < crop:
            raise runs.UserError(f"{file}: {image.shape[2]} x {image.shape[1]} pixels are less than a crop; take a "
                                 f"smaller --crop (now {crop})")


def part(mos, rows):
    """Some rows of a MOS set."""
    return {key: value if value is None else [value[i] for i in rows] if isinstance(value, list) else value[rows]
            for key, value in mos.items()}


def main(args):
    runs.check_output(args.out, "--out")
    device = runs.start_world(args.device, args.threads).device
    torch.manual_seed(args.seed)
    record = {"arch": args.arch, "command": sys.argv, **runs.describe_machine(device.type == "cpu")}
    if args.init == RANDOM:
        net, record["init"] = opinion.ARCHITECTURES[args.arch](), "random"
    elif args.init:
        net, begun = opinion.load(args.init)
        record |= {"arch": begun["arch"], "init": begun}
    elif args.arch == "ranker":
        net = load_ranker()
    else:
        net = opinion.ARCHITECTURES[args.arch]()
        net.backbone.load_imagenet(args.backbone)
    mos, choices, test = None, None, None
    if args.mos:
        mos = read_mos(args.mos, args.mos_images, args.crop, args.mos_columns, args.mos_range)
        if args.test:
            rows, kept_out = opinions.splits(mos["names"], 1, args.test, args.seed)[0]
            mos, test = part(mos, rows), part(mos, kept_out)
        record["mos"] = {"file": args.mos.name, "sha256": runs.digest(args.mos), "images": len(mos["images"])}
    if args.choices:
        choices = read_choices(args.choices, args.choice_images, args.crop, args.choice_columns, args.methods,
                               args.name_pattern)
        record["choices"] = {"file": args.choices.name, "sha256": runs.digest(args.choices),
                             "choices": len(choices["images"])}
    settings = {"epochs": args.epochs, "lr": args.lr or RATES[record["arch"]], "batch_size": args.batch_size,
                "crop": args.crop, "seed": args.seed, "harden_weight": args.harden,
                "gradient_norm": args.gradient_norm}
    if args.init in (None, RANDOM) and args.arch != "ranker":
        seen = mos["images"] if mos else [image for images in choices["images"] for image in images]
        features = crop_features(net, seen, args.crop, args.seed)
        if mos:
            net.start_linear(features, mos["mos"])
        else:
            net.standardise(features)
    teacher = opinion.load(args.init)[0].to(device) if args.harden else None
    record |= settings | {"losses": fit(net, mos, choices, device=device, teacher=teacher, **settings)}
    if test:
        record["test"] = test_scores(net, test["images"], test["mos"].numpy(), device)
        print(record["test"])
    opinion.save(args.out, net, record)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB; use it with --reward {args.out}")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
