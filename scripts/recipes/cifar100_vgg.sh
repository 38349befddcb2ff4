#!/usr/bin/env bash
# CIFAR-100, VGG-11, VGG-13 and VGG-19, 100 epochs: BatchNorm, then deconvolution, for each network.
#
# Expected test accuracy: not published for these networks. The nearest published result is VGG-16 with
# the settings of the paper (--preset paper): 72.75 % with BatchNorm, 75.32 % with deconvolution (Table 1).
# Time: VGG-11 takes about 17 hours a run on one CPU core (610 s an epoch).
#
# Further flags are passed on: bash scripts/recipes/cifar100_vgg.sh --data DIR --epochs 1
set -euo pipefail
cd "$(dirname "$0")/../.."

python main.py --lr .1 --optimizer SGD --arch vgg11 --epochs 100 --dataset cifar100 --batch-size 128 --msg True --deconv False --num-groups-final 0 "$@"
python main.py --lr .1 --optimizer SGD --arch vgg11 --epochs 100 --dataset cifar100 --batch-size 128 --msg True --deconv True --num-groups-final 512 "$@"
python main.py --lr .1 --optimizer SGD --arch vgg13 --epochs 100 --dataset cifar100 --batch-size 128 --msg True --deconv False --num-groups-final 0 "$@"
python main.py --lr .1 --optimizer SGD --arch vgg13 --epochs 100 --dataset cifar100 --batch-size 128 --msg True --deconv True --num-groups-final 512 "$@"
python main.py --lr .1 --optimizer SGD --arch vgg19 --epochs 100 --dataset cifar100 --batch-size 128 --msg True --deconv False --num-groups-final 0 "$@"
python main.py --lr .1 --optimizer SGD --arch vgg19 --epochs 100 --dataset cifar100 --batch-size 128 --msg True --deconv True --num-groups-final 512 "$@"
