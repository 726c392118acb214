"""Text curation on datatrove: raw documents in, filters, deduplication, decontamination, training shards out.

`options` and `inputs` are plain Python; everything else needs the extra `data` (`pip install 'hfllm[data]'`).

    options.py          every setting, with its default
    inputs.py files.py  the files of a dataset name, and how each kind is read in bounded memory
    warc.py html_text.py html_tokens.py     web archives, and the text of their pages
    reader.py           the first step of the pipeline
    quality.py          length, Gopher, C4 and repetition rules
    content.py spam.py  language, spam, toxic words
    decontamination.py  overlap with evaluation sets
    dedup.py            exact and near duplicates
    perplexity.py ngram_model.py
    pipeline.py         the stages, and how to run them on this machine
"""
