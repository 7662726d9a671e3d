"""What every other sub-package uses: vectors, random numbers, true float32, free memory, ranks, errors."""
