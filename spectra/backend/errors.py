"""Errors that the user can fix. Each message is one line: what was expected, what came, what to do next."""


class InputError(ValueError):
    """Input that cannot be used as given. Commands print only the message and exit with code 2."""


class NonFiniteError(InputError):
    """A loss, gradient or Hessian-vector product that is NaN or infinite.

    The message names the batch and the parameter.
    """


def check_whole(**numbers: object) -> None:
    """Refuse numbers that are not whole, such as 2.5, "10" or None.

    Args:
        **numbers: The numbers by the names that messages give them. Those of NumPy are whole numbers too.

    Raises:
        InputError: For the first that is no whole number.
    """
    for name, number in numbers.items():
        if isinstance(number, bool) or not hasattr(number, "__index__"):
            raise InputError(f"{name} must be a whole number, got {number!r}")


def first_line(error: BaseException) -> str:
    r"""The first line of an error's message without its closing punctuation, or the name of its class if it has none.

    Errors of other libraries may have many lines. Messages of `spectra` quote the first one.

    Args:
        error: Any exception.

    Returns:
        The line.

    Example:
        >>> first_line(RuntimeError("no such device.\nStack trace: ..."))
        'no such device'
        >>> first_line(KeyError())
        'KeyError'
    """
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(" .:") if lines else "") or type(error).__name__
