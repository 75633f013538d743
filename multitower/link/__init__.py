"""Links: cross-attention from one tower to another, and what it is made of."""
