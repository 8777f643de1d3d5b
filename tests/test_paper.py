"""report.paper_tables: its commands are those of the scripts, with the paper's settings; finished runs are skipped."""
import importlib
import subprocess

import pytest

import evaluate
import finetune_lora
import runs
import train
from report import paper_tables
from report.paper_tables import parse_args, stages

SCRIPTS = {"train.py": train, "finetune_lora.py": finetune_lora, "evaluate.py": evaluate}


def parse(command):
    """A printed command -> (script, its own parser's result)."""
    words = list(map(str, command))
    if "-m" in words:
        script = words[words.index("-m") + 1]
        return script, importlib.import_module(script).parse_args(words[words.index("-m") + 2:])
    script = next(word for word in words if word in SCRIPTS)
    return script, SCRIPTS[script].parse_args(words[words.index(script) + 1:])


@pytest.mark.fast
@pytest.mark.parametrize("table, rows", [(5, 10), (7, 8), (8, 4)])
def test_commands_are_accepted_and_chain(table, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done, formats = set(), []
    for _, folder, command in stages(parse_args([str(table)])):
        script, args = parse(command)
        if script == "evaluate.py":
            assert len(args.weights) == 2 * rows and set(args.weights) <= done
            assert args.protocol == ("realsr" if table == 8 else "hggt") and args.metrics == list(evaluate.NINE)
            assert ("gold" in args.baselines) == (table != 8)
            result = args.out_json
            continue
        if script == "report.tables":
            assert args.result == result
            formats.append(args.format)
            continue
        assert args.out == folder and args.resume == "auto" and folder not in done
        if script == "train.py" and args.stage == "gan":
            assert args.init in done and args.total_steps == 300_000 and args.lambda_a == 0.1
            assert args.reward == (["musiq"] if runs.chooses_by_score(args.sampler) else ["none"])
        if script == "finetune_lora.py":
            assert args.base in done and args.total_steps == 20_000
            # finetune_lora.py's own name for this variant
            words = list(map(str, command))
            at = words.index("--out")
            assert parse([*words[:at], *words[at + 2:]])[1].out == folder
        done.add(folder)
    assert formats == ["latex", "csv"]


@pytest.mark.fast
def test_variants_of_fine_tuning_have_the_papers_weights(tmp_path, monkeypatch):
    """PAPER Table 7: the reward, lambda_a (the column of that name), and a higher lambda_p for FT_HP."""
    monkeypatch.chdir(tmp_path)
    commands = {title: command for title, _, command in stages(parse_args(["7", "--archs", "swinir"]))}
    for row, reward, lambda_a in (("FT_HP", "musiq", 0), ("FT_IG", "musiq", 0.1), ("FT_NNR,IGx2", "none", 0.2),
                                  ("FT_NNR,IGx5", "none", 0.5), ("FT_PaQ2PiQ", "paq2piq", 0), ("FT", "musiq", 0)):
        _, args = parse(commands[f"swinir: UPos + {row}"])
        assert (args.reward, args.lambda_a, args.lambda_p > 1) == ([reward], lambda_a, row == "FT_HP"), row
        assert args.lambda_q == (0 if reward == "none" else 0.05) and args.sampler == "upos" and args.tune == "lora"


def write_run(folder, total, weights, log=None):
    """The files that tell whether a run is finished."""
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    runs.save_json(folder / "args.json", {"args": {"total_steps": total}})
    (folder / "weights" / weights).touch()
    if log:
        (folder / "log.txt").write_text(log)


@pytest.mark.fast
def test_finished_runs_are_skipped(tmp_path, capsys):
    words = ["8", "--archs", "swinir", "--runs", str(tmp_path), "--gpus", "1", "--photos", str(tmp_path / "none")]
    psnr, tuned = tmp_path / "swinir-psnr", tmp_path / "swinir-amo+musiq"
    write_run(psnr, 300, "ema_0000200.pth")
    # merged.pth of a validation before the last step
    write_run(tuned, 20_000, "merged.pth", "step 2000 validation\nstopped by a signal at step 2500\n")
    paper_tables.main(parse_args(words))
    printed = capsys.readouterr().out
    assert "--stage psnr" in printed and printed.count("\ntorchrun --standalone --nproc_per_node 1 ") == 5
    assert [line.split(" --")[0] for line in printed.splitlines() if line.startswith("python")] == \
        ["python evaluate.py", *[f"python -m report.tables {tmp_path}/table8.json"] * 2]
    write_run(psnr, 300, "ema_0000300.pth")
    for last_line in ("done: merged.pth", f"nothing to do: {tuned} is finished; remove it to train again"):
        write_run(tuned, 20_000, "merged.pth", f"step 20000 validation\n{last_line}\n")
        paper_tables.main(parse_args(words))
        printed = capsys.readouterr().out
        assert f"# swinir: psnr stage: finished, {psnr}" in printed and "--stage psnr" not in printed
        assert f"# swinir: AMO + FT: finished, {tuned}" in printed and "finetune_lora.py" not in printed


@pytest.fixture
def in_place(tmp_path):
    """Flags that name all a table needs: folders without images."""
    for folder in ("HGGT/Train", "HGGT/Test", "photos", "RealSR/Canon/Test/4"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "RealSR" / "Canon" / "Test" / "4" / "Canon_001_HR.png").touch()
    folders = {"--runs": "runs", "--data": "HGGT", "--photos": "photos", "--realsr": "RealSR"}
    return ["--archs", "swinir", "--gpus", "1", *(str(word) for flag, folder in folders.items()
                                                  for word in (flag, tmp_path / folder))]


def test_run_stops_at_the_first_failure(in_place, script):
    done = script("report.paper_tables", "8", "--run", *in_place, check=False)
    assert done.returncode not in (0, None) and "photos: no images" in done.stderr
    assert "psnr stage ended with" in done.stderr and "OrigsOnly" not in done.stdout


@pytest.mark.fast
def test_run_names_all_that_is_missing_before_training_begins(in_place, tmp_path, monkeypatch):
    monkeypatch.setattr(paper_tables.subprocess, "run", lambda *words, **options: pytest.fail("training began"))

    def error(*words):
        with pytest.raises(runs.UserError) as raised:
            paper_tables.main(parse_args([words[0], "--run", *in_place, *map(str, words[1:])]))
        return str(raised.value)
    text = error("8", "--photos", tmp_path / "none", "--data", tmp_path / "nothing", "--realsr", tmp_path / "HGGT")
    assert all(f"{flag} {tmp_path}" in text for flag in ("--photos", "--data", "--realsr"))
    # no psnr stage: no photographs
    text = error("5", "--init", f"swinir={tmp_path / 'none.pth'}", "--photos", tmp_path / "none")
    assert "none.pth: no such file" in text and "--photos" not in text


@pytest.mark.fast
def test_a_public_psnr_network_stands_in_for_the_psnr_stage(capsys):
    args = parse_args(["5", "--init", "swinir=public.pth"])
    commands = {title: list(map(str, command)) for title, _, command in stages(args)}
    assert "swinir: psnr stage" not in commands and "rrdbnet: psnr stage" in commands
    assert "public.pth" in commands["swinir: AMO"] and "public.pth" not in commands["rrdbnet: AMO"]
    for word in ("public.pth", "compact=public.pth", "swinir="):
        with pytest.raises(SystemExit):
            parse_args(["5", "--init", word])
        assert f"--init {word}: write ARCH=FILE" in capsys.readouterr().err


@pytest.mark.fast
def test_rows_carry_the_papers_names():
    command = next(command for _, _, command in stages(parse_args(["5"])) if "evaluate.py" in command)
    _, args = parse(command)
    named = dict(zip(args.names, args.weights))
    assert len(named) == 20 and named["SwinIR OrigsOnly"].name == "swinir-orig"
    assert named["Real-ESRGAN UPos + FT_HP"].name == "rrdbnet-upos+musiq-hp"


@pytest.mark.fast
def test_make_passes_the_number_of_gpus():
    command = ["make", "-n", "-o", ".venv/installed", "table5", "GPUS=8"]
    printed = subprocess.run(command, cwd=runs.REPO, capture_output=True, text=True).stdout
    assert "report.paper_tables 5 --gpus 8" in printed
