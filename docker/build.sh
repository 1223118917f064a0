#!/usr/bin/env bash
# Builds both images: `build.sh [cpu|cuda]`, tagged epmesh-node and epmesh-router (TAG=latest). BASE_IMAGE=... names
# another base; the default has the Python that the wheels are made for. Wheels are made anew unless SKIP_WHEELS=1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
accelerator=${1:-cpu}
tag=${TAG:-latest}
[ "${SKIP_WHEELS:-0}" = 1 ] || docker/wheels.sh "$accelerator"
base=${BASE_IMAGE:-python:$("${PYTHON:-.venv/bin/python}" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-slim}
for target in router node; do
  echo "build: epmesh-$target:$tag"
  docker build --quiet --file docker/Dockerfile --target "$target" --tag "epmesh-$target:$tag" \
    --build-arg "ACCELERATOR=$accelerator" --build-arg "BASE_IMAGE=$base" . >/dev/null
done
docker images --format '  {{.Repository}}:{{.Tag}} {{.Size}}' | grep -E "^  epmesh-(node|router):$tag " || true
