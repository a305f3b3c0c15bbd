"""What a trained model does: ranks of its attention, what it predicts, and in which order."""
