"""CUDA devices."""

from __future__ import annotations

from collections.abc import Iterator

from epmesh_server.doctor.facts import Asked, Facts, GpuFacts, HostFacts
from epmesh_server.doctor.findings import Finding, error, ok, warning

_GIVE = (
    "docker `--gpus all`, compose `deploy.resources.reservations.devices: [{driver: nvidia, count: all, capabilities: "
    "[gpu]}]`, in a pod `resources.limits: {nvidia.com/gpu: N}`"
)


def check_gpus(asked: Asked, facts: Facts) -> Iterator[Finding]:
    """All of this module; nothing where no rank uses a GPU."""
    gpu = facts.gpu
    if gpu is None or not asked.on_gpu:
        return
    if gpu.problem:
        yield _missing(gpu, facts.host)
        return
    yield ok("gpus", f"{len(gpu.names)}: {', '.join(sorted(set(gpu.names)))}; driver {gpu.driver or 'unknown'}")
    yield from _numbers(asked, gpu)
    yield from _torch(gpu)
    yield from _between(asked, gpu)


def _missing(gpu: GpuFacts, host: HostFacts | None) -> Finding:
    seen = f"{', '.join(gpu.device_files) or 'no /dev/nvidia*'}; driver {gpu.driver or 'not loaded'}; {gpu.problem}"
    hidden = host.environment.get("CUDA_VISIBLE_DEVICES") if host is not None else None
    if gpu.driver and gpu.device_files and hidden is not None:
        why, mend = f"CUDA_VISIBLE_DEVICES={hidden} hides the devices.", "unset it, or name devices that there are"
    elif gpu.driver and not gpu.device_files:
        why, mend = "The host has a driver, this container was given no device.", _GIVE
    elif not gpu.driver:
        why = "The kernel has no NVIDIA driver."
        mend = "the driver on the host (`nvidia-smi` there), or --device cpu"
    else:
        why = "The driver's library is missing here, or does not fit the kernel's part."
        mend = "nvidia-container-toolkit on the host and `NVIDIA_DRIVER_CAPABILITIES=compute,utility`; after a driver "
        mend += "update restart the container"
    return error("gpu-missing", seen, why, mend)


def _numbers(asked: Asked, gpu: GpuFacts) -> Iterator[Finding]:
    """`cuda` gives local rank k the device k; `cuda:k` gives all ranks the same one."""
    _, _, number = asked.device.partition(":")
    needed = int(number) + 1 if number.isdigit() else max(1, asked.ranks)
    if len(gpu.names) < needed:
        yield error(
            "gpu-number",
            f"--device {asked.device} for {asked.ranks} ranks wants {needed} devices, and {len(gpu.names)} are visible",
            "The ranks beyond cannot start.",
            f"fewer --ranks; or CUDA_VISIBLE_DEVICES, and {_GIVE}",
        )


def _torch(gpu: GpuFacts) -> Iterator[Finding]:
    if not gpu.torch_cuda:
        yield error(
            "torch-without-cuda",
            "torch is a build without CUDA, or is not installed",
            "Ranks cannot use the devices.",
            "the image built with CUDA, or torch from the index for this CUDA version",
        )
        return
    major = int(gpu.torch_cuda.partition(".")[0])
    if gpu.cuda // 1000 < major:
        yield error(
            "driver-old",
            f"torch is built for CUDA {gpu.torch_cuda}, the driver {gpu.driver} takes {gpu.cuda // 1000}."
            f"{gpu.cuda % 1000 // 10} at most",
            "torch finds no device.",
            f"a newer driver on the host, or torch for CUDA {gpu.cuda // 1000}",
        )


def _between(asked: Asked, gpu: GpuFacts) -> Iterator[Finding]:
    if gpu.no_peer_access:
        pairs = ", ".join(f"{first}-{second}" for first, second in gpu.no_peer_access[:8])
        yield warning(
            "no-peer-access",
            f"devices {pairs} cannot reach each other's memory",
            "Ranks on them cannot share an arena: their exchange is refused.",
            "devices of one NVLink or PCIe switch (`nvidia-smi topo -p2p r`), without IOMMU or ACS in between; or one "
            "node service for each set of them",
        )
    elif len(gpu.names) > 1:
        multicast = "with" if gpu.multicast else "without"
        yield ok("peer-access", f"all {len(gpu.names)} devices reach each other, {multicast} NVLink multicast")
