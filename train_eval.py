"""Train a found network from scratch in float32, on all visible GPUs or the CPU. Writes eval-<time>-<note>/.

    python train_eval.py --config_path model.config \\
        --train_root /data/imagenet/train --train_list train.txt \\
        --val_root /data/imagenet/val --val_list val.txt

A training that was stopped or killed goes on from its newest checkpoint:

    python train_eval.py ... --snapshot auto

One process per GPU, faster than one for all:

    torchrun --nproc_per_node=4 train_eval.py ...

For mixed precision see train_eval_amp.py.
"""

import logging

import tools.needed  # noqa: F401  # isort: skip
from dataset.data import Source, load_training_data
from dataset.loaders import Loading
from latency_pkl.runtimes import log_network_latency
from models.parsing import load_architecture
from models.search_space import SPACE
from models.training_run import open_training, suggest_test
from tools.chain import settle, with_flags
from tools.checkpoint import find_snapshot
from tools.distributed import join_world, leave_world
from tools.options import USUAL_SIZE, Parser, add_training_args, run_script
from tools.plots import draw_at_end
from tools.precision import Precision
from tools.training import TRAINING, fit, lr_note

log = logging.getLogger('tf-nas')


def get_args(argv=None):
    """Parse `argv`, or the command line."""
    parser = Parser(__doc__)
    add_training_args(parser)
    return parser.parse_args(argv)


def load_data(args, world, img_size, source, kept):
    """Return the images with their loaders, and the flags with the input size of the config and a batch that fits.

    Args:
        img_size: that of the config in `source`, None if it has none.
        kept: run folder that the training goes on in.
    """
    img_size = settle('--img_size', args.img_size, [(img_size, source)], USUAL_SIZE)
    val_root = args.val_root or args.train_root
    where = Source(args.train_root, val_root, args.train_list, args.val_list, args.num_classes)
    loading = Loading(
        img_size, args.batch_size, args.workers, args.seed, args.workers, args.device_aug, args.auto_augment
    )
    images = load_training_data(where, loading, world, kept)
    args = with_flags(args, img_size=img_size, batch_size=images.batch_size, val_root=val_root)
    if note := lr_note(args):
        log.info(note)
    return images, args


def main(args):
    """Join the other processes if there are any, load the images, build the network, train."""
    world = join_world(args.device, args.local_rank)
    snapshot = find_snapshot(args.snapshot, args.save, args.note, TRAINING, world)
    source = args.model_path or args.config_path
    config = load_architecture(source, SPACE)
    images, args = load_data(args, world, config.meta.img_size, source, snapshot.folder)
    precision = Precision(world.device)
    run = open_training(args, config, source, images, len(images.loaders[0]), precision, snapshot, world, SPACE)
    code = fit(run.state, images.loaders, images.num_classes, world, args, run.checkpointer, run.logger)
    leave_world(world)
    if args.report and run.logger.ended:
        log_network_latency(run.logger, args.epochs, run.config, world.device, args.img_size, SPACE)
        draw_at_end(run.logger.folder)
    if run.logger.ended:
        suggest_test(run, images, args)
    run.logger.close()
    return code


if __name__ == '__main__':
    run_script(main, get_args())
