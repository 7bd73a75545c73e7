"""The USB devices of this machine: list, watch and choose them, and find what prevents using one."""
