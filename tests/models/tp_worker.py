"""One process of those that ``test_parallel.py`` starts: a folder of toys, and where to write."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from cogvlm.engine import fast
from cogvlm.errors import InputError
from cogvlm.load import load_model


def main(inputs: Path, out: Path) -> None:
    """Run every folder's prompts; each process writes what it got, and how much it holds."""
    got: dict[str, Any] = {}
    for folder in sorted(p for p in inputs.iterdir() if p.is_dir()):
        for dtype in ("float32", "bfloat16"):
            model = load_model(folder, dtype, tp_plan="auto")
            assert not model.training
            assert not fast.is_known(model)
            parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
            got[f"{folder.name}.{dtype}.held"] = sum(
                p.untyped_storage().nbytes() // p.element_size() for p in parts
            )
            got[f"{folder.name}.{dtype}.buffers"] = {n: b.dtype for n, b in model.named_buffers()}
            with torch.no_grad():
                for kind, prompt in torch.load(folder / "prompts.pt").items():
                    got[f"{folder.name}.{dtype}.{kind}"] = model(**prompt).logits
                    if dtype == "float32":
                        ids = model.generate(
                            **prompt, max_new_tokens=5, do_sample=False, eos_token_id=None
                        )
                        got[f"{folder.name}.{dtype}.{kind}.ids"] = ids
    try:
        load_model(folder, device="cpu", tp_plan="auto")
    except InputError as error:
        got["refused"] = str(error)
    torch.save(got, out / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
