"""An E8 KV cache: `codec.py` rounds head vectors; `cache.py` keeps them for transformers, `pages.py` for a server."""
