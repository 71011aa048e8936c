"""Top-1 and top-5 accuracy of a trained network, or the classes of images.

    python test.py --config_path model.config --weights weights.pth.tar \\
        --val_root /data/imagenet/val --val_list val.txt
    python test.py --config_path model.config --weights weights.pth.tar \\
        --val_root photos/val
    python test.py --config_path model.config --weights weights.pth.tar \\
        --image photo.jpg
    python test.py --config_path model.config --weights weights.pth.tar \\
        --export net.onnx --fuse_bn

--export writes ONNX (.onnx), a torch.export program (.pt2), or weights and config (.safetensors and .config).
"""

import csv
import io
import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import tools.needed  # noqa: F401  # isort: skip
import torch
from tqdm import tqdm

from dataset.data import Source, load_evaluation_data
from dataset.lists import ClassFolders
from dataset.loaders import Loading
from dataset.transforms import MEAN, STD, load_rgb, val_transform
from models.config import dump_config
from models.meta import checkpoint_meta
from models.model_eval import NetworkEval, fuse_batch_norm, largest_difference
from models.onnx_graph import save_onnx, to_onnx
from models.parsing import load_architecture
from models.search_space import SPACE
from tools.chain import settle, suggest, with_flags
from tools.distributed import World, pick_device
from tools.environment import prepare
from tools.errors import BadInput
from tools.export import describe_input, open_onnx, save_program, save_safetensors, time_call
from tools.files import check_target, put_weights, read_weights, write_text
from tools.options import (
    USUAL_SIZE,
    Parser,
    add_arch_args,
    add_device_arg,
    add_eval_data_args,
    run_script,
)
from tools.precision import Precision
from tools.training import evaluate

log = logging.getLogger('tf-nas')

LAYOUT = torch.channels_last
FALLBACK_CLASSES = 1000  # of weights without a classifier; they fit no network, and loading them fails by name
FORMATS = ('.onnx', '.pt2', '.safetensors')
MOST_DIFFERENCE = 1e-4  # of an exported network's outputs; see `largest_difference`


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
    output.add_argument('--export_predictions', metavar='CSV', help='write the predictions for --val_root to this file')
    output.add_argument('--export', metavar='FILE', help='write the network as FILE: .onnx, .pt2 or .safetensors')
    network.add_argument('--fuse_bn', action='store_true', help='fold batch norms into the convolutions before them')
    add_device_arg(parser)
    args = parser.parse_args(argv)
    if args.val_list and not args.val_root:
        parser.error('--val_list needs a --val_root')
    if not (args.image or args.export or args.val_root):
        parser.error('give --val_root (and --val_list), or --image, or --export')
    if args.export and Path(args.export).suffix not in FORMATS:
        parser.error(f'--export {args.export}: its name should end in {", ".join(FORMATS)}')
    if args.export_predictions and not args.val_root:
        parser.error('--export_predictions writes the predictions for --val_root and --val_list; give --val_root')
    return args


def load_net(args):
    """Return the network in evaluation mode with its weights, the flags with its input size, and its training's flags.

    The config of the network has the meta of the weights, and for what they lack that of the config file.
    """
    path = args.model_path or args.config_path
    weights, key, about = read_weights(args.weights, average=not args.no_average)
    in_weights = len(weights.get('classifier.linear.weight', ()))
    num_classes = args.num_classes or in_weights or FALLBACK_CLASSES
    if args.num_classes is None:
        log.info('--num_classes %d: from %s', num_classes, args.weights)
    if in_weights and in_weights != num_classes:
        raise BadInput(f'{args.weights} is for {in_weights} classes, --num_classes is {num_classes}')
    config = load_architecture(path, SPACE)
    own = checkpoint_meta(about, args.weights)
    known = [(own.img_size, args.weights), (config.meta.img_size, path)]
    args = with_flags(args, img_size=settle('--img_size', args.img_size, known, USUAL_SIZE))
    note_normalisation(own, args.weights)
    meta = replace(own, class_names=own.class_names or config.meta.class_names, img_size=args.img_size)
    config = replace(config, meta=replace(meta, mean=MEAN, std=STD)).with_classes(num_classes)
    net = NetworkEval(config)
    put_weights(net, weights, args.weights)
    if key.endswith('ema'):
        log.info('Weights: the moving average in %s (%s)', args.weights, key)
    flags = about.get('flags')
    net = fuse_batch_norm(net.eval()) if args.fuse_bn else net.eval()
    return net, args, flags if isinstance(flags, Mapping) else {}


def note_normalisation(meta, source):
    """Print a line if weights were trained on images of another normalisation than that of `val_transform`."""
    if (meta.mean or MEAN, meta.std or STD) != (MEAN, STD):
        text = '%s is for mean %s and std %s; here images get %s and %s'
        log.warning(text, source, meta.mean, meta.std, MEAN, STD)


def names_of(net):
    """Return the class names of a network, 'class N' without."""
    return net.config.meta.class_names or [f'class {label}' for label in range(net.config.classifier.out_features)]


def export_files(path):
    """Return all files that `--export` writes, first the one that it names."""
    if not path:
        return []
    if path.endswith('.safetensors'):
        return [Path(path), Path(path).with_suffix('.config')]
    return [Path(path)]


def export(net, args):
    """Write the network to a file, check that the file gives the same outputs, and print the result."""
    path, times = Path(args.export), ''
    log.info('Exporting to %s', path)
    metadata = describe_input(args.img_size, MEAN, STD, names_of(net))
    net = net.cpu().to(memory_format=torch.contiguous_format)
    if path.suffix == '.safetensors':
        save_safetensors(net, path, metadata)
        write_text(path.with_suffix('.config'), dump_config(net.config))
        print(f'Exported: {path}, its config: {path.with_suffix(".config")}')
        return
    if path.suffix == '.pt2':
        save_program(net, path, args.img_size, metadata)
        exported = torch.export.load(path).module()
    else:
        save_onnx(to_onnx(net.config, net.state_dict(), args.img_size, metadata), path)
        exported = open_onnx(path)
        torch.set_num_threads(1)
        ms = [time_call(call, args.img_size) for call in (exported, net)]
        times = f'; one image on one CPU thread: onnxruntime {ms[0]:.3f} ms, torch {ms[1]:.3f} ms'
    difference = largest_difference(net, exported, args.img_size)
    print(f'Exported: {path}, largest difference {difference:.1e}{times}')
    if not difference <= MOST_DIFFERENCE:  # NaN too
        raise RuntimeError(f'{path} differs from the network by {difference:.1e}, more than {MOST_DIFFERENCE}')


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
def classify(net, args, device):
    """Print the most probable classes of each image."""
    names = names_of(net)
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


def test(net, args, trained, world):
    """Print the accuracies on the images of --val_root; write the predictions if requested.

    Args:
        trained: flags of the training.
    """
    names = names_of(net)
    source = Source(args.val_root, args.val_root, args.val_list, args.val_list, len(names))
    loading = Loading(args.img_size, args.batch_size, args.workers, seed=0)
    images, loader = load_evaluation_data(source, loading, world, net.config.meta.class_names, args.weights, trained)
    log.info('%d images of %s', len(images.samples), images.source)
    logits, bar = [], tqdm(total=len(loader), unit='batch', leave=False, disable=None)  # only on a terminal

    def see(batch):
        logits.append(batch)
        bar.update()

    result = evaluate(net, loader, Precision(world.device), world, LAYOUT, see=see).numbers
    bar.close()
    for name in ('top1', 'top5'):
        if name in result:
            print(f'Val_acc_{name}: {result[name]:.2f}')
    if args.export_predictions:
        probabilities = torch.cat(logits).softmax(1).cpu()
        write_text(args.export_predictions, predictions_csv(images.samples, probabilities, names))


def suggest_export(args):
    """Log the command that exports a tested network: as ONNX if its packages are here, else as a program of torch."""
    name = 'net.onnx' if all(map(find_spec, ('onnx', 'onnxruntime'))) else 'net.pt2'
    flags = {flag: Path(value) for flag in ('config_path', 'model_path') if (value := getattr(args, flag))}
    flags |= {'weights': Path(args.weights), 'export': Path(args.weights).with_name(name), 'fuse_bn': True}
    suggest('export it', 'test.py', flags | {'no_average': args.no_average})


def main(args):
    """Load the network, then classify an image, evaluate and export, as the flags say."""
    targets = [('--export_predictions', args.export_predictions)] if args.export_predictions else []
    for flag, path in [*targets, *(('--export', path) for path in export_files(args.export))]:
        check_target(path, flag, (args.weights, args.config_path, args.model_path, args.val_list, *(args.image or ())))
    world = World(pick_device(args.device))
    prepare(world.device)
    net, args, trained = load_net(args)
    net = net.to(world.device, memory_format=LAYOUT)
    if args.image:
        classify(net, args, world.device)
    if args.val_root:
        test(net, args, trained, world)
    if args.export:
        export(net, args)
    elif args.val_root:
        suggest_export(args)


if __name__ == '__main__':
    run_script(main, get_args())
