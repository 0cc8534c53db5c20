"""Makes ``torch.device("hpu")`` a pretended accelerator of this process: see pretended_device.cpp.

Load it before the first backward pass, and in a process of its own: it cannot be unloaded.
"""

import subprocess
import sys
import types
from pathlib import Path

import torch

DEVICE = torch.device("hpu", 0)


def load(folder: Path) -> torch.device:
    """Build the library in ``folder``, where it is not there yet, load it, and return the device."""
    library = folder / "pretended_device.so"
    if not library.exists():
        home = Path(torch.__file__).parent
        include = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
        source = Path(__file__).with_suffix(".cpp")
        flags = [
            "-std=c++20",
            "-O0",
            "-shared",
            "-fPIC",
            f"-L{home / 'lib'}",
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
        ]
        subprocess.run(["c++", *include, str(source), "-o", str(library), *flags], check=True)
    module = types.ModuleType("torch.hpu")
    module._lazy_init = lambda: None
    module.is_available = lambda: False  # for what asks whether there are streams and graphs to look after
    torch.hpu = sys.modules["torch.hpu"] = module
    torch.ops.load_library(library)
    return DEVICE
