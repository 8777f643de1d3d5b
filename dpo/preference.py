"""The mathematics of DP2O-SR (Wu et al., NeurIPS 2025): hybrid reward, preference pairs from seeds, their weights, the DPO loss, and estimates from M seeds.

A group is all outputs for one low-resolution image: G groups of M candidates, judged by K metrics. Candidates are sorted by reward; the best N win over the worst N.
Tags: PAPER (DP2O-SR), DPO (Diffusion-DPO, Wallace et al., 2023), INFERRED, CHOICE (ours). The paper's full text was not at hand when this was written: what it leaves open
is said in README. NumPy for scores, PyTorch for the loss.
"""
import numpy as np
import torch

import runs
import torch.nn.functional as F


# Reward

def fit_norm(raw, names, lower, percent=0.0):
    """{metric: {"low", "high", "lower_is_better"}} over all candidates of all groups (INFERRED: one pool, since inter-group weights compare groups).

    raw (G, M, K) in native units; lower: {metric: bool} in the order of `names`; percent > 0: percentiles instead of the extremes (CHOICE: 0).
    ValueError names a metric that is the same everywhere.
    """
    norm = {}
    for k, name in enumerate(names):
        values = -raw[..., k] if lower[name] else raw[..., k]
        low, high = np.percentile(values, [percent, 100 - percent]).tolist()
        if not high > low:
            raise runs.UserError(f"{name} is {-low if lower[name] else low:.4g} for every candidate{' between the percentiles' if percent else ''}: it tells nothing apart; "
                             "leave it out, or sample again with another generator")
        norm[name] = {"low": low, "high": high, "lower_is_better": bool(lower[name])}
    return norm


def normalise(raw, names, norm):
    """(..., K) in native units -> (..., K), 1 for the best of the pool that `norm` was fitted to and 0 for the worst; not clipped, so that later networks may pass both."""
    sign = np.array([-1.0 if norm[name]["lower_is_better"] else 1.0 for name in names])
    low, high = (np.array([norm[name][end] for name in names]) for end in ("low", "high"))
    return (sign * raw - low) / (high - low)


def normalise_groups(raw, names, lower):
    """As normalise, with extremes of every group of (G, M, K): what the paper may also mean. A metric without spread in a group is .5 there."""
    values = np.where([lower[name] for name in names], -raw, raw)
    low, high = values.min(1, keepdims=True), values.max(1, keepdims=True)
    return np.where(high > low, (values - low) / np.where(high > low, high - low, 1), 0.5)


def reward(normalised, full_reference, which="hybrid"):
    """R of (..., K) -> (...). PAPER: half the mean of the full-reference metrics and half that of the no-reference ones; "fr", "nr": one of them.

    full_reference (K,) bool. ValueError where a kind that is needed has no metric.
    """
    full = np.asarray(full_reference, bool)
    for kind, members in (("fr", full), ("nr", ~full)):
        if which in ("hybrid", kind) and not members.any():
            raise runs.UserError(f"--reward {which} needs a {'full' if kind == 'fr' else 'no'}-reference metric (--{kind})")
    means = [normalised[..., members].mean(-1) for kind, members in (("fr", full), ("nr", ~full)) if which in ("hybrid", kind)]
    return sum(means) / len(means)


# Curation

def choose(rewards, n):
    """rewards (G, M) -> indices of the N best, best first, and of the N worst, worst first: two (G, N). PAPER; ties go to the earlier seed. ValueError if M < 2 N."""
    if n < 1 or rewards.shape[1] < 2 * n:
        raise runs.UserError(f"--top {n}: {rewards.shape[1]} candidates per image are not twice as many; take --top {max(1, rewards.shape[1] // 2)} or less, or sample more")
    order = np.argsort(-rewards, axis=1, kind="stable")
    return order[:, :n], order[:, ::-1][:, :n]


def pair_weights(rewards, best, worst):
    """The two weights of hierarchical preference optimisation (PAPER): w_intra (G, N, N), winners x losers, and w_inter (G,). Each averages to 1.

    w_intra = |R_w - R_l| + 1 - its mean in the group; w_inter = sigma_g + 1 - its mean over groups, sigma_g being the population standard deviation of all M rewards (CHOICE).
    """
    gaps = np.abs(np.take_along_axis(rewards, best, 1)[:, :, None] - np.take_along_axis(rewards, worst, 1)[:, None, :])
    sigma = rewards.std(1)
    return gaps + 1 - gaps.mean((1, 2), keepdims=True), sigma + 1 - sigma.mean()


def combine(intra, inter, hpo="both", gain=1.0):
    """w = w_intra w_inter (PAPER), or one of them, or 1; gain: multiplies how far w is from 1, then nothing is below 0 (CHOICE: 1)."""
    weight = (intra if hpo in ("intra", "both") else 1.0) * (inter if hpo in ("inter", "both") else 1.0)
    return np.maximum(1 + gain * (weight - 1.0), 0.0)


# Loss

def error(prediction, target):
    """d: mean, not sum, over the elements of the squared error, (B,) in float32: beta has its usual meaning with the mean alone."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def dpo_loss(win, win_ref, lose, lose_ref, beta, weight=1.0):
    """-> loss of each pair, and what is inside the sigmoid, both (B,).

    win, lose: d of the network that is trained at winner and loser, with the same t and noise; *_ref: of the frozen reference (DPO). beta: a number or (B,).
    A positive inside: the network has come closer to the winner, relative to the reference, than to the loser. At the start all is equal and the loss is ln 2 x weight.
    """
    inside = -beta / 2 * ((win - win_ref) - (lose - lose_ref))
    return -weight * F.logsigmoid(inside), inside


# What to expect of the best, worst and mean of k seeds

def best_of(rewards, k):
    """Expected maximum of k of M seeds drawn without repetition, (..., M) -> (...): sum_i C(i - 1, k - 1) / C(M, k) R_(i), rewards in rising order. Unbiased, and uses all M."""
    m = rewards.shape[-1]
    if not 1 <= k <= m:
        raise ValueError(f"k = {k} of {m} seeds")
    chance = np.zeros(m)
    chance[m - 1] = k / m                                                         # C(M - 1, k - 1) / C(M, k)
    for i in range(m - 1, k - 1, -1):                                             # C(i - 1, k - 1) / C(i, k - 1) = (i - k + 1) / i
        chance[i - 1] = chance[i] * (i - k + 1) / i
    return np.sort(rewards, -1) @ chance


def worst_of(rewards, k):
    """Expected minimum of k seeds: see best_of."""
    return -best_of(-rewards, k)


def curves(rewards):
    """rewards (images, M) -> {"k": 1, 2, 4, ..., M, "best", "mean", "worst": (images, len(k))}"""
    m = rewards.shape[1]
    ks = sorted({2 ** i for i in range(m.bit_length()) if 2 ** i <= m} | {m})
    return {"k": ks, "best": np.stack([best_of(rewards, k) for k in ks], 1), "mean": np.stack([rewards.mean(1)] * len(ks), 1),
            "worst": np.stack([worst_of(rewards, k) for k in ks], 1)}


def implicit_accuracy(inside):
    """Share of pairs whose inside is positive."""
    return (torch.sign(inside) + 1).mean() / 2                                    # at the start, all zero, a half
