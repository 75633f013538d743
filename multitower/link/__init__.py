"""Links: cross-attention from one tower to another."""
