"""The one error that the commands show to a user without a traceback."""


class UserError(Exception):
    """Something that the user can put right; the message says what is wrong, where, and what to do."""


class WriteError(UserError):
    """A file could not be written; the message names it and says why."""
