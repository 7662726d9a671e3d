"""Errors that a person can mend. Each message is one line: what was expected, what came, what to do next."""


class InputError(ValueError):
    """Input that cannot be used as given. Commands print the message alone and exit with code 2."""


class NonFiniteError(InputError):
    """A loss, gradient or Hessian product held NaN or infinity; the message names the batch and the parameter."""
