"""NR-IQA models: the reward Q of the paper, made in one place, with one sign, in native units.

    create_reward(["musiq"])                     default of the paper; any pyiqa no-reference metric by its pyiqa name
    create_reward(["ranker"])                    the small model of this repository (rewards/ranker.py), no download
    create_reward(["my_file:build"])             the user's own: my_file.build(device) -> callable (B, 3, H, W) -> (B,)
    create_reward(["runs/rewards/clive.pth"])    a reward file of rewards.train_opinion, learned from people's opinions
    create_reward(["musiq=0.05", "nima=0.5"])    several, summed with weights
    score_images(paths, reward, cache, world)    scores of whole images, kept on disk (ScoreCache)

pyiqa is imported late (it takes seconds), and nothing inside it is patched; while NIMA is made, timm's
create_model is (without_backbone). Its metrics want RGB in [0, 1].
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

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import archs
import runs
from images import load_image

MUSIQ = ("fused", "fused-bf16", "pyiqa")
# pyiqa lists them as NR; they judge sets of images
SET_LEVEL = ("fid", "sfid", "fid_dinov2", "inception_score")
# an image without a finite score: BRISQUE and NIQE of a flat one
NUMERICAL = (ArithmeticError, torch.linalg.LinAlgError, np.linalg.LinAlgError)
# raise by hand whenever a change of our code changes a score: those kept on disk are then computed again.
# 2: photographs are upright
SCORING_VERSION = 2


def parse_rewards(words):
    """["musiq=0.05", "my_module:build"] -> [("musiq", 0.05), ("my_module:build", 1.0)]"""
    parsed = []
    for word in words:
        name, weight = runs.split_reward(word)
        try:
            parsed.append((name, float(weight) if weight else 1.0))
        except ValueError:
            raise runs.UserError(f"--reward {word}: {weight!r} is not a number; write NAME or NAME=WEIGHT") from None
        if not name or not math.isfinite(parsed[-1][1]) or name in dict(parsed[:-1]):
            raise runs.UserError(f"--reward {word}: names must differ and weights must be finite")
    return parsed


def scores_of(model, *images):
    """model(*images) of a batch; image by image where the model takes none: pyiqa's Q-Align asserts a batch of one.

    NaN for an image on which it fails numerically, as NIQE on a flat one.
    """
    try:
        return model(*images)
    # whatever it raises: what is wrong with one image is raised again
    except Exception as error:
        if len(images[0]) == 1 and isinstance(error, NUMERICAL):
            return images[0].new_full((1,), math.nan)
        if len(images[0]) == 1 or archs.out_of_memory(error):
            raise
        return torch.cat([scores_of(model, *one).reshape(-1) for one in zip(*(batch.split(1) for batch in images))])


class Reward(nn.Module):
    """Weighted sum of frozen NR-IQA models, paper's Q: (B, 3, H, W) RGB in [0, 1] -> (B,) float32, higher is better.

    Each model keeps its own units (MUSIQ 0-100); the sign is flipped here, once, where lower is better. Stays in eval
    mode whatever `.train()` says: MUSIQ skips its own preprocessing in train mode. The range of the first input is
    checked, since pyiqa skips that when gradients are wanted.
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
            # a device sync, once
            low, high = x.min().item(), x.max().item()
            if not (-1e-4 <= low and high <= 1 + 1e-4):
                raise ValueError(f"reward wants RGB in [0, 1], got values in [{low:.3g}, {high:.3g}]")
            self._range_checked = True
        scores = {}
        # scores stay fp32 whatever the networks use
        with torch.autocast(x.device.type, enabled=False):
            for key, model in self.models.items():
                score = scores_of(model, x.float())
                if not torch.is_tensor(score):
                    raise runs.UserError(f"reward {key} returned {type(score).__name__}, expected a tensor of one "
                                         "score per image")
                score = score.float()
                if score.numel() != len(x):
                    raise runs.UserError(f"reward {key} returned shape {tuple(score.shape)} for {len(x)} images, "
                                         "expected one score each")
                scores[key] = -score.reshape(-1) if getattr(model, "lower_better", False) else score.reshape(-1)
        return scores

    def forward(self, x):
        return sum(self.weights[name] * score for name, score in self.each(x).items())

    def compile_blocks(self):
        """Compile, in place, what rewards/musiq.py repeats; other models stay as they are."""
        for module in self.modules():
            if module is not self and hasattr(module, "compile_blocks"):
                module.compile_blocks()

    def identity(self):
        """{name: {"weight", "hash"}}: the hash is over the model's tensors, and over a user's own source file."""
        return {name: {"weight": self.weights[name],
                       "hash": tensors_hash(_plain(model), getattr(model, "reward_source", b""))}
                for name, model in self.models.items()}


def tensors_hash(model, source=b""):
    """Hash over the tensors that a model computes with, and over `source`, the text of its program."""
    # tensor by tensor, and 16 digits, unlike runs.digest: atlases, pools and caches of scores hold it
    digest = hashlib.sha256(source)
    # NIQE and BRISQUE keep their parameters as plain attributes
    attributes = {f"{path}.{key}".lstrip("."): value for path, module in model.named_modules()
                  for key, value in vars(module).items() if torch.is_tensor(value)}
    for key, value in sorted((attributes | model.state_dict()).items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Fused(nn.Module):
    """A MUSIQ metric of pyiqa: square images go through rewards/musiq.py, all others through the metric itself."""

    def __init__(self, metric, bf16):
        super().__init__()
        from rewards import musiq
        self.metric, self.fused = metric, musiq.FusedMUSIQ.from_pyiqa(metric.net, bf16)
        # part of the identity; in fp32 the scores are those of the metric
        self.reward_source = b"bf16" if bf16 else b""

    def forward(self, x):
        if x.shape[2] != x.shape[3]:
            return self.metric(x)
        # as the metric does, which lets TF32 in, too
        tf32 = torch.backends.cudnn.allow_tf32
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32), \
                torch.set_grad_enabled(self.metric.as_loss and torch.is_grad_enabled()):
            return self.fused(x)


def _plain(model):
    """The model as pyiqa made it."""
    return model.metric if isinstance(model, _Fused) else model


def create_reward(words, device="cpu", weights_file=None, need_gradient=False, flag="--reward", musiq="pyiqa",
                  local=None):
    """Build Q from `--reward` words: pyiqa NR metric, `ranker`, reward file PATH.pth, `module:function`, or their sum.

    module:function is called with the device and returns a callable (B, 3, H, W) in [0, 1] -> (B,); it may carry
    `lower_better = True`. weights_file: a local weight file for the one pyiqa metric named. need_gradient: the models
    are created differentiable and each is probed with a backward pass on a natural and on a random image. flag: named
    in errors, as is `local`, what a user writes before a local weight file (None: as train.py and evaluate.py do; "":
    the script takes none). musiq: "fused": every MUSIQ of pyiqa (names musiq*) scores square images through
    rewards/musiq.py, equal and faster, and images of any other shape through pyiqa's own model; "fused-bf16": the
    square ones in bfloat16, whose scores are close but not equal, so that identity() differs. UserError for a
    full-reference, unknown, set-level or (if a gradient is needed) non-differentiable metric.
    """
    if musiq not in MUSIQ:
        raise runs.UserError(f"musiq must be one of {', '.join(MUSIQ)}, got {musiq!r}")
    parsed = parse_rewards(words)
    if weights_file and len(parsed) > 1:
        raise runs.UserError("--reward-weights names the weights of one metric: give one --reward")
    if weights_file and runs.finds_own_weights(parsed[0][0]):
        raise runs.UserError(f"{flag} {parsed[0][0]} finds its own weights: leave out {weights_file}")
    models, weights = {}, {}
    for name, weight in parsed:
        if name == "ranker":
            from rewards import ranker
            model = ranker.load_ranker(weights_file or ranker.RANKER_WEIGHTS)
        elif runs.is_reward_file(name):
            from rewards import opinion
            model = opinion.load(name)[0]
        elif ":" in name:
            model = _user_model(name, device, flag)
        else:
            model = pyiqa_model(name, device, weights_file, need_gradient, flag=flag, local=local)
            if musiq != "pyiqa" and name.startswith("musiq"):
                model = _Fused(model, musiq == "fused-bf16")
        # ModuleDict keys may hold no dot
        key = (Path(name).stem if runs.is_reward_file(name) else name).replace(".", "_")
        if key in models:
            raise runs.UserError(f"{flag}: two rewards are called {key}: rename one of the files")
        models[key], weights[key] = model.to(device), weight
    reward = Reward(models, weights).to(device)
    for (name, _), key in zip(parsed, models):
        _probe(Reward({key: models[key]}, {key: 1.0}), name, device, need_gradient, flag)
    return reward


def _user_model(name, device, flag):
    module, _, function = name.partition(":")
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        folder = f"the folder of {module.split('.')[0]}.py"
        raise runs.UserError(f"{flag} {name}: {error}; is {folder} in PYTHONPATH?") from error
    model = build(device)
    model = model if isinstance(model, nn.Module) else _Callable(model)
    # edited code gives other scores
    model.reward_source = Path(sys.modules[module].__file__).read_bytes()
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


def pyiqa_model(name, device, weights_file, need_gradient=False, mode="NR", flag="--reward", local=None):
    """A pyiqa metric. A failed download ends in one line: which file, where to put it, which flag takes a local one."""
    from pyiqa import create_metric
    modes = pyiqa_modes()
    if modes.get(name) != mode:
        problem = ("compares two sets of images" if name in SET_LEVEL else
                   "is a full-reference metric" if name in modes else "is unknown")
        usable = [n for n, m in modes.items() if m == mode] + ["ranker"]
        known = name in modes or name in SET_LEVEL
        similar = [] if known else difflib.get_close_matches(name, usable, n=3, cutoff=0.4)
        raise runs.UserError(f"{flag} {name}: this {problem}; give one that judges a single image without reference, "
                             f"for example {', '.join(similar or ['musiq', 'ranker'])}")
    # the flag that names a local file
    if local is None:
        local = {"--reward": "--reward-weights ", "--metrics": f"--metric-weights {name}="}.get(flag, "")
    options = {"as_loss": True, "loss_reduction": "none"} if need_gradient else {"check_input_range": False}
    if weights_file:
        _check_weights_file(weights_file, local)
        options["pretrained_model_path"] = str(weights_file)
        if name == "musiq-ava":
            # pyiqa knows that of its own download only
            options["num_class"] = 10
    printed, own_only = io.StringIO(), without_backbone() if name.startswith("nima") else contextlib.nullcontext()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), own_only:
            return create_metric(name, device=torch.device(device), **options)
    # URLError, requests and huggingface_hub errors
    except OSError as error:
        place = re.search(r'Downloading: "([^"]+)" to (.+)', printed.getvalue())
        reason = " ".join(str(error).split())[:80]
        where = (f"download {place[1]} and save it as {place[2]} ({runs.how_to_get(place[2])})" if place else
                 f"its files come from the Hugging Face hub ({reason}); connect once or copy the hub's cache")
        own_name = name.replace("_", "-")
        if not place and own_name in runs.public_weights():
            where += f"; python -m prepare.weights get {own_name} fetches its own weights, not this backbone"
        # else it is torchvision's or timm's backbone
        own = place and Path(place[2]).parent.name == "pyiqa"
        or_local = f", or name a local copy with {local}FILE" if own and local else ""
        instead = "--reward ranker needs no download" if flag == "--reward" else f"or leave it out of {flag}"
        raise runs.UserError(f"{flag} {name}: weights are not here and could not be fetched: "
                             f"{where}{or_local}; {instead}") from None
    except ImportError as error:
        package = "'setuptools<81'" if error.name == "pkg_resources" else error.name
        raise runs.UserError(f"{flag} {name}: pyiqa needs a package that is not installed ({error}): "
                             f"pip install {package}") from None
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        loaded = re.search(r"Loading pretrained model \S+ from (.+)", printed.getvalue())
        if not (weights_file or loaded):
            raise
        file = f"{local}{weights_file}" if weights_file else loaded[1]
        reason = " ".join(str(error).split())[:120]
        again = "" if weights_file else ": remove it, to have it fetched again"
        raise runs.UserError(f"{file}: does not fit metric {name} ({reason}){again}") from None


@contextlib.contextmanager
def without_backbone():
    """timm's networks begin at random weights: pyiqa's NIMA would download a backbone, which its file replaces."""
    import timm
    create = timm.create_model
    timm.create_model = lambda *args, **options: create(*args, **options | {"pretrained": False})
    try:
        yield
    finally:
        timm.create_model = create


def _check_weights_file(path, flag):
    """Refuse a file that is missing, damaged, or would run code when loaded: pyiqa itself would unpickle anything."""
    from scipy.io import loadmat, matlab
    if not Path(path).is_file():
        raise runs.UserError(f"{flag}{path}: no such file")
    try:
        if Path(path).suffix.lower() == ".mat":
            loadmat(path)
        else:
            torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, TypeError, ValueError, KeyError, RuntimeError, EOFError, zlib.error, pickle.UnpicklingError,
            matlab.MatReadError) as error:
        raise runs.UserError(f"{flag}{path}: not a plain weight file ({runs.first_sentence(error)})") from None


def _probe(reward, name, device, need_gradient, flag):
    """Score a natural and a random image, with a backward pass if a gradient is needed; refuse a useless model."""
    from skimage import data as photos
    natural = torch.from_numpy(photos.astronaut()[:256, 128:384].copy()).permute(2, 0, 1)[None].float() / 255
    random = torch.rand(natural.shape, generator=torch.Generator().manual_seed(0))
    advice = "it can choose ground truths, but not be optimised directly"
    for title, image in (("a photograph", natural), ("a random image", random)):
        image = image.to(device).requires_grad_(need_gradient)
        gradient = None
        with torch.set_grad_enabled(need_gradient):
            try:
                score = reward(image)
                if need_gradient and score.requires_grad:
                    gradient = torch.autograd.grad(score.sum(), image, allow_unused=True)[0]
            # pyiqa's numpy metrics refuse tensors with a gradient
            except RuntimeError as error:
                if not need_gradient:
                    raise
                reason = " ".join(str(error).split())[:80]
                raise runs.UserError(f"{flag} {name}: no gradient ({reason}): {advice}") from None
        if not torch.isfinite(score).all():
            raise runs.UserError(f"{flag} {name}: its score on {title} is not finite")
        if need_gradient and (gradient is None or not torch.isfinite(gradient).all() or not gradient.any()):
            problem = f"no usable gradient on {title} (zero, missing or not finite)"
            raise runs.UserError(f"{flag} {name}: {problem}: {advice}")


# Scores on disk

class ScoreCache:
    """Scores on disk: JSON lines {"key", "score"}, only ever appended, in a folder with one file per name and process.

    A key is made of hashes of everything that its score depends on: the image's content, the model and its weights, the
    protocol, the versions of libraries, and SCORING_VERSION. A line that is no record (cut off by a kill, damaged) is
    skipped: its score is computed again. Lines may also say which file had which content, for score_images.

        with ScoreCache(folder, name, rank) as cache:
            cache.scores.get(key); cache.add(key, score)
    """

    def __init__(self, folder, name, rank):
        self.scores, self.contents, self.file = {}, {}, Path(folder) / f"{name}.{rank}.jsonl"
        for file in sorted(self.file.parent.glob(f"{name}.*.jsonl")):
            for line in file.read_bytes().splitlines():
                try:
                    row = json.loads(line)
                    if isinstance(row["key"], str) and isinstance(row["score"], float) and math.isfinite(row["score"]):
                        self.scores[row["key"]] = row["score"]
                        if "content" in row:
                            self.contents[row["path"], row["size"], row["mtime"]] = row["content"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue

    def __enter__(self):
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # without a buffer: what a full disk did not take is not tried again
        self.out = open(self.file, "ab", buffering=0)
        if self.out.tell() and not self.file.read_bytes().endswith(b"\n"):
            # the last line was cut off
            self._write(b"\n")
        return self

    def __exit__(self, *error):
        self.out.close()

    def add(self, key, score, **about_file):
        """Keep a score; it is on disk when this returns. about_file: path, size, mtime and content of the image."""
        self.scores[key] = score
        self._write(json.dumps({"key": key, "score": score, **about_file}).encode() + b"\n")

    def _write(self, line):
        with runs.says_where(self.file):
            while line:
                line = line[self.out.write(line):]


def score_images(paths, reward, cache, world, batch_size=8, flag="the cache of scores", failed=None):
    """Score every image whole, once (samplers sma and smp, analyze_iqa.py): (len(paths),) float64 in the order given.

    Scores are kept under `cache`, see ScoreCache: an interrupted call continues, and a changed image, weight file or
    library version is scored again. Ranks share the work. A file is not read again where path, size and modification
    time are as recorded. flag names `cache` in errors. A score that is not finite is NaN. failed: a dict that gets
    {path: why} of all images without a score, whose scores are NaN; without it those that cannot be read or judged
    raise.
    """
    cache, paths = Path(cache), [Path(path) for path in paths]
    if world.is_main:
        runs.check_writable(cache, flag)
    # in the names of files too: a call for one reward need not read the scores of all others
    name = runs.digest({"models": reward.identity(), "protocol": "whole image, 8-bit RGB",
                        "versions": _versions(reward) | {"scoring": SCORING_VERSION}})
    store = ScoreCache(cache, name, world.rank)
    # all have read the scores of earlier calls before anyone appends
    world.barrier()
    scores, failures, todo = {}, {}, []
    for i, path in list(enumerate(paths))[world.rank::world.size]:
        if not path.is_file():
            if failed is None:
                raise runs.UserError(f"{path}: no such image")
            scores[i], failures[str(path)] = math.nan, "no such image"
            continue
        stat = path.stat()
        file = {"path": str(path.resolve()), "size": stat.st_size, "mtime": stat.st_mtime_ns}
        scores[i] = store.scores.get(f"{name}:{store.contents.get(tuple(file.values()))}")
        if scores[i] is None:
            todo.append((i, path, file))
    title, hidden = f"static scores, {len(scores) - len(todo)} cached", not (world.is_main and todo)
    with store, torch.no_grad(), tqdm(total=len(todo), desc=title, unit="img", disable=hidden) as bar:
        for k in range(0, len(todo), batch_size):
            batch = todo[k:k + batch_size]
            images = {}
            for i, path, file in batch:
                # a copied or touched file is known by its content
                file["content"] = runs.digest(path)
                scores[i] = store.scores.get(f"{name}:{file['content']}")
                if scores[i] is None:
                    try:
                        images[i] = load_image(path).float() / 255
                    except (ValueError, OSError) as error:
                        if failed is None:
                            raise
                        scores[i], failures[str(path)] = math.nan, str(error)
            for i, value in _score_batches(reward, images, batch_size, world.device, failed is not None):
                if isinstance(value, Exception) or not math.isfinite(value):
                    why = (f"its score is not finite ({value})" if isinstance(value, float) else
                           f"{type(value).__name__}: {value}")
                    value, failures[str(paths[i])] = math.nan, why
                scores[i] = value
            for i, _, file in batch:
                if math.isfinite(scores[i]):
                    store.add(f"{name}:{file['content']}", scores[i], **file)
            bar.update(len(batch))
    scores = {i: score for part in world.gather_objects(scores) for i, score in part.items()}
    if failed is not None:
        failed.update({path: why for part in world.gather_objects(failures) for path, why in part.items()})
    return torch.tensor([scores[i] for i in range(len(paths))], dtype=torch.float64)


def _score_batches(reward, images, batch_size, device, singly):
    """{i: (3, H, W)} -> [(i, score)]; images of mixed sizes go one by one.

    singly: so do those of a batch that fails, and the error of an image stands for its score.
    """
    together = 1 if len({image.shape for image in images.values()}) > 1 else batch_size
    scores, order = [], list(images)
    for j in range(0, len(order), together):
        part = order[j:j + together]
        try:
            scores += zip(part, reward(torch.stack([images[i] for i in part]).to(device)).tolist())
        # a metric may raise anything on an odd image: it is reported
        except Exception as error:
            if not singly:
                raise
            if len(part) == 1:
                scores.append((part[0], error))
            else:
                scores += [pair for i in part for pair in _score_batches(reward, {i: images[i]}, 1, device, True)]
    return scores


def _versions(reward):
    names = {"torch": torch.__version__}
    if "pyiqa" in sys.modules and any(type(_plain(m)).__module__.startswith("pyiqa") for m in reward.models.values()):
        names["pyiqa"] = importlib.metadata.version("pyiqa")
    return names
