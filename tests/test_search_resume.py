"""Searches that are killed, stopped and resumed end as if nothing had happened."""

import math
import os
import random
import re
import shlex
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from search_runs import EPOCHS, assert_same_search, begin, kill_at, search, small_project, steps_logged, wait_for
from training_runs import command, finish, load, only_run, start, timeless

from conftest import RECIPE

MOMENTS = {
    'in a step': {'pattern': r' step \d+/'},
    'while saving': {'pattern': r' step \d+/', 'writing': True},
    'between epochs': {'pattern': r' step (\d+)/\1 '},
    'while scaling': {'pattern': r'After, the current lat'},
}
"""When a search is killed: after a line of its output, and then perhaps as soon as it writes a checkpoint."""


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    return small_project(tmp_path_factory.mktemp('small') / 'project')


@pytest.fixture(scope='module')
def whole(project):
    """Folder of a search that nothing disturbed."""
    save = project / 'whole'
    search(project, save, workers=2, keep_checkpoints='all')
    return only_run(save)


def parsed(project, folder, epochs):
    """The config of the network that a search found, as text."""
    path = folder / 'model.config'
    words = ['--model_path', folder / f'searched_model_{epochs:02d}.pth.tar', '--save_path', path]
    finish(start(command('parsing_model.py', [*words, '--num_classes', 3, '--img_size', 32]), cwd=project))
    return path.read_text()


def kill_and_resume(project, save, whole, kills, rng, processes=1, **changes):
    """Kill a search at random moments of all kinds, resume it each time, and let it end.

    Returns how many kills met it running and were followed by the steps that the search `whole` has made.
    """
    changes |= {'save_freq': 0, 'snapshot': 'auto'}
    expected = steps_logged((whole / 'log.txt').read_text())
    good = 0
    for i in range(kills):
        name = list(MOMENTS)[i % len(MOMENTS)]
        writing = save if MOMENTS[name].get('writing') else None
        skip = rng.randrange(1, 5) if name in ('in a step', 'while saving') else 0
        process = begin(project, save, processes, **changes)
        text = kill_at(
            process, MOMENTS[name]['pattern'], skip, writing, delay=rng.random() * (0.003 if writing else 0.04)
        )
        met = text is not None and (i == 0 or 'goes on from' in text)
        same = met and all(numbers == expected[step] for step, numbers in steps_logged(text).items())
        print(f'kill {i + 1} {name}: {"good" if same else "BAD" if met else "the search was over"}', flush=True)
        good += same
    search(project, save, processes=processes, **changes)
    assert steps_logged((only_run(save) / 'log.txt').read_text()) == expected
    return good


def test_killed_twice(project, whole):
    seed = random.randrange(1000)
    print('seed', seed)
    assert kill_and_resume(project, project / 'twice', whole, 2, random.Random(seed), workers=1) == 2
    assert_same_search(only_run(project / 'twice'), whole)


@pytest.mark.slow
def test_killed_at_20_random_moments(project):
    """Run with -s: prints each kill and '20 / 20'."""
    seed, kills, epochs = random.randrange(1000), 20, 14
    print('seed', seed)
    save = project / 'often'
    search(project, project / 'never', epochs=epochs)
    never = only_run(project / 'never')
    good = kill_and_resume(project, save, never, kills, random.Random(seed), epochs=epochs)
    assert_same_search(only_run(save), never, epochs)
    assert parsed(project, only_run(save), epochs) == parsed(project, never, epochs)
    print(f'{good} / {kills}')
    assert good == kills


@pytest.mark.parametrize(
    ('number', 'code'), [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_to_all_processes_saves_and_prints_the_command_that_resumes(project, whole, number, code):
    save = project / number.name
    process = begin(project, save, workers=2)
    wait_for(process, r'epoch 2 step 3/')
    os.killpg(process.pid, number)
    output = finish(process, code)
    assert f'stopped by {number.name}' in output and 'Traceback' not in output
    checkpoint = load(only_run(save) / 'checkpoint.pth.tar')
    assert checkpoint['epoch'] == 2 and 3 <= checkpoint['step'] <= 10
    resume = shlex.split(output.splitlines()[-1].split(maxsplit=2)[2])
    finish(start(resume, cwd=project))
    assert_same_search(only_run(save), whole)


@pytest.mark.slow
def test_a_signal_during_validation_keeps_the_epoch(project, whole):
    save = project / 'validation'
    process = begin(project, save)
    wait_for(process, r'epoch 3 step 10/10')
    process.send_signal(signal.SIGTERM)
    finish(process)
    output = search(project, save, snapshot='auto')
    assert 'epoch 3 step 10' in output or 'epoch 4 step 0' in output
    assert_same_search(only_run(save), whole)
    assert timeless(only_run(save)) == timeless(whole)


def test_a_search_goes_on_from_a_searched_model_after_damage_to_later_ones(project, whole):
    save = project / 'damaged'
    shutil.copytree(whole, save / whole.name)
    for name in ('searched_model_04.pth.tar', 'searched_model_03.pth.tar'):
        path = save / whole.name / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    output = search(project, save, snapshot='auto')
    assert output.count('cannot be read as a checkpoint') == 2
    assert f'goes on from {save / whole.name / "searched_model_02.pth.tar"}: epoch 2 step 0' in output
    assert_same_search(only_run(save), whole)


def test_a_finished_search_is_over(project, whole):
    output = search(project, whole.parent, snapshot='auto')
    assert 'goes on from' in output and ' step 1/' not in output
    assert f'searched model: {whole}/searched_model_{EPOCHS:02d}.pth.tar\n' in output


@pytest.fixture(scope='module')
def stopped(project):
    """Folder of a search that a signal stopped within epoch 2."""
    save = project / 'stopped'
    process = begin(project, save)
    wait_for(process, r'epoch 2 step 3/')
    process.send_signal(signal.SIGTERM)
    finish(process)
    return only_run(save)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'num_classes': 4}, 'weights of another network: 2 wrong shape (classifier.linear.weight [3, 16] for [4, 16]'),
        ({'batch_size': 5}, 'is from within an epoch and was made with other flags: --batch_size 4, now 5'),
        ({'snapshot': 'training.pth.tar'}, '--snapshot training.pth.tar: not a checkpoint of a search'),
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused_in_one_line(project, stopped, changes, message):
    torch.save({'epoch': 1, 'state_dict': {}, 'optimizer': {}}, project / 'training.pth.tar')
    before = sorted(stopped.iterdir())
    output = search(project, project / 'refused', 2, **{'snapshot': stopped / 'checkpoint.pth.tar'} | changes)
    assert message in output.splitlines()[-1] and 'Traceback' not in output, output
    assert sorted(stopped.iterdir()) == before and not (project / 'refused').exists()


def test_two_searches_into_one_folder_do_not_mix(project, stopped):
    save = project / 'shared'
    shutil.copytree(stopped, save / stopped.name)
    first = begin(project, save, snapshot='auto')
    wait_for(first, r' step \d+/')
    first.send_signal(signal.SIGSTOP)
    output = search(project, save, 2, snapshot='auto')
    first.send_signal(signal.SIGCONT)
    assert 'another run is writing into this folder' in output.splitlines()[-1]
    finish(first)


def test_flags_that_differ_are_named(project, stopped):
    save = project / 'differing'
    shutil.copytree(stopped, save / stopped.name)
    output = search(project, save, snapshot='auto', T=4, target_lat='50%')
    assert re.search(r'made with other flags: --T 5.0, now 4.0; --target_lat \S+, now \S+\n', output)


def test_a_search_resumed_within_an_epoch_has_the_hyperparameters_of_its_flags(project, stopped):
    save = project / 'hyperparameters'
    shutil.copytree(stopped, save / stopped.name)
    process = begin(project, save, snapshot='auto', w_lr=0.5, w_wd=0.25, a_lr=0.125, a_beta1=0.75)
    wait_for(process, r'epoch 2 step \d/')
    process.send_signal(signal.SIGTERM)
    finish(process)
    checkpoint = load(only_run(save) / 'checkpoint.pth.tar')
    assert checkpoint['epoch'] == 2
    (weights,), (architecture,) = (checkpoint[name]['param_groups'] for name in ('w_optimizer', 'a_optimizer'))
    assert weights['lr'] == pytest.approx(0.5 * (1 + math.cos(math.pi * 2 / EPOCHS)) / 2)
    assert weights['weight_decay'] == 0.25 and architecture['lr'] == 0.125 and architecture['betas'][0] == 0.75


def test_schedules_and_positions_follow_from_the_epoch():
    recipe = replace(RECIPE, T=5.0, T_decay=0.9, warmup_epochs=2)
    assert [recipe.temperature(epoch) for epoch in (0, 2, 4)] == pytest.approx([5.0, 5.0, 4.05])
    for steps in (7, 10):  # counted as a search does it
        counted = [(e, s) for e in range(5) for s in range(steps) if e >= 2 and s % 2 == 0]
        for epoch in range(5):
            for step in range(steps + 1):
                before = sum(at < (epoch, step) for at in counted)
                assert recipe.architecture_steps(epoch, step, steps) == before
