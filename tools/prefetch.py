"""Batches on the device, the next one copied there while the present one is in use."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def to_device(
    batches: Iterable[tuple | None],
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (images, labels) on the device.

    On a GPU they are one ahead: a batch is copied, and whatever `images.to` does besides is done, on a stream of its
    own while the batch before it is in use. Neither this process nor the GPU waits, given pinned memory.

    Args:
        batches: pairs whose parts have `to(device, non_blocking=True)`: tensors, or raw images that it finishes.
            None, a batch of which no image could be read, is left out.
    """
    batches = (batch for batch in batches if batch is not None)

    def move(batch: tuple) -> tuple[Tensor, Tensor]:
        images, labels = batch
        images = images.to(device, non_blocking=True).to(memory_format=memory_format)
        return images, labels.to(device, non_blocking=True)

    return _one_ahead(batches, move, device) if device.type == 'cuda' else map(move, batches)


def _one_ahead(batches: Iterable[tuple], move, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    side, moved = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(side):
            following = move(batch), side.record_event()
        if moved is not None:
            yield _hand_over(*moved, device)
        moved = following
    if moved is not None:
        yield _hand_over(*moved, device)


def _hand_over(batch: tuple[Tensor, Tensor], copied: torch.cuda.Event, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch for the present stream, once it is copied; its memory is not used again before that stream is done."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)
    for tensor in batch:
        tensor.record_stream(stream)
    return batch
