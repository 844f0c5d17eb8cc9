"""``cogvlm run`` and ``cogvlm eval``: files of questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .backends import BaseUrlOption, KeyOption, SideOption, opened
from .shared import (
    AdapterOption,
    DeviceOption,
    ModelOption,
    PickleOption,
    Precision,
    PrecisionOption,
    RepetitionOption,
    SeedOption,
    TemperatureOption,
    TokenizerOption,
    TokensOption,
    TopKOption,
    TopPOption,
    app,
    load,
    plain_errors,
    progress,
    quiet_libraries,
)


@app.command()
@plain_errors
def run(
    context: typer.Context,
    requests: Annotated[
        Path,
        typer.Argument(help='JSON lines: {"id", "image", "images" or "video", "question"}.'),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON lines, appended to.")],
    model: ModelOption = "nano",
    tokenizer: TokenizerOption = None,
    adapter: AdapterOption = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered at once.")] = 8,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = None,
    precision: PrecisionOption = Precision.auto,
    device: DeviceOption = "auto",
    allow_pickle: PickleOption = False,
    repetition_stop: RepetitionOption = True,
    base_url: BaseUrlOption = None,
    api_key_env: KeyOption = "OPENAI_API_KEY",
    max_side: SideOption = 2048,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON summary at the end.")] = False,
) -> None:
    """Answer a file of questions; run it again to go on where it was stopped."""
    quiet_libraries()
    from ..engine import GenerationSettings, run_file

    settings = GenerationSettings(max_new_tokens, temperature, top_p, top_k, seed, repetition_stop)
    if not requests.is_file():
        raise InputError(f"{requests}: no such file")
    chosen = (model, precision, device, tokenizer, allow_pickle, base_url, api_key_env, max_side)
    with opened(context, *chosen, adapter) as backend, progress("answering") as show:
        summary = run_file(requests, output, backend, settings, batch_size, show)
    if as_json:
        from dataclasses import asdict

        typer.echo(json.dumps(asdict(summary)))
    else:
        typer.echo(
            f"{output}: {summary.answered} answered, {summary.failed} failed, "
            f"{summary.skipped} there before, of {summary.requests}; {summary.seconds:.1f} s",
            err=True,
        )


@app.command("eval")
@plain_errors
def evaluate(
    requests: Annotated[
        Path,
        typer.Argument(help="JSON lines as for 'run', with a 'truth' in each; or see --task."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Answers; default: NAME.answers.jsonl, made anew."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="A benchmark, whose published file or folder REQUESTS is: docvqa, ..."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="For lines that name none: cer, anls, relaxed, vqa, ...")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="So many lines of a benchmark, evenly taken.")
    ] = None,
    answered: Annotated[
        bool, typer.Option("--answered", help="Score the answers in OUTPUT; load no model.")
    ] = False,
    model: ModelOption = "nano",
    tokenizer: TokenizerOption = None,
    adapter: AdapterOption = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered at once.")] = 16,
    max_new_tokens: TokensOption = 96,
    precision: PrecisionOption = Precision.auto,
    device: DeviceOption = "auto",
    allow_pickle: PickleOption = False,
) -> None:
    """Answer a file of questions and score the answers: one JSON line."""
    quiet_libraries()
    from ..engine import GenerationSettings
    from ..eval.run import as_line, score_answers, score_file
    from ..eval.tasks import TASKS, write_requests
    from ..score import METRICS

    for option, name, known in (("--task", task, TASKS), ("--metric", metric, METRICS)):
        if name is not None and name not in known:
            raise InputError(f"{option} {name}: not known; there are {', '.join(known)}")
    if answered and not (output and output.is_file()):
        raise InputError(f"--answered: name the file of answers with -o; {output} is none")
    if output is None:
        output = Path(f"{requests.stem}.answers.jsonl")
        output.unlink(missing_ok=True)
    if task is not None:
        questions = output.with_suffix(".requests.jsonl")
        requests = write_requests(TASKS[task], requests, questions, metric, limit)
    elif limit is not None:
        raise InputError("--limit goes with --task; shorten a file of your own with head")
    elif not requests.is_file():
        raise InputError(f"{requests}: no such file")
    metric = metric or "cer"
    if answered:
        score = score_answers(requests, output, metric)
    else:
        settings = GenerationSettings(max_new_tokens)
        loaded = load(model, precision, device, tokenizer, allow_pickle, adapter)
        with progress("answering") as show:
            score = score_file(requests, output, loaded, batch_size, settings, show, metric)
    typer.echo(as_line(score))
