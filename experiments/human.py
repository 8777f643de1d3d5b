"""Which quality model agrees with people? Paper Sec. 3 on real votes: CLIVE's opinions, and a study of four SR methods.

    python -m experiments.human study                                       choices among four methods, 20 scenes
    python -m experiments.human clive                                       opinions on 1,162 photographs
    python -m experiments.human study --metrics runs/rewards/clive.pth      one more model beside those scored before

Scores every image by the no-reference metrics that need no download, adds the PSNR, SSIM, LPIPS and CLIPIQA that the
study's authors published, and makes the tables and plots of analyze_iqa.py. It can be stopped at any time, and the same
command resumes. No image is copied to --results. docs/data.md says where the data come from.
"""
from pathlib import Path

import runs

DATA = Path("datasets/public")
METHODS = ("BSRGAN", "RealESRGAN", "ResShift", "SwinIR")
# how the study's choice_of_4.csv and pairs.csv are read
BEST_COLUMNS = "observer=observer,scene=image,selected=selected"
PAIR_COLUMNS = "observer=observer,candidates=left+right,selected=selected"
PAIR_PATTERN = "(?P<scene>.+)_(?P<method>[^_]+)"
METRICS = ("niqe", "brisque", "piqe", "rewards.cnniqa:build", "ranker")
# takes 25 s an image: the study, and every 16th image of CLIVE by name
SLOW, EVERY = "ilniqe", 16
FILES = {"niqe": "niqe_modelparameters.mat", "brisque": "brisque_svm_weights.pth", SLOW: "ILNIQE_templateModel.mat"}
# of the study, by its authors; of a distance lower is better
AUTHORS, AUTHORS_LOWER = ("PSNR", "SSIM", "LPIPS", "CLIPIQA"), ("LPIPS",)
BEST, PAIRS, CLIVE, PART = "best-of-4", "pairs", "CLIVE", "CLIVE-part"


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("sets", nargs="+", choices=["study", "clive"], help="which data")
    p.add_argument("--data", type=Path, default=DATA / "human", help="folder of clive/ and sr_study/")
    p.add_argument("--weights", type=Path, default=DATA / "weights" / "iqa", help="folder of the metrics' weight files")
    p.add_argument("--metrics", nargs="*", default=[], metavar="NAME", help="further models, such as a reward file")
    p.add_argument("--no-slow", action="store_true", help="leave out IL-NIQE, which takes 25 s an image")
    p.add_argument("--work", type=Path, default=Path("runs/human"), help="where scores are kept")
    p.add_argument("--results", type=Path, default=Path("runs/results/human"), help="where tables and plots go")
    return p.parse_args(argv)


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import json
import shutil
import subprocess

from report import agreement, opinions


def read_study(folder):
    """{"pairs", "choices"}: the study's pairs, and its best-of-four choices; and lines on the rows left out."""
    pairs, left = opinions.read_choices(folder / "pairs.csv", PAIR_COLUMNS, pattern=PAIR_PATTERN)
    best, more = opinions.read_choices(folder / "choice_of_4.csv", BEST_COLUMNS, METHODS)
    return {"pairs": pairs, "choices": best}, left + more


def analyze(*words):
    done = subprocess.run(runs.python("analyze_iqa.py", *words), env=runs.python_path())
    if done.returncode:
        raise runs.UserError(f"analyze_iqa.py {words[0]} ended with {done.returncode}; see above")


def score(out, metrics, weights, *words):
    """The metrics that were not scored before; a weight file for those that have one."""
    files = [f"{m}={weights / FILES[m]}" for m in metrics if m in FILES]
    named = ["--metric-weights", *files] if files else []
    analyze("score", "--out", out, "--metrics", *metrics, *named, "--batch-size", 1, "--device", "cpu", "--threads", 1,
            *words)


def ready(out, file, lower):
    lower = ["--lower", *lower] if lower else []
    analyze("score", "--out", out, "--scores", file, *lower)


def lower_of(folder):
    about = json.loads((folder / "about.json").read_text())
    return [m for m, facts in about["metrics"].items() if facts["lower_is_better"]]


def authors_scores(study, out):
    """per_image_metrics.csv with names METHOD/SCENE."""
    table = agreement.read_csv(study / "per_image_metrics.csv", "--data")
    names = table.Model + "/" + table.Image_Name.str.removesuffix(".png")
    agreement.write_csv(out, table[list(AUTHORS)].assign(image=names), index=False)


def judge_study(args, metrics, slow):
    """80 images, of which the pairs show 24."""
    study, best, pairs = args.data / "sr_study", args.work / BEST, args.work / PAIRS
    score(best, metrics + slow, args.weights, "--choices", study / "choice_of_4.csv", "--columns", BEST_COLUMNS,
          "--methods", *METHODS, "--images", study)
    authors_scores(study, args.work / "authors.csv")
    ready(best, args.work / "authors.csv", AUTHORS_LOWER)
    analyze("score", "--out", pairs, "--choices", study / "pairs.csv", "--columns", PAIR_COLUMNS,
            "--name-pattern", PAIR_PATTERN, "--scores", best / "scores.csv", "--lower", *lower_of(best))
    # Tables 1 and 2, and 3: each metric where CLIPIQA, the best of the published ones, fails
    analyze("sbs", best, pairs, "--out", args.work)
    analyze("complement", best, "--fails", "CLIPIQA", "--out", args.work)
    analyze("choices", best, pairs, "--out", args.work)
    analyze("recommend", best, "--out", args.work)


def judge_clive(args, metrics, slow):
    """1,162 photographs without references."""
    clive, whole, part = args.data / "clive", args.work / CLIVE, args.work / PART
    score(whole, metrics, args.weights, "--mos", clive / "labels.csv", "--images", clive / "images")
    if slow:
        labels = agreement.read_csv(clive / "labels.csv", "--data").sort_values("image")[::EVERY]
        agreement.write_csv(args.work / "part.csv", labels, index=False)
        score(part, slow, args.weights, "--mos", args.work / "part.csv", "--images", clive / "images", "--no-speed")
        ready(part, whole / "scores.csv", lower_of(whole))
    analyze("mos", whole, *[part] * bool(slow), "--out", args.work)


def main(args):
    args.work.mkdir(parents=True, exist_ok=True)
    args.results.mkdir(parents=True, exist_ok=True)
    judges = {"study": (judge_study, ("sbs", "complement", "choices", "recommend")), "clive": (judge_clive, ("mos",))}
    for name in args.sets:
        judge, records = judges[name]
        judge(args, [*METRICS, *args.metrics], [] if args.no_slow else [SLOW])
        for record in records:
            for file in [args.work / f"{record}.json", *args.work.glob(f"{record}*.png")]:
                shutil.copyfile(file, args.results / file.name)
    print(f"tables: {args.work}/*.md; copied to {args.results}: their .json and plots")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
