"""A file per loss: its formula, its function, its module."""
