"""What the losses cost, in time and memory, against the naive loss and the peers: ``python -m bench``. NOTES.md says how to read it."""
