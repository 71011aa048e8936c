"""A latency table of this machine: blocks timed inside running networks, or whole networks of other runtimes."""

import random
import time
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from latency_pkl.fit import fit_table
from latency_pkl.fit_whole import LEAST_FITTED, fit_whole
from latency_pkl.sampling import Decks, random_config, reference_config, sample_of
from latency_pkl.timing import (
    Passes,
    fastest_probe,
    host_ratio,
    host_report,
    take_turns,
    typical_parts,
    undisturbed_share,
)
from latency_pkl.width_grid import on_grid, time_grid, with_penalties
from models.config import NetworkConfig, dump_config
from models.latency import LatencyTable
from models.search_space import SPACE
from tools.errors import BadInput

TURN, UNSEEN, LEAST_SAMPLES = 8, 5, 20
"""Networks of a turn, one of them unseen by the fit; different unseen networks; networks that a fit of blocks needs."""

ENOUGH = 0.5
"""Share of the reference network's time that must be undisturbed in a turn for its speed to count."""

SLACKS = (1, 1.25, 1.5, 2, 3, 10)
"""Factors on the time of the fastest probes, tried in this order until no block shape is missing."""

REFERENCES = 2
"""Builds of the reference network in a turn."""

METHODS = {
    True: 'blocks timed inside running random networks, fitted to the times of the networks',
    False: 'random networks timed as a whole',
}
"""Methods of a table: whether blocks are timed inside networks."""

LEAST_BUDGET = 0.6
"""Share of the budget that is left for the networks of the fit, even if the width grid took longer than the rest."""

PATIENCE = 8
"""Multiple of the budget for a slow machine to show what a fit needs."""


@dataclass
class Turn:
    """Passes of some networks, of one that the fit does not use, and of the reference network between them."""

    fitted: list[tuple[NetworkConfig, Passes]]
    unseen: tuple[NetworkConfig, Passes]
    reference: list[Passes]

    @property
    def passes(self) -> list[Passes]:
        """Passes of all networks."""
        return [*(passes for _, passes in [*self.fitted, self.unseen]), *self.reference]


def time_turn(rng, unseen, args, engine, divisor=1, decks=None):
    """Time an unseen network, new ones and builds of the reference network, in alternating turns as for a check.

    Widths are multiples of the divisor. Only those of the last network are not, if there is one; it does not show block
    shapes to the fit, so its operators are not from the decks.
    """
    divisors = [divisor] * (TURN - 2) + [1]
    drawn = [
        random_config(rng, i % 2 == 0, args.num_classes, SPACE, d, decks if d == divisor else None)
        for i, d in enumerate(divisors)
    ]
    configs = [unseen, *drawn, *[reference_config(args.num_classes, SPACE)] * REFERENCES]
    setting = args.img_size, args.batch_size
    benches = [
        engine.bench(config, rng.getrandbits(32), *setting, by_part=config in drawn, launch=args.launch)
        for config in configs
    ]
    of_unseen, *passes = map(Passes.joined, take_turns(benches, rng))
    return Turn(list(zip(drawn, passes, strict=False)), (unseen, of_unseen), passes[len(drawn) :])


def measure(args, engine, divisor, budget):
    """Time turns of networks for `budget` seconds, longer if a fit lacks networks or undisturbed block shapes."""
    rng, start, turns = random.Random(args.seed), time.monotonic(), []
    decks = Decks(rng)  # with independent draws, half of all tables would need more than 36 networks
    unseen = [random_config(rng, False, args.num_classes, SPACE, divisor) for _ in range(UNSEEN)]
    with tqdm(total=round(budget), unit='s', desc='timing networks', mininterval=1, disable=None) as bar:
        while True:
            turns.append(time_turn(rng, unseen[len(turns) % UNSEEN], args, engine, divisor, decks))
            spent = time.monotonic() - start
            bar.update(min(round(spent), bar.total) - bar.n)
            if spent + spent / len(turns) / 2 < budget:  # so that turns of many seconds do not overrun it
                continue
            lacks = (
                missing(samples_of(turns, args.img_size, fastest_of(turns), divisor)[0], args.img_size)
                if engine.by_block
                else len(whole_times(turns, divisor, fastest_of(turns))) < LEAST_FITTED
            )
            if not lacks or spent >= budget * PATIENCE:
                return turns


def fastest_of(turns):
    """Return the `fastest_probe` of all turns, ms."""
    return fastest_probe(passes for turn in turns for passes in turn.passes)


def samples_of(turns, img_size, fastest, divisor):
    """Return the samples of networks on the width grid, and the numbers of their turns.

    Networks that were never undisturbed are left out.
    """
    timed = [(one, i) for i, turn in enumerate(turns) for one in turn.fitted if on_grid(one[0], divisor)]
    pairs = [(sample_of(*one, img_size, fastest), i) for one, i in timed]
    pairs = [(sample, i) for sample, i in pairs if sample.total > 0]
    return [sample for sample, _ in pairs], [i for _, i in pairs]


def speed_of(turns, fastest):
    """Return the reference network's latency, ms, and its time in each turn as a multiple of it, [turns].

    A turn counts by the parts that were undisturbed then. If they are less than `ENOUGH`, its value is interpolated
    between the turns before and after.
    """
    passes = [Passes.joined(turn.reference) for turn in turns]
    usual, seen = typical_parts(passes, fastest), np.array([one.seen(fastest) for one in passes])
    if not seen.any():
        seen[:] = True
    own = np.array([typical_parts([one], fastest) for one in passes])
    share = (usual * seen).sum(axis=1) / usual.sum()
    known = np.flatnonzero(share >= min(ENOUGH, share.max()))
    slowness = (own * seen).sum(axis=1)[known] / (usual * seen).sum(axis=1)[known]
    return float(usual.sum()), np.interp(np.arange(len(turns)), known, slowness)


def whole_times(turns, divisor, fastest, on=True):
    """Return networks on the width grid, or off it, and their latencies, ms.

    Networks with parts that were never undisturbed are left out.
    """
    return [
        (config, float(typical_parts([passes], fastest).sum() / slow))
        for turn, slow in zip(turns, speed_of(turns, fastest)[1], strict=True)
        for config, passes in turn.fitted
        if on_grid(config, divisor) == on and passes.seen(fastest).all()
    ]


def missing(samples, img_size):
    """Return what a fit lacks, in words; empty if nothing."""
    keys = SPACE.table_widths(img_size).keys()
    seen = {key for sample in samples for key, _, _ in sample.blocks}
    fixed = any(sample.fixed > 0 for sample in samples)
    if len(samples) >= LEAST_SAMPLES and keys <= seen and fixed:
        return ''
    shapes = f'{len(samples)} networks showed {len(seen)} of {len(keys)} block shapes'
    return shapes if fixed else f'{shapes} and no fixed layers'


def errors_of(pairs):
    """Return (mean, worst, bias) of errors in per cent, from pairs of predicted and measured latency."""
    errors = np.array([100 * (predicted / measured - 1) for predicted, measured in pairs])
    return float(np.abs(errors).mean()), float(np.abs(errors).max()), float(errors.mean())


def unseen_pairs(fit, turns, slowness, img_size, fastest):
    """Return (predicted, measured) of each unseen network: of the whole network, or of its undisturbed parts."""
    table, pairs = LatencyTable(fit.base, fit.curves, {}, img_size), []
    for i in range(min(UNSEEN, len(turns))):
        config, passes = turns[i].unseen[0], Passes.joined([turn.unseen[1] for turn in turns[i::UNSEEN]])
        usual = slowness[i::UNSEEN].mean()
        if passes.parts.shape[1] == 1:
            pairs.append((table.of_config(config), typical_parts([passes], fastest).sum() / usual))
            continue
        sample = sample_of(config, passes, img_size, fastest)
        if sample.total > 0:
            pairs.append((sample.predicted(fit.base, fit.curves), sample.total / usual))
    return pairs


def fit_blocks(turns, args, divisor):
    """Fit curves to times of blocks: (fit, number of networks, largest time of probes that count over the fastest).

    Raises:
        BadInput: some block shapes were never timed on an undisturbed core, nor on a somewhat disturbed one.
    """
    for slack in SLACKS:
        fastest = slack * fastest_of(turns)
        samples, numbers = samples_of(turns, args.img_size, fastest, divisor)
        lack = missing(samples, args.img_size)
        if not lack:
            break
    else:
        raise BadInput(f'--budget {args.budget:g}: {lack} in {PATIENCE} times that; give it more seconds')
    slowness = speed_of(turns, fastest)[1]
    return fit_table(samples, slowness[numbers], args.img_size, SPACE), len(samples), slack


def fit_networks(turns, args, divisor):
    """Fit curves to times of whole networks: see `fit_blocks`."""
    networks = whole_times(turns, divisor, fastest_of(turns))
    if len(networks) < LEAST_FITTED:
        raise BadInput(
            f'--budget {args.budget:g}: {len(networks)} networks were timed in {PATIENCE} times that, at least '
            f'{LEAST_FITTED} are needed; give it more seconds'
        )
    return fit_whole(networks, args.img_size, SPACE, divisor), len(networks), 1


def undisturbed_line(percent, engine):
    """Return the share of timings on an undisturbed core, and what it means, in words."""
    meaning = ', which are those that count' if engine.by_block else ' (the faster half counts)'
    return f'Timings with an undisturbed core{meaning}: {percent:.0f} %'


def measured_table(args, engine):
    """Measure a latency table of this machine: (base, curves, meta)."""
    start = time.monotonic()
    grid = time_grid(engine, args, SPACE)
    print(grid)
    left = args.budget - (time.monotonic() - start)
    turns = measure(args, engine, grid.divisor, max(left, LEAST_BUDGET * args.budget))
    make = fit_blocks if engine.by_block else fit_networks
    fit, count, slack = make(turns, args, grid.divisor)
    fastest = slack * fastest_of(turns)
    fit = with_penalties(fit, whole_times(turns, grid.divisor, fastest, on=False), grid, args.img_size)
    undisturbed = 100 * undisturbed_share([passes for turn in turns for passes in turn.passes])
    reference_ms, slowness = speed_of(turns, fastest)
    unseen = unseen_pairs(fit, turns, slowness, args.img_size, fastest)
    mean, worst, bias = errors_of(unseen)
    low, high = np.quantile(slowness, (0.25, 0.75))
    scaled = f'; curves were multiplied by {fit.factor:.4f} to fit the mean network' if engine.by_block else ''
    print(f'{count} networks timed{scaled}')
    print(
        f'Reference network: {reference_ms:.4f} ms, in half of {len(turns)} turns from '
        f'{100 * (low - 1):+.1f} to {100 * (high - 1):+.1f} %'
    )
    if engine.clock.type == 'cpu':
        also = f'; probes up to {slack:g} times as slow counted too, for else shapes were missing' if slack > 1 else ''
        print(undisturbed_line(undisturbed, engine) + also)
    else:
        ratios = [host_ratio([passes]) for turn in turns for _, passes in turn.fitted]
        print(host_report(ratios, args.launch, undisturbed / 100))
    print(f'Against {len(unseen)} unseen networks: mean error {mean:.2f} %, worst {worst:.2f} %, bias {bias:+.2f} %')
    meta = {
        'unit': 'ms',
        **engine.meta,
        'batch_size': args.batch_size,
        'threads': args.threads,
        'dtype': 'float32',
        'method': METHODS[engine.by_block],
        'reference': dump_config(reference_config(args.num_classes, SPACE)),
        'reference_ms': reference_ms,
        'samples': count,
        'unseen_networks': len(unseen),
        'residual_mean_percent': round(mean, 3),
        'residual_worst_percent': round(worst, 3),
        'residual_bias_percent': round(bias, 3),
        'undisturbed_percent': round(undisturbed, 1),
        'probe_slack': slack,
        'spread_percent': round(100 * float(high - low), 3),
        'width_divisor': grid.divisor,
        'other_widths_cost_percent': round(100 * (grid.price - 1), 1),
    }
    if engine.clock.type == 'cuda':
        meta |= {'launch': args.launch, 'tf32': args.tf32}
    return fit.base, fit.curves, meta
