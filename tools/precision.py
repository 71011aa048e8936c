"""Number formats of training with one interface: float32, autocast, apex."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from tools.errors import BadInput

DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}


class Precision:
    """Autocast and gradient scaling, both no-ops in float32.

    Args:
        device: device of the model.
        dtype: format of autocast; None for float32.
        loss_scale: a fixed loss scale; None for a dynamic one. Only float16 is scaled.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None, loss_scale: float | None = None):
        self.device, self.dtype = device, dtype
        self.loss_scale = loss_scale
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
        nn.utils.clip_grad_norm_(optimized(optimizer), grad_clip)
        self.scaler.step(optimizer)
        self.scaler.update(self.loss_scale)
        optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        """Return the state that a checkpoint keeps besides weights and optimizer."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Load a result of `state_dict`, which is empty if the run did not scale gradients.

        Raises:
            ValueError: it is not such a result.
        """
        if state and self.scaler.is_enabled() and self.loss_scale is None:
            try:
                self.scaler.load_state_dict(state)
            except (KeyError, TypeError) as e:
                raise ValueError(f'scaler: {type(e).__name__}: {e}') from e


class ApexPrecision(Precision):
    """Mixed precision by `apex.amp`, which only old releases of apex have.

    Raises:
        BadInput: no apex with `apex.amp` is installed.
    """

    def __init__(
        self, device: torch.device, opt_level: str, keep_batchnorm_fp32: bool | None, loss_scale: float | None
    ):
        super().__init__(device)
        try:
            from apex import amp
        except ImportError as e:
            raise BadInput(
                f'--opt_level {opt_level} with --amp_backend apex: no apex with apex.amp is installed ({e}); NVIDIA'
                ' removed it in May 2025 and the apex of PyPI is another program; use --opt_level O1 with'
                ' --amp_backend native'
            ) from e
        self.amp = amp
        self.options = {
            'opt_level': opt_level,
            'keep_batchnorm_fp32': keep_batchnorm_fp32,
            'loss_scale': loss_scale,
        }

    def prepare(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        net, self.optimizer = self.amp.initialize(net, optimizer, verbosity=0, **self.options)
        return net, self.optimizer

    def backward(self, loss: Tensor) -> None:
        with self.amp.scale_loss(loss, self.optimizer) as scaled:
            scaled.backward()

    def step(self, optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
        nn.utils.clip_grad_norm_(list(self.amp.master_params(optimizer)), grad_clip)
        optimizer.step()
        optimizer.zero_grad()

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
        raise BadInput(
            f'{flag} bfloat16: {torch.cuda.get_device_name(device)} only emulates this format, slowly; use {flag}'
            ' float16'
        )


def make_precision(args, device: torch.device) -> Precision:
    """Return the number format of the flags: float32 for O0 (default), autocast for O1; all levels with apex.

    Args:
        args: opt_level, amp_dtype, amp_backend, loss_scale, keep_batchnorm_fp32; see `options.add_amp_args`.

    Raises:
        BadInput: the flags contradict each other or the machine; the message names the closest that work.
    """
    level = args.opt_level or 'O0'
    if args.amp_backend == 'apex':
        if device.type != 'cuda' or args.amp_dtype == 'bfloat16':
            raise BadInput('--amp_backend apex works on GPUs in float16 only; use --amp_backend native')
        return ApexPrecision(device, level, args.keep_batchnorm_fp32, args.loss_scale)
    if level in ('O2', 'O3'):
        raise BadInput(
            f'--opt_level {level}: native mixed precision has O0 and O1; use --opt_level O1, or --amp_backend apex with'
            ' an apex that has apex.amp'
        )
    if args.keep_batchnorm_fp32 is False:
        raise BadInput(f'--keep_batchnorm_fp32 False: --opt_level {level} keeps batch norm in float32; use True')
    if level == 'O0' and args.amp_dtype:
        raise BadInput(f'--amp_dtype {args.amp_dtype}: --opt_level O0 is float32; use --opt_level O1')
    check_format(args.amp_dtype, '--amp_dtype', device)
    scale = None if args.loss_scale == 'dynamic' else args.loss_scale
    dtype = DTYPES[args.amp_dtype or ('float16' if device.type == 'cuda' else 'bfloat16')]
    if scale is not None and (level == 'O0' or dtype is not torch.float16):
        raise BadInput(
            f'--loss_scale {scale}: only float16 gradients are scaled, here it is --opt_level {level} in {dtype}; leave'
            ' it out, or use --opt_level O1 with --amp_dtype float16'
        )
    return Precision(device, dtype if level == 'O1' else None, scale)


def optimized(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return all parameters that an optimizer updates."""
    return [p for group in optimizer.param_groups for p in group['params']]
