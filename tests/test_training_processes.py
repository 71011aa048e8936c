"""Two processes compute what one computes, whatever started them; the first alone logs and writes."""

import os
import re
from argparse import Namespace

import pytest
import torch
import torch.multiprocessing as mp
from bad_files import run_here
from torch import nn
from training_runs import (
    Loader,
    differences,
    flags,
    load,
    only_run,
    run,
    small_config,
)
from training_runs import run_here as train_here

import train_eval
import train_eval_amp
from dataset.loaders import ImageSet, Loading, make_loader
from models.model_eval import NetworkEval
from tools.checkpoint import Checkpointer
from tools.distributed import World, join_world, leave_world
from tools.errors import BadInput
from tools.precision import Precision
from tools.run import RunLogger
from tools.training import TrainState, evaluate, wrap_model

IMAGES, LABELS = torch.randn(23, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(23) % 3


class Numbers(torch.utils.data.Dataset):
    """Random images by the keys of an `EpochSampler`."""

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, key):
        return IMAGES[key[1]], LABELS[key[1]]


def updates(rank, size, port, path):
    """In one of `size` processes, train and evaluate the small network, with batch norms and without."""
    torch.set_num_threads(1)
    os.environ |= {'RANK': str(rank), 'WORLD_SIZE': str(size), 'LOCAL_RANK': str(rank)}
    os.environ |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    world = join_world('cpu', None)
    results = [one_update(world, batch_norm) for batch_norm in (True, False)]
    if world.is_first:
        torch.save(results, path)
    leave_world(world)


def one_update(world, batch_norm):
    """Train for one update on a batch of 8 over all processes, and evaluate on 23 images."""
    torch.manual_seed(5)
    net = NetworkEval(small_config(batch_norm))
    net.eval().train = lambda mode=True: net
    args = Namespace(seed=1, label_smooth=0.1, grad_accum=1, grad_clip=0.1, print_freq=9, batch_size=8, max_steps=None)
    optimizer = torch.optim.SGD(net.parameters(), 0.5, 0.9, weight_decay=1e-4, fused=True)
    state = TrainState(net, wrap_model(net, world, False, None), optimizer, Precision(world.device))
    mine = slice(world.rank, 8, world.size)
    checkpointer = Checkpointer(RunLogger(None, {}), world, 10, {}, {})
    train = train_eval.train_epoch(state, Loader([(IMAGES[mine], LABELS[mine])]), None, args, checkpointer)
    part = ImageSet('.', [('', 0)] * 23, 'images')
    made = make_loader(part, None, Loading(32, 4, 0, seed=0), world, for_training=False)
    loader = torch.utils.data.DataLoader(Numbers(), made.batch_size, sampler=made.sampler)
    val = evaluate(net, loader, state.precision, world)
    return {'weights': net.state_dict(), 'train': train.numbers, 'val': val.numbers}


def test_an_update_and_an_evaluation_on_two_processes_are_those_of_one(tmp_path):
    mp.spawn(updates, (2, 29500 + os.getpid() % 2000, tmp_path / 'two'), nprocs=2)
    for batch_norm, two in zip((True, False), load(tmp_path / 'two'), strict=True):
        one = one_update(World(torch.device('cpu')), batch_norm)
        assert max((value - two['weights'][name]).abs().max() for name, value in one['weights'].items()) <= 1e-6
        assert one['val'] == pytest.approx(two['val'], abs=1e-6) and one['val']['images'] == 23
        assert one['train'] == pytest.approx(two['train'], abs=1e-6)


@pytest.mark.parametrize(
    ('launcher', 'script'),
    [
        ('torch.distributed.launch', 'train_eval.py'),
        pytest.param('torch.distributed.run', 'train_eval_amp.py', marks=pytest.mark.slow),
    ],
)
def test_the_scripts_on_two_processes_give_the_parameters_of_one(data, tmp_path, monkeypatch, launcher, script):
    changes = {'dropout_rate': 0, 'drop_connect_rate': 0, 'max_steps': 1, 'lr': 0.5}
    changes |= {'config_path': data / 'plain.config'}
    assert run_here(monkeypatch, script, flags(data, tmp_path / 'one', **changes)) == 0
    output = run(script, flags(data, tmp_path / 'two', workers=2, **changes), processes=2, launcher=launcher)
    one, two = (load(only_run(tmp_path / which) / 'checkpoint.pth.tar') for which in ('one', 'two'))
    assert max((value - two['state_dict'][name]).abs().max() for name, value in one['state_dict'].items()) <= 1e-6
    assert one['best_acc_top1'] == two['best_acc_top1']
    assert output.count('val_top1') == 1 and output.count(' step 1/1 ') == 1


def test_the_printed_accuracy_is_that_of_one_process_on_the_saved_weights(data, tmp_path, monkeypatch, capsys):
    output = run('train_eval_amp.py', flags(data, tmp_path, epochs=1, batch_size=8), processes=2)
    weights = only_run(tmp_path) / 'checkpoint.pth.tar'
    words = ['--val_root', data, '--val_list', data / 'val.txt', '--config_path', data / 'small.config']
    assert run_here(monkeypatch, 'test.py', [*words, '--workers', 0, '--weights', weights, '--device', 'cpu']) == 0
    tested = re.search(r'Val_acc_top1: (\S+)', capsys.readouterr().out)[1]
    assert tested == re.search(r'val_top1 (\S+)', output)[1]


@pytest.mark.parametrize('size', [1, 2, 3, 4])
@pytest.mark.parametrize('images', [23, 24, 7])
def test_every_validation_image_is_counted_once(size, images, monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(8)), raising=False)
    seen, part = [], ImageSet('.', [('', 0)] * images, '')
    for rank in range(size):
        world = World(torch.device('cpu'), rank, size)
        made = make_loader(part, None, Loading(32, 12, 5, seed=0), world, for_training=False)
        seen += [index for _, index in made.sampler]
        assert (made.batch_size, made.num_workers) == (12 // size, -(-5 // size))
    assert sorted(seen) == list(range(images))


def test_the_total_batch_is_shared_evenly_or_refused():
    with pytest.raises(BadInput, match='--batch_size 7 .* multiple of 2'):
        World(torch.device('cpu'), 0, 2).split_evenly(7, '--batch_size')


@pytest.fixture
def gpus(monkeypatch):
    """Stand-ins for two GPUs and for joining; the GPUs chosen and the backends, in order. No launcher."""
    calls = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', calls.append)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend, **_: calls.append(backend))
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize('flag', ['--local_rank=1', '--local-rank=1'])
def test_a_process_takes_the_gpu_of_its_local_rank(data, tmp_path, monkeypatch, gpus, flag):
    """The environment's LOCAL_RANK goes first; older launchers set only the flag."""
    given = {'RANK': '1', 'WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '1'}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    args = train_eval_amp.get_args([*flags(data, tmp_path), flag])
    assert join_world('auto', args.local_rank) == World(torch.device('cuda', 1), 1, 2)
    assert gpus == [torch.device('cuda', 1), 'cpu:gloo,cuda:nccl']
    monkeypatch.setenv('LOCAL_RANK', '0')
    assert join_world('auto', 1).device == torch.device('cuda', 0)


def test_one_process_uses_all_gpus_unless_a_launcher_gave_it_one(monkeypatch, gpus):
    wrapped, net = [], nn.Linear(1, 1)
    monkeypatch.setattr(nn, 'DataParallel', lambda net: wrapped.append(net) or net)
    alone = join_world('auto', None)
    assert alone == World(torch.device('cuda')) and alone.gpus == 2
    wrap_model(net, alone, False, torch.float16)
    for compiled, dtype, flag in ((True, None, '--compile'), (False, torch.bfloat16, '--amp')):
        with pytest.raises(BadInput, match=f'{flag}.* on 2 GPUs .* torchrun --nproc_per_node=2'):
            wrap_model(net, alone, compiled, dtype)
    for name, value in {'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '1'}.items():
        monkeypatch.setenv(name, value)
    launched, cpu = join_world('auto', None), join_world('cpu', None)
    assert launched == World(torch.device('cuda', 1)) and launched.gpus == 1 and cpu.gpus == 0
    wrap_model(net, launched, True, None)
    wrap_model(net, cpu, True, torch.bfloat16)
    assert wrapped == [net]
    train_eval_amp.check_sync_bn(launched)
    for world in (alone, World(torch.device('cpu'), 0, 2)):
        with pytest.raises(BadInput, match='--sync_bn'):
            train_eval_amp.check_sync_bn(world)


def test_synchronised_batch_norm_changes_nothing_in_one_process(data, tmp_path, monkeypatch):
    both = ({'sync_bn': True}, {})
    runs = [train_here(monkeypatch, flags(data, tmp_path / str(len(more)), epochs=1, **more)) for more in both]
    synchronised, plain = (load(run / 'checkpoint.pth.tar')['state_dict'] for run in runs)
    assert differences(synchronised, plain) == []


def test_a_bad_image_found_by_a_worker_ends_in_one_line(data, tmp_path):
    lines = (data / 'train.txt').read_text().splitlines()
    (tmp_path / 'bad.txt').write_text('\n'.join([lines[0], 'none.png 1', *lines[1:]]))
    output = run('train_eval.py', flags(data, tmp_path, train_list=tmp_path / 'bad.txt', workers=2), code=2)
    assert 'none.png: cannot be read as an image' in output.splitlines()[-1] and 'Traceback' not in output
