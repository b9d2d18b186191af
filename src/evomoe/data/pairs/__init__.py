"""Pairs of sentences: corpora, the store of their token ids, batches of tokens, and the datamodules over them."""
