"""A step of a model as a list of operations, with few fast kernels for the small ones between its products."""
