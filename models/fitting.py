"""Networks of a search that meet a latency, and keep limits in other tables."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import Tensor

from models.config import NetworkConfig, build_config
from models.counted import COUNTED, counted_table
from models.latency import TOLERANCE, LatencyTable
from models.parsing import parse_architecture
from models.search_space import Arch, SearchSpace, Widths
from models.tables import load_table
from models.targeting import Target, log_probability
from tools.errors import BadInput

log = logging.getLogger('tf-nas')

TRIED = 20  # architectures that are fitted until one keeps all limits; each takes a tenth of a second


@dataclass(frozen=True)
class Limit:
    """Upper bound on a network's total in a table, in the table's unit."""

    name: str
    table: LatencyTable
    value: float

    def excess(self, config: NetworkConfig) -> float:
        """Return by how much a network exceeds the limit, as a share of it; below 0 if it keeps it."""
        return self.table.of_config(config) / self.value - 1


def read_limit(text: str, img_size: int, num_classes: int, space: SearchSpace) -> Limit:
    """Read a limit such as 'params=5', 'macs=40%' or 'phone.pkl=40'.

    Raises:
        BadInput: not of this form, a bad table, or a value that no network keeps.
    """
    name, _, value_text = text.rpartition('=')
    if not name:
        raise BadInput(f'--limit {text}: should be TABLE=VALUE, such as params=5 or latency_pkl/phone.pkl=40')
    table = counted_table(name, img_size, num_classes, space) if name in COUNTED else load_table(name, img_size, space)
    least, _, most = table.reach(space)
    value = table.amount(value_text, space)
    if not least <= value < math.inf:
        raise BadInput(f'--limit {text}: networks have from {least:.4f} to {most:.4f} {table.unit}')
    return Limit(Path(name).stem, table, value)


@dataclass(frozen=True)
class Fitter:
    """Fits networks of a search to latencies in a table.

    Attributes:
        state: log_alphas and betas, as in a searched model.
        widths: start of the scaling.
    """

    state: Mapping[str, Tensor]
    widths: Widths
    target: Target
    num_classes: int
    limits: Sequence[Limit] = ()

    def __call__(self, latency: float, arch: Arch | None = None) -> tuple[Arch, NetworkConfig, float]:
        """Return a network that meets a latency: its architecture, config, and latency in the table.

        Args:
            arch: its architecture; None: the most probable one that can meet the latency and, fitted, keeps all limits.

        Raises:
            BadInput: none of the `TRIED` most probable architectures keeps all limits.
        """
        target = self.target.at(latency)
        if arch is None and not self.limits:
            arch = target.most_probable(self.state)
        if arch is not None:
            config = self._config(arch, target)
            return arch, config, target.table.of_config(config)
        nearest = math.inf, ''
        for tried in islice(target.by_probability(self.state), TRIED):
            config = self._config(tried, target)
            worst = max(self.limits, key=lambda limit: limit.excess(config))
            if worst.excess(config) <= TOLERANCE:
                return tried, config, target.table.of_config(config)
            total = f'{worst.table.of_config(config):.4f} {worst.table.unit}, {100 * worst.excess(config):.1f} % above'
            nearest = min(nearest, (worst.excess(config), f'{worst.name} {total}'))
        raise BadInput(
            f'--limit: none of the {TRIED} most probable architectures of {latency:.4f} {target.table.unit} keeps it; '
            f'the nearest has {nearest[1]}: raise the limit, or lower the target'
        )

    def given_up(self, arch: Arch) -> float:
        """Return how much less log-probability an architecture has than the most probable one of all."""
        space = self.target.space
        best = parse_architecture(self.state, space)
        return log_probability(best, self.state, space) - log_probability(arch, self.state, space)

    def nearest(self, latency: float) -> float:
        """Return the latency nearest to another one that networks reach."""
        target = self.target.at(latency)
        if target.is_reachable():
            return latency
        return min(target.nearest(), key=lambda end: abs(end - latency))

    def _config(self, arch: Arch, target: Target) -> NetworkConfig:
        return build_config(arch, target.fitted(arch, self.widths), self.num_classes, target.space)
