"""Quintuplets (an original and its enhanced ground truths), their labels, the samplers of Sec. 4.2, the pair pool.

Layout of a data set, as HGGT was released and as `python -m prepare.quintuplets` writes it:
    ROOT/Train/images/<any>/{original,01,02,03,04}/     original/<stem>.png, 01/<stem>_01.png, ...
    ROOT/Train/labels/<any>/{A,B,C}/<stem>.json         votes of three annotators; needed by upos and smp only
    ROOT/Test/GT/<any>/{images,labels}/...              the same of the test set, never trained on
    ROOT/Test/Blind_Degradation_Benchmark_LQ/<any>/Blind_LR/<stem>.png     its LR images
A stem is <photo>-<row>-<column>: the sets are patches of photographs. HGGT has four enhanced versions; any number of
folders with two digits works. Images are (3, H, W) uint8 RGB until they reach the device.

A training pair passes find_sets, TrainingSet.sample (window, flip, crop, choice of the ground truth), batches,
prefetch, make_pair (degradation; AMO's choice), TrainingPool.swap. `seeds` stands for runs.sample_seed of a run's seed.
"""
import copy
import json
import re
import signal
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import degradations
import runs
from images import (
    check_lr_size,
    check_size,
    crop_like,
    cut_to_x4,
    image_size,
    list_images,
    load_image,
    nfc,
    sample_hash,
)

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
    """`<photo>-<row>-<column>` -> `<photo>`; for such names only. The patches of one photo may overlap.

    Dates and times (2023-01-11, IMG-20240101-121501) are no rows and columns: those have no leading zeros and at most
    five digits.
    """
    return re.sub(r"(?:-(?:0|[1-9]\d{0,4})){2}$", "", stem)


# Labels

def vote(a, b, c):
    """HGGT's merging of three annotators: the majority; three different votes count as SIMILAR."""
    if b == c:
        return b
    return a if a in (b, c) else SIMILAR


def label_file(folder, stem):
    """A set's label, whose name may be written with separate accents (see images.nfc)."""
    apart = folder / f"{unicodedata.normalize('NFD', stem)}.json"
    return apart if apart.is_file() else folder / f"{stem}.json"


def read_label(path, stem, versions, left_out=()):
    """One annotator's JSON file of a set -> {version: code}. An entry's `File` names its version, not its number.

    left_out: versions whose entries are skipped. Raises UserError when an entry is missing, doubled or unknown, belongs
    to another stem, or has an unexpected label.
    """
    try:
        entries = dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise runs.UserError(f"{path}: label missing; every set needs the votes of three annotators A, B, C") from None
    except (ValueError, TypeError) as error:
        raise runs.UserError(f"{path}: not a label file (a JSON object with Picture_1, ...): {error}") from None
    codes = {}
    for key, entry in entries.items():
        if not key.startswith("Picture_"):
            continue
        if not isinstance(entry, dict):
            raise runs.UserError(f"{path}: {key} is {entry!r}; expected an object with Name, File and Label")
        version, label, name = entry.get("File"), entry.get("Label"), entry.get("Name")
        if version in left_out:
            continue
        if version not in versions or version in codes:
            raise runs.UserError(f"{path}: {key} has File {version!r}; expected each of {versions} once")
        if nfc(Path(str(name)).stem) != file_stem(stem, version):
            raise runs.UserError(f"{path}: {key} names {name!r}, which is not version {version!r} of {stem}")
        if version != "original" and label not in LABELS:
            raise runs.UserError(f"{path}: {key} has Label {label!r}; expected one of {list(LABELS)}")
        codes[version] = ORIGINAL if version == "original" else LABELS[label]
    missing = [version for version in versions[1:] if version not in codes]
    if missing:
        raise runs.UserError(f"{path}: no label for version(s) {missing}")
    return codes


def label_versions(path):
    """The enhanced versions that a label knows; none of a file that is not one, which read_label refuses."""
    try:
        return [entry["File"] for entry in json.loads(path.read_text(encoding="utf-8")).values()
                if re.fullmatch(r"\d\d", entry.get("File", ""))]
    except (OSError, ValueError, TypeError, AttributeError):
        return []


# Quintuplets on disk

class Sets:
    """The images of a data set: K versions of each of N stems, the original first. A folder of photographs has K = 1.

    files:        {version: {file stem: path}}, "original" first; see file_stem
    label_folder: folder that holds the annotators' folders A, B and C, or None
    lq:           {stem: path} of LR images that come with the set, or None: they are made
    stems:        the stems in use, sorted; None: all
    packed:       prepare.pack.Packed, from which images are read in place of `files`, or None
    signed:       the value of signature(), where it is known
    left_out:     versions that labels know and that are not used, see choose
    patches:      stems are <photo>-<row>-<column>; False: every image is a photograph of its own, whatever its name
    """

    def __init__(self, files, label_folder=None, lq=None, stems=None, packed=None, signed=None, patches=True):
        self.files, self.label_folder, self.lq, self.packed, self.patches = files, label_folder, lq, packed, patches
        self.versions, self.signed, self.left_out = list(files), signed, ()
        # what labels() has read, and of which stems
        self.votes = None, None
        self.stems = sorted(files["original"]) if stems is None else stems

    def choose(self, versions=None):
        """The Sets with these versions alone; None: all, UserError where one is missing.

        Missing is a number below the highest folder's, and one that the labels know.
        """
        images = next(iter(self.files["original"].values())).parent.parent
        labelled = label_versions(self.label_folder / "A" / f"{self.stems[0]}.json") if self.label_folder else []
        if versions is None:
            known = {*labelled, *(f"{k:02d}" for k in range(1, int(self.versions[-1]) + 1))}
            missing = sorted(known - {*self.versions})
            if missing:
                raise runs.UserError(f"{images}: no folder {', '.join(missing)} of enhanced versions: fetch or make "
                                     f"the set again, or train without: --versions {' '.join(self.versions)}")
            return self
        unknown = [version for version in versions if version not in self.versions]
        if unknown or "original" not in versions or len(versions) < 2:
            raise runs.UserError(f"--versions {' '.join(versions)}: name original and some of the others of {images}: "
                                 f"{', '.join(self.versions)}")
        chosen = copy.copy(self)
        chosen.files = {version: files for version, files in self.files.items() if version in versions}
        chosen.versions, chosen.signed, chosen.votes = list(chosen.files), None, (None, None)
        chosen.left_out = {*self.versions, *labelled} - {*versions}
        return chosen

    def path(self, stem, version="original"):
        return self.files[version][file_stem(stem, version)]

    def photo(self, stem):
        """Name of the photograph that an image is a patch of."""
        return photo_of(stem) if self.patches else stem

    def photographs(self):
        """Their names, for logs."""
        return ", ".join(sorted({self.photo(stem) for stem in self.stems}))

    def grouping(self):
        """A phrase for logs: how many photographs, and what says so."""
        photos = len({self.photo(stem) for stem in self.stems})
        rule = "grouped by <photo>-<row>-<column>" if photos < len(self.stems) else "each image one of its own"
        return f"{photos} photographs, {rule}"

    def read(self, stem, version):
        """(3, H, W) uint8 array: a decoded image, or a view of the packed file, of which only copied parts are read."""
        return self.packed.read(stem, version) if self.packed else load_image(self.path(stem, version)).numpy()

    def size(self, stem, version="original"):
        """(width, height) of an image."""
        return tuple(self.packed.place(stem, version)[:0:-1]) if self.packed else image_size(self.path(stem, version))

    def signature(self):
        """The sample_hash of all images, by which a packed file and an atlas name the images they belong to."""
        # computed once, since all files are opened for it
        if not self.signed:
            names = [(stem, version) for stem in sorted(self.files["original"]) for version in self.versions]
            self.signed = sample_hash({name: self.path(*name) for name in names})
        return self.signed

    def hold_out(self, photos, seed, flag="--val-photos"):
        """-> (Sets of the other photos, Sets of `photos` photos drawn by seed). Patches of a photo stay on one side."""
        names = sorted({self.photo(stem) for stem in self.stems})
        if not 0 < photos < len(names):
            raise runs.UserError(f"{flag} {photos}: the data set has {len(names)} photos; "
                                 f"hold out between 1 and {len(names) - 1}")
        held_photos = set(np.random.default_rng(seed).permutation(names)[:photos].tolist())
        kept, held = copy.copy(self), copy.copy(self)
        kept.stems = [stem for stem in self.stems if self.photo(stem) not in held_photos]
        held.stems = [stem for stem in self.stems if self.photo(stem) in held_photos]
        return kept, held

    def labels(self):
        """Merged votes, (N, K) int64 codes; column 0 is ORIGINAL. Raises UserError for a vote that cannot be read."""
        if self.label_folder is None:
            images = next(iter(self.files["original"].values())).parent.parent
            raise runs.UserError(f"{images}: no labels beside it (labels/<any>/A, B, C): "
                                 "samplers upos and smp need them; rand, sma and amo work without")
        # read once: a training looks at its data before it scores them
        if self.votes[0] is self.stems:
            return self.votes[1]
        rows = []
        for stem in self.stems:
            a, b, c = (read_label(label_file(self.label_folder / name, stem), stem, self.versions, self.left_out)
                       for name in "ABC")
            rows.append([ORIGINAL] + [vote(a[version], b[version], c[version]) for version in self.versions[1:]])
        self.votes = self.stems, torch.tensor(rows)
        return self.votes[1]


def find_photos(folder, flag="--data"):
    """Sets with K = 1: a folder of photographs, or the originals of a quintuplet data set. flag: named in the error."""
    folder = Path(folder)
    if not folder.is_dir():
        raise runs.UserError(f"{folder}: no such folder; {flag} DIR names the photographs, --demo needs no download")
    if (folder / "Train").is_dir():
        return Sets({"original": find_sets(folder, "Train", packed=False).files["original"]})
    name, parent = folder.name.lower(), folder.parent
    # folders that the builders of this repository fill with patches
    patches = name == "original" and (parent / "01").is_dir() or name == "untouched" and (parent / "images").is_dir()
    return Sets({"original": list_images(folder)}, patches=patches)


def find_folders(root, split):
    """{"images": {version: folder}, "labels": folder or None, "lq": folder or None} of split "Train" or "Test".

    None for a Test split that is not there. Raises UserError where the layout above is not met.
    """
    root = Path(root)
    if not root.is_dir():
        raise runs.UserError(f"{root}: no such data set; docs/data.md says how to get HGGT (--data DIR), "
                             "--demo needs no download")
    base = root / "Train" if split == "Train" else root / "Test" / "GT"

    def only(folders):
        # archives made on macOS bring __MACOSX and hidden folders
        folders = [folder for folder in folders
                   if not any(part.startswith((".", "__MACOSX")) for part in folder.relative_to(root).parts)]
        if len(folders) > 1:
            raise runs.UserError(f"{base}: several sets, {len(folders)} folders {', '.join(map(str, folders))}: "
                                 "keep one")
        return folders[0] if folders else None
    # archives spell it both ways
    original = only(sorted(folder for folder in base.glob("**/[Oo]riginal") if folder.is_dir()))
    if original is None:
        if split == "Test":
            return None
        raise runs.UserError(f"{base}: no images/*/original folder under it; expected HGGT's layout (docs/data.md); of "
                             "photographs python -m prepare.quintuplets makes it, and train.py --stage psnr takes "
                             "them as they are")
    images = original.parent
    enhanced = sorted(folder for folder in images.iterdir() if folder.is_dir() and re.fullmatch(r"\d\d", folder.name))
    if not enhanced:
        raise runs.UserError(f"{images}: no folders of enhanced versions (01, 02, ...) beside {original.name}/; "
                             "python -m prepare.quintuplets makes them, and train.py --stage psnr needs none")
    labels = only(sorted({annotator.parent for annotator in base.glob("**/labels/**/[ABC]") if annotator.is_dir()}))
    lq = only(sorted((root / "Test").glob("**/Blind_LR"))) if split == "Test" else None
    return {"images": {"original": original} | {folder.name: folder for folder in enhanced}, "labels": labels, "lq": lq}


def find_sets(root, split, packed=True):
    """The Sets of split "Train" or "Test" under `root`, in the layout above; None for a Test split that is not there.

    packed: read packed images (prepare.pack) where there are any. Raises UserError for a set that lacks a file.
    """
    folders = find_folders(root, split)
    if folders is None:
        return None
    files = {version: list_images(folder) for version, folder in folders["images"].items()}
    originals = files["original"]
    for version in list(files)[1:]:
        expected, present = {file_stem(stem, version) for stem in originals}, set(files[version])
        for problem, names in (("missing", expected - present), ("without an original", present - expected)):
            if names:
                raise runs.UserError(f"{folders['images'][version]}: {len(names)} files {problem} (of {len(expected)} "
                                     f"expected), first {min(names)}.png: fetch or make the data set again; "
                                     "python -m prepare.verify DIR lists everything")
    lq = list_images(folders["lq"]) if folders["lq"] else None
    if lq is not None:
        missing = set(originals) - set(lq)
        if missing:
            raise runs.UserError(f"{folders['lq']}: no LR image for {len(missing)} of the test set's originals, "
                                 f"first {min(missing)}.png")
        for stem in sorted(originals):
            check_lr_size(lq[stem], image_size(lq[stem]), image_size(originals[stem]))
    sets = Sets(files, folders["labels"], lq)
    if packed and (Path(root) / "packed" / f"{split}.json").exists():
        from prepare.pack import Packed
        sets.packed = Packed(Path(root) / "packed", split, sets)
    return sets


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
    """The version that supervises each sample: (B,) int64 index into the K versions, 0 being the original.

    orig, rand, upos: uniform over the candidates. sma, smp: drawn from `sampling_probs` of static whole-image scores.
    amo: arg max of the scores of the training crops (tau -> 0); ties go to the earlier version, so to the original.
    candidates: (B, K) bool; scores, tau: see sampling_probs; u: (B,) uniform draws in [0, 1), which amo does not use.
    A candidate whose score is not finite is never chosen; where none has a finite one, the original supervises.
    """
    if scores is not None:
        candidates = candidates & torch.isfinite(scores)
        candidates[:, 0] |= ~candidates.any(1)
        scores = scores.where(torch.isfinite(scores), 0)
    if sampler == "amo":
        return scores.masked_fill(~candidates, -torch.inf).argmax(1)
    if sampler in NEEDS_SCORES:
        probs = sampling_probs(scores, candidates, tau)
    else:
        probs = sampling_probs(torch.zeros(candidates.shape), candidates, 1.0)
    # the first version at which the cumulated probability exceeds u
    index = (probs.cumsum(1) <= torch.as_tensor(u, dtype=torch.float64).view(-1, 1)).sum(1)
    # rounding may leave the last cumulated sum below 1
    last = (probs > 0).double().cumsum(1).argmax(1)
    return torch.minimum(index, last)


# Training pairs

def make_pair(batch, step, lanes, seeds, device, degradation, group_size, crop, reward=None, usm=False,
              sampler="amo", tau=10.0, leave_out=None):
    """One fresh training pair for each of this process's b lanes, from a batch of TrainingSet samples.

    Returns lq (b, 3, crop/4, crop/4) and gt (b, 3, crop, crop) in [0, 1], the index of the chosen version (b,), and its
    score (b,), None unless a reward or an atlas chose it, not finite where no candidate's is. LR images are made from
    whole originals, then cropped.
    degradation: a name of degradations.PRESETS; group_size: lanes that share what HGGT draws once per GPU batch;
    reward: (B, 3, H, W) in [0, 1] -> (B,), for samplers that score online (amo): it sees the crops of all versions;
    usm: sharpen the whole image first, for LR image and target (HGGT's psnr stage of RRDBNet); leave_out(step, what,
    number): is told of candidates without a finite score.
    """
    original = batch["original"].to(device, non_blocking=True).float() / 255  # (b, 3, H, W)
    crops = batch["crops"].to(device, non_blocking=True).float() / 255  # (b, V, 3, crop, crop)
    if usm:
        original = degradations.usm_sharpen(original)
    lq = degradations.degrade(original, degradation, [seeds(step, lane, "degrade") for lane in lanes],
                              [seeds(step, lane // group_size, "degrade-group") for lane in lanes])
    lq = crop_like(lq, batch["where"], crop)
    versions = batch["version"].to(device, non_blocking=True)  # (b, V)
    # without candidates the version was chosen when the sample was read
    if "candidates" not in batch:
        gt = crop_like(original, batch["where"], crop, scale=1) if usm else crops[:, 0]
        return lq, gt, versions[:, 0], batch["score"].to(device, non_blocking=True) if "score" in batch else None
    with torch.no_grad():
        scores = reward(crops.flatten(0, 1)).view(versions.shape)
    candidates, draws = (batch[name].to(device, non_blocking=True) for name in ("candidates", "draw"))
    if leave_out:
        leave_out(step, "candidates", (candidates & ~torch.isfinite(scores)).sum())
    index = pick_gt(sampler, candidates, scores, tau, draws)[:, None]
    gt = torch.take_along_dim(crops, index[:, :, None, None, None], 1)[:, 0]
    return lq, gt, versions.gather(1, index)[:, 0], scores.gather(1, index)[:, 0]


def validation_pair(sets, i, seeds, device, degradation):
    """lq (1, 3, h, w), gt (1, 3, 4h, 4w) in [0, 1] of image i: with the set's LR image, or one made by fixed draws."""
    gt = cut_to_x4(load_image(sets.path(sets.stems[i]))[None].to(device).float() / 255)
    if sets.lq is not None:
        return load_image(sets.lq[sets.stems[i]])[None].to(device).float() / 255, gt
    return degradations.degrade(gt, degradation, [seeds(0, i, "val")], [seeds(0, i, "val-group")]), gt


def synthetic_pairs(dataset, seeds, device, degradation, patch, group_size):
    """A function (step, lanes, batch) -> aligned lq (b, 3, patch, patch) and hr (b, 3, 4 patch, 4 patch) in [0, 1].

    Both are rotated by a random multiple of 90 degrees. batch: collated samples of these lanes; None: they are read.
    """
    def pairs(step, lanes, batch=None):
        batch = batch or collate([dataset.sample(step, lane) for lane in lanes])
        lq, hr, *_ = make_pair(batch, step, lanes, seeds, device, degradation, group_size, 4 * patch)
        turns = [int(np.random.default_rng(seeds(step, lane, "turn")).integers(4)) for lane in lanes]
        return tuple(torch.stack([image.rot90(turn, (1, 2)) for image, turn in zip(images, turns)])
                     for images in (lq, hr))
    return pairs


# Training samples

class TrainingSet:
    """Samples by (step, lane). Everything random about a sample follows from seeds(step, lane, purpose).

    sets:       Sets of N stems and K versions
    batch_size: lanes of a step, all processes together; group_size: lanes that share a crop position (HGGT: of one GPU)
    crop:       side of the crop in pixels; load_size: side of the random window that stands for the image, 0: all of it
    labels:     (N, K) codes, needed by upos and smp; scores: (N, K) static scores, needed by sma and smp, which use tau
    atlases:    [(prepare.atlas.Atlas, weight)], for amo without a reward: crops lie on their grid, and the weighted sum
                of their tables chooses, by its arg max if tau is None, otherwise by softmax

    A sample is a dict of
    original    (3, H, W) uint8, the image or its window, of which the LR image is made
    where       (2,) top and left of the crops in it, multiples of 4
    crops       (V, 3, crop, crop) uint8, and version (V,), the index of each crop's version
    candidates  (V,) bool, and draw (1,), uniform in [0, 1), for make_pair where the sampler scores online (amo, V = K).
                Otherwise V = 1: the choice is made here, and only the original and the chosen version are decoded
    score       () of the chosen crop, only with atlases
    All images of a sample share flip, window and crop.
    """

    def __init__(self, sets, sampler, seeds, batch_size, group_size, crop, load_size=0, tau=10.0,
                 labels=None, scores=None, atlases=()):
        self.sets, self.sampler, self.seeds = sets, sampler, seeds
        self.batch_size, self.group_size, self.crop, self.load_size = batch_size, group_size, crop, load_size
        self.tau, self.atlases, self.orders = tau, list(atlases), {}
        codes = torch.full((len(sets.stems), len(sets.versions)), ORIGINAL) if labels is None else labels
        candidates = candidates_for(sampler, codes)
        rows = candidates.any(1).nonzero()[:, 0].tolist()
        if not rows:
            raise runs.UserError(f"no quintuplet is left to train on with sampler {sampler}: "
                                 "check the labels and --val-photos")
        self.stems = [sets.stems[i] for i in rows]
        self.candidates = candidates[rows]
        self.scores = None if scores is None else scores[rows]
        # images that are never chosen for their score, which is not finite
        unscored = torch.zeros_like(candidates) if scores is None else candidates & ~torch.isfinite(scores)
        self.unscored = [sets.path(sets.stems[i], sets.versions[k]) for i, k in unscored.nonzero().tolist()]
        self.dropped = len(sets.stems) - len(rows)

    def __len__(self):
        return len(self.stems)

    def _order(self, epoch):
        """(N,) permutation of the sets. Two are kept, since two epochs may meet inside a batch."""
        if epoch not in self.orders:
            if len(self.orders) == 2:
                del self.orders[next(iter(self.orders))]
            self.orders[epoch] = np.random.default_rng(self.seeds(epoch, 0, "epoch")).permutation(len(self.stems))
        return self.orders[epoch]

    def index(self, step, lane):
        """The set that `lane` trains on at `step` (from 1): every epoch visits all sets once, in a new order."""
        epoch, position = divmod((step - 1) * self.batch_size + lane, len(self.stems))
        return int(self._order(epoch)[position])

    def names(self, step):
        return [self.stems[self.index(step, lane)] for lane in range(self.batch_size)]

    def sample(self, step, lane):
        index = self.index(step, lane)
        rng = {p: np.random.default_rng(self.seeds(step, lane, p)) for p in ("flip", "window", "sampler")}
        stem, candidates = self.stems[index], self.candidates[index]
        original = self._read(stem, 0)

        # Where: a window of the image, mirrored or not, and the crop inside it
        height, width = original.shape[1:]
        if self.load_size:
            top, left = (int(rng["window"].integers(side - self.load_size + 1)) for side in (height, width))
            height = width = self.load_size
        else:
            top, left, height, width = 0, 0, height // 4 * 4, width // 4 * 4
        # HGGT options: horizontal flip only
        flipped = rng["flip"].random() < 0.5
        # relative position of the crop, one per group
        u = np.random.default_rng(self.seeds(step, lane // self.group_size, "crop")).random(2)
        if self.atlases:
            y, x = self.atlases[0][0].position(u)
        else:
            # multiples of 4, so that the crop has its own pixels in the x4 LR image
            y, x = (int(share * ((side - self.crop) // 4 + 1)) * 4 for share, side in zip(u, (height, width)))

        # Which: the one version that supervises, or all where make_pair chooses
        extra, draw = {}, rng["sampler"].random(1)
        if self.atlases:
            scores = sum(weight * atlas.scores(stem, flipped, y, x) for atlas, weight in self.atlases)
            sampler = "amo" if self.tau is None else "sma"
            chosen = [int(pick_gt(sampler, candidates[None], scores[None], self.tau, draw))]
            extra = {"score": scores[chosen[0]]}
        elif "online" in SAMPLERS[self.sampler]:
            chosen, extra = list(range(len(candidates))), {"candidates": candidates, "draw": torch.from_numpy(draw)}
        else:
            scores = None if self.scores is None else self.scores[index][None]
            chosen = [int(pick_gt(self.sampler, candidates[None], scores, self.tau, draw))]

        def cut(image, y, x, part_height, part_width):
            """A part of the window, mirrored if the sample is; y and x count in the mirrored window."""
            first = left + (width - x - part_width if flipped else x)
            part = torch.from_numpy(np.array(image[:, top + y:top + y + part_height, first:first + part_width]))
            # PyTorch mirrors six times faster than NumPy (512 px, one thread)
            return part.flip(2) if flipped else part
        images = [original if v == 0 else self._read(stem, v, original) for v in chosen]
        crops = torch.stack([cut(image, y, x, self.crop, self.crop) for image in images])
        return {"original": cut(original, 0, 0, height, width), "where": torch.tensor([y, x]), "crops": crops,
                "version": torch.tensor(chosen), **extra}

    def _read(self, stem, index, original=None):
        """(3, H, W) uint8 array of version number `index`; it must have its original's size and room for the crop."""
        version = self.sets.versions[index]
        image = self.sets.read(stem, version)
        size, original_size = (array.shape[:0:-1] for array in (image, image if original is None else original))
        check_size(self.sets.path(stem, version), size, original_size, max(self.crop, self.load_size))
        return image


def check_headers(dataset, world):
    """Check size and mode of all training images before the first step, by their headers; processes share the work.

    -> {stem: (width, height)} of this process's originals. Raises UserError for the first image that is wrong. A file
    whose pixels are damaged is found when it is drawn, or by prepare.verify.
    """
    sets, need = dataset.sets, max(dataset.crop, dataset.load_size)
    stems = dataset.stems[world.rank::world.size]
    # the original comes first, since the others are compared with it
    versions = [version for k, version in enumerate(sets.versions) if k == 0 or dataset.candidates[:, k].any()]

    def check(stem):
        sizes = {}
        for version in versions:
            path = sets.path(stem, version)
            # packed images were decoded once: their index holds the sizes, and all are RGB
            sizes[version] = sets.size(stem, version) if sets.packed else image_size(path, only_rgb=True)
            check_size(path, sizes[version], sizes["original"], need)
        return sizes["original"]
    if sets.packed:
        return {stem: check(stem) for stem in stems}
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(stems, pool.map(check, stems)))


def collate(samples):
    """Samples -> one dict of stacked tensors. UserError if their images differ in size."""
    # the first entry of a sample is its whole image
    shapes = {tuple(next(iter(sample.values())).shape[1:]) for sample in samples}
    if len(shapes) > 1:
        raise runs.UserError(f"images of different sizes in one batch ({sorted(shapes)}): set --load-size "
                             "(dpo.tune: --patch) to at most the smallest side")
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


class _Batches(Dataset):
    """Batches by their [(step, lane), ...]. An error that has a text of its own stands for its batch.

    A worker would bury it in its traceback; `batches` raises it in the training process.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, keys):
        try:
            return collate([self.dataset.sample(*key) for key in keys])
        except (ValueError, OSError, MemoryError) as error:
            return error


def _ignore_signals(worker):
    """torchrun and Slurm signal the whole process group: data workers live on until the training process has saved.

    runs.cli ends them.
    """
    for number in runs.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def batches(dataset, first, last, lanes, workers, pin_memory):
    """Yield collated samples of steps first..last. dataset: has sample(step, lane). A worker's error is raised here."""
    keys = ([(step, lane) for lane in lanes] for step in range(first, last + 1))
    loader = DataLoader(_Batches(dataset), batch_size=None, sampler=keys, num_workers=workers, pin_memory=pin_memory,
                        prefetch_factor=4 if workers else None, worker_init_fn=_ignore_signals)
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def prefetch(batches, device):
    """The same batches on a CUDA device, each copied on a stream of its own while the step before it computes.

    `where` stays on the CPU, where it is read. An error met one batch ahead waits for its step. A CPU reads none ahead.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)

    def fetch():
        try:
            batch = next(batches, None)
        except (ValueError, OSError, MemoryError) as error:
            return error
        with torch.cuda.stream(side):
            return batch and {name: tensor if name == "where" else tensor.to(device, non_blocking=True)
                              for name, tensor in batch.items()}
    coming = fetch()
    while coming is not None:
        batch = coming
        if isinstance(batch, Exception):
            raise batch
        main = torch.cuda.current_stream(device)
        # waits for this batch alone: the copy of the next has not begun
        main.wait_stream(side)
        for name in batch.keys() - {"where"}:
            # otherwise its memory could be given away while `main` still reads it
            batch[name].record_stream(main)
        coming = fetch()
        yield batch


class TrainingPool:
    """HGGT's training-pair pool: pairs wait a random number of steps, so that a batch mixes degradations.

    HGGT shuffles the Q pairs of a GPU, takes b and refills their places. Here every lane owns Q/b slots and draws one
    of them per step, from (seed, step, lane): the same distribution of waiting times, and nothing belongs to a process.
    During the first Q/b steps pairs are stored and trained on at once.
    size: Q, of all lanes together; 0: no pool. lanes: this process's. state: a result of state(), to resume.
    eight_bit: images are 8-bit, which uint8 keeps exactly; sharpened ones are not, and stay floats.
    """

    def __init__(self, size, batch_size, lanes, seeds, state=None, device="cpu", eight_bit=True):
        if size % batch_size:
            raise runs.UserError(f"--pool-size {size} must be a multiple of --batch-size {batch_size} "
                                 "(0 switches the pool off)")
        self.slots, self.lanes, self.seeds, self.eight_bit = size // batch_size, lanes, seeds, eight_bit
        self.stored = None if state is None else tuple(t[lanes.start:lanes.stop].to(device) for t in state)
        # a checkpoint of an earlier commit kept sharpened ones as uint8
        if self.stored and not eight_bit:
            self.stored = tuple(t.float() / 255 if t.dtype == torch.uint8 else t for t in self.stored)

    def swap(self, pair, step):
        """pair: tuple of (b, ...) tensors of this process's lanes, images in [0, 1] -> the pair to train on now."""
        if self.slots == 0:
            return pair
        fresh = tuple((t * 255).round().byte() if self.eight_bit and t.is_floating_point() else t for t in pair)
        if self.stored is None:
            self.stored = tuple(t.new_zeros((len(t), self.slots, *t.shape[1:])) for t in fresh)
        filling = step <= self.slots
        slot = [step - 1 if filling else np.random.default_rng(self.seeds(step, lane, "pool")).integers(self.slots)
                for lane in self.lanes]
        rows, slot = runs.to_device(torch.tensor([range(len(slot)), slot]), self.stored[0].device)
        taken = fresh if filling else tuple(stored[rows, slot] for stored in self.stored)
        for stored, new in zip(self.stored, fresh):
            stored[rows, slot] = new
        return tuple(t.float() / 255 if given.is_floating_point() and t.dtype == torch.uint8 else t
                     for t, given in zip(taken, pair))

    def state(self, gather):
        """(B, slots, ...) tensors of all lanes on the CPU; gather: World.gather_lanes."""
        return None if self.stored is None else [gather(t).cpu() for t in self.stored]
