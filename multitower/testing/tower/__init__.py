"""Checks for authors of towers."""
