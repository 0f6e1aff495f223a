"""Training: data, tasks, batches, models and the loop; needs the extra `hf`."""
