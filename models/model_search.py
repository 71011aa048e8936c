"""The sink-connecting supernet, built by looping over the table of `search_space`.

Paper: operator level (bi-sampling) section 3.2, depth level (sink-connecting) section 3.3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.config import fixed_layers, op_spec
from models.functions import mix_norms, pool
from models.fused import fused_mixture
from models.layers import ConvLayer, LinearLayer, MBInvertedResBlock, init_weights
from models.search_space import Block, SearchSpace, Stage, Widths

Choice = Sequence[int] | Tensor
"""Input of a forward pass: an op index per block (a path), or mixture weights [blocks, ops]."""


@dataclass(frozen=True)
class ExecutionMode:
    """How a supernet is computed. Modes differ only by rounding.

    Args:
        fused: run operators of one kernel size together (see `fused_mixture`): fewer launches, faster on a GPU.
        recompute: recompute the operators' activations in the backward pass instead of keeping them.
    """

    fused: bool = False
    recompute: bool = False


UNFUSED = ExecutionMode()
"""Mode that runs the operators one after the other."""


class HostCopy:
    """Copy of a tensor's present values on the CPU. From a GPU it is transferred while the host and the GPU go on."""

    def __init__(self, tensor: Tensor):
        on_gpu = tensor.is_cuda
        self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
        self._values.copy_(tensor.detach(), non_blocking=True)
        self._copied = torch.cuda.current_stream(tensor.device).record_event() if on_gpu else None

    def read(self) -> Tensor:
        """Return the values, after the end of the transfer."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


class MixedOp(nn.Module):
    """All operators of one block and their log-probabilities `log_alphas` [ops]."""

    def __init__(self, space: SearchSpace, block: Block, widths: dict[int, int], mode: ExecutionMode):
        super().__init__()
        self.block = block
        self.mode = mode
        self.space = space
        self.m_ops = nn.ModuleList(_operator(space, block, index, width) for index, width in widths.items())
        self.log_alphas = nn.Parameter(torch.full((len(self.m_ops),), 1 / len(self.m_ops)).log())

    def forward(self, x: Tensor, choice: int | Tensor) -> Tensor:
        """Run one operator, or all weighted by `choice` [ops]: [N, in_ch, H, W] -> [N, out_ch, H', W'].

        Mixture weights sum to 1, so the residual connection that all operators share is added once.
        """
        if isinstance(choice, int):
            y = self.m_ops[choice].branch(x)
        else:
            y = self.mixture(x, choice)
        return x + y if self.block.residual else y

    def mixture(self, x: Tensor, weights: Tensor) -> Tensor:
        """Sum of the operators' branches weighted by `weights` [ops]."""
        ops = list(self.m_ops)
        if self.mode.fused and all(op.inverted_bottleneck is not None for op in ops):
            return self._kept(fused_mixture, ops, x, weights)
        return mix_norms([self._kept(op.projected, x) for op in ops], weights)

    def _kept(self, function: Callable[..., Tensor], *args) -> Tensor:
        if not self.mode.recompute:
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    def set_widths(self, widths: dict[int, int]) -> None:
        """Rebuild the operators whose width changes, with arbitrary weights; keep the others."""
        for index, width in widths.items():
            old = self.m_ops[index]
            if old.spec.mid_channels != width:
                device = old.point_linear.conv.weight.device
                new = _operator(self.space, self.block, index, width)
                self.m_ops[index] = new.to(device, memory_format=torch.channels_last)


class MixedStage(nn.Module):
    """The blocks of one stage, all connected to its sink, and the sink's log-weights `betas` [exits]."""

    def __init__(
        self,
        space: SearchSpace,
        stage: Stage,
        blocks: list[Block],
        widths: dict[str, dict[int, int]],
        mode: ExecutionMode,
    ):
        super().__init__()
        self.stage = stage
        self.block_names = [block.name for block in blocks]
        for block in blocks:
            self.add_module(block.name, MixedOp(space, block, widths[block.name], mode))
        self.betas = nn.Parameter(torch.zeros(len(stage.exit_depths)))

    def forward(self, x: Tensor, choices: Sequence[int | Tensor]) -> Tensor:
        """Return the sum of the exits weighted by softmax(betas). `choices`: one per block, see `MixedOp`."""
        at_depth = [x]
        for name, choice in zip(self.block_names, choices, strict=True):
            at_depth.append(getattr(self, name)(at_depth[-1], choice))
        exits = [at_depth[depth] for depth in self.stage.exit_depths]
        return sum(weight * y for weight, y in zip(self.depth_weights().unbind(), exits, strict=True))

    def depth_weights(self) -> Tensor:
        """Return softmax(betas) [exits]."""
        return F.softmax(self.betas, dim=0)


class Network(nn.Module):
    """The supernet: images [N, 3, H, W] -> logits [N, classes], along a path or as a mixture.

    Batch norms have neither affine parameters nor running statistics, so they always use those of the batch.

    Args:
        space: operators and stages.
        widths: mid channels of every operator in this network.
        num_classes: outputs of the classifier.
        mode: see `ExecutionMode`.
    """

    def __init__(self, widths: Widths, num_classes: int, space: SearchSpace, mode: ExecutionMode = UNFUSED):
        super().__init__()
        self.space, self.mode = space, mode
        fixed = fixed_layers(num_classes, space, affine=False)
        self.first_stem = ConvLayer(fixed['first_stem'], searched=True)
        self.second_stem = MBInvertedResBlock(fixed['second_stem'], searched=True)
        blocks = space.blocks()
        for name, stage in space.named_stages:
            own = [block for block in blocks if block.stage == name]
            self.add_module(name, MixedStage(space, stage, own, widths[name], mode))
        self.feature_mix_layer = ConvLayer(fixed['feature_mix_layer'], searched=True)
        self.classifier = LinearLayer(fixed['classifier'])
        self.num_blocks = len(blocks)
        init_weights(self)
        # 1.5 times as fast as contiguous on a CPU, and the native layout of tensor cores
        self.to(memory_format=torch.channels_last)

    def stages(self) -> list[MixedStage]:
        """Return the stages in order."""
        return [getattr(self, name) for name in self.space.stage_names]

    def mixed_ops(self) -> list[MixedOp]:
        """Return the blocks in the network's order."""
        return [getattr(stage, name) for stage in self.stages() for name in stage.block_names]

    def forward(self, x: Tensor, choice: Choice) -> Tensor:
        return self.searched(self.stem(x), choice)

    def stem(self, x: Tensor) -> Tensor:
        """Run the stem, which all paths share: [N, 3, H, W] -> [N, C, H / 2, W / 2]."""
        return self.second_stem(self.first_stem(x))

    def searched(self, x: Tensor, choice: Choice) -> Tensor:
        """Run the stages and the head: output of the stem -> logits [N, classes]."""
        choices, start = list(choice), 0
        for stage in self.stages():
            x = stage(x, choices[start : start + len(stage.block_names)])
            start += len(stage.block_names)
        x = self.feature_mix_layer(x)
        # a CPU keeps the contiguous gradient of a mean: a batch norm of it rounds differently
        return self.classifier(pool(x) if self.mode.fused else x.mean((2, 3)))

    def sample(
        self,
        how: str,
        generator: torch.Generator,
        exclude: Sequence[int] | None = None,
        log_alphas: HostCopy | None = None,
    ) -> list[int]:
        """Draw one path: an op index per block.

        Args:
            how: 'gumbel' for the argmax of log_alphas plus Gumbel noise, 'random' for uniform over the operators.
            generator: a CPU generator, so that a seed gives the same draws on every device.
            exclude: with 'random', a path whose operators are not drawn.
            log_alphas: with 'gumbel', a copy of the network's `log_alphas`, made since they last changed. Without it
                each draw waits for a GPU.
        """
        if how == 'gumbel':
            values = log_alphas.read() if log_alphas else self.log_alphas().detach().cpu()
            return (values + _gumbel(tuple(values.shape), generator)).argmax(dim=1).tolist()
        if how != 'random':
            raise ValueError(f"how is {how!r}, should be 'gumbel' or 'random'")
        count = len(self.space.ops)
        uniform = torch.rand(self.num_blocks, dtype=torch.float64, generator=generator)
        if exclude is None:
            return (uniform * count).long().tolist()
        others = 1 + (uniform * (count - 1)).long()
        return ((torch.tensor(exclude) + others) % count).tolist()

    def mixture_weights(self, temperature: float, generator: torch.Generator) -> Tensor:
        """Draw Gumbel-softmax weights [blocks, ops] (Jang et al. 2017), differentiable in log_alphas."""
        return self.noisy_weights(self.mixture_noise(generator), temperature)

    def mixture_noise(self, generator: torch.Generator) -> Tensor:
        """Draw the Gumbel noise of `mixture_weights` [blocks, ops]; on the network's device, without waiting for it."""
        device = self.classifier.linear.weight.device
        noise = _gumbel((self.num_blocks, len(self.space.ops)), generator)
        noise = noise.pin_memory() if device.type == 'cuda' else noise
        return noise.to(device, non_blocking=True)

    def noisy_weights(self, noise: Tensor, temperature: float) -> Tensor:
        """Return the mixture weights of a noise: [blocks, ops] -> [blocks, ops], differentiable in log_alphas."""
        return F.softmax((self.log_alphas() + noise) / temperature, dim=1)

    def log_alphas(self) -> Tensor:
        """All `log_alphas`, stacked [blocks, ops]."""
        return torch.stack([op.log_alphas for op in self.mixed_ops()])

    def depth_weights(self) -> list[Tensor]:
        """Return softmax(betas) [exits] of each stage."""
        return [stage.depth_weights() for stage in self.stages()]

    def arch_parameters(self) -> list[nn.Parameter]:
        """Return log_alphas of every block, then betas of every stage."""
        return [op.log_alphas for op in self.mixed_ops()] + [stage.betas for stage in self.stages()]

    def weight_parameters(self) -> list[nn.Parameter]:
        """Return all parameters other than log_alphas and betas."""
        arch = {id(p) for p in self.arch_parameters()}
        return [p for p in self.parameters() if id(p) not in arch]

    @torch.no_grad()
    def project_architecture(self) -> None:
        """Make log_alphas and betas logarithms of probabilities again, by log_softmax."""
        alphas = F.log_softmax(self.log_alphas(), dim=1).unbind()
        betas = [F.log_softmax(stage.betas, dim=0) for stage in self.stages()]
        torch._foreach_copy_(self.arch_parameters(), [*alphas, *betas])

    def widths(self) -> Widths:
        """Return the mid channels of every operator."""
        found: Widths = {name: {} for name in self.space.stage_names}
        for op in self.mixed_ops():
            found[op.block.stage][op.block.name] = {i: o.spec.mid_channels for i, o in enumerate(op.m_ops)}
        return found

    def set_widths(self, widths: Widths) -> None:
        """Give every operator the width in `widths`; see `MixedOp.set_widths`."""
        for op in self.mixed_ops():
            op.set_widths(widths[op.block.stage][op.block.name])


def _operator(space: SearchSpace, block: Block, index: int, width: int) -> MBInvertedResBlock:
    return MBInvertedResBlock(op_spec(block, space.ops[index], width, affine=False), searched=True)


def _gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return -torch.empty(shape).exponential_(generator=generator).log()
