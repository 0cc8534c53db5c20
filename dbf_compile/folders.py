"""Where dbf_compile keeps what may be made again: built kernels and factors."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """Return ``$DBF_CACHE_DIR``, else the user's cache folder for dbf_compile; it may not exist yet."""
    override = os.environ.get("DBF_CACHE_DIR")
    return Path(override) if override else Path(platformdirs.user_cache_dir("dbf_compile"))
