"""What is looked at before a run costs anything: on each machine, in the stores, between the workers."""
