"""Runs that fail through no fault of their input end in one line, with exit code 1 and their files whole."""

import errno
import os
import re
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from bad_files import run_here as run_script_here
from search_runs import begin, flags, search, small_project, wait_for
from torch.utils.data import DataLoader
from training_runs import command, data, finish, load, only_run, run_here, start  # noqa: F401  (data: a fixture)
from training_runs import flags as training_flags

from models.search import remove_old_models, searched_model
from tools.checkpoint import LossCheck
from tools.errors import RunFailed, explain
from tools.training import Tally

CPU = torch.device('cpu')
NAN, ONE = torch.tensor(float('nan')), torch.tensor(1.0)


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    return small_project(tmp_path_factory.mktemp('small') / 'project')


def last_line(output):
    """The last line of a run that failed; the lines before it are the run's own."""
    assert 'Traceback' not in output and 'Logging error' not in output, output
    return output.splitlines()[-1]


def test_a_search_stops_at_the_step_whose_loss_is_nan(project):
    save = project / 'nan'
    line = last_line(search(project, save, 1, w_lr=1e30, save_freq=0))
    place = re.search(r'NaN or infinite at epoch 0 step (\d+) \(learning rate 1e\+30\)', line)
    step = int(place[1])
    assert f'the last good checkpoint is {only_run(save)}/checkpoint.pth.tar; a smaller learning rate may help' in line
    checkpoint = load(only_run(save) / 'checkpoint.pth.tar')
    assert checkpoint['step'] == step - 1
    assert (only_run(save) / 'log.txt').read_text().count(' step ') == step


def test_training_stops_at_the_step_whose_loss_is_nan(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    assert run_script_here(monkeypatch, 'train_eval.py', training_flags(data, tmp_path, lr=1e30, epochs=1)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r'NaN or infinite at epoch 0 step \d+ .*; no checkpoint is written yet', line)


def test_an_update_with_a_bad_loss_is_left_out_and_the_last_good_state_is_kept(data, tmp_path, monkeypatch):  # noqa: F811
    """One image of NaN, in the third batch: the run ends, its checkpoint is that of two updates."""
    batches = DataLoader.__iter__

    def with_nan(self):
        for i, (images, labels) in enumerate(batches(self)):
            yield (images * float('nan') if i == 2 and self.drop_last else images), labels

    monkeypatch.setattr(DataLoader, '__iter__', with_nan)
    with pytest.raises(
        RunFailed, match='NaN or infinite at epoch 0 step 3 .*last good checkpoint is .*/checkpoint.pth'
    ):
        run_here(monkeypatch, training_flags(data, tmp_path, epochs=1, save_freq=0))
    checkpoint = load(only_run(tmp_path) / 'checkpoint.pth.tar')
    assert (checkpoint['epoch'], checkpoint['step']) == (0, 2)
    assert all(value.isfinite().all() for value in checkpoint['state_dict'].values())
    assert checkpoint['state_dict']['module.first_stem.bn.num_batches_tracked'] == 2


def test_a_check_remembers_the_first_bad_loss():
    check = LossCheck(CPU)
    for place, losses, bad in (('a', [ONE, ONE], ''), ('b', [ONE, NAN], 'b'), ('c', [ONE], 'b'), ('d', [-NAN], 'b')):
        check.check(place, losses)
        assert check.bad == bad
    infinite = LossCheck(CPU)
    infinite.check('e', [torch.tensor(float('inf'))])
    assert infinite.bad == 'e'


def test_bad_losses_do_not_count():
    tally = Tally(CPU)
    logits, labels = torch.eye(6), torch.arange(6)
    tally.add(ONE, logits, labels)
    tally.add(NAN, logits, labels)
    assert tally.read() == {'loss': 1.0, 'top1': 100.0, 'top5': 100.0, 'images': 6}


def test_a_full_disk_leaves_the_files_before_it_whole(project):
    """A limit on the size of files stands for the disk: a searched model is larger, the log is not."""
    save = project / 'full'
    search(project, save, epochs=2)
    folder = only_run(save)
    before = {path.name: path.read_bytes() for path in folder.glob('*.pth.tar')}
    words = command('train_search.py', flags(project, save, epochs=3, snapshot='auto'))
    line = last_line(finish(start(['bash', '-c', 'ulimit -f 60; exec "$@"', 'bash', *words], cwd=project), 1))
    assert re.search(r'searched_model_03.pth.tar could not be written \(File too large\)', line)
    assert {path.name: path.read_bytes() for path in folder.glob('*.pth.tar')} == before
    assert not list(folder.glob('.*.pth.tar.*'))


def test_a_log_that_cannot_be_written_ends_the_run(project):
    words = command('train_search.py', flags(project, project / 'log'))
    line = last_line(finish(start(['bash', '-c', 'ulimit -f 1; exec "$@"', 'bash', *words], cwd=project), 1))
    assert 'could not be written (File too large)' in line


@pytest.mark.parametrize(('keep', 'left'), [(1, [11]), (3, [9, 10, 11]), (None, list(range(12)))])
def test_as_many_searched_models_are_kept_as_asked_for(tmp_path, keep, left):
    (tmp_path / 'searched_model_best.pth.tar').write_text('of the user')
    for epoch in range(12):
        (tmp_path / searched_model(epoch)).touch()
        remove_old_models(tmp_path, epoch, keep)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f'searched_model_{epoch:02d}.pth.tar' for epoch in left] + ['searched_model_best.pth.tar']


def test_out_of_memory_names_sizes_and_flags():
    args = Namespace(batch_size=64, img_size=224, amp=False, checkpoint_ops=False)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    for error in (caught.value, torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'), MemoryError()):
        line = explain(error, args)
        assert line.startswith('out of memory with --batch_size 64, --img_size 224; smaller ones need less')
        assert '--checkpoint_ops, --amp' in line and '--grad_accum' not in line and '\n' not in line
    assert explain(RuntimeError('size mismatch'), args) == ''


@pytest.mark.parametrize(
    ('error', 'remedy'),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out "
         'of shared memory.', 'shared memory (/dev/shm); a container needs --shm-size'),
        ('Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: unable to open shared memory object '
         '</torch_1_2> in read-write mode: No space left on device (28)', '--workers 0 needs none'),
        ('unable to open file: Too many open files (24)', 'ulimit -n 65536'),
        ('received 0 items of ancdata', 'ulimit -n 65536'),
    ],
)  # fmt: skip
def test_limits_of_containers_are_named_with_their_remedy(error, remedy):
    line = explain(RuntimeError(error), Namespace())
    assert remedy in line and '\n' not in line
    assert 'ulimit -n 65536' in explain(OSError(24, 'Too many open files'), Namespace())


def test_a_killed_process_that_loads_images_leads_to_one_line(project):
    process = begin(project, project / 'worker', workers=1, epochs=40)
    wait_for(process, r'epoch 0 step 5/')
    children = [int(pid) for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]
    os.kill(children[0], signal.SIGKILL)
    line = last_line(finish(process, 1))
    assert (
        re.search(r'a process that loads images ended \((DataLoader worker \(pid|in the middle|\[Errno)', line)
        and '--snapshot auto' in line
    )


def test_a_lost_worker_is_not_taken_for_another_process():
    lost = ConnectionResetError(104, 'Connection reset by peer')
    assert 'a process that loads images ended' in explain(lost, Namespace(workers=1, snapshot=None))
    lost = RuntimeError('[gloo] Connection closed by peer')
    assert explain(lost, Namespace(workers=1, snapshot=None)) == 'another process of this run ended; see its message'


def resources(pid):
    """Resident memory in MB and open files of a process; of the files the fewest of ten looks.

    Those of starting workers and of a save come and go.
    """
    pages, files = int(Path(f'/proc/{pid}/statm').read_text().split()[1]), []
    for _ in range(10):
        files.append(len(list(Path(f'/proc/{pid}/fd').iterdir())))
        time.sleep(0.02)
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**20, min(files)


@pytest.mark.slow
def test_2000_steps_need_no_more_memory_or_files_than_200(project):
    epochs = 200
    changes = {'epochs': epochs, 'warmup_epochs': 20, 'workers': 1, 'save_freq': 0.01, 'print_freq': 5}
    process = begin(project, project / 'long', **changes)
    wait_for(process, r'epoch 40 step 10/')
    start_memory, start_files = resources(process.pid)
    wait_for(process, rf'epoch {epochs - 2} step 10/')
    memory, files = resources(process.pid)
    print(f'memory {start_memory:.1f} -> {memory:.1f} MB, open files {start_files} -> {files}')
    finish(process)
    assert memory - start_memory < 20 and files <= start_files + 1


@pytest.mark.parametrize('number', [errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT])
def test_a_folder_that_takes_no_more_files_is_named_in_one_line(number):
    error = OSError(number, os.strerror(number), 'run/checkpoint.pth.tar')
    line = explain(error, Namespace())
    verb = 'opened' if number in (errno.EACCES, errno.EPERM) else 'written'  # the former when reading too
    assert line.startswith(f'run/checkpoint.pth.tar could not be {verb}') and '\n' not in line


@pytest.mark.skipif(sys.platform != 'linux', reason='needs glibc')
def test_freed_memory_of_large_tensors_is_kept(run_script):
    """Three tensors of 64 MB one after the other: 16,384 pages each where the system has to give them anew."""
    code = """
import resource, torch
from tools.environment import prepare
prepare(torch.device('cpu'))
for _ in range(10):  # until the heap has its size
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(1 << 24)
print('faults', resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    assert int(re.search(r'faults (\d+)', run_script('-c', code).stdout).group(1)) < 1000
