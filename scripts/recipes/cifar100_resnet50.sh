#!/usr/bin/env bash
# CIFAR-100, ResNet-50, 100 epochs: BatchNorm, then deconvolution.
#
# Expected test accuracy: not published for ResNet-50.
# Time: not measured; plan many hours on a GPU and days on a CPU.
#
# Further flags are passed on: bash scripts/recipes/cifar100_resnet50.sh --data DIR --epochs 1
set -euo pipefail
cd "$(dirname "$0")/../.."

python main.py --lr .1 --optimizer SGD --arch resnet50 --epochs 100 --dataset cifar100 --batch-size 128 --msg True --deconv False --num-groups-final 0 "$@"
python main.py --lr .1 --optimizer SGD --arch resnet50 --epochs 100 --dataset cifar100 --batch-size 128 --msg True --deconv True --num-groups-final 512 "$@"
