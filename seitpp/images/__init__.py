"""Image input: sources of encoded images, their annotations, decoding, and batches of pixels."""
