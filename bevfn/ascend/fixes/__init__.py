"""What torchair lacks or converts silently wrong, and what takes its place; docs/ascend.md lists each with its reason.

- decompositions: an operator becomes others while the step is traced (plain tensor math, checked on any CPU);
- rewrites: the traced graph is changed for the device;
- refusals: an operator that cannot be right is an error with the way out;
- converters: a stock GE type does the job.
"""
