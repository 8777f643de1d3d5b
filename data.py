"""Quintuplets (one original, several enhanced ground truths), their labels, the GT samplers of paper Sec. 4.2, the pair pool.

Layout (HGGT as released, and what make_quintuplets.py writes):
    ROOT/Train/images/<any>/{original,01,02,03,04}/     original/<stem>.png, 0k/<stem>_0k.png; <stem> = <photo>-<row>-<column>
    ROOT/Train/labels/<any>/{A,B,C}/<stem>.json         three annotators; needed by upos and smp only
    ROOT/Test/GT/<any>/{images,labels}/...              same, never trained on
    ROOT/Test/Blind_Degradation_Benchmark_LQ/<any>/Blind_LR/<stem>.png
Images are (3, H, W) uint8 RGB until they reach the device. Any number of enhanced folders (two digits) works; HGGT has four.
"""
import hashlib
import json
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import degradations
import runs
from images import check_mode, cut_to_x4, image_size, list_images, load_image, open_image

# HGGT's integer codes
ORIGINAL, POSITIVE, SIMILAR, NEGATIVE = 0, 1, 2, 3
LABELS = {"Positive": POSITIVE, "Similar": SIMILAR, "Negative": NEGATIVE}
# What each sampler looks at: labels of people, static scores of whole images, online scores of the training crops.
# Plain values only: runs.literal reads them from the text of this file.
SAMPLERS = {
    "orig": [],
    "rand": [],
    "upos": ["labels"],
    "sma": ["static"],
    "smp": ["labels", "static"],
    "amo": ["online"],
}
NEEDS_LABELS = tuple(name for name, needs in SAMPLERS.items() if "labels" in needs)
NEEDS_SCORES = tuple(name for name, needs in SAMPLERS.items() if "static" in needs)


def file_stem(stem, version):
    """Name, without suffix, of a version's file: `<stem>` for the original, `<stem>_01`, ... for the enhanced ones."""
    return stem if version == "original" else f"{stem}_{version}"


def photo_of(stem):
    """`<photo>-<row>-<column>`, HGGT's and prepare.quintuplets' name of a patch -> `<photo>`. Patches of one photo overlap. Not for other names."""
    return re.sub(r"-\d+-\d+$", "", stem)


# Labels

def vote(a, b, c):
    """HGGT's merging of three annotators: the majority; three different votes count as SIMILAR."""
    if b == c:
        return b
    return a if a in (b, c) else SIMILAR


def read_label(path, stem, versions):
    """One annotator's JSON -> {version: code} of the enhanced versions. The folder named in `File` decides, not the number.

    ValueError when an entry is missing, doubled, unknown, belongs to another stem, or carries an unexpected label.
    """
    try:
        entries = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise runs.UserError(f"{path}: label missing; every quintuplet needs the votes of annotators A, B and C") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise runs.UserError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(entries, dict):
        raise runs.UserError(f"{path}: not a label file; expected an object with Picture_1, Picture_2, ...")
    codes = {}
    for key, entry in entries.items():
        if not key.startswith("Picture_"):
            continue
        if not isinstance(entry, dict):
            raise runs.UserError(f"{path}: {key} is {entry!r}; expected an object with Name, File and Label")
        version, label, name = entry.get("File"), entry.get("Label"), entry.get("Name")
        if version not in versions or version in codes:
            raise runs.UserError(f"{path}: {key} has File {version!r}; expected each of {versions} once")
        if Path(str(name)).stem != file_stem(stem, version):
            raise runs.UserError(f"{path}: {key} names {name!r}, which is not version {version!r} of {stem}")
        if version != "original" and label not in LABELS:
            raise runs.UserError(f"{path}: {key} has Label {label!r}; expected one of {list(LABELS)}")
        codes[version] = ORIGINAL if version == "original" else LABELS[label]
    missing = [v for v in versions[1:] if v not in codes]
    if missing:
        raise runs.UserError(f"{path}: no label for version(s) {missing}")
    return codes


# Quintuplets on disk

class Sets:
    """Images that belong together by stem: `stems` (sorted), `versions` (original first), where their files are.

    files: {version: {file stem: path}}. Plain photos have the one version "original". label_folder holds A, B and C; lq is
    {stem: path} of ready-made LR images, if any. patches: stems are <photo>-<row>-<column>, as HGGT and prepare.quintuplets name them; of other
    names nothing is read.
    """

    def __init__(self, files, label_folder=None, lq=None, stems=None, packed=None, signed=None, patches=True):
        self.files, self.label_folder, self.lq, self.packed, self.patches = files, label_folder, lq, packed, patches
        self.versions, self.signed = list(files), signed
        self.stems = sorted(files["original"]) if stems is None else stems

    def path(self, stem, version="original"):
        return self.files[version][file_stem(stem, version)]

    def photo(self, stem):
        """The photograph that an image is a patch of; plain photographs are their own."""
        return photo_of(stem) if self.patches else stem

    def all_files(self):
        """Every image file that is read from."""
        return [self.packed.file] if self.packed else [self.path(stem, version) for stem in self.stems for version in self.versions]

    def read(self, stem, version):
        """(3, H, W) uint8 array: a decoded image, or a view of the packed file, of which only what is copied leaves the disk."""
        return self.packed.read(stem, version) if self.packed else load_image(self.path(stem, version)).numpy()

    def size(self, stem, version="original"):
        """(width, height) of an image."""
        return tuple(self.packed.place(stem, version)[:0:-1]) if self.packed else image_size(self.path(stem, version))

    def signature(self):
        """Hash over all images' names, file sizes, and 256 bytes at the beginning, middle and end: what a packed file and an atlas belong to.

        An image that changed elsewhere only, and kept its size, goes unnoticed: a PNG's or JPEG's bytes do not do that, a BMP's may.
        """
        def sample(name):
            with open(self.path(*name), "rb") as file:
                size = file.seek(0, 2)
                parts = [(file.seek(at), file.read(256))[1] for at in (0, size // 2, max(0, size - 256))]
            return f"{name} {size} ".encode() + b"".join(parts)
        # computed once: all files are opened for it
        if self.signed:
            return self.signed
        digest = hashlib.sha256()
        with ThreadPoolExecutor(8) as pool:
            for part in pool.map(sample, [(stem, version) for stem in sorted(self.files["original"]) for version in self.versions]):
                digest.update(part)
        self.signed = digest.hexdigest()[:16]
        return self.signed

    def hold_out(self, photos, seed, flag="--val-photos"):
        """-> (Sets without, Sets with only) `photos` photos drawn by seed. All patches of a photo stay on one side. flag: named in errors."""
        names = sorted({self.photo(s) for s in self.stems})
        if not 0 < photos < len(names):
            raise runs.UserError(f"{flag} {photos}: the data set has {len(names)} photos; hold out between 1 and {len(names) - 1}")
        held = set(np.random.default_rng(seed).permutation(names)[:photos].tolist())
        sides = [[s for s in self.stems if (self.photo(s) in held) == side] for side in (False, True)]
        return tuple(Sets(self.files, self.label_folder, self.lq, stems, self.packed, self.signed, self.patches) for stems in sides)

    def labels(self):
        """Merged labels, (number of stems, number of versions) int64; column 0 is ORIGINAL."""
        if self.label_folder is None:
            raise runs.UserError(f"{next(iter(self.files['original'].values())).parent.parent}: no labels beside it (labels/<any>/A, B, C): "
                             "samplers upos and smp need them; rand, sma and amo work without")
        for annotator in "ABC":
            if not (self.label_folder / annotator).is_dir():
                raise runs.UserError(f"{self.label_folder / annotator}: missing; HGGT's vote needs three annotators A, B and C")
        rows = []
        for stem in self.stems:
            a, b, c = (read_label(self.label_folder / n / f"{stem}.json", stem, self.versions) for n in "ABC")
            rows.append([ORIGINAL] + [vote(a[v], b[v], c[v]) for v in self.versions[1:]])
        return torch.tensor(rows)


def find_photos(folder, flag="--data"):
    """A folder of photographs as Sets with the one version "original"; a quintuplet data set, or its folder of originals, gives those."""
    if not Path(folder).is_dir():
        raise runs.UserError(f"{folder}: no such folder; {flag} DIR names the photographs, --demo needs no download")
    if (Path(folder) / "Train").is_dir():
        return Sets({"original": find_sets(folder, "Train").files["original"]})
    patches = Path(folder).name.lower() == "original" and (Path(folder).parent / "01").is_dir()
    return Sets({"original": list_images(folder)}, patches=patches)


def find_folders(root, split):
    """Where split "Train" or "Test" lies under `root`: {"images": {version: folder}, "labels": folder or None, "lq": folder or None}.

    None for a Test split that is not there; FileNotFoundError or ValueError when the layout above is not met.
    """
    root = Path(root)
    if not root.is_dir():
        raise runs.UserError(f"{root}: no such data set; README says how to get HGGT (--data DIR), --demo needs no download")
    base = root / "Train" if split == "Train" else root / "Test" / "GT"
    # the test archive is said to spell it both ways
    originals = sorted(p for p in base.glob("**/[Oo]riginal") if p.is_dir())
    if not originals:
        if split == "Test":
            return None
        raise runs.UserError(f"{base}: no images/*/original folder under it; expected HGGT's layout (see data.py)")
    if len(originals) > 1:
        raise runs.UserError(f"{base}: several sets ({', '.join(str(o.parent) for o in originals)}): keep one")
    images = originals[0].parent
    enhanced = sorted(f for f in images.iterdir() if f.is_dir() and re.fullmatch(r"\d\d", f.name))
    if not enhanced:
        raise runs.UserError(f"{images}: no folders of enhanced versions (01, 02, ...) beside {originals[0].name}/")
    labels = sorted({p.parent for p in base.glob("**/labels/**/[ABC]") if p.is_dir()})
    lq = sorted((root / "Test").glob("**/Blind_LR")) if split == "Test" else []
    for several in (labels, lq):
        if len(several) > 1:
            raise runs.UserError(f"{base}: one set of images but {len(several)} folders {', '.join(map(str, several))}: keep one")
    return {"images": {"original": originals[0]} | {f.name: f for f in enhanced},
            "labels": labels[0] if labels else None, "lq": lq[0] if lq else None}


def find_sets(root, split, packed=True):
    """The Sets of split "Train" or "Test" under `root`, in the layout above; None for a Test split that is not there. packed: read from packed images, if there are any."""
    folders = find_folders(root, split)
    if folders is None:
        return None
    files = {version: list_images(folder) for version, folder in folders["images"].items()}
    for version, folder in list(folders["images"].items())[1:]:
        expected = {f"{s}_{version}" for s in files["original"]}
        for problem, names in (("missing", expected - set(files[version])), ("without an original", set(files[version]) - expected)):
            if names:
                raise runs.UserError(f"{folder}: {len(names)} files {problem} (of {len(expected)} expected), first {min(names)}.png: "
                                 "fetch or make the data set again; python -m prepare.verify verify DIR lists everything")
    lq = folders["lq"]
    ready = list_images(lq) if lq else None
    missing = set(files["original"]) - set(ready or files["original"])
    if missing:
        raise runs.UserError(f"{lq}: no LR image for {len(missing)} of the test set's originals, first {min(missing)}.png")
    for stem in sorted(files["original"]) if ready else []:
        check_lr_size(ready[stem], image_size(ready[stem]), image_size(files["original"][stem]))
    sets = Sets(files, folders["labels"], ready)
    if packed and (Path(root) / "packed" / f"{split}.json").exists():
        from prepare.pack import Packed
        sets.packed = Packed(Path(root) / "packed", split, sets)
    return sets


def find_realsr(root):
    """RealSR v3's x4 test images: {"<camera>_<name>": (LR path, HR path)} of <root>/<camera>/Test/4/<name>_LR4.png and _HR.png; {} if there are none."""
    pairs = {}
    for hr in sorted(Path(root).glob("*/Test/4/*_HR.png")):
        name = hr.name.removesuffix("_HR.png")
        lq = hr.with_name(f"{name}_LR4.png")
        if not lq.exists():
            raise runs.UserError(f"{lq}: missing, the LR image of {hr.name}: fetch RealSR v3 again")
        pairs[f"{hr.parts[-4]}_{name}"] = lq, hr
    return pairs


def check_lr_size(path, size, hr_size):
    """ValueError unless an LR image of `size` (width, height) is a quarter of its original."""
    if size != (hr_size[0] // 4, hr_size[1] // 4):
        raise runs.UserError(f"{path}: {size[0]}x{size[1]} pixels, expected a quarter of its original's {hr_size[0]}x{hr_size[1]}")


# Ground-truth samplers, paper Sec. 4.2

def candidates_for(sampler, labels):
    """The candidate set S_I of Eq. 4 as a mask: A_I = all versions, P_I = those labelled POSITIVE (never the original).

    labels: (B, K) codes, column 0 the original; only upos and smp look at the values. Returns (B, K) bool.
    CHOICE: A_I holds the original, as Eq. 4 has it; Sec. 4.2 once says "one GT out of the four".
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    if sampler in NEEDS_LABELS:
        return labels == POSITIVE
    mask = torch.ones_like(labels, dtype=torch.bool)
    if sampler == "orig":
        mask[:, 1:] = False
    return mask


def sampling_probs(scores, candidates, tau):
    """Probability of drawing each candidate GT: softmax(Q(S_I) / tau), paper Eq. 2-4.

    scores:     (B, K) float, NR-IQA score, higher is better, in the metric's own units (MUSIQ: 0-100)
    candidates: (B, K) bool, members of S_I; column 0 is the original
    tau:        > 0, same units as scores. Large tends to uniform (upos on positives), small to arg max
    Returns (B, K) float64; rows sum to 1, exactly 0 outside the candidates.
    Raises ValueError if tau <= 0, a row has no candidate or a candidate's score is not finite.
    """
    if not tau > 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    if not candidates.any(1).all():
        raise ValueError("a quintuplet has no candidate GT: drop sets without a positive for upos and smp")
    if not torch.isfinite(scores[candidates]).all():
        raise ValueError("a candidate's score is not finite")
    return torch.softmax((scores.double() / tau).masked_fill(~candidates, -torch.inf), 1)


def pick_gt(sampler, candidates, scores=None, tau=10.0, u=None):
    """Which version supervises each sample. -> (B,) int64 index into the versions.

    orig, rand, upos: uniform over the candidates. sma, smp: drawn from `sampling_probs` of static whole-image scores.
    amo: arg max of the scores of the training crops (tau -> 0); ties go to the earlier version, so to the original.
    u: (B,) uniform draws in [0, 1), one per sample; not used by amo.
    """
    if sampler == "amo":
        return scores.masked_fill(~candidates, -torch.inf).argmax(1)
    if sampler in NEEDS_SCORES:
        probs = sampling_probs(scores, candidates, tau)
    else:
        probs = sampling_probs(torch.zeros(candidates.shape), candidates, 1.0)
    index = (probs.cumsum(1) <= torch.as_tensor(u, dtype=torch.float64).view(-1, 1)).sum(1)
    # rounding may leave the last cumulated sum below 1
    last = (probs > 0).double().cumsum(1).argmax(1)
    return torch.minimum(index, last)


# Training pairs

def crop_like(lq, where, size, scale=4):
    """The part of each whole LR image that belongs to its HR crop. lq (B, 3, h, w), where (B, 2) HR top and left, size in HR pixels."""
    rows = [image[:, y // scale:(y + size) // scale, x // scale:(x + size) // scale] for image, (y, x) in zip(lq, where.tolist())]
    return torch.stack(rows)


def make_pair(batch, step, lanes, seeds, device, degradation, group_size, crop, reward=None, usm=False,
              sampler="amo", tau=10.0):
    """One fresh training pair per lane: lq (b, 3, p/4, p/4) and gt (b, 3, p, p) in [0, 1], which version was chosen (b,), and
    its score (b,), None unless the sampler scores online.

    The LR image is always made from the whole original, then cropped. A sampler that scores online, such as amo, sees the
    aligned crops of all versions at once.
    usm: sharpen the whole image first, for LR image and target (HGGT's psnr stage of RRDBNet).
    """
    original = batch["original"].to(device, non_blocking=True).float() / 255  # (b, 3, H, W)
    crops = batch["crops"].to(device, non_blocking=True).float() / 255  # (b, V, 3, p, p)
    if usm:
        original = degradations.usm_sharpen(original)
    lq = degradations.degrade(original, degradation, [seeds(step, lane, "degrade") for lane in lanes],
                              [seeds(step, lane // group_size, "degrade-group") for lane in lanes])
    lq = crop_like(lq, batch["where"], crop)
    versions = batch["version"].to(device, non_blocking=True)  # (b, V)
    # chosen when the sample was read
    if "candidates" not in batch:
        gt = crop_like(original, batch["where"], crop, scale=1) if usm else crops[:, 0]
        return lq, gt, versions[:, 0], batch["score"].to(device, non_blocking=True) if "score" in batch else None
    with torch.no_grad():
        scores = reward(crops.flatten(0, 1)).view(versions.shape)
    candidates, draws = (batch[name].to(device, non_blocking=True) for name in ("candidates", "draw"))
    index = pick_gt(sampler, candidates, scores, tau, draws)[:, None]
    gt = torch.take_along_dim(crops, index[:, :, None, None, None], 1)[:, 0]
    return lq, gt, versions.gather(1, index)[:, 0], scores.gather(1, index)[:, 0]


def validation_pair(sets, i, seeds, device, degradation):
    """-> lq (1, 3, h, w), gt (1, 3, 4h, 4w) in [0, 1]: image i of a validation split, with its own LR image or always the same degradation."""
    gt = load_image(sets.path(sets.stems[i]))[None].to(device).float() / 255
    gt = cut_to_x4(gt)
    # LR images that came with the set
    if sets.lq is not None:
        return load_image(sets.lq[sets.stems[i]])[None].to(device).float() / 255, gt
    return degradations.degrade(gt, degradation, [seeds(0, i, "val")], [seeds(0, i, "val-group")]), gt


def synthetic_pairs(dataset, seeds, device, degradation, patch, group_size):
    """(step, lanes, batch) -> aligned lq (b, 3, p, p) and hr (b, 3, 4p, 4p) of plain photographs: a synthetic degradation, flips and rotations."""
    def pairs(step, lanes, batch=None):
        batch = batch or collate([dataset.sample(step, lane) for lane in lanes])
        lq, hr, *_ = make_pair(batch, step, lanes, seeds, device, degradation, group_size, 4 * patch)
        turns = [int(np.random.default_rng(seeds(step, lane, "turn")).integers(4)) for lane in lanes]
        return tuple(torch.stack([image.rot90(k, (1, 2)) for image, k in zip(images, turns)]) for images in (lq, hr))
    return pairs


# Training samples

class TrainingSet(Dataset):
    """Samples by (step, lane): everything random about a sample follows from `seeds(step, lane, purpose)`.

    sets:       Sets of N stems and K versions
    labels:     (N, K) codes, needed by upos, smp and drop_without_positive; scores: (N, K) static scores, needed by sma, smp
    load_size:  0 = the whole image; otherwise a random window of that side is what the network's world consists of
    group_size: lanes that share a crop position (HGGT: one position per GPU batch)
    A sample is {"original": (3, H, W) uint8, "crops": (V, 3, crop, crop) uint8, "where": (2,) top and left of the crop,
    "version": (V,) index of each crop's version}. V is K for amo, whose sample also has "candidates" (V,) bool: `make_pair` chooses. Otherwise
    V is 1, the choice is made here, and only what the sampler needs is decoded. All images of a sample share flip, window and crop.
    atlases: [(Atlas, weight)]: amo without a reward at hand. Crops lie on the atlas' grid, the weighted sum of the tables chooses, V is 1, and
    the sample also has "score" (). tau: None arg max, else soft AMO.
    """

    def __init__(self, sets, sampler, seeds, batch_size, group_size, crop, load_size=0, tau=10.0, labels=None, scores=None,
                 atlases=()):
        self.sets, self.sampler, self.seeds = sets, sampler, seeds
        self.batch_size, self.group_size, self.crop, self.load_size = batch_size, group_size, crop, load_size
        self.tau, self.scale, self.atlases = tau, 4, list(atlases)
        codes = torch.full((len(sets.stems), len(sets.versions)), ORIGINAL) if labels is None else labels
        candidates = candidates_for(sampler, codes)
        rows = candidates.any(1).nonzero()[:, 0].tolist()
        if not rows:
            raise runs.UserError(f"no quintuplet is left to train on with sampler {sampler}: check the labels and --val-photos")
        self.stems = [sets.stems[i] for i in rows]
        self.candidates = candidates[rows]
        self.scores = None if scores is None else scores[rows]
        self.dropped = len(sets.stems) - len(rows)

    def __len__(self):
        return len(self.stems)

    # two epochs meet inside a batch
    @lru_cache(maxsize=2)
    def _order(self, epoch):
        return np.random.default_rng(self.seeds(epoch, 0, "epoch")).permutation(len(self.stems))

    def index(self, step, lane):
        """Which quintuplet lane `lane` of step `step` (1-based) trains on: a fresh permutation of all of them every epoch."""
        epoch, position = divmod((step - 1) * self.batch_size + lane, len(self.stems))
        return int(self._order(epoch)[position])

    def names(self, step):
        return [self.stems[self.index(step, lane)] for lane in range(self.batch_size)]

    def __getitem__(self, key):
        try:
            return self.sample(*key)
        except (ValueError, OSError) as error:
            # raised again by `batches`: a worker would bury it
            return error

    def sample(self, step, lane):
        index = self.index(step, lane)
        rng = {p: np.random.default_rng(self.seeds(step, lane, p)) for p in ("flip", "window", "sampler")}
        stem, candidates = self.stems[index], self.candidates[index]
        original = self._read(stem, 0)

        # where: a window of the image, mirrored or not, and in it the crop
        h, w = original.shape[1:]
        if self.load_size:
            top, left = (int(rng["window"].integers(n - self.load_size + 1)) for n in (h, w))
            h = w = self.load_size
        else:
            top, left, h, w = 0, 0, h - h % self.scale, w - w % self.scale
        # HGGT options: horizontal flip only
        flipped = rng["flip"].random() < 0.5
        u = np.random.default_rng(self.seeds(step, lane // self.group_size, "crop")).random(2)
        y, x = self.atlases[0][0].position(u) if self.atlases else (int(u[i] * ((n - self.crop) // self.scale + 1)) * self.scale for i, n in enumerate((h, w)))

        # what: the versions that the sampler needs
        more, draw = {}, rng["sampler"].random(1)
        if self.atlases:
            scores = sum(weight * atlas.scores(stem, flipped, y, x) for atlas, weight in self.atlases)
            soft = "amo" if self.tau is None else "sma"
            chosen = [int(pick_gt(soft, candidates[None], scores[None], self.tau, draw))]
            more = {"score": scores[chosen[0]]}
        elif "online" in SAMPLERS[self.sampler]:
            chosen, more = range(len(candidates)), {"candidates": candidates, "draw": torch.from_numpy(draw)}
        else:
            scores = None if self.scores is None else self.scores[index][None]
            chosen = [int(pick_gt(self.sampler, candidates[None], scores, self.tau, draw))]

        # as if the window had been mirrored first
        def cut(image, y, x, height, width):
            part = image[:, top + y:top + y + height, left + (w - x - width if flipped else x):][:, :, :width]
            part = torch.from_numpy(np.array(part))
            # PyTorch mirrors six times faster than NumPy (512 px, one thread)
            return part.flip(2) if flipped else part
        crops = [cut(original if v == 0 else self._read(stem, v, original), y, x, self.crop, self.crop) for v in chosen]
        return {"original": cut(original, 0, 0, h, w), "where": torch.tensor([y, x]), "crops": torch.stack(crops),
                "version": torch.tensor(list(chosen)), **more}

    def _read(self, stem, v, original=None):
        """(3, H, W) uint8 array of version number v, as large as its original and as the crop needs."""
        image = self.sets.read(stem, self.sets.versions[v])
        size = image.shape[:0:-1]
        check_size(self.sets.path(stem, self.sets.versions[v]), size, size if original is None else original.shape[:0:-1], max(self.crop, self.load_size))
        return image


def check_headers(dataset, world):
    """Refuse training images of a wrong size or mode before the first step, from their headers; processes share the work.

    -> {stem: (width, height)} of this process's originals. ValueError names the first one that is wrong. What only decoding finds
    (truncated files) is found when it is drawn, or by `prepare.verify verify`.
    """
    sets, need = dataset.sets, max(dataset.crop, dataset.load_size)
    mine = dataset.stems[world.rank::world.size]
    used = [v for k, v in enumerate(sets.versions) if k == 0 or dataset.candidates[:, k].any()]

    def check(stem):
        sizes = {}
        # the original comes first
        for version in used:
            path = sets.path(stem, version)
            # decoded once: sizes are in its index
            if sets.packed:
                sizes[version] = sets.size(stem, version)
            else:
                with open_image(path) as image:
                    mode, sizes[version] = image.mode, image.size
                check_mode(path, mode)
            check_size(path, sizes[version], sizes["original"], need)
        return sizes["original"]
    if sets.packed:
        return {stem: check(stem) for stem in mine}
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(mine, pool.map(check, mine)))


def check_size(path, size, original, need=0):
    """ValueError unless an image of `size` (width, height) is as large as its original, and at least `need` pixels in both."""
    if tuple(size) != tuple(original):
        raise runs.UserError(f"{path}: {size[0]}x{size[1]} pixels but its original has {original[0]}x{original[1]}: make this quintuplet again")
    if min(size) < need:
        raise runs.UserError(f"{path}: {size[0]}x{size[1]} pixels, smaller than the {need}-pixel crop: "
                         f"use --crop/--load-size of at most {min(size) // 4 * 4}")


class _Steps:
    """Batch sampler: for each step the keys (step, lane) of this process's lanes."""

    def __init__(self, first, last, lanes):
        self.first, self.last, self.lanes = first, last, lanes

    def __len__(self):
        return self.last - self.first + 1

    def __iter__(self):
        return ([(step, lane) for lane in self.lanes] for step in range(self.first, self.last + 1))


def collate(samples):
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
    # of the whole image, the first of a sample
    shapes = {tuple(next(iter(s.values())).shape[1:]) for s in samples}
    if len(shapes) > 1:
        return ValueError(f"images of different sizes in one batch ({sorted(shapes)}): set --load-size (dpo.py train: --patch) to at most the smallest side")
    return {k: torch.stack([s[k] for s in samples]) for k in samples[0]}


def _ignore_signals(worker):
    """torchrun and Slurm signal the whole process group: the training process saves, its data workers must live until then."""
    for number in runs.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def batches(dataset, first, last, lanes, workers, pin_memory):
    """Iterator of collated samples for steps first..last; an error met in a worker is raised here with its own one-line text."""
    loader = DataLoader(dataset, batch_sampler=_Steps(first, last, lanes), num_workers=workers, collate_fn=collate,
                        pin_memory=pin_memory, prefetch_factor=4 if workers else None, worker_init_fn=_ignore_signals)
    for batch in loader:
        if isinstance(batch, Exception):
            raise type(batch)(*batch.args)
        yield batch


def prefetch(batches, device):
    """The same batches; on CUDA on the device, each copied on a stream of its own while the step before it computes.

    `where` stays on the CPU, where it is read. An error met one batch ahead waits for its own step. On a CPU nothing is done ahead.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)

    def fetch():
        try:
            batch = next(batches, None)
        except (ValueError, OSError) as error:
            return error
        with torch.cuda.stream(side):
            return batch and {name: t if name == "where" else t.to(device, non_blocking=True) for name, t in batch.items()}
    coming = fetch()
    while coming is not None:
        batch = coming
        if isinstance(batch, Exception):
            raise batch
        main = torch.cuda.current_stream(device)
        # for this batch alone: the next is not yet on its way
        main.wait_stream(side)
        for name in batch.keys() - {"where"}:
            # else its memory is given away while `main` still reads it
            batch[name].record_stream(main)
        coming = fetch()
        yield batch


class TrainingPool:
    """HGGT's training-pair pool (spec 2.4): pairs wait a random number of steps, so that a batch mixes degradations.

    HGGT shuffles the Q pairs of a GPU, takes b and refills their places. Here every lane owns Q/b slots and draws one of
    them per step, from (seed, step, lane): the same waiting-time distribution, and nothing belongs to a process. During
    the first Q/b steps pairs are stored and trained on at once. eight_bit: pairs are 8-bit images, which uint8 keeps exactly; sharpened ones
    are not, and stay as they are.
    """

    def __init__(self, size, batch_size, lanes, seeds, state=None, device="cpu", eight_bit=True):
        if size % batch_size:
            raise runs.UserError(f"--pool-size {size} must be a multiple of --batch-size {batch_size} (0 switches the pool off)")
        self.slots, self.lanes, self.seeds, self.eight_bit = size // batch_size, lanes, seeds, eight_bit
        self.held = None if state is None else tuple(t[lanes.start:lanes.stop].to(device) for t in state)
        if self.held and not eight_bit:
            self.held = tuple(t.float() / 255 if t.dtype == torch.uint8 else t for t in self.held)

    def swap(self, pair, step):
        """pair: tuple of (b, ...) tensors of this process's lanes, images in [0, 1] -> the pair to train on at `step`."""
        if self.slots == 0:
            return pair
        fresh = tuple((t * 255).round().byte() if self.eight_bit and t.is_floating_point() else t for t in pair)
        if self.held is None:
            self.held = tuple(t.new_zeros((len(t), self.slots, *t.shape[1:])) for t in fresh)
        filling = step <= self.slots
        slot = [step - 1 if filling else np.random.default_rng(self.seeds(step, lane, "pool")).integers(self.slots) for lane in self.lanes]
        rows, slot = runs.to_device(torch.tensor([range(len(slot)), slot]), self.held[0].device)
        taken = fresh if filling else tuple(held[rows, slot] for held in self.held)
        for held, new in zip(self.held, fresh):
            held[rows, slot] = new
        return tuple(t.float() / 255 if p.is_floating_point() and t.dtype == torch.uint8 else t for t, p in zip(taken, pair))

    def state(self, gather):
        """(B, slots, ...) tensors of all lanes on the CPU; gather: World.gather_lanes."""
        return None if self.held is None else [gather(t).cpu() for t in self.held]
