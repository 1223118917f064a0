#!/usr/bin/env bash
# Makes a base image without a registry: `base-image.sh NAME`, Debian with Python and venv, from debootstrap. Needs root.
# For machines that can pull nothing; elsewhere the default of the Dockerfile's BASE_IMAGE is what you want.
set -euo pipefail
name=${1:?the name of the image, such as epmesh-base}
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-bookworm}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "base image: Debian $release by debootstrap (about a minute)"
debootstrap --variant=minbase --include=python3,python3-venv "$release" "$work/root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$work/log" 2>&1 \
  || { tail -n 20 "$work/log" >&2; exit 1; }
rm -rf "$work"/root/var/cache/apt/archives/*.deb "$work"/root/var/lib/apt/lists/* "$work"/root/usr/share/{doc,man,locale}
tar -C "$work/root" --numeric-owner -c . | docker import --change 'CMD ["python3"]' - "$name" >/dev/null
echo "base image: $name"
