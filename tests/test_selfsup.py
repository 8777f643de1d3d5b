"""selfsup/: reconstruction network, controller, FAR, losses, encoders, and the stages as a user runs them."""
import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import mannwhitneyu

import archs
import degradations
import metrics
import runs
from images import image_size, load_image, save_image
from losses import VGGFeatureLoss
from selfsup import __main__ as demo
from selfsup import encoders, finetune, options, pretrain, probe
from selfsup import networks as rec

SMALL = dict(width=8, blocks=(1, 1, 2), dim=16)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return rec.Reconstruction(**SMALL, far_channels=32).eval()


def pair(b=2, h=32, w=32, seed=0):
    hr = torch.rand(b, 3, 4 * h, 4 * w, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(hr, scale_factor=0.25, mode="area"), hr


# Networks

@pytest.mark.fast
def test_sizes_of_the_paper():
    parts = rec.Reconstruction()
    counts = [sum(p.numel() for p in part.parameters()) for part in (parts.e_deg, parts.e_img, parts.r)]
    assert [round(count / 1e6, 2) for count in counts] == [4.72, 0.44, 0.83]
    assert pretrain.SIZES["paper"] == {"width": 64, "blocks": [16, 6, 4], "dim": 512}


@pytest.mark.fast
@pytest.mark.parametrize("h, w", [(32, 32), (48, 48), (64, 64), (32, 48), (33, 47)])
@pytest.mark.parametrize("image_encoder", [True, False])
def test_shapes(h, w, image_encoder):
    net = rec.Reconstruction(**SMALL, image_encoder=image_encoder)
    lq, hr = pair(2, h, w)
    again, far = net(lq, hr, torch.ones(2, 16), noise=rec.noise_maps(net, [1, 2], (h, w), "cpu"))
    assert again.shape == lq.shape and far is None and net.e_deg(lq).shape == (2, 16)


@pytest.mark.fast
def test_lway_has_no_far():
    with pytest.raises(ValueError, match="LWay has none"):
        rec.Reconstruction(**SMALL, image_encoder=False, far_channels=4)


@pytest.mark.fast
def test_modulated_convolution_against_its_definition():
    """StyleGAN2's: a sample's kernel is scaled by its style along the input, then brought to unit length by output."""
    torch.manual_seed(0)
    layer, x, z = rec.ModulatedConv(6, 5), torch.randn(3, 6, 9, 7), torch.randn(3, 5)
    for sample in range(3):
        kernel = layer.weight * layer.style(z[sample])[None, :, None, None]
        kernel = kernel / (kernel.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        expected = F.conv2d(x[sample:sample + 1], kernel, layer.bias, padding=1)
        torch.testing.assert_close(layer(x, z)[sample:sample + 1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.fast
def test_a_sample_does_not_depend_on_the_batch(net):
    lq, hr = pair(4)
    s, e_clip, noise = torch.randn(4, 16), torch.rand(4, 32, 8, 8), rec.noise_maps(net, range(4), (32, 32), "cpu")
    again, far = net(lq, hr, s, e_clip, noise)
    for k in range(4):
        one, one_far = net(lq[k:k + 1], hr[k:k + 1], s[k:k + 1], e_clip[k:k + 1], noise[k:k + 1])
        torch.testing.assert_close(one[0], again[k], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one_far[0], far[k], atol=1e-5, rtol=1e-4)


@pytest.mark.fast
def test_shuffled_embeddings_are_those_of_the_neighbours(net):
    lq, hr = pair(3)
    with torch.no_grad():
        embeddings = net.e_deg(lq)
        added = net.r(net.e_img(hr), embeddings[[2, 0, 1]])
        expected = F.avg_pool2d(hr, 4) + added - added.mean((2, 3), keepdim=True)
    torch.testing.assert_close(net(lq, hr, 1.0, shuffle=True)[0], expected)
    assert (expected - net(lq, hr, 1.0)[0]).abs().max() > 1e-6


@pytest.mark.fast
def test_embeddings_differ_from_the_start():
    """With PyTorch's default initialisation they hardly do, and R learns to do without."""
    torch.manual_seed(0)
    lq = torch.cat([pair(1, seed=k)[0] * (0.2 + 0.1 * k) for k in range(8)])
    assert rec.DegradationEncoder(16, 3, 64)(lq).std(0).mean() > 0.05


@pytest.mark.fast
def test_band_encoder_tells_blur_and_noise():
    """From the start its embeddings differ between blurred, noisy and clean, more than between places of a photo."""
    from skimage.data import astronaut
    photo = torch.from_numpy(astronaut()[:256, :256].copy()).permute(2, 0, 1)[None].float() / 255
    torch.manual_seed(0)
    encoder = rec.BandEncoder(16)

    def embed(image):
        return encoder(torch.cat([image[..., y:y + 64, x:x + 64] for y in (0, 64, 128) for x in (64, 128)]))
    same, blurred = embed(photo), embed(degradations.blur(photo, degradations.gaussian_kernel(21, 3.0)))
    noisy = embed(degradations.add_gaussian_noise(photo, 20.0, torch.randn(photo.shape)))
    spread = same.std(0).mean()
    assert (blurred - same).mean(0).abs().mean() > spread and (noisy - same).mean(0).abs().mean() > 0.5 * spread


# Controller

@pytest.mark.fast
def test_hqi_is_one_for_the_enlarged_image():
    lq, _ = pair()
    for distance in (metrics.Proxy(), lambda a, b: (a - b).abs().mean((1, 2, 3))):
        d = rec.hqi_distance(distance, lq, F.interpolate(lq, scale_factor=4, mode="bicubic"))
        torch.testing.assert_close(d, torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.fast
def test_signs_of_eq_8():
    """Sharp HR is far from the enlarged LR, blurred HR near it.

    Pre-training gives the sharp one the larger s, fine-tuning the blurred one.
    """
    from skimage.data import astronaut
    sharp = torch.from_numpy(astronaut()[:256, 128:384].copy()).permute(2, 0, 1)[None].float() / 255
    lq = F.interpolate(sharp, scale_factor=0.25, mode="area")
    blurred = degradations.blur(sharp, degradations.gaussian_kernel(21, 3.0))
    d = {name: rec.hqi_distance(metrics.Proxy(), lq, hr) for name, hr in (("sharp", sharp), ("blurred", blurred))}
    assert d["sharp"] > d["blurred"] + 0.1

    def s(rule, which, **more):
        return rec.controller(rule, d[which], torch.zeros(1, 4), **more)[0, 0]
    assert s("eq8", "sharp", pretrain=True) > s("eq8", "blurred", pretrain=True)
    assert s("eq8", "blurred") > s("eq8", "sharp")
    assert s("flip", "sharp") > s("flip", "blurred")
    assert s("shifted", "blurred", shift=(0.4, 0.5)) > s("shifted", "sharp", shift=(0.4, 0.5))
    torch.testing.assert_close(s("eq8", "sharp") + s("flip", "sharp"), torch.tensor(1.0))
    # as in pre-training
    before_tuning = rec.controller("shifted", torch.tensor([0.5]), torch.zeros(1, 4), shift=(0.4, 0.5))
    assert before_tuning[0, 0] == pytest.approx(0.4)


@pytest.mark.fast
def test_without_controller_s_is_one(net):
    lq, hr = pair()
    assert rec.controller("one", None, torch.randn(2, 16)) == 1
    torch.testing.assert_close(net(lq, hr, 1.0)[0], net(lq, hr, torch.ones(2, 16))[0])


@pytest.mark.fast
def test_the_controller_is_no_loss():
    lq, hr = pair()
    assert not rec.hqi_distance(metrics.Proxy(), lq, hr.requires_grad_()).requires_grad


# FAR

@pytest.mark.fast
def test_descriptors_are_a_gram_matrix_s():
    f = torch.randn(2, 5, 4, 6)
    mean, largest = rec.descriptors(f)
    for k in range(2):
        flat = f[k].reshape(5, 24).numpy()
        gram = flat @ flat.T / 24
        np.testing.assert_allclose(mean[k], gram.mean(1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(largest[k], gram.max(1), rtol=1e-4, atol=1e-6)
        others = gram[~np.eye(5, dtype=bool)].reshape(5, 4)
        np.testing.assert_allclose(rec.descriptors(f, offdiag=True)[0][k], others.mean(1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(rec.descriptors(f, offdiag=True)[1][k], others.max(1), rtol=1e-4, atol=1e-6)


@pytest.mark.fast
def test_descriptors_do_not_see_where_things_are():
    f = torch.randn(1, 5, 4, 6)
    shuffled = f.flatten(2)[..., torch.randperm(24)].view_as(f)
    for a, b in zip(rec.descriptors(f), rec.descriptors(shuffled)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    # a larger image of the same statistics
    repeated = f.repeat(1, 1, 2, 3)
    for a, b in zip(rec.descriptors(f), rec.descriptors(repeated)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.fast
def test_far_by_hand(net):
    lq, hr = pair()
    encoder = encoders.RandomFeatures()
    e_im, e_cl = net.e_img(hr), encoder(hr)
    rows = zip((net.t_a, net.t_m), rec.descriptors(e_im), rec.descriptors(e_cl))
    expected = [torch.linalg.norm(layer(ours) - established, dim=1) for layer, ours, established in rows]
    torch.testing.assert_close(net(lq, hr, 1.0, e_cl)[1], sum(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.fast
def test_gradient_of_far_reaches_the_network(net):
    """Through both encoders together as the sum of each alone; nothing where it is cut."""
    lq, _ = pair()
    m, grads = archs.SRVGGNetCompact(num_feat=8, num_conv=1), {}
    encoder = encoders.RandomFeatures().requires_grad_(False)
    for path in ("both", "im", "cl"):
        sr = m(lq)
        net(lq, sr, 1.0, encoder(sr), path=path)[1].mean().backward()
        grads[path] = torch.cat([p.grad.flatten() for p in m.parameters()])
        m.zero_grad()
    assert all(g.abs().max() > 0 for g in grads.values())
    torch.testing.assert_close(grads["both"], grads["im"] + grads["cl"], atol=1e-5, rtol=1e-3)


# Losses

@pytest.mark.fast
def test_high_frequency_map():
    assert not rec.high_frequency_map(torch.full((1, 3, 16, 16), 0.3)).any()                 # no 0 / 0
    edge = torch.zeros(1, 3, 17, 15)
    edge[..., 7:] = 1
    weight = rec.high_frequency_map(edge)
    assert weight.shape == (1, 1, 17, 15) and weight.min() == 0 and weight.max() == 1
    assert weight[..., 6:8].min() == 1 and weight[..., :6].max() == 0 and weight[..., 8:].max() == 0


@pytest.mark.fast
def test_wavelet_against_pywavelets():
    pywt = pytest.importorskip("pywt")
    lq = torch.rand(1, 3, 16, 12)
    luma = (lq[0] * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0).numpy()
    detail = np.sqrt(sum(band ** 2 for band in pywt.dwt2(luma, "haar")[1]))
    detail = (detail - detail.min()) / (detail.max() - detail.min())
    np.testing.assert_allclose(rec.high_frequency_map(lq)[0, 0, ::2, ::2], detail, atol=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["proxy", "vgg"])
def test_distances(name, vgg_file):
    distance = metrics.create_distances(name, vgg_file, stages=3)[0]
    a, b = torch.rand(2, 3, 32, 40), torch.rand(2, 3, 32, 40)
    assert torch.allclose(distance(a, a), torch.zeros(2), atol=1e-5)
    value = distance(a, b)
    assert value.shape == (2,) and (value > 0.01).all() and (value <= 1).all()
    torch.testing.assert_close(value, distance(b, a))
    assert (distance(a, b, torch.zeros(2, 1, 32, 40)) == 0).all()
    # the mean of an enlarged map is nearly its mean
    torch.testing.assert_close(distance(a, b, torch.ones(2, 1, 32, 40)), value, rtol=0.05, atol=0.01)
    left = torch.zeros(2, 1, 32, 40)
    left[..., :20] = 1
    # equal to a on the left, but for the border
    mixed = torch.cat([a[..., :20], b[..., 20:]], 3)
    assert (distance(a, mixed, left) < 0.5 * distance(a, mixed, 1 - left)).all()


@pytest.mark.fast
def test_vgg_distance_by_hand(vgg_file):
    distance, a, b = metrics.VGGCosine(vgg_file, 2), torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    vgg = VGGFeatureLoss(vgg_file)

    def tap(x, n):
        return F.relu(vgg.features[:n]((x - vgg.mean) / vgg.std))
    expected = sum(1 - F.cosine_similarity(tap(a, n), tap(b, n), dim=1).mean() for n in (3, 8)) / 2
    torch.testing.assert_close(distance(a, b)[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.fast
def test_vgg_distance_in_bf16_is_that_in_fp32(vgg_file):
    """Its network computes in the precision of the caller, the cosine in fp32; the memory format changes no hash."""
    distance, a, b = metrics.VGGCosine(vgg_file, 2), torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    exact, hashed = distance(a, b), encoders.hashes_of(distance)
    distance = distance.to(memory_format=archs.memory_format(distance, "bf16"))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = distance(a, b)
        assert all(direction.dtype == torch.float32 for direction in distance.directions(a))
    assert rounded.dtype == torch.float32 and encoders.hashes_of(distance) == hashed
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, atol=1e-3, rtol=1e-2)


def test_lpips_is_the_package_s(monkeypatch):
    import lpips
    torch.manual_seed(0)
    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    monkeypatch.setattr(lpips, "LPIPS", lambda **_: model)
    ours, a, b = metrics.LPIPS("alex").eval(), torch.rand(2, 3, 64, 72), torch.rand(2, 3, 64, 72)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(a, b), model(2 * a - 1, 2 * b - 1).flatten())
        weight = torch.rand(2, 1, 64, 72)
        model.spatial = True
        torch.testing.assert_close(ours(a, b, weight), (model(2 * a - 1, 2 * b - 1) * weight).mean((1, 2, 3)))


def test_missing_lpips_weights(monkeypatch, tmp_path):
    import lpips

    def fails(**_):
        raise OSError("no route")
    monkeypatch.setattr(lpips, "LPIPS", fails)
    with pytest.raises(ValueError, match=r"vgg16-397923af.pth.*--distance vgg"):
        metrics.LPIPS("vgg")


# Established encoders

def test_clip_against_pyiqa(tmp_path):
    """The same features as an independent implementation, from its key names."""
    from pyiqa.archs.clip_model import ModifiedResNet
    torch.manual_seed(0)
    reference = ModifiedResNet((3, 4, 6, 3), 1024, 32).eval()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 2)
    torch.save({f"visual.{k}": v for k, v in reference.state_dict().items()}, tmp_path / "clip.pth")
    x = torch.rand(1, 3, 96, 64)
    for k, layer in enumerate(("stem", "layer1", "layer2", "layer3")):
        ours = encoders.create_encoder("clip", layer, clip_weights=tmp_path / "clip.pth")
        with torch.no_grad():
            expected = reference.forward_features((x - ours.mean) / ours.std)[k]
            torch.testing.assert_close(ours.train()(x), expected, atol=1e-4, rtol=1e-4)
        assert ours.channels == expected.shape[1] and not any(p.requires_grad for p in ours.parameters())


def test_clip_from_a_torchscript_archive(tmp_path):
    """OpenAI's RN50.pt is one, in half precision."""
    from pyiqa.archs.clip_model import ModifiedResNet
    torch.manual_seed(0)

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = ModifiedResNet((3, 4, 6, 3), 1024, 32)

        def forward(self, x):
            return self.visual.bn1(self.visual.conv1(x))
    model = Both().eval()
    torch.jit.trace(model, torch.rand(1, 3, 32, 32)).save(str(tmp_path / "RN50.pt"))
    state = encoders.clip_state(tmp_path / "RN50.pt")
    assert torch.equal(state["conv1.weight"], model.visual.conv1.weight)


def test_missing_clip_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
    message = r"RN50.pt is not here.*save https.* as .*clip/RN50.pt.*--clip-weights FILE.*--far-enc vgg"
    with pytest.raises(runs.UserError, match=message):
        encoders.clip_state()
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(runs.UserError, match="not CLIP's RN50"):
        encoders.clip_state(tmp_path / "x.pth")


@pytest.mark.fast
@pytest.mark.parametrize("arch", ["swinir-small", "rrdbnet-small", "compact-small"])
def test_features_of_a_network(arch):
    net = archs.create(arch).eval()
    encoder = encoders.create_encoder("sr", sr=net)
    x = torch.rand(1, 3, 32, 32, requires_grad=True)
    features = encoder(x)
    assert features.shape[1] == encoder.channels == 32 and features.shape[2] >= 32
    features.square().mean().backward()
    assert x.grad.abs().max() > 0


# Stages

TINY = ("--patch 16 --load-size 64 --degradation two-round --batch-size 4 --group-size 2 --val-photos 1 --size tiny "
        "--distance proxy --far-enc rand --workers 0 --device cpu").split()
# networks of three steps teach nothing, and would be refused
TUNE = "--patch 16 --batch-size 2 --workers 0 --device cpu --force".split()


def run(module, *words):
    """A script's main, in this process."""
    module.main(module.parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """4 photos of 96 x 96, their degraded quarter in lq/, themselves in gt/."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for k in range(4):
        small = torch.from_numpy(rng.random((1, 3, 12, 12))).float()
        grain = 0.05 * torch.from_numpy(rng.standard_normal((1, 3, 96, 96)))
        hr = (F.interpolate(small, size=(96, 96), mode="bicubic") + grain).clamp(0, 1).float()
        save_image(root / "gt" / f"p{k}.png", hr[0])
        save_image(root / "lq" / f"p{k}.png", F.interpolate(hr, scale_factor=0.25, mode="area")[0])
    torch.manual_seed(0)
    runs.save_weights(root / "sr.pth", archs.SRVGGNetCompact(num_feat=8, num_conv=2).state_dict())
    runs.save_weights(root / "x2.pth", archs.SRVGGNetCompact(num_feat=8, num_conv=2, upscale=2).state_dict())
    return root


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """Run folders of pretrain: method, plain (no controller, no FAR), lway, bands."""
    root = tmp_path_factory.mktemp("rec")
    variants = {"method": [], "plain": ["--s-rule", "one", "--no-far"], "lway": ["--arch", "lway"],
                "bands": ["--deg-enc", "bands"]}
    for name, words in variants.items():
        run(pretrain, "--hr", photos / "gt", "--out", root / name, *TINY, "--total-steps", 3, *words)
    return root


def settings_of(folder):
    return rec.load_reconstruction(folder)[1]


def events_of(folder, *splits):
    """The events of a run that are of these splits."""
    events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [event for event in events if event["split"] in splits]


def tune(photos, rec_path, out, *words):
    """Fine-tune sr.pth for four steps -> the weights that it leaves."""
    run(finetune, "--rec", rec_path, "--sr", photos / "sr.pth", "--lr-dir", photos / "lq", "--out", out, *TUNE,
        "--total-steps", 4, "--val-every", 2, "--lr", 1e-3, *words)
    return torch.load(sorted((out / "weights").glob("ema_*.pth"))[-1], weights_only=True)


def test_pretrain_leaves_a_network(trained):
    for name in ("method", "plain", "lway"):
        net, settings = rec.load_reconstruction(trained / name)
        assert not any(p.requires_grad for p in net.parameters()) and not net.training
        assert hasattr(net, "t_a") == (name == "method")
        assert settings["s_rule"] == ("eq8" if name == "method" else "one")
        assert isinstance(net.e_img, torch.nn.Identity) == (name == "lway")
    names = {"psnr", "psnr_shuffled", "psnr_bicubic", "d", "far", "l1", "percep"}
    assert names <= set(events_of(trained / "method", "val")[-1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pretrain_resumes_bitwise(photos, tmp_path, monkeypatch, precision):
    words = ["--hr", photos / "gt", *TINY, "--save-every", 2, "--total-steps", 5, "--precision", precision]
    run(pretrain, *words, "--out", tmp_path / "whole")
    assert torch.load(tmp_path / "whole" / "ckpt" / "last.pt", weights_only=True)["step"] == 5
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        patched.setattr(runs.StopSignal, "requested", lambda self, step: step == 3)
        run(pretrain, *words, "--out", stopped)
    assert torch.load(stopped / "ckpt" / "last.pt", weights_only=True)["step"] == 3
    assert not (stopped / "weights").exists()
    run(pretrain, *words, "--out", stopped, "--resume")
    files = [folder / "weights" / "rec.pth" for folder in (tmp_path / "whole", stopped)]
    one, other = (torch.load(file, weights_only=True) for file in files)
    for key in ("params", "params_ema"):
        assert all(torch.equal(one[key][k], other[key][k]) for k in one[key])
    assert one["settings"] == other["settings"]


def test_a_resumed_pretraining_looks_through_the_same_networks(photos, tmp_path, monkeypatch):
    state = torch.load(photos / "sr.pth", weights_only=True)
    torch.save({"params": {k: 1.1 * v for k, v in state["params"].items()}}, tmp_path / "other.pth")
    words = ["--hr", photos / "gt", *TINY, "--far-enc", "sr", "--total-steps", 2, "--out", tmp_path / "out"]
    with monkeypatch.context() as patched:
        patched.setattr(runs.StopSignal, "requested", lambda self, step: step == 1)
        run(pretrain, *words, "--far-sr", photos / "sr.pth")
    with pytest.raises(runs.UserError, match="made with other settings .looked_through"):
        run(pretrain, *words, "--far-sr", tmp_path / "other.pth", "--resume")
    run(pretrain, *words, "--far-sr", photos / "sr.pth", "--resume")


@pytest.mark.parametrize("name, value", [
    ("offdiag", True), ("percep", 0.3), ("far_layer", "stem"), ("encoder_from", 2)])
def test_a_run_whose_constants_were_others_is_not_continued(photos, tmp_path, monkeypatch, name, value):
    """They were flags in earlier commits, and a fork may change them."""
    words = ["--hr", photos / "gt", *TINY, "--total-steps", 2, "--out", tmp_path / "out"]
    with monkeypatch.context() as patched:
        patched.setattr(runs.StopSignal, "requested", lambda self, step: step == 1)
        run(pretrain, *words)
    last = tmp_path / "out" / "ckpt" / "last.pt"
    state = torch.load(last, weights_only=True)
    state["args"][name] = value
    torch.save(state, last)
    with pytest.raises(runs.UserError, match=name):
        run(pretrain, *words, "--resume")


def test_a_run_of_an_earlier_commit_is_continued(photos, tmp_path, monkeypatch):
    """Commit 6be4990 had one command line for all stages and flags for what are constants now."""
    words = ["--hr", photos / "gt", *TINY, "--total-steps", 2]
    run(pretrain, *words, "--out", tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(runs.StopSignal, "requested", lambda self, step: step == 1)
        run(pretrain, *words, "--out", tmp_path / "out")
    last = tmp_path / "out" / "ckpt" / "last.pt"
    state = torch.load(last, weights_only=True)
    del state["args"]["size"]
    state["args"] |= {"encoder_from": 0, "command": "pretrain", "all": False, "rest": []}
    torch.save(state, last)
    run(pretrain, *words, "--out", tmp_path / "out", "--resume")
    one, other = (torch.load(tmp_path / name / "weights" / "rec.pth", weights_only=True) for name in ("whole", "out"))
    assert all(torch.equal(one["params"][k], other["params"][k]) for k in one["params"])


def test_killed_between_checkpoint_and_weights(photos, tmp_path):
    """The last step is saved before the weights are written: a resumed run writes them."""
    words = ["--hr", photos / "gt", *TINY, "--total-steps", 2, "--out", tmp_path / "out"]
    run(pretrain, *words)
    file = tmp_path / "out" / "weights" / "rec.pth"
    first = torch.load(file, weights_only=True)
    file.unlink()
    run(pretrain, *words, "--resume")
    second = torch.load(file, weights_only=True)
    assert first["settings"] == second["settings"]
    assert all(torch.equal(first["params_ema"][k], second["params_ema"][k]) for k in first["params_ema"])


def test_finetune_goes_on_to_more_steps(photos, trained, tmp_path):
    tune(photos, trained / "method", tmp_path / "out")
    more = tune(photos, trained / "method", tmp_path / "out", "--total-steps", 6, "--resume")
    whole = tune(photos, trained / "method", tmp_path / "whole", "--total-steps", 6)
    assert all(torch.equal(more["params"][k], whole["params"][k]) for k in whole["params"])
    with pytest.raises(runs.UserError, match="already at step 6"):
        tune(photos, trained / "method", tmp_path / "out", "--resume")


def test_weight_of_far_is_frozen_after_the_first_steps(trained):
    last = torch.load(trained / "method" / "ckpt" / "last.pt", weights_only=True)
    sum_of_rec, sum_of_far = last["balance"].tolist()
    assert settings_of(trained / "method")["lambda_pt"] == pytest.approx(sum_of_rec / sum_of_far)
    # sums of three steps
    assert events_of(trained / "method", "train")[-1]["far"] * 3 == pytest.approx(sum_of_far, rel=1e-4)


def test_finetune_changes_the_network_alone(photos, trained, tmp_path, monkeypatch):
    start = torch.load(photos / "sr.pth", weights_only=True)["params"]
    rec_file, frozen, adapt = trained / "method" / "weights" / "rec.pth", {}, finetune.adapt

    def state_of(judge):
        states = (judge.net.state_dict(), judge.encoder.state_dict())
        return [value.clone() for state in states for value in state.values()]

    def watched(args, record, world, seeds, autocast, judge, *others):
        frozen["first"] = state_of(judge)
        adapt(args, record, world, seeds, autocast, judge, *others)
        frozen["last"] = state_of(judge)
    monkeypatch.setattr(finetune, "adapt", watched)
    content = rec_file.read_bytes()
    tuned = tune(photos, trained / "method", tmp_path / "out", "--gt-dir", photos / "gt")
    assert all(torch.equal(a, b) for a, b in zip(frozen["first"], frozen["last"])) and rec_file.read_bytes() == content
    assert all(not torch.equal(start[k], tuned["params"][k]) for k in start if k.endswith("weight"))
    # EMA: 0.999 of itself every step; the raw weights in between are not kept
    name = "body.0.weight"
    moved, moved_ema = ((tuned[key][name] - start[name]).abs().max() for key in ("params", "params_ema"))
    assert moved_ema < 0.01 * moved


def test_ema_formula():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * a.weight.detach().clone() + 0.1 * b.weight.detach()
    runs.update_ema(a, b, 0.9)
    torch.testing.assert_close(a.weight.detach(), expected)


@pytest.mark.parametrize("name, words", [
    ("plain", []), ("lway", []), ("method", ["--s-rule", "flip"]), ("method", ["--s-rule", "shifted"]),
    ("method", ["--no-far"]), ("method", ["--no-hf"]), ("method", ["--stop", "far"]), ("method", ["--hold-out", 1]),
    ("bands", [])])
def test_switches(photos, trained, tmp_path, name, words, monkeypatch):
    monkeypatch.setattr(finetune, "PATIENCE", 2)
    tune(photos, trained / name, tmp_path / "out", *words)
    last = events_of(tmp_path / "out", "ema")[-1]
    assert ("far" in last) == (name in ("method", "bands") and "--no-far" not in words)
    assert np.isfinite(last["rec"]) and last["colours"] > 0
    if "--hold-out" in words:
        held, adapted = ((tmp_path / "out" / f"{n}.txt").read_text().split() for n in ("held_out", "adapted"))
        assert len(held) == 1 and len(adapted) == 3 and not set(held) & set(adapted)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_finetune_resumes_bitwise(photos, trained, tmp_path, monkeypatch, precision):
    words = ["--gt-dir", photos / "gt", "--stop", "val-gt", "--precision", precision]
    whole = tune(photos, trained / "method", tmp_path / "whole", *words)
    with monkeypatch.context() as patched:
        patched.setattr(runs.StopSignal, "requested", lambda self, step: step == 3)
        # stopped: no weights yet
        with pytest.raises(IndexError):
            tune(photos, trained / "method", tmp_path / "cut", *words)
    cut = tune(photos, trained / "method", tmp_path / "cut", *words, "--resume")
    for key in ("params", "params_ema"):
        assert all(torch.equal(whole[key][k], cut[key][k]) for k in whole[key])
    assert events_of(tmp_path / "whole", "ema", "raw") == events_of(tmp_path / "cut", "ema", "raw")


def test_per_image(photos, trained, tmp_path):
    out = tmp_path / "out"
    run(finetune, "--rec", trained / "method", "--sr", photos / "sr.pth", "--lr-dir", photos / "lq", "--out", out,
        *TUNE, "--total-steps", 2, "--lr", 1e-3, "--per-image")
    assert [image_size(path) for path in sorted((out / "sr").glob("*.png"))] == [(96, 96)] * 4
    files = [out / f"p{k}" / "weights" / "ema_0000002.pth" for k in (0, 1)]
    a, b = (torch.load(file, weights_only=True)["params"]["body.0.weight"] for file in files)
    assert not torch.equal(a, b)


def test_the_result_loads_everywhere(photos, trained, tmp_path, script):
    import spandrel
    tune(photos, trained / "method", tmp_path / "out")
    file = tmp_path / "out" / "weights" / "ema_0000004.pth"
    net, _ = archs.load_x4(tmp_path / "out", "--sr")
    lq = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        model = spandrel.ModelLoader().load_from_file(file).model
        torch.testing.assert_close(model(lq), net(lq), atol=1e-5, rtol=1e-4)
    script("upscale.py", "--weights", tmp_path / "out", photos / "lq" / "p0.png", "--out", tmp_path / "sr")
    assert image_size(tmp_path / "sr" / "p0.png") == (96, 96)
    output = script("evaluate.py", "--protocol", "whole-y", "--weights", photos / "sr.pth", tmp_path / "out",
                    "--lq", photos / "lq", "--gt", photos / "gt", "--metrics", "psnr", "ssim",
                    "--cache", tmp_path / "cache", "--out-json", tmp_path / "r.json").stdout
    assert "nothing cropped" in output
    result = json.loads((tmp_path / "r.json").read_text())
    from skimage.color import rgb2ycbcr
    from skimage.metrics import peak_signal_noise_ratio
    files = (photos / "gt" / "p0.png", tmp_path / "sr" / "p0.png")
    truth, upscaled = (rgb2ycbcr(load_image(file).permute(1, 2, 0).numpy())[..., 0] for file in files)
    expected = peak_signal_noise_ratio(truth, upscaled, data_range=255)
    assert result["scores"]["out"]["p0"]["psnr"] == pytest.approx(expected, abs=1e-3)


def test_probes(photos, trained, tmp_path):
    shared = ["--hr", photos / "gt", "--crops", 8]
    run(probe, "fig7", "--rec", trained / "method", trained / "plain", *shared, "--out", tmp_path / "fig7")
    lines = json.loads((tmp_path / "fig7.json").read_text())["lines"]
    assert len(lines) == 3 and all(len(line["psnr"]) == 11 for line in lines.values())
    run(probe, "fig8", "--rec", trained / "method", *shared, "--out", tmp_path / "fig8",
        "--sr", photos / "sr.pth", "--lr-dir", photos / "lq")
    values = json.loads((tmp_path / "fig8.json").read_text())["lines"]["method"]
    assert set(values["auc"]) == {"blur", "noise", "jpeg", "as in pre-training", "sr.pth"}
    assert len(values["clean"]) == 8 and len(values["sr.pth"]) == 4
    tune(photos, trained / "method", tmp_path / "tuned", "--gt-dir", photos / "gt")
    run(probe, "fig9", "--runs", tmp_path / "tuned", "--out", tmp_path / "fig9")
    for n in (7, 8, 9):
        assert min(image_size(tmp_path / f"fig{n}.png")) > 200


@pytest.mark.fast
def test_area_under_the_curve():
    assert probe.area(np.array([1, 2, 3.0]), np.array([4, 5.0])) == 1
    assert probe.area(np.array([1, 2, 3.0]), np.array([2, 2.0])) == 0.5
    rng = np.random.default_rng(0)
    clean, worse = rng.normal(0, 1, 40), rng.normal(1, 1, 40)
    value, low, high = probe.area_with_interval(clean, worse, np.repeat(np.arange(10), 4))
    brute = np.mean([(b > a) + 0.5 * (b == a) for a in clean for b in worse])
    assert value == pytest.approx(brute) and low < value < high
    assert value == mannwhitneyu(worse, clean).statistic / 1600
    value, low, high = probe.area_of_others(clean, worse[:30])
    brute = np.mean([b > a for a in clean for b in worse[:30]])
    assert value == pytest.approx(brute) and 0 < low < value < high < 1
    value, low, high = probe.area_of_others(clean, worse[:1])
    assert low == value == high


def test_probes_of_what_does_not_fit(photos, trained, tmp_path):
    out = ["--out", tmp_path / "figure"]
    content = torch.load(trained / "method" / "weights" / "rec.pth", weights_only=True)
    content["settings"]["far_enc"] = "sr"
    torch.save(content, tmp_path / "sr.pth")
    fig8 = ["fig8", *out, "--hr", photos / "gt", "--rec"]
    tuned = [trained / "method", "--sr", photos / "sr.pth"]
    for words, message in (([tmp_path / "sr.pth"], "--far-sr PATH is needed"),
                           ([trained / "plain"], "trained without FAR"),
                           ([*tuned, "--lr-dir", tmp_path / "none"], "--lr-dir .*: no such folder"),
                           ([*tuned, photos / "sr.pth", "--lr-dir", photos / "lq"], "two networks of one name")):
        with pytest.raises(runs.UserError, match=message):
            run(probe, *fig8, *words)
    event = {"rec": 1.0, "colours": 0.0}
    # b was continued without --gt-dir
    for name, once in (("a", {}), ("b", {"psnr": 20.0}), ("c/a", {})):
        (tmp_path / name).mkdir(parents=True)
        lines = [{"step": k, "split": split, **event, **(once if k == 0 else {})}
                 for k in range(3) for split in ("ema", "raw")]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(runs.UserError, match="two runs are called a"):
        run(probe, "fig9", *out, "--runs", tmp_path / "a", tmp_path / "c" / "a")
    assert not (tmp_path / "figure.json").exists()
    run(probe, "fig9", *out, "--runs", tmp_path / "b", tmp_path / "a")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_missing_vgg_weights_name_flags_of_these_scripts(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
    for make, instead in ((metrics.VGGCosine, "proxy"), (encoders.VGGFeatures, "--far-enc rand")):
        with pytest.raises(runs.UserError, match=instead) as caught:
            make()
        assert "--vgg-weights FILE" in str(caught.value) and "--lambda-p" not in str(caught.value)


# Demo

def test_the_demos_make_what_they_start_from(tmp_path, monkeypatch):
    """By the commands that a user would give; a shortened length goes to all trainings."""
    monkeypatch.chdir(tmp_path)
    made = []

    class StartsFrom(Exception):
        pass

    def make_missing(path, world, script, *words):
        made.append(" ".join(map(str, [path, script, *words])))
        if script == last:
            raise StartsFrom
    monkeypatch.setattr(runs, "make_missing", make_missing)
    degrade = ("datasets/demo-domain prepare.degrade datasets/demo/Test/GT/demo/untouched datasets/demo-domain "
               "--degradation camera")
    photos = ["datasets/demo prepare.demo_set"]
    psnr = "runs/compact-small-psnr/weights train.py --demo --stage psnr --resume auto --device cpu"
    pretraining = "runs/rec-demo/weights selfsup.pretrain --demo --resume auto --device cpu"
    for module, words, expected in (
            (pretrain, [], photos), (probe, [], [*photos, pretraining]),
            (finetune, [], [*photos, degrade, psnr, pretraining]),
            (finetune, ["--total-steps", 3],
             [*photos, degrade, f"{psnr} --total-steps 3", f"{pretraining} --total-steps 3"]),
            (finetune, ["--sr", "mine.pth", "--lr-dir", "mine"], [pretraining])):
        last = expected[-1].split()[1]
        with pytest.raises(StartsFrom):
            run(module, "--demo", "--device", "cpu", *words)
        assert made == expected
        made.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
def test_only_a_shortened_demo_is_forced():
    assert not finetune.parse_args(["--demo"]).force
    assert finetune.parse_args(["--demo", "--total-steps", "2"]).force
    assert not finetune.parse_args(["--sr", "a.pth", "--lr-dir", "b"]).force


def test_all_stages_in_small(tmp_path, monkeypatch):
    """python -m selfsup --demo starts the scripts one after the other."""
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(options, "run", lambda script, *words: started.append([script, *map(str, words)]))
    monkeypatch.setattr(runs, "make_missing", lambda path, world, *words: options.run(*words))
    demo.main(demo.parse_args(["--demo", "--total-steps", "2"]))
    scripts = [words[0] for words in started]
    assert scripts == ["train.py", "selfsup.pretrain", "selfsup.finetune", "evaluate.py", "selfsup.probe"]
    assert all("--total-steps 2" in " ".join(words) for words in started[:3])
    assert "whole-y" in started[3] and started[3][started[3].index("--weights") + 1:][:2] == [
        str(options.DEMO_SR), str(options.DEMO_TUNED)]


@pytest.mark.slow
def test_the_demo_from_nothing(tmp_path, script):
    """In an empty folder: the data, the run that is adapted, all stages, the table and the plot."""
    output = script("selfsup", "--demo", "--total-steps", 2, cwd=tmp_path, timeout=600).stdout
    assert "whole-y" in output and "area under the ROC curve" in output
    scores = json.loads((tmp_path / "runs" / "selfsup-demo.json").read_text())["mean"]
    assert {"compact-small-psnr", "selfsup-demo"} <= set(scores)
    assert image_size(tmp_path / "runs" / "selfsup-demo-fig8.png")


# Errors

def test_what_has_not_learned_is_refused(photos, trained, tmp_path):
    content = torch.load(trained / "method" / "weights" / "rec.pth", weights_only=True)
    good = {"psnr": 30.0, "psnr_bicubic": 29.0, "psnr_shuffled": 28.0, "far": 0.5, "explained": 0.6, "d": 0.3}

    def words(**values):
        held = {**good, **values} if values != {"held_out": None} else None
        torch.save(content | {"settings": content["settings"] | {"held_out": held}}, tmp_path / "rec.pth")
        return [w for w in TUNE if w != "--force"] + ["--total-steps", 1, "--lambda-ft", 0.1, "--val-every", 0]

    def attempt(out, *more, **values):
        run(finetune, *words(**values), "--rec", tmp_path / "rec.pth", "--sr", photos / "sr.pth", "--lr-dir",
            photos / "lq", "--out", tmp_path / out, *more)
    for values, message in (({"psnr": 28.9}, r"no better than bicubic .*\(28.90 against 29.00 dB"),
                            ({"psnr_shuffled": 30.0}, "does not look at them"),
                            ({"explained": 0.49}, "its T predicts 49% of the descriptors' energy")):
        with pytest.raises(runs.UserError, match=message):
            attempt("out", **values)
        assert not (tmp_path / "out").exists()
    attempt("good", psnr=30.0)
    attempt("without", "--no-far", "--lambda-ft", "auto", explained=0.1)
    with pytest.raises(runs.UserError, match="--lambda-ft 0.1 weighs FAR, which is off"):
        attempt("weighed", "--no-far", psnr=30.0)
    attempt("forced", "--force", psnr=20.0, explained=0.1)
    assert (tmp_path / "forced" / "log.txt").read_text().count("WARNING, forced although it") == 3
    # of before: unknown
    attempt("old", held_out=None)
    log = (tmp_path / "good" / "log.txt").read_text()
    assert "largest movement of the averaged weights" in log and "8e-05 to 0.00075" in log


def test_networks_of_before_have_no_skip(trained, tmp_path, photos):
    content = torch.load(trained / "method" / "weights" / "rec.pth", weights_only=True)
    assert rec.load_reconstruction(trained / "method")[0].skip
    settings = copy.deepcopy(content["settings"])
    del settings["sizes"]["skip"], settings["held_out"]
    torch.save(content | {"settings": settings}, tmp_path / "rec.pth")
    net, settings = rec.load_reconstruction(tmp_path / "rec.pth")
    lq, hr = pair()
    with torch.no_grad():
        torch.testing.assert_close(net(lq, hr, 1.0)[0], net.r(net.e_img(hr), net.e_deg(lq)))
    assert settings["held_out"] is None
    run(pretrain, "--hr", photos / "gt", "--out", tmp_path / "out", *TINY, "--total-steps", 2, "--no-skip")
    assert not rec.load_reconstruction(tmp_path / "out")[0].skip
    words = ["--hr", photos / "gt", "--out", tmp_path / "out", *TINY, "--total-steps", 2, "--resume"]
    with pytest.raises(runs.UserError, match="it began with --no-skip"):
        run(pretrain, *words, "--skip")
    run(pretrain, *words)
    assert not rec.load_reconstruction(tmp_path / "out")[0].skip


@pytest.mark.fast
def test_with_the_skip_colours_are_right_from_the_start():
    torch.manual_seed(0)
    lq, hr = pair(4)
    errors = []
    for skip in (True, False):
        again = rec.Reconstruction(**SMALL, skip=skip)(lq, hr, 1.0)[0]
        errors.append((again.mean((2, 3)) - lq.mean((2, 3))).abs().mean().item())
    assert errors[0] < 0.05 and errors[1] > 0.2
    # and stay right, whatever R has learned
    net = rec.Reconstruction(**SMALL)
    net.r.last[1].weight.data *= 50
    net.r.last[1].bias.data += torch.tensor([0.1, 0.0, -0.2])
    again = net(lq, hr, 1.0)[0]
    assert (again - F.avg_pool2d(hr, 4)).abs().mean() > 0.01
    torch.testing.assert_close(again.mean((2, 3)), hr.mean((2, 3)))


@pytest.mark.fast
def test_the_share_of_energy_that_t_explains():
    generator = torch.Generator().manual_seed(0)
    truth = [torch.randn(50, 8, generator=generator) + 10 for _ in range(2)]
    noise = [torch.randn(50, 8, generator=generator) for _ in range(2)]

    def share(*predictions, means=(10.0, 10.0)):
        batches = [[(p[k:k + 25], t[k:k + 25]) for p, t in zip(predictions, truth)] for k in (0, 25)]
        return pretrain.explained(batches, [torch.full((8,), mean) for mean in means])
    assert share(*truth) == pytest.approx(1)
    # the mean alone, which a bias predicts, however large it is
    assert share(*(torch.full_like(t, 10.0) for t in truth)) == pytest.approx(0, abs=1e-6)
    # an error of half the deviation in one of two leaves an eighth of the energy
    assert share(truth[0], truth[1] + 0.5 * noise[1]) == pytest.approx(0.875, abs=0.03)
    assert share(truth[0] + 2 * noise[0], truth[1] + 2 * noise[1]) < -2


@pytest.mark.parametrize("words, message", [
    (["--patch", "32"], r"24x24 pixels, smaller than a patch: --patch 24 or less"),
    (["--sr", "X2"], r"--sr .*x2.pth: a x2 checkpoint, expected a x4 one"),
    (["--lr-dir", "EMPTY"], r"no images"),
    (["--lr-dir", "nowhere"], r"--lr-dir nowhere: no such folder"),
    (["--rec", "nowhere"], r"no reconstruction network there; make it with"),
    (["--rec", "WIDE"], r"not a reconstruction network .*size mismatch"),
    (["--rec", "SR"], r"not a reconstruction network"),
    (["--rec", "PLAIN", "--far"], r"was trained without; python -m selfsup.pretrain --far"),
    (["--rec", "PLAIN", "--s-rule", "eq8"], r"was trained without a controller"),
    (["--s-rule", "one"], r"was trained with a controller"),
    (["--gt-dir", "LQ"], r"24x24 pixels, expected a quarter of its original's 24x24"),
    (["--out", "LQ"], r"exists and is not empty"),
    (["--rec", "OLD"], r"not a reconstruction network .*mean_d"),
    (["--rec", "OTHER"], r"FAR's encoder: other weights than pre-training had"),
])
def test_errors_of_finetune(photos, trained, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    content = torch.load(trained / "method" / "weights" / "rec.pth", weights_only=True)

    def changed(name, change):
        settings = copy.deepcopy(content["settings"])
        change(settings)
        torch.save(content | {"settings": settings}, tmp_path / name)
        return tmp_path / name
    places = {"WIDE": changed("wide.pth", lambda settings: settings["sizes"].update(width=12)),
              "OLD": changed("old.pth", lambda settings: settings.pop("mean_d")),
              "OTHER": changed("other.pth", lambda settings: settings["looked_through"].__setitem__(2, "0123")),
              "X2": photos / "x2.pth", "EMPTY": tmp_path / "empty", "SR": photos / "sr.pth", "PLAIN": trained / "plain",
              "LQ": photos / "lq"}
    with pytest.raises(runs.UserError, match=message):
        tune(photos, trained / "method", tmp_path / "out", *[places.get(word, word) for word in words])
    assert not (tmp_path / "out").exists()


@pytest.mark.fast
@pytest.mark.parametrize("module, words, message", [
    (pretrain, "--arch lway --far", "LWay has none"),
    (pretrain, "--no-far --lambda-pt 3", "--lambda-pt 3 weighs FAR, which is off"),
    (pretrain, "--load-size 128", "at least 256"),
    (pretrain, "--patches 3", "unrecognized"),
    (pretrain, "--far-enc sr", "--far-sr"),
    (finetune, "--lr-dir x", "--sr is needed"),
    (finetune, "--sr a --lr-dir x --stop val-gt", "--gt-dir DIR is needed"),
    (finetune, "--sr a --lr-dir b --watch psnr", "--watch psnr compares"),
    (finetune, "--sr a --lr-dir b --stop far --val-every 0", "must not be 0"),
    (probe, "fig7", "--rec is needed"),
    (probe, "fig7 --rec r --hr h --sr a --lr-dir b", "--sr: of fig8 only"),
    (probe, "", "which figure"),
    (probe, "fig7 --precision bf16", "unrecognized"),
    (demo, "", "--demo"),
    (demo, "pretrain --demo", "unrecognized")])
def test_errors_of_flags(module, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        module.parse_args(words.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.fast
def test_switches_of_the_tables():
    def parse(*words):
        return pretrain.parse_args(list(words))
    defaults = parse()
    assert (defaults.s_rule, defaults.far, defaults.arch, defaults.size) == ("eq8", True, "hra", "paper")
    assert (parse("--arch", "lway").s_rule, parse("--arch=lway").far) == ("one", False)
    assert (defaults.lr, defaults.total_steps, defaults.ema_decay, defaults.patch) == (2e-4, 500_000, 0.999, 64)
    assert (defaults.vgg_stages, defaults.skip, defaults.degradation) == (5, None, "realesrgan")
    tuned = finetune.parse_args(["--sr", "a.pth", "--lr-dir", "b"])
    assert (tuned.total_steps, tuned.ema_decay, tuned.hf, tuned.stop) == (300, 0.999, True, "fixed")
    assert tuned.far_floor and not tuned.force
    assert str(tuned.out) == "runs/a+b"


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(photos, tmp_path, script):
    words = ["--hr", photos / "gt", *TINY, "--total-steps", 3]
    run(pretrain, *words, "--out", tmp_path / "one")
    script("selfsup.pretrain", *words, "--out", tmp_path / "two", processes=2)
    one, two = (torch.load(tmp_path / n / "weights" / "rec.pth", weights_only=True)["params"] for n in ("one", "two"))
    for k in one:
        torch.testing.assert_close(one[k], two[k], atol=2e-4, rtol=1e-3)
    words = ["--rec", tmp_path / "one", "--sr", photos / "sr.pth", "--lr-dir", photos / "lq", "--gt-dir", photos / "gt",
             *TUNE, "--total-steps", 2, "--lr", 1e-4]
    run(finetune, *words, "--out", tmp_path / "a")
    script("selfsup.finetune", *words, "--out", tmp_path / "b", processes=2)
    start = torch.load(photos / "sr.pth", weights_only=True)["params"]

    def flat(state):
        return torch.cat([state[k].flatten() for k in start])
    a, b = (torch.load(tmp_path / n / "weights" / "ema_0000002.pth", weights_only=True)["params"] for n in "ab")
    # Adam's first steps turn a rounding of zero into a step
    assert (flat(a) - flat(b)).abs().mean() < 0.02 * (flat(a) - flat(start)).abs().mean()
