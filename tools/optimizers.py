"""What torch's optimizers leave open: the first momentum, and learning rates that a resumed run is asked for."""

from collections.abc import Mapping

import torch
from torch import nn


def optimized(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters that an optimizer updates."""
    return [p for group in optimizer.param_groups for p in group['params']]


def begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Set momentum to zero where there is none yet.

    Left to torch 2.14's fused SGD, it is made unset and then written by the first update, but not where a gradient
    scaler skips that one for an overflow: the second would use whatever the memory held. Nor can parameters that have
    momentum be updated in one launch with those that do not.
    """
    for group in optimizer.param_groups:
        for p in group['params'] if group['momentum'] else ():
            if optimizer.state[p].get('momentum_buffer') is None:
                optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)


def load_moments(optimizer: torch.optim.Optimizer, saved: Mapping) -> None:
    """Load a state dict, but keep this optimizer's learning rate, weight decay and the like: what the flags say now.

    Raises:
        ValueError: the state dict is malformed, or of other parameters.
    """
    asked = [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(saved)
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(f'{type(e).__name__}: {e}') from e
    for group, values in zip(optimizer.param_groups, asked, strict=True):
        group.update(values)
