"""The recipes of docs/changing.md, applied to a copy of the repository: every stage runs with them for two steps."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import runs
from images import save_image

REPO = runs.REPO
TRACKED = subprocess.run(["git", "-C", str(REPO), "ls-files"], capture_output=True, text=True).stdout.splitlines()
HUNK = re.compile(r"In `(\w+\.py)`,(?: in `\w+`,)? (after|before|replace)\n\n```python\n(.*?)```\n\n(?:insert|by)\n\n"
                  r"```python\n(.*?)```", re.S)
RECIPES = "A sampler", "A backbone", "A loss in place of another", "A further loss with a flag"
pytestmark = pytest.mark.skipif(not TRACKED, reason="not a git checkout: nothing to copy")


def hunks(recipe):
    """[(file, how, place, code)] of a section of docs/changing.md."""
    section = (REPO / "docs" / "changing.md").read_text().split(f"\n## {recipe}\n")[1].split("\n## ")[0]
    return HUNK.findall(section)


def apply(root, recipe):
    for file, how, place, code in hunks(recipe):
        text = (root / file).read_text()
        assert text.count(place) == 1, f"{file} has {text.count(place)} times:\n{place}"
        new = {"after": place + code, "before": code + place, "replace": code}[how]
        (root / file).write_text(text.replace(place, new))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository with all recipes but the replaced loss, and an L1 start; and what runs its scripts."""
    root = tmp_path_factory.mktemp("fork")
    for name in TRACKED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / name, root / name)
    for recipe in ("A sampler", "A backbone", "A further loss with a flag"):
        apply(root, recipe)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(script, *words):
        done = subprocess.run([sys.executable, script, *map(str, words)], cwd=root, capture_output=True, text=True,
                              env=environment)
        assert done.returncode == 0, f"{script} {words}:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
        return done.stdout
    run("train.py", "--demo", "--stage", "psnr", "--total-steps", 2)
    generator = torch.Generator().manual_seed(0)
    for folder, side in (("lq", 40), ("hr", 160)):
        save_image(root / folder / "a.png", torch.rand(3, side, side, generator=generator))
    return root, run


@pytest.mark.fast
def test_places_are_as_few_as_promised():
    assert [len(hunks(recipe)) for recipe in RECIPES] == [2, 2, 1, 2]


@pytest.mark.fast
def test_the_readme_has_every_line_of_the_recipes():
    section = (REPO / "README.md").read_text().split("## Change something")[1].split("```")[1]
    shown = [line for line in section.splitlines()[1:] if not line.startswith("#")]
    lines = [line for recipe in RECIPES for *_, code in hunks(recipe) for line in code.splitlines()]
    assert shown == [line for line in lines if line and '"""' not in line]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["top2", "top2-static"])
def test_a_sampler(copy, sampler):
    root, run = copy
    log = run("train.py", "--demo", "--sampler", sampler, "--total-steps", 6, "--log-every", 6)
    shares = dict(re.findall(r"(original|\d\d) (\d+)%", log.split("chosen so far")[1]))
    # two good versions of five: more than one is chosen, and the worst, 04, is not
    assert len(shares) >= 2 and "04" not in shares
    run("finetune_lora.py", "--demo", "--sampler", sampler, "--total-steps", 2)
    # nothing without a finite score, and no version that is not there
    code = """if True:
        import sys, torch, data
        nan = float("nan")
        for row, allowed in (([1, 9, nan, 8, 2], {1, 3}), ([nan] * 5, {0}), ([nan, nan, nan, 4, nan], {3}), ([5], {0})):
            scores, u = torch.tensor([row] * 40), torch.linspace(0, 0.999, 40)
            found = data.pick_gt(sys.argv[1], torch.ones(40, len(row), dtype=torch.bool), scores.float(), u=u)
            assert set(found.tolist()) == allowed, (row, found)
    """
    run("-c", code, sampler)


@pytest.mark.slow
def test_a_backbone(copy):
    root, run = copy
    run("train.py", "--demo", "--arch", "edsr-small", "--total-steps", 2)
    run("finetune_lora.py", "--demo", "--arch", "edsr-small", "--total-steps", 2)


@pytest.mark.slow
def test_a_further_loss_with_a_flag_is_logged_by_both_trainings(copy):
    root, run = copy
    log = run("train.py", "--demo", "--lambda-f", 0.1, "--total-steps", 2, "--log-every", 1, "--out", "runs/fourier")
    assert log.count("fourier") >= 2
    tuned = run("finetune_lora.py", "--demo", "--base", "runs/fourier", "--total-steps", 2, "--log-every", 1)
    assert tuned.count("fourier") >= 2 and "lambda_f" in tuned.split("values of")[1].split("; given")[0]


@pytest.mark.slow
def test_a_loss_in_place_of_another(copy):
    root, run = copy
    log = run("train.py", "--demo", "--total-steps", 2, "--log-every", 2, "--out", "runs/l1")
    apply(root, "A loss in place of another")
    other = run("train.py", "--demo", "--total-steps", 2, "--log-every", 2, "--out", "runs/charbonnier")
    values = [float(re.search(r"pix ([\d.]+)", text)[1]) for text in (log, other)]
    assert 0 < values[1] - values[0] < 2e-3
    run("finetune_lora.py", "--demo", "--base", "runs/charbonnier", "--total-steps", 2)


@pytest.mark.slow
def test_evaluate_and_upscale_take_what_was_trained_and_what_was_tuned(copy):
    """After the other tests: one call of each for all recipes, since a start takes seconds."""
    root, run = copy
    bases = "compact-small-top2", "compact-small-top2-static", "edsr-small-amo", "fourier", "charbonnier"
    names = [name for base in bases for name in (base, f"{base}+ranker")]
    table = run("evaluate.py", "--weights", *(f"runs/{name}" for name in names), "--lq", "lq", "--gt", "hr",
                "--metrics", "psnr")
    assert all(f"{name} " in table for name in names)
    for name in (names[1], names[5], "fourier", "charbonnier"):
        run("upscale.py", "--weights", f"runs/{name}", "lq/a.png", "--out", f"sr/{name}")
        assert Path(root, "sr", name, "a.png").exists()
