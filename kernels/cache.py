"""Where bevfn keeps what it can make again. On the ground floor, because compiled kernels lie there too."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$BEVFN_CACHE` or `~/.cache/bevfn`."""
    return Path(os.environ.get("BEVFN_CACHE") or Path.home() / ".cache" / "bevfn")
