"""Checks of a copy of the project with no_depth.patch applied: pytest experiments/no_depth_checks.py

The module needs the patch, so its name keeps it out of the project's tests, one of which runs it in such a copy.
"""

import itertools
import random

import numpy as np
import pytest
import torch

from latency_pkl.sampling import random_network
from models.config import build_config
from models.describe import describe_space
from models.elasticity import fit_widths, full_weights, gather, latency_range, scatter, start_masks, update_masks
from models.latency import Limit, expected_latency
from models.model_eval import NetworkEval
from models.model_search import ExecutionMode, Network
from models.parsing import mask_widths
from models.search_space import SPACE
from models.targeting import can_meet, log_probability, most_probable
from tests.conftest import NUM_CLASSES, SMALL_SPACE, make_table

CHOICES = [3, 4, 4, 3, 4]
"""Entries of each block of the small space: skip is the fourth, and the first and fourth block lack it."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def net():
    net = Network(SMALL_SPACE.start_widths(), NUM_CLASSES, SMALL_SPACE).train()
    with torch.no_grad():
        for p in net.arch_parameters():
            p.copy_(torch.randn_like(p))
    return net


def test_blocks_with_a_residual_connection_have_one_more_entry_and_stages_one_exit():
    assert [SMALL_SPACE.choices(block) for block in SMALL_SPACE.blocks()] == CHOICES
    assert all(list(stage.exit_depths) == [stage.depth] for stage in (*SMALL_SPACE.stages, *SPACE.stages))
    full = full_weights(NUM_CLASSES, torch.device('cpu'), SMALL_SPACE)
    for block, choices in zip(SMALL_SPACE.blocks(), CHOICES, strict=True):
        assert full[f'{block.stage}.{block.name}.log_alphas'].tolist() == pytest.approx([-np.log(choices)] * choices)
        assert f'{block.stage}.{block.name}.m_ops.3.point_linear.conv.weight' not in full
    shown = describe_space(32, SMALL_SPACE)
    assert shown['ops'][-1]['label'] == 'skip' and [len(block['widths']) for block in shown['blocks']] == CHOICES


def test_skipped_blocks_leave_their_input_alone(net):
    x = torch.randn(4, 3, 32, 32)
    inside = net.second_stem(net.first_stem(x))
    for name, op in (('stage1', 2), ('stage3', 1)):
        inside = getattr(net, name).block1.m_ops[op](inside)
    expected = net.classifier(net.feature_mix_layer(inside).mean((2, 3)))
    assert torch.allclose(net(x, [2, 3, 3, 1, 3]), expected, atol=1e-6)


@pytest.mark.parametrize('fused', [False, True])
def test_skip_takes_its_share_of_the_mixture(fused):
    """A block's output is the weighted sum of its operators' outputs; that of skip is the input."""
    net = Network(SMALL_SPACE.start_widths(), NUM_CLASSES, SMALL_SPACE, ExecutionMode(fused=fused)).train()
    block, x = net.stage2.block1, torch.randn(2, 6, 8, 8)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    by_hand = 0.4 * x + sum(w * op(x) for w, op in zip(weights, block.m_ops, strict=False))
    assert torch.allclose(block(x, weights), by_hand, atol=1e-5)
    block, x = net.stage1.block1, torch.randn(2, 4, 8, 8)
    by_hand = sum(w * op(x) for w, op in zip([0.5, 0.25, 0.25], block.m_ops, strict=True))
    assert torch.allclose(block(x, torch.tensor([0.5, 0.25, 0.25, 0.0])), by_hand, atol=1e-5)


def test_draws_never_skip_a_block_without_a_residual_connection(net):
    generator = torch.Generator().manual_seed(1)
    gumbel = torch.tensor([net.sample('gumbel', generator) for _ in range(500)])
    free = torch.tensor([net.sample('random', generator) for _ in range(2000)])
    others = torch.tensor([net.sample('random', generator, exclude=[2, 3, 0, 1, 3]) for _ in range(2000)])
    for draws in (gumbel, free, others):
        assert (draws.amax(0) < torch.tensor(CHOICES)).all()
    assert [len(set(free[:, i].tolist())) for i in range(5)] == CHOICES
    assert not (others == torch.tensor([2, 3, 0, 1, 3])).any()
    share = torch.nn.functional.one_hot(others[:, 1], 4).float().mean(0)
    assert torch.allclose(share, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]), atol=0.04)


def test_steps_of_the_architecture_keep_probabilities(net):
    """Ten steps of Adam with weight decay at a low temperature: gradients are finite, and skip gains by its latency."""
    images = torch.randn(4, 3, 32, 32)
    table, generator = make_table(SMALL_SPACE, 32, base=0.1), torch.Generator().manual_seed(1)
    matrix = table.matrix(SMALL_SPACE.start_widths(), SMALL_SPACE)
    optimizer = torch.optim.Adam(net.arch_parameters(), 0.1, weight_decay=5e-4)
    before = [op.log_alphas.softmax(0).detach() for op in net.mixed_ops()]
    for _ in range(10):
        weights = net.mixture_weights(0.2, generator)
        assert weights.shape == (5, 4) and weights[0, 3] == weights[3, 3] == 0
        assert torch.allclose(weights.sum(1), torch.ones(5))
        optimizer.zero_grad()
        latency = expected_latency(table.base, matrix, weights, net.depth_weights(), SMALL_SPACE)
        (latency + 0.1 * net(images, weights).square().mean()).backward()
        assert all(torch.isfinite(p.grad).all() for p in net.arch_parameters())
        optimizer.step()
        net.project_architecture()
    after = [op.log_alphas.exp().detach() for op in net.mixed_ops()]
    assert [len(p) for p in after] == CHOICES and all(p.sum().item() == pytest.approx(1, abs=1e-5) for p in after)
    assert sum(float(p[3] - q[3]) for p, q in zip(after, before, strict=True) if len(p) == 4) > 0.1
    assert [stage.betas.tolist() for stage in net.stages()] == [[0.0]] * 3


def test_latency_of_a_mixture_by_hand():
    table = make_table(SMALL_SPACE, 32, base=2.0)
    matrix = table.matrix(SMALL_SPACE.start_widths(), SMALL_SPACE)
    assert matrix.shape == (5, 4) and matrix[:, 3].eq(0).all() and (matrix[:, :3] > 0).all()
    weights = torch.tensor([[0, 1, 0, 0], [0.25, 0, 0, 0.75], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0.5, 0, 0.5]])
    by_hand = 2 + matrix[0, 1] + 0.25 * matrix[1, 0] + matrix[3, 0] + 0.5 * matrix[4, 1]
    found = expected_latency(2.0, matrix, weights, [torch.ones(1)] * 3, SMALL_SPACE)
    assert found.item() == pytest.approx(by_hand.item())


def test_skipped_blocks_fall_away_from_the_network():
    arch = {'stage1': [1], 'stage2': [3, 3], 'stage3': [0, 3]}
    table, widths = make_table(SMALL_SPACE, 32), SMALL_SPACE.start_widths()
    config = build_config(arch, widths, NUM_CLASSES, SMALL_SPACE)
    assert [len(blocks) for blocks in config.stages.values()] == [1, 0, 1]
    blocks = {(b.stage, b.name): b for b in SMALL_SPACE.blocks(32)}
    first, last = blocks['stage1', 'block1'], blocks['stage3', 'block1']
    by_hand = table.base + table.of(first, SMALL_SPACE.ops[1], 12) + table.of(last, SMALL_SPACE.ops[0], 18)
    assert table.total(arch, widths, SMALL_SPACE) == pytest.approx(by_hand) == table.of_config(config)
    assert NetworkEval(config).eval()(torch.randn(2, 3, 32, 32)).shape == (2, NUM_CLASSES)
    low = [min(table.of(b, op, op.min_width(b.in_ch)) for op in SMALL_SPACE.ops) for b in (first, last)]
    assert table.reach(SMALL_SPACE)[:2] == pytest.approx([table.base + sum(low)] * 2)


@pytest.mark.parametrize('seed_', range(4))
def test_most_probable_architecture_equals_brute_force(seed_):
    generator = torch.Generator().manual_seed(seed_)
    rows = [2 * torch.randn(choices, generator=generator) for choices in CHOICES]
    state = {f'{b.stage}.{b.name}.log_alphas': row for b, row in zip(SMALL_SPACE.blocks(), rows, strict=True)}
    state |= {f'{name}.betas': torch.zeros(1) for name in SMALL_SPACE.stage_names}
    table, logps = make_table(SMALL_SPACE, 32, seed_, base=0.1), [row.double().log_softmax(0) for row in rows]
    known = []
    for picks in itertools.product(*map(range, CHOICES)):
        arch = {'stage1': picks[:1], 'stage2': picks[1:3], 'stage3': picks[3:]}
        logp = sum(float(row[pick]) for row, pick in zip(logps, picks, strict=True))
        known.append((logp, *latency_range(arch, table, SMALL_SPACE)))
    least, _, most = table.reach(SMALL_SPACE)
    assert least == pytest.approx(min(low for _, low, _ in known)) and most == pytest.approx(max(k[2] for k in known))
    tried = skipped = 0
    for target in np.linspace(least, most, 12).tolist():
        fitting = [logp for logp, low, high in known if low <= target <= high]
        if not fitting:
            continue
        found = most_probable(state, table, SMALL_SPACE, target)
        picks = [pick for stage in found.values() for pick in stage]
        logp = sum(float(row[pick]) for row, pick in zip(logps, picks, strict=True))
        assert logp == pytest.approx(max(fitting), abs=1e-8)
        widths = fit_widths(found, SMALL_SPACE.start_widths(), table, SMALL_SPACE, target)
        assert table.total(found, widths, SMALL_SPACE) <= target * (1 + 1e-9)
        tried, skipped = tried + 1, skipped + picks.count(3)
    assert tried > 4 and skipped > 0


def test_skip_counts_nothing_in_the_tables_of_limits():
    """A limit that changes the choice: no more probable architecture can meet it and the target."""
    table, other = make_table(SMALL_SPACE, 32, 0, base=0.1), make_table(SMALL_SPACE, 32, 1, base=0.2)
    rows = [torch.linspace(1, 0, choices) for choices in CHOICES]
    state = {f'{b.stage}.{b.name}.log_alphas': row for b, row in zip(SMALL_SPACE.blocks(), rows, strict=True)}
    state |= {f'{name}.betas': torch.zeros(1) for name in SMALL_SPACE.stage_names}
    least, most = other.reach(SMALL_SPACE)[0], table.reach(SMALL_SPACE)[2]
    limits, target, likelier = [Limit('other', other, 1.4 * least)], 0.55 * most, 0
    found = most_probable(state, table, SMALL_SPACE, target, 1, limits)
    widths = fit_widths(found, SMALL_SPACE.start_widths(), table, SMALL_SPACE, target, 1, limits)
    assert limits[0].holds(other.total(found, widths, SMALL_SPACE)) and sum(map(len, found.values())) == 5
    assert 0.99 * target < table.total(found, widths, SMALL_SPACE) <= target * (1 + 1e-9)
    for picks in itertools.product(*map(range, CHOICES)):
        arch = {'stage1': list(picks[:1]), 'stage2': list(picks[1:3]), 'stage3': list(picks[3:])}
        if log_probability(arch, state, SMALL_SPACE) > log_probability(found, state, SMALL_SPACE) + 1e-9:
            assert not can_meet(arch, table, SMALL_SPACE, target, 1, limits)
            likelier += 1
    assert likelier and 3 in sum(found.values(), [])
    assert found != most_probable(state, table, SMALL_SPACE, target)


def test_weights_pass_through_masks():
    full, masks = full_weights(NUM_CLASSES, torch.device('cpu'), SMALL_SPACE), start_masks(SMALL_SPACE)
    assert all(list(ops) == [0, 1, 2] for blocks in masks.values() for ops in blocks.values())
    widths, arch = mask_widths(masks), {'stage1': [1], 'stage2': [3, 0], 'stage3': [0, 3]}
    table = make_table(SMALL_SPACE, 32)
    target = sum(latency_range(arch, table, SMALL_SPACE)) / 2
    fitted = fit_widths(arch, widths, table, SMALL_SPACE, target)
    assert fitted['stage2']['block1'] == widths['stage2']['block1']  # skipped, so not scaled
    assert fitted != widths and table.total(arch, fitted, SMALL_SPACE) == pytest.approx(target, rel=0.01)
    masks = update_masks(masks, fitted, full)
    before = {name: value.clone() for name, value in full.items()}
    net = Network(mask_widths(masks), NUM_CLASSES, SMALL_SPACE)
    gather(net, full, masks)
    scatter(net, full, masks)
    assert all(torch.equal(value, full[name]) for name, value in before.items())


def test_random_networks_skip_blocks():
    drawn = [random_network(random.Random(i), False, SMALL_SPACE) for i in range(60)]
    configs = [build_config(*network, NUM_CLASSES, SMALL_SPACE) for network in drawn]
    depths = [[len(blocks) for blocks in config.stages.values()] for config in configs]
    assert [set(stage) for stage in zip(*depths, strict=True)] == [{1}, {0, 1, 2}, {1, 2}]
