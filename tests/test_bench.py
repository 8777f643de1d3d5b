"""experiments/bench.py: counted work against hand-counted, every command, ratios, refusals; tricks.py's sums."""
import json
import shutil

import pytest
import torch

import archs
import iqa
import lora
import runs
from experiments import bench, steps, tricks

COMMON = ["--arch", "compact-small", "--batch-size", "2", "--pool-size", "4", "--crop", "32", "--lambda-p", "0",
          "--workers", "0", "--threads", "1", "--device", "cpu", "--reward", "ranker"]
SMALL = [*COMMON, "--group-size", "2", "--d-features", "4"]


def run(*words):
    bench.main(*bench.parse_args([str(word) for word in words]))


@pytest.mark.fast
def test_counted_operations_are_those_counted_by_hand():
    conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    # a multiplication and an addition each
    forward = 2 * 2 * 16 * 16 * 8 * 3 * 9
    assert steps.flops(lambda: conv(x)) == forward and steps.flops(lambda: conv(x).sum().backward()) == 3 * forward
    a = torch.rand(32, 32)
    assert steps.flops(lambda: a @ a) == 2 * 32 ** 3 and steps.peak_flops(torch.device("cpu"), "fp32") > 1e8


@pytest.mark.fast
def test_words_without_a_flag_and_its_values():
    assert bench.without(["--a", "1", "2", "--b", "--c", "3"], "--a", "--c") == ["--b"]


def test_parts_and_whole_steps_of_a_training(quintuplets, tmp_path, capsys):
    run("train", *SMALL, "--data", quintuplets, "--repeats", 1, "--steps", 2, "--json", tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    assert {"decode, one worker", "degradation", "scoring", "G forward", "G backward, L1", "D in G's loss", "D",
            "optimiser, EMA"} <= set(record["parts_ms"])
    assert all(ms >= 0 for ms in record["parts_ms"].values()) and record["parts_ms"]["optimiser, EMA"] > 0
    assert record["flops"]["D"] > record["flops"]["D in G's loss"] > 0
    assert record["whole"]["ms"] > 0 and 0.2 < record["whole"]["memory"] < 8
    assert record["commit"] and str(quintuplets) in record["arguments"]
    assert record["threads"] == 1 and set(record["cpu_flags"]) <= set(runs.CPU_FLAGS)
    output = capsys.readouterr().out
    assert "| D |" in output and "images/s, waiting for data" in output
    half = {name: ms / 2 for name, ms in record["parts_ms"].items()}
    (tmp_path / "b.json").write_text(json.dumps(record | {"parts_ms": half, "device": "another"}))
    run("compare", tmp_path / "a.json", tmp_path / "b.json")
    output = capsys.readouterr().out
    assert output.count("| 2.00 |") >= 7 and "device differ" in output


def test_the_other_commands(quintuplets, tmp_path, capsys):
    commands = ("evaluate", "inference, whole", "images/s | GFLOP"), ("data", "read a batch, cold", "samples/s")
    for command, part, head in commands:
        run(command, *SMALL, "--data", quintuplets, "--repeats", 1, "--json", tmp_path / "x.json")
        record, output = json.loads((tmp_path / "x.json").read_text()), capsys.readouterr().out
        assert record["parts_ms"][part] > 0 and part in output and head in output and "G's" not in output
        assert command == "data" or record["flops"]["inference, whole"] > 1e8 and record["flops"]["ranker"] > 1e6
    with pytest.raises(runs.UserError, match="leave out --fast and --precision"):
        run("evaluate", *SMALL, "--data", quintuplets, "--fast", "compile")


@pytest.mark.parametrize("lambda_a", [0, 0.1])
def test_parts_and_whole_steps_of_a_fine_tuning(quintuplets, tmp_path, capsys, monkeypatch, lambda_a):
    """In bf16, with the rank that is asked for, the reward made once, as finetune_lora.py runs it."""
    made, ranks, autocast = [], [], set()
    create, add, forward = iqa.create_reward, lora.add_lora, archs.SRVGGNetCompact.forward

    def create_reward(names, *args, **options):
        made.append(names)
        return create(names, *args, **options)

    def add_lora(net, targets, rank):
        ranks.append(rank)
        return add(net, targets, rank)

    def through(self, x):
        autocast.add(torch.is_autocast_enabled("cpu"))
        return forward(self, x)
    monkeypatch.setattr(iqa, "create_reward", create_reward)
    monkeypatch.setattr(lora, "add_lora", add_lora)
    monkeypatch.setattr(archs.SRVGGNetCompact, "forward", through)
    run("finetune", *COMMON, "--data", quintuplets, "--repeats", 1, "--steps", 2, "--rank", 3, "--lambda-a", lambda_a,
        "--precision", "bf16", "--json", tmp_path / "x.json")
    record, output = json.loads((tmp_path / "x.json").read_text()), capsys.readouterr().out
    expected = {"decode, one worker", "to the device", "degradation", "scoring", "G forward", "G backward, L1",
                "reward with gradient", "optimiser, EMA"} | ({"D in G's loss", "D"} if lambda_a else set())
    assert set(record["parts_ms"]) == expected and {"G", "scoring", "reward with gradient"} <= set(record["flops"])
    assert made == [["ranker"]] and ranks == [3] and autocast == {True} and record["whole"]["ms"] > 0
    assert "finetune_lora.py: " in output and output.count("images/s") == 2 and "parts eager, bf16" in output


def test_a_fine_tuning_of_a_run_takes_its_values(quintuplets, tmp_path, script):
    runs.save_weights(tmp_path / "init.pth", archs.create("compact-small").state_dict())
    script("train.py", *SMALL, "--lambda-a", 0, "--data", quintuplets, "--total-steps", 1, "--out", tmp_path / "base",
           "--init", tmp_path / "init.pth")
    run("finetune", "--base", tmp_path / "base", "--reward", "ranker", "--workers", 0, "--device", "cpu",
        "--threads", 1, "--data", quintuplets, "--repeats", 1, "--steps", 1, "--json", tmp_path / "x.json")
    record = json.loads((tmp_path / "x.json").read_text())
    # the run's batch
    assert record["images"] == 2 and record["whole"]["ms"] > 0


def test_compile_applies_to_the_parts_and_work_is_counted_eager(quintuplets, tmp_path, capsys, compiled):
    for on in (False, True):
        run("train", *SMALL, "--data", quintuplets, "--repeats", 1, "--steps", 0, "--json", tmp_path / f"{on}.json",
            *["--fast", "compile"] * on)
    assert compiled == ["SRVGGNetCompact"] and "parts compiled, fp32" in capsys.readouterr().out
    eager, both = (json.loads((tmp_path / f"{on}.json").read_text()) for on in (False, True))
    assert eager["flops"] == both["flops"] and eager["flops"]["G"] > 0


def test_growth_is_measured_in_turn(tmp_path, capsys, monkeypatch):
    """The processes of the settings are left out, that of the drift is not."""
    whole, measured = bench.whole_steps, []

    def whole_steps(flags, args, steps, windows=2):
        measured.append(bench.train.parse_args(flags))
        made_up = [{"ms": 1.0, "wait": 0.0, "memory": 1.0}]
        return whole(flags, args, steps, windows=windows) if windows == 20 else made_up
    monkeypatch.setattr(bench, "whole_steps", whole_steps)
    run("grow", *SMALL, "--repeats", 1, "--steps", 1, "--rounds", 1, "--drift", 20, "--json", tmp_path / "g.json")
    record, output = json.loads((tmp_path / "g.json").read_text()), capsys.readouterr().out
    settings = {(axis, factor): 1 for axis in ("batch", "crop", "sets") for factor in (1, 2, 4)}
    assert {(row["what"], row["factor"]): len(row["rounds"]) for row in record["grow"]} == settings
    names = {"whole step", "decode, one worker", "degradation", "scoring", "memory"}
    assert all(names == set(values) for row in record["grow"] for values in row["rounds"])
    assert [args.batch_size for args in measured[:3]] == [2, 4, 8]
    assert [args.crop for args in measured[3:6]] == [32, 40, 64]
    assert len(record["drift"]) == 19 and "measured 2 times" in output and "step time drifts by" in output


@pytest.mark.fast
@pytest.mark.parametrize("words", [["grow", "--drift", "10"], ["grow", "--steps", "0"], ["samplers", "--steps", "0"]])
def test_what_cannot_be_measured_is_refused_at_once(words):
    with pytest.raises(SystemExit):
        bench.parse_args(words)


@pytest.mark.fast
def test_flags_with_an_equals_sign_are_heard(tmp_path):
    flags = bench.parse_args(["data", "--data=a b", "--reward", "ranker=2"])[1]
    assert flags == ["--data", "a b", "--reward", "ranker=2"]
    with pytest.raises(runs.UserError, match="nowhere"):
        run("data", *SMALL, f"--data={tmp_path / 'nowhere'}")


@pytest.mark.fast
def test_an_unwritable_json_is_refused_before_the_work(quintuplets, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "synthetic_sets", lambda *a: pytest.fail("worked before it was refused"))
    for command in bench.COMMANDS:
        with pytest.raises(runs.UserError, match="--json .*: a folder; name a file"):
            run(command, *SMALL, "--json", tmp_path)


def test_only_static_scores_are_left_in_the_working_directory(quintuplets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("train", *SMALL, "--sampler", "sma", "--data", quintuplets, "--repeats", 1, "--steps", 2)
    assert all(path.is_relative_to(tmp_path / "runs/scores") for path in tmp_path.rglob("*") if path.is_file())


def test_samplers_in_turn(quintuplets, tmp_path, capsys, script):
    root = shutil.copytree(quintuplets, tmp_path / "set")
    script("prepare.atlas", root, "--reward", "ranker", "--crop", 32, "--stride", 16, "--device", "cpu")
    run("samplers", *SMALL, "--data", root, "--atlas", root / "atlas/ranker-32-16.npy", "--repeats", 1, "--online", 1,
        "--steps", 2, "--json", tmp_path / "s.json")
    output, record = capsys.readouterr().out, json.loads((tmp_path / "s.json").read_text())
    assert {name: len(ms) for name, ms in record["ms"].items()} == {"rand": 1, "amo, atlas": 1, "amo, online": 1}
    assert "1 alternating pairs" in output and "scoring online is" in output
    with pytest.raises(runs.UserError, match="--atlas FILE names the table"):
        run("samplers", *SMALL, "--data", root)


def test_musiqs_architecture_without_weights_is_a_reward():
    reward = iqa.create_reward(["experiments.bench:untrained_musiq"])
    assert reward(torch.rand(2, 3, 64, 64)).shape == (2,)


@pytest.mark.fast
def test_help_and_unknown_flags(script):
    assert "--steps" in script("experiments.bench", "train", "--help").stdout
    done = script("experiments.bench", "train", "--arch", "compact-small", "--no-such-flag", check=False)
    assert done.returncode == 2 and "unrecognized arguments: --no-such-flag" in done.stderr


@pytest.mark.fast
def test_memory_of_a_process_is_counted(capsys):
    run("ranks")
    output = capsys.readouterr().out
    nets = archs.SwinIR(), archs.UNetDiscriminatorSN()
    g, d = (sum(p.numel() for p in net.parameters()) for net in nets)
    buffers = [sum(b.numel() * b.element_size() for b in net.buffers()) for net in nets]
    assert 2 * buffers[0] + buffers[1] > 20e6
    held = 4 * (5 * g + 4 * d) + 2 * buffers[0] + buffers[1]
    pool = 160 * 3 * (65536 + 4096)
    row = f"| swinir | {g:,} | {d:,} | {held / 1e6:.0f} | {pool / 1e6:.0f} | {4 * (g + d) / 1e6:.1f} | 8 |"
    assert row in output


def test_whole_steps_of_a_set_with_a_test_split(quintuplets, tmp_path):
    """train.py validates at its last step there."""
    root = shutil.copytree(quintuplets, tmp_path / "set")
    shutil.copytree(root / "Train/images/0-6", root / "Test/GT/images/t")
    for path in list((root / "Train/images").rglob("photo2*")):
        path.unlink()
    for path in list((root / "Test").rglob("photo[01]*")):
        path.unlink()
    run("train", *SMALL, "--data", root, "--repeats", 1, "--steps", 2, "--json", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["whole"]["ms"] > 0
    with pytest.raises(runs.UserError, match="takes two files of --json with parts"):
        (tmp_path / "b.json").write_text("{}")
        run("compare", tmp_path / "a.json", tmp_path / "b.json")


@pytest.mark.fast
def test_tricks_compare_equal_sums(tmp_path):
    assert all(callable(getattr(tricks, name)) for name in tricks.NAMES)
    torch.manual_seed(0)
    # heads of 30 channels
    attention, x, mask = archs.WindowAttention(60, 8, 2), torch.rand(1, 4, 64, 60), archs.shift_mask(16, 16, 8, 4)
    for other in (tricks.written_out, tricks.padded(True), tricks.padded(False)):
        for m in (None, mask):
            assert torch.allclose(other(attention, x, m), attention(x, m), atol=1e-6)
    variants = tricks.perceptual(tricks.vgg_file(tmp_path), 1, 32, torch.device("cpu"))
    assert tricks.apart(*([run()] for run in variants.values())) < 1e-4


@pytest.mark.fast
def test_tricks_are_measured_in_turn():
    order = []
    m = tricks.Measurements(torch.device("cpu"), repeats=3)
    m.compare("sums", {"old": lambda: order.append("old"), "new": lambda: order.append("new")}, new={"apart": 0.0})
    assert order == ["old", "new", "new", "old"] * 2
    (row,) = m.rows
    assert row["trick"] == "new" and row["n"] == 3 and row["apart"] == 0 and row["least"] <= row["most"]
