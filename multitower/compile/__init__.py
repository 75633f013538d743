"""Compile a declaration to towers, modules and a schedule of layers and taps."""
