"""The one exception class for mistakes that the user can mend."""


class SamError(ValueError):
    """A user's mistake: the message is one line that names the value, what is allowed, and the fix."""


def one_line(error: BaseException) -> str:
    """The error's text on one line, with its class where it is not ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, SamError) else f"{type(error).__name__}: {text}"


def first_line(error: BaseException) -> str:
    """The first line of the error's text, its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
