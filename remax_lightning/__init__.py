"""ReMax: RLHF without a value model, as a collection of PyTorch Lightning modules."""
