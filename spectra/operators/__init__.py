"""What can be multiplied by a vector: symmetric linear operators."""
