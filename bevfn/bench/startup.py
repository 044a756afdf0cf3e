"""Seconds from a recipe's command to its first step: compiled with empty caches, with full ones, and in eager mode.

bevfn bench startup --frame FRAME_FOLDER
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bevfn.metrics import METRICS_FILE, read_metrics
from bevfn.synth import key_frame

STEPS = 3  # watched: the first one compiles, the last one is as fast as all others


def measure(frame: Path | None, *, experiment: str = "bevfusion_lidar", options: tuple[str, ...] = ()) -> dict:
    """Figures of "cold", "warm" (the same again) and "eager" starts on one key frame, at the published size."""
    figures: dict = {"experiment": experiment}
    with tempfile.TemporaryDirectory(prefix="bevfn-bench-") as folder:
        root = frame or key_frame.write_frame(Path(folder) / "frame")
        for name, backend in (("cold", "inductor"), ("warm", "inductor"), ("eager", "eager")):
            flags = ["--data-root", str(root), "--backend", backend, "--no-eval-first"]
            flags += ["--run-dir", str(Path(folder) / name), *options]
            command = [sys.executable, "-m", f"bevfn.experiments.{experiment}", *flags]
            caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "BEVFN_CACHE": f"{folder}/kernels"}
            figures[name] = start(command, Path(folder) / name, caches)
        figures["cache_mb"] = sum(f.stat().st_size for f in (Path(folder) / "inductor").rglob("*") if f.is_file()) / 1e6
    cold, warm, eager = (figures[name] for name in ("cold", "warm", "eager"))
    figures["cold_over_eager"] = cold["seconds"] / eager["seconds"]
    figures["warm_over_eager"] = warm["seconds"] / eager["seconds"]
    gain = eager["later_step_seconds"] - cold["later_step_seconds"]
    figures["steps_until_cold_pays"] = (cold["seconds"] - eager["seconds"]) / gain if gain > 0 else None
    return figures


def start(command: list[str], run_dir: Path, environment: dict[str, str]) -> dict[str, float]:
    """Runs a training command until it has made STEPS steps: "seconds" to the end of the first one, of which
    "before_first_step" were imports, data and parameters, and "first_step" reading, compiling and the step.

    Raises RuntimeError with the command's last words if it ends earlier.
    """
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
        first: float | None = None
        try:
            while len(done := _steps(run_dir)) < STEPS:
                if done and first is None:
                    first = time.perf_counter() - started
                if process.poll() is not None:
                    output.seek(0)
                    raise RuntimeError(
                        f"`{' '.join(command)}` ended before step {STEPS}: {output.read()[-1000:].strip()}"
                    )
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
    first = first if first is not None else time.perf_counter() - started
    inside = float(done[0]["seconds"])
    return {
        "seconds": first,
        "before_first_step": first - inside,
        "first_step": inside,
        "later_step_seconds": float(done[-1]["seconds"]),
    }


def _steps(run_dir: Path) -> list[dict[str, float]]:
    return read_metrics(run_dir) if (run_dir / METRICS_FILE).is_file() else []
