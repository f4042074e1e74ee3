"""The one error that glq raises for what a user can mend."""


class GlqError(ValueError):
    """Says what was expected, what was found, and what to do, in one or two lines."""


class ResumableError(GlqError):
    """Work that stopped for a reason outside of it, such as a full disk: the same command goes on where it stopped."""
