"""Files that are written whole or not at all, read without trust, and checked value by value."""
