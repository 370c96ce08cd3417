#!/bin/sh
# Try the GPU path, in some twelve minutes: the tests that need a GPU, benchmark/speed/gpu.py, then a run of HopperParam for
# $1 seconds (240), which is stopped and can be resumed. Writes benchmark/results/speed/gpu.md.
set -e
cd "$(dirname "$0")/../.."
python -m pytest -q -rs tests/runs/test_speed.py tests/algorithms/test_smac.py tests/shared/test_cores.py -k "cuda or gpu"
python benchmark/speed/gpu.py
timeout --preserve-status -s TERM "${1:-240}" python smac_offline_online.py --env-id HopperParam --device cuda --run-dir runs/gpu
