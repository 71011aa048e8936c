"""Command-line options: a parser that reports errors in one line, checked number types, groups that scripts share."""

import argparse
import difflib
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

DEFAULT_TABLE = './latency_pkl/latency_gpu.pkl'
TRAIN_LIST = './dataset/ImageNet-100-effb0_train_cls_ratio0.8.txt'
VAL_LIST = './dataset/ImageNet-100-effb0_val_cls_ratio0.8.txt'
"""Defaults of a search: its table, and its lists of ImageNet, which it creates if neither exists."""

USUAL_SIZE = 224  # height and width of the input in pixels if neither a flag nor a file gives them: the paper's
RECIPE_BATCH, RECIPE_LR = 512, 0.2
"""Images an update, and the learning rate that belongs to them, of the paper's training."""


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
"""Titles of the groups of flags, in the order of the help."""


class Flags(argparse.Namespace):
    """Parsed flags. `defaults` has the default of each, and is no flag itself."""

    __slots__ = ('defaults',)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help formatter: usage with the required flags only, filled paragraphs, and the default of each flag."""

    def add_argument(self, action):
        """Add an option with its default."""
        text = action.help or ''
        has_default = action.default not in (None, []) and action.default is not False  # 0 is a default
        if has_default and action.default != argparse.SUPPRESS and 'default' not in text:
            values = action.default if isinstance(action.default, list) else [action.default]
            default = ' '.join(map(str, values)).replace('%', '%%')
            action.help = f'{text} (default: {default})'.strip()
        super().add_argument(action)

    def add_usage(self, usage, actions, groups, prefix=None):
        """Add the usage; the groups list the other flags."""
        choices = [action for group in groups if group.required for action in group._group_actions]
        needed = [a for a in actions if a.required or not a.option_strings or a in choices]
        super().add_usage(usage, needed, groups, prefix)

    def _format_usage(self, usage, actions, groups, prefix):
        return f'{super()._format_usage(usage, actions, groups, prefix).rstrip()} [flags]\n\n'

    def _fill_text(self, text, width, indent):
        """Return the docstring, with paragraphs that are not indented filled."""
        parts = [part if part.startswith(' ') else fill(part, width) for part in text.strip().split('\n\n')]
        return '\n\n'.join(parts)

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, 'metavar', None) or super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """ArgumentParser with errors of one line, which name the closest known flag for an unknown one.

    The help shows the script's docstring (its runnable commands) and every default. Dashes in names of flags count as
    underscores. `@flags.txt` gives the flags in that file.
    """

    def __init__(self, description: str | None):
        super().__init__(
            description=description,
            epilog='Flags may be written with dashes, and read from a file by @flags.txt: one flag and value a line.',
            formatter_class=_Help,
            allow_abbrev=False,
        )
        self.groups = {title: self.add_argument_group(title) for title in GROUPS}

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit with code 2."""
        self.exit(2, f'{self.prog}: error: {message}\n')

    def parse_args(self, args=None, namespace=None):
        """Parse the flags; unknown ones are errors."""
        parsed, unknown = self.parse_known_args(args, namespace or Flags())
        parsed.defaults = {action.dest: action.default for action in self._actions} | self._defaults
        if unknown:
            flag = unknown[0].split('=')[0]
            near = difflib.get_close_matches(flag.replace('-', '_'), self._spellings(), n=1)
            also = f', did you mean {self._spellings()[near[0]]}?' if near else ''
            self.error(f'unknown argument {unknown[0]}{also}')
        return parsed

    def parse_known_args(self, args=None, namespace=None):
        """Parse the flags, and return those that are not known too."""
        words, known = [], self._spellings()
        for word in sys.argv[1:] if args is None else args:
            words += self._words_of(word[1:]) if word.startswith('@') else [word]
        for i, word in enumerate(words):
            name, equals, value = word.partition('=')
            if word.startswith('--'):
                words[i] = known.get(name.replace('-', '_'), name) + equals + value
        return super().parse_known_args(words, namespace)

    def _spellings(self) -> dict[str, str]:
        """Return the long flags by their names with underscores for all dashes."""
        return {flag.replace('-', '_'): flag for flag in self._option_string_actions if flag.startswith('--')}

    def _words_of(self, path: str) -> list[str]:
        """Return the words of a file of flags; # begins a comment."""
        try:
            return shlex.split(Path(path).read_text(encoding='utf-8'), comments=True)
        except OSError as e:
            self.error(f'@{path}: no file of flags there ({e.strerror})')
        except ValueError as e:
            self.error(f'@{path}: not a file of flags, one flag and value a line ({e})')


def changed_flags(args: argparse.Namespace) -> list[str]:
    """Return the words of the flags that differ from their defaults; of all flags if `args` has no defaults."""
    defaults, words = getattr(args, 'defaults', {}), []
    for name, value in vars(args).items():
        if name in defaults and value == defaults[name]:
            continue
        if isinstance(value, bool):
            words.append(f'--{name}' if value else f'--no-{name}')
        elif value is not None:
            words += [f'--{name}', *map(str, value if isinstance(value, (list, tuple)) else [value])]
        elif defaults.get(name) is not None:
            words += [f'--{name}', 'all']  # see `count_or_all`
    return words


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


image_size = count(32, 4096)
"""Argparse type: height and width of an input in pixels."""

class_count = count(2, 65536)
"""Argparse type: number of classes."""

process_count = count(0, 1024)
"""Argparse type: number of processes or threads."""


fraction = number(float, 0, math.nextafter(1, 0))
"""Argparse type: a float of at least 0 and below 1."""


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


def add_search_args(parser: Parser) -> None:
    """Add the flags of the search, except those of its freedoms. Defaults are the paper's recipe."""
    data = parser.groups['data']
    data.add_argument(
        '--img_root',
        metavar='FOLDER',
        required=True,
        help='folder that the paths in both lists start from; or of class folders',
    )
    lists = f'default: of the class folders of --img_root; for ImageNet {TRAIN_LIST}, {VAL_LIST}, made if need be'
    data.add_argument('--train_list', metavar='FILE', help=f'images that train the weights; {lists}')
    data.add_argument('--val_list', metavar='FILE', help='images that train the architecture')
    data.add_argument('--num_classes', type=class_count, help='number of classes; default: as many as the lists name')
    add_size_arg(parser, 'of the table')
    data.add_argument(
        '--batch_size',
        type=count(2),
        default=32,
        help='images a step, over all devices; at most as many as there are images',
    )
    add_image_args(parser)
    add_schedule_args(parser)

    latency = parser.groups['latency']
    latency.add_argument('--lookup_path', metavar='FILE', default=DEFAULT_TABLE, help='latency table')
    latency.add_argument(
        '--target_lat', metavar='MS', default='15.0', help='in ms; or a share of the reachable range, such as 60%%'
    )
    latency.add_argument('--lambda_lat', type=number(float, 0), default=0.1, help='weight of the latency loss')
    latency.add_argument(
        '--width_divisor', type=count(), help="all widths stay multiples of it; default: the table's, or 1"
    )

    add_output_args(parser, 'search')
    add_snapshot_args(parser)
    parser.groups['resuming'].add_argument(
        '--keep_checkpoints',
        metavar='N',
        type=count_or_all,
        default=2,
        help='searched models to keep, the newest; or the word all',
    )
    hardware = parser.groups['hardware']
    add_device_arg(parser)
    hardware.add_argument(
        '--workers', type=process_count, default=4, help='processes that load the images that train the weights'
    )
    hardware.add_argument(
        '--val_workers',
        type=process_count,
        help='processes that load the images that train the architecture; default: half of --workers, at least 1 if'
        ' there are any',
    )
    add_step_args(parser)
    add_rank_arg(parser)


def add_schedule_args(parser: Parser) -> None:
    """Add the flags of a search's length and of its two optimizers. Defaults are the paper's recipe."""
    positive, search = number(float, 0, open_low=True), parser.groups['search']
    search.add_argument('--epochs', type=count(), default=90, help='epochs in all')
    search.add_argument('--warmup_epochs', type=count(0), default=10, help='first epochs, which train weights only')
    search.add_argument('--w_lr', type=positive, default=0.025, help='learning rate of the weights')
    search.add_argument('--w_mom', type=fraction, default=0.9, help='momentum of the weights')
    search.add_argument('--w_wd', type=number(float, 0), default=1e-5, help='weight decay of the weights')
    search.add_argument(
        '--a_lr',
        type=positive,
        help="learning rate of the architecture; default: the paper's 0.01, more for fewer steps",
    )
    search.add_argument(
        '--a_wd',
        type=number(float, 0),
        help="weight decay of the architecture; default: the paper's 5e-4, less for fewer steps",
    )
    search.add_argument('--a_beta1', type=fraction, default=0.5, help="Adam's first beta")
    search.add_argument('--a_beta2', type=fraction, default=0.999, help="Adam's second beta")
    search.add_argument('--grad_clip', type=positive, default=5.0, help='largest gradient norm')
    search.add_argument('--T', type=positive, default=5.0, help='temperature of the Gumbel softmax at the start')
    search.add_argument(
        '--T_decay',
        type=number(float, 0, 1, open_low=True),
        help='factor on T after an epoch; default: the same product over the epochs after the warm-up as 0.96 over 80',
    )
    search.add_argument('--seed', type=count(0), default=2, help='seed of all that is drawn')
    search.add_argument(
        '--aligned_start', action='store_true', help='all operators of a block start alike; for short searches'
    )
    search.add_argument(
        '--largest_epochs',
        type=count(0),
        default=0,
        help='first epochs, which train the largest operators alone; then all start from these; for short searches',
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
    hardware.add_argument(
        '--opt_level',
        choices=('O0', 'O1', 'O2', 'O3'),
        help='O0: float32 (default); O1: autocast; O2, O3: only with --amp_backend apex',
    )
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
    hardware.add_argument(
        '--keep_batchnorm_fp32', metavar='BOOL', type=yes_no, help='True or False; default: False with O3 only'
    )


def add_tf32_arg(parser: Parser, default: bool | None = True, usual: str = '') -> None:
    """Add --tf32 and --no-tf32."""
    text = 'TF32 for float32 products and convolutions of GPUs that have it'
    parser.groups['hardware'].add_argument(
        '--tf32', action=argparse.BooleanOptionalAction, default=default, help=text + usual
    )


def add_step_args(parser: Parser) -> None:
    """Add flags that change the speed and memory of a search but not its results, except for rounding."""
    hardware = parser.groups['hardware']
    hardware.add_argument('--amp', choices=('float16', 'bfloat16'), help='autocast to this format; default: float32')
    hardware.add_argument('--compile', action='store_true', help='compile batch norms with torch.compile')
    add_tf32_arg(parser)
    hardware.add_argument(
        '--cuda_graph',
        action='store_true',
        help="launch the architecture step as one CUDA graph, which keeps the step's memory; for GPUs that wait for"
        ' the host',
    )
    hardware.add_argument(
        '--checkpoint_ops', action='store_true', help='recompute operators in backward passes to save memory'
    )
