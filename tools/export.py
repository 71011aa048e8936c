"""Export of networks to the formats of other programs. The packages are optional."""

import importlib
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from tools.errors import BadInput
from tools.files import write_atomic


def need(module: str, package: str, what: str) -> ModuleType:
    """Import an optional package.

    Raises:
        BadInput: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise BadInput(f'{what} needs a package that is not here: pip install {package}') from e


def describe_input(
    img_size: int, mean: Sequence[float], std: Sequence[float], class_names: Sequence[str]
) -> dict[str, str]:
    """Return the metadata of an exported file, each value as JSON: 'img_size' (pixels), 'mean' and 'std' (of red, green
    and blue in images from 0 to 1; inputs are (image - mean) / std), 'class_names' (by label)."""
    values = {'img_size': img_size, 'mean': list(mean), 'std': list(std), 'class_names': list(class_names)}
    return {name: json.dumps(value) for name, value in values.items()}


def open_onnx(path: str | Path) -> Callable[[Tensor], Tensor]:
    """Return a function from images to logits that runs an ONNX model by onnxruntime, on one CPU thread.

    Raises:
        BadInput: onnxruntime is missing.
    """
    onnxruntime = need('onnxruntime', 'onnxruntime', f'checking {path}')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])


def save_program(net: nn.Module, path: str | Path, img_size: int, metadata: dict[str, str]) -> None:
    """Write a torch.export program for any batch size. Load it by `torch.export.load(path).module()`.

    Args:
        metadata: see `describe_input`; each becomes an extra file, such as 'class_names.json'.
    """
    batch = torch.export.Dim('batch', min=1)
    program = torch.export.export(net, (torch.zeros(2, 3, img_size, img_size),), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={f'{key}.json': value for key, value in metadata.items()})
    write_atomic(path, lambda f: f.write(buffer.getvalue()))


def save_safetensors(net: nn.Module, path: str | Path, metadata: dict[str, str]) -> None:
    """Write the weights as safetensors.

    Args:
        metadata: see `describe_input`.

    Raises:
        BadInput: safetensors is missing.
    """
    save = need('safetensors.torch', 'safetensors', f'--export {path}').save
    state = {name: value.contiguous() for name, value in net.state_dict().items()}
    write_atomic(path, lambda f: f.write(save(state, metadata={'format': 'pt', **metadata})))


@torch.inference_mode()
def time_call(call: Callable[[Tensor], object], img_size: int, repeats: int = 30) -> float:
    """Return the median time of a call with one random image on the CPU, in ms, after a warm-up."""
    images, times = torch.randn(1, 3, img_size, img_size), []
    for i in range(repeats + 5):
        start = time.perf_counter()
        call(images)
        times += [time.perf_counter() - start] if i >= 5 else []
    return 1000 * statistics.median(times)
