"""The one exception class for mistakes that the user can mend."""


class SamError(ValueError):
    """A user's mistake: the message is one line that names the value, what is allowed, and the fix."""
