"""Data: from tree sequences to minibatches."""
