#!/usr/bin/env bash
# CIFAR-100, VGG-11, 100 epochs: deconvolution between channels only (--mode 3).
#
# Expected test accuracy: not published.
# Time: about 17 hours on one CPU core (610 s an epoch).
#
# Further flags are passed on: bash scripts/recipes/cifar100_vgg11_mode3.sh --data DIR --epochs 1
set -euo pipefail
cd "$(dirname "$0")/../.."

python main.py --lr .1 --optimizer SGD --arch vgg11 --epochs 100 --dataset cifar100 --batch-size 128 --msg True --deconv True --mode 3 --num-groups-final 512 "$@"
