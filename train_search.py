"""Search a network of a target latency; writes search-<time>-<note>/searched_model_NN.pth.tar after NN epochs.

The paper's search, on a GPU with its latency table:

    python train_search.py --img_root /data/imagenet/train --target_lat 15.0 \\
        --lambda_lat 0.1 --note tf-nas-b

A search on a folder of class folders, at the input size of the table; or with lists of one's own:

    python train_search.py --img_root photos --target_lat 60% \\
        --lookup_path latency_pkl/my_table_64.pkl
    python train_search.py --img_root images \\
        --train_list train.txt --val_list val.txt \\
        --lookup_path latency_pkl/my_table_64.pkl --target_lat 60%

A search that was stopped or killed goes on, in its folder, with the same flags and:

    python train_search.py ... --snapshot auto

One process a GPU, with --batch_size, --workers and --val_workers as totals:

    torchrun --nproc_per_node=4 train_search.py ...
"""

import logging
from functools import partial
from pathlib import Path

import tools.needed  # noqa: F401  # isort: skip
import torch
import torch.nn.functional as F

from dataset.data import Source, load_search_data
from dataset.loaders import Loading, endless
from models.cuda_graph import Graphs
from models.describe import (
    describe_architecture,
    describe_space,
    describe_table,
    epoch_line,
    largest_mixture,
    warn_not_decided,
    warn_not_learned,
)
from models.elasticity import align_operators, check_divisor, update_masks
from models.meta import META, Meta
from models.model_search import ExecutionMode, HostCopy
from models.parsing import mask_widths, parse_architecture
from models.search import (
    SEARCH,
    Recipe,
    backward_on_mixture,
    backward_on_paths,
    new_state,
    rehearse_architecture_step,
    remove_old_models,
    searched_model,
    settle_schedule,
    train_only,
)
from models.search_space import FREEDOMS, SPACE
from models.tables import compare_table, load_table, table_size
from models.targeting import OFF_TARGET, Target, log_probability
from tools.chain import changed, settle, suggest, with_flags
from tools.checkpoint import IMAGES, Checkpointer, compare_snapshot, ended_with, find_snapshot
from tools.distributed import join_world, leave_world
from tools.environment import device_name, fingerprint, note_large_tensors, prepare
from tools.errors import BadInput
from tools.files import CLASS_NAMES
from tools.options import (
    DEFAULT_TABLE,
    USUAL_SIZE,
    Parser,
    add_device_arg,
    add_image_args,
    add_output_args,
    add_rank_arg,
    add_size_arg,
    add_snapshot_args,
    add_tf32_arg,
    class_count,
    count,
    fraction,
    number,
    process_count,
    project_file,
    run_script,
)
from tools.plots import draw_at_end
from tools.precision import DTYPES, check_format
from tools.rng import derive_seed, generator_for
from tools.run import open_run, run_header
from tools.training import PassResult, Tally, accuracies, to_device

log = logging.getLogger('tf-nas')

VALIDATED_EPOCHS = 5


def get_args(argv=None):
    """Parse `argv`, or the command line. Defaults are the paper's recipe."""
    parser = Parser(__doc__)
    data, latency = parser.groups['data'], parser.groups['latency']
    data.add_argument('--img_root', metavar='FOLDER', required=True, help='folder of class folders, or of the lists')
    data.add_argument('--train_list', metavar='FILE', help='images that train the weights; default: of the folders')
    data.add_argument('--val_list', metavar='FILE', help='images that train the architecture')
    data.add_argument('--num_classes', type=class_count, help='number of classes; default: as many as the lists name')
    data.add_argument('--batch_size', type=count(2), default=32, help='images per step, over all devices')
    add_size_arg(parser, 'of the table')
    add_image_args(parser)
    latency.add_argument('--lookup_path', metavar='FILE', default=DEFAULT_TABLE, help='latency table')
    latency.add_argument(
        '--target_lat', metavar='MS', default='15.0', help='in ms, or a share of the range such as 60%%'
    )
    latency.add_argument('--lambda_lat', type=number(float, 0), default=0.1, help='weight of the latency loss')
    latency.add_argument('--width_divisor', type=count(), help="widths are multiples of it; default: the table's, or 1")
    add_schedule_args(parser.groups['search'])
    add_step_args(parser)
    add_output_args(parser, 'search')
    add_snapshot_args(parser)
    parser.groups['resuming'].add_argument(
        '--keep_checkpoints', metavar='N', type=count_or_all, default=2, help='newest searched models to keep, or all'
    )
    add_rank_arg(parser)
    args = parser.parse_args(argv)
    if (args.width_divisor or 1) > 1 and 'width' not in args.freedoms:
        parser.error(f'--width_divisor {args.width_divisor} is of the freedom width, which --freedoms leaves out')
    if args.warmup_epochs > args.epochs:
        parser.error(f'--warmup_epochs {args.warmup_epochs} should be at most --epochs {args.epochs}')
    if args.largest_epochs and args.largest_epochs >= args.warmup_epochs:
        parser.error(f'--largest_epochs {args.largest_epochs} should be below --warmup_epochs {args.warmup_epochs}')
    return args


def add_schedule_args(search):
    """Add the flags of the length of a search and of its two optimizers."""
    positive, decay = number(float, 0, open_low=True), number(float, 0)
    search.add_argument('--epochs', type=count(), default=90, help='epochs in all')
    search.add_argument('--warmup_epochs', type=count(0), default=10, help='first epochs, which train weights only')
    search.add_argument(
        '--largest_epochs', type=count(0), default=0, help='first epochs, of the largest operators alone'
    )
    search.add_argument('--w_lr', type=positive, default=0.025, help='learning rate of the weights')
    search.add_argument('--w_mom', type=fraction, default=0.9, help='momentum of the weights')
    search.add_argument('--w_wd', type=decay, default=1e-5, help='weight decay of the weights')
    search.add_argument('--a_lr', type=positive, help='of the architecture; default: 0.01, more for fewer steps')
    search.add_argument('--a_wd', type=decay, help='of the architecture; default: 5e-4, less for fewer steps')
    search.add_argument('--a_beta1', type=fraction, default=0.5, help="Adam's first beta")
    search.add_argument('--a_beta2', type=fraction, default=0.999, help="Adam's second beta")
    search.add_argument('--grad_clip', type=positive, default=5.0, help='largest gradient norm')
    search.add_argument('--T', type=positive, default=5.0, help='temperature of the Gumbel softmax at the start')
    search.add_argument(
        '--T_decay',
        type=number(float, 0, 1, open_low=True),
        help='factor on T per epoch; default: as far as by 0.96',
    )
    search.add_argument('--seed', type=count(0), default=2, help='seed of all that is drawn')
    search.add_argument(
        '--freedoms', nargs='*', choices=FREEDOMS, default=list(FREEDOMS), help='what is searched as in the paper'
    )


def add_step_args(parser):
    """Add flags that change speed and memory of a search but not its results, except for rounding."""
    hardware = parser.groups['hardware']
    add_device_arg(parser)
    hardware.add_argument('--workers', type=process_count, default=4, help="processes that load the weights' images")
    hardware.add_argument('--val_workers', type=process_count, help="the architecture's; default: half of --workers")
    hardware.add_argument('--amp', choices=('float16', 'bfloat16'), help='autocast to this format; default: float32')
    add_tf32_arg(parser)
    hardware.add_argument('--cuda_graph', action='store_true', help='launch the architecture step as one CUDA graph')
    hardware.add_argument('--checkpoint_ops', action='store_true', help='recompute operators to save memory')


def count_or_all(text):
    """Parse a whole number of at least 1, or 'all' as None, as an argparse type."""
    return None if text == 'all' else count()(text)


def train_epoch(state, loaders, learn_on_mixture, world, args, checkpointer, logger):
    """Train on the rest of an epoch's batches: the weights on one path while warming up, then on two (bi-sampling), and
    on every second step the architecture on the mixture. Epochs of the largest operators alone are not in the paper.

    Args:
        learn_on_mixture: `learn_with_noise` for the state and the widths of this epoch.
    """
    net, epoch, warming_up = state.net, state.epoch, state.epoch < args.warmup_epochs
    train_loader, val_loader = loaders
    steps = len(train_loader)
    weights, architecture = net.weight_parameters(), net.arch_parameters()
    w_tally, a_tally = Tally(world.device, state.sums[:4]), Tally(world.device, state.sums[4:])
    train_loader.sampler.set_epoch(epoch, state.step)
    layout = torch.channels_last
    train_batches = to_device(train_loader, world.device, layout, logger.waiting('--workers', args.batch_size))
    val_batches = endless(val_loader, state.recipe.architecture_steps(epoch, state.step, steps))
    val_batches = to_device(val_batches, world.device, layout, logger.waiting('--val_workers', args.batch_size))
    log_alphas = HostCopy(net.log_alphas())
    for step, (images, labels) in enumerate(train_batches, state.step):
        draws = generator_for(args.seed, 'draws', epoch, step)
        paths = [net.sample('gumbel', draws, log_alphas=log_alphas)]
        if epoch < args.largest_epochs:
            paths = [[net.space.largest_op] * net.num_blocks]
        if not warming_up and 'operator' in args.freedoms:
            paths.append(net.sample('random', draws, exclude=paths[0]))
        train_only(weights, architecture)
        losses, logits = backward_on_paths(net, images, labels, paths, state.w_precision)
        world.average_gradients(weights)
        if checkpointer.allows_update(state, losses):
            state.w_precision.step(state.w_optimizer, args.grad_clip)
        w_tally.add(losses[0], logits, labels)

        if not warming_up and step % 2 == 0:
            images, labels = next(val_batches)
            train_only(architecture, weights)
            loss, logits, state.latency = learn_on_mixture(images, labels, net.mixture_noise(draws))
            world.average_gradients(architecture)
            if checkpointer.allows_update(state, [loss]):
                state.a_precision.step(state.a_optimizer, args.grad_clip)
                net.project_architecture()
                log_alphas = HostCopy(net.log_alphas())
            a_tally.add(loss, logits, labels)

        logger.advance()
        if step % args.print_freq == 0 or step == steps - 1:
            numbers = read_numbers(w_tally, a_tally, state.latency, warming_up, world)
            logger.step(epoch, step + 1, steps, **numbers)
        state.step = step + 1
        if checkpointer.is_due():
            state.sums = [*w_tally.total(world), *a_tally.total(world)]
            state.scatter_to_full()
            checkpointer.save(state)
        if checkpointer.signal:
            return PassResult({}, stopped=True)
    state.sums = [*w_tally.total(world), *a_tally.total(world)]
    return PassResult(read_numbers(w_tally, a_tally, state.latency, warming_up, world))


def learn_with_noise(state, latency_loss, images, labels, noise):
    """Add the gradients of the architecture on a mixture with Gumbel noise; see `backward_on_mixture`."""
    op_weights = state.net.noisy_weights(noise, state.recipe.temperature(state.epoch))
    return backward_on_mixture(state.net, images, labels, op_weights, latency_loss, state.a_precision)


def read_numbers(w_tally, a_tally, latency, warming_up, world):
    """Return loss and top-1 of the epoch so far, of weights and architecture, and the last latency of the mixture."""
    weights = w_tally.read(world)
    numbers = {'w_loss': weights['loss'], 'w_top1': weights['top1']}
    if not warming_up:
        architecture = a_tally.read(world)
        numbers |= {'a_loss': architecture['loss'], 'a_top1': architecture['top1']}
        numbers['mixture_latency'] = latency.item()
    return numbers


@torch.no_grad()
def validate(state, loader, seed, world, stops):
    """Return the accuracy on Gumbel paths, one per batch; batch norms use the statistics of the batch.

    Args:
        stops: called before each batch; whether to stop.
    """
    net, tally = state.net, Tally(world.device)
    loader.sampler.set_epoch(0)
    log_alphas = HostCopy(net.log_alphas())
    for step, (images, labels) in enumerate(to_device(loader, world.device, torch.channels_last)):
        if stops():
            return PassResult({}, stopped=True)
        draws = generator_for(seed, 'validation', state.epoch, step)
        path = net.sample('gumbel', draws, log_alphas=log_alphas)
        with state.w_precision.autocast():
            logits = net(images, path).float()
        tally.add(F.cross_entropy(logits, labels), logits, labels)
    return PassResult(tally.read(world))


def log_probabilities(net):
    """Log the probabilities of each block's operators, and of each stage's exits."""
    for op in net.mixed_ops():
        probabilities = op.log_alphas.detach().softmax(0).tolist()
        log.debug('%s ops %s', op.block.label, ' '.join(f'{p:.4f}' for p in probabilities))
    for name, weights in zip(net.space.stage_names, net.depth_weights(), strict=True):
        log.debug('%s exits %s', name, ' '.join(f'{p:.4f}' for p in weights.tolist()))


def scale_to_target(state, target, scales):
    """Elasticity-scaling of the current architecture: the most probable one that can meet the target.

    Args:
        scales: False for fixed widths (`--freedoms` without width), of the most probable architecture of all.

    Returns:
        The architecture, the new widths, and the latencies for the metrics.
    """
    first, widths, more = parse_architecture(state.full, SPACE), mask_widths(state.masks), {}
    arch, scaled = first, widths
    if scales:
        arch = target.most_probable(state.full)
        scaled = target.scaled(arch, widths)
    if arch != first:
        more['given_up'] = log_probability(first, state.full, SPACE) - log_probability(arch, state.full, SPACE)
        least, most = target.reach(first)
        log.info('The most probable architecture reaches %.4f to %.4f: not the target', least, most)
        log.info('using the most probable one that can meet it (log-probability -%.4f)', more['given_up'])
    before, after = target.latency(arch, widths), target.latency(arch, scaled)
    off = after / target.value - 1
    log.info('Before, the current lat: %.4f, the target lat: %.4f', before, target.value)
    log.info('After, the current lat: %.4f, the target lat: %.4f', after, target.value)
    if scales and abs(off) > OFF_TARGET:
        log.warning('the target is missed by %.1f %%: widths have steps of %d', 100 * off, target.divisor)
    least, most = target.reach(arch)
    latency = {'target': target.value, 'before': before, 'after': after, 'least': least, 'most': most}
    return arch, scaled, latency | more


def read_target(args, world, num_classes):
    """Return the target in the latency table, after a check that networks of the space can meet it."""
    path = project_file(args.lookup_path, DEFAULT_TABLE)
    table = load_table(path, args.img_size, SPACE)
    reach = '%s: networks reach from %.4f (at full depth from %.4f) to %.4f %s'
    log.info(reach, args.lookup_path, *table.reach(SPACE), table.unit)
    compare_table(table, args.lookup_path, device_name(world.device), num_classes)
    divisor = args.width_divisor or table.width_divisor
    check_divisor(divisor, SPACE)
    if divisor > 1:
        log.info('All widths are multiples of %d', divisor)
    target = Target(table, SPACE, table.target(args.target_lat, SPACE), divisor)
    if 'width' in args.freedoms:
        target.check()
    return target


def load_data(args, world):
    """Return the images with their loaders, the snapshot, and the flags with an input size and a batch that fit."""
    snapshot = find_snapshot(args.snapshot, args.save, args.note, SEARCH, world)
    size = table_size(project_file(args.lookup_path, DEFAULT_TABLE)) if args.img_size is None else None
    img_size = settle('--img_size', args.img_size, [(size, args.lookup_path)], USUAL_SIZE)
    source = Source(args.img_root, args.img_root, args.train_list, args.val_list, args.num_classes)
    # the architecture has a batch every second step
    val_workers = -(-args.workers // 2) if args.val_workers is None else args.val_workers
    loading = Loading(img_size, args.batch_size, args.workers, args.seed, val_workers, args.device_aug)
    images = load_search_data(source, loading, world, snapshot.folder)
    return images, snapshot, with_flags(args, img_size=img_size, batch_size=images.batch_size)


def make_meta(images, target, args):
    """Return what the found network is for, for the next steps."""
    names = tuple(images.names) if images.names else None
    path = str(Path(project_file(args.lookup_path, DEFAULT_TABLE)).absolute())
    given = {'target': target.value, 'target_given': args.target_lat, 'unit': target.table.unit, 'table': path}
    return Meta(img_size=args.img_size, mean=images.mean, std=images.std, class_names=names, **given)


def suggest_parsing(model, unit, args):
    """Log the command that makes a config of a searched model."""
    flags = {'model_path': model, 'target_lat': args.target_lat, 'print_lat': unit == 'ms'}
    flags |= {'save_path': model.with_name('model.config'), **changed(args, 'width_divisor', device='auto')}
    suggest('make the config of the found network', 'parsing_model.py', flags)


def make_recipe(args):
    """Return the schedule and the settings of the optimizers that the flags give."""
    return Recipe(
        epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        T=args.T,
        T_decay=args.T_decay,
        w_lr=args.w_lr,
        w_mom=args.w_mom,
        w_wd=args.w_wd,
        a_lr=args.a_lr,
        a_betas=(args.a_beta1, args.a_beta2),
        a_wd=args.a_wd,
    )


def start_search(args, snapshot, images, target, world):
    """Return the state of the search, fresh or the snapshot's, the flags with their schedule, and those to record."""
    torch.manual_seed(derive_seed(args.seed, 'weights'))
    prepare(world.device, args.deterministic, tf32=args.tf32, shapes_change=True)
    note_large_tensors(largest_mixture(args.img_size, SPACE), args.batch_size // world.size, world.device)
    given = {name: getattr(args, name) for name in ('T_decay', 'a_lr', 'a_wd')}
    saved = snapshot.checkpoint.get('flags', {}) if snapshot.checkpoint else {}
    epochs, steps = args.epochs - args.warmup_epochs, len(images.loaders[0])
    schedule, kept = settle_schedule(given, saved, epochs, epochs * -(-steps // 2))
    flags = vars(args) | images.flags | kept
    flags |= {'target_lat': target.value, 'img_root': str(Path(args.img_root).absolute())}
    compare_snapshot(snapshot, flags, images.digest)
    args = with_flags(args, **schedule)
    mode = ExecutionMode(fused=world.device.type == 'cuda', recompute=args.checkpoint_ops)
    state = new_state(images.num_classes, SPACE, world.device, mode, make_recipe(args), DTYPES.get(args.amp))
    if snapshot.checkpoint:
        state.load(snapshot.checkpoint, snapshot.path, world)
    if world.device.type == 'cuda' and epochs:
        shape = images.loaders[1].batch_size, 3, args.img_size, args.img_size
        latency_loss = target.loss(SPACE.max_widths(), args.lambda_lat, world.device)
        rehearse_architecture_step(state.net, shape, latency_loss, state.a_precision, state.recipe)
    return state, args, flags


def open_search(args, state, snapshot, images, target, flags, world):
    """Open the run folder; return the first line of metrics.jsonl, the logger and the checkpointer.

    Args:
        flags: to record; None for values of the schedule that follow from the length of the search.
    """
    latency = {'table': args.lookup_path, 'target': target.value, 'given': args.target_lat}
    latency |= describe_table(target.table, SPACE)
    steps = len(images.loaders[0])
    about = {'space': describe_space(args.img_size, SPACE), 'latency': latency, 'steps_an_epoch': steps}
    followed = flags | {name: getattr(args, name) for name in ('T_decay', 'a_lr', 'a_wd')}
    header = run_header('search', followed, world.device, **about)
    table = fingerprint(project_file(args.lookup_path, DEFAULT_TABLE))
    header['environment'] |= {'processes': world.size, 'table': table}
    logger = open_run(world, SEARCH.folders, header, snapshot, images.run_files)
    logger.start_progress(args.epochs * steps, state.epoch * steps + state.step)
    about = {'environment': header['environment'], CLASS_NAMES: images.names, IMAGES: images.digest}
    about |= {META: make_meta(images, target, args).to_dict()}
    return header, logger, Checkpointer(logger, world, args.save_freq, flags, about)


def main(args):
    """The search: per epoch train, validate, scale the widths to the target, save."""
    world = join_world(args.device, args.local_rank)
    check_format(args.amp, '--amp', world.device)
    if args.cuda_graph and world.device.type != 'cuda':
        raise BadInput('--cuda_graph: only a GPU runs graphs, and this run is on the CPU; leave it out')
    images, snapshot, args = load_data(args, world)
    loaders, num_classes = images.loaders, images.num_classes
    target = read_target(args, world, num_classes)
    state, args, flags = start_search(args, snapshot, images, target, world)
    snapshot = snapshot.without_checkpoint()  # its weights are copied
    header, logger, checkpointer = open_search(args, state, snapshot, images, target, flags, world)
    recipe, graphs = state.recipe, Graphs(args.cuda_graph, log.info)

    with checkpointer, ended_with(*loaders):
        while state.epoch < args.epochs:
            epoch, warming_up = state.epoch, state.epoch < args.warmup_epochs
            if state.step == 0:
                if epoch and epoch == args.largest_epochs:
                    align_operators(state.full, SPACE)
                state.begin_epoch()
            numbers = {'lr': recipe.weights_lr(epoch), 'temperature': recipe.temperature(epoch)}
            log.info('epoch %d w_lr %.5f T %.4f', epoch, *numbers.values())
            latency_loss = target.loss(state.net.widths(), args.lambda_lat, world.device)
            learn = graphs.wrap(partial(learn_with_noise, state, latency_loss), state.net.arch_parameters())
            trained = train_epoch(state, loaders, learn, world, args, checkpointer, logger)
            if trained.stopped:
                break
            state.scatter_to_full()
            world.broadcast(state.full.values())
            if epoch == args.warmup_epochs - 1 or epoch >= args.epochs - VALIDATED_EPOCHS:
                val = validate(state, loaders[1], args.seed, world, checkpointer.stop_requested)
                if val.stopped:
                    checkpointer.save(state)
                    break
                numbers['val'] = val.numbers
                log.info('epoch %d Gumbel paths: %s', epoch, accuracies(val.numbers))
                if epoch == args.warmup_epochs - 1:
                    warn_not_learned(val.numbers['top1'], num_classes)
            if not warming_up:
                log_probabilities(state.net)
                scale = partial(scale_to_target, state, target, 'width' in args.freedoms)
                before, (state.arch, widths, numbers['latency']) = state.arch, world.from_rank0(scale)
                state.masks = update_masks(state.masks, widths, state.full)
            found = describe_architecture(state.full, state.masks, target.table, SPACE, num_classes, state.arch)
            numbers |= trained.numbers
            log.info('epoch %d: %s', epoch, epoch_line(found, numbers, header['latency'], num_classes, warming_up))
            logger.record('epoch', epoch, **numbers, **found)
            if epoch == args.epochs - 1 and not warming_up:
                warn_not_decided(found['ops'], before, state.arch)
            state.end_epoch()
            checkpointer.save_as(state, searched_model(state.epoch))
            remove_old_models(logger.folder, state.epoch, args.keep_checkpoints)

    if not checkpointer.signal:
        checkpointer.remove_checkpoints()
        logger.record('end', args.epochs - 1)
        if logger.folder:
            log.info('searched model: %s', logger.folder / searched_model(args.epochs))
    leave_world(world)
    if args.report and logger.ended:
        draw_at_end(logger.folder)
    if logger.ended:
        suggest_parsing(logger.folder / searched_model(args.epochs), target.table.unit, args)
    code = checkpointer.exit_code()
    logger.close()
    return code


if __name__ == '__main__':
    run_script(main, get_args())
