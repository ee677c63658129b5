"""What a run needs around its loop: processes, checkpoints, the lock on its directory, its report."""
