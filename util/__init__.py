"""The harness: data, training loop, logs and checkpoints. Knows nothing of deconv or models."""
