"""Width scaling against a recomputation from the published rule, its invariants; masks, gather and scatter."""

import random

import pytest
import torch

from conftest import NUM_CLASSES, make_table, random_arch
from models.elasticity import Scaler, full_weights, gather, scatter, start_masks, update_masks
from models.model_search import Network
from models.parsing import mask_widths
from models.search_space import SPACE


def recompute(arch, widths, table, space, target):
    """Width scaling written down a second time, straight from the rule: all candidate steps of a pass first, then the
    choice of one among them. Returns the widths of the architecture's blocks in order."""
    picks = space.chosen(arch, table.img_size)
    bounds, stages, now = [], [], []
    for block, index in picks:
        top = space.ops[index].max_width(block.in_ch)
        bounds.append((top // 2, top))
        stages.append(int(block.stage.removeprefix('stage')))
        now.append(widths[block.stage][block.name][index])

    def cost(values):
        return table.base + sum(
            table.curves[block.key(space.ops[index])][w - 1] for (block, index), w in zip(picks, values, strict=True)
        )

    def steps(values, first, sign):
        part = [w for w, stage in zip(values, stages, strict=True) if stage >= first]
        ratio = [round(w / min(part)) if stage >= first else 0 for w, stage in zip(values, stages, strict=True)]
        seen = [list(values)]
        while True:
            moved = [
                sorted((low, w + sign * r, high))[1] for w, r, (low, high) in zip(seen[-1], ratio, bounds, strict=True)
            ]
            if moved == seen[-1]:
                return seen
            seen.append(moved)

    last = len(space.stages)
    plan = []
    if cost(now) > target:
        fitting = [v for v in steps(now, 1, -1) if cost(v) <= target]
        now = fitting[0] if fitting else steps(now, 1, -1)[-1]
        plan = range(2, last + 1)
    elif cost(now) < target:
        plan = range(1, last + 1)
    for first in plan:
        if any(stage >= first for stage in stages) and cost(now) <= target:
            now = [v for v in steps(now, first, +1) if cost(v) <= target][-1]
    return now


def scale_widths(arch, widths, table, space, target):
    return Scaler(arch, table, space, 1).scale(widths, target)


def used(arch, widths, space):
    return [widths[b.stage][b.name][i] for b, i in space.chosen(arch)]


@pytest.mark.parametrize('full_space', [False, True])
def test_scaling_agrees_with_a_recomputation(small_space, full_space):
    space = SPACE if full_space else small_space
    table, rng = make_table(space, 64, base=0.3), random.Random(3)
    _, shallow, most = table.reach(space)
    for _ in range(60):
        arch, widths = random_arch(space, rng)
        target = rng.uniform(0.5 * shallow, most)
        scaled = scale_widths(arch, widths, table, space, target)
        assert used(arch, scaled, space) == recompute(arch, widths, table, space, target)


def test_scaling_meets_reachable_targets_from_below():
    table, rng = make_table(base=0.3), random.Random(4)
    gaps = []
    for _ in range(100):
        arch, widths = random_arch(SPACE, rng)
        bounds = [(SPACE.ops[i].min_width(b.in_ch), SPACE.ops[i].max_width(b.in_ch)) for b, i in SPACE.chosen(arch)]
        at_bounds = [
            sum(table.of(b, SPACE.ops[i], w[end]) for (b, i), w in zip(SPACE.chosen(arch), bounds, strict=True))
            for end in (0, 1)
        ]
        least, most = (table.base + blocks for blocks in at_bounds)
        target = rng.uniform(least, most)
        scaled = scale_widths(arch, widths, table, SPACE, target)
        before, after = table.total(arch, widths, SPACE), table.total(arch, scaled, SPACE)
        assert after <= target
        assert abs(after - target) <= abs(before - target) + 1e-12
        values = used(arch, scaled, SPACE)
        assert all(low <= w <= high for w, (low, high) in zip(values, bounds, strict=True))
        block, index = SPACE.chosen(arch)[-1]
        if values[-1] < bounds[-1][1] and before != target:
            one_more = table.of(block, SPACE.ops[index], values[-1] + 1) - table.of(block, SPACE.ops[index], values[-1])
            assert 0 <= target - after < one_more
        gaps.append((target - after) / target)
    assert sum(gaps) / len(gaps) < 0.0005


def test_scaling_of_one_block_by_hand(small_space):
    table = make_table(small_space, 32)
    for curve in table.curves.values():
        curve[:] = [0.1 * w for w in range(1, len(curve) + 1)]
    arch = {'stage1': [0], 'stage2': [], 'stage3': [0]}
    widths = small_space.start_widths()  # 12 and 18 channels: 1 + 1.2 + 1.8 ms; bounds 8..16 and 12..24
    # shrink: ratios round(12/12) = 1 and round(18/12) = 2 (1.5 rounds to even), 0.3 ms a step: 3.7, 3.4
    # then expand stages 2-3 (the last block, one channel a step): 3.5; stages 3: nothing more fits
    scaled = scale_widths(arch, widths, table, small_space, 3.55)
    assert used(arch, scaled, small_space) == [10, 15]
    # expand from 4.0: 4.3, 4.6, 4.9 (15 and 24), then only the first goes on: 5.0 (16 and 24): all at their most
    assert used(arch, scale_widths(arch, widths, table, small_space, 99.0), small_space) == [16, 24]
    assert used(arch, scale_widths(arch, widths, table, small_space, 0.5), small_space) == [8, 12]
    assert scale_widths(arch, widths, table, small_space, table.total(arch, widths, small_space)) == widths
    assert widths == small_space.start_widths()


def test_masks_start_with_the_first_channels(small_space):
    masks = start_masks(small_space)
    assert masks['stage3']['block1'][2].tolist() == [1.0] * 36 + [0.0] * 12
    assert mask_widths(masks) == small_space.start_widths()


def test_changed_masks_take_the_channels_of_largest_l1_norm(small_space):
    full, masks = full_weights(NUM_CLASSES, torch.device('cpu'), small_space), start_masks(small_space)
    kernel = full['stage1.block1.m_ops.1.depth_conv.conv.weight']
    kernel.copy_(torch.zeros_like(kernel))
    kernel[:, 0, 0, 0] = torch.tensor([1.0, -9, 3, 3, 5, 0, 0, 8, 0, 0, 0, 0, -7, 0, 0, 2])
    widths = mask_widths(masks)
    widths['stage1']['block1'][1] = 5
    new = update_masks(masks, widths, full)
    kept = new['stage1']['block1'][1].nonzero().flatten().tolist()
    assert kept == [1, 2, 4, 7, 12]  # |-9|, 8, |-7|, 5, and the first of two threes
    assert new['stage1']['block1'][0] is masks['stage1']['block1'][0]
    assert masks['stage1']['block1'][1].sum() == 12


def test_gather_then_scatter_is_the_identity(small_space):
    device = torch.device('cpu')
    full, masks = full_weights(NUM_CLASSES, device, small_space), start_masks(small_space)
    net = Network(mask_widths(masks), NUM_CLASSES, small_space)
    rng = random.Random(0)
    for _ in range(3):
        _, widths = random_arch(small_space, rng)
        masks = update_masks(masks, widths, full)
        before = {name: value.clone() for name, value in full.items()}
        gather(net, full, masks)
        assert net.widths() == widths
        scatter(net, full, masks)
        assert all(torch.equal(full[name], value) for name, value in before.items())


def test_scatter_writes_kept_channels_only(small_space):
    full, masks = full_weights(NUM_CLASSES, torch.device('cpu'), small_space), start_masks(small_space)
    _, widths = random_arch(small_space, random.Random(5))
    masks = update_masks(masks, widths, full)
    net = Network(mask_widths(masks), NUM_CLASSES, small_space)
    before = {name: value.clone() for name, value in full.items()}
    gather(net, full, masks)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    scatter(net, full, masks)
    kept = masks['stage3']['block2'][1].bool()
    for weight, dim in (('depth_conv.conv.weight', 0), ('point_linear.conv.weight', 1),
                        ('squeeze_excite.conv_reduce.weight', 1), ('squeeze_excite.conv_expand.bias', 0),
                        ('inverted_bottleneck.conv.weight', 0)):  # fmt: skip
        name = f'stage3.block2.m_ops.1.{weight}'
        change = (
            (full[name] - before[name]).movedim(dim, 0).flatten(1)
            if full[name].dim() > 1
            else full[name] - before[name]
        )
        assert torch.allclose(change[kept], torch.ones_like(change[kept]), atol=1e-6)
        assert (change[~kept] == 0).all()
    reduce_bias = 'stage3.block2.m_ops.1.squeeze_excite.conv_reduce.bias'
    assert torch.allclose(full[reduce_bias], before[reduce_bias] + 1)
