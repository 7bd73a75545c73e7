"""The page of ``farplug page``: a web server whose page is a client of running sessions.

A browser connects with one websocket; :mod:`~farplug.web.relay` passes its requests to the control socket of a session,
and the session's replies and events back. :mod:`~farplug.web.security` decides who may use the page,
:mod:`~farplug.web.methods` what it may ask for. ``docs/page.md`` describes it for users.
"""
