"""report.tables, report.pictures and report.style: statistics, formats, the files that a result becomes."""
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import runs
from images import image_size, load_image, save_image
from report import analyses, pictures, style, tables


def result_of(scores, lower, against=None, **more):
    """A result as evaluate.py leaves it, of {row: {image: {metric: value}}}."""
    against = against or next(iter(scores))
    means, differences = tables.summarise(scores, lower, against)
    return {"scores": scores, "lower_is_better": lower, "full_reference": [], "images": len(scores[against]),
            "mean": {row: {m: cell["mean"] for m, cell in c.items()} for row, c in means.items()},
            "intervals": {row: {m: [cell["low"], cell["high"]] for m, cell in c.items()} for row, c in means.items()},
            "differences": differences, "against": against, "commit": "abc",
            "protocol": {"name": "hggt", "says": "RGB, 4 pixels cropped", "border": 4}, **more}


def of_means(lower, *means):
    """A result of one metric m with these means, and intervals from 0.5 below to 0.25 above them."""
    rows = {name: {"m": value} for name, value in means}
    return {"mean": rows, "intervals": {row: {"m": [v["m"] - 0.5, v["m"] + 0.25]} for row, v in rows.items()},
            "lower_is_better": {"m": lower}, "differences": {}, "images": 3, "scores": {row: {} for row in rows},
            "protocol": {"name": "hggt", "says": "RGB"}}


SCORES = {"bicubic": {s: {"psnr": 20.0 + k, "musiq": 30.0 - k} for k, s in enumerate("abcdef")},
          "net": {s: {"psnr": 20.5 + k + 0.1 * (k % 2), "musiq": 30.0 - k + 0.5 * (-1) ** k}
                  for k, s in enumerate("abcdef")}}
LOWER = {"psnr": False, "musiq": False}


# Statistics

@pytest.mark.fast
def test_places_and_intervals():
    lines = tables.markdown(of_means(True, ("a", 1.0), ("b", 2.0), ("c", 3.0))).splitlines()
    assert lines[:3] == ["no-reference: m", "", "|  | m ↓ |"]
    cells = [line.split("|")[2].strip() for line in lines[4:]]
    assert cells == ["**1.00** [0.50, 1.25]", "*2.00* [1.50, 2.25]", "3.00 [2.50, 3.25]"]
    lines = tables.markdown(of_means(False, ("a", 1.0), ("b", 1.0), ("c", 3.0), ("gold", 9.0))).splitlines()
    assert [line.split("|")[2].split()[0] for line in lines[4:]] == ["*1.00*", "*1.00*", "**3.00**", "9.00"]
    from scipy import stats
    values = np.random.default_rng(3).normal(5, 2, 100)
    student = stats.ttest_1samp(values, 0).confidence_interval()
    assert tables.interval(values) == pytest.approx((student.low, student.high), abs=0.08)
    assert tables.interval([2.0, 2.0]) == (2, 2)


@pytest.mark.fast
def test_a_difference_of_few_images_needs_students_t_test_too():
    # p = 0.065
    values = np.array([[0.8, 1.1, 0.5, -0.1, 0.3]])
    unclear = tables.difference(values, 0 * values)
    assert unclear["low"] > 0 and unclear["verdict"] == "no evidence"
    assert tables.paired_p(values[0]) == pytest.approx(0.065, abs=1e-3)
    assert tables.difference(values + 0.2, 0 * values)["verdict"] == "higher"
    assert [tables.paired_p(np.array(v)) for v in ([3.0], [0.0, 0.0], [2.0, 2.0])] == [1, 1, 0]
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(150):
        wrong += tables.difference(rng.normal(0, 1, (1, 5)), np.zeros((1, 5)))["verdict"] != "no evidence"
    # the interval alone: 24
    assert wrong <= 15


# Formats

@pytest.mark.fast
def test_metrics_stand_in_the_papers_groups_in_its_order():
    metrics = ("ranker", "musiq", "vgg", "gmsd", "dists", "psnr", "niqe")
    result = {"lower_is_better": dict.fromkeys(metrics, False), "full_reference": ["vgg", "gmsd", "dists", "psnr"]}
    assert tables.ordered(result) == ["psnr", "gmsd", "dists", "vgg", "musiq", "ranker", "niqe"]
    assert tables.groups_line(result) == ("full-reference: PSNR, gmsd; perceptual full-reference: DISTS, VGG distance; "
                                          "no-reference: MUSIQ, ranker, NIQE")


@pytest.mark.fast
def test_text_is_aligned_without_marks_and_a_clear_difference_has_one_sign():
    printed = tables.text(result_of(SCORES, LOWER))
    assert "|" not in printed and "**" not in printed
    lines = printed.splitlines()
    assert lines[0] == "protocol hggt: RGB, 4 pixels cropped; mean of 6 images"
    assert lines[1] == "full-reference: PSNR; no-reference: MUSIQ"
    head, bicubic, net = lines[3:6]
    assert bicubic.startswith("bicubic  ") and net.startswith("net      ") and len(bicubic) == len(net)
    assert head.index("PSNR ↑") + len("PSNR ↑") == bicubic.index("]") + 1 == net.index("]") + 1
    difference = lines[8]
    assert difference.startswith("net ") and difference.count("*") == 1
    assert difference.split("*")[0].split()[1].startswith("+0.5")
    assert [line for line in lines if line.startswith("*  ")] == [tables.LEGEND[1]] and "p < 0.05" in tables.LEGEND[1]
    alone = tables.text(result_of({"net": SCORES["net"]}, LOWER))
    assert "minus" not in alone and tables.LEGEND[0] in alone and tables.LEGEND[1] not in alone


@pytest.mark.fast
def test_a_table_that_is_too_wide_is_split_into_blocks():
    result = result_of(SCORES, LOWER)
    narrow, wide = tables.text(result, 40), tables.text(result, 200)
    assert narrow.count("\nbicubic ") == 2 and wide.count("\nbicubic ") == 1
    tables_only = [line for line in narrow.splitlines() if line.startswith(("bicubic", "net", " ", "minus"))]
    assert max(map(len, tables_only)) <= 40
    assert tables.aligned(["", "a", "b"], [["row", 1, 22], ["r", 333, 4]]) == "       a   b\nrow    1  22\nr    333   4"


@pytest.mark.fast
def test_latex_says_what_was_measured_and_escapes_names():
    name = r"a & 50 % of #1_x {y} ~^\z $"
    tex = tables.latex(result_of({name: {"i": {"psnr": 20.0, "a_b:c": 1.0}}}, {"psnr": False, "a_b:c": True}))
    assert tex.startswith("% protocol hggt: RGB, 4 pixels cropped; mean of 1 images; commit abc\n\\begin{tabular}{lcc}")
    row = r"a \& 50 \% of \#1\_x \{y\} \textasciitilde{}\textasciicircum{}\textbackslash{}z \$ & \textbf{20.00} & "
    assert row in tex and r"PSNR $\uparrow$ & a\_b:c $\downarrow$ \\" in tex
    assert r"\multicolumn{1}{c}{full-reference} & \multicolumn{1}{c}{no-reference} \\" in tex


@pytest.fixture
def file(tmp_path):
    runs.save_json(tmp_path / "out.json", result_of(SCORES, LOWER))
    return tmp_path / "out.json"


def call(module, *words):
    module.main(module.parse_args([str(word) for word in words]))


def test_files_are_utf8_whatever_the_locale(file, tmp_path):
    """Arrows in tables, and in the modules that --help reads."""
    plain = runs.python_path() | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["report.tables", file, "--format", "markdown", "--out", tmp_path / "table.md"]
    for command in (runs.python(*words), runs.python("evaluate.py", "--help")):
        done = subprocess.run(command, env=plain, cwd=runs.REPO, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert "\u2191" in (tmp_path / "table.md").read_text(encoding="utf-8")


@pytest.mark.fast
def test_the_command_prints_and_writes_every_format(file, tmp_path, capsys):
    call(tables, file)
    assert capsys.readouterr().out == tables.text(result_of(SCORES, LOWER)) + "\n"
    call(tables, file, "--format", "csv", "--out", tmp_path / "out.csv")
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[:2] == ["row,image,protocol,psnr,musiq", "bicubic,a,hggt,20.0,30.0"] and len(lines) == 1 + 2 * 6
    call(tables, file, "--format", "latex", "--out", tmp_path / "out.tex")
    assert r"\begin{tabular}" in (tmp_path / "out.tex").read_text()
    capsys.readouterr()
    call(tables, file, "--format", "markdown", "--against", "net")
    printed = capsys.readouterr().out
    assert "| minus net | PSNR ↑ | MUSIQ ↑ |" in printed and "\n| bicubic | **-0.5" in printed
    with pytest.raises(runs.UserError, match="--against gold: no such row; there are bicubic, net"):
        call(tables, file, "--against", "gold")
    for words in ([], [file, "--diff", file, file]):
        with pytest.raises(SystemExit):
            tables.parse_args([str(word) for word in words])


@pytest.mark.fast
def test_results_of_earlier_commits_still_open(tmp_path):
    """results/set5-set14.json is older than `against`, `full_reference` and `saved`."""
    result = tables.read_result(runs.REPO / "results" / "set5-set14.json")
    against = tables.compared_with(result)
    assert against in result["scores"] and f"minus {against}" in tables.text(result)
    first, second, *_ = result["lower_is_better"]
    pictures.front(result, first, second, tmp_path / "front.png")
    with pytest.raises(runs.UserError, match="--names: 1 names for 8 rows"):
        pictures.front(result, first, second, tmp_path / "front.png", ["one"])
    with pytest.raises(runs.UserError, match="no outputs were kept: call evaluate.py with --save"):
        pictures.grid(result, tmp_path / "grid.png")
    older = {key: value for key, value in result.items() if key != "intervals"}
    runs.save_json(tmp_path / "older.json", older)
    with pytest.raises(runs.UserError, match="older.json: has no intervals: call evaluate.py again"):
        tables.read_result(tmp_path / "older.json")
    call(tables, "--diff", tmp_path / "older.json", tmp_path / "older.json")


# Why two results disagree

@pytest.mark.fast
def test_diff_tells_weights_tile_padding_images_and_commit_apart(file, tmp_path, capsys):
    made = {"hash": "1", "tile": 256, "overlap": 64, "pad_mode": None}
    first = result_of(SCORES, LOWER, weights={"net": made}, files={"a": {"lq": "1"}}, versions={"torch": "2.11"})
    second = json.loads(json.dumps(first))
    second["protocol"]["says"] = "other words"
    assert tables.explain(first, second) == []
    # earlier commits did not record fp32
    second["weights"]["net"]["precision"] = "fp32"
    assert tables.explain(first, second) == [] and "networks in" not in tables.title_of(second)
    second["weights"]["net"]["precision"] = "bf16"
    assert tables.explain(first, second) == ["net: precision is 'fp32' in the first, 'bf16' in the second"]
    assert tables.title_of(second).endswith("; networks in bf16")
    second["weights"]["net"]["precision"] = "fp32"
    second = second | {"commit": "def", "files": {"a": {"lq": "2"}}, "versions": {"torch": "2.14"}}
    second["weights"]["net"] |= {"tile": 128, "pad_mode": "swinir"}
    second["scores"]["net"]["a"]["psnr"] += 1
    second["scores"]["gold"] = second["scores"].pop("bicubic")
    runs.save_json(tmp_path / "one.json", first)
    runs.save_json(tmp_path / "two.json", second)
    call(tables, "--diff", tmp_path / "one.json", tmp_path / "two.json")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["commit is 'abc' in the first, 'def' in the second",
                     "versions: torch is '2.11' in the first, '2.14' in the second",
                     "images: 1 have other pixels (LR or reference), for example a",
                     "net: tile is 256 in the first, 128 in the second",
                     "net: padding is None in the first, 'swinir' in the second",
                     "net: scores differ by up to psnr 1",
                     "rows: bicubic in the first only", "rows: gold in the second only"]
    call(tables, "--diff", tmp_path / "one.json", tmp_path / "one.json")
    assert capsys.readouterr().out.startswith("no difference")


@pytest.mark.fast
@pytest.mark.parametrize("contents, error", [
    (b"{", "not a file of evaluate.py --out-json"), (b"\xff\xfe\x00", "not a file of evaluate.py --out-json"),
    (b"[]", "not a file of evaluate.py --out-json"), (b'{"scores": 3, "lower_is_better": {}}', "not a file of"),
    (b'{"scores": {"net": {"a": 3}}, "lower_is_better": {}}', "not a file of"),
    (b'{"scores": {"net": {"a": {"psnr": "x"}}}, "lower_is_better": {}}', "not a file of"),
    (b'{"scores": {"net": {"a": {"psnr": 3}}}, "lower_is_better": ["psnr"]}', "not a file of"), (None, "no such file")])
def test_a_file_that_is_no_result_is_named(tmp_path, contents, error):
    good = tmp_path / "good.json"
    good.write_text('{"scores": {"net": {"a": {"psnr": 3}}}, "lower_is_better": {"psnr": false}}')
    if contents is not None:
        (tmp_path / "bad.json").write_bytes(contents)
    for files in ([good, tmp_path / "bad.json"], [tmp_path / "bad.json", good]):
        with pytest.raises(runs.UserError, match=f"bad.json: .*{error}"):
            call(tables, "--diff", *files)
    call(tables, "--diff", good, good)


# Pictures

@pytest.fixture
def kept(tmp_path):
    """A result with kept images: two references of a, none of c; the second one of a is the brightest."""
    generator = torch.Generator().manual_seed(0)
    images, references, scores = {}, {}, {row: {} for row in ("gold", "bicubic", "net")}
    for stem, cells in (("a", ["GT", "GT 2"]), ("b", ["GT"]), ("c", [])):
        images[stem] = {cell: tmp_path / cell / f"{stem}.png" for cell in ["LR", *cells, "bicubic", "net"]}
        for k, (cell, path) in enumerate(images[stem].items()):
            side = 20 if cell == "LR" else 80
            save_image(path, torch.rand(3, side, side, generator=generator) * (0.5 + 0.1 * k))
        brightness = {cell: 100 * load_image(path).float().mean().item() / 255 for cell, path in images[stem].items()}
        references[stem] = {cell: {"bright": brightness[cell]} for cell in cells}
        for row in ("bicubic", "net"):
            scores[row][stem] = {"psnr": 20.0, "bright": brightness[row]}
        scores["gold"][stem] = {"bright": 60.0}
    files = {stem: {cell: str(path) for cell, path in cells.items()} for stem, cells in images.items()}
    saved = {"images": files, "references": references}
    return result_of(scores, {"psnr": False, "bright": False}, "net", full_reference=["psnr"], saved=saved)


@pytest.fixture
def grids(monkeypatch):
    """The sheets that were drawn: [[(image, caption)]] of each."""
    drawn, save = [], pictures.save_grid

    def spy(path, lines):
        drawn.append(lines)
        save(path, lines)
    monkeypatch.setattr(pictures, "save_grid", spy)
    return drawn


@pytest.mark.fast
def test_crops_stand_in_columns_with_one_ground_truth_and_its_score(kept, grids, tmp_path):
    pictures.grid(kept, tmp_path / "x.png", crops=["a:8,4,20", "c:0,0,64", "b:0,0,80"])
    (lines,) = grids
    names = [[caption.split("\n")[0] for _, caption in line] for line in lines]
    assert names == [["LR", "GT", "bicubic", "net"]] * 3
    assert {image.shape for line in lines for image, _ in line} == {(3, 256, 256)}
    captions = [dict(caption.split("\n") for _, caption in line) for line in lines]
    # c has no reference: a grey cell
    assert captions[0]["GT"] == f"bright {kept['saved']['references']['a']['GT 2']['bright']:.2f}"
    assert captions[0]["LR"] == captions[1]["GT"] == "" and (lines[1][1][0] == 128).all()
    for stem, cells in zip("acb", captions):
        for row in ("bicubic", "net"):
            assert cells[row] == f"bright {kept['scores'][row][stem]['bright']:.2f}"
    files = kept["saved"]["images"]["a"]
    part = load_image(files["GT 2"])[:, 4:24, 8:28]
    assert torch.equal(lines[0][1][0][:, 6::13, 6::13][:, :19, :19], part[:, :19, :19])
    assert torch.equal(lines[0][0][0][:, 0, 0], load_image(files["LR"])[:, 1, 2])


@pytest.mark.fast
def test_the_inset_is_a_metric_with_the_tables_decimals(kept, grids, tmp_path):
    pictures.grid(kept, tmp_path / "x.png", crops=["a:0,0,32"], inset="psnr")
    captions = dict(caption.split("\n") for _, caption in grids[-1][0])
    assert captions["net"] == "PSNR 20.00" and captions["GT"] == ""
    # a metric that compares: the first reference
    first = load_image(kept["saved"]["images"]["a"]["GT"])
    assert torch.equal(grids[-1][0][1][0][:, ::8, ::8], first[:, :32, :32])
    with pytest.raises(runs.UserError, match=r"--inset lpips: not among the metrics \(psnr, bright\)"):
        pictures.grid(kept, tmp_path / "x.png", inset="lpips")


@pytest.mark.fast
def test_whole_images_are_evenly_spread_and_end_with_the_ground_truth(kept, grids, tmp_path):
    pictures.grid(kept, tmp_path / "x.png", 2)
    assert [[caption.split("\n")[0] for _, caption in line] for line in grids[-1]] == [["bicubic", "net", "GT"]] * 2
    assert torch.equal(grids[-1][1][1][0], load_image(kept["saved"]["images"]["b"]["net"]))
    assert pictures.spread(list("abcdefg"), 3) == ["a", "c", "e"] and pictures.spread(list("ab"), 0) == ["a", "b"]


@pytest.mark.fast
def test_the_commands_draw_from_the_file(kept, tmp_path, capsys):
    runs.save_json(tmp_path / "out.json", kept)
    call(pictures, "grid", tmp_path / "out.json", tmp_path / "grid.png", "--crop", "a:0,0,64", "--inset", "psnr")
    call(pictures, "front", tmp_path / "out.json", "psnr", "bright", tmp_path / "front.png")
    assert capsys.readouterr().out.count("wrote ") == 2
    assert image_size(tmp_path / "grid.png")[0] == 4 * 256 + 3 * 4
    for words, error in ((["--crop", "a:60,0,32"], "--crop a:60,0,32: the image has 80x80 pixels"),
                         (["--crop", "z:0,0,8"], "no image is called z")):
        with pytest.raises(runs.UserError, match=error):
            call(pictures, "grid", tmp_path / "out.json", tmp_path / "x.png", *words)
    with pytest.raises(runs.UserError, match="lpips: not among the metrics"):
        call(pictures, "front", tmp_path / "out.json", "psnr", "lpips", tmp_path / "x.png")
    Path(kept["saved"]["images"]["b"]["net"]).unlink()
    with pytest.raises(runs.UserError, match=r"net/b.png: not there any more"):
        call(pictures, "grid", tmp_path / "out.json", tmp_path / "x.png")


@pytest.mark.fast
@pytest.mark.parametrize("words, error", [
    (["grid", "f.json", "x.jpg"], "x.jpg: a PNG is written"),
    (["front", "f.json", "psnr", "psnr", "x"], "x: a PNG is written"),
    (["grid", "f.json", "x.png", "--crop", "a"], "--crop a: write STEM:X,Y,SIDE"),
    (["grid"], "the following arguments are required")])
def test_flags_of_pictures_that_cannot_work(words, error, capsys):
    with pytest.raises(SystemExit):
        pictures.parse_args(words)
    assert error in capsys.readouterr().err


@pytest.mark.fast
def test_front_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    import matplotlib.figure
    result = result_of(SCORES, LOWER)
    pictures.front(result, "psnr", "musiq", tmp_path / "f.png")
    before = (tmp_path / "f.png").read_bytes()

    def killed(figure, file, **more):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", killed)
    with pytest.raises(KeyboardInterrupt):
        pictures.front(result, "psnr", "musiq", tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.fast
def test_plots_have_one_size_and_resolution(tmp_path):
    from PIL import Image
    drawing, axis = style.figure()
    style.interval(axis, 1.0, 2.0, (0.5, 1.5), (1.8, 2.1), label="a")
    style.seeds(axis, [0, 1, 2], [[1, 2, 3], [2, 3, 4]], label="b")
    assert len(axis.lines) >= 4
    style.save(drawing, tmp_path / "f.png")
    with Image.open(tmp_path / "f.png") as image:
        assert image.size == (round(style.WIDTH * style.DPI), 4 * style.DPI)
        assert round(image.info["dpi"][0]) == style.DPI == 150


@pytest.mark.fast
@pytest.mark.parametrize("name", ["bapps/bapps.json", "synthetic-vgg/sbs.json", "synthetic-vgg/hggt.json",
                                  "synthetic-vgg/complement.json"])
def test_committed_analyses_are_drawn_again_without_a_change(name, tmp_path, capsys):
    source, out = runs.REPO / "results" / "analysis" / name, tmp_path / name
    out.parent.mkdir()
    for file in source.parent.glob("*.json"):
        (out.parent / file.name).write_bytes(file.read_bytes())
    analyses.redraw(out)
    picture = Path(capsys.readouterr().out.removeprefix("wrote ").strip())
    assert image_size(picture)[0] == style.WIDTH * style.DPI
    assert out.read_bytes() == source.read_bytes()
    with pytest.raises(runs.UserError, match="give sbs.json"):
        analyses.redraw(source.parents[1] / "synthetic-vgg" / "recommend.json")


@pytest.mark.fast
def test_captions_grow_with_the_sheet_and_stay_in_their_cells(tmp_path):
    short, long = (pictures.caption_font(1040, [(text, 256)] * 4) for text in ("net\nMUSIQ 70.00", "a" * 40))
    assert short.size == 12 * 1040 // 830 and long.size == 11
    assert pictures.caption_font(300, [("a", 100)]).size == 11
