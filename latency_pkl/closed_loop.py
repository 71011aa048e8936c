"""The closed loop: fit a network to a target, time it, correct the fit by the measured time."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from latency_pkl.kit import Found
from latency_pkl.runtimes import Engine, standard_of
from latency_pkl.sampling import launch_of
from latency_pkl.timing import ROUNDS, Pool, host_note, measure_latency, pool_timings
from models.config import NetworkConfig
from models.fitting import Fitter
from models.search_space import Arch

MEASURED_ROUNDS = 4
"""Networks timed before a fit to the clock may end, outliers not counted."""

MEASURED_CLOSE = 0.005
"""Goal of a fit to the clock, as a share of the target."""

ALTERNATING = 0.03
"""Difference of two architectures' corrections above which a fit may alternate between them."""

CLOSE = 1e-3
"""Change of the correction at which a fit to timings has converged."""


def fit_to_clock(fit: Fitter, target: float, engine: Engine, rounds: int = ROUNDS) -> NetworkConfig:
    """Fit a network to a target by the clock: each is timed until the measured time meets it. Prints each round.

    Networks of one architecture take the same time relative to the table, up to noise. So their timings are pooled, and
    after a timing that does not fit with its pool, the network is timed again. If a corrected aim leads back to an
    earlier architecture, with a correction of another size, the two would alternate; so the present one is kept if it
    was timed twice. Returns the network whose pooled latency is nearest to the target, standard error included.

    Args:
        rounds: builds of a network for one timing, see `measure_latency`.
    """
    table = fit.target.table
    batch_size = table.setting('batch_size', 32 if engine.device.type == 'cuda' else 1)
    launch = launch_of(table, engine.clock)
    standard = standard_of(table, batch_size, engine, launch)
    aim, kept, timed, seconds = target, None, {}, 0.0
    for number in range(1, 2 * MEASURED_ROUNDS + 1):
        arch, config, predicted = fit(aim, kept)
        build = engine.build(config, number, table.img_size, batch_size)
        usual = f'about {seconds:.0f} s' if seconds else 'usually 15 to 40 s'
        print(f'Round {number}: a network of predicted {predicted:.4f} ms is timed, {usual}', flush=True)
        start = time.monotonic()
        measured = measure_latency(build, batch_size, table.img_size, engine.clock, standard, rounds, launch)
        seconds = time.monotonic() - start
        timed.setdefault(str(arch), []).append((config, predicted, measured))
        pools = {arch: pool_timings([timing[1:] for timing in timings]) for arch, timings in timed.items()}
        own = pools[str(arch)]
        outlier = '' if own.fits[-1] else ', does not fit with the others'
        note = host_note(measured, launch)
        print(f'Round {number}: predicted {predicted:.4f}, measured {measured}{note}, target {target:.4f} ms{outlier}')
        choices = [
            (abs(pools[arch].ratio * ms / target - 1), arch, one) for arch in timed for one, ms, _ in timed[arch]
        ]
        off, nearest, config = min(choices, key=lambda choice: choice[0] + pools[choice[1]].error)
        pool = pools[nearest]
        enough = MEASURED_ROUNDS + sum((~one.fits).sum() for one in pools.values())
        if not outlier:
            if pool.fits.sum() > 1 and (off <= MEASURED_CLOSE or number >= enough):
                break
            aim = fit.nearest(target / own.ratio)
            if not kept and own.fits.sum() > 1 and _leads_back(fit, aim, arch, pools):
                kept = arch
                print(f'Round {number}: its architecture is kept; the next aim led back to an earlier one')
    print(
        f'Measured latency is within {100 * off:.2f} % of the target, standard error {100 * pool.error:.2f} % '
        f'(mean over {pool.fits.sum() or len(pool.fits)} of {number} rounds)'
    )
    if max(off, pool.error) > MEASURED_CLOSE:
        print(f'This misses the goal of {100 * MEASURED_CLOSE:g} %: timings differed too much, or no width is nearer')
    return config


def _leads_back(fit: Fitter, aim: float, arch: Arch, pools: Mapping[str, Pool]) -> bool:
    """Return whether an aim leads from `arch`, which can meet it too, to one that was timed with another ratio."""
    back = str(fit(aim)[0])
    if back == str(arch) or back not in pools or abs(pools[back].ratio / pools[str(arch)].ratio - 1) <= ALTERNATING:
        return False
    return abs(fit(aim, arch)[2] / aim - 1) <= MEASURED_CLOSE


def fit_to_timings(
    fit: Fitter, target: float, found: Sequence[Found], log: Callable[[str], object] = print
) -> NetworkConfig:
    """Fit a network to a target, corrected by the times of networks that were found before.

    Networks of one architecture take the same time relative to the table. So their mean ratio corrects the aim; that of
    all timed networks does if none of them has the architecture.
    """
    size = fit.target.table.img_size
    ratios: dict[tuple, list[float]] = {}
    for one in found:
        ratios.setdefault(_architecture(one.config, size), []).append(one.ms / one.predicted)
    usual = float(np.mean([one.ms / one.predicted for one in found]))
    ratio = usual
    for _ in range(len(ratios) + 1):
        arch, config, predicted = fit(fit.nearest(target / ratio))
        own = ratios.get(_architecture(config, size))
        before, ratio = ratio, float(np.mean(own)) if own else usual
        if abs(ratio / before - 1) <= CLOSE:
            break
    else:  # architectures of different ratios alternate: the last one is kept
        _, config, predicted = fit(target / ratio, arch)
    count = f'{len(own)} timings of this architecture' if own else f'{len(found)} timings, none of this architecture'
    log(f'Corrected by {count}: {predicted:.4f} ms in the table, {ratio * predicted:.4f} ms expected')
    if (off := abs(ratio * predicted / target - 1)) > MEASURED_CLOSE:
        log(f'warning: this is {100 * off:.1f} % off the target of {target:.4f} ms: no width is nearer')
    return config


def _architecture(config: NetworkConfig, img_size: int) -> tuple[str, ...]:
    return tuple(key for _, _, key in config.table_keys(img_size))
