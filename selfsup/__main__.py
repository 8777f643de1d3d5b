"""HR-aware self-supervision in small: every stage with --demo, on a CPU, without a download.

    python -m selfsup --demo                          pretrain, finetune, evaluate.py --protocol whole-y, probe
    python -m selfsup --demo --total-steps 10         shortens every training, those that are made first included

The demo set, the degraded domain and the run runs/compact-small-psnr are made first where they are missing. Trainings
that are there already are continued or kept: remove runs/rec-demo and runs/selfsup-demo to start again. The stages are
scripts of their own: python -m selfsup.pretrain, selfsup.finetune, selfsup.probe.
"""
from functools import partial

import runs
from selfsup import options


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("--demo", action="store_true", required=True, help="all stages in small")
    p.add_argument("--total-steps", type=runs.SIZE, help="of every training; default: the demo's")
    return p.parse_args(argv)


def main(args):
    options.make_demo_start([options.DEMO_SR], runs.World(0, 1, "cpu"), "auto", args.total_steps)
    shorter = ["--total-steps", args.total_steps] if args.total_steps else []
    options.run("selfsup.pretrain", "--demo", "--resume", "auto", *shorter)
    options.run("selfsup.finetune", "--demo", "--resume", "auto", *shorter)
    options.run("evaluate.py", "--protocol", "whole-y", "--weights", options.DEMO_SR, options.DEMO_TUNED,
                "--lq", options.DEMO_DOMAIN / "lq", "--gt", options.DEMO_DOMAIN / "gt",
                "--metrics", "ranker", "piqe", "psnr", "ssim", "--out-json", f"{options.DEMO_TUNED}.json")
    options.run("selfsup.probe", "--demo")


if __name__ == "__main__":
    runs.cli(partial(main, parse_args()))
