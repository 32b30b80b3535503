"""Robustness of a classifier: corruptions, other images of the same classes, and adversarial perturbations."""
