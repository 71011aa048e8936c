"""Search a network of a target latency; writes search-<time>-<note>/searched_model_NN.pth.tar, one an epoch.

The paper's search, on a GPU with its latency table:

    python train_search.py --img_root /data/imagenet/train --target_lat 15.0 --lambda_lat 0.1 --note tf-nas-b

A search on other images, at another input size, with lists of one's own:

    python train_search.py --img_root images --train_list train.txt --val_list val.txt --num_classes 10 \
        --img_size 64 --lookup_path latency_pkl/my_table_64.pkl --target_lat 60%
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from dataset.lists import list_folder, read_list, split_by_class, write_list
from dataset.loaders import Batches, make_loader
from dataset.make_lists import read_classes
from dataset.transforms import train_transform, val_transform
from models.describe import describe_architecture, describe_space, describe_table
from models.elasticity import (
    full_weights,
    gather,
    latency_range,
    scale_widths,
    scatter,
    start_masks,
    update_masks,
)
from models.latency import load_table
from models.model_search import Network
from models.parsing import MASKS_KEY, mask_widths, parse_architecture
from models.search_space import SPACE
from models.search_steps import architecture_step, train_only, weight_step
from tools.checkpoint import save_checkpoint
from tools.distributed import World, pick_device
from tools.engine import Tally, cosine_lr
from tools.errors import BadInput
from tools.logs import log_flags, make_logger, make_run_folder
from tools.metrics import Metrics, run_header
from tools.options import Parser, add_device_arg, add_watch_args, count, fraction, number, run_script
from tools.rng import derive_seed, generator_for
from tools.watch import Progress, Watch

TRAIN_LIST = './dataset/ImageNet-100-effb0_train_cls_ratio0.8.txt'
VAL_LIST = './dataset/ImageNet-100-effb0_val_cls_ratio0.8.txt'
CLASSES = Path(__file__).parent / 'dataset' / 'imagenet100_classes.txt'
VALIDATED_EPOCHS = 5
WORK = 4
"""What a step takes on average after the warm-up, in steps of the warm-up; for the first estimates of the time left."""


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    positive = number(float, 0, open_low=True)
    parser.add_argument('--img_root', required=True, help='folder that the paths in both lists start from')
    parser.add_argument('--train_list', default=TRAIN_LIST, help='images that train the weights')
    parser.add_argument('--val_list', default=VAL_LIST, help='images that train the architecture')
    parser.add_argument('--lookup_path', default='./latency_pkl/latency_gpu.pkl', help='latency table')
    parser.add_argument('--save', default='./checkpoints', help='folder that gets search-<time>-<note>/')
    parser.add_argument('--note', default='try', help='last part of the name of the run folder')
    parser.add_argument('--print_freq', type=count(), default=100, help='steps between two lines of the log')
    parser.add_argument('--workers', type=count(0), default=4, help='processes that load images')
    parser.add_argument('--epochs', type=count(), default=90)
    parser.add_argument('--warmup_epochs', type=count(0), default=10, help='first epochs, which train weights only')
    parser.add_argument('--batch_size', type=count(2), default=32)
    parser.add_argument('--img_size', type=count(32), default=224, help='input size in pixels')
    parser.add_argument('--w_lr', type=positive, default=0.025, help='learning rate of the weights')
    parser.add_argument('--w_mom', type=fraction, default=0.9, help='momentum of the weights')
    parser.add_argument('--w_wd', type=number(float, 0), default=1e-5, help='weight decay of the weights')
    parser.add_argument('--a_lr', type=positive, default=0.01, help='learning rate of the architecture')
    parser.add_argument('--a_wd', type=number(float, 0), default=5e-4, help='weight decay of the architecture')
    parser.add_argument('--a_beta1', type=fraction, default=0.5, help="Adam's first beta")
    parser.add_argument('--a_beta2', type=fraction, default=0.999, help="Adam's second beta")
    parser.add_argument('--grad_clip', type=positive, default=5.0, help='largest gradient norm')
    parser.add_argument('--T', type=positive, default=5.0, help='temperature of the Gumbel softmax at the start')
    parser.add_argument('--T_decay', type=number(float, 0, 1, open_low=True), default=0.96, help='its factor an epoch')
    parser.add_argument('--num_classes', type=count(2), default=100)
    parser.add_argument('--seed', type=count(0), default=2)
    parser.add_argument('--lambda_lat', type=number(float, 0), default=0.1, help='weight of the latency loss')
    parser.add_argument('--target_lat', default='15.0', help='in ms; or a share of the reachable range, such as 60%%')
    parser.add_argument('--width_divisor', type=count(), default=1, help='all widths stay multiples of it')
    add_watch_args(parser)
    add_device_arg(parser)
    return parser.parse_args()


def read_lists(args):
    """Both image lists; the default ones are made where they are missing. Returns them and a line for the log."""
    paths, made = (Path(args.train_list), Path(args.val_list)), ''
    if (args.train_list, args.val_list) == (TRAIN_LIST, VAL_LIST) and not any(path.exists() for path in paths):
        classes = read_classes(CLASSES)
        parts = split_by_class(list_folder(args.img_root, classes), ratio=0.8, seed=args.seed)
        for part, path in zip(parts, paths, strict=True):
            write_list(part, path)
        made = f'made {paths[0]} and {paths[1]}: {len(parts[0])} and {len(parts[1])} images of {len(classes)} classes'
    return *(read_list(path, args.img_root, args.num_classes) for path in paths), made


def train_epoch(net, train_loader, val_batches, table, args, epoch, temperature, device, watch):
    """One epoch: weights only while warming up; then bi-sampled weights, and the architecture on every second step."""
    warming_up = epoch < args.warmup_epochs
    weights, architecture = net.weight_parameters(), net.arch_parameters()
    w_lr = cosine_lr(args.w_lr, epoch, args.epochs)
    w_optimizer = torch.optim.SGD(weights, w_lr, args.w_mom, weight_decay=args.w_wd)
    betas = (args.a_beta1, args.a_beta2)
    a_optimizer = torch.optim.Adam(architecture, args.a_lr, betas, weight_decay=args.a_wd)
    table_matrix = table.matrix(net.widths()).to(device)
    w_tally, a_tally, latency = Tally(device), Tally(device), torch.zeros(())
    train_loader.sampler.set_epoch(epoch)
    steps, work = len(train_loader), 1 if warming_up else WORK
    for step, (images, labels) in enumerate(watch.progress.track(train_loader, f'epoch {epoch}', steps, work=work)):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        draws = generator_for(args.seed, 'draws', epoch, step)
        first = net.sample('gumbel', draws)
        paths = [first] if warming_up else [first, net.sample('random', draws, exclude=first)]
        train_only(weights, architecture)
        w_tally.add(*weight_step(net, w_optimizer, images, labels, paths, args.grad_clip), labels)
        if not warming_up and step % 2 == 0:
            images, labels = val_batches.next(device)
            train_only(architecture, weights)
            op_weights = net.mixture_weights(temperature, draws)
            loss, logits, latency = architecture_step(
                net, a_optimizer, images, labels, op_weights, table_matrix, table, args
            )
            a_tally.add(loss, logits, labels)
        if step % args.print_freq == 0 or step == steps - 1:
            numbers = {f'w_{name}': w_tally.read()[name] for name in ('loss', 'top1')}
            if not warming_up:
                numbers |= {f'a_{name}': a_tally.read()[name] for name in ('loss', 'top1')}
                numbers['mixture_latency'] = latency.item()
            watch.step(epoch, step + 1, steps, **numbers)
    return numbers


@torch.no_grad()
def validate(net, loader, args, epoch, device):
    """Accuracy on Gumbel paths, one a batch; batch norms use the statistics of the batch."""
    tally = Tally(device)
    loader.sampler.set_epoch(0)
    for step, (images, labels) in enumerate(loader):
        path = net.sample('gumbel', generator_for(args.seed, 'validation', epoch, step))
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        logits = net(images, path)
        tally.add(F.cross_entropy(logits, labels), logits, labels)
    return tally.read()


def log_architecture(net, log):
    """One line a block with the probabilities of its operators, one line a stage with those of its exits."""
    for op in net.mixed_ops():
        probabilities = op.log_alphas.detach().softmax(0).tolist()
        log('%s.%s ops %s', op.block.stage, op.block.name, ' '.join(f'{p:.4f}' for p in probabilities))
    for name, weights in zip(net.space.stage_names, net.depth_weights(), strict=True):
        log('%s exits %s', name, ' '.join(f'{p:.4f}' for p in weights.tolist()))


def scale_to_target(full, masks, table, args, log):
    """Elasticity-scaling of the current architecture; returns the new widths, and the latencies for the metrics."""
    arch, widths = parse_architecture(full), mask_widths(masks)
    scaled = scale_widths(arch, widths, table, args.target_lat, args.width_divisor)
    for when, values in (('Before', widths), ('After', scaled)):
        log('%s, the current lat: %.4f, the target lat: %.4f', when, table.total(arch, values), args.target_lat)
    least, most = latency_range(arch, table)
    if not least <= args.target_lat <= most:
        reach = (
            'The current architecture reaches %.4f to %.4f with its own operators: not the target. Another one may yet;'
        )
        log(f'{reach} parsing_model.py --target_lat finds the most probable that does.', least, most)
    return scaled, {
        'target': args.target_lat,
        'before': table.total(arch, widths),
        'after': table.total(arch, scaled),
        'least': least,
        'most': most,
    }


def start_watch(logger, table, folder, steps, args, device):
    """`metrics.jsonl` of this search, and its progress."""
    latency = {'table': args.lookup_path, 'target': args.target_lat, **describe_table(table)}
    about = {'space': describe_space(args.img_size), 'latency': latency, 'steps_an_epoch': steps}
    header = run_header('search', args, device, **about)
    work = steps * (args.warmup_epochs + WORK * (args.epochs - args.warmup_epochs))
    return Watch(logger, Metrics(folder, header, tensorboard=args.tensorboard), Progress(work))


def main(args):
    """The search: per epoch train, scale the widths to the target, validate, save."""
    device = pick_device(args.device)
    notes = []
    table = load_table(args.lookup_path, args.img_size, SPACE, notes.append)
    reach = '%s: networks reach from %.4f (at full depth from %.4f) to %.4f %s'
    notes.append(reach % (args.lookup_path, *table.reach(), table.unit))
    print(notes[-1], flush=True)
    args.target_lat = table.target(args.target_lat)
    if args.warmup_epochs > args.epochs:
        raise BadInput(f'--warmup_epochs {args.warmup_epochs} should be at most --epochs {args.epochs}')
    train_samples, val_samples, made = read_lists(args)
    world = World(device)
    train_loader = make_loader(
        args.img_root, train_samples, train_transform(args.img_size), args, world, True, True, args.train_list
    )
    val_loader = make_loader(
        args.img_root, val_samples, val_transform(args.img_size), args, world, True, True, args.val_list
    )
    folder = make_run_folder(args.save, 'search', args.note)
    logger = make_logger(folder)
    log_flags(logger, args)
    for line in filter(None, [*notes, made]):
        logger.info(line)

    torch.manual_seed(derive_seed(args.seed, 'weights'))
    torch.backends.cudnn.benchmark = True
    full, masks = full_weights(args.num_classes, device), start_masks()
    net = Network(mask_widths(masks), args.num_classes).to(device).train()
    val_batches = Batches(val_loader)
    temperature = args.T
    watch = start_watch(logger, table, folder, len(train_loader), args, device)
    for epoch in range(args.epochs):
        gather(net, full, masks)
        logger.info('epoch %d w_lr %.5f T %.4f', epoch, cosine_lr(args.w_lr, epoch, args.epochs), temperature)
        numbers = {'lr': cosine_lr(args.w_lr, epoch, args.epochs), 'temperature': temperature}
        numbers |= train_epoch(net, train_loader, val_batches, table, args, epoch, temperature, device, watch)
        scatter(net, full, masks)
        warming_up = epoch < args.warmup_epochs
        if epoch == args.warmup_epochs - 1 or epoch >= args.epochs - VALIDATED_EPOCHS:
            val = validate(net, val_loader, args, epoch, device)
            logger.info('epoch %d Gumbel paths: val_top1 %.2f val_top5 %.2f', epoch, val['top1'], val['top5'])
            numbers['val'] = val
        if not warming_up:
            temperature *= args.T_decay
            log_architecture(net, logger.info)
            scaled, numbers['latency'] = scale_to_target(full, masks, table, args, logger.info)
            masks = update_masks(masks, scaled, full)
        watch.write('epoch', epoch, **numbers, **describe_architecture(full, masks, table, args.num_classes))
        state = {f'module.{name}': value for name, value in full.items()}
        checkpoint = {'state_dict': state, MASKS_KEY: masks, 'epoch': epoch, 'args': vars(args)}
        save_checkpoint(checkpoint, folder / f'searched_model_{epoch:02d}.pth.tar')
    watch.write('end', args.epochs - 1)
    logger.info('searched model: %s', folder / f'searched_model_{args.epochs - 1:02d}.pth.tar')


if __name__ == '__main__':
    run_script(main, get_args())
