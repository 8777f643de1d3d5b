"""rewards/musiq.py against pyiqa's MUSIQ with random weights, create_reward(musiq=...) around it, and without pyiqa."""
import os
import subprocess
import sys

import pytest
import torch
from skimage import data as photos

import iqa
import runs
from rewards import musiq
from rewards.ranker import Ranker


def random_musiq(num_class=1, **options):
    """pyiqa's MUSIQ with random weights of a realistic scale: attention is not uniform, scores differ over images."""
    arch = pytest.importorskip("pyiqa.archs.musiq_arch")
    generator = torch.Generator().manual_seed(num_class)
    net = arch.MUSIQ(pretrained=False, num_class=num_class, **options)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim in (2, 4):
                p.normal_(0, p[0].numel() ** -0.5, generator=generator)
                p.mul_(1.5 if ".query." in name or ".key." in name else 1)
            else:
                p.normal_(0, 0.1, generator=generator).add_(1 if p.ndim == 1 and name.endswith("weight") else 0)
        if num_class == 1:
            net.head.weight.mul_(10)
            net.head.bias.fill_(50)
        else:
            net.head[0].weight.mul_(2)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def nets():
    """{head: (pyiqa's, fused)}: one class as koniq10k, spaq and paq2piq have, ten as ava."""
    plain = {name: random_musiq(classes) for name, classes in (("koniq10k", 1), ("ava", 10))}
    return {name: (net, musiq.FusedMUSIQ.from_pyiqa(net)) for name, net in plain.items()}


def crops(n, side, width=None):
    """(n, 3, side, width or side) in [0, 1]: places of a photograph."""
    photo = torch.from_numpy(photos.astronaut().copy()).permute(2, 0, 1).float() / 255
    width = width or side
    return torch.stack([photo[:, 21 * k:21 * k + side, 31 * k:31 * k + width] for k in range(n)])


def noise(n, side):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(side))


def test_fp32_stays_fp32_inside_a_reward(monkeypatch):
    """cuDNN would take TF32 by default. It is off after start_world, on only if --precision tf32 asks for it.

    Inside MUSIQ it is as it is outside.
    """
    seen, net = [], random_musiq()
    metric = torch.nn.Module()
    metric.net, metric.as_loss = net, False
    fused = iqa._Fused(metric, False)
    fused.fused.forward = lambda x: seen.append(torch.backends.cudnn.allow_tf32) or x.mean((1, 2, 3))
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        runs.start_world("cpu")
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        fused(crops(1, 64))
        torch.backends.cudnn.allow_tf32 = True
        fused(crops(1, 64))
        assert seen == [False, True]
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def with_gradient(net, x):
    x = x.clone().requires_grad_(True)
    scores = net(x).flatten()
    return scores.detach(), torch.autograd.grad(scores.sum(), x)[0]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("head", ["koniq10k", "ava"])
# the last four: pixels are padded to whole patches, evenly or not
@pytest.mark.parametrize("side", [96, 160, 224, 256, 384, 200, 129, 97, 20])
def test_scores_equal_those_of_pyiqa(nets, head, side):
    net, fused = nets[head]
    with torch.no_grad():
        x = crops(5, side)
        expected = net(x)[:, 0]
        assert expected.std() > 1e-2 * expected.mean()
        for k in (1, 5):
            scores = fused(x[:k])
            assert scores.shape == (k,) and scores.dtype == torch.float32
            # absolute, of scores beyond 10 a millionth: a few steps of float32
            assert (scores - expected[:k]).abs().max() < 1e-6 * max(10, expected.max())


@pytest.mark.parametrize("head", ["koniq10k", "ava"])
@pytest.mark.parametrize("side", [192, 256])
def test_pixel_gradients_equal_those_of_pyiqa(nets, head, side):
    net, fused = nets[head]
    patches = fused.patches(noise(1, side) * 2 - 1)[0]
    with torch.no_grad():
        stem = net.block1(net.root_pool(net.gn_root(net.conv_root(patches)))).permute(0, 2, 3, 1).flatten(1)
    parts = patches.requires_grad_(True).tensor_split(-(-len(patches) // musiq.PATCHES))
    if not torch.equal(stem, torch.cat([fused.features(part) for part in parts]).detach()):
        pytest.skip("this CPU's convolutions round by batch size: ReLUs and maxima near a tie pass other gradients, "
                    "in pyiqa too")
    for x in (crops(2, side), noise(1, side)):
        (expected, gradient), (scores, own) = with_gradient(net, x), with_gradient(fused, x)
        assert (scores - expected).abs().max() < 2e-5 and gradient.abs().sum() > 0
        assert relative(own, gradient) < 1e-4


@pytest.mark.parametrize("classes", [1, 10])
def test_in_float64_both_are_the_same_function(classes):
    net = random_musiq(classes).double()
    fused = musiq.FusedMUSIQ.from_pyiqa(net)
    for side in (96, 129):
        x = noise(2, side).double()
        (expected, gradient), (scores, own) = with_gradient(net, x), with_gradient(fused, x)
        assert scores.dtype == torch.float64 and relative(scores, expected) < 1e-12 and relative(own, gradient) < 1e-12


def test_positions_are_those_of_pyiqa():
    """Of images up to 9,600 pixels: 205 patches a side are the first where whole numbers would round otherwise."""
    util = pytest.importorskip("pyiqa.data.multiscale_trans_util")
    for count in range(1, 301):
        expected = util.get_hashed_spatial_pos_emb_index(10, count, count)[0].long()
        assert torch.equal(musiq.hashed_positions(count), expected), count


@pytest.mark.parametrize("head", ["koniq10k", "ava"])
def test_bfloat16_is_close(nets, head):
    net, _ = nets[head]
    fused = musiq.FusedMUSIQ.from_pyiqa(net, bf16=True)
    x = crops(5, 256)
    (expected, gradient), (scores, own) = with_gradient(net, x), with_gradient(fused, x)
    assert scores.dtype == own.dtype == torch.float32 and torch.isfinite(own).all()
    # a quarter of the spread over crops of one photo
    assert 0 < (scores - expected).abs().max() < 0.25 * expected.std()
    assert torch.nn.functional.cosine_similarity(own.flatten(), gradient.flatten(), 0) > 0.9


def test_other_shapes_and_other_models_are_refused_by_name(nets):
    _, fused = nets["koniq10k"]
    for bad in (crops(1, 64, 96), crops(1, 64)[0], crops(1, 64)[:, :1]):
        with pytest.raises(ValueError, match=r"square \(B, 3, S, S\) RGB, got .*use pyiqa's MUSIQ"):
            fused(bad)
    with pytest.raises(ValueError, match="made from pyiqa's MUSIQ, .*got Linear"):
        musiq.FusedMUSIQ.from_pyiqa(torch.nn.Linear(1, 1))
    for options in ({"hidden_size": 192, "num_heads": 6}, {"num_heads": 4}, {"num_scales": 4}, {"patch_size": 16}):
        with pytest.raises(ValueError, match="paper's widths, heads and scales, .*use pyiqa's MUSIQ"):
            musiq.FusedMUSIQ.from_pyiqa(random_musiq(num_layers=1, **options))


def test_a_mask_is_refused_and_options_without_one_are_followed():
    padded = musiq.FusedMUSIQ.from_pyiqa(random_musiq(num_layers=2, max_seq_len_from_original_res=9))
    # 4 patches are padded to 9, 36 are cut to 9
    for side in (64, 192):
        with pytest.raises(ValueError, match=f"pyiqa masks or cuts patches of {side}x{side}"):
            padded(crops(1, side))
    for options in ({"max_seq_len_from_original_res": None}, {"longer_side_lengths": [160]}, {"use_scale_emb": False},
                    {"longer_side_lengths": [300, 100]}):
        net = random_musiq(num_layers=2, **options)
        with torch.no_grad():
            scores = musiq.FusedMUSIQ.from_pyiqa(net)(crops(2, 96))
            assert torch.allclose(scores, net(crops(2, 96))[:, 0], rtol=0, atol=2e-5)
    # 96 pixels are 9 patches: neither padded nor cut
    with torch.no_grad():
        assert torch.isfinite(padded(crops(1, 96))).all()


def test_one_size_is_laid_out_once(monkeypatch):
    fused = musiq.untrained("cpu")
    calls, positions = [], musiq.hashed_positions
    monkeypatch.setattr(musiq, "hashed_positions", lambda count: calls.append(count) or positions(count))
    # what it caches must serve a backward pass later
    with torch.inference_mode():
        first = fused(crops(1, 64))
    assert with_gradient(fused, crops(1, 64))[0] == pytest.approx(first, abs=1e-5)
    with torch.no_grad():
        fused(crops(1, 96)), fused(crops(2, 64)), fused(crops(1, 96))
    # 224 and 384 pixels, and the size itself
    assert calls == [7, 12, 2, 7, 12, 3]
    with torch.no_grad():
        for side in range(32, 32 + musiq.SIZES):
            fused.embeddings(side, torch.device("cpu"))
    assert len(fused._embeddings) == musiq.SIZES


def test_it_is_frozen_stays_in_eval_mode_and_leaves_pyiqa_alone():
    net = random_musiq(num_layers=1).requires_grad_(True)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fused = musiq.FusedMUSIQ.from_pyiqa(net, bf16=True).train()
    assert not any(m.training for m in fused.modules()) and not any(p.requires_grad for p in fused.parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in net.parameters())
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not set(p.data_ptr() for p in net.parameters()) & set(p.data_ptr() for p in fused.parameters())


# create_reward

@pytest.fixture(scope="module")
def musiq_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("musiq") / "random.pth"
    torch.save(random_musiq().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def rewards_of(musiq_file):
    """{--musiq: reward}."""
    return {word: iqa.create_reward(["musiq"], weights_file=musiq_file, need_gradient=True, musiq=word)
            for word in iqa.MUSIQ}


def test_fused_reward_equals_the_plain_one_and_other_shapes_go_through_pyiqa(rewards_of):
    plain, fused = rewards_of["pyiqa"], rewards_of["fused"]
    model = fused.models["musiq"]
    seen = []
    model.metric.register_forward_hook(lambda *_: seen.append("pyiqa"))
    model.fused.register_forward_hook(lambda *_: seen.append("fused"))
    with torch.no_grad():
        for x in (crops(2, 128), crops(2, 96, 128), crops(1, 128, 96)):
            assert torch.allclose(fused(x), plain(x), rtol=0, atol=2e-5) and fused(x).shape == (len(x),)
    assert seen == ["fused", "fused"] + ["pyiqa"] * 4
    x = crops(1, 96, 128)
    assert torch.equal(with_gradient(fused, x)[1], with_gradient(plain, x)[1])
    # not closer, because of ties: see above
    assert relative(with_gradient(fused, crops(1, 96))[1], with_gradient(plain, crops(1, 96))[1]) < 2e-2
    assert not any(m.training for m in fused.train().modules())


def test_a_net_that_is_not_frozen_can_be_differentiated_again_and_again():
    fused = musiq.FusedMUSIQ.from_pyiqa(random_musiq().requires_grad_(True))
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    first, second = (torch.autograd.grad(fused(x).sum(), x)[0] for _ in range(2))
    assert torch.equal(first, second) and first.any()


def test_a_reward_without_gradients_gives_none_even_where_they_are_enabled(musiq_file):
    reward = iqa.create_reward(["musiq"], weights_file=musiq_file, musiq="fused")
    # as pyiqa's metric
    assert not reward(crops(1, 64).requires_grad_(True)).requires_grad


def test_identity_and_versions_are_those_of_the_plain_reward_in_fp32_only(rewards_of):
    plain, fused, half = (rewards_of[word] for word in ("pyiqa", "fused", "fused-bf16"))
    assert plain.identity() == fused.identity() != half.identity()
    assert iqa._versions(plain) == iqa._versions(fused) and "pyiqa" in iqa._versions(half)
    with torch.no_grad():
        difference = (half(crops(3, 128)) - plain(crops(3, 128))).abs().max()
    assert 0 < difference < 0.5


def test_only_musiq_is_fused_and_an_unknown_word_is_refused():
    assert type(iqa.create_reward(["ranker"], musiq="fused").models["ranker"]) is Ranker
    with pytest.raises(ValueError, match="musiq must be one of fused, fused-bf16, pyiqa, got 'fp16'"):
        iqa.create_reward(["ranker"], musiq="fp16")


AVA = """
import sys; sys.path.insert(0, {repo!r})
import torch; torch.set_num_threads(1)
import iqa
x = torch.rand(2, 3, 96, 96)
plain, fused = (iqa.create_reward(["musiq-ava"], musiq=musiq) for musiq in ("pyiqa", "fused"))
with torch.no_grad():
    difference = (plain(x) - fused(x)).abs().max().item()
    print(type(fused.models["musiq-ava"]).__name__, difference < 1e-5, plain.identity() == fused.identity())
"""


def test_a_variant_with_another_head_is_fused(tmp_path):
    # pyiqa takes a file of ten classes from TORCH_HOME only
    place = tmp_path / "hub/pyiqa/musiq_ava_ckpt-e8d3f067.pth"
    place.parent.mkdir(parents=True)
    torch.save(random_musiq(10).state_dict(), place)
    result = subprocess.run([sys.executable, "-c", AVA.format(repo=str(runs.REPO))], capture_output=True, text=True,
                            timeout=120, env={**os.environ, "TORCH_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert result.stdout.split()[-3:] == ["_Fused", "True", "True"], result.stderr


# without pyiqa

UNTRAINED = """
import sys; sys.path.insert(0, {repo!r})
sys.modules["pyiqa"] = None
import torch; torch.set_num_threads(1)
import iqa
from rewards import musiq
x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
print(*iqa.create_reward(["rewards.musiq:untrained"], need_gradient=True)(x).tolist())
with torch.no_grad():
    # slow where the CPU has no bfloat16
    print(*musiq.untrained_bf16("cpu")(x[:1]).tolist())
"""


def test_untrained_musiq_needs_no_pyiqa_and_is_the_same_in_every_process():
    done = subprocess.run([sys.executable, "-c", UNTRAINED.format(repo=str(runs.REPO))], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    scores, half = ([float(word) for word in line.split()] for line in done.stdout.splitlines())
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert musiq.untrained("cpu")(x).tolist() == pytest.approx(scores, abs=1e-5)
    # images differ, bfloat16 does not equal fp32
    assert abs(scores[0] - scores[1]) > 1e-4 and 0 < abs(scores[0] - half[0]) < 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("build", [musiq.untrained, musiq.untrained_bf16])
def test_on_cuda_a_call_waits_for_nothing(build):
    fused, x = build("cuda"), crops(2, 96).cuda().requires_grad_(True)
    # positions of this size go to the GPU once
    expected = fused(x.detach())
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores = fused(x)
        torch.autograd.grad(scores.sum(), x)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.allclose(scores, expected, rtol=0, atol=1e-3)
    on_cpu, tolerance = build("cpu")(crops(2, 96)), 1e-3 if build is musiq.untrained else 0.1
    assert torch.allclose(expected.cpu(), on_cpu, rtol=0, atol=tolerance)


def test_compiled_blocks_give_the_same_scores_and_gradients(monkeypatch):
    net, scores = musiq.untrained("cpu"), []
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    compile_function = torch.compile
    # what Module.compile calls, too
    monkeypatch.setattr(torch, "compile", lambda function: compile_function(function, backend="eager"))
    for compiled in (False, True):
        if compiled:
            iqa.Reward({"musiq": net}, {"musiq": 1.0}).compile_blocks()
        image = x.clone().requires_grad_()
        score = net(image)
        scores.append((score.detach(), *torch.autograd.grad(score.sum(), image)))
    assert net.blocks[0]._compiled_call_impl is not None
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*scores))
