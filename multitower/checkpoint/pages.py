"""Pages of mapped files that are not needed any longer, given back before the file is closed."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

PAGEOUT = 21
"""``MADV_PAGEOUT`` of Linux 5.4 and later: pages leave memory, and come back unchanged if they are read."""


def page_out(tensor: Tensor) -> None:
    """Let a tensor that is a view of a mapped file leave memory; where the system cannot, it stays.

    >>> import torch
    >>> tensor = torch.ones(10_000)
    >>> page_out(tensor)
    >>> bool(tensor.eq(1).all())                    # no value is lost
    True

    A file stays mapped until the last tensor in it is gone, and so do all of its pages that were read.
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu":
        return
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), PAGEOUT)
