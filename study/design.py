"""Who sees which pair, and which image on which side: a balanced incomplete design over raters and pairs.

A pair is one photograph by two methods. Every pair is shown equally often, and no rater sees one twice. All "equally"
here are exact: numbers differ by at most one. Both questions, which rater and which side, are equitable colourings of
the edges of a bipartite graph, which always exist (de Werra, "Equitable colorations of graphs", 1971): with two
colours an Euler circuit has them, coloured alternately, and with more any two are rebalanced until all are equal.
"""
import itertools
import math
from collections import Counter

import runs


def halves(edges):
    """Splits the edges of a bipartite multigraph into two sets, in which all vertices have half of theirs, +- 1.

    edges: [(left vertex, right vertex)]; the two sides may share names. Returns 0 or 1 per edge. The sizes of the sets
    differ by at most one as well.
    """
    ends = [((0, a), (1, b)) for a, b in edges]
    # an extra vertex per side takes an edge of each odd vertex of the other side, so that all degrees are even
    odd = [vertex for vertex, degree in Counter(itertools.chain.from_iterable(ends)).items() if degree % 2]
    ends += [(vertex, (1, None)) if vertex[0] == 0 else ((0, None), vertex) for vertex in odd]
    if sum(pair[1] == (1, None) for pair in ends) % 2:
        ends.append(((0, None), (1, None)))
    left = {}
    for n, pair in enumerate(ends):
        for vertex in pair:
            left.setdefault(vertex, []).append(n)
    used, colour = [False] * len(ends), [0] * len(ends)
    for start in left:
        # Hierholzer's circuit from here, as the edges in the order in which it walks
        stack, circuit = [(start, None)], []
        while stack:
            vertex, came = stack[-1]
            while left[vertex] and used[left[vertex][-1]]:
                left[vertex].pop()
            if left[vertex]:
                n = left[vertex].pop()
                used[n] = True
                stack.append((ends[n][1] if ends[n][0] == vertex else ends[n][0], n))
            else:
                stack.pop()
                if came is not None:
                    circuit.append(came)
        # a circuit of a bipartite graph has an even number of edges
        for k, n in enumerate(circuit):
            colour[n] = k % 2
    return colour[:len(edges)]


def rebalance(one, two):
    """The pairs of two raters dealt anew: each has half of every combination of methods and of every photograph."""
    # what both have stays so
    shared = [item for item in one if item in two]
    free = [item for item in one + two if item not in shared]
    sides = halves(free)
    return [shared + [item for item, side in zip(free, sides) if side == k] for k in (0, 1)]


def is_balanced(one, two):
    for part in (0, 1):
        difference = Counter(item[part] for item in one)
        difference.subtract(item[part] for item in two)
        if any(abs(count) > 1 for count in difference.values()):
            return False
    return True


def diagonal(rows, columns):
    """All cells of a table in an order of which every beginning has all rows, and all columns, equally often."""
    turn = math.lcm(len(rows), len(columns))
    return [(rows[n % len(rows)], columns[(n + n // turn) % len(columns)]) for n in range(len(rows) * len(columns))]


def assign(methods, photos, raters, each, rng):
    """[per rater: [((i, j), photo), ...] in the order of showing], `each` per rater; methods i < j.

    Equally often, to +- 1: every pair; and for every rater, all photographs and all combinations of two methods. No
    rater has a pair twice. UserError where there are fewer pairs than a rater is to see. rng: random.Random
    """
    combinations, numbers = list(itertools.combinations(range(methods), 2)), list(range(photos))
    rng.shuffle(combinations)
    rng.shuffle(numbers)
    items = diagonal(combinations, numbers)
    if each > len(items):
        raise runs.UserError(f"--each {each}: there are only {len(items)} pairs ({photos} photographs, "
                             f"{len(combinations)} combinations of two methods): give at most that")
    rounds, rest = divmod(raters * each, len(items))
    copies = [(item, rounds + (n < rest)) for n, item in enumerate(items)]
    rng.shuffle(copies)
    hands = [[] for _ in range(raters)]
    for item, number in copies:
        for hand in sorted(hands, key=lambda hand: (len(hand), rng.random()))[:number]:
            hand.append(item)
    # every step lowers the sum of the squared numbers, so this ends
    while unbalanced := [(a, b) for a, b in itertools.combinations(range(raters), 2)
                         if not is_balanced(hands[a], hands[b])]:
        for a, b in unbalanced:
            hands[a], hands[b] = rebalance(hands[a], hands[b])
    return [apart(hand, rng) for hand in hands]


def apart(hand, rng):
    """The pairs in random order: of 50 orders one in which one photograph follows itself least often."""
    orders = [rng.sample(hand, len(hand)) for _ in range(50)]
    return min(orders, key=lambda order: sum(a[1] == b[1] for a, b in itertools.pairwise(order)))


def sides(hands, rng):
    """[per rater: [0 or 1, ...]]: 1 where method j of (i, j) stands on the left side.

    For every pair, and for every rater and combination of two methods, both sides come equally often, to +- 1.
    """
    edges = [((rater, item[0]), item) for rater, hand in enumerate(hands) for item in hand]
    first = rng.randrange(2)
    swapped = iter(side ^ first for side in halves(edges))
    return [[next(swapped) for _ in hand] for hand in hands]
