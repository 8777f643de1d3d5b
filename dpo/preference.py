"""The mathematics of DP2O-SR (Wu et al., NeurIPS 2025): reward, pairs, weights of pairs, loss, estimates from M seeds.

A group is all outputs for one low-resolution image: G groups of M candidates, judged by K metrics. Candidates are
sorted by reward; the best N win over the worst N.
Tags: PAPER (DP2O-SR), DPO (Diffusion-DPO, Wallace et al., 2023), INFERRED, CHOICE (ours). The paper's full text was not
at hand when this
was written: README.md of this folder lists what it leaves open. NumPy for scores, PyTorch for the loss.
"""
import numpy as np
import torch
import torch.nn.functional as F

import runs

# the reward: half full-, half no-reference, or one of them
REWARDS = ("hybrid", "fr", "nr")
# the weights of pairs
HPO = ("none", "intra", "inter", "both")


# Reward

def fit_norm(raw, names, lower):
    """{metric: {"low", "high", "lower_is_better"}} over all candidates of all groups.

    INFERRED: one scale for all groups, since inter-group weights compare groups.
    raw: (G, M, K) in native units; lower: {metric: bool}; names: the metrics in the order of K.
    UserError names a metric that is the same everywhere.
    """
    norm = {}
    for k, name in enumerate(names):
        values = -raw[..., k] if lower[name] else raw[..., k]
        low, high = float(values.min()), float(values.max())
        if not high > low:
            raise runs.UserError(f"{name} is {-low if lower[name] else low:.4g} for every candidate: it tells nothing "
                                 "apart; leave it out, or sample again with another generator")
        norm[name] = {"low": low, "high": high, "lower_is_better": bool(lower[name])}
    return norm


def normalise(raw, names, norm):
    """(..., K) in native units -> (..., K), 1 for the best candidate that `norm` was fitted to and 0 for the worst.

    Not clipped, so that later networks may pass both.
    """
    sign = np.array([-1.0 if norm[name]["lower_is_better"] else 1.0 for name in names])
    low, high = (np.array([norm[name][end] for name in names]) for end in ("low", "high"))
    return (sign * raw - low) / (high - low)


def normalise_groups(raw, names, lower):
    """As normalise, on the extremes of every group of (G, M, K): the paper may also mean this.

    A metric without spread in a group is 0.5 there.
    """
    values = np.where([lower[name] for name in names], -raw, raw)
    low, high = values.min(1, keepdims=True), values.max(1, keepdims=True)
    return np.where(high > low, (values - low) / np.where(high > low, high - low, 1), 0.5)


def typical_range(raw, names, lower):
    """{metric: {"low", "high"}}: as wide as the metric's range in a group is on average, around its mean, (G, M, K).

    On this scale networks are compared whose pairs came from normalise_groups: it gives both halves their say, too, and
    no image counts more because its seeds hardly differ. As wide as over all groups where no group has spread.
    """
    values = np.where([lower[name] for name in names], -raw, raw)
    width = np.ptp(values, 1).mean(0)
    width = np.where(width > 0, width, np.ptp(values, (0, 1)))
    return {name: {"low": float(centre - w / 2), "high": float(centre + w / 2)}
            for name, centre, w in zip(names, values.mean((0, 1)), width)}


def reward(normalised, full_reference, which="hybrid"):
    """R of (..., K) -> (...). which: one of REWARDS.

    PAPER: half the mean of the full-reference metrics and half that of the no-reference ones. full_reference: (K,)
    bool. UserError where a kind that is needed has no metric.
    """
    full = np.asarray(full_reference, bool)
    means = []
    for kind, members in (("fr", full), ("nr", ~full)):
        if which in ("hybrid", kind):
            if not members.any():
                reference = {"fr": "full-reference", "nr": "no-reference"}[kind]
                raise runs.UserError(f"--reward {which} needs a {reference} metric (--{kind})")
            means.append(normalised[..., members].mean(-1))
    return sum(means) / len(means)


def halves(normalised, full_reference):
    """{"fr", "nr"}: correlation of each half of the hybrid reward with the whole, of (G, M, K), within groups.

    1 and 0: one half decides alone. Two halves of equal spread that have nothing to do with each other: 0.71 each.
    NaN for a half without spread.
    """
    def within(which):
        r = reward(normalised, full_reference, which)
        return (r - r.mean(1, keepdims=True)).ravel()
    with np.errstate(invalid="ignore", divide="ignore"):
        return {kind: float(np.corrcoef(within(kind), within("hybrid"))[0, 1]) for kind in ("fr", "nr")}


# Curation

def choose(rewards, n):
    """rewards (G, M) -> seeds of the N best, best first, and of the N worst, worst first: two (G, N). PAPER.

    Ties go to the earlier seed. UserError if M < 2 N.
    """
    if n < 1 or rewards.shape[1] < 2 * n:
        raise runs.UserError(f"--top {n}: {rewards.shape[1]} candidates per image are not twice as many; "
                             f"take --top {max(1, rewards.shape[1] // 2)} or less, or sample more")
    order = np.argsort(-rewards, axis=1, kind="stable")
    return order[:, :n], order[:, ::-1][:, :n]


def pair_weights(rewards, best, worst, gain=1.0):
    """Weights of hierarchical preference optimisation (PAPER): w_intra (G, N, N), winners x losers, and w_inter (G,).

    w_intra = |R_w - R_l| + 1 - its mean in the group; w_inter = sigma_g + 1 - its mean over groups. Each averages to 1.
    sigma_g: the population standard deviation of all M rewards (CHOICE). gain multiplies what they differ from 1 by
    (PAPER: 1): rewards on another scale than the paper's make the weights flatter, or steeper.
    """
    winners, losers = np.take_along_axis(rewards, best, 1), np.take_along_axis(rewards, worst, 1)
    gaps = np.abs(winners[:, :, None] - losers[:, None, :])
    sigma = rewards.std(1)
    return 1 + gain * (gaps - gaps.mean((1, 2), keepdims=True)), 1 + gain * (sigma - sigma.mean())


def combine(intra, inter, hpo="both"):
    """w = w_intra w_inter (PAPER), or one of them, or 1; never below 0. hpo: one of HPO."""
    weight = (intra if hpo in ("intra", "both") else 1.0) * (inter if hpo in ("inter", "both") else 1.0)
    return np.maximum(weight, 0.0)


# Loss

def equal_grids(win, lose, period=4):
    """(b, C, H, W) winners and losers -> the same without what their blocks of period x period pixels differ by alike.

    CHOICE (ours): a network that ends in a pixel shuffle can add the same small pattern to all blocks of all images,
    and tuning left grids of 0.3 to 0.6 grey levels where winners had 0.01 more of them than losers; without that 0.01
    it left another one (docs/results-dpo.md). Half of the mean block of win - lose, but for its mean colour, goes from
    the one to the other. H and W are multiples of period.
    """
    difference = (win - lose).unflatten(3, (-1, period)).unflatten(2, (-1, period)).mean((2, 4))
    difference = difference - difference.mean((2, 3), keepdim=True)
    half = difference.repeat(1, 1, *(n // period for n in win.shape[2:])) / 2
    return win - half, lose + half


def error(prediction, target):
    """d: squared error, mean over the elements, (B,) in float32. With a sum beta would not have its usual meaning."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def dpo_loss(win, win_ref, lose, lose_ref, beta, weight=1.0):
    """-> loss of each pair, and the logit, the argument of its sigmoid, both (B,).

    win, lose: d of the trained network at winner and loser, with the same t and noise; *_ref: of the frozen reference
    (DPO).
    A positive logit: relative to the reference, the network has come closer to the winner than to the loser. At the
    start all are equal and the loss is ln 2 x weight.
    """
    logit = -beta / 2 * ((win - win_ref) - (lose - lose_ref))
    return -weight * F.logsigmoid(logit), logit


# Estimates of the best, worst and mean of k seeds

def best_of(rewards, k):
    """Expected maximum of k of M seeds drawn without repetition, (..., M) -> (...). Unbiased, and uses all M.

    sum_i C(i - 1, k - 1) / C(M, k) R_(i), rewards in rising order.
    """
    m = rewards.shape[-1]
    if not 1 <= k <= m:
        raise ValueError(f"k = {k} of {m} seeds")
    chance = np.zeros(m)
    # C(M - 1, k - 1) / C(M, k)
    chance[m - 1] = k / m
    for i in range(m - 1, k - 1, -1):
        # C(i - 1, k - 1) / C(i, k - 1) = (i - k + 1) / i
        chance[i - 1] = chance[i] * (i - k + 1) / i
    return np.sort(rewards, -1) @ chance


def worst_of(rewards, k):
    """Expected minimum of k seeds: see best_of."""
    return -best_of(-rewards, k)


def curves(rewards):
    """rewards (images, M) -> {"k": 1, 2, 4, ..., M, "best", "mean", "worst": (images, len(k))}"""
    m = rewards.shape[1]
    ks = sorted({2 ** i for i in range(m.bit_length()) if 2 ** i <= m} | {m})
    return {"k": ks, "best": np.stack([best_of(rewards, k) for k in ks], 1),
            "mean": np.stack([rewards.mean(1)] * len(ks), 1),
            "worst": np.stack([worst_of(rewards, k) for k in ks], 1)}


def implicit_accuracy(logit):
    """Share of pairs whose logit is positive; a half at the start, where all are zero."""
    return (torch.sign(logit) + 1).mean() / 2
