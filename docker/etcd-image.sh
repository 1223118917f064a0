#!/usr/bin/env bash
# Makes an image of etcd without a registry: `etcd-image.sh NAME`, Debian's etcd-server on BASE_IMAGE. For machines that
# can pull nothing; elsewhere the default of compose.yaml's ETCD_IMAGE is what you want.
set -euo pipefail
name=${1:?the name of the image, such as epmesh-etcd}
base=${BASE_IMAGE:?the name of a Debian image, such as docker/base-image.sh makes}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
if ! cp "$(command -v etcd)" etcd 2>/dev/null; then
  chmod 755 . # apt reads and writes as another user
  apt-get download -qq etcd-server >log 2>&1 || { tail -n 3 log >&2; exit 1; }
  dpkg-deb --fsys-tarfile etcd-server_*.deb | tar -x ./usr/bin/etcd
  mv usr/bin/etcd etcd
fi
printf 'FROM %s\nCOPY etcd /usr/bin/etcd\nENTRYPOINT ["etcd"]\n' "$base" >Dockerfile
tar -c Dockerfile etcd | docker build --quiet --tag "$name" - >/dev/null
echo "etcd image: $name, $(./etcd --version | head -n 1)"
