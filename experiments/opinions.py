"""Rewards trained on people's opinions: do they agree with people on images they have not seen, and can they be fooled?

    python -m experiments.opinions train 0 1 2        plain and hardened models of these splits of CLIVE
    python -m experiments.opinions report             tables and plot of all that is there

Ten random 80/20 splits of CLIVE (report.opinions.splits), fixed before the first training. Per split a plain model and
one hardened from it are trained on the 80 %, and judged on the 20 %: whole images, the mean of four random crops of 96
to 256 pixels, and attacks on ten photographs of Kodak (rewards/attack.py), their starting points, steps and step sizes
other than the training's. One JSON per model in --results; what is there is not computed again.
"""
import sys
from pathlib import Path

import runs

DATA = Path("datasets/public")


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("stage", choices=["train", "report"], help="what to do")
    p.add_argument("splits", type=runs.COUNT, nargs="*", default=list(range(10)), help="train: numbers of the splits")
    p.add_argument("--models", nargs="+", choices=["ridge", "plain", "hard"], default=["plain", "hard"],
                   help="train: which; hard begins with plain, which is made if it is missing")
    p.add_argument("--clive", type=Path, default=DATA / "human" / "clive", help="folder of labels.csv and images/")
    p.add_argument("--kodak", type=Path, default=DATA / "images" / "hr_kodak24", help="photographs that are attacked")
    p.add_argument("--backbone", type=Path, default=Path("runs/mobilenet_v2.pth"), help="of prepare.mobilenet_v2")
    p.add_argument("--work", type=Path, default=Path("runs/opinions"), help="where the reward files go")
    p.add_argument("--results", type=Path, default=Path("results/human"), help="where the JSON files go")
    p.add_argument("--threads", type=runs.SIZE, default=1, help="CPU threads")
    return p.parse_args(argv)


# before the imports that take seconds, so that --help answers at once
ARGS = parse_args() if __name__ == "__main__" else None

import time

import torch

import iqa
from report import opinions
from rewards import attack, opinion, train_opinion

CROP, SEED = 224, 0
# of a training, by model; decided on split 0 before the other splits were trained
# those of the models that are attacked
ATTACKED = (0, 1, 2)
SETTINGS = {"ridge": dict(epochs=0), "plain": dict(epochs=3, lr=2e-4), "hard": dict(epochs=2, lr=2e-4)}


def train(args, mos, photos, features, split, name):
    """One model of one split: reward file and JSON."""
    out, file = args.results / f"clive-{name}-{split}.json", args.work / f"{name}-{split}.pth"
    if out.exists() and (file.exists() or name == "ridge"):
        return
    began, machine = time.process_time(), runs.describe_machine(on_cpu=True)
    rows, test_rows = opinions.splits(mos["names"])[split]
    training, test = (train_opinion.part(mos, part) for part in (rows, test_rows))
    teacher, settings = None, SETTINGS[name] | dict(crop=CROP, seed=SEED)
    if name == "hard":
        train(args, mos, photos, features, split, "plain")
        net, teacher = (opinion.load(args.work / f"plain-{split}.pth")[0] for _ in range(2))
    else:
        torch.manual_seed(SEED)
        net = opinion.ARCHITECTURES["mobilenet_v2"]()
        net.backbone.load_imagenet(args.backbone)
        net.start_linear(features(net)[rows], training["mos"])
    losses = train_opinion.fit(net, training, teacher=teacher, **settings) if settings["epochs"] else {}
    net.eval().requires_grad_(False)
    record = {"arch": "mobilenet_v2", "command": sys.argv, **machine, "model": name, "split": split,
              "mos": {"file": "clive/labels.csv", "images": len(rows)}, **settings, "losses": losses,
              "seconds_of_training": round(time.process_time() - began)}
    record["test"] = train_opinion.test_scores(net, test["images"], test["mos"].numpy())
    if name != "ridge":
        opinion.save(file, net, record)
        record["file_sha256"] = runs.digest(file)
        if split in ATTACKED:
            reward = iqa.create_reward([str(file)], need_gradient=True)
            record["attack"] = attack.measure({name: reward}, photos, [1, 2, 4])[name]
    runs.save_json(out, record)
    print(out, record["test"], flush=True)


def main(args):
    runs.start_world("cpu", args.threads)
    mos = train_opinion.read_mos(args.clive / "labels.csv", args.clive / "images", CROP)
    photos = attack.read_photos(args.kodak, 10, 256)

    def features(net):
        """Of the backbone as it is, one crop per image: the same for all splits."""
        file = args.work / "features.pth"
        if not file.exists():
            found = train_opinion.crop_features(net, mos["images"], CROP, SEED)
            runs.write_atomic(file, lambda temporary: torch.save(found, temporary))
        return torch.load(file, weights_only=True)
    for split in args.splits:
        for name in args.models:
            train(args, mos, photos, features, split, name)


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
