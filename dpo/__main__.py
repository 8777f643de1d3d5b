"""Preference optimisation of a stochastic x4 generator: DP2O-SR (Wu et al., NeurIPS 2025), first open training code.

    python -m dpo --demo                    all stages in small, on a CPU, no download
    python -m dpo --demo --total-steps 20   with shorter trainings

A generator makes many outputs of an image, each from its own seed; a reward of quality metrics ranks them; and DPO
trains the generator to prefer the best to the worst. Each stage has its script, which README.md of this folder explains
and `--help` lists in full:
    python -m dpo.pretrain         a generator, FlowSR, from photographs
    python -m dpo.pool sample      many outputs for every low-resolution image
    python -m dpo.pool score       every output by every metric
    python -m dpo.pool curate      from scores to preference pairs
    python -m dpo.tune             DPO on the pairs
    python -m dpo.compare          generators side by side on the same seeds
    python -m dpo.rounds           pool and tune again, from the tuned generator
"""
import subprocess

import runs

STAGES = (["dpo.pretrain", "--demo", "--resume", "auto"], ["dpo.pool", "sample", "--demo"],
          ["dpo.pool", "score", "--demo"], ["dpo.pool", "curate", "--demo"],
          ["dpo.tune", "--demo", "--resume", "auto"], ["dpo.compare", "--demo"])


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--demo", action="store_true", required=True, help="all stages on the demo set, small and short")
    p.add_argument("--total-steps", type=runs.SIZE, help="length of both trainings; default: that of their demos")
    return p.parse_args(argv)


def main():
    args = parse_args()
    for script, *words in STAGES:
        if args.total_steps and "--resume" in words:
            words += ["--total-steps", str(args.total_steps)]
        print(f"\n# python -m {script} {' '.join(words)}", flush=True)
        status = subprocess.run(runs.python(script, *words), env=runs.python_path()).returncode
        if status:
            raise runs.UserError(f"{script} ended with {status}")


if __name__ == "__main__":
    runs.cli(main)
