#!/usr/bin/env bash
# generate.sh OUT [DESCRIPTORS]: writes the Python stubs of proto/epmesh/v1 into OUT/epmesh/v1 (for the checked-in ones
# OUT is `client`), and with a second argument the descriptor set with source info into that file.
#
# The oldest supported tools generate, because generated code runs on its own version of the runtime and on later
# ones, never on earlier ones. They have an environment to themselves, .venv-proto, which is made here when missing.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ $# -ge 1 ] || { echo "usage: $0 OUT [DESCRIPTORS]" >&2; exit 2; }
out=$1
descriptors=${2:-}
tools=(grpcio-tools==1.80.0 grpcio==1.80.0 protobuf==6.31.1 mypy-protobuf==3.7.0)
venv=$top/.venv-proto
stamp=$venv/.complete

if [ "$(cat "$stamp" 2>/dev/null)" != "${tools[*]}" ]; then
  echo "proto: making .venv-proto with ${tools[*]}"
  "${PYTHON:-python3}" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${tools[@]}" 2>"$venv/install.err" \
    || { cat "$venv/install.err" >&2; exit 1; }
  echo "${tools[*]}" >"$stamp"
fi

# Sorted paths relative to proto/: generated code must not depend on where the checkout lies.
mapfile -t protos < <(cd "$top/proto" && find epmesh -name '*.proto' | LC_ALL=C sort)
services=()
for proto in "${protos[@]}"; do [[ $proto != *_service.proto ]] || services+=("$proto"); done
protoc() { PATH="$venv/bin:$PATH" PYTHONWARNINGS=ignore "$venv/bin/python" -m grpc_tools.protoc -I "$top/proto" "$@"; }

mkdir -p "$out"
echo "proto: generating from ${#protos[@]} files, ${#services[@]} of them with services"
protoc --python_out="$out" --pyi_out="$out" "${protos[@]}"
protoc --grpc_python_out="$out" --mypy_grpc_out=quiet:"$out" "${services[@]}"
[ -z "$descriptors" ] || protoc --include_source_info --descriptor_set_out="$descriptors" "${protos[@]}"
