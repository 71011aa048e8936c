"""Two processes compute what one computes, whatever started them; the first alone logs and writes."""

import os
import re
import time
from argparse import Namespace

import pytest
import torch
import torch.multiprocessing as mp
from bad_files import run_here
from torch import nn
from training_runs import (
    Loader,
    data,  # noqa: F401  (a fixture)
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


class Numbers(torch.utils.data.Dataset):
    """Random images that their index decides."""

    def __len__(self):
        return 23

    def __getitem__(self, key):
        generator = torch.Generator().manual_seed(key[1])
        return torch.randn(3, 32, 32, generator=generator), key[1] % 3


def updates(rank, size, port, path):
    """Train the small network, with batch norms and without, for one update on a batch of 8 over `size` processes,
    evaluate it; the first saves."""
    torch.set_num_threads(1)
    os.environ |= {
        'RANK': str(rank),
        'WORLD_SIZE': str(size),
        'LOCAL_RANK': str(rank),
        'MASTER_ADDR': '127.0.0.1',
        'MASTER_PORT': str(port),
    }
    world = join_world('cpu', None)
    results = two_updates(world)
    if world.is_first:
        torch.save(results, path)
    leave_world(world)


def two_updates(world):
    return [one_update(world, batch_norm) for batch_norm in (True, False)]


def one_update(world, batch_norm):
    torch.manual_seed(5)
    net = NetworkEval(small_config(batch_norm))
    net.eval().train = lambda mode=True: net
    args = Namespace(
        seed=1, label_smooth=0.1, grad_accum=1, grad_clip=0.1, print_freq=9, batch_size=8, max_steps=None,
    )  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), 0.5, 0.9, weight_decay=1e-4, fused=True)
    state = TrainState(net, wrap_model(net, world, False, None), optimizer, Precision(world.device))
    batch = torch.stack([Numbers()[(0, i)][0] for i in range(8)]), torch.arange(8) % 3
    shard = tuple(part[world.rank :: world.size] for part in batch)
    logger = RunLogger(None, {})
    checkpointer = Checkpointer(logger, world, 10, {}, {})
    train = train_eval.train_epoch(state, Loader([shard]), None, args, checkpointer)
    val = evaluate(net, loader(world), state.precision, world)
    assert not train.stopped and not val.stopped
    return {'weights': net.state_dict(), 'train': train.numbers, 'val': val.numbers}


def loader(world):
    """Batches of the 23 images over the processes."""
    images = ImageSet('.', [('', 0)] * 23, 'images')
    made = make_loader(images, None, Loading(32, 4, 0, seed=0), world, for_training=False)
    return torch.utils.data.DataLoader(Numbers(), made.batch_size, sampler=made.sampler)


def test_an_update_and_an_evaluation_on_two_processes_are_those_of_one(tmp_path):
    mp.spawn(updates, (2, 29500 + os.getpid() % 2000, tmp_path / 'two'), nprocs=2)
    results = two_updates(World(torch.device('cpu'))), load(tmp_path / 'two')
    for one, two in zip(*results, strict=True):
        for name, value in one['weights'].items():
            assert (value - two['weights'][name]).abs().max() <= 1e-6, name
        for when in ('train', 'val'):
            assert one[when].keys() == two[when].keys()
            for number in ('top1', 'images'):
                assert one[when][number] == two[when][number]
            assert one[when]['loss'] == pytest.approx(two[when]['loss'], abs=1e-6)
        assert one['val']['images'] == 23
    assert results[0][0]['weights'].keys() != results[0][1]['weights'].keys()


STILL = {'dropout_rate': 0, 'drop_connect_rate': 0, 'max_steps': 1, 'lr': 0.5}


@pytest.mark.parametrize(
    ('launcher', 'script'),
    [
        ('torch.distributed.launch', 'train_eval.py'),
        pytest.param('torch.distributed.run', 'train_eval_amp.py', marks=pytest.mark.slow),
    ],
)
def test_the_scripts_on_two_processes_give_the_parameters_of_one(data, tmp_path, monkeypatch, launcher, script):  # noqa: F811
    changes = STILL | {'config_path': data / 'plain.config'}
    assert run_here(monkeypatch, script, flags(data, tmp_path / 'one', **changes)) == 0
    output = run(script, flags(data, tmp_path / 'two', workers=2, **changes), processes=2, launcher=launcher)
    one, two = (load(only_run(tmp_path / which) / 'checkpoint.pth.tar') for which in ('one', 'two'))
    assert max((value - two['state_dict'][name]).abs().max() for name, value in one['state_dict'].items()) <= 1e-6
    assert one['best_acc_top1'] == two['best_acc_top1']
    assert output.count('val_top1') == 1 and output.count('--batch_size 4') == 1
    log = (only_run(tmp_path / 'two') / 'log.txt').read_text()
    assert re.findall(r'step \d+/\d+', log) == ['step 1/1']


def test_the_printed_accuracy_is_that_of_one_process_on_the_saved_weights(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    output = run('train_eval_amp.py', flags(data, tmp_path, epochs=1, batch_size=8), processes=2)
    weights = only_run(tmp_path) / 'checkpoint.pth.tar'
    words = ['--val_root', data, '--val_list', data / 'val.txt', '--config_path', data / 'small.config']
    words += ['--num_classes', 3, '--img_size', 32, '--workers', 0, '--weights', weights, '--device', 'cpu']
    assert run_here(monkeypatch, 'test.py', words) == 0
    tested = capsys.readouterr().out
    trained = re.search(r'val_top1 (\S+)', output)[1]
    assert re.search(r'Val_acc_top1: (\S+)', tested)[1] == trained


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


@pytest.mark.parametrize(
    ('environment', 'word'),
    [
        ({'WORLD_SIZE': '2'}, 'RANK'),
        ({'WORLD_SIZE': '2', 'RANK': '2'}, 'process 2 of 2'),
        ({'WORLD_SIZE': 'two'}, 'WORLD_SIZE'),
        ({'WORLD_SIZE': '2', 'RANK': '0', 'LOCAL_RANK': 'x'}, 'LOCAL_RANK'),
    ],
)
def test_a_broken_launch_environment_is_named(monkeypatch, environment, word):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=word):
        join_world('cpu', None)


@pytest.mark.parametrize('flag', ['--local_rank=1', '--local-rank=1'])
def test_launchers_that_pass_the_rank_as_a_flag_are_read(data, tmp_path, monkeypatch, flag):  # noqa: F811
    """The environment's LOCAL_RANK goes first; older launchers set only the flag."""
    joined = []
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend, **_: joined.append(backend))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', joined.append)
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    here = {'RANK': '1', 'WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '1'}
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr('sys.argv', ['train_eval_amp.py', *flags(data, tmp_path), flag])
    world = join_world('auto', train_eval_amp.get_args().local_rank)
    assert world == World(torch.device('cuda', 1), 1, 2)
    assert joined == [torch.device('cuda', 1), 'cpu:gloo,cuda:nccl']
    monkeypatch.setenv('LOCAL_RANK', '0')
    assert join_world('auto', 1).device == torch.device('cuda', 0)


def test_one_process_of_a_launcher_takes_its_gpu_alone(monkeypatch):
    chosen = []
    for name, found in {'is_available': True, 'device_count': 4}.items():
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)
    assert join_world('auto', None) == World(torch.device('cuda')) and join_world('auto', None).gpus == 4
    for name, value in {'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '3'}.items():
        monkeypatch.setenv(name, value)
    world, net = join_world('auto', None), nn.Linear(1, 1)
    assert world == World(torch.device('cuda', 3)) and world.gpus == 1 and chosen == [world.device]
    assert wrap_model(net, world, True, None) is net
    train_eval_amp.check_sync_bn(world)
    with pytest.raises(BadInput, match='--sync_bn'):
        train_eval_amp.check_sync_bn(World(torch.device('cuda')))
    assert join_world('cpu', None) == World(torch.device('cpu')) and World(torch.device('cpu')).gpus == 0


def test_one_process_with_several_gpus_uses_them_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    wrapped = []
    monkeypatch.setattr(nn, 'DataParallel', lambda net: wrapped.append(net) or net)
    net = nn.Linear(1, 1)
    wrap_model(net, World(torch.device('cuda')), False, torch.float16)
    wrap_model(net, World(torch.device('cpu')), True, torch.bfloat16)
    assert wrapped == [net]
    for compiled, dtype, flag in ((True, None, '--compile'), (False, torch.bfloat16, '--amp')):
        with pytest.raises(BadInput, match=f'{flag}.* on 2 GPUs .* torchrun --nproc_per_node=2'):
            wrap_model(net, World(torch.device('cuda')), compiled, dtype)


def test_sync_bn_is_refused_between_cpus_and_nothing_else_in_one_process(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    with monkeypatch.context() as patch:
        patch.setattr(train_eval_amp, 'join_world', lambda *_: World(torch.device('cpu'), 0, 2))
        assert run_here(patch, 'train_eval_amp.py', flags(data, tmp_path / 'save', sync_bn=True)) == 2
    error = capsys.readouterr().err
    assert error.startswith('train_eval_amp.py: error: --sync_bn: ') and len(error.splitlines()) == 1
    assert not (tmp_path / 'save').exists()
    both = ({'sync_bn': True}, {})
    runs = [train_here(monkeypatch, flags(data, tmp_path / str(len(more)), epochs=1, **more)) for more in both]
    synchronised, plain = (load(run / 'checkpoint.pth.tar')['state_dict'] for run in runs)
    assert differences(synchronised, plain) == []


def test_a_bad_image_found_by_a_worker_ends_in_one_line_at_once(data, tmp_path):  # noqa: F811
    lines = (data / 'train.txt').read_text().splitlines()
    (tmp_path / 'bad.txt').write_text('\n'.join([lines[0], 'none.png 1', *lines[1:]]))
    began = time.monotonic()
    output = run('train_eval.py', flags(data, tmp_path, train_list=tmp_path / 'bad.txt', workers=2), code=2)
    assert 'none.png: cannot be read as an image' in output.splitlines()[-1] and 'Traceback' not in output
    assert time.monotonic() - began < 60
