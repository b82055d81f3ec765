"""The npm packages that the set is made from: fetched with npm, checked, and read."""

import base64
import hashlib
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import InputError

FETCH_TIMEOUT_S = 900


@dataclass(frozen=True)
class Package:
    """A package at one version, and what it is used for."""

    name: str
    version: str
    integrity: str
    """'sha512-' and the base64 of the archive's hash, as npm's own lock files have it."""
    content: str
    licence: str
    """SPDX identifier of what is used, which may differ from that of the package's code."""
    copyright: str

    @property
    def archive_name(self) -> str:
        """What `npm pack` calls the archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


MDI = Package(
    "@mdi/svg",
    "7.4.47",
    "sha512-WQ2gDll12T9WD34fdRFgQVgO8bag3gavrAgJ0frN4phlwdJARpE6gO1YvLEMJR0KKgoc+/Ea/A0Pp11I00xBvw==",
    "icons, names and tags of Material Design Icons",
    "Apache-2.0",
    "Pictogrammers",
)
TABLER = Package(
    "@tabler/icons",
    "3.51.0",
    "sha512-0pinvPZz7YeX+OSfxuEAbnEPWbocVXW5iU8h5lh41pYG8sZuQfpWECC980lxOT0clGIcNGn8xsBr+zKaRGdA/g==",
    "icons, names and tags of Tabler",
    "MIT",
    "2020-2026 Paweł Kuna",
)
PHOSPHOR = Package(
    "@phosphor-icons/core",
    "2.1.1",
    "sha512-v4ARvrip4qBCImOE5rmPUylOEK4iiED9ZyKjcvzuezqMaiRASCHKcRIuvvxL/twvLpkfnEODCOJp5dM4eZilxQ==",
    "icons, names and tags of Phosphor",
    "MIT",
    "2023 Phosphor Icons",
)
LUCIDE = Package(
    "lucide-static",
    "1.62.0",
    "sha512-WBZA/m2PvkFpMGHDtsBck5P2A9G4ehLlYu4GwwICcmEm1BvYVgj00lCDxKRWLlbMlOibLaiwdQ88G5pHkSWgwA==",
    "icons, names and tags of Lucide; some icons are Feather's (MIT, 2013 Cole Bemis)",
    "ISC",
    "2026 Lucide Icons and Contributors",
)
GOOGLE = Package(
    "emoji-datasource-google",
    "16.0.0",
    "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    "pictures of Google's Noto Emoji; their packaging is MIT, 2013 Cal Henderson",
    "Apache-2.0",
    "Google",
)
FLUENT_3D = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    "pictures of Microsoft's Fluent Emoji in 3D; their packaging is MIT, 2023 LobeHub",
    "MIT",
    "Microsoft Corporation",
)
FLUENT_FLAT = Package(
    "@iconify-json/fluent-emoji-flat",
    "1.2.6",
    "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    "pictures of Microsoft's Fluent Emoji, flat",
    "MIT",
    "Microsoft Corporation",
)
EMOJILIB = Package(
    "emojilib",
    "4.0.3",
    "sha512-KbWiYre9aRSaPbHrHZIz9zmoM+21LAsK1VFJtnTh1VCtWE/rNMDviGhQTmselFl95dhqtGlY22iH0leG5BuW0g==",
    "words of emoji",
    "MIT",
    "2014 Mu-An Chiou",
)
EMOJIBASE = Package(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    "names, groups and words of emoji; the names are Unicode CLDR's (Unicode-3.0)",
    "MIT",
    "2017-2019 Miles Johnson",
)
PACKAGES = (
    MDI,
    TABLER,
    PHOSPHOR,
    LUCIDE,
    GOOGLE,
    FLUENT_3D,
    FLUENT_FLAT,
    EMOJILIB,
    EMOJIBASE,
)


@dataclass(frozen=True)
class PackageFiles:
    """The files of one package, out of its archive."""

    archive: Path

    def read(self, pattern: str) -> dict[str, bytes]:
        """Files whose whole path in the package matches `pattern`, by path, in sorted order."""
        wanted = re.compile(f"package/(?:{pattern})")
        found = {}
        with tarfile.open(self.archive) as tar:
            for member in tar:
                if member.isfile() and wanted.fullmatch(member.name):
                    file = tar.extractfile(member)
                    assert file is not None
                    found[member.name.removeprefix("package/")] = file.read()
        return dict(sorted(found.items()))

    def text(self, name: str) -> str:
        return self.read(re.escape(name))[name].decode()

    def json(self, name: str) -> Any:
        return json.loads(self.text(name))


def fetch_packages(
    packages: tuple[Package, ...],
    folder: Path,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, PackageFiles]:
    """Every package by its name; archives that are not in `folder` are fetched into it.

    Raises InputError for an archive of other bytes than the pinned ones and where npm is missing
    or fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--packages {folder}: can't hold the packages ({error.strerror}): name another folder"
        ) from None
    return {package.name: PackageFiles(_fetch(package, folder, report)) for package in packages}


def _fetch(package: Package, folder: Path, report: Callable[[str], None]) -> Path:
    archive = folder / package.archive_name
    if not archive.exists():
        report(f"fetching {package.name} {package.version}")
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as unfinished:
            _npm_pack(package, Path(unfinished), folder)
            fetched = Path(unfinished) / package.archive_name
            _check_integrity(package, fetched, "ask those who run your npm registry")
            fetched.replace(archive)
    else:
        _check_integrity(package, archive, "remove it, and it is fetched anew")
    return archive


def _npm_pack(package: Package, unfinished: Path, folder: Path) -> None:
    """Let npm write the archive into `unfinished`; a package's scripts never run."""
    wanted = f"{package.name}@{package.version}"
    mend = f"or run `npm pack {wanted}` elsewhere and put {package.archive_name} into {folder}"
    command = ["npm", "pack", wanted, "--ignore-scripts", "--loglevel=error"]
    try:
        subprocess.run(
            command,
            cwd=unfinished,
            check=True,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=FETCH_TIMEOUT_S,
        )
    except FileNotFoundError:
        raise InputError(
            f"npm is missing, so {wanted} can't be fetched: install Node.js, {mend} (--packages)"
        ) from None
    except subprocess.TimeoutExpired:
        raise InputError(
            f"npm has not fetched {wanted} within {FETCH_TIMEOUT_S} s: check the network, {mend} "
            "(--packages)"
        ) from None
    except subprocess.CalledProcessError as error:
        raise InputError(
            f"npm can't fetch {wanted} ({_reason(error.stderr)}): check the network, {mend} "
            "(--packages)"
        ) from None


def _reason(stderr: str) -> str:
    """The first line of npm's complaint that says something."""
    lines = [re.sub(r"^npm (error|ERR!)", "", line).strip() for line in stderr.splitlines()]
    return next((line for line in lines if line and not line.startswith("code ")), "no reason")


def _check_integrity(package: Package, archive: Path, mend: str) -> None:
    try:
        with open(archive, "rb") as file:
            digest = hashlib.file_digest(file, "sha512").digest()
    except OSError as error:
        raise InputError(
            f"{archive}: can't be read ({error.strerror}), so nothing is built: {mend}"
        ) from None
    if f"sha512-{base64.b64encode(digest).decode()}" != package.integrity:
        raise InputError(
            f"{archive}: isn't {package.name} {package.version} as it was published (its sha512 "
            f"differs), so nothing is built from it: {mend}"
        )
