"""The embedded NR-IQA model: its weights, gradient and order of degradations on photographs, and its training."""
import hashlib
import json
import math
import time

import numpy as np
import pytest
import torch
from conftest import REPO

from images import save_image
from rewards import train_ranker
from rewards.ranker import RANKER_WEIGHTS, Ranker, load_ranker

KODAK = REPO.parent / "shared" / "data" / "images" / "hr_kodak24"


@pytest.fixture(scope="module")
def ranker():
    return load_ranker().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def photos():
    return train_ranker.training_photos()


@pytest.fixture(scope="module")
def astronaut(photos):
    """Reduced x2, as the clean class is. (1, 3, 256, 256)"""
    return torch.nn.functional.interpolate(photos[0], scale_factor=0.5, mode="area")


@pytest.mark.fast
def test_weights_are_a_plain_small_state_dict_that_fits_strictly():
    assert RANKER_WEIGHTS.stat().st_size < 1e6
    state = torch.load(RANKER_WEIGHTS, map_location="cpu", weights_only=True)
    Ranker().load_state_dict(state)
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in state.values())
    assert 20_000 < sum(p.numel() for p in Ranker().parameters()) < 250_000


@pytest.mark.fast
def test_scores_are_repeatable_and_hardly_depend_on_the_batch(ranker):
    x = torch.rand(11, 3, 96, 97, generator=torch.Generator().manual_seed(0))
    together = ranker(x)
    assert together.shape == (11,) and torch.equal(together, ranker(x))
    alone = torch.cat([ranker(one[None]) for one in x])
    assert torch.allclose(together, alone, atol=1e-2)


@pytest.mark.fast
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (96, 131), (257, 512)])
def test_any_size_from_32_pixels(ranker, size):
    assert ranker(torch.full((2, 3, *size), 0.4)).isfinite().all()


@pytest.mark.fast
@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 31, 64)])
def test_other_shapes_are_refused(ranker, shape):
    with pytest.raises(ValueError, match="ranker wants"):
        ranker(torch.zeros(shape))


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["natural", "random", "black", "grey", "white"])
def test_the_gradient_is_finite_and_not_zero(ranker, astronaut, kind):
    flat = {"black": 0.0, "grey": 0.5, "white": 1.0}
    x = astronaut if kind == "natural" else torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    x = torch.full((1, 3, 96, 96), flat[kind]) if kind in flat else x
    x = x.clone().requires_grad_()
    ranker(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.norm() > 1e-2


def test_the_gradient_is_the_slope_of_the_score(ranker, astronaut):
    x = astronaut[..., :64, :64].double().requires_grad_()
    net = load_ranker().double().eval()
    score = net(x)
    score.sum().backward()
    step = 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        assert (net(x + step) - net(x - step)).item() / 2 == pytest.approx((x.grad * step).sum().item(), rel=1e-3)


@pytest.mark.fast
def test_quality_is_80_for_the_clean_image_and_falls_with_every_family(astronaut):
    x = astronaut[..., :128, :128]
    assert train_ranker.quality(x, x).item() == pytest.approx(80, abs=0.2)
    u = np.array([0.2, 0.6, 1.0])
    for name in train_ranker.FAMILIES:
        style = train_ranker.draw_style(name, np.random.default_rng(0), 128, 128)
        q = train_ranker.quality(x, train_ranker.apply(x.repeat(3, 1, 1, 1), name, u, style))
        assert 80 > q[0] > q[1] > q[2], name


@pytest.mark.fast
def test_ranking_loss_by_hand():
    # one pair, wanted 20 points apart: p = sigmoid(0.15 * 20) = 0.952574; no difference in score costs ln 2 - H(p)
    p = 1 / (1 + math.exp(-3))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    loss = train_ranker.ranking_loss(torch.tensor([[7.0, 7.0]]), torch.tensor([[60.0, 40.0]]))
    assert loss.item() == pytest.approx(math.log(2) - entropy, rel=1e-5)
    target = torch.tensor([[80.0, 62.0, 31.0], [70.0, 69.0, 20.0]])
    # only differences count
    assert train_ranker.ranking_loss(target + 5, target).item() == pytest.approx(0, abs=1e-6)
    assert train_ranker.ranking_loss(-target, target).item() > 0.5


@pytest.mark.fast
def test_chains_start_clean_and_known_orders_fall_strictly(photos):
    falling = 0
    for seed in range(12):
        x, target = train_ranker.make_chain(photos, np.random.default_rng(seed), 80)
        assert x.shape == (train_ranker.CHAIN, 3, 80, 80) and target.shape == (train_ranker.CHAIN,)
        assert 0 <= x.min() and x.max() <= 1 and torch.equal((x * 255).round() / 255, x)
        falling += bool((target.diff() < 0).all())
    # half of the chains are of one family
    assert falling >= 5
    a, b = (train_ranker.make_batch(photos, 3, 4, 1) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("family", train_ranker.FAMILIES)
def test_orders_the_severities_of_each_family_on_photographs(ranker, photos, family):
    from scipy.stats import spearmanr
    rho, u = [], np.append(np.nan, np.linspace(0, 1, 7))
    # training photos: a smoke test; the test on Kodak24 below is the real one
    for n in (0, 1, 2, 4):
        photo = torch.nn.functional.interpolate(photos[n], scale_factor=0.5, mode="area")[..., 10:138, 15:143]
        style = train_ranker.draw_style(family, np.random.default_rng(n), 128, 128)
        x = train_ranker.apply(photo.repeat(8, 1, 1, 1), family, u, style)
        rho.append(spearmanr(ranker((x * 255).round() / 255).numpy(), -np.arange(8)).statistic)
    assert np.mean(rho) > 0.9, rho


def test_the_scale_is_musiqs(ranker, photos):
    rng = np.random.default_rng(99)
    clean = torch.cat([train_ranker.clean_crop(photos, rng, 128) for _ in range(16)])
    assert 70 < ranker(clean).median() < 90
    worst = [train_ranker.apply(clean[:8], name, np.ones(8), train_ranker.draw_style(name, rng, 128, 128))
             for name in train_ranker.FAMILIES]
    assert 5 < ranker(torch.cat(worst)).median() < 35


def test_a_good_restoration_beats_the_photo_and_halos_and_grids_lose(ranker, photos):
    rng, wins = np.random.default_rng(7), []
    for _ in range(16):
        clean = train_ranker.clean_crop(photos, rng, 128)
        photo = train_ranker.as_photographed(clean, rng)
        good = clean + 0.25 * (photo - clean)
        halo = train_ranker.apply(good, "halo", np.array([0.8]), 1.5)
        grid = train_ranker.apply(good, "grid", np.array([0.6]), train_ranker.pattern(rng, 128, 128))
        s = ranker(torch.cat([good, photo, halo, grid]))
        wins.append((s[:1] > s[1:]).tolist())
    assert (np.mean(wins, 0) >= 0.8).all(), np.mean(wins, 0)


@pytest.mark.skipif(not KODAK.is_dir(), reason="needs ../shared/data: photographs that no training saw")
def test_orders_the_severities_on_photographs_it_has_not_seen(tmp_path):
    for path in sorted(KODAK.glob("*.png"))[::4]:
        (tmp_path / path.name).symlink_to(path)
    flags = ["--threads", "1", "--evaluate", str(tmp_path), "--crops", "96", "128", "192", "256",
             "--out-json", str(tmp_path / "r.json")]
    train_ranker.main(train_ranker.parse_args(flags))
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["photos"] == 5 and result["levels"] == 8
    means = {name: row["mean"] for name, row in result["families"].items()}
    # a regression guard on a quarter of the photographs; all of them are in results/ranker.json
    assert len(means) == len(train_ranker.FAMILIES) + len(train_ranker.MIXES) and min(means.values()) > 0.9, means


def test_training_writes_a_loadable_file_twice_the_same_and_leaves_the_committed_one(tmp_path, script):
    committed = hashlib.sha256(RANKER_WEIGHTS.read_bytes()).hexdigest()
    flags = ["--steps", "2", "--chains", "1", "--threads", "1", "--out"]
    script("rewards.train_ranker", *flags, "a.pth", cwd=tmp_path)
    train_ranker.main(train_ranker.parse_args([*flags, str(tmp_path / "b.pth")]))
    load_ranker(tmp_path / "a.pth")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "b.pth"]
    assert hashlib.sha256(RANKER_WEIGHTS.read_bytes()).hexdigest() == committed


@pytest.mark.fast
def test_help_answers_at_once(script):
    start = time.perf_counter()
    text = script("rewards.train_ranker", "--help").stdout
    assert "--evaluate" in text and "(default: 2000)" in text
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("flags, message", [
    (["--evaluate", "nowhere"], "no such folder"), (["--evaluate", "."], "no images"),
    (["--out", "/proc/x.pth"], "--out /proc cannot be written"), (["--out", "."], "name a file"),
    (["--evaluate", "cut"], "cut.png: damaged image"), (["--crops", "16"], "at least 32"),
    (["--steps", "0"], "at least 1")])
def test_bad_input_is_one_line_and_non_zero(tmp_path, script, flags, message):
    (tmp_path / "cut").mkdir()
    save_image(tmp_path / "cut" / "cut.png", torch.rand(3, 64, 64))
    whole = (tmp_path / "cut" / "cut.png").read_bytes()
    (tmp_path / "cut" / "cut.png").write_bytes(whole[:9000])
    done = script("rewards.train_ranker", *flags, cwd=tmp_path, check=False)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
