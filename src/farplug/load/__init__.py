"""Load SPICE servers and proxies with many sessions, driven by Locust.

:mod:`farplug.load.user` is for locustfiles, and the only module that imports Locust. Locust replaces the sockets and
threads of the standard library with those of gevent, in which asyncio does not work. So each Locust process has its
sessions in another process, the load agent (:mod:`farplug.load.agent`), and calls it (:mod:`farplug.load.client`).
"""
