"""Helpers of test_fuzz.py: wrong files, and commands on them that may take so much time and memory and no more."""
