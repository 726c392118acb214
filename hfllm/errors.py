"""The one exception for what a user can mend: recipes print its message as a single line and stop."""


class InputError(ValueError):
    """Bad input. The message names the file, row, field or flag, the value seen and what is accepted."""
