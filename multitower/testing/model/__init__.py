"""Checks for authors of fused models."""
