"""The application: what a user asks for, the guests, what is plugged into them, and one stream of events.

Clients (the command line, later a page, a control socket and agents) import this package, and never each other.
"""
