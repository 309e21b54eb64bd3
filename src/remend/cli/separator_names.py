"""What stands between a prompt and its target, in words."""

SEPARATORS = {"": "nothing", " ": "a space", "\n": "a line break"}
