"""selfsup.srtta: where features are taken, what moves and what is set back, second degradations, the run as a whole."""
import json
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from skimage import data as pictures

import archs
import degradations
import runs
from images import load_image, save_image
from selfsup import srtta


def network(arch):
    torch.manual_seed(0)
    net = archs.create(arch)
    if hasattr(net, "drop_path"):
        net.drop_path = 0.0
    return net.eval()


def photo(side=96, seed=0):
    image = torch.from_numpy(pictures.astronaut().copy()).permute(2, 0, 1)[None].float() / 255
    y = 40 * seed
    return image[..., y:y + side, 160:160 + side]


SMALL = ["compact-small", "rrdbnet-small", "swinir-small"]


@pytest.mark.fast
@pytest.mark.parametrize("arch", SMALL)
def test_the_last_convolution_of_the_features_is_the_output(arch):
    net, lq = network(arch), photo(24)
    with torch.no_grad():
        whole, features, expected = srtta.Features(net), None, net(lq)
        features = whole(lq)
        assert features.shape[2:] == ((24, 24) if arch == "compact-small" else (96, 96))
        # the border of SwinIR's last convolution sees the padding, which features lack
        image = whole.last(features)
        if arch == "compact-small":
            image = torch.nn.functional.pixel_shuffle(image, 4) + lq.repeat_interleave(4, 2).repeat_interleave(4, 3)
        elif arch == "swinir-small":
            image = image + net.mean
    torch.testing.assert_close(image[..., :-1, :-1], expected[..., :-1, :-1], atol=1e-5, rtol=0)


@pytest.mark.fast
@pytest.mark.parametrize("arch, still", [
    ("compact-small", {"body.0.", "body.1.", "body.14."}),
    ("rrdbnet-small", {"conv_first.", "conv_up1.", "conv_up2.", "conv_hr.", "conv_last."}),
    ("swinir-small", {"conv_first.", "patch_embed.", "conv_before_upsample.", "upsample.", "conv_last."})])
def test_the_body_moves_and_nothing_else(arch, still):
    net = network(arch)
    moving = srtta.adapted_names(net)
    fixed = {name for name, _ in net.named_parameters()} - set(moving)
    assert moving and all(any(name.startswith(part) for part in still) for name in fixed)
    found = {part for part in still for name in fixed if name.startswith(part)}
    assert found == still - {"body.1."}
    if arch == "swinir-small":
        assert any("relative_position_bias_table" in name for name in moving)


@pytest.mark.fast
def test_the_fisher_value_is_the_mean_of_squared_gradients_and_half_of_each_tensor_is_kept():
    net, names = network("compact-small"), ["body.2.weight", "body.3.weight", "body.4.bias"]
    clean = [photo(16, k) for k in range(2)]
    masks = srtta.kept_weights(net, names, clean, nullcontext)
    squares = []
    for lq in clean:
        turned = []
        for k in range(4):
            for mirror in (False, True):
                x = torch.rot90(lq, k, (2, 3))
                y = net(x.flip(3)).flip(3) if mirror else net(x)
                turned.append(torch.rot90(y, -k, (2, 3)))
        target = torch.stack(turned).mean(0).detach()
        net.zero_grad()
        ((net(lq) - target).square() + 1e-3).sqrt().mean().backward()
        squares.append({name: net.get_parameter(name).grad.square().clone() for name in names})
    for name in names:
        fisher = (squares[0][name] + squares[1][name]) / 2
        count = int(fisher.numel() * 0.5)
        assert masks[name].sum() == count
        assert fisher[masks[name]].min() >= fisher[~masks[name]].max()
    alone = srtta.kept_weights(net, names, clean[1:], nullcontext)
    assert any(not torch.equal(alone[name], masks[name]) for name in names)


@pytest.mark.parametrize("arch", SMALL)
def test_a_step_moves_the_unmarked_half_of_the_body_only(arch):
    base = network(arch)
    teacher, student = srtta.Features(network(arch).requires_grad_(False)), srtta.Features(network(arch))
    names = srtta.adapted_names(base)
    for name, parameter in student.net.named_parameters():
        parameter.requires_grad_(name in names)
    masks = srtta.kept_weights(base, names, [photo(16)], nullcontext)
    start = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    opt = srtta.optimiser(student.net, names, 1e-4)
    patches = srtta.draw_patches(photo(48), 16, [1, 2])
    again = srtta.degrade_again(patches, ["blur", "noise"], [3, 4])
    for _ in range(2):
        srtta.step(student, teacher, opt, patches, again, masks, start, nullcontext)
    moved = 0
    for name, parameter in student.net.named_parameters():
        still = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter[still], start[name][still])
        moved += (parameter[~still] != start[name][~still]).sum().item()
    assert moved > 0.5 * sum((~mask).sum().item() for mask in masks.values())
    for name, parameter in teacher.net.named_parameters():
        assert torch.equal(parameter, start[name])


def test_the_gradient_of_a_step_is_that_of_the_formula(monkeypatch):
    """No gradient through the targets; parts of a batch add up to the whole."""
    base, names = network("compact-small"), None
    student, teacher = srtta.Features(network("compact-small")), srtta.Features(network("compact-small"))
    names = srtta.adapted_names(base)
    with torch.no_grad():
        for parameter in student.net.parameters():
            parameter.mul_(1.01)
    for name, parameter in student.net.named_parameters():
        parameter.requires_grad_(name in names)
    patches = srtta.draw_patches(photo(48), 16, [1, 2, 3])
    again = srtta.degrade_again(patches, ["noise"], [3, 4, 5])

    def root(a, b):
        return ((a - b) ** 2 + 1e-3).sqrt().mean()
    features = student(again)
    loss = root(features, student(patches).detach()) + root(features, teacher(patches).detach())
    weights = [student.net.get_parameter(name) for name in names]
    expected = torch.autograd.grad(loss, weights)
    monkeypatch.setattr(srtta, "AT_A_TIME", 2)
    opt = torch.optim.SGD(weights, lr=0.0)
    value = srtta.step(student, teacher, opt, patches, again, {}, {}, nullcontext)
    assert value == pytest.approx(loss.item(), rel=1e-5)
    for weight, gradient in zip(weights, expected):
        torch.testing.assert_close(weight.grad, gradient, atol=1e-7, rtol=1e-3)


@pytest.mark.fast
def test_second_degradations():
    patches = srtta.draw_patches(photo(96), 32, range(40))
    flat = torch.full((40, 3, 32, 32), 0.4)
    assert patches.shape == (40, 3, 32, 32) and torch.equal(srtta.degrade_again(patches, [], range(40)),
                                                            degradations.to_8bit(patches))
    for types in (["blur"], ["noise"], ["jpeg"], list(srtta.TYPES)):
        again = srtta.degrade_again(patches, types, range(40))
        assert again.shape == patches.shape and torch.equal(again, degradations.to_8bit(again))
        assert torch.equal(again[7:8], srtta.degrade_again(patches[7:8], types, [7]))
        assert (again != patches).flatten(1).any(1).sum() >= 30
    # a flat image: blur leaves it, noise has its standard deviation and is grey in 40 %
    blurred = srtta.degrade_again(flat, ["blur"], range(40))
    assert (blurred - blurred[0, 0, 0, 0]).abs().max() == 0
    noisy = srtta.degrade_again(flat, ["noise"], range(40)) * 255
    deviations = noisy.std((1, 2, 3))
    assert deviations.min() < 5 and 24 < deviations.max() < 32
    grey = ((noisy[:, 0] - noisy[:, 1]).abs().amax((1, 2)) == 0).float().mean()
    assert 0.2 < grey < 0.6
    sharp = patches.diff(dim=3).abs().mean()
    assert srtta.degrade_again(patches, ["blur"], range(40)).diff(dim=3).abs().mean() < 0.8 * sharp


@pytest.mark.fast
def test_patches_are_parts_of_the_image_turned():
    image = photo(40)
    windows = image[0].unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    turned = [windows.rot90(k, (2, 3)) for k in range(4)]
    turned += [part.flip(3) for part in turned]
    seen = set()
    for patch in srtta.draw_patches(image, 16, range(90)):
        which = [k for k, part in enumerate(turned) if (part == patch).flatten(1).all(1).any()]
        assert which
        seen.update(which)
    assert len(seen) == 8


@pytest.mark.slow
def test_the_classifier_learns_to_see_noise():
    """In so few steps it is no good judge yet, but it says noise more often where there is some."""
    clean = [degradations.bicubic(photo(300, k)) for k in range(4)]
    classifier = srtta.train_classifier(clean, 48, 150, 0, "cpu", batch=16)
    coffee = torch.from_numpy(pictures.coffee()[:400, :600].copy()).permute(2, 0, 1)[None].float() / 255
    patches = srtta.draw_patches(degradations.bicubic(coffee), 48, range(60))

    def share(types):
        again = srtta.degrade_again(patches, types, range(60))
        return np.mean(["noise" in srtta.types_of(classifier, one[None]) for one in again])
    assert share(["noise"]) > share([]) + 0.3 and share(["noise", "blur"]) > share(["blur"]) + 0.3


def files(tmp_path, count=2):
    for k in range(4):
        save_image(tmp_path / "clean" / f"c{k}.png", photo(128, k)[0])
    for k in range(count):
        noisy = degradations.add_gaussian_noise(photo(32, k), 10.0, torch.randn(1, 3, 32, 32))
        save_image(tmp_path / "lq" / f"a{k}.png", noisy[0])
    runs.save_weights(tmp_path / "sr.pth", network("compact-small").state_dict())


def call(tmp_path, out, *words):
    base = ["--sr", tmp_path / "sr.pth", "--lr-dir", tmp_path / "lq", "--clean", tmp_path / "clean", "--patch", 16,
            "--batch-size", 2, "--steps", 2, "--device", "cpu", "--out", tmp_path / out]
    srtta.main(srtta.parse_args([str(word) for word in [*base, *words]]))
    weights = sorted((tmp_path / out / "weights").glob("ema_*.pth"))
    return weights and torch.load(weights[-1], weights_only=True)["params_ema"]


def test_a_run_is_online_and_final_and_resumes(tmp_path, monkeypatch):
    files(tmp_path)
    fast = ["--types", "noise", "--lr", 3e-3]
    final = call(tmp_path, "out", *fast)
    online = [load_image(tmp_path / "out" / "online" / f"a{k}.png") for k in range(2)]
    assert online[0].shape == (3, 128, 128)
    # the final network has gone on after the first image, and is that of the second image's own steps
    net = archs.load_x4(tmp_path / "out", "--sr")[0]
    with torch.no_grad():
        outputs = [net(load_image(tmp_path / "lq" / f"a{k}.png")[None].float() / 255)[0] for k in range(2)]
    differences = [(sr.clamp(0, 1) * 255 - image).abs().max() for sr, image in zip(outputs, online)]
    assert differences[1] < 0.6 and differences[0] > 1
    with monkeypatch.context() as patched:
        patched.setattr(runs.StopSignal, "requested", lambda self, step: step == 1)
        call(tmp_path, "cut", *fast)
    assert not (tmp_path / "cut" / "weights").exists()
    again = call(tmp_path, "cut", *fast, "--resume")
    assert all(torch.equal(value, final[name]) for name, value in again.items())
    with pytest.raises(runs.UserError, match="made with other settings .*types"):
        call(tmp_path, "cut", "--types", "blur", "--lr", 3e-3, "--resume")
    # with a reset the second image does not depend on the first
    assert call(tmp_path, "reset", "--types", "noise", "--reset", "image") == []
    (tmp_path / "lq" / "a0.png").unlink()
    call(tmp_path, "alone", "--types", "noise", "--reset", "image")
    alone, reset = (load_image(tmp_path / name / "online" / "a1.png") for name in ("alone", "reset"))
    assert torch.equal(alone, reset)


def test_clean_images_are_left_alone(tmp_path, monkeypatch):
    files(tmp_path, 1)
    monkeypatch.setattr(srtta, "types_of", lambda classifier, lq: [])
    monkeypatch.setattr(srtta, "step", lambda *words: pytest.fail("no step for a clean image"))
    final = call(tmp_path, "out", "--classifier-steps", 1)
    start = torch.load(tmp_path / "sr.pth", weights_only=True)["params"]
    assert all(torch.equal(value, final[name]) for name, value in start.items())
    events = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert events[0]["types"] == [] and events[0]["losses"] == []


def test_small_images_and_torchrun_are_refused(tmp_path, monkeypatch):
    files(tmp_path, 1)
    with pytest.raises(runs.UserError, match="32x32 pixels, smaller than a patch: --patch 32 or less"):
        call(tmp_path, "out", "--patch", 64)
    world = runs.World(0, 2, torch.device("cpu"))
    monkeypatch.setattr(runs, "start_training", lambda *words: (world, partial(runs.sample_seed, 0), nullcontext))
    with pytest.raises(runs.UserError, match="start one process"):
        call(tmp_path, "out")
