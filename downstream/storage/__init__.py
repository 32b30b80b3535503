"""Storage against accuracy: ways to keep a training set in fewer bytes, and what each of them costs."""
