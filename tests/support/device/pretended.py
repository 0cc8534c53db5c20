"""Makes ``torch.device("hpu")`` a pretended accelerator of this process: see pretended.cpp.

Load it before the first backward pass, and in a process of its own: it cannot be unloaded.
"""

import sys
import types
from pathlib import Path

import torch
from support.device.shared_library import build

DEVICE = torch.device("hpu", 0)


def load(folder: Path) -> torch.device:
    """Build the library in ``folder``, where it is not there yet, load it, and return the device."""
    module = types.ModuleType("torch.hpu")
    module._lazy_init = lambda: None
    module.is_available = lambda: False  # for what asks whether there are streams and graphs to look after
    torch.hpu = sys.modules["torch.hpu"] = module
    torch.ops.load_library(build(Path(__file__).with_suffix(".cpp"), folder))
    return DEVICE
