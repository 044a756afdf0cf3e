"""A key frame's annotations as models have them."""

import numpy as np

from bevfn.data.index import Frame


def valid(frame: Frame, class_names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(boxes [G,9] float32, labels [G] int64) of the annotations with LiDAR or radar points, in the frame's order.

    Boxes have their BOTTOM centre, and velocity 0 where it is unknown. A label indexes class_names; -1: none of them.
    """
    boxes = frame.boxes[frame.valid].astype(np.float32)
    boxes[:, 2] -= 0.5 * boxes[:, 5]  # an index has the gravity centre
    boxes[:, 7:9] = np.where(np.isfinite(boxes[:, 7:9]), boxes[:, 7:9], 0.0)
    numbers = {name: label for label, name in enumerate(class_names)}
    labels = [numbers.get(name, -1) for name, good in zip(frame.names, frame.valid) if good]
    return boxes, np.array(labels, dtype=np.int64)
