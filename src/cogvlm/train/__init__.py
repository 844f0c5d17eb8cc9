"""Training: one loop, one step; stages bring batches and a loss."""
