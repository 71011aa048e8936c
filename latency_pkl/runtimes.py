"""Programs that run networks: PyTorch, and those that networks are deployed with. A runtime is a row of `RUNTIMES`."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from latency_pkl.sampling import build_network, launch_of, tf32_of
from latency_pkl.timing import PART_PASSES, ROUNDS, Bench, Standard, measure_latency
from models.config import NetworkConfig, parse_config
from models.latency import LatencyTable
from models.onnx_graph import to_onnx
from models.search_space import SearchSpace
from models.tables import load_table
from tools.environment import device_name, set_tf32
from tools.errors import BadInput
from tools.export import need
from tools.run import RunLogger

log = logging.getLogger('tf-nas')


class Session(nn.Module):
    """An ONNX model that a runtime has opened for one batch size. Called with images [N, 3, H, W] on the CPU.

    Args:
        model: the model, serialised.
        shape: of the images.
    """

    def __init__(self, model: bytes, shape: tuple[int, ...], threads: int, provider: str):
        super().__init__()

    def parts(self) -> list[Callable[[Tensor], object]]:
        """Return the whole network as the only part to be timed; see `NetworkEval.parts`."""
        return [self]


class OnnxRuntimeSession(Session):
    """A model in ONNX Runtime. On a GPU the images stay there; its logits are copied back."""

    def __init__(self, model: bytes, shape: tuple[int, ...], threads: int, provider: str):
        super().__init__(model, shape, threads, provider)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
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


class OpenVinoSession(Session):
    """A model in OpenVINO, in float32 and with a fixed batch size."""

    def __init__(self, model: bytes, shape: tuple[int, ...], threads: int, provider: str):
        super().__init__(model, shape, threads, provider)
        import openvino

        core = openvino.Core()
        if provider not in core.available_devices:
            raise BadInput(f'--provider {provider}: OpenVINO has {", ".join(core.available_devices)} here')
        network = core.read_model(model)
        network.reshape(list(shape))
        settings = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'}
        if provider == 'CPU':
            settings |= {'INFERENCE_NUM_THREADS': threads, 'NUM_STREAMS': 1, 'ENABLE_CPU_PINNING': False}
        self.request = core.compile_model(network, provider, settings).create_infer_request()
        self.tensor = openvino.Tensor

    def forward(self, images: Tensor) -> object:
        """Run the model."""
        self.request.set_input_tensor(self.tensor(images.numpy(), shared_memory=True))
        self.request.infer()
        return self.request.get_output_tensor().data


@dataclass(frozen=True)
class Runtime:
    """A runtime of ONNX models."""

    package: str
    session: type[Session]
    providers: dict[str, str]
    """Usual execution provider by the type of --device."""


RUNTIMES = {
    'onnxruntime': Runtime(
        'onnxruntime',
        OnnxRuntimeSession,
        {'cpu': 'CPUExecutionProvider', 'cuda': 'CUDAExecutionProvider'},
    ),
    'openvino': Runtime('openvino', OpenVinoSession, {'cpu': 'CPU'}),
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
        """Whether blocks are timed inside a running network."""
        return self.runtime == 'torch'

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
        """Return a bench of a network with random weights; `by_part` and `launch`: see `Bench`."""
        return Bench(self.build(config, seed, img_size, batch_size), batch_size, img_size, self.clock, by_part, launch)


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

    def __call__(self) -> Session:
        """Return the open network."""
        model = to_onnx(self.config, self.seed, self.shape[-1]).SerializeToString()
        row, threads = RUNTIMES[self.engine.runtime], torch.get_num_threads()
        return row.session(model, self.shape, threads, self.engine.provider)

    def __setstate__(self, state: dict) -> None:
        """Unpickle. Imports the runtime, in the process from which those that time networks are forked."""
        self.__dict__.update(state)
        need(RUNTIMES[self.engine.runtime].package, RUNTIMES[self.engine.runtime].package, 'timing')
        need('onnx', 'onnx', 'timing')


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
        log.info('%s, the table of the config, is not there: the latency is not relative to it', meta.table)
    elif meta.table:
        try:
            table = load_table(meta.table, img_size, space)
            if table.unit == 'ms':
                meta = replace(meta, predicted=table.of_config(config))
            if table.unit == 'ms' and table.is_of(device_name(device)):
                engine = engine_of_table(table.meta, None, None, device)
                batch_size, threads = table.setting('batch_size', batch_size), table.setting('threads', 1)
                launch = launch_of(table, engine.clock)
                torch.set_num_threads(threads)
                set_tf32(tf32_of(table))
                standard = standard_of(table, batch_size, engine, launch)
        except BadInput as e:
            log.info('the table of the config is not used: %s', e)
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False  # as for tables
    log.info('measuring the latency of the network: it is built and timed %d times, half a minute or so', ROUNDS)
    try:
        build = engine.build(config, 0, img_size, batch_size)
        measured = measure_latency(build, batch_size, img_size, engine.clock, standard, launch=launch)
        parts = np.array(measured.parts)
        if engine.clock.type == 'cuda':  # whose events would take time
            bench = engine.bench(config, 0, img_size, batch_size, by_part=True)
            parts = np.median(bench(PART_PASSES).parts, axis=0)
    except (BadInput, OSError, RuntimeError) as e:  # the training itself is done and saved
        log.info('latency not measured: %s', e)
        return
    setting = {'device': device_name(device), 'batch_size': batch_size, 'threads': threads, 'img_size': img_size}
    parts = (measured.ms / parts.sum() * parts).tolist()
    logger.record('latency', epoch, ms=measured.ms, parts=parts, runtime=engine.runtime, **setting)
    others = replace(meta, measured=None).latencies()
    runtime = '' if engine.runtime == 'torch' else f', {engine.runtime}'
    place = f'{setting["device"]}{runtime}, batch {batch_size}, {measured.reference}'
    log.info('measured latency %s on %s%s', measured, place, f'; {others}' if others else '')
