"""How many graphs Dynamo has compiled in this process since `torch._dynamo.reset()`, and how often it broke one."""

from torch._dynamo.utils import counters


def graph_counts() -> dict[str, int]:
    return {"graphs": counters["stats"].get("unique_graphs", 0), "breaks": sum(counters["graph_break"].values())}
