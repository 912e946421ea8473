"""`download` against a server of this machine: whole files, connections that end early, files that are not the right
ones, and what is unpacked."""

import hashlib
import io
import tarfile
import threading
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from rich.console import Console
from torchvision.datasets import CIFAR10, MNIST
from training_helpers import cli

from alexnet_cuda.data import download, load_images
from alexnet_cuda.errors import DataError
from alexnet_cuda.recipe import load_recipe

QUIET = Console(quiet=True)


class Server(ThreadingHTTPServer):
    """Serves `files`; after `breaks` bytes of an answer it closes the connection, `broken` times."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.breaks, self.broken, self.ranges, self.asked = {}, 0, 0, True, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        data, wanted = self.server.files.get(self.path[1:]), self.headers.get("Range")
        self.server.asked.append(wanted)
        if data is None:
            return self.send_error(404)
        start = int(wanted[6:-1]) if wanted and self.server.ranges else 0
        if start and start >= len(data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.server.broken > 0:
            self.server.broken -= 1
            data = data[: start + self.server.breaks]
        self.wfile.write(data[start:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr(download, "BLOCK", 1000)
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def md5(data):
    return hashlib.md5(data).hexdigest()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on(server, tmp_path, ranges):
    data = np.random.default_rng(0).bytes(10_000)
    server.files, server.breaks, server.broken, server.ranges = {"a": data}, 3000, 3, ranges
    with pytest.raises(DataError, match=r"ended after .* bytes; what has come is kept, and the same command continues"):
        download.fetch([server.url + "a"], tmp_path / "a", md5(data), QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["a.part"]
    download.fetch([server.url + "a"], tmp_path / "a", md5(data), QUIET)
    assert (tmp_path / "a").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert server.asked == [None, "bytes=3000-", *(["bytes=6000-", "bytes=9000-"] if ranges else ["bytes=3000-"] * 2)]
    download.fetch([server.url + "a"], tmp_path / "a", md5(data), QUIET)
    assert len(server.asked) == 4


def test_a_file_that_is_not_the_right_one_is_not_kept(server, tmp_path):
    data = b"right" * 100
    server.files = {"a": b"wrong" * 100, "b/a": data}
    with pytest.raises(DataError, match=f"its MD5 is .*, expected {md5(data)}$"):
        download.fetch([server.url + "a"], tmp_path / "a", md5(data), QUIET)
    assert not list(tmp_path.iterdir())
    assert len(server.asked) == 1
    with pytest.raises(DataError, match="downloaded: HTTP Error 404: "):
        download.fetch([server.url + "c"], tmp_path / "a", md5(data), QUIET)
    (tmp_path / "a.part").write_bytes(b"x" * 600)  # of another file, and longer
    download.fetch([server.url + "a", server.url + "b/a"], tmp_path / "a", md5(data), QUIET)
    assert (tmp_path / "a").read_bytes() == data


def test_what_a_proxy_refuses_names_the_proxy(server, tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "_opener", None)  # which remembers the variables
    monkeypatch.setenv("https_proxy", server.url.replace("//", "//name:secret@"))
    with pytest.raises(DataError, match=f"through the proxy 127.0.0.1:{server.server_port}/: Tunnel .* failed: 501"):
        download.fetch(["https://example.invalid/a"], tmp_path / "a", "", QUIET)


def idx(values):
    return b"\0\0\x08" + bytes([values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes()


def test_mnist_is_ready_to_train(server, tmp_path, monkeypatch):
    rng, files = np.random.default_rng(0), {}
    for part, n in (("train", 60), ("t10k", 20)):
        files[f"{part}-images-idx3-ubyte.gz"] = idx(rng.integers(0, 255, (n, 28, 28), np.uint8))
        files[f"{part}-labels-idx1-ubyte.gz"] = idx(np.arange(n, dtype=np.uint8) % 10)
    server.files = files
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/", server.url])  # nothing listens at the first
    monkeypatch.setattr(MNIST, "resources", [(name, md5(data)) for name, data in files.items()])
    output = cli("download", "mnist", "--data-path", tmp_path / "data")
    assert f"alexnet-cuda train mnist --data-path {tmp_path}/data" in output.replace("\n", "")
    images = load_images(load_recipe("mnist", overrides={"data_path": str(tmp_path / "data")}))
    assert len(images.test.labels) == 20
    assert "is here already" in cli("download", "mnist", "--data-path", tmp_path / "data")


def tar(names, content=b"x"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_archives_are_unpacked_at_once(server, tmp_path, monkeypatch):
    archive = tar(["cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/test_batch"])
    server.files["cifar.tar.gz"], server.files["bad.tar.gz"] = archive, archive[:-30]
    monkeypatch.setattr(CIFAR10, "url", server.url + "bad.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive[:-30]))
    with pytest.raises(EOFError):
        download.download("cifar10", tmp_path, QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tar.gz"]
    monkeypatch.setattr(CIFAR10, "url", server.url + "cifar.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    assert download.download("cifar10", tmp_path, QUIET) == tmp_path
    assert sorted(path.name for path in (tmp_path / "cifar-10-batches-py").iterdir()) == ["data_batch_1", "test_batch"]
    assert not (tmp_path / "cifar.tar.gz").exists()
    monkeypatch.delattr(tarfile, "data_filter")  # as in Python before 3.11.4
    flowers = tar(["jpg/image_0001.jpg", "jpg/files.txt"])
    server.files["f.tgz"] = flowers
    monkeypatch.setattr(download, "FLOWERS", (server.url + "f.tgz", md5(flowers)))
    download.download("flowers17", tmp_path, QUIET)
    assert (tmp_path / "flowers17" / "jpg" / "image_0001.jpg").exists()


def test_bikes_and_ships_are_selected(server, tmp_path, monkeypatch):
    lines = (download.resources.files("alexnet_cuda.data") / "bike_ship.txt").read_text().splitlines()
    rows = [(split, label, category, int(n)) for split, label, category, *ns in map(str.split, lines) for n in ns]
    assert len(rows) == len(set(rows)) == 400
    names = [f"101_ObjectCategories/{category}/image_{n:04d}.jpg" for _, _, category, n in rows]
    for archive, message in ((names[1:], "lacks 1 of the pictures"), ([*names, "101_ObjectCategories/ant/a.jpg"], "")):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr(download.CALTECH_INSIDE, tar(archive))
        server.files["c.zip"] = buffer.getvalue()
        monkeypatch.setattr(download, "CALTECH", (server.url + "c.zip", md5(buffer.getvalue())))
        if message:
            with pytest.raises(DataError, match=message):
                download.download("bike-ship", tmp_path, QUIET)
            assert not (tmp_path / "bike_ship").exists()
    folder = download.download("bike-ship", tmp_path, QUIET)
    counts = {f"{p.parent.name}/{p.name}": len(list(p.iterdir())) for p in folder.glob("*/*")}
    assert counts == {"train/bike": 150, "train/ship": 150, "val/bike": 50, "val/ship": 50}
