"""bench.py: counted work against hand-counted, every command in small, ratios, refusals."""
import json

import pytest
import torch

import archs
from experiments import bench
import iqa
import lora

SMALL = ["--arch", "compact-small", "--batch-size", "2", "--group-size", "2", "--pool-size", "4", "--crop", "32", "--lambda-p", "0", "--d-features", "4", "--workers", "0", "--threads", "1",
         "--device", "cpu", "--reward", "ranker"]


def run(*words):
    bench.main(*bench.parse_args([str(word) for word in words]))


@pytest.mark.fast
def test_counted_operations_are_those_counted_by_hand():
    conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    forward = 2 * 2 * 16 * 16 * 8 * 3 * 9                                         # a multiplication and an addition each
    assert bench.flops(lambda: conv(x)) == forward and bench.flops(lambda: conv(x).sum().backward()) == 3 * forward
    a = torch.rand(32, 32)
    assert bench.flops(lambda: a @ a) == 2 * 32 ** 3 and bench.peak_flops(torch.device("cpu"), "fp32") > 1e8


@pytest.mark.fast
def test_words_without_a_flag_and_its_values():
    assert bench.without(["--a", "1", "2", "--b", "--c", "3"], "--a", "--c") == ["--b"]


def test_parts_and_whole_steps_of_a_training(quintuplets, tmp_path, capsys):
    run("train", *SMALL, "--data", quintuplets, "--repeats", 1, "--steps", 2, "--json", tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    assert {"decode, one worker", "degradation", "scoring", "G forward", "G backward, L1", "D in G's loss", "D", "optimiser, EMA"} <= set(record["parts_ms"])
    assert all(ms >= 0 for ms in record["parts_ms"].values()) and record["flops"]["D"] > record["flops"]["D in G's loss"] > 0
    assert record["whole"]["ms"] > 0 and 0.2 < record["whole"]["memory"] < 8 and record["commit"] and str(quintuplets) in record["arguments"]
    said = capsys.readouterr().out
    assert "| D |" in said and "images/s, waiting for data" in said and "with --fused-adam" in said
    assert record["adam_ms"].keys() == {"plain", "fused"} and record["parts_ms"]["optimiser, EMA"] > record["adam_ms"]["plain"] > 0
    (tmp_path / "b.json").write_text(json.dumps(record | {"parts_ms": {k: v / 2 for k, v in record["parts_ms"].items()}, "device": "another"}))
    run("compare", tmp_path / "a.json", tmp_path / "b.json")
    said = capsys.readouterr().out
    assert said.count("| 2.00 |") >= 7 and "device differ" in said


def test_the_other_commands(quintuplets, tmp_path, capsys):
    for command, part, said in (("evaluate", "inference, whole", "images/s | GFLOP"), ("data", "read a batch, cold", "samples/s")):
        run(command, *SMALL, "--data", quintuplets, "--repeats", 1, "--json", tmp_path / "x.json")
        record, out = json.loads((tmp_path / "x.json").read_text()), capsys.readouterr().out
        assert record["parts_ms"][part] > 0 and part in out and said in out and "G's" not in out
        assert command == "data" or record["flops"]["inference, whole"] > 1e8 and record["flops"]["ranker"] > 1e6
    with pytest.raises(ValueError, match="leave out --compile and --precision"):
        run("evaluate", *SMALL, "--data", quintuplets, "--compile")


@pytest.mark.parametrize("lambda_a", [0, 0.1])
def test_parts_and_whole_steps_of_a_fine_tuning(quintuplets, tmp_path, capsys, monkeypatch, lambda_a):
    """In bf16, with the rank that is asked for, the reward made once, as finetune_lora.py runs it."""
    made, ranks, kinds = [], [], set()
    create, add, through = iqa.create_reward, lora.add_lora, archs.SRVGGNetCompact.forward
    monkeypatch.setattr(iqa, "create_reward", lambda words, *a, **k: made.append(words) or create(words, *a, **k))
    monkeypatch.setattr(lora, "add_lora", lambda net, targets, rank, alpha: ranks.append(rank) or add(net, targets, rank, alpha))
    monkeypatch.setattr(archs.SRVGGNetCompact, "forward", lambda self, x: kinds.add(torch.is_autocast_enabled("cpu")) or through(self, x))
    run("finetune", *SMALL, "--data", quintuplets, "--repeats", 1, "--steps", 2, "--rank", 3, "--lambda-a", lambda_a, "--precision", "bf16", "--json", tmp_path / "x.json")
    record, said = json.loads((tmp_path / "x.json").read_text()), capsys.readouterr().out
    expected = {"decode, one worker", "to the device", "degradation", "scoring", "G forward", "G backward, L1", "reward with gradient", "optimiser, EMA"} | ({"D in G's loss", "D"} if lambda_a else set())
    assert set(record["parts_ms"]) == expected and {"G", "scoring", "reward with gradient"} <= set(record["flops"])
    assert made == [["ranker"]] and ranks == [3] and kinds == {True} and record["whole"]["ms"] > 0
    assert "finetune_lora.py: " in said and said.count("images/s") == 2 and "parts eager, bf16" in said


def test_compile_applies_to_the_parts_and_work_is_counted_eager(quintuplets, tmp_path, capsys, monkeypatch):
    compiled, called = [], []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(type(net).__name__) or (lambda *a, **k: called.append(net) or net(*a, **k)))
    run("train", *SMALL, "--data", quintuplets, "--repeats", 1, "--steps", 0, "--compile")
    assert compiled == ["SRVGGNetCompact", "UNetDiscriminatorSN"] and len(called) == 2 * (1 + 1 + 1 + 2) and "parts compiled, fp32" in capsys.readouterr().out


def test_growth_is_measured_in_turn(tmp_path, capsys):
    run("grow", *SMALL, "--repeats", 1, "--steps", 1, "--rounds", 1, "--drift", 20, "--json", tmp_path / "g.json")
    record, said = json.loads((tmp_path / "g.json").read_text()), capsys.readouterr().out
    assert {(row["what"], row["factor"]): len(row["rounds"]) for row in record["grow"]} == {(what, n): 1 for what in ("batch", "crop", "sets") for n in (1, 2, 4)}
    assert all({"whole step", "decode, one worker", "degradation", "scoring", "memory"} == set(values) for row in record["grow"] for values in row["rounds"])
    assert len(record["drift"]) == 19 and "measured 2 times" in said and "step time drifts by" in said


@pytest.mark.fast
@pytest.mark.parametrize("words", [["grow", "--drift", "10"], ["grow", "--steps", "0"], ["samplers", "--steps", "0"]])
def test_what_cannot_be_measured_is_refused_at_once(words):
    with pytest.raises(SystemExit):
        bench.parse_args(words)


@pytest.mark.fast
def test_flags_with_an_equals_sign_are_heard(tmp_path):
    assert bench.parse_args(["data", "--data=a b", "--reward", "ranker=2"])[1] == ["--data", "a b", "--reward", "ranker=2"]
    with pytest.raises(ValueError, match="nowhere"):
        run("data", *SMALL, f"--data={tmp_path / 'nowhere'}")


@pytest.mark.fast
def test_an_unwritable_json_is_refused_before_the_work(quintuplets, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "synthetic_sets", lambda *a: pytest.fail("worked before it was refused"))
    for command in ("train", "finetune", "evaluate", "data", "samplers", "grow"):
        with pytest.raises(ValueError, match="--json .*: a folder; name a file"):
            run(command, *SMALL, "--json", tmp_path)


def test_static_scores_are_not_left_in_the_working_directory(quintuplets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("train", *SMALL, "--sampler", "sma", "--data", quintuplets, "--repeats", 1, "--steps", 2)
    assert not list(tmp_path.iterdir())


def test_samplers_in_turn(quintuplets, tmp_path, capsys):
    import shutil

    from prepare import verify as prepare
    root = shutil.copytree(quintuplets, tmp_path / "set")
    prepare.main(prepare.parse_args(["atlas", str(root), "--reward", "ranker", "--crop", "32", "--stride", "16", "--device", "cpu"]))
    run("samplers", *SMALL, "--data", root, "--atlas", root / "atlas/ranker-32-16.npy", "--repeats", 1, "--online", 1, "--steps", 2, "--json", tmp_path / "s.json")
    said, record = capsys.readouterr().out, json.loads((tmp_path / "s.json").read_text())
    assert {k: len(v) for k, v in record["ms"].items()} == {"rand": 1, "amo, atlas": 1, "amo, online": 1} and "1 alternating pairs" in said and "scoring online is" in said
    with pytest.raises(ValueError, match="--atlas FILE names the table"):
        run("samplers", *SMALL, "--data", root)


def test_musiqs_architecture_without_weights_is_a_reward():
    reward = iqa.create_reward(["bench:untrained_musiq"])
    assert reward(torch.rand(2, 3, 64, 64)).shape == (2,)


@pytest.mark.fast
def test_help_and_unknown_flags(script):
    assert "--steps" in script("experiments.bench", "train", "--help").stdout
    done = script("experiments.bench", "train", "--arch", "compact-small", "--no-such-flag", check=False)
    assert done.returncode == 2 and "unrecognized arguments: --no-such-flag" in done.stderr


@pytest.mark.fast
def test_what_a_process_holds_is_counted(capsys):
    run("ranks")
    said = capsys.readouterr().out
    g, d = (sum(p.numel() for p in net.parameters()) for net in (archs.SwinIR(), archs.UNetDiscriminatorSN()))
    buffers = 2 * sum(b.numel() * b.element_size() for b in archs.SwinIR().buffers()) + 4 * sum(b.numel() for b in archs.UNetDiscriminatorSN().buffers())
    assert buffers > 20e6
    assert f"| swinir | {g:,} | {d:,} | {(4 * (5 * g + 4 * d) + buffers) / 1e6:.0f} | {160 * 3 * (65536 + 4096) / 1e6:.0f} | {4 * (g + d) / 1e6:.1f} | 8 |" in said


def test_whole_steps_of_a_set_with_a_test_split(quintuplets, tmp_path):
    """train.py validates at its last step there."""
    import shutil
    root = shutil.copytree(quintuplets, tmp_path / "set")
    shutil.copytree(root / "Train/images/0-6", root / "Test/GT/images/t")
    for path in list((root / "Train/images").rglob("photo2*")):
        path.unlink()
    for path in list((root / "Test").rglob("photo[01]*")):
        path.unlink()
    run("train", *SMALL, "--data", root, "--repeats", 1, "--steps", 2, "--json", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["whole"]["ms"] > 0
    with pytest.raises(ValueError, match="takes two files of --json with parts"):
        (tmp_path / "b.json").write_text("{}")
        run("compare", tmp_path / "a.json", tmp_path / "b.json")
