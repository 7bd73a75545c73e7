"""A project that tests with VMs: ``python -m farplug.testing.project`` writes it into the current folder."""
