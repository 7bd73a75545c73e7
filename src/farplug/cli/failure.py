"""Why a command failed, as it is reported to a person and to a program."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field

from farplug.cli import log
from farplug.errors import FarplugError, Reason, Remedy
from farplug.exit_codes import ExitCode, exit_code
from farplug.text import printable


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a command failed.

    Attributes:
        message: what happened.
        reason: for programs.
        exit_code: of the command.
        remedy: advice to the user.
    """

    message: str
    reason: Reason
    exit_code: ExitCode
    remedy: Remedy = field(default_factory=Remedy)

    @classmethod
    def of(cls, error: FarplugError) -> Failure:
        """Return the failure of a command that ends with an error."""
        return cls(error.message, error.reason, exit_code(error), error.remedy)

    def as_dict(self) -> dict[str, object]:
        """Return the event ``failed``, as JSON types."""
        return {
            "time": round(time.time(), 3),
            "event": "failed",
            "reason": str(self.reason),
            "message": self.message,
            **self.remedy.as_dict(),
            "exit_code": int(self.exit_code),
        }

    def report(self, *, as_json: bool) -> None:
        """Write the failure and its remedy to standard error; as JSON also to standard output, as the last line."""
        log.say(f"farplug: {printable(self.message)}")
        for line in log.remedy_lines(self.remedy):
            log.say(f"  {line}")
        if as_json:
            try:
                sys.stdout.write(json.dumps(self.as_dict()) + "\n")
                sys.stdout.flush()
            except OSError:
                log.discard(sys.stdout)
