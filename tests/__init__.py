"""A package, so that the benchmark imports the table of losses and the textbook's by name: ``from tests import naive``."""
