"""What PyTorch and oneDNN read from the environment when they first need it, where it says nothing itself.

Imported before both. Where PyTorch has already allocated memory, or multiplied matrices, this changes nothing any more.
"""

import os

_DEFAULTS = {
    # Tensors of megabytes get pages of 2 MiB. Rows that are read at random from tables of millions are then found
    # without walking page tables: sampled training of a million items is a tenth faster, no other is slower.
    "THP_MEM_ALLOC_ENABLE": "1",
    # oneDNN, and PyTorch's binding of it, keep the kernels for 128 shapes of matrices instead of 1,024: sampled
    # training has ever new shapes, and the kernels of each take about a megabyte.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
}

for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)
