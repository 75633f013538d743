"""Used by every layer of the library: optional dependencies, the logger, the version."""
