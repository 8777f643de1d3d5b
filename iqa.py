"""NR-IQA models: the reward Q of the paper, made in one place, with one sign, in native units.

    create_reward(["musiq"])                     default of the paper; any pyiqa no-reference metric by its pyiqa name
    create_reward(["ranker"])                    the small model of this repository (rewards/ranker.py), no download
    create_reward(["my_file:build"])             the user's own: my_file.build(device) -> callable (B, 3, H, W) -> (B,)
    create_reward(["musiq=0.05", "nima=0.5"])    several, summed with weights

pyiqa is imported late (it takes seconds), and nothing inside it is patched. Its metrics want RGB in [0, 1].
"""
import contextlib
import difflib
import hashlib
import importlib
import importlib.metadata
import io
import json
import math
import pickle
import re
import sys
import zlib
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import runs
from images import load_image

MUSIQ = ("fused", "fused-bf16", "pyiqa")
SET_LEVEL = ("fid", "sfid", "fid_dinov2", "inception_score")                     # pyiqa lists them as NR; they judge sets of images


def parse_rewards(words):
    """["musiq=0.05", "my_module:build"] -> [("musiq", 0.05), ("my_module:build", 1.0)]. ValueError for a bad or doubled one."""
    parsed = []
    for word in words:
        name, _, weight = word.partition("=")
        try:
            parsed.append((name, float(weight) if weight else 1.0))
        except ValueError:
            raise runs.UserError(f"--reward {word}: {weight!r} is not a number; write NAME or NAME=WEIGHT") from None
        if not name or not math.isfinite(parsed[-1][1]) or name in dict(parsed[:-1]):
            raise runs.UserError(f"--reward {word}: names must differ and weights must be finite")
    return parsed


class Reward(nn.Module):
    """Weighted sum of frozen NR-IQA models, paper's Q: (B, 3, H, W) RGB in [0, 1] -> (B,) float32, higher is better.

    Each model keeps its own units (MUSIQ 0-100); the sign is flipped here, once, where lower is better. Stays in eval mode
    whatever `.train()` says: MUSIQ skips its own preprocessing in train mode. The range of the first input is checked,
    since pyiqa skips that when gradients are wanted.
    """

    def __init__(self, models, weights):
        super().__init__()
        self.models, self.weights, self._range_checked = nn.ModuleDict(models), weights, False
        self.requires_grad_(False)
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    def each(self, x):
        """{name: (B,)} of every model, unweighted, higher is better."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"reward wants (B, 3, H, W) RGB, got {tuple(x.shape)}")
        if not self._range_checked:
            low, high = x.min().item(), x.max().item()                          # a device sync, once
            if not (-1e-4 <= low and high <= 1 + 1e-4):
                raise ValueError(f"reward wants RGB in [0, 1], got values in [{low:.3g}, {high:.3g}]")
            self._range_checked = True
        scores = {}
        with torch.autocast(x.device.type, enabled=False):                      # scores stay fp32 whatever the networks use
            for key, model in self.models.items():
                score = model(x.float()).float()
                if score.numel() != len(x):
                    raise runs.UserError(f"reward {key} returned shape {tuple(score.shape)} for {len(x)} images, expected one score each")
                scores[key] = -score.reshape(-1) if getattr(model, "lower_better", False) else score.reshape(-1)
        return scores

    def forward(self, x):
        return sum(self.weights[name] * score for name, score in self.each(x).items())

    def identity(self):
        """What the scores depend on: per model its name, weight, and a hash over its tensors (and a user's own source file)."""
        parts = {}
        for name, model in self.models.items():
            parts[name] = {"weight": self.weights[name], "hash": tensors_hash(_plain(model), getattr(model, "reward_source", b""))}
        return parts


def tensors_hash(model, source=b""):
    """What a model computes with: hash over its tensors, and over `source`, the text of its program."""
    digest = hashlib.sha256(source)
    plain = {f"{path}.{key}".lstrip("."): value for path, module in model.named_modules()                # NIQE and BRISQUE keep
             for key, value in vars(module).items() if torch.is_tensor(value)}                           # theirs as attributes
    for key, value in sorted((plain | model.state_dict()).items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Fused(nn.Module):
    """A MUSIQ metric of pyiqa whose batches of square images go through musiq.py; all others go through the metric itself."""

    def __init__(self, metric, bf16):
        super().__init__()
        from rewards import musiq  # imports pyiqa
        self.metric, self.fused = metric, musiq.FusedMUSIQ.from_pyiqa(metric.net, bf16)
        self.reward_source = b"bf16" if bf16 else b""                           # in fp32 the scores are those of the metric

    def forward(self, x):
        if x.shape[2] != x.shape[3]:
            return self.metric(x)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=torch.backends.cudnn.allow_tf32), \
                torch.set_grad_enabled(self.metric.as_loss and torch.is_grad_enabled()):             # as the metric does, which lets TF32 in, too
            return self.fused(x)


def _plain(model):
    """The model as pyiqa made it."""
    return model.metric if isinstance(model, _Fused) else model


def create_reward(words, device="cpu", weights_file=None, need_gradient=False, flag="--reward", musiq="pyiqa"):
    """Build Q from `--reward` words: a pyiqa NR metric, `ranker`, or `module:function` of the user's own; several are summed.

    module:function is called with the device and returns a callable (B, 3, H, W) in [0, 1] -> (B,); it may carry
    `lower_better = True`. weights_file: a local weight file for the one pyiqa metric named. need_gradient: the models are
    created differentiable and each is probed with a backward pass on a natural and on a random image. flag: named in errors.
    musiq: "fused": every MUSIQ of pyiqa (names musiq*) scores square images through rewards/musiq.py, equal and faster, and images of any other
    shape through pyiqa's own model; "fused-bf16": the square ones in bfloat16, whose scores are close but not equal, so that identity() differs.
    ValueError for a full-reference, unknown, set-level or (if a gradient is needed) non-differentiable metric.
    """
    if musiq not in MUSIQ:
        raise runs.UserError(f"musiq must be one of {', '.join(MUSIQ)}, got {musiq!r}")
    parsed = parse_rewards(words)
    if weights_file and len(parsed) > 1:
        raise runs.UserError("--reward-weights names the weights of one metric: give one --reward")
    models, weights = {}, {}
    for name, weight in parsed:
        if name == "ranker":
            from rewards import ranker
            model = ranker.load_ranker(weights_file or ranker.RANKER_WEIGHTS)
        elif ":" in name:
            model = _user_model(name, device, flag)
        else:
            model = pyiqa_model(name, device, weights_file, need_gradient, flag=flag)
            model = _Fused(model, musiq == "fused-bf16") if musiq != "pyiqa" and name.startswith("musiq") else model
        key = name.replace(".", "_")                                            # ModuleDict keys may hold no dot
        models[key], weights[key] = model.to(device), weight
    reward = Reward(models, weights).to(device)
    for name in models:
        probe = Reward({name: models[name]}, {name: 1.0})
        _probe(probe, name, device, need_gradient, flag)
    return reward


def _user_model(name, device, flag):
    module, _, function = name.partition(":")
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise runs.UserError(f"{flag} {name}: {error}; is the folder of {module.split('.')[0]}.py in PYTHONPATH?") from error
    model = build(device)
    model = model if isinstance(model, nn.Module) else _Callable(model)
    model.reward_source = Path(sys.modules[module].__file__).read_bytes()       # edited code means other scores
    return model


class _Callable(nn.Module):
    """A plain function as a module, so that Reward can hold it."""

    def __init__(self, function):
        super().__init__()
        self.function, self.lower_better = function, getattr(function, "lower_better", False)

    def forward(self, x):
        return self.function(x)


def pyiqa_modes():
    """{name: "NR" or "FR"} of pyiqa's metrics of single images. Importing pyiqa takes seconds."""
    from pyiqa.default_model_configs import DEFAULT_CONFIGS
    return {name: config.get("metric_mode") for name, config in DEFAULT_CONFIGS.items() if name not in SET_LEVEL}


def pyiqa_model(name, device, weights_file, need_gradient=False, mode="NR", flag="--reward"):
    """A pyiqa metric. Failing downloads end in one line: which file, where to put it, which flag names a local one."""
    from pyiqa import create_metric
    modes = pyiqa_modes()
    if modes.get(name) != mode:
        kind = "compares two sets of images" if name in SET_LEVEL else "is a full-reference metric" if name in modes else "is unknown"
        usable = [n for n, m in modes.items() if m == mode] + ["ranker"]
        near = [] if name in modes or name in SET_LEVEL else difflib.get_close_matches(name, usable, n=3, cutoff=0.4)
        raise runs.UserError(f"{flag} {name}: this {kind}; wanted is one that judges a single image without reference, for example {', '.join(near or ['musiq', 'ranker'])}")
    local = {"--reward": "--reward-weights ", "--metrics": f"--metric-weights {name}="}.get(flag, "")         # the flag that names a local file
    options = {"as_loss": True, "loss_reduction": "none"} if need_gradient else {"check_input_range": False}
    if weights_file:
        _check_weights_file(weights_file, local)
        options["pretrained_model_path"] = str(weights_file)
        if name == "musiq-ava":
            options["num_class"] = 10                                           # pyiqa knows that of its own download only
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return create_metric(name, device=torch.device(device), **options)
    except OSError as error:                                                    # URLError, requests and huggingface_hub errors
        place = re.search(r'Downloading: "([^"]+)" to (.+)', said.getvalue())
        where = f"download {place[1]} and save it as {place[2]}" if place else \
            f"its files come from the Hugging Face hub ({' '.join(str(error).split())[:80]}); connect once or copy the hub's cache"
        own = place and Path(place[2]).parent.name == "pyiqa"                   # else torchvision's or timm's backbone
        or_local = f", or name a local copy with {local}FILE" if own and local else ""
        remedy = "--reward ranker needs no download" if flag == "--reward" else f"or leave it out of {flag}"
        raise runs.UserError(f"{flag} {name}: weights are not here and could not be fetched: {where}{or_local}; {remedy}") from None
    except ImportError as error:
        package = "'setuptools<81'" if error.name == "pkg_resources" else error.name
        raise runs.UserError(f"{flag} {name}: pyiqa needs a package that is not installed ({error}): pip install {package}") from None
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        loaded = re.search(r"Loading pretrained model \S+ from (.+)", said.getvalue())
        if not (weights_file or loaded):
            raise
        file = f"{local}{weights_file}" if weights_file else loaded[1]
        remedy = "" if weights_file else ": remove it, to have it fetched again"
        raise runs.UserError(f"{file}: does not fit metric {name} ({' '.join(str(error).split())[:120]}){remedy}") from None


def _check_weights_file(path, flag):
    """Refuse what is missing, damaged, or would run code when loaded: pyiqa itself would unpickle anything."""
    from scipy.io import loadmat, matlab
    if not Path(path).is_file():
        raise runs.UserError(f"{flag}{path}: no such file")
    try:
        loadmat(path) if Path(path).suffix == ".mat" else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, TypeError, ValueError, KeyError, RuntimeError, EOFError, zlib.error, pickle.UnpicklingError,
            matlab.MatReadError) as error:
        raise runs.UserError(f"{flag}{path}: not a plain weight file ({' '.join(str(error).split())[:80]})") from None


def _probe(reward, name, device, need_gradient, flag):
    """Score a natural and a random image, with a backward pass if a gradient is needed; refuse what is not usable."""
    from skimage import data as photos
    natural = torch.from_numpy(photos.astronaut()[:256, 128:384].copy()).permute(2, 0, 1)[None].float() / 255
    random = torch.rand(natural.shape, generator=torch.Generator().manual_seed(0))
    for kind, image in (("a photograph", natural), ("a random image", random)):
        image = image.to(device).requires_grad_(need_gradient)
        gradient = None
        with torch.set_grad_enabled(need_gradient):
            try:
                score = reward(image)
                if need_gradient and score.requires_grad:
                    gradient = torch.autograd.grad(score.sum(), image, allow_unused=True)[0]
            except RuntimeError as error:                                       # pyiqa's numpy metrics refuse tensors with a gradient
                if not need_gradient:
                    raise
                raise runs.UserError(f"{flag} {name}: no gradient ({' '.join(str(error).split())[:80]}): it can choose ground truths, "
                                 "but not be optimised directly") from None
        if not torch.isfinite(score).all():
            raise runs.UserError(f"{flag} {name}: its score on {kind} is not finite")
        if need_gradient and (gradient is None or not torch.isfinite(gradient).all() or not gradient.any()):
            raise runs.UserError(f"{flag} {name}: no usable gradient on {kind} (zero, missing or not finite): it can choose ground "
                             "truths, but not be optimised directly")


# Static scores of whole images (samplers sma and smp)

def score_images(paths, reward, cache, world, batch_size=8, flag="--score-cache", failed=None):
    """Score every image whole, once: (len(paths),) float64 in the order given.

    Scores are appended to JSON lines under `cache`, one file per process, keyed by the reward's identity and the image's
    content, so an interrupted call continues and a changed image, weight file or library version is scored again. Ranks
    share the work. The stat of a file stands in for its hash when size and modification time are as recorded. flag names `cache`
    in errors. failed: a dict that gets {path: why} of images without a score (NaN), instead of a ValueError for the first.
    """
    identity = {"models": reward.identity(), "protocol": "whole image, 8-bit RGB", "versions": _versions(reward)}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    cache = Path(cache)
    if world.is_main:
        runs.check_writable(cache, flag)
    cache.mkdir(parents=True, exist_ok=True)
    by_stat, by_content = {}, {}
    for file in sorted(cache.glob(f"{key}.*.jsonl")):
        for line in file.read_text().splitlines():
            if line.endswith("}"):                                              # the last line of a killed process may be cut off
                row = json.loads(line)
                by_stat[row["path"], row["size"], row["mtime"]] = by_content[row["sha256"]] = row["score"]
    world.barrier()                                                             # all have read what there was before anyone appends
    scores, todo = {}, []
    lost = {}
    for i, path in list(enumerate(map(Path, paths)))[world.rank::world.size]:
        if failed is not None and not path.is_file():
            scores[i], lost[path] = math.nan, "no such image"
            continue
        stat = path.stat()
        row = {"path": str(path.resolve()), "size": stat.st_size, "mtime": stat.st_mtime_ns}
        scores[i] = by_stat.get(tuple(row.values()))
        if scores[i] is None:
            todo.append((i, path, row))
    own = cache / f"{key}.{world.rank}.jsonl"
    with open(own, "a") as out, torch.no_grad(), tqdm(total=len(todo), desc=f"static scores, {len(scores) - len(todo)} cached",
                                                      unit="img", disable=not (world.is_main and todo)) as bar:
        if out.tell() and not own.read_bytes().endswith(b"\n"):
            out.write("\n")
        for k in range(0, len(todo), batch_size):
            batch = todo[k:k + batch_size]
            for i, path, row in batch:                                          # a copied or touched file is known by its content
                row["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
                scores[i] = by_content.get(row["sha256"])
            fresh = [(i, path) for i, path, _ in batch if scores[i] is None]
            images = {}
            for i, path in fresh:
                try:
                    images[i] = load_image(path).float() / 255
                except (ValueError, OSError) as error:
                    if failed is None:
                        raise
                    scores[i], lost[path] = math.nan, str(error)
            for i, value in _score_batches(reward, images, batch_size, world.device, failed is not None):
                path = paths[i]
                if isinstance(value, Exception) or not math.isfinite(value):
                    why = f"its score is not finite ({value})" if isinstance(value, float) else f"{type(value).__name__}: {value}"
                    if failed is None:
                        raise runs.UserError(f"{path}: {why}; choose another --reward or repair the image")
                    value, lost[path] = math.nan, why
                scores[i] = value
            for i, _, row in batch:
                if math.isfinite(scores[i]):
                    out.write(json.dumps(row | {"score": scores[i]}) + "\n")
            out.flush()
            bar.update(len(batch))
    scores = {i: s for part in world.gather_objects(scores) for i, s in part.items()}
    if failed is not None:
        failed.update({str(path): why for part in world.gather_objects(lost) for path, why in part.items()})
    return torch.tensor([scores[i] for i in range(len(paths))], dtype=torch.float64)


def _score_batches(reward, images, batch_size, device, singly):
    """{i: (3, H, W)} -> [(i, score)]; images of mixed sizes go one by one. singly: so do those of a batch that fails, whose error stands for the score."""
    same = 1 if len({image.shape for image in images.values()}) > 1 else batch_size
    found, order = [], list(images)
    for j in range(0, len(order), same):
        part = order[j:j + same]
        try:
            found += zip(part, reward(torch.stack([images[i] for i in part]).to(device)).tolist())
        except Exception as error:                                               # whatever a metric does on an odd image: it is reported
            if not singly:
                raise
            found += [(part[0], error)] if len(part) == 1 else [pair for i in part for pair in _score_batches(reward, {i: images[i]}, 1, device, True)]
    return found


def _versions(reward):
    names = {"torch": torch.__version__}
    if "pyiqa" in sys.modules and any(type(_plain(m)).__module__.startswith("pyiqa") for m in reward.models.values()):
        names["pyiqa"] = importlib.metadata.version("pyiqa")
    return names
