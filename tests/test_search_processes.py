"""Searches on two processes: their steps are those of one, and they resume."""

import os
import random
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from search_runs import EPOCHS, assert_same_search, begin, kill_at, search, small_project
from training_runs import load, only_run

from conftest import NUM_CLASSES, SMALL_SPACE, make_table
from models.model_search import Network
from models.search import backward_on_mixture, backward_on_paths, train_only
from models.targeting import Target
from tools.distributed import join_world, leave_world
from tools.precision import Precision
from tools.rng import generator_for

FULL = Precision(torch.device('cpu'))
GRAD_CLIP = 0.1


def halves(same):
    """Two half-batches of images and labels, the same or different ones."""
    generator = torch.Generator().manual_seed(3)
    images, labels = torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % NUM_CLASSES
    first = images[:4], labels[:4]
    return (first, first) if same else (first, (images[4:], labels[4:]))


def both_steps(net, batch, before_weights, before_architecture, optimizers=None):
    """One step of the weights on two paths, and one of the architecture; without an update if `before_...` is false."""
    torch.manual_seed(0)
    weights, architecture = net.weight_parameters(), net.arch_parameters()
    table = make_table(SMALL_SPACE, 32)
    w_optimizer, a_optimizer = optimizers
    draws = generator_for(1, 'draws', 0, 0)
    first = net.sample('gumbel', draws)
    paths = [first, net.sample('random', draws, exclude=first)]
    train_only(weights, architecture)
    backward_on_paths(net, *batch, paths, FULL)
    if before_weights(weights):
        FULL.step(w_optimizer, GRAD_CLIP)
    train_only(architecture, weights)
    op_weights = net.mixture_weights(2.0, draws)
    latency_loss = Target(table, SMALL_SPACE, 3.0, 1).loss(net.widths(), 0.1, torch.device('cpu'))
    backward_on_mixture(net, *batch, op_weights, latency_loss, FULL)
    if before_architecture(architecture):
        FULL.step(a_optimizer, GRAD_CLIP)
        net.project_architecture()
    net.zero_grad(set_to_none=True)


def fresh():
    torch.manual_seed(5)
    net = Network(SMALL_SPACE.start_widths(), NUM_CLASSES, SMALL_SPACE).train()
    optimizers = (
        torch.optim.SGD(net.weight_parameters(), 0.5, 0.9, weight_decay=1e-4),
        torch.optim.Adam(net.arch_parameters(), 0.01, (0.5, 0.999), weight_decay=5e-4),
    )
    return net, optimizers


def in_a_process(rank, port, same, path):
    """Both steps in one of two processes; each saves its network, and how many transfers a step took."""
    torch.set_num_threads(1)
    os.environ |= {'RANK': str(rank), 'WORLD_SIZE': '2', 'LOCAL_RANK': str(rank)}
    os.environ |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    world = join_world('cpu', None)
    transfers, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *more: transfers.append(tensor.numel()) or all_reduce(tensor, *more)
    net, optimizers = fresh()

    def before_update(parameters):
        world.average_gradients(parameters)
        return True

    both_steps(net, halves(same)[rank], before_update, before_update, optimizers)
    torch.save({'weights': net.state_dict(), 'transfers': transfers}, f'{path}{rank}')
    leave_world(world)


@pytest.fixture(scope='module', params=['the same images twice', 'two halves'])
def two_processes(request, tmp_path_factory):
    """Whether both halves are the same, and what each of two processes saved."""
    path = tmp_path_factory.mktemp('two') / 'rank'
    same = request.param == 'the same images twice'
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    mp.spawn(in_a_process, (port, same, str(path)), 2)
    return same, [load(f'{path}{rank}') for rank in range(2)]


def one_process(same):
    """What both steps do to the network in one process.

    Batch norms use the statistics of each process's images. Those of the same images twice are those of the images, so
    one batch of all is the reference; else the average of the gradients of both halves is.
    """
    net, optimizers = fresh()
    if same:
        batch = tuple(map(torch.cat, zip(*halves(True), strict=True)))
        both_steps(net, batch, lambda *_: True, lambda *_: True, optimizers)
        return net.state_dict()
    kept = {}

    def keep(parameters):
        kept.update({p: p.grad.clone() for p in parameters if p.grad is not None})
        return False

    def average(parameters):
        for p in parameters:
            if p.grad is not None:
                p.grad = (p.grad + kept[p]) / 2
        return True

    first, second = halves(False)
    both_steps(net, first, keep, lambda *_: False, optimizers)
    both_steps(net, second, average, lambda *_: False, optimizers)
    both_steps(net, first, lambda *_: False, keep, optimizers)
    both_steps(net, second, lambda *_: False, average, optimizers)
    return net.state_dict()


def test_a_step_on_two_processes_is_that_of_one(two_processes):
    same, (first, second) = two_processes
    expected, (start, _) = one_process(same), fresh()
    for name, value in expected.items():
        assert torch.equal(first['weights'][name], second['weights'][name])
        assert (first['weights'][name] - value).abs().max() <= 1e-5, name
    moved = [name for name, value in start.state_dict().items() if not torch.equal(value, expected[name])]
    assert 'stage1.block1.log_alphas' in moved and 'classifier.linear.weight' in moved


def test_gradients_are_averaged_in_one_transfer_a_step(two_processes):
    _, (first, _) = two_processes
    net, _ = fresh()
    weights, architecture = first['transfers']
    assert architecture == sum(p.numel() for p in net.arch_parameters())
    assert 0 < weights < sum(p.numel() for p in net.weight_parameters())  # those of two paths


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    return small_project(tmp_path_factory.mktemp('small') / 'project')


def test_two_processes_search_are_killed_and_resume(project):
    output = search(project, project / 'whole', processes=2)
    assert output.count('epoch 0 step 1/10') == 1 and output.count('--batch_size 4') == 1
    assert output.count('searched model:') == 1 and output.count('networks reach') == 1
    save, rng = project / 'killed', random.Random(os.getpid())
    process = begin(project, save, 2, save_freq=0)
    assert kill_at(process, r'epoch 2 step \d+', skip=rng.randrange(3), delay=rng.random() * 0.05) is not None
    assert 'goes on from' in search(project, save, processes=2, snapshot='auto')
    assert_same_search(only_run(save), only_run(project / 'whole'))
    state = load(only_run(save) / f'searched_model_{EPOCHS:02d}.pth.tar')
    assert state['environment']['processes'] == 2
