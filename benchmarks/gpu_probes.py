"""Parts of benchmarks/on_gpu.sh: what a GPU alone can show of searches, trainings and tables, a few seconds each.

    python benchmarks/gpu_probes.py ceilings             one part; without a name all are listed
    python benchmarks/gpu_probes.py first_touch --smoke  tiny, on a CPU too

Each result is a line `part: what: numbers`. Parts import what they need themselves: a machine that lacks a package runs
the others.
"""

import argparse
import importlib.util
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.counting import seconds  # noqa: E402

PACKAGES = 'numpy scipy PIL torchvision tqdm simplejpeg matplotlib pytest hypothesis xdist safetensors'.split()
HALF = 'bfloat16', 'float16'
FORMATS = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
NO_GPU = 'skipped: no GPU'


def say(text):
    """Print a line at once."""
    print(text, flush=True)


def best(call, device, smoke, repeats=20):
    """Return the least of five times of a call in seconds, after a warm-up. On a CPU or with `smoke`: of two calls."""
    few = smoke or device.type == 'cpu'
    seconds(call, device, 1 if few else 3)
    return min(seconds(call, device, 1 if few else repeats) for _ in range(2 if few else 5))


def images_of(*shape, device, dtype=torch.float32, layout=torch.channels_last, grad=True):
    """Return random images [N, C, H, W]."""
    x = torch.randn(*shape, device=device).to(dtype).contiguous(memory_format=layout)
    return x.requires_grad_(grad)


def there_and_back(module, x):
    """Return a forward and backward pass as a function without arguments."""
    grad = torch.randn_like(module(x))
    inputs = [x, *(p for p in module.parameters())] if isinstance(module, nn.Module) else [x]
    return lambda: torch.autograd.grad(module(x), inputs, grad)


def environment(device, smoke):
    """Card, versions, and missing packages."""
    say(f'environment: torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}')
    say(f'environment: cores {len(os.sched_getaffinity(0))}, date {time.strftime("%Y-%m-%d")}')
    if device.type == 'cuda':
        about = torch.cuda.get_device_properties(device)
        cudnn = torch.backends.cudnn.version()
        say(f'environment: {about.name}, {about.total_memory / 2**30:.0f} GiB, cuDNN {cudnn}')
        say(f'environment: bfloat16 {"native" if torch.cuda.is_bf16_supported(including_emulation=False) else "not"}')
    else:
        say(f'environment: {NO_GPU}')
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    say(f'environment: missing packages: {" ".join(missing) or "none"}')


def ceilings(device, smoke):
    """Bandwidth of a copy, and speed of matrix products."""
    x = torch.empty(2**16 if smoke else 2**28, device=device)
    y = torch.zeros_like(x)
    took = best(lambda: y.copy_(x), device, smoke)
    say(f'ceilings: copy: {2 * x.numel() * x.element_size() / took / 1e9:.0f} GB/s')
    size = 64 if smoke else 8192
    usual = torch.backends.cuda.matmul.fp32_precision
    kinds = {'float32': ('ieee', torch.float32), 'TF32': ('tf32', torch.float32)}
    for name, (precision, dtype) in (kinds | {name: (usual, getattr(torch, name)) for name in HALF}).items():
        a = torch.randn(size, size, device=device).to(dtype)
        torch.backends.cuda.matmul.fp32_precision = precision
        took = best(lambda a=a: a @ a, device, smoke, 5)
        say(f'ceilings: {name} product of {size}: {2 * size**3 / took / 1e12:.2f} TFLOP/s')
    torch.backends.cuda.matmul.fp32_precision = usual


def make_images(folder, count, size, batch):
    """Write `count` images of three classes, few of them different, and a latency table; return flags of a search.

    Args:
        size: input size of the search in pixels.
        batch: images of a batch.
    """
    import numpy as np
    from PIL import Image

    from benchmarks.search_step import straight_table
    from models.latency import save_table

    rng, lines = np.random.default_rng(0), []
    for label in range(3):
        (folder / f'{label}').mkdir()
    for i in range(count):
        path = folder / f'{i % 3}' / f'{i}.jpg'
        if i < 12:
            Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(path)
        else:
            os.link(folder / f'{i % 3}' / f'{i % 12}.jpg', path)
        lines.append(f'{path.relative_to(folder)} {i % 3}\n')
    half = len(lines) // 2
    for name, part in (('train.txt', lines[:half]), ('val.txt', lines[half:])):
        (folder / name).write_text(''.join(part))
    table = straight_table(size)
    save_table(table.base, table.curves, {'unit': 'ms', 'device': 'made up'}, folder / 'table.pkl')
    return [
        *('--img_root', folder, '--train_list', folder / 'train.txt', '--val_list', folder / 'val.txt'),
        *('--lookup_path', folder / 'table.pkl', '--target_lat', '50%', '--img_size', size, '--batch_size', batch),
        *('--epochs', 2, '--warmup_epochs', 1, '--print_freq', 1, '--no-report'),
    ]  # fmt: skip


def start(words, log=None):
    """Start a script of the project; its output goes to a file, if there is one."""
    command = [sys.executable, *map(str, words)]
    if log is None:
        return subprocess.Popen(command, cwd=ROOT)
    with open(log, 'w') as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def last_lines(log, count=3):
    """Return the last lines of a file as one."""
    return ' | '.join(Path(log).read_text(errors='replace').splitlines()[-count:])


def weights_of(save):
    """Return the weights of the last searched model under a folder."""
    (path,) = Path(save).glob('search-*/searched_model_02.pth.tar')
    return torch.load(path, map_location='cpu', weights_only=True)['state_dict']


def difference(a, b):
    """Return the largest difference of two sets of weights, or NaN."""
    return torch.stack([(a[name].double() - b[name].double()).abs().max() for name in a]).max().item()


def checks(device, smoke):
    """Tiny searches in all number formats, side by side; two with --deterministic; and the tests that need a GPU."""
    kinds = {'float32': []}
    if not smoke:
        kinds |= {name: ['--amp', name] for name in HALF}
        kinds |= {'deterministic': ['--deterministic'], 'deterministic again': ['--deterministic']}
        kinds |= {'as a graph': ['--cuda_graph', '--deterministic']}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, begin, running, ended = Path(name), time.monotonic(), {}, set()
        # a graph begins with the fourth of six steps of the architecture
        flags = make_images(folder, *((8, 32, 2) if smoke else (192, 64, 8)))
        flags += ['--workers', 0 if smoke else 2]
        for kind, more in kinds.items():
            words = ['train_search.py', *flags, *more, '--device', device.type, '--save', folder / f'save {kind}']
            running[f'search, {kind}'] = start(words, folder / f'search, {kind}.log')
        if device.type == 'cuda':
            words = ['-m', 'pytest', 'tests', '-m', 'gpu', '-v', '--tb=short', '--continue-on-collection-errors']
            words += ['-p', 'benchmarks.failures_at_once']  # its report at the end may come too late
            words += ['-n', '6'] if importlib.util.find_spec('xdist') else []
            running['pytest -m gpu'] = start(words)
        else:
            say(f'checks: pytest -m gpu: {NO_GPU}')
        for process in running.values():
            stack.callback(process.wait)
            stack.callback(process.kill)
        while running:
            for what in [what for what, process in running.items() if process.poll() is not None]:
                code, log = running.pop(what).returncode, folder / f'{what}.log'
                say(f'checks: {what}: exit code {code} after {time.monotonic() - begin:.0f} s')
                if log.exists():
                    say(f'    {last_lines(log, 12 if code else 1)}')
                    for line in log.read_text(errors='replace').splitlines():
                        if '--cuda_graph:' in line:  # the run went on without graphs
                            say(f'    {line}')
                ended |= set() if code else {what}
                for other in ('deterministic again', 'as a graph'):
                    pair = {f'search, {kind}' for kind in ('deterministic', other)}
                    if pair <= ended and what in pair:
                        saves = [folder / f'save {kind}' for kind in ('deterministic', other)]
                        say(f'checks: deterministic and {other}: differ by {difference(*map(weights_of, saves)):.1e}')
            time.sleep(0.1)


def profiled(step, device):
    """Return kernel time in seconds, launches, and (time, calls, name) of kernels, the dearest first, of one step.

    On a CPU: of operators.
    """
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == 'cuda' else [])]
    with profile(activities=kinds) as profiler:
        seconds(step, device)
    events = profiler.key_averages()
    launches = sum(e.count for e in events if 'LaunchKernel' in e.key)
    if device.type == 'cuda':
        kernels = [e for e in events if str(e.device_type).endswith('CUDA') and not e.key.startswith('Optimizer.')]
        kernels = [(e.self_device_time_total / 1e6, e.count, e.key) for e in kernels]
    else:
        kernels = [(e.self_cpu_time_total / 1e6, e.count, e.key) for e in events]
    return sum(took for took, _, _ in kernels), launches, sorted(kernels, reverse=True)


def search_steps(device, smoke):
    """Steps of a search, ours and plain, eager and as a graph: time, kernels, launches, hours of the paper's search."""
    from tools.environment import prepare

    prepare(device, shapes_change=True)
    forms = [None] if smoke else ['bfloat16', None], [False, True] if device.type == 'cuda' else [False]
    for amp, graphed in itertools.product(*forms):
        time_form(False, amp, graphed, device, smoke)
    time_form(True, None, False, device, smoke)


def peak(device):
    """Return the most memory in MB that tensors had on a GPU since the last call."""
    if device.type == 'cpu':
        return 0
    most = torch.cuda.max_memory_allocated() / 1e6
    torch.cuda.reset_peak_memory_stats()
    return most


def time_form(plain, amp, graphed, device, smoke):
    """Print the costs of both steps of one implementation in one number format; of a graph the architecture's.

    The two paths of the weight steps stay the same, so that no new shape comes while they are timed.
    """
    from benchmarks.search_step import ARCHITECTURE_STEPS, WEIGHT_STEPS, make_form
    from models.cuda_graph import EAGER_STEPS
    from models.model_search import UNFUSED, ExecutionMode
    from models.search_space import SPACE

    batch, size, tops = (2, 32, 1) if smoke else (32, 224, 12)
    args = argparse.Namespace(batch_size=batch, img_size=size, amp=amp)
    mode = UNFUSED if plain else ExecutionMode(fused=device.type == 'cuda')
    paths = [[op] * len(SPACE.blocks()) for op in (0, len(SPACE.ops) - 1)]
    weights, architecture, _ = make_form(args, device, mode, plain, graphed, paths)
    times, name = [], f'{"plain" if plain else "ours"}, {amp or "float32"}{", as a graph" if graphed else ""}'
    for what, step in (('weight', weights), ('architecture', architecture)):
        if graphed and what == 'weight':
            continue
        first = seconds(step, device)
        for _ in range(0 if smoke else EAGER_STEPS):
            step()
        times.append(best(step, device, smoke, 5))
        busy, launches, kernels = profiled(step, device)
        say(
            f'search_steps: {name}: {what} step {1000 * times[-1]:.1f} ms, kernels {1000 * busy:.1f} ms, {launches}'
            f' launches, first {first:.1f} s, at most {peak(device):.0f} MB, batch {batch}, size {size}'
        )
        for took, calls, kernel in kernels[:tops]:
            say(f'    {1000 * took:8.3f} ms {calls:5d} x {kernel[:90]}')
    if not graphed:
        hours = (WEIGHT_STEPS * times[0] + ARCHITECTURE_STEPS * times[1]) / 3600
        say(f"search_steps: {name}: the paper's search at this speed {hours:.2f} h")


class Branch(nn.Module):
    """An operator of a block as a module of one input, which torch can record."""

    def __init__(self, op):
        super().__init__()
        self.op, self.branch = op, op.branch

    def forward(self, x):
        """Run the operator without the residual connection."""
        return self.branch(x)


def record_operators(net, ops, batch, size, dtype, device):
    """Replace these operators of each block by CUDA graphs of their forward and backward pass, in one memory pool."""
    branches, inputs = [], []
    for mixed, block in zip(net.mixed_ops(), net.space.blocks(size), strict=True):
        for index in ops:
            branches.append(Branch(mixed.m_ops[index]))
            inputs.append((images_of(batch, block.in_ch, block.in_size, block.in_size, device=device, dtype=dtype),))
    with torch.autocast(device.type, dtype, cache_enabled=False):
        recorded = torch.cuda.make_graphed_callables(tuple(branches), tuple(inputs))
    for branch, graph in zip(branches, recorded, strict=True):
        object.__setattr__(branch.op, 'branch', graph)  # not as a submodule, which would contain its parent


def learn_on_paths(net, images, labels, paths, precision):
    """Add gradients as `backward_on_paths` does, and copy those of each path: the next path's graphs overwrite them."""
    with precision.autocast():
        shared = net.stem(images)
    features = shared.detach().requires_grad_()
    for path in paths:
        with precision.autocast():
            logits = net.searched(features, path).float()
        precision.backward(F.cross_entropy(logits, labels))
        learned = [p for p in (features, *net.weight_parameters()) if p.grad is not None]
        for p, copy in zip(learned, torch._foreach_mul([p.grad for p in learned], 1), strict=True):
            p.grad = copy
    shared.backward(features.grad)


def operator_graphs(device, smoke):
    """Weight steps with a graph for each operator of a block: gradients against eager ones, time, launches, memory."""
    if device.type == 'cpu':
        say(f'operator_graphs: {NO_GPU}')
    else:
        compare_operator_graphs(device, smoke)


def compare_operator_graphs(device, smoke):
    """Print the lines of `operator_graphs`."""
    from benchmarks.search_step import FLAGS, GRAD_CLIP, NUM_CLASSES, make_net
    from models.model_search import ExecutionMode
    from models.search_steps import make_optimizers, train_only
    from tools.environment import prepare
    from tools.precision import Precision

    prepare(device, shapes_change=True)
    batch, size = (2, 32) if smoke else (32, 224)
    net, precision = make_net(ExecutionMode(fused=True), False, device), Precision(device, torch.bfloat16)
    train_only(net.weight_parameters(), net.arch_parameters())
    optimizer, _ = make_optimizers(net, 0.025, FLAGS)
    images = images_of(batch, 3, size, size, device=device, grad=False)
    labels = torch.arange(batch, device=device) % NUM_CLASSES
    ops = 0, len(net.space.ops) - 1
    paths = [[op] * net.num_blocks for op in ops]
    learn = partial(learn_on_paths, net, images, labels, paths, precision)

    def gradients():
        optimizer.zero_grad()
        learn()
        return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    def step():
        learn()
        precision.step(optimizer, GRAD_CLIP)

    eager, again = gradients(), gradients()
    record = partial(record_operators, net, ops, batch, size, torch.bfloat16, device)
    seconds_to_record = seconds(record, device)
    for form, found in (('eager again', again), ('graphs', gradients()), ('graphs again', gradients())):
        largest = max(grad.abs().max().item() for grad in eager.values())
        far = [name for name in eager if not (found[name] - eager[name]).abs().max() <= 1e-2 * eager[name].abs().max()]
        say(
            f'operator_graphs: {form}: gradients differ by {difference(found, eager):.1e}, the largest is'
            f' {largest:.1e}; more than a hundredth apart: {len(far)} of {len(eager)}: {" ".join(far[:3])}'
        )
    took = best(step, device, smoke, 5)
    busy, launches, _ = profiled(step, device)
    say(
        f'operator_graphs: {len(ops) * net.num_blocks} operators recorded in {seconds_to_record:.1f} s; weight step'
        f' {1000 * took:.1f} ms, kernels {1000 * busy:.1f} ms, {launches} launches, at most {peak(device):.0f} MB'
    )


def first_touch(device, smoke):
    """Time of the first call of a convolution for a new shape, and of later ones, by pass, layer and width."""
    from tools.environment import prepare

    prepare(device, shapes_change=True)
    batch, size, count = (2, 8, 2) if smoke else (32, 28, 5)
    layers = ('pointwise', 1), ('depthwise 3', 3), ('depthwise 5', 5)
    for (name, dtype), (layer, kernel), step in itertools.product(FORMATS.items(), layers, (2, 8)):
        found = {}
        narrowest = 104 if step == 8 else 105
        for width in range(narrowest, narrowest + step * count, step):  # the first one also loads libraries
            ins, groups = (40, 1) if kernel == 1 else (width, width)
            x = images_of(batch, ins, size, size, device=device, dtype=dtype)
            weight = images_of(width, ins // groups, kernel, kernel, device=device, dtype=dtype)
            options = [1, 1], [kernel // 2] * 2, [1, 1]
            y = torch.empty(batch, width, size, size, dtype=dtype, device=device)
            grad = y.normal_().contiguous(memory_format=torch.channels_last)

            def back(*wanted, x=x, weight=weight, grad=grad, options=options, groups=groups):
                args = grad, x, weight, None, *options, False, [0, 0], groups, wanted
                return torch.ops.aten.convolution_backward(*args)

            passes = {
                'forward': lambda x=x, w=weight, o=options, g=groups: torch.conv2d(x, w, None, *o, g),
                'input gradient': partial(back, True, False, False),
                'weight gradient': partial(back, False, True, False),
            }
            for one, call in passes.items():
                found.setdefault(one, []).append([seconds(call, device) for _ in range(4)])
        for one, times in found.items():
            first = statistics.median(each[0] for each in times[1:])
            later = statistics.median(min(each[1:]) for each in times[1:])
            say(
                f'first_touch: {name}, {layer}, widths {"of eight" if step == 8 else "odd"}, {one}:'
                f' first {1000 * first:.1f} ms, later {1000 * later:.3f} ms'
            )


def depthwise(device, smoke):
    """Depthwise convolutions, forward and backward, channels last against contiguous."""
    shapes = ((8, 8),) if smoke else ((96, 112), (144, 56), (240, 28), (672, 14))
    torch.backends.cudnn.benchmark = True
    for (name, dtype), (channels, size), kernel in itertools.product(FORMATS.items(), shapes, (3, 5)):
        times = []
        for layout in (torch.channels_last, torch.contiguous_format):
            conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
            conv = conv.to(device, dtype, memory_format=layout)
            x = images_of(2 if smoke else 32, channels, size, size, device=device, dtype=dtype, layout=layout)
            times.append(best(there_and_back(conv, x), device, smoke))
        say(
            f'depthwise: {name}, kernel {kernel}, {channels} channels, size {size}: channels last'
            f' {1000 * times[0]:.3f} ms, contiguous {1000 * times[1]:.3f} ms'
        )


def norms(device, smoke):
    """Batch norm and activation: `norm_act` against torch's operators, in GB/s of the least traffic."""
    from models.functions import ACTIVATIONS, norm_act

    shapes = ((8, 8),) if smoke else ((96, 112), (240, 56), (672, 14))
    for (name, dtype), (channels, size), act in itertools.product(FORMATS.items(), shapes, ('relu', 'swish')):

        def eager(x, act=act):
            return ACTIVATIONS[act].function(F.batch_norm(x, None, None, training=True))

        x = images_of(2 if smoke else 32, channels, size, size, device=device, dtype=dtype)
        least = 5 * x.numel() * x.element_size()  # forward: read, write; backward: read two, write
        speeds = [
            least / best(there_and_back(call, x), device, smoke) / 1e9
            for call in (partial(norm_act, act_func=act), eager)
        ]
        say(
            f'norms: {name}, {channels} channels, size {size}, {act}: norm_act {speeds[0]:.3g} GB/s, torch'
            f' {speeds[1]:.3g} GB/s'
        )


def single_operators(device, smoke):
    """Forward passes of single operators, launched one by one against a captured CUDA graph."""
    if device.type == 'cpu':
        say(f'single_operators: {NO_GPU}')
        return
    from models.config import op_spec
    from models.layers import MBInvertedResBlock
    from models.search_space import SPACE

    for block in SPACE.blocks()[1::4]:
        for index in (0, len(SPACE.ops) - 1):
            op = SPACE.ops[index]
            net = MBInvertedResBlock(op_spec(block, op, op.start_width(block.in_ch))).to(device).eval()
            net = net.to(memory_format=torch.channels_last)
            x = images_of(32, block.in_ch, block.in_size, block.in_size, device=device, grad=False)
            with torch.inference_mode():
                eager = best(lambda net=net, x=x: net(x), device, smoke, 50)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    net(x)
                captured = best(graph.replay, device, smoke, 50)
            where = f'{block.stage}.{block.name} {op.label}'
            say(f'single_operators: {where}: eager {1e6 * eager:.0f} us, captured {1e6 * captured:.0f} us')


def widths(device, smoke):
    """Expansion, depthwise convolution and projection at widths near each other, forward and backward."""
    batch, size = (2, 8) if smoke else (64, 28)
    torch.backends.cudnn.benchmark = True
    for name, dtype in FORMATS.items():
        times = {}
        for width in (21, 24) if smoke else (213, 216, 208, 224):
            net = nn.Sequential(
                nn.Conv2d(40, width, 1, bias=False),
                nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
                nn.Conv2d(width, 40, 1, bias=False),
            ).to(device, dtype, memory_format=torch.channels_last)
            x = images_of(batch, 40, size, size, device=device, dtype=dtype)
            times[width] = best(there_and_back(net, x), device, smoke)
        shown = ', '.join(f'{width} {1000 * took:.3f} ms ({1e6 * took / width:.2f} us a channel)'
                          for width, took in times.items())  # fmt: skip
        say(f'widths: {name}: {shown}')


def loading(device, smoke):
    """Images per second of the loaders, and the spread of the time between batches."""
    from benchmarks.input_pipeline import generate
    from dataset.device_aug import TrainPixels
    from dataset.folders import ClassFolders
    from dataset.loaders import make_loader
    from dataset.transforms import train_transform
    from tools.distributed import World

    batch, size, different, copies = (2, 32, 2, 8) if smoke else (32, 224, 32, 64)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        generate(root, different)
        for path in list((root / 'class').iterdir()):
            for i in range(copies):
                os.link(path, path.with_name(f'{path.stem}-{i}.JPEG'))
        samples = [(path, 0) for path in ClassFolders(root).images('class')]
        for kind, transform in (('recipe', train_transform(size)), ('--device_aug', TrainPixels(size))):
            for workers in (0,) if smoke else (4, 8, 12):
                args = argparse.Namespace(batch_size=batch, workers=workers, seed=0)
                loader = make_loader(root, samples, transform, args, World(device), 'images', for_training=True)
                gaps = []
                for _ in zip(loader, range(16 if smoke else 60), strict=False):
                    gaps.append(time.perf_counter())
                gaps = [b - a for a, b in itertools.pairwise(gaps[2 * loader.num_workers :])]
                say(
                    f'loading: {kind}, {loader.num_workers} workers: {batch / statistics.mean(gaps):.0f} images/s,'
                    f' {1000 * statistics.mean(gaps):.1f} ms a batch, deviation {1000 * statistics.pstdev(gaps):.1f},'
                    f' worst {1000 * max(gaps):.1f}'
                )


@torch.inference_mode()
def networks(device, smoke):
    """Five networks, timed with a wait after each pass and with all passes queued."""
    import random

    from latency_pkl.sampling import build_network, random_config
    from models.search_space import SPACE

    rng, passes, size, batch = random.Random(0), 2 if smoke else 30, 32 if smoke else 224, 2 if smoke else 32
    torch.backends.cudnn.benchmark = False  # as for tables
    for i in range(1 if smoke else 5):
        net = build_network(random_config(rng, False, 1000, SPACE), device, i)
        x = images_of(batch, 3, size, size, device=device, layout=torch.contiguous_format, grad=False)
        seconds(partial(net, x), device, passes)
        waited = statistics.median(seconds(partial(net, x), device) for _ in range(passes))
        queued = seconds(partial(net, x), device, passes)
        say(f'networks: {i}: a wait after each pass {1000 * waited:.3f} ms, queued {1000 * queued:.3f} ms')


def training(device, smoke):
    """A training step of TF-NAS-A without its update, by number format and layout; kernels by cuDNN's heuristics."""
    from benchmarks.train_step import CONFIG, make_step
    from models.config import load_config
    from models.model_eval import NetworkEval
    from tools.environment import prepare
    from tools.precision import Precision

    prepare(device, shapes_change=True)  # a training tries kernels out, which takes minutes of this benchmark
    batch, size = (2, 32) if smoke else (128, 224)
    last, contiguous = torch.channels_last, torch.contiguous_format
    for name, layout in (*((half, last) for half in HALF), ('float32', last), ('float32', contiguous)):
        dtype = None if name == 'float32' else getattr(torch, name)
        net = NetworkEval(load_config(CONFIG)).to(device)
        x = torch.randn(batch, 3, size, size, device=device)
        labels = torch.arange(batch, device=device)
        took = best(make_step(net, layout, Precision(device, dtype), x, labels), device, smoke, 10)
        shown = 'channels last' if layout is last else 'contiguous'
        say(f'training: {"O1 " if dtype else ""}{name}, {shown}: {1000 * took:.1f} ms, {batch / took:.0f} images/s')


PARTS = (
    environment, ceilings, checks, search_steps, operator_graphs, training, networks, loading, first_touch, depthwise,
    widths, norms, single_operators,
)  # fmt: skip


def main(args):
    """Run one part, or list all."""
    by_name = {part.__name__: part for part in PARTS}
    if args.part is None:
        say('\n'.join(f'{name:17} {part.__doc__.splitlines()[0]}' for name, part in by_name.items()))
        return
    torch.manual_seed(0)
    by_name[args.part](torch.device('cuda' if torch.cuda.is_available() else 'cpu'), args.smoke)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', nargs='?', choices=[part.__name__ for part in PARTS])
    parser.add_argument('--smoke', action='store_true', help='tiny sizes')
    main(parser.parse_args())
