"""Which device and which of how many processes this is."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tools.errors import BadInput


@dataclass(frozen=True)
class World:
    """This process among all of a run."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process logs and writes files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, count: int, what: str) -> int:
        """This process's part of a total such as the batch size.

        Raises:
            BadInput: the processes cannot share it evenly.
        """
        if count % self.size:
            raise BadInput(f'{what} {count} is a total for all processes and should be a multiple of {self.size}')
        return count // self.size


def pick_device(choice: str) -> torch.device:
    """The device of `--device`, with one line to stdout where 'auto' finds no GPU.

    Raises:
        BadInput: 'cuda' where there is none.
    """
    if choice == 'cuda' and not torch.cuda.is_available():
        raise BadInput('--device cuda: no CUDA GPU is available here; use --device auto or --device cpu')
    if choice == 'cpu' or not torch.cuda.is_available():
        if choice == 'auto':
            print('No CUDA GPU here: running on the CPU.', flush=True)
        return torch.device('cpu')
    return torch.device('cuda')


def join_world(device_choice: str, local_rank: int | None) -> World:
    """Join the process group that torchrun or torch.distributed.launch describes in the environment; alone without one.

    Args:
        device_choice: see `pick_device`; each process takes the GPU of its local rank, or the CPU with gloo.
        local_rank: of the command line, for launchers that pass it; the environment's LOCAL_RANK goes first.
    """
    size = int(os.environ.get('WORLD_SIZE', 1))
    if size == 1:
        return World(pick_device(device_choice))
    rank = int(os.environ['RANK'])
    local_rank = int(os.environ.get('LOCAL_RANK', local_rank if local_rank is not None else rank))
    device = pick_device(device_choice if rank == 0 or device_choice != 'auto' or torch.cuda.is_available() else 'cpu')
    if device.type == 'cuda':
        if local_rank >= torch.cuda.device_count():
            raise BadInput(f'local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible')
        device = torch.device('cuda', local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    return World(device, rank, size)


def leave_world(world: World) -> None:
    """Leave the process group."""
    if world.size > 1:
        dist.destroy_process_group()
