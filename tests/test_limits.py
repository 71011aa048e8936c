"""A target and limits: exact choice against brute force, widths, loss, checks before a run, counted tables."""

import numpy as np
import pytest
from test_targeting import all_architectures, logp, random_state

from models.elasticity import fit_widths, latency_range
from models.latency import LatencyTable, Limit
from models.search_space import Head, Op, SearchSpace, Stage, Stem
from models.targeting import is_reachable, most_probable
from tools.errors import BadInput

TINY = SearchSpace(
    ops=(Op(3, 3, False), Op(5, 4, True)),
    stages=(
        Stage(depth=1, in_ch=3, out_ch=4, stride=2, act='relu'),
        Stage(depth=2, in_ch=4, out_ch=4, stride=1, act='swish'),
    ),
    stem=Stem(conv_ch=4, out_ch=3, kernel=3, stride=2, se_ch=2, act='relu'),
    head=Head(out_ch=8, act='swish'),
)
"""Fourteen architectures of up to three blocks, few enough to try all widths of all of them."""


def random_table(rng, kind):
    """A table of random rising curves: straight, bent up or down, noisy, or of few whole numbers (with ties)."""
    curves = {}
    for key, (_, high) in TINY.table_widths(32).items():
        steps = rng.uniform(0.2, 2) * np.linspace(0.1, 1, high) ** rng.choice([0, 2, -0.7])
        if kind == 'noisy':
            steps *= rng.exponential(1, high)
        curves[key] = np.cumsum(steps)
        if kind == 'whole':
            curves[key] = np.floor(curves[key] / 2)
    return LatencyTable(float(rng.integers(1, 4)), curves, {}, 32)


def brute_force(tables, divisor):
    """[tables, widths] totals of all widths of each architecture."""
    found = []
    for arch in all_architectures(TINY):
        picks = TINY.chosen(arch, 32)
        ranges = []
        for block, index in picks:
            op = TINY.ops[index]
            ranges.append(
                [w for w in range(op.min_width(block.in_ch), op.max_width(block.in_ch) + 1) if w % divisor == 0]
            )
        totals = []
        for table in tables:
            total = np.array([table.base])
            for (block, index), widths in zip(picks, ranges, strict=True):
                curve = table.curves[block.key(TINY.ops[index])]
                total = (total[:, None] + curve[np.array(widths) - 1]).ravel()
            totals.append(total)
        found.append((arch, np.stack(totals)))
    return found


def reach(totals, limits):
    """(least, most) of the first table within the limits; most is -inf if no widths keep them."""
    values = [[limit.value] for limit in limits]
    kept = (totals[1:] <= np.array(values) * (1 + 1e-9)).all(axis=0)
    return totals[0].min(), totals[0][kept].max() if kept.any() else -np.inf


def random_case(seed):
    """Tables, limits, target, divisor and probabilities; a third has ties in all of them."""
    rng = np.random.default_rng(seed)
    kind = ('noisy', 'smooth', 'whole')[seed % 3]
    count, divisor = int(rng.integers(1, 4)), int(rng.choice([1, 1, 2]))
    tables = [random_table(rng, kind) for _ in range(count + 1)]
    known = brute_force(tables, divisor)
    totals = np.concatenate([values for _, values in known], axis=1)
    if kind == 'whole':  # the values of a network, so that it is at the limits exactly
        at = rng.integers(totals.shape[1])
        values = totals[:, at] + rng.choice([0, 0, 1], count + 1)
    else:
        shares = rng.uniform(0.2, 0.8, count + 1)
        values = totals.min(axis=1) * (1 - shares) + totals.max(axis=1) * shares
    limits = [
        Limit(f'limit {i}', table, float(value))
        for i, (table, value) in enumerate(zip(tables[1:], values[1:], strict=True))
    ]
    state = random_state(TINY, seed)
    if kind == 'whole':
        state = {name: value.sign() for name, value in state.items()}
    return tables[0], limits, float(values[0]), divisor, state, known


def test_the_choice_under_limits_equals_brute_force_in_300_cases():
    feasible = infeasible = other = 0
    for seed in range(300):
        table, limits, target, divisor, state, known = random_case(seed)
        fitting = []
        for arch, totals in known:
            least, most = reach(totals, limits)
            if least <= target * (1 + 1e-9) and most >= target * (1 - 1e-9):
                fitting.append(logp(arch, state, TINY))
        assert is_reachable(table, TINY, target, divisor, limits) == bool(fitting), seed
        if not fitting:
            infeasible += 1
            with pytest.raises(BadInput, match='no architecture'):
                most_probable(state, table, TINY, target, divisor, limits)
            continue
        feasible += 1
        arch = most_probable(state, table, TINY, target, divisor, limits)
        assert logp(arch, state, TINY) == pytest.approx(max(fitting), abs=1e-9), seed
        (totals,) = [totals for one, totals in known if one == arch]
        least, most = reach(totals, limits)
        assert least <= target * (1 + 1e-9) and most >= target * (1 - 1e-9), seed
        other += latency_range(arch, table, TINY, divisor)[1] > most
        widths = fit_widths(arch, TINY.start_widths(), table, TINY, target, divisor, limits)
        reached = table.total(arch, widths, TINY)
        assert reached <= target * (1 + 1e-9), seed
        assert all(limit.holds(limit.table.total(arch, widths, TINY)) for limit in limits), seed
    assert feasible > 80 and infeasible > 60 and other > 40, (feasible, infeasible, other)
