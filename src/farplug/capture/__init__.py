"""Captures that Wireshark decodes: what moved through the ports of a guest, as a pcapng file."""
