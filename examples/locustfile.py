"""Load a SPICE proxy with sessions that plug a virtual disk into VMs, with Locust.

    pip install 'farplug[load]'
    locust -f locustfile.py --processes -1 --farplug-targets targets.txt

targets.txt has one VM a line. With KERBSIDE and KERBSIDE_JWT in the environment, a line is SOURCE/UUID of a console of
the proxy kerbside, and each session gets a console.vv of its own: its token is valid for a minute. Otherwise a line is
spice://HOST:PORT or the path of a .vv file. A program in the VMs reads and writes the disk: see docs/load.md.
"""

import os

import requests
from locust import between, task

from farplug.errors import Reason, TargetError
from farplug.load.user import FarplugUser

KERBSIDE = os.environ.get("KERBSIDE", "")
JWT = os.environ.get("KERBSIDE_JWT", "")
READS = int(os.environ.get("READS", "4"))


class DiskUser(FarplugUser):
    wait_time = between(0.5, 1.5)

    def vv_of(self, target: str) -> str | None:
        if not KERBSIDE:
            return None
        url = f"{KERBSIDE}/console/proxy/{target}/console.vv"
        try:
            response = requests.get(url, headers={"Authorization": f"Bearer {JWT}"}, timeout=self.timeout)
            response.raise_for_status()
        except requests.RequestException as error:
            status = "no answer" if error.response is None else f"status {error.response.status_code}"
            raise TargetError(f"kerbside sent no console.vv: {status}", reason=Reason.UNREACHABLE) from error
        return response.text

    @task
    def use_a_disk(self) -> None:
        self.connect()
        self.attach()
        for _ in range(READS):
            self.read()
            self.write()
        self.detach()
        self.close()
