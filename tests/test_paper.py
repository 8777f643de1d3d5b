"""paper.py: every printed command is one that the scripts accept, with the paper's settings, and finished runs are skipped."""
import json
import subprocess
import sys

import pytest

import evaluate
import finetune_lora
from report import paper_tables as paper
import train


@pytest.mark.fast
@pytest.mark.parametrize("table, rows", [(5, 10), (7, 8), (8, 4)])
def test_commands_are_accepted_and_chain(table, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done, judged = set(), None
    for title, folder, words in paper.stages(paper.parse_args([str(table)])):
        script, words = words[words.index(next(w for w in words if str(w).endswith(".py")))], [str(w) for w in words]
        flags = words[words.index(script) + 1:]
        args = {"train.py": train, "finetune_lora.py": finetune_lora, "evaluate.py": evaluate}[script].parse_args(flags)
        if script == "evaluate.py":
            judged = args
            continue
        assert args.out == folder and args.resume == "auto" and folder not in done
        if script == "train.py" and args.stage == "gan":
            assert args.init in done and args.total_steps == 300_000 and args.lambda_a == 0.1 and args.reward == ["musiq"]
        if script == "finetune_lora.py":
            assert args.base in done and args.total_steps == 20_000
            without = [w for k, w in enumerate(flags) if w not in ("--out", "--base") and flags[k - 1] not in ("--out", "--base")]
            assert finetune_lora.parse_args([*without, *(["--gt-reward", "musiq"] if "none" in without else [])]).out == folder              # its own name for that variant
        done.add(folder)
    assert len(judged.weights) == 2 * rows and set(judged.weights) <= done and judged.protocol == ("realsr" if table == 8 else "hggt")
    assert judged.metrics == list(evaluate.NINE) and ("gold" in judged.baselines) == (table != 8)


@pytest.mark.fast
def test_finished_runs_are_skipped_and_a_failure_stops_the_chain(tmp_path, capsys):
    words = ["8", "--archs", "swinir", "--runs", str(tmp_path), "--gpus", "1", "--photos", str(tmp_path / "none")]
    psnr = tmp_path / "swinir-psnr"
    (psnr / "weights").mkdir(parents=True)
    (psnr / "args.json").write_text(json.dumps({"args": {"total_steps": 300}}))
    (psnr / "weights" / "ema_0000200.pth").touch()
    paper.main(paper.parse_args(words))
    said = capsys.readouterr().out
    assert "--stage psnr" in said and said.count("\ntorchrun --standalone --nproc_per_node 1 ") == 5 and said.rstrip().splitlines()[-1].startswith("python evaluate.py --weights ")
    (psnr / "weights" / "ema_0000300.pth").touch()
    paper.main(paper.parse_args(words))
    said = capsys.readouterr().out
    assert f"# swinir: psnr stage: finished, {psnr}" in said and "--stage psnr" not in said


@pytest.fixture
def in_place(tmp_path):
    """What a table needs, in name only, as words of paper.py."""
    for folder in ("HGGT/Train", "HGGT/Test", "photos", "RealSR/Canon/Test/4"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "RealSR" / "Canon" / "Test" / "4" / "Canon_001_HR.png").touch()
    return ["--archs", "swinir", "--gpus", "1", "--runs", tmp_path / "runs", "--data", tmp_path / "HGGT", "--photos", tmp_path / "photos", "--realsr", tmp_path / "RealSR"]


def test_run_stops_at_the_first_failure(in_place):
    done = subprocess.run([sys.executable, "report.paper_tables", "8", "--run", *map(str, in_place)], cwd=paper.Path(paper.__file__).parent, capture_output=True, text=True)
    assert done.returncode not in (0, None) and "photos: no images" in done.stderr and "psnr stage ended with" in done.stderr and "OrigsOnly" not in done.stdout


@pytest.mark.fast
def test_run_names_all_that_is_missing_before_training_begins(in_place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paper.subprocess, "run", lambda *words, **more: pytest.fail("training began"))
    words = lambda table, *more: paper.parse_args([table, "--run", *map(str, in_place), *map(str, more)])
    with pytest.raises(SystemExit) as stopped:
        paper.main(words("8", "--photos", tmp_path / "none", "--data", tmp_path / "nothing", "--realsr", tmp_path / "HGGT"))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and all(f"{flag} {tmp_path}" in said for flag in ("--photos", "--data", "--realsr"))
    with pytest.raises(SystemExit):
        paper.main(words("5", "--init", f"swinir={tmp_path / 'none.pth'}", "--photos", tmp_path / "none"))
    said = capsys.readouterr().err
    assert "none.pth: no such file" in said and "--photos" not in said              # no psnr stage: no photographs


@pytest.mark.fast
def test_a_public_psnr_network_stands_in_for_the_psnr_stage(capsys):
    args = paper.parse_args(["5", "--init", "swinir=public.pth"])
    words = {title: list(map(str, words)) for title, _, words in paper.stages(args)}
    assert "swinir: psnr stage" not in words and "rrdbnet: psnr stage" in words
    assert "public.pth" in words["swinir: AMO"] and "public.pth" not in words["rrdbnet: AMO"]
    for word in ("public.pth", "compact=public.pth", "swinir="):
        with pytest.raises(SystemExit):
            paper.parse_args(["5", "--init", word])
        assert f"--init {word}: write ARCH=FILE" in capsys.readouterr().err


@pytest.mark.fast
def test_rows_carry_the_papers_names():
    *_, (_, _, words) = paper.stages(paper.parse_args(["5"]))
    args = evaluate.parse_args(list(map(str, words[2:])))
    named = dict(zip(args.names, args.weights))
    assert len(named) == 20 and named["SwinIR OrigsOnly"].name == "swinir-orig" and named["Real-ESRGAN UPos + FT_HP"].name == "rrdbnet-upos+musiq-hp"


@pytest.mark.fast
def test_make_passes_the_number_of_gpus():
    said = subprocess.run(["make", "-n", "-o", ".venv/installed", "table5", "GPUS=8"], cwd=paper.Path(paper.__file__).parent, capture_output=True, text=True).stdout
    assert "paper.py 5 --gpus 8" in said
