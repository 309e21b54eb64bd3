"""Where edit requests come from: files of JSON lines, and the built-in atlas."""

from remend.data.sources import read_source, read_text

__all__ = ["read_source", "read_text"]
