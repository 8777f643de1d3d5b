"""lora.py against peft, loralib and the formula written out; what it freezes, saves, merges and refuses."""
import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import archs
import lora
import runs

NETS = ["swinir-small", "rrdbnet-small", "compact-small"]


def build(name, seed=0):
    torch.manual_seed(seed)
    return archs.create(name).eval()


def fill(net, seed=1, size=0.05):
    """Random values for every B: with B = 0 each test of an adapter would pass trivially."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in lora.adapted(net).values():
            adapter.lora_B.copy_(size * torch.randn(adapter.lora_B.shape, generator=generator))
    return net


def adapt(name="compact-small", seed=0):
    """A network with filled adapters of rank 2."""
    net = build(name, seed)
    lora.add_lora(net, lora.default_targets(net), rank=2)
    return fill(net)


@pytest.mark.fast
@pytest.mark.parametrize("arch, rank, layers, weights", [("swinir", 48, 72, 1_866_240), ("rrdbnet", 24, 345, 9_856_512),
                                                         ("compact", 16, 32, None)])
def test_the_papers_layers_ranks_and_sizes(arch, rank, layers, weights):
    with torch.device("meta"):
        net = archs.create(arch)
        names = lora.add_lora(net, lora.default_targets(net), rank)
    assert len(names) == layers
    assert weights in (None, sum(p.numel() for p in lora.lora_parameters(net)))
    if arch == "compact":
        assert "body.0" not in names and "body.66" not in names and names[0] == "body.2" and names[-1] == "body.64"


@pytest.mark.fast
@pytest.mark.parametrize("name", NETS)
def test_untouched_at_the_start_then_adapted_equals_merged_equals_the_formula(name):
    plain, net, x = build(name), build(name), torch.rand(1, 3, 24, 16)
    names = lora.add_lora(net, lora.default_targets(net), rank=3, alpha=6)
    with torch.no_grad():
        of_base = plain(x)
        assert torch.equal(net(x), of_base)
        fill(net)
        tuned = net(x)
        assert (tuned - of_base).abs().max() > 1e-4
        values = {n: (a.lora_A.clone(), a.lora_B.clone()) for n, a in lora.adapted(net).items()}
        merged = lora.merge_lora(copy.deepcopy(net))
        # the copy is merged, not the original
        assert (merged(x) - tuned).abs().max() < 1e-5 and torch.equal(net(x), tuned)
        again = archs.create(name).eval()
        again.load_state_dict(lora.merged_state_dict(net))
        assert torch.equal(again(x), merged(x))
        # W + 6 / 3 * B A, laid out as the kernel is
        for n in names:
            weight = plain.get_submodule(n).weight
            formula = weight + 2 * (values[n][1] @ values[n][0]).reshape(weight.shape)
            assert torch.allclose(merged.get_submodule(n).weight, formula, atol=1e-6)
    assert set(merged.state_dict()) == set(plain.state_dict()) and not lora.adapted(merged)
    archs.create(name).load_state_dict(merged.state_dict())


@pytest.mark.fast
def test_linear_and_convolution_are_pefts():
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Flatten(),
                        nn.Linear(8 * 16, 5))
    ours, x = copy.deepcopy(net), torch.rand(2, 4, 8, 8)
    pefts = get_peft_model(net, LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2", "4"], lora_dropout=0.0))
    lora.add_lora(ours, r"^[024]$", rank=3, alpha=5)
    fill(ours, size=0.5)

    def weights_of_peft(name):
        layer = pefts.base_model.model.get_submodule(name)
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        for name, adapter in lora.adapted(ours).items():
            for weight, value in zip(weights_of_peft(name), (adapter.lora_A, adapter.lora_B)):
                weight.copy_(value.view_as(weight))
    assert torch.allclose(ours(x), pefts(x), atol=1e-5)
    ours(x).square().sum().backward()
    pefts(x).square().sum().backward()
    for name, adapter in lora.adapted(ours).items():
        for weight, value in zip(weights_of_peft(name), (adapter.lora_A, adapter.lora_B)):
            assert torch.allclose(value.grad, weight.grad.view_as(value), rtol=1e-4, atol=1e-5)


@pytest.mark.fast
def test_loralibs_linear_is_ours_and_its_convolution_has_another_rank():
    import loralib
    torch.manual_seed(0)
    loralibs = loralib.Linear(12, 7, r=3, lora_alpha=5, merge_weights=False)
    ours = nn.Linear(12, 7)
    ours.load_state_dict({"weight": loralibs.weight, "bias": loralibs.bias})
    net = nn.Sequential(ours)
    lora.add_lora(net, "0", rank=3, alpha=5)
    fill(net)
    adapter = lora.adapted(net)["0"]
    with torch.no_grad():
        loralibs.lora_A.copy_(adapter.lora_A)
        loralibs.lora_B.copy_(adapter.lora_B)
    x = torch.rand(4, 12)
    assert torch.allclose(net(x), loralibs(x), atol=1e-6)
    conv = loralib.Conv2d(32, 32, 3, r=2)
    nn.init.normal_(conv.lora_B)
    expanded = (conv.lora_B @ conv.lora_A).view(conv.conv.weight.shape).flatten(1)
    net = nn.Sequential(nn.Conv2d(32, 32, 3))
    lora.add_lora(net, "0", rank=2)
    adapter = lora.adapted(fill(net))["0"]
    flattened = adapter.lora_B @ adapter.lora_A
    assert torch.linalg.matrix_rank(expanded) > 2 and torch.linalg.matrix_rank(flattened) == 2


@pytest.mark.fast
@pytest.mark.parametrize("options", [dict(stride=2), dict(groups=2), dict(groups=4, stride=2, padding=1),
                                     dict(dilation=2, bias=False)])
def test_strides_groups_and_dilation_merge(options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, **options))
    lora.add_lora(net, "0", rank=2)
    fill(net, size=0.5)
    x = torch.rand(2, 4, 9, 9)
    with torch.no_grad():
        tuned = net(x)
        assert torch.allclose(lora.merge_lora(net)(x), tuned, atol=1e-6) and type(net[0]) is nn.Conv2d


@pytest.mark.fast
@pytest.mark.parametrize("name", NETS)
def test_gradients_reach_every_adapter_and_no_base_tensor_and_the_base_stays(name):
    net = build(name)
    start = lora.base_hash(net)
    lora.add_lora(net, lora.default_targets(net), rank=2)
    fill(net)
    optimiser = torch.optim.Adam(lora.lora_parameters(net), lr=1e-2)
    assert {id(p) for p in net.parameters() if p.requires_grad} == {id(p) for p in lora.lora_parameters(net)}
    for _ in range(3):
        net.zero_grad()
        net(torch.rand(1, 3, 16, 16)).square().mean().backward()
        optimiser.step()
    for key, p in net.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == ("lora_" in key), key
    assert lora.base_hash(net) == start == lora.base_hash(build(name))


@pytest.mark.fast
def test_a_file_holds_adapters_only_and_fits_its_base_only(tmp_path):
    net, x = build("compact-small"), torch.rand(1, 3, 16, 16)
    lora.add_lora(net, lora.default_targets(net), rank=2, alpha=4)
    fill(net)
    ema = fill(copy.deepcopy(net), seed=5)
    lora.save_lora(tmp_path / "adapter.pth", net)
    lora.save_lora(tmp_path / "both.pth", net, ema)
    content = torch.load(tmp_path / "adapter.pth", weights_only=True)
    assert set(content) == {"lora", "rank", "alpha", "targets", "base_sha256", "base_sample"}
    assert (content["rank"], content["alpha"]) == (2, 4)
    assert sum(v.numel() for v in content["lora"].values()) == sum(p.numel() for p in lora.lora_parameters(net))
    with torch.no_grad():
        for file, tuned in (("adapter.pth", net), ("both.pth", ema)):
            again = build("compact-small")
            lora.load_lora(again, tmp_path / file)
            assert torch.equal(again(x), tuned(x))
        half = build("compact-small")
        lora.load_lora(half, tmp_path / "adapter.pth", scale=0.5)
        kernel = lora.merge_lora(half).body[2].weight
        plain, full = build("compact-small").body[2].weight, lora.merge_lora(copy.deepcopy(net)).body[2].weight
        assert torch.allclose(kernel, (plain + full) / 2, atol=1e-7)
    with pytest.raises(runs.UserError, match="adapter.pth: this adapter belongs to another base"):
        lora.load_lora(build("compact-small", seed=3), tmp_path / "adapter.pth")
    torch.save({"params": {}}, tmp_path / "other.pth")
    with pytest.raises(runs.UserError, match="other.pth: not a LoRA adapter"):
        lora.load_lora(build("compact-small"), tmp_path / "other.pth")
    with pytest.raises(runs.UserError, match="no such"):
        lora.load_lora(build("compact-small"), tmp_path / "none.pth")
    first = next(iter(content["lora"]))
    one_less = {key: value for key, value in content["lora"].items() if key != first}
    for damage in ({"lora": one_less}, {"targets": content["targets"][1:]},
                   {"lora": content["lora"] | {first: torch.zeros(1, 1)}}):
        torch.save(content | damage, tmp_path / "damaged.pth")
        with pytest.raises(runs.UserError, match="damaged.pth: a damaged adapter"):
            lora.load_lora(build("compact-small"), tmp_path / "damaged.pth")


@pytest.mark.fast
@pytest.mark.parametrize("record", [
    {"base": "RUN", "weights_key": None},
    {"base": "FILE", "arch": "compact-small", "weights_key": None},
    # commit 6be4990: init are weights in place of those of the run
    {"base": "RUN", "init": None, "weights_key": None, "pad_mode": "hggt"},
    {"base": "runs/elsewhere", "init": "FILE", "weights_key": "params", "pad_mode": "hggt"},
], ids=["run", "weights file", "run of 6be4990", "weights file of 6be4990"])
def test_an_adapter_finds_its_base_by_the_record_of_its_run(tmp_path, record):
    """A base is a run folder or a weights file; lora.py merges the adapter at any strength."""
    base, net, x = build("compact-small"), adapt(), torch.rand(1, 3, 16, 16)
    places = {"RUN": tmp_path / "base", "FILE": tmp_path / "base/weights/ema_0000002.pth"}
    runs.save_weights(places["FILE"], base.state_dict())
    runs.save_json(tmp_path / "base/args.json", {"args": {"arch": "compact-small"}})
    lora.save_lora(tmp_path / "tuned/lora/adapter.pth", net)
    runs.save_json(tmp_path / "tuned/args.json",
                   {"args": {key: str(places.get(value, value)) if value else value for key, value in record.items()}})
    for scale in (0, 0.7, 1):
        words = [tmp_path / "tuned", "--scale", scale, "--out", tmp_path / "merged.pth"]
        lora.main(lora.parse_args(list(map(str, words))))
        merged, info = archs.load_generator(tmp_path / "merged.pth")
        start, end = base.body[2].weight, lora.merged_state_dict(net)["body.2.weight"]
        assert info["arch"] == "compact"
        assert torch.allclose(merged.body[2].weight, start + scale * (end - start), atol=1e-7)
    with torch.no_grad():
        assert torch.allclose(merged(x), net(x), atol=1e-6)


def truncated(value):
    """float32 -> the next half towards zero, as float32."""
    half = value.half()
    return torch.where(half.float().abs() > value.abs(), half.view(torch.int16) - 1, half.view(torch.int16)).view(
        torch.float16).float()


def converted(net, convert):
    net = copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(convert(p))
    return net


ROUNDINGS = {"rounded": lambda p: p.half().float(), "truncated": truncated}


@pytest.mark.fast
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ["rrdbnet-small", "swinir-small"])
def test_an_adapter_takes_its_base_in_another_precision(name, rounding, tmp_path):
    """Trained on a file in fp32, used with that in fp16, and the other way round; some weights are subnormal there."""
    full = converted(build(name), lambda p: p * torch.logspace(0, -6, p.numel()).view(p.shape))
    half = converted(full, ROUNDINGS[rounding])
    assert lora.base_hash(full) != lora.base_hash(half)
    for trained, used in ((full, half), (half, full)):
        net = copy.deepcopy(trained)
        lora.add_lora(net, lora.default_targets(net), rank=2)
        lora.save_lora(tmp_path / "adapter.pth", fill(net))
        assert lora.load_lora(copy.deepcopy(trained), tmp_path / "adapter.pth") == ""
        other = copy.deepcopy(used)
        remark = lora.load_lora(other, tmp_path / "adapter.pth")
        assert "adapter.pth in another precision: its weights agree to 16 bits" in remark
        layer = lora.add_lora(copy.deepcopy(used), lora.default_targets(used), rank=2)[0]
        adapter = lora.adapted(net)[layer]
        merged = used.get_submodule(layer).weight + (adapter.lora_B @ adapter.lora_A).view_as(
            used.get_submodule(layer).weight)
        assert torch.allclose(other.get_submodule(layer).weight, merged, atol=1e-7)


@pytest.mark.fast
@pytest.mark.parametrize("change", ["one step of training", "one tensor", "bf16", "more layers", "no sample"])
def test_an_adapter_refuses_what_is_not_its_base(change, tmp_path):
    net = adapt("compact-small")
    lora.save_lora(tmp_path / "adapter.pth", net)
    other = build("compact-small")
    if change == "one step of training":
        other(torch.rand(1, 3, 16, 16)).square().mean().backward()
        torch.optim.Adam(other.parameters(), lr=5e-5).step()
    elif change == "one tensor":
        other.body[6].bias.data += 1e-3
    elif change == "bf16":
        other = converted(other, lambda p: p.bfloat16().float())
    elif change == "more layers":
        other = archs.create("compact-small", num_conv=7)
    else:
        # adapters of earlier commits know their exact base only
        content = torch.load(tmp_path / "adapter.pth", weights_only=True)
        content.pop("base_sample")
        torch.save(content, tmp_path / "adapter.pth")
        assert lora.load_lora(build("compact-small"), tmp_path / "adapter.pth") == ""
        other = converted(other, ROUNDINGS["rounded"])
    with pytest.raises(runs.UserError, match="adapter.pth: this adapter belongs to another base"):
        lora.load_lora(other, tmp_path / "adapter.pth")


@pytest.mark.fast
def test_a_sample_is_64_weights_of_each_parameter():
    net = build("compact-small")
    sizes = [min(64, p.numel()) for _, p in sorted(net.named_parameters())]
    sample = lora.base_sample(net)
    assert sample.dtype == torch.float16 and sample.shape == (sum(sizes),)
    names, begin = sorted(name for name, _ in net.named_parameters()), 0
    for name, size in zip(names, sizes):
        values = dict(net.named_parameters())[name].flatten()
        expected = [values[k * len(values) // size].item() for k in range(size)]
        assert torch.equal(sample[begin:begin + size], torch.tensor(expected).half())
        begin += size
    assert torch.equal(lora.base_sample(adapt("compact-small")), sample)


@pytest.mark.fast
def test_a_folder_with_an_adapter_and_its_card(tmp_path, monkeypatch):
    """weights/NAME: the card's line "base: ..." names a public network or a path."""
    net = adapt()
    lora.save_lora(tmp_path / "sharp" / "adapter.pth", net)
    runs.save_weights(tmp_path / "downloads" / "RealESRGAN_x4plus.pth", build("compact-small").state_dict())
    monkeypatch.setattr(runs, "downloads", lambda: tmp_path / "downloads")
    with pytest.raises(runs.UserError, match="no args.json of a run and no card beside it .* name the tuned weights "
                                             "with --weights; public weights: python -m prepare.weights"):
        lora.load_tuned(tmp_path / "sharp", flag="--weights")
    card = tmp_path / "sharp" / "README.md"
    card.write_text("---\nbase: realesrgan-x4plus\nlicence: BSD-3-Clause\n---\n# Sharp\n")
    merged, info = lora.load_tuned(tmp_path / "sharp")
    assert info["file"].endswith("RealESRGAN_x4plus.pth") and info["remark"] == ""
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(merged(x), net(x), atol=1e-6)
    # as it is committed: in fp16
    content = torch.load(tmp_path / "sharp" / "adapter.pth", weights_only=True)
    content["lora"] = {key: value.half() for key, value in content["lora"].items()}
    torch.save(content, tmp_path / "sharp" / "adapter.pth")
    with torch.no_grad():
        assert (lora.load_tuned(tmp_path / "sharp")[0](x) - net(x)).abs().max() < 2e-3
    (tmp_path / "downloads" / "RealESRGAN_x4plus.pth").unlink()
    with pytest.raises(runs.UserError, match="README.md: was tuned from realesrgan-x4plus, which is not here; .*"
                                             "python -m prepare.weights get realesrgan-x4plus fetches it"):
        lora.load_tuned(tmp_path / "sharp")


@pytest.mark.fast
def test_a_damaged_record_and_a_base_that_is_elsewhere(tmp_path):
    lora.save_lora(tmp_path / "run/lora/adapter.pth", adapt())
    elsewhere = ("was tuned from runs/elsewhere, which is not here; call from the folder where it was trained, or name "
                 "it with --base")
    for text, message in (('{"args"', "args.json: damaged"), ("null", "args.json: not the record of a run"),
                          ('{"x": 1}', "args.json: not the record of a run"),
                          (json.dumps({"args": {"base": "runs/elsewhere"}}), elsewhere)):
        (tmp_path / "run/args.json").write_text(text)
        with pytest.raises(runs.UserError, match=message):
            lora.load_tuned(tmp_path / "run")
    with pytest.raises(runs.UserError, match="adapter.pth: an adapter of finetune_lora.py, not a network"):
        archs.load_run(tmp_path / "run/lora/adapter.pth", "--weights")


@pytest.mark.fast
def test_refusals():
    with pytest.raises(ValueError, match="rank 0: must be at least 1"):
        lora.add_lora(build("compact-small"), "body", 0)
    with pytest.raises(ValueError, match="alpha 0: must be more than 0"):
        lora.add_lora(build("compact-small"), r"^body\.2$", 2, alpha=0)
    with pytest.raises(runs.UserError, match="nowhere: no such adapter"):
        lora.load_tuned(Path("/nowhere"))
    with pytest.raises(ValueError, match="'mlp' match no layer of SRVGGNetCompact; its layers are called body.0, bod"):
        lora.add_lora(build("compact-small"), "mlp", 2)
    with pytest.raises(ValueError, match=r"body\.1 \(PReLU\), which is neither"):
        lora.add_lora(build("compact-small"), r"^body\.[12]$", 2)
    net = adapt()
    with pytest.raises(ValueError, match="already"):
        lora.add_lora(net, lora.default_targets(net), 2)
