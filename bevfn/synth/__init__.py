"""The synthetic world: a data set in nuScenes' own format, made from a seed. Its rules are in `world`."""

from bevfn.synth.dataset import DESCRIPTION, Format, write

__all__ = ["DESCRIPTION", "Format", "write"]
