"""experiments.preferences from photographs to tables, as small as it goes."""
import json
import shlex

import pytest

from dpo import pool, pretrain, tune
from experiments import preferences as exp
from images import load_image


@pytest.mark.slow
def test_the_queue_in_small(quintuplets, tmp_path, script):
    originals = quintuplets / "Train" / "images" / "0-6" / "original"
    crops = "--patch 8 --load-size 48 --degradation two-round"
    training = "--batch-size 2 --total-steps 2 --val-groups 1 --val-every 1 --log-every 1 --workers 0"
    words = ["--photos", originals, "--test", originals, "--tile", 48, "--groups", 4, "--samples", 8,
             "--test-samples", 4, "--tau", 0.7, "--controls", 0.6, "--fr", "ssim", "--nr", "ranker", "--watch", "psnr",
             "--metric-weights", "--seeds", 0, 1, "--variants", "best-worst", "HPO", "--crops", crops,
             "--pretrain", f"--size tiny {crops} --batch-size 2 --group-size 2 --val-photos 1 --total-steps 2 "
             "--workers 0 --steps 2 --val-every 0",
             "--work", tmp_path / "work", "--results", tmp_path / "dpo"]
    log = script("experiments.preferences", *words, "--train", training, timeout=580).stdout
    summary = json.loads((tmp_path / "dpo.json").read_text())
    rows = ["base", "best-worst", "HPO", "base, 0.6 of the noise", "base + unsharp 0.5", "base + unsharp 1"]
    assert list(summary["mean"]) == rows
    assert {"HPO - base", "HPO - best-worst", "HPO - base, 0.6 of the noise", "base + unsharp 1 - base"} \
        <= set(summary["differences"])
    assert "1 of 4 - base" not in summary["differences"]
    assert summary["pairs"] == {"best-worst-0": 4, "HPO-0": 64, "best-worst-1": 4, "HPO-1": 64}
    assert len(summary["sigma"]) == 2 and len(summary["watched"]["HPO-1"]) == 3
    assert "best@4" in summary["metrics"] and summary["k"] == [1, 2, 4]
    records = ("pool/0/pool.json", "eval/0/HPO.json", "eval/0/base, 0.6 of the noise.json")
    taus = [json.loads((tmp_path / "work" / name).read_text())["generator"]["tau"] for name in records]
    assert taus == pytest.approx([0.7, 0.7, 0.42])
    k = summary["metrics"].index("reward")
    difference = summary["mean"]["HPO"][k] - summary["mean"]["base"][k]
    assert summary["differences"]["HPO - base"]["reward"]["mean"] == pytest.approx(difference, abs=1e-9)
    for text in ("| HPO - base |", "sigma_g of the reward over seeds", "error at winners, change"):
        assert text in log
    assert load_image(tmp_path / "dpo-grid.png").shape[0] == 3
    for name in ("curves", "steps", "grid"):
        assert (tmp_path / f"dpo-{name}.png").stat().st_size > 1000
    again = script("experiments.preferences", "train", *words, "--train", f"{training} --lr 1e-3", check=False)
    assert again.returncode == 2 and "was made with other flags" in again.stderr.strip().splitlines()[-1]


@pytest.mark.fast
def test_its_flags_are_flags_of_the_stages():
    given = [(pretrain.parse_args, exp.PRETRAIN), *((tune.parse_args, f"{exp.TRAIN} {flags}")
                                                    for _, flags in exp.VARIANTS.values()),
             (pool.parse_args, f"sample --hr x {exp.CROPS}"),
             *((pool.parse_args, f"curate {flags}") for flags, _ in exp.VARIANTS.values())]
    for parse, line in given:
        args, words = vars(parse(shlex.split(line))), shlex.split(line)
        for flag, value in zip(words, words[1:]):
            if flag.startswith("--"):
                parsed = args[flag.removeprefix("--").replace("-", "_")]
                assert type(parsed)(value) == parsed
