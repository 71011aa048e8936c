"""What a GPU needs, as far as a CPU can show it."""

import copy
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_search
from models.config import load_config
from models.describe import largest_activation, largest_mixture
from models.model_eval import NetworkEval
from models.model_search import ExecutionMode, Network
from models.search_space import SPACE
from tools.distributed import World
from tools.environment import note_large_tensors, prepare
from tools.errors import BadInput
from tools.precision import check_format, make_precision
from tools.training import begin_momentum, load_moments

CPU, CUDA = torch.device('cpu'), torch.device('cuda')
NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
DEVICES = CPU, pytest.param(CUDA, marks=[pytest.mark.gpu, NO_CARD])
LAYOUTS = torch.contiguous_format, torch.channels_last


def small_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 5, groups=8), nn.Conv2d(8, 4, 1))


def train_step(net, optimizer, seed):
    generator, device = torch.Generator().manual_seed(seed), next(net.parameters()).device
    images, targets = torch.randn(4, 3, 12, 12, generator=generator), torch.randn(4, 4, generator=generator)
    F.mse_loss(net(images.to(device)).mean((2, 3)), targets.to(device)).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize('before', LAYOUTS)
@pytest.mark.parametrize('after', LAYOUTS)
@pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize('device', DEVICES)
def test_moments_saved_in_another_layout_train_as_without_fusion(before, after, kind, device):
    """They were saved on a CPU."""

    def make(net, layout, fused, device=device):
        options = {'momentum': 0.9} if kind is torch.optim.SGD else {}
        net = copy.deepcopy(net).to(device, memory_format=layout)
        return net, kind(net.parameters(), 0.5, fused=fused, **options)

    net, optimizer = make(small_net(), before, fused=True, device=CPU)
    for seed in range(3):
        train_step(net, optimizer, seed)
    ends = []
    for fused in (True, False):
        later, again = make(net, after, fused)
        load_moments(again, copy.deepcopy(optimizer.state_dict()))
        for p in later.parameters():
            for moment in again.state[p].values():
                assert moment.shape != p.shape or moment.stride() == p.stride()
        if kind is torch.optim.SGD:
            begin_momentum(again)
        train_step(later, again, 3)
        ends.append([p.detach().cpu() for p in later.parameters()])
    moved = max((a - p).abs().max().item() for a, p in zip(ends[0], net.parameters(), strict=True))
    assert moved > 0.1
    for fused, unfused in zip(*ends, strict=True):
        assert (fused - unfused).abs().max() < 1e-5


@pytest.mark.parametrize(
    ('asked', 'tries_out'),
    [({}, True), ({'shapes_change': True}, False), ({'deterministic': True}, False)],
)
def test_only_steps_of_constant_shapes_try_kernels_out(settings, asked, tries_out):
    prepare(CUDA, **asked)
    assert torch.backends.cudnn.benchmark is tries_out
    assert torch.backends.cudnn.deterministic is asked.get('deterministic', False)


def test_deterministic_runs_do_not_fill_memory_that_is_written_anyway(settings):
    prepare(CPU, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.empty(1000).isnan().all()  # torch fills with NaN


@pytest.fixture
def turing(monkeypatch):
    """A GPU that emulates bfloat16."""
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: 'TITAN RTX')


def test_emulated_bfloat16_is_refused(turing):
    with pytest.raises(BadInput, match='--amp_dtype bfloat16: TITAN RTX only emulates.*--amp_dtype float16'):
        make_precision(CUDA, 'O1', 'bfloat16', None, 'native')
    assert make_precision(CPU, 'O1', 'bfloat16', None, 'native').dtype is torch.bfloat16
    assert make_precision(CUDA, 'O1', None, None, 'native').dtype is torch.float16
    for name in (None, 'float16'):
        check_format(name, '--amp', CUDA)


def test_a_search_refuses_emulated_bfloat16_before_anything_else(turing, monkeypatch, tmp_path):
    monkeypatch.setattr(train_search, 'join_world', lambda *_: World(CUDA))
    words = ['train_search.py', '--img_root', 'none', '--save', str(tmp_path / 'runs'), '--amp', 'bfloat16']
    monkeypatch.setattr(sys, 'argv', words)
    with pytest.raises(BadInput, match='--amp bfloat16: TITAN RTX'):
        train_search.main(train_search.get_args())
    assert not (tmp_path / 'runs').exists()


def test_bfloat16_is_not_refused_if_the_gpu_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: True)
    check_format('bfloat16', '--amp', CUDA)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that convolutions and batch norms read or write."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if 'conv' in func.name() or 'batch_norm' in func.name():
            tensors = args[0], (out[0] if isinstance(out, tuple) else out)
            self.elements = max(self.elements, *(x.numel() for x in tensors))
        return out


@pytest.mark.parametrize('img_size', [33, 64])
def test_the_largest_activation_of_a_network(img_size):
    config = load_config('models/zoo/tf_nas_a.config')
    with Largest() as largest, torch.no_grad():
        NetworkEval(config).eval()(torch.zeros(1, 3, img_size, img_size))
    assert largest_activation(config, img_size) == largest.elements > 0


def test_the_largest_activation_of_a_search(small_space):
    for space, img_size in ((small_space, 33), (SPACE, 64)):
        net = Network(space.max_widths(), 3, space, ExecutionMode(fused=True))
        images, weights = torch.zeros(2, 3, img_size, img_size), torch.zeros(net.num_blocks, len(space.ops))
        with Largest() as largest, torch.no_grad():
            net(images, weights)
        assert 2 * largest_mixture(img_size, space) == largest.elements


def test_the_note_on_large_activations(caplog):
    elements, most = largest_mixture(224, SPACE), 445
    note_large_tensors(elements, most, CUDA)
    note_large_tensors(elements, 10**6, CPU)
    assert not caplog.messages
    note_large_tensors(elements, most + 1, CUDA)
    assert f'at most {most} avoid that' in caplog.text


@pytest.mark.parametrize(
    ('flags', 'expected'),
    [
        ([], [6, 3]),
        (['--val_workers', '9'], [6, 8]),
        (['--workers', '1'], [1, 1]),
        (['--workers', '0'], [0, 0]),
        (['--val_workers', '0'], [6, 0]),
    ],
)
def test_the_loaders_of_a_search_have_their_workers(images, flags, expected, monkeypatch):
    """A process has no more workers than cores, here eight."""
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(8)), raising=False)
    lists = ['--train_list', str(images / 'train.txt'), '--val_list', str(images / 'val.txt')]
    words = ['train_search.py', '--img_root', str(images), *lists, '--batch_size', '4', '--workers', '6']
    monkeypatch.setattr(sys, 'argv', [*words, '--img_size', '32', *flags])
    data, _, _ = train_search.load_data(train_search.get_args(), World(CPU))
    assert [loader.num_workers for loader in data.loaders] == expected
