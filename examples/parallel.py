"""One model over several devices of one machine, every layer cut:

torchrun --nproc-per-node 2 examples/parallel.py FOLDER photo.jpg "What is this?"
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed

from cogvlm import stream, user
from cogvlm.load import load

folder, picture, question = sys.argv[1:]
# Every process asks the same and gets the same; one of them prints.
speaks = os.environ["RANK"] == "0"
for piece in stream(load(folder, tp_plan="auto"), [user(Path(picture), question)]):
    if speaks:
        print(piece, end="", flush=True)
torch.distributed.destroy_process_group()
