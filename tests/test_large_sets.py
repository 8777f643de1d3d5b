"""experiments/large_sets.py in small: what packed images and an atlas cost grows linearly with the data set."""
import pytest
import torch

from experiments import large_sets

pytestmark = pytest.mark.fast


def test_what_a_packed_set_costs_is_linear_in_its_size(monkeypatch):
    """Sizes are checked without a look at all sets for every set; an image's place is a few bytes, not an object."""
    looked, any_of = [], torch.Tensor.any

    def watched(self, *words):
        looked.append(self.shape)
        return any_of(self, *words)
    monkeypatch.setattr(torch.Tensor, "any", watched)
    costs = large_sets.measure(400, samples=3)
    assert sum(shape == (400,) for shape in looked) <= 5 and costs["sample, ms"] > 0
    assert costs["index of packed, MB"] * 2 ** 20 < 400 * 250
