"""From a trained model to estimates."""
