"""A picture of one frame: the cameras with boxes projected into them, and the scene from above; as a file, or in a notebook."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.text import Text

from bevfn.boxes import bev_corners, corners
from bevfn.data import image, points
from bevfn.data.batch import Base, Batch, Sample, needed
from bevfn.data.index import CAMERAS, Frame
from bevfn.data.reading import CLASS_NAMES
from bevfn.files import write_atomically
from bevfn.names import lines

# One colour a class, in label order; further classes start over.
COLOURS = (
    *("#3b82f6", "#f97316", "#eab308", "#dc2626", "#92400e"),
    *("#f472b6", "#06b6d4", "#65a30d", "#9333ea", "#0f766e"),
)
DASHED: dict[str, Any] = {"linewidth": 0.9, "linestyle": (0, (4, 2))}  # annotations
# corner numbers of `boxes.corners`: the bottom's, the top's and the upright edges
EDGES = tuple((i + k, (i + 1) % 4 + k) for k in (0, 4) for i in range(4)) + tuple((i, i + 4) for i in range(4))
NEAR = 0.1  # m, edges are cut at this depth in front of the camera
# as the field shows them, in two rows; cameras of other names follow
ORDER = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
ROWS = 2
CELL, ABOVE = (5.4, 3.6), 7.6  # inches: a camera's picture with its name, and the view from above
DPI = 110  # of files
MOVING = 0.3  # m/s, from which a velocity is drawn


class Shown(Figure):
    """A figure that a notebook shows where it is a cell's last value; pyplot, which would keep it, knows nothing of it."""

    def _repr_png_(self) -> bytes:
        return png(self, dpi=round(self.dpi))


class Found(Protocol):
    """Of one key frame, such as `evaluation.results.Detections`."""

    @property
    def boxes(self) -> Any: ...
    @property
    def scores(self) -> Any: ...
    @property
    def labels(self) -> Any: ...


def figure(
    what: Sample | Batch,
    found: Found | Mapping[str, Any] | None = None,
    *,
    row: int = 0,
    class_names: tuple[str, ...] = CLASS_NAMES,
    score_threshold: float = 0.1,
    range_m: float = 54.0,
    title: str = "",
    scale: float = 0.6,
) -> Shown:
    """`draw`'s picture as a figure: of a sample on its original images, or of a sample of a batch on the images that a model sees,
    augmented if they are.

        draw.figure(sample)                                   # points, and annotations in their classes' colours
        draw.figure(sample, model.predict(batch))             # and what `predict` gives of a batch, of its `row`
        draw.figure(batch, row=1)
        draw.figure(sample, model.detect(root)[sample.token])

    row: of a batch, and of `predict`'s tensors [B Q ...]. class_names: of a batch, which has numbers alone. scale: of width and
    height, not of the texts: 1 is 23.8 x 8.2 inches with six cameras. Raises ValueError as `draw`.
    """
    frame = _of_batch(what, row, class_names) if isinstance(what, Batch) else what
    if found is None:
        shown = _annotations(frame)
        return _render(frame, shown, range_m, f"{title or frame.token}   {len(shown['boxes'])} annotated", scale)
    shown = _shown(frame, *_found(found, row), score_threshold)
    return _render(frame, shown, range_m, _heading(frame, shown, title, score_threshold), scale)


def draw(
    frame: Sample,
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    path: Path,
    *,
    score_threshold: float = 0.1,
    range_m: float = 54.0,
    title: str = "",
) -> None:
    """Writes a PNG: predictions solid with their score, the frame's annotations thin and dashed.

    frame: what was predicted on; its original image files are opened again. boxes [Q,>=7] bottom-centre form, scores
    [Q], labels [Q], in the frame's (augmented) lidar frame; numpy or CPU tensors. Predictions below score_threshold
    and boxes that are not finite are left out. range_m: half side of the view from above. The file appears complete
    or not at all.

    Raises ValueError if the lengths differ, a label has no class name, or `path` is no PNG.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"{path}: pictures are written as PNG; let the name end in .png.")
    how: dict[str, Any] = {"score_threshold": score_threshold, "range_m": range_m, "title": title}
    write_atomically(path, picture(frame, boxes, scores, labels, **how))


def picture(
    frame: Sample,
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    score_threshold: float = 0.1,
    range_m: float = 54.0,
    title: str = "",
) -> bytes:
    """What `draw` writes."""
    shown = _shown(frame, boxes, scores, labels, score_threshold)
    return png(_render(frame, shown, range_m, _heading(frame, shown, title, score_threshold), 1.0), dpi=DPI)


def _shown(frame: Sample, boxes: Any, scores: Any, labels: Any, score_threshold: float) -> dict[str, np.ndarray]:
    """What is drawn, the least sure first. Raises ValueError."""
    boxes, scores, labels = np.asarray(boxes, dtype=np.float64), np.asarray(scores), np.asarray(labels)
    if not (len(boxes) == len(scores) == len(labels)) or boxes.ndim != 2 or boxes.shape[1] < 7:
        raise ValueError(
            f"draw got boxes {list(boxes.shape)}, {len(scores)} scores and {len(labels)} labels; give boxes [Q,7 or "
            "more] and one score and label for each."
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(frame.class_names):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise ValueError(f"draw got label {wrong}, but the frame has {len(frame.class_names)} class names.")
    order = np.argsort(scores, kind="stable")  # ascending: the surest are drawn last, on top
    order = order[(scores[order] >= score_threshold) & np.isfinite(boxes[order]).all(axis=1)]
    return {
        "boxes": boxes[order],
        "scores": scores[order],
        "labels": labels[order],
        "annotated": needed(frame.boxes, "boxes"),
        "annotated_labels": needed(frame.labels, "labels"),
        "points": needed(frame.points, "points"),
    }


def _annotations(frame: Sample) -> dict[str, np.ndarray]:
    """The annotations as what is drawn, of no score."""
    boxes, labels = needed(frame.boxes, "boxes"), needed(frame.labels, "labels")
    shown = _shown(frame, boxes, np.ones(len(boxes)), labels, 0.0)
    return shown | {
        "scores": np.full(len(shown["boxes"]), np.nan),
        "annotated": boxes[:0],
        "annotated_labels": labels[:0],
    }


def _heading(frame: Sample, shown: dict[str, np.ndarray], title: str, score_threshold: float) -> str:
    """Above the picture."""
    heading = f"{title or frame.token}   {len(shown['boxes'])} predicted "
    heading += f"with score ≥ {score_threshold:.3g} (fainter: lower score)"
    count = len(shown["annotated"])
    return heading + (f", {count} annotated (dashed)" if count else "")


def _found(found: Found | Mapping[str, Any], row: int) -> tuple[Any, Any, Any]:
    """(boxes, scores, labels) of one key frame, whichever form they are in."""
    if not isinstance(found, Mapping):
        return found.boxes, found.scores, found.labels
    rows = {name: found[name][row].detach().cpu().numpy() for name in ("boxes", "scores", "labels", "valid")}
    boxes, scores, labels = (rows[name][rows["valid"]] for name in ("boxes", "scores", "labels"))
    return boxes, scores, labels


def _of_batch(batch: Batch, row: int, class_names: tuple[str, ...]) -> Sample:
    """A sample of the batch without its padding, with the key frame's images instead of their files."""

    def real(name: str, valid: str) -> Any:
        value, rows = getattr(batch, name), getattr(batch, valid)
        return None if value is None else value[row][rows[row]].cpu().numpy()

    cameras: dict[str, Any] = {}
    if batch.images is not None:
        count = batch.images.shape[2]
        names = CAMERAS if count == len(CAMERAS) else tuple(f"camera {n}" for n in range(count))
        cameras = {name: getattr(batch, name)[row].cpu().numpy() for name in ("images", "image_from_base", "image_aug")}
        cameras["camera_names"] = names
    return Sample(
        base=batch.base,
        base_aug=batch.base_aug[row].cpu().numpy(),
        points=real("points", "points_valid"),
        boxes=real("boxes", "boxes_valid"),
        labels=real("labels", "boxes_valid"),
        token=f"sample {row} of a batch of {len(batch.base_aug)}",
        class_names=class_names,
        **cameras,
    )


def sample(frame: Frame, root: Path, class_names: tuple[str, ...]) -> Sample:
    """A key frame of an index as `draw` wants it: the key frame's own points, the boxes of class_names that LiDAR or radar
    sees, no augmentation.

    Cameras are left out if one of their images is missing. Raises ValueError if the point file cannot be read.
    """
    known = [i for i, name in enumerate(frame.names) if name in class_names and frame.valid[i]]
    boxes = np.nan_to_num(frame.boxes[known], nan=0.0).astype(np.float32)  # unknown velocities
    boxes[:, 2] -= 0.5 * boxes[:, 5]  # bottom centre
    cloud = np.zeros((0, points.COLUMNS), dtype=np.float32)
    if frame.lidar_path:  # of cameras alone there is none
        cloud, _ = points.scan(frame, root)
    cameras: dict[str, Any] = {}
    paths = tuple(Path(root) / camera.path for camera in frame.cameras.values())
    if paths and all(path.is_file() for path in paths):
        matrices = np.stack([np.eye(4)] * len(paths))  # N 4 4
        for matrix, camera in zip(matrices, frame.cameras.values()):
            matrix[:3] = camera.intrinsics @ camera.camera_from_lidar[:3]
        names = tuple(frame.cameras)
        cameras = {"image_paths": paths, "camera_names": names, "image_from_base": matrices[None].astype(np.float32)}
    return Sample(
        base=Base.LIDAR,
        points=cloud,
        boxes=boxes,
        labels=np.array([class_names.index(frame.names[i]) for i in known], dtype=np.int64),
        base_aug=np.eye(4, dtype=np.float32),
        token=frame.token,
        class_names=class_names,
        **cameras,
    )


def in_order(names: tuple[str, ...]) -> list[int]:
    """Places of cameras in the order in which they are shown: front left, front, front right, then the back."""
    return sorted(range(len(names)), key=lambda n: ORDER.index(names[n]) if names[n] in ORDER else len(ORDER))


def _render(frame: Sample, shown: dict[str, np.ndarray], range_m: float, heading: str, scale: float) -> Shown:
    """Cameras on the left, the view from above on the right."""
    cameras = in_order(frame.camera_names)
    columns = -(-len(cameras) // ROWS)
    spacing = ConstrainedLayoutEngine(h_pad=0.08)  # inches
    size = (scale * (CELL[0] * columns + ABOVE), scale * (ROWS * CELL[1] + 1.0))
    figure = Shown(figsize=size, layout=spacing, facecolor="white", dpi=80)
    grid = figure.add_gridspec(ROWS, columns + 1, width_ratios=[CELL[0]] * columns + [ABOVE])
    for slot, n in enumerate(cameras):
        _draw_camera(figure.add_subplot(grid[slot // columns, slot % columns]), frame, n, shown)
    _draw_above(figure.add_subplot(grid[:, columns]), shown, range_m)
    used = sorted({*shown["labels"].tolist(), *shown["annotated_labels"].tolist()})
    handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=3, label=frame.class_names[i]) for i in used]
    if len(shown["annotated"]):
        handles.append(Line2D([], [], color="black", label="annotated (white in the images)", **DASHED))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    figure.suptitle(heading, fontsize=12 if scale == 1 else 10)
    return plain(figure)


Drawn = TypeVar("Drawn", bound=Figure)


def plain(figure: Drawn) -> Drawn:
    """The figure, whose texts are shown as they are: a token is no formula."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        text.set_text(lines(text.get_text()))
    return figure


def png(figure: Figure, *, dpi: int, facecolor: str = "auto") -> bytes:
    """A figure's bytes, without pyplot: no global figure, no display. Its texts are shown as they are, see `plain`."""
    plain(figure)
    encoded = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(encoded, format="png", dpi=dpi, facecolor=facecolor)
    return encoded.getvalue()


def _draw_camera(axes: Axes, frame: Sample, n: int, shown: dict[str, np.ndarray]) -> None:
    """One image with both kinds of boxes, and the scores where there is room: the original one, or of a batch the model's."""
    assert frame.image_from_base is not None  # a reader gives the calibration with the paths
    pixel_from_base = frame.image_from_base[0, n].astype(np.float64)
    if frame.image_paths:
        picture = image.decode(frame.image_paths[n])
    else:
        picture = needed(frame.images, "images")[0, n]
        pixel_from_base = _augmented(needed(frame.image_aug, "image_aug")[0, n].astype(np.float64)) @ pixel_from_base
    height, width = picture.shape[:2]
    axes.imshow(picture, interpolation="antialiased")
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.set_title(frame.camera_names[n], fontsize=9)
    pixel_from_augmented = pixel_from_base @ np.linalg.inv(frame.base_aug.astype(np.float64))
    boxes = np.concatenate([shown["annotated"][:, :7], shown["boxes"][:, :7]]).astype(np.float64)
    projected = [_project(box, pixel_from_augmented, width, height) for box in corners(torch.from_numpy(boxes)).numpy()]

    annotated = [line for lines in projected[: len(shown["annotated"])] for line in lines]
    axes.add_collection(LineCollection(annotated, colors="black", linewidths=1.6, alpha=0.4))
    axes.add_collection(LineCollection(annotated, colors="white", **_plural(DASHED)))
    labelled: list[np.ndarray] = []
    for i in reversed(range(len(shown["boxes"]))):  # the surest first, they get the labels
        lines, score = projected[len(shown["annotated"]) + i], float(shown["scores"][i])
        if not lines:
            continue
        colour = COLOURS[shown["labels"][i] % len(COLOURS)]
        axes.add_collection(
            LineCollection(lines, colors=colour, linewidths=1.5, alpha=_alpha(score), zorder=_order(score))
        )
        if np.isnan(score):
            continue
        corner = np.clip(np.concatenate(lines).min(axis=0), [0, 0.04 * height], [0.94 * width, height])
        if all((np.abs(corner - other) > [0.055 * width, 0.045 * height]).any() for other in labelled):
            labelled.append(corner)
            style = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
            axes.text(
                corner[0], corner[1], f"{score:.2f}", color="white", fontsize=6.5, zorder=5, va="bottom", bbox=style
            )


def _augmented(image_aug: np.ndarray) -> np.ndarray:
    """4 4 of pixels -> the same of pixels times depth, which `_project` divides by depth only later."""
    made = np.eye(4)
    made[:2, :2], made[:2, 2] = image_aug[:2, :2], image_aug[:2, 3]
    return made


def _project(box: np.ndarray, pixel_from_lidar: np.ndarray, width: int, height: int) -> list[np.ndarray]:
    """The edges of one box, corners [8,3], as pixel lines [2,2] cut at the near plane; none if out of the picture."""
    points = box @ pixel_from_lidar[:3, :3].T + pixel_from_lidar[:3, 3]  # 8 3: u*depth, v*depth, depth
    lines = []
    for a, b in EDGES:
        far, near = (points[a], points[b]) if points[a, 2] >= points[b, 2] else (points[b], points[a])
        if far[2] <= NEAR:
            continue
        if near[2] < NEAR:
            near = near + (far - near) * (NEAR - near[2]) / (far[2] - near[2])
        lines.append(np.stack([far[:2] / far[2], near[:2] / near[2]]))
    if not lines:
        return []
    ends = np.concatenate(lines)
    return lines if (ends.min(axis=0) < [width, height]).all() and (ends.max(axis=0) > 0).all() else []


def _draw_above(axes: Axes, shown: dict[str, np.ndarray], range_m: float) -> None:
    """Points (darker: higher), and boxes with their heading; x to the right and y up, metres."""
    x, y, z = shown["points"][:, :3].T
    axes.scatter(x, y, c=z, s=0.8, cmap="Greys", vmin=-4.5, vmax=1.5, linewidths=0)
    for radius in np.arange(10.0, range_m * 1.5, 10.0):
        axes.add_patch(Circle((0, 0), radius, fill=False, color="0.85", linewidth=0.6, zorder=0))
    axes.plot(0, 0, marker="+", color="black", markersize=9)
    for box, score, label in zip(shown["boxes"], shown["scores"], shown["labels"]):
        colour = COLOURS[label % len(COLOURS)]
        axes.add_collection(
            LineCollection([*footprint(box), *arrow(box)], colors=colour, linewidths=1.7, alpha=_alpha(score), zorder=3)
        )
    annotated = [line for box in shown["annotated"] for line in footprint(box)]
    axes.add_collection(LineCollection(annotated, colors="black", zorder=4, **_plural(DASHED)))
    axes.set(xlim=(-range_m, range_m), ylim=(-range_m, range_m), aspect="equal")
    axes.set(xlabel="x right [m]", ylabel="y forward [m]")
    axes.set_title(
        f"from above, lidar frame, {len(shown['points']):,} points; tick: front, arrow: a second's way", fontsize=9
    )


def footprint(box: np.ndarray) -> list[np.ndarray]:
    """Lines in x, y: the outline [5,2], and a tick [2,2] from the middle of the front outwards."""
    heading = np.array([np.cos(box[6]), np.sin(box[6])])
    front = box[:2] + heading * box[3] / 2
    outline = bev_corners(torch.from_numpy(box)).numpy()[[0, 1, 2, 3, 0]]  # 5 2
    return [outline, np.stack([front, front + heading * 0.9])]


def arrow(box: np.ndarray) -> list[np.ndarray]:
    """Lines in x, y from a box's middle to where it is in a second, with two barbs; none of one that stands, or has no velocity."""
    speed = float(np.hypot(*box[7:9])) if len(box) >= 9 else 0.0
    if not speed > MOVING:
        return []
    end, turn = box[:2] + box[7:9], np.arctan2(box[8], box[7])
    barbs = [end - 0.9 * np.array([np.cos(turn + side), np.sin(turn + side)]) for side in (0.45, -0.45)]
    return [np.stack([box[:2], end]), *(np.stack([end, barb]) for barb in barbs)]


def _alpha(score: float) -> float:
    return 1.0 if np.isnan(score) else 0.35 + 0.65 * min(max(float(score), 0.0), 1.0)


def _order(score: float) -> float:
    """Of drawing: the surer, the higher."""
    return 3.0 if np.isnan(score) else 3.0 + score


def _plural(style: dict) -> dict:
    return {f"{name}s": value for name, value in style.items()}  # a LineCollection's names of a line's properties
