"""Which frames an epoch reads, in which order, and the random numbers of each: functions of the seed and nothing else.

No state: sample `position` of epoch `epoch` draws the same numbers on every machine, in any process, with any number of
workers, after any resume.

Source: class-balanced grouping and sampling, Zhu et al. 2019 (arXiv 1908.09492); mmdetection3d CBGSDataset.
"""

import numpy as np

from bevfn.data.index import Index

ORDER, BALANCE = 1, 2  # fourth number of a stream that belongs to no sample; a sample's is 0


def generator(seed: int, epoch: int, position: int) -> np.random.Generator:
    """The random numbers of the sample at `position` of the epoch's order; all three numbers are 0 or more."""
    return np.random.default_rng([seed, epoch, position])


def order(items: np.ndarray, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """`items` [n] in the order in which the epoch reads them: a permutation of its own for every epoch, or as given."""
    items = np.asarray(items)
    return np.random.default_rng([seed, epoch, 0, ORDER]).permutation(items) if shuffle else items


def cbgs(index: Index, class_names: tuple[str, ...], seed: int) -> np.ndarray:
    """Positions in `index`, [n] int64, resampled so that every class supplies as many frames as the others.

    With F_c the frames that hold a valid box of class c, each class with any supplies floor(sum F_c / classes) of them,
    drawn with replacement; so frames with rare classes appear several times. Class by class: shuffle with `order`.
    As upstream, except that a class without frames supplies none (upstream divides by zero).

    Raises ValueError if no frame holds a box of any class.
    """
    frames: dict[str, list[int]] = {name: [] for name in class_names}
    for i in range(len(index)):
        frame = index[i]
        for name in {name for name, valid in zip(frame.names, frame.valid) if valid and name in frames}:
            frames[name].append(i)
    share = sum(map(len, frames.values())) // len(class_names)
    if share == 0:
        raise ValueError(
            f"{index.root} ({index.version}, split {index.split!r}): too few of its {len(index)} frames hold boxes of "
            f"{', '.join(class_names)} to balance these classes; use another split or train without CBGS."
        )
    rng = np.random.default_rng([seed, 0, 0, BALANCE])
    return np.concatenate([rng.choice(found, share) for found in frames.values() if found]).astype(np.int64)
