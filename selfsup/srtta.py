"""SRTTA: adapt a x4 network to test images by degrading them once more (Deng et al., NeurIPS 2023).

    python -m selfsup.srtta --demo                                               small and short, on a CPU
    python -m selfsup.srtta --sr runs/swinir-amo --lr-dir PHOTOS --clean HR      leaves runs/swinir-amo+PHOTOS-srtta
    python -m selfsup.srtta ... --types blur noise                               instead of a classifier for each image
    python evaluate.py --protocol whole-y --weights RUN --images RUN/online --lq PHOTOS --gt HR

A test image X is degraded a second time, with the types of degradation that it has, and at its own size. The network is
trained so that the features of this image are those that it has of X itself, and those that the network before any
adaptation has of X: ten steps per image, image after image, with weights and optimiser carried on. Half of every
tensor, the half that matters most to clean images, stays as it was. Scale is not trained: nothing is shrunk.

Two results: the network after the last image (weights/ema_*.pth, which the authors' tables report), and every image as
enlarged right after its own steps (online/). Adaptation depends on the order of the images, which is that of names.
"""
from pathlib import Path

import runs
from selfsup import options

TYPES = ("blur", "noise", "jpeg")
DEMO = dict(sr=options.DEMO_SR, lr_dir=options.DEMO_DOMAIN / "lq", clean=options.DEMO_PHOTOS, types=["auto"],
            out=Path("runs/srtta-demo"), patch=32, batch_size=4, steps=5, classifier_steps=100, threads=1)


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--demo", action="store_true", help="the demo's domain and compact network; same code")
    p.add_argument("--sr", type=runs.CHECKPOINT, metavar="PATH",
                   help="x4 network to adapt: any weight file or run folder that upscale.py takes")
    runs.add_weights_key(p)
    p.add_argument("--lr-dir", type=Path, metavar="DIR", help="low-resolution images of one source")
    p.add_argument("--clean", type=Path, metavar="DIR",
                   help="sharp photographs; shrunk by 4 they tell which weights to keep, and train the classifier")
    p.add_argument("--types", nargs="+", choices=["auto", *TYPES], default=["auto"],
                   help="types of degradation that all images have; auto: a classifier's verdict on each image")
    p.add_argument("--out", type=Path, metavar="DIR", help="run folder; default: see above")
    p.add_argument("--resume", nargs="?", const="must", default="no", choices=["must", "auto", "no"],
                   help="continue --out after its last image; auto: start if there is none")
    g = p.add_argument_group("adaptation")
    g.add_argument("--steps", type=runs.SIZE, default=10, help="per image (SRTTA: 10)")
    g.add_argument("--batch-size", type=runs.SIZE, default=32, help="patches per step (SRTTA: 32)")
    g.add_argument("--patch", type=runs.number(int, 16), default=64, help="their side in LR pixels (SRTTA: 64)")
    g.add_argument("--lr", type=runs.RATE, default=5e-5, help="learning rate (SRTTA)")
    g.add_argument("--reset", choices=["domain", "image"], default="domain",
                   help="go back to --sr for every folder (SRTTA), or for every image: then there is no final network")
    g.add_argument("--classifier-steps", type=runs.SIZE, default=1000,
                   help="training of the classifier (CHOICE: a small network on this repository's degradations)")
    options.add_seeded_machine(p, "bf16 keeps losses and weights in fp32")
    if p.parse_known_args(argv)[0].demo:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    for flag, value in (("--sr", args.sr), ("--lr-dir", args.lr_dir), ("--clean", args.clean)):
        if value is None:
            p.error(f"{flag} is needed")
    if "auto" in args.types and len(args.types) > 1:
        p.error("--types auto: leaves the choice to the classifier; leave out auto, or the others")
    name = args.sr.name if args.sr.is_dir() else args.sr.stem
    args.out = args.out or Path("runs") / f"{name}+{args.lr_dir.resolve().name}-srtta"
    return args


# --help and flag errors need no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import copy
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import archs
import degradations
import lora
from images import cut_to_x4, image_size, list_images, load_image, save_image
from selfsup import kernels

# SRTTA: 1e-3 under the root of the loss; weight of the term of the network before adaptation; share of kept weights
ROOT, ALPHA, KEPT = 1e-3, 1.0, 0.5
# CHOICE: clean images that say which weights to keep (SRTTA: Set5's five), and side of the part that is looked at
CLEAN_IMAGES, CLEAN_SIDE = 8, 64
# patches that go through the network at a time: the loss is a mean, so this changes memory only
AT_A_TIME = 8
# SRTTA's second degradation: odd kernel sides, sigmas, grey levels of noise, share of grey noise, JPEG quality
BLUR = degradations.REALESRGAN | dict(kernel_sizes=tuple(range(7, 22, 2)), sinc_prob=0.0, blur_sigma=(0.2, 3.0),
                                      families={"iso": 0.5, "aniso": 0.5})
NOISE, GREY, QUALITY = (1, 30), 0.4, (30, 95)
FIXED = ("sr_hash", "images", "types", "steps", "batch_size", "patch", "lr", "reset", "classifier_steps", "seed",
         "clean_images")


# Which weights move, and where features are taken

def adapted_names(net):
    """Names of the parameters that move: the body. Head and tail stay."""
    names = [name for name, _ in net.named_parameters()]
    if isinstance(net, archs.SRVGGNetCompact):
        ends = "body.0.", f"body.{len(net.body) - 1}."
        return [name for name in names if not name.startswith(ends)]
    parts = {archs.RRDBNet: ("body.", "conv_body."), archs.SwinIR: ("layers.", "norm.", "conv_after_body.")}[type(net)]
    return [name for name in names if name.startswith(parts)]


class Features(nn.Module):
    """(B, 3, h, w) -> what the network's last convolution is given, (B, C, H, W): h x w or four times as large.

    SwinIR pads images; features of the padding are cut away.
    """

    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, None
        self.last = net.body[-1] if isinstance(net, archs.SRVGGNetCompact) else net.conv_last
        self.last.register_forward_pre_hook(self._keep)

    def _keep(self, module, inputs):
        self.seen = inputs[0]

    def forward(self, lq):
        self.net(lq)
        features, self.seen = self.seen, None
        factor = 1 if isinstance(self.net, archs.SRVGGNetCompact) else 4
        return features[..., :factor * lq.shape[2], :factor * lq.shape[3]].float()


def distance(a, b):
    """Mean of sqrt((a - b)^2 + 1e-3)."""
    return ((a - b).square() + ROOT).sqrt().mean()


# Degradation

def degrade_again(patches, types, seeds):
    """Each of (B, 3, p, p) with the named types, drawn for each patch: blur, noise, JPEG. -> the same size, 8-bit."""
    rngs = [np.random.default_rng(seed) for seed in seeds]
    if "blur" in types:
        drawn = [degradations.draw_kernel(rng, BLUR, 21)["kernel"] for rng in rngs]
        patches = degradations.blur(patches, np.stack(drawn))
    if "noise" in types:
        fields = []
        for rng in rngs:
            channels = 1 if rng.random() < GREY else 3
            seed, shape = int(rng.integers(2 ** 62)), (channels, *patches.shape[2:])
            fields.append(degradations.normal_field(shape, seed, patches.device).expand(3, -1, -1))
        sigma = torch.tensor([rng.uniform(*NOISE) for rng in rngs], dtype=torch.float32)
        patches = degradations.add_gaussian_noise(patches, sigma, torch.stack(fields))
    if "jpeg" in types:
        patches = degradations.jpeg(patches, [rng.uniform(*QUALITY) for rng in rngs], "libjpeg")
    return degradations.to_8bit(patches)


def draw_patches(image, side, seeds):
    """(1, 3, h, w) -> (B, 3, side, side): random places, mirrored and transposed at random."""
    patches = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        y, x = (int(rng.integers(whole - side + 1)) for whole in image.shape[2:])
        patch = image[0, :, y:y + side, x:x + side]
        for dims in ((1,), (2,)):
            patch = patch.flip(dims) if rng.random() < 0.5 else patch
        patches.append(patch.mT if rng.random() < 0.5 else patch)
    return torch.stack(patches)


class Classifier(nn.Module):
    """(B, 3, h, w) in [0, 1] -> (B, 3) logits of blur, noise, jpeg. CHOICE: SRTTA's is a ResNet-50 of ImageNet."""

    def __init__(self, width=32):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, width, 5, 1, 2), nn.Conv2d(width, width, 3, 2, 1),
                                     nn.Conv2d(width, 2 * width, 3, 2, 1), nn.Conv2d(2 * width, 2 * width, 3, 2, 1)])
        self.head = nn.Linear(4 * width, len(TYPES))
        for layer in self.layers:
            # PyTorch's default makes the signal smaller from layer to layer, and short trainings end with no verdict
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, lq):
        # differences of neighbours, which degradations change, brought to about unit size
        x = 12 * (lq - F.avg_pool2d(F.pad(lq, (1, 1, 1, 1), mode="replicate"), 3, 1))
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(torch.cat([x.mean((2, 3)), x.square().mean((2, 3)).add(1e-6).sqrt()], 1))


def train_classifier(clean, side, steps, seed, device, batch=32):
    """Learn to name the types of patches of clean LR images. clean: [(1, 3, h, w)]. -> Classifier in eval mode.

    A quarter of the patches is clean, the others have each type with probability 0.6.
    """
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier().to(device)
    opt = torch.optim.Adam(net.parameters())
    side = min(side, *(length for image in clean for length in image.shape[2:]))
    for step in range(steps):
        opt.param_groups[0]["lr"] = 2e-3 * (1 + np.cos(np.pi * step / steps)) / 2
        seeds = rng.integers(2 ** 62, size=batch)
        images = torch.cat([draw_patches(clean[rng.integers(len(clean))], side, [seed]) for seed in seeds])
        labels = (rng.random((batch, 3)) < 0.6) & (rng.random((batch, 1)) < 0.75)
        for name, has in zip(TYPES, labels.T):
            chosen = has.nonzero()[0].tolist()
            if chosen:
                images[chosen] = degrade_again(images[chosen], [name], seeds[chosen])
        logits = net(images)
        loss = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels).to(logits))
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
    return net.eval().requires_grad_(False)


@torch.no_grad()
def types_of(classifier, lq):
    """Names of the types that the classifier sees in (1, 3, h, w)."""
    return [name for name, logit in zip(TYPES, classifier(lq)[0].tolist()) if logit > 0]


# Adaptation

@torch.no_grad()
def self_ensemble(net, lq):
    """Mean of the eight turned and mirrored outputs, turned back."""
    return torch.stack(kernels.eight_ways(lambda image: net(image).float(), lq)).mean(0)


def kept_weights(net, names, clean, autocast):
    """{name: bool tensor}: the half of every tensor with the largest Fisher value, the mean of the squared gradients.

    The loss is the distance of the network's output to its self-ensemble, on each of the clean LR images. (SRTTA's
    formula; its released code keeps the last image's gradients only.)
    """
    parameters = dict(net.named_parameters())
    fisher = {name: torch.zeros_like(parameters[name]) for name in names}
    for lq in clean:
        with autocast():
            target = self_ensemble(net, lq)
            sr = net(lq)
        gradients = torch.autograd.grad(distance(sr.float(), target), [parameters[name] for name in names])
        for name, gradient in zip(names, gradients):
            fisher[name] += gradient.square() / len(clean)
    masks = {}
    for name, value in fisher.items():
        largest = value.flatten().argsort(descending=True)[:int(value.numel() * KEPT)]
        mask = torch.zeros(value.numel(), dtype=torch.bool, device=value.device)
        mask[largest] = True
        masks[name] = mask.view(value.shape)
    return masks


def step(student, teacher, opt, patches, again, masks, start, autocast):
    """One step: features of the patches degraded again go to those of the patches, of both networks. -> the loss

    masks, start: {name: weights that are set back, the weights before adaptation}.
    """
    opt.zero_grad(set_to_none=True)
    total = 0.0
    for clean, worse in zip(patches.split(AT_A_TIME), again.split(AT_A_TIME)):
        with autocast():
            with torch.no_grad():
                own, first = student(clean), teacher(clean)
            features = student(worse)
        loss = distance(features, own) + ALPHA * distance(features, first)
        (loss * len(clean) / len(patches)).backward()
        total += loss.item() * len(clean) / len(patches)
    opt.step()
    with torch.no_grad():
        parameters = dict(student.net.named_parameters())
        for name, mask in masks.items():
            parameters[name].copy_(torch.where(mask, start[name], parameters[name]))
    return total


def optimiser(net, names, lr):
    parameters = dict(net.named_parameters())
    return torch.optim.Adam([parameters[name] for name in names], lr=lr)


def middle(image, side):
    """The middle part of (1, 3, h, w), at most side x side."""
    tops = [max(0, whole - side) // 2 for whole in image.shape[2:]]
    return image[..., tops[0]:tops[0] + side, tops[1]:tops[1] + side]


def open_clean(folder, device):
    """The photographs of a folder at a quarter of their size, MATLAB's bicubic: [(1, 3, h, w)]."""
    if not folder.is_dir():
        raise runs.UserError(f"--clean {folder}: no such folder")
    images = []
    for path in list_images(folder).values():
        photo = cut_to_x4(load_image(path, rgb=True))[None].float() / 255
        if min(photo.shape[2:]) >= 64:
            images.append(degradations.bicubic(photo).to(device))
    if not images:
        raise runs.UserError(f"--clean {folder}: no photograph of at least 64 x 64 pixels")
    return images


def main(args):
    world, seeds, autocast = runs.start_training(args.device, args.threads, args.seed, args.precision)
    device = world.device
    if world.size > 1:
        raise runs.UserError("SRTTA goes from image to image: start one process, without torchrun")
    if args.demo:
        options.make_demo_start([path for path in (options.DEMO_SET, options.DEMO_DOMAIN, args.sr)
                                 if path in options.DEMO_COMMANDS], world, args.device)
    if not args.lr_dir.is_dir():
        raise runs.UserError(f"--lr-dir {args.lr_dir}: no such folder")
    files = list_images(args.lr_dir)
    for path in files.values():
        width, height = image_size(path)
        if min(width, height) < args.patch:
            raise runs.UserError(f"{path}: {width}x{height} pixels, smaller than a patch: --patch "
                                 f"{min(width, height)} or less, or leave it out")
    base, info = archs.load_x4(args.sr, "--sr", args.weights_key)
    clean = open_clean(args.clean, device)
    facts = {"sr_hash": lora.base_hash(base), "images": runs.digest(list(files)), "clean_images": len(clean),
             "pad_mode": info["sizes"].get("pad_mode")}
    run = runs.Run(args.out, vars(args) | facts, world, args.resume, FIXED)
    if hasattr(base, "drop_path"):
        base.drop_path = 0.0
    memory = torch.channels_last if archs.is_convolutional(base) else torch.contiguous_format
    base = base.to(device, memory_format=memory).eval()
    names = adapted_names(base)
    teacher, student = (Features(copy.deepcopy(base).requires_grad_(False)) for _ in range(2))
    for name, parameter in student.net.named_parameters():
        parameter.requires_grad_(name in names)
    start = {name: parameter.detach().clone() for name, parameter in student.net.named_parameters() if name in names}
    opt, state = optimiser(student.net, names, args.lr), run.checkpoint
    run.open()
    moving = sum(parameter.numel() for parameter in start.values())
    run.say(f"{info['file']} ({info['arch']}, key {info['key']}): {moving:,} of {info['parameters']:,} weights in the "
            f"body, {len(files)} images, {args.steps} steps of {args.batch_size} patches of {args.patch} pixels "
            f"on {device}")
    if state:
        student.net.load_state_dict(state["net"])
        opt.load_state_dict(state["opt"])
        masks, classifier = state["masks"], state["classifier"]
        masks = {name: mask.to(device) for name, mask in masks.items()}
    else:
        masks = kept_weights(base, names, [middle(lq, CLEAN_SIDE) for lq in clean[:CLEAN_IMAGES]], autocast)
        classifier = None
        if args.types == ["auto"]:
            classifier = train_classifier(clean, args.patch, args.classifier_steps, seeds(0, 0, "classifier"),
                                          device).state_dict()
    judge = Classifier().to(device).eval()
    if classifier:
        judge.load_state_dict(classifier)
    stop = runs.StopSignal(world, every=1)
    for k, stem in list(enumerate(files, 1))[run.start_step:]:
        lq = load_image(files[stem], rgb=True)[None].to(device).float() / 255
        types = types_of(judge, lq) if args.types == ["auto"] else args.types
        if args.reset == "image":
            student.net.load_state_dict(base.state_dict())
            opt = optimiser(student.net, names, args.lr)
        # nothing to learn from a clean image
        losses = []
        for count in range(1, args.steps + 1 if types else 1):
            lanes = [seeds(count, lane, f"srtta {stem}") for lane in range(args.batch_size)]
            patches = draw_patches(lq, args.patch, lanes)
            again = degrade_again(patches, types, [seed + 1 for seed in lanes])
            losses.append(step(student, teacher, opt, patches, again, masks, start, autocast))
            if not np.isfinite(losses[-1]):
                raise runs.UserError(f"{files[stem]}: the loss of step {count} is not finite: take a smaller --lr")
        net = student.net if types else base
        sr = archs.upscale_tiled(archs.within(autocast, net), lq)
        runs.write_atomic(args.out / "online" / f"{stem}.png", partial(save_image, image=sr[0]))
        run.event(k, "image", name=stem, types=types, losses=losses)
        run.say(f"{k}/{len(files)} {stem}: {' + '.join(types) or 'clean, not adapted to'}"
                + (f", loss {losses[0]:.4g} -> {losses[-1]:.4g}" if losses else ""))
        run.save(k, {"net": student.net.state_dict(), "opt": opt.state_dict(), "masks": masks,
                     "classifier": classifier})
        if stop.requested(k) and k < len(files):
            run.say(f"stopped by a signal after {stem}; continue with --resume")
            return
    if args.reset == "domain":
        file = args.out / "weights" / f"ema_{args.steps * len(files):07d}.pth"
        runs.save_weights(file, student.net.state_dict(), student.net.state_dict())
        run.say(f"done: {file}, and each image after its own steps in {args.out / 'online'}")
    else:
        run.say(f"done: {args.out / 'online'}")


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
