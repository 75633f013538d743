"""A fused model on disk, as ``docs/format.md`` specifies it."""
