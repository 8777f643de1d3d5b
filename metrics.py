"""How super-resolved images are judged: full-reference metrics, structured noise, the NR-IQA models of iqa.py.

    metric = create_metric("niqe", device)
    metric(sr, gt)                                           (B, 3, H, W) RGB in [0, 1] twice -> (B,), native units
    score(rows, items, metrics, cache, world, protocol)      {row: {stem: {metric: value}}}, each computed once
"""
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from tqdm import tqdm

import archs
import degradations
import iqa
import losses
import runs
from images import cut_to_x4, image_size, load_image, save_image

# metrics that compare with a reference; pyiqa knows further ones
FULL_REFERENCE = ("psnr", "ssim", "vgg", "flat_hf", "lpips", "stlpips", "dists")


def luma(x):
    """(B, 3, H, W) RGB in [0, 1] -> (B, 1, H, W): Y of BT.601, 16/255 to 235/255, as MATLAB's rgb2ycbcr and BasicSR."""
    return (x * x.new_tensor([65.481, 128.553, 24.966]).view(3, 1, 1)).sum(1, keepdim=True) / 255 + 16 / 255


def grey_levels(x):
    """(B, 3, H, W) RGB in [0, 1] -> (B, H, W) float64: luma of BT.601 from 0 to 255."""
    return (255 * x.double() * x.new_tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)).sum(1)


def crop(x, border):
    return x[..., border:x.shape[2] - border, border:x.shape[3] - border]


def psnr(sr, gt, border=4):
    """Peak signal-to-noise ratio in dB of (B, C, H, W) in [0, 1], over all channels, `border` pixels cropped. -> (B,)

    HGGT crops 4 pixels. Identical images give 100. UserError for another shape, or one of which the border leaves
    nothing.
    """
    check_pair("PSNR", sr, gt, border)
    error = crop(sr - gt, border).double().square().mean((1, 2, 3))
    return -10 * error.clamp_min(1e-10).log10()


def ssim(sr, gt, border=4):
    """Structural similarity (Wang et al., 2004) of (B, C, H, W) in [0, 1]: mean over channels. -> (B,)

    `border` pixels are cropped (HGGT); 11x11 Gaussian window of sigma 1.5, valid region only. UserError as psnr.
    """
    check_pair("SSIM", sr, gt, border + 5)
    images = [crop(image, border).double().cpu().numpy() for image in (sr, gt)]
    return torch.tensor([structural_similarity(a, b, data_range=1, gaussian_weights=True, sigma=1.5,
                                               use_sample_covariance=False, channel_axis=0)
                         for a, b in zip(*images)], dtype=torch.float64)


def flat_hf(sr, gt, block=16, flat=0.25):
    """Grid and noise in flat places: high-frequency share of the spectral energy of flat blocks.

    sr, gt: (B, 3, H, W) RGB in [0, 1] -> (B,) in [0, 1]. Flat are the quarter of the reference's 16x16 blocks with
    the least standard deviation of luma (a border of 16 pixels is left out), so that all methods are judged at the
    same places. The energy is that of SR's luma, mean removed, under a Hann window, of these blocks together; high is
    from 0.25 cycles per pixel upwards in either direction, where the 4-pixel grid of an x4 pixel shuffle has its
    lowest line. UserError as psnr.
    """
    check_pair("flat_hf", sr, gt, 2 * block)

    def blocks(image):
        inside = crop(grey_levels(image)[:, None], block)[:, 0]
        return inside.unfold(1, block, block).unfold(2, block, block).flatten(1, 2)  # (B, N, 16, 16)

    spread = blocks(gt).flatten(2).std(2)
    flattest = spread.argsort(1)[:, :max(1, int(flat * spread.shape[1]))]
    chosen = blocks(sr).gather(1, flattest[..., None, None].expand(-1, -1, block, block))
    window = torch.hann_window(block, periodic=False, dtype=torch.float64, device=sr.device)
    windowed = (chosen - chosen.mean((2, 3), keepdim=True)) * window * window[:, None]
    energy = torch.fft.fft2(windowed).abs().square().sum(1)
    high = torch.fft.fftfreq(block, device=sr.device).abs() >= 0.25
    return (energy * (high | high[:, None])).sum((1, 2)) / energy.sum((1, 2)).clamp_min(1e-9)


# CHOICE, fixed on synthetic grids before any fine-tuning was judged: see tests/test_finetune.py
PEAKS_ABOVE_UNSHARP = 0.03


def noise_peaks(residual, window=64, low=0.2, times=8.0):
    """Structured noise: share of the spectral energy of a change that stands in isolated high-frequency peaks.

    residual: (B, 3, H, W), SR of the tuned network minus SR of its base, sides of at least 64 -> (B,) in [0, 1]. A
    pixel grid is a few sharp peaks; sharpening and new texture spread smoothly. The spectrum of the luma is averaged
    over half-overlapping 64x64 Hann windows; a peak is a frequency of `low` cycles per pixel or more, in either
    direction, with `times` the energy of the median of its 9x9 neighbours; its energy is what exceeds that median. 0
    for no change at all.
    """
    grey = grey_levels(residual)
    if min(grey.shape[1:]) < window:
        raise runs.UserError(f"noise_peaks: the sides must have at least {window} pixels, got {tuple(grey.shape[1:])}")
    blocks = grey.unfold(1, window, window // 2).unfold(2, window, window // 2).flatten(1, 2)  # (B, N, 64, 64)
    hann = torch.hann_window(window, dtype=torch.float64, device=grey.device)
    # the energy of a change of a tenth of a grey level
    floor = 0.1 ** 2 * window ** 2 * hann.square().sum() ** 2
    windowed = (blocks - blocks.mean((2, 3), keepdim=True)) * hann * hann[:, None]
    power = torch.fft.fft2(windowed).abs().square()  # (B, N, 64, 64)
    power = (power / (power.sum((2, 3), keepdim=True) + floor)).mean(1)
    wrapped = F.pad(power[:, None], (4, 4, 4, 4), mode="circular")[:, 0]
    around = wrapped.unfold(1, 9, 1).unfold(2, 9, 1).flatten(3).median(3).values
    high = torch.fft.fftfreq(window, device=grey.device).abs() >= low
    peaks = (power > times * around) & (high | high[:, None])
    return ((power - around) * peaks).sum((1, 2))


def unsharp(images, amount):
    """8-bit result of a plain unsharp mask, Gaussian of sigma 1.5, of (B, 3, H, W)."""
    blurred = degradations.blur(images, degradations.gaussian_kernel(9, 1.5))
    return degradations.to_8bit(images + amount * (images - blurred))


def unsharp_like(base, sr, reward, amounts=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)):
    """A plain unsharp mask (sigma 1.5) of `base`: the weakest with at least the reward of `sr`, else the best one.

    (1, 3, H, W) twice -> the mask's image, and whether it has as much reward: sharpening alone often cannot earn as
    much as tuning.
    """
    best, goal = (-math.inf, base), reward(sr).item()
    for amount in amounts:
        image = unsharp(base, amount)
        best = max(best, (reward(image).item(), image), key=lambda pair: pair[0])
        if best[0] >= goal:
            break
    return best[1], best[0] >= goal


def check_pair(metric, sr, gt, border):
    if sr.shape != gt.shape or min(sr.shape[2:]) <= 2 * border:
        raise runs.UserError(f"{metric} of an output of {tuple(sr.shape[2:])} pixels against a reference of "
                             f"{tuple(gt.shape[2:])}: the reference must be x4 the input, and more than "
                             f"{2 * border} pixels")


@dataclass(frozen=True)
class Metric:
    """metric(sr, gt): (B, 3, H, W) RGB in [0, 1] twice -> (B,) in native units; gt is not used unless full_reference.

    identity: plain values that a score depends on, beside images, border and luma.
    """
    function: Callable
    lower_is_better: bool = False
    full_reference: bool = False
    identity: object = None

    def __call__(self, sr, gt):
        # those without a reference are rewards, which see to it
        return iqa.scores_of(self.function, sr, gt) if self.full_reference else self.function(sr, gt)


def create_metric(name, device, weights_file=None, border=4, y=False, flag="--metrics"):
    """The Metric called `name`, for evaluation.

    name: psnr, ssim (y: on luma only), vgg (distance of VGG19 features, the loss of Eq. 1), flat_hf, a pyiqa metric
    (lpips, stlpips and dists are full-reference ones; niqe, musiq, ... are not), ranker, a reward file PATH.pth, or
    module:function. border: pixels that full-reference metrics but vgg and flat_hf crop from every side (HGGT, LPIPS
    and DISTS included); no-reference ones see the whole image. weights_file: a local copy of the weights. flag: named
    in errors. Raises as iqa.create_reward does.
    """
    if "=" in name:
        raise runs.UserError(f"{flag} {name}: a metric has no weight here; write {name.partition('=')[0]}")
    if name == "vgg":
        return vgg_metric(device, weights_file)
    if name == "flat_hf":
        return Metric(flat_hf, True, True, [name])
    if name in ("psnr", "ssim"):
        function, part = {"psnr": psnr, "ssim": ssim}[name], luma if y else nn.Identity()
        return Metric(lambda sr, gt: function(part(sr), part(gt), border), False, True, [name])
    own = name == "ranker" or runs.finds_own_weights(name)
    if not own and iqa.pyiqa_modes().get(name) == "FR":
        model = iqa.pyiqa_model(name, device, weights_file, mode="FR", flag=flag)

        @torch.no_grad()
        def compare(sr, gt):
            check_pair(name, sr, gt, border)
            return model(crop(sr, border), crop(gt, border)).reshape(-1).float()
        return Metric(compare, model.lower_better, True, [name, iqa.tensors_hash(model)])
    reward = iqa.create_reward([name], device, weights_file, flag=flag)
    sign = -1 if getattr(next(iter(reward.models.values())), "lower_better", False) else 1
    return Metric(lambda sr, gt: sign * reward(sr), sign < 0, False, reward.identity())


def vgg_metric(device, weights_file):
    """The perceptual loss of Eq. 1 as a metric."""
    distance = losses.VGGFeatureLoss(weights_file, "--metric-weights vgg=FILE").to(device)

    def compare(sr, gt):
        # one ground truth, expanded: its features are computed once
        features = distance.taps(gt[:1]) if gt.stride(0) == 0 else None
        return torch.stack([distance(a[None], b[None], features) for a, b in zip(sr, gt)])
    return Metric(compare, True, True, ["vgg", iqa.tensors_hash(distance)])


# Perceptual distances of two (B, 3, H, W) in [0, 1], frozen, with a gradient to the images: for self-supervision and
# diversity

class LPIPS(nn.Module):
    """The lpips package's distance of two (B, 3, H, W) in [0, 1] -> (B,).

    weight (B, 1, H, W): the mean of weight times the map of distances.
    """

    def __init__(self, net):
        super().__init__()
        import lpips
        try:
            self.net = lpips.LPIPS(net=net, verbose=False).requires_grad_(False)
        # URLError among others
        except OSError as error:
            file = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}[net]
            reason, folder = " ".join(str(error).split())[:80], Path(torch.hub.get_dir()) / "checkpoints"
            raise runs.UserError(f"--distance lpips: {file} is not here and could not be fetched ({reason}): "
                                 f"put it into {folder} ({runs.how_to_get(file)}), or take --distance vgg (VGG19's "
                                 "weights) or proxy (none) in pretraining") from None

    def forward(self, a, b, weight=None):
        with torch.autocast(a.device.type, enabled=False):
            self.net.spatial = weight is not None
            value = self.net(a.float(), b.float(), normalize=True)
            return value[:, 0, 0, 0] if weight is None else (value * weight).mean((1, 2, 3))


def open_vgg(weights, instead):
    """losses.VGGFeatureLoss; instead: another way out where its weights are missing, for the error."""
    return losses.VGGFeatureLoss(weights, f"--vgg-weights FILE, or {instead}")


class VGGCosine(nn.Module):
    """Mean over VGG19's stages of 1 - cosine of the feature vectors at each place: LPIPS without learned weights.

    In [0, 1]. (The paper calls LPIPS "the cosine distance in [0, 1] between image features"; this is one.) stages: so
    many of the five, from the first on; the last ReLU of each.
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
        """The feature vectors of each stage, of length 1."""
        x, features = (x - self.mean) / self.std, []
        for k, layer in enumerate(self.features):
            x = layer(x)
            if k in self.TAPS:
                features.append(x)
        with torch.autocast(x.device.type, enabled=False):
            return [f / (f.square().sum(1, keepdim=True) + 1e-10).sqrt() for f in map(torch.Tensor.float, features)]

    def forward(self, a, b, weight=None):
        # the network runs in the precision of the caller, the cosine in fp32
        pairs = zip(self.directions(a.float()), self.directions(b.float()))
        with torch.autocast(a.device.type, enabled=False):
            maps = [1 - (u * v).sum(1, keepdim=True) for u, v in pairs]
            if weight is not None:
                maps = [F.interpolate(m, size=a.shape[2:], mode="bilinear") * weight for m in maps]
            return sum(m.mean((1, 2, 3)) for m in maps) / self.stages


class Proxy(nn.Module):
    """A distance without weights, not a published one: L1 of three levels of a Laplacian pyramid and of gradients.

    In [0, 1]: each of the four terms is divided by the mean absolute value that both images have of it.
    """

    def terms(self, x):
        terms = [torch.cat([x.diff(dim=2, append=x[:, :, -1:]), x.diff(dim=3, append=x[..., -1:])], 1)]
        for _ in range(3):
            small = F.avg_pool2d(x, 2)
            terms.append(x - F.interpolate(small, size=x.shape[2:], mode="bilinear"))
            x = small
        return terms

    def forward(self, a, b, weight=None):
        total = 0
        for u, v in zip(self.terms(a), self.terms(b)):
            scale = (u.abs() + v.abs()).mean((1, 2, 3)).detach() + 1e-4
            m = (u - v).abs().mean(1, keepdim=True)
            m = m if weight is None else F.interpolate(m, size=a.shape[2:], mode="bilinear") * weight
            total = total + m.mean((1, 2, 3)) / scale / 4
        return total


def create_distances(name, vgg_weights=None, stages=5):
    """-> (distance for L_rec, distance for HQI): LPIPS of VGG and AlexNet (CHOICE: not in the papers), or one."""
    if name == "lpips":
        return LPIPS("vgg").eval(), LPIPS("alex").eval()
    distance = (VGGCosine(vgg_weights, stages) if name == "vgg" else Proxy()).eval()
    return distance, distance


# Scores of many outputs: every image through every row and metric, once; kept on disk (iqa.ScoreCache) and shared by
# processes. items: {stem: {"lq": path or None, "refs": [path], "versions": [path]}}, lq None: made from versions[0]
# by a degradation, "rgb": True where grey and transparent images are taken; rows: {name: Row}; metrics: {name: Metric}

class Row(NamedTuple):
    """A row of the table: a network, or ready-made images.

    make: lq (1, 3, h, w) -> (1, 3, 4h, 4w), of which `identity` is the hash; or files: {stem: image}. record: for the
    JSON.
    """
    make: Callable | None = None
    files: dict | None = None
    identity: str | None = None
    record: dict | None = None


def load(path, device, rgb=False):
    """-> (1, 3, H, W) in [0, 1]; rgb: see load_image"""
    return load_image(path, rgb)[None].to(device).float() / 255


def low_resolution(stem, item, degradation, device):
    """The LR image of an item, or the one that `degradation` always makes of its original. -> (1, 3, h, w) in [0, 1]"""
    if item["lq"] is not None:
        return load(item["lq"], device, item.get("rgb"))
    original = item["versions"][0]
    image = high_resolution(original, item, device)
    try:
        return degradations.fixed(image, degradation, stem)
    except runs.UserError as error:
        raise runs.UserError(f"{original}: {error}") from None


def is_cut(path, item):
    """Is this an original or a reference? Then it is cut to multiples of 4, as public sets make their LR images."""
    return path in (*item["refs"], *item["versions"])


def high_resolution(path, item, device):
    """An original, reference or output of an item, cut where is_cut says so. -> (1, 3, H, W) in [0, 1]"""
    image = load(path, device, item.get("rgb"))
    return cut_to_x4(image) if is_cut(path, item) else image


def high_resolution_size(path, item):
    """(width, height) of high_resolution, from the header."""
    size = image_size(path)
    return tuple(side // 4 * 4 for side in size) if is_cut(path, item) else size


def bicubic(lq):
    """(B, 3, h, w) -> (B, 3, 4h, 4w), not clamped: Keys's kernel with a = -0.5, as MATLAB's imresize and Pillow.

    PyTorch takes a = -0.5 where it is asked to antialias, which an enlargement needs not, else -0.75.
    """
    return F.interpolate(lq, scale_factor=4, mode="bicubic", antialias=True)


def output(name, row, stem, item, lq, device):
    """The 8-bit output of one row, (1, 3, H, W). UserError if a network gives what is not finite."""
    if row.files is not None:
        return high_resolution(row.files[stem], item, device)
    sr = row.make(lq)
    if not torch.isfinite(sr).all():
        raise runs.UserError(f"{name}, image {stem}: the network's output is not finite: look at its weights")
    return degradations.to_8bit(sr)


def reference_cells(item):
    """{"GT", "GT 2", ...: file} of an item."""
    return {f"GT {k + 1}" if k else "GT": path for k, path in enumerate(item["refs"])}


def image_files(stem, item, rows):
    """{"LR", "GT", "GT 2", ..., then the rows: file} of an item; None where the image is computed."""
    files = reference_cells(item) | {name: row.files and row.files[stem] for name, row in rows.items()}
    cut = [cell for cell, path in files.items() if path and image_size(path) != high_resolution_size(path, item)]
    return {"LR": item["lq"]} | files | dict.fromkeys(cut)


def saved_files(folder, stem, item, rows):
    """image_files with the places of the computed ones, which score(save=folder) leaves."""
    return {cell: path or folder / cell / f"{stem}.png" for cell, path in image_files(stem, item, rows).items()}


# Scores

def versions():
    """Installed libraries that scores depend on, and the version of our own scoring."""
    modules = {"torch": "torch", "torchvision": "torchvision", "pyiqa": "pyiqa", "scikit-image": "skimage"}
    libraries = [name for name, module in modules.items() if importlib.util.find_spec(module)]
    return {name: importlib.metadata.version(name) for name in libraries} | {"scoring": iqa.SCORING_VERSION}


def score_keys(stem, item, rows, metrics, protocol, degradation, gold, libraries):
    """{(row, or file of a version, metric): key}: a hash of everything that this score depends on."""
    lq = [runs.digest(item["lq"] or item["versions"][0]), degradation]
    references = [protocol["border"], protocol["y"], [runs.digest(path) for path in item["refs"]]]

    def of_file(path):
        return ["file", runs.digest(path), is_cut(path, item)]
    images = {name: [row.identity, lq] if row.files is None else of_file(row.files[stem]) for name, row in rows.items()}
    versions_of_item = {path: of_file(path) for path in item["versions"]} if gold else {}
    keys = {}
    for m, metric in metrics.items():
        judge = [metric.identity, libraries, references if metric.full_reference else None]
        judged = images if metric.full_reference else images | versions_of_item
        keys |= {(name, m): runs.digest([image, judge]) for name, image in judged.items()}
    return keys


@torch.no_grad()
def score(rows, items, metrics, folder, world, protocol, degradation=None, gold=False, batch_size=8, save=None):
    """-> {row: {stem: {metric: value}}}; a score that is not in the cache `folder` is computed, ranks share the images.
    A score that is not finite is left out, and computed again by the next call.
    protocol: {"border", "y"} of full-reference metrics. gold: a first row with the best score of an image's versions
    by each no-reference metric. save: a folder for everything that is computed, see saved_files; the networks then
    run whatever the cache holds, so that the images are theirs.
    """
    libraries, by_stem = versions(), {}
    with iqa.ScoreCache(folder, "scores", world.rank) as cache:
        # a bar only where the output is a terminal
        hidden = None if world.is_main else True
        for stem, item in tqdm(list(items.items())[world.rank::world.size], unit="img", disable=hidden):
            keys = score_keys(stem, item, rows, metrics, protocol, degradation, gold, libraries)
            todo = [k for k, key in keys.items() if key not in cache.scores]
            if todo or save:
                images = make_images(todo, stem, item, rows, degradation, world.device, save)
                for k, value in compute(todo, stem, item, images, metrics, batch_size, world.device):
                    if math.isfinite(value):
                        cache.add(keys[k], value)
            known = {k: cache.scores[key] for k, key in keys.items() if key in cache.scores}
            by_stem[stem] = {row: {m: known[row, m] for m in metrics if (row, m) in known} for row in rows}
            if gold:
                of_versions = {m: [known[path, m] for path in item["versions"] if (path, m) in known]
                               for m, metric in metrics.items() if not metric.full_reference}
                by_stem[stem]["gold"] = {m: best(values, metrics[m]) for m, values in of_versions.items() if values}
    by_stem = {stem: scores for part in world.gather_objects(by_stem) for stem, scores in part.items()}
    return {row: {stem: by_stem[stem][row] for stem in items} for row in [*(["gold"] if gold else []), *rows]}


def best(scores, metric):
    return (min if metric.lower_is_better else max)(scores)


def score_references(items, metrics, folder, world, protocol, batch_size=8):
    """-> {stem: {"GT", "GT 2", ...: {metric: value}}}: the references themselves, by the no-reference metrics."""
    metrics = {m: metric for m, metric in metrics.items() if not metric.full_reference}
    by_stem = {stem: {} for stem in items}
    for cell in dict.fromkeys(cell for item in items.values() for cell in reference_cells(item)):
        files = {stem: reference_cells(item)[cell] for stem, item in items.items() if cell in reference_cells(item)}
        having = {stem: items[stem] for stem in files}
        for stem, values in score({cell: Row(files=files)}, having, metrics, folder, world, protocol,
                                  batch_size=batch_size)[cell].items():
            by_stem[stem][cell] = values
    return by_stem


def make_images(todo, stem, item, rows, degradation, device, save=None):
    """{row, or file of a version: (1, 3, H, W)} of the images that are to be judged; save: of all rows, kept there."""
    names = dict.fromkeys([*(name for name, _ in todo), *(rows if save else [])])
    computes = save or any(name in rows and rows[name].files is None for name in names)
    lq = low_resolution(stem, item, degradation, device) if computes else None
    images = {}
    for name in names:
        images[name] = (output(name, rows[name], stem, item, lq, device) if name in rows else
                        high_resolution(name, item, device))
    if save:
        references = {cell: high_resolution(path, item, device) for cell, path in reference_cells(item).items()}
        computed = [cell for cell, path in image_files(stem, item, rows).items() if path is None]
        for cell in computed:
            image = ({"LR": lq} | references | images)[cell][0]
            runs.write_atomic(save / cell / f"{stem}.png", partial(save_image, image=image))
    return images


def compute(todo, stem, item, images, metrics, batch_size, device):
    """Yield ((row or file, metric), score) of the scores that are to be computed for an item."""
    compares = any(metrics[m].full_reference for _, m in todo)
    refs = [high_resolution(path, item, device) for path in item["refs"]] if compares else []
    for m in dict.fromkeys(m for _, m in todo):
        names = [name for name, metric in todo if metric == m]
        for k in range(0, len(names), batch_size):
            batch = {name: images[name] for name in names[k:k + batch_size]}
            for name, value in judge(m, metrics[m], batch, refs, stem).items():
                yield (name, m), value


def judge(m, metric, images, refs, stem):
    """{row: (1, 3, H, W)} -> {row: score}; with several references the mean over them (HGGT).

    Images of one size go through the metric together. UserError names row, image, size and metric where the metric
    fails; an error of memory that does not suffice is passed on.
    """
    if len({image.shape for image in images.values()}) == 1:
        batch = torch.cat(list(images.values()))
        try:
            if metric.full_reference:
                of_each = [metric(batch, gt.expand(len(batch), -1, -1, -1)).double().cpu() for gt in refs]
                values = torch.stack(of_each).mean(0)
            else:
                values = metric(batch, None).double()
            return dict(zip(images, values.tolist()))
        # a metric may raise anything
        except Exception as error:
            if archs.out_of_memory(error):
                raise
            if len(images) == 1:
                (name, image), reason = *images.items(), " ".join(str(error).split())[:150]
                size = f"{image.shape[3]}x{image.shape[2]}"
                raise runs.UserError(f"{name}, image {stem} ({size} pixels): {m} cannot judge it ({reason}): "
                                     "leave out the metric, or images of this size") from error
    return {name: value for name in images for value in judge(m, metric, {name: images[name]}, refs, stem).values()}
