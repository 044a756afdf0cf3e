"""Which frames an epoch reads, in which order, and the random numbers of each: functions of the seed and nothing else.

No state: sample `position` of epoch `epoch` draws the same numbers on every machine, in any process, with any number of
workers, after any resume.

Source: class-balanced grouping and sampling, Zhu et al. 2019 (arXiv 1908.09492); mmdetection3d CBGSDataset; BEVDepth.
"""

from collections.abc import Callable, Sequence

import numpy as np

from bevfn.data.index import Frame, Index, Share

ORDER, BALANCE, MIX = 1, 2, 3  # fourth number of a stream that belongs to no sample; a sample's is 0


def generator(seed: int, epoch: int, position: int) -> np.random.Generator:
    """The random numbers of the sample at `position` of the epoch's order; all three numbers are 0 or more."""
    return np.random.default_rng([seed, epoch, position])


def order(items: np.ndarray, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """`items` [n] in the order in which the epoch reads them: a permutation of its own for every epoch, or as given."""
    items = np.asarray(items)
    return np.random.default_rng([seed, epoch, 0, ORDER]).permutation(items) if shuffle else items


def mixed(items: np.ndarray, shares: Sequence[Share], seed: int, epoch: int) -> np.ndarray:
    """As many places as `items` [n], of which every data set of a mixture has its share, before they are in `order`.

    shares: of the index, () where it is one data set: then `items` as they are. With w_k the weights, n w_k / sum w of an epoch's
    samples are of data set k, rounded so that they are n in all: its items as often as they go in whole, and some of them,
    drawn anew for every epoch, once more. Raises ValueError for a data set without items.
    """
    if not shares:
        return items
    ends = np.cumsum([share.frames for share in shares])
    pools = [items[(items >= end - share.frames) & (items < end)] for share, end in zip(shares, ends)]
    if empty := [share.root for share, pool in zip(shares, pools) if not len(pool)]:
        raise ValueError(f"the mixture's data set {empty[0]} has no key frame to draw; leave it out of the file")
    drawn = []
    for k, (pool, count) in enumerate(zip(pools, counts(len(items), shares))):
        whole, more = divmod(count, len(pool))
        rng = np.random.default_rng([seed, epoch, k, MIX])
        drawn += [*[pool] * whole, rng.choice(pool, more, replace=False)]
    return np.concatenate(drawn).astype(np.int64)


def counts(total: int, shares: Sequence[Share]) -> list[int]:
    """How many of an epoch's samples are of each data set, in proportion to the weights."""
    ends = total * np.cumsum([share.weight for share in shares]) / sum(share.weight for share in shares)
    return np.diff(np.round([0.0, *ends]).astype(int)).tolist()


def boxed(frame: Frame) -> list[str]:
    """The classes of a key frame's boxes with points, each once. Source: mmdetection3d CBGSDataset."""
    return sorted({name for name, valid in zip(frame.names, frame.valid) if valid})


def categorised(frame: Frame) -> list[str]:
    """The class of each of a key frame's categories, with points or not: twice "pedestrian" for adults and children.

    Where the data set does not say its categories, classes stand for them. Source: BEVDepth nusc_det_dataset.py 294-315.
    """
    return [name for _, name in sorted(set(zip(frame.categories or frame.names, frame.names)))]


def cbgs(
    index: Index,
    class_names: tuple[str, ...],
    seed: int,
    classes_of: Callable[[Frame], list[str]] = boxed,
    rng: np.random.Generator | np.random.RandomState | None = None,
) -> np.ndarray:
    """Positions in `index`, [n] int64, resampled so that every class supplies as many frames as the others.

    classes_of: the pools into which a frame goes, as often as it names them. With F_c the frames in class c's pool, each
    of the C classes that occur supplies sum F_c / C of them, drawn with replacement; so frames with rare classes appear
    several times. Class by class: shuffle with `order`. As upstream, in its rounding too, but for classes that do not
    occur (upstream divides by zero). rng: random numbers instead of the seed's.

    Raises ValueError if no frame is in any pool.
    """
    pools: dict[str, list[int]] = {name: [] for name in class_names}
    for i in range(len(index)):
        for name in classes_of(index[i]):
            if name in pools:
                pools[name].append(i)
    found = [pool for pool in pools.values() if pool]
    if not found:
        raise ValueError(
            f"{index.root} ({index.version}, split {index.split!r}): too few of its {len(index)} frames hold boxes of "
            f"{', '.join(class_names)} to balance these classes; use another split or train without CBGS."
        )
    rng, total = rng or np.random.default_rng([seed, 0, 0, BALANCE]), sum(map(len, found))
    # As upstream spells sum F_c / C: in floating point a class may come out one frame short of it.
    shares = [int(len(pool) * ((1 / len(found)) / (len(pool) / total))) for pool in found]
    return np.concatenate([rng.choice(pool, share) for pool, share in zip(found, shares)]).astype(np.int64)


def published_cbgs(index: Index, class_names: tuple[str, ...], seed: int) -> np.ndarray:
    """`cbgs` with upstream's own draw: of key frames in order of time, by numpy's global generator under that seed.

    On the published infos an epoch then has upstream's very samples, on all processes. Source: BEVNeXt (fact sheet
    recipe_bevnext_awml, "Rules").
    """
    places = index.by_time
    return places[cbgs(index.select(places), class_names, seed, rng=np.random.RandomState(seed))]
