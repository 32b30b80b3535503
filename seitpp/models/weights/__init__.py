"""Files of weights, of this library and of the official releases, and the initialization of fine-tuning."""
