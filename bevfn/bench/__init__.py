"""Measured figures against peers and against the machine's limits."""
