"""Time the networks of this kit with ONNX Runtime, and write timings.csv. Needs onnxruntime and numpy.

    python time_networks.py
    python time_networks.py --provider CUDAExecutionProvider --note "Jetson Orin, 15 W"

Stop it at any time (Ctrl-C); the same command goes on later. Keep the device free of other work, and plugged in.

In each round, every network is loaded, warmed up and timed, in random order. A reference network runs between its
passes. A network's time is its ratio to the reference, times the reference's usual time, so that a device that slows
down as it heats up slows down both. Turns in which the reference was unsteady or far from its usual time are repeated.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent
REFERENCE = 'reference'

BLOCKS, PASSES, REFERENCE_PASSES = 3, 3, 2
"""Blocks of passes of a network in a turn, timed passes of each, and of the reference before and after each."""

WARM_SECONDS = 0.01
"""Least time that a network runs before timed passes: the caches hold the data of what ran before it."""

WARM_UP_SECONDS = 3.0
"""Time that the reference runs before anything is timed, for clocks to rise."""

UNSTEADY = 1.1
"""Ratio of the reference's times, within a turn or to its usual time, above which the turn is repeated."""

COOL_DOWN_SECONDS, COOL_DOWN_SHARE = 5.0, 0.2
"""Pause after a turn in which the reference was that much slower, and upper bound on the share of all time in pauses.
"""

TYPICAL = 0.25
"""Quantile of the passes that counts: other work on the device only ever slows passes down."""


def get_args(argv=None):
    """Parse `argv`, or the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--threads', type=int, default=1, help='CPU threads of a pass (default: 1)')
    parser.add_argument('--provider', default='CPUExecutionProvider', help='execution provider of ONNX Runtime')
    parser.add_argument('--batch_size', type=int, help="images a pass (default: the kit's)")
    parser.add_argument('--rounds', type=int, default=4, help='times that each network is loaded and timed')
    parser.add_argument('--output', default=str(HERE / 'timings.csv'), help='file to write (default: timings.csv here)')
    parser.add_argument('--note', help='name of the device (default: as the system names it)')
    parser.add_argument('--again', action='store_true', help='forget earlier timings of --output')
    args = parser.parse_args(argv)
    for name in ('threads', 'batch_size', 'rounds'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f'--{name} should be at least 1')
    available = onnxruntime.get_available_providers()
    if args.provider not in available:
        parser.error(f'--provider {args.provider}: there are {", ".join(available)}')
    return args


def fail(message):
    """Exit with code 2 and one line."""
    print(f'time_networks.py: error: {message}', file=sys.stderr)
    sys.exit(2)


def device_name():
    """Return the system's name of the board or processor."""
    for path, key in (('/proc/device-tree/model', ''), ('/proc/cpuinfo', 'model name'), ('/proc/cpuinfo', 'Hardware')):
        try:
            for line in Path(path).read_text(errors='replace').splitlines():
                name = line.partition(':')[2] if key and line.startswith(key) else '' if key else line
                if name.strip('\0 \t'):
                    return name.strip('\0 \t')
        except OSError:
            pass
    return platform.processor() or platform.machine()


def write_whole(path, text):
    """Write a text file whole or not at all."""
    temporary = f'{path}.{os.getpid()}.part'
    with open(temporary, 'w', encoding='utf-8') as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, str(path))


class Network:
    """A loaded network that is ready to run."""

    def __init__(self, path, settings, size):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = settings['threads'], 3
        options.add_free_dimension_override_by_name('batch', settings['batch_size'])
        self.session = onnxruntime.InferenceSession(str(path), options, providers=[settings['provider']])
        if self.session.get_providers()[0] != settings['provider']:  # it falls back to the CPU without an error
            fail(f'{settings["provider"]} does not work on this device')
        self.images = np.random.default_rng(0).standard_normal((settings['batch_size'], 3, size, size), np.float32)

    def run(self, passes):
        """Warm up by one pass and for `WARM_SECONDS`, then return the times of some passes, ms."""
        warm_at = time.perf_counter() + WARM_SECONDS
        self.pass_ms()
        while time.perf_counter() < warm_at:
            self.pass_ms()
        return [self.pass_ms() for _ in range(passes)]

    def pass_ms(self):
        """Run once. Return the time of the pass, ms."""
        start = time.perf_counter()
        self.session.run(None, {'images': self.images})
        return 1000 * (time.perf_counter() - start)


def typical(times):
    """Return the time of a pass that nothing disturbed, ms."""
    return float(np.quantile(times, TYPICAL))


def take_turn(network, reference):
    """Time a network and the reference in alternation: {'ms', 'reference': typical times, 'spread': of the latter}."""
    own, beside = [], [typical(reference.run(REFERENCE_PASSES))]
    network.run(1)
    for _ in range(BLOCKS):
        own += network.run(PASSES)
        beside.append(typical(reference.run(REFERENCE_PASSES)))
    middle = statistics.median(beside)
    return {'ms': typical(own), 'reference': middle, 'spread': max(beside) / min(beside)}


def is_steady(turn, usual):
    """Return whether a turn counts."""
    return max(turn['spread'], turn['reference'] / usual, usual / turn['reference']) <= UNSTEADY


def usual_time(turns):
    """Return the usual time of the reference, ms: the median over all turns."""
    return statistics.median(turn['reference'] for timed in turns.values() for turn in timed)


def typical_times(turns):
    """Return the times of all networks that were timed, ms, at the usual speed of the reference."""
    usual, times = usual_time(turns), {}
    times[REFERENCE] = usual
    for name, timed in turns.items():
        steady = [turn for turn in timed if is_steady(turn, usual)] or timed
        times[name] = usual * statistics.median(turn['ms'] / turn['reference'] for turn in steady)
    return times


def due_networks(names, turns, rounds):
    """Return the networks that lack steady turns; each gets at most twice as many turns as `rounds`."""
    usual = usual_time(turns) if turns else 1.0
    return [
        name
        for name in names
        if len(turns.get(name, [])) < 2 * rounds
        and sum(is_steady(turn, usual) for turn in turns.get(name, [])) < rounds
    ]


def save(args, settings, turns):
    """Write the timings, and the turns for going on."""
    write_whole(args.output + '.state', json.dumps({'settings': settings, 'turns': turns}))
    if turns:
        head = [f'# {name}: {value}' for name, value in settings.items()]
        times = [f'{name},{ms:.5g}' for name, ms in sorted(typical_times(turns).items())]
        write_whole(args.output, '\n'.join(head + ['network,ms'] + times) + '\n')


def load_turns(args, settings):
    """Return the turns of an earlier call with the same settings; exits if they were others."""
    path = Path(args.output + '.state')
    if args.again or not path.exists():
        return {}
    state = json.loads(path.read_text(encoding='utf-8'))
    changed = [name for name in settings if state['settings'].get(name) != settings[name]]
    if changed:
        name = changed[0]
        was, now = state['settings'].get(name), settings[name]
        fail(f'{args.output} was timed with {name} {was}, now {now}; give --again or another --output')
    return state['turns']


def time_all(args, kit, settings, turns):
    """Time all networks until each has enough steady turns."""
    paths = {name: HERE / entry['file'] for name, entry in kit['networks'].items()}
    size, start, done, order = kit['img_size'], time.time(), 0, random.Random(0)
    reference = Network(paths.pop(REFERENCE), settings, size)
    while time.time() - start < WARM_UP_SECONDS:
        reference.run(1)
    start, paused = time.time(), 0.0
    while True:
        due = due_networks(paths, turns, args.rounds)
        fewest = min([len(turns.get(name, [])) for name in due] or [0])
        due = [name for name in due if len(turns.get(name, [])) == fewest]
        if not due:
            return
        for i, name in enumerate(order.sample(due, len(due))):
            turn = take_turn(Network(paths[name], settings, size), reference)
            turns.setdefault(name, []).append(turn)
            save(args, settings, turns)
            usual, done = usual_time(turns), done + 1
            hot = turn['reference'] > UNSTEADY * usual
            rest = len(due) - 1 - i + max(args.rounds - fewest - 1, 0) * len(paths)
            note = '  slowed down; to be repeated' if hot else ''
            left = (time.time() - start) / done * rest / 60
            print(
                f'\rround {fewest + 1}: {i + 1} of {len(due)} networks, reference {turn["reference"]:.2f} ms '
                f'(usually {usual:.2f}), {left:.0f} min left{note}   ',
                end='\n' if hot else '',
                flush=True,
            )
            if hot and paused < COOL_DOWN_SHARE * (time.time() - start):
                paused += COOL_DOWN_SECONDS
                time.sleep(COOL_DOWN_SECONDS)


def main(args):
    """Time, write, and print what came out."""
    kit = json.loads((HERE / 'networks.json').read_text(encoding='utf-8'))
    settings = {
        'device': args.note or device_name(),
        'runtime': f'onnxruntime {onnxruntime.__version__}, {args.provider}',
        'provider': args.provider,
        'threads': args.threads,
        'batch_size': args.batch_size or kit['batch_size'],
        'img_size': kit['img_size'],
        'num_classes': kit['num_classes'],
        'kit': kit['kit'],
    }
    turns = load_turns(args, settings)
    save(args, settings, turns)
    try:
        time_all(args, kit, settings, turns)
    except KeyboardInterrupt:
        print(f'\nStopped; the same command goes on. {args.output} has what was timed so far')
        return 130
    usual = usual_time(turns)
    shares = [is_steady(turn, usual) for timed in turns.values() for turn in timed]
    print(f'\n{args.output}: {1 + len(turns)} networks; {100 * np.mean(shares):.0f} % of turns were steady')
    return 0


if __name__ == '__main__':
    sys.exit(main(get_args()))
