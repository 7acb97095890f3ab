"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from typing import Any

import torch

from dream_pyg.graph.processor import has_bfloat16_units, has_int8_units, installed_version, processor_name

_PACKAGES = ("dream-pyg", "numpy", "torch", "faiss-cpu", "scikit-learn", "pynndescent", "hnswlib", "usearch")
_UNITS = {"bfloat16": has_bfloat16_units, "int8": has_int8_units}


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, versions and date; nothing that names the host."""
    return {
        "processor": processor_name(),
        "units": [name for name, has in _UNITS.items() if has(torch.device("cpu"))],
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := installed_version(name)) != "not installed"},
        "date": time.strftime("%Y-%m-%d"),
    }


def machine_in_words(machine: Mapping[str, Any], threads: int) -> str:
    """What :func:`describe_machine` gave, and how many threads were used, in one sentence."""
    units = ""
    if "units" in machine:  # which older measurements do not say
        units = f" with units for {' and '.join(machine['units']) or 'float32 alone'}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['processor']}{units}, {machine['cores']} cores, {threads} threads, {machine['memory_gb']} GB; "
        f"{machine['date']}; Python {machine['python']}, {versions}."
    )


def describe_process() -> dict[str, Any]:
    """Where and when this process measures itself, with the threads that it may use."""
    return {
        "machine": {
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
    }
