"""Running text: corpora, the store of its token ids, windows, and the datamodules over them."""
