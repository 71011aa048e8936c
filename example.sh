#!/usr/bin/env bash
# From images to a tested network. Unedited, this does the whole job on the demo images, on a CPU or a GPU, in minutes.
# For ImageNet, set the paths in the block below: then it runs the paper's recipe, one command per stage.
set -euo pipefail
cd "$(dirname "$0")"

# ---------------------------------------------------------------- paths to edit
imagenet=''                                    # folder with train/ and val/ (class folders); empty: the demo
table=latency_pkl/latency_gpu.pkl              # latency table; one of your own device comes from make_lat_lut.py
target=15.0                                    # ms in that table
save=checkpoints                               # run folders go here
gpus=''                                        # of the mixed-precision training; empty: as many as share batches evenly
batch=512                                      # images of a training step, over all these GPUs
# -----------------------------------------------------------------------------

source tools/environment.sh
use_environment requirements.txt torch torchvision numpy PIL simplejpeg scipy tqdm matplotlib

newest() { ls -td $1* | head -n 1; } # newest PATTERN: the last changed file or folder of that name

if [ -z "$imagenet" ]; then
    demo=demo
    images=$demo/images
    size=(--num_classes 10 --img_size 32)
    export PYTHONUNBUFFERED=1 # lines are shown as they come, also through a pipe
    [ ! -e $demo ] || echo "== $demo/ of an earlier demo is replaced"
    rm -rf $demo

    stage() { echo "== $SECONDS s: $1"; }

    echo '== The demo takes about 9 minutes on 2 cores; a line such as this begins each stage and has the time'
    stage '1/5 images: 7,200 of Fashion-MNIST, in ten classes (seconds)'
    "$python" dataset/demo/unpack.py --to $images

    stage '2/5 latency table of this machine, at 32 pixels (30 s)'
    "$python" latency_pkl/make_lat_lut.py "${size[@]}" --budget 30 --save_path $demo/latency.pkl

    stage '3/5 search (4 minutes): 3 epochs train the largest operators, 2 train all, 4 choose'
    awk 'NR % 4' $images/search_train.txt >$images/search_short.txt # three quarters of each class
    "$python" train_search.py --img_root $images/train --train_list $images/search_short.txt \
        --val_list $images/search_val.txt "${size[@]}" --batch_size 64 --workers 2 --epochs 9 --warmup_epochs 5 \
        --largest_epochs 3 --a_lr 0.1 --lookup_path $demo/latency.pkl --target_lat 30% --lambda_lat 0.1 \
        --print_freq 25 --save $demo --note demo

    stage '4/5 three networks from one search, each fitted to its target by the clock (2 minutes)'
    "$python" parsing_model.py --model_path "$(newest "$demo/search-*/searched_model_")" "${size[@]}" \
        --lookup_path $demo/latency.pkl --target_lat 20% 30% 50% --fit_measured --rounds 12 --print_lat \
        --save_path $demo/found.config

    stage '5/5 training and test of the middle one (90 s)'
    "$python" train_eval.py --train_root $images/train --train_list $images/train.txt --val_root $images/test \
        --val_list $images/test.txt --config_path $demo/found_30pc.config "${size[@]}" --batch_size 64 --epochs 4 \
        --lr 0.05 --drop_connect_rate 0 --dropout_rate 0.1 --workers 2 --save $demo --note demo
    trained=$(newest "$demo/eval-*-demo")
    "$python" test.py --val_root $images/test --val_list $images/test.txt --config_path $demo/found_30pc.config \
        "${size[@]}" --weights "$trained/model_best.pth.tar" --workers 2

    stage 'the end'
    for run in "$(newest "$demo/search-")" "$trained"; do
        echo "Report: $run/report.html with its pictures:" "$run"/plots/*.png
    done
    echo "The found networks: $demo/found_20pc.config, found_30pc.config, found_50pc.config"
    echo
    "$python" -m models.summary $demo/found_20pc.config $demo/found_30pc.config $demo/found_50pc.config --runs "$trained"
    exit
fi

note=example-$(basename "$table" .pkl)-$target # with the same table and target, runs resume
gpus=${gpus:-$("$python" -c 'import sys, torch
print(max(n for n in range(1, max(1, torch.cuda.device_count()) + 1) if int(sys.argv[1]) % n == 0))' "$batch")}
if ((batch % gpus)); then
    echo "example.sh: error: gpus=$gpus cannot share a batch=$batch evenly; choose a divisor of it" >&2
    exit 2
fi

# 1. Search on 100 classes. The lists of ./dataset/ImageNet-100-* are made by the first run.
"$python" train_search.py --img_root "$imagenet/train" \
    --train_list ./dataset/ImageNet-100-effb0_train_cls_ratio0.8.txt \
    --val_list ./dataset/ImageNet-100-effb0_val_cls_ratio0.8.txt \
    --lookup_path "$table" --target_lat "$target" --lambda_lat 0.1 --num_classes 100 --img_size 224 --batch_size 32 \
    --epochs 90 --warmup_epochs 10 --w_lr 0.025 --w_mom 0.9 --w_wd 1e-5 --a_lr 0.01 --a_wd 5e-4 --a_beta1 0.5 \
    --a_beta2 0.999 --grad_clip 5 --T 5.0 --T_decay 0.96 --seed 2 --workers 4 --print_freq 100 --device auto \
    --save "$save" --note "$note" --snapshot auto

# 2. Its architecture as a config file, with size, MACs and latency.
"$python" parsing_model.py --model_path "$(newest "$save/search-*-$note/searched_model_")" --save_path model.config \
    --lookup_path "$table" --print_lat --num_classes 1000 --img_size 224 --device auto

# 3. Training from scratch on 1,000 classes, in mixed precision; full precision on one machine: train_eval.py.
"$python" dataset/make_lists.py --img_root "$imagenet/train" --list dataset/ImageNet-1000_train.txt
"$python" dataset/make_lists.py --img_root "$imagenet/val" --list dataset/ImageNet-1000_val.txt \
    --like dataset/ImageNet-1000_train.txt
"$python" -m torch.distributed.run --nproc_per_node="$gpus" train_eval_amp.py --train_root "$imagenet/train" \
    --train_list dataset/ImageNet-1000_train.txt --val_root "$imagenet/val" --val_list dataset/ImageNet-1000_val.txt \
    --config_path model.config --opt_level O1 --sync_bn --channels_last --num_classes 1000 --img_size 224 \
    --batch_size "$batch" --epochs 250 --lr 0.2 --momentum 0.9 --weight_decay 1e-5 --grad_clip 5 --label_smooth 0.1 \
    --dropout_rate 0.2 --drop_connect_rate 0.2 --seed 2 --workers 16 --print_freq 100 --save "$save" --note "$note" \
    --snapshot auto

# 4. Its accuracy.
"$python" test.py --val_root "$imagenet/val" --val_list dataset/ImageNet-1000_val.txt --config_path model.config \
    --weights "$(newest "$save/eval-*-$note/model_best.pth.tar")" --num_classes 1000 --img_size 224 --batch_size 256 \
    --workers 16 --device auto
