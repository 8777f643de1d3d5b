"""What every script's argparse shares: help with defaults, and numbers that are checked where they are given. Imports no torch."""
import argparse
import math


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The module's docstring as it stands, and every flag with its default."""


def number(kind, low=-math.inf, high=math.inf, above=False, below=False):
    """An argparse type: a finite `kind` (int or float) in [low, high]; above / below exclude low / high."""
    def convert(text):
        value = kind(text)
        if not math.isfinite(value) or value < low or above and value == low or value > high or below and value == high:
            bounds = [f"{'more than' if above else 'at least'} {low}"] * (low > -math.inf) + \
                     [f"{'less than' if below else 'at most'} {high}"] * (high < math.inf)
            raise argparse.ArgumentTypeError(f"{text}: must be {' and '.join(bounds) or 'finite'}")
        return value
    convert.__name__ = "whole number" if kind is int else "number"                # argparse says: invalid number value: 'x'
    return convert


def TILE(text):
    """An argparse type: side of an LR tile in pixels, 0 for the whole image."""
    value = COUNT(text)
    if 0 < value <= 64:
        raise argparse.ArgumentTypeError(f"{text}: must be 0 or more than 64: tiles overlap by 32")
    return value


TILE.__name__ = "whole number"
COUNT, SIZE = number(int, 0), number(int, 1)                                      # 0 often means off
WEIGHT, RATE = number(float, 0), number(float, 0, above=True)
SHARE = number(float, 0, 1, below=True)                                           # in [0, 1): EMA decay, drop rate
WITH_REFERENCE = ("psnr", "ssim", "vgg", "flat_hf")                               # evaluation metrics that compare with a reference
