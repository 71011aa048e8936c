"""Size, multiply-adds and speed of a network."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tools.fresh import in_fresh_process


def count_params(net: nn.Module) -> float:
    """Parameters in millions."""
    return sum(p.numel() for p in net.parameters()) / 1e6


def device_name(device: torch.device) -> str:
    """Name of a GPU, or of the processor."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def count_mult_adds(net: nn.Module, img_size: int, channels: int = 3) -> float:
    """Multiply-adds of convolutions and linear layers for one square input, in millions (torch counts two for each)."""
    device = next(net.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        net.eval()(torch.zeros(1, channels, img_size, img_size, device=device))
    return counter.get_total_flops() / 2e6


def measure_latency(
    build: Callable[[], nn.Module], batch_size: int, img_size: int, device: torch.device, repeats: int = 50
) -> float:
    """Median time of one forward pass of the network that `build()` returns, in ms, after a warm-up.

    On a GPU by events. On a CPU by the clock, in a process of its own: in one that has built other networks before, the
    same network can be a quarter slower.
    """
    if device.type == 'cuda':
        return time_passes(build, batch_size, img_size, device, repeats)
    return in_fresh_process(time_passes, build, batch_size, img_size, device, repeats)


@torch.inference_mode()
def time_passes(
    build: Callable[[], nn.Module], batch_size: int, img_size: int, device: torch.device, repeats: int
) -> float:
    """`measure_latency` in this process."""
    net = build().eval().to(device)
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    for _ in range(max(repeats // 5, 3)):
        net(images)
    if device.type == 'cuda':
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda.synchronize(device)
        for start, end in events:
            start.record()
            net(images)
            end.record()
        torch.cuda.synchronize(device)
        return statistics.median(start.elapsed_time(end) for start, end in events)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        net(images)
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)
