"""How to reach the API of a Kubernetes cluster: the user's kubeconfig, credential plugins, the account of a pod.

``kubectl`` reads the kubeconfig, which may be several files of YAML, and prints one context of it as JSON. The formats
are those of client-go: ``k8s.io/client-go/tools/clientcmd/api/v1``, and ``client.authentication.k8s.io`` for plugins.
Nothing here logs, and no message contains what a kubeconfig or a plugin has as a secret.
"""

from __future__ import annotations

import base64
import json
import os
import re
import ssl
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from farplug.child import ChildFailed, Ended, run_child
from farplug.errors import Reason, Remedy, SetupError, TargetError, UsageError
from farplug.programs import find_program
from farplug.shell import shell_word
from farplug.text import printable, shown
from farplug.transport import tls
from farplug.transport.connection import TcpAddress
from farplug.transport.proxy import HttpProxy

KUBECTL_TIMEOUT: Final = 20.0
"""Seconds that kubectl may take to print the kubeconfig; it contacts no server."""
PLUGIN_TIMEOUT: Final = 60.0
"""Seconds that a credential plugin may take: it may log in over the network."""
MAX_CONFIG: Final = 4 << 20
"""The largest kubeconfig, in bytes of JSON."""
MAX_CREDENTIAL: Final = 256 << 10
"""The most bytes that a credential plugin may print, and the largest file with a token."""
EXPIRY_MARGIN: Final = 10.0
"""Seconds before they expire at which credentials of a plugin are fetched anew."""

ACCOUNT_FOLDER = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes puts the token and the authority of a pod's account."""
EXEC_VERSIONS: Final = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")
"""The versions of the protocol of credential plugins."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What identifies this side to the API.

    Attributes:
        headers: names and values of a request.
        certificate: of the client, PEM; empty: none.
        key: of the certificate, PEM.
        expires: in seconds since 1970; None: unknown.
    """

    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    certificate: str = field(default="", repr=False)
    key: str = field(default="", repr=False)
    expires: float | None = None

    @property
    def empty(self) -> bool:
        """Return whether there are none."""
        return not self.headers and not self.certificate


@dataclass(frozen=True, slots=True)
class Cluster:
    """The API server of a cluster.

    Attributes:
        address: host and port.
        path: before that of each resource; without a slash at the end.
        secure: whether it is reached over TLS.
        ca: certificates to trust, PEM; None: the system's.
        tls_name: the name that its certificate must have.
        proxy: of the way to it; None: there is none.
    """

    address: TcpAddress
    path: str = ""
    secure: bool = True
    ca: str | None = field(default=None, repr=False)
    tls_name: str = ""
    proxy: HttpProxy | None = None

    def __str__(self) -> str:
        return f"{'https' if self.secure else 'http'}://{self.address}{self.path}"

    def context(self, credentials: Credentials) -> ssl.SSLContext | None:
        """Return the TLS context with the client's certificate; None: there is no TLS.

        Raises:
            UsageError: a certificate or a key cannot be used.
        """
        if not self.secure:
            return None
        try:
            context = tls.client_context(ca=self.ca, check_hostname=True)
        except UsageError:
            _bad("has a certificate-authority that is not a certificate in PEM format")
        if credentials.certificate:
            _load_certificate(context, credentials)
        return context


def _load_certificate(context: ssl.SSLContext, credentials: Credentials) -> None:
    """Load a client's certificate, which Python reads from files only: in a folder that no other user can read."""
    try:
        with tempfile.TemporaryDirectory(prefix="farplug-") as folder:
            paths = Path(folder, "certificate"), Path(folder, "key")
            for path, text in zip(paths, (credentials.certificate, credentials.key), strict=True):
                path.touch(0o600)
                path.write_text(text, encoding="utf-8")
            context.load_cert_chain(*paths, password=_no_password)
    except (ssl.SSLError, _Encrypted):
        _bad("has a client certificate that cannot be used with its key")
    except OSError as error:
        raise SetupError(
            f"the client certificate cannot be written to a temporary file: {(error.strerror or '').lower()}",
            reason=Reason.IO_ERROR,
        ) from None


class _Encrypted(Exception):
    """A key has a password, which OpenSSL would ask for on the terminal."""


def _no_password() -> NoReturn:
    raise _Encrypted


class Access:
    """The way to the API of a cluster, with credentials that are fetched when they are needed.

    Args:
        cluster: the server.
        user: the ``user`` of the kubeconfig: JSON.
        where: for messages: "the context 'lab'".
        exec_cluster: what credential plugins may get about the cluster.

    Attributes:
        cluster: as above.
        where: as above.
    """

    def __init__(self, cluster: Cluster, user: Mapping[str, Any], where: str, exec_cluster: Any = None) -> None:
        self.cluster = cluster
        self.where = where
        self._user = user
        self._exec_cluster = exec_cluster
        self._kept: Credentials | None = None
        _check_user(user)

    async def credentials(self) -> Credentials:
        """Return credentials that have not expired, as far as is known.

        Raises:
            UsageError: ``kubeconfig``: the kubeconfig is not valid, or needs what farplug does not support.
            SetupError: ``missing-program``: the credential plugin is not installed.
            TargetError: ``credentials``: the plugin failed, or a file with a token cannot be read.
        """
        kept = self._kept
        if kept is None or (kept.expires is not None and time.time() > kept.expires - EXPIRY_MARGIN):
            kept = self._kept = await self._fetch()
        if not kept.empty and not self.cluster.secure:
            raise UsageError(
                f"{self.where}: the server {self.cluster} is reached without TLS: the credentials would be readable",
                reason=Reason.KUBECONFIG,
                remedy="use https:// in the kubeconfig's cluster",
            )
        return kept

    def forget(self) -> bool:
        """Fetch the credentials anew at the next use; return whether that may make a difference."""
        self._kept = None
        return "exec" in self._user or "tokenFile" in self._user

    async def _fetch(self) -> Credentials:
        user = self._user
        headers = _impersonation(user)
        certificate, key = (_decoded(user, name) for name in ("client-certificate-data", "client-key-data"))
        token, expires = _text(user, "token"), None
        if path := _text(user, "tokenFile"):
            token, expires = _read(Path(path), "the file with the token"), 0.0  # it is replaced from time to time
        if not token and not certificate and isinstance(plugin := user.get("exec"), dict):
            status = await self._run(plugin)
            token, certificate, key = (
                _text(status, name) for name in ("token", "clientCertificateData", "clientKeyData")
            )
            if not token and not (certificate and key):
                raise self._plugin_failed(plugin, "printed neither a token nor a certificate with its key")
            expires = _time(_text(status, "expirationTimestamp"))
        if token:
            if not re.fullmatch(r"[\x21-\x7e]{1,65536}", token := token.strip()):
                raise TargetError(f"{self.where}: its token is not valid", reason=Reason.CREDENTIALS)
            headers.insert(0, ("Authorization", f"Bearer {token}"))
        elif user.get("username"):
            pair = f"{_text(user, 'username')}:{_text(user, 'password')}".encode()
            headers.insert(0, ("Authorization", f"Basic {base64.b64encode(pair).decode()}"))
        return Credentials(tuple(headers), certificate, key, expires)

    # Credential plugins -----------------------------------------------------------------------------------------------

    async def _run(self, plugin: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the status that a credential plugin prints."""
        version, command = _text(plugin, "apiVersion"), _text(plugin, "command")
        if version not in EXEC_VERSIONS:
            _bad(
                f"has a credential plugin of the version {shown(version)}",
                remedy=f"use one of {' '.join(EXEC_VERSIONS)}",
            )
        if plugin.get("interactiveMode") == "Always":
            _bad(
                f"has the credential plugin {shown(command)}, which needs a terminal",
                remedy="log in with it, and use a plugin or a context that needs none",
            )
        spec: dict[str, Any] = {"interactive": False}
        if plugin.get("provideClusterInfo"):
            spec["cluster"] = self._exec_cluster
        info = {"kind": "ExecCredential", "apiVersion": version, "spec": spec}
        environment = {"KUBERNETES_EXEC_INFO": json.dumps(info)}
        for variable in _objects(plugin, "env"):
            environment[_text(variable, "name")] = _text(variable, "value")
        arguments = plugin.get("args") or []
        if not isinstance(arguments, list) or not all(isinstance(argument, str) for argument in arguments):
            _bad("has arguments of a credential plugin that are not text")
        try:
            ended = await run_child(
                command, *arguments, timeout=PLUGIN_TIMEOUT, max_output=MAX_CREDENTIAL, environment=environment
            )
        except ChildFailed as error:
            raise self._plugin_failed(plugin, str(error)) from None
        except (OSError, ValueError) as error:
            why = os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else "not a valid name"
            raise SetupError(
                f"the credential plugin {shown(command)} of {self.where} cannot be started: {why}",
                reason=Reason.MISSING_PROGRAM,
                remedy=_hint(plugin) or "install it",
            ) from None
        return self._status(plugin, version, ended)

    def _status(self, plugin: Mapping[str, Any], version: str, ended: Ended) -> Mapping[str, Any]:
        if ended.code:
            raise self._plugin_failed(plugin, ended.why)
        try:
            printed = json.loads(ended.output)
        except (ValueError, RecursionError):
            raise self._plugin_failed(plugin, "printed something that is not JSON") from None
        if not isinstance(printed, dict) or printed.get("kind") != "ExecCredential":
            raise self._plugin_failed(plugin, "printed something that is not an ExecCredential")
        if printed.get("apiVersion") != version:
            raise self._plugin_failed(plugin, f"printed another version than {version}")
        status = printed.get("status")
        if not isinstance(status, dict):
            raise self._plugin_failed(plugin, "printed an ExecCredential without a status")
        for name in ("token", "clientCertificateData", "clientKeyData", "expirationTimestamp"):
            if not isinstance(status.get(name) or "", str):
                raise self._plugin_failed(plugin, f"printed an ExecCredential whose {name} is not text")
        return status

    def _plugin_failed(self, plugin: Mapping[str, Any], what: str) -> TargetError:
        command = _text(plugin, "command")
        return TargetError(
            f"the credential plugin {shown(command)} of {self.where} {what}",
            reason=Reason.CREDENTIALS,
            remedy=_hint(plugin) or "log in again; kubectl uses the same plugin",
        )


# The kubeconfig -------------------------------------------------------------------------------------------------------


async def load_access(context: str) -> Access:
    """Return the way to the API of a cluster.

    Without a context, and in a pod that has no kubeconfig, that of the pod's account; otherwise that of the kubeconfig.

    Args:
        context: of the kubeconfig; empty: the current one.

    Raises:
        SetupError: ``missing-program``: kubectl is not installed.
        UsageError: ``kubeconfig``: there is no such context, or the kubeconfig is not valid.
        TargetError: ``credentials``: the files of the account cannot be read.
    """
    if not context and _in_pod():
        return _account()
    config = await _kubeconfig(context)
    name = _text(config, "current-context")
    chosen = _named(config, "contexts", "context", name)
    cluster = _named(config, "clusters", "cluster", _text(chosen, "cluster"))
    user_name = _text(chosen, "user")
    user = _named(config, "users", "user", user_name) if user_name else {}
    return Access(parse_cluster(cluster), user, f"the context {shown(name)}", _exec_cluster(cluster))


async def _kubeconfig(context: str) -> Mapping[str, Any]:
    command = ["config", "view", "--raw", "--minify", "--flatten", "--output=json"]
    if context:
        command.append(f"--context={context}")
    shown_command = " ".join(map(shell_word, ("kubectl", *(word for word in command if word != "--raw"))))
    try:
        ended = await run_child(str(find_program("kubectl")), *command, timeout=KUBECTL_TIMEOUT, max_output=MAX_CONFIG)
    except ChildFailed as error:
        raise TargetError(
            f"kubectl {error}", reason=Reason.KUBECONFIG, remedy=Remedy("try it", command=shown_command)
        ) from None
    if ended.code:
        if "cannot locate context" in ended.complaint or "no context exists" in ended.complaint:
            remedy = Remedy("the contexts of the kubeconfig are listed by", command="kubectl config get-contexts")
            raise UsageError(f"the kubeconfig has no context {shown(context)}", reason=Reason.KUBECONFIG, remedy=remedy)
        remedy = Remedy("name a context in the target, or repair the kubeconfig", command=shown_command)
        raise UsageError(f"the kubeconfig cannot be used: kubectl {ended.why}", reason=Reason.KUBECONFIG, remedy=remedy)
    try:
        config = json.loads(ended.output)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UsageError(
            "kubectl printed something that is not a kubeconfig in JSON",
            reason=Reason.KUBECONFIG,
            remedy=Remedy("check which kubectl this is", command="kubectl version --client"),
        )
    return config


def parse_cluster(cluster: Mapping[str, Any], environment_proxy: bool = True) -> Cluster:
    """Return the server of a ``cluster`` of a kubeconfig.

    Args:
        cluster: JSON.
        environment_proxy: use the proxy of the environment, as kubectl does.

    Raises:
        UsageError: ``kubeconfig``: it is not valid, or turns the check of the server's certificate off.
    """
    server = _text(cluster, "server")
    try:
        url = urlsplit(server)
        host, port = url.hostname or "", url.port
    except ValueError:
        host, port = "", None
    if not host or url.scheme not in ("http", "https") or url.query or url.fragment or url.username is not None:
        _bad(f"has a server that is not a URL as https://HOST:PORT: {shown(server.rpartition('@')[2])}")
    if not re.fullmatch(r"[\x21-\x7e]*", server):
        _bad("has a server with characters that are not valid in a URL")
    secure = url.scheme == "https"
    if cluster.get("insecure-skip-tls-verify") and secure:
        raise UsageError(
            f"the kubeconfig turns the check of the server {host} off (insecure-skip-tls-verify)",
            reason=Reason.TLS_UNTRUSTED,
            remedy="give the cluster's authority in the kubeconfig: certificate-authority-data",
        )
    proxy_url = _text(cluster, "proxy-url")
    if not proxy_url and environment_proxy and not proxy_bypass(host):
        proxy_url = getproxies().get(url.scheme, "")
    return Cluster(
        address=TcpAddress(host, port or (443 if secure else 80)),
        path=url.path.rstrip("/"),
        secure=secure,
        ca=_decoded(cluster, "certificate-authority-data") or None,
        tls_name=_text(cluster, "tls-server-name") or host,
        proxy=HttpProxy.parse(proxy_url) if proxy_url else None,
    )


def _exec_cluster(cluster: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a credential plugin gets about the cluster (``ExecCredential.spec.cluster``)."""
    names = ("server", "tls-server-name", "insecure-skip-tls-verify", "certificate-authority-data", "proxy-url")
    info = {name: cluster[name] for name in names if name in cluster}
    for extension in _objects(cluster, "extensions"):
        if extension.get("name") == "client.authentication.k8s.io/exec":
            info["config"] = extension.get("extension")
    return info


def _check_user(user: Mapping[str, Any]) -> None:
    """Raise an error for what a user of a kubeconfig has, and farplug does not support."""
    for name, remedy in (
        ("auth-provider", "kubectl does not support it since version 1.26: use a credential plugin (exec)"),
        ("as-user-extra", "use a context without it"),
    ):
        if user.get(name):
            _bad(f"has {name}, which is not supported", remedy=remedy)


def _impersonation(user: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the headers with which a request acts as another user."""
    groups = user.get("as-groups") or []
    if not isinstance(groups, list):
        _bad("has an as-groups that is not a list")
    headers = [("Impersonate-User", _text(user, "as")), ("Impersonate-Uid", _text(user, "as-uid"))]
    headers += [("Impersonate-Group", group) for group in groups]
    headers = [(name, value) for name, value in headers if value]
    for name, value in headers:
        if not isinstance(value, str) or not re.fullmatch(r"[\x20-\x7e]{1,1024}", value):
            _bad(f"has a user or a group to act as that is not valid in a header ({name})")
    return headers


# A pod ----------------------------------------------------------------------------------------------------------------


def _in_pod() -> bool:
    """Return whether this is a pod with an account, and without a kubeconfig."""
    if not os.environ.get("KUBERNETES_SERVICE_HOST") or os.environ.get("KUBECONFIG"):
        return False
    return (ACCOUNT_FOLDER / "token").exists() and not Path("~/.kube/config").expanduser().exists()


def _account() -> Access:
    """Return the way to the API for the account of this pod."""
    port = os.environ.get("KUBERNETES_SERVICE_PORT_HTTPS") or os.environ.get("KUBERNETES_SERVICE_PORT") or "443"
    host = os.environ["KUBERNETES_SERVICE_HOST"]
    if not port.isascii() or not port.isdigit() or not 0 < int(port[:6]) < 65536:
        raise UsageError("KUBERNETES_SERVICE_PORT is not a port", reason=Reason.KUBECONFIG)
    ca = _read(ACCOUNT_FOLDER / "ca.crt", "the authority of the pod's account")
    cluster = Cluster(TcpAddress(host, int(port)), ca=ca, tls_name=host)
    return Access(cluster, {"tokenFile": str(ACCOUNT_FOLDER / "token")}, "the account of this pod")


def _read(path: Path, what: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CREDENTIAL + 1)
    except (OSError, ValueError) as error:
        why = os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else "not a valid path"
        raise TargetError(
            f"{what}, {printable(str(path), 200)}, cannot be read: {why}", reason=Reason.CREDENTIALS
        ) from None
    if len(data) > MAX_CREDENTIAL:
        raise TargetError(
            f"{what}, {printable(str(path), 200)}, is larger than {MAX_CREDENTIAL} bytes", reason=Reason.CREDENTIALS
        )
    return data.decode("utf-8", "replace")


# JSON -----------------------------------------------------------------------------------------------------------------


def _bad(what: str, remedy: str = "check the kubeconfig") -> NoReturn:
    raise UsageError(f"the kubeconfig {what}", reason=Reason.KUBECONFIG, remedy=remedy)


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        _bad(f"has a {name} that is not text")
    return value


def _decoded(data: Mapping[str, Any], name: str) -> str:
    try:
        return base64.b64decode(_text(data, name), validate=True).decode("utf-8")
    except ValueError:
        _bad(f"has a {name} that is not valid in Base64")


def _objects(data: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    value = data.get(name) or []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        _bad(f"has {name} that are not a list of objects")
    return value


def _named(config: Mapping[str, Any], plural: str, singular: str, name: str) -> Mapping[str, Any]:
    for item in _objects(config, plural):
        found = item.get(singular)
        if item.get("name") == name and isinstance(found, dict):
            return found
    _bad(f"has no {singular} {shown(name)}")


def _time(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp() if text else None
    except (ValueError, OverflowError):
        return None


def _hint(plugin: Mapping[str, Any]) -> str:
    """Return how to install a plugin, as the kubeconfig has it, in one line."""
    return printable(" ".join(_text(plugin, "installHint").split()), 400)
