"""Autoregressive decoding: one segment after another, or several towers at once."""
