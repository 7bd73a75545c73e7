"""Real devices: which there are, which one is meant, and how they are used through libusb."""
