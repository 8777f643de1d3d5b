"""FlowSR: network, noise schedules, sampling, files."""
import math

import pytest
import torch
import torch.nn.functional as F

import archs
import runs
from dpo import flow

pytestmark = pytest.mark.fast
SMALL = dict(width=(8, 16, 16), blocks=1)


@pytest.mark.parametrize("size, millions", [("tiny", 1.4), ("small", 5.9), ("base", 10.1), ("large", 21.8)])
def test_sizes_are_what_the_help_says(size, millions):
    with torch.device("meta"):
        assert round(sum(p.numel() for p in flow.FlowNet(**flow.SIZES[size]).parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("h, w", [(4, 4), (5, 7), (16, 12), (3, 9)])
@pytest.mark.parametrize("prediction", flow.PREDICTIONS)
def test_any_size(h, w, prediction):
    gen = flow.FlowSR(**SMALL, prediction=prediction, steps=2)
    out = gen.sample(gen.net, torch.rand(2, 3, h, w), ["a", "b"], [0, 1])
    assert out.shape == (2, 3, 4 * h, 4 * w) and out.min() >= 0 and out.max() <= 1


def test_a_generator_starts_from_the_best_multiple_of_its_input():
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 20_000, 8)
    for prediction in flow.PREDICTIONS:
        for t in (0.1, 0.5, 0.95):
            time = torch.full((len(x0),), t)
            xt, target = flow.noised(prediction, x0, eps, time)
            best = ((xt * target).sum() / xt.square().sum()).item()
            assert flow.linear_guess(prediction, time)[0].item() == pytest.approx(best, abs=0.01)
    net, xt, t = flow.FlowNet(**SMALL), torch.randn(2, 48, 8, 8), torch.tensor([0.2, 0.7])
    assert torch.allclose(net(xt, t, torch.rand(2, 3, 8, 8)), flow.linear_guess("flow", t)[:, None, None, None] * xt)


def test_targets_of_the_three_predictions():
    x0, eps, t = torch.randn(3, 48, 2, 2), torch.randn(3, 48, 2, 2), torch.tensor([0.1, 0.5, 0.9])
    xt, v = flow.noised("flow", x0, eps, t)
    assert torch.allclose(xt - t.view(3, 1, 1, 1) * v, x0, atol=1e-5)
    a, s = flow.cosine(t.view(3, 1, 1, 1))
    assert torch.allclose(a * a + s * s, torch.ones(()))
    xt, v = flow.noised("v", x0, eps, t)
    assert torch.allclose(a * xt - s * v, x0, atol=1e-5) and torch.allclose(s * xt + a * v, eps, atol=1e-5)
    assert flow.noised("epsilon", x0, eps, t)[1] is eps and torch.equal(flow.noised("epsilon", x0, eps, t)[0], xt)


def test_the_cosine_schedule_against_diffusers_definition():
    """Products of 1 - beta_k with beta_k from the ratio of the curve, as Nichol and Dhariwal write it."""
    curve = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(1001)]
    product = 1.0
    for k in range(900):
        product *= curve[k + 1] / curve[k]
        if k % 100 == 99:
            assert flow.cosine(torch.tensor((k + 1) / 1000))[0].item() ** 2 == pytest.approx(product, abs=1e-5)


@pytest.mark.parametrize("prediction", flow.PREDICTIONS)
def test_sampling_with_a_perfect_network_gives_the_image(prediction):
    x0, eps = torch.rand(2, 48, 3, 3) - 0.5, torch.randn(2, 48, 3, 3)
    x = flow.noised(prediction, x0, eps, torch.ones(2))[0]
    for k in range(5, 0, -1):
        a, s = flow.cosine(torch.tensor(k / 5))
        perfect = {"flow": (x - x0) / (k / 5), "epsilon": (x - a * x0) / s, "v": a * (x - a * x0) / s - s * x0}
        out = perfect[prediction]
        x = flow.step_back(prediction, x, out, k / 5, (k - 1) / 5)
    assert torch.allclose(x, x0, atol=2e-3)


def test_a_seed_is_the_same_image_in_any_batch():
    torch.manual_seed(0)
    gen, lq = flow.FlowSR(**SMALL, steps=3), torch.rand(1, 3, 8, 8)
    for layer in (gen.net.last, gen.net.gate):
        torch.nn.init.normal_(layer.weight, std=0.1)
    many = gen.sample(gen.net, lq.expand(5, -1, -1, -1), ["a"] * 5, range(5))
    for seed in (0, 3):
        assert torch.allclose(gen.sample(gen.net, lq, ["a"], [seed])[0], many[seed], atol=1e-5)
    assert (many[0] - many[1]).abs().mean() > 0.01
    assert not torch.equal(gen.noise(lq, ["a"], [0]), gen.noise(lq, ["b"], [0]))


@pytest.mark.parametrize("prediction", flow.PREDICTIONS)
def test_training_learns_what_the_base_lacks(prediction):
    """One image's residual by heart: samples come near it."""
    torch.manual_seed(0)
    gen, lq = flow.FlowSR(**SMALL, prediction=prediction, steps=8), torch.rand(1, 3, 4, 4)
    hr = (gen.enlarged(lq) + 0.2 * torch.randn(1, 3, 16, 16)).clamp(0, 1)
    gen.sigma_r = 0.2
    opt = torch.optim.AdamW(gen.net.parameters(), 3e-3)
    x0 = gen.encode(hr, lq).expand(16, -1, -1, -1)
    for _ in range(150):
        t, eps = torch.rand(16), torch.randn_like(x0)
        xt, target = gen.noised(x0, eps, t)
        loss = (gen.predict(gen.net, xt, t, lq.expand(16, -1, -1, -1)) - target).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    error = (gen.sample(gen.net, lq, ["a"], [0]) - hr).square().mean()
    assert error < 0.25 * (gen.enlarged(lq).clamp(0, 1) - hr).square().mean()


def test_a_network_as_base_is_kept_beside_the_weights(tmp_path):
    torch.manual_seed(0)
    base = archs.create("compact-small")
    gen, lq = flow.FlowSR(**SMALL, base=base, steps=2), torch.rand(1, 3, 8, 8)
    assert gen.condition(lq).shape == (1, 51, 8, 8)
    gen.sigma_r = 0.1
    gen.save(tmp_path / "weights", gen.net.state_dict(), {k: v + 0.01 for k, v in gen.net.state_dict().items()})
    again = flow.load_flow(tmp_path)
    # EMA first
    assert torch.equal(again.net.state_dict()["last.bias"], gen.net.last.bias + 0.01) and again.sigma_r == 0.1
    assert torch.allclose(again.enlarged(lq), base(lq), atol=1e-6)
    assert flow.load_flow(tmp_path, steps=5, tau=None).steps == 5
    runs.save_weights(tmp_path / "weights" / "base.pth", archs.create("compact-small").state_dict())
    with pytest.raises(runs.UserError, match="base.pth: other weights"):
        flow.load_flow(tmp_path)
    (tmp_path / "weights" / "base.pth").unlink()
    with pytest.raises(runs.UserError, match="base.pth: missing"):
        flow.load_flow(tmp_path)


def test_the_base_is_not_trained():
    base = archs.create("compact-small")
    gen = flow.FlowSR(**SMALL, base=base)
    assert not any(p.requires_grad for p in base.parameters())
    assert not gen.enlarged(torch.rand(1, 3, 8, 8)).requires_grad


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="choose from flow, epsilon, v"):
        flow.FlowSR(**SMALL, prediction="x0")


def test_pixel_unshuffle_puts_every_pixel_on_the_lr_grid():
    gen = flow.FlowSR(**SMALL)
    hr, lq = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 4, 4)
    back = gen.enlarged(lq) + gen.sigma_r * F.pixel_shuffle(gen.encode(hr, lq), 4)
    assert torch.allclose(back, hr, atol=1e-6)
