"""Command-line options: a parser that reports errors in one line, checked number types, groups that scripts share."""

import argparse
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import NoReturn

from tools.environment import ROOT
from tools.errors import INTERRUPTED, BadInput, explain, has_no_reader, silence
from tools.logs import start_console

# defaults of a search: its table, and its lists of ImageNet, which it creates if neither exists
DEFAULT_TABLE = './latency_pkl/latency_gpu.pkl'
TRAIN_LIST = './dataset/ImageNet-100-effb0_train_cls_ratio0.8.txt'
VAL_LIST = './dataset/ImageNet-100-effb0_val_cls_ratio0.8.txt'

USUAL_SIZE = 224  # height and width of the input in pixels if neither a flag nor a file gives them: the paper's
RECIPE_BATCH, RECIPE_LR = 512, 0.2  # images per update of the paper's training, and the learning rate for them

# titles of the groups of flags, in the order of the help
GROUPS = (
    'network',
    'data',
    'search',
    'training',
    'latency',
    'check',
    'kit',
    'output',
    'resuming',
    'hardware',
    'launcher',
)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help with the default of each flag that has one, and with filled paragraphs around the indented commands."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = [part if part.startswith(' ') else fill(part, width) for part in text.strip().split('\n\n')]
        return '\n\n'.join(parts)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ''
        none = action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS)
        return text if none or 'default' in text else f'{text} (default: %(default)s)'


class Parser(argparse.ArgumentParser):
    """ArgumentParser with errors of one line, whose help shows the script's docstring and every default.

    Dashes in names of flags count as underscores. `@flags.txt` gives the flags in that file; # begins a comment.
    """

    def __init__(self, description: str | None):
        super().__init__(
            description=description,
            usage='%(prog)s [flags]',
            formatter_class=_Help,
            allow_abbrev=False,
            fromfile_prefix_chars='@',
        )
        self.groups = {title: self.add_argument_group(title) for title in GROUPS}

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit with code 2."""
        self.exit(2, f'{self.prog}: error: {message}\n')

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Return the words of a line of a file of flags."""
        return shlex.split(arg_line, comments=True)

    def parse_known_args(self, args=None, namespace=None):
        """Parse the flags, and return those that are not known too."""
        flags = {flag.replace('-', '_'): flag for flag in self._option_string_actions if flag.startswith('--')}
        words = []
        for word in sys.argv[1:] if args is None else args:
            name, equals, value = word.partition('=')
            words.append(flags.get(name.replace('-', '_'), name) + equals + value)
        try:
            return super().parse_known_args(words, namespace)
        except ValueError as e:  # of shlex, or of a file that is no text
            self.error(f'{" ".join(word for word in words if word.startswith("@"))}: not a file of flags ({e})')


def run_script(main: Callable, args: argparse.Namespace) -> None:
    """Run `main(args)` and exit with the code that it returns (None: 0).

    Bad input gives one line on stderr and exit code 2; a run that cannot continue gives one line and exit code 1; an
    interrupt one line and exit code 130.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors='replace')  # a console of few characters, such as Latin-1, shows ? for others
    start_console()
    try:
        code = main(args)
        sys.stdout.flush()
    except BadInput as e:
        message = str(e).rpartition('tools.errors.BadInput: ')[2]  # without the traceback of a worker
        print(f'{sys.argv[0]}: error: {" ".join(message.split())}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f'{sys.argv[0]}: interrupted', file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (OSError, EOFError, RuntimeError, MemoryError) as e:
        if isinstance(e, BrokenPipeError) and has_no_reader(sys.stdout):  # such as by `| head`
            silence(sys.stdout)
            sys.exit(0)
        message = explain(e, args)
        if not message:
            raise
        print(f'{sys.argv[0]}: {" ".join(message.split())}', file=sys.stderr)
        sys.unraisablehook = lambda *_: None  # what fails while the rest is cleaned up follows from this error
        sys.exit(1)
    sys.exit(code)


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False) -> Callable[[str], float]:
    """Return an argparse type: an int or float from `low` to `high` (above `low` if `open_low`)."""

    def check(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if open_low else low <= value) or not value <= high or value == math.inf:
            bounds = f'above {low}' if open_low else f'of at least {low}'
            bounds += f' and at most {high}' if high < math.inf else ''
            raise argparse.ArgumentTypeError(f'{text!r} should be a{"n" * (kind is int)} {kind.__name__} {bounds}')
        return value

    check.metavar = 'N' if kind is int else 'X'
    return check


def count(low: int = 1, high: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type: a whole number from `low` to `high`."""
    return number(int, low, high)


# argparse types
image_size = count(32, 4096)  # height and width of an input in pixels
class_count = count(2, 65536)
process_count = count(0, 1024)  # of processes or threads
fraction = number(float, 0, math.nextafter(1, 0))  # at least 0 and below 1


def dynamic_or_positive(text: str) -> float | None:
    """Parse a positive float, or 'dynamic' as None, as an argparse type."""
    return None if text == 'dynamic' else number(float, 0, open_low=True)(text)


def project_file(path: str, default: str) -> str:
    """Return a path; the default one, if there is no such file here, in the project's folder."""
    beside = ROOT / default
    return str(beside) if path == default and not Path(path).exists() and beside.exists() else path


def add_runtime_args(parser: Parser) -> None:
    """Add --runtime and --provider."""
    hardware = parser.groups['hardware']
    hardware.add_argument(
        '--runtime',
        choices=('torch', 'onnxruntime', 'openvino'),
        help="program that runs the timed networks; default: the table's, or torch",
    )
    hardware.add_argument('--provider', help='execution provider of ONNX Runtime, or device of OpenVINO')


def add_device_arg(parser: Parser) -> None:
    """Add --device."""
    parser.groups['hardware'].add_argument(
        '--device', choices=('auto', 'cpu', 'cuda'), default='auto', help='auto: a GPU if available'
    )


def add_image_args(parser: Parser) -> None:
    """Add flags of training images."""
    parser.groups['data'].add_argument(
        '--device_aug', action='store_true', help='jitter colours on the device: workers load many times as fast'
    )


def add_arch_args(parser: Parser) -> argparse._MutuallyExclusiveGroup:
    """Add --model_path and --config_path, exactly one of which names the network; return their group."""
    group = parser.groups['network'].add_mutually_exclusive_group(required=True)
    group.add_argument('--model_path', metavar='FILE', help='a searched_model_NN.pth.tar, or a model.config')
    group.add_argument('--config_path', metavar='FILE', help='a model.config')
    return group


def add_size_arg(parser: Parser, source: str) -> None:
    """Add --img_size. `source`: what gives its default."""
    help_text = f'height and width of the input in pixels; default: that {source}, 224 if they have none'
    parser.groups['data'].add_argument('--img_size', type=image_size, help=help_text)


def add_eval_data_args(parser: Parser, batch_size: int, workers: int, required: bool = True) -> None:
    """Add flags of the validation images and their loading."""
    also = ', or of class folders; default: --train_root' if required else ', or of class folders'
    data = parser.groups['data']
    data.add_argument('--val_root', metavar='FOLDER', help=f'folder that the paths in --val_list start from{also}')
    data.add_argument(
        '--val_list',
        metavar='FILE',
        help="validation images: lines of 'relative/path label'; default: of the class folders",
    )
    data.add_argument(
        '--num_classes', type=class_count, help='number of classes; default: as many as the list or the weights have'
    )
    add_size_arg(parser, 'of the config or the weights')
    data.add_argument(
        '--batch_size',
        type=count(),
        default=batch_size,
        help='images a step, over all devices; at most as many as there are images',
    )
    parser.groups['hardware'].add_argument(
        '--workers', type=process_count, default=workers, help='processes that load images, at most one for each core'
    )


def add_training_args(parser: Parser) -> None:
    """Add all flags of the training scripts, with the paper's recipe as defaults."""
    add_arch_args(parser)
    parser.groups['network'].add_argument(
        '--weights', metavar='FILE', help='start from the weights in this file, all but a classifier of other classes'
    )
    data = parser.groups['data']
    data.add_argument(
        '--train_root',
        metavar='FOLDER',
        required=True,
        help='folder that the paths in --train_list start from, or of class folders',
    )
    data.add_argument(
        '--train_list',
        metavar='FILE',
        help="training images: lines of 'relative/path label'; default: of the class folders",
    )
    add_eval_data_args(parser, batch_size=RECIPE_BATCH, workers=16)
    add_image_args(parser)

    training = parser.groups['training']
    training.add_argument('--epochs', type=count(), default=250, help='epochs in all')
    training.add_argument(
        '--lr', type=number(float, 0, open_low=True), default=RECIPE_LR, help='learning rate at the start'
    )
    training.add_argument(
        '--lr_warmup_epochs', type=count(0), help='first epochs, of a rising --lr; default: 5 for more than 256 images'
    )
    training.add_argument('--momentum', type=fraction, default=0.9, help='momentum of SGD')
    training.add_argument('--weight_decay', type=number(float, 0), default=1e-5, help='weight decay')
    training.add_argument(
        '--grad_clip', type=number(float, 0, open_low=True), default=5.0, help='largest gradient norm'
    )
    training.add_argument('--label_smooth', type=fraction, default=0.1, help='label smoothing')
    training.add_argument('--dropout_rate', type=fraction, default=0.2, help='dropout before the classifier')
    training.add_argument('--drop_connect_rate', type=fraction, default=0.2, help='largest rate of dropped blocks')
    training.add_argument('--seed', type=count(0), default=2, help='seed of all that is drawn')
    add_recipe_args(parser)

    add_output_args(parser, 'eval')
    add_snapshot_args(parser)
    add_device_arg(parser)
    add_speed_args(parser)


def add_output_args(parser: Parser, prefix: str) -> None:
    """Add flags of what a run writes, in a folder `<prefix>-<time>-<note>`."""
    output = parser.groups['output']
    output.add_argument(
        '--save', metavar='FOLDER', default='./checkpoints', help=f'folder that gets {prefix}-<time>-<note>/'
    )
    output.add_argument('--note', metavar='NAME', default='try', help='last part of the name of the run folder')
    output.add_argument('--print_freq', type=count(), default=100, help='steps between two lines of the log')
    output.add_argument('--tensorboard', action='store_true', help="write TensorBoard's files to the run folder too")
    output.add_argument(
        '--report',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='draw pictures and report.html at the end; a training then also measures the latency of its network',
    )


def add_snapshot_args(parser: Parser) -> None:
    """Add flags of checkpoints, resuming and determinism."""
    resuming = parser.groups['resuming']
    resuming.add_argument(
        '--snapshot',
        metavar='FILE',
        help='a checkpoint to resume from, in its run folder; auto: the newest good one of this --note under --save, '
        'which also serves restarts by torchrun (--max-restarts)',
    )
    resuming.add_argument(
        '--save_freq',
        type=number(float, 0),
        default=10.0,
        help='minutes between two checkpoints within an epoch; 0: after each step',
    )
    parser.groups['hardware'].add_argument(
        '--deterministic', action='store_true', help='only kernels that give the same bits each time; slower on GPUs'
    )


def add_speed_args(parser: Parser) -> None:
    """Add flags that change the speed of training but not its results, except for rounding."""
    hardware = parser.groups['hardware']
    hardware.add_argument(
        '--channels_last',
        action=argparse.BooleanOptionalAction,
        help='NHWC memory layout; default: on the CPU and in mixed precision',
    )
    hardware.add_argument('--compile', action='store_true', help='compile the network with torch.compile')
    add_tf32_arg(parser)
    add_rank_arg(parser)


def add_rank_arg(parser: Parser) -> None:
    """Add the flag that older launchers pass to each process."""
    parser.groups['launcher'].add_argument('--local_rank', type=count(0), help='set by launchers')


def add_recipe_args(parser: Parser) -> None:
    """Add flags that depart from the paper's recipe; all off by default."""
    alpha, training = number(float, 0), parser.groups['training']
    training.add_argument(
        '--ema_decay', type=fraction, default=0.0, help='keep and evaluate a moving average of the weights'
    )
    training.add_argument('--mixup', type=alpha, default=0.0, help='alpha of MixUp')
    training.add_argument(
        '--cutmix', type=alpha, default=0.0, help='alpha of CutMix; with --mixup: one of them at random'
    )
    training.add_argument(
        '--auto_augment', choices=('autoaugment', 'randaugment', 'trivialaugment'), help='instead of colour jitter'
    )
    training.add_argument('--grad_accum', type=count(), default=1, help='batches per update, their gradients averaged')
    training.add_argument('--no_weight_decay_bn', action='store_true', help='no weight decay on batch norm')
    training.add_argument(
        '--lr_scale',
        choices=('none', 'linear'),
        default='none',
        help=f'linear: --lr is for {RECIPE_BATCH} images',
    )
    training.add_argument('--max_steps', type=count(), help='stop after this many updates, for trials')


def add_amp_args(parser: Parser) -> None:
    """Add flags of mixed precision."""
    hardware = parser.groups['hardware']
    hardware.add_argument('--opt_level', choices=('O0', 'O1'), help='O0: float32 (default); O1: autocast')
    hardware.add_argument(
        '--amp_dtype',
        choices=('float16', 'bfloat16'),
        help='format of autocast; default: float16 on GPUs, bfloat16 on CPUs',
    )
    hardware.add_argument(
        '--amp_backend', choices=('native', 'apex'), default='native', help="torch's mixed precision, or apex"
    )
    hardware.add_argument(
        '--loss_scale', metavar='X', type=dynamic_or_positive, help="'dynamic' (default) or a number; float16 only"
    )


def add_tf32_arg(parser: Parser, default: bool | None = True, usual: str = '') -> None:
    """Add --tf32 and --no-tf32."""
    text = 'TF32 for float32 products and convolutions of GPUs that have it'
    parser.groups['hardware'].add_argument(
        '--tf32', action=argparse.BooleanOptionalAction, default=default, help=text + usual
    )
