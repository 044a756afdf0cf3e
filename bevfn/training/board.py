"""A run's numbers, pictures and config as TensorBoard reads them, one event file of its own for every start of the run.

Not through torch's SummaryWriter: it writes in a thread, whose traceback is all that one hears of a full disk.
"""

import io
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bevfn.files import to_json, write_whole, writing

FOLDER = "tensorboard"


class TensorBoard:
    """A `loggers.Logger`, whose lines are in the file when it returns. Raises NotWritten if the disk does not take them."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], start_step: int) -> None:
        """start_step: steps done where a run goes on; TensorBoard drops what older files have behind it."""
        folder = run_dir / FOLDER
        with writing(folder):
            continued = folder.exists()
            folder.mkdir(exist_ok=True)
            # Unbuffered: what a full disk refused must not be tried again, and fail again, when it is closed.
            self._file = open(folder / _event_file(), "wb", buffering=0)  # noqa: SIM115  (`close` does)
            write_whole(self._file, _first_events(start_step if continued else None, config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step by name."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._write(step, [Summary.Value(tag=name, simple_value=value) for name, value in values.items()])

    def image(self, step: int, name: str, png: bytes) -> None:
        """A picture of a step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = struct.unpack(">II", png[16:24])  # of the PNG's header
        image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
        self._write(step, [Summary.Value(tag=name, image=image)])

    def close(self) -> None:
        """No more comes."""
        self._file.close()

    def _write(self, step: int, values: list) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        with writing(Path(self._file.name)):
            write_whole(self._file, _record(Event(step=step, summary=Summary(value=values))))


def _event_file() -> str:
    """A new name; TensorBoard reads a folder's files in the order of their names."""
    seconds, rest = divmod(time.time_ns(), 10**9)
    return f"events.out.tfevents.{seconds:010d}.{rest:09d}.{socket.gethostname()}.{os.getpid()}"


def _first_events(start_step: int | None, config: Mapping[str, Any]) -> bytes:
    """What an event file begins with: that older files count up to `start_step` alone, if that is given, and the config."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    events = [Event(file_version="brain.Event:2")]
    if start_step is not None:
        events.append(Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))
    if config:
        events.append(Event(step=start_step or 0, summary=_text("config", config)))
    return b"".join(map(_record, events))


def _text(tag: str, config: Mapping[str, Any]) -> Any:
    """A table of the config's flags, as the plugin for texts has it."""
    from tensorboard.compat.proto import summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2

    rows = [f"| {name} | `{to_json(value).decode()}` |" for name, value in config.items()]
    shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)])
    content = "\n".join(["| flag | value |", "|---|---|", *rows]).encode()
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[content], tensor_shape=shape)
    plugin = summary_pb2.SummaryMetadata(
        plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name="text"),
    )
    return summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, metadata=plugin, tensor=tensor)])


def _record(event: Any) -> bytes:
    """A record of an event file: length and content, each with its CRC."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    event.wall_time = time.time()
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
