"""The one exception that the command line tool turns into a single line and exit code 2.

Modules raise it for anything a user can put right: a missing file, a policy that does not exist, a package
to install. Everything else is a bug and keeps its traceback.
"""


class UsageError(Exception):
    """Something that the user can put right; the message says how."""
