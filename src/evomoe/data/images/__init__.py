"""Labelled images: sources, augmentation, and the datamodules over them."""
