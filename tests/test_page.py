"""report.page in a real browser: sorting, keys, zoom, slider, size of the window. Skips where there is no Chromium."""
import json

import pytest
import torch

import runs
from images import save_image
from report import page, tables

SCRIPT = "</script>"


def write(folder, scores, lower, cells=("LR", "GT", "bicubic", "net"), stems=None):
    """The page of a result with these scores; file names are free of the stems' signs."""
    torch.manual_seed(0)
    images = {}
    for k, stem in enumerate(stems or scores["net"]):
        images[stem] = {}
        for cell in cells:
            images[stem][cell] = str(folder / f"{cell}-{k}.png")
            save_image(images[stem][cell], torch.rand(3, *((20, 30) if cell == "LR" else (80, 120))))
    means, differences = tables.summarise(scores, lower, "net")
    result = {"scores": scores, "lower_is_better": lower, "full_reference": ["psnr"], "images": len(images),
              "protocol": {"name": "two & three", "says": "RGB"}, "against": "net", "differences": differences,
              "mean": {row: {m: cell["mean"] for m, cell in c.items()} for row, c in means.items()},
              "intervals": {row: {m: [cell["low"], cell["high"]] for m, cell in c.items()} for row, c in means.items()},
              "saved": {"images": images, "references": {"a": {"GT": {"psnr": 61.25}}}}}
    runs.save_json(folder / "r.json", result)
    page.write(result, folder / "p.html")
    return folder / "p.html"


@pytest.fixture
def written(tmp_path):
    scores = {"bicubic": {"a": {"psnr": 20.0}, "b": {"psnr": 21.0}, SCRIPT: {"psnr": 19.0}},
              "net": {"a": {"psnr": 22.0}, "b": {"psnr": 21.5}, SCRIPT: {"psnr": 23.0}}}
    return write(tmp_path, scores, {"psnr": False})


@pytest.mark.fast
@pytest.mark.parametrize("name", ["CONTENT", "TABLE", "<!--CONTENT-->", "<!--TITLE-->", "\\1", "</script>"])
def test_any_name_of_a_row_leaves_the_page_whole(tmp_path, name):
    import re
    scores = {name: {"a": {"psnr": 20.0}, "b": {"psnr": 21.0}}, "net": {"a": {"psnr": 22.0}, "b": {"psnr": 21.5}}}
    text = write(tmp_path, scores, {"psnr": False}).read_text(encoding="utf-8")
    content = json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    assert content["rows"] == [name, "net"] and text.count("<title>") == 1


@pytest.mark.fast
def test_it_is_one_file_that_asks_for_nothing(written):
    text = written.read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and text.count("data:image/webp;base64,") == 3 * 4
    assert text.count("</script>") == 3 and "two &amp; three" in text and "<!--" not in text


@pytest.mark.fast
def test_groups_of_columns_stand_above_the_table_and_intervals_in_it(written):
    text = written.read_text(encoding="utf-8")
    groups = '<tr><th></th><th class="group" colspan="1">full-reference</th></tr>'
    assert f"{groups}\n<tr><th></th><th>PSNR ↑</th></tr>" in text
    low, high = tables.interval([22.0, 21.5, 23.0])
    assert f"<tr><th>net</th><td>22.17 <small>[{low:.2f}, {high:.2f}]</small></td></tr>" in text


@pytest.mark.fast
def test_the_command_takes_fewer_images_evenly_spread(tmp_path, capsys):
    scores = {"net": {stem: {"psnr": 20.0} for stem in "abcdef"}}
    for count, shown in ((0, "abcdef"), (2, "ad"), (24, "abcdef")):
        path = write(tmp_path, scores, {"psnr": False}, ("LR", "net"))
        page.main(page.parse_args([str(tmp_path / "r.json"), str(path), "--images", str(count)]))
        text = path.read_text(encoding="utf-8")
        assert text.count("data:image/webp") == 2 * len(shown) and f"wrote {path}" in capsys.readouterr().out
        assert all((f'"stem": "{stem}"' in text) == (stem in shown) for stem in "abcdef")


def test_in_chromium(written, browser):
    tab, errors = browser.new_page(viewport={"width": 1280, "height": 900}), []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(written.as_uri())

    def order():
        return [text.split("\n")[0] for text in tab.locator("#list button").all_inner_texts()]
    # net's PSNR, largest first
    assert order() == [SCRIPT, "a", "b"]
    tab.locator("#of").select_option("bicubic")
    assert order() == ["b", "a", SCRIPT]
    tab.locator("#of").select_option("net")
    tab.locator("#minus").select_option("bicubic")
    tab.locator("#up").check()
    assert order() == ["b", "a", SCRIPT] and "0.500" in tab.locator("#list").inner_text()
    tab.locator("#list button").nth(1).click()
    box = tab.locator("#slider .window").bounding_box()
    tab.mouse.move(box["x"] + 100, box["y"] + 100)
    tab.mouse.wheel(0, -600)

    def transforms():
        return tab.evaluate("() => [...document.querySelectorAll('.window img')].map(i => i.style.transform)")
    zoomed = transforms()
    assert len(zoomed) == 6 and len(set(zoomed)) == 1 and "translate(0px" not in zoomed[0]
    tab.mouse.down()
    tab.mouse.move(box["x"] + 40, box["y"] + 60)
    tab.mouse.up()
    moved = transforms()
    assert len(set(moved)) == 1 and moved != zoomed
    tab.locator("#reset").click()

    def clip():
        return float(tab.evaluate("() => document.getElementById('over').style.clipPath.match(/0px ([0-9.]+)px/)[1]"))
    tab.locator("#split").fill("250")
    narrow = clip()
    tab.locator("#split").fill("750")
    assert 0 <= clip() < narrow <= 120
    tab.locator("#left").select_option("LR")
    assert tab.evaluate("() => document.getElementById('over').naturalWidth") == 30
    captions = tab.locator("figcaption").all_inner_texts()
    assert captions == ["LR", "GT\nPSNR 61.25", "bicubic\nPSNR 20.00", "net\nPSNR 22.00"]
    assert errors == []


def test_arrow_keys_change_the_image_and_the_space_bar_flips_while_it_is_held(written, browser):
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(written.as_uri())

    def current():
        return tab.locator("#list [aria-current=true] span").first.inner_text()

    def sides():
        return [tab.locator(name).inner_text() for name in ("#name-a", "#name-b")]

    def left_of_the_line():
        """The image seen there: #over while its right part is cut off, #under while #over's left part is."""
        right, left = tab.evaluate("""() => document.getElementById('over').style.clipPath
            .match(/inset\\(0px (.*)px 0px (.*)px\\)/).slice(1).map(Number)""")
        assert (right > 0) != (left > 0)
        return tab.evaluate(f"() => document.getElementById('{'over' if right else 'under'}').src")
    seen = [current()]
    for key in ("ArrowDown", "ArrowRight", "ArrowDown", "ArrowUp", "ArrowLeft", "ArrowLeft"):
        tab.keyboard.press(key)
        seen.append(current())
    # the list ends at both ends
    assert seen == ["a", "b", "b", "b", "a", SCRIPT, SCRIPT]
    tab.locator("#left").select_option("bicubic")
    tab.locator("#right").select_option("net")
    bicubic, net = (tab.locator("#panels img").nth(k).get_attribute("src") for k in (2, 3))
    assert sides() == ["bicubic", "net"] and left_of_the_line() == bicubic != net
    tab.keyboard.down(" ")
    assert sides() == ["net", "bicubic"] and left_of_the_line() == net
    tab.keyboard.up(" ")
    assert sides() == ["bicubic", "net"] and left_of_the_line() == bicubic
    # moving the slider leaves the keys to the page
    tab.locator("#split").click()
    tab.keyboard.press("ArrowDown")
    assert current() == "a"


@pytest.mark.parametrize("width, height", [(1280, 720), (1920, 1200)])
def test_it_fills_the_window(written, browser, width, height):
    tab = browser.new_page(viewport={"width": width, "height": height})
    tab.goto(written.as_uri())
    root = "document.documentElement"
    assert tab.evaluate(f"() => [{root}.scrollWidth, {root}.scrollHeight]") == [width, height]
    slider, panels = (tab.locator(name).bounding_box() for name in ("#slider .window", "#panels"))
    assert slider["width"] > width - 220 - 30 and panels["y"] + panels["height"] > height - 20
    assert slider["height"] > 0.35 * height
    tab.locator("summary").click()
    assert tab.locator("#slider .window").bounding_box()["height"] > slider["height"] + 20


def test_it_does_not_open_sorted_by_a_row_without_scores(tmp_path, browser):
    scores = {"net": {"a": {"psnr": 20.0, "ranker": 1.0}, "b": {"psnr": 22.0, "ranker": 2.0}},
              "gold": {"a": {"ranker": 3.0}, "b": {"ranker": 2.0}}}
    tab = browser.new_page()
    tab.goto(write(tmp_path, scores, {"psnr": False, "ranker": False}, ("LR", "net")).as_uri())
    assert tab.locator("#of").input_value() == "net"
    assert [text.split("\n")[0] for text in tab.locator("#list button").all_inner_texts()] == ["b", "a"]
