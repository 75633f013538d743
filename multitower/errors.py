"""The errors of the library; each is one of Python's own kinds, too."""


class MultitowerError(Exception):
    """What all errors of the library's own are."""


class GraphError(MultitowerError, ValueError):
    """A graph that is malformed, or cannot be compiled."""


class TowerError(MultitowerError, ValueError):
    """A model that cannot be used as a tower."""


class CheckpointError(MultitowerError, ValueError):
    """A checkpoint that is missing, damaged, or not of this model."""


class PluginError(MultitowerError, ImportError):
    """A plugin that is not installed, cannot be imported, or is not what it should be."""


class ExportError(MultitowerError, ValueError):
    """A tower that cannot be exported."""
