"""The paper's result tables as chains of commands: Table 5 (HGGT Test-100), 7 (variants of fine-tuning), 8 (RealSR v3).

    python -m report.paper_tables 5          print the commands of the rows that are not finished, and the evaluation
    python -m report.paper_tables 5 --run    run them in order: skips finished runs, resumes interrupted ones
    python -m report.paper_tables 5 --init swinir=SwinIR_DF2K_OST_Blind_PSNR_x4.pth    without the psnr stage

`make table5`, `table7` and `table8` run where datasets/HGGT is in place, and only print elsewhere. Rows of one
architecture share the psnr stage, and the fine-tunings start from the rows UPos and AMO. The evaluation leaves
table<N>.json, .tex and .csv in the folder of the runs.
"""
import json
import shlex
import subprocess
import sys
from pathlib import Path

import runs

SAMPLERS = {"OrigsOnly": "orig", "Rand": "rand", "UPos": "upos", "SMA": "sma", "SMP": "smp", "AMO": "amo"}
# flags of finetune_lora.py, and the ending of the run folder's name
FINE_TUNINGS = {
    "FT": ([], "+musiq"),
    "FT_HP": (["--lambda-p", "2"], "+musiq-hp"),
    "FT_IG": (["--lambda-a", "0.1"], "+musiq-ig"),
    "FT_NNR,IGx2": (["--reward", "none", "--lambda-a", "0.2"], "+none-nnr2"),
    "FT_NNR,IGx5": (["--reward", "none", "--lambda-a", "0.5"], "+none-nnr5"),
    "FT_PaQ2PiQ": (["--reward", "paq2piq"], "+paq2piq"),
}
# rows in the paper's order
TABLES = {
    5: ["OrigsOnly", "Rand", "UPos", "SMA", "SMP", "AMO", "UPos + FT_HP", "UPos + FT_IG", "UPos + FT", "AMO + FT"],
    7: ["UPos", "UPos + FT_HP", "UPos + FT_IG", "UPos + FT_NNR,IGx2", "UPos + FT_NNR,IGx5", "UPos + FT_PaQ2PiQ",
        "UPos + FT", "AMO + FT"],
    8: ["OrigsOnly", "UPos", "AMO", "AMO + FT"],
}
NAMES_IN_PAPER = {"swinir": "SwinIR", "rrdbnet": "Real-ESRGAN"}


def parse_args(argv=None):
    archs = list(NAMES_IN_PAPER)
    p = runs.Parser(description=__doc__)
    p.add_argument("table", type=int, choices=list(TABLES))
    p.add_argument("--run", action="store_true", help="run what is not finished; without it the commands are printed")
    p.add_argument("--archs", nargs="+", choices=archs, default=archs, help="rrdbnet is the paper's Real-ESRGAN")
    p.add_argument("--data", type=Path, default=Path("datasets/HGGT"), help="quintuplets")
    p.add_argument("--photos", type=Path, default=Path("datasets/DF2K_OST"),
                   help="photographs of the psnr stage (HGGT: DF2K_OST)")
    p.add_argument("--realsr", type=Path, default=Path("datasets/RealSR"), help="RealSR v3, for Table 8")
    p.add_argument("--init", nargs="+", default=[], metavar="ARCH=FILE",
                   help="finished PSNR networks: the psnr stage of these architectures is left out")
    p.add_argument("--gpus", type=runs.SIZE, default=4, help="processes of torchrun (the paper: 4)")
    p.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs and of the table")
    args = p.parse_args(argv)
    for word in args.init:
        arch, _, file = word.partition("=")
        if arch not in args.archs or not file:
            p.error(f"--init {word}: write ARCH=FILE with an ARCH of --archs ({', '.join(args.archs)})")
    args.init = {arch: runs.CHECKPOINT(file) for arch, _, file in (word.partition("=") for word in args.init)}
    return args


def stages(args):
    """[(title, run folder, command)]: every run once and after its start, then the evaluation (folder None)."""
    launch = ["torchrun", "--standalone", "--nproc_per_node", str(args.gpus)]
    chain, rows = {}, {}

    def add(folder, title, script, *flags):
        chain[folder] = title, [*launch, script, *flags, "--out", folder, "--resume", "auto"]
    for arch in args.archs:
        psnr = args.init.get(arch, args.runs / f"{arch}-psnr")
        if arch not in args.init:
            add(psnr, f"{arch}: psnr stage", "train.py", "--stage", "psnr", "--arch", arch, "--data", args.photos)
        for row in TABLES[args.table]:
            start, _, tuning = row.partition(" + ")
            base, sampler = args.runs / f"{arch}-{SAMPLERS[start]}", SAMPLERS[start]
            add(base, f"{arch}: {start}", "train.py", "--arch", arch, "--sampler", sampler, "--data", args.data,
                "--init", psnr)
            rows[f"{NAMES_IN_PAPER[arch]} {row}"] = base
            if tuning:
                flags, ending = FINE_TUNINGS[tuning]
                tuned = base.with_name(base.name + ending)
                add(tuned, f"{arch}: {row}", "finetune_lora.py", "--arch", arch, "--sampler", sampler, "--base", base,
                    *flags)
                rows[f"{NAMES_IN_PAPER[arch]} {row}"] = tuned
    result = args.runs / f"table{args.table}.json"
    test = ["--data", args.data, "--baselines", "gold"]
    if args.table == 8:
        test = ["--data", args.realsr, "--protocol", "realsr", "--baselines"]
    title = f"Table {args.table}"
    evaluation = [(title, None, ["python", "evaluate.py", "--weights", *rows.values(), "--names", *rows, *test,
                                 "--out-json", result])]
    for name, suffix in (("latex", ".tex"), ("csv", ".csv")):
        convert = ["python", "-m", "report.tables", result, "--format", name, "--out", result.with_suffix(suffix)]
        evaluation.append((f"{title} as {name}", None, convert))
    return [*((title, folder, command) for folder, (title, command) in chain.items()), *evaluation]


def finished(folder):
    """Has the run left the weights of its last step?

    train.py names them by their step. finetune_lora.py replaces merged.pth at every validation; after the last step its
    log ends with "done", or with "nothing to do" when it was called again.
    """
    record, log = folder / "args.json", folder / "log.txt"
    if not record.is_file():
        return False
    total = json.loads(record.read_text())["args"]["total_steps"]
    last_line = log.read_text().rpartition("\n")[0].rpartition("\n")[2] if log.is_file() else ""
    merged = (folder / "weights" / "merged.pth").is_file() and last_line.startswith(("done:", "nothing to do:"))
    return merged or (folder / "weights" / f"ema_{total:07d}.pth").is_file()


def missing(args):
    """Missing inputs, a line each: without this check the commands would stop at them hours or days later."""
    left = [command for _, folder, command in stages(args) if folder and not finished(folder)]
    lines = [f"--init {arch}={file}: no such file; {runs.how_to_get(file)}" for arch, file in args.init.items()
             if not file.is_file()]
    if any("psnr" in command for command in left) and not args.photos.is_dir():
        lines.append(f"--photos {args.photos}: no such folder, photographs of the psnr stage; "
                     "--init ARCH=FILE takes a public PSNR network instead")
    if left and not (args.data / "Train").is_dir():
        lines.append(f"--data {args.data}: no Train in it; docs/data.md says how to get HGGT")
    if args.table != 8 and not (args.data / "Test").is_dir():
        lines.append(f"--data {args.data}: no Test in it, the images of the table; docs/data.md says how to get HGGT")
    if args.table == 8 and not any(args.realsr.glob("*/Test/4/*_HR.png")):
        lines.append(f"--realsr {args.realsr}: no RealSR v3 there (<camera>/Test/4/*_LR4.png and *_HR.png); "
                     "docs/evaluation.md says where it is found")
    return lines


def main(args):
    lines = missing(args) if args.run else []
    if lines:
        raise runs.UserError("; ".join(lines))
    for title, folder, command in stages(args):
        if folder and finished(folder):
            print(f"# {title}: finished, {folder}")
            continue
        print(f"# {title}\n{shlex.join(map(str, command))}", flush=True)
        if args.run:
            python = [sys.executable, *(["-m", "torch.distributed.run"] if command[0] == "torchrun" else [])]
            status = subprocess.run([*python, *map(str, command[1:])], cwd=runs.REPO, env=runs.python_path()).returncode
            if status:
                print(f"{runs.program()}: error: {title} ended with {status}; the same call continues", file=sys.stderr)
                sys.exit(status)


if __name__ == "__main__":
    runs.cli(lambda: main(parse_args()))
