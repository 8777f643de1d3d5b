"""page.py in a real browser: sorting, synchronised zoom, the slider. Skips where there is no Chromium."""
import shutil

import pytest
import torch

from report import page
from report import tables

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def written(tmp_path):
    torch.manual_seed(0)
    scores = {"bicubic": {"a": {"psnr": 20.0}, "b": {"psnr": 21.0}, "</script>": {"psnr": 19.0}}, "net": {"a": {"psnr": 22.0}, "b": {"psnr": 21.5}, "</script>": {"psnr": 23.0}}}
    images = {stem: {"LR": torch.rand(3, 20, 30), "bicubic": torch.rand(3, 80, 120), "net": torch.rand(3, 80, 120), "reference": torch.rand(3, 80, 120)} for stem in scores["net"]}
    means, _ = tables.summarise(scores, {"psnr": False})
    page.write(tmp_path / "p.html", "two & three", images, scores, {"psnr": False}, means)
    return tmp_path / "p.html"


@pytest.mark.fast
def test_it_is_one_file_that_asks_for_nothing(written):
    text = written.read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and text.count("data:image/webp;base64,") == 3 * 4
    assert text.count("</script>") == 2 and "two &amp; three" in text


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (Debian: apt-get install chromium)")
def test_in_chromium(written):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"])
        tab, errors = browser.new_page(viewport={"width": 1280, "height": 900}), []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(written.as_uri())
        order = lambda: [text.split("\n")[0] for text in tab.locator("#list button").all_inner_texts()]
        assert order() == ["</script>", "a", "b"]                                 # net's PSNR, largest first
        tab.locator("#of").select_option("bicubic")
        assert order() == ["b", "a", "</script>"]
        tab.locator("#of").select_option("net")
        tab.locator("#minus").select_option("bicubic")
        tab.locator("#up").check()
        assert order() == ["b", "a", "</script>"] and "0.500" in tab.locator("#list").inner_text()
        tab.locator("#list button").nth(1).click()
        box = tab.locator("#slider .window").bounding_box()
        tab.mouse.move(box["x"] + 100, box["y"] + 100)
        tab.mouse.wheel(0, -600)
        state = "() => [...document.querySelectorAll('.window img')].map(i => i.style.transform)"
        zoomed = tab.evaluate(state)
        assert len(zoomed) == 6 and len(set(zoomed)) == 1 and "translate(0px" not in zoomed[0]
        tab.mouse.down()
        tab.mouse.move(box["x"] + 40, box["y"] + 60)
        tab.mouse.up()
        moved = tab.evaluate(state)
        assert len(set(moved)) == 1 and moved != zoomed
        tab.locator("#reset").click()
        clip = lambda: float(tab.evaluate("() => document.getElementById('over').style.clipPath.match(/0px ([0-9.]+)px/)[1]"))
        tab.locator("#split").fill("250")
        narrow = clip()
        tab.locator("#split").fill("750")
        assert 0 <= clip() < narrow <= 120
        tab.locator("#left").select_option("LR")
        assert tab.evaluate("() => document.getElementById('over').naturalWidth") == 30
        assert errors == []
        browser.close()


@pytest.mark.fast
def test_groups_of_columns_stand_above_the_table(written):
    assert '<tr><th></th><th class="group" colspan="1">FR low</th></tr><tr><th></th><th>PSNR ↑</th></tr>' in written.read_text(encoding="utf-8")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (Debian: apt-get install chromium)")
def test_it_does_not_open_sorted_by_a_row_without_scores(tmp_path):
    from playwright.sync_api import sync_playwright
    scores = {"net": {"a": {"psnr": 20.0, "ranker": 1.0}, "b": {"psnr": 22.0, "ranker": 2.0}}, "gold": {"a": {"ranker": 3.0}, "b": {"ranker": 2.0}}}
    lower = {"psnr": False, "ranker": False}
    page.write(tmp_path / "p.html", "t", {stem: {"LR": torch.rand(3, 8, 8), "net": torch.rand(3, 32, 32)} for stem in "ab"}, scores, lower, tables.summarise(scores, lower)[0])
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"])
        tab = browser.new_page()
        tab.goto((tmp_path / "p.html").as_uri())
        assert tab.locator("#of").input_value() == "net" and [text.split("\n")[0] for text in tab.locator("#list button").all_inner_texts()] == ["b", "a"]
        browser.close()
