"""dpo.diffusers_backend against diffusers itself: tiny models of the real classes with random weights. No network."""
import collections
import copy
import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import iqa
import runs
from dpo import compare, flow, pool, preference, tune
from dpo import diffusers_backend as db

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# a diffusers that does not fit the transformers here raises more than ImportError
try:
    import diffusers
    import transformers
    from diffusers.pipelines.flux import pipeline_flux_controlnet
    reason = ""
except (ImportError, RuntimeError, AttributeError) as error:
    reason = f"diffusers cannot be imported ({' '.join(str(error).split())[:80]})"
needed = pytest.mark.skipif(bool(reason), reason=reason)
LETTERS = "abcdefghijklmnopqrstuvwxyz,"
NAMES = ["one", "two", "three"]


# Tiny models in the real layout

def clip(folder):
    """A CLIP text encoder and its tokenizer, of letters."""
    folder.mkdir(parents=True)
    words = ["!", *LETTERS, *(f"{c}</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, "pad_token": "!"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=12, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
        pad_token_id=0)
    return transformers.CLIPTextModel(config).eval(), transformers.CLIPTokenizer.from_pretrained(str(folder))


def shaken(net):
    """With no weight left at zero: a new ControlNet, all whose ends are zero, would do nothing."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return net.eval()


def make_vae(**more):
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4, norm_num_groups=2, sample_size=32, **more)


def make_sd(root, prediction):
    text_encoder, tokenizer = clip(root / "clip")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        sample_size=4, norm_num_groups=4, up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], cross_attention_dim=16,
        attention_head_dim=4)
    scheduler = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        prediction_type=prediction, steps_offset=1, skip_prk_steps=True)
    # the file of stable-diffusion-2-base has it
    scheduler.register_to_config(clip_sample=False)
    diffusers.StableDiffusionPipeline(
        vae=make_vae(), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(root / "model")
    shaken(diffusers.ControlNetModel.from_unet(unet)).save_pretrained(root / "controlnet")


def make_flux(root):
    (text_encoder, tokenizer), words = clip(root / "clip"), ["<pad>", "</s>", "<unk>", "\u2581", *LETTERS]
    vocabulary = [(word, 0.0 if word[0] == "<" else -2.0) for word in words]
    tokenizer_2 = transformers.T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=12)
    t5 = transformers.T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    text_encoder_2 = transformers.T5EncoderModel(t5).eval()
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(2, 2, 4))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096)
    vae = make_vae(shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False)
    diffusers.FluxPipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=text_encoder_2,
                           tokenizer_2=tokenizer_2, transformer=transformer,
                           scheduler=scheduler).save_pretrained(root / "model")
    shaken(diffusers.FluxControlNetModel.from_transformer(transformer, 1, 0, 8, 2)).save_pretrained(root / "controlnet")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{"epsilon", "v", "flux": folder with model/, controlnet/}"""
    roots, makers = {}, {"epsilon": partial(make_sd, prediction="epsilon"),
                         "v": partial(make_sd, prediction="v_prediction"), "flux": make_flux}
    for seed, (kind, make) in enumerate(makers.items()):
        torch.manual_seed(seed)
        roots[kind] = tmp_path_factory.mktemp(kind)
        make(roots[kind])
    return roots


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    for name, text in zip(NAMES, ("a cat, a dog", "", "sky")):
        (folder / f"{name}.txt").write_text(text + "\n")
    return folder


@pytest.fixture(scope="session")
def gens(folders, prompts):
    """{kind: generator} with prompts and few steps."""
    return {kind: db.load_diffusers(root / "model", root / "controlnet", prompts=prompts, steps=3)
            for kind, root in folders.items()}


@pytest.fixture(params=["epsilon", "v", "flux"])
def gen(request, gens):
    return gens[request.param]


def images(b=2, h=8, w=6, seed=0):
    hr = torch.rand(b, 3, 4 * h, 4 * w, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(hr, scale_factor=0.25, mode="area"), hr


def drawn(gen, b=2, seed=0, t=None, **size):
    """lq, c, t, x_0, eps, x_t, target of b images."""
    lq, hr = images(b, seed=seed, **size)
    t = torch.linspace(0.2, 0.9, b) if t is None else t
    x0, eps, c = gen.encode(hr, lq), gen.noise(lq, NAMES[:b], range(b)), gen.condition(lq, NAMES[:b])
    return lq, c, t, x0, eps, *gen.noised(x0, eps, t)


# The interface

@needed
def test_shapes_and_what_is_frozen(gen):
    # 28 x 20: neither 8 nor 16 divides it
    for h, w in ((8, 6), (7, 5)):
        lq, c, t, x0, eps, xt, target = drawn(gen, h=h, w=w)
        assert x0.shape == eps.shape == xt.shape == target.shape == gen.predict(gen.net, xt, t, c).shape
        assert x0.shape[1:] == (4, *(math.ceil(4 * n / gen.unit) * gen.unit // 8 for n in (h, w)))
        assert all(len(part) == len(lq) for part in c)
        sr = gen.sample(gen.net, lq, NAMES[:2], [0, 1])
        assert sr.shape == (2, 3, 4 * h, 4 * w) and 0 <= sr.min() and sr.max() <= 1 and sr.dtype == torch.float32
    assert not any(p.requires_grad for part in (gen.net, *gen.frozen.values()) for p in part.parameters())
    assert not any(part.training for part in (gen.net, *gen.frozen.values()))
    json.dumps(gen.settings())


@needed
def test_defaults_are_the_released_ones(folders):
    negative = "dotted, noise, blur, lowres, smooth"
    for kind, values in (("epsilon", (50, 3.5, negative, "epsilon")), ("v", (50, 3.5, negative, "v")),
                         ("flux", (25, 2.5, None, "flow"))):
        gen = db.load_diffusers(folders[kind] / "model", folders[kind] / "controlnet")
        assert tuple(gen.settings()[name] for name in ("steps", "guidance", "negative", "prediction")) == values
        assert gen.settings()["adain"] and gen.settings()["dtype"] == "float32"
        assert gen.dtype == gen.backbone.dtype == gen.vae.dtype == torch.float32


@needed
def test_the_enlarged_input_is_pillows(gen):
    from PIL import Image
    lq = (images(1)[0] * 255).round() / 255
    array = (lq[0] * 255).byte().permute(1, 2, 0).numpy()
    pillow = np.asarray(Image.fromarray(array).resize((24, 32), Image.Resampling.BICUBIC)).copy()
    pillow = torch.from_numpy(pillow).permute(2, 0, 1)[None] / 255
    assert (gen.enlarged(lq) - pillow).abs().max() < 1.5 / 255


@needed
def test_latents_are_scaled_and_deterministic(gen):
    """x_0 as diffusers' own pipelines scale it, from the mode; and back: decode undoes encode's scaling."""
    lq, hr = images(h=8, w=8)
    with torch.no_grad():
        mean = gen.vae.encode(hr * 2 - 1).latent_dist.mean
        expected = (mean - (gen.vae.config.shift_factor or 0)) * gen.vae.config.scaling_factor
        torch.testing.assert_close(gen.encode(hr, lq), expected)
        assert torch.equal(gen.encode(hr, lq), gen.encode(hr, lq))
        gen.adain, before = False, gen.adain
        torch.testing.assert_close(gen.decode(expected, lq), (gen.vae.decode(mean).sample / 2 + 0.5).clamp(0, 1))
        gen.adain = before


@needed
def test_outputs_have_the_colours_of_the_input(gen):
    lq, _ = images(2, 8, 8)
    lq = 0.3 + 0.3 * lq
    sr, base = gen.sample(gen.net, lq, NAMES[:2], [0, 1]), gen.enlarged(lq)
    # clamping moves them a little
    torch.testing.assert_close(sr.mean((2, 3)), base.mean((2, 3)), atol=2e-2, rtol=0)
    torch.testing.assert_close(db.match_colours(base, base), base, atol=1e-5, rtol=0)
    matched = db.match_colours(torch.rand(base.shape), base)
    torch.testing.assert_close(matched.std((2, 3)), base.std((2, 3)), atol=1e-3, rtol=0)


# Noise and targets against diffusers' schedulers

@needed
@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_noised_is_add_noise_and_the_targets_are_diffusers(gens, folders, kind):
    gen = gens[kind]
    scheduler = diffusers.DDPMScheduler.from_pretrained(folders[kind] / "model" / "scheduler")
    t = torch.tensor([0.0, 0.25, 0.5008, 0.9995, 1.0])
    k = torch.tensor([0, 250, 500, 999, 999])
    x0, eps = torch.randn(5, 4, 4, 4), torch.randn(5, 4, 4, 4)
    xt, target = gen.noised(x0, eps, t)
    torch.testing.assert_close(xt, scheduler.add_noise(x0, eps, k), atol=1e-6, rtol=0)
    expected = eps if kind == "epsilon" else scheduler.get_velocity(x0, eps, k)
    torch.testing.assert_close(target, expected, atol=1e-6, rtol=0)
    assert scheduler.config.beta_schedule == "scaled_linear" and not gen.scheduler.config.clip_sample


@needed
def test_flux_noises_as_its_scheduler(gens, folders):
    gen, scheduler = gens["flux"], diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    t = scheduler.sigmas[[0, 1, 3]]
    x0, eps = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4)
    xt, target = gen.noised(x0, eps, t)
    torch.testing.assert_close(xt, scheduler.scale_noise(x0, scheduler.timesteps[[0, 1, 3]], eps), atol=1e-6, rtol=0)
    torch.testing.assert_close(target, eps - x0)


@needed
def test_packs_are_diffusers(gens):
    x = torch.randn(2, 4, 6, 8)
    pipeline = diffusers.FluxPipeline
    assert torch.equal(db.pack(x), pipeline._pack_latents(x, 2, 4, 6, 8))


# Predictions against the modules called by hand

@needed
@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_sd_predicts_as_its_modules(gens, kind):
    gen = gens[kind]
    lq, c, t, x0, eps, xt, target = drawn(gen)
    k = (t * 1000).long()
    with torch.no_grad():
        ids = gen.parts["tokenizer"](["a cat, a dog", ""], padding="max_length", max_length=12, truncation=True,
                                     return_tensors="pt").input_ids
        text = gen.parts["text_encoder"](ids)[0]
        down, middle = gen.net(xt, k, text, gen.enlarged(lq), return_dict=False)
        expected = gen.backbone(xt, k, text, down_block_additional_residuals=down,
                                mid_block_additional_residual=middle).sample
        out = gen.predict(gen.net, xt, t, c)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        # the ControlNet does something, and so does the prompt
        assert (out - gen.backbone(xt, k, text).sample).abs().max() > 1e-3
        assert (out[1] - gen.predict(gen.net, xt, t, (c[0], c[1][[0, 0]]))[1]).abs().max() > 1e-5


@needed
def test_flux_predicts_as_its_modules(gens):
    gen = gens["flux"]
    # 32 x 40, of which 32 x 48 is made: 2 x 3 packs
    lq, c, t, x0, eps, xt, target = drawn(gen, h=8, w=10)
    pipeline = diffusers.FluxPipeline
    b, n, rows, columns = xt.shape
    with torch.no_grad():
        image = gen.vae.encode(2 * F.pad(gen.enlarged(lq), (0, 8, 0, 0), mode="reflect") - 1).latent_dist.mean
        packed = pipeline._pack_latents((image - 0.1159) * 0.3611, b, n, rows, columns)
        both = dict(hidden_states=pipeline._pack_latents(xt, b, n, rows, columns), timestep=t,
                    guidance=torch.full((b,), 2.5), encoder_hidden_states=c[1], pooled_projections=c[2],
                    img_ids=pipeline._prepare_latent_image_ids(b, rows // 2, columns // 2, "cpu", torch.float32),
                    txt_ids=torch.zeros(c[1].shape[1], 3))
        double, single = gen.net(controlnet_cond=packed, return_dict=False, **both)
        out = gen.backbone(controlnet_block_samples=double, controlnet_single_block_samples=single, **both).sample
        expected = pipeline._unpack_latents(out, rows * 8, columns * 8, 8)
        predicted = gen.predict(gen.net, xt, t, c)
        torch.testing.assert_close(predicted, expected, atol=1e-5, rtol=1e-5)
        gen.guidance = 1.0
        assert (predicted - gen.predict(gen.net, xt, t, c)).abs().max() > 1e-5
        gen.guidance = 2.5


# Sampling against diffusers' pipelines

@needed
@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_sd_samples_as_the_pipeline(folders, prompts, kind, guidance):
    root, seeds = folders[kind], [5, 6]
    gen = db.load_diffusers(root / "model", root / "controlnet", prompts=prompts, steps=4, guidance=guidance,
                            adain=False)
    lq, _ = images(2, 8, 8)
    pipe = diffusers.StableDiffusionControlNetPipeline(
        vae=gen.vae, text_encoder=gen.parts["text_encoder"], tokenizer=gen.parts["tokenizer"], unet=gen.backbone,
        controlnet=gen.net, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        scheduler=diffusers.DDPMScheduler.from_pretrained(root / "model" / "scheduler"))
    pipe.set_progress_bar_config(disable=True)
    plain, calls = pipe.scheduler.step, []

    def step(out, k, x, generator=None, return_dict=True):
        # the same noise in place of its own
        calls.append(k)
        generators = [torch.Generator().manual_seed(flow.noise_seed(n, s, len(calls))) for n, s in zip(NAMES, seeds)]
        return plain(out, k, x, generator=generators, return_dict=return_dict)
    pipe.scheduler.step = step
    expected = pipe(["a cat, a dog", ""], gen.enlarged(lq), num_inference_steps=4, guidance_scale=guidance,
                    negative_prompt=[db.NEGATIVE] * 2, latents=gen.noise(lq, NAMES[:2], seeds),
                    output_type="pt").images
    assert len(calls) == 4 and expected.std() > 0.01
    torch.testing.assert_close(gen.sample(gen.net, lq, NAMES[:2], seeds), expected, atol=1e-5, rtol=0)


@needed
def test_the_noise_of_a_step_is_that_of_noise(gens):
    """DDPM's draws, through a list of generators, are the fields of noise(): a function of name, seed and step."""
    from diffusers.utils.torch_utils import randn_tensor
    gen, (lq, _) = gens["epsilon"], images(3)
    fields = gen.noise(lq, NAMES, [1, 2, 3], step=7)
    generators = [torch.Generator().manual_seed(flow.noise_seed(n, s, 7)) for n, s in zip(NAMES, [1, 2, 3])]
    assert torch.equal(fields, randn_tensor(fields.shape, generators))
    assert not torch.equal(fields, gen.noise(lq, NAMES, [1, 2, 3]))
    assert len({flow.noise_seed(n, s, k) for n in NAMES for s in range(3) for k in range(3)}) == 27


@needed
@pytest.mark.parametrize("shifted", [True, False])
def test_flux_samples_as_the_pipeline(folders, prompts, tmp_path, monkeypatch, shifted):
    """With the schedule of FLUX.1-dev's folder (shifted by size) and with that of schnell's (not shifted)."""
    root, model, seeds = folders["flux"], tmp_path / "model", [5, 6]
    shutil.copytree(root / "model", model)
    if not shifted:
        diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(model / "scheduler")
    gen = db.load_diffusers(model, root / "controlnet", prompts=prompts, steps=4, adain=False)
    lq, _ = images(2, 8, 8)
    # it draws there
    monkeypatch.setattr(pipeline_flux_controlnet, "retrieve_latents",
                        lambda encoded, generator=None: encoded.latent_dist.mode())
    texts = {name: part for name, part in gen.parts.items() if name.startswith("t") and name != "transformer"}
    pipe = diffusers.FluxControlNetPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(model / "scheduler"), vae=gen.vae,
        transformer=gen.backbone, controlnet=gen.net, **texts)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(["a cat, a dog", ""], control_image=2 * gen.enlarged(lq) - 1, num_inference_steps=4,
                    guidance_scale=2.5, controlnet_conditioning_scale=1.0, height=32, width=32,
                    latents=db.pack(gen.noise(lq, NAMES[:2], seeds)), max_sequence_length=12, output_type="pt").images
    torch.testing.assert_close(gen.sample(gen.net, lq, NAMES[:2], seeds), expected, atol=1e-5, rtol=0)
    sigmas = gen.sigmas(16)
    assert len(sigmas) == 5 and sigmas[0] == 1 and sigmas[-1] == 0 and (abs(sigmas[2] - 0.5) > 0.05) == shifted
    # and one step after the other
    scheduler, x = pipe.scheduler, gen.noise(lq, NAMES[:2], seeds)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4), mu=pipeline_flux_controlnet.calculate_shift(16))
    for k, timestep in enumerate(scheduler.timesteps):
        out = torch.randn(x.shape, generator=torch.Generator().manual_seed(k))
        stepped = flow.step_back("flow", x, out, sigmas[k], sigmas[k + 1])
        torch.testing.assert_close(stepped, scheduler.step(out, timestep, x).prev_sample, atol=1e-6, rtol=0)
    assert scheduler.sigmas.tolist() == pytest.approx(sigmas)


@needed
def test_an_output_depends_on_its_name_and_seed_alone(gen):
    lq, _ = images(3, 7, 5)
    together = gen.sample(gen.net, lq, NAMES, [3, 4, 5])
    for k in range(3):
        alone = gen.sample(gen.net, lq[k:k + 1], NAMES[k:k + 1], [3 + k])
        torch.testing.assert_close(alone[0], together[k], atol=1e-4, rtol=0)
    # in another batch, and another seed
    twice = gen.sample(gen.net, lq[[0, 0, 0]], [NAMES[0]] * 3, [3, 8, 3])
    torch.testing.assert_close(twice[[0, 2]], together[[0, 0]], atol=1e-4, rtol=0)
    assert (twice[1] - twice[0]).abs().max() > 1e-2
    with pytest.raises(ValueError):
        gen.sample(gen.net, lq, NAMES, [1, 2])


@needed
def test_the_generators_of_the_caller_are_left_alone(gen):
    lq, _ = images(1)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    gen.sample(gen.net, lq, NAMES[:1], [0])
    assert torch.equal(state, torch.get_rng_state())


# Training

def dpo_step(gen, net, reference, optimiser):
    """One step as dpo.tune takes it; -> losses."""
    (lq, win), (_, lose) = images(2), images(2, seed=1)
    lqs, names, t = torch.cat([lq, lq]), NAMES[:2] * 2, torch.tensor([0.3, 0.8]).repeat(2)
    x0, c = gen.encode(torch.cat([win, lose]), lqs), gen.condition(lqs, names)
    xt, target = gen.noised(x0, gen.noise(lqs, names, [0, 1, 0, 1]), t)
    win, lose = preference.error(gen.predict(net, xt, t, c), target).chunk(2)
    with torch.no_grad():
        win_ref, lose_ref = preference.error(gen.predict(reference, xt, t, c), target).chunk(2)
    losses, _ = preference.dpo_loss(win, win_ref, lose, lose_ref, beta=5000.0)
    optimiser.zero_grad()
    losses.mean().backward()
    optimiser.step()
    return losses.detach()


@needed
def test_dpo_starts_at_ln_2_and_changes_the_controlnet_alone(gen):
    reference, net = gen.net, copy.deepcopy(gen.net).requires_grad_(True)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0)
    frozen = {**gen.frozen, "reference": reference}
    untouched = {name: copy.deepcopy(part.state_dict()) for name, part in frozen.items()}
    start = copy.deepcopy(net.state_dict())
    torch.testing.assert_close(dpo_step(gen, net, reference, optimiser), torch.full((2,), math.log(2)))
    for name, part in frozen.items():
        assert all(p.grad is None for p in part.parameters()), name
        assert all(torch.equal(value, part.state_dict()[key]) for key, value in untouched[name].items()), name
    # all: DDP would wait for the others
    assert all(p.grad is not None for p in net.parameters())
    still = {name for name, p in net.named_parameters() if torch.equal(p, start[name])}
    without_output = db.idle(net) if isinstance(gen, db.FluxSR) else []
    idle = {name for name, p in net.named_parameters() if any(p is q for q in without_output)}
    if idle:
        # queries of the text of the last double block: they have a gradient, but it is zero
        idle |= {name for name in start if name.startswith("transformer_blocks.0.attn.")
                 and ("add_q_proj" in name or "norm_added_q" in name)}
    assert still == idle and len(still) < len(start) / 2
    # the same pair again
    assert dpo_step(gen, net, reference, optimiser).mean() < math.log(2)
    assert all(torch.equal(value, gen.net.state_dict()[key]) for key, value in untouched["reference"].items())


@needed
@pytest.mark.parametrize("kind", ["epsilon", "flux"])
def test_gradient_checkpointing_changes_no_gradient(folders, gens, kind):
    gradients, root = [], folders[kind]
    checkpointing = db.load_diffusers(root / "model", root / "controlnet", prompts=gens[kind].folder, steps=3,
                                      gradient_checkpointing=True)
    for gen in (gens[kind], checkpointing):
        net = copy.deepcopy(gen.net).requires_grad_(True)
        lq, c, t, x0, eps, xt, target = drawn(gen)
        preference.error(gen.predict(net, xt, t, c), target).sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert gen.backbone.is_gradient_checkpointing and net.is_gradient_checkpointing
    torch.testing.assert_close(*gradients)


@needed
def test_predicts_in_ddp(gen, tmp_path):
    """Forward, backward and a second forward, with DDP's defaults: it raises where a weight got no gradient."""
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'join'}", rank=0, world_size=1)
    try:
        raw = copy.deepcopy(gen.net).requires_grad_(True)
        net = torch.nn.parallel.DistributedDataParallel(raw)
        lq, c, t, x0, eps, xt, target = drawn(gen)
        for _ in range(2):
            out = gen.predict(net, xt, t, c)
            preference.error(out, target).sum().backward()
        torch.testing.assert_close(out.detach(), gen.predict(gen.net, xt, t, c))
        assert gen.sample(net, lq, NAMES[:2], [0, 1]).shape == (2, 3, 32, 24)
        gen.save(tmp_path / "saved", net)
        assert gen.identity(net) == gen.identity(gen.net) == gen.identity(raw)
    finally:
        dist.destroy_process_group()


@needed
@pytest.mark.parametrize("kind", ["epsilon", "flux"])
def test_bfloat16_is_near_and_the_controlnet_stays_float32(folders, gens, prompts, kind):
    gen = db.load_diffusers(folders[kind] / "model", folders[kind] / "controlnet", prompts=prompts, steps=3,
                            dtype=torch.bfloat16)
    assert gen.backbone.dtype == gen.parts["text_encoder"].dtype == torch.bfloat16
    assert gen.net.dtype == gen.vae.dtype == torch.float32
    lq, c, t, x0, eps, xt, target = drawn(gen)
    exact = gens[kind].predict(gens[kind].net, xt, t, gens[kind].condition(lq, NAMES[:2]))
    net = copy.deepcopy(gen.net).requires_grad_(True)
    out = gen.predict(net, xt, t, c)
    assert out.dtype == torch.float32 and torch.equal(x0, gens[kind].encode(images()[1]))
    # diffusers rounds FLUX's t, too, to bfloat16
    assert (out - exact).square().mean() < (2e-2 if kind == "flux" else 1e-3) * exact.square().mean()
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)
    torch.testing.assert_close(dpo_step(gen, net, gen.net, optimiser), torch.full((2,), math.log(2)))
    assert gen.sample(gen.net, lq, NAMES[:2], [0, 1]).isfinite().all()
    assert gen.identity(net)["base"] != gens[kind].identity(net)["base"]


# Prompts and identity

@needed
def test_prompts_are_embedded_once(folders, gens, prompts, monkeypatch):
    for gen in gens.values():
        seen, plain = [], type(gen).embed

        def embed(self, prompt, plain=plain, seen=seen):
            seen.append(prompt)
            return plain(self, prompt)
        monkeypatch.setattr(type(gen), "embed", embed)
        gen.cache, lq = {}, images(3)[0]
        gen.condition(lq, NAMES)
        gen.condition(lq, NAMES[::-1])
        assert sorted(seen) == ["", "a cat, a dog", "sky"]
        monkeypatch.setattr(db, "CACHED", 2)
        gen.text(["x", "y", "z"])
        assert list(gen.cache) == ["y", "z"]
        monkeypatch.undo()


@needed
def test_without_prompts_all_are_empty(folders, gens):
    gen = db.load_diffusers(folders["flux"] / "model", folders["flux"] / "controlnet")
    lq, _ = images(2)
    for without, empty in zip(gen.condition(lq, ["any", "name"]), gens["flux"].condition(lq, ["two", "two"])):
        torch.testing.assert_close(without, empty)


@needed
def test_identity_names_all_that_outputs_depend_on(folders, gens, prompts, tmp_path):
    root = folders["epsilon"]

    def load(model=root / "model", **more):
        return db.load_diffusers(model, root / "controlnet", **{"prompts": prompts, "steps": 3, **more})
    first = gens["epsilon"].identity(gens["epsilon"].net)
    assert load().identity(gens["epsilon"].net) == first and json.dumps(first)
    other = shutil.copytree(prompts, tmp_path / "prompts")
    (other / "one.txt").write_text("a bird")
    changed = [load(prompts=other), load(prompts=None), load(steps=4), load(guidance=1.0), load(adain=False)]
    model = shutil.copytree(root / "model", tmp_path / "model")
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "beta_end": 0.011}))
    changed.append(load(model))
    assert all(gen.identity(gen.net)["net"] == first["net"] for gen in changed)
    assert len({json.dumps(gen.identity(gen.net)) for gen in changed} | {json.dumps(first)}) == 7
    net = copy.deepcopy(gens["epsilon"].net)
    next(net.parameters()).add_(1)
    assert gens["epsilon"].identity(net)["net"] != first["net"]


# Files

@needed
def test_what_is_saved_is_what_is_loaded(gen, folders, tmp_path):
    kind = {"epsilon": "epsilon", "v": "v", "flow": "flux"}[gen.prediction]
    net = shaken(copy.deepcopy(gen.net))
    # again into the same folder: replaced
    for given in (gen.net, net, net.state_dict()):
        gen.save(tmp_path / "run" / "tuned", given)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["tuned"]
    again = db.load_diffusers(folders[kind] / "model", tmp_path / "run" / "tuned", prompts=gen.folder, steps=3)
    assert iqa.tensors_hash(again.net) == iqa.tensors_hash(net) != iqa.tensors_hash(gen.net)
    lq, _ = images()
    assert torch.equal(again.sample(again.net, lq, NAMES[:2], [0, 1]), gen.sample(net, lq, NAMES[:2], [0, 1]))
    # weights alone, as released
    file = next((tmp_path / "run" / "tuned").glob("*.safetensors")).rename(tmp_path / "model.safetensors")
    alone = db.load_diffusers(folders[kind] / "model", file)
    assert iqa.tensors_hash(alone.net) == iqa.tensors_hash(net) and type(alone.net) is type(net)


@needed
def test_nothing_half_written_is_left_and_nothing_else_removed(gens, tmp_path, monkeypatch):
    gen = gens["epsilon"]
    gen.save(tmp_path / "tuned", gen.net)

    def broken(self, folder, **kwargs):
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise OSError(28, "no space", str(folder))
    monkeypatch.setattr(diffusers.ControlNetModel, "save_pretrained", broken)
    with pytest.raises(OSError, match="no space"):
        gen.save(tmp_path / "tuned", gen.net)
    monkeypatch.undo()
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["_class_name"] == "ControlNetModel"
    gen.save(tmp_path / "tuned", gen.net)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tuned"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(runs.UserError, match="something else"):
        gen.save(tmp_path / "notes", gen.net)
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"


# The stages of dpo

@needed
@pytest.mark.parametrize("kind", ["epsilon", "flux"])
def test_the_stages_tune_a_controlnet(kind, folders, quintuplets, rewards, tmp_path, monkeypatch):
    opened, open_network = collections.Counter(), db.open_network

    def counted(folder, *more):
        opened.update([folder.parent.name] if folder.name == "vae" else [])
        return open_network(folder, *more)
    monkeypatch.setattr(db, "open_network", counted)
    root, folder, tuned, out = folders[kind], tmp_path / "pool", tmp_path / "tuned", tmp_path / "compared"
    start, model = root / "controlnet", ["--model", root / "model"]
    crops = ["--hr", quintuplets, "--patch", 8, "--load-size", 48, "--degradation", "two-round", "--samples", 4]
    train = [*model, "--gen", start, "--pairs", folder, "--batch-size", 2, "--lr", 1e-2, "--beta", 100,
             "--val-groups", 1, "--workers", 0, "--log-every", 1, "--save-every", 1, "--max-displacement", 0,
             "--out", tuned]
    pool.main(pool.parse_args(["sample", *model, "--steps", 2, *crops, "--gen", start, "--groups", 4, "--out", folder]))
    pool.main(pool.parse_args(["score", "--pool", folder, "--fr", "psnr", "--nr", "test_rewards:brightness"]))
    pool.main(pool.parse_args(["curate", "--pool", folder, "--top", 1]))
    tune.main(tune.parse_args([*train, "--total-steps", 1]))
    shutil.rmtree(tuned / "weights")
    tune.main(tune.parse_args([*train, "--total-steps", 2, "--resume"]))
    compare.main(compare.parse_args([*model, "--steps", 2, *crops, "--gen", start, tuned, "--groups", 2, "--norm-file",
                                     folder / "norm.json", "--watch", "--diversity", "proxy", "--out", out]))
    # sample, tune twice, compare: once for its two generators
    assert opened == {"model": 4}
    events = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    first = next(event for event in events if event["split"] == "train")
    assert first["win_change"] == 0 and 0.5 < first["loss"] < 1.0
    untuned, after = (db.load_diffusers(root / "model", controlnet).net.state_dict()
                      for controlnet in (start, tuned / "weights"))
    assert any(not torch.equal(untuned[k], after[k]) for k in untuned)
    alone = db.load_diffusers(root / "model", tuned / "weights", steps=2)
    shared = db.load_diffusers(root / "model", tuned / "weights", steps=2,
                               like=db.load_diffusers(root / "model", start, steps=2))
    lq = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert shared.backbone is not alone.backbone and alone.identity(alone.net) == shared.identity(shared.net)
    assert torch.equal(*(gen.sample(gen.net, lq, ["a"], [0]) for gen in (alone, shared)))
    rows = json.loads((out / "eval.json").read_text())["rows"]
    assert list(rows) == ["controlnet", "tuned", "controlnet + unsharp 0.5", "controlnet + unsharp 1",
                          "controlnet, mean of seeds"]
    assert rows["controlnet"]["means"]["reward"]["mean"] != rows["tuned"]["means"]["reward"]["mean"]


# Errors

@needed
def test_errors_name_the_folder_and_what_is_missing(folders, tmp_path):
    def error(model=None, controlnet=None, **more):
        with pytest.raises(runs.UserError) as caught:
            db.load_diffusers(model or root / "model", controlnet or root / "controlnet", **more)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
        return str(caught.value)
    for kind in ("epsilon", "flux"):
        root = folders[kind]
        assert f"{tmp_path / 'none'}: no such folder" in error(tmp_path / "none")
        assert f"{tmp_path / 'none'}: no such folder" in error(controlnet=tmp_path / "none")
        assert f"{tmp_path}: no model_index.json" in error(tmp_path)
        for name in db.FluxSR.PARTS if kind == "flux" else db.StableDiffusionSR.PARTS:
            model = shutil.copytree(root / "model", tmp_path / kind / name)
            shutil.rmtree(model / name)
            message = error(model)
            assert f"{model / name}: no" in message and "download" in message
            if "tokenizer" in name or name == "scheduler":
                continue
            (model / name).mkdir()
            (model / name / "config.json").write_text((root / "model" / name / "config.json").read_text())
            assert "no weights" in error(model)
            shutil.rmtree(model)
    model = shutil.copytree(root / "model", tmp_path / "other")
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (model / "model_index.json").write_text(json.dumps(index))
    assert "StableDiffusion3Pipeline" in error(model)
    assert "expected a FluxControlNetModel" in error(folders["flux"] / "model", folders["epsilon"] / "controlnet")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    assert "not a FluxControlNetModel" in error(controlnet=tmp_path / "other.pth")
    (tmp_path / "empty").mkdir()
    assert "--prompts" in error(prompts=tmp_path / "empty")
    model = shutil.copytree(folders["epsilon"] / "model", tmp_path / "sample")
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text()) | {"prediction_type": "sample"}
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert "prediction_type" in error(model, folders["epsilon"] / "controlnet")


@needed
def test_errors_about_images(gen):
    lq, _ = images(1, 3, 3)
    with pytest.raises(runs.UserError, match="3 x 3 is too small for this model: 4 x 4 at least"):
        gen.sample(gen.net, lq, NAMES[:1], [0])
    with pytest.raises(runs.UserError, match="no four.txt"):
        gen.condition(images(2)[0], ["one", "four"])


@pytest.mark.fast
def test_without_diffusers_the_module_imports_and_says_what_to_install(monkeypatch, tmp_path):
    # import diffusers: ImportError
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(runs.UserError, match="pip install diffusers transformers"):
        db.load_diffusers(tmp_path, tmp_path)
    code = ("import sys; sys.modules.update(diffusers=None, transformers=None)\n"
            "from dpo import diffusers_backend; print(diffusers_backend.load_diffusers.__name__)")
    result = subprocess.run([sys.executable, "-c", code], cwd=runs.REPO, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "load_diffusers"
