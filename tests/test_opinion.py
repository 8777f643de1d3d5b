"""Rewards trained on opinions: losses against brute force, files, crops, hardening, attacks on known models."""
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import REPO
from scipy import stats
from torch import nn

import degradations
import iqa
import metrics
import runs
from images import save_image
from report import opinions
from rewards import attack, harden, opinion, train_opinion
from rewards.ranker import load_ranker

SHARED = REPO.parent / "shared"


class Linear(nn.Module):
    """score = mean over pixels of w x: everything about it is known."""

    def __init__(self, seed=0, side=32):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, side, side, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x):
        return (x * self.w).sum((1, 2, 3))


def noisy(levels, side=64):
    """Grey images with noise of these standard deviations, uint8."""
    rng = np.random.default_rng(0)
    return [torch.from_numpy((128 + rng.normal(0, level, (3, side, side))).clip(0, 255).astype(np.uint8))
            for level in levels]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A file with torchvision's keys: a random mobilenet_v2 whose batch norms have statistics; and the network."""
    from torchvision.models import mobilenet_v2
    torch.manual_seed(0)
    net = mobilenet_v2(weights=None).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.2, 0.6)
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, 0.0, 0.1)
    file = tmp_path_factory.mktemp("backbone") / "mobilenet_v2.pth"
    torch.save(net.state_dict(), file)
    return file, net


@pytest.fixture(scope="module")
def reward_file(imagenet, tmp_path_factory):
    torch.manual_seed(1)
    net = opinion.ARCHITECTURES["mobilenet_v2"]()
    net.backbone.load_imagenet(imagenet[0])
    nn.init.normal_(net.linear.weight, 0, 0.01)
    # a name with an equals sign in the path
    file = tmp_path_factory.mktemp("seed=1") / "people.pth"
    opinion.save(file, net.eval(), {"arch": "mobilenet_v2", "seed": 1})
    return file, net


# Losses

@pytest.mark.fast
def test_choice_likelihood_and_its_gradient_equal_brute_force_and_an_independent_implementation():
    rng = np.random.default_rng(0)
    score = torch.from_numpy(rng.normal(50, 15, (5, 4))).requires_grad_()
    selected = torch.tensor([0, 3, 2, 1, 1])
    with_gaps = score.masked_fill(torch.tensor([[0, 0, 0, 0]] * 4 + [[0, 0, 1, 1]], dtype=bool), math.nan)
    loss = train_opinion.choice_loss(with_gaps, selected)
    loss.backward()
    utility = with_gaps.detach().numpy() / train_opinion.TEMPERATURE
    brute = 1.0
    for row, k in zip(utility, selected.tolist()):
        brute *= math.exp(row[k]) / sum(math.exp(u) for u in row if not math.isnan(u))
    assert loss.item() == pytest.approx(-math.log(brute) / 5, rel=1e-9)
    likelihood, gradient = opinions.choice_likelihood(utility, selected.numpy())
    assert loss.item() == pytest.approx(-likelihood.mean(), rel=1e-9)
    np.testing.assert_allclose(score.grad.numpy(), -gradient / 5 / train_opinion.TEMPERATURE, atol=1e-12)
    assert (score.grad[4, 2:] == 0).all()


@pytest.mark.fast
def test_two_candidates_ten_points_apart_are_chosen_by_73_percent():
    loss = train_opinion.choice_loss(torch.tensor([[60.0, 50.0]]), torch.tensor([0]))
    assert math.exp(-loss.item()) == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-6)


@pytest.mark.fast
def test_fidelity_loss_equals_a_loop_over_pairs_with_scipys_normal_distribution():
    rng = np.random.default_rng(0)
    score, mos, std = rng.uniform(20, 80, 6), rng.uniform(20, 80, 6), rng.uniform(10, 25, 6)
    terms = []
    for i, j in itertools.combinations(range(6), 2):
        p, q = (stats.norm.cdf((v[i] - v[j]) / math.hypot(std[i], std[j])) for v in (mos, score))
        terms.append(1 - math.sqrt(p * q) - math.sqrt((1 - p) * (1 - q)))
    loss = train_opinion.fidelity_loss(*map(torch.from_numpy, (score, mos, std)))
    assert loss.item() == pytest.approx(np.mean(terms), abs=1e-5)
    # opinions without any doubt: no gradient of a root of 0
    sure = torch.tensor([0.0, 100.0, 50.0], requires_grad=True)
    train_opinion.fidelity_loss(sure, torch.tensor([100.0, 0.0, 50.0]), torch.zeros(3)).backward()
    assert sure.grad.isfinite().all()


@pytest.mark.fast
def test_opinions_without_std_leave_the_fidelity_loss_to_the_others():
    rng = np.random.default_rng(1)
    mos, std = (torch.from_numpy(rng.uniform(10, 80, 6)) for _ in range(2))
    score = torch.from_numpy(rng.uniform(20, 80, 6)).requires_grad_()
    known, some = torch.tensor([0, 2, 5]), torch.full((6,), math.nan, dtype=torch.double)
    some[known] = std[known]
    loss = train_opinion.mos_loss(score, mos, some)
    loss.backward()
    smooth = torch.nn.functional.smooth_l1_loss(score / train_opinion.UNIT, mos / train_opinion.UNIT)
    pairs = train_opinion.fidelity_loss(score[known], mos[known], std[known])
    assert loss.item() == pytest.approx((smooth + train_opinion.PAIRS * pairs).item()) and score.grad.isfinite().all()
    # one alone makes no pair
    some[known[1:]] = math.nan
    assert torch.equal(train_opinion.mos_loss(score, mos, some), train_opinion.mos_loss(score, mos, None))


@pytest.mark.fast
@pytest.mark.parametrize("std", [None, torch.full((8,), 20.0)])
def test_mos_loss_is_least_for_the_opinions_themselves_and_grows_with_a_wrong_order(std):
    mos = torch.linspace(20, 80, 8)
    right, near, wrong = (train_opinion.mos_loss(score, mos, std) for score in (mos, mos + 3, mos.flip(0)))
    assert right.item() == pytest.approx(0, abs=1e-4) and right < near < wrong


@pytest.mark.fast
def test_the_start_is_ridge_regression_with_the_penalty_of_least_generalised_cross_validation():
    rng = np.random.default_rng(0)
    net = opinion.ARCHITECTURES["mobilenet_v2"]()
    count = net.centre.numel()
    features = rng.normal(3, 2, (40, count))
    mos = 50 + 4 * features[:, :5].sum(1) / 2 + rng.normal(0, 3, 40)
    net.start_linear(torch.from_numpy(features).float(), torch.from_numpy(mos).float())
    z = (features - features.mean(0)) / features.std(0, ddof=1)
    target, results = mos - mos.mean(), []
    for penalty in np.logspace(-3, 3, 25) * count:
        hat = z @ z.T @ np.linalg.inv(z @ z.T + penalty * np.eye(40))
        left = target - hat @ target
        results.append((40 * (left @ left) / np.trace(np.eye(40) - hat) ** 2, hat @ target + mos.mean()))
    best = min(results, key=lambda result: result[0])[1]
    scores = net.shift + net.stretch * net.linear((torch.from_numpy(features).float() - net.centre) / net.spread)[:, 0]
    np.testing.assert_allclose(scores.detach().numpy(), best, atol=0.02)


# The network and its file

@pytest.mark.fast
def test_the_folded_network_computes_what_torchvisions_does(imagenet):
    file, reference = imagenet
    net = opinion.MobileNetV2().eval()
    net.load_imagenet(file)
    x, expected = torch.rand(2, 3, 70, 64, generator=torch.Generator().manual_seed(0)), []
    with torch.no_grad():
        maps = net(x)
        y = x
        for k, layer in enumerate(reference.features):
            y = layer(y)
            if k in net.TAPS:
                expected.append(y)
    assert [m.shape[1] for m in maps] == list(net.TAPS.values())
    for ours, theirs in zip(maps, expected):
        assert theirs.std() > 1e-3 and torch.allclose(ours, theirs, atol=1e-4, rtol=1e-3)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@pytest.mark.fast
def test_pooled_features_are_means_and_deviations_and_any_size_is_taken(reward_file):
    net = reward_file[1]
    x = torch.rand(2, 3, 48, 65, generator=torch.Generator().manual_seed(0))
    maps = net.backbone((x - net.mean) / net.std)
    expected = torch.cat([torch.cat([m.mean((2, 3)), m.std((2, 3), correction=0)], 1) for m in maps], 1)
    assert torch.allclose(net.features(x), expected, atol=2e-3)
    assert net(torch.rand(1, 3, 7, 40)).isfinite().all() and net(torch.rand(1, 3, 1, 1)).isfinite().all()
    with pytest.raises(ValueError, match="wants"):
        net(torch.rand(1, 1, 40, 40))


@pytest.mark.fast
def test_large_images_have_the_mean_score_of_tiles_that_cover_them(reward_file):
    net = reward_file[1]
    x = torch.rand(1, 3, 400, 300, generator=torch.Generator().manual_seed(0))
    expected = (net(x[:, :, :256]) + net(x[:, :, 72:328]) + net(x[:, :, 144:])) / 3
    assert torch.allclose(net(x), expected, atol=1e-3)
    seen = torch.zeros(1, 1, 1020, 676)
    for tile in opinion.tiles(seen):
        assert tile.shape == (1, 1, 256, 256)
        tile += 1
    assert seen.min() == 1 and seen[..., 300:700, 300:400].min() >= 4 and len(opinion.tiles(seen)) == 35
    assert len(opinion.tiles(torch.zeros(1, 3, 383, 200))) == 1


@pytest.mark.fast
def test_a_reward_file_is_a_reward_like_any_other(reward_file):
    file, net = reward_file
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    reward = iqa.create_reward([f"{file}=0.5", "ranker"], need_gradient=True)
    each = reward.each(x)
    assert list(each) == ["people", "ranker"]
    assert torch.allclose(each["people"], net(x), atol=1e-4)
    assert torch.allclose(reward(x), 0.5 * each["people"] + each["ranker"], atol=1e-4)
    assert not any(p.requires_grad for p in reward.parameters())
    assert runs.split_reward(str(file)) == (str(file), "") and runs.split_reward("musiq=0.1") == ("musiq", "0.1")
    assert runs.split_reward("a=b/R.PTH") == ("a=b/R.PTH", "")
    assert [runs.short_reward(word) for word in (f"{file}=2", "a.b:build", "musiq=1")] == ["people", "a.b", "musiq"]
    # two files of one name, and one twice
    other = file.with_name("other")
    other.mkdir()
    (other / "people.pth").write_bytes(file.read_bytes())
    with pytest.raises(runs.UserError, match="two rewards are called people"):
        iqa.create_reward([str(file), str(other / "people.pth")])


@pytest.mark.fast
def test_other_files_are_refused_in_one_line(reward_file, tmp_path):
    content = torch.load(reward_file[0], weights_only=True)
    params = content["params"]

    def refused(content):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(runs.UserError) as error:
            iqa.create_reward([str(tmp_path / "x.pth")])
        assert str(error.value).startswith(str(tmp_path / "x.pth")) and "\n" not in str(error.value)
        return str(error.value)
    assert "not a reward file" in refused(params)
    assert "not a reward file" in refused(content | {"reward": {"arch": "other"}})
    assert "is missing" in refused(content | {"params": {k: v for k, v in params.items() if k != "linear.bias"}})
    assert "not expected" in refused(content | {"params": params | {"more": torch.zeros(1)}})
    assert "pickled" in refused(content | {"reward": {"arch": "mobilenet_v2", "code": print}})
    with pytest.raises(runs.UserError, match="no such"):
        iqa.create_reward([str(tmp_path / "none.pth")])


def test_converted_8_bit_weights_give_the_features_of_their_own_network(tmp_path):
    file = SHARED / "data" / "weights" / "backbones" / "mobilenet_v2_1.0_224_uint8.pth"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    import importlib.util

    from prepare import mobilenet_v2 as convert
    spec = importlib.util.spec_from_file_location("mobilenet_v2_reference", SHARED / "tools" / "mobilenet_v2.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    torch.save(convert.convert(torch.load(file, weights_only=True)), tmp_path / "backbone.pth")
    net, reference = opinion.DeepRegressor(opinion.MobileNetV2()).eval(), tool.load(file)
    net.backbone.load_imagenet(tmp_path / "backbone.pth")
    from skimage import data
    x = torch.from_numpy(data.astronaut()[:300, :300].copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        # the lattices of TensorFlow's padding begin 1, 3, 7 pixels later
        theirs = reference.features(2 * x[..., 1:257, 1:257] - 1, taps=(1, 3, 6))[1]
        ours = net.backbone((x[..., 32:256, 32:256] - net.mean) / net.std)
    for k, stride in enumerate((4, 8, 16)):
        start = (32 - 1 - (stride - 1)) // stride
        inner = ours[k][..., 3:-3, 3:-3]
        n = inner.shape[-1]
        errors = [(theirs[k][..., i:i + n, i:i + n] - inner).abs().mean() / inner.abs().mean()
                  for i in range(start, start + 6) if i + n <= theirs[k].shape[-1]]
        assert min(errors) < 1e-4


# Crops

@pytest.mark.fast
def test_crops_are_pieces_of_the_image_or_of_its_mirror_image_and_alike_for_a_scene():
    image = torch.arange(3 * 20 * 24).view(3, 20, 24).remainder(251).to(torch.uint8)
    rng, mirrored = np.random.default_rng(0), set()
    for crop in train_opinion.random_crops([image] * 12, 16, rng):
        pieces = {flip: [view[:, t:t + 16, k:k + 16] for t in range(5) for k in range(9)]
                  for flip, view in ((False, image), (True, image.flip(2)))}
        fits = {flip for flip, parts in pieces.items() for piece in parts if torch.equal(crop * 255, piece.float())}
        assert fits
        mirrored |= fits
    assert mirrored == {True, False}
    a, b = train_opinion.same_crops([image, 250 - image.clamp(max=250)], 16, np.random.default_rng(3))
    assert torch.allclose(a * 255 + b * 255, torch.tensor(250.0))


# Training

def test_what_is_learned_from_opinions_and_choices_has_the_right_sign_and_repeats_bitwise():
    levels = torch.linspace(2, 40, 16)
    images = noisy(levels.tolist())
    mos = {"images": images, "mos": 90 - 2 * levels, "std": torch.full((16,), 15.0)}
    # the noisier one of each pair is chosen
    choices = {"images": [[images[k], images[k + 8]] for k in range(8)], "selected": torch.ones(8, dtype=torch.long)}
    test = noisy([5, 15, 30])

    def trained(**kwargs):
        torch.manual_seed(0)
        net = opinion.ARCHITECTURES["ranker"]()
        train_opinion.fit(net, lr=1e-2, crop=48, batch_size=8, **kwargs)
        return net, train_opinion.score_whole(net, test)
    net, scores = trained(mos=mos, epochs=12)
    assert (np.diff(scores) < -5).all()
    again, _ = trained(mos=mos, epochs=12)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))
    _, scores = trained(choices=choices, epochs=12)
    assert (np.diff(scores) > 1).all()


def test_a_plain_training_leaves_the_first_layers_and_a_hardened_one_keeps_the_scale(reward_file, monkeypatch):
    monkeypatch.setattr(harden, "SIDE", 48)
    mos = {"images": noisy(range(4, 48, 4), 100), "mos": torch.linspace(10, 90, 11), "std": None}
    before = opinion.load(reward_file[0])[0].state_dict()

    def changed(**kwargs):
        net = opinion.load(reward_file[0])[0]
        losses = train_opinion.fit(net, mos, epochs=1, crop=64, batch_size=6, **kwargs)
        return losses, {key for key, value in net.state_dict().items()
                        if key.startswith("backbone") and not torch.equal(before[key], value)}
    losses, names = changed()
    assert set(losses) == {"mos"} and names and not any(name.startswith("backbone.layers.4.") for name in names)
    losses, names = changed(teacher=opinion.load(reward_file[0])[0], gradient_norm=0.1)
    assert set(losses) == {"mos", "attack", "gradient", "scale", "negatives"}
    assert any(name.startswith("backbone.layers.0") for name in names)
    assert all(math.isfinite(value) and value >= 0 for value in losses.values())


def test_the_command_trains_judges_and_names_what_is_wrong(script, tmp_path):
    for k, image in enumerate(noisy(np.linspace(2, 40, 30), 100)):
        save_image(tmp_path / "images" / f"{k:02d}.png", image)
    rows = [f"{k:02d}.png,{100 - 3 * k}" for k in range(30)]
    (tmp_path / "mos.csv").write_text("image,mos\n" + "\n".join([*rows, "gone.png,50", "00.png,3", "01.png,x"]) + "\n")
    flags = ["--arch", "ranker", "--mos", tmp_path / "mos.csv", "--mos-images", tmp_path / "images", "--threads", 1]
    done = script("rewards.train_opinion", *flags, "--crop", 64, "--epochs", 2, "--test", 0.2, "--mos-range", 100, 0,
                  "--out", tmp_path / "noise.pth")
    assert "1 opinions left out" in done.stdout and "first: gone.png" in done.stdout
    record = torch.load(tmp_path / "noise.pth", weights_only=True)["reward"]
    assert record["arch"] == "ranker" and record["mos"]["images"] == 24 and record["test"]["images"] == 6
    assert set(record["test"]["crops"]) == {"96"} and abs(record["test"]["whole"]["srcc"]) <= 1
    assert {"commit", "torch", "seed", "command"} <= set(record)
    # before the first step it is the embedded ranker
    train_opinion.main(train_opinion.parse_args(
        [*map(str, flags), "--crop", "64", "--epochs", "0", "--out", str(tmp_path / "begun.pth")]))
    begun, own = opinion.load(tmp_path / "begun.pth")[0], load_ranker()
    assert all(torch.equal(value, begun.state_dict()[key]) for key, value in own.state_dict().items())
    # or random weights, of the seed
    train_opinion.main(train_opinion.parse_args(
        [*map(str, flags), "--init", "random", "--seed", "3", "--crop", "64", "--epochs", "0",
         "--out", str(tmp_path / "random.pth")]))
    begun, record = opinion.load(tmp_path / "random.pth")
    assert record["init"] == "random"
    torch.manual_seed(3)
    assert all(torch.equal(value, begun.state_dict()[key])
               for key, value in opinion.ARCHITECTURES["ranker"]().state_dict().items())
    # a deep one still starts with ridge regression
    train_opinion.main(train_opinion.parse_args(
        ["--arch", "mobilenet_v2", "--init", "random", *map(str, flags[2:]), "--crop", "64", "--epochs", "0",
         "--out", str(tmp_path / "deep.pth")]))
    assert opinion.load(tmp_path / "deep.pth")[0].linear.weight.abs().max() > 0
    # from a file, and from choices alone
    for method, level in (("clean", 3), ("noisy", 30)):
        for k, image in enumerate(noisy([level, level + 3], 80)):
            save_image(tmp_path / "study" / method / f"{k}.png", image)
    (tmp_path / "choices.csv").write_text(
        "observer,scene,candidates,selected\n1,0,clean|noisy,clean\n1,1,noisy|clean,clean\n2,1,noisy|clean,none\n")
    done = script("rewards.train_opinion", "--init", tmp_path / "noise.pth", "--choices", tmp_path / "choices.csv",
                  "--choice-images", tmp_path / "study", "--crop", 64, "--epochs", 1, "--out", tmp_path / "judge.pth")
    assert "1 choices left out" in done.stdout
    judge, record = opinion.load(tmp_path / "judge.pth")
    assert record["lr"] == train_opinion.RATES["ranker"] and record["init"]["mos"]["images"] == 24
    assert any(not torch.equal(a, b) for a, b in zip(
        judge.parameters(), opinion.load(tmp_path / "noise.pth")[0].parameters()))
    for words, message in ((["--crop", 128], "less than a crop"), (["--harden"], "--init"),
                           (["--harden", "--init", "random"], "--harden keeps the scale of a trained model"),
                           (["--backbone", "x.pth", "--init", "random"], "--backbone is where a network"),
                           (["--mos-images", tmp_path / "none"], "none")):
        failed = script("rewards.train_opinion", *flags, *words, "--out", tmp_path / "x.pth", check=False)
        assert failed.returncode == 2 and message in failed.stderr and "Traceback" not in failed.stderr
        assert not (tmp_path / "x.pth").exists()


@pytest.mark.fast
def test_bad_opinions_are_refused_left_out_or_named(tmp_path, capsys):
    for k, image in enumerate(noisy(np.linspace(2, 40, 24), 40)):
        save_image(tmp_path / "images" / f"{k:02d}.png", image)

    def read(values, ends=(0, 100), std=None):
        rows = [f"{k:02d}.png,{value}" + (f",{std[k]}" if std else "") for k, value in enumerate(values)]
        (tmp_path / "mos.csv").write_text("image,mos" + ",std" * bool(std) + "\n" + "\n".join(rows) + "\n")
        found = train_opinion.read_mos(tmp_path / "mos.csv", tmp_path / "images", 32, ends=ends)
        return found, capsys.readouterr().out
    five = np.linspace(1, 5, 24)
    found, printed = read(five)
    assert "WARNING: its opinions lie between 1 and 5, 4 % of --mos-range 0 100" in printed
    found, printed = read(five, (1, 5))
    assert "WARNING" not in printed and found["mos"].tolist() == pytest.approx(np.linspace(0, 100, 24))
    assert read(five, (5, 1))[0]["mos"][0] == 100
    with pytest.raises(runs.UserError, match=r"line 14 \(12.png\) has 5.5, outside --mos-range 1 5: give the ends"):
        read([*five[:12], 5.5, *five[13:]], (1, 5))
    # one without std
    found, printed = read(five * 20, std=["", *[3] * 23])
    assert found["std"][0].isnan() and (found["std"][1:] == 3).all()
    assert "1 of 24 opinions have no std: pairs with them have no fidelity loss" in printed
    assert read(five * 20, std=[""] * 24)[0]["std"] is None
    # one truncated image
    file = tmp_path / "images" / "03.png"
    file.write_bytes(file.read_bytes()[:2000])
    found, printed = read(five * 20, std=range(1, 25))
    assert "1 opinions left out: an image cannot be read (first: " in printed and "03.png: damaged image" in printed
    assert len(found["images"]) == 23 and "03.png" not in found["names"] and found["std"].tolist()[2:4] == [3, 5]
    for k in range(10):
        (tmp_path / "images" / f"{k:02d}.png").write_bytes(b"none")
    with pytest.raises(runs.UserError, match="14 usable opinions are too few; 10 opinions left out: an image cannot"):
        read(five * 20)


@pytest.mark.fast
def test_choices_with_a_truncated_image_are_left_out(tmp_path, capsys):
    for method, level in (("A", 3), ("B", 30)):
        for k, image in enumerate(noisy([level, level + 3], 40)):
            save_image(tmp_path / "study" / method / f"{k}.png", image)
    (tmp_path / "choices.csv").write_text("observer,scene,candidates,selected\n1,0,A|B,A\n1,1,B|A,A\n")
    for scene, left in ((0, 1), (1, 0)):
        file = tmp_path / "study" / "A" / f"{scene}.png"
        file.write_bytes(file.read_bytes()[:1000])
        if left:
            found = train_opinion.read_choices(tmp_path / "choices.csv", tmp_path / "study", 32)
            assert len(found["images"]) == 1 and found["selected"].tolist() == [1]
            printed = capsys.readouterr().out
            assert "1 images left out: an image cannot be read" in printed and "1 choices left out" in printed
    with pytest.raises(runs.UserError, match="no usable choice; 2 images left out"):
        train_opinion.read_choices(tmp_path / "choices.csv", tmp_path / "study", 32)


@pytest.mark.parametrize("name", ["ranker2", "ranker3"])
def test_the_embedded_models_of_opinions_say_what_made_them_and_prefer_photographs(photographs, name):
    net, record = opinion.load(runs.REPO / "rewards" / f"{name}.pth")
    assert record["arch"] == "ranker" and record["mos"]["images"] == 1162 and record["commit"]
    assert any(word.endswith(f"rewards/{name}.pth") for word in record["command"])
    x = torch.stack([image[:, :128, :128] for image in photographs.values()])
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    photos, small = net(x), net(harden.bicubic(x))
    assert (photos > small + 20).all() and photos.max() < 100


# Hardening and attacks, on models of which everything is known

@pytest.mark.fast
def test_the_gradient_term_is_the_l1_norm_and_the_attack_term_its_gain():
    net = Linear()
    x = (0.3 + 0.4 * torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))).requires_grad_()
    score = net(x)
    score.retain_grad()
    # a loss that wants two scores lower and two higher
    (score * torch.tensor([1.0, 1.0, -1.0, -1.0])).sum().backward()
    found = harden.terms(net, None, 2.0, None, x, score, 1.0, 1.0, np.random.default_rng(0))
    # per grey level, in units of D = 2
    assert set(found) == {"gradient"}
    assert found["gradient"].item() == pytest.approx(net.w.abs().sum().item() / 255 / 2, rel=1e-3)


@pytest.mark.fast
def test_further_steps_of_the_attack_find_a_maximum_that_one_step_jumps_over():
    start, level = torch.full((2, 3, 8, 8), 0.5), torch.tensor([1.0, 2.0])
    limit = level.view(-1, 1, 1, 1) / 255

    def net(x):
        return -(x - start - 0.4 * limit).square().sum((1, 2, 3))
    one = harden.step(start, torch.ones_like(start), level)
    more = harden.ascend(net, one, start, level, harden.STEPS - 1, 0.5)
    assert (net(more) > net(one)).all() and ((more - start).abs() <= limit + 1e-6).all()


@pytest.mark.fast
def test_negatives_are_worse_by_more_at_higher_severity_and_bicubic_loses_detail():
    from skimage import data
    x = torch.from_numpy(data.astronaut()[:160, 180:340].copy()).permute(2, 0, 1)[None].float() / 255
    rows = []
    for seed in range(60):
        y, u = harden.negative(x, np.random.default_rng(seed))
        assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1
        assert torch.equal((y * 255).round() / 255, y)
        rows.append((u, (y - x).square().mean().sqrt().item() * 255))
    u, distance = np.array(rows).T
    assert distance.min() > 0.3 and stats.spearmanr(u, distance).statistic > 0.5
    with pytest.raises(runs.UserError, match="prefers bicubic images"):
        harden.unit(lambda z: -z.diff(dim=3).abs().mean((1, 2, 3)), [(x[0] * 255).byte()], 0, "cpu", draws=1)
    board = harden.checkerboard(8, 8, 2)[0, 0]
    assert board[0, 0] == 1 and (board[:, 1:] == -board[:, :-1]).all() and (board[1:] == -board[:-1]).all()

    def detail(z):
        return z.diff(dim=3).abs().mean()
    assert detail(harden.bicubic(x)) < 0.6 * detail(x)


@pytest.mark.fast
@pytest.mark.parametrize("level", [1, 2, 4])
def test_the_attack_finds_the_best_image_within_the_limit_of_a_linear_model(level):
    net = Linear()
    start = torch.full((2, 3, 32, 32), 100 / 255)
    found = attack.ascend(net, start, level, seed=0)
    assert torch.allclose(found * 255, 100 + level * net.w.sign().expand(2, -1, -1, -1), atol=1e-3)
    # never outside the limit or of [0, 1], also at its ends
    white = attack.ascend(net, torch.ones(1, 3, 32, 32), level, seed=0)
    assert white.max() <= 1 and (1 - white).max() * 255 <= level + 1e-3


@pytest.mark.fast
def test_the_attack_keeps_the_best_image_on_its_way():
    start = torch.full((2, 3, 32, 32), 100 / 255)
    # one likes 101 best, the other the start itself; only steps that become short end at the former
    liked = torch.tensor([101.0, 100.0]).view(2, 1, 1, 1)

    def score(x):
        return -(255 * x - liked).abs().mean((1, 2, 3))
    found = attack.ascend(score, start, 4, seed=0)
    assert torch.equal(found[1], start[1]) and torch.allclose(found[0] * 255, torch.tensor(101.0), atol=1e-3)
    long = [degradations.to_8bit(x)[0] for x in attack.climb(score, start, 4, 0, **attack.WAYS["long steps"])]
    assert all((image * 255 - 101).abs().mean() > 0.1 for image in long)


@pytest.mark.fast
def test_the_attack_is_no_worse_than_what_was_found_within_a_smaller_limit():
    start = torch.full((1, 3, 32, 32), 100 / 255)
    # a narrow peak at 101 grey levels, and a gradient that leads away from it
    def score(x):
        return ((255 * x - 101).abs() < 0.1).float().mean((1, 2, 3)) - x.mean((1, 2, 3))
    peak = torch.full_like(start, 101 / 255)
    assert torch.equal(attack.ascend(score, start, 4, 0, smaller=peak), peak)
    assert score(attack.ascend(score, start, 4, 0)) < score(peak)


def test_no_more_photographs_are_decoded_than_are_attacked(tmp_path, monkeypatch):
    for k, side in enumerate((40, 64, 70, 80)):
        save_image(tmp_path / f"{k}.png", torch.rand(3, side, side))
    read, load = [], attack.load_image
    monkeypatch.setattr(attack, "load_image", lambda path, **options: read.append(path.name) or load(path, **options))
    assert attack.read_photos(tmp_path, 2, 64).shape == (2, 3, 64, 64) and read == ["1.png", "2.png"]


def test_faults_add_high_frequencies_that_the_embedded_ranker_dislikes_and_sharpness_likes(tmp_path, capsys):
    photos = attack.read_photos(None, 3, 128)
    # away from black and white, so that nothing is clipped
    photos = degradations.to_8bit(0.3 + 0.4 * photos)
    found = attack.faults(photos, seed=0)
    changes = {name: 255 * (image - photos) for name, image in found.items()}
    assert changes["noise 3"].std().item() == pytest.approx(3, abs=0.1)
    assert changes["noise 10"].std().item() == pytest.approx(10, abs=0.3)
    board = changes["checkerboard 3"].round()
    assert set(board.unique().tolist()) == {-3, 3} and (board[..., 1:] == -board[..., :-1]).all()
    assert not torch.equal(changes["noise 3"][0], changes["noise 3"][1])
    assert torch.equal(found["unsharp 1"], metrics.unsharp(photos, 1)) and found.keys() >= {"unsharp 4", "ringing"}
    assert torch.equal(found["unsharp 4"], metrics.unsharp(photos, 4))
    # half severity of harden.ringing: (0.3 + 1.2 / 2) * 2
    kernel = torch.from_numpy(np.asarray(degradations.sinc_kernel(21, 1.5))).float().expand(3, 21, 21)
    low = degradations.blur(photos, kernel)
    ripples = low + 1.8 * (low - degradations.blur(low, kernel))
    assert torch.equal(found["ringing"], degradations.to_8bit(ripples.clamp(0, 1)))
    ranker, sharp = iqa.create_reward(["ranker"]), iqa.create_reward(["rewards.sharpness:build"])
    for name in ("noise 10", "unsharp 4", "checkerboard 3"):
        assert (sharp(found[name]) > sharp(photos)).all()
        assert (ranker(found[name]) < ranker(photos)).all()
    # in the table, by fault and photograph
    table = attack.measure({"r": ranker}, photos, [])
    assert set(table["r"]["faults"]) == set(found)
    assert table["r"]["faults"]["noise 3"] == pytest.approx((ranker(found["noise 3"]) - ranker(photos)).tolist())
    # without an attack
    attack.main(attack.parse_args(["--reward", "ranker", "rewards.sharpness:build", "--levels", "--count", "2",
                                   "--crop", "64", "--threads", "1", "--out-json", str(tmp_path / "faults.json")]))
    record = json.loads((tmp_path / "faults.json").read_text())["rewards"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "attacked" not in "".join(lines)
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    sharp = record["rewards.sharpness:build"]
    assert cells[2:] == [f"{np.mean(changes) / sharp['D']:+.2f}" for changes in sharp["faults"].values()]
    assert float(cells[3]) > 0 and record["ranker"]["gains"] == {}


def test_gains_are_the_judges_own_and_in_units_of_its_scale():
    class Sharpness(nn.Module):
        def forward(self, x):
            return x.diff(dim=3).abs().mean((1, 2, 3)) * 100

    class Smoothness(Sharpness):
        def forward(self, x):
            return -super().forward(x)
    photos = attack.read_photos(None, 3, 64)
    rewards = {name: iqa.Reward({name: model}, {name: 1.0})
               for name, model in (("sharp", Sharpness()), ("smooth", Smoothness()))}
    table = attack.measure(rewards, photos, [1, 4])
    rows = attack.in_units(table)
    assert table["sharp"]["D"] == pytest.approx(-table["smooth"]["D"], rel=1e-5) and table["sharp"]["D"] > 0
    own = rows["sharp", "sharp"]
    assert 0 < own["photo 1"] < own["photo 4"] and 0 < own["bicubic 1"] < own["bicubic 4"]
    # an attack on the opposite model lowers the score; a model that prefers bicubic images has no unit
    assert rows["smooth", "sharp"]["photo 1"] < 0 and math.isnan(own and rows["sharp", "smooth"]["photo 1"])
    gains = table["sharp"]["gains"]["photo"]["1"]["sharp"]
    assert own["photo 1"] == pytest.approx(np.mean(gains) / table["sharp"]["D"])
