"""iqa.py without its Ranker: the reward's sign, shape, gradient and errors, and the cache of static scores."""
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import iqa
import runs
from images import load_image, save_image

SHARED = Path(__file__).resolve().parents[2] / "shared"
IQA = SHARED / "data/weights/iqa"
REFERENCE = {  # shared/data/README.md, pyiqa 0.1.16 on calibration/dist I03, I04, I06, I08, I19
    "niqe": ("niqe_modelparameters.mat", [15.6558, 3.6549, 3.2342, 3.1917, 9.0727]),
    "brisque": ("brisque_svm_weights.pth", [94.644, -0.1152, 1.0748, 5.1383, 66.8348]),
    "piqe": (None, [100.0, 21.6242, 35.8646, 41.1471, 76.9485]),
}
needs_shared = pytest.mark.skipif(not IQA.is_dir(), reason="../shared/data is not here")
ALONE = runs.World(0, 1, torch.device("cpu"))
OWN = '''
import torch
from torch import nn

def brightness(device):
    return lambda x: x.mean((1, 2, 3))

def darkness(device):
    def score(x):
        return x.mean((1, 2, 3), keepdim=True)
    score.lower_better = True
    return score

def list_of_numbers(device):
    return lambda x: x.mean((1, 2, 3)).tolist()


def one_for_all(device):
    return lambda x: x.mean().expand(2)

def nan(device):
    return lambda x: x.mean((1, 2, 3)) * float("nan")

def detached(device):
    return lambda x: x.mean((1, 2, 3)).detach()

def through_numpy(device):
    return lambda x: torch.from_numpy(x.numpy().mean((1, 2, 3)))

def flat(device):
    return lambda x: (x * 0).sum((1, 2, 3)) + 3

def infinite_slope(device):
    return lambda x: (x - x).sum((1, 2, 3)).sqrt() + x.mean((1, 2, 3))

class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.drop = nn.Dropout(0.9)
    def forward(self, x):
        return self.drop(x).mean((1, 2, 3)) * self.scale

def module(device):
    return Dropping().train()
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The folder of a user's module my_rewards, importable."""
    (tmp_path / "my_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def images(n=3, side=32, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 600, text
    return text


# Words

@pytest.mark.fast
def test_rewards_are_parsed_with_weights_and_colon_names():
    assert iqa.parse_rewards(["musiq"]) == [("musiq", 1.0)]
    assert iqa.parse_rewards(["musiq=0.05", "a.b:build=-2", "ranker=1e-3"]) == \
        [("musiq", 0.05), ("a.b:build", -2.0), ("ranker", 1e-3)]
    for words, match in ((["musiq=much"], "'much' is not a number"),
                         (["musiq", "niqe", "musiq=2"], "--reward musiq=2: names must differ"),
                         (["musiq=nan"], "finite"), (["musiq=inf"], "finite"), (["=1"], "--reward =1"),
                         ([""], "--reward")):
        with pytest.raises(runs.UserError, match=match):
            iqa.parse_rewards(words)


# The user's own

@pytest.mark.fast
def test_own_function_is_a_reward_and_lower_better_flips_its_sign(own):
    x = images()
    mean = x.mean((1, 2, 3))
    assert torch.allclose(iqa.create_reward(["my_rewards:brightness"])(x), mean)
    assert torch.allclose(iqa.create_reward(["my_rewards:darkness"])(x), -mean)
    total = iqa.create_reward(["my_rewards:brightness=0.5", "my_rewards:darkness=3"])
    assert torch.allclose(total(x), 0.5 * mean - 3 * mean) and total(x).shape == (3,)
    each = total.each(x)
    assert list(each) == ["my_rewards:brightness", "my_rewards:darkness"]
    assert torch.allclose(each["my_rewards:darkness"], -mean)


@pytest.mark.fast
def test_reward_is_frozen_and_stays_in_eval_mode(own):
    reward = iqa.create_reward(["my_rewards:module"], need_gradient=True)
    x = images()
    reward.train()
    nn.ModuleList([reward]).train(True)
    assert not any(m.training for m in reward.modules())
    assert not any(p.requires_grad for p in reward.parameters()) and len(list(reward.parameters())) == 1
    # dropout would show
    assert torch.equal(reward(x), reward(x)) and torch.allclose(reward(x), 2 * x.mean((1, 2, 3)))
    x.requires_grad_(True)
    assert torch.allclose(torch.autograd.grad(reward(x).sum(), x)[0], torch.full_like(x, 2 / x[0].numel()))


@pytest.mark.fast
def test_scores_stay_fp32_under_autocast(own):
    with torch.autocast("cpu", torch.bfloat16):
        scores = iqa.create_reward(["my_rewards:module"])(images().bfloat16())
    assert scores.dtype == torch.float32 and torch.allclose(scores, 2 * images().bfloat16().float().mean((1, 2, 3)))


@pytest.mark.fast
@pytest.mark.parametrize("word, gradient, match", [
    ("my_rewards:list_of_numbers", False, "returned list, expected a tensor of one score per image"),
    ("my_rewards:one_for_all", False, r"returned shape \(2,\) for 1 images"),
    ("my_rewards:nan", False, "score on a photograph is not finite"),
    ("my_rewards:absent", False, "absent.*PYTHONPATH"),
    ("my_rewardz:build", False, "my_rewardz.*PYTHONPATH"),
    ("my_rewards:detached", True, "no usable gradient on a photograph"),
    ("my_rewards:through_numpy", True, "no gradient .*not be optimised directly"),
    ("my_rewards:flat", True, "no usable gradient on a photograph"),
    ("my_rewards:infinite_slope", True, "no usable gradient on a photograph"),
])
def test_unusable_own_rewards_are_refused(own, word, gradient, match):
    with pytest.raises(runs.UserError, match=match) as error:
        iqa.create_reward([word], need_gradient=gradient)
    assert one_line(error).startswith(("--reward", "reward"))
    if gradient:
        # it may still choose ground truths
        assert torch.isfinite(iqa.create_reward([word])(images())).all()


@pytest.mark.fast
def test_range_and_shape_of_the_input_are_checked(own):
    for bad in (images() * 255, images() - 0.5, images() * torch.nan):
        with pytest.raises(ValueError, match=r"RGB in \[0, 1\]"):
            iqa.create_reward(["my_rewards:brightness"])(bad)
    reward = iqa.create_reward(["my_rewards:brightness"])
    for bad in (images()[0], images()[:, :1]):
        with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
            reward(bad)


@pytest.mark.skipif(not (SHARED / "tools/cnniqa_live.py").exists(), reason="../shared/tools is not here")
def test_cnniqa_of_shared_is_a_differentiable_reward_with_its_reference_values(monkeypatch):
    monkeypatch.syspath_prepend(SHARED / "tools")
    reward = iqa.create_reward(["cnniqa_live:build"], need_gradient=True)
    scores = [reward(read(n)).item() for n in ("I03", "I04", "I19")]
    assert scores == pytest.approx([100 - 77.90, 100 - 12.82, 100 - 85.68], abs=0.01)


# pyiqa

def read(name):
    return load_image(SHARED / f"data/calibration/dist/{name}.bmp")[None].float() / 255


@needs_shared
@pytest.mark.parametrize("name", list(REFERENCE))
def test_reward_is_minus_the_reference_value_of_a_lower_better_metric(name):
    from pyiqa import create_metric
    file, values = REFERENCE[name]
    reward = iqa.create_reward([name], weights_file=file and IQA / file)
    weights = {"pretrained_model_path": str(IQA / file)} if file else {}
    direct = create_metric(name, device=torch.device("cpu"), **weights)
    scores = [reward(read(n)).item() for n in ("I03", "I04", "I06", "I08", "I19")]
    assert scores == pytest.approx([-direct(read(n)).item() for n in ("I03", "I04", "I06", "I08", "I19")], abs=1e-5)
    # 0.01: across torch versions NIQE moves by 0.003 and BRISQUE by 0.009 (by 0.002 with the number of threads alone)
    assert scores == pytest.approx([-v for v in values], abs=0.01)
    assert torch.allclose(reward(torch.cat([read("I03"), read("I04")])), torch.tensor(scores[:2]), atol=0.01)


def test_piqe_may_choose_but_not_be_optimised():
    error = "--reward piqe: no usable gradient on a photograph .zero.*choose ground truths"
    with pytest.raises(runs.UserError, match=error):
        iqa.create_reward(["piqe"], need_gradient=True)
    blurred = torch.nn.functional.avg_pool2d(images(1, 96), 5, 1, 2)
    reward = iqa.create_reward(["piqe"])
    assert reward(images(2, 96)).shape == (2,) and (reward(blurred) < 0).all()


def test_only_known_no_reference_metrics_are_accepted():
    for word, match in (("lpips", "this is a full-reference metric.*musiq"),
                        ("fid", "compares two sets of images.*musiq"), ("muisq", "is unknown.*musiq"),
                        ("rankr", "is unknown.*ranker"), ("zzzzzz", "is unknown.*musiq, ranker")):
        with pytest.raises(runs.UserError, match=f"--reward {word}: .*{match}") as error:
            iqa.create_reward([word])
        one_line(error)
    with pytest.raises(runs.UserError, match="--reward-weights names the weights of one metric"):
        iqa.create_reward(["musiq", "niqe"], weights_file="x.pth")
    for name in ("rewards.sharpness:build", "runs/x.pth"):
        with pytest.raises(runs.UserError, match=f"{name} finds its own weights: leave out y.pth"):
            iqa.create_reward([name], weights_file="y.pth")


def test_a_package_that_pyiqa_does_not_declare_is_named(monkeypatch):
    # as if it were not installed
    monkeypatch.setitem(sys.modules, "icecream", None)
    for module in [m for m in sys.modules if m.startswith("pyiqa.archs.qalign")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(runs.UserError, match="--reward qalign: pyiqa needs a package.*pip install icecream") as error:
        iqa.create_reward(["qalign"])
    one_line(error)


@pytest.fixture(scope="module")
def musiq_file(tmp_path_factory):
    """A file like musiq_koniq_ckpt with random weights, large enough in the head to see differences."""
    from pyiqa.archs.musiq_arch import MUSIQ
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = MUSIQ(pretrained=False).state_dict()
    path = tmp_path_factory.mktemp("musiq") / "random.pth"
    torch.save({k: v.clone() for k, v in state.items()}, path)
    return path


def test_a_local_file_of_musiq_ava_has_ten_classes(tmp_path):
    from pyiqa.archs.musiq_arch import MUSIQ
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(MUSIQ(pretrained=False, num_class=10).state_dict(), tmp_path / "ava.pth")
    score = iqa.create_reward(["musiq-ava"], weights_file=tmp_path / "ava.pth")(images(1, 64))
    # the mean of a distribution over 1 to 10
    assert 1 < score.item() < 10


def test_musiq_with_a_local_file_scores_multi_scale_in_eval_mode_and_passes_gradients(musiq_file, monkeypatch):
    import pyiqa.archs.musiq_arch as arch
    reward = iqa.create_reward(["musiq"], weights_file=musiq_file, need_gradient=True).train()
    loaded = torch.load(musiq_file, weights_only=True)
    held = reward.models["musiq"].net.state_dict()
    assert loaded.keys() == held.keys() and all(torch.equal(loaded[k], held[k]) for k in loaded)
    tokens, patches = [], arch.get_multiscale_patches

    def spy(x, **options):
        tokens.append(patches(x, **options))
        return tokens[-1]
    monkeypatch.setattr(arch, "get_multiscale_patches", spy)
    pair = images(2, 64)
    with torch.no_grad():
        together, singles = reward(pair), torch.cat([reward(pair[:1]), reward(pair[1:])])
    assert together.shape == (2,) and together.dtype == torch.float32 and torch.allclose(together, singles, atol=1e-5)
    assert together[0] != together[1]
    # native size, 224, 384
    assert len(tokens) == 3 and set(tokens[0][..., -2].unique().tolist()) >= {0.0, 1.0, 2.0}
    # the same through pyiqa's own way to use it
    with torch.no_grad():
        from pyiqa import create_metric
        direct = create_metric("musiq", pretrained_model_path=str(musiq_file), device=torch.device("cpu"))
        assert torch.allclose(direct(pair)[:, 0], together, atol=1e-5)
    x = pair[:1].clone().requires_grad_(True)
    gradient = torch.autograd.grad(reward(x).sum(), x)[0]
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


BUILD = """
import sys; sys.path.insert(0, {repo!r})
import torch; torch.set_num_threads(1)
import iqa, runs
try:
    print("score", iqa.create_reward(["musiq"])(torch.full((1, 3, 64, 64), 0.5)).shape)
except runs.UserError as error:
    print(type(error).__name__, str(error))
"""


def build_musiq(home):
    """stdout of creating MUSIQ in a new process with this TORCH_HOME (pyiqa reads it when imported)."""
    env = {**os.environ, "TORCH_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BUILD.format(repo=str(runs.REPO))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()


def network():
    try:
        socket.create_connection(("huggingface.co", 443), timeout=2).close()
        return True
    except OSError:
        return False


def test_musiq_is_taken_from_torch_home_and_a_damaged_copy_there_is_named(tmp_path, musiq_file):
    place = tmp_path / "a home/hub/pyiqa/musiq_koniq_ckpt-e95806b9.pth"
    place.parent.mkdir(parents=True)
    shutil.copy(musiq_file, place)
    assert build_musiq(tmp_path / "a home")[-1] == "score torch.Size([1])"
    place.write_bytes(musiq_file.read_bytes()[:1000])
    said = build_musiq(tmp_path / "a home")
    assert len(said) == 1 and said[0].startswith(f"UserError {place}: does not fit metric musiq")
    assert said[0].endswith("remove it, to have it fetched again")


def test_failing_download_names_the_file_its_place_and_the_flag(tmp_path):
    if network():
        pytest.skip("huggingface.co can be reached: the download would succeed")
    said = build_musiq(tmp_path / "a home")
    assert len(said) == 1 and said[0].startswith("UserError --reward musiq: weights are not here")
    for words in ("/musiq_koniq_ckpt-e95806b9.pth and save it as",
                  str(tmp_path / "a home/hub/pyiqa/musiq_koniq_ckpt-e95806b9.pth"), "--reward-weights FILE",
                  "--reward ranker needs no download"):
        assert words in said[0]
    assert not list(tmp_path.rglob("*.pth*"))


def test_nima_needs_its_own_file_and_no_backbone(monkeypatch):
    """timm is asked for a network without weights; a metric whose backbone is downloaded says what does come."""
    timm = pytest.importorskip("timm")
    asked = []

    def create(name, pretrained=False, **_):
        asked.append((name, pretrained))
        raise FileNotFoundError("stop here")
    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(runs.UserError, match="--metrics nima: weights are not here"):
        iqa.pyiqa_model("nima", "cpu", None, flag="--metrics")
    with pytest.raises(runs.UserError, match="python -m prepare.weights get topiq-nr fetches its own weights"):
        iqa.pyiqa_model("topiq_nr", "cpu", None, flag="--metrics")
    assert asked == [("inception_resnet_v2", False), ("resnet50", True)] and timm.create_model is create


@pytest.mark.parametrize("local, advice", [(None, "--reward-weights FILE"), ("", None),
                                           ("--reward-weights niqe=", "--reward-weights niqe=FILE")])
def test_a_failing_download_names_a_flag_that_the_script_has(monkeypatch, local, advice):
    import pyiqa

    def fail(*args, **kwargs):
        print('Downloading: "https://host/niqe.mat" to /home/hub/pyiqa/niqe.mat')
        raise OSError("no network")
    monkeypatch.setattr(pyiqa, "create_metric", fail)
    with pytest.raises(runs.UserError) as error:
        iqa.create_reward(["niqe"], local=local)
    assert "save it as /home/hub/pyiqa/niqe.mat" in str(error.value)
    assert advice in str(error.value) if advice else "weights FILE" not in str(error.value)


def test_damaged_foreign_and_dangerous_weight_files_are_refused(tmp_path, musiq_file):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))
    torch.save({"conv_root.weight": Attack()}, tmp_path / "attack.bin")
    (tmp_path / "cut.pth").write_bytes(musiq_file.read_bytes()[:5000])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("<html>Not found</html>")
    (tmp_path / "cut.mat").write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + b"\0" * 9)
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save((torch.zeros(3), torch.zeros(3)), tmp_path / "svm.pth")
    plain, fit = "not a plain weight file", "does not fit metric"
    for metric, file, match in (("musiq", "cut.pth", plain), ("musiq", "empty.pth", plain),
                                ("musiq", "text.pth", plain), ("musiq", "attack.bin", plain),
                                ("niqe", "cut.mat", plain), ("niqe", "other.pth", fit),
                                ("musiq", "other.pth", fit), ("musiq", "svm.pth", fit), ("piqe", "other.pth", fit)):
        with pytest.raises(runs.UserError, match=f"--reward-weights .*{file}: {match}") as error:
            iqa.create_reward([metric], weights_file=tmp_path / file)
        one_line(error)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(runs.UserError, match="none.pth: no such file"):
        iqa.create_reward(["musiq"], weights_file=tmp_path / "none.pth")


# Static scores

class Counting(nn.Module):
    """Mean brightness in 0-100; counts images and can break down after a number of them."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.register_buffer("scale", torch.tensor(100.0))
        self.seen, self.stop_after = 0, stop_after

    def forward(self, x):
        if self.stop_after is not None and self.seen >= self.stop_after:
            raise KeyboardInterrupt
        self.seen += len(x)
        return x.mean((1, 2, 3)) * self.scale


def score(paths, cache, model=None, name="counting", world=ALONE, batch_size=2):
    """-> scores, number of images that were scored for it."""
    model = model or Counting()
    before = model.seen
    values = iqa.score_images(paths, iqa.Reward({name: model}, {name: 1.0}), cache, world, batch_size)
    return values, model.seen - before


@pytest.fixture
def photos(tmp_path):
    """Seven flat images whose brightness is 10, 20, ... in shuffled order, two of another size."""
    paths = []
    for k, value in enumerate((40, 10, 70, 20, 60, 30, 50)):
        paths.append(tmp_path / f"photo{value}.png")
        save_image(paths[-1], torch.full((3, 40 if k in (2, 5) else 32, 32), value, dtype=torch.uint8))
    return paths


EXPECTED = torch.tensor([40, 10, 70, 20, 60, 30, 50], dtype=torch.float64) / 2.55


@pytest.mark.fast
def test_scores_come_in_the_order_of_the_paths_and_are_cached(photos, tmp_path):
    for batch_size in (1, 3, 8):
        cache = tmp_path / f"cache{batch_size}"
        first, scored = score(photos, cache, batch_size=batch_size)
        assert torch.allclose(first, EXPECTED, atol=1e-5) and first.dtype == torch.float64 and scored == 7
        again, scored = score(photos[::-1], cache)
        assert torch.equal(again, first.flip(0)) and scored == 0


@pytest.mark.fast
def test_interrupted_scoring_continues(photos, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        score(photos, tmp_path / "cache", Counting(stop_after=4))
    values, scored = score(photos, tmp_path / "cache")
    assert torch.allclose(values, EXPECTED, atol=1e-5) and scored == 3
    assert torch.equal(score(photos, tmp_path / "cache")[0], values)


@pytest.mark.fast
def test_scores_are_on_disk_before_the_next_batch_starts(photos, tmp_path):
    lines = []

    class Watching(Counting):
        def forward(self, x):
            lines.append(sum(len(file.read_text().splitlines()) for file in (tmp_path / "cache").iterdir()))
            return super().forward(x)
    # of one size: two batches of two
    score(photos[:2] + photos[3:5], tmp_path / "cache", Watching())
    assert lines == [0, 2]


@pytest.mark.fast
def test_cut_off_last_line_is_scored_again_and_does_not_spoil_the_next(photos, tmp_path):
    values, _ = score(photos, tmp_path / "cache")
    file, = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    # 1: only the newline is gone
    for cut in (1, 2, 3, 30, last - 1):
        file.write_bytes(whole[:-cut])
        for expected in (0 if cut == 1 else 1, 0):
            again, scored = score(photos, tmp_path / "cache")
            assert torch.equal(again, values) and scored == expected, cut


@pytest.mark.fast
def test_changed_image_is_scored_again_and_a_moved_one_is_not(photos, tmp_path):
    score(photos, tmp_path / "cache")
    save_image(photos[3], torch.full((3, 32, 32), 200, dtype=torch.uint8))
    os.utime(photos[3], ns=(0, 10 ** 18))
    values, scored = score(photos, tmp_path / "cache")
    assert scored == 1 and values[3].item() == pytest.approx(200 / 2.55, abs=1e-4)
    moved = [path.rename(path.with_name(f"moved-{path.name}")) for path in photos]
    assert score(moved, tmp_path / "cache")[1] == 0
    rows = [json.loads(line) for file in (tmp_path / "cache").iterdir() for line in file.read_text().splitlines()]
    assert len({row["content"] for row in rows}) == 8


@pytest.mark.fast
def test_another_reward_weight_or_weight_file_has_its_own_scores(photos, tmp_path):
    cache = tmp_path / "cache"
    assert score(photos, cache)[1] == 7
    doubled = Counting()
    doubled.scale *= 2
    values, scored = score(photos, cache, doubled)
    assert scored == 7 and torch.allclose(values, 2 * EXPECTED, atol=1e-4)
    assert score(photos, cache, name="other")[1] == 7 and score(photos, cache)[1] == 0
    half = iqa.score_images(photos, iqa.Reward({"counting": Counting()}, {"counting": 0.5}), cache, ALONE)
    assert torch.allclose(half, EXPECTED / 2, atol=1e-5)


@pytest.mark.fast
def test_edited_own_reward_has_another_identity(own, tmp_path):
    before = iqa.create_reward(["my_rewards:brightness"]).identity()
    assert iqa.create_reward(["my_rewards:brightness"]).identity() == before
    (own / "my_rewards.py").write_text(OWN.replace("x.mean((1, 2, 3))", "x.amax((1, 2, 3))") + "\n")
    del sys.modules["my_rewards"]
    assert iqa.create_reward(["my_rewards:brightness"]).identity() != before


@needs_shared
def test_identity_covers_parameters_that_are_plain_attributes():
    one, two = (iqa.create_reward(["niqe"], weights_file=IQA / "niqe_modelparameters.mat") for _ in range(2))
    assert one.identity() == two.identity()
    two.models["niqe"].net.mu_pris_param = two.models["niqe"].net.mu_pris_param + 1e-3
    assert one.identity() != two.identity()


@pytest.mark.fast
def test_useless_scores_and_damaged_images_are_named(photos, tmp_path):
    nothing = iqa.score_images(photos, iqa.Reward({"nan": Counting()}, {"nan": float("nan")}), tmp_path / "no", ALONE)
    assert nothing.isnan().all() and not any(file.stat().st_size for file in (tmp_path / "no").iterdir())
    photos[4].write_bytes(photos[4].read_bytes()[:60])
    with pytest.raises(runs.UserError, match="photo60.png: damaged image"):
        score(photos, tmp_path / "cache")
    with pytest.raises(runs.UserError, match="none.png: no such image"):
        score([tmp_path / "none.png"], tmp_path / "cache")


def _rank(rank, rendezvous, paths, cache, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    values, scored = score(paths, cache, world=runs.World(rank, 2, torch.device("cpu")))
    again, none = score(paths, cache, world=runs.World(rank, 2, torch.device("cpu")))
    torch.save([values, scored, again, none], f"{out}{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_share_the_work_and_agree_with_one(photos, tmp_path):
    words = (str(tmp_path / "meet"), photos, tmp_path / "cache", str(tmp_path / "rank"))
    torch.multiprocessing.spawn(_rank, words, nprocs=2)
    alone, _ = score(photos, tmp_path / "alone")
    results = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    assert [r[1] for r in results] == [4, 3] and [r[3] for r in results] == [0, 0]
    assert all(torch.equal(values, alone) for r in results for values in (r[0], r[2]))
    # one process uses the scores of two
    assert score(photos, tmp_path / "cache")[1] == 0


@needs_shared
@pytest.mark.parametrize("name", ["niqe", "brisque"])
def test_a_flat_image_has_no_finite_score_and_takes_none_from_the_others_of_its_batch(name):
    reward = iqa.create_reward([name], weights_file=IQA / REFERENCE[name][0])
    textured = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    scores = reward(torch.cat([textured[:1], torch.ones(1, 3, 96, 96), textured[1:]]))
    assert torch.isfinite(scores).tolist() == [True, False, True]
    # a batch of two and of three are rounded differently
    assert scores[[0, 2]].tolist() == pytest.approx(reward(textured).tolist(), rel=1e-4)
    # a sum has no score where one part has none
    both = iqa.Reward(dict(reward.models) | {"own": Counting()}, reward.weights | {"own": 1.0})
    assert torch.isfinite(both(torch.cat([textured[:1], torch.ones(1, 3, 96, 96)]))).tolist() == [True, False]
