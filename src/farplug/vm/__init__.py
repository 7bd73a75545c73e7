"""The throw-away QEMU guest: its kernel and initramfs, the QEMU process, and the agent that runs commands in it."""
