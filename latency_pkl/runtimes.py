"""Programs that run networks: PyTorch, and those that networks are deployed with. A runtime is a row of `RUNTIMES`."""

import json
import math
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from latency_pkl.sampling import build_network, launch_of
from latency_pkl.timing import PART_PASSES, ROUNDS, Bench, Clock, Passes, Standard, measure_latency
from models.config import NetworkConfig, parse_config
from models.latency import LatencyTable, load_table
from models.onnx_graph import to_onnx
from models.search_space import SearchSpace
from tools.environment import device_name
from tools.errors import BadInput
from tools.export import need
from tools.run.folder import RunLogger

WARM_UP = 3
"""Passes before the profiled ones."""

MOST_PER_NODE, LEAST_SHARE = 0.01, 0.5
"""Bounds on the time, in ms, that a profiler takes for a node, and on the share of a part's time that is not its own. A
contended core makes the differences of two timings much larger."""


class Session(nn.Module):
    """An ONNX model that a runtime has opened for one batch size. Called with images [N, 3, H, W] on the CPU.

    Args:
        model: the model, serialised.
        shape: of the images.
        profiled: keep the times of its nodes, until `node_times` is called.
    """

    def __init__(self, model: bytes, shape: tuple[int, ...], threads: int, provider: str, profiled: bool = False):
        super().__init__()

    def parts(self) -> list[Callable[[Tensor], object]]:
        """Return the whole network as the only part to be timed; see `NetworkEval.parts`."""
        return [self]

    def node_times(self) -> list[list[tuple[str, float]]]:
        """Return (name, ms) of each node of each pass so far, in the order in which they ran; ends the profile."""
        raise NotImplementedError


class OnnxRuntimeSession(Session):
    """A model in ONNX Runtime. On a GPU the images stay there; its logits are copied back."""

    def __init__(self, model: bytes, shape: tuple[int, ...], threads: int, provider: str, profiled: bool = False):
        super().__init__(model, shape, threads, provider, profiled)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self.profile = tempfile.TemporaryDirectory() if profiled else None
        if self.profile:
            options.enable_profiling, options.profile_file_prefix = True, f'{self.profile.name}/profile'
        self.session = onnxruntime.InferenceSession(model, options, providers=_with_fallbacks(provider))
        if (used := self.session.get_providers()[0]) != provider:
            raise BadInput(f'--provider {provider}: ONNX Runtime cannot start it here, and would use {used}')
        self.binding = None
        if provider in GPU_PROVIDERS:
            images = onnxruntime.OrtValue.ortvalue_from_numpy(np.random.randn(*shape).astype(np.float32), 'cuda', 0)
            self.binding = self.session.io_binding()
            self.binding.bind_ortvalue_input('images', images)
            self.binding.bind_output('logits')

    def forward(self, images: Tensor) -> object:
        """Run the model."""
        if self.binding is None:
            return self.session.run(None, {'images': images.numpy()})[0]
        return self.session.run_with_iobinding(self.binding)

    def node_times(self) -> list[list[tuple[str, float]]]:
        """See `Session`. A node's time ends at the beginning of the next one."""
        with self.profile, open(self.session.end_profiling(), encoding='utf-8') as file:
            events = json.load(file)
        runs = [(event['ts'], event['ts'] + event['dur']) for event in events if event['name'] == 'model_run']
        nodes = sorted((event['ts'], event['name']) for event in events if event.get('cat') == 'Node')
        passes = []
        for start, end in runs:
            inside = [(ts, name) for ts, name in nodes if start <= ts <= end]
            ends = [ts for ts, _ in inside[1:]] + [end]
            passes.append([(name, (after - ts) / 1000) for (ts, name), after in zip(inside, ends, strict=True)])
        return passes


class OpenVinoSession(Session):
    """A model in OpenVINO, in float32 and with a fixed batch size."""

    def __init__(self, model: bytes, shape: tuple[int, ...], threads: int, provider: str, profiled: bool = False):
        super().__init__(model, shape, threads, provider, profiled)
        import openvino

        core = openvino.Core()
        if provider not in core.available_devices:
            raise BadInput(f'--provider {provider}: OpenVINO has {", ".join(core.available_devices)} here')
        network = core.read_model(model)
        network.reshape(list(shape))
        settings = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32', 'PERF_COUNT': profiled}
        if provider == 'CPU':
            settings |= {'INFERENCE_NUM_THREADS': threads, 'NUM_STREAMS': 1, 'ENABLE_CPU_PINNING': False}
        self.request = core.compile_model(network, provider, settings).create_infer_request()
        self.tensor, self.profile = openvino.Tensor, [] if profiled else None

    def forward(self, images: Tensor) -> object:
        """Run the model."""
        self.request.set_input_tensor(self.tensor(images.numpy(), shared_memory=True))
        self.request.infer()
        if self.profile is not None:
            self.profile.append(self.request.profiling_info)
        return self.request.get_output_tensor().data

    def node_times(self) -> list[list[tuple[str, float]]]:
        """See `Session`. Nodes that were fused into others are left out."""
        passes = [
            [(info.node_name, 1000 * info.real_time.total_seconds()) for info in infos if info.real_time]
            for infos in self.profile
        ]
        self.profile = None
        return passes


@dataclass(frozen=True)
class Runtime:
    """A runtime of ONNX models."""

    package: str
    session: type[Session]
    providers: dict[str, str]
    """Usual execution provider by the type of --device."""
    profiled: tuple[str, ...]
    """Providers whose profile has the times of nodes."""


RUNTIMES = {
    'onnxruntime': Runtime(
        'onnxruntime',
        OnnxRuntimeSession,
        {'cpu': 'CPUExecutionProvider', 'cuda': 'CUDAExecutionProvider'},
        profiled=('CPUExecutionProvider',),
    ),
    'openvino': Runtime('openvino', OpenVinoSession, {'cpu': 'CPU'}, profiled=('CPU',)),
}

GPU_PROVIDERS = ('TensorrtExecutionProvider', 'CUDAExecutionProvider')
"""Providers of ONNX Runtime that keep tensors on a CUDA device."""


def _with_fallbacks(provider: str) -> list[str]:
    """Return a provider, and those that run the operators that it lacks."""
    known = [*GPU_PROVIDERS, 'CPUExecutionProvider']
    return known[known.index(provider) :] if provider in known else [provider, 'CPUExecutionProvider']


@dataclass(frozen=True)
class Engine:
    """What runs networks: a runtime, its execution provider, and the device."""

    runtime: str
    provider: str | None
    device: torch.device

    @property
    def clock(self) -> torch.device:
        """Device whose clock times the networks: the CPU's, unless torch runs on a GPU."""
        return self.device if self.runtime == 'torch' else torch.device('cpu')

    @property
    def by_block(self) -> bool:
        """Whether blocks can be timed inside a running network."""
        return self.runtime == 'torch' or self.provider in RUNTIMES[self.runtime].profiled

    @property
    def meta(self) -> dict:
        """Entries of a table's `meta`."""
        about = {'device': device_name(self.device), 'runtime': self.runtime}
        if self.runtime == 'torch':
            return about
        return about | {'runtime_version': version(RUNTIMES[self.runtime].package), 'provider': self.provider}

    def build(self, config: NetworkConfig, seed: int, img_size: int, batch_size: int) -> Callable[[], nn.Module]:
        """Return a function that builds a network with random weights, to be timed."""
        if self.runtime == 'torch':
            return partial(build_network, config, self.device, seed)
        return SessionBuild(self, config, seed, (batch_size, 3, img_size, img_size))

    def bench(
        self,
        config: NetworkConfig,
        seed: int,
        img_size: int,
        batch_size: int,
        by_part: bool = False,
        launch: str = 'eager',
    ) -> Bench:
        """Return a bench of a network with random weights.

        Args:
            by_part: time each part; so does torch on a CPU in any case.
            launch: see `Bench`.
        """
        build = self.build(config, seed, img_size, batch_size)
        kind = Bench if self.runtime == 'torch' or not by_part else ProfiledBench
        return kind(build, batch_size, img_size, self.clock, by_part, launch)


def engine_of(runtime: str, provider: str | None, device: torch.device) -> Engine:
    """Return the engine of --runtime, --provider and --device.

    Raises:
        BadInput: a package is missing, or the runtime has no such provider or device.
    """
    if runtime == 'torch':
        if provider:
            raise BadInput(f'--provider {provider}: only for --runtime {" and ".join(RUNTIMES)}')
        return Engine(runtime, None, device)
    row = RUNTIMES[runtime]
    need('onnx', 'onnx', f'--runtime {runtime}')
    package = need(row.package, row.package, f'--runtime {runtime}')
    usual = row.providers.get(device.type)
    if not (provider or usual):
        raise BadInput(f'--device {device.type}: {runtime} runs on {", ".join(row.providers)}; or name a --provider')
    if runtime == 'onnxruntime' and (provider or usual) not in (here := package.get_available_providers()):
        raise BadInput(f'--provider {provider or usual}: the installed onnxruntime has {", ".join(here)}')
    return Engine(runtime, provider or usual, device)


def engine_of_table(meta: dict, runtime: str | None, provider: str | None, device: torch.device) -> Engine:
    """Return `engine_of` the flags; those that are None are as in a table's `meta`, or torch.

    Raises:
        BadInput: see `engine_of`; or a table of an unknown runtime.
    """
    of_table = meta.get('runtime', 'torch')
    if not runtime and of_table not in ('torch', *RUNTIMES):
        raise BadInput(f"the latency table's runtime is {of_table!r}, should be one of torch, {', '.join(RUNTIMES)}")
    same = runtime in (None, of_table)
    return engine_of(runtime or of_table, provider or (meta.get('provider') if same else None), device)


@dataclass(frozen=True)
class SessionBuild:
    """Builds a network of random weights in another runtime than torch."""

    engine: Engine
    config: NetworkConfig
    seed: int
    shape: tuple[int, ...]

    def __call__(self, profiled: bool = False) -> Session:
        """Return the open network."""
        model = to_onnx(self.config, self.seed, self.shape[-1]).SerializeToString()
        row, threads = RUNTIMES[self.engine.runtime], torch.get_num_threads()
        return row.session(model, self.shape, threads, self.engine.provider, profiled)

    def __setstate__(self, state: dict) -> None:
        """Unpickle. Imports the runtime, in the process from which those that time networks are forked."""
        self.__dict__.update(state)
        need(RUNTIMES[self.engine.runtime].package, RUNTIMES[self.engine.runtime].package, 'timing')
        need('onnx', 'onnx', 'timing')


class ProfiledBench(Bench):
    """A bench of a session whose profile gives the times of parts: stem, each block, and head, as those of a network.

    The probes of a part are those of its pass.
    """

    def __call__(self, passes: int) -> Passes:
        """Time profiled passes, then whole ones without the profile, to which the parts are corrected.

        A profiler takes time for each node, or leaves out the time between nodes. So the same time is subtracted
        from all nodes, for parts that add up to the whole.
        """
        session, clock = self.build(profiled=True), Clock(self.device)
        self.__dict__['parts'] = session.parts()
        marks = [self._run(clock) for _ in range(WARM_UP + passes)]
        profiled = clock.passes(marks[WARM_UP:])
        nodes = session.node_times()[WARM_UP:]
        whole = super().__call__(passes)
        places = ['', *(place for place, _ in list(self.build.config.blocks())[1:])]
        sums, counts = zip(*(by_part(one, places) for one in nodes), strict=True)
        sums, counts = np.array(sums), np.array(counts)
        excess = (sums.sum(axis=1).min() - whole.parts.min()) / counts[0].sum()
        parts = np.maximum(sums - np.clip(excess, -MOST_PER_NODE, MOST_PER_NODE) * counts, LEAST_SHARE * sums)
        return Passes(parts, np.repeat(profiled.beside, parts.shape[1] + 1, axis=1))


def by_part(nodes: Iterable[tuple[str, float]], places: list[str]) -> tuple[list[float], list[int]]:
    """Return the time of each part in ms, and its number of nodes: stem, blocks, head.

    A node that bears no name of the config, such as a change of layout, belongs to the part of the node after it.

    Args:
        nodes: (name, ms) in the order in which they ran.
        places: of the blocks after the stem, after an entry for the stem: '', 'stage1.0', ...
    """
    sums, counts, pending = [0.0] * (len(places) + 1), [0] * (len(places) + 1), []
    for name, ms in nodes:
        pending.append(ms)
        if found := PLACE.search(name):
            part = places.index(found[0]) if found[0] in places else 0 if 'stem' in found[0] else len(places)
            sums[part] += sum(pending)
            counts[part] += len(pending)
            pending = []
    sums[-1] += sum(pending)
    counts[-1] += len(pending)
    return sums, counts


PLACE = re.compile(r'first_stem|second_stem|stage\d+\.\d+|feature_mix_layer|classifier')
"""Names of places in a config, at the beginning of the names of nodes."""


def standard_of(table: LatencyTable, batch_size: int, engine: Engine, launch: str = 'eager') -> Standard | None:
    """Return the table's reference network with its time from when the table was made.

    None if that was not on this device and runtime, or not with this batch size, number of threads and launch. A newer
    version of a runtime counts as the same.

    Raises:
        BadInput: the table's reference is no config, its time no positive number, or its launch none of `LAUNCHES`.
    """
    made_with = {'runtime': 'torch'} | table.meta | {'launch': launch_of(table, engine.clock)}
    here = engine.meta | {'batch_size': batch_size, 'threads': torch.get_num_threads(), 'launch': launch}
    names = ('device', 'runtime', 'provider', 'batch_size', 'threads', 'launch')
    if not {'reference', 'reference_ms'} <= table.meta.keys() or any(made_with.get(n) != here.get(n) for n in names):
        return None
    config = parse_config(str(table.meta['reference']), "the latency table's reference")
    ms = table.meta['reference_ms']
    if not (isinstance(ms, (int, float)) and 0 < ms < math.inf):
        raise BadInput(f"the latency table's reference_ms is {ms!r}, should be a positive number")
    return Standard(engine.build(config, 0, table.img_size, batch_size), float(ms))


def log_network_latency(
    logger: RunLogger, epoch: int, config: NetworkConfig, device: torch.device, img_size: int, space: SearchSpace
) -> None:
    """Measure the latency of a trained network and log it; a failure is a line of the log.

    It is measured beside the table that the config names, as that was made. Without a table, or if that is of another
    device, the clock alone counts.
    """
    meta, engine, standard, launch = config.meta, Engine('torch', None, device), None, 'eager'
    batch_size, threads = 32 if device.type == 'cuda' else 1, 1
    if meta.table and not Path(meta.table).is_file():
        logger.log('%s, the table of the config, is not there: the latency is not relative to it', meta.table)
    elif meta.table:
        try:
            table = load_table(meta.table, img_size, space, lambda _: None)
            if table.unit == 'ms':
                meta = replace(meta, predicted=table.of_config(config))
            if table.unit == 'ms' and table.is_of(device_name(device)):
                engine = engine_of_table(table.meta, None, None, device)
                batch_size, threads = table.setting('batch_size', batch_size), table.setting('threads', 1)
                launch = launch_of(table, engine.clock)
                torch.set_num_threads(threads)
                standard = standard_of(table, batch_size, engine, launch)
        except BadInput as e:
            logger.log('the table of the config is not used: %s', e)
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False  # as for tables
    logger.log('measuring the latency of the network: it is built and timed %d times, half a minute or so', ROUNDS)
    try:
        build = engine.build(config, 0, img_size, batch_size)
        measured = measure_latency(build, batch_size, img_size, engine.clock, standard, launch=launch)
        parts = np.array(measured.parts)
        if engine.clock.type == 'cuda':  # whose events would take time
            bench = engine.bench(config, 0, img_size, batch_size, by_part=True)
            parts = np.median(bench(PART_PASSES).parts, axis=0)
    except RuntimeError as e:  # the training itself is done and saved
        logger.log('latency not measured: %s', e)
        return
    setting = {'device': device_name(device), 'batch_size': batch_size, 'threads': threads, 'img_size': img_size}
    parts = (measured.ms / parts.sum() * parts).tolist()
    logger.record('latency', epoch, ms=measured.ms, parts=parts, runtime=engine.runtime, **setting)
    others = replace(meta, measured=None).latencies()
    runtime = '' if engine.runtime == 'torch' else f', {engine.runtime}'
    place = f'{setting["device"]}{runtime}, batch {batch_size}, {measured.reference}'
    logger.log('measured latency %s on %s%s', measured, place, f'; {others}' if others else '')
