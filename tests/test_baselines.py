"""Networks of a target latency that need no search, against brute force and by their properties."""

import itertools
from dataclasses import replace

import pytest

from conftest import NUM_CLASSES, make_table
from experiments import baselines, three_freedoms
from experiments.three_freedoms import random_of_target
from models.config import build_config
from models.describe import count_mult_adds
from models.elasticity import latency_range
from models.limits import block_macs
from models.model_eval import NetworkEval
from models.search_space import SPACE
from tools.errors import BadInput


def macs_of(arch, widths, space):
    """M MACs of the searched blocks."""
    return sum(
        block_macs(block, space.ops[i], widths[block.stage][block.name][i]) for block, i in space.chosen(arch, 32)
    )


@pytest.mark.parametrize('share', ['20%', '45%', '80%'])
def test_most_macs_equals_brute_force(small_space, monkeypatch, share):
    monkeypatch.setattr(baselines, 'LEVELS', 2)
    table = make_table(small_space, 32, seed=3)
    target = table.target(share, small_space)
    best = 0.0, None
    stages = [
        [ops for depth in stage.exit_depths for ops in itertools.product(range(3), repeat=depth)]
        for stage in small_space.stages
    ]
    for choice in itertools.product(*stages):
        arch = dict(zip(small_space.stage_names, map(list, choice), strict=True))
        chosen = small_space.chosen(arch, 32)
        if latency_range(arch, table, small_space)[1] < target:
            continue
        for ends in itertools.product((0, 1), repeat=len(chosen)):
            latency, amount = table.base, 0.0
            for (block, index), end in zip(chosen, ends, strict=True):
                op = small_space.ops[index]
                width = (op.min_width, op.max_width)[end](block.in_ch)
                latency += table.of(block, op, width)
                amount += block_macs(block, op, width)
            if latency <= target and amount > best[0]:
                best = amount, arch
    arch, widths = baselines.most_macs(table, small_space, target)
    assert arch == best[1]
    assert table.total(arch, widths, small_space) == pytest.approx(target, rel=0.02)


def test_most_macs_has_more_than_a_uniform_network_of_the_same_latency():
    table = make_table(img_size=32)
    target = table.target('50%', SPACE)
    amounts = []
    for baseline in (baselines.most_macs, baselines.uniform):
        arch, widths = baseline(table, SPACE, target)
        assert table.total(arch, widths, SPACE) == pytest.approx(target, rel=2e-3)
        config = build_config(arch, widths, NUM_CLASSES, SPACE)
        amounts.append((macs_of(arch, widths, SPACE), count_mult_adds(NetworkEval(config), 32)))
    (most, counted), (less, also) = amounts
    assert most > less and counted - also == pytest.approx(most - less, rel=1e-3)


def test_a_uniform_network_has_one_operator_and_nearly_one_expansion():
    table = make_table(img_size=32)
    arch, widths = baselines.uniform(table, SPACE, table.target('40%', SPACE))
    (index,) = {op for stage in arch.values() for op in stage}
    assert [len(stage) for stage in arch.values()] == [stage.depth for stage in SPACE.stages]
    expansions = [widths[b.stage][b.name][index] / b.in_ch for b in SPACE.blocks()]
    assert max(expansions) / min(expansions) < 1.15
    with pytest.raises(BadInput, match='no uniform network of full depth has it'):
        baselines.uniform(table, SPACE, table.target('0%', SPACE))
    with pytest.raises(BadInput, match='no network has it'):
        baselines.most_macs(table, SPACE, 0.9)


def test_networks_without_a_search_keep_to_the_tables_grid():
    table = replace(make_table(img_size=32), meta={'width_divisor': 4})
    target = table.target('50%', SPACE)
    for arch, widths in (
        baselines.most_macs(table, SPACE, target),
        baselines.uniform(table, SPACE, target),
        random_of_target(0, table, target),
    ):
        chosen = [widths[block.stage][block.name][index] for block, index in SPACE.chosen(arch)]
        assert all(width % 4 == 0 for width in chosen)
        assert table.total(arch, widths, SPACE) == pytest.approx(target, rel=5e-3)


def test_a_target_that_hardly_any_random_network_meets_is_refused(monkeypatch):
    monkeypatch.setattr(three_freedoms, 'MOST_DRAWS', 20)
    table = make_table(img_size=32)
    with pytest.raises(
        BadInput, match='none of 20 random architectures can meet .*; take a target further from the ends'
    ):
        random_of_target(0, table, table.target('100%', SPACE))
