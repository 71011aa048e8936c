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


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows defaults that a help text does not tell."""

    def add_argument(self, action):
        """An option of the help."""
        says = action.help or ''
        has_default = action.default is not None and action.default is not False  # 0 is one
        if has_default and action.default != argparse.SUPPRESS and 'default' not in says:
            action.help = f'{says} (default: %(default)s)'.strip()
        super().add_argument(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, whose unknown flags name the nearest known one, and whose help shows
    the script's docstring (its runnable commands) and every default."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description,
            formatter_class=_Help,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Report in one line and exit with code 2."""
        self.exit(2, f'{self.prog}: error: {message}\n')

    def parse_args(self, args=None, namespace=None):
        """Parse; unknown flags are errors."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split('=')[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            self.error(f'unknown argument {unknown[0]}' + (f', did you mean {near[0]}?' if near else ''))
        return parsed


def run_script(main: Callable, args: argparse.Namespace) -> None:
    """Run `main(args)` and exit with what it returns (None: 0).

    Input that cannot be used ends in one line on stderr and exit code 2, a run that cannot go on in one line and exit
    code 1.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors='replace')  # a console of few characters, such as Latin-1, shows ? for others
    try:
        code = main(args)
        sys.stdout.flush()
    except BadInput as e:
        message = str(e).rpartition('tools.errors.BadInput: ')[2]  # without a traceback of a process that loads images
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
    """An argparse type: an int or float from `low` to `high` (`open_low`: above `low`)."""

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
    """An argparse type: a whole number from `low` to `high`."""
    return number(int, low, high)


image_size = count(32, 4096)
"""An argparse type: pixels of an input's side."""

class_count = count(2, 65536)
"""An argparse type: number of classes."""

process_count = count(0, 1024)
"""An argparse type: number of processes or threads."""


def fraction(text: str) -> float:
    """An argparse type: a float from 0 up to, but not including, 1."""
    return number(float, 0, math.nextafter(1, 0))(text)


def count_or_all(text: str) -> int | None:
    """An argparse type: a whole number of at least 1; None for the word 'all'."""
    return None if text == 'all' else count()(text)


def yes_no(text: str) -> bool:
    """An argparse type for flags that take the words True or False."""
    if text.lower() not in ('true', 'false'):
        raise argparse.ArgumentTypeError(f'{text!r} should be True or False')
    return text.lower() == 'true'


def dynamic_or_positive(text: str) -> str | float:
    """An argparse type: the word 'dynamic' or a positive float."""
    return text if text == 'dynamic' else number(float, 0, open_low=True)(text)


def project_file(path: str, default: str) -> str:
    """Return a path; the default one, if there is no such file here, in the project's folder."""
    beside = ROOT / default
    return str(beside) if path == default and not Path(path).exists() and beside.exists() else path


def add_device_arg(parser: Parser) -> None:
    """--device."""
    parser.add_argument(
        '--device', choices=('auto', 'cpu', 'cuda'), default='auto', help='auto: a GPU where there is one'
    )


def add_bad_images_arg(parser: Parser) -> None:
    """--bad_images."""
    parser.add_argument(
        '--bad_images',
        choices=('error', 'skip'),
        default='error',
        help='images that cannot be read end the run, or are skipped and logged (at most 1 %% of a list)',
    )


def add_image_args(parser: Parser) -> None:
    """How images for training are loaded."""
    add_bad_images_arg(parser)
    parser.add_argument(
        '--device_aug', action='store_true', help='jitter colours on the device: workers load many times as fast'
    )


def add_arch_args(parser: Parser, required: bool = True) -> None:
    """--model_path and --config_path, of which one names the network."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument('--model_path', help='a searched model (searched_model_NN.pth.tar) or a model.config')
    group.add_argument('--config_path', help='a model.config')


def add_eval_data_args(parser: Parser, batch_size: int, workers: int, required: bool = True) -> None:
    """The validation images, and how they are loaded."""
    parser.add_argument('--val_root', required=required, help='folder that the paths in --val_list start from')
    parser.add_argument('--val_list', required=required, help="lines of 'relative/path label'")
    parser.add_argument('--workers', type=process_count, default=workers, help='processes that load images')
    parser.add_argument('--batch_size', type=count(), default=batch_size)
    parser.add_argument('--num_classes', type=class_count, help='default: as many as the list or the weights have')
    parser.add_argument('--img_size', type=image_size, default=224, help='input size in pixels')


def add_training_args(parser: Parser) -> None:
    """All flags of the training scripts, with the paper's recipe as defaults."""
    add_arch_args(parser)
    parser.add_argument('--train_root', required=True, help='folder that the paths in --train_list start from')
    parser.add_argument('--train_list', required=True, help="lines of 'relative/path label'")
    add_eval_data_args(parser, batch_size=512, workers=16)
    parser.add_argument('--weights', help='start from the weights in this file, all but a classifier of other classes')
    add_image_args(parser)
    add_device_arg(parser)
    parser.add_argument('--save', default='./checkpoints', help='folder that gets eval-<time>-<note>/')
    parser.add_argument('--note', default='try', help='last part of the name of the run folder')
    add_snapshot_args(parser)
    parser.add_argument('--print_freq', type=count(), default=100, help='steps between two lines of the log')
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
    """What a run leaves to look at, besides log.txt and metrics.jsonl."""
    parser.add_argument('--tensorboard', action='store_true', help="write TensorBoard's files to the run folder too")
    parser.add_argument(
        '--report',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='draw pictures and report.html at the end; a training then also measures the latency of its network',
    )


def add_snapshot_args(parser: Parser) -> None:
    """How often a run saves where it stands, and what it goes on from."""
    parser.add_argument(
        '--snapshot',
        help='a checkpoint to resume from, in its run folder; auto: the newest good one of this --note under --save, '
        'also right for runs that torchrun restarts (--max-restarts)',
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
    """Flags that change how fast a network is trained and not what it learns."""
    parser.add_argument(
        '--channels_last',
        action=argparse.BooleanOptionalAction,
        help='NHWC memory layout; by default on the CPU and in mixed precision',
    )
    parser.add_argument('--compile', action='store_true', help='compile the network with torch.compile')
    add_rank_arg(parser)


def add_rank_arg(parser: Parser) -> None:
    """What older launchers pass to each of many processes."""
    parser.add_argument('--local_rank', '--local-rank', type=count(0), help='set by launchers')


def add_recipe_args(parser: Parser) -> None:
    """Flags that leave the paper's recipe; all off by default."""
    alpha = number(float, 0)
    parser.add_argument(
        '--ema_decay', type=fraction, default=0.0, help='keep and evaluate a moving average of the weights'
    )
    parser.add_argument('--mixup', type=alpha, default=0.0, help='alpha of MixUp')
    parser.add_argument(
        '--cutmix', type=alpha, default=0.0, help='alpha of CutMix; with --mixup: one of them at random'
    )
    parser.add_argument(
        '--auto_augment', choices=('autoaugment', 'randaugment', 'trivialaugment'), help='in place of colour jitter'
    )
    parser.add_argument('--grad_accum', type=count(), default=1, help='batches whose gradients make one update')
    parser.add_argument('--no_weight_decay_bn', action='store_true', help='no weight decay on batch norm')
    parser.add_argument(
        '--lr_scale', choices=('none', 'linear'), default='none', help='linear: --lr is for 512 images an update'
    )
    parser.add_argument('--max_steps', type=count(), help='stop after so many updates, for trials')


def add_amp_args(parser: Parser) -> None:
    """Flags of mixed precision."""
    parser.add_argument(
        '--opt_level',
        choices=('O0', 'O1', 'O2', 'O3'),
        help='O0: float32 (default); O1: autocast; O2, O3: of apex, with --amp_backend apex',
    )
    parser.add_argument(
        '--amp_dtype', choices=('float16', 'bfloat16'), help='default: float16 on GPUs, bfloat16 on CPUs'
    )
    parser.add_argument('--amp_backend', choices=('native', 'apex'), default='native')
    parser.add_argument('--loss_scale', type=dynamic_or_positive, help="'dynamic' (default) or a number; float16 only")
    parser.add_argument('--keep_batchnorm_fp32', type=yes_no, help='True or False; default: False with O3 only')


def add_step_args(parser: Parser) -> None:
    """Flags that change how fast a search is and what memory it needs, and not what it computes but for rounding."""
    parser.add_argument(
        '--amp', choices=('float16', 'bfloat16'), help='autocast to this format; by default all is float32'
    )
    parser.add_argument('--compile', action='store_true', help='compile batch norms with torch.compile')
    parser.add_argument(
        '--checkpoint_ops', action='store_true', help='compute operators again in backward passes, to save memory'
    )
