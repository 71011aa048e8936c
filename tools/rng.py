"""Randomness without state: every draw comes from a generator seeded by the run's seed and where in the run it happens.

What is drawn at a step or for an image then does not depend on what was drawn before, on the number of workers, or on
whether the run was interrupted: there is no generator state to save.
"""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits for these parts, such as (seed, 'paths', epoch, step)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def generator_for(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*parts))
