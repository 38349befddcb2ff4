#!/usr/bin/env bash
# Runs the tests, in an environment that it makes if need be. Arguments go to pytest:
#
#     bash scripts/test.sh                    everything but the tests marked slow; gpu where there is one
#     bash scripts/test.sh tests/integration/test_main.py -x
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

make_environment requirements-dev.txt
# A process for each core and one thread in it: the tests are small, and threads would wait.
export OMP_NUM_THREADS=1
python -m pytest --numprocesses auto --maxprocesses 4 "$@"
