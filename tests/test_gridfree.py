"""rewards.gridfree: the grid of an image is found, taken away, and has neither score nor gradient."""
import pytest
import torch

import iqa
import runs
from rewards import gridfree, opinion, train_ranker

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def photo():
    """(1, 3, 256, 256)"""
    return torch.nn.functional.interpolate(train_ranker.training_photos()[0], scale_factor=0.5, mode="area")


@pytest.fixture
def grid():
    grid = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)) / 255
    return grid - grid.mean((2, 3), keepdim=True)


def test_a_grid_is_found_and_taken_away_without_the_image(photo, grid):
    # sides that are no multiples of 4
    photo = photo[..., :201, :194]
    with_grid = photo + grid.repeat(1, 1, 51, 49)[..., :201, :194]
    before, after = gridfree.shared_grid(photo), gridfree.shared_grid(with_grid)
    # a photograph has a tenth of a grey level of its own
    assert before.square().mean().sqrt() < 0.2 / 255
    assert (after - before - grid).square().mean().sqrt() < 0.15 / 255
    change = gridfree.without_grid(with_grid) - gridfree.without_grid(photo)
    assert change.square().mean().sqrt() < 0.15 / 255


def test_of_a_flat_image_the_grid_is_all_that_is_left(grid):
    flat = 0.5 + grid.repeat(1, 1, 16, 16)
    torch.testing.assert_close(gridfree.shared_grid(flat), grid, atol=1e-6, rtol=0)
    torch.testing.assert_close(gridfree.without_grid(flat), torch.full_like(flat, 0.5), atol=1e-6, rtol=0)


def test_the_score_has_next_to_no_gradient_along_a_grid_and_is_that_of_the_plain_model_on_a_photograph(photo):
    free, plain = iqa.create_reward(["rewards.gridfree:build"]), opinion.load(runs.REPO / gridfree.MODEL)[0]
    grid = torch.zeros(1, 3, 4, 4)
    grid[..., 0, 0], grid[..., 2, 2] = 1, -1
    along = {}
    for name, model in (("free", free), ("plain", plain)):
        x = photo.clone().requires_grad_()
        model(x).sum().backward()
        along[name] = (x.grad * grid.repeat(1, 1, 64, 64)).sum().abs().item()
    # but for the reflected border
    assert along["free"] < 0.05 * along["plain"], along
    with torch.no_grad():
        assert abs(free(photo) - plain(photo)) < 1


def test_a_grid_that_the_plain_model_likes_is_worth_nothing(photo):
    free, plain = (iqa.create_reward([name]) for name in
                   ("rewards.gridfree:build", str(runs.REPO / gridfree.MODEL)))
    grid = torch.zeros(1, 3, 4, 4, requires_grad=True)
    plain(photo + grid.repeat(1, 1, 64, 64)).sum().backward()
    liked = grid.grad - grid.grad.mean((2, 3), keepdim=True)
    liked = 0.6 * liked / liked.square().mean().sqrt()
    # as files hold it
    after = (255 * photo + liked.repeat(1, 1, 64, 64)).round().clamp(0, 255) / 255
    before = (255 * photo).round() / 255
    with torch.no_grad():
        gain, of_free = plain(after) - plain(before), free(after) - free(before)
    assert gain > 1 and of_free.abs() < 0.1 * gain, (gain, of_free)


def test_the_weights_belong_to_the_identity(monkeypatch):
    first = iqa.create_reward(["rewards.gridfree:build"]).identity()
    monkeypatch.setattr(gridfree, "MODEL", "rewards/ranker2.pth")
    assert iqa.create_reward(["rewards.gridfree:build"]).identity() != first
