"""What a super-resolved image is judged by: full-reference metrics, structure where there should be none, the NR-IQA models of iqa.py; and scores of
many outputs by many metrics, computed once.

    metric = create_metric("niqe", device); metric(sr, gt)      (B, 3, H, W) RGB in [0, 1] -> (B,), native units; metric.lower_is_better
    scores = score(rows, items, metrics, cache, world, protocol)           {row: {stem: {metric: value}}}, from the cache where it has them
"""
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from tqdm import tqdm

import archs
import data
import degradations
import iqa
import lora
import losses
import runs
from images import cut_to_x4, load_image

FULL_REFERENCE = ("psnr", "ssim", "vgg", "flat_hf", "lpips", "stlpips", "dists")   # metrics that compare; pyiqa knows further ones


def luma(x):
    """(B, 3, H, W) RGB in [0, 1] -> (B, 1, H, W): Y of BT.601 in its studio range, 16/255 to 235/255, as MATLAB's rgb2ycbcr and BasicSR have it."""
    return (x * x.new_tensor([65.481, 128.553, 24.966]).view(3, 1, 1)).sum(1, keepdim=True) / 255 + 16 / 255


def crop(x, border):
    return x[..., border:x.shape[2] - border, border:x.shape[3] - border]


def psnr(sr, gt, border=4):
    """Peak signal-to-noise ratio in dB of (B, C, H, W) in [0, 1], over all channels, `border` pixels cropped (HGGT). -> (B,)

    Identical images give 100. ValueError for another shape, or one that the border leaves nothing of.
    """
    check_pair("PSNR", sr, gt, border)
    error = crop(sr - gt, border).double().square().mean((1, 2, 3))
    return -10 * error.clamp_min(1e-10).log10()


def ssim(sr, gt, border=4):
    """Structural similarity (Wang et al., 2004) of (B, C, H, W) in [0, 1]: mean over channels. -> (B,)

    `border` pixels are cropped (HGGT); 11x11 Gaussian window of sigma 1.5, valid region only. ValueError as psnr.
    """
    check_pair("SSIM", sr, gt, border + 5)
    images = [crop(image, border).double().cpu().numpy() for image in (sr, gt)]
    return torch.tensor([structural_similarity(a, b, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                               channel_axis=0) for a, b in zip(*images)], dtype=torch.float64)


def flat_hf(sr, gt, block=16, flat=0.25):
    """How much grid and noise stands where nothing should be: high-frequency share of the spectral energy of flat blocks.

    sr, gt: (B, 3, H, W) RGB in [0, 1] -> (B,) in [0, 1]. Flat are the quarter of the reference's 16x16 blocks with the least standard
    deviation of luma (a border of 16 pixels is left out), so that all methods are judged at the same places. Energy is that of SR's
    luma, mean removed, under a Hann window, of these blocks together; high is from 0.25 cycles per pixel upwards in either
    direction, where the 4-pixel grid of an x4 pixel shuffle has its lowest line. ValueError as psnr.
    """
    check_pair("flat_hf", sr, gt, 2 * block)
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64, device=sr.device).view(3, 1, 1)

    def blocks(image):                                                           # -> (B, N, 16, 16) grey levels
        grey = (255 * image.double() * luma).sum(1)[:, block:image.shape[2] - block, block:image.shape[3] - block]
        return grey.unfold(1, block, block).unfold(2, block, block).flatten(1, 2)

    spread = blocks(gt).flatten(2).std(2)
    quiet = spread.argsort(1)[:, :max(1, int(flat * spread.shape[1]))]
    chosen = blocks(sr).gather(1, quiet[..., None, None].expand(-1, -1, block, block))
    window = torch.hann_window(block, periodic=False, dtype=torch.float64, device=sr.device)
    energy = torch.fft.fft2((chosen - chosen.mean((2, 3), keepdim=True)) * window * window[:, None]).abs().square().sum(1)
    high = torch.fft.fftfreq(block, device=sr.device).abs() >= 0.25
    return (energy * (high | high[:, None])).sum((1, 2)) / energy.sum((1, 2)).clamp_min(1e-9)


PEAKS_ABOVE_UNSHARP = 0.03     # CHOICE, fixed on synthetic grids before any fine-tuning was judged: see tests/test_finetune.py


def noise_peaks(residual, window=64, low=0.2, times=8.0):
    """Structured noise: share of the spectral energy of a change that stands in isolated high-frequency peaks.

    residual: (B, 3, H, W), SR of the tuned network minus SR of its base, sides of at least 64 -> (B,) in [0, 1]. A pixel grid is a few
    sharp peaks; sharpening and new texture spread smoothly. The spectrum of the luma is averaged over half-overlapping 64x64 Hann
    windows; a peak is a frequency of `low` cycles per pixel or more, in either direction, with `times` the energy of the median of its 9x9
    neighbours; its energy is what exceeds that median. 0 for no change at all.
    """
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64, device=residual.device).view(3, 1, 1)
    grey = (255 * residual.double() * luma).sum(1)
    if min(grey.shape[1:]) < window:
        raise runs.UserError(f"noise_peaks wants images with sides of at least {window} pixels, got {tuple(grey.shape[1:])}")
    blocks = grey.unfold(1, window, window // 2).unfold(2, window, window // 2).flatten(1, 2)              # (B, N, 64, 64)
    hann = torch.hann_window(window, dtype=torch.float64, device=grey.device)
    floor = 0.1 ** 2 * window ** 2 * hann.square().sum() ** 2                      # of a change of a tenth of a grey level
    power = torch.fft.fft2((blocks - blocks.mean((2, 3), keepdim=True)) * hann * hann[:, None]).abs().square()               # (B, N, 64, 64)
    power = (power / (power.sum((2, 3), keepdim=True) + floor)).mean(1)
    around = F.pad(power[:, None], (4, 4, 4, 4), mode="circular")[:, 0].unfold(1, 9, 1).unfold(2, 9, 1).flatten(3).median(3).values
    high = torch.fft.fftfreq(window, device=grey.device).abs() >= low
    peaks = (power > times * around) & (high | high[:, None])
    return ((power - around) * peaks).sum((1, 2))


def unsharp(images, amount):
    """8-bit result of a plain unsharp mask, Gaussian of sigma 1.5, of (B, 3, H, W)."""
    return degradations.to_8bit(images + amount * (images - degradations.blur(images, degradations.gaussian_kernel(9, 1.5))))


def unsharp_like(base, sr, reward, amounts=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)):
    """A plain unsharp mask (Gaussian, sigma 1.5) of `base`, the weakest with at least the reward of `sr`, else the one with the highest.

    (1, 3, H, W) twice -> the mask's image, and whether it has as much reward: sharpening alone often cannot earn what tuning can.
    """
    best, wanted = (-math.inf, base), reward(sr).item()
    for amount in amounts:
        image = unsharp(base, amount)
        best = max(best, (reward(image).item(), image), key=lambda pair: pair[0])
        if best[0] >= wanted:
            break
    return best[1], best[0] >= wanted


def check_pair(metric, sr, gt, border):
    if sr.shape != gt.shape or min(sr.shape[2:]) <= 2 * border:
        raise runs.UserError(f"{metric} of an output of {tuple(sr.shape[2:])} pixels against a reference of {tuple(gt.shape[2:])}: the reference "
                         f"must be x4 the input, and more than {2 * border} pixels")


@dataclass(frozen=True)
class Metric:
    """metric(sr, gt): (B, 3, H, W) RGB in [0, 1] twice -> (B,) in native units; gt is not used unless full_reference."""
    function: Callable
    lower_is_better: bool = False
    full_reference: bool = False
    identity: object = None                                                      # what a score depends on beside images, border and luma: plain values

    def __call__(self, sr, gt):
        return self.function(sr, gt)


def create_metric(name, device, weights_file=None, border=4, y=False, flag="--metrics"):
    """The Metric called `name`, for evaluation.

    name: psnr, ssim (y: on luma only), vgg (distance of VGG19 features, the loss of Eq. 1), flat_hf, a pyiqa metric (lpips, stlpips and dists
    are full-reference ones; niqe, musiq, ... are not), ranker, or module:function. border: pixels that full-reference metrics but
    vgg and flat_hf crop from every side (HGGT, LPIPS and DISTS included); no-reference ones see the whole image. weights_file: a
    local copy of the weights. flag: named in errors. Raises as iqa.create_reward does.
    """
    if "=" in name:
        raise runs.UserError(f"{flag} {name}: a metric has no weight here; write {name.partition('=')[0]}")
    if name == "vgg":
        distance = losses.VGGFeatureLoss(weights_file).to(device)

        def each(sr, gt):
            wanted = distance.taps(gt[:1]) if gt.stride(0) == 0 else None         # one ground truth, expanded: looked through once
            return torch.stack([distance(a[None], b[None], wanted) for a, b in zip(sr, gt)])
        return Metric(each, True, True, [name, iqa.tensors_hash(distance)])
    if name == "flat_hf":
        return Metric(flat_hf, True, True, [name])
    if name in ("psnr", "ssim"):
        function = {"psnr": psnr, "ssim": ssim}[name]
        return Metric(lambda sr, gt: function(luma(sr), luma(gt), border) if y else function(sr, gt, border), False, True, [name])
    if name != "ranker" and ":" not in name and iqa.pyiqa_modes().get(name) == "FR":
        model = iqa.pyiqa_model(name, device, weights_file, mode="FR", flag=flag)

        @torch.no_grad()
        def judge(sr, gt):
            check_pair(name, sr, gt, border)
            return model(crop(sr, border), crop(gt, border)).reshape(-1).float()
        return Metric(judge, model.lower_better, True, [name, iqa.tensors_hash(model)])
    reward = iqa.create_reward([name], device, weights_file, flag=flag)
    sign = -1 if getattr(next(iter(reward.models.values())), "lower_better", False) else 1
    return Metric(lambda sr, gt: sign * reward(sr), sign < 0, False, reward.identity())


# Perceptual distances of two (B, 3, H, W) in [0, 1], frozen, with a gradient to the images: what self-supervision and diversity look through

class LPIPS(nn.Module):
    """The lpips package's distance of two (B, 3, H, W) in [0, 1] -> (B,); weight (B, 1, H, W): the mean of weight times the map."""

    def __init__(self, net):
        super().__init__()
        import lpips
        try:
            self.net = lpips.LPIPS(net=net, verbose=False).requires_grad_(False)
        except OSError as error:                                                  # URLError among others
            file = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}[net]
            raise runs.UserError(f"--distance lpips: {file} is not here and could not be fetched ({' '.join(str(error).split())[:80]}): put it into "
                                    f"{Path(torch.hub.get_dir()) / 'checkpoints'}, or take --distance vgg (VGG19's weights) or proxy (none) in pretraining") from None

    def forward(self, a, b, weight=None):
        with torch.autocast(a.device.type, enabled=False):
            self.net.spatial = weight is not None
            value = self.net(a.float(), b.float(), normalize=True)
            return value[:, 0, 0, 0] if weight is None else (value * weight).mean((1, 2, 3))


def open_vgg(weights, instead):
    """losses.VGGFeatureLoss; instead: what else can be done where its weights are missing."""
    try:
        return losses.VGGFeatureLoss(weights)
    except runs.UserError as error:
        raise runs.UserError(str(error).replace("do without the perceptual loss: --lambda-p 0", instead)) from None


class VGGCosine(nn.Module):
    """Mean over VGG19's stages of 1 - cosine of the two feature vectors at each place: in [0, 1], LPIPS without what it learned from people.

    (The paper calls LPIPS "the cosine distance in [0, 1] between image features"; that is what this is.) stages: of the five, from the first on; their last ReLU.
    """

    TAPS = (3, 8, 17, 26, 35)

    def __init__(self, weights=None, stages=5):
        super().__init__()
        vgg = open_vgg(weights, "take another distance, proxy")
        self.features = nn.Sequential(*vgg.features, nn.ReLU())[:self.TAPS[stages - 1] + 1]
        self.register_buffer("mean", vgg.mean, persistent=False)
        self.register_buffer("std", vgg.std, persistent=False)
        self.stages = stages

    def directions(self, x):
        x, found = (x - self.mean) / self.std, []
        for k, layer in enumerate(self.features):
            x = layer(x)
            if k in self.TAPS:
                found.append(x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt())
        return found

    def forward(self, a, b, weight=None):
        with torch.autocast(a.device.type, enabled=False):
            maps = [1 - (u * v).sum(1, keepdim=True) for u, v in zip(self.directions(a.float()), self.directions(b.float()))]
            if weight is None:
                return sum(m.mean((1, 2, 3)) for m in maps) / self.stages
            return sum((F.interpolate(m, size=a.shape[2:], mode="bilinear") * weight).mean((1, 2, 3)) for m in maps) / self.stages


class Proxy(nn.Module):
    """Needs no weights, and stands for no published distance: L1 of three levels of a Laplacian pyramid and of the gradients, relative to what is there.

    In [0, 1]: each of the four terms is divided by the mean absolute value that both images have of it.
    """

    def terms(self, x):
        found = [torch.cat([x.diff(dim=2, append=x[:, :, -1:]), x.diff(dim=3, append=x[..., -1:])], 1)]
        for _ in range(3):
            small = F.avg_pool2d(x, 2)
            found.append(x - F.interpolate(small, size=x.shape[2:], mode="bilinear"))
            x = small
        return found

    def forward(self, a, b, weight=None):
        total = 0
        for u, v in zip(self.terms(a), self.terms(b)):
            scale = (u.abs() + v.abs()).mean((1, 2, 3)).detach() + 1e-4
            m = (u - v).abs().mean(1, keepdim=True)
            m = m if weight is None else F.interpolate(m, size=a.shape[2:], mode="bilinear") * weight
            total = total + m.mean((1, 2, 3)) / scale / 4
        return total


def create_distances(name, vgg_weights=None, stages=5):
    """-> (distance for L_rec, distance for HQI): LPIPS of VGG and of AlexNet (CHOICE; the papers do not say), or twice the same."""
    if name == "lpips":
        return LPIPS("vgg").eval(), LPIPS("alex").eval()
    distance = (VGGCosine(vgg_weights, stages) if name == "vgg" else Proxy()).eval()
    return distance, distance


# Scores of many outputs: every image through every row and metric, once; kept on disk and shared by processes.
# items: {stem: {"lq": path or None, "refs": [path], "versions": [path]}}, lq None: degraded from versions[0]; rows: {name: Row};
# metrics: {name: Metric}. A score is used again only for the same bytes of images, weights and metrics, the same versions of libraries, and the
# same text of this file and of SOURCES. Tiles and their overlap are part of a row's identity.

SOURCES = (archs, data, degradations, iqa, lora, runs)


def digest(value):
    """Hash of a file's bytes, or of plain values."""
    content = value.read_bytes() if isinstance(value, Path) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:24]


class Row(NamedTuple):
    """A row of the table. make: lq (1, 3, h, w) -> (1, 3, 4h, 4w); or files: {stem: image}. identity: hash of what `make` does. record: for the JSON."""
    make: Callable | None
    files: dict | None
    identity: str | None
    record: dict | None


# Images

def load(path, device):
    return load_image(path)[None].to(device).float() / 255


def low_resolution(stem, item, degradation, device):
    """The LR image that comes with the set, or the same one every time by `degradation` of the original. -> (1, 3, h, w) in [0, 1]"""
    if item["lq"] is not None:
        return load(item["lq"], device)
    gt = cut_to_x4(load(item["versions"][0], device))
    return degradations.degrade(gt, degradation, *([[runs.sample_seed(0, 0, k, f"test {stem}")] for k in (0, 1)]))


def bicubic(lq):
    return F.interpolate(lq, scale_factor=4, mode="bicubic")


def output(name, row, stem, lq, device):
    """The 8-bit output of one row, (1, 3, H, W). ValueError if a network gives what is not finite."""
    if row.files is not None:
        return load(row.files[stem], device)
    sr = row.make(lq)
    if not torch.isfinite(sr).all():
        raise runs.UserError(f"{name}, image {stem}: the network's output is not finite: look at its weights")
    return degradations.to_8bit(sr)


@torch.no_grad()
def cells_of(stem, items, rows, degradation, device):
    """{"LR", "GT", "GT 2", ..., then the rows: (3, H, W)} of one image."""
    lq = low_resolution(stem, items[stem], degradation, device)
    cells = {"LR": lq} | {"GT" if k == 0 else f"GT {k + 1}": load(ref, device) for k, ref in enumerate(items[stem]["refs"])}
    cells |= {name: output(name, row, stem, lq, device) for name, row in rows.items()}
    return {name: image[0].cpu() for name, image in cells.items()}


# Scores

def versions():
    """Libraries that scores depend on, and a hash of this repository's own text."""
    code = digest([digest(Path(file)) for file in (__file__, *(module.__file__ for module in SOURCES))])
    return {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "pyiqa", "scikit-image")} | {"code": code}


def read_cache(folder):
    """{key: score} of every earlier call. What is no record (cut off by a kill, damaged) is skipped: its score is computed again."""
    scores = {}
    for line in (line for file in sorted(folder.glob("*.jsonl")) for line in file.read_bytes().splitlines()):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("key"), str) and isinstance(row.get("score"), float) and math.isfinite(row["score"]):
            scores[row["key"]] = row["score"]
    return scores


def score_keys(stem, item, rows, metrics, protocol, degradation, gold, libraries):
    """{(row, or file of a version, metric): key}: a hash of everything that this score depends on."""
    lq = [digest(item["lq"] or item["versions"][0]), degradation]
    against = [protocol["border"], protocol["y"], [digest(path) for path in item["refs"]]]
    judged = {name: [row.identity if row.files is None else digest(row.files[stem]), lq] for name, row in rows.items()}
    candidates, keys = {path: ["version", digest(path)] for path in item["versions"]} if gold else {}, {}
    for m, metric in metrics.items():
        how = [metric.identity, libraries, against if metric.full_reference else None]
        keys |= {(who, m): digest([what, how]) for who, what in (judged if metric.full_reference else judged | candidates).items()}
    return keys


@torch.no_grad()
def score(rows, items, metrics, folder, world, protocol, degradation=None, gold=False, batch_size=8):
    """-> {row: {stem: {metric: value}}}; what is not in the cache `folder` is computed, ranks share the images.

    protocol: {"border", "y"} of full-reference metrics. gold: a first row with the best score of an image's versions by each no-reference metric.
    """
    cache, libraries, found = read_cache(folder), versions(), {}
    own = folder / f"{world.rank}.jsonl"
    own.parent.mkdir(parents=True, exist_ok=True)
    with open(own, "a") as out:
        if out.tell() and not own.read_bytes().endswith(b"\n"):                   # the last line was cut off
            out.write("\n")
        for stem, item in tqdm(list(items.items())[world.rank::world.size], unit="img", disable=not world.is_main):
            keys = score_keys(stem, item, rows, metrics, protocol, degradation, gold, libraries)
            todo = [k for k, key in keys.items() if key not in cache]
            for k, value in compute(todo, stem, item, rows, metrics, degradation, batch_size, world.device) if todo else []:
                cache[keys[k]] = value
                out.write(json.dumps({"key": keys[k], "score": value}) + "\n")
            out.flush()
            best = lambda m: (min if metrics[m].lower_is_better else max)(cache[keys[path, m]] for path in item["versions"])
            found[stem] = {"gold": {m: best(m) for m in metrics if not metrics[m].full_reference}} if gold else {}
            found[stem] |= {row: {m: cache[keys[row, m]] for m in metrics} for row in rows}
    found = {stem: scores for part in world.gather_objects(found) for stem, scores in part.items()}
    return {row: {stem: found[stem][row] for stem in items} for row in [*(["gold"] if gold else []), *rows]}


def compute(todo, stem, item, rows, metrics, degradation, batch_size, device):
    """Yield ((row or file, metric), score) of an image's `todo`; every output is made once."""
    lq = low_resolution(stem, item, degradation, device)
    images = {who: load(who, device) if isinstance(who, Path) else output(who, rows[who], stem, lq, device) for who in dict.fromkeys(who for who, _ in todo)}
    refs = [load(path, device) for path in item["refs"]] if any(metrics[m].full_reference for _, m in todo) else []
    for m in dict.fromkeys(m for _, m in todo):
        whose = [who for who, metric in todo if metric == m]
        for k in range(0, len(whose), batch_size):
            for who, value in judge(m, metrics[m], {who: images[who] for who in whose[k:k + batch_size]}, refs, stem).items():
                if not math.isfinite(value):
                    raise runs.UserError(f"{who}, image {stem}: {m} is {value}: leave this metric out, or look at the image")
                yield (who, m), value


def judge(m, metric, images, refs, stem):
    """{row: (1, 3, H, W)} -> {row: score}; with several references the mean over them (HGGT). Images of one size go through the metric together.

    ValueError names row, image, size and metric where the metric fails; running out of memory stays what it is.
    """
    if len({image.shape for image in images.values()}) == 1:
        batch = torch.cat(list(images.values()))
        try:
            if metric.full_reference:
                values = torch.stack([metric(batch, gt.expand(len(batch), -1, -1, -1)).double().cpu() for gt in refs]).mean(0)
            else:
                values = metric(batch, None).double()
            return dict(zip(images, values.tolist()))
        except (RuntimeError, ValueError) as error:
            if archs.out_of_memory(error):
                raise
            if len(images) == 1:
                height, width = batch.shape[2:]
                raise runs.UserError(f"{next(iter(images))}, image {stem} ({width}x{height} pixels): {m} cannot judge it ({' '.join(str(error).split())[:150]}): "
                                 "leave out the metric, or images of this size") from error
    return {who: value for who, image in images.items() for value in judge(m, metric, {who: image}, refs, stem).values()}
