"""Labelled sentences: corpora, the store of their token ids, batches, and the datamodules over them."""
