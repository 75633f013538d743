"""Exceptions of the library; each also derives from a built-in exception."""


class MultitowerError(Exception):
    """Base class of all exceptions of the library."""


class GraphError(MultitowerError, ValueError):
    """A graph is malformed or cannot be compiled."""


class TowerError(MultitowerError, ValueError):
    """A model cannot be used as a tower."""


class CheckpointError(MultitowerError, ValueError):
    """A checkpoint is missing, damaged, or does not belong to this model."""


class PluginError(MultitowerError, ImportError):
    """A plugin is not installed, cannot be imported, or has the wrong type."""


class ExportError(MultitowerError, ValueError):
    """A tower cannot be exported."""
