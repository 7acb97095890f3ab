"""Where to compute: what the processor is called and can do, threads, free memory, versions of packages."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dream_pyg import ranks
from dream_pyg.errors import ConfigError


def resolve_device(device: str) -> torch.device:
    """The device of a name, ``auto`` being the GPU if there is one; of several processes each has its own GPU.

    Raises:
        ConfigError: If there is no such device here, or none for each process.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"Unknown device {device!r}; expected auto, cpu, cuda or cuda:N.")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"Device {device!r} is not here: this machine has {torch.cuda.device_count()} CUDA devices.")
    if resolved.type == "cpu" or ranks.num_ranks() == 1:
        return resolved
    if ranks.num_local_ranks() > torch.cuda.device_count():
        raise ConfigError(
            f"This machine has {torch.cuda.device_count()} CUDA devices for {ranks.num_local_ranks()} processes, of "
            "which each needs its own. Start fewer with --nproc-per-node, or train with training.device=cpu."
        )
    own = torch.device("cuda", torch.cuda.current_device())
    if resolved.index not in (None, own.index):
        raise ConfigError(f"Device {device!r} is that of another process. Give cuda: each takes a GPU of its own.")
    return own


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether the processor behind a device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _has_any("avx512_bf16", "amx_bf16")


def has_int8_units(device: torch.device) -> bool:
    """Whether the processor multiplies matrices of 8-bit integers faster than others; of GPUs none is used for that."""
    return device.type == "cpu" and _has_any("avx512_vnni", "amx_int8")


def has_onednn_product(device: torch.device) -> bool:
    """Whether :func:`onednn_product` is there, which has no public name in PyTorch, and a processor that it is for."""
    return device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise") and _has_any("avx2")


def onednn_product(left: Tensor, right: Tensor) -> Tensor:
    """Contiguous rows (N, F) times rows (M, F), both in float32 (N, M): up to half as fast again as ``@``."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return product


def _has_any(*units: str) -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(unit) for unit in units)


@contextmanager
def exact_products() -> Iterator[None]:
    """Let products of float32 be of float32, and those of bfloat16 add up in float32, whatever the process asks for."""
    cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = cuda.fp32_precision, mkldnn.fp32_precision, cuda.allow_bf16_reduced_precision_reduction
    cuda.fp32_precision = mkldnn.fp32_precision = "ieee"
    cuda.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        cuda.fp32_precision, mkldnn.fp32_precision, cuda.allow_bf16_reduced_precision_reduction = before


@contextmanager
def deterministic(mode: bool = True) -> Iterator[None]:
    """Let no operation add up in the order in which threads happen to finish, so that a seed gives the same bits.

    Args:
        mode: Off where no order matters: of a deterministic process, PyTorch leaves more to one thread than it must.
    """
    settings: Any = torch.utils.deterministic
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(mode, warn_only=True)
    settings.fill_uninitialized_memory = False  # which only makes reading such memory reproducible
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fills


def give_back_memory() -> None:
    """Have the C library give the system the memory that it keeps after it was freed, often more than is in use."""
    with suppress(OSError, AttributeError):  # a library without that
        ctypes.CDLL(None).malloc_trim(0)


def processor_name(device: torch.device | None = None) -> str:
    """The name of the GPU, or of the CPU as Linux tells it, or as Python does elsewhere; else ``unknown processor``."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return name or "unknown processor"


def available_bytes(device: torch.device | None = None) -> int | None:
    """How much memory of a device this process can still take; None if unknown.

    Of the CPU, which is meant by default, without swapping, and within what its container may.
    """
    if device is not None and device.type == "cuda":
        # What PyTorch keeps of what was freed can be taken again.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with suppress(OSError, ValueError, StopIteration):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        lines = (group / "memory.stat").read_text().splitlines()
        found.append(limit - int(next(line for line in lines if line.startswith("anon ")).split()[1]))
    if not found:
        with suppress(OSError, ValueError, AttributeError):
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return max(0, min(found)) if found else None


def installed_version(package: str) -> str:
    """The version of a package, or ``not installed``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def gibibytes(size: int) -> str:
    """A number of bytes, for people."""
    return f"{size / 2**30:.1f} GiB"


@contextmanager
def threads_of_one() -> Iterator[ThreadPoolExecutor]:
    """As many threads as PyTorch has, each of which computes alone.

    Results do not depend on their number, and no thread waits for the others after every step.
    """
    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(num_threads)  # PyTorch also keeps the number for threads to come.
