"""Sets of one's own photographs: layout, resume, refusals. The demo set: HGGT's layout, and a real choice for AMO."""
import errno
import json
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

import archs
import data
import iqa
import runs
import train
from images import list_images, load_image, save_image
from prepare import demo_set, quintuplets, verify
from report import pictures


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    demo_set.build_demo(out)
    return out


def test_the_demo_set_has_hggts_layout_without_labels(demo):
    train, test = data.find_sets(demo, "Train"), data.find_sets(demo, "Test")
    assert train.versions == test.versions == ["original", "01", "02", "03", "04"]
    with pytest.raises(ValueError, match="no labels"):
        train.labels()
    assert set(test.lq) == set(test.stems) == set(list_images(demo / "Test" / "GT" / "demo" / "untouched"))
    gt, lq = load_image(test.path(test.stems[0])), load_image(test.lq[test.stems[0]])
    assert gt.shape == (3, 192, 192) and lq.shape == (3, 48, 48)
    record = json.loads((demo / "quintuplets.json").read_text())
    assert sum(p["patches"] for p in record["photos"].values()) == len(train.stems) + len(test.stems)
    assert {"commit", "torch", "device", "threads"} < set(record)


def test_no_photo_and_no_scene_is_in_both_splits(demo):
    train, test = (data.find_sets(demo, split) for split in ("Train", "Test"))
    train_scenes, test_scenes = ({sets.photo(stem).split("_")[0] for stem in sets.stems} for sets in (train, test))
    assert not train_scenes & test_scenes and "motorcycle" in train_scenes


def test_amo_picks_three_versions_or_more_and_the_original_in_under_60_percent_of_crops(demo):
    sets, reward, picked = data.find_sets(demo, "Train"), iqa.create_reward(["ranker"]), torch.zeros(5)
    for stem in sets.stems:
        images = torch.stack([load_image(sets.path(stem, v)) for v in sets.versions]).float() / 255
        for y, x in ((0, 0), (96, 96)):
            with torch.no_grad():
                scores = reward(images[..., y:y + 96, x:x + 96])[None]
            picked[data.pick_gt("amo", torch.ones(1, 5, dtype=torch.bool), scores)] += 1
    share = picked / picked.sum()
    assert (share > 0.02).sum() >= 3 and share[0] < 0.6, dict(zip(sets.versions, share.tolist()))


def test_the_original_is_worse_than_the_untouched_photo_and_01_is_nearer_to_it_than_04(demo):
    sets = data.find_sets(demo, "Test")
    error = dict.fromkeys(sets.versions, 0.0)
    for stem in sets.stems:
        photo = load_image(demo / "Test" / "GT" / "demo" / "untouched" / f"{stem}.png").float()
        for version in sets.versions:
            error[version] += (load_image(sets.path(stem, version)).float() - photo).square().mean().item()
    assert error["original"] > 0 and error["01"] < error["04"] and error["03"] > error["01"]


def test_building_is_deterministic_and_never_overwrites(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_set, "TRAIN_PHOTOS", ("rocket",))
    monkeypatch.setattr(demo_set, "TEST_PHOTOS", ("chelsea",))
    for name in "ab":
        demo_set.build_demo(tmp_path / name)
    first, second = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
                     for folder in (tmp_path / "a", tmp_path / "b"))
    assert first == second and len(first) > 20
    with pytest.raises(ValueError, match="exists: remove it"):
        demo_set.build_demo(tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_set, "restore", lambda original: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo_set.build_demo(tmp_path / "a")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="cannot be written"):
        demo_set.build_demo(Path("/proc/demo"))


# Photographs of one's own

@pytest.fixture(scope="module")
def enhancers(tmp_path_factory):
    """Three small x4 nets and one x2 net, random."""
    folder = tmp_path_factory.mktemp("enhancers")
    for k in range(3):
        torch.manual_seed(k)
        runs.save_weights(folder / f"net{k}.pth", archs.create("compact-small").state_dict())
    runs.save_weights(folder / "x2.pth", archs.create("rrdbnet-small", scale=2).state_dict())
    return [folder / f"net{k}.pth" for k in range(3)] + [folder / "x2.pth"]


@pytest.fixture
def photos(tmp_path):
    """Three photographs of 150x200, one of them twice (darker), a grey one, a small one and a text file."""
    folder = tmp_path / "photos"
    for name in ("astronaut", "chelsea", "coffee"):
        pixels = torch.from_numpy(getattr(skimage.data, name)()[:150, 100:300].copy())
        save_image(folder / f"{name}.png", pixels.permute(2, 0, 1))
    save_image(folder / "zdark.png", (load_image(folder / "coffee.png").float() * 0.9).byte())
    save_image(folder / "grey.png", load_image(folder / "coffee.png")[:1].expand(3, -1, -1))
    save_image(folder / "small.png", load_image(folder / "coffee.png")[:, :60, :60])
    (folder / "notes.txt").write_text("")
    return folder


def build(photos, enhancers, out, *more):
    quintuplets.main(quintuplets.parse_args(flags(photos, enhancers, out, *more)))


def flags(photos, enhancers, out, *more):
    return [str(word) for word in ("--photos", photos, "--enhancers", *enhancers, "--out", out, "--patch", 64,
                                   "--min-std", 10, "--device", "cpu", *more)]


def contents(out):
    """All images and records of a set."""
    files = [*out.rglob("*.png"), *out.glob("records/*")]
    return {path.relative_to(out): path.read_bytes() for path in files}


@pytest.mark.fast
def test_patches_lie_on_hggts_grid_inside_the_photo():
    places = quintuplets.corners(1100, 1400, 512, 288, 16, seed=3)
    grid = [(y, x) for y in (0, 288, 576) for x in (0, 288, 576, 864)]
    assert len(places) == len(grid)
    for (a, b), (y, x) in zip(places, grid):
        assert abs(a - y) <= 16 and abs(b - x) <= 16 and 0 <= a <= 1100 - 512 and 0 <= b <= 1400 - 512
    assert len({a - y for (a, _), (y, _) in zip(places, grid)}) > 3


def test_own_photos_become_a_set_that_verify_accepts(photos, enhancers, tmp_path, capsys):
    build(photos, enhancers[:2], tmp_path / "mine")
    output = capsys.readouterr().out
    for text in ("1 not an image", "1 near-duplicate", "1 grey", "1 too small"):
        assert text in output
    assert verify.verify(tmp_path / "mine").defects == []
    sets = data.find_sets(tmp_path / "mine", "Train")
    record = json.loads((tmp_path / "mine" / "quintuplets.json").read_text())
    assert record["dropped_photos"] == {"notes.txt": "not an image", "zdark.png": "near-duplicate",
                                        "grey.png": "grey", "small.png": "too small"}
    assert sets.versions == ["original", "01", "02"] and set(record["photos"]) == {"astronaut", "chelsea", "coffee"}
    assert sorted(stem for photo in record["photos"].values() for stem in photo["sets"]) == sets.stems
    assert record["sets"] == len(sets.stems) >= 6
    name, row, column = re.fullmatch(r"(.+)-(\d+)-(\d+)", sets.stems[-1]).groups()
    photo = load_image(photos / f"{name}.png")[:, int(row):int(row) + 64, int(column):int(column) + 64]
    assert torch.equal(load_image(sets.path(sets.stems[-1])), photo)
    assert load_image(tmp_path / "mine" / "contact.png").shape[2] == 3 * 64 + 2 * 4


@pytest.mark.parametrize("versions, sampler", [(1, "amo"), (6, "amo"), (6, "sma"), (6, "rand")])
def test_one_or_six_enhanced_versions_are_trained_on(photos, enhancers, tmp_path, monkeypatch, versions, sampler):
    """The first enhancer, and mixtures of the first two: from photographs to a step of the generator.

    Every version can be chosen.
    """
    first, second = (archs.load_generator(path)[0].state_dict() for path in enhancers[:2])
    files = [tmp_path / f"mix{k}.pth" for k in range(versions)]
    for k, file in enumerate(files):
        runs.save_weights(file, {name: torch.lerp(first[name], second[name], k / 5) for name in first})
    build(photos, files, tmp_path / "mine")
    # static scores are cached in the current folder
    monkeypatch.chdir(tmp_path)
    train.main(train.parse_args(list(map(str, [
        "--data", "mine", "--arch", "compact-small", "--init", enhancers[0], "--sampler", sampler, "--reward", "ranker",
        "--lambda-p", 0, "--crop", 32, "--d-features", 4, "--batch-size", 14, "--group-size", 7, "--pool-size", 0,
        "--total-steps", 2, "--log-every", 1, "--workers", 0, "--device", "cpu", "--out", "run"]))))
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    picked = [event["picked"] for event in events if "picked" in event][-1]
    assert list(picked) == ["original", *(f"{k:02d}" for k in range(1, versions + 1))] and sum(picked.values()) == 28
    assert sampler != "rand" or sum(count > 0 for count in picked.values()) >= 5


def test_an_enhanced_version_is_shrunk_super_resolved_and_brought_back(photos, enhancers, tmp_path):
    build(photos, enhancers[:1], tmp_path / "mine", "--shrink", 0.25, "--tile", 0)
    sets = data.find_sets(tmp_path / "mine", "Train")
    stem = sets.stems[0]
    name, row, column = re.fullmatch(r"(.+)-(\d+)-(\d+)", stem).groups()
    pixels = load_image(photos / f"{name}.png").permute(1, 2, 0).numpy()
    # Pillow's antialiased bicubic, 8 bit
    small = Image.fromarray(pixels).resize((50, 38), Image.Resampling.BICUBIC)
    net, _ = archs.load_generator(enhancers[0])
    with torch.no_grad():
        sr = net(torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 255).clamp(0, 1)
    sr = Image.fromarray((sr[0].permute(1, 2, 0) * 255).round().byte().numpy())
    back = np.asarray(sr.resize((200, 150), Image.Resampling.BICUBIC))
    expected = torch.from_numpy(back.copy()).permute(2, 0, 1)[:, int(row):int(row) + 64, int(column):int(column) + 64]
    assert (load_image(sets.path(stem, "01")).float() - expected.float()).abs().mean() < 1


KILLED = """
import os, signal, sys
from prepare import quintuplets
replace, left = os.replace, [int(sys.argv[1])]
def replace_or_die(*paths):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = replace_or_die
quintuplets.main(quintuplets.parse_args(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_killed_build_continues_to_the_same_files_and_ranks_share_it(photos, enhancers, tmp_path, script):
    build(photos, enhancers[:2], tmp_path / "whole" / "mine")
    whole = contents(tmp_path / "whole" / "mine")
    words = flags(photos, enhancers[:2], tmp_path / "killed" / "mine")
    with pytest.raises(runs.UserError, match="no set is left"):
        # its records of photographs without a set are not those of the build
        build(photos, enhancers[:2], tmp_path / "killed" / "mine", "--min-std", 250)
    # kill -9 between temporary file and rename
    for nth in (20, 35):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(nth), *words], cwd=runs.REPO, capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (tmp_path / "killed" / "mine" / "quintuplets.json").exists()
    build(photos, enhancers[:2], tmp_path / "killed" / "mine")
    assert contents(tmp_path / "killed" / "mine") == whole and len(whole) > 20
    assert not list((tmp_path / "killed").rglob("*.tmp"))
    script("prepare.quintuplets", *flags(photos, enhancers[:2], tmp_path / "shared" / "mine"), processes=2)
    assert contents(tmp_path / "shared" / "mine") == whole


@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_nothing_stays_of_a_photo_that_was_interrupted_and_is_gone_or_changed(photos, enhancers, tmp_path, what):
    words = flags(photos, enhancers[:2], tmp_path / "mine")
    killed = subprocess.run([sys.executable, "-c", KILLED, "12", *words], cwd=runs.REPO, capture_output=True)
    # inside the first photo
    assert killed.returncode == -signal.SIGKILL and list((tmp_path / "mine").rglob("astronaut-*.png"))
    if what == "removed":
        (photos / "astronaut.png").unlink()
    else:
        save_image(photos / "astronaut.png", load_image(photos / "astronaut.png").flip(1))
    for folder in (tmp_path / "mine", tmp_path / "clean" / "mine"):
        build(photos, enhancers[:2], folder)
    assert contents(tmp_path / "mine") == contents(tmp_path / "clean" / "mine") and not list(tmp_path.rglob("*.tmp"))
    assert bool(list((tmp_path / "mine").rglob("astronaut-*.png"))) == (what == "replaced")


def test_a_set_is_dropped_where_no_network_did_more_than_interpolate(photos, enhancers, tmp_path, monkeypatch, capsys):
    def shifted(x, levels):
        return torch.nn.functional.interpolate(x, scale_factor=4, mode="bicubic") + levels / 255
    versions = {"01": partial(shifted, levels=0.0)}
    # less than a grey level more than interpolation
    versions["02"] = partial(shifted, levels=0.6)
    real = quintuplets.load_enhancers
    monkeypatch.setattr(quintuplets, "load_enhancers", lambda *words: (versions, real(*words)[1]))
    with pytest.raises(ValueError, match="no set is left .*not enhanced"):
        build(photos, enhancers[:2], tmp_path / "none", "--shrink", 0.25)
    versions["02"] = partial(shifted, levels=3)
    build(photos, enhancers[:2], tmp_path / "some", "--shrink", 0.25)
    assert "not enhanced" not in capsys.readouterr().out


def test_a_full_disk_is_one_line_whatever_it_hits(photos, enhancers, tmp_path, monkeypatch):
    def full(*more, **options):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        # the contact sheet, which comes last
        patch.setattr(pictures, "save_grid", full)
        with pytest.raises(ValueError, match="mine: No space left on device .*; all files in it are whole, the same "
                                             "command continues"):
            build(photos, enhancers[:2], tmp_path / "mine")
    build(photos, enhancers[:2], tmp_path / "mine")
    assert (tmp_path / "mine" / "contact.png").exists()
    # a name that means something in the layout
    build(photos, enhancers[:2], tmp_path / "original")
    assert verify.verify(tmp_path / "original").defects == []


def test_what_cannot_become_a_set_is_refused_in_one_line(photos, enhancers, tmp_path, monkeypatch):
    def refused(message, *more, enhancers=enhancers[:2], out=tmp_path / "mine"):
        with pytest.raises(ValueError, match=message) as caught:
            build(photos, enhancers, out, *more)
        assert "\n" not in str(caught.value)
    refused("x2.pth: a x2 checkpoint", enhancers=enhancers[2:])
    refused("is the same file as", enhancers=enhancers[:1] * 2)
    refused("was not made by this script", out=tmp_path)
    refused(r"no photo is left \(.*too small.*\); --patch 512 may be less", "--patch", 512)
    refused("no set is left .*flat", "--min-std", 200)
    refused("nosuch: this is unknown", "--reward", "nosuch", out=tmp_path / "other")

    def full(path, image):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(quintuplets, "save_image", full)
    refused("No space left on device .*; all files in it are whole", out=tmp_path / "full")
    monkeypatch.undo()
    build(photos, enhancers[:2], tmp_path / "full")
    # nothing was written with --min-std 200: a corrected command goes on
    build(photos, enhancers[:2], tmp_path / "mine")
    refused("begun with other settings .*shrink 0.75 -> 0.5", "--shrink", 0.5)
    refused("begun with other settings .*tile 256 -> 0", "--tile", 0)
    refused("begun with other settings .*precision 'fp32' -> 'bf16'", "--precision", "bf16")
    settings = tmp_path / "mine" / "records" / "settings.json"
    # as earlier commits wrote it
    runs.save_json(settings, {k: v for k, v in json.loads(settings.read_text()).items() if k != "precision"})
    build(photos, enhancers[:2], tmp_path / "mine")
    build(photos, enhancers[:2], tmp_path / "coarse", "--precision", "bf16")
    settings = json.loads((tmp_path / "coarse" / "quintuplets.json").read_text())["settings"]
    assert settings["precision"] == "bf16"
    record = tmp_path / "full" / "records" / "photo-coffee.json"
    whole = record.read_bytes()
    record.write_bytes(whole[:40])
    refused("photo-coffee.json: damaged .*; remove it", out=tmp_path / "full")
    record.write_bytes(whole)
    (photos / "astronaut.png").rename(tmp_path / "astronaut.png")
    refused("photos that are not used any more: astronaut", out=tmp_path / "full")
    save_image(photos / "astronaut.png", load_image(tmp_path / "astronaut.png").flip(2))
    refused("photos that have changed since: astronaut", out=tmp_path / "full")
    broken = photos / "coffee.png"
    broken.write_bytes(broken.read_bytes()[:2000])
    refused("1 damaged photos, first .*coffee.png", out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_two_enhancers_of_one_output_are_refused(photos, enhancers, tmp_path):
    state = torch.load(enhancers[0], weights_only=True)
    torch.save(state | {"params_ema": state["params"]}, tmp_path / "copy.pth")
    with pytest.raises(ValueError, match="enhancers 01 and 02 give the same picture"):
        build(photos, [enhancers[0], tmp_path / "copy.pth"], tmp_path / "mine")
    # corrected, into the same folder
    build(photos, enhancers[:2], tmp_path / "mine")


def test_softening_enlarges_and_nothing_enhanced_is_dropped(photos, enhancers, tmp_path):
    build(photos, enhancers[:1], tmp_path / "mine", "--soften", 1.5, "--jitter", 0)
    assert json.loads((tmp_path / "mine" / "quintuplets.json").read_text())["settings"]["soften"] == 1.5
    sets = data.find_sets(tmp_path / "mine", "Train")
    # 300 pixels wide: 0, 36, ... in steps of 36
    assert max(int(s.split("-")[2]) for s in sets.stems) == 216
    with pytest.raises(ValueError, match="no set is left .*not enhanced"):
        build(photos, enhancers[:1], tmp_path / "same", "--min-change", 255)
