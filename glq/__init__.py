"""glq: language models 4–8 times smaller with the E8 lattice."""

__version__ = "0.1.0"
