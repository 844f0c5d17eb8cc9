"""Bodies made from the server's own description of its API: none of them is its fault."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx

from serve.fakes import MODEL, FakeEngine, data_url, make_desk, png, running

ROUNDS = 60  # bodies for each route
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**70, 0.5, -1e308, "", "x", "\u0000", "中" * 9, "1"),
    *([], {}, [[]], [None], {"a": {"b": []}}, ["x"] * 3, {"type": "text"}),
    *(data_url(png(1)), "data:image/png;base64,AAAA", "http://127.0.0.1/", "json", "$" * 99),
)


class Maker:
    """Values of a JSON schema, now and then of another one."""

    def __init__(self, api: dict[str, Any], seed: int, odd: float) -> None:
        self.api, self.odd, self.random = api, odd, random.Random(seed)

    def make(self, schema: dict[str, Any], depth: int = 0) -> Any:
        if self.random.random() < self.odd or depth > 8:
            return self.random.choice(ODD)
        if "$ref" in schema:
            return self.make(
                self.api["components"]["schemas"][schema["$ref"].split("/")[-1]], depth
            )
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self.make(self.random.choice(schema[key]), depth + 1)
        if "enum" in schema:
            return self.random.choice(schema["enum"])
        if "const" in schema:
            return schema["const"]
        return getattr(self, f"_{schema.get('type', 'any')}")(schema, depth)

    def _any(self, schema: dict[str, Any], depth: int) -> Any:
        return self.random.choice((None, None, None, *ODD))

    def _null(self, schema: dict[str, Any], depth: int) -> Any:
        return None

    def _boolean(self, schema: dict[str, Any], depth: int) -> Any:
        return self.random.random() < 0.5

    def _integer(self, schema: dict[str, Any], depth: int) -> Any:
        return self.random.choice((1, 2, 5, 20, schema.get("minimum", 0)))

    def _number(self, schema: dict[str, Any], depth: int) -> Any:
        return self.random.choice((0.1, 1, 1.0, schema.get("maximum", 0.5)))

    def _string(self, schema: dict[str, Any], depth: int) -> Any:
        return self.random.choice(("Hi?", "[a-z]+", data_url(png(2)), "é", "7"))

    def _array(self, schema: dict[str, Any], depth: int) -> Any:
        count = self.random.randint(0, 3)
        return [self.make(schema.get("items", {}), depth + 1) for _ in range(count)]

    def _object(self, schema: dict[str, Any], depth: int) -> Any:
        needed = schema.get("required", ())
        value = {
            key: self.make(inner, depth + 1)
            for key, inner in schema.get("properties", {}).items()
            if key in needed or self.random.random() < 0.15
        }
        if self.random.random() < self.odd:
            value[self.random.choice(("extra", "x" * 300, "é"))] = self.random.choice(ODD)
        return value


def test_no_body_is_an_error_of_the_server() -> None:
    with running(make_desk(FakeEngine())) as url, httpx.Client(base_url=url, timeout=30) as client:
        api = client.get("/openapi.json").json()
        posts = {path: item["post"] for path, item in api["paths"].items() if "post" in item}
        assert len(posts) == 5
        statuses: dict[str, set[int]] = {path: set() for path in posts}
        for path, operation in posts.items():
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            for i in range(ROUNDS):
                value = Maker(api, seed=i, odd=0.0 if i % 4 == 0 else 0.04).make(schema)
                if isinstance(value, dict) and i % 8:
                    value["model"] = MODEL
                    if "messages" in value and i % 8 == 4:  # by chance few are in order
                        value["messages"] = [{"role": "user", "content": "Hi?"}]
                raw = json.dumps(value).encode()
                response = client.post(path, content=raw)
                assert response.status_code < 500, (path, raw, response.text)
                if response.status_code != 200:
                    error = response.json()["error"]
                    message = error if path.startswith("/api/") else error["message"]
                    assert message, (path, raw)
                    assert "\n" not in message
                statuses[path].add(response.status_code)
        # It reaches the model as well as the checks.
        assert all(found >= {200, 400, 404} for found in statuses.values()), statuses
