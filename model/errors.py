"""The one exception type that means: the user can mend this."""


class InputError(ValueError):
    """A setting, file or argument that the user can mend.

    Its message is one line that names the setting, its value, the consequence and the mend;
    the command line prints it as it is, without a traceback, and exits with code 2.
    """
