"""Tricks that could make training faster: is each faster, and equal? In turn with the code that is used.

    python -m experiments.tricks --json runs/bench/tricks.json               one CPU thread, processor time
    python -m experiments.tricks channels_last ema --device cuda             some of them; on a GPU wall time

channels_last   networks forward and backward in that memory format against the contiguous one
ema             the average of the weights by one foreach call against a loop
attention       SwinIR's by PyTorch's fused function against the product, softmax and product written out
adam            PyTorch's fused Adam against its default
heads           SwinIR's attention with heads of 30 padded to 32, in q, k and v or in the weights
vgg             SR and GT in one batch instead of two passes, the second without gradient
discriminator   real and fake in one batch: another discriminator (one power iteration of the spectral norm, not two)

"faster" is the median of the old times over that of the new ones, with the range over pairs. docs/speed.md says which
are used.
"""
import argparse
from pathlib import Path

import runs

NAMES = ("channels_last", "ema", "attention", "adam", "heads", "vgg", "discriminator")


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("tricks", nargs="*", choices=[*NAMES, []], metavar="TRICK", help="default: all")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the networks run")
    p.add_argument("--repeats", type=runs.SIZE, default=12, help="measurements of each variant")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    p.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    return p.parse_args(argv)


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import math
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

import torch
import torch.nn.functional as F

import archs
from losses import VGGFeatureLoss, adversarial_loss


class Measurements:
    """repeats: calls of each variant; scale: factor of the batch sizes; rows: the results so far."""

    def __init__(self, device, repeats):
        self.device, self.repeats, self.scale, self.rows = device, repeats, 8 if device.type == "cuda" else 1, []

    def in_turn(self, variants):
        """{name: function} -> {name: [seconds]}; one call each does not count, and no variant always goes first."""
        gpu = self.device.type == "cuda"
        times = {name: [] for name in variants}
        for turn in range(self.repeats + 1):
            for name in list(variants)[::-1 if turn % 2 else 1]:
                if gpu:
                    torch.cuda.synchronize()
                started = time.perf_counter() if gpu else time.process_time()
                variants[name]()
                if gpu:
                    torch.cuda.synchronize()
                times[name].append((time.perf_counter() if gpu else time.process_time()) - started)
        return {name: values[1:] for name, values in times.items()}

    def compare(self, title, variants, **more):
        """Times of all variants against the first. more: {name: further values of its row}"""
        times = self.in_turn(variants)
        old, *new = times
        for name in new:
            ratios = sorted(a / b for a, b in zip(times[old], times[name]))
            faster = statistics.median(times[old]) / statistics.median(times[name])
            self.rows.append({"what": title, "trick": name, "faster": faster, "least": ratios[0], "most": ratios[-1],
                              "n": self.repeats} | more.get(name, {}))
            print(self.rows[-1], file=sys.stderr)


def apart(a, b):
    """Largest difference, in units of the largest value."""
    gaps = [(x - y).abs().max() / x.abs().max().clamp_min(1e-12) for x, y in zip(a, b, strict=True)]
    return max(gap.item() for gap in gaps)


def channels_last(m):
    with tempfile.TemporaryDirectory() as folder:
        networks = {"compact, 4 LR crops of 32": (partial(archs.create, "compact"), 4, 32),
                    "rrdbnet, 1 LR crop of 24": (partial(archs.create, "rrdbnet"), 1, 24),
                    "D of 16 features, 4 crops of 128": (partial(archs.UNetDiscriminatorSN, 16), 4, 128),
                    "D of 64 features, 2 crops of 128": (archs.UNetDiscriminatorSN, 2, 128),
                    "VGG19's taps, 2 crops of 128": (partial(VGGFeatureLoss, vgg_file(folder)), 2, 128)}
        for title, (build, batch, side) in networks.items():
            variants = {}
            for name, memory in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
                torch.manual_seed(0)
                net = build().to(m.device, memory_format=memory)
                x = torch.rand(batch * m.scale, 3, side, side).to(m.device).contiguous(memory_format=memory)
                variants[name] = partial(gradients, net, x.requires_grad_())
            # the first pass of each: D's spectral norm moves at every one
            gap = apart(*(run() for run in variants.values()))
            m.compare(f"channels_last, {title}", variants, channels_last={"apart": gap})


def gradients(net, x):
    """Forward and backward -> the gradients of image and weights."""
    net.zero_grad(set_to_none=True)
    x.grad = None
    outputs = net.taps(x) if hasattr(net, "taps") else [net(x)]
    sum(y.square().mean() for y in outputs).backward()
    return [x.grad.clone(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def ema(m):
    for arch in ("compact", "rrdbnet", "swinir"):
        one, other, net = (archs.create(arch).to(m.device).requires_grad_(False) for _ in range(3))
        other.load_state_dict(one.state_dict())

        def loop(other=other, net=net):
            for a, b in zip(other.parameters(), net.parameters()):
                a.lerp_(b, 0.001)
        m.compare(f"ema, {arch}", {"loop": loop, "foreach": partial(runs.update_ema, one, net, 0.999)})
        m.rows[-1]["apart"] = apart(list(one.parameters()), list(other.parameters()))


def adam(m):
    for arch in ("compact", "rrdbnet", "swinir"):
        weights, variants = {}, {}
        for name in ("default", "fused"):
            torch.manual_seed(0)
            weights[name] = list(archs.create(arch).to(m.device).parameters())
            for p in weights[name]:
                p.grad = torch.full_like(p, 1e-3)
            # runs.adam is fused on CUDA
            optimiser = torch.optim.Adam(weights[name], lr=1e-4, betas=(0.9, 0.99), fused=name == "fused" or None)
            variants[name] = optimiser.step
        m.compare(f"adam, {arch}", variants)
        m.rows[-1]["apart"] = apart(*([p.detach() for p in weights[name]] for name in variants))


def padded(in_weights):
    """WindowAttention.forward with heads padded to a multiple of 8."""
    def forward(self, x, mask):
        b, nw, n, c = x.shape
        size = c // self.heads
        more = -size % 8
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.view(n, n, self.heads).permute(2, 0, 1)
        if in_weights:
            weight = F.pad(self.qkv.weight.view(3, self.heads, size, c), (0, 0, 0, more)).view(-1, c)
            offset = F.pad(self.qkv.bias.view(3, self.heads, size), (0, more)).flatten()
            qkv = F.linear(x, weight, offset).view(b, nw, n, 3, self.heads, -1)
        else:
            qkv = F.pad(self.qkv(x).view(b, nw, n, 3, self.heads, size), (0, more))
        qkv = qkv.permute(3, 0, 1, 4, 2, 5)
        q, k, v = qkv.flatten(1, 2) if mask is None else qkv.flatten(2, 3)
        bias = bias[None] if mask is None else (bias + mask[:, None]).flatten(0, 1)[None]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1 / math.sqrt(size))
        if not in_weights:
            x = x[..., :size].reshape(b, nw, self.heads, n, -1)
            return self.proj(x.transpose(2, 3).reshape(b, nw, n, c))
        x = x.reshape(b, nw, self.heads, n, -1).transpose(2, 3).reshape(b, nw, n, -1)
        weight = F.pad(self.proj.weight.view(c, self.heads, size), (0, more)).reshape(c, -1)
        return F.linear(x, weight, self.proj.bias)
    return forward


FORWARD, FUSED = archs.WindowAttention.forward, F.scaled_dot_product_attention


def plain_attention(q, k, v, attn_mask, scale):
    return (q @ k.transpose(-2, -1) * scale + attn_mask).softmax(-1) @ v


def written_out(self, x, mask):
    """WindowAttention.forward without the fused attention."""
    try:
        F.scaled_dot_product_attention = plain_attention
        return FORWARD(self, x, mask)
    finally:
        F.scaled_dot_product_attention = FUSED


def heads(m):
    attentions(m, "heads", {"as it is": FORWARD, "q, k, v padded": padded(False), "weights padded": padded(True)})


def attention(m):
    attentions(m, "attention", {"written out": written_out, "fused": FORWARD})


def attentions(m, title, forwards):
    """One group of six blocks, as SwinIR has six, on 72 x 72 tokens: an LR crop of 64 pixels, padded."""
    torch.manual_seed(0)
    group = archs.SwinIR(depths=(6,), heads=(6,), drop_path=0.0).layers[0].to(m.device)
    mask, x = archs.shift_mask(72, 72, 8, 4).to(m.device), torch.randn(m.scale, 72, 72, 180, device=m.device)

    def run(name, backward):
        archs.WindowAttention.forward = forwards[name]
        try:
            group.zero_grad(set_to_none=True)
            with torch.set_grad_enabled(backward):
                y = group(x, mask, [None] * 6)
                if backward:
                    y.square().mean().backward()
        finally:
            archs.WindowAttention.forward = FORWARD
        return [y.detach(), *(p.grad for p in group.parameters() if backward)]
    expected = run(next(iter(forwards)), True)
    differences = {name: {"apart": apart(expected, run(name, True))} for name in forwards}
    for part, backward in (("forward", False), ("forward and backward", True)):
        m.compare(f"{title}, {part}", {name: partial(run, name, backward) for name in forwards}, **differences)


def pair(batch, side, device):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(batch, 3, side, side, generator=generator) for _ in range(2)]
    return (image.to(device).contiguous(memory_format=torch.channels_last) for image in images)


def vgg_file(folder):
    """VGG19's features with random weights, as --vgg-weights takes them."""
    from torchvision.models import vgg19
    torch.manual_seed(0)
    torch.save(vgg19(weights=None).features.state_dict(), Path(folder) / "vgg19.pth")
    return Path(folder) / "vgg19.pth"


def perceptual(file, batch, side, device):
    """{name: function -> gradient on SR}, of both ways."""
    net = VGGFeatureLoss(file).to(device, memory_format=torch.channels_last)
    sr, gt = pair(batch, side, device)

    def together(sr, gt):
        taps = [t.chunk(2) for t in net.taps(torch.cat([sr, gt]))]
        return sum(w * F.l1_loss(a, b.detach()) for w, (a, b) in zip(net.TAPS.values(), taps))

    def run(loss):
        x = sr.clone().requires_grad_()
        loss(x, gt).backward()
        return x.grad
    return {"two passes": partial(run, net), "one batch": partial(run, together)}


def vgg(m):
    with tempfile.TemporaryDirectory() as folder:
        file = vgg_file(folder)
        for batch, side in ((2 * m.scale, 128), (4 * m.scale, 128)):
            variants = perceptual(file, batch, side, m.device)
            memory = {}
            for name in variants:
                # in a process of its own: a peak cannot be taken back
                command = runs.python("experiments.tricks", "--device", m.device.type, "--memory",
                                      name, file, batch, side)
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=runs.python_path())
                memory[name] = float(done.stdout)
            more = {"apart": apart([variants["two passes"]()], [variants["one batch"]()]),
                    "memory_ratio": memory["one batch"] / memory["two passes"]}
            m.compare(f"vgg, {batch} crops of {side}", variants, **{"one batch": more})


def status(key):
    """MB of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 2 ** 10


def print_memory(name, file, batch, side, device):
    """Print by how many MB the peak of a loss lies above the memory held before."""
    run = perceptual(file, int(batch), int(side), device)[name]
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return print((torch.cuda.max_memory_allocated() - before) / 2 ** 20)
    # the peak begins anew
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run()
    print(status("VmHWM") - before)


def discriminator(m):
    for width, batch, side in ((16, 4 * m.scale, 128), (64, 2 * m.scale, 128)):
        torch.manual_seed(0)
        net = archs.UNetDiscriminatorSN(width).to(m.device, memory_format=torch.channels_last).train()
        real, fake = pair(batch, side, m.device)

        def two(net=net, real=real, fake=fake):
            net.zero_grad(set_to_none=True)
            for images, truth in ((real, True), (fake, False)):
                adversarial_loss(net(images), truth).backward()

        def one(net=net, real=real, fake=fake):
            net.zero_grad(set_to_none=True)
            a, b = net(torch.cat([real, fake])).chunk(2)
            (adversarial_loss(a, True) + adversarial_loss(b, False)).backward()
        title = f"discriminator of {width} features, {batch} crops of {side}"
        m.compare(title, {"two batches": two, "one batch": one})


def main(args):
    device = runs.start_world(args.device, 1).device
    if args.memory:
        return print_memory(*args.memory, device)
    runs.check_output(args.json, "--json")
    m = Measurements(device, args.repeats)
    for name in args.tricks or NAMES:
        globals()[name](m)
    rows = [[row["what"], row["trick"], f"{row['faster']:.2f}", f"{row['least']:.2f} to {row['most']:.2f}", row["n"],
             f"{row['apart']:.0e}" if "apart" in row else "",
             f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else ""] for row in m.rows]
    print(runs.markdown(["", "trick", "faster", "range", "n", "apart", "memory"], rows))
    if args.json:
        runs.save_json(args.json, {"command": sys.argv, **runs.describe_machine(), "found": m.rows})


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
