"""A module per library whose users change one import; each imports its library, so none is imported from here."""
