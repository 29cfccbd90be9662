"""Certificates of a test: an authority, a server, a client of it, and a stranger's."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

EC = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


@dataclass(frozen=True, slots=True)
class Certificate:
    cert: Path
    key: Path


class Pki:
    """Made by openssl, valid for two days."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.ca = self._authority("ca")
        self._authority("stranger-ca")
        self.server = self.issue("server")
        self.client = self.issue("client", extension="extendedKeyUsage=clientAuth")
        self.stranger = self.issue("stranger", "stranger-ca", "extendedKeyUsage=clientAuth")

    def issue(
        self, name: str, authority: str = "ca", extension: str = "subjectAltName=IP:127.0.0.1,DNS:localhost"
    ) -> Certificate:
        """A new certificate with a new key; one of the same name is replaced."""
        (self.folder / f"{name}.ext").write_text(extension + "\n")
        self._openssl("req", *EC, "-keyout", f"{name}-key.pem", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signing = ["-CA", f"{authority}.pem", "-CAkey", f"{authority}-key.pem", "-CAcreateserial", "-days", "2"]
        request = ["-in", f"{name}.csr", "-extfile", f"{name}.ext", "-out", f"{name}.pem"]
        self._openssl("x509", "-req", *request, *signing)
        return Certificate(self.folder / f"{name}.pem", self.folder / f"{name}-key.pem")

    def context(self, client: Certificate | None = None) -> ssl.SSLContext:
        """A client's: it trusts our authority alone."""
        context = ssl.create_default_context(cafile=str(self.ca))
        if client:
            context.load_cert_chain(client.cert, client.key)
        return context

    def _authority(self, name: str) -> Path:
        key, cert = f"{name}-key.pem", f"{name}.pem"
        self._openssl("req", "-x509", *EC, "-keyout", key, "-out", cert, "-subj", f"/CN={name}", "-days", "2")
        return self.folder / cert

    def _openssl(self, *words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=self.folder)
