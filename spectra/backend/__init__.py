"""What every other sub-package stands on: vectors, true float32, free memory, ranks, errors."""
