"""What clusters, copies and other programs do to a run: launchers, signals, copied folders, foreign checkpoints."""

import argparse
import csv
import errno
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import torch
from bad_files import run_here as run_script_here
from onnxruntime import quantization
from training_runs import command, data, finish, flags, load, only_run, run_here, small_config, start, wait_for_steps

import tools.files
from conftest import ROOT
from models.model_eval import NetworkEval, start_from_weights
from models.search import SEARCH, remove_old_models, searched_model
from tools.checkpoint import STOP_SIGNALS, StopRequest, find_snapshot, resume_command
from tools.distributed import World, find_launch
from tools.errors import BadInput
from tools.files import load_checkpoint, read_weights, save_checkpoint, write_text
from tools.options import DEFAULT_TABLE, project_file
from tools.training import TRAINING, load_moments, update_average

__all__ = ['data']

CPU = torch.device('cpu')
LAUNCHER_VARIABLES = ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')


@pytest.fixture
def launched(monkeypatch):
    """Set the environment of a launcher; what is set in it is gone after the test."""

    def set_variables(**variables):
        for name in list(os.environ):
            if name in LAUNCHER_VARIABLES or name.startswith(('SLURM_', 'OMPI_', 'PMI_', 'MPI_')):
                monkeypatch.delenv(name)
        for name in ('MASTER_ADDR', 'MASTER_PORT'):
            monkeypatch.setenv(name, '')
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_variables


@pytest.mark.parametrize(
    ('nodes', 'first'),
    [
        ('gpu[03-05,07],login', 'gpu03'),
        ('node1', 'node1'),
        ('a-1,b-2', 'a-1'),
        ('rack2-n[9,11]', 'rack2-n9'),
        ('r[1-2]n[08-12],x', 'r1n08'),
    ],
)
def test_processes_of_srun_find_each_other(launched, monkeypatch, nodes, first):
    launched(SLURM_STEP_NUM_TASKS=8, SLURM_PROCID=5, SLURM_LOCALID=1, SLURM_JOB_ID=123456, SLURM_STEP_NODELIST=nodes)
    launch = find_launch()
    assert (launch.rank, launch.size, launch.local_rank) == (5, 8, 1)
    port = os.environ['MASTER_PORT']
    assert os.environ['MASTER_ADDR'] == first and 20000 <= int(port) < 40000
    for name in ('MASTER_ADDR', 'MASTER_PORT'):
        os.environ.pop(name)
    monkeypatch.setenv('SLURM_STEP_ID', '4')  # another step of the job, which may run at the same time
    find_launch()
    assert os.environ['MASTER_PORT'] != port


def test_processes_of_mpirun_on_one_machine_find_each_other(launched, monkeypatch):
    launched(OMPI_COMM_WORLD_SIZE=4, OMPI_COMM_WORLD_RANK=3, OMPI_COMM_WORLD_LOCAL_RANK=3, OMPI_COMM_WORLD_LOCAL_SIZE=4)
    launch = find_launch()
    assert (launch.rank, launch.size, launch.local_rank, os.environ['MASTER_ADDR']) == (3, 4, 3, '127.0.0.1')
    monkeypatch.setattr(sys, 'argv', ['train_search.py', '--seed', '1', '--snapshot', 'auto'])
    words = resume_command(Path('c.pth.tar')).split()
    assert words == ['mpirun', '-n', '4', sys.executable, 'train_search.py', '--seed', '1', '--snapshot', 'c.pth.tar']
    launched(PMI_SIZE=2, PMI_RANK=1, MPI_LOCALRANKID=1, MPI_LOCALNRANKS=2)
    launch = find_launch()
    assert (launch.rank, launch.size, launch.local_rank, os.environ['MASTER_ADDR']) == (1, 2, 1, '127.0.0.1')


@pytest.mark.parametrize(
    ('variables', 'message'),
    [
        ({'WORLD_SIZE': 2, 'RANK': 0}, 'MASTER_ADDR and MASTER_PORT not set'),
        ({'WORLD_SIZE': 2, 'RANK': 0, 'MASTER_ADDR': 'localhost'}, '2 processes, but MASTER_PORT not set'),
        (
            {'WORLD_SIZE': 2, 'MASTER_ADDR': 'a', 'MASTER_PORT': 1},
            'RANK is not set; start the processes with: torchrun',
        ),
        ({'WORLD_SIZE': 2, 'RANK': 2, 'MASTER_ADDR': 'a', 'MASTER_PORT': 1}, 'this is process 2 of 2'),
        ({'WORLD_SIZE': 'two', 'RANK': 0}, "WORLD_SIZE='two' should be a whole number"),
        ({'OMPI_COMM_WORLD_SIZE': 4, 'OMPI_COMM_WORLD_RANK': 0, 'OMPI_COMM_WORLD_LOCAL_SIZE': 2}, 'MASTER_ADDR'),
    ],
)
def test_launches_that_cannot_work_are_refused(launched, variables, message):
    launched(**variables)
    with pytest.raises(BadInput, match=message):
        find_launch()


def test_a_process_without_a_launcher_is_alone(launched):
    launched(SLURM_JOB_ID=5, SLURM_NTASKS=4, SLURM_PROCID=0)  # a batch script of SLURM that calls python itself
    assert find_launch() is None
    launched(SLURM_STEP_NUM_TASKS=1, SLURM_PROCID=0, SLURM_LOCALID=0)  # a step of one task, which has all its GPUs
    assert find_launch() is None


def test_two_processes_of_srun_train_one_network(data, tmp_path):
    """Together they make one run folder, and each sees half of the images."""
    port = str(30000 + os.getpid() % 20000)
    processes = [
        start(
            command('train_eval.py', flags(data, tmp_path, epochs=1)),
            SLURM_STEP_NUM_TASKS='2', SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_STEP_NODELIST='localhost',
            SLURM_JOB_ID='7', MASTER_PORT=port,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [finish(process) for process in processes]
    assert load(only_run(tmp_path) / 'checkpoint.pth.tar')['epoch'] == 1
    assert 'epoch 0 step 10/10' in outputs[0] and 'step' not in outputs[1]


@pytest.mark.parametrize('number', STOP_SIGNALS)
def test_signals_of_batch_systems_request_a_stop(number):
    before = signal.signal(number, signal.SIG_DFL)  # whatever started the tests may ignore it
    try:
        with StopRequest() as request:
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)
            assert request.signal == number
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as request:
            signal.raise_signal(signal.SIGHUP)
            assert request.signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_preempted_training_saves_and_goes_on_without_a_console(data, tmp_path):
    """SIGUSR1 to all processes of the run, among them those that load images; nobody reads the output any more."""
    process = start(command('train_eval.py', flags(data, tmp_path, workers=1, epochs=40)))
    wait_for_steps(process, 3)
    process.stdout.close()
    time.sleep(1)
    os.killpg(process.pid, signal.SIGUSR1)
    assert process.wait(60) == 0
    checkpoint = load(only_run(tmp_path) / 'checkpoint.pth.tar')
    assert 10 * checkpoint['epoch'] + checkpoint['step'] > 3
    assert 'stopped by SIGUSR1; to go on:' in (only_run(tmp_path) / 'log.txt').read_text()


def test_output_that_nobody_reads_ends_a_listing_quietly(tmp_path):
    for i in range(2):
        (tmp_path / f'class{i}').mkdir()
        shutil.copy(ROOT / 'docs' / 'images' / 'search.png', tmp_path / f'class{i}' / 'a.png')
    words = [sys.executable, 'dataset/make_lists.py', '--img_root', str(tmp_path), '--list', str(tmp_path / 'all.txt')]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == '' and process.wait() == 0


def test_a_console_of_few_characters_shows_what_it_can(tmp_path):
    names = tmp_path / 'Füße 猫'
    words = [sys.executable, 'dataset/make_lists.py', '--img_root', str(names), '--list', str(tmp_path / 'all.txt')]
    environment = os.environ | {'PYTHONIOENCODING': 'latin-1', 'PYTHONUTF8': '0'}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, env=environment)
    assert done.returncode == 2 and 'Füße ?'.encode('latin-1') in done.stderr


def checkpoint_of(epoch, step):
    """A training's checkpoint without weights."""
    numbers = {'epoch': epoch, 'best_acc_top1': 1.0, 'best_acc_top5': 2.0}
    return {'state_dict': {}, 'optimizer': {}, **numbers} | ({'step': step} if step else {})


def test_position_in_the_files_decides_in_a_copied_folder(tmp_path, caplog):
    """Files of a run folder, copied in any order, at any time; and a newer run of the same note."""
    run = tmp_path / 'eval-20260101-000000-try'
    run.mkdir()
    for name, place in (('checkpoint', (3, 5)), ('checkpoint.previous', (3, 0))):
        save_checkpoint(checkpoint_of(*place), run / f'{name}.pth.tar')
    args = 'auto', str(tmp_path), 'try'
    for newer in ('checkpoint', 'checkpoint.previous'):
        os.utime(run / f'{newer}.pth.tar', ns=(time.time_ns() + 10**9, time.time_ns() + 10**9))
        assert find_snapshot(*args, TRAINING, World(CPU)).path.name == 'checkpoint.pth.tar'
    (run / 'checkpoint.pth.tar').write_bytes((run / 'checkpoint.pth.tar').read_bytes()[:300])
    found = find_snapshot(*args, TRAINING, World(CPU))
    assert found.path.name == 'checkpoint.previous.pth.tar' and 'cannot be read' in caplog.text
    other = tmp_path / 'eval-20260102-000000-try'
    other.mkdir()
    save_checkpoint(checkpoint_of(1, 0), other / 'checkpoint.pth.tar')
    os.utime(other / 'checkpoint.pth.tar', ns=(time.time_ns() + 2 * 10**9, time.time_ns() + 2 * 10**9))
    assert find_snapshot(*args, TRAINING, World(CPU)).path.parent == other
    given = str(run / 'checkpoint.pth.tar'), str(tmp_path), 'try'
    assert find_snapshot(*given, TRAINING, World(CPU)).path == run / 'checkpoint.previous.pth.tar'


def test_processes_that_find_other_checkpoints_do_not_run(tmp_path, monkeypatch):
    """As with a --save on a disk of each machine: the second process has an older checkpoint, or none."""
    furthest = []
    monkeypatch.setattr(World, 'all_max', lambda world, *own: [max(pair) for pair in zip(own, furthest, strict=True)])
    run = tmp_path / 'eval-20260101-000000-try'
    run.mkdir()
    save_checkpoint(checkpoint_of(3, 5), run / 'checkpoint.pth.tar')
    args = 'auto', str(tmp_path), 'try'
    furthest[:] = [3, 5, -3, -5]
    assert find_snapshot(*args, TRAINING, World(CPU, 1, 2)).path
    for other in ((3, 4), (2, 9), (4, 5), (-1, -1)):
        furthest[:] = [*other, *(-number for number in other)]
        with pytest.raises(BadInput, match='process 1 found .*checkpoint.pth.tar and others found another position'):
            find_snapshot(*args, TRAINING, World(CPU, 1, 2))
    furthest[:] = [3, 5, -3, -5]
    with pytest.raises(BadInput, match='process 1 found no checkpoint'):
        find_snapshot('auto', str(tmp_path), 'other', TRAINING, World(CPU, 1, 2))


def test_searched_models_of_old_and_new_numbering_resume_by_their_contents(tmp_path, caplog):
    """Before, epoch N was in file N; now file N has N epochs done, as the release numbers them."""
    run = tmp_path / 'search-20260101-000000-try'
    run.mkdir()
    base = {'state_dict': {}, 'mc_mask_dddict': {}, 'flags': {}}
    save_checkpoint(base | {'epoch': 6}, run / 'searched_model_06.pth.tar')  # old: seven epochs done
    save_checkpoint(base | {'epoch': 5}, run / 'searched_model_05.pth.tar')
    save_checkpoint(base | {'epoch': 7}, run / searched_model(8))
    args = 'auto', str(tmp_path), 'try'
    assert find_snapshot(*args, SEARCH, World(CPU)).path.name == 'searched_model_08.pth.tar'
    remove_old_models(run, 8, 2)
    assert find_snapshot(*args, SEARCH, World(CPU)).path.name == 'searched_model_08.pth.tar'
    (run / 'searched_model_08.pth.tar').unlink()
    save_checkpoint(base | {'epoch': 6}, run / 'searched_model_06.pth.tar')
    found = find_snapshot(*args, SEARCH, World(CPU))
    assert found.path.name == 'searched_model_06.pth.tar' and 'epoch 7 step 0' in caplog.text


@pytest.mark.parametrize(('code', 'fails'), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_file_systems_without_fsync_of_folders_take_files(tmp_path, monkeypatch, code, fails):
    def fsync(handle, call=os.fsync):
        if os.path.isdir(f'/proc/self/fd/{handle}'):
            raise OSError(code, os.strerror(code))
        call(handle)

    monkeypatch.setattr(tools.files.os, 'fsync', fsync)
    if fails:
        with pytest.raises(OSError, match='Input/output error'):
            write_text(tmp_path / 'a.txt', 'whole')
    else:
        write_text(tmp_path / 'a.txt', 'whole')
        assert (tmp_path / 'a.txt').read_text() == 'whole'


def test_the_moving_average_warms_up_as_by_hand():
    average, counter, decay = [torch.zeros(2)], [torch.tensor(0)], 0.9999
    expected = 0.0
    for n in range(1, 6):
        value = torch.full((2,), float(n))
        update_average(average, [value], torch.tensor(n), decay)
        update_average(counter, [torch.tensor(n)], torch.tensor(n), decay)
        share = (1 + n) / (10 + n)
        expected = share * expected + (1 - share) * n
    assert average[0].tolist() == pytest.approx([expected] * 2) and counter[0].item() == 5
    update_average(average, [torch.zeros(2)], torch.tensor(10**9), 0.5)
    assert average[0].tolist() == pytest.approx([expected / 2] * 2)


def test_a_slow_average_of_few_updates_is_close_to_the_weights(data, tmp_path, monkeypatch):
    run = run_here(monkeypatch, flags(data, tmp_path, epochs=3, ema_decay=0.9999))
    text = (run / 'log.txt').read_text()
    assert text.count('(moving average; the weights themselves: ') == 3
    checkpoint, start = load(run / 'checkpoint.pth.tar'), load(run / 'checkpoint.previous.pth.tar')
    name = 'classifier.linear.weight'
    average, weights = checkpoint['state_dict_ema'][f'module.{name}'], checkpoint['state_dict'][f'module.{name}']
    moved = (weights - start['state_dict'][f'module.{name}']).norm()
    assert 0 < (average - weights).norm() < 2 * moved  # with a decay of 0.9999 from the start: some 30 times


WRAPPED = ['module.', '_orig_mod.', 'model.', 'module.module.', 'module._orig_mod.', '_orig_mod.module.']


@pytest.mark.parametrize('prefix', WRAPPED)
@pytest.mark.parametrize('key', ['net', 'model_state_dict', 'weights', 'state_dict', 'model', ''])
def test_weights_of_other_programs_are_found(tmp_path, prefix, key):
    net = NetworkEval(small_config())
    state = {prefix + name: value for name, value in net.state_dict().items() if 'num_batches' not in name}
    args = argparse.Namespace(lr=0.1, rate=np.float32(0.5))
    beside = {'best': np.float64(71.25), 'epoch': np.int64(3), 'args': args, 'done': np.bool_(True)}
    torch.save({key: state, **beside} if key else state, tmp_path / 'w.pth')
    other = NetworkEval(small_config())
    assert 'left out' not in start_from_weights(other, tmp_path / 'w.pth')
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())
    if key:
        loaded = load_checkpoint(tmp_path / 'w.pth')
        assert (loaded['best'], loaded['epoch'], loaded['done'], loaded['args'].rate) == (71.25, 3, True, 0.5)


def test_a_type_that_is_not_read_is_named(tmp_path):
    torch.save({'state_dict': {}, 'path': Path('a')}, tmp_path / 'w.pth')
    with pytest.raises(BadInput, match=r'it holds a pathlib\.PosixPath; only tensors, numbers') as caught:
        read_weights(tmp_path / 'w.pth')
    assert '\x1b' not in str(caught.value) and '\n' not in str(caught.value)
    torch.save({'state_dict': {}, 'x': np.array(['a', None], dtype=object)}, tmp_path / 'w.pth')
    with pytest.raises(BadInput, match='it holds a numpy'):
        read_weights(tmp_path / 'w.pth')


def test_a_classifier_of_other_classes_is_left_out(tmp_path):
    net = NetworkEval(small_config())
    torch.save(net.state_dict(), tmp_path / 'w.pth')
    other = NetworkEval(small_config().with_classes(7))
    before = other.classifier.linear.weight.clone()
    line = start_from_weights(other, tmp_path / 'w.pth')
    assert line.endswith('left out: classifier.linear.weight, classifier.linear.bias, of other classes')
    assert torch.equal(other.classifier.linear.weight, before)
    assert torch.equal(other.first_stem.conv.weight, net.first_stem.conv.weight)
    torch.save({'backbone.weight': torch.ones(1)}, tmp_path / 'w.pth')
    with pytest.raises(BadInput, match='weights of another network'):
        start_from_weights(other, tmp_path / 'w.pth')


def test_fine_tuning_learns_in_fewer_epochs(data, tmp_path, monkeypatch):
    """From weights of the same task but for another classifier, one epoch gets further than from scratch."""
    teacher = run_here(monkeypatch, flags(data, tmp_path / 'teacher', epochs=12, lr=0.1))
    weights = load(teacher / 'model_best.pth.tar')['state_dict']
    weights = {name: value for name, value in weights.items() if 'classifier' not in name}
    linear = NetworkEval(small_config().with_classes(9)).classifier.state_dict()
    torch.save(weights | {f'classifier.{name}': value for name, value in linear.items()}, tmp_path / 'w.pth')
    losses = []
    for name, more in (('tuned', {'weights': tmp_path / 'w.pth'}), ('scratch', {})):
        run = run_here(monkeypatch, flags(data, tmp_path / name, epochs=2, lr=0.1, **more))
        text = (run / 'log.txt').read_text()
        assert ('left out: classifier.linear.weight' in text) == (name == 'tuned')
        losses.append(float(text.split('train_loss ')[2].split()[0]))
    assert losses[0] < losses[1] - 0.1, losses


def test_scripts_find_their_own_files_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert project_file(DEFAULT_TABLE, DEFAULT_TABLE) == str(ROOT / 'latency_pkl' / 'latency_gpu.pkl')
    assert project_file('absent.pkl', DEFAULT_TABLE) == 'absent.pkl'
    monkeypatch.chdir(ROOT)
    assert project_file(DEFAULT_TABLE, DEFAULT_TABLE) == DEFAULT_TABLE
    words = [sys.executable, str(ROOT / 'tools' / 'plots.py'), 'absent']
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and 'absent: no such file' in done.stderr


def test_names_of_classes_travel_from_folders_to_exports(data, tmp_path, monkeypatch, capsys):
    """From the folders of the training list to the run, its checkpoint, predictions for images, and exports."""
    run = run_here(monkeypatch, flags(data, tmp_path / 'run', epochs=1))
    names = ['class 0', 'class 1', 'class 2']
    assert (run / 'classes.txt').read_text().splitlines() == names
    checkpoint = load(run / 'checkpoint.pth.tar')
    assert checkpoint['class_names'] == names
    names = ['cat', 'big dog', 'it\'s "a" {cow}']
    torch.save(checkpoint | {'class_names': names}, tmp_path / 'named.pth.tar')
    words = ['--config_path', data / 'small.config', '--weights', tmp_path / 'named.pth.tar', '--img_size', '32']
    images, other = data / 'class 0', data / 'class 1' / '3.png'
    predictions = ['--val_root', data, '--val_list', data / 'val.txt', '--export_predictions', tmp_path / 'p.csv']
    capsys.readouterr()
    run_script_here(monkeypatch, 'test.py', [*words, '--workers', '0', '--image', images, other, *predictions])
    out = capsys.readouterr().out
    assert out.count('1. class ') == 21 and out.count(f'{data}/class') == 21
    label, name = re.search(r'1. class (\d) \((.*)\) probability', out).groups()
    assert name == names[int(label)]
    rows = list(csv.DictReader((tmp_path / 'p.csv').open()))
    assert len(rows) == 19 and all(row['name'] == names[int(row['predicted'])] for row in rows)
    for suffix in ('.py', '.onnx', '.safetensors', '.pt2'):
        run_script_here(monkeypatch, 'test.py', [*words, '--export', tmp_path / f'found{suffix}'])
    assert runpy.run_path(str(tmp_path / 'found.py'))['CLASSES'] == names
    session = onnxruntime.InferenceSession(tmp_path / 'found.onnx')
    assert json.loads(session.get_modelmeta().custom_metadata_map['class_names']) == names
    with safetensors.safe_open(tmp_path / 'found.safetensors', 'pt') as f:
        assert json.loads(f.metadata()['class_names']) == names
    extra = {'class_names.json': ''}
    torch.export.load(tmp_path / 'found.pt2', extra_files=extra)
    assert json.loads(extra['class_names.json']) == names


def test_a_run_that_went_back_is_not_resumed_from_where_it_was_before(data, tmp_path, monkeypatch):
    """Resumed from an earlier checkpoint and stopped, it goes on from there; later files are kept under other names."""
    run = run_here(monkeypatch, flags(data, tmp_path, epochs=3))
    back = flags(data, tmp_path, epochs=3, lr=0.01, snapshot=run / 'checkpoint.previous.pth.tar', max_steps=22)
    run_here(monkeypatch, back)
    assert (run / 'checkpoint.pth.tar.superseded').exists()
    assert 'beyond this position to *.superseded: checkpoint.pth.tar' in (run / 'log.txt').read_text()
    found = find_snapshot('auto', str(tmp_path), 'try', TRAINING, World(CPU))
    assert TRAINING.position(found.checkpoint) == (2, 2) and found.checkpoint['flags']['lr'] == 0.01


def test_moments_of_another_shape_are_refused():
    p = torch.nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.SGD([p], 0.1, 0.9, fused=True)
    saved = optimizer.state_dict() | {'state': {0: {'momentum_buffer': torch.zeros(3)}}}
    with pytest.raises(ValueError, match=r'momentum_buffer of shape \[3\] for a parameter of \[1000\]'):
        load_moments(optimizer, saved)


def test_advice_to_run_a_file_is_never_passed_on(tmp_path):
    (tmp_path / 'w.pth').write_bytes(b'\x80\x02cos\nsystem\n(S"true"\ntR.')
    with pytest.raises(BadInput) as caught:
        load_checkpoint(tmp_path / 'w.pth')
    assert 'weights_only' not in str(caught.value)


@pytest.mark.parametrize('opset', [13, 17])
def test_onnx_of_an_older_opset_is_asked_for_by_flag(data, tmp_path, monkeypatch, opset):
    """Checked by onnxruntime as it is written; and quantised to 8 bits, it still gives much the same."""
    torch.save(NetworkEval(small_config()).state_dict(), tmp_path / 'w.pth')
    path, small = tmp_path / 'net.onnx', tmp_path / 'int8.onnx'
    words = ['--config_path', data / 'small.config', '--weights', tmp_path / 'w.pth', '--img_size', '32']
    assert run_script_here(monkeypatch, 'test.py', [*words, '--export', path, '--opset', opset, '--fuse_bn']) == 0
    model = onnx.load(path)
    assert [entry.version for entry in model.opset_import if entry.domain == ''] == [opset]
    images = np.random.default_rng(0).normal(size=(16, 3, 32, 32)).astype(np.float32)

    class Reader(quantization.CalibrationDataReader):
        batches = iter([{'images': images}])

        def get_next(self):
            return next(self.batches, None)

    quantization.quantize_static(path, small, Reader())
    full, quantised = (onnxruntime.InferenceSession(p).run(None, {'images': images})[0] for p in (path, small))
    assert 0 < np.abs(full - quantised).max() < 0.25 * np.abs(full).max()
    assert run_script_here(monkeypatch, 'test.py', [*words, '--export', tmp_path / 'a.pt2', '--opset', opset]) == 2
