#!/usr/bin/env bash
# CIFAR-10, VGG-11, 20 epochs: BatchNorm, then deconvolution.
#
# Expected test accuracy: not published for VGG-11. The nearest published result is VGG-16 with the
# settings of the paper (--preset paper): 90.07 % with BatchNorm, 93.25 % with deconvolution (Table 1).
# Time: about 3.5 hours a run on one CPU core (610 s an epoch).
#
# Further flags are passed on: bash scripts/recipes/cifar10_vgg11.sh --data DIR --epochs 1
set -euo pipefail
cd "$(dirname "$0")/../.."

python main.py --lr .1 --optimizer SGD --arch vgg11 --epochs 20 --dataset cifar10 --batch-size 128 --msg True --deconv False --num-groups-final 0 --wd .001 "$@"
python main.py --lr .1 --optimizer SGD --arch vgg11 --epochs 20 --dataset cifar10 --batch-size 128 --msg True --deconv True --num-groups-final 512 --wd .001 "$@"
