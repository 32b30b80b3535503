"""Files of weights: our own, official checkpoints, and where fine-tuning starts."""
