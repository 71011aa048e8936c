"""The search space of TF-NAS as one table; everything else (supernet, widths, latency keys, configs) is a loop over it.

Paper: Hu, Wu, He, "TF-NAS", ECCV 2020, section 3.1 and table 1. To search another space, edit the rows of `SPACE`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

Arch = dict[str, list[int]]
"""An architecture: op index of each block, by stage name. The length of a list is the depth of that stage."""

Widths = dict[str, dict[str, dict[int, int]]]
"""Mid channels in use: widths[stage name][block name][op index]."""

FREEDOMS = ('operator', 'width')
"""Freedoms that a flag switches off. The third one, depth, is part of the supernet."""


ACTIVATIONS = ('relu', 'relu6', 'swish', 'h-swish')
"""Names of activations, in rows and in configs."""

MAX_KERNEL = 31


@dataclass(frozen=True)
class Op:
    """One operator: an inverted residual block of a kernel size and expansion, with or without squeeze-excitation."""

    kernel: int
    expand: int
    se: bool

    def start_width(self, in_ch: int) -> int:
        """Return the mid channels at the start of a search."""
        return in_ch * self.expand

    def max_width(self, in_ch: int) -> int:
        """Return the most mid channels of elasticity-scaling: 4/3 of the start."""
        return in_ch * self.expand * 4 // 3

    def min_width(self, in_ch: int) -> int:
        """Return the fewest mid channels of elasticity-scaling: half of the most."""
        return self.max_width(in_ch) // 2

    def se_width(self, in_ch: int) -> int:
        """Return the channels of the squeeze; 0 without SE."""
        return in_ch * self.expand // 3 if self.se else 0

    @property
    def label(self) -> str:
        """Short name, such as 'k5 e6 se'."""
        return f'k{self.kernel} e{self.expand}' + (' se' if self.se else '')


@dataclass(frozen=True)
class Stage:
    """A run of blocks of one resolution: the first block has the stride, all blocks share the output channels.

    Every block is connected to the stage's sink.
    """

    depth: int
    in_ch: int
    out_ch: int
    stride: int
    act: str

    @property
    def input_is_exit(self) -> bool:
        """Whether the stage's input has the sink's shape, so that depth 0 is possible."""
        return self.stride == 1 and self.in_ch == self.out_ch

    @property
    def exit_depths(self) -> range:
        """Depth of each entry of `betas`."""
        first = 0 if self.input_is_exit else 1
        return range(first, self.depth + 1)


@dataclass(frozen=True)
class Stem:
    """The fixed beginning: a strided convolution and one block without expansion."""

    conv_ch: int
    out_ch: int
    kernel: int
    stride: int
    se_ch: int
    act: str


@dataclass(frozen=True)
class Head:
    """The fixed end: 1x1 convolution, global average pool, linear."""

    out_ch: int
    act: str


@dataclass(frozen=True)
class Block:
    """One position of the supernet: the shapes that its operators share."""

    stage: str
    name: str
    in_ch: int
    out_ch: int
    stride: int
    in_size: int
    act: str

    @property
    def label(self) -> str:
        """Name of the block in logs, pictures and tables, such as stage1.1."""
        return f'{self.stage}.{self.name.removeprefix("block")}'

    @property
    def residual(self) -> bool:
        """Whether the block adds its input to its output."""
        return self.stride == 1 and self.in_ch == self.out_ch

    def key(self, op: Op) -> str:
        """Return the latency key of the block's shape with this operator."""
        se_ch = op.se_width(self.in_ch)
        return table_key(self.in_size, self.in_ch, se_ch, self.out_ch, op.kernel, self.stride, self.act)


@dataclass(frozen=True)
class SearchSpace:
    """Operators, stages, and the fixed stem and head around them.

    Raises:
        ValueError: a row with a value that cannot be; names the row, the value, and what would be right.
    """

    ops: tuple[Op, ...]
    stages: tuple[Stage, ...]
    stem: Stem
    head: Head

    def __post_init__(self) -> None:
        if not self.ops or not self.stages:
            raise ValueError(f'{"stages" if self.ops else "ops"} is empty, should have at least one row')
        for name, rows in (('ops', self.ops), ('stages', self.stages)):
            for i, row in enumerate(rows):
                _check_row(f'{name}[{i}]', row)
        _check_row('stem', self.stem)
        _check_row('head', self.head)
        before, out_ch = 'stem', self.stem.out_ch
        for i, stage in enumerate(self.stages):
            if stage.in_ch != out_ch:
                raise ValueError(f'stages[{i}].in_ch is {stage.in_ch}, should be {out_ch}, as {before}.out_ch')
            before, out_ch = f'stages[{i}]', stage.out_ch
        for i, op in enumerate(self.ops):
            for in_ch in [block.in_ch for block in self.blocks()]:
                if op.min_width(in_ch) <= in_ch:  # a block runs on its input channels if its width is not above them
                    raise ValueError(
                        f'ops[{i}].expand is {op.expand}: with {in_ch} input channels, its least width of '
                        f'{op.min_width(in_ch)} should be above {in_ch}; expand more'
                    )

    @property
    def stage_names(self) -> list[str]:
        """'stage1', 'stage2', ..."""
        return [f'stage{i}' for i in range(1, len(self.stages) + 1)]

    @property
    def named_stages(self) -> list[tuple[str, Stage]]:
        """Each stage with its name, in the network's order."""
        return list(zip(self.stage_names, self.stages, strict=True))

    @property
    def largest_op(self) -> int:
        """Index of the operator of the largest kernel and expansion, without squeeze-excitation if there is one."""
        return max(range(len(self.ops)), key=lambda i: (not self.ops[i].se, self.ops[i].kernel, self.ops[i].expand))

    def blocks(self, img_size: int = 224) -> list[Block]:
        """Return all blocks in the network's order, with sizes for a square input of `img_size` pixels."""
        blocks, size = [], after_stride(img_size, self.stem.stride)
        for stage_name, stage in self.named_stages:
            in_ch, stride = stage.in_ch, stage.stride
            for i in range(1, stage.depth + 1):
                blocks.append(Block(stage_name, f'block{i}', in_ch, stage.out_ch, stride, size, stage.act))
                size = after_stride(size, stride)
                in_ch, stride = stage.out_ch, 1
        return blocks

    def positions(self, img_size: int = 224) -> Iterator[tuple[Block, int, Op]]:
        """Yield (block, op index, operator) of every operator in the supernet."""
        for block in self.blocks(img_size):
            for index, op in enumerate(self.ops):
                yield block, index, op

    def chosen(self, arch: Arch, img_size: int = 224) -> list[tuple[Block, int]]:
        """Return (block, op index) of the blocks that `arch` keeps, in the network's order."""
        by_stage: dict[str, list[Block]] = {name: [] for name in self.stage_names}
        for block in self.blocks(img_size):
            by_stage[block.stage].append(block)
        return [pick for name in self.stage_names for pick in zip(by_stage[name], arch[name], strict=False)]

    def start_widths(self) -> Widths:
        """Return the mid channels of every operator at the start of a search."""
        return self._widths(Op.start_width)

    def max_widths(self) -> Widths:
        """Return the most mid channels of every operator: the widths of the full-width weights."""
        return self._widths(Op.max_width)

    def table_widths(self, img_size: int = 224) -> dict[str, tuple[int, int]]:
        """Return (fewest, most) mid channels of a search by latency key, in the network's order."""
        found: dict[str, tuple[int, int]] = {}
        for block, _, op in self.positions(img_size):
            key, low, high = block.key(op), op.min_width(block.in_ch), op.max_width(block.in_ch)
            old = found.get(key, (low, high))
            found[key] = min(low, old[0]), max(high, old[1])
        return found

    def _widths(self, rule) -> Widths:
        widths: Widths = {name: {} for name in self.stage_names}
        for block, index, op in self.positions():
            widths[block.stage].setdefault(block.name, {})[index] = rule(op, block.in_ch)
        return widths


def _check_row(place: str, row: Op | Stage | Stem | Head) -> None:
    for field in fields(row):
        name, value = field.name, getattr(row, field.name)
        if name == 'act':
            good, want = value in ACTIVATIONS, f'one of {", ".join(ACTIVATIONS)}'
        elif name == 'se':
            good, want = isinstance(value, bool), 'True or False'
        elif name == 'stride':
            good, want = type(value) is int and value in (1, 2), '1 or 2'
        elif name == 'kernel':
            good = type(value) is int and 1 <= value <= MAX_KERNEL and value % 2 == 1
            want = f'an odd whole number from 1 to {MAX_KERNEL}'
        else:
            least = 0 if name == 'se_ch' else 1
            good, want = type(value) is int and value >= least, f'a whole number of at least {least}'
        if not good:
            raise ValueError(f'{place}.{name} is {value!r}, should be {want}')


def table_key(in_size: int, in_ch: int, se_ch: int, out_ch: int, kernel: int, stride: int, act: str) -> str:
    """Return the latency key of a block's shape."""
    return f'MBInvertedResBlock_{in_size}_{in_ch}_{se_ch}_{out_ch}_k{kernel}_s{stride}_{act}'


def after_stride(size: int, stride: int) -> int:
    """Return the height or width of a feature map after a convolution of this stride with padding kernel // 2."""
    return -(-size // stride)


SPACE = SearchSpace(
    ops=(
        Op(kernel=3, expand=3, se=False),
        Op(kernel=3, expand=6, se=False),
        Op(kernel=5, expand=3, se=False),
        Op(kernel=5, expand=6, se=False),
        Op(kernel=3, expand=3, se=True),
        Op(kernel=3, expand=6, se=True),
        Op(kernel=5, expand=3, se=True),
        Op(kernel=5, expand=6, se=True),
    ),
    stages=(
        Stage(depth=2, in_ch=16, out_ch=24, stride=2, act='relu'),
        Stage(depth=3, in_ch=24, out_ch=40, stride=2, act='swish'),
        Stage(depth=4, in_ch=40, out_ch=80, stride=2, act='swish'),
        Stage(depth=4, in_ch=80, out_ch=112, stride=1, act='swish'),
        Stage(depth=4, in_ch=112, out_ch=192, stride=2, act='swish'),
        Stage(depth=1, in_ch=192, out_ch=320, stride=1, act='swish'),
    ),
    stem=Stem(conv_ch=32, out_ch=16, kernel=3, stride=2, se_ch=8, act='relu'),
    head=Head(out_ch=1280, act='swish'),
)
