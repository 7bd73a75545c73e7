"""The values of a command's parameters.

Typer converts them with pydantic. To import it, and to make a schema of each parameter, takes longer than all else of a
short command. Strings, paths and choices need neither.
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, get_args, get_origin

_TYPER: Final = object()
"""In place of a value that is left to Typer."""


class _Values:
    """Converts the values of one parameter. Typer gets the others, and those that are not valid.

    Args:
        parameter: an option or an argument, as Typer makes it.
    """

    def __init__(self, parameter: Any) -> None:
        annotation = parameter.type_descriptor.annotation
        self._is_list = get_origin(annotation) is list
        self._type = get_args(annotation)[0] if self._is_list else annotation

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return what a command gets for the value, or the values, of the command line or a default."""
        if not self._is_list:
            converted = None if value is None else _convert(value, self._type)
            left = converted is _TYPER
        else:
            converted = [_convert(one, self._type) for one in value or ()]
            left = _TYPER in converted
        if left:
            param._runtime_param = None
            return param.get_runtime_param().coerce(value, param=param, ctx=ctx)
        return converted


def _convert(value: Any, kind: Any) -> Any:
    if not isinstance(kind, type):
        return _TYPER
    if isinstance(value, kind):
        return value
    if kind is float and isinstance(value, int):  # a default
        return float(value)
    if issubclass(kind, StrEnum) and value in {str(member) for member in kind}:
        return kind(value)
    if kind is Path and (not os.path.exists(value) or os.access(value, os.R_OK)):
        return Path(value)
    return _TYPER


def without_pydantic(parameter: Any) -> None:
    """Have Typer import pydantic only for values that need a check."""
    if hasattr(parameter, "type_descriptor"):  # an earlier Typer converts without pydantic
        parameter._runtime_param = _Values(parameter)
