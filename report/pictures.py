"""Pictures of a table: crops side by side as the paper's Fig. 2, 4 and 6, whole images, and one metric against another. Knows nothing of networks.

An image's cells are {"LR", "GT", "GT 2", ..., then the rows: (3, H, W) in [0, 1]}.
"""
import re

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import runs
from images import image_size
from report import tables

CROP = re.compile(r"(.+):(\d+),(\d+),(\d+)")                                      # STEM:X,Y,SIDE
CELL = 256                                                                        # pixels; larger crops make larger cells


def save_grid(path, rows):
    """PNG of rows of (image (3, H, W), caption): each caption, of one line or more, stands in a strip above its image."""
    strip, gap = 4 + 12 * max(1 + text.count("\n") for row in rows for _, text in row), 4
    cells = [[(im if im.dtype == torch.uint8 else im.clamp(0, 1).mul(255).round().byte(), text) for im, text in row] for row in rows]
    widths = [max(row[c][0].shape[2] for row in cells if c < len(row)) for c in range(max(map(len, cells)))]
    heights = [max(im.shape[1] for im, _ in row) + strip for row in cells]
    sheet = Image.new("RGB", (sum(widths) + gap * (len(widths) - 1), sum(heights) + gap * (len(heights) - 1)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(cells):
        for c, (image, text) in enumerate(row):
            x, y = sum(widths[:c]) + gap * c, sum(heights[:r]) + gap * r
            draw.multiline_text((x + 2, y + 1), text, fill="black", spacing=1)
            sheet.paste(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), (x, y + strip))
    runs.write_atomic(path, lambda temporary: sheet.save(temporary, format="PNG"))


def flattest(image, side):
    """Top and left of the flattest square of `side` pixels, on a grid of a quarter of it: where grids show first. image (1, 3, H, W)"""
    grey = image.mean(1, keepdim=True)
    spread = F.avg_pool2d(grey ** 2, side, side // 4) - F.avg_pool2d(grey, side, side // 4) ** 2
    row, column = divmod(spread.argmin().item(), spread.shape[3])
    return row * (side // 4), column * (side // 4)


def enlarged_crop(image, top, left, side, times):
    """A square of image (1, 3, H, W), every pixel shown as times x times. -> (3, side * times, side * times)"""
    return image[0, :, top:top + side, left:left + side].repeat_interleave(times, 1).repeat_interleave(times, 2)


def find_crops(words, items):
    """[(word of --crop, stem, (y, x, side))]; ValueError where it lies outside the image. items: as evaluate.find_items gives them."""
    crops = []
    for word in words:
        stem, x, y, side = CROP.fullmatch(word).groups()
        if stem not in items:
            raise runs.UserError(f"--crop {word}: no image is called {stem}")
        x, y, side, (width, height) = int(x), int(y), int(side), hr_size(items[stem])
        if y + side > height or x + side > width or not side:
            raise runs.UserError(f"--crop {word}: the image has {width}x{height} pixels")
        crops.append((word, stem, (y, x, side)))
    return crops


def hr_size(item):
    """(width, height) of a x4 output, from the header of the LR image, or of the original that it is made from."""
    return tuple(4 * n for n in image_size(item["lq"])) if item["lq"] else tuple(n // 4 * 4 for n in image_size(item["versions"][0]))


@torch.no_grad()
def ground_truth(cells, metric, device):
    """-> (image, score): of the references the one with the best score of a no-reference metric; for another metric the first, without score; (None, None) without any."""
    references = [image for name, image in cells.items() if re.fullmatch(r"GT( \d+)?", name)]
    if not references or metric.full_reference:
        return (references or [None])[0], None
    scores = [metric(image[None].to(device), None).item() for image in references]
    best = (min if metric.lower_is_better else max)(scores)
    return references[scores.index(best)], best


def figure(path, crops, stems, rows, cells_of, scores, means, inset, metric, device):
    """PNG: LR | GT | every row of each crop, all cells of one size; without crops the whole images of `stems`: every row | GT.

    cells_of: stem -> cells. Above each cell its name and its score by the metric `inset`, over the whole image; metric: quality.Metric. GT is one of the references, see
    ground_truth; the others are on the page. An image without reference has a grey cell in its place.
    """
    decimals = tables.digits([cells[inset]["mean"] for cells in means.values() if inset in cells])
    size, lines = max([CELL, *(side for _, _, (_, _, side) in crops)]), []
    for stem, box in [(stem, box) for _, stem, box in crops] or [(stem, None) for stem in stems]:
        cells = cells_of(stem)
        image, score = ground_truth(cells, metric, device)
        values = {row: scores[row][stem][inset] for row in rows} | {"GT": score}
        tell = lambda name: name + "\n" + (f"{tables.SHOWN.get(inset, inset)} {values[name]:.{decimals}f}" if values.get(name) is not None else "")
        if box:
            lr = cells["LR"].repeat_interleave(4, 1).repeat_interleave(4, 2)
            shown = {"LR": lr, "GT": image} | {row: cells[row] for row in rows}
            lines.append([(enlarged(shown[name], box, size), tell(name)) for name in shown])
        else:
            lines.append([*((cells[row], tell(row)) for row in rows), *([] if image is None or "reference" in rows else [(image, tell("GT"))])])
    save_grid(path, without_empty(lines))


def enlarged(image, box, size):
    """The square (y, x, side) of an image (3, H, W), its pixels repeated to `size`; None for no image."""
    if image is None:
        return None
    y, x, side = box
    return F.interpolate(image[None, :, y:y + side, x:x + side], size=(size, size), mode="nearest-exact")[0]


def without_empty(lines):
    """Columns that have no image at all left out, others' missing cells grey."""
    if not all(len(line) == len(lines[0]) for line in lines):
        return lines
    kept = [c for c in range(len(lines[0])) if any(line[c][0] is not None for line in lines)]
    like = lines[0][kept[0]][0]
    return [[(torch.full_like(like, 0.5) if line[c][0] is None else line[c][0], line[c][1]) for c in kept] for line in lines]


def front(path, means, x, y, lower):
    """PNG: each row's mean of one metric against another, with 95 % intervals."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    drawing, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for row, cells in means.items():
        if x in cells and y in cells:
            error = lambda m: [[cells[m]["mean"] - cells[m]["low"]], [cells[m]["high"] - cells[m]["mean"]]]
            axis.errorbar(cells[x]["mean"], cells[y]["mean"], error(y), error(x), fmt="o", elinewidth=0.7, label=row)
    drawing.legend(loc="outside right center")
    axis.set(xlabel=tables.heading(x, lower[x]), ylabel=tables.heading(y, lower[y]), title="means with 95 % intervals over images")
    runs.write_atomic(path, lambda temporary: drawing.savefig(temporary, format="png", dpi=120))
    plt.close(drawing)
