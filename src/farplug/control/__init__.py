"""The control protocol of a running session: JSON lines over a UNIX socket.

:mod:`~farplug.control.server` serves an application, :mod:`~farplug.control.client` uses one, and
:mod:`~farplug.control.names` gives sessions their names and finds them. ``docs/control.md`` is the specification.
"""
