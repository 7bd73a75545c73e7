"""The USB devices of this machine: list, watch and choose them, and find what keeps one from being used."""
