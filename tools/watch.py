"""What one sees of a run while it runs: lines of the log with the time left, and a bar where stderr is a terminal."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from tools.metrics import Metrics
from tools.plots import draw_at_end

Item = TypeVar('Item')

FORMATS = {'lr': '.5f', 'loss': '.4f', 'top1': '.2f', 'top5': '.2f', 'latency': '.4f', 'images/s': '.1f'}
"""How numbers are printed, by the last part of their names (the part after the last underscore)."""


class Progress:
    """The share of a run's work that is done, and the time that is left.

    Args:
        work: of the whole run, in any unit.
        done: what was done before this process began.
        quiet: no bar, whatever stderr is.
    """

    def __init__(self, work: float, done: float = 0.0, quiet: bool = False):
        self.work, self.done, self.done_before = work, done, done
        self.start = time.monotonic()
        self.shows = not quiet and sys.stderr.isatty()
        self.bar = tqdm(disable=True)

    def track(self, items: Iterable[Item], name: str, total: int, first: int = 0, work: float = 1.0) -> Iterator[Item]:
        """The items, each counted as `work` while in hand; on a terminal with a bar.

        Args:
            total: of a whole pass, which begins with item `first`.
        """
        with tqdm(total=total, initial=first, desc=name, disable=not self.shows, leave=False) as self.bar:
            for item in items:
                self.done += work
                yield item
                self.bar.update()

    def show(self, **numbers: float) -> str:
        """Put numbers beside the bar; returns the time that is left, such as '1:02:03'."""
        left = self.left()
        self.bar.set_postfix({name: f'{value:.4g}' for name, value in numbers.items()} | {'eta': left}, refresh=False)
        return left

    def left(self) -> str:
        """Time to the end of the run at this process's speed so far."""
        done = self.done - self.done_before
        if done <= 0:
            return '?'
        seconds = round((time.monotonic() - self.start) / done * max(self.work - self.done, 0))
        return f'{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}'


class Watch:
    """Where a run's numbers go: the log, the bar, `metrics.jsonl`.

    Args:
        metrics: None keeps none.
    """

    def __init__(self, logger: logging.Logger, metrics: Metrics | None = None, progress: Progress | None = None):
        self.log = logger.info
        self.metrics = metrics
        self.progress = progress or Progress(0)

    def step(self, epoch: int, step: int, steps: int, **numbers: float) -> None:
        """A line about the epoch so far, after `step` of its `steps`."""
        left = self.progress.show(**{name: value for name, value in numbers.items() if name[-2:] not in ('lr', 'p5')})
        words = ' '.join(f'{name} {value:{FORMATS[name.rpartition("_")[2]]}}' for name, value in numbers.items())
        self.log('epoch %d step %d/%d %s eta %s', epoch, step, steps, words, left)
        self.write('step', epoch, step, steps=steps, **numbers)

    def draw(self) -> None:
        """Pictures and report of a run that has ended; what stands in their way is a line of the log."""
        if self.metrics and self.metrics.ended:
            draw_at_end(self.metrics.path.parent, self.log)

    def write(self, kind: str, epoch: int, step: int | None = None, **values: Any) -> None:
        """A line of `metrics.jsonl` alone."""
        if self.metrics:
            self.metrics.write(kind, epoch, step, **values)
