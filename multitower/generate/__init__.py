"""Decoding, one segment after another or several towers at once."""
