"""Preference optimisation in rounds: the next pool is sampled from the tuned generator (future work of DP2O-SR).

    python -m dpo.rounds --gen runs/flow-base --rounds 2 --sample='--hr DF2K/HR --groups 500' --tune='--total-steps 500'

Round r = 1, 2, ... runs dpo.pool sample, score and curate, then dpo.tune, and leaves OUT/pool-r and OUT/tuned-r. Its
crops are drawn anew, its scale of the reward is fitted anew, and its reference is the generator that made its pool. The
last OUT/tuned-r is the result. A call that was stopped is continued by the same command. One round of N times as many
images and steps costs the same: compare with that.
"""
import shlex
import subprocess
from pathlib import Path

import runs
from dpo import options

# {stage: (script, first words)}
STAGES = {"sample": ("dpo.pool", ["sample"]), "score": ("dpo.pool", ["score"]), "curate": ("dpo.pool", ["curate"]),
          "tune": ("dpo.tune", [])}


def parse_args(argv=None):
    p = options.parser("dpo.rounds", __doc__, demo=False)
    p.add_argument("--rounds", type=runs.SIZE, default=2, metavar="N", help="1: as the stages one by one")
    p.add_argument("--gen", type=Path, default=Path("runs/flow-base"), metavar="PATH",
                   help="the generator of the first round")
    for stage, (script, words) in STAGES.items():
        command = " ".join([script, *words])
        p.add_argument(f"--{stage}", default="", metavar="FLAGS",
                       help=f"flags of python -m {command} in every round, as one word: --{stage}='FLAGS'")
    p.add_argument("--seed", type=runs.COUNT, default=0, help="round r draws with seed + r")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: runs/<name of --gen>+rounds")
    p.add_argument("--processes", type=runs.SIZE, default=1, help="of each stage, one per GPU")
    options.add_machine(p)
    args = options.parse(p, argv, {})
    args.out = args.out or Path("runs") / f"{args.gen.name}+rounds"
    return args


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

from functools import partial

from dpo import candidates, pool, tune


def words_of(args, r):
    """{stage: the words of its command} of round r. The last flag of a name counts."""
    folder, made, seed = args.out / f"pool-{r}", args.out / f"tuned-{r}", args.seed + r
    gen = args.gen if r == 1 else args.out / f"tuned-{r - 1}"
    machine = ["--device", args.device, "--threads", args.threads]
    own = {"sample": ["--gen", gen, "--seed", seed, "--out", folder, *machine], "score": ["--pool", folder, *machine],
           "curate": ["--pool", folder, "--out", folder],
           "tune": ["--gen", gen, "--pairs", folder, "--seed", seed, "--out", made, "--resume", "auto", *machine]}
    return {stage: [str(word) for word in [*first, *shlex.split(getattr(args, stage)), *own[stage]]]
            for stage, (_, first) in STAGES.items()}


def main(args):
    # flags that no stage has end this call before the first round
    for words, parse in zip(words_of(args, 1).values(), [pool.parse_args] * 3 + [tune.parse_args]):
        parse(words)
    record = args.out / "rounds.json"
    about = {name: str(getattr(args, name)) for name in ("gen", *STAGES, "seed")}
    earlier = candidates.read_json(record, "remove the folder") if record.exists() else about
    if changed := runs.changes(earlier, about).values():
        raise runs.UserError(f"--out {args.out}: its rounds were made with other settings ({'; '.join(changed)}): "
                             "choose another folder, or remove it")
    runs.check_writable(args.out, "--out")
    runs.save_json(record, about)
    for r in range(1, args.rounds + 1):
        if (args.out / f"tuned-{r}" / "weights").exists():
            print(f"round {r}: {args.out / f'tuned-{r}'} is there", flush=True)
            continue
        for stage, words in words_of(args, r).items():
            script = STAGES[stage][0]
            print(f"\n# round {r} of {args.rounds}: python -m {script} {shlex.join(words)}", flush=True)
            # curate is no job for several processes
            processes = 1 if stage == "curate" else args.processes
            status = subprocess.run(runs.python(script, *words, processes=processes), env=runs.python_path()).returncode
            if status:
                raise runs.UserError(f"round {r}: {script} ended with {status}; the same command continues")
        if not (args.out / f"tuned-{r}" / "weights").exists():
            raise runs.UserError(f"round {r}: the training was stopped; the same command continues")


if __name__ == "__main__":
    runs.cli(partial(main, ARGS))
