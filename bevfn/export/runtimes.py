"""TIER IV's TensorRT plugins for sparse convolutions, as far as a command line asks: names of their versions, and their limit.

Autoware names its models by AWML's release of BEVFusion, and so are the plugins here that run them:

| runtime | autoware_universe | GetIndicePairsImplicitGemm | ImplicitGemm |
|---|---|---|---|
| 2.7 | before pull requests 12631, 12658 (May and June 2026) | exactly 11 attributes | exactly 6 attributes, 5 inputs |
| 2.8 | with them | 12: `do_sort`; without it a warning that the older form will go | 7: `act_type`; a sixth input, the bias |

Source: autoware_universe perception/autoware_tensorrt_plugins, src/*_plugin_creator.cpp at 79578ec (2.7), include/*_plugin.hpp
at 081957b and 3c46ea3 (2.8); its pull requests 12631, 12658 and issue 13067; AWML's pull requests 211 and 220.
"""

from dataclasses import dataclass

from bevfn.names import printable
from bevfn.training.limits import Limit

ROOM = 256_000
"""sites that a plugin has room for, voxels too (`out_indices_num_limit_` in get_indices_pairs_implicit_gemm_plugin.hpp)"""
LIMITS = dict.fromkeys(("voxel_capacity", "site_capacity"), Limit(1, ROOM, why=", the room of autoware's plugins"))
"""of flags, for `training.limits.check`"""


@dataclass(frozen=True)
class Runtime:
    """What a version of the plugins takes."""

    sorts: bool
    """the pair node is told whether to sort (`do_sort`); AWML's releases since 2.7.1_opt do not (pull request 211)"""
    fuses: bool
    """the convolution adds a bias and applies a ReLU"""


RUNTIMES = {"2.7": Runtime(sorts=False, fuses=False), "2.8": Runtime(sorts=True, fuses=True)}
NEWEST = "2.8"


def known(name: str) -> Runtime:
    """The runtime of that name. Raises ValueError, one sentence, for another."""
    if name not in RUNTIMES:
        raise ValueError(f"runtime {printable(name)} is unknown; choose one of {', '.join(RUNTIMES)}")
    return RUNTIMES[name]
