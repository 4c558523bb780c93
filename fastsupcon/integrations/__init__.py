"""A module for each library whose users change one import. None is imported from here: some import their library."""
