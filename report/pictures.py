"""Pictures of a table, drawn from what evaluate.py left: outputs side by side, and one metric against another.

    python -m report.pictures grid FILE.json OUT.png                         whole images: every row | GT
    python -m report.pictures grid FILE.json OUT.png --crop STEM:X,Y,SIDE    squares: LR | GT | every row
    python -m report.pictures front FILE.json psnr musiq OUT.png             means of one metric against another

FILE.json is a file of evaluate.py --out-json; grid also needs its --save. No network runs here.
"""
import re
from pathlib import Path

import runs

# STEM:X,Y,SIDE
CROP = re.compile(r"(.+):(\d+),(\d+),(\d+)")
# pixels; larger crops make larger cells
CELL = 256


def parse_args(argv=None):
    p = runs.Parser(description=__doc__)
    commands = p.add_subparsers(dest="command", metavar="grid | front", required=True)
    c = commands.add_parser("grid", help="outputs side by side, with names and scores")
    c.add_argument("result", type=Path, metavar="FILE.json", help="of evaluate.py --out-json, made with --save")
    c.add_argument("out", type=Path, metavar="OUT.png")
    c.add_argument("--images", type=runs.SIZE, default=4, help="rows of the picture, evenly spread over the images")
    c.add_argument("--crop", nargs="+", default=[], metavar="STEM:X,Y,SIDE",
                   help="rows of the picture: squares of images, in HR pixels, instead of whole images")
    c.add_argument("--inset", metavar="METRIC",
                   help="its score stands above each cell; default: musiq, else the last no-reference one, else the "
                        "first. GT is the reference with the best score, the first one for a metric that compares")
    c = commands.add_parser("front", help="the rows' means of one metric against another, with intervals")
    c.add_argument("result", type=Path, metavar="FILE.json", help="of evaluate.py --out-json")
    c.add_argument("x", metavar="METRIC")
    c.add_argument("y", metavar="METRIC")
    c.add_argument("out", type=Path, metavar="OUT.png")
    c.add_argument("--names", nargs="+", metavar="TEXT", help="of the rows in the picture, in the order of the table")
    args = p.parse_args(argv)
    if args.out.suffix.lower() != ".png":
        p.error(f"{args.out}: a PNG is written: name a file that ends in .png")
    for word in args.crop if args.command == "grid" else ():
        if not CROP.fullmatch(word):
            p.error(f"--crop {word}: write STEM:X,Y,SIDE, the last three in HR pixels")
    return args


ARGS = parse_args() if __name__ == "__main__" else None

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from images import image_size, load_image
from report import style, tables

# Sheets

def save_grid(path, rows):
    """PNG of rows of (image (3, H, W), caption): each caption, of one line or more, stands above its image."""
    gap = 4
    cells = [[(image if image.dtype == torch.uint8 else image.clamp(0, 1).mul(255).round().byte(), text)
              for image, text in row] for row in rows]
    columns = range(max(map(len, cells)))
    widths = [max(row[c][0].shape[2] for row in cells if c < len(row)) for c in columns]
    width = sum(widths) + gap * (len(widths) - 1)
    font = caption_font(width, [(text, widths[c]) for row in cells for c, (_, text) in enumerate(row)])
    strip = 4 + (font.size + 1) * max(1 + text.count("\n") for row in rows for _, text in row)
    heights = [max(image.shape[1] for image, _ in row) + strip for row in cells]
    sheet = Image.new("RGB", (width, sum(heights) + gap * (len(heights) - 1)), "white")
    for r, row in enumerate(cells):
        for c, (image, text) in enumerate(row):
            x, y = sum(widths[:c]) + gap * c, sum(heights[:r]) + gap * r
            # of the cell's width: a long caption is cut off, not written over the next one
            caption = Image.new("RGB", (widths[c], strip), "white")
            draw = ImageDraw.Draw(caption)
            for k, line in enumerate(text.split("\n")):
                draw.text((2, 1 + k * (font.size + 1)), line, fill="black", font=font)
            sheet.paste(caption, (x, y))
            sheet.paste(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), (x, y + strip))
    runs.write_atomic(path, lambda temporary: sheet.save(temporary, format="PNG"))


def caption_font(width, captions):
    """12 pixels where GitHub shows the sheet in 830, or as large as the captions [(text, pixels of space)] allow."""
    smallest = 11
    for size in range(max(smallest, 12 * width // 830), smallest, -1):
        font = ImageFont.load_default(size)
        if all(font.getlength(line) <= space - 4 for text, space in captions for line in text.split("\n")):
            return font
    return ImageFont.load_default(smallest)


def flattest(image, side):
    """Top and left of the flattest square of `side` pixels, on a grid of a quarter of it: there grids show first.

    image: (1, 3, H, W)
    """
    grey = image.mean(1, keepdim=True)
    spread = F.avg_pool2d(grey ** 2, side, side // 4) - F.avg_pool2d(grey, side, side // 4) ** 2
    row, column = divmod(spread.argmin().item(), spread.shape[3])
    return row * (side // 4), column * (side // 4)


def enlarged_crop(image, top, left, side, times):
    """A square of image (1, 3, H, W), every pixel shown as times x times. -> (3, side * times, side * times)"""
    return image[0, :, top:top + side, left:left + side].repeat_interleave(times, 1).repeat_interleave(times, 2)


# The grid of a result

def saved_images(result):
    """{stem: {"LR", "GT", "GT 2", ..., then the rows: file}} of a result; UserError if there are none."""
    images = (result.get("saved") or {}).get("images")
    if not images:
        raise runs.UserError("no outputs were kept: call evaluate.py with --save DIR and --out-json FILE.json")
    for files in images.values():
        for file in files.values():
            if not Path(file).is_file():
                raise runs.UserError(f"{file}: not there any more, or named from another folder: "
                                     "call from where evaluate.py was called, or call that again")
    return images


def spread(stems, count):
    """`count` of the stems, evenly spread; 0: all."""
    return stems[::max(1, len(stems) // count)][:count] if count else stems


def find_crops(words, images):
    """[(stem, (y, x, side))] of the words of --crop; UserError where one lies outside its image."""
    crops = []
    for word in words:
        stem, x, y, side = CROP.fullmatch(word).groups()
        if stem not in images:
            raise runs.UserError(f"--crop {word}: no image is called {stem}")
        x, y, side = int(x), int(y), int(side)
        width, height = (4 * n for n in image_size(images[stem]["LR"]))
        if y + side > height or x + side > width or not side:
            raise runs.UserError(f"--crop {word}: the image has {width}x{height} pixels")
        for cell, file in images[stem].items():
            size = image_size(file)
            if cell != "LR" and size != (width, height):
                raise runs.UserError(f"{cell}, image {stem}: {file} has {size[0]}x{size[1]} pixels, LR x4 "
                                     f"{width}x{height}: crops need images of one size")
        crops.append((stem, (y, x, side)))
    return crops


def ground_truth(result, stem, metric):
    """-> (cell, score) of the reference with the best score of a no-reference metric; else of the first, score None."""
    scores = {cell: s[metric] for cell, s in result["saved"]["references"].get(stem, {}).items() if metric in s}
    if scores:
        cell = (min if result["lower_is_better"][metric] else max)(scores, key=scores.get)
        return cell, scores[cell]
    return ("GT" if "GT" in result["saved"]["images"][stem] else None), None


def default_inset(result):
    """musiq, else the last no-reference metric, else the first."""
    metrics = list(result["lower_is_better"])
    alone = [m for m in metrics if m not in result["full_reference"]]
    return "musiq" if "musiq" in metrics else [metrics[0], *alone][-1]


def grid(result, path, count=4, crops=(), inset=None):
    """PNG: LR | GT | every row of each crop, all cells of one size; without crops `count` whole images, every row | GT.

    Above each cell stand its name and its score by the metric `inset`, over the whole image. GT is one of the
    references, see ground_truth; the others are on the page. An image without reference has a grey cell in its place.
    """
    images, inset = saved_images(result), inset or default_inset(result)
    if inset not in result["lower_is_better"]:
        raise runs.UserError(f"--inset {inset}: not among the metrics ({', '.join(result['lower_is_better'])})")
    rows, decimals = [row for row in result["scores"] if row != "gold"], tables.decimals_of(result)[inset]
    boxes = find_crops(crops, images)
    side = max([CELL, *(box[2] for _, box in boxes)])
    lines = []
    for stem, box in boxes or [(stem, None) for stem in spread(list(images), count)]:
        reference, score = ground_truth(result, stem, inset)
        scores = {row: result["scores"][row][stem].get(inset) for row in rows} | {"GT": score}
        files = {"GT": reference and images[stem][reference]} | {row: images[stem][row] for row in rows}
        if box:
            files = {"LR": images[stem]["LR"]} | files
        else:
            files = {row: files[row] for row in rows} | ({} if "reference" in rows else {"GT": files["GT"]})
        line = []
        for cell, file in files.items():
            score, image = scores.get(cell), file and load_image(file, rgb=True)
            if box and cell == "LR":
                image = image.repeat_interleave(4, 1).repeat_interleave(4, 2)
            if box and file:
                image = enlarged(image, box, side)
            shown = "" if score is None else f"{tables.shown(inset)} {score:.{decimals}f}"
            line.append((image, f"{cell}\n{shown}"))
        lines.append(line)
    save_grid(path, without_empty(lines))


def enlarged(image, box, side):
    """The square (y, x, n) of an image (3, H, W), its pixels repeated to `side`."""
    y, x, n = box
    return F.interpolate(image[None, :, y:y + n, x:x + n], size=(side, side), mode="nearest-exact")[0]


def without_empty(lines):
    """Without the columns that have no image at all; where others have none, a grey cell."""
    kept = [c for c in range(len(lines[0])) if any(line[c][0] is not None for line in lines)]
    grey = torch.full_like(lines[0][kept[0]][0], 128)
    return [[(grey if line[c][0] is None else line[c][0], line[c][1]) for c in kept] for line in lines]


# One metric against another

def front(result, x, y, path, names=None):
    """PNG: each row's mean of one metric against another, with 95 % intervals. names: of the rows; None: their own."""
    for metric in (x, y):
        if metric not in result["lower_is_better"]:
            raise runs.UserError(f"{metric}: not among the metrics ({', '.join(result['lower_is_better'])})")
    rows = tables.means_of(result)
    names = names or list(rows)
    if len(names) != len(rows):
        raise runs.UserError(f"--names: {len(names)} names for {len(rows)} rows ({', '.join(rows)})")
    drawing, axis = style.figure(height=5.0)
    for name, cells in zip(names, rows.values()):
        if x in cells and y in cells:
            ends = [(cells[m]["low"], cells[m]["high"]) for m in (x, y)]
            style.interval(axis, cells[x]["mean"], cells[y]["mean"], *ends, label=name)
    style.legend(drawing, axis)

    def text(metric):
        better = "lower is better" if result["lower_is_better"][metric] else "higher is better"
        return f"{tables.shown(metric)}{', dB' * (metric == 'psnr')} ({better})"
    axis.set(xlabel=text(x), ylabel=text(y),
             title=f"Means of {result['images']} images with 95 % intervals")
    style.save(drawing, path)


def main(args):
    runs.check_output(args.out, "OUT.png")
    result = tables.read_result(args.result)
    if args.command == "grid":
        grid(result, args.out, args.images, args.crop, args.inset)
    else:
        front(result, args.x, args.y, args.out, args.names)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    runs.cli(lambda: main(ARGS))
