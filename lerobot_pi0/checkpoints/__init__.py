"""Weights in and out: files and Hub repositories, names of tensors, reading, writing, the model card."""
