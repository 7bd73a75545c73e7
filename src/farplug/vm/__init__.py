"""The throw-away QEMU guest: its kernel and initramfs, QEMU itself, and the agent that runs commands in it."""
