"""Data sets from their publishers, each file checked, and continued where a download broke off."""

import hashlib
import http.client
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ..errors import DataError, first_line
from ..notes import PLAIN

FLOWERS = "https://www.robots.ox.ac.uk/~vgg/data/flowers/17/17flowers.tgz", "b59a65d8d1a99cd66944d474e1289eab"
CALTECH = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip", "3138e1922a9193bfa496528edbbc45d0"
CALTECH_INSIDE = "caltech-101/101_ObjectCategories.tar.gz"
TRIES, PAUSE, TIMEOUT, BLOCK = 3, 2.0, 30, 2**18  # seconds, bytes


def download(name: str, root: Path, console: Console) -> Path:
    """Brings the data set `name`, a key of SETS, into a folder in `root`, and returns what --data-path then takes.

    Addresses and checksums of MNIST, Fashion-MNIST and CIFAR-10 are torchvision's. Raises DataError where a file cannot
    be had or is not the published one; the same call then continues, and what is complete is left as it is.
    """
    root.mkdir(parents=True, exist_ok=True)
    return SETS[name](root, console)


def _mnist(root: Path, console: Console) -> Path:
    from torchvision.datasets import MNIST

    return _idx(MNIST, root, console)


def _fashion_mnist(root: Path, console: Console) -> Path:
    from torchvision.datasets import FashionMNIST

    return _idx(FashionMNIST, root, console)


def _idx(dataset: type, root: Path, console: Console) -> Path:
    folder = root / dataset.__name__ / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for file, md5 in dataset.resources:  # type: ignore[attr-defined]
        fetch([f"{mirror}{file}" for mirror in dataset.mirrors], folder / file, md5, console)  # type: ignore[attr-defined]
    return root


def _cifar10(root: Path, console: Console) -> Path:
    from torchvision.datasets import CIFAR10

    _unpacked(root / CIFAR10.base_folder, CIFAR10.url, CIFAR10.tgz_md5, console, _untar)
    return root


def _flowers17(root: Path, console: Console) -> Path:
    _unpacked(root / "flowers17" / "jpg", *FLOWERS, console, _untar)
    return root


def _bike_ship(root: Path, console: Console) -> Path:
    _unpacked(root / "bike_ship", *CALTECH, console, _select)
    return root / "bike_ship"


def _untar(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python before 3.11.4 has none
        tar.extractall(folder)
    return next(path for path in folder.iterdir() if path.is_dir())


def _select(archive: Path, folder: Path) -> Path:
    """The 400 photographs of Caltech-101 that bike_ship.txt lists by split, class, category and number."""
    lines = (resources.files(__package__) / "bike_ship.txt").read_text("utf-8").splitlines()
    wanted = {
        f"101_ObjectCategories/{category}/image_{int(n):04d}.jpg": folder
        / split
        / label
        / f"{category}_{int(n):04d}.jpg"
        for split, label, category, *numbers in map(str.split, lines)
        for n in numbers
    }
    with (
        zipfile.ZipFile(archive) as outer,
        outer.open(CALTECH_INSIDE) as inner,
        tarfile.open(fileobj=inner, mode="r|gz") as tar,
    ):
        for member in tar:
            if (target := wanted.pop(member.name, None)) and (picture := tar.extractfile(member)):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(picture.read())
    if wanted:
        raise DataError(f"{archive} lacks {len(wanted)} of the pictures, among them {min(wanted)}")
    return folder


SETS: dict[str, Callable[[Path, Console], Path]] = {
    "mnist": _mnist, "fashion-mnist": _fashion_mnist, "cifar10": _cifar10, "flowers17": _flowers17,
    "bike-ship": _bike_ship,
}  # fmt: skip


def _unpacked(target: Path, url: str, md5: str, console: Console, unpack: Callable[[Path, Path], Path]) -> None:
    """Downloads an archive, and makes `target` of the folder that `unpack(archive, empty folder)` returns, at once. A
    `target` that exists is left as it is."""
    if target.exists():
        console.print(f"{target} is here already", **PLAIN)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    archive = target.parent / url.rpartition("/")[2]
    fetch([url], archive, md5, console)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpacking-") as scratch:
        inside = Path(scratch) / "data"
        inside.mkdir()
        unpack(archive, inside).rename(target)
    archive.unlink()


def fetch(urls: list[str], path: Path, md5: str, console: Console) -> None:
    """Downloads one file from the first of `urls` that has it, unless `path` is that file already. What has come is
    kept in PATH.part, from where the next try goes on. Raises DataError."""
    if path.exists() and checksum(path) == md5:
        console.print(f"{path} is here already", **PLAIN)
        return
    part = path.with_name(f"{path.name}.part")
    left = list(urls)
    for attempt in range(TRIES):
        for url in list(left):
            begun = part.exists()
            try:
                _transfer(url, part, console)
            except (OSError, http.client.HTTPException) as error:
                answered = isinstance(error, urllib.error.HTTPError)
                cause = first_line(error) if answered else getattr(error, "reason", error)
                reason = f"{url} cannot be downloaded{_proxy(url)}: {cause}"
                continue
            if (found := checksum(part)) != md5:
                part.unlink()
                reason = f"{url} is not the published file: its MD5 is {found}, expected {md5}"
                if not begun:
                    left.remove(url)
                continue
            part.replace(path)
            return
        if not left:
            break
        time.sleep(PAUSE * (attempt + 1 < TRIES))
    kept = "; what has come is kept, and the same command continues from there" if part.exists() else ""
    raise DataError(reason + kept)


def _proxy(url: str) -> str:
    """Names the proxy that the environment (https_proxy, no_proxy) gives for an address, without its password."""
    address = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(address.scheme)
    if not proxy or urllib.request.proxy_bypass(address.netloc):
        return ""
    return f" through the proxy {proxy.rpartition('@')[2]}"


def _transfer(url: str, part: Path, console: Console) -> None:
    """Appends to `part` what it lacks of the file at `url`; begins anew where the server cannot continue."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "alexnet_cuda"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # it has no bytes after these: `part` is complete, or of another file
            raise
        return
    with answer, part.open("ab" if answer.status == 206 else "wb") as file, _bar(console) as bar:
        start = have if answer.status == 206 else 0
        left = answer.headers.get("Content-Length")
        total = start + int(left) if left else None
        task = bar.add_task(part.name.removesuffix(".part"), total=total, completed=start)
        while block := answer.read(BLOCK):
            file.write(block)
            bar.update(task, advance=len(block))
        if total is not None and file.tell() < total:
            raise OSError(f"the connection ended after {file.tell():,} of {total:,} bytes")


def _bar(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(20), DownloadColumn(), TransferSpeedColumn()
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)


def checksum(path: Path) -> str:
    """The MD5 of a file, as publishers state it."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
