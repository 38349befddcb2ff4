#!/usr/bin/env bash
# CIFAR-10, VGG-11, 1 epoch: BatchNorm and deconvolution in several modes, three seeds each.
#
# Usage: bash scripts/recipes/one_epoch_vgg11.sh [DIR [OUT]]
#
# DIR holds CIFAR-10 as image files, DIR/train/CLASS/* and DIR/test/CLASS/*. Without DIR, or with an
# empty one, CIFAR-10 is downloaded to ./data. The runs go to OUT (runs/one-epoch), two at a time with
# one CPU thread each. A run that has finished is not repeated.
#
# Expected test accuracy: mode 5 74.6 %, mode 5 as published 74.8 %, BatchNorm 67.1 % at --lr 0.01 and 13 %
# at --lr 0.1.
# Time: about 2 hours on two CPU cores (10 minutes a run).
set -euo pipefail
data=${1:-}
for part in train test; do
    [ -n "$data" ] && [ ! -d "$data/$part" ] || continue
    echo "one_epoch_vgg11.sh: error: there is no folder $data/$part" >&2
    echo "usage: one_epoch_vgg11.sh [DIR [OUT]] with DIR/train/CLASS/* and DIR/test/CLASS/*" >&2
    exit 2
done
images=(--dataset cifar10)
[ -z "$data" ] || images=(--dataset folder --data "$(cd "$data" && pwd)")
cd "$(dirname "$0")/../.."
export out=${2:-runs/one-epoch}

train() { # train NAME FLAG...: train one run, unless it has finished
    local run=$out/$1
    shift
    [ ! -e "$run/summary.json" ] || return 0
    python main.py --arch vgg11 --batch-size 128 --epochs 1 --wd 5e-4 --threads 1 \
        --run-dir "$run" "$@" || exit $(($? == 2 ? 255 : $?)) # 255 ends xargs
}
export -f train

xargs -P 2 -I{} bash -c 'train {} "$@"' train "${images[@]}" <<'RUNS'
mode4-seed0 --deconv True --mode 4 --root newton --lr .1 --seed 0
mode5-seed0 --deconv True --mode 5 --lr .1 --seed 0
mode5-seed1 --deconv True --mode 5 --lr .1 --seed 1
mode5-seed2 --deconv True --mode 5 --lr .1 --seed 2
bn-seed0 --deconv False --lr .1 --seed 0
bn-seed1 --deconv False --lr .1 --seed 1
bn-seed2 --deconv False --lr .1 --seed 2
mode5-published-seed0 --deconv True --root newton --rows-per-feature 0 --lr .1 --seed 0
mode5-published-seed1 --deconv True --root newton --rows-per-feature 0 --lr .1 --seed 1
mode5-published-seed2 --deconv True --root newton --rows-per-feature 0 --lr .1 --seed 2
mode5-all-seed0 --deconv True --rows-per-feature 0 --lr .1 --seed 0
mode5-all-seed1 --deconv True --rows-per-feature 0 --lr .1 --seed 1
mode5-all-seed2 --deconv True --rows-per-feature 0 --lr .1 --seed 2
mode3-seed0 --deconv True --mode 3 --root newton --lr .1 --seed 0
mode5-own-seed0 --deconv True --share-blocks False --root newton --rows-per-feature 0 --lr .1 --seed 0
mode5-own-seed1 --deconv True --share-blocks False --root newton --rows-per-feature 0 --lr .1 --seed 1
mode5-own-seed2 --deconv True --share-blocks False --root newton --rows-per-feature 0 --lr .1 --seed 2
bn-lr.01-seed0 --deconv False --lr .01 --seed 0
bn-lr.01-seed1 --deconv False --lr .01 --seed 1
bn-lr.01-seed2 --deconv False --lr .01 --seed 2
RUNS

python scripts/compare.py "$out"/*-seed* --out "$out/comparison"
