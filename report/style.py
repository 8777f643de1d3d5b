"""One look for all plots: labels readable at GitHub's width, 150 dpi, the same colours, intervals and seeds.

    drawing, axes = style.figure(columns=2, height=3.5)
    style.interval(axes[0], x, y, y_ends=(low, high), label="amo")
    style.seeds(axes[1], steps, curves, label="amo")             curves: (seeds, steps)
    style.band(axes[1], steps, means, (low, high), label="amo")
    style.legend(drawing, axes[1], columns=2)                    below all axes, over none
    style.save(drawing, path)
"""
import numpy as np

import runs

# a picture of 1050 pixels, of which GitHub shows about 830: 11 points are 18 pixels there
WIDTH, DPI, FONT = 7.0, 150, 11
# Okabe and Ito's colours, distinct for colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")
# points of different rows differ in shape as well
MARKERS = "osD^vP*X"


def is_there():
    """Is matplotlib there? A machine of make gpu may lack it: then numbers are all it leaves."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def figure(rows=1, columns=1, height=4.0, width=WIDTH, **options):
    """-> (figure, axes) of pyplot.subplots. height, width: inches; options: further ones of pyplot.subplots."""
    import matplotlib
    matplotlib.use("Agg")
    from cycler import cycler
    from matplotlib import pyplot
    pyplot.rcParams.update({
        "font.size": FONT, "axes.titlesize": FONT, "axes.labelsize": FONT, "xtick.labelsize": FONT - 1,
        "ytick.labelsize": FONT - 1, "legend.fontsize": FONT - 1, "legend.frameon": False, "lines.linewidth": 1.8,
        "axes.grid": True, "grid.color": "#dddddd", "axes.axisbelow": True, "axes.spines.top": False,
        "axes.spines.right": False, "axes.prop_cycle": cycler(color=COLOURS)})
    return pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)


def interval(axis, x, y, x_ends=None, y_ends=None, label=None, colour=None):
    """A point, or points (n,), with the ends (low, high) of the intervals. Every call has a marker of its own."""
    def lengths(value, ends):
        return None if ends is None else np.maximum(0, [np.atleast_1d(value - ends[0]), np.atleast_1d(ends[1] - value)])
    marker = MARKERS[len(axis.containers) % len(MARKERS)]
    axis.errorbar(x, y, lengths(y, y_ends), lengths(x, x_ends), fmt=marker, markersize=6, elinewidth=1.2, capsize=3,
                  label=label, color=colour)


def seeds(axis, x, curves, label=None, colour=None, linestyle="-", marker=None):
    """One thin line per seed and a thick one for their mean. x: (n,); curves: (seeds, n)"""
    curves = np.atleast_2d(np.asarray(curves, dtype=float))
    line, = axis.plot(x, curves.mean(0), linestyle, label=label, color=colour, marker=marker)
    if len(curves) > 1:
        axis.plot(x, curves.T, linestyle, color=line.get_color(), linewidth=0.7, alpha=0.5)


def band(axis, x, y, ends, label=None, colour=None):
    """A line with the ends (low, high) of its intervals as a band. x, y, low, high: (n,)"""
    line, = axis.plot(x, y, label=label, color=colour)
    axis.fill_between(x, *ends, color=line.get_color(), alpha=0.2, linewidth=0)


def legend(drawing, axis, columns=2, title=None):
    """The labels of one axis, below all axes of the figure."""
    handles, labels = axis.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), title=title,
                   title_fontsize=FONT - 1)


def save(drawing, path):
    """Write the figure as PNG, whole or not at all, and close it."""
    from matplotlib import pyplot
    runs.write_atomic(path, lambda temporary: drawing.savefig(temporary, format="png", dpi=DPI))
    pyplot.close(drawing)
