"""The ``mpgraph`` command: one file per sub-command."""
