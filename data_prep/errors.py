"""The two ways in which preparing can go wrong: one input is refused, or the user has to change something."""

from __future__ import annotations

import errno

# What the system says when a disk, a mount or the machine fails, whatever the file holds.
_MACHINE_FAULTS = {
    *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ENODEV, errno.ENOMEM, errno.EMFILE, errno.ENFILE),
    *(errno.ENOTCONN, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ESHUTDOWN),
}


class Rejected(Exception):  # noqa: N818  (an outcome of one input, not an error of the program)
    """One input cannot become a sample; the text is the reason, `category: detail`, as the user reads it."""


class Interrupted(Exception):  # noqa: N818
    """A helper process died or ran out of a limit while on one input; worth another try.

    `outside`: it was killed by somebody else, which says little about the input.
    """

    def __init__(self, words: str, outside: bool = False) -> None:
        super().__init__(words)
        self.outside = outside


class UserError(ValueError):
    """Something the user has to change; printed as one line, exit code 2."""


def is_machines_fault(error: OSError) -> bool:
    """Whether an input that could not be read may be sound: its disk or mount failed."""
    return error.errno in _MACHINE_FAULTS
