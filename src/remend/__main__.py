"""``python -m remend``."""

from remend.cli import main

main()
