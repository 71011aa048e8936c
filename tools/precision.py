"""Number formats of training, behind one interface: full, autocast, half with float32 masters, pure half, apex."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from tools.errors import BadInput

DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}


class Precision:
    """Autocast and gradient scaling, both no-ops in full precision; the interface of the other classes.

    Args:
        device: where the model runs.
        dtype: of autocast; None for full precision.
        loss_scale: a fixed scale, or None for the scaler's dynamic one. Only float16 is scaled.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None, loss_scale: float | None = None):
        self.device, self.dtype = device, dtype
        self.loss_scale = loss_scale
        options = {} if loss_scale is None else {'init_scale': loss_scale}
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16, **options)

    def prepare(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Convert a network and the optimizer of its parameters, before anything wraps them or is loaded into them."""
        return net, optimizer

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def inputs(self, images: Tensor) -> Tensor:
        """Images in the format that the network takes."""
        return images

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Add the gradients of a loss to those of the parameters."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
        """Clip the unscaled gradients of all parameters to a total norm, update, and clear the gradients."""
        self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(optimized(optimizer), grad_clip)
        self.scaler.step(optimizer)
        self.scaler.update(self.loss_scale)
        optimizer.zero_grad(set_to_none=True)

    def weights(self, net: nn.Module) -> dict[str, Tensor]:
        """The network's state dict in float32."""
        return net.state_dict()

    def load_weights(self, net: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Load what `weights` returned."""
        net.load_state_dict(state)

    def state_dict(self) -> dict:
        """What a checkpoint keeps beside weights and optimizer."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Load what `state_dict` returned; empty from a run that did not scale.

        Raises:
            ValueError: it is something else.
        """
        if state and self.scaler.is_enabled() and self.loss_scale is None:
            try:
                self.scaler.load_state_dict(state)
            except (KeyError, TypeError) as e:
                raise ValueError(f'scaler: {type(e).__name__}: {e}') from e


class HalfPrecision(Precision):
    """A network converted to a half format (apex's O2 and O3).

    Args:
        dtype: float16 or bfloat16.
        batch_norm_fp32: keep batch norm's parameters and statistics in float32.
        masters: let the optimizer update float32 copies of the parameters, which are then rounded into the network.
            Without them gradients are not scaled.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, batch_norm_fp32: bool, masters: bool, loss_scale: float | None
    ):
        super().__init__(device, dtype if masters else None, loss_scale)
        self.half, self.batch_norm_fp32, self.masters = dtype, batch_norm_fp32, masters
        self.copies: dict[nn.Parameter, nn.Parameter] = {}

    def prepare(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        copies = {p: nn.Parameter(p.detach().clone()) for p in net.parameters()} if self.masters else {}
        net.to(self.half)
        if self.batch_norm_fp32:
            for module in net.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.float()
        self.copies = {p: copy for p, copy in copies.items() if p.dtype is not copy.dtype}
        for group in optimizer.param_groups:
            group['params'] = [self.copies.get(p, p) for p in group['params']]
        return net, optimizer

    def autocast(self) -> AbstractContextManager:
        return nullcontext()

    def inputs(self, images: Tensor) -> Tensor:
        return images.to(self.half)

    def step(self, optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
        for p, copy in self.copies.items():
            copy.grad, p.grad = p.grad.float(), None
        super().step(optimizer, grad_clip)
        self._round_copies()

    def weights(self, net: nn.Module) -> dict[str, Tensor]:
        masters = {name: self.copies.get(p, p).detach() for name, p in net.named_parameters()}
        state = net.state_dict() | masters
        return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}

    @torch.no_grad()
    def load_weights(self, net: nn.Module, state: Mapping[str, Tensor]) -> None:
        net.load_state_dict(state)
        for name, p in net.named_parameters():
            if p in self.copies:
                self.copies[p].copy_(state[name])

    @torch.no_grad()
    def _round_copies(self) -> None:
        if self.copies:
            torch._foreach_copy_(list(self.copies), list(self.copies.values()))


class ApexPrecision(Precision):
    """`apex.amp`, for those who have a release that still ships it.

    Raises:
        BadInput: there is none.
    """

    def __init__(
        self, device: torch.device, opt_level: str, keep_batchnorm_fp32: bool | None, loss_scale: float | None
    ):
        super().__init__(device)
        try:
            from apex import amp
        except ImportError as e:
            raise BadInput(
                f'--amp_backend apex: no apex with apex.amp is installed ({e}); NVIDIA removed it in May 2025 and the'
                ' apex of PyPI is another program; use --amp_backend native'
            ) from e
        self.amp = amp
        self.options = {
            'opt_level': opt_level,
            'keep_batchnorm_fp32': keep_batchnorm_fp32,
            'loss_scale': loss_scale,
        }

    def prepare(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        return self.amp.initialize(net, optimizer, verbosity=0, **self.options)

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        with self.amp.scale_loss(loss, optimizer) as scaled:
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


def make_precision(args, device: torch.device) -> Precision:
    """The number format that the flags ask for: float32 for O0 (the default), autocast for O1, half for O2 and O3.

    Args:
        args: opt_level, amp_dtype, amp_backend, loss_scale, keep_batchnorm_fp32; see `options.add_amp_args`.

    Raises:
        BadInput: flags that contradict each other or the machine; the message names the nearest that works.
    """
    level = args.opt_level or 'O0'
    keep, scale = args.keep_batchnorm_fp32, None if args.loss_scale == 'dynamic' else args.loss_scale
    if args.amp_backend == 'apex':
        if device.type != 'cuda' or args.amp_dtype == 'bfloat16':
            raise BadInput('--amp_backend apex works on GPUs in float16 only; use --amp_backend native')
        return ApexPrecision(device, level, keep, args.loss_scale)
    if level in ('O0', 'O1') and keep is False:
        raise BadInput(
            f'--keep_batchnorm_fp32 False: --opt_level {level} keeps batch norm in float32; use True, or O2 or O3'
        )
    if level == 'O0' and args.amp_dtype:
        raise BadInput(f'--amp_dtype {args.amp_dtype}: --opt_level O0 is float32; use --opt_level O1')
    dtype = DTYPES[args.amp_dtype or ('float16' if device.type == 'cuda' else 'bfloat16')]
    if scale is not None and (level in ('O0', 'O3') or dtype is not torch.float16):
        raise BadInput(
            f'--loss_scale {scale}: only float16 gradients with float32 weights are scaled, here it is --opt_level'
            f' {level} in {dtype}; leave it out, or use O1 or O2 with --amp_dtype float16'
        )
    if level == 'O0':
        return Precision(device)
    if level == 'O1':
        return Precision(device, dtype, scale)
    if getattr(args, 'ema_decay', 0):
        raise BadInput(f'--ema_decay: the half-precision weights of --opt_level {level} hold no average; use O1')
    return HalfPrecision(device, dtype, level == 'O2' if keep is None else keep, level == 'O2', scale)


def optimized(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters that an optimizer updates."""
    return [p for group in optimizer.param_groups for p in group['params']]
