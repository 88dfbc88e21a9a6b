"""From tree sequences to minibatches."""
