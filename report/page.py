"""One self-contained HTML page of a result's images: zoom, before/after slider, sorted by any score; opens from disk.

    python -m report.page FILE.json OUT.html [--images N]

FILE.json is a file of evaluate.py --out-json, made with --save. Arrow keys change the image, the space bar swaps the
two sides of the slider while it is held, the wheel or two fingers zoom all views together. page.html is the template,
viewer.js and viewer.css are the viewer, which the pages of study.make have as well.
"""
import base64
import html
import io
import json
import re
from pathlib import Path

import runs
from report import tables

HERE = Path(__file__).resolve().parent
DATA_URL = "data:image/webp;base64,"


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    p.add_argument("result", type=Path, metavar="FILE.json", help="of evaluate.py --out-json, made with --save")
    p.add_argument("out", type=Path, metavar="OUT.html")
    p.add_argument("--images", type=runs.COUNT, default=24, help="images on the page, evenly spread; 0: all")
    return p.parse_args(argv)


def encode(image, quality=None):
    """The base64 text of a WebP: lossless, or of this quality. image: (3, H, W) uint8. No metadata are kept."""
    from PIL import Image
    how = {"lossless": True, "quality": 50} if quality is None else {"quality": quality}
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "WEBP", **how)
    return base64.b64encode(buffer.getvalue()).decode()


def fill(template, parts, path):
    """Writes a page: <!--NAME--> of the template becomes parts["NAME"], and <!--VIEWER--> the viewer of all pages."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("viewer.css", "viewer.js"))
    parts = parts | {"VIEWER": f"<style>\n{style}</style>\n<script>\n{script}</script>"}
    # in one pass: a part may hold the name of another
    text = re.sub("<!--([A-Z]+)-->", lambda found: parts[found[1]], template.read_text(encoding="utf-8"))
    runs.write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write(result, path, count=24):
    """The page of `count` images of a result, evenly spread over it (0: all)."""
    from images import image_size, load_image
    from report.pictures import saved_images, spread
    images, scores, shown = saved_images(result), result["scores"], []
    for stem in spread(list(images), count):
        # a row's image: the LR image comes first
        *_, last = images[stem].values()
        of_rows, references = {row: scores[row][stem] for row in scores}, result["saved"]["references"].get(stem, {})
        cells = {cell: DATA_URL + encode(load_image(file, rgb=True)) for cell, file in images[stem].items()}
        shown.append({"stem": stem, "size": image_size(last), "scores": of_rows | references, "cells": cells})
    metrics = [{"name": m, "shown": text} for m, text in zip(tables.ordered(result), tables.headings(result))]
    content = {"metrics": metrics, "rows": list(scores), "images": shown}
    parts = {"TITLE": html.escape(f"{', '.join(scores)}: {tables.title_of(result)}"), "TABLE": table(result),
             "CONTENT": json.dumps(content).replace("<", "\\u003c")}
    fill(HERE / "page.html", parts, path)


def table(result):
    """The means with their intervals, as rows of HTML."""
    groups = [f'<th class="group" colspan="{len(m)}">{name}</th>' for name, m in tables.spans(result).items()]
    heads = [f"<th>{html.escape(heading)}</th>" for heading in tables.headings(result)]
    lines = [["<th></th>", *groups], ["<th></th>", *heads]]
    for row, *cells in tables.mean_rows(result):
        cells = [f"<td>{mean} <small>{ends}</small></td>" for mean, _, ends in (cell.partition(" ") for cell in cells)]
        lines.append([f"<th>{html.escape(row)}</th>", *cells])
    return "\n".join(f"<tr>{''.join(line)}</tr>" for line in lines)


def main(args):
    runs.check_output(args.out, "OUT.html")
    write(tables.read_result(args.result), args.out, args.images)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    runs.cli(lambda: main(parse_args()))
