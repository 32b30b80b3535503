"""Where pictures come from: sources of encoded images, their annotations, decoding, batches of pixels."""
