"""How many voxels and active sites the samples of a data set have: counted once (`bevfn data prepare --capacities`), for recipes
that take their capacities from there (--capacity-file). Every row of a capacity is multiplied and moved, used or not.

Counted are the samples of one epoch as training reads them, augmented, with the sweeps and pasted objects that it draws.
Other epochs draw others: hence the headroom, and what does not fit is counted as ever.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bevfn.backbones import sparse_encoder
from bevfn.data import building, loader, scene
from bevfn.data.batch import Batch, needed
from bevfn.data.index import Index
from bevfn.data.paste import Database
from bevfn.data.reading import Reading
from bevfn.files import read_json, to_json, write_atomically
from bevfn.kernels import neighbours
from bevfn.kernels.voxelize import voxelize
from bevfn.models import bevfusion

STEP = 256
"""rows that a capacity is a multiple of"""
FORMAT = 1  # raise it when what is counted changes


@dataclass(frozen=True)
class Measured:
    """What a file of capacities says."""

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    size: tuple[float, ...]
    """of the grid, m, see `bevfusion.Voxels`"""
    sweeps: int
    samples: int
    voxels: int
    """most occupied voxels of a sample"""
    sites: tuple[int, ...]
    """most active sites of a sample, at each of the encoder's levels behind the voxels"""
    made_of: building.Origin
    format: int = FORMAT

    def rooms(self, headroom: float) -> tuple[int, tuple[int, ...]]:
        """(voxels, sites of every level) with that share more, in whole steps."""

        def room(count: int) -> int:
            return max(1, -(-int(count * (1 + headroom)) // STEP)) * STEP

        return room(self.voxels), tuple(map(room, self.sites))


def folder(index: Index) -> Path:
    """Where `bevfn data prepare` puts the files of a split, one a model."""
    return building.place(index.root, "bevfn_capacities") / index.split


def made_of(index: Index) -> building.Origin:
    """Everything of a split that decides the counts, but for the point files' contents."""
    files = ("token", "lidar_path", "sweep_start", "sweep_path")
    return building.Origin.of(index, files, ("sweep_transform", "sweep_lag"))


def measure(
    index: Index,
    places: np.ndarray,
    reading: Reading,
    network: bevfusion.Config,
    *,
    database: Database | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Counts the samples of these places of the index, as `reading` reads them for the network.

    Raises ValueError where the network has no LiDAR, or a file is damaged.
    """
    if network.lidar is None or reading.points is None:
        raise ValueError("capacities are those of a LiDAR branch, and the model has none; name another model")
    scans = reading.points.sweeps
    reading = replace(reading, cameras=None, depth=False)
    load = partial(scene.load, index, reading=reading, database=database)
    settings = loader.Config(batch_size=1, workers=workers)
    most = np.zeros(1 + len(network.lidar.encoder.capacities), dtype=np.int64)
    finish = partial(_counting, config=network)
    stream = loader.batches(load, places, settings, seed=0, epoch=0, capacities=reading.capacities, finish=finish)
    with contextlib.closing(stream):
        for done, loaded in enumerate(stream, start=1):
            most = np.maximum(most, needed(loaded.batch.tables, "tables").numpy())
            progress(done, len(places))
    voxels, sites = int(most[0]), tuple(map(int, most[1:]))
    grid = network.voxels
    return Measured(grid.lower, grid.upper, grid.size, scans, len(places), voxels, sites, made_of(index))


def _counting(batch: Batch, *, config: bevfusion.Config) -> Batch:
    """A batch of one sample with its counts in place of its points."""
    found = torch.tensor(
        list(counts(needed(batch.points, "points"), needed(batch.points_valid, "points_valid"), config))
    )
    return replace(batch, points=None, points_valid=None, tables=found)


def counts(points: Tensor, valid: Tensor, config: bevfusion.Config) -> Iterator[int]:
    """Occupied voxels of one sample (points [1 P 5], valid [1 P]), then active sites of every level, were there room for all."""
    assert config.lidar is not None
    of = config.voxels
    room = max(1, points.shape[1])
    _, coords, _, found = voxelize(
        points, valid, lower=of.lower, size=of.size, grid=of.grid, max_points=1, max_voxels=room
    )
    yield int(found)
    cells = coords[0, : int(found)]
    sites, grid = torch.cat([torch.zeros_like(cells[:, :1]), cells], dim=1), config.sparse_grid
    for way in sparse_encoder.ways(config.lidar.encoder):
        active, room = torch.ones(len(sites), dtype=torch.bool), max(1, 2 * len(sites))
        while True:
            further, _, _, _, found = neighbours.strided(sites, active, **way, grid=grid, capacity=room, batch=1)
            if int(found) <= room:
                break
            room = int(found)
        sites, grid = further[: int(found)], neighbours.out_grid(grid, **way)
        yield int(found)


def write(path: Path, measured: Measured) -> None:
    """The file; raises NotWritten where it cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_json(asdict(measured), indent=1))


def read(path: Path, index: Index, grid: bevfusion.Voxels, sweeps: int) -> Measured:
    """The file's counts. Raises ValueError, one sentence, where it is missing or damaged, or of another data set, grid, or number
    of sweeps than the run's."""
    again = "measure again with `bevfn data prepare ROOT --capacities MODEL`"
    try:
        content = read_json(path.read_bytes())
        origin = building.Origin(**content["made_of"])
        rows = {name: tuple(content[name]) for name in ("lower", "upper", "size", "sites")}
        made = Measured(**{**content, **rows, "made_of": origin})
        if made.format != FORMAT:
            raise ValueError(f"format {made.format!r}, not {FORMAT}")
        for name, least in (("samples", 1), ("sweeps", 0), ("voxels", 0), ("sites", 0)):
            counted = made.sites if name == "sites" else (getattr(made, name),)
            if not counted or not all(type(n) is int and least <= n < 1 << 31 for n in counted):  # rows are int32
                raise ValueError(f"{name} is {getattr(made, name)!r}")
    except OSError as error:
        raise ValueError(f"the capacity file {path} cannot be read ({error.strerror}); {again}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the capacity file {path} is damaged ({error}); {again}") from None
    for what, theirs, ours in (
        ("voxels of (x, y, z) m", made.size, grid.size),
        ("a range from (x, y, z) m", made.lower, grid.lower),
        ("a range to (x, y, z) m", made.upper, grid.upper),
        ("this number of sweeps:", made.sweeps, sweeps),
    ):
        if theirs != ours:
            raise ValueError(f"the capacity file {path} is of {what} {theirs}, the run has {ours}; {again}")
    origin.check(path, index, made_of(index))
    return made
