"""The errors that starkv raises on purpose; everything else is a defect.

The command line turns a :class:`StarkvError` into its message on stderr and its ``exit_code``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Self


class StarkvError(Exception):
    """Base of all deliberate errors. The message says what is wrong, where, and what to do."""

    exit_code: ClassVar[int] = 1

    @classmethod
    def many(cls, title: str, lines: Iterable[str]) -> Self:
        """One error for several offenders: ``title``, then a line for each of them.

        A single offender stays on the title's line.
        """
        offenders = list(lines)
        if len(offenders) == 1:
            return cls(f"{title}: {offenders[0]}")
        return cls("\n".join([f"{title}:", *(f"  {line}" for line in offenders)]))


class UserError(StarkvError):
    """Bad input: a recipe, an option, a file or a model that cannot be used as given."""

    exit_code = 2


class RunFailure(StarkvError):
    """Input was fine and the run still failed, for example for a loss that is not finite."""

    exit_code = 1
