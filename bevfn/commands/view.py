"""`bevfn view`: pictures of key frames, of the detections in a results file, of a batch as training gets it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from bevfn import catalogue, waiting
from bevfn.choices import one_of
from bevfn.files import check_new_folder, new_folder, write_atomically


def view(
    data: Positional[Path],
    *,
    out: Path,
    scene: str | None = None,
    version: str | None = None,
    columns: str = "",
    results: Path | None = None,
    augmented: Annotated[str | None, one_of(catalogue.MODELS)] = None,
    samples: int = 8,
    seed: int = 0,
    score_threshold: float = 0.1,
    range_m: float = 54.0,
) -> None:
    """Draws key frames, a PNG each: cameras, and the view from above, with annotations in their classes' colours.

    With --results what was detected in them, annotations dashed; with --augmented the first batch that `bevfn train` feeds of this data,
    turned, scaled and mirrored as the model sees it. A film of a scene: `bevfn predict`.

    Args:
        data: a nuScenes root, a T4 data set or data of your own, an info file (.pkl, .json), a folder with frame.json, a
            directory of point clouds, or one cloud
        out: folder for the pictures, new or empty
        scene: of a data set: a scene's name, or a split's; all: every scene; by default its only one
        version: of a nuScenes root that has several, or the revision of T4 scenes
        columns: what the numbers of a point are in clouds without a data set, see `bevfn predict`
        results: a results file of these key frames, as `bevfn eval` and `bevfn predict` write it
        augmented: the model whose recipe reads the training split
        samples: key frames that are drawn, evenly out of all; of --augmented the batch's
        seed: of --augmented, as the run's
        score_threshold: least score of what --results shows
        range_m: half side of the view from above [m]
    """
    check_new_folder(out)
    count = 0
    if results is not None and augmented is not None:
        raise ValueError("--results shows detections and --augmented what is trained on; give one of them")
    if augmented is not None and (scene is not None or columns):
        raise ValueError("--augmented reads the recipe's training split; leave out --scene and --columns")
    with waiting.told("reading the data set"):
        if augmented is not None:
            made = _of_batch(data, augmented, version, samples, seed, range_m)
        else:
            made = _of_frames(data, (scene, version, columns), results, samples, score_threshold, range_m)
    with new_folder(out) as folder, waiting.told(lambda: f"drawing, {count} pictures done"):
        for name, png in made:
            write_atomically(folder / f"{count:04d}_{name}.png", png)
            count += 1
    print(f"{count} picture{'' if count == 1 else 's'} in {out}")


def _of_frames(
    data: Path, where: tuple, file: Path | None, samples: int, score_threshold: float, range_m: float
) -> Iterator[tuple[str, bytes]]:
    """(name, PNG) of key frames, and of what a results file has of them. Raises ValueError before the first."""
    import numpy as np  # and what these import, which help need not wait for

    from bevfn import draw
    from bevfn.data import inputs
    from bevfn.data.reading import CLASS_NAMES
    from bevfn.evaluation import results
    from bevfn.names import file_name

    index, _ = inputs.placed(inputs.read(data, *where))
    document = None if file is None else results.read(file, None)["results"]
    places = [i for i, frame in enumerate(index) if document is None or frame.token in document]
    if not places:
        raise ValueError(
            f"{file} has none of the {len(index):,} key frames of {data}; name what it was made of (--scene)"
        )
    named = [entry["detection_name"] for entries in (document or {}).values() for entry in entries]
    known = dict.fromkeys([*index.class_names, *named])
    classes = CLASS_NAMES if set(known) <= set(CLASS_NAMES) else tuple(known)
    chosen = sorted({places[i] for i in np.linspace(0, len(places) - 1, min(samples, len(places))).astype(int)})

    def drawn() -> Iterator[tuple[str, bytes]]:
        for frame in (index[place] for place in chosen):
            sample = draw.sample(frame, index.root, classes)
            found = None if document is None else results.to_lidar(document[frame.token], frame, classes)
            how: dict[str, Any] = {"score_threshold": score_threshold, "range_m": range_m, "scale": 1.0}
            yield file_name(frame.token), draw.png(draw.figure(sample, found, **how), dpi=draw.DPI)

    return drawn()


def _of_batch(
    data: Path, model: str, version: str | None, samples: int, seed: int, range_m: float
) -> Iterator[tuple[str, bytes]]:
    """(name, PNG) of the samples of the first batch that a recipe trains on. Raises ValueError before the first."""
    from dataclasses import replace
    from functools import partial

    import torch

    from bevfn import draw, recipes
    from bevfn.data import loader, sampling, scene
    from bevfn.names import file_name
    from bevfn.training import command_line, tasks

    experiment = catalogue.MODELS[model].experiment
    default = command_line.fitting_root(recipes.defaults(experiment, model), data)
    if not default.augment:
        print(
            f"{model} is trained on such data without augmentation; drawn as `bevfn train {model} --augment` feeds it"
        )
    config = replace(default, data_root=data, augment=True, seed=seed)
    config = config if version is None else replace(config, version=version)
    split = recipes.load(experiment).task(config.completed()).data
    reading = split.reading(0)
    order = sampling.order(tasks.drawn(split, seed, 0), seed, 0, shuffle=True)
    load = partial(scene.load, split.training, reading=reading, database=split.database)
    how = loader.Config(batch_size=min(samples, len(order)), workers=0)
    loaded = next(loader.batches(load, order, how, seed=seed, epoch=0, capacities=reading.capacities))
    batch, count = loaded.batch, len(loaded.tokens)
    if batch.points is None:  # of cameras alone: the view from above has boxes
        empty: dict[str, Any] = {
            "points": torch.zeros(count, 0, 5),
            "points_valid": torch.zeros(count, 0, dtype=torch.bool),
        }
        batch = replace(batch, **empty)

    def drawn() -> Iterator[tuple[str, bytes]]:
        for row, token in enumerate(loaded.tokens):
            title = f"{model} trains on {token}"
            shown = draw.figure(
                batch, row=row, class_names=reading.class_names, range_m=range_m, title=title, scale=1.0
            )
            yield file_name(token), draw.png(shown, dpi=draw.DPI)

    return drawn()
