"""The form that a search has on a GPU: memory layout, reads by the host, the architecture step as one graph."""

import pytest
import torch
from test_search_steps import FULL, batch, make_loss, make_net

from benchmarks.counting import Layouts
from models.model_search import ExecutionMode
from models.search_steps import backward_on_mixture, backward_on_paths, train_only
from tools.precision import Precision
from tools.rng import generator_for

HALF = Precision(torch.device('cpu'), torch.bfloat16)


@pytest.mark.parametrize('precision', [FULL, HALF], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('fused', [False, True], ids=['plain', 'fused'])
def test_every_operator_of_both_steps_works_in_channels_last(small_space, fused, precision):
    """In the plain form the mean of the head alone has a contiguous gradient: a CPU's results keep their bits."""
    net = make_net(small_space, ExecutionMode(fused=fused))
    x, labels = batch(48, 4)
    x = x.contiguous(memory_format=torch.channels_last)
    train_only(net.arch_parameters(), net.weight_parameters())
    op_weights = net.mixture_weights(5.0, generator_for(0))
    with Layouts() as mixture:
        backward_on_mixture(net, x, labels, op_weights, make_loss(net, 32), precision)
    train_only(net.weight_parameters(), net.arch_parameters())
    with Layouts() as paths:
        backward_on_paths(net, x, labels, [[0, 1, 2, 0, 1], [1, 2, 0, 1, 1]], precision)
    head = f'of size (4, {small_space.head.out_ch}, 6, 6)'
    broken = [line for line in mixture.broken + paths.broken if fused or head not in line]
    assert not broken, '\n'.join(broken)
    assert len(mixture.broken + paths.broken) == (0 if fused else 3 * 4)


def test_a_fused_mixture_stays_in_half_precision(small_space):
    net = make_net(small_space, ExecutionMode(fused=True))
    x, op_weights = batch(48, 4)[0], torch.rand(5, 3).softmax(1)
    with HALF.autocast():
        shared = net.stem(x)
        assert net.stage1.block1(shared, op_weights[0]).dtype == torch.bfloat16
