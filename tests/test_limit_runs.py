"""Limits in whole runs: search, resumed search, configs of several targets, fits to the clock, pictures."""

import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from bad_files import run_here
from PIL import Image
from test_limits import TINY, random_case, reach
from test_targeting import random_state
from training_runs import differences, load, timeless

import parsing_model
import train_search
from conftest import NUM_CLASSES, SMALL_SPACE, make_table
from latency_pkl import closed_loop
from latency_pkl.runtimes import Engine
from latency_pkl.timing import Measured
from models.config import load_config
from models.elasticity import full_weights, start_masks
from models.latency import Limit, load_table, save_table
from models.limits import counted_table, read_limits
from models.parsing import ARCH_KEY, MASKS_KEY, mask_widths
from models.targeting import most_probable, target_range
from tools.run import read_run

CPU = torch.device('cpu')
SIZE = ['--img_size', '32', '--num_classes', str(NUM_CLASSES), '--device', 'cpu']


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    """Folder with the tables of two devices, for the small space."""
    for script in (train_search, parsing_model):
        monkeypatch.setattr(script, 'SPACE', SMALL_SPACE)
    for seed, name in enumerate(('mine', 'phone')):
        table = make_table(SMALL_SPACE, 32, seed, base=0.1)
        save_table(table.base, table.curves, {'unit': 'ms'}, tmp_path / f'{name}.pkl')
    return tmp_path


@pytest.fixture
def search(images, tables, monkeypatch):
    """Function that runs a search of 5 steps an epoch within limits and returns its run folder."""

    def run(save, *more, params='50%'):
        words = ['--img_root', images, '--train_list', images / 'train.txt', '--val_list', images / 'val.txt', *SIZE]
        words += ['--lookup_path', tables / 'mine.pkl', '--save', tables / save, '--workers', '0', '--batch_size', '4']
        words += ['--epochs', '3', '--warmup_epochs', '1', '--a_lr', '0.1', '--print_freq', '1', '--target_lat', '50%']
        words += ['--limit', f'{tables}/phone.pkl=50%', '--limit', f'params={params}', '--no-report', *more]
        assert run_here(monkeypatch, 'train_search.py', words) == 0
        (folder,) = (tables / save).iterdir()
        return folder

    return run


@pytest.fixture
def searched(tables):
    """A searched model whose most probable architecture breaks limits."""
    state = full_weights(NUM_CLASSES, CPU, SMALL_SPACE) | random_state(SMALL_SPACE, 1)
    path = tables / 'searched_model_01.pth.tar'
    named = {f'module.{name}': value for name, value in state.items()}
    torch.save({'state_dict': named, MASKS_KEY: start_masks(SMALL_SPACE), 'epoch': 1}, path)
    return path, state


def test_a_search_within_limits_ends_within_them_and_stopped_midway_bit_for_bit(search, tables, monkeypatch):
    whole = search('whole')
    count, read_numbers = iter(range(100)), train_search.read_numbers

    def stop_in_epoch_1(*args):
        if next(count) == 8:  # six calls in epoch 0; the step after the third takes its latency from the checkpoint
            signal.raise_signal(signal.SIGTERM)
        return read_numbers(*args)

    monkeypatch.setattr(train_search, 'read_numbers', stop_in_epoch_1)
    stopped = search('stopped')
    assert [(line['epoch'], line['step']) for line in read_run(stopped).of('step')][-1] == (1, 3)
    assert not (stopped / 'searched_model_02.pth.tar').exists()
    before = load(stopped / 'checkpoint.pth.tar')
    monkeypatch.setattr(train_search, 'read_numbers', read_numbers)
    assert search('stopped', '--snapshot', 'auto') == stopped
    name = 'searched_model_03.pth.tar'
    assert differences(load(whole / name), load(stopped / name)) == [] and before['step'] == 3
    runs = read_run(whole), read_run(stopped)
    steps = [
        {(x['epoch'], x['step']): (x['mixture_latency'], x['mixture_phone'], x['mixture_params']) for x in of_epoch}
        for of_epoch in ([x for x in run.of('step') if x['epoch']] for run in runs)
    ]
    assert steps[0] == steps[1] and len(steps[0]) == 10 and len(set(steps[0].values())) == 6  # every second step
    assert timeless(whole)[-3:] == timeless(stopped)[-3:]

    mine, phone = (load_table(tables / f'{name}.pkl', 32, SMALL_SPACE) for name in ('mine', 'phone'))
    params, found = counted_table('params', 32, NUM_CLASSES, SMALL_SPACE), load(whole / name)
    widths = mask_widths(found[MASKS_KEY])
    totals = [table.total(found[ARCH_KEY], widths, SMALL_SPACE) for table in (mine, phone, params)]
    values = [table.amount('50%', SMALL_SPACE) for table in (mine, phone, params)]
    assert 0.98 * values[0] < totals[0] <= values[0] and totals[1] <= values[1] and totals[2] <= values[2]
    logged = runs[0].of('epoch')[-1]['latency']['limits']
    assert [(logged[k]['limit'], logged[k]['after']) for k in ('phone', 'params')] == [
        pytest.approx(pair) for pair in zip(values[1:], totals[1:], strict=True)
    ]


def test_a_search_goes_on_with_other_limits_by_a_line(search, monkeypatch, capsys):
    read_numbers = train_search.read_numbers
    monkeypatch.setattr(
        train_search, 'read_numbers', lambda *a: signal.raise_signal(signal.SIGTERM) or read_numbers(*a)
    )
    search('other')
    monkeypatch.setattr(train_search, 'read_numbers', read_numbers)
    capsys.readouterr()
    search('other', '--snapshot', 'auto', params='70%')
    out = capsys.readouterr().out
    assert re.search(r'--?limit.*params=50%.*params=70%', out), out


def test_configs_of_several_targets_keep_all_limits_and_their_picture_is_drawn(searched, tables, monkeypatch, capsys):
    model, state = searched
    table, params = load_table(tables / 'mine.pkl', 32, SMALL_SPACE), counted_table('params', 32, 3, SMALL_SPACE)
    words = ['--model_path', model, '--lookup_path', tables / 'mine.pkl', '--save_path', tables / 'm.config', *SIZE]
    words += ['--target_lat', '20%', '30%', '40%', '--limit', 'params=40%']
    assert run_here(monkeypatch, 'parsing_model.py', words) == 0
    out, most = capsys.readouterr().out, params.amount('40%', SMALL_SPACE)
    assert out.count('networks reach targets from ') == 1
    changed = 0
    for text in ('20%', '30%', '40%'):
        config, target = load_config(tables / f'm_{text[:2]}pc.config'), table.target(text, SMALL_SPACE)
        assert 0.98 * target < table.of_config(config) <= target and params.of_config(config) <= most
        assert config.meta.target == pytest.approx(target) and config.meta.target_given == text
        assert f'Limit params: {params.of_config(config):.4f} M parameters by the table, at most {most:.4f}' in out
        limits = [Limit('params', params, most)]
        found = most_probable(state, table, SMALL_SPACE, target, limits=limits)
        changed += found != most_probable(state, table, SMALL_SPACE, target)
        assert [len(blocks) for blocks in config.stages.values()] == [len(ops) for ops in found.values()]
    assert changed
    with Image.open(tables / 'm_targets.png') as picture:
        pixels = np.asarray(picture.convert('RGB')).reshape(-1, 3)
    assert f'Pictures: {tables}/m_targets.png' in out and len(np.unique(pixels, axis=0)) > 50

    assert run_here(monkeypatch, 'parsing_model.py', [*words[:-1], 'params=1%']) == 2
    assert re.search(r'error: target [\d.]+ ms: .*raise one limit: params=[\d.]+\n$', capsys.readouterr().err)


@pytest.mark.parametrize('slower', [0.8, 1.25])
def test_a_fit_to_the_clock_stays_within_limits(slower, searched, tables, monkeypatch, capsys):
    """A clock that differs from the table moves the aim; below it the limits end the way."""
    table, (_, state) = load_table(tables / 'mine.pkl', 32, SMALL_SPACE), searched
    limits = read_limits([f'{tables}/phone.pkl=40%'], 32, 3, SMALL_SPACE)
    least, most = target_range(table, SMALL_SPACE, 1, limits)
    target, predicted = 0.95 * most, []

    def measure_latency(build, *_):
        predicted.append(table.of_config(build.args[0]))
        assert limits[0].table.of_config(build.args[0]) <= limits[0].value * (1 + 1e-9)
        return Measured(slower * predicted[-1], 0.001)

    monkeypatch.setattr(closed_loop, 'measure_latency', measure_latency)
    fit = closed_loop.Fitter(state, SMALL_SPACE.start_widths(), table, SMALL_SPACE, NUM_CLASSES, 1, limits)
    config = closed_loop.fit_to_clock(fit, target, Engine('torch', None, CPU), 1)
    wanted = target / slower if slower > 1 else most
    assert predicted[0] == pytest.approx(target, rel=0.01) and table.of_config(config) == pytest.approx(
        wanted, rel=0.01
    )
    assert ('misses the goal' in capsys.readouterr().out) == (slower < 1)


def test_an_aim_out_of_reach_is_moved_to_the_nearest_within_limits():
    moved = 0
    for seed in range(24):
        table, limits, target, divisor, state, known = random_case(seed)
        reaches = [(low, high) for low, high in (reach(totals, limits) for _, totals in known) if low <= high]
        if not reaches:
            continue
        fit = closed_loop.Fitter(state, TINY.start_widths(), table, TINY, 3, divisor, limits)
        for aim in (target, 0.5 * target, 2 * target):
            gaps = [max(low - aim, aim - high, 0) for low, high in reaches]
            found = fit.nearest(aim)
            assert abs(found - aim) == pytest.approx(min(gaps), abs=2e-3 * max(high for _, high in reaches)), seed
            most_probable(state, table, TINY, found, divisor, limits)
            moved += found != aim
    assert moved > 12


@pytest.mark.parametrize(
    ('size', 'factor', 'meta', 'value', 'message'),
    [
        (64, 1, {'unit': 'ms'}, '50%', r'other.pkl: \d+ of \d+ keys of input size 32 are missing'),
        (32, 1e6, {}, '50%', r'other.pkl: the largest network would take \d+ ms; are these microseconds'),
        (32, 1e3, {'unit': 'us'}, '1', r'other.pkl=1: networks have from [\d.]+ to [\d.]+ us; should be'),
        (32, 1, {'unit': 'ms'}, '1%', r'with other of at most [\d.]+ ms; the nearest targets that can be met: '),
    ],
)
def test_a_limit_in_a_table_that_does_not_fit_is_one_line(
    size, factor, meta, value, message, searched, tables, monkeypatch, capsys
):
    table, other = make_table(SMALL_SPACE, size, 5), tables / 'other.pkl'
    save_table(factor * table.base, {key: factor * curve for key, curve in table.curves.items()}, meta, other)
    words = ['--model_path', searched[0], '--lookup_path', tables / 'mine.pkl', '--save_path', tables / 'm.config']
    words += [*SIZE, '--target_lat', '90%', '--limit', f'{other}={value}']
    assert run_here(monkeypatch, 'parsing_model.py', words) == 2
    error = capsys.readouterr().err
    assert re.search(f'error: .*{message}', error) and error.count('\n') == 1 and not (tables / 'm.config').exists()


def test_a_limit_in_a_table_of_other_classes_is_said(tables):
    table, lines = make_table(SMALL_SPACE, 32), []
    meta = {'unit': 'us', 'num_classes': 1000}
    save_table(table.base, table.curves, meta, tables / 'other.pkl')
    (limit,) = read_limits([f'{tables}/other.pkl=50%'], 32, 3, SMALL_SPACE, lines.append)
    assert lines == [f'{tables}/other.pkl is for 1000 classes, not 3'] and limit.table.unit == 'us'
    assert read_limits([f'{tables}/other.pkl=50%'], 32, 1000, SMALL_SPACE, lines.append)[0].holds(limit.value)
    assert len(lines) == 1 and not replace(limit, value=limit.value * 0.99).holds(limit.value)
