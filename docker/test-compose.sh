#!/usr/bin/env bash
# `make test-compose`: builds the images, and has tests/compose kill, pause, cut off and replace containers.
#
# Uses the container engine that runs here. Where none does and this is root on Debian, installs what is missing, starts
# an engine of its own in a directory of its own, and removes all of it in the end. Elsewhere it says why it skips.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
export PATH=/usr/bin:/usr/sbin:$PATH # before anything else that is named docker

skip() {
  echo "test-compose: SKIPPED ($*)"
  exit 0
}

work=$(mktemp -d "${TMPDIR:-/tmp}/epmesh-compose-XXXXXX")
engine="" wheels=""
own_images=()

finish() {
  local code=$?
  trap - EXIT INT TERM
  [ -z "$wheels" ] || wait "$wheels" || true # where what ran beside it failed; it ends by itself
  if ((${#own_images[@]})); then docker rmi --force "${own_images[@]}" >/dev/null 2>&1 || true; fi
  if [ -n "$engine" ]; then
    kill "$engine" 2>/dev/null || true
    for _ in {1..100}; do kill -0 "$engine" 2>/dev/null || break; sleep 0.1; done
    awk -v under="$work" 'index($2, under) == 1 { print $2 }' /proc/mounts | sort -r | xargs -r umount -l 2>/dev/null || true
  fi
  rm -rf "$work"
  exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

missing=()
for command in docker dockerd docker-compose debootstrap; do
  command -v "$command" >/dev/null || missing+=("$command")
done
if docker info >/dev/null 2>&1 && command -v docker-compose >/dev/null; then
  echo "test-compose: uses the container engine that runs here"
else
  [ "$(id -u)" = 0 ] || skip "no container engine answers, and starting one needs root"
  [ -z "${missing[*]:-}" ] || command -v apt-get >/dev/null || skip "${missing[*]} missing, and no apt-get to install them"
  if ((${#missing[@]})); then
    echo "test-compose: installing docker.io, docker-compose and debootstrap (for ${missing[*]})"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      docker.io docker-compose debootstrap; } >"$work/apt.log" 2>&1 \
      || { tail -n 5 "$work/apt.log"; skip "the packages of a container engine cannot be installed here"; }
  fi
  dockerd --data-root "$work/data" --exec-root "$work/exec" --pidfile "$work/pid" --bridge none --iptables=false --ip-masq=false \
    --host "unix://$work/docker.sock" >"$work/dockerd.log" 2>&1 &
  engine=$!
  export DOCKER_HOST="unix://$work/docker.sock"
  for _ in {1..300}; do
    docker info >/dev/null 2>&1 && break
    kill -0 "$engine" 2>/dev/null || { tail -n 3 "$work/dockerd.log"; skip "no container engine starts here"; }
    sleep 0.1
  done
  docker info >/dev/null 2>&1 || { tail -n 3 "$work/dockerd.log"; skip "the container engine does not answer"; }
  docker network create "epmesh-probe-$$" >/dev/null 2>"$work/network.err" \
    || skip "no network for containers may be made here: $(cat "$work/network.err")"
  docker network rm "epmesh-probe-$$" >/dev/null
  echo "test-compose: started a container engine of its own ($(docker info --format '{{.ServerVersion}}, {{.Driver}}'))"
fi

export EPMESH_TAG="test-$$" TAG="test-$$"
own_images=("epmesh-node:$TAG" "epmesh-router:$TAG")
PYTHON=$python docker/wheels.sh cpu & # beside the base image: one waits for the disk and the network, the other computes
wheels=$!
if [ -z "${BASE_IMAGE:-}" ] && [ "$(id -u)" = 0 ] && command -v debootstrap >/dev/null; then
  export BASE_IMAGE="epmesh-base:$TAG"
  own_images+=("$BASE_IMAGE")
  docker/base-image.sh "$BASE_IMAGE"
fi
wait "$wheels"
wheels=""
SKIP_WHEELS=1 PYTHON=$python docker/build.sh cpu
if [ "${BASE_IMAGE:-}" = "epmesh-base:$TAG" ] && [ -z "${ETCD_IMAGE:-}" ]; then
  export ETCD_IMAGE="epmesh-etcd:$TAG"
  own_images+=("$ETCD_IMAGE")
  docker/etcd-image.sh "$ETCD_IMAGE" || export EPMESH_WITHOUT_ETCD="no image of etcd can be made here"
elif [ -z "${ETCD_IMAGE:-}" ]; then
  docker-compose --env-file docker/etcd.env -f docker/compose.yaml pull -q etcd \
    || export EPMESH_WITHOUT_ETCD="the image of etcd cannot be pulled"
fi
if "$python" -m pytest tests/compose -v -o faulthandler_timeout=600 "$@"; then echo "test-compose: PASS"; else echo "test-compose: FAIL"; exit 1; fi
