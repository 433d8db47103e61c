"""The commands that use a finished model: `tokenrl evaluate` and `tokenrl sample`."""
