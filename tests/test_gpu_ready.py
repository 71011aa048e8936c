"""What a GPU needs, as far as a CPU can show it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tools.training import begin_momentum, load_moments

LAYOUTS = torch.contiguous_format, torch.channels_last


def small_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 5, groups=8), nn.Conv2d(8, 4, 1))


def train_step(net, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 12, 12, generator=generator)
    F.mse_loss(net(images).mean((2, 3)), torch.randn(4, 4, generator=generator)).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize('before', LAYOUTS)
@pytest.mark.parametrize('after', LAYOUTS)
@pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.Adam])
def test_moments_saved_in_another_layout_train_as_without_fusion(before, after, kind):
    def make(net, layout, fused):
        options = {'momentum': 0.9} if kind is torch.optim.SGD else {}
        net = copy.deepcopy(net).to(memory_format=layout)
        return net, kind(net.parameters(), 0.5, fused=fused, **options)

    net, optimizer = make(small_net(), before, fused=True)
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
        ends.append([p.detach().clone() for p in later.parameters()])
    moved = max((a - p).abs().max().item() for a, p in zip(ends[0], net.parameters(), strict=True))
    assert moved > 0.1
    for fused, unfused in zip(*ends, strict=True):
        assert (fused - unfused).abs().max() < 1e-5
