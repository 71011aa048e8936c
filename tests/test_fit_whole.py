"""Tables from whole networks' times, of a simulated device."""

import random

import numpy as np
import pytest

from conftest import physical_curves
from latency_pkl.fit_whole import fit_whole, wild_timings
from latency_pkl.measured import Turn, whole_times
from latency_pkl.sampling import random_config
from latency_pkl.timing import Passes
from models.latency import LatencyTable
from models.search_space import SPACE

TRUTH = LatencyTable(0.1, physical_curves(32), {}, 32)


def timed(count, noise, seed=0, ends=True):
    """Random networks with their times on a device whose block shapes differ by up to a tenth from an estimate."""
    rng, generator = random.Random(seed), np.random.default_rng(seed)
    configs = [random_config(rng, ends and i % 2 == 0, 10, SPACE) for i in range(count)]
    return [(config, TRUTH.of_config(config) * generator.normal(1, noise)) for config in configs]


def errors(fit, networks):
    table = LatencyTable(fit.base, fit.curves, {}, 32)
    return np.array([table.of_config(config) / ms - 1 for config, ms in networks])


@pytest.mark.parametrize(('noise', 'mean', 'worst'), [(0.0, 0.004, 0.012), (0.01, 0.011, 0.035), (0.03, 0.02, 0.07)])
def test_unseen_networks_are_predicted_from_a_hundred_whole_times(noise, mean, worst):
    fit = fit_whole(timed(100, noise), 32, SPACE)
    off = errors(fit, timed(40, 0.0, seed=1, ends=False))
    assert np.abs(off).mean() < mean and np.abs(off).max() < worst and abs(off.mean()) < 0.005
    assert fit.curves.keys() == SPACE.table_widths(32).keys()
    assert all((np.diff(curve) >= 0).all() and curve[0] > 0 for curve in fit.curves.values())


def test_corrections_of_shapes_are_what_the_data_support(monkeypatch):
    networks, unseen = timed(100, 0.0), timed(40, 0.0, seed=1)
    corrected = np.abs(errors(fit_whole(networks, 32, SPACE), unseen)).mean()
    monkeypatch.setattr('latency_pkl.fit_whole.STRENGTHS', (0.0,))
    assert corrected < 0.4 * np.abs(errors(fit_whole(networks, 32, SPACE), unseen)).mean()


def test_timings_that_do_not_fit_with_the_others_are_found():
    networks = timed(100, 0.01)
    assert not wild_timings(networks, 32, SPACE)
    for at, factor in ((3, 1.5), (9, 1e-3), (20, 1e3), (50, 0.6)):
        networks[at] = networks[at][0], networks[at][1] * factor
    found = wild_timings(networks, 32, SPACE)
    assert found.keys() == {3, 9, 20, 50}
    for at, expected in found.items():
        assert expected == pytest.approx(TRUTH.of_config(networks[at][0]), rel=0.1)


def test_widths_between_multiples_get_the_latency_of_the_upper_one():
    curve = fit_whole(timed(40, 0.01), 32, SPACE, divisor=8).curves['MBInvertedResBlock_4_40_0_80_k5_s2_swish'][:320]
    assert (curve[::8] == curve[7::8]).all() and len(np.unique(curve)) > 20


def test_whole_times_are_free_of_the_speed_of_the_machine_in_their_turn():
    """A machine that takes twice as long in every other turn, the reference network included."""

    def passes(ms):
        return Passes(np.full((8, 1), ms), np.full((8, 2), 0.03), whole=True)

    networks, turns = timed(12, 0.0), []
    for i in range(0, 12, 2):
        slow = 2.0 if i % 4 else 1.0
        fitted = [(config, passes(slow * ms)) for config, ms in networks[i : i + 2]]
        turns.append(Turn(fitted, fitted[0], [passes(slow * 5.0)] * 2))
    times = np.array([ms for _, ms in whole_times(turns, 1, 0.03)])
    ratios = times / [ms for _, ms in networks]
    assert ratios.max() / ratios.min() == pytest.approx(1)
