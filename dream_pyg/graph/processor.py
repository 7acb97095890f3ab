"""What the processor can do."""

from __future__ import annotations

from typing import Any

import torch


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether the processor behind a device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
