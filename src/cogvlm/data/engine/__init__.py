"""The data engine: material to training records, in shards, with every refusal counted.

::

    makers   render (pages forms charts screens objects lines)   what is drawn here
             latex (pdf, formulae)   label                        what exists, with its truth
             records                                              what has questions already
    steps    compose (questions)   filter
    ends     pack (shards, index)   sheet (to look at)
    over     run (processes, Ray)

``step`` says what flows between them.  What is drawn is set by ``ink`` in ``faces`` with text of a
``corpus`` or of ``words``, and damaged by ``warp``.  Imports no torch; matplotlib, pypdfium2,
RapidOCR, playwright and Ray when they are needed.
"""
