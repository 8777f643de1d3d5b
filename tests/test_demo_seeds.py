"""experiments/demo_seeds.py: the rule for a result that holds, and the perturbation."""
import pytest
import torch
from scipy import stats

import archs
import runs
from experiments import demo_seeds


def results(plain, perturbed, contiguous):
    """summarise's argument, of differences amo - orig for every seed."""
    variants = {"plain": plain, "perturbed": perturbed, "contiguous": contiguous}
    return {seed: {name: {"orig": {"m": 30.0}, "amo": {"m": 30.0 + gaps[seed]}} for name, gaps in variants.items()}
            for seed in range(len(plain))}


@pytest.mark.fast
def test_a_result_holds_with_one_sign_everywhere_and_an_interval_without_zero():
    clear = [1.0, 1.2, 0.9, 1.1]
    summary = demo_seeds.summarise(results(clear, clear, clear), ["m"])["m"]
    # Student's t by hand: mean and standard error of the plain seeds
    mean, variance = 1.05, sum((d - 1.05) ** 2 for d in clear) / 3
    half = stats.t.ppf(0.975, 3) * (variance / 4) ** 0.5
    assert (summary["mean"], summary["low"], summary["high"]) == pytest.approx((mean, mean - half, mean + half))
    assert summary["holds"] and summary["differences"]["contiguous"] == pytest.approx(clear)
    assert demo_seeds.summarise(results([-d for d in clear], *[[-d for d in clear]] * 2), ["m"])["m"]["holds"]

    # one seed of one variant has another sign, or none; signs agree, but the seeds scatter too much
    for plain, perturbed, contiguous in ((clear, [1.0, 1.2, -0.01, 1.1], clear), (clear, clear, [1.0, 0.0, 1.0, 1.0]),
                                         ([0.01, 3.0, 0.02, 0.01], clear, clear)):
        assert not demo_seeds.summarise(results(plain, perturbed, contiguous), ["m"])["m"]["holds"]


@pytest.mark.fast
def test_the_sentence_counts_in_the_direction_of_the_metric():
    summary = demo_seeds.summarise(results([1.0, 1.2], [1.0, -0.5], [0.0, 1.0]), ["m"])["m"]
    assert "amo better in 4 of 6; does not hold" in demo_seeds.line("m", False, summary, 2)
    text = demo_seeds.line("m", True, summary, 2)
    assert "lower is better" in text and "amo better in 1 of 6" in text and "smallest -0.500, largest +1.200" in text


@pytest.mark.fast
def test_perturbing_changes_every_weight_by_a_millionth_at_most(tmp_path):
    torch.manual_seed(0)
    state = archs.create("compact-small").state_dict() | {"index": torch.arange(5)}
    runs.save_weights(tmp_path / "a.pth", state)
    demo_seeds.perturb(tmp_path / "a.pth", tmp_path / "b.pth", seed=3)
    demo_seeds.perturb(tmp_path / "a.pth", tmp_path / "c.pth", seed=4)
    changed, other = (archs.read_weights(tmp_path / f"{name}.pth")[0] for name in "bc")
    assert changed.keys() == state.keys() and torch.equal(changed["index"], state["index"])
    for name, weight in state.items():
        if name != "index":
            share = (changed[name].double() / weight.double() - 1).abs()[weight != 0]
            # 1 + u and the product are rounded to float32, half a unit in the last place each
            assert share.max() <= 1e-6 + 2 * 2 ** -24, name
            assert not torch.equal(changed[name], weight) and not torch.equal(changed[name], other[name]), name
    moved = torch.cat([(changed[name] != weight).flatten() for name, weight in state.items() if name != "index"])
    # shares below half a unit in the last place round to nothing
    assert moved.double().mean() > 0.9


@pytest.mark.fast
def test_two_seeds_are_the_least():
    with pytest.raises(SystemExit):
        demo_seeds.parse_args(["--seeds", "1", "1"])
