"""The form that a search has on a GPU: memory layout, reads by the host, the architecture step as one graph."""

import sys
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_search_steps import FULL, batch, make_loss, make_net
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_search
from conftest import NUM_CLASSES, RECIPE, make_table, new_search
from models import search
from models.cuda_graph import EAGER_STEPS, Graphs, record_cuda_graph
from models.model_search import ExecutionMode, HostCopy
from models.search import backward_on_mixture, backward_on_paths, rehearse_architecture_step, train_only
from models.targeting import Target
from tools import environment
from tools.distributed import World
from tools.errors import BadInput
from tools.precision import Precision
from tools.rng import generator_for

CPU = torch.device('cpu')
HALF = Precision(CPU, torch.bfloat16)
STEPS = 12
ARGS = SimpleNamespace(
    batch_size=4, largest_epochs=0, seed=0, warmup_epochs=0, freedoms=['operator'], print_freq=100, grad_clip=5.0
)


class Loader(list):
    """Batches with the sampler of a loader."""

    sampler = SimpleNamespace(set_epoch=lambda *_: None)


def begin_search(space, device=CPU):
    """Return the state of a fresh search."""
    return new_search(space, device)


def train_epochs(space, graphs, epochs=1, device=CPU):
    """Train with architecture steps; returns the weights and the latencies of the epochs' last mixtures."""
    state, latencies = begin_search(space, device), []
    generator = torch.Generator().manual_seed(1)
    batches = Loader((torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4) % 3) for _ in range(STEPS))
    checkpointer = SimpleNamespace(allows_update=lambda *_: True, is_due=lambda: False, signal=0)
    logger = SimpleNamespace(waiting=lambda *_: None, advance=lambda: None, step=lambda *_, **__: None)
    for _ in range(epochs):
        state.begin_epoch()
        loss = Target(make_table(space, 32), space, 2.0, 1).loss(state.net.widths(), 0.1, device)
        learn = partial(train_search.learn_with_noise, state, loss)
        learn = graphs.wrap(learn, state.net.arch_parameters())
        train_search.train_epoch(state, (batches, batches), learn, World(device), ARGS, checkpointer, logger)
        latencies.append(state.latency.item())
        state.scatter_to_full()
        state.end_epoch()
    return state.full, latencies


def record_calls(run):
    """Stand-in for `record_cuda_graph` on a CPU: runs the function again, into the same results."""
    results = run()

    def replay():
        for old, new in zip(results, run(), strict=True):
            old.copy_(new)
        for p in run.__self__.parameters:  # a graph writes memory, but sets no attribute
            p.grad = None

    return replay, results


class Layouts(TorchDispatchMode):
    """Recorder of operators that read or write a four-dimensional tensor that is not in channels-last order.

    `broken` names each such operator, with size and strides of the tensor. Tensors of one channel or one pixel are left
    out, since their order is ambiguous. A view may have gaps: a slice of channels or columns keeps the order.
    """

    def __init__(self):
        super().__init__()
        self.broken = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for role, values in (('input', (args, kwargs)), ('output', out)):
            wrong = [t for t in tree_leaves(values) if isinstance(t, Tensor) and not _is_channels_last(t)]
            if wrong:
                size, stride = tuple(wrong[0].shape), wrong[0].stride()
                self.broken.append(f'{func}: {role} of size {size} has strides {stride}')
                break
        return out


def _is_channels_last(x: Tensor) -> bool:
    if x.dim() != 4 or x.shape[1] == 1 or x.shape[2:].numel() == 1:
        return True
    (_, channels, rows, columns), stride = x.shape, x.stride()
    in_order = stride[3] >= channels and stride[2] >= columns * stride[3] and stride[0] >= rows * stride[2]
    return stride[1] == 1 and in_order


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_a_fused_mixture_stays_in_half_precision(small_space):
    """Autocast of a GPU sums in float32, that of a CPU does not."""
    cuda = torch.device('cuda')
    net = make_net(small_space, ExecutionMode(fused=True)).to(cuda)
    x, op_weights = batch(48, 4)[0].to(cuda), torch.rand(5, 3).softmax(1).to(cuda)
    with Precision(cuda, torch.bfloat16).autocast():
        shared = net.stem(x)
        assert net.stage1.block1(shared, op_weights[0]).dtype == torch.bfloat16


def test_probabilities_are_copied_once_an_architecture_step(small_space, monkeypatch):
    copies, reads = [], []
    monkeypatch.setattr(train_search, 'HostCopy', lambda values: copies.append(HostCopy(values)) or copies[-1])
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda tensor: reads.append(tensor) or cpu(tensor))
    train_epochs(small_space, Graphs(False, print))
    assert (len(copies), len(reads)) == (1 + STEPS // 2, 0)
    assert len({tuple(copy.read().flatten().tolist()) for copy in copies}) == len(copies)


def test_one_precision_of_products_and_convolutions(settings):
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    for tf32, expected in ((True, 'tf32'), (False, 'ieee')):
        environment.prepare(CPU, tf32=tf32)
        assert (matmul.fp32_precision, conv.fp32_precision) == (expected, expected)


def test_no_folder_is_made_for_a_graph_without_a_gpu(tmp_path, monkeypatch):
    words = ['--img_root', tmp_path, '--device', 'cpu', '--cuda_graph', '--save', tmp_path / 'runs']
    monkeypatch.setattr(sys, 'argv', ['train_search.py', *map(str, words)])
    with pytest.raises(BadInput, match='--cuda_graph'):
        train_search.main(train_search.get_args())
    assert not (tmp_path / 'runs').exists()


def test_rehearsal_runs_the_widest_step_and_changes_nothing(small_space, monkeypatch):
    state = begin_search(small_space)
    before = {name: p.clone() for name, p in state.net.named_parameters()}
    widths, generator, ran = state.net.widths(), torch.get_rng_state(), []

    def spy(net, images, *rest):
        result = backward_on_mixture(net, images, *rest)
        gradients = [p.grad is not None for p in net.arch_parameters()]
        ran.append((net.widths(), tuple(images.shape), all(gradients), result[0].item()))
        return result

    monkeypatch.setattr(search, 'backward_on_mixture', spy)
    loss = Target(make_table(small_space, 32), small_space, 2.0, 1).loss(small_space.max_widths(), 0.1, CPU)
    rehearse_architecture_step(state.net, (4, 3, 32, 32), loss, state.a_precision, RECIPE)
    expected_loss = torch.tensor(float(NUM_CLASSES)).log().item()  # of weights that are zero
    assert ran == [(small_space.max_widths(), (4, 3, 32, 32), True, pytest.approx(expected_loss))]
    assert torch.equal(torch.get_rng_state(), generator) and state.net.widths() == widths != small_space.max_widths()
    for name, p in state.net.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad and p.grad is None


def test_a_search_with_a_rehearsal_has_the_same_bits(small_space, monkeypatch):
    expected = train_epochs(small_space, Graphs(False, print))
    begin = begin_search

    def begin_and_rehearse(*args):
        state = begin(*args)
        loss = Target(make_table(small_space, 32), small_space, 2.0, 1).loss(small_space.max_widths(), 0.1, CPU)
        rehearse_architecture_step(state.net, (4, 3, 32, 32), loss, state.a_precision, RECIPE)
        return state

    monkeypatch.setitem(globals(), 'begin_search', begin_and_rehearse)
    assert_same(train_epochs(small_space, Graphs(False, print)), expected)


def assert_same(got, expected, atol=0.0):
    (weights, latencies), (expected_weights, expected_latencies) = got, expected
    assert latencies == pytest.approx(expected_latencies, abs=atol)
    far = {name: (value - expected_weights[name]).abs().max().item() for name, value in weights.items()}
    assert all(distance <= atol for distance in far.values()), (atol, far)  # no NaN either


def test_a_graphed_search_equals_the_eager_one(small_space):
    """Recorded once in each of two epochs, after the first steps."""
    recorded, replayed, lines = [], [], []

    def record(run):
        replay, results = record_calls(run)
        recorded.append(len(replayed))
        return lambda: replayed.append(replay()), results

    got = train_epochs(small_space, Graphs(True, lines.append, record), epochs=2)
    assert_same(got, train_epochs(small_space, Graphs(False, print), epochs=2))
    replays = STEPS // 2 - EAGER_STEPS
    assert (recorded, len(replayed), lines) == ([0, replays], 2 * replays, [])


def test_a_failed_recording_is_one_line_and_eager_steps(small_space):
    lines, attempts = [], []

    def record(run):
        attempts.append(run())  # leaves gradients behind
        raise RuntimeError('operation not permitted\nwhen stream is capturing')

    got = train_epochs(small_space, Graphs(True, lambda form, *rest: lines.append(form % rest), record), epochs=2)
    assert_same(got, train_epochs(small_space, Graphs(False, print), epochs=2))
    assert len(lines) == len(attempts) == 1 and lines[0].endswith('without graphs (operation not permitted)')


def test_a_recording_that_fails_at_its_end_leaves_the_stream_as_it_was(monkeypatch):
    """As torch's context of a graph does when the driver refuses what was recorded: it does not leave its stream."""
    current = ['default']

    @contextmanager
    def stream(wanted):
        before = current[0]
        current[0] = wanted
        try:
            yield
        finally:
            current[0] = before

    @contextmanager
    def graph(*_, **__):
        current[0] = 'recording'
        yield
        raise RuntimeError('operation failed due to a previous error during capture')

    monkeypatch.setattr(torch.cuda, 'CUDAGraph', object)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: current[0])
    monkeypatch.setattr(torch.cuda, 'stream', stream)
    monkeypatch.setattr(torch.cuda, 'graph', graph)
    with pytest.raises(RuntimeError, match='previous error'):
        record_cuda_graph(lambda: current.append(current[0]))
    assert current == ['default', 'recording']


def test_other_shapes_run_eagerly(small_space):
    """A batch of another size neither reads nor changes what was recorded."""
    p = torch.nn.Parameter(torch.tensor(2.0))

    def step(x):
        (p * x).sum().backward()
        return (x * 3,)

    graphed = Graphs(True, print, record_calls).wrap(step, [p])
    for size in (4, 4, 4, 4, 3, 4):
        (result,) = graphed(torch.full((size,), 5.0))
        assert result.tolist() == [15.0] * size and p.grad.item() == 5 * size
        p.grad = None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@pytest.mark.parametrize('deterministic', [True, False])
def test_a_cuda_graph_equals_the_eager_steps(small_space, settings, deterministic):
    """Other kernels may round differently each time, and differences grow with the steps: then as two eager runs do."""
    cuda, lines, recorded, atol = torch.device('cuda'), [], [], 1e-6
    if deterministic:
        environment.prepare(cuda, deterministic=True, tf32=False)

    def record(run):
        recorded.append(1)
        return record_cuda_graph(run)

    got = train_epochs(small_space, Graphs(True, lambda form, *rest: lines.append(form % rest), record), 2, cuda)
    assert (lines, len(recorded)) == ([], 2)
    expected = train_epochs(small_space, Graphs(False, print), 2, cuda)
    if not deterministic:
        again = train_epochs(small_space, Graphs(False, print), 2, cuda)
        apart = max((value - again[0][name]).abs().max().item() for name, value in expected[0].items())
        atol = max(1e-4, 10 * apart)
    assert_same(got, expected, atol)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_a_rehearsal_leaves_no_memory_behind(small_space):
    cuda = torch.device('cuda')
    state = begin_search(small_space, cuda)
    loss = Target(make_table(small_space, 32), small_space, 2.0, 1).loss(small_space.max_widths(), 0.1, cuda)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    rehearse_architecture_step(state.net, (4, 3, 32, 32), loss, state.a_precision, RECIPE)
    assert torch.cuda.memory_reserved() <= before + (64 << 20)  # workspaces of libraries stay
