"""Numeric comparison of a model with the implementation that published it: `bevfn parity CASE_DIR`."""
