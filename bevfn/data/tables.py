"""A nuScenes root as it lies on the disk: its versions, their thirteen tables of rows, and the splits of their scenes.

What tables are and how they are held against each other is a `Schema`, which T4 data sets have another one of.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from bevfn.files import read_json
from bevfn.names import file_name, printable, unusable

TABLES = (
    *("category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose", "log"),
    *("scene", "sample", "sample_data", "sample_annotation", "map"),
)
# Which tokens must be found in which table; "..._tokens" are lists.
REFERENCES = {
    "instance": {"category_token": "category"},
    "calibrated_sensor": {"sensor_token": "sensor"},
    "scene": {"log_token": "log"},
    "sample": {"scene_token": "scene", "prev": "sample", "next": "sample"},
    "sample_data": {
        "sample_token": "sample",
        "ego_pose_token": "ego_pose",
        "calibrated_sensor_token": "calibrated_sensor",
        "prev": "sample_data",
        "next": "sample_data",
    },
    "sample_annotation": {
        "sample_token": "sample",
        "instance_token": "instance",
        "visibility_token": "visibility",
        "attribute_tokens": "attribute",
        "prev": "sample_annotation",
        "next": "sample_annotation",
    },
}
ENDS = ("prev", "next", "visibility_token")  # which may be empty or missing
# What else rows are looked up, ordered or opened by.
FIELDS: dict[str, dict[str, type]] = {
    "category": {"name": str},
    "attribute": {"name": str},
    "visibility": {"level": str},
    "sensor": {"channel": str},
    "scene": {"name": str},
    "sample": {"timestamp": int},
    "sample_data": {"filename": str, "is_key_frame": bool, "timestamp": int},
    "map": {"filename": str, "log_tokens": list},  # of all versions: v1.0-mini's maps name logs of trainval
}
WORDS = {str: "text", int: "number", bool: "true or false", list: "list"}


@dataclass(frozen=True)
class Schema:
    """What the tables of a format must have; the defaults are nuScenes'."""

    tables: tuple[str, ...] = TABLES
    references: dict[str, dict[str, str]] = dataclasses.field(default_factory=lambda: REFERENCES)
    ends: tuple[str, ...] = ENDS
    """References that may be empty or missing: of every table, or "table.field"."""
    fields: dict[str, dict[str, type]] = dataclasses.field(default_factory=lambda: FIELDS)
    mend: str = "extract nuScenes' metadata archive again"
    """What to do about tables that are broken, for sentences."""


SCHEMA = Schema()
SPLITS = "splits.json"
# nuScenes' own splits are of one version each; others are named in a version's splits.json.
BELONGS = {
    "trainval": ("train", "val", "train_detect", "train_track"),
    "mini": ("mini_train", "mini_val"),
    "test": ("test",),
}
NUSCENES = tuple(split for names in BELONGS.values() for split in names)


def versions(root: Path) -> list[str]:
    """Names of the folders in `root` that hold tables."""
    return sorted(path.parent.name for path in Path(root).glob("*/sample.json"))


def only_version(root: Path) -> str:
    """The version that the root has; raises ValueError if it has several or none."""
    found = versions(root)
    if len(found) > 1:
        raise ValueError(f"{root} has {', '.join(found)}: choose one of these as version.")
    if not found:
        check_root(root, "v1.0-*")  # says what to give instead
    return found[0]


def check_root(root: Path, version: str) -> None:
    """Raises ValueError, which says what folder or version to give, unless root/version is a folder of tables."""
    root = Path(root)
    if not root.is_dir():
        kind = "is a file" if root.is_file() else "does not exist"
        raise ValueError(f"{root} {kind}; give the folder that holds samples/, sweeps/, maps/ and {version}/.")
    if (root / version).is_dir():
        return
    if found := versions(root):
        raise ValueError(f"{root} has no {version}; it has {', '.join(found)}: choose one of these as version.")
    for above in list(root.resolve().parents)[:3]:
        if (above / version).is_dir() or versions(above):
            raise ValueError(f"{root} is inside the data set; give the folder above it as root: {above}.")
    below = sorted({path.parents[1] for depth in ("*/*", "*/*/*") for path in root.glob(f"{depth}/sample.json")})
    if below:
        raise ValueError(f"{root} is above the data set; give the folder inside it as root: {below[0]}.")
    if (root / "frame.json").is_file():
        raise ValueError(f"{root} holds a single key frame (frame.json), no nuScenes data set; give the root of one.")
    raise ValueError(
        f"{root} has no {version}; extract nuScenes' metadata archive there, or give another root (T4 data have annotation/ in it, "
        "data of one's own frames.json: docs/custom_data.md)."
    )


# --- splits ---


def splits(root: Path, version: str) -> dict[str, list[str]]:
    """Split: names of its scenes that the root has, for every split of this version with at least one scene.

    Raises ValueError, naming the file and what is wrong, for a splits.json that holds anything but lists of the version's
    scenes by names that can be folders' (files are named after splits).
    """
    from nuscenes.utils.splits import create_splits_scenes  # imports for seconds

    folder = Path(root) / version
    here = {str(scene.get("name")) for scene in read_table(folder / "scene.json")}
    ending = next((ending for ending in BELONGS if version.endswith(ending)), None)
    known = {s: names for s, names in create_splits_scenes().items() if ending is None or s in BELONGS[ending]}
    if (folder / SPLITS).is_file():
        known |= own_splits(folder / SPLITS, here)
    present = {split: [name for name in names if name in here] for split, names in known.items()}
    return {split: names for split, names in present.items() if names}


def own_splits(path: Path, here: set[str], told: str = "scene.json") -> dict[str, list[str]]:
    """The lists of a splits.json, of scenes that are `here`, as `told`. Raises ValueError."""
    own = read(path, dict, SCHEMA.mend if told == "scene.json" else "write it again")
    for split, scenes in own.items():
        if not isinstance(scenes, list) or not all(isinstance(name, str) for name in scenes):
            raise ValueError(f"{path}: {printable(split)} must be a list of names of scenes.")
        if file_name(split) != split:
            raise ValueError(
                f"{path}: '{printable(split)}' cannot name a split, since files are named after it; use letters, digits, "
                "'-', '_' and '.'."
            )
        if lost := [scene for scene in scenes if scene not in here]:
            raise ValueError(
                f"{path}: {split} names the scene {_short(lost[0])}, which {told} has not; correct one of them."
            )
    return own


def default_splits(root: Path, version: str) -> tuple[str, str] | None:
    """(the split to train on, the one to evaluate on) of a version where nobody names them; None if it has none such."""
    for ending in ("trainval", "mini"):
        if version.endswith(ending):
            return BELONGS[ending][0], BELONGS[ending][1]
    return ("train", "val") if {"train", "val"} <= splits(root, version).keys() else None


def shared_scenes(
    root: Path, version: str, training: str | None = None, evaluation: str | None = None
) -> dict[tuple[str, str], list[str]]:
    """(a split to train on, one to evaluate on): scenes that both have, where there are any.

    Of the pair that is named, a split that is not being the default; where none is, of the default pair and of every two
    splits that are not nuScenes'.
    """
    present, defaults = splits(root, version), default_splits(root, version) or ("", "")
    pairs = [(training or defaults[0], evaluation or defaults[1])]
    if training is None and evaluation is None:
        pairs += combinations([split for split in present if split not in NUSCENES], 2)
    found = {pair: sorted(set(present.get(pair[0], ())) & set(present.get(pair[1], ()))) for pair in pairs}
    return {pair: scenes for pair, scenes in found.items() if scenes and pair != (evaluation, evaluation)}


def scenes_of(root: Path, version: str, split: str) -> list[str]:
    """Names of the split's scenes; raises ValueError if the root has none."""
    present = splits(root, version)
    if split not in present:
        has = (
            f"the splits with scenes there (for --split, or a run's --train-split and --eval-split) are {', '.join(present)}"
            if present
            else "it has no scene of any split"
        )
        raise ValueError(f"{root}, {version}, has no scene of the split {split!r}; {has}.")
    return present[split]


# --- tables ---


def read_table(path: Path, mend: str = SCHEMA.mend) -> list[dict]:
    """The rows of a table. mend: see `Schema`. Raises ValueError if the file is missing, no complete JSON, or not a list of rows with tokens of
    their own."""
    rows = read(path, list, mend)
    if not all(isinstance(row, dict) and ("token" in row) for row in rows):
        raise ValueError(f"{path}: a row has no token; the table is damaged, {mend}.")
    if (odd := next((row["token"] for row in rows if not isinstance(row["token"], str)), None)) is not None:
        raise ValueError(f"{path}: a token is {_short(odd)}, no text; {mend}.")
    if len({row["token"] for row in rows}) < len(rows):
        (again, _), *_ = Counter(row["token"] for row in rows).most_common(1)
        raise ValueError(f"{path}: several rows have the token {_short(again)}; {mend}.")
    return rows


def read_tables(root: Path, version: str) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """(the tables that can be read, table: what is wrong with it for those that are missing, unreadable, or name rows
    that are nowhere)."""
    return read_folder(Path(root) / version)


def read_folder(folder: Path, schema: Schema = SCHEMA) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """`read_tables` of a folder of tables."""
    tables, problems = {}, {}
    for name in schema.tables:
        try:
            tables[name] = read_table(folder / f"{name}.json", schema.mend)
        except (ValueError, OSError) as error:
            problems[name] = str(error)
    return tables, problems | {
        name: f"{folder / name}.json: {what}; {schema.mend}." for name, what in wrong(tables, schema).items()
    }


def wrong(tables: dict[str, list[dict]], schema: Schema = SCHEMA) -> dict[str, str]:
    """Table: the first thing that is wrong with it: a field of another type, a row that is nowhere, or what must be there
    once twice. Tables that are not given are not missed."""
    tokens = {name: {row["token"] for row in rows} for name, rows in tables.items()}
    problems = {}
    for name, rows in tables.items():
        targets = {f: tokens[target] for f, target in schema.references.get(name, {}).items() if target in tokens}
        what = _wrong_field(rows, {"token": str, **schema.fields.get(name, {})})
        if what := what or _lost_row(rows, name, targets, schema):
            problems[name] = what
    if {"log", "map"} <= tables.keys() - problems.keys():
        mapped = {token for row in tables["map"] for token in row["log_tokens"] if isinstance(token, str)}
        if lost := sorted(tokens["log"] - mapped):
            problems["map"] = f"no map names the log {_short(lost[0])}"
    if {"sensor", "calibrated_sensor", "sample_data"} <= tables.keys() - problems.keys():
        problems |= _twice(tables)
    return problems


def _twice(tables: dict[str, list[dict]]) -> dict[str, str]:
    """Channels, and recordings of a key frame, of which there must be one."""
    channels = {row["token"]: row["channel"] for row in tables["sensor"]}
    if len(set(channels.values())) < len(channels):
        (channel, _), *_ = Counter(channels.values()).most_common(1)
        return {"sensor": f"several rows have the channel {_short(channel)}"}
    of = {row["token"]: channels[row["sensor_token"]] for row in tables["calibrated_sensor"]}
    rows = tables["sample_data"]
    seen = Counter((row["sample_token"], of[row["calibrated_sensor_token"]]) for row in rows if row["is_key_frame"])
    again = next((key for key, count in seen.items() if count > 1), None)
    if again is None:
        return {}
    return {"sample_data": f"key frame {_short(again[0])} has several rows of {_short(again[1])} with is_key_frame"}


def missing_maps(root: Path, version: str) -> list[Path]:
    """The map images that map.json names and the root lacks; the devkit does not start without them."""
    files = [Path(root) / str(row.get("filename")) for row in read_table(Path(root) / version / "map.json")]
    return [file for file in files if not is_file(file)]


def is_file(path: Path) -> bool:
    """Path.is_file, also of a name that is too long for a file to have."""
    try:
        return path.is_file()
    except OSError:
        return False


def read(path: Path, kind: type, mend: str = SCHEMA.mend) -> Any:
    """A JSON file's list or dict. Raises ValueError, naming the file, for anything else."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {mend}.")
    try:
        content = read_json(path.read_bytes(), finite=False)
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"{path} is truncated or damaged ({error}); {mend}.") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a {kind.__name__}; {mend}.")
    return content


def _wrong_field(rows: list[dict], fields: dict[str, type]) -> str:
    """What is wrong with the first field that is of another type, empty if none is."""
    for field, kind in fields.items():
        if odd := [row for row in rows if not _is(row.get(field), kind)]:
            first = _short(odd[0].get(field)) + _why(odd[0].get(field))
            return f"{field} of {len(odd)} of {len(rows)} rows is no {WORDS[kind]} (the first is {first})"
    return ""


def _lost_row(rows: list[dict], name: str, targets: dict[str, set[str]], schema: Schema) -> str:
    """What is wrong with the first field that names rows which are nowhere, empty if none does."""
    for field, tokens in targets.items():
        if lost := _dangling(rows, field, tokens, field in schema.ends or f"{name}.{field}" in schema.ends):
            return (
                f"{field} of {len(lost)} of {len(rows)} rows names no row of {schema.references[name][field]}.json (the first is "
                f"{_short(lost[0])}); one of the two is incomplete or of another version"
            )
    return ""


def _is(value: Any, kind: type) -> bool:
    """Of a JSON value; a whole number may be written with a point."""
    if kind is int:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, kind) and not (isinstance(value, str) and unusable(value))


def _why(value: Any) -> str:
    return f", which {why}" if isinstance(value, str) and (why := unusable(value)) else ""


def _dangling(rows: list[dict], field: str, tokens: set[str], open_ended: bool) -> list[Any]:
    """Values of `field` that are not in `tokens`, or no tokens at all, one per row that has such a value."""
    lost: list[Any] = []
    ends = ("", None) if open_ended else ()
    for row in rows:
        value = row.get(field)
        values = value if field.endswith("_tokens") and isinstance(value, list) else [value]
        lost += [v for v in values if not (v in tokens if isinstance(v, str) and v else v in ends)][:1]
    return lost


def _short(value: Any) -> str:
    """A value of a table for a sentence."""
    text = f"'{printable(value)}'" if isinstance(value, str) else f"a {type(value).__name__}: {printable(value)}"
    return text if len(text) <= 80 else f"{text[:80]}…"
