"""Loads the pretended accelerator ``torch.device("hpu")``, see pretended.cpp.

Load it before the first backward pass, in a process of its own: it cannot be unloaded.
"""

import sys
import types
from pathlib import Path

import torch
from support.device.shared_library import build

DEVICE = torch.device("hpu", 0)


def load(folder: Path) -> torch.device:
    """Build the library in ``folder`` unless it is there, load it, and return the device."""
    module = types.ModuleType("torch.hpu")
    module._lazy_init = lambda: None
    module.is_available = lambda: False  # it has no streams and no graphs
    torch.hpu = sys.modules["torch.hpu"] = module
    torch.ops.load_library(build(Path(__file__).with_suffix(".cpp"), folder))
    return DEVICE
