"""Number formats of training with one interface: float32, autocast, apex."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from tools.errors import BadInput

DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}


class Precision:
    """Autocast and gradient scaling, both no-ops in float32.

    Args:
        dtype: format of autocast; None for float32.
        loss_scale: a fixed loss scale; None for a dynamic one. Only float16 is scaled.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None, loss_scale: float | None = None):
        self.device, self.dtype, self.loss_scale = device, dtype, loss_scale
        self.is_mixed = dtype is not None
        options = {} if loss_scale is None else {'init_scale': loss_scale}
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16, **options)

    def prepare(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Convert a network and its optimizer. Call it before wrapping them or loading into them."""
        return net, optimizer

    def autocast(self) -> AbstractContextManager:
        """Return the context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: Tensor) -> None:
        """Add the scaled gradients of a loss to those of the parameters."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
        """Unscale the gradients, clip their total norm, update the parameters, and clear the gradients."""
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        nn.utils.clip_grad_norm_(parameters, grad_clip)
        self.scaler.step(optimizer)
        self.scaler.update(self.loss_scale)
        optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        """Return the state that a checkpoint keeps besides weights and optimizer."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Load a result of `state_dict`, which is empty if the run did not scale gradients."""
        if state and self.scaler.is_enabled() and self.loss_scale is None:
            self.scaler.load_state_dict(state)


class ApexPrecision(Precision):
    """Level O1 of `apex.amp`, which only old releases of apex have. It leaves the optimizer's parameters in float32.

    Raises:
        BadInput: no such apex is installed.
    """

    def __init__(self, device: torch.device, loss_scale: float | None):
        super().__init__(device)
        self.is_mixed = True
        try:
            from apex import amp
        except ImportError as e:
            raise BadInput(f'--amp_backend apex: no apex with apex.amp is installed ({e}); use native') from e
        self.amp, self.apex_scale = amp, loss_scale or 'dynamic'

    def prepare(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        options = {'opt_level': 'O1', 'loss_scale': self.apex_scale, 'verbosity': 0}
        net, self.optimizer = self.amp.initialize(net, optimizer, **options)
        return net, self.optimizer

    def backward(self, loss: Tensor) -> None:
        with self.amp.scale_loss(loss, self.optimizer) as scaled:
            scaled.backward()

    def state_dict(self) -> dict:
        return self.amp.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if state:
            self.amp.load_state_dict(state)


def check_format(name: str | None, flag: str, device: torch.device) -> None:
    """Raise BadInput if the GPU only emulates this format of autocast, which is slower than float32.

    Args:
        name: of `DTYPES`; None for float32.
        flag: that asked for it.
    """
    if name == 'bfloat16' and device.type == 'cuda' and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise BadInput(f'{flag} bfloat16: {torch.cuda.get_device_name(device)} only emulates it; use {flag} float16')


def make_precision(device: torch.device, level: str, dtype: str | None, scale: float | None, backend: str) -> Precision:
    """Return the number format of the flags of mixed precision.

    Args:
        level: O0, float32, or O1, autocast.
        dtype: format of autocast; None: float16 on a GPU, bfloat16 on a CPU.
        scale: fixed loss scale; None for a dynamic one.

    Raises:
        BadInput: the flags contradict each other or the machine.
    """
    usual = 'float16' if device.type == 'cuda' else 'bfloat16'
    chosen = dtype or usual
    if level == 'O0' and (dtype or backend == 'apex'):
        raise BadInput(f'--opt_level O0 is float32, without {dtype or backend}; use --opt_level O1')
    if scale is not None and (level == 'O0' or chosen != 'float16'):
        raise BadInput(f'--loss_scale {scale}: is for --opt_level O1 with --amp_dtype float16; leave it out')
    if backend == 'apex':
        if device.type != 'cuda' or chosen != 'float16':
            raise BadInput('--amp_backend apex: works on GPUs in float16 only; use --amp_backend native')
        return ApexPrecision(device, scale)
    check_format(dtype, '--amp_dtype', device)
    return Precision(device, DTYPES[chosen] if level == 'O1' else None, scale)
