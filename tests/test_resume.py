"""Runs that are killed, stopped, copied or damaged end as if nothing had happened, or in one line."""

import math
import os
import random
import re
import shlex
import shutil
import signal
import time
from argparse import Namespace

import pytest
import torch
from bad_files import run_here
from search_runs import flags as search_flags
from search_runs import small_project, wait_for
from torch.utils.data import DataLoader
from training_runs import (
    command,
    differences,
    finish,
    kill_all,
    load,
    only_run,
    ranks_of,
    small_config,
    start,
    timeless,
)
from training_runs import flags as training_flags
from training_runs import run_here as train_here

import train_eval
from conftest import SMALL_SPACE, new_search
from models.search import SEARCH, remove_old_models, searched_model
from tools.checkpoint import (
    STOP_SIGNALS,
    Checkpointer,
    LossCheck,
    Snapshot,
    StopRequest,
    compare_snapshot,
    find_snapshot,
    keep_previous,
    previous_of,
)
from tools.distributed import World
from tools.errors import BadInput, RunFailed
from tools.files import save_checkpoint
from tools.precision import Precision
from tools.run import METRICS, RunLogger
from tools.training import TRAINING

CPU = torch.device('cpu')
EXTRAS = {'ema_decay': 0.9, 'mixup': 0.2, 'cutmix': 1.0, 'auto_augment': 'trivialaugment', 'no_weight_decay_bn': True}
SCRIPTS = {'search': 'train_search.py', 'training': 'train_eval_amp.py'}
RESULTS = {'search': ['searched_model_04.pth.tar'], 'training': ['checkpoint.pth.tar', 'model_best.pth.tar']}
STOPS = {'search': ('epoch 0 step 4/', 'epoch 2 step 5/'), 'training': ('epoch 0 step 4/', 'epoch 1 step 5/')}


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    return small_project(tmp_path_factory.mktemp('small') / 'project')


@pytest.fixture(scope='module')
def data(project):
    return project / 'images'


def begin(kind, project, save, processes=1, options=(), **changes):
    """Start a search or a training in the project's copy."""
    if kind == 'search':
        words = search_flags(project, save, **changes)
    else:
        words = training_flags(project / 'images', save, **changes)
    return start(command(SCRIPTS[kind], words, processes, options=options), cwd=project)


@pytest.fixture(scope='module')
def whole(project):
    """Folders of runs that nothing disturbed; made when asked for."""
    made = {}

    def get(kind, processes=1, **changes):
        key = (kind, processes, *changes.items())
        if key not in made:
            save = project / f'whole{len(made)}'
            keep = {'keep_checkpoints': 'all'} if kind == 'search' else {}
            finish(begin(kind, project, save, processes, **keep, **changes))
            made[key] = only_run(save)
        return made[key]

    return get


def assert_same_end(kind, folder_a, folder_b):
    """Both runs left bit-identical files, and the same lines of metrics but for times."""
    for name in RESULTS[kind]:
        assert differences(load(folder_a / name), load(folder_b / name)) == []
    assert timeless(folder_a) == timeless(folder_b)


# --- stopped and resumed


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ('kind', 'processes', 'how', 'changes'),
    [
        ('search', 1, 'kill', {}),
        ('search', 1, 'signal', {}),
        slow('search', 2, 'kill', {}),
        slow('search', 2, 'signal', {}),
        ('training', 1, 'kill', {'workers': 1}),
        ('training', 1, 'signal', {}),
        slow('training', 2, 'kill', {}),
        ('training', 2, 'signal', {}),
        *(slow('training', n, 'kill', changes) for n in (1, 2) for changes in (EXTRAS, {'grad_accum': 3})),
    ],
)
def test_a_run_that_is_stopped_ends_as_one_that_is_not(project, whole, tmp_path, kind, processes, how, changes):
    """Stopped twice: early, and in the second half, where a search trains its architecture too."""
    again = changes | {'snapshot': 'auto', 'save_freq': 0 if how == 'kill' else 10}
    for place in STOPS[kind]:
        process = begin(kind, project, tmp_path, processes, **again)
        wait_for(process, place)
        time.sleep(random.random() * 0.03)
        if how == 'kill':
            kill_all(process)
            continue
        os.kill(ranks_of(process)[1] if processes > 1 else process.pid, signal.SIGTERM)
        output = finish(process)
        assert output.count('stopped by SIGTERM') == 1 and 'Traceback' not in output
    if how == 'signal':  # the command that the run printed last resumes it
        finish(start(shlex.split(output.splitlines()[-1].split(maxsplit=2)[2]), cwd=project))
    else:
        finish(begin(kind, project, tmp_path, processes, **again))
    assert_same_end(kind, only_run(tmp_path), whole(kind, processes, **changes))


@pytest.mark.slow
def test_torchrun_restarts_by_itself_in_the_same_folder(project, whole, tmp_path):
    again = {'save_freq': 0, 'snapshot': 'auto'}
    process = begin('training', project, tmp_path, 2, ['--max-restarts=1'], **again)
    wait_for(process, r' step \d+/', 5)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    assert f'goes on from {only_run(tmp_path)}/checkpoint' in finish(process)
    assert_same_end('training', only_run(tmp_path), whole('training', 2))


def test_a_signal_to_all_processes_during_validation_keeps_the_epoch(project, whole, tmp_path):
    """Processes that load images get it too, and nobody reads the output any more."""
    process = begin('training', project, tmp_path, workers=1)
    wait_for(process, r' step 10/')
    process.stdout.close()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    finish(begin('training', project, tmp_path, snapshot='auto'))
    assert_same_end('training', only_run(tmp_path), whole('training'))


@pytest.mark.parametrize('number', STOP_SIGNALS)
def test_signals_of_batch_systems_request_a_stop(number):
    before = signal.signal(number, signal.SIG_DFL)  # whatever started the tests may ignore it
    try:
        with StopRequest() as request:
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)
            assert request.signal == number
        assert signal.getsignal(number) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with StopRequest() as request:
            signal.raise_signal(signal.SIGHUP)
            assert request.signal == 0
    finally:
        signal.signal(number, before)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_search_takes_the_newest_good_model_and_ends_when_it_is_done(project, whole, tmp_path):
    folder = tmp_path / whole('search').name
    shutil.copytree(whole('search'), folder)
    output = finish(begin('search', project, tmp_path, snapshot='auto'))
    assert 'goes on from' in output and ' step 1/' not in output
    for number in (3, 4):
        damage(folder / searched_model(number), 'flipped')
    output = finish(begin('search', project, tmp_path, snapshot='auto'))
    assert f'goes on from {folder / searched_model(2)}: epoch 2 step 0' in output
    assert_same_end('search', folder, whole('search'))


@pytest.fixture(scope='module')
def stopped(project):
    """Folder of a search that a signal stopped within epoch 2."""
    process = begin('search', project, project / 'stopped')
    wait_for(process, r'epoch 2 step 3/')
    process.send_signal(signal.SIGTERM)
    finish(process)
    return only_run(project / 'stopped')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'num_classes': 4}, 'classifier.linear.weight'),
        ({'batch_size': 5}, '--batch_size 4, now 5'),
        ({'snapshot': 'training.pth.tar'}, 'training.pth.tar'),
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused_in_one_line(project, stopped, tmp_path, changes, message):
    torch.save({'epoch': 1, 'state_dict': {}, 'optimizer': {}}, project / 'training.pth.tar')
    before = sorted(stopped.iterdir())
    changes = {'snapshot': stopped / 'checkpoint.pth.tar'} | changes
    output = finish(begin('search', project, tmp_path / 'refused', **changes), 2)
    assert message in output.splitlines()[-1] and 'Traceback' not in output
    assert sorted(stopped.iterdir()) == before and not (tmp_path / 'refused').exists()


def test_two_searches_into_one_folder_do_not_mix(project, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / stopped.name)
    first = begin('search', project, tmp_path, snapshot='auto')
    wait_for(first, r' step \d+/')
    first.send_signal(signal.SIGSTOP)
    output = finish(begin('search', project, tmp_path, snapshot='auto'), 2)
    kill_all(first)
    assert 'another run is writing into this folder' in output.splitlines()[-1]


def test_a_resumed_search_has_the_hyperparameters_of_its_flags(project, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / stopped.name)
    process = begin('search', project, tmp_path, snapshot='auto', w_lr=0.5, w_wd=0.25, a_lr=0.125, a_beta1=0.75)
    output = wait_for(process, r'epoch 2 step \d/')
    process.send_signal(signal.SIGTERM)
    finish(process)
    checkpoint = load(only_run(tmp_path) / 'checkpoint.pth.tar')
    (weights,), (architecture,) = (checkpoint[name]['param_groups'] for name in ('w_optimizer', 'a_optimizer'))
    assert weights['lr'] == pytest.approx(0.5 * (1 + math.cos(math.pi * 2 / 4)) / 2)
    assert weights['weight_decay'] == 0.25 and architecture['lr'] == 0.125 and architecture['betas'][0] == 0.75
    assert '--w_wd 1e-05, now 0.25' in output


def test_a_training_goes_back_and_on_with_other_flags(data, tmp_path, monkeypatch):
    """From an earlier checkpoint, it goes on from there, whatever later files there are; then to more epochs."""
    run = train_here(monkeypatch, training_flags(data, tmp_path, epochs=3))
    back = training_flags(data, tmp_path, epochs=3, lr=0.01, snapshot=previous_of(run / 'checkpoint.pth.tar'))
    train_here(monkeypatch, [*back, '--max_steps', '22'])
    assert (run / 'checkpoint.pth.tar.superseded').exists()
    found = find_snapshot('auto', str(tmp_path), 'try', TRAINING, World(CPU))
    assert found.position == (2, 2) and found.checkpoint['flags']['lr'] == 0.01
    changed = training_flags(data, tmp_path, epochs=4, snapshot='auto', weight_decay=0.25, momentum=0.5)
    assert train_here(monkeypatch, changed) == run
    checkpoint = load(run / 'checkpoint.pth.tar')
    (group,) = checkpoint['optimizer']['param_groups']
    assert (checkpoint['epoch'], group['weight_decay'], group['momentum']) == (4, 0.25, 0.5)


# --- which checkpoint


def damage(path, how):
    """Cut a file in half, or flip one of its bits."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if how == 'flipped' else content[: len(content) // 2])


def checkpoint_of(epoch, step=0):
    weights = {'weight': torch.arange(5000)}
    return {
        'epoch': epoch,
        'step': step,
        'state_dict': weights,
        'best_acc_top1': 0,
        'best_acc_top5': 0,
        'optimizer': {},
    }


@pytest.fixture
def folder(tmp_path):
    """A run folder with checkpoints of epochs 1 and 2; an older folder of that note, newer ones of others."""
    runs = [('20260101-000001-try', [7]), ('20260101-000002-try', [1, 2])]
    for name, epochs in [*runs, ('20260101-000003-other', [9]), ('20260101-000004-my-try', [8])]:
        path = tmp_path / f'eval-{name}' / 'checkpoint.pth.tar'
        path.parent.mkdir()
        for epoch in epochs:
            save_checkpoint(checkpoint_of(epoch), path, lambda path=path: keep_previous(path))
        (path.parent / METRICS).touch()
    os.utime(tmp_path / 'eval-20260101-000001-try' / 'checkpoint.pth.tar', (1, 1))
    return tmp_path / 'eval-20260101-000002-try'


def find(folder, snapshot='auto', note='try', world=World(CPU)):  # noqa: B008
    return find_snapshot(str(snapshot), str(folder.parent), note, TRAINING, world)


@pytest.mark.parametrize('by_path', [False, True])
@pytest.mark.parametrize('how', ['truncated', 'flipped', None])
def test_the_newest_good_file_is_taken(folder, how, by_path):
    newest = folder / 'checkpoint.pth.tar'
    if how:
        damage(newest, how)
    found = find(folder, newest if by_path else 'auto')
    assert (found.folder, found.path) == (folder, previous_of(newest) if how else newest)
    assert found.position == (1 if how else 2, 0)


def test_auto_looks_at_all_files_and_else_begins_a_new_run(folder):
    (folder / 'checkpoint.pth.tar').unlink()  # as a kill may leave it where there are no hard links
    assert find(folder).position[0] == find(folder, folder / 'checkpoint.pth.tar').position[0] == 1
    damage(folder / 'checkpoint.previous.pth.tar', 'truncated')
    assert find(folder).position[0] == 7
    damage(folder.parent / 'eval-20260101-000001-try' / 'checkpoint.pth.tar', 'truncated')
    assert find(folder) == Snapshot()


def test_positions_in_the_files_decide_in_a_copied_folder(folder):
    for newer in ('checkpoint', 'checkpoint.previous'):
        os.utime(folder / f'{newer}.pth.tar', ns=(time.time_ns() + 10**9, time.time_ns() + 10**9))
        assert find(folder).path.name == 'checkpoint.pth.tar'


def test_a_snapshot_outside_of_run_folders_goes_on_in_a_new_one(folder, tmp_path):
    (tmp_path / 'mine').mkdir()
    path = (folder / 'checkpoint.pth.tar').rename(tmp_path / 'mine' / 'resume.pt')
    found = find(folder, path)
    assert (found.folder, found.path) == (None, path)


def test_processes_that_find_other_checkpoints_do_not_run(folder, monkeypatch):
    """As with a --save on a disk of each machine: the other process has another checkpoint, or none."""
    for other, fits in (((2, 0), True), ((2, 1), False), ((1, 9), False), ((-1, -1), False)):
        theirs = [*other, *(-number for number in other)]
        monkeypatch.setattr(World, 'all_max', lambda _, *own, theirs=theirs: list(map(max, own, theirs)))
        if fits:
            assert find(folder, world=World(CPU, 1, 2)).position == other
        else:
            with pytest.raises(BadInput, match='process 1 found .*checkpoint.pth.tar'):
                find(folder, world=World(CPU, 1, 2))


@pytest.mark.parametrize(
    ('position', 'flags', 'digest', 'refused', 'logged'),
    [
        ((1, 3), {'lr': 1, 'batch_size': 4}, 'abc', False, 0),
        ((1, 3), {'lr': 2, 'batch_size': 4}, 'abc', False, 1),
        ((1, 3), {'lr': 1, 'batch_size': 8}, 'abc', True, 0),
        ((1, 0), {'lr': 1, 'batch_size': 8}, 'abc', False, 1),
        ((1, 3), {'lr': 1, 'batch_size': 4}, 'new', True, 0),
        ((1, 0), {'lr': 1, 'batch_size': 4}, 'new', False, 1),
    ],
)
def test_what_differs_is_logged_or_refused_within_an_epoch(position, flags, digest, refused, logged, caplog):
    checkpoint = {'flags': {'lr': 1, 'batch_size': 4}, 'images': 'abc'}
    snapshot = Snapshot(checkpoint=checkpoint, position=position)
    if refused:
        with pytest.raises(BadInput, match='within an epoch'):
            compare_snapshot(snapshot, flags, digest)
    else:
        compare_snapshot(snapshot, flags, digest)
    assert len(caplog.messages) == logged


@pytest.mark.parametrize('kind', ['search', 'training'])
def test_a_checkpoint_with_any_part_of_another_type_is_good_or_bad_input(tmp_path, kind):
    path = tmp_path / 'changed.pth.tar'
    args = Namespace(
        lr=0.5, momentum=0.9, weight_decay=0, no_weight_decay_bn=False, ema_decay=0.5, seed=0, weights=None,
        dropout_rate=0, drop_connect_rate=0, channels_last=None,
    )  # fmt: skip

    def resumed(given):
        snapshot = find_snapshot(given, str(tmp_path), 'try', SEARCH if kind == 'search' else TRAINING, World(CPU))
        if kind == 'training':
            precision = Precision(CPU, torch.float16)
            state = train_eval.new_state(args, small_config(), World(CPU), precision, lambda net: net)
        else:
            state = new_search(SMALL_SPACE, CPU, torch.float16)
        if snapshot.checkpoint:
            state.load(snapshot.checkpoint, snapshot.path, World(CPU))
        return state

    state = resumed(None)
    if kind == 'search':
        state.begin_epoch()
    state.step = 3
    good, refused = state.to_checkpoint({}), 0
    torch.save(good, path)
    assert resumed(str(path)).step == 3
    for key in good:
        for value in ('x', -1, 1.5, None, [], ['x'], {}, {'x': 1}, {1: {}}, torch.zeros(2)):
            torch.save(good | {key: value}, path)
            try:
                resumed(str(path))
            except BadInput as e:
                refused += 1
                assert '\n' not in str(e) and 'changed.pth.tar' in str(e)
    assert refused > 5 * len(good)


# --- what goes wrong


def test_a_run_stops_before_the_update_whose_loss_is_bad(data, tmp_path, monkeypatch):
    """One image of NaN, in the third batch: the last checkpoint is that of two updates."""
    batches = DataLoader.__iter__

    def with_nan(self):
        for i, (images, labels) in enumerate(batches(self)):
            yield (images * float('nan') if i == 2 and self.drop_last else images), labels

    monkeypatch.setattr(DataLoader, '__iter__', with_nan)
    with pytest.raises(RunFailed, match='epoch 0 step 3 .*/checkpoint.pth'):
        train_here(monkeypatch, training_flags(data, tmp_path, epochs=1, save_freq=0))
    checkpoint = load(only_run(tmp_path) / 'checkpoint.pth.tar')
    assert (checkpoint['epoch'], checkpoint['step']) == (0, 2)
    assert all(value.isfinite().all() for value in checkpoint['state_dict'].values())
    assert checkpoint['state_dict']['module.first_stem.bn.num_batches_tracked'] == 2


def test_a_search_stops_at_the_step_whose_loss_is_nan(project, tmp_path):
    line = finish(begin('search', project, tmp_path, w_lr=1e30, save_freq=0), 1).splitlines()[-1]
    step = int(re.search(r'NaN or infinite at epoch 0 step (\d+)', line)[1])
    assert load(only_run(tmp_path) / 'checkpoint.pth.tar')['step'] == step - 1


def test_a_bad_loss_forbids_the_update_and_all_that_follow():
    state, checkpointer = Namespace(epoch=0, step=0, lr=0.1), Checkpointer(RunLogger(None, {}), World(CPU), 10, {}, {})
    losses = [torch.tensor(value) for value in (1.0, float('nan'), 1.0)]
    assert [checkpointer.allows_update(state, [loss, torch.tensor(1.0)]) for loss in losses] == [True, False, False]
    check = LossCheck(CPU)
    check.check('first', [torch.tensor(-math.inf)])
    check.check('second', [torch.tensor(math.nan)])
    assert check.bad == 'first'


@pytest.mark.parametrize(('blocks', 'name'), [(60, 'searched_model_03.pth.tar'), (1, '')])
def test_a_full_disk_is_named_and_leaves_the_files_before_it_whole(project, whole, tmp_path, blocks, name):
    """A limit on the size of files stands for the disk: a searched model is larger, and then the log is too."""
    shutil.copytree(whole('search'), tmp_path / whole('search').name)
    (tmp_path / whole('search').name / searched_model(4)).unlink()
    (tmp_path / whole('search').name / searched_model(3)).unlink()
    before = {path.name: path.read_bytes() for path in only_run(tmp_path).glob('*.pth.tar')}
    words = command('train_search.py', search_flags(project, tmp_path, snapshot='auto'))
    words = ['bash', '-c', f'ulimit -f {blocks}; exec "$@"', 'bash', *words]
    output = finish(start(words, cwd=project), 1)
    assert 'Traceback' not in output and f'{name} could not be written' in output.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in only_run(tmp_path).glob('*.pth.tar')} == before


@pytest.mark.parametrize('is_new', [True, False])
def test_bad_input_removes_only_the_folder_that_the_run_made(tmp_path, is_new):
    (tmp_path / 'mine.txt').write_text('not of the run')
    if not is_new:
        RunLogger(tmp_path, {'kind': 'run'}).close()
    with pytest.raises(BadInput), Checkpointer(RunLogger(tmp_path, {'kind': 'run'}), World(CPU), 10, {}, {}):
        raise BadInput('an image')
    assert (tmp_path / 'mine.txt').exists() != is_new


def test_a_bad_snapshot_ends_in_one_line_before_a_folder_is_made(data, tmp_path, monkeypatch, capsys):
    words = training_flags(data, tmp_path / 'save', snapshot=tmp_path / 'none')
    assert run_here(monkeypatch, 'train_eval.py', words) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and '--snapshot' in error and not (tmp_path / 'save').exists()


@pytest.mark.parametrize(('keep', 'left'), [(1, [11]), (3, [9, 10, 11]), (None, list(range(12)))])
def test_as_many_searched_models_are_kept_as_asked_for(tmp_path, keep, left):
    (tmp_path / 'searched_model_best.pth.tar').write_text('of the user')
    for epoch in range(12):
        (tmp_path / searched_model(epoch)).touch()
        remove_old_models(tmp_path, epoch, keep)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f'searched_model_{epoch:02d}.pth.tar' for epoch in left] + ['searched_model_best.pth.tar']
