"""A target and limits: exact choice against brute force, widths, loss, checks before a run, counted tables."""

import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_targeting import all_architectures, logp, random_state

from conftest import make_table, random_arch
from models.config import build_config
from models.describe import count_mult_adds, count_params
from models.elasticity import fit_widths, latency_range, scale_widths
from models.latency import LatencyLoss, LatencyTable, Limit, expected_latency, save_table
from models.limits import check_reachable, counted_table, limit_names, read_limits
from models.model_eval import NetworkEval
from models.search_space import SPACE, Head, Op, SearchSpace, Stage, Stem
from models.targeting import _Program, is_reachable, most_probable, target_range
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
        if seed % 5 == 0:
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


def test_bounds_that_rule_others_out_keep_the_one_architecture_that_reaches_the_target(monkeypatch):
    """The target is the most that any reaches, so a bound (by Lagrange) that is a little low rules out the last too."""
    cuts, cut = [], _Program._cut
    monkeypatch.setattr(_Program, '_cut', lambda self, multipliers: cuts.append(multipliers) or cut(self, multipliers))
    tried = 0
    for seed in range(90):
        table, limits, _, divisor, state, known = random_case(seed)
        reaches = [(*reach(totals, limits), arch) for arch, totals in known]
        target = max((most for least, most, _ in reaches if least <= most), default=-np.inf)
        if target == -np.inf:
            continue
        before = len(cuts)
        fitting = [logp(arch, state, TINY) for least, most, arch in reaches if least <= target <= most * (1 + 1e-9)]
        arch = most_probable(state, table, TINY, target, divisor, limits)
        assert logp(arch, state, TINY) == pytest.approx(max(fitting), abs=1e-9), seed
        tried += len(cuts) > before
    assert tried > 7, tried


@pytest.mark.parametrize('seed', [0, 3, 4, 6, 10, 12, 16, 22, 24, 27, 30, 38])  # a bound too low misses in 3, 27, 38
def test_the_range_of_targets_equals_brute_force(seed):
    table, limits, target, divisor, _, known = random_case(seed)
    reaches = [reach(totals, limits) for _, totals in known]
    possible = [(low, high) for low, high in reaches if low <= high]
    least, most = target_range(table, TINY, divisor, limits)
    if not possible:
        assert least is None and most is None
        return
    assert least == pytest.approx(min(low for low, _ in possible))
    true = max(high for _, high in possible)
    assert true * 0.998 <= most <= true * (1 + 1e-9) and is_reachable(table, TINY, most, divisor, limits)
    if not any(low <= target <= high for low, high in possible):
        above, below = target_range(table, TINY, divisor, limits, target, target)
        lows, highs = [low for low, _ in possible if low > target], [high for _, high in possible if high < target]
        assert above == (pytest.approx(min(lows)) if lows else None)
        assert below == (pytest.approx(max(highs), rel=0.002) if highs else None)


def test_a_target_that_limits_forbid_names_the_nearest_and_what_to_raise():
    refused = raised = 0
    for seed in range(16):
        table, limits, target, divisor, _, _ = random_case(seed)
        lines = []
        try:
            check_reachable(table, TINY, [target], divisor, limits, lines.append)
            assert re.search(r'networks reach targets from [\d.]+ to [\d.]+ ms', lines[0])
            continue
        except BadInput as e:
            message = str(e)
        if 'no network keeps all' in message:
            assert target_range(table, TINY, divisor, limits) == (None, None)
            continue
        refused += 1
        near = re.search(r'nearest targets that can be met: ([\d.]+)(?: and ([\d.]+))?', message)
        for text in filter(None, near.groups()):
            assert is_reachable(table, TINY, float(text), divisor, limits), message
        for name, value in re.findall(r'(limit \d)=([\d.]+)', message):
            changed = [replace(one, value=float(value)) if one.name == name else one for one in limits]
            assert is_reachable(table, TINY, target, divisor, changed), message
            (old,) = [one.value for one in limits if one.name == name]
            less = [replace(one, value=float(value) * 0.997) if one.name == name else one for one in limits]
            assert float(value) > old and not is_reachable(table, TINY, target, divisor, less), message
            raised += 1
    assert refused > 1 and raised > 1


def test_without_limits_widths_and_loss_are_those_of_the_paper_bit_for_bit(small_space):
    table, rng = make_table(SPACE, 64, base=0.3), random.Random(3)
    loose = [Limit('loose', make_table(SPACE, 64, seed=1), 1e6)]
    _, shallow, most = table.reach(SPACE)
    for _ in range(20):
        arch, widths = random_arch(SPACE, rng)
        target = rng.uniform(shallow, most)
        plain = scale_widths(arch, widths, table, SPACE, target)
        assert plain == scale_widths(arch, widths, table, SPACE, target, 1, loose)
    weights = torch.rand(5, 3).softmax(1)
    sinks = [torch.rand(len(stage.exit_depths)).softmax(0) for stage in small_space.stages]
    first, second = make_table(small_space, 32), make_table(small_space, 32, seed=4, base=0.7)
    widths = small_space.start_widths()
    loss = LatencyLoss(first, widths, small_space, 2.0, 0.1, torch.device('cpu'))
    alone = [
        LatencyLoss(one, widths, small_space, 2.0, 0.1, torch.device('cpu'))(weights, sinks) for one in (first, second)
    ]
    assert loss.matrix.shape == (5, 3) and alone[0][1].shape == ()
    expected = 0.1 * (alone[0][1] / 2.0 - 1).abs()
    assert torch.equal(alone[0][0], expected)
    both = [latency.item() for _, latency in alone]
    for value in (0.5 * both[1], 2 * both[1]):  # broken, kept
        limits = [Limit('other', second, value)]
        total, latencies = LatencyLoss(first, widths, small_space, 2.0, 0.1, torch.device('cpu'), limits)(
            weights, sinks
        )
        assert latencies.tolist() == pytest.approx(both, rel=1e-6)
        excess = max(0.0, both[1] / value - 1)
        assert total.item() == pytest.approx(0.1 * (abs(both[0] / 2 - 1) + excess), rel=1e-5)


def test_the_latency_of_one_table_is_summed_in_the_order_of_the_formula():
    """Bit for bit, with its gradients: searches without limits must not depend on how those with limits are summed."""
    table = make_table(SPACE, 64, base=0.3)
    matrix, found = table.matrix(SPACE.start_widths(), SPACE), []
    for _ in range(100):
        alphas = torch.randn(matrix.shape, requires_grad=True)
        betas = [torch.randn(len(stage.exit_depths), requires_grad=True) for stage in SPACE.stages]

        def by_hand(op_weights, depth_weights):
            total, blocks = torch.tensor(0.3), (op_weights * matrix).sum(1).split([s.depth for s in SPACE.stages])
            for of_stage, stage, weights in zip(blocks, SPACE.stages, depth_weights, strict=True):
                total = total + weights @ torch.cat([torch.zeros(1), of_stage.cumsum(0)])[stage.exit_depths.start :]
            return total

        def ours(op_weights, depth_weights):
            return expected_latency(0.3, matrix, op_weights, depth_weights, SPACE)

        for latency_of in (by_hand, ours):
            latency = latency_of(alphas.softmax(1), [b.softmax(0) for b in betas])
            grads = torch.autograd.grad((latency / 2 - 1).abs(), [alphas, *betas])
            found.append(torch.cat([latency.detach()[None], *(grad.flatten() for grad in grads)]))
    assert all(torch.equal(a, b) for a, b in zip(found[::2], found[1::2], strict=True))


def test_a_broken_limit_pulls_at_the_architecture_and_a_kept_one_does_not(small_space):
    first, second = make_table(small_space, 32), make_table(small_space, 32, seed=4)
    widths, found = small_space.start_widths(), []
    for value in (0.01, 1e6):
        alphas = torch.zeros(5, 3, requires_grad=True)
        betas = [torch.zeros(len(stage.exit_depths), requires_grad=True) for stage in small_space.stages]
        limits = [Limit('other', second, value)]
        loss = LatencyLoss(first, widths, small_space, 2.0, 0.1, torch.device('cpu'), limits)
        alone = LatencyLoss(first, widths, small_space, 2.0, 0.1, torch.device('cpu'))
        for one in (loss, alone):
            one(alphas.softmax(1), [b.softmax(0) for b in betas])[0].backward()
            found.append(alphas.grad.clone())
            alphas.grad = None
    assert torch.allclose(found[2], found[3]) and not torch.allclose(found[0], found[1], rtol=0.5)
    dear = second.matrix(widths, small_space).argmax(dim=1)
    assert (found[0].gather(1, dear[:, None]) > 0).all()


@pytest.mark.parametrize('divisor', [1, 8])
def test_widths_meet_the_target_within_limits_that_stop_proportional_steps(divisor):
    """MACs against parameters: early stages must take what late stages may not."""
    macs, params = (counted_table(what, 64, 10, SPACE) for what in ('macs', 'params'))
    state, met, short = random_state(SPACE, 2, 0.5), 0, 0
    least, _, most = macs.reach(SPACE)
    for share in (0.3, 0.5):
        target = least + share * (most - least)
        plain = most_probable(state, macs, SPACE, target, divisor)
        free = params.total(plain, fit_widths(plain, SPACE.start_widths(), macs, SPACE, target, divisor), SPACE)
        limits = [Limit('params', params, 0.8 * free)]
        arch = most_probable(state, macs, SPACE, target, divisor, limits)
        start = SPACE.start_widths()
        scaled, fitted = (f(arch, start, macs, SPACE, target, divisor, limits) for f in (scale_widths, fit_widths))
        for widths in (scaled, fitted):
            assert macs.total(arch, widths, SPACE) <= target * (1 + 1e-9)
            assert limits[0].holds(params.total(arch, widths, SPACE))
        chosen = [widths[b.stage][b.name][i] for widths in (fitted,) for b, i in SPACE.chosen(arch)]
        assert all(width % divisor == 0 for width in chosen)
        short += macs.total(arch, scaled, SPACE) < 0.99 * target
        met += macs.total(arch, fitted, SPACE) > (1 - 2e-3) * target
    assert met == 2 and short > 0


@pytest.mark.parametrize('what', ['macs', 'params'])
def test_counted_tables_count_as_torch_does(small_space, what):
    table, rng = counted_table(what, 32, 7, small_space), random.Random(0)
    for _ in range(5):
        arch, widths = random_arch(small_space, rng)
        net = NetworkEval(build_config(arch, widths, 7, small_space))
        counted = count_mult_adds(net, 32) if what == 'macs' else count_params(net)
        assert table.total(arch, widths, small_space) == pytest.approx(counted, rel=1e-9)
    assert table.unit == ('M MACs' if what == 'macs' else 'M parameters')


@pytest.mark.parametrize(
    ('texts', 'message'),
    [
        (['params'], 'should be TABLE=VALUE'),
        (['=3'], 'should be TABLE=VALUE'),
        (['params=x'], 'should be a number of at least'),
        (['params=-1'], 'networks have from 0.00'),
        (['macs=inf'], 'or a share such as 40%'),
        (['params=50%', 'params=5'], 'is there twice'),
        (['nowhere.pkl=5'], 'nowhere.pkl: no latency table there'),
    ],
)
def test_limits_that_cannot_be_are_refused(small_space, texts, message):
    with pytest.raises(BadInput, match=message):
        read_limits(texts, 32, 3, small_space)


def test_limits_are_read_by_table_and_value(small_space, tmp_path):
    table = make_table(small_space, 32)
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
        save_table(table.base, table.curves, {'unit': 'ms'}, tmp_path / folder / 'phone.pkl')
    texts = ['params=40%', f'{tmp_path}/a/phone.pkl=3', f'{tmp_path}/b/phone.pkl=100%']
    limits = read_limits(texts, 32, 3, small_space)
    least, _, most = counted_table('params', 32, 3, small_space).reach(small_space)
    assert limits[0].value == pytest.approx(least + 0.4 * (most - least)) and limits[1].value == 3
    assert limits[2].value == pytest.approx(table.reach(small_space)[2])
    assert [limit.name for limit in limits] == ['params', f'{tmp_path}/a/phone.pkl', f'{tmp_path}/b/phone.pkl']
    assert limit_names([f'{tmp_path}/a/phone.pkl=3']) == ['phone']
