"""experiments/gpu.py, what `make gpu` runs: in small on a CPU, without the packages that a GPU machine lacks."""
import importlib
import json
import os
import subprocess
import time

import pytest
import torch

import runs
from experiments import gpu

LACKING = ("pyiqa", "lpips", "pyvips", "spandrel", "diffusers", "loralib", "icecream", "playwright")


def rehearse(folder, *words, lacking=LACKING):
    """experiments.gpu on this CPU, into FOLDER/out, where the packages `lacking` cannot be imported."""
    for name in lacking:
        (folder / "absent" / name).mkdir(parents=True)
        (folder / "absent" / name / "__init__.py").write_text(f"raise ImportError('no {name} here')\n")
    environment = os.environ | {"PYTHONPATH": str(folder / "absent"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(runs.python("experiments.gpu", "--device", "cpu", "--out", folder / "out", *words),
                          capture_output=True, text=True, cwd=runs.REPO, env=environment)


@pytest.mark.slow
def test_the_rehearsal_measures_everything_without_optional_packages(tmp_path):
    done = rehearse(tmp_path, "--minutes", 10)
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
    report = gpu.Report(tmp_path / "job.json", time.monotonic() + 1000)

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
    for name, (script, words) in gpu.EXPERIMENTS.items():
        module = importlib.import_module(f"experiments.{script}")
        assert name not in gpu.JOBS and module.parse_args(words).scale == "gpu"
        given = []
        monkeypatch.setattr(module, "main", given.append)
        for device in ("cuda", "cpu"):
            args = gpu.parse_args(["--job", name, "--only", name, "--out", str(tmp_path), "--device", device])
            report = gpu.Report(gpu.record_file(tmp_path, name), time.monotonic() + 100)
            gpu.job_experiment(args, report, tmp_path)
            assert given[-1].results == tmp_path / name and given[-1].device == device and "rows" in report.record
        assert given[0].scale == "gpu"
        # what the experiment itself writes there is left alone
        (tmp_path / f"{name}.json").write_text("{}")
        assert gpu.summary(tmp_path, [name], []) == [] and name in (tmp_path / "summary.md").read_text()


def test_a_failed_test_is_a_failure_of_its_job_alone(tmp_path):
    tests = {"counts": {"failure": 1, "passed": 2}, "failed_tests": ["test_a"], "cut_off": ["test_gpu_resume swinir"]}
    runs.save_json(tmp_path / "checks.json", {"machine": {"device": "a card"}, "tests": tests})
    assert len(gpu.summary(tmp_path, ["checks"], [])) == 1 and gpu.summary(tmp_path, ["speed"], []) == []
    text = (tmp_path / "summary.md").read_text()
    assert "# a card" in text and "test_gpu_resume swinir" in text


def test_experiments_on_cuda_want_the_real_vgg19(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = gpu.parse_args(["--only", "selfsup"])
    with pytest.raises(runs.UserError, match="runs/vgg19.pth: experiments need VGG19"):
        gpu.prepare(args, tmp_path / "work")


@pytest.mark.slow
def test_the_rehearsal_of_self_supervision_leaves_every_row_without_optional_packages(tmp_path):
    done = rehearse(tmp_path, "--only", "selfsup", "--minutes", 10, lacking=(*LACKING, "matplotlib"))
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "out" / "log.txt").read_text()[-3000:]
    rows = {"inside": {"both", "baseline", "controller", "FAR", "flipped"}, "realsr": {"both", "baseline"},
            "outside": {"both"}}
    results = tmp_path / "out" / "selfsup"
    for domain, names in rows.items():
        files = {json.loads(file.read_text())["row"] for file in results.glob(f"{domain}-*.json")}
        assert files == names | {"before", "blur control", "unsharp control", "blur and colour control"}
    summary = json.loads((results / "selfsup.json").read_text())
    assert summary["pretraining"].keys() == {"FAR-0", "both-0"} and summary["precision"].keys() == {"before", "both"}
    row = json.loads((results / "inside-controller-0.json").read_text())
    # two steps of 5e-6, averaged with 0.999
    assert row["network"] == "both" and "--no-far" in row["finetune"] and 0 < row["movement"] < 1e-5
    mean = [values["vgg"] for values in row["scores"].values()]
    column = summary["sets"]["inside"]["metrics"].index("vgg")
    assert summary["sets"]["inside"]["mean"]["controller"][column] == pytest.approx(sum(mean) / len(mean))
    assert set(summary["sets"]["inside"]["metrics"]) == {"psnr", "ssim", "vgg"}
