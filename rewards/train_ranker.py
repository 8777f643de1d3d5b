"""Train the embedded NR-IQA model `ranker`, or judge it on photographs that it has not seen.

    python -m rewards.train_ranker                      makes rewards/ranker.pth, in minutes on a CPU
    python -m rewards.train_ranker --evaluate PHOTOS --out-json ranker.json

Training follows RankIQA (Liu et al., ICCV 2017): photographs are degraded by known amounts and the network learns to
rank them. A chain is one crop of a clean photograph in eight versions; every pair in it is a comparison. There are
three sorts of chains: one family of degradations with rising severity, a second family on top of a first, and good and
bad restorations of a soft and noisy photo. So that families can be compared with each other, the probability that a
pair is ranked one way is a logistic function of the difference of two full-reference qualities (`quality`): RankNet's
loss (Burges et al., ICML 2005) with soft labels. If the order of a chain is known, the qualities are made to fall in
that order. The photographs are those in scikit-image's wheel. Clean ones are reduced by x1.6 or more, mostly by x2, so
that they are sharp at the pixel level.
"""
import io
import math
import sys
from pathlib import Path

import runs

# Weakest and strongest setting of each family; severity u in [0, 1] lies between them geometrically. CHOICE: from just
# visible to very poor. Units: blur sigma in pixels; noise standard deviation in grey levels; jpeg libjpeg's quality;
# resample factor of down- and upsampling; halo amount of unsharp masking; grid standard deviation of a periodic pattern
# in grey levels.
FAMILIES = {"blur": (0.4, 3.0), "noise": (2.0, 40.0), "jpeg": (95.0, 10.0), "resample": (1.2, 4.0), "halo": (0.5, 5.0),
            "grid": (1.0, 20.0)}
# the order in which several families are applied
ORDER = ["blur", "resample", "halo", "noise", "grid", "jpeg"]
# mixtures that --evaluate judges as well
MIXES = [("blur", "noise"), ("resample", "jpeg"), ("noise", "jpeg"), ("halo", "jpeg"), ("blur", "grid")]
# File in skimage/data: how often it is drawn. CHOICE: colour photographs first, the grey textures for variety
PHOTOS = {
    "astronaut.png": 3, "chelsea.png": 3, "coffee.png": 3, "rocket.jpg": 2, "motorcycle_left.png": 2,
    "motorcycle_right.png": 2, "hubble_deep_field.jpg": 0.5, "retina.jpg": 0.5, "camera.png": 1, "brick.png": 1,
    "grass.png": 1, "gravel.png": 1}
# versions of one crop
CHAIN = 8
# CHOICE: of the soft labels, per point: 20 points apart is 95 : 5
SHARPNESS = 0.15


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    weights = Path(__file__).resolve().parent / "ranker.pth"
    p.add_argument("--threads", type=runs.SIZE, default=1,
                   help="CPU threads; the same number gives the same bytes, two are hardly faster")
    p.add_argument("--seed", type=runs.COUNT, default=0, help="of everything drawn, in training and in --evaluate")
    g = p.add_argument_group("training")
    g.add_argument("--out", type=Path, default=weights, help="file to write, replaced when the training is over")
    g.add_argument("--steps", type=runs.SIZE, default=2000, help="optimisation steps")
    g.add_argument("--chains", type=runs.SIZE, default=5, help=f"chains of {CHAIN} images per step")
    g.add_argument("--lr", type=runs.RATE, default=3e-3, help="peak learning rate of AdamW; one cycle")
    g.add_argument("--across", type=runs.WEIGHT, default=0.3,
                   help="weight of pairs from different photographs, against 1 for pairs of one crop")
    g = p.add_argument_group("judging on held-out photographs")
    g.add_argument("--evaluate", type=Path, metavar="DIR",
                   help="folder of photographs: rank correlations instead of a training")
    g.add_argument("--weights", type=Path, default=weights, help="the ranker that is judged")
    g.add_argument("--crops", type=runs.number(int, 32), nargs="+", default=[96, 128, 192, 256],
                   help="sides of the crops per photo and family, pixels")
    g.add_argument("--repeats", type=runs.SIZE, default=1, help="crops of every size per photo and family")
    g.add_argument("--reduce", type=runs.number(float, 1), default=1.0, help="reduce the photos by this factor first")
    g.add_argument("--against", metavar="MODULE:FUNCTION",
                   help="another NR-IQA model, as for --reward: rank correlation with it on the same crops")
    g.add_argument("--out-json", type=Path, help="write the numbers here")
    args = p.parse_args(argv)
    if args.evaluate and not args.evaluate.is_dir():
        p.error(f"--evaluate {args.evaluate}: no such folder of photographs")
    if args.out_json and not args.evaluate:
        p.error("--out-json is for --evaluate")
    return args


# before the imports that take seconds, so that --help answers at once
ARGS = parse_args() if __name__ == "__main__" else None

import numpy as np
import skimage
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from tqdm import tqdm

import degradations
import iqa
from images import decoded, list_images, open_image
from rewards.ranker import Ranker, load_ranker

# Degradations with a severity

def pattern(rng, h, w):
    """A periodic pattern as networks leave it (grids, stripes, diagonals): (1, 3, h, w), periods 2-8, std 1."""
    y, x = np.mgrid[:h, :w]
    form, p, q = rng.choice(["tile", "stripes", "diagonal", "wave"]), *rng.integers(2, 9, size=2)
    if form == "tile":
        z = rng.normal(size=(p, q))[y % p, x % q]
    elif form == "stripes":
        z = rng.normal(size=p)[(y if rng.random() < 0.5 else x) % p]
    elif form == "diagonal":
        z = rng.normal(size=p)[(x + rng.choice([-1, 1]) * y) % p]
    else:
        a, period = rng.integers(4) * math.pi / 4, rng.uniform(2.2, 8)
        z = np.sin(2 * math.pi * (x * math.cos(a) + y * math.sin(a)) / period + rng.uniform(0, 6.3))
        if rng.random() < 0.5:
            z = z * np.sin(2 * math.pi * (y * math.cos(a) - x * math.sin(a)) / period + rng.uniform(0, 6.3))
    colour = np.ones(3) if rng.random() < 0.6 else rng.uniform(-1, 1, size=3)
    z = (z - z.mean()) / max(z.std(), 1e-6)
    return torch.from_numpy(z[None, None] * (colour / abs(colour).max())[None, :, None, None]).float()


def draw_style(family, rng, h, w):
    """All severities of a family share this in a chain: noise field, pattern, radius of halos, resampling kernels."""
    if family == "noise":
        field = degradations.normal_field((1, 3, h, w), int(rng.integers(2**62)))
        if rng.random() < 0.3:
            field = field[:, :1].expand(1, 3, h, w)
        # as after a demosaicking or a resize
        if rng.random() < 0.25:
            field = soften(field, 0.6)
            field = field / field.std()
        return field
    if family == "grid":
        return pattern(rng, h, w)
    if family == "halo":
        # sigma in pixels
        return math.exp(rng.uniform(math.log(0.7), math.log(3.0)))
    if family == "resample":
        return rng.choice(["area", "bilinear", "bicubic"]), rng.choice(["bicubic", "bicubic", "bilinear"])
    return None


def soften(x, sigma):
    """Gaussian blur, one sigma per image or one for all."""
    sigma = np.broadcast_to(np.asarray(sigma, dtype=float), len(x))
    radius = max(1, math.ceil(3 * sigma.max()))
    lines = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma[:, None]) ** 2)
    lines = lines / lines.sum(1, keepdims=True)  # (B, 2 radius + 1)
    return degradations.blur(degradations.blur(x, lines[:, None, :]), lines[:, :, None])


def apply(x, family, u, style):
    """x (B, 3, H, W) in [0, 1] degraded by severities u (B,) in [0, 1] of one family; NaN leaves an image as it is."""
    low, high = FAMILIES[family]
    active = ~np.isnan(u)
    amount, same = low * (high / low) ** u[active], x
    x = x[torch.from_numpy(active)]
    if len(x) == 0:
        return same
    t = torch.from_numpy(amount).float().view(-1, 1, 1, 1)
    if family == "blur":
        x = soften(x, amount)
    elif family in ("noise", "grid"):
        x = degradations.add_gaussian_noise(x, t.flatten(), style)
    elif family == "jpeg":
        x = degradations.jpeg(x, t.flatten(), table="libjpeg")
    elif family == "halo":
        x = x + t * (x - soften(x, style))
    else:
        (h, w), (down, up) = x.shape[2:], style
        smooth = {} if down == "area" else dict(align_corners=False, antialias=True)
        small = [F.interpolate(image[None], size=(round(h / factor), round(w / factor)), mode=down, **smooth)
                 for image, factor in zip(x, amount)]
        x = torch.cat([F.interpolate(image, size=(h, w), mode=up, align_corners=False) for image in small])
    return same.index_put((torch.from_numpy(np.flatnonzero(active)),), x.clamp(0, 1))


def quality(clean, x):
    """Full-reference quality of x (B, 3, H, W) against clean (1 or B, 3, H, W). -> (B,)

    It is 80 without a difference and about 20 for the strongest ones: one minus SSIM's contrast-structure term over two
    scales, luma and chroma. The constant of 3 grey levels is small, so that faint patterns and block edges in flat
    areas count, as they do for the eye. The square root spreads the mild differences.
    """
    def mean(z):
        # 7x7 windows around every second pixel
        h, w = z.shape[2] - 6, z.shape[3] - 6
        z = sum(z[..., k:k + w:2] for k in range(7))
        return sum(z[..., k:k + h:2, :] for k in range(7)) / 49
    opponent = torch.tensor([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    opponent = 255 * opponent.view(3, 3, 1, 1)
    a, b, loss = F.conv2d(clean, opponent), F.conv2d(x, opponent), 0
    for _ in range(2):
        ma, mb = mean(a), mean(b)
        cs = (2 * (mean(a * b) - ma * mb) + 9) / (mean(a * a) - ma * ma + mean(b * b) - mb * mb + 9)
        loss = loss + (1 - cs).mean((2, 3)) @ torch.tensor([0.4, 0.05, 0.05])
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return 80 - 60 * (loss.clamp_min(0) / 0.35).sqrt()


# Chains

def read_photos(paths):
    photos = []
    for path in paths:
        with open_image(path) as image:
            photos.append(torch.from_numpy(decoded(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255)
    return photos


def training_photos():
    # the wheel's own files: nothing is ever downloaded
    folder = Path(skimage.__file__).parent / "data"
    missing = [name for name in PHOTOS if not (folder / name).exists()]
    if missing:
        raise runs.UserError(f"{folder}: {', '.join(missing)} missing; install scikit-image from its wheel")
    return read_photos([folder / name for name in PHOTOS])


def clean_crop(photos, rng, size):
    """A crop of a photo, reduced by x1.6 or more, with random orientation, colours and contrast: (1, 3, size, size)."""
    share = np.array(list(PHOTOS.values())) / sum(PHOTOS.values())
    photo = photos[rng.choice(len(photos), p=share)]
    h, w = photo.shape[2:]
    n = min(int(size * (2 if rng.random() < 0.5 else rng.uniform(1.6, 4))), h, w)
    top, left = rng.integers(h - n + 1), rng.integers(w - n + 1)
    x = photo[..., top:top + n, left:left + n]
    if rng.random() < 0.7:
        x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    else:
        x = F.interpolate(x, size=(size, size), mode="area")
    x = x.flip(3) if rng.random() < 0.5 else x
    x = x.transpose(2, 3) if rng.random() < 0.5 else x
    x = x[:, rng.permutation(3)] if rng.random() < 0.5 else x
    x = x.clamp(0, 1) ** rng.uniform(0.7, 1.4)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * rng.uniform(0.3, 1.5)
    # crisp as cameras and scanners leave it
    if rng.random() < 0.6:
        x = x + rng.uniform(0, 2) * (x - soften(x, rng.uniform(0.4, 0.7)))
    level = x.mean()
    # some are saturated in large parts, some nearly flat, as skies are
    shift = rng.uniform(-0.7, 0.7) if rng.random() < 0.1 else rng.uniform(-0.1, 0.1)
    gain = rng.uniform(0.05, 0.4) if rng.random() < 0.15 else rng.uniform(0.6, 1.2)
    return (level + (x - level) * gain + shift).clamp(0, 1).contiguous()


def as_photographed(clean, rng, sigma=(0.4, 1.6), noise=8):
    """Soft and a little noisy, as most photos are at their own resolution."""
    field = draw_style("noise", rng, *clean.shape[2:])
    return degradations.add_gaussian_noise(soften(clean, rng.uniform(*sigma)), rng.uniform(0, noise), field)


def make_chain(photos, rng, size):
    """CHAIN versions of one crop and their target qualities: (CHAIN, 3, size, size), (CHAIN,)."""
    # lattices of JPEG and patterns begin anywhere in the crop
    margin = 8
    side = size + margin
    clean = degradations.to_8bit(clean_crop(photos, rng, side))
    # CHOICE: the hard families are drawn more often
    names, likely = list(FAMILIES), np.array([2.4, 0.8, 2.0, 1.5, 1.3, 0.8]) / 8.8
    u = np.full(CHAIN, np.nan)
    u[1:] = (np.arange(CHAIN - 1) + rng.uniform(0, 0.8, CHAIN - 1)) / (CHAIN - 1.2)
    # some chains have small steps
    u = u.clip(0, 1) * (0.5 if rng.random() < 0.3 else 1)
    draw = rng.random()
    if draw < 0.75:
        base, soft_base = clean, rng.random() < 0.3
        # faint grain must not make a mild blur an improvement
        if rng.random() < 0.6:
            base = as_photographed(base, rng, (0.3, 0.7) if soft_base else (0.1, 0.2), 5)
            base = degradations.jpeg(base, rng.uniform(80, 98), table="libjpeg") if rng.random() < 0.2 else base
        x = base.expand(CHAIN, -1, -1, -1)
        chosen = {str(rng.choice(names, p=likely)): u} if draw < 0.5 else {}
        if not chosen:
            # A second family of rising severity on top of a first, which is fixed and mostly mild, as in photos; or
            # both rise together.
            first, second = rng.choice(names, 2, replace=False, p=likely)
            fixed = np.full(CHAIN, 0.8 * rng.random() ** 2)
            chosen = {str(first): fixed if rng.random() < 0.6 else u, str(second): u}
        for name in sorted(chosen, key=ORDER.index):
            x = apply(x, name, chosen[name], draw_style(name, rng, side, side))
        soft = soft_base and base is not clean or "blur" in chosen or "resample" in chosen
        # sharpening may repair a soft image
        ordered = not ("halo" in chosen and soft) and set(chosen) != {"blur", "resample"}
    else:
        # a soft and noisy photo, and restorations of it
        ordered = False
        photo, halo = as_photographed(clean, rng), draw_style("halo", rng, side, side)
        good, fair = (clean + (photo - clean) * rng.uniform(*r) for r in ((0.1, 0.4), (0.4, 0.8)))
        base = good if rng.random() < 0.5 else photo
        amounts = np.array([rng.uniform(0, 0.5), rng.uniform(0.5, 1)])
        sharp = apply(base.expand(2, -1, -1, -1), "halo", amounts, halo)
        name = str(rng.choice(names, p=likely))
        bad = apply(base, name, rng.random(1), draw_style(name, rng, side, side))
        x = torch.cat([clean, photo, good, fair, sharp, soften(photo, rng.uniform(0.5, 1.5)), bad])
    top, left = rng.integers(margin + 1, size=2)
    x = degradations.to_8bit(x[..., top:top + size, left:left + size])
    target = quality(clean[..., top:top + size, left:left + size], x)
    if ordered:
        # the known order, by at least 40 points from end to end
        rise = np.diff(u, prepend=0)
        for k in range(1, CHAIN):
            target[k] = min(target[k], target[k - 1] - 40 * (rise[k] if k > 1 else 0.14))
    return x, target


def make_batch(photos, seed, step, chains):
    """The chains of a step (1-based): images (chains * CHAIN, 3, size, size), target qualities (chains, CHAIN)."""
    rng = np.random.default_rng((seed, step))
    # CHOICE: small crops are the hard ones, and cheap
    size = int(rng.choice([80, 96, 96, 112]))
    made = [make_chain(photos, rng, size) for _ in range(chains)]
    return torch.cat([x for x, _ in made]), torch.stack([t for _, t in made])


def ranking_loss(score, target):
    """Cross-entropy of soft preferences of all pairs within rows of (N, K) scores, minus its smallest value. Scalar."""
    i, j = torch.triu_indices(score.shape[1], score.shape[1], 1)
    target_logit = SHARPNESS * (target[:, i] - target[:, j])
    score_logit = SHARPNESS * (score[:, i] - score[:, j])
    p = torch.sigmoid(target_logit)
    entropy = F.binary_cross_entropy_with_logits(target_logit, p)
    return F.binary_cross_entropy_with_logits(score_logit, p) - entropy


def train(args):
    photos = training_photos()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        net = Ranker()
    net.train()
    opt = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=1e-4)
    warm = max(1, args.steps // 10)

    def share_of_lr(k):
        return min((k + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * k / args.steps))
    sched = torch.optim.lr_scheduler.LambdaLR(opt, share_of_lr)
    ema, window = {k: v.clone() for k, v in net.state_dict().items()}, []
    bar = tqdm(range(1, args.steps + 1), desc="ranker", mininterval=2)
    for step in bar:
        with torch.no_grad():
            x, target = make_batch(photos, args.seed, step, args.chains)
        score = net(x)
        within = ranking_loss(score.view(target.shape), target)
        across = ranking_loss(score.view(1, -1), target.view(1, -1))
        loss = within + args.across * across
        if not math.isfinite(loss.item()):
            raise runs.UserError(f"loss is {loss.item()} at step {step}; lower --lr")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        sched.step()
        decay = min(0.99, step / (step + 10))
        for k, v in net.state_dict().items():
            ema[k].lerp_(v, 1 - decay)
        window = [*window[-49:], loss.item()]
        bar.set_postfix(step=step, loss=f"{sum(window) / len(window):.4f}", refresh=False)
    net.load_state_dict(ema)
    fix_scale(net.eval(), photos, args.seed)
    buffer = io.BytesIO()
    # a file would carry its own name: other bytes elsewhere
    torch.save(net.state_dict(), buffer)
    runs.write_atomic(args.out, lambda temporary: temporary.write_bytes(buffer.getvalue()))
    parameters = sum(v.numel() for v in net.parameters())
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB, {parameters:,} parameters")


def fix_scale(net, photos, seed):
    """Shift and stretch the score: median 80 on clean training crops, 20 on the strongest level of each family."""
    rng, clean, worst = np.random.default_rng((seed, 0)), [], []
    with torch.no_grad():
        for k in range(60):
            x, name = clean_crop(photos, rng, 112), list(FAMILIES)[k % len(FAMILIES)]
            clean.append(net(x).item())
            worst.append(net(apply(x, name, np.ones(1), draw_style(name, rng, 112, 112))).item())
    high, low = np.median(clean), np.median(worst)
    # false only after a training of a few steps
    if high > low:
        net.stretch.mul_(60 / (high - low))
        net.shift.copy_(torch.tensor(80 - (high - net.shift.item()) * 60 / (high - low)))


# Held-out photographs

def evaluate(args):
    """Spearman correlation of score and severity, per crop, over eight levels: the crop as it is and seven severities.

    Averaged per photo and family over the crops, then over photos; nothing is pooled over crops or photos before it is
    ranked.
    """
    paths = list(list_images(args.evaluate).values())
    net = load_ranker(args.weights).eval()
    other = iqa.create_reward([args.against]) if args.against else None
    u = np.append(np.nan, np.linspace(0, 1, 7))  # (8,)
    tasks = {name: (name,) for name in FAMILIES} | {"+".join(mix): mix for mix in MIXES}
    rho, agree, level = ({name: [] for name in tasks} for _ in range(3))
    for n, path in enumerate(tqdm(paths, desc="photos")):
        photo = read_photos([path])[0]
        if args.reduce > 1:
            photo = F.interpolate(photo, scale_factor=1 / args.reduce, mode="bicubic", antialias=True).clamp(0, 1)
        for k, (task, families) in enumerate(tasks.items()):
            rng, per_crop, per_crop_agree = np.random.default_rng((args.seed, n, k)), [], []
            for size in args.crops * args.repeats:
                h, w = photo.shape[2:]
                if min(h, w) < size:
                    continue
                top, left = rng.integers(h - size + 1), rng.integers(w - size + 1)
                # degraded with its surroundings, then cut
                y, x = (max(0, start - rng.integers(8, 24)) for start in (top, left))
                images = photo[..., y:top + size + 16, x:left + size + 16].repeat(len(u), 1, 1, 1)
                for name in sorted(families, key=ORDER.index):
                    images = apply(images, name, u, draw_style(name, rng, *images.shape[2:]))
                images = degradations.to_8bit(images[..., top - y:top - y + size, left - x:left - x + size])
                with torch.no_grad():
                    score = net(images).numpy()
                    if other is not None:
                        per_crop_agree.append(spearmanr(score, other(images).numpy()).statistic)
                per_crop.append(spearmanr(score, -np.arange(len(u))).statistic)
                level[task].append(score)
            if not per_crop:
                raise runs.UserError(f"{path}: smaller than every size of --crops; give smaller ones")
            rho[task].append(float(np.mean(per_crop)))
            agree[task].append(float(np.mean(per_crop_agree)) if per_crop_agree else None)
    result = {"command": sys.argv, **runs.describe_machine(), "weights": args.weights.name,
              "sha256": runs.digest(args.weights), "folder": args.evaluate.name,
              "photos": len(paths), "reduce": args.reduce, "crops": args.crops, "repeats": args.repeats,
              "levels": len(u), "seed": args.seed, "against": args.against,
              "severity": {k: [round(a * (b / a) ** v, 3) for v in u[1:]] for k, (a, b) in FAMILIES.items()},
              "families": {}}
    print(f"{'family':<14} mean   worst  photo{'':<12} mean score of the levels, clean first")
    for task in tasks:
        worst = int(np.argmin(rho[task]))
        row = {"mean": float(np.mean(rho[task])), "worst": rho[task][worst], "worst_photo": paths[worst].name,
               "mean_score": np.mean(level[task], 0).round(1).tolist()}
        if other is not None:
            row["with_other"], row["with_other_worst"] = float(np.mean(agree[task])), min(agree[task])
        result["families"][task] = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        scores = " ".join(f"{v:5.1f}" for v in row["mean_score"])
        agreement = f"  with other {row['with_other']:.3f}" if other else ""
        print(f"{task:<14} {row['mean']:.3f}  {row['worst']:.3f}  {row['worst_photo']:<17} {scores}{agreement}")
    if args.out_json:
        runs.save_json(args.out_json, result)
    return result


def main(args):
    torch.set_num_threads(args.threads)
    runs.check_output(None if args.evaluate else args.out, "--out")
    runs.check_output(args.out_json, "--out-json")
    (evaluate if args.evaluate else train)(args)


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
