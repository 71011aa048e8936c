"""Meeting targets: exact choice against brute force, scaling and fits, limits, and the current architecture."""

import argparse
import itertools
import random
import re

import numpy as np
import pytest
import torch
from bad_files import run_here

import parsing_model
import train_search
from conftest import ROOT, SMALL_SPACE, make_table, new_search, random_arch
from latency_pkl import make_lat_lut
from models.config import load_config
from models.counted import counted_table
from models.elasticity import start_masks
from models.fitting import Fitter, Limit
from models.parsing import (
    ARCH_KEY,
    MASKS_KEY,
    load_architecture,
    mask_widths,
    parse_architecture,
    random_probabilities,
    read_searched,
)
from models.search import SEARCH
from models.search_space import SPACE
from models.tables import load_table
from models.targeting import Target, log_probability
from tools.checkpoint import read_snapshot
from tools.distributed import World
from tools.errors import BadInput
from tools.run import read_run

STARTS = SMALL_SPACE.start_widths()


def random_state(space, seed, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    sizes = {f'{block.stage}.{block.name}.log_alphas': len(space.ops) for block in space.blocks()}
    sizes |= {f'{name}.betas': len(stage.exit_depths) for name, stage in space.named_stages}
    return {name: torch.randn(size, generator=generator) * spread for name, size in sizes.items()}


def logp(arch, state, space):
    """Log-probability over exits and operators; a block behind the exit has its most probable operator."""
    total = 0.0
    for name, stage in space.named_stages:
        total += state[f'{name}.betas'].double().log_softmax(0)[stage.exit_depths.index(len(arch[name]))].item()
        for i in range(1, stage.depth + 1):
            logps = state[f'{name}.block{i}.log_alphas'].double().log_softmax(0)
            total += (logps[arch[name][i - 1]] if i <= len(arch[name]) else logps.max()).item()
    return total


def all_architectures(space):
    of_stage = []
    for stage in space.stages:
        ops = range(len(space.ops))
        of_stage.append([list(one) for depth in stage.exit_depths for one in itertools.product(ops, repeat=depth)])
    for choice in itertools.product(*of_stage):
        yield dict(zip(space.stage_names, choice, strict=True))


def small_target(seed, value=0.0, divisor=1):
    return Target(make_table(SMALL_SPACE, 32, seed, base=0.1), SMALL_SPACE, value, divisor)


def gapped_target(value=0.0):
    """A table with wide gaps between operators: neither end of the widths alone decides."""
    target = small_target(0, value)
    for i, curve in enumerate(target.table.curves.values()):
        curve[:] = 1.0 + 2.7 * (i % 3) + 0.001 * np.arange(len(curve))
    return target


def ranked(target, state):
    """All architectures with their log-probability and reach, the most probable first."""
    known = [(logp(arch, state, SMALL_SPACE), *target.reach(arch)) for arch in all_architectures(SMALL_SPACE)]
    return sorted(known, reverse=True)


@pytest.mark.parametrize('divisor', [1, 5])
@pytest.mark.parametrize('seed', range(4))
def test_the_choice_equals_brute_force(seed, divisor):
    state, target = random_state(SMALL_SPACE, seed), small_target(seed, divisor=divisor)
    known = ranked(target, state)
    assert len(known) == 3 * 13 * 12
    for value in np.linspace(*target.table.reach(SMALL_SPACE)[::2], 20)[1:-1].tolist():
        fitting = [p for p, low, high in known if low <= value <= high]
        found = target.at(value).most_probable(state)
        low, high = target.reach(found)
        assert low <= value * (1 + 1e-9) and high >= value * (1 - 1e-9)
        assert logp(found, state, SMALL_SPACE) == pytest.approx(fitting[0], abs=1e-9)
        several = itertools.islice(target.at(value).by_probability(state), 5)
        assert [logp(arch, state, SMALL_SPACE) for arch in several] == pytest.approx(fitting[:5], abs=1e-9)


def test_a_divisor_leaves_the_widths_within_their_bounds():
    free, coarse = small_target(0), small_target(0, divisor=5)
    narrower = 0
    for arch in all_architectures(SMALL_SPACE):
        (least, most), (low, high) = free.reach(arch), coarse.reach(arch)
        assert least <= low <= high <= most
        narrower += (least, most) != (low, high)
    assert narrower > 400


@pytest.mark.parametrize('values', [1, 2])
def test_ties_equal_brute_force(values):
    """Architecture parameters of few different values, in the small space and by a shipped table."""
    tied = {name: value.sign() if values == 2 else 0 * value for name, value in random_state(SPACE, 1).items()}
    table = load_table(ROOT / 'latency_pkl/latency_gpu.pkl', 224, SPACE)
    for share in ('20%', '41%', '44%'):
        target = Target(table, SPACE, table.target(share, SPACE), 1)
        assert target.can_meet(target.most_probable(tied))
    state = {name: value.sign() if values == 2 else 0 * value for name, value in random_state(SMALL_SPACE, 1).items()}
    target = small_target(1)
    known = ranked(target, state)
    for value in np.linspace(*target.table.reach(SMALL_SPACE)[::2], 15)[1:-1].tolist():
        best = max(p for p, low, high in known if low <= value <= high)
        assert logp(target.at(value).most_probable(state), state, SMALL_SPACE) == pytest.approx(best, abs=1e-9)


def test_targets_in_gaps_are_refused_with_the_nearest_ones():
    state, hits, refused = random_state(SMALL_SPACE, 3), 0, 0
    known = ranked(gapped_target(), state)
    for value in np.linspace(4, 24, 81).tolist():
        target = gapped_target(value)
        fitting = [p for p, low, high in known if low <= value <= high]
        if fitting:
            hits += 1
            target.check()
            found = target.most_probable(state)
            assert logp(found, state, SMALL_SPACE) == pytest.approx(fitting[0])
            continue
        refused += 1
        below = [high for _, _, high in known if high < value]
        above = [low for _, low, _ in known if low > value]
        assert target.nearest() == pytest.approx([*([max(below)] if below else []), *([min(above)] if above else [])])
        with pytest.raises(BadInput, match='no architecture'):
            target.most_probable(state)
        with pytest.raises(BadInput, match='the nearest targets that can be met: [0-9. and]+$'):
            target.check()
    assert hits > 5 and refused > 5


def test_log_probability_counts_blocks_behind_the_exit_as_certain():
    state = random_state(SMALL_SPACE, 5)
    first = parse_architecture(state, SMALL_SPACE)
    for arch in list(all_architectures(SMALL_SPACE))[::50]:
        lost = logp(first, state, SMALL_SPACE) - logp(arch, state, SMALL_SPACE)
        own = log_probability(first, state, SMALL_SPACE) - log_probability(arch, state, SMALL_SPACE)
        assert own == pytest.approx(lost, abs=1e-9)


@pytest.mark.parametrize('divisor', [1, 8])
def test_fits_are_closer_than_scaling_and_never_above(divisor):
    table, rng, gaps = make_table(base=0.3), random.Random(6), []
    for _ in range(40):
        arch, widths = random_arch(SPACE, rng)
        target = Target(table, SPACE, 0.0, divisor)
        least, most = target.reach(arch)
        target = target.at(rng.uniform(least * 1.05, most))
        fitted = target.fitted(arch, widths)
        gap = 1 - target.latency(arch, fitted) / target.value
        scaled = target.scaler(arch).scale(widths, target.value)
        assert 0 <= gap <= 1 - target.latency(arch, scaled) / target.value + 1e-12
        for block, index in SPACE.chosen(arch):
            width, op = fitted[block.stage][block.name][index], SPACE.ops[index]
            assert op.min_width(block.in_ch) <= width <= op.max_width(block.in_ch) and width % divisor == 0
        gaps.append(gap)
    assert max(gaps) <= (0.005 if divisor == 1 else 0.02)
    assert np.mean(np.array(gaps) <= 0.001) >= (0.99 if divisor == 1 else 0.5)


def test_widths_are_fitted_only_if_coarse_steps_miss_the_target():
    state, fitted = random_state(SMALL_SPACE, 1), 0
    arch = parse_architecture(state, SMALL_SPACE)
    for value in np.linspace(*small_target(1, divisor=5).reach(arch), 12)[1:-1].tolist():
        target = small_target(1, value, divisor=5)
        stepped = target.scaler(arch).scale(STARTS, value)
        missed = 1 - target.latency(arch, stepped) / value
        scaled = target.scaled(arch, STARTS)
        assert scaled == (target.fitted(arch, STARTS) if missed > 0.01 else stepped)
        fitted += scaled != stepped
    assert fitted > 2


@pytest.fixture
def small(monkeypatch):
    for script in (train_search, parsing_model, make_lat_lut):
        monkeypatch.setattr(script, 'SPACE', SMALL_SPACE)


def scale_to_target(target, state, scales=True):
    return train_search.scale_to_target(argparse.Namespace(full=state, masks=start_masks(SMALL_SPACE)), target, scales)


@pytest.mark.parametrize('seed', range(3))
def test_the_current_architecture_is_the_argmax_or_the_next_that_meets_the_target(small, seed):
    state, moved = random_state(SMALL_SPACE, seed), 0
    first = parse_architecture(state, SMALL_SPACE)
    for value in np.linspace(*small_target(seed).table.reach(SMALL_SPACE)[::2], 15)[1:-1].tolist():
        target = small_target(seed, value)
        arch, widths, latency = scale_to_target(target, state)
        assert arch == target.most_probable(state) and widths == target.scaled(arch, STARTS)
        before, after = target.latency(arch, STARTS), target.latency(arch, widths)
        expected = {'target': value, 'before': before, 'after': after}
        expected |= dict(zip(('least', 'most'), target.reach(arch), strict=True))
        if arch != first:
            moved += 1
            expected['given_up'] = logp(first, state, SMALL_SPACE) - logp(arch, state, SMALL_SPACE)
        assert latency == pytest.approx(expected) and 0.99 * value < after <= value * (1 + 1e-9)
        fixed, same, numbers = scale_to_target(target, state, scales=False)
        assert fixed == first and same == STARTS and numbers['before'] == numbers['after']
    assert moved > 3


def test_limits_take_the_next_architecture_that_keeps_them():
    """Against brute force over the most probable ones."""
    state, target = random_state(SMALL_SPACE, 2), small_target(2)
    params = counted_table('params', 32, 3, SMALL_SPACE)
    value = target.table.target('50%', SMALL_SPACE)
    fitted = []
    for arch in itertools.islice(target.at(value).by_probability(state), 20):
        fitted.append((arch, Fitter(state, STARTS, target, 3)(value, arch)[1]))
    totals = [params.of_config(config) for _, config in fitted]
    place = 7
    limit = Limit('params', params, min(totals[:place]) * 0.9999)
    kept = next((i for i, total in enumerate(totals) if total <= limit.value), None)
    fit = Fitter(state, STARTS, target, 3, [limit])
    if kept is None:
        with pytest.raises(BadInput, match='--limit: none of the 20 most probable'):
            fit(value)
    else:
        arch, config, latency = fit(value)
        assert (arch, config) == fitted[kept] and kept >= place
        assert latency <= value * (1 + 1e-9) and fit.given_up(arch) > fit.given_up(fitted[0][0])
    loose = Fitter(state, STARTS, target, 3, [Limit('params', params, totals[0])])
    assert loose(value)[1] == fitted[0][1]
    with pytest.raises(BadInput, match='the nearest has params .* above: raise the limit'):
        Fitter(state, STARTS, target, 3, [Limit('params', params, min(totals) * 0.5)])(value)


def test_random_probabilities_draw_all_depths_and_operators():
    depths, operators = [], []
    for seed in range(300):
        arch = parse_architecture(random_probabilities(seed, SMALL_SPACE), SMALL_SPACE)
        depths.append(len(arch['stage3']))
        operators.append(arch['stage1'][0])
    for drawn, kinds in ((depths, (1, 2)), (operators, range(3))):
        assert all(abs(drawn.count(kind) / 300 - 1 / len(kinds)) < 0.1 for kind in kinds)
    one, same = random_probabilities(7, SPACE), random_probabilities(7, SPACE)
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_checkpoints_keep_the_current_architecture(tmp_path):
    state = new_search(SMALL_SPACE)
    assert ARCH_KEY not in state.to_checkpoint({})  # during the warm-up there is none
    first = parse_architecture(state.full, SMALL_SPACE)
    state.arch, state.epoch = {'stage1': [2], 'stage2': [], 'stage3': [1, 0]}, 2
    path = tmp_path / 'searched_model_02.pth.tar'
    torch.save(state.to_checkpoint({}), path)
    config = load_architecture(path, SMALL_SPACE)
    kinds = [(spec.kernel_size, spec.se_channels > 0) for specs in config.stages.values() for spec in specs]
    assert kinds == [(3, False), (5, True), (3, False)]
    again = new_search(SMALL_SPACE)
    again.load(read_snapshot(path, SEARCH), path, World(torch.device('cpu')))
    assert again.arch == state.arch != first and again.to_checkpoint({})[ARCH_KEY] == state.arch
    published = state.to_checkpoint({})
    del published[ARCH_KEY]
    torch.save(published, path)
    assert read_searched(path, SMALL_SPACE).arch == first


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda data: data.pop('state_dict'), 'neither a model.config nor a searched model'),
        (lambda data: data['state_dict'].pop('module.stage3.betas'), 'stage3.betas should be 2 values'),
        (lambda data: data['state_dict'].pop('module.stage1.block1.log_alphas'), 'log_alphas should be 3 values'),
        (lambda data: data[MASKS_KEY]['stage1']['block1'][0].fill_(0.5), 'mask of stage1.block1 op 0'),
        (lambda data: data[MASKS_KEY]['stage3']['block2'][2][31:].zero_(), 'keeps 31 channels, .* at least 32 of 64'),
        (lambda data: data.update(arch='resnet50'), 'arch.stage1 should be a list'),
        (lambda data: data['arch'].update(stage1=[]), 'arch.stage1 should be a list'),
        (lambda data: data['arch'].update(stage2=[0, 3]), 'arch.stage2 should be a list'),
        (lambda data: data['arch'].update(stage3=[-1]), 'arch.stage3 should be a list'),
    ],
)
def test_spoiled_searched_models_are_refused_by_what_is_wrong(tmp_path, spoil, message):
    path, data = tmp_path / 'searched.pth.tar', new_search(SMALL_SPACE).to_checkpoint({})
    data[ARCH_KEY] = {'stage1': [0], 'stage2': [], 'stage3': [0]}
    spoil(data)
    torch.save(data, path)
    with pytest.raises(BadInput, match=f'searched.pth.tar: .*{message}'):
        load_architecture(path, SMALL_SPACE)


def test_a_search_whose_argmax_misses_ends_on_its_target(small, images, tmp_path, monkeypatch, capsys):
    """Hardly trained exits and operators are equally probable, and 95 % of the range needs the largest operators."""
    size = ['--img_size', '32', '--num_classes', '3', '--device', 'cpu']
    flops = tmp_path / 'flops.pkl'
    assert run_here(monkeypatch, 'latency_pkl/make_lat_lut.py', ['--metric', 'flops', *size, '--save_path', flops]) == 0
    words = ['--img_root', images, '--train_list', images / 'train.txt', '--val_list', images / 'val.txt', *size]
    words += ['--lookup_path', flops, '--save', tmp_path / 'runs', '--workers', '0', '--batch_size', '8']
    words += ['--epochs', '1', '--warmup_epochs', '0', '--target_lat', '95%', '--a_lr', '0.1', '--no-report']
    assert run_here(monkeypatch, 'train_search.py', words) == 0
    (folder,) = (tmp_path / 'runs').iterdir()
    model, table = folder / 'searched_model_01.pth.tar', load_table(flops, 32, SMALL_SPACE)
    searched, target = (
        read_searched(model, SMALL_SPACE),
        Target(table, SMALL_SPACE, table.target('95%', SMALL_SPACE), 1),
    )
    assert target.reach(parse_architecture(searched.state, SMALL_SPACE))[1] < target.value
    assert searched.arch == target.most_probable(searched.state)
    reached = target.latency(searched.arch, searched.widths)
    assert target.value * 0.99 < reached <= target.value
    (epoch,) = read_run(folder).of('epoch')
    assert epoch['arch'] == searched.arch and epoch['network']['latency'] == pytest.approx(reached, rel=1e-6)
    assert epoch['latency']['given_up'] > 0
    words = ['--model_path', model, '--save_path', tmp_path / 'model.config', *size]
    assert run_here(monkeypatch, 'parsing_model.py', words) == 0
    assert table.of_config(load_config(tmp_path / 'model.config')) == pytest.approx(reached)
    capsys.readouterr()
    words += ['--lookup_path', flops, '--target_lat', '60%']
    assert run_here(monkeypatch, 'parsing_model.py', words) == 0
    printed = capsys.readouterr().out
    params = float(re.search(r'Params: ([0-9.]+) M', printed)[1])
    assert run_here(monkeypatch, 'parsing_model.py', [*words, '--limit', f'params={params * 1.01}']) == 0
    assert float(re.search(r'Limit params: ([0-9.]+), at most', capsys.readouterr().out)[1]) == pytest.approx(
        params, abs=1e-3
    )
    assert run_here(monkeypatch, 'parsing_model.py', [*words, '--limit', 'params=0.0001']) == 2
    words = [
        '--random',
        '3',
        '--lookup_path',
        flops,
        '--target_lat',
        '60%',
        '--save_path',
        tmp_path / 'r.config',
        *size,
    ]
    assert run_here(monkeypatch, 'parsing_model.py', words) == 0
    config = load_config(tmp_path / 'r.config')
    assert table.of_config(config) == pytest.approx(table.target('60%', SMALL_SPACE), rel=1e-3)
    assert config.meta.predicted == pytest.approx(table.of_config(config)) and config.classifier.out_features == 3
    assert mask_widths(start_masks(SMALL_SPACE)) == STARTS
