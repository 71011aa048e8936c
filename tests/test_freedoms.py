"""A search without one of the freedoms: skip as an operator in place of sinks, one path, fixed widths."""

import itertools
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from bad_files import run_here
from torch import nn

from conftest import NUM_CLASSES, SMALL_SPACE, make_table
from models.config import build_config
from models.elasticity import (
    align_operators,
    fit_widths,
    full_weights,
    gather,
    latency_range,
    scatter,
    start_masks,
    update_masks,
)
from models.latency import expected_latency
from models.model_eval import NetworkEval
from models.model_search import Network
from models.parsing import MASKS_KEY, load_search_checkpoint, mask_widths, parse_architecture
from models.search_space import SKIP, SPACE
from models.targeting import most_probable
from tools.errors import BadInput
from tools.files import save_checkpoint
from tools.rng import derive_seed

SKIPPING = SMALL_SPACE.with_skip()
"""Of the blocks of the small space, all but the first and the fourth have a residual connection."""


@pytest.fixture
def net():
    net = Network(SKIPPING.start_widths(), NUM_CLASSES, SKIPPING).train()
    with torch.no_grad():
        for p in net.arch_parameters():
            p.copy_(torch.randn_like(p))
    return net


def test_skip_is_a_row_that_blocks_with_a_residual_connection_have():
    space = SPACE.with_skip()
    assert len(SPACE.ops) == 8 and space.ops == (*SPACE.ops, SKIP)
    counts = [len(space.ops_of(block)) for block in space.blocks()]
    assert counts == [8, 9, 8, 9, 9, 8, 9, 9, 9, 8, 9, 9, 9, 8, 9, 9, 9, 8]
    assert [list(stage.exit_depths) for stage in space.stages] == [[2], [3], [4], [4], [4], [1]]
    assert space.table_widths() == SPACE.table_widths()  # the same latency table serves both
    assert space.start_widths()['stage3']['block2'][8] == space.max_widths()['stage3']['block2'][8] == 0
    assert SKIP.label == 'skip'
    with pytest.raises(ValueError, match='last'):
        replace(SPACE, ops=(SKIP, *SPACE.ops))


def test_supernet_has_one_exit_a_stage_and_a_ninth_probability():
    with torch.device('meta'):
        state = Network(SPACE.with_skip().max_widths(), 10, SPACE.with_skip()).state_dict()
        default = Network(SPACE.max_widths(), 10).state_dict()
    assert state.keys() == default.keys()  # skip has no weights
    differing = {name for name, value in state.items() if value.shape != default[name].shape}
    assert len(differing) == 12 + 5  # log_alphas of the blocks with a residual connection; betas of all but stage 6
    assert state['stage3.block1.log_alphas'].shape == (8,) and state['stage3.block2.log_alphas'].shape == (9,)
    assert all(state[f'stage{i}.betas'].shape == (1,) for i in range(1, 7))


def test_skipped_blocks_leave_their_input_alone(net):
    x = torch.randn(4, 3, 32, 32)
    inside = net.second_stem(net.first_stem(x))
    for name, op in (('stage1', 2), ('stage3', 1)):
        inside = getattr(net, name).block1.m_ops[op](inside)
    expected = net.classifier(net.feature_mix_layer(inside).mean((2, 3)))
    assert torch.allclose(net(x, [2, 3, 3, 1, 3]), expected, atol=1e-6)


def test_skip_takes_its_share_of_the_mixture(net):
    """A block's output is the sum of its operators' outputs, where that of skip is the input."""
    block, x = net.stage2.block1, torch.randn(2, 6, 8, 8)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    by_hand = 0.4 * x + sum(w * op(x) for w, op in zip(weights, block.m_ops[:3], strict=False))
    assert torch.allclose(block(x, weights), by_hand, atol=1e-6)
    first = net.stage1.block1  # has no skip; the last weight is that of an operator that it lacks
    x = torch.randn(2, 4, 8, 8)
    by_hand = sum(w * op(x) for w, op in zip([0.5, 0.25, 0.25], first.m_ops, strict=True))
    assert torch.allclose(first(x, torch.tensor([0.5, 0.25, 0.25, 0.0])), by_hand, atol=1e-6)


def test_draws_and_mixtures_never_skip_where_it_is_impossible(net):
    generator = torch.Generator().manual_seed(1)
    gumbel = torch.tensor([net.sample('gumbel', generator) for _ in range(500)])
    free = torch.tensor([net.sample('random', generator) for _ in range(2000)])
    others = torch.tensor([net.sample('random', generator, exclude=[2, 3, 0, 1, 3]) for _ in range(2000)])
    possible = [3, 4, 4, 3, 4]
    for draws in (gumbel, free, others):
        assert (draws.amax(0) + 1).tolist() <= possible
    assert [len(set(free[:, i].tolist())) for i in range(5)] == possible
    assert not (others == torch.tensor([2, 3, 0, 1, 3])).any()
    share = nn.functional.one_hot(others[:, 1], 4).float().mean(0)
    assert torch.allclose(share, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]), atol=0.04)
    weights = net.mixture_weights(1.0, generator)
    assert weights.shape == (5, 4) and weights[0, 3] == weights[3, 3] == 0
    assert torch.allclose(weights.sum(1), torch.ones(5))
    weights.square().sum().backward()
    assert all(torch.isfinite(op.log_alphas.grad).all() for op in net.mixed_ops())
    net.project_architecture()
    assert all(op.log_alphas.exp().sum().item() == pytest.approx(1, abs=1e-5) for op in net.mixed_ops())


def test_latency_of_a_mixture_with_skip_by_hand():
    table = make_table(SKIPPING, 32, base=2.0)
    matrix = table.matrix(SKIPPING.start_widths())
    assert matrix.shape == (5, 4) and matrix[:, 3].eq(0).all() and (matrix[:, :3] > 0).all()
    weights = torch.tensor([[0, 1, 0, 0], [0.25, 0, 0, 0.75], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0.5, 0, 0.5]])
    by_hand = 2 + matrix[0, 1] + 0.25 * matrix[1, 0] + matrix[3, 0] + 0.5 * matrix[4, 1]
    depth_weights = [torch.ones(1)] * 3
    assert expected_latency(2.0, matrix, weights, depth_weights, SKIPPING).item() == pytest.approx(by_hand.item())


def test_skipped_blocks_are_dropped_from_the_network():
    arch = {'stage1': [1], 'stage2': [3, 3], 'stage3': [0, 3]}
    table, widths = make_table(SKIPPING, 32), SKIPPING.start_widths()
    assert [(block.stage, block.name, op) for block, op in SKIPPING.chosen(arch)] == [
        ('stage1', 'block1', 1),
        ('stage3', 'block1', 0),
    ]
    config = build_config(arch, widths, NUM_CLASSES, SKIPPING)
    assert [len(blocks) for blocks in config.stages.values()] == [1, 0, 1]
    blocks = {(b.stage, b.name): b for b in SKIPPING.blocks(32)}
    first, last = blocks['stage1', 'block1'], blocks['stage3', 'block1']
    by_hand = table.base + table.curves[first.key(SKIPPING.ops[1])][11] + table.curves[last.key(SKIPPING.ops[0])][17]
    assert table.total(arch, widths) == pytest.approx(by_hand) == table.of_config(config)
    assert NetworkEval(config).eval()(torch.randn(2, 3, 32, 32)).shape == (2, NUM_CLASSES)
    # two blocks at their least, the smallest operators there, and three skipped
    low = [min(table.of(b, op, op.min_width(b.in_ch)) for op in SMALL_SPACE.ops) for b in (first, last)]
    assert table.reach(SMALL_SPACE)[0] == table.reach(SMALL_SPACE)[1] == pytest.approx(table.base + sum(low))


def random_state(seed):
    generator = torch.Generator().manual_seed(seed)
    state = {
        f'{b.stage}.{b.name}.log_alphas': 2 * torch.randn(len(SKIPPING.ops_of(b)), generator=generator)
        for b in SKIPPING.blocks()
    }
    return state | {f'{name}.betas': torch.zeros(1) for name in SKIPPING.stage_names}


@pytest.mark.parametrize('seed', range(4))
def test_most_probable_architecture_with_skip_equals_brute_force(seed):
    table, state = make_table(SKIPPING, 32, seed, base=0.1), random_state(seed)
    logps = [state[f'{b.stage}.{b.name}.log_alphas'].double().log_softmax(0) for b in SKIPPING.blocks()]
    known = []
    for picks in itertools.product(*(range(len(SKIPPING.ops_of(b))) for b in SKIPPING.blocks())):
        arch = {'stage1': picks[:1], 'stage2': picks[1:3], 'stage3': picks[3:]}
        logp = sum(float(row[pick]) for row, pick in zip(logps, picks, strict=True))
        known.append((logp, *latency_range(arch, table), arch))
    least, _, most = table.reach(SMALL_SPACE)
    for target in np.linspace(least, most, 12):
        fitting = [logp for logp, low, high, _ in known if low <= target <= high]
        if not fitting:
            continue
        found = most_probable(state, table, float(target))
        logp = sum(float(row[p]) for row, p in zip(logps, sum(map(list, found.values()), []), strict=True))
        assert logp == pytest.approx(max(fitting), abs=1e-9)
        fitted = table.total(found, fit_widths(found, SKIPPING.start_widths(), table, float(target)))
        assert fitted <= target * (1 + 1e-9)


def test_weights_pass_through_masks_with_skip():
    torch.manual_seed(1)
    full, masks = full_weights(NUM_CLASSES, torch.device('cpu'), SKIPPING), start_masks(SKIPPING)
    assert masks['stage2']['block1'][3].shape == (0,) and 3 not in masks['stage1']['block1']
    widths = mask_widths(masks)
    arch = {'stage1': [1], 'stage2': [3, 0], 'stage3': [0, 3]}
    table = make_table(SKIPPING, 32)
    least, most = latency_range(arch, table)
    masks = update_masks(masks, fit_widths(arch, widths, table, (least + most) / 2), full)
    assert mask_widths(masks)['stage2']['block1'] == widths['stage2']['block1']  # skipped, so not scaled
    before = {name: value.clone() for name, value in full.items()}
    net = Network(mask_widths(masks), NUM_CLASSES, SKIPPING)
    gather(net, full, masks)
    scatter(net, full, masks)
    assert all(torch.equal(value, full[name]) for name, value in before.items())


def test_checkpoints_tell_their_space(tmp_path):
    masks, path = start_masks(SKIPPING), tmp_path / 'searched.pth.tar'
    data = {'state_dict': full_weights(NUM_CLASSES, torch.device('cpu'), SKIPPING), MASKS_KEY: masks}
    save_checkpoint(data | {'flags': {'freedoms': ['operator', 'width']}}, path)
    state, _, space = load_search_checkpoint(path, SMALL_SPACE)
    assert space == SKIPPING
    state['stage2.block2.log_alphas'] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert parse_architecture(state, space)['stage2'][1] == 3
    for flags in ({'freedoms': ['depth']}, {'freedoms': 5}, {}, 'none'):
        save_checkpoint(data | {'flags': flags}, path)
        with pytest.raises(BadInput, match='log_alphas should be 3 values'):
            load_search_checkpoint(path, SMALL_SPACE)


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda data: data.pop('state_dict'), 'neither a model.config nor a searched model'),
        (lambda data: data['state_dict'].update(epoch=3), 'neither a model.config nor a searched model'),
        (lambda data: data['state_dict'].pop('stage3.betas'), 'stage3.betas should be 2 values'),
        (
            lambda data: data['state_dict'].pop('stage1.block1.log_alphas'),
            'block1.log_alphas should be 3 values',
        ),
        (lambda data: data[MASKS_KEY]['stage1']['block1'][0].fill_(0.5), 'mask of stage1.block1 op 0'),
        (lambda data: data[MASKS_KEY].pop('stage2'), 'mask of stage2.block1 op 0'),
    ],
)
def test_spoiled_searched_models_are_refused_by_what_is_wrong(tmp_path, spoil, message):
    path = tmp_path / 'searched.pth.tar'
    masks = start_masks(SMALL_SPACE)
    data = {'state_dict': full_weights(NUM_CLASSES, torch.device('cpu'), SMALL_SPACE), MASKS_KEY: masks}
    spoil(data)
    torch.save(data, path)
    with pytest.raises(BadInput, match=message):
        load_search_checkpoint(path, SMALL_SPACE)


def test_aligned_operators_are_parts_of_the_largest():
    torch.manual_seed(3)
    full = full_weights(NUM_CLASSES, torch.device('cpu'), SKIPPING)
    before = {name: value.clone() for name, value in full.items()}
    align_operators(full, SKIPPING)
    stage = 'stage3.block2.m_ops'  # 8 channels; operators k3 e3 (32 wide), k5 e3 se (32), k3 e6 (64); the second leads
    lead = {name: value for name, value in full.items() if name.startswith(f'{stage}.1.')}
    assert all(torch.equal(value, before[name]) for name, value in lead.items())
    depthwise = full[f'{stage}.1.depth_conv.conv.weight']
    assert torch.equal(full[f'{stage}.0.depth_conv.conv.weight'], depthwise[:, :, 1:4, 1:4])
    wide = full[f'{stage}.2.point_linear.conv.weight']
    assert torch.equal(wide[:, :32], full[f'{stage}.1.point_linear.conv.weight'])
    assert torch.equal(wide[:, 32:], before[f'{stage}.2.point_linear.conv.weight'][:, 32:])
    untouched = [name for name in full if 'm_ops' not in name or 'squeeze' in name]
    assert all(torch.equal(full[name], before[name]) for name in untouched)


def test_random_networks_of_a_space_with_skip_are_whole():
    from latency_pkl.sampling import random_config

    depths = {tuple(map(len, random_config(random.Random(i), False, 3, SKIPPING).stages.values())) for i in range(60)}
    assert all(first == 1 and last in (1, 2) for first, _, last in depths)
    assert {middle for _, middle, _ in depths} == {0, 1, 2}


@pytest.fixture(scope='module')
def search(images, tmp_path_factory):
    """A search with the freedoms given: its log and last checkpoint."""
    size = ['--img_size', '32', '--num_classes', '3', '--device', 'cpu']
    folder = tmp_path_factory.mktemp('freedoms')
    table = folder / 'flops.pkl'
    with pytest.MonkeyPatch.context() as patch:
        assert run_here(patch, 'latency_pkl/make_lat_lut.py', ['--metric', 'flops', *size, '--save_path', table]) == 0

    def run(*freedoms):
        save = folder / '-'.join(['of', *freedoms])
        lists = ['--img_root', images, '--train_list', images / 'train.txt', '--val_list', images / 'val.txt']
        words = [*lists, '--lookup_path', table, '--save', save, *size, '--workers', '0', '--batch_size', '8']
        words += ['--epochs', '1', '--warmup_epochs', '0', '--target_lat', '40%', '--freedoms', *freedoms]
        if not save.exists():
            with pytest.MonkeyPatch.context() as patch:
                assert run_here(patch, 'train_search.py', words) == 0
        (run_folder,) = save.iterdir()
        return (run_folder / 'log.txt').read_text(), run_folder / 'searched_model_00.pth.tar', table

    return run


def test_search_without_depth_parses_to_a_network_of_the_target(search, tmp_path, monkeypatch, capsys):
    log, model, table = search('operator', 'width')
    assert len(re.findall(r'stage\d exits 1.0000$', log, re.M)) == 6
    assert [len(line.split()) for line in re.findall(r'ops ([\d. ]+)$', log, re.M)].count(9) == 12
    words = ['--model_path', model, '--lookup_path', table, '--num_classes', '3', '--img_size', '32']
    words += ['--device', 'cpu']
    more = ['--save_path', tmp_path / 'a', '--target_lat', '40%']
    assert run_here(monkeypatch, 'parsing_model.py', [*words, *more]) == 0
    out = capsys.readouterr().out
    target, latency = (float(re.search(rf'{name}: ([\d.]+)', out).group(1)) for name in ('Target', 'Lat_LUT'))
    assert latency == pytest.approx(target, rel=0.01)
    assert run_here(monkeypatch, 'parsing_model.py', [*words, '--save_path', tmp_path / 'b']) == 0


def test_search_without_width_keeps_the_start(search):
    log, model, _ = search('operator', 'depth')
    before, after = (re.search(rf'{when}, the current lat: ([\d.]+)', log).group(1) for when in ('Before', 'After'))
    assert before == after
    _, masks, space = load_search_checkpoint(model)
    assert space == SPACE and mask_widths(masks) == SPACE.start_widths()


def test_search_without_operator_trains_the_gumbel_path_alone(search):
    """Two steps of SGD move at most two operators of a block by one path a step, and two to four by two paths."""
    torch.manual_seed(derive_seed(2, 'weights'))
    start, moved = full_weights(3, torch.device('cpu')), {}
    for freedoms in (('depth',), ('operator', 'depth')):
        state, _, _ = load_search_checkpoint(search(*freedoms)[1])
        moved[freedoms] = [
            sum(
                not torch.equal(start[name], state[name])
                for name in start
                if name.startswith(f'{b.stage}.{b.name}.') and name.endswith('point_linear.conv.weight')
            )
            for b in SPACE.blocks()
        ]
    alone, both = moved.values()
    assert set(alone) == {1, 2} and set(both) <= {2, 3, 4} and sum(both) > sum(alone)
