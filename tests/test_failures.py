"""What the machine does to a run ends in one line that names the remedy; and how processes of a run are found."""

import errno
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from search_runs import begin, small_project, wait_for
from training_runs import command, finish, flags, load, only_run, start

from conftest import ROOT
from tools.distributed import find_launch
from tools.errors import BadInput, explain


@pytest.mark.parametrize(
    ('error', 'remedy'),
    [
        (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'), '--batch_size 64, --img_size 224'),
        (MemoryError(), '--checkpoint_ops, --amp'),
        (
            RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error.\nout of shared memory.'),
            '--shm-size',
        ),
        (RuntimeError('unable to open shared memory object </torch_1> in read-write mode'), '--workers 0 needs none'),
        (RuntimeError('unable to open file: Too many open files (24)'), 'ulimit -n 65536'),
        (RuntimeError('received 0 items of ancdata'), 'ulimit -n 65536'),
        (ConnectionResetError(104, 'Connection reset by peer'), 'a process that loads images ended'),
        (OSError(errno.EACCES, 'Permission denied', 'run/a.pth.tar'), 'run/a.pth.tar could not be opened'),
        (OSError(errno.EDQUOT, 'Disk quota exceeded', 'run/a.pth.tar'), 'run/a.pth.tar could not be written'),
        (RuntimeError('size mismatch'), None),
    ],
)
def test_errors_of_the_machine_are_one_line_with_a_remedy(error, remedy):
    args = Namespace(batch_size=64, img_size=224, amp=False, checkpoint_ops=False, workers=1, snapshot=None)
    line = explain(error, args)
    assert '\n' not in line and (line == '' if remedy is None else remedy in line)


def test_a_lost_process_of_the_run_is_not_taken_for_a_worker():
    lost = RuntimeError('[gloo] Connection closed by peer')
    assert explain(lost, Namespace(workers=1)) == 'another process of this run ended; see its message'


def test_a_killed_process_that_loads_images_leads_to_one_line(tmp_path):
    project = small_project(tmp_path / 'project')
    process = begin(project, project / 'worker', workers=1, epochs=40)
    wait_for(process, r'epoch 0 step 5/')
    children = [int(pid) for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]
    os.kill(children[0], signal.SIGKILL)
    output = finish(process, 1)
    assert 'Traceback' not in output
    assert re.search(r'a process that loads images ended .*--snapshot auto', output.splitlines()[-1])


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


def test_a_console_that_is_closed_or_of_few_characters_is_no_error(tmp_path):
    words = [sys.executable, 'dataset/make_lists.py', '--list', str(tmp_path / 'all.txt'), '--img_root']
    environment = os.environ | {'PYTHONIOENCODING': 'latin-1', 'PYTHONUTF8': '0'}
    done = subprocess.run([*words, tmp_path / 'Füße 猫'], cwd=ROOT, capture_output=True, env=environment)
    assert done.returncode == 2 and 'Füße ?'.encode('latin-1') in done.stderr
    process = subprocess.Popen([*words[:2], '--help'], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert b'Traceback' not in process.stderr.read() and process.wait() in (0, 120)


# --- launchers

MASTER = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': '29500'}


@pytest.fixture
def launched(monkeypatch):
    """Set the environment of a launcher."""

    def set_variables(**variables):
        for name in list(os.environ):
            if name in ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', *MASTER) or name.startswith('SLURM_'):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_variables


@pytest.mark.parametrize(
    ('variables', 'message'),
    [
        ({'WORLD_SIZE': 2, 'RANK': 0}, 'MASTER_ADDR'),
        ({'WORLD_SIZE': 2, **MASTER}, 'RANK'),
        ({'WORLD_SIZE': 2, 'RANK': 2, **MASTER}, 'process 2 of 2'),
        ({'WORLD_SIZE': 'two', 'RANK': 0}, 'WORLD_SIZE'),
    ],
)
def test_launches_that_cannot_work_are_refused(launched, variables, message):
    launched(**variables)
    with pytest.raises(BadInput, match=message):
        find_launch()


def test_processes_of_torchrun_and_srun_are_found(launched):
    launched(WORLD_SIZE=8, RANK=5, LOCAL_RANK=1, **MASTER)
    torchrun = find_launch()
    launched(SLURM_STEP_NUM_TASKS=8, SLURM_PROCID=5, SLURM_LOCALID=1, SLURM_JOB_ID=1, **MASTER)
    srun = find_launch()
    assert [(one.rank, one.size, one.local_rank) for one in (torchrun, srun)] == [(5, 8, 1)] * 2
    launched(SLURM_JOB_ID=5, SLURM_NTASKS=4, SLURM_PROCID=0)  # a batch script of SLURM that calls python itself
    assert find_launch() is None
    launched(SLURM_STEP_NUM_TASKS=1, SLURM_PROCID=0, SLURM_LOCALID=0)  # a step of one task, which has all its GPUs
    assert find_launch() is None


def test_two_processes_of_srun_train_one_network(data, tmp_path):
    """Together they make one run folder, and each sees half of the images."""
    slurm = {'SLURM_STEP_NUM_TASKS': '2', 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_JOB_ID': '7'}
    place = {'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(30000 + os.getpid() % 20000)}
    words = command('train_eval.py', flags(data, tmp_path, epochs=1))
    ranks = [{'SLURM_PROCID': str(rank), 'SLURM_LOCALID': str(rank)} for rank in range(2)]
    outputs = [finish(process) for process in [start(words, **slurm, **place, **rank) for rank in ranks]]
    assert load(only_run(tmp_path) / 'checkpoint.pth.tar')['epoch'] == 1
    assert 'epoch 0 step 10/10' in outputs[0] and 'step' not in outputs[1]
