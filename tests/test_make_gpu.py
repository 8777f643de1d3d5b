"""experiments/gpu.py, what `make gpu` runs: in small on a CPU, without the packages that a GPU machine lacks."""
import importlib
import json
import os
import subprocess

import pytest
import torch

import runs
from experiments import gpu

LACKING = ("pyiqa", "lpips", "pyvips", "spandrel", "diffusers", "loralib", "icecream", "playwright")


@pytest.mark.slow
def test_the_rehearsal_measures_everything_without_optional_packages(tmp_path):
    for name in LACKING:
        (tmp_path / "absent" / name).mkdir(parents=True)
        (tmp_path / "absent" / name / "__init__.py").write_text(f"raise ImportError('no {name} here')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "absent"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(runs.python("experiments.gpu", "--device", "cpu", "--minutes", 10, "--out", tmp_path / "out"),
                          capture_output=True, text=True, cwd=runs.REPO, env=environment)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log[-3000:]
    found = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in gpu.JOBS}
    assert found["device"]["matrix product, fp32"]["flops"] > 1e8 and found["device"]["copy"]["bytes_per_s"] > 1e8
    assert found["checks"]["tests"]["failed_tests"] == found["checks"]["tests"]["cut_off"] == []
    if not torch.cuda.is_available():
        assert list(found["checks"]["tests"]["counts"]) == ["skipped"]
    train = found["speed"]["train swinir-amo, fp32"]
    assert train["images_per_s"] > 0 and set(train["flops"]) >= {"G", "D", "scoring"}
    assert found["speed"]["finetune swinir lora, batch 32, fp32"]["ms"] > 0
    assert found["exact"]["resume, compact-small, fp32"]["deterministic"] == {"largest_difference": None}
    assert len(found["exact"]["fp32, swinir"]["losses"]) == 5
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *(f"{name}.json" for name in gpu.JOBS), "summary.md", "log.txt", "pictures.zip"}
    assert "images_per_s" in (tmp_path / "out" / "summary.md").read_text()


def test_a_part_that_fails_or_does_not_fit_costs_itself_alone(tmp_path, capsys):
    report = gpu.Report(tmp_path / "job.json", 1000)

    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
    report.part("a", lambda: {"x": 1})
    report.part("b", out_of_memory)
    report.part("c", lambda: 1 / 0)
    report.part("d", lambda: {"x": 2}, need=2000)
    record = json.loads((tmp_path / "job.json").read_text())
    assert record["a"]["x"] == 1 and "does not fit into memory (CUDA out of memory" in record["b"]["skipped"]
    assert record["c"]["failed"].startswith("ZeroDivisionError") and "no time left" in record["d"]["skipped"]
    assert record["machine"]["torch"] == torch.__version__ and "ZeroDivisionError" in capsys.readouterr().err


def test_an_experiment_runs_by_name_with_flags_that_exist(tmp_path, monkeypatch):
    for name, (module, words) in gpu.EXPERIMENTS.items():
        module = importlib.import_module(f"experiments.{module}")
        assert name not in gpu.JOBS and module.parse_args(words).scale == "gpu"
        given = []
        monkeypatch.setattr(module, "main", given.append)
        args = gpu.parse_args(["--job", name, "--only", name, "--out", str(tmp_path), "--device", "cpu"])
        report = gpu.Report(tmp_path / f"{name}.json", 100)
        gpu.job_experiment(args, report, tmp_path)
        assert given[0].results == tmp_path / name / "rows" and given[0].device == "cpu"
        assert "rows" in report.record
        assert gpu.summary(tmp_path, []) == [] and name in (tmp_path / "summary.md").read_text()
