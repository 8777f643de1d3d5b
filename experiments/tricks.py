"""Tricks that were looked at: is each faster, and equal? In turn with what is used, on this machine. README says what was decided.

    python -m experiments.tricks --json results/bench/tricks.json            one CPU thread, processor time
    python -m experiments.tricks channels_last ema --device cuda              some of them; on a GPU wall time

channels_last: networks forward and backward in that memory format against the contiguous one. ema: the average of the weights by one foreach call against a loop. attention: SwinIR's
by PyTorch's fused function against the product, softmax and product written out. adam: --fused-adam against PyTorch's default. heads: SwinIR's attention with heads of 30 padded to 32, in q, k and v or in the weights. vgg: SR and GT in one batch
instead of two passes, the second without gradient. discriminator: real and fake in one batch, which is another discriminator (one power iteration of the spectral
norm, not two). "faster" is the median of the old times over that of the new ones, with the range over pairs.
"""
import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


import torch
import torch.nn.functional as F

import archs
import runs
from losses import VGGFeatureLoss, adversarial_loss


def in_turn(kinds, repeats, device):
    """{name: function} -> {name: [seconds]}; one call each does not count, and neither always goes first."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = {name: [] for name in kinds}
    for turn in range(repeats + 1):
        for name in list(kinds)[::-1 if turn % 2 else 1]:
            sync()
            started = clock()
            kinds[name]()
            sync()
            times[name].append(clock() - started)
    return {name: values[1:] for name, values in times.items()}


def compared(what, kinds, repeats, device, found, **more):
    """Times of all kinds against the first; `more` goes into the record."""
    times = in_turn(kinds, repeats, device)
    old, *new = times
    for name in new:
        ratios = sorted(a / b for a, b in zip(times[old], times[name]))
        found.append({"what": what, "trick": name, "faster": statistics.median(times[old]) / statistics.median(times[name]), "least": ratios[0], "most": ratios[-1], "n": repeats} | more.get(name, {}))
        print(what, name, found[-1])


def apart(a, b):
    """Largest difference, in units of the largest value."""
    return max(((x - y).abs().max() / x.abs().max().clamp_min(1e-12)).item() for x, y in zip(a, b, strict=True))


def channels_last(repeats, device, found, scale):
    with tempfile.TemporaryDirectory() as folder:
        made = {"compact, 4 LR crops of 32": (archs.ARCHS["compact"], 4, 32), "rrdbnet, 1 LR crop of 24": (archs.ARCHS["rrdbnet"], 1, 24),
                "D of 16 features, 4 crops of 128": (lambda: archs.UNetDiscriminatorSN(16), 4, 128), "D of 64 features, 2 crops of 128": (archs.UNetDiscriminatorSN, 2, 128),
                "VGG19's taps, 2 crops of 128": (lambda: VGGFeatureLoss(vgg_file(folder)), 2, 128)}
        for what, (build, batch, side) in made.items():
            kinds, results = {}, {}
            for name, memory in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
                torch.manual_seed(0)
                net = build().to(device, memory_format=memory)
                x = torch.rand(batch * scale, 3, side, side).to(device).contiguous(memory_format=memory).requires_grad_()

                def run(net=net, x=x):
                    net.zero_grad(set_to_none=True)
                    x.grad = None
                    outputs = net.taps(x) if hasattr(net, "taps") else [net(x)]
                    sum(y.square().mean() for y in outputs).backward()
                    return [x.grad.clone(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]
                kinds[name] = run
            results = {name: run() for name, run in kinds.items()}                 # the first pass of each: D's spectral norm moves at every one
            compared(f"channels_last, {what}", kinds, repeats, device, found, channels_last={"apart": apart(*results.values())})


def ema(repeats, device, found, scale):
    for arch in ("compact", "rrdbnet", "swinir"):
        nets = [archs.create(arch).to(device).requires_grad_(False) for _ in range(3)]
        nets[1].load_state_dict(nets[0].state_dict())

        def loop():
            for a, b in zip(nets[1].parameters(), nets[2].parameters()):
                a.lerp_(b, 0.001)
        kinds = {"loop": loop, "foreach": lambda: runs.update_ema(nets[0], nets[2], 0.999)}
        compared(f"ema, {arch}", kinds, repeats, device, found)
        found[-1]["apart"] = apart(*([p for p in net.parameters()] for net in nets[:2]))


def adam(repeats, device, found, scale):
    for arch in ("compact", "rrdbnet", "swinir"):
        nets, optimisers, kinds = {}, {}, {}
        for name, fused in (("default", False), ("fused", True)):
            torch.manual_seed(0)
            nets[name] = archs.create(arch).to(device)
            optimisers[name] = runs.adam(nets[name].parameters(), 1e-4, fused)
            for p in nets[name].parameters():
                p.grad = torch.full_like(p, 1e-3)
            kinds[name] = optimisers[name].step
        compared(f"adam, {arch}", kinds, repeats, device, found)
        found[-1]["apart"] = apart(*([p.detach() for p in nets[name].parameters()] for name in kinds))


def padded(in_weights):
    """WindowAttention.forward with heads padded to a multiple of 8."""
    def forward(self, x, mask):
        b, nw, n, c = x.shape
        size = c // self.heads
        more = -size % 8
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()].view(n, n, self.heads).permute(2, 0, 1)
        if in_weights:
            weight = F.pad(self.qkv.weight.view(3, self.heads, size, c), (0, 0, 0, more)).view(-1, c)
            qkv = F.linear(x, weight, F.pad(self.qkv.bias.view(3, self.heads, size), (0, more)).flatten()).view(b, nw, n, 3, self.heads, -1)
        else:
            qkv = F.pad(self.qkv(x).view(b, nw, n, 3, self.heads, size), (0, more))
        qkv = qkv.permute(3, 0, 1, 4, 2, 5)
        q, k, v = qkv.flatten(1, 2) if mask is None else qkv.flatten(2, 3)
        bias = bias[None] if mask is None else (bias + mask[:, None]).flatten(0, 1)[None]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1 / math.sqrt(size))
        if not in_weights:
            return self.proj(x[..., :size].reshape(b, nw, self.heads, n, -1).transpose(2, 3).reshape(b, nw, n, c))
        x = x.reshape(b, nw, self.heads, n, -1).transpose(2, 3).reshape(b, nw, n, -1)
        return F.linear(x, F.pad(self.proj.weight.view(c, self.heads, size), (0, more)).reshape(c, -1), self.proj.bias)
    return forward


FORWARD, FUSED = archs.WindowAttention.forward, F.scaled_dot_product_attention


def written_out(self, x, mask):
    """WindowAttention.forward without the fused attention."""
    try:
        F.scaled_dot_product_attention = lambda q, k, v, attn_mask: (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + attn_mask).softmax(-1) @ v
        return FORWARD(self, x, mask)
    finally:
        F.scaled_dot_product_attention = FUSED


def heads(repeats, device, found, scale):
    attentions("heads", {"as it is": FORWARD, "q, k, v padded": padded(False), "weights padded": padded(True)}, repeats, device, found, scale)


def attention(repeats, device, found, scale):
    attentions("attention", {"written out": written_out, "fused": FORWARD}, repeats, device, found, scale)


def attentions(title, forwards, repeats, device, found, batch):
    """One group of six blocks, as SwinIR has six, on 72 x 72 tokens: an LR crop of 64 pixels, padded."""
    torch.manual_seed(0)
    group = archs.SwinIR(depths=(6,), heads=(6,), drop_path=0.0).layers[0].to(device)
    mask, x = archs.shift_mask(72, 72, 8, 4).to(device), torch.randn(batch, 72, 72, 180, device=device)

    def run(name, backward):
        archs.WindowAttention.forward = forwards[name]
        group.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(backward):
            y = group(x, mask, [None] * 6)
            if backward:
                y.square().mean().backward()
        return [y.detach(), *(p.grad for p in group.parameters() if backward)]
    expected = run(next(iter(forwards)), True)
    differences = {name: {"apart": apart(expected, run(name, True))} for name in forwards}
    for what, backward in (("forward", False), ("forward and backward", True)):
        compared(f"{title}, {what}", {name: lambda name=name: run(name, backward) for name in forwards}, repeats, device, found, **differences)


def pair(batch, side, device):
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(batch, 3, side, side, generator=generator).to(device).contiguous(memory_format=torch.channels_last) for _ in range(2))


def vgg_file(folder):
    """VGG19's features with random weights, as --vgg-weights takes them."""
    from torchvision.models import vgg19
    torch.manual_seed(0)
    torch.save(vgg19(weights=None).features.state_dict(), Path(folder) / "vgg19.pth")
    return Path(folder) / "vgg19.pth"


def perceptual(file, batch, side, device):
    """{name: function -> gradient on SR}, of both ways."""
    vgg = VGGFeatureLoss(file).to(device, memory_format=torch.channels_last)
    sr, gt = pair(batch, side, device)

    def together(sr, gt):
        taps = [t.chunk(2) for t in vgg.taps(torch.cat([sr, gt]))]
        return sum(w * F.l1_loss(a, b.detach()) for w, (a, b) in zip(vgg.TAPS.values(), taps))

    def run(loss):
        x = sr.clone().requires_grad_()
        loss(x, gt).backward()
        return x.grad
    return {"two passes": lambda: run(vgg), "one batch": lambda: run(together)}


def vgg(repeats, device, found, scale):
    with tempfile.TemporaryDirectory() as folder:
        file = vgg_file(folder)
        for batch, side in ((2 * scale, 128), (4 * scale, 128)):
            kinds = perceptual(file, batch, side, device)
            memory = {}
            for name in kinds:                                                    # in a process of its own: a peak cannot be taken back
                command = [sys.executable, __file__, "--device", device.type, "--memory", name, str(file), str(batch), str(side)]
                memory[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            more = {"apart": apart([kinds["two passes"]()], [kinds["one batch"]()]), "memory_ratio": memory["one batch"] / memory["two passes"]}
            compared(f"vgg, {batch} crops of {side}", kinds, repeats, device, found, **{"one batch": more})


def memory_of(name, file, batch, side, device):
    """Print by how many MB the peak of a loss lies above what is held before."""
    kinds = perceptual(file, int(batch), int(side), device)
    if device.type == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kinds[name]()
        return print((torch.cuda.max_memory_allocated() - held) / 2 ** 20)
    status = lambda key: int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 2 ** 10
    Path("/proc/self/clear_refs").write_text("5")                                # the peak begins anew
    held = status("VmRSS")
    kinds[name]()
    print(status("VmHWM") - held)


def discriminator(repeats, device, found, scale):
    for width, batch, side in ((16, 4 * scale, 128), (64, 2 * scale, 128)):
        torch.manual_seed(0)
        net, (real, fake) = archs.UNetDiscriminatorSN(width).to(device, memory_format=torch.channels_last).train(), pair(batch, side, device)

        def two():
            net.zero_grad(set_to_none=True)
            for images, truth in ((real, True), (fake, False)):
                adversarial_loss(net(images), truth).backward()

        def one():
            net.zero_grad(set_to_none=True)
            a, b = net(torch.cat([real, fake])).chunk(2)
            (adversarial_loss(a, True) + adversarial_loss(b, False)).backward()
        compared(f"discriminator of {width} features, {batch} crops of {side}", {"two batches": two, "one batch": one}, repeats, device, found)


TRICKS = {trick.__name__: trick for trick in (channels_last, ema, attention, adam, heads, vgg, discriminator)}


def main(args):
    device = runs.start_world(args.device, 1).device
    if args.memory:
        return memory_of(*args.memory, device)
    runs.check_output(args.json, "--json")
    found = []
    for name in args.tricks or TRICKS:
        TRICKS[name](args.repeats, device, found, 8 if device.type == "cuda" else 1)
    print(runs.markdown(["", "trick", "faster", "range", "n", "apart", "memory"],
                        [[f["what"], f["trick"], f"{f['faster']:.2f}", f"{f['least']:.2f} to {f['most']:.2f}", f["n"], f"{f['apart']:.0e}" if "apart" in f else "",
                          f"{f['memory_ratio']:.2f}" if "memory_ratio" in f else ""] for f in found]))
    if args.json:
        runs.save_json(args.json, {"command": sys.argv, **runs.describe_machine(), "found": found})


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("tricks", nargs="*", choices=[*TRICKS, []], metavar="TRICK", help=", ".join(TRICKS))
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--repeats", type=int, default=12, help="measurements of each kind")
    p.add_argument("--json", type=Path)
    p.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    ARGS = p.parse_args()
    runs.cli(lambda: main(ARGS))
