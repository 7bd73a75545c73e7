"""How usbredir's bytes travel: TCP, UNIX sockets, TLS, SPICE sessions, memory. asyncio lives here."""
