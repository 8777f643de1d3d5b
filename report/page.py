"""One self-contained HTML page of a table's images: synchronised zoom, a before/after slider, sortable by any score or difference; works from file://."""
import base64
import html
import io
import json

from PIL import Image

import runs
from report import tables


def encode(image):
    """(3, H, W) in [0, 1] -> data URL of a lossless WebP."""
    pixels = Image.fromarray(image.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy())
    buffer = io.BytesIO()
    pixels.save(buffer, "WEBP", lossless=True, quality=50)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def write(path, title, images, scores, lower, means):
    """images: {stem: {"LR", "reference", ..., or a row's name: (3, H, W) in [0, 1]}}; scores {row: {stem: {metric: value}}}; means: tables.summarise's."""
    metrics = tables.ordered(list(lower))
    content = {"metrics": [{"name": m, "shown": tables.heading(m, lower[m]), "lower": lower[m]} for m in metrics], "rows": list(scores),
               "images": [{"stem": stem, "size": list(next(reversed(cells.values())).shape[:0:-1]), "cells": {name: encode(image) for name, image in cells.items()},
                           "scores": {row: scores[row][stem] for row in scores}} for stem, cells in images.items()]}
    table = "".join(f"<tr><th>{html.escape(row)}</th>" + "".join(f"<td>{cells[m]['mean']:.3f}</td>" if m in cells else "<td>–</td>" for m in metrics) + "</tr>"
                    for row, cells in means.items())
    head = "".join(f"<th>{html.escape(tables.heading(m, lower[m]))}</th>" for m in metrics)
    groups = "".join(f'<th class="group" colspan="{n}">{name}</th>' for name, n in tables.spans(metrics))
    text = TEMPLATE.replace("TITLE", html.escape(title)).replace("GROUPS", groups).replace("HEAD", head).replace("BODY", table)
    text = text.replace("CONTENT", json.dumps(content).replace("</", "<\\/"))
    runs.write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>TITLE</title>
<style>
body { font: 14px system-ui, sans-serif; margin: 0; color: #222; background: #f6f6f6 }
header, nav { padding: 8px 12px; background: #fff; border-bottom: 1px solid #ccc }
h1 { font-size: 16px; margin: 0 0 6px }
table { border-collapse: collapse } th, td { padding: 1px 8px; text-align: right } th:first-child { text-align: left } th.group { text-align: center; border-bottom: 1px solid #ccc }
nav label { margin-right: 12px }
main { display: grid; grid-template-columns: 220px 1fr; height: calc(100vh - 40px) }
#list { overflow-y: auto; background: #fff; border-right: 1px solid #ccc; margin: 0; padding: 0; list-style: none }
#list button { display: flex; justify-content: space-between; width: 100%; border: 0; border-bottom: 1px solid #eee; background: none; padding: 6px 10px; font: inherit; cursor: pointer; text-align: left }
#list button[aria-current=true] { background: #dbe8ff }
#view { overflow: auto; padding: 8px }
#panels { display: flex; flex-wrap: wrap; gap: 8px }
figure { margin: 0 } figcaption { white-space: pre-line; font-size: 12px; min-height: 2.6em }
.window { position: relative; overflow: hidden; width: 300px; height: 300px; background: #888; cursor: grab; touch-action: none }
.window img { position: absolute; left: 0; top: 0; transform-origin: 0 0; image-rendering: pixelated; user-select: none; pointer-events: none }
#slider .window { width: 616px; height: 400px }
#line { position: absolute; top: 0; bottom: 0; width: 2px; background: #fff; box-shadow: 0 0 3px #000; pointer-events: none }
#split { width: 616px; display: block; margin: 4px 0 }
</style></head><body>
<header><h1>TITLE</h1><table><tr><th></th>GROUPS</tr><tr><th></th>HEAD</tr>BODY</table></header>
<nav><label>sort by <select id="metric"></select></label><label>of <select id="of"></select></label><label>minus <select id="minus"></select></label>
<label><input type="checkbox" id="up"> smallest first</label><button id="reset">whole image</button> <span>wheel: zoom, drag: move</span></nav>
<main><ul id="list"></ul><div id="view"><div id="slider"><label>left <select id="left"></select></label> <label>right <select id="right"></select></label>
<div class="window"><img id="under" alt=""><img id="over" alt=""><div id="line"></div></div>
<input id="split" type="range" min="0" max="1000" value="500" aria-label="before and after"></div><div id="panels"></div></div></main>
<script type="application/json" id="data">CONTENT</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent), $ = id => document.getElementById(id);
const fill = (select, names) => { select.replaceChildren(...names.map(([value, text]) => new Option(text, value))); };
let current = data.images[0].stem, zoom = null, x = 0, y = 0;            // zoom: screen pixels per HR pixel; x, y: HR pixel at the top left
fill($("metric"), data.metrics.map(m => [m.name, m.shown]));
fill($("of"), data.rows.map(r => [r, r]));
fill($("minus"), [["", "nothing"], ...data.rows.map(r => [r, r])]);
const scored = data.rows.filter(r => data.metrics[0].name in data.images[0].scores[r]);         // gold has no full-reference scores
$("of").value = (scored.length ? scored : data.rows).at(-1);
const image = () => data.images.find(i => i.stem === current);
const key = i => { const s = i.scores, m = $("metric").value, a = s[$("of").value][m], r = $("minus").value; return r ? a - s[r][m] : a; };

function list() {
  const sorted = [...data.images].sort((a, b) => (Number.isFinite(key(a)) ? key(a) : -1e30) - (Number.isFinite(key(b)) ? key(b) : -1e30));
  if (!$("up").checked) sorted.reverse();
  $("list").replaceChildren(...sorted.map(i => {
    const button = document.createElement("button"), name = document.createElement("span"), value = document.createElement("span"), item = document.createElement("li");
    name.textContent = i.stem; value.textContent = Number.isFinite(key(i)) ? key(i).toFixed(3) : "–";
    button.append(name, value); button.setAttribute("aria-current", i.stem === current);
    button.onclick = () => { current = i.stem; zoom = null; list(); show(); };
    item.append(button); return item; }));
}

function show() {
  const cells = image().cells, names = Object.keys(cells), keep = [$("left").value, $("right").value];
  for (const [k, id] of ["left", "right"].entries()) {
    fill($(id), names.map(n => [n, n]));
    $(id).value = names.includes(keep[k]) ? keep[k] : names[k ? names.length - 1 : 0];
  }
  $("panels").replaceChildren(...names.map(name => {
    const figure = document.createElement("figure"), caption = document.createElement("figcaption"), pane = document.createElement("div"), img = document.createElement("img");
    const scores = image().scores[name];
    caption.textContent = name + (scores ? "\\n" + data.metrics.filter(m => m.name in scores).map(m => m.shown.slice(0, -2) + " " + scores[m.name].toFixed(2)).join("  ") : "");
    pane.className = "window"; img.src = cells[name]; img.alt = name; pane.append(img); figure.append(caption, pane); return figure; }));
  slider();
}

function slider() { $("under").src = image().cells[$("right").value]; $("over").src = image().cells[$("left").value]; place(); }

function place() {
  const [w, h] = image().size;
  for (const pane of document.querySelectorAll(".window")) {
    const fit = Math.min(pane.clientWidth / w, pane.clientHeight / h), scale = zoom === null ? fit : zoom;
    for (const img of pane.querySelectorAll("img")) {
      img.style.width = w + "px"; img.style.height = h + "px";                   // the LR image is shown as large as the others
      img.style.transform = `scale(${scale}) translate(${zoom === null ? 0 : -x}px, ${zoom === null ? 0 : -y}px)`;
    }
    if (pane.contains($("over"))) {
      const at = $("split").value / 1000 * pane.clientWidth, inside = Math.min(Math.max(at / scale + (zoom === null ? 0 : x), 0), w);
      $("line").style.left = at + "px"; $("over").style.clipPath = `inset(0 ${w - inside}px 0 0)`;
    }
  }
}

document.addEventListener("wheel", event => {
  const pane = event.target.closest(".window");
  if (!pane) return;
  event.preventDefault();
  const [w, h] = image().size, box = pane.getBoundingClientRect(), old = zoom === null ? Math.min(pane.clientWidth / w, pane.clientHeight / h) : zoom;
  const mx = event.clientX - box.left, my = event.clientY - box.top, next = Math.min(Math.max(old * Math.exp(-event.deltaY / 400), 0.1), 32);
  x = (zoom === null ? 0 : x) + mx / old - mx / next; y = (zoom === null ? 0 : y) + my / old - my / next; zoom = next; place();
}, { passive: false });
let drag = null;
document.addEventListener("pointerdown", event => { const pane = event.target.closest(".window"); if (pane && zoom !== null) drag = [event.clientX, event.clientY, x, y]; });
document.addEventListener("pointermove", event => { if (drag) { x = drag[2] - (event.clientX - drag[0]) / zoom; y = drag[3] - (event.clientY - drag[1]) / zoom; place(); } });
document.addEventListener("pointerup", () => { drag = null; });
for (const id of ["metric", "of", "minus", "up"]) $(id).onchange = list;
for (const id of ["left", "right"]) $(id).onchange = slider;
$("split").oninput = place; $("reset").onclick = () => { zoom = null; place(); }; window.onresize = place;
list(); show();
</script></body></html>
"""
