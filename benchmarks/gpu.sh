#!/usr/bin/env bash
# What a GPU has to show, in one command of at most 8 minutes: the tests marked `gpu`, then benchmarks/gpu.py.
#
#   benchmarks/gpu.sh [--budget SECONDS] [--tests SECONDS] [--out FOLDER] [--device cuda] [--tiny] [PART ...]
#
# --budget (470) is for all of it, --tests (120) the most that the tests may take; --tests 0 leaves them out. The log of the
# tests, the rows as gpu.json, profiles and traces are written to --out ($OUT, else output/gpu). Wheels in .whl, of packages
# that this machine lacks, are installed into a folder of their own. --device cpu --tiny tries everything out without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
budget=470 tests=120 out=${OUT:-output/gpu} device=cuda
words=()
while [ $# -gt 0 ]; do
    case "$1" in
        --budget) budget=$2; shift 2 ;;
        --tests) tests=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        --device) device=$2; shift 2 ;;
        *) words+=("$1"); shift ;;
    esac
done
mkdir -p "$out"
status=0
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

if compgen -G ".whl/*.whl" >/dev/null; then
    site=$(mktemp -d)
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" .whl/*.whl || exit 1
    export PYTHONPATH=$site:$PYTHONPATH
fi

if [ "$tests" -gt 0 ]; then
    # A test that hangs should not take the others' time.
    limit=$(python3 -c 'import importlib.util as u; print("--timeout=60" if u.find_spec("pytest_timeout") else "")')
    # shellcheck disable=SC2086
    DETKIT_TEST_DEVICE=$device timeout "$tests" python3 -m pytest tests -m gpu -n 6 -q --no-header -p no:cacheprovider \
        -o addopts="--import-mode=importlib --strict-markers" --durations=10 --tb=short $limit >"$out/tests.log" 2>&1 || status=1
    grep -E "^(E  |FAILED|ERROR|tests/.*Error)|passed|failed" "$out/tests.log" | cut -c1-300 | tail -n 60
    echo "== tests: status $status, $SECONDS s"
fi

python3 benchmarks/gpu.py --device "$device" --budget $((budget - SECONDS)) --json "$out/gpu.json" "${words[@]}" || status=1
echo "== all: status $status, $SECONDS s"
exit $status
