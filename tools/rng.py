"""Stateless randomness: every draw has a generator seeded by the run's seed and the position in the run.

So the draws for a step or an image do not depend on earlier draws, on the number of workers, or on interruptions, and
no generator state needs saving.
"""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """Return a seed of 63 bits for these parts, such as (seed, 'paths', epoch, step)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def generator_for(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*parts))
