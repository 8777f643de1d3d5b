"""prepare.verify: planted defects are reported, each once and by name. Packed images, and the atlas of scores."""
import json
import pickle
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import iqa
import runs
from images import load_image, save_image
from prepare import atlas, pack, verify
from prepare.atlas import Atlas

pytestmark = pytest.mark.fast
VERSIONS = ("original", "01", "02", "03", "04")


def photo(seed, size=64):
    """A random smooth picture with detail, (3, size, size) uint8."""
    rng = np.random.default_rng(seed)
    coarse = F.interpolate(torch.from_numpy(rng.random((1, 3, 9, 9))), (size, size), mode="bicubic")[0]
    return (coarse * 200 + torch.from_numpy(rng.random((3, size, size))) * 30).clamp(0, 255).byte()


def add_set(images, stem, picture):
    # each a little darker
    for k, version in enumerate(VERSIONS):
        save_image(images / version / f"{data.file_stem(stem, version)}.png", (picture.float() * (1 - 0.02 * k)).byte())


def add_lr(root, stem, picture):
    small = F.interpolate(picture[None].float(), scale_factor=1 / 4, mode="area")[0]
    save_image(root / "Test" / "LQ" / "t" / "Blind_LR" / f"{stem}.png", small.round().byte())


def add_label(folder, stem, labels=("Positive", "Similar", "Negative", "Positive")):
    entries = {f"Picture_{i + 1}": {"Name": f"{stem}.png" if v == "original" else f"{stem}_{v}.png", "File": v,
                                    "Label": None if i == 0 else labels[i - 1]} for i, v in enumerate(VERSIONS)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(entries))


@pytest.fixture
def root(tmp_path):
    """A sound data set: Train of six sets with labels, Test of two with LR images."""
    root = tmp_path / "set"
    for n in range(6):
        add_set(root / "Train" / "images" / "x", f"photo{n // 2}-{n % 2}-0", photo(n))
        for annotator in "ABC":
            labels = ("Similar",) * 4 if n == 5 else ("Positive", "Similar", "Negative", "Positive")
            add_label(root / "Train" / "labels" / "x" / annotator, f"photo{n // 2}-{n % 2}-0", labels)
    for n in range(2):
        add_set(root / "Test" / "GT" / "t" / "images", f"test{n}-0-0", photo(100 + n))
        add_lr(root, f"test{n}-0-0", photo(100 + n))
    return root


def defects(root, **options):
    """{(kind, file)} of the defects."""
    return {(defect["kind"], defect["file"].rsplit("set/")[-1]) for defect in verify.verify(root, **options).defects}


def test_a_sound_set_has_no_defect_and_its_labels_are_counted(root):
    report = verify.verify(root)
    assert report.defects == []
    assert report.counts["Train"] == {"sets": 6, "photos": 3, "versions": 5,
                                      "positive": 10, "similar": 9, "negative": 5, "without_positive": 1}
    assert report.counts["Test"] == {"sets": 2, "photos": 2, "versions": 5}


def test_ten_planted_defects_are_found_each_once(root):
    train, labels = root / "Train" / "images" / "x", root / "Train" / "labels" / "x"
    test = root / "Test" / "GT" / "t" / "images"
    # 1 missing
    (train / "01" / "photo0-0-0_01.png").unlink()
    cut = train / "02" / "photo0-0-0_02.png"
    # 2 truncated
    cut.write_bytes(cut.read_bytes()[:900])
    # 3 mis-sized
    save_image(train / "03" / "photo0-0-0_03.png", photo(0, 60))
    # 4 mis-named: and so missing
    (train / "04" / "photo0-0-0_04.png").rename(train / "04" / "photo0-0-0_4.png")
    # 5 grey
    Image.fromarray(photo(1)[0].numpy()).save(train / "original" / "photo0-1-0.png")
    # 6 unknown word
    add_label(labels / "A", "photo1-0-0", ("Positive", "Similar", "Bad", "Positive"))
    # 7 a missing vote
    (labels / "B" / "photo1-0-0.json").unlink()
    # 8 LR of a wrong size
    save_image(root / "Test" / "LQ" / "t" / "Blind_LR" / "test0-0-0.png", photo(0, 17))
    # 9 a near-duplicate: darker
    shifted = photo(2).float().mul(0.9).add(4).round().byte()
    add_set(test, "test1-0-0", shifted)
    add_lr(root, "test1-0-0", shifted)
    # 10 another patch of a training photo, without LR
    add_set(test, "photo2-9-9", photo(300))
    assert defects(root) == {
        ("missing", "Train/images/x/01/photo0-0-0_01.png"), ("unreadable", "Train/images/x/02/photo0-0-0_02.png"),
        ("size", "Train/images/x/03/photo0-0-0_03.png"), ("misnamed", "Train/images/x/04/photo0-0-0_4.png"),
        ("missing", "Train/images/x/04/photo0-0-0_04.png"), ("unreadable", "Train/images/x/original/photo0-1-0.png"),
        ("label", "Train/labels/x/A/photo1-0-0.json"), ("label", "Train/labels/x/B/photo1-0-0.json"),
        ("size", "Test/LQ/t/Blind_LR/test0-0-0.png"), ("near-duplicate", "Test/GT/t/images/original/test1-0-0.png"),
        ("leak", "Test/GT/t/images/original/photo2-9-9.png"), ("missing", "Test/LQ/t/Blind_LR/photo2-9-9.png")}


def test_foreign_doubled_and_stray_files_and_a_missing_annotator(root):
    train, labels = root / "Train" / "images" / "x", root / "Train" / "labels" / "x"
    (train / "original" / "notes.txt").write_text("")
    Image.fromarray(photo(0).permute(1, 2, 0).numpy()).save(train / "01" / "photo0-0-0_01.jpg")
    shutil.copy(labels / "A" / "photo0-0-0.json", labels / "A" / "other.json")
    assert defects(root) == {("foreign", "Train/images/x/original/notes.txt"),
                           ("doubled", "Train/images/x/01/photo0-0-0_01.png"),
                           ("misnamed", "Train/labels/x/A/other.json")}
    shutil.rmtree(labels / "C")
    assert ("label", "Train/labels/x/C") in defects(root)


def test_a_jpeg_of_a_training_patch_is_a_near_duplicate_and_another_sky_is_not(root, tmp_path):
    test = root / "Test" / "GT" / "t" / "images"
    Image.fromarray(photo(4).permute(1, 2, 0).numpy()).save(tmp_path / "p.jpg", quality=60)
    add_set(test, "test0-0-0", load_image(tmp_path / "p.jpg"))
    add_lr(root, "test0-0-0", photo(4))
    ramp = torch.linspace(80, 200, 64).view(1, 64, 1).expand(3, 64, 64)
    add_set(root / "Train" / "images" / "x", "sky-0-0", (ramp + 2 * torch.randn(3, 64, 64)).byte())
    add_set(test, "test1-0-0", (ramp * 0.9 + 2 * torch.randn(3, 64, 64)).byte())
    add_lr(root, "test1-0-0", ramp * 0.9)
    shutil.rmtree(root / "Train" / "labels")
    assert defects(root) == {("near-duplicate", "Test/GT/t/images/original/test0-0-0.png")}


def test_the_script_exits_with_1_for_defects_and_2_without_a_data_set(root, script, tmp_path):
    sound = script("prepare.verify", root, "--out-json", tmp_path / "out.json")
    assert "defects: 0" in sound.stdout
    assert "Train: 1 of 6 sets have no positive: upos and smp leave them out" in sound.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["counts"]["Train"]["positive"] == 10 and {"commit", "torch", "device", "threads"} < set(written)
    (root / "Train" / "images" / "x" / "01" / "photo0-0-0_01.png").unlink()
    bad = script("prepare.verify", root, check=False)
    assert bad.returncode == 1 and "photo0-0-0_01.png: missing" in bad.stdout and "defects: 1 (1 missing)" in bad.stdout
    none = script("prepare.verify", tmp_path / "nowhere", check=False)
    assert none.returncode == 2 and none.stderr.count("\n") == 1 and "no such data set" in none.stderr


def test_what_only_a_second_look_finds(root):
    images = root / "Train" / "images" / "x"
    stems = sorted(p.stem for p in (images / "original").iterdir())
    record = {"photos": {"photo0": {"sets": [*stems, "photo9-0-0"]}},
              "enhancers": {version: {} for version in (*VERSIONS[1:], "05")}}
    runs.save_json(root / "quintuplets.json", record)
    # swapped
    a, b = (images / "02" / f"{stem}_02.png" for stem in stems[:2])
    a.rename(root / "tmp.png"), b.rename(a), (root / "tmp.png").rename(b)
    shutil.copy(images / "original" / f"{stems[2]}.png", images / "01" / f"{stems[2]}_01.png")
    shutil.copy(images / "03" / f"{stems[3]}_03.png", images / "04" / f"{stems[3]}_04.png")
    cut = images / "03" / f"{stems[4]}_03.png"
    # Pillow reads it without a word
    cut.write_bytes(cut.read_bytes()[:-12])
    shutil.rmtree(root / "Test" / "GT" / "t" / "images" / "02")
    (root / "Test" / "GT" / "t" / "labels").mkdir()
    train = "Train/images/x/"
    assert defects(root) == {
        ("content", f"{train}02/{stems[0]}_02.png"), ("content", f"{train}02/{stems[1]}_02.png"),
        ("identical", f"{train}01/{stems[2]}_01.png"), ("identical", f"{train}04/{stems[3]}_04.png"),
        ("unreadable", f"{train}03/{stems[4]}_03.png"), ("missing", "Test/GT/t/images/02"),
        ("label", "Test/GT/t/labels"), ("missing", f"{train}original/photo9-0-0.png"), ("missing", f"{train}05")}


def test_a_test_set_alone_is_looked_at(root):
    shutil.rmtree(root / "Train")
    report = verify.verify(root)
    assert report.defects == [] and list(report.counts) == ["Test"]


def test_several_sizes_are_told_but_no_defect(root):
    add_set(root / "Train" / "images" / "x", "small-0-0", photo(50, 32))
    for annotator in "ABC":
        add_label(root / "Train" / "labels" / "x" / annotator, "small-0-0")
    report = verify.verify(root)
    assert report.defects == [] and report.counts["Train"]["sizes"] == 2


def two_cuts(picture, size, down, right):
    """The upper left patch of a picture, and the one `down` and `right` of it, mirrored and darker."""
    return picture[:, :size, :size], (picture[:, down:down + size, right:right + size].flip(2) * 0.9).byte()


@pytest.mark.parametrize("down, right", [(12, 12), (12, 3), (0, 7), (5, 10)])
def test_a_mirrored_copy_shifted_by_up_to_a_sixteenth_is_a_near_duplicate(root, down, right):
    train, test = two_cuts(photo(7, 220), 192, down, right)
    add_set(root / "Train" / "images" / "x", "album-0-0", train)
    add_set(root / "Test" / "GT" / "t" / "images", "test1-0-0", test)
    add_lr(root, "test1-0-0", test)
    shutil.rmtree(root / "Train" / "labels")
    assert defects(root) == {("near-duplicate", "Test/GT/t/images/original/test1-0-0.png")}


def test_shifted_copies_of_photographs_are_found_and_other_patches_of_their_texture_are_not():
    from skimage import data as pictures
    places = {"astronaut": (0, 40), "chelsea": (60, 120), "coffee": (100, 150), "grass": (0, 0), "gravel": (0, 0)}
    for name, (top, left) in places.items():
        pixels = torch.from_numpy(np.atleast_3d(getattr(pictures, name)())).permute(2, 0, 1).expand(3, -1, -1)
        pixels = pixels[:, top:, left:]
        train, test = two_cuts(pixels, 128, 8, 7)
        others = pixels[:, 8:136, -128:], pixels[:, -128:, 9:137]
        thumbnails = [verify.thumbnail(image)[1:] for image in (train, test, *others)]
        scores = verify.look_alike(np.concatenate(thumbnails[1:]), thumbnails[0])[0]
        assert scores[0] > verify.CANDIDATE + 0.1 and (scores[1:] < verify.CANDIDATE - 0.1).all(), (name, scores)


def test_a_texture_that_repeats_is_told_apart_by_its_detail(root, tmp_path):
    # two walls of the same bricks, of different stone
    rng = np.random.default_rng(0)
    bricks = 80 * (torch.arange(192) // 16 % 2)[:, None].logical_xor((torch.arange(192) // 24 % 2)[None]).float() + 60
    walls = [bricks.expand(3, -1, -1) + torch.from_numpy(rng.normal(0, 40, (1, 192, 192))) for _ in range(2)]
    walls = [wall.clamp(0, 255).byte() for wall in walls]
    thumbnails = [verify.thumbnail(wall)[1:] for wall in walls]
    assert verify.look_alike(*thumbnails).item() > verify.CANDIDATE
    add_set(root / "Train" / "images" / "x", "wall-0-0", walls[0])
    add_set(root / "Test" / "GT" / "t" / "images", "test1-0-0", walls[1])
    add_lr(root, "test1-0-0", walls[1])
    shutil.rmtree(root / "Train" / "labels")
    assert defects(root) == set()


def test_swapped_test_inputs_are_defects(root):
    folder = root / "Test" / "LQ" / "t" / "Blind_LR"
    a, b = folder / "test0-0-0.png", folder / "test1-0-0.png"
    a.rename(root / "tmp.png"), b.rename(a), (root / "tmp.png").rename(b)
    assert defects(root) == {("content", f"Test/LQ/t/Blind_LR/test{n}-0-0.png") for n in range(2)}


def test_a_missing_original_is_one_line_and_none_advises_to_remove_its_versions(root):
    stems = sorted(p.stem for p in (root / "Train" / "images" / "x" / "original").iterdir())
    runs.save_json(root / "quintuplets.json", {"photos": {"p": {"sets": stems}}})
    (root / "Train" / "images" / "x" / "original" / "photo0-0-0.png").unlink()
    (root / "Test" / "GT" / "t" / "images" / "original" / "test0-0-0.png").unlink()
    first, second = verify.verify(root).defects
    assert first["kind"] == second["kind"] == "missing"
    assert first["file"].endswith("/photo0-0-0.png") and second["file"].endswith("/test0-0-0.png")
    assert "the original of photo0-0-0 is missing" in first["text"]


def test_sets_that_quintuplets_json_does_not_list_are_reported(root):
    stems = [f"photo{n // 2}-{n % 2}-0" for n in range(5)]
    runs.save_json(root / "quintuplets.json", {"photos": {"p": {"sets": stems}}})
    assert defects(root) == {("unlisted", "Train/images/x/original/photo2-1-0.png")}
    # as --demo writes it
    runs.save_json(root / "quintuplets.json", {"photos": {"p": {"split": "Train", "patches": 6}}})
    assert defects(root) == set()


def test_a_folder_of_the_wrong_name_is_named_and_its_labels_are_not_blamed(root):
    images = root / "Train" / "images" / "x"
    (images / "04").rename(images / "4")
    assert defects(root) == {("misnamed", "Train/images/x/4")}


def test_a_set_twice_under_two_names_is_reported(root):
    add_set(root / "Train" / "images" / "x", "zzz-0-0", photo(2))
    shutil.rmtree(root / "Train" / "labels")
    assert defects(root) == {("doubled", "Train/images/x/original/zzz-0-0.png")}


def test_the_line_about_a_test_set_does_not_speak_of_training(root, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["prepare.verify"])
    verify.main(verify.parse_args([str(root)]))
    test = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Test:"))
    assert test.endswith("no labels: evaluate.py compares with the originals")


# Packed images and the score atlas

def batches_of(root, **options):
    sets = data.find_sets(root, "Train")
    dataset = data.TrainingSet(sets, options.pop("sampler", "amo"), partial(runs.sample_seed, 3), 4, 2, 32, **options)
    return sets, [dataset.sample(step, lane) for step in (1, 2, 9) for lane in range(4)]


GRID = ["--crop", 32, "--stride", 16, "--device", "cpu"]


def call(script, *words):
    script.main(script.parse_args([str(word) for word in words]))


@pytest.mark.parametrize("sampler, load_size", [("amo", 0), ("amo", 48), ("rand", 0), ("orig", 40)])
def test_packed_and_unpacked_give_the_same_samples(quintuplets, tmp_path, sampler, load_size):
    root = shutil.copytree(quintuplets, tmp_path / "set")
    plain, expected = batches_of(root, sampler=sampler, load_size=load_size)
    call(pack, root)
    packed, samples = batches_of(root, sampler=sampler, load_size=load_size)
    assert plain.packed is None and packed.packed is not None
    assert (root / "packed/Train.bin").stat().st_size == 30 * 3 * 64 * 64
    for a, b in zip(expected, samples):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    original = load_image(packed.path(packed.stems[2], "03"))
    assert np.array_equal(packed.read(packed.stems[2], "03"), original.numpy())


def test_packed_images_that_do_not_fit_are_refused(quintuplets, tmp_path):
    root = shutil.copytree(quintuplets, tmp_path / "set")
    call(pack, root)
    whole = (root / "packed/Train.bin").read_bytes()
    (root / "packed/Train.bin").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="Train.bin: 368639 bytes, expected 368640: remove .*packed, and to use it "
                                         "again: python -m prepare.pack"):
        data.find_sets(root, "Train")
    (root / "packed/Train.bin").write_bytes(whole)
    path = next((root / "Train/images/0-6/02").glob("*.png"))
    save_image(path, torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match="was packed from other images than are there now"):
        data.find_sets(root, "Train")
    (root / "packed/Train.json").write_text("{")
    with pytest.raises(ValueError, match="Train.json: damaged"):
        data.find_sets(root, "Train")
    shutil.rmtree(root / "packed")
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="damaged image"):
        call(pack, root)
    # nothing half-written
    assert not list((root / "packed").glob("*"))


def test_the_atlas_picks_what_scoring_every_crop_would(quintuplets, rewards, tmp_path):
    root = shutil.copytree(quintuplets, tmp_path / "set")
    # each with another texture, so that no scores are equal
    for k, path in enumerate(sorted((root / "Train/images").rglob("*.png"))):
        noise = 4 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(k))
        save_image(path, (load_image(path).float() + noise).clamp(0, 255).byte())
    for reward, name in (("ranker", "ranker-32-8"), ("test_rewards:brightness", "test_rewards_brightness-32-8")):
        call(atlas, root, "--reward", reward, "--crop", 32, "--stride", 8, "--device", "cpu")
        model, sets = iqa.create_reward([reward]), data.find_sets(root, "Train")
        atlases = Atlas.open_all([str(root / "atlas" / f"{name}.npy")], sets, 32, model)
        assert atlases[0][0].table.shape == (6, 5, 2, 5, 5)
        seeds = partial(runs.sample_seed, 0)
        dataset = data.TrainingSet(sets, "amo", seeds, 4, 1, 32, tau=None, atlases=atlases)
        everything = data.TrainingSet(sets, "amo", seeds, 4, 1, 32)
        seen = set()
        for step in range(1, 8):
            for lane in range(4):
                sample = dataset.sample(step, lane)
                y, x = sample["where"].tolist()
                assert y % 8 == x % 8 == 0 and sample["crops"].shape == (1, 3, 32, 32)
                assert torch.equal(sample["original"], everything.sample(step, lane)["original"])
                stem = dataset.names(step)[lane]
                flipped = not np.array_equal(sample["original"].numpy(), sets.read(stem, "original"))
                images = [sets.read(stem, version)[:, :, ::-1 if flipped else 1] for version in sets.versions]
                crops = torch.stack([torch.from_numpy(np.array(image[:, y:y + 32, x:x + 32])) for image in images])
                scores = model(crops.float() / 255)
                best = scores.argmax()
                assert sample["version"].item() == best and torch.equal(sample["crops"][0], crops[best])
                assert sample["score"] == pytest.approx(scores.max().item(), abs=1e-4)
                seen.add((flipped, y, x))
        assert len(seen) > 15


def test_temperature_and_sums_of_atlases(quintuplets, rewards, tmp_path):
    root = shutil.copytree(quintuplets, tmp_path / "set")
    call(atlas, root, "--reward", "test_rewards:brightness", *GRID)
    call(atlas, root, "--reward", "test_rewards:brightness=-3", *GRID, "--out", tmp_path / "dark.npy")
    sets, bright_file = data.find_sets(root, "Train"), root / "atlas/test_rewards_brightness-32-16.npy"
    bright, dark = (Atlas(file, sets, 32) for file in (bright_file, tmp_path / "dark.npy"))

    def picked(atlases, tau=None):
        dataset = data.TrainingSet(sets, "amo", partial(runs.sample_seed, 0), 4, 1, 32, atlases=atlases, tau=tau)
        chosen = [dataset.sample(step, lane)["version"].item() for step in range(1, 26) for lane in range(4)]
        return [sets.versions[index] for index in chosen]
    assert set(picked([(bright, 1.0)])) == {"02"} and set(picked([(dark, 1.0)])) == {"03"}
    assert set(picked([(bright, 4.0), (dark, 1.0)])) == {"02"}
    assert set(picked([(bright, 2.0), (dark, 1.0)])) == {"03"}
    soft = picked([(bright, 1.0)], tau=10.0)
    weights = np.exp(np.array([0, 10, 30, -30, 5]) / 2.55 / 10)
    shares = np.array([soft.count(version) for version in sets.versions]) / 100
    assert np.abs(shares - weights / weights.sum()).max() < 0.12 and len(set(soft)) == 5
    files = [str(bright_file), f"{tmp_path / 'dark.npy'}=0.5"]
    assert [weight for _, weight in Atlas.open_all(files, sets, 32)] == [1.0, 0.5]
    # a = in the path
    named = str(shutil.copytree(bright_file.parent, root / "lr=1e-4") / bright_file.name)
    assert [weight for _, weight in Atlas.open_all([named], sets, 32)] == [1.0]
    assert [weight for _, weight in Atlas.open_all([f"{named}=0.25"], sets, 32)] == [0.25]
    # 1 - 0.5 * 3
    Atlas.open_all(files, sets, 32, iqa.create_reward(["test_rewards:brightness=-0.5"]))
    call(atlas, root, "--reward", "ranker", *GRID, "--out", tmp_path / "ranker.npy")
    mixed = [files[0] + "=2", f"{tmp_path / 'ranker.npy'}=0.5"]
    Atlas.open_all(mixed, sets, 32, iqa.create_reward(["ranker=0.5", "test_rewards:brightness=2"]))
    for other in (["ranker=0.5"], ["ranker", "test_rewards:brightness=2"]):
        with pytest.raises(ValueError, match=r"the sum of test_rewards:brightness=2 \(\w+\) ranker=0.5 \(\w+\), but "
                                             "--reward is ranker=.*: name the same reward, weights and all, or none"):
            Atlas.open_all(mixed, sets, 32, iqa.create_reward(other))
    # of one atlas too: else the worst crops would be trained on
    one, negative = files[:1], [f"{files[0]}=-1"]
    Atlas.open_all(negative, sets, 32)
    Atlas.open_all([f"{files[0]}=3"], sets, 32, iqa.create_reward(["test_rewards:brightness=3"]))
    for words, weight in ((negative, ""), (one, "=3"), ([f"{files[0]}=3"], "")):
        with pytest.raises(ValueError, match="the sum of test_rewards:brightness=.*, but --reward is test_rewards:"):
            Atlas.open_all(words, sets, 32, iqa.create_reward([f"test_rewards:brightness{weight}"]))
    with pytest.raises(ValueError, match="--atlas .*=much: write FILE or FILE=WEIGHT"):
        Atlas.open_all([files[0] + "=much"], sets, 32)


def test_an_atlas_of_something_else_is_refused_by_name(quintuplets, rewards, tmp_path):
    root = shutil.copytree(quintuplets, tmp_path / "set")
    words = [root, "--reward", "test_rewards:brightness", *GRID]
    call(atlas, *words)
    file, sets = root / "atlas/test_rewards_brightness-32-16.npy", data.find_sets(root, "Train")
    with pytest.raises(ValueError, match=r"the sum of test_rewards:brightness=1 \(\w+\), but --reward is ranker=1 "):
        Atlas.open_all([str(file)], sets, 32, iqa.create_reward(["ranker"]))
    with pytest.raises(ValueError, match=r"made of other crop \(32, here 48\)"):
        Atlas(file, sets, 48)
    with pytest.raises(ValueError, match="not a whole atlas"):
        Atlas(tmp_path / "none.npy", sets, 32)
    anew = "remove it and .*json to begin anew, or name another --out"
    with pytest.raises(ValueError, match=f"begun with other stride and shape: {anew}"):
        call(atlas, *words, "--stride", 8, "--out", file)
    path = next((root / "Train/images/0-6/02").glob("*.png"))
    save_image(path, torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match="made of other images"):
        Atlas(file, data.find_sets(root, "Train"), 32)
    with pytest.raises(ValueError, match=f"with other images; its scores are of the images as they were then: {anew}"):
        call(atlas, *words)


def test_an_interrupted_atlas_continues(quintuplets, rewards, tmp_path, monkeypatch):
    root = shutil.copytree(quintuplets, tmp_path / "set")
    words = [root, "--reward", "test_rewards:brightness", *GRID]
    real, count = atlas.score_crops, []

    def counted(*args):
        count.append(1)
        if len(count) == 25:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(atlas, "score_crops", counted)
    with pytest.raises(KeyboardInterrupt):
        call(atlas, *words)
    file = root / "atlas/test_rewards_brightness-32-16.npy"
    with pytest.raises(ValueError, match="not finished; the same `prepare.atlas` command continues it"):
        Atlas(file, data.find_sets(root, "Train"), 32)
    half = np.load(file)
    assert np.isfinite(half[:2]).all() and np.isnan(half[3:]).all()
    call(atlas, *words)
    # 60 in all: two sets were whole, of the third 4 are done again
    assert len(count) == 25 + 40 and np.array_equal(np.load(file)[:2], half[:2])
    call(atlas, *words, "--out", tmp_path / "whole.npy")
    assert np.array_equal(np.load(file), np.load(tmp_path / "whole.npy"))


def test_two_processes_make_the_same_atlas(quintuplets, script, tmp_path):
    root = shutil.copytree(quintuplets, tmp_path / "set")
    words = [root, "--reward", "ranker", *GRID]
    call(atlas, *words, "--out", tmp_path / "one.npy")
    script("prepare.atlas", *words, "--out", tmp_path / "two.npy", processes=2)
    assert np.array_equal(np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy"))
    output = script("prepare.atlas", *words, "--compare", 20, "--out-json", tmp_path / "c.json").stdout
    assert output.count("the same winner in") == 2 and "of 20 random crops" in output
    record = json.loads((tmp_path / "c.json").read_text())
    assert record["n"] == 20 and f"stride 16: the same winner in {record['same_winner']['16'] / 20:.1%}" in output


def test_a_damaged_or_foreign_table_is_never_completed(quintuplets, rewards, tmp_path):
    root = shutil.copytree(quintuplets, tmp_path / "set")
    words = [root, "--reward", "test_rewards:brightness", *GRID]
    call(atlas, *words)
    file, sets = root / "atlas/test_rewards_brightness-32-16.npy", data.find_sets(root, "Train")
    whole, record = file.read_bytes(), file.with_suffix(".json")
    file.write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match="damaged .*: remove it and"):
        call(atlas, *words)
    with pytest.raises(ValueError, match="not a whole atlas"):
        Atlas(file, sets, 32)
    np.save(file, np.zeros((6, 5, 2, 2, 2), np.float32))
    with pytest.raises(ValueError, match="damaged .a table of"):
        call(atlas, *words)
    with pytest.raises(ValueError, match="not a whole atlas .a table of"):
        Atlas(file, sets, 32)
    file.write_bytes(whole)
    content = json.loads(record.read_text())
    record.write_text(json.dumps({k: v for k, v in content.items() if k != "versions"}))
    with pytest.raises(ValueError, match="damaged"):
        call(atlas, *words)
    with pytest.raises(ValueError, match="not a whole atlas"):
        Atlas(file, sets, 32)
    record.unlink()
    with pytest.raises(ValueError, match="is there, but not .*json, which would describe it"):
        call(atlas, *words)
    with pytest.raises(SystemExit):
        atlas.parse_args([str(root), "--out", "x.json"])
    for compare in (0, 3):
        with pytest.raises(ValueError, match="smaller than the 96 pixels"):
            call(atlas, *words, "--crop", 96, "--compare", compare)
    record.write_text(json.dumps(content))
    for word in (f"{file}=nan", f"{file}=much"):
        with pytest.raises(ValueError, match="write FILE or FILE=WEIGHT"):
            Atlas.open_all([word], sets, 32)


def test_a_grey_image_is_refused_before_anything_is_packed(quintuplets, tmp_path):
    root = shutil.copytree(quintuplets, tmp_path / "set")
    path = next((root / "Train/images/0-6/02").glob("*.png"))
    Image.open(path).convert("L").save(path)
    with pytest.raises(ValueError, match="image mode L"):
        call(pack, root)
    assert not (root / "packed").exists()


def test_packed_images_of_one_size_and_other_bytes_are_noticed_and_packed_again(quintuplets, tmp_path):
    root = shutil.copytree(quintuplets, tmp_path / "set")
    for path in list((root / "Train/images").rglob("*.png")):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    call(pack, root)
    path = next((root / "Train/images/0-6/02").glob("*.bmp"))
    size = path.stat().st_size
    Image.new("RGB", (64, 64), "red").save(path)
    assert path.stat().st_size == size
    with pytest.raises(ValueError, match="was packed from other images"):
        data.find_sets(root, "Train")
    # where nobody reads a packed pixel
    assert len(data.find_photos(root).stems) == 6
    call(pack, root)
    sets = data.find_sets(root, "Train")
    assert (sets.read(path.stem[:-3], "02")[0] == 255).all()
    again = pickle.dumps(sets.packed)
    copy, stem = pickle.loads(again), path.stem[:-3]
    assert len(again) < 20_000 and np.array_equal(copy.read(stem, "02"), sets.read(stem, "02"))
    Image.new("RGB", (64, 60), "red").save(path)
    with pytest.raises(ValueError, match="64x60 pixels but its original has 64x64"):
        call(pack, root)
    # what was packed before is still there
    with pytest.raises(ValueError, match="was packed from other images"):
        data.find_sets(root, "Train")
    index = root / "packed/Train.json"
    Image.new("RGB", (64, 64), "red").save(path)
    call(pack, root)
    with pytest.raises(ValueError, match="smaller than the 80 pixels"):
        dataset = data.TrainingSet(data.find_sets(root, "Train"), "amo", partial(runs.sample_seed, 3), 4, 2, 80)
        data.check_headers(dataset, runs.World(0, 1, torch.device("cpu")))
    content = json.loads(index.read_text())
    # the image at the beginning would lie before it
    moved = {version: {stem: [offset if offset else -12288, h, w] for stem, (offset, h, w) in images.items()}
             for version, images in content["images"].items()}
    for damage in ({"images": {}}, {"signature": None}, {"images": moved}):
        whole = index.read_text()
        index.write_text(json.dumps({k: v for k, v in (content | damage).items() if v is not None}))
        with pytest.raises(ValueError, match="Train.json: damaged"):
            data.find_sets(root, "Train")
        index.write_text(whole)


@pytest.mark.parametrize("change, message", [
    ({"reward": ["x"]}, "not a whole atlas"), ({"reward": {"x": {"weight": "1", "hash": ""}}}, "not a whole atlas"),
    ({"stride": 0}, "its .json was changed"), ({"stride": 8}, "its .json was changed"),
    ({"stride": "16"}, "its .json was changed"), ({"stems": ["photo0-0-0", "photo0-288-0"]}, "its .json was changed"),
    ({"stems": 5}, "not a whole atlas"), ({"table": "0"}, "not a whole atlas .its table was changed"),
    ({"reward": None}, "not a whole atlas"), ([], "not a whole atlas"), ({"shape": None}, "not a whole atlas")])
def test_an_edited_record_of_an_atlas_is_one_line_that_names_it(quintuplets, tmp_path, change, message):
    file = tmp_path / "a.npy"
    call(atlas, quintuplets, "--reward", "ranker", *GRID, "--out", file)
    record, sets = json.loads(file.with_suffix(".json").read_text()), data.find_sets(quintuplets, "Train")
    file.with_suffix(".json").write_text(json.dumps(record | change if isinstance(change, dict) else change))
    with pytest.raises(ValueError, match=f"a.npy: {message}"):
        Atlas.open_all([str(file)], sets, 32)


def test_a_table_that_changed_or_is_empty_is_refused_and_never_signed_again(quintuplets, tmp_path):
    file = tmp_path / "a.npy"
    words = [quintuplets, "--reward", "ranker", *GRID, "--out", file]
    call(atlas, *words)
    whole, sets = file.read_bytes(), data.find_sets(quintuplets, "Train")
    for content in (b"", whole[:-4] + bytes(4)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="a.npy: not a whole atlas"):
            Atlas(file, sets, 32)
        with pytest.raises(ValueError, match="a.npy: damaged .*: remove it and .*a.json"):
            call(atlas, *words)
    file.write_bytes(whole)
    Atlas(file, sets, 32)


def test_an_atlas_refuses_wrong_images_and_places_before_the_first_score(quintuplets, tmp_path, monkeypatch):
    scored = []
    monkeypatch.setattr(atlas, "score_crops", lambda *a: scored.append(a))
    words = ["--reward", "ranker", *GRID]
    cases = [((64, 60), "RGB", "64x60 pixels but its original has"), ((64, 64), "L", "image mode L"),
             ((80, 80), "RGB", "unlike the first image, 64x64")]
    for k, (size, mode, message) in enumerate(cases):
        root = shutil.copytree(quintuplets, tmp_path / str(k))
        last = sorted((root / "Train/images/0-6/original").glob("*"))[-1].stem
        for path in (root / "Train/images").rglob(f"{last}_03.png" if k < 2 else f"{last}*.png"):
            Image.new(mode, size).save(path)
        with pytest.raises(ValueError, match=message):
            call(atlas, root, *words)
        assert not scored and not (root / "atlas").exists()
    with pytest.raises(ValueError, match="--out-json .*: a folder"):
        call(atlas, quintuplets, *words, "--compare", 3, "--out-json", tmp_path)
    assert not scored


def test_a_killed_pack_leaves_what_was_packed_before(quintuplets, tmp_path, monkeypatch, capsys):
    root = shutil.copytree(quintuplets, tmp_path / "set")
    call(pack, root)
    assert "train.py uses it from now on" in capsys.readouterr().out
    monkeypatch.setattr(runs, "write_atomic", lambda path, write: (_ for _ in ()).throw(KeyboardInterrupt()))
    (root / "packed/Train.bin.tmp").write_bytes(b"of a pack that was killed")
    with pytest.raises(KeyboardInterrupt):
        call(pack, root)
    assert data.find_sets(root, "Train").packed is not None and not (root / "packed/Train.bin.tmp").exists()
