"""Two capture engines, one form: see :mod:`mpgraph.ir` for what they yield."""
