"""Checks for authors of modalities."""
