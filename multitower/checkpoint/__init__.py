"""Save and load fused models, in the format that ``docs/format.md`` specifies."""
