"""Runs that are killed, stopped and restarted end as if nothing had happened."""

import os
import random
import shlex
import signal
from argparse import Namespace

import pytest
import torch
from bad_files import run_here
from training_runs import (
    assert_same_end,
    command,
    data,  # noqa: F401  (a fixture)
    finish,
    flags,
    kill_all,
    load,
    only_run,
    ranks_of,
    run,
    small_config,
    start,
    wait_for_steps,
)
from training_runs import run_here as train_here

from conftest import SMALL_SPACE, new_search
from models.model_eval import NetworkEval
from models.search import SEARCH
from tools.checkpoint import Checkpointer, find_snapshot, keep_previous, previous_of
from tools.distributed import World
from tools.errors import BadInput
from tools.files import load_checkpoint, save_checkpoint
from tools.precision import Precision
from tools.run import METRICS, RunLogger
from tools.training import TRAINING, start_state


def save_and_keep_previous(value, path):
    save_checkpoint(value, path, lambda: keep_previous(path))


EXTRAS = {'ema_decay': 0.9, 'mixup': 0.2, 'cutmix': 1.0, 'auto_augment': 'trivialaugment', 'no_weight_decay_bn': True}


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):  # noqa: F811
    """Folders of runs that nothing disturbed, by number of processes; made when asked for."""
    made = {}

    def get(processes, **changes):
        key = (processes, *changes.items())
        if key not in made:
            save = tmp_path_factory.mktemp('whole')
            if processes == 1:
                with pytest.MonkeyPatch.context() as patch:
                    train_here(patch, flags(data, save, **changes))
            else:
                run('train_eval_amp.py', flags(data, save, **changes), processes=processes)
            made[key] = only_run(save)
        return made[key]

    return get


def kill_and_resume(data, save, processes, kills, rng, **changes):  # noqa: F811
    """Kill a run at random steps, resuming each time; returns how often a resumed run went on within an epoch."""
    words = flags(data, save, save_freq=0, snapshot='auto', **changes)
    inside = 0
    for _ in range(kills):
        process = start(command('train_eval_amp.py', words, processes))
        text = wait_for_steps(process, rng.randint(4, 8))  # a first update is saved by then, also of three batches
        kill_all(process)
        inside += 'goes on from' in text
    if processes == 1:
        with pytest.MonkeyPatch.context() as patch:
            train_here(patch, words)
    else:
        run('train_eval_amp.py', words, processes=processes)
    return inside


def test_killed_at_random_steps(data, whole, tmp_path):  # noqa: F811
    seed = random.randrange(1000)
    print('seed', seed)
    assert kill_and_resume(data, tmp_path, 1, 2, random.Random(seed), workers=1) == 1
    assert_same_end(only_run(tmp_path), whole(1))


@pytest.mark.slow
def test_two_processes_killed_at_random_steps(data, whole, tmp_path):  # noqa: F811
    seed = random.randrange(1000)
    print('seed', seed)
    kill_and_resume(data, tmp_path, 2, 1, random.Random(seed))
    assert_same_end(only_run(tmp_path), whole(2))


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize('changes', [EXTRAS, {'grad_accum': 3}, {'opt_level': 'O1'}], ids=str)
def test_killed_often_in_any_recipe(data, whole, tmp_path, processes, changes):  # noqa: F811
    seed = random.randrange(1000)
    print('seed', seed)
    kill_and_resume(data, tmp_path, processes, 3, random.Random(seed), **changes)
    assert_same_end(only_run(tmp_path), whole(processes, **changes))


@pytest.mark.slow
def test_torchrun_restarts_by_itself_in_the_same_folder(data, whole, tmp_path):  # noqa: F811
    words = command(
        'train_eval_amp.py', flags(data, tmp_path, save_freq=0, snapshot='auto'), 2, options=['--max-restarts=1']
    )
    process = start(words)
    wait_for_steps(process, 5)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    output = finish(process)
    assert f'goes on from {only_run(tmp_path)}/checkpoint' in output
    assert_same_end(only_run(tmp_path), whole(2))


@pytest.mark.parametrize(
    ('number', 'code'), [pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow), (signal.SIGINT, 130)]
)
def test_a_signal_to_all_processes_saves_and_prints_the_command_that_resumes(data, whole, tmp_path, number, code):  # noqa: F811
    process = start(command('train_eval_amp.py', flags(data, tmp_path, workers=1)))
    wait_for_steps(process, 4)
    os.killpg(process.pid, number)
    output = finish(process, code)
    assert f'stopped by {number.name}' in output
    assert 0 < load(only_run(tmp_path) / 'checkpoint.pth.tar')['step'] <= 10
    resume = shlex.split(output.splitlines()[-1].split(maxsplit=2)[2])
    finish(start(resume))
    assert_same_end(only_run(tmp_path), whole(1))


def test_all_processes_stop_after_the_same_update(data, whole, tmp_path):  # noqa: F811
    process = start(command('train_eval_amp.py', flags(data, tmp_path), 2))
    wait_for_steps(process, 4)
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    output = finish(process)
    assert output.count('stopped by SIGTERM') == 1
    resume = shlex.split(output.splitlines()[-1].split(maxsplit=2)[2])
    assert '--nproc_per_node=2' in resume
    finish(start(resume))
    assert_same_end(only_run(tmp_path), whole(2))


def test_a_signal_during_validation_keeps_the_epoch(data, whole, tmp_path, monkeypatch):  # noqa: F811
    process = start(command('train_eval_amp.py', flags(data, tmp_path)))
    wait_for_steps(process, 10)
    process.send_signal(signal.SIGTERM)
    finish(process)
    train_here(monkeypatch, flags(data, tmp_path, snapshot='auto'))
    assert_same_end(only_run(tmp_path), whole(1))


def damage(path, how):
    """Cut a file in half, or flip one of its bits."""
    content = bytearray(path.read_bytes())
    if how == 'flipped':
        content[len(content) // 2] ^= 1
    path.write_bytes(content if how == 'flipped' else content[: len(content) // 2])


def test_a_damaged_newest_file_and_other_flags_are_said_and_the_run_goes_on(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    train_here(monkeypatch, flags(data, tmp_path, max_steps=3, save_freq=0))
    newest = only_run(tmp_path) / 'checkpoint.pth.tar'
    damage(newest, 'flipped')
    before = sorted(newest.parent.iterdir())
    again = {'snapshot': 'auto', 'max_steps': 4, 'lr': 0.1}
    capsys.readouterr()
    assert run_here(monkeypatch, 'train_eval_amp.py', flags(data, tmp_path, **again, batch_size=8)) == 2
    bad = capsys.readouterr().err
    assert '--batch_size 4, now 8' in bad and len(bad.splitlines()) == 1
    assert sorted(newest.parent.iterdir()) == before
    assert run_here(monkeypatch, 'train_eval_amp.py', flags(data, tmp_path, **again)) == 0
    output = capsys.readouterr().out
    assert f'{newest}: cannot be read as a checkpoint' in output
    assert f'goes on from {previous_of(newest)}: epoch 0 step' in output
    assert 'the snapshot was made with other flags: --lr 0.05, now 0.1' in output


def test_a_finished_run_goes_on_to_more_epochs(data, tmp_path, monkeypatch):  # noqa: F811
    def train(save, **changes):
        assert run_here(monkeypatch, 'train_eval.py', flags(data, tmp_path / save, **changes)) == 0
        return load(only_run(tmp_path / save) / 'checkpoint.pth.tar')

    whole, part = train('whole'), train('parts', epochs=1)
    more = train('parts', snapshot='auto')
    assert part['epoch'] == 1 and more['epoch'] == 2
    assert not torch.equal(part['state_dict'][name := 'module.classifier.linear.weight'], more['state_dict'][name])
    assert all(torch.equal(value, more['state_dict'][key]) for key, value in whole['state_dict'].items())


GOOD = {
    'epoch': 1,
    'state_dict': {'weight': torch.arange(5000)},
    'best_acc_top1': 0.0,
    'best_acc_top5': 0.0,
    'optimizer': {},
}


@pytest.fixture
def folder(tmp_path):
    """A run folder with checkpoints of epochs 1 and 2; an older folder of that note, newer ones of others."""
    runs = [('20260101-000001-try', [7]), ('20260101-000002-try', [1, 2])]
    for name, epochs in [*runs, ('20260101-000003-other', [9]), ('20260101-000004-my-try', [8])]:
        one = tmp_path / f'eval-{name}'
        one.mkdir()
        for epoch in epochs:
            save_and_keep_previous(GOOD | {'epoch': epoch}, one / 'checkpoint.pth.tar')
        (one / METRICS).touch()
    os.utime(tmp_path / 'eval-20260101-000001-try' / 'checkpoint.pth.tar', (1, 1))
    return tmp_path / 'eval-20260101-000002-try'


def find(folder, snapshot):
    return find_snapshot(snapshot, str(folder.parent), 'try', TRAINING, World(torch.device('cpu')))


@pytest.mark.parametrize('snapshot', ['auto', 'path'])
@pytest.mark.parametrize('how', ['truncated', 'flipped', None])
def test_the_newest_good_file_is_taken(folder, how, snapshot):
    newest = folder / 'checkpoint.pth.tar'
    if how:
        damage(newest, how)
    found = find(folder, 'auto' if snapshot == 'auto' else str(newest))
    assert (found.folder, found.path) == (folder, previous_of(newest) if how else newest)
    assert found.checkpoint['epoch'] == (1 if how else 2)


def test_auto_looks_at_all_files_and_else_begins_a_new_run(folder):
    (folder / 'checkpoint.pth.tar').unlink()
    assert find(folder, 'auto').checkpoint['epoch'] == 1
    damage(folder / 'checkpoint.previous.pth.tar', 'truncated')
    assert find(folder, 'auto').checkpoint['epoch'] == 7
    damage(folder.parent / 'eval-20260101-000001-try' / 'checkpoint.pth.tar', 'truncated')
    found = find(folder, 'auto')
    assert found.folder is None


def test_a_snapshot_outside_of_run_folders_goes_on_in_a_new_one(folder, tmp_path):
    (tmp_path / 'mine').mkdir()
    path = (folder / 'checkpoint.pth.tar').rename(tmp_path / 'mine' / 'resume.pt')
    found = find(folder, str(path))
    assert (found.folder, found.path) == (None, path) and found.checkpoint['epoch'] == 2


@pytest.mark.parametrize('is_new', [True, False])
def test_bad_input_removes_only_the_folder_that_the_run_made(tmp_path, is_new):
    (tmp_path / 'mine.txt').write_text('not of the run')
    if not is_new:
        RunLogger(tmp_path, {'kind': 'run'})
    logger = RunLogger(tmp_path, {'kind': 'run'})
    with pytest.raises(BadInput), Checkpointer(logger, World(torch.device('cpu')), 10, {}, {}):
        raise BadInput('an image')
    assert (tmp_path / 'mine.txt').exists() != is_new


def test_a_resumed_run_has_the_hyperparameters_of_its_flags(data, tmp_path, monkeypatch):  # noqa: F811
    folder = train_here(monkeypatch, flags(data, tmp_path, epochs=1))
    changed = flags(data, tmp_path, epochs=2, snapshot='auto', weight_decay=0.25, momentum=0.5)
    assert train_here(monkeypatch, changed) == folder
    (group,) = load(folder / 'checkpoint.pth.tar')['optimizer']['param_groups']
    assert (group['weight_decay'], group['momentum']) == (0.25, 0.5)
    assert '--momentum 0.9, now 0.5' in (folder / 'log.txt').read_text()


@pytest.mark.parametrize('content', [None, b'', b'words', {'state_dict': {}}, {'epoch': 1}])
def test_a_snapshot_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / 'file.pth.tar'
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with pytest.raises(BadInput, match='--snapshot .*file.pth.tar'):
        find_snapshot(str(path), str(tmp_path), 'try', TRAINING, World(torch.device('cpu')))


@pytest.mark.parametrize('script', ['train_eval_amp.py', 'train_search.py'])
def test_a_checkpoint_with_any_part_of_another_type_is_good_or_bad_input(tmp_path, script):
    cpu, path = torch.device('cpu'), tmp_path / 'changed.pth.tar'
    args = Namespace(
        snapshot=None, save=str(tmp_path), note='try', compile=False, lr=0.5, momentum=0.9, weight_decay=0,
        no_weight_decay_bn=False, ema_decay=0.5,
    )  # fmt: skip

    def begin():
        if script == 'train_search.py':
            state, snapshot = (
                new_search(SMALL_SPACE, cpu, torch.float16),
                find_snapshot(args.snapshot, str(tmp_path), 'try', SEARCH, World(cpu)),
            )
            if snapshot.checkpoint:
                state.load(snapshot.checkpoint, snapshot.path, World(cpu))
            return state
        precision, snapshot = (
            Precision(cpu, torch.float16),
            find_snapshot(args.snapshot, str(tmp_path), 'try', TRAINING, World(cpu)),
        )
        return start_state(NetworkEval(small_config()), precision, snapshot, World(cpu), args)[0]

    state = begin()
    if script == 'train_search.py':
        state.begin_epoch()
    state.step = 3
    good, refused = state.to_checkpoint(vars(args)), 0
    args.snapshot = str(path)
    torch.save(good, path)
    assert begin().step == 3
    for key in good:
        for value in ('x', -1, 1.5, None, [], ['x'], {}, {'x': 1}, {1: {}}, torch.zeros(2)):
            torch.save(good | {key: value}, path)
            try:
                begin()
            except BadInput as e:
                refused += 1
                assert '\n' not in str(e) and 'changed.pth.tar' in str(e)
    assert refused > 5 * len(good)


def test_a_bad_snapshot_ends_in_one_line_before_a_folder_is_made(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    words = flags(data, tmp_path / 'save', snapshot=tmp_path / 'none')
    assert run_here(monkeypatch, 'train_eval.py', words) == 2
    output = ''.join(capsys.readouterr())
    assert len(output.splitlines()) == 1 and '--snapshot' in output and not (tmp_path / 'save').exists()


def test_any_flipped_bit_is_found_or_harmless(tmp_path):
    rng, path = random.Random(0), tmp_path / 'file'
    good = {'weights': torch.randn(40), 'step': 3, 'names': ['a', 'b']}
    torch.save(good, path)
    content = path.read_bytes()
    found = 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged[: rng.randrange(len(content))] if rng.random() < 0.2 else damaged)
        try:
            loaded = load_checkpoint(path)
        except BadInput:
            found += 1
        else:
            assert torch.equal(loaded.pop('weights'), good['weights']) and loaded == {'step': 3, 'names': ['a', 'b']}
    assert found > 100


def test_the_previous_file_is_kept_also_without_hard_links(tmp_path, monkeypatch):
    path = tmp_path / 'checkpoint.pth.tar'
    save_and_keep_previous({'n': 1}, path)
    save_and_keep_previous({'n': 2}, path)
    assert (load(path), load(previous_of(path))) == ({'n': 2}, {'n': 1})

    def refuse(*_):
        raise OSError('no hard links here')

    monkeypatch.setattr(os, 'link', refuse)
    save_and_keep_previous({'n': 3}, path)
    assert (load(path), load(previous_of(path))) == ({'n': 3}, {'n': 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint.previous.pth.tar', 'checkpoint.pth.tar']


def test_a_write_that_fails_leaves_the_old_file(data, tmp_path):  # noqa: F811
    path = tmp_path / 'checkpoint.pth.tar'
    save_and_keep_previous({'n': 1}, path)
    with pytest.raises(Exception, match='pickle'):
        save_and_keep_previous({'n': lambda: 0}, path)
    assert load(path) == {'n': 1}
