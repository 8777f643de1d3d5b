"""Stable Diffusion 2 or FLUX with a ControlNet, the generators that DP2O-SR (Wu et al., NeurIPS 2025) tunes.

    gen = load_diffusers("stable-diffusion-2-base", "c-sd2", device="cuda")
    gen.save("tuned", gen.net)                a folder that load_diffusers(model, "tuned") opens

flow.py states the interface. Needs diffusers and transformers, and local folders only. .net is the ControlNet; all else
is frozen and shared.

model: a folder in diffusers' layout: model_index.json, vae/, unet/ or transformer/, text_encoder/, tokenizer/,
scheduler/, and for FLUX text_encoder_2/, tokenizer_2/.
Tags: RELEASED (the authors' inference code, cswry/DP2O-SR, which shows how they sample and nothing of their training),
CHOICE (ours).

x_0 is the VAE's scaled latent of hr, (B, C, H / 8, W / 8); H and W are 4h and 4w, padded by reflection to multiples of
the model's unit. c is a tuple of tensors with one row per image. Everything random is made on the CPU from (name, seed,
step of sampling): no batch or device changes it.
"""
import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import archs
import degradations
import iqa
import metrics
import runs
from dpo import flow
from images import nfc, visible

# RELEASED, of SD2; FLUX has none
NEGATIVE = "dotted, noise, blur, lowres, smooth"
# RELEASED: the most for T5; CLIP's tokenizer has its own limit, 77
TOKENS = 512
# CHOICE: prompts whose embeddings are kept; T5-XXL's take 4 MB each
CACHED = 256


class LatentSR:
    """The common part of both.

    net: the ControlNet; parts: the frozen models (on one device), tokenizers and scheduler, by the name of their
    folder; prompts: folder of <name>.txt, None for the empty prompt; steps, guidance: of sampling, None for RELEASED;
    dtype: of the frozen models and of the ControlNet's computations, while the VAE (as RELEASED) and the ControlNet's
    weights are float32; adain: give outputs the colours of lq (RELEASED).
    """

    def __init__(self, net, parts, prompts=None, steps=None, guidance=None, dtype=torch.float32, adain=True):
        self.net, self.parts, self.dtype, self.adain, self.cache, self.base_hash = net, parts, dtype, adain, {}, None
        self.vae, self.backbone, self.scheduler = parts["vae"], parts[self.BACKBONE], parts["scheduler"]
        self.device, self.steps = self.vae.device, steps or self.STEPS
        self.guidance = self.GUIDANCE if guidance is None else guidance
        self.scale, self.shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        # pixels per place of a latent: 8
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.frozen = {name: part.eval().requires_grad_(False) for name, part in parts.items()
                       if isinstance(part, torch.nn.Module)}
        self.folder, self.prompts = prompts, None
        if prompts is not None:
            files = visible(Path(prompts).glob("*.txt"))
            self.prompts = {nfc(file.stem): file.read_text(encoding="utf-8").strip() for file in files}

    def precision(self):
        # with float32 the caller's autocast holds
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def enlarged(self, lq):
        """(B, 3, 4h, 4w): Pillow's bicubic, as RELEASED."""
        return metrics.bicubic(lq).clamp(0, 1)

    def padded(self, image):
        (h, w), least = image.shape[2:], self.smallest // flow.SCALE
        if min(h, w) < self.smallest:
            raise runs.UserError(f"an image of {w // flow.SCALE} x {h // flow.SCALE} is too small for this model: "
                                 f"{least} x {least} at least")
        return archs.pad_reflect(image, -h % self.unit, -w % self.unit)

    @torch.no_grad()
    def encode(self, hr, lq=None):
        """The mode of the VAE's posterior, not a draw from it (CHOICE: one image has one x_0)."""
        with torch.autocast(self.device.type, enabled=False):
            return (self.vae.encode(2 * self.padded(hr).float() - 1).latent_dist.mode() - self.shift) * self.scale

    def decode(self, x, lq):
        with torch.autocast(self.device.type, enabled=False):
            image = self.vae.decode(x / self.scale + self.shift).sample
        image = (image[:, :, :flow.SCALE * lq.shape[2], :flow.SCALE * lq.shape[3]] / 2 + 0.5).clamp(0, 1)
        return match_colours(image, self.enlarged(lq)) if self.adain else image

    def noise(self, lq, names, seeds, step=0):
        """step 0: the initial noise, from the seed that flow.py gives it; k: the noise that sampling adds at step k."""
        size = (-(-flow.SCALE * n // self.unit) * self.unit // self.factor for n in lq.shape[2:])
        shape = (self.vae.config.latent_channels, *size)
        fields = [degradations.normal_field(shape, flow.noise_seed(name, seed, step))
                  for name, seed in zip(names, seeds, strict=True)]
        return torch.stack(fields).to(self.device)

    def texts(self, names):
        """The embedded prompts of images."""
        missing = [name for name in names if self.prompts is not None and name not in self.prompts]
        if missing:
            raise runs.UserError(f"--prompts {self.folder}: no {missing[0]}.txt; write it (it may be empty), or leave "
                                 "--prompts out for the empty prompt everywhere")
        return self.text([self.prompts[name] if self.prompts is not None else "" for name in names])

    @torch.no_grad()
    def text(self, prompts):
        """Embeddings of prompts. Each is embedded alone: the rest of the batch changes nothing."""
        with torch.autocast(self.device.type, enabled=False):
            embedded = {p: self.cache.get(p) or tuple(e.to(self.device) for e in self.embed(p))
                        for p in dict.fromkeys(prompts)}
        self.cache = dict(list((self.cache | embedded).items())[-CACHED:])
        return tuple(torch.cat(rows) for rows in zip(*(embedded[p] for p in prompts)))

    def encoder(self, number, prompt):
        """Output of text encoder "" or "_2" for one prompt, cut or filled up to a fixed length, as in all pipelines."""
        encoder, tokenizer = self.parts[f"text_encoder{number}"], self.parts[f"tokenizer{number}"]
        length = min(TOKENS, tokenizer.model_max_length)
        ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        return encoder(ids.to(encoder.device))

    def settings(self):
        """Everything beside the weights that sampling depends on, as plain values."""
        # of this text and this long: the pools of earlier commits hold it
        prompts = self.prompts and runs.digest(json.dumps(self.prompts).encode())[:16]
        return {"model": type(self).__name__, "prediction": self.prediction, "steps": self.steps,
                "guidance": self.guidance, "negative": self.NEGATIVE, "adain": self.adain,
                "dtype": str(self.dtype).removeprefix("torch."), "prompts": prompts}

    def identity(self, net):
        """Everything that an output depends on, given its input and seed.

        These are hashes of the ControlNet and of all frozen weights, and the settings. Pools keep them: other hash
        functions than these would refuse the pools of earlier commits.
        """
        if self.base_hash is None:
            # CHOICE: every weight, once per process
            config = {k: v for k, v in self.scheduler.config.items() if k[0] != "_"}
            digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
            for name, part in self.frozen.items():
                for key, value in part.state_dict().items():
                    digest.update(f"{name}.{key}".encode())
                    # as bytes: NumPy has no bfloat16
                    digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            self.base_hash = digest.hexdigest()[:16]
        return {"net": iqa.tensors_hash(unwrapped(net)), "base": self.base_hash, **self.settings()}

    def save(self, folder, net):
        """The ControlNet in diffusers' layout, in a folder that is whole or not there.

        net: the module, also in DDP, or its state dict.
        """
        folder, temporary, old = (Path(f"{folder}{end}") for end in ("", ".tmp", ".old"))
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
            raise runs.UserError(f"{folder}: holds something else than a ControlNet; name another folder")
        copy = type(self.net).from_config(self.net.config)
        copy.load_state_dict(net if isinstance(net, dict) else unwrapped(net).state_dict())
        # of a run that was stopped here
        shutil.rmtree(temporary, ignore_errors=True)
        copy.save_pretrained(temporary)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)


class StableDiffusionSR(LatentSR):
    """Stable Diffusion 2 (1.5 has the same parts), of epsilon or v as its scheduler says. c: enlarged lq, text."""

    PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
    BACKBONE, CLASSES = "unet", ("UNet2DConditionModel", "ControlNetModel")
    # RELEASED
    STEPS, GUIDANCE, NEGATIVE = 50, 3.5, NEGATIVE

    def __init__(self, net, parts, *args, **kwargs):
        super().__init__(net, parts, *args, **kwargs)
        predictions, name = {"epsilon": "epsilon", "v_prediction": "v"}, self.scheduler.config.prediction_type
        if name not in predictions:
            raise runs.UserError(f"the scheduler's prediction_type is {name!r}: take a model of "
                                 f"{' or '.join(predictions)}")
        self.prediction, self.alphas = predictions[name], self.scheduler.alphas_cumprod.to(self.device)
        # smallest: one place of the coarsest level, 64 pixels
        self.unit, self.smallest = self.factor, self.factor * 2 ** (len(self.backbone.config.block_out_channels) - 1)
        self.scheduler.set_timesteps(self.steps)

    def embed(self, prompt):
        return self.encoder("", prompt)[:1]

    def condition(self, lq, names):
        return self.padded(self.enlarged(lq)), *self.texts(names)

    def timestep(self, t):
        return (t * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)

    def noised(self, x0, eps, t):
        """As flow.noised, with the model's own schedule."""
        alpha = self.alphas[self.timestep(t)].view(-1, 1, 1, 1)
        a, s = alpha.sqrt(), (1 - alpha).sqrt()
        return a * x0 + s * eps, eps if self.prediction == "epsilon" else a * eps - s * x0

    def predict(self, net, xt, t, c):
        """Without classifier-free guidance (CHOICE: whether the authors train with it is not known)."""
        return self.denoise(net, xt, self.timestep(t), *c)

    def denoise(self, net, x, k, image, text):
        """As predict; k: numbers of timesteps."""
        with self.precision():
            down, middle = net(x, k, encoder_hidden_states=text, controlnet_cond=image, return_dict=False)
            return self.backbone(x, k, encoder_hidden_states=text, down_block_additional_residuals=down,
                                 mid_block_additional_residual=middle, return_dict=False)[0].float()

    @torch.no_grad()
    def sample(self, net, lq, names, seeds):
        """DDPM with classifier-free guidance against NEGATIVE (RELEASED); guidance <= 1: without."""
        c, x, copies = self.condition(lq, names), self.noise(lq, names, seeds), 2 if self.guidance > 1 else 1
        if copies == 2:
            c = torch.cat([c[0], c[0]]), torch.cat([*self.text([self.NEGATIVE] * len(lq)), c[1]])
        for step, k in enumerate(self.scheduler.timesteps.tolist(), 1):
            times = torch.full((copies * len(x),), k, device=self.device)
            *without, out = self.denoise(net, torch.cat([x] * copies), times, *c).chunk(copies)
            if without:
                out = without[0] + self.guidance * (out - without[0])
            # the scheduler draws from each in turn, on the CPU
            generators = [torch.Generator().manual_seed(flow.noise_seed(name, seed, step))
                          for name, seed in zip(names, seeds)]
            x = self.scheduler.step(out, k, x, generator=generators).prev_sample
        return self.decode(x, lq)


class FluxSR(LatentSR):
    """FLUX.1: rectified flow of latents, which the transformer sees in packs of 2 x 2.

    c: packed latent of the enlarged lq, T5's tokens, CLIP's summary.
    """

    PARTS = ("vae", "transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    BACKBONE, CLASSES = "transformer", ("FluxTransformer2DModel", "FluxControlNetModel")
    # RELEASED
    STEPS, GUIDANCE, NEGATIVE = 25, 2.5, None
    prediction = "flow"

    def __init__(self, net, parts, *args, **kwargs):
        super().__init__(net, parts, *args, **kwargs)
        self.unit = self.smallest = 2 * self.factor
        if net.config.conditioning_embedding_channels is not None or net.config.num_mode is not None:
            raise runs.UserError("the ControlNet is XLabs' or a union of several; take one that looks at the VAE's "
                                 "latent of an image")

    def embed(self, prompt):
        return self.encoder("_2", prompt)[0], self.encoder("", prompt).pooler_output

    def condition(self, lq, names):
        """The mode of the posterior of the enlarged lq (CHOICE: only the seed is random); RELEASED draws from it."""
        return pack(self.encode(self.enlarged(lq))), *self.texts(names)

    def noised(self, x0, eps, t):
        return flow.noised("flow", x0, eps, t)

    def predict(self, net, xt, t, c):
        (image, text, summary), (rows, columns) = c, (n // 2 for n in xt.shape[2:])
        axes = torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns))
        places = torch.cartesian_prod(*axes).to(xt.device)  # (rows * columns, 3)

        def guide(config):
            return torch.full_like(t, self.guidance) if config.guidance_embeds else None
        both = dict(hidden_states=pack(xt), timestep=t, pooled_projections=summary, encoder_hidden_states=text,
                    img_ids=places, txt_ids=places.new_zeros(text.shape[1], 3), return_dict=False)
        with self.precision():
            double, single = net(controlnet_cond=image, guidance=guide(self.net.config), **both)
            out = self.backbone(controlnet_block_samples=double, controlnet_single_block_samples=single,
                                guidance=guide(self.backbone.config), **both)[0].float()
        if torch.is_grad_enabled():
            # DDP waits for a gradient of every weight
            out = out + 0 * sum(p.sum() for p in idle(net) if p.requires_grad)
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (rows, columns)), 2)

    def sigmas(self, tokens):
        """(steps + 1,), from 1 to 0, as the model's folder says.

        Those of FLUX.1-dev are shifted further, the more tokens an image has (RELEASED).
        """
        s = self.scheduler.config
        span = s.max_image_seq_len - s.base_image_seq_len
        mu = s.base_shift + (s.max_shift - s.base_shift) * (tokens - s.base_image_seq_len) / span
        self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / self.steps, self.steps), mu=mu)
        return self.scheduler.sigmas.tolist()

    @torch.no_grad()
    def sample(self, net, lq, names, seeds):
        c, x = self.condition(lq, names), self.noise(lq, names, seeds)
        sigmas = self.sigmas(c[0].shape[1])
        for now, then in zip(sigmas, sigmas[1:]):
            x = flow.step_back("flow", x, self.predict(net, x, x.new_full((len(x),), now), c), now, then)
        return self.decode(x, lq)


def pack(x):
    """(B, C, H, W) -> (B, H / 2 * W / 2, 4 C)"""
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unwrapped(net):
    """The module itself, without DDP around it."""
    return getattr(net, "module", net)


def idle(net):
    """Weights of FLUX's ControlNet that reach no output.

    Without single blocks after it (RELEASED) the text of the last double block goes nowhere.
    """
    double, single = unwrapped(net).transformer_blocks, unwrapped(net).single_transformer_blocks
    return [] if len(single) else [*double[-1].attn.to_add_out.parameters(), *double[-1].ff_context.parameters()]


def match_colours(image, like):
    """AdaIN: each channel of `image` gets mean and standard deviation of `like`'s.

    RELEASED does so after rounding to 8 bit, this before.
    """
    (mean, std), (new_mean, new_std) = ((v.mean((2, 3), keepdim=True), (v.var((2, 3), keepdim=True) + 1e-5).sqrt())
                                        for v in (image, like))
    return ((image - mean) / std * new_std + new_mean).clamp(0, 1)


# Files

COPY = "copy the whole folder there, in the layout of diffusers (hf download NAME --local-dir FOLDER)"


def load_diffusers(model, controlnet, device="cpu", prompts=None, steps=None, guidance=None, dtype=None,
                   gradient_checkpointing=False, adain=True, like=None):
    """-> StableDiffusionSR or FluxSR, by the content of the folder `model`, in eval mode and without gradients.

    controlnet: a folder (gen.save's, or any of diffusers), or a file of weights for one that is shaped like the model
    (RELEASED: model.safetensors); prompts, steps, guidance, adain: see LatentSR; dtype: None takes bfloat16 on CUDA,
    else float32 (CHOICE); like: a generator of the same folder `model`, whose frozen networks serve this one too.
    UserError for a part that is missing, and for models of other kinds.
    """
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise runs.UserError(f"--model: {error.name} is not installed: pip install diffusers transformers") from None
    device, model, controlnet = torch.device(device), Path(model), Path(controlnet)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    index = read_config(model, "model_index.json")
    kinds = [kind for kind in (StableDiffusionSR, FluxSR)
             if index.get(kind.BACKBONE, [None, None])[1] == kind.CLASSES[0]]
    # SDXL has a second text encoder
    if not kinds or kinds[0] is StableDiffusionSR and "text_encoder_2" in index:
        raise runs.UserError(f"{model}: a {index.get('_class_name')}, which is not supported: take Stable Diffusion 2 "
                             "or FLUX.1")
    kind = kinds[0]
    if prompts is not None and not any(Path(prompts).glob("*.txt")):
        raise runs.UserError(f"--prompts {prompts}: no .txt in it; write the tags of each image into <name>.txt there, "
                             "or leave --prompts out for the empty prompt")
    libraries = {"diffusers": diffusers, "transformers": transformers}
    parts = {} if like is None else like.parts
    for name in kind.PARTS if like is None else ():
        library, class_name = index.get(name, (None, ""))
        cls = getattr(libraries.get(library), class_name, None)
        if name == "scheduler":
            config = read_config(model / name, "scheduler_config.json")
            if kind is StableDiffusionSR:
                # RELEASED opens it as DDPM, whichever it is; latents have no bounds
                parts[name] = diffusers.DDPMScheduler.from_config({"clip_sample": False, **config})
            else:
                parts[name] = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        elif cls is None:
            raise runs.UserError(f"{model}: model_index.json names no {name} that is known; {COPY}")
        elif name.startswith("tokenizer"):
            # without a vocabulary transformers would make an empty one
            if not any((model / name / file).is_file() for file in ("vocab.json", "tokenizer.json", "spiece.model")):
                raise runs.UserError(f"{model / name}: no vocabulary in it; {COPY}")
            parts[name] = cls.from_pretrained(str(model / name), local_files_only=True)
        else:
            parts[name] = open_network(model / name, cls, torch.float32 if name == "vae" else dtype).to(device)
    backbone, channels = parts[kind.BACKBONE], parts["vae"].config.latent_channels
    if backbone.config.in_channels != channels * (4 if kind is FluxSR else 1):
        raise runs.UserError(f"{model}: takes {backbone.config.in_channels} channels, its VAE makes {channels}: not a "
                             "model of text to image")
    cls = getattr(diffusers, kind.CLASSES[1])
    if controlnet.is_file():
        net = weights_into(cls, backbone, controlnet)
    else:
        net = open_network(controlnet, cls, torch.float32)
    if gradient_checkpointing:
        # of the frozen model too: gradients pass through it
        net.enable_gradient_checkpointing()
        backbone.enable_gradient_checkpointing()
    gen = kind(net.to(device).eval().requires_grad_(False), parts, prompts, steps, guidance, dtype, adain)
    if prompts is None:
        # there are no other prompts than these: T5-XXL need not lie on the accelerator
        gen.text(["", NEGATIVE])
        for name in gen.frozen.keys() & {"text_encoder", "text_encoder_2"}:
            gen.frozen[name].to("cpu")
    return gen


def read_config(folder, name):
    if not (folder / name).is_file():
        missing = f"no {name} in it" if folder.is_dir() else "no such folder"
        raise runs.UserError(f"{folder}: {missing}; {COPY}")
    try:
        return json.loads((folder / name).read_text())
    except ValueError as error:
        raise runs.UserError(f"{folder}: {name} is damaged ({str(error)[:80]}); {COPY}") from None


def open_network(folder, cls, dtype):
    """cls.from_pretrained of a local folder, which must be of that class."""
    config = read_config(folder, "config.json")
    # models of diffusers alone have this entry
    if config.get("_class_name", cls.__name__) != cls.__name__:
        raise runs.UserError(f"{folder}: a {config['_class_name']}, expected a {cls.__name__}")
    name = "dtype" if cls.__module__.startswith("transformers") else "torch_dtype"
    try:
        return cls.from_pretrained(str(folder), local_files_only=True, **{name: dtype})
    except OSError as error:
        reason = " ".join(str(error).split())[:120]
        raise runs.UserError(f"{folder}: no weights that can be read ({reason}); {COPY}") from None


def weights_into(cls, backbone, file):
    """A ControlNet of the shape of `backbone`, with the weights of a file: RELEASED opens its own so."""
    state = archs.read_weights(file)[0]
    if hasattr(cls, "from_unet"):
        net = cls.from_unet(backbone, load_weights_from_unet=False)
    else:
        double, single = (len({key.split(".")[1] for key in state if key.startswith(f"{blocks}.")})
                          for blocks in ("transformer_blocks", "single_transformer_blocks"))
        config = backbone.config
        net = cls.from_transformer(backbone, double, single, config.attention_head_dim, config.num_attention_heads,
                                   load_weights_from_transformer=False)
    try:
        net.float().load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise runs.UserError(f"{file}: not a {cls.__name__} of this model ({reason})") from None
    return net
