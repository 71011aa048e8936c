"""Schedules that follow from the length of a search, and warnings of a search that has not learned or decided."""

import math
from dataclasses import replace

import pytest
import torch
from bad_files import good_flags, run_here, words_of, write_table
from training_runs import load, only_run

from conftest import RECIPE
from models.describe import changed_blocks, mean_entropy, warn_not_decided, warn_not_learned
from models.search import default_schedule, settle_schedule
from tools.errors import BadInput
from tools.run import read_run


def test_entropy_by_hand():
    assert mean_entropy([[0.25] * 4, [0.25] * 4]) == pytest.approx(1)
    assert mean_entropy([[0.0, 1.0], [0.5, 0.5]]) == pytest.approx(0.5)
    one = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(3)
    assert mean_entropy([[0.9, 0.1, 0.0]]) == pytest.approx(one)
    assert mean_entropy([[1.0], [0.5, 0.5], [0.25] * 4]) == pytest.approx(2 / 3)


NOT_GIVEN = dict.fromkeys(('T_decay', 'a_lr', 'a_wd'))


def test_the_published_length_has_the_published_schedule():
    values, kept = settle_schedule(NOT_GIVEN, {}, 80, 127_760)
    assert values == {'T_decay': 0.96, 'a_lr': 0.01, 'a_wd': 5e-4} and kept == NOT_GIVEN
    recipe = replace(RECIPE, warmup_epochs=10, T_decay=0.96)
    assert [recipe.temperature(epoch) for epoch in (9, 10, 50, 89)] == [5.0, 5.0, 5.0 * 0.96**40, 5.0 * 0.96**79]


@pytest.mark.parametrize('epochs', [1, 6, 20, 200])
def test_the_temperature_falls_as_far_in_any_number_of_epochs(epochs):
    assert default_schedule(epochs, 10)['T_decay'] ** epochs == pytest.approx(0.96**80)


def test_rate_and_decay_of_the_architecture_follow_its_number_of_steps():
    steps = (100, 200, 1_000, 10_000, 60_000, 127_760, 10**6)
    rates, decays = ([default_schedule(80, count)[name] for count in steps] for name in ('a_lr', 'a_wd'))
    assert rates[-2:] == [0.01, 0.01] and decays[-2:] == [5e-4, 5e-4]
    assert sorted(rates, reverse=True) == rates and sorted(decays) == decays
    assert len(set(rates)) == len(set(decays)) == 6
    assert default_schedule(80, 127_760 // 16)['a_lr'] == 0.02  # 16 to the power 1/4 is 2
    assert default_schedule(80, 12_776)['a_wd'] == pytest.approx(5e-5)
    assert default_schedule(0, 0)['a_lr'] < 1 and default_schedule(0, 0)['a_wd'] == 0


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
    short = default_schedule(80, 200)
    small = 1.5e-4  # a steady gradient at T = 5 of searches of the demo images
    assert all(abs(moved(small, a_lr, 5e-4)) < 0.01 for a_lr in (0.01, 0.05, 0.2, 1))
    assert moved(small, short['a_lr'], short['a_wd']) > 2


def test_values_that_are_given_win_and_are_kept():
    given, saved = {'T_decay': 0.7, 'a_lr': 0.3, 'a_wd': 0.0}, {'T_decay': 0.96, 'a_lr': 0.01, 'a_wd': 5e-4}
    assert settle_schedule(given, saved, 10, 100) == (given, given)


def test_a_resumed_run_keeps_its_values_and_otherwise_follows_its_length():
    saved = {'T_decay': 0.9, 'a_lr': None, 'a_wd': 5e-4}
    values, kept = settle_schedule(NOT_GIVEN, saved, 20, 200)
    assert kept == saved and values == saved | {'a_lr': default_schedule(20, 200)['a_lr']}
    with pytest.raises(BadInput, match="its a_lr is 'x', should be a number"):
        settle_schedule(NOT_GIVEN, {'a_lr': 'x'}, 20, 200)


def test_a_search_follows_its_schedule_and_warns_that_it_has_neither_learned_nor_decided(images, monkeypatch, tmp_path):
    write_table(tmp_path / 'table.pkl')
    flags = good_flags('train_search.py', images, tmp_path / 'table.pkl', tmp_path / 'runs')
    flags |= {'warmup_epochs': 1, 'batch_size': 10, 'w_lr': 1e-9, 'report': None}
    assert run_here(monkeypatch, 'train_search.py', words_of(flags | {'epochs': 3, 'save_freq': 0})) == 0
    folder = only_run(tmp_path / 'runs')
    log = (folder / 'log.txt').read_text()
    decay = 0.96**40
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
def test_a_supernet_near_chance_is_warned_of(top1, classes, warned, caplog):
    warn_not_learned(top1, classes)
    assert len(caplog.messages) == warned


def test_a_search_that_ends_undecided_is_warned_of(caplog):
    for row in ([0.5, 0.3, 0.2], [0.6, 0.2, 0.2]):  # entropies 0.94 and 0.86
        warn_not_decided([row, row], None, {'stage1': [0, 1]})
    assert len(caplog.messages) == 1 and 'is 0.94' in caplog.text


@pytest.mark.parametrize(
    ('before', 'changed', 'blocks'),
    [
        ({'stage1': [0, 1], 'stage2': [2]}, 0, 3),
        ({'stage1': [0, 1], 'stage2': [1]}, 1, 3),  # a third
        ({'stage1': [0], 'stage2': [1]}, 2, 3),  # another operator and a block less
        ({'stage1': [0, 1, 1], 'stage2': [1]}, 2, 4),
    ],
)
def test_a_search_whose_choice_still_changes_is_warned_of(before, changed, blocks, caplog):
    after = {'stage1': [0, 1], 'stage2': [2]}
    assert changed_blocks(before, after) == changed_blocks(after, before) == (changed, blocks)
    warn_not_decided([[0.9, 0.1]], before, after)
    assert len(caplog.messages) == (changed >= 2)
