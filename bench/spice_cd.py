"""Redirect spice-gtk's emulated CD without a window, as ``spicy --spice-share-cd=FILE`` does after a click.

``/usr/bin/python3 bench/spice_cd.py TARGET FILE``. The C library libspice-client-glib emulates the device and
implements usbredir; Python only runs its main loop. Needs Debian's python3-gi and gir1.2-spiceclientglib-2.0, which
only the system's Python can import.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import gi

gi.require_version("SpiceClientGLib", "2.0")
from gi.repository import GLib, GObject, SpiceClientGLib  # noqa: E402

RETRY = 50
"""Milliseconds between attempts, until the usbredir channels are connected."""


def share(target: str, image: str) -> int:
    """Redirect until SIGTERM, and return the exit code."""
    loop = GLib.MainLoop()
    session = SpiceClientGLib.Session()
    for name, value in {"uri": target, "enable-audio": False, "enable-smartcard": False}.items():
        session.set_property(name, value)
    manager = SpiceClientGLib.UsbDeviceManager.get(session)
    if not manager.create_shared_cd_device(image):
        print(f"spice-gtk does not accept {image} as a CD", file=sys.stderr)
        return 1

    def redirect() -> bool:
        """Try to redirect the CD; return whether to call this again."""
        for device in manager.get_devices():
            if manager.is_device_shared_cd(device):
                try:
                    manager.can_redirect_device(device)
                except GLib.Error:
                    return True
                manager.connect_device_async(device, None, redirected)
                return False
        return True

    def redirected(source: Any, result: Any) -> None:
        try:
            manager.connect_device_finish(result)
        except GLib.Error as error:
            print(f"spice-gtk cannot redirect its CD: {error.message}", file=sys.stderr)
            loop.quit()

    def channel_event(channel: Any, event: Any) -> None:
        if event not in (SpiceClientGLib.ChannelEvent.OPENED, SpiceClientGLib.ChannelEvent.SWITCHING):
            print(f"the SPICE connection ended: {event.value_nick}", file=sys.stderr)
            loop.quit()

    def channel_new(session: Any, channel: Any) -> None:
        if isinstance(channel, SpiceClientGLib.MainChannel):
            GObject.Object.connect(channel, "channel-event", channel_event)
        elif isinstance(channel, SpiceClientGLib.UsbredirChannel) and channel.get_property("channel-id") == 0:
            GLib.timeout_add(RETRY, redirect)

    # Session.connect is a method of SPICE, and hides the one of GObject.
    GObject.Object.connect(session, "channel-new", channel_new)
    session.connect()
    GLib.unix_signal_add(GLib.PRIORITY_DEFAULT, signal.SIGTERM, session.disconnect)
    GLib.unix_signal_add(GLib.PRIORITY_DEFAULT, signal.SIGTERM, loop.quit)
    loop.run()
    return 0


if __name__ == "__main__":
    sys.exit(share(*sys.argv[1:]))
