"""Pipelines and conversations from raw data to raw data."""
