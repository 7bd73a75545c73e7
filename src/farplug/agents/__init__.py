"""Agents: programs with a language model that use a VM through the Model Context Protocol (MCP).

The server is a process of its own and a client of the control protocol: it can do no more than any other client. Only
:mod:`farplug.agents.server` imports the SDK ``mcp``, which is an extra.
"""
