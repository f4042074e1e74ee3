"""The one error that glq raises for what a user can mend, and how to install what is missing."""


class GlqError(ValueError):
    """Says what was expected, what was found, and what to do, in one or two lines."""


class ResumableError(GlqError):
    """Work that stopped for a reason outside of it, such as a full disk: the same command goes on where it stopped."""


def how_to_install(extra: str) -> str:
    """What brings an extra: not the package of this name on PyPI, which is another project's."""
    return f"pip install '.[{extra}]' in a clone of glq (the glq on PyPI is another program)"
