"""experiment_dpo.py from photographs to README's tables, as small as it goes."""
import json
import shlex

from images import load_image
from dpo import __main__ as dpo
from experiments import preferences as exp


def test_the_queue_in_small(quintuplets, tmp_path, script):
    originals, sizes = quintuplets / "Train" / "images" / "0-6" / "original", "--patch 8 --load-size 48 --degradation two-round"
    words = ["--photos", originals, "--test", originals, "--tile", 48, "--groups", 4, "--samples", 8, "--test-samples", 4, "--tau", 0.7, "--controls", 0.6, "--fr", "ssim", "--nr", "ranker", "--watch", "psnr", "--metric-weights", "--seeds", 0, 1,
             "--variants", "best-worst", "HPO", "--crops", sizes, "--work", tmp_path / "work", "--results", tmp_path / "dpo",
             "--pretrain", f"--size tiny {sizes} --batch-size 2 --group-size 2 --val-photos 1 --total-steps 2 --workers 0 --steps 2 --val-every 0",
             "--train", "--batch-size 2 --total-steps 2 --val-groups 1 --val-every 1 --log-every 1 --workers 0"]
    said = script("experiments.preferences", *words, timeout=580).stdout
    found = json.loads((tmp_path / "dpo.json").read_text())
    assert list(found["mean"]) == ["base", "best-worst", "HPO", "base, 0.6 of the noise", "base + unsharp 0.5", "base + unsharp 1"]
    assert {"HPO - base", "HPO - best-worst", "HPO - base, 0.6 of the noise", "base + unsharp 1 - base"} <= set(found["differences"]) and "1 of 4 - base" not in found["differences"]
    assert found["pairs"] == {"best-worst-0": 4, "HPO-0": 64, "best-worst-1": 4, "HPO-1": 64} and len(found["sigma"]) == 2 and len(found["watched"]["HPO-1"]) == 3
    assert "best@4" in found["metrics"] and found["k"] == [1, 2, 4]
    taus = [json.loads((tmp_path / "work" / name).read_text())["generator"]["tau"] for name in ("pool/0/pool.json", "eval/0/HPO.json", "eval/0/base, 0.6 of the noise.json")]
    assert taus[:2] == [0.7, 0.7] and abs(taus[2] - 0.42) < 1e-9
    k = found["metrics"].index("reward")
    assert abs(found["differences"]["HPO - base"]["reward"]["mean"] - found["mean"]["HPO"][k] + found["mean"]["base"][k]) < 1e-9
    assert "| HPO - base |" in said and "sigma_g of the reward over seeds" in said and "error at winners, change" in said
    for name in ("curves", "steps", "grid"):
        assert load_image(tmp_path / "dpo-grid.png").shape[0] == 3 and (tmp_path / f"dpo-{name}.png").stat().st_size > 1000
    words[words.index("--train") + 1] += " --lr 1e-3"
    again = script("experiments.preferences", "train", *words, check=False)
    assert again.returncode == 2 and "was made with other flags" in again.stderr.strip().splitlines()[-1]


def test_its_flags_and_the_demo_s_are_flags_of_the_stages():
    given = {"pretrain": [exp.PRETRAIN], "sample": [exp.CROPS], "eval": [exp.CROPS], "curate": [flags for flags, _ in exp.VARIANTS.values()], "train": [f"{exp.TRAIN} {flags}" for _, flags in exp.VARIANTS.values()]}
    for command, lines in given.items():
        for line in lines:
            args = vars(dpo.parse_args([command, *({"pretrain": ["--hr", "x"], "sample": ["--hr", "x"], "eval": ["--hr", "x"]}.get(command, [])), *shlex.split(line)]))
            assert all(str(args[flag.removeprefix("--").replace("-", "_")]) not in ("None", "") for flag in shlex.split(line) if flag.startswith("--"))
    for command, settings in dpo.DEMO.items():
        args = vars(dpo.parse_args([command, "--demo"]))
        assert settings.items() <= args.items()
