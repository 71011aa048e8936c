"""The network config file (`model.config`): layer specs, checked reading, writing.

A config is JSON with the keys first_stem, second_stem, stage1, stage2, ... (lists of blocks), feature_mix_layer,
classifier, and optionally meta (see `models.meta`).
"""

import json
import reprlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from models.meta import META, Meta
from models.search_space import ACTIVATIONS, MAX_KERNEL, Arch, Block, Op, SearchSpace, Widths, after_stride, table_key
from tools.errors import BadInput

MAX_CHANNELS = 65536
MAX_BLOCKS = 1000
MAX_PARAMS = 10**9
"""Bounds on the memory that a file can ask for."""


@dataclass(frozen=True)
class ConvSpec:
    """Convolution, batch norm, activation. Kernel size and stride are in pixels."""

    kernel_size: int
    stride: int
    in_channels: int
    out_channels: int
    act_func: str | None
    groups: int = 1
    has_shuffle: bool = False
    bias: bool = False
    use_bn: bool = True
    affine: bool = True
    ops_order: str = 'weight_bn_act'
    NAME = 'ConvLayer'


@dataclass(frozen=True)
class MBSpec:
    """Inverted residual block: 1x1 expansion, depthwise, squeeze-excitation (if se_channels > 0), 1x1 projection."""

    in_channels: int
    mid_channels: int
    se_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    act_func: str | None
    groups: int = 1
    has_shuffle: bool = False
    bias: bool = False
    use_bn: bool = True
    affine: bool = True
    NAME = 'MBInvertedResBlock'

    @property
    def residual(self) -> bool:
        """Whether the block adds its input to its output."""
        return self.stride == 1 and self.in_channels == self.out_channels

    def convs(self) -> dict[str, ConvSpec]:
        """Return the block's convolutions by their names, in order.

        If mid_channels <= in_channels there is no expansion: the depthwise convolution runs on in_channels.
        """
        expands = self.mid_channels > self.in_channels
        mid = self.mid_channels if expands else self.in_channels
        rest = {'bias': self.bias, 'use_bn': self.use_bn, 'affine': self.affine}
        convs = {
            'inverted_bottleneck': ConvSpec(1, 1, self.in_channels, mid, self.act_func, **rest),
            'depth_conv': ConvSpec(self.kernel_size, self.stride, mid, mid, self.act_func, groups=mid, **rest),
            'point_linear': ConvSpec(1, 1, mid, self.out_channels, None, **rest),
        }
        return convs if expands else {name: convs[name] for name in ('depth_conv', 'point_linear')}


@dataclass(frozen=True)
class LinearSpec:
    """Fully connected layer."""

    in_features: int
    out_features: int
    bias: bool = True
    use_bn: bool = False
    affine: bool = False
    act_func: str | None = None
    ops_order: str = 'weight_bn_act'
    NAME = 'LinearLayer'


Spec = ConvSpec | MBSpec | LinearSpec


@dataclass(frozen=True)
class NetworkConfig:
    """One network: specs in order. `stages` maps stage1, stage2, ... to their blocks."""

    first_stem: ConvSpec
    second_stem: MBSpec
    stages: dict[str, list[MBSpec]]
    feature_mix_layer: ConvSpec
    classifier: LinearSpec
    meta: Meta = Meta()

    def blocks(self) -> Iterator[tuple[str, MBSpec]]:
        """Yield (place, spec) of every inverted residual block, the stem's first."""
        yield 'second_stem', self.second_stem
        for name, blocks in self.stages.items():
            for i, spec in enumerate(blocks):
                yield f'{name}.{i}', spec

    def layers(self) -> Iterator[Spec]:
        """Yield the specs of all layers in order."""
        yield self.first_stem
        yield from (spec for _, spec in self.blocks())
        yield from (self.feature_mix_layer, self.classifier)

    def table_keys(self, img_size: int) -> Iterator[tuple[str, MBSpec, str]]:
        """Yield (place, spec, latency table key) of every block after the stem, for images of `img_size` pixels."""
        size = after_stride(after_stride(img_size, self.first_stem.stride), self.second_stem.stride)
        for place, spec in list(self.blocks())[1:]:
            yield (
                place,
                spec,
                table_key(
                    size,
                    spec.in_channels,
                    spec.se_channels,
                    spec.out_channels,
                    spec.kernel_size,
                    spec.stride,
                    spec.act_func,
                ),
            )
            size = after_stride(size, spec.stride)

    def with_classes(self, num_classes: int) -> 'NetworkConfig':
        """Return the config with a classifier of `num_classes` outputs; names of another number of classes go."""
        kept = self.meta.class_names if len(self.meta.class_names or ()) == num_classes else None
        classifier = replace(self.classifier, out_features=num_classes)
        return replace(self, classifier=classifier, meta=replace(self.meta, class_names=kept))

    def rounded_up(self, divisor: int) -> 'NetworkConfig':
        """Return the config with the mid channels of the stages' blocks rounded up to multiples of `divisor`.

        A block without expansion has no mid channels to round.
        """

        def rounded(spec: MBSpec) -> MBSpec:
            expands = spec.mid_channels > spec.in_channels
            return replace(spec, mid_channels=-(-spec.mid_channels // divisor) * divisor) if expands else spec

        return replace(self, stages={name: [rounded(spec) for spec in specs] for name, specs in self.stages.items()})

    def to_dict(self) -> dict:
        """Return the JSON form."""

        def layer(spec: Spec) -> dict:
            return {'name': spec.NAME, **asdict(spec)}

        return {
            'first_stem': layer(self.first_stem),
            'second_stem': layer(self.second_stem),
            **{name: [layer(spec) for spec in blocks] for name, blocks in self.stages.items()},
            'feature_mix_layer': layer(self.feature_mix_layer),
            'classifier': layer(self.classifier),
            **({META: meta} if (meta := self.meta.to_dict()) else {}),
        }

    @classmethod
    def from_dict(cls, data: object, where: str) -> 'NetworkConfig':
        """Check the JSON form and build the config from it. `where` names the source in error messages.

        Raises:
            BadInput: a key missing or unknown, a value of the wrong type or out of bounds, channels that do not chain,
                names of another number of classes.
        """
        if not isinstance(data, dict):
            raise BadInput(f'{where}: expected a JSON object with first_stem, stage1, ..., classifier')
        meta, data = Meta.from_dict(data.get(META), where), {key: data[key] for key in data if key != META}
        fixed = {'first_stem': ConvSpec, 'second_stem': MBSpec, 'feature_mix_layer': ConvSpec, 'classifier': LinearSpec}
        stage_names = [f'stage{i}' for i in range(1, len(data) - len(fixed) + 1)]
        for key in [*fixed, *stage_names]:
            if key not in data:
                raise BadInput(f'{where}: key {key!r} is missing (has: {reprlib.repr(list(data))})')
        stages = {}
        for name in stage_names:
            if not isinstance(data[name], list) or len(data[name]) > MAX_BLOCKS:
                raise BadInput(f'{where}: {name} must be a list of at most {MAX_BLOCKS} blocks')
            stages[name] = [_spec(MBSpec, block, f'{where}: {name}[{i}]') for i, block in enumerate(data[name])]
        layers = {key: _spec(kind, data[key], f'{where}: {key}') for key, kind in fixed.items()}
        config = cls(stages=stages, meta=meta, **layers)
        _check_chain(config, where)
        if meta.class_names and len(meta.class_names) != config.classifier.out_features:
            names, classes = len(meta.class_names), config.classifier.out_features
            raise BadInput(f'{where}: {META}: class_names has {names} names, the classifier {classes} outputs')
        if (count := sum(_parameters(spec) for spec in config.layers())) > MAX_PARAMS:
            raise BadInput(f'{where}: a network of {count:.1e} parameters; at most {MAX_PARAMS:.0e} are allowed')
        return config


def parse_config(text: str, where: str) -> NetworkConfig:
    """Read a config from its JSON text.

    Raises:
        BadInput: not JSON, or see `NetworkConfig.from_dict`.
    """
    try:
        data = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as e:
        raise BadInput(f'{where}: not a JSON file ({e})') from e
    return NetworkConfig.from_dict(data, where)


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """Return the dict of a JSON object; a hook of `json.loads`. Raise ValueError if a key is there twice."""
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'key {next(name for name in data if names.count(name) > 1)!r} appears twice')
    return data


def load_config(path: str | Path) -> NetworkConfig:
    """Read a config file.

    Raises:
        BadInput: no such file, or not a config.
    """
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f'{path}: cannot be read as a config file ({e})') from e
    return parse_config(text, str(path))


def dump_config(config: NetworkConfig) -> str:
    """Return the text of a config file."""
    return json.dumps(config.to_dict(), indent=2) + '\n'


def op_spec(block: Block, op: Op, width: int, affine: bool = True) -> MBSpec:
    """Return the spec of an operator with `width` mid channels in this block."""
    return MBSpec(
        in_channels=block.in_ch,
        mid_channels=width,
        se_channels=op.se_width(block.in_ch),
        out_channels=block.out_ch,
        kernel_size=op.kernel,
        stride=block.stride,
        act_func=block.act,
        affine=affine,
    )


def fixed_layers(num_classes: int, space: SearchSpace, affine: bool = True) -> dict:
    """Return the specs of the layers outside the stages, by their keys in a config."""
    stem, head = space.stem, space.head
    last_ch = space.stages[-1].out_ch
    return {
        'first_stem': ConvSpec(stem.kernel, stem.stride, 3, stem.conv_ch, stem.act, affine=affine),
        'second_stem': MBSpec(
            stem.conv_ch, stem.conv_ch, stem.se_ch, stem.out_ch, stem.kernel, 1, stem.act, affine=affine
        ),
        'feature_mix_layer': ConvSpec(1, 1, last_ch, head.out_ch, head.act, affine=affine),
        'classifier': LinearSpec(head.out_ch, num_classes),
    }


def build_config(arch: Arch, widths: Widths, num_classes: int, space: SearchSpace) -> NetworkConfig:
    """Return the config of an architecture with the given mid channels."""
    stages: dict[str, list[MBSpec]] = {name: [] for name in space.stage_names}
    for block, index in space.chosen(arch):
        width = widths[block.stage][block.name][index]
        stages[block.stage].append(op_spec(block, space.ops[index], width))
    return NetworkConfig(stages=stages, **fixed_layers(num_classes, space))


def _spec(kind: type, data: object, where: str) -> Spec:
    if not isinstance(data, dict) or data.get('name') != kind.NAME:
        raise BadInput(f'{where}: expected an object with "name": "{kind.NAME}"')
    names = [f.name for f in fields(kind)]
    unknown = sorted(str(key)[:40] for key in data.keys() - {'name', *names})[:5]
    missing = [name for name in names if name not in data]
    if unknown or missing:
        raise BadInput(f'{where}: unknown keys {unknown}, missing keys {missing}')
    for name in names:
        _check_value(name, data[name], where)
    spec = kind(**{name: data[name] for name in names})
    if getattr(spec, 'has_shuffle', False) or (kind is MBSpec and spec.groups != 1):
        raise BadInput(f'{where}: grouped or shuffled blocks are not part of TF-NAS (groups 1, has_shuffle false)')
    if kind is ConvSpec and (spec.in_channels % spec.groups or spec.out_channels % spec.groups):
        raise BadInput(f'{where}: groups {spec.groups} must divide {spec.in_channels} and {spec.out_channels} channels')
    return spec


def _check_value(name: str, value: object, where: str) -> None:
    if name == 'act_func':
        good, want = value is None or value in ACTIVATIONS, f'one of {", ".join(ACTIVATIONS)} or null'
    elif name == 'ops_order':
        good, want = value == 'weight_bn_act', '"weight_bn_act"'
    elif name in ('has_shuffle', 'bias', 'use_bn', 'affine'):
        good, want = isinstance(value, bool), 'true or false'
    else:
        low = 0 if name == 'se_channels' else 1
        high = {'kernel_size': MAX_KERNEL, 'stride': 8}.get(name, MAX_CHANNELS)
        good = type(value) is int and low <= value <= high and (name != 'kernel_size' or value % 2 == 1)
        want = f'{"an odd" if name == "kernel_size" else "a"} whole number from {low} to {high}'
    if not good:
        raise BadInput(f'{where}: {name} is {reprlib.repr(value)}, should be {want}')


def _parameters(spec: Spec) -> int:
    """Return the number of weights of a layer, without batch norm and biases."""
    if isinstance(spec, LinearSpec):
        return spec.in_features * spec.out_features
    area = spec.kernel_size**2
    if isinstance(spec, ConvSpec):
        return area * spec.in_channels * spec.out_channels // spec.groups
    mid = max(spec.mid_channels, spec.in_channels)  # no expansion if mid_channels <= in_channels
    return mid * (spec.in_channels + area + spec.out_channels + 2 * spec.se_channels)


def _check_chain(config: NetworkConfig, where: str) -> None:
    if config.first_stem.in_channels != 3:
        raise BadInput(f'{where}: first_stem takes {config.first_stem.in_channels} channels, images have 3')
    channels = config.first_stem.out_channels
    tail = [('feature_mix_layer', config.feature_mix_layer)]
    for place, spec in [*config.blocks(), *tail]:
        if spec.in_channels != channels:
            raise BadInput(f'{where}: {place} takes {spec.in_channels} channels, the layer before it gives {channels}')
        channels = spec.out_channels
    if config.classifier.in_features != channels:
        raise BadInput(f'{where}: classifier takes {config.classifier.in_features} features, gets {channels}')
