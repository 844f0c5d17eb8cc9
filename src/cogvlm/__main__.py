"""``python -m cogvlm``, and so ``torchrun -m cogvlm``: the ``cogvlm`` command."""

import os

# torch's engines would note, once in every process, that a step used all of its weights.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

if __name__ == "__main__":
    from .cli import main

    main()
