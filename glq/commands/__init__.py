"""Commands with a module each; `cli.py` has the others, and registers all. They import what they run when it runs."""
