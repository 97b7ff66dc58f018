"""What surrounds a step: the step itself, optimizer, checkpoints, log, interrupts."""
