"""runs.py: seeds, atomic files, the run folder's rules, window averages."""
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from scipy import stats

import archs
import iqa
import runs

pytestmark = pytest.mark.fast
ALONE = runs.World(0, 1, torch.device("cpu"))


def test_seeds_differ_in_every_argument_and_are_the_same_everywhere():
    keys = (0, 1, 2, "crop"), (1, 1, 2, "crop"), (0, 2, 2, "crop"), (0, 1, 3, "crop"), (0, 1, 2, "flip")
    seeds = [runs.sample_seed(*key) for key in keys]
    assert len(set(seeds)) == 5 and all(0 <= s < 2 ** 63 for s in seeds)
    code = "import runs; print(runs.sample_seed(0, 1, 2, 'crop'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=runs.REPO,
                           env={**os.environ, "PYTHONHASHSEED": "7"})
    assert int(other.stdout) == seeds[0]


def test_a_digest_is_that_of_the_bytes_wherever_they_are(tmp_path):
    (tmp_path / "file").write_bytes(b"[1, 2]")
    table = np.arange(6, dtype=np.float32)
    digest = runs.digest(tmp_path / "file")
    assert digest == runs.digest(b"[1, 2]") == runs.digest([1, 2]) == "3a316d6d3226f84c1e46e444"
    assert runs.digest(table.data) == runs.digest(table.tobytes()) != digest
    assert runs.digest({"b": 1, "a": 2}) == runs.digest({"a": 2, "b": 1})


def test_first_draws_of_neighbouring_seeds_are_uniform_and_uncorrelated():
    u = np.array([[np.random.default_rng(runs.sample_seed(0, step, lane, "crop")).random() for lane in range(8)]
                  for step in range(250)])
    assert stats.kstest(u.ravel(), "uniform").pvalue > 0.01
    assert stats.pearsonr(u[:, 0], u[:, 1]).pvalue > 0.01
    assert stats.pearsonr(u[:-1].ravel(), u[1:].ravel()).pvalue > 0.01


@pytest.mark.parametrize("precision, tf32, dtype", [
    ("fp32", False, torch.float32), ("tf32", True, torch.float32), ("bf16", False, torch.bfloat16)])
def test_precision_is_what_was_asked_for(monkeypatch, capsys, precision, tf32, dtype):
    monkeypatch.setattr(runs, "cpu_flags", lambda: ["avx2"])
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    original = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    try:
        world, seeds, autocast = runs.start_training("cpu", 0, 3, precision)
        assert ("fp32 is faster on a CPU without units" in capsys.readouterr().err) == (precision == "bf16")
        with autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
        assert cudnn.allow_tf32 == matmul.allow_tf32 == tf32
        assert seeds(1, 2, "crop") == runs.sample_seed(3, 1, 2, "crop") and world.size == 1
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = original


@pytest.mark.parametrize("precision, tf32, dtype", [
    ("fp32", False, torch.float32), ("tf32", True, torch.float32), ("bf16", False, torch.bfloat16)])
def test_networks_for_inference_run_in_a_precision_and_nothing_else_does(precision, tf32, dtype):
    flags, seen = (torch.backends.cuda.matmul, torch.backends.cudnn), []

    class Net(torch.nn.Conv2d):
        def forward(self, x):
            y = super().forward(x)
            seen.append((y.dtype, *(flag.allow_tf32 for flag in flags)))
            return y
    runs.start_world("cpu", 0)
    net = archs.ready(Net(3, 3, 1), torch.device("cpu"), precision)
    net(torch.rand(1, 3, 8, 8))
    with pytest.raises(RuntimeError):
        net(torch.rand(1, 5, 8, 8))
    assert seen == [(dtype, tf32, tf32)] and not any(flag.allow_tf32 for flag in flags)
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


FOUND = {"swinir": {"faster": 3.21, "largest": 1.62}, "rrdbnet": {"faster": 0.25}}


@pytest.mark.parametrize("flags, precision, arch, remark", [
    (["avx512f", "amx_bf16"], "fp32", "swinir",
     "about 3.2 times as fast on a CPU with amx_bf16 (measured), differences of up to 1.6 grey levels"),
    (["amx_bf16"], "fp32", "compact", "may be faster, this CPU has amx_bf16"),
    (["avx512_bf16"], "tf32", "swinir", "may be faster, this CPU has avx512_bf16"),
    (["amx_bf16"], "bf16", "swinir", ""),
    (["avx2", "avx512f"], "fp32", "swinir", ""),
    ([], "bf16", "rrdbnet", "fp32 is about 4 times as fast (measured) on a CPU without"),
    ([], "bf16", "swinir", "fp32 is faster on a CPU without")])
def test_what_bf16_would_gain_or_costs_on_this_cpu(monkeypatch, tmp_path, flags, precision, arch, remark):
    for unit in ("amx_bf16", "none"):
        found = FOUND if unit == "amx_bf16" else {"rrdbnet": FOUND["rrdbnet"]}
        runs.save_json(tmp_path / "results" / "bench" / f"precision-{unit}.json", {"found": found})
    monkeypatch.setattr(runs, "REPO", tmp_path)
    monkeypatch.setattr(runs, "cpu_flags", lambda: flags)
    said = runs.precision_remark(torch.device("cpu"), precision, arch)
    assert remark in said and bool(said) == bool(remark)
    assert runs.precision_remark(torch.device("cuda"), precision, arch) == ""


def test_peak_memory_is_this_process_own():
    """Started by a process that holds 600 MB."""
    ballast = np.ones(75_000_000)
    code = "import torch, runs; print(runs.peak_memory(torch.device('cpu')))"
    child = subprocess.run([sys.executable, "-c", code], cwd=runs.REPO, capture_output=True, text=True, check=True)
    here = runs.peak_memory(torch.device("cpu"))
    assert 0.05 < float(child.stdout) < here - 0.3 and here > ballast.nbytes / 2 ** 30


def test_an_interval_is_due_at_its_multiples_and_at_the_last_step():
    assert [step for step in range(1, 11) if runs.due(step, 10, 4)] == [4, 8, 10]
    assert [step for step in range(1, 11) if runs.due(step, 10, 0)] == [10]


def test_lanes_are_contiguous_disjoint_and_complete():
    lanes = [lane for rank in range(4) for lane in runs.World(rank, 4, None).lanes(12)]
    assert lanes == list(range(12))
    with pytest.raises(ValueError, match="--batch-size 12 does not divide by 5 processes"):
        runs.World(0, 5, None).lanes(12)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    runs.write_atomic(tmp_path / "a", lambda t: t.write_text("old"))

    def fail(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space"):
        runs.write_atomic(tmp_path / "a", fail)
    assert (tmp_path / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_find_weights_takes_the_newest_of_a_run(tmp_path):
    for step in (50, 100):
        runs.save_weights(tmp_path / "weights" / f"ema_{step:07d}.pth", {"w": torch.zeros(1)}, {"w": torch.ones(1)})
    assert runs.find_weights(tmp_path, "").name == "ema_0000100.pth"
    saved = torch.load(runs.find_weights(tmp_path, ""), weights_only=True)
    assert list(saved) == ["params_ema", "params"] and saved["params_ema"]["w"] == 1
    with pytest.raises(ValueError, match="do this"):
        runs.find_weights(tmp_path / "none", "do this")


def test_events_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    run = runs.Run(tmp_path / "run", {"lr": 1}, ALONE)
    run.open()
    for step in (1, 2, 3):
        run.event(step, "train", pix=step / 10)
        if step == 2:
            run.save(step, {})
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        # a process killed while writing
        f.write('{"step": 4, "spl')
    resumed = runs.Run(tmp_path / "run", {"lr": 2}, ALONE, resume="must")
    resumed.open()
    steps = [json.loads(line)["step"] for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert resumed.start_step == 2 and steps == [1, 2]
    assert "changed: lr 1 -> 2" in (tmp_path / "run" / "log.txt").read_text()
    for lr in (1, 2):
        record = json.loads((tmp_path / "run" / "args.json").read_text())
        assert record["args"] == {"lr": lr} and record["command"] == sys.argv
        # from its next checkpoint on
        resumed.save(3, {})


def test_how_a_run_is_called_again_is_no_change_of_it(tmp_path):
    run = runs.Run(tmp_path / "run", {"lr": 1, "words": [], "resume": "no"}, ALONE)
    run.open()
    run.save(1, {})
    resumed = runs.Run(tmp_path / "run", {"lr": 1, "words": ["--resume"], "resume": "must"}, ALONE, resume="must")
    assert resumed.changed == []


def test_args_json_says_what_made_the_run(tmp_path):
    run = runs.Run(tmp_path / "run", {"data": tmp_path, "lr": 1e-4}, ALONE)
    run.open()
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert record["args"] == {"data": str(tmp_path), "lr": 1e-4}
    assert {"command", "commit", "torch", "device", "processes"} <= set(record)


def test_meter_averages_a_window_and_survives_a_checkpoint():
    meter = runs.Meter(ALONE)
    meter.add(1, pix=torch.tensor(1.0))
    restored = runs.Meter(ALONE, meter.state_dict())
    for m in (meter, restored):
        m.add(2, pix=torch.tensor(2.0))
        assert m.read()[0] == {"pix": 1.5}


def test_meter_names_the_first_non_finite_step_and_term():
    meter = runs.Meter(ALONE)
    for step, value in ((7, 1.0), (8, float("inf")), (9, float("nan"))):
        meter.add(step, pix=torch.tensor(1.0), percep=torch.tensor(value))
    with pytest.raises(ValueError, match="percep is not finite at step 8; .*Samples: of 8"):
        meter.check_finite(lambda step: f"of {step}")


def test_user_errors_are_one_line_and_all_others_keep_their_traceback(tmp_path):
    def run(body, **environment):
        (tmp_path / "x.py").write_text(f"import runs\ndef main():\n    {body}\nruns.cli(main)\n")
        return subprocess.run([sys.executable, str(tmp_path / "x.py")], capture_output=True, text=True,
                              env=runs.python_path() | environment)
    own = run("import archs; archs.read_file('nowhere.pth')")
    message = "nowhere.pth: no such weights file; public weights: python -m prepare.weights list"
    assert own.returncode == 2 and own.stderr == f"x.py: error: {message}\n"
    assert "Traceback" in run("import archs; archs.read_file('nowhere.pth')", IQASR_TRACEBACK="1").stderr
    missing = run("open('nowhere.txt')")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "nowhere.txt" in missing.stderr
    for bug in ("int('x')", "import archs; archs.create('swinir-small', upsampler='no')",
                "raise OSError('of no file')"):
        result = run(bug)
        assert result.returncode == 1 and "Traceback" in result.stderr, bug


EXITING = """
import atexit, sys
import torch.distributed as dist
import runs
def main():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(lambda: print("in the group:", runs.in_group()))
    sys.exit(int(sys.argv[1]))
runs.cli(main)
"""


@pytest.mark.parametrize("code, ends", [(0, "in the group: False\n"), (3, "")])
def test_a_script_that_exits_by_itself_leaves_its_group_first(tmp_path, code, ends):
    (tmp_path / "x.py").write_text(EXITING)
    done = subprocess.run([sys.executable, str(tmp_path / "x.py"), str(code)], capture_output=True, text=True,
                          env=runs.python_path())
    assert (done.returncode, done.stdout) == (code, ends), done.stderr


@pytest.mark.parametrize("step, total, terms, lr, speed", [
    (299_900, 300_000, {"adv": 0.0812}, 1e-4, 12.123), (100, 300_000, {"adv": 10.812, "q": -65.4321}, 2.5e-6, 0.71)])
def test_a_progress_line_has_at_most_110_characters(tmp_path, capsys, monkeypatch, step, total, terms, lr, speed):
    run = runs.Run(tmp_path / "run", {}, ALONE)
    run.open()
    meter = runs.Meter(ALONE)
    terms = {"pix": 0.03123, "percep": 1.1043, **terms, "D_real": 0.6234, "D_fake": 0.4123, "score": 61.3}
    monkeypatch.setattr(meter, "read", lambda: (terms, speed, 0.12))
    run.progress(step, total, meter, lr, {"original": 3, "01": 97})
    first, second = capsys.readouterr().out.splitlines()
    assert len(first) <= 110 and f"step {step}/{total} |" in first
    assert first.endswith("eta 0:00:08" if step > 100 else "eta 117:19:54"), first
    assert second.strip() == "chosen so far: original 3% 01 97%; score of the fresh pairs 61.3"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_gets_a_bar_and_a_file_gets_lines(tmp_path, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    run = runs.Run(tmp_path / "run", {}, ALONE)
    run.open()
    for step in run.steps(3):
        run.say(f"said {step}")
        run.say(f"shown {step}", quiet=True)
    printed = capsys.readouterr()
    assert "said 3" in printed.out and (tmp_path / "run" / "log.txt").read_text().count("shown") == 3
    assert ("3/3" in printed.err) == terminal and ("shown 3" in printed.out) == (not terminal)


LAUNCHED = """
import os, sys, time
import runs
def main():
    if os.environ["RANK"] in sys.argv[1:]:
        raise runs.UserError("this cannot be")
    time.sleep(60)
runs.cli(main)
"""


@pytest.mark.parametrize("ranks", [["0", "1"], ["1"]])
def test_under_torchrun_an_error_is_printed_once_and_the_summary_repeats_it(script, tmp_path, ranks):
    (tmp_path / "x.py").write_text(LAUNCHED)
    result = script(tmp_path / "x.py", *ranks, processes=2, check=False)
    assert result.returncode
    lines = [line for line in result.stderr.splitlines() if line.startswith("x.py: error:")]
    assert lines == ["x.py: error: this cannot be"]
    assert "traceback : x.py: error: this cannot be" in result.stderr


@pytest.mark.parametrize("owner, minutes, message", [
    # another host: only its age, and the job, tell
    ({"host": "elsewhere"}, 0, "process 1 on elsewhere is writing there .*: choose another --out"),
    ({"host": "elsewhere"}, 9, "is writing there"), ({"host": "elsewhere"}, 11, None),
    ({"host": "elsewhere", "job": "7"}, 0, None), ({"host": "elsewhere", "job": "8"}, 0, "is writing there"),
    # this host: the process
    ({"pid": 2 ** 22 + 1}, 0, None), ({"pid": os.getppid()}, 0, None),
    ({"pid": os.getppid(), "started": "alive"}, 0, "is writing there"),
    ({"pid": os.getppid(), "started": "alive", "job": "7"}, 0, "is writing there"),
    # half written
    ("{", 0, "is writing there"), ("{", 11, None)])
def test_a_lock_is_stale_by_its_process_its_job_or_its_age(tmp_path, monkeypatch, owner, minutes, message):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    if owner != "{":
        alive = runs.psutil.Process(os.getppid()).create_time()
        owner = {"host": runs.platform.node(), "pid": 1, "started": 1.0, "job": None} | owner
        owner = json.dumps(owner | {"started": alive if owner["started"] == "alive" else 1.0})
    file = tmp_path / "lock.json"
    file.write_text(owner)
    os.utime(file, (time.time() - 60 * minutes,) * 2)
    lock = runs.Lock(tmp_path)
    if message:
        with pytest.raises(runs.UserError, match=message):
            lock.stale()
    else:
        assert lock.take() and json.loads(file.read_text()) == lock.own
        runs.Lock.release(file)
        assert not file.exists()


def test_several_tasks_of_srun_are_refused_without_torchrun(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(runs.UserError, match="srun has started 4 processes.* torchrun --nproc_per_node 4 "):
        runs.start_world("cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert runs.start_world("cpu").size == 1
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert runs.start_world("cpu").size == 1


def test_a_full_disk_is_named_with_the_file(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    disk = next(folder for folder in (full, *full.parents) if folder.is_mount())
    message = rf"No space left on device \(disk {disk}, \d+ MB free\): '{full}/"

    def onto_full_disk(name):
        # what is written goes to the device that is always full
        (full / name).symlink_to("/dev/full")
        return full / name
    for write in (lambda t: torch.save({"x": torch.zeros(1000)}, t), lambda t: t.write_text("x" * 10_000)):
        onto_full_disk("last.pt.tmp")
        with pytest.raises(OSError, match=message + "last.pt'"):
            runs.write_atomic(full / "last.pt", write)
        assert not list(full.iterdir())
    with pytest.raises(OSError, match=message + "log.txt'"):
        runs.append(onto_full_disk("log.txt"), "a line")
    from images import save_image
    with pytest.raises(OSError, match=message + "a.png'"):
        save_image(onto_full_disk("a.png"), torch.rand(3, 64, 64))
    with pytest.raises(OSError, match=message + "scores.0.jsonl'"), iqa.ScoreCache(full, "scores", 0) as cache:
        # after the earlier lines were read: /dev/full gives zeros without end
        cache.out.close()
        cache.out = open(onto_full_disk("scores.0.jsonl.full"), "ab", buffering=0)
        cache.add("key", 1.0)


def test_a_full_disk_is_one_line_for_the_user(tmp_path):
    (tmp_path / "x.py").write_text(
        "import torch, runs\ndef main():\n    runs.save_weights('w.pth', {'x': torch.zeros(9)})\nruns.cli(main)\n")
    (tmp_path / "w.pth.tmp").symlink_to("/dev/full")
    done = subprocess.run([sys.executable, "x.py"], capture_output=True, text=True, cwd=tmp_path,
                          env=runs.python_path())
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "w.pth" in done.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_printing_never_raises(tmp_path, encoding):
    (tmp_path / "x.py").write_text("import runs\ndef main():\n    print('\\u2191 \\u4e2d')\n"
                                   "    raise runs.UserError('\\u2191')\n"
                                   "runs.cli(main)\n")
    done = subprocess.run([sys.executable, "x.py"], capture_output=True, cwd=tmp_path,
                          env=runs.python_path() | {"PYTHONIOENCODING": encoding})
    assert done.returncode == 2 and done.stdout.split() == [b"?", b"?"] and done.stderr.strip() == b"x.py: error: ?"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_neither_do_help_and_errors_of_flags(tmp_path, encoding):
    (tmp_path / "x.py").write_text("import runs\np = runs.Parser(description='\u2191')\n"
                                   "p.add_argument('--n', type=int)\np.parse_args()\n")
    for words, status in ((["--help"], 0), (["--n", "\u4e2d"], 2)):
        done = subprocess.run([sys.executable, "x.py", *words], capture_output=True, cwd=tmp_path,
                              env=runs.python_path() | {"PYTHONIOENCODING": encoding})
        assert done.returncode == status and b"?" in done.stdout + done.stderr and b"Traceback" not in done.stderr


def test_work_goes_on_when_nobody_reads_the_output(tmp_path):
    """As behind `| head -1`, and with standard output in a file on a full disk."""
    (tmp_path / "x.py").write_text("import pathlib, runs\ndef main():\n    for k in range(20_000):\n        print(k)\n"
                                   "    pathlib.Path('done').touch()\nruns.cli(main)\n")
    for unread in (None, open("/dev/full", "w")):
        process = subprocess.Popen([sys.executable, "x.py"], cwd=tmp_path, env=runs.python_path(),
                                   stdout=unread or subprocess.PIPE, stderr=subprocess.PIPE)
        if unread is None:
            process.stdout.close()
        errors = process.stderr.read()
        assert process.wait() == 0 and not errors
        (tmp_path / "done").unlink()


def test_a_closed_output_ends_nothing(tmp_path):
    (tmp_path / "x.py").write_text("import pathlib, runs\ndef main():\n    print(1)\n    pathlib.Path('done').touch()\n"
                                   "runs.cli(main)\n")
    done = subprocess.run(f"exec {sys.executable} x.py >&- 2>&-", shell=True, cwd=tmp_path, env=runs.python_path())
    assert done.returncode == 0 and (tmp_path / "done").exists()


def test_weights_that_are_not_finite_are_not_saved():
    """A loss may be finite where its gradient is not, as that of a square root at 0."""
    meter, net = runs.Meter(runs.World(0, 1, torch.device("cpu"))), torch.nn.Linear(2, 1)
    meter.add(1, pix=torch.tensor(0.5))
    meter.check_finite(str, net, None)
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    (net(torch.zeros(1, 2)) * 0).abs().sqrt().sum().backward()
    optimiser.step()
    with pytest.raises(runs.UserError, match="the weights are not finite any more.*The last checkpoint is older"):
        meter.check_finite(str, net, None)


def test_more_than_a_tenth_of_the_samples_of_100_steps_without_a_reward_are_too_many():
    meter = runs.Meter(runs.World(0, 1, torch.device("cpu")))
    with pytest.raises(runs.UserError, match="98 rewards had no finite score in the 100 steps up to step 100; more "
                                             "than 40 are too many"):
        for step in range(1, 101):
            meter.leave_out(step, "rewards", torch.tensor(0.25 if step > 2 else 0.0), 4, limit=0.4)
    assert step == 100


def test_the_recorded_commit_is_dirty_if_code_was_changed_and_not_if_results_were(tmp_path, monkeypatch):
    def git(*words):
        return subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words],
                              capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / "results").mkdir()
    for file in ("train.py", "results/row.json"):
        (tmp_path / file).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(runs, "REPO", tmp_path)
    (tmp_path / "results" / "row.json").write_text("2")
    assert runs.describe_machine()["commit"] == git("rev-parse", "HEAD")
    (tmp_path / "train.py").write_text("2")
    assert runs.describe_machine()["commit"] == git("rev-parse", "HEAD") + "+dirty"
