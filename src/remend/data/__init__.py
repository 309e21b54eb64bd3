"""Edit requests from files, published data sets and the built-in facts."""

from remend.data.source_names import read_source
from remend.data.text_files import read_text

__all__ = ["read_source", "read_text"]
