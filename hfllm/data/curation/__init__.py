"""Text curation on datatrove: raw documents in, filters, deduplication, decontamination, training shards out.

`options` and `inputs` are plain Python; everything else needs the extra `data` (`pip install 'hfllm[data]'`).

    options.py      every setting, with its default
    inputs.py       the files of a dataset name, and how each kind is read in bounded memory, web archives too
    text.py         words, hashes of their n-grams, and the text of web pages
    filters.py      length, Gopher, C4 and repetition rules, language, spam, toxic words
    duplicates.py   exact and near duplicates, and overlap with evaluation sets
    perplexity.py   texts that a reference model finds unlikely, a causal one or a byte n-gram model
    pipeline.py     the first step, the stages, and how to run them on this machine
"""
