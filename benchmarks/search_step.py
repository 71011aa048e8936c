"""Compare time, memory and launches of a search's steps with those of a plain implementation.

    python benchmarks/search_step.py               (at 224 pixels, batch 16)
    python benchmarks/search_step.py --img_size 64 --batch_size 32

On a GPU, with the time of the paper's 90 epochs; and with and without a graph:

    python benchmarks/search_step.py --batch_size 32 --amp bfloat16
    python benchmarks/search_step.py --cuda_graph

The plain implementation is `benchmarks/plain_search.py`. All implementations alternate, each in a separate process, and
the medians are printed. Kept memory is what autograd holds between forward and backward pass. Launches are dispatched
operators that compute. Reads are those that make the host wait for a GPU. Between two epochs the plain implementation
builds a new network; the project rebuilds only the operators whose width changed. Both save the checkpoint.
"""

import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.counting import Calls, Rival, Traffic, host_reads, saved_megabytes, seconds, take_turns
from benchmarks.plain_search import (
    make_plain,
    plain_architecture_step,
    plain_forward,
    plain_paths,
    plain_weight_step,
)
from models.cuda_graph import Graphs
from models.elasticity import full_weights, gather, scatter, start_masks, update_masks
from models.latency import LatencyTable
from models.model_search import UNFUSED, ExecutionMode, HostCopy, Network
from models.parsing import mask_widths
from models.search import Recipe, backward_on_mixture, backward_on_paths, train_only
from models.search_space import SPACE
from models.targeting import Target
from tools.distributed import pick_device
from tools.environment import device_name, prepare
from tools.files import save_checkpoint
from tools.options import Parser, count, run_script
from tools.precision import DTYPES, Precision
from tools.rng import generator_for
from train_search import add_step_args

NUM_CLASSES, GRAD_CLIP, LAMBDA_LAT, TARGET_LAT, TEMPERATURE = 100, 5.0, 0.1, 15.0, 5.0
WEIGHT_STEPS, ARCHITECTURE_STEPS = 287_370, 127_760
"""Steps of the paper's search: 90 epochs of 3,193 weight steps, the first 10 without architecture steps."""

RECIPE = Recipe(90, 10, 5.0, 0.96, w_lr=0.025, w_mom=0.9, w_wd=1e-5, a_lr=0.01, a_betas=(0.5, 0.999), a_wd=5e-4)


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument('--batch_size', type=count(2), default=16)
    parser.add_argument('--img_size', type=count(32), default=224)
    parser.add_argument('--rounds', type=count(3), default=5)
    add_step_args(parser)
    return parser.parse_args()


def straight_table(img_size):
    """Return a latency table of straight lines; the costs of a step do not depend on its values."""
    curves = {key: torch.arange(1, high + 1).double().numpy() * 1e-3 for key, (_, high) in
              SPACE.table_widths(img_size).items()}  # fmt: skip
    return LatencyTable(1.0, curves, {}, img_size)


def make_net(form, plain, device):
    """Return a supernet with random architecture parameters."""
    torch.manual_seed(0)
    net = Network(SPACE.start_widths(), NUM_CLASSES, SPACE, form).to(device).train()
    with torch.no_grad():
        for p in net.arch_parameters():
            p.copy_(torch.randn(p.shape).log_softmax(0))
    return make_plain(net) if plain else net


def make_steps(net, plain, images, labels, table, dtype, graphs, fixed=None):
    """Return the weight step and the architecture step, with their draws, and the forward pass of a mixture.

    Args:
        fixed: the two paths of each weight step, instead of draws.
    """
    device, draws = images.device, generator_for(0, 'benchmark')
    latency_loss = Target(table, SPACE, TARGET_LAT, 1).loss(net.widths(), LAMBDA_LAT, device)
    weight_params, arch_params = net.weight_parameters(), net.arch_parameters()
    precision = Precision(device, None if plain else dtype)
    if plain:
        w_optimizer = torch.optim.SGD(net.weight_parameters(), 0.025, 0.9, weight_decay=1e-5, foreach=False)
        a_optimizer = torch.optim.Adam(net.arch_parameters(), 0.01, (0.5, 0.999), weight_decay=5e-4, foreach=False)
    else:
        w_optimizer, a_optimizer = RECIPE.make_optimizers(net, 0)
    layout = torch.contiguous_format if plain else torch.channels_last
    images = images.to(memory_format=layout)
    log_alphas = HostCopy(net.log_alphas())

    def learn_on_mixture(images, labels, noise):
        op_weights = net.noisy_weights(noise, TEMPERATURE)
        return backward_on_mixture(net, images, labels, op_weights, latency_loss, precision)

    learn_on_mixture = graphs.wrap(learn_on_mixture, arch_params)

    def train_weights():
        if plain:
            plain_weight_step(net, w_optimizer, images, labels, fixed or plain_paths(net, draws), GRAD_CLIP)
            return
        first = net.sample('gumbel', draws, log_alphas=log_alphas)
        paths = fixed or [first, net.sample('random', draws, exclude=first)]
        train_only(weight_params, arch_params)
        backward_on_paths(net, images, labels, paths, precision)
        precision.step(w_optimizer, GRAD_CLIP)

    def train_architecture():
        nonlocal log_alphas
        if plain:
            op_weights = net.mixture_weights(TEMPERATURE, draws)
            plain_architecture_step(net, a_optimizer, images, labels, op_weights, latency_loss, GRAD_CLIP)
            return
        train_only(arch_params, weight_params)
        learn_on_mixture(images, labels, net.mixture_noise(draws))
        precision.step(a_optimizer, GRAD_CLIP)
        net.project_architecture()
        log_alphas = HostCopy(net.log_alphas())

    def mixture():
        train_only(net.arch_parameters(), net.weight_parameters())
        op_weights = net.mixture_weights(TEMPERATURE, draws)
        with precision.autocast():
            return plain_forward(net, images, op_weights) if plain else net(images, op_weights)

    return train_weights, train_architecture, mixture


def make_form(args, device, form, plain, graphed=False, fixed=None):
    """Return the functions of `make_steps` for one implementation, on random images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, generator=generator).to(device)
    labels = torch.arange(args.batch_size, device=device) % NUM_CLASSES
    net = make_net(form, plain, device)
    graphs = Graphs(graphed, lambda form, *rest: print(form % rest, flush=True))
    table, dtype = straight_table(args.img_size), DTYPES.get(args.amp)
    return make_steps(net, plain, images, labels, table, dtype, graphs, fixed)


def functions(args, device, form, plain, graphed=False):
    """Return the measurements of a `Rival`: seconds of both steps, kept MB, launches and traffic."""
    if not plain:
        prepare(device, tf32=args.tf32, shapes_change=True)
    weights, architecture, mixture = make_form(args, device, form, plain, graphed)
    repeats = 10 if device.type == 'cuda' else 1
    return {
        'weights': lambda: seconds(weights, device, repeats),
        'architecture': lambda: seconds(architecture, device, repeats),
        'kept': lambda: saved_megabytes(mixture),
        'launches': lambda: launches(architecture),
        'traffic': lambda: [traffic(step) for step in (weights, architecture)],
    }


def launches(step):
    """Return the number of operators that a step launches, and of reads that make the host wait."""
    with Calls() as calls, host_reads() as reads:
        step()
    return calls.count, reads[0]


def traffic(step):
    """Return the bytes that a step reads and writes."""
    with Traffic() as counted:
        step()
    return counted.bytes


def between_epochs(device, plain):
    """Return the measurement of a `Rival`: seconds of the work between two epochs."""
    if not plain:
        prepare(device, shapes_change=True)
    folder = tempfile.TemporaryDirectory()
    path, masks = Path(folder.name) / 'checkpoint.pth.tar', start_masks(SPACE)
    net, full = Network(mask_widths(masks), NUM_CLASSES, SPACE).to(device), full_weights(NUM_CLASSES, device, SPACE)
    gather(net, full, masks)
    state = [net, masks]

    def changed(masks):
        """Return masks in which one operator of every block has a new width, as after scaling."""
        widths = mask_widths(masks)
        for block in SPACE.blocks():
            low, high = SPACE.ops[3].min_width(block.in_ch), SPACE.ops[3].max_width(block.in_ch)
            widths[block.stage][block.name][3] = low if widths[block.stage][block.name][3] == high else high
        return update_masks(masks, widths, full)

    def plain_work():
        net, masks = state
        scatter(net, full, masks)
        new = changed(masks)
        save_checkpoint({'state_dict': full, 'masks': new}, path)
        net = Network(mask_widths(new), NUM_CLASSES, SPACE).to(device)
        gather(net, full, new)
        state[:] = net, new

    def work():
        net, masks = state
        scatter(net, full, masks)
        new = changed(masks)
        save_checkpoint({'state_dict': full, 'masks': new}, path)
        gather(net, full, new)
        state[:] = net, new

    return {'work': lambda: seconds(plain_work if plain else work, device), 'close': folder.cleanup}


def main(args):
    """Time all implementations alternately, and print their costs."""
    device = pick_device(args.device)
    fused = device.type == 'cuda'
    kinds = {'plain': (UNFUSED, True), 'ours': (ExecutionMode(fused, args.checkpoint_ops), False)}
    kinds |= {} if args.checkpoint_ops else {'ours, --checkpoint_ops': (ExecutionMode(fused, True), False)}
    if args.cuda_graph:
        kinds['ours, --cuda_graph'] = (*kinds['ours'], True)
    rivals = {name: Rival(functions, args, device, *kind) for name, kind in kinds.items()}
    print(f'{device_name(device)}, {torch.get_num_threads()} threads, batch {args.batch_size}, size {args.img_size}')
    times = take_turns(rivals, ['weights', 'architecture'], args.rounds)
    report_steps(times, {name: rival.call('kept') for name, rival in rivals.items()})
    report_launches(args, device, rivals['plain'].call('launches')[0])
    if device.type == 'cuda':
        report_search(times['ours'], rivals['ours'].call('traffic'), device)
    for rival in rivals.values():
        rival.close()
    report_epochs(device, args.rounds)


def report_steps(times, kept):
    """Print times and kept memory, and their ratios to the plain implementation."""
    for name, (weights, architecture) in times.items():
        speed = [times['plain'][which] / times[name][which] for which in (0, 1)]
        print(
            f'{name}: weight step {1000 * weights:.0f} ms ({speed[0]:.2f} x as fast as plain), architecture step'
            f' {1000 * architecture:.0f} ms ({speed[1]:.2f} x), kept memory {kept[name]:.0f} MB'
            f' ({kept[name] / kept["plain"]:.2f} of plain)'
        )


def report_launches(args, device, plain):
    """Print launches and reads of the GPU mode in float32, on any device."""
    count, reads = launches(
        make_form(Namespace(**vars(args) | {'amp': None}), device, ExecutionMode(fused=True), False)[1]
    )
    print(
        f'GPU mode: {count} launches per architecture step, {count / plain:.2f} of plain'
        f' ({plain}); reads {reads}, and a copy to the host beside the next step'
    )


def report_epochs(device, rounds):
    """Print the time of the work between two epochs."""
    rivals = {name: Rival(between_epochs, device, name == 'plain') for name in ('plain', 'ours')}
    (plain,), (ours,) = take_turns(rivals, ['work'], rounds).values()
    for rival in rivals.values():
        rival.call('close')
        rival.close()
    print(f'between two epochs: plain {1000 * plain:.0f} ms, ours {1000 * ours:.0f} ms, {plain / ours:.1f} x as fast')


def report_search(times, moved, device):
    """Print the time of the paper's search at this speed, and the share of the bandwidth that steps reach."""
    hours = (WEIGHT_STEPS * times[0] + ARCHITECTURE_STEPS * times[1]) / 3600
    x = torch.empty(2**28, device=device)
    y = torch.zeros_like(x)
    bandwidth = 2 * x.numel() * x.element_size() / min(seconds(lambda: y.copy_(x), device) for _ in range(5))
    for name, size, took in zip(('weight', 'architecture'), moved, times, strict=True):
        share = 100 * size / took / bandwidth
        print(f'{name} step: {share:.0f} % of the bandwidth, {bandwidth / 1e9:.0f} GB/s')
    print(f"the paper's 90 epochs at this speed, without loading images: {hours:.2f} hours")


if __name__ == '__main__':
    run_script(main, get_args())
