"""Pure functions of the method: tensors in, tensors out, no modules."""
