"""Latency of a network by the method of published tables: the sum of its parts, each timed alone in a loop."""

import torch

from latency_pkl.timing import Clock, fastest_probe, typical_parts

WARM_UP, REPEATS = 5, 30


@torch.inference_mode()
def isolated_sum(build, batch_size, img_size, device):
    """Return the sum of the times of a network's parts in ms, each timed alone in a loop of synchronised passes."""
    x, timed, clock = torch.randn(batch_size, 3, img_size, img_size, device=device), [], Clock(device)
    for part in build().parts():
        marks = []
        for _ in range(WARM_UP + REPEATS):
            before, y = clock.marks(), part(x)
            marks.append(before + clock.marks())
            clock.wait()
        timed.append(clock.passes(marks[WARM_UP:]))
        x = y
    fastest = fastest_probe(timed)
    return sum(float(typical_parts([passes], fastest)[0]) for passes in timed)
