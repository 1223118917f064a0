#!/usr/bin/env bash
# Makes the wheels that the images are built from, with everything they need, under docker/wheels: `wheels.sh [cpu|cuda]`.
# The network is used here, and nowhere in the build. pip's own settings say where packages come from: point it at a CPU
# build of torch for `cpu`, or at the CUDA build that fits your driver for `cuda`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
accelerator=${1:-cpu}
python=${PYTHON:-.venv/bin/python}

"$python" -c '' 2>/dev/null || { echo "wheels: no '$python' here; run \`make setup\` first, or say PYTHON=..." >&2; exit 1; }

make_wheels() { # directory, extra
  echo "wheels: docker/wheels/$1, epmesh[$2]"
  rm -rf "docker/wheels/$1.part" "docker/wheels/$1"
  "$python" -m pip wheel --quiet --quiet --disable-pip-version-check -c constraints.txt -w "docker/wheels/$1.part" ".[$2]"
  mv "docker/wheels/$1.part" "docker/wheels/$1"
}

case $accelerator in cpu | cuda) ;; *) echo "wheels: say cpu or cuda, not '$accelerator'" >&2; exit 2 ;; esac
make_wheels router examples
make_wheels "node-$accelerator" server
