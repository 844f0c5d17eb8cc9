"""Whether a crowd gets what each of it gets alone: many pictures at once to a running server.

Every PNG of a folder is asked about by a caller of its own, all at the same moment, then some of
them again one after another.  Ends with one JSON line; the exit status is 1 where an answer is
another than the one alone::

    cogvlm render PICTURES --count 200 --seed 5
    cogvlm serve --max-seconds 3600 &
    python benchmarks/crowd.py http://127.0.0.1:8000 PICTURES --alone 40

Knows HTTP, nothing of models.  The server caches what it computed: alone, a prompt that it has seen
is not computed again, but every token after it is.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import time
from pathlib import Path
from typing import Any

import httpx

ASKED = "What does the picture say?"


def body(picture: Path, tokens: int) -> dict[str, Any]:
    """A request about one picture."""
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": ASKED}]
    return {"max_tokens": tokens, "messages": [{"role": "user", "content": parts}]}


async def measure(url: str, pictures: list[Path], tokens: int, alone: int) -> dict[str, Any]:
    """The answers of all together, and of some of them alone."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def ask(picture: Path) -> tuple[str, int]:
            asked = {"model": model, **body(picture, tokens)}
            response = await client.post("/v1/chat/completions", json=asked)
            response.raise_for_status()
            values = response.json()
            return values["choices"][0]["message"]["content"], values["usage"]["completion_tokens"]

        start = time.monotonic()
        together = await asyncio.gather(*map(ask, pictures))
        middle = time.monotonic()
        single = [await ask(picture) for picture in pictures[:alone]]
        end = time.monotonic()
    pairs = zip(pictures, together, single, strict=False)
    return {
        "name": "crowd",
        "model": model,
        "pictures": len(pictures),
        "alone": len(single),
        "different_answers": len({text for text, _ in together}),
        "not_as_alone": [picture.name for picture, a, b in pairs if a != b],
        "tokens_a_second": {
            "together": round(sum(count for _, count in together) / (middle - start), 1),
            "alone": round(sum(count for _, count in single) / (end - middle), 1),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="of the server, without /v1")
    parser.add_argument("pictures", type=Path, help="a folder with PNG files")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer, at most")
    parser.add_argument("--alone", type=int, default=20, help="asked again, one by one")
    given = parser.parse_args()
    pictures = sorted(given.pictures.rglob("*.png"))
    if not pictures or not 1 <= given.alone <= len(pictures):
        parser.error(f"{given.pictures} has {len(pictures)} PNG files, {given.alone} wanted alone")
    found = asyncio.run(measure(given.url, pictures, given.tokens, given.alone))
    print(json.dumps(found), flush=True)
    return 1 if found["not_as_alone"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
