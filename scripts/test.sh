#!/usr/bin/env bash
# Run the tests in .venv, which is made if need be, and report coverage. Arguments go to pytest:
#
#     bash scripts/test.sh                    all but the tests marked slow; gpu only with a GPU
#     bash scripts/test.sh tests/integration/test_main.py -x
#     bash scripts/test.sh -m slow --no-cov
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

make_environment requirements-dev.txt
# One process per core and one thread in each: the tests are small, and more threads would wait.
export OMP_NUM_THREADS=1
python -m pytest --numprocesses auto --maxprocesses 4 --cov "$@"
