"""What a file of figures begins with: the command, commit, date, machine and versions that made it.

Every file of experiments/results/ has this head; `bevfn bench --list` prints them.
"""

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

import bevfn
from bevfn.files import read_json, to_json, write_atomically

RESULTS = Path(__file__).parent / "experiments" / "results"  # in a checkout; a wheel has no figures


def head(device: str = "cpu") -> dict:
    """{"command", "commit", "date", "machine", "versions"} of this process, which computes on `device`."""
    return {
        "command": _command(),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "processor": processor(),
            "instruction_set": instruction_set(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            **(_gpu(device) if device.startswith("cuda") else {"device": device}),
            "system": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "bevfn": bevfn.__version__,
        },
    }


def write(path: Path, figures: dict, *, device: str = "cpu") -> dict:
    """Writes the head and behind it `figures` as JSON, and returns both."""
    document = {**head(device), **figures}
    write_atomically(path, to_json(document, indent=1))
    return document


def read(folder: Path = RESULTS) -> dict[str, dict]:
    """{name: content} of the files of figures in `folder`."""
    return {path.name: read_json(path.read_bytes()) for path in sorted(folder.glob("*.json"))}


def listing(folder: Path = RESULTS) -> str:
    """A line for each file in `folder` and each command that makes it."""
    lines = []
    for name, content in read(folder).items():
        lines.append(f"{name}  {content['date']}  {content['commit']}")
        commands = content["command"]
        lines += [f"    {command}" for command in ([commands] if isinstance(commands, str) else commands)]
    return "\n".join(lines) or f"no figures in {folder}: they are in a checkout of bevfn, not in its wheel"


def _gpu(device: str) -> dict:
    """{"device": its name, "capability", "device_memory_gb", "cuda" that torch is built with, "driver"} of a GPU."""
    found = torch.cuda.get_device_properties(device)
    return {
        "device": found.name,
        "capability": f"{found.major}.{found.minor}",
        "device_memory_gb": round(found.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver(told: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Version of NVIDIA's driver, as its kernel module tells it; None where it does not."""
    try:
        found = re.search(r"\s(\d+(?:\.\d+)+)\s", told.read_text())
    except OSError:
        return None
    return found and found[1]


def _command() -> str:
    """What was typed, with the program's name instead of its path."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of what `python -m` runs
    package, _, module = (spec.name if spec is not None else "").partition(".")
    if package == "bevfn" and module.startswith("experiments."):
        return shlex.join(["python", "-m", f"{package}.{module}", *sys.argv[1:]])
    program = "bevfn" if (package, module) == ("bevfn", "cli") else Path(sys.argv[0]).name
    return shlex.join([program, *sys.argv[1:]])


def _commit() -> str | None:
    """Of the checkout that this file belongs to, with -dirty where it has changes; None for an installed wheel."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:  # no git here
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    # A wheel may lie inside some other repository, whose commit says nothing about it.
    tracked = git("ls-files", "--error-unmatch", Path(__file__).name)
    return (git("describe", "--always", "--dirty", "--exclude", "*") or None) if tracked else None


def instruction_set() -> str:
    """The processor's vectors as torch names them, AVX512, AVX2, SVE256 …; DEFAULT is NEON on arm64, SSE elsewhere."""
    name = torch.backends.cpu.get_cpu_capability()
    return name if name != "DEFAULT" else "NEON" if platform.machine() in ("aarch64", "arm64") else "SSE"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {k.strip(): v.strip() for k, v in fields.items()}
    return f"{fields.get('model name', platform.processor())} (family {fields.get('cpu family')}, model {fields.get('model')})"
