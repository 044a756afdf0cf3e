"""Train steps as one Ascend GE graph, made and checked on any machine. See docs/ascend.md."""
