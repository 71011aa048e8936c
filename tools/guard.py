"""Losses that are NaN or infinite: found at the step where they come up, without waiting for a GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tools.distributed import World
from tools.errors import RunFailed

MOST_SKIPS = 10
"""So many updates in a row may be left out."""


class LossGuard:
    """Says whether an update may be made, and remembers the place of the first that should not have been.

    With 'stop' a GPU's verdict is copied beside the computation and read at the next update, when it has long arrived,
    or before a checkpoint is written; so the host waits for no step. With 'skip' it is read at once.

    Args:
        on_nan: 'stop' or 'skip'.
    """

    def __init__(self, world: World, on_nan: str):
        self.world, self.skips = world, on_nan == 'skip'
        on_gpu = world.device.type == 'cuda'
        self.finite = torch.ones((), dtype=torch.bool, pin_memory=on_gpu)
        self.copied = torch.cuda.Event() if on_gpu else None
        self.place, self.bad, self.skips_in_a_row = '', '', 0

    def allows(self, place: str, losses: Sequence[Tensor]) -> bool:
        """Whether to make the update that these losses belong to.

        Args:
            place: names the update.

        Raises:
            RunFailed: too many were left out, one after the other.
        """
        self.look()
        self.finite.copy_(torch.stack([loss.detach() for loss in losses]).isfinite().all(), non_blocking=True)
        if self.copied:
            self.copied.record()
        self.place = place
        if self.skips:
            return self._decide()
        if not self.copied:
            self.look()
        return not self.bad

    def look(self) -> None:
        """Take in the verdict on the last update; waits for its losses."""
        if self.copied:
            self.copied.synchronize()
        if not self.finite:
            self.bad = self.bad or self.place
            self.finite.fill_(True)

    def _decide(self) -> bool:
        self.look()
        (skip,) = self.world.agree(self.bad != '')
        self.bad = ''
        self.skips_in_a_row = self.skips_in_a_row + 1 if skip else 0
        if self.skips_in_a_row > MOST_SKIPS:
            raise RunFailed(f'the loss is NaN or infinite at {self.place} and at the {MOST_SKIPS} updates before it')
        return not skip
