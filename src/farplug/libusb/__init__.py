"""libusb, typed: the one package that imports python-libusb1."""
