"""The ground that every room stands on: vectors on a device, true float32, free memory, ranks, errors."""
