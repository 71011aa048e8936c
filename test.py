"""Top-1 and top-5 accuracy of a trained network, or the classes of one image.

    python test.py --config_path model.config --weights weights.pth.tar \\
        --val_root /data/imagenet/val --val_list val.txt
    python test.py --config_path model.config --weights weights.pth.tar \\
        --image photo.jpg
    python test.py --config_path model.config --weights weights.pth.tar \\
        --export net.onnx --fuse_bn

--export writes ONNX (.onnx), a torch.export program (.pt2), Python source that needs only torch, with weights (.py and
.pth), or weights and config (.safetensors and .config).
"""

import csv
import io
from pathlib import Path
from runpy import run_path

import tools.needed  # noqa: F401  # isort: skip
import torch
from tqdm import tqdm

from dataset.folders import ClassFolders
from dataset.images import load_rgb
from dataset.lists import read_list
from dataset.loaders import fewer_workers, log_skipped, make_loader
from dataset.transforms import val_transform
from models.config import dump_config
from models.deploy import fuse_batch_norm, largest_difference, to_source
from models.model_eval import NetworkEval
from models.onnx_graph import OPSETS, USUAL_OPSET, save_onnx, to_onnx
from models.parsing import load_architecture
from models.search_space import SPACE
from tools.distributed import World, pick_device
from tools.environment import prepare
from tools.errors import BadInput
from tools.export import open_onnx, save_program, save_safetensors, time_call
from tools.files import check_target, put_weights, read_weights, save_checkpoint, write_text
from tools.options import (
    Parser,
    add_arch_args,
    add_bad_images_arg,
    add_device_arg,
    add_eval_data_args,
    count,
    run_script,
)
from tools.precision import Precision
from tools.training import evaluate

LAYOUT = torch.channels_last
FALLBACK_CLASSES = 1000
"""Number of classes if the weights have no classifier; they fit no network, and loading them says so."""
FORMATS = ('.onnx', '.pt2', '.py', '.safetensors')
CLOSE = 1e-4
"""Largest allowed difference of an exported network's outputs; see `largest_difference`."""


def get_args(argv=None):
    """Parse `argv`, or the command line."""
    parser = Parser(__doc__)
    add_arch_args(parser)
    add_eval_data_args(parser, batch_size=256, workers=16, required=False)
    network, output = parser.groups['network'], parser.groups['output']
    network.add_argument('--weights', metavar='FILE', required=True, help='a checkpoint or state dict of the network')
    network.add_argument('--no_average', action='store_true', help='ignore a moving average in --weights')
    parser.groups['data'].add_argument(
        '--image', metavar='PATH', nargs='+', help='image files or folders; prints the five most probable classes'
    )
    output.add_argument('--export_predictions', metavar='CSV', help='write the predictions for --val_list to this file')
    output.add_argument('--export', metavar='FILE', help='write the network as FILE: .onnx, .pt2, .py or .safetensors')
    output.add_argument('--opset', type=count(OPSETS[0], OPSETS[-1]), help=f'of a .onnx file; default: {USUAL_OPSET}')
    network.add_argument('--fuse_bn', action='store_true', help='fold batch norms into the convolutions before them')
    add_bad_images_arg(parser)
    parser.set_defaults(seed=0)
    add_device_arg(parser)
    args = parser.parse_args(argv)
    if bool(args.val_root) != bool(args.val_list):
        parser.error('give both --val_root and --val_list, or neither')
    if not (args.image or args.export or args.val_list):
        parser.error('give --val_root and --val_list, or --image, or --export')
    if args.opset and not (args.export or '').endswith('.onnx'):
        parser.error('--opset is of a .onnx file: give --export FILE.onnx too')
    if args.export and Path(args.export).suffix not in FORMATS:
        parser.error(f'--export {args.export}: its name should end in {", ".join(FORMATS)}')
    if args.export and args.export.endswith('.py') and not Path(args.export).stem.isidentifier():
        parser.error(f'--export {args.export}: a module to import should be named like a variable')
    if args.export_predictions and not args.val_list:
        parser.error('--export_predictions writes the predictions for --val_root and --val_list; give both')
    return args


def load_net(args):
    """Return the network in evaluation mode with its weights, and the names of its classes."""
    path = args.model_path or args.config_path
    weights, key, names = read_weights(args.weights, average=not args.no_average)
    in_weights = len(weights.get('classifier.linear.weight', ()))
    num_classes = args.num_classes or in_weights or FALLBACK_CLASSES
    if args.num_classes is None:
        print(f'--num_classes {num_classes}: from {args.weights}')
    if in_weights and in_weights != num_classes:
        raise BadInput(f'{args.weights} is for {in_weights} classes, --num_classes is {num_classes}')
    net = NetworkEval(load_architecture(path, num_classes, SPACE).with_classes(num_classes))
    put_weights(net, weights, args.weights)
    if key.endswith('ema'):
        print(f'Weights: the moving average in {args.weights} ({key})')
    names = names if names and len(names) == num_classes else [f'class {label}' for label in range(num_classes)]
    return fuse_batch_norm(net.eval()) if args.fuse_bn else net.eval(), names


def export_files(path):
    """Return all files that `--export` writes, first the one that it names."""
    if not path:
        return []
    second = {'.safetensors': '.config', '.py': '.pth'}.get(Path(path).suffix)
    return [Path(path), *([Path(path).with_suffix(second)] if second else [])]


def export(net, names, args):
    """Write the network to a file, check that the file gives the same outputs, and print the result."""
    (path, *others), times = export_files(args.export), ''
    print(f'Exporting to {path}', flush=True)
    net = net.cpu().to(memory_format=torch.contiguous_format)
    if path.suffix == '.safetensors':
        save_safetensors(net, path, names)
        write_text(others[0], dump_config(net.config))
        print(f'Exported: {path}, its config: {others[0]}')
        return
    if path.suffix == '.py':
        (weights,) = others
        title = f'A network found by TF-NAS ({Path(args.model_path or args.config_path).name}).'
        write_text(path, to_source(net, path.stem, weights.name, title, names))
        save_checkpoint(net.state_dict(), weights)
        exported = run_path(str(path))['load']()
    elif path.suffix == '.pt2':
        save_program(net, path, args.img_size, names)
        exported = torch.export.load(path).module()
    else:
        save_onnx(to_onnx(net.config, net.state_dict(), args.img_size, names, args.opset or USUAL_OPSET), path)
        exported = open_onnx(path)
        torch.set_num_threads(1)
        ms = [time_call(call, args.img_size) for call in (exported, net)]
        times = f'; one image on one CPU thread: onnxruntime {ms[0]:.3f} ms, torch {ms[1]:.3f} ms'
    difference = largest_difference(net, exported, args.img_size)
    print(f'Exported: {path}, largest difference {difference:.1e}{times}')
    if not difference <= CLOSE:  # NaN too
        raise RuntimeError(f'{path} differs from the network by {difference:.1e}, more than {CLOSE}')


def predictions_csv(samples, probabilities, names):
    """Return CSV text with a line per image: path, label, most probable class, its probability, top five, its name."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['path', 'label', 'predicted', 'probability', 'top5', 'name'])
    top = probabilities.topk(min(5, probabilities.shape[1]))
    for (path, label), values, classes in zip(samples, top.values.tolist(), top.indices.tolist(), strict=True):
        writer.writerow([path, label, classes[0], f'{values[0]:.6f}', ' '.join(map(str, classes)), names[classes[0]]])
    return text.getvalue()


@torch.inference_mode()
def classify(net, names, args, device):
    """Print the most probable classes of each image."""
    paths = [path for given in args.image for path in images_in(Path(given))]
    for path in paths:
        image = val_transform(args.img_size)(load_rgb(path))
        top = net(image[None].to(device, memory_format=LAYOUT)).softmax(1)[0].topk(min(5, len(names)))
        if len(paths) > 1:
            print(path)
        for place, (probability, label) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True), 1):
            name = '' if names[label] == f'class {label}' else f' ({names[label]})'
            print(f'{place}. class {label}{name} probability {probability:.4f}')


def images_in(path):
    """Return an image file itself, or the images of a folder and its subfolders."""
    if not path.is_dir():
        return [path]
    found = [path / name for name in ClassFolders(path).images('.')]
    if not found:
        raise BadInput(f'--image {path}: a folder without images')
    return found


def test(net, names, args, world):
    """Print the accuracies on --val_list; write the predictions if requested."""
    samples = read_list(args.val_list, args.val_root, len(names))
    loader = make_loader(
        args.val_root, samples, val_transform(args.img_size), args, world, args.val_list, for_training=False
    )
    if line := fewer_workers('--workers', args.workers, world):
        print(line)
    print(f'{len(samples)} images of {args.val_list}', flush=True)
    logits, bar = [], tqdm(total=len(loader), unit='batch', leave=False, disable=None)  # only on a terminal

    def see(batch):
        logits.append(batch)
        bar.update()

    result = evaluate(net, loader, Precision(world.device), world, LAYOUT, see=see).numbers
    bar.close()
    print(f'Val_acc_top1: {result["top1"]:.2f}')
    print(f'Val_acc_top5: {result["top5"]:.2f}')
    log_skipped(loader, log=print, world=world)
    if args.export_predictions:
        samples = [sample for sample, bad in zip(samples, loader.dataset.bad.tolist(), strict=True) if not bad]
        write_text(args.export_predictions, predictions_csv(samples, torch.cat(logits).softmax(1).cpu(), names))


def main(args):
    """Load the network, then classify an image, evaluate and export, as the flags say."""
    targets = [('--export_predictions', args.export_predictions)] if args.export_predictions else []
    for flag, path in [*targets, *(('--export', path) for path in export_files(args.export))]:
        check_target(path, flag, (args.weights, args.config_path, args.model_path, args.val_list, *(args.image or ())))
    world = World(pick_device(args.device))
    prepare(world.device)
    net, names = load_net(args)
    net = net.to(world.device, memory_format=LAYOUT)
    if args.image:
        classify(net, names, args, world.device)
    if args.val_list:
        test(net, names, args, world)
    if args.export:
        export(net, names, args)


if __name__ == '__main__':
    run_script(main, get_args())
