"""Time, memory and launches of the steps of a search: the project's form against a plain one.

    python benchmarks/search_step.py                                  at 224, batch 16, on a GPU where there is one
    python benchmarks/search_step.py --img_size 64 --batch_size 32    a small search
    python benchmarks/search_step.py --batch_size 32 --amp bfloat16   on a GPU: what the paper's 90 epochs take on it

The plain form is that of `benchmarks/plain_search.py`. All forms take turns in one process, and the medians are
printed. Kept memory is what autograd holds between forward and backward pass; launches are dispatched operators that
compute; reads are those that make the host wait for a GPU. Between two epochs the plain form builds a network and
writes the checkpoint before it goes on; the project's refills the operators whose width changed and writes beside the
run, which costs a copy of the weights.
"""

import statistics
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.counting import Calls, Traffic, host_reads, saved_megabytes, seconds
from benchmarks.plain_search import (
    make_plain,
    plain_architecture_step,
    plain_forward,
    plain_paths,
    plain_weight_step,
)
from models.elasticity import full_weights, gather, scatter, start_masks, update_masks
from models.latency import LatencyTable
from models.model_search import Form, Network
from models.parsing import mask_widths
from models.search_space import SPACE
from models.search_steps import architecture_step, make_optimizers, train_only, weight_step
from tools.checkpoint import save_checkpoint
from tools.distributed import pick_device
from tools.keeper import Writer
from tools.options import Parser, add_device_arg, add_step_args, count, run_script
from tools.precision import DTYPES, Precision
from tools.profiling import device_name
from tools.rng import generator_for

NUM_CLASSES = 100
WEIGHT_STEPS, ARCHITECTURE_STEPS = 287_370, 127_760
"""Of the paper's search: 90 epochs of 3,193 steps, 10 of them without architecture steps."""

FLAGS = Namespace(
    w_mom=0.9,
    w_wd=1e-5,
    a_lr=0.01,
    a_beta1=0.5,
    a_beta2=0.999,
    a_wd=5e-4,
    grad_clip=5.0,
    lambda_lat=0.1,
    target_lat=15.0,
)


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument('--batch_size', type=count(2), default=16)
    parser.add_argument('--img_size', type=count(32), default=224)
    parser.add_argument('--rounds', type=count(3), default=5)
    add_device_arg(parser)
    add_step_args(parser)
    return parser.parse_args()


def straight_table(img_size):
    """A latency table whose curves are straight lines; the numbers do not change what a step costs."""
    curves = {key: torch.arange(1, high + 1).double().numpy() * 1e-3 for key, (_, high) in
              SPACE.table_widths(img_size).items()}  # fmt: skip
    return LatencyTable(1.0, curves, {}, img_size, SPACE)


def make_net(form, plain, device):
    """A supernet whose architecture parameters are random."""
    torch.manual_seed(0)
    net = Network(SPACE.start_widths(), NUM_CLASSES, SPACE, form).to(device).train()
    with torch.no_grad():
        for p in net.arch_parameters():
            p.copy_(torch.randn(p.shape).log_softmax(0))
    return make_plain(net) if plain else net


def make_steps(net, plain, images, labels, table, dtype):
    """The weight step (draws included), the architecture step, and the forward pass of a mixture, as functions."""
    device, draws = images.device, generator_for(0, 'benchmark')
    matrix = table.matrix(net.widths()).to(device)
    precision = Precision(device, None if plain else dtype)
    if plain:
        w_optimizer = torch.optim.SGD(net.weight_parameters(), 0.025, 0.9, weight_decay=1e-5, foreach=False)
        a_optimizer = torch.optim.Adam(net.arch_parameters(), 0.01, (0.5, 0.999), weight_decay=5e-4, foreach=False)
    else:
        w_optimizer, a_optimizer = make_optimizers(net, 0.025, FLAGS)
    layout = torch.contiguous_format if plain else torch.channels_last
    images = images.to(memory_format=layout)

    def train_weights():
        train_only(net.weight_parameters(), net.arch_parameters())
        if plain:
            plain_weight_step(net, w_optimizer, images, labels, plain_paths(net, draws), 5.0, precision)
        else:
            first = net.sample('gumbel', draws)
            paths = [first, net.sample('random', draws, exclude=first)]
            weight_step(net, w_optimizer, images, labels, paths, 5.0, precision)

    def train_architecture():
        train_only(net.arch_parameters(), net.weight_parameters())
        step = plain_architecture_step if plain else architecture_step
        step(net, a_optimizer, images, labels, net.mixture_weights(5.0, draws), matrix, table, FLAGS, precision)

    def mixture():
        train_only(net.arch_parameters(), net.weight_parameters())
        op_weights = net.mixture_weights(5.0, draws)
        with precision.autocast():
            return plain_forward(net, images, op_weights) if plain else net(images, op_weights)

    return train_weights, train_architecture, mixture


def between_epochs(folder, device):
    """The work between two epochs as functions: plain, and ours with its last file written before the next call."""
    state = {}
    for name in ('plain', 'ours'):
        masks = start_masks()
        net, full = Network(mask_widths(masks), NUM_CLASSES).to(device), full_weights(NUM_CLASSES, device)
        gather(net, full, masks)
        state[name] = [net, full, masks]

    def changed(masks, full):
        """Masks in which one operator of every block has another width, as after scaling."""
        widths = mask_widths(masks)
        for block in SPACE.blocks():
            low, high = SPACE.ops[3].min_width(block.in_ch), SPACE.ops[3].max_width(block.in_ch)
            widths[block.stage][block.name][3] = low if widths[block.stage][block.name][3] == high else high
        return update_masks(masks, widths, full)

    def plain():
        net, full, masks = state['plain']
        scatter(net, full, masks)
        masks = changed(masks, full)
        save_checkpoint({'state_dict': full, 'masks': masks}, folder / 'plain.pth.tar')
        net = Network(mask_widths(masks), NUM_CLASSES).to(device)
        gather(net, full, masks)
        state['plain'] = [net, full, masks]

    def ours():
        net, full, masks = state['ours']
        scatter(net, full, masks)
        new = changed(masks, full)
        writer.write({'state_dict': full, 'masks': new}, lambda data: save_checkpoint(data, folder / 'ours.pth.tar'))
        gather(net, full, new, held=masks)
        state['ours'][2] = new

    writer = Writer()
    return plain, ours, writer.finish


def main(args):
    """Time the forms in turns; print a line a step and form."""
    device = pick_device(args.device)
    torch.backends.cudnn.benchmark = True
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, generator=generator).to(device)
    labels = torch.arange(args.batch_size, device=device) % NUM_CLASSES
    table, dtype = straight_table(args.img_size), DTYPES.get(args.amp)
    fused = device.type == 'cuda'
    ours = Form(fused=fused, compiled=args.compile, recompute=args.checkpoint_ops)
    forms = {'plain': (Form(), True), 'ours': (ours, False)}
    forms |= {} if args.checkpoint_ops else {'ours, --checkpoint_ops': (Form(fused, True, args.compile), False)}
    nets = {name: make_net(form, plain, device) for name, (form, plain) in forms.items()}
    steps = {name: make_steps(nets[name], plain, images, labels, table, dtype) for name, (_, plain) in forms.items()}
    print(f'{device_name(device)}, {torch.get_num_threads()} threads, batch {args.batch_size}, size {args.img_size}')
    times = time_steps(steps, device, args.rounds)
    report_steps(times, steps)
    report_launches(make_net(Form(fused=True), False, device), steps['plain'][1], images, labels, table)
    report_epochs(device, args.rounds)
    if device.type == 'cuda':
        report_search(times['ours'], steps['ours'], device)


def time_steps(steps, device, rounds):
    """Median seconds of (weight step, architecture step) by form, from rounds in which all take turns."""
    times = {name: ([], []) for name in steps}
    for turn in range(rounds + 1):
        for name, functions in steps.items():
            for which in (0, 1):
                took = seconds(functions[which], device, repeats=10 if device.type == 'cuda' else 1)
                times[name][which].extend([took] if turn else [])  # the first turn warms up
    return {name: tuple(statistics.median(values) for values in both) for name, both in times.items()}


def report_steps(times, steps):
    """Times and kept memory, and their ratios to the plain form."""
    kept = {name: saved_megabytes(functions[2]) for name, functions in steps.items()}
    for name, (weights, architecture) in times.items():
        speed = [times['plain'][which] / times[name][which] for which in (0, 1)]
        print(
            f'{name}: weight step {1000 * weights:.0f} ms ({speed[0]:.2f} x as fast as plain), architecture step'
            f' {1000 * architecture:.0f} ms ({speed[1]:.2f} x), kept memory {kept[name]:.0f} MB'
            f' ({kept[name] / kept["plain"]:.2f} of plain)'
        )


def report_launches(fused, plain_architecture, images, labels, table):
    """Launches and reads of the form for GPUs, whatever device this is."""
    _, architecture, _ = make_steps(fused, False, images, labels, table, None)
    with Calls() as plain_calls:
        plain_architecture()
    with Calls() as calls, host_reads() as reads:
        architecture()
    print(
        f'form for GPUs: {calls.count} launches an architecture step, {calls.count / plain_calls.count:.2f} of plain'
        f' ({plain_calls.count}); reads {reads[0]}, and one in each draw of paths'
    )


def report_epochs(device, rounds):
    """Time of the work between two epochs."""
    with tempfile.TemporaryDirectory() as folder:
        plain, ours, finish = between_epochs(Path(folder), device)
        times = [], []
        for turn in range(rounds + 1):
            for values, function in zip(times, (plain, ours), strict=True):
                took = seconds(function, device)
                values.extend([took] if turn else [])
                finish()
    plain, ours = (statistics.median(values) for values in times)
    print(f'between two epochs: plain {1000 * plain:.0f} ms, ours {1000 * ours:.0f} ms, {plain / ours:.1f} x as fast')


def report_search(times, steps, device):
    """What the paper's search would take at this speed, and the share of the bandwidth that steps reach."""
    hours = (WEIGHT_STEPS * times[0] + ARCHITECTURE_STEPS * times[1]) / 3600
    x = torch.empty(2**28, device=device)
    y = torch.zeros_like(x)
    bandwidth = 2 * x.numel() * x.element_size() / min(seconds(lambda: y.copy_(x), device) for _ in range(5))
    for name, step, took in zip(('weight', 'architecture'), steps, times, strict=False):
        with Traffic() as traffic:
            step()
        share = 100 * traffic.bytes / took / bandwidth
        print(f'{name} step: {share:.0f} % of the bandwidth of {bandwidth / 1e9:.0f} GB/s')
    print(f"the paper's 90 epochs at this speed, without loading images: {hours:.2f} hours")


if __name__ == '__main__':
    run_script(main, get_args())
