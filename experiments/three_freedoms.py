"""Measure what each of the three search freedoms is worth: searches with and without it, at one latency target.

    python experiments/three_freedoms.py --img_root images/train \\
        --train_list search_train.txt --val_list search_val.txt \\
        --test_root images/test --test_list test.txt --num_classes 10 \\
        --img_size 64 --lookup_path my_table.pkl --save evidence

Arms: `full` method; without `operator` freedom (the Gumbel path alone trains the weights); without `width` freedom (no
scaling); `random` architectures with fitted widths; `most-macs` and `uniform`, networks of equal latency that need no
search (experiments/baselines.py), trained with each seed; `targets`, the full method at other targets. A copy of the
project with no_depth.patch applied has one arm: without `depth` freedom (a skip operator in place of the sinks).

Each run is searched, parsed, trained from scratch on both lists and tested on a third one by the project's scripts. The
plan and its estimated time are printed first. After each run, results.jsonl, table.md and a picture are written. A
stopped or killed experiment goes on with the same command.
"""

import argparse
import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.lists import read_list, write_list
from experiments.baselines import most_macs, uniform
from experiments.results import Run, report
from latency_pkl.sampling import random_network
from models.config import build_config, dump_config
from models.elasticity import fit_widths, latency_range
from models.latency import load_table
from models.search_space import FREEDOMS, SPACE
from tools.errors import BadInput
from tools.files import write_text
from tools.options import Parser, add_device_arg, count, number, run_script
from tools.report.summary import ROWS
from tools.run.metrics import read_run

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_DEPTH = hasattr(SPACE, 'choices')
"""Whether no_depth.patch is applied to this copy of the project."""

ARMS = ('depth',) if WITHOUT_DEPTH else ('full', 'operator', 'width', 'random', 'most-macs', 'uniform', 'targets')
"""Arms that this copy of the project can run."""

BASELINES = {'most-macs': most_macs, 'uniform': uniform}
"""Functions of (table, space, target) that give the architecture and widths of an arm."""

KEPT_OUTPUT = 20_000
"""Characters of a step's output that are kept, the last ones."""

MOST_DRAWS = 10_000
"""Random architectures drawn until one can meet the target."""

TIMED_BATCHES = 6
"""Batches of each kind that the estimate times."""


def arm(name: str) -> str:
    """An argparse type: one of `ARMS`."""
    if name == 'depth' and not WITHOUT_DEPTH:
        raise argparse.ArgumentTypeError("'depth' needs a copy of the project with experiments/no_depth.patch applied")
    if name not in ARMS:
        raise argparse.ArgumentTypeError(f'{name!r} should be one of {", ".join(ARMS)} in this copy of the project')
    return name


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    positive, path = number(float, 0, open_low=True), os.path.abspath  # the scripts run in the project's folder
    parser.add_argument('--img_root', type=path, required=True, help='folder that the paths in both lists start from')
    parser.add_argument('--train_list', type=path, required=True, help='images that train the weights of the supernet')
    parser.add_argument('--val_list', type=path, required=True, help='images that train the architecture')
    parser.add_argument('--test_root', type=path, help='folder of the test images; default: --img_root')
    parser.add_argument('--test_list', type=path, required=True, help='images that neither search nor training uses')
    parser.add_argument('--lookup_path', type=path, required=True, help='latency table of this machine')
    parser.add_argument('--save', type=path, required=True, help='folder of the results and of one folder for each run')
    usual = [name for name in ARMS if name not in BASELINES]
    parser.add_argument('--arms', nargs='+', type=arm, default=usual)
    parser.add_argument('--seeds', nargs='+', type=count(0), default=[0, 1, 2])
    parser.add_argument('--random_networks', type=count(2), default=10)
    parser.add_argument('--target_lat', default='40%', help='in ms; or a share of the reachable range')
    parser.add_argument('--more_targets', nargs='+', default=['25%', '60%'], help='of the arm `targets`')
    parser.add_argument('--num_classes', type=count(2), default=100)
    parser.add_argument('--img_size', type=count(32), default=224)
    parser.add_argument('--batch_size', type=count(2), default=32)
    parser.add_argument('--epochs', type=count(), default=90, help='of a search')
    parser.add_argument('--warmup_epochs', type=count(), default=10, help='of them')
    parser.add_argument('--train_epochs', type=count(), default=250)
    parser.add_argument('--train_batch_size', type=count(2), default=512)
    parser.add_argument('--train_lr', type=positive, default=0.2)
    parser.add_argument('--workers', type=count(0), default=4)
    parser.add_argument('--search_flags', default='', help="more flags of train_search.py, as in '--w_lr 0.01'")
    parser.add_argument('--train_flags', default='', help='more flags of train_eval.py')
    parser.add_argument('--measured_rounds', type=count(), default=3, help='times that each latency is measured')
    parser.add_argument('--jobs', type=count(), default=1, help='runs at a time, which share the CPU threads')
    parser.add_argument('--plan', action='store_true', help='print plan and estimate, and stop')
    add_device_arg(parser)
    args = parser.parse_args()
    args.test_root = args.test_root or args.img_root
    return args


def planned(args) -> list[Run]:
    """Return all runs in order: seed by seed, so that an unfinished experiment has the same seeds in every arm."""
    runs = []
    for seed in args.seeds:
        runs += [Run('full', seed, args.target_lat)] if 'full' in args.arms else []
        for off in ('operator', 'depth', 'width'):
            if off in args.arms:
                runs.append(Run(f'no-{off}', seed, args.target_lat, tuple(f for f in FREEDOMS if f != off)))
        runs += [Run(arm, seed, args.target_lat, None) for arm in BASELINES if arm in args.arms]
        if seed == args.seeds[0] and 'random' in args.arms:
            runs += [Run('random', i, args.target_lat, None) for i in range(args.random_networks)]
    if 'targets' in args.arms:
        for target, seed in itertools.product(args.more_targets, args.seeds):
            runs.append(Run(f'full-at-{target.replace("%", "pc")}', seed, target))
    return runs


class Stopped(Exception):
    """SIGTERM or SIGINT came, and the running scripts have written their state."""


class Scripts:
    """Run the project's scripts, each until it has finished once, some at a time; pass signals on to them."""

    def __init__(self, jobs: int):
        self.children, self.signal, self.lock = set(), 0, threading.RLock()
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        self.environment = ({'OMP_NUM_THREADS': threads} if jobs > 1 else {}) | os.environ
        for number_ in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number_, self.stop)

    def stop(self, number_: int, _frame: object = None) -> None:
        """Start nothing more, and let the running scripts write their state."""
        self.signal = number_
        with self.lock:
            for child in self.children if number_ == signal.SIGTERM else ():  # a terminal's SIGINT goes to all
                os.kill(child.pid, number_)

    def once(self, folder: Path, step: str, words: list, done: str) -> dict:
        """Run a step if it is not finished. Return its record: output, seconds of wall clock and CPU over all attempts.

        Args:
            done: pattern in the output of a finished step.

        Raises:
            BadInput: the step failed, or was finished by another command.
            Stopped: see there.
        """
        path, command = folder / f'{step}.json', shlex.join(map(str, words))
        record = json.loads(path.read_text()) if path.exists() else {'finished': False, 'wall_s': 0.0, 'cpu_s': 0.0}
        if record['finished']:
            if record['command'] != command:
                raise BadInput(f'{path}: of another command; give its flags, or another --save: {record["command"]}')
            return record
        folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        code, out, cpu = self._run(words, folder / f'{step}.err', f'{folder.name} {step}')
        record['wall_s'] += time.monotonic() - start
        record['cpu_s'] += cpu
        record |= {
            'command': command,
            'output': out[-KEPT_OUTPUT:],
            'finished': code == 0 and bool(re.search(done, out, re.M)),
        }
        write_text(path, json.dumps(record) + '\n')
        if self.signal:
            raise Stopped
        if code or not record['finished']:
            errors = (folder / f'{step}.err').read_text().strip().splitlines()
            why = ' '.join(errors[-1:]) if code else f'and did not print {done!r}'
            raise BadInput(f'{folder.name}: {step} ended with {code}: {why}')
        return record

    def _run(self, words: list, errors: Path, name: str) -> tuple[int, str, float]:
        """Run a script. Return its exit code, what it printed, and seconds of CPU."""
        command = [sys.executable, *map(str, words)]
        with self.lock:
            if self.signal:
                raise Stopped
            print(f'{time.strftime("%H:%M:%S")} {name}', flush=True)
            with open(errors, 'w') as stderr:
                child = subprocess.Popen(
                    command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=stderr, text=True
                )
            self.children.add(child)
            if self.signal == signal.SIGTERM:  # came in this thread, before the child was listed
                os.kill(child.pid, signal.SIGTERM)
        with child.stdout:
            out = child.stdout.read()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # keeps the pid taken until the child is removed
        with self.lock:
            self.children.remove(child)
            # wait4 in place of child.wait(), for the CPU time of this child alone
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        return child.returncode, out, used.ru_utime + used.ru_stime


def shared_flags(args) -> list:
    """Return the flags of all scripts that read images."""
    return ['--num_classes', args.num_classes, '--img_size', args.img_size, '--device', args.device]


def search_words(run: Run, folder: Path, args) -> list:
    """Return the command of a run's search."""
    return [
        'train_search.py', *shared_flags(args), '--img_root', args.img_root, '--train_list', args.train_list,
        '--val_list', args.val_list, '--lookup_path', args.lookup_path, '--target_lat', run.target, '--save',
        folder / 'search', '--note', run.name, '--batch_size', args.batch_size, '--workers', args.workers, '--epochs',
        args.epochs, '--warmup_epochs', args.warmup_epochs, '--seed', run.seed, '--freedoms', *run.freedoms,
        *shlex.split(args.search_flags), '--snapshot', 'auto',
    ]  # fmt: skip


def train_words(config: Path, save: Path, seed: int, args) -> list:
    """Return the command that trains a network from scratch."""
    return [
        'train_eval.py', *shared_flags(args), '--train_root', args.img_root, '--train_list',
        Path(args.save) / 'both.txt', '--val_root', args.test_root, '--val_list', args.test_list, '--config_path',
        config, '--save', save, '--batch_size', args.train_batch_size, '--workers', args.workers, '--epochs',
        args.train_epochs, '--lr', args.train_lr, '--seed', seed, *shlex.split(args.train_flags), '--snapshot', 'auto',
    ]  # fmt: skip


def random_of_target(seed: int, table, target: float) -> tuple:
    """Return a random architecture that can meet the target, and fitted widths."""
    rng = random.Random(seed)
    for _ in range(MOST_DRAWS):
        arch, _ = random_network(rng, False, SPACE)
        least, most = latency_range(arch, table, SPACE, table.width_divisor)
        if least <= target <= most:
            return arch, fit_widths(arch, SPACE.start_widths(), table, SPACE, target, table.width_divisor)
    raise BadInput(
        f'--target_lat: none of {MOST_DRAWS} random architectures can meet {target:.4f} {table.unit}; take a target'
        ' further from the ends of the range'
    )


def draw_network(run: Run, folder: Path, table, args) -> None:
    """Write the network of an arm without a search: architecture.json and drawn.config."""
    target = table.target(run.target, SPACE)
    if run.arm in BASELINES:
        arch, widths = BASELINES[run.arm](table, SPACE, target)
    else:
        arch, widths = random_of_target(run.seed, table, target)
    write_text(folder / 'architecture.json', json.dumps({'arch': arch, 'widths': widths}) + '\n')
    write_text(folder / 'drawn.config', dump_config(build_config(arch, widths, args.num_classes, SPACE)))


def find_network(run: Run, folder: Path, table, scripts: Scripts, args) -> None:
    """Search, or draw at random, and write model.config."""
    parse = ['parsing_model.py', *shared_flags(args), '--lookup_path', args.lookup_path, '--save_path',
             folder / 'model.config']  # fmt: skip
    if run.freedoms is None:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / 'drawn.config').exists():
            draw_network(run, folder, table, args)
        scripts.once(folder, 'parse', [*parse, '--config_path', folder / 'drawn.config'], 'Lat_LUT')
        return
    scripts.once(folder, 'search', search_words(run, folder, args), 'searched model: ')
    models = sorted(folder.glob('search/*/searched_model_*.pth.tar'), key=lambda path: (len(path.name), path.name))
    for old in [*models[:-1], *folder.glob('search/*/checkpoint*.pth.tar')]:
        old.unlink()
    target = ['--target_lat', run.target] if 'width' in run.freedoms else []
    scripts.once(folder, 'parse', [*parse, '--model_path', models[-1], *target], 'Lat_LUT')


def follow(run: Run, table, scripts: Scripts, args) -> None:
    """Take one run from search to test."""
    folder = Path(args.save) / run.name
    find_network(run, folder, table, scripts, args)
    config = folder / 'model.config'
    scripts.once(folder, 'train', train_words(config, folder / 'train', run.seed, args), 'done: epoch')
    # not the best weights: the test images would have chosen them
    (weights,) = folder.glob('train/*/checkpoint.pth.tar')
    words = ['test.py', *shared_flags(args), '--val_root', args.test_root, '--val_list', args.test_list, '--workers',
             args.workers, '--config_path', config, '--weights', weights]  # fmt: skip
    scripts.once(folder, 'test', words, 'Val_acc_top1')


def follow_all(runs: list[Run], table, scripts: Scripts, args) -> None:
    """Follow all runs, `args.jobs` at a time; write the results after each."""
    writing = threading.Lock()

    def one(run: Run) -> None:
        """Follow a run and report. If it fails, stop the others before another begins."""
        try:
            follow(run, table, scripts, args)
            with writing:
                report(runs, table, args)
        except BaseException:
            if not scripts.signal:
                scripts.stop(signal.SIGTERM)
            raise

    with ThreadPoolExecutor(args.jobs) as pool:
        done = [pool.submit(one, run) for run in runs]
    errors = [error for run in done if (error := run.exception())]
    if errors:
        raise next((error for error in errors if not isinstance(error, Stopped)), errors[0])


def rank_paths(runs: list[Run], scripts: Scripts, args) -> None:
    """Test networks with the weights of each full search: the found and the random ones on the images of the search,
    the found one and its runner-ups on the test images."""
    save = Path(args.save)
    drawn = [save / run.name / 'architecture.json' for run in runs if run.arm == 'random']
    for run in runs:
        if run.arm != 'full':
            continue
        (model,) = (save / run.name).glob('search/*/searched_model_*.pth.tar')
        words = ['experiments/path_accuracy.py', *shared_flags(args), '--model_path', model, '--batch_size',
                 args.batch_size]  # fmt: skip
        if drawn:
            searched = ['--val_root', args.img_root, '--val_list', args.val_list, '--architectures', *drawn]
            scripts.once(save / run.name, f'paths-{len(drawn)}', [*words, *searched], 'supernet top1')
        tested = ['--val_root', args.test_root, '--val_list', args.test_list, '--runner_ups', args.lookup_path]
        scripts.once(save / run.name, 'runner_ups', [*words, *tested], 'supernet top1')


def measure(runs: list[Run], scripts: Scripts, args) -> None:
    """Time all networks in turn, in fresh processes and several rounds, so that a contended core affects all alike."""
    for number_, run in itertools.product(range(1, args.measured_rounds + 1), runs):
        folder = Path(args.save) / run.name
        words = ['parsing_model.py', *shared_flags(args), '--lookup_path', args.lookup_path, '--print_lat',
                 '--config_path', folder / 'model.config', '--save_path', folder / 'measured.config']  # fmt: skip
        scripts.once(folder, f'measure-{number_}', words, ROWS['measured'][0])


def step_seconds(folder: Path, kind: str) -> list[float]:
    """Return the seconds that a step takes in each epoch of a timed run, from its metrics."""
    by_epoch = {}
    metrics = max(folder.glob(f'{kind}/*/metrics.jsonl'), key=lambda path: path.stat().st_mtime_ns)
    for line in read_run(metrics).of('step'):
        by_epoch.setdefault(line['epoch'], []).append((line['step'], line['time']))
    return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in ((v[0], v[-1]) for v in by_epoch.values() if len(v) > 1)]


def estimate(runs: list[Run], table, scripts: Scripts, args) -> str:
    """Time a few real steps of each kind, once. Return the estimated time of the plan, as text."""
    folder = Path(args.save) / f'timing-{args.jobs}'
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name in ('train', 'val'):
        samples = read_list(getattr(args, f'{name}_list'), args.img_root, args.num_classes)
        counts[name] = len(samples)
        few = random.Random(0).sample(samples, min(len(samples), TIMED_BATCHES * args.batch_size))
        write_list(few, folder / f'{name}.txt')
    timed = Run('timing', 0, args.target_lat)
    more = ['--train_list', folder / 'train.txt', '--val_list', folder / 'val.txt', '--epochs', 2, '--warmup_epochs', 1]
    more += ['--largest_epochs', 0]
    scripts.once(folder, 'search', [*search_words(timed, folder, args), *more, '--print_freq', 1], 'searched model: ')
    draw_network(Run('timing', 0, args.target_lat, None), folder, table, args)
    words = train_words(folder / 'drawn.config', folder / 'train', 0, args)
    scripts.once(folder, 'train', [*words, '--max_steps', TIMED_BATCHES, '--print_freq', 1], 'done: epoch')
    warm, search = step_seconds(folder, 'search')
    (train,) = step_seconds(folder, 'train')
    steps = counts['train'] // args.batch_size
    one_search = steps * (args.warmup_epochs * warm + (args.epochs - args.warmup_epochs) * search)
    one_training = train * (sum(counts.values()) // args.train_batch_size) * args.train_epochs
    searches = sum(run.freedoms is not None for run in runs)
    jobs = min(args.jobs, len(runs))
    hours = (searches * one_search + len(runs) * one_training) / 3600 / jobs
    return (
        f'{searches} searches of {one_search / 60:.1f} min ({warm:.3f} s a step of the warm-up, {search:.3f} s after), '
        f'{len(runs)} trainings of {one_training / 60:.1f} min ({train:.3f} s a step), {jobs} at a time: '
        f'{hours:.1f} hours from the start' + (', if they do not slow down each other' if jobs > 1 else '')
    )


def check_table(path: Path, lookup_path: str) -> None:
    """Keep a fingerprint of the latency table in `path`.

    Raises:
        BadInput: an earlier call had another table.
    """
    found = sha256(Path(lookup_path).read_bytes()).hexdigest()
    if path.exists() and path.read_text() != found:
        raise BadInput(f'--lookup_path {lookup_path}: {path.parent} was begun with another table; give another --save')
    if not path.exists():
        write_text(path, found)


def main(args):
    """Plan, follow every run, test paths of the supernets, measure latencies."""
    save = Path(args.save)
    table = load_table(args.lookup_path, args.img_size, SPACE)
    lists = [read_list(p, args.img_root, args.num_classes) for p in (args.train_list, args.val_list)]
    tested = read_list(args.test_list, args.test_root, args.num_classes)
    if args.test_root == args.img_root and {path for path, _ in tested} & {path for path, _ in lists[0] + lists[1]}:
        raise BadInput(f'--test_list {args.test_list}: has images of the search or the training')
    save.mkdir(parents=True, exist_ok=True)
    check_table(save / 'table.sha256', args.lookup_path)
    write_list(lists[0] + lists[1], save / 'both.txt')
    runs, scripts = planned(args), Scripts(args.jobs)
    for run in runs:
        table.target(run.target, SPACE)
        print(f'{run.name}: target {run.target}')
    try:
        print(estimate(runs, table, scripts, args), flush=True)
        if args.plan:
            return 0
        follow_all(runs, table, scripts, args)
        rank_paths(runs, scripts, args)
        measure(runs, scripts, args)
    except Stopped:
        print('Stopped; the same command goes on', flush=True)
        return 130 if scripts.signal == signal.SIGINT else 0
    report(runs, table, args)
    print((save / 'table.md').read_text())
    return 0


if __name__ == '__main__':
    run_script(main, get_args())
