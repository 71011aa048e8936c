"""Command-line options: a parser that reports errors in one line, checked number types, groups that scripts share."""

import argparse
import difflib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tools.errors import BadInput, explain, has_no_reader, silence

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_TABLE = './latency_pkl/latency_gpu.pkl'
TRAIN_LIST = './dataset/ImageNet-100-effb0_train_cls_ratio0.8.txt'
VAL_LIST = './dataset/ImageNet-100-effb0_val_cls_ratio0.8.txt'
"""Defaults of a search: its table, and its lists, which it creates if neither exists."""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help formatter that appends defaults that are not in the help text."""

    def add_argument(self, action):
        """Add an option with its default."""
        text = action.help or ''
        has_default = action.default is not None and action.default is not False  # 0 is a default
        if has_default and action.default != argparse.SUPPRESS and 'default' not in text:
            action.help = f'{text} (default: %(default)s)'.strip()
        super().add_argument(action)


class Parser(argparse.ArgumentParser):
    """ArgumentParser with errors of one line, which name the closest known flag for an unknown one.

    The help shows the script's docstring (its runnable commands) and every default.
    """

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit with code 2."""
        self.exit(2, f'{self.prog}: error: {message}\n')

    def parse_args(self, args=None, namespace=None):
        """Parse the flags; unknown ones are errors."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split('=')[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            self.error(f'unknown argument {unknown[0]}' + (f', did you mean {near[0]}?' if near else ''))
        return parsed


def run_script(main: Callable, args: argparse.Namespace) -> None:
    """Run `main(args)` and exit with the code that it returns (None: 0).

    Bad input gives one line on stderr and exit code 2; a run that cannot continue gives one line and exit code 1.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors='replace')  # a console of few characters, such as Latin-1, shows ? for others
    try:
        code = main(args)
        sys.stdout.flush()
    except BadInput as e:
        message = str(e).rpartition('tools.errors.BadInput: ')[2]  # without the traceback of a worker
        print(f'{sys.argv[0]}: error: {" ".join(message.split())}', file=sys.stderr)
        sys.exit(2)
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

    return check


def count(low: int = 1, high: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type: a whole number from `low` to `high`."""
    return number(int, low, high)


image_size = count(32, 4096)
"""Argparse type: height and width of an input in pixels."""

class_count = count(2, 65536)
"""Argparse type: number of classes."""

process_count = count(0, 1024)
"""Argparse type: number of processes or threads."""


def fraction(text: str) -> float:
    """Parse a float of at least 0 and below 1, as an argparse type."""
    return number(float, 0, math.nextafter(1, 0))(text)


def count_or_all(text: str) -> int | None:
    """Parse a whole number of at least 1, or 'all' as None, as an argparse type."""
    return None if text == 'all' else count()(text)


def yes_no(text: str) -> bool:
    """Parse True or False, as an argparse type."""
    if text.lower() not in ('true', 'false'):
        raise argparse.ArgumentTypeError(f'{text!r} should be True or False')
    return text.lower() == 'true'


def dynamic_or_positive(text: str) -> str | float:
    """Parse 'dynamic' or a positive float, as an argparse type."""
    return text if text == 'dynamic' else number(float, 0, open_low=True)(text)


def project_file(path: str, default: str) -> str:
    """Return a path; the default one, if there is no such file here, in the project's folder."""
    beside = ROOT / default
    return str(beside) if path == default and not Path(path).exists() and beside.exists() else path


def add_device_arg(parser: Parser) -> None:
    """Add --device."""
    parser.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto', help='auto: a GPU if available')


def add_limit_arg(parser: Parser) -> None:
    """Add --limit."""
    parser.add_argument(
        '--limit',
        action='append',
        default=[],
        metavar='TABLE=VALUE',
        help='the network stays at or below VALUE in TABLE, another latency table, or params or macs (in millions); '
        'VALUE may be a share such as 40%%; repeatable',
    )


def add_bad_images_arg(parser: Parser) -> None:
    """Add --bad_images."""
    parser.add_argument(
        '--bad_images',
        choices=('error', 'skip'),
        default='error',
        help='images that cannot be read end the run, or are skipped and logged (at most 1 %% of a list)',
    )


def add_image_args(parser: Parser) -> None:
    """Add flags of training images."""
    add_bad_images_arg(parser)
    parser.add_argument(
        '--device_aug', action='store_true', help='jitter colours on the device: workers load many times as fast'
    )


def add_arch_args(parser: Parser) -> None:
    """Add --model_path and --config_path, exactly one of which names the network."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument('--model_path', help='a searched model (searched_model_NN.pth.tar) or a model.config')
    group.add_argument('--config_path', help='a model.config')


def add_eval_data_args(parser: Parser, batch_size: int, workers: int, required: bool = True) -> None:
    """Add flags of the validation images and their loading."""
    parser.add_argument('--val_root', required=required, help='folder that the paths in --val_list start from')
    parser.add_argument('--val_list', required=required, help="lines of 'relative/path label'")
    parser.add_argument(
        '--workers', type=process_count, default=workers, help='processes that load images, at most one for each core'
    )
    parser.add_argument('--batch_size', type=count(), default=batch_size)
    parser.add_argument('--num_classes', type=class_count, help='default: as many as the list or the weights have')
    parser.add_argument('--img_size', type=image_size, default=224, help='input size in pixels')


def add_search_args(parser: Parser) -> None:
    """Add the flags of the search, except those of its freedoms. Defaults are the paper's recipe."""
    positive = number(float, 0, open_low=True)
    parser.add_argument('--img_root', required=True, help='folder that the paths in both lists start from')
    parser.add_argument('--train_list', default=TRAIN_LIST, help='images that train the weights')
    parser.add_argument('--val_list', default=VAL_LIST, help='images that train the architecture')
    parser.add_argument('--lookup_path', default=DEFAULT_TABLE, help='latency table')
    parser.add_argument('--save', default='./checkpoints', help='folder that gets search-<time>-<note>/')
    parser.add_argument('--note', default='try', help='last part of the name of the run folder')
    add_snapshot_args(parser)
    parser.add_argument(
        '--keep_checkpoints', type=count_or_all, default=2, help='searched models to keep, the newest; or the word all'
    )
    parser.add_argument('--print_freq', type=count(), default=100, help='steps between two lines of the log')
    parser.add_argument(
        '--workers', type=process_count, default=4, help='processes that load the images that train the weights'
    )
    parser.add_argument(
        '--val_workers',
        type=process_count,
        help='processes that load the images that train the architecture; default: half of --workers, at least 1 if'
        ' there are any',
    )
    parser.add_argument('--epochs', type=count(), default=90)
    parser.add_argument('--warmup_epochs', type=count(0), default=10, help='first epochs, which train weights only')
    add_image_args(parser)
    parser.add_argument('--batch_size', type=count(2), default=32)
    parser.add_argument('--img_size', type=image_size, default=224, help='input size in pixels')
    parser.add_argument('--w_lr', type=positive, default=0.025, help='learning rate of the weights')
    parser.add_argument('--w_mom', type=fraction, default=0.9, help='momentum of the weights')
    parser.add_argument('--w_wd', type=number(float, 0), default=1e-5, help='weight decay of the weights')
    parser.add_argument(
        '--a_lr', type=positive, help='learning rate of the architecture; default: 0.01 to 0.2, by the number of steps'
    )
    parser.add_argument('--a_wd', type=number(float, 0), default=5e-4, help='weight decay of the architecture')
    parser.add_argument('--a_beta1', type=fraction, default=0.5, help="Adam's first beta")
    parser.add_argument('--a_beta2', type=fraction, default=0.999, help="Adam's second beta")
    parser.add_argument('--grad_clip', type=positive, default=5.0, help='largest gradient norm')
    parser.add_argument('--T', type=positive, default=5.0, help='temperature of the Gumbel softmax at the start')
    parser.add_argument(
        '--T_decay',
        type=number(float, 0, 1, open_low=True),
        help='its factor an epoch; default: lowers T to 4 %% over the epochs after the warm-up, 0.96 for 80',
    )
    parser.add_argument('--num_classes', type=class_count, help='default: as many as the lists name')
    parser.add_argument('--seed', type=count(0), default=2)
    parser.add_argument('--lambda_lat', type=number(float, 0), default=0.1, help='weight of the latency loss')
    parser.add_argument('--target_lat', default='15.0', help='in ms; or a share of the reachable range, such as 60%%')
    add_limit_arg(parser)
    parser.add_argument('--width_divisor', type=count(), default=1, help='all widths stay multiples of it')
    parser.add_argument(
        '--aligned_start', action='store_true', help='all operators of a block start alike; for short searches'
    )
    parser.add_argument(
        '--largest_epochs',
        type=count(0),
        default=0,
        help='first epochs, which train the largest operators alone; then all start from these; for short searches',
    )
    add_device_arg(parser)
    add_rank_arg(parser)
    add_step_args(parser)
    add_watch_args(parser)


def add_training_args(parser: Parser) -> None:
    """Add all flags of the training scripts, with the paper's recipe as defaults."""
    add_arch_args(parser)
    parser.add_argument('--train_root', required=True, help='folder that the paths in --train_list start from')
    parser.add_argument('--train_list', required=True, help="lines of 'relative/path label'")
    add_eval_data_args(parser, batch_size=512, workers=16)
    parser.add_argument('--weights', help='start from the weights in this file, all but a classifier of other classes')
    add_image_args(parser)
    add_device_arg(parser)
    parser.add_argument('--save', default='./checkpoints', help='folder in which eval-<time>-<note>/ is created')
    parser.add_argument('--note', default='try', help='last part of the name of the run folder')
    add_snapshot_args(parser)
    parser.add_argument('--print_freq', type=count(), default=100, help='steps between log lines')
    add_watch_args(parser)
    parser.add_argument('--epochs', type=count(), default=250)
    parser.add_argument('--lr', type=number(float, 0, open_low=True), default=0.2)
    parser.add_argument('--momentum', type=fraction, default=0.9)
    parser.add_argument('--weight_decay', type=number(float, 0), default=1e-5)
    parser.add_argument('--grad_clip', type=number(float, 0, open_low=True), default=5.0, help='largest gradient norm')
    parser.add_argument('--label_smooth', type=fraction, default=0.1)
    parser.add_argument('--dropout_rate', type=fraction, default=0.2)
    parser.add_argument('--drop_connect_rate', type=fraction, default=0.2)
    parser.add_argument('--seed', type=count(0), default=2)
    add_speed_args(parser)
    add_recipe_args(parser)


def add_watch_args(parser: Parser) -> None:
    """Add flags of what a run writes besides log.txt and metrics.jsonl."""
    parser.add_argument('--tensorboard', action='store_true', help="write TensorBoard's files to the run folder too")
    parser.add_argument(
        '--report',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='draw pictures and report.html at the end; a training then also measures the latency of its network',
    )


def add_snapshot_args(parser: Parser) -> None:
    """Add flags of checkpoints, resuming and determinism."""
    parser.add_argument(
        '--snapshot',
        help='a checkpoint to resume from, in its run folder; auto: the newest good one of this --note under --save, '
        'which also serves restarts by torchrun (--max-restarts)',
    )
    parser.add_argument(
        '--save_freq',
        type=number(float, 0),
        default=10.0,
        help='minutes between two checkpoints within an epoch; 0: after each step',
    )
    parser.add_argument(
        '--deterministic', action='store_true', help='only kernels that give the same bits each time; slower on GPUs'
    )


def add_speed_args(parser: Parser) -> None:
    """Add flags that change the speed of training but not its results, except for rounding."""
    parser.add_argument(
        '--channels_last',
        action=argparse.BooleanOptionalAction,
        help='NHWC memory layout; default: on the CPU and in mixed precision',
    )
    parser.add_argument('--compile', action='store_true', help='compile the network with torch.compile')
    add_rank_arg(parser)


def add_rank_arg(parser: Parser) -> None:
    """Add the flag that older launchers pass to each process."""
    parser.add_argument('--local_rank', '--local-rank', type=count(0), help='set by launchers')


def add_recipe_args(parser: Parser) -> None:
    """Add flags that depart from the paper's recipe; all off by default."""
    alpha = number(float, 0)
    parser.add_argument(
        '--ema_decay', type=fraction, default=0.0, help='keep and evaluate a moving average of the weights'
    )
    parser.add_argument('--mixup', type=alpha, default=0.0, help='alpha of MixUp')
    parser.add_argument(
        '--cutmix', type=alpha, default=0.0, help='alpha of CutMix; with --mixup: one of them at random'
    )
    parser.add_argument(
        '--auto_augment', choices=('autoaugment', 'randaugment', 'trivialaugment'), help='instead of colour jitter'
    )
    parser.add_argument('--grad_accum', type=count(), default=1, help='batches per update, their gradients averaged')
    parser.add_argument('--no_weight_decay_bn', action='store_true', help='no weight decay on batch norm')
    parser.add_argument(
        '--lr_scale', choices=('none', 'linear'), default='none', help='linear: --lr is for 512 images per update'
    )
    parser.add_argument('--max_steps', type=count(), help='stop after this many updates, for trials')


def add_amp_args(parser: Parser) -> None:
    """Add flags of mixed precision."""
    parser.add_argument(
        '--opt_level',
        choices=('O0', 'O1', 'O2', 'O3'),
        help='O0: float32 (default); O1: autocast; O2, O3: only with --amp_backend apex',
    )
    parser.add_argument(
        '--amp_dtype', choices=('float16', 'bfloat16'), help='default: float16 on GPUs, bfloat16 on CPUs'
    )
    parser.add_argument('--amp_backend', choices=('native', 'apex'), default='native')
    parser.add_argument('--loss_scale', type=dynamic_or_positive, help="'dynamic' (default) or a number; float16 only")
    parser.add_argument('--keep_batchnorm_fp32', type=yes_no, help='True or False; default: False with O3 only')


def add_step_args(parser: Parser) -> None:
    """Add flags that change the speed and memory of a search but not its results, except for rounding."""
    parser.add_argument('--amp', choices=('float16', 'bfloat16'), help='autocast to this format; default: float32')
    parser.add_argument('--compile', action='store_true', help='compile batch norms with torch.compile')
    parser.add_argument(
        '--tf32',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='TF32 for float32 products and convolutions of GPUs that have it',
    )
    parser.add_argument(
        '--cuda_graph',
        action='store_true',
        help="launch the architecture step as one CUDA graph, which keeps the step's memory; for GPUs that wait for"
        ' the host',
    )
    parser.add_argument(
        '--checkpoint_ops', action='store_true', help='recompute operators in backward passes to save memory'
    )
