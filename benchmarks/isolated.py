"""A network's latency as published tables have it: the sum of its parts, each timed alone in a loop."""

import statistics
import time

import torch


@torch.inference_mode()
def time_alone(layer, shape, device, repeats=30):
    """Median ms of one layer in a loop of its own, each pass synchronised, as published tables were made."""
    x, times = torch.randn(shape, device=device), []
    for i in range(repeats + 5):
        start = time.perf_counter()
        layer(x)
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        if i >= 5:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def isolated_sum(build, batch_size, img_size, device):
    """Sum of the times of a network's parts, each timed alone."""
    net = build()
    total, x = 0.0, torch.randn(batch_size, 3, img_size, img_size, device=device)
    parts = [net.first_stem, net.second_stem, *(b for name in net.stage_names for b in getattr(net, name))]
    parts += [net.feature_mix_layer, lambda x: net.classifier(x.mean((2, 3)))]
    for part in parts:
        total += time_alone(part, tuple(x.shape), device)
        with torch.inference_mode():
            x = part(x)
    return total
