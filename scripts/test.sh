#!/usr/bin/env bash
# Runs the tests, in an environment that it makes if need be. Arguments go to pytest:
#
#     bash scripts/test.sh                    everything but the tests marked slow; gpu where there is one
#     bash scripts/test.sh tests/test_main.py -x
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

make_environment requirements-dev.txt
python -m pytest "$@"
