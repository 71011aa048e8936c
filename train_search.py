"""Search a network of a target latency; writes search-<time>-<note>/searched_model_NN.pth.tar, one an epoch.

The paper's search, on a GPU with its latency table:

    python train_search.py --img_root /data/imagenet/train --target_lat 15.0 --lambda_lat 0.1 --note tf-nas-b

A search on other images, at another input size, with lists of one's own:

    python train_search.py --img_root images --train_list train.txt --val_list val.txt --num_classes 10 \
        --img_size 64 --lookup_path latency_pkl/my_table_64.pkl --target_lat 60%

A search that was stopped or killed goes on, in its folder, with the same flags and:

    python train_search.py ... --snapshot auto

One process a GPU, with --batch_size and --workers as totals:

    torchrun --nproc_per_node=4 train_search.py ...
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from dataset.lists import list_folder, read_classes, split_by_class, write_list
from dataset.loaders import Batches, make_loader, read_train_val, tell_skipped, transforms
from models.describe import describe_architecture, describe_space, describe_table
from models.elasticity import check_divisor, latency_range, scale_widths, update_masks
from models.latency import load_table
from models.parsing import mask_widths, parse_architecture
from models.search_space import FREEDOMS, SPACE
from models.search_state import (
    SEARCH,
    architecture_steps,
    save_searched_model,
    searched_model,
    start_search,
    temperature,
    weights_lr,
)
from models.search_steps import architecture_step, train_only, weight_step
from tools.distributed import join_world, leave_world
from tools.environment import fingerprint, prepare
from tools.errors import BadInput
from tools.options import (
    Parser,
    add_device_arg,
    add_image_args,
    add_rank_arg,
    add_snapshot_args,
    add_step_args,
    add_watch_args,
    class_count,
    count,
    count_or_all,
    fraction,
    image_size,
    number,
    process_count,
    run_script,
)
from tools.rng import derive_seed, generator_for
from tools.run.checkpoint import Keeper
from tools.run.folder import Progress, open_run_folder, run_header
from tools.run.resume import find_snapshot
from tools.run.stop import ended_with, outlive_signals
from tools.training import Tally, to_device

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
    add_snapshot_args(parser)
    parser.add_argument(
        '--keep_checkpoints', type=count_or_all, default=2, help='searched models to keep, the newest; or the word all'
    )
    parser.add_argument('--print_freq', type=count(), default=100, help='steps between two lines of the log')
    parser.add_argument('--workers', type=process_count, default=4, help='processes that load images')
    parser.add_argument('--epochs', type=count(), default=90)
    parser.add_argument('--warmup_epochs', type=count(0), default=10, help='first epochs, which train weights only')
    add_image_args(parser)
    parser.add_argument('--batch_size', type=count(2), default=32)
    parser.add_argument('--img_size', type=image_size, default=224, help='input size in pixels')
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
    parser.add_argument('--num_classes', type=class_count, help='default: as many as the lists name')
    parser.add_argument('--seed', type=count(0), default=2)
    parser.add_argument('--lambda_lat', type=number(float, 0), default=0.1, help='weight of the latency loss')
    parser.add_argument('--target_lat', default='15.0', help='in ms; or a share of the reachable range, such as 60%%')
    parser.add_argument('--width_divisor', type=count(), default=1, help='all widths stay multiples of it')
    parser.add_argument(
        '--aligned_start', action='store_true', help='all operators of a block start alike; for short searches'
    )
    parser.add_argument(
        '--freedoms',
        nargs='*',
        choices=FREEDOMS,
        default=list(FREEDOMS),
        help='what is searched as in the paper; without operator: the Gumbel path alone trains the weights; without '
        'depth: a skip operator in place of the sinks; without width: the widths of the start are kept',
    )
    add_device_arg(parser)
    add_rank_arg(parser)
    add_step_args(parser)
    add_watch_args(parser)
    return parser.parse_args()


def make_default_lists(args):
    """Make the default lists where neither of them is there; returns a line for the log."""
    paths = Path(args.train_list), Path(args.val_list)
    if (args.train_list, args.val_list) != (TRAIN_LIST, VAL_LIST) or any(path.exists() for path in paths):
        return ''
    classes = read_classes(CLASSES)
    parts = split_by_class(list_folder(args.img_root, classes), ratio=0.8, seed=args.seed)
    for part, path in zip(parts, paths, strict=True):
        write_list(part, path)
    return f'made {paths[0]} and {paths[1]}: {len(parts[0])} and {len(parts[1])} images of {len(classes)} classes'


def train_epoch(state, train_loader, val_loader, table, args, world, keeper):
    """Train on the rest of an epoch's batches: weights only while warming up; then bi-sampled weights, and the
    architecture on every second step. Returns the epoch's numbers, or None where a signal stopped it."""
    net, epoch, steps, warming_up = state.net, state.epoch, len(train_loader), state.epoch < args.warmup_epochs
    weights, architecture = net.weight_parameters(), net.arch_parameters()
    table_matrix = table.matrix(net.widths()).to(world.device)
    w_tally, a_tally = Tally(world.device, state.sums[:4]), Tally(world.device, state.sums[4:])
    train_loader.sampler.set_epoch(epoch, state.step)
    before_update = partial(average_and_check, state, world, keeper)
    val_batches = to_device(Batches(val_loader, architecture_steps(epoch, state.step, steps, args)), world.device)
    batches, work = to_device(train_loader, world.device), 1 if warming_up else WORK
    batches = keeper.watch.progress.track(batches, f'epoch {epoch}', steps, state.step, work=work)
    for step, (images, labels) in enumerate(batches, state.step):
        draws = generator_for(args.seed, 'draws', epoch, step)
        first = net.sample('gumbel', draws)
        bi_sampling = not warming_up and 'operator' in args.freedoms
        paths = [first, net.sample('random', draws, exclude=first)] if bi_sampling else [first]
        train_only(weights, architecture)
        loss, logits = weight_step(
            net, state.w_optimizer, images, labels, paths, args.grad_clip, state.w_precision, before_update
        )
        w_tally.add(loss, logits, labels)
        if not warming_up and step % 2 == 0:
            images, labels = next(val_batches)
            train_only(architecture, weights)
            op_weights = net.mixture_weights(temperature(epoch, args), draws)
            loss, logits, state.latency = architecture_step(
                net,
                state.a_optimizer,
                images,
                labels,
                op_weights,
                table_matrix,
                table,
                args,
                state.a_precision,
                before_update,
            )
            a_tally.add(loss, logits, labels)
        if step % args.print_freq == 0 or step == steps - 1:
            keeper.watch.step(
                epoch, step + 1, steps, **read_numbers(w_tally, a_tally, state.latency, warming_up, world)
            )
        state.step = step + 1
        if keeper.after_update(state, w_tally, a_tally):
            return None
    state.sums = [*w_tally.total(world), *a_tally.total(world)]
    return read_numbers(w_tally, a_tally, state.latency, warming_up, world)


def average_and_check(state, world, keeper, parameters, losses):
    """Average the gradients of a step over all processes; returns whether its losses allow the update."""
    world.average_gradients(parameters)
    return keeper.allows_update(state, losses)


def read_numbers(w_tally, a_tally, latency, warming_up, world):
    """Loss and top-1 of the steps so far, of weights and architecture; the mixture's latency at the last of them."""
    tallies = {'w': w_tally.read(world)} | ({} if warming_up else {'a': a_tally.read(world)})
    numbers = {f'{which}_{name}': tally[name] for which, tally in tallies.items() for name in ('loss', 'top1')}
    return numbers if warming_up else numbers | {'mixture_latency': latency.item()}


@torch.no_grad()
def validate(net, loader, args, epoch, world, stops, precision):
    """Accuracy on Gumbel paths, one a batch; batch norms use the statistics of the batch. None where it `stops`."""
    tally = Tally(world.device)
    loader.sampler.set_epoch(0)
    for step, (images, labels) in enumerate(to_device(loader, world.device)):
        if stops():
            return None
        path = net.sample('gumbel', generator_for(args.seed, 'validation', epoch, step))
        with precision.autocast():
            logits = net(images, path).float()
        tally.add(F.cross_entropy(logits, labels), logits, labels)
    return tally.read(world)


def log_architecture(net, log):
    """One line a block with the probabilities of its operators, one line a stage with those of its exits."""
    for op in net.mixed_ops():
        probabilities = op.log_alphas.detach().softmax(0).tolist()
        log('%s.%s ops %s', op.block.stage, op.block.name, ' '.join(f'{p:.4f}' for p in probabilities))
    for name, weights in zip(net.space.stage_names, net.depth_weights(), strict=True):
        log('%s exits %s', name, ' '.join(f'{p:.4f}' for p in weights.tolist()))


def scale_to_target(full, masks, table, args, log):
    """Elasticity-scaling of the current architecture; returns the new widths, and the latencies for the metrics."""
    arch, widths = parse_architecture(full, table.space), mask_widths(masks)
    scaled = widths
    if 'width' in args.freedoms:
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


def read_table(args, world):
    """The latency table, and lines for the log; makes a number of ms of `args.target_lat`."""
    notes = []
    space = SPACE if 'depth' in args.freedoms else SPACE.with_skip()
    table = load_table(args.lookup_path, args.img_size, space, notes.append)
    reach = '%s: networks reach from %.4f (at full depth from %.4f) to %.4f %s'
    notes.append(reach % (args.lookup_path, *table.reach(), table.unit))
    if world.is_first:
        print(notes[-1], flush=True)
    args.target_lat = table.target(args.target_lat)
    check_divisor(args.width_divisor, table.space)
    return table, notes


def make_loaders(args, world, note):
    """Loaders of the images that train the weights and of those that train the architecture. `note`: for the log."""
    note(world.first_says(lambda: make_default_lists(args)))
    train, val = read_train_val((args.train_list, args.val_list), (args.img_root, args.img_root), args, note)
    for_training, for_validation = transforms(args)
    more = args, world, True, True
    train_loader = make_loader(args.img_root, train, for_training, *more, args.train_list, outlive_signals)
    val_loader = make_loader(args.img_root, val, for_validation, *more, args.val_list, outlive_signals)
    return train_loader, val_loader


def open_run(args, world, snapshot, state, table, steps):
    """The keeper of this search, with its folder and where its numbers go. `steps`: of an epoch."""
    latency = {'table': args.lookup_path, 'target': args.target_lat, **describe_table(table)}
    about = {'space': describe_space(args.img_size, table.space), 'latency': latency, 'steps_an_epoch': steps}
    header = run_header('search', args, world.device, **about)
    header['environment'] |= {'processes': world.size, 'table': fingerprint(args.lookup_path)}
    folder, watch = open_run_folder(args, world, SEARCH, snapshot, state, header)
    work = work_until(args.epochs, 0, steps, args), work_until(state.epoch, state.step, steps, args)
    watch.progress = Progress(*work, quiet=not world.is_first)
    return Keeper(folder, watch, world, args, header['environment'])


def work_until(epoch, step, steps, args):
    """Work of a search before a step, in steps of the warm-up. `steps`: of an epoch."""
    return steps * epoch + step + (WORK - 1) * max(steps * (epoch - args.warmup_epochs) + step, 0)


def main(args):
    """The search: per epoch train, validate, scale the widths to the target, save."""
    world = join_world(args.device, args.local_rank)
    table, notes = read_table(args, world)
    if args.warmup_epochs > args.epochs:
        raise BadInput(f'--warmup_epochs {args.warmup_epochs} should be at most --epochs {args.epochs}')
    train_loader, val_loader = make_loaders(args, world, notes.append)
    torch.manual_seed(derive_seed(args.seed, 'weights'))
    prepare(world.device, args.deterministic)
    state, snapshot = start_search(find_snapshot(args, SEARCH), table.space, world, args)
    keeper = open_run(args, world, snapshot.noting(*notes), state, table, len(train_loader))
    watch = keeper.watch

    with keeper, ended_with(train_loader, val_loader):
        while state.epoch < args.epochs:
            epoch, warming_up = state.epoch, state.epoch < args.warmup_epochs
            if state.step == 0:
                state.begin_epoch(args)
            numbers = {'lr': weights_lr(epoch, args), 'temperature': temperature(epoch, args)}
            watch.log('epoch %d w_lr %.5f T %.4f', epoch, *numbers.values())
            trained = train_epoch(state, train_loader, val_loader, table, args, world, keeper)
            if trained is None:
                break
            state.take_over()
            state.share(world)
            if epoch == args.warmup_epochs - 1 or epoch >= args.epochs - VALIDATED_EPOCHS:
                val = validate(state.net, val_loader, args, epoch, world, keeper.stops, state.w_precision)
                if val is None:
                    keeper.save(state)
                    break
                watch.log('epoch %d Gumbel paths: val_top1 %.2f val_top5 %.2f', epoch, val['top1'], val['top5'])
                numbers['val'] = val
            if not warming_up:
                log_architecture(state.net, watch.log)
                scale = partial(scale_to_target, state.full, state.masks, table, args, watch.log)
                widths, numbers['latency'] = world.first_says(scale)
                state.masks = update_masks(state.masks, widths, state.full)
            found = describe_architecture(state.full, state.masks, table, args.num_classes)
            watch.write('epoch', epoch, **numbers, **trained, **found)
            state.end_epoch()
            keeper.write(state, partial(save_searched_model, folder=keeper.folder, keep=args.keep_checkpoints))
            tell_skipped(train_loader, val_loader, log=watch.log, world=world)
        else:
            keeper.remove_checkpoints()
            watch.write('end', args.epochs - 1)
            if keeper.folder:
                watch.log('searched model: %s', keeper.folder / searched_model(args.epochs - 1))
    leave_world(world)
    if args.report:
        watch.draw()
    return keeper.exit_code()


if __name__ == '__main__':
    run_script(main, get_args())
