"""Schedules that follow from the length of a search, and warnings of a search that has not learned or decided."""

import math
from argparse import Namespace

import pytest
import torch
from bad_files import good_flags, run_here, words_of, write_table
from training_runs import load, only_run

from models.describe import changed_blocks, mean_entropy, warn_not_decided, warn_not_learned
from models.search_state import default_a_lr, default_a_wd, temperature, with_schedule
from tools.errors import BadInput
from tools.run.metrics import read_run
from tools.run.resume import Snapshot


def test_entropy_by_hand():
    assert mean_entropy([[0.25] * 4, [0.25] * 4]) == pytest.approx(1)
    assert mean_entropy([[0.0, 1.0], [0.5, 0.5]]) == pytest.approx(0.5)
    one = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(3)
    assert mean_entropy([[0.9, 0.1, 0.0]]) == pytest.approx(one)
    assert mean_entropy([[1.0], [0.5, 0.5], [0.25] * 4]) == pytest.approx(2 / 3)


def arguments(**changes):
    """Flags of the paper's search that its schedules depend on."""
    return Namespace(**dict(T=5.0, T_decay=None, a_lr=None, a_wd=None, epochs=90, warmup_epochs=10) | changes)


def from_flags(**flags):
    """A snapshot whose run had these flags."""
    return Snapshot(checkpoint={'flags': flags})


def test_the_published_length_has_the_published_schedule():
    args, kept, _ = with_schedule(arguments(), Snapshot(), 2 * 1597 - 1)
    assert (args.T_decay, args.a_lr, args.a_wd) == (0.96, 0.01, 5e-4)
    assert kept == {'T_decay': None, 'a_lr': None, 'a_wd': None}
    assert [temperature(epoch, args) for epoch in (9, 10, 50, 89)] == [5.0, 5.0, 5.0 * 0.96**40, 5.0 * 0.96**79]


@pytest.mark.parametrize('epochs', [1, 6, 20, 200])
def test_the_temperature_falls_as_far_in_any_number_of_epochs(epochs):
    args, _, line = with_schedule(arguments(epochs=10 + epochs), Snapshot(), 10)
    assert temperature(10, args) == 5 and temperature(10 + epochs, args) == pytest.approx(5 * 0.96**80)
    assert f'T falls from 5 to {temperature(9 + epochs, args):.2f} in {epochs} epochs' in line


def test_a_search_without_epochs_of_the_architecture_is_named():
    _, _, line = with_schedule(arguments(epochs=10), Snapshot(), 10)
    assert line == 'no epoch trains the architecture: --warmup_epochs is 10 of --epochs 10'


def test_rate_and_decay_of_the_architecture_follow_its_number_of_steps():
    steps = (100, 200, 1_000, 10_000, 60_000, 127_760, 10**6)
    rates, decays = [default_a_lr(count) for count in steps], [default_a_wd(count) for count in steps]
    assert rates[-2:] == [0.01, 0.01] and decays[-2:] == [5e-4, 5e-4]
    assert sorted(rates, reverse=True) == rates and sorted(decays) == decays
    assert len(set(rates)) == len(set(decays)) == 6
    assert default_a_lr(127_760 // 16) == 0.02 and default_a_lr(0) < 1  # 16 to the power 1/4 is 2
    assert default_a_wd(127_760 // 10) == pytest.approx(5e-5) and default_a_wd(0) == 0


def moved(gradient, a_lr, a_wd, steps=200, ops=8):
    """How far the log-probability of an operator rises above the others' by Adam, with a gradient for it alone."""
    log_alphas = torch.full((ops,), 1 / ops).log().requires_grad_()
    optimizer = torch.optim.Adam([log_alphas], a_lr, (0.5, 0.999), weight_decay=a_wd)
    for _ in range(steps):
        log_alphas.grad = torch.tensor([-gradient] + [gradient / (ops - 1)] * (ops - 1))
        optimizer.step()
        with torch.no_grad():
            log_alphas.copy_(log_alphas.log_softmax(0))
    return float((log_alphas[0] - log_alphas[1]).detach())


def test_the_published_decay_holds_small_gradients_back_at_any_rate():
    small = 1.5e-4  # a steady gradient at T = 5 of searches of the demo images
    assert all(abs(moved(small, a_lr, 5e-4)) < 0.01 for a_lr in (0.01, 0.05, 0.2, 1))
    assert moved(small, default_a_lr(200), default_a_wd(200)) > 2


def test_values_that_are_given_win_and_are_kept():
    given = arguments(T_decay=0.7, a_lr=0.3, a_wd=0.0)
    args, kept, line = with_schedule(given, from_flags(T_decay=0.96, a_lr=0.01, a_wd=5e-4), 10)
    assert (args.T_decay, args.a_lr, args.a_wd, line) == (0.7, 0.3, 0.0, '')
    assert kept == {'T_decay': 0.7, 'a_lr': 0.3, 'a_wd': 0.0}


def test_each_value_that_follows_from_the_length_is_explained_alone():
    _, _, line = with_schedule(arguments(T_decay=0.7, a_lr=0.3, epochs=30), Snapshot(), 20)
    assert line == '--a_wd 7.827e-07 (for 200 steps of the architecture)'


def test_a_resumed_run_keeps_its_values_and_otherwise_follows_its_length():
    longer = arguments(epochs=30)
    args, kept, line = with_schedule(longer, from_flags(T_decay=0.9, a_lr=None, a_wd=5e-4), 20)
    assert kept == {'T_decay': 0.9, 'a_lr': None, 'a_wd': 5e-4} and (args.T_decay, args.a_wd) == (0.9, 5e-4)
    assert args.a_lr == default_a_lr(200)
    assert line == (
        '--T_decay 0.9 (as before), --a_lr 0.05 (for 200 steps of the architecture), --a_wd 0.0005 (as before)'
    )
    again, kept, _ = with_schedule(longer, from_flags(**kept), 20)
    assert again == args and kept == {'T_decay': 0.9, 'a_lr': None, 'a_wd': 5e-4}
    with pytest.raises(BadInput, match="its a_lr is 'x', should be a number"):
        with_schedule(longer, from_flags(a_lr='x'), 20)


def test_a_search_follows_its_schedule_and_warns_that_it_has_neither_learned_nor_decided(images, monkeypatch, tmp_path):
    write_table(tmp_path / 'table.pkl')
    flags = good_flags('train_search.py', images, tmp_path / 'table.pkl', tmp_path / 'runs')
    flags |= {'warmup_epochs': 1, 'batch_size': 10, 'w_lr': 1e-9, 'report': None}
    assert run_here(monkeypatch, 'train_search.py', words_of(flags | {'epochs': 3, 'save_freq': 0})) == 0
    folder = only_run(tmp_path / 'runs')
    log = (folder / 'log.txt').read_text()
    decay = 0.96**40
    assert f'--T_decay {decay:.4g} (T falls from 5 to {5 * decay:.2f} in 2 epochs), --a_lr 0.159 (for 2 steps' in log
    assert 'epoch 1 w_lr 0.00000 T 5.0000' in log and f'epoch 2 w_lr 0.00000 T {5 * decay:.4f}' in log
    assert log.count('has hardly learned') == log.count('has not decided') == 1
    assert log.index('epoch 0 Gumbel paths') < log.index('has hardly learned') < log.index('epoch 1 ')
    assert log.index('epoch 2 Gumbel paths') < log.index('has not decided')
    followed = read_run(folder).header['flags']
    assert (followed['T_decay'], followed['a_lr']) == (pytest.approx(decay, abs=1e-6), 0.159)
    checkpoint = load(folder / 'searched_model_03.pth.tar')
    assert checkpoint['flags']['T_decay'] is None and checkpoint['flags']['a_lr'] is None


@pytest.mark.parametrize(
    ('top1', 'classes', 'warned'), [(19.9, 10, True), (20.1, 10, False), (74.0, 2, True), (76.0, 2, False)]
)
def test_a_supernet_near_chance_is_warned_of(top1, classes, warned):
    lines = []
    warn_not_learned(top1, classes, lambda text, *values: lines.append(text % values))
    assert len(lines) == warned and all(f'{top1} %' in line and '--warmup_epochs' in line for line in lines)


def test_a_search_that_ends_undecided_is_warned_of():
    lines = []
    for row in ([0.5, 0.3, 0.2], [0.6, 0.2, 0.2]):  # entropies 0.94 and 0.86
        warn_not_decided([row, row], None, {'stage1': [0, 1]}, lambda text, *values: lines.append(text % values))
    assert len(lines) == 1 and 'is 0.94' in lines[0]


@pytest.mark.parametrize(
    ('before', 'changed', 'blocks'),
    [
        ({'stage1': [0, 1], 'stage2': [2]}, 0, 3),
        ({'stage1': [0, 1], 'stage2': [1]}, 1, 3),  # a third
        ({'stage1': [0], 'stage2': [1]}, 2, 3),  # another operator and a block less
        ({'stage1': [0, 1, 1], 'stage2': [1]}, 2, 4),
    ],
)
def test_a_search_whose_choice_still_changes_is_warned_of(before, changed, blocks):
    after, lines = {'stage1': [0, 1], 'stage2': [2]}, []
    assert changed_blocks(before, after) == changed_blocks(after, before) == (changed, blocks)
    warn_not_decided([[0.9, 0.1]], before, after, lambda text, *values: lines.append(text % values))
    if changed < 2:
        assert lines == []
    else:
        assert len(lines) == 1 and f'not settled: {changed} of {blocks} blocks' in lines[0]
