"""paper.py: every printed command is one that the scripts accept, with the paper's settings, and finished runs are skipped."""
import json
import subprocess
import sys

import pytest

import evaluate
import finetune_lora
import paper
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
    assert judged.metrics == evaluate.flags.NINE and ("gold" in judged.baselines) == (table != 8)


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


def test_run_stops_at_the_first_failure(tmp_path):
    done = subprocess.run([sys.executable, "paper.py", "8", "--run", "--archs", "swinir", "--runs", str(tmp_path), "--gpus", "1", "--photos", str(tmp_path / "none")],
                          cwd=paper.Path(paper.__file__).parent, capture_output=True, text=True)
    assert done.returncode not in (0, None) and "no such folder" in done.stderr and "psnr stage ended with" in done.stderr and "OrigsOnly" not in done.stdout
