"""The one error that glq raises for what a user can mend."""


class GlqError(ValueError):
    """Says what was expected, what was found, and what to do, in one or two lines."""
