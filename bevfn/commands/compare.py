"""`bevfn compare RUN RUN`: training runs beside each other."""

import shutil
from pathlib import Path

from tyro.conf import Positional


def compare(runs: Positional[tuple[Path, ...]], *, out: Path = Path("runs/compare")) -> None:
    """Shows what two or more runs did differently: flags, loss curves, scores and AP by class.

    Prints it, and writes compare.html with losses.png and classes.png; recall and AP by distance, length, visibility and LiDAR
    points are in the page.

    Args:
        runs: their folders
        out: folder for the page and the pictures
    """
    from bevfn.evaluation import side_by_side
    from bevfn.files import check_writable, to_json
    from bevfn.training import located, run_folder

    if len(runs) < 2:
        raise ValueError("bevfn compare takes two runs or more; name their folders, such as runs/a runs/b")
    for run in runs:
        if not (run / run_folder.CONFIG_FILE).is_file():
            what = f"it has no {run_folder.CONFIG_FILE}" if run.is_dir() else f"its folder is {run.parent}"
            raise ValueError(f"{run} is no run's folder; {what if run.exists() else located.near(run)}")
    check_writable(out)
    short = [run.name for run in runs]
    names = short if len(set(short)) == len(runs) else [str(run) for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"{names[0]} is named twice; name different runs")
    read = []
    for run, name in zip(runs, names):
        config = run_folder.read_config(run / run_folder.CONFIG_FILE)
        read.append(side_by_side.read(run, name, {flag: to_json(value).decode() for flag, value in config.items()}))
    print(
        f"{side_by_side.write(out, read, shutil.get_terminal_size().columns)}\neverything is in {out / 'compare.html'}"
    )
