"""The parts of a training step, measured one by one on the tensors of one batch; bench.py prints them."""
import copy
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import archs
import data
import degradations
import finetune_lora
import iqa
import lora
import losses
import runs
import train
from losses import VGGFeatureLoss, adversarial_loss


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(function, repeats, device):
    """Median ms of function(), after one call that does not count."""
    times = []
    for _ in range(repeats + 1):
        sync(device)
        started = time.perf_counter()
        function()
        sync(device)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def computing(function, device):
    """ms of function() in which the GPU computes; its longest kernels are printed. 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        sync(device)
    averages = profile.key_averages()
    print(averages.table(sort_by="self_cuda_time_total", row_limit=8, max_name_column_width=90))
    return sum(event.self_device_time_total for event in averages) / 1000


def flops(function):
    """Floating-point operations of function(): matrix products, convolutions and attention, forward and backward."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_flops(device, precision):
    """FLOP/s of the fastest of several large matrix products: the practical limit of this hardware.

    Convolutions done with fewer operations may exceed it.
    """
    dtype, best = torch.bfloat16 if precision == "bf16" and device.type == "cuda" else torch.float32, 0.0
    for side in (4096, 8192) if device.type == "cuda" else (384, 768, 1536):
        a, b = torch.randn(2, side, side, device=device, dtype=dtype)
        product = partial(torch.matmul, a, b)
        best = max(best, *(2 * side ** 3 / (timed(product, 1, device) / 1000) for _ in range(6)))
    return best


class Step:
    """The rewards, data, networks and weights to train of train.py or, with tune, finetune_lora.py."""

    def __init__(self, args, tune):
        start = runs.start_training(args.device, args.threads, args.seed, args.precision, args.deterministic)
        self.world, self.seeds, self.autocast = start
        device = self.world.device

        self.reward = None if args.reward == ["none"] else iqa.create_reward(
            args.reward, device, args.reward_weights, need_gradient=tune, musiq=args.musiq)
        # chooses the ground truths
        self.chooser = finetune_lora.create_chooser(args, self.reward, device) if tune else self.reward
        sets, _ = train.find_data(args, self.world, self.seeds)
        self.dataset = train.training_set(args, self.world, self.chooser, self.seeds, sets)
        torch.manual_seed(0)
        memory = torch.channels_last if args.channels_last else torch.contiguous_format
        has_drop_path = "drop_path" in archs.ARCHS[args.arch]["train"]
        net_g = archs.create(args.arch, **{"drop_path": args.drop_path} if has_drop_path else {})
        self.tuned = list(net_g.parameters())
        if tune:
            self.tuned = finetune_lora.choose_tuned(net_g, args.tune, lora.default_targets(net_g, args.arch), args.rank)
        memory_g = memory if archs.is_convolutional(net_g) else torch.contiguous_format
        self.net_g = net_g.to(device, memory_format=memory_g).train()
        self.net_d = self.vgg = None
        if args.lambda_a > 0:
            self.net_d = archs.UNetDiscriminatorSN(args.d_features).to(device, memory_format=memory).train()
        if args.lambda_p > 0:
            self.vgg = VGGFeatureLoss(args.vgg_weights).to(device, memory_format=memory)


def step_parts(args, repeats, tune):
    """Of train.py's step, or with tune of finetune_lora.py's, on one batch: {part: ms}, {part: FLOPs}, {part: busy}.

    --fast compile compiles what it does there; FLOPs are counted eager. busy: share of a part's time in which the GPU
    computes.
    """
    step = Step(args, tune)
    vgg, reward = step.vgg, step.reward

    net_g, net_d = step.net_g, step.net_d
    if "compile" in args.fast:
        losses.compile_parts(net_g, vgg, reward)
    device, lanes = step.world.device, range(args.batch_size)
    parts, work, busy = {}, {}, {}

    def measure(name, function, counted=True):
        """Time of a part; counted: its work as well."""
        parts[name] = timed(function, repeats, device)
        if device.type == "cuda":
            print(f"# {name}")
            busy[name] = computing(function, device) / parts[name]
        if counted:
            work[name] = flops(function)

    # data
    def decode():
        return [step.dataset.sample(1, lane) for lane in lanes]
    measure("decode, one worker", decode, counted=False)
    batch = data.collate(decode())

    def moved():
        return [batch[name].to(device).float() / 255 for name in ("original", "crops")]
    measure("to the device", moved, counted=False)
    original, crops = moved()
    draws = ([step.seeds(1, lane, "degrade") for lane in lanes],
             [step.seeds(1, lane // args.group_size, "degrade-group") for lane in lanes])

    def degrade():
        image = degradations.usm_sharpen(original) if args.usm else original
        return degradations.degrade(image, args.degradation, *draws)
    measure("degradation", degrade, counted=False)
    lq, gt = data.crop_like(degrade(), batch["where"], args.crop), crops[:, 0]
    if args.sampler == "amo" and crops.shape[1] > 1:
        @torch.no_grad()
        def score():
            return step.chooser(crops.flatten(0, 1))
        measure("scoring", score)

    # generator, forward and through L1
    def generator(backward=True):
        with step.autocast():
            sr = net_g(lq, **({"keep": step.net_g.draw_keep(lanes)} if args.drop_path else {}))
        if backward:
            F.l1_loss(sr.float(), gt).backward()
        return sr
    measure("G forward", lambda: generator(False), counted=False)
    measure("G", generator)
    parts["G backward, L1"] = max(0.0, parts.pop("G") - parts["G forward"])
    fake = generator(False).detach()

    # the other losses, from the SR image on
    def through(loss):
        sr = fake.clone().requires_grad_()
        with step.autocast():
            value = loss(sr)
        value.backward()
    if vgg is not None:
        def perceptual():
            through(lambda sr: vgg(sr, gt))
        measure("perceptual", perceptual)
    if tune and reward is not None:
        def rewarded():
            through(lambda sr: -reward(sr.clamp(0, 1)).mean())
        measure("reward with gradient", rewarded)
    if net_d is not None:
        def adversarial():
            net_d.requires_grad_(False)
            through(lambda sr: adversarial_loss(net_d(sr), True))
            net_d.requires_grad_(True)

        def discriminator():
            for images, real in ((gt, True), (fake, False)):
                with step.autocast():
                    loss = adversarial_loss(net_d(images), real)
                loss.backward()
        measure("D in G's loss", adversarial)
        measure("D", discriminator)

    # optimisers, whose learning rate of almost 0 leaves the weights as they are
    ema = copy.deepcopy(step.net_g).requires_grad_(False)
    trained = [step.tuned] if net_d is None else [step.tuned, step.net_d.parameters()]
    optimisers = [runs.adam(weights, 1e-9) for weights in trained]

    def update():
        for optimiser in optimisers:
            optimiser.step()
        runs.update_ema(ema, step.net_g, 0.999)
    measure("optimiser, EMA", update, counted=False)
    return step.world, parts, work, busy
