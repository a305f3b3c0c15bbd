"""The run's life: step loop, DeepSpeed engine, checkpoints, schedule, launch on Ray Train."""
