"""Published checkpoints: foreign names, layouts and files. The only room that knows them.

`names_*` give a family's modules their upstream names, `checkpoints` lists what can be imported, `recognise` tells models and
layouts apart, `convert` goes both ways, `storage` and `torch_file` read and write, `merge` starts one model from several checkpoints.
"""

from bevfn.upstream.checkpoints import CHECKPOINTS
from bevfn.upstream.convert import Account, Refused, export_state, import_state, nest
from bevfn.upstream.entries import Entry, impossible
from bevfn.upstream.merge import Loaded, Merge, load_into
from bevfn.upstream.storage import (
    Imported,
    NotImported,
    read_imported,
    read_state_dict,
    write_imported,
    write_state_dict,
)

__all__ = [
    "CHECKPOINTS",
    "Account",
    "Entry",
    "Imported",
    "Loaded",
    "Merge",
    "NotImported",
    "Refused",
    "export_state",
    "import_state",
    "impossible",
    "load_into",
    "nest",
    "read_imported",
    "read_state_dict",
    "write_imported",
    "write_state_dict",
]
