"""Low-rank adapters on Linear and Conv2d layers (LoRA, Hu et al., ICLR 2022; paper Sec. 4.3 and 8.3), written out.

    W' = W + scale * (alpha / rank) * B A         A (rank, columns), B (rows, rank), B = 0 at the start

A layer's weight is seen as a matrix of `rows` = outputs and `columns` = everything else: a convolution's kernel (out,
in / groups, k, k) is flattened to (out, in / groups * k * k), so `rank` bounds the rank of that matrix. minLoRA and
peft do the same; loralib makes a (out * k) x (in * k) matrix of rank k * rank instead. The adapter is a
parametrization of `weight` (torch.nn.utils.parametrize): layers need no change, stride, padding and groups need no
care, and the adapted network computes with the very weight that merging leaves behind.

    names = add_lora(net, default_targets(net), rank=48)      freezes net, adapts the layers whose names match
    save_lora("adapter.pth", net)                             A, B, rank, alpha, names; hash and samples of the base
    load_lora(net, "adapter.pth", scale=0.7); merge_lora(net)

As a script it merges an adapter into its base, at any strength:

    python lora.py runs/swinir-amo+musiq --scale 0.7 --out swinir-0.7.pth
"""
from pathlib import Path

import runs


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("adapter", type=Path, metavar="ADAPTER",
                   help="run folder of finetune_lora.py, folder with an adapter and its card, or an adapter.pth")
    p.add_argument("--base", type=runs.CHECKPOINT, metavar="PATH",
                   help="weights or run that was tuned, or a public name (python -m prepare.weights list); default: as "
                        "the run folder of ADAPTER, or its card, says")
    runs.add_weights_key(p)
    p.add_argument("--scale", type=runs.number(float), default=1.0,
                   help="strength: 0 is the base, 1 the tuned network, 1.5 beyond it")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="plain generator to write")
    return p.parse_args(argv)


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import hashlib
import math
import re

import torch
from torch import nn
from torch.nn.utils import parametrize

import archs


class LoRA(nn.Module):
    """Parametrization of one weight: forward(W) -> W + scale * (alpha / rank) * B A, in the shape of W."""

    def __init__(self, weight, rank, alpha):
        super().__init__()
        self.lora_A = nn.Parameter(weight.new_empty(rank, weight[0].numel()))
        self.lora_B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        # CHOICE: as loralib; the paper gives no initialisation
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.factor, self.scale = alpha / rank, 1.0

    def forward(self, weight):
        return weight + (self.scale * self.factor) * (self.lora_B @ self.lora_A).view_as(weight)


def add_lora(net, targets, rank, alpha=None):
    """Freeze `net` and adapt every Linear and Conv2d whose dotted name matches the regular expression `targets`.

    alpha: None is `rank`, so that the update is B A itself (CHOICE: the paper gives none). A is drawn from torch's
    global generator. Returns the names of the adapted layers.
    ValueError if rank < 1 or alpha <= 0, or the net is adapted already; UserError as matching_layers.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank {rank}: must be at least 1")
    alpha = rank if alpha is None else alpha
    if not alpha > 0:
        raise ValueError(f"LoRA alpha {alpha}: must be more than 0")
    if adapted(net):
        raise ValueError("this network has LoRA adapters already: merge or remove them first")
    layers = matching_layers(net, targets)
    net.requires_grad_(False)
    for layer in layers.values():
        parametrize.register_parametrization(layer, "weight", LoRA(layer.weight, rank, alpha))
    return list(layers)


def matching_layers(net, targets):
    """{name: layer} of the Linear and Conv2d layers whose dotted names match.

    UserError if no layer matches, or a matching one is of another kind.
    """
    try:
        layers = {name: layer for name, layer in net.named_modules() if re.search(targets, name)}
    except re.error as error:
        raise runs.UserError(f"LoRA targets {targets!r}: not a regular expression ({error})") from None
    if not layers:
        names = ", ".join(name for name, _ in named_layers(net))
        raise runs.UserError(f"LoRA targets {targets!r} match no layer of {type(net).__name__}; "
                             f"its layers are called {names[:120]} ...")
    for name, layer in layers.items():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            raise runs.UserError(f"LoRA targets {targets!r} match {name} ({type(layer).__name__}), "
                                 "which is neither Linear nor Conv2d")
    return layers


def default_targets(net, arch=None):
    """The layers that the paper adapts (Sec. 8.3) as a pattern of names, from archs.ARCHS.

    arch: the entry; None: the first one of the network's class.
    """
    arch = arch or next(name for name, entry in archs.ARCHS.items() if entry["class"] == type(net).__name__)
    pattern = archs.ARCHS[arch]["tune"]["targets"]
    return pattern.replace("LAST", str(len(net.body) - 1)) if "LAST" in pattern else pattern


def named_layers(net):
    return [(name, layer) for name, layer in net.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


def adapted(net):
    """{name of the layer: its LoRA}"""
    return {name: layer.parametrizations.weight[0] for name, layer in named_layers(net)
            if parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations.weight[0], LoRA)}


def lora_parameters(net):
    """All A and B: the parameters for the optimiser of the adapted net."""
    return [p for adapter in adapted(net).values() for p in adapter.parameters()]


def lora_state_dict(net):
    """{"<layer>.lora_A": (rank, columns), "<layer>.lora_B": (rows, rank), ...}"""
    return {f"{name}.{key}": value for name, adapter in adapted(net).items()
            for key, value in adapter.state_dict().items()}


def base_state_dict(net):
    """The state dict of the net without its adapters, under the names it has without them."""
    state = net.state_dict().items()
    return {key.replace(".parametrizations.weight.original", ".weight"): value for key, value in state
            if not re.search(r"\.parametrizations\.weight\.\d+\.lora_[AB]$", key)}


def parameter_names(net):
    """Names of the base's parameters, as without adapters. Its buffers are constants."""
    return sorted(name.replace(".parametrizations.weight.original", ".weight") for name, _ in net.named_parameters()
                  if not re.search(r"\.lora_[AB]$", name))


def base_hash(net):
    """SHA-256 over names, shapes and values of the base's parameters: identifies the base of an adapter."""
    # tensor by tensor, and all digits, unlike runs.digest: adapter files hold it
    digest, state = hashlib.sha256(), base_state_dict(net)
    for key in parameter_names(net):
        values = state[key].detach().float().cpu().contiguous().numpy().tobytes()
        digest.update(f"{key} {tuple(state[key].shape)} ".encode() + values)
    return digest.hexdigest()


def base_sample(net):
    """64 weights of each of the base's parameters, evenly spread, all where there are fewer -> (n,) fp16."""
    state = base_state_dict(net)
    tensors = [state[name].detach().flatten() for name in parameter_names(net)]
    spread = [tensor[torch.arange(min(64, tensor.numel())) * tensor.numel() // min(64, tensor.numel())]
              for tensor in tensors]
    return torch.cat([values.float().cpu() for values in spread]).half()


def same_in_another_precision(net, sample):
    """Are the weights of the net those of which base_sample gave `sample`, but for the precision of a half?

    Equal within 2^-10 of the larger one, a unit in the last place of a half, because 16-bit files hold rounded weights
    or truncated ones; 2^-24 is that unit of the smallest. A hash of rounded weights would tell the two apart.
    """
    here, there = base_sample(net).float(), sample.float()
    return here.shape == there.shape and bool(
        ((here - there).abs() <= 2 ** -10 * torch.maximum(here.abs(), there.abs()) + 2 ** -24).all())


def save_lora(path, net, ema=None):
    """Write the adapters of `net`, and those of its average `ema` as the ones to use if given, to one small file.

    The average is over A and over B, not over B A. (CHOICE: then merged.pth, made of the averages, has equal weights.)
    """
    adapter = next(iter(adapted(net).values()))
    rank = adapter.lora_A.shape[0]
    state = {"lora": lora_state_dict(net), "rank": rank, "alpha": adapter.factor * rank, "targets": list(adapted(net)),
             "base_sha256": base_hash(net), "base_sample": base_sample(net)}
    if ema is not None:
        state["lora_ema"] = lora_state_dict(ema)
    runs.write_atomic(path, lambda temporary: torch.save(state, temporary))


def load_lora(net, path, scale=1.0, flag="--base"):
    """Adapt the plain net with the adapters of a file that save_lora wrote, with their average where there is one.

    scale: strength, 0 is the base, 1 the tuned net. -> "", or a remark where the net is the adapter's base in another
    precision, as a file in fp16 is. flag: the caller's, of the base, for errors. UserError for a file of another kind
    or an adapter of another base.
    """
    state = archs.read_file(path)
    if not isinstance(state, dict) or not {"lora", "rank", "alpha", "targets", "base_sha256"} <= set(state):
        raise runs.UserError(f"{path}: not a LoRA adapter of this repository")
    remark = ""
    if state["base_sha256"] != base_hash(net):
        # adapters of earlier commits have no sample
        sample = state.get("base_sample")
        if not isinstance(sample, torch.Tensor) or not same_in_another_precision(net, sample):
            raise runs.UserError(f"{path}: this adapter belongs to another base (its weights have SHA-256 "
                                 f"{state['base_sha256'][:12]}, these {base_hash(net)[:12]}); name its own with {flag}")
        remark = f"the base of {path} in another precision: its weights agree to 16 bits, not to the last one"
    add_lora(net, "^(" + "|".join(map(re.escape, state["targets"])) + ")$", state["rank"], state["alpha"])
    values = state.get("lora_ema", state["lora"])
    shapes = {key: value.shape for key, value in lora_state_dict(net).items()}
    wrong = sorted(set(shapes) ^ set(values)) or [key for key, shape in shapes.items() if values[key].shape != shape]
    if wrong:
        raise runs.UserError(f"{path}: a damaged adapter ({len(wrong)} tensors are missing, left over or of another "
                             f"shape, first {wrong[0]})")
    for name, adapter in adapted(net).items():
        adapter.load_state_dict({key: values[f"{name}.{key}"] for key in ("lora_A", "lora_B")})
        adapter.scale = scale
    return remark


def merged_state_dict(net):
    """State dict of a plain network that computes the same as the adapted one."""
    return base_state_dict(net) | {f"{name}.weight": net.get_submodule(name).weight.detach() for name in adapted(net)}


def merge_lora(net):
    """Turn the adapters into plain weights, W + scale * (alpha / rank) * B A, in place. -> net

    Not by parametrize.remove_parametrizations: it deletes the property from a class that deep copies (the EMA) share.
    """
    for name in adapted(net):
        layer = net.get_submodule(name)
        weight = nn.Parameter(layer.weight.detach())
        del layer.parametrizations
        # Conv2d or Linear again
        layer.__class__ = type(layer).__bases__[0]
        layer.register_parameter("weight", weight)
    return net


def load_tuned(path, scale=1.0, base=None, key=None, pad_mode=None, flag="--base"):
    """The generator that an adapter belongs to, tuned at this strength and merged -> (net, info of archs.load_run).

    path: run folder of finetune_lora.py, folder of an adapter.pth and its card, or an adapter.pth. base: weights or run
    that was tuned; None for the one that the run folder or the card names. key, pad_mode: see archs.load_run; flag:
    that of the base, for errors. info also has adapter, strength and remark (see load_lora).
    UserError as load_lora and archs.load_run, and where the base is not known or not there.
    """
    file = next((file for file in (path / "lora" / "adapter.pth", path / "adapter.pth") if file.is_file()), path)
    if not file.is_file():
        here = f"{path}/lora/adapter.pth" if path.is_dir() else path
        raise runs.UserError(f"{here}: no such adapter; finetune_lora.py leaves <run>/lora/adapter.pth")
    record, card = file.parent.parent / "args.json", file.parent / "README.md"
    args = runs.read_record(record)["args"] if record.is_file() else {}
    # init: a flag of earlier commits, weights in place of those of the run --base
    recorded = args.get("init") or args.get("base") or card_base(card)
    if base is None and recorded:
        base = runs.CHECKPOINT(recorded)
        if not base.exists():
            raise runs.UserError(f"{record if args else card}: was tuned from {recorded}, which is not here; call from "
                                 f"the folder where it was trained, or name it with {flag}; {runs.how_to_get(base)}")
    if base is None:
        raise runs.UserError(f"{file}: no args.json of a run and no card beside it to say what it belongs to; "
                             f"name the tuned weights with {flag}; {runs.how_to_get()}")
    net, info = archs.load_run(base, flag, key or args.get("weights_key"), pad_mode or args.get("pad_mode"))
    remark = load_lora(net, file, scale, flag)
    return merge_lora(net), info | {"adapter": str(file), "strength": scale, "remark": remark}


def card_base(card):
    """What the card of an adapter (README.md beside it) calls its base, on a line "base: NAME" of its own, or None."""
    line = re.search(r"^base: (\S+)$", card.read_text(encoding="utf-8"), re.M) if card.is_file() else None
    return line and line[1]


def main(args):
    runs.check_output(args.out, "--out")
    net, info = load_tuned(args.adapter, args.scale, args.base, args.weights_key)
    runs.save_weights(args.out, net.state_dict())
    print(f"{args.out}: {info['file']} + {args.scale:g} x {info['adapter']}")
    if info["remark"]:
        print(info["remark"])


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
