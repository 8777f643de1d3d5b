"""The demo set: HGGT's layout, deterministic, and a real choice for AMO."""
import json
from pathlib import Path

import pytest
import torch

import data
import iqa
import make_quintuplets


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    make_quintuplets.build_demo(out)
    return out


def test_the_demo_set_has_hggts_layout_without_labels(demo):
    train, test = data.find_sets(demo, "Train"), data.find_sets(demo, "Test")
    assert train.versions == test.versions == ["original", "01", "02", "03", "04"]
    with pytest.raises(ValueError, match="no labels"):
        train.labels()
    assert set(test.lq) == set(test.stems) == set(data.list_images(demo / "Test" / "GT" / "demo" / "untouched"))
    gt, lq = data.load_image(test.path(test.stems[0])), data.load_image(test.lq[test.stems[0]])
    assert gt.shape == (3, 192, 192) and lq.shape == (3, 48, 48)
    record = json.loads((demo / "quintuplets.json").read_text())
    assert sum(p["patches"] for p in record["photos"].values()) == len(train.stems) + len(test.stems)


def test_no_photo_and_no_scene_is_in_both_splits(demo):
    scenes = [{data.photo_of(s).split("_")[0] for s in data.find_sets(demo, split).stems} for split in ("Train", "Test")]
    assert not scenes[0] & scenes[1] and "motorcycle" in scenes[0]


def test_amo_picks_three_versions_or_more_and_the_original_in_under_60_percent_of_crops(demo):
    sets, reward, picked = data.find_sets(demo, "Train"), iqa.create_reward(["ranker"]), torch.zeros(5)
    for stem in sets.stems:
        images = torch.stack([data.load_image(sets.path(stem, v)) for v in sets.versions]).float() / 255
        for y, x in ((0, 0), (96, 96)):
            with torch.no_grad():
                scores = reward(images[..., y:y + 96, x:x + 96])[None]
            picked[data.pick_gt("amo", torch.ones(1, 5, dtype=torch.bool), scores)] += 1
    share = picked / picked.sum()
    assert (share > 0.02).sum() >= 3 and share[0] < 0.6, dict(zip(sets.versions, share.tolist()))


def test_the_original_is_worse_than_the_untouched_photo_and_01_is_nearer_to_it_than_04(demo):
    sets = data.find_sets(demo, "Test")
    error = {v: 0.0 for v in sets.versions}
    for stem in sets.stems:
        photo = data.load_image(demo / "Test" / "GT" / "demo" / "untouched" / f"{stem}.png").float()
        for version in sets.versions:
            error[version] += (data.load_image(sets.path(stem, version)).float() - photo).square().mean().item()
    assert error["original"] > 0 and error["01"] < error["04"] and error["03"] > error["01"]


def test_building_is_deterministic_and_never_overwrites(tmp_path, monkeypatch):
    monkeypatch.setattr(make_quintuplets, "TRAIN_PHOTOS", ("rocket",))
    monkeypatch.setattr(make_quintuplets, "TEST_PHOTOS", ("chelsea",))
    for name in "ab":
        make_quintuplets.build_demo(tmp_path / name)
    files = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()} for n in "ab"]
    assert files[0] == files[1] and len(files[0]) > 20
    with pytest.raises(ValueError, match="exists: remove it"):
        make_quintuplets.build_demo(tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(make_quintuplets, "restore", lambda original: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_quintuplets.build_demo(tmp_path / "a")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="cannot be written"):
        make_quintuplets.build_demo(Path("/proc/demo"))
