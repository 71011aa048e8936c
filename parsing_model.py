"""Turn a searched model into a network config, and print its size, multiply-adds and latency.

    python parsing_model.py --model_path checkpoints/search-<time>-try/searched_model_89.pth.tar \
        --save_path model.config --lookup_path latency_pkl/latency_gpu.pkl --print_lat
    python parsing_model.py --config_path models/zoo/tf_nas_a.config --num_classes 10 --save_path model.config
"""

import torch

from models.config import dump_config
from models.latency import load_table
from models.model_eval import NetworkEval
from models.parsing import load_architecture
from tools.checkpoint import write_text
from tools.distributed import pick_device
from tools.options import Parser, add_arch_args, add_device_arg, count, run_script
from tools.profiling import count_mult_adds, count_params, measure_latency


def get_args():
    """Parse the command line."""
    parser = Parser(__doc__)
    add_arch_args(parser)
    parser.add_argument('--save_path', default='./model.config', help='config file to write')
    parser.add_argument('--lookup_path', default='./latency_pkl/latency_gpu.pkl', help='latency table for Lat_LUT')
    parser.add_argument('--print_lat', action='store_true', help='print latencies: of the table, and measured')
    parser.add_argument('--num_classes', type=count(2), default=1000)
    parser.add_argument('--img_size', type=count(32), default=224, help='input size in pixels')
    parser.add_argument('--threads', type=count(), default=1, help='CPU threads of Lat_CPU')
    add_device_arg(parser)
    return parser.parse_args()


def main(args):
    """Read, write, print."""
    device = pick_device(args.device)
    config = load_architecture(args.model_path or args.config_path, args.num_classes).with_classes(args.num_classes)
    table = load_table(args.lookup_path, args.img_size) if args.print_lat else None
    predicted = table.of_config(config) if table else None
    write_text(args.save_path, dump_config(config))
    print(f'Config: {args.save_path}')
    net = NetworkEval(config)
    print(f'Params: {count_params(net):.6f} M')
    print(f'FLOPs: {count_mult_adds(net, args.img_size):.2f} M')
    if not table:
        return
    print(f'Lat_LUT: {predicted:.4f} {table.unit}')
    if device.type == 'cuda':
        torch.backends.cudnn.benchmark = True
        for batch_size in (32, 1):
            print(f'Lat_GPU bs={batch_size}: {measure_latency(net, batch_size, args.img_size, device):.4f} ms')
    torch.set_num_threads(args.threads)
    print(f'Lat_CPU bs=1: {measure_latency(net, 1, args.img_size, torch.device("cpu")):.4f} ms')


if __name__ == '__main__':
    run_script(main, get_args())
