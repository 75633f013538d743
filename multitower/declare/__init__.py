"""Declarations of fusions: plain data; no torch module is run."""
