"""``python -m multitower`` is the command ``multitower``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
