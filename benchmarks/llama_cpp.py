"""llama.cpp's side of ``decode.py``: runs under another Python, one that has ``xllamacpp``.

Knows nothing of cogvlm.  Gets a GGUF, a number of threads, and ids of a prompt; then for every line
of input, a number of tokens, it writes one: the seconds that they took, on the wall and of the
processor::

    python benchmarks/llama_cpp.py model.gguf 2 "1,9690,198"      < "16"
    {"wall": 0.31, "cpu": 0.6}
"""

from __future__ import annotations

import json
import sys
import time

import xllamacpp


def main() -> None:
    gguf, threads, prompt = sys.argv[1:]
    ids = [int(number) for number in prompt.split(",")]
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.n_ctx, params.n_parallel, params.verbosity = 1024, 1, -1
    server = xllamacpp.Server(params)

    def complete(tokens: int) -> None:
        asked = {"prompt": ids, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
        # The prompt is in its cache after the first time: what is timed are steps.
        server.handle_completions(asked | {"cache_prompt": True})

    complete(2)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        complete(int(line))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall": wall, "cpu": cpu}), flush=True)


if __name__ == "__main__":
    main()
