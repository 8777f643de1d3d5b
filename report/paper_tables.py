"""The paper's result tables as chains of commands: Table 5 (HGGT Test-100), 7 (variants of fine-tuning), 8 (RealSR v3).

    python -m report.paper_tables 5                     print the commands of every row that is not finished, then the evaluation
    python -m report.paper_tables 5 --run               run them, one after the other; a finished run is skipped, an interrupted one continues
    python -m report.paper_tables 5 --init swinir=SwinIR_DF2K_OST_Blind_PSNR_x4.pth rrdbnet=RRDB_DF2K_OST_Blind_PSNR_x4.pth      no psnr stage: from public files

`make table5`, `table7` and `table8` run where datasets/HGGT is in place, and only print elsewhere. Rows of an architecture share what they can: the
psnr stage, and UPos and AMO as starts of the fine-tunings.
"""
import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import runs

FT = {"FT": [], "FT_HP": ["--lambda-p", "2"], "FT_IG": ["--lambda-a", "0.1"], "FT_NNR,IGx2": ["--reward", "none", "--lambda-a", "0.2"],
      "FT_NNR,IGx5": ["--reward", "none", "--lambda-a", "0.5"], "FT_PaQ2PiQ": ["--reward", "paq2piq"]}
ENDINGS = {"FT": "+musiq", "FT_HP": "+musiq-hp", "FT_IG": "+musiq-ig", "FT_NNR,IGx2": "+none-nnr2", "FT_NNR,IGx5": "+none-nnr5", "FT_PaQ2PiQ": "+paq2piq"}
SAMPLERS = {"OrigsOnly": "orig", "Rand": "rand", "UPos": "upos", "SMA": "sma", "SMP": "smp", "AMO": "amo"}
TABLES = {  # rows in the paper's order
    5: ["OrigsOnly", "Rand", "UPos", "SMA", "SMP", "AMO", "UPos + FT_HP", "UPos + FT_IG", "UPos + FT", "AMO + FT"],
    7: ["UPos", "UPos + FT_HP", "UPos + FT_IG", "UPos + FT_NNR,IGx2", "UPos + FT_NNR,IGx5", "UPos + FT_PaQ2PiQ", "UPos + FT", "AMO + FT"],
    8: ["OrigsOnly", "UPos", "AMO", "AMO + FT"],
}
PAPERS_NAME = {"swinir": "SwinIR", "rrdbnet": "Real-ESRGAN"}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=runs.Help)
    p.add_argument("table", type=int, choices=list(TABLES))
    p.add_argument("--run", action="store_true", help="run what is not finished; without it the commands are printed")
    p.add_argument("--archs", nargs="+", choices=["swinir", "rrdbnet"], default=["swinir", "rrdbnet"], help="rrdbnet is the paper's Real-ESRGAN")
    p.add_argument("--data", type=Path, default=Path("datasets/HGGT"), help="quintuplets")
    p.add_argument("--photos", type=Path, default=Path("datasets/DF2K_OST"), help="photographs of the psnr stage (HGGT: DF2K_OST)")
    p.add_argument("--realsr", type=Path, default=Path("datasets/RealSR"), help="RealSR v3, for Table 8")
    p.add_argument("--init", nargs="+", default=[], metavar="ARCH=FILE", help="finished PSNR networks: the psnr stage of these architectures is left out")
    p.add_argument("--gpus", type=runs.SIZE, default=4, help="processes of torchrun (the paper: 4)")
    p.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    args = p.parse_args(argv)
    for word in args.init:
        if word.partition("=")[0] not in args.archs or not word.partition("=")[2]:
            p.error(f"--init {word}: write ARCH=FILE with an ARCH of --archs ({', '.join(args.archs)})")
    args.init = {arch: Path(file) for arch, _, file in (word.partition("=") for word in args.init)}
    return args


def stages(args):
    """[(title, run folder, command)] of the table, each run once, in an order in which everything finds its start; then the evaluation (folder None)."""
    launch = ["torchrun", "--standalone", "--nproc_per_node", str(args.gpus)]
    chain, rows = {}, {}
    for arch in args.archs:
        psnr = args.init.get(arch, args.runs / f"{arch}-psnr")
        if arch not in args.init:
            chain[psnr] = f"{arch}: psnr stage", [*launch, "train.py", "--stage", "psnr", "--arch", arch, "--data", args.photos, "--out", psnr, "--resume", "auto"]
        for row in TABLES[args.table]:
            start, _, tuning = row.partition(" + ")
            base = args.runs / f"{arch}-{SAMPLERS[start]}"
            chain[base] = f"{arch}: {start}", [*launch, "train.py", "--arch", arch, "--sampler", SAMPLERS[start], "--data", args.data, "--init", psnr, "--out", base,
                                              "--resume", "auto"]
            if tuning:
                tuned = base.with_name(base.name + ENDINGS[tuning])
                chain[tuned] = f"{arch}: {row}", [*launch, "finetune_lora.py", "--arch", arch, "--sampler", SAMPLERS[start], "--base", base, *FT[tuning], "--out", tuned,
                                                 "--resume", "auto"]
            rows[f"{PAPERS_NAME[arch]} {row}"] = tuned if tuning else base
    name = Path("results") / f"table{args.table}"
    test = ["--data", args.realsr, "--protocol", "realsr"] if args.table == 8 else ["--data", args.data, "--baselines", "gold"]
    judge = ["python", "evaluate.py", "--weights", *rows.values(), "--names", *rows, *test, *(["--baselines"] if args.table == 8 else []),
             "--out-json", name.with_suffix(".json"), "--latex", name.with_suffix(".tex"), "--csv", name.with_suffix(".csv")]
    return [*((title, folder, words) for folder, (title, words) in chain.items()), (f"Table {args.table}", None, judge)]


def finished(folder):
    """Has the run left the weights of its last step? (finetune_lora.py writes merged.pth then only.)"""
    record = folder / "args.json"
    if not record.is_file():
        return False
    total = json.loads(record.read_text())["args"]["total_steps"]
    return any((folder / "weights" / name).is_file() for name in ("merged.pth", f"ema_{total:07d}.pth"))


def missing(args):
    """What the commands that are left would stop at, hours or days later: a line each."""
    left = [words for _, folder, words in stages(args) if not (folder and finished(folder))]
    lines = [f"--init {arch}={file}: no such file" for arch, file in args.init.items() if not file.is_file()]
    if any("psnr" in words for words in left) and not args.photos.is_dir():
        lines.append(f"--photos {args.photos}: no such folder, photographs of the psnr stage; --init ARCH=FILE takes a public PSNR network instead")
    if len(left) > 1 and not (args.data / "Train").is_dir():
        lines.append(f"--data {args.data}: no Train in it; README says how to get HGGT")
    if args.table != 8 and not (args.data / "Test").is_dir():
        lines.append(f"--data {args.data}: no Test in it, the images of the table; README says how to get HGGT")
    if args.table == 8 and not any(args.realsr.glob("*/Test/4/*_HR.png")):
        lines.append(f"--realsr {args.realsr}: no RealSR v3 there (<camera>/Test/4/*_LR4.png and *_HR.png); README says where it is found")
    return lines


def main(args):
    lines = missing(args) if args.run else []
    if lines:
        print(f"paper.py: error: {'; '.join(lines)}", file=sys.stderr)
        sys.exit(2)
    for title, folder, words in stages(args):
        if folder and finished(folder):
            print(f"# {title}: finished, {folder}")
            continue
        print(f"# {title}\n{shlex.join(map(str, words))}", flush=True)
        if args.run:
            python = [sys.executable, *(["-m", "torch.distributed.run"] if words[0] == "torchrun" else [])]
            status = subprocess.run([*python, *map(str, words[1:])], cwd=Path(__file__).resolve().parents[1]).returncode
            if status:
                print(f"paper.py: error: {title} ended with {status}; the same call continues", file=sys.stderr)
                sys.exit(status)


if __name__ == "__main__":
    main(parse_args())
