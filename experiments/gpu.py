"""Everything worth measuring on a CUDA machine, best first, within ten minutes: what `make gpu` runs.

    python -m experiments.gpu                                eight minutes: device, checks, speed, exact
    python -m experiments.gpu --only speed --minutes 4       one job
    python -m experiments.gpu --only selfsup                 an experiment; the same command goes on with its next rows
    python -m experiments.gpu --device cpu --minutes 10      a rehearsal in small

Needs PyTorch, torchvision, NumPy, SciPy, scikit-image, Pillow, tqdm, psutil and pytest only, and downloads nothing.
Every job is a process of its own with a time limit, and writes its file again after each of its parts, so that what is
cut off costs itself alone.
OUT gets device.json, checks.json, speed.json, exact.json, summary.md (what to read), log.txt, pictures.zip.

Without --data the quintuplets are made up (512 x 512 pixels, packed); without --vgg-weights VGG19 has random weights,
and MUSIQ always has: their speed does not depend on them. Batches are those of one of the paper's four GPUs.
"""
import sys
import time
from pathlib import Path

import runs

# a job's time counts from here: the imports take seconds
STARTED = time.monotonic()
# {job: (share of the minutes, what it does)}, in order of value
JOBS = {
    "device": (0.06, "matrix products per second in each precision, bandwidth of a copy"),
    "checks": (0.15, "tests/test_gpu*.py: CPU against CUDA, no waiting, resume"),
    "speed": (0.6, "training, fine-tuning, inference: images/s, share of the peak, memory, where the time goes"),
    "exact": (0.19, "bitwise resume, operations without a deterministic form, 500 steps in bf16"),
}
# {experiment: (its module, flags that a device machine needs)}: only by name, each as long as --minutes, with its data
# and runs/vgg19.pth where experiments/README.md says; no metric that is a package of its own
EXPERIMENTS = {"paper_network": ("paper_network", ("--scale gpu --jobs 1 --seeds 0 --unseen --slow "
                                                   "--rewards rewards/ranker3.pth ranker").split()),
               "selfsup": ("self_supervision", "--scale gpu".split()),
               "dpo": ("preferences", ("--scale gpu --jobs 1 --seeds 0 "
                                       "--watch psnr rewards.cnniqa:build ranker").split())}


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for the results")
    p.add_argument("--only", nargs="+", choices=[*JOBS, *EXPERIMENTS], default=list(JOBS), metavar="JOB",
                   help=f"some of {', '.join([*JOBS, *EXPERIMENTS])}; default: {', '.join(JOBS)}")
    p.add_argument("--minutes", type=runs.RATE, default=8.0, help="for all jobs together; each has its share")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu: a rehearsal with small networks")
    p.add_argument("--data", type=Path, metavar="DIR", help="quintuplets, packed or not; default: made up")
    p.add_argument("--vgg-weights", type=Path, metavar="FILE",
                   help="VGG19, also in 8 bits; default: random weights, for experiments on CUDA runs/vgg19.pth")
    # what the jobs' processes are told
    p.add_argument("--job", choices=[*JOBS, *EXPERIMENTS], help="run this job in this process, within --minutes")
    return p.parse_args(argv)


# before the imports that take seconds, so that --help answers at once
ARGS = parse_args() if __name__ == "__main__" else None

import gc
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import traceback
import warnings
import zipfile
from functools import partial
from xml.etree import ElementTree

# cuBLAS reads it once, before its first product; it needs it for results that are bitwise the same
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

import archs
import finetune_lora
import train
from experiments import bench
from experiments.steps import peak_flops, step_parts, timed
from prepare import atlas, demo_set, pack, vgg19

# flags of the trainings whose speed is measured: one GPU's share of the paper's batch, group and pool
FULL = {
    "swinir": ["--arch", "swinir", "--batch-size", 8, "--group-size", 8, "--pool-size", 160],
    "rrdbnet": ["--arch", "rrdbnet", "--batch-size", 12, "--group-size", 12, "--pool-size", 180],
}
TINY = ["--batch-size", 2, "--group-size", 2, "--pool-size", 4, "--crop", 32, "--d-features", 4, "--lambda-p", 0]
SMALL = {"swinir": ["--arch", "swinir-small", *TINY], "rrdbnet": ["--arch", "rrdbnet-small", *TINY]}
# MUSIQ with random weights, in the precision of the networks
REWARDS = {"fp32": "rewards.musiq:untrained", "tf32": "rewards.musiq:untrained", "bf16": "rewards.musiq:untrained_bf16"}


class Report:
    """The file of a job: {"machine": ..., part: its result, or why there is none}, written again after every part.

    end: on the clock of time.monotonic.
    """

    def __init__(self, file, end):
        self.file, self.end = file, end
        self.record = {"machine": runs.describe_machine(), "command": sys.argv}

    def part(self, name, function, need=0):
        """Run a part that is expected to take `need` seconds, if there is time. -> its result, or None"""
        started, result = time.monotonic(), None
        print(f"\n## {name}", flush=True)
        if started + need > self.end:
            self.record[name] = {"skipped": f"no time left ({need} s are needed)"}
        else:
            try:
                result = function()
                self.record[name] = result | {"seconds": round(time.monotonic() - started, 1)}
            except (torch.OutOfMemoryError, MemoryError) as error:
                self.record[name] = {"skipped": f"does not fit into memory ({' '.join(str(error).split())[:120]})"}
            # argparse ends with SystemExit
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                self.record[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        # after the handler, which held the tensors of a failed part
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(json.dumps(self.record[name])[:2000], flush=True)
        runs.save_json(self.file, self.record)
        return result


# (a) the device

def job_device(args, report, work):
    device = torch.device(args.device)
    for precision in ("bf16", "tf32", "fp32"):
        def product(precision=precision):
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            return {"flops": peak_flops(device, precision)}
        report.part(f"matrix product, {precision}", product)

    def copy():
        source = torch.rand(2 ** 28 if device.type == "cuda" else 2 ** 24, device=device)
        target = torch.empty_like(source)
        ms = timed(lambda: target.copy_(source), 5, device)
        return {"bytes_per_s": 2 * source.numel() * source.element_size() / (ms / 1000)}
    report.part("copy", copy)
    if device.type == "cuda":
        report.part("memory", lambda: {"gib": torch.cuda.get_device_properties(0).total_memory / 2 ** 30})


# (b) tests on the device

def job_checks(args, report, work):
    def tests():
        # a process for each file, of the slowest for each of its networks, all at once
        parts = {file.stem: [file] for file in sorted(Path("tests").glob("test_gpu*.py"))}
        resume, = parts.pop("test_gpu_resume")
        parts |= {f"{resume.stem} {arch}": [resume, "-k", arch] for arch in ("compact", "rrdbnet", "swinir")}
        files = {name: work / f"{name}.xml" for name in parts}
        running = {name: subprocess.Popen([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                                           "--durations=5", f"--junitxml={files[name]}", *words],
                                          env=runs.python_path()) for name, words in parts.items()}

        def status_at(end):
            """{name: exit status, None: still running}, when all have ended or at `end`"""
            while None in (status := {name: process.poll() for name, process in running.items()}).values():
                if time.monotonic() >= end:
                    break
                time.sleep(0.2)
            return status
        status = status_at(report.end - 6)
        # by CUDA, say; 1: tests failed, 2: some could not be collected
        crashed = [f"{name} ended with {code}" for name, code in status.items() if code not in (None, 0, 1, 2)]
        for name in (name for name, code in status.items() if code is None):
            # an interrupted pytest writes what it has
            running[name].send_signal(signal.SIGINT)
        status = status_at(time.monotonic() + 4)
        cut_off = [name for name, code in status.items() if code in (None, 2, -signal.SIGINT)]
        ended = {name: result for name, result in files.items() if result.exists()}
        outcomes, measured, seconds = {}, {}, {}
        for case in (case for result in ended.values() for case in ElementTree.parse(result).iter("testcase")):
            if case.get("name") is None:
                # interrupted: set up, not ended
                continue
            state = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
            outcomes.setdefault(state, []).append(case.get("name"))
            seconds[case.get("name")] = float(case.get("time"))
            values = {p.get("name"): float(p.get("value")) for p in case.iter("property")}
            measured |= {case.get("name"): values} if values else {}
        return {"counts": {state: len(names) for state, names in outcomes.items()}, "measured": measured,
                "failed_tests": outcomes.get("failure", []) + outcomes.get("error", []) + crashed, "cut_off": cut_off,
                "seconds_of": seconds}
    report.part("tests", tests)


# (c) speed

def measured(args, words, steps, tune=False, parts=False):
    """{"images_per_s", "ms", "wait", "memory", ...} of train.py, or with tune finetune_lora.py, with these flags.

    parts: measure the parts of a step as well, one by one, and of each the share of its time in which the GPU computes.
    """
    words = [str(word) for word in words]
    if tune:
        # of the run that is tuned
        words = [*bench.without(words, "--group-size", "--d-features"), "--base", "none"]
    flags = (finetune_lora if tune else train).parse_args(words)
    record = {"flags": words}
    if parts:
        _, record["parts_ms"], record["flops"], record["busy"] = step_parts(flags, 3, tune)
        print(json.dumps(record["parts_ms"], indent=1))
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    whole = bench.whole_steps(words, flags, steps, script="finetune_lora.py" if tune else "train.py", inside=True)[0]
    return record | whole | {"images_per_s": 1000 * flags.batch_size / whole["ms"]}


def job_speed(args, report, work):
    cuda = args.device == "cuda"
    arguments, steps = (FULL, 12) if cuda else (SMALL, 2)
    common = ["--data", work / "data", "--vgg-weights", work / "vgg19.pth", "--device", args.device,
              "--workers", 8 if cuda else 0]
    ways = {"": [], ", graph": ["--fast", "graph"], ", graph, compiled": ["--fast", "graph", "compile"]}
    # Supp. 8.3: batch 32; micro-batches of one GPU's share
    tuned_batch = ["--batch-size", 32, "--accumulate", 4] if cuda else ["--batch-size", 4, "--accumulate", 2]

    def words(arch, precision, way, *more):
        reward = REWARDS[precision] if cuda else "ranker"
        return [*arguments[arch], *common, "--precision", precision, "--reward", reward, *ways[way], *more]

    def train_parts(precision, way="", need=15, parts=False):
        for arch in arguments:
            run = partial(measured, args, words(arch, precision, way), steps, parts=parts)
            report.part(f"train {arch}-amo, {precision}{way}", run, need)

    def tune_part(precision, way=""):
        run = partial(measured, args, words("swinir", precision, way, *tuned_batch), max(2, steps // 2), tune=True)
        report.part(f"finetune swinir lora, batch 32, {precision}{way}", run, 70 if "compiled" in way else 25)

    def atlas_part(precision, way=""):
        def in_turn():
            file = work / "atlas.npy"
            atlas.main(atlas.parse_args([str(work / "data"), "--reward", "ranker", "--crop", "256" if cuda else "32",
                                         "--stride", "64", "--device", args.device, "--out", str(file)]))
            # the last flag of a name counts
            flags = {"atlas": words("swinir", precision, way, "--reward", "none", "--atlas", file),
                     "rand": words("swinir", precision, way, "--reward", "none", "--sampler", "rand")}
            times = {name: [] for name in flags}
            for name in [*flags] * 2:
                times[name].append(measured(args, flags[name], steps)["ms"])
            medians = {name: statistics.median(values) for name, values in times.items()}
            return {"ms": times, "atlas_over_rand": medians["atlas"] / medians["rand"]}
        report.part(f"train swinir, {precision}{way}, atlas and rand", in_turn, 45 if cuda else 30)

    # in order of value; the compiler takes half a minute
    train_parts("bf16" if cuda else "fp32", parts=True)
    if cuda:
        train_parts("bf16", ", graph")
        train_parts("tf32", ", graph")
        tune_part("tf32", ", graph")
        tune_part("bf16", ", graph")
        atlas_part("bf16", ", graph")
    else:
        tune_part("fp32")
        atlas_part("fp32")
    report.part("inference", partial(inference, args), 10)
    if cuda:
        train_parts("bf16", ", graph, compiled", need=50)
        tune_part("bf16", ", graph, compiled")
        train_parts("fp32", ", graph", need=20)
        train_parts("tf32", ", graph, compiled", need=50)


def inference(args):
    """{network: {precision: ms of one LR image of 128 x 128 pixels}}"""
    device, result = torch.device(args.device), {}
    lq = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)).to(device)
    for arch in ("swinir", "rrdbnet", "compact") if args.device == "cuda" else ("compact-small",):
        net, result[arch] = archs.create(arch).to(device).eval(), {}
        if archs.is_convolutional(net):
            net = net.to(memory_format=torch.channels_last)
        for precision in ("fp32", "tf32", "bf16"):
            _, _, autocast = runs.start_training(args.device, 0, 0, precision)
            with autocast():
                result[arch][precision] = timed(partial(archs.upscale_tiled, net, lq), 5, device)
    return {"ms": result}


# (d) exactness

def last_state(folder):
    """{name: tensor} of everything in a run's checkpoint."""
    def walk(value, path):
        if torch.is_tensor(value):
            yield path, value
        elif isinstance(value, (dict, list, tuple)):
            for key, inner in (value.items() if isinstance(value, dict) else enumerate(value)):
                yield from walk(inner, f"{path}/{key}")
    return dict(walk(runs.load_checkpoint(folder / "ckpt" / "last.pt"), ""))


def largest_difference(a, b):
    """The largest difference between two checkpoints; None: bitwise equal."""
    a, b = last_state(a), last_state(b)
    if a.keys() != b.keys():
        raise RuntimeError(f"the checkpoints hold different tensors: {sorted(a.keys() ^ b.keys())[:4]}")
    unequal = [(a[name].double() - b[name].double()).abs().max().item() for name in a
               if not torch.equal(a[name], b[name])]
    return max(unequal, default=None)


def job_exact(args, report, work):
    cuda = args.device == "cuda"
    demo = work / "demo"
    demo_set.build_demo(demo)
    # nothing is validated
    shutil.rmtree(demo / "Test")
    common = ["--data", demo, "--vgg-weights", work / "vgg19.pth", "--device", args.device, "--load-size", 128,
              "--crop", 64, "--log-every", 4, "--val-every", 0, "--workers", 2, "--reward", "ranker",
              *([] if cuda else TINY)]

    def run(out, steps, *words):
        train.main(train.parse_args([str(word) for word in [*common, *words, "--out", work / out,
                                                            "--total-steps", steps, "--resume", "auto"]]))

    def resumed(arch, precision):
        runs.save_weights(work / f"{arch}.pth", archs.create(arch).state_dict())
        words = ["--arch", arch, *(["--d-features", 16] if cuda else []), "--init", work / f"{arch}.pth",
                 "--precision", precision]
        result = {}
        for mode in (False, True):
            torch.use_deterministic_algorithms(mode, warn_only=True)
            name = f"{arch}-{precision}-{mode}"
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    run(f"{name}-a", 8, *words)
                    run(f"{name}-b", 4, *words)
                    run(f"{name}-b", 8, *words)
            finally:
                torch.use_deterministic_algorithms(False)
            key = "deterministic" if mode else "plain"
            result[key] = {"largest_difference": largest_difference(work / f"{name}-a", work / f"{name}-b")}
            if mode:
                lines = {str(w.message).splitlines()[0] for w in caught if "deterministic" in str(w.message)}
                result["without_deterministic_form"] = sorted(lines)
        return result
    steps, precision = (500, "bf16") if cuda else (5, "fp32")

    def finite(arch):
        name = (FULL if cuda else SMALL)[arch][1]
        runs.save_weights(work / "init.pth", archs.create(name).state_dict())
        sizes = ["--batch-size", 4, "--group-size", 4, "--pool-size", 40, "--crop", 128] if cuda else []
        # the last flag of a name counts
        words = ["--arch", name, *sizes, "--init", work / "init.pth", "--precision", precision, "--reward",
                 REWARDS[precision], "--log-every", steps // 5, "--save-every", 0,
                 *(["--fast", "graph"] if cuda else [])]
        run(f"finite-{arch}", steps, *words)
        events = [json.loads(line) for line in (work / f"finite-{arch}" / "metrics.jsonl").read_text().splitlines()]
        # a term that is not finite would have ended the run
        return {"steps": steps, "losses": [event for event in events if event["split"] == "train"]}
    for arch in ("swinir", "rrdbnet"):
        report.part(f"{precision}, {arch}", partial(finite, arch), 45 * cuda)
    for arch in ("swinir-small", "rrdbnet-small", "compact-small") if cuda else ("compact-small",):
        for precision in ("fp32", "bf16"):
            report.part(f"resume, {arch}, {precision}", partial(resumed, arch, precision), 22 * cuda)
    with zipfile.ZipFile(args.out / "pictures.zip", "w") as pictures:
        for file in sorted(work.glob("finite-*/samples/*.png")):
            pictures.write(file, f"{file.parent.parent.name}-{file.name}")


# experiments

def job_experiment(args, report, work):
    """The rows of an experiment that are not there yet; each writes its own file into OUT/<experiment>/."""
    name, words = EXPERIMENTS[args.job]
    module = importlib.import_module(f"experiments.{name}")
    if args.device == "cpu" and hasattr(module, "rehearsal"):
        words = module.rehearsal(work)
    words = [*words, "--results", args.out / args.job, "--vgg-weights", work / "vgg19.pth"]

    def rows():
        module.main(module.parse_args([*map(str, words), "--device", args.device]))
        return {"files": sorted(file.name for file in (args.out / args.job).glob("*.json"))}
    report.part("rows", rows)


# all jobs

def prepare(args, work):
    """What the jobs read: work/data (quintuplets, packed) and work/vgg19.pth."""
    if args.vgg_weights is None and args.device == "cuda" and set(args.only) & set(EXPERIMENTS):
        args.vgg_weights = Path("runs/vgg19.pth")
        if not args.vgg_weights.is_file():
            raise runs.UserError(f"{args.vgg_weights}: experiments need VGG19; --vgg-weights names another file")
    if args.data:
        (work / "data").symlink_to(args.data.resolve())
    elif "speed" in args.only:
        bench.synthetic_sets(work / "data", *((16, 512) if args.device == "cuda" else (4, 96)))
        pack.main(pack.parse_args([str(work / "data")]))
    if args.vgg_weights is None:
        from torchvision.models import vgg19 as network
        torch.manual_seed(0)
        torch.save(network(weights=None).features.state_dict(), work / "vgg19.pth")
    elif any(value.dtype == torch.uint8 for value in archs.read_file(args.vgg_weights).values()):
        vgg19.main(vgg19.parse_args([str(args.vgg_weights), str(work / "vgg19.pth")]))
    else:
        (work / "vgg19.pth").symlink_to(args.vgg_weights.resolve())


def record_file(out, job):
    """An experiment writes its report into OUT/<job>.json itself."""
    return out / (f"{job}-rows.json" if job in EXPERIMENTS else f"{job}.json")


def summary(out, only, lines):
    """summary.md: every part of every job in a line. -> what failed of the jobs `only`"""
    rows, failed, machine = [], [], {}
    for name in (*JOBS, *EXPERIMENTS):
        file = record_file(out, name)
        record = json.loads(file.read_text()) if file.exists() else {}
        machine = machine or record.get("machine", {})
        for part, result in record.items():
            if part in ("machine", "command"):
                continue
            kept = ("counts", "failed_tests", "cut_off", "plain", "deterministic")
            shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in result.items()
                     if isinstance(v, (int, float, str)) or k in kept}
            rows.append([name, part, "; ".join(f"{k} {v}" for k, v in shown.items())])
            if name in only and ("failed" in result or result.get("failed_tests")):
                failed.append(rows[-1])
    text = "\n".join([f"# {machine.get('device', 'no device')}", "", *(f"{k}: {v}  " for k, v in machine.items()), "",
                      *lines, "", runs.markdown(["job", "part", "result"], rows), ""])
    runs.write_atomic(out / "summary.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return failed


def main(args):
    if args.device == "cuda" and not torch.cuda.is_available():
        raise runs.UserError("this PyTorch sees no GPU; --device cpu rehearses in small")
    if not args.job and "checks" in args.only and importlib.util.find_spec("pytest") is None:
        raise runs.UserError("no pytest here, which the job `checks` needs: install it, or name other jobs with --only")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.job:
        work, report = args.data, Report(record_file(args.out, args.job), STARTED + 60 * args.minutes)
        (job_experiment if args.job in EXPERIMENTS else globals()[f"job_{args.job}"])(args, report, work)
        return
    started, lines, left = time.monotonic(), [], 0.0
    share = {name: part for name, (part, _) in JOBS.items()} | dict.fromkeys(EXPERIMENTS, 1.0)
    total = sum(share[name] for name in args.only)
    with tempfile.TemporaryDirectory() as folder, open(args.out / "log.txt", "w") as log:
        work = Path(folder)
        prepare(args, work)
        left -= time.monotonic() - started
        for name in args.only:
            # what a job leaves of its time is the next one's
            left += 60 * args.minutes * share[name] / total
            begun, limit = time.monotonic(), max(left, 30.0)
            words = ["--job", name, "--out", args.out, "--device", args.device, "--data", work,
                     "--minutes", max(limit - 6, 0.8 * limit) / 60]
            # of an earlier call
            record_file(args.out, name).unlink(missing_ok=True)
            what = JOBS[name][1] if name in JOBS else "rows of an experiment"
            print(f"{name}: {what}; at most {limit:.0f} s", flush=True)
            child = subprocess.Popen(runs.python("experiments.gpu", *words), stdout=log, stderr=log,
                                     env=runs.python_path() | {"PYTHONUNBUFFERED": "1"}, start_new_session=True)
            try:
                status = f"ended with {child.wait(limit)}"
            except subprocess.TimeoutExpired:
                status = f"was stopped at its limit of {limit:.0f} s"
            finally:
                # its data workers and tests, too
                try:
                    os.killpg(child.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                child.wait()
            seconds = time.monotonic() - begun
            left -= seconds
            lines.append(f"- {name} {status} after {seconds:.0f} s")
            print(lines[-1], flush=True)
            failed = summary(args.out, args.only, lines)
    print((args.out / "summary.md").read_text(encoding="utf-8"))
    if failed or any("ended with 0" not in line for line in lines):
        raise runs.UserError(f"some parts failed: {args.out / 'log.txt'}")


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
