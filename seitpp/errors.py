"""The one kind of error that is shown without a traceback."""


class UserError(ValueError):
    """Something that the person who runs the program can mend: one line with got, expected, where, what to do.

    Programs print it and exit with status 2. Every other exception is a defect and keeps its traceback.
    """
