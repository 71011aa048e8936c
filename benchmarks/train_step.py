"""Compare the speed of a training step (forward, backward, metrics) with that of a plain implementation.

    python benchmarks/train_step.py                     (at 224 pixels, batch 16)
    python benchmarks/train_step.py --batch_size 256    (for a GPU)

The plain implementation has contiguous layout, swish composed in Python and one `.item()` per step. The project's has
channels last (as chosen by the training scripts), torch's swish, metrics that stay on the device and, on a CPU, memory
that is kept from step to step; in float32 and in autocast. All alternate, each in a separate process.

The bound is the longer of two times: the step's MACs (three times those of the forward pass) at the speed of a large
matrix product, and one read or write of each operator's tensors at the speed of a copy.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.counting import Rival, Traffic, seconds, take_turns
from benchmarks.plain_search import plain_swish
from models.config import load_config
from models.describe import count_mult_adds
from models.model_eval import NetworkEval
from tools.distributed import pick_device
from tools.environment import device_name, prepare
from tools.options import Parser, add_device_arg, count, run_script
from tools.precision import Precision
from tools.training import Tally

CONFIG = Path(__file__).resolve().parent.parent / 'models' / 'zoo' / 'tf_nas_a.config'


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument('--config_path', default=str(CONFIG), help='a model.config')
    parser.add_argument('--batch_size', type=count(2), default=16)
    parser.add_argument('--img_size', type=count(32), default=224)
    parser.add_argument('--rounds', type=count(3), default=7)
    add_device_arg(parser)
    return parser.parse_args()


def make_step(net, layout, precision, images, labels, plain=False):
    """Return one step as a function without arguments."""
    net, images, tally = net.to(memory_format=layout).train(), images.to(memory_format=layout), Tally(images.device)

    def step():
        net.zero_grad(set_to_none=True)
        with precision.autocast():
            logits = net(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        precision.scaler.scale(loss).backward()
        if plain:
            loss.item()
        else:
            tally.add(loss, logits, labels)

    return step


def machine_speed(device, dtype):
    """Return the MACs per second of a large matrix product, and the bytes per second that a copy reads and writes."""
    size = 8192 if device.type == 'cuda' else 1536
    a = torch.randn(size, size, device=device).to(dtype)
    x = torch.empty(2**28 if device.type == 'cuda' else 2**25, device=device)
    y = torch.zeros_like(x)
    product = min(seconds(lambda: a @ a, device) for _ in range(5))
    copy = min(seconds(lambda: y.copy_(x), device) for _ in range(5))
    return size**3 / product, 2 * x.numel() * x.element_size() / copy


def bound(step, device, dtype, step_macs):
    """Return the lower bound on the time of a step in seconds, and its cause."""
    with Traffic() as traffic:
        step()
    macs, bandwidth = machine_speed(device, dtype)
    times = {'MACs': step_macs / macs, 'memory': traffic.bytes / bandwidth}
    name = max(times, key=times.get)
    return times[name], name


def functions(args, device, plain, dtype):
    """Return the measurements of a `Rival`: the time of a step, and its bound."""
    if not plain:
        prepare(device)
    net = NetworkEval(load_config(args.config_path)).to(device)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    labels = torch.arange(args.batch_size, device=device) % net.config.classifier.out_features
    macs = 3e6 * args.batch_size * count_mult_adds(net, args.img_size)
    half = dtype != torch.float32
    layout = torch.channels_last if not plain and (half or device.type == 'cpu') else torch.contiguous_format
    step = make_step(
        plain_swish(net) if plain else net, layout, Precision(device, dtype if half else None), images, labels, plain
    )
    repeats = 10 if device.type == 'cuda' else 1
    return {
        'step': lambda: seconds(step, device, repeats),
        'bound': lambda: bound(step, device, dtype, macs),
    }


def main(args):
    """Time all implementations alternately; print speeds, ratios and shares of the bound."""
    device = pick_device(args.device)
    half = torch.float16 if device.type == 'cuda' else torch.bfloat16
    kinds = {
        'plain': (True, torch.float32),
        'ours': (False, torch.float32),
        f'ours, {str(half).removeprefix("torch.")}': (False, half),
    }
    rivals = {name: Rival(functions, args, device, *kind) for name, kind in kinds.items()}
    print(f'{device_name(device)}, {torch.get_num_threads()} threads, batch {args.batch_size}, size {args.img_size}')
    medians = {name: median for name, (median,) in take_turns(rivals, ['step'], args.rounds).items()}
    for name, median in medians.items():
        least, what = rivals[name].call('bound')
        print(
            f'{name}: {args.batch_size / median:.1f} images/s, {medians["plain"] / median:.2f} x plain,'
            f' {100 * least / median:.0f} % of the {what} bound ({args.batch_size / least:.1f} images/s)'
        )
        rivals[name].close()


if __name__ == '__main__':
    run_script(main, get_args())
